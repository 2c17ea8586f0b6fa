"""MobileNetV2 in Flax Linen."""

from typing import Any, ClassVar

import flax.linen as nn
import jax

from models._blocks import ConvNorm, scaled

# Expansion, output channels, number of blocks, stride of the first: table 2 of the source.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """1x1 convolution to more channels, depthwise 3x3, linear 1x1 to few; added to the input.

    Attributes:
        channels: Number of output channels.
        expansion: How many times the input's channels the middle has; 1 leaves out the first 1x1.
        strides: 2 halves the image size.
        dtype: Type to compute in.
    """

    channels: int
    expansion: int
    strides: int = 1
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the output, without the sum where its shape is another than the input's."""
        hidden = self.expansion * x.shape[-1]
        y = x
        if self.expansion > 1:
            expand = ConvNorm(hidden, (1, 1), activation=nn.relu6, dtype=self.dtype, name="expand")
            y = expand(y, train=train)
        y = ConvNorm(
            hidden,
            strides=self.strides,
            groups=hidden,
            activation=nn.relu6,
            dtype=self.dtype,
            name="depthwise",
        )(y, train=train)
        project = ConvNorm(self.channels, (1, 1), activation=None, dtype=self.dtype, name="project")
        y = project(y, train=train)
        return x + y if self.strides == 1 and x.shape[-1] == self.channels else y


class MobileNetV2(nn.Module):
    """MobileNetV2: seventeen inverted residual blocks with depthwise convolutions.

    3,504,872 parameters for 224x224x3 images and 1000 classes, as torchvision's `mobilenet_v2`.
    Any image size will do.

    Source: Sandler et al., "MobileNetV2: inverted residuals and linear bottlenecks", CVPR 2018,
    table 2.

    Attributes:
        num_classes: Number of classes, the width of the last layer.
        stages: Expansion, output channels, number of blocks and stride of each stage.
        width_multiplier: Scales all channels, rounded to multiples of 8.
        dropout_rate: Probability of dropping an input of the last layer.
        dtype: Type to compute in; parameters stay float32.
    """

    num_classes: int = 1000
    stages: tuple[tuple[int, int, int, int], ...] = _STAGES
    width_multiplier: float = 1.0
    dropout_rate: float = 0.2
    dtype: Any = None
    input_shape: ClassVar[tuple[int, int, int]] = (224, 224, 3)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the logits [batch, num_classes] of images [batch, height, width, channels].

        With `train`, dropout is on and needs the random-number stream "dropout", and the
        collection "batch_stats" changes.
        """

        def conv(name: str, channels: int, window: int, strides: int) -> ConvNorm:
            return ConvNorm(
                scaled(channels, self.width_multiplier),
                (window, window),
                strides=strides,
                activation=nn.relu6,
                dtype=self.dtype,
                name=name,
            )

        x = conv("stem", 32, 3, 2)(x, train=train)
        for stage, (expansion, channels, size, strides) in enumerate(self.stages, start=1):
            for i in range(1, size + 1):
                block = InvertedResidual(
                    scaled(channels, self.width_multiplier),
                    expansion,
                    strides=strides if i == 1 else 1,
                    dtype=self.dtype,
                    name=f"block{stage}_{i}",
                )
                x = block(x, train=train)
        x = conv("head", 1280, 1, 1)(x, train=train)
        x = x.mean(axis=(1, 2))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="fc")(x)
