"""EfficientNet in Flax Linen."""

from typing import Any, ClassVar

import flax.linen as nn
import jax

from models._blocks import ConvNorm, scaled

# Expansion, window, output channels, number of blocks, stride of the first: table 1 of the source.
_STAGES = (
    (1, 3, 16, 1, 1),
    (6, 3, 24, 2, 2),
    (6, 5, 40, 2, 2),
    (6, 3, 80, 3, 2),
    (6, 5, 112, 3, 1),
    (6, 5, 192, 4, 2),
    (6, 3, 320, 1, 1),
)


class MBConv(nn.Module):
    """Inverted residual block with squeeze-and-excite.

    Attributes:
        channels: Number of output channels.
        expansion: How many times the input's channels the middle has; 1 leaves out the first 1x1.
        window: Height and width of the depthwise convolution's window.
        strides: 2 halves the image size.
        drop_rate: Probability of dropping the block, of one image, in training.
        dtype: Type to compute in.
    """

    channels: int
    expansion: int
    window: int
    strides: int = 1
    drop_rate: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the output, without the sum where its shape is another than the input's."""

        def conv(name: str, channels: int, window: int, **options: Any) -> ConvNorm:
            return ConvNorm(channels, (window, window), dtype=self.dtype, name=name, **options)

        hidden = self.expansion * x.shape[-1]
        y: jax.Array = x
        if self.expansion > 1:
            y = conv("expand", hidden, 1, activation=nn.silu)(y, train=train)
        depthwise = conv(
            "depthwise",
            hidden,
            self.window,
            strides=self.strides,
            groups=hidden,
            activation=nn.silu,
        )
        y = depthwise(y, train=train)
        # Squeeze and excite: the mean of every channel decides how much of each goes on.
        squeezed = nn.Dense(max(1, x.shape[-1] // 4), dtype=self.dtype, name="squeeze")
        excited = nn.Dense(hidden, dtype=self.dtype, name="excite")
        gate = nn.sigmoid(excited(nn.silu(squeezed(y.mean(axis=(1, 2))))))
        y = y * gate[:, None, None, :]
        y = conv("project", self.channels, 1, activation=None)(y, train=train)
        if self.strides > 1 or x.shape[-1] != self.channels:
            return y
        # Stochastic depth: one decision for all of an image.
        drop = nn.Dropout(self.drop_rate, broadcast_dims=(1, 2, 3), deterministic=not train)
        y = drop(y)
        return x + y


class EfficientNetB0(nn.Module):
    """EfficientNet-B0: sixteen inverted residual blocks with squeeze-and-excite.

    5,288,548 parameters for 224x224x3 images and 1000 classes, as torchvision's
    `efficientnet_b0`. Any image size will do.

    Source: Tan and Le, "EfficientNet: rethinking model scaling for convolutional neural
    networks", ICML 2019, table 1, with the paddings of torchvision.

    Attributes:
        num_classes: Number of classes, the width of the last layer.
        stages: Expansion, window, output channels, number of blocks and stride of each stage.
        width_multiplier: Scales all channels, rounded to multiples of 8.
        dropout_rate: Probability of dropping an input of the last layer.
        drop_path_rate: Probability of dropping a block, growing from 0 towards this one.
        dtype: Type to compute in; parameters stay float32.
    """

    num_classes: int = 1000
    stages: tuple[tuple[int, int, int, int, int], ...] = _STAGES
    width_multiplier: float = 1.0
    dropout_rate: float = 0.2
    drop_path_rate: float = 0.2
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
                activation=nn.silu,
                dtype=self.dtype,
                name=name,
            )

        blocks = sum(size for _, _, _, size, _ in self.stages)
        before = 0
        x = conv("stem", 32, 3, 2)(x, train=train)
        for stage, (expansion, window, channels, size, strides) in enumerate(self.stages, start=1):
            for i in range(1, size + 1):
                block = MBConv(
                    scaled(channels, self.width_multiplier),
                    expansion,
                    window,
                    strides=strides if i == 1 else 1,
                    drop_rate=self.drop_path_rate * before / blocks,
                    dtype=self.dtype,
                    name=f"block{stage}_{i}",
                )
                x = block(x, train=train)
                before += 1
        x = conv("head", 1280, 1, 1)(x, train=train)
        x = x.mean(axis=(1, 2))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="fc")(x)
