"""The picture of a plan in README.md: `make picture` (a few seconds, Chromium, no devices).

AlexNet with 128 images for each of eight H100s, planned by published rates; the page that
`jaxlwp plan --html` writes, as a browser shows it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from click.testing import CliRunner

from jaxlwp.cli import main
from tests import chromium

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "plan.png"
COMMAND = "plan models.alexnet:AlexNet --devices dgx-h100:1 --batch 1024 --dtype bfloat16 --html"
SIZE = 1200, 1000


def draw(picture: Path, folder: Path) -> None:
    """Write the page of the plan, and what a browser shows of it."""
    page = folder / "plan.html"
    result = CliRunner().invoke(main, [*COMMAND.split(), str(page)])
    assert result.exit_code == 0, result.output
    with chromium.running(folder) as browser:
        browser.open(page, *SIZE)
        assert not browser.problems
        browser.screenshot(picture)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        draw(PICTURE, Path(name))
    print(f"{PICTURE}: {PICTURE.stat().st_size / 1e3:.0f} kB")
