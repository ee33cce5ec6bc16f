"""How fast apssh is beside the other tools that do the same: time, CPU and memory of the client,
all sides in one run.

    python bench/bench.py --setup        make the environments of the two peers from PyPI, once
    python bench/bench.py                all rows; a table in Markdown
    python bench/bench.py --list         the rows
    python bench/bench.py --row 'push*' --row start --runs 9

Servers are on loopback addresses and end with the run: for many hosts a fleet of asyncssh servers
(fleet.py), behind a relay where distance matters; for one host, and for twenty that print or take
files, a real sshd. Each has a key made for the run. In each row the sides take turns; what they
print and copy is checked. Wall time, CPU (user and system time of the process and of all that it
waited for) and memory (of the largest process) are the client's. Ratios are of medians, in brackets
the smallest and largest ratio of one turn. Linux, with Debian's openssh-server, pssh, pdsh,
clustershell, rsync and time; what is missing is said.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import filecmp
import fnmatch
import getpass
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PEERS = {"apssh-0.27": ["apssh==0.27.0"], "parallel-ssh": ["parallel-ssh", "setuptools"]}
DELAY = 0.02  # seconds that the relay adds, each way
MIB = 1024 * 1024
LIBRARY = """
import sys
from pssh.clients import ParallelSSHClient
key, port, user, command, *hosts = sys.argv[1:]
client = ParallelSSHClient(
    hosts,
    user=user,
    port=int(port),
    pkey=key,
    pool_size=len(hosts),
    allow_agent=False,
    identity_auth=False,
)
output = client.run_command(command)
for each in output:
    for line in each.stdout:
        print(f"{each.host}:{line}")
