"""Layer times: the local work of a layer, how it is keyed and measured, and how little is measured.

The clock itself is not tested: what is measured must be the layer's own forward and backward work
on one device's blocks, the same programs must have the same key, and the search must find the
optimum of the full table.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import jaxlwp
from jaxlwp.cost._collectives import use_source_layout
from jaxlwp.cost._model import AnalyticCostModel, temporary_bytes
from jaxlwp.devices import Measurement, Store, _calibrate, environment_of
from jaxlwp.devices._calibrate import _ring, fit_link, fit_wait
from jaxlwp.graph._graph import Layer
from jaxlwp.measure import _pages, _timing
from jaxlwp.measure import _timer as _measure
from jaxlwp.measure._local import LocalStep, local_step
from jaxlwp.measure._timer import LayerTimer, LayerTimes, TimingCache
from jaxlwp.optimize import _measured as _lazy
from jaxlwp.optimize._measured import measured_space, search_measured
from jaxlwp.program._program import Value
from jaxlwp.space._config import Config
from jaxlwp.space._layout import local_shape

AXES = {"a": 2, "b": 2}


def devices() -> jaxlwp.DeviceGraph:
    return jaxlwp.DeviceGraph(
        axes=tuple(
            jaxlwp.devices.MeshAxis(name=n, size=s, latency_s=6e-5, bytes_per_s=1e9)
            for n, s in AXES.items()
        ),
        conv_flops_per_s=1e10,
        dense_flops_per_s=1e10,
        memory_bytes_per_s=1e10,
    )


class Network(nn.Module):
    """Convolution, batch norm without statistics, pooling, dense."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(8, (3, 3), name="conv")(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(6, name="dense")(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def graph() -> jaxlwp.graph.ComputationGraph:
    return graph_of(batch=8)


def graph_of(batch: int) -> jaxlwp.graph.ComputationGraph:
    module = Network()
    x = jnp.zeros((batch, 8, 8, 4))
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), x))

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(module.apply(params, x) ** 2)

    return jaxlwp.trace(loss, params, x)


def layer(graph: jaxlwp.graph.ComputationGraph, name: str) -> Layer:
    return next(each for each in graph.layers if each.name == name)


