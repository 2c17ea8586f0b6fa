"""The operators that random programs are made of.

An operator is one function: it is given a `Writer` and its operands, and returns the expression
that computes the result, as Python source. Whatever it chooses (kernel, stride, axis) it asks of
the writer, which draws when a program is made and repeats the recorded choice afterwards. So the
same function draws, evaluates (the source is what runs) and prints, and a program whose sizes or
choices change is written anew by the same code. Candidates come simplest first: what was not
recorded, or is not possible any more, becomes the first.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Shape = tuple[int, ...]

LARGEST = 6000
"""Elements of the largest value of a program."""


class Unfit(Exception):
    """An operator that does not apply to its operands."""


def fit(condition: bool) -> None:
    """Raise `Unfit` unless the condition holds."""
    if not condition:
        raise Unfit


@dataclass(frozen=True)
class Value:
    """A value of a program: its name in the source, its shape."""

    name: str
    shape: Shape

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def space(self) -> Shape:
        """Sizes between the first dimension (samples) and the last (channels)."""
        return self.shape[1:-1]

    def __str__(self) -> str:
        return self.name


@dataclass
class Writer:
    """What an operator may ask for while it is written.

    Attributes:
      number: of the step; part of the names of its parameters.
      rng: draws choices; None repeats the recorded ones.
      choices: key -> what was chosen.
      parameters: name -> shape of all parameters so far.
      batch: name -> (shape, exclusive upper bound) of integer arguments so far.
    """

    number: int
    rng: random.Random | None
    choices: dict[str, Any]
    parameters: dict[str, Shape]
    batch: dict[str, tuple[Shape, int]]
    used: dict[str, Any] = field(default_factory=dict)

    def pick(self, key: str, candidates: Sequence[Any], weights: Sequence[float] = ()) -> Any:
        """One of the candidates, which come simplest first."""
        fit(len(candidates) > 0)
        if self.rng is not None:
            chosen = self.rng.choices(candidates, weights or None)[0]
        else:
            chosen = self.choices.get(key, candidates[0])
            if chosen not in candidates:
                chosen = candidates[0]
        self.used[key] = chosen
        return chosen

    def axis(self, x: Value, key: str = "axis", least: int = 1) -> int:
        """A dimension of at least so many elements."""
        return self.pick(key, [d for d, n in enumerate(x.shape) if n >= least])

    def parameter(self, *shape: int, key: str = "w") -> str:
        """Source of a parameter, sometimes of one that another step has, too."""
        fit(math.prod(shape) <= LARGEST)
        others = [name for name, known in self.parameters.items() if known == shape]
        shared = self.pick(f"{key}.shared", [False, True], (5, 1)) if others else False
        name = others[-1] if shared else f"{key}{self.number}"
        self.parameters[name] = shape
        return f'params["{name}"]'

    def integers(self, *shape: int, below: int, key: str = "i") -> str:
        """Source of an argument of integers."""
        name = f"{key}{self.number}"
        self.batch[name] = shape, below
        return name


Write = Callable[..., str]


@dataclass(frozen=True)
class Operator:
    """An operator of the table.

    Attributes:
      name: by which outcomes are counted.
      write: `write(writer, *operands)` gives the source of the result.
      arity: number of operands.
      weight: how often it is drawn.
    """

    name: str
    write: Write
    arity: int = 1
    weight: float = 1.0


OPERATORS: dict[str, Operator] = {}


def operator(*, arity: int = 1, weight: float = 1.0) -> Callable[[Write], Write]:
    def add(write: Write) -> Write:
        name = write.__name__
        OPERATORS[name] = Operator(name=name, write=write, arity=arity, weight=weight)
        return write

    return add


HELPERS = {
    "clip_gradient": """\
@jax.custom_vjp
def clip_gradient(x):
    return x


def _clip_backward(_, g):
    return (jnp.clip(g, -0.01, 0.01),)


clip_gradient.defvjp(lambda x: (x, None), _clip_backward)
""",
    "scale_gradient": """\
@jax.custom_vjp
def scale_gradient(x):
    return x


scale_gradient.defvjp(lambda x: (x, None), lambda _, g: (-0.5 * g,))
""",
    "normalize_gradient": """\
@jax.custom_vjp
def normalize_gradient(x):
    return x


normalize_gradient.defvjp(
    lambda x: (x, None), lambda _, g: (g / (1e-3 + jnp.sqrt(jnp.sum(g * g))),)
)
""",
    "own_swish": """\
@jax.custom_vjp
def own_swish(x, slope):
    return x * jax.nn.sigmoid(slope * x)


def _swish_backward(saved, g):
    x, slope = saved
    s = jax.nn.sigmoid(slope * x)
    return g * (s + slope * x * s * (1 - s)), jnp.sum(g * x * x * s * (1 - s)).reshape(slope.shape)


own_swish.defvjp(lambda x, slope: (own_swish(x, slope), (x, slope)), _swish_backward)
""",
    "own_softplus": """\
@jax.custom_jvp
def own_softplus(x):
    return jnp.logaddexp(x, 0.0)


own_softplus.defjvp(
    lambda primals, tangents: (own_softplus(*primals), jax.nn.sigmoid(primals[0]) * tangents[0])
)
""",
    "own_loss": """\
@jax.custom_vjp
def own_loss(logits):
    return -jnp.mean(jax.nn.log_softmax(logits)[..., 0])


def _loss_forward(logits):
    return own_loss(logits), jax.nn.softmax(logits)


def _loss_backward(p, g):
    count = p.size // p.shape[-1]
    return (g * (p - jax.nn.one_hot(0, p.shape[-1], dtype=p.dtype)) / count,)


own_loss.defvjp(_loss_forward, _loss_backward)
""",
}
"""Functions that some expressions call; a program's source has those that it needs."""


# --- convolutions ------------------------------------------------------------------------------

NUMBERS = {1: ("NWC", "WIO"), 2: ("NHWC", "HWIO"), 3: ("NDHWC", "DHWIO")}


