"""The pure functions of `make bench-truth`: forecasts beside published measurements."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxlwp.check import forecast
from jaxlwp.devices import preset
from tests.benchmarks.hidden import Sum, eager_ends, hidden, last_end_s
from tests.benchmarks.truth import (
    MEASURED,
    NCCL_1,
    compared,
    forecasts,
    missed,
    summary,
    with_links,
)

DATA = Path(__file__).parent / "data"

# x is an input; a and b are layers forward; "b grad" and "a grad" are gradients of their weights,
# "back" is that of b's input. The update of b's weight comes behind its sum.
STEP = {
    "x": (),
    "a": ("x",),
    "b": ("a",),
    "back": ("b",),
    "a grad": ("back", "x"),
    "b grad": ("b", "a"),
    "b sum": ("b grad",),
    "a sum": ("a grad",),
    "b update": ("b sum",),
}
SECONDS = {"a": 1.0, "b": 2.0, "back": 4.0, "a grad": 8.0, "b grad": 16.0, "b update": 32.0}


def test_a_gradient_is_computed_when_it_can_be_and_an_update_last() -> None:
    # By the order of the graph "b grad" would come last, after 31 seconds.
    assert eager_ends(STEP, SECONDS, ["b sum", "a sum"]) == {
        "x": 0,
        "a": 1,
        "b": 3,
        "b grad": 19,
        "b sum": 19,
        "back": 23,
        "a grad": 31,
        "a sum": 31,
        "b update": 63,
    }


def test_an_operand_that_is_read_twice_is_waited_for_once() -> None:
    ends = eager_ends({"x": (), "y": ("x", "x"), "sum": ("y", "y")}, {"x": 1, "y": 2}, ["sum"])
    assert ends == {"x": 1, "y": 3, "sum": 3}


@pytest.mark.parametrize(
    ("sums", "end_s"),
    [
        ([(1, 2), (4, 1)], 5),  # the first has ended when the second is ready
        ([(1, 5), (4, 1)], 7),  # the second waits for the first
        ([], 0),
    ],
)
def test_sums_run_one_after_the_other_when_they_are_ready(
    sums: list[tuple[float, float]], end_s: float
) -> None:
    assert last_end_s(Sum("", ready_s, seconds, 0) for ready_s, seconds in sums) == end_s


def test_sums_of_a_compiled_program_are_all_there_and_hide() -> None:
    text = (DATA / "two_layers.hlo").read_text()
    found = forecast(text, preset("dgx-h200"))
    result = hidden(text, found)
    reduced = found.collectives["all-reduce"]
    assert len(result.sums) == reduced.count > 0
    assert sum(each.num_bytes for each in result.sums) == reduced.num_bytes
    assert result.compute_s == found.compute_s
    assert all(0 < each.ready_s <= result.compute_s for each in result.sums)
    assert found.compute_s <= result.total_s
    assert result.total_s <= found.compute_s + found.communication_s


def test_loops_are_refused() -> None:
    text = (DATA / "flow.hlo").read_text()
    with pytest.raises(ValueError, match="is not in the entry of the program"):
        hidden(text, forecast(text, preset("dgx-h200")))


def test_growth_and_errors() -> None:
    # 10 examples a GPU: 100 images/s on one, 360 on four, where 96 and 400 were measured.
    found = compared({1: 96, 4: 400}, 10, {1: 0.1, 4: 40 / 360})
    assert found[1]["images_per_s"] == pytest.approx(100)
    assert found[1]["error"] == pytest.approx(100 / 96 - 1)
    assert found[1]["growth"] == found[1]["growth_measured"] == 1
    assert found[4]["error"] == pytest.approx(-0.1)
    assert found[4]["growth"] == pytest.approx(3.6)
    assert found[4]["growth_measured"] == pytest.approx(400 / 96)
    assert found[4]["growth_error"] == pytest.approx(3.6 * 96 / 400 - 1)


def test_forecasts_of_what_was_compiled() -> None:
    row = MEASURED[0]
    programs = {
        "1": {"one": {"schedule_s": 0.25}},
        "2": {"own": {"schedule_s": 0.3, "hidden_s": 0.25}},
        "4": {"partitioned": {"schedule_s": 0.5}},
    }
    found = forecasts(row, programs)
    assert sorted(found) == ["own, schedule", "own, sums hidden", "partitioned, schedule"]
    assert found["own, sums hidden"][2]["growth"] == 2
    assert found["own, schedule"][2]["growth"] == pytest.approx(5 / 3)
    assert sorted(found["partitioned, schedule"]) == [1, 4]


def test_links_of_nccl_1() -> None:
    system = preset("dgx-1-p100")
    slower = with_links(system, NCCL_1)
    assert slower.gpu == system.gpu
    one_way = 2 * 7 / 8 * 1e9
    assert slower.collective_s("all-reduce", 1e9, range(8)) == pytest.approx(
        system.inside.start_s + one_way / 6e9
    )
    assert system.collective_s("all-reduce", 1e9, range(8)) == pytest.approx(
        system.inside.start_s + one_way / 72e9
    )


def test_bars_that_are_missed_and_the_table() -> None:
    row = MEASURED[0]  # 384, 763, 1513 and 3005 images/s
    rate, growth = row.rate_bar, row.growth_bar
    assert (rate, growth) == (0.25, 0.05)
    seconds = {1: 96 / 500, 2: 2 * 96 / 763, 8: 8 * 96 / 6000}
    found = compared(row.images_per_s, row.batch, seconds)
    found = {str(count): figures for count, figures in found.items()}
    rows = {row.key: {"forecast": {"own, sums hidden": found}}}
    assert [line for line in missed(rows) if row.key in line] == [
        f"{row.key}: rate of one GPU +30 %",
        f"{row.key}: growth to 2 -23.2 %",
        f"{row.key}: 4 not compiled",
        f"{row.key}: growth to 8 +53.3 %",
    ]
    lines = summary(rows).splitlines()[2:]
    assert lines == [
        f"| {row.key} | 1 | 384 | 500 (+30 %) |  |  |  |  |",
        "|  | 2 | 763 | 763 (+0 %) | 1.99 | 1.53 (-23.2 %) |  |  |",
        "|  | 8 | 3005 | 6000 (+100 %) | 7.83 | 12.00 (+53.3 %) |  |  |",
    ]