client.join(output)
assert all(each.exit_code == 0 for each in output)
"""
CAPTURED = """
import sys, apssh
key, port, user, host, command = sys.argv[1:]
(result,) = apssh.run(host, command, keys=[key], port=int(port), login=user)
assert result.ok, result
print(len(result.stdout))
"""


class Failure(Exception):
    """A side that did not do its work."""


# --------------------------------------------------------------------------------------------------


class Rig:
    """A folder with keys, configs and data; the servers; and how each tool is called. Everything
    ends with it.
    """

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.user = getpass.getuser()
        self.port = _free_port()
        self.fleet = [
            f"127.30.{number // 250}.{number % 250 + 1}" for number in range(options.hosts)
        ]
        self.far = [f"127.31.{number // 250}.{number % 250 + 1}" for number in range(options.hosts)]
        self.real = [f"127.20.0.{number}" for number in range(1, 21)]
        self.apart = [f"127.21.0.{number}" for number in range(1, 21)]
        self.crowd = [
            f"127.22.{number // 250}.{number % 250 + 1}" for number in range(options.hosts)
        ]
        self.places = folder / "places"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._started: set[str] = set()
        self.home = folder / "home"
        (self.home / ".ssh").mkdir(parents=True, mode=0o700)
        self.key, self.known_hosts = folder / "key", self.home / ".ssh" / "known_hosts"
        for name in ("key", "host_key"):
            subprocess.run(
                [
                    "ssh-keygen",
                    "-q",
                    "-t",
                    "ed25519",
                    "-N",
                    "",
                    "-C",
                    "bench",
                    "-f",
                    str(folder / name),
                ],
                check=True,
            )
        host_key = " ".join((folder / "host_key.pub").read_text().split()[:2])
        form = "{} {}\n" if self.port == 22 else f"[{{}}]:{self.port} {{}}\n"
        everywhere = [*self.real, *self.apart, *self.crowd, *self.fleet, *self.far]
        self.known_hosts.write_text("".join(form.format(host, host_key) for host in everywhere))
        self.config = self.home / ".ssh" / "config"
        self.config.write_text(
            f"Host *\nPort {self.port}\nUser {self.user}\n"
            f"IdentityFile {self.key}\nIdentitiesOnly yes\n"
            f"UserKnownHostsFile {self.known_hosts}\nGlobalKnownHostsFile /dev/null\n"
            "StrictHostKeyChecking yes\n"
            "IdentityAgent none\nBatchMode yes\nLogLevel ERROR\n"
        )
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "USER": self.user,
            "LOGNAME": self.user,
            "LANG": "C.UTF-8",
            "PDSH_SSH_ARGS_APPEND": f"-F {self.config}",
        }
        self._install()

    def _install(self) -> None:
        """apssh as pip would put it: a module, which Python compiles once, and three small
        programs.
        """
        self.site, self.bin = self.folder / "site", self.folder / "bin"
        self.site.mkdir()
        self.bin.mkdir()
        shutil.copy(self.options.program, self.site / "apssh.py")
        for name, function in (("apssh", "main"), ("appush", "main_push"), ("appull", "main_pull")):
            program = self.bin / name
            program.write_text(
                f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(self.site)!r})\n"
                f"from apssh import {function}\nsys.exit({function}())\n"
            )
            program.chmod(0o755)

    def close(self) -> None:
        """End the servers, and what they have started, by process id."""
        for process in self._processes:
            below = _descendants(process.pid)
            if process.stdin:
                process.stdin.close()
            else:
                process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pid in below:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)

    # servers, each started when a row first asks for it

    def _once(self, name: str) -> bool:
        fresh = name not in self._started
        self._started.add(name)
        return fresh

    def _helper(self, *words: object) -> None:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "fleet.py"), *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self.environment,
        )
        self._processes.append(process)
        assert process.stdout
        if process.stdout.readline() != b"ready\n":
            raise SystemExit("bench: the fleet does not start")

    def need_fleet(self, *, far: bool = False) -> None:
        """The cheap servers, in two processes; the relay before them."""
        if self._once("fleet"):
            for part in (self.fleet[::2], self.fleet[1::2]):
                self._helper(
                    "servers", self.port, self.folder / "host_key", self.folder / "key.pub", *part
                )
        if far and self._once("relay"):
            self._helper(
                "relay",
                self.port,
                DELAY,
                *(f"{near}:{to}" for near, to in zip(self.far, self.fleet, strict=True)),
            )

    def need_sshd(self) -> None:
        """A real sshd on twenty addresses."""
        if self._once("sshd"):
            self._sshd(self.real)

    def need_crowd(self) -> None:
        """As many real hosts as the fleet has."""
        if self._once("crowd"):
            self._sshd(self.crowd)

    def need_folders(self) -> None:
        """Another on twenty addresses, only for copies: each address has a folder of its own, where
        paths begin.
        """
        if self._once("folders"):
            self._sshd(
                self.apart,
                "".join(
                    f"Match LocalAddress {host}\n"
                    f"ForceCommand internal-sftp -d {self.places / host}\n"
                    for host in self.apart
                ),
            )

    def _sshd(self, hosts: list[str], more: str = "") -> None:
        if os.geteuid() == 0:
            os.makedirs("/run/sshd", exist_ok=True)
        sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
        if not sshd:
            raise SystemExit("bench: no sshd: install openssh-server")
        log = self.folder / "sshd.log"
        common = (
            f"Port {self.port}\nHostKey {self.folder}/host_key\n"
            f"AuthorizedKeysFile {self.folder}/key.pub\nPidFile none\nStrictModes no\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\nUsePAM no\n"
            "PrintMotd no\nPrintLastLog no\nUseDNS no\n"
            "MaxStartups 200\nMaxSessions 100\nCompression no\nLogLevel ERROR\n"
            f"SetEnv HOME={self.places}\n"  # no start-up file of whoever measures
            "Subsystem sftp internal-sftp\n"
        )
        for part in (
            hosts[start : start + 16] for start in range(0, len(hosts), 16)
        ):  # one listens on no more addresses
            config = self.folder / f"sshd_config-{part[0]}"
            config.write_text(common + "".join(f"ListenAddress {host}\n" for host in part) + more)
            self._processes.append(
                subprocess.Popen(
                    [sshd, "-D", "-f", str(config), "-E", str(log)], stdin=subprocess.DEVNULL
                )
            )
        for host in hosts:
            _wait_for(host, self.port, log)

    # how each tool is called; None with the reason in `missing` when it is not here

    def apssh(self, hosts: list[str], *words: object, program: str = "apssh") -> list[str]:
        targets = [word for host in hosts for word in ("-t", host)]
        if len(hosts) > 1:
            targets = ["-t", self.hosts_file(hosts)]
        return [
            str(self.bin / program),
            "-k",
            str(self.key),
            "-F",
            "none",
            "--no-last",
            "-q",
            "-l",
            self.user,
            "-p",
            str(self.port),
            *targets,
            *map(str, words),
        ]

    def old(self, hosts: list[str], *words: object, program: str = "apssh") -> list[str] | None:
        path = self.peer("apssh-0.27", program) if self.port == 22 else None
        return (
            path
            if path is None
            else [
                path,
                "-k",
                str(self.key),
                "-l",
                self.user,
                "-t",
                self.hosts_file(hosts),
                *map(str, words),
            ]
        )

    def gather(self, hosts: list[str], command: str) -> list[str]:
        return [
            sys.executable,
            str(HERE / "gather.py"),
            str(self.key),
            str(self.known_hosts),
            str(self.port),
            self.user,
            command,
            *hosts,
        ]

    def library(self, hosts: list[str], command: str) -> list[str] | None:
        path = self.peer("parallel-ssh", "python")
        return (
            path
            if path is None
            else [path, "-c", LIBRARY, str(self.key), str(self.port), self.user, command, *hosts]
        )

    def ssh(self, host: str, command: str) -> list[str]:
        return ["ssh", "-F", str(self.config), host, command]

    def pssh(self, hosts: list[str], *words: str, at_once: int = 0) -> list[str] | None:
        return _tool(
            "parallel-ssh",
            "-h",
            self.hosts_file(hosts),
            "-p",
            str(at_once or len(hosts)),
            "-t",
            "0",
            "-x",
            f"-F {self.config}",
            *words,
        )

    def pscp(self, hosts: list[str], *words: str) -> list[str] | None:
        return _tool(
            "parallel-scp",
            "-h",
            self.hosts_file(hosts),
            "-p",
            str(len(hosts)),
            "-x",
            f"-F {self.config}",
            *words,
        )

    def pdsh(self, hosts: list[str], command: str, at_once: int = 0) -> list[str] | None:
        return _tool(
            "pdsh",
            "-R",
            "ssh",
            "-S",
            "-t",
            "60",
            "-f",
            str(at_once or len(hosts)),
            "-w",
            f"^{self.hosts_file(hosts)}",
            command,
        )

    def clush(self, hosts: list[str], command: str, at_once: int = 0) -> list[str] | None:
        return _tool(
            "clush",
            "-n",
            "-S",
            "-t",
            "60",
            "-f",
            str(at_once or len(hosts)),
            "--hostfile",
            self.hosts_file(hosts),
            "-o",
            f"-F {self.config}",
            command,
        )

    def scp(self, *words: object) -> list[str]:
        return ["scp", "-q", "-F", str(self.config), *map(str, words)]

    def rsync(self, *words: object) -> list[str] | None:
        return _tool("rsync", "-a", "-e", f"ssh -F {self.config}", *map(str, words))

    def peer(self, environment: str, program: str) -> str | None:
        path = Path(self.options.peers) / environment / "bin" / program
        return str(path) if path.exists() else None

    def hosts_file(self, hosts: list[str]) -> str:
        path = self.folder / f"hosts-{hosts[0]}-{len(hosts)}"
        if not path.exists():
            path.write_text("".join(f"{host}\n" for host in hosts))
        return str(path)

    # data

    def data(self, size: int) -> Path:
        """A file of so many MiB that cannot be compressed."""
        path = self.folder / f"data-{size}"
        if not path.exists():
            seed = random.Random(size)
            with path.open("wb") as file:
                for _ in range(size):
                    file.write(seed.randbytes(MIB))
        return path

    def tree(self) -> Path:
        """2,000 files of 2 KB in 40 folders, two deep."""
        top = self.folder / "tree"
        if not top.exists():
            seed = random.Random(2)
            for number in range(2000):
                path = top / f"d{number % 8}" / f"e{number // 8 % 5}" / f"file{number}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(seed.randbytes(2048))
        return top

    def place(self) -> Path:
        """A new empty folder to copy into."""
        return Path(tempfile.mkdtemp(prefix="copy-", dir=self.folder))


def _free_port() -> int:
    """22 where it can be had, since apssh 0.27 knows no other."""
    with contextlib.suppress(OSError), socket.create_server(("127.20.0.1", 22)):
        return 22
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _wait_for(host: str, port: int, log: Path) -> None:
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection((host, port), 1):
            return
        time.sleep(0.05)
    raise SystemExit(f"bench: sshd does not start: {log.read_text()}")


def _descendants(pid: int) -> list[int]:
    """The processes below one of ours."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents.setdefault(int(entry.read_text().rpartition(")")[2].split()[1]), []).append(
                int(entry.parent.name)
            )
    found = list(parents.get(pid, []))
    for each in found:
        found += parents.get(each, [])
    return found


