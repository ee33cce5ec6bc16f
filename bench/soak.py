"""A long run of everything at once: commands, scripts, copies, cuts and interruptions on 50 hosts,
in an order given by a seed.

    python bench/soak.py [--minutes 20] [--seed 1]

The hosts are loopback addresses of OpenSSH servers, started here with a configuration and a home of
their own. Afterwards, and after each round, nothing may be left of it: no process, no file in
~/.apssh-remote, no temporary file on either side, no task, and no growth of this process's memory
and descriptors. The exit code is 1 when something is. Linux.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import gc
import getpass
import os
import random
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import asyncssh

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import apssh

ROUND = 20.0  # seconds of each event loop; the nodes live on in the next one
WORKERS = 12  # things under way at once
GRACE = 5.0  # seconds after which a command must be gone
MOST_GROWTH = 8192  # KB from the end of the warm-up to the end, what the allocator may keep
ME = getpass.getuser()


class Server:
    """sshd on many loopback addresses."""

    def __init__(self, folder: Path, hosts: list[str], keys: Path) -> None:
        self.home, self._log = folder / "remote", folder / "log"
        self.home.mkdir()
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        asyncssh.generate_private_key("ssh-ed25519").write_private_key(folder / "host_key")
        (folder / "host_key").chmod(0o600)
        session = folder / "session"
        session.write_text(
            f"#!/bin/sh\ncd {shlex.quote(str(self.home))}\n"
            "c=$SSH_ORIGINAL_COMMAND\nunset SSH_ORIGINAL_COMMAND\n"
            'exec "$SHELL" -c "$c"\n'
        )
        session.chmod(0o755)
        sftp = next(
            path
            for path in (
                "/usr/lib/openssh/sftp-server",
                "/usr/libexec/openssh/sftp-server",
                "/usr/libexec/sftp-server",
                "/usr/lib/ssh/sftp-server",
                "sftp-server",
            )
            if os.path.exists(path) or "/" not in path
        )
        common = [
            f"HostKey {folder}/host_key",
            f"AuthorizedKeysFile {keys}.pub",
            "PidFile none",
            "StrictModes no",
            "UsePAM no",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            f"Subsystem sftp {sftp}",
            f"SetEnv HOME={self.home}",
            f"ForceCommand {session}",
            "PermitRootLogin yes",
            "MaxStartups 300",
        ]
        program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin:/sbin")
        if not program:
            raise SystemExit("no OpenSSH server (sshd) is installed here")
        if os.getuid() == 0:
            os.makedirs("/run/sshd", exist_ok=True)
        self._processes = []
        for start in range(0, len(hosts), 16):  # sshd has room for no more sockets
            config = folder / f"config{start}"
            config.write_text(
                "\n".join(
                    [
                        *(
                            f"ListenAddress {host}:{self.port}"
                            for host in hosts[start : start + 16]
                        ),
                        *common,
                    ]
                )
                + "\n"
            )
            with open(self._log, "ab") as log:
                self._processes.append(
                    subprocess.Popen(
                        [program, "-D", "-e", "-f", str(config)],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                    )
                )
        for _ in range(100):
            if self._log.read_text().count("Server listening") == len(hosts):
                return
            time.sleep(0.1)
        raise SystemExit(f"sshd did not start:\n{self._log.read_text()}")

    def sessions(self) -> list[int]:
        """The servers' processes, one for each connection."""
        return [
            int(pid)
            for process in self._processes
            for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ]

    def stop(self) -> None:
        for pid in self.sessions():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self._processes:
            process.terminate()
            process.wait(10)


