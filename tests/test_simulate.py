"""Steps simulated event by event: schedules by hand, random ones, and those of small networks."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxlwp
from jaxlwp.cost import AnalyticCostModel, SearchSpace, pass_shares
from jaxlwp.devices import DeviceGraph, Level, System, preset
from jaxlwp.simulate import (
    Event,
    Load,
    Span,
    StepSimulation,
    Task,
    last_chain,
    one_by_one,
    run,
    simulate_step,
)
from models import LeNet5, ResNet18, UNet
from tests.test_forecast import check_trace


def kernel(seconds: float, *after: int, stream: str = "a") -> Task:
    return Task(name="t", cause="work", stream=stream, own_s=seconds, after=after)


def load(
    seconds: float, *after: int, start_s: float = 0.0, flows: int = 1, link: str = "x"
) -> Task:
    loads = (Load(link, seconds, flows),)
    return Task(name="t", cause="sent", own_s=start_s, loads=loads, after=after)


def spans(tasks: Sequence[Task]) -> list[tuple[float, float]]:
    return [(event.begin_s, event.end_s) for event in run(tasks)]


# --- the engine, by hand --------------------------------------------------------------------------


def test_a_chain() -> None:
    tasks = [kernel(1), load(2, 0, start_s=0.5), kernel(4, 1)]
    assert spans(tasks) == [(0, 1), (1, 3.5), (3.5, 7.5)]
    assert run(tasks)[1].spans == ((1.5, 3.5),)


def test_two_branches_and_their_join() -> None:
    """The exchange of one branch runs beside the other's work; the join waits for the later one."""
    tasks = [kernel(1), load(5, 0), kernel(2, 0), kernel(1, 1), kernel(1, 2, 3)]
    assert spans(tasks) == [(0, 1), (1, 6), (1, 3), (6, 7), (7, 8)]


def test_a_stream_runs_one_at_a_time_in_their_order() -> None:
    tasks = [kernel(1, stream="b"), kernel(1), kernel(3), kernel(2, 0), kernel(1, 0)]
    # At 1 the third is ready and first in order; the last two have waited from then on.
    assert spans(tasks) == [(0, 1), (0, 1), (1, 4), (4, 6), (6, 7)]
    events = run(tasks)
    assert [event.behind for event in events] == [None, None, 1, 2, 3]
    assert last_chain(events) == (1, 2, 3, 4)


def test_a_link_is_shared_fairly() -> None:
    # Alone until 1; then half each: the first has 1 of its 2 left, done at 3; the other then alone.
    tasks = [load(2), kernel(1), load(3, 1)]
    assert spans(tasks) == [(0, 3), (0, 1), (1, 5)]
    assert [event.contended_s for event in run(tasks)] == [1, 0, 1]


def test_flows_share_an_adapter() -> None:
    """Eight devices' flows beside a single one: each flow has a ninth."""
    events = run([load(8, flows=8), load(1)])
    assert [(e.begin_s, round(e.end_s, 9)) for e in events] == [(0, 9), (0, 9)]
    assert [round(e.contended_s, 9) for e in events] == [8, 8]  # a flow alone takes 1
    (alone,) = run([load(8, flows=8)])
    assert (alone.end_s, alone.contended_s) == (8, 7)


def test_a_start_takes_no_rate() -> None:
    assert spans([load(2, start_s=1), load(2, start_s=1)]) == [(0, 5), (0, 5)]
    assert spans([load(2), load(2, start_s=2)]) == [(0, 2), (0, 4)]


def test_a_collective_keeps_its_stream_over_all_links() -> None:
    """Inside, across, inside: the next one begins when all is done, though links were free."""
    stages = (Load("x", 1), Load("y", 3), Load("x", 1))
    both = [Task(name="t", cause="c", own_s=1, loads=stages, stream="s") for _ in range(2)]
    assert spans(both) == [(0, 6), (6, 12)]
    free = [Task(name="t", cause="c", own_s=1, loads=stages) for _ in range(2)]
    assert spans(free) == [(0, 11), (0, 11)]
    assert run(free)[0].spans == ((1, 3), (3, 9), (9, 11))


