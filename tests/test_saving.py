"""Saved problems and strategies: the same answers without model and devices; any file is refused
in one line."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import example, given, settings
from jax.sharding import AbstractMesh

import jaxlwp
from jaxlwp import Config, Constraints, Strategy
from jaxlwp.cli import main
from jaxlwp.cli._workload import load_workload
from jaxlwp.cost import Problem, SavedProblem, SearchSpace, load_problem, restrict
from jaxlwp.cost import _problem_file as file
from jaxlwp.optimize import diff_strategies, measured_space, runners_up, search_measured
from jaxlwp.report import diff_text, problem_text, result_text
from jaxlwp.space import strategy_schema

ROOT = Path(__file__).parent.parent
RATES = jaxlwp.Rates(
    flops_per_s=5e10, memory_bytes_per_s=5e10, latency_s=(1e-5,), link_bytes_per_s=(2e9,)
)
MESH = AbstractMesh((2, 2), ("device0", "device1"))


class Block(nn.Module):
    """Two branches that meet again: a graph that is no chain."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        y = nn.relu(nn.GroupNorm(2)(nn.Conv(8, (3, 3), use_bias=False)(x)))
        x = nn.Conv(8, (1, 1))(x) + nn.Conv(8, (3, 3))(y)
        return nn.Dense(5)(nn.relu(x).mean((1, 2)))


