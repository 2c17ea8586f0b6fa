"""Command line: `python -m tests.fuzz --seeds 0:2000`; `--help` lists the rest."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from . import pool

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "fuzz.json"

FAULTS = ("wrong", "crash", "died", "slow", "price", "search")
"""Kinds of findings that are faults; the others are listed apart."""

APART = ("refused", "oracle", "unstable", "compiler", "long")

PROGRAMS_TO_FIND = 200
"""Programs within which a planted fault must be found."""


def main() -> int:
    """Run; the exit status says whether there were faults."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seeds", default="0:100", help="first:stop, or one seed")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help=f"add the summary to it, as in {RESULTS.name}")
    parser.add_argument("--shrink", type=int, default=1, help="cases of each group to make small")
    parser.add_argument("--shrink-seconds", type=float, default=120.0)
    parser.add_argument("--show", action="store_true", help="print the programs of the seeds only")
    parser.add_argument("--planted", action="store_true", help="find the planted faults")
    options = parser.parse_args()
    first, _, stop = options.seeds.partition(":")
    seeds = range(int(first), int(stop) if stop else int(first) + 1)
    if options.planted:
        return planted(options.workers, seeds.start)
    if options.show:
        return show(seeds)
    summary = run(seeds, options.workers)
    print_summary(summary)
    if options.json:
        write(options.json, summary)
    if options.shrink:
        make_small(summary, options)
    return 1 if any(summary["outcomes"].get(kind) for kind in FAULTS) else 0


# --- a run -------------------------------------------------------------------------------------


def run(seeds: range, workers: int) -> dict[str, Any]:
    """Check all seeds; returns the summary."""
    versions: list[str] = []
    begin = time.monotonic()
    collected = []
    for answer in pool.answers(({"seed": s} for s in seeds), workers, versions.append):
        collected.append(answer)
        worst = [f for f in answer["findings"] if f["kind"] in FAULTS]
        for finding in worst[:1]:
            detail = finding["detail"][:160]
            print(f"seed {answer['seed']}: {finding['kind']}: {detail}", flush=True)
        if len(collected) % 100 == 0:
            seconds = time.monotonic() - begin
            print(f"-- {len(collected)} programs, {seconds:.0f} s", file=sys.stderr, flush=True)
    seconds = time.monotonic() - begin
    collected.sort(key=lambda answer: answer["seed"])
    return summarize(collected, seeds, versions[0], seconds)


def outcomes(answer: dict[str, Any]) -> set[str]:
    """What a program's outcome counts as; right if numbers were compared and there is no fault."""
    kinds = {finding["kind"] for finding in answer["findings"]}
    return kinds if kinds & set(FAULTS) or not answer["checked"] else kinds | {"right"}


def summarize(
    collected: list[dict[str, Any]], seeds: range, version: str, seconds: float
) -> dict[str, Any]:
    """Counts, and one line for every finding."""
    total: collections.Counter[str] = collections.Counter()
    tables: dict[str, dict[str, collections.Counter[str]]] = {"operator": {}, "mesh": {}}
    groups: dict[str, dict[str, Any]] = {}
    for answer in collected:
        found = outcomes(answer)
        total.update(found)
        for name in answer["operators"]:
            tables["operator"].setdefault(name, collections.Counter()).update(found)
        tables["mesh"].setdefault(answer["mesh"], collections.Counter()).update(found)
        for number, finding in enumerate(answer["findings"]):
            entry = groups.setdefault(
                f"{finding['kind']}: {finding['group']}",
                {"kind": finding["kind"], "count": 0, "programs": [], "example": None},
            )
            entry["count"] += 1
            if answer["seed"] not in entry["programs"]:
                entry["programs"].append(answer["seed"])
            if entry["example"] is None:
                entry["example"] = {"number": number, **finding}
    return {
        "jax": version,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "commits": [commit()],
        "seeds": [seeds.start, seeds.stop],
        "seconds": round(seconds),
        "programs": len(collected),
        "strategies": sum(len(answer["strategies"]) for answer in collected),
        "strategies_compared": sum(answer["checked"] for answer in collected),
        "strategies_priced": sum(answer["priced"] for answer in collected),
        "searches_compared": sum(answer["searched"] for answer in collected),
        "outcomes": dict(sorted(total.items())),
        "groups": dict(sorted(groups.items(), key=lambda item: -len(item[1]["programs"]))),
        "by_operator": {k: dict(sorted(v.items())) for k, v in sorted(tables["operator"].items())},
        "by_mesh": {k: dict(sorted(v.items())) for k, v in sorted(tables["mesh"].items())},
    }


