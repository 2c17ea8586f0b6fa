"""A plan in other people's training loops, and with all that a training state may hold.

Each file in tests/loops is one program, written in the form of a well-known example: lines with
"-" are its own, lines with "+" run it under a plan, all others are common to both. Both versions
run, and must give the same losses, metrics and state.
"""

from __future__ import annotations

import difflib
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from flax.training import train_state
from jax.sharding import NamedSharding, PartitionSpec

import jaxlwp
from jaxlwp.check._verify import check_layers
from jaxlwp.devices import _calibrate
from tests.contracts.harness import drawn

RATES = jaxlwp.Rates(
    flops_per_s=1e10, memory_bytes_per_s=1e9, latency_s=(1e-5,), link_bytes_per_s=(1e9,)
)
LOOPS = Path(__file__).parent / "loops"
MOST_CHANGED_LINES = 6
TOLERANCE = 1e-4


def close(
    actual: Any, expected: Any, noise: tuple[str, ...] = (), tolerance: float = TOLERANCE
) -> None:
    """Equal up to rounding, but for leaves whose path contains one of `noise`."""
    (have, _), (want, _) = map(jax.tree_util.tree_flatten_with_path, (actual, expected))
    for (path, a), (expected_path, b) in zip(have, want, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert path == expected_path
        if any(each in name for each in noise) or callable(
            b
        ):  # Equinox has functions among its leaves
            continue
        largest = float(np.max(np.abs(b)))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * largest, err_msg=name)


# --- other people's loops ------------------------------------------------------------------------

# name -> what to compare at the end
PROGRAMS = {
    "mnist_linen": ("state",),
    "mnist_nnx": ("model", "optimizer"),
    "imagenet_resnet": ("state",),
    "plain_jax": ("params",),
    "equinox_mnist": ("model", "opt_state"),
    "haiku_mnist": ("params", "net_state", "opt_state"),
    "keras_mnist": ("state",),
    "mixed_precision": ("scale",),
    "accumulation_ema": ("params", "average", "opt_state"),
    "gan": ("g_params", "d_params", "g_state", "d_state"),
    "contrastive": ("params", "opt_state"),
    "denoising_unet": ("params", "opt_state"),
}
# A bias in front of a normalization changes nothing: its gradient is zero, but for rounding, and
# Adam makes of rounding what it makes of gradients.
# The mean that the normalization keeps has that bias in it: by XLA's flags alone, on one device and
# without a plan, it moves by 1.5e-4 of its largest element.
NOISE = {"mnist_nnx": ("conv2/bias", "batch_norm1/mean")}
HALF = {"mixed_precision": float(jnp.finfo(jnp.float16).eps)}
"""Of losses computed in half precision. The gradient of one bias, a sum of thousands of such
numbers, is no more than its order of adding up, and is seen here through the losses alone."""


def version(name: str, sign: str) -> str:
    """The program before (sign "-") or after (sign "+") the change."""
    lines = (LOOPS / f"{name}.diff").read_text().splitlines()
    assert all(line[:1] in (" ", "+", "-") for line in lines)
    return "\n".join(line[1:] for line in lines if line[0] in (" ", sign))


def run(program: str, name: str) -> dict[str, Any]:
    namespace = {"__name__": name}
    exec(compile(program, name, "exec", dont_inherit=True), namespace)
    return namespace


@pytest.mark.parametrize("name", PROGRAMS)
def test_few_lines_change(name: str) -> None:
    before, after = (version(name, sign).splitlines() for sign in "-+")
    kept = [line for line in difflib.ndiff(before, after) if line[0] not in "?"]
    added, removed = (sum(line[0] == sign for line in kept) for sign in "+-")
    assert not any("jaxlwp" in line for line in before)
    assert removed <= added <= MOST_CHANGED_LINES


@pytest.mark.usefixtures("quick_measurements")
@pytest.mark.parametrize("name", drawn(PROGRAMS, 0.5))
def test_loop_gives_the_numbers_of_one_device(name: str) -> None:
    results, tolerance = PROGRAMS[name], HALF.get(name, TOLERANCE)
    expected, actual = (run(version(name, sign), name) for sign in "-+")
    close(actual["history"], expected["history"], tolerance=tolerance)
    for result in results:
        close(actual[result], expected[result], NOISE.get(name, ()), tolerance)
    arrays = [x for x in jax.tree.leaves(actual[results[0]]) if isinstance(x, jax.Array)]
    assert {len(x.sharding.device_set) for x in arrays} == {8}
    for plan in (x for x in actual.values() if isinstance(x, jaxlwp.Plan) and x.trains):
        assert not [layer for layer in check_layers(plan) if not layer.agrees]


