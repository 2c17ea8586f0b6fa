"""A case as a complete program: imports, arrays, mesh, pinned configs, comparison."""

from __future__ import annotations

import inspect

from . import programs
from .checks import Case
from .pool import DEVICES

_TEMPLATE = """\
from __future__ import annotations

import contextlib
import math
import os
import zlib

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=@DEVICES@"

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh

import jaxlwp
from jaxlwp.check._verify import check_layers

jax.config.update("jax_enable_x64", True)


@PROGRAM@

@ARRAYS@

def step(function):
    def call(*arguments):
        return function(*arguments)

    return @STEP@


def check(plan):
    for row in check_layers(plan):
        if not row.agrees:
            print(f"{row.name} [{row.config}]: priced {row.predicted}, program {row.program}")


def compare(plan):
    given = @GIVEN@
    for (path, right), *others in zip(
        jax.tree_util.tree_leaves_with_path(eager),
        *map(jax.tree.leaves, (jitted, jax.jit(step(plan))(*given))),
        strict=True,
    ):
        right = np.asarray(right, float)
        jit, ours = [np.max(np.abs(np.asarray(x, float) - right)) for x in others]
        name, size = jax.tree_util.keystr(path), np.max(np.abs(right))
        print(f"{name}: up to {size:.6g}; jit off by {jit:.2g}, plan off by {ours:.2g}")


arguments = example_arrays(
    @PARAMETERS@,
    @BATCH@,
    @SEED@,
    @WHOLE@,
)
with jax.disable_jit():
    eager = step(loss)(*jax.tree.map(jnp.asarray, arguments))
jitted = jax.jit(step(loss))(*arguments)
pins = {
@PINS@}
mesh = Mesh(
    np.array(jax.devices())[@ORDER@].reshape(@SHAPE@),
    @NAMES@,
    axis_types=(AxisType.@KIND@,) * @AXES@,
)
rates = jaxlwp.Rates(flops_per_s=1e10, memory_bytes_per_s=1e9)
out_tree = jax.tree.structure(jax.eval_shape(loss, *arguments))
with @ENTER@:
    graph = jaxlwp.trace(loss, *arguments@OPTIONS@)
    configs = [[jaxlwp.Config.of(pins[layer.name])] for layer in graph.layers]
    space = jaxlwp.price(graph, jaxlwp.device_graph(mesh, rates=rates), configs=configs)
    strategy = space.strategy("pinned", [0] * len(configs))
    plan = jaxlwp.bind(space, strategy, @BOUND@, arguments, out_tree)
@CALLS@
"""

TURNED = "Mesh(mesh.devices.T, mesh.axis_names[::-1], axis_types=mesh.axis_types)"


def paste(case: Case, strategy: str) -> str:
    """A complete program that shows a case under one of its strategies."""
    written, mesh = case.written, case.mesh
    evaluated = written.program.evaluated
    splits = case.strategies.get(strategy, {})
    bound = TURNED if mesh.turned else "mesh"
    calls = ["check(plan)", "compare(plan)"]
    calls = calls if mesh.checked_first else calls[::-1]
    parts = {
        "DEVICES": DEVICES,
        "PROGRAM": written.text,
        "ARRAYS": inspect.getsource(programs.example_arrays),
        "STEP": "call"
        if evaluated
        else f"jax.value_and_grad(call, argnums={written.argnums}, has_aux=True)",
        "OPTIONS": (", differentiated=False" if evaluated else "")
        + (", outputs='replicated'" if evaluated == "replicated" else ""),
        "GIVEN": "jax.device_put(arguments, plan.shardings)" if mesh.placed else "arguments",
        "PARAMETERS": written.parameters,
        "BATCH": written.batch,
        "SEED": written.program.seed,
        "WHOLE": written.program.whole,
        "PINS": "".join(f"    {name!r}: {split!r},\n" for name, split in splits.items()),
        "ORDER": list(mesh.devices),
        "SHAPE": mesh.shape,
        "NAMES": mesh.names,
        "KIND": "Explicit" if mesh.explicit else "Auto",
        "AXES": len(mesh.shape),
        "BOUND": bound,
        "ENTER": f"jax.set_mesh({bound})" if mesh.entered else "contextlib.nullcontext()",
        "CALLS": "\n".join(f"    {call}" for call in calls),
    }
    text = _TEMPLATE
    for name, value in parts.items():
        text = text.replace(f"@{name}@", str(value))
    return text
