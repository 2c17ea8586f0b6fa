"""Inception-v3 in Flax Linen."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from models._blocks import ConvNorm, scaled

# A convolution of a branch: output channels (before the width multiplier) and window.
Layer = tuple[int, tuple[int, int]]


class Branch(nn.Module):
    """Convolutions one after the other.

    All keep the image size, but with `strides` 2 the last one takes no padding and halves it.

    Attributes:
        layers: Output channels and window of each convolution.
        strides: Stride of the last one.
        width_multiplier: Scales all channels.
        dtype: Type to compute in.
    """

    layers: tuple[Layer, ...]
    strides: int = 1
    width_multiplier: float = 1.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the last convolution's output for the block's input or part of it."""
        for i, (channels, window) in enumerate(self.layers, start=1):
            shrinks = self.strides > 1 and i == len(self.layers)
            x = ConvNorm(
                scaled(channels, self.width_multiplier),
                window,
                strides=self.strides if shrinks else 1,
                padding="VALID" if shrinks else None,
                epsilon=1e-3,
                dtype=self.dtype,
                name=f"conv{i}",
            )(x, train=train)
        return x


class Mixed(nn.Module):
    """An inception block: branches side by side, their channels concatenated.

    Attributes:
        kind: One of torchvision's blocks "A" (35x35 pixels), "B" (halves the size), "C" (17x17),
            "D" (halves it) and "E" (8x8).
        channels: What varies from block to block of a kind: the channels after the average
            pooling (A), of the 7x7 convolutions taken apart (C).
        width_multiplier: Scales all channels.
        dtype: Type to compute in.
    """

    kind: str
    channels: int = 192
    width_multiplier: float = 1.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the branches' outputs, concatenated."""

        def branch(name: str, x: jax.Array, *layers: Layer, strides: int = 1) -> jax.Array:
            module = Branch(layers, strides, self.width_multiplier, self.dtype, name=name)
            return module(x, train=train)

        def fork(name: str, x: jax.Array) -> list[jax.Array]:
            return [
                branch(f"{name}_1x3", x, (384, (1, 3))),
                branch(f"{name}_3x1", x, (384, (3, 1))),
            ]

        one, three, c = (1, 1), (3, 3), self.channels
        if self.kind in "BD":  # the only blocks with max pooling halve the size
            pool = nn.max_pool(x, (3, 3), strides=(2, 2))
        else:
            pool = nn.avg_pool(x, (3, 3), padding=((1, 1), (1, 1)))
        if self.kind == "A":
            outputs = [
                branch("1x1", x, (64, one)),
                branch("5x5", x, (48, one), (64, (5, 5))),
                branch("3x3dbl", x, (64, one), (96, three), (96, three)),
                branch("pool", pool, (c, one)),
            ]
        elif self.kind == "B":
            outputs = [
                branch("3x3", x, (384, three), strides=2),
                branch("3x3dbl", x, (64, one), (96, three), (96, three), strides=2),
                pool,
            ]
        elif self.kind == "C":
            row, column = (1, 7), (7, 1)
            double = ((c, one), (c, column), (c, row), (c, column), (192, row))
            outputs = [
                branch("1x1", x, (192, one)),
                branch("7x7", x, (c, one), (c, row), (192, column)),
                branch("7x7dbl", x, *double),
                branch("pool", pool, (192, one)),
            ]
        elif self.kind == "D":
            seven = ((192, one), (192, (1, 7)), (192, (7, 1)), (192, three))
            outputs = [
                branch("3x3", x, (192, one), (320, three), strides=2),
                branch("7x7x3", x, *seven, strides=2),
                pool,
            ]
        else:
            outputs = [
                branch("1x1", x, (320, one)),
                *fork("3x3", branch("3x3", x, (384, one))),
                *fork("3x3dbl", branch("3x3dbl", x, (448, one), (384, three))),
                branch("pool", pool, (192, one)),
            ]
        return jnp.concatenate(outputs, axis=-1)


