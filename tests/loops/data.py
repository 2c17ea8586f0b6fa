"""Synthetic data of MNIST's and ImageNet's form: nothing to download, and yet to be learned."""

import numpy as np


def images(count: int, shape: tuple[int, int, int], num_classes: int, seed: int) -> dict:
    """Noisy copies of one random picture per class."""
    pictures = np.random.default_rng(0).normal(size=(num_classes, *shape))
    rng = np.random.default_rng(seed)
    label = rng.integers(num_classes, size=count)
    image = pictures[label] + rng.normal(size=(count, *shape))
    return {"image": np.float32(image), "label": np.int32(label)}


def mnist(train: int = 128, test: int = 48) -> tuple[dict, dict]:
    """Training and test set: images [count, 28, 28, 1] and labels [count] of ten classes."""
    return images(train, (28, 28, 1), 10, seed=1), images(test, (28, 28, 1), 10, seed=2)


def imagenet(train: int = 64, test: int = 32, size: int = 32) -> tuple[dict, dict]:
    """Training and test set, like ImageNet's but for smaller images and eight classes."""
    return images(train, (size, size, 3), 8, seed=3), images(test, (size, size, 3), 8, seed=4)


def batches(dataset: dict, batch_size: int) -> list[dict]:
    """The data set in batches; an incomplete last one is dropped."""
    count = len(dataset["label"]) // batch_size
    parts = {name: np.split(x[: count * batch_size], count) for name, x in dataset.items()}
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]
