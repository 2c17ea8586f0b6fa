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

DEVICES = 12
"""Simulated devices of a worker."""

TIMEOUT_S = 240.0
"""Longest stage of a program."""

LIFETIME = 150
"""Programs after which a worker is replaced: XLA keeps memory."""

FAST = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
"""Flags that leave XLA's passes over the program in place and make the machine code cheap."""

ROOT = Path(__file__).parents[2]


def environment(flags: Iterable[str]) -> dict[str, str]:
    """Of a worker."""
    given = [f"--xla_force_host_platform_device_count={DEVICES}", *flags]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {"XLA_FLAGS": " ".join(given), "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    kept = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    return kept | settings | {"TF_CPP_MIN_LOG_LEVEL": "3"}


def known_flags() -> tuple[str, ...]:
    """Those of the fast flags that this version of XLA has; others end the process."""

    def works(flags: Iterable[str]) -> bool:
        command = [sys.executable, "-c", "import jax; jax.devices()"]
        done = subprocess.run(command, env=environment(flags), capture_output=True)
        return done.returncode == 0

    if works(FAST):
        return FAST
    return tuple(flag for flag in FAST if works([flag]))


class Worker:
    """One worker process."""

    def __init__(self, flags: tuple[str, ...]) -> None:
        self.flags = flags
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
            env=environment(self.flags),
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
        """The answer to a request; one that names the stage if the process dies or hangs."""
        if self.process is None or self.process.poll() is not None or self.done >= LIFETIME:
            self.stop()
            self.start()
        assert self.process is not None and self.process.stdin is not None
        self.done += 1
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        stage, about, begin = "start", {}, time.monotonic()
        while True:
            try:
                message = self.messages.get(timeout=TIMEOUT_S)
            except queue.Empty:
                self.stop()
                return _lost(request, about, "slow", stage, begin)
            if message is None:
                code = self.process.wait()
                self.stop()
                return _lost(request, about, "died", f"{stage} (exit {code})", begin)
            if "answer" in message:
                return dict(message["answer"])
            if message["mark"].startswith("{"):
                about = json.loads(message["mark"])
            else:
                stage = message["mark"]

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
    request: dict[str, Any], about: dict[str, Any], kind: str, stage: str, begin: float
) -> dict[str, Any]:
    """The answer in place of one that did not come."""
    verb = "the process died" if kind == "died" else f"no end after {TIMEOUT_S:.0f} s"
    words = stage.split()
    finding = {
        "kind": kind,
        "group": f"{verb}: {words[0]}",
        "detail": f"{verb} in stage {stage}",
        "strategy": "",
    }
    return {
        "seed": request["seed"],
        "operators": [],
        "mesh": "unknown",
        "findings": [finding],
        "strategies": words[1:],
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
    flags = known_flags()
    team = [Worker(flags) for _ in range(workers)]

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