def test_rates_are_measured_while_a_step_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of the loops make their plan inside `jit`; what is timed there must run there."""

    def rate(*_: Any) -> float:
        return float(jax.jit(jnp.sum)(jnp.ones(3)))  # raises if it was traced, not run

    for name in ("_dense_rate", "_memory_rate", "_input_rate"):
        monkeypatch.setattr(_calibrate, name, rate)
    for name in ("_step_overhead", "_wait"):
        monkeypatch.setattr(_calibrate, name, lambda *_: (rate(), rate()))
    monkeypatch.setattr(_calibrate, "_link_fits", lambda *_: ())
    monkeypatch.setattr(_calibrate, "_first_touch", lambda *_: ((rate(), rate()),))
    measured = []

    @jax.jit
    def step(x: Any) -> Any:
        measured.append(_calibrate.measure(jaxlwp.make_mesh(jax.devices()[:2])))
        return x

    step(1.0)
    assert measured[0].memory_bytes_per_s == 3.0


# --- what a training state may hold --------------------------------------------------------------


class Net(nn.Module):
    """Small, and under strategy "model" with split kernels, biases, scales and statistics."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False, momentum=0.9)(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Conv(16, (3, 3), strides=2)(x))
        return nn.Dense(16)(x.reshape(x.shape[0], -1))


MODEL = Net()
KEYS = jax.random.split(jax.random.key(1), 4)
BATCHES = [(jax.random.normal(key, (16, 8, 8, 1)), jnp.arange(16)) for key in KEYS]
VARIABLES = MODEL.init(jax.random.key(0), BATCHES[0][0])
PARAMS, STATISTICS = VARIABLES["params"], VARIABLES["batch_stats"]
REPLICATED = PartitionSpec()


def loss_fn(params: Any, batch_stats: Any, images: Any, labels: Any) -> Any:
    variables = {"params": params, "batch_stats": batch_stats}
    logits, changed = MODEL.apply(variables, images, mutable=["batch_stats"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), changed["batch_stats"]


@functools.cache
def make_plan() -> jaxlwp.Plan:
    return jaxlwp.parallelize(
        loss_fn, PARAMS, STATISTICS, *BATCHES[0], rates=RATES, strategy="model"
    )


class TrainState(train_state.TrainState):
    batch_stats: Any


def create(tx: Any) -> TrainState:
    return TrainState.create(apply_fn=MODEL.apply, params=PARAMS, tx=tx, batch_stats=STATISTICS)


def stepper(fn: Callable[..., Any]) -> Callable[..., Any]:
    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, images: Any, labels: Any) -> Any:
        grad_fn = jax.value_and_grad(fn, has_aux=True)
        (loss, batch_stats), grads = grad_fn(state.params, state.batch_stats, images, labels)
        return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss

    return step


def train(step: Callable[..., Any], state: Any, batches: Any = BATCHES) -> Any:
    losses = []
    for batch in batches:
        state, loss = step(state, *batch)
        losses.append(loss)
    return state, losses


def copied(tree: Any) -> Any:
    """A state whose steps donate it, while what it was made of is used again."""
    return jax.tree.map(jnp.copy, tree)


def shardings(tree: Any) -> list[Any]:
    return [leaf.sharding for leaf in jax.tree.leaves(tree)]


def expected_shardings(tx: Any, opt_state: Any) -> Any:
    """What optax says stands for a parameter has its sharding, if it has its shape."""
    plan = make_plan()
    whole = NamedSharding(plan.mesh, REPLICATED)

    def like(leaf: Any, param: Any, sharding: Any) -> Any:
        if isinstance(leaf, optax.MaskedNode):
            return leaf
        return sharding if leaf.shape == param.shape else whole

    return optax.tree_utils.tree_map_params(
        tx, like, opt_state, PARAMS, plan.param_shardings,
        transform_non_params=lambda _: whole,
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )  # fmt: skip


def kernels(params: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim > 1, params)


