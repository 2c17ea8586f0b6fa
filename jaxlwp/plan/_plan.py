"""Plans: a strategy bound to a mesh, called like the function that it was made from."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding

from jaxlwp.cost import (
    SearchSpace,
    check_mesh,
    need_program,
    strategy_collectives,
)
from jaxlwp.devices import spans_processes
from jaxlwp.graph import ComputationGraph, trace
from jaxlwp.lower import Lowered
from jaxlwp.memory import Memory, strategy_memory
from jaxlwp.mesh import (
    AnyMesh,
    check_set_mesh,
    need_devices,
    partition_spec,
    placed,
)
from jaxlwp.optimize import SearchResult, search
from jaxlwp.plan._batches import batch_boxes, batch_parts, put_batch
from jaxlwp.plan._placing import put_share
from jaxlwp.plan._states import (
    StateShardings,
    abstract_state,
    put_state,
    state_bytes,
    state_shardings,
)
from jaxlwp.plan._traced import kept_space, write_back
from jaxlwp.program import (
    Arguments,
    arguments_difference,
    canonical,
    first_difference,
    positional_names,
)
from jaxlwp.solver import Cost
from jaxlwp.space import BASELINES, Collective, Layout, Strategy

OPTIMIZER = optax.sgd(1e-4, momentum=0.9)
"""What a training step is assumed to update its parameters with, where nothing is said."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Plan:
    """A function, of training or evaluation, split over a mesh by a strategy.

    Call it like the function: `plan(params, *batch)`, or with arguments by name. It works under
    `jax.jit`, `jax.grad`, `jax.value_and_grad` (also with `has_aux=True`) and with donated buffers.

    Attributes:
      space: the priced space that the strategy is from.
      strategy: the strategy.
      mesh: the device mesh, or axes alone of devices that are not there: such a plan is looked at,
        saved and compiled for targets; running it asks for a mesh of devices.
      result: the search result, if the strategy was searched for.
      function: the function that was traced.
      in_tree: structure of ((params, *batch), arguments that are passed by name only).
      out_tree: structure of the function's output.
      outputs: where outputs go, as it was given to `parallelize`.
      elsewhere_s: predicted seconds of the best plan that may store parameters otherwise, if they
        stay as another plan stores them (`params_as`).
      optimizer: what the training step updates its parameters with, as given to `parallelize`; SGD
        with momentum where nothing was.
      checked: seconds of a step by name of the strategy, if `parallelize` was asked to
        check; the plan's is the least. Infinite for one that needs more memory than there is.
      checked_by: "measured", or "forecast" for seconds by compiled programs, among which are those
        of plain JAX.
    """

    space: SearchSpace
    strategy: Strategy
    mesh: AnyMesh
    result: SearchResult[SearchSpace] | None = None
    function: Callable[..., Any] | None = field(default=None, repr=False)
    in_tree: Any = field(repr=False)
    out_tree: Any = field(repr=False)
    outputs: Any = None
    elsewhere_s: float | None = None
    optimizer: optax.GradientTransformation = field(default=OPTIMIZER, repr=False)
    checked: dict[str, float] = field(default_factory=dict)
    checked_by: str = "measured"

    @property
    def graph(self) -> ComputationGraph:
        """The computation graph."""
        return self.space.graph

    @property
    def trains(self) -> bool:
        """The function is a loss whose gradients are taken; else it is only evaluated."""
        return bool(self.graph.gradients)

    @property
    def cost(self) -> Cost:
        """Predicted seconds of one training step, or evaluation, decomposed."""
        return self.space.evaluate(self.strategy)

    @functools.cached_property
    def collectives(self) -> tuple[Collective, ...]:
        """Every collective that one training step (loss and gradients) performs."""
        configs = self.strategy.for_graph(self.graph)
        return strategy_collectives(self.graph, configs, self.space.devices.axis_sizes)

    @functools.cached_property
    def memory(self) -> Memory:
        """Predicted bytes per device of a training step, its optimizer's state in it.

        As XLA compiles it for GPUs; of a plan that only evaluates, of an evaluation.
        """
        return plan_memory(self)

    @functools.cached_property
    def lowered(self) -> Lowered:
        """The function on one device's blocks."""
        return Lowered(
            graph=self.graph,
            configs=self.strategy.for_graph(self.graph),
            axis_sizes=self.space.devices.axis_sizes,
        )

    @functools.cached_property
    def _shardings(self) -> Arguments:
        flat = [self._sharding(layout) for layout in self.lowered.input_layouts()]
        shardings: Arguments = jax.tree.unflatten(self.in_tree, flat)
        return shardings

    @property
    def shardings(self) -> tuple[Any, ...]:
        """Shardings of (params, *batch), as a pytree of the same structure."""
        return self._shardings[0]

    @property
    def keyword_shardings(self) -> dict[str, Any]:
        """Shardings of the arguments that can be passed by name only."""
        return self._shardings[1]

    @property
    def param_shardings(self) -> Any:
        """Shardings of the parameters, as a pytree of the same structure."""
        return self.shardings[0]

    @property
    def batch_shardings(self) -> tuple[Any, ...]:
        """Shardings of the arguments after the parameters."""
        return self.shardings[1:]

    def _sharding(self, layout: Layout) -> NamedSharding:
        return NamedSharding(self.mesh, partition_spec(layout))

    @functools.cached_property
    def _function(self) -> Callable[..., Any]:
        layouts = self.lowered.input_layouts()
        mapped = jax.shard_map(
            self.lowered,
            mesh=self.mesh,
            in_specs=tuple(map(partition_spec, layouts)),
            out_specs=tuple(map(partition_spec, self.lowered.output_layouts())),
        )
        shardings = [self._sharding(layout) for layout in layouts]
        return jax.jit(lambda *flat: mapped(*map(placed, flat, shardings)))

    def __call__(self, params: Any, *batch: Any, **keywords: Any) -> Any:
        """The function's output, computed on the mesh.

        State that the function changes in NNX modules (random counts, statistics) is changed in
        the modules passed here too.

        Raises:
          ValueError: the arguments differ in structure, shape or dtype from the traced ones, or
            another mesh than the plan's is set, or the plan's devices are not there.
        """
        check_set_mesh("plan", need_devices("plan", self.mesh))
        arguments = canonical("plan", self.function, (params, *batch), keywords)
        flat = self.check_arguments("plan", arguments)
        results = self._function(*flat)
        count = len(results) - len(self.graph.changed)
        for position, value in zip(self.graph.changed, results[count:], strict=True):
            flat[position] = value
        if self.graph.changed:
            write_back(arguments, jax.tree.unflatten(self.in_tree, flat))
        return jax.tree.unflatten(self.out_tree, results[:count])

    def check_arguments(self, where: str, arguments: Arguments) -> list[Any]:
        """The leaves of arguments, which are those that the plan was made for.

        Args:
          where: who is called, for the error.
          arguments: positional ones, and those by name.

        Raises:
          ValueError: they differ in structure, shape or dtype.
        """
        flat, tree = jax.tree.flatten(arguments)
        if tree != self.in_tree:
            raise ValueError(f"{where}: {self._difference(tree)}")
        program = self.graph.program
        for index, leaf, name in zip(program.inputs, flat, self.graph.argument_names, strict=True):
            want, have = program.values[index], jax.typeof(leaf)
            if tuple(have.shape) != want.shape or have.dtype != want.dtype:
                raise ValueError(
                    f"{where}: {name} is {have.dtype}{list(have.shape)}, but the plan was made for "
                    f"{want.dtype}{list(want.shape)}; pass arrays of that shape (drop or pad the "
                    "last incomplete batch), or make a plan for the new one"
                )
        return flat

    def _difference(self, tree: Any) -> str:
        """How the structure of arguments differs from that of the traced ones, and what to do."""
        (positional, keywords), (wanted, named) = tree.children(), self.in_tree.children()
        names = positional_names(self.function, len(wanted.children()))
        found = (
            first_difference(keywords, named)
            if positional == wanted
            else arguments_difference(positional, wanted, names)
        )
        return (
            f"{found}, when the plan was made; pass parameters and batch as to parallelize (an NNX "
            "module in the mode that it had: switch modes inside the function), or make a new plan"
        )

    @functools.cached_property
    def _argument_shapes(self) -> Arguments:
        values = (self.graph.program.values[i] for i in self.graph.program.inputs)
        shapes = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in values]
        arguments: Arguments = jax.tree.unflatten(self.in_tree, shapes)
        return arguments

    @property
    def argument_shapes(self) -> tuple[Any, ...]:
        """Shapes and dtypes of (params, *batch), as a pytree of the same structure."""
        return self._argument_shapes[0]

    @property
    def batch_shapes(self) -> Arguments:
        """Shapes and dtypes of the arguments after the parameters, and of those by name only."""
        return self._argument_shapes[0][1:], self._argument_shapes[1]

    def rebind(
        self,
        *batch: Any,
        fn: Callable[..., Any] | None = None,
        params: Any = None,
        keywords: Mapping[str, Any] | None = None,
    ) -> Plan:
        """The same strategy for another batch size, or for evaluation, without a new search.

        Layers of the same name keep their configs. Only where that is not possible (a smaller
        batch than the split, layers that the other function alone has) a config is searched for.

        Args:
          *batch: the arguments after the parameters (arrays or `jax.ShapeDtypeStruct`).
          fn: another function of the same parameters, such as the logits or the metrics of a
            batch; by default the plan's own. If its first output is no scalar loss, the new plan
            is for evaluation: its predicted costs are those of the forward pass.
          params: the parameters for `fn`, if their structure differs (an NNX module in
            evaluation mode); by default like the plan's.
          keywords: arguments of `fn` that are passed by name.

        Returns:
          A plan, to be called as `fn(params, *batch, **keywords)`.

        Raises:
          ValueError: the plan does not know its function and none is given.
        """
        fn = fn or self.function
        if fn is None:
            raise ValueError(
                "rebind: this plan was bound without its function; give it, as in "
                "plan.rebind(*batch, fn=loss_fn)"
            )
        if params is None:
            params = self.argument_shapes[0]
        arguments = canonical("rebind", fn, (params, *batch), keywords or {})
        # PartitionSpecs are for the outputs of this function alone.
        outputs = self.outputs if fn == self.function or self.outputs == "replicated" else None
        graph = trace(
            fn,
            *arguments[0],
            keywords=arguments[1],
            differentiated=None if self.trains else False,
            sum_dtype=self.graph.sum_dtype,
            outputs=outputs,
        )
        space = kept_space(graph, self.space.devices, self.strategy)
        plan = bind(
            space,
            dataclasses.replace(search(space).strategy, name=self.strategy.name),
            self.mesh,
            arguments[0],
            jax.tree.structure(graph.results),
            function=fn,
            keywords=arguments[1],
        )
        return dataclasses.replace(plan, outputs=outputs, optimizer=self.optimizer)

    def place(self, state: Any) -> Any:
        """Put a training state on the mesh.

        Leaves that stand for a parameter (the parameters themselves, and leaves of the optimizer
        state whose path ends in a parameter's path and that have its shape) are split like it, and
        so are leaves that stand for a leaf of another argument (running statistics); all other
        arrays are replicated. Placed arrays share no memory with those given, so a step may donate
        them.

        In several processes an array of one process has to be whole and the same in each: digests
        are compared, and each process puts its own part of it on its devices. What is too large for
        one host is initialised in parts (`state_shardings`); such arrays are taken as they are.

        Args:
          state: parameters, an optimizer state, a Flax `TrainState`, or any pytree of them.

        Returns:
          The same pytree, its leaves placed.

        Raises:
          ValueError: the plan's devices are not there, or a leaf differs between processes.
          TypeError: a leaf is no array or number.
        """
        return put_state(state, self.sharding_for, need_devices("place", self.mesh))

    def state_shardings(self, state: Any) -> Any:
        """Shardings of a training state, as `place` gives them to it.

        With them a state is made in parts, never whole on one host or device:

            shapes = jax.eval_shape(init, key)
            state = jax.jit(init, out_shardings=plan.state_shardings(shapes))(key)

        Args:
          state: as for `place`; or its shapes.

        Raises:
          TypeError: a leaf is no array or number, nor the shape of one.
        """
        return jax.tree_util.tree_map_with_path(self.sharding_for, state)

    def abstract_state(self, state: Any) -> Any:
        """What to restore a checkpoint into: a state's shapes, on the devices that `place` puts it.

        No array is made. The checkpoint may be of another plan, on more devices or fewer; orbax
        reads on each device its part alone:

            wanted = plan.abstract_state(jax.eval_shape(init, key))
            state = checkpoints.restore(step, args=ocp.args.StandardRestore(wanted))

        Args:
          state: as for `place`; or its shapes. Random keys and step counts are leaves like others.

        Returns:
          The same pytree, its leaves `jax.ShapeDtypeStruct` with shardings.

        Raises:
          ValueError: the plan's devices are not there.
          TypeError: a leaf is no array or number, nor the shape of one.
        """
        need_devices("abstract_state", self.mesh)
        return abstract_state(state, self.sharding_for)

    @functools.cached_property
    def local_batch(self) -> tuple[Any, ...]:
        """Which rows and columns of the batch this process feeds, in several processes.

        For each array of the batch, in the form in which `place_batch` takes it, a tuple of slices,
        one for each dimension: the part of the global array that the devices of this process hold.
        `jax.tree.map(lambda x, own: x[own], batch, plan.local_batch)` takes it from a whole batch
        that is a tuple. What can be passed by name only is a dict behind the others. Processes
        whose boxes overlap (an array that is not split, or only inside a host) must feed the same
        values there. In one process every box is the whole array.

        Raises:
          ValueError: the plan's devices are not there.
        """
        need_devices("local_batch", self.mesh)
        return batch_boxes(self._argument_shapes, self._shardings)

    def place_batch(self, *batch: Any, **keywords: Any) -> Any:
        """Put a batch on the mesh as the first layers want it; returns what it was given.

        In several processes each may pass its own rows and columns alone (`local_batch`), so that
        none holds the whole batch; each array is either whole or that box. Nothing is compared or
        sent between processes: those whose boxes overlap must pass the same values there.

        Args:
          *batch: the arguments after the parameters, or the first few of them.
          **keywords: arguments by name.

        Returns:
          The one argument, or a tuple of several; what can be passed by name only is a dict behind
          them.

        Raises:
          ValueError: the structure or a shape differs from the traced one (and from this process's
            box), or the plan's devices are not there.
        """
        mesh = need_devices("place_batch", self.mesh)
        given, shapes, shardings = batch_parts(
            self.function, batch, keywords, self._argument_shapes, self._shardings
        )
        placed = put_batch(given, shapes, shardings, mesh)
        return placed[0] if len(placed) == 1 else tuple(placed)

    @functools.cached_property
    def sharding_for(self) -> StateShardings:
        """Sharding of a leaf of a training state, called with its path and the leaf."""
        shapes, shardings = self._argument_shapes, self._shardings
        return state_shardings(shapes, shardings, self.graph.num_parameters, self.mesh)

    @property
    def __name__(self) -> str:
        """What `jax.jit` calls the compiled program."""
        return "plan"

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """Where JAX and `inspect` find source and signature; JAX would print the plan otherwise."""
        function = self.function
        return function if function is not None and hasattr(function, "__code__") else _call

    def __repr__(self) -> str:
        """A row per layer: config, PartitionSpec, seconds and bytes."""
        from jaxlwp.report import plan_text

        return plan_text(self)

    def _repr_html_(self) -> str:
        """The same for notebooks."""
        from jaxlwp.report import plan_html

        return plan_html(self)

    def save(self, path: str | Path) -> None:
        """Write the strategy as a JSON file, with what it is predicted to take here.

        `jaxlwp.Strategy.load` reads it, `parallelize(strategy=...)` takes it. The predictions
        (seconds by cause, memory) are for people, and for `jaxlwp diff`. Of several processes the
        first writes.

        Args:
          path: of the file, such as "strategy.json"; replaced in one step if it is there.

        Raises:
          OSError: it cannot be written there.
        """
        self.recorded.save(path)

    @property
    def recorded(self) -> Strategy:
        """The strategy, with what it is predicted to take here on record."""
        record = self.space.record(self.cost, self.memory.peak_bytes)
        return dataclasses.replace(self.strategy, record=record)

    def report(self, path: str | Path) -> None:
        """Write the plan as one page: the network as a graph, and what is known of each layer.

        It is one file that needs no network, and opens in any browser.

        Args:
          path: of the file, such as "plan.html"; replaced in one step if it is there.

        Raises:
          OSError: it cannot be written there.
        """
        from jaxlwp.report import save_page

        save_page(self, path)


