"""Where two pytrees differ in structure, in words: a network's whole structure fills pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LONGEST = 60
"""Letters of a value that are shown."""


def first_difference(have: Any, want: Any, names: Sequence[str] = ()) -> str:
    """The first place where structures differ, and what is there.

    Args:
      have: the structure of what was given (`jax.tree.structure`).
      want: what it should be like.
      names: of the entries of the outermost tuple, for the place.

    Returns:
      Such as "params['conv'] is a dict of kernel, and was a dict of bias, kernel". Static
      attributes of a module are such places too.
    """
    place, *told = _difference(have, want, names)
    return f"{place or 'all of it'} is {told[0]}, and was {told[1]}"


def _difference(have: Any, want: Any, names: Sequence[str] = ()) -> tuple[str, str, str]:
    """Place, what is there, and what was."""
    node, known = have.node_data(), want.node_data()
    parts, wanted = have.children(), want.children()
    if node is None or known is None or node[0] is not known[0]:
        return "", _kind(node), _kind(known)
    if len(parts) != len(wanted) or set(_keys(node)) != set(_keys(known)):
        return "", _entries(node, len(parts)), _entries(known, len(wanted))
    for n, (part, other) in enumerate(zip(parts, wanted, strict=True)):
        if part != other:
            keys = _keys(node)
            name = names[n] if n < len(names) else f"[{keys[n]!r}]" if n < len(keys) else f"[{n}]"
            place, here, there = _difference(part, other)
            return name + place, here, there
    return _static_difference(node[1], known[1])


def _kind(node: Any) -> str:
    if node is None:
        return "an array"
    return "None" if node[0] is type(None) else f"a {node[0].__name__}"


def _keys(node: Any) -> list[str]:
    """Names of a node's children, if its type has any."""
    told = node[1]
    if node[0] is dict or isinstance(told, list):
        return list(told or ())
    names = told[0] if isinstance(told, tuple) and told and isinstance(told[0], tuple) else ()
    return list(names) if all(isinstance(name, str) for name in names) else []


def _entries(node: Any, count: int) -> str:
    keys = ", ".join(map(str, _keys(node)))
    return f"{_kind(node)} of {_short(keys) if keys else count}"


def _static_difference(have: Any, want: Any, name: str = "") -> tuple[str, str, str]:
    """The first difference of what a node's type knows besides its children."""
    if isinstance(have, Mapping) and isinstance(want, Mapping) and have.keys() == want.keys():
        for key in have:
            if have[key] != want[key]:
                return _static_difference(have[key], want[key], f".{key}")
    if isinstance(have, tuple) and isinstance(want, tuple) and len(have) == len(want):
        # Modules keep names of static attributes beside their values.
        labels = [part for part in have if _are_names(part)]
        for n, (one, other) in enumerate(zip(have, want, strict=True)):
            if one == other:
                continue
            if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
                fitting = [names for names in labels if len(names) == len(one)]
                for k, (a, b) in enumerate(zip(one, other, strict=True)):
                    if a != b:
                        place = f".{fitting[-1][k]}" if fitting else name
                        return _static_difference(a, b, place)
            return _static_difference(one, other, name or f"[{n}]")
    return name, _short(repr(have)), _short(repr(want))


def _are_names(part: Any) -> bool:
    return isinstance(part, tuple) and all(isinstance(name, str) for name in part)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