def block() -> SearchSpace:
    model = Block()

    def loss(params: Any, x: Any) -> Any:
        return jnp.mean(model.apply(params, x) ** 2)

    x = jax.ShapeDtypeStruct((8, 12, 12, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    return jaxlwp.price(jaxlwp.trace(loss, params, x), jaxlwp.device_graph(MESH, rates=RATES))


def lenet() -> SearchSpace:
    work = load_workload("models.lenet:LeNet5", batch=16, abstract=True)
    graph = jaxlwp.trace(work.loss, work.params, *work.batch)
    return jaxlwp.price(graph, jaxlwp.device_graph(MESH, rates=RATES))


def measured(space: SearchSpace) -> SearchSpace:
    """As a lazy search leaves it: some times measured, the others estimates."""
    rng = np.random.default_rng(0)
    times = tuple(s * rng.uniform(0.8, 1.6, s.shape) for s in space.tables.compute_s)
    return dataclasses.replace(
        space,
        tables=dataclasses.replace(space.tables, compute_s=times),
        measured=tuple(rng.random(s.shape) < 0.4 for s in times),
        analytic_s=space.tables.compute_s,
    )


@pytest.fixture(scope="module")
def spaces() -> dict[str, SearchSpace]:
    return {"lenet": measured(lenet()), "block": measured(block())}


@pytest.fixture(scope="module", params=["lenet", "block"])
def space(request: Any, spaces: dict[str, SearchSpace]) -> SearchSpace:
    return spaces[request.param]


@pytest.fixture(scope="module")
def path(space: SearchSpace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("problems") / "problem.npz"
    space.save(path)
    return path


@pytest.fixture(scope="module")
def saved(path: Path) -> SavedProblem:
    return load_problem(path)


# The same answers ---------------------------------------------------------------------------------

SOME = Constraints(pin={"*onv*1": {"sample": 2}}, forbid=("height",), replicated=("*bias*",))
CONSTRAINTS = [None, SOME, Constraints(pin={"*onv*1": Config()})]


@pytest.mark.parametrize("constraints", CONSTRAINTS, ids=["none", "some", "config"])
@pytest.mark.parametrize("objective", ["sum", "overlap", "bytes", "memory", "limit"])
def test_searches_find_the_same(
    space: SearchSpace, saved: SavedProblem, constraints: Constraints | None, objective: str
) -> None:
    problems: list[Problem] = [space, saved]
    if constraints is not None:
        problems = [restrict(problem, constraints) for problem in problems]
        assert sum(map(len, problems[0].configs)) < sum(map(len, space.configs))
    options: dict[str, Any] = {"objective": objective, "optimizer_slots": 2.0}
    if objective == "limit":
        least, most = (
            jaxlwp.search(problems[0], objective=jaxlwp.optimize.PeakMemory(2.0)).value,
            problems[0].memory_tables(2.0).estimate(jaxlwp.search(problems[0]).solution.choices),
        )
        options |= {"objective": "sum", "memory_bytes": (least + most) / 2}
    first, second = (jaxlwp.search(problem, **options) for problem in problems)
    assert first.optimal
    assert (first.strategy, first.value, first.cost) == (
        second.strategy,
        second.value,
        second.cost,
    )


def test_a_limit_that_nothing_keeps_is_told_alike(space: SearchSpace, saved: SavedProblem) -> None:
    errors = []
    for problem in (space, saved):
        with pytest.raises(jaxlwp.MemoryLimitError) as caught:
            jaxlwp.search(problem, memory_bytes=10)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    assert "Most of it is held by" in errors[0]


def test_curves_explanations_and_baselines_are_the_same(
    space: SearchSpace, saved: SavedProblem
) -> None:
    curves = [jaxlwp.pareto(problem, points=4) for problem in (space, saved)]
    points = [[(p.seconds, p.estimated_bytes, p.result.strategy) for p in c.points] for c in curves]
    assert points[0] == points[1]
    assert len(points[0]) > 1
    assert "program" in str(curves[0])
    assert "program" not in str(curves[1])  # it is not there, and not made up

    name = space.graph.layers[2].name
    first, second = jaxlwp.explain(space), jaxlwp.explain(saved)
    assert str(first) == str(second)
    assert first.alternatives(name) == second.alternatives(name)
    assert first.price(SOME) == second.price(SOME)
    ranked = [[(r.strategy, r.cost) for r in runners_up(p, 3)] for p in (space, saved)]
    assert ranked[0] == ranked[1]

    assert space.baselines() == saved.baselines()
    for name, strategy in space.baselines().items():
        assert saved.evaluate(strategy) == space.evaluate(strategy), name
        assert strategy.record.step_s == space.evaluate(strategy).total_s


def test_all_of_it_is_there_again(space: SearchSpace, saved: SavedProblem, tmp_path: Path) -> None:
    assert (saved.graph.digest, saved.graph.fingerprint) == (
        space.graph.digest,
        space.graph.fingerprint,
    )
    assert saved.graph.parameters == space.graph.parameters
    assert saved.devices == space.devices
    assert saved.configs == space.configs
    for name in ("measured", "analytic_s"):
        every = zip(getattr(saved, name), getattr(space, name), strict=True)
        assert all(np.array_equal(a, b) for a, b in every), name
    saved.save(tmp_path / "again.npz")
    space.save(tmp_path / "first.npz")
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "first.npz").read_bytes()

    kept = dataclasses.replace(restrict(saved, SOME), whole=False, floor_s=1e-6)
    kept.save(tmp_path / "kept.npz")
    again = load_problem(tmp_path / "kept.npz")
    assert (again.configs, again.whole, again.floor_s) == (kept.configs, False, 1e-6)
    assert again.constraints is not None
    assert again.constraints.apply(again.graph, again.configs, again.devices.axis_sizes) == (
        kept.configs
    )
    assert again.constraints.pin == {"*onv*1": {"sample": 2}}


@pytest.mark.parametrize("width", [60, 80, 120])
def test_it_shows_itself(space: SearchSpace, saved: SavedProblem, width: int) -> None:
    found = jaxlwp.search(saved)
    for text in (problem_text(saved, width), result_text(found, {}, width)):
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text
        assert f"layers measured: {space.num_measured:,} of {space.num_pairs:,}" in " ".join(
            text.split()
        )
    assert f"{len(space.configs)} layers" in repr(saved)
    assert "saved by jaxlwp" in repr(saved)
    assert "saved by" not in repr(space)


def test_what_needs_the_program_says_so(space: SearchSpace, saved: SavedProblem) -> None:
    attempts: list[Callable[[Any], Any]] = [
        lambda problem: search_measured(problem, None),  # type: ignore[arg-type]
        lambda problem: measured_space(problem, None),  # type: ignore[arg-type]
        lambda problem: jaxlwp.simulate.simulate_step(problem, "data"),
        lambda problem: jaxlwp.bind(problem, problem.baseline("data"), MESH, (), None),
    ]
    for attempt in attempts:
        with pytest.raises(ValueError, match=r"a saved problem has costs and no program.*price"):
            attempt(saved)


# Another process ----------------------------------------------------------------------------------

ELSEWHERE = """
import json, sys
sys.modules["models"] = None  # whoever imports it gets an ImportError
import jax
assert len(jax.devices()) == 1
import jaxlwp
for name, limit in zip(sys.argv[1::2], sys.argv[2::2]):
    problem = jaxlwp.cost.load_problem(f"{name}.npz")
    found = jaxlwp.search(problem)
    fits = jaxlwp.search(problem, memory_bytes=float(limit))
    found.strategy.save(f"{name}.json")
    print(json.dumps([found.value, found.optimal, fits.value]))
"""


def test_a_process_without_model_and_devices_finds_the_same(
    spaces: dict[str, SearchSpace], tmp_path: Path
) -> None:
    """And what it finds is a strategy for the process that has them."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "jaxlwp").symlink_to(Path(jaxlwp.__file__).parent)
    arguments, expected = [], []
    for name, space in spaces.items():
        space.save(tmp_path / f"{name}.npz")
        limit = 2 * jaxlwp.search(space, objective="memory").value
        here, fits = jaxlwp.search(space), jaxlwp.search(space, memory_bytes=limit)
        arguments += [name, str(limit)]
        expected.append((here, [here.value, True, fits.value]))
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *arguments],
        cwd=tmp_path,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "",
            "PYTHONPATH": str(tmp_path / "site"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name, line, (here, values) in zip(spaces, done.stdout.splitlines(), expected, strict=True):
        assert json.loads(line) == values
        found = Strategy.load(tmp_path / f"{name}.json")
        assert found == here.strategy
        assert spaces[name].evaluate(found) == here.cost


# Strategy files -----------------------------------------------------------------------------------


def test_strategies_are_files_of_the_schema(space: SearchSpace, tmp_path: Path) -> None:
    jsonschema.Draft202012Validator.check_schema(strategy_schema())
    validator = jsonschema.Draft202012Validator(strategy_schema())
    found = jaxlwp.search(space).strategy
    bare = dataclasses.replace(found, record=type(found.record)())
    unpriced = dataclasses.replace(
        found, record=dataclasses.replace(found.record, predicted_s={"compute_s": np.inf})
    )
    for strategy in (found, bare, unpriced, *space.baselines().values()):
        validator.validate(json.loads(strategy.to_json()))
        strategy.save(tmp_path / "s.json")
        again = Strategy.load(tmp_path / "s.json")
        assert again == strategy
        if strategy is not unpriced:
            assert again.record == strategy.record
    content = json.loads(found.to_json())
    assert content["predicted"]["step_s"] == pytest.approx(space.evaluate(found).total_s)
    assert content["model"]["digest"] == space.graph.digest
    content["mesh"]["device0"] = 0
    assert not validator.is_valid(content)
    assert os.listdir(tmp_path) == ["s.json"]


def test_the_schema_is_published() -> None:
    shown = json.loads((ROOT / "docs" / "strategy.schema.json").read_text())
    assert shown == strategy_schema()


OLD = {
    "format_version": 1,
    "name": "search",
    "fingerprint": "0123",
    "axis_sizes": {"device0": 2},
    "configs": {"conv1": {"sample": ["device0"]}, "fc1": {}},
}


def test_files_of_the_first_version_are_read() -> None:
    old = Strategy.from_json(json.dumps(OLD))
    assert old.configs == {"conv1": Config.of({"sample": ["device0"]}), "fc1": Config()}
    assert (old.record.step_s, old.record.digest) == (None, "")
    assert json.loads(old.to_json())["version"] == 2


NEW: dict[str, Any] = {
    "format": "jaxlwp strategy",
    "version": 2,
    "name": "search",
    "model": {"fingerprint": "0123"},
    "mesh": {"device0": 2},
    "configs": {"conv1": {"sample": ["device0"]}},
    "made_by": {},
}
WRONG = {
    "it is no JSON": "strategy",
    "it is no JSON (": '{"a": ',
    "the file is []; it must be an object": "[]",
    "nested more than 64 levels": "[" * 100_000,
    "does not say that it is a jaxlwp strategy": {"format": "onnx"},
    "has version 3 of the format, and jaxlwp 0.1.0 reads up to 2: install": {
        **NEW,
        "version": 3,
    },
    "version is true; it must be a whole number": {**NEW, "version": True},
    "format_version is 7; it must be 1": {**OLD, "format_version": 7},
    "the file lacks 'mesh'": {k: v for k, v in NEW.items() if k != "mesh"},
    "mesh.device0 is 0; it must be at least 1": {**NEW, "mesh": {"device0": 0}},
    "mesh.device0 is 2.5; it must be a whole number": {**NEW, "mesh": {"device0": 2.5}},
    "must be mesh axes, of which there are device0": {**NEW, "configs": {"c": {"sample": ["x"]}}},
    "a mesh axis twice": {**NEW, "configs": {"c": {"sample": ["device0", "device0"]}}},
    "predicted.compute_s is -1": {**NEW, "predicted": {"step_s": 1, "compute_s": -1}},
    "predicted lacks 'compute_s'": {**NEW, "predicted": {"step_s": 1}},
    "name is null; it must be a text": {**NEW, "name": None},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_strategy_files_are_told_in_one_line(message: str, tmp_path: Path) -> None:
    content = WRONG[message]
    path = tmp_path / "s.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError) as caught:
        Strategy.load(path)
    text = str(caught.value)
    assert text.startswith(f"{path} is not a strategy file: ")
    assert message in text and "give one that" in text and "\n" not in text


def test_another_program_of_the_same_layers_is_told() -> None:
    def loss(factor: float) -> Callable[..., Any]:
        return lambda w, x: factor * jnp.mean((x @ w) ** 2)

    w, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 8), (16, 8)))
    options: dict[str, Any] = {"rates": RATES, "devices": 4}
    strategy = jaxlwp.parallelize(loss(2.0), w, x, **options).strategy
    with pytest.warns(UserWarning, match=r"of digest \w+.*may be better; search") as told:
        plan = jaxlwp.parallelize(loss(3.0), w, x, **options, strategy=strategy)
    assert plan.strategy == strategy
    assert Path(told[0].filename).name == Path(__file__).name
    same = jaxlwp.parallelize(loss(2.0), w, x, **options, strategy=strategy)
    assert same.strategy == strategy


# Differences --------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [48, 80])
def test_a_diff_has_the_layers_that_differ_and_the_costs(space: SearchSpace, width: int) -> None:
    found, data = jaxlwp.search(space).strategy, space.baseline("data")
    diff = diff_strategies(found, data)
    expected = [n for n, config in found.configs.items() if config != data.configs[n]]
    assert list(diff.layers) == expected != []
    assert diff.differences == ()
    text = diff_text(diff, width)
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    assert f"{len(expected)} of {len(found.configs)} layers differ" in text
    content = json.loads(diff.to_json())
    assert content["predicted"]["b"]["step_s"] == space.evaluate(data).total_s
    assert list(content["layers"]) == expected
    assert "the same configs" in str(diff_strategies(data, data))


def test_a_diff_says_what_is_not_the_same() -> None:
    first = Strategy.from_json(json.dumps(OLD))
    other = dataclasses.replace(
        first, fingerprint="4567", axis_sizes={"device0": 4}, configs={"conv9": Config()}
    )
    text = str(diff_strategies(first, other))
    assert "(no such layer)" in text
    assert "model: other layers or shapes (fingerprints 0123 and 4567)" in text
    assert "mesh: {'device0': 2} and {'device0': 4}" in text
    assert "not known" in text
    new = Strategy.from_json(json.dumps({**NEW, "model": {"fingerprint": "0123", "digest": "ab"}}))
    newer = dataclasses.replace(new, record=dataclasses.replace(new.record, digest="cd"))
    assert "program: the same layers, traced from other programs" in str(
        diff_strategies(new, newer)
    )


# The command line ---------------------------------------------------------------------------------


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    monkeypatch.chdir(tmp_path)
    planned = run("plan", "models.lenet:LeNet5", "--devices", "h200:4", "--batch", "64",
                  "--save", "s.json", "--save-problem", "p.npz")  # fmt: skip
    assert planned.exit_code == 0, planned.output
    assert planned.output.splitlines()[-2:] == ["wrote s.json", "wrote p.npz"]
    first = Strategy.load("s.json")
    assert first.record.memory_bytes and first.record.rates == "4 x h200, system dgx-h200"

    again = run("search", "p.npz", "--show", "--json", "found.json", "--curve", "--why", "conv1")
    assert again.exit_code == 0, again.output
    content = json.loads(Path("found.json").read_text())
    assert content["optimal"] is True
    assert content["value"] == first.record.step_s
    assert content["strategy"]["configs"] == json.loads(first.to_json())["configs"]
    assert content["baselines"].keys() <= set(jaxlwp.BASELINES)

    other = run("search", "p.npz", "--forbid", "sample", "--pin", "conv2:channel=2",
                "--save", "t.json", "--strategy", "s.json")  # fmt: skip
    assert other.exit_code == 0, other.output
    assert "s.json" in other.output
    told = run("diff", "s.json", "t.json", "--json", "d.json")
    assert told.exit_code == 0, told.output
    assert "conv2" in json.loads(Path("d.json").read_text())["layers"]

    Path("bad.npz").write_bytes(Path("p.npz").read_bytes()[:-100])
    for arguments, message in (
        (("search", "bad.npz"), "is no saved problem: it is damaged, or no zip archive"),
        (("search", "s.json"), "is no saved problem"),
        (("search", "no.npz"), "No such file"),
        (("search", "p.npz", "--memory", "10"), "memory limit: 10 bytes"),
        (("search", "p.npz", "--slots", "0"), "--slots: 0.0 given"),
        (("search", "p.npz", "--pin", "nothing:sample=2"), "matches no layer"),
        (("diff", "s.json", "p.npz"), "p.npz: it is no text in UTF-8"),
    ):
        refused = run(*arguments)
        assert refused.exit_code == 2
        assert isinstance(refused.exception, SystemExit)
        assert message in refused.stderr and len(refused.stderr.splitlines()) == 1


# Damaged and foreign files ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For files that are written again and again."""
    return tmp_path_factory.mktemp("damaged")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["device0", "sample", "conv1", 10**400, 2**63, -1, "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=3) | st.sampled_from(["sample", "name"]), inner, max_size=3
        )
    ),
    max_leaves=5,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything in a JSON value."""
    if not isinstance(value, (dict, list)):
        return [path]
    children = value.items() if isinstance(value, dict) else enumerate(value)
    return [path, *(p for key, child in children for p in places(child, (*path, key)))]


def changed(content: Any, path: tuple[Any, ...], value: Any, *, drop: bool) -> Any:
    """A JSON value with another one somewhere in it, or without what is there."""
    if not path:
        return value
    content = copy.deepcopy(content)
    inside = content
    for key in path[:-1]:
        inside = inside[key]
    if drop:
        del inside[path[-1]]
    else:
        inside[path[-1]] = value
    return content


def refused_or_read(read: Callable[[], Any]) -> Any:
    """What is read; None if it is refused, which takes one line."""
    try:
        return read()
    except ValueError as error:
        assert "\n" not in str(error)
        assert "give " in str(error)
        return None


@settings(max_examples=150)
@given(data=st.data(), value=JSON, drop=st.booleans())
def test_strategies_of_any_content(data: st.DataObject, value: Any, drop: bool) -> None:
    whole = {**NEW, "predicted": {"step_s": 1.0, "compute_s": 1.0, "transfer_s": 0, "sync_s": 0,
             "overhead_s": 0, "memory_bytes": 5, "rates": "r"}}  # fmt: skip
    content = data.draw(st.sampled_from([OLD, whole]))
    where = data.draw(st.sampled_from(places(content)))
    text = json.dumps(changed(content, where, value, drop=drop))
    strategy = refused_or_read(lambda: Strategy.from_json(text))
    if strategy is not None:  # then all can be done with it that can be done with any
        assert Strategy.from_json(strategy.to_json()) == strategy
        str(diff_strategies(strategy, Strategy.from_json(json.dumps(NEW))))


@settings(max_examples=100)
@given(data=st.binary(max_size=60))
@example(data=b'{"format_version": 1e999}')
@example(data=b"\xff\xfe[")
@example(data=b"9" * 5000)
def test_strategies_of_any_bytes(data: bytes, folder: Path) -> None:
    path = folder / "any.json"
    path.write_bytes(data)
    refused_or_read(lambda: Strategy.load(path))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A problem of few layers as a file, with constraints."""
    w, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 8), (16, 8)))
    graph = jaxlwp.trace(lambda w, x: jnp.mean(jnp.sort(x @ w)), w, x)
    constraints = Constraints(pin={"dense*": {"sample": ("device0",)}}, replicated=("*",))
    space = jaxlwp.price(graph, jaxlwp.device_graph(MESH, rates=RATES), constraints=constraints)
    path = tmp_path_factory.mktemp("small") / "p.npz"
    space.save(path)
    return path.read_bytes()


