"""Models of one sample under `jax.vmap`, as Equinox has them: which dimension is the sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxlwp
from jaxlwp.check._verify import check_layers
from jaxlwp.graph._trace import trace
from jaxlwp.space._baselines import PARAMETER_KINDS
from tests.contracts.harness import TOLERANCE, compare, drawn

RATES = jaxlwp.Rates(
    flops_per_s=1e10, memory_bytes_per_s=1e9, latency_s=(1e-5,), link_bytes_per_s=(1e9,)
)
BATCH = 16
CLASSES = 10  # which 8 devices do not divide
Model = Callable[[Any, Any], Any]
Shapes = dict[str, tuple[int, ...]]


def mlp(p: Any, x: Any) -> Any:
    hidden = jax.nn.relu(p["w1"] @ x + p["b1"])
    hidden = jnp.tanh(p["w2"] @ hidden + p["b2"])
    return p["w3"] @ hidden + p["b3"]


def mlp_weight_right(p: Any, x: Any) -> Any:
    hidden = jnp.tanh(x @ p["w1"].T + p["b1"]) @ p["w2"].T
    return (hidden + p["b2"]) @ p["w3"].T + p["b3"]


def mlp_prepared(p: Any, x: Any) -> Any:
    """Weights that are made of parameters: a cast, a norm, a known factor."""
    scaled = p["w1"] / jnp.linalg.norm(p["w1"], axis=1, keepdims=True)
    hidden = jnp.tanh(scaled @ x + p["b1"])
    hidden = (p["w2"].astype(jnp.bfloat16) @ hidden.astype(jnp.bfloat16)).astype(jnp.float32)
    return jnp.asarray(MIXING) @ (p["w3"] @ (hidden + p["b2"]) + p["b3"])


def tokens(p: Any, x: Any) -> Any:
    """A linear layer for each token, mixed by attention, and one for all of them."""
    wave = x.reshape(6, -1)
    hidden = jax.vmap(lambda token: p["w1"] @ token + p["b1"])(wave)
    score = jax.nn.softmax(hidden @ hidden.T)
    hidden = jnp.einsum("oi,ti->ot", p["w2"], score @ hidden)
    return p["w3"] @ (hidden.mean(1) + p["b2"]) + p["b3"]


def heads(p: Any, x: Any) -> Any:
    """A weight for each head: a batch dimension of the contraction, in front of the sample."""
    hidden = jnp.tanh(jnp.einsum("hoi,i->ho", p["w1"], x))
    hidden = jnp.tanh(jnp.einsum("hoi,hi->oh", p["w2"], hidden))
    return jnp.einsum("coh,oh->c", p["w3"], hidden) + p["b3"]


def conv(x: Any, kernel: Any, bias: Any) -> Any:
    return lax.conv(x[None], kernel, (1, 1), "SAME")[0] + bias[:, None, None]


def conv_net(p: Any, x: Any) -> Any:
    x = jax.nn.relu(conv(x, p["k1"], p["b1"]))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2), (1, 2, 2), "VALID")
    x = conv(x, p["k2"], p["b2"])
    x = jax.nn.relu(x / jnp.sqrt((x**2).mean() + 1e-5) * p["scale"][:, None, None])
    return p["w3"] @ x.reshape(-1) + p["b3"]


MIXING = np.random.default_rng(0).normal(size=(CLASSES, CLASSES)).astype(np.float32)
DENSE: Shapes = {
    "w1": (24, 12),
    "b1": (24,),
    "w2": (32, 24),
    "b2": (32,),
    "w3": (CLASSES, 32),
    "b3": (CLASSES,),
}
MODELS: dict[str, tuple[Model, Shapes, tuple[int, ...]]] = {
    "mlp": (mlp, DENSE, (12,)),
    "mlp weight right": (mlp_weight_right, DENSE, (12,)),
    "mlp prepared": (mlp_prepared, DENSE, (12,)),
    "tokens": (tokens, DENSE, (72,)),
    "heads": (
        heads,
        {"w1": (4, 8, 12), "w2": (4, 6, 8), "w3": (CLASSES, 6, 4), "b3": (CLASSES,)},
        (12,),
    ),
    "conv": (
        conv_net,
        {
            "k1": (8, 3, 3, 3),
            "b1": (8,),
            "k2": (16, 8, 3, 3),
            "b2": (16,),
            "scale": (16,),
            "w3": (CLASSES, 16 * 5 * 4),
            "b3": (CLASSES,),
        },
        (3, 10, 8),
    ),
}


def loss_of(model: Model) -> Any:
    """The mean loss of a batch, and the logits."""

    def loss(params: Any, images: Any, labels: Any) -> tuple[Any, Any]:
        logits = jax.vmap(model, (None, 0))(params, images)
        picked = jax.vmap(lambda y, n: -jax.nn.log_softmax(y)[n])(logits, labels)
        return picked.mean(), logits

    return loss


def arguments_of(name: str) -> tuple[Any, Any, Any]:
    _, shapes, shape = MODELS[name]
    rng = np.random.default_rng(1)
    params = {k: jnp.asarray(rng.normal(size=s) / 3, jnp.float32) for k, s in shapes.items()}
    images = jnp.asarray(rng.normal(size=(BATCH, *shape)), jnp.float32)
    return params, images, jnp.asarray(rng.integers(0, CLASSES, BATCH))


@pytest.mark.parametrize("name", MODELS)
def test_the_batch_is_the_sample(name: str) -> None:
    """And it alone; the rows of a weight are channels."""
    params, images, labels = arguments_of(name)
    graph = trace(loss_of(MODELS[name][0]), params, images, labels)
    sizes = [layer.dimensions.get("sample") for layer in graph.layers]
    assert set(sizes) <= {None, (BATCH,)}
    for layer in graph.layers:
        reads = {use.value for use in layer.uses if use.argument}
        weights = [i for i in graph.program.inputs[: graph.num_parameters] if i in reads]
        if layer.kind not in PARAMETER_KINDS or not weights:
            continue
        assert layer.dimensions["sample"] == (BATCH,), layer
        rows = {n for k in params if graph_name(graph, weights, k) for n in params[k].shape[:2]}
        assert set(layer.dimensions["channel"]) & rows, layer
        if layer.kind == "conv":
            assert {"height", "width"} <= layer.dimensions.keys()


def graph_name(graph: jaxlwp.graph.ComputationGraph, values: list[int], name: str) -> bool:
    """Whether one of the values is the parameter of a name."""
    names = [graph.argument_names[graph.program.inputs.index(i)] for i in values]
    return f"params['{name}']" in names


@pytest.mark.parametrize("name", drawn(MODELS, 0.5))
def test_strategies(name: str) -> None:
    """Loss, logits and gradients as on one device; prices hold; baselines split what they say."""
    arguments = arguments_of(name)
    loss = loss_of(MODELS[name][0])
    expected = jax.value_and_grad(loss, has_aux=True)(*arguments)
    for strategy in ("search", *jaxlwp.BASELINES):
        plan = jaxlwp.parallelize(
            loss, *arguments, devices=8, strategy=strategy, rates=RATES, measure=False
        )
        step = jax.jit(jax.value_and_grad(plan, has_aux=True))
        tolerance = 1e-2 if name == "mlp prepared" else TOLERANCE  # it computes in bfloat16
        errors = compare(step(*arguments), expected)
        assert all(error <= tolerance for error in errors.values()), (strategy, errors)
        assert all(layer.agrees for layer in check_layers(plan)), strategy
        split = {
            layer.name: {dimension for dimension, _ in plan.strategy.configs[layer.name].splits}
            for layer in plan.graph.layers
            if layer.kind in PARAMETER_KINDS
        }
        if strategy == "data":
            assert all(dimensions == {"sample"} for dimensions in split.values())
        if strategy == "owt":
            kinds = {layer.name: layer.kind for layer in plan.graph.layers}
            assert all(
                dimensions == {"sample" if kinds[layer] == "conv" else "channel"}
                for layer, dimensions in split.items()
            )
        if strategy == "model":
            assert all(dimensions == {"channel"} for dimensions in split.values())


def batch_norm(params: Any, stats: Any, images: Any) -> Any:
    """Images are normalised; running statistics have a leading dimension as well."""
    mean, var = images.mean(0), images.var(0)
    x = (images - mean) * lax.rsqrt(var + 1e-5) + 0 * stats["mean"]
    y = jax.vmap(lambda row: params["w1"] @ row)(x)
    new = jax.tree.map(lambda old, now: 0.9 * old + 0.1 * now, stats, {"mean": mean, "var": var})
    return jnp.mean(y**2), new


def test_statistics_are_no_samples() -> None:
    stats = {"mean": jnp.zeros(12), "var": jnp.ones(12)}
    graph = trace(batch_norm, {"w1": jnp.ones((10, 12))}, stats, jnp.ones((BATCH, 12)))
    for layer in graph.layers:
        assert layer.dimensions.get("sample", (BATCH,)) == (BATCH,)
    dense = next(layer for layer in graph.layers if layer.kind == "dense")
    assert dense.dimensions == {"sample": (BATCH,), "channel": (10,), "reduction": (12,)}


def test_keys_are_no_samples() -> None:
    """A raw key for each call has a leading dimension of two; there is noise for each sample."""

    def loss(params: Any, key: Any, images: Any) -> Any:
        keys = jax.random.split(key, BATCH)
        noise = jax.vmap(lambda k: jax.random.normal(k, (12,)))(keys)
        return jnp.mean(jax.vmap(lambda x: params @ x)(images + noise) ** 2)

    graph = trace(loss, jnp.ones((10, 12)), jax.random.PRNGKey(0), jnp.ones((BATCH, 12)))
    dense = next(layer for layer in graph.layers if layer.kind == "dense")
    assert dense.dimensions == {"sample": (BATCH,), "channel": (10,), "reduction": (12,)}


def test_the_largest_argument_has_the_sample() -> None:
    """Of two arguments with leading dimensions that meet, images are the batch, not a mask."""

    def loss(params: Any, mask: Any, images: Any) -> Any:
        y = jax.vmap(lambda x: jax.vmap(lambda token: params @ token)(x) * mask[:, None])(images)
        return jnp.mean(y**2)

    graph = trace(loss, jnp.ones((10, 12)), jnp.ones(6), jnp.ones((BATCH, 6, 12)))
    dense = next(layer for layer in graph.layers if layer.kind == "dense")
    assert dense.dimensions == {
        "sample": (BATCH,), "length": (6,), "channel": (10,), "reduction": (12,),
    }  # fmt: skip


def test_two_views_are_one_batch() -> None:
    """A concatenation of batches, and of what is made of them, is a batch, whatever its place."""

    def loss(params: Any, images: Any) -> Any:
        both = jnp.concatenate([images, images[::-1]])
        wave = jax.vmap(lambda x: jnp.tanh(params["w1"] @ x + params["b1"]))(both)
        return jnp.mean(jax.vmap(lambda x: params["w2"] @ x)(wave) ** 2)

    params = {k: jnp.ones(v) for k, v in DENSE.items()}
    graph = trace(loss, params, jnp.ones((BATCH, 12)))
    dense = [layer for layer in graph.layers if layer.kind == "dense"]
    assert [layer.dimensions["sample"] for layer in dense] == [(2 * BATCH,)] * 2


def test_without_a_batch_names_go_by_position() -> None:
    graph = trace(
        lambda p: jnp.mean((p["x"] @ p["w"]) ** 2), {"x": jnp.ones((8, 4)), "w": jnp.ones((4, 6))}
    )
    assert graph.layers[0].dimensions == {"sample": (8,), "channel": (6,), "reduction": (4,)}
