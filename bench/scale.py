"""Thousands of hosts on one machine: what a run of apssh costs, and that nothing goes wrong in it.

    python bench/scale.py [--hosts 5000] [--only NAME ...]

A fleet of cheap ssh servers (asyncssh, a few processes, one listening socket for each 127.x.y.z
address, one host key) stands for the hosts. apssh runs as a person would run it: default options, a
HOME of its own, the soft limit on open files at 1,024. Each case prints what came of it; the exit
code is 1 when one misses its bar. Linux (all of 127/8 is loopback there).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import json
import multiprocessing as mp
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncssh

PROGRAM = Path(__file__).resolve().parent.parent / "apssh.py"
CPU_BAR, MEMORY_BAR = 5.0, 60.0  # milliseconds and KB of the client, a host
SERVERS = 3  # processes of the fleet
SOFT_LIMIT = 1024
SLOW = 5.0  # seconds that a slow host takes for a login
SILENT_TIMEOUT = 10  # seconds until a silent host is given up, by each tool


def addresses(count: int, block: int) -> list[str]:
    """So many loopback addresses, in a second byte of their own."""
    return [f"127.{block}.{number // 250}.{number % 250 + 1}" for number in range(count)]


@dataclasses.dataclass
class Counters:
    """What the servers count, in memory that they share."""

    now: Any = dataclasses.field(default_factory=lambda: mp.Value("i", 0))
    most: Any = dataclasses.field(default_factory=lambda: mp.Value("i", 0))
    total: Any = dataclasses.field(default_factory=lambda: mp.Value("i", 0))
    working: Any = dataclasses.field(
        default_factory=lambda: mp.Value("i", 0)
    )  # commands that sleep

    def add(self, name: str, number: int) -> int:
        """The value then."""
        value = getattr(self, name)
        with value.get_lock():
            value.value += number
            return int(value.value)

    def came(self) -> None:
        self.add("total", 1)
        now = self.add("now", 1)
        with self.most.get_lock():
            self.most.value = max(self.most.value, now)

    def went(self) -> None:
        self.add("now", -1)

    def reset(self) -> None:
        with self.now.get_lock():
            self.most.value, self.total.value = self.now.value, 0


class Server(asyncssh.SSHServer):
    """Counts its connections; forwards whatever is asked (the gateway)."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._counters.came()

    def connection_lost(self, exc: Exception | None) -> None:
        self._counters.went()

    def connection_requested(
        self, dest_host: str, dest_port: int, orig_host: str, orig_port: int
    ) -> bool:
        return True


class SlowServer(Server):
    """Takes SLOW seconds for a login."""

    async def begin_auth(self, username: str) -> bool:
        await asyncio.sleep(SLOW)
        return True


async def session(counters: Counters, process: asyncssh.SSHServerProcess[bytes]) -> None:
    """``sleep N`` waits in the loop, ``echo`` says one line; anything else is done at once."""
    # the guard around it sleeps too, but does not begin with it
    if match := re.search(r"(?:^|\\0047)sleep (\d+)", process.command or ""):
        counters.add("working", 1)
        closed = asyncio.ensure_future(process.wait_closed())
        await asyncio.wait([closed], timeout=int(match[1]))
        closed.cancel()
        counters.add("working", -1)
    with contextlib.suppress(OSError, asyncssh.Error):
        if "echo hello" in (process.command or ""):
            process.stdout.write(b"hello\n")
        process.exit(0)


class Silent(asyncio.Protocol):
    """Accepts and says nothing."""


