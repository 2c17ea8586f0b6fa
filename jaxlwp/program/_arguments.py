"""How the function is called: positional and keyword arguments in one form, and their names.

However a caller passes an argument, by position or by name, it is the same argument: `canonical`
gives positions to all that have one, so that a plan made with `parallelize(loss, params, x, y)` can
be called as `plan(params, x=images, y=labels)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxlwp.program._structure import first_difference

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional arguments, the parameters first, and those that are passed by name only."""


def canonical(
    where: str,
    fn: Callable[..., Any] | None,
    positional: tuple[Any, ...],
    keywords: Mapping[str, Any],
    *,
    partial: bool = False,
) -> Arguments:
    """Arguments with positions for all that the function gives one.

    Args:
      where: who is called, for the error.
      fn: the function; None, or one that does not tell its signature, leaves them as they are.
      positional: arguments by position.
      keywords: arguments by name.
      partial: some may be left out.

    Raises:
      ValueError: the function cannot be called with these arguments.
    """
    try:
        # A decorator may take other arguments by position than what it wraps.
        signature = inspect.signature(fn, follow_wrapped=bool(keywords)) if fn else None
    except (TypeError, ValueError):
        signature = None
    if signature is None:
        return positional, dict(keywords)
    try:
        bind = signature.bind_partial if partial else signature.bind
        bound = bind(*positional, **keywords)
    except TypeError as error:
        named = f" and {', '.join(sorted(keywords))}" if keywords else ""
        raise ValueError(
            f"{where}: {getattr(fn, '__name__', 'the function')}{_names_of(signature)} cannot be "
            f"called with {len(positional)} positional arguments{named}: {error}; pass what it "
            "takes, the parameters first"
        ) from error
    return (bound.args, dict(bound.kwargs)) if keywords else (positional, {})


def _names_of(signature: inspect.Signature) -> inspect.Signature:
    """Without types."""
    empty = inspect.Parameter.empty
    named = [each.replace(annotation=empty) for each in signature.parameters.values()]
    return signature.replace(parameters=named, return_annotation=empty)


def positional_names(fn: Callable[..., Any] | None, count: int) -> tuple[str, ...]:
    """Names of the first arguments that a function takes by position, for errors.

    Args:
      fn: the function, if it is known.
      count: how many.

    Returns:
      Those of its signature; where that does not tell, "params", "args[0]" and so on.
    """
    names: list[str] = []
    try:
        kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = inspect.signature(fn).parameters.values() if fn else ()
        names = [each.name for each in parameters if each.kind in kinds]
    except (TypeError, ValueError):
        pass
    return tuple([*names, *_unnamed(len(names), count)][:count])


def _unnamed(first: int, count: int) -> list[str]:
    return [f"args[{n - 1}]" if n else "params" for n in range(first, count)]


def arguments_difference(have: Any, want: Any, names: Sequence[str]) -> str:
    """How arguments differ in structure from those that a plan was made for, in one line.

    Args:
      have: structure of the arguments by position.
      want: what they should be like.
      names: of those wanted.
    """
    count, wanted = (len(tree.children()) for tree in (have, want))
    if count != wanted:
        return f"{count} arguments are given, and there were {wanted} ({', '.join(names)})"
    return first_difference(have, want, names)


def argument_name(path: tuple[Any, ...]) -> str:
    """Name of a leaf of `Arguments`: "params['w']", "args[0]", "labels"."""
    which, entry, *rest = path
    tail = jax.tree_util.keystr(tuple(rest))
    if which.idx == 1:
        return str(entry.key) + tail
    return ("params" if entry.idx == 0 else f"args[{entry.idx - 1}]") + tail
