"""A plan's page: its figures are the plan's, whatever the names; a browser draws it."""

from __future__ import annotations

import collections
import html.parser
import inspect
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from click.testing import CliRunner

import jaxlwp
from jaxlwp.cli._commands import main
from jaxlwp.cli._workload import load_workload
from jaxlwp.report import page_data, page_html, plan_html
from jaxlwp.report._page import embedded
from jaxlwp.simulate import simulate_step
from tests import chromium

RATES = jaxlwp.Rates(
    flops_per_s=1e10, memory_bytes_per_s=1e9, latency_s=(1e-5,), link_bytes_per_s=(1e9,)
)
NASTY = "</script><!--<b>\"'&\u2028 名"


def planned(model: str, devices: str, batch: int, **options: Any) -> jaxlwp.Plan:
    work = load_workload(model, batch=batch, input_shape=None, dtype=None, abstract=True)
    return jaxlwp.parallelize(work.loss, work.params, *work.batch, devices=devices, **options)


@pytest.fixture(scope="module")
def lenet() -> jaxlwp.Plan:
    return planned("models.lenet:LeNet5", "dgx-h100:1", 64, strategy="owt")


@pytest.fixture(scope="module")
def resnet() -> jaxlwp.Plan:
    return planned("models.resnet:ResNet50", "dgx-h100:4", 1024)


def nasty_plan() -> jaxlwp.Plan:
    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(jax.nn.relu(x @ params[NASTY]) @ params["second"])

    params = {NASTY: jnp.ones((8, 16)), "second": jnp.ones((16, 8))}
    return jaxlwp.parallelize(
        loss, params, jnp.ones((16, 8)), devices=8, rates=RATES, strategy="owt"
    )


@pytest.fixture(params=["lenet", "resnet", "small"], scope="module")
def plan(request: pytest.FixtureRequest) -> jaxlwp.Plan:
    name = request.param
    return nasty_plan() if name == "small" else request.getfixturevalue(name)


# --- data ----------------------------------------------------------------------------------------


def test_seconds_add_up(plan: jaxlwp.Plan) -> None:
    data = page_data(plan)
    for part in ("compute", "transfer", "sync"):
        total = sum(layer["cost"][part] for layer in data["layers"])
        assert total == pytest.approx(getattr(plan.cost, f"{part}_s"), rel=1e-9, abs=1e-15)
        assert data["cost"][part] == getattr(plan.cost, f"{part}_s")
    besides = sum(layer["cost"]["overhead"] for layer in data["layers"])
    assert besides + plan.space.tables.step_s == pytest.approx(plan.cost.overhead_s, rel=1e-9)
    assert data["cost"]["total"] == plan.cost.total_s


def test_collectives_are_the_plans(plan: jaxlwp.Plan) -> None:
    data = page_data(plan)
    entries = [entry for layer in data["layers"] for entry in layer["collectives"]]
    entries += [entry for output in data["outputs"] for entry in output]
    count: collections.Counter[Any] = collections.Counter()
    num_bytes: collections.Counter[Any] = collections.Counter()
    for entry in entries:
        key = entry["kind"], tuple(entry["axes"]), entry["backward"]
        count[key] += entry["count"]
        num_bytes[key] += entry["bytes"]
    keys = [(c.kind, c.axes, c.backward) for c in plan.collectives]
    assert count == collections.Counter(keys)
    for key in set(keys):
        same = (c for c, k in zip(plan.collectives, keys, strict=True) if k == key)
        assert num_bytes[key] == sum(c.num_bytes for c in same)
    assert data["bytes"] == sum(num_bytes.values())


def test_memory_arguments_edges(plan: jaxlwp.Plan) -> None:
    data = page_data(plan)
    assert sum(value for _, value in data["memory"]) == plan.memory.peak_bytes
    kept = sum(layer["kept"] for layer in data["layers"])
    assert kept == sum(plan.memory.layer_kept_bytes)
    stored = [a for layer in data["layers"] for a in layer["arguments"]]
    assert {a["name"] for a in stored} <= set(plan.graph.argument_names)
    assert sum(a["bytes"] for a in stored if a["parameter"]) == plan.memory.parameter_bytes
    pairs = {(e["source"], e["target"]) for e in data["edges"]}
    assert pairs == {(e.source, e.target) for e in plan.graph.edges}
    assert len(data["edges"]) == len(pairs)


def test_baselines_and_alternatives(lenet: jaxlwp.Plan) -> None:
    data = page_data(lenet)
    space = lenet.space
    assert [entry["name"] for entry in data["baselines"]] == list(jaxlwp.BASELINES)
    for entry in data["baselines"]:
        assert entry["cost"]["total"] == space.evaluate(space.baseline(entry["name"])).total_s
    explanation = jaxlwp.explain(space)
    sizes = space.devices.axis_sizes
    for layer in data["layers"]:
        ranked = explanation.alternatives(layer["name"])
        best = {a.config.describe(sizes): a.extra_s for a in ranked[:3]}
        shown = {entry["config"]: entry["more"] for entry in layer["alternatives"]}
        assert best.items() <= shown.items()
        (own,) = (entry for entry in layer["alternatives"] if entry["own"])
        assert own["config"] == layer["config"]