def serve(
    hosts: list[str], port: int, kind: str, folder: str, counters: Counters, ready: Any
) -> None:
    """One process of the fleet, until it is terminated."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)

    async def main() -> None:
        if kind == "silent":
            await asyncio.get_running_loop().create_server(Silent, hosts, port, backlog=100)
        else:
            key = asyncssh.read_private_key(f"{folder}/host_key")
            kind_of_server = SlowServer if kind == "slow" else Server
            await asyncssh.create_server(
                lambda: kind_of_server(counters),
                hosts,
                port,
                server_host_keys=[key],
                process_factory=functools.partial(session, counters),
                encoding=None,
                backlog=100,
                authorized_client_keys=f"{folder}/home/.ssh/id_ed25519.pub",
                login_timeout=0,
            )
        ready.release()
        await asyncio.Event().wait()

    asyncio.run(main())


@contextlib.contextmanager
def fleet(hosts: list[str], port: int, kind: str, folder: str) -> Iterator[Counters]:
    """Servers on these addresses, in a few processes."""
    context = mp.get_context("fork")
    counters, ready = Counters(), context.Semaphore(0)
    shares = [share for number in range(SERVERS) if (share := hosts[number::SERVERS])]
    servers = [
        context.Process(
            target=serve, args=(share, port, kind, folder, counters, ready), daemon=True
        )
        for share in shares
    ]
    try:
        for server in servers:
            server.start()
        for _ in servers:
            if not ready.acquire(timeout=120):
                raise SystemExit("the fleet did not start")
        yield counters
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.join(10)


def compiled(program: Path) -> list[str]:
    """The words that run it as when it is installed: a script is compiled anew at each start."""
    code = f"import sys; sys.path.insert(0, {str(program.parent)!r}); import apssh"
    return [sys.executable, "-c", f"{code}; sys.argv[0] = 'apssh'; sys.exit(apssh.main())"]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclasses.dataclass
class Outcome:
    """What came of one run of apssh."""

    code: int
    seconds: float
    cpu: float  # seconds, user and system
    memory: int  # KB, at most
    errors: str
    lines: list[tuple[float, dict[str, Any]]]  # -j's, with the time of their coming

    def kinds(self) -> Counter[str]:
        return Counter("ok" if line["status"] == 0 else str(line["kind"]) for _, line in self.lines)


class Client:
    """Runs apssh with a HOME of its own."""

    def __init__(self, folder: str, program: Path) -> None:
        self._folder, self._program = folder, program

    def run(
        self,
        targets: list[str],
        *words: str,
        as_json: bool = False,
        interrupt: Callable[[], bool] | None = None,
    ) -> Outcome:
        """``interrupt``: when to press Ctrl-C; the seconds then count from there."""
        hosts = Path(self._folder, "targets")
        hosts.write_text("".join(f"{target}\n" for target in targets))
        known = Path(self._folder, "home/.ssh/known_hosts")
        known.unlink(missing_ok=True)
        errors = Path(self._folder, "errors")
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("SSH_AUTH_SOCK", "DISPLAY", "APSSH_HOST_KEYS")
        }
        begin = time.monotonic()
        with open(errors, "wb") as err:
            process = subprocess.Popen(
                [
                    *compiled(self._program),
                    "-t",
                    str(hosts),
                    "-l",
                    "root",
                    *(["-j"] if as_json else []),
                    *words,
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=err,
                env=environment | {"HOME": f"{self._folder}/home"},
                preexec_fn=lambda: resource.setrlimit(
                    resource.RLIMIT_NOFILE,
                    (SOFT_LIMIT, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
                ),
            )
        assert process.stdout
        if interrupt:
            while not interrupt() and time.monotonic() < begin + 120:
                time.sleep(0.1)
            os.kill(process.pid, signal.SIGINT)  # not send_signal, which may reap it
            begin = time.monotonic()
        lines = (
            [(time.monotonic() - begin, json.loads(line)) for line in process.stdout]
            if as_json
            else [(0, {}) for _ in process.stdout][:0]
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        process.stdout.close()
        return Outcome(
            process.returncode,
            time.monotonic() - begin,
            usage.ru_utime + usage.ru_stime,
            usage.ru_maxrss,
            errors.read_text(errors="replace"),
            lines,
        )


def first_lines(argv: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Seconds from the start until the first line of each host, of a tool that prefixes lines with
    addresses.
    """
    found: dict[str, float] = {}
    begin = time.monotonic()
    with subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    ) as process:
        assert process.stdout
        for line in process.stdout:
            if match := re.match(rb"([0-9.]+) *:", line):
                found.setdefault(match[1].decode(), time.monotonic() - begin)
    return found


