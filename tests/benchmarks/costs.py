"""How true the costs are, on simulated devices: `make bench-costs`.

Three parts, each with a table and its rows in results/costs.json:

- accuracy: predicted against measured step times of the strategy found, all baselines and random
  strategies, from layers measured between the steps; median and 90th percentile of the absolute
  error, Kendall's tau of the order, regret of the strategy found (its measured time over the best
  of all), and of what `check="measure"` keeps of it and data parallelism, or, asked to, of it and
  all baselines.
- lazy: the search that measures what it picks against the fully measured table, and on copies of
  this table with noise.
- warm: a second `parallelize` of AlexNet with a warm cache.

Every model runs in a process of its own, with its number of simulated devices. The strategies of a
model take turns, and medians count. `--models`, `--devices` and `--parts` redo a part and keep the
rest of the file.

What accuracy measured of layers and links is kept in results/accuracy/: `--parts repriced` prices
the strategies of those rows again, after a change of what costs are made of, in minutes. So are
full tables, in results/lazy/: `--parts relazy` searches them again, after a change of the search.
`--parts pair --rounds 400` runs the strategy found then and data parallelism again, without random
strategies, where they are too near to each other for the rounds of all. `--parts repeats --rounds
20` searches so many times, with layers measured anew: how much what is found depends on that.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import platformdirs

RESULTS = Path(__file__).parent / "results" / "costs.json"

RECORDINGS = RESULTS.parent
"""What rows of a part were made from, each in a folder of its own."""

FROM_RECORDINGS = {"repriced": "accuracy", "relazy": "lazy"}
"""Parts that measure nothing, and whose rows they make anew."""

NEED_RECORDINGS = FROM_RECORDINGS | {"pair": "accuracy"}
"""Parts that need what another part wrote."""

MODELS: dict[str, tuple[str, tuple[int, ...], int, int]] = {
    "LeNet-5": ("models.lenet:LeNet5", (28, 28, 1), 256, 60),
    "AlexNet": ("models.alexnet:AlexNet", (163, 163, 3), 32, 8),
    "VGG-16": ("models.vgg:VGG16", (160, 160, 3), 8, 3),
    "ResNet-18": ("models.resnet:ResNet18", (288, 288, 3), 8, 4),
    "Inception-v3": ("models.inception:InceptionV3", (203, 203, 3), 8, 3),
    "MobileNetV2": ("models.mobilenet:MobileNetV2", (128, 128, 3), 16, 3),
}
"""Module, shape of one example, batch, measured steps: sizes that two cores can run.

The shorter a step, the more of them, since medians of few differ by noise alone. Maps stay, but for
a few splits by eight, larger than the windows over them: else XLA swaps kernel and operand of a
convolution, which on processors then runs as plain loops, many times slower, and takes what its
context makes of them.
"""

BASELINES = ("data", "model", "owt", "spatial")

FIGURES = ("regret", "over_data", "regret_checked", "over_data_checked", "regret_checked_all")
"""Of each model, and the largest of all in the summary."""

POOL = 2
"""Configs that random strategies take of layers that are alike: each is to be measured."""

COPIES, NOISE = 40, 0.05
"""Copies of a full table, and the standard deviation of the logarithm of their times from it."""

PROGRAMS = Path(platformdirs.user_cache_dir("jaxlwp")) / "benchmark-programs"
"""Where JAX keeps what it compiled, unless JAX_COMPILATION_CACHE_DIR says another folder: much of
a first run is compiling. What programs take is measured in every run. Not for the warm part, which
is about what a second `parallelize` takes of itself."""

TOGETHER = 8
"""Layers that are measured in turns, between two steps."""

MAPS = Path("/proc/sys/vm/max_map_count")
MAPS_NEEDED = {"Inception-v3": 200_000}
"""Memory maps that suffice for all steps of a model in one process (106,000 were seen): XLA for
processors takes three for every kernel, and aborts where Linux (by default 65,530) gives none."""


def workload(name: str) -> Any:
    """The model's loss, parameters and batch."""
    from jaxlwp.cli._workload import load_workload

    module, shape, batch, _ = MODELS[name]
    return load_workload(module, batch=batch, input_shape=shape)


