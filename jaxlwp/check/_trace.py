"""Events as a trace that Perfetto and chrome://tracing open.

Source: "Trace Event Format" (Google), the JSON object format: complete events (`ph` "X") with
`ts` and `dur` in microseconds, metadata events (`ph` "M") that name processes and threads.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlwp.check._timeline import COMMUNICATION, COMPUTE, EXPOSED, Event


class Span(NamedTuple):
    """Something that takes time, as a trace shows it.

    Attributes:
      thread: where it is shown.
      name: what is written on it.
      kind: spans of one kind have one colour.
      start_s: seconds since the beginning.
      end_s: the same.
      arguments: what is shown of it besides.
    """

    thread: str
    name: str
    kind: str
    start_s: float
    end_s: float
    arguments: Mapping[str, Any]


def spans_trace(spans: Iterable[Span], processes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The trace of spans.

    Args:
      spans: what has run.
      processes: names of the threads of each process, in the order in which they are shown; no
        name is there twice.

    Raises:
      ValueError: a span in a thread that no process has.
    """
    trace: list[dict[str, Any]] = []
    places: dict[str, tuple[int, int]] = {}
    for process, (name, threads) in enumerate(processes.items(), start=1):
        trace.append(_metadata("process_name", process, 0, {"name": name}))
        for thread in threads:
            number = len(places) + 1
            places[thread] = process, number
            trace.append(_metadata("thread_name", process, number, {"name": thread}))
            trace.append(_metadata("thread_sort_index", process, number, {"sort_index": number}))
    for span in spans:
        if span.thread not in places:
            raise ValueError(
                f"trace: {span.name} is in thread {span.thread!r}, which is none of "
                f"{', '.join(places)}; name it in processes"
            )
        trace.append(_complete(span, *places[span.thread]))
    return {"traceEvents": trace, "displayTimeUnit": "ms"}


def write_trace(trace: Mapping[str, Any], path: str | Path) -> None:
    """Write a trace as JSON, compressed if the name ends in ".gz"; Perfetto opens both.

    Raises:
      OSError: the file cannot be written.
    """
    text = json.dumps(trace)
    if str(path).endswith(".gz"):
        # without the time of day: the same trace makes the same file
        Path(path).write_bytes(gzip.compress(text.encode(), mtime=0))
    else:
        Path(path).write_text(text)


def chrome_trace(events: Iterable[Event], process: str) -> dict[str, Any]:
    """The trace of a forecast's events, one thread for each stream.

    Args:
      events: what has run.
      process: name of the device.
    """
    return spans_trace(map(_span, events), {process: (COMPUTE, COMMUNICATION, EXPOSED)})


def _span(event: Event) -> Span:
    return Span(
        thread=event.stream,
        name=event.name if event.kind == "loop" else f"{event.kind}: {event.name}",
        kind=event.kind,
        start_s=event.start_s,
        end_s=event.end_s,
        arguments={
            "instruction": event.name,
            "bytes": event.num_bytes,
            "flops": event.flops,
            "dtype": event.dtype,
            "op_name": event.op_name,
        },
    )


def _metadata(name: str, process: int, thread: int, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": process, "tid": thread, "args": arguments}


def _complete(span: Span, process: int, thread: int) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": span.name,
        "cat": span.kind,
        "pid": process,
        "tid": thread,
        "ts": span.start_s * 1e6,
        "dur": (span.end_s - span.start_s) * 1e6,
        "args": {key: value for key, value in span.arguments.items() if value},
    }
