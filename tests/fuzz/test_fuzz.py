"""The fuzzer itself, and a slice of what it checks."""

from __future__ import annotations

from typing import Any

import pytest

from . import operators, pool, programs
from .__main__ import FAULTS, PROGRAMS_TO_FIND, find_planted
from .planted import PLANTS

SLICE = range(9000, 9012)
"""Seeds of the programs that are checked with the other tests."""


def test_a_program_is_the_same_each_time_and_written_anew_from_its_choices() -> None:
    for seed in range(20):
        written = programs.draw(f"{seed}/0", seed)
        assert programs.draw(f"{seed}/0", seed) == written
        assert programs.write(written.program) == written


def test_every_operator_is_drawn() -> None:
    drawn: set[str] = set()
    for seed in range(1500):
        drawn |= set(programs.draw(f"{seed}/0", seed).program.operators)
        if set(operators.OPERATORS) <= drawn:
            break
    assert set(operators.OPERATORS) <= drawn


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


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTS)
def test_planted_faults_are_found(name: str) -> None:
    found = find_planted(name, workers=1, first=0)
    assert found.seed is not None and found.tried <= PROGRAMS_TO_FIND, str(found)
