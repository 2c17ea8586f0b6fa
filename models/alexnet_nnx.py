"""AlexNet in Flax NNX: the network of `models.alexnet`, layer for layer."""

from typing import Any, ClassVar

import jax
from flax import nnx


def _pooled_size(image_size: int) -> int:
    """Returns the height (and width) in pixels that AlexNet's last pooling leaves."""
    size = (image_size + 2 * 2 - 11) // 4 + 1  # conv1; the other convolutions keep the size
    for _ in range(3):
        size = (size - 3) // 2 + 1
    return size


class AlexNetNNX(nnx.Module):
    """AlexNet, one tower: five convolutions, three dense layers.

    Its parameters have the names and shapes of `models.alexnet.AlexNet`, so that either network
    runs with the other's.

    Source: Krizhevsky, "One weird trick for parallelizing convolutional neural networks",
    arXiv:1404.5997, with the widths 64-192-384-256-256 of torchvision's reimplementation.

    Args:
        rngs: Random-number streams: "params" for the initial values, "dropout" for training.
        image_size: Height and width of the images in pixels, 63 or more. NNX makes all
            parameters at construction, and the first dense layer's depend on it.
        num_classes: Number of classes, the width of the last layer.
        dropout_rate: Probability of dropping an input of each of the first two dense layers.
        hidden: Width of the first two dense layers.
        dtype: Type to compute in; parameters stay float32.

    Raises:
        ValueError: If `image_size` leaves nothing after the last pooling.
    """

    input_shape: ClassVar[tuple[int, int, int]] = (224, 224, 3)

    def __init__(
        self,
        *,
        rngs: nnx.Rngs,
        image_size: int = 224,
        num_classes: int = 1000,
        dropout_rate: float = 0.5,
        hidden: int = 4096,
        dtype: Any = None,
    ) -> None:
        pooled = _pooled_size(image_size)
        if pooled < 1:
            raise ValueError(f"image_size={image_size} is too small for AlexNet: take 63 or more")
        self.conv1 = nnx.Conv(3, 64, (11, 11), strides=4, padding=2, dtype=dtype, rngs=rngs)
        self.conv2 = nnx.Conv(64, 192, (5, 5), padding=2, dtype=dtype, rngs=rngs)
        self.conv3 = nnx.Conv(192, 384, (3, 3), padding=1, dtype=dtype, rngs=rngs)
        self.conv4 = nnx.Conv(384, 256, (3, 3), padding=1, dtype=dtype, rngs=rngs)
        self.conv5 = nnx.Conv(256, 256, (3, 3), padding=1, dtype=dtype, rngs=rngs)
        self.dropout6 = nnx.Dropout(dropout_rate, rngs=rngs)
        self.fc6 = nnx.Linear(256 * pooled**2, hidden, dtype=dtype, rngs=rngs)
        self.dropout7 = nnx.Dropout(dropout_rate, rngs=rngs)
        self.fc7 = nnx.Linear(hidden, hidden, dtype=dtype, rngs=rngs)
        self.fc8 = nnx.Linear(hidden, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the logits [batch, num_classes] of images [batch, height, width, 3].

        With `train`, dropout is on.
        """
        x = nnx.relu(self.conv1(x))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2))
        x = nnx.relu(self.conv2(x))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2))
        x = nnx.relu(self.conv3(x))
        x = nnx.relu(self.conv4(x))
        x = nnx.relu(self.conv5(x))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        x = self.dropout6(x, deterministic=not train)
        x = nnx.relu(self.fc6(x))
        x = self.dropout7(x, deterministic=not train)
        x = nnx.relu(self.fc7(x))
        return self.fc8(x)
