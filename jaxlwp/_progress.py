"""Progress of what takes long: told to who asks; else a bar in notebooks, lines in scripts."""

from __future__ import annotations

import abc
import contextlib
import functools
import html
import importlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from jaxlwp.mesh import is_first_process

Progress = Callable[[str, int, int], None]
"""Called as `progress(what, done, total)`."""

Function = TypeVar("Function", bound=Callable[..., Any])

PATIENCE_S = 1.0
"""What ends before is not shown in a notebook."""

LINES_S = 10.0
"""A script's standard error gets a line when this has passed, and again and again."""


def silent(what: str, done: int, total: int) -> None:
    """Report to nobody."""


@contextlib.contextmanager
def progress_of(given: Progress | None) -> Iterator[Progress]:
    """Whom to report to.

    Args:
      given: who asked; None for a bar in a Jupyter notebook, that goes away at the end, and for
        lines on standard error elsewhere, of the first process.
    """
    if given is not None:
        yield given
        return
    shown = _Bar() if in_notebook() else _Lines()
    try:
        yield shown
    finally:
        shown.close()


def reporting(function: Function) -> Function:
    """The function, its `on_progress` as of `progress_of` where none is given."""

    @functools.wraps(function)
    def reports(*args: Any, on_progress: Progress | None = None, **keywords: Any) -> Any:
        with progress_of(on_progress) as progress:
            return function(*args, on_progress=progress, **keywords)

    return reports  # type: ignore[return-value]


def in_notebook() -> bool:
    """Whether this is a Jupyter kernel, which has imported IPython; elsewhere it need not be."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


class _Shown(abc.ABC):
    """What is done, how far it is, and for how long it has run: shown again and again."""

    every_s: float

    def __init__(self) -> None:
        self._begin_s = time.monotonic()
        self._told: tuple[str, int, int] | None = None
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._watch = threading.Thread(target=self._show_until_closed, daemon=True)

    def __call__(self, what: str, done: int, total: int) -> None:
        with self._lock:
            if self._told is None:
                self._watch.start()
            self._told = what, done, total

    def _show_until_closed(self) -> None:
        while not self._closed.wait(self.every_s):
            with self._lock:
                if self._told is not None and not self._closed.is_set():
                    self._show(*self._told)

    def _text(self, what: str, done: int, total: int) -> str:
        count = f", {done} of {total}" if total > 1 else ""
        return f"{what}{count}, {time.monotonic() - self._begin_s:.0f} s"

    @abc.abstractmethod
    def _show(self, what: str, done: int, total: int) -> None:
        """Show it now."""

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            self._clear()

    def _clear(self) -> None:  # noqa: B027
        """Take it away."""


class _Bar(_Shown):
    """A line in the cell's output, until it is done."""

    every_s = PATIENCE_S
    _handle: Any = None

    def _show(self, what: str, done: int, total: int) -> None:
        share = f'value="{done}" max="{total}"' if total > 1 else ""
        self._put(f"<progress {share}></progress> {html.escape(self._text(what, done, total))}")

    def _put(self, text: str) -> None:
        display: Any = importlib.import_module("IPython.display")
        if self._handle is None:
            self._handle = display.display(display.HTML(text), display_id=True)
        else:
            self._handle.update(display.HTML(text))

    def _clear(self) -> None:
        if self._handle is not None:
            self._put("")


class _Lines(_Shown):
    """Lines on standard error."""

    every_s = LINES_S

    def _show(self, what: str, done: int, total: int) -> None:
        if is_first_process():
            print(f"jaxlwp: {self._text(what, done, total)}", file=sys.stderr, flush=True)
