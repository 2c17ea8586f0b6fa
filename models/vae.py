"""The decoder of a variational autoencoder, as latent diffusion models have it, in Flax Linen."""

from typing import Any, ClassVar

import flax.linen as nn
import jax

from models._diffusion import Attention, Conv, ResidualBlock, doubled, on_pixels


class VAEDecoder(nn.Module):
    """Stable Diffusion's decoder: latents to images of eight times the height and width.

    49,490,199 parameters, as `AutoencoderKL` of diffusers has without its encoder (20 of them are
    the 1x1 convolution of the latents). Latents of 128x128 give an image of 1024x1024 pixels.

    Source: Rombach et al., "High-resolution image synthesis with latent diffusion models", CVPR
    2022, and its code (`ldm/modules/diffusionmodules/model.py`, class Decoder, with the settings
    of `stable-diffusion/v1-inference.yaml`).

    Attributes:
        channels: Of the levels, from the latents' size on; each doubles height and width but the
            last.
        blocks: Residual blocks of each level.
        out_channels: Of the image.
        groups: Of the normalizations; they divide the channels of all levels.
        panorama: The image's left edge is beside its right one: convolutions pad it with itself in
            width.
        dtype: Type to compute in; parameters stay float32.
    """

    channels: tuple[int, ...] = (512, 512, 256, 128)
    blocks: int = 3
    out_channels: int = 3
    groups: int = 32
    panorama: bool = False
    dtype: Any = None
    input_shape: ClassVar[tuple[int, int, int]] = (128, 128, 4)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns images [batch, 8 * height, 8 * width, out_channels] of latents.

        Nothing differs in training. Latents are [batch, height, width, channels].
        """
        del train

        def conv(name: str, channels: int, window: int = 3) -> Conv:
            return Conv(channels, window, 1, self.panorama, self.dtype, name=name)

        def norm(name: str) -> nn.GroupNorm:
            return nn.GroupNorm(self.groups, epsilon=1e-6, dtype=self.dtype, name=name)

        def block(name: str, channels: int) -> ResidualBlock:
            return ResidualBlock(
                channels, self.groups, panorama=self.panorama, dtype=self.dtype, name=name
            )

        x = conv("latents", x.shape[-1], 1)(x)
        x = conv("stem", self.channels[0])(x)
        x = block("middle1", self.channels[0])(x)
        x = x + on_pixels(Attention(dtype=self.dtype, name="attention"), norm("attention_norm")(x))
        x = block("middle2", self.channels[0])(x)
        for level, channels in enumerate(self.channels):
            for i in range(1, self.blocks + 1):
                x = block(f"up{level}_{i}", channels)(x)
            if level < len(self.channels) - 1:
                x = conv(f"up{level}_conv", channels)(doubled(x))
        return conv("image", self.out_channels)(nn.silu(norm("norm")(x)))
