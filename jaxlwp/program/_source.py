"""Which lines of the user's code an equation is from: for people, nothing depends on it.

JAX names the frames of a traceback that are not its own (`jax.extend.source_info_util.summarize`);
those of libraries of layers are left out here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.extend import source_info_util

DEEPEST = 64
"""Frames that are looked at, from the innermost."""

LIBRARIES = ("equinox", "flax", "haiku", "jax", "jaxlwp", "keras", "optax")
"""Packages whose lines are not the user's."""

_FRAME = re.compile(r"(?P<file>.+?):(?P<line>\d+)(?::\d+)? \((?P<function>.*)\)")
_INSTALLED = re.compile(rf"[/\\](?:site|dist)-packages[/\\](?:{'|'.join(LIBRARIES)})[/\\]")
_OWN = str(Path(__file__).parents[1])


@dataclass(frozen=True)
class Source:
    """Where an equation is from; found out when it is asked for, which takes a while.

    Attributes:
      info: JAX's record of it.
      call: the call whose body the equation is in, if that was inlined.
      called: name of the function that this call, or the equation itself, calls.
    """

    info: Any
    call: Source | None = None
    called: str = ""

    @property
    def lines(self) -> tuple[str, ...]:
        """The user's lines, the innermost last, such as "/home/me/net.py:12 (Net.__call__)".

        JAX traces a function once for calls that are alike: outside of it an equation of its body
        knows the first of these calls alone. So these lines are those of the call itself.
        """
        text = source_info_util.summarize(self.info, DEEPEST)
        frames = [found for line in text.splitlines() if (found := _FRAME.fullmatch(line.strip()))]
        outside: tuple[str, ...] = ()
        if self.call is not None:
            outside = self.call.lines
            names = [frame["function"].rpartition(".")[2] for frame in frames]
            inside = [n for n, name in enumerate(names) if name == self.call.called]
            frames = frames[inside[-1] :] if inside else []
        return outside + tuple(
            f"{frame['file']}:{frame['line']} ({frame['function']})"
            for frame in frames
            if not (_INSTALLED.search(frame["file"]) or frame["file"].startswith(_OWN))
        )