def _each(w: Writer, key: str, x: Value, candidates: Sequence[int]) -> tuple[int, ...]:
    """A choice for every dimension of space."""
    return tuple(w.pick(f"{key}{d}", candidates) for d in range(len(x.space)))


def _convolution(
    w: Writer,
    x: Value,
    *,
    stride: Sequence[int] = (1,),
    dilation: Sequence[int] = (1,),
    base: Sequence[int] = (1,),
    groups: int = 1,
    batch_groups: int = 1,
    pads: Sequence[Any] = ("SAME", "VALID"),
    multiple: Sequence[int] = (1, 2, 3, 4, 5),
) -> str:
    """A convolution of channels-last data."""
    rank = len(x.space)
    fit(1 <= rank <= 3)
    kernel = _each(w, "kernel", x, (1, 2, 3, 5))
    strides = _each(w, "stride", x, stride)
    rhs, lhs = _each(w, "dilation", x, dilation), _each(w, "base", x, base)
    padding = w.pick("padding", pads)
    if padding == "pairs":
        pairs = (0, 1, 2, -1) if max(lhs) == 1 else (0, 1, 2)
        padding = [(w.pick(f"low{d}", pairs), w.pick(f"high{d}", pairs)) for d in range(rank)]
    channels = x.shape[-1]
    fit(channels % groups == 0 and x.shape[0] % batch_groups == 0)
    same = channels if groups == batch_groups == 1 else 0
    wanted = [groups * batch_groups * n for n in multiple] + [same] * 3
    features = w.pick("features", [n for n in wanted if n])
    fit(features % (groups * batch_groups) == 0)
    data, filters = NUMBERS[rank]
    parts = [
        f"{x}, {w.parameter(*kernel, channels // groups, features)}, {strides}, {padding!r}",
        f"dimension_numbers={(data, filters, data)}",
    ]
    for name, value, plain in (
        ("lhs_dilation", lhs, (1,) * rank),
        ("rhs_dilation", rhs, (1,) * rank),
        ("feature_group_count", groups, 1),
        ("batch_group_count", batch_groups, 1),
    ):
        parts += [f"{name}={value}"] if value != plain else []
    return f"lax.conv_general_dilated({', '.join(parts)})"


@operator(weight=5)
def conv(w: Writer, x: Value) -> str:
    return _convolution(w, x)


@operator(weight=2)
def conv_strided(w: Writer, x: Value) -> str:
    return _convolution(w, x, stride=(2, 1, 3), pads=("SAME", "VALID", "pairs"))


@operator()
def conv_padded(w: Writer, x: Value) -> str:
    return _convolution(w, x, pads=("pairs",), stride=(1, 1, 2))


@operator()
def conv_dilated(w: Writer, x: Value) -> str:
    return _convolution(w, x, dilation=(2, 1, 3), stride=(1, 1, 2))


@operator()
def conv_transposed(w: Writer, x: Value) -> str:
    return _convolution(w, x, base=(2, 1, 3), pads=("pairs",), stride=(1, 1, 1, 2))


@operator()
def conv_transpose(w: Writer, x: Value) -> str:
    rank = len(x.space)
    fit(1 <= rank <= 3)
    kernel, strides = _each(w, "kernel", x, (1, 2, 3)), _each(w, "stride", x, (2, 1, 3))
    weight = w.parameter(*kernel, x.shape[-1], w.pick("features", [1, 2, 3, 5]))
    data, filters = NUMBERS[rank]
    padding = w.pick("padding", ("SAME", "VALID"))
    return (
        f"lax.conv_transpose({x}, {weight}, {strides}, {padding!r}, "
        f"dimension_numbers={(data, filters, data)})"
    )


@operator(weight=1.5)
def conv_grouped(w: Writer, x: Value) -> str:
    divisors = [n for n in range(2, x.shape[-1] + 1) if x.shape[-1] % n == 0]
    return _convolution(w, x, groups=w.pick("groups", divisors), stride=(1, 1, 2))


@operator()
def conv_depthwise(w: Writer, x: Value) -> str:
    fit(x.shape[-1] > 1)
    return _convolution(w, x, groups=x.shape[-1], multiple=(1, 2))


@operator()
def conv_batch_groups(w: Writer, x: Value) -> str:
    divisors = [n for n in range(2, x.shape[0] + 1) if x.shape[0] % n == 0]
    return _convolution(w, x, batch_groups=w.pick("groups", divisors), multiple=(1, 2))


@operator()
def conv_channels_first(w: Writer, x: Value) -> str:
    fit(x.rank == 4)
    kernel = _each(w, "kernel", x, (1, 2, 3))
    weight = w.parameter(w.pick("features", [1, 2, 3, 5, x.shape[-1]]), x.shape[-1], *kernel)
    padding, stride = w.pick("padding", ("SAME", "VALID")), _each(w, "stride", x, (1, 2))
    return (
        f"jnp.moveaxis(lax.conv_general_dilated(jnp.moveaxis({x}, -1, 1), {weight}, {stride}, "
        f"{padding!r}), 1, -1)"
    )


@operator(weight=0.5)
def conv_local(w: Writer, x: Value) -> str:
    fit(x.rank == 4)
    kernel = _each(w, "kernel", x, (1, 2, 3))
    out = tuple(n - k + 1 for n, k in zip(x.space, kernel, strict=True))
    fit(min(out) > 0)
    weight = w.parameter(*out, math.prod(kernel) * x.shape[-1], w.pick("features", [1, 2, 3]))
    return (
        f"lax.conv_general_dilated_local({x}, {weight}, (1, 1), 'VALID', {kernel}, "
        "dimension_numbers=('NHWC', 'HWIO', 'NHWC'))"
    )


@operator(weight=0.5)
def conv_patches(w: Writer, x: Value) -> str:
    fit(x.rank == 4)
    kernel = _each(w, "kernel", x, (1, 2, 3))
    return (
        f"lax.conv_general_dilated_patches({x}, {kernel}, (1, 1), "
        f"{w.pick('padding', ('SAME', 'VALID'))!r}, dimension_numbers=('NHWC', 'HWIO', 'NHWC'))"
    )


