"""Tests of apssh, in the order of the module, against real servers.

First the rig: keys, an OpenSSH sshd on a free loopback port, faulty servers, a HOME of its own. Then pure tests, then the rest.
``pytest`` runs the default tier; ``pytest -m ''`` adds the slow one. With TESTBED_HOSTS (addresses separated by commas) and TESTBED_KEY set, the tests
that need several real hosts run too.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import getpass
import io
import json
import os
import pty
import re
import resource
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import asyncssh
import pytest
from asynciojobs import Job, PrintJob, Scheduler, Sequence
from hypothesis import given, settings
from hypothesis import strategies as st

import apssh
from apssh import (
    ApsshError,
    Capture,
    CommandFailedError,
    ConnectionFailedError,
    Deferred,
    HostKeyError,
    LocalNode,
    Pull,
    Push,
    Run,
    RunScript,
    RunString,
    SshJob,
    SshNode,
    TransferError,
    UsageError,
    Variables,
)

MODULE = Path(apssh.__file__).resolve()
ME = getpass.getuser()

# ---------------------------------------------------------------------------------------------------------------
# the rig
# ---------------------------------------------------------------------------------------------------------------

TESTBED = [host for host in os.environ.get("TESTBED_HOSTS", "").split(",") if host]
testbed = pytest.mark.skipif(not TESTBED, reason="needs several real hosts: set TESTBED_HOSTS and TESTBED_KEY")
_open_ports: set[int] = set()


def _only_rig(event: str, args: tuple[Any, ...]) -> None:
    """No connection to anything that the rig did not open: fails the test, loudly."""
    if event == "socket.connect" and isinstance(args[1], tuple) and args[1][1] not in _open_ports and args[1][0] not in TESTBED:
        raise AssertionError(f"a connection to {args[1]}, which the rig did not open")


sys.addaudithook(_only_rig)


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nothing listens on; connecting to it is allowed (and refused)."""
    with socket.socket() as sock:
        sock.bind((host, 0))
        port: int = sock.getsockname()[1]
    _open_ports.add(port)
    return port


def run(work: Coroutine[Any, Any, Any], timeout: float = 60) -> Any:
    """Run a coroutine in a loop of its own, and see that it leaves no task and no open connection behind."""
    async def main() -> Any:
        result = await asyncio.wait_for(work, timeout)
        for _ in range(100):  # what was cancelled may need a turn of the loop
            left = asyncio.all_tasks() - {asyncio.current_task()}
            if not left:
                return result
            await asyncio.sleep(0.02)
        raise AssertionError(f"tasks left: {left}")

    return asyncio.run(main())


def eventually(check: Callable[[], Any], timeout: float = 10) -> Any:
    """Wait until this is true, and give it back."""
    end = time.monotonic() + timeout
    while not (value := check()):
        assert time.monotonic() < end, f"not true within {timeout} s"
        time.sleep(0.02)
    return value


async def eventually_async(check: Callable[[], Any], timeout: float = 10) -> Any:
    """The same without holding the loop."""
    end = time.monotonic() + timeout
    while not (value := check()):
        assert time.monotonic() < end, f"not true within {timeout} s"
        await asyncio.sleep(0.02)
    return value