@settings(max_examples=200)
@given(data=st.data())
def test_flipped_and_cut_problems_are_refused(
    data: st.DataObject, small: bytes, folder: Path
) -> None:
    damaged = folder / "damaged.npz"
    if data.draw(st.booleans()):
        content = small[: data.draw(st.integers(0, len(small) - 1))]
    else:
        place, bit = data.draw(st.integers(0, len(small) - 1)), data.draw(st.integers(0, 7))
        flipped = small[place] ^ (1 << bit)
        content = small[:place] + bytes([flipped]) + small[place + 1 :]
    damaged.write_bytes(content)
    found = refused_or_read(lambda: load_problem(damaged))
    if found is not None:  # a bit that says nothing, such as the date of the archive's entry
        assert file.problem_bytes(found) == small


def sealed(content: Any, arrays: dict[str, bytes], path: Path) -> None:
    """A file whose digest is right, whatever it holds."""
    if isinstance(content, dict):
        content = {**content, "digest": file._digest(content, arrays)}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("problem.json", json.dumps(content))
        for name, array in arrays.items():
            archive.writestr(name, array)


def unsealed(data: bytes) -> tuple[Any, dict[str, bytes]]:
    texts = file._texts(data)
    return json.loads(texts.pop("problem.json")), texts


@settings(max_examples=120)
@given(data=st.data(), value=JSON, drop=st.booleans())
def test_problems_of_any_content(
    data: st.DataObject, value: Any, drop: bool, small: bytes, folder: Path
) -> None:
    """Made on purpose, with the digest of the wrong content."""
    content, arrays = unsealed(small)
    where = data.draw(st.sampled_from(places(content)))
    wrong = folder / "wrong.npz"
    sealed(changed(content, where, value, drop=drop), arrays, wrong)
    found = refused_or_read(lambda: load_problem(wrong))
    if found is None:
        return
    try:
        repr(found)
        jaxlwp.search(found)
        jaxlwp.search(found, objective="memory")
        restrict(found, Constraints(forbid=("channel",), replicated=("*",)))
    except ValueError as error:
        assert "\n" not in str(error)