def test_timeline(plan: jaxlwp.Plan) -> None:
    told, step = page_data(plan)["step"], simulate_step(plan)
    assert (told["total"], told["serial"]) == (step.total_s, step.serial_s)
    assert sum(seconds for _, seconds in told["critical"]) == pytest.approx(step.total_s, rel=1e-9)
    assert len(told["events"]) == len(step.events)
    for (stream, cause, layer, begin, took, _), event in zip(
        told["events"], step.events, strict=True
    ):
        assert stream == (event.task.stream != "compute")
        assert told["causes"][cause] == event.task.cause
        assert layer == (-1 if event.task.layer is None else event.task.layer)
        assert begin == pytest.approx(1e6 * event.begin_s, abs=1e-3)
        assert took == pytest.approx(1e6 * event.seconds, abs=1e-3)


def test_baseline_that_is_not_possible() -> None:
    plan = planned("models.lenet:LeNet5", "dgx-h100:1", 12)
    data = page_data(plan)
    problems = {
        entry["name"]: entry["problem"] for entry in data["baselines"] if "problem" in entry
    }
    assert set(problems) == {"data", "owt"} and "12" in problems["data"]


def test_lines_of_the_users_code() -> None:
    @jax.jit
    def dense(weights: jax.Array, x: jax.Array) -> jax.Array:
        return x @ weights

    def loss(params: Any, x: jax.Array) -> jax.Array:
        x = dense(params[0], x)
        x = jax.nn.softplus(jnp.cumsum(x, axis=0))
        x = dense(params[1], x)
        return jnp.mean(jnp.cumsum(x, axis=0))

    plan = jaxlwp.parallelize(
        loss, [jnp.ones((8, 8))] * 2, jnp.ones((16, 8)), devices=8, rates=RATES, strategy="data"
    )
    first = inspect.getsourcelines(loss)[1]
    inner = inspect.getsourcelines(dense.__wrapped__)[1] + 2
    place = os.path.relpath(__file__)
    found = {layer["name"]: layer["source"] for layer in page_data(plan)["layers"]}
    called = f"{place}:{inner} ({dense.__wrapped__.__qualname__})"
    scope = loss.__qualname__
    assert found["0"][:2] == [called, f"{place}:{first + 1} ({scope})"]
    assert found["1"][:2] == [called, f"{place}:{first + 3} ({scope})"]
    # Functions of JAX are traced once: the second call has a line of its own.
    assert found["cumulative_0"][0] == f"{place}:{first + 2} ({scope})"
    assert found["cumulative_1"][0] == f"{place}:{first + 4} ({scope})"
    assert "jax/" not in json.dumps(found)


# --- the file ------------------------------------------------------------------------------------


