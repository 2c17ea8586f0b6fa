"""A program as text that is the same in every process, to compare what several have traced."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxlwp.program._program import Program, Value


def text_of(parameter: Any) -> str:
    """A parameter of an equation as text that is the same in every process."""
    if isinstance(parameter, (set, frozenset)):
        return f"{{{', '.join(sorted(map(text_of, parameter)))}}}"
    return re.sub(r" at 0x[0-9a-f]+|id=\d+", "", str(parameter))


def array_text(array: Any) -> str:
    """Dtype, shape and a digest of an array's values; of a random key, of its data."""
    have = jax.typeof(array)
    known = not isinstance(array, jax.core.Tracer) and getattr(array, "is_fully_addressable", True)
    if not known:
        return _shape_text(have)
    if jax.numpy.issubdtype(have.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]
    return f"{_shape_text(have)} {digest}"


def program_lines(program: Program) -> Iterator[str]:
    """A line for each equation and constant; the values of constants count, too."""
    for eqn in program.equations:
        made, read = (
            ", ".join(f"%{i} {_shape_text(v)}" for i, v in zip(indices, values, strict=True))
            for indices, values in (
                (eqn.results, eqn.result_values),
                (eqn.operands, eqn.operand_values),
            )
        )
        params = ", ".join(f"{name}={text_of(p)}" for name, p in sorted(eqn.params.items()))
        yield f"{eqn.scope}: {made} = {eqn.name}({read}) {' '.join(params.split())}"
    for index, constant in program.constants.items():
        yield f"constant %{index} = {array_text(constant)}"
    yield f"returns {', '.join(f'%{i}' for i in program.outputs)}"


def _shape_text(value: Value | Any) -> str:
    return f"{value.dtype}{list(value.shape)}"