def _tool(name: str, *words: str) -> list[str] | None:
    return [name, *words] if shutil.which(name) else None


# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Measure:
    """What one turn of one side took."""

    wall: float  # seconds
    cpu: float
    first: float  # seconds to the first byte on stdout
    memory: float  # MiB


@dataclasses.dataclass
class Side:
    """One tool at one work. ``check`` gets the size of its stdout and, with ``kept``, the file that
    holds it; it raises Failure.
    """

    name: str
    argv: list[str] | None
    check: Callable[[int, Path], None] = lambda size, path: None
    before: Callable[[], object] = lambda: None
    kept: bool = False


def _measure(rig: Rig, side: Side) -> Measure:
    assert side.argv
    side.before()
    gnu_time, report, kept = shutil.which("time"), rig.folder / "time", rig.folder / "stdout"
    argv = [gnu_time, "-o", str(report), "-f", "%M", *side.argv] if gnu_time else side.argv
    with tempfile.TemporaryFile(dir=rig.folder) as err, kept.open("wb") as out:
        begin = time.monotonic()
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=out if side.kept else subprocess.PIPE,
            stderr=err,
            env=rig.environment,
            cwd=rig.folder,
            start_new_session=True,
        )
        first, size, status = 0.0, 0, None
        signal.setitimer(signal.ITIMER_REAL, rig.options.timeout)
        try:
            if process.stdout:
                while data := os.read(process.stdout.fileno(), MIB):
                    first = first or time.monotonic() - begin
                    size += len(data)
            _, status, usage = os.wait4(process.pid, 0)
            wall = time.monotonic() - begin
        except _TimeUp:
            raise Failure(f"no end within {rig.options.timeout:g} s") from None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            if status is None:
                os.killpg(process.pid, signal.SIGKILL)
                os.waitpid(process.pid, 0)
            process.returncode = 0 if status is None else os.waitstatus_to_exitcode(status)
            if process.stdout:
                process.stdout.close()
        err.seek(0)
        if status:
            raise Failure(
                f"status {process.returncode}: " + err.read().decode(errors="replace").strip()[:300]
            )
    side.check(kept.stat().st_size if side.kept else size, kept)
    memory = int(report.read_text().split()[-1]) if gnu_time else usage.ru_maxrss
    return Measure(wall, usage.ru_utime + usage.ru_stime, first or wall, memory / 1024)