def processes(token: str) -> list[tuple[int, str]]:
    """The running processes that hold this text, but this one and the clients it started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            if token in line and "apssh.py" not in line and "soak.py" not in line:
                found.append((int(folder.name), line[:120]))
    return found


class Soak:
    """What is done, at random, and what must come of it."""

    def __init__(
        self, folder: Path, hosts: list[str], server: Server, key: Path, seed: int
    ) -> None:
        self._folder, self._hosts, self._server, self._key = folder, hosts, server, key
        self._random = random.Random(seed)
        # the start of how long each command sleeps: tells our processes from others
        self._token = f"77{os.getpid() % 100000:05}"
        self.done: collections.Counter[str] = collections.Counter()
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self._number = 0
        self._lost_copies = 0  # a push whose connection is lost cannot take its temporary file away
        formatter = apssh.SubdirFormatter(str(folder / "out"))
        self._nodes = [
            apssh.SshNode(host, username=ME, port=server.port, keys=[str(key)], formatter=formatter)
            for host in hosts
        ]
        self._gateway = apssh.SshNode(
            hosts[0], username=ME, port=server.port, keys=[str(key)], formatter=apssh.Formatter()
        )
        self._nodes += [
            apssh.SshNode(
                host,
                username=ME,
                port=server.port,
                keys=[str(key)],
                formatter=formatter,
                gateway=self._gateway,
            )
            for host in hosts[:10]
        ]
        (folder / "local").mkdir()

    def _fresh(self) -> int:
        self._number += 1
        return self._number

    def _sleep(self) -> str:
        """A command that does not end by itself, in one of several bad manners."""
        nap = f"sleep {self._token}{self._fresh():06}"
        return self._random.choice(
            [
                nap,
                f"trap '' HUP TERM INT; {nap}; {nap}",
                f"{nap} & {nap} & wait",
                f"({nap}; {nap}) | cat",
                f"nohup {nap} >/dev/null 2>&1 & {nap}",
                f"{nap} & while :; do echo noise; sleep 0.01; done",
                f"sh -c 'trap : TERM; while :; do {nap}; done'",
            ]
        )

    def _lost(self, error: BaseException | None) -> bool:
        """A cut may hit anything at any time."""
        return isinstance(error, apssh.ApsshError) and (
            error.kind in ("lost", "refused") or "onnection" in error.message
        )

    def _check(
        self, what: str, expected: object, got: object, error: BaseException | None = None
    ) -> None:
        if error is not None and self._lost(error):
            self.outcomes["lost"] += 1
            self._lost_copies += what == "copy"
        elif got == expected:
            self.outcomes["as expected"] += 1
        else:
            self.outcomes["wrong"] += 1
            self.wrong.append(f"{what}: expected {expected!r}, got {got!r} {error!r}")

    async def _status(
        self,
        what: str,
        expected: object,
        work: Coroutine[Any, Any, Any],
        cut_short: float | None = None,
    ) -> None:
        """Run this; perhaps cancel it after a while."""
        task, got, error = asyncio.ensure_future(work), None, None
        if cut_short is not None:
            await asyncio.wait([task], timeout=cut_short)
            if not task.done():
                task.cancel()
                expected = "cancelled"
        try:
            got = await asyncio.wait_for(asyncio.shield(task), 60)
        except TimeoutError:
            got = "no end within 60 s"
            task.cancel()
        except asyncio.CancelledError:
            got = "cancelled"
        except apssh.ApsshError as exc:
            got, error = exc.kind, exc
        except Exception as exc:
            got, error = repr(exc), exc
        self._check(what, expected, got, error)

    # what can happen

    async def command(self) -> None:
        node, rnd = self._random.choice(self._nodes), self._random
        text, status = rnd.choice(
            [
                ("true", 0),
                ("exit 7", 7),
                ("kill -TERM $$", "TERM"),
                ("kill -KILL $$", "KILL"),
                ("no-such-command", 127),
                ("head -c 300000 /dev/zero | tr '\\0' x", 0),
                ("seq 20000; seq 10 >&2", 0),
                ("cat", 0),
            ]
        )
        await self._status(f"command {text}", status, node.run(text))

    async def many(self) -> None:
        """More sessions on one node than its server takes."""
        node = self._random.choice(self._nodes)
        await asyncio.gather(
            *(
                self._status("many", number % 3, node.run(f"sleep 0.2; exit {number % 3}"))
                for number in range(15)
            )
        )

    async def deadline(self) -> None:
        await self._status(
            "deadline",
            "timeout",
            self._random.choice(self._nodes).run(
                self._sleep(), timeout=self._random.uniform(0.3, 2)
            ),
        )

    async def cancelled(self) -> None:
        await self._status(
            "cancelled",
            "cancelled",
            self._random.choice(self._nodes).run(self._sleep()),
            self._random.uniform(0, 2),
        )

    async def script(self) -> None:
        node, rnd = self._random.choice(self._nodes), self._random
        if rnd.random() < 0.5:
            step = apssh.RunString("#!/bin/sh\necho $0 $1\nexit $2\n", "one", 5)
            await self._status("script", 5, step.co_run_remote(node))
        else:
            step = apssh.RunString(
                f"#!/bin/bash\n{self._sleep()}\n", timeout=rnd.choice([None, rnd.uniform(0.5, 2)])
            )
            await self._status(
                "endless script",
                "timeout",
                step.co_run_remote(node),
                rnd.uniform(0, 2) if step.timeout is None else None,
            )

    async def copy(self) -> None:
        """There and back, and the same; or cut short, and then whole or not there at all."""
        node, rnd, number = self._random.choice(self._nodes), self._random, self._fresh()
        local, back = (
            self._folder / "local" / f"from{number}",
            self._folder / "local" / f"back{number}",
        )
        local.write_bytes(rnd.randbytes(rnd.choice([0, 10, 40_000, 3_000_000])))
        remote = f"copy{number}"

        async def both() -> bool:
            await node.put_file_s(str(local), remote)
            await node.get_file_s(remote, str(back))
            return back.read_bytes() == local.read_bytes()

        await self._status(
            "copy", True, both(), rnd.uniform(0, 0.5) if rnd.random() < 0.3 else None
        )
        for path in (back, self._server.home / remote):
            if path.exists() and path.read_bytes() != local.read_bytes():
                self.wrong.append(f"half a file: {path}")
            path.unlink(missing_ok=True)
        local.unlink()

    async def cut(self) -> None:
        """A connection is lost."""
        await asyncio.sleep(self._random.uniform(0, 2))
        if sessions := self._server.sessions():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._random.choice(sessions), signal.SIGKILL)

    async def closed(self) -> None:
        """A node is closed while others may be using it."""
        await self._random.choice(self._nodes).close()

    async def program(self) -> None:
        """The program on some hosts: let alone, interrupted, terminated, killed, or its pipe
        closed.
        """
        rnd = self._random
        hosts = [f"{host}:{self._server.port}" for host in rnd.sample(self._hosts, 8)]
        way = rnd.choice(["none", "int", "int twice", "term", "kill", "pipe"])
        words = {
            "none": ["true"],
            "pipe": [
                f"while :; do echo noise; sleep 0.05; done # sleep {self._token}{self._fresh():06}"
            ],
        }.get(way, [self._sleep()])
        if way != "pipe" and rnd.random() < 0.4:
            words = ["-s", "#!/bin/bash\n" + words[0]]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(Path(apssh.__file__)),
            "-t",
            ",".join(hosts),
            "-l",
            ME,
            "-k",
            str(self._key),
            *words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout and process.stderr
        expected = {"none": 0, "kill": -9, "pipe": 1}.get(way, -signal.SIGINT)
        reading = [asyncio.ensure_future(process.stderr.read())]
        if way == "pipe":
            await process.stdout.read(10)
            # asyncio has no other way
            process._transport.get_pipe_transport(1).close()  # type: ignore[attr-defined]
        else:
            reading.append(asyncio.ensure_future(process.stdout.read()))
            naps = [
                word for word in words[-1].replace(";", " ").split() if word.startswith(self._token)
            ]
            for _ in range(100):
                if way == "none" or process.returncode is not None or processes(naps[0]):
                    break
                await asyncio.sleep(0.1)  # until it runs somewhere
            await asyncio.sleep(rnd.uniform(0, 1))
        with contextlib.suppress(
            ProcessLookupError
        ):  # not the process's own methods: these reap it behind asyncio's back (status 255)
            if way in ("int", "int twice"):
                os.kill(process.pid, signal.SIGINT)
            if way == "int twice":
                await asyncio.sleep(rnd.uniform(0, 0.3))
                os.kill(process.pid, signal.SIGINT)
            if way == "term":
                os.kill(process.pid, signal.SIGTERM)
            if way == "kill":
                os.kill(process.pid, signal.SIGKILL)
        try:
            code: object = await asyncio.wait_for(process.wait(), 30)
        except TimeoutError:
            code = "no end within 30 s"
            process.kill()
            await process.wait()
        errors = (await asyncio.gather(*reading))[0].decode("utf-8", "replace")
        if code == 1 and (" lost" in errors or "refused" in errors):  # cut meanwhile
            code = expected
        self._check(f"program, {way}: {errors[-500:]}", expected, code)
        if way != "int twice" and ("Traceback" in errors or "never retrieved" in errors):
            self.wrong.append(f"program, {way}: {errors[-1500:]}")

    async def round(self, seconds: float) -> int:
        """So many seconds of it; the number of tasks left."""
        things: list[tuple[Callable[[], Coroutine[Any, Any, None]], int]] = [
            (self.command, 10),
            (self.many, 1),
            (self.deadline, 4),
            (self.cancelled, 6),
            (self.script, 5),
            (self.copy, 5),
            (self.cut, 3),
            (self.closed, 1),
            (self.program, 2),
        ]
        end = time.monotonic() + seconds

        async def worker() -> None:
            while time.monotonic() < end:
                (thing,) = self._random.choices(
                    [each for each, _ in things], [weight for _, weight in things]
                )
                self.done[thing.__name__] += 1
                await thing()

        await asyncio.gather(*(worker() for _ in range(WORKERS)))
        if self._random.random() < 0.5:  # the next loop finds the connections that this one leaves
            return 0
        await self.close()
        await asyncio.sleep(1)
        return len(asyncio.all_tasks()) - 1

    async def close(self) -> None:
        await asyncio.gather(*(node.close() for node in self._nodes))
        await self._gateway.close()

    def left(self) -> list[str]:
        """What must not be there any more."""
        end = time.monotonic() + GRACE + 3
        while True:  # what ends a script removes its folder, up to seconds later
            found = processes(self._token)
            folders = list(self._server.home.glob(".apssh-remote/*"))
            if not (found or folders) or time.monotonic() > end:
                break
            time.sleep(0.2)
        left = [f"process {pid}: {line}" for pid, line in found]
        left += [f"file {path}" for path in folders]
        left += [f"temporary file {path}" for path in (self._folder / "local").glob(".*.apssh-*")]
        left += [f"temporary file {path}" for path in self._server.home.glob(".*.apssh-*")][
            self._lost_copies :
        ]
        self._lost_copies = 0
        for pid, _ in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for path in self._server.home.glob(".*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return left


def memory() -> int:
    """Resident memory of this process, KB."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024


