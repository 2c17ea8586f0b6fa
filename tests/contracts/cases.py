"""The operators of the sweep, each with even and uneven sizes.

Sizes are chosen against blocks: batch 5 over 4 parts leaves the last device with padding only, 7
rows over 4 parts have fewer rows a block than a window reads, 13 and 27 never divide.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jax import lax

from .harness import Case

SPACE = frozenset({"height", "width"})
IMAGE = frozenset({"sample", "channel"}) | SPACE
CONV = IMAGE | {"reduction"}
DENSE = frozenset({"sample", "channel", "reduction"})
TABLE = frozenset({"sample", "channel"})

# --- convolution -------------------------------------------------------------------------------


def conv(
    name: str,
    x: tuple[int, ...],
    kernel: tuple[int, ...],
    *,
    stride: int = 1,
    padding: Any = "SAME",
    dilation: int = 1,
    numbers: tuple[str, str, str] = ("NHWC", "HWIO", "NHWC"),
    dimensions: frozenset[str] = CONV,
    **kwargs: Any,
) -> Case:
    def apply(params: Any) -> Any:
        rank = len(x) - 2
        y = lax.conv_general_dilated(
            params["x"],
            params["kernel"],
            (stride,) * rank,
            padding,
            rhs_dilation=(dilation,) * rank,
            dimension_numbers=numbers,
        )
        return jax.nn.relu(y + params["bias"]) if "bias" in params else y

    params = {"x": x, "kernel": kernel} | kwargs.pop("more", {})
    return Case(name=name, apply=apply, params=params, kind="conv", dimensions=dimensions, **kwargs)


CONVOLUTIONS = [
    conv("conv-3x3/1", (4, 16, 16, 4), (3, 3, 4, 8)),
    conv("conv-3x3/1-stored", (4, 16, 16, 4), (3, 3, 4, 8), front=False),
    conv("conv-3x3/1-13", (5, 13, 13, 3), (3, 3, 3, 6)),
    conv("conv-3x3/1-14x15", (3, 14, 15, 5), (3, 3, 5, 7)),
    conv("conv-3x3/1-14x15-stored", (3, 14, 15, 5), (3, 3, 5, 7), front=False),
    conv("conv-5x5/2", (4, 16, 16, 4), (5, 5, 4, 4), stride=2),
    conv("conv-5x5/2-27x13", (3, 27, 13, 5), (5, 5, 5, 3), stride=2),
    conv("conv-11x11/4", (2, 32, 32, 4), (11, 11, 4, 4), stride=4),
    conv("conv-11x11/4-55x27", (3, 55, 27, 3), (11, 11, 3, 5), stride=4),
    conv("conv-11x11/4-VALID-227", (2, 227, 227, 3), (11, 11, 3, 2), stride=4, padding="VALID"),
    conv("conv-1x1", (4, 8, 8, 8), (1, 1, 8, 8)),
    conv("conv-1x1-7", (3, 7, 7, 5), (1, 1, 5, 6)),
    conv("conv-1x1/2", (4, 16, 16, 4), (1, 1, 4, 8), stride=2),
    conv("conv-1x1/2-14x13", (5, 14, 13, 5), (1, 1, 5, 7), stride=2),
    conv("conv-1x1/3-13", (2, 13, 14, 2), (1, 1, 2, 3), stride=3),
    conv("conv-3x3/2-VALID", (4, 16, 16, 4), (3, 3, 4, 8), stride=2, padding="VALID"),
    conv("conv-3x3/2-VALID-27x13", (5, 27, 13, 3), (3, 3, 3, 6), stride=2, padding="VALID"),
    conv("conv-3x3/1-dilated", (4, 16, 16, 4), (3, 3, 4, 4), dilation=2),
    conv("conv-3x3/1-dilated-13x14", (3, 13, 14, 5), (3, 3, 5, 6), dilation=2),
    conv(
        "conv-3x3/2-dilated-VALID",
        (3, 15, 13, 3),
        (3, 3, 3, 3),
        stride=2,
        dilation=2,
        padding="VALID",
    ),
    conv("conv-7x7/2-stem", (2, 28, 28, 3), (7, 7, 3, 4), stride=2, padding=((3, 3), (3, 3))),
    # The kernel is larger than a device's block: rows come from several neighbours.
    conv("conv-7x7/1-7", (3, 7, 7, 3), (7, 7, 3, 5)),
    # The output is far smaller than the input: a device's rows are mostly another's.
    conv("conv-11x11/1-VALID-14x15", (2, 14, 15, 3), (11, 11, 3, 3), padding="VALID"),
    # Padding on one side only, and so much that whole output rows see nothing else.
    conv("conv-3x3/1-lopsided", (2, 13, 9, 3), (3, 3, 3, 4), padding=((0, 5), (4, 1))),
    conv("conv-bias-relu", (4, 16, 16, 4), (3, 3, 4, 8), more={"bias": (8,)}, whole_numbers=True),
    conv(
        "conv-bias-relu-13x14",
        (3, 13, 14, 5),
        (3, 3, 5, 7),
        more={"bias": (7,)},
        whole_numbers=True,
    ),
    conv("conv-NCHW-13x14", (3, 5, 13, 14), (7, 5, 3, 3), numbers=("NCHW", "OIHW", "NCHW")),
    conv(
        "conv-1d-27",
        (5, 27, 3),
        (5, 3, 6),
        stride=2,
        numbers=("NWC", "WIO", "NWC"),
        dimensions=frozenset({"sample", "length", "channel", "reduction"}),
    ),
    conv(
        "conv-3d-7x6x5",
        (3, 7, 6, 5, 2),
        (3, 3, 3, 2, 4),
        numbers=("NDHWC", "DHWIO", "NDHWC"),
        dimensions=CONV | {"depth"},
    ),
]

# --- grouped, depthwise and transposed convolution -----------------------------------------------


def grouped(
    name: str, x: tuple[int, ...], kernel: tuple[int, ...], groups: int, **options: Any
) -> Case:
    def apply(params: Any) -> Any:
        return lax.conv_general_dilated(
            params["x"],
            params["kernel"],
            options.get("strides", (1, 1)),
            options.get("padding", "SAME"),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    return Case(
        name=name,
        apply=apply,
        params={"x": x, "kernel": kernel},
        kind="conv",
        dimensions=IMAGE,
        front=options.get("front", True),
    )


def transposed(
    name: str, x: tuple[int, ...], kernel: tuple[int, ...], stride: int, padding: Any, **kwargs: Any
) -> Case:
    def apply(params: Any) -> Any:
        rank = len(x) - 2
        return lax.conv_transpose(params["x"], params["kernel"], (stride,) * rank, padding)

    return Case(
        name=name,
        apply=apply,
        params={"x": x, "kernel": kernel},
        kind="conv",
        dimensions=kwargs.pop("dimensions", CONV),
        **kwargs,
    )


GROUPED = [
    grouped("grouped-4", (4, 8, 8, 16), (3, 3, 4, 8), 4),
    grouped("grouped-2-7x9", (3, 7, 9, 4), (3, 3, 2, 6), 2),
    grouped("grouped-4/2-13x7", (5, 13, 7, 8), (3, 3, 2, 4), 4, strides=(2, 2)),
    grouped("grouped-3-13x14", (3, 13, 14, 9), (3, 3, 3, 6), 3, front=False),
    grouped("depthwise-8", (4, 8, 8, 8), (3, 3, 1, 8), 8),
    grouped("depthwise-6/2-13x14", (3, 13, 14, 6), (5, 5, 1, 6), 6, strides=(2, 2)),
    grouped("depthwise-4-multiplier-7x9", (5, 7, 9, 4), (3, 3, 1, 8), 4, padding="VALID"),
    grouped("depthwise-7x7-14x15", (3, 14, 15, 4), (7, 7, 1, 4), 4),
]
TRANSPOSED = [
    transposed(f"transposed-{k}x{k}/{s}-{pad}{suffix}", x, (k, k, x[-1], 6), s, pad)
    for k, s, pad in (
        (2, 2, "SAME"),
        (3, 2, "SAME"),
        (4, 2, "SAME"),
        (3, 2, "VALID"),
        (3, 3, "SAME"),
        (2, 3, "VALID"),
        (5, 1, "SAME"),
    )
    for suffix, x in (("", (4, 8, 8, 4)), ("-7x9", (3, 7, 9, 5)))
]
TRANSPOSED += [
    # As many rows on a device as the base dilation: XLA mistakes the kernel's gradient.
    transposed("transposed-4x4/2-few-rows", (4, 4, 8, 4), (4, 4, 4, 3), 2, "SAME"),
    transposed("transposed-4x4/2-fewest-rows", (4, 3, 2, 4), (4, 4, 4, 3), 2, "VALID"),
    transposed("transposed-4x4/2-cut-13x6", (5, 13, 6, 3), (4, 4, 3, 4), 2, ((2, 1), (0, 3))),
    transposed(
        "transposed-3d-5x4x7",
        (2, 5, 4, 7, 3),
        (2, 2, 2, 3, 4),
        2,
        "SAME",
        dimensions=CONV | {"depth"},
    ),
    transposed(
        "transposed-1d-13",
        (3, 13, 5),
        (4, 5, 6),
        2,
        "SAME",
        dimensions=frozenset({"sample", "length", "channel", "reduction"}),
    ),
]

# --- pooling -----------------------------------------------------------------------------------


def max_pool(
    name: str, x: tuple[int, ...], window: int, stride: int, padding: str, **kwargs: Any
) -> Case:
    def apply(params: Any) -> Any:
        return nn.max_pool(params["x"], (window, window), (stride, stride), padding)

    return Case(
        name=name, apply=apply, params={"x": x}, kind="max_pool", dimensions=IMAGE, **kwargs
    )


def avg_pool(
    name: str, x: tuple[int, ...], window: int, stride: int, padding: str, include: bool = True
) -> Case:
    def apply(params: Any) -> Any:
        shape = (window, window)
        return nn.avg_pool(params["x"], shape, (stride, stride), padding, count_include_pad=include)

    return Case(name=name, apply=apply, params={"x": x}, kind="avg_pool", dimensions=IMAGE)


POOLS = [
    max_pool(f"max_pool-{window}/{stride}-{padding}{suffix}", x, window, stride, padding, **kwargs)
    for window, stride in ((2, 2), (3, 2), (3, 1), (5, 2), (2, 1))
    for padding in ("SAME", "VALID")
    for suffix, x, kwargs in (
        ("", (4, 16, 16, 8), {}),
        ("-13x14", (3, 13, 14, 5), {}),
        ("-27x15-ties", (2, 27, 15, 3), {"whole_numbers": True, "front": False}),
    )
]
POOLS += [
    max_pool("max_pool-3/2-VALID-55", (3, 55, 55, 3), 3, 2, "VALID"),
    max_pool("max_pool-3/2-SAME-7-stored", (5, 7, 7, 6), 3, 2, "SAME", front=False),
    max_pool("max_pool-5/2-VALID-7x9", (5, 9, 11, 7), 5, 2, "VALID"),
    avg_pool("avg_pool-3/2-SAME", (4, 16, 16, 4), 3, 2, "SAME"),
    avg_pool("avg_pool-3/2-SAME-13x14", (3, 13, 14, 5), 3, 2, "SAME"),
    avg_pool("avg_pool-3/2-SAME-exclude", (4, 16, 16, 4), 3, 2, "SAME", include=False),
    avg_pool("avg_pool-3/2-SAME-exclude-13x14", (3, 13, 14, 5), 3, 2, "SAME", include=False),
    avg_pool("avg_pool-3/1-SAME", (4, 16, 16, 4), 3, 1, "SAME"),
    avg_pool("avg_pool-3/1-SAME-7x15", (5, 7, 15, 3), 3, 1, "SAME"),
    avg_pool("avg_pool-3/1-VALID-27", (2, 27, 14, 3), 3, 1, "VALID"),
    avg_pool("avg_pool-2/2-VALID-13x7", (3, 13, 9, 5), 2, 2, "VALID"),
]

# --- dense, flatten, dropout -------------------------------------------------------------------


def dense(name: str, x: tuple[int, ...], features: int, **kwargs: Any) -> Case:
    def apply(params: Any) -> Any:
        return nn.relu(params["x"] @ params["kernel"] + params["bias"])

    params = {"x": x, "kernel": (x[-1], features), "bias": (features,)}
    space = SPACE if len(x) == 4 else frozenset()
    return Case(
        name=name,
        apply=apply,
        params=params,
        kind="dense",
        dimensions=DENSE | space,
        whole_numbers=True,
        **kwargs,
    )


def flatten_dense(name: str, x: tuple[int, ...], features: int) -> Case:
    size = int(np.prod(x[1:]))

    def apply(params: Any) -> Any:
        return params["x"].reshape((x[0], -1)) @ params["kernel"]

    return Case(
        name=name,
        apply=apply,
        params={"x": x, "kernel": (size, features)},
        kind="dense",
        dimensions=DENSE,
    )


def random_key(rng: np.random.Generator) -> tuple[Any, ...]:
    return (jax.random.key(int(rng.integers(2**31))),)


def dropout(name: str, x: tuple[int, ...]) -> Case:
    def apply(params: Any, key: Any) -> Any:
        y = params["x"] @ params["kernel"]
        return nn.Dropout(0.4, deterministic=False).apply({}, y, rngs={"dropout": key})

    return Case(
        name=name,
        apply=apply,
        params={"x": x, "kernel": (x[-1], x[-1])},
        kind="dense",
        dimensions=DENSE | (SPACE if len(x) == 4 else frozenset()),
        args=random_key,
    )


DENSE_LAYERS = [
    dense("dense", (8, 16), 16),
    dense("dense-stored", (8, 16), 16, front=False),
    dense("dense-5x13", (5, 13), 7),
    dense("dense-5x13-stored", (5, 13), 7, front=False),
    dense("dense-rank4", (4, 8, 8, 4), 8),
    dense("dense-rank4-7x9", (3, 7, 9, 5), 6),
    flatten_dense("flatten-dense", (4, 8, 8, 4), 8),
    flatten_dense("flatten-dense-7x5", (5, 7, 5, 3), 9),
    dropout("dropout", (8, 16)),
    dropout("dropout-rank4-7x9", (3, 7, 9, 5)),
]

# --- reductions and losses ---------------------------------------------------------------------


def reduction(
    name: str, x: tuple[int, ...], apply: Any, dimensions: frozenset[str], **kwargs: Any
) -> Case:
    return Case(
        name=name,
        apply=apply,
        params={"x": x},
        kind=kwargs.pop("kind", "reduce"),
        dimensions=dimensions,
        **kwargs,
    )


def labels(shape: tuple[int, ...]) -> Any:
    return lambda rng: (jnp.asarray(rng.integers(0, shape[1], shape[0])),)


def one_hot(shape: tuple[int, ...]) -> Any:
    return lambda rng: (jax.nn.one_hot(rng.integers(0, shape[1], shape[0]), shape[1]),)


def target(shape: tuple[int, ...]) -> Any:
    return lambda rng: (jnp.asarray(rng.standard_normal(shape), jnp.float32),)


def integer_loss(params: Any, label: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(params["x"], label)


def one_hot_loss(params: Any, label: Any) -> Any:
    return optax.softmax_cross_entropy(params["x"], label)


def squared_error(params: Any, wanted: Any) -> Any:
    return jnp.mean((params["x"] - wanted) ** 2)


REDUCTIONS = [
    case
    for suffix, image, table in (
        ("", (4, 8, 8, 4), (8, 16)),
        ("-uneven", (5, 7, 13, 6), (5, 13)),
    )
    for case in (
        reduction(f"mean-space{suffix}", image, lambda p: p["x"].mean((1, 2)), IMAGE),
        reduction(
            f"mean-keepdims{suffix}", image, lambda p: p["x"].mean((1, 2), keepdims=True), IMAGE
        ),
        reduction(
            f"sum-groups{suffix}",
            image,
            lambda p: jnp.sum(p["x"].reshape(*p["x"].shape[:3], 2, -1), (1, 2, 4)),
            IMAGE | {"dim4"},
        ),
        reduction(f"mean-all{suffix}", image, lambda p: (p["x"] ** 2).mean(), IMAGE),
        reduction(f"max-space{suffix}", image, lambda p: p["x"].max((1, 2)), IMAGE),
        reduction(
            f"max-space{suffix}-ties",
            image,
            lambda p: p["x"].max((1, 2)),
            IMAGE,
            whole_numbers=True,
        ),
        reduction(f"log_softmax{suffix}", table, lambda p: jax.nn.log_softmax(p["x"]), TABLE),
        reduction(
            f"cross_entropy{suffix}",
            table,
            integer_loss,
            frozenset({"sample"}),
            kind="take",
            args=labels(table),
        ),
        reduction(
            f"cross_entropy-mean{suffix}",
            table,
            lambda p, label: integer_loss(p, label).mean(),
            frozenset({"sample"}),
            kind="take",
            args=labels(table),
        ),
        reduction(
            f"cross_entropy-one_hot{suffix}", table, one_hot_loss, TABLE, args=one_hot(table)
        ),
        reduction(f"squared_error{suffix}", table, squared_error, TABLE, args=target(table)),
    )
]

# --- more than one layer, and what is not an operator of its own --------------------------------


def chain(
    name: str, x: tuple[int, ...], apply: Any, more: dict[str, tuple[int, ...]], **kwargs: Any
) -> Case:
    """A case around a convolution (rank 4) or a dense layer (rank 2)."""
    image = len(x) == 4
    return Case(
        name=name,
        apply=apply,
        params={"x": x} | more,
        kind=kwargs.pop("kind", "conv" if image else "dense"),
        dimensions=kwargs.pop("dimensions", CONV if image else DENSE),
        **kwargs,
    )


def convolve(x: Any, kernel: Any, **kwargs: Any) -> Any:
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers, **kwargs)


def batch_norm(params: Any) -> Any:
    """Output and updated statistics."""
    count = params["x"].shape[-1]
    variables = {
        "params": {"scale": params["scale"], "bias": params["bias"]},
        "batch_stats": {"mean": jnp.zeros(count), "var": jnp.ones(count)},
    }
    norm = nn.BatchNorm(use_running_average=False)
    return norm.apply(variables, params["x"], mutable=["batch_stats"])


def logarithm(params: Any) -> Any:
    """Where a device's block ends in padding, log 0 and 1 / 0 meet broadcast parameters."""
    y = jnp.exp(params["x"]) @ jnp.exp(params["kernel"])
    return jnp.log(y) * jnp.exp(params["scale"]) + jnp.exp(params["offset"]) / y