# --- pools -------------------------------------------------------------------------------------


def _pool(w: Writer, x: Value, start: str, function: str, operand: str = "") -> str:
    fit(x.rank >= 3)
    window = (1, *_each(w, "window", x, (2, 1, 3)), 1)
    stride = (1, *_each(w, "stride", x, (1, 2, 3)), 1)
    if w.pick("channels", [False, True], (9, 1)):
        window = (*window[:-1], 2)
    fit(max(window) > 1)
    padding = w.pick("padding", ("SAME", "VALID"))
    return (
        f"lax.reduce_window({operand or x}, {start}, {function}, {window}, {stride}, {padding!r})"
    )


@operator(weight=1.5)
def max_pool(w: Writer, x: Value) -> str:
    return _pool(w, x, "-jnp.inf", "lax.max")


@operator()
def max_pool_ties(w: Writer, x: Value) -> str:
    return _pool(w, x, "-jnp.inf", "lax.max", f"jnp.maximum({x}, 0)")


@operator(weight=0.5)
def min_pool(w: Writer, x: Value) -> str:
    return _pool(w, x, "jnp.inf", "lax.min")


@operator()
def sum_pool(w: Writer, x: Value) -> str:
    return f"0.25 * {_pool(w, x, '0.0', 'lax.add')}"


@operator(weight=0.5)
def mean_pool(w: Writer, x: Value) -> str:
    total = _pool(w, x, "0.0", "lax.add")
    return f"{total} / {total.replace(str(x), f'jnp.ones_like({x})', 1)}"


# --- products ----------------------------------------------------------------------------------


@operator(weight=3)
def dense(w: Writer, x: Value) -> str:
    fit(x.rank >= 2)
    return f"{x} @ {w.parameter(x.shape[-1], w.pick('features', [1, 2, 3, 5, 7, x.shape[-1]]))}"


@operator()
def dense_left(w: Writer, x: Value) -> str:
    fit(x.rank in (1, 2))
    return f"{w.parameter(w.pick('features', [1, 2, 3, 5]), x.shape[0])} @ {x}"


@operator()
def dense_of_any_axis(w: Writer, x: Value) -> str:
    axis = w.axis(x)
    weight = w.parameter(x.shape[axis], w.pick("features", [1, 2, 3, 5, x.shape[axis]]))
    moved = f"jnp.tensordot({x}, {weight}, ({axis}, 0))"
    return moved if w.pick("last", [True, False]) else f"jnp.moveaxis({moved}, -1, {axis})"


@operator(weight=0.5)
def dense_general(w: Writer, x: Value) -> str:
    fit(x.rank >= 3)
    weight = w.parameter(*x.shape[-2:], w.pick("features", [1, 2, 3, 5]))
    return f"jnp.tensordot({x}, {weight}, 2)"


@operator(weight=1.5)
def flatten_dense(w: Writer, x: Value) -> str:
    fit(x.rank >= 3)
    rest = math.prod(x.shape[1:])
    weight = w.parameter(rest, w.pick("features", [1, 2, 3, 5, 7]))
    return f"{x}.reshape({x.shape[0]}, {rest}) @ {weight}"


@operator()
def vmapped_dense(w: Writer, x: Value) -> str:
    fit(x.rank == 2)
    weight = w.parameter(w.pick("features", [1, 2, 3, 5]), x.shape[-1])
    return f"jax.vmap(lambda row: jnp.tanh({weight} @ row) + 0.1)({x})"


@operator(weight=0.7)
def gram(w: Writer, x: Value) -> str:
    fit(x.rank >= 2)
    return f"0.2 * ({x} @ jnp.swapaxes({x}, -1, -2))"


@operator(arity=2, weight=0.7)
def matmul(w: Writer, a: Value, b: Value) -> str:
    fit(a.rank >= 2 and a.rank == b.rank)
    if a.shape[:-2] == b.shape[:-2] and a.shape[-1] == b.shape[-2]:
        return f"{a} @ {b}"
    fit(a.shape[:-2] == b.shape[:-2] and a.shape[-1] == b.shape[-1])
    return f"{a} @ jnp.swapaxes({b}, -1, -2)"


@operator()
def attention(w: Writer, x: Value) -> str:
    fit(x.rank >= 3)
    width = w.pick("width", [1, 2, 3, 5])
    q, k = (w.parameter(x.shape[-1], width, key=key) for key in ("q", "k"))
    scores = f"({x} @ {q}) @ jnp.swapaxes({x} @ {k}, -1, -2)"
    if w.pick("masked", [False, True]):
        n = x.shape[-2]
        scores = f"jnp.where(np.tri({n}, dtype=bool), {scores}, -1e9)"
    return f"jax.nn.softmax({scores}, axis=-1) @ {x}"


@operator(weight=0.7)
def attention_heads(w: Writer, x: Value) -> str:
    fit(x.rank == 3)
    heads, width = w.pick("heads", [1, 2, 3]), w.pick("width", [1, 2, 3])
    q, k, v = (w.parameter(x.shape[-1], heads, width, key=key) for key in "qkv")
    out = w.parameter(heads, width, x.shape[-1], key="o")
    q, k, v = (f"jnp.einsum('nlc,chd->nlhd', {x}, {m})" for m in (q, k, v))
    mixed = f"jax.nn.dot_product_attention({q}, {k}, {v})"
    return f"jnp.einsum('nlhd,hdc->nlc', {mixed}, {out})"


# --- norms and reductions ----------------------------------------------------------------------


def _normalised(x: str, axes: Any) -> str:
    given = f"{axes}, keepdims=True"
    return (
        f"(lambda t: (t - t.mean({given})) * lax.rsqrt(((t - t.mean({given})) ** 2)"
        f".mean({given}) + 1e-2))({x})"
    )


@operator(weight=1.5)
def batch_norm(w: Writer, x: Value) -> str:
    fit(x.rank >= 2)
    text = _normalised(str(x), tuple(range(x.rank - 1)))
    return f"{text} * {w.parameter(x.shape[-1], key='g')} + {w.parameter(x.shape[-1], key='b')}"