def test_nothing_overlaps_one_by_one() -> None:
    tasks = [kernel(1), load(2), load(3, link="y"), kernel(4, 0, stream="b")]
    assert spans(one_by_one(tasks)) == [(0, 1), (1, 3), (3, 6), (6, 10)]
    assert run([]) == () and last_chain(()) == ()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (kernel(1, 0), "depends on earlier ones"),
        (kernel(-1), "they must be at least 0"),
        (load(math.nan), "they must be at least 0"),
        (kernel(math.inf), "they must be at least 0"),
        (load(1, start_s=-1), "they must be at least 0"),
        (load(1, flows=0), "its flows are 0"),
    ],
)
def test_wrong_tasks(wrong: Task, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        run([wrong])
    assert "\n" not in str(error.value) and "task 0 (t)" in str(error.value)


# --- random tasks ---------------------------------------------------------------------------------

TIMES = st.one_of(st.integers(0, 8).map(float), st.floats(0, 10, allow_subnormal=False))


LINKS, STREAMS = "xy", "ab"


@st.composite
def programs(draw: st.DrawFn) -> list[Task]:
    def loads() -> tuple[Load, ...]:
        count = draw(st.integers(0, 3))
        return tuple(
            Load(draw(st.sampled_from(LINKS)), draw(TIMES), draw(st.integers(1, 8)))
            for _ in range(count)
        )

    return [
        Task(
            name="t",
            cause="c",
            stream=draw(st.sampled_from(["", *STREAMS])),
            own_s=draw(TIMES),
            loads=loads(),
            after=tuple(draw(st.sets(st.integers(0, n - 1), max_size=3))) if n else (),
        )
        for n in range(draw(st.integers(1, 12)))
    ]


def longest_path_s(tasks: Sequence[Task]) -> float:
    ends: list[float] = []
    for one in tasks:
        ready_s = max((ends[other] for other in one.after), default=0.0)
        ends.append(ready_s + one.own_s + sum(load.seconds for load in one.loads))
    return max(ends)


def work_s(tasks: Sequence[Task], name: str) -> float:
    """Seconds for which a link or a stream is needed."""
    if name in STREAMS:
        return sum(one.seconds for one in tasks if one.stream == name)
    return sum(load.seconds for one in tasks for load in one.loads if load.link == name)


def close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)


@settings(max_examples=150)
@given(programs())
def test_bounds_of_every_schedule(tasks: list[Task]) -> None:
    events = run(tasks)
    total_s = max(event.end_s for event in events)
    assert total_s >= longest_path_s(tasks) * (1 - 1e-12)
    for name in (*LINKS, *STREAMS):
        assert total_s >= work_s(tasks, name) * (1 - 1e-12)
    serial_s = sum(one.seconds for one in tasks)
    assert total_s <= serial_s * (1 + 1e-12)
    assert close(max(e.end_s for e in run(one_by_one(tasks))), serial_s)
    assert run(tasks) == events
    chain = [events[number] for number in last_chain(events)]
    assert close(sum(event.seconds for event in chain), total_s)
    assert all(a.end_s == b.begin_s for a, b in itertools.pairwise(chain))


@settings(max_examples=150)
@given(programs())
def test_nothing_idles_that_could_run(tasks: list[Task]) -> None:
    events = run(tasks)
    carried = [
        (load, span)
        for one, event in zip(tasks, events, strict=True)
        for load, span in zip(one.loads, event.spans, strict=True)
    ]
    for load, span in carried:
        others = [(o, s) for o, s in carried if o.link == load.link]
        assert close(served_s(load, span, others), load.seconds)
    for one, event in zip(tasks, events, strict=True):
        ready_s = max((events[other].end_s for other in one.after), default=0.0)
        assert event.begin_s >= ready_s
        times = [event.begin_s + one.own_s, *(s.end_s for s in event.spans)]
        assert times[:-1] == [s.begin_s for s in event.spans] and close(times[-1], event.end_s)
        if not one.stream:
            assert event.begin_s == ready_s
            continue
        others = [e for e in events if e.task.stream == one.stream and e is not event]
        meet = [min(e.end_s, event.end_s) - max(e.begin_s, event.begin_s) for e in others]
        assert max(meet, default=0.0) <= 0
        # While it was ready and had not begun, others had its stream all the time.
        waited = [min(e.end_s, event.begin_s) - max(e.begin_s, ready_s) for e in others]
        assert close(sum(max(s, 0.0) for s in waited), event.begin_s - ready_s)