def rounds(soak: Soak, minutes: float) -> Iterator[tuple[float, int, int, int, list[str]]]:
    """Round after round: time, tasks left, memory, descriptors, what was left."""
    begin = time.monotonic()
    while (gone := time.monotonic() - begin) < minutes * 60:
        tasks = asyncio.run(soak.round(min(ROUND, minutes * 60 - gone + 1)))
        asyncio.run(soak.close())
        left = soak.left()
        yield time.monotonic() - begin, tasks, memory(), len(os.listdir("/proc/self/fd")), left


def main() -> int:
    parser = argparse.ArgumentParser(description="Everything at once, for a long time.")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--hosts", type=int, default=50)
    parser.add_argument("--verbose", action="store_true", help="a line for each round")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the servers end with us
    for name in ("SSH_AUTH_SOCK", "DISPLAY", "APSSH_HOST_KEYS"):
        os.environ.pop(name, None)
    with tempfile.TemporaryDirectory(prefix="apssh-soak-") as name:
        folder, key = Path(name), Path(name, "home/.ssh/id_ed25519")
        folder.chmod(0o755)
        key.parent.mkdir(parents=True, mode=0o700)
        pair = asyncssh.generate_private_key("ssh-ed25519")
        pair.write_private_key(key)
        pair.write_public_key(f"{key}.pub")
        key.chmod(0o600)
        os.environ["HOME"] = str(folder / "home")
        hosts = [f"127.0.77.{number + 1}" for number in range(options.hosts)]
        server = Server(folder, hosts, key)
        left: list[str] = []
        figures: list[tuple[int, int]] = []
        try:
            soak = Soak(folder, hosts, server, key, options.seed)
            for gone, tasks, used, files, found in rounds(soak, options.minutes):
                figures.append((used, files))
                left += [*found, *([f"{tasks} tasks"] if tasks else [])]
                if options.verbose:
                    print(
                        f"{gone:6.0f} s: {sum(soak.done.values())} things, "
                        f"{dict(soak.outcomes)}, {used} KB, {files} descriptors, "
                        f"{tasks} tasks, left {found}",
                        flush=True,
                    )
        finally:
            server.stop()
    warm = figures[min(len(figures) // 4, 6)]
    growth = figures[-1][0] - warm[0], figures[-1][1] - warm[1]
    print(
        f"seed {options.seed}, {options.minutes:g} minutes, "
        f"{options.hosts} hosts: {dict(soak.done)}"
    )
    print(f"outcomes: {dict(soak.outcomes)}")
    print(
        f"left over: {len(left)}; memory {figures[-1][0]} KB, {growth[0]:+} KB since the warm-up; "
        f"descriptors {figures[-1][1]}, {growth[1]:+}"
    )
    for line in [*left[:20], *soak.wrong[:20]]:
        print(f"  {line}")
    return 1 if left or soak.wrong or growth[0] > MOST_GROWTH or growth[1] > 0 else 0


if __name__ == "__main__":
    sys.exit(main())
