"""Files: read with errors of one line, written so that they are complete or as they were before.

Every folder may import this, as it does `_version`.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any


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


def write_file(path: Path, text: str) -> None:
    """Write a file in one step: it is complete or as it was before.

    A process that is interrupted (Ctrl-C) leaves nothing beside it.

    Raises:
      OSError: it cannot be written there.
    """
    partial = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.partial")
    try:
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        problem = unwritable(path) or f"{reason(error)}; give another path, or make room"
        raise type(error)(f"cannot write {path}: {problem}") from error
    finally:
        partial.unlink(missing_ok=True)


def read_text(path: Path, wanted: str) -> str:
    """The text of a file.

    Args:
      path: the file.
      wanted: what it should be, for the error: "give ...".

    Raises:
      OSError: it cannot be read.
      ValueError: it is no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise type(error)(f"{path}: {reason(error)}; give {wanted}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {reason(error)}; give {wanted}") from error


def reason(error: OSError | ValueError) -> str:
    """What is wrong with a file, in the system's words."""
    if isinstance(error, UnicodeError):
        return "it is no text in UTF-8"
    return getattr(error, "strerror", None) or str(error)


DEEPEST = 64
"""Levels of lists and objects in a JSON file, at most; ours have less than ten."""


def parse_json(text: str) -> Any:
    """What a JSON text holds.

    Raises:
      ValueError: it is no JSON, or nested more deeply than any file of ours.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        value = None
    else:
        level = [value]
        for _ in range(DEEPEST):
            level = [child for parent in level for child in _children(parent)]
            if not level:
                return value
    raise ValueError(f"it is nested more than {DEEPEST} levels deep")


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def is_text(value: Any) -> bool:
    """Whether a value of a JSON file is text that can be written again: no lone surrogates."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