class _TimeUp(Exception):
    """From the timer."""


# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Bar:
    """``what`` of one side, at most so many times that of another; or, against nobody, at most so
    many MiB or seconds.
    """

    what: str
    side: str
    against: str
    limit: float
    over: str = ""  # what this side takes is taken off first

    def value(self, turns: dict[str, list[Measure]], pick: Callable[[list[float]], float]) -> float:
        """The ratio, from one number for each side."""
        mine = pick([getattr(each, self.what) for each in turns[self.side]])
        if self.over:
            mine -= pick([getattr(each, self.what) for each in turns[self.over]])
        return (
            mine / pick([getattr(each, self.what) for each in turns[self.against]])
            if self.against
            else mine
        )


@dataclasses.dataclass
class Row:
    """One line of the table."""

    name: str
    work: str
    sides: list[Side]
    bars: list[Bar]
    times: int = 1  # cheap rows take more turns


ROWS: dict[str, tuple[str, Callable[[Rig], Row]]] = {}


def row(name: str, work: str) -> Callable[[Callable[[Rig], tuple[Any, ...]]], None]:
    """Register a row; it is built, and its servers started, when it is run."""

    def register(build: Callable[[Rig], tuple[Any, ...]]) -> None:
        ROWS[name] = work, lambda rig: Row(name, work, *build(rig))

    return register


def _sized(size: int) -> Callable[[int, Path], None]:
    def check(found: int, path: Path) -> None:
        if found != size:
            raise Failure(f"{found:,} bytes of output in place of {size:,}")

    return check


def _many(rig: Rig, hosts: list[str], at_once: int = 0) -> list[Side]:
    """The sides that run ``true`` on many hosts."""
    return [
        Side("apssh", rig.apssh(hosts, "-w", at_once, "true")),
        Side("bare gather", rig.gather(hosts, "true")),
        Side("pssh", rig.pssh(hosts, "true", at_once=at_once)),
        Side("pdsh", rig.pdsh(hosts, "true", at_once)),
        Side("clush", rig.clush(hosts, "true", at_once)),
        Side("parallel-ssh library", rig.library(hosts, "true")),
        Side("apssh 0.27", rig.old(hosts, "true")),
    ]


def _true_bars() -> list[Bar]:
    return [
        Bar("cpu", "apssh", "bare gather", 1.15),
        *(Bar("cpu", "apssh", peer, 1 / 8) for peer in ("pssh", "pdsh", "clush")),
    ]


@row("true-cpu", "`true` on many hosts (OpenSSH's servers), client CPU")
def _true_cpu(rig: Rig) -> tuple[Any, ...]:
    rig.need_crowd()
    return _many(rig, rig.crowd), _true_bars()


@row("true-fleet", "`true` on many hosts (asyncssh's servers), client CPU")
def _true_fleet(rig: Rig) -> tuple[Any, ...]:
    rig.need_fleet()
    return _many(rig, rig.fleet), _true_bars()[
        :1
    ]  # ssh agrees on a cheaper key exchange with these than with its own servers


@row("true-wall", "`true` on many hosts, 20 ms away each way, wall")
def _true_wall(rig: Rig) -> tuple[Any, ...]:
    rig.need_fleet(far=True)
    peers = ("pssh", "pdsh", "clush", "parallel-ssh library", "apssh 0.27")
    return _many(rig, rig.far), [
        Bar("wall", "apssh", "bare gather", 1.1),
        *(Bar("wall", "apssh", peer, 1) for peer in peers),
    ]


@row("echo", "first output of `echo`, one host, start-up taken off")
def _echo(rig: Rig) -> tuple[Any, ...]:
    rig.need_sshd()
    host = rig.real[0]
    return (
        [
            Side("apssh", rig.apssh([host], "echo hello"), _sized(len(host) + 7)),
            Side("ssh", rig.ssh(host, "echo hello"), _sized(6)),
            Side("apssh --version", [str(rig.bin / "apssh"), "--version"]),
            Side("bare gather", rig.gather([host], "echo hello"), _sized(len(host) + 7)),
            Side("apssh 0.27", rig.old([host], "echo hello")),
        ],
        [Bar("first", "apssh", "ssh", 1, over="apssh --version")],
        3,
    )


