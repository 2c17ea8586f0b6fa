"""The denoising U-Net of diffusion models in Flax Linen."""

import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from models._diffusion import Attention, Conv, ResidualBlock, doubled, on_pixels


def timestep_embedding(timesteps: jax.Array, features: int) -> jax.Array:
    """Returns cosines and sines [batch, features] of timesteps [batch], a number to 10,000.

    Source: Ho, Jain and Abbeel, "Denoising diffusion probabilistic models", NeurIPS 2020, after
    the positions of Vaswani et al., 2017; cosines first, as in Stable Diffusion.
    """
    half = features // 2
    angles = timesteps[:, None] * jnp.exp(-math.log(10_000) * jnp.arange(half) / half)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Transformer(nn.Module):
    """Self-attention, attention to the text if there is one, and a gated network of each pixel.

    Attributes:
        heads: Number of heads of the attentions.
        groups: Of the normalization before it.
        dtype: Type to compute in.
    """

    heads: int
    groups: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, text: jax.Array | None) -> jax.Array:
        """Returns feature maps of the shape of `x`.

        Args:
            x: [batch, height, width, channels].
            text: [batch, words, features], or None.
        """
        channels = x.shape[-1]

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=name)

        def attention(name: str) -> Attention:
            return Attention(self.heads, use_bias=False, dtype=self.dtype, name=name)

        def dense(name: str, features: int = channels) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, name=name)

        def block(tokens: jax.Array) -> jax.Array:
            tokens = tokens + attention("attention")(norm("norm1")(tokens))
            if text is not None:
                tokens = tokens + attention("text_attention")(norm("norm2")(tokens), text)
            y = norm("norm3")(tokens)
            # The source has one dense layer for both: the same numbers, without cutting it in two.
            gate = nn.gelu(dense("gate", 4 * channels)(y), approximate=False)
            tokens = tokens + dense("project")(dense("expand", 4 * channels)(y) * gate)
            return tokens

        y = nn.GroupNorm(self.groups, epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        return x + dense("out")(on_pixels(block, dense("in")(y)))


class DenoisingUNet(nn.Module):
    """Stable Diffusion's U-Net: predicts the noise in latents, for a timestep and a condition.

    859,520,964 parameters with text, as `UNet2DConditionModel` of diffusers for Stable Diffusion
    1.x. Latents of 64x64 stand for images of 512x512 pixels.

    Source: Rombach et al., "High-resolution image synthesis with latent diffusion models", CVPR
    2022, and its code (`ldm/modules/diffusionmodules/openaimodel.py`, with the settings of
    `stable-diffusion/v1-inference.yaml`). Classes are added to the timestep's embedding, as in
    Dhariwal and Nichol, "Diffusion models beat GANs on image synthesis", NeurIPS 2021.

    Attributes:
        channels: Of the levels, the largest images first; each level but the last halves them.
        attends: Which levels have attention; the lowest point of the network always has.
        blocks: Residual blocks of each level on the way down; on the way up there is one more.
        heads: Number of heads of the attentions.
        num_classes: Number of classes of a class condition; None for text.
        words, features: Shape of a text: how many vectors of how many numbers.
        dropout_rate: Probability of dropping an input of a residual block's second convolution.
        groups: Of the normalizations; they divide the channels of all levels.
        panorama: The image's left edge is beside its right one: convolutions pad it with itself in
            width.
        dtype: Type to compute in; parameters stay float32.
    """

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attends: tuple[bool, ...] = (True, True, True, False)
    blocks: int = 2
    heads: int = 8
    num_classes: int | None = None
    words: int = 77
    features: int = 768
    dropout_rate: float = 0.0
    groups: int = 32
    panorama: bool = False
    dtype: Any = None
    input_shape: ClassVar[tuple[int, int, int]] = (64, 64, 4)

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        timesteps: jax.Array | None = None,
        condition: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Returns the noise in the latents, of their shape.

        With `train`, dropout is on and needs the random-number stream "dropout", if there is any.

        Args:
            x: Latents [batch, height, width, channels]; height and width are multiples of
                2**(levels - 1).
            timesteps: [batch]; 0 by default.
            condition: Texts [batch, words, features], or classes [batch] as integers; zeros by
                default.
            train: See above.

        Raises:
            ValueError: If height or width is no such multiple.
        """
        multiple = 2 ** (len(self.channels) - 1)
        if any(size % multiple for size in x.shape[1:3]):
            raise ValueError(f"latents of {x.shape[1:3]} pixels: take multiples of {multiple}")
        text, embedding = self._conditions(x, timesteps, condition)

        def block(name: str, channels: int, x: jax.Array, attends: bool) -> jax.Array:
            residual = ResidualBlock(
                channels,
                self.groups,
                epsilon=1e-5,
                dropout_rate=self.dropout_rate,
                panorama=self.panorama,
                dtype=self.dtype,
                name=name,
            )
            x = residual(x, embedding, train=train)
            transformer = Transformer(self.heads, self.groups, self.dtype, name=f"{name}_attention")
            return transformer(x, text) if attends else x

        def conv(name: str, channels: int, strides: int = 1) -> Conv:
            return Conv(channels, 3, strides, self.panorama, self.dtype, name=name)

        out_channels = x.shape[-1]
        x = conv("stem", self.channels[0])(x)
        skips = [x]
        levels = list(enumerate(zip(self.channels, self.attends, strict=True)))
        for level, (channels, attends) in levels:
            for i in range(1, self.blocks + 1):
                x = block(f"down{level}_{i}", channels, x, attends)
                skips.append(x)
            if level < len(levels) - 1:
                x = conv(f"down{level}_conv", channels, strides=2)(x)
                skips.append(x)
        x = block("middle1", self.channels[-1], x, attends=True)
        x = block("middle2", self.channels[-1], x, attends=False)
        for level, (channels, attends) in reversed(levels):
            for i in range(1, self.blocks + 2):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = block(f"up{level}_{i}", channels, x, attends)
            if level:
                x = conv(f"up{level}_conv", channels)(doubled(x))
        x = nn.GroupNorm(self.groups, epsilon=1e-5, dtype=self.dtype, name="norm")(x)
        return conv("noise", out_channels)(nn.silu(x))

    @nn.nowrap
    def _conditions(
        self, x: jax.Array, timesteps: jax.Array | None, condition: jax.Array | None
    ) -> tuple[jax.Array | None, jax.Array]:
        """The text, if there is one, and the embedding of the timestep and the class."""
        batch, width = len(x), self.channels[0]
        timesteps = jnp.zeros(batch, x.dtype) if timesteps is None else timesteps
        waves = timestep_embedding(timesteps.astype(x.dtype), width).astype(x.dtype)
        embedding = nn.Dense(4 * width, dtype=self.dtype, name="time1")(waves)
        embedding = nn.Dense(4 * width, dtype=self.dtype, name="time2")(nn.silu(embedding))
        if self.num_classes is None:
            shape = (batch, self.words, self.features)
            return (jnp.zeros(shape, x.dtype) if condition is None else condition), embedding
        table = nn.Embed(self.num_classes, 4 * width, dtype=self.dtype, name="classes")
        condition = jnp.zeros(batch, jnp.int32) if condition is None else condition
        return None, embedding + table(condition)