def place_arguments(plan: Plan, batch: Arguments) -> Arguments:
    """All arguments after the parameters, and those by name only, on the plan's mesh.

    Args:
      plan: the plan.
      batch: whole arrays; in several processes each puts its own part.
    """
    shardings = (plan.batch_shardings, plan.keyword_shardings)
    if not spans_processes(need_devices("place_batch", plan.mesh)):
        placed: Arguments = jax.device_put(batch, shardings)
        return placed
    return jax.tree.map(put_share, batch, shardings)  # type: ignore[no-any-return]


def plan_memory(plan: Plan, optimizer: optax.GradientTransformation | None = None) -> Memory:
    """Memory of a plan's training step; `Plan.memory` is that with the plan's own optimizer.

    Args:
      plan: the plan.
      optimizer: of the training step, in place of the plan's; its state is split as `Plan.place`
        splits it. Of a plan that only evaluates nothing is kept.
    """
    optimizer = optimizer or plan.optimizer
    state = jax.eval_shape(optimizer.init, plan.argument_shapes[0]) if plan.trains else ()
    return strategy_memory(
        plan.graph,
        plan.strategy.for_graph(plan.graph),
        plan.space.devices.axis_sizes,
        optimizer_bytes=state_bytes(state, plan.sharding_for),
    )


