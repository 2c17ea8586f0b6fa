"""Blocks that the networks of diffusion models share, in Flax Linen."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Conv(nn.Module):
    """Convolution that keeps the image size (or halves it), zeros around the image.

    Attributes:
        channels: Number of output channels.
        window: Height and width of the window, an odd number.
        strides: Stride in both dimensions.
        panorama: The image's left edge is beside its right one: it is padded with itself in
            width, and with zeros in height.
        dtype: Type to compute in.
    """

    channels: int
    window: int = 3
    strides: int = 1
    panorama: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns feature maps [batch, height, width, channels]."""
        half = self.window // 2
        columns = half
        if self.panorama and half:
            x = jnp.pad(x, ((0, 0), (0, 0), (half, half), (0, 0)), mode="wrap")
            columns = 0
        y: jax.Array = nn.Conv(
            self.channels,
            (self.window, self.window),
            strides=self.strides,
            padding=[(half, half), (columns, columns)],
            dtype=self.dtype,
            name="conv",
        )(x)
        return y


class ResidualBlock(nn.Module):
    """Group normalization, SiLU, 3x3 convolution, twice; the input is added.

    Attributes:
        channels: Number of output channels; where it differs from the input's, a 1x1 convolution
            of the input is added.
        groups: Of the normalizations.
        epsilon: Added to the variance.
        dropout_rate: Probability of dropping an input of the second convolution in training.
        panorama: See `Conv`.
        dtype: Type to compute in.
    """

    channels: int
    groups: int = 32
    epsilon: float = 1e-6
    dropout_rate: float = 0.0
    panorama: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(
        self, x: jax.Array, embedding: jax.Array | None = None, *, train: bool = False
    ) -> jax.Array:
        """Returns feature maps of the image size of `x`.

        Args:
            x: Feature maps [batch, height, width, channels].
            embedding: [batch, features], added to every pixel between the two convolutions, after
                SiLU and a dense layer.
            train: Dropout is on.
        """

        def norm(name: str) -> nn.GroupNorm:
            return nn.GroupNorm(self.groups, epsilon=self.epsilon, dtype=self.dtype, name=name)

        def conv(name: str, window: int = 3) -> Conv:
            return Conv(self.channels, window, 1, self.panorama, self.dtype, name=name)

        y = conv("conv1")(nn.silu(norm("norm1")(x)))
        if embedding is not None:
            shift = nn.Dense(self.channels, dtype=self.dtype, name="embedding")(nn.silu(embedding))
            y = y + shift[:, None, None, :]
        y = nn.silu(norm("norm2")(y))
        y = nn.Dropout(self.dropout_rate, deterministic=not train)(y)
        y = conv("conv2")(y)
        return y + (x if x.shape[-1] == self.channels else conv("shortcut", 1)(x))


class Attention(nn.Module):
    """Every token looks at all tokens, its own or those of a context.

    Attributes:
        heads: Number of heads, each with as many of the channels.
        use_bias: The dense layers of queries, keys and values have a bias; the last one always.
        dtype: Type to compute in.
    """

    heads: int = 1
    use_bias: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        """Returns tokens of the shape of `x`.

        Args:
            x: [batch, tokens, channels].
            context: [batch, other tokens, features]; `x` by default.
        """
        channels = x.shape[-1]
        context = x if context is None else context

        def heads_of(name: str, tokens: jax.Array) -> jax.Array:
            made = nn.Dense(channels, use_bias=self.use_bias, dtype=self.dtype, name=name)(tokens)
            return made.reshape(*made.shape[:2], self.heads, channels // self.heads)

        looked = nn.dot_product_attention(
            heads_of("query", x),
            heads_of("key", context),
            heads_of("value", context),
            dtype=self.dtype,
        )
        out: jax.Array = nn.Dense(channels, dtype=self.dtype, name="out")(looked.reshape(x.shape))
        return out


def on_pixels(tokens_to_tokens: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Applies a function of tokens [batch, tokens, channels] to the pixels of feature maps."""
    batch, height, width, channels = x.shape
    return tokens_to_tokens(x.reshape(batch, height * width, channels)).reshape(x.shape)


def doubled(x: jax.Array) -> jax.Array:
    """Returns feature maps of twice the height and width: every pixel four times."""
    batch, height, width, channels = x.shape
    out: jax.Array = jax.image.resize(x, (batch, 2 * height, 2 * width, channels), "nearest")
    return out
