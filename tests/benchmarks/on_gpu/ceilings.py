"""What kernels of one GPU reach: memory, arithmetic by dtype, and the time that one starts in.

Programs of several equal kernels that depend on one another, or not, and that XLA does not fuse
(`jax.lax.optimization_barrier`). How many kernels there are, and what they move and compute, is
read off the compiled program, as forecasts do.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlwp.check import forecast
from tests.benchmarks.on_gpu.data import filled, in_turns
from tests.benchmarks.on_gpu.fit import Timed, fit, shares, timed
from tests.benchmarks.on_gpu.part import Part

WORKERS = 8
COPIES = 6
"""Equal convolutions or products in a program, each with operands of its own."""

COMPILING = 0.6
"""Share of the part's time after which nothing more is compiled."""

CONV_STARTS = "start, convolutions"
LAYOUT = ("NHWC", "HWIO", "NHWC")
Operand = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What is timed: a function of arrays."""

    name: str
    group: str
    function: Callable[..., Any]
    operands: tuple[Any, ...]
    winograd: bool = False


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution of the networks: examples, pixels, channels in and out, window, stride."""

    origin: str
    batch: int
    size: int
    inputs: int
    outputs: int
    window: int = 3
    stride: int = 1


CONVS = (
    Conv("VGG-16", 32, 56, 256, 256),
    Conv("ResNet-50", 32, 28, 128, 128),
    Conv("ResNet-50", 32, 56, 64, 256, 1),
    Conv("U-Net", 4, 512, 64, 64),
    Conv("VGG-16", 32, 224, 64, 64),
    Conv("ResNet-50", 32, 14, 1024, 256, 1),
    Conv("U-Net", 4, 64, 512, 512),
    Conv("ResNet-50", 32, 56, 64, 64),
    Conv("VGG-16", 32, 14, 512, 512),
    Conv("ResNet-50", 32, 14, 256, 256),
    Conv("ResNet-50", 32, 7, 512, 512),
    Conv("ResNet-50", 32, 28, 256, 256, 3, 2),
    Conv("ResNet-50", 32, 224, 3, 64, 7, 2),
)
PRODUCTS = ((8192, 8192, 8192), (32, 25088, 4096), (32, 4096, 4096), (32, 2048, 1000))
"""Rows, inner dimension and columns: a large one for the peak, and dense layers."""

CHAINS = (32, 512)
ELEMENTWISE_BYTES = (1 << 20, 1 << 24, 1 << 26, 1 << 28, 1 << 30)
"""Size of an array."""


def chain(length: int, x: Any) -> Any:
    """So many elementwise kernels, each of which reads what the one before has written."""
    for _ in range(length):
        x = lax.optimization_barrier(x * 1.0001 + 0.5)
    return x


def triads(length: int, x: Any, y: Any) -> Any:
    """So many kernels that read two arrays and write one."""
    for _ in range(length):
        x = lax.optimization_barrier(0.5 * x + y)
    return x


def small_convs(length: int, x: Any, w: Any) -> Any:
    """So many convolutions that take no time, each of the one before."""
    for _ in range(length):
        x = lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=LAYOUT)
    return x


def starts(part: Part) -> Iterator[Program]:
    """Chains of small kernels, which XLA runs as graphs, and of calls of a library."""
    tiny, small = Operand((1024,), jnp.float32), Operand((8, 8, 8, 16), jnp.float32)
    filter_ = Operand((3, 3, 16, 16), jnp.float32)
    for length in (4, 16) if part.small else CHAINS:
        run = functools.partial(chain, length)
        yield Program(name=f"{length} fusions", group="start", function=run, operands=(tiny,))
    for length in (2, 4) if part.small else (16, 128):
        yield Program(
            name=f"{length} small convolutions", group=CONV_STARTS,
            function=functools.partial(small_convs, length), operands=(small, filter_),
        )  # fmt: skip


