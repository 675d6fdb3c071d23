"""Hosts with their own names, addresses and processes on one machine, joined by a cable that can be cut, for tests."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CABLE = "eth0"
ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2"}


class Host:
    """Linux namespaces of their own: network, host name, processes and mounts. The disk is that of the machine."""

    def __init__(self, name: str, names: Path) -> None:
        self.name, self.address, self._names = name, ADDRESSES[name], names
        self.power_on()

    def power_on(self) -> None:
        steps = (
            f"hostname {self.name}",
            f"mount --bind {self._names} /etc/hosts",
            "ip link set lo up",
            "echo",
            "exec cat",
        )
        unshare = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        pipe = subprocess.PIPE
        self._holder = subprocess.Popen(
            [*unshare, "sh", "-c", " && ".join(steps)], stdin=pipe, stdout=pipe, stderr=pipe
        )
        assert self._holder.stdout is not None
        if not self._holder.stdout.readline():
            pytest.skip(f"no host of its own here: {self._holder.communicate()[1].decode().strip()}")
        self.pid = int(Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()[0])

    def power_off(self) -> None:
        """End all of its processes, and its end of the cable with them."""
        self._holder.kill()
        self._holder.communicate()

    def start(self, *command: str, cwd: Path, **environment: str) -> subprocess.Popen[str]:
        """A command on this host."""
        enter = ["nsenter", f"--target={self.pid}", "--net", "--uts", "--mount", "--pid", f"--wdns={cwd}"]
        env, pipe = {**os.environ, **environment}, subprocess.PIPE
        return subprocess.Popen([*enter, *command], text=True, stdout=pipe, stderr=pipe, env=env)

    def ip(self, *arguments: str) -> None:
        subprocess.run(["nsenter", f"--target={self.pid}", "--net", "ip", *arguments], check=True)

    def unplug(self) -> None:
        """Cut its cable: what is sent is lost, and no connection hears of it."""
        self.ip("link", "set", CABLE, "down")

    def plug_in(self) -> None:
        self.ip("link", "set", CABLE, "up")


def lay_cable(a: Host, b: Host) -> None:
    """Join two hosts that have none."""
    cable = ["ip", "link", "add", CABLE, "netns", str(a.pid), "type", "veth", "peer", "name", CABLE]
    done = subprocess.run([*cable, "netns", str(b.pid)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no cable between hosts here: {done.stderr.strip()}")
    for host in (a, b):
        host.ip("address", "add", f"{host.address}/24", "dev", CABLE)
        host.plug_in()


@contextmanager
def two_hosts(folder: Path) -> Iterator[list[Host]]:
    """Hosts a and b that reach each other by name, or a skipped test where that is not permitted."""
    if os.geteuid() or not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        pytest.skip("hosts of their own need root, util-linux and iproute2")
    names = folder / "hosts"
    names.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in ADDRESSES.items()))
    hosts: list[Host] = []
    try:
        for name in ADDRESSES:
            hosts.append(Host(name, names))
        lay_cable(*hosts)
        yield hosts
    finally:
        for host in hosts:
            host.power_off()
