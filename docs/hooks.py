"""What MkDocs calls while it builds the site (`make docs`).

The home page is README.md; other pages from the root are in `ROOT_PAGES`, too. Links that leave
`docs/` (results, tests, notebooks) work in the repository; on the site the files that they name are
copied beside the pages, and folders are named without a link. A page that would load something from
another address is a warning, and so an error.
"""

from __future__ import annotations

import html.parser
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

LOG = logging.getLogger("mkdocs.plugins.jaxlwp")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
ROOT_PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
}
"""Pages of the site that are files in the root of the repository."""
COPIES = "repository"
"""Folder of the site with copies of other files from outside of docs/."""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from the root, and copies of the files outside of docs/ that pages name."""
    root = Path(config.config_file_path).parent
    for source, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=(root / source).read_text()))
    named = {
        path
        for page in files.documentation_pages()
        for link in LINK.finditer(page.content_string)
        if (path := _in_repository(page, link[3])) and not _page_of(path)
    }
    for path in sorted(named):
        if (root / path).is_file():
            copy = f"{COPIES}/{path}"
            files.append(File.generated(config, copy, abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links of the repository into links of the site."""
    root = Path(config.config_file_path).parent
    here = posixpath.dirname(page.file.src_uri) or "."

    def rewritten(link: re.Match[str]) -> str:
        picture, text, target, anchor = link[1], link[2], link[3], link[4] or ""
        path = _in_repository(page.file, target)
        if path is None:
            return link[0]
        if own := _page_of(path):
            return f"{picture}[{text}]({posixpath.relpath(own, here)}{anchor})"
        if (root / path).is_file():
            return f"{picture}[{text}]({posixpath.relpath(f'{COPIES}/{path}', here)})"
        if (root / path).is_dir():
            return text if text.strip("`").rstrip("/") in path else f"{text} (`{path}/`)"
        return link[0]  # MkDocs warns of it

    fences = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if n % 2 else LINK.sub(rewritten, part) for n, part in enumerate(fences))


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Warn of whatever a browser would fetch from another address."""
    for address in _Loaded(output).addresses:
        LOG.warning("%s asks for %s", page.file.src_uri, address)
    return output


def _in_repository(page: File, target: str) -> str | None:
    """The path in the repository that a link of a page names; None for an address elsewhere."""
    if "://" in target or target.startswith("mailto:"):
        return None
    inside = page.src_uri not in ROOT_PAGES.values()
    folder = posixpath.dirname(f"docs/{page.src_uri}") if inside else ""
    return posixpath.normpath(posixpath.join(folder, target))


def _page_of(path: str) -> str | None:
    """The site's name of what is a part of the site by itself."""
    return path.removeprefix("docs/") if path.startswith("docs/") else ROOT_PAGES.get(path)


class _Loaded(html.parser.HTMLParser):
    """Addresses elsewhere that a page loads: links to follow are not among them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        names = ("src", "srcset", "data", "poster", *(("href",) if tag == "link" else ()))
        found = [given[name] or "" for name in names if name in given]
        if given.get("rel") == "canonical":
            return
        self.addresses += [a for a in found if re.match(r"(https?:)?//", a)]