class TestLocalStep:
    def test_unsplit_work_is_the_layer_and_its_gradients(
        self, graph: jaxlwp.graph.ComputationGraph
    ) -> None:
        step = local_step(graph, layer(graph, "conv"), Config(), AXES)
        generator = np.random.default_rng(1)
        operands = [generator.normal(size=v.shape).astype(np.float32) for v in step.operands]
        shapes = [v.shape for v in step.operands]
        w, b = (operands[shapes.index(s)] for s in ((3, 3, 4, 8), (8,)))
        cotangent, x = (operands[shapes.index(s)] for s in ((8, 8, 8, 8), (8, 8, 8, 4)))

        def conv(w: Any, b: Any) -> Any:
            y = jax.lax.conv_general_dilated(
                x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return jax.nn.relu(y + b)

        y, back = jax.vjp(conv, w, b)
        expected = {v.shape: v for v in (y, *back(jnp.asarray(cotangent)))}
        results = step(*operands)
        assert len(results) == step.carried == 3
        for result, value in zip(results, step.operands, strict=False):
            assert result.shape == value.shape
            np.testing.assert_allclose(result, expected[result.shape], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("splits", "block"),
        [
            ((("sample", ("a", "b")),), (2, 8, 8, 8)),
            ((("height", ("a",)), ("width", ("b",))), (8, 4, 4, 8)),
            ((("channel", ("a", "b")),), (8, 8, 8, 2)),
            ((("reduction", ("b",)), ("sample", ("a",))), (4, 8, 8, 8)),
        ],
    )
    def test_it_runs_on_one_block(
        self, graph: jaxlwp.graph.ComputationGraph, splits: Any, block: tuple[int, ...]
    ) -> None:
        step = local_step(graph, layer(graph, "conv"), Config(splits), AXES)
        operands = [jnp.ones(v.shape, v.dtype) for v in step.operands]
        results = jax.jit(step)(*operands)
        assert block in [r.shape for r in results]
        assert [r.shape for r in results[: step.carried]] == [
            v.shape for v in step.operands[: step.carried]
        ]
        names = {eqn.name for eqn in step.program.equations}
        text = str(jax.make_jaxpr(step)(*operands))
        assert not any(name in text for name in ("psum", "ppermute", "all_gather", "axis_index"))
        assert names  # the collectives are in the program, and left out when it runs

    def test_key_ignores_which_axes_split(self, graph: jaxlwp.graph.ComputationGraph) -> None:
        conv = layer(graph, "conv")
        keys = [local_step(graph, conv, Config((("sample", (axis,)),)), AXES).key for axis in "ab"]
        other = local_step(graph, conv, Config((("channel", ("a",)),)), AXES).key
        assert keys[0] == keys[1] != other


class TestLayerTimer:
    def timer(self, graph: jaxlwp.graph.ComputationGraph) -> LayerTimer:
        return LayerTimer(graph, devices(), jax.devices()[:4], TimingCache())

    def test_measures_once(self, graph: jaxlwp.graph.ComputationGraph) -> None:
        timer = self.timer(graph)
        conv = layer(graph, "conv")
        pairs = [(conv, Config((("sample", (axis,)),))) for axis in "ab"]
        assert timer.known_s(*pairs[0]) is None
        calls: list[tuple[str, int, int]] = []
        assert timer.measure(pairs, lambda *call: calls.append(call)) == 1
        assert calls[-1] == ("measuring layers", 1, 1)
        seconds = timer.known_s(*pairs[0])
        assert seconds is not None
        assert 0 < seconds < math.inf
        assert timer.known_s(*pairs[1]) == seconds
        assert timer.measure(pairs) == 0

    def test_equal_programs_are_found(self, graph: jaxlwp.graph.ComputationGraph) -> None:
        timer = self.timer(graph)
        conv = layer(graph, "conv")
        config = Config((("sample", ("a",)),))
        program = local_step(graph, conv, config, AXES).key
        timer.cache.put({"another": Measurement(seconds=1.25, program=program)})
        assert timer.measure([(conv, config)]) == 0
        assert timer.known_s(conv, config) == 1.25

    @pytest.mark.parametrize(
        ("each_s", "median_s"),
        [([1.0, 1.04], 1.02), ([1.0, 2.0, 1.2], 1.2), ([1e-6, 1.9e-5], 1e-5)],
    )
    def test_measures_until_two_agree(
        self,
        graph: jaxlwp.graph.ComputationGraph,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        each_s: list[float],
        median_s: float,
    ) -> None:
        """Or three are there. Their median is the time of all that run the program, on disk too.

        A small part of what a step takes anyway is agreement, too.
        """
        seconds = iter([each_s[0], 10.0, *each_s[1:]])

        def timed(steps: Sequence[LocalStep], *_: Any) -> list[Measurement]:
            return [Measurement(seconds=next(seconds), samples=4, spread=0.1) for _ in steps]

        monkeypatch.setattr(_measure, "time_together", timed)
        rates, mesh = replace(devices(), step_s=1e-3), jax.devices()[:4]
        environment = environment_of(mesh)
        cache = TimingCache(Store(tmp_path / "store"), environment)
        timer = LayerTimer(graph, rates, mesh, cache)
        conv, dense = layer(graph, "conv"), layer(graph, "dense")
        pairs = [(conv, Config((("sample", (axis,)),))) for axis in "ab"]
        other, unknown = (dense, Config()), (dense, Config((("sample", ("a",)),)))
        timer.measure([pairs[0], other])
        timer.measure(pairs)
        calls: list[tuple[str, int, int]] = []
        again = [pairs[0], unknown, pairs[1]]
        for _ in each_s[1:]:
            assert timer.confirm(again, lambda *call: calls.append(call)) == 1
        assert calls[-1] == ("measuring layers again", 1, 1)
        kept = LayerTimer(graph, rates, mesh, TimingCache(cache.store, environment))
        for each in (timer, kept):
            assert each.confirm(again) == 0
            assert [each.known_s(*pair) for pair in pairs] == pytest.approx([median_s] * 2)
            assert each.known_s(*other) == 10.0
            assert each.known_s(*unknown) is None
            entry = each.cache.get(each.key(*pairs[0]))
            assert entry is not None
            assert (entry.samples, entry.each_s) == (4 * len(each_s), tuple(each_s))
        with pytest.raises(StopIteration):
            next(seconds)

    def test_another_program_is_not_confirmed_but_measured(
        self, graph: jaxlwp.graph.ComputationGraph, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An older version may have run something else for a layer."""
        monkeypatch.setattr(
            _measure, "time_together", lambda steps, *_: [Measurement(seconds=3.0) for _ in steps]
        )
        timer, conv = self.timer(graph), layer(graph, "conv")
        pairs = [(conv, Config((("sample", axes),))) for axes in (("a",), ("a", "b"))]
        older = Measurement(seconds=1.0, program="older")
        timer.cache.put({timer.key(*pair): older for pair in pairs})
        assert timer.confirm(pairs[:1]) == 1
        assert [timer.known_s(*pair) for pair in pairs] == [3.0, 1.0]
        assert timer.confirm(pairs) == 2
        assert timer.confirm(pairs) == 1  # the second, which was measured once by now
        assert timer.confirm(pairs) == 0

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "key"])
    def test_large_operands_repeat_few_random_values(
        self, graph: jaxlwp.graph.ComputationGraph, dtype: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_timing, "RANDOM_VALUES", 5)
        mesh = Mesh(np.array(jax.devices()[:2]), ("device",))
        step = local_step(graph, layer(graph, "conv"), Config(), AXES)
        value = Value((3, 4), jax.random.key(0).dtype if dtype == "key" else jnp.dtype(dtype))
        array = _timing._Runner(step, mesh, devices()).random(value, 1)
        assert (array.shape, array.dtype) == ((2, *value.shape), value.dtype)
        assert {shard.data.shape for shard in array.addressable_shards} == {(1, *value.shape)}
        if dtype == "int32":
            assert not np.any(array)
        elif dtype != "key":
            first, second = np.asarray(array, np.float32).reshape(2, -1)
            np.testing.assert_array_equal(first, second)
            np.testing.assert_array_equal(first[5:], first[:7])
            assert len(set(first)) == 5

    @pytest.mark.parametrize(
        ("pages", "byte_s", "seconds"),
        [(0, 1.0, 1.0), (10, 0.01, 0.8), (10, 1.0, 0.25), (10**12, 1e-9, 1 - 1e-9 * 400)],
    )
    def test_new_memory_is_left_out(
        self,
        graph: jaxlwp.graph.ComputationGraph,
        monkeypatch: pytest.MonkeyPatch,
        pages: int,
        byte_s: float,
        seconds: float,
    ) -> None:
        """As many pages as the run took, of the program's own arrays; no layer comes out free."""
        mesh = Mesh(np.array(jax.devices()[:2]), ("device",))
        step = local_step(graph, layer(graph, "conv"), Config(), AXES)
        monkeypatch.setattr(_timing._pages, "page_bytes", lambda: 4.0)
        rates = replace(devices(), first_touch_byte_s=((1e6, byte_s),), leaf_s=0.0)
        runner = _timing._Runner(step, mesh, rates, copies=1, allocated_bytes=400, fixed=[[]])
        runner.times_s, runner.pages = [1.0, 1.2, 1.4], 3 * [pages]
        assert runner.timing(call_s=0.2).seconds == pytest.approx(seconds)

    def test_pages_are_counted(self) -> None:
        """New memory is, memory in use is not."""
        if not _pages.taken():
            pytest.skip("this operating system counts no pages")
        x = jax.device_put(np.ones(1 << 25, np.float32), jax.devices("cpu")[0])
        shares = []
        for donated in ((), 0):
            program = jax.jit(lambda x: x + 1.0, donate_argnums=donated).lower(x).compile()
            before = _pages.taken()
            x = jax.block_until_ready(program(x))
            shares.append((_pages.taken() - before) * _pages.page_bytes() / x.nbytes)
        anew, again = shares
        assert again < 0.1 < 0.5 < anew


class Table:
    """Times by rule, given away when asked to measure."""

    def __init__(
        self,
        seconds: Callable[[Layer, Config], float],
        key: Callable[[Layer, Config], Hashable] | None = None,
    ) -> None:
        self.seconds, self.asked = seconds, set[Hashable]()
        self.key = key or (lambda layer, config: (layer.index, config))

    def known_s(self, layer: Layer, config: Config) -> float | None:
        return self.seconds(layer, config) if self.key(layer, config) in self.asked else None

    def measure(self, pairs: Sequence[tuple[Layer, Config]], progress: Any = None) -> int:
        fresh = {self.key(layer, config) for layer, config in pairs} - self.asked
        assert fresh, "asked to measure what is known"
        self.asked |= fresh
        return len(fresh)

    def confirm(self, pairs: Sequence[tuple[Layer, Config]], progress: Any = None) -> int:
        return 0


class Noisy(Table):
    """Times by rule with noise, which a second measurement halves."""

    def __init__(self, seconds: Callable[[Layer, Config], float], seed: int) -> None:
        super().__init__(seconds)
        self.random, self.true_s = random.Random(seed), seconds
        self.seconds = lambda layer, config: statistics.mean(self.each_s[layer.index, config])
        self.each_s: dict[Hashable, list[float]] = {}

    def draw(self, layer: Layer, config: Config) -> None:
        noisy_s = self.true_s(layer, config) * self.random.uniform(0.8, 1.2)
        self.each_s.setdefault((layer.index, config), []).append(noisy_s)

    def measure(self, pairs: Sequence[tuple[Layer, Config]], progress: Any = None) -> int:
        for pair in pairs:
            self.draw(*pair)
        return super().measure(pairs, progress)

    def confirm(self, pairs: Sequence[tuple[Layer, Config]], progress: Any = None) -> int:
        assert not any(layer.fused for layer, _ in pairs)
        once = [(n, c) for n, c in pairs if len(self.each_s.get((n.index, c), ())) == 1]
        for layer, config in once:
            if len(self.each_s[layer.index, config]) == 1:
                self.draw(layer, config)
        return len(once)


def chain_space(num_layers: int) -> jaxlwp.cost.SearchSpace:
    """Equal convolutions, one after the other.

    Splits by sample are a sixth faster than others, and a change of config between two of
    them takes as long as four tenths of one.
    """
    module = nn.Sequential([nn.Conv(4, (3, 3)) for _ in range(num_layers)])
    x = jnp.zeros((8, 8, 8, 4))
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), x))

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(module.apply(params, x) ** 2)

    space = jaxlwp.price(jaxlwp.trace(loss, params, x), devices())
    by_sample = Config.of({"sample": ("a", "b")})
    convs = [each.kind == "conv" for each in space.graph.layers]
    tables = jaxlwp.solver.CostTables(
        compute_s=tuple(
            np.array([(1.0 if c == by_sample else 1.2) if conv else 0.01 for c in configs])
            for conv, configs in zip(convs, space.configs, strict=True)
        ),
        sync_s=tuple(np.zeros(len(configs)) for configs in space.configs),
        edges=space.tables.edges,
        transfer_s=tuple(
            np.array(
                [
                    [0.4 * (convs[i] and convs[j] and a != b) for b in space.configs[j]]
                    for a in space.configs[i]
                ]
            )
            for i, j in space.tables.edges
        ),
    )
    return replace(space, tables=tables, model=None)


