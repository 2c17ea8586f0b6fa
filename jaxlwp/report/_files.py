"""Files that are complete or as they were before."""

from __future__ import annotations

import os
from pathlib import Path


def unwritable(path: Path) -> str | None:
    """Why a file cannot be written, and what to do; None if it seems that it can."""
    folder = path.absolute().parent
    if not folder.is_dir():
        return f"there is no folder {folder}; make it, or give another path"
    if path.is_dir():
        return "it is a folder; give a file in it"
    if not os.access(folder, os.W_OK):
        return f"the folder {folder} is read-only; give another path"
    return None


def write_file(path: Path, text: str) -> None:
    """Write a file in one step: it is complete or as it was before."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
