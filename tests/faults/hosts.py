"""Real hosts on one machine, out of kernel namespaces: each with a raylet, a cable, and a power cord.

A host has its own network, process ids, shared memory and Ray folder; the disk is shared, as a cluster's storage is.
All cables lead to a bridge in a namespace of its own, so nothing shows in the machine's network. Whoever holds the
hosts keeps a pipe to each: when it ends, in whatever way, they end too.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TOOLS = ("ip", "unshare", "nsenter", "mount", "nft")
SUBNET = "10.77.0"
LIMIT_S = 120
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "GRPC_"))},
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}

START = "import sys; from ray.scripts.scripts import main; sys.argv.insert(1, 'start'); main()"
QUIET = ("--object-store-memory=100000000", "--disable-usage-stats", "--include-log-monitor=false")


def has_redis() -> bool:
    """Tell whether Ray's tables can outlive the process of its head."""
    return shutil.which("redis-server") is not None


def missing() -> str:
    """Say what hosts need and this machine does not have; "" when it has all."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts are made of namespaces: that needs root on Linux"
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    if lacking:
        return f"hosts need {', '.join(lacking)}"
    script = "ip link add type veth && nft list tables"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--ipc", "--uts", "--fork", "sh", "-c", script],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"namespaces do not work here: {tried.stderr.strip()}" if tried.returncode else ""


class _Holder:
    """A process that holds namespaces open for as long as this process lives."""

    def __init__(self, spaces: str, script: str) -> None:
        options = [*spaces.split(), "--fork", "--kill-child"]
        self._process = subprocess.Popen(
            ["unshare", *options, "bash", "-c", f"{script}\necho ready; read"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            self.end()
            raise RuntimeError("the namespaces of a host could not be made")
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
        self.pid = int(children.split()[0])

    def end(self) -> None:
        """End all that runs in these namespaces, as if the power had failed."""
        self._process.kill()  # its child, process 1 of the host, goes with it, and all others with that
        self._process.communicate()


class Host:
    """One host. Made by `Hosts`."""

    def __init__(self, hub: _Holder, number: int, ray_folder: str) -> None:
        self.name, self.ip = f"h{number}", f"{SUBNET}.{number}"
        self._hub = hub
        script = [
            "set -e",
            "mount -t proc proc /proc",
            "mount -t tmpfs -o size=1g,mode=1777 tmpfs /dev/shm",
            f"mount -t tmpfs tmpfs {ray_folder}",
            f"hostname {self.name}",  # Ray looks itself up, and would wait for name servers that nobody can reach
            f"echo '127.0.0.1 localhost\n{self.ip} {self.name}' > {ray_folder}/hosts",
            f"mount --bind {ray_folder}/hosts /etc/hosts",
            "mount --bind /dev/null /etc/resolv.conf",
            "ip link set lo up",
        ]
        self._holder = _Holder("--net --mount --pid --ipc --uts --propagation private", "\n".join(script))
        self._space = os.readlink(f"/proc/{self._holder.pid}/ns/pid")
        self._at_hub(f"ip link add {self.name} type veth peer name eth0 netns {self._holder.pid}")
        self._at_hub(f"ip link set {self.name} master bridge up")
        self._here(f"ip addr add {self.ip}/24 dev eth0")
        self._here("ip link set eth0 up")

    def start(self, command: Sequence[str], more: Mapping[str, str] = {}, **options: Any) -> subprocess.Popen[str]:
        """Start a process on the host. more: environment variables."""
        enter = ["nsenter", "-t", str(self._holder.pid), "-m", "-u", "-i", "-n", "-p", "--wdns=/"]
        return subprocess.Popen([*enter, *command], env={**ENVIRONMENT, **more}, text=True, **options)

    def processes(self, name: str) -> list[int]:
        """List the host's processes of a name, by the ids that they have outside."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                is_running = entry.name.isdigit() and bool((entry / "cmdline").read_bytes())
                if is_running and (entry / "comm").read_text().strip() == name:
                    found += [int(entry.name)] * (os.readlink(entry / "ns/pid") == self._space)
            except OSError:
                continue  # it has ended
        return found

    def outside(self, pid: int) -> int:
        """Return the id that a process of the host has outside."""
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                inside = next(x for x in (entry / "status").read_text().splitlines() if x.startswith("NSpid")).split()[
                    -1
                ]
                if inside == str(pid) and os.readlink(entry / "ns/pid") == self._space:
                    return int(entry.name)
            except OSError:
                continue
        raise LookupError(f"{self.name} has no process {pid}")

    # --- faults ------------------------------------------------------------------------------------------------------

    def cut(self) -> None:
        """Pull the cable: nobody is told."""
        self._at_hub(f"ip link set {self.name} down")

    def mend(self) -> None:
        """Put the cable back."""
        self._at_hub(f"ip link set {self.name} up")

    def power_off(self) -> None:
        """Let the host go dark, without a word to anybody."""
        self.cut()
        self._holder.end()

    def kill_raylet(self) -> None:
        for pid in self.processes("raylet"):
            os.kill(pid, signal.SIGKILL)

    def fill_shm(self) -> None:
        """Leave no room in /dev/shm."""
        fill = "cat /dev/zero > /dev/shm/full; df --output=avail /dev/shm"
        with self.start(["bash", "-c", fill], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as filling:
            out, _ = filling.communicate()
        assert out.split()[-1] == "0", out

    def cut_from(self, other: Host) -> None:
        """Cut what goes between this host and another, both ways; both still reach all others."""
        self._drop(f"in ip saddr {other.ip}", f"out ip daddr {other.ip}")

    def lose(self, percent: float) -> None:
        """Lose packets at random, both ways."""
        some = f"numgen random mod 10000 < {percent * 100:.0f}"
        self._drop(f"in iifname eth0 {some}", f"out oifname eth0 {some}")

    def repair(self) -> None:
        """End what `cut_from` and `lose` did."""
        self._here("nft flush ruleset")

    def end(self) -> None:
        self._holder.end()

    def _drop(self, *rules: str) -> None:
        base = "add table inet rig; " + "".join(
            f"add chain inet rig {way} {{ type filter hook {way}put priority 0; }}; " for way in ("in", "out")
        )
        self._here(["nft", base + "; ".join(f"add rule inet rig {rule} drop" for rule in rules)])

    def _here(self, command: str | Sequence[str]) -> None:
        _done(["nsenter", "-t", str(self._holder.pid), "-n", *_words(command)])

    def _at_hub(self, command: str) -> None:
        _done(["nsenter", "-t", str(self._hub.pid), "-n", *_words(command)])


class Hosts:
    """A cluster: a head, on which the driver runs, and hosts with one CPU each. Ray has its default settings."""

    def __init__(self, count: int) -> None:
        self._numbers = iter(range(2, 250))
        self._folder = tempfile.mkdtemp(prefix="lr", dir="/tmp")  # short: Ray puts sockets into it
        self._hub = _Holder("--net", "ip link set lo up; ip link add bridge type bridge; ip link set bridge up")
        self._all: list[Host] = []
        try:
            self.head = Host(self._hub, 1, self._folder)
            self._all.append(self.head)
            self._redis = self._start_redis()
            self.driver = self.head.start(
                [sys.executable, "-m", "tests.faults.host_driver", self.head.ip, self._folder],
                self._redis,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=ROOT,
            )
            self._address = self.answer()["address"]
            self.workers: list[Host] = []
            self.add(count)
        except BaseException:
            self.end()
            raise

    def _start_redis(self) -> dict[str, str]:
        """Keep Ray's tables out of the process of its head, where there is Redis; return what tells Ray of it."""
        if not has_redis():
            return {}
        options = ["--port", "6379", "--save", "", "--bind", "127.0.0.1", "--protected-mode", "no"]
        with open(self._log(self.head), "w") as log:
            self.head.start(["redis-server", *options], stdout=log, stderr=log)
        return {"RAY_REDIS_ADDRESS": "127.0.0.1:6379"}

    def kill_gcs(self) -> Callable[[], None]:
        """Kill Ray's head process; return what starts it again."""
        (pid,) = self.head.processes("gcs_server")
        port = self._address.rpartition(":")[2]
        options = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]
        command = [each.replace("--gcs_server_port=0", f"--gcs_server_port={port}") for each in options]
        os.kill(pid, signal.SIGKILL)
        until(lambda: not self.head.processes("gcs_server"), "the end of Ray's head")  # it has the port
        return lambda: self._start_gcs(command)

    def _start_gcs(self, command: Sequence[str]) -> None:
        self.head.start(command, self._redis, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def add(self, count: int) -> None:
        """Start more hosts, two at a time: on a busy machine more would not be up when Ray wants them."""
        for start in range(0, count, 2):
            for host, process in [self._start_host() for _ in range(min(2, count - start))]:
                if process.wait(LIMIT_S):  # once more
                    host.end()
                    host, process = self._start_host()
                if process.wait(LIMIT_S):
                    raise RuntimeError(f"ray start failed on {host.name}: {Path(self._log(host)).read_text()}")
                self.workers.append(host)

    def _start_host(self) -> tuple[Host, subprocess.Popen[str]]:
        host = Host(self._hub, next(self._numbers), self._folder)
        self._all.append(host)
        options = [f"--address={self._address}", f"--node-ip-address={host.ip}", "--num-cpus=1", *QUIET]
        with open(self._log(host), "w") as log:
            return host, host.start([sys.executable, "-c", START, *options], stdout=log, stderr=log)

    def _log(self, host: Host) -> str:
        return f"{self._folder}.{host.name}.log"

    def ask(self, **question: Any) -> None:
        """Have the driver do something."""
        assert self.driver.stdin is not None
        self.driver.stdin.write(json.dumps(question) + "\n")
        self.driver.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Wait for the driver's answer."""
        assert self.driver.stdout is not None
        line = self.driver.stdout.readline()
        if not line:
            raise RuntimeError("the driver on the head has ended")
        found: dict[str, Any] = json.loads(line)
        return found

    def of(self, ip: str) -> Host:
        """Return the host of an address."""
        return next(host for host in self.workers if host.ip == ip)

    def end(self) -> None:
        """End all hosts, and leave nothing behind."""
        for host in self._all:
            host.end()
        self._hub.end()
        shutil.rmtree(self._folder, ignore_errors=True)
        for host in self._all:
            Path(self._log(host)).unlink(missing_ok=True)


@contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """Make a cluster of hosts, and end it."""
    made = Hosts(count)
    try:
        yield made
    finally:
        made.end()


def until(is_so: Callable[[], Any], what: str, limit_s: float = LIMIT_S) -> Any:
    """Wait until something is so; return what it is."""
    deadline_s = time.monotonic() + limit_s
    while not (found := is_so()):
        assert time.monotonic() < deadline_s, f"{what}: not within {limit_s:g} s"
        time.sleep(0.02)
    return found


def _words(command: str | Sequence[str]) -> Sequence[str]:
    return shlex.split(command) if isinstance(command, str) else command


def _done(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}: {done.stderr}")
