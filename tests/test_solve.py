"""Every way to search finds the optimum of any graph; the oracle is a brute force."""

import dataclasses
import itertools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from jaxlwp.solver import _bound, _branch, _eliminate, _exhaustive, _solve
from jaxlwp.solver._solve import Solution, solve
from tests.benchmarks.solvers import dense, inception, k_tree, sharding

INF, NAN = math.inf, math.nan
METHODS = ("elimination", "exhaustive")
WAYS = ("elimination", "bounds", "branching", "exhaustive")


@pytest.fixture
def way(request, monkeypatch):
    """The method to ask for, with limits patched so that it goes this way on graphs of any size."""
    if request.param in ("bounds", "branching"):
        monkeypatch.setattr(_solve, "_DIRECT_SWEEPS", 0)
    if request.param == "branching":
        monkeypatch.setattr(_solve, "_SUMS_LIMIT", 0)
        monkeypatch.setattr(_bound, "_ROUNDS_LIMIT", 1)  # leave something to branch on
        monkeypatch.setattr(_branch, "_BATCH", 3)
    return "exhaustive" if request.param == "exhaustive" else "elimination"


every_way = pytest.mark.parametrize("way", WAYS, indirect=True)

# name -> (layers, edges). Directions are mixed on purpose: they must not matter.
SHAPES = {
    "single layer": (1, []),
    "pair": (2, [(1, 0)]),
    "chain": (6, [(0, 1), (2, 1), (2, 3), (4, 3), (4, 5)]),
    "shuffled chain": (6, [(3, 0), (0, 5), (5, 1), (1, 4), (4, 2)]),
    "star": (6, [(2, 0), (2, 1), (3, 2), (2, 4), (5, 2)]),
    "tree": (7, [(0, 1), (0, 2), (1, 3), (4, 1), (5, 2), (2, 6)]),
    "triangle": (3, [(0, 1), (1, 2), (2, 0)]),
    "cycle": (6, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 0)]),
    "parallel edges": (2, [(0, 1), (0, 1), (1, 0)]),
    "parallel in a chain": (4, [(0, 1), (1, 0), (1, 2), (2, 3), (3, 2), (2, 3)]),
    "residual blocks": (6, [(0, 1), (1, 2), (0, 2), (2, 3), (3, 4), (2, 4), (4, 5)]),
    "branches": (7, [(0, 1), (1, 6), (0, 2), (2, 3), (3, 6), (0, 4), (4, 5), (5, 6)]),
    "no edges": (4, []),
    "two chains": (6, [(0, 2), (2, 4), (5, 3), (3, 1)]),
    "triangle and loner": (4, [(0, 1), (1, 3), (3, 0)]),
    "complete 4": (4, list(itertools.combinations(range(4), 2))),
    "complete 5": (5, list(itertools.combinations(range(5), 2))),
    "complete 4 with tails": (
        7,
        [*itertools.combinations(range(1, 5), 2), (0, 1), (4, 5), (6, 5)],
    ),
    "two complete 4": (
        8,
        [*itertools.combinations(range(4), 2), *itertools.combinations(range(4, 8), 2), (3, 4)],
    ),
    "blocks in a chain": (
        9,
        [*itertools.combinations(range(4), 2), (3, 4), *itertools.combinations(range(5, 9), 2)],
    ),
    "complete bipartite 3, 3": (6, [(a, b) for a in range(3) for b in range(3, 6)]),
}


def draw_real(rng, shape):
    return rng.random(shape)


def draw_ties(rng, shape):
    """Few different values, so many strategies cost the same, exactly."""
    return rng.integers(0, 3, shape).astype(float)


def draw_infinite(rng, shape):
    """A fifth not allowed, but never config 0, so that some strategy is."""
    costs = np.where(rng.random(shape) < 0.2, INF, rng.random(shape))
    costs[(0,) * len(shape)] = 1.0
    return costs


def draw_wide_range(rng, shape):
    """Seconds as far apart as real ones: from nanoseconds to minutes, and zero."""
    return np.where(rng.random(shape) < 0.1, 0.0, 10.0 ** rng.uniform(-9, 2, shape))


DRAWS = (draw_real, draw_ties, draw_infinite, draw_wide_range)


def make_problem(shape, draw, seed, least=1):
    """Random tables for a shape, `least` to four configs per layer."""
    layers, edges = SHAPES[shape]
    rng = np.random.default_rng(seed)
    sizes = rng.integers(least, 5, layers)
    nodes = [draw(rng, (n,)) for n in sizes]
    return nodes, edges, [draw(rng, (sizes[i], sizes[j])) for i, j in edges]


