"""Random programs: drawn from a seed, written as Python, evaluated from what was written."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .operators import (
    HELPERS,
    LARGEST,
    LOSSES,
    OPERATORS,
    OUTPUTS,
    Operator,
    Shape,
    Unfit,
    Value,
    Writer,
    fit,
)

SIZES = (1, 2, 3, 5, 7, 13)
SAMPLES = (1, 2, 3, 5, 7, 13, 4, 6, 8, 12)

Choices = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Input:
    """An array that a program is given.

    Attributes:
      name: in the source.
      shape: its shape.
      parameter: whether it is among the parameters, which are differentiated.
    """

    name: str
    shape: Shape
    parameter: bool


@dataclass(frozen=True)
class Step:
    """One operator.

    Attributes:
      number: its result is `v{number}`.
      operator: name in the table.
      operands: names of values.
      choices: what the operator chose.
    """

    number: int
    operator: str
    operands: tuple[str, ...]
    choices: Choices


@dataclass(frozen=True)
class Program:
    """A loss function of parameters and a batch, as data.

    Attributes:
      seed: of the arrays that it is evaluated on.
      inputs: arrays given.
      steps: in order.
      losses: terms of the loss: (value, form).
      outputs: what is returned besides: (value, form).
      block: first and last step evaluated under one `jax.checkpoint`, or none.
      unused: shapes of parameters that nothing reads.
      whole: arrays hold small whole numbers: arithmetic is exact, maxima have ties.
      batch_gradients: the batch is differentiated, too.
      evaluated: it is not differentiated at all, and its outputs are "made", left as their layers
        have them, or "replicated"; "" for a training step.
    """

    seed: int
    inputs: tuple[Input, ...]
    steps: tuple[Step, ...]
    losses: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...] = ()
    block: tuple[int, int] | None = None
    unused: tuple[Shape, ...] = ()
    whole: bool = False
    batch_gradients: bool = False
    evaluated: str = ""

    @property
    def operators(self) -> tuple[str, ...]:
        """Names of what is in it, for counting."""
        names = [step.operator for step in self.steps]
        names += [f"loss.{form}" for _, form in self.losses]
        names += [f"output.{form}" for _, form in self.outputs]
        names += ["checkpoint_block"] if self.block else []
        names += [f"evaluated.{self.evaluated}"] if self.evaluated else []
        return tuple(dict.fromkeys(names))


INEXACT = (
    "exp exp2 expm1 log log1p tanh logistic erf erfc rsqrt sqrt pow sin cos tan asin acos atan "
    "atan2 sinh cosh asinh acosh atanh cbrt lgamma digamma"
).split()
"""Operators after which sums round: of equal numbers they may come out unequal."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """A program as source.

    Attributes:
      program: with the choices that were made.
      text: source of `loss(params, *batch)` and its helpers.
      parameters: name -> shape.
      batch: name -> shape, and exclusive upper bound of integers or 0.
    """

    program: Program
    text: str
    parameters: dict[str, Shape]
    batch: dict[str, tuple[Shape, int]]

    def function(self) -> Callable[..., Any]:
        """What the source defines."""
        names: dict[str, Any] = {}
        exec("import jax\nimport jax.numpy as jnp\nimport numpy as np\nfrom jax import lax", names)
        exec(self.text, names)
        loss: Callable[..., Any] = names["loss"]
        return loss

    def arrays(self) -> tuple[Any, ...]:
        """(params, *batch), the same for the same program."""
        return example_arrays(self.parameters, self.batch, self.program.seed, self.program.whole)

    @functools.cached_property
    def jaxpr(self) -> str:
        """The traced program."""
        return str(jax.make_jaxpr(self.function())(*self.arrays()))

    @property
    def rounds(self) -> bool:
        """Whether something on the way is less than float64: attention takes its softmax so."""
        return any(name in self.jaxpr for name in ("f32[", "f16[", "bf16["))

    @property
    def inexact(self) -> bool:
        """Whether an operator rounds, so that equal numbers may come out unequal."""
        return any(f"= {name} " in self.jaxpr or f"= {name}[" in self.jaxpr for name in INEXACT)

    @property
    def argnums(self) -> tuple[int, ...]:
        """Arguments that are differentiated."""
        if not self.program.batch_gradients:
            return (0,)
        return (0, *(n + 1 for n, (_, below) in enumerate(self.batch.values()) if not below))


def example_arrays(
    parameters: dict[str, Shape], batch: dict[str, tuple[Shape, int]], seed: int, whole: bool
) -> tuple[Any, ...]:
    """Arrays drawn by name, so that dropping one leaves the others as they are."""

    def array(name: str, shape: Shape, below: int) -> Any:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        if below:
            return rng.integers(0, below, shape, dtype=np.int32)
        if whole:
            return rng.integers(-2, 3, shape).astype(np.float64)
        drawn = rng.standard_normal(shape)
        return np.asarray(drawn / math.sqrt(math.prod(shape[:-1])) if name[0] in "wqkvo" else drawn)

    params = {name: array(name, shape, 0) for name, shape in parameters.items()}
    return params, *(array(name, shape, below) for name, (shape, below) in batch.items())


# --- writing -----------------------------------------------------------------------------------

_NAMES = {"jax": jax, "jnp": jnp, "np": np, "lax": lax}


class _Scope:
    """Names in whose scope expressions are evaluated for their shapes."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = dict(_NAMES)
        for text in HELPERS.values():
            exec(text, self.names)

    def shape(
        self, expression: str, values: dict[str, Value], writer: Writer
    ) -> jax.ShapeDtypeStruct:
        """Shape and dtype of an expression."""
        floats = jax.ShapeDtypeStruct
        given = {v.name: floats(v.shape, jnp.float64) for v in values.values()}
        given["params"] = {n: floats(s, jnp.float64) for n, s in writer.parameters.items()}
        given |= {n: floats(s, jnp.int32) for n, (s, _) in writer.batch.items()}
        used = [n for n in given if re.search(rf"\b{n}\b", expression)]
        function = eval(f"lambda {', '.join(used)}: {expression}", self.names)
        return jax.eval_shape(function, *(given[n] for n in used))