def processes(token: str) -> list[str]:
    """The command lines of the running processes that hold this text (but this one's)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            if token in line and int(folder.name) != os.getpid():
                found.append(line)
    return found


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of keys made once: id_ed25519 (authorised), other, ecdsa, rsa, encrypted (passphrase ``secret``)."""
    folder = tmp_path_factory.mktemp("keys")
    for name, algorithm in (("id_ed25519", "ssh-ed25519"), ("other", "ssh-ed25519"), ("ecdsa", "ecdsa-sha2-nistp256"), ("rsa", "ssh-rsa")):
        key = asyncssh.generate_private_key(algorithm)
        key.write_private_key(folder / name)
        key.write_public_key(folder / f"{name}.pub")
    key = asyncssh.generate_private_key("ssh-ed25519")
    key.write_private_key(folder / "encrypted", passphrase="secret", rounds=1)
    key.write_public_key(folder / "encrypted.pub")
    for path in folder.iterdir():
        path.chmod(0o600)
    return folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty HOME with the one key, and none of what the environment of whoever runs this would add."""
    folder = tmp_path / "home"
    (folder / ".ssh").mkdir(parents=True, mode=0o700)
    for name in ("id_ed25519", "id_ed25519.pub"):
        shutil.copy2(keys / name, folder / ".ssh" / name)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    for name in ("SSH_AUTH_SOCK", "DISPLAY", "APSSH_HOST_KEYS", "NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    return folder


class Sshd:
    """A real OpenSSH server on a free loopback port, with its own configuration, keys, log and remote home."""

    def __init__(self, folder: Path, keys: Path, *, port: int | None = None, host_key: str = "ssh-ed25519", **options: Any) -> None:
        program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin:/sbin")
        if not program:
            pytest.skip("no OpenSSH server (sshd) is installed here")
        self.port = port or free_port()
        self.folder, self.home = folder, folder / "home"
        self.home.mkdir(parents=True, exist_ok=True)
        self._log = folder / "log"
        key = asyncssh.generate_private_key(host_key)
        key.write_private_key(folder / "host_key")
        (folder / "host_key").chmod(0o600)
        self.key = key
        (folder / "authorized_keys").write_text("".join((keys / f"{name}.pub").read_text() for name in ("id_ed25519", "ecdsa", "rsa", "encrypted")))
        sftp = next((path for path in ("/usr/lib/openssh/sftp-server", "/usr/libexec/sftp-server", "/usr/libexec/openssh/sftp-server",
                                       "/usr/lib/ssh/sftp-server") if os.path.exists(path)), "sftp-server")
        # sshd takes the home from the passwd file: sessions are moved to ours, and are else as plain as can be
        (folder / "session").write_text(f'#!/bin/sh\ncd {shlex.quote(str(self.home))}\nc=$SSH_ORIGINAL_COMMAND\nunset SSH_ORIGINAL_COMMAND\n'
                                        'exec "$SHELL" -c "$c"\n')
        (folder / "session").chmod(0o755)
        settings = {"ListenAddress": f"127.0.0.1:{self.port}", "HostKey": folder / "host_key", "AuthorizedKeysFile": folder / "authorized_keys",
                    "PidFile": "none", "StrictModes": "no", "UsePAM": "no", "PasswordAuthentication": "no", "LogLevel": "VERBOSE",
                    "Subsystem": f"sftp {sftp}", "SetEnv": f"HOME={self.home}", "ForceCommand": folder / "session",
                    "KbdInteractiveAuthentication": "no", "PermitRootLogin": "yes", "X11Forwarding": "yes"} | options
        (folder / "config").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
        if os.getuid() == 0:
            os.makedirs("/run/sshd", exist_ok=True)  # sshd refuses to start as root without it
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen([program, "-D", "-e", "-f", str(folder / "config")], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        eventually(lambda: "Server listening" in self.log() or self._process.poll() is not None)
        assert self._process.poll() is None, self.log()

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)

    def connections(self) -> int:
        """Established TCP connections to this server, now."""
        wanted = f":{self.port:04X}"
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return sum(fields[2].endswith(wanted) and fields[3] == "01" for fields in lines)

    def logins(self) -> int:
        return self.log().count("Accepted publickey")

    def node(self, **options: Any) -> SshNode:
        return SshNode("127.0.0.1", **{"port": self.port, "username": ME} | options)

    @property
    def target(self) -> str:
        return f"{ME}@127.0.0.1:{self.port}"


@pytest.fixture(scope="session")
def shared_sshd(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> Iterator[Sshd]:
    server = Sshd(tmp_path_factory.mktemp("sshd"), keys)
    yield server
    server.stop()


@pytest.fixture
def sshd(shared_sshd: Sshd) -> Sshd:
    """The server that the tests share, its home emptied."""
    for path in shared_sshd.home.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return shared_sshd


@pytest.fixture
def make_sshd(tmp_path: Path, keys: Path) -> Iterator[Callable[..., Sshd]]:
    """Further servers, with options of their own."""
    servers: list[Sshd] = []

    def make(**options: Any) -> Sshd:
        folder = tmp_path / f"sshd{len(servers)}"
        folder.mkdir()
        servers.append(Sshd(folder, keys, **options))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


@contextlib.asynccontextmanager
async def raw_server(talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]) -> AsyncIterator[int]:
    """A TCP server that does what ``talk`` says, to stand for what OpenSSH will not do."""
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await talk(reader, writer)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    _open_ports.add(port)
    try:
        yield port
    finally:
        server.close()
        for task in asyncio.all_tasks():
            if "handle" in repr(task.get_coro()) and task is not asyncio.current_task():
                task.cancel()
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def ssh_server(keys: Path, *, server: type[asyncssh.SSHServer] = asyncssh.SSHServer, host_key: asyncssh.SSHKey | None = None,
                     process: Any = None, sftp: Any = None, port: int = 0, **options: Any) -> AsyncIterator[int]:
    """asyncssh's own server, for behaviour that OpenSSH does not have."""
    async def nothing(process: Any) -> None:
        process.exit(0)

    acceptor = await asyncssh.create_server(
        server, "127.0.0.1", port, server_host_keys=[host_key or asyncssh.generate_private_key("ssh-ed25519")], encoding=None,
        process_factory=process or nothing, sftp_factory=sftp, **{"authorized_client_keys": str(keys / "id_ed25519.pub")} | options)
    _open_ports.add(acceptor.get_port())
    try:
        yield acceptor.get_port()
    finally:
        acceptor.close()
        await acceptor.wait_closed()


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A real ssh-agent; calling the fixture adds key files to it."""
    if not shutil.which("ssh-agent"):
        pytest.skip("no ssh-agent is installed here")
    path = f"/tmp/apssh-agent-{os.getpid()}-{os.urandom(3).hex()}"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", path], stdout=subprocess.DEVNULL)
    eventually(lambda: os.path.exists(path))
    monkeypatch.setenv("SSH_AUTH_SOCK", path)
    yield lambda *files: subprocess.run(["ssh-add", "-q", *map(str, files)], check=True)
    process.terminate()
    process.wait()
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def cli(*argv: str, program: str = "apssh", input: bytes = b"", timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a program as a person would, warnings being errors."""
    code = f"import sys; sys.path.insert(0, {str(MODULE.parent)!r}); import apssh; sys.exit(apssh.{MAINS[program]}())"
    return subprocess.run([sys.executable, "-W", "error", "-X", "dev", "-c", code, *argv], input=input, capture_output=True,
                          timeout=timeout, env=os.environ | environment, check=False)


MAINS = {"apssh": "main", "appush": "main_push", "appull": "main_pull"}


def on_terminal(*argv: str, answer: bytes = b"", program: str = "apssh", columns: int = 80, timeout: float = 60) -> tuple[int, bytes]:
    """Run a program on a terminal; its exit code and all that the terminal got."""
    code = f"import sys; sys.path.insert(0, {str(MODULE.parent)!r}); import apssh; sys.exit(apssh.{MAINS[program]}())"
    pid, fd = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", code, *argv])
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    seen, end = b"", time.monotonic() + timeout
    with contextlib.suppress(OSError):
        while time.monotonic() < end:
            data = os.read(fd, 65536)
            if not data:
                break
            seen += data
            if answer and b": " in seen:
                os.write(fd, answer)
                answer = b""
    os.close(fd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), seen


def messages(completed: subprocess.CompletedProcess[bytes]) -> list[str]:
    return completed.stderr.decode().splitlines()
