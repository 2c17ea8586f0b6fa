"""Worker processes that are restarted, and named, when they die or take too long."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tests import xla_flags

DEVICES = 12
"""Simulated devices of a worker."""

CPU_TIMEOUT_S = 120.0
"""Most processor seconds of one stage of a program: a busy machine makes nothing slow."""

TIMEOUT_S = 900.0
"""Most seconds by the clock, for a stage that waits for ever."""

LIFETIME = 150
"""Programs after which a worker is replaced: XLA keeps memory."""

LOST = ("died", "slow")
"""Kinds of findings that stand for an answer that never came."""

ROOT = Path(__file__).parents[2]


def environment(*, fast: bool = True) -> dict[str, str]:
    """Of a worker."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {
        "XLA_FLAGS": xla_flags.simulated(DEVICES, fast=fast),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": path,
    }
    kept = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    return kept | settings | {"TF_CPP_MIN_LOG_LEVEL": "3"}


class Clock:
    """Time that a process has taken since now."""

    def __init__(self, pid: int) -> None:
        self.stat = Path(f"/proc/{pid}/stat")
        self.begin, self.cpu = time.monotonic(), self._cpu_s()

    def _cpu_s(self) -> float:
        """Processor seconds of the process so far; those by the clock where nothing tells."""
        try:
            user, system = self.stat.read_text().rpartition(")")[2].split()[11:13]
        except (OSError, ValueError):
            return time.monotonic()
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def over(self) -> bool:
        """Whether it was long enough."""
        waited = time.monotonic() - self.begin
        return self._cpu_s() - self.cpu > CPU_TIMEOUT_S or waited > TIMEOUT_S


class Worker:
    """One worker process."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.done = 0

    def start(self) -> str:
        """Start the process; returns its JAX version."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if not os.environ.get("FUZZ_STDERR") else None,
            text=True,
            cwd=ROOT,
            env=environment(),
        )
        self.messages, self.done = queue.Queue(), 0
        threading.Thread(
            target=_read, args=(self.process.stdout, self.messages), daemon=True
        ).start()
        ready = self.messages.get(timeout=TIMEOUT_S)
        if ready is None:
            raise RuntimeError("the worker did not start: run python -m tests.fuzz.worker")
        return str(ready["ready"])

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request; one that names stage and strategy if it never comes."""
        answer = self._ask(request)
        lost = [f for f in answer["findings"] if f["kind"] in LOST] if "findings" in answer else []
        if not lost or len(answer["strategies"]) < 2:
            return answer
        for name in answer["strategies"]:  # they ran in one program: which of them was it?
            alone = self._ask({**request, "only": name})
            found = [f for f in alone["findings"] if f["kind"] in LOST]
            answer["findings"] += [{**finding, "strategy": name} for finding in found]
        return answer

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self.process is None or self.process.poll() is not None or self.done >= LIFETIME:
            self.stop()
            self.start()
        assert self.process is not None and self.process.stdin is not None
        self.done += 1
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        stage, about, begin = "start", {}, time.monotonic()
        clock = Clock(self.process.pid)
        while True:
            try:
                message = self.messages.get(timeout=5.0)
            except queue.Empty:
                if not clock.over():
                    continue
                self.stop()
                return _lost(request, about, "slow", stage, begin)
            if message is None:
                code = self.process.wait()
                self.stop()
                return _lost(request, about, "died", stage, begin, code)
            if "answer" in message:
                return dict(message["answer"])
            if message["mark"].startswith("{"):
                about = json.loads(message["mark"])
            else:
                stage, clock = message["mark"], Clock(self.process.pid)

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def _read(stream: Any, messages: queue.Queue[dict[str, Any] | None]) -> None:
    for line in stream:
        messages.put(json.loads(line))
    messages.put(None)


def _lost(
    request: dict[str, Any],
    about: dict[str, Any],
    kind: str,
    stage: str,
    begin: float,
    code: int | None = None,
) -> dict[str, Any]:
    """The answer in place of one that did not come; `code` is how the process ended."""
    note = "" if code is None else f" (exit code {code})"
    limits = f"{CPU_TIMEOUT_S:.0f} s of work, or {TIMEOUT_S:.0f} s by the clock"
    verb = "the process died" if kind == "died" else f"no end after {limits}"
    words = stage.split()
    finding = {
        # Before any plan is called it is one device's own program that ends it by a signal; an
        # exit code is an exception in this package.
        "kind": "oracle" if words[0] in ("draw", "eager") and not (code or 0) > 0 else kind,
        "group": f"{verb}: {words[0]}",
        "detail": f"{verb} in stage {stage}{note}",
        "strategy": "",
    }
    return {
        "seed": request["seed"],
        "operators": [],
        "mesh": "unknown",
        "findings": [finding],
        "strategies": [word for word in words[1:] if words[0] == "run"],
        "checked": 0,
        "priced": 0,
        "searched": 0,
        "seconds": time.monotonic() - begin,
    } | about


def answers(
    requests: Iterable[dict[str, Any]],
    workers: int,
    on_start: Callable[[str], None] = lambda version: None,
) -> Iterator[dict[str, Any]]:
    """Answers to all requests, as they come."""
    waiting: queue.Queue[dict[str, Any]] = queue.Queue()
    for request in requests:
        waiting.put(request)
    results: queue.Queue[Any] = queue.Queue()
    team = [Worker() for _ in range(workers)]

    def serve(worker: Worker) -> None:
        try:
            on_start(worker.start())
            while True:
                try:
                    request = waiting.get_nowait()
                except queue.Empty:
                    break
                results.put(worker.ask(request))
        except Exception as error:
            results.put(error)
        finally:
            worker.stop()
            results.put(None)

    threads = [threading.Thread(target=serve, args=(w,), daemon=True) for w in team]
    for thread in threads:
        thread.start()
    with contextlib.ExitStack() as stack:
        for worker in team:
            stack.callback(worker.stop)
        left = len(threads)
        while left:
            result = results.get()
            if isinstance(result, Exception):
                raise result
            if result is None:
                left -= 1
                continue
            yield result