LINES = 2_000_000
DIGITS = len("".join(f"{number}\n" for number in range(1, LINES + 1)))


@row("seq", "`seq 1 2000000` from one host, host-prefixed, to a pipe")
def _seq(rig: Rig) -> tuple[Any, ...]:
    rig.need_sshd()
    host, command = rig.real[0], f"seq 1 {LINES}"
    prefixed, spaced = (
        _sized(DIGITS + LINES * (len(host) + 1)),
        _sized(DIGITS + LINES * (len(host) + 2)),
    )
    return [
        Side("apssh", rig.apssh([host], command), prefixed),
        Side("ssh", rig.ssh(host, command), _sized(DIGITS)),
        Side("pdsh", rig.pdsh([host], command), spaced),
        Side("clush", rig.clush([host], command), spaced),
        Side("pssh -P", rig.pssh([host], "-P", command)),
        Side("parallel-ssh library", rig.library([host], command), prefixed),
        Side("apssh 0.27", rig.old([host], command)),
    ], [
        Bar("wall", "apssh", "ssh", 1.6),
        Bar("cpu", "apssh", "pdsh", 1 / 4),
        Bar("cpu", "apssh", "clush", 1 / 40),
        Bar("memory", "apssh", "", 80),
    ]


@row("forms", "the same in the other forms of output")
def _forms(rig: Rig) -> tuple[Any, ...]:
    rig.need_sshd()
    host, command = rig.real[0], f"seq 1 {LINES}"
    out = rig.folder / "out"

    def in_folder(size: int, path: Path) -> None:
        _sized(DIGITS)((out / host).stat().st_size, path)

    stamped = len("00-00-00:") + len(host) + 1
    own = len("00-00-00 ") + len(f"{rig.user}@{host} ")
    sides = [
        Side("plain prefix", rig.apssh([host], command), _sized(DIGITS + LINES * (len(host) + 1))),
        Side(
            "-o dir",
            rig.apssh([host], "-o", out, command),
            in_folder,
            lambda: shutil.rmtree(out, ignore_errors=True),
        ),
        Side("-tc", rig.apssh([host], "-tc", command), _sized(DIGITS + LINES * stamped)),
        Side(
            "-f",
            rig.apssh([host], "-f", "{time} {user}{fqdn} {linenl}", command),
            _sized(DIGITS + LINES * own),
        ),
        Side("-b", rig.apssh([host], "-b", command), _at_least(DIGITS)),
        Side("--json", rig.apssh([host], "--json", command), _at_least(DIGITS)),
        Side(
            "captured",
            [
                sys.executable,
                "-c",
                f"import sys; sys.path.insert(0, {str(rig.site)!r})\n{CAPTURED}",
                str(rig.key),
                str(rig.port),
                rig.user,
                host,
                command,
            ],
            _sized(len(f"{DIGITS}\n")),
        ),
    ]
    return sides, [
        Bar(what, side.name, "plain prefix", 2) for side in sides[1:] for what in ("wall", "cpu")
    ]


def _at_least(size: int) -> Callable[[int, Path], None]:
    def check(found: int, path: Path) -> None:
        if found < size:
            raise Failure(f"{found:,} bytes of output, fewer than {size:,}")

    return check


@row("twenty", "20 hosts printing 200,000 lines each at once")
def _twenty(rig: Rig) -> tuple[Any, ...]:
    rig.need_sshd()

    def check(size: int, path: Path) -> None:
        """Whole lines, in order for each host."""
        last = dict.fromkeys((host.encode() for host in rig.real), 0)
        with path.open("rb") as file:
            for line in file:
                host, _, number = line.partition(b":")
                last[host.rstrip()] += 1
                if not number.endswith(b"\n") or number.strip() != b"%d" % last[host.rstrip()]:
                    raise Failure(f"line {line!r} after {last[host.rstrip()] - 1}")
        if set(last.values()) != {200_000}:
            raise Failure(f"lines: {sorted(last.values())}")

    return [
        Side("apssh", rig.apssh(rig.real, "seq 1 200000"), check, kept=True),
        Side("pdsh", rig.pdsh(rig.real, "seq 1 200000"), check, kept=True),
    ], [Bar("memory", "apssh", "", 120)]


