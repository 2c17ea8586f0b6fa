"""The demo, run by `make demo`: plan, train and compare on eight simulated devices.

1. LeNet-5 learns real handwritten digits under the plan that jaxlwp finds for it. The same
   training on one device gives the same losses.
2. AlexNet at 115 pixels, whose layers are measured quickly: the strategy found and the
   baselines, predicted and measured.

Exits with 1 if the losses part, or if the network does not learn.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import jaxlwp
from jaxlwp.cli._workload import load_workload
from models.lenet import LeNet5

DEVICES = 8
BATCH = 96
EPOCHS = 12
COMPARED_STEPS = 20
LOSS_TOLERANCE = 1e-4
ACCURACY = 0.95
ALEXNET = "models.alexnet:AlexNet"
ALEXNET_BATCH = 32
ALEXNET_PIXELS = 115
ROUNDS = 3

MODEL = LeNet5()
# Wide enough for the plan table where the output is not a terminal.
CONSOLE = Console(width=None if sys.stdout.isatty() else 150, highlight=False)


class Digits(NamedTuple):
    """Images [number, 28, 28, 1] from 0 to 1, and their labels."""

    images: np.ndarray
    labels: np.ndarray


def read_digits() -> tuple[Digits, Digits]:
    """1440 digits to train on and 357 held out, from 8x8 pixels enlarged to LeNet-5's 28x28."""
    data = load_digits()
    shape = (len(data.target), *LeNet5.input_shape)
    images = np.asarray(jax.image.resize(data.images[..., None] / 16, shape, "bilinear"))
    labels = data.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    train, held_out = order[:1440], order[1440:]
    return (
        Digits(images[train].astype(np.float32), labels[train]),
        Digits(images[held_out].astype(np.float32), labels[held_out]),
    )