def npy(header: str) -> bytes:
    """An array of a header of its own, without numbers."""
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


ARRAYS = {
    "is no array of numbers (": b"",
    "is no array of numbers (the magic": b"cos\nsystem\n(S'true'\ntR.",  # what pickle would run
    "is no array of numbers ((": npy("{'descr': [[[[[[["),
    "is no array of numbers (Object arrays": npy(
        "{'descr': '|O', 'fortran_order': False, 'shape': (3,)}"
    ),
    "must be ": npy("{'descr': '<f8', 'fortran_order': False, 'shape': (0,)}"),
    "is no array of numbers (Unable": npy(
        "{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999999,)}"
    ),
}


@pytest.mark.parametrize("message", ARRAYS)
def test_arrays_of_any_content(message: str, small: bytes, tmp_path: Path) -> None:
    content, arrays = unsealed(small)
    for name in ("compute_s", "copied_bytes"):
        sealed(content, {**arrays, f"{name}.npy": ARRAYS[message]}, tmp_path / "wrong.npz")
        wanted = re.escape(f"is no saved problem: {name} {message}")
        with pytest.raises(ValueError, match=wanted):
            load_problem(tmp_path / "wrong.npz")


def test_arrays_that_are_not_there(small: bytes, tmp_path: Path) -> None:
    content, arrays = unsealed(small)
    del arrays["sync_s.npy"]
    sealed(content, arrays, tmp_path / "wrong.npz")
    with pytest.raises(ValueError, match="lacks the array sync_s"):
        load_problem(tmp_path / "wrong.npz")


def test_versions_of_problems(small: bytes, tmp_path: Path) -> None:
    content, arrays = unsealed(small)
    path = tmp_path / "p.npz"
    sealed({**content, "version": 2}, arrays, path)
    with pytest.raises(ValueError, match=r"version 2 of the format.*up to 1: install a newer"):
        load_problem(path)
    sealed({**content, "format": "other"}, arrays, path)
    with pytest.raises(ValueError, match="does not say that it is a jaxlwp problem"):
        load_problem(path)
    np.savez(path, a=np.ones(3))
    with pytest.raises(ValueError, match=r"it has no problem\.json"):
        load_problem(path)
