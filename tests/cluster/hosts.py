"""A cluster on one machine: hosts as network namespaces, on links of a set rate.

Needs root, iproute2 and the kernel's token bucket filter. What is made is removed again.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import socket
import string
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NETWORK = "10.77.0"
REQUIRED = "JAXLWP_CLUSTER_REQUIRED"
"""Environment variable: this machine has made a cluster, so one that cannot be made is a fault."""
_NUMBERS = itertools.count()


class NotAllowed(Exception):
    """This machine lets nobody make a cluster; says why."""


@dataclass(frozen=True)
class Cluster:
    """Hosts that run.

    Attributes:
      count: of hosts.
      namespaces: their network namespaces.
      ports: the switch's side of each host's link.
    """

    count: int
    namespaces: tuple[str, ...]
    ports: tuple[str, ...]
    running: list[subprocess.Popen[str]] = field(default_factory=list)

    def coordinator(self, port: int) -> str:
        """Address at which JAX's processes find the first."""
        return f"{NETWORK}.1:{port}"

    def start(
        self, host: int, command: Sequence[str], environment: Mapping[str, str], **pipes: Any
    ) -> subprocess.Popen[str]:
        """Start a command on a host, with devices of its own; it is killed with the cluster."""
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.namespaces[host], *command],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | environment,
            text=True,
            **pipes,
        )
        self.running.append(process)
        return process

    def set_rate(self, rate: str | None) -> None:
        """Limit what each host sends and receives, as in "200mbit"; None for no limit."""
        for namespace, port in zip(self.namespaces, self.ports, strict=True):
            for prefix, device in ((["ip", "netns", "exec", namespace], "eth0"), ([], port)):
                queue = [*prefix, "tc", "qdisc"]
                subprocess.run([*queue, "del", "dev", device, "root"], capture_output=True)
                if rate is not None:
                    limit = f"root tbf rate {rate} burst 256kb latency 50ms".split()
                    _run(*queue, "add", "dev", device, *limit)

    def cut(self, host: int) -> None:
        """Take a host off the network, as if its power had failed."""
        _run("ip", "link", "set", self.ports[host], "down")

    def join(self, host: int) -> None:
        """Put it back."""
        _run("ip", "link", "set", self.ports[host], "up")


@contextlib.contextmanager
def cluster(count: int) -> Iterator[Cluster]:
    """Hosts, each in a network namespace of its own, on one switch.

    Args:
      count: of hosts.

    Raises:
      NotAllowed: this machine does not let us.
    """
    # Names of their own: the kernel may still be removing those of a cluster before.
    own = f"lwp{os.getpid()}{string.ascii_lowercase[next(_NUMBERS) % 26]}"
    made = Cluster(
        count,
        tuple(f"{own}h{n}" for n in range(count)),
        tuple(f"{own}p{n}" for n in range(count)),
    )
    bridge = f"{own}b"
    _check_tools()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that it is removed
    try:
        try:
            _run("ip", "link", "add", bridge, "type", "bridge")
            _run("ip", "link", "set", bridge, "up")
            for host in range(count):
                _add_host(made, host, bridge)
            made.set_rate("10gbit")
            made.set_rate(None)
        except subprocess.CalledProcessError as error:
            why = " ".join((error.stderr or str(error)).split())
            raise NotAllowed(f"{' '.join(error.cmd)}: {why}") from error
        yield made
    finally:
        for process in made.running:
            process.kill()
            process.wait()
        for port in made.ports:
            subprocess.run(["ip", "link", "del", port], capture_output=True)
        for namespace in made.namespaces:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)
            shutil.rmtree(f"/etc/netns/{namespace}", ignore_errors=True)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True)
        signal.signal(signal.SIGTERM, before)


def _check_tools() -> None:
    if sys.platform != "linux" or os.geteuid() != 0:
        raise NotAllowed("network namespaces need Linux and root")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise NotAllowed(f"there is no {tool} (iproute2)")


def _add_host(made: Cluster, host: int, bridge: str) -> None:
    namespace, port, address = made.namespaces[host], made.ports[host], f"{NETWORK}.{host + 1}"
    inside = ("ip", "netns", "exec", namespace)
    _run("ip", "netns", "add", namespace)
    _run("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", namespace)
    _run("ip", "link", "set", port, "master", bridge, "up")
    _run(*inside, "ip", "addr", "add", f"{address}/24", "dev", "eth0")
    _run(*inside, "ip", "link", "set", "eth0", "up")
    _run(*inside, "ip", "link", "set", "lo", "up")
    # gloo binds to the address of the machine's name: in here that is the namespace's own.
    names = Path(f"/etc/netns/{namespace}")
    names.mkdir(parents=True, exist_ok=True)
    (names / "hosts").write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def devices(count: int) -> dict[str, str]:
    """Environment of a process that simulates so many devices."""
    return {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
