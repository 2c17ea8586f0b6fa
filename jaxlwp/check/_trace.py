"""Events as a trace that Perfetto and chrome://tracing open.

Source: "Trace Event Format" (Google), the JSON object format: complete events (`ph` "X") with
`ts` and `dur` in microseconds, metadata events (`ph` "M") that name processes and threads.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jaxlwp.check._timeline import COMMUNICATION, COMPUTE, EXPOSED, Event

_PROCESS = 1
_THREADS = {COMPUTE: 1, COMMUNICATION: 2, EXPOSED: 3}


def chrome_trace(events: Iterable[Event], process: str) -> dict[str, Any]:
    """The trace of events, one thread for each stream.

    Args:
      events: what has run.
      process: name of the device.
    """
    trace: list[dict[str, Any]] = [_metadata("process_name", 0, {"name": process})]
    for stream, thread in _THREADS.items():
        trace.append(_metadata("thread_name", thread, {"name": stream}))
        trace.append(_metadata("thread_sort_index", thread, {"sort_index": thread}))
    trace += map(_complete, events)
    return {"traceEvents": trace, "displayTimeUnit": "ms"}


def _metadata(name: str, thread: int, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": _PROCESS, "tid": thread, "args": arguments}


def _complete(event: Event) -> dict[str, Any]:
    arguments = {
        "instruction": event.name,
        "bytes": event.num_bytes,
        "flops": event.flops,
        "dtype": event.dtype,
        "op_name": event.op_name,
    }
    return {
        "ph": "X",
        "name": event.name if event.kind == "loop" else f"{event.kind}: {event.name}",
        "cat": event.kind,
        "pid": _PROCESS,
        "tid": _THREADS[event.stream],
        "ts": event.start_s * 1e6,
        "dur": event.seconds * 1e6,
        "args": {key: value for key, value in arguments.items() if value},
    }
