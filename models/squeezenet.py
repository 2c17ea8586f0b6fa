"""SqueezeNet in Flax Linen."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp


class Fire(nn.Module):
    """1x1 convolution to few channels, then 1x1 and 3x3 side by side, concatenated.

    Attributes:
        squeeze: Channels of the first; the others have four times as many each.
        dtype: Type to compute in.
    """

    squeeze: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns feature maps with `8 * squeeze` channels."""
        expand = 4 * self.squeeze
        x = nn.relu(nn.Conv(self.squeeze, (1, 1), dtype=self.dtype, name="squeeze")(x))
        one = nn.relu(nn.Conv(expand, (1, 1), dtype=self.dtype, name="expand1x1")(x))
        three = nn.Conv(expand, (3, 3), padding=1, dtype=self.dtype, name="expand3x3")(x)
        return jnp.concatenate([one, nn.relu(three)], axis=-1)


class SqueezeNet(nn.Module):
    """SqueezeNet 1.0: eight fire modules; the last layer is a convolution, too.

    1,248,424 parameters for 224x224x3 images and 1000 classes, as torchvision's `squeezenet1_0`.
    Any image of 21x21 pixels or more will do.

    Source: Iandola et al., "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and
    <0.5MB model size", arXiv:1602.07360, table 1.

    Attributes:
        num_classes: Number of classes, the channels of the last convolution.
        stages: The channels that each fire module of a stage squeezes to. Every stage starts
            with a max pooling.
        width: Channels of the first convolution.
        window: Height and width of the first convolution's window.
        dropout_rate: Probability of dropping an input of the last convolution.
        dtype: Type to compute in; parameters stay float32.
    """

    num_classes: int = 1000
    stages: tuple[tuple[int, ...], ...] = ((16, 16, 32), (32, 48, 48, 64), (64,))
    width: int = 96
    window: int = 7
    dropout_rate: float = 0.5
    dtype: Any = None
    input_shape: ClassVar[tuple[int, int, int]] = (224, 224, 3)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the logits [batch, num_classes] of images [batch, height, width, channels].

        With `train`, dropout is on and needs the random-number stream "dropout".
        """
        x = nn.Conv(
            self.width,
            (self.window, self.window),
            strides=2,
            padding="VALID",
            dtype=self.dtype,
            name="stem",
        )(x)
        x = nn.relu(x)
        for stage, squeezes in enumerate(self.stages, start=1):
            # The last row or column of an even size gets a window of its own (ceil_mode).
            padding = [(0, 1 - size % 2) for size in x.shape[1:3]]
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=padding)
            for i, squeeze in enumerate(squeezes, start=1):
                x = Fire(squeeze, self.dtype, name=f"fire{stage}_{i}")(x)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        x = nn.Conv(self.num_classes, (1, 1), dtype=self.dtype, name="classes")(x)
        return nn.relu(x).mean(axis=(1, 2))


class SqueezeNet11(SqueezeNet):
    """SqueezeNet 1.1: pools earlier, for 2.4 times less work.

    1,235,496 parameters for 224x224x3 images and 1000 classes, as torchvision's `squeezenet1_1`.
    Any image of 17x17 pixels or more will do.

    Source: Iandola et al., https://github.com/forresti/SqueezeNet (SqueezeNet_v1.1).
    """

    stages: tuple[tuple[int, ...], ...] = ((16, 16), (32, 32), (48, 48, 64, 64))
    width: int = 64
    window: int = 3
