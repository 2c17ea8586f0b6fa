"""The VAE decoder split by height, as it is written by hand with `jax.shard_map`.

Every convolution receives a row from the neighbours above and below, normalisations add up their
sums, attention gathers keys and values.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from models import VAEDecoder

AXIS = "height"


def decoder_by_height(model: VAEDecoder, mesh: Mesh) -> Any:
    """`decode(params, latents)`, its images split by height over the mesh's one axis.

    Args:
      model: the decoder; its blocks by their names in the parameters.
      mesh: one axis, `AXIS`, which divides the latents' height.
    """
    split = PartitionSpec(None, AXIS)
    return jax.shard_map(
        functools.partial(_decode, model, mesh.size),
        mesh=mesh,
        in_specs=(PartitionSpec(), split),
        out_specs=split,
    )


def _decode(model: VAEDecoder, parts: int, params: Any, x: jax.Array) -> jax.Array:
    norm = functools.partial(_norm, groups=model.groups)

    def block(name: str, x: jax.Array) -> jax.Array:
        p = params[name]
        y = _conv(p["conv1"], jax.nn.silu(norm(p["norm1"], x)), parts)
        y = _conv(p["conv2"], jax.nn.silu(norm(p["norm2"], y)), parts)
        return y + (_conv(p["shortcut"], x, parts) if "shortcut" in p else x)

    x = _conv(params["latents"], x.astype(model.dtype), parts)
    x = block("middle1", _conv(params["stem"], x, parts))
    x = x + _attention(params["attention"], norm(params["attention_norm"], x))
    x = block("middle2", x)
    for level in range(len(model.channels)):
        for i in range(1, model.blocks + 1):
            x = block(f"up{level}_{i}", x)
        if level < len(model.channels) - 1:
            x = _conv(params[f"up{level}_conv"], x.repeat(2, axis=1).repeat(2, axis=2), parts)
    return _conv(params["image"], jax.nn.silu(norm(params["norm"], x)), parts)


def _conv(p: Any, x: jax.Array, parts: int) -> jax.Array:
    kernel, bias = (p["conv"][name].astype(x.dtype) for name in ("kernel", "bias"))
    half = kernel.shape[0] // 2
    if half:  # neighbours that are not there send zeros
        above = lax.ppermute(x[:, -half:], AXIS, [(i, i + 1) for i in range(parts - 1)])
        below = lax.ppermute(x[:, :half], AXIS, [(i + 1, i) for i in range(parts - 1)])
        x = jnp.concatenate([above, x, below], axis=1)
    y = lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1, 1),
        padding=((0, 0), (half, half)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y + bias


def _norm(p: Any, x: jax.Array, groups: int) -> jax.Array:
    grouped = x.reshape(*x.shape[:3], groups, -1).astype(jnp.float32)
    sums = jnp.stack([grouped.mean((1, 2, 4)), (grouped**2).mean((1, 2, 4))])
    mean, square = lax.pmean(sums, AXIS)
    scale = lax.rsqrt(square - mean**2 + 1e-6)
    y = (grouped - mean[:, None, None, :, None]) * scale[:, None, None, :, None]
    return (y.reshape(x.shape) * p["scale"] + p["bias"]).astype(x.dtype)


def _attention(p: Any, x: jax.Array) -> jax.Array:
    def dense(name: str, tokens: jax.Array) -> jax.Array:
        return tokens @ p[name]["kernel"].astype(x.dtype) + p[name]["bias"].astype(x.dtype)

    tokens = x.reshape(x.shape[0], -1, x.shape[-1])
    key, value = (
        lax.all_gather(dense(name, tokens), AXIS, axis=1, tiled=True) for name in ("key", "value")
    )
    query = dense("query", tokens) / x.shape[-1] ** 0.5
    scores = jax.nn.softmax(jnp.einsum("nqc,nkc->nqk", query, key), axis=-1)
    return dense("out", jnp.einsum("nqk,nkc->nqc", scores, value)).reshape(x.shape)
