"""A printed plan fits the width it is printed at, and nothing of it is cut off."""

from __future__ import annotations

import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from rich.cells import cell_len

import jaxlwp
from jaxlwp.cli._workload import load_workload
from jaxlwp.report import _widths, plan_text
from jaxlwp.report._rows import layer_rows

RATES = jaxlwp.Rates(
    flops_per_s=1e10, memory_bytes_per_s=1e9, latency_s=(1e-5,), link_bytes_per_s=(1e9,)
)
COLUMNS = {
    *("layer", "config", "kind", "output PartitionSpec", "compute ms", "transfer ms", "sync ms"),
    *("bytes/device", "kept/device"),
}
WIDTHS = (40, 60, 80, 100, 120, 150, 200)


def small_plan(name: str = "first", strategy: str = "owt") -> jaxlwp.Plan:
    def loss(params: Any, x: jax.Array) -> jax.Array:
        hidden = jax.nn.relu(x @ params[name])
        return jnp.mean(jnp.cumsum(hidden @ params["second"], axis=0))

    params = {name: jnp.ones((8, 16)), "second": jnp.ones((16, 8))}
    return jaxlwp.parallelize(
        loss, params, jnp.ones((16, 8)), devices=8, rates=RATES, strategy=strategy
    )


@pytest.fixture(scope="module")
def resnet() -> jaxlwp.Plan:
    work = load_workload(
        "models.resnet:ResNet50", batch=1024, input_shape=None, dtype="bfloat16", abstract=True
    )
    return jaxlwp.parallelize(work.loss, work.params, *work.batch, devices="dgx-h100:4")


def columns_of(text: str) -> dict[str, list[str]]:
    """A printed table's columns by their headers, wrapped cells joined."""
    heads = [line[1:-1].split("┃") for line in text.splitlines() if line.startswith("┃")]
    names = [" ".join(map(str.strip, parts)).strip() for parts in zip(*heads, strict=True)]
    rows: list[list[str]] = []
    for line in text.splitlines():
        if not line.startswith("│"):
            continue
        cells = [cell.strip() for cell in line[1:-1].split("│")]
        if cells[-1]:  # a number, which is in the first line of a row
            rows.append(cells)
            continue
        rows[-1][0] += cells[0]
        config = names.index("config")
        rows[-1][config] = f"{rows[-1][config]} {cells[config]}".strip()
    return {name.replace(" /", "/"): [row[n] for row in rows] for n, name in enumerate(names)}


def check(plan: jaxlwp.Plan, width: int) -> dict[str, list[str]]:
    text = plan_text(plan, width)
    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    shown = columns_of(text)
    rows = layer_rows(plan)
    assert shown["layer"] == [row.name for row in rows]
    sizes = plan.space.devices.axis_sizes
    assert shown["config"] == [row.config.describe(sizes) for row in rows]
    notes = text[text.index("└") :].replace("\n", " ")
    left_out = re.search(rf"left out at {width} columns: ([a-zA-Z/, ]*)", notes)
    named = left_out.group(1).removesuffix("PartitionSpecs").split(",") if left_out else []
    assert shown.keys() | {name.strip() for name in named} == COLUMNS
    return shown


@pytest.mark.parametrize("width", WIDTHS)
def test_small_plan(width: int) -> None:
    check(small_plan(), width)


@pytest.mark.parametrize("width", WIDTHS)
def test_resnet50_on_32_devices(resnet: jaxlwp.Plan, width: int) -> None:
    shown = check(resnet, width)
    if width >= 80:
        assert {"layer", "config", "compute ms", "transfer ms", "sync ms"} <= set(shown)
    if width >= 150:
        assert "output PartitionSpec" in shown
        assert shown["output PartitionSpec"][0] in ("P(abcde)", f"P({tuple(resnet.mesh.shape)},)")


def test_the_terminal_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = small_plan()
    monkeypatch.setenv("COLUMNS", "60")
    assert str(plan) == plan_text(plan, _widths.ELSEWHERE)  # pytest's output is no terminal
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert str(plan) == plan_text(plan, 60) != plan_text(plan, _widths.ELSEWHERE)


@pytest.mark.parametrize("name", ["x[bold", "(/b)[/]", "名前/層", "a" * 70, "x/" * 40 + "y"])
@pytest.mark.parametrize("width", [60, 80])
def test_any_name(name: str, width: int) -> None:
    plan = small_plan(name)
    assert layer_rows(plan)[0].name != "first"
    check(plan, width)


def test_short_specs_have_a_legend() -> None:
    plan = small_plan(strategy="data")
    whole, short = plan_text(plan, 200), plan_text(plan, 125)
    assert "P(('device0', 'device1', 'device2'),)" in whole and "PartitionSpecs:" not in whole
    assert "P(abc)" in short and "a is device0, b is device1, c is device2" in short
