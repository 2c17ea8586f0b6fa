"""Convolutional networks on raw audio in Flax Linen."""

from typing import Any, ClassVar

import flax.linen as nn
import jax

from models._blocks import ConvNorm


class SpeechCNN(nn.Module):
    """1-D convolutional network for raw waveforms: stages of convolutions, max pooling between.

    M11 of the source unless the attributes say otherwise; the subclasses are others. Any number
    of samples will do. M11 has 1,784,202 parameters with ten classes; the source, which gives
    rounded counts only, says 1.8M.

    Source: Dai et al., "Very deep convolutional neural networks for raw waveforms", ICASSP 2017
    (arXiv:1610.00087), table 1. Convolutions are padded, so that only strides and poolings
    shorten the waveform, to the table's lengths.

    Attributes:
        num_classes: Number of classes, the width of the last layer.
        stages: Channels and number of convolutions of each stage. The first convolution has a
            window of 80 samples and a stride of 4.
        poolings: How many stages end in a max pooling, four samples to one.
        dtype: Type to compute in; parameters stay float32.
    """

    num_classes: int = 10
    stages: tuple[tuple[int, int], ...] = ((64, 1), (64, 2), (128, 2), (256, 3), (512, 2))
    poolings: int = 4
    dtype: Any = None
    input_shape: ClassVar[tuple[int, int]] = (32000, 1)  # four seconds at 8 kHz

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the logits [batch, num_classes] of waveforms [batch, samples, 1].

        With `train`, the collection "batch_stats" changes.
        """
        for stage, (channels, size) in enumerate(self.stages, start=1):
            for i in range(1, size + 1):
                first = stage == i == 1
                conv = ConvNorm(
                    channels,
                    (80,) if first else (3,),
                    strides=4 if first else 1,
                    padding="SAME",
                    dtype=self.dtype,
                    name=f"conv{stage}_{i}",
                )
                x = conv(x, train=train)
            if stage <= self.poolings:
                x = nn.max_pool(x, (4,), strides=(4,), padding="SAME")
        return nn.Dense(self.num_classes, dtype=self.dtype, name="fc")(x.mean(axis=1))


class SpeechM5(SpeechCNN):
    """M5: 558,090 parameters with ten classes."""

    stages: tuple[tuple[int, int], ...] = ((128, 1), (128, 1), (256, 1), (512, 1))


class SpeechM18(SpeechCNN):
    """M18: 3,679,882 parameters with ten classes; 3.7M in the source."""

    stages: tuple[tuple[int, int], ...] = ((64, 1), (64, 4), (128, 4), (256, 4), (512, 4))