def batches(digits: Digits, epochs: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of `BATCH` digits in an order that is the same in every run."""
    generator = np.random.default_rng(1)
    for _ in range(epochs):
        order = generator.permutation(len(digits.labels))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            yield digits.images[chosen], digits.labels[chosen]


def loss_fn(params: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy, and the logits."""
    logits = MODEL.apply(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits


def new_state() -> TrainState:
    """LeNet-5 untrained, the same in every run."""
    params = MODEL.init(jax.random.key(0), jnp.zeros((1, *LeNet5.input_shape)))
    return TrainState.create(apply_fn=MODEL.apply, params=params, tx=optax.adam(3e-3))


def train_step_of(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A training step on a loss function: `loss_fn`, or a plan made of it."""

    @jax.jit
    def step(state: TrainState, images: Any, labels: Any) -> tuple[TrainState, jax.Array]:
        (loss, _), gradients = jax.value_and_grad(fn, has_aux=True)(state.params, images, labels)
        return state.apply_gradients(grads=gradients), loss

    return step


def one_device_losses(train: Digits) -> list[float]:
    """Losses of the first steps on one device: the reference."""
    step, state, losses = train_step_of(loss_fn), new_state(), []
    for images, labels in batches(train, 1 + COMPARED_STEPS * BATCH // len(train.labels)):
        state, loss = step(state, images, labels)
        losses.append(float(loss))
        if len(losses) == COMPARED_STEPS:
            break
    return losses


def train_under(plan: jaxlwp.Plan, train: Digits) -> tuple[TrainState, list[float]]:
    """Train under a plan; returns the final state and every step's loss."""
    step, state, losses = train_step_of(plan), plan.place(new_state()), []
    steps = EPOCHS * (len(train.labels) // BATCH)
    started = time.perf_counter()
    for images, labels in batches(train, EPOCHS):
        state, loss = step(state, *plan.place_batch(images, labels))
        losses.append(float(loss))
        if len(losses) % (steps // EPOCHS * 3) == 0:
            taken_s = time.perf_counter() - started
            CONSOLE.print(f"  step {len(losses)} of {steps}: loss {loss:.4f} ({taken_s:.0f} s)")
    return state, losses


def accuracy(plan: jaxlwp.Plan, params: Any, digits: Digits) -> float:
    """Share of digits read right, by the plan itself: the last batch is padded to its shape."""
    predict, right = jax.jit(plan), 0
    for start in range(0, len(digits.labels), BATCH):
        images = digits.images[start : start + BATCH]
        labels = digits.labels[start : start + BATCH]
        missing = BATCH - len(labels)
        padded = (
            np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0))),
            np.pad(labels, (0, missing)),
        )
        _, logits = predict(params, *plan.place_batch(*padded))
        right += int((np.asarray(logits)[: len(labels)].argmax(-1) == labels).sum())
    return right / len(digits.labels)


def losses_table(one_device: list[float], planned: list[float]) -> Table:
    """Losses side by side, a column per step."""
    table = Table(title=f"loss, first {COMPARED_STEPS} steps", title_justify="left")
    table.add_column("step", justify="right")
    for name in ("one device", f"{DEVICES} devices, planned", "relative difference"):
        table.add_column(name, justify="right")
    for number, (a, b) in enumerate(zip(one_device, planned, strict=True), start=1):
        table.add_row(str(number), f"{a:.7f}", f"{b:.7f}", f"{abs(a - b) / abs(a):.1e}")
    return table


def digits_part() -> list[str]:
    """Plan and train LeNet-5; returns what went wrong, if anything."""
    CONSOLE.rule(f"LeNet-5 on handwritten digits, {DEVICES} simulated devices", align="left")
    train, held_out = read_digits()
    CONSOLE.print("measuring device rates (kept for the next time) and searching ...")
    plan = jaxlwp.parallelize(
        loss_fn, new_state().params, train.images[:BATCH], train.labels[:BATCH], devices=DEVICES
    )
    print(plan)
    CONSOLE.print(f"training {COMPARED_STEPS} steps on one device, for reference ...")
    expected = one_device_losses(train)
    CONSOLE.print(f"training {EPOCHS} epochs under the plan ...")
    state, losses = train_under(plan, train)
    actual = losses[:COMPARED_STEPS]
    CONSOLE.print(losses_table(expected, actual))
    difference = float(np.max(np.abs(np.subtract(actual, expected)) / np.abs(expected)))
    share = accuracy(plan, state.params, held_out)
    CONSOLE.print(f"largest relative difference of the losses: {difference:.1e}")
    CONSOLE.print(f"held-out accuracy: {share:.1%} of {len(held_out.labels)} digits")
    problems = []
    # Written so that NaN is a problem.
    if not difference <= LOSS_TOLERANCE:
        problems.append(f"the losses differ by {difference:.1e}, more than {LOSS_TOLERANCE:.0e}")
    if not share > ACCURACY:
        problems.append(f"held-out accuracy is {share:.1%}, not above {ACCURACY:.0%}")
    return problems


def alexnet_part() -> jaxlwp.check.Comparison:
    """What `jaxlwp compare` does, for AlexNet."""
    title = f"AlexNet, {ALEXNET_PIXELS} px, batch {ALEXNET_BATCH}, every strategy"
    CONSOLE.rule(title, align="left")
    shown: set[str] = set()
    with CONSOLE.status("making the model") as status:

        def report(what: str, done: int, total: int) -> None:
            status.update(f"{what}: {done} of {total}")
            if what not in shown:
                shown.add(what)
                CONSOLE.print(f"{what} ...")

        shape = (ALEXNET_PIXELS, ALEXNET_PIXELS, 3)
        work = load_workload(ALEXNET, batch=ALEXNET_BATCH, input_shape=shape)
        comparison = jaxlwp.compare(
            work.loss,
            work.params,
            *work.batch,
            devices=DEVICES,
            rounds=ROUNDS,
            name=ALEXNET,
            on_progress=report,
        )
    print(comparison)
    return comparison


def main() -> int:
    """Run both parts; returns the exit status."""
    # JAX reads this when it first looks for devices, which no import does.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={DEVICES}".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"
    started = time.perf_counter()
    problems = digits_part()
    comparison = alexnet_part()
    CONSOLE.rule("Summary", align="left")
    CONSOLE.print(
        f"AlexNet: the strategy found takes {comparison.result('search').measured_s:.2f} s a step, "
        f"data parallelism {comparison.result('data').measured_s:.2f} s "
        f"({comparison.speedup('search'):.2f}x), on {DEVICES} simulated devices that share "
        f"{os.cpu_count()} cores."
    )
    for problem in problems:
        CONSOLE.print(f"FAILED: {problem}", style="bold red")
    if not problems:
        CONSOLE.print("The losses are one device's, and the digits are read.", style="bold green")
    CONSOLE.print(f"{time.perf_counter() - started:.0f} s in all")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