_SCOPE = _Scope()


def write_step(step: Step, writer: Writer, values: dict[str, Value]) -> tuple[str, Step, Value]:
    """Source of a step's result, the step with its choices, and the result.

    Raises:
      Unfit: the operator does not apply.
    """
    operands = [values[name] for name in step.operands]
    try:
        expression = OPERATORS[step.operator].write(writer, *operands)
        result = _SCOPE.shape(expression, values, writer)
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise Unfit from error
    fit(isinstance(result, jax.ShapeDtypeStruct) and result.dtype == jnp.float64)
    fit(0 < math.prod(result.shape) <= LARGEST and len(result.shape) <= 5)
    made = Value(f"v{step.number}", tuple(result.shape))
    return expression, dataclasses.replace(step, choices=tuple(writer.used.items())), made


def _given(program: Program) -> dict[str, Value]:
    return {given.name: Value(given.name, given.shape) for given in program.inputs}


def write(program: Program) -> Written:
    """A program as source.

    Raises:
      Unfit: an operator does not apply to its operands.
    """
    values = _given(program)
    parameters = {given.name: given.shape for given in program.inputs if given.parameter}
    batch: dict[str, tuple[Shape, int]] = {}
    lines, steps, last = [], [], ""
    for step in program.steps:
        writer = Writer(step.number, None, dict(step.choices), parameters, batch)
        expression, step, made = write_step(step, writer, values)
        values[made.name] = made
        steps.append(step)
        lines.append((step.number, f"{made.name} = {expression}"))
    for n, shape in enumerate(program.unused):
        parameters[f"unused{n}"] = shape
    body, last = _with_block(lines, program.block)
    terms = [_loss_term(values[name], form, batch) for name, form in program.losses]
    outputs = [OUTPUTS[form].format(v=name) for name, form in program.outputs if name in values]
    body += [
        f"total = {' + '.join(terms)}",
        f"return total, ({''.join(f'{o}, ' for o in outputs)})",
    ]
    body = [
        f'{given.name} = params["{given.name}"]' for given in program.inputs if given.parameter
    ] + body
    ordered = {
        given.name: (given.shape, 0) for given in program.inputs if not given.parameter
    } | batch
    head = f"def loss({', '.join(['params', *ordered])}):"
    text = "\n".join([head, *(f"    {line}" for line in body)]) + "\n"
    helpers = [source for name, source in HELPERS.items() if name in text]
    return Written(
        program=dataclasses.replace(program, steps=tuple(steps)),
        text="\n\n".join([*helpers, text]),
        parameters=parameters,
        batch=ordered,
    )


