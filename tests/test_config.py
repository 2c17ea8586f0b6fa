"""Configs, their enumeration, layouts and moves."""

from __future__ import annotations

import itertools
import math

import pytest

from jaxlwp.devices._device_graph import prime_factors
from jaxlwp.lower._halo import plan_halo
from jaxlwp.ops import Window
from jaxlwp.space._config import Config, enumerate_configs
from jaxlwp.space._exchange import move_collectives
from jaxlwp.space._layout import even_layout
from jaxlwp.space._moves import plan_moves

SIZES = {"a": 2, "b": 2, "c": 2}


def test_all_configs_are_distinct_and_complete() -> None:
    sizes = {"sample": (8,), "height": (8, 16), "channel": (8,)}
    arguments = {"sizes": sizes, "axis_groups": [("a", "b", "c")], "axis_sizes": SIZES}
    every = enumerate_configs(**arguments, interchangeable=False)
    assert len(every) == len(set(every)) == 4**3
    few = enumerate_configs(**arguments)
    # Numbers of axes (0..3) for three dimensions, at most three together.
    assert len(few) == len(set(few)) == math.comb(6, 3)
    assert set(few) <= set(every)
    assert few[-1] == Config()


def test_a_degree_may_not_exceed_the_size_nor_break_evenness() -> None:
    configs = enumerate_configs(
        sizes={"height": (3, 8)}, axis_groups=[("a", "b", "c")], axis_sizes=SIZES
    )
    assert {len(c.axes("height")) for c in configs} == {0, 1}
    configs = enumerate_configs(
        sizes={"height": (6,)}, even={"height": 6}, axis_groups=[("a", "b")], axis_sizes=SIZES
    )
    assert {len(c.axes("height")) for c in configs} == {0, 1}


def test_axes_of_several_levels_are_not_interchanged() -> None:
    configs = enumerate_configs(
        sizes={"sample": (8,), "channel": (8,)},
        axis_groups=[("host0",), ("device0",)],
        axis_sizes={"host0": 2, "device0": 2},
    )
    assert len(configs) == 3 * 3


def test_bad_configs() -> None:
    with pytest.raises(ValueError, match="twice"):
        Config((("sample", ("a",)), ("channel", ("a",))))
    with pytest.raises(ValueError, match="without mesh axes"):
        Config((("sample", ()),))


def test_even_layout_drops_minor_axes() -> None:
    assert even_layout((6, 8), (("a", "b"), ("c",)), SIZES) == (("a",), ("c",))
    assert even_layout((7,), (("a",),), SIZES) == ((),)


def all_layouts(axes: tuple[str, ...], rank: int) -> list[tuple[tuple[str, ...], ...]]:
    """Every layout over the axes, in every order."""
    result = []
    for order in itertools.permutations(axes):
        for places in itertools.product(range(rank + 1), repeat=len(axes)):
            layout = tuple(
                tuple(a for a, p in zip(order, places, strict=True) if p == d) for d in range(rank)
            )
            if layout not in result:
                result.append(layout)
    return result


def test_moves_end_in_the_target_and_gathers_only_where_needed() -> None:
    layouts = all_layouts(("a", "b"), 2)
    sizes = {"a": 2, "b": 2}
    for shape in ((8, 8), (7, 8), (7, 5)):
        for source, target in itertools.product(layouts, repeat=2):
            active = frozenset(a for axes in target for a in axes)
            moves = plan_moves(
                shape=shape, source=source, target=target, active=active, axis_sizes=sizes
            )
            assert (moves[-1].after if moves else source) == target
            grows = {a for x in source for a in x} <= active
            if shape == (8, 8) and grows and nested(source, target):
                assert all(m.kind != "all_gather" for m in moves), (source, target, moves)


def nested(source: tuple[tuple[str, ...], ...], target: tuple[tuple[str, ...], ...]) -> bool:
    """In each dimension one split refines the other, so that blocks only divide or merge."""
    return all(s == t[: len(s)] or t == s[: len(t)] for s, t in zip(source, target, strict=True))


def test_bytes_of_well_known_changes() -> None:
    axes = {"a": 2, "b": 2}

    def bytes_of(source: object, target: object, active: str = "ab") -> dict[str, int]:
        moves = plan_moves(
            shape=(8, 8),
            source=source,  # type: ignore[arg-type]
            target=target,  # type: ignore[arg-type]
            active=frozenset(active),
            axis_sizes=axes,
        )
        priced = move_collectives((8, 8), 4, source, moves, axes, gradient=True)  # type: ignore[arg-type]
        return {f"{c.kind}{'*' if c.backward else ''}": c.num_bytes for c in priced}

    whole = 8 * 8 * 4
    # By sample to by channel: one all-to-all of the block, and one back.
    swapped = bytes_of((("a", "b"), ()), ((), ("a", "b")))
    assert swapped == {"all-to-all": whole // 4, "all-to-all*": whole // 4}
    # By channel to whole, for a layer split by channel itself: the gradient is reduce-scattered.
    gathered = bytes_of(((), ("a",)), ((), ()), active="a")
    assert gathered == {"all-gather": whole // 2, "reduce-scatter*": whole}
    # A replicated weight used by data parallelism: the all-reduce of its gradient.
    assert bytes_of(((), ()), ((), ()), active="ab") == {"all-reduce*": whole}
    # Taking a part of what is replicated costs an all-gather of the gradient's parts.
    assert bytes_of(((), ()), (("a",), ()), active="a") == {"all-gather*": whole // 2}


@pytest.mark.parametrize("size", [7, 13, 16, 27, 55])
@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize(("window", "stride"), [(1, 1), (3, 1), (3, 2), (5, 2), (11, 4)])
def test_halo_reaches_every_row_that_a_block_reads(
    size: int, parts: int, window: int, stride: int
) -> None:
    low = (window - 1) // 2
    out = -(-size // stride)
    plan = plan_halo(
        size,
        out,
        Window(size=window, stride=stride, pad_low=low),
        parts,
    )
    out_block = -(-out // parts)
    for part, start in enumerate(plan.starts):
        first = part * plan.block + start
        assert first == part * out_block * stride - low
        for row in range(max(first, 0), min(first + plan.rows, size)):
            place = row - part * plan.block
            there = [(0, plan.block), *plan.received.pieces]
            assert any(start <= place < stop for start, stop in there)
            assert abs(row // plan.block - part) < parts


def test_prime_factors() -> None:
    assert [prime_factors(n) for n in (1, 2, 8, 12, 30)] == [
        (), (2,), (2, 2, 2), (3, 2, 2), (5, 3, 2)
    ]  # fmt: skip


def test_one_device_has_the_replicated_config() -> None:
    configs = enumerate_configs(sizes={"sample": (8,)}, axis_groups=[], axis_sizes={"device0": 1})
    assert configs == (Config(),)
