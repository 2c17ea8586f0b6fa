"""Every row of docs/errors.md: a wrong call or command line, and the line that it gets."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest

from tests.bad_input.desk import FILES, lay_out, namespace, outcome

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/errors.md").read_text(encoding="utf-8")

_CELL = r"(`+) ?(.+?) ?\{}"
_ROW = re.compile(rf"^\| {_CELL.format(1)} \| {_CELL.format(3)} \|$", re.MULTILINE)

LEAST_ROWS = 80
GROUPS = 12


class Row(NamedTuple):
    group: str
    given: str
    message: str


def rows() -> list[Row]:
    found = []
    for section in PAGE.partition("## The files")[0].split("\n## ")[1:]:
        group = section.partition("\n")[0]
        found += [Row(group, match[2], match[4]) for match in _ROW.finditer(section)]
    return found


ROWS = rows()

pytestmark = pytest.mark.skipif(len(jax.devices()) < 4, reason="needs 4 devices")


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    return namespace()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the wrong files, as current folder."""
    path = tmp_path_factory.mktemp("desk")
    lay_out(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setattr(sys, "path", [str(ROOT), str(path), *sys.path])
        patch.setenv("JAXLWP_CACHE_DIR", str(path / "cache"))
        for name in ("mine", "no_such_import"):
            patch.delitem(sys.modules, name, raising=False)
        yield path


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.given[:70])
def test_row(row: Row, names: dict[str, Any], folder: Path) -> None:
    """The message in full, on one line, and no file changed, lost or left over."""
    before = files(folder)
    message = outcome(row.given, names)
    pattern = ".+".join(map(re.escape, row.message.split("…")))
    assert re.fullmatch(pattern, message), f"{row.given} gets: {message}"
    assert files(folder) == before


def test_the_page_says_what_to_do() -> None:
    """Behind what is wrong each message has a remedy."""
    assert len(ROWS) >= LEAST_ROWS
    assert len({row.group for row in ROWS}) == GROUPS
    assert len({row.given for row in ROWS}) == len(ROWS)
    table = [line for line in PAGE.partition("## The files")[0].splitlines() if line[:3] == "| `"]
    assert len(table) == len(ROWS)  # no row is written so that it is not read
    for row in ROWS:
        assert re.search(r"; |[a-z]\? See |See `|\. Use ", row.message), row
        assert "\n" not in row.message


def test_every_file_is_described() -> None:
    described = PAGE.partition("## The files")[2]
    for name in FILES:
        assert f"`{name}`" in described