def served_s(load: Load, span: Span, there: Sequence[tuple[Load, Span]]) -> float:
    """What a load gets of a link if at every time each flow has an equal part."""
    times = sorted({time for _, s in there for time in s if span.begin_s <= time <= span.end_s})
    total_s = 0.0
    for begin_s, end_s in itertools.pairwise(times):
        flows = sum(o.flows for o, s in there if s.begin_s <= begin_s and end_s <= s.end_s)
        total_s += (end_s - begin_s) * load.flows / flows
    return total_s


# --- steps of networks ----------------------------------------------------------------------------

RATES = jaxlwp.Rates(
    flops_per_s=5e11,
    memory_bytes_per_s=5e10,
    latency_s=(4e-5, 1e-5),
    link_bytes_per_s=(1e9, 2e10),
)
SMALL = {
    "lenet": (LeNet5(), (28, 28, 1)),
    "resnet": (ResNet18(num_classes=10, stage_sizes=(1, 1), width=8), (32, 32, 3)),
    "unet": (UNet(depth=2, width=8, num_classes=3), (24, 16, 1)),
}


def system(gpus: int = 4, **across: Any) -> System:
    """Two hosts; unless changed, an adapter of 10 GB/s for every GPU."""
    links = {"bytes_per_s": 1e10, "start_s": 4e-5} | across
    return System(
        name="test",
        gpu=preset("h200").gpu,
        inside=Level(devices=gpus, bytes_per_s=1e11, start_s=1.5e-5),
        across=Level(devices=8 // gpus, **links),
    )


@pytest.fixture(scope="module")
def graphs() -> dict[str, jaxlwp.graph.ComputationGraph]:
    return {name: graph_of(*entry) for name, entry in SMALL.items()}


def graph_of(model: Any, shape: tuple[int, ...], batch: int = 16) -> Any:
    x = jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    variables = dict(jax.eval_shape(model.init, key, x))
    params = variables.pop("params")

    def loss(params: Any, stats: Any, seed: Any, x: Any) -> Any:
        out, changed = model.apply(
            {"params": params} | stats,
            x,
            train=True,
            mutable=list(stats),
            rngs={"dropout": jax.random.wrap_key_data(seed)},
        )
        return (out**2).mean(), changed

    return jaxlwp.trace(loss, params, variables, key, x)


def eight() -> list[Any]:
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    return jax.devices()[:8]


def mesh_of() -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(eight()).reshape(2, 2, 2), ("host0", "device0", "device1"))


def two_levels() -> DeviceGraph:
    graph = jaxlwp.device_graph(jaxlwp.make_mesh(eight()), rates=RATES)
    axes = [dataclasses.replace(axis, level=min(n, 1)) for n, axis in enumerate(graph.axes)]
    slow = dataclasses.replace(axes[0], latency_s=4e-5, bytes_per_s=1e9)
    return dataclasses.replace(graph, axes=(slow, *axes[1:]))


@pytest.fixture(scope="module")
def spaces(graphs: Any) -> dict[tuple[str, str], SearchSpace]:
    """Each network with plain rates, and on GPUs, whose prices count on what is hidden."""
    devices = {"rates": two_levels(), "gpus": system().device_graph(mesh_of())}
    return {
        (name, kind): jaxlwp.price(graphs[name], graph)
        for name in SMALL
        for kind, graph in devices.items()
    }


def strategies(space: SearchSpace) -> list[jaxlwp.Strategy]:
    """The baselines, what the search finds, and two drawn from the whole space."""
    draw = random.Random(1)
    found = [space.baseline(name) for name in jaxlwp.BASELINES]
    found.append(jaxlwp.search(space).strategy)
    for number in range(2):
        choices = [draw.randrange(len(known)) for known in space.configs]
        if math.isfinite(space.tables.evaluate(choices).total_s):
            found.append(space.strategy(f"random {number}", choices))
    return found


