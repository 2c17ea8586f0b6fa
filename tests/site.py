"""The built site in a browser: pages ask for nothing from elsewhere and print no errors.

`make docs` runs it after the build; `--screenshots FOLDER` keeps what the pages look like.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from tests import chromium

ROOT = Path(__file__).parent.parent


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Nothing: requests are checked, not listed."""


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder, as a server gives it out."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def problems(site: Path, screenshots: Path | None, size: tuple[int, int], dark: bool) -> list[str]:
    """What pages ask for elsewhere, and errors that they print."""
    found = []
    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    pages = [page for page in pages if not page.startswith("repository/")]
    with tempfile.TemporaryDirectory() as folder, chromium.running(Path(folder)) as browser:
        empty = Path(folder) / "empty.html"
        empty.write_text("<!DOCTYPE html><title>empty</title>")
        with served(site) as address:
            browser.open(empty, *size)
            browser.resize(*size, dark=dark)
            browser.requests.clear()
            for page in pages:
                browser.navigate(f"{address}/{page}")
                if screenshots:
                    browser.screenshot(screenshots / (page.replace("/", "-")[:-4] + "png"))
            outside = [u for u in browser.requests if not u.startswith((address, "data:"))]
            found += [f"asks for {url}" for url in outside]
            found += browser.problems
            assert len(browser.requests) > len(pages) > 1
    return found


def main() -> None:
    """Check the site; a problem ends with 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--screenshots", type=Path)
    parser.add_argument("--width", type=int, default=1400)
    parser.add_argument("--height", type=int, default=1000)
    parser.add_argument("--dark", action="store_true")
    arguments = parser.parse_args()
    if chromium.browser() is None:
        print(f"the site was not looked at: none of {', '.join(chromium.BROWSERS)} is installed")
        return
    if arguments.screenshots:
        arguments.screenshots.mkdir(parents=True, exist_ok=True)
    size = arguments.width, arguments.height
    found = problems(ROOT / "site", arguments.screenshots, size, arguments.dark)
    if found:
        raise SystemExit("\n".join(found))
    print("the site asks for nothing from elsewhere, and prints no errors")


if __name__ == "__main__":
    main()
