"""Workloads by name: `module:attribute` becomes a loss function, its parameters and a batch.

The attribute is a Flax Linen module (class or instance), a Flax NNX module (likewise), or a
function that returns (loss_fn, params, batch). Modules are trained as classifiers: softmax
cross-entropy of integer labels over the last dimension of the output, on random data.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxlwp.mesh import no_mesh

DEFAULT_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A training function and what it is called with, as `loss(params, *batch)`.

    Attributes:
      name: as the user gave it.
      loss: the loss function.
      params: pytree of parameters.
      batch: the other arguments, the data first.
    """

    name: str
    loss: Callable[..., Any] = field(repr=False)
    params: Any = field(repr=False)
    batch: tuple[Any, ...] = field(repr=False)


def load_workload(
    name: str,
    *,
    batch: int | None = None,
    input_shape: tuple[int, ...] | None = None,
    dtype: str | None = None,
    train: bool = True,
    abstract: bool = False,
) -> Workload:
    """Make the workload that a name stands for.

    Args:
      name: `module:attribute`, such as `models.alexnet:AlexNet`.
      batch: examples in the batch; 32 by default.
      input_shape: shape of one example; the module's `input_shape` by default.
      dtype: of a Flax module's computation, for one that takes it.
      train: False evaluates only: a module's outputs for a batch, or whatever a function returns.
      abstract: shapes and dtypes only: nothing is initialised.

    Returns:
      The workload.

    Raises:
      ValueError: the name does not import, or is neither a module nor such a function, or cannot
        be called on such a batch, or takes no dtype or not this one.
    """
    target = resolve(name)
    if dtype is not None:
        target = _of_dtype(name, target, dtype)
    if _is_a(target, nn.Module):
        return _from_module(name, _linen, target, batch, input_shape, train, abstract)
    if _is_a(target, nnx.Module):
        return _from_module(name, _nnx, target, batch, input_shape, train, abstract)
    if callable(target) and not isinstance(target, type):
        return _from_function(name, target, batch, input_shape)
    raise ValueError(
        f"MODEL: {name} is the {type(target).__name__} {target!r}; it must be a Flax module "
        "(flax.linen or flax.nnx), or a function that returns (loss_fn, params, batch): name one"
    )


def _of_dtype(name: str, target: Any, dtype: str) -> Any:
    """A Flax module that computes in a dtype."""
    try:
        wanted = jnp.dtype(dtype)
    except TypeError as error:
        raise ValueError(
            f"--dtype: {dtype!r} is none; give one such as bfloat16 or float32"
        ) from error
    if not jnp.issubdtype(wanted, jnp.floating):
        raise ValueError(f"--dtype: {dtype} is not floating-point; give one such as bfloat16")
    if isinstance(target, nn.Module) and hasattr(target, "dtype"):
        return target.clone(dtype=wanted)
    if isinstance(target, type) and issubclass(target, nn.Module) and _takes(target, "dtype"):
        return target(dtype=wanted)
    raise ValueError(
        f"MODEL: {name} takes no dtype, so --dtype has no effect; leave it out, or name a Flax "
        "Linen module with a field dtype"
    )


def _is_a(target: Any, base: type) -> bool:
    return isinstance(target, base) or (isinstance(target, type) and issubclass(target, base))


def resolve(name: str) -> Any:
    """The object that `module:attribute` names.

    Raises:
      ValueError: no such module or attribute, or the module fails on import.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ValueError(
            f"MODEL: {name!r} is not of the form module:attribute; write it as in "
            "models.alexnet:AlexNet"
        )
    remedy = "check the name, run from the folder that holds the module, or install it"
    with _blaming(name, f"module {module_name} does not import", remedy):
        module = importlib.import_module(module_name)
    try:
        return functools.reduce(getattr, attribute.split("."), module)
    except AttributeError as error:
        public = [n for n, v in vars(module).items() if isinstance(v, type) and n[0] != "_"]
        raise ValueError(
            f"MODEL: {name}: module {module_name} has no attribute {attribute!r}; name one that "
            f"it has (its classes: {', '.join(public) or 'none'})"
        ) from error


@contextlib.contextmanager
def _blaming(name: str, what: str, remedy: str) -> Iterator[None]:
    """Turns any error of the user's code into a ValueError of one line."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise ValueError(
            f"MODEL: {name}: {what} ({type(error).__name__}: {text}); {remedy}"
        ) from error


# --- Flax modules ----------------------------------------------------------------------------

Module = tuple[Any, Callable[..., Any], tuple[Any, ...], Any]
"""Parameters, `apply(params, images, *extra)`, the extra arguments, and the shapes of the logits
that it returns; None where they are not known."""


def _from_module(
    name: str,
    read: Callable[[Any, Any, bool, bool], Module],
    target: Any,
    batch: int | None,
    input_shape: tuple[int, ...] | None,
    train: bool,
    abstract: bool,
) -> Workload:
    shape = input_shape or _own_input_shape(name, target)
    images = jax.eval_shape(functools.partial(jnp.zeros, (batch or DEFAULT_BATCH, *shape)))
    blaming = functools.partial(
        _blaming, name, f"fails on input {list(images.shape)}", "check --input and the module"
    )
    with blaming():
        params, evaluate, extra, logits = read(target, images, train, abstract)

    @jax.jit  # what is traced here for shapes is not traced again inside the loss
    def apply(params: Any, x: jax.Array, *extra: Any) -> Any:
        with blaming():
            return evaluate(params, x, *extra)

    if logits is None:
        with no_mesh():  # as `trace` does
            logits = jax.eval_shape(apply, params, images, *extra)
    if not train:
        data = images if abstract else _random(images.shape)
        return Workload(name=name, loss=apply, params=params, batch=(data, *extra))

    def loss(params: Any, x: jax.Array, labels: jax.Array, *extra: Any) -> Any:
        logits = apply(params, x, *extra)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    scored = _scored(name, logits)
    labels = jax.ShapeDtypeStruct(scored.shape[:-1], jnp.int32)
    data = (images, labels) if abstract else _random_data(images.shape, scored.shape)
    return Workload(name=name, loss=loss, params=params, batch=(*data, *extra))