@pytest.mark.parametrize("name", SMALL)
def test_one_after_the_other_is_the_plain_sum(name: str, spaces: Any) -> None:
    space = spaces[name, "rates"]
    for strategy in strategies(space):
        found = simulate_step(space, strategy, overlap=False)
        assert found.more_s == {}
        assert found.total_s == pytest.approx(space.evaluate(strategy).total_s, rel=1e-9)
        assert found.exposed_s == pytest.approx(
            space.evaluate(strategy).transfer_s + space.evaluate(strategy).sync_s, rel=1e-9
        )


@pytest.mark.parametrize("name", SMALL)
def test_what_prices_of_gpus_hide_is_the_difference(name: str, spaces: Any) -> None:
    """Priced with nothing hidden on average, the plain sum is what the tasks take."""
    space = spaces[name, "gpus"]
    graph, devices = space.graph, space.devices
    assert devices.exposed_share < 1 and devices.bucket_bytes
    devices = dataclasses.replace(devices, exposed_share=1.0)
    model = dataclasses.replace(AnalyticCostModel.of(graph, devices), serial_share=1.0)
    whole = jaxlwp.price(graph, devices, model=model)
    for strategy in strategies(space):
        found = simulate_step(space, strategy, overlap=False)
        assert found.plain_s == space.evaluate(strategy).total_s
        assert found.total_s == pytest.approx(found.serial_s, rel=1e-9)
        assert found.total_s == pytest.approx(whole.evaluate(strategy).total_s, rel=1e-9)
        assert min(found.more_s.values(), default=0) >= 0


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("sums", ["behind", "ready"])
def test_overlap_is_between_its_bounds(name: str, sums: Any, spaces: Any) -> None:
    for kind, concurrent in (("rates", True), ("gpus", False)):
        space = spaces[name, kind]
        options: dict[str, Any] = {"sums": sums, "concurrent": concurrent}
        for strategy in strategies(space):
            found = simulate_step(space, strategy, **options)
            tasks = [event.task for event in found.events]
            assert found.total_s <= found.serial_s * (1 + 1e-9)
            assert found.total_s >= longest_path_s(tasks) * (1 - 1e-9)
            for use in found.resources:
                assert 0 <= use.exposed_s <= use.busy_s <= found.total_s * (1 + 1e-9)
                assert (use.name != "compute") or use.exposed_s == 0
            cost = space.evaluate(strategy)
            assert found.compute_s == pytest.approx(cost.compute_s + cost.overhead_s, rel=1e-9)
            assert found.total_s >= found.compute_s * (1 - 1e-9)
            assert sum(found.critical_s.values()) == pytest.approx(found.total_s, rel=1e-9)
            assert simulate_step(space, strategy, **options) == found


@pytest.mark.parametrize("name", SMALL)
def test_layers_wait_for_what_they_read(name: str, spaces: Any) -> None:
    space = spaces[name, "gpus"]
    names = {layer.index: layer.name for layer in space.graph.layers}
    for strategy in strategies(space):
        found = simulate_step(space, strategy, concurrent=True)
        at = {(e.task.cause, e.task.name): e for e in found.events if e.task.stream == "compute"}
        moved = {(e.task.layer, e.end_s) for e in by_cause(found, "change of layout")}
        for edge in space.graph.edges:
            if edge.use.argument or edge.source > edge.target:
                continue
            made, read = (at.get(("forward", names[n])) for n in (edge.source, edge.target))
            if made and read:
                assert made.end_s <= read.begin_s
                waits = [end for layer, end in moved if layer == edge.target and end < read.end_s]
                assert all(end <= read.begin_s for end in waits)
            back, sent = (at.get(("backward", names[n])) for n in (edge.source, edge.target))
            if edge.use.gradient and back and sent:
                assert sent.end_s <= back.begin_s


