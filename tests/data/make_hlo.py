"""Makes the HLO samples beside this file: real programs, compiled for GPUs that are not there.

    JAX_PLATFORMS=cpu .venv-gpu-aot/bin/python -m tests.data.make_hlo

What the forecast does not read is taken out of the text: most of `backend_config`, shardings, stack
frames, origins of what is inside fusions. Made with JAX 0.10.2.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxlwp
from jaxlwp.check import compile_for, target_mesh

NHWC = ("NHWC", "HWIO", "NHWC")
RATES = jaxlwp.Rates(flops_per_s=5e13, memory_bytes_per_s=4e12, link_bytes_per_s=(2e11,))
HERE = Path(__file__).parent


def abridged(text: str) -> str:
    """The text without what the forecast does not read."""
    header = re.search(r"^HloModule (\S+),.*$", text, re.MULTILINE)
    assert header is not None
    partitions = re.search(r"num_partitions=\d+", header.group(0))
    head = f"HloModule {header[1]}, is_scheduled=true"
    lines = [f"{head}, {partitions[0]}" if partitions else head]
    in_entry = False
    for line in text[header.end() :].splitlines():
        if not re.match(r"(\s+\S|%|ENTRY|\}|$)", line):
            continue  # tables of files and stack frames
        in_entry = in_entry or line.startswith("ENTRY")
        line = re.sub(r", backend_config=(.*)$", _kept, line)
        named = _named if in_entry else ""
        line = re.sub(r", metadata=\{(?:op_name=(\"[^\"]*\"))?[^}]*\}", named, line)
        line = re.sub(r", sharding=(\{.*?\}(?=,|$)|\{\{.*\}\})", "", line)
        line = re.sub(r", frontend_attributes=\{.*?\"\}", "", line)
        line = re.sub(r", control-predecessors=\{[^}]*\}", "", line)
        if line or lines[-1]:
            lines.append(line)
    return "\n".join(lines) + "\n"


def _kept(config: re.Match[str]) -> str:
    kept = re.findall(r'"(?:is_sync":\w+|known_trip_count":\{"n":"\d+"\})', config[1])
    return f", backend_config={{{','.join(kept)}}}" if kept else ""


def _named(metadata: re.Match[str]) -> str:
    return f", metadata={{op_name={metadata[1]}}}" if metadata[1] else ""


def shape(*dims: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """A float32 array by default."""
    return jax.ShapeDtypeStruct(dims, dtype)


def compiled(f: Callable[..., Any], target: str, *arguments: Any) -> str:
    """Compiled with everything on every device."""
    everywhere = NamedSharding(Mesh(target_mesh(target).devices.reshape(-1), ("d",)), P())
    jitted = jax.jit(f, in_shardings=everywhere, out_shardings=everywhere)
    return str(jitted.lower(*arguments).compile().as_text())


def two_layers() -> str:
    """Plain JAX: a convolution and a dense layer in bfloat16, the batch split over 8 GPUs."""

    def loss(params: Any, images: Any, labels: Any) -> Any:
        p = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
        x = images.astype(jnp.bfloat16)
        x = lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME", dimension_numbers=NHWC)
        x = jax.nn.relu(x + p["bias"]).mean((1, 2)) @ p["dense"]
        logs = jax.nn.log_softmax(x.astype(jnp.float32))
        return -jnp.take_along_axis(logs, labels[:, None], 1).mean()

    optimizer = optax.sgd(0.1, momentum=0.9)

    def step(state: Any, *batch: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(state[0], *batch)
        updates, slots = optimizer.update(gradients, state[1])
        return (optax.apply_updates(state[0], updates), slots), value

    params = {"conv": shape(3, 3, 32, 64), "bias": shape(64), "dense": shape(64, 128)}
    state = params, jax.eval_shape(optimizer.init, params)
    batch = shape(64, 32, 32, 32), shape(64, dtype=jnp.int32)
    mesh = Mesh(target_mesh("h200:8").devices.reshape(-1), ("d",))
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("d"))
    jitted = jax.jit(
        step, donate_argnums=0, in_shardings=(whole, split, split), out_shardings=whole
    )
    return str(jitted.lower(state, *batch).compile().as_text())


def spatial() -> str:
    """A plan of ours: two convolutions in bfloat16, split by height over 8 GPUs."""

    def loss(params: Any, x: Any) -> Any:
        for name in ("a", "b"):
            kernel = params[name].astype(jnp.bfloat16)
            x = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC)
            x = jax.nn.relu(x)
        return (x.astype(jnp.float32) ** 2).mean()

    params = {"a": shape(3, 3, 32, 32), "b": shape(3, 3, 32, 32)}
    arguments = params, shape(4, 64, 64, 32, dtype=jnp.bfloat16)
    plan = jaxlwp.parallelize(
        loss, *arguments, mesh=target_mesh("h200:8"), strategy="spatial", rates=RATES
    )
    return compile_for(plan, "h200:8").text


def flow() -> str:
    """Loops of known and unknown trip count, a conditional, library calls, slices."""

    def f(x: Any, w: Any, k: Any) -> Any:
        def body(c: Any, _: None) -> Any:
            return jnp.tanh(c @ w), c

        c, rows = lax.scan(body, x, None, length=6)
        c = lax.cond(k > 0, lambda c: jnp.sort(c, axis=1), lambda c: c * 2, c)
        c = lax.while_loop(lambda c: c.sum() < 100.0, lambda c: c + c.T @ c, c)
        exact = jnp.dot(c, w, precision="highest").sum()
        return rows.sum(0), c, jnp.abs(jnp.fft.rfft(c)).sum(), exact, x[k], rows[2:4, 5:20]

    return compiled(f, "h200:1", shape(256, 256), shape(256, 256), shape(dtype=jnp.int32))


def convolutions() -> str:
    """float32 on an A100: strided, dilated, grouped, transposed, depthwise, and gradients."""

    def f(p: Any, x: Any) -> Any:
        def conv(x: Any, kernel: Any, **options: Any) -> Any:
            options = {"window_strides": (1, 1), **options}
            return lax.conv_general_dilated(
                x, kernel, padding="SAME", dimension_numbers=NHWC, **options
            )

        x = conv(x, p["strided"], window_strides=(2, 2))
        x = conv(x, p["dilated"], rhs_dilation=(2, 2))
        x = conv(x, p["grouped"], feature_group_count=4)
        x = lax.conv_transpose(x, p["transposed"], (2, 2), "SAME", dimension_numbers=NHWC)
        return jnp.sum(conv(x, p["depthwise"], feature_group_count=64) ** 2)

    params = {
        "strided": shape(3, 3, 32, 64),
        "dilated": shape(3, 3, 64, 64),
        "grouped": shape(3, 3, 16, 64),
        "transposed": shape(2, 2, 64, 64),
        "depthwise": shape(3, 3, 1, 64),
    }
    return compiled(jax.grad(f, argnums=(0, 1)), "a100:1", params, shape(8, 32, 32, 32))


def main() -> None:
    """Write all samples."""
    for make in (two_layers, spatial, flow, convolutions):
        text = abridged(make())
        (HERE / f"{make.__name__}.hlo").write_text(text)
        print(make.__name__, len(text), "characters")


if __name__ == "__main__":
    main()
