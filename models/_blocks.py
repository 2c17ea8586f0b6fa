"""Blocks that several networks share, in Flax Linen."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax


def scaled(channels: float, multiplier: float = 1.0) -> int:
    """Returns `channels * multiplier` rounded to a multiple of 8, at least 8.

    Published networks keep their channels: all that are scaled here are multiples of 8 already.
    """
    return max(8, 8 * round(channels * multiplier / 8))


class ConvNorm(nn.Module):
    """Convolution without bias, batch normalization (which has the bias), activation.

    Attributes:
        channels: Number of output channels.
        window: Size of the convolution's window, one number for each spatial dimension.
        strides: Stride in every spatial dimension.
        padding: As `flax.linen.Conv` takes it; None pads by half the window on both sides, as
            torchvision's networks do.
        groups: Number of groups of channels that do not see each other.
        activation: What follows the normalization, or None.
        epsilon: Added to the variance.
        dtype: Type to compute in; parameters stay float32.
    """

    channels: int
    window: tuple[int, ...] = (3, 3)
    strides: int = 1
    padding: int | str | Sequence[tuple[int, int]] | None = None
    groups: int = 1
    activation: Callable[[jax.Array], jax.Array] | None = nn.relu
    epsilon: float = 1e-5
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the activations; with `train`, normalized by the batch's own statistics."""
        padding = self.padding
        if padding is None:
            padding = [(size // 2, size // 2) for size in self.window]
        x = nn.Conv(
            self.channels,
            self.window,
            strides=self.strides,
            padding=padding,
            feature_group_count=self.groups,
            use_bias=False,
            dtype=self.dtype,
            name="conv",
        )(x)
        x = nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,  # the share that stays; torch's momentum of 0.1 is what is added
            epsilon=self.epsilon,
            dtype=self.dtype,
            name="norm",
        )(x)
        return x if self.activation is None else self.activation(x)
