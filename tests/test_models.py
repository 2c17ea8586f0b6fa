"""The networks are the published ones: parameter counts, shapes, and Linen against NNX."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from models import (
    VGG16,
    AlexNet,
    AlexNetNNX,
    ConvNeXtTiny,
    DenoisingUNet,
    DenseNet121,
    EfficientNetB0,
    HandPose,
    InceptionV3,
    LeNet5,
    MobileNetV2,
    ResNet18,
    ResNet50,
    ResNet101,
    ResNetNNX,
    SpeechCNN,
    SpeechM5,
    SpeechM18,
    SqueezeNet,
    SqueezeNet11,
    UNet,
    UNet3D,
    VAEDecoder,
)
from models.denoiser import timestep_embedding
from models.handpose import expected_position
from tests.contracts.harness import drawn

# As published: torchvision's documentation, unless something else is said. LeNet-5 has a full
# second convolution, counted layer by layer.
LENET5_COUNT = (25 + 1) * 6 + (25 * 6 + 1) * 16 + (400 + 1) * 120 + (120 + 1) * 84 + (84 + 1) * 10
# The paper has no count: levels down, levels up, labels; 1 channel in, 2 classes out.
UNET_COUNT = (
    sum((9 * i + 1) * o + (9 * o + 1) * o for i, o in ((1, 64), (64, 128), (128, 256), (256, 512)))
    + (9 * 512 + 1) * 1024
    + (9 * 1024 + 1) * 1024
    + sum((4 * 2 * c + 1) * c + (9 * 2 * c + 1) * c + (9 * c + 1) * c for c in (512, 256, 128, 64))
    + (64 + 1) * 2
)
ALEXNET_COUNT = 61_100_840


def _speech_count(first: int, *others: int) -> int:
    """Convolutions without bias, scale and bias of the normalization, last layer."""
    pairs = zip((first, *others), others, strict=False)
    convs = 80 * first + sum(3 * i * o for i, o in pairs)
    return convs + 2 * sum((first, *others)) + (others[-1] + 1) * 10


PUBLISHED: dict[str, tuple[Any, int]] = {
    "lenet5": (LeNet5(), LENET5_COUNT),
    "alexnet": (AlexNet(), ALEXNET_COUNT),
    "vgg16": (VGG16(), 138_357_544),
    "inception_v3": (InceptionV3(), 23_834_568),
    "inception_v3 aux": (InceptionV3(aux_logits=True), 27_161_264),
    "densenet121": (DenseNet121(), 7_978_856),
    "resnet18": (ResNet18(), 11_689_512),
    "resnet50": (ResNet50(), 25_557_032),
    "resnet101": (ResNet101(), 44_549_160),
    "unet": (UNet(), UNET_COUNT),
    "unet bilinear": (UNet(upsample="bilinear"), UNET_COUNT),
    "unet3d": (UNet3D(), 19_069_955 + 2_336),  # see the test of its count
    "mobilenet_v2": (MobileNetV2(), 3_504_872),
    "efficientnet_b0": (EfficientNetB0(), 5_288_548),
    "convnext_tiny": (ConvNeXtTiny(), 28_589_128),
    "squeezenet1_0": (SqueezeNet(), 1_248_424),
    "squeezenet1_1": (SqueezeNet11(), 1_235_496),
    # As diffusers has them: AutoencoderKL without its encoder, UNet2DConditionModel.
    "vae decoder": (VAEDecoder(), 49_490_179 + 20),
    "denoising unet": (DenoisingUNet(), 859_520_964),
    "speech m5": (SpeechM5(), _speech_count(128, 128, 256, 512)),
    "speech m11": (SpeechCNN(), _speech_count(64, *[64] * 2, *[128] * 2, *[256] * 3, *[512] * 2)),
    "speech m18": (SpeechM18(), _speech_count(64, *[64] * 4, *[128] * 4, *[256] * 4, *[512] * 4)),
    # ResNet-50 without its last layer, then the three transposed convolutions and the heat maps.
    "handpose": (
        HandPose(),
        (25_557_032 - 2049 * 1000) + (16 * 2048 + 2 + 2 * (16 * 256 + 2)) * 256 + (256 + 1) * 21,
    ),
}
PUBLISHED_NNX: dict[str, tuple[Any, int]] = {
    "alexnet": (AlexNetNNX, ALEXNET_COUNT),
    "resnet18": (
        functools.partial(ResNetNNX, stage_sizes=(2, 2, 2, 2), bottleneck=False),
        11_689_512,
    ),
    "resnet50": (ResNetNNX, 25_557_032),
    "resnet101": (functools.partial(ResNetNNX, stage_sizes=(3, 4, 23, 3)), 44_549_160),
}

# Small versions with every kind of block: the model, the shape of one input and of its output.
TINY_ALEXNET = AlexNet(num_classes=8, hidden=16)
TINY_VGG = VGG16(num_classes=8, hidden=16)
TINY_INCEPTION = InceptionV3(num_classes=8, blocks=(1, 1, 1), width_multiplier=1 / 8)
TINY_DENSENET = DenseNet121(num_classes=8, stage_sizes=(2, 1), growth_rate=8, width=16)
TINY_RESNET18 = ResNet18(num_classes=8, stage_sizes=(1, 1), width=8)
TINY_RESNET50 = ResNet50(num_classes=8, stage_sizes=(2, 1), width=8)
TINY_UNET = UNet(depth=2, width=8)
TINY_UNET3D = UNet3D(depth=1, width=8)
TINY_MOBILENET = MobileNetV2(
    num_classes=8, stages=((1, 16, 1, 1), (6, 24, 2, 2)), width_multiplier=1 / 4
)
TINY_EFFICIENTNET = EfficientNetB0(
    num_classes=8,
    stages=((1, 3, 16, 1, 1), (6, 3, 24, 1, 2), (6, 5, 24, 1, 1)),
    width_multiplier=1 / 4,
)
TINY_CONVNEXT = ConvNeXtTiny(num_classes=8, stage_sizes=(1, 1), width=8, layer_scale=1.0)
TINY_SPEECH = SpeechCNN(num_classes=8, stages=((8, 1), (16, 2)), poolings=1)
TINY_HANDPOSE = HandPose(
    num_keypoints=4, stage_sizes=(1, 1), bottleneck=False, width=8, deconv_widths=(8,)
)
TINY_SQUEEZENET = SqueezeNet(num_classes=8, stages=((8,), (8,)), width=8)
TINY_DECODER = VAEDecoder(channels=(16, 16, 8), blocks=1, groups=4)
TINY_DENOISER = DenoisingUNet(
    channels=(8, 16), attends=(True, False), blocks=1, heads=2, words=3, features=6, groups=4
)
TINY: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...]]] = {
    "lenet5": (LeNet5(num_classes=8), (14, 14, 1), (8,)),
    "lenet5 wide": (LeNet5(num_classes=8), (28, 32, 1), (8,)),
    "alexnet": (TINY_ALEXNET, (63, 63, 3), (8,)),
    "alexnet wide": (TINY_ALEXNET, (96, 80, 3), (8,)),
    "vgg16": (TINY_VGG, (32, 32, 3), (8,)),
    "vgg16 wide": (TINY_VGG, (64, 32, 1), (8,)),
    "inception_v3": (TINY_INCEPTION, (75, 75, 3), (8,)),
    "inception_v3 wide": (TINY_INCEPTION, (107, 91, 3), (8,)),
    "densenet121": (TINY_DENSENET, (32, 32, 3), (8,)),
    "densenet121 wide": (TINY_DENSENET, (40, 52, 1), (8,)),
    "resnet18": (TINY_RESNET18, (32, 32, 3), (8,)),
    "resnet50": (TINY_RESNET50, (32, 32, 3), (8,)),
    "resnet50 wide": (TINY_RESNET50, (40, 52, 1), (8,)),
    "resnet50 trunk": (ResNet50(num_classes=None, width=8), (64, 96, 3), (2, 3, 256)),
    "unet": (TINY_UNET, (16, 16, 1), (16, 16, 2)),
    "unet wide": (TINY_UNET, (24, 32, 3), (24, 32, 2)),
    "unet bilinear": (TINY_UNET.clone(upsample="bilinear"), (16, 24, 1), (16, 24, 2)),
    "unet3d": (TINY_UNET3D, (8, 8, 8, 3), (8, 8, 8, 3)),
    "unet3d wide": (TINY_UNET3D, (8, 16, 4, 1), (8, 16, 4, 3)),
    "mobilenet_v2": (TINY_MOBILENET, (32, 32, 3), (8,)),
    "mobilenet_v2 wide": (TINY_MOBILENET, (33, 52, 1), (8,)),
    "efficientnet_b0": (TINY_EFFICIENTNET, (32, 32, 3), (8,)),
    "efficientnet_b0 wide": (TINY_EFFICIENTNET, (33, 52, 1), (8,)),
    "convnext_tiny": (TINY_CONVNEXT, (32, 32, 3), (8,)),
    "convnext_tiny wide": (TINY_CONVNEXT, (33, 54, 1), (8,)),
    "squeezenet1_0": (TINY_SQUEEZENET, (32, 32, 3), (8,)),
    "squeezenet1_0 wide": (TINY_SQUEEZENET, (33, 52, 1), (8,)),
    "squeezenet1_1": (SqueezeNet11(num_classes=8), (17, 17, 3), (8,)),
    "speech": (TINY_SPEECH, (256, 1), (8,)),
    "speech short": (TINY_SPEECH, (100, 2), (8,)),
    "vae decoder": (TINY_DECODER, (8, 8, 4), (32, 32, 3)),
    "vae decoder wide": (TINY_DECODER.clone(panorama=True), (6, 12, 4), (24, 48, 3)),
    "denoising unet": (TINY_DENOISER, (8, 8, 4), (8, 8, 4)),
    "denoising unet class": (TINY_DENOISER.clone(num_classes=5), (8, 8, 4), (8, 8, 4)),
    "denoising unet wide": (TINY_DENOISER.clone(panorama=True), (6, 12, 3), (6, 12, 3)),
    "handpose": (TINY_HANDPOSE, (32, 32, 3), (8, 8, 4)),
    "handpose wide": (TINY_HANDPOSE, (32, 48, 3), (8, 12, 4)),
    "handpose coordinates": (TINY_HANDPOSE.clone(output="coordinates"), (32, 32, 3), (4, 2)),
}


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _inputs(input_shape: tuple[int, ...], batch: int = 5) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch, *input_shape), jnp.float32)


def _variables(model: nn.Module, input_shape: tuple[int, ...]) -> Any:
    return jax.eval_shape(model.init, jax.random.key(0), _inputs(input_shape))


def _train_step(model: nn.Module, variables: Any, inputs: Any) -> Any:
    """Returns the output and the new batch statistics."""
    rngs = {"dropout": jax.random.key(0)}
    return model.apply(variables, inputs, train=True, mutable=["batch_stats"], rngs=rngs)


def _types_of_products(fn: Callable[..., Any], *args: Any) -> set[str]:
    """Returns the types of what the convolutions and matrix products of a function compute."""
    text = str(jax.make_jaxpr(fn)(*args))
    return set(re.findall(r":(\w+)\[[^]]*\] = (?:conv_general_dilated|dot_general)", text))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name: str) -> None:
    model, count = PUBLISHED[name]
    assert _count(_variables(model, model.input_shape)["params"]) == count


@pytest.mark.parametrize("name", drawn(TINY, 0.5))
def test_tiny_version_trains(name: str) -> None:
    model, input_shape, output_shape = TINY[name]
    variables = _variables(model, input_shape)

    output, changed = jax.eval_shape(
        functools.partial(_train_step, model), variables, _inputs(input_shape)
    )

    assert (output.shape, output.dtype) == ((5, *output_shape), jnp.float32)
    old = variables.get("batch_stats", {})
    new = changed.get("batch_stats", {})
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, old)


@pytest.mark.parametrize("name", TINY)
def test_every_normalization_sees_training(name: str) -> None:
    model, input_shape, _ = TINY[name]
    variables = _variables(model, input_shape)
    step = functools.partial(_train_step, model)

    jaxpr = jax.make_jaxpr(step)(variables, _inputs(input_shape)).jaxpr

    # A statistic that nothing changes would come out as the variable that went in.
    went_in = {id(variable) for variable in jaxpr.invars}
    assert not [variable for variable in jaxpr.outvars if id(variable) in went_in]


@pytest.mark.parametrize("name", TINY)
def test_every_layer_computes_in_the_type_asked_for(name: str) -> None:
    model, input_shape, _ = TINY[name]
    half = model.clone(dtype=jnp.bfloat16)
    variables = _variables(half, input_shape)
    step = functools.partial(_train_step, half)

    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    assert _types_of_products(step, variables, _inputs(input_shape)) == {"bf16"}


def test_count_of_3d_unet_is_the_published_one_without_scales() -> None:
    params = flatten_dict(_variables(UNet3D(), (8, 8, 8, 3))["params"])
    assert _count([leaf for path, leaf in params.items() if path[-1] != "scale"]) == 19_069_955


def _tokens(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def _random_variables(model: Any, x: jax.Array) -> Any:
    """Of the shapes that the model has: compiling its initialisation takes longer than all else."""
    draw = np.random.default_rng(1).standard_normal
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return jax.tree.map(lambda leaf: (0.2 * draw(leaf.shape)).astype(leaf.dtype), shapes)


@pytest.mark.parametrize("model", [TINY_DECODER, TINY_DENOISER], ids=["decoder", "denoiser"])
def test_a_panorama_has_no_edge_from_left_to_right(model: Any) -> None:
    """Latents turned by some columns give the outputs turned; not so without the option."""
    x = _tokens(0, 1, 8, 12, 4)
    variables = _random_variables(model, x)
    for panorama in (True, False):
        run = jax.jit(model.clone(panorama=panorama).apply)
        straight, turned = run(variables, x), run(variables, jnp.roll(x, 4, axis=2))
        scale = straight.shape[2] // x.shape[2]
        off = np.max(np.abs(jnp.roll(straight, 4 * scale, axis=2) - turned))
        assert (off < 1e-4) == panorama, off


def test_timestep_and_condition_change_the_noise() -> None:
    x, classes = _tokens(0, 2, 8, 8, 4), jnp.array([1, 3])
    texts, times = _tokens(1, 2, 3, 6), jnp.array([1.0, 500.0])
    for model, condition in (
        (TINY_DENOISER, texts),
        (TINY_DENOISER.clone(num_classes=5), classes),
    ):
        variables = _random_variables(model, x)
        run = jax.jit(model.apply)
        noise = run(variables, x, times, condition)
        for other in (
            run(variables, x, times + 1, condition),
            run(variables, x, times, 0 * condition),
        ):
            assert np.all(np.max(np.abs(other - noise), axis=(1, 2, 3)) > 1e-5)


def test_timesteps_are_embedded_as_published() -> None:
    embedding = timestep_embedding(jnp.array([3.0]), 4)[0]
    np.testing.assert_allclose(
        embedding, [math.cos(3), math.cos(0.03), math.sin(3), math.sin(0.03)], rtol=1e-5
    )


@pytest.mark.parametrize(
    ("model", "input_shape"), [(TINY_UNET, (18, 16, 1)), (TINY_UNET3D, (8, 8, 9, 3))]
)
def test_unet_refuses_sizes_that_do_not_halve(model: Any, input_shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"multiples of {2**model.depth}"):
        _variables(model, input_shape)


def test_denoiser_refuses_sizes_that_do_not_halve() -> None:
    with pytest.raises(ValueError, match="multiples of 2"):
        _variables(TINY_DENOISER, (8, 9, 4))


def test_speech_counts_round_to_the_published_ones() -> None:
    assert [round(PUBLISHED[f"speech {name}"][1] / 1e6, 1) for name in ("m11", "m18")] == [1.8, 3.7]


def test_coordinates_of_a_hand_pose_are_those_of_the_peaks() -> None:
    heatmaps = jnp.zeros((1, 4, 8, 2)).at[0, 1, 6, 0].set(50).at[0, 3, 0, 1].set(50)
    expected = [[[6.5 / 8, 1.5 / 4], [0.5 / 8, 3.5 / 4]]]
    np.testing.assert_allclose(expected_position(heatmaps), expected, atol=1e-6)


def test_auxiliary_head_of_inception() -> None:
    model = TINY_INCEPTION.clone(aux_logits=True)
    for size in (75, 139, 299):  # its windows shrink with the image
        outputs, _ = jax.eval_shape(
            model.init_with_output, jax.random.key(0), _inputs((size, size, 3))
        )
        assert [output.shape for output in outputs] == [(5, 8), (5, 8)]


@pytest.mark.parametrize("name", PUBLISHED_NNX)
def test_nnx_parameter_count_is_the_published_one(name: str) -> None:
    make, count = PUBLISHED_NNX[name]
    model = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    assert _count(nnx.state(model, nnx.Param)) == count


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(AlexNetNNX, image_size=63, hidden=8),
        functools.partial(ResNetNNX, stage_sizes=(2, 1), width=8),
    ],
    ids=["alexnet", "resnet"],
)
def test_every_nnx_layer_computes_in_the_type_asked_for(make: Any) -> None:
    def logits(images: jax.Array) -> Any:
        return make(rngs=nnx.Rngs(0), dtype=jnp.bfloat16)(images, train=True)

    assert _types_of_products(logits, _inputs((63, 63, 3))) == {"bf16"}


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


@pytest.mark.parametrize("tiny", [TINY_RESNET18, TINY_RESNET50], ids=["resnet18", "resnet50"])
def test_linen_and_nnx_resnet_compute_the_same(tiny: Any) -> None:
    twin = ResNetNNX(
        rngs=nnx.Rngs(0),
        num_classes=tiny.num_classes,
        stage_sizes=tiny.stage_sizes,
        bottleneck=tiny.bottleneck,
        width=tiny.width,
    )
    images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    params, statistics = (
        nnx.to_pure_dict(nnx.state(twin, kind)) for kind in (nnx.Param, nnx.BatchStat)
    )
    variables = {"params": params, "batch_stats": statistics}
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(
        jnp.shape, _variables(tiny, (32, 32, 3))
    )

    # Evaluation after training, which leaves running statistics other than zeros and ones.
    @jax.jit
    def linen(variables: Any) -> Any:
        trained, changed = _train_step(tiny, variables, images)
        return trained, tiny.apply({**variables, **changed}, images)

    @nnx.jit
    def in_nnx(model: Any) -> Any:
        return model(images, train=True), model(images)

    for actual, expected in zip(in_nnx(twin), linen(variables), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
        assert np.ptp(expected) > 1e-2  # not a comparison of zeros


@pytest.mark.parametrize("model", [TINY_ALEXNET, TINY_VGG], ids=["alexnet", "vgg16"])
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
