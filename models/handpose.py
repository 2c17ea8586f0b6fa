"""Hand-pose estimation in Flax Linen."""

from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.resnet import ResNet


def expected_position(heatmaps: jax.Array) -> jax.Array:
    """Returns where the key points are expected, from 0 (left, top) to 1 (right, bottom).

    The softmax of a heat map is taken as the distribution of its key point; its mean is the
    position, which unlike that of the highest value has a gradient.

    Args:
        heatmaps: [batch, height, width, key points].

    Returns:
        [batch, key points, 2]: x, y.
    """
    _, height, width, _ = heatmaps.shape
    # Positions are finer than bfloat16 could tell apart.
    heatmaps = heatmaps.astype(jnp.promote_types(heatmaps.dtype, jnp.float32))
    weights = nn.softmax(heatmaps, axis=(1, 2))
    xs = (jnp.arange(width) + 0.5) / width
    ys = (jnp.arange(height) + 0.5) / height
    x = (weights * xs[None, None, :, None]).sum(axis=(1, 2))
    y = (weights * ys[None, :, None, None]).sum(axis=(1, 2))
    return jnp.stack([x, y], axis=-1)


class HandPose(nn.Module):
    """Key points of a hand: ResNet, three transposed convolutions, one heat map per key point.

    34,000,725 parameters with ResNet-50 and 21 key points; 33,999,697 with the 17 of a body, the
    source's 34.0M. Any image of 32x32 pixels or more will do.

    Source: Xiao, Wu and Wei, "Simple baselines for human pose estimation and tracking", ECCV
    2018, figure 1c and section 2. Coordinates from heat maps: Sun et al., "Integral human pose
    regression", ECCV 2018. The 21 key points are the usual ones: the wrist and four per finger.

    Attributes:
        num_keypoints: Number of key points.
        output: "heatmaps" or "coordinates".
        stage_sizes: Number of blocks of each stage of the ResNet.
        bottleneck: The kind of block, see `models.resnet.ResidualBlock`.
        width: Channels of the ResNet's first convolution.
        deconv_widths: Channels of each transposed convolution, which doubles the image size.
        dtype: Type to compute in; parameters stay float32, coordinates are float32 at least.
    """

    num_keypoints: int = 21
    output: Literal["heatmaps", "coordinates"] = "heatmaps"
    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    bottleneck: bool = True
    width: int = 64
    deconv_widths: tuple[int, ...] = (256, 256, 256)
    dtype: Any = None
    input_shape: ClassVar[tuple[int, int, int]] = (256, 256, 3)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns heat maps or coordinates for images [batch, height, width, channels].

        Heat maps are [batch, height / 4, width / 4, key points] (the paper's network, image sizes
        that are multiples of 32), coordinates [batch, key points, 2] as `expected_position` gives
        them. With `train`, the collection "batch_stats" changes.
        """
        backbone = ResNet(
            num_classes=None,
            stage_sizes=self.stage_sizes,
            bottleneck=self.bottleneck,
            width=self.width,
            dtype=self.dtype,
            name="backbone",
        )
        x = backbone(x, train=train)
        for i, channels in enumerate(self.deconv_widths, start=1):
            x = nn.ConvTranspose(
                channels,
                (4, 4),
                strides=(2, 2),
                use_bias=False,
                dtype=self.dtype,
                name=f"deconv{i}",
            )(x)
            norm = nn.BatchNorm(not train, momentum=0.9, dtype=self.dtype, name=f"norm{i}")
            x = nn.relu(norm(x))
        x = nn.Conv(self.num_keypoints, (1, 1), dtype=self.dtype, name="heatmaps")(x)
        return x if self.output == "heatmaps" else expected_position(x)
