"""Texts and JSON that are read with errors of one line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


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


def parse_json(text: str | bytes) -> Any:
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
