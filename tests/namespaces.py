"""Machines as network namespaces of this one (Linux, root): homes, routers that translate, public machines.

homeA -(192.168.1.0/24)- routerA -(203.0.113.0/24)- routerB -(192.168.2.0/24)- homeB        public machines beside
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from itertools import count
from typing import Any

_numbers = count()


def why_not(*, translating: bool = False) -> str:
    """Why there can be no namespaces here, in words; empty where there can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root"
    needed = ["ip", "sysctl", "iptables"] if translating else ["ip"]
    missing = [name for name in needed if shutil.which(name) is None]
    if missing:
        return f"network namespaces need {', '.join(missing)} on the PATH"
    probe = f"probe{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if done.returncode:
        return f"network namespaces cannot be made here: {done.stderr.strip()}"
    try:
        if translating:
            rule = f"ip netns exec {probe} iptables -t nat -A POSTROUTING -j MASQUERADE --random-fully"
            done = subprocess.run(rule.split(), capture_output=True, text=True)
            if done.returncode:
                return f"addresses cannot be translated here: {done.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", probe], check=False)
    return ""


class Namespaces:
    """Made by `add`, joined by `link` or `plug`; `close` ends what runs in them and removes them."""

    def __init__(self) -> None:
        self._prefix = f"t{os.getpid()}n{next(_numbers)}"
        self._names: list[str] = []
        self._processes: list[subprocess.Popen[Any]] = []

    def add(self, *names: str) -> None:
        for name in names:
            self._do("ip", "netns", "add", self._full(name))
            self._names.append(name)
            self._do("ip", "-n", self._full(name), "link", "set", "lo", "up")

    def link(self, one: str, one_address: str, other: str, other_address: str) -> None:
        """A cable; addresses with their prefix length."""
        ends = [(one, f"to-{other}"[:15], one_address), (other, f"to-{one}"[:15], other_address)]
        (first, first_end, _), (second, second_end, _) = ends
        self._do(
            *("ip", "link", "add", first_end, "netns", self._full(first), "type", "veth"),
            *("peer", "name", second_end, "netns", self._full(second)),
        )
        for name, end, address in ends:
            if address:
                self.ip(name, "addr", "add", address, "dev", end)
            self.ip(name, "link", "set", end, "up")

    def switch(self, name: str) -> None:
        """A namespace that is a switch: `plug` joins others to it."""
        self.add(name)
        self.ip(name, "link", "add", "br0", "type", "bridge")
        self.ip(name, "link", "set", "br0", "up")

    def plug(self, name: str, address: str, switch: str) -> None:
        self.link(name, address, switch, "")
        self.ip(switch, "link", "set", f"to-{name}"[:15], "master", "br0", "up")

    def default_route(self, name: str, via: str) -> None:
        self.ip(name, "route", "add", "default", "via", via)

    def translate(self, name: str, outside: str, *, symmetric: bool) -> None:
        """A router at home: what leaves by `outside` gets its address, and nothing comes in that was not asked for.
        A symmetric one gives every connection a port of its own choice.
        """
        chosen = " --random-fully" if symmetric else ""
        self.run(name, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        self.run(name, *f"iptables -t nat -A POSTROUTING -o {outside} -j MASQUERADE{chosen}".split())
        for chain in ("FORWARD", "INPUT"):
            accept = f"iptables -A {chain} -i {outside} -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT"
            self.run(name, *accept.split())
            self.run(name, *f"iptables -A {chain} -i {outside} -j DROP".split())

    def ip(self, name: str, *arguments: str) -> None:
        self._do("ip", "-n", self._full(name), *arguments)

    def run(self, name: str, *command: str) -> str:
        """Runs a command there; its standard output."""
        return self._do("ip", "netns", "exec", self._full(name), *command)

    def popen(self, name: str, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Starts a program there; killed at `close` if it runs still."""
        process = subprocess.Popen(["ip", "netns", "exec", self._full(name), *command], **options)
        self._processes.append(process)
        return process

    def close(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
        for name in self._names:
            subprocess.run(["ip", "netns", "del", self._full(name)], check=False)

    def _full(self, name: str) -> str:
        return f"{self._prefix}{name}"

    def _do(self, *command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout


def two_homes(net: Namespaces, *, symmetric: bool, num_public: int = 1) -> None:
    """homeA and homeB behind routers, and public machines at 203.0.113.50 and up."""
    net.switch("inet")
    for number, side in enumerate("AB", start=1):
        net.add(f"home{side}", f"router{side}")
        net.link(f"home{side}", f"192.168.{number}.2/24", f"router{side}", f"192.168.{number}.1/24")
        net.plug(f"router{side}", f"203.0.113.1{number}/24", "inet")
        net.default_route(f"home{side}", f"192.168.{number}.1")
        net.translate(f"router{side}", "to-inet", symmetric=symmetric)
    for number in range(num_public):
        net.add(f"public{number}")
        net.plug(f"public{number}", f"203.0.113.{50 + number}/24", "inet")