def images(shape: tuple[int, ...]) -> Any:
    return lambda rng: (jnp.asarray(rng.integers(0, 256, shape), jnp.uint8),)


def nested_checkpoints(params: Any) -> Any:
    """A call within a call; the second keeps its convolution, and reads what the first made."""

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    def inner(x: Any) -> Any:
        return jnp.tanh(convolve(x, params["k"]))

    @jax.checkpoint
    def outer(x: Any) -> Any:
        y = inner(jnp.sin(x))
        return jnp.cos(y) + y.mean((1, 2), keepdims=True) * x

    y = outer(params["x"])
    return inner(y) + y


def scan_of_layers(params: Any) -> Any:
    """The same layer with each of a stack of kernels; its last output, and a mean of each."""

    def layer(x: Any, kernel: Any) -> Any:
        y = jnp.tanh(convolve(x, 0.2 * kernel))
        return y, y.mean((1, 2))

    y, means = lax.scan(layer, params["x"], params["stack"], reverse=True)
    return y * 2 + means[0][:, None, None]


def scan_of_checkpoints(params: Any) -> Any:
    layer = jax.checkpoint(lambda x, kernel: (jnp.tanh(convolve(x, 0.2 * kernel)), None))
    return lax.scan(layer, params["x"], params["stack"])[0]


