"""What the calls and command lines of the table meet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from click.testing import CliRunner
from jax import lax
from jax.sharding import Mesh

import jaxlwp
from jaxlwp.cli import main
from jaxlwp.devices import (
    MeshAxis,
    load_system,
)
from jaxlwp.measure import load_profile

RATES = jaxlwp.Rates(flops_per_s=1e12, memory_bytes_per_s=1e11)


def loss_fn(params: Any, x: Any, y: Any) -> Any:
    """Images (8, 6, 6, 1), a convolution `conv` and a dense layer `dense`; a scalar."""
    layout = ("NHWC", "HWIO", "NHWC")
    h = lax.conv_general_dilated(x, params["conv"], (1, 1), "SAME", dimension_numbers=layout)
    h = jax.nn.relu(h).reshape(len(x), -1)
    return jnp.mean((h @ params["dense"] - y) ** 2)


def scores(params: Any, x: Any, y: Any) -> Any:
    return x.reshape(len(x), -1).sum(1) * y.sum()


def printing(params: Any, x: Any, y: Any) -> Any:
    jax.debug.print("{}", x)
    return jnp.mean(x)


def arguments() -> tuple[Any, Any, Any]:
    def zeros(*shape: int) -> Any:
        return np.zeros(shape, np.float32)

    return {"conv": zeros(3, 3, 1, 4), "dense": zeros(144, 4)}, zeros(8, 6, 6, 1), zeros(8, 4)


def namespace() -> dict[str, Any]:
    """The names that the table's calls use."""
    params, x, y = arguments()
    mesh = Mesh(np.array(jax.devices()[:4], dtype=object).reshape(2, 2), ("a", "b"))

    def plan_with(fn: Any = loss_fn, *given: Any, **options: Any) -> Any:
        given = given or (params, x, y)
        return jaxlwp.parallelize(fn, *given, **{"devices": 2, "rates": RATES, **options})

    plan = jaxlwp.parallelize(loss_fn, params, x, y, mesh=mesh, rates=RATES)
    away = jaxlwp.parallelize(loss_fn, params, x, y, devices="h100:2")
    names = {
        **vars(jaxlwp),
        "parallelize": plan_with,
        **{n.__name__: n for n in (load_system, load_profile, loss_fn, scores, printing)},
        "MeshAxis": MeshAxis,
    }
    return names | {
        **{"params": params, "x": x, "y": y, "mesh": mesh, "plan": plan, "space": plan.space},
        **{"jax": jax, "jnp": jnp, "np": np, "optax": optax, "plan_of_absent_gpus": away},
        "link_rates": plan.space.devices.to_json(),
    }


STRATEGY = {
    "format_version": 1,
    "name": "mine",
    "fingerprint": "0",
    "axis_sizes": {"a": 2},
    "configs": {"conv": {"sample": ["a"]}},
}
ENVIRONMENT = {"device_kind": "H100", "platform": "gpu", "driver": "1", "jax": "1", "jaxlib": "1"}
SYSTEM = 'name = "mine"\ngpu = "h100"\n[inside]\ndevices = 8\nbytes_per_s = 1e11\nstart_s = 0.0\n'


def _exported(*entries: Any, **environment: Any) -> str:
    group = {"environment": {**ENVIRONMENT, **environment}, "entries": list(entries)}
    return json.dumps({"format_version": 2, "environments": [group]})


def _entry(**fields: Any) -> dict[str, Any]:
    return {"kind": "layer", "key": "k", "seconds": 1.0, **fields}


FILES: dict[str, str | bytes] = {
    "empty.json": "{}",
    "text.json": "splits: none",
    "deep.json": "[" * 100_000,
    "latin.json": b'{"name": "\xe9"}',
    "future.json": json.dumps({**STRATEGY, "format_version": 99}),
    "axis.json": json.dumps({**STRATEGY, "configs": {"conv": {"sample": ["c"]}}}),
    "twice.json": json.dumps({**STRATEGY, "configs": {"conv": {"sample": ["a"], "height": ["a"]}}}),
    "none.json": json.dumps({**STRATEGY, "axis_sizes": {"a": 0}}),
    "other.json": json.dumps(STRATEGY),
    "negative.json": _exported(_entry(seconds=-1)),
    "kind.json": _exported(_entry(kind=["layer"])),
    "host.json": _exported(_entry(), host=3),
    "rates.json": _exported(_entry(kind="rates", data={"axes": "device0"})),
    "empty.toml": "",
    "deep.toml": "a = " + "[" * 100_000,
    "broken.toml": "name = mine",
    "gpu.toml": SYSTEM.replace("h100", "h300"),
    "devices.toml": SYSTEM.replace("devices = 8", "devices = 0"),
    "rate.toml": SYSTEM.replace("1e11", '"fast"'),
    "typo.toml": SYSTEM.replace("start_s", "starts_s"),
    "hosts.toml": SYSTEM,
    "no_such_import.py": "import surely_not_installed\n",
    "mine.py": """
import flax.linen as nn
from typing import ClassVar

number = 3

class Shapeless(nn.Module):
    def __call__(self, x):
        return x

class Needy(Shapeless):
    features: int
    input_shape: ClassVar = (8, 8, 1)

class Wordless(nn.Module):
    input_shape: ClassVar = (8, 8, 1)

    def __call__(self, x):
        return x.sum((1, 2, 3))

class Net: ...

def pair():
    return 1, 2

def broken():
    raise RuntimeError("no data here")

def unfit():
    import numpy as np
    return (lambda w, x: (x @ w).mean()), np.zeros((6, 2)), (np.ones((4, 5)),)

def fixed():
    import numpy as np
    return (lambda w, x: (x @ w).mean()), np.zeros((6, 2)), np.ones((16, 6))
""",
}
"""Files of the folder, by name."""


def lay_out(folder: Path) -> None:
    """Write the files into a folder."""
    for name, content in FILES.items():
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)
    (folder / "folder").mkdir()


def outcome(given: str, names: dict[str, Any]) -> str:
    """The line that a call or a command line gets.

    Raises:
      AssertionError: it is right, or it ends in another way than by an error of ours.
    """
    if given.startswith("jaxlwp "):
        done = CliRunner().invoke(main, given.split()[1:])
        assert done.exit_code == 2, (done.exit_code, done.output)
        return done.stderr.removesuffix("\n").removeprefix("Error: ")
    try:
        eval(given, names)
    except (ValueError, OSError) as error:
        return str(error)
    raise AssertionError(f"{given} is right")