def _with_block(
    lines: list[tuple[int, str]], block: tuple[int, int] | None
) -> tuple[list[str], str]:
    """The lines, those of a block inside a function under `jax.checkpoint`."""
    inside = [line for n, line in lines if block and block[0] <= n <= block[1]]
    if not inside:
        return [line for _, line in lines], ""
    names = ", ".join(line.split(" = ")[0] for line in inside)
    first = next(i for i, (_, line) in enumerate(lines) if line == inside[0])
    before = [line for _, line in lines[:first]]
    after = [line for _, line in lines[first + len(inside) :]]
    function = ["@jax.checkpoint", "def block():", *(f"    {line}" for line in inside)]
    return [*before, *function, f"    return ({names},)", f"({names},) = block()", *after], names


def _loss_term(value: Value, form: str, batch: dict[str, tuple[Shape, int]]) -> str:
    """Source of a term of the loss; its arguments are added to the batch."""
    if form in ("labels", "own"):
        fit(value.rank >= 2)
    if form == "weighted":
        batch[f"c_{value.name}"] = value.shape, 0
    if form == "labels":
        batch[f"i_{value.name}"] = value.shape[:-1], value.shape[-1]
    return LOSSES[form].format(
        v=value.name,
        c=f"c_{value.name}",
        i=f"i_{value.name}",
        size=math.prod(value.shape),
        shape=value.shape,
    )


# --- drawing -----------------------------------------------------------------------------------


def draw(name: str, seed: int) -> Written:
    """The program of a name, its arrays drawn from a seed."""
    rng = random.Random(name)
    while True:
        try:
            return write(_drawn(rng, seed))
        except Unfit:
            continue


def _drawn(rng: random.Random, seed: int) -> Program:
    inputs = _draw_inputs(rng)
    program = Program(seed=seed, inputs=inputs, steps=(), losses=(), whole=rng.random() < 0.25)
    steps, values, parameters = _draw_steps(rng, program)
    fit(bool(parameters))
    read = {name for step in steps for name in step.operands}
    ends = [name for name in values if name not in read and name[0] == "v"]
    program = dataclasses.replace(
        program,
        steps=tuple(steps),
        losses=tuple(_draw_losses(rng, values, ends)),
        outputs=tuple(_draw_outputs(rng, values)),
        block=_draw_block(rng, steps),
        unused=((rng.choice(SIZES), 3),) if rng.random() < 0.1 else (),
        batch_gradients=rng.random() < 0.3,
    )
    evaluated = rng.choices(("", "made", "replicated"), (0.75, 0.125, 0.125))[0]
    if not evaluated:
        return program
    every = (*program.outputs, *((name, "value") for name in ends))
    return dataclasses.replace(program, evaluated=evaluated, outputs=every)


def draw_values(rng: random.Random) -> dict[str, Value]:
    """Values of random shapes, some of them alike."""
    first, second = ([given.shape for given in _draw_inputs(rng)] for _ in range(2))
    shapes = [*first, *first, *second]
    return {f"x{n}": Value(f"x{n}", shape) for n, shape in enumerate(shapes)}