def evaluate(problem, choices):
    """The cost of a strategy: the definition, in plain Python."""
    nodes, edges, tables = problem
    total = 0.0
    for costs, choice in zip(nodes, choices, strict=True):
        total += costs[choice]
    for (i, j), table in zip(edges, tables, strict=True):
        total += table[choices[i]][choices[j]]
    return total


def brute_force(problem):
    """The least cost of all strategies."""
    configs = [range(len(costs)) for costs in problem[0]]
    return min(evaluate(problem, choices) for choices in itertools.product(*configs))


def check_optimal(problem, solution):
    assert solution.cost_s == evaluate(problem, solution.choices)
    assert solution.cost_s == pytest.approx(brute_force(problem), rel=1e-12, abs=0)
    assert solution.optimal
    assert solution.lower_bound_s == solution.cost_s
    assert solution.gap == 0.0


# Both methods are right --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("draw", DRAWS)
@every_way
def test_every_way_finds_the_optimum(shape, draw, way):
    for seed in range(12):  # 21 shapes x 4 draws x 12: 1008 graphs
        problem = make_problem(shape, draw, seed)
        check_optimal(problem, solve(*problem, method=way))


@st.composite
def problems(draw):
    """Any multigraph of up to six layers, its costs whole numbers: sums are exact."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=6))
    cost = st.sampled_from([0.0, 1.0, 2.0, 3.0, 7.0, 50.0, INF])
    ends = st.tuples(*[st.integers(0, len(sizes) - 1)] * 2).filter(lambda e: e[0] != e[1])
    edges = draw(st.lists(ends, max_size=12)) if len(sizes) > 1 else []

    def table(*shape):
        flat = draw(st.lists(cost, min_size=math.prod(shape), max_size=math.prod(shape)))
        return np.array(flat).reshape(shape)

    return [table(n) for n in sizes], edges, [table(sizes[i], sizes[j]) for i, j in edges]


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    # Limits stay as they are, and no machine is too slow.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(problems())
@every_way
def test_any_multigraph_is_solved_or_refused_as_infinite(way, problem):
    best = brute_force(problem)
    if best == INF:
        with pytest.raises(ValueError, match="every strategy"):
            solve(*problem, method=way)
    else:
        solution = solve(*problem, method=way)
        assert solution.cost_s == best == evaluate(problem, solution.choices)


@every_way
def test_small_blocks_change_nothing(monkeypatch, way):
    """Blocks bound the memory; with tiny ones every loop over blocks takes several rounds."""
    cases = [make_problem(shape, draw_real, 7) for shape in SHAPES]
    expected = [solve(*problem, method=way).choices for problem in cases]
    for block in (1, 5, 64):
        monkeypatch.setattr(_eliminate, "_BLOCK", block)
        monkeypatch.setattr(_exhaustive, "_BLOCK", block)
        assert [solve(*problem, method=way).choices for problem in cases] == expected


@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 3, 4), (70, 33, 90), (257, 40, 130)])
def test_min_plus_product_equals_its_definition(sizes):
    u, v, w = sizes
    rng = np.random.default_rng(0)
    left, right = rng.random((u, v)), rng.random((w, v)).T  # one of them not contiguous
    expected = np.min(left[:, :, None] + right[None, :, :], axis=1)
    assert np.array_equal(_eliminate.min_plus(left, right), expected)


@every_way
def test_a_hand_worked_example(way):
    # Config 1 is cheaper in both outer layers, but the middle one has config 0 only.
    nodes = [[5.0, 1.0], [2.0], [5.0, 1.0]]
    tables = [[[0.0], [10.0]], [[0.0, 3.0]]]
    solution = solve(nodes, [(0, 1), (1, 2)], tables, method=way)
    assert solution.choices == (0, 0, 1)
    assert solution.cost_s == 11.0


# What a solution says of the search -----------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "edges", "width"),
    [
        ("single layer", 0, 0),
        ("pair", 0, 1),
        ("chain", 0, 1),
        ("triangle", 1, 2),
        ("cycle", 1, 2),
        ("parallel in a chain", 3, 1),
        ("branches", 2, 2),
        ("no edges", 0, 0),
        ("complete 4", 3, 3),
        ("complete 4 with tails", 3, 3),
        ("complete 5", 6, 4),
        ("complete bipartite 3, 3", 3, 3),
    ],
)
def test_eliminations_are_counted(shape, edges, width):
    problem = make_problem(shape, draw_real, 0, least=2)  # one config: whatever the shape
    solution = solve(*problem)
    assert (solution.nodes_eliminated, solution.width) == (len(problem[0]), width)
    assert solution.remaining == solution.enumerated == 0
    if width < 3:  # of wider ones tables of three layers may be merged or not
        assert solution.edges_eliminated == edges


def test_scalars_that_join_layers_leave_nothing_to_enumerate():
    """A weight penalty: each layer's own sum goes into one chain of sums, of one config each."""
    layers = 20
    sizes = [4] * layers + [3] * layers + [1] * layers  # the network, its sums, the sums' sums
    edges = [(i, i + 1) for i in range(layers - 1)]
    edges += [(i, layers + i) for i in range(layers)]
    edges += [(layers + i, 2 * layers + i) for i in range(layers)]
    edges += [(2 * layers + i, 2 * layers + i + 1) for i in range(layers - 1)]
    edges += [(i, i + 2) for i in range(0, layers - 2, 2)]  # and residual connections
    rng = np.random.default_rng(0)
    tables = [rng.random((sizes[i], sizes[j])) for i, j in edges]
    assert solve([rng.random(n) for n in sizes], edges, tables).width == 2


