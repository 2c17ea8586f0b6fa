"""Tables of a TOML file, read field by field: whatever is wrong is said in one line."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxlwp.files import read_text


def read_toml(path: Path) -> Table:
    """The top table of a file.

    Raises:
      ValueError: the file cannot be read, or is no TOML.
    """
    try:
        text = read_text(path, "a TOML file of a system")
    except OSError as error:
        raise ValueError(str(error)) from error
    try:
        return Table(str(path), tomllib.loads(text))
    except (ValueError, RecursionError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{path}: no TOML ({what}); write fields as in devices = 8") from error


@dataclass(frozen=True)
class Table:
    """One table, and where it is from.

    Attributes:
      place: file and table, for errors.
      values: the fields.
    """

    place: str
    values: Mapping[str, Any]
    _read: set[str] = field(default_factory=set)

    def has(self, name: str) -> bool:
        """Whether a field is given."""
        return name in self.values

    def value(self, name: str, wanted: str) -> Any:
        """A field of any kind; `wanted` says what it should be.

        Raises:
          ValueError: it is missing.
        """
        self._read.add(name)
        if name not in self.values:
            raise ValueError(f"{self.place}: {name} is missing; give {wanted}")
        return self.values[name]

    def wrong(self, name: str, wanted: str) -> ValueError:
        """The error that says what a field should have been."""
        value = f"{self.values[name]!r:.60}"
        return ValueError(f"{self.place}: {name} is {value}; give {wanted}")

    def text(self, name: str, wanted: str) -> str:
        """A text that is not empty.

        Raises:
          ValueError: it is missing, or something else.
        """
        value = self.value(name, wanted)
        if not isinstance(value, str) or not value:
            raise self.wrong(name, wanted)
        return value

    def count(self, name: str, wanted: str) -> int:
        """A whole number of at least 1.

        Raises:
          ValueError: it is missing, or something else.
        """
        value = self.value(name, wanted)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(name, f"{wanted}, a whole number of at least 1")
        return value

    def number(
        self,
        name: str,
        wanted: str,
        *,
        default: float | None = None,
        zero: bool = False,
        most: float = math.inf,
    ) -> float:
        """A positive finite number.

        Args:
          name: of the field.
          wanted: what it is, with its unit.
          default: where it is missing; None if it may not be.
          zero: whether it may be 0.
          most: the largest that it may be.

        Raises:
          ValueError: it is missing without a default, or something else.
        """
        self._read.add(name)
        if default is not None and name not in self.values:
            return default
        value = self.value(name, wanted)
        if not is_positive(value, zero=zero) or value > most:
            least = "of at least 0" if zero else "above 0"
            top = f" and at most {most:g}" if most < math.inf else " and finite"
            raise self.wrong(name, f"{wanted}, a number {least}{top}")
        return float(value)

    def table(self, name: str, wanted: str) -> Table:
        """A table inside this one.

        Raises:
          ValueError: it is missing, or no table.
        """
        value = self.value(name, wanted)
        if not isinstance(value, dict):
            raise self.wrong(name, wanted)
        return Table(f"{self.place}: [{name}]", value)

    def done(self) -> None:
        """Check that nothing is left.

        Raises:
          ValueError: there is a field that nobody asked for.
        """
        unknown = [name for name in self.values if name not in self._read]
        if unknown:
            raise ValueError(
                f"{self.place}: {unknown[0]} is unknown; the fields are "
                f"{', '.join(sorted(self._read))}"
            )


def is_positive(value: Any, *, zero: bool = False) -> bool:
    """Whether a value is a finite number above 0, or 0 where that is allowed."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and (0 <= value if zero else 0 < value) and value < math.inf
