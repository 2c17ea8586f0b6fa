"""README and docs: their loops run, give one device's losses, and differ from them in few lines."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import optax
import pytest

import jaxlwp
from jaxlwp.check import _compare

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
MOST_LINES = 200
MOST_CHANGED_LINES = 6


def blocks(language: str, *pages: str) -> list[str]:
    """The blocks of code of some pages, in order."""
    text = "\n".join(PAGES[ROOT / page] for page in pages)
    return re.findall(rf"^```{language}(?: [^\n]*)?\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


LINEN, NNX = blocks("diff", "README.md", "docs/loops.md")


def changed(block: str, sign: str) -> list[str]:
    return [line[1:] for line in block.splitlines() if line.startswith(sign)]


def version(block: str, sign: str) -> str:
    """The program before (sign "-") or after (sign "+") the change."""
    return "\n".join(line[1:] for line in block.splitlines() if line[:1] in (" ", sign))


def run(program: str, **names: Any) -> dict[str, Any]:
    namespace = {"__name__": "readme", **names}
    exec(compile(program, "README.md", "exec"), namespace)
    return namespace


def run_page(page: str, **names: Any) -> dict[str, Any]:
    """All Python of a page, block after block, in one namespace that begins with some names."""
    for block in blocks("python", page):
        names = run(block, **names)
    return names


@pytest.fixture(autouse=True)
def _quick(quick_measurements: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("block", [LINEN, NNX], ids=["Linen", "NNX"])
def test_few_lines_change(block: str) -> None:
    assert all(line[:1] in (" ", "+", "-") for line in block.splitlines())
    assert "jaxlwp" not in version(block, "-")
    assert len(changed(block, "+")) <= MOST_CHANGED_LINES
    assert len(changed(block, "-")) <= len(changed(block, "+"))


def test_nnx_loop() -> None:
    expected, actual = run(version(NNX, "-")), run(version(NNX, "+"))
    np.testing.assert_allclose(actual["losses"], expected["losses"], rtol=1e-4)
    assert len(set(expected["losses"])) == len(expected["losses"])
    assert actual["plan"].space.devices.num_devices == 8
    assert actual["plan"].result.optimal


def normed_losses(names: dict[str, Any]) -> list[float]:
    """Losses of the loop with batch normalisation in docs/loops.md, on one device."""
    params, stats = names["variables"]["params"], names["variables"]["batch_stats"]
    state, losses = names["tx"].init(params), []
    step = jax.jit(jax.value_and_grad(names["normed_loss"], has_aux=True))
    for images, labels in names["batches"]:
        (loss, stats), grads = step(params, stats, images, labels)
        updates, state = names["tx"].update(grads, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    return losses


def test_linen_loop_then_the_pages_that_go_on_from_it() -> None:
    expected, actual = run(version(LINEN, "-")), run(version(LINEN, "+"))
    np.testing.assert_allclose(actual["losses"], expected["losses"], rtol=1e-4)
    assert len(set(expected["losses"])) == len(expected["losses"])
    names = run_page("docs/loops.md", **actual)
    arguments = (actual["state"].params, names["images"], names["labels"])
    for new, fn in (("smaller", "loss_fn"), ("evaluate", "accuracy")):
        np.testing.assert_allclose(names[new](*arguments), names[fn](*arguments), rtol=1e-5)
    np.testing.assert_allclose(names["normed_losses"], normed_losses(names), rtol=1e-5)
    names = run_page("docs/plans.md", **actual)
    assert Path("plan.html").read_text().startswith("<!DOCTYPE html>")
    assert not any(c.axes("height") for c in names["plan"].strategy.configs.values())
    names = run_page("docs/choosing.md", **actual)
    assert names["plan"].strategy == names["result"].strategy == actual["plan"].strategy
    assert names["solution"].choices == (1, 0) and names["solution"].cost_s == 3
    names = run_page("docs/contracts.md", **actual)
    compiled_bytes = sum(c.count * c.operand_bytes for c in names["compiled"])
    assert compiled_bytes == sum(c.num_bytes for c in names["plan"].collectives) > 0


def test_machines_that_are_not_here() -> None:
    def loss_fn(params: Any, images: Any, labels: Any) -> Any:
        logits = images.reshape(images.shape[0], -1) @ params
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    params = jax.ShapeDtypeStruct((144, 10), jnp.float32)
    batch = jax.ShapeDtypeStruct((64, 12, 12, 1), jnp.float32), jax.ShapeDtypeStruct((64,), int)
    given = {"loss_fn": loss_fn, "params": params, "batch": batch, "jax": jax, "jnp": jnp}
    namespace = run_page("docs/clusters.md", jaxlwp=jaxlwp, **given)
    assert namespace["plan"].space.devices.num_devices == 32
    assert jaxlwp.Strategy.load("plan.json") == namespace["plan"].strategy
    assert namespace["hours"] > 0
    assert [sample.value for sample in namespace["sizes"].samples] == [1, 8, 64]
    namespace = run_page("docs/systems.md", jaxlwp=jaxlwp, **given)
    assert namespace["plan"].space.devices.num_devices == 16 and namespace["seconds"] > 0


def test_memory(capsys: pytest.CaptureFixture[str]) -> None:
    names = run_page("docs/memory.md")
    assert names["limited"].memory.peak_bytes <= 0.5 * names["memory"].peak_bytes
    printed = capsys.readouterr().out
    assert "memory_bytes: 100,000,000 is too little" in printed and "less memory" in printed


def test_a_system_of_ones_own() -> None:
    """The two TOML texts of docs/systems.md are one file, with a GPU by name or as a table."""
    system, gpu = blocks("toml", "docs/systems.md")
    Path("cluster.toml").write_text(system)
    known = jaxlwp.devices.load_system("cluster.toml", hosts=4)
    assert known.num_hosts == 4 and known.gpu.name == jaxlwp.devices.preset("h200").gpu.name
    without = "\n".join(line for line in system.splitlines() if not line.startswith("gpu ="))
    Path("cluster.toml").write_text(f"{without}\n{gpu}")
    assert jaxlwp.devices.load_system("cluster.toml", hosts=4).gpu.name == "mine"


def test_what_is_saved_is_searched_again() -> None:
    def loss_fn(params: Any, images: Any, labels: Any) -> Any:
        logits = images.reshape(images.shape[0], -1) @ params
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    params = jax.ShapeDtypeStruct((144, 10), jnp.float32)
    batch = jax.ShapeDtypeStruct((16, 12, 12, 1), jnp.float32), jax.ShapeDtypeStruct((16,), int)
    problem, beside = blocks("python", "docs/saving.md")
    namespace = run(problem, jaxlwp=jaxlwp, loss_fn=loss_fn, params=params, batches=[batch])
    assert jaxlwp.Strategy.load("small.json") == namespace["small"].strategy
    run(beside, **namespace)
    (shown,) = blocks("json", "docs/saving.md")
    jsonschema.validate(json.loads(shown), jaxlwp.space.strategy_schema())
    predicted = jaxlwp.Strategy.from_json(shown).record
    assert predicted.step_s == pytest.approx(json.loads(shown)["predicted"]["step_s"], rel=1e-2)


def test_plans_that_only_evaluate() -> None:
    def predict(params: Any, images: Any) -> Any:
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(images, params, (1, 1), "SAME", dimension_numbers=dims)

    params, images = jnp.full((3, 3, 1, 1), 0.1), jnp.ones((1, 16, 16, 1))
    given = {"predict": predict, "params": params, "images": images, "jax": jax, "jnp": jnp}
    planned, decoder, sampler, beside = blocks("python", "docs/evaluation.md")
    namespace = run(planned, jaxlwp=jaxlwp, **given)
    np.testing.assert_allclose(namespace["outputs"], predict(params, images), rtol=1e-5)
    small = decoder.replace("VAEDecoder(", "VAEDecoder((16, 8), blocks=1, groups=4, ")
    assert small != decoder
    assert run(small.replace("512, 512", "16, 16"))["plan"].space.devices.num_devices == 8
    samples = run(sampler, **namespace)["samples"]
    training_plan = jaxlwp.parallelize(
        lambda params, images: predict(params, images).sum(), params, images, devices="h100:8"
    )
    given |= {"image": images[:, :8], "training_plan": training_plan, "jaxlwp": jaxlwp}
    plan = run(beside, **given)["plan"]
    assert plan.param_shardings == training_plan.param_shardings
    for _ in range(20):
        images = images - 0.1 * predict(params, images)
    np.testing.assert_allclose(samples, images, rtol=1e-4, atol=1e-5)


def test_documented_json_keys() -> None:
    page = PAGES[ROOT / "docs/command-line.md"]
    documented = set(re.findall(r"`([a-z_]+)`", page.split("Its `--json`")[1]))
    content = _compare.Comparison.to_json.__doc__ or ""
    written = set(re.findall(r"`([a-z_]+)`", content))
    assert {"results", "times_s"} <= written <= documented


def test_links_lead_somewhere() -> None:
    for path, text in PAGES.items():
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (path.parent / target).exists(), (path, target)


def test_pages_stay_short() -> None:
    for name in ("README.md", "ARCHITECTURE.md"):
        assert len((ROOT / name).read_text().splitlines()) <= MOST_LINES


def test_baselines_are_the_documented_ones() -> None:
    assert all(f'`"{name}"`' in README for name in jaxlwp.BASELINES)