def test_shares_of_passes(graphs: Any) -> None:
    """The gradient of the images is not computed: LeNet-5's first convolution has two passes."""
    graph, devices = graphs["lenet"], two_levels()
    shares = {layer.index: pass_shares(layer, devices) for layer in graph.layers}
    for each in shares.values():
        assert sum(each) == pytest.approx(1, rel=1e-12) and min(each) >= 0 and each.forward > 0
    first, second = [shares[layer.index] for layer in graph.layers if layer.kind == "conv"]
    assert tuple(second) == pytest.approx((1 / 3,) * 3, abs=0.1)
    assert first.forward == pytest.approx(1 / 2, abs=0.05)
    assert 0.15 < first.parameters < second.parameters  # its activation's cotangent is not one
    pools = [shares[layer.index] for layer in graph.layers if layer.kind == "max_pool"]
    assert pools and all(each.parameters == 0 for each in pools)


# --- gradient sums --------------------------------------------------------------------------------


def by_cause(found: StepSimulation, cause: str) -> list[Event]:
    return [event for event in found.events if event.task.cause == cause]


def test_sums_behind_the_backward_pass_or_beside_it(graphs: Any) -> None:
    devices = dataclasses.replace(two_levels(), update_pass_byte_s=1e-9)
    space = jaxlwp.price(graphs["lenet"], devices)
    behind, ready = (simulate_step(space, "data", sums=sums) for sums in ("behind", "ready"))
    passed_s = max(event.end_s for event in by_cause(behind, "backward"))
    assert min(event.begin_s for event in by_cause(behind, "gradient sum")) == passed_s
    first = min(by_cause(ready, "gradient sum"), key=lambda event: event.begin_s)
    assert first.begin_s < max(event.end_s for event in by_cause(ready, "backward"))
    assert first.task.layer == max(e.task.layer or 0 for e in by_cause(ready, "gradient sum"))
    assert ready.total_s < behind.total_s
    sizes = [event.task.num_bytes for event in by_cause(behind, "gradient sum")]
    assert sizes == sorted(sizes)
    for found in (behind, ready):  # one at a time, and an update behind its sum
        summed = by_cause(found, "gradient sum")
        assert all(a.end_s <= b.begin_s for a, b in itertools.pairwise(summed))
        ends = {event.task.layer: event.end_s for event in summed}
        updates = by_cause(found, "update")
        assert len(updates) == len(ends) == 5
        assert all(event.begin_s >= ends[event.task.layer] for event in updates)


@pytest.mark.parametrize(("bucket_bytes", "count"), [(0, 10), (1e3, 8), (1e5, 3), (1e9, 1)])
def test_buckets(bucket_bytes: float, count: int, graphs: Any) -> None:
    """LeNet-5 has 3360, 40, 40320, 336, 192000, 480, 9600, 64, 600, 24 bytes, from the last."""
    devices = dataclasses.replace(
        jaxlwp.device_graph(jaxlwp.make_mesh(eight()), rates=RATES),
        bucket_bytes=bucket_bytes,
    )
    space = jaxlwp.price(graphs["lenet"], devices)
    found = by_cause(simulate_step(space, "data"), "gradient sum")
    assert len(found) == count
    assert sum(event.task.num_bytes for event in found) == 4 * 61_706
    serial = simulate_step(space, "data", overlap=False)
    assert serial.total_s == pytest.approx(space.evaluate(space.baseline("data")).total_s, rel=1e-9)


# --- branches and adapters ------------------------------------------------------------------------


def branches(params: Any, x: Any) -> Any:
    """Two convolutions of one image, added."""
    return sum((conv(x, w) ** 2).mean() for w in params)


def chain(params: Any, x: Any) -> Any:
    for w in params:
        x = conv(x, w)
    return (x**2).mean()


def conv(x: Any, w: Any) -> Any:
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def by_height(function: Any, devices: DeviceGraph) -> tuple[SearchSpace, jaxlwp.Strategy]:
    """Every layer split by height over all devices, the host's axis first."""
    params = [jax.ShapeDtypeStruct((3, 3, 16, 16), jnp.float32)] * 2
    x = jax.ShapeDtypeStruct((1, 64, 64, 16), jnp.float32)
    space = jaxlwp.price(jaxlwp.trace(function, params, x), devices)
    choices = [
        max(range(len(known)), key=lambda n, known=known: len(known[n].axes("height")))
        for known in space.configs
    ]
    return space, space.strategy("rows", choices)