# --- scans that are one layer --------------------------------------------------------------------


def scan(
    name: str,
    x: tuple[int, ...],
    apply: Any,
    more: dict[str, tuple[int, ...]],
    dimensions: frozenset[str] = frozenset({"sample"}),
    **kwargs: Any,
) -> Case:
    return Case(
        name=name, apply=apply, params={"x": x} | more, kind="scan", dimensions=dimensions, **kwargs
    )


def recurrence(params: Any, cell: Any = None, start: Any = jnp.zeros, **options: Any) -> Any:
    """Outputs of all steps, batch first: h = tanh(x w + h u + b)."""

    def step(h: Any, x: Any) -> Any:
        h = jnp.tanh(x @ params["w"] + h @ params["u"] + params["b"])
        return h, 2 * h

    x = jnp.moveaxis(params["x"], 1, 0)
    h = start((x.shape[1], params["b"].size))
    last, ys = lax.scan(cell(step) if cell else step, h, x, **options)
    return jnp.moveaxis(ys, 0, 1) + last[:, None]


def logarithms(params: Any) -> Any:
    """Padding of zeros would give log 0 and 1 / 0, and NaN in the gradient of the weights."""

    def step(h: Any, x: Any) -> Any:
        h = jnp.log(jnp.abs(x) + jnp.abs(h)) * jnp.exp(params["w"]) + params["w"] / (1e-3 + x * x)
        return h, h

    x = jnp.moveaxis(params["x"], 1, 0)
    return jnp.moveaxis(lax.scan(step, jnp.zeros(x.shape[1:]), x)[1], 0, 1)