class Scripts(html.parser.HTMLParser):
    """Texts of the script elements, as a browser divides a page; and what the page loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: collections.Counter[str] = collections.Counter()
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag == "script":
            self.texts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.texts[-1] += data


def test_names_cannot_end_the_data() -> None:
    plan = nasty_plan()
    found = Scripts(page_html(plan))
    assert len(found.texts) == 2
    assert json.loads(found.texts[0]) == json.loads(json.dumps(page_data(plan)))
    names = [a["name"] for layer in page_data(plan)["layers"] for a in layer["arguments"]]
    assert any("</script><!--<b>" in name for name in names)
    assert not set("<>&\u2028") & set(embedded({"name": NASTY}))
    assert json.loads(embedded({"name": NASTY})) == {"name": NASTY}


def test_page_loads_nothing(lenet: jaxlwp.Plan) -> None:
    found = Scripts(page_html(lenet))
    assert found.loaded == []
    assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttpRequest|import\(", page_html(lenet))


def test_size(resnet: jaxlwp.Plan) -> None:
    assert len(page_html(resnet).encode()) < 2e6


def test_written_in_one_step(
    lenet: jaxlwp.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.html"
    lenet.report(path)
    assert path.read_text(encoding="utf-8") == page_html(lenet) + "\n"
    path.write_text("before")

    def full(self: Path, data: bytes) -> None:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        lenet.report(path)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("name", "says"), [("none/plan.html", "no folder"), ("", "is a folder")])
def test_cannot_be_written(lenet: jaxlwp.Plan, tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(OSError, match=f"^report: cannot write .*{says}") as caught:
        lenet.report(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_command_line(tmp_path: Path) -> None:
    path = tmp_path / "plan.html"
    options = ["plan", "models.lenet:LeNet5", "--devices", "dgx-h100:1", "--batch", "64", "--html"]
    result = CliRunner().invoke(main, [*options, str(path)])
    assert result.exit_code == 0, result.output
    assert f"wrote {path}" in result.output and len(Scripts(path.read_text()).texts) == 2
    result = CliRunner().invoke(main, [*options, str(tmp_path / "none" / "plan.html")])
    assert result.exit_code == 2
    assert (
        result.output.startswith("Error: --html: cannot write") and result.output.count("\n") == 1
    )


# --- notebooks -----------------------------------------------------------------------------------


def test_notebooks(plan: jaxlwp.Plan) -> None:
    text = plan_html(plan)
    assert plan._repr_html_() == text
    found = Scripts(text)
    assert found.tags["script"] == 0 and found.tags["tr"] == 1 + len(plan.graph.layers)
    assert "color:" not in text.replace("color:inherit", "")  # the theme's own


def test_notebooks_escape() -> None:
    text = plan_html(nasty_plan())
    assert set(Scripts(text).tags) <= {
        *("div", "p", "b", "br", "table", "thead", "tbody", "tr", "th", "td")
    }


# --- a browser -----------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(
    chromium.browser() is None, reason=f"none of {', '.join(chromium.BROWSERS)} is installed"
)


@pytest.fixture
def page(tmp_path: Path) -> Iterator[chromium.Page]:
    with chromium.running(tmp_path) as found:
        yield found


def shown(page: chromium.Page, selector: str) -> int:
    return int(page.value(f"document.querySelectorAll({json.dumps(selector)}).length"))


def panel(page: chromium.Page) -> str:
    return str(page.value("document.getElementById('panel').innerText"))


@needs_browser
@pytest.mark.parametrize("name", ["lenet", "resnet"])
def test_drawn(
    name: str, page: chromium.Page, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    plan = request.getfixturevalue(name)
    data, path = page_data(plan), tmp_path / "plan.html"
    plan.report(path)
    page.open(path)
    assert shown(page, ".node") == len(plan.graph.layers)
    assert shown(page, ".edge:not(#legend *)") == len(data["edges"])
    assert shown(page, ".moved") == sum(edge["bytes"] > 0 for edge in data["edges"])
    assert "A training step" in panel(page)
    ran = [event for event in data["step"]["events"] if event[4] > 0]
    assert shown(page, "#time rect:not(.back)") == len(ran)
    assert "Timeline" in str(page.value("document.getElementById('step-text').innerText"))
    for n in (0, len(data["layers"]) // 2, len(data["layers"]) - 1):
        layer = data["layers"][n]
        page.click(f".node[data-layer='{n}'] .title")
        text = panel(page)
        assert text.count(layer["name"]) >= 1 and layer["config"] in text
        assert page.value("document.getElementById('layer').textContent") == layer["name"]
        assert shown(page, "#time rect.picked") == sum(event[2] == n for event in ran)
        for entry in layer["collectives"] + layer["arguments"]:
            assert entry.get("kind", entry.get("name")) in text
        for entry in layer["alternatives"]:
            assert entry["config"] in text
        assert all(line in text for line in layer["source"])
    assert page.requests == [path.as_uri()] and page.problems == []


@needs_browser
def test_nothing_overlaps(resnet: jaxlwp.Plan, page: chromium.Page, tmp_path: Path) -> None:
    path = tmp_path / "plan.html"
    resnet.report(path)
    page.open(path)
    boxes = page.value(
        "[...document.querySelectorAll('.node .box')].map((e) => { const b = "
        "e.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; })"
    )
    for n, (left, top, right, bottom) in enumerate(boxes):
        for a, b, c, d in boxes[:n]:
            assert right <= a or c <= left or bottom <= b or d <= top


@needs_browser
def test_search_filter_and_colours(lenet: jaxlwp.Plan, page: chromium.Page, tmp_path: Path) -> None:
    path, data = tmp_path / "plan.html", page_data(lenet)
    lenet.report(path)
    page.open(path, fragment="#layer=fc4")
    assert page.value("document.getElementById('layer').textContent") == "fc4"

    def dimmed() -> int:
        return shown(page, ".node.dim")

    total, convs = len(data["layers"]), [la for la in data["layers"] if la["kind"] == "conv"]
    page.value("document.getElementById('search').focus()")
    page.type("conv")
    assert total - dimmed() == len(convs) > 0
    page.value("document.getElementById('search').value = ''; find()")
    choose = (
        "(() => {{ const e = document.getElementById('{0}'); e.value = '{1}'; e.onchange(); }})()"
    )
    page.value(choose.format("filter", "communicates"))
    assert total - dimmed() == sum(bool(layer["collectives"]) for layer in data["layers"])
    page.value(choose.format("filter", "all"))
    assert dimmed() == 0
    page.click("#legend button")
    most = collections.Counter(layer["config"] for layer in data["layers"]).most_common(1)[0][1]
    assert total - dimmed() == most
    page.value(choose.format("by", "bytes"))
    assert shown(page, "#legend button") == 0 and page.problems == []


@needs_browser
def test_nasty_names_are_drawn(page: chromium.Page, tmp_path: Path) -> None:
    path = tmp_path / "plan.html"
    nasty_plan().report(path)
    page.open(path)
    page.click(".node .title")
    assert "</script><!--<b>" in panel(page) and page.problems == []
