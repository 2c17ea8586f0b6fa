"""What measurements are true for, and one measurement."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxlwp.files import is_text


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What a measurement is true for.

    Attributes:
      device_kind: as JAX names it.
      platform: "cpu" or "gpu".
      driver: version of the platform's runtime and driver, as JAX tells it.
      jax: version.
      jaxlib: version.
      host: for processors, whose kind names no machine: node, processor and number of cores.
      at_once: simulated devices that shared the cores and ran at once; 1 for accelerators.
    """

    device_kind: str
    platform: str
    driver: str
    jax: str
    jaxlib: str
    host: str = ""
    at_once: int = 1

    def __post_init__(self) -> None:
        """Check the values, which may be from a file.

        Raises:
          ValueError: a text is none, or a number.
        """
        for field_ in dataclasses.fields(self):
            value = getattr(self, field_.name)
            if field_.name != "at_once" and not is_text(value):
                raise ValueError(f"Environment: {field_.name} is {value!a:.60}; it must be text")
        if isinstance(self.at_once, bool) or not isinstance(self.at_once, int) or self.at_once < 1:
            raise ValueError(
                f"Environment: at_once is {self.at_once!a:.60}; it must be a whole number of at "
                "least 1"
            )

    @property
    def key(self) -> str:
        """Hash of all of it."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        """For reports."""
        host = f" on {self.host}, {self.at_once} at once" if self.host else ""
        return f"{self.device_kind}{host}, JAX {self.jax}"


def environment_of(devices: Sequence[Any]) -> Environment:
    """The environment of devices that run at once."""
    import importlib.metadata

    first = devices[0]
    cpu = first.platform == "cpu"
    return Environment(
        device_kind=first.device_kind,
        platform=first.platform,
        driver=str(getattr(first.client, "platform_version", "")),
        jax=importlib.metadata.version("jax"),
        jaxlib=importlib.metadata.version("jaxlib"),
        host=f"{platform.node()} ({platform.machine()}, {os.cpu_count()} cores)" if cpu else "",
        at_once=len(devices) if cpu else 1,
    )


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One figure, and how it came about.

    Attributes:
      seconds: the median.
      spread: median absolute deviation of the runs, relative to the median.
      samples: how many runs.
      date: when, in UTC, ISO 8601.
      program: hash of the program that was run; "" if there is none.
      each_s: if it was measured several times, minutes apart, each of them; `seconds` is their
        median.
      data: more, as plain JSON data.

    Raises:
      ValueError: a figure is negative, infinite or NaN.
    """

    seconds: float
    spread: float = 0.0
    samples: int = 1
    date: str = ""
    program: str = ""
    each_s: tuple[float, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.each_s, (tuple, list)):
            raise ValueError(f"Measurement: each_s is {self.each_s!r}; it must be a list")
        object.__setattr__(self, "each_s", tuple(self.each_s))
        figures = [(name, getattr(self, name)) for name in ("seconds", "spread", "samples")]
        for name, value in (*figures, *(("each_s", each) for each in self.each_s)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and 0 <= value <= sys.float_info.max):
                raise ValueError(
                    f"Measurement: {name} is {value!r}; it must be a finite number of at least 0"
                )
        if not all(is_text(getattr(self, name)) for name in ("date", "program")):
            raise ValueError("Measurement: date and program must be text")
        if not isinstance(self.data, Mapping):
            raise ValueError(f"Measurement: data is {self.data!r}; it must be a mapping")

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**dataclasses.asdict(self), "data": dict(self.data)}


def now() -> str:
    """The date of a measurement."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
