"""What would change the plan: link rates and batches from which on a baseline is as good."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxlwp._progress import Progress, reporting, silent
from jaxlwp.devices import Level, System
from jaxlwp.simulate._scaling import Workload, planned

FACTORS = tuple(4.0**n for n in range(-3, 4))
"""Times the rate of the links, at which plans are made."""

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Examples for each GPU at which plans are made."""

HALVINGS = 3
"""How often the interval that a threshold is in is halved (by ratio)."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A plan at one value of what is varied.

    Attributes:
      value: bytes per second of the links, or examples for each GPU.
      found_s: predicted seconds of a step of the strategy found.
      other_s: of the baseline.
    """

    value: float
    found_s: float
    other_s: float

    @property
    def gain(self) -> float:
        """How many times longer the baseline takes, less one."""
        return self.other_s / self.found_s - 1


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """Where a baseline becomes as good as what is found. Print it.

    Attributes:
      what: "links" (bytes per second of a GPU over the slowest level) or "batch" (examples for
        each GPU).
      against: name of the baseline.
      within: gains up to this count as none, as in 0.01.
      now: the value that the system has; None for batches.
      samples: plans, by value.
    """

    what: str
    against: str
    within: float
    now: float | None
    samples: tuple[Sample, ...]

    @property
    def value(self) -> float | None:
        """The least value from which on the baseline is as good at all that were looked at.

        None if it is not at the largest.
        """
        found = None
        for sample in reversed(self.samples):
            if sample.gain > self.within:
                break
            found = sample.value
        return found

    def __str__(self) -> str:
        """A row for each plan, and the threshold in words."""
        from jaxlwp.report import threshold_text

        return threshold_text(self)


@reporting
def link_threshold(
    workload: Workload,
    system: System,
    *,
    batch: int,
    against: str = "data",
    within: float = 0.01,
    factors: Sequence[float] = FACTORS,
    on_progress: Progress | None = None,
    **options: Any,
) -> Threshold:
    """The rate of the slowest links from which on a baseline is as good as what is found.

    Args:
      workload: makes the training function and its arguments for a batch.
      system: hosts and links; of one host, the links inside are varied, else those across.
      batch: examples in all.
      against: name of a baseline.
      within: gains up to this count as none.
      factors: times the system's own rate.
      on_progress: called as `on_progress(what, done, total)`.
      **options: of `parallelize`, such as `optimizer`.

    Raises:
      ValueError: a system of one GPU, an unknown baseline, a batch that it does not divide.
    """
    if system.num_devices == 1:
        raise ValueError(f"system: {system} has one GPU and no links; give a larger one")
    now = _slowest(system).rate(_slowest(system).devices)

    def at(factor: float) -> Sample:
        return _sample(workload, _with_links(system, factor), batch, now * factor, against, options)

    samples = _sampled(at, sorted(factors), within, on_progress, halvings=HALVINGS)
    return Threshold(what="links", against=against, within=within, now=now, samples=samples)


@reporting
def batch_threshold(
    workload: Workload,
    system: System,
    *,
    against: str = "data",
    within: float = 0.01,
    batches: Sequence[int] = BATCHES,
    on_progress: Progress | None = None,
    **options: Any,
) -> Threshold:
    """The examples for each GPU from which on a baseline is as good as what is found.

    Args:
      workload: makes the training function and its arguments for a batch.
      system: hosts and links.
      against: name of a baseline.
      within: gains up to this count as none.
      batches: examples for each GPU.
      on_progress: called as `on_progress(what, done, total)`.
      **options: of `parallelize`, such as `optimizer`.

    Raises:
      ValueError: an unknown baseline.
    """

    def at(each: float) -> Sample:
        return _sample(workload, system, int(each) * system.num_devices, each, against, options)

    samples = _sampled(at, sorted(batches), within, on_progress, halvings=0)
    return Threshold(what="batch", against=against, within=within, now=None, samples=samples)


def _sample(
    workload: Workload,
    system: System,
    batch: int,
    value: float,
    against: str,
    options: dict[str, Any],
) -> Sample:
    plan = planned(workload, system, batch, **options)
    other = plan.space.evaluate(plan.space.baseline(against))
    return Sample(value=value, found_s=plan.cost.total_s, other_s=other.total_s)


def _sampled(
    at: Callable[[float], Sample],
    places: Sequence[float],
    within: float,
    on_progress: Progress | None,
    halvings: int,
) -> tuple[Sample, ...]:
    """Samples at the places given, and between the two that the threshold lies between."""
    progress = on_progress or silent
    count = len(places) + halvings
    samples: dict[float, Sample] = {}

    def look(place: float) -> None:
        progress("looking for thresholds", len(samples), count)
        samples[place] = at(place)

    for place in places:
        look(place)
    for _ in range(halvings):
        good = [p for p in samples if all(s.gain <= within for q, s in samples.items() if q >= p)]
        bad = [p for p in samples if p not in good]
        if not good or not bad:
            break
        look(math.sqrt(min(good) * max(bad)))
    progress("looking for thresholds", count, count)
    return tuple(samples[place] for place in sorted(samples))


def _slowest(system: System) -> Level:
    return system.across or system.inside


def _with_links(system: System, factor: float) -> System:
    """The system, its slowest links so many times faster."""
    level = _slowest(system)
    rates = level.bytes_per_s
    scaled = (
        {count: factor * rate for count, rate in rates.items()}
        if isinstance(rates, Mapping)
        else factor * rates
    )
    faster = replace(level, bytes_per_s=scaled)
    return replace(system, across=faster) if system.across else replace(system, inside=faster)
