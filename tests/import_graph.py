"""Print which folder of the package imports which: `make graph`.

The folders stand in an order in which each imports only those below it; it is an error if there is
none. The text of reprs is imported when they are called, and listed apart.
"""

from __future__ import annotations

import graphlib
import sys
import tomllib
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
PACKAGE = "jaxlwp"


def excepted() -> set[tuple[str, str]]:
    """The imports of reprs: pairs of modules, from the contract in `pyproject.toml`."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    listed = contracts["contracts"][0]["ignore_imports"]
    return {tuple(pair.split(" -> ")) for pair in listed}


def folder_of(module: str) -> str:
    """The folder of a module, or the module at the top."""
    return ".".join(module.split(".")[:2])


def folders() -> tuple[dict[str, set[str]], dict[str, int]]:
    """What each folder imports, imports inside functions too; lines of each folder."""
    graph = grimp.build_graph(PACKAGE, exclude_type_checking_imports=True, cache_dir=None)
    apart, found, lines = excepted(), {}, {}
    for module in sorted(graph.modules - {PACKAGE}):
        folder = folder_of(module)
        imported = found.setdefault(folder, set())
        for target in graph.find_modules_directly_imported_by(module):
            if (module, target) not in apart and folder_of(target) != folder:
                imported.add(folder_of(target))
        path = ROOT / Path(*module.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        lines[folder] = lines.get(folder, 0) + len(path.read_text().splitlines())
    return found, lines


def main() -> int:
    """Print the graph; fails if there is a cycle."""
    found, lines = folders()
    try:
        order = list(graphlib.TopologicalSorter(found).static_order())
    except graphlib.CycleError as error:
        print("folders import each other in a circle:", " -> ".join(error.args[1]))
        return 1
    names = {folder: folder.removeprefix(f"{PACKAGE}.") for folder in order}
    width = max(map(len, names.values()))
    for folder in reversed(order):
        below = [names[other] for other in reversed(order) if other in found[folder]]
        print(f"{names[folder]:{width}} {lines[folder]:5} lines  {', '.join(below) or '-'}")
    print("\nreprs:", ", ".join(f"{a} -> {b}" for a, b in sorted(excepted())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