class AuxiliaryHead(nn.Module):
    """The classifier in the middle, whose loss (times 0.4 in the source) is added in training.

    Attributes:
        num_classes: Number of classes.
        width_multiplier: Scales all channels.
        dtype: Type to compute in.
    """

    num_classes: int
    width_multiplier: float = 1.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the logits [batch, num_classes] of the feature maps of the last block C."""

        def layer(name: str, x: jax.Array, channels: int, window: tuple[int, int]) -> jax.Array:
            module = ConvNorm(
                scaled(channels, self.width_multiplier),
                window,
                padding="VALID",
                epsilon=1e-3,
                dtype=self.dtype,
                name=name,
            )
            return module(x, train=train)

        # Both windows are 5x5 for 299 pixels; smaller images leave less to look at.
        x = nn.avg_pool(x, (min(5, x.shape[1]), min(5, x.shape[2])), strides=(3, 3))
        x = layer("conv0", x, 128, (1, 1))
        x = layer("conv1", x, 768, (min(5, x.shape[1]), min(5, x.shape[2])))
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="fc")(x)


class InceptionV3(nn.Module):
    """Inception-v3: convolutions, then eleven blocks of parallel branches, one dense layer.

    23,834,568 parameters for 299x299x3 images and 1000 classes, 27,161,264 with the auxiliary
    head, as torchvision's `inception_v3`. Any image of 75x75 pixels or more will do.

    Source: Szegedy et al., "Rethinking the inception architecture for computer vision", CVPR
    2016, table 1 and figures 5-7, 10, with the channels and paddings of torchvision.

    Attributes:
        num_classes: Number of classes, the width of the last layer.
        blocks: How many blocks A, C and E; B follows the As, D the Cs.
        width_multiplier: Scales all channels, rounded to multiples of 8.
        dropout_rate: Probability of dropping an input of the last layer.
        aux_logits: Whether to have the auxiliary head.
        dtype: Type to compute in; parameters stay float32.
    """

    num_classes: int = 1000
    blocks: tuple[int, int, int] = (3, 4, 2)
    width_multiplier: float = 1.0
    dropout_rate: float = 0.5
    aux_logits: bool = False
    dtype: Any = None
    input_shape: ClassVar[tuple[int, int, int]] = (299, 299, 3)

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Returns the logits [batch, num_classes] of images [batch, height, width, channels].

        With `aux_logits`, the logits and those of the auxiliary head. With `train`, dropout is on
        and needs the random-number stream "dropout", and the collection "batch_stats" changes.
        """

        def conv(name: str, channels: int, window: int, **options: Any) -> ConvNorm:
            channels = scaled(channels, self.width_multiplier)
            options |= {"epsilon": 1e-3, "dtype": self.dtype, "name": name}
            return ConvNorm(channels, (window, window), **options)

        def mixed(name: str, kind: str, channels: int = 192) -> Mixed:
            return Mixed(kind, channels, self.width_multiplier, self.dtype, name=name)

        a, c, e = self.blocks
        x = conv("conv1a", 32, 3, strides=2, padding="VALID")(x, train=train)
        x = conv("conv2a", 32, 3, padding="VALID")(x, train=train)
        x = conv("conv2b", 64, 3)(x, train=train)
        x = nn.max_pool(x, (3, 3), strides=(2, 2))
        x = conv("conv3b", 80, 1)(x, train=train)
        x = conv("conv4a", 192, 3, padding="VALID")(x, train=train)
        x = nn.max_pool(x, (3, 3), strides=(2, 2))
        for i in range(a):
            x = mixed(f"a{i + 1}", "A", 32 if i == 0 else 64)(x, train=train)
        x = mixed("b", "B")(x, train=train)
        for i in range(c):
            channels = 128 if i == 0 else 192 if i == c - 1 else 160
            x = mixed(f"c{i + 1}", "C", channels)(x, train=train)
        if self.aux_logits:
            head = AuxiliaryHead(self.num_classes, self.width_multiplier, self.dtype, name="aux")
            aux = head(x, train=train)
        x = mixed("d", "D")(x, train=train)
        for i in range(e):
            x = mixed(f"e{i + 1}", "E")(x, train=train)
        x = x.mean(axis=(1, 2))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        x = nn.Dense(self.num_classes, dtype=self.dtype, name="fc")(x)
        return (x, aux) if self.aux_logits else x
