"""VGG-16 in Flax Linen."""

from typing import Any, ClassVar

import flax.linen as nn
import jax

# Output channels of the 3x3 convolutions; each group ends in a 2x2 max pooling.
_CHANNELS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """VGG-16: thirteen 3x3 convolutions, three dense layers.

    138,357,544 parameters for 224x224x3 images and 1000 classes. Any image of 32x32 pixels or
    more will do: the first dense layer takes what the last pooling leaves (7x7x512 at 224 pixels).

    Source: Simonyan and Zisserman, "Very deep convolutional networks for large-scale image
    recognition", ICLR 2015, table 1, configuration D; dropout as in its section 3.1.

    Attributes:
        num_classes: Number of classes, the width of the last layer.
        dropout_rate: Probability of dropping an output of each of the first two dense layers.
        hidden: Width of the first two dense layers.
        dtype: Type to compute in; parameters stay float32.
    """

    num_classes: int = 1000
    dropout_rate: float = 0.5
    hidden: int = 4096
    dtype: Any = None
    input_shape: ClassVar[tuple[int, int, int]] = (224, 224, 3)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the logits [batch, num_classes] of images [batch, height, width, channels].

        With `train`, dropout is on and needs the random-number stream "dropout".
        """
        for group, widths in enumerate(_CHANNELS, start=1):
            for i, channels in enumerate(widths, start=1):
                name = f"conv{group}_{i}"
                conv = nn.Conv(channels, (3, 3), padding=1, dtype=self.dtype, name=name)
                x = nn.relu(conv(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        for name in ("fc6", "fc7"):
            x = nn.relu(nn.Dense(self.hidden, dtype=self.dtype, name=name)(x))
            x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="fc8")(x)
