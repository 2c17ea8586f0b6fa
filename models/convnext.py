"""ConvNeXt in Flax Linen."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7 convolution, layer normalization, two dense layers on every pixel.

    Attributes:
        layer_scale: What the block's channels are multiplied with at first, before the sum.
        drop_rate: Probability of dropping the block, of one image, in training.
        dtype: Type to compute in.
    """

    layer_scale: float
    drop_rate: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the sum of input and block, of the shape of the input."""
        channels = x.shape[-1]
        y: jax.Array = nn.Conv(
            channels,
            (7, 7),
            padding=3,
            feature_group_count=channels,
            dtype=self.dtype,
            name="depthwise",
        )(x)
        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(y)
        y = nn.Dense(4 * channels, dtype=self.dtype, name="expand")(y)
        y = nn.gelu(y, approximate=False)
        y = nn.Dense(channels, dtype=self.dtype, name="project")(y)
        scale = self.param("scale", nn.initializers.constant(self.layer_scale), (channels,))
        y = y * jnp.asarray(scale, y.dtype)
        # Stochastic depth: one decision for all of an image.
        drop = nn.Dropout(self.drop_rate, broadcast_dims=(1, 2, 3), deterministic=not train)
        y = drop(y)
        return x + y


class ConvNeXtTiny(nn.Module):
    """ConvNeXt-T: a convolutional network after the manner of vision transformers.

    28,589,128 parameters for 224x224x3 images and 1000 classes, as torchvision's
    `convnext_tiny`. Any image of 32x32 pixels or more will do.

    Source: Liu et al., "A ConvNet for the 2020s", CVPR 2022, table 9.

    Attributes:
        num_classes: Number of classes, the width of the last layer.
        stage_sizes: Number of blocks of each stage. From stage to stage channels double and the
            image size halves.
        width: Channels of the first stage.
        layer_scale: What every block's channels are multiplied with at first.
        drop_path_rate: Probability of dropping the last block; it grows from 0 at the first.
        dtype: Type to compute in; parameters stay float32.
    """

    num_classes: int = 1000
    stage_sizes: tuple[int, ...] = (3, 3, 9, 3)
    width: int = 96
    layer_scale: float = 1e-6
    drop_path_rate: float = 0.1
    dtype: Any = None
    input_shape: ClassVar[tuple[int, int, int]] = (224, 224, 3)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the logits [batch, num_classes] of images [batch, height, width, channels].

        With `train`, stochastic depth is on and needs the random-number stream "dropout".
        """

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name=name)

        def shrink(name: str, channels: int, window: int) -> nn.Conv:
            size = (window, window)
            return nn.Conv(
                channels, size, strides=window, padding="VALID", dtype=self.dtype, name=name
            )

        x = norm("norm1")(shrink("shrink1", self.width, 4)(x))
        last = max(1, sum(self.stage_sizes) - 1)
        before = 0
        for stage, size in enumerate(self.stage_sizes, start=1):
            if stage > 1:
                x = shrink(f"shrink{stage}", 2 * x.shape[-1], 2)(norm(f"norm{stage}")(x))
            for i in range(1, size + 1):
                rate = self.drop_path_rate * before / last
                block = ConvNeXtBlock(self.layer_scale, rate, self.dtype, name=f"block{stage}_{i}")
                x = block(x, train=train)
                before += 1
        x = norm("norm")(x.mean(axis=(1, 2)))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="fc")(x)
