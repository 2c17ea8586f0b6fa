"""Strategies side by side by what their compiled programs are forecast to take: nothing runs.

The strategy found, the baselines, the function on every device alone, and what plain JAX makes of
data parallelism are compiled for the devices of a mesh, which need not exist, and forecast kernel
by kernel.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from jaxlwp._progress import Progress, reporting, silent
from jaxlwp.check._compare import applicable
from jaxlwp.check._forecast import Forecast, forecast
from jaxlwp.check._target import GPUS, Target, compiled, first_line, mesh_like, target_mesh
from jaxlwp.devices import System, preset
from jaxlwp.plan import (
    OPTIMIZER,
    Plan,
    baselines,
    lower_step,
    plan_for,
    state_shapes,
    with_strategy,
)
from jaxlwp.program import canonical
from jaxlwp.space import BASELINES, Config, Strategy, make_strategy

PLAIN, REPLICATED = "plain JAX", "replicated"
FORMAT_VERSION = 1
_REFUSED = "the compiler (XLA) refuses to compile"
_CALLER = 3
"""Calls up to the user's, from where a warning is given."""


@dataclass(frozen=True, kw_only=True)
class CompiledStrategy:
    """One strategy of a comparison.

    Attributes:
      strategy: its name; "plain JAX" is `jax.jit` of the function itself, its arguments placed as
        data parallelism has them, and "replicated" the function whole on every device.
      predicted_s: seconds of a step by the cost model; None for plain JAX.
      forecast: of the compiled step.
    """

    strategy: str
    predicted_s: float | None
    forecast: Forecast = field(repr=False)

    @property
    def forecast_s(self) -> float:
        """Seconds of a step by the compiled program."""
        return self.forecast.total_s

    @property
    def memory_bytes(self) -> int:
        """What a step takes of a device, by the compiler's account."""
        memory = self.forecast.memory
        return 0 if memory is None else memory.reserved_bytes


@dataclass(frozen=True, kw_only=True)
class CompiledComparison:
    """Strategies of one function, compiled for one system.

    Attributes:
      model: the function's name.
      system: name of the system.
      num_devices: devices of the mesh.
      results: one for each strategy, the one found first.
      memory_bytes: what a step may take of a device; infinite if it may take all.
      refused: name of a strategy whose program the compiler refuses -> what it says.
    """

    model: str
    system: str
    num_devices: int
    results: tuple[CompiledStrategy, ...]
    memory_bytes: float = math.inf
    refused: dict[str, str] = field(default_factory=dict)

    def result(self, strategy: str) -> CompiledStrategy:
        """The result of a strategy.

        Raises:
          KeyError: it was not compared.
        """
        return {result.strategy: result for result in self.results}[strategy]

    @property
    def best(self) -> CompiledStrategy:
        """The fastest of the plans that fit, the first of equal ones; plain JAX is no plan.

        The first plan if none fits.
        """
        compiled = [result for result in self.results if result.strategy != PLAIN]
        fitting = [result for result in compiled if self.fits(result)]
        return min(fitting or compiled[:1], key=lambda result: result.forecast_s)

    def fits(self, result: CompiledStrategy) -> bool:
        """Whether a strategy's step takes no more of a device than it may."""
        return result.memory_bytes <= self.memory_bytes

    def to_json(self) -> str:
        """As JSON text.

        Keys: `format_version`, `model`, `system`, `devices`, and `results`, a list with, for each
        strategy, `strategy`, `predicted_s` (null for plain JAX), `forecast_s`, `exposed_s` (waits
        of kernels for collectives), `kernels`, `kernel_bytes` (read and written), `flops`,
        `collective_bytes` (of a device's operands, by kind), `memory_bytes`, and `fits`; and
        `refused`, what the compiler says of the strategies whose programs it refuses, by name.
        """
        content = {
            "format_version": FORMAT_VERSION,
            "model": self.model,
            "system": self.system,
            "devices": self.num_devices,
            "results": [self._result_json(result) for result in self.results],
            "refused": self.refused,
        }
        return json.dumps(content, indent=2)

    def _result_json(self, result: CompiledStrategy) -> dict[str, Any]:
        found = result.forecast
        return {
            "strategy": result.strategy,
            "predicted_s": result.predicted_s,
            "forecast_s": result.forecast_s,
            "exposed_s": found.exposed_s,
            "kernels": found.num_kernels,
            "kernel_bytes": found.num_bytes,
            "flops": found.flops,
            "collective_bytes": {kind: t.num_bytes for kind, t in found.collectives.items()},
            "memory_bytes": result.memory_bytes,
            "fits": self.fits(result),
        }

    def __str__(self) -> str:
        """A row per strategy."""
        from jaxlwp.report import compiled_text

        return compiled_text(self)


