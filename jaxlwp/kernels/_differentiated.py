"""The differentiated program of one device: what the compiler is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxlwp.kernels._alike import AlikeLayers
from jaxlwp.lower import Lowered, run
from jaxlwp.mesh import trace_on_blocks
from jaxlwp.program import Program, flatten


@dataclass(frozen=True, kw_only=True)
class DifferentiatedProgram:
    """Loss and gradients on one device's blocks.

    Attributes:
      program: its outputs are the gradients, the loss, and the function's other outputs.
      gradients: position among the outputs -> position of the parameter among the inputs.
      trained: positions of those parameters among the graph's inputs.
      loss: position of the loss among the outputs.
    """

    program: Program
    gradients: dict[int, int]
    trained: tuple[int, ...]
    loss: int


def differentiated(
    lowered: Lowered, *, named: bool = False, alike: bool = False
) -> DifferentiatedProgram:
    """Trace the differentiated program of one device.

    Args:
      lowered: the program.
      named: what operators make carries the index of its value in the graph's program as a name.
        Naming takes a quarter of the time.
      alike: what is alike in several layers is traced once (`AlikeLayers`).
    """
    graph, sizes = lowered.graph, lowered.axis_sizes
    inputs = graph.program.inputs
    trained = tuple(n for n in range(graph.num_parameters) if inputs[n] in graph.gradients)

    mark = checkpoint_name if named else None
    layers = AlikeLayers(lowered.program, mark, alike)

    def evaluate(blocks: Sequence[Any]) -> tuple[Any, ...]:
        return run(lowered.program, blocks, layers)

    def step(*blocks: Any) -> tuple[Any, ...]:
        def loss(*parameters: Any) -> tuple[Any, tuple[Any, ...]]:
            given = dict(zip(trained, parameters, strict=True))
            first, *others = evaluate([given.get(n, block) for n, block in enumerate(blocks)])
            return first, tuple(others)

        if not trained:
            return evaluate(blocks)
        (value, others), gradients = jax.value_and_grad(
            loss, argnums=tuple(range(len(trained))), has_aux=True
        )(*(blocks[n] for n in trained))
        return (*gradients, value, *others)

    values = [graph.program.values[value] for value in inputs]
    layouts = lowered.input_layouts()
    traced = trace_on_blocks(
        step,
        [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in values],
        layouts,
        [*(layouts[n] for n in trained), *lowered.output_layouts()],
        sizes,
    )
    program = layers.with_values(flatten(traced.jaxpr, derivatives=False, unroll=False))
    position = {place: n for n, place in traced.positions.items()}
    return DifferentiatedProgram(
        program=program,
        gradients={output: position[n] for output, n in enumerate(trained)},
        trained=trained,
        loss=len(trained),
    )
