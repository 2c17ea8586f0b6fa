"""Verification: what a plan was priced for, beside what its program does.

Three things are set side by side: collectives (per layer in the differentiated program that is
given to the compiler, in total in the program that it makes of it), memory, and time.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import optax

from jaxlwp._progress import progress_of
from jaxlwp.check._hlo import bytes_by_kind, compiled_collectives
from jaxlwp.check._steps import step_times
from jaxlwp.check._target import compile_for
from jaxlwp.cost import collectives_by_layer
from jaxlwp.kernels import differentiated
from jaxlwp.lower import layer_index
from jaxlwp.mesh import need_devices
from jaxlwp.plan import Plan, lower_step, plan_memory, program_memory, state_shapes
from jaxlwp.program import SCAN, Equation, canonical, scan_of
from jaxlwp.space import Collective

KINDS = {
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "all_to_all": "all-to-all",
    "ppermute": "collective-permute",
    "reduce_scatter": "reduce-scatter",
}
"""JAX's primitives, and the kinds of collectives that they become."""

Traffic = dict[tuple[str, tuple[str, ...]], int]
"""Bytes of a device's operands by kind and mesh axes of the collective."""


@dataclass(frozen=True, kw_only=True)
class LayerCheck:
    """One layer: predicted, and in the program.

    Attributes:
      name: the layer's; "(outputs)" for what brings the function's outputs into place.
      config: its config, as text.
      predicted: bytes of a device's operands by kind and axes, as priced.
      program: the same in the differentiated program that is given to the compiler.
      compute_s: predicted seconds of its work.
      measured: whether those were measured.
    """

    name: str
    config: str
    predicted: Traffic
    program: Traffic
    compute_s: float
    measured: bool

    @property
    def agrees(self) -> bool:
        """What is priced is what runs."""
        return self.predicted == self.program


@dataclass(frozen=True, kw_only=True)
class Verification:
    """A plan and its compiled training step, side by side.

    Attributes:
      strategy: name of the strategy.
      compiled_for: the devices that the step was compiled for.
      layers: every layer.
      predicted_bytes_by_kind: bytes of a device's operands, as priced.
      compiled_bytes_by_kind: the same in the compiled program. Compilers may merge, split or drop
        collectives; CPUs compute bfloat16 sums in float32.
      predicted_memory_bytes: of a device, as XLA lays it out on GPUs.
      compiled_memory_bytes: by the compiler's account.
      predicted_s: seconds of a step.
      measured_s: the same measured, None if the step was not run.
    """

    strategy: str
    compiled_for: str
    layers: tuple[LayerCheck, ...] = field(repr=False)
    predicted_bytes_by_kind: dict[str, int]
    compiled_bytes_by_kind: dict[str, int]
    predicted_memory_bytes: int
    compiled_memory_bytes: int
    predicted_s: float
    measured_s: float | None = None

    @property
    def bytes_error(self) -> float:
        """Predicted bytes of all collectives relative to the compiled ones, less one."""
        compiled = sum(self.compiled_bytes_by_kind.values())
        predicted = sum(self.predicted_bytes_by_kind.values())
        if compiled == 0:
            return 0.0 if predicted == 0 else float("inf")
        return predicted / compiled - 1

    @property
    def disagreeing(self) -> tuple[LayerCheck, ...]:
        """Layers whose collectives differ from those priced."""
        return tuple(layer for layer in self.layers if not layer.agrees)

    def __str__(self) -> str:
        """A row per layer and the totals."""
        from jaxlwp.report import verification_text

        return verification_text(self)


def verify(
    plan: Plan,
    *arguments: Any,
    keywords: Mapping[str, Any] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    target: str | None = None,
    rounds: int = 5,
) -> Verification:
    """Compile a plan's training step and set it against what was priced.

    Args:
      plan: the plan.
      *arguments: params and batch, as arrays: the step is run too; left out, it is compiled only.
      keywords: arguments of the function that are passed by name, likewise.
      optimizer: of the training step; the plan's by default.
      target: GPUs to compile for that need not exist, as in "h200:16" (needs the extra
        `jaxlwp[gpu-aot]`); see `compile_for`.
      rounds: measured steps.

    Returns:
      Collectives per layer and in total, memory (bytes) and time (seconds), predicted and found.
      Print it.

    Raises:
      ValueError: other arguments than those of the plan, an unknown target, or one of another
        size, or arguments beside a target, or no target for a plan whose devices are not there.
      RuntimeError: the compiler for the target is not installed.
    """
    optimizer = optimizer or plan.optimizer
    if target is not None and arguments:
        raise ValueError(
            f"verify: target {target!r} is compiled for only, but arguments were given to run the "
            "step with; leave one of the two out"
        )
    given = None
    if arguments:
        given = canonical("verify", plan.function, arguments, keywords or {})
        plan.check_arguments("verify", given)
    with progress_of(None) as progress:
        progress("compiling the step", 0, 1)
        devices, compiled, memory_bytes = _compiled(plan, target, optimizer)
    predicted: dict[str, int] = {}
    for collective in plan.collectives:
        predicted[collective.kind] = predicted.get(collective.kind, 0) + collective.num_bytes
    measured_s = None
    if given is not None:
        measured_s = statistics.median(step_times(plan, given, optimizer, rounds))
    return Verification(
        strategy=plan.strategy.name,
        compiled_for=devices,
        layers=check_layers(plan),
        predicted_bytes_by_kind=predicted,
        compiled_bytes_by_kind=compiled,
        predicted_memory_bytes=plan_memory(plan, optimizer).peak_bytes,
        compiled_memory_bytes=memory_bytes,
        predicted_s=plan.cost.total_s,
        measured_s=measured_s,
    )


