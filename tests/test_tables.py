"""CostTables holds the numbers of one problem; nothing malformed gets past its constructor."""

import dataclasses
import math

import numpy as np
import pytest

from jaxlwp.solver._tables import Cost, CostTables

INF, NAN = math.inf, math.nan

# Two layers, of two and three configs, joined by two edges, one in each direction.
VALID = {
    "compute_s": ([1.0, 2.0], [10.0, 20.0, 30.0]),
    "sync_s": ([0.5, 0.0], [0.0, 0.25, 0.0]),
    "edges": ((0, 1), (1, 0)),
    "transfer_s": ([[0, 1, 2], [3, 4, INF]], [[100, 200], [300, 400], [500, 600]]),
}


def make(**changes):
    return CostTables(**(VALID | changes))


def test_cost_adds_part_by_part():
    total = Cost(compute_s=1.0, transfer_s=2.0, sync_s=4.0) + Cost(transfer_s=8.0)
    assert total == Cost(compute_s=1.0, transfer_s=10.0, sync_s=4.0)
    assert total.total_s == 15.0


def test_costs_can_be_summed_from_an_empty_cost():
    assert sum([Cost(compute_s=1.0), Cost(sync_s=INF)], Cost()).total_s == INF


def test_cost_adds_to_nothing_but_costs():
    with pytest.raises(TypeError):
        Cost() + 1.0


@pytest.mark.parametrize("field", ["compute_s", "transfer_s", "sync_s"])
@pytest.mark.parametrize("value", [NAN, -1.0])
def test_cost_refuses_nan_and_negative(field, value):
    with pytest.raises(ValueError, match=rf"Cost\.{field} is {value}.*0 s or more.*check"):
        Cost(**{field: value})


def test_evaluate_sums_each_part_over_layers_and_edges():
    # transfer: edge 0 at [1, 1] is 4; edge 1 goes the other way, so [1, 1] of its own is 400.
    assert make().evaluate((1, 1)) == Cost(compute_s=22.0, transfer_s=404.0, sync_s=0.25)


def test_evaluate_of_what_is_not_allowed_is_infinite():
    cost = make().evaluate((1, 2))
    assert cost.transfer_s == cost.total_s == INF


def test_evaluate_takes_numpy_choices_and_returns_plain_floats():
    tables = make()
    cost = tables.evaluate(np.array([0, 2]))
    assert cost == tables.evaluate([0, 2])
    assert all(type(value) is float for value in dataclasses.astuple(cost))


def test_evaluate_of_a_single_layer_has_no_transfer():
    tables = CostTables(compute_s=([3.0],), sync_s=([1.0],), edges=(), transfer_s=())
    assert tables.evaluate([0]) == Cost(compute_s=3.0, sync_s=1.0)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ((0,), r"choices has 1 entries.*must have 2, one for each layer.*add"),
        ((0, 0, 0), r"choices has 3 entries.*must have 2"),
        ((0, 3), r"choices\[1\] is 3.*from 0 to 2, the index of one of the layer's 3 configs"),
        ((-1, 0), r"choices\[0\] is -1.*from 0 to 1"),
        ((0, 1.0), r"choices\[1\] is 1\.0.*whole number"),
        ((True, 0), r"choices\[0\] is True.*whole number"),
    ],
)
def test_evaluate_refuses_choices_that_do_not_fit(choices, message):
    with pytest.raises(ValueError, match=message):
        make().evaluate(choices)


def test_evaluate_names_the_layer():
    with pytest.raises(ValueError, match=r"choices\[1\] \(fc1\) is 7"):
        make(names=("conv1", "fc1")).evaluate((0, 7))


def test_properties():
    tables = make()
    assert tables.num_configs == (2, 3)
    assert [costs.tolist() for costs in tables.node_costs_s] == [[1.5, 2.0], [10.0, 20.25, 30.0]]


def test_arrays_are_read_only_float64_copies():
    mine = np.array([1.0, 2.0])
    tables = make(compute_s=(mine, np.array([1, 2, 3])))
    mine[0] = 99.0
    assert tables.compute_s[0].tolist() == [1.0, 2.0]
    for array in (*tables.compute_s, *tables.sync_s, *tables.transfer_s):
        assert array.dtype == np.float64
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0.0


