"""What must hold of a program, a mesh and strategies; what does not is a `Finding`.

Numbers: loss, outputs and gradients under every strategy, on every device, as on one device, where
the program is evaluated operator by operator, and compiled as a whole. Prices: `check_layers`.
Searches: against every strategy, where there are few.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxlwp

from . import brute, programs, strategies
from .internals import check_layers, no_mesh
from .programs import Written
from .strategies import MeshCase, Splits

TOLERANCE = 1e-9
"""Largest allowed max|a - b| / max|b|; all arithmetic is in float64."""

TOLERANCE_SINGLE = 1e-4
"""Where a program rounds to float32 on its way."""

STRATEGIES = 3
"""Random strategies of a program; half of the programs have a baseline besides."""

EAGER = 5
"""Every so many programs are evaluated operator by operator, whatever they give."""

SEARCHES = 4
"""Every so many programs searches are compared with trying every strategy."""

PACKAGE = str(Path(jaxlwp.__file__).parent)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that does not hold.

    Attributes:
      kind: "wrong" numbers; "crash", an exception that is none of our own refusals; "price", what
        is priced differs from the program; "search", a search that differs from trying every
        strategy; and listed apart: "refused" (our ValueError), "oracle" (one device's compiled
        program differs from one device's operators), "unstable" (rounding alone moves the numbers
        as much), "compiler" (wrong with this compiler's options only, or a failed check of its
        own), "long" (a search).
      group: what findings of one cause have in common, roughly.
      detail: for people.
      strategy: name of the strategy, "" if it is not about one.
    """

    kind: str
    group: str
    detail: str
    strategy: str = ""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A program on a mesh under strategies, by name."""

    written: Written
    mesh: MeshCase
    strategies: dict[str, Splits]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a case showed.

    Attributes:
      case: with the strategies that were drawn.
      findings: what does not hold.
      checked: strategies whose numbers were compared.
      priced: strategies whose layers were compared.
      searched: searches that were compared with trying every strategy.
    """

    case: Case
    findings: tuple[Finding, ...] = ()
    checked: int = 0
    priced: int = 0
    searched: int = 0


@dataclass
class Log:
    """Findings so far, and what is going on (for when the process dies)."""

    mark: Callable[[str], None] = lambda stage: None
    findings: list[Finding] = field(default_factory=list)

    @contextlib.contextmanager
    def stage(self, name: str, strategy: str = "") -> Iterator[None]:
        """A stage: an exception in it is a finding."""
        self.mark(f"{name} {strategy}".strip())
        try:
            yield
        except Exception as error:
            self.findings.append(_of_exception(name, strategy, error))

    def add(self, kind: str, group: str, detail: str, strategy: str = "") -> None:
        self.findings.append(Finding(kind=kind, group=group, detail=detail, strategy=strategy))


def _of_exception(stage: str, strategy: str, error: Exception) -> Finding:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(PACKAGE)]
    refused = isinstance(error, ValueError) and frames[-1].filename.startswith(PACKAGE)
    internal = isinstance(error, jax.errors.JaxRuntimeError) and "RET_CHECK" in str(error)
    line = (str(error).strip() or repr(error)).splitlines()[0][:300]
    text = re.sub(r"'[^']*'|\d+(\.\d+)?|\(.*\)|\[.*\]", "*", line)[:90]
    place = f"{Path(ours[-1].filename).name}:{ours[-1].name}" if ours else "outside"
    group = f"{stage}: {type(error).__name__}: {text} ({place})"
    return Finding(
        kind="refused" if refused else "compiler" if internal else "crash",
        group=group,
        detail=f"{stage}: {type(error).__name__}: {line}",
        strategy=strategy,
    )


# --- drawing a case ----------------------------------------------------------------------------


def draw_case(seed: int) -> tuple[Case, Reference]:
    """Program, mesh and numbers of a seed; strategies are drawn once the program is traced."""
    attempt = 0
    while True:
        written = programs.draw(f"{seed}/{attempt}", seed)
        reference = evaluate(written)
        if reference is not None:
            break
        attempt += 1
    mesh = strategies.draw_mesh(random.Random(f"{seed}/mesh"))
    return Case(written=written, mesh=mesh, strategies={}), reference


