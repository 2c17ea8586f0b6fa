"""The paper's cluster and networks, and the terms in which `paper` prices their steps."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from scipy.optimize import minimize_scalar

import jaxlwp
from jaxlwp.cost import CostModel, PaperCostModel, SearchSpace, layer_configs
from jaxlwp.devices import BUCKET_BYTES, MeshAxis, preset
from jaxlwp.devices._device_graph import EXPOSED_SHARE, axis_shape
from jaxlwp.graph import ComputationGraph
from jaxlwp.space import Config, baseline
from models import VGG16, AlexNet, InceptionV3, LeNet5
from tests.benchmarks import published
from tests.benchmarks.published import BATCH, COUNTS, STRATEGIES

MODELS = {"LeNet-5": LeNet5, "AlexNet": AlexNet, "VGG-16": VGG16, "Inception-v3": InceptionV3}
NODE = 4
"""GPUs of a node."""

SYSTEM = preset("dgx-1-p100")
ADAPTER_BYTES_PER_S = 12e9
"""Of a node's one adapter of 100 Gb/s: source as in systems/dgx-1-p100.toml, shared by its GPUs."""

NOT_IN_PAPER = jaxlwp.Constraints(forbid=("reduction",))
WORK_LIMIT = 2e9
"""Ends a search that cannot close its gap; the gap is in the results."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """In which terms a step is priced.

    Attributes:
      title: for tables.
      servers: as of a `PaperCostModel`; "" for the default cost model.
      objective: what a step takes, as of `jaxlwp.search`.
      found_by: the objective of the search. The paper's is the plain sum, whatever its runtime then
        hid behind the backward pass.
      fitted_to: AlexNet's bars to which link rates are fitted; if empty, they are data sheets'.
      fits_inside: the rate inside a node is fitted, too; else it is the data sheet's.
      transfers: as of a `PaperCostModel`. With "total" the rate between nodes is a node's, not a
        GPU's share of it.
    """

    title: str
    servers: str
    objective: str
    found_by: str
    fitted_to: tuple[str, ...] = ()
    fits_inside: bool = True
    transfers: str = "parallel"


DEVICE = Terms(
    title="paper's: plain sum, a layer's server on one GPU, link rates of data sheets",
    servers="device",
    objective="sum",
    found_by="sum",
)
REPLICAS = Terms(
    title="plain sum, servers shared out over all replicas, link rates fitted to AlexNet",
    servers="replicas",
    objective="sum",
    found_by="sum",
    fitted_to=("data", "model"),
)
TOTAL = Terms(
    title="paper's words: plain sum, all bytes that move over the bandwidth of one link; a node "
    "adds its gradients up before it sends them to a layer's server; NVLink's data sheet, the rate "
    "between nodes fitted to AlexNet's data-parallel and one-weird-trick bars",
    servers="host",
    objective="sum",
    found_by="sum",
    fitted_to=("data", "owt"),
    fits_inside=False,
    transfers="total",
)
TERMS = {
    "device": DEVICE,
    "host": replace(
        DEVICE,
        title="paper's: plain sum, a layer's server on one GPU that has its node's whole adapter, "
        "link rates of data sheets",
        servers="host",
    ),
    "replicas": REPLICAS,
    "overlapped": replace(
        REPLICAS,
        title="servers shared out over all replicas, gradients synchronised behind the backward "
        "pass, link rates fitted to AlexNet",
        objective="overlap",
        found_by="overlap",
    ),
    "planned by the sum": replace(
        REPLICAS,
        title="as 'overlapped', but plans are those of the plain sum, as in the paper, whose "
        "runtime hides what it can",
        objective="overlap",
    ),
    "total": TOTAL,
    "total, overlapped": replace(
        TOTAL,
        title="plans of 'total', gradients synchronised behind the backward pass; the rate between "
        "nodes fitted so",
        objective="overlap",
    ),
    "today": Terms(
        title="today's: the default cost model (kernels, NCCL's stages, sums joined), overlapped, "
        "link rates of data sheets",
        servers="",
        objective="overlap",
        found_by="overlap",
    ),
}
"""In which terms steps are priced, by name."""


# --- the cluster and the networks ----------------------------------------------------------------

Links = tuple[float, float]
"""Bytes per second that each GPU sends: inside a node, and over its share of the adapter."""


def data_sheet(count: int) -> Links:
    """Link rates of the paper's cluster with so many GPUs."""
    return SYSTEM.inside.rate(min(count, NODE)), ADAPTER_BYTES_PER_S / NODE