class Cases:
    """The cases; each prints a line and says whether the bars were met."""

    def __init__(self, client: Client, folder: str, options: argparse.Namespace) -> None:
        self._client, self._folder, self._options = client, folder, options
        self._port = free_port()
        hosts = addresses(options.hosts, 1)
        self._hosts = [f"{host}:{self._port}" for host in hosts]
        self._plain = hosts

    def run(self) -> bool:
        with fleet(self._plain, self._port, "ssh", self._folder) as self._counters:
            self._idle = self._client.run(self._hosts[:1], "true")
            good = True
            for name in self._options.only or (
                "true",
                "sleep",
                "silent",
                "window",
                "gateway",
                "first",
                "shards",
                "interrupt",
            ):
                self._counters.reset()
                outcome, notes, fine = getattr(self, f"case_{name}")()
                if not fine:
                    notes += f"; MISSED: {outcome.errors[-300:]!r}"
                print(
                    f"{name:8} {outcome.seconds:6.1f} s  exit {outcome.code}  {notes}", flush=True
                )
                good = good and fine
        return good

    def _cost(self, outcome: Outcome, count: int) -> tuple[str, bool]:
        cpu = (outcome.cpu - self._idle.cpu) * 1000 / count
        memory = (outcome.memory - self._idle.memory) / count
        return (
            f"{cpu:.2f} ms CPU and {memory:.1f} KB a host",
            cpu <= CPU_BAR and memory <= MEMORY_BAR,
        )

    def _all_ok(self, count: int, *words: str) -> tuple[Outcome, str, bool]:
        outcome = self._client.run(self._hosts[:count], *words)
        cost, fine = self._cost(outcome, count)
        fine = fine and outcome.code == 0
        return (
            outcome,
            f"{count} hosts, {' '.join(words)}: {cost}; "
            f"most connections at once {self._counters.most.value}",
            fine,
        )

    def case_true(self) -> tuple[Outcome, str, bool]:
        return self._all_ok(len(self._hosts), "true")

    def case_sleep(self) -> tuple[Outcome, str, bool]:
        count = min(self._options.sleepers, len(self._hosts))
        outcome, notes, fine = self._all_ok(count, "sleep", "20")
        return (
            outcome,
            notes,
            fine and self._counters.most.value == count,
        )  # all of them slept together

    def case_window(self) -> tuple[Outcome, str, bool]:
        outcome, notes, fine = self._all_ok(min(1000, len(self._hosts)), "-w", "100", "true")
        return (
            outcome,
            notes,
            fine and self._counters.most.value <= 110,
        )  # the servers are late to see that one has ended

    def case_interrupt(self) -> tuple[Outcome, str, bool]:
        """Ctrl-C when all of them are at work."""
        count = min(1000, len(self._hosts))
        outcome = self._client.run(
            self._hosts[:count],
            "sleep",
            "60",
            interrupt=lambda: self._counters.working.value == count,
        )
        fine = (
            outcome.code == -signal.SIGINT
            and outcome.seconds < 5
            and outcome.errors.startswith(f"0 ok, {count} interrupted\n  interrupted: ")
        )
        return (
            outcome,
            f"{count} hosts, sleep 60, Ctrl-C: gone after {outcome.seconds:.1f} s",
            fine and "Traceback" not in outcome.errors,
        )

    def case_silent(self) -> tuple[Outcome, str, bool]:
        """Silent hosts spread among the others, which must not notice."""
        step = max(len(self._hosts) // self._options.silent, 1)
        others = self._client.run(self._hosts, "true", as_json=True)
        alone = max(when for when, _ in others.lines)
        targets = list(self._hosts)
        silent = [f"{host}:{self._port}" for host in addresses(self._options.silent, 2)]
        for number, target in enumerate(silent):
            targets.insert(number * (step + 1), target)
        with fleet([target.split(":")[0] for target in silent], self._port, "silent", self._folder):
            outcome = self._client.run(targets, "true", as_json=True)
        kinds = outcome.kinds()
        last = max((when for when, line in outcome.lines if line["status"] == 0), default=0)
        fine = (
            kinds == {"ok": len(self._hosts), "timeout": len(silent)}
            and outcome.code == 1
            and last < alone * 1.2 + 2
        )
        return (
            outcome,
            f"{dict(kinds)}: the last of the others at {last:.1f} s "
            f"({alone:.1f} s without silent ones)",
            fine,
        )

    def case_first(self) -> tuple[Outcome, str, bool]:
        """The first line of each of 1,000 hosts, silent and slow ones among them, beside others."""
        count, others = min(1000, len(self._plain)), self._options.others
        good = self._plain[: count - 2 * others]
        silent, slow = addresses(others, 2), addresses(others, 3)
        targets = list(good)
        step = len(good) // others + 2
        for number, pair in enumerate(zip(silent, slow, strict=True)):
            targets[number * step : number * step] = pair
        hosts = Path(self._folder, "hosts")
        hosts.write_text("".join(f"{host}\n" for host in targets))
        config = Path(self._folder, "config")
        home = f"{self._folder}/home"
        config.write_text(
            f"Port {self._port}\nUser root\nIdentityFile {home}/.ssh/id_ed25519\nBatchMode yes\n"
            "StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
            f"ConnectTimeout {SILENT_TIMEOUT}\n"
        )
        env = {name: value for name, value in os.environ.items() if name != "SSH_AUTH_SOCK"}
        env |= {"HOME": home, "PDSH_SSH_ARGS_APPEND": f"-F {config}"}
        apssh = [*compiled(self._options.program), "-l", "root", "-p", str(self._port)]
        apssh += ["-c", str(SILENT_TIMEOUT), "-q", "--no-last"]
        sides = {
            "apssh": [*apssh, "-t", str(hosts), "echo hello"],
            "pdsh": [
                *("pdsh", "-R", "ssh", "-t", str(SILENT_TIMEOUT), "-f", str(count)),
                *("-w", f"^{hosts}", "echo hello"),
            ],
            "clush": [
                *("clush", "-n", "-t", str(SILENT_TIMEOUT), "-f", str(count)),
                *("--hostfile", str(hosts), "-o", f"-F {config}", "echo hello"),
            ],
        }
        alone = first_lines([*apssh, "-t", good[0], "echo hello"], env)[good[0]]
        notes, medians, lasts = [f"alone {alone:.2f} s"], {}, {}
        with (
            fleet(silent, self._port, "silent", self._folder),
            fleet(slow, self._port, "slow", self._folder),
        ):
            for name, argv in sides.items():
                if not shutil.which(argv[0]):
                    notes.append(f"{name}: not here")
                    continue
                Path(home, ".ssh/known_hosts").unlink(missing_ok=True)
                found = first_lines(argv, env)
                times = sorted(found[host] for host in good if host in found)
                if len(times) < len(good):
                    notes.append(f"{name}: {len(good) - len(times)} good hosts gave nothing")
                    times += [999.0] * (len(good) - len(times))
                medians[name], lasts[name] = times[len(times) // 2], times[len(times) * 99 // 100]
                notes.append(
                    f"{name}: first {times[0]:.2f}, median {medians[name]:.2f}, "
                    f"99 % {lasts[name]:.2f} s"
                )
        fine = medians["apssh"] == min(medians.values()) and lasts["apssh"] == min(lasts.values())
        text = (
            f"first lines of {len(good)} hosts, {others} silent and {others} slow ones among them"
        )
        return Outcome(0, 0, 0, 0, "", []), f"{text}: {'; '.join(notes)}", fine

    def case_shards(self) -> tuple[Outcome, str, bool]:
        """All hosts by two processes (--shard 1/2 and 2/2) beside one."""
        one = self._client.run(self._hosts, "true")
        hosts = Path(self._folder, "targets")
        begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        Path(self._folder, "home/.ssh/known_hosts").unlink(missing_ok=True)
        argv = [*compiled(self._options.program), "-t", str(hosts), "-l", "root"]
        env = os.environ | {"HOME": f"{self._folder}/home"}
        processes = [
            subprocess.Popen(
                [*argv, "--no-last", "--shard", f"{part}/2", "true"],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=env,
            )
            for part in (1, 2)
        ]
        codes = [process.wait() for process in processes]
        wall, after = time.monotonic() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        text = (
            f"{len(self._hosts)} hosts, true: "
            f"one process {one.seconds:.1f} s, {one.cpu:.1f} s CPU; "
            f"two shards {wall:.1f} s, {cpu:.1f} s CPU"
        )
        return one, text, codes == [0, 0] and one.code == 0

    def case_gateway(self) -> tuple[Outcome, str, bool]:
        count = min(self._options.behind, len(self._hosts))
        port = free_port()
        with fleet(["127.0.0.1"], port, "ssh", self._folder) as counters:
            outcome = self._client.run(
                self._hosts[:count], "-g", f"127.0.0.1:{port}", "true", as_json=True
            )
            connections = counters.total.value
        kinds, cost = outcome.kinds(), self._cost(outcome, count)[0]
        return (
            outcome,
            f"{count} hosts behind one: {dict(kinds)}; "
            f"{connections} connection(s) to the gateway; {cost}",
            kinds == {"ok": count} and connections == 1 and outcome.code == 0,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description="What thousands of hosts cost.")
    parser.add_argument("--hosts", type=int, default=5000)
    parser.add_argument(
        "--sleepers", type=int, default=2000, help="hosts that run sleep 20 at once"
    )
    parser.add_argument("--silent", type=int, default=300, help="hosts that accept and say nothing")
    parser.add_argument("--others", type=int, default=50, help="silent, and slow, of 1,000 hosts")
    parser.add_argument("--behind", type=int, default=500, help="hosts behind one gateway")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=(
            *("true", "sleep", "silent", "window"),
            *("gateway", "first", "shards", "interrupt"),
        ),
    )
    parser.add_argument("--program", type=Path, default=PROGRAM, help="apssh.py to run")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the fleet ends with us
    with tempfile.TemporaryDirectory(prefix="apssh-scale-") as folder:
        os.makedirs(f"{folder}/home/.ssh", mode=0o700)
        for name in ("host_key", "home/.ssh/id_ed25519"):
            key = asyncssh.generate_private_key("ssh-ed25519")
            key.write_private_key(f"{folder}/{name}")
            key.write_public_key(f"{folder}/{name}.pub")
        os.chmod(f"{folder}/home/.ssh/id_ed25519", 0o600)
        return 0 if Cases(Client(folder, options.program), folder, options).run() else 1


if __name__ == "__main__":
    sys.exit(main())
