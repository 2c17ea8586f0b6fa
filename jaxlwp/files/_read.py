"""What a JSON file says, checked as it is read: any content is read, or refused in one line."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, NoReturn

from jaxlwp.files._text import is_text, parse_json


@dataclass(frozen=True)
class Read:
    """A value of a JSON file, and where it is there; what is asked of it is there, or ValueError.

    Attributes:
      value: as `json` has it.
      place: such as "configs of 'conv1'".
    """

    value: Any
    place: str = "the file"

    def refuse(self, rule: str) -> NoReturn:
        """Say what the value has to be.

        Raises:
          ValueError: always.
        """
        try:
            shown = json.dumps(self.value, default=str)
        except (ValueError, RecursionError):
            shown = type(self.value).__name__
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        raise ValueError(f"{self.place} is {shown}; it must be {rule}")

    def get(self, name: str) -> Read:
        """An entry of an object."""
        entries = self._object()
        if name not in entries:
            raise ValueError(f"{self.place} lacks {name!r}")
        return self._at(name)

    def find(self, name: str) -> Read | None:
        """An entry of an object; None if it is null or not there."""
        return None if self._object().get(name) is None else self._at(name)

    def entries(self) -> dict[str, Read]:
        """All entries of an object."""
        return {name: self._at(name) for name in self._object()}

    def each(self) -> list[Read]:
        """The values of a list."""
        if not isinstance(self.value, list):
            self.refuse("a list")
        return [Read(value, f"{self.place}[{n}]") for n, value in enumerate(self.value)]

    def text(self) -> str:
        """A text."""
        if not isinstance(self.value, str):
            self.refuse("a text")
        if not is_text(self.value):  # half a character, which could not be written again
            self.refuse("a text of whole characters")
        return self.value

    def flag(self) -> bool:
        """True or false."""
        if not isinstance(self.value, bool):
            self.refuse("true or false")
        return self.value

    def whole(self, least: int = 0, most: int = 2**62) -> int:
        """A whole number in a range."""
        if isinstance(self.value, bool) or not isinstance(self.value, int):
            self.refuse("a whole number")
        if not least <= self.value <= most:
            self.refuse(f"at least {least}" if self.value < least else f"at most {most}")
        return self.value

    def number(self) -> float:
        """A finite number of at least 0."""
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            self.refuse("a number")
        if not 0 <= self.value < math.inf:
            self.refuse("finite and at least 0")
        try:
            return float(self.value)
        except OverflowError:
            self.refuse("less than 1e308")

    def _object(self) -> dict[str, Any]:
        if not isinstance(self.value, dict):
            self.refuse("an object")
        return self.value

    def _at(self, name: str) -> Read:
        place = name if self.place == "the file" else f"{self.place}.{name}"
        return Read(self.value[name], place if len(place) <= 80 else place[:77] + "...")


def read_json(content: str | bytes) -> Read:
    """What a JSON text says.

    Raises:
      ValueError: it is no JSON text, or nested too deeply to be one of ours.
    """
    try:
        return Read(parse_json(content))
    except (json.JSONDecodeError, UnicodeError) as error:
        raise ValueError(f"it is no JSON ({' '.join(str(error).split())})") from error


def check_format(content: Read, name: str, newest: int, version: str) -> int:
    """The version of a file's format, if it is of ours.

    Args:
      content: the whole file: an object with "format" and "version".
      name: of the format.
      newest: the newest version that can be read.
      version: of jaxlwp, for the message.

    Raises:
      ValueError: it is another format, or a newer version.
    """
    told = content.find("format")
    if told is None or told.value != name:
        raise ValueError(f"it does not say that it is a {name}")
    found = content.get("version").whole(least=1)
    if found > newest:
        raise ValueError(
            f"it has version {found} of the format, and jaxlwp {version} reads up to {newest}: "
            "install a newer jaxlwp"
        )
    return found
