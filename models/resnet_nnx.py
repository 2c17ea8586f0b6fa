"""ResNet in Flax NNX: the network of `models.resnet`, layer for layer."""

from typing import Any, ClassVar

import jax
from flax import nnx


class ConvNormNNX(nnx.Module):
    """Convolution without bias, batch normalization (which has the bias), ReLU.

    Args:
        inputs: Number of input channels.
        channels: Number of output channels.
        window: Height and width of the convolution's window; half of it is padded on both sides.
        strides: Stride of height and width.
        relu: Whether a ReLU follows.
        dtype: Type to compute in.
        rngs: Random-number stream "params".
    """

    def __init__(
        self,
        inputs: int,
        channels: int,
        window: int,
        *,
        strides: int = 1,
        relu: bool = True,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.conv = nnx.Conv(
            inputs,
            channels,
            (window, window),
            strides=strides,
            padding=window // 2,
            use_bias=False,
            dtype=dtype,
            rngs=rngs,
        )
        self.norm = nnx.BatchNorm(channels, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.relu = relu

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the activations; with `train`, normalized by the batch's own statistics."""
        x = self.norm(self.conv(x), use_running_average=not train)
        return nnx.relu(x) if self.relu else x


class ResidualBlockNNX(nnx.Module):
    """Convolutions whose output is added to their input, see `models.resnet.ResidualBlock`.

    Args:
        inputs: Number of input channels.
        channels: Channels of the 3x3 convolutions.
        strides: 2 halves the image size.
        bottleneck: Whether one 3x3 convolution stands between two 1x1.
        dtype: Type to compute in.
        rngs: Random-number stream "params".
    """

    def __init__(
        self,
        inputs: int,
        channels: int,
        *,
        strides: int = 1,
        bottleneck: bool = True,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ) -> None:
        def conv(inputs: int, channels: int, window: int, **options: Any) -> ConvNormNNX:
            return ConvNormNNX(inputs, channels, window, dtype=dtype, rngs=rngs, **options)

        outputs = 4 * channels if bottleneck else channels
        if bottleneck:
            self.conv1 = conv(inputs, channels, 1)
            self.conv2 = conv(channels, channels, 3, strides=strides)
            self.conv3 = conv(channels, outputs, 1, relu=False)
        else:
            self.conv1 = conv(inputs, channels, 3, strides=strides)
            self.conv2 = conv(channels, channels, 3, relu=False)
        if strides > 1 or inputs != outputs:
            self.shortcut = conv(inputs, outputs, 1, strides=strides, relu=False)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the sum after its ReLU."""
        y = self.conv2(self.conv1(x, train=train), train=train)
        if hasattr(self, "conv3"):
            y = self.conv3(y, train=train)
        if hasattr(self, "shortcut"):
            x = self.shortcut(x, train=train)
        return nnx.relu(x + y)


class ResNetNNX(nnx.Module):
    """ResNet for images: one convolution, stages of residual blocks, one dense layer.

    ResNet-50 unless the arguments say otherwise. Parameters and batch statistics have the names
    and shapes of `models.resnet.ResNet`, so that either network runs with the other's, and the
    counts are its counts. Any image of 32x32 pixels or more will do.

    Source: He et al., "Deep residual learning for image recognition", CVPR 2016, table 1, with
    the strides of torchvision.

    Args:
        rngs: Random-number stream "params" for the initial values.
        num_classes: Number of classes, the width of the last layer.
        stage_sizes: Number of blocks of each stage.
        bottleneck: The kind of block, see `models.resnet.ResidualBlock`.
        width: Channels of the first convolution, and of the 3x3 convolutions of the first stage.
        dtype: Type to compute in; parameters stay float32.
    """

    input_shape: ClassVar[tuple[int, int, int]] = (224, 224, 3)

    def __init__(
        self,
        *,
        rngs: nnx.Rngs,
        num_classes: int = 1000,
        stage_sizes: tuple[int, ...] = (3, 4, 6, 3),
        bottleneck: bool = True,
        width: int = 64,
        dtype: Any = None,
    ) -> None:
        self.conv1 = ConvNormNNX(3, width, 7, strides=2, dtype=dtype, rngs=rngs)
        names = []
        inputs = width
        for stage, size in enumerate(stage_sizes, start=1):
            channels = width * 2 ** (stage - 1)
            for i in range(1, size + 1):
                block = ResidualBlockNNX(
                    inputs,
                    channels,
                    strides=2 if stage > 1 and i == 1 else 1,
                    bottleneck=bottleneck,
                    dtype=dtype,
                    rngs=rngs,
                )
                # Attributes, not a list: so the names are those of the Linen network.
                names.append(f"block{stage}_{i}")
                setattr(self, names[-1], block)
                inputs = 4 * channels if bottleneck else channels
        self.block_names = tuple(names)
        self.fc = nnx.Linear(inputs, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the logits [batch, num_classes] of images [batch, height, width, 3].

        With `train`, the batch statistics change.
        """
        x = self.conv1(x, train=train)
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for name in self.block_names:
            x = getattr(self, name)(x, train=train)
        return self.fc(x.mean(axis=(1, 2)))