@operator(weight=0.7)
def batch_norm_by_squares(w: Writer, x: Value) -> str:
    fit(x.rank >= 2)
    axes = tuple(range(x.rank - 1))
    scale = w.parameter(x.shape[-1], key="g")
    return (
        f"(lambda t, m: (t - m) * lax.rsqrt(jnp.maximum((t * t).mean({axes}) - m * m, 0.0) + 1e-2)"
        f" * {scale})({x}, {x}.mean({axes}))"
    )


@operator()
def layer_norm(w: Writer, x: Value) -> str:
    fit(x.rank >= 2)
    axes = w.pick("axes", [(-1,), tuple(range(1, x.rank))])
    return f"{_normalised(str(x), axes)} * {w.parameter(x.shape[-1], key='g')}"


@operator()
def group_norm(w: Writer, x: Value) -> str:
    fit(x.rank >= 3)
    channels = x.shape[-1]
    groups = w.pick("groups", [n for n in range(1, channels + 1) if channels % n == 0])
    split = (*x.shape[:-1], groups, channels // groups)
    axes = (*range(1, x.rank - 1), x.rank)
    return f"{_normalised(f'{x}.reshape{split}', axes)}.reshape{x.shape}"


@operator(weight=0.7)
def instance_norm(w: Writer, x: Value) -> str:
    fit(x.rank >= 3)
    return _normalised(str(x), tuple(range(1, x.rank - 1)))


@operator()
def softmax(w: Writer, x: Value) -> str:
    name = w.pick("function", ["softmax", "log_softmax"])
    return f"jax.nn.{name}({x}, axis={w.axis(x)})"


@operator(weight=1.5)
def reduce(w: Writer, x: Value) -> str:
    name = w.pick("function", ["mean", "sum", "max", "min", "var", "prod"], (4, 2, 2, 1, 1, 1))
    count = w.pick("count", [n for n in (1, 2, 3) if n <= x.rank])
    axes = tuple(sorted({w.axis(x, f"axis{i}") for i in range(count)}))
    keep = w.pick("keepdims", [False, True])
    operand = f"(0.3 * {x} + 1.0)" if name == "prod" else str(x)
    return f"jnp.{name}({operand}, axis={axes}, keepdims={keep})"


@operator(weight=0.7)
def logsumexp(w: Writer, x: Value) -> str:
    return f"jax.nn.logsumexp({x}, axis={w.axis(x)}, keepdims={w.pick('keep', [True, False])})"


@operator(weight=0.7)
def unit_length(w: Writer, x: Value) -> str:
    axis = w.axis(x)
    return f"{x} * lax.rsqrt(jnp.sum({x} * {x}, axis={axis}, keepdims=True) + 1e-2)"


@operator(weight=0.7)
def squeeze_and_excite(w: Writer, x: Value) -> str:
    fit(x.rank >= 3)
    axes = tuple(range(1, x.rank - 1))
    weight = w.parameter(x.shape[-1], x.shape[-1])
    return f"{x} * jax.nn.sigmoid({x}.mean({axes}, keepdims=True) @ {weight})"


# --- elementwise -------------------------------------------------------------------------------

UNARY = """
jax.nn.relu(@) jnp.tanh(@) jax.nn.sigmoid(@) jax.nn.silu(@) jax.nn.softplus(@) jax.nn.elu(@)
jax.nn.gelu(@,approximate=False) jax.nn.gelu(@,approximate=True) jax.nn.leaky_relu(@) jnp.abs(@)
jnp.square(@) jnp.sin(@) jnp.cos(@) jnp.exp(-@*@) jnp.log1p(@*@) jnp.sqrt(1+@*@) lax.rsqrt(1+@*@)
1/(1+@*@) 0.1*@**3 lax.erf(@) jnp.clip(@,-1,1) jnp.maximum(@,0.1) jnp.where(@>0,@,0.1*@)
jnp.where(@>0,0.5,@) jax.nn.hard_swish(@) jnp.arctan(@) jnp.expm1(-jnp.abs(@)) jnp.cbrt(1+@*@)
jnp.log2(2+@*@) jnp.exp2(-@*@) jnp.sign(@)*jnp.sqrt(jnp.abs(@)+1) -@ 2*@-1 jnp.nan_to_num(@)
jnp.power(1+@*@,0.3) lax.logistic(@) jax.nn.relu6(@) jax.nn.glu(jnp.stack([@,@],-1))[...,0]
jnp.arcsinh(@) jnp.sinc(@) jnp.floor(@)+@ jnp.real(lax.complex(@,2*@)*1j)
""".split()


@operator(weight=4)
def unary(w: Writer, x: Value) -> str:
    return w.pick("function", UNARY).replace("@", str(x)).replace(",", ", ")


@operator(weight=2)
def bias(w: Writer, x: Value) -> str:
    fit(x.rank >= 1)
    return f"{x} + {w.parameter(x.shape[-1], key='b')}"


@operator()
def scale(w: Writer, x: Value) -> str:
    """By a parameter that is broadcast along some dimensions."""
    shape = tuple(n if w.pick(f"kept{d}", [False, True]) else 1 for d, n in enumerate(x.shape))
    form = w.pick(
        "form", ["{x} * {p}", "{x} + {p}", "jnp.tanh({x} * {p})", "jnp.maximum({x}, {p})"]
    )
    return form.format(x=x, p=w.parameter(*shape, key="g"))


@operator()
def scalar_parameter(w: Writer, x: Value) -> str:
    shape = w.pick("shape", [(), (1,)])
    form = w.pick(
        "form", ["{p} * {x}", "{x} - {p}", "jnp.exp(-{p} * {p}) * {x}", "{x} * {p}.sum()"]
    )
    return form.format(x=x, p=w.parameter(*shape, key="s"))


@operator(weight=0.7)
def snake(w: Writer, x: Value) -> str:
    fit(x.rank >= 2)
    alpha = w.parameter(x.shape[-1], key="a")
    shape = (1,) * (x.rank - 1) + x.shape[-1:]
    return f"(lambda t, a: t + jnp.sin(a * t) ** 2 / (a * a + 0.1))({x}, {alpha}.reshape{shape})"


BINARY = """{a} + {b}|{a} - {b}|{a} * {b}|jnp.maximum({a}, {b})|jnp.minimum({a}, {b})
{a} / (1 + {b} * {b})|jnp.where({a} > {b}, {a}, 0.5 * {b})|jnp.logaddexp({a}, {b})
jnp.arctan2({a}, 1 + {b} * {b})|jnp.sqrt({a} * {a} + {b} * {b} + 0.1)|{a} * jax.nn.sigmoid({b})"""
BINARY_FORMS = BINARY.replace("\n", "|").split("|")


def _broadcasts(a: Shape, b: Shape) -> bool:
    if len(b) > len(a):
        return False
    return all(m in (1, n) for n, m in zip(a[len(a) - len(b) :], b, strict=True))


@operator(arity=2, weight=4)
def binary(w: Writer, a: Value, b: Value) -> str:
    fit(_broadcasts(a.shape, b.shape))
    weights = (6, *(1,) * (len(BINARY_FORMS) - 1))
    return w.pick("form", BINARY_FORMS, weights).format(a=a, b=b)


@operator(arity=2, weight=2)
def residual(w: Writer, a: Value, b: Value) -> str:
    fit(a.shape == b.shape and a.name != b.name)
    return f"{a} + {b}"


@operator(arity=2, weight=0.5)
def select(w: Writer, a: Value, b: Value) -> str:
    fit(a.shape == b.shape)
    return f"lax.select({a} > 0, {a}, {b})"


@operator(weight=0.7)
def less_its_mean(w: Writer, x: Value) -> str:
    return f"{x} - {x}.mean({w.axis(x)}, keepdims=True)"


@operator(weight=0.7)
def dropout(w: Writer, x: Value) -> str:
    key = w.pick("key", ["constant", "argument"])
    key = str(w.number) if key == "constant" else w.integers(below=100)
    key = f"jax.random.key({key})"
    return f"jnp.where(jax.random.bernoulli({key}, 0.7, {x.shape}), {x} / 0.7, 0.0)"


@operator(weight=0.5)
def noise(w: Writer, x: Value) -> str:
    return f"{x} + 0.1 * jax.random.normal(jax.random.key({w.number}), {x.shape}, {x}.dtype)"


@operator(weight=0.7)
def positions(w: Writer, x: Value) -> str:
    """An encoding of positions, which depends on no argument."""
    axis = w.axis(x)
    shape = tuple(n if d == axis else 1 for d, n in enumerate(x.shape))
    return f"{x} + 0.3 * jnp.sin(jnp.arange({x.shape[axis]}, dtype={x}.dtype)).reshape{shape}"


@operator(weight=0.7)
def cast(w: Writer, x: Value) -> str:
    form = w.pick(
        "form",
        [
            "{x} * ({x} > 0).astype({x}.dtype)",
            "{x} + jnp.round({x}).astype(jnp.int32)",
            "jnp.where(({x} > 0) & ({x} < 1), {x}, -{x})",
            "{x} + jnp.round({x}).astype(jnp.int8).astype({x}.dtype)",
            "{x}.astype(jnp.float32).astype({x}.dtype)",
        ],
    )
    return form.format(x=x)


@operator(weight=0.7)
def stop_gradient(w: Writer, x: Value) -> str:
    form = w.pick(
        "form",
        ["{x} * lax.stop_gradient({x})", "{x} + lax.stop_gradient(jnp.round({x}) - {x})"],
    )
    return form.format(x=x)


# --- joins -------------------------------------------------------------------------------------


@operator(arity=2, weight=2)
def concatenate(w: Writer, a: Value, b: Value) -> str:
    fit(a.rank == b.rank and a.rank > 0)
    apart = [d for d in range(a.rank) if a.shape[d] != b.shape[d]]
    fit(len(apart) <= 1)
    axis = apart[0] if apart else w.axis(a)
    return f"jnp.concatenate([{a}, {b}], {axis})"


@operator(arity=2)
def stack(w: Writer, a: Value, b: Value) -> str:
    fit(a.shape == b.shape and a.rank < 5)
    return f"jnp.stack([{a}, {b}], {w.pick('axis', range(a.rank + 1))})"


@operator()
def split(w: Writer, x: Value) -> str:
    axis = w.axis(x, least=2)
    cut = w.pick("cut", range(1, x.shape[axis]))
    form = w.pick("form", ["{s}[0]", "{s}[1]", "(lambda p: p[0].sum() * 0.1 + p[1])({s})"])
    return form.format(s=f"jnp.split({x}, [{cut}], {axis})")


@operator(weight=0.5)
def unstack(w: Writer, x: Value) -> str:
    fit(x.rank >= 2)
    axis = w.axis(x)
    return f"sum(jnp.sin(part) for part in jnp.unstack({x}, axis={axis}))"


@operator(weight=0.7)
def tile(w: Writer, x: Value) -> str:
    axis = w.axis(x)
    repeats = tuple(w.pick("times", (2, 3)) if d == axis else 1 for d in range(x.rank))
    return f"jnp.tile({x}, {repeats})"


@operator(weight=0.7)
def repeat(w: Writer, x: Value) -> str:
    return f"jnp.repeat({x}, {w.pick('times', (2, 3))}, axis={w.axis(x)})"


@operator(weight=0.7)
def broadcast(w: Writer, x: Value) -> str:
    axis, count = w.pick("axis", range(x.rank + 1)), w.pick("count", (2, 3))
    fit(x.rank < 5)
    shape = (*x.shape[:axis], count, *x.shape[axis:])
    return f"jnp.broadcast_to(jnp.expand_dims({x}, {axis}), {shape})"


# --- shapes ------------------------------------------------------------------------------------


@operator(weight=1.5)
def merge(w: Writer, x: Value) -> str:
    fit(x.rank >= 2)
    first = w.pick("first", range(x.rank - 1))
    last = w.pick("last", range(first + 1, x.rank))
    merged = math.prod(x.shape[first : last + 1])
    return f"{x}.reshape{(*x.shape[:first], merged, *x.shape[last + 1 :])}"


@operator()
def split_dimension(w: Writer, x: Value) -> str:
    axis = w.axis(x, least=2)
    size = x.shape[axis]
    fit(x.rank < 5)
    part = w.pick("part", [n for n in range(1, size + 1) if size % n == 0])
    return f"{x}.reshape{(*x.shape[:axis], part, size // part, *x.shape[axis + 1 :])}"


@operator()
def mix_dimensions(w: Writer, x: Value) -> str:
    """A reshape that moves elements between two neighbouring dimensions."""
    fit(x.rank >= 2)
    first = w.pick("first", range(x.rank - 1))
    both = x.shape[first] * x.shape[first + 1]
    rows = w.pick("rows", [n for n in range(1, both + 1) if both % n == 0])
    return f"{x}.reshape{(*x.shape[:first], rows, both // rows, *x.shape[first + 2 :])}"


@operator()
def transpose(w: Writer, x: Value) -> str:
    fit(x.rank >= 2)
    a = w.pick("a", range(x.rank))
    b = w.pick("b", [d for d in range(x.rank) if d != a])
    return f"jnp.swapaxes({x}, {a}, {b})"


@operator()
def expand_dims(w: Writer, x: Value) -> str:
    fit(x.rank < 5)
    return f"jnp.expand_dims({x}, {w.pick('axis', range(x.rank + 1))})"


@operator()
def squeeze(w: Writer, x: Value) -> str:
    ones = [d for d, n in enumerate(x.shape) if n == 1]
    fit(x.rank >= 2)
    return f"jnp.squeeze({x}, {w.pick('axis', ones)})"


@operator(weight=0.7)
def depth_to_space(w: Writer, x: Value) -> str:
    fit(x.rank == 4)
    n, height, width, c = x.shape
    factors = [(a, b) for a, b in ((2, 1), (1, 2), (2, 2)) if c % (a * b) == 0]
    a, b = w.pick("factors", factors)
    left = c // (a * b)
    return (
        f"{x}.reshape({n}, {height}, {width}, {a}, {b}, {left}).transpose(0, 1, 3, 2, 4, 5)"
        f".reshape({n}, {a * height}, {b * width}, {left})"
    )


@operator(weight=0.7)
def windows(w: Writer, x: Value) -> str:
    """Space cut into windows, which become samples."""
    fit(x.rank == 4 and x.shape[1] % 2 == 0 and x.shape[2] % 2 == 0)
    n, height, width, c = x.shape
    return (
        f"{x}.reshape({n}, {height // 2}, 2, {width // 2}, 2, {c}).transpose(0, 1, 3, 2, 4, 5)"
        f".reshape({n * height * width // 4}, 4, {c})"
    )


@operator(weight=0.7)
def shuffle_channels(w: Writer, x: Value) -> str:
    channels = x.shape[-1] if x.rank else 1
    groups = w.pick("groups", [n for n in range(2, channels) if channels % n == 0])
    split = (*x.shape[:-1], groups, channels // groups)
    return f"jnp.swapaxes({x}.reshape{split}, -1, -2).reshape{x.shape}"


# --- slices and updates ------------------------------------------------------------------------


def _cut(x: Value, axis: int, text: str) -> str:
    """Index that cuts one dimension."""
    return ", ".join([":"] * axis + [text])


@operator(weight=1.5)
def slice_of(w: Writer, x: Value) -> str:
    axis = w.axis(x, least=2)
    text = w.pick("cut", ["1:", ":-1", "::2", "1::2", "::3", "::-1", "1:-1", "-1:"])
    return f"{x}[{_cut(x, axis, text)}]"


@operator()
def element_of(w: Writer, x: Value) -> str:
    axis = w.axis(x)
    fit(x.rank >= 2)
    return f"{x}[{_cut(x, axis, str(w.pick('index', [0, -1, x.shape[axis] // 2])))}]"


@operator()
def difference(w: Writer, x: Value) -> str:
    axis = w.axis(x, least=2)
    return f"{x}[{_cut(x, axis, '1:')}] - {x}[{_cut(x, axis, ':-1')}]"


@operator()
def dynamic_slice(w: Writer, x: Value) -> str:
    axis = w.axis(x, least=2)
    size = w.pick("size", range(1, x.shape[axis]))
    start = w.pick("start", ["1", "number", "far"])
    if start == "number":
        start = w.integers(below=x.shape[axis])
    start = str(x.shape[axis]) if start == "far" else start
    return f"lax.dynamic_slice_in_dim({x}, {start}, {size}, {axis})"


@operator()
def dynamic_update(w: Writer, x: Value) -> str:
    axis = w.axis(x, least=2)
    size = w.pick("size", range(1, x.shape[axis]))
    shape = tuple(size if d == axis else n for d, n in enumerate(x.shape))
    start = w.pick("start", ["1", "number", "far"])
    if start == "number":
        start = w.integers(below=x.shape[axis])
    start = str(x.shape[axis]) if start == "far" else start
    part = w.pick("part", ["own", "parameter"])
    update = f"2 * {x}[{_cut(x, axis, f':{size}')}]" if part == "own" else w.parameter(*shape)
    return f"lax.dynamic_update_slice_in_dim({x}, {update}, {start}, {axis})"


@operator()
def update_at(w: Writer, x: Value) -> str:
    axis = w.axis(x, least=2)
    text = w.pick("cut", ["1:", ":-1", "0", "::2"])
    verb = w.pick("verb", ["add", "set", "multiply", "max"])
    index = _cut(x, axis, text)
    update = w.pick("update", ["1.5", f"2 * {x}[{index}]", f"jnp.sin({x}[{index}])"])
    return f"{x}.at[{index}].{verb}({update})"


@operator(weight=0.7)
def scatter_add(w: Writer, x: Value) -> str:
    index = w.integers(x.shape[0] if x.rank else 1, below=3)
    fit(x.rank >= 1)
    return f"jnp.zeros({(3, *x.shape[1:])}, {x}.dtype).at[{index}].add({x})"


@operator(weight=0.5)
def segment_sum(w: Writer, x: Value) -> str:
    fit(x.rank >= 1)
    return f"jax.ops.segment_sum({x}, {w.integers(x.shape[0], below=2)}, num_segments=2)"


# --- pads --------------------------------------------------------------------------------------


@operator(weight=1.5)
def pad(w: Writer, x: Value) -> str:
    axis = w.axis(x)
    low, high = w.pick("low", (0, 1, 2)), w.pick("high", (1, 0, 2))
    fit(low + high > 0)
    modes = ["constant", "edge", "wrap", "reflect", "symmetric"]
    mode = w.pick("mode", modes if max(low, high) < x.shape[axis] else modes[:2])
    widths = [(low, high) if d == axis else (0, 0) for d in range(x.rank)]
    return f"jnp.pad({x}, {widths}, mode={mode!r})"


@operator(weight=0.7)
def pad_all_space(w: Writer, x: Value) -> str:
    fit(x.rank >= 3 and min(x.space) >= 2)
    mode = w.pick("mode", ["wrap", "reflect", "edge"])
    widths = [(0, 0), *[(1, 1)] * len(x.space), (0, 0)]
    return f"jnp.pad({x}, {widths}, mode={mode!r})"


@operator(weight=0.7)
def pad_raw(w: Writer, x: Value) -> str:
    """Negative and interior padding."""
    axis = w.axis(x, least=2)
    low, high = w.pick("low", (0, 1, -1)), w.pick("high", (-1, 0, 1))
    inner = w.pick("inner", (0, 1, 2))
    config = [(low, high, inner) if d == axis else (0, 0, 0) for d in range(x.rank)]
    value = w.pick("value", ("0.0", "1.5"))
    return f"lax.pad({x}, jnp.asarray({value}, {x}.dtype), {config})"


@operator(weight=0.7)
def roll(w: Writer, x: Value) -> str:
    axis = w.axis(x, least=2)
    return f"jnp.roll({x}, {w.pick('shift', (1, -1, 2))}, {axis})"


@operator(weight=0.7)
def flip(w: Writer, x: Value) -> str:
    return f"jnp.flip({x}, {w.axis(x)})"


# --- gathers, sorts, scans along ---------------------------------------------------------------


@operator()
def take(w: Writer, x: Value) -> str:
    axis = w.axis(x)
    size = x.shape[axis]
    known = f"np.array({[(3 * n + 1) % size for n in range(min(size, 4))]})"
    index = w.pick("index", ["known", "argument"])
    index = known if index == "known" else w.integers(3, below=size)
    return f"jnp.take({x}, {index}, axis={axis})"


@operator(weight=0.7)
def take_along_axis(w: Writer, x: Value) -> str:
    axis = w.axis(x)
    form = w.pick("form", ["argmax", "argument"])
    index = f"jnp.argmax({x}, {axis}, keepdims=True)"
    if form == "argument":
        index = w.integers(
            *(2 if d == axis else n for d, n in enumerate(x.shape)), below=x.shape[axis]
        )
    return f"jnp.take_along_axis({x}, {index}, axis={axis})"


@operator(weight=0.7)
def embedding(w: Writer, x: Value) -> str:
    fit(x.rank >= 2)
    table = w.parameter(w.pick("rows", (3, 5, 7)), x.shape[-1], key="e")
    index = w.integers(*x.shape[:-1], below=3)
    return f"{x} + {table}[{index}]"


@operator(weight=0.7)
def one_hot(w: Writer, x: Value) -> str:
    fit(x.rank >= 2 and x.shape[-1] > 1)
    return f"{x} * jax.nn.one_hot(jnp.argmax({x}, -1), {x.shape[-1]}, dtype={x}.dtype)"


@operator()
def sort(w: Writer, x: Value) -> str:
    axis = w.axis(x)
    form = w.pick(
        "form",
        [
            "jnp.sort({x}, axis={axis})",
            "jnp.median({x}, axis={axis})",
            "jnp.take_along_axis({x}, jnp.argsort({x}, axis={axis}), axis={axis})",
        ],
    )
    return form.format(x=x, axis=axis)


@operator(weight=0.7)
def top_k(w: Writer, x: Value) -> str:
    fit(x.rank >= 1)
    return f"lax.top_k({x}, {w.pick('k', range(1, min(x.shape[-1], 3) + 1))})[0]"


@operator()
def cumulative(w: Writer, x: Value) -> str:
    names = ["cumsum", "cummax", "cumprod", "cumlogsumexp", "cummin"]
    name, axis = w.pick("function", names), w.axis(x)
    operand = f"(0.3 * {x} + 1)" if name == "cumprod" else str(x)
    back = w.pick("reverse", [False, True])
    return f"lax.{name}({operand}, axis={axis}, reverse={back})"


# --- resizing ----------------------------------------------------------------------------------


@operator(weight=1.5)
def resize(w: Writer, x: Value) -> str:
    fit(x.rank >= 3)
    methods = ["nearest", "linear", "cubic", "lanczos3"]
    method = w.pick("method", methods, (3, 3, 1, 1))
    sizes = tuple(
        w.pick(f"size{d}", [2 * n, n, n + 1, max(1, n // 2), 3, 5]) for d, n in enumerate(x.space)
    )
    shape = (x.shape[0], *sizes, x.shape[-1])
    return f"jax.image.resize({x}, {shape}, {method!r})"


# --- control flow, checkpoints, derivatives of their own -----------------------------------------


@operator()
def scan(w: Writer, x: Value) -> str:
    fit(x.rank >= 2)
    kind = w.pick("kind", ["mean", "all", "last"])
    weight = w.parameter(x.shape[-1], x.shape[-1])
    body = f"lambda h, t: (jnp.tanh(h @ {weight} + t), h * t)"
    axis = w.pick("axis", [1, 0]) if x.rank >= 3 else 0
    swapped = f"jnp.swapaxes({x}, 0, {axis})" if axis else str(x)
    fit(x.shape[axis] <= 5)
    shape = x.shape[1:] if not axis else (x.shape[0], *x.shape[2:])
    text = f"lax.scan({body}, jnp.zeros({shape}, {x}.dtype), {swapped})"
    return {"last": f"{text}[0]", "all": f"{text}[1]", "mean": f"{text}[1].mean(0)"}[kind]


@operator(weight=0.5)
def scan_layers(w: Writer, x: Value) -> str:
    """The same layer several times, its parameters stacked."""
    fit(x.rank >= 2)
    stacked = w.parameter(w.pick("layers", (2, 3)), x.shape[-1], x.shape[-1])
    return f"lax.scan(lambda h, m: (jnp.tanh(h @ m), None), {x}, {stacked})[0]"


@operator(weight=0.5)
def scan_slow(w: Writer, x: Value) -> str:
    """A loop too long to be unrolled."""
    fit(x.rank >= 1)
    steps = w.pick("steps", (70, 3))
    return f"lax.fori_loop(0, {steps}, lambda i, h: jnp.sin(h) + 0.01 * i, {x})"


@operator(weight=0.5)
def map_rows(w: Writer, x: Value) -> str:
    fit(x.rank >= 2)
    return f"lax.map(lambda row: jnp.sin(row) * row.sum(), {x})"


@operator(weight=0.5)
def conditional(w: Writer, x: Value) -> str:
    return f"lax.cond({x}.mean() > 0, jnp.sin, lambda t: 0.5 * t, {x})"


@operator(weight=0.5)
def while_loop(w: Writer, x: Value) -> str:
    inner = f"lax.while_loop(lambda t: jnp.abs(t).max() > 0.1, lambda t: 0.5 * t, {x})"
    return f"{x} + lax.stop_gradient({inner})"


@operator()
def checkpoint(w: Writer, x: Value) -> str:
    fit(x.rank >= 2)
    weight = w.parameter(x.shape[-1], x.shape[-1])
    known = ["", "dots_saveable", "everything_saveable", "nothing_saveable"]
    name = w.pick("policy", known)
    policy = f", policy=jax.checkpoint_policies.{name}" if name else ""
    return f"jax.checkpoint(lambda t, m: jnp.sin(jnp.sin(t @ m) @ m){policy})({x}, {weight})"


@operator()
def checkpoint_conv(w: Writer, x: Value) -> str:
    fit(1 <= len(x.space) <= 3)
    rank = len(x.space)
    weight = w.parameter(*(3,) * rank, x.shape[-1], x.shape[-1])
    data, filters = NUMBERS[rank]
    one = (
        f"lax.conv_general_dilated(t, m, {(1,) * rank}, 'SAME', "
        f"dimension_numbers={(data, filters, data)})"
    )
    return f"jax.checkpoint(lambda t, m: jnp.sin({one}))({x}, {weight})"


@operator(weight=0.5)
def nested_jit(w: Writer, x: Value) -> str:
    return f"jax.jit(lambda t: jnp.tanh(t) * t.sum({w.axis(x)}, keepdims=True))({x})"


@operator()
def clipped_gradient(w: Writer, x: Value) -> str:
    return f"clip_gradient({x})"


@operator()
def clipped_parameter(w: Writer, x: Value) -> str:
    fit(x.rank >= 2)
    weight = w.parameter(x.shape[-1], w.pick("features", [1, 2, 3, x.shape[-1]]))
    return f"{x} @ clip_gradient({weight})"


@operator(weight=0.5)
def normalized_gradient(w: Writer, x: Value) -> str:
    return f"normalize_gradient({x})"


@operator(weight=0.7)
def scaled_gradient(w: Writer, x: Value) -> str:
    return f"scale_gradient({x})"


@operator(weight=0.7)
def swish_with_slope(w: Writer, x: Value) -> str:
    return f"own_swish({x}, {w.parameter(*w.pick('shape', [(), (1,)]), key='s')})"


@operator(weight=0.7)
def softplus_of_own(w: Writer, x: Value) -> str:
    return f"own_softplus({x})"


# --- without a rule ----------------------------------------------------------------------------


@operator(weight=0.5)
def fourier(w: Writer, x: Value) -> str:
    return f"jnp.fft.fft({x}, axis={w.axis(x)}).real"


@operator(weight=0.3)
def inverse(w: Writer, x: Value) -> str:
    fit(x.rank >= 2)
    n = x.shape[-1]
    matrix = f"(0.1 * jnp.swapaxes({x}, -1, -2) @ {x} + jnp.eye({n}, dtype={x}.dtype))"
    return f"jnp.linalg.inv({matrix})"


@operator(weight=0.3)
def bessel(w: Writer, x: Value) -> str:
    return f"jax.scipy.special.i0e({x})"


@operator(weight=0.3)
def correlation(w: Writer, x: Value) -> str:
    fit(x.rank == 1 and x.shape[0] >= 2)
    return f"jnp.convolve({x}, np.array([1.0, -2.0, 0.5]), mode='same')"


# --- losses and outputs ------------------------------------------------------------------------

LOSSES = {
    "square": "jnp.mean({v} ** 2)",
    "weighted": "jnp.sum({v} * {c})",
    "waves": "jnp.sum({v} * jnp.cos(jnp.arange({size}.0)).reshape({shape}))",
    "sum": "0.1 * jnp.sum({v})",
    "logsumexp": "jax.nn.logsumexp({v})",
    "labels": "-jnp.mean(jnp.take_along_axis(jax.nn.log_softmax({v}), {i}[..., None], -1))",
    "own": "own_loss({v})",
}
"""Terms of the loss; "c" is an argument like the value, "i" one of labels."""

OUTPUTS = {
    "value": "{v}",
    "mask": "{v} > 0",
    "double": "2 * {v} + 1",
    "sum": "jnp.sum({v})",
    "turned": "jnp.moveaxis({v}, 0, -1)",
    "argmax": "jnp.argmax({v}, -1)",
}
"""What a program returns besides its loss."""
