"""Files that are complete or as they were before."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from jaxlwp.files._text import reason


def unwritable(path: Path) -> str | None:
    """Why a file cannot be written, and what to do; None if it seems that it can."""
    folder = path.absolute().parent
    try:
        if not folder.is_dir():
            return f"there is no folder {folder}; make it, or give another path"
        if path.is_dir():
            return "it is a folder; give a file in it"
        if not os.access(folder, os.W_OK):
            return f"the folder {folder} is read-only; give another path"
        path.exists()
    except (OSError, ValueError) as error:  # too long a name, a NUL in it
        return f"{reason(error)}; give another path"
    return None


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file in one step: it is complete or as it was before.

    A process that is interrupted (Ctrl-C) leaves nothing beside it.

    Args:
      path: the file.
      content: bytes, or text, which ends in a new line in the file.

    Raises:
      OSError: it cannot be written there.
    """
    data = content if isinstance(content, bytes) else f"{content}\n".encode()
    partial = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        problem = unwritable(path) or f"{reason(error)}; give another path, or make room"
        raise type(error)(f"cannot write {path}: {problem}") from error
    finally:
        partial.unlink(missing_ok=True)
