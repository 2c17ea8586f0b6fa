"""The pages in docs/: what they show runs, what they quote is said, what they name is there."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import click
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxlwp
from jaxlwp.cli import main
from tests.test_architecture import VALUES, VERBS
from tests.test_readme import PAGES, ROOT, blocks, run_page

TESTED = {
    "README.md": "test_readme.py",
    "docs/checkpoints.md": "test_checkpoints.py",
    "docs/choosing.md": "test_readme.py",
    "docs/clusters.md": "test_readme.py",
    "docs/comparison.md": "test_pages.py",
    "docs/contracts.md": "test_readme.py",
    "docs/evaluation.md": "test_readme.py",
    "docs/forecast.md": "test_compiled.py",
    "docs/loops.md": "test_readme.py",
    "docs/memory.md": "test_readme.py",
    "docs/operators.md": "test_pages.py",
    "docs/plans.md": "test_readme.py",
    "docs/plots.md": "test_notebooks.py",
    "docs/processes.md": "test_restart.py",
    "docs/saving.md": "test_readme.py",
    "docs/simulate.md": "test_simulate.py",
    "docs/systems.md": "test_readme.py",
}
"""Which file runs the Python of which page."""


def test_python_of_every_page_is_run() -> None:
    """A new page with Python stands in `TESTED`, and that file names it."""
    pages = {path.relative_to(ROOT).as_posix(): text for path, text in PAGES.items()}
    shown = {page for page, text in pages.items() if re.search("^```(python|diff)", text, re.M)}
    assert shown == set(TESTED)
    for page, file in TESTED.items():
        assert page.rpartition("/")[2] in (ROOT / "tests" / file).read_text(), (page, file)


# --- a wrong number -------------------------------------------------------------------------------


def test_the_partitioners_wrong_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """If it is right one day: change docs/comparison.md and the README, and drop this."""
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # as before when the page has run
    names = run_page("docs/comparison.md")
    assert names["ratios"]["constraint"] == pytest.approx(2, rel=1e-5)
    assert names["ratios"]["by hand"] == pytest.approx(1, rel=1e-5)
    assert names["ratios"]["plan"] == pytest.approx(1, rel=1e-5)
    said = blocks("text", "docs/comparison.md")[0].splitlines()
    assert said == [
        f"{name}: {ratio:.4f} times the right gradient" for name, ratio in names["ratios"].items()
    ]


# --- troubleshooting -----------------------------------------------------------------------------

RATES = jaxlwp.Rates(flops_per_s=1e12, memory_bytes_per_s=1e11)
WEIGHTS, IMAGES = jnp.ones((8, 8)), jnp.ones((16, 8))


def loss(weights: jax.Array, images: jax.Array) -> jax.Array:
    return jnp.mean((images @ weights) ** 2)


def two_layers(weights: jax.Array, images: jax.Array) -> jax.Array:
    return jnp.mean(jax.nn.relu(images @ weights) @ weights)


def printing(weights: jax.Array, images: jax.Array) -> jax.Array:
    jax.debug.print("here")
    return loss(weights, images)


def planned(fn: Callable[..., jax.Array] = loss, **options: object) -> jaxlwp.Plan:
    options = {"devices": 8, "rates": RATES, **options}
    return jaxlwp.parallelize(fn, WEIGHTS, IMAGES, **options)  # type: ignore[arg-type]


def on_another_mesh() -> None:
    plan = planned()
    with jax.set_mesh(jax.make_mesh((2, 4), ("a", "b"))):
        plan(WEIGHTS, IMAGES)


def without_the_compiler() -> None:
    if importlib.util.find_spec("jax_plugins.xla_cuda13"):
        raise RuntimeError(
            "target h200:8: its compiler, JAX's plugin for CUDA 13, is not installed; run"
        )
    jaxlwp.target_mesh("h200:8")


class Normed(nnx.Module):
    def __init__(self) -> None:
        self.norm = nnx.BatchNorm(8, rngs=nnx.Rngs(0))


def in_another_mode() -> None:
    def normed(model: Normed, images: jax.Array) -> jax.Array:
        return jnp.mean(model.norm(images) ** 2)

    model = Normed()
    plan = jaxlwp.parallelize(normed, model, IMAGES, devices=8, rates=RATES)
    model.eval()
    plan(model, IMAGES)


def with_statistics() -> jaxlwp.Plan:
    def centred(weights: jax.Array, batch_stats: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return loss(weights, x - batch_stats["mean"])

    stats = {"mean": jnp.ones(8)}
    return jaxlwp.parallelize(centred, WEIGHTS, stats, IMAGES, devices=8, rates=RATES)


PROVOKED: dict[str, Callable[[], object]] = {
    "devices: 8 asked": lambda: planned(devices=8 * len(jax.devices())),
    "loss function: its": lambda: planned(lambda w, x: x @ w),
    "trace: ... which is no array": lambda: jaxlwp.parallelize(
        lambda p, x: loss(p["w"], x), {"w": WEIGHTS, "name": "relu"}, IMAGES, rates=RATES
    ),
    "trace: debug_print": lambda: planned(printing),
    "plan: ... but the plan was made for": lambda: planned()(WEIGHTS, IMAGES[:6]),
    "plan: model": in_another_mode,
    "place_batch": lambda: with_statistics().place_batch(IMAGES),
    "plan: ... is set": on_another_mesh,
    "plan: the plan is for": lambda: planned(devices="dgx-h100:1", rates=None)(WEIGHTS, IMAGES),
    "Strategy ...": lambda: planned(two_layers, strategy=planned().strategy),
    "strategy 'data'": lambda: jaxlwp.parallelize(
        loss, WEIGHTS, IMAGES[:12], devices=8, rates=RATES, strategy="data"
    ),
}
"""What provokes the quoted messages, by their beginnings."""
COMPILING = ("target ...: its compiler", "target ...: JAX looked for GPUs")
"""Those of an environment: tests/test_target.py provokes them."""


def quoted() -> list[str]:
    """The messages that docs/troubleshooting.md quotes: symptoms that begin with code and `:`."""
    rows = re.findall(r"^\| `([^`]+)` \|", PAGES[ROOT / "docs/troubleshooting.md"], re.M)
    return [row for row in rows if ": " in row or row.startswith("Strategy")]


def test_every_quoted_message_is_provoked() -> None:
    every = (*PROVOKED, *COMPILING)
    assert len(quoted()) == len(every)
    assert all(sum(row.startswith(start) for start in every) == 1 for row in quoted())


@pytest.mark.parametrize("start", PROVOKED)
def test_quoted_messages(start: str) -> None:
    (text,) = (row for row in quoted() if row.startswith(start))
    pattern = ".*".join(re.escape(part) for part in text.split("..."))
    pattern = re.sub(r"\b(8|12)\b", r"\\d+", pattern)
    with pytest.raises(ValueError) as error:
        PROVOKED[start]()
    assert re.match(pattern, str(error.value)), (text, str(error.value))


@pytest.mark.parametrize("start", COMPILING)
def test_quoted_messages_of_compiling(start: str) -> None:
    (text,) = (row for row in quoted() if row.startswith(start))
    from jaxlwp.check import _target

    source = re.sub(r'"\s*f?"', "", inspect.getsource(_target))
    pattern = ".*".join(re.escape(part) for part in text.split("..."))
    assert re.search(pattern.replace("target\\ .*:", "target {target}:"), source)


# --- names ----------------------------------------------------------------------------------------


def test_operators_page_shows_the_files() -> None:
    """Code is that of the file in the title; names are in the files beside them."""
    page = PAGES[ROOT / "docs/operators.md"]
    shown = re.findall(r'^```python title="([^"]+)"\n(.*?)^```$', page, re.DOTALL | re.M)
    assert len(shown) == len(blocks("python", "docs/operators.md")) == 4
    for file, code in shown:
        assert code in (ROOT / file).read_text(), file
    from jaxlwp.kernels import _node
    from jaxlwp.ops import _conv, _derivative, _pool, _rule
    from tests.contracts import cases, harness

    there: dict[ModuleType, str] = {
        _conv: "_signature",
        _derivative: "LINEAR BILINEAR",
        _node: "LIBRARY REDUCTIONS",
        _pool: "RULES",
        _rule: "Signature Window Local Rule bind_lowering anonymous",
        harness: "Case",
        cases: "POOLS",
    }
    for module, names in there.items():
        for name in names.split():
            assert hasattr(module, name), (module, name)
            assert name in page
    assert {"kind", "signature", "lower", "flops"} <= set(_rule.Rule.__dataclass_fields__)
    assert {"role", "windows", "fill", "even"} <= set(_rule.Signature.__dataclass_fields__)
    for role in ("anchor", "follow", "reduce", "lazy"):
        assert f'"{role}"' in page and role in str(_rule.Role)


def commands() -> list[tuple[str, str, str]]:
    """Page, subcommand and the rest of every `jaxlwp ...` that a page shows as code."""
    found = []
    for path, text in PAGES.items():
        if path.name == "errors.md":  # wrong ones, which test_bad_input.py runs
            continue
        inline = re.findall(r"`(jaxlwp [^`\n]+)`", text)
        for line in (*inline, *re.findall(r"^    (jaxlwp .+)$", text, re.M)):
            words = line.partition(" ")[2].removeprefix("--distributed ")
            name, _, rest = words.partition(" ")
            if name.isalpha() and not re.match(r"[=(]", rest):
                found.append((path.name, name, rest))
    return found


def test_commands_and_their_options_are_there() -> None:
    assert len(commands()) > 20
    for page, name, rest in commands():
        command = main.commands.get(name)
        assert isinstance(command, click.Command), (page, name)
        known = {option for param in command.params for option in param.opts}
        used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest))
        assert used <= known, (page, name, used - known)


def test_make_targets_are_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for path, text in PAGES.items():
        named = set(re.findall(r"(?:`|^    )make ([a-z][a-z-]+)", text, re.M))
        assert named <= targets, (path.name, named - targets)


def test_api_pages_name_the_public_face() -> None:
    page = (ROOT / "docs/api/index.md").read_text()
    named = set(re.findall(r"`(\w+)`", page))
    assert named >= {*VERBS, *VALUES}
    assert named - {"ValueError"} == {*VERBS, *VALUES}
    for face, name in re.findall(r"\]\[(jaxlwp\.\w+)\.(\w+)\]", page):
        assert getattr(importlib.import_module(face), name) is getattr(jaxlwp, name)


@pytest.mark.parametrize(
    "page", sorted((ROOT / "docs/api").glob("[a-z]*.md")), ids=lambda p: p.stem
)
def test_what_api_pages_show_has_a_docstring(page: Path) -> None:
    """MkDocs leaves out what has none."""
    if page.stem == "index":
        return
    face = importlib.import_module(f"jaxlwp.{page.stem}")
    assert page.read_text() == f"# {face.__name__}\n\n::: {face.__name__}\n"
    written = documented(face.__name__.rpartition(".")[2])
    missing = [
        name
        for name in face.__all__
        if not (inspect.isclass(getattr(face, name)) or inspect.isroutine(getattr(face, name)))
        and name not in written
    ]
    assert not missing


def documented(folder: str) -> set[str]:
    """Names of a folder's files that are assigned and have a docstring behind them."""
    names = set()
    for path in (ROOT / "jaxlwp" / folder).glob("*.py"):
        body = ast.parse(path.read_text()).body
        for node, after in zip(body, body[1:], strict=False):
            text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", 0)]
            names |= {t.id for t in targets if isinstance(t, ast.Name) and text}
    return names


WITH_EXAMPLES = [
    path for path in sorted((ROOT / "jaxlwp").rglob("*.py")) if ">>> " in path.read_text()
]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda p: p.stem)
def test_examples_in_docstrings(path: Path) -> None:
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    results = doctest.testmod(module)
    assert results.attempted > 0 and results.failed == 0