@dataclass(frozen=True, kw_only=True)
class Reference:
    """One device's numbers: ((loss, outputs), gradients).

    Attributes:
      written: the program.
      jitted: compiled as a whole.
    """

    written: Written
    jitted: Any

    @functools.cached_property
    def eager(self) -> Any:
        """Operator by operator: seconds, so only every few programs, and where there is doubt."""
        arguments = jax.tree.map(jnp.asarray, self.written.arrays())
        with jax.disable_jit():
            return _numbers(self.written, self.written.function(), arguments)

    def doubt(self, limit: float) -> dict[str, float]:
        """Where the two differ."""
        return wrong(errors(self.jitted, self.eager), limit)


def differentiated(written: Written, function: Callable[..., Any]) -> Callable[..., Any]:
    """((loss, outputs), gradients) of a program, or of a plan of it; none if it is evaluated."""
    if written.program.evaluated:
        return lambda *args: (function(*args), ())
    return jax.value_and_grad(lambda *args: function(*args), argnums=written.argnums, has_aux=True)


def _numbers(written: Written, function: Callable[..., Any], arguments: Any) -> Any:
    return jax.tree.map(np.asarray, differentiated(written, function)(*arguments))


def evaluate(written: Written) -> Reference | None:
    """One device's numbers; None if there is nothing to compare with."""
    compiled = jax.jit(differentiated(written, written.function()))
    jitted = jax.tree.map(np.asarray, compiled(*written.arrays()))
    sizes = [_size(leaf) for leaf in jax.tree.leaves(jitted)]
    gradients = [_size(leaf) for leaf in jax.tree.leaves(jitted[1])]
    if not max(sizes) < 1e8 or max(gradients, default=1.0) < 1e-6:
        return None
    return Reference(written=written, jitted=jitted)


# --- numbers -----------------------------------------------------------------------------------


def tolerance(written: Written) -> float:
    """Of a program's numbers."""
    return TOLERANCE_SINGLE if written.rounds else TOLERANCE