def pairs_of(found: jaxlwp.optimize.SearchResult) -> list[tuple[Layer, Config]]:
    return found.space.pairs(found.strategy)


class TestLazySearch:
    @pytest.mark.parametrize("seed", range(20))
    def test_same_optimum_as_the_full_table(
        self, graph: jaxlwp.graph.ComputationGraph, seed: int
    ) -> None:
        """Times at most a fifth apart from three times the analytic ones."""
        space = jaxlwp.price(graph, devices())
        generator = random.Random(seed)
        factors = {
            (layer.index, config): generator.uniform(0.8, 1.0)
            for layer, configs in zip(graph.layers, space.configs, strict=True)
            for config in configs
        }

        def seconds(layer: Layer, config: Config) -> float:
            place = space.configs[layer.index].index(config)
            analytic = float(space.tables.compute_s[layer.index][place])
            return max(analytic, 1e-9) * factors[layer.index, config] * 3

        every = Table(seconds)
        for each, configs in zip(graph.layers, space.configs, strict=True):
            every.measure([(each, config) for config in configs])
        full = jaxlwp.search(measured_space(space, every))
        table = Table(seconds)
        found = search_measured(space, table)
        assert found.cost.total_s == pytest.approx(full.cost.total_s, rel=1e-12)
        chosen = zip(graph.layers, found.strategy.for_graph(graph), strict=True)
        assert all(each.fused or (each.index, config) in table.asked for each, config in chosen)
        assert found.space.num_measured < found.space.num_pairs

    @pytest.mark.parametrize(
        ("shared", "together", "same"), [(True, 0.0, True), (False, 0.0, False), (False, 0.5, True)]
    )
    def test_blocks_are_hoped_for_together(
        self, monkeypatch: pytest.MonkeyPatch, shared: bool, together: float, same: bool
    ) -> None:
        """One block alone in another layout does not pay for the change, and all of them do.

        Blocks of one program are hoped for together, and everything is while little is measured.
        """
        monkeypatch.setattr(_lazy, "TOGETHER", together)
        space = chain_space(num_layers=8)
        fast = Config.of({"height": ("a", "b")})

        def seconds(layer: Layer, config: Config) -> float:
            if layer.kind != "conv":
                return 0.01
            return 0.75 if config == fast else 1.0

        known = LayerTimes(space.graph, AXES, TimingCache())
        table = Table(seconds, known.key if shared else None)
        found = search_measured(space, table)
        every = Table(seconds)
        for each, configs in zip(space.graph.layers, space.configs, strict=True):
            every.measure([(each, config) for config in configs])
        full = jaxlwp.search(measured_space(space, every))
        optimum = zip(space.graph.layers, full.strategy.for_graph(space.graph), strict=True)
        assert {config for each, config in optimum if each.kind == "conv"} == {fast}
        assert (found.solution.choices == full.solution.choices) == same

    def test_tolerance_measures_less_and_states_the_gap(
        self, graph: jaxlwp.graph.ComputationGraph
    ) -> None:
        space = jaxlwp.price(graph, devices())

        def seconds(layer: Layer, config: Config) -> float:
            place = space.configs[layer.index].index(config)
            return max(float(space.tables.compute_s[layer.index][place]), 1e-9)

        exact, loose = Table(seconds), Table(seconds)
        optimum = search_measured(space, exact)
        found = search_measured(space, loose, tolerance=0.5)
        assert len(loose.asked) < len(exact.asked)
        assert found.cost.total_s <= optimum.cost.total_s * 1.5
        bound_s = found.solution.lower_bound_s
        assert bound_s <= optimum.solution.cost_s * (1 + 1e-12)
        assert found.optimal == (bound_s == found.solution.cost_s)

    @pytest.mark.parametrize(
        ("share", "per_layer", "least", "programs"),
        [(0.0, 0, 0, 4), (0.15, 0, 0, 8), (0.0, 2, 0, 6), (0.0, 0, 5, 5), (1.0, 0, 0, 21)],
    )
    def test_hopes_have_a_limit_and_what_is_left_is_the_gap(
        self,
        monkeypatch: pytest.MonkeyPatch,
        share: float,
        per_layer: int,
        least: int,
        programs: int,
    ) -> None:
        """Four programs are picked; most of the others are hoped for, in seven layers at once."""
        for name, value in (("AT_MOST", share), ("PER_LAYER", per_layer), ("LEAST", least)):
            monkeypatch.setattr(_lazy, name, value)
        monkeypatch.setattr(_lazy, "TOGETHER", 0.0)
        space = chain_space(num_layers=8)

        def seconds(layer: Layer, config: Config) -> float:
            place = space.configs[layer.index].index(config)
            return float(space.tables.compute_s[layer.index][place])

        class OneOfALayer(Table):
            def measure(self, pairs: Sequence[tuple[Layer, Config]], progress: Any = None) -> int:
                assert len({layer.index for layer, _ in pairs}) == len(pairs)
                return super().measure(pairs, progress)

        table = OneOfALayer(seconds, LayerTimes(space.graph, AXES, TimingCache()).key)
        found = search_measured(space, table)
        assert len(table.asked) == programs
        assert found.optimal == (share == 1.0)
        assert (found.gap > 0) == (share < 1.0)

    @pytest.mark.parametrize("seed", range(10))
    def test_it_rests_on_confirmed_times(
        self, graph: jaxlwp.graph.ComputationGraph, seed: int
    ) -> None:
        """Of the strategy found, and of data parallelism as far as it was measured."""
        space = jaxlwp.price(graph, devices())

        def seconds(layer: Layer, config: Config) -> float:
            place = space.configs[layer.index].index(config)
            return max(float(space.tables.compute_s[layer.index][place]), 1e-9)

        table = Noisy(seconds, seed)
        found = search_measured(space, table)
        for strategy in (found.strategy, space.baseline("data")):
            for each, config in space.pairs(strategy):
                times_s = table.each_s.get((each.index, config), [])
                assert each.fused or len(times_s) in ({2} if strategy == found.strategy else {0, 2})
        assert max(map(len, table.each_s.values())) == 2

    @pytest.mark.parametrize("confirms", [True, False])
    def test_what_was_measured_too_low_is_not_kept(self, confirms: bool) -> None:
        """Two splits look fast; of the one that does only by chance no layer keeps it."""
        space = chain_space(num_layers=8)
        lucky, fast = Config.of({"height": ("a", "b")}), Config.of({"sample": ("a", "b")})

        class Lucky(Table):
            confirmed = not confirms
            pairs: Sequence[tuple[Layer, Config]] = ()

            def confirm(self, pairs: Sequence[tuple[Layer, Config]], progress: Any = None) -> int:
                if self.confirmed:
                    return 0
                self.confirmed, self.pairs = True, pairs
                return len(pairs)

        def seconds(layer: Layer, config: Config) -> float:
            if layer.kind != "conv":
                return 0.01
            return 0.75 if config == lucky and table.confirmed != confirms else 1.0

        table = Lucky(seconds, LayerTimes(space.graph, AXES, TimingCache()).key)
        found = search_measured(space, table)
        chosen = {config for each, config in pairs_of(found) if each.kind == "conv"}
        assert chosen == ({fast} if confirms else {lucky})
        if confirms:  # of every layer what was found first, and then what data parallelism does
            assert [config for each, config in table.pairs if each.kind == "conv"] == [
                lucky, fast
            ] * 8  # fmt: skip

    def test_a_batch_that_devices_do_not_divide_has_no_data_parallelism(self) -> None:
        """What is found is confirmed nevertheless."""
        graph = graph_of(batch=6)
        space = jaxlwp.price(graph, devices())
        with pytest.raises(ValueError, match="do not divide"):
            space.baseline("data")
        table = Noisy(lambda layer, config: 1.0, seed=0)
        found = search_measured(space, table)
        chosen = [(n.index, c) for n, c in pairs_of(found) if not n.fused]
        assert {len(table.each_s[pair]) for pair in chosen} == {2}

    def test_a_timer_that_does_not_measure_is_named(
        self, graph: jaxlwp.graph.ComputationGraph
    ) -> None:
        class Idle:
            def key(self, layer: Layer, config: Config) -> int:
                return layer.index

            def known_s(self, layer: Layer, config: Config) -> None:
                return None

            def measure(self, pairs: Any, progress: Any = None) -> int:
                return 0

            confirm = measure

        with pytest.raises(ValueError, match="Idle was asked to measure layer"):
            search_measured(jaxlwp.price(graph, devices()), Idle())

    def test_waits_are_priced_where_layers_wait(self, graph: jaxlwp.graph.ComputationGraph) -> None:
        """Not for gradients: no layer waits for them."""
        plain = jaxlwp.price(graph, devices())
        waited = jaxlwp.price(graph, replace(devices(), wait_s=1.0))
        data = plain.baseline("data")
        assert waited.evaluate(data).sync_s == plain.evaluate(data).sync_s
        model, costs = plain.baseline("model"), []
        for space in (plain, waited):
            costs.append(space.evaluate(model).transfer_s)
        assert costs[1] - costs[0] == pytest.approx(round(costs[1] - costs[0]), abs=1e-6)
        assert costs[1] - costs[0] >= 2

    def test_devices_wait_less_behind_short_work(
        self, graph: jaxlwp.graph.ComputationGraph
    ) -> None:
        """Next to nothing behind work of no length, and at most as long as behind long work."""
        names = ("conv_flops_per_s", "dense_flops_per_s", "memory_bytes_per_s")
        curve = replace(devices(), wait_s=2.0, wait_work_s=1e-3)
        short_s, long_s = (
            AnalyticCostModel.of(graph, replace(curve, **dict.fromkeys(names, rate))).wait_s
            for rate in (1e15, 1e3)
        )
        assert 0 < short_s < 1e-4
        assert long_s == pytest.approx(2.0, rel=1e-2)
        assert curve.wait_after_s(0.0) == 0.0
        assert curve.wait_after_s(1e-3) == pytest.approx(1.0)
        assert replace(devices(), wait_s=2.0).wait_after_s(0.0) == 2.0  # no curve known

    def test_waits_are_those_behind_measured_work(
        self, graph: jaxlwp.graph.ComputationGraph
    ) -> None:
        """Devices wait half as long as they can behind layers of twice `wait_work_s`."""
        curve = replace(devices(), wait_s=2.0, wait_work_s=1e-3)
        space = jaxlwp.price(graph, curve)
        table = Table(lambda layer, config: 2e-3)
        for layer, configs in zip(graph.layers, space.configs, strict=True):
            table.measure([(layer, config) for config in configs])
        found = measured_space(space, table)
        waited = jaxlwp.price(graph, replace(devices(), wait_s=1.0)).tables
        assert found.tables.step_s == pytest.approx(waited.step_s)
        for kind in ("exchange_s", "sync_s", "transfer_s"):
            for costs, expected in zip(
                getattr(found.tables, kind), getattr(waited, kind), strict=True
            ):
                np.testing.assert_allclose(costs, expected, rtol=1e-9)
        again = measured_space(found, Table(lambda layer, config: 1.0))  # nothing is known now
        assert again.tables.step_s < found.tables.step_s

    def test_new_memory_counts_above_a_size_and_for_copies(
        self, graph: jaxlwp.graph.ComputationGraph
    ) -> None:
        """A tensor in another layout is new memory; one that stays where it is takes none."""
        needed = temporary_bytes(graph, devices().num_devices)
        spaces = [
            jaxlwp.price(graph, replace(devices(), first_touch_byte_s=((least_bytes, 1.0),)))
            for least_bytes in (2 * needed, needed)
        ]
        fits, grows = (space.tables.transfer_s for space in spaces)
        assert max(map(np.max, spaces[0].tables.overhead_s)) < 1
        assert max(map(np.max, spaces[1].tables.overhead_s)) > 1
        assert any(np.any(more > less) for less, more in zip(fits, grows, strict=True))
        sizes = devices().axis_sizes
        for edge, less, more in zip(graph.edges, fits, grows, strict=True):
            for i, source in enumerate(spaces[0].configs[edge.source]):
                for j, target in enumerate(spaces[0].configs[edge.target]):
                    layout = target.layout(edge.use.labels)
                    block = local_shape(edge.use.info.shape, layout, sizes)
                    stays = use_source_layout(edge.use, source, sizes) == layout
                    copied = 0 if stays else math.prod(block) * edge.use.info.itemsize
                    assert more[i, j] - less[i, j] == pytest.approx(copied, abs=1e-6)

    @pytest.mark.parametrize(
        ("loss", "waits"),
        [
            (lambda y: jnp.mean(y**2), 0),  # returned, no more: the devices meet anyway
            (lambda y: 0.1 * jnp.sum(y**2) / y.size + 1.0, 0),
            (lambda y: jnp.sqrt(jnp.sum(y**2)), 1),  # its derivative needs the sum
            (lambda y: jnp.sum(y**2) ** 2, 1),
            (lambda y: jnp.sum(jnp.where(y > 0, y, 0)) / jnp.sum(y > 0), 1),  # the divisor
            (lambda y: jnp.sum(y) * jnp.sum(y**2), 1),  # both at once: XLA joins them
            (lambda y: jnp.mean((y - jnp.mean(y, axis=0)) ** 2), 2),  # forward and backward
        ],
    )
    def test_nothing_waits_for_the_loss(self, loss: Callable[[Any], Any], waits: int) -> None:
        graph = jaxlwp.trace(
            lambda w, x: loss(jnp.tanh(x @ w)), jnp.zeros((4, 8)), jnp.zeros((16, 4))
        )
        spaces = [jaxlwp.price(graph, replace(devices(), wait_s=s)) for s in (0.0, 1.0)]
        without_s, with_s = (s.evaluate(s.baseline("data")).transfer_s for s in spaces)
        assert with_s - without_s == pytest.approx(waits, abs=1e-6)