# Adam's epsilon is above the rounding of these gradients, or what is nothing but rounding would
# become whole steps.
ADAM = optax.adam(1e-2, eps=1e-4)
SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 1e-2, warmup_steps=1, decay_steps=4)
OPTIMIZERS = {
    "clip, adamw, schedule, ema": optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(SCHEDULE, eps=1e-4), optax.ema(0.9)
    ),
    "MultiSteps": optax.MultiSteps(ADAM, every_k_schedule=2).gradient_transformation(),
    "masked": optax.chain(
        optax.masked(optax.add_decayed_weights(1e-2), kernels),
        optax.masked(optax.trace(0.9), kernels),
        optax.scale(-0.1),
    ),
    "multi_transform": optax.multi_transform(
        {"adam": ADAM, "sgd": optax.sgd(0.1, momentum=0.9), "frozen": optax.set_to_zero()},
        {"Conv_0": "adam", "BatchNorm_0": "frozen", "Conv_1": "sgd", "Dense_0": "adam"},
    ),
    "inject_hyperparams": optax.inject_hyperparams(optax.sgd)(SCHEDULE, momentum=0.9),
}


def test_parameters_and_statistics_are_split() -> None:
    specs = [leaf.spec for leaf in jax.tree.leaves(make_plan().shardings[:2])]
    assert sum(spec != REPLICATED for spec in specs) >= 7  # all but the last layer's bias


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_follows_its_parameters(name: str) -> None:
    tx, plan = OPTIMIZERS[name], make_plan()
    _, expected = train(stepper(loss_fn), copied(create(tx)))
    first = plan.place(create(tx))
    assert shardings(first.opt_state) == jax.tree.leaves(expected_shardings(tx, first.opt_state))
    assert shardings(first.params) == jax.tree.leaves(plan.param_shardings)
    assert shardings(first.batch_stats) == jax.tree.leaves(plan.batch_shardings[0])
    before = shardings(first)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of donated buffers that could not be used
        state, losses = train(stepper(plan), first)

    close(losses, expected)
    assert len(set(map(float, losses))) == len(BATCHES)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))
    # As they came, so the next step is neither compiled anew nor moves anything.
    after = zip(before, jax.tree.leaves(state), strict=True)
    assert all(leaf.sharding.is_equivalent_to(sharding, leaf.ndim) for sharding, leaf in after)


def test_gradients_accumulated_over_micro_batches_in_python() -> None:
    tx = optax.sgd(0.1, momentum=0.9)

    def losses(fn: Callable[..., Any], state: TrainState) -> list[Any]:
        grad_fn = jax.jit(jax.value_and_grad(fn, has_aux=True))
        out = []
        for _ in range(2):
            total = jax.tree.map(jnp.zeros_like, state.params)
            for batch in BATCHES:
                (loss, batch_stats), grads = grad_fn(state.params, state.batch_stats, *batch)
                total = jax.tree.map(jnp.add, total, grads)
                state = state.replace(batch_stats=batch_stats)
                out.append(loss)
            mean = jax.tree.map(lambda x: x / len(BATCHES), total)
            state = state.apply_gradients(grads=mean)
        return [*out, state.params, state.batch_stats]

    close(losses(make_plan(), make_plan().place(create(tx))), losses(loss_fn, create(tx)))


@pytest.mark.parametrize("inside", [True, False], ids=["grad in scan", "scan in grad"])
def test_gradients_accumulated_over_micro_batches_in_scan(inside: bool) -> None:
    micro_batches = jax.tree.map(lambda *parts: jnp.stack(parts), *BATCHES)

    def per_micro_batch(fn: Callable[..., Any], params: Any, batch_stats: Any) -> Any:
        def body(carry: Any, batch: Any) -> Any:
            total, batch_stats = carry
            (loss, batch_stats), grads = jax.value_and_grad(fn, has_aux=True)(
                params, batch_stats, *batch
            )
            return (jax.tree.map(jnp.add, total, grads), batch_stats), loss

        zeros = jax.tree.map(jnp.zeros_like, params)
        (total, batch_stats), losses = jax.lax.scan(body, (zeros, batch_stats), micro_batches)
        return losses, batch_stats, total

    def of_the_sum(fn: Callable[..., Any], params: Any, batch_stats: Any) -> Any:
        def total_loss(params: Any) -> Any:
            def body(batch_stats: Any, batch: Any) -> Any:
                loss, batch_stats = fn(params, batch_stats, *batch)
                return batch_stats, loss

            changed, losses = jax.lax.scan(body, batch_stats, micro_batches)
            return losses.sum(), (losses, changed)

        (_, aux), grads = jax.value_and_grad(total_loss, has_aux=True)(params)
        return *aux, grads

    step = jax.jit(per_micro_batch if inside else of_the_sum, static_argnums=0)
    plan = make_plan()
    close(step(plan, *plan.place((PARAMS, STATISTICS))), step(loss_fn, PARAMS, STATISTICS))


