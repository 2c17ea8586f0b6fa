"""Planning for devices that are not there: by name, by a file, or by a device graph alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from jax.sharding import AbstractMesh

import jaxlwp
from jaxlwp.check._verify import check_layers
from jaxlwp.cli import main
from jaxlwp.devices import DeviceGraph, load_system, make_mesh, preset


def loss_fn(params: Any, x: Any, y: Any) -> Any:
    """A convolution and two dense layers, the first of them large."""
    h = jax.lax.conv_general_dilated(
        x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    h = jax.nn.relu(h).reshape(x.shape[0], -1)
    h = jax.nn.relu(h @ params["wide"])
    return jnp.mean((h @ params["out"] - y) ** 2)


def shapes(batch: int = 8) -> tuple[Any, ...]:
    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    params = {"conv": array(3, 3, 3, 8), "wide": array(512, 4096), "out": array(4096, 4)}
    return params, array(batch, 8, 8, 3), array(batch, 4)


def arrays(given: Any) -> Any:
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(draw.normal(size=s.shape), s.dtype), given)


@pytest.mark.parametrize("name", ["dgx-h100:2x2", "h100:2x2", "h100:4", "dgx-a100:1x4"])
def test_the_plan_is_that_of_a_mesh_with_such_rates(name: str) -> None:
    absent = jaxlwp.parallelize(loss_fn, *shapes(), devices=name)
    system = preset(name)
    present = jaxlwp.parallelize(loss_fn, *shapes(), devices=4, rates=system)
    assert isinstance(absent.mesh, AbstractMesh)
    assert math.isclose(absent.cost.total_s, present.cost.total_s)
    assert absent.memory == present.memory
    assert absent.space.devices.num_devices == system.num_devices == 4
    assert [spec.spec for spec in jax.tree.leaves(absent.param_shardings)]


def test_what_is_planned_elsewhere_runs_on_a_mesh_of_the_same_axes(tmp_path: Path) -> None:
    absent = jaxlwp.parallelize(loss_fn, *shapes(), devices="dgx-h100:1x4")
    absent.strategy.save(tmp_path / "plan.json")
    here = jaxlwp.parallelize(
        loss_fn,
        *shapes(),
        devices=4,
        rates="dgx-h100",
        strategy=jaxlwp.Strategy.load(tmp_path / "plan.json"),
    )
    given = arrays(shapes())
    want = jax.value_and_grad(loss_fn)(*given)
    have = jax.jit(jax.value_and_grad(here))(*given)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(have), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)


def test_it_is_looked_at_without_devices() -> None:
    system = preset("dgx-h100", hosts=2, gpus=2)
    plan = jaxlwp.parallelize(loss_fn, *shapes(), devices=system)
    assert "system dgx-h100" in " ".join(str(plan).split())
    assert plan.collectives is not None
    assert "wide" in str(jaxlwp.explain(plan.space))
    assert str(jaxlwp.pareto(plan.space))
    assert all(layer.agrees for layer in check_layers(plan))
    smaller = plan.rebind(*shapes(4)[1:])
    assert isinstance(smaller.mesh, AbstractMesh)
    with pytest.raises(jaxlwp.MemoryLimitError):
        jaxlwp.parallelize(loss_fn, *shapes(), devices=system, memory_bytes=1e6)


def test_a_device_graph_alone_will_do() -> None:
    graph = preset("dgx-a100:1x2").device_graph()
    plan = jaxlwp.parallelize(loss_fn, *shapes(), devices=graph)
    assert plan.space.devices == graph
    space = jaxlwp.price(plan.graph, graph)
    assert jaxlwp.search(space).strategy.configs == plan.strategy.configs
    by_hand = jaxlwp.Rates(flops_per_s=1e12, memory_bytes_per_s=1e11)
    given = jaxlwp.parallelize(loss_fn, *shapes(), devices=graph, rates=by_hand)
    assert given.space.devices.source == "given"


def test_axes_are_named_as_where_the_devices_are_there() -> None:
    for name in ("h100:6", "dgx-a100:1x5", "h100:1"):
        system = preset(name)
        mesh = make_mesh(jax.devices()[: system.num_devices])
        assert dict(system.mesh.shape) == dict(mesh.shape)
        assert system.device_graph().axes == system.device_graph(mesh).axes


def test_a_file_has_its_hosts_in_its_name(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(
        'name = "cluster"\ngpu = "h200"\n[inside]\ndevices = 4\nbytes_per_s = 300e9\n'
        "start_s = 18e-6\n[across]\nadapters = 2\nadapter_bytes_per_s = 24e9\nstart_s = 40e-6\n"
    )
    assert preset(f"{path}:3") == load_system(path, hosts=3)
    assert preset(f"{path}:3x2") == load_system(path, hosts=3, gpus=2)
    plan = jaxlwp.parallelize(loss_fn, *shapes(24), devices=f"{path}:3")
    assert plan.space.devices.num_devices == 12


@pytest.mark.parametrize(
    ("name", "hosts", "gpus"),
    [
        ("dgx-h100:4", 4, 8),
        ("dgx-h100:4x2", 4, 2),
        ("h100:8", 1, 8),
        ("h100:32", 4, 8),
        ("H100:2x4", 2, 4),
        ("v100:16", 1, 16),
    ],
)
def test_numbers_in_names(name: str, hosts: int, gpus: int) -> None:
    system = preset(name)
    assert (system.num_hosts, system.inside.devices) == (hosts, gpus)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: preset("h100:12"), "fill"),
        (lambda: preset("h100:0"), "fill"),
        (lambda: preset("dgx-h100:0"), "at least 1"),
        (lambda: preset("dgx-h100:1x9"), "1 to 8"),
        (lambda: preset("dgx-h100:4", hosts=2), "one of both"),
        (lambda: preset("dgx-9:4"), "unknown"),
        (lambda: jaxlwp.parallelize(loss_fn, *shapes(), devices="8"), "give a number of devices"),
        (lambda: jaxlwp.parallelize(loss_fn, *shapes(), devices=b"h100:8"), "devices"),
        (lambda: planned(measure=True), "measure"),
        (lambda: planned(check="measure"), "check"),
        (lambda: planned(check=["owt"]), "check"),
        (lambda: planned(mesh=make_mesh(jax.devices()[:4])), "one of both"),
        (lambda: planned(rates="dgx-a100:3"), "dgx-a100"),
        (lambda: jaxlwp.device_graph(preset("h100:4").mesh), "rates"),
        (lambda: planned()(*arrays(shapes())), "not here"),
        (lambda: planned().place(shapes()[0]), "not here"),
        (lambda: planned().place_batch(*shapes()[1:]), "not here"),
        (lambda: jaxlwp.verify(planned()), "not here"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)) as raised:
        make()
    assert "\n" not in str(raised.value)


def planned(**options: Any) -> jaxlwp.Plan:
    return jaxlwp.parallelize(loss_fn, *shapes(), devices="h100:4", **options)


def test_any_given_device_graph_has_its_own_mesh() -> None:
    graph: DeviceGraph = preset("dgx-h100:2x3").device_graph()
    plan = jaxlwp.parallelize(loss_fn, *shapes(12), devices=graph)
    assert dict(plan.mesh.shape) == graph.axis_sizes


def test_command() -> None:
    result = CliRunner().invoke(
        main, ["plan", "models.lenet:LeNet5", "--devices", "dgx-h100:2", "--batch", "64"]
    )
    assert result.exit_code == 0, result.output
    assert "on 2 x dgx-h100 with 8 x h100 each" in result.output
    refused = CliRunner().invoke(
        main, ["plan", "models.lenet:LeNet5", "--devices", "dgx-h100:2", "--profile", "none.json"]
    )
    assert refused.exit_code != 0
    assert "none.json" in refused.output
