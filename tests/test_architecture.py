"""The one-way order of imports, public API only, and every exported name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import jaxlwp

PACKAGE = Path(jaxlwp.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
SOLVER = (
    *("_tables", "_problem", "_eliminate", "_bound", "_branch", "_exhaustive", "_marginals"),
    *("_solve", "_limit", "_least", "_minmax"),
)
NUMBERS_ONLY = (
    "_config",
    "_layout",
    "_devices",
    *SOLVER,
)
COST_FREE = (
    *(
        "_spmd",
        "_steps",
        "_program",
        "_constants",
        "_samples",
        "_graph",
        "_group",
        "_trace",
        "_halo",
        "_reshard",
        "_lower",
    ),
    *("_reshard", "_lower", "_buffers", "_memory", "ops"),
)
COSTS = (
    "_collectives",
    "_cost",
    "_changes",
    *SOLVER,
    "_space",
    "_search",
    "_lazy",
    "_wide",
    "_devices",
)
LEAVES = ("_report", "_plot", "_compare", "_cli", "_target")


def imports_when_loaded(path: Path) -> set[str]:
    """Modules imported at the top level of a file, as dotted names."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def all_imports(path: Path) -> set[str]:
    """Modules imported anywhere in a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def name_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_order_of_imports(path: Path) -> None:
    name, imported = name_of(path), imports_when_loaded(path)
    if name in NUMBERS_ONLY:
        assert not {i for i in imported if i.split(".")[0] in ("jax", "flax", "optax")}
    if name in COST_FREE:
        assert not {i for i in imported if i.removeprefix("jaxlwp.") in COSTS}
    if name not in (*LEAVES, "__main__", "__init__"):
        assert not {i for i in imported if i.removeprefix("jaxlwp.") in LEAVES}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_public_api_only(path: Path) -> None:
    private = {i for i in all_imports(path) if i.startswith(("jax._src", "jaxlib"))}
    assert not private
    if name_of(path) in NUMBERS_ONLY:
        assert not {i for i in all_imports(path) if i.split(".")[0] == "jax"}


COLLECTIVES = (
    *("all_gather", "all_to_all", "axis_index", "pcast", "pmax", "pmin", "ppermute", "pshuffle"),
    *("psum", "psum_scatter", "pmean", "pswapaxes"),
)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_one_module_calls_collectives(path: Path) -> None:
    """Elsewhere a collective could rely on an order of mesh axes of its own."""
    called = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("lax", "jax")
    }
    assert name_of(path) == "_spmd" or not called.intersection(COLLECTIVES)


def test_models_do_not_import_jaxlwp() -> None:
    models = (PACKAGE.parent / "models").glob("*.py")
    assert not {i for path in models for i in all_imports(path) if i.startswith("jaxlwp")}


def test_every_exported_name_exists() -> None:
    assert len(set(jaxlwp.__all__)) == len(jaxlwp.__all__)
    for name in jaxlwp.__all__:
        assert getattr(jaxlwp, name) is not None