def test_average_of_parameters() -> None:
    tx = optax.sgd(0.1)

    def averaging(fn: Callable[..., Any]) -> Callable[..., Any]:
        update = stepper(fn)

        @functools.partial(jax.jit, donate_argnums=0)
        def step(states: Any, images: Any, labels: Any) -> Any:
            state, loss = update(states["state"], images, labels)
            average = optax.incremental_update(state.params, states["average"], 0.1)
            return {"state": state, "average": average}, loss

        return step

    def start() -> Any:
        return copied({"state": create(tx), "average": PARAMS})

    plan = make_plan()
    placed = plan.place(start())
    assert shardings(placed["average"]) == jax.tree.leaves(plan.param_shardings)
    actual, losses = train(averaging(plan), placed)
    expected, one_device = train(averaging(loss_fn), start())
    close(losses, one_device)
    close(actual, expected)
    assert shardings(actual["average"]) == jax.tree.leaves(plan.param_shardings)


def test_checkpoint_is_read_back_and_placed_again() -> None:
    plan, tx = make_plan(), OPTIMIZERS["clip, adamw, schedule, ema"]
    step = stepper(plan)
    state, _ = train(step, plan.place(create(tx)), BATCHES[:2])
    written = serialization.to_bytes(state)
    read = serialization.from_bytes(create(tx), written)  # NumPy arrays, whole
    kept = jax.tree.map(np.copy, read)

    again = plan.place(read)

    before = shardings(state)
    assert shardings(again) == before
    expected, actual = (train(step, x, BATCHES[2:]) for x in (state, again))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    # The step was given the placed state, and not the memory of what was read.
    jax.tree.map(np.testing.assert_array_equal, read, kept)


class NNXNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(1, 8, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)
        self.dense = nnx.Linear(8 * 8 * 8, 16, rngs=rngs)

    def __call__(self, x: Any, rngs: nnx.Rngs) -> Any:
        x = nnx.relu(self.norm(self.conv(x)))
        return self.dense(self.dropout(x.reshape(x.shape[0], -1), rngs=rngs))


def nnx_loss(model: NNXNet, rngs: nnx.Rngs, images: Any, labels: Any) -> Any:
    logits = model(images, rngs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@functools.cache
def make_nnx_plan() -> jaxlwp.Plan:
    return jaxlwp.parallelize(
        nnx_loss, NNXNet(nnx.Rngs(0)), nnx.Rngs(1), *BATCHES[0], rates=RATES, strategy="model"
    )


def test_nnx_optimizer_follows_its_module() -> None:
    def start() -> Any:
        model = NNXNet(nnx.Rngs(0))
        return model, nnx.Optimizer(model, ADAM, wrt=nnx.Param)

    def train_nnx(fn: Callable[..., Any], model: Any, optimizer: Any) -> list[float]:
        rngs = nnx.Rngs(1)

        @nnx.jit
        def step(model: Any, optimizer: Any, rngs: Any, images: Any, labels: Any) -> Any:
            loss, grads = nnx.value_and_grad(fn)(model, rngs, images, labels)
            optimizer.update(model, grads)
            return loss

        return [float(step(model, optimizer, rngs, *batch)) for batch in BATCHES]

    plan, (reference, reference_optimizer) = make_nnx_plan(), start()
    expected = train_nnx(nnx_loss, reference, reference_optimizer)
    model, optimizer = plan.place(start())
    by_name = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    moments = nnx.to_flat_state(nnx.state(optimizer, nnx.optimizer.OptState))
    split = 0
    for path, moment in moments:
        if moment[...].ndim:
            assert moment[...].sharding == by_name[path[-2:]][...].sharding
            split += moment[...].sharding.spec != REPLICATED
    assert split == 2 * 5  # mu and nu of every parameter
    np.testing.assert_allclose(train_nnx(plan, model, optimizer), expected, rtol=1e-4)
    close(model, reference)


def test_nnx_random_stream_given_as_argument_is_written_back() -> None:
    def losses(fn: Callable[..., Any]) -> list[float]:
        model, rngs = NNXNet(nnx.Rngs(0)), nnx.Rngs(1)
        return [float(fn(model, rngs, *BATCHES[0])) for _ in range(2)]

    expected = losses(nnx_loss)
    assert expected[0] != expected[1]
    np.testing.assert_allclose(losses(make_nnx_plan()), expected, rtol=1e-5)


def test_batch_without_an_argument_that_comes_before_it() -> None:
    with pytest.raises(ValueError, match=r"place_batch: rngs is an array, .*pass what"):
        make_nnx_plan().place_batch(*BATCHES[0])
