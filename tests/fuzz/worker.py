"""A worker process: checks programs that it is told to, one JSON line each way.

Everything but the answers goes to standard error. Before every stage that might end the process it
says which, so that the pool can name it.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
import time
from typing import Any


def configure() -> None:
    """Set this process up: double precision, whole tracebacks, little overhead of tracing."""
    import jax

    gc.set_threshold(200_000, 20, 100)  # tracing makes many small objects and little garbage
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_traceback_filtering", "off")
    jax.config.update("jax_traceback_in_locations_limit", 0)


def main() -> None:
    """Answer requests on standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is no answer

    def say(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    import jax

    configure()

    say({"ready": jax.__version__})
    done = 0
    for line in sys.stdin:
        request = json.loads(line)
        say({"answer": _answer(request, lambda stage: say({"mark": stage}))})
        done += 1
        if done % 20 == 0:
            jax.clear_caches()


def _answer(request: dict[str, Any], mark: Any) -> dict[str, Any]:
    from . import checks, planted

    begin = time.monotonic()
    mark("draw")
    seed = request["seed"]
    case, reference = checks.draw_case(seed)
    answer: dict[str, Any] = {
        "operators": list(case.written.program.operators),
        "mesh": case.mesh.label,
    }
    mark(json.dumps(answer))
    answer |= {"seed": seed, "text": case.written.text}
    if request.get("show"):
        return answer
    if request.get("die"):  # for the tests
        mark("die")
        os.abort()
    outcome = checks.check(case, reference, mark=mark, only=request.get("only"), drawn_from=seed)
    answer |= {
        "findings": [dataclasses.asdict(finding) for finding in outcome.findings],
        "strategies": list(outcome.case.strategies),
        "checked": outcome.checked,
        "priced": outcome.priced,
        "searched": outcome.searched,
        "seconds": time.monotonic() - begin,
    }
    if "plant" in request:
        with planted.plant(request["plant"]) as reached:
            again = checks.check(case, reference, mark=mark, drawn_from=seed, searches=False)
        fewer = {(finding.kind, finding.strategy) for finding in outcome.findings}
        new = [f for f in again.findings if (f.kind, f.strategy) not in fewer]
        answer |= {"reached": reached(), "new": [dataclasses.asdict(finding) for finding in new]}
    if "shrink" in request:
        answer |= _small(outcome, request, mark)
    return answer


def _small(outcome: Any, request: dict[str, Any], mark: Any) -> dict[str, Any]:
    """The smallest case of a group of findings, as a program."""
    from . import shrink
    from .paste import paste

    for finding in outcome.findings:
        if f"{finding.kind}: {finding.group}" == request["shrink"]:
            small = shrink.shrink(outcome.case, finding, mark, request["seconds"])
            left = dataclasses.asdict(small.finding)
            return {"small": paste(small.case), "steps": small.steps, "left": left}
    return {}


if __name__ == "__main__":
    main()