@row("long-line", "one line of 200 MB without newline")
def _long_line(rig: Rig) -> tuple[Any, ...]:
    rig.need_sshd()
    host, size = rig.real[0], 200_000_000
    command = f"head -c {size} /dev/zero | tr '\\0' x"

    def prefixed(_: int, path: Path) -> None:
        """Cut in pieces, none of them lost."""
        found, prefix = 0, f"{host}:".encode()
        with path.open("rb") as file:
            for line in file:
                if (
                    not line.startswith(prefix)
                    or line[len(prefix) : -1].strip(b"x")
                    or not line.endswith(b"\n")
                ):
                    raise Failure("a line is broken")
                found += len(line) - len(prefix) - 1
        _sized(size)(found, path)

    def raw(found: int, path: Path) -> None:
        _sized(size)(found, path)
        with path.open("rb") as file:
            while data := file.read(MIB):
                if data.strip(b"x"):
                    raise Failure("a byte is changed")

    return [
        Side("apssh, prefixed", rig.apssh([host], command), prefixed, kept=True),
        Side("apssh -r", rig.apssh([host], "-r", command), raw, kept=True),
        Side("ssh", rig.ssh(host, command), raw, kept=True),
    ], [Bar("memory", "apssh, prefixed", "", 120), Bar("memory", "apssh -r", "", 120)]


@row("random", "100 MB of random bytes, raw")
def _random(rig: Rig) -> tuple[Any, ...]:
    rig.need_sshd()
    data = rig.data(100)

    def check(size: int, path: Path) -> None:
        if _digest(path) != _digest(data):
            raise Failure("not the same bytes")

    return [
        Side("apssh -r", rig.apssh([rig.real[0]], "-r", f"cat {data}"), check, kept=True),
        Side("ssh", rig.ssh(rig.real[0], f"cat {data}"), check, kept=True),
    ], [Bar("memory", "apssh -r", "", 120)]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _copied(rig: Rig, name: str, argv: Callable[[Path], list[str] | None], source: Path) -> Side:
    """A side that copies source to ``copy`` in a folder which is new each time."""
    place = rig.place()

    def before() -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()

    def check(size: int, path: Path) -> None:
        """The same files with the same bytes; they are then removed, so that they weigh on nobody's
        turn.
        """
        copy = place / "copy"
        files = (
            [each.relative_to(source) for each in source.rglob("*") if each.is_file()]
            if source.is_dir()
            else []
        )
        if source.is_dir() and sum(each.is_file() for each in copy.rglob("*")) != len(files):
            raise Failure("the copy has other files")
        for each in files or [Path()]:
            if not filecmp.cmp(source / each, copy / each, shallow=False):
                raise Failure(f"{copy / each} is not the same")
        shutil.rmtree(place)
        filecmp.clear_cache()

    return Side(name, argv(place / "copy"), check, before)


def _copies(rig: Rig, pushing: bool, size: int) -> list[Side]:
    rig.need_sshd()
    host, data = rig.real[0], rig.data(size)
    if pushing:
        return [
            _copied(
                rig, "apssh", lambda to: rig.apssh([host], data, f"@:{to}", program="appush"), data
            ),
            _copied(rig, "scp", lambda to: rig.scp(data, f"{host}:{to}"), data),
            _copied(
                rig,
                "apssh 0.27",
                lambda to: rig.old([host], data, f"@:{to}", program="appush"),
                data,
            ),
        ]
    return [
        _copied(
            rig, "apssh", lambda to: rig.apssh([host], f"@:{data}", to, program="appull"), data
        ),
        _copied(rig, "scp", lambda to: rig.scp(f"{host}:{data}", to), data),
    ]


_COPY_BARS = [Bar("wall", "apssh", "scp", 1.25), Bar("cpu", "apssh", "scp", 1.5)]


@row("push-256", "push 256 MiB, one host")
def _push_256(rig: Rig) -> tuple[Any, ...]:
    return _copies(rig, True, 256), _COPY_BARS


@row("pull-256", "pull 256 MiB, one host")
def _pull_256(rig: Rig) -> tuple[Any, ...]:
    return _copies(rig, False, 256), _COPY_BARS


@row("push-1024", "push 1 GiB, one host")
def _push_1024(rig: Rig) -> tuple[Any, ...]:
    return _copies(rig, True, 1024)[:2], [Bar("wall", "apssh", "scp", 1.3)]


@row("pull-1024", "pull 1 GiB, one host")
def _pull_1024(rig: Rig) -> tuple[Any, ...]:
    return _copies(rig, False, 1024), [Bar("wall", "apssh", "scp", 1.3)]


@row("push-tree", "push 2,000 files of 2 KB in a tree")
def _push_tree(rig: Rig) -> tuple[Any, ...]:
    rig.need_sshd()
    host, tree = rig.real[0], rig.tree()
    return [
        _copied(
            rig,
            "apssh",
            lambda to: rig.apssh([host], "-r", tree, f"@:{to}", program="appush"),
            tree,
        ),
        _copied(rig, "scp -r", lambda to: rig.scp("-r", tree, f"{host}:{to}"), tree),
        _copied(rig, "rsync -a", lambda to: rig.rsync(f"{tree}/", f"{host}:{to}"), tree),
    ], [Bar("wall", "apssh", "scp -r", 0.9)]


