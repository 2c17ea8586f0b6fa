"""LeNet-5 in Flax Linen."""

from typing import Any, ClassVar

import flax.linen as nn
import jax


class LeNet5(nn.Module):
    """LeNet-5 with ReLU and max pooling: two convolutions, three dense layers.

    61,706 parameters for 28x28x1 images and ten classes. Any image of 14x14 pixels or more will
    do: the first dense layer takes what the last pooling leaves.

    Source: LeCun et al., "Gradient-based learning applied to document recognition", Proc. IEEE
    1998, figure 2. It has tanh, trainable subsampling and a partly connected second convolution;
    here they are what later reimplementations put in their place, which is also why the count
    is not the paper's 60,000.

    Attributes:
        num_classes: Number of classes, the width of the last layer.
        dtype: Type to compute in; parameters stay float32.
    """

    num_classes: int = 10
    dtype: Any = None
    input_shape: ClassVar[tuple[int, int, int]] = (28, 28, 1)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the logits [batch, num_classes] of images [batch, height, width, channels].

        `train` changes nothing here: it is the argument that every model of this folder takes.
        """
        x = nn.relu(nn.Conv(6, (5, 5), padding="SAME", dtype=self.dtype, name="conv1")(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Conv(16, (5, 5), padding="VALID", dtype=self.dtype, name="conv2")(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(120, dtype=self.dtype, name="fc3")(x))
        x = nn.relu(nn.Dense(84, dtype=self.dtype, name="fc4")(x))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="fc5")(x)