def tau(predicted: list[float], measured: list[float]) -> float:
    """Kendall's tau-b: agreement of two orders, from -1 to 1."""
    pairs = list(itertools.combinations(zip(predicted, measured, strict=True), 2))
    signs = [((a[0] > b[0]) - (a[0] < b[0])) * ((a[1] > b[1]) - (a[1] < b[1])) for a, b in pairs]
    ties = [sum(a[i] == b[i] for a, b in pairs) for i in (0, 1)]
    return sum(signs) / ((len(pairs) - ties[0]) * (len(pairs) - ties[1])) ** 0.5


# --- what runs in a process with its own devices --------------------------------------------------


def drawn(space: Any, count: int) -> list[Any]:
    """Random strategies: each layer takes one of `POOL` configs drawn for layers like it."""
    import jax

    import jaxlwp

    generator = random.Random(0)
    alike = jaxlwp.measure.LayerTimer(space.graph, space.devices, jax.devices())
    pools: dict[str, list[int]] = {}
    for layer, configs in zip(space.graph.layers, space.configs, strict=True):
        choices = generator.sample(range(len(configs)), min(POOL, len(configs)))
        pools.setdefault(alike.key(layer, jaxlwp.Config()), choices)
    of_layer = [pools[alike.key(layer, jaxlwp.Config())] for layer in space.graph.layers]
    return [
        space.strategy(f"random{n}", [generator.choice(pool) for pool in of_layer])
        for n in range(count)
    ]


def run_of(name: str) -> dict[str, Any]:
    """What every row says: the model, on how many devices, and when it was made."""
    import jax

    today = datetime.date.today().isoformat()
    return {"model": name, "devices": len(jax.devices()), "date": today}


def phases() -> Any:
    """Progress for standard error: a line for each phase, since runs take minutes to hours."""
    start = time.perf_counter()
    last: list[str] = []

    def tell(what: str, done: int, total: int) -> None:
        if [what] != last:
            print(f"{time.perf_counter() - start:7.1f} s  {what}: {total}", file=sys.stderr)
            last[:] = [what]

    return tell


