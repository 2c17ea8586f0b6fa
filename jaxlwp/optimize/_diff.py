"""Two strategies beside each other: which layers differ, and what else does."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from jaxlwp.space import Config, Strategy

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class StrategyDiff:
    """Two strategies, and how they differ; made by `diff_strategies`.

    Attributes:
      names: what the two are called: "a" and "b", or their files.
      strategies: the two.
      layers: names of the layers whose configs differ, or that only one of the two has.
      differences: what else differs, a line each: model, program, mesh, rates.
    """

    names: tuple[str, str]
    strategies: tuple[Strategy, Strategy]
    layers: tuple[str, ...]
    differences: tuple[str, ...]

    def config(self, side: int, layer: str) -> Config | None:
        """The config of a layer, without mesh axes of size 1; None if there is no such layer."""
        strategy = self.strategies[side]
        config = strategy.configs.get(layer)
        return None if config is None else config.splitting(strategy.axis_sizes)

    def to_json(self) -> str:
        """As JSON text.

        Keys: `format_version`, `names`, `differences`, `layers` (layer -> `a` and `b`, each the
        mesh axes by dimension, or null), `predicted` (`a` and `b`, as in strategy files).
        """
        sides = tuple(enumerate(("a", "b")))
        content: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "names": list(self.names),
            "differences": list(self.differences),
            "layers": {
                layer: {
                    key: None if (c := self.config(side, layer)) is None else dict(c.splits)
                    for side, key in sides
                }
                for layer in self.layers
            },
            "predicted": {
                key: json.loads(self.strategies[side].to_json()).get("predicted")
                for side, key in sides
            },
        }
        return json.dumps(content, indent=2)

    def __str__(self) -> str:
        """A row per layer that differs, the costs beside each other, and what else differs."""
        from jaxlwp.report import diff_text

        return diff_text(self)


def diff_strategies(a: Strategy, b: Strategy, names: tuple[str, str] = ("a", "b")) -> StrategyDiff:
    """How two strategies differ.

    Args:
      a: one.
      b: the other; of any model and mesh.
      names: what to call them.
    """
    found = StrategyDiff(names=names, strategies=(a, b), layers=(), differences=_differences(a, b))
    layers = dict.fromkeys((*a.configs, *b.configs))
    differing = tuple(n for n in layers if found.config(0, n) != found.config(1, n))
    return replace(found, layers=differing)


def _differences(a: Strategy, b: Strategy) -> tuple[str, ...]:
    lines = []
    if a.fingerprint != b.fingerprint:
        lines.append(
            f"model: other layers or shapes (fingerprints {a.fingerprint} and {b.fingerprint}); "
            "neither strategy is one of the other's model"
        )
    elif a.record.digest and b.record.digest and a.record.digest != b.record.digest:
        made = " and ".join(f"JAX {s.record.versions.get('jax', 'unknown')}" for s in (a, b))
        lines.append(
            f"program: the same layers, traced from other programs (digests {a.record.digest} and "
            f"{b.record.digest}, by {made})"
        )
    if a.axis_sizes != b.axis_sizes:
        lines.append(f"mesh: {a.axis_sizes} and {b.axis_sizes}")
    if a.record.rates and b.record.rates and a.record.rates != b.record.rates:
        lines.append(f"rates: {a.record.rates}; and {b.record.rates}")
    return tuple(lines)
