"""3-D U-Net in Flax Linen."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from models._blocks import ConvNorm


class UNet3D(nn.Module):
    """3-D U-Net: the U-Net on volumes, with batch normalization.

    19,072,291 parameters for three input channels and three classes. The paper says 19,069,955,
    which is exactly what is left without the 2,336 scales of the normalizations.

    Source: Çiçek et al., "3D U-Net: learning dense volumetric segmentation from sparse
    annotation", MICCAI 2016, figure 2. Its convolutions have no padding, so that 132x132x116
    voxels give 44x44x28 labels; here they are padded and the labels have the size of the volume.

    Attributes:
        num_classes: Number of classes that a voxel can have.
        depth: Number of poolings.
        width: Channels of the first convolution. Each level's second convolution doubles them,
            ahead of the pooling.
        dtype: Type to compute in; parameters stay float32.
    """

    num_classes: int = 3
    depth: int = 3
    width: int = 32
    dtype: Any = None
    input_shape: ClassVar[tuple[int, int, int, int]] = (128, 128, 112, 3)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the logits [batch, height, width, length, num_classes] of the voxels.

        All three sizes of the volumes [batch, height, width, length, channels] are multiples of
        2**depth. With `train`, the collection "batch_stats" changes.

        Raises:
            ValueError: If a size is no multiple of 2**depth.
        """
        if any(size % 2**self.depth for size in x.shape[1:4]):
            raise ValueError(f"volume of {x.shape[1:4]} voxels: take multiples of {2**self.depth}")

        def convs(name: str, x: jax.Array, *channels: int) -> jax.Array:
            for i, c in enumerate(channels, start=1):
                conv = ConvNorm(c, (3, 3, 3), dtype=self.dtype, name=f"{name}_conv{i}")
                x = conv(x, train=train)
            return x

        skips = []
        for level in range(self.depth + 1):
            channels = self.width * 2**level
            x = convs(f"down{level}", x, channels, 2 * channels)
            if level < self.depth:
                skips.append(x)
                x = nn.max_pool(x, (2, 2, 2), strides=(2, 2, 2))
        for level in reversed(range(self.depth)):
            x = nn.ConvTranspose(
                x.shape[-1],  # unlike the 2-D U-Net's, it keeps the channels
                (2, 2, 2),
                strides=(2, 2, 2),
                use_bias=False,
                dtype=self.dtype,
                name=f"up{level}",
            )(x)
            x = jnp.concatenate([skips[level], x], axis=-1)
            channels = 2 * self.width * 2**level
            x = convs(f"up{level}", x, channels, channels)
        return nn.Conv(self.num_classes, (1, 1, 1), dtype=self.dtype, name="labels")(x)