class TestFit:
    def test_a_line_is_found(self) -> None:
        sizes = [1e3, 1e5, 1e6, 1e7]
        fit = fit_link("all-reduce", (1,), sizes, [2e-5 + 3e-10 * s for s in sizes])
        assert fit.latency_s == pytest.approx(2e-5)
        assert fit.byte_s == pytest.approx(3e-10)
        assert fit.residual < 1e-9

    @pytest.mark.parametrize("half_s", [1e-3, 8e-3])
    def test_a_curve_is_found(self, half_s: float) -> None:
        work_s = np.array([5e-4, 2e-3, 5e-3, 1e-2, 2e-2])
        found = fit_wait(work_s, 2e-3 * work_s / (work_s + half_s))
        assert found == pytest.approx((2e-3, half_s), rel=0.1)

    def test_no_more_is_made_up_than_was_measured(self) -> None:
        """Of waits that have not levelled off, how long they get is unknown."""
        wait_s, _ = fit_wait(np.array([1e-3, 5e-3, 1e-2]), np.array([1e-4, 5e-4, 1e-3]))
        assert 1e-3 < wait_s < 2.5e-3

    def test_nobody_waits_less_than_nothing(self) -> None:
        wait_s, half_s = fit_wait(np.array([1e-3, 1e-2]), np.array([-1e-4, -2e-4]))
        assert wait_s == 0.0
        assert half_s > 0

    def test_terms_are_never_negative(self) -> None:
        falling = fit_link("all-reduce", (1,), [1e3, 1e6], [2e-3, 1e-3])
        steep = fit_link("all-reduce", (1,), [1e3, 1e6], [1e-9, 1e-3])
        for fit in (falling, steep):
            assert fit.latency_s >= 0
            assert fit.byte_s >= 0
        assert falling.byte_s == 0
        latency_s, bytes_per_s = _ring([falling], 0, 2)
        assert latency_s > 0 and np.isfinite(bytes_per_s)

    def test_a_fit_takes_the_place_of_the_ring(self) -> None:
        plain = devices()
        fit = jaxlwp.devices.LinkFit(
            kind="all-reduce", axes_per_group=(2,), latency_s=1.0, byte_s=2.0, residual=0.1
        )
        fitted = jaxlwp.DeviceGraph(
            axes=plain.axes,
            conv_flops_per_s=1.0,
            dense_flops_per_s=1.0,
            memory_bytes_per_s=1.0,
            links=(fit,),
        )
        assert fitted.link_rate("all-reduce", ("a", "b")) == (1.0, 2.0)
        assert fitted.link_rate("all-reduce", ("a",)) == plain.link_rate("all-reduce", ("a",))
        assert jaxlwp.DeviceGraph.from_json(fitted.to_json()) == fitted


