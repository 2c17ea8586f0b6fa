"""README and docs: their loops run, give one device's losses, and differ from them in few lines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlwp
from jaxlwp.check import _compare

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
MOST_LINES = 200
MOST_CHANGED_LINES = 6


def blocks(language: str, *pages: str) -> list[str]:
    """The blocks of code of some pages, in order."""
    text = "\n".join(PAGES[ROOT / page] for page in pages)
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


LINEN, NNX = blocks("diff", "README.md", "docs/loops.md")


def changed(block: str, sign: str) -> list[str]:
    return [line[1:] for line in block.splitlines() if line.startswith(sign)]


def version(block: str, sign: str) -> str:
    """The program before (sign "-") or after (sign "+") the change."""
    return "\n".join(line[1:] for line in block.splitlines() if line[:1] in (" ", sign))


def run(program: str, **names: Any) -> dict[str, Any]:
    namespace = {"__name__": "readme", **names}
    exec(compile(program, "README.md", "exec"), namespace)
    return namespace


@pytest.fixture(autouse=True)
def _quick(quick_measurements: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("block", [LINEN, NNX], ids=["Linen", "NNX"])
def test_few_lines_change(block: str) -> None:
    assert all(line[:1] in (" ", "+", "-") for line in block.splitlines())
    assert "jaxlwp" not in version(block, "-")
    assert len(changed(block, "+")) <= MOST_CHANGED_LINES
    assert len(changed(block, "-")) <= len(changed(block, "+"))


def test_nnx_loop() -> None:
    expected, actual = run(version(NNX, "-")), run(version(NNX, "+"))
    np.testing.assert_allclose(actual["losses"], expected["losses"], rtol=1e-4)
    assert len(set(expected["losses"])) == len(expected["losses"])
    assert actual["plan"].space.devices.num_devices == 8
    assert actual["plan"].result.optimal


def test_linen_loop_then_the_steps_and_the_contracts() -> None:
    expected, actual = run(version(LINEN, "-")), run(version(LINEN, "+"))
    np.testing.assert_allclose(actual["losses"], expected["losses"], rtol=1e-4)
    assert len(set(expected["losses"])) == len(expected["losses"])
    rebound, page, why, constrained, steps, strategies, same_numbers, same_bytes = blocks(
        "python", "docs/loops.md", "docs/plans.md", "docs/steps.md", "docs/contracts.md"
    )
    namespace = run(rebound, **actual)
    arguments = (actual["state"].params, namespace["images"], namespace["labels"])
    for new, fn in (("smaller", "loss_fn"), ("evaluate", "accuracy")):
        np.testing.assert_allclose(namespace[new](*arguments), namespace[fn](*arguments), rtol=1e-5)
    run(page, **actual)
    assert Path("plan.html").read_text().startswith("<!DOCTYPE html>")
    namespace = run(constrained, **run(why, **actual))
    assert not any(c.axes("height") for c in namespace["plan"].strategy.configs.values())
    namespace = run(steps, **actual)
    assert namespace["plan"].strategy == actual["plan"].strategy
    namespace = run(strategies, **namespace)
    assert namespace["plan"].strategy == namespace["result"].strategy
    namespace = run(same_bytes, **run(same_numbers, **namespace))
    compiled_bytes = sum(c.count * c.operand_bytes for c in namespace["compiled"])
    assert compiled_bytes == sum(c.num_bytes for c in namespace["plan"].collectives) > 0


def test_machines_that_are_not_here() -> None:
    def loss_fn(params: Any, images: Any, labels: Any) -> Any:
        logits = images.reshape(images.shape[0], -1) @ params
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    params = jax.ShapeDtypeStruct((144, 10), jnp.float32)
    batch = jax.ShapeDtypeStruct((64, 12, 12, 1), jnp.float32), jax.ShapeDtypeStruct((64,), int)
    given = {"loss_fn": loss_fn, "params": params, "batch": batch, "jax": jax, "jnp": jnp}
    plan, scaling, thresholds = blocks("python", "docs/clusters.md")
    namespace = run(plan, jaxlwp=jaxlwp, **given)
    assert namespace["plan"].space.devices.num_devices == 32
    assert jaxlwp.Strategy.load("plan.json") == namespace["plan"].strategy
    namespace = run(scaling, **namespace)
    assert namespace["hours"] > 0
    namespace = run(thresholds, **namespace)
    assert [sample.value for sample in namespace["sizes"].samples] == [1, 8, 64]


def test_plans_that_only_evaluate() -> None:
    def predict(params: Any, images: Any) -> Any:
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(images, params, (1, 1), "SAME", dimension_numbers=dims)

    params, images = jnp.full((3, 3, 1, 1), 0.1), jnp.ones((1, 16, 16, 1))
    given = {"predict": predict, "params": params, "images": images, "jax": jax, "jnp": jnp}
    planned, decoder, sampler, beside = blocks("python", "docs/evaluation.md")
    namespace = run(planned, jaxlwp=jaxlwp, **given)
    np.testing.assert_allclose(namespace["outputs"], predict(params, images), rtol=1e-5)
    small = decoder.replace("VAEDecoder(", "VAEDecoder((16, 8), blocks=1, groups=4, ")
    assert small != decoder
    assert run(small.replace("512, 512", "16, 16"))["plan"].space.devices.num_devices == 8
    samples = run(sampler, **namespace)["samples"]
    training_plan = jaxlwp.parallelize(
        lambda params, images: predict(params, images).sum(), params, images, devices="h100:8"
    )
    given |= {"image": images[:, :8], "training_plan": training_plan, "jaxlwp": jaxlwp}
    plan = run(beside, **given)["plan"]
    assert plan.param_shardings == training_plan.param_shardings
    for _ in range(20):
        images = images - 0.1 * predict(params, images)
    np.testing.assert_allclose(samples, images, rtol=1e-4, atol=1e-5)


def test_documented_json_keys() -> None:
    page = PAGES[ROOT / "docs/command-line.md"]
    documented = set(re.findall(r"`([a-z_]+)`", page.split("Its `--json`")[1]))
    content = _compare.Comparison.to_json.__doc__ or ""
    written = set(re.findall(r"`([a-z_]+)`", content))
    assert {"results", "times_s"} <= written <= documented


def test_links_lead_somewhere() -> None:
    for path, text in PAGES.items():
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (path.parent / target).exists(), (path, target)


def test_pages_stay_short() -> None:
    for name in ("README.md", "ARCHITECTURE.md"):
        assert len((ROOT / name).read_text().splitlines()) <= MOST_LINES


def test_baselines_are_the_documented_ones() -> None:
    assert all(f'`"{name}"`' in README for name in jaxlwp.BASELINES)