def cluster(count: int, links: Links, speed: float = 1.0, *, today: bool = False) -> Any:
    """So many GPUs of the paper's cluster.

    Args:
      count: GPUs.
      links: rates of links.
      speed: how many times as fast as a P100 by `preset` each GPU works.
      today: with all that the default cost model prices, as `System.device_graph` has it.
    """
    gpu, hosts = SYSTEM.gpu, max(count // NODE, 1)
    levels = (count,) if hosts == 1 else (hosts, NODE)
    starts_s = (40e-6 + 10e-6 * math.log2(max(hosts / 2, 1)), SYSTEM.inside.start_s)
    axes = tuple(
        MeshAxis(
            name=name,
            size=size,
            level=level,
            latency_s=starts_s[name.startswith("device")] if today else 0.0,
            bytes_per_s=links[0] if name.startswith("device") else links[1],
        )
        for name, size, level in axis_shape(levels)
    )
    devices = jaxlwp.DeviceGraph(
        axes=axes,
        conv_flops_per_s=speed * gpu.flops_per_s("float32"),
        dense_flops_per_s=speed * gpu.flops_per_s("float32"),
        memory_bytes_per_s=speed * gpu.memory_bytes_per_s,
        source="the paper's cluster",
    )
    if not today:
        return devices
    return replace(
        devices,
        overhead_s=gpu.kernel_s / speed,
        update_pass_byte_s=1 / (speed * gpu.memory_bytes_per_s),
        bucket_bytes=BUCKET_BYTES,
        exposed_share=EXPOSED_SHARE,
        fuses=True,
    )


@functools.cache
def graph_of(network: str, batch: int) -> ComputationGraph:
    """A network's training function, as shapes; no dropout and no statistics, as of that date."""
    model = MODELS[network]()
    images = jax.ShapeDtypeStruct((batch, *model.input_shape), jnp.float32)
    variables = dict(jax.eval_shape(model.init, jax.random.key(0), images))

    def loss(params: Any, others: Any, images: Any, labels: Any) -> Any:
        logits = model.apply({"params": params, **others}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return jaxlwp.trace(loss, variables.pop("params"), variables, images, labels)


def model_of(terms: Terms, devices: jaxlwp.DeviceGraph) -> CostModel | None:
    """The cost model of some terms; None for the default."""
    if not terms.servers:
        return None
    return PaperCostModel(devices=devices, servers=terms.servers, transfers=terms.transfers)


def speed_of(network: str, terms: Terms) -> float:
    """The factor on a P100's rates that gives the published bar of one GPU."""
    today = not terms.servers
    return _speed_of(network, today)


@functools.cache
def _speed_of(network: str, today: bool) -> float:
    graph, devices = graph_of(network, BATCH), cluster(1, (1.0, 1.0), today=today)
    space = jaxlwp.price(graph, devices, model=None if today else PaperCostModel(devices=devices))
    step_s = space.tables.evaluate([0] * len(graph.layers)).total_s
    return step_s / (BATCH / published.IMAGES_PER_S[network]["data"][0])


# --- steps -------------------------------------------------------------------------------------


@functools.cache
def known_strategies(network: str, count: int) -> dict[str, tuple[Config, ...]]:
    """The baselines' configs."""
    graph, devices = graph_of(network, BATCH * count), cluster(count, (1.0, 1.0))
    configs = NOT_IN_PAPER.apply(graph, layer_configs(graph.layers, devices), devices.axis_sizes)
    return {
        name: baseline(name, graph, configs, devices.axis_sizes).for_graph(graph)
        for name in STRATEGIES
        if name != "search"
    }


def step_s(
    network: str, count: int, configs: Sequence[Config], terms: Terms, links: Links
) -> float:
    """Seconds of a step under given configs."""
    devices = cluster(count, links, speed_of(network, terms), today=not terms.servers)
    space = jaxlwp.price(
        graph_of(network, BATCH * count),
        devices,
        model=model_of(terms, devices),
        configs=[[config] for config in configs],
    )
    return jaxlwp.search(space, objective=terms.objective).value


def space_of(network: str, count: int, terms: Terms, links: Links) -> SearchSpace:
    """Every strategy, without splits that the paper does not have."""
    devices = cluster(count, links, speed_of(network, terms), today=not terms.servers)
    graph = graph_of(network, BATCH * count)
    model = model_of(terms, devices)
    return jaxlwp.price(graph, devices, model=model, constraints=NOT_IN_PAPER)


def found(network: str, count: int, terms: Terms, links: Links) -> jaxlwp.optimize.SearchResult:
    """The strategy of least cost."""
    space = space_of(network, count, terms, links)
    return jaxlwp.search(space, objective=terms.found_by, work_limit=WORK_LIMIT)


def fitted(terms: Terms, count: int) -> Links:
    """Link rates by some of AlexNet's bars: least squares of their logarithms.

    The rate inside by the bars of 2 and 4 GPUs, then the rate across by those of 8 and 16.
    """
    inside, across = _fitted(replace(terms, title="", found_by=""))  # plans have no part in it
    return (inside if terms.fits_inside else data_sheet(count)[0]), across


@functools.cache
def _fitted(terms: Terms) -> Links:

    def off(links: Links, counts: Sequence[int]) -> float:
        errors = []
        for count, name in itertools.product(counts, terms.fitted_to):
            configs = known_strategies("AlexNet", count)[name]
            rate = BATCH * count / step_s("AlexNet", count, configs, terms, links)
            measured = published.IMAGES_PER_S["AlexNet"][name][COUNTS.index(count)]
            errors.append(math.log(rate / measured) ** 2)
        return sum(errors)

    def best(off_at: Any) -> float:
        bounds = math.log(3e8), math.log(1e11)
        found = minimize_scalar(
            lambda x: off_at(math.exp(x)), bounds=bounds, method="bounded", options={"xatol": 1e-3}
        )
        return math.exp(found.x)

    inside = data_sheet(NODE)[0]
    if terms.fits_inside:
        inside = best(lambda rate: off((rate, 1.0), (2, 4)))
    return inside, best(lambda rate: off((inside, rate), (8, 16)))


def links_of(terms: Terms, count: int) -> Links:
    """The link rates of some terms."""
    return fitted(terms, count) if terms.fitted_to else data_sheet(count)
