"""The model zoo at reduced sizes: losses with running statistics, random batches, plans."""

from __future__ import annotations

import collections
import dataclasses
import functools
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxlwp
from jaxlwp.check._hlo import bytes_by_kind
from jaxlwp.plan._plan import bind
from models import (
    ConvNeXtTiny,
    DenoisingUNet,
    DenseNet121,
    EfficientNetB0,
    HandPose,
    InceptionV3,
    MobileNetV2,
    ResNet18,
    ResNet50,
    ResNet101,
    SpeechCNN,
    SqueezeNet,
    UNet,
    UNet3D,
    VAEDecoder,
)

RATES = jaxlwp.Rates(
    flops_per_s=1e10, memory_bytes_per_s=1e9, latency_s=(1e-5,), link_bytes_per_s=(1e9,)
)
CLASSES = 10
SEARCHED = ("search", *jaxlwp.BASELINES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A network at a reduced size that keeps every kind of block.

    Attributes:
      model: a Linen module; `model.clone(dtype=...)` computes in another dtype.
      input_shape: shape of one example.
      target: shape of what is predicted for one example: () for a class, else real numbers.
      batch: examples.
      conditions: shapes of what else the model takes of one example.
      classes: of a last condition that is a class of one example; 0 if there is none.
    """

    model: Any
    input_shape: tuple[int, ...]
    target: tuple[int, ...] = ()
    batch: int = 8
    conditions: tuple[tuple[int, ...], ...] = ()
    classes: int = 0


DENOISER = DenoisingUNet(
    channels=(8, 16), attends=(True, False), blocks=1, heads=2, words=3, features=6, groups=4
)
ZOO: dict[str, Entry] = {
    "resnet18": Entry(
        model=ResNet18(num_classes=CLASSES, stage_sizes=(1, 1), width=8), input_shape=(32, 32, 3)
    ),
    "resnet50": Entry(
        model=ResNet50(num_classes=CLASSES, stage_sizes=(2, 1), width=8), input_shape=(32, 32, 3)
    ),
    "resnet101": Entry(
        model=ResNet101(num_classes=CLASSES, stage_sizes=(1, 2), width=8), input_shape=(36, 36, 3)
    ),
    "inception_v3": Entry(
        model=InceptionV3(num_classes=CLASSES, blocks=(1, 1, 1), width_multiplier=0.125),
        input_shape=(139, 139, 3),
    ),
    "densenet121": Entry(
        model=DenseNet121(num_classes=CLASSES, stage_sizes=(2, 1), growth_rate=8, width=16),
        input_shape=(32, 32, 3),
    ),
    "squeezenet": Entry(
        model=SqueezeNet(num_classes=CLASSES, stages=((8,), (8,)), width=8),
        input_shape=(35, 35, 3),
    ),
    "mobilenet_v2": Entry(
        model=MobileNetV2(
            num_classes=CLASSES, stages=((1, 16, 1, 1), (6, 24, 2, 2)), width_multiplier=0.25
        ),
        input_shape=(32, 32, 3),
    ),
    "efficientnet_b0": Entry(
        model=EfficientNetB0(
            num_classes=CLASSES,
            stages=((1, 3, 16, 1, 1), (6, 3, 24, 1, 2), (6, 5, 24, 1, 1)),
            width_multiplier=0.25,
        ),
        input_shape=(32, 32, 3),
    ),
    "convnext_t": Entry(
        # At the published layer scale of 1e-6 nothing within a block would show.
        model=ConvNeXtTiny(num_classes=CLASSES, stage_sizes=(1, 1), width=8, layer_scale=1.0),
        input_shape=(32, 32, 3),
    ),
    "unet": Entry(
        model=UNet(depth=2, width=8, num_classes=3), input_shape=(24, 20, 1), target=(24, 20, 3)
    ),
    "unet_bilinear": Entry(
        model=UNet(depth=1, width=8, num_classes=3, upsample="bilinear"),
        input_shape=(20, 24, 1),
        target=(20, 24, 3),
    ),
    "unet3d": Entry(
        model=UNet3D(depth=1, width=8),
        input_shape=(8, 6, 10, 3),
        target=(8, 6, 10, 3),
    ),
    "speech": Entry(
        model=SpeechCNN(num_classes=CLASSES, stages=((8, 1), (16, 2)), poolings=1),
        input_shape=(512, 1),
    ),
    "vae_decoder": Entry(
        model=VAEDecoder(channels=(16, 8), blocks=1, groups=4),
        input_shape=(8, 6, 4),
        target=(16, 12, 3),
    ),
    "denoising_unet": Entry(
        model=DENOISER, input_shape=(8, 8, 4), target=(8, 8, 4), conditions=((), (3, 6))
    ),
    "denoising_unet_class": Entry(
        model=DENOISER.clone(num_classes=5, panorama=True),
        input_shape=(8, 8, 4),
        target=(8, 8, 4),
        conditions=((),),
        classes=5,
    ),
    "handpose": Entry(
        model=HandPose(
            num_keypoints=4, stage_sizes=(1, 1), bottleneck=False, width=8, deconv_widths=(8,)
        ),
        input_shape=(32, 32, 3),
        target=(8, 8, 4),
    ),
    "handpose_coordinates": Entry(
        model=HandPose(
            num_keypoints=4,
            stage_sizes=(1, 1),
            bottleneck=False,
            width=8,
            deconv_widths=(8,),
            output="coordinates",
        ),
        input_shape=(32, 32, 3),
        target=(4, 2),
    ),
}
LARGE = (
    "inception_v3",
    "resnet101",
    "densenet121",
    "efficientnet_b0",
    "denoising_unet",
    "denoising_unet_class",
)
"""Those whose training takes longest to compile: in `make test-all` alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A traced and priced network.

    Attributes:
      loss: `loss(params, stats, inputs, target, key)` gives (loss, (outputs, new statistics)).
      params: parameters.
      stats: running statistics.
      batch: shapes of the other arguments.
      space: every strategy on eight devices.
      mesh: the devices.
    """

    loss: Callable[..., Any]
    params: Any
    stats: Any
    batch: tuple[Any, ...]
    space: jaxlwp.cost.SearchSpace
    mesh: jax.sharding.Mesh


def random_batch(name: str, draw: int) -> tuple[Any, ...]:
    """The model's inputs, targets and a dropout key."""
    entry = ZOO[name]
    keys = jax.random.split(jax.random.key(draw), 3)
    inputs = random_inputs(entry, keys[0])
    if entry.target:
        return inputs, jax.random.normal(keys[1], (entry.batch, *entry.target)), keys[2]
    return inputs, jax.random.randint(keys[1], (entry.batch,), 0, CLASSES), keys[2]


def random_inputs(entry: Entry, key: Any, dtype: Any = jnp.float32) -> tuple[Any, ...]:
    """What a model is called with: data, and conditions."""
    shapes = (entry.input_shape, *entry.conditions)
    keys = jax.random.split(key, len(shapes) + 1)
    drawn = tuple(
        jax.random.normal(key, (entry.batch, *shape), dtype)
        for key, shape in zip(keys[1:], shapes, strict=True)
    )
    if not entry.classes:
        return drawn
    return (*drawn, jax.random.randint(keys[0], (entry.batch,), 0, entry.classes))


def loss_of(entry: Entry, model: Any) -> Callable[..., Any]:
    """The training loss; running statistics come back as auxiliary output."""

    def loss(params: Any, stats: Any, inputs: Any, target: Any, key: Any) -> Any:
        variables = {"params": params} | stats
        y, changed = model.apply(
            variables, *inputs, train=True, mutable=list(stats), rngs={"dropout": key}
        )
        y = y.astype(jnp.float32)
        if entry.target:
            return jnp.mean((y - target) ** 2), (y, changed)
        return optax.softmax_cross_entropy_with_integer_labels(y, target).mean(), (y, changed)

    return loss


@functools.cache
def case(name: str, seed: int, dtype: str = "float32") -> Case:
    """A network with random parameters, traced and priced for 8 devices."""
    entry = ZOO[name]
    model = entry.model.clone(dtype=jnp.dtype(dtype))
    batch = random_batch(name, 0)
    keys = jax.random.split(jax.random.key(seed), 2)
    init = jax.jit(functools.partial(model.init, train=True))
    variables = init({"params": keys[0], "dropout": keys[1]}, *batch[0])
    params = perturbed(variables.pop("params"), seed)
    loss = loss_of(entry, model)
    mesh = jaxlwp.make_mesh(jax.devices()[:8])
    graph = jaxlwp.trace(loss, params, variables, *batch)
    space = jaxlwp.price(graph, jaxlwp.device_graph(mesh, rates=RATES))
    shapes = jax.eval_shape(lambda: random_batch(name, 0))
    return Case(loss=loss, params=params, stats=variables, batch=shapes, space=space, mesh=mesh)


def perturbed(params: Any, seed: int) -> Any:
    """The parameters, with random scales and biases.

    With the initial ones a normalisation undoes the scale of the one before it: the gradient of
    that scale is zero, and all that is left to compare is rounding.
    """
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    drawn = [
        leaf + jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype)
        if leaf.ndim == 1
        else leaf
        for leaf in leaves
    ]
    return jax.tree.unflatten(tree, drawn)


