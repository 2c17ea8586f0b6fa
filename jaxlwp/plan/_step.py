"""A training step under a plan: loss, gradients, and the optimizer's update, as one program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import optax

from jaxlwp.mesh import need_devices, on_mesh
from jaxlwp.plan._plan import OPTIMIZER, Plan
from jaxlwp.program import Arguments


@dataclass(frozen=True, kw_only=True)
class ProgramMemory:
    """Bytes per device that a compiled program takes, by the compiler's account.

    Attributes:
      argument_bytes: of parameters, optimizer state and batch.
      temporary_bytes: of its temporaries.
      new_bytes: of its results, without those that overwrite arguments.
      peak_bytes: at its peak, if the compiler counts temporaries there; the sum of all elsewhere.
    """

    argument_bytes: int
    temporary_bytes: int
    new_bytes: int
    peak_bytes: int

    @property
    def reserved_bytes(self) -> int:
        """What has to be free for it to run: all of the above, whatever is live when."""
        return self.argument_bytes + self.temporary_bytes + self.new_bytes


def initial_state(
    plan: Plan, params: Any, optimizer: optax.GradientTransformation = OPTIMIZER
) -> Any:
    """(parameters, optimizer state); a plan that only evaluates has no optimizer."""
    return params, optimizer.init(params) if plan.trains else ()


def state_shapes(plan: Plan, optimizer: optax.GradientTransformation = OPTIMIZER) -> Any:
    """Shapes and dtypes of (parameters, optimizer state)."""
    return jax.eval_shape(
        lambda params: initial_state(plan, params, optimizer), plan.argument_shapes[0]
    )


def lower_step(
    plan: Plan,
    state: Any,
    batch: Arguments,
    optimizer: optax.GradientTransformation,
    *,
    plain: bool = False,
) -> Any:
    """Lower a training step, or an evaluation; the state is donated, and returned.

    Args:
      plan: the plan, bound to the mesh that the step is for.
      state: (parameters, optimizer state), arrays or their shapes.
      batch: the other arguments, and those by name, likewise.
      optimizer: what updates the parameters.
      plain: differentiate the function itself in place of the plan: arguments are stored as the
        plan has them, and all else is left to XLA's partitioner. Under data parallelism that is
        what plain JAX's users write.

    Returns:
      What `jax.jit(step).lower(...)` returns; `step(state, *batch)` returns (state, (loss, aux)),
      or (state, outputs) of an evaluation.

    Raises:
      ValueError: a plain step of a plan that does not know its function, a plan whose devices are
        not there, not even to be compiled for.
    """
    function = plan.function if plain else plan
    if function is None:
        raise ValueError(
            "lower_step: this plan was bound without its function; bind it with function=..."
        )

    def loss(params: Any, batch: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, Any]:
        out = function(params, *batch, **keywords)
        return (out[0], out[1:]) if isinstance(out, tuple) else (out, ())

    def step(state: Any, batch: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, Any]:
        params, slots = state
        if not plan.trains:
            return state, function(params, *batch, **keywords)
        value, gradients = jax.value_and_grad(loss, has_aux=True)(params, batch, keywords)
        updates, slots = optimizer.update(gradients, slots, params)
        return (optax.apply_updates(params, updates), slots), value

    shardings = plan.state_shardings(state)
    jitted = jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, plan.batch_shardings, plan.keyword_shardings),
        out_shardings=(shardings, None),
    )
    # Shapes alone: the arrays given may be committed to devices of their own.
    shapes = jax.eval_shape(lambda *arguments: arguments, state, *batch)
    with on_mesh(need_devices("lower_step", plan.mesh)):
        return jitted.lower(*shapes)


def program_memory(program: Any, platform: str) -> ProgramMemory:
    """Memory of a compiled program for devices of a platform ("cpu", "gpu", ...)."""
    stats = program.memory_analysis()
    argument_bytes, temporary_bytes = stats.argument_size_in_bytes, stats.temp_size_in_bytes
    new_bytes = stats.output_size_in_bytes - stats.alias_size_in_bytes
    every_bytes = argument_bytes + temporary_bytes + new_bytes
    # On CPUs the compiler's own peak leaves the temporaries out.
    peak_bytes = every_bytes if platform == "cpu" else stats.peak_memory_in_bytes or every_bytes
    return ProgramMemory(
        argument_bytes=argument_bytes,
        temporary_bytes=temporary_bytes,
        new_bytes=new_bytes,
        peak_bytes=peak_bytes,
    )