def test_exhaustive_enumerates_everything():
    problem = make_problem("branches", draw_real, 3)
    solution = solve(*problem, method="exhaustive")
    assert solution.enumerated == math.prod(len(costs) for costs in problem[0])
    assert (solution.remaining, solution.nodes_eliminated) == (7, 0)
    assert solution.method == "exhaustive"


@pytest.mark.parametrize(
    ("cost_s", "lower_bound_s", "optimal", "gap"),
    [(4.0, 3.0, False, 0.25), (4.0, 0.0, False, 1.0), (4.0, 4.0, True, 0.0), (0.0, 0.0, False, 0)],
)
def test_gap_is_the_share_that_could_be_saved(cost_s, lower_bound_s, optimal, gap):
    solution = dataclasses.replace(
        solve([[1.0]], [], []), cost_s=cost_s, lower_bound_s=lower_bound_s, optimal=optimal
    )
    assert solution.gap == gap


@pytest.mark.parametrize(("cost_s", "lower_bound_s"), [(1.0, 2.0), (INF, 1.0), (NAN, 1.0)])
def test_a_solution_with_impossible_bounds_is_refused(cost_s, lower_bound_s):
    solution = solve([[1.0]], [], [])
    with pytest.raises(ValueError, match=r"lower_bound_s is .* and cost_s .*finite; check both"):
        dataclasses.replace(solution, cost_s=cost_s, lower_bound_s=lower_bound_s)


# Determinism ----------------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_input_gives_the_same_solution(shape, way):
    problem = make_problem(shape, draw_ties, 1)
    first = solve(*problem, method=way)
    assert isinstance(first, Solution)
    assert solve(*problem, method=way) == first
    copies = [np.asfortranarray(table.copy()) for table in problem[2]]  # memory order is no input
    assert solve(problem[0], problem[1], copies, method=way) == first


@every_way
@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_config_wins_ties(shape, way):
    layers, edges = SHAPES[shape]
    nodes, tables = [np.ones(3)] * layers, [np.ones((3, 3))] * len(edges)
    assert solve(nodes, edges, tables, method=way).choices == (0,) * layers


# Limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("graph", "configs"),
    [(dense(12), 10), (k_tree(20, 6), 8), (inception(60), 60)],
    ids=["branching", "k-tree", "inception"],
)
def test_a_limit_of_work_ends_the_search_at_the_same_place(graph, configs):
    """What it knows by then holds, and is the same each time; more work knows no less."""
    problem = sharding(graph, configs, 1)
    whole = solve(*problem)
    assert whole.optimal and whole.work > 0
    gaps = []
    for share in (0, 0.1, 0.5, 0.9, 1):
        ended = solve(*problem, work_limit=share * whole.work)
        assert solve(*problem, work_limit=share * whole.work) == ended
        assert (
            ended.lower_bound_s <= whole.cost_s <= ended.cost_s == evaluate(problem, ended.choices)
        )
        assert ended.optimal == (share == 1)
        gaps.append(ended.gap)
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0


def test_a_limit_that_leaves_no_time_for_a_strategy_says_so():
    forbidden = np.full((2, 2), INF)
    forbidden[1, 1] = 1.0
    problem = [[0.0, 9.0]] * 3, [(0, 1), (1, 2), (2, 0)], [forbidden] * 3
    assert solve(*problem).choices == (1, 1, 1)
    with pytest.raises(
        TimeoutError, match="work_limit.* is over, and no allowed strategy is found"
    ):
        solve(*problem, work_limit=0)
    with pytest.raises(ValueError, match="work_limit is -1: it must be 0 or more"):
        solve(*problem, work_limit=-1)