def errors(actual: Any, expected: Any) -> dict[str, float]:
    """max|a - b| / max|b| of every array over all devices' copies; infinite for another shape."""
    paths = jax.tree_util.tree_leaves_with_path(expected)
    names = [jax.tree_util.keystr(path) for path, _ in paths]
    largest = max(_size(leaf) for _, leaf in paths)
    found = {}
    for name, a, (_, b) in zip(names, jax.tree.leaves(actual), paths, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            found[name] = float("inf")
            continue
        scale = max(_size(b), 1e-4 * largest, 1e-7)
        shards = a.addressable_shards if isinstance(a, jax.Array) else ()
        pairs = [(np.asarray(s.data), b[s.index]) for s in shards] or [(a, b)]
        worst = max(_size(x.astype(np.float64) - y.astype(np.float64)) for x, y in pairs)
        found[name] = worst / scale
    return found


def _size(x: Any) -> float:
    size = np.max(np.abs(x.astype(np.float64))) if x.size else 0.0
    return float(size) if np.isfinite(size) else float("inf")


def wrong(found: dict[str, float], limit: float) -> dict[str, float]:
    """The errors above the limit."""
    return {name: error for name, error in found.items() if not error <= limit}


# --- a case ------------------------------------------------------------------------------------


def check(
    case: Case,
    reference: Reference,
    *,
    mark: Callable[[str], None] = lambda stage: None,
    only: str | None = None,
    drawn_from: int | None = None,
    searches: bool = True,
) -> Outcome:
    """Check a case.

    Args:
      case: program, mesh, strategies.
      reference: one device's numbers.
      mark: is told what is going on.
      only: name of the one strategy to check.
      drawn_from: seed from which strategies are drawn.
      searches: whether searches are compared with trying every strategy.
    """
    log = Log(mark=mark)
    mesh = case.mesh.mesh()
    limit = tolerance(case.written)
    if drawn_from is not None and drawn_from % EAGER == 0:
        log.mark("eager")
        _ask(reference, log, limit)
    with case.mesh.entered_mesh():
        plans, case = _plans(case, mesh, log, only, drawn_from)
        outcome = Outcome(case=case)
        if case.mesh.checked_first:
            outcome = _check_prices(outcome, plans, log)
        results = _run(case, plans, log)
        if not case.mesh.checked_first:
            outcome = _check_prices(outcome, plans, log)
        if searches and plans and drawn_from is not None and drawn_from % SEARCHES == 0:
            outcome = _check_searches(outcome, plans, mesh, log)
    outcome = _check_numbers(outcome, plans, results, reference, log, limit)
    return dataclasses.replace(outcome, findings=tuple(log.findings))


def _ask(reference: Reference, log: Log, limit: float) -> None:
    """Compare one device's compiled program with its operators."""
    apart = reference.doubt(limit)
    if apart and not any(finding.kind == "oracle" for finding in log.findings):
        log.add("oracle", "one device: compiled differs from eager", _text(apart))


def trace(written: Written) -> jaxlwp.graph.ComputationGraph:
    """The graph of a program."""
    evaluated = written.program.evaluated
    return jaxlwp.trace(
        written.function(),
        *written.arrays(),
        differentiated=not evaluated,
        outputs="replicated" if evaluated == "replicated" else None,
    )


def _plans(
    case: Case, mesh: Any, log: Log, only: str | None, drawn_from: int | None
) -> tuple[dict[str, jaxlwp.Plan], Case]:
    """A plan for every strategy, and the case with the strategies that were drawn."""
    plans: dict[str, jaxlwp.Plan] = {}
    function, arguments = case.written.function(), case.written.arrays()
    with log.stage("trace"):
        graph = trace(case.written)
        with no_mesh():
            out_tree = jax.tree.structure(jax.eval_shape(lambda *a: function(*a), *arguments))
        chosen = case.strategies or _drawn(case, graph, mesh, log, drawn_from)
        case = dataclasses.replace(case, strategies=chosen)
        for name, splits in chosen.items():
            if only is not None and name != only:
                continue
            with log.stage("bind", name):
                plans[name] = strategies.bind(graph, splits, case.mesh, arguments, out_tree)
    return plans, case


def _drawn(
    case: Case, graph: jaxlwp.graph.ComputationGraph, mesh: Any, log: Log, seed: int | None
) -> dict[str, Splits]:
    rng = random.Random(f"{seed}/strategies")
    sizes = {str(name): size for name, size in mesh.shape.items()}
    drawn = strategies.draw_strategies(rng, graph, sizes, STRATEGIES)
    chosen = {f"random{n}": splits for n, splits in enumerate(drawn)}
    name = rng.choice((*jaxlwp.BASELINES, *[""] * len(jaxlwp.BASELINES)))
    if not name:
        return chosen
    with log.stage("baseline", name):
        space = jaxlwp.price(graph, jaxlwp.device_graph(mesh, rates=strategies.RATES))
        made = space.baseline(name)
        chosen[name] = {layer: dict(config.splits) for layer, config in made.configs.items()}
    return chosen


def drawn(case: Case, seed: int) -> Case:
    """The case with the strategies that a seed draws; nothing is run."""
    with case.mesh.entered_mesh():
        return _plans(case, case.mesh.mesh(), Log(), "", seed)[1]


def _check_prices(outcome: Outcome, plans: dict[str, jaxlwp.Plan], log: Log) -> Outcome:
    done = 0
    for name, plan in plans.items():
        with log.stage("check_layers", name):
            rows = [row for row in check_layers(plan) if not row.agrees]
            done += 1
            if rows:
                group = f"priced differs: {_where(rows)}"
                text = "; ".join(
                    f"{row.name} [{row.config}] priced {_bytes(row.predicted)}, "
                    f"program {_bytes(row.program)}"
                    for row in rows
                )
                log.add("price", group, text, name)
    return dataclasses.replace(outcome, priced=done)


def _where(rows: Sequence[Any]) -> str:
    """Where the price is wrong, and in which direction."""
    places = {"(outputs)" if row.name == "(outputs)" else "layers" for row in rows}
    ways = set()
    for row in rows:
        for key in {*row.predicted, *row.program}:
            priced, runs = row.predicted.get(key, 0), row.program.get(key, 0)
            ways |= {"too little"} if priced < runs else {"too much"} if priced > runs else set()
    return f"{' and '.join(sorted(places))}, {' and '.join(sorted(ways))}"


def _bytes(traffic: Any) -> str:
    parts = [f"{kind} over {'+'.join(axes)} {n}" for (kind, axes), n in traffic.items()]
    return ", ".join(parts) or "nothing"


def _check_numbers(
    outcome: Outcome,
    plans: dict[str, jaxlwp.Plan],
    results: dict[str, Any],
    reference: Reference,
    log: Log,
    limit: float,
) -> Outcome:
    case = outcome.case
    for name, result in results.items():
        if not wrong(errors(result, reference.jitted), limit):
            continue
        log.mark(f"confirm {name}")
        _ask(reference, log, limit)
        bad = wrong(errors(result, reference.eager), limit)
        if bad:
            kind = _verdict(case, plans[name], reference, bad, limit)
            log.add(kind, f"{kind}: {_leaves(bad)}", _text(bad), name)
    return dataclasses.replace(outcome, checked=len(results))


def _run(case: Case, plans: dict[str, jaxlwp.Plan], log: Log) -> dict[str, Any]:
    """Numbers under every plan: from one compiled program, or where that fails, one by one."""
    if not plans:
        return {}
    log.mark("run " + " ".join(plans))
    try:
        return dict(zip(plans, _together(case, list(plans.values())), strict=True))
    except Exception:
        pass
    results = {}
    for name, plan in plans.items():
        with log.stage("run", name):
            results[name] = _together(case, [plan])[0]
    return results


def _together(
    case: Case, plans: Sequence[jaxlwp.Plan], options: dict[str, Any] | None = None
) -> list[Any]:
    written = case.written
    steps = [differentiated(written, plan) for plan in plans]
    arguments = written.arrays()
    given = [
        jax.device_put(arguments, plan.shardings) if case.mesh.placed else arguments
        for plan in plans
    ]

    def together(given: Any) -> list[Any]:
        return [step(*one) for step, one in zip(steps, given, strict=True)]

    with case.mesh.entered_mesh():
        return list(jax.block_until_ready(jax.jit(together, compiler_options=options)(given)))


NUDGES = 4
"""Draws of arrays whose elements are changed each by its own factor."""
SLOW = {"xla_backend_optimization_level": 3}
WITHOUT_SIMPLIFIER = {"xla_disable_hlo_passes": "algsimp,fusion,cpu-parallel-task-assigner"}


def _verdict(
    case: Case, plan: jaxlwp.Plan, reference: Reference, bad: dict[str, float], limit: float
) -> str:
    """Whose fault wrong numbers are."""
    # A zero that rounding makes of a difference goes up or down by chance: several draws.
    for draw in range(1 + NUDGES if case.written.inexact else 1):
        moved = wrong(errors(_nudged(case.written, draw), reference.eager), limit / 10)
        if all(name in moved and moved[name] > 0.01 * error for name, error in bad.items()):
            return "unstable"
    for options in (SLOW, WITHOUT_SIMPLIFIER):
        try:
            again = _together(case, [plan], options)[0]
        except Exception:
            continue
        if not wrong(errors(again, reference.eager), limit):
            return "compiler"
    return "wrong"


def _nudged(written: Written, draw: int) -> Any:
    """One device's numbers with its arrays changed by 1e-13, or where it rounds to float32 by 6e-8.

    All by one factor in draw 0, which keeps ties, else each element by its own. Ties that only
    operators make that round (a softmax of equal numbers) are broken by another order of sums too.
    """
    rng = np.random.default_rng(draw)
    step = 2.0 ** (-24 if written.rounds else -43)

    def nudge(x: Any) -> Any:
        if x.dtype.kind != "f":
            return jnp.asarray(x)
        by = 1.0 if draw == 0 else rng.uniform(-1, 1, x.shape)
        return jnp.asarray(x * (1 + by * step), x.dtype)

    arguments = jax.tree.map(nudge, written.arrays())
    with jax.disable_jit():
        return _numbers(written, written.function(), arguments)


def _leaves(bad: dict[str, float]) -> str:
    """Which arrays are wrong, roughly."""
    parts = set()
    for name in bad:
        parts.add({"[0][0]": "loss", "[0][1]": "output"}.get(name[:6], "gradient"))
    return "+".join(sorted(parts))


def _text(bad: dict[str, float]) -> str:
    return ", ".join(f"{name} off by {error:.2g}" for name, error in bad.items())


def _check_searches(
    outcome: Outcome, plans: dict[str, jaxlwp.Plan], mesh: Any, log: Log
) -> Outcome:
    with log.stage("search"):
        graph = next(iter(plans.values())).graph
        space = jaxlwp.price(graph, jaxlwp.device_graph(mesh, rates=strategies.RATES))
        count, problems, long = brute.compare(space)
        for kind, texts in (("search", problems), ("long", long)):
            for text in texts:
                log.add(kind, f"{kind}: {text.split(':')[0]}", text)
        return dataclasses.replace(outcome, searched=count)
    return outcome