def _compiled(
    plan: Plan, target: str | None, optimizer: optax.GradientTransformation
) -> tuple[str, dict[str, int], int]:
    """What the step is compiled for, its bytes of collectives by kind, and its memory."""
    if target is not None:
        step = compile_for(plan, target, optimizer=optimizer)
        return str(step.target), step.compiled_bytes_by_kind, step.memory.reserved_bytes
    first = need_devices("verify", plan.mesh).devices.flat[0]
    lowered = lower_step(plan, state_shapes(plan, optimizer), plan.batch_shapes, optimizer)
    program = lowered.compile()
    compiled = bytes_by_kind(compiled_collectives(program.as_text()))
    memory_bytes = program_memory(program, first.platform).reserved_bytes
    return f"{plan.mesh.size} x {first.device_kind}", compiled, memory_bytes


def check_layers(plan: Plan) -> tuple[LayerCheck, ...]:
    """Collectives of every layer, as priced and in the differentiated program."""
    space, graph = plan.space, plan.graph
    sizes = space.devices.axis_sizes
    configs = plan.strategy.for_graph(graph)
    choices = space.choices(plan.strategy)
    priced: dict[int | None, list[Collective]] = {}
    for index, collective in collectives_by_layer(graph, configs, sizes):
        priced.setdefault(index, []).append(collective)
    found: dict[int | None, list[Collective]] = {}
    for eqn in differentiated(plan.lowered).program.equations:
        if here := _collectives(eqn):
            found.setdefault(layer_index(eqn.scope), []).extend(here)
    rows = [
        LayerCheck(
            name=layer.name,
            config=config.describe(sizes),
            predicted=_traffic(priced.get(layer.index, ()), tuple(sizes)),
            program=_traffic(found.get(layer.index, ()), tuple(sizes)),
            compute_s=float(space.tables.compute_s[layer.index][choices[layer.index]]),
            measured=bool(space.measured and space.measured[layer.index][choices[layer.index]]),
        )
        for layer, config in zip(graph.layers, configs, strict=True)
    ]
    if None in priced or None in found:
        rows.append(
            LayerCheck(
                name="(outputs)",
                config="",
                predicted=_traffic(priced.get(None, ()), tuple(sizes)),
                program=_traffic(found.get(None, ()), tuple(sizes)),
                compute_s=0.0,
                measured=False,
            )
        )
    return tuple(rows)


def _collectives(eqn: Equation) -> list[Collective]:
    """The collectives of an equation; sums over no axis are none, and a loop repeats its own."""
    if eqn.name == SCAN:
        scan = scan_of(eqn)
        once = [c for inner in scan.body.equations for c in _collectives(inner)]
        return [replace(c, num_bytes=scan.length * c.num_bytes) for c in once]
    if eqn.name not in KINDS:
        return []
    axes = eqn.params.get("axes", eqn.params.get("axis_name", ()))
    axes = (axes,) if isinstance(axes, str) else tuple(str(axis) for axis in axes)
    if not axes:
        return []
    return [
        Collective(kind=KINDS[eqn.name], axes=axes, num_bytes=_num_bytes(value))
        for value in eqn.operand_values
    ]


def _num_bytes(value: Any) -> int:
    size = value.itemsize
    for length in value.shape:
        size *= length
    return int(size)


def _traffic(collectives: Iterable[Collective], names: tuple[str, ...]) -> Traffic:
    """Sums of bytes; axes in the order of the mesh."""
    total: Traffic = {}
    for collective in collectives:
        key = collective.kind, tuple(name for name in names if name in collective.axes)
        total[key] = total.get(key, 0) + collective.num_bytes
    return dict(sorted(item for item in total.items() if item[1]))