def commit() -> str:
    """The commit that is checked, "-dirty" behind it where files are changed; else "unknown"."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def print_summary(summary: dict[str, Any]) -> None:
    """Counts, then what was found, faults first."""
    rate = summary["programs"] / max(summary["seconds"], 1)
    print(
        f"\nJAX {summary['jax']}, Python {summary['python']}: {summary['programs']} programs, "
        f"{summary['strategies_compared']} strategies compared, {summary['strategies_priced']} "
        f"priced, {summary['searches_compared']} searches, {summary['seconds']} s "
        f"({rate:.2f} programs/s)"
    )
    print("programs by outcome:", json.dumps(summary["outcomes"]))
    for kinds in (FAULTS, APART):
        for name, group in summary["groups"].items():
            if group["kind"] in kinds:
                seeds = ", ".join(map(str, group["programs"][:8]))
                print(f"{len(group['programs']):5} programs  {name}\n{'':16}seeds {seeds}")


def write(path: Path, summary: dict[str, Any]) -> None:
    """Put a summary into a JSON file, beside those of other JAX versions.

    Seeds that follow those that are there for this version are added to them.
    """
    known = json.loads(path.read_text()) if path.exists() else {}
    before = known.get(summary["jax"])
    if before and before["seeds"][1] == summary["seeds"][0]:
        summary = together(before, summary)
    path.write_text(json.dumps(known | {summary["jax"]: summary}, indent=1) + "\n")
    print(f"written to {path}")


def together(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two summaries as one: counts are added up, and the first example of each group stays."""
    made = {**one, **other}
    for name, value in one.items():
        if name == "seeds":
            made[name] = [value[0], other[name][1]]
        elif name == "commits":
            made[name] = list(dict.fromkeys(value + other.get(name, [])))
        elif name == "example":
            made[name] = value
        elif isinstance(value, dict):
            made[name] = together(value, other[name]) if name in other else value
        elif isinstance(value, int | list) and name in other:
            made[name] = value + other[name]
    return made


def make_small(summary: dict[str, Any], options: argparse.Namespace) -> None:
    """Shrink and print the first cases of every group of faults.

    What ends the process, or never ends, is printed as it is.
    """
    requests = []
    for name, group in summary["groups"].items():
        if group["kind"] == "search" or group["kind"] not in FAULTS:
            continue
        for seed in group["programs"][: options.shrink]:
            request = {"seed": seed, "shrink": name, "seconds": options.shrink_seconds}
            if group["kind"] in pool.LOST:
                request = {"seed": seed, "paste": group["example"]["strategy"]}
            requests.append(request)
    for answer in pool.answers(requests, options.workers):
        if "small" not in answer:
            continue
        print(f"\n{'#' * 100}\n# seed {answer['seed']}", end="")
        if "left" in answer:
            left = answer["left"]
            print(f", {answer['steps']} operators left\n# {left['kind']}: {left['detail'][:300]}")
        print(f"\n{answer['small']}", flush=True)


def show(seeds: range) -> int:
    """Print the programs of the seeds."""
    for answer in pool.answers(({"seed": s, "show": True} for s in seeds), 1):
        print(f"# seed {answer['seed']} on {answer['mesh']}\n{answer['text']}")
    return 0


# --- planted faults ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What became of a planted fault.

    Attributes:
      name: of the fault.
      seed: of the first program that showed it; None if none did.
      detail: how it showed.
      tried: programs that were checked with and without it.
      reached: those of them that came to the planted place.
      seconds: taken.
    """

    name: str
    seed: int | None
    detail: str
    tried: int
    reached: int
    seconds: float

    def __str__(self) -> str:
        how = "NOT FOUND" if self.seed is None else f"found by seed {self.seed} ({self.detail})"
        return (
            f"{self.name}: {how}, {self.tried} programs, {self.reached} of them reach it, "
            f"{self.seconds:.0f} s"
        )


def find_planted(name: str, workers: int, first: int) -> Found:
    """Check programs with and without a planted fault until it shows."""
    begin, tried, reached = time.monotonic(), 0, 0
    seed, detail = None, ""
    requests = ({"seed": seed, "plant": name} for seed in range(first, first + PROGRAMS_TO_FIND))
    for answer in pool.answers(requests, workers):
        tried += 1
        reached += bool(answer.get("reached"))
        new = [f for f in answer.get("new", ()) if f["kind"] in FAULTS]
        if new:
            seed, detail = answer["seed"], f"{new[0]['kind']}: {new[0]['detail'][:60]}"
            break
    return Found(
        name=name,
        seed=seed,
        detail=detail,
        tried=tried,
        reached=reached,
        seconds=time.monotonic() - begin,
    )


def planted(workers: int, first: int) -> int:
    """Plant every fault; returns how many were not found."""
    from .planted import PLANTS

    missed = 0
    for name in PLANTS:
        found = find_planted(name, workers, first)
        missed += found.seed is None
        print(found, flush=True)
    return missed


if __name__ == "__main__":
    sys.exit(main())