def noisy(params: Any, key: Any) -> Any:
    """A counter, random bits, a table of positions, a derivative of its own, in a checkpoint."""
    place = jnp.arange(20.0).reshape(5, 4)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(carry: Any, x: Any) -> Any:
        h, key, count = carry
        key, now = jax.random.split(key)
        kept = jax.random.bernoulli(now, 0.6, x.shape)
        h = jax.nn.silu(h @ params["w"]) + halved_gradient(x * kept) * (place + count)
        return (h, key, count + 1), h

    x = jnp.moveaxis(params["x"], 1, 0)
    (h, key, count), ys = lax.scan(step, (jnp.zeros(x.shape[1:]), key, 0), x)
    return ys.sum(0) * count + h * jax.random.uniform(key, h.shape)


def ctc(params: Any, labels: Any) -> Any:
    """Losses of sequences of several lengths."""
    lengths = jnp.asarray([9, 8, 7, 9, 6])
    late = jnp.arange(9) >= lengths[:, None]
    none = jnp.zeros(labels.shape)
    return optax.ctc_loss(params["x"] * 2, late.astype(jnp.float32), labels, none)


def lstm(params: Any) -> Any:
    """Flax's LSTM."""
    weights = {name: value for name, value in params.items() if name != "x"}
    cell = nn.OptimizedLSTMCell(3)
    variables = {"params": {"cell": traverse_util.unflatten_dict(weights, sep="/")}}
    return nn.RNN(cell).apply(variables, params["x"])


LSTM_WEIGHTS = {
    name: shape
    for gate in "ifgo"
    for name, shape in (
        (f"i{gate}/kernel", (4, 3)),
        (f"h{gate}/kernel", (3, 3)),
        (f"h{gate}/bias", (3,)),
    )
}


def mapped(params: Any) -> Any:
    """`lax.map` over the samples: they are what is scanned."""
    return lax.map(lambda x: jnp.cumsum(jnp.sin(x), 0) @ params["w"], params["x"])