@pytest.mark.parametrize("block", [1, 9, 1 << 16])
def test_exhaustive_returns_the_first_optimum_in_dictionary_order(monkeypatch, block):
    monkeypatch.setattr(_exhaustive, "_BLOCK", block)
    for seed in range(10):
        problem = make_problem("complete 4", draw_ties, seed)
        everything = itertools.product(*(range(len(costs)) for costs in problem[0]))
        first = min(everything, key=lambda choices: evaluate(problem, choices))
        assert solve(*problem, method="exhaustive").choices == first


@every_way
def test_the_input_is_not_changed(way):
    nodes, edges, tables = make_problem("branches", draw_real, 0)
    before = [array.copy() for array in (*nodes, *tables)]
    solve(nodes, edges, tables, method=way)
    assert all(map(np.array_equal, (*nodes, *tables), before))


# What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("nodes", "edges", "tables", "message"),
    [
        # Place, value, rule, remedy.
        ([[1], [2, NAN]], [], [], r"node_costs\[1\] has nan at \[1\].*0 s or more; correct"),
        ([[1], [-2.0, 1]], [], [], r"node_costs\[1\] has -2\.0 at \[0\].*0 s or more; correct"),
        (
            [[1], [2, 3]],
            [(0, 1)],
            [[[0, NAN]]],
            r"edge_costs\[0\], edge 0 -> 1, has nan at \[0, 1\].*0 s or more; correct",
        ),
        (
            [[1], [2, 3]],
            [(1, 0)],
            [[[0, 0]]],
            r"edge_costs\[0\], edge 1 -> 0, has shape \(1, 2\): it must be \(2, 1\), one cost for",
        ),
        ([[1], [[2]]], [], [], r"node_costs\[1\] has shape \(1, 1\): it must be \(1 or more\)"),
        ([[1], []], [], [], r"node_costs\[1\] has shape \(0,\): it must be \(1 or more\)"),
        ([], [], [], r"node_costs is empty: give one array of costs for each layer"),
        ([[1], [2]], [(0, 1)], [], r"edge_costs has 0 entries for 1 edges.*one.*each edge; add"),
        ([[1], [2]], [(0, 2)], [[[0]]], r"edges\[0\] is \(0, 2\).*from 0 to 1; correct"),
        ([[1], [2]], [(1, 1)], [[[0]]], r"edges\[0\] is \(1, 1\).*two different layers; add"),
    ],
)
def test_malformed_input_is_refused(method, nodes, edges, tables, message):
    with pytest.raises(ValueError, match=message):
        solve(nodes, edges, tables, method=method)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match='is \'dp\'.*must be one of "elimination", "exhaustive"'):
        solve([[1.0]], [], [], method="dp")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("nodes", "table", "message"),
    [
        (
            [[1.0], [INF, INF]],
            [[0.0, 0.0]],
            r"layer 1: node_costs\[1\] has only inf entries, so every strategy costs inf.*give",
        ),
        (
            [[1.0], [1.0, 1.0]],
            [[INF, INF]],
            r"edge 0 -> 1: edge_costs\[0\] has only inf entries, so every strategy costs inf",
        ),
        (
            [[1.0], [1.0, INF]],
            [[INF, 1.0]],
            r"every strategy of these 2 layers costs inf, so none is allowed.*; allow more",
        ),
    ],
)
def test_a_problem_without_an_allowed_strategy_is_refused(method, nodes, table, message):
    with pytest.raises(ValueError, match=message):
        solve(nodes, [(0, 1)], [table], method=method)


@every_way
def test_sums_that_overflow_are_not_allowed(way):
    huge = np.finfo(float).max
    with pytest.raises(ValueError, match="every strategy"):
        solve([[huge], [huge, huge]], [(0, 1)], [[[0.0, 0.0]]], method=way)
    problem = ([[huge], [huge, 0.0], [0.0]], [(0, 1), (1, 2)], [[[0.0, 0.0]], [[0.0], [huge / 2]]])
    with pytest.raises(ValueError, match="every strategy"):
        solve(*problem, method=way)


def test_too_many_combinations_to_search_exhaustively_are_refused():
    problem = [np.ones(3)] * 4, [], []
    assert solve(*problem, method="exhaustive", enumerate_limit=81).enumerated == 81
    message = r'method "exhaustive" has 4 layers, with 81 combinations.*enumerate_limit=80; give'
    with pytest.raises(ValueError, match=message):
        solve(*problem, method="exhaustive", enumerate_limit=80)
    many = [np.ones(35)] * 21, [], []
    with pytest.raises(ValueError, match="combinations of configs to enumerate"):
        solve(*many, method="exhaustive")