def simulated(function: Any, concurrent: bool = False, **across: Any) -> StepSimulation:
    space, strategy = by_height(function, system(**across).device_graph(mesh_of()))
    return simulate_step(space, strategy, concurrent=concurrent)


def hidden_s(found: StepSimulation, collectives: Sequence[Event]) -> float:
    """Seconds of collectives during which kernels run."""
    kernels = [event for event in found.events if event.task.stream == "compute"]
    return sum(
        max(min(a.end_s, b.end_s) - max(a.begin_s, b.begin_s), 0.0)
        for a in collectives
        for b in kernels
    )


def test_forward_branches_hide_exchanges_and_a_chain_does_not() -> None:
    for devices in (two_levels(), system().device_graph(mesh_of())):
        found = simulate_step(*by_height(branches, devices))
        turn_s = min(event.begin_s for event in by_cause(found, "backward"))
        halos = [e for e in by_cause(found, "halo exchange") if e.begin_s < turn_s]
        assert halos and hidden_s(found, halos) > 0
        assert found.total_s < found.serial_s * (1 - 1e-6)
        found = simulate_step(*by_height(chain, devices))
        turn_s = min(event.begin_s for event in by_cause(found, "backward"))
        halos = by_cause(found, "halo exchange")
        forward = [event for event in halos if event.begin_s < turn_s]
        assert forward and hidden_s(found, forward) == 0
        # Backward, the gradients of a layer's filters are computed meanwhile.
        assert len(halos) > len(forward) and hidden_s(found, halos) > 0


def test_one_collective_at_a_time_unless_concurrent() -> None:
    alone, together = (simulated(branches, concurrent) for concurrent in (False, True))
    for found, count in ((alone, 1), (together, 2)):
        collectives = [event for event in found.events if event.task.stream != "compute"]
        most = max(
            sum(other.begin_s <= event.begin_s < other.end_s for other in collectives)
            for event in collectives
        )
        assert most >= count and (count > 1 or most == 1)
    assert sum(use.contended_s for use in alone.resources) == 0
    assert sum(use.contended_s for use in together.resources) > 0
    assert sum(use.contended_s for use in simulated(chain, True).resources) == 0


# --- adapters -------------------------------------------------------------------------------------


def across(found: StepSimulation, cause: str) -> list[tuple[Load, float]]:
    """Loads of adapters, and how long they took."""
    return [
        (load, span.end_s - span.begin_s)
        for event in by_cause(found, cause)
        for load, span in zip(event.task.loads, event.spans, strict=True)
        if load.link == "adapter"
    ]


def test_one_adapter_for_a_host_is_contended() -> None:
    """The same price: a quarter of 40 GB/s for each of four, or 10 GB/s of its own.

    With an adapter of its own nobody waits for other devices; in one adapter all of them meet.
    """
    own, shared = simulated(chain), simulated(chain, shared_by=4)
    assert own.plain_s == shared.plain_s
    adapters = [{use.name: use for use in found.resources}["adapter"] for found in (own, shared)]
    assert adapters[0].contended_s == 0 and "contention" not in own.critical_s
    assert adapters[1].contended_s > 0 and shared.critical_s["contention"] > 0
    sums = [across(found, "gradient sum") for found in (own, shared)]
    assert sums[0]
    for (alone, alone_s), (among, among_s) in zip(*sums, strict=True):
        assert (alone.flows, among.flows) == (1, 4)
        assert alone_s == pytest.approx(among_s, rel=1e-6)
        assert alone.seconds == pytest.approx(among.seconds, rel=1e-9)
    loads = [load for cause in shared.critical_s for load, _ in across(shared, cause)]
    less_s = sum(load.seconds * (1 - 1 / load.flows) for load in loads)
    assert adapters[1].contended_s == pytest.approx(less_s, rel=1e-6)


