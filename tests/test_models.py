"""The networks are the published ones: parameter counts, shapes, and Linen against NNX."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import VGG16, AlexNet, AlexNetNNX, LeNet5

# As published: torchvision's documentation for AlexNet and VGG-16. LeNet-5 with a full second
# convolution, layer by layer.
LENET5_COUNT = (25 + 1) * 6 + (25 * 6 + 1) * 16 + (400 + 1) * 120 + (120 + 1) * 84 + (84 + 1) * 10
ALEXNET_COUNT = 61_100_840
VGG16_COUNT = 138_357_544


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _params(model: nn.Module, input_shape: tuple[int, ...]) -> Any:
    images = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


@pytest.mark.parametrize(
    ("model", "count"),
    [(LeNet5(), LENET5_COUNT), (AlexNet(), ALEXNET_COUNT), (VGG16(), VGG16_COUNT)],
    ids=["lenet5", "alexnet", "vgg16"],
)
def test_parameter_count_is_the_published_one(model: Any, count: int) -> None:
    assert _count(_params(model, model.input_shape)) == count


def test_nnx_parameter_count_is_the_published_one() -> None:
    model = nnx.eval_shape(lambda: AlexNetNNX(rngs=nnx.Rngs(0)))
    assert _count(nnx.state(model, nnx.Param)) == ALEXNET_COUNT


@pytest.mark.parametrize(
    ("model", "input_shape"),
    [
        (LeNet5(num_classes=7), (14, 14, 1)),
        (LeNet5(num_classes=7), (28, 28, 1)),
        (LeNet5(num_classes=7), (32, 32, 1)),
        (AlexNet(num_classes=7), (63, 63, 3)),
        (AlexNet(num_classes=7), (96, 80, 3)),
        (VGG16(num_classes=7), (32, 32, 3)),
        (VGG16(num_classes=7), (64, 32, 1)),
    ],
)
def test_logits_of_other_image_sizes(model: Any, input_shape: tuple[int, ...]) -> None:
    images = jax.ShapeDtypeStruct((5, *input_shape), jnp.float32)
    logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    assert (logits.shape, logits.dtype) == ((5, 7), jnp.float32)


@pytest.mark.parametrize("image_size", [63, 64, 95, 127, 224])
def test_nnx_takes_the_image_size_it_was_made_for(image_size: int) -> None:
    images = jax.ShapeDtypeStruct((5, image_size, image_size, 3), jnp.float32)

    def logits(x: jax.Array) -> jax.Array:
        model = AlexNetNNX(rngs=nnx.Rngs(0), image_size=image_size, num_classes=7, hidden=8)
        return model(x)

    assert jax.eval_shape(logits, images).shape == (5, 7)


def test_nnx_refuses_an_image_that_is_too_small() -> None:
    with pytest.raises(ValueError, match="image_size=62"):
        AlexNetNNX(rngs=nnx.Rngs(0), image_size=62)


def test_linen_and_nnx_alexnet_compute_the_same() -> None:
    linen = AlexNet(num_classes=10, hidden=32)
    twin = AlexNetNNX(rngs=nnx.Rngs(0), image_size=95, num_classes=10, hidden=32)
    images = jax.random.normal(jax.random.key(1), (2, 95, 95, 3))
    variables = linen.init(jax.random.key(2), images)
    nnx.update(twin, nnx.State(variables["params"]))

    expected = linen.apply(variables, images)

    np.testing.assert_allclose(twin(images), expected, rtol=1e-5, atol=1e-6)
    assert np.ptp(expected) > 1e-2  # not a comparison of zeros


@pytest.mark.parametrize("model", [AlexNet(hidden=16), VGG16(hidden=16)], ids=["alexnet", "vgg16"])
def test_dropout_only_in_training(model: Any) -> None:
    images = jax.random.normal(jax.random.key(0), (1, 64, 64, 3))
    variables = model.init(jax.random.key(1), images)

    def logits(seed: int, train: bool) -> np.ndarray:
        rngs = {"dropout": jax.random.key(seed)}
        return np.asarray(model.apply(variables, images, train=train, rngs=rngs))

    assert np.array_equal(logits(2, train=False), logits(3, train=False))
    assert not np.array_equal(logits(2, train=True), logits(3, train=True))


def test_nnx_dropout_only_in_training() -> None:
    model = AlexNetNNX(rngs=nnx.Rngs(0), image_size=64, num_classes=10, hidden=16)
    images = jax.random.normal(jax.random.key(0), (1, 64, 64, 3))
    assert np.array_equal(model(images), model(images))
    assert not np.array_equal(model(images, train=True), model(images, train=True))