def scan_in_scan(params: Any) -> Any:
    def outer(h: Any, x: Any) -> Any:
        def inner(g: Any, bias: Any) -> Any:
            return jnp.tanh(g @ params["u"] + x + bias), None

        h, _ = lax.scan(inner, h, params["b"])
        return h, h

    x = jnp.moveaxis(params["x"], 1, 0)
    return jnp.moveaxis(lax.scan(outer, jnp.zeros(x.shape[1:]), x)[1], 0, 1)


CELL = {"w": (4, 7), "u": (7, 7), "b": (7,)}

SCANS = [
    scan("scan-rnn", (5, 6, 4), recurrence, CELL),
    scan(
        "scan-reverse",
        (5, 6, 4),
        lambda p: recurrence(p, start=jnp.ones, reverse=True, unroll=2),
        CELL,
    ),
    scan(
        "scan-checkpointed-body",
        (4, 6, 4),
        lambda p: recurrence(p, functools.partial(jax.checkpoint, prevent_cse=False)),
        CELL,
        slow=True,
    ),
    scan("scan-checkpointed", (3, 6, 4), jax.checkpoint(recurrence), CELL, slow=True),
    scan("scan-logarithms", (5, 6, 7), logarithms, {"w": (7,)}, frozenset({"sample", "channel"})),
    scan("scan-noisy", (5, 6, 4), noisy, {"w": (4, 4)}, args=lambda rng: (jax.random.key(3),)),
    scan(
        "scan-ctc",
        (5, 9, 8),
        ctc,
        {},
        args=lambda rng: (jnp.asarray(rng.integers(1, 8, (5, 3))),),
    ),
    scan("scan-lstm", (5, 6, 4), lstm, LSTM_WEIGHTS),
    scan("scan-map", (5, 6, 4), mapped, {"w": (4, 3)}, frozenset({"sample", "channel"})),
    scan("scan-in-scan", (5, 3, 4), scan_in_scan, {"u": (4, 4), "b": (2, 4)}, slow=True),
]

MEAN = np.float32([0.5, -1.0, 2.0, 0.1, -0.3])
MIXING = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)

CHAINS = [
    chain(
        "batch_norm",
        (4, 8, 8, 4),
        batch_norm,
        {"scale": (4,), "bias": (4,)},
        kind="reduce",
        dimensions=IMAGE,
    ),
    chain(
        "batch_norm-7x9",
        (5, 7, 9, 5),
        batch_norm,
        {"scale": (5,), "bias": (5,)},
        kind="reduce",
        dimensions=IMAGE,
    ),
    chain(
        "residual-7x9",
        (3, 7, 9, 5),
        lambda p: convolve(p["x"], p["kernel"]) + p["x"],
        {"kernel": (3, 3, 5, 5)},
    ),
    chain(
        "shared-kernel-7x9",
        (3, 7, 9, 5),
        lambda p: convolve(jnp.tanh(convolve(p["x"], p["kernel"])), p["kernel"]),
        {"kernel": (3, 3, 5, 5)},
    ),
    chain(
        "weight-decay-7x9",
        (3, 7, 9, 5),
        lambda p: convolve(p["x"], p["kernel"]) + 0.1 * jnp.sum(p["kernel"] ** 2),
        {"kernel": (3, 3, 5, 6)},
    ),
    chain(
        "constant-7x9",
        (3, 7, 9, 5),
        lambda p: convolve((p["x"] - MEAN) * np.exp(MEAN), p["kernel"]),
        {"kernel": (3, 3, 5, 6)},
    ),
    chain("constant-weight-5x5", (5, 5), lambda p: jnp.einsum("bi,io->bo", p["x"], MIXING), {}),
    chain("constant-weight-left", (5, 6), lambda p: jnp.einsum("io,ib->ob", MIXING, p["x"]), {}),
    chain(
        "bytes-13x14",
        (3, 5, 5, 5),
        lambda p, image: convolve(image.astype(jnp.float32) / 255, p["x"]),
        {},
        args=images((3, 13, 14, 5)),
        front=False,
    ),
    chain(
        "logarithm-5x13",
        (5, 13),
        logarithm,
        {"kernel": (13, 7), "scale": (7,), "offset": ()},
    ),
    chain(
        "one_hot-dense",
        (13, 7),
        lambda p, label: jax.nn.one_hot(label, 13) @ p["x"],
        {},
        args=lambda rng: (jnp.asarray(rng.integers(0, 13, 5)),),
        front=False,
    ),
    chain(
        "checkpoint-7x9",
        (3, 7, 9, 5),
        jax.checkpoint(lambda p: jnp.sin(convolve(jnp.tanh(convolve(p["x"], p["k"])), p["l"]))),
        {"k": (3, 3, 5, 6), "l": (3, 3, 6, 5)},
    ),
    chain("checkpoint-nested", (4, 8, 8, 4), nested_checkpoints, {"k": (3, 3, 4, 4)}, slow=True),
    chain("scan-7x9", (3, 7, 9, 5), scan_of_layers, {"stack": (3, 3, 3, 5, 5)}, slow=True),
    chain("scan-checkpoint", (4, 8, 8, 4), scan_of_checkpoints, {"stack": (2, 3, 3, 4, 4)}),
    chain(
        "concatenate-7x9",
        (3, 7, 9, 5),
        lambda p: jnp.concatenate([convolve(p["x"], p["kernel"]), p["x"]], -1),
        {"kernel": (3, 3, 5, 6)},
    ),
]


def group_norm(groups: int) -> Callable[[Any], Any]:
    def apply(x: Any) -> Any:
        count = x.shape[-1]
        variables = {"params": {"scale": jnp.arange(1.0, count + 1), "bias": jnp.ones(count)}}
        return nn.GroupNorm(num_groups=groups).apply(variables, x)

    return apply