def _random_data(shape: tuple[int, ...], scored: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Images, and a label for each of an example's scores."""
    labels = np.random.default_rng(1).integers(scored[-1], size=scored[:-1], dtype=np.int32)
    return _random(shape), jnp.asarray(labels)


def _random(shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


def _own_input_shape(name: str, target: Any) -> tuple[int, ...]:
    shape = getattr(target, "input_shape", None)
    if not isinstance(shape, tuple):
        raise ValueError(
            f"MODEL: {name} has no input_shape, so the shape of one example is unknown; give it, "
            "as in --input 224x224x3"
        )
    return shape


def _values(make: Callable[[], Any], abstract: bool) -> Any:
    """What `make` returns: computed in one program, or its shapes and dtypes only."""
    return jax.eval_shape(make) if abstract else jax.jit(make)()


def _scored(name: str, logits: Any) -> Any:
    """The one array of scores: of examples, or of the places in them (segmentation)."""
    found = jax.tree.leaves(logits)
    if len(found) != 1 or found[0].ndim < 2:
        raise ValueError(
            f"MODEL: {name} returns arrays of shapes {[list(leaf.shape) for leaf in found]}; the "
            "built-in loss needs one array [batch, classes] or [batch, ..., classes]: name a "
            "function that returns (loss_fn, params, batch) instead"
        )
    return found[0]


def _takes(function: Callable[..., Any], argument: str) -> bool:
    return argument in inspect.signature(function).parameters


def _linen(target: Any, images: Any, train: bool, abstract: bool) -> Module:
    """Extra arguments: the dropout key, and collections that are not parameters."""
    module = target() if isinstance(target, type) else target
    option = {"train": train} if _takes(type(module).__call__, "train") else {}

    def init() -> Any:
        param_key, dropout_key = jax.random.split(jax.random.key(0))
        rngs = {"params": param_key, "dropout": dropout_key}
        # As shapes, a whole batch costs no more than one image, and its logits are known.
        count = images.shape[0] if abstract else 1
        zeros = jnp.zeros((count, *images.shape[1:]))
        return *module.init_with_output(rngs, zeros, **option), dropout_key

    def apply(params: Any, x: Any, key: Any, others: Any) -> Any:
        variables = {"params": params, **others}
        if not train:
            return module.apply(variables, x, **option)
        rngs = {"dropout": key}
        return module.apply(variables, x, rngs=rngs, mutable=list(others), **option)[0]

    logits, variables, key = _values(init, abstract)
    others = {name: values for name, values in variables.items() if name != "params"}
    known = logits if abstract else None
    return variables.get("params", {}), apply, (key, others), known


def _nnx(target: Any, images: Any, train: bool, abstract: bool) -> Module:
    """Extra argument: the state that is not parameters, such as random counts."""

    def init() -> Any:
        module = target if isinstance(target, nnx.Module) else _constructed(target, images)
        return nnx.split(module, nnx.Param, ...)

    graphdef, params, others = _values(init, abstract)

    def apply(params: Any, x: Any, others: Any) -> Any:
        module = nnx.merge(graphdef, params, others)
        if train:
            module.train()
        else:
            module.eval()
        option = {"train": train} if _takes(module.__call__, "train") else {}
        return module(x, **option)

    return params, apply, (others,), None


def _constructed(target: Any, images: Any) -> Any:
    """An NNX module of a class, made for the images if the class asks for their size."""
    option = {"image_size": images.shape[1]} if _takes(target.__init__, "image_size") else {}
    return target(rngs=nnx.Rngs(0), **option)


# --- functions -------------------------------------------------------------------------------


def _from_function(
    name: str,
    function: Callable[..., Any],
    batch: int | None,
    input_shape: tuple[int, ...] | None,
) -> Workload:
    """Call a function for (loss_fn, params, batch), with the arguments given that it takes."""
    given = {"batch": batch, "input_shape": input_shape}
    options = {key: value for key, value in given.items() if value is not None}
    for key in options:
        if not _takes(function, key):
            raise ValueError(
                f"MODEL: {name} takes no argument {key!r}, so --{key.removesuffix('_shape')} has "
                "no effect; leave it out, or let the function take it"
            )
    with _blaming(name, "the function fails", "it must return (loss_fn, params, batch)"):
        made = function(**options)
    if not isinstance(made, tuple) or len(made) != 3 or not callable(made[0]):
        raise ValueError(
            f"MODEL: {name} returned a {type(made).__name__}; it must return the triple (loss_fn, "
            "params, batch), where loss_fn(params, *batch) is the loss"
        )
    loss, params, data = made
    batch_arrays = data if isinstance(data, tuple) else (data,)
    with _blaming(name, "loss_fn(params, *batch) fails", "check the triple that it returns"):
        jax.eval_shape(lambda *arguments: loss(*arguments), params, *batch_arrays)
    return Workload(name=name, loss=loss, params=params, batch=batch_arrays)
