"""Linear programs, which only searches with limits or several sums need."""

from __future__ import annotations

from typing import Any


def linprog(*arguments: Any, **options: Any) -> Any:
    """`scipy.optimize.linprog`, imported here: it takes longer to import than jaxlwp does."""
    from scipy import optimize

    return optimize.linprog(*arguments, **options)
