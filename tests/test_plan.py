"""Plans in use: calling, placing, training-state shardings, and clear errors for bad input."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir
from jax.sharding import Mesh, PartitionSpec

import jaxlwp
from models.lenet import LeNet5

RATES = jaxlwp.Rates(
    flops_per_s=1e10, memory_bytes_per_s=1e9, latency_s=(1e-5,), link_bytes_per_s=(1e9,)
)
MODEL = LeNet5()
IMAGES = jax.random.normal(jax.random.key(0), (16, 28, 28, 1))
LABELS = jnp.arange(16) % 10
PARAMS = MODEL.init(jax.random.key(1), IMAGES)


def loss_fn(params: Any, images: Any, labels: Any) -> Any:
    logits = MODEL.apply(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def loss_with_aux(params: Any, batch: Any) -> Any:
    logits = MODEL.apply(params, batch["image"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    accuracy = (logits.argmax(-1) == batch["label"]).mean()
    return losses.mean(), {"logits": logits, "accuracy": accuracy}


def make_plan(**kwargs: Any) -> jaxlwp.Plan:
    return jaxlwp.parallelize(loss_fn, PARAMS, IMAGES, LABELS, rates=RATES, **kwargs)


def close(actual: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(np.max(np.abs(b))))


def test_a_state_is_made_in_parts() -> None:
    plan, tx = make_plan(strategy="model"), optax.adam(1e-3)

    def create(key: Any) -> TrainState:
        return TrainState.create(apply_fn=MODEL.apply, params=MODEL.init(key, IMAGES), tx=tx)

    shardings = plan.state_shardings(jax.eval_shape(create, jax.random.key(1)))
    state = jax.jit(create, out_shardings=shardings)(jax.random.key(1))
    placed = plan.place(create(jax.random.key(1)))
    for made, want in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True):
        assert made.sharding == want.sharding
        np.testing.assert_allclose(made, want, rtol=1e-6, atol=1e-7)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.opt_state))


def test_an_nnx_state_is_made_in_parts() -> None:
    tx = optax.adam(1e-3)

    def create() -> tuple[Any, Any]:
        model = nnx.Linear(12, 16, rngs=nnx.Rngs(1))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    def loss(model: Any, x: Any) -> Any:
        return jnp.mean(model(x) ** 2)

    shapes, x = nnx.eval_shape(create), jnp.ones((8, 12))
    plan = jaxlwp.parallelize(loss, shapes[0], x, rates=RATES, devices=4, strategy="model")
    model, optimizer = jax.jit(create, out_shardings=plan.state_shardings(shapes))()
    for kernel in (model.kernel, optimizer.opt_state[0].mu["kernel"]):
        assert kernel[...].sharding.shard_shape((12, 16)) == (12, 4)
    close(plan(model, x), loss(create()[0], x))


def test_called_like_the_function() -> None:
    plan = make_plan()
    close(plan(PARAMS, IMAGES, LABELS), loss_fn(PARAMS, IMAGES, LABELS))
    gradients = jax.jit(jax.grad(plan))(PARAMS, IMAGES, LABELS)
    close(gradients, jax.grad(loss_fn)(PARAMS, IMAGES, LABELS))


def test_aux_dictionary_batch_and_argmax() -> None:
    batch = {"image": IMAGES, "label": LABELS}
    plan = jaxlwp.parallelize(loss_with_aux, PARAMS, batch, rates=RATES)
    step = jax.jit(jax.value_and_grad(plan, has_aux=True))
    actual = step(plan.place(PARAMS), plan.place_batch(batch))
    close(actual, jax.value_and_grad(loss_with_aux, has_aux=True)(PARAMS, batch))
    assert actual[0][1].keys() == {"logits", "accuracy"}


def test_train_state_follows_its_parameters_and_buffers_are_donated() -> None:
    plan = make_plan(strategy="model")
    state = TrainState.create(apply_fn=MODEL.apply, params=PARAMS, tx=optax.adam(1e-3))
    state = plan.place(state)
    flat = jax.tree.leaves(plan.param_shardings)
    for tree in (state.params, state.opt_state[0].mu, state.opt_state[0].nu):
        assert [leaf.sharding for leaf in jax.tree.leaves(tree)] == flat
    assert any(leaf.sharding.spec != PartitionSpec() for leaf in jax.tree.leaves(state.params))
    assert state.opt_state[0].count.sharding.is_fully_replicated

    def step(state: Any, images: Any, labels: Any) -> Any:
        loss, grads = jax.value_and_grad(plan)(state.params, images, labels)
        return state.apply_gradients(grads=grads), loss

    batch = plan.place_batch(IMAGES, LABELS)
    before = state
    state, _ = jax.jit(step, donate_argnums=0)(state, *batch)
    assert jax.tree.leaves(before.params)[0].is_deleted()
    assert [leaf.sharding for leaf in jax.tree.leaves(state.params)] == flat
    assert int(state.step) == 1


def test_mesh_of_the_users_own() -> None:
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("rows", "columns"))
    plan = make_plan(mesh=mesh)
    assert plan.space.devices.axis_sizes == {"rows": 4, "columns": 2}
    close(plan(PARAMS, IMAGES, LABELS), loss_fn(PARAMS, IMAGES, LABELS))


def test_strategy_is_saved_and_loaded(tmp_path: Any) -> None:
    plan = make_plan(devices=4)
    plan.strategy.save(tmp_path / "plan.json")
    loaded = jaxlwp.Strategy.load(tmp_path / "plan.json")
    assert loaded == plan.strategy
    again = make_plan(devices=4, strategy=loaded)
    assert again.cost == plan.cost
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]


def test_search_is_no_worse_than_the_baselines() -> None:
    plan = make_plan()
    assert plan.result is not None and plan.result.optimal
    for name in jaxlwp.BASELINES:
        assert plan.cost.total_s <= plan.space.evaluate(plan.space.baseline(name)).total_s


def test_table_names_every_layer_and_unknown_operators() -> None:
    def loss(params: Any, x: Any) -> Any:
        return jnp.sum(jnp.fft.fft(x @ params).real[:, 1])

    params, x = jnp.ones((6, 8)), jax.random.normal(jax.random.key(3), (8, 6))
    plan = jaxlwp.parallelize(loss, params, x, rates=RATES, strategy="data")
    text = str(plan)
    assert all(layer.name in text for layer in plan.graph.layers)
    assert [layer.kind for layer in plan.graph.unknown()][0] == "fft"
    assert "(no rule)" in text
    assert re.search(
        r"no rule for fft \(fft_0\): it runs whole on each of 8\s+devices, \S+ ms", text
    )
    close(jax.value_and_grad(plan)(params, x), jax.value_and_grad(loss)(params, x))


def swirl(x: Any) -> Any:
    """Mixes all elements of an array."""
    return x * jnp.cumsum(jnp.roll(x.reshape(-1), 5)).reshape(x.shape)


def swirl_primitive() -> Any:
    """An operator that jaxlwp cannot know."""
    primitive = Primitive("swirl")
    primitive.def_impl(jax.jit(swirl))
    primitive.def_abstract_eval(lambda x: ShapedArray(x.shape, x.dtype))
    mlir.register_lowering(primitive, mlir.lower_fun(swirl, multiple_results=False))

    def jvp(primals: Any, tangents: Any) -> Any:
        return primitive.bind(*primals), jax.jvp(swirl, primals, tangents)[1]

    ad.primitive_jvps[primitive] = jvp
    return primitive


@pytest.mark.parametrize("strategy", ["search", *jaxlwp.BASELINES])
def test_an_operator_of_ones_own_gives_the_same_numbers(strategy: str) -> None:
    """Without a rule it runs whole on every device; the report says so, and what that costs."""
    operator = swirl_primitive()

    def loss(params: Any, x: Any) -> Any:
        y = jax.lax.conv_general_dilated(
            x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y = operator.bind(jnp.tanh(y)).mean((1, 2))
        return jnp.mean((y @ params["dense"]) ** 2), y

    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "conv": jax.random.normal(keys[0], (3, 3, 4, 8)),
        "dense": jax.random.normal(keys[1], (8, 16)),
    }
    x = jax.random.normal(keys[2], (8, 8, 9, 4))
    plan = jaxlwp.parallelize(loss, params, x, rates=RATES, strategy=strategy)
    assert [layer.name for layer in plan.graph.unknown()] == ["swirl_0"]
    assert re.search(r"no rule for swirl \(swirl_0\): it runs whole on each of 8", str(plan))
    step = jax.jit(jax.value_and_grad(plan, has_aux=True))
    close(step(params, x), jax.value_and_grad(loss, has_aux=True)(params, x))


def test_repr_is_the_report_and_short() -> None:
    plan = make_plan()
    assert repr(plan) == str(plan) and "conv1" in repr(plan)
    assert "\x1b" not in str(plan) and not any(x != x.rstrip() for x in str(plan).splitlines())
    assert len(repr(plan.result)) < 3000 and len(repr(plan.graph)) < 5000
    assert "jit_plan" in jax.jit(plan).lower(PARAMS, IMAGES, LABELS).as_text()


def test_nnx_module_state_is_written_back() -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.linear = nnx.Linear(6, 8, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.dropout(self.linear(x))

    def loss(model: Net, x: Any) -> Any:
        return jnp.mean(model(x) ** 2)

    def losses(parallel: bool) -> list[float]:
        model = Net(nnx.Rngs(0))
        x = jax.random.normal(jax.random.key(0), (8, 6))
        fn = jaxlwp.parallelize(loss, model, x, rates=RATES) if parallel else loss
        step = nnx.jit(lambda model, x: nnx.value_and_grad(fn)(model, x)[0])
        return [float(step(model, x)) for _ in range(3)]

    np.testing.assert_allclose(losses(True), losses(False), rtol=1e-6)
    assert len(set(losses(False))) == 3


def test_rebind_for_another_batch_size() -> None:
    plan = make_plan()
    for size in (8, 5):
        other = plan.rebind(IMAGES[:size], LABELS[:size])
        assert other.strategy.name == "search" and other.result is None
        same = [n for n, c in plan.strategy.configs.items() if other.strategy.configs[n] == c]
        assert len(same) == len(plan.strategy.configs) or size < 8
        assert other.param_shardings == plan.param_shardings
        actual = jax.jit(jax.value_and_grad(other))(
            plan.place(PARAMS), IMAGES[:size], LABELS[:size]
        )
        close(actual, jax.value_and_grad(loss_fn)(PARAMS, IMAGES[:size], LABELS[:size]))


def test_rebind_for_evaluation() -> None:
    def metrics(params: Any, images: Any, labels: Any) -> Any:
        logits = MODEL.apply(params, images)
        return {"correct": jnp.sum(logits.argmax(-1) == labels), "top": logits.max(-1)}

    plan = make_plan(strategy="model")
    evaluation = plan.rebind(IMAGES[:12], LABELS[:12], fn=metrics)
    assert evaluation.strategy.configs["conv2"] == plan.strategy.configs["conv2"]
    assert evaluation.param_shardings == plan.param_shardings
    assert not any(c.backward for c in evaluation.collectives)
    actual = jax.jit(evaluation)(plan.place(PARAMS), IMAGES[:12], LABELS[:12])
    close(actual, metrics(PARAMS, IMAGES[:12], LABELS[:12]))


def test_rebind_with_an_nnx_module_in_evaluation_mode() -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return nnx.relu(self.norm(self.conv(x))).mean((1, 2))

    def loss(model: Net, x: Any) -> Any:
        return jnp.mean(model(x) ** 2)

    def predict(model: Net, x: Any) -> Any:
        return model(x)

    x = jax.random.normal(jax.random.key(0), (8, 8, 8, 3))
    model = Net(nnx.Rngs(0))
    plan = jaxlwp.parallelize(loss, model, x, rates=RATES)
    plan(model, x)  # moves the running statistics
    model.eval()
    evaluation = plan.rebind(x[:3], fn=predict, params=model)
    close(evaluation(model, x[:3]), predict(model, x[:3]))


def test_rebind_without_a_function() -> None:
    plan = make_plan()
    bare = dataclasses.replace(plan, function=None)
    with pytest.raises(ValueError, match=r"rebind: .*without its function.*fn=loss_fn"):
        bare.rebind(IMAGES, LABELS)


def test_layers_are_named_by_module_or_parameter_path() -> None:
    linen = jaxlwp.trace(loss_fn, PARAMS, IMAGES, LABELS)
    assert [x.name for x in linen.layers if x.kind in ("conv", "dense")] == list(PARAMS["params"])
    model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
    graph = jaxlwp.trace(lambda m, x: jnp.sum(m(x)), model, jnp.ones((8, 6)))
    assert [x.name for x in graph.layers if x.kind == "dense"] == ["layers/0", "layers/1"]
    assert [x.name for x in linen.layers if x.kind == "reshape"] == ["reshape_0"]


# --- bad input -----------------------------------------------------------------------------------


def test_batch_not_divisible() -> None:
    with pytest.raises(ValueError, match=r"'data'.*batch of 12, which 8 devices.*multiple of 8"):
        jaxlwp.parallelize(loss_fn, PARAMS, IMAGES[:12], LABELS[:12], rates=RATES, strategy="data")


def test_search_splits_a_batch_that_is_not_divisible() -> None:
    plan = jaxlwp.parallelize(loss_fn, PARAMS, IMAGES[:13], LABELS[:13], rates=RATES)
    close(plan(PARAMS, IMAGES[:13], LABELS[:13]), loss_fn(PARAMS, IMAGES[:13], LABELS[:13]))


def test_a_leaf_that_is_no_array() -> None:
    with pytest.raises(ValueError, match=r"params\['name'\] is a str \('conv'\).*no array"):
        jaxlwp.parallelize(lambda p, x: jnp.sum(p["w"] * x), {"w": 1.0, "name": "conv"}, 2.0)


def test_a_weight_penalty_has_no_samples() -> None:
    def loss(params: Any, images: Any, labels: Any) -> Any:
        penalty = sum(jnp.sum(x**2) for x in jax.tree.leaves(params) if x.ndim > 1)
        return loss_fn(params, images, labels) + 1e-4 * penalty

    plan = jaxlwp.parallelize(loss, PARAMS, IMAGES, LABELS, rates=RATES, strategy="data")
    sums = [x for x in plan.graph.layers if x.kind == "reduce" and "dim0" in x.dimensions]
    assert len(sums) == 5 and not any("sample" in layer.dimensions for layer in sums)
    owners = {plan.graph.owners[value][0] for value in plan.graph.program.inputs[:10]}
    assert {plan.graph.layers[i].kind for i in owners} == {"conv", "dense"}
    close(plan(PARAMS, IMAGES, LABELS), loss(PARAMS, IMAGES, LABELS))


def test_more_devices_than_exist() -> None:
    with pytest.raises(ValueError, match=r"devices: 64 asked for, 8 exist.*fewer"):
        make_plan(devices=64)


def test_parameters_that_do_not_match() -> None:
    plan = make_plan()
    other = jax.tree.map(lambda x: jnp.zeros((*x.shape, 1)), PARAMS)
    with pytest.raises(ValueError, match=r"params.*conv1.*plan was made for.*make a plan"):
        plan(other, IMAGES, LABELS)
    with pytest.raises(ValueError, match=r"params is a dict of .*, and was a dict of params"):
        plan(PARAMS["params"], IMAGES, LABELS)


def test_batch_of_another_size() -> None:
    plan = make_plan()
    with pytest.raises(ValueError, match=r"args\[0\].*\[8, 28, 28, 1\].*drop or pad"):
        plan(PARAMS, IMAGES[:8], LABELS[:8])
    with pytest.raises(ValueError, match=r"place_batch: args\[0\] has shape \(8, 28, 28, 1\)"):
        plan.place_batch(IMAGES[:8], LABELS[:8])


@pytest.mark.parametrize("field", ["flops_per_s", "memory_bytes_per_s"])
@pytest.mark.parametrize("value", [float("nan"), -1.0, 0.0, float("inf")])
def test_bad_rates(field: str, value: float) -> None:
    rates = {"flops_per_s": 1e10, "memory_bytes_per_s": 1e9, field: value}
    with pytest.raises(ValueError, match=r"per_s is .*; a rate must be a positive finite number"):
        jaxlwp.parallelize(loss_fn, PARAMS, IMAGES, LABELS, rates=jaxlwp.Rates(**rates))


def test_bad_link_rates() -> None:
    with pytest.raises(ValueError, match=r"MeshAxis 'a': latency_s is -1"):
        jaxlwp.devices.MeshAxis(name="a", size=2, latency_s=-1.0, bytes_per_s=1e9)
    with pytest.raises(ValueError, match=r"MeshAxis 'a': bytes_per_s is nan"):
        jaxlwp.devices.MeshAxis(name="a", size=2, latency_s=0.0, bytes_per_s=float("nan"))


def test_loss_that_is_not_a_scalar() -> None:
    def per_sample(params: Any, images: Any, labels: Any) -> Any:
        logits = MODEL.apply(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    with pytest.raises(ValueError, match=r"its output is float32\[16\]; a loss must be one.*mean"):
        jaxlwp.parallelize(per_sample, PARAMS, IMAGES, LABELS, rates=RATES)


def test_strategy_for_another_model_mesh_or_shape() -> None:
    strategy = make_plan(devices=4).strategy
    with pytest.raises(ValueError, match=r"mesh axes.*search again"):
        make_plan(devices=8, strategy=strategy)
    with pytest.raises(ValueError, match=r"another model.*lacks layers"):
        jaxlwp.parallelize(
            lambda w, x: jnp.mean(x @ w), jnp.ones((4, 4)), jnp.ones((8, 4)),
            rates=RATES, devices=4, strategy=strategy,
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"fingerprint.*search again"):
        jaxlwp.parallelize(
            loss_fn, PARAMS, IMAGES[:8], LABELS[:8], rates=RATES, devices=4, strategy=strategy
        )


def test_unknown_strategy() -> None:
    with pytest.raises(ValueError, match=r"strategy: 'fastest' is unknown; give 'search'"):
        make_plan(strategy="fastest")
    with pytest.raises(ValueError, match=r"strategy: 3 is a int"):
        make_plan(strategy=3)


def test_side_effects_are_refused() -> None:
    def noisy(params: Any, images: Any, labels: Any) -> Any:
        jax.debug.print("loss")
        return loss_fn(params, images, labels)

    with pytest.raises(ValueError, match=r"side effects.*remove debug prints"):
        jaxlwp.parallelize(noisy, PARAMS, IMAGES, LABELS, rates=RATES)


def test_corrupt_strategy_file(tmp_path: Any) -> None:
    path = tmp_path / "strategy.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"not a strategy file"):
        jaxlwp.Strategy.load(path)


def test_tracing_prints_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX asks a callable that is no function for its text, which is long and takes a while."""
    plan = make_plan()
    monkeypatch.setattr(jaxlwp.Plan, "__repr__", lambda self: pytest.fail("printed"))
    jax.jit(jax.value_and_grad(plan)).lower(*plan.argument_shapes)
    jax.jit(plan).lower(*plan.argument_shapes)
    assert inspect.signature(plan) == inspect.signature(plan.function)
