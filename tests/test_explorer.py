"""A plan as a Model Explorer graph: the format that it reads, and the plan's figures in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jsonschema
import pytest
from click.testing import CliRunner

import jaxlwp
from jaxlwp.cli._commands import main
from jaxlwp.report import model_explorer_data, num_bytes, save_model_explorer

TEXT = {"type": "string"}


def some(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item}


def of(*optional: str, **required: Any) -> dict[str, Any]:
    """An object with these entries and, of the optional ones, any; nothing else."""
    entries = required | dict.fromkeys(optional, TEXT)
    return {
        "type": "object",
        "properties": entries,
        "required": list(required),
        "additionalProperties": False,
    }


PAIRS = some(of(key=TEXT, value=TEXT))
METADATA = some(of(id=TEXT, attrs=PAIRS))
NODE = of(
    id=TEXT,
    label={"type": "string", "minLength": 1},
    namespace=TEXT,
    attrs=PAIRS,
    incomingEdges=some(of(sourceNodeId=TEXT, sourceNodeOutputId=TEXT, targetNodeInputId=TEXT)),
    inputsMetadata=METADATA,
    outputsMetadata=METADATA,
    style=of(backgroundColor={"type": "string", "pattern": "^#[0-9A-F]{6}$"}),
)
OVERLAYS = some(
    of(
        type={"const": "edge_overlays"},
        name=TEXT,
        overlays=some(
            of(
                name=TEXT,
                edgeColor=TEXT,
                edges=some(of("label", sourceNodeId=TEXT, targetNodeId=TEXT)),
            )
        ),
    )
)
SCHEMA = of(
    label=TEXT,
    graphs=some(
        of(
            id=TEXT,
            nodes=some(NODE),
            groupNodeAttributes={
                "type": "object",
                "additionalProperties": {"type": "object", "additionalProperties": TEXT},
            },
            tasksData=of(edgeOverlaysDataListLeftPane=OVERLAYS),
        )
    ),
)
"""The classes of Model Explorer's `graph_builder.py`, as far as our files use them."""

RATES = jaxlwp.Rates(flops_per_s=1e10, memory_bytes_per_s=1e9)


@pytest.fixture(params=["owt", "search", "evaluation"])
def plan(request: pytest.FixtureRequest) -> jaxlwp.Plan:
    def loss(params: Any, x: jax.Array) -> jax.Array:
        with jax.named_scope("first"):
            x = jax.nn.relu(x @ params[0])
        with jax.named_scope("second"):
            x = jnp.cumsum(x, axis=1) @ params[1] + x
        return jnp.mean(x)

    train = request.param != "evaluation"
    return jaxlwp.parallelize(
        *(loss, [jnp.ones((8, 8))] * 2, jnp.ones((16, 8))),
        devices=8,
        rates=RATES,
        strategy=request.param if train else "model",
        train=train,
    )


def test_the_format(plan: jaxlwp.Plan) -> None:
    data = json.loads(json.dumps(model_explorer_data(plan), allow_nan=False))
    jsonschema.validate(data, SCHEMA)
    (graph,) = data["graphs"]
    known = {node["id"] for node in graph["nodes"]}
    assert len(known) == len(graph["nodes"]) == len(plan.graph.layers)
    overlays = graph["tasksData"]["edgeOverlaysDataListLeftPane"][0]["overlays"]
    for edge in overlays[0]["edges"]:
        assert {edge["sourceNodeId"], edge["targetNodeId"]} <= known
    for node in graph["nodes"]:
        entered = [edge["targetNodeInputId"] for edge in node["incomingEdges"]]
        assert entered == [told["id"] for told in node["inputsMetadata"]]
        assert {edge["sourceNodeId"] for edge in node["incomingEdges"]} <= known


def test_it_is_the_plan(plan: jaxlwp.Plan) -> None:
    (graph,) = model_explorer_data(plan)["graphs"]
    pairs = {
        (int(edge["sourceNodeId"]), int(node["id"]))
        for node in graph["nodes"]
        for edge in node["incomingEdges"]
    }
    assert pairs == {(edge.source, edge.target) for edge in plan.graph.edges}
    for node, layer in zip(graph["nodes"], plan.graph.layers, strict=True):
        assert "/".join(filter(None, (node["namespace"], node["label"]))) == layer.name
        told = {pair["key"]: pair["value"] for pair in node["attrs"]}
        config = plan.strategy.configs[layer.name]
        assert told["config"] == config.describe(plan.space.devices.axis_sizes)
        assert "kept for the backward pass" in told
    sent = graph["groupNodeAttributes"][""]["sent by a device"]
    assert sent == num_bytes(sum(c.num_bytes for c in plan.collectives))
    colours = {
        (node["style"]["backgroundColor"], plan.strategy.configs[layer.name].splits)
        for node, layer in zip(graph["nodes"], plan.graph.layers, strict=True)
    }
    assert len(colours) == len({splits for _, splits in colours})


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    options = ["plan", "models.lenet:LeNet5", "--devices", "dgx-h100:1", "--batch", "64"]
    result = CliRunner().invoke(main, [*options, "--model-explorer", str(path)])
    assert result.exit_code == 0, result.output
    assert f"wrote {path}" in result.output
    jsonschema.validate(json.loads(path.read_text()), SCHEMA)
    result = CliRunner().invoke(main, [*options, "--model-explorer", str(tmp_path / "no" / "a")])
    assert result.exit_code == 2 and result.output.startswith("Error: --model-explorer: cannot")


def test_cannot_be_written(plan: jaxlwp.Plan, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"cannot write .*no folder"):
        save_model_explorer(plan, tmp_path / "no" / "graph.json")