def _draw_inputs(rng: random.Random) -> tuple[Input, ...]:
    rank = rng.choices((4, 3, 2, 5, 1), (6, 3, 2, 1, 0.5))[0]
    largest = {1: 13, 2: 13, 3: 13, 4: 13, 5: 5}[rank]
    space = [n for n in SIZES if n <= largest]
    shape = (rng.choice(SAMPLES), *(rng.choice(space) for _ in range(rank - 1)))
    first = Input("x0", shape, rng.random() < 0.3)
    inputs = [first]
    if rng.random() < 0.25:
        other = tuple(n if rng.random() < 0.8 else 1 for n in shape)
        inputs.append(Input("x1", other, rng.random() < 0.3))
    fit(math.prod(shape) <= LARGEST // 2)
    return tuple(inputs)


def _draw_steps(
    rng: random.Random, program: Program
) -> tuple[list[Step], dict[str, Value], dict[str, Shape]]:
    """Two to six steps; each reads rather what was made last."""
    values = _given(program)
    parameters = {given.name: given.shape for given in program.inputs if given.parameter}
    batch: dict[str, tuple[Shape, int]] = {}
    steps: list[Step] = []
    table = list(OPERATORS.values())
    weights = [operator.weight for operator in table]
    wanted, attempts = rng.choice((2, 3, 3, 4, 4, 5, 6)), 0
    while len(steps) < wanted and attempts < 80:
        attempts += 1
        operator = rng.choices(table, weights)[0]
        number = len(steps) + 1
        kept, known = dict(parameters), dict(batch)
        try:
            operands = _draw_operands(rng, operator, values)
            step = Step(number, operator.name, operands, ())
            writer = Writer(number, rng, {}, kept, known)
            _, step, made = write_step(step, writer, values)
        except Unfit:
            continue
        steps.append(step)
        values[made.name], parameters, batch = made, kept, known
    fit(bool(steps))
    return steps, values, parameters


def _draw_operands(
    rng: random.Random, operator: Operator, values: dict[str, Value]
) -> tuple[str, ...]:
    names = list(values)
    weights = [1.0] * (len(names) - 1) + [2.0 * len(names)]
    if operator.arity == 1:
        return (rng.choices(names, weights)[0],)
    first = rng.choices(names, weights)[0]
    alike = [n for n in names if values[n].shape == values[first].shape and n != first]
    return first, rng.choice(alike if alike and rng.random() < 0.7 else names)


def _draw_losses(
    rng: random.Random, values: dict[str, Value], ends: list[str]
) -> list[tuple[str, str]]:
    """A term for everything that nothing else reads, sometimes one for another value."""
    forms = {"square": 4, "weighted": 2, "waves": 2, "sum": 1, "logsumexp": 1}
    chosen = list(ends)
    if rng.random() < 0.25:
        chosen.append(rng.choice([name for name in values if name[0] == "v"]))
    terms = []
    for name in dict.fromkeys(chosen):
        own = {"labels": 1.5, "own": 0.7} if values[name].rank >= 2 else {}
        options = {**forms, **own}
        terms.append((name, rng.choices(list(options), list(options.values()))[0]))
    return terms


def _draw_outputs(rng: random.Random, values: dict[str, Value]) -> list[tuple[str, str]]:
    if rng.random() < 0.5:
        return []
    forms = [form for form in OUTPUTS]
    drawn = [(rng.choice(list(values)), rng.choice(forms)) for _ in range(rng.randint(1, 2))]
    return [
        (name, form if values[name].rank or form in ("value", "mask", "double") else "value")
        for name, form in drawn
    ]


def _draw_block(rng: random.Random, steps: list[Step]) -> tuple[int, int] | None:
    if rng.random() > 0.12 or len(steps) < 2:
        return None
    first = rng.randint(1, len(steps) - 1)
    return first, rng.randint(first, len(steps))