@row("pull-tree", "pull 2,000 files of 2 KB in a tree")
def _pull_tree(rig: Rig) -> tuple[Any, ...]:
    rig.need_sshd()
    host, tree = rig.real[0], rig.tree()
    return [
        _copied(
            rig,
            "apssh",
            lambda to: rig.apssh([host], "-r", f"@:{tree}", to, program="appull"),
            tree,
        ),
        _copied(rig, "scp -r", lambda to: rig.scp("-r", f"{host}:{tree}", to), tree),
        _copied(rig, "rsync -a", lambda to: rig.rsync(f"{host}:{tree}/", to), tree),
    ], [Bar("wall", "apssh", "scp -r", 0.9)]


@row("push-20", "push 64 MiB to 20 hosts")
def _push_20(rig: Rig) -> tuple[Any, ...]:
    rig.need_folders()
    data, hosts = rig.data(64), rig.apart

    def before() -> None:
        for host in hosts:
            shutil.rmtree(rig.places / host, ignore_errors=True)
            (rig.places / host).mkdir(parents=True)

    def check(size: int, path: Path) -> None:
        for host in hosts:
            if not filecmp.cmp(data, rig.places / host / "copy", shallow=False):
                raise Failure(f"{host} has other bytes")
        filecmp.clear_cache()
        shutil.rmtree(rig.places)

    return [
        Side("apssh", rig.apssh(hosts, data, "@:copy", program="appush"), check, before),
        Side("parallel-scp", rig.pscp(hosts, str(data), "copy"), check, before),
        Side("apssh 0.27", rig.old(hosts, data, "@:copy", program="appush"), check, before),
    ], [Bar("wall", "apssh", "parallel-scp", 1.3), Bar("cpu", "apssh", "parallel-scp", 1.3)]


@row("start", "start-up: `apssh --version`, `apssh --help`")
def _start(rig: Rig) -> tuple[Any, ...]:
    program = str(rig.bin / "apssh")
    return (
        [
            Side("apssh --version", [program, "--version"]),
            Side("apssh --help", [program, "--help"]),
            Side("import asyncssh", [sys.executable, "-c", "import asyncssh"]),
            Side(
                "python apssh.py --version",
                [sys.executable, str(rig.site / "apssh.py"), "--version"],
            ),
        ],
        [
            Bar("wall", "apssh --version", "import asyncssh", 1.2),
            Bar("wall", "apssh --help", "import asyncssh", 1.2),
        ],
        4,
    )


# --------------------------------------------------------------------------------------------------


def _run(rig: Rig, each: Row) -> dict[str, Any]:
    """Turns of all sides; medians, spreads, ratios."""
    runs = rig.options.runs * each.times
    turns: dict[str, list[Measure]] = {}
    missing = {side.name: "missing" for side in each.sides if not side.argv}
    if "apssh 0.27" in missing and rig.port != 22:
        missing["apssh 0.27"] = "missing: port 22 is not free here, and it knows no other"
    sides = [side for side in each.sides if side.argv]
    for turn in range(runs):
        for side in sides[turn % len(sides) :] + sides[: turn % len(sides)]:
            if side.name in missing:
                continue
            try:
                turns.setdefault(side.name, []).append(_measure(rig, side))
            except Failure as exc:
                missing[side.name] = "failed: " + " ".join(str(exc).split())
                turns.pop(side.name, None)
            _progress(f"{each.name}: turn {turn + 1} of {runs}, {side.name}")
    bars = []
    for bar in each.bars:
        needed = {bar.side, bar.against, bar.over} - {""}
        if gone := sorted(name for name in needed if name not in turns):
            bars.append({**dataclasses.asdict(bar), "verdict": f"{gone[0]} {missing[gone[0]]}"})
            continue
        singles = [
            bar.value({name: [turns[name][turn]] for name in needed}, lambda numbers: numbers[0])
            for turn in range(runs)
        ]
        value = bar.value(turns, statistics.median)
        bars.append(
            {
                **dataclasses.asdict(bar),
                "value": value,
                "least": min(singles),
                "most": max(singles),
                "verdict": "pass" if value <= bar.limit else "MISSED",
            }
        )
    return {
        "name": each.name,
        "work": each.work,
        "runs": runs,
        "bars": bars,
        "sides": [
            {
                "name": side.name,
                "missing": missing.get(side.name),
                "turns": [dataclasses.asdict(turn) for turn in turns.get(side.name, [])],
            }
            for side in each.sides
        ],
    }


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _spread(turns: list[dict[str, float]], what: str) -> str:
    values = [turn[what] for turn in turns]
    return f"{_number(statistics.median(values))} ({_number(min(values))}-{_number(max(values))})"