@reporting
def compare_compiled(
    fn: Callable[..., Any],
    params: Any,
    *batch: Any,
    target: str,
    system: System | None = None,
    strategies: Sequence[str] = BASELINES,
    optimizer: optax.GradientTransformation = OPTIMIZER,
    memory_bytes: float | None = None,
    sum_dtype: Any = None,
    train: bool = True,
    name: str | None = None,
    on_progress: Progress | None = None,
    **keywords: Any,
) -> CompiledComparison:
    """Compile the strategy found, baselines and plain JAX for GPUs that are not there.

    Args:
      fn: loss function, as for `parallelize`.
      params: pytree of parameters, arrays or shapes.
      *batch: the other arguments, likewise.
      target: as in "h200:8" or "h200:2x8".
      system: its rates; by default those of the newest system of that GPU.
      strategies: names of baselines; those that do not apply are left out.
      optimizer: of the training step; SGD with momentum by default.
      memory_bytes: what a step may take of each device, as for `parallelize`.
      sum_dtype: as for `parallelize`.
      train: False for a function that is only evaluated, as for `parallelize`.
      name: of the model, for the report; the function's by default.
      on_progress: called as `on_progress(what, done, total)`.
      **keywords: arguments of `fn` by name, as for `parallelize`.

    Returns:
      The comparison. Print it.

    Raises:
      ValueError: an unknown target, a system of another number of devices, or as `parallelize`.
      RuntimeError: the compiler for the target is not installed, or it refuses every plan.
      MemoryLimitError: no strategy fits into `memory_bytes`.
    """
    parsed = Target.parse(target)
    system = system or preset(parsed.gpu, hosts=parsed.hosts, gpus=parsed.gpus_per_host)
    plan = plan_for(
        fn,
        canonical("compare_compiled", fn, (params, *batch), keywords),
        mesh=target_mesh(parsed),
        rates=system,
        optimizer=optimizer,
        memory_bytes=memory_bytes,
        sum_dtype=sum_dtype,
        train=train,
        on_progress=on_progress,
    )
    compared, _ = _compiled_all(
        plan, system, strategies, optimizer, memory_bytes, on_progress or silent, parsed
    )
    title = name or str(getattr(fn, "__qualname__", type(fn).__name__))
    return dataclasses.replace(compared, model=title)


def fastest_compiled(
    plan: Plan,
    system: System,
    *,
    optimizer: optax.GradientTransformation | None = None,
    memory_bytes: float | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Of a plan, the baselines and the function on every device alone, what is forecast fastest.

    Args:
      plan: the plan, on a mesh of GPUs, which need not exist, or of axes alone.
      system: the GPUs and their links.
      optimizer: of the training step; SGD with momentum by default.
      memory_bytes: what a step may take of a device.
      progress: called as `progress(what, done, total)`.

    Returns:
      The plan, on the mesh of GPUs that it was compiled for, with the seconds of all in `checked`,
      those of plain JAX's data parallelism too. A warning names plans that the compiler refuses.

    Raises:
      ValueError: the mesh is of processors, or the system's GPUs are not known to the compiler.
      RuntimeError: the compiler is not installed, or it refuses every plan.
    """
    mesh = plan.mesh if isinstance(plan.mesh, Mesh) else mesh_like(plan.mesh, Target.of(system))
    plan = dataclasses.replace(plan, mesh=mesh)
    first = mesh.devices.flat[0]
    if first.platform == "cpu":
        raise ValueError(
            f'check: "compile" forecasts programs of GPUs, and the mesh has {plan.mesh.size} x '
            f'{first.device_kind}; give mesh=jaxlwp.check.target_mesh("h200:8"), or check="measure"'
        )
    known = system.gpu.name.partition("-")[0].lower() in GPUS
    compared, plans = _compiled_all(
        plan,
        system,
        BASELINES,
        optimizer or OPTIMIZER,
        memory_bytes,
        progress or silent,
        Target.of(system) if known else None,  # GPUs that are here can be others
    )
    for name, said in compared.refused.items():
        warnings.warn(f"{_REFUSED} {name}, which is left out: {said}", stacklevel=_CALLER)
    checked = {result.strategy: result.forecast_s for result in compared.results}
    return dataclasses.replace(
        plans[compared.best.strategy], checked=checked, checked_by="forecast"
    )


def _compiled_all(
    plan: Plan,
    system: System,
    names: Sequence[str],
    optimizer: optax.GradientTransformation,
    memory_bytes: float | None,
    progress: Progress,
    target: Target | None = None,
) -> tuple[CompiledComparison, dict[str, Plan]]:
    """The comparison, and the plans by name."""
    plans = {each.strategy.name: each for each in (plan, *applicable(plan, names))}
    alone = with_strategy(plan, _replicated(plan))
    if all(each.strategy.configs != alone.strategy.configs for each in plans.values()):
        plans[REPLICATED] = alone
    steps = [(name, each, False) for name, each in plans.items()]
    steps += [(PLAIN, each, True) for each in baselines(plan, ("data",)).values()]
    results, refused = [], {}
    for number, (name, each, plain) in enumerate(steps):
        progress("compiling steps", number, len(steps))
        state = state_shapes(each, optimizer)
        lowered = lower_step(each, state, each.batch_shapes, optimizer, plain=plain)
        try:
            program = compiled(lowered, target)
        except jax.errors.JaxRuntimeError as error:
            refused[name] = first_line(error)
            continue
        results.append(
            CompiledStrategy(
                strategy=name,
                predicted_s=None if plain else each.cost.total_s,
                forecast=forecast(program, system),
            )
        )
    progress("compiling steps", len(steps), len(steps))
    if all(result.strategy == PLAIN for result in results):
        name, said = next(iter(refused.items()))
        raise RuntimeError(
            f"{_REFUSED} every plan, {name} for instance: {said}; give another batch size, "
            'another dtype, or another target; without check="compile" a plan is made all the same'
        )
    comparison = CompiledComparison(
        model="",
        system=system.name,
        num_devices=plan.mesh.size,
        results=tuple(results),
        memory_bytes=math.inf if memory_bytes is None else memory_bytes,
        refused=refused,
    )
    return comparison, plans


def _replicated(plan: Plan) -> Strategy:
    """Every layer whole on every device."""
    graph = plan.graph
    configs = [Config()] * len(graph.layers)
    return make_strategy(REPLICATED, graph, configs, plan.space.devices.axis_sizes)