@functools.cache
def one_device(name: str, seed: int, dtype: str = "float32") -> Callable[..., Any]:
    """Compiled loss, outputs, statistics and gradients on one device."""
    step = jax.value_and_grad(case(name, seed, dtype).loss, has_aux=True)
    return jax.jit(step)


def plan_for(this: Case, strategy: str | int) -> jaxlwp.Plan:
    """A plan for the found strategy, a baseline, or random strategy number `strategy`."""
    if strategy == "search":
        chosen = jaxlwp.search(this.space).strategy
    elif isinstance(strategy, str):
        chosen = this.space.baseline(strategy)
    else:
        draw = random.Random(strategy)
        chosen = this.space.strategy(
            f"random {strategy}", [draw.randrange(len(c)) for c in this.space.configs]
        )
    arguments = (this.params, this.stats, *this.batch)
    out_tree = jax.tree.structure(jax.eval_shape(this.loss, *arguments))
    return bind(this.space, chosen, this.mesh, arguments, out_tree)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A compiled step, and the bytes of its collectives.

    Attributes:
      step: called as `step(params, stats, *batch)`.
      predicted: kind -> bytes per device by the cost model.
      compiled: kind -> bytes per device in the program.
    """

    step: Callable[..., Any]
    predicted: dict[str, int]
    compiled: dict[str, int]

    @property
    def difference(self) -> float:
        """Difference of the totals, relative to the compiled one."""
        predicted, compiled = sum(self.predicted.values()), sum(self.compiled.values())
        return abs(predicted - compiled) / max(compiled, 1)


def compile_step(this: Case, plan: jaxlwp.Plan) -> Compiled:
    """Compile loss and gradients under a plan."""
    step = jax.jit(jax.value_and_grad(plan, has_aux=True), in_shardings=plan.shardings)
    done = step.lower(this.params, this.stats, *this.batch).compile()
    predicted: collections.Counter[str] = collections.Counter()
    for collective in plan.collectives:
        predicted[collective.kind] += collective.num_bytes
    text = done.as_text()

    def call(params: Any, stats: Any, *batch: Any) -> Any:
        return done(*jax.device_put((params, stats, *batch), plan.shardings))

    return Compiled(
        step=call,
        predicted=dict(predicted),
        compiled=bytes_by_kind(jaxlwp.check.compiled_collectives(text)),
    )


def relative_errors(actual: Any, expected: Any) -> dict[str, float]:
    """For each leaf the largest difference, relative to the leaf's largest entry.

    A leaf that is zero but for rounding (the gradient of a bias before a batch norm) is measured
    against one hundredth of the largest entry of all leaves instead.
    """
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    largest = max(float(np.max(np.abs(b))) for _, b in leaves)
    return {
        jax.tree_util.keystr(path): float(
            np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)))
            / max(float(np.max(np.abs(b))), 1e-2 * largest)
        )
        for a, (path, b) in zip(jax.tree.leaves(actual), leaves, strict=True)
    }