def _bars_table(results: list[dict[str, Any]]) -> Iterator[str]:
    yield "| work | measure | measured | bar | |"
    yield "| --- | --- | --- | --- | --- |"
    for result in results:
        for bar in result["bars"]:
            who = "" if bar["side"] == "apssh" else f"{bar['side']}: "
            measure = f"{who}{bar['what']}" + (f" less {bar['over']}" if bar["over"] else "")
            measure += f" / {bar['against']}" if bar["against"] else ", MiB"
            fine = _number if bar["limit"] >= 1 else "{:.3f}".format
            measured = (
                f"{fine(bar['value'])} ({fine(bar['least'])}-{fine(bar['most'])})"
                if "value" in bar
                else "-"
            )
            limit = (
                f"{bar['limit']:g}"
                if bar["limit"] >= 1
                else f"1/{1 / bar['limit']:g}"
                if bar["limit"] <= 0.5
                else f"{bar['limit']:g}"
            )
            yield f"| {result['work']} | {measure} | {measured} | {limit} | {bar['verdict']} |"


def _sides_table(results: list[dict[str, Any]]) -> Iterator[str]:
    yield "| work | tool | wall, s | first output, s | CPU, s | memory, MiB |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for result in results:
        for side in result["sides"]:
            if side["missing"]:
                yield f"| {result['work']} | {side['name']} | {side['missing']} | | | |"
                continue
            yield (
                "| "
                + " | ".join(
                    [
                        result["work"],
                        side["name"],
                        *(
                            _spread(side["turns"], what)
                            for what in ("wall", "first", "cpu", "memory")
                        ),
                    ]
                )
                + " |"
            )


def _versions() -> str:
    """What was compared, on what."""
    found = [f"Python {platform.python_version()}"]
    for name, words in (
        ("ssh", ["-V"]),
        ("parallel-ssh", ["--version"]),
        ("pdsh", ["-V"]),
        ("clush", ["--version"]),
        ("rsync", ["--version"]),
    ):
        if shutil.which(name):
            run = subprocess.run(
                [name, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True
            )
            line = (run.stdout or run.stderr).partition("\n")[0].split("  ")[0]
            found.append(line if line[:1].isalpha() else f"{name} {line}")
        else:
            found.append(f"{name} missing")
    return f"{os.cpu_count()} processors; " + ", ".join(found)


def _setup(peers: Path) -> None:
    """An environment for each peer from PyPI."""
    for name, packages in PEERS.items():
        subprocess.run([sys.executable, "-m", "venv", str(peers / name)], check=True)
        subprocess.run(
            [str(peers / name / "bin" / "pip"), "install", "--quiet", *packages], check=True
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--row", action="append", metavar="NAME", help="only these rows; * matches anything"
    )
    parser.add_argument("--list", action="store_true", help="show the rows and stop")
    parser.add_argument(
        "--runs",
        type=int,
        default=5,
        metavar="N",
        help="turns of each side (default 5; quick rows take more)",
    )
    parser.add_argument(
        "--hosts", type=int, default=100, metavar="N", help="hosts of the fleet (default 100)"
    )
    parser.add_argument(
        "--program",
        type=Path,
        default=HERE.parent / "apssh.py",
        metavar="FILE",
        help="another apssh.py",
    )
    parser.add_argument(
        "--peers",
        type=Path,
        default=Path("~/.cache/apssh-bench").expanduser(),
        metavar="DIR",
        help="environments of the peers from PyPI (default ~/.cache/apssh-bench)",
    )
    parser.add_argument("--setup", action="store_true", help="make these environments and stop")
    parser.add_argument(
        "--folder",
        type=Path,
        metavar="DIR",
        help="where to put the data of the run (default: as for all temporary files)",
    )
    parser.add_argument(
        "--timeout", type=float, default=300, metavar="S", help="seconds for one turn (default 300)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measure there too")
    return parser.parse_args()


def _alarm(number: int, frame: object) -> None:
    raise _TimeUp


def _ended(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    """Measure and tell; 1 when a bar is missed or could not be measured."""
    options = _options()
    if options.setup:
        _setup(options.peers)
        return 0
    wanted = [
        name
        for name in ROWS
        if not options.row or any(fnmatch.fnmatch(name, pattern) for pattern in options.row)
    ]
    if options.list or not wanted:
        print("".join(f"{name:10} {ROWS[name][0]}\n" for name in ROWS), end="")
        return 0 if options.list else 2
    signal.signal(signal.SIGALRM, _alarm)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _ended)
    results: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory(prefix="bench-", dir=options.folder) as folder,
        contextlib.closing(Rig(options, Path(folder))) as rig,
    ):
        for name in wanted:
            results.append(_run(rig, ROWS[name][1](rig)))
            _progress("")
            if options.json:
                options.json.write_text(json.dumps(results, indent=1))
    print(
        f"{_versions()}; medians of {options.runs} turns or more, "
        "in brackets the least and the most\n"
    )
    print(*_bars_table(results), "", *_sides_table(results), sep="\n")
    return 0 if all(bar["verdict"] == "pass" for result in results for bar in result["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
