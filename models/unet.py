"""U-Net in Flax Linen."""

from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp


class UNet(nn.Module):
    """U-Net: a path down with poolings, a path up that also reads what each level left behind.

    31,030,658 parameters for one input channel and two classes, whatever the image size and the
    kind of upsampling. The paper gives no count: this is figure 1, layer by layer.

    Source: Ronneberger, Fischer and Brox, "U-Net: convolutional networks for biomedical image
    segmentation", MICCAI 2015, figure 1. Its convolutions have no padding, so that 572x572 pixels
    give 388x388 labels and skips are cropped; here they are padded, as in most later
    implementations, and the labels have the size of the image (512x512 are its data set's).

    Attributes:
        num_classes: Number of classes that a pixel can have.
        depth: Number of poolings.
        width: Channels of the first level; each pooling doubles them.
        upsample: "transpose" upsamples by a transposed convolution, "bilinear" by interpolation
            and a 2x2 convolution. The paper's text fits both, its published network has the
            first.
        dropout_rate: Probability of dropping an output of the two lowest levels of the path down.
        dtype: Type to compute in; parameters stay float32.
    """

    num_classes: int = 2
    depth: int = 4
    width: int = 64
    upsample: Literal["transpose", "bilinear"] = "transpose"
    dropout_rate: float = 0.5
    dtype: Any = None
    input_shape: ClassVar[tuple[int, int, int]] = (512, 512, 1)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the logits [batch, height, width, num_classes] of the pixels of images.

        Height and width of the images [batch, height, width, channels] are multiples of
        2**depth. With `train`, dropout is on and needs the random-number stream "dropout".

        Raises:
            ValueError: If height or width is no multiple of 2**depth.
        """
        if any(size % 2**self.depth for size in x.shape[1:3]):
            raise ValueError(f"image of {x.shape[1:3]} pixels: take multiples of {2**self.depth}")

        def two_convs(name: str, x: jax.Array, level: int) -> jax.Array:
            for i in (1, 2):
                channels = self.width * 2**level
                conv = nn.Conv(
                    channels, (3, 3), padding=1, dtype=self.dtype, name=f"{name}{level}_conv{i}"
                )
                x = nn.relu(conv(x))
            return x

        skips = []
        for level in range(self.depth + 1):
            x = two_convs("down", x, level)
            if level >= self.depth - 1:
                x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
            if level < self.depth:
                skips.append(x)
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
        for level in reversed(range(self.depth)):
            x = self._upsampled(x, self.width * 2**level, name=f"up{level}")
            x = jnp.concatenate([skips[level], x], axis=-1)
            x = two_convs("up", x, level)
        return nn.Conv(self.num_classes, (1, 1), dtype=self.dtype, name="labels")(x)

    def _upsampled(self, x: jax.Array, channels: int, name: str) -> jax.Array:
        """Returns feature maps of twice the height and width, with ReLU as in the source."""
        if self.upsample == "transpose":
            up = nn.ConvTranspose(channels, (2, 2), strides=(2, 2), dtype=self.dtype, name=name)
            return nn.relu(up(x))
        batch, height, width, depth = x.shape
        x = jax.image.resize(x, (batch, 2 * height, 2 * width, depth), "bilinear")
        return nn.relu(nn.Conv(channels, (2, 2), dtype=self.dtype, name=name)(x))