def test_where_one_device_of_a_host_sends_it_has_the_whole_adapter() -> None:
    """Of four devices in a row one has its neighbour in the other host."""
    own, shared = simulated(chain), simulated(chain, shared_by=4)
    halos = [across(found, "halo exchange") for found in (own, shared)]
    assert halos[0]
    for (alone, _), (among, _) in zip(*halos, strict=True):
        assert among.flows == 1
        assert among.seconds == pytest.approx(alone.seconds / 4, rel=1e-9)
    assert set(shared.more_s) > set(own.more_s)
    less_s = 0.75 * sum(load.seconds for load, _ in halos[0])
    assert shared.more_s["few devices of a host send"] == pytest.approx(-less_s, rel=1e-9)
    space, strategy = by_height(chain, system(shared_by=4).device_graph(mesh_of()))
    serial = simulate_step(space, strategy, overlap=False)
    assert serial.total_s == pytest.approx(serial.serial_s, rel=1e-9)
    assert shared.total_s < own.total_s


def test_adapters_of_systems() -> None:
    shared = {"dgx-1-p100": 2, "dgx-2": 2, "dgx-a100": 1, "dgx-h200": 1}
    for name, count in shared.items():
        across = preset(name, hosts=2).across
        assert across is not None and across.shared_by == count, name
    with pytest.raises(ValueError, match="shared_by is 0"):
        Level(devices=2, bytes_per_s=1.0, start_s=0.0, shared_by=0)
    with pytest.raises(ValueError, match="adapter_sharers is 0"):
        dataclasses.replace(two_levels(), adapter_sharers=0)
    graph = system(shared_by=4).device_graph(mesh_of())
    assert graph.adapter_sharers == 4
    assert DeviceGraph.from_json(json.loads(json.dumps(graph.to_json()))) == graph


@pytest.mark.parametrize("kind", jaxlwp.space.COLLECTIVES)
def test_stages_add_up_to_the_rate_of_a_collective(kind: str) -> None:
    devices = two_levels()
    names = tuple(devices.axis_sizes)
    for count in range(len(names) + 1):
        for axes in itertools.combinations(names, count):
            stages = devices.link_stages(kind, axes)
            assert sum(s for _, s in stages) == pytest.approx(
                devices.link_rate(kind, axes)[1], rel=1e-12
            )


# --- other prices, traces, errors -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Flat:
    """A cost model of the user's own: a second each for what the package prices."""

    inner: AnalyticCostModel

    def step_s(self, graph: Any) -> float:
        return 1.0

    def layer(self, layer: Any, configs: Any) -> Any:
        return type(self.inner.layer(layer, configs))(*np.ones((4, len(configs))))

    def transfer_s(self, use: Any, sources: Any, targets: Any) -> Any:
        return np.ones((len(sources), len(targets)))

    def behind(self, work_s: Any) -> Any:
        return self


def test_prices_of_another_model_add_up_too(graphs: Any) -> None:
    """Even where it charges communication that our programs do not have."""
    devices = system(shared_by=4).device_graph(mesh_of())
    graph = graphs["resnet"]
    space = jaxlwp.price(graph, devices, model=Flat(AnalyticCostModel.of(graph, devices)))
    found = simulate_step(space, "data", overlap=False)
    assert found.total_s == pytest.approx(found.serial_s, rel=1e-9)
    assert found.plain_s == 1 + 4 * len(graph.layers) + len(graph.edges)
    assert set(found.more_s) <= {"few devices of a host send"}
    assert simulate_step(space, "data").total_s <= found.total_s


def test_one_device(graphs: Any) -> None:
    devices = jaxlwp.device_graph(jaxlwp.make_mesh(jax.devices()[:1]), rates=RATES)
    space = jaxlwp.price(graphs["lenet"], devices)
    found = simulate_step(space, "data")
    assert found.total_s == pytest.approx(found.plain_s, rel=1e-9)
    assert (found.num_hosts, [use.name for use in found.resources]) == (
        1,
        ["compute", "communication"],
    )
    check_trace(found.trace(), ("compute", "waiting", "communication"))