def accuracy(name: str, num_random: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of one model: every strategy, predicted and measured.

    The machine drifts by a tenth within a minute: layers are measured between the steps.
    `promised_s` is what the search promised of its strategy before them.
    """
    import jax

    import jaxlwp

    work = workload(name)
    tell = phases()
    found = jaxlwp.parallelize(work.loss, work.params, *work.batch, measure=True, on_progress=tell)
    space = found.space
    strategies = [
        dataclasses.replace(found.strategy, name="found"),
        *map(space.baseline, BASELINES),
        *drawn(space, num_random),
    ]
    run = {str(s.configs): s for s in reversed(strategies)}  # the strategy found may be a baseline
    timer = jaxlwp.measure.LayerTimer(space.graph, space.devices, jax.devices())
    pairs = {timer.key(*p): p for s in strategies for p in space.pairs(s) if not p[0].fused}
    waiting = random.Random(0).sample(list(pairs.values()), len(pairs))

    def between(what: str, done: int, total: int) -> None:
        """Measure as large a share of the layers as there are steps done."""
        tell(what, done, total)
        if what == "timing steps":
            due = len(pairs) * (total - done) // total
            while len(waiting) > due:
                timer.measure([waiting.pop() for _ in range(min(TOGETHER, len(waiting)))])

    result = jaxlwp.compare(
        work.loss,
        work.params,
        *work.batch,
        strategies=list(run.values()),
        rates=space.devices,
        rounds=rounds,
        name=name,
        on_progress=between,
    )
    measured = jaxlwp.optimize.measured_space(space, timer)
    record(name, space, strategies, {key: timer.known_s(*pair) for key, pair in pairs.items()})
    rows = []
    for strategy in strategies:
        times_s = result.result(run[str(strategy.configs)].name).times_s
        rows.append(
            {
                **run_of(name),
                "strategy": strategy.name,
                **predicted(measured, strategy),
                "measured_s": statistics.median(times_s),
                "times_s": times_s,
            }
        )
    rows[0]["promised_s"] = found.cost.total_s
    return rows


def predicted(space: Any, strategy: Any) -> dict[str, float]:
    """What a step is priced, and its parts."""
    cost = space.evaluate(strategy)
    return {
        "predicted_s": cost.total_s,
        "compute_s": cost.compute_s,
        "transfer_s": cost.transfer_s,
        "sync_s": cost.sync_s,
        "overhead_s": cost.overhead_s,
    }


def recording(part: str, name: str, devices: int) -> Path:
    """The file of what a part measured of a model's layers on so many devices."""
    return RECORDINGS / part / f"{name}-{devices}.json"


def keep(part: str, name: str, rates: Any, times_s: dict[str, float], **others: Any) -> None:
    """Write what a part measured of a model's layers, and the links, for later."""
    import jax

    rounded = {key: float(f"{seconds:.5g}") for key, seconds in times_s.items()}
    content = {"rates": rates.to_json(), "times_s": rounded, **others}
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    path = recording(part, name, len(jax.devices()))
    path.parent.mkdir(exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def kept(part: str, name: str) -> tuple[Any, Any, dict[str, Any]]:
    """A model's space and timer as they were when it was measured, and all that was written."""
    import jax

    import jaxlwp

    content = json.loads(recording(part, name, len(jax.devices())).read_text())
    rates = jaxlwp.DeviceGraph.from_json(content["rates"])
    work = workload(name)
    graph = jaxlwp.trace(work.loss, work.params, *work.batch)
    timer = jaxlwp.measure.LayerTimer(graph, rates, jax.devices())
    return jaxlwp.price(graph, rates), timer, content


def record(name: str, space: Any, strategies: list[Any], times_s: dict[str, float]) -> None:
    """Keep all that prices are made of. Strategies are lists of numbers of configs."""
    configs: dict[Any, int] = {}
    numbers = {
        strategy.name: [
            configs.setdefault(config, len(configs)) for config in strategy.for_graph(space.graph)
        ]
        for strategy in strategies
    }
    splits = [dict(config.splits) for config in configs]
    keep("accuracy", name, space.devices, times_s, configs=splits, strategies=numbers)


def strategy_of(content: dict[str, Any], label: str, space: Any) -> Any:
    """A strategy that was recorded."""
    import jaxlwp

    configs = [jaxlwp.Config.of(content["configs"][n]) for n in content["strategies"][label]]
    choices = (c.index(config) for c, config in zip(space.configs, configs, strict=True))
    return space.strategy(label, list(choices))


def repriced(name: str) -> list[dict[str, Any]]:
    """Rows of earlier steps, priced as of today from what was measured of layers and links then."""
    import jax

    import jaxlwp

    space, timer, content = kept("accuracy", name)
    known = Known(timer, content["times_s"])
    known.asked.update(known.times)
    measured = jaxlwp.optimize.measured_space(space, known)
    strategies = {label: strategy_of(content, label, space) for label in content["strategies"]}
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text())["accuracy"]
    return [
        row | predicted(measured, strategies[row["strategy"]])
        for row in rows
        if (row["model"], row["devices"]) == (name, len(jax.devices()))
    ]


class Known:
    """A timer of times that are all known, which gives away those that it was asked to measure."""

    def __init__(self, timer: Any, times: dict[str, float]) -> None:
        self.key, self.times, self.asked = timer.key, times, set[str]()

    def known_s(self, layer: Any, config: Any) -> float | None:
        key = self.key(layer, config)
        return self.times.get(key) if key in self.asked else None

    def measure(self, pairs: Any, progress: Any = None) -> int:
        self.asked.update(self.key(layer, config) for layer, config in pairs)
        return len(pairs)

    def confirm(self, pairs: Any, progress: Any = None) -> int:
        """Nothing: the times are as true as they get."""
        return 0


def lazy(name: str) -> list[dict[str, Any]]:
    """The search that measures what it picks, on times that are all known, and the full search.

    And on copies of these times with noise, which other days may show.
    """
    import jax

    import jaxlwp
    from jaxlwp.measure._timer import layer_timer

    work = workload(name)
    mesh = jaxlwp.make_mesh(jax.devices())
    devices = jaxlwp.device_graph(mesh)
    graph = jaxlwp.trace(work.loss, work.params, *work.batch)
    timer = layer_timer(graph, devices, mesh)
    pairs = pairs_of(jaxlwp.price(graph, devices))
    timer.measure(pairs)
    keep("lazy", name, devices, {timer.key(*pair): timer.known_s(*pair) for pair in pairs})
    return relazy(name)


def relazy(name: str) -> list[dict[str, Any]]:
    """Both searches on a full table that was measured earlier."""
    space, timer, content = kept("lazy", name)
    times, pairs = content["times_s"], pairs_of(space)
    row = searched(space, Known(timer, times), pairs)
    generator = random.Random(0)
    copies = [
        searched(
            space,
            Known(timer, {k: s * math.exp(generator.gauss(0, NOISE)) for k, s in times.items()}),
            pairs,
        )
        for _ in range(COPIES)
    ]
    return [
        {
            **run_of(name),
            **row,
            "copies": COPIES,
            "copies_same_optimum": sum(copy["same_optimum"] for copy in copies),
            "copies_cost_over_full_max": max(copy["cost_over_full"] for copy in copies),
            "copies_share": statistics.median(copy["share"] for copy in copies),
            "copies_share_max": max(copy["share"] for copy in copies),
        }
    ]


def pairs_of(space: Any) -> list[tuple[Any, Any]]:
    """Layers and configs that can be measured."""
    layers = space.graph.layers
    return [(n, c) for n in layers if not n.fused for c in space.configs[n.index]]


def searched(space: Any, timer: Known, pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    """The search that asks the timer for what it needs against the one that knows all."""
    import jaxlwp

    layers = space.graph.layers
    found = jaxlwp.search_measured(space, timer)
    asked = set(timer.asked)
    timer.measure(pairs)
    full = jaxlwp.search(jaxlwp.optimize.measured_space(space, timer))
    optimum = [
        (layer, space.configs[layer.index][choice], choice)
        for layer, choice in zip(layers, full.solution.choices, strict=True)
    ]
    missed = [
        {
            "layer": layer.name,
            "config": str(config),
            "analytic_s": float(space.tables.compute_s[layer.index][choice]),
            "estimated_s": float(found.space.tables.compute_s[layer.index][choice]),
            "measured_s": timer.known_s(layer, config),
        }
        for layer, config, choice in optimum
        if not layer.fused and timer.key(layer, config) not in asked
    ]
    known = sum(timer.key(layer, config) in asked for layer, config in pairs)
    return {
        "same_optimum": found.solution.choices == full.solution.choices,
        "cost_over_full": full.space.evaluate(found.strategy).total_s / full.cost.total_s,
        "missed": missed,
        "pairs_measured": known,
        "pairs": len(pairs),
        "share": known / len(pairs),
        "programs_measured": len(asked),
        "programs": len(timer.times),
    }


def warm(name: str) -> list[dict[str, Any]]:
    """Seconds of a second `parallelize` with a warm cache, JAX's tracing left out."""
    import jaxlwp

    work = workload(name)
    jaxlwp.parallelize(work.loss, work.params, *work.batch)
    code = "from tests.benchmarks import costs; costs.time_parallelize()"
    out = subprocess.run(
        [sys.executable, "-c", code, name], check=True, capture_output=True, text=True
    )
    return [{**run_of(name), **json.loads(out.stdout)}]


def time_parallelize() -> None:
    """Print the seconds of `parallelize` in this process, and of tracing alone, as JSON."""
    import jaxlwp

    work = workload(sys.argv[1])
    start = time.perf_counter()
    jaxlwp.trace(work.loss, work.params, *work.batch)
    traced = time.perf_counter()
    jaxlwp.parallelize(work.loss, work.params, *work.batch)
    print(json.dumps({"trace_s": traced - start, "warm_s": time.perf_counter() - traced}))


def pair(name: str, rounds: int) -> list[dict[str, Any]]:
    """The strategy that accuracy found, as kept, and data parallelism, in many rounds.

    `compare` runs what is found from rates alone between them.
    """

    import jaxlwp

    space, _, content = kept("accuracy", name)
    work = workload(name)
    found = strategy_of(content, "found", space)
    result = jaxlwp.compare(
        work.loss,
        work.params,
        *work.batch,
        strategies=[found, space.baseline("data")],
        rates=space.devices,
        rounds=rounds,
        name=name,
        on_progress=phases(),
    )
    found_s, data_s = (result.result(each).times_s for each in ("found", "data"))
    ratios = [a / b for a, b in zip(found_s, data_s, strict=True)]
    row = {
        **run_of(name),
        "rounds": rounds,
        "found_s": statistics.median(found_s),
        "data_s": statistics.median(data_s),
        "ratio": statistics.median(ratios),
        "slower": sum(ratio > 1 for ratio in ratios),
    }
    return [row]


class Once:
    """A timer that measures nothing a second time."""

    def __init__(self, timer: Any) -> None:
        self.key, self.known_s, self.measure = timer.key, timer.known_s, timer.measure

    def confirm(self, pairs: Any, progress: Any = None) -> int:
        return 0


def repeats(name: str, searches: int) -> list[dict[str, Any]]:
    """What searches find of layers that are measured anew each time, once and until sure."""
    import jax

    import jaxlwp

    work = workload(name)
    devices = jaxlwp.device_graph(jaxlwp.make_mesh(jax.devices()))
    space = jaxlwp.price(jaxlwp.trace(work.loss, work.params, *work.batch), devices)
    data = space.choices(space.baseline("data"))
    once, sure = [], []
    for _ in range(searches):
        timer = jaxlwp.measure.LayerTimer(space.graph, space.devices, jax.devices())
        once.append(jaxlwp.search_measured(space, Once(timer)).solution.choices)
        sure.append(jaxlwp.search_measured(space, timer).solution.choices)
    row = {
        **run_of(name),
        "searches": searches,
        "data_once": once.count(data),
        "data": sure.count(data),
        "strategies_once": len(set(once)),
        "strategies": len(set(sure)),
    }
    return [row]


PARTS = {
    "accuracy": accuracy,
    "lazy": lazy,
    "warm": warm,
    "repriced": repriced,
    "relazy": relazy,
    "pair": pair,
    "repeats": repeats,
}


# --- the table -----------------------------------------------------------------------------------


def run(part: str, name: str, devices: int, extra: list[str]) -> list[dict[str, Any]]:
    """Rows of one model on so many devices, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:  # nothing that was measured another day
        return run_with({"JAXLWP_CACHE_DIR": folder}, part, name, devices, extra)


def run_with(
    variables: dict[str, str], part: str, name: str, devices: int, extra: list[str]
) -> list[dict[str, Any]]:
    """Rows of one model, with environment variables of its own."""
    kept_programs = {
        "JAX_COMPILATION_CACHE_DIR": str(PROGRAMS),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    environment = {
        **(kept_programs if part != "warm" else {}),
        **os.environ,
        **variables,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "tests.benchmarks.costs", "--inside", part, name, *extra]
    out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    rows: list[dict[str, Any]] = json.loads(out.stdout)
    return rows


def show(part: str, rows: list[dict[str, Any]]) -> None:
    """Print the rows of one model."""
    for r in rows:
        where = f"{r['model']:13}{r['devices']:2} devices"
        if part == "accuracy":
            error = r["predicted_s"] / r["measured_s"] - 1
            print(
                f"{where} {r['strategy']:9} predicted {r['predicted_s'] * 1e3:8.1f} ms, measured "
                f"{r['measured_s'] * 1e3:8.1f} ms ({min(r['times_s']) * 1e3:.1f}.."
                f"{max(r['times_s']) * 1e3:.1f}), {error:+.0%}"
            )
        elif part == "lazy":
            print(
                f"{where} measured {r['pairs_measured']} of {r['pairs']} pairs ({r['share']:.0%}), "
                f"same optimum: {r['same_optimum']}, cost over the full table's "
                f"{r['cost_over_full']:.4f}; of {r['copies']} noisy copies "
                f"{r['copies_same_optimum']} the same, cost at most "
                f"{r['copies_cost_over_full_max']:.4f}, {r['copies_share']:.0%} of the pairs "
                f"(at most {r['copies_share_max']:.0%})"
            )
        elif part == "pair":
            print(
                f"{where} found {r['found_s'] * 1e3:.1f} ms, data {r['data_s'] * 1e3:.1f} ms, "
                f"median ratio {r['ratio']:.3f}, slower in {r['slower']} of {r['rounds']} rounds"
            )
        elif part == "repeats":
            print(
                f"{where} {r['searches']} searches, {r['data_once']} find data parallelism with "
                f"layers measured once, by {r['data']} until sure; {r['strategies_once']} and "
                f"{r['strategies']} different strategies"
            )
        else:
            print(f"{where} parallelize with a warm cache {r['warm_s']:.2f} s")
    sys.stdout.flush()


def checked_regret(
    rows: list[dict[str, Any]], against: tuple[str, ...] = ("data",)
) -> tuple[float, float]:
    """What `check="measure"` would keep, over the best of all and over data parallelism.

    The first half of the rounds decides between the strategy found and baselines, the second half
    is what counts: no step is asked twice.
    """
    half = len(rows[0]["times_s"]) // 2
    first = {r["strategy"]: statistics.median(r["times_s"][:half] or r["times_s"]) for r in rows}
    second = {r["strategy"]: statistics.median(r["times_s"][half:]) for r in rows}
    kept = min(("found", *against), key=first.__getitem__)
    return second[kept] / min(second.values()), second[kept] / second["data"]


def predicted_tau(rows: list[dict[str, Any]]) -> float:
    """Kendall's tau of the strategies' order, predicted and measured."""
    return tau([r["predicted_s"] for r in rows], [r["measured_s"] for r in rows])


def measured_tau(rows: list[dict[str, Any]]) -> float:
    """Kendall's tau of the strategies' order in odd and in even rounds: how sure it is at all."""
    odd_s, even_s = ([statistics.median(r["times_s"][n::2]) for r in rows] for n in (0, 1))
    return tau(odd_s, even_s)


def of_model(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of one model on so many devices."""
    errors = [abs(r["predicted_s"] / r["measured_s"] - 1) for r in rows]
    measured_s = {r["strategy"]: r["measured_s"] for r in rows}
    regret_checked, over_data_checked = checked_regret(rows)
    regret_checked_all, _ = checked_regret(rows, BASELINES)
    return {
        "model": rows[0]["model"],
        "devices": rows[0]["devices"],
        "strategies": len(rows),
        "median_abs_error": statistics.median(errors),
        "abs_error_max": max(errors),
        "kendall_tau": predicted_tau(rows),
        "kendall_tau_measured": measured_tau(rows),
        "regret": measured_s["found"] / min(measured_s.values()),
        "over_data": measured_s["found"] / measured_s["data"],
        "regret_checked": regret_checked,
        "over_data_checked": over_data_checked,
        "regret_checked_all": regret_checked_all,
    }


def summary(content: dict[str, Any]) -> dict[str, Any]:
    """The figures that the rows come to."""
    rows = content.get("accuracy", [])
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for r in rows:
        groups.setdefault((r["model"], r["devices"]), []).append(r)
    models = [of_model(groups[key]) for key in sorted(groups)]
    result: dict[str, Any] = {"models": models}
    if rows:
        errors = sorted(abs(r["predicted_s"] / r["measured_s"] - 1) for r in rows)
        result["median_abs_error"] = statistics.median(errors)
        result["p90_abs_error"] = errors[min(int(0.9 * len(errors)), len(errors) - 1)]
        # Of each model's strategies on all numbers of devices, and of those on as many devices.
        names = sorted({r["model"] for r in rows})
        of_names = {n: predicted_tau([r for r in rows if r["model"] == n]) for n in names}
        result["kendall_tau"] = of_names
        result["kendall_tau_min"] = min(of_names.values())
        result["kendall_tau_min_same_devices"] = min(m["kendall_tau"] for m in models)
        for figure in FIGURES:
            result[f"{figure}_max"] = max(m[figure] for m in models)
    if content.get("lazy"):
        result["measured_share"] = max(r["share"] for r in content["lazy"])
        result["same_optimum"] = all(r["same_optimum"] for r in content["lazy"])
    if content.get("warm"):
        result["warm_s"] = max(r["warm_s"] for r in content["warm"])
    memory = RESULTS.with_name("memory.json")
    if memory.exists():
        errors = [abs(r["error"]) for r in json.loads(memory.read_text())["rows"]]
        result["memory_abs_error_max"] = max(errors)
    return result


def show_models(models: list[dict[str, Any]]) -> None:
    """Print a line for each model."""
    for m in models:
        print(
            f"{m['model']:13}{m['devices']:2} devices: {m['strategies']} strategies, error "
            f"{m['median_abs_error']:.1%} (largest {m['abs_error_max']:.0%}), tau "
            f"{m['kendall_tau']:.2f} (measured in odd and in even rounds "
            f"{m['kendall_tau_measured']:.2f}), regret {m['regret']:.3f}, over data "
            f"{m['over_data']:.2f}"
        )


def too_few_maps(names: list[str]) -> str | None:
    """What to do where the steps of a model would not all fit into one process."""
    allowed = int(MAPS.read_text()) if MAPS.exists() else None
    for name in names:
        needed = MAPS_NEEDED.get(name, 0)
        if allowed is not None and allowed < needed:
            return (
                f"{name}: vm.max_map_count is {allowed:,}; all its steps compiled in one process "
                f"need up to {needed:,} memory maps: sudo sysctl -w vm.max_map_count=262144, or "
                "leave the model out with --models"
            )
    return None


def main() -> None:
    """Run, print and write; with --inside, one part of one model in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inside", nargs=2, metavar=("PART", "MODEL"), help=argparse.SUPPRESS)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS)[:3])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--devices", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--random", type=int, default=10, help="random strategies of each model")
    parser.add_argument("--rounds", type=int, help="measured steps of each strategy, or searches")
    options = parser.parse_args()
    if options.inside:
        part, name = options.inside
        rounds = (options.rounds,)
        extra = {"accuracy": (options.random, *rounds), "pair": rounds, "repeats": rounds}
        print(json.dumps(PARTS[part](name, *extra.get(part, ()))))
        return
    if "accuracy" in options.parts and (reason := too_few_maps(options.models)):
        parser.error(reason)  # now, not after hours
    lazy_models = ("LeNet-5", "AlexNet", "ResNet-18")
    chosen = {"lazy": lazy_models, "relazy": lazy_models, "warm": ("AlexNet",)}
    for part in NEED_RECORDINGS.keys() & options.parts:
        of, models = NEED_RECORDINGS[part], chosen.get(part, MODELS)
        for name, devices in itertools.product(options.models, options.devices):
            path = recording(of, name, devices)
            if name in models and not path.exists():
                parser.error(
                    f"nothing is kept of {name} on {devices} devices, {path}: leave it out "
                    f"(--models, --devices), or measure it first (--parts {of})"
                )
    content = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for part, devices in itertools.product(options.parts, options.devices):
        for name in (n for n in options.models if n in chosen.get(part, options.models)):
            rounds = options.rounds or MODELS[name][-1]
            extra = ["--random", str(options.random), "--rounds", str(rounds)]
            rows = run(part, name, devices, extra)
            kind = FROM_RECORDINGS.get(part, part)
            show(kind, rows)
            others = [
                r for r in content.get(kind, []) if (r["model"], r["devices"]) != (name, devices)
            ]
            content[kind] = others + rows
            write(content)
    figures = summary(content)
    show_models(figures.pop("models"))
    print(json.dumps(figures, indent=1))


def write(content: dict[str, Any]) -> None:
    """The results so far, with where and when."""
    import importlib.metadata

    versions = {p: importlib.metadata.version(p) for p in ("jaxlwp", "jax", "jaxlib", "flax")}
    content |= {
        "summary": summary(content),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, simulated devices",
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
