"""What handing out interchangeable mesh axes in one fixed order costs: `make bench-space`.

For each network and number of devices, the predicted optimum over the configs that jaxlwp
enumerates against the optimum over every assignment of mesh axes to dimensions.
"""

from __future__ import annotations

import datetime
import itertools
import json
import platform
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxlwp
from models.alexnet import AlexNet
from models.lenet import LeNet5
from models.vgg import VGG16

NETWORKS = {"LeNet-5": LeNet5(), "AlexNet": AlexNet(), "VGG-16": VGG16()}
RESULTS = Path(__file__).parent / "results" / "space.json"


def devices(levels: tuple[int, ...]) -> jaxlwp.DeviceGraph:
    """P100-like devices: NVLink inside a host, a link four times slower between hosts."""
    names = ("device",) if len(levels) == 1 else ("host", "device")
    rates = (2e10,) if len(levels) == 1 else (5e9, 2e10)
    axes = tuple(
        jaxlwp.devices.MeshAxis(
            name=f"{names[level]}{i}", size=2, level=level, latency_s=1e-5, bytes_per_s=rates[level]
        )
        for level, count in enumerate(levels)
        for i in range(count)
    )
    return jaxlwp.DeviceGraph(
        axes=axes, conv_flops_per_s=5e12, dense_flops_per_s=5e12, memory_bytes_per_s=5e11
    )


def row(name: str, levels: tuple[int, ...]) -> dict[str, Any]:
    """Predicted optimum in both spaces."""
    model = NETWORKS[name]
    graph_devices = devices(levels)
    batch = 32 * graph_devices.num_devices
    images = jax.ShapeDtypeStruct((batch, *model.input_shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)

    def loss(params: Any, images: Any, labels: Any) -> Any:
        logits = model.apply(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    graph = jaxlwp.trace(loss, params, images, labels)
    found = {}
    for space_name, interchangeable in (("one_order", True), ("every_order", False)):
        start = time.perf_counter()
        space = jaxlwp.price(graph, graph_devices, interchangeable=interchangeable)
        result = jaxlwp.search(space)
        found[space_name] = {
            "predicted_s": result.cost.total_s,
            "configs": sum(len(c) for c in space.configs),
            "wall_s": time.perf_counter() - start,
        }
    one, every = found["one_order"]["predicted_s"], found["every_order"]["predicted_s"]
    return {"network": name, "levels": levels, "loss": one / every - 1, **found}


def main() -> None:
    """Print the table and write the results."""
    rows = []
    for name, levels in itertools.product(NETWORKS, ((2,), (1, 2), (3,))):
        rows.append(row(name, levels))
        r = rows[-1]
        print(
            f"{r['network']:8} axes per level {r['levels']!s:8} lost {r['loss']:8.3%}  "
            f"configs {r['one_order']['configs']:5} of {r['every_order']['configs']:5}  "
            f"{r['one_order']['wall_s']:6.2f} s of {r['every_order']['wall_s']:6.2f} s",
            flush=True,
        )
    content = {
        "date": datetime.date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "jax": jax.__version__,
        "lost_max": max(r["loss"] for r in rows),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