@pytest.mark.parametrize("name", SMALL)
def test_trace(name: str, graphs: Any, tmp_path: Path) -> None:
    space = jaxlwp.price(graphs[name], system(shared_by=4).device_graph(mesh_of()))
    found = simulate_step(space, "spatial")
    found.save(tmp_path / "step.json")
    found.save(tmp_path / "step.json.gz")
    text = (tmp_path / "step.json").read_text()
    assert gzip.decompress((tmp_path / "step.json.gz").read_bytes()).decode() == text
    trace = json.loads(text, parse_constant=pytest.fail)
    assert trace == found.trace()
    check_trace(trace, ("compute", "waiting", "communication", "links", "adapter"))
    shown = by_thread(trace)
    seconds = {thread: sum(b - a for a, b in spans) for thread, spans in shown.items()}
    uses = {use.name: use for use in found.resources}
    for use in found.resources:
        assert seconds[use.name] == pytest.approx(use.busy_s, rel=1e-9)
    assert seconds["compute"] + seconds["waiting"] == pytest.approx(found.total_s, rel=1e-9)
    assert len(shown["compute"]) + len(shown["communication"]) == len(found.events)
    assert len({event["pid"] for event in trace["traceEvents"]}) == 2  # a device and a host
    assert uses["communication"].busy_s > uses["links"].busy_s + uses["adapter"].busy_s  # starts


def test_table(spaces: Any) -> None:
    found = simulate_step(spaces["lenet", "gpus"], "data")
    lines = str(found).splitlines()
    assert f"data on 8 devices, overlapped: {found.total_s * 1e3:.3g} ms a step" in lines[0]
    cells = [line.replace("│", " ").split() for line in lines]
    rows = {words[0]: words[1:] for words in cells if words}
    adapter = next(use for use in found.resources if use.name == "adapter")
    assert rows["adapter"] == [f"{s * 1e3:.3g}" for s in (adapter.busy_s, adapter.exposed_s)]
    assert rows["forward"] == [f"{found.critical_s['forward'] * 1e3:.3g}"]
    assert "gradient sums that prices hide +" in str(found)


def test_what_runs_at_once_has_threads_of_its_own() -> None:
    shown = by_thread(simulated(branches, concurrent=True).trace())
    assert "communication #2" in shown
    for spans in shown.values():
        for before, after in itertools.pairwise(sorted(spans)):
            assert before[1] <= after[0] + 1e-12


def by_thread(trace: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Beginning and end of a trace's spans, in seconds, by name of the thread."""
    names = {
        e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"
    }
    shown: dict[str, list[tuple[float, float]]] = {name: [] for name in names.values()}
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            begin_s = 1e-6 * event["ts"]
            shown[names[event["tid"]]].append((begin_s, begin_s + 1e-6 * event["dur"]))
    return shown


def test_a_plan_has_its_strategy(quick_measurements: None) -> None:
    params = [jnp.ones((3, 3, 16, 16))] * 2
    plan = jaxlwp.parallelize(chain, params, jnp.ones((8, 16, 16, 16)), measure=False)
    found = simulate_step(plan, overlap=False)
    assert found.strategy == plan.strategy.name
    assert found.total_s == pytest.approx(plan.cost.total_s, rel=1e-9)
    assert simulate_step(plan, "data").strategy == "data"


def test_the_page(
    quick_measurements: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What docs/simulate.md shows runs."""
    page = (Path(__file__).parents[1] / "docs" / "simulate.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    params = [jnp.ones((3, 3, 16, 16))] * 2
    plan = jaxlwp.parallelize(chain, params, jnp.ones((8, 16, 16, 16)), measure=False)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"plan": plan}
    exec(compile(program, "simulate.md", "exec"), names)
    assert names["found"].strategy == plan.strategy.name
    assert (tmp_path / "step.json.gz").exists()


def test_errors(graphs: Any) -> None:
    space = jaxlwp.price(graphs["lenet"], two_levels())
    with pytest.raises(ValueError, match="a space has many strategies"):
        simulate_step(space)
    with pytest.raises(ValueError, match="sums is 'now'; give one of behind, ready"):
        simulate_step(space, "data", sums="now")  # type: ignore[arg-type]
    tables = dataclasses.replace(
        space.tables, sync_s=tuple(np.full_like(c, np.inf) for c in space.tables.sync_s)
    )
    with pytest.raises(ValueError, match="strategy 'data' is not allowed"):
        simulate_step(dataclasses.replace(space, tables=tables), "data")
