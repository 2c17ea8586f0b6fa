"""The fuzzer itself, and a slice of what it checks."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from . import operators, pool, programs
from .__main__ import FAULTS, PROGRAMS_TO_FIND, find_planted, summarize, write
from .planted import PLANTS


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


SLICE = range(9000, 9012)
"""Seeds of the programs that are checked with the other tests."""


def test_a_program_is_the_same_each_time_and_written_anew_from_its_choices() -> None:
    for seed in range(20):
        written = programs.draw(f"{seed}/0", seed)
        assert programs.draw(f"{seed}/0", seed) == written
        assert programs.write(written.program) == written


@pytest.mark.parametrize("name", operators.OPERATORS)
def test_every_operator_is_drawn(name: str) -> None:
    rng = random.Random(0)
    for _ in range(300):
        try:
            values = programs.draw_values(rng)
            names = [rng.choice(list(values)) for _ in range(operators.OPERATORS[name].arity)]
            writer = operators.Writer(9, rng, {}, {}, {})
            programs.write_step(programs.Step(9, name, tuple(names), ()), writer, values)
        except operators.Unfit:
            continue
        return
    pytest.fail(f"{name} never applies")


def test_programs_are_right() -> None:
    answers = list(pool.answers(({"seed": seed} for seed in SLICE), workers=1))
    faults = [
        f"seed {answer['seed']}: {finding['kind']}: {finding['detail']}"
        for answer in answers
        for finding in answer["findings"]
        if finding["kind"] in FAULTS
    ]
    assert sum(answer["checked"] for answer in answers) > 2 * len(SLICE)
    assert not faults, "\n".join(faults)


def test_a_process_that_dies_is_named() -> None:
    requests: list[dict[str, Any]] = [{"seed": 1, "die": True}, {"seed": 1, "show": True}]
    died, shown = pool.answers(requests, workers=1)
    assert [finding["kind"] for finding in died["findings"]] == ["died"]
    assert "def loss(" in shown["text"]


def test_summaries_add_up(tmp_path: Path) -> None:
    def answer(seed: int) -> dict[str, Any]:
        finding = {"kind": "price", "group": "g", "detail": f"d{seed}", "strategy": "s"}
        return {
            "seed": seed,
            "operators": ["a", f"b{seed % 2}"],
            "mesh": "m",
            "findings": [finding] if seed % 3 == 0 else [],
            "strategies": ["s"],
            **{"checked": 1, "priced": 2, "searched": 3},
        }

    def summary(seeds: range) -> dict[str, Any]:
        return summarize([answer(seed) for seed in seeds], seeds, "1.0", 10)

    for seeds in (range(0, 5), range(5, 9)):
        write(tmp_path / "fuzz.json", summary(seeds))
    whole = json.loads(json.dumps({"1.0": {**summary(range(9)), "seconds": 20}}))
    assert json.loads((tmp_path / "fuzz.json").read_text()) == whole


def test_a_pasted_program_runs() -> None:
    (answer,) = pool.answers([{"seed": 3, "paste": "random0"}], workers=1)
    command = [sys.executable, "-c", answer["small"]]
    done = subprocess.run(command, capture_output=True, text=True, env=pool.environment(fast=False))
    assert done.returncode == 0, done.stderr
    assert "jit off by" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTS)
def test_planted_faults_are_found(name: str) -> None:
    found = find_planted(name, workers=1, first=0)
    assert found.seed is not None and found.tried <= PROGRAMS_TO_FIND, str(found)