def memory(part: Part) -> Iterator[Program]:
    """Elementwise kernels of several sizes."""
    for num_bytes in (1 << 12, 1 << 14) if part.small else ELEMENTWISE_BYTES:
        length = 4 if num_bytes >= 1 << 26 else 64
        for dtype in (jnp.float32, jnp.bfloat16):
            x = Operand((num_bytes // jnp.dtype(dtype).itemsize,), dtype)
            size = f"{num_bytes / 1e6:.3g} MB {jnp.dtype(dtype).name}"
            run: Callable[..., Any] = functools.partial(chain, length)
            yield Program(name=f"copies of {size}", group="memory", function=run, operands=(x,))
            run = functools.partial(triads, length)
            yield Program(name=f"triads of {size}", group="memory", function=run, operands=(x, x))


def conv_programs(conv: Conv, dtype: Any, precision: Any, copies: int) -> Iterator[Program]:
    """Forward, and the gradients of input and filter."""
    one = functools.partial(
        lax.conv_general_dilated,
        window_strides=(conv.stride,) * 2,
        padding="SAME",
        dimension_numbers=LAYOUT,
        precision=precision,
    )
    x = Operand((conv.batch, conv.size, conv.size, conv.inputs), dtype)
    w = Operand((conv.window, conv.window, conv.inputs, conv.outputs), dtype)
    y = jax.eval_shape(one, x, w)

    def of_input(g: Any, w: Any) -> Any:
        return jax.linear_transpose(lambda x: one(x, w), x)(g)[0]

    def of_filter(x: Any, g: Any) -> Any:
        return jax.linear_transpose(lambda w: one(x, w), w)(g)[0]

    name = f"{conv.origin}: {conv.batch} x {conv.size}^2, {conv.inputs} to {conv.outputs}, "
    name += f"{conv.window}x{conv.window}, stride {conv.stride}, {_precise(dtype, precision)}"
    for kind, function, operands in (
        ("forward", one, (x, w)),
        ("input's gradient", of_input, (y, w)),
        ("filter's gradient", of_filter, (x, y)),
    ):
        yield Program(
            name=f"{name}, {kind}",
            group="arithmetic",
            function=functools.partial(_each, function),
            operands=tuple((operand,) * copies for operand in operands),
            winograd=conv.window == 3 and conv.stride == 1,
        )


def product(sizes: Sequence[int], dtype: Any, precision: Any, copies: int) -> Program:
    """A matrix product."""
    rows, inner, columns = sizes
    a, b = Operand((rows, inner), dtype), Operand((inner, columns), dtype)
    return Program(
        name=f"product {rows} x {inner} x {columns}, {_precise(dtype, precision)}",
        group="arithmetic",
        function=functools.partial(_each, functools.partial(jnp.matmul, precision=precision)),
        operands=((a,) * copies, (b,) * copies),
    )


def _each(function: Callable[..., Any], *operands: Sequence[Any]) -> list[Any]:
    return [function(*group) for group in zip(*operands, strict=True)]


def _precise(dtype: Any, precision: Any) -> str:
    return jnp.dtype(dtype).name + (" exact" if precision is lax.Precision.HIGHEST else "")


def arithmetic(part: Part) -> Iterator[Program]:
    """Convolutions and products, the shapes that matter most first."""
    tiny = (Conv("tiny", 2, 8, 4, 4),), ((16, 16, 16),)
    convs, products = tiny if part.small else (CONVS, PRODUCTS)
    kinds = ((jnp.bfloat16, None), (jnp.float32, None), (jnp.float32, lax.Precision.HIGHEST))
    copies = 2 if part.small else COPIES
    for number in range(max(len(convs), len(products))):
        for dtype, precision in kinds:
            # float32 without tensor cores is seldom asked for.
            if precision is not None and number > 2:
                continue
            for sizes in products[number : number + 1]:
                large = math.prod(sizes) > 1e11
                yield product(sizes, dtype, precision, 2 if large else copies)
            for conv in convs[number : number + 1]:
                yield from conv_programs(conv, dtype, precision, copies)


def run(part: Part) -> None:
    """Compile side by side, then time one after the other, with nothing else running."""
    programs = [*starts(part), *memory(part), *arithmetic(part)]
    ended = (1 - COMPILING) * part.left_s
    compiled = compile_all(part, programs, ended)
    rows: list[Timed] = []
    failed: dict[str, str] = {}
    for program, made in zip(programs, compiled, strict=True):
        if part.left_s < 0:
            made = "not timed in time"
        row = made if isinstance(made, str) else time_one(part, program, made)
        if isinstance(row, Timed):
            rows.append(row)
        else:
            failed[program.name] = row
        if len(rows) % 10 == 0:
            part.write(content(part, rows, failed))
    told = content(part, rows, failed)
    part.write(told)
    part.say(f"{len(rows)} of {len(programs)} programs")
    for name, value in told["preset"].items():
        part.say(f"{name}: {told['fitted'].get(name)}, preset {value:.4g}")
    part.say(f"start of a convolution: {told['convolution_start_s']}")
    part.say(f"shares of peak: {told['shares_of_peak']}")


def compile_all(part: Part, programs: Sequence[Program], ended: float) -> list[Any]:
    """Compiled programs, or why there is none, in the order given."""

    def one(program: Program) -> Any:
        if part.left_s < ended:
            return "not compiled in time"
        try:
            lowered = jax.jit(program.function).lower(*program.operands)
            return lowered.compile()
        except Exception as error:
            return str(error)[:500]

    with ThreadPoolExecutor(2 if part.small else WORKERS) as pool:
        return list(pool.map(one, programs))


def time_one(part: Part, program: Program, compiled: Any) -> Timed | str:
    """Time a program, or say why that cannot be.

    Equal operands are one array: what is large is no smaller for caches by that, and what is small
    is in them anyway.
    """
    made: dict[Any, Any] = {}
    try:
        for shape in jax.tree.leaves(program.operands):
            key = shape.shape, shape.dtype
            if key not in made:
                made[key] = jax.device_put(filled(shape), part.device)
        operands = jax.tree.map(lambda shape: made[shape.shape, shape.dtype], program.operands)
        (times,) = in_turns(
            [functools.partial(compiled, *operands)],
            left_s=lambda: part.left_s, long_s=1e-3 if part.small else 0.02, rounds=5,
        )  # fmt: skip
        found = forecast(compiled, part.system)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        return str(error)[:500]
    return timed(
        program.name, program.group, statistics.median(times), found, winograd=program.winograd
    )


def content(part: Part, rows: Sequence[Timed], failed: dict[str, str]) -> dict[str, Any]:
    """The part's rows, the ceilings fitted, and the preset's."""
    gpu = part.system.gpu
    found = fit(rows, gpu)
    names = ("kernel_s", "memory_share", "tensor_share", "vector_share", "winograd")
    convs = [dataclasses.replace(r, group="start") for r in rows if r.group == CONV_STARTS]
    return {
        "fitted": found,
        "preset": {name: getattr(gpu, name) for name in names},
        "shares_of_peak": {
            f"{dtype}{', 3x3' if winograd else ', others'}": {
                "least": round(min(each), 3),
                "median": round(statistics.median(each), 3),
                "most": round(max(each), 3),
                "programs": len(each),
            }
            for (dtype, winograd), each in shares(rows, gpu, found).items()
        },
        "convolution_start_s": fit(convs, gpu).get("kernel_s"),
        "failed": failed,
        "rows": [row.to_json() for row in rows],
    }
