"""Train, evaluate, save; started again on as many devices as there are, it goes on from there."""

import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import jaxlwp

BATCH, STEPS, EVERY = 64, 400, 50
digits = load_digits()
images, labels = np.float32(digits.images[..., None] / 16), np.int32(digits.target)
train, test = (images[:1500], labels[:1500]), (images[1500:], labels[1500:])


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x, training):
        x = nn.max_pool(nn.relu(nn.Conv(32, (3, 3))(x)), (2, 2), strides=(2, 2))
        x = nn.relu(nn.Conv(64, (3, 3))(x)).reshape(x.shape[0], -1)
        return nn.Dense(10)(nn.Dropout(0.2, deterministic=not training)(x))


model, tx = CNN(), optax.adam(1e-3)


def init(key):
    params = model.init(key, jnp.zeros((1, 8, 8, 1)), training=False)["params"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


def loss_fn(params, key, images, labels):
    logits = model.apply({"params": params}, images, training=True, rngs={"dropout": key})
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def metrics_fn(params, images, labels):  # sums, so that batches of any size add up
    logits = model.apply({"params": params}, images, training=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return {"loss": losses.sum(), "accuracy": jnp.sum(logits.argmax(-1) == labels)}


def batch_of(step):  # the same rows, whenever it is asked for
    rows = np.random.default_rng(step).choice(len(train[1]), BATCH, replace=False)
    return jax.random.fold_in(jax.random.key(1), step), *(array[rows] for array in train)


shapes = jax.eval_shape(init, jax.random.key(0))
plan = jaxlwp.parallelize(loss_fn, shapes.params, *batch_of(0), optimizer=tx)


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state, *batch):
    loss, grads = jax.value_and_grad(plan)(state.params, *batch)
    return state.apply_gradients(grads=grads), loss


@functools.cache  # one plan for whole batches, and one for the last, incomplete one
def evaluate(size):
    return jax.jit(plan.rebind(*(array[:size] for array in test), fn=metrics_fn))


def test_metrics(params):
    parts = [[array[i : i + BATCH] for array in test] for i in range(0, len(test[1]), BATCH)]
    sums = [evaluate(len(part[1]))(params, *part) for part in parts]
    return {name: float(sum(s[name] for s in sums)) / len(test[1]) for name in sums[0]}


checkpoints = ocp.CheckpointManager(
    Path("checkpoints").absolute(),
    options=ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=EVERY),
)
if (last := checkpoints.latest_step()) is None:
    state = jax.jit(init, out_shardings=plan.state_shardings(shapes))(jax.random.key(0))
else:
    wanted = ocp.args.StandardRestore(plan.abstract_state(shapes))
    state = checkpoints.restore(last, args=wanted)
for step in range(int(state.step), STEPS):
    state, loss = train_step(state, *plan.place_batch(*batch_of(step)))
    if (done := step + 1) % EVERY == 0:
        print(f"step {done}: loss {loss:.6f}, test {test_metrics(state.params)}", flush=True)
    checkpoints.save(done, args=ocp.args.StandardSave(state))
checkpoints.close()
