"""AlexNet in Flax Linen."""

from typing import Any, ClassVar

import flax.linen as nn
import jax


class AlexNet(nn.Module):
    """AlexNet, one tower: five convolutions, three dense layers.

    61,100,840 parameters for 224x224x3 images and 1000 classes, as torchvision's `alexnet`. Any
    image of 63x63 pixels or more will do: the first dense layer takes what the last pooling
    leaves (6x6x256 at 224 pixels).

    Source: Krizhevsky, "One weird trick for parallelizing convolutional neural networks",
    arXiv:1404.5997, with the widths 64-192-384-256-256 of torchvision's reimplementation.

    Attributes:
        num_classes: Number of classes, the width of the last layer.
        dropout_rate: Probability of dropping an input of each of the first two dense layers.
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
        x = nn.relu(nn.Conv(64, (11, 11), strides=4, padding=2, dtype=self.dtype, name="conv1")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2))
        x = nn.relu(nn.Conv(192, (5, 5), padding=2, dtype=self.dtype, name="conv2")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2))
        x = nn.relu(nn.Conv(384, (3, 3), padding=1, dtype=self.dtype, name="conv3")(x))
        x = nn.relu(nn.Conv(256, (3, 3), padding=1, dtype=self.dtype, name="conv4")(x))
        x = nn.relu(nn.Conv(256, (3, 3), padding=1, dtype=self.dtype, name="conv5")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        x = nn.relu(nn.Dense(self.hidden, dtype=self.dtype, name="fc6")(x))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        x = nn.relu(nn.Dense(self.hidden, dtype=self.dtype, name="fc7")(x))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="fc8")(x)