def test_numpy_indices_become_plain_ones():
    tables = make(edges=np.array([[0, 1], [1, 0]]))
    assert tables.edges == ((0, 1), (1, 0))
    assert all(type(end) is int for edge in tables.edges for end in edge)


def test_a_whole_layer_may_be_infinite():
    assert make(sync_s=([INF, INF], [0, 0, 0])).evaluate((0, 0)).total_s == INF


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # Place, value, rule, remedy: each message has all four.
        (
            {"compute_s": ([1.0, NAN], [1, 2, 3])},
            r"compute_s\[0\] has nan at \[1\]: a cost must be 0 s or more; correct.*inf if",
        ),
        (
            {"sync_s": ([0, 0], [0, -2.5, NAN])},
            r"sync_s\[1\] has -2\.5 at \[1\]: a cost must be 0 s or more; correct",
        ),
        (
            {"transfer_s": ([[0, 1, 2], [3, NAN, 5]], VALID["transfer_s"][1])},
            r"transfer_s\[0\], edge 0 -> 1, has nan at \[1, 1\]: a cost must be 0 s or more",
        ),
        (
            {"transfer_s": (VALID["transfer_s"][0], [[1, 2], [3, -INF], [5, 6]])},
            r"transfer_s\[1\], edge 1 -> 0, has -inf at \[1, 1\]",
        ),
        (
            {"transfer_s": (np.zeros((3, 2)), VALID["transfer_s"][1])},
            r"transfer_s\[0\], edge 0 -> 1, has shape \(3, 2\): it must be \(2, 3\), one cost for",
        ),
        ({"sync_s": ([0, 0], [0, 0])}, r"sync_s\[1\] has shape \(2,\): it must be \(3\)"),
        ({"compute_s": ([1, 2], [])}, r"compute_s\[1\] has shape \(0,\): it must be \(1 or more\)"),
        ({"compute_s": ([1, 2], 3.0)}, r"compute_s\[1\] has shape \(\): it must be"),
        ({"compute_s": ([1, 2], [[1], [1, 2]])}, r"compute_s\[1\] is no array of numbers.*give"),
        ({"compute_s": ([1, 2], ["fast"])}, r"compute_s\[1\] is no array of numbers.*give"),
        ({"compute_s": ()}, r"compute_s is empty: give one array for each layer"),
        ({"sync_s": ([0, 0],)}, r"sync_s has 1 entries: it must have 2, one for each layer"),
        ({"edges": ((0, 1),)}, r"transfer_s has 2 entries: it must have 1, one for each edge"),
        ({"edges": ((0, 1), (1, 2))}, r"edges\[1\] is \(1, 2\).*from 0 to 1; correct the index"),
        ({"edges": ((-1, 1), (1, 0))}, r"edges\[0\] is \(-1, 1\).*from 0 to 1"),
        ({"edges": ((0, 1), (1, 0.0))}, r"edges\[1\] is \(1, 0\.0\).*pair of layer indices"),
        ({"edges": ((0, 1, 1), (1, 0))}, r"edges\[0\] is \(0, 1, 1\).*pair of layer indices"),
        ({"edges": ((0, 1), (1, 1))}, r"edges\[1\] is \(1, 1\).*two different layers; add the"),
        ({"names": ("conv1",)}, r"names has 1 entries: it must have 2, one for each layer; add"),
    ],
)
def test_malformed_tables_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_messages_name_the_layers():
    names = ("conv1", "fc1")
    with pytest.raises(ValueError, match=r"compute_s\[1\] \(fc1\) has -1\.0 at \[2\]"):
        make(names=names, compute_s=([1, 2], [1, 2, -1]))
    with pytest.raises(ValueError, match=r"edge 1 \(fc1\) -> 0 \(conv1\), has shape \(2, 2\)"):
        make(names=names, transfer_s=(VALID["transfer_s"][0], np.zeros((2, 2))))
