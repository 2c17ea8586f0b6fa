"""GPU systems: every figure has a source, and collectives take what NCCL's stages take."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import jaxlwp
from jaxlwp import Config
from jaxlwp.check._target import GPUS
from jaxlwp.cli._workload import load_workload
from jaxlwp.cost import AnalyticCostModel
from jaxlwp.devices import Gpu, Level, System, _presets, _systems, load_system, make_mesh, preset
from jaxlwp.devices._links import Crossed, staged
from jaxlwp.devices._presets import BOARDS, NEWEST, SYSTEMS
from jaxlwp.optimize._floor import floor_s
from jaxlwp.space import COLLECTIVES, Collective, wire_share

FOLDER = Path(_presets.__file__).parent / "systems"
FILES = sorted(FOLDER.glob("*.toml"))


def mesh_of(*sizes: int) -> Mesh:
    names = tuple("abcd"[: len(sizes)])
    devices = np.array(jax.devices()[: math.prod(sizes)], dtype=object)
    return Mesh(devices.reshape(sizes), names)


# --- the files -----------------------------------------------------------------------------------


def figures(table: dict[str, Any]) -> int:
    """How many fields hold numbers."""
    nested = [value for value in table.values() if isinstance(value, dict)]
    inline = [v for v in nested if all(key.isdecimal() for key in v)]
    numbers = [v for v in table.values() if isinstance(v, (int, float))]
    return len(numbers) + len(inline) + sum(figures(v) for v in nested if v not in inline)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_figure_has_its_source_beside_it(path: Path) -> None:
    text = path.read_text()
    assigned = [line for line in text.splitlines() if re.match(r"[\w-]+ = [^\"]", line)]
    assert len(assigned) == figures(tomllib.loads(text)) > 0
    for line in assigned:
        assert re.search(r"# (source: \w|estimate, because \w)", line), line


def test_short_names_of_sources_are_explained() -> None:
    text = (FOLDER / "gpus.toml").read_text()
    explained = set(re.findall(r'^#   "(\w+)"', text, re.MULTILINE))
    used = set(re.findall(r"# source: (\w+)", text))
    assert used <= explained, used - explained


def test_every_file_is_a_system_and_every_gpu_is_in_one() -> None:
    assert {path.stem for path in FILES} == {*SYSTEMS, "gpus"}
    used = {preset(name).gpu.name for name in SYSTEMS}
    assert used == set(tomllib.loads((FOLDER / "gpus.toml").read_text()))
    assert set(GPUS) <= set(NEWEST)  # what can be compiled for


@pytest.mark.parametrize("gpu", GPUS)
def test_memory_is_what_xla_is_told(gpu: str) -> None:
    """Of the description of the device that programs are compiled for."""
    text = (Path(jaxlwp.__file__).parent / "check/gpu_specs" / f"{GPUS[gpu][0]}.txtpb").read_text()
    known = preset(NEWEST["v100-16gb"] if gpu == "v100" else gpu).gpu
    found = {k: int(v) for k, v in re.findall(r"(memory_bandwidth|memory_size): (\d+)", text)}
    assert known.peak_memory_bytes_per_s == found["memory_bandwidth"]
    assert known.memory_bytes == found["memory_size"]


# --- the hybrid mesh -----------------------------------------------------------------------------

V100_MESH = "011 021 032 122 131 232 451 461 472 562 571 672 042 152 261 371".split()
P100_MESH = "011 021 031 121 131 231 451 461 471 561 571 671 041 151 261 371".split()


def directed_rings(links: Sequence[str], gpus: Sequence[int]) -> int:
    """The most rings through all of the GPUs that share no link in a direction."""
    left = {frozenset(map(int, link[:2])): int(link[2]) for link in links}

    def edges(ring: tuple[int, ...]) -> list[frozenset[int]]:
        return [frozenset(pair) for pair in itertools.pairwise((*ring, ring[0]))]

    if len(gpus) == 2:
        return left[frozenset(gpus)]  # each direction of a link is half of a ring of two
    rings = [
        edges((gpus[0], *rest))
        for rest in itertools.permutations(gpus[1:])
        if rest[0] < rest[-1] and all(edge in left for edge in edges((gpus[0], *rest)))
    ]

    def most(first: int, left: dict[frozenset[int], int]) -> int:
        best = 0
        for n in range(first, len(rings)):
            if all(left[edge] for edge in rings[n]):
                rest = {edge: count - (edge in rings[n]) for edge, count in left.items()}
                best = max(best, 1 + most(n, rest))
        return best

    return 2 * most(0, left)


@pytest.mark.parametrize(
    ("name", "links", "link_bytes_per_s", "count"),
    [("dgx-1-p100", P100_MESH, 18e9, 4), ("dgx-1-v100", V100_MESH, 20e9, 6)],
)
def test_groups_get_the_rings_of_the_hybrid_mesh(
    name: str, links: list[str], link_bytes_per_s: float, count: int
) -> None:
    inside = preset(name).inside
    for gpu in map(str, range(8)):
        assert sum(int(link[2]) for link in links if gpu in link[:2]) == count
    assert inside.rate(8) == directed_rings(links, range(8)) * link_bytes_per_s
    assert inside.rate(4) == directed_rings(links, range(4)) * link_bytes_per_s
    assert inside.rate(4) == directed_rings(links, range(4, 8)) * link_bytes_per_s
    pairs = [directed_rings(links, pair) for pair in ((0, 1), (2, 3), (4, 5), (6, 7))]
    assert inside.rate(2) == min(pairs) * link_bytes_per_s
    assert inside.rate(3) == inside.rate(2) and inside.rate(7) == inside.rate(4)


# --- collectives ---------------------------------------------------------------------------------


def two_hosts(**across: Any) -> System:
    """Two hosts of four GPUs: 100 GB/s inside, 10 GB/s across, starts of 15 and 40 us."""
    return System(
        name="test",
        gpu=preset("h200").gpu,
        inside=Level(devices=4, bytes_per_s=1e11, start_s=15e-6),
        across=Level(devices=2, **{"bytes_per_s": 1e10, "start_s": 40e-6, **across}),
    )


@pytest.mark.parametrize(
    ("kind", "inside_bytes", "across_bytes"),
    [
        # Of 8 GB: reduce-scatter and all-gather inside send 6 GB each; across, 2 GB are added up.
        ("all-reduce", 12e9, 2e9),
        # 6 GB inside; then half of the 2 GB that are left.
        ("reduce-scatter", 6e9, 1e9),
        # The own 8 GB to the other host; then 16 GB to each of three.
        ("all-gather", 48e9, 8e9),
        # An eighth to each of three inside, and to each of four across.
        ("all-to-all", 3e9, 4e9),
    ],
)
def test_two_levels_by_hand(kind: str, inside_bytes: float, across_bytes: float) -> None:
    system = two_hosts()
    seconds = system.collective_s(kind, 8e9, range(8))
    assert seconds == pytest.approx(40e-6 + inside_bytes / 1e11 + across_bytes / 1e10, rel=1e-12)


@pytest.mark.parametrize("group", [(0, 4), (0, 1), (0, 1, 2, 3), (3, 7), (5,), range(8)])
def test_a_permute_is_as_slow_as_its_slowest_link(group: Sequence[int]) -> None:
    across, alone = len({d // 4 for d in group}) > 1, len(group) == 1
    expected = 0.0 if alone else (40e-6 + 0.8 if across else 15e-6 + 0.08)
    found = two_hosts().collective_s("collective-permute", 8e9, group)
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_one_level_is_a_ring(kind: str) -> None:
    system = two_hosts()
    for group, start_s, rate in (
        ((0, 4), 40e-6, 1e10),
        ((4, 5), 15e-6, 1e11),
        (range(4), 15e-6, 1e11),
    ):
        expected = start_s + 3e9 * wire_share(kind, len(group)) / rate
        assert system.collective_s(kind, 3e9, group) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", COLLECTIVES)
@pytest.mark.parametrize("parts", [(2, 3), (8, 2), (4, 4, 2), (1, 8, 1), (8, 64, 8)])
def test_levels_of_equal_links_are_one_ring(kind: str, parts: tuple[int, ...]) -> None:
    """However the devices are shared out, a device sends what a ring sends."""
    levels = [Crossed(count, 1e-5, 5.0) for count in parts]
    start_s, byte_s = staged(kind, levels)
    assert start_s == 1e-5
    assert byte_s == pytest.approx(wire_share(kind, math.prod(parts)) / 5.0, rel=1e-12)


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_faster_links_never_take_longer(kind: str) -> None:
    rates = [(10.0, 1.0), (10.0, 2.0), (20.0, 2.0), (20.0, 20.0)]
    times = [staged(kind, [Crossed(8, 0.0, a), Crossed(2, 0.0, b)])[1] for a, b in rates]
    assert times == sorted(times, reverse=True) and times[0] > times[-1]


def test_devices_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="group: device 8 is none of test, which has 8; count"):
        two_hosts().collective_s("all-reduce", 1.0, (0, 8))


def systems() -> Iterator[tuple[System, Mesh]]:
    for name in SYSTEMS:
        for hosts, gpus in ((1, 8), (2, 4), (4, 2), (8, 1)):
            for sizes in ((2, 2, 2), (2, 4), (4, 2), (8,), (1, 8)):
                yield preset(name, hosts=hosts, gpus=gpus), mesh_of(*sizes)


def test_device_graph_and_system_agree() -> None:
    """Any axes of any mesh, also of one whose axes lead from host to host."""
    checked = 0
    for system, mesh in systems():
        graph = system.device_graph(mesh)
        numbers = np.arange(mesh.size).reshape(mesh.devices.shape)
        for count in range(1, len(mesh.axis_names) + 1):
            for axes in itertools.combinations(mesh.axis_names, count):
                # Axes that can be exchanged for one another are used in their order.
                used = [[a for a in group if a in axes] for group in graph.axis_groups]
                if any(
                    u != list(g[: len(u)]) for u, g in zip(used, graph.axis_groups, strict=True)
                ):
                    continue
                place = tuple(slice(None) if a in axes else 0 for a in mesh.axis_names)
                group = numbers[place].reshape(-1).tolist()
                if len(group) == 1:
                    continue
                for kind in COLLECTIVES:
                    for num_bytes in (0, 1 << 20):
                        found = graph.collective_s(
                            Collective(kind=kind, axes=axes, num_bytes=num_bytes)
                        )
                        expected = system.collective_s(kind, num_bytes, group)
                        assert found == pytest.approx(expected, rel=1e-9), (system, axes, kind)
                        checked += 1
    assert checked > 3000


# --- what a system's name stands for -------------------------------------------------------------


def test_names() -> None:
    assert preset("h200") == preset("dgx-h200") == preset("HGX-H200")
    assert preset("v100").name == "dgx-2" and preset("v100").num_devices == 16
    assert {BOARDS[name] for name in BOARDS} | set(NEWEST.values()) <= set(SYSTEMS)
    with pytest.raises(ValueError, match=r"system: 'h300' is unknown; give one of dgx-1-p100, "):
        preset("h300")


def test_a_gpu_has_its_share_of_the_adapters() -> None:
    """All GPUs of a host send at once, also where some of them are not ours."""
    v100, a100 = preset("dgx-1-v100", hosts=2), preset("dgx-a100", hosts=2)
    assert v100.across is not None and a100.across is not None
    assert v100.across.bytes_per_s == 4 * 12e9 / 8 and a100.across.bytes_per_s == 24e9
    part = preset("dgx-1-v100", hosts=2, gpus=4)
    assert part.num_devices == 8 and part.across == v100.across
    assert part.inside == dataclasses.replace(v100.inside, devices=4)


def test_twice_the_hosts_start_later() -> None:
    starts = []
    for hosts in (2, 4, 8, 64):
        across = preset("dgx-h100", hosts=hosts).across
        assert across is not None and across.devices == hosts
        starts.append(across.start_s)
    assert starts == pytest.approx([40e-6, 50e-6, 60e-6, 90e-6])
    assert preset("dgx-h100").across is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hosts": 0}, "hosts: 0 given for dgx-h200; give a number of at least 1"),
        ({"hosts": 1.5}, "hosts: 1.5 given for dgx-h200; give a number of at least 1"),
        ({"gpus": 9}, "gpus: 9 given for dgx-h200; give a number of 1 to 8"),
        ({"gpus": 0}, "gpus: 0 given for dgx-h200; give a number of 1 to 8"),
        ({"gpus": True}, "gpus: True given for dgx-h200; give a number of 1 to 8"),
    ],
)
def test_wrong_numbers(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        preset("h200", **options)
    assert str(caught.value) == message


# --- arithmetic by dtype -------------------------------------------------------------------------


def test_tensor_cores_by_dtype() -> None:
    """Float32 runs in TF32 where there is TF32; a dtype of no unit runs as float32."""
    h200, v100, p100 = (preset(name).gpu for name in ("h200", "v100", "p100"))
    assert h200.flops_per_s("bfloat16") == 0.55 * 989.4e12
    assert h200.flops_per_s("float32") == h200.flops_per_s("int8") == 0.55 * 494.7e12
    assert h200.flops_per_s("float64") == 0.75 * 33.5e12
    assert v100.flops_per_s("float16") == 0.55 * 125e12
    assert v100.flops_per_s("float32") == v100.flops_per_s("bfloat16") == 0.75 * 15.7e12
    assert p100.flops_per_s("float16") == p100.flops_per_s("float32") == 0.75 * 10.6e12


def conv_loss(dtype: Any) -> tuple[Any, ...]:
    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        y = jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.mean(jnp.tanh(y).astype(jnp.float32))

    shapes = ((3, 3, 64, 64), (16, 32, 32, 64))
    return loss, *(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)


def compute_s(devices: jaxlwp.DeviceGraph, dtype: Any) -> tuple[float, float]:
    """Of the convolution on one device, and of all layers."""
    graph = jaxlwp.trace(*conv_loss(dtype))
    space = jaxlwp.price(graph, devices)
    (conv,) = (layer.index for layer in graph.layers if layer.kind == "conv")
    whole = [known.index(Config()) for known in space.configs]
    seconds = [table[n] for table, n in zip(space.tables.compute_s, whole, strict=True)]
    return float(seconds[conv]), float(sum(seconds))


def test_work_is_priced_by_the_dtype_of_its_operands() -> None:
    gpu = preset("h200").gpu
    devices = preset("h200", gpus=1).device_graph(mesh_of(1))
    devices = dataclasses.replace(devices, memory_bytes_per_s=1e30, overhead_s=0.0)
    flops = 2 * 2 * 16 * 32 * 32 * 64 * 9 * 64
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        expected = flops / gpu.flops_per_s(jnp.dtype(dtype).name)
        # The halo of the padding is not computed: a few percent.
        assert compute_s(devices, dtype)[0] == pytest.approx(expected, rel=0.05)


def test_saved_device_graphs_load() -> None:
    graph = preset("dgx-1-v100").device_graph(mesh_of(2, 2, 2))
    assert graph.links and graph.dtype_flops_per_s
    assert jaxlwp.DeviceGraph.from_json(graph.to_json()) == graph
    old = graph.to_json()
    del old["dtype_flops_per_s"]
    loaded = jaxlwp.DeviceGraph.from_json(old)
    assert loaded.flops_per_s("conv", "float16") == loaded.conv_flops_per_s
    assert loaded.flops_per_s("dense", "bfloat16") == loaded.dense_flops_per_s
    with pytest.raises(ValueError, match="dtype_flops_per_s of float16 is -1.0; a rate must be"):
        dataclasses.replace(graph, dtype_flops_per_s=(("float16", -1.0),))


# --- rates of a mesh -----------------------------------------------------------------------------


def two_real_hosts(monkeypatch: pytest.MonkeyPatch) -> Mesh:
    """As if the first half of the devices were another host's than the second."""

    def hosts(mesh: Mesh) -> np.ndarray:
        numbers = np.arange(mesh.size) * 2 // mesh.size
        return np.asarray(numbers.reshape(mesh.devices.shape))

    for module in (_presets, _systems):
        monkeypatch.setattr(module, "host_numbers", hosts)
    return mesh_of(2, 2, 2)