def layer_norm(x: Any) -> Any:
    count = x.shape[-1]
    variables = {"params": {"scale": jnp.arange(1.0, count + 1), "bias": jnp.ones(count)}}
    return nn.LayerNorm().apply(variables, x)


# --- rearranging and resizing --------------------------------------------------------------------


def rearrange(
    name: str,
    x: tuple[int, ...],
    apply: Callable[[Any], Any],
    kind: str,
    dimensions: frozenset[str],
    **kwargs: Any,
) -> Case:
    return Case(
        name=name,
        apply=lambda params: apply(params["x"]),
        params={"x": x},
        kind=kind,
        dimensions=dimensions,
        **kwargs,
    )


def resize(
    name: str, x: tuple[int, ...], size: tuple[int, ...], method: str, **options: Any
) -> Case:
    """`jax.image.resize` is one resizing per dimension; the first is named by the case."""
    return rearrange(
        f"resize-{method}-{name}",
        x,
        lambda x: jax.image.resize(x, size, method, **options),
        "resize",
        IMAGE if len(x) == 4 else IMAGE | {"depth"},
    )


def pixel_shuffle(x: Any) -> Any:
    b, h, w, c = x.shape
    return x.reshape(b, h, w, 2, 2, c // 4).swapaxes(2, 3).reshape(b, 2 * h, 2 * w, c // 4)


@jax.custom_vjp
def halved_gradient(x: Any) -> Any:
    """A derivative that is not the function's own."""
    return jnp.tanh(x) * 2


halved_gradient.defvjp(lambda x: (halved_gradient(x), jnp.cosh(x)), lambda c, g: (g / c**2,))


@jax.custom_vjp
def clipped_softmax(x: Any) -> Any:
    """Mixes the last dimension, in both directions."""
    return nn.softmax(x)


def clipped_softmax_backward(y: Any, g: Any) -> tuple[Any]:
    return (jnp.clip(y * (g - jnp.sum(y * g, -1, keepdims=True)), -0.1, 0.1),)


clipped_softmax.defvjp(lambda x: (clipped_softmax(x), clipped_softmax(x)), clipped_softmax_backward)


@jax.custom_jvp
def normalised(x: Any, scale: Any) -> Any:
    """Two operands, one broadcast; its derivative takes the length for a constant."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True) * scale


@normalised.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (x, scale), (t, u) = primals, tangents
    length = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return normalised(x, scale), t / length * scale + x / length * u


NOT_CHANNEL = IMAGE - {"channel"}

ARRANGEMENTS = [
    case
    for suffix, x in (("", (4, 8, 8, 4)), ("-7x9", (3, 7, 9, 5)))
    for case in (
        rearrange(
            f"concat{suffix}",
            x,
            lambda x: jnp.concatenate([x * 2, jnp.tanh(x), x], -1),
            "concat",
            NOT_CHANNEL,
        ),
        rearrange(
            f"pad-space{suffix}",
            x,
            lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 3), (0, 0)), constant_values=2.0),
            "pad",
            IMAGE,
        ),
        rearrange(
            f"pad-cut{suffix}",
            x,
            lambda x: lax.pad(x, 0.5, ((0, 0, 0), (-1, 3, 0), (2, -2, 0), (0, 1, 0))),
            "pad",
            IMAGE,
        ),
        rearrange(
            f"pad-interior{suffix}",
            x,
            lambda x: lax.pad(x, 0.0, ((0, 0, 0), (1, 0, 1), (0, 0, 0), (0, 0, 0))),
            "pad",
            IMAGE - {"height"},
        ),
        rearrange(f"slice{suffix}", x, lambda x: x[:, 1:-1, 2:, :], "slice", IMAGE),
        rearrange(f"slice-strided{suffix}", x, lambda x: x[:, 1::2, ::3, 1:], "slice", IMAGE),
        rearrange(
            f"split{suffix}",
            x,
            lambda x: [jnp.split(x, [2], -1)[1] * 2.0, x],
            "split",
            NOT_CHANNEL,
        ),
        rearrange(
            f"stack{suffix}",
            x,
            lambda x: jnp.stack([jnp.sin(x), x * x], 2),
            "concat",
            frozenset({"sample", "height", "width", "channel"}),
        ),
        rearrange(
            f"unstack{suffix}",
            x,
            lambda x: sum(jnp.unstack(x, axis=1)[1:]),
            "split",
            IMAGE - {"height"},
        ),
        rearrange(
            f"tile{suffix}", x, lambda x: jnp.tile(x, (1, 1, 2, 1)), "concat", IMAGE - {"width"}
        ),
        rearrange(f"top_k{suffix}", x, lambda x: lax.top_k(x, 2)[0], "sort", NOT_CHANNEL),
        rearrange(f"reverse{suffix}", x, lambda x: x[:, :, ::-1], "reverse", IMAGE - {"width"}),
        rearrange(
            f"cumsum{suffix}", x, lambda x: jnp.cumsum(x, 1), "cumulative", IMAGE - {"height"}
        ),
        rearrange(f"sort{suffix}", x, lambda x: jnp.sort(x, 1), "sort", IMAGE - {"height"}),
        rearrange(
            f"dynamic_slice{suffix}",
            x,
            lambda x: lax.dynamic_slice_in_dim(x, jnp.argmax(x[0, 0, 0, :2]), 2, 3),
            "slice",
            NOT_CHANNEL,
        ),
        rearrange(
            f"dynamic_update_slice{suffix}",
            x,
            lambda x: lax.dynamic_update_slice_in_dim(x, x[..., :2] * 2, 1, 3),
            "slice",
            NOT_CHANNEL,
        ),
        rearrange(
            f"transpose{suffix}",
            x,
            lambda x: lax.reduce_window(
                x.transpose(0, 3, 2, 1), 0.0, lax.add, (1, 1, 2, 3), (1, 1, 1, 1), "SAME"
            ),
            "avg_pool",
            IMAGE,
        ),
        rearrange(
            f"squeeze-excite{suffix}",
            x,
            lambda x: x * nn.sigmoid(jnp.mean(x, (1, 2), keepdims=True)),
            "reduce",
            IMAGE,
        ),
        rearrange(f"softmax{suffix}", x, nn.softmax, "reduce", IMAGE),
        rearrange(f"layer_norm{suffix}", x, layer_norm, "reduce", IMAGE),
        rearrange(f"custom_vjp{suffix}", x, lambda x: halved_gradient(x * 2), "avg_pool", IMAGE),
        rearrange(f"custom_vjp-softmax{suffix}", x, clipped_softmax, "custom", NOT_CHANNEL),
        rearrange(
            f"custom_jvp-norm{suffix}",
            x,
            lambda x: normalised(x, jnp.tanh(x[:, :1, :, :])),
            "custom",
            NOT_CHANNEL,
        ),
        rearrange(f"repeat{suffix}", x, lambda x: jnp.repeat(x, 2, 1), "reshape", IMAGE),
    )
] + [
    rearrange("group_norm-2", (4, 8, 8, 4), group_norm(2), "reduce", IMAGE | {"dim4"}),
    rearrange("group_norm-3-7x9", (3, 7, 9, 6), group_norm(3), "reduce", IMAGE | {"dim4"}),
    rearrange("pixel_shuffle", (4, 8, 8, 8), pixel_shuffle, "reshape", IMAGE),
    resize("2x", (4, 8, 8, 4), (4, 16, 16, 4), "nearest"),
    resize("7x9", (3, 7, 9, 5), (3, 13, 20, 5), "nearest"),
    resize("down", (3, 14, 9, 5), (3, 5, 9, 5), "nearest"),
    resize("2x", (4, 8, 8, 4), (4, 16, 16, 4), "bilinear"),
    resize("7x9", (3, 7, 9, 5), (3, 13, 20, 5), "bilinear"),
    resize("down", (3, 14, 27, 5), (3, 5, 10, 5), "bilinear"),
    resize("cubic", (3, 13, 12, 2), (3, 27, 24, 2), "cubic"),
    resize("3d", (2, 4, 5, 6, 3), (2, 8, 10, 12, 3), "trilinear"),
]


# --- padding with an array's own rows ------------------------------------------------------------

LENGTH = frozenset({"sample", "length", "channel", "reduction"})


def padded(x: Any, mode: str, *widths: tuple[int, int]) -> Any:
    """Channels-last images, padded in space with rows of their own."""
    return jnp.pad(x, ((0, 0), *widths, (0, 0)), mode=mode)


def valid(x: Any, kernel: Any, stride: int = 1, **kwargs: Any) -> Any:
    space = "DHW"[5 - x.ndim :]
    numbers = (f"N{space}C", f"{space}IO", f"N{space}C")
    strides = (stride,) * (x.ndim - 2)
    return lax.conv_general_dilated(
        x, kernel, strides, "VALID", dimension_numbers=numbers, **kwargs
    )


def own_rows(
    name: str,
    x: tuple[int, ...],
    apply: Callable[..., Any],
    kernel: tuple[int, ...] = (),
    kind: str = "conv",
    **kwargs: Any,
) -> Case:
    space = IMAGE if len(x) == 4 else LENGTH - {"reduction"}
    return Case(
        name=name,
        apply=lambda p: apply(p["x"], p["kernel"]) if kernel else apply(p["x"]),
        params={"x": x} | ({"kernel": kernel} if kernel else {}),
        kind=kind,
        dimensions=kwargs.pop("dimensions", space | ({"reduction"} if kind == "conv" else set())),
        **kwargs,
    )


def two_readers(x: Any, kernel: Any) -> Any:
    """A convolution of which the padding becomes part, and an operator that reads it as it is."""
    y = padded(x, "reflect", (1, 1), (1, 1))
    return [jnp.tanh(y)[:, 1:-1, 1:-1] + valid(y, kernel), jnp.sin(y)]


def two_windows(x: Any, kernel: Any) -> Any:
    """Both read the rows around the ends, one through a window that is padded besides."""
    y = padded(x, "wrap", (1, 1), (1, 1))
    return valid(y, kernel) + nn.max_pool(y, (3, 3), (1, 1), "SAME")[:, :-2, 2:]


def two_exchanges(x: Any, kernel: Any) -> Any:
    """One tensor, exchanged in a ring and in a row."""
    return valid(padded(x, "wrap", (1, 1), (1, 1)), kernel) * convolve(x, kernel)


def resampled(x: Any, kernel: Any) -> Any:
    """A vocoder's filters: twice as many samples, and back, between repeated edges."""
    channels, options = x.shape[-1], {"feature_group_count": x.shape[-1]}
    numbers = ("NWC", "WIO", "NWC")
    y = lax.conv_general_dilated(
        padded(x, "edge", (2, 2)), kernel, (1,), ((3, 3),), (2,), None, numbers, **options
    )
    y = jnp.sin(2 * y[:, 3:-3])
    assert y.shape[-1] == channels
    return valid(padded(y, "edge", (1, 2)), kernel, 2, **options)


def one_at_a_time(x: Any, kernel: Any) -> Any:
    """Each image padded alone, its channels first, in another type than that of its convolution."""

    def one(image: Any) -> Any:
        y = jnp.pad(image, ((0, 0), (1, 1), (2, 2)), mode="wrap").astype(kernel.dtype)
        return lax.conv_general_dilated(y[None], kernel, (1, 1), "VALID")[0]

    return jax.vmap(one)(x.astype(jnp.float32).transpose(0, 3, 1, 2))


def taken(x: Any, kernel: Any) -> Any:
    """Wrapped and clipped by their indices."""
    x = x[:, np.arange(-2, x.shape[1] + 1)]
    return valid(x[:, :, np.clip(np.arange(-1, x.shape[2] + 1), 0, x.shape[2] - 1)], kernel)


MODES = ("wrap", "reflect", "symmetric", "edge")


def own_rows_of(mode: str) -> list[Case]:
    """Convolutions of several sizes, a pool, and the padding alone."""
    seldom = {"slow": mode in ("symmetric", "edge")}

    def conv_of(widths: int, stride: int = 1) -> Any:
        return lambda x, kernel: valid(
            padded(x, mode, *((widths, widths),) * (x.ndim - 2)), kernel, stride
        )

    return [
        own_rows(f"{mode}-conv-3x3/1", (4, 8, 8, 4), conv_of(1), (3, 3, 4, 6), slow=True),
        own_rows(f"{mode}-conv-3x3/1-7x5", (3, 7, 5, 3), conv_of(1), (3, 3, 3, 5)),
        own_rows(f"{mode}-conv-5/1-5", (3, 5, 5), conv_of(2), (5, 5, 3), **seldom),
        own_rows(f"{mode}-conv-5/2-13", (3, 13, 5), conv_of(2, 2), (5, 5, 6), **seldom),
        own_rows(
            f"{mode}-pad-7x13",
            (3, 7, 13, 2),
            lambda x: padded(x, mode, (2, 1), (0, 3)),
            kind="pad",
        ),
        own_rows(
            f"{mode}-pad-wide", (2, 9, 3), lambda x: padded(x, mode, (8, 7)), kind="pad", **seldom
        ),
        own_rows(
            f"{mode}-max_pool-3/2",
            (3, 8, 7, 5),
            lambda x: nn.max_pool(padded(x, mode, (1, 1), (0, 1)), (3, 2), (2, 1)),
            kind="max_pool",
            slow=mode != "reflect",
        ),
    ]


def flax_conv(padding: str) -> Any:
    layer = nn.Conv(6, (3, 5), (2, 1), padding, kernel_dilation=(2, 1), use_bias=False)
    return lambda x, kernel: layer.apply({"params": {"kernel": kernel}}, x)


OWN_ROWS = [
    *(case for mode in MODES for case in own_rows_of(mode)),
    own_rows("flax-CIRCULAR", (3, 8, 7, 3), flax_conv("CIRCULAR"), (3, 5, 3, 6)),
    own_rows("flax-REFLECT", (3, 8, 7, 3), flax_conv("REFLECT"), (3, 5, 3, 6), slow=True),
    own_rows("pad-two-readers", (3, 7, 8, 5), two_readers, (3, 3, 5, 5), "pad", dimensions=IMAGE),
    own_rows("pad-two-windows", (3, 8, 7, 5), two_windows, (3, 3, 5, 5)),
    own_rows("pad-two-exchanges", (3, 8, 7, 5), two_exchanges, (3, 3, 5, 5)),
    own_rows("pad-resampled", (3, 13, 4), resampled, (6, 1, 4), dimensions=LENGTH - {"reduction"}),
    own_rows("pad-one-at-a-time", (3, 8, 7, 5), one_at_a_time, (6, 5, 3, 5)),
    own_rows("pad-taken", (3, 7, 8, 5), taken, (3, 3, 5, 6), slow=True),
    own_rows("roll", (3, 8, 13, 2), lambda x: jnp.roll(x, (3, -2), (1, 2)), kind="slice"),
]


def slow_where_even(cases: list[Case]) -> list[Case]:
    """Of two cases that differ in their sizes only, the even one is left to `make test-all`."""
    uneven = {case.name.removesuffix("-7x9") for case in cases if case.name.endswith("-7x9")}
    return [dataclasses.replace(case, slow=case.name in uneven) for case in cases]


CASES = [
    *CONVOLUTIONS,
    *GROUPED,
    *slow_where_even(TRANSPOSED),
    *POOLS,
    *DENSE_LAYERS,
    *REDUCTIONS,
    *CHAINS,
    *SCANS,
    *slow_where_even(ARRANGEMENTS),
    *OWN_ROWS,
]

EIGHT_PARTS = [
    conv("conv-3x3/1-13x7", (9, 13, 7, 9), (3, 3, 9, 11)),
    max_pool("max_pool-3/2", (8, 16, 16, 8), 3, 2, "SAME"),
]

OWN_ROWS_EIGHT = {
    mode: own_rows(
        f"{mode}-conv-5-{size}",
        (3, size, 5),
        lambda x, k, mode=mode, stride=stride: valid(padded(x, mode, (2, 2)), k, stride),
        (5, 5, 9),
    )
    for mode, size, stride in zip(MODES, (13, 21, 21, 13), (1, 2, 1, 2), strict=True)
}
EIGHT_PARTS_SLOW = [
    conv("conv-5x5/2-27x13", (9, 27, 13, 5), (5, 5, 5, 11), stride=2),
    conv("conv-3x3/1-dilated-27x14", (5, 27, 14, 9), (3, 3, 9, 8), dilation=2),
    max_pool("max_pool-3/1-13x7", (13, 13, 7, 5), 3, 1, "SAME"),
    max_pool("max_pool-5/2-27x13", (5, 27, 13, 9), 5, 2, "VALID"),
    avg_pool("avg_pool-3/2-13x27", (9, 13, 27, 5), 3, 2, "SAME", include=False),
    dense("dense-rank4-7x9", (9, 7, 9, 13), 11),
    flatten_dense("flatten-dense-8x5", (9, 8, 5, 3), 13),
    conv("conv-3x3/1", (8, 16, 16, 8), (3, 3, 8, 8)),
    max_pool("max_pool-3/2-7x27", (5, 7, 27, 13), 3, 2, "SAME"),
    OWN_ROWS_EIGHT["wrap"],
    OWN_ROWS_EIGHT["reflect"],
    OWN_ROWS_EIGHT["symmetric"],
    OWN_ROWS_EIGHT["edge"],
]

SIX_PARTS = [
    case
    for case in CASES
    if case.name in ("conv-3x3/1-14x15", "max_pool-3/2-SAME-13x14", "dense-5x13", "mean-all-uneven")
]
