"""DenseNet in Flax Linen."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp


class NormConv(nn.Module):
    """Batch normalization, ReLU, convolution without bias: DenseNet's order.

    Attributes:
        channels: Number of output channels.
        window: Height and width of the convolution's window.
        dtype: Type to compute in.
    """

    channels: int
    window: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the convolution's output, of the image size of `x`."""
        norm = nn.BatchNorm(not train, momentum=0.9, dtype=self.dtype, name="norm")
        return nn.Conv(
            self.channels,
            (self.window, self.window),
            padding=self.window // 2,
            use_bias=False,
            dtype=self.dtype,
            name="conv",
        )(nn.relu(norm(x)))


class DenseNet121(nn.Module):
    """DenseNet-121: in each of four dense blocks, every layer sees the outputs of all before it.

    7,978,856 parameters for 224x224x3 images and 1000 classes, as torchvision's `densenet121`.
    Any image of 32x32 pixels or more will do.

    Source: Huang et al., "Densely connected convolutional networks", CVPR 2017, table 1.

    Attributes:
        num_classes: Number of classes, the width of the last layer.
        stage_sizes: Number of layers of each dense block.
        growth_rate: Channels that every layer of a dense block adds.
        width: Channels after the first convolution.
        dtype: Type to compute in; parameters stay float32.
    """

    num_classes: int = 1000
    stage_sizes: tuple[int, ...] = (6, 12, 24, 16)
    growth_rate: int = 32
    width: int = 64
    dtype: Any = None
    input_shape: ClassVar[tuple[int, int, int]] = (224, 224, 3)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the logits [batch, num_classes] of images [batch, height, width, channels].

        With `train`, the collection "batch_stats" changes.
        """

        def norm(name: str) -> nn.BatchNorm:
            return nn.BatchNorm(not train, momentum=0.9, dtype=self.dtype, name=name)

        def layer(name: str, x: jax.Array, channels: int, window: int) -> jax.Array:
            return NormConv(channels, window, self.dtype, name=name)(x, train=train)

        x = nn.Conv(
            self.width,
            (7, 7),
            strides=2,
            padding=3,
            use_bias=False,
            dtype=self.dtype,
            name="conv0",
        )(x)
        x = nn.relu(norm("norm0")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for block, size in enumerate(self.stage_sizes, start=1):
            if block > 1:  # a transition halves channels and image size
                x = layer(f"transition{block - 1}", x, x.shape[-1] // 2, 1)
                x = nn.avg_pool(x, (2, 2), strides=(2, 2))
            for i in range(1, size + 1):
                new = layer(f"block{block}_{i}a", x, 4 * self.growth_rate, 1)
                new = layer(f"block{block}_{i}b", new, self.growth_rate, 3)
                x = jnp.concatenate([x, new], axis=-1)
        x = nn.relu(norm("norm5")(x))
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="fc")(x)
