"""Min-marginals and the k best strategies are what enumerating every strategy says they are."""

import itertools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from jaxlwp.solver import _marginals
from jaxlwp.solver._marginals import k_best, min_marginals
from jaxlwp.solver._solve import solve
from tests.test_solve import DRAWS, SHAPES, draw_ties, evaluate, make_problem, problems


def every_strategy(problem):
    """(cost, choices) of all that are allowed, the cheapest first."""
    configs = [range(len(costs)) for costs in problem[0]]
    priced = ((evaluate(problem, c), c) for c in itertools.product(*configs))
    return sorted(pair for pair in priced if pair[0] < math.inf)


def check_min_marginals(problem, strategies):
    found = min_marginals(*problem)
    for layer, costs in enumerate(problem[0]):
        expected = np.full(len(costs), math.inf)
        for cost, choices in strategies:
            expected[choices[layer]] = min(expected[choices[layer]], cost)
        assert found[layer] == pytest.approx(expected, rel=1e-12, abs=0)


def check_k_best(problem, strategies, k):
    found = k_best(*problem, k)
    assert len(found) == min(k, len(strategies))
    assert len({s.choices for s in found}) == len(found)
    assert [s.cost_s for s in found] == [evaluate(problem, s.choices) for s in found]
    expected = [cost for cost, _ in strategies[:k]]
    assert [s.cost_s for s in found] == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("draw", DRAWS)
def test_both_equal_enumeration(shape, draw):
    for seed in range(2):
        problem = make_problem(shape, draw, seed)
        strategies = every_strategy(problem)
        check_min_marginals(problem, strategies)
        for k in (1, 2, 20):
            check_k_best(problem, strategies, k)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(problems(), st.integers(1, 40))
def test_both_on_any_multigraph(problem, k):
    strategies = every_strategy(problem)
    if strategies:
        check_min_marginals(problem, strategies)
        check_k_best(problem, strategies, k)
    else:
        for function in (min_marginals, lambda *p: k_best(*p, k)):
            with pytest.raises(ValueError, match="every strategy"):
                function(*problem)


def test_all_strategies_are_found_if_asked_for():
    problem = make_problem("triangle and loner", draw_ties, 3)
    strategies = every_strategy(problem)
    found = k_best(*problem, 10**6)
    assert {s.choices for s in found} == {choices for _, choices in strategies}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_best_is_the_optimum(shape):
    problem = make_problem(shape, draw_ties, 5)
    optimum = solve(*problem)
    assert k_best(*problem, 1)[0].choices == optimum.choices
    assert all(costs.min() == optimum.cost_s for costs in min_marginals(*problem))


@pytest.mark.parametrize("k", [0, -1])
def test_no_strategies_asked_for_is_refused(k):
    with pytest.raises(ValueError, match=rf"k is {k}: it must be 1 or more"):
        k_best([[1.0]], [], [], k)


def test_a_graph_too_dense_is_refused(monkeypatch):
    problem = make_problem("complete 5", draw_ties, 0, least=4)
    monkeypatch.setattr(_marginals, "_ENTRIES_LIMIT", 4**5 - 1)
    for function in (min_marginals, lambda *p: k_best(*p, 3)):
        with pytest.raises(ValueError, match=r"too dense: a table over 5 layers .* 1,024 .*fewer"):
            function(*problem)