class TestOverhead:
    def rates(self) -> jaxlwp.DeviceGraph:
        plain = devices()
        return jaxlwp.DeviceGraph(
            axes=plain.axes,
            conv_flops_per_s=1e10,
            dense_flops_per_s=1e10,
            memory_bytes_per_s=1e10,
            update_pass_byte_s=1e-9,
            step_s=0.5,
            leaf_s=0.25,
        )

    def test_update_follows_how_parameters_are_split(
        self, graph: jaxlwp.graph.ComputationGraph
    ) -> None:
        space = jaxlwp.price(graph, self.rates(), optimizer_slots=2)
        conv = layer(graph, "conv")
        costs = dict(
            zip(space.configs[conv.index], space.tables.overhead_s[conv.index], strict=True)
        )
        kernel, bias, passes = 3 * 3 * 4 * 8, 8, 3 + 2 * 2
        whole = costs[Config((("sample", ("a", "b")),))]
        split = costs[Config((("channel", ("a", "b")),))]
        assert whole == pytest.approx(1e-9 * 4 * passes * (kernel + bias))
        assert split == pytest.approx(whole / 4)

    def test_every_array_of_the_state_counts(self, graph: jaxlwp.graph.ComputationGraph) -> None:
        space = jaxlwp.price(graph, self.rates(), optimizer_slots=2)
        inputs = len(graph.program.inputs)
        assert space.tables.step_s == pytest.approx(
            0.5 + 0.25 * (inputs + 2 * graph.num_parameters)
        )
        cost = space.evaluate(space.baseline("data"))
        assert cost.total_s == pytest.approx(
            cost.compute_s + cost.transfer_s + cost.sync_s + cost.overhead_s
        )


@pytest.mark.parametrize("bytes_per_s, largest", [(1e12, 1 << 23), (4e6, 1 << 20), (1e5, 1 << 16)])
def test_slow_links_are_measured_with_smaller_operands(
    bytes_per_s: float, largest: int, mesh22: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No collective of the sweep is longer than a second, by what smaller ones took."""
    asked: list[tuple[int, int]] = []

    def in_place_s(mesh: Mesh, body: Any, x: Any, copies: Any, repeats: int) -> float:
        num_bytes = x.nbytes // mesh.size
        asked.append((num_bytes, sum(copies) * (repeats + 1)))
        return 1e-5 + num_bytes / bytes_per_s

    monkeypatch.setattr(_calibrate, "_in_place_s", in_place_s)
    fit = _calibrate._link_fit(mesh22, "all-gather", ("a",), (1,))
    assert asked[-1][0] == largest
    assert all(runs * num_bytes / bytes_per_s <= 10 for num_bytes, runs in asked[2:])
    np.testing.assert_allclose(fit.byte_s, 1 / bytes_per_s, rtol=1e-6)
