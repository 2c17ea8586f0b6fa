"""ResNet in Flax Linen."""

from typing import Any, ClassVar

import flax.linen as nn
import jax

from models._blocks import ConvNorm


class ResidualBlock(nn.Module):
    """Convolutions whose output is added to their input.

    Attributes:
        channels: Channels of the 3x3 convolutions.
        strides: 2 halves the image size.
        bottleneck: Whether one 3x3 convolution stands between two 1x1, the last with four times
            the channels; else there are two 3x3 convolutions.
        dtype: Type to compute in.
    """

    channels: int
    strides: int = 1
    bottleneck: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the sum after its ReLU."""

        def conv(name: str, channels: int, window: int, **options: Any) -> ConvNorm:
            return ConvNorm(channels, (window, window), dtype=self.dtype, name=name, **options)

        if self.bottleneck:  # the stride is on the 3x3, as in torchvision, not on the first 1x1
            channels = 4 * self.channels
            y = conv("conv1", self.channels, 1)(x, train=train)
            y = conv("conv2", self.channels, 3, strides=self.strides)(y, train=train)
            y = conv("conv3", channels, 1, activation=None)(y, train=train)
        else:
            channels = self.channels
            y = conv("conv1", channels, 3, strides=self.strides)(x, train=train)
            y = conv("conv2", channels, 3, activation=None)(y, train=train)
        if self.strides > 1 or x.shape[-1] != channels:
            shortcut = conv("shortcut", channels, 1, strides=self.strides, activation=None)
            x = shortcut(x, train=train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet for images: one convolution, stages of residual blocks, one dense layer.

    Any image of 32x32 pixels or more will do. The subclasses are the published depths.

    Source: He et al., "Deep residual learning for image recognition", CVPR 2016, table 1, with
    the strides of torchvision.

    Attributes:
        num_classes: Number of classes, the width of the last layer. None leaves pooling and last
            layer away: the output are the feature maps, 32 times smaller than the image with
            four stages.
        stage_sizes: Number of blocks of each stage. From stage to stage channels double and the
            image size halves.
        bottleneck: The kind of block, see `ResidualBlock`.
        width: Channels of the first convolution, and of the 3x3 convolutions of the first stage.
        dtype: Type to compute in; parameters stay float32.
    """

    num_classes: int | None = 1000
    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    bottleneck: bool = True
    width: int = 64
    dtype: Any = None
    input_shape: ClassVar[tuple[int, int, int]] = (224, 224, 3)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the logits [batch, num_classes] of images [batch, height, width, channels].

        With `train`, the collection "batch_stats" changes.
        """
        stem = ConvNorm(self.width, (7, 7), strides=2, dtype=self.dtype, name="conv1")
        x = stem(x, train=train)
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, size in enumerate(self.stage_sizes, start=1):
            for i in range(1, size + 1):
                block = ResidualBlock(
                    self.width * 2 ** (stage - 1),
                    strides=2 if stage > 1 and i == 1 else 1,
                    bottleneck=self.bottleneck,
                    dtype=self.dtype,
                    name=f"block{stage}_{i}",
                )
                x = block(x, train=train)
        if self.num_classes is None:
            return x
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="fc")(x)


class ResNet18(ResNet):
    """ResNet-18: 11,689,512 parameters for 224x224x3 images, as torchvision's `resnet18`."""

    stage_sizes: tuple[int, ...] = (2, 2, 2, 2)
    bottleneck: bool = False


class ResNet50(ResNet):
    """ResNet-50: 25,557,032 parameters for 224x224x3 images, as torchvision's `resnet50`."""


class ResNet101(ResNet):
    """ResNet-101: 44,549,160 parameters for 224x224x3 images, as torchvision's `resnet101`."""

    stage_sizes: tuple[int, ...] = (3, 4, 23, 3)
