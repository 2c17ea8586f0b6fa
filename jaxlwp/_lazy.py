"""Folders that no other imports: `import jaxlwp` leaves them to their first use."""

from __future__ import annotations

import importlib
import sys
from typing import Any

_FOLDERS = ("report", "simulate")


def __getattr__(name: str) -> Any:
    """An attribute of `jaxlwp` that is not there yet."""
    if name in _FOLDERS:
        return importlib.import_module(f"jaxlwp.{name}")
    raise AttributeError(f"module 'jaxlwp' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What `jaxlwp` has, or will have when it is used."""
    return sorted({*vars(sys.modules["jaxlwp"]), *_FOLDERS})