def test_a_name_has_the_hosts_of_the_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    named = jaxlwp.device_graph(two_real_hosts(monkeypatch), rates="dgx-a100")
    assert [axis.level for axis in named.axes] == [0, 1, 1]
    assert [axis.bytes_per_s for axis in named.axes] == [24e9, 232e9, 232e9]
    assert named == preset("dgx-a100", hosts=2, gpus=4).device_graph(mesh_of(2, 2, 2))


def test_a_system_must_have_the_hosts_of_the_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = two_real_hosts(monkeypatch)
    for system in (preset("h200"), preset("h200", hosts=4, gpus=2), preset("h200", gpus=4)):
        with pytest.raises(ValueError, match=r"rates: dgx-h200 has .* devices, the mesh 4 \+ 4; "):
            jaxlwp.device_graph(mesh, rates=system)


def test_hosts_with_more_devices_than_the_system_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mesh = two_real_hosts(monkeypatch)
    with pytest.raises(ValueError, match="rates: cluster has 2 GPUs in a host, the mesh 4; use"):
        jaxlwp.device_graph(mesh, rates=user_file(tmp_path, inside={"devices": 2}))


@pytest.mark.parametrize(("name", "hosts"), [("dgx-1-v100", 1), ("dgx-a100", 2), ("h200", 4)])
def test_no_strategy_is_priced_below_the_floor(name: str, hosts: int) -> None:
    """The relaxation of large spaces holds where groups have rates of their own, too."""
    work = load_workload("models.lenet:LeNet5", batch=32, abstract=True)
    graph = jaxlwp.trace(work.loss, work.params, *work.batch)
    devices = preset(name, hosts=hosts, gpus=8 // hosts).device_graph(mesh_of(2, 2, 2))
    best_s = jaxlwp.search(jaxlwp.price(graph, devices)).cost.total_s
    lower_s = floor_s(graph, AnalyticCostModel.of(graph, devices))
    assert 0.3 * best_s <= lower_s <= best_s * (1 + 1e-9)


def test_simulated_devices_fill_hosts() -> None:
    """A mesh that names no hosts has the system's, in the order of its devices."""
    mesh = mesh_of(4, 2)
    split = preset("h200", hosts=4, gpus=2).device_graph(mesh)
    assert [axis.level for axis in split.axes] == [0, 1]
    assert [axis.bytes_per_s for axis in split.axes] == [47e9, 370e9]
    whole = jaxlwp.device_graph(mesh, rates="h200")
    assert {axis.level for axis in whole.axes} == {0}
    assert {axis.bytes_per_s for axis in whole.axes} == {370e9}
    assert whole.source == "system dgx-h200"


def test_more_devices_than_a_host_has(tmp_path: Path) -> None:
    small = user_file(tmp_path, inside={"devices": 4})
    four = jaxlwp.device_graph(mesh_of(2, 2, 2), rates=small)
    assert four == load_system(small, hosts=2).device_graph(mesh_of(2, 2, 2))
    odd = user_file(tmp_path, inside={"devices": 3})
    with pytest.raises(ValueError, match="cluster has 3 GPUs in a host, which 8 devices do not"):
        jaxlwp.device_graph(mesh_of(2, 2, 2), rates=odd)


@pytest.mark.parametrize("kind", ["gpu", "system", "file", "object"])
def test_parallelize_takes_systems(kind: str, tmp_path: Path) -> None:
    rates = {
        "gpu": "h200",
        "system": "dgx-h200",
        "file": user_file(tmp_path),
        "object": preset("h200"),
    }[kind]
    mesh = mesh_of(2, 2, 2)
    plan = jaxlwp.parallelize(*conv_loss(jnp.bfloat16), mesh=mesh, rates=rates)
    assert plan.space.devices == jaxlwp.device_graph(mesh, rates=rates)
    assert plan.space.num_measured == 0
    with pytest.raises(ValueError, match="system: 'h300' is unknown"):
        jaxlwp.parallelize(*conv_loss(jnp.bfloat16), mesh=mesh, rates="h300")


def test_a_latency_by_hand_is_that_of_a_small_all_reduce() -> None:
    """Over any axes of a level; and over two levels that of the slower one."""
    mesh = make_mesh(jax.devices()[:8])
    rates = jaxlwp.Rates(flops_per_s=1e12, memory_bytes_per_s=1e11, latency_s=(2e-5,))
    graph = jaxlwp.device_graph(mesh, rates=rates)
    for count in (1, 2, 3):
        for kind in COLLECTIVES:
            assert graph.link_rate(kind, mesh.axis_names[:count])[0] == 2e-5
    axes = [dataclasses.replace(a, level=int(n > 0)) for n, a in enumerate(graph.axes)]
    axes = [axes[0], *(dataclasses.replace(a, latency_s=1e-5) for a in axes[1:])]
    graph = dataclasses.replace(graph, axes=tuple(axes))
    assert graph.link_rate("all-reduce", mesh.axis_names)[0] == 2e-5
    assert graph.link_rate("all-reduce", mesh.axis_names[1:])[0] == 1e-5


# --- systems of one's own ------------------------------------------------------------------------

USER: dict[str, Any] = {
    "name": "cluster",
    "gpu": "h200",
    "inside": {"devices": 8, "bytes_per_s": 3e11, "start_s": 1.5e-5},
    "across": {"adapters": 4, "adapter_bytes_per_s": 2.4e10, "start_s": 3e-5},
}
OWN_GPU: dict[str, Any] = {
    "name": "mine",
    "peak_memory_bytes_per_s": 1e12,
    "memory_bytes": 2.4e10,
    "peak_flops_per_s": {"float32": 2e13, "bfloat16": 8e13},
}


def toml(table: dict[str, Any], prefix: str = "") -> str:
    """As text; tables of numbers inline."""
    lines, tables = [], []
    for key, value in table.items():
        if isinstance(value, dict) and all(k.isdecimal() for k in value):
            lines.append(f"{key} = {{ {', '.join(f'{k} = {v}' for k, v in value.items())} }}")
        elif isinstance(value, dict):
            tables.append(f"[{prefix}{key}]\n{toml(value, f'{prefix}{key}.')}")
        else:
            text = str(value).lower() if isinstance(value, bool) else value
            lines.append(f"{key} = {value!r}" if isinstance(value, str) else f"{key} = {text}")
    return "\n".join([*lines, *tables])


def user_file(folder: Path, **changes: Any) -> Path:
    """The user's file with some fields changed, or left out where the change is None."""
    table = {**USER}
    for name, change in changes.items():
        old = table.get(name)
        merged = isinstance(change, dict) and isinstance(old, dict)
        table[name] = {**old, **change} if merged else change
        if merged:
            table[name] = {k: v for k, v in table[name].items() if v is not None}
    path = folder / "cluster.toml"
    path.write_text(toml({k: v for k, v in table.items() if v is not None}))
    return path


def test_what_a_file_says(tmp_path: Path) -> None:
    found = load_system(user_file(tmp_path), hosts=2)
    assert found == preset(user_file(tmp_path), hosts=2)
    assert found == preset(str(user_file(tmp_path)), hosts=2)
    assert found == System(
        name="cluster",
        gpu=preset("h200").gpu,
        inside=Level(devices=8, bytes_per_s=3e11, start_s=1.5e-5),
        across=Level(devices=2, bytes_per_s=1.2e10, start_s=3e-5, shared_by=2),
    )
    four = load_system(user_file(tmp_path, across={"doubling_s": 1e-5}), hosts=4).across
    assert four is not None and four.start_s == pytest.approx(4e-5)
    mesh = load_system(user_file(tmp_path, inside={"bytes_per_s": {"2": 1e10, "8": 4e10}}))
    assert [mesh.inside.rate(n) for n in (2, 4, 8)] == [1e10, 1e10, 4e10]
    alone = load_system(user_file(tmp_path, across=None))
    assert alone.across is None
    with pytest.raises(ValueError, match="hosts: 2 given for cluster, which has no .across.; "):
        load_system(user_file(tmp_path, across=None), hosts=2)


def test_a_gpu_of_ones_own(tmp_path: Path) -> None:
    gpu = load_system(user_file(tmp_path, gpu=OWN_GPU)).gpu
    assert gpu == Gpu(
        **OWN_GPU,
        tensor_share=0.55,
        vector_share=0.75,
        memory_share=0.82,
        winograd=1.6,
        kernel_s=2.5e-6,
    )
    better = {**OWN_GPU, "memory_share": 0.9, "kernel_s": 0.0}
    found = load_system(user_file(tmp_path, gpu=better)).gpu
    assert found.memory_bytes_per_s == pytest.approx(9e11) and found.kernel_s == 0.0


@pytest.mark.parametrize("name", SYSTEMS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    """What a preset's file holds, written down as a user's, is the same system."""
    table = tomllib.loads((FOLDER / f"{name}.toml").read_text())
    gpus = tomllib.loads((FOLDER / "gpus.toml").read_text())
    table["gpu"] = {"name": table["gpu"], **gpus[table["gpu"]]}
    path = tmp_path / "own.toml"
    path.write_text(toml(table))
    assert load_system(path, hosts=4) == preset(name, hosts=4)


WRONG = [
    ({"name": None}, ": name is missing; give the system's name"),
    ({"name": 3}, ": name is 3; give the system's name, as in 'cluster'"),
    ({"gpu": None}, ": gpu is missing; give a table of its figures, or a GPU of p100, "),
    ({"gpu": "rtx"}, ": gpu is 'rtx'; give a table of its figures, or a GPU of p100, "),
    ({"gpu": 4}, ": gpu is 4; give a table of its figures, or a GPU of p100, "),
    ({"inside": None}, ": inside is missing; give a table of the links inside a host"),
    ({"inside": 5}, ": inside is 5; give a table of the links inside a host"),
    ({"across": 5}, ": across is 5; give a table of the adapters between hosts"),
    ({"hosts": 2}, ": hosts is unknown; the fields are across, gpu, inside, name"),
    ({"inside": {"devices": None}}, ": [inside]: devices is missing; give how many GPUs a host"),
    ({"inside": {"devices": 0}}, ": [inside]: devices is 0; give how many GPUs a host has, a wh"),
    ({"inside": {"devices": 8.0}}, ": [inside]: devices is 8.0; give how many GPUs a host has, "),
    ({"inside": {"devices": True}}, ": [inside]: devices is True; give how many GPUs a host has"),
    ({"inside": {"bytes_per_s": None}}, ": [inside]: bytes_per_s is missing; give the bytes per"),
    ({"inside": {"bytes_per_s": -1}}, ": [inside]: bytes_per_s is -1; give the bytes per second"),
    ({"inside": {"bytes_per_s": "nan"}}, ": [inside]: bytes_per_s is 'nan'; give the bytes per"),
    ({"inside": {"bytes_per_s": math.inf}}, ": [inside]: bytes_per_s is inf; give the bytes per"),
    ({"inside": {"bytes_per_s": math.nan}}, ": [inside]: bytes_per_s is nan; give the bytes per"),
    ({"inside": {"bytes_per_s": {"1": 5}}}, ": [inside]: bytes_per_s is {'1': 5}; give rates for"),
    ({"inside": {"bytes_per_s": {"9": 5}}}, ": [inside]: bytes_per_s is {'9': 5}; give rates for"),
    ({"inside": {"bytes_per_s": {"2": 0}}}, ": [inside]: bytes_per_s is {'2': 0}; give rates for"),
    ({"inside": {"start_s": None}}, ": [inside]: start_s is missing; give the seconds of a small"),
    ({"inside": {"start_s": -1e-6}}, ": [inside]: start_s is -1e-06; give the seconds of a small"),
    ({"inside": {"start": 1e-6}}, ": [inside]: start is unknown; the fields are bytes_per_s, de"),
    ({"across": {"adapters": None}}, ": [across]: adapters is missing; give how many adapters a"),
    ({"across": {"adapters": 1.5}}, ": [across]: adapters is 1.5; give how many adapters a host"),
    ({"across": {"adapter_bytes_per_s": 0}}, ": [across]: adapter_bytes_per_s is 0; give the by"),
    ({"across": {"start_s": "1"}}, ": [across]: start_s is '1'; give the seconds of a small all-"),
    ({"across": {"doubling_s": -1}}, ": [across]: doubling_s is -1; give the seconds that twice"),
    ({"across": {"bytes": 1}}, ": [across]: bytes is unknown; the fields are adapter_bytes_per_s,"),
    ({"gpu": {**OWN_GPU, "name": 1}}, ": [gpu]: name is 1; give the GPU's name"),
    ({"gpu": {"name": "x"}}, ": [gpu]: peak_flops_per_s is missing; give a table of operations"),
    (
        {"gpu": {**OWN_GPU, "peak_flops_per_s": {"bfloat16": 1e12}}},
        ": [gpu]: [peak_flops_per_s]: float32 is missing; give the operations per second without",
    ),
    (
        {"gpu": {**OWN_GPU, "peak_flops_per_s": {"float32": 0}}},
        ": [gpu]: [peak_flops_per_s]: float32 is 0; give the operations per second, a number",
    ),
    ({"gpu": {**OWN_GPU, "memory_bytes": -1}}, ": [gpu]: memory_bytes is -1; give the bytes of"),
    ({"gpu": {**OWN_GPU, "memory_share": 1.2}}, ": [gpu]: memory_share is 1.2; give the share of"),
    ({"gpu": {**OWN_GPU, "tensor_share": 0}}, ": [gpu]: tensor_share is 0; give the share of the"),
    ({"gpu": {**OWN_GPU, "vector_share": "1"}}, ": [gpu]: vector_share is '1'; give the share of"),
    ({"gpu": {**OWN_GPU, "kernel_s": -1}}, ": [gpu]: kernel_s is -1; give the seconds that a ker"),
    ({"gpu": {**OWN_GPU, "winograd": 0}}, ": [gpu]: winograd is 0; give how many times faster"),
    ({"gpu": {**OWN_GPU, "cores": 5}}, ": [gpu]: cores is unknown; the fields are kernel_s, memor"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=lambda value: str(value)[:50])
def test_wrong_fields(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = user_file(tmp_path, **changes)
    with pytest.raises(ValueError) as caught:
        load_system(path, hosts=2)
    assert str(caught.value).startswith(f"{path}{message}"), str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    with pytest.raises(ValueError, match=r"none.toml: No such file or directory; give a TOML"):
        load_system(path)
    path.write_text("name =")
    with pytest.raises(
        ValueError, match=r"none.toml: no TOML \(Invalid value .*\); write fields as in"
    ):
        load_system(path)
    path.write_bytes(b"name = '\xff'")
    with pytest.raises(ValueError, match=r"none.toml: it is no text in UTF-8; give a TOML file"):
        load_system(path)
    with pytest.raises(ValueError, match="Is a directory; give a TOML file of a system"):
        load_system(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda gpu: Level(devices=0, bytes_per_s=1.0, start_s=0.0), "Level: devices is 0; it "),
        (lambda gpu: Level(devices=2, bytes_per_s=0.0, start_s=0.0), "Level: bytes_per_s is 0.0;"),
        (lambda gpu: Level(devices=2, bytes_per_s={}, start_s=0.0), "bytes_per_s has no rates"),
        (lambda gpu: Level(devices=2, bytes_per_s={2: -1.0}, start_s=0.0), "of 2 devices is -1"),
        (lambda gpu: Level(devices=2, bytes_per_s=1.0, start_s=-1.0), "Level: start_s is -1.0;"),
        (lambda gpu: dataclasses.replace(gpu, memory_share=2.0), "memory_share is 2.0; give a sh"),
        (lambda gpu: dataclasses.replace(gpu, kernel_s=-1.0), "Gpu 'h200': kernel_s is -1.0; it"),
        (lambda gpu: dataclasses.replace(gpu, winograd=0.0), "Gpu 'h200': winograd is 0.0; a rate"),
        (lambda gpu: dataclasses.replace(gpu, peak_flops_per_s={}), "has nothing; float32 must"),
    ],
)
def test_values_of_ones_own_are_checked(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make(preset("h200").gpu)
