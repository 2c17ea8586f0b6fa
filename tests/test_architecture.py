"""What import contracts (`make lint`) cannot hold: faces, public JAX API, exported names."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import pydoc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import jaxlwp
from tests.import_graph import excepted

PACKAGE = Path(jaxlwp.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
NUMBERS_ONLY = (
    *(f"space/{name}.py" for name in ("_config", "_layout", "_moves", "_exchange")),
    *("devices/_device_graph.py", "solver/"),
)
"""Files that do not know JAX."""

each_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules imported anywhere below a node."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@each_module
def test_public_api_only(path: Path) -> None:
    imported = set(imports(ast.parse(path.read_text())))
    assert not {i for i in imported if i.startswith(("jax._src", "jaxlib"))}
    if place(path).startswith(NUMBERS_ONLY):
        assert not {i for i in imported if i.split(".")[0] in ("jax", "flax", "optax")}


@each_module
def test_folders_are_entered_by_their_faces(path: Path) -> None:
    """A folder's private files are imported by files of that folder alone."""
    folder = place(path).split("/")[0]
    for module in imports(ast.parse(path.read_text())):
        parts = module.split(".")
        if parts[0] == "jaxlwp" and len(parts) > 2:
            assert parts[1] == folder, module


SHOWING = ("__repr__", "__str__", "_repr_html_", "report")


@each_module
def test_reports_are_imported_by_reprs(path: Path) -> None:
    """The one way up: where a repr is called."""
    folder, tree = place(path).split("/")[0], ast.parse(path.read_text())
    if folder in ("report", "cli"):
        return
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    reprs = [node for node in functions if node.name in SHOWING]
    inside = sum(m.startswith("jaxlwp.report") for node in reprs for m in imports(node))
    checked = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    typed = sum(m.startswith("jaxlwp.report") for node in checked for m in imports(node))
    everywhere = sum(module.startswith("jaxlwp.report") for module in imports(tree))
    assert everywhere == inside + typed
    module = "jaxlwp." + place(path).removesuffix(".py").replace("/", ".")
    assert bool(inside) == ((module, "jaxlwp.report") in excepted())


COLLECTIVES = (
    *("all_gather", "all_to_all", "axis_index", "pcast", "pmax", "pmin", "ppermute", "pshuffle"),
    *("psum", "psum_scatter", "pmean", "pswapaxes"),
)


@each_module
def test_one_folder_calls_collectives(path: Path) -> None:
    """Elsewhere a collective could rely on an order of mesh axes of its own."""
    called = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("lax", "jax")
    }
    assert place(path).startswith("mesh/") or not called.intersection(COLLECTIVES)


def test_models_do_not_import_jaxlwp() -> None:
    models = (PACKAGE.parent / "models").glob("*.py")
    imported = {i for path in models for i in imports(ast.parse(path.read_text()))}
    assert not {i for i in imported if i.startswith("jaxlwp")}


def programs() -> Iterator[tuple[str, str]]:
    """What imports the package from outside: name and source."""
    root = PACKAGE.parent
    for path in (root / "demo.py", *root.glob("tests/**/*.py")):
        yield str(path.relative_to(root)), path.read_text()
    for path in root.glob("notebooks/*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        yield path.name, "\n".join(code)


def test_what_the_demo_the_notebooks_and_the_tests_import_is_there() -> None:
    """Also where no test runs them: the demo, benchmarks, what needs a GPU."""
    missing = []
    for name, source in programs():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxlwp"):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    if not hasattr(module, alias.name) and not importlib.util.find_spec(
                        f"{node.module}.{alias.name}"
                    ):
                        missing.append(f"{name}: {node.module}.{alias.name}")
    assert not missing


# --- names ----------------------------------------------------------------------------------------

VERBS = """
    parallelize trace price search search_measured bind compare explain pareto solve verify
    device_graph make_mesh target_mesh load_profile
""".split()
VALUES = """
    Plan Strategy Config Constraints Rates DeviceGraph MemoryLimitError BASELINES __version__
""".split()


def test_the_public_face() -> None:
    public = {
        name
        for name, value in vars(jaxlwp).items()
        if not (name.startswith("_") or inspect.ismodule(value))
    }
    assert sorted({*public, "__version__"}) == sorted([*VERBS, *VALUES])
    assert len(public) < 24
    for name in VERBS:
        text = getattr(jaxlwp, name).__doc__
        assert "Args:" in text and "Raises:" in text, name


def test_help_is_one_screen() -> None:
    """Behind the signature, which Python 3.13 prints with a line for every argument."""
    assert len(pydoc.plain(pydoc.render_doc(jaxlwp)).splitlines()) <= 60
    assert len((inspect.getdoc(jaxlwp.parallelize) or "").splitlines()) <= 60


@pytest.mark.parametrize("name", FOLDERS)
def test_faces(name: str) -> None:
    """Every folder says what it is for; what it exports is there, and documented."""
    face = importlib.import_module(f"jaxlwp.{name}")
    assert face.__doc__
    assert len(set(face.__all__)) == len(face.__all__)
    for exported in face.__all__:
        value = getattr(face, exported)
        if isinstance(value, type) or inspect.isfunction(value):
            assert value.__doc__, exported


def test_folders_that_wait_for_their_first_use() -> None:
    """They are there without an import of their own, and `import jaxlwp` does not load them."""
    program = """
import sys, jaxlwp
waiting = {"report", "simulate"}
assert waiting <= set(dir(jaxlwp)) and not any(f"jaxlwp.{n}" in sys.modules for n in waiting)
jaxlwp.report.plot_plan, jaxlwp.simulate.simulate_step
try:
    jaxlwp.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise SystemExit("no error")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