def _call(params: Any, *batch: Any, **keywords: Any) -> Any:
    """How a plan is called whose function is not known."""


def bind(
    space: SearchSpace,
    strategy: Strategy,
    mesh: AnyMesh,
    arguments: tuple[Any, ...],
    out_tree: Any,
    result: SearchResult[SearchSpace] | None = None,
    function: Callable[..., Any] | None = None,
    keywords: Mapping[str, Any] | None = None,
) -> Plan:
    """Bind a strategy to a mesh.

    Args:
      space: the priced space.
      strategy: a strategy of this space.
      mesh: the mesh; its axes must be the strategy's, in any order, Auto or Explicit. One of axes
        alone does where nothing is to run (`jaxlwp.mesh.abstract_mesh`).
      arguments: (params, *batch), for their structure.
      out_tree: structure of the function's output.
      result: where the strategy comes from.
      function: the function that was traced.
      keywords: arguments that are passed by name only, for their structure.

    Raises:
      ValueError: the strategy is for another mesh or model, or the space is a saved problem.
    """
    need_program("bind", space)
    check_mesh(strategy, {str(name): size for name, size in mesh.shape.items()})
    space.choices(strategy)
    return Plan(
        space=space,
        strategy=strategy,
        mesh=mesh,
        result=result,
        function=function,
        in_tree=jax.tree.structure((arguments, dict(keywords or {}))),
        out_tree=out_tree,
    )


def with_strategy(plan: Plan, strategy: Strategy) -> Plan:
    """The plan with another strategy of its space.

    Raises:
      ValueError: the strategy is for another mesh or model.
    """
    plan.space.choices(strategy)
    return dataclasses.replace(plan, strategy=strategy, result=None, elsewhere_s=None, checked={})


def baselines(plan: Plan, names: Sequence[str] = BASELINES) -> dict[str, Plan]:
    """The plan with each baseline that applies: not where the devices do not divide the batch."""
    result = {}
    for name in names:
        try:
            strategy = plan.space.baseline(name)
        except ValueError:
            continue
        result[name] = with_strategy(plan, strategy)
    return result
