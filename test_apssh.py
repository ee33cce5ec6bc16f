"""Tests of apssh, in the order of the module, against real servers.

First the rig: keys, an OpenSSH sshd on a free loopback port, faulty servers, a HOME of its own.
Then pure tests, then the rest. ``pytest`` runs the default tier; ``pytest -m ''`` adds the slow
one. With TESTBED_HOSTS (addresses separated by commas) and TESTBED_KEY set, the tests that need
several real hosts run too.
"""

from __future__ import annotations

import array
import ast
import asyncio
import base64
import contextlib
import dataclasses
import errno
import fcntl
import functools
import gc
import getpass
import hashlib
import hmac
import importlib
import inspect
import io
import itertools
import json
import os
import pickle
import posixpath
import pty
import pwd
import re
import resource
import select
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
import unittest.mock
import weakref
import xml.etree.ElementTree as ElementTree
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import asyncssh
import pytest
from asynciojobs import Job, PrintJob, Scheduler, Sequence
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import example, given, settings
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
    ScenarioError,
    SshJob,
    SshNode,
    StepRecord,
    SubdirFormatter,
    TimeHostFormatter,
    TransferError,
    UsageError,
    Variables,
    Wait,
    YamlLoader,
    recording,
    run_record,
    save_record,
    timeline_as_svgfile,
    timeline_as_text,
    topology_as_dotfile,
    topology_as_pngfile,
    topology_dot,
    topology_graph,
)

# what a shell starts with & has Ctrl-C ignored, and so have the programs that the tests interrupt
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

MODULE = Path(apssh.__file__).resolve()
ME = getpass.getuser()

# --------------------------------------------------------------------------------------------------
# the rig
# --------------------------------------------------------------------------------------------------


TESTBED = [host for host in os.environ.get("TESTBED_HOSTS", "").split(",") if host]
on_testbed = pytest.mark.skipif(
    not TESTBED, reason="needs several real hosts: set TESTBED_HOSTS and TESTBED_KEY"
)
_open_ports: set[int] = set()
_connect = socket.socket.connect


def _only_rig(sock: socket.socket, address: Any) -> None:
    """No connection to anything that the rig did not open: fails the test, loudly."""
    if isinstance(address, tuple) and address[1] not in _open_ports and address[0] not in TESTBED:
        raise AssertionError(f"a connection to {address}, which the rig did not open")
    _connect(sock, address)


# an audit hook would disturb how coverage follows threads
socket.socket.connect = _only_rig  # type: ignore[method-assign]


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nothing listens on; connecting to it is allowed (and refused)."""
    with socket.socket() as sock:
        sock.bind((host, 0))
        port: int = sock.getsockname()[1]
    _open_ports.add(port)
    return port


def run(work: Coroutine[Any, Any, Any], timeout: float = 60) -> Any:
    """Run a coroutine in a loop of its own, and see that it leaves no task and no open connection
    behind.
    """

    async def main() -> Any:
        result = await asyncio.wait_for(work, timeout)
        for _ in range(100):  # what was cancelled may need a turn of the loop
            left = asyncio.all_tasks() - {asyncio.current_task()}
            if not left:
                return result
            await asyncio.sleep(0.02)
        raise AssertionError(f"tasks left: {left}")

    return asyncio.run(main())


@pytest.fixture(autouse=True)
def in_a_loop(request: pytest.FixtureRequest) -> None:
    """An ``async def`` test is run by ``run``: pytest calls what its item holds, which a fixture
    may still exchange.
    """
    test = request.node.obj
    if inspect.iscoroutinefunction(test):
        request.node.obj = lambda **fixtures: run(test(**fixtures))


def eventually(check: Callable[[], Any], timeout: float = 30) -> Any:
    """Wait until this is true, and give it back."""
    end = time.monotonic() + timeout
    while not (value := check()):
        assert time.monotonic() < end, f"not true within {timeout} s"
        time.sleep(0.02)
    return value


async def eventually_async(check: Callable[[], Any], timeout: float = 30) -> Any:
    """The same without holding the loop."""
    end = time.monotonic() + timeout
    while not (value := check()):
        assert time.monotonic() < end, f"not true within {timeout} s"
        await asyncio.sleep(0.02)
    return value


def processes(command: str) -> list[str]:
    """The command lines of the running processes that begin with this; not those that hold it: a
    client or a shell that is told to run it does so before there is any such process.
    """
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = file.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            if line.startswith(command):
                found.append(line)
    return found


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of keys made once: id_ed25519 (authorised), other, ecdsa, rsa, encrypted (passphrase
    ``secret``).
    """
    folder = tmp_path_factory.mktemp("keys")
    for name, algorithm in (
        ("id_ed25519", "ssh-ed25519"),
        ("other", "ssh-ed25519"),
        ("ecdsa", "ecdsa-sha2-nistp256"),
        ("rsa", "ssh-rsa"),
    ):
        key = asyncssh.generate_private_key(algorithm)
        key.write_private_key(folder / name)
        key.write_public_key(folder / f"{name}.pub")
    key = asyncssh.generate_private_key("ssh-ed25519")
    key.write_private_key(folder / "encrypted", passphrase="secret", rounds=50)
    key.write_public_key(folder / "encrypted.pub")
    for path in folder.iterdir():
        path.chmod(0o600)
    return folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty HOME with the one key, the module in reach of whatever Python is started, and none
    of what the environment of whoever runs this would add.
    """
    folder = tmp_path / "home"
    (folder / ".ssh").mkdir(parents=True, mode=0o700)
    for name in ("id_ed25519", "id_ed25519.pub"):
        shutil.copy2(keys / name, folder / ".ssh" / name)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(MODULE.parent))
    monkeypatch.chdir(folder)
    for name in ("SSH_AUTH_SOCK", "DISPLAY", "APSSH_HOST_KEYS", "NO_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
        # readline, once imported, sets the last two behind the back of os.environ
        os.unsetenv(name)
    return folder


class Sshd:
    """A real OpenSSH server on a free loopback port, with its own configuration, keys, log and
    remote home.
    """

    def __init__(
        self,
        folder: Path,
        keys: Path,
        *,
        port: int | None = None,
        host_key: str = "ssh-ed25519",
        **options: Any,
    ) -> None:
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
        (folder / "authorized_keys").write_text(
            "".join(
                (keys / f"{name}.pub").read_text()
                for name in ("id_ed25519", "ecdsa", "rsa", "encrypted")
            )
        )
        sftp = next(
            (
                path
                for path in (
                    "/usr/lib/openssh/sftp-server",
                    "/usr/libexec/sftp-server",
                    "/usr/libexec/openssh/sftp-server",
                    "/usr/lib/ssh/sftp-server",
                )
                if os.path.exists(path)
            ),
            "sftp-server",
        )
        # sshd takes the home from the passwd file: sessions are moved to ours, and are else as
        # plain as can be
        (folder / "session").write_text(
            f"#!/bin/sh\ncd {shlex.quote(str(self.home))}\n"
            "c=$SSH_ORIGINAL_COMMAND\nunset SSH_ORIGINAL_COMMAND\n"
            'exec "${SHELL##*/}" -c "$c"\n'
        )
        (folder / "session").chmod(0o755)
        settings = {
            "ListenAddress": f"127.0.0.1:{self.port}",
            "HostKey": folder / "host_key",
            "AuthorizedKeysFile": folder / "authorized_keys",
            "PidFile": "none",
            "StrictModes": "no",
            "UsePAM": "no",
            "PasswordAuthentication": "no",
            "LogLevel": "VERBOSE",
            "Subsystem": f"sftp {sftp}",
            "SetEnv": f"HOME={self.home}",
            "ForceCommand": folder / "session",
            "KbdInteractiveAuthentication": "no",
            "PermitRootLogin": "yes",
            "X11Forwarding": "yes",
        } | options
        (folder / "config").write_text(
            "".join(f"{name} {value}\n" for name, value in settings.items())
        )
        if os.getuid() == 0:
            os.makedirs("/run/sshd", exist_ok=True)  # sshd refuses to start as root without it
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                [program, "-D", "-e", "-f", str(folder / "config")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
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

    def below(self, text: str) -> list[str]:
        """The command lines with this text of the processes that its sessions have started."""
        found, parents = [], [self._process.pid]
        while parents:
            for pid, line in children(parents.pop()).items():
                parents.append(pid)
                found += [line] if text in line else []
        return found

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
def sshd(shared_sshd: Sshd, home: Path) -> Sshd:
    """The server that the tests share, its home emptied; its key is known here."""
    shared_sshd.home.chmod(0o700)
    for path in shared_sshd.home.iterdir():
        if path.is_dir() and not path.is_symlink():
            for folder, _, _ in os.walk(path):
                os.chmod(folder, 0o700)  # a test may have closed it
            shutil.rmtree(path)
        else:
            path.unlink()
    key = shared_sshd.key.export_public_key().decode()
    (home / ".ssh" / "known_hosts").write_text(f"[127.0.0.1]:{shared_sshd.port} {key}")
    return shared_sshd


@pytest.fixture
def never_seen(sshd: Sshd, home: Path) -> None:
    """No server's key is known, that of the shared one neither."""
    (home / ".ssh" / "known_hosts").unlink()


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


def box(number: int = 0, **options: Any) -> SshNode:
    return SshNode(
        TESTBED[number],
        **{"keys": [os.environ["TESTBED_KEY"]], "formatter": apssh.RawFormatter()} | options,
    )


@contextlib.asynccontextmanager
async def raw_server(
    talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any],
) -> AsyncIterator[int]:
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


def network(
    port: int, frozen: asyncio.Event
) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]:
    """What leads to this port, until it is frozen: packets then vanish."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(65536):
                if frozen.is_set():
                    await asyncio.sleep(3600)
                sink.write(data)

        try:
            await asyncio.gather(pump(reader, back), pump(there, writer))
        finally:
            back.close()

    return talk


@contextlib.asynccontextmanager
async def ssh_server(
    keys: Path,
    *,
    server: type[asyncssh.SSHServer] = asyncssh.SSHServer,
    host_key: asyncssh.SSHKey | None = None,
    process: Any = None,
    sftp: Any = None,
    port: int = 0,
    **options: Any,
) -> AsyncIterator[int]:
    """asyncssh's own server, for behaviour that OpenSSH does not have."""

    async def nothing(process: Any) -> None:
        process.exit(0)

    acceptor = await asyncssh.create_server(
        server,
        "127.0.0.1",
        port,
        server_host_keys=[host_key or asyncssh.generate_private_key("ssh-ed25519")],
        encoding=None,
        sftp_factory=sftp,
        **{
            "authorized_client_keys": str(keys / "id_ed25519.pub"),
            "process_factory": process or nothing,
        }
        | options,
    )
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
    eventually(
        lambda: (
            subprocess.run(
                ["ssh-add", "-l"], env=os.environ | {"SSH_AUTH_SOCK": path}, capture_output=True
            ).returncode
            == 1
        )
    )  # it listens
    monkeypatch.setenv("SSH_AUTH_SOCK", path)
    yield lambda *files: subprocess.run(["ssh-add", "-q", *map(str, files)], check=True)
    process.terminate()
    process.wait()
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


MAINS = {"apssh": "main", "appush": "main_push", "appull": "main_pull"}
PYTHON = [sys.executable, "-W", "error"]


def main_of(program: str = "apssh", first: str = "pass") -> list[str]:
    """The words for Python that are this program; before the module is there, a line is run."""
    return ["-c", f"import sys; {first}; import apssh; sys.exit(apssh.{MAINS[program]}())"]


def run_python(*argv: str | Path, **options: Any) -> subprocess.CompletedProcess[Any]:
    """Python on this to its end, warnings being errors; its outputs are kept, it has a minute."""
    usual = {"capture_output": True, "timeout": 60, "check": False}
    return subprocess.run([*PYTHON, *argv], **usual | options)


def start_python(*argv: str | Path, **options: Any) -> subprocess.Popen[Any]:
    """Python at work on this, warnings being errors; its outputs are in pipes, it has no stdin."""
    usual = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*PYTHON, *argv], **usual | options)


def cli(
    *argv: str, program: str = "apssh", input: bytes = b"", timeout: float = 60, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """Run a program as a person would."""
    # -X dev tells of slow callbacks
    words = main_of(program, "import logging; logging.getLogger('asyncio').setLevel('ERROR')")
    environment = os.environ | environment
    return run_python("-X", "dev", *words, *argv, input=input, timeout=timeout, env=environment)


def on_terminal(
    *argv: str, answer: bytes = b"", program: str = "apssh", columns: int = 80, timeout: float = 60
) -> tuple[int, bytes]:
    """Run a program on a terminal; its exit code and all that the terminal got."""
    pid, fd = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [*PYTHON, *main_of(program), *argv])
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


# --------------------------------------------------------------------------------------------------
# text
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "it broke"),
        ({"host": "box"}, "box: local: it broke"),
        ({"host": "box", "kind": "interrupted"}, "box: interrupted: it broke"),
        ({"host": "box", "kind": "status", "label": "build"}, "box: status: build: it broke"),
        ({"label": "a\nb"}, r"a\nb: it broke"),
        ({"host": "\x1b[2J"}, r"\x1b[2J: local: it broke"),
    ],
    ids=["alone", "host", "kind", "label", "label-alone", "hostile"],
)
def test_error_is_one_line(options: dict[str, str], text: str) -> None:
    error = ApsshError("it broke", **options)
    assert str(error) == text
    assert str(pickle.loads(pickle.dumps(error))) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 名", "plain é 名"),
        ("a\nb", r"a\nb"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\u202eevil", r"\u202eevil"),
        ("a\tb", "a\tb"),
        ("\udcff", r"\xff"),
        ("\x9b2J", r"\x9b2J"),
        ("\u2028", r"\u2028"),
    ],
)
def test_escape(text: str, shown: str) -> None:
    assert apssh.escape(text) == shown


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"plain\ttext\n", b"plain\ttext\n"),
        (b"\x1b[1;31mcolour\x1b[0m\n", b"\x1b[1;31mcolour\x1b[0m\n"),
        (b"\x1b[2J\n", b"\\x1b[2J\n"),
        (b"\x1b]0;title\x07\n", b"\\x1b]0;title\\x07\n"),
        (b"dos\r\n", b"dos\n"),
        (b"over\rwrite\n", b"over\\rwrite\n"),
        ("é 名\n".encode(), "é 名\n".encode()),
        (b"\xff\n", b"\xff\n"),
        (b"\x9b2J\n", b"\\x9b2J\n"),
        (b"\xc2\x9b2J\n", b"\\x9b2J\n"),
    ],
)
def test_escape_bytes(data: bytes, shown: bytes) -> None:
    assert apssh._escape_bytes(data) == shown


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node", ["node"]),
        ("node[1-3]", ["node1", "node2", "node3"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("n[1,3]", ["n1", "n3"]),
        ("n[1-10/4]", ["n1", "n5", "n9"]),
        ("n[01-10/9,12]", ["n01", "n10", "n12"]),
        ("n[1-3/7]", ["n1"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("10.0.0.[1-2]", ["10.0.0.1", "10.0.0.2"]),
        ("[::1]:22", ["[::1]:22"]),
        ("h[1-2].x.org", ["h1.x.org", "h2.x.org"]),
        ("2001:db8::1", ["2001:db8::1"]),
    ],
)
def test_ranges(text: str, names: list[str]) -> None:
    assert apssh._expand_ranges(text) == names


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["b"], "b"),
        (["n3", "n1", "n2"], "n[1-3]"),
        (["n01", "n02", "n03", "n07"], "n[01-03,07]"),
        (["n1", "n01"], "n[1,01]"),
        (["r1n1", "r1n2", "r2n1", "r2n2"], "r[1-2]n[1-2]"),
        (["::1", "n1"], "::1,n1"),
        (["n9", "n10"], "n[9-10]"),
        (["a", "b", "a"], "a,b"),
        (["n098", "n099", "n100"], "n[098-100]"),
        (["r1n1", "r2n1", "r2n2", "r3n1"], "r[1,3]n1,r2n[1-2]"),
        (["root@n1", "root@n2"], "root@n[1-2]"),
        (["10.0.0.1", "10.0.0.2"], "10.0.0.[1-2]"),
        ([], ""),
    ],
)
def test_fold_names(names: list[str], folded: str) -> None:
    assert apssh.fold_names(names) == folded


@given(
    st.sets(
        st.from_regex(r"[a-c]{1,2}[0-9]{0,3}(-[a-b][0-9]{1,3})?", fullmatch=True),
        min_size=1,
        max_size=40,
    )
)
@settings(max_examples=200, deadline=None)
def test_folding_is_the_inverse_of_ranges(names: set[str]) -> None:
    assert {str(target) for target in apssh._parse_targets([apssh.fold_names(names)])} == names


@pytest.mark.parametrize(
    ("endpoints", "names"),
    [
        ([("root", "box1", 22)], ["box1"]),
        ([("root", "box1.a.org", 22), ("root", "box2.a.org", 22)], ["box1", "box2"]),
        ([("root", "box1.a.org", 22), ("root", "box1.b.org", 22)], ["box1.a.org", "box1.b.org"]),
        ([("root", "box1", 22), ("tester", "box1", 22)], ["root@box1", "tester@box1"]),
        ([("root", "box1", 22), ("root", "box1", 2200)], ["box1:22", "box1:2200"]),
        ([("root", "10.0.0.1", 22), ("root", "10.0.0.2", 22)], ["10.0.0.1", "10.0.0.2"]),
        ([("root", "::1", 22)], ["::1"]),
        ([("root", "Box", 22), ("root", "box", 22)], ["Box", "box"]),
        ([("root", "Box", 22), ("root", "box", 23)], ["Box:22", "box:23"]),
        ([("Bob", "box", 22), ("bob", "box", 22)], ["Bob@box:22~1", "bob@box:22~2"]),
        ([("root", "a/b", 22), ("root", "a~b", 22)], ["root@a_b:22~1", "root@a_b:22~2"]),
        ([("root", "../../etc/x", 22)], ["_"]),
        ([("root", "a/b", 22)], ["a_b"]),
        ([("root", "-rf", 22)], ["_rf"]),
        ([("root", "0ok", 22), ("root", "1failed.a", 22)], ["_0ok", "_1failed"]),
        ([("root", "a", 22), ("root", "a.err", 22)], ["a", "a_err"]),
        (
            [("root", "10.0.0.1", 22, "me@gw1"), ("root", "10.0.0.1", 22, "me@gw2")],
            ["me@gw1->10.0.0.1", "me@gw2->10.0.0.1"],
        ),
        ([("root", "a.b", 22, "gw"), ("root", "a.b", 22)], ["gw->a", "a"]),
    ],
)
def test_distinct_names(endpoints: list[tuple[Any, ...]], names: list[str]) -> None:
    found = dict.fromkeys((apssh.Endpoint(*each) for each in endpoints), "")
    apssh._name_endpoints(found)
    assert list(found.values()) == names


def test_names_in_use_stay() -> None:
    formatter = apssh.HostFormatter()
    first, second, third = (apssh.Endpoint("root", host, 22) for host in ("box.a", "box", "box.b"))
    formatter.add_endpoint(first, verbose=False)
    assert formatter.endpoint_name(first) == "box"
    formatter.add_endpoint(second, verbose=False)
    formatter.add_endpoint(third, verbose=False)
    assert [formatter.endpoint_name(each) for each in (first, second, third)] == [
        "box",
        "root@box",
        "box.b",
    ]


# --------------------------------------------------------------------------------------------------
# formatters
# --------------------------------------------------------------------------------------------------


BOX = apssh.Endpoint("root", "box1.a.org", 22)


def rendered(formatter: apssh.Formatter, lines: bytes, endpoint: apssh.Endpoint = BOX) -> bytes:
    formatter.add_endpoint(endpoint, verbose=False)
    return formatter._render(endpoint, lines, None)


@pytest.mark.parametrize(
    ("template", "lines", "shown"),
    [
        ("{host}:{linenl}", b"a\nb\n", b"box1:a\nbox1:b\n"),
        ("{fqdn} {user}{line}{nl}", b"a\n", b"box1.a.org root@a\n"),
        ("{line}", b"a\n", b"a\n"),
        ("{line} at {host}", b"x\ny\n", b"x at box1\ny at box1\n"),
        ("{linenl}", b"as it is\n", b"as it is\n"),
        ("{host} {line} {line}", b"twice\n", b"box1 twice twice\n"),
        ("{host}:{linenl}", b"{host} %H {nl}\n", b"box1:{host} %H {nl}\n"),
        ("{host}%%{linenl}", b"a\n", b"box1%a\n"),
        ("no line", b"a\nb\n", b"no line\nno line\n"),
        ("{host}:{linenl}", b"\xff\n", b"box1:\xff\n"),
    ],
)
def test_templates(template: str, lines: bytes, shown: bytes) -> None:
    assert rendered(apssh.TerminalFormatter(template), lines) == shown


def test_template_times() -> None:
    assert re.fullmatch(rb"\d\d-\d\d-\d\d:box1:x\n", rendered(apssh.TimeHostFormatter(), b"x\n"))
    assert re.fullmatch(
        rb"\d\d:\d\d box1 x\n", rendered(apssh.TerminalFormatter("%H:%M {host} {linenl}"), b"x\n")
    )


def test_template_unknown_field() -> None:
    with pytest.raises(UsageError) as caught:
        apssh.TerminalFormatter("{hots}:{line}")
    assert str(caught.value) == (
        "unknown field {hots} in format '{hots}:{line}': the fields are "
        "{time} {host} {fqdn} {user} {line} {linenl} {nl}"
    )


def test_host_column_is_coloured(
    capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Differently for stderr; what a host sends is left as it is, and the column's width too."""
    monkeypatch.setattr(apssh._screen, "colour", "always")
    formatter = apssh.TerminalFormatter("{host} {fqdn} {user}{linenl}")
    formatter.add_endpoint(apssh.Endpoint("root", "longer-name", 22))
    assert sunk(formatter, capfdbinary, (b"a\n", None), (b"e\n", 1)) == (
        b"\x1b[36mbox1       \x1b[0m \x1b[36mbox1.a.org \x1b[0m root@a\n",
        b"\x1b[35mbox1       \x1b[0m \x1b[35mbox1.a.org \x1b[0m root@e\n",
    )
    assert sunk(apssh.RawFormatter(), capfdbinary, (b"a\n", None)) == (b"a\n", b"")


def test_what_is_kept_is_not_coloured(
    capfdbinary: pytest.CaptureFixture[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apssh._screen, "colour", "always")
    capture, folder = apssh.CaptureFormatter("{host}:{linenl}"), apssh.SubdirFormatter(tmp_path)
    folder.custom_format = "{host}:{linenl}"
    for formatter in (capture, folder):
        sunk(formatter, capfdbinary, (b"a\n", None))
    assert capture.get_capture() == (tmp_path / "box1").read_text() == "box1:a\n"


def test_colour_on_a_terminal_keeps_to_the_column(
    sshd: Sshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = "printf 'one\\033[31m\\n'; echo two >&2"
    code, seen = on_terminal("-F", "none", "-t", sshd.target, command)
    assert (code, set(seen.split(b"\r\n"))) == (
        0,
        {
            b"\x1b[36m127.0.0.1\x1b[0m:one\x1b[31m\x1b[0m",
            b"\x1b[35m127.0.0.1\x1b[0m:two",
            b"",
        },
    )
    for argv, environment in ((["--color", "never"], ""), ([], "1")):
        monkeypatch.setenv("NO_COLOR", environment)
        _, seen = on_terminal("-F", "none", "-t", sshd.target, *argv, "echo two")
        assert seen == b"127.0.0.1:two\r\n"


def test_columns_align() -> None:
    formatter = apssh.HostFormatter()
    formatter.add_endpoint(BOX, verbose=False)
    formatter.add_endpoint(apssh.Endpoint("root", "longer-name", 22), verbose=False)
    assert rendered(formatter, b"a\n") == b"box1       :a\n"
    assert (
        rendered(formatter, b"a\n", apssh.Endpoint("root", "longer-name", 22)) == b"longer-name:a\n"
    )


def sunk(
    formatter: apssh.Formatter,
    capfdbinary: pytest.CaptureFixture[bytes] | None,
    *pieces: tuple[bytes, int | None],
) -> tuple[bytes, bytes]:
    """What a command's chunks become on stdout and stderr."""
    formatter.add_endpoint(BOX, verbose=False)
    sink = formatter.endpoint_sink(BOX)
    for data, datatype in pieces:
        sink.data(data, datatype)
    sink.end()
    if capfdbinary is None:
        return b"", b""
    out, err = capfdbinary.readouterr()
    return out, err


def test_lines_are_whole(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    pieces = [(b"one\ntw", None), (b"err", 1), (b"o\nthree", None), (b"or\n", 1)]
    assert sunk(apssh.HostFormatter(), capfdbinary, *pieces) == (
        b"box1:one\nbox1:two\nbox1:three\n",
        b"box1:error\n",
    )


def test_raw_is_byte_for_byte(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    data = bytes(range(256)) * 10
    assert sunk(apssh.RawFormatter(), capfdbinary, (data[:1000], None), (data[1000:], None)) == (
        data,
        b"",
    )


def test_unfinished_lines_of_the_one_host(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    formatter = apssh._LiveFormatter()
    formatter.add_endpoint(BOX)
    sink = formatter.endpoint_sink(BOX)
    sink.data(b"Password: ", None)
    sink.data(b"no\x1b[2J", 1)
    assert capfdbinary.readouterr() == (b"Password: ", b"no\x1b[2J")
    sink.end()
    assert capfdbinary.readouterr() == (b"", b"")
    formatter.add_endpoint(apssh.Endpoint("root", "box2", 22))
    assert sunk(formatter, capfdbinary, (b"whole lines", None)) == (b"box1:whole lines\n", b"")


def test_long_line_is_cut(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    out, _ = sunk(apssh.HostFormatter(), capfdbinary, *[(b"x" * 65536, None)] * 40)
    lines = out.splitlines()
    assert len(lines) == 3
    assert all(len(line) <= apssh.LINE_LIMIT + len("box1:") for line in lines)
    assert sum(len(line) - len("box1:") for line in lines) == 40 * 65536


def test_long_line_ends_none_of_the_other_stream(
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    pieces = [(b"war", 1), (b"x" * apssh.LINE_LIMIT, None), (b"ning\n", 1)]
    _, err = sunk(apssh.HostFormatter(), capfdbinary, *pieces)
    assert err == b"box1:warning\n"


def test_user_formatter_gets_text_lines(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    seen = []

    class Mine(apssh.Formatter):
        def line(self, line: str, datatype: int | None, hostname: str) -> None:
            seen.append((line, datatype, hostname))

    assert sunk(Mine(), capfdbinary, (b"a\nb\xff", None), (b"e\n", 1)) == (b"", b"")
    assert seen == [
        ("a\n", None, "box1.a.org"),
        ("e\n", apssh.EXTENDED_DATA_STDERR, "box1.a.org"),
        ("b\udcff\n", None, "box1.a.org"),
    ]


def test_user_formatter_may_call_its_base(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    class Upper(apssh.HostFormatter):
        def line(self, line: str, datatype: int | None, hostname: str) -> None:
            super().line(line.upper(), datatype, hostname)

    assert sunk(Upper(), capfdbinary, (b"a\n", None)) == (b"box1:A\n", b"")


def test_subdir_formatter(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    formatter = apssh.SubdirFormatter(tmp_path / "run")
    formatter.add_endpoint(BOX, verbose=False)
    formatter.endpoint_started(BOX)
    assert (tmp_path / "run" / "box1").read_bytes() == b""
    assert sunk(formatter, capfdbinary, (b"a\n", None), (b"e", 1), (b"b", None)) == (b"", b"")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == {
        "box1": b"a\nb\n",
        "box1.err": b"e\n",
    }


def test_subdir_formatter_begins_afresh_and_follows_no_link(tmp_path: Path) -> None:
    for name, link in (("box1", "one"), ("box1.err", "two")):
        (tmp_path / link).write_text("precious")
        (tmp_path / name).symlink_to(tmp_path / link)
    formatter = apssh.SubdirFormatter(tmp_path)
    sunk(formatter, None, (b"x\n", None))
    assert sorted(os.listdir(tmp_path)) == ["box1", "home", "one", "two"]
    assert not (tmp_path / "box1").is_symlink() and (tmp_path / "box1").read_bytes() == b"x\n"
    (tmp_path / "box1").unlink()
    (tmp_path / "box1").symlink_to(tmp_path / "one")
    with pytest.raises(OSError, match="symbolic link"):
        sunk(formatter, None, (b"y\n", None))
    assert {(tmp_path / name).read_text() for name in ("one", "two")} == {"precious"}


def test_capture_formatter(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    formatter = apssh.CaptureFormatter()
    assert sunk(formatter, capfdbinary, (b"a\n", None), (b"e\n", 1)) == (b"", b"e\n")
    assert formatter.get_capture() == "a\n"
    formatter.start_capture()
    assert formatter.get_capture() == ""


def test_held_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apssh, "CAPTURE_LIMIT", 1024 * 1024)
    held = apssh._HeldSink()
    held.data(b"x" * 1024 * 1024, None)
    with pytest.raises(ApsshError) as caught:
        held.data(b"y", 1)
    assert str(caught.value) == "more than 1 MiB of output to hold"
    formatter = apssh.CaptureFormatter()
    with pytest.raises(ApsshError, match="more than 1 MiB of output to hold"):
        formatter._write(BOX, b"x" * (1024 * 1024 + 1), None)


@pytest.mark.parametrize(
    ("kind", "keywords"),
    [
        (apssh.HostFormatter, ["custom_format", "verbose"]),
        (apssh.TerminalFormatter, ["custom_format", "verbose"]),
        (apssh.SubdirFormatter, ["run_name", "verbose"]),
        (apssh.CaptureFormatter, ["custom_format", "verbose"]),
    ],
)
def test_signature_of_a_formatter(kind: type[apssh.Formatter], keywords: list[str]) -> None:
    assert list(inspect.signature(kind).parameters) == keywords


def test_events_are_silent_unless_asked(capfd: pytest.CaptureFixture[str]) -> None:
    for verbose in (False, True):
        formatter = apssh.Formatter(verbose=verbose)
        formatter.connection_made("box", "root", True)
        formatter.connection_made("box", "root", False)
        formatter.auth_completed("box", "root")
        formatter.session_start("box", "ls\x1b[2J")
        formatter.session_stop("box", "ls")
        formatter.sftp_start("box")
        formatter.sftp_stop("box")
        formatter.connection_lost("box", None, "root")
        formatter.connection_lost("box", OSError("cut"), "root")
        assert capfd.readouterr().err.splitlines() == (
            [
                "box: connected as root",
                "box: connected as root, through a gateway",
                "box: logged in as root",
                r"box: starts: ls\x1b[2J",
                "box: ended: ls",
                "box: SFTP session starts",
                "box: SFTP session ended",
                "box: connection closed",
                "box: connection lost: cut",
            ]
            if verbose
            else []
        )


def test_subclass_with_a_constructor_of_its_own() -> None:
    class Mine(apssh.CaptureFormatter):
        def __init__(self) -> None:
            pass

    formatter = Mine()
    formatter.endpoint_lines(BOX, b"out\n", None)
    assert formatter.get_capture() == "out\n"


def test_line_of_two_users_on_a_host(capfd: pytest.CaptureFixture[str]) -> None:
    class Loud(apssh.HostFormatter):
        def line(self, line: str, datatype: int | None, hostname: str) -> None:
            super().line(line.upper(), datatype, hostname)

    formatter = Loud()
    users = [apssh.Endpoint(user, "box", 22) for user in ("root", "tester")]
    for endpoint in users:
        formatter.add_endpoint(endpoint, False)
    for endpoint in users:
        formatter.endpoint_lines(endpoint, b"hello\n", None)
    assert capfd.readouterr().out == "root@box  :HELLO\ntester@box:HELLO\n"


def test_line_whatever_the_locale() -> None:
    """Bytes leave as they came where the file system's encoding is another."""
    done = run_python(
        "-c",
        "import apssh; apssh.Formatter().line('caf\\xe9\\udcff\\n', None, 'box')",
        check=True,
        env=os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    )
    assert done.stdout == "café".encode() + b"\xff\n"


def test_older_names_of_formatters() -> None:
    from apssh.formatters import ColonFormatter, TimeColonFormatter

    assert (ColonFormatter, TimeColonFormatter) == (apssh.HostFormatter, apssh.TimeHostFormatter)


def test_stderr_line(capfd: pytest.CaptureFixture[str]) -> None:
    apssh.HostFormatter().stderr_line("a word\n", "box")
    assert capfd.readouterr() == ("", "box:a word\n")


def test_stream_that_takes_a_part_gets_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an unbuffered one does (python -u) after a signal."""

    class Parts(io.RawIOBase):
        taken = b""

        def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]
            taken = bytes(data)[:5]
            self.taken += taken
            return len(taken)

    class Stream(io.StringIO):
        buffer = Parts()

    monkeypatch.setattr(sys, "stdout", Stream())
    apssh._screen.write(b"a line of some length\n")
    assert Stream.buffer.taken == b"a line of some length\n"


def test_output_to_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    apssh._screen.write(b"caf\xc3\xa9\n")
    assert stream.getvalue() == "café\n"


# --------------------------------------------------------------------------------------------------
# host keys and login
# --------------------------------------------------------------------------------------------------


needs_ssh = pytest.mark.skipif(
    not shutil.which("ssh"), reason="no OpenSSH client (ssh) is installed here"
)
POLICIES = ["accept-new", "yes", "no"]


def public(key: Any) -> str:
    """Type and data, as a known_hosts line has them."""
    return " ".join(key.export_public_key().decode().split()[:2])


def fingerprint(key: asyncssh.SSHKey) -> str:
    """As ssh shows it."""
    kind = re.sub("^ssh-|-sha2-.*", "", key.get_algorithm()).upper()
    return f"{kind} {key.get_fingerprint()}"


def hashed(name: str) -> str:
    salt = os.urandom(20)
    return "|1|" + "|".join(
        base64.b64encode(part).decode() for part in (salt, hmac.digest(salt, name.encode(), "sha1"))
    )


def blob(algorithm: str, data: bytes) -> str:
    """A public key of some type, right only at first sight."""
    typed_data = len(algorithm).to_bytes(4, "big") + algorithm.encode() + data
    return f"{algorithm} {base64.b64encode(typed_data).decode()}"


def changed(
    file: Path, host: str, port: int, shown: asyncssh.SSHKey, known: asyncssh.SSHKey, line: int = 1
) -> str:
    """The whole message about a changed key."""
    return (
        f"{host}: hostkey: HOST KEY CHANGED: it presents {fingerprint(shown)}, known is "
        f"{fingerprint(known)} in {file}:{line}; "
        "somebody may be in the middle. If it was reinstalled: ssh-keygen -R "
        f"'[{host}]:{port}' -f {file} "
        "(hosts reinstalled all day: --host-keys no, known_hosts=None, or "
        "APSSH_HOST_KEYS=no:PATTERN)"
    )


def openssh(
    port: int, known_hosts: Path, policy: str, key: Path, *options: str, host: str = "127.0.0.1"
) -> bool:
    """Whether OpenSSH's own client logs in."""
    words = ["ssh", "-F", "none", "-n", "-i", str(key), "-p", str(port), *options]
    for option in (
        "IdentitiesOnly=yes",
        "BatchMode=yes",
        f"UserKnownHostsFile={known_hosts}",
        "GlobalKnownHostsFile=none",
        "UpdateHostKeys=no",
        f"StrictHostKeyChecking={policy}",
    ):
        words += ["-o", option]
    return (
        subprocess.run(
            [*words, f"{ME}@{host}", "exit 3"], capture_output=True, check=False, timeout=30
        ).returncode
        == 3
    )


OTHER = {
    name: asyncssh.generate_private_key(name) for name in ("ssh-ed25519", "ecdsa-sha2-nistp256")
}
CA, OTHER_CA = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(2))
NOT_KNOWN = (
    "its key {shown} is not known, and the policy refuses unknown hosts (--host-keys "
    "accept-new records them)"
)
REVOKED = "its key {shown} is revoked in {file}: the host needs a new one"
SHORT = blob("ssh-ed25519", (32).to_bytes(4, "big") + b"short")
OFF_CURVE = blob("ecdsa-sha2-nistp256", b"\0\0\0\x08nistp256\0\0\0\x41\x04" + b"\1" * 64)
NEGATIVE = blob("ssh-rsa", b"\0\0\0\1\x83\0\0\0\x40" + b"\xff" * 64)

# the lines of known_hosts ({n}: the name with its port, {h}: without, |n| and |h|: hashed), the
# policy, what comes of it: "" it is trusted, "recorded", or the message ("changed N": about the key
# in line N); and whether it is known that ssh is less careful
HOST_KEYS = {
    "unknown": ("", "accept-new", "recorded"),
    "unknown-yes": ("", "yes", NOT_KNOWN),
    "unknown-no": ("", "no", ""),
    "known": ("{n} {key}", "accept-new", ""),
    "known-yes": ("{n} {key}", "yes", ""),
    "known-among-others": (
        "# {n} {other}\n\n  \nelsewhere {other}\n  {n}\t{key} a comment of words\n",
        "yes",
        "",
    ),
    "known-in-a-list": ("elsewhere,{n},[elsewhere]:77 {key}", "yes", ""),
    "known-without-port": ("{h} {key}", "yes", ""),
    "known-on-another-port": ("[{h}]:1 {key}", "yes", NOT_KNOWN),
    "other-key-on-another-port": ("[{h}]:1 {other}", "accept-new", "recorded"),
    "other-key-without-port": ("{h} {other}", "accept-new", "recorded"),
    "changed": ("{n} {other}", "accept-new", "changed 1"),
    "changed-yes": ("{n} {other}", "yes", "changed 1"),
    "changed-no": ("{n} {other}", "no", ""),
    "changed-type": ("# one\n{n} {ecdsa}", "accept-new", "changed 2"),
    "changed-in-a-list": ("elsewhere,{n} {other}", "accept-new", "changed 1"),
    "second-type-later": ("{n} {ecdsa}\n{n} {key}", "yes", ""),
    "second-key-later": ("{n} {other}\n{n} {key}", "yes", ""),
    "revoked": ("@revoked {n} {key}", "accept-new", REVOKED),
    "revoked-yes": ("@revoked {n} {key}", "yes", REVOKED),
    "revoked-without-port": ("@revoked {h} {key}", "accept-new", REVOKED, "ssh: new"),
    "revoked-no": ("@revoked {n} {key}", "no", ""),
    "revoked-everywhere": ("@revoked * {key}", "accept-new", REVOKED),
    "revoked-hashed": ("@revoked |n| {key}", "accept-new", REVOKED),
    "revoked-and-known": ("{n} {key}\n@revoked {n} {key}", "yes", REVOKED),
    "revoked-other-key": ("@revoked {n} {other}", "accept-new", "recorded"),
    "revoked-other-then-known": ("@revoked * {other}\n{n} {key}", "yes", ""),
    "revoked-on-another-port": ("@revoked [{h}]:1 {key}", "accept-new", "recorded"),
    "hashed": ("|n| {key}", "yes", ""),
    "hashed-without-port": ("|h| {key}", "yes", ""),
    "hashed-changed": ("|n| {other}", "accept-new", "changed 1"),
    "hashed-of-another": ("|other| {other}", "accept-new", "recorded"),
    "wildcard": ("[127.*]:* {key}", "yes", ""),
    "wildcard-without-port": ("127.0.0.? {key}", "yes", ""),
    "wildcard-changed": ("[127.0.?.1]:* {other}", "accept-new", "changed 1"),
    "wildcard-of-others": ("*.example.org,10.* {other}", "accept-new", "recorded"),
    "negated": ("[127.*]:*,!{n} {other}", "accept-new", "recorded"),
    "negated-first": ("!{n},[127.*]:* {other}", "accept-new", "recorded"),
    "negated-other": ("[127.*]:*,![127.0.0.2]:* {key}", "yes", ""),
    "negated-alone": ("!{n} {key}", "yes", NOT_KNOWN),
    "brackets-are-no-pattern": ("[127.0.0.1]:[0-9]* {other}", "accept-new", "recorded"),
    "authority-of-a-host-without-certificate": (
        "@cert-authority * {other}",
        "accept-new",
        "recorded",
    ),
    "authority-is-not-a-key": ("@cert-authority {n} {key}", "yes", NOT_KNOWN),
    "malformed-words": (
        "garbage\n{n} ssh-ed25519\n@revoked\n@other {n} {other}\n{n} {key}",
        "yes",
        "",
    ),
    "malformed-data": (
        "{n} ssh-ed25519 !notbase64\n{n} ssh-ed25519 AAAA\n|1|x|y {other}\n|1|bad {other}\n{n} "
        "{key}",
        "yes",
        "",
    ),
    "malformed-bytes": ("\udcff\udcfe {other}\n\0{n} {other}\n{n} {key}", "yes", ""),
    "malformed-key": ("{n} {short}", "accept-new", "recorded"),
    "malformed-key-then-known": ("{n} {short}\n{n} {key}", "yes", ""),
    "malformed-numbers": ("{n} {off_curve}\n{n} {negative}\n{n} {key}", "yes", ""),
    "malformed-type": ("{n} {unheard}", "accept-new", "recorded"),
    "malformed-type-then-known": ("{n} {unheard}\n{n} {key}", "yes", ""),
    "malformed-wrong-type": ("{n} ssh-rsa {data}", "accept-new", "recorded"),
    "malformed-revoked": ("@revoked * {short}\n@revoked * {unheard}\n{n} {key}", "yes", ""),
    "malformed-authority": (
        "@cert-authority * {short}\n@cert-authority * {unheard}\n{n} {key}",
        "yes",
        "",
    ),
}


async def log_in(node: SshNode) -> None:
    async with node:
        assert node.is_connected()


def known_hosts_text(text: str, port: int, key: asyncssh.SSHKey) -> bytes:
    for mark, name in (
        ("|n|", f"[127.0.0.1]:{port}"),
        ("|h|", "127.0.0.1"),
        ("|other|", "elsewhere"),
    ):
        text = text.replace(mark, hashed(name))
    return os.fsencode(
        text.format(
            n=f"[127.0.0.1]:{port}",
            h="127.0.0.1",
            key=public(key),
            other=public(OTHER["ssh-ed25519"]),
            ca=public(CA),
            ecdsa=public(OTHER["ecdsa-sha2-nistp256"]),
            other_ca=public(OTHER_CA),
            short=SHORT,
            unheard=blob("ssh-foo", b"x" * 40),
            off_curve=OFF_CURVE,
            negative=NEGATIVE,
            data=public(key).split()[1],
        )
    )


@pytest.mark.parametrize("case", HOST_KEYS)
@pytest.mark.usefixtures("never_seen")
def test_host_keys(sshd: Sshd, home: Path, case: str) -> None:
    """Each situation: who is trusted, what is written, and the words."""
    lines, policy, outcome = HOST_KEYS[case][:3]
    file = home / ".ssh" / "known_hosts"
    text = known_hosts_text(lines, sshd.port, sshd.key)
    if text:
        file.write_bytes(text)
    if outcome in ("", "recorded"):
        run(log_in(sshd.node(host_keys=policy)))
    else:
        error = failure_of(sshd.node(host_keys=policy).run("true"))
        if outcome.startswith("changed"):
            old = OTHER["ecdsa-sha2-nistp256" if "ecdsa" in lines else "ssh-ed25519"]
            assert str(error) == changed(
                file, "127.0.0.1", sshd.port, sshd.key, old, int(outcome.split()[1])
            )
        else:
            assert (
                str(error)
                == f"127.0.0.1: hostkey: {outcome.format(shown=fingerprint(sshd.key), file=file)}"
            )
        assert isinstance(error, HostKeyError)
    newline = b"\n" if text and not text.endswith(b"\n") else b""
    record = (
        newline + f"[127.0.0.1]:{sshd.port} {public(sshd.key)}\n".encode()
        if outcome == "recorded"
        else b""
    )
    assert (file.read_bytes() if file.exists() else b"") == text + record


@needs_ssh
@pytest.mark.slow
@pytest.mark.parametrize("case", HOST_KEYS)
def test_ssh_decides_alike(sshd: Sshd, keys: Path, tmp_path: Path, case: str) -> None:
    lines, policy, outcome, *less_careful = HOST_KEYS[case]
    file = tmp_path / "known_hosts"
    file.write_bytes(text := known_hosts_text(lines, sshd.port, sshd.key))
    assert openssh(sshd.port, file, policy, keys / "id_ed25519") == (
        outcome in ("", "recorded") or bool(less_careful)
    )
    assert (file.read_bytes() != text) == (
        outcome == "recorded" or bool(less_careful) or case == "unknown-no"
    )


# the host's certificate, the lines, the policy, what comes of it
CERTIFICATES = {
    "by-name": ("good", "@cert-authority {h} {ca}", "yes", ""),
    "by-name-and-port": ("good", "@cert-authority {n} {ca}", "yes", ""),
    "by-pattern": ("good", "@cert-authority 127.* {ca}", "yes", ""),
    "everywhere": ("good", "@cert-authority * {other_ca}\n@cert-authority * {ca}", "yes", ""),
    "not-recorded": ("good", "@cert-authority * {ca}", "accept-new", ""),
    "over-another-key": ("good", "@cert-authority * {ca}\n{n} {other}", "yes", ""),
    "hashed": ("good", "@cert-authority |n| {ca}", "yes", ""),
    "of-others": ("good", "@cert-authority *.example.org {ca}", "yes", NOT_KNOWN),
    "of-others-new": ("good", "@cert-authority *.example.org {ca}", "accept-new", "recorded"),
    "negated": ("good", "@cert-authority *,!{h},!{n} {ca}", "yes", NOT_KNOWN),
    "unknown-authority": ("good", "@cert-authority * {other_ca}", "yes", NOT_KNOWN),
    "unknown-authority-new": ("good", "@cert-authority * {other_ca}", "accept-new", "recorded"),
    "unknown-authority-known-key": ("good", "@cert-authority * {other_ca}\n{n} {key}", "yes", ""),
    "unknown-authority-changed-key": (
        "good",
        "@cert-authority * {other_ca}\n{n} {other}",
        "accept-new",
        "changed 2",
    ),
    "revoked-authority": (
        "good",
        "@cert-authority * {ca}\n@revoked * {ca}",
        "accept-new",
        "its certificate is signed by {ca}, which is revoked in {file}: the host needs a new one",
    ),
    "revoked-signer": (
        "good",
        "@cert-authority * {other_ca}\n@revoked * {ca}\n{n} {key}",
        "accept-new",
        "its certificate is signed by {ca}, which is revoked in {file}: the host needs a new one",
    ),
    "revoked-key": ("good", "@cert-authority * {ca}\n@revoked * {key}", "accept-new", REVOKED),
    "no-check": ("good", "@cert-authority * {other_ca}\n@revoked * {key}", "no", ""),
    "expired": ("expired", "@cert-authority * {ca}", "yes", NOT_KNOWN),
    "expired-known-key": ("expired", "@cert-authority * {ca}\n{n} {key}", "yes", ""),
    "other-principal": ("other", "@cert-authority * {ca}", "yes", NOT_KNOWN),
    "users": ("user", "@cert-authority * {ca}", "yes", NOT_KNOWN),
    "other-principal-known-key": ("other", "@cert-authority * {ca}\n{n} {key}", "yes", ""),
}


@pytest.fixture(scope="session")
def certified(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> Iterator[dict[str, Sshd]]:
    """Servers with a host certificate: a good one, an expired one, one of another host, one of a
    user.
    """
    servers, key = {}, asyncssh.generate_private_key("ssh-ed25519")
    for kind in ("good", "expired", "other", "user"):
        folder = tmp_path_factory.mktemp(kind)
        if kind == "user":
            certificate = CA.generate_user_certificate(key, kind, principals=["127.0.0.1"])
        else:
            certificate = CA.generate_host_certificate(
                key,
                kind,
                principals=["box.example.org" if kind == "other" else "127.0.0.1"],
                valid_after="20200101",
                valid_before="20210101" if kind == "expired" else "29990101",
            )
        key.write_private_key(folder / "key")
        (folder / "key").chmod(0o600)
        certificate.write_certificate(folder / "key-cert.pub")
        servers[kind] = Sshd(
            folder, keys, HostKey=folder / "key", HostCertificate=folder / "key-cert.pub"
        )
        servers[kind].key = key
    yield servers
    for server in servers.values():
        server.stop()


@pytest.mark.parametrize("case", CERTIFICATES)
def test_host_certificates(certified: dict[str, Sshd], home: Path, case: str) -> None:
    """A certificate that does not count leaves the plain key, as with ssh."""
    kind, lines, policy, outcome = CERTIFICATES[case]
    server, file = certified[kind], home / ".ssh" / "known_hosts"
    file.write_bytes(text := known_hosts_text(lines, server.port, server.key))
    if outcome in ("", "recorded"):
        run(log_in(server.node(host_keys=policy)))
    else:
        error = failure_of(server.node(host_keys=policy).run("true"))
        if outcome.startswith("changed"):
            assert str(error) == changed(
                file,
                "127.0.0.1",
                server.port,
                server.key,
                OTHER["ssh-ed25519"],
                int(outcome.split()[1]),
            )
        else:
            assert (
                str(error) == "127.0.0.1: hostkey: "
                f"{outcome.format(shown=fingerprint(server.key), file=file, ca=fingerprint(CA))}"
            )
        assert isinstance(error, HostKeyError)
    record = (
        f"\n[127.0.0.1]:{server.port} {public(server.key)}\n".encode()
        if outcome == "recorded"
        else b""
    )
    assert file.read_bytes() == text + record


@needs_ssh
@pytest.mark.slow
@pytest.mark.parametrize("case", CERTIFICATES)
def test_ssh_decides_alike_on_certificates(
    certified: dict[str, Sshd], keys: Path, tmp_path: Path, case: str
) -> None:
    kind, lines, policy, outcome = CERTIFICATES[case]
    server, file = certified[kind], tmp_path / "known_hosts"
    file.write_bytes(text := known_hosts_text(lines, server.port, server.key))
    assert openssh(server.port, file, policy, keys / "id_ed25519") == (outcome in ("", "recorded"))
    assert (file.read_bytes() != text) == (outcome == "recorded")


@pytest.mark.parametrize(
    ("revoked", "message"),
    [
        (
            "ca",
            "its certificate is signed by {ca}, which is revoked in {file}: "
            "the host needs a new one",
        ),
        ("key", REVOKED),
        ("other_ca", ""),
    ],
)
def test_revoked_host_keys_and_certificates(
    certified: dict[str, Sshd], home: Path, revoked: str, message: str
) -> None:
    """RevokedHostKeys goes for a certificate's key, and for who signed it."""
    server, file = certified["good"], home / "revoked"
    (home / ".ssh" / "known_hosts").write_text(f"@cert-authority * {public(CA)}\n")
    file.write_bytes(known_hosts_text(f"{{{revoked}}}\n", server.port, server.key))
    (home / "config").write_text(f"Host *\n RevokedHostKeys {file}\n")
    if message:
        error = failure_of(server.node(config="config").run("true"))
        assert (
            str(error) == "127.0.0.1: hostkey: "
            f"{message.format(shown=fingerprint(server.key), ca=fingerprint(CA), file=file)}"
        )
    else:
        run(log_in(server.node(config="config")))


def test_certificate_that_was_not_asked_for_counts_for_nothing(
    certified: dict[str, Sshd], home: Path
) -> None:
    """After a certificate of nobody's the plain key is asked for: what vouches for that must not be
    a certificate sent all the same.
    """
    (home / ".ssh" / "known_hosts").write_text(f"@cert-authority * {public(CA)}\n")
    trusts = [
        apssh._Trust(
            "127.0.0.1",
            "127.0.0.1",
            certified["good"].port,
            known_hosts=home / ".ssh" / "known_hosts",
            host_keys=None,
            config=apssh._UNCONFIGURED,
            asking=asking,
        )
        for asking in (True, False)
    ]
    assert [trust.check_authority(CA.convert_to_public()) for trust in trusts] == [True, False]


def test_certificate_under_an_alias(certified: dict[str, Sshd], home: Path) -> None:
    """The name that a certificate must hold is the one that known_hosts is asked for."""
    server = certified["other"]
    (home / ".ssh" / "known_hosts").write_text(f"@cert-authority *.example.org {public(CA)}\n")
    (home / "config").write_text("Host *\n HostKeyAlias box.example.org\n")
    run(log_in(server.node(config="config", host_keys="yes")))


def test_new_files(sshd: Sshd, home: Path, keys: Path) -> None:
    """A missing folder is made; nobody else may look into it."""
    shutil.rmtree(home / ".ssh")
    run(log_in(sshd.node(keys=[keys / "id_ed25519"])))
    file = home / ".ssh" / "known_hosts"
    assert file.read_text() == f"[127.0.0.1]:{sshd.port} {public(sshd.key)}\n"
    assert (stat.S_IMODE(file.parent.stat().st_mode), stat.S_IMODE(file.stat().st_mode)) == (
        0o700,
        0o600,
    )


@pytest.mark.usefixtures("never_seen")
def test_file_that_cannot_be_written(sshd: Sshd, home: Path, capfd: Any) -> None:
    """The host is reached all the same, with a word about it."""
    file = home / ".ssh" / "known_hosts"
    file.mkdir()
    run(log_in(sshd.node()))
    assert capfd.readouterr() == (
        "",
        f"127.0.0.1: its key could not be recorded in {file}: is a directory\n",
    )


def test_read_only_file(sshd: Sshd, home: Path, capfd: Any) -> None:
    file = home / ".ssh" / "known_hosts"
    file.write_text(text := f"elsewhere {public(OTHER['ssh-ed25519'])}\n")
    if os.getuid():
        file.chmod(0o400)
    elif (
        not shutil.which("chattr")
        or subprocess.run(["chattr", "+i", str(file)], capture_output=True, check=False).returncode
    ):
        pytest.skip("root writes to any file, and chattr +i cannot be had here")
    try:
        run(log_in(sshd.node()))
        assert file.read_text() == text
    finally:
        if not os.getuid():
            subprocess.run(["chattr", "-i", str(file)], check=True)
    reason = "permission denied" if os.getuid() else "operation not permitted"
    assert capfd.readouterr() == (
        "",
        f"127.0.0.1: its key could not be recorded in {file}: {reason}\n",
    )


@pytest.mark.usefixtures("never_seen")
def test_global_file(
    sshd: Sshd, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the administrator says in /etc/ssh/ssh_known_hosts counts too, and is not repeated."""
    everybody, mine = tmp_path / "everybody", home / ".ssh" / "known_hosts"
    assert "/etc/ssh/ssh_known_hosts" in apssh.KNOWN_HOSTS_FILES
    monkeypatch.setattr(
        apssh,
        "KNOWN_HOSTS_FILES",
        tuple(str(everybody) if "/etc/" in name else name for name in apssh.KNOWN_HOSTS_FILES),
    )
    everybody.write_text(f"127.0.0.1 {public(sshd.key)}\n")
    run(log_in(sshd.node(host_keys="yes")))
    assert not mine.exists()
    everybody.write_text(f"@revoked * {public(sshd.key)}\n")
    mine.write_text(f"127.0.0.1 {public(sshd.key)}\n")
    assert (
        str(failure_of(sshd.node().run("true")))
        == f"127.0.0.1: hostkey: its key {fingerprint(sshd.key)} is revoked in {everybody}: "
        "the host needs a new one"
    )
    everybody.write_text(f"elsewhere {public(sshd.key)}\n")
    mine.unlink()
    run(log_in(sshd.node()))
    assert mine.read_text() == f"[127.0.0.1]:{sshd.port} {public(sshd.key)}\n"


def test_remedy_of_a_changed_key(sshd: Sshd, home: Path) -> None:
    """The command in the message is one that helps, in the same run too."""
    file = home / ".ssh" / "known_hosts"
    file.write_bytes(known_hosts_text("{n} {other}\n", sshd.port, sshd.key))
    node = sshd.node()
    remedy = re.search("ssh-keygen -R '.*' -f [^ ]*", str(failure_of(node.run("true"))))
    assert remedy
    subprocess.run(remedy[0], shell=True, check=True, capture_output=True)
    run(log_in(node))
    assert file.read_text() == f"[127.0.0.1]:{sshd.port} {public(sshd.key)}\n"


async def test_key_that_changes_within_a_run(home: Path, keys: Path) -> None:
    """The message names the very line that this run has written."""
    file = home / ".ssh" / "known_hosts"
    file.write_text(f"elsewhere {public(OTHER['ssh-ed25519'])}\n# no newline at the end")
    before, after = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(2))
    async with ssh_server(keys, host_key=before) as port:
        node = SshNode("127.0.0.1", port=port, username=ME)
        await log_in(node)
    async with ssh_server(keys, host_key=after, port=port):
        with pytest.raises(HostKeyError) as caught:
            await node.run("true")
    assert str(caught.value) == changed(file, "127.0.0.1", port, after, before, 3)


async def test_key_that_changes_within_a_login(keys: Path, home: Path) -> None:
    """A host never seen shows another key on its second connection: it is recorded once, and
    refused.
    """
    host_keys = [asyncssh.generate_private_key("ssh-ed25519") for _ in range(2)]

    class Server(asyncssh.SSHServer):
        def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
            self._conn = conn

        def begin_auth(self, username: str) -> bool:
            self._conn.disconnect(asyncssh.DISC_PROTOCOL_ERROR, "Too many authentication failures")
            return True

    async with (
        ssh_server(keys, host_key=host_keys[0], server=Server) as first,
        ssh_server(keys, host_key=host_keys[1]) as second,
    ):
        served: list[int] = []

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            served.append(second if served else first)
            there, back = await asyncio.open_connection("127.0.0.1", served[-1])

            async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
                while data := await source.read(65536):
                    sink.write(data)
                sink.close()

            await asyncio.gather(pump(reader, back), pump(there, writer), return_exceptions=True)

        async with raw_server(talk) as port:
            node = SshNode(
                "127.0.0.1", port=port, username=ME, keys=[keys / "other", keys / "id_ed25519"]
            )
            with pytest.raises(ConnectionFailedError) as caught:
                await node.run("true")
            if len(served) > 1:
                assert caught.value.kind == "hostkey"
            assert len((home / ".ssh" / "known_hosts").read_text().splitlines()) == 1


def test_known_hosts_of_a_node(sshd: Sshd, home: Path, tmp_path: Path) -> None:
    """None checks nothing, a path is the only file, keys are the only ones."""
    mine, own = home / ".ssh" / "known_hosts", tmp_path / "folder" / "own"
    mine.write_bytes(known_hosts_text("{n} {other}", sshd.port, sshd.key))
    before = mine.read_bytes()
    run(log_in(sshd.node(known_hosts=None)))
    run(log_in(sshd.node(known_hosts=None, host_keys="yes")))
    for path in (own, str(own)):
        run(log_in(sshd.node(known_hosts=path)))
    assert own.read_text() == f"[127.0.0.1]:{sshd.port} {public(sshd.key)}\n"
    own.write_bytes(before)
    assert str(failure_of(sshd.node(known_hosts=own).run("true"))) == changed(
        own, "127.0.0.1", sshd.port, sshd.key, OTHER["ssh-ed25519"]
    )
    run(
        log_in(
            sshd.node(
                known_hosts=[OTHER["ssh-ed25519"].convert_to_public(), sshd.key.convert_to_public()]
            )
        )
    )
    error = failure_of(
        sshd.node(known_hosts=[OTHER["ssh-ed25519"].convert_to_public()]).run("true")
    )
    assert (
        str(error)
        == f"127.0.0.1: hostkey: it presents {fingerprint(sshd.key)}, which is not the key "
        "given for it"
    )
    assert mine.read_bytes() == before


TRUSTED = ""  # in the table below: the host whose key has changed is trusted; else it is not
REFUSED = "hostkey"
BAD_VARIABLE = (
    "127.0.0.1: local: APSSH_HOST_KEYS={value}: write accept-new, yes or no, "
    "perhaps with host patterns: no:fit*,node[1-9]*"
)


@pytest.mark.parametrize(
    ("value", "options", "outcome"),
    [
        ("no", {}, TRUSTED),
        ("accept-new", {}, REFUSED),
        ("yes", {}, REFUSED),
        ("ask", {}, REFUSED),
        ("", {}, REFUSED),
        ("no:127.*", {}, TRUSTED),
        ("no:fit*,127.0.0.[1-9]", {}, TRUSTED),
        ("no:fit* , 127.*", {}, TRUSTED),
        ("no:fit*,node[1-9]*", {}, REFUSED),
        ("no:*,!127.0.0.1", {}, REFUSED),
        ("no:!10.*,*", {}, TRUSTED),
        ("no:!10.*", {}, REFUSED),
        ("no:127.0.0.1", {"host_keys": "accept-new"}, REFUSED),
        ("yes", {"host_keys": "no"}, TRUSTED),
        ("yes", {"known_hosts": None}, TRUSTED),
        ("maybe", {}, BAD_VARIABLE),
        ("no,127.*", {}, BAD_VARIABLE),
        ("maybe:fit*", {}, BAD_VARIABLE),
        ("No", {}, BAD_VARIABLE),
        ("no:", {}, REFUSED),
        ("\x1b[2J", {}, BAD_VARIABLE),
        ("maybe", {"known_hosts": None}, TRUSTED),
    ],
    ids=lambda value: (
        {TRUSTED: "trusted", BAD_VARIABLE: "misuse"}.get(value, value)
        if isinstance(value, str)
        else "-".join(value) or "plain"
    ),
)
def test_variable(
    sshd: Sshd,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    value: str,
    options: dict[str, Any],
    outcome: str,
) -> None:
    """APSSH_HOST_KEYS, for a host whose key has changed."""
    (home / ".ssh" / "known_hosts").write_bytes(
        known_hosts_text("{n} {other}", sshd.port, sshd.key)
    )
    monkeypatch.setenv("APSSH_HOST_KEYS", value)
    node = sshd.node(**options)
    if outcome == TRUSTED:
        run(log_in(node))
    elif outcome == REFUSED:
        assert failure_of(node.run("true")).kind == "hostkey"
    else:
        assert str(failure_of(node.run("true"))).removeprefix(
            "127.0.0.1: local: "
        ) == outcome.format(value=apssh.escape(value)).removeprefix("127.0.0.1: local: ")


def test_changed_key_is_compared_with_one_of_its_type(sshd: Sshd, home: Path) -> None:
    """Though another line comes first."""
    known, older = (asyncssh.generate_private_key(each) for each in ("ssh-ed25519", "ssh-rsa"))
    file = home / ".ssh" / "known_hosts"
    name = f"[127.0.0.1]:{sshd.port}"
    file.write_text(f"{name} {public(older)}\n{name} {public(known)}\n")
    assert str(failure_of(sshd.node().run("true"))) == changed(
        file, "127.0.0.1", sshd.port, sshd.key, known, line=2
    )


def test_variable_of_the_program(
    sshd: Sshd, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """It counts for the programs, after --host-keys; a wrong one is misuse."""
    (home / ".ssh" / "known_hosts").write_bytes(
        known_hosts_text("{n} {other}", sshd.port, sshd.key)
    )
    words = ["-t", sshd.target, "exit 0"]
    assert apssh.main(words) == 1
    assert capfd.readouterr().err.startswith(
        "127.0.0.1: hostkey: HOST KEY CHANGED: it presents ED25519 SHA256:"
    )
    assert apssh.main(["--host-keys", "no", *words]) == 0
    assert apssh.main(["--host-keys", "yes", *words]) == 1
    monkeypatch.setenv("APSSH_HOST_KEYS", "no:127.*")
    assert apssh.main(words) == 0
    assert apssh.main(["--host-keys", "accept-new", *words]) == 1
    capfd.readouterr()
    monkeypatch.setenv("APSSH_HOST_KEYS", "never")
    assert apssh.main(words) == 2
    assert (
        capfd.readouterr().err
        == "apssh: " + BAD_VARIABLE.format(value="never").removeprefix("127.0.0.1: local: ") + "\n"
    )


@pytest.mark.parametrize("config", ["accept-new", "yes", "no", "ask", "off"])
@pytest.mark.usefixtures("never_seen")
def test_policy_of_the_config(sshd: Sshd, home: Path, config: str) -> None:
    """StrictHostKeyChecking, where nothing more explicit is said; ask means accept-new."""
    (home / "config").write_text(f"Host *\n StrictHostKeyChecking {config}\n")
    file = home / ".ssh" / "known_hosts"
    node = sshd.node(config="config")
    if config == "yes":
        assert failure_of(node.run("true")).kind == "hostkey"
    else:
        run(log_in(node))
    assert file.exists() == (config in ("accept-new", "ask"))


@pytest.mark.usefixtures("never_seen")
def test_host_keys_behind_gateways(sshd: Sshd, make_sshd: Callable[..., Sshd], home: Path) -> None:
    """Each hop is checked, and recorded, under its own name as the one before it knows it."""
    middle, last = make_sshd(), make_sshd()
    file = home / ".ssh" / "known_hosts"

    async def main(*policies: str | None) -> None:
        nodes: list[SshNode] = []
        for server, policy in zip((sshd, middle, last), policies, strict=True):
            nodes.append(
                SshNode(
                    "localhost" if server is last else "127.0.0.1",
                    port=server.port,
                    username=ME,
                    host_keys=policy,
                    gateway=nodes[-1] if nodes else None,
                )
            )
        try:
            await nodes[-1].connect_lazy()
        finally:
            for node in reversed(nodes):
                await node.close()

    run(main(None, None, None))
    recorded = file.read_text()
    assert recorded.splitlines() == [
        f"[{name}]:{server.port} {public(server.key)}"
        for name, server in (("127.0.0.1", sshd), ("127.0.0.1", middle), ("localhost", last))
    ]
    run(main("yes", "yes", "yes"))
    other = OTHER["ssh-ed25519"]
    for server, name in ((last, "localhost"), (middle, "127.0.0.1"), (sshd, "127.0.0.1")):
        file.write_text(recorded.replace(public(server.key), public(other)))
        line = [sshd, middle, last].index(server) + 1
        message = changed(file, name, server.port, server.key, other, line)
        if server is not last:
            message = (
                "localhost: hostkey: gateway 127.0.0.1: "
                f"{message.removeprefix('127.0.0.1: hostkey: ')}"
            )
        if server is sshd:
            message = message.replace(
                "gateway 127.0.0.1: ", "gateway 127.0.0.1: gateway 127.0.0.1: "
            )
        assert str(failure_of(main(None, None, None))) == message
    run(main("no", None, None))


@pytest.mark.parametrize("hops", [1, 2])
def test_wrong_key_of_a_gateway_is_a_host_key_error(
    sshd: Sshd, make_sshd: Callable[..., Sshd], home: Path, hops: int
) -> None:
    """Its class and kind arrive however far behind it the host is."""
    gateway = make_sshd()
    (home / ".ssh" / "known_hosts").write_bytes(
        known_hosts_text("{n} {other}", gateway.port, gateway.key)
    )
    node = gateway.node()
    for _ in range(hops):
        node = sshd.node(gateway=node)
    with pytest.raises(HostKeyError) as caught:
        run(node.run("true"))
    assert (caught.value.kind, caught.value.host) == ("hostkey", "127.0.0.1")
    assert caught.value.message.startswith("gateway 127.0.0.1: " * hops + "HOST KEY CHANGED: it")


def test_refused_login_of_a_gateway(sshd: Sshd, make_sshd: Callable[..., Sshd]) -> None:
    gateway = make_sshd(AuthorizedKeysFile="none")
    error = failure_of(sshd.node(gateway=gateway.node()).run("true"))
    assert (type(error), error.kind) == (ConnectionFailedError, "auth")


@pytest.mark.usefixtures("never_seen")
def test_recorded_host_is_told(sshd: Sshd, home: Path, tmp_path: Path, capfd: Any) -> None:
    """The node knows it, and says it when it is verbose; a host known before, or one that nothing
    is kept of, is none.
    """
    for options, recorded in (
        ({"verbose": True}, True),
        ({"verbose": True}, False),
        ({"known_hosts": tmp_path / "own"}, True),
        ({"known_hosts": tmp_path / "own"}, False),
        ({"known_hosts": os.devnull}, False),
        ({"known_hosts": None}, False),
    ):
        node = sshd.node(**options)
        run(log_in(node))
        assert node.host_key_recorded is recorded
    said = [line for line in capfd.readouterr().err.splitlines() if "recorded" in line]
    assert said == [f"127.0.0.1: recorded its key {fingerprint(sshd.key)}"]


@pytest.mark.parametrize("same", [True, False], ids=["same key", "other key"])
async def test_host_that_somebody_else_records_meanwhile(
    keys: Path, home: Path, same: bool, capfd: Any
) -> None:
    """Between the look at what is known and the line: nothing is recorded, another key is told."""
    known_hosts = home / ".ssh" / "known_hosts"
    key = asyncssh.generate_private_key("ssh-ed25519")
    other = key if same else asyncssh.generate_private_key("ssh-ed25519")

    class Records(asyncssh.SSHServer):
        def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
            port = conn.get_extra_info("sockname")[1]
            known_hosts.write_text(f"[127.0.0.1]:{port} {public(other)}\n")

    async with (
        ssh_server(keys, server=Records, host_key=key) as port,
        SshNode("127.0.0.1", port=port, username=ME, verbose=True) as node,
    ):
        assert not node.host_key_recorded
    told = f"was not recorded: known is {fingerprint(other)} in {known_hosts}:1"
    lines = [line for line in capfd.readouterr().err.splitlines() if "recorded" in line]
    assert lines == ([] if same else [f"127.0.0.1: its key {told}"])
    assert known_hosts.read_text() == f"[127.0.0.1]:{port} {public(other)}\n"


@pytest.mark.usefixtures("never_seen")
def test_server_that_fails_after_key_exchange_leaves_no_line(sshd: Sshd, home: Path) -> None:
    """The server proves that it has its key, then goes: nothing was begun with it."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", sshd.port)

        async def forth() -> None:
            while data := await reader.read(65536):
                back.write(data)

        task = asyncio.create_task(forth())
        try:
            writer.write(await there.readline())
            message = 0
            while (
                message != 21
            ):  # SSH_MSG_NEWKEYS, RFC 4253 section 7.3: what comes after it is encrypted
                length = await there.readexactly(4)
                packet = await there.readexactly(int.from_bytes(length, "big"))
                message = packet[1]
                writer.write(length + packet)
            await writer.drain()
        finally:
            task.cancel()
            back.close()

    async def main() -> None:
        async with raw_server(talk) as port:
            with pytest.raises(ConnectionFailedError) as caught:
                await SshNode("127.0.0.1", port=port, username=ME, timeout=1.5).run("true")
            assert (
                str(caught.value)
                == "127.0.0.1: lost: dropped before login, 2 times, in the key exchange (no "
                "algorithm in common?)"
            )

    run(main())
    assert list((home / ".ssh").glob("known_hosts*")) == []


@pytest.mark.parametrize("known", [False, True])
async def test_server_without_the_private_key(keys: Path, home: Path, known: bool) -> None:
    """Somebody shows the public key of a host, but cannot sign with it."""
    key, forged = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(2))
    forged.sign = OTHER["ssh-ed25519"].sign  # type: ignore[method-assign]
    file = home / ".ssh" / "known_hosts"
    async with ssh_server(keys, host_key=forged) as port:
        if known:
            file.write_text(f"[127.0.0.1]:{port} {public(forged)}\n")
        with pytest.raises(ConnectionFailedError) as caught:
            await SshNode("127.0.0.1", port=port, username=ME).run("true")
        assert caught.value.message == "Key exchange hash mismatch"
    assert file.exists() == known and public(key) != public(forged)


@needs_ssh
@pytest.mark.parametrize(
    "algorithm",
    [
        "ssh-ed25519",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "ecdsa-sha2-nistp256",
                "ecdsa-sha2-nistp384",
                "ecdsa-sha2-nistp521",
                "ssh-rsa",
            )
        ),
    ],
)
def test_ssh_and_apssh_know_each_others_hosts(
    make_sshd: Callable[..., Sshd], home: Path, keys: Path, tmp_path: Path, algorithm: str
) -> None:
    """Theirs plain and hashed, under address and name."""
    server = make_sshd(host_key=algorithm)
    for hashes, host in (("no", "127.0.0.1"), ("yes", "LocalHost")):
        ours, theirs = tmp_path / f"ours-{host}", tmp_path / f"theirs-{host}"
        options = {"port": server.port, "username": ME}
        run(log_in(SshNode(host, known_hosts=ours, **options)))
        assert ours.read_text().startswith("[") and len(ours.read_text().splitlines()) == 1
        assert openssh(server.port, ours, "yes", keys / "id_ed25519", host=host)
        assert openssh(
            server.port,
            theirs,
            "accept-new",
            keys / "id_ed25519",
            "-o",
            f"HashKnownHosts={hashes}",
            host=host,
        )
        run(log_in(SshNode(host, known_hosts=theirs, host_keys="yes", **options)))
        found = subprocess.run(
            ["ssh-keygen", "-F", f"[{host.lower()}]:{server.port}", "-f", str(ours)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert public(server.key).split()[1] in found.stdout


def test_known_type_is_asked_for(
    make_sshd: Callable[..., Sshd], tmp_path: Path, home: Path
) -> None:
    """A server with several keys: the one that is known is what counts, whichever it is."""
    paths = []
    for algorithm in ("ssh-ed25519", "ecdsa-sha2-nistp256", "ssh-rsa"):
        paths.append(tmp_path / algorithm)
        key = asyncssh.generate_private_key(algorithm)
        key.write_private_key(paths[-1])
        key.write_public_key(f"{paths[-1]}.pub")
        paths[-1].chmod(0o600)
    server = make_sshd(HostKey="\nHostKey ".join(map(str, paths)))
    file = home / ".ssh" / "known_hosts"
    for path in paths:
        file.write_text(text := f"[127.0.0.1]:{server.port} {Path(f'{path}.pub').read_text()}")
        run(log_in(server.node(host_keys="yes")))
        assert file.read_text() == text
    file.unlink()
    run(log_in(server.node()))
    assert file.read_text() == f"[127.0.0.1]:{server.port} {Path(f'{paths[0]}.pub').read_text()}"


def test_files_are_parsed_once(sshd: Sshd, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for a run; again when somebody else has changed them."""
    file = home / ".ssh" / "known_hosts"
    file.write_text(
        "".join(f"{hashed(f'box{number}')} {public(sshd.key)}\n" for number in range(50))
        + f"127.0.0.1 {public(sshd.key)}\n"
    )
    opened: list[str] = []
    sys_open = open

    def counting(name: Any, *args: Any, **options: Any) -> Any:
        opened.append(str(name))
        return sys_open(name, *args, **options)

    monkeypatch.setattr(apssh, "open", counting, raising=False)

    async def main() -> None:
        nodes = [sshd.node(host_keys="yes") for _ in range(6)]
        await asyncio.gather(*(node.connect_lazy() for node in nodes))
        await asyncio.gather(*(node.close() for node in nodes))

    run(main())
    assert opened.count(str(file)) == 1
    with sys_open(file, "a") as more:
        more.write(f"@revoked * {public(sshd.key)}\n")
    assert failure_of(sshd.node().run("true")).kind == "hostkey"
    assert opened.count(str(file)) == 2


def on_its_terminal(descriptor: str = "0") -> list[str]:
    """The words for Python that are apssh, of which this is the controlling terminal."""
    take = f"import fcntl, termios; fcntl.ioctl({descriptor}, termios.TIOCSCTTY, 0)"
    return main_of(first=take)


def typed(*argv: str, answers: Sequence[bytes] = (), timeout: float = 60) -> tuple[int, bytes]:
    """Run apssh on a terminal of its own and give one answer a prompt; its exit code and all that
    the terminal got.
    """
    ours, theirs = pty.openpty()
    process = start_python(
        *on_its_terminal(),
        *argv,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    seen, left, end = b"", list(answers), time.monotonic() + timeout
    try:
        with contextlib.suppress(OSError):
            while select.select([ours], [], [], max(end - time.monotonic(), 0))[0] and (
                data := os.read(ours, 65536)
            ):
                seen += data
                if left and seen.endswith(b": "):
                    os.write(ours, left.pop(0))
        return process.wait(max(end - time.monotonic(), 0.1)), re.sub(rb"\r|\x1b\[\d*m", b"", seen)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def without_terminal(*argv: str) -> tuple[int, list[str]]:
    """Run apssh where nobody can be asked, even if the tests run on a terminal: its exit code and
    messages.
    """
    done = run_python(*main_of(), *argv, stdin=subprocess.DEVNULL, start_new_session=True)
    return done.returncode, messages(done)


def accepted(server: Sshd) -> list[str]:
    """The keys that this server has let in: type and fingerprint (of certificates, the word ID and
    the authority's too).
    """
    return [
        line.split(" ssh2: ")[1].strip()
        for line in server.log().splitlines()
        if line.startswith("Accepted publickey")
    ]


@pytest.mark.parametrize(
    ("name", "shown"), [("id_ed25519", "ED25519"), ("ecdsa", "ECDSA"), ("rsa", "RSA")]
)
def test_login_with_each_type(sshd: Sshd, keys: Path, name: str, shown: str) -> None:
    for key in (keys / name, str(keys / name), asyncssh.read_private_key(keys / name)):
        run(log_in(sshd.node(keys=[key])))
    assert (
        accepted(sshd)[-3:]
        == [f"{shown} {asyncssh.read_public_key(keys / f'{name}.pub').get_fingerprint()}"] * 3
    )


@pytest.mark.parametrize(
    ("algorithm", "form", "passphrase"),
    [
        ("ssh-rsa", "pkcs1-pem", None),
        ("ssh-rsa", "pkcs8-pem", "secret"),
        ("ecdsa-sha2-nistp521", "pkcs8-pem", None),
        ("ecdsa-sha2-nistp384", "openssh", None),
        ("ssh-ed25519", "openssh", "secret"),
    ],
)
def test_forms_of_key_files(
    home: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, form: str, passphrase: str | None
) -> None:
    key = asyncssh.generate_private_key(algorithm)
    options = {"rounds": 50} if passphrase and form == "openssh" else {}
    key.write_private_key(home / "key", form, passphrase=passphrase, **options)
    asked: list[str] = []
    answers = iter(["wrong", "secret"])
    monkeypatch.setattr(apssh, "_ask_secret", lambda prompt: asked.append(prompt) or next(answers))
    for _ in range(2):
        assert apssh.import_private_key("key").public_data == key.public_data
    assert asked == (["passphrase for key key"] * 2 if passphrase else [])


def test_default_keys(sshd: Sshd, keys: Path, home: Path, agent: Callable[..., None]) -> None:
    """Named ones alone; else the agent's; else those of ~/.ssh, in their order."""
    for name in ("rsa", "ecdsa"):
        shutil.copy(keys / name, home / ".ssh" / f"id_{name}")

    def data(*names: str) -> list[bytes]:
        return [asyncssh.read_public_key(keys / f"{name}.pub").public_data for name in names]

    assert [key.public_data for key in apssh.load_private_keys()] == data(
        "id_ed25519", "ecdsa", "rsa"
    )
    agent(keys / "other", keys / "rsa")
    for none in (None, []):
        assert [key.public_data for key in apssh.load_private_keys(none)] == data("other", "rsa")
    assert [key.public_data for key in apssh.load_private_keys([str(keys / "ecdsa")])] == data(
        "ecdsa"
    )

    async def inside() -> list[bytes]:
        return [key.public_data for key in apssh.load_agent_keys()]

    assert run(inside()) == data("other", "rsa")
    assert apssh.load_agent_keys("/no/such/agent") == []
    run(log_in(sshd.node()))
    assert accepted(sshd)[-1].startswith("RSA ")


@pytest.mark.parametrize("right", ["ssh-ed25519", "ssh-rsa"])
def test_agent_with_many_keys(
    make_sshd: Callable[..., Sshd],
    agent: Callable[..., None],
    tmp_path: Path,
    capfd: Any,
    right: str,
) -> None:
    """Eight keys, the right one last, and a server that takes six on a connection; what fitted is
    offered first to the next hosts.
    """
    files = []
    for number in range(8):
        key = asyncssh.generate_private_key(
            right if number == 7 else "ecdsa-sha2-nistp256" if number % 2 else "ssh-ed25519"
        )
        files.append(tmp_path / f"key{number}")
        key.write_private_key(files[-1])
        files[-1].chmod(0o600)
    key.write_public_key(tmp_path / "allowed")
    agent(*files)
    first, second = (
        make_sshd(MaxAuthTries=6, AuthorizedKeysFile=tmp_path / "allowed") for _ in range(2)
    )
    assert apssh.main(["-t", first.target, "echo in"]) == 0
    assert capfd.readouterr() == (
        "127.0.0.1:in\n",
        "recorded the key of 1 host never seen: 127.0.0.1\n",
    )
    assert [line.split()[1] for line in accepted(first)] == [key.get_fingerprint()]
    assert first.log().count("Failed publickey") == 7
    run(log_in(second.node()))
    assert len(accepted(second)) == 1 and "Failed publickey" not in second.log()


def test_agent_that_has_gone(sshd: Sshd, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stale SSH_AUTH_SOCK is no agent."""
    monkeypatch.setenv("SSH_AUTH_SOCK", str(home / "gone"))
    run(log_in(sshd.node()))


@pytest.fixture
def user_certificate(
    make_sshd: Callable[..., Sshd], tmp_path: Path
) -> tuple[Sshd, Path, asyncssh.SSHKey]:
    """A server that takes certificates alone, and a key with one beside it."""
    CA.write_public_key(tmp_path / "ca.pub")
    server = make_sshd(TrustedUserCAKeys=tmp_path / "ca.pub", AuthorizedKeysFile="none")
    key = asyncssh.generate_private_key("ssh-ed25519")
    key.write_private_key(tmp_path / "key")
    (tmp_path / "key").chmod(0o600)
    key.write_public_key(tmp_path / "key.pub")
    CA.generate_user_certificate(key, "somebody", principals=[ME]).write_certificate(
        tmp_path / "key-cert.pub"
    )
    return server, tmp_path / "key", key


def test_user_certificate(user_certificate: tuple[Sshd, Path, asyncssh.SSHKey], home: Path) -> None:
    """Beside a named key, beside a default one, and as objects."""
    server, path, key = user_certificate
    run(log_in(server.node(keys=[path])))
    run(log_in(server.node(keys=[(key, asyncssh.read_certificate(f"{path}-cert.pub"))])))
    assert failure_of(server.node(keys=[key]).run("true")).kind == "auth"
    for name in ("key", "key-cert.pub"):
        shutil.copy(path.parent / name, home / ".ssh" / name.replace("key", "id_ed25519", 1))
    run(log_in(server.node()))
    assert [text.split(" ID ")[1].split(" ")[0] for text in accepted(server)] == ["somebody"] * 3
    other = asyncssh.read_certificate(f"{path}-cert.pub")
    CA.generate_user_certificate(key, "nobody", principals=["nobody"]).write_certificate(
        f"{path}-cert.pub"
    )
    assert str(failure_of(server.node(keys=[path]).run("true"))).startswith(
        f"127.0.0.1: auth: login as {ME} refused, after "
    )
    assert other.principals == [ME]


async def test_certificate_that_is_renewed_after_a_refused_login(
    user_certificate: tuple[Sshd, Path, asyncssh.SSHKey],
) -> None:
    server, path, key = user_certificate
    node = server.node(keys=[path])
    for principal in ("nobody", ME):
        certificate = CA.generate_user_certificate(key, "renewed", principals=[principal])
        certificate.write_certificate(f"{path}-cert.pub")
        if principal == ME:
            assert await node.run("true") == 0
        else:
            with pytest.raises(ConnectionFailedError):
                await node.run("true")
    await node.close()


@pytest.mark.parametrize(
    ("held", "named"),
    [("key and certificate", False), ("key and certificate", True), ("key alone", True)],
)
def test_user_certificate_and_agent(
    user_certificate: tuple[Sshd, Path, asyncssh.SSHKey],
    agent: Callable[..., None],
    held: str,
    named: bool,
) -> None:
    """The agent may hold both, or the key whose certificate lies beside its file."""
    server, path, _ = user_certificate
    if held == "key alone":
        path.with_name("key-cert.pub").rename(path.with_name("aside"))
    agent(path)
    if held == "key alone":
        path.with_name("aside").rename(path.with_name("key-cert.pub"))
    path.unlink()  # only the agent can sign
    run(log_in(server.node(keys=[path] if named else None)))
    assert len(accepted(server)) == 1


@pytest.mark.parametrize("way", ["agent", "agent with a key that follows", "file"])
def test_rsa_certificate(
    make_sshd: Callable[..., Sshd], agent: Callable[..., None], keys: Path, tmp_path: Path, way: str
) -> None:
    """A server of today takes it under a name of its signature alone; it may be the last key that
    is offered.
    """
    CA.write_public_key(tmp_path / "ca.pub")
    server = make_sshd(TrustedUserCAKeys=tmp_path / "ca.pub", AuthorizedKeysFile="none")
    shutil.copy(keys / "rsa", tmp_path / "key")
    key = asyncssh.read_public_key(keys / "rsa.pub")
    certificate = CA.generate_user_certificate(key, "somebody", principals=[ME])
    certificate.write_certificate(tmp_path / "key-cert.pub")
    if way == "file":
        run(log_in(server.node(keys=[tmp_path / "key"])))
    else:
        agent(tmp_path / "key", *([keys / "other"] if "follows" in way else []))
        run(log_in(server.node()))
    assert [line.split(" ")[0] for line in accepted(server)] == ["RSA-CERT"]


@pytest.mark.parametrize("beside", [True, False], ids=["pub-file", "alone"])
@pytest.mark.parametrize(
    ("algorithm", "form"),
    [("ssh-ed25519", "openssh"), ("ssh-rsa", "openssh"), ("ssh-rsa", "pkcs8-pem")],
)
def test_encrypted_key_in_the_agent(
    sshd: Sshd,
    agent: Callable[..., None],
    tmp_path: Path,
    algorithm: str,
    form: str,
    beside: bool,
) -> None:
    """The agent's is used, and nothing is asked: the public half of an OpenSSH key is in clear in
    its file.
    """
    key = asyncssh.generate_private_key(algorithm)
    key.write_private_key(tmp_path / "plain")
    (tmp_path / "plain").chmod(0o600)
    agent(tmp_path / "plain")
    key.write_private_key(tmp_path / "key", form, passphrase="secret")
    if beside:
        key.write_public_key(tmp_path / "key.pub")
    with (sshd.folder / "authorized_keys").open("a") as authorized:
        authorized.write(f"{public(key)}\n")
    done = without_terminal("-k", str(tmp_path / "key"), "-t", sshd.target, "exit 0")
    if form == "openssh" or beside:
        assert done == (0, [])
    else:  # nobody can know
        prompt = f"passphrase for key {tmp_path / 'key'}"
        assert done == (2, [f"apssh: no terminal to ask: {prompt}"])


def test_public_half_of_the_key_file_itself(
    sshd: Sshd, keys: Path, agent: Callable[..., None], tmp_path: Path
) -> None:
    """A .pub of another key beside it is of no account."""
    shutil.copy(keys / "id_ed25519", tmp_path / "key")
    shutil.copy(keys / "ecdsa.pub", tmp_path / "key.pub")
    agent(keys / "ecdsa", keys / "id_ed25519")
    run(log_in(sshd.node(keys=[tmp_path / "key"])))
    assert accepted(sshd)[-1].startswith("ED25519 ")


def test_key_through_a_pipe(
    sshd: Sshd, keys: Path, agent: Callable[..., None], tmp_path: Path
) -> None:
    """``-k <(...)`` is read once, whatever the agent holds."""
    agent(keys / "other")
    program = shlex.join([*PYTHON, *main_of()])
    command = f"{program} -q -k <(cat {keys}/id_ed25519) -t {sshd.target} echo in"
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60, check=False)
    assert (done.stdout, messages(done)) == (b"127.0.0.1:in\n", [])


class Watched:
    """Stands before the agent of the environment, at another path: the types of the requests that
    came, one list a connection (draft-miller-ssh-agent, section 5.1), and how many are open.
    """

    LIST, SIGN = 11, 13

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requests: list[list[int]] = []
        self.open = 0
        self._behind = os.environ["SSH_AUTH_SOCK"]
        self._path = f"{self._behind}-watched"
        self._monkeypatch = monkeypatch

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(self._behind)
        seen: list[int] = []
        self.requests.append(seen)
        self.open += 1
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                for source, sink in ((reader, back), (there, writer)):
                    length = await source.readexactly(4)
                    packet = await source.readexactly(int.from_bytes(length, "big"))
                    if source is reader:
                        seen.append(packet[0])
                    sink.write(length + packet)
        back.close()
        writer.close()
        self.open -= 1

    async def __aenter__(self) -> Watched:
        self._server = await asyncio.start_unix_server(self._serve, self._path)
        self._monkeypatch.setenv("SSH_AUTH_SOCK", self._path)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        os.unlink(self._path)


@pytest.mark.parametrize("name", ["id_ed25519", "ecdsa", "rsa"])
async def test_agent_is_asked_to_list_once_and_to_sign(
    sshd: Sshd, keys: Path, agent: Callable[..., None], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Three hosts: the keys are listed once, each login signs on a connection of its own, which is
    closed when it ends. A login that the server refuses has signed nothing.
    """
    agent(keys / name)
    async with Watched(monkeypatch) as watched:
        nodes = [sshd.node() for _ in range(3)]
        await asyncio.gather(*(node.connect_lazy() for node in nodes))
        assert sorted(watched.requests) == [[watched.LIST], *[[watched.SIGN]] * 3]
        await eventually_async(lambda: watched.open == 0)
        await asyncio.gather(*(node.close() for node in nodes))
        refused = sshd.node(username="nobody-here")
        with pytest.raises(ConnectionFailedError):
            await refused.connect_lazy()
        signed = [each for each in watched.requests if each != [watched.LIST]]
        assert signed == [[watched.SIGN]] * 3


class SecurityKeyAgent:
    """An agent with one key of a security key (OpenSSH's PROTOCOL.u2f): what it signs is what
    such a device would.
    """

    ALGORITHM = b"sk-ssh-ed25519@openssh.com"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._key = Ed25519PrivateKey.generate()
        self.public_data = b"".join(
            map(self._string, (self.ALGORITHM, self._key.public_key().public_bytes_raw(), b"ssh:"))
        )
        self.signed = 0

    @staticmethod
    def _string(data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + data

    def _answer(self, request: bytes) -> bytes:
        if request[0] == Watched.LIST:
            return b"\x0c\0\0\0\1" + self._string(self.public_data) + self._string(b"mine")
        assert request[0] == Watched.SIGN
        self.signed += 1
        rest = request[1:].removeprefix(self._string(self.public_data))
        data = rest[4 : 4 + int.from_bytes(rest[:4], "big")]
        touched = b"\1" + self.signed.to_bytes(4, "big")  # flags and counter
        parts = hashlib.sha256(b"ssh:").digest(), touched, hashlib.sha256(data).digest()
        signature = self._string(self._key.sign(b"".join(parts)))
        return b"\x0e" + self._string(self._string(self.ALGORITHM) + signature + touched)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                length = int.from_bytes(await reader.readexactly(4), "big")
                writer.write(self._string(self._answer(await reader.readexactly(length))))
        writer.close()

    async def __aenter__(self) -> SecurityKeyAgent:
        self._server = await asyncio.start_unix_server(self._serve, str(self.path))
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()


@pytest.mark.parametrize("certified", [False, True], ids=["key", "certificate"])
async def test_security_key_in_the_agent(
    make_sshd: Callable[..., Sshd], home: Path, monkeypatch: pytest.MonkeyPatch, certified: bool
) -> None:
    holder = SecurityKeyAgent(home / "agent")
    key = asyncssh.import_public_key(
        f"{holder.ALGORITHM.decode()} {base64.b64encode(holder.public_data).decode()}"
    )
    key.write_public_key(home / "allowed")
    key.write_public_key(home / "key.pub")
    CA.write_public_key(home / "ca.pub")
    if certified:
        certificate = CA.generate_user_certificate(key, "somebody", principals=[ME])
        certificate.write_certificate(home / "key-cert.pub")
        server = make_sshd(TrustedUserCAKeys=home / "ca.pub", AuthorizedKeysFile="none")
    else:
        server = make_sshd(AuthorizedKeysFile=home / "allowed")
    monkeypatch.setenv("SSH_AUTH_SOCK", str(holder.path))
    async with holder:
        await log_in(server.node(keys=[home / "key"]))
    assert holder.signed == 1
    kind = "ED25519-SK-CERT" if certified else "ED25519-SK"
    assert [line.split(" ")[0] for line in accepted(server)] == [kind]


def test_agent_that_goes_while_it_is_used(
    sshd: Sshd, keys: Path, agent: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keys were listed, and then it cannot sign: the next key is tried."""
    agent(keys / "rsa")
    listed = apssh.load_agent_keys()
    monkeypatch.delenv("SSH_AUTH_SOCK")
    run(log_in(sshd.node(keys=[*listed, keys / "id_ed25519"])))
    assert accepted(sshd)[-1].startswith("RSA ")
    gone = [dataclasses.replace(key, agent_path="/no/such/agent") for key in listed]
    run(log_in(sshd.node(keys=[*gone, keys / "id_ed25519"])))
    assert accepted(sshd)[-1].startswith("ED25519 ")


def test_passphrase_is_asked_once(make_sshd: Callable[..., Sshd], keys: Path) -> None:
    """For three hosts."""
    targets = ",".join(make_sshd().target for _ in range(3))
    code, seen = typed(
        "-k",
        str(keys / "encrypted"),
        "-q",
        "-f",
        "{line}",
        "-t",
        targets,
        "echo in",
        answers=[b"secret\n"],
    )
    assert (code, seen.decode()) == (0, f"passphrase for key {keys}/encrypted: \n" + "in\n" * 3)


def test_passphrase_of_a_default_key(sshd: Sshd, keys: Path, home: Path) -> None:
    shutil.copy(keys / "encrypted", home / ".ssh" / "id_ed25519")
    (home / ".ssh" / "id_ed25519.pub").unlink()
    code, seen = typed(
        "-q",
        "-t",
        f"{sshd.target},{ME}@localhost:{sshd.port}",
        "exit 0",
        answers=[b"wrong\n", b"secret\n"],
    )
    assert (code, seen.decode()) == (0, f"passphrase for key {home}/.ssh/id_ed25519: \n" * 2)


def test_each_run_asks_for_a_passphrase_anew(
    sshd: Sshd, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been mistyped."""
    asked: list[str] = []

    def answer(prompt: str) -> str:
        asked.append(prompt)
        return "wrong"

    monkeypatch.setattr(apssh, "_ask_secret", answer)
    for times in (3, 6):
        node = sshd.node(keys=[keys / "encrypted"])
        with pytest.raises(UsageError, match=r"wrong passphrase$"):
            Scheduler(SshJob(node, command="true")).run()
        assert len(asked) == times
    with pytest.raises(UsageError, match=r"wrong passphrase$"):
        apssh.import_private_key(keys / "encrypted")
    assert len(asked) == 9


def test_wrong_passphrase(sshd: Sshd, home: Path) -> None:
    asyncssh.generate_private_key("ssh-rsa").write_private_key(
        home / "key", "pkcs8-pem", passphrase="secret"
    )
    code, seen = typed(
        "-k", "key", "-t", sshd.target, "exit 0", answers=[b"one\n", b"two\n", b"\n"]
    )
    assert (code, seen.decode()) == (
        2,
        "passphrase for key key: \n" * 3 + "apssh: key key: wrong passphrase\n",
    )


@pytest.mark.parametrize("configured", [True, False], ids=["config", "default"])
def test_passphrase_that_is_not_given_is_asked_once(
    make_sshd: Callable[..., Sshd], keys: Path, home: Path, configured: bool
) -> None:
    """Though keys are looked for again for each host that refuses the others."""
    (home / "none").touch()
    servers = [make_sshd(AuthorizedKeysFile=home / "none") for _ in range(2)]
    key = keys / "encrypted" if configured else home / ".ssh/id_ed25519"
    (home / "cfg").write_text(
        f"IdentityFile {key}\nIdentityFile {keys}/other\n" if configured else ""
    )
    shutil.copy(keys / "encrypted", home / ".ssh/id_ed25519")
    shutil.copy(keys / "other", home / ".ssh/id_rsa")
    (home / ".ssh/id_ed25519.pub").unlink()
    targets = ",".join(server.target for server in servers)
    code, seen = typed("-F", "cfg", "-w", "1", "-t", targets, "true", answers=[b"\n"] * 12)
    prompt = f"passphrase for key {key}: \n"
    assert (code, seen.decode().count(prompt)) == (1, 3)
    told = f"skipped: key {key}: wrong passphrase\n"
    assert seen.decode().startswith(prompt * 3 + told)


@pytest.mark.parametrize("option", ["-k", "-A"])
@pytest.mark.parametrize(
    ("answer", "code", "message"),
    [(b"\x04", 2, "apssh: no answer: {prompt}\n"), (b"\x03", -signal.SIGINT, "")],
    ids=["end-of-file", "ctrl-c"],
)
def test_prompt_that_is_left(
    sshd: Sshd, keys: Path, option: str, answer: bytes, code: int, message: str
) -> None:
    """Neither hangs nor ends in a traceback."""
    prompt = "password" if option == "-A" else f"passphrase for key {keys}/encrypted"
    given = typed(
        *(["-A"] if option == "-A" else ["-k", str(keys / "encrypted")]),
        "-t",
        sshd.target,
        "exit 0",
        answers=[answer],
        timeout=6,
    )
    assert (given[0], given[1].decode().replace("^C", "").replace(": \n", ": ")) == (
        code,
        f"{prompt}: " + message.format(prompt=prompt),
    )


def test_nobody_to_ask(sshd: Sshd, keys: Path, home: Path) -> None:
    assert without_terminal("-k", str(keys / "encrypted"), "-t", sshd.target, "exit 0") == (
        2,
        [f"apssh: no terminal to ask: passphrase for key {keys}/encrypted"],
    )
    assert without_terminal("-A", "-t", sshd.target, "exit 0") == (
        2,
        ["apssh: no terminal to ask: password"],
    )
    shutil.copy(keys / "encrypted", home / ".ssh" / "id_ed25519")
    (home / ".ssh" / "id_ed25519.pub").unlink()
    code, said = without_terminal("-t", sshd.target, "exit 0")
    assert (
        code == 2
        and said[0] == f"skipped: no terminal to ask: passphrase for key {home}/.ssh/id_ed25519"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "key {keys}/missing: no such file or directory"),
        ("folder", "key {keys}/folder: is a directory"),
        ("note", "key {keys}/note: not a private key (Invalid private key)"),
        ("empty", "key {keys}/empty: not a private key (Invalid private key)"),
        ("id_ed25519.pub", "key {keys}/id_ed25519.pub: not a private key (Invalid private key)"),
        ("missing.pub", "key {keys}/missing.pub: no such file or directory"),
        ("damaged", "key {keys}/damaged: not a private key (p*q must equal modulus.)"),
    ],
)
def test_named_key_that_is_none(
    keys: Path, home: Path, capfd: Any, name: str, message: str
) -> None:
    """An error, before anything else is done, though there are default keys."""
    (home / "keys" / "folder").mkdir(parents=True)
    (home / "keys" / "note").write_text("-----BEGIN LETTER-----\nDear all\n-----END LETTER-----\n")
    (home / "keys" / "empty").write_text("")
    key = asyncssh.generate_private_key("ssh-rsa", key_size=1024).export_private_key("pkcs1-der")
    (home / "keys" / "damaged").write_bytes(key[:60] + bytes([key[60] ^ 1]) + key[61:])
    shutil.copy(keys / "id_ed25519.pub", home / "keys")
    path, message = home / "keys" / name, message.format(keys=home / "keys")
    assert apssh.main(["-k", str(path), "-t", "127.0.0.1:1", "true"]) == 2
    assert capfd.readouterr() == ("", f"apssh: {message}\n")
    with pytest.raises(UsageError) as caught:
        apssh.load_private_keys([path])
    assert str(caught.value) == message
    error = failure_of(SshNode("127.0.0.1", port=1, keys=[path]).run("true"))
    assert (type(error), str(error)) == (UsageError, message)


def test_no_key(sshd: Sshd, home: Path, capfd: Any) -> None:
    """Stops before connecting, unless told to go on."""
    (home / ".ssh" / "id_ed25519").unlink()
    before = sshd.log().count("Connection from")
    assert apssh.main(["-t", sshd.target, "true"]) == 2
    assert (
        capfd.readouterr().err
        == "apssh: no key: give one with -k, load one into an agent, or use -A (password) or "
        "-K (go on without)\n"
    )
    assert sshd.log().count("Connection from") == before
    assert apssh.main(["-K", "-t", sshd.target, "true"]) == 1
    assert capfd.readouterr().err.splitlines() == [
        f"127.0.0.1: auth: login as {ME} refused, after 0 keys (no SSH_AUTH_SOCK; no key in "
        "~/.ssh)",
        "0 ok, 1 not reached",
        "  auth: 127.0.0.1 (1)",
    ]


def no_keys(user: str, looked: str) -> str:
    return f"127.0.0.1: auth: login as {user} refused, after 0 keys ({looked})"


def test_where_keys_were_looked_for(
    sshd: Sshd, home: Path, keys: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """Said when there were none."""
    (home / ".ssh" / "id_ed25519").unlink()
    no_default = "no key in ~/.ssh"
    assert str(failure_of(sshd.node().run("true"))) == no_keys(
        ME, f"no SSH_AUTH_SOCK; {no_default}"
    )
    monkeypatch.setenv("SSH_AUTH_SOCK", str(home / "gone"))
    assert str(failure_of(sshd.node().run("true"))) == no_keys(
        ME, f"agent {home}/gone: 0 keys; {no_default}"
    )
    (home / "config").write_text("Host *\n IdentityFile ~/one\n IdentityFile ~/two\n")
    assert str(failure_of(sshd.node(config="config").run("true"))) == no_keys(
        ME, f"agent {home}/gone: 0 keys; no key in {home}/one, {home}/two"
    )
    skipped = [f"skipped: key {home}/{name}: no such file or directory" for name in ("one", "two")]
    assert capfd.readouterr().err.splitlines() == skipped


@pytest.mark.parametrize(
    ("way", "config"),
    [
        ("agent", None),
        ("agent", "config"),
        ("default file", None),
        ("default file", "config"),
        ("file of the config", "config"),
    ],
)
async def test_keys_are_looked_at_anew_after_a_refused_login(
    sshd: Sshd, home: Path, keys: Path, agent: Callable[..., None], way: str, config: str | None
) -> None:
    """In a process that lives on, for the node that was refused and for others."""
    (home / ".ssh" / "id_ed25519").unlink()
    (home / ".ssh" / "id_ed25519.pub").unlink()
    named = "Host *\n IdentityFile ~/.ssh/work\n" if "config" in way else "Host *\n Port 22\n"
    (home / "config").write_text(named)
    node = sshd.node(config=config)
    for _ in range(2):
        with pytest.raises(ConnectionFailedError) as caught:
            await node.run("true")
        assert caught.value.kind == "auth"
    if way == "agent":
        agent(keys / "ecdsa")
    else:
        name = "work" if "config" in way else "id_ecdsa"
        shutil.copy(keys / "ecdsa", home / ".ssh" / name)
    (result,) = await apssh.co_run(
        sshd.target, "true", config=config and str(home / config), login=ME
    )
    assert result.ok, result.error
    assert await node.run("true") == 0
    await node.close()


async def test_key_file_that_is_mended_after_a_refused_login(
    sshd: Sshd, home: Path, keys: Path
) -> None:
    """It is read again: what was decoded once belongs to what was in the file."""
    path = home / ".ssh" / "id_ed25519"
    node = sshd.node(keys=[path])
    shutil.copy(keys / "other", path)
    with pytest.raises(ConnectionFailedError):
        await node.run("true")
    shutil.copy(keys / "id_ed25519", path)
    assert await node.run("true") == 0
    await node.close()


def test_what_is_wrong_with_a_key_is_said_once(
    make_sshd: Callable[..., Sshd], home: Path, keys: Path, capfd: Any
) -> None:
    """Not again for each host that refuses."""
    (home / ".ssh" / "id_ecdsa").write_text("no key")
    server = make_sshd(AuthorizedKeysFile="none")

    async def main() -> None:
        for _ in range(3):
            with pytest.raises(ConnectionFailedError):
                await server.node().run("true")

    run(main())
    said = capfd.readouterr().err.splitlines()
    assert said == [
        "skipped: key {}: not a private key (Invalid private key)".format(
            home / ".ssh" / "id_ecdsa"
        )
    ]


PASSWORD = f"pass-{os.urandom(6).hex()}"


def password_server(
    *methods: str, prompts: Sequence[tuple[str, bool]] = (("Password: ", False),)
) -> type[asyncssh.SSHServer]:
    """A server that takes the password in these ways; what it was told is in ``told``."""

    class Server(asyncssh.SSHServer):
        told: ClassVar[list[tuple[str, str, Any]]] = []

        def password_auth_supported(self) -> bool:
            return "password" in methods

        def validate_password(self, username: str, password: str) -> bool:
            self.told.append(("password", username, password))
            return password == PASSWORD

        def kbdint_auth_supported(self) -> bool:
            return "keyboard-interactive" in methods

        def get_kbdint_challenge(self, username: str, lang: str, submethods: str) -> Any:
            return "", "", "", list(prompts)

        def validate_kbdint_response(self, username: str, responses: Sequence[str]) -> Any:
            self.told.append(("keyboard-interactive", username, list(responses)))
            return list(responses) == [PASSWORD]

    return Server


def secrets_seen(secret: str) -> list[str]:
    """The processes that show this in their arguments or environment."""
    found = []
    for file in (*Path("/proc").glob("[0-9]*/cmdline"), *Path("/proc").glob("[0-9]*/environ")):
        with contextlib.suppress(OSError):
            if secret.encode() in file.read_bytes():
                found.append(str(file))
    return found


@pytest.mark.parametrize(
    ("words", "environment", "file"),
    [(["sh", "-c", "read x", "{}"], {}, "cmdline"), (["cat"], {"X": "{}"}, "environ")],
)
def test_secrets_would_be_seen(words: list[str], environment: dict[str, str], file: str) -> None:
    """Whatever finds none, as test_password does, sees one that is there."""
    secret = os.urandom(8).hex()
    with subprocess.Popen(
        [word.format(secret) for word in words],
        stdin=subprocess.PIPE,
        env=os.environ | {name: value.format(secret) for name, value in environment.items()},
    ) as process:
        eventually(lambda: secrets_seen(secret) == [f"/proc/{process.pid}/{file}"])


@pytest.mark.parametrize(
    "methods",
    [["password"], ["keyboard-interactive"], ["password", "keyboard-interactive"]],
    ids="+".join,
)
def test_password(keys: Path, methods: list[str]) -> None:
    """Asked once for all hosts, on the terminal; shown nowhere: not to ps, not in the environment,
    not under --debug.
    """
    server, shown = password_server(*methods), []

    async def process(process: Any) -> None:
        shown.extend(await asyncio.to_thread(secrets_seen, PASSWORD))
        process.stdout.write(process.command.encode() + b"\n")
        process.exit(0)

    async def main() -> tuple[int, bytes]:
        async with contextlib.AsyncExitStack() as stack:
            ports = [
                await stack.enter_async_context(
                    ssh_server(keys, server=server, process=process, authorized_client_keys=None)
                )
                for _ in range(3)
            ]
            targets = " ".join(f"me@127.0.0.1:{port}" for port in ports)
            words = ["-A", "-D", "--no-guard", "-t", targets, "echo in"]
            return await asyncio.to_thread(typed, *words, answers=[PASSWORD.encode() + b"\n"])

    code, seen = run(main())
    assert code == 0, seen
    assert seen.startswith(b"password: \n") and seen.count(b"password: ") == 1
    assert (
        len(re.findall(rb"(?m)^127\.0\.0\.1:\d+: *echo in$|^127\.0\.0\.1: *echo in$", seen)) == 3
    ), seen
    assert PASSWORD.encode() not in seen and b"asyncssh" in seen
    assert (
        server.told
        == [(methods[-1], "me", [PASSWORD] if "keyboard-interactive" in methods else PASSWORD)] * 3
    )
    assert shown == []


@pytest.mark.parametrize(
    "prompts",
    [[], [("Code: ", True)], [("Old: ", False), ("New: ", False)], [("Password: ", False)]],
    ids=len,
)
async def test_password_goes_to_a_password_prompt_alone(
    keys: Path, prompts: list[tuple[str, bool]]
) -> None:
    """Not to one whose answer is echoed, and not to several questions; each is answered once."""
    server = password_server("keyboard-interactive", prompts=prompts)
    node_options = {"username": "me", "keys": [keys / "other"], "password": "wrong", "timeout": 5}
    async with ssh_server(keys, server=server) as port:
        with pytest.raises(ConnectionFailedError) as caught:
            await SshNode("127.0.0.1", port=port, **node_options).run("true")
        words = " and the password" if prompts == [("Password: ", False)] else ""
        assert str(caught.value) == f"127.0.0.1: auth: login as me refused, after 1 key{words}"
    assert server.told == (
        [("keyboard-interactive", "me", [])]
        if not prompts
        else [("keyboard-interactive", "me", ["wrong"])]
        if len(prompts) == 1 and not prompts[0][1]
        else []
    )


async def test_no_password_for_a_changed_host(keys: Path, home: Path, capfd: Any) -> None:
    """Policy no goes on with whoever answers; like ssh, it tells him no password. known_hosts=None
    is the user's own word for that host.
    """
    server, key = (
        password_server("password", "keyboard-interactive"),
        asyncssh.generate_private_key("ssh-ed25519"),
    )
    async with ssh_server(keys, server=server, host_key=key) as port:
        (home / ".ssh" / "known_hosts").write_bytes(known_hosts_text("{n} {other}", port, key))
        node = SshNode(
            "127.0.0.1",
            port=port,
            username="me",
            keys=[keys / "other"],
            password=PASSWORD,
            host_keys="no",
        )
        with pytest.raises(ConnectionFailedError) as caught:
            await node.run("true")
        assert str(caught.value) == "127.0.0.1: auth: login as me refused, after 1 key"
        assert server.told == []
        node = SshNode(
            "127.0.0.1",
            port=port,
            username="me",
            keys=[keys / "other"],
            password=PASSWORD,
            known_hosts=None,
        )
        assert await node.run("true") == 0
        await node.close()
    said = (
        "127.0.0.1: no password for a host whose key has changed: forget the old key "
        "(ssh-keygen -R), or known_hosts=None"
    )
    assert set(capfd.readouterr().err.splitlines()) == {said}


def test_wrong_password(keys: Path, caplog: Any) -> None:
    """The error tells what was tried, not what it was."""
    server = password_server("password", "keyboard-interactive")
    secret = PASSWORD + "x"

    async def main() -> ConnectionFailedError:
        async with ssh_server(keys, server=server) as port:
            node = SshNode(
                "127.0.0.1",
                port=port,
                username="me",
                keys=[keys / "other"],
                password=secret,
                debug=True,
                verbose=True,
            )
            assert secret not in repr(node) + str(node)
            with pytest.raises(ConnectionFailedError) as caught:
                await node.run("true")
            assert secret not in repr(node)
            return caught.value

    with caplog.at_level("DEBUG", "asyncssh"):
        error = run(main())
    assert str(error) == "127.0.0.1: auth: login as me refused, after 1 key and the password"
    assert server.told == [("keyboard-interactive", "me", [secret]), ("password", "me", secret)]
    assert secret not in repr(error) + str(vars(error)) + caplog.text


def test_no_password_for_those_that_take_the_key(
    sshd: Sshd, make_sshd: Callable[..., Sshd]
) -> None:
    """The key goes first; and a host that takes passwords alone says so."""
    server = make_sshd(
        PubkeyAuthentication="no",
        PasswordAuthentication="no",
        KbdInteractiveAuthentication="no",
        AuthenticationMethods="any",
    )
    run(log_in(sshd.node(password="unused")))
    assert accepted(sshd) and "password" not in sshd.log()
    assert failure_of(server.node(password="unused").run("true")).kind == "auth"


@pytest.fixture
def account(
    tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch, make_sshd: Callable[..., Sshd]
) -> tuple[Sshd, str]:
    """A real sshd without PAM, that knows one more user with a password: in files that it alone
    sees in the place of the system's.
    """
    if os.getuid() or not all(map(shutil.which, ("unshare", "mount", "openssl"))):
        pytest.skip("a user with a password needs root, unshare and openssl")
    program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin:/sbin")
    hashed_password = subprocess.run(
        ["openssl", "passwd", "-6", "-stdin"],
        input=PASSWORD,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    for name, line in (
        ("passwd", "apsshtest:x:64999:64999::/:/bin/sh"),
        ("shadow", f"apsshtest:{hashed_password}:19000:0:99999:7:::"),
    ):
        (tmp_path / name).write_text(f"{Path('/etc', name).read_text()}{line}\n")
    folder = tmp_path / "bin"
    folder.mkdir()
    mounts = " && ".join(
        f"mount --bind {shlex.quote(str(tmp_path / name))} /etc/{name}"
        for name in ("passwd", "shadow")
    )
    if subprocess.run(
        ["unshare", "-m", "sh", "-c", mounts], capture_output=True, check=False
    ).returncode:
        pytest.skip("no private mounts can be had here")
    (folder / "sshd").write_text(
        f'#!/bin/sh\nexec unshare -m sh -c \'{mounts} && exec "$@"\' sh {program} "$@"\n'
    )
    (folder / "sshd").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return make_sshd(PasswordAuthentication="yes", ForceCommand="none", SetEnv="A=B"), "apsshtest"


def test_password_with_openssh(account: tuple[Sshd, str]) -> None:
    server, user = account
    target = f"{user}@127.0.0.1:{server.port}"
    assert typed("-A", "-t", target, "id -un", answers=[PASSWORD.encode() + b"\n"]) == (
        0,
        b"password: \n127.0.0.1:apsshtest\nrecorded the key of 1 host never seen: 127.0.0.1\n",
    )
    eventually(lambda: "Accepted password for apsshtest" in server.log())
    code, seen = typed("-A", "-q", "-t", target, "id -un", answers=[b"wrong\n"])
    assert (code, seen) == (
        1,
        b"password: \n127.0.0.1: auth: login as apsshtest refused, after 1 key and the password\n",
    )


@contextlib.asynccontextmanager
async def many_hosts(
    keys: Path, hosts: Sequence[str]
) -> AsyncIterator[tuple[int, asyncssh.SSHKey]]:
    """One server on many loopback addresses, the same port on each."""

    async def echo(process: Any) -> None:
        process.exit(0)

    key, port = asyncssh.generate_private_key("ssh-ed25519"), free_port()
    server = await asyncssh.create_server(
        asyncssh.SSHServer,
        hosts,
        port,
        server_host_keys=[key],
        process_factory=echo,
        backlog=500,
        authorized_client_keys=str(keys / "id_ed25519.pub"),
    )
    try:
        yield port, key
    finally:
        server.close()
        await server.wait_closed()


@pytest.mark.slow
def test_hundreds_of_first_contacts(keys: Path, home: Path) -> None:
    """200 at once, from two programs: a line each, well-formed, which ssh-keygen finds."""
    hosts = [f"127.0.{x}.{y}" for x in range(1, 5) for y in range(1, 51)]

    async def main() -> tuple[int, asyncssh.SSHKey]:
        async with many_hosts(keys, hosts) as (port, key):
            words = [
                "--no-guard",
                "-q",
                "-p",
                str(port),
                "-l",
                "me",
                "-t",
                ",".join(hosts),
                "true",
            ]
            assert (
                await asyncio.gather(
                    *(asyncio.to_thread(without_terminal, *words) for _ in range(2))
                )
                == [(0, [])] * 2
            )
            return port, key

    port, key = run(main(), 240)
    lines = (home / ".ssh" / "known_hosts").read_text().splitlines()
    assert len(lines) == 200 and all(
        re.fullmatch(rf"[^ ]+ {re.escape(public(key))}", line) for line in lines
    )
    for host in hosts:
        found = subprocess.run(
            ["ssh-keygen", "-F", f"[{host}]:{port}", "-f", str(home / ".ssh" / "known_hosts")],
            capture_output=True,
            text=True,
            check=True,
        )
        assert len(found.stdout.splitlines()) == 2  # a comment, and the line


@pytest.mark.slow
def test_large_known_hosts(keys: Path, home: Path) -> None:
    """10,000 hashed lines: a run of 100 hosts costs less than 2 s of CPU."""
    hosts = [f"127.0.1.{number}" for number in range(1, 101)]

    async def main() -> float:
        async with many_hosts(keys, hosts) as (port, key):
            names = [f"[{host}]:{port}" for host in hosts] + [
                f"box{number}.example.org" for number in range(9900)
            ]
            (home / ".ssh" / "known_hosts").write_text(
                "".join(f"{hashed(name)} {public(key)}\n" for name in names)
            )
            words = [
                "--host-keys",
                "yes",
                "--no-guard",
                "-F",
                "none",
                "-p",
                str(port),
                "-l",
                "me",
                "-t",
                ",".join(hosts),
                "true",
            ]
            plain = {
                name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")
            }  # measuring costs twice
            process = start_python(*main_of(), *words, stdout=None, env=plain)
            _, status, usage = await asyncio.to_thread(os.wait4, process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            assert process.stderr
            with process.stderr as said:
                assert (process.returncode, said.read().decode()) == (0, "100 ok\n")
            return float(usage.ru_utime + usage.ru_stime)

    seconds = run(main(), 120)
    assert seconds < 2


# --------------------------------------------------------------------------------------------------
# ssh_config
# --------------------------------------------------------------------------------------------------


def ssh_says(file: Path, target: str) -> dict[str, Any]:
    """What ``ssh -G`` answers for a target, its tokens expanded as ssh_config(5) has them, in the
    terms of ``seen_on``.
    """

    def ask(config: str, *words: str) -> dict[str, list[str]]:
        done = subprocess.run(
            ["ssh", "-F", config, *words, "-G", host], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise UsageError("ssh config: " + " ".join(done.stderr.splitlines()))
        answer: dict[str, list[str]] = {}
        for line in done.stdout.splitlines():
            keyword, _, value = line.partition(" ")
            answer.setdefault(keyword, []).append(value)
        return answer

    hop = apssh._parse_targets([target])[0].chain[-1]
    host = hop.host
    answer = ask(
        str(file),
        *(["-l", hop.user] if hop.user else []),
        *(["-p", str(hop.port)] if hop.port else []),
    )
    default = ask("none")
    (user,), (port,), (address,) = answer["user"], answer["port"], answer["hostname"]
    alias = answer.get("hostkeyalias", [""])[0]
    tokens = {
        "%h": address,
        "%n": host,
        "%p": port,
        "%r": user,
        "%u": ME,
        "%d": os.environ["HOME"],
        "%k": alias or host,
        "%%": "%",
    }

    def expand(text: str) -> str:
        text = re.sub(r"%.", lambda match: tokens[match[0]], text)
        text = re.sub(r"\$\{(\w+)\}", lambda match: os.environ[match[1]], text)
        return os.path.expanduser(text)

    def files(keyword: str) -> list[str]:
        values = answer.get(keyword, [])
        return [] if values == default.get(keyword) else [expand(value) for value in values]

    def way(text: str) -> list[str]:
        """Each jump host as ssh would be called for it; the first may itself be behind others."""
        hops = [
            jump.removeprefix("ssh://")
            for jump in re.sub("%.", lambda match: tokens[match[0]], text).split(",")
        ]
        steps = [ssh_says(file, jump) for jump in hops]
        return steps[0]["way"] + [
            f"{step['user']}@{step['address']} {step['port']}" for step in steps
        ]

    agent = answer.get("identityagent", ["SSH_AUTH_SOCK"])[0]
    (policy,), (timeout,) = answer["stricthostkeychecking"], answer["connecttimeout"]
    known = [answer[keyword][0] for keyword in ("userknownhostsfile", "globalknownhostsfile")]
    changed = known != [
        default[keyword][0] for keyword in ("userknownhostsfile", "globalknownhostsfile")
    ]
    (jump,), (command,) = answer.get("proxyjump", ["none"]), answer.get("proxycommand", ["none"])
    return {
        "address": address,
        "user": user,
        "port": int(port),
        "keys": files("identityfile"),
        "certificates": files("certificatefile"),
        "only": answer["identitiesonly"] == ["yes"],
        "agent": {"SSH_AUTH_SOCK": None, "none": os.devnull}.get(
            agent, os.path.expandvars(expand(agent))
        ),
        "way": [] if jump == "none" else way(jump),
        "command": None
        if command == "none"
        else re.sub("%.", lambda match: tokens[match[0]], command),
        "known": [
            os.devnull if path == "none" else path
            for path in re.split(" (?=/|none)", " ".join(known))
        ]
        if changed
        else [os.path.expanduser(path) for path in apssh.KNOWN_HOSTS_FILES],
        "policy": {"true": "yes", "false": "no", "ask": "accept-new"}.get(policy, policy),
        "name": alias or (address if port == "22" else f"[{address}]:{port}"),
        "timeout": apssh.CONNECT_TIMEOUT if timeout == "none" else float(timeout),
        "keepalive": float(answer["serveraliveinterval"][0]) or apssh.KEEPALIVE_INTERVAL,
    }


def seen_on(node: SshNode) -> dict[str, Any]:
    """The same of a node."""
    config = node._host_config
    trust = apssh._Trust(
        node.hostname,
        node._address or node.hostname,
        node.port,
        known_hosts=node.known_hosts,
        host_keys=node.host_keys,
        config=config,
    )
    return {
        "address": (node._address or node.hostname).lower(),
        "user": node.username,
        "port": node.port,
        "keys": config.paths("identityfile"),
        "certificates": config.paths("certificatefile"),
        "only": config.one("identitiesonly") == "yes",
        "agent": config.identity_agent,
        "way": [
            f"{hop.username}@{(hop._address or hop.hostname).lower()} {hop.port}"
            for hop in node._hops()[:-1]
        ],
        "command": node._proxy_command,
        "known": [
            os.path.expanduser(path) for path in config.known_hosts_files or apssh.KNOWN_HOSTS_FILES
        ],
        "policy": trust.policy,
        "name": trust.name.lower(),
        "timeout": node.timeout,
        "keepalive": node.keepalive,
    }


def config_nodes(file: Path, *targets: str, **options: Any) -> list[SshNode]:
    return apssh._build_nodes(
        apssh._parse_targets(list(targets)),
        formatter=apssh.HostFormatter(),
        config=str(file),
        **options,
    )


CONFIGURATIONS = {
    "empty": (
        "",
        "web",
        {"address": "web", "user": ME, "port": 22, "way": [], "policy": "accept-new"},
    ),
    "comments-only": ("# nothing\n\n   # here\n", "web", {"address": "web"}),
    "hostname": ("Host web\n HostName Web.Example.ORG\n", "web db", {"address": "web.example.org"}),
    "hostname-token": (
        "Host web db\n HostName %h.example.org\n",
        "web db",
        {"address": "web.example.org"},
    ),
    "hostname-percent": ("HostName a%%%h\n", "web", {"address": "a%web"}),
    "hostname-of-one-host-for-two": ("Host web db\n HostName web\n", "web db", {"address": "web"}),
    "hostname-v6": (
        "Host web\n HostName 2001:db8::1\n Port 2200\n",
        "web",
        {"address": "2001:db8::1", "name": "[2001:db8::1]:2200"},
    ),
    "user-port": (
        "Host web\n User bob\n Port 2200\n",
        "web db",
        {"user": "bob", "port": 2200, "name": "[web]:2200"},
    ),
    "target-wins": (
        "Host *\n User bob\n Port 2200\n",
        "ann@web:22 web db:23",
        {"user": "ann", "port": 22},
    ),
    "equals-and-case": (
        "HOST = web\n\tUSER=bob\n  pOrT =2200\n",
        "web db",
        {"user": "bob", "port": 2200},
    ),
    "quotes": (
        'Host "web"\n User "bob"\n IdentityFile "~/.ssh/my key"\n',
        "web db",
        {"user": "bob"},
    ),
    "comment-at-the-end": (
        "Host web db # both\n User bob # the builder\n Port 2200 # odd\n",
        "web db",
        {"user": "bob", "port": 2200},
    ),
    "no-newline-at-the-end": ("Host web\n Port 2200", "web", {"port": 2200}),
    "dos-line-ends": ("Host web\r\n Port 2200\r\n", "web db", {"port": 2200}),
    "first-wins": (
        "Host web\n User one\nHost w*\n User two\n Port 2222\nHost *\n User three\n Port 3333\n",
        "web wiki db",
        {"user": "one", "port": 2222},
    ),
    "negated": (
        "Host *.org !secret.org\n User bob\n",
        "web.org secret.org web.com",
        {"user": "bob"},
    ),
    "negated-alone": ("Host !web\n User bob\n", "web db", {"user": ME}),
    "wildcards": (
        "Host node? 10.0.*.1\n User bob\n",
        "node1 node10 10.0.3.1 10.0.3.2",
        {"user": "bob"},
    ),
    "patterns-know-case": (
        "Host WEB\n User upper\nHost web\n User lower\n",
        "web WEB",
        {"user": "lower"},
    ),
    "many-identities": (
        "Host web\n IdentityFile ~/one\n IdentityFile ~/two\nHost *\n IdentityFile ~/three\n",
        "web db",
        {},
    ),
    "identity-tokens": (
        "IdentityFile %d/%h-%n-%r-%u-%p\nHost web\n User bob\n Port 2200\n HostName box\n",
        "web db",
        {},
    ),
    "identity-tokens-of-the-target": ("IdentityFile ~/%r-%p-%%\n", "ann@web:2200 web", {}),
    "identity-variable": ("IdentityFile ${STORE}/key\n", "web", {"keys": ["/store/key"]}),
    "identity-none": ("IdentityFile none\n", "web", {"keys": ["none"]}),
    "identities-only": (
        "Host web\n IdentitiesOnly yes\n IdentityFile ~/one\n",
        "web db",
        {"only": True},
    ),
    "identities-only-alone": ("IdentitiesOnly yes\n", "web", {"only": True, "keys": []}),
    "agent-path": ("Host web\n IdentityAgent ~/%h.sock\n", "web db", {}),
    "agent-none": ("Host web\n IdentityAgent none\n", "web db", {"agent": os.devnull}),
    "agent-of-the-environment": ("IdentityAgent SSH_AUTH_SOCK\n", "web", {"agent": None}),
    "agent-variable": ("IdentityAgent $STORE\n", "web", {"agent": "/store"}),
    "jump": (
        "Host web\n ProxyJump gw\nHost gw\n HostName gate\n User bob\n",
        "web db",
        {"way": ["bob@gate 22"]},
    ),
    "jump-chain": (
        "Host web\n ProxyJump ann@gw1:2201,[2001:db8::1]:2202,gw3\nHost gw3\n Port 2203\n",
        "web",
        {"way": ["ann@gw1 2201", f"{ME}@2001:db8::1 2202", f"{ME}@gw3 2203"]},
    ),
    "jump-through-jumps": (
        "Host web\n ProxyJump gw3\nHost gw3\n ProxyJump gw2\nHost gw2\n ProxyJump gw1\n",
        "web gw3 gw2",
        {"way": [f"{ME}@gw1 22", f"{ME}@gw2 22", f"{ME}@gw3 22"]},
    ),
    "jump-chain-behind-a-jump": (
        "Host web\n ProxyJump gw2,gw3\nHost gw2\n ProxyJump gw1\nHost gw3\n ProxyJump other\n",
        "web",
        {"way": [f"{ME}@gw1 22", f"{ME}@gw2 22", f"{ME}@gw3 22"]},
    ),
    "jump-none": (
        "Host web\n ProxyJump none\nHost *\n ProxyJump gw\nHost gw\n ProxyJump none\n",
        "web",
        {"way": []},
    ),
    "jump-for-all-but-itself": (
        "Host * !gw\n ProxyJump gw\n",
        "web db gw",
        {"way": [f"{ME}@gw 22"]},
    ),
    "jump-uri": ("Host web\n ProxyJump ssh://bob@gw:2200\n", "web", {"way": ["bob@gw 2200"]}),
    "jump-token": ("Host web db\n ProxyJump gw-%h\n", "web db", {"way": [f"{ME}@gw-web 22"]}),
    "command": (
        "Host web\n ProxyCommand nc -x %% %h %n %p %r\n HostName box\n Port 2200\n User bob\n",
        "web db",
        {"command": "nc -x % box web 2200 bob"},
    ),
    "command-of-two": (
        "Host web db\n ProxyCommand nc %h %p\n",
        "web:2200 db",
        {"command": "nc web 2200"},
    ),
    "command-none": (
        "Host web\n ProxyCommand none\nHost *\n ProxyCommand nc %h %p\n",
        "web db",
        {"command": None},
    ),
    "command-before-jump": (
        "ProxyCommand nc %h %p\nProxyJump gw\n",
        "web",
        {"command": "nc web 22", "way": []},
    ),
    "jump-before-command": (
        "Host web\n ProxyJump gw\n ProxyCommand nc %h %p\n",
        "web",
        {"command": None, "way": [f"{ME}@gw 22"]},
    ),
    "known-hosts": (
        "Host web\n UserKnownHostsFile /one /two\n",
        "web db",
        {"known": ["/one", "/two", "/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2"]},
    ),
    "known-hosts-none": (
        "UserKnownHostsFile none\nGlobalKnownHostsFile /global\n",
        "web",
        {"known": [os.devnull, "/global"]},
    ),
    "known-hosts-tokens": (
        "UserKnownHostsFile /known/%k-%h-%p\nHost db\n HostKeyAlias ali\n",
        "web db",
        {},
    ),
    "known-hosts-tokens-of-two": ("Host web db\n UserKnownHostsFile /known/%k\n", "web db", {}),
    "global-known-hosts": (
        "UserKnownHostsFile /mine\nGlobalKnownHostsFile /one /two\n",
        "web",
        {"known": ["/mine", "/one", "/two"]},
    ),
    "policy-ask": ("StrictHostKeyChecking ask\n", "web", {"policy": "accept-new"}),
    "policy-yes": ("Host web\n StrictHostKeyChecking yes\n", "web db", {"policy": "yes"}),
    "policy-no": ("Host web\n StrictHostKeyChecking no\n", "web db", {"policy": "no"}),
    "policy-off": ("Host web\n StrictHostKeyChecking off\n", "web db", {"policy": "no"}),
    "policy-accept-new": ("StrictHostKeyChecking accept-new\n", "web", {"policy": "accept-new"}),
    "alias": ("Host web\n HostKeyAlias box\n Port 2200\n", "web db", {"name": "box"}),
    "timeout": ("Host web\n ConnectTimeout 10\n", "web db", {"timeout": 10}),
    "timeout-with-unit": ("ConnectTimeout 1m10s\n", "web", {"timeout": 70}),
    "keepalive": ("Host web\n ServerAliveInterval 5\n", "web db", {"keepalive": 5}),
    "certificate": (
        "Host web\n CertificateFile ~/%r-cert.pub\n CertificateFile ${STORE}/c\n",
        "web db",
        {},
    ),
    "match-host": ("Match host web,db*\n User bob\n", "web db wiki", {"user": "bob"}),
    "match-original-host": (
        "Host web\n HostName box\nMatch originalhost web\n User bob\nMatch host box\n Port 2200\n",
        "web box",
        {"user": "bob", "port": 2200},
    ),
    "match-user": (
        "Match user ann\n Port 2200\nMatch localuser nobody\n Port 2201\n",
        "ann@web web",
        {"port": 2200},
    ),
    "match-exec": ('Match exec "test %h = web"\n User bob\n', "web db", {"user": "bob"}),
    "match-negated": ("Match !host web\n User bob\n", "db web", {"user": "bob"}),
    "match-all": ("Host db\n User ann\nMatch all\n User bob\n", "web db", {"user": "bob"}),
    "match-final": (
        "Host web\n HostName box\nMatch final host box\n User bob\n",
        "web db",
        {"user": "bob"},
    ),
    "canonical": (
        "CanonicalizeHostname yes\nCanonicalizeMaxDots 0\nMatch canonical host *.org\n User bob\n",
        "web.org db.com",
        {"user": "bob"},
    ),
    "include": (
        "Include {folder}/one.conf\nHost *\n User bob\n",
        "web db",
        {"user": "one", "port": 2201},
    ),
    "include-glob": (
        "Include {folder}/*.conf {folder}/missing\n",
        "web db",
        {"user": "one", "port": 2201},
    ),
    "include-in-a-block": (
        "Host web\n Include {folder}/two.conf\nHost *\n User bob\n",
        "web db",
        {"user": "two"},
    ),
    "include-quoted": ('Include "{folder}/one.conf"\n', "web db", {"user": "one"}),
    "include-blank": (
        'Include "{folder}/a b/three.conf"\nHost *\n User bob\n',
        "web db wiki",
        {"address": "box3"},
    ),
    "include-blank-escaped": (
        "Include {folder}/a\\ b/three.conf\n",
        "web db wiki",
        {"address": "box3"},
    ),
    "include-single-quotes": ("Include '{folder}/one.conf'\n", "web db", {"user": "one"}),
    "single-quotes": (
        "Host 'web'\n HostName box\nHost 'db'\n Port 2200\n",
        "web db wiki",
        {"address": "box"},
    ),
    "quoted-keyword": ('"Host" web\n HostName box\n', "web db", {"address": "box"}),
    "known-hosts-with-blank": (
        'UserKnownHostsFile "/with blank/known" /other\n',
        "web",
        {
            "known": [
                "/with blank/known",
                "/other",
                "/etc/ssh/ssh_known_hosts",
                "/etc/ssh/ssh_known_hosts2",
            ]
        },
    ),
    "tag": ("Host web\n Tag x\nMatch tagged x\n User bob\n", "web", {"user": "bob"}),
    "ignored-keyword": (
        "IgnoreUnknown Mystery\nHost web\n Mystery yes\n User bob\n",
        "web db",
        {"user": "bob"},
    ),
    "bad-keyword": ("Host web\n Usr bob\n Port 22\n", "web", None),
    "bad-value": ("Host web\n Port many\n", "web", None),
    "bad-for-one": ("Host db\n ConnectTimeout never\n", "web db", None),
}


@pytest.fixture
def included(tmp_path: Path) -> Path:
    """Files for Include."""
    folder = tmp_path / "included"
    folder.mkdir()
    (folder / "one.conf").write_text("Host web\n User one\n Port 2201\n")
    (folder / "two.conf").write_text("User two\n")
    (folder / "a b").mkdir()
    (folder / "a b" / "three.conf").write_text("Host web\n HostName box3\n")
    return folder


@pytest.mark.parametrize(
    ("text", "targets", "expected"), CONFIGURATIONS.values(), ids=CONFIGURATIONS
)
def test_config_is_what_ssh_says(
    text: str,
    targets: str,
    expected: dict[str, Any] | None,
    tmp_path: Path,
    included: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STORE", "/store")
    file = tmp_path / "config"
    file.write_text(text.replace("{folder}", str(included)), newline="")
    try:
        told = [ssh_says(file, target) for target in targets.split()]
    except UsageError as exc:  # what ssh refuses (Tag is of OpenSSH 9.4), in its words
        assert expected is None or "Bad configuration option: tag" in str(exc)
        with pytest.raises(UsageError) as caught:
            config_nodes(file, *targets.split())
        assert str(caught.value) == str(exc)
        return
    assert expected is not None
    assert {field: told[0][field] for field in expected} == expected
    assert [seen_on(node) for node in config_nodes(file, *targets.split())] == told


def test_config_is_what_ssh_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files and the command that ``ssh -v`` says it uses."""
    monkeypatch.setenv("STORE", "store")
    file = tmp_path / "config"
    file.write_text(
        "Host box\n HostName real\n User bob\n Port 2200\n HostKeyAlias ali\n ProxyCommand "
        "echo %h %n %p %r %%\n"
        " IdentityFile ~/%h-%n-%p-%r-%u-%k-%i-%L-%l-%%\n IdentityFile %d/${STORE}\n "
        "CertificateFile ~/%r.pub\n"
        " UserKnownHostsFile /known/%k-%h\n"
    )
    for target, options in (("box", ["box"]), ("ann@box:2201", ["-l", "ann", "-p", "2201", "box"])):
        done = subprocess.run(
            ["ssh", "-v", "-F", file, *options, "true"], input=b"", capture_output=True, check=False
        )
        said = done.stderr.decode().replace(
            pwd.getpwuid(os.getuid()).pw_dir + "/", os.environ["HOME"] + "/"
        )
        (node,) = config_nodes(file, target)
        assert f"debug1: Executing proxy command: exec {node._proxy_command}" in said.splitlines()
        assert [
            *node._host_config.paths("identityfile"),
            *node._host_config.paths("certificatefile"),
        ] == re.findall(r"debug1: (?:identity|certificate) file (.*) type -1", said)


def test_config_relative_include(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative name is below ~/.ssh, whichever file includes it; ssh takes the home from the
    passwd file.
    """
    home = pwd.getpwuid(os.getuid()).pw_dir
    if not os.path.isdir(f"{home}/.ssh"):
        pytest.skip("this user has no ~/.ssh folder")
    monkeypatch.setenv("HOME", home)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "one").write_text("Host web\n User bob\n")
    (tmp_path / "more" / "two").write_text("Host db\n Port 2200\n")
    file = tmp_path / "config"
    file.write_text(
        f"Include {os.path.relpath(tmp_path / 'more', os.path.realpath(f'{home}/.ssh'))}/*\n"
    )
    web, db, wiki = config_nodes(file, "web", "db", "wiki")
    assert [(node.username, node.port) for node in (web, db, wiki)] == [
        ("bob", 22),
        (ME, 2200),
        (ME, 22),
    ]
    assert [seen_on(node) for node in (web, db, wiki)] == [
        ssh_says(file, target) for target in ("web", "db", "wiki")
    ]


@pytest.mark.parametrize(
    ("text", "targets", "message"),
    [
        ("Host gw\n ProxyJump gw\n", "gw", "ssh config: jumphost loop via gw"),
        (
            "Host web\n ProxyJump gw\nHost gw\n ProxyJump gw\n",
            "web",
            "ssh config: jumphost loop via gw",
        ),
        ("Host a\n ProxyJump b\nHost b\n ProxyJump a\n", "a", "a: it is its own gateway"),
        (
            "Host a\n ProxyJump b\nHost b\n ProxyJump c\nHost c\n ProxyJump a\n",
            "a",
            "a: it is its own gateway",
        ),
        ("Host web\n ProxyCommand nc %r %h\n", "a.b+c@web", None),
        (
            "Host web\n ProxyCommand nc %r %h\n",
            "a*b@web",
            "web: a host or user name with such characters cannot stand in a ProxyCommand",
        ),
    ],
    ids=["own-jump", "jump-of-a-jump", "loop-of-two", "loop-of-three", "odd-user", "shell-user"],
)
def test_config_refused(text: str, targets: str, message: str | None, tmp_path: Path) -> None:
    (tmp_path / "config").write_text(text)
    with contextlib.nullcontext() if message is None else pytest.raises(UsageError) as caught:
        config_nodes(tmp_path / "config", targets)
    assert message is None or str(caught.value) == message


def test_config_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apssh, "CONNECT_TIMEOUT", 0.5)
    (tmp_path / "config").write_text('Match exec "sleep 20"\n User bob\n')
    with pytest.raises(UsageError) as caught:
        config_nodes(tmp_path / "config", "web")
    assert str(caught.value) == "ssh config: no answer about web within 0.5 s (a Match exec?)"


# what configs are asked for


@pytest.fixture
def program(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, list[str]]]:
    """Run apssh in this process, as in a new one: its exit code, stdout, the lines of stderr."""

    def call(*argv: str) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(apssh._key_memory, "accepted", set())
        capfd.readouterr()
        code = apssh.main(argv)
        out, err = capfd.readouterr()
        return code, out, err.splitlines()

    return call


Program = Callable[..., tuple[int, str, list[str]]]
Config = Callable[[str], Path]


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The command lines of ssh since the start of the test: a program named ssh, first on PATH,
    notes them.
    """
    log, folder = tmp_path / "asked", tmp_path / "counting"
    folder.mkdir()
    (folder / "ssh").write_text(
        f'#!/bin/sh\necho "$*" >>{shlex.quote(str(log))}\nexec {shutil.which("ssh")} "$@"\n'
    )
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return lambda: log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def config(home: Path) -> Callable[[str], Path]:
    """Write ~/.ssh/config."""

    def write(text: str) -> Path:
        path = home / ".ssh" / "config"
        path.write_text(text)
        return path

    return write


PLAIN = """
# what's "quoted" here is a comment's
Host "gw"
  HostName gate.example.org
Host node1*
  Port 2200
  IdentityFile ~/.ssh/%h-%r
Host node* !node1999
  ProxyJump gw
Host *
  User bob
  ServerAliveInterval 7
"""


def test_config_of_2000_hosts(config: Config, asked: Callable[[], list[str]], home: Path) -> None:
    nodes = config_nodes(config(PLAIN), "node[1-2000]")
    assert len(asked()) <= 6, asked()
    assert len(nodes) == 2000
    assert {node.gateway for node in nodes if node.hostname != "node1999"} == {nodes[0].gateway}
    by_name = {node.hostname: node for node in nodes}
    assert by_name["node1999"].gateway is None and by_name["node1999"].port == 2200
    assert by_name["node1234"]._host_config.paths("identityfile") == [f"{home}/.ssh/node1234-bob"]
    assert (
        by_name["node2"].port == 22
        and by_name["node2"].keepalive == 7
        and by_name["node2"]._host_config.paths("identityfile") == []
    )
    assert [seen_on(by_name[name]) for name in ("node1", "node7", "node1999", "node2000")] == [
        ssh_says(home / ".ssh" / "config", name)
        for name in ("node1", "node7", "node1999", "node2000")
    ]


@pytest.mark.parametrize("options", [["-F", "none"], []], ids=["none", "no-file"])
def test_no_config_asks_nothing(
    program: Program, options: list[str], sshd: Sshd, config: Config, asked: Callable[[], list[str]]
) -> None:
    if options:
        config("Host *\n Nonsense yes\n HostName nowhere.invalid\n User nobody\n Port 1\n")
    done = program(*options, "-t", sshd.target, "-r", "echo", "fine")
    assert (done, asked()) == ((0, "fine\n", []), [])


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ((), ("bob", 2200, "gw", "~/.ssh/of-config")),
        (("-l", "ann"), ("ann", 2200, "gw", "~/.ssh/of-config")),
        (("-p", "22"), ("bob", 22, "gw", "~/.ssh/of-config")),
        (("-p", "23"), ("bob", 23, "gw", "~/.ssh/of-config")),
        (("-g", "other"), ("bob", 2200, "other", "~/.ssh/of-config")),
        (("-k", "~/.ssh/id_ed25519"), ("bob", 2200, "gw", None)),
        (("-t", "ann@web"), ("ann", 2200, "gw", "~/.ssh/of-config")),
        (("-t", "web:22"), ("bob", 22, "gw", "~/.ssh/of-config")),
        (("-t", "other->web"), ("bob", 2200, "other", "~/.ssh/of-config")),
        (("-t", "None->web"), ("bob", 2200, None, "~/.ssh/of-config")),
        (("-t", "ann@web:24", "-l", "eve", "-p", "25"), ("ann", 24, "gw", "~/.ssh/of-config")),
    ],
    ids=lambda value: "_".join(map(str, value)) or "nothing",
)
def test_explicit_wins_over_config(
    argv: tuple[str, ...],
    expected: tuple[str, int, str | None, str | None],
    home: Path,
    keys: Path,
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config(
        "Host gw other\n User gate\nHost web\n HostName web.example.org\n User bob\n Port "
        "2200\n ProxyJump gw\n"
        " IdentityFile ~/.ssh/of-config\n"
    )
    shutil.copy(keys / "other", home / ".ssh" / "of-config")
    built: list[SshNode] = []

    async def fan_out(nodes: list[SshNode], *args: Any, **options: Any) -> list[apssh.Result]:
        built.extend(nodes)
        return []

    monkeypatch.setattr(apssh, "_fan_out", fan_out)
    assert apssh.main([*(() if "-t" in argv else ("-t", "web")), *argv, "true"]) == 0
    (node,) = built
    user, port, gateway, key = expected
    assert (node.username, node.port, node.gateway and node.gateway.hostname) == (
        user,
        port,
        gateway,
    )
    assert node._address == "web.example.org"
    assert [key.public_data for key in apssh._keys_to_offer(node.keys, node._host_config)[0]] == [
        apssh.import_private_key(key or "~/.ssh/id_ed25519").public_data
    ]
    if gateway:
        assert node.gateway and node.gateway.username == (
            "ann" if argv == ("-l", "ann") and gateway != "gw" else "gate"
        )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (20.0, 5.0, "bob", 2200, "relay")),
        ({"timeout": 40}, (40.0, 5.0, "bob", 2200, "relay")),
        ({"timeout": None}, (None, 5.0, "bob", 2200, "relay")),
        ({"keepalive": 3}, (20.0, 3.0, "bob", 2200, "relay")),
        ({"proxy_command": "mine"}, (20.0, 5.0, "bob", 2200, "mine")),
        ({"username": "root"}, (20.0, 5.0, "root", 2200, "relay")),
        ({"port": 24}, (20.0, 5.0, "bob", 24, "relay")),
    ],
    ids=lambda value: "-".join(value) or "nothing" if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("way", ["node", "targets"])
def test_what_is_given_wins_over_config(
    config: Config, way: str, given: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    """Of a node that reads the config itself, and of one that is made for a target."""
    path = config(
        "Host web\n User bob\n Port 2200\n ConnectTimeout 20\n ServerAliveInterval 5\n"
        " ProxyCommand relay\n"
    )
    if way == "node":
        node = SshNode("web", config=str(path), **given)
        run(node._apply_config())
    else:
        options = dict(given)
        user, port = options.pop("username", None), options.pop("port", None)
        text = (f"{user}@" if user else "") + "web" + (f":{port}" if port else "")
        (node,) = config_nodes(path, text, **options)
    seen = (node.timeout, node.keepalive, node.username, node.port, node._proxy_command)
    assert seen == expected


@pytest.mark.parametrize("seconds", [40.0, apssh.CONNECT_TIMEOUT])
def test_connect_timeout_option_wins_over_config(config: Config, seconds: float) -> None:
    """Even when it is the default."""
    path = config("Host *\n ConnectTimeout 20\n")
    (node,) = config_nodes(path, "web", connect_timeout=seconds)
    assert node.timeout == seconds


def test_no_ssh_program(
    program: Program, sshd: Sshd, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config("Host *\n User nobody\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    said = "apssh: no ssh program here to read the ssh config: it is not used"
    assert program("-t", sshd.target, "-r", "echo", "fine") == (0, "fine\n", [said])


@pytest.mark.parametrize(
    "text",
    [
        "Host *\n Usr bob\n Port 22\n",
        "Host *\n User bob\n Port many\n ConnectTimeout x\n",
        "Host\n User bob\n",
        "Match nonsense\n",
        "HostName %q\n",
    ],
    ids=["keyword", "values", "no-pattern", "match", "token"],
)
def test_broken_config(program: Program, text: str, config: Config) -> None:
    file = config(text)
    said = subprocess.run(
        ["ssh", "-F", file, "-G", "web"], capture_output=True, text=True, check=False
    ).stderr
    assert said
    done = program("-t", "web", "true")
    assert done == (2, "", [f"apssh: ssh config: {' '.join(said.splitlines())}"])


def test_columns_after_a_config(sshd: Sshd, config: Config, capfd: Any) -> None:
    """A user and a port that the config names are known to the formatter: columns and names are as
    if they had been given.
    """
    config(aliases(sshd, "one.site.org", "two.site.org", more=f"User {ME}"))
    formatter = apssh.HostFormatter()
    nodes = [
        SshNode(f"{name}.site.org", config=True, formatter=formatter) for name in ("one", "two")
    ]
    for node in nodes:
        assert asyncio.run(node.run("echo x")) == 0
        asyncio.run(node.close())
    assert capfd.readouterr().out == "one:x\ntwo:x\n"


def test_missing_config(program: Program, home: Path) -> None:
    done = program("-F", "missing", "-t", "web", "true")
    said = "Can't open user config file missing: No such file or directory"
    assert done == (2, "", [f"apssh: ssh config: {said}"])


def test_empty_device_as_config(
    program: Program, sshd: Sshd, asked: Callable[[], list[str]]
) -> None:
    done = program("-F", os.devnull, "-t", sshd.target, "-r", "echo", "fine")
    assert done == (0, "fine\n", [])


async def test_api_reads_no_config_unless_asked(
    sshd: Sshd, config: Config, asked: Callable[[], list[str]]
) -> None:
    file = config(
        f"Host box\n HostName 127.0.0.1\n Port {sshd.port}\n User {ME}\n ConnectTimeout 17\n"
    )
    node = SshNode("box", timeout=5)
    with pytest.raises(ConnectionFailedError) as caught:
        await node.run("true")
    assert (caught.value.kind, node.port) == ("dns", 22)
    assert [result.kind for result in await apssh.co_run("box", "true")] == ["dns"]
    assert asked() == []
    for each in (True, str(file)):
        async with SshNode("box", config=each, formatter=apssh.CaptureFormatter()) as node:
            assert await node.run("true") == 0
            assert (node.hostname, node.port, node.username, node.timeout) == (
                "box",
                sshd.port,
                ME,
                17,
            )
        (result,) = await apssh.co_run("box", "echo fine", config=each)
        assert (result.ok, result.stdout, result.host, result.port) == (
            True,
            "fine\n",
            "box",
            sshd.port,
        )


async def test_api_jumps_as_the_config_says(sshd: Sshd, config: Config) -> None:
    """Each hop is looked up; nodes with other ideas of trust share no jump host."""
    config(
        f"Host gw1 gw2 box*\n HostName 127.0.0.1\n Port {sshd.port}\n User {ME}\nHost box*\n "
        "ProxyJump gw1,gw2\n"
    )
    logins = sshd.logins()
    nodes = [
        SshNode(f"box{number}", config=True, timeout=10, formatter=apssh.CaptureFormatter())
        for number in range(3)
    ]
    assert await asyncio.gather(*(node.run("true") for node in nodes)) == [0, 0, 0]
    assert [hop.hostname for hop in nodes[0]._hops()] == ["gw1", "gw2", "box0"]
    assert len({node.gateway for node in nodes}) == 1
    assert sshd.logins() - logins == 5
    trusting = SshNode(
        "box4", config=True, known_hosts=None, timeout=10, formatter=apssh.CaptureFormatter()
    )
    assert await trusting.run("true") == 0
    assert trusting.gateway is nodes[0].gateway  # verified: the word was for that node
    strict = SshNode(
        "box5", config=True, host_keys="yes", timeout=10, formatter=apssh.CaptureFormatter()
    )
    assert await strict.run("true") == 0
    assert strict.gateway is not nodes[0].gateway
    for hop in {hop for node in [*nodes, trusting, strict] for hop in node._hops()}:
        await hop.close()


# logins


def aliases(server: Sshd, *names: str, more: str = "") -> str:
    """A block for names of a server."""
    return f"Host {' '.join(names)}\n HostName 127.0.0.1\n Port {server.port}\n {more}\n"


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("chain", [True, False], ids=["chain", "nested"])
def test_jump_hosts_are_shared(
    program: Program,
    depth: int,
    chain: bool,
    sshd: Sshd,
    make_sshd: Callable[..., Sshd],
    config: Config,
) -> None:
    gates = [make_sshd() for _ in range(depth)]
    names = [f"gw{number}" for number in range(depth)]
    if chain:
        blocks = [aliases(gate, name) for gate, name in zip(gates, names, strict=True)]
    else:
        blocks = [
            aliases(gate, name, more=f"ProxyJump gw{number - 1}" if number else "")
            for number, (gate, name) in enumerate(zip(gates, names, strict=True))
        ]
    config(
        "".join(blocks)
        + aliases(sshd, "box*", more=f"ProxyJump {','.join(names) if chain else names[-1]}")
    )
    logins = sshd.logins()
    code, out, said = program("-t", "box[1-5]", "-q", "echo", "$SSH_CONNECTION")
    assert (code, said) == (0, [])
    assert sorted(line.split()[0] for line in out.splitlines()) == [
        f"box{number}:127.0.0.1" for number in range(1, 6)
    ]
    assert sshd.logins() - logins == 5
    assert [gate.logins() for gate in gates] == [1] * depth
    assert eventually(lambda: all(gate.connections() == 0 for gate in gates))


def test_failed_jump_host(program: Program, sshd: Sshd, config: Config) -> None:
    port = free_port()
    config(
        f"Host gw\n HostName 127.0.0.1\n Port {port}\n"
        + aliases(sshd, "box1", "box2", more="ProxyJump gw")
    )
    code, out, said = program("-t", "box[1-2]", "-q", "true")
    assert (code, out) == (1, "")
    assert sorted(said) == [
        f"{name}: refused: gateway gw: nothing listens on port {port}" for name in ("box1", "box2")
    ]


RELAY = """
import os, socket, sys, threading
sock = socket.create_connection(sys.argv[2:4])
def back():
    while data := sock.recv(65536):
        os.write(1, data)
    os._exit(0)
threading.Thread(target=back).start()
while data := os.read(0, 65536):
    sock.sendall(data)
os._exit(0)
"""


def test_proxy_command(
    program: Program, sshd: Sshd, config: Config, home: Path, tmp_path: Path
) -> None:
    (home / "relay.py").write_text(RELAY)
    relay = f"{sys.executable} {home}/relay.py"
    command = f"{shlex.quote(sys.executable)} {home}/relay.py relay %h %p"
    config(
        f"Host box* broken\n HostName 127.0.0.1\n Port {sshd.port}\n ProxyCommand {command}\n"
        "Host broken\n StrictHostKeyChecking yes\n HostKeyAlias unknown\n"
    )
    code, out, said = program("-t", "box[1-3]", "-t", f"box4:{sshd.port}", "-q", "echo fine")
    assert (code, sorted(out.splitlines()), said) == (
        0,
        [f"box{number}:fine" for number in range(1, 5)],
        [],
    )
    eventually(lambda: not processes(relay))
    assert program("-t", "broken", "-q", "true")[0] == 1
    eventually(lambda: not processes(relay))

    async def main() -> None:
        node = SshNode("box9", config=True, username=ME, formatter=apssh.CaptureFormatter())
        assert await node.run("true") == 0
        assert len(processes(relay)) == 1
        await node.close()
        await eventually_async(lambda: not processes(relay))

    run(main())


async def test_proxy_command_that_ignores_its_end(sshd: Sshd, home: Path) -> None:
    """Nobody waits for it, and it is no zombie when it has ended."""
    (home / "relay.py").write_text(
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        + RELAY.replace("os._exit(0)", "__import__('time').sleep(60)")
    )
    node = SshNode(
        "box",
        username=ME,
        port=sshd.port,
        host_keys="no",
        proxy_command=f"{shlex.quote(sys.executable)} {home}/relay.py token 127.0.0.1 {sshd.port}",
    )
    assert await node.run("true") == 0
    (link,) = node._live.links if node._live else ()
    assert link.proxy
    process = link.proxy._process
    slowest, begin = 0.0, time.monotonic()
    closing = asyncio.create_task(node.close())
    while not closing.done():
        await asyncio.sleep(0.01)
        slowest, begin = max(slowest, time.monotonic() - begin), time.monotonic()
    assert slowest < 1
    process.kill()
    await eventually_async(lambda: not Path(f"/proc/{process.pid}").exists())


def test_proxy_command_that_fails(
    program: Program, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    """It is started once; the command and its last words are told, and there is no traceback."""
    command = 'sh -c "echo x >> tries; echo no way >&2; exit 3"'
    config(f"Host box\n ProxyCommand {command}\n")
    code, out, said = program("-t", "box", "-q", "true")
    assert (code, out) == (1, "")
    assert said == [f"box: refused: the proxy command ended: {command}: no way"]
    assert Path("tries").read_text() == "x\n"
    gc.collect()
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.usefixtures("never_seen")
def test_host_key_alias(program: Program, sshd: Sshd, config: Config, home: Path) -> None:
    config(aliases(sshd, "box", "wrong", more="HostKeyAlias the-box"))
    assert program("-t", "box", "true")[0] == 0
    known = home / ".ssh" / "known_hosts"
    assert (
        known.read_text()
        == f"the-box {' '.join(sshd.key.export_public_key().decode().split()[:2])}\n"
    )
    other = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode().strip()
    known.write_text(
        f"[127.0.0.1]:{sshd.port} {sshd.key.export_public_key().decode()}the-box {other}\n"
    )
    code, _, (said,) = program("-t", "box", "-q", "true")
    assert code == 1
    assert said.startswith("box: hostkey: HOST KEY CHANGED: it presents ED25519 SHA256:")
    assert "ssh-keygen -R 'the-box' -f" in said


@pytest.mark.usefixtures("never_seen")
def test_user_known_hosts_file(
    program: Program, sshd: Sshd, config: Config, home: Path, tmp_path: Path
) -> None:
    """The first file is written to, all are read; a file for each host is its own."""
    config(
        aliases(sshd, "box", more=f"UserKnownHostsFile {tmp_path}/first {tmp_path}/second")
        + aliases(sshd, "each*", more=f"UserKnownHostsFile {tmp_path}/of-%k")
        + aliases(sshd, "none", more="UserKnownHostsFile none")
        + aliases(sshd, "null", more="UserKnownHostsFile /dev/null")
    )
    line = (
        f"[127.0.0.1]:{sshd.port} {' '.join(sshd.key.export_public_key().decode().split()[:2])}\n"
    )
    mode = os.stat(os.devnull).st_mode
    for target in ("box", "each[1-2]", "none", "null"):
        done = program("-t", target, "-q", "true")
        assert done == (0, "", [])
    written = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    assert written == {"first": line, "of-each1": line, "of-each2": line}
    assert sorted(path.name for path in (home / ".ssh").iterdir()) == [
        "config",
        "id_ed25519",
        "id_ed25519.pub",
    ]
    assert [path.name for path in home.iterdir() if path.name not in (".ssh", ".apssh")] == []
    assert os.stat(os.devnull).st_mode == mode
    (tmp_path / "first").rename(tmp_path / "second")
    assert program("-t", "box", "--host-keys", "yes", "true")[0] == 0


def test_known_hosts_file_with_a_blank(
    program: Program, sshd: Sshd, config: Config, home: Path, tmp_path: Path
) -> None:
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "known").write_bytes(known_hosts_text("{n} {other}", sshd.port, sshd.key))
    config(aliases(sshd, "box", more=f'UserKnownHostsFile "{tmp_path}/a b/known"'))
    code, _, err = program("-t", "box", "true")
    assert code == 1 and err[0].startswith("box: hostkey: HOST KEY CHANGED")


def test_jump_host_is_verified(
    sshd: Sshd, make_sshd: Callable[..., Sshd], config: Config, home: Path
) -> None:
    """known_hosts=None is about its node, not about the way there."""
    gateway = make_sshd()
    config(aliases(gateway, "gw") + aliases(sshd, "box", more="ProxyJump gw"))
    (home / ".ssh" / "known_hosts").write_bytes(
        known_hosts_text("{n} {other}", gateway.port, gateway.key)
    )
    error = failure_of(SshNode("box", config=True, known_hosts=None, username=ME).run("true"))
    assert str(error).startswith("box: hostkey: gateway gw: HOST KEY CHANGED")


async def test_jump_hosts_of_a_node(config: Config) -> None:
    """They log in as the node does, within its time, and are shared."""
    config("Host box*\n ProxyJump gw1,gw2\nHost gw2\n ConnectTimeout 20\n")

    async def gateways_of(name: str, **options: Any) -> list[SshNode]:
        node = SshNode(name, config=True, **options)
        await node._apply_config()
        return node._hops()[:-1]

    gateways = await gateways_of("box1", password="secret", timeout=None)
    assert [gateway.hostname for gateway in gateways] == ["gw1", "gw2"]
    assert [(gateway.timeout, gateway._password) for gateway in gateways] == [(None, "secret")] * 2
    assert await gateways_of("box2", password="secret", timeout=None) == gateways
    others = await gateways_of("box2")
    assert [gateway.timeout for gateway in others] == [30, 20]
    assert not {*others} & {*gateways}


def test_config_is_asked_with_what_the_node_says(config: Config) -> None:
    config("Match user ann\n HostName one\nMatch all\n IdentityFile ~/%r-%p\n")

    async def main() -> list[str]:
        nodes = [
            SshNode("box", config=True, username="ann", port=2200),
            SshNode("box", config=True, username="bob"),
        ]
        for node in nodes:
            await node._apply_config()
        return [
            f"{node._address} "
            f"{' '.join(map(os.path.basename, node._host_config.paths('identityfile')))}"
            for node in nodes
        ]

    assert run(main()) == ["one ann-2200", "box bob-22"]


RSA_HOST = {"host_key": "ssh-rsa"}


@pytest.mark.parametrize(
    ("server", "more", "code", "message"),
    [
        (
            {"Ciphers": "aes128-cbc"},
            "",
            1,
            "*box: lost: (No matching encryption algorithm found, sent .* and received aes128-cbc"
            r"|dropped before login, 2 times, in the key exchange \(no algorithm in common\?\))",
        ),  # whoever notices first
        ({"Ciphers": "aes128-cbc"}, "Ciphers +aes128-cbc", 0, ""),
        (
            {"KexAlgorithms": "ecdh-sha2-nistp521", "MACs": "hmac-md5"},
            "KexAlgorithms ecdh-sha2-nistp521\n MACs +hmac-md5",
            0,
            "",
        ),
        (RSA_HOST | {"HostKeyAlgorithms": "ssh-rsa"}, "HostKeyAlgorithms +ssh-rsa", 0, ""),
        (
            {},
            "HostKeyAlgorithms rsa-sha2-512",
            1,
            "box: lost: dropped before login, 2 times, in the key exchange (no algorithm in "
            "common?)",
        ),
        ({}, "PubkeyAuthentication no", 1, f"box: auth: login as {ME} refused, after 0 keys"),
        (
            {},
            "PreferredAuthentications password",
            1,
            f"box: auth: login as {ME} refused, after 0 keys",
        ),
        ({"PubkeyAcceptedAlgorithms": "ssh-rsa"}, "PubkeyAcceptedAlgorithms ssh-rsa", 0, ""),
        (
            {},
            "KexAlgorithms sntrup761x25519-sha512@openssh.com",
            1,
            "box: local: No key exchange algorithms selected",
        ),
        ({}, "BindAddress 127.0.0.9\n AddressFamily inet", 0, ""),
        (
            {},
            "AddressFamily inet6",
            1,
            "box: dns: host name 127.0.0.1: address family for hostname not supported",
        ),
        (
            {},
            "RevokedHostKeys {folder}/host_key.pub",
            1,
            "box: hostkey: its key {shown} is revoked in {folder}/host_key.pub: "
            "the host needs a new one",
        ),
        (
            {},
            "RevokedHostKeys {folder}/none",
            1,
            "box: hostkey: RevokedHostKeys {folder}/none is not a readable list of public "
            "keys: no host is trusted",
        ),
        (
            {},
            "RevokedHostKeys {folder}/krl",
            1,
            "box: hostkey: RevokedHostKeys {folder}/krl is not a readable list of public keys: "
            "no host is trusted",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_config_restricts_and_widens(
    program: Program,
    make_sshd: Callable[..., Sshd],
    config: Config,
    keys: Path,
    server: dict[str, Any],
    more: str,
    code: int,
    message: str,
) -> None:
    """Each as ssh itself does (compared in the same test)."""
    sshd = make_sshd(**server)
    shutil.copy(keys / "rsa", Path.home() / ".ssh" / "id_rsa")
    sshd.key.write_public_key(sshd.folder / "host_key.pub")
    subprocess.run(
        ["ssh-keygen", "-q", "-k", "-f", sshd.folder / "krl", sshd.folder / "host_key.pub"],
        check=True,
    )
    more = more.replace("{folder}", str(sshd.folder))
    path = config(aliases(sshd, "box", more=more) + f"Host *\n User {ME}\n")
    done, _, err = program("-t", "box", "echo $SSH_CLIENT")
    shown = fingerprint(sshd.key)
    if message.startswith("*"):
        assert done == code and re.fullmatch(message[1:], err[0]), err
    else:
        message = message or "recorded the key of 1 host never seen: box"
        assert (done, err[0]) == (code, message.format(folder=sshd.folder, shown=shown))
    ssh = subprocess.run(
        [
            "ssh",
            "-F",
            str(path),
            "-i",
            str(Path.home() / ".ssh/id_rsa"),
            "-i",
            str(Path.home() / ".ssh/id_ed25519"),
            "-o",
            "BatchMode yes",
            "-o",
            "StrictHostKeyChecking accept-new",
            "-o",
            f"UserKnownHostsFile {sshd.folder}/known",
            "box",
            "true",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert bool(ssh.returncode) == bool(code) or (server and not more) or "sntrup" in more, (
        ssh.stderr
    )  # asyncssh has it not


@pytest.mark.parametrize(("policy", "code"), [("ask", 0), ("yes", 1), ("accept-new", 0), ("no", 0)])
@pytest.mark.usefixtures("never_seen")
def test_strict_host_key_checking(
    program: Program, policy: str, code: int, sshd: Sshd, config: Config, home: Path
) -> None:
    config(aliases(sshd, "box", more=f"StrictHostKeyChecking {policy}"))
    assert program("-t", "box", "-q", "true")[0] == code
    assert program("-t", "box", "-q", "--host-keys", "accept-new", "true")[0] == 0


def login_of(server: Sshd, since: int) -> str:
    """The algorithm and key of the one login since then, when no other key was offered before."""
    log = server.log()[since:]
    assert "Failed publickey" not in log
    (line,) = re.findall(r"Accepted publickey for \S+ from \S+ port \d+ ssh2: (.*)", log)
    return str(line)


def file_fingerprint(path: Path) -> str:
    return subprocess.run(
        ["ssh-keygen", "-lf", path], capture_output=True, text=True, check=True
    ).stdout.split()[1]


@pytest.mark.parametrize("more", [[], ["other"]], ids=["file", "behind-a-bad-file"])
def test_identities_only(
    program: Program,
    more: list[str],
    make_sshd: Callable[..., Sshd],
    agent: Callable[..., None],
    keys: Path,
    config: Config,
) -> None:
    """The agent's keys would exhaust the server's patience; only what is named is offered."""
    server = make_sshd(MaxAuthTries=len(more) + 1)
    agent(keys / "other", keys / "rsa", keys / "id_ed25519")
    config(
        aliases(
            server,
            "box",
            more="IdentitiesOnly yes\n"
            + "".join(f" IdentityFile {keys}/{name}\n" for name in [*more, "ecdsa"]),
        )
    )
    done = program("-t", "box", "-q", "true")
    assert done == (0, "", [])
    assert f"ECDSA {file_fingerprint(keys / 'ecdsa.pub')}" in server.log()
    assert file_fingerprint(keys / "rsa.pub") not in server.log()


def test_identities_only_means_the_default_files(
    program: Program, sshd: Sshd, agent: Callable[..., None], keys: Path, config: Config
) -> None:
    agent(keys / "other", keys / "rsa")
    config(aliases(sshd, "box", more="IdentitiesOnly yes"))
    since = len(sshd.log())
    assert program("-t", "box", "-q", "true")[0] == 0
    assert login_of(sshd, since) == f"ED25519 {file_fingerprint(keys / 'id_ed25519.pub')}"


def test_identity_file_with_its_key_in_the_agent(
    program: Program, sshd: Sshd, agent: Callable[..., None], keys: Path, config: Config, home: Path
) -> None:
    """IdentityFile may name a public key, whose private one is in the agent."""
    agent(keys / "other", keys / "rsa", keys / "ecdsa")
    shutil.copy(keys / "ecdsa.pub", home / ".ssh" / "work.pub")
    config(aliases(sshd, "box", more="IdentityFile ~/.ssh/work.pub\n IdentitiesOnly yes"))
    since = len(sshd.log())
    assert program("-t", "box", "-q", "true")[0] == 0
    assert login_of(sshd, since) == f"ECDSA {file_fingerprint(keys / 'ecdsa.pub')}"


@pytest.mark.parametrize(
    "setting",
    ["IdentityAgent {path}", "IdentityAgent $APSSH_TEST_AGENT", "IdentityFile {keys}/rsa"],
    ids=["path", "variable", "file"],
)
def test_only_key_is_of_the_config(
    program: Program,
    setting: str,
    sshd: Sshd,
    agent: Callable[..., None],
    keys: Path,
    config: Config,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No agent in the environment and no default key: what the config names is enough to go on."""
    agent(keys / "rsa")
    path = os.environ["SSH_AUTH_SOCK"]
    monkeypatch.delenv("SSH_AUTH_SOCK")
    monkeypatch.setenv("APSSH_TEST_AGENT", path)
    for name in ("id_ed25519", "id_ed25519.pub"):
        (home / ".ssh" / name).unlink()
    config(aliases(sshd, "box", more=setting.format(path=path, keys=keys)))
    since = len(sshd.log())
    done = program("-t", "box", "-q", "true")
    assert done == (0, "", [])
    assert login_of(sshd, since) == f"RSA {file_fingerprint(keys / 'rsa.pub')}"


@pytest.mark.parametrize(
    ("setting", "code"),
    [
        ("IdentityAgent none", 1),
        ("IdentityFile none", 0),
        ("IdentityFile none\n IdentitiesOnly yes", 1),
    ],
    ids=["agent", "files", "files-only"],
)
def test_none_of_the_keys(
    program: Program,
    setting: str,
    code: int,
    sshd: Sshd,
    agent: Callable[..., None],
    keys: Path,
    config: Config,
    home: Path,
) -> None:
    """``none`` as ssh means it: the agent holds the only good key."""
    agent(keys / "ecdsa")
    shutil.copy(keys / "other", home / ".ssh" / "id_ed25519")
    (home / ".ssh" / "id_ed25519.pub").unlink()
    config(aliases(sshd, "box", more=setting))
    since = len(sshd.log())
    assert program("-t", "box", "-q", "true")[0] == code
    if not code:
        assert login_of(sshd, since) == f"ECDSA {file_fingerprint(keys / 'ecdsa.pub')}"
    assert (file_fingerprint(keys / "other.pub") in sshd.log()[since:]) == ("Agent" in setting)


@pytest.mark.parametrize("held", [False, True], ids=["file", "agent"])
def test_certificate_file(
    program: Program,
    held: bool,
    make_sshd: Callable[..., Sshd],
    keys: Path,
    config: Config,
    home: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    authority = asyncssh.generate_private_key("ssh-ed25519")
    authority.write_public_key(tmp_path / "ca.pub")
    server = make_sshd(TrustedUserCAKeys=tmp_path / "ca.pub")
    certificate = authority.generate_user_certificate(
        asyncssh.read_public_key(keys / "other.pub"), "somebody", principals=[ME]
    )
    certificate.write_certificate(home / f"{ME}.cert")
    shutil.copy(keys / "other.pub", home / ".ssh" / "work.pub")
    if held:
        request.getfixturevalue("agent")(keys / "other")
    else:
        shutil.copy(keys / "other", home / ".ssh" / "work")
    config(
        aliases(
            server,
            "box",
            more=f"IdentityFile ~/.ssh/work{'.pub' if held else ''}\n IdentitiesOnly yes\n"
            f" CertificateFile {home}/%r.cert",
        )
    )
    done = program("-t", "box", "-q", "true")
    assert done == (0, "", [])
    assert f"ED25519-CERT {file_fingerprint(keys / 'other.pub')}" in login_of(server, 0)


def test_certificate_file_of_another_key(
    program: Program,
    user_certificate: tuple[Sshd, Path, asyncssh.SSHKey],
    keys: Path,
    config: Config,
    tmp_path: Path,
) -> None:
    """It is not for this key, which has one of its own beside it."""
    server, path, key = user_certificate
    other = asyncssh.read_public_key(keys / "other.pub")
    certificate = CA.generate_user_certificate(other, "another", principals=[ME])
    certificate.write_certificate(tmp_path / "another")
    more = f"IdentityFile {path}\n CertificateFile {tmp_path}/another"
    config(aliases(server, "box", more=more))
    assert program("-t", "box", "-q", "true") == (0, "", [])
    assert f"ED25519-CERT {key.get_fingerprint()} ID somebody" in login_of(server, 0)


def test_user_and_port(program: Program, sshd: Sshd, config: Config) -> None:
    config(aliases(sshd, "box", more="User nobody-here"))
    done = program("-t", "box", "-q", "true")
    assert done == (1, "", ["box: auth: login as nobody-here refused, after 1 key"])
    for argv in (
        ("-l", ME, "-t", "box"),
        ("-t", f"{ME}@box"),
        ("-t", "box", "-l", ME, "-p", str(sshd.port)),
    ):
        done = program(*argv, "-q", "echo fine")
        assert done == (0, "box:fine\n", [])


@pytest.mark.parametrize(
    ("argv", "text"),
    [((), "no connection within 1 s"), (("-c", "0.3"), "no connection within 0.3 s")],
    ids=["config", "option"],
)
def test_connect_timeout(
    program: Program, argv: tuple[str, ...], text: str, config: Config
) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as silent:
        config(
            f"Host box\n HostName 127.0.0.1\n Port {silent.getsockname()[1]}\n ConnectTimeout 1s\n"
        )
        done = program("-t", "box", "-q", *argv, "true")
    assert done == (1, "", [f"box: timeout: {text}: connected, but the server says nothing"])


# --------------------------------------------------------------------------------------------------
# values
# --------------------------------------------------------------------------------------------------


def test_variables() -> None:
    variables = Variables(a=1)
    variables.b = 2
    assert (variables["b"], variables.a, dict(variables)) == (2, 1, {"a": 1, "b": 2})
    del variables.a
    for read in (lambda: variables.a, lambda: delattr(variables, "a")):
        with pytest.raises(AttributeError, match=r"^no variable 'a'$"):
            read()


def test_deferred() -> None:
    variables = Variables()
    deferred = Deferred("ping {{ host }} {{count}}", variables)
    assert (str(deferred), repr(deferred)) == (
        "ping {{ host }} {{count}}",
        "Deferred('ping {{ host }} {{count}}')",
    )
    variables.host = "{{count}}"
    assert str(deferred) == "ping {{count}} {{count}}"
    with pytest.raises(apssh.UndefinedVariableError) as caught:
        deferred.render()
    assert str(caught.value) == "no value yet for count in ping {{ host }} {{count}}"
    variables.count = 3
    assert deferred.render() == "ping {{count}} 3"  # a value is never read as a template


def test_deferred_expressions_use_jinja() -> None:
    assert Deferred("{{ '%02d' % n }}{% if n > 1 %}s{% endif %}", {"n": 7}).render() == "07s"
    with pytest.raises(apssh.UndefinedVariableError) as caught:
        Deferred("{{ n + 1 }}", {}).render()
    assert str(caught.value) == "no value yet in {{ n + 1 }}: 'n' is undefined"
    with pytest.raises(UsageError, match=r"^\{\{ n \+ \}\}: "):
        Deferred("{{ n + }}", {}).render()
    with pytest.raises(UsageError, match=r"^\{\{ n \+ 1 \}\}: can only concatenate str"):
        Deferred("{{ n + 1 }}", {"n": "7"}).render()


def test_deferred_leaves_a_shell_its_own() -> None:
    text = "printf {%s} {{n}} ${#a[@]}"
    assert Deferred(text, {"n": 7}).render() == "printf {%s} 7 ${#a[@]}"


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert Deferred("{{ n }}", {"n": 7}).render() == "7"
    with pytest.raises(UsageError) as caught:
        Deferred("{{ n + 1 }}", {"n": 7}).render()
    assert str(caught.value) == "this needs jinja2: pip install 'apssh[yaml]'"


# --------------------------------------------------------------------------------------------------
# transfers
# --------------------------------------------------------------------------------------------------


def build(folder: Path, layout: Mapping[str, str]) -> None:
    """Make these: ``name`` a file of this text, ``name/`` a folder, ``-> target`` as the text of a
    link.
    """
    for name, text in layout.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(exist_ok=True)
        elif text.startswith("-> "):
            path.symlink_to(text[3:])
        else:
            path.write_text(text)


def listing(folder: Path) -> dict[str, str]:
    """What there is, in the words of ``build``; all else by its kind."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            found[name] = f"-> {os.readlink(path)}"
        elif stat.S_ISDIR(mode):
            found[f"{name}/"] = ""
        else:
            found[name] = (
                path.read_text(errors="surrogateescape") if stat.S_ISREG(mode) else f"mode {mode:o}"
            )
    return found


async def outcome(node: Any, command: Any) -> str:
    """What the error of this step says; nothing when it succeeds."""
    try:
        await (
            command.co_run_local(node)
            if isinstance(node, LocalNode)
            else command.co_run_remote(node)
        )
    except ApsshError as exc:
        return str(exc)
    return ""


def copied(server: Sshd, *commands: Any, **options: Any) -> str:
    """The same, of steps one after the other on one node of this server, the texts joined."""

    async def main() -> str:
        async with server.node(**options) as node:
            return " | ".join(
                [text for command in commands if (text := await outcome(node, command))]
            )

    return run(main())


T = {
    "tree/": "",
    "tree/a": "A",
    "tree/sub/": "",
    "tree/sub/b": "B",
    "tree/empty/": "",
    "tree/nothing": "",
    "tree/link": "-> sub/b",
}
UNDER = {f"d/{name}": text for name, text in T.items()}
RECURSE = {"recurse": True}
ODD = {
    "with space": "1",
    "new\nline": "2",
    "-rf": "3",
    "raw\udcff": "4",
    "quo'te\"": "5",
    "*": "6",
    "$(x)": "7",
    "{host}": "8",
}

# name: sources, destination, options, what the sources' side has, what the destination's side has
# before and then, message after the host
COPIES: dict[
    str, tuple[Any, str, dict[str, bool], dict[str, str], dict[str, str], dict[str, str], str]
] = {
    "file onto a new name": ("f", "g", {}, {"f": "F"}, {}, {"g": "F"}, ""),
    "file onto a file": ("f", "g", {}, {"f": "F"}, {"g": "old"}, {"g": "F"}, ""),
    "file into a folder": ("f", "d", {}, {"f": "F"}, {"d/": ""}, {"d/": "", "d/f": "F"}, ""),
    "file into a folder, slash": (
        "f",
        "d/",
        {},
        {"f": "F"},
        {"d/": ""},
        {"d/": "", "d/f": "F"},
        "",
    ),
    "file into a missing folder": ("f", "d/", {}, {"f": "F"}, {}, {}, "d/: no such folder"),
    "file into a file, slash": (
        "f",
        "d/",
        {},
        {"f": "F"},
        {"d": "D"},
        {"d": "D"},
        "d/: not a folder",
    ),
    "list of one is that path": (["f"], "g", {}, {"f": "F"}, {}, {"g": "F"}, ""),
    "list of one onto a file": (["f"], "g", {}, {"f": "F"}, {"g": "old"}, {"g": "F"}, ""),
    "list of one needs a folder, slash": (
        ["f"],
        "g/",
        {},
        {"f": "F"},
        {},
        {},
        "g/: no such folder",
    ),
    "list into a folder": (
        ["f", "g"],
        "d",
        {},
        {"f": "F", "g": "G"},
        {"d/": ""},
        {"d/": "", "d/f": "F", "d/g": "G"},
        "",
    ),
    "list onto a file": (
        ["f", "g"],
        "h",
        {},
        {"f": "F", "g": "G"},
        {"h": "H"},
        {"h": "H"},
        "h: not a folder",
    ),
    "folder without recurse": (
        "tree",
        "d",
        {},
        T,
        {"d/": ""},
        {"d/": ""},
        "tree: is a folder (recurse, -r, copies folders)",
    ),
    "tree onto a new name": (
        "tree",
        "new",
        RECURSE,
        T,
        {},
        {name.replace("tree", "new"): text for name, text in T.items()},
        "",
    ),
    "tree into a folder": ("tree", "d", RECURSE, T, {"d/": ""}, {"d/": ""} | UNDER, ""),
    "tree over itself": (
        "tree",
        "d",
        RECURSE,
        T,
        {"d/": ""} | UNDER | {"d/tree/a": "old", "d/tree/more": "M"},
        {"d/": ""} | UNDER | {"d/tree/more": "M"},
        "",
    ),
    "source ending in a slash": ("tree/", "d", RECURSE, T, {"d/": ""}, {"d/": ""} | UNDER, ""),
    "source is a link": (
        "l",
        "d",
        {},
        {"l": "-> f", "f": "F"},
        {"d/": ""},
        {"d/": "", "d/l": "F"},
        "",
    ),
    "source is a link to a folder": (
        "l",
        "d",
        RECURSE,
        T | {"l": "-> tree"},
        {"d/": ""},
        {"d/": ""} | {name.replace("d/tree", "d/l"): text for name, text in UNDER.items()},
        "",
    ),
    "dangling link in a tree": (
        "tree",
        "d",
        RECURSE,
        {"tree/l": "-> nowhere"},
        {"d/": ""},
        {"d/": "", "d/tree/": "", "d/tree/l": "-> nowhere"},
        "",
    ),
    "links followed": (
        "tree",
        "d",
        {"recurse": True, "follow_symlinks": True},
        T,
        {"d/": ""},
        {"d/": ""} | UNDER | {"d/tree/link": "B"},
        "",
    ),
    "loop of links": (
        "tree",
        "d",
        RECURSE,
        {"tree/l": "-> m", "tree/m": "-> l"},
        {"d/": ""},
        {"d/": "", "d/tree/": "", "d/tree/l": "-> m", "d/tree/m": "-> l"},
        "",
    ),
    "empty file": ("f", "g", {}, {"f": ""}, {}, {"g": ""}, ""),
    "destination is a link": (
        "f",
        "l",
        {},
        {"f": "F"},
        {"l": "-> g", "g": "old"},
        {"l": "-> g", "g": "F"},
        "",
    ),
    "destination is a dangling link": (
        "f",
        "l",
        {},
        {"f": "F"},
        {"l": "-> g"},
        {"l": "-> g", "g": "F"},
        "",
    ),
    "destination is a link to a folder": (
        "f",
        "l",
        {},
        {"f": "F"},
        {"d/": "", "l": "-> d"},
        {"d/": "", "d/f": "F", "l": "-> d"},
        "",
    ),
    "inplace": ("f", "g", {"inplace": True}, {"f": "F"}, {"g": "older"}, {"g": "F"}, ""),
    "inplace onto a new name": ("f", "g", {"inplace": True}, {"f": "F"}, {}, {"g": "F"}, ""),
    "two of one name": (
        ["a/f", "b/f", "g"],
        "d",
        {},
        {"a/f": "1", "b/f": "2", "g": "G"},
        {"d/": ""},
        {"d/": "", "d/f": "1", "d/g": "G"},
        "b/f: the name f comes twice",
    ),
    "odd names": (
        list(ODD),
        "d",
        {},
        ODD,
        {"d/": ""},
        {"d/": ""} | {f"d/{name}": text for name, text in ODD.items()},
        "",
    ),
    "odd names in a tree": (
        "t",
        "d",
        RECURSE,
        {f"t/{name}": text for name, text in ODD.items()},
        {"d/": ""},
        {"d/": "", "d/t/": ""} | {f"d/t/{name}": text for name, text in ODD.items()},
        "",
    ),
    "odd names of folders": (
        "t",
        "d",
        RECURSE,
        {"t/a\nb\udcff c/-x/": ""},
        {"d/": ""},
        {"d/": "", "d/t/": "", "d/t/a\nb\udcff c/": "", "d/t/a\nb\udcff c/-x/": ""},
        "",
    ),
    "a missing one among others": (
        ["f", "no\x1b[2J", "g"],
        "d",
        {},
        {"f": "F", "g": "G"},
        {"d/": ""},
        {"d/": "", "d/f": "F", "d/g": "G"},
        r"no\x1b[2J: no such file or directory",
    ),
    "folder over a file": (
        "tree",
        "d",
        RECURSE,
        {"tree/a": "A"},
        {"d/tree": "file"},
        {"d/": "", "d/tree": "file"},
        "tree: a file has that name",
    ),
    "file over a folder": (
        "f",
        "d",
        {},
        {"f": "F"},
        {"d/f/": ""},
        {"d/": "", "d/f/": ""},
        "f: a folder has that name",
    ),
    "link over a folder": (
        "t",
        ".",
        RECURSE,
        {"t/l": "-> x", "t/f": "F"},
        {"t/l/": ""},
        {"t/": "", "t/f": "F", "t/l/": ""},
        "t/l: a folder has that name",
    ),
}
SEEN_AS = {  # where a way has words of its own
    ("pull", "a missing one among others"): r"no\x1b[2J: no such file",
}
IN_THE_WAY = re.compile("has that name|d/: not|h: not|no such folder")  # the destination's fault


@pytest.mark.parametrize("way", ["push", "pull", "local push", "local pull"])
async def test_copies(sshd: Sshd, home: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    local, pushing = way.startswith("local"), way.endswith("push")
    host = "LOCALNODE" if local else "127.0.0.1"
    wrong: dict[str, Any] = {}

    async def one(node: Any, name: str, number: int) -> None:
        sources, destination, options, there, before, after, message = COPIES[name]
        near, far = (
            home / "near" / str(number),
            (home / "far" if local else sshd.home) / str(number),
        )
        begin, end = (near, far) if pushing else (far, near)
        build(begin, there)
        build(end, before)
        for folder in (near, far):
            folder.mkdir(parents=True, exist_ok=True)
        monkeypatch.chdir(near)
        prefix = f"{far}/" if local else f"{number}/"
        given = [sources] if isinstance(sources, str) else list(sources)
        if pushing:
            destination = prefix + destination
        else:
            given = [prefix + (r"\*" if source == "*" else source) for source in given]
        step = Push if pushing else Pull
        text = await outcome(
            node, step(given[0] if isinstance(sources, str) else given, destination, **options)
        )
        seen = (text.replace(prefix, ""), listing(end), listing(begin))
        message = SEEN_AS.get((way, name), message)
        here = pushing != bool(IN_THE_WAY.search(message))
        side = "local" if local or here else "remote"
        wanted = (f"{host}: {side}: {message}" if message else "", after, listing(begin))
        if seen != wanted:
            wrong[name] = [each for each in zip(seen, wanted, strict=True) if each[0] != each[1]]

    async with LocalNode() if local else sshd.node() as node:
        for number, name in enumerate(COPIES):
            await one(node, name, number)
    assert wrong == {}


@pytest.mark.parametrize("pushing", [True, False])
def test_copies_keep_modes(sshd: Sshd, home: Path, pushing: bool) -> None:
    begin, end = (home, sshd.home) if pushing else (sshd.home, home)
    modes = {
        "t/x": 0o755,
        "t/r": 0o400,
        "t/w": 0o666,
        "t/s": 0o4755,
        "t/none": 0o000 if os.getuid() == 0 else 0o400,
        "t/d/": 0o750,
        "t/d/ro/": 0o555,
        "t/": 0o711,
    }
    build(begin, dict.fromkeys(modes, "text") | {"t/d/ro/f": ""})
    for name, mode in modes.items():
        (begin / name).chmod(mode)
    for path in (begin / "t").rglob("*"):
        os.utime(path, (1_000_000_000, 1_100_000_000))
    step = Push if pushing else Pull
    assert (
        copied(
            sshd, step("t", "kept", recurse=True, preserve=True), step("t", "plain", recurse=True)
        )
        == ""
    )
    for name, mode in modes.items():
        path = name.rstrip("/")[1:]
        assert stat.S_IMODE((end / f"plain{path}").stat().st_mode) == mode & 0o777, name
        assert stat.S_IMODE((end / f"kept{path}").stat().st_mode) & 0o777 == mode & 0o777, name
    assert not stat.S_IMODE((end / "plain/s").stat().st_mode) & 0o7000
    times = {int(path.stat().st_mtime) for path in (end / "kept").rglob("*")}
    assert times == {1_100_000_000}
    assert int((end / "kept/x").stat().st_atime) == 1_000_000_000
    assert min(path.stat().st_mtime for path in (end / "plain").rglob("*")) > time.time() - 100


@pytest.mark.parametrize("pushing", [True, False])
def test_replacing_is_atomic(sshd: Sshd, home: Path, pushing: bool) -> None:
    """Whoever reads the destination meanwhile sees the old content or the new, and never a part."""
    begin, end = (home / "f", sshd.home / "g") if pushing else (sshd.home / "f", home / "g")
    old, new = b"o" * 1_000_000, b"n" * 30_000_000
    end.write_bytes(old)
    begin.write_bytes(new)
    inode = end.stat().st_ino
    seen, ended = set(), threading.Event()

    def watch() -> None:
        while not ended.is_set():
            with open(end, "rb") as file:
                seen.add((os.fstat(file.fileno()).st_size, file.read(1)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert copied(sshd, Push("f", "g") if pushing else Pull("f", "g")) == ""
    finally:
        ended.set()
        watcher.join()
    assert seen <= {(len(old), b"o"), (len(new), b"n")}
    assert end.read_bytes() == new
    assert end.stat().st_ino != inode
    inode = end.stat().st_ino
    begin.write_bytes(b"short")
    assert copied(sshd, (Push if pushing else Pull)("f", "g", inplace=True)) == ""
    assert (end.read_bytes(), end.stat().st_ino) == (b"short", inode)


as_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root")


@as_root
@pytest.mark.parametrize("pushing", [True, False])
@pytest.mark.parametrize("name", ["f", "link"])
def test_owner_is_kept(sshd: Sshd, home: Path, pushing: bool, name: str) -> None:
    begin, end = (home, sshd.home) if pushing else (sshd.home, home)
    (begin / "source").write_text("new")
    build(end, {"f": "old", "link": "-> f"})
    os.chown(end / "f", 1234, 4321)
    assert copied(sshd, (Push if pushing else Pull)("source", name)) == ""
    assert ((end / "f").read_text(), (end / "f").stat().st_uid, (end / "f").stat().st_gid) == (
        "new",
        1234,
        4321,
    )
    assert (end / "link").is_symlink()


@contextlib.contextmanager
def unwritable(path: Path) -> Iterator[None]:
    """A folder or file that nobody can replace: for root that takes the immutable flag."""
    if os.getuid() == 0:
        if (
            not shutil.which("chattr")
            or subprocess.run(
                ["chattr", "+i", str(path)], capture_output=True, check=False
            ).returncode
        ):
            pytest.skip("no immutable files here (chattr +i)")
        try:
            yield
        finally:
            subprocess.run(["chattr", "-i", str(path)], check=True)
    else:
        path.chmod(0o500)
        yield
        path.chmod(0o700)


@pytest.mark.parametrize("way", ["push", "pull", "local"])
def test_unwritable_folder_names_inplace(sshd: Sshd, home: Path, way: str) -> None:
    begin, end = (sshd.home, home) if way == "pull" else (home, sshd.home)
    (begin / "f").write_text("new")
    build(end, {"d/f": "old"})
    there = f"{end}/d" if way == "local" else "d"
    step = Pull if way == "pull" else Push

    def copy(*commands: Any) -> str:
        return (
            copied(sshd, *commands)
            if way != "local"
            else " | ".join(filter(None, (run(outcome(LocalNode(), each)) for each in commands)))
        )

    host = "LOCALNODE" if way == "local" else "127.0.0.1"
    side = "remote" if way == "push" else "local"
    why = {True: "operation not permitted", False: "permission denied"}[
        os.getuid() == 0 and way != "push"
    ]
    with unwritable(end / "d"):
        assert (
            copy(step("f", there)) == f"{host}: {side}: f: {there}: {why} for a temporary file "
            "(inplace, or --inplace, writes onto the file itself)"
        )
        assert copy(step("f", there, inplace=True)) == ""
    assert listing(end / "d") == {"f": "new"}


@as_root
@pytest.mark.parametrize("way", ["push", "pull", "local"])
def test_busy_file_names_inplace(sshd: Sshd, home: Path, way: str) -> None:
    """A file that is mounted by itself, as containers have them, cannot be replaced."""
    begin, end = (sshd.home, home) if way == "pull" else (home, sshd.home)
    (begin / "f").write_text("new")
    build(end, {"d/f": "old", "other": "mounted"})
    if subprocess.run(
        ["mount", "--bind", str(end / "other"), str(end / "d/f")], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounts are not permitted here")
    there = f"{end}/d/f" if way == "local" else "d/f"
    step = Pull if way == "pull" else Push

    def copy(command: Any) -> str:
        return copied(sshd, command) if way != "local" else run(outcome(LocalNode(), command))

    try:
        host = "LOCALNODE" if way == "local" else "127.0.0.1"
        side = "remote" if way == "push" else "local"
        why = "failure" if way == "push" else "device or resource busy"
        assert (
            copy(step("f", there)) == f"{host}: {side}: f: {there} cannot be replaced: {why} "
            "(inplace, or --inplace, writes onto the file itself)"
        )
        assert copy(step("f", there, inplace=True)) == ""
    finally:
        subprocess.run(["umount", "-l", str(end / "d/f")], check=True)
    assert listing(end / "d") == {"f": "old"}
    assert (end / "other").read_text() == "new"


@pytest.mark.parametrize("way", ["push", "pull", "local"])
@pytest.mark.parametrize("inplace", [False, True])
def test_what_is_no_file_is_not_replaced(sshd: Sshd, home: Path, way: str, inplace: bool) -> None:
    """A FIFO (or /dev/null: think of root) under the name of the destination."""
    begin, end = (sshd.home, home) if way == "pull" else (home, sshd.home)
    (begin / "f").write_text("new")
    os.mkfifo(end / "fifo")
    step = (Pull if way == "pull" else Push)(
        "f", f"{end}/fifo" if way == "local" else "fifo", inplace=inplace
    )
    text = run(outcome(LocalNode(), step)) if way == "local" else copied(sshd, step)
    host = "LOCALNODE" if way == "local" else "127.0.0.1"
    side = "remote" if way == "push" else "local"
    assert text == f"{host}: {side}: f: a special file has that name"
    assert listing(end)["fifo"].startswith("mode 1")


@pytest.mark.parametrize(
    ("sources", "arrived", "message"),
    [
        ("logs/*.log", {"a.log", "b.log"}, ""),
        ("logs/[ab].log", {"a.log", "b.log"}, ""),
        ("lo*/a.*", {"a.log", "a.txt"}, ""),
        ("~/logs/a.log", {"a.log"}, ""),
        ("~/logs/*.log", {"a.log", "b.log"}, ""),
        ("logs/*", {"a.log", "b.log", "a.txt", "[x]"}, ""),
        ("logs/.*", {".hidden"}, ""),
        ("logs/[x]", {"[x]"}, ""),
        ("logs/*.none", set(), "127.0.0.1: remote: logs/*.none: no such file"),
        ("{home}/logs/?.txt", {"a.txt"}, ""),
        (["logs/*.log", "logs/a.txt"], {"a.log", "b.log", "a.txt"}, ""),
        ("*/*/deep", set(), "127.0.0.1: remote: */*/deep: no such file"),
        ("./logs/a*g", {"a.log"}, ""),
    ],
)
def test_globs(sshd: Sshd, home: Path, sources: Any, arrived: set[str], message: str) -> None:
    build(
        sshd.home,
        dict.fromkeys(
            (f"logs/{name}" for name in ("a.log", "b.log", "a.txt", ".hidden", "[x]")), "text"
        ),
    )
    (home / "d").mkdir()
    given = sources.replace("{home}", str(sshd.home)) if isinstance(sources, str) else sources
    assert copied(sshd, Pull(given, "d")) == message
    assert set(os.listdir(home / "d")) == arrived


@pytest.mark.parametrize("source", [".", "./", "t/.", "t/u/.."])
@pytest.mark.parametrize("pushing", [True, False])
def test_folder_named_by_a_dot_is_what_it_holds(
    sshd: Sshd, home: Path, source: str, pushing: bool
) -> None:
    """As for cp and scp."""
    begin, end = (home, sshd.home) if pushing else (sshd.home, home)
    tree = {"f": "F", "u/": "", "u/g": "G"}
    inside = begin / "t" if source.startswith(".") else begin
    build(begin, {f"t/{name}": text for name, text in tree.items() if text})
    (end / "there").mkdir()
    if source.startswith("."):
        if pushing:
            os.chdir(inside)
        else:
            source = f"t/{source}"
    kind = Push if pushing else Pull
    assert copied(sshd, kind(source, str(end / "there"), recurse=True)) == ""
    assert listing(end / "there") == tree
    assert copied(sshd, kind(source, str(end / "new"), recurse=True)) == ""
    assert listing(end / "new") == tree


def test_links_of_a_folder_named_by_a_dot_stay_inside(sshd: Sshd, home: Path) -> None:
    """No folder of its name lies between them and the destination."""
    build(sshd.home, {"t/out": "-> ../secret", "t/u/in": "-> ../f", "t/u/out": "-> ../../x"})
    for place in ("there", "new"):
        if place == "there":
            (home / place).mkdir()
        text = copied(sshd, Pull("t/.", place, recurse=True))
        assert text.count("refused a link that leads out") == 2
        assert sorted(os.listdir(home / place)) == ["u"]
        assert os.listdir(home / place / "u") == ["in"]
    build(sshd.home, {"a/f": "1", "b/f": "2"})
    (home / "both").mkdir()
    text = copied(sshd, Pull(["a/.", "b/."], "both", recurse=True))
    assert text == "127.0.0.1: remote: b/.: the name . comes twice"


def test_home_is_pulled_by_its_name(sshd: Sshd, home: Path) -> None:
    """Its files do not fall among those of the destination, which may be a home too."""
    build(sshd.home, {"f": "F"})
    (home / "d").mkdir()
    assert copied(sshd, Pull("~", "d", recurse=True)) == ""
    assert apssh.main_pull(["-F", "none", "-t", sshd.target, "-r", "@:", "d"]) == 0
    assert listing(home / "d") == {f"{sshd.home.name}/": "", f"{sshd.home.name}/f": "F"}


def test_nothing_is_the_remote_home(sshd: Sshd, home: Path, capfd: Any) -> None:
    for number, remote in enumerate(["", "~", ".", "~/", "./"]):
        (home / f"f{number}").write_text("F")
        assert (
            apssh.main_push(["-t", sshd.target, f"f{number}", f"@:{remote}"]),
            capfd.readouterr(),
        ) == (0, ("", ""))
    build(sshd.home, {"there/g": "G"})
    for number, remote in enumerate(["", "~", ".", "~/", "./"]):
        assert (
            apssh.main_pull(["-t", sshd.target, "-r", f"@:{remote}", f"all{number}"]),
            capfd.readouterr(),
        ) == (0, ("", ""))
        assert listing(home / f"all{number}") == {f"f{each}": "F" for each in range(5)} | {
            "there/": "",
            "there/g": "G",
        }


def test_proc_files_arrive_whole(sshd: Sshd, home: Path) -> None:
    (home / "d").mkdir()
    assert (
        copied(sshd, Pull(["/proc/version", "/proc/cpuinfo", "/proc/sys/kernel/ostype"], "d")) == ""
    )
    assert (home / "d/version").read_bytes() == Path("/proc/version").read_bytes()
    assert b"processor" in (home / "d/cpuinfo").read_bytes()
    assert (home / "d/ostype").read_text() == "Linux\n"


def test_pushed_proc_file_arrives_whole(sshd: Sshd) -> None:
    assert copied(sshd, Push("/proc/version", "v")) == ""
    assert (sshd.home / "v").read_bytes() == Path("/proc/version").read_bytes()


@pytest.mark.parametrize("way", ["push", "pull", "local"])
def test_what_is_no_file_is_refused_by_name(sshd: Sshd, home: Path, way: str) -> None:
    """A FIFO, a socket, a device in a tree: named, not opened; the other files go on."""
    begin, end = (sshd.home, home) if way == "pull" else (home, sshd.home)
    build(begin, {"t/a": "A", "t/z/b": "B"})
    os.mkfifo(begin / "t/fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        os.chdir(begin / "t")
        sock.bind("sock")
        os.chdir(home)
    special = 2
    if os.getuid() == 0:
        with contextlib.suppress(OSError):
            os.mknod(
                begin / "t/zero", stat.S_IFCHR | 0o666, os.makedev(1, 5)
            )  # /dev/zero: endless to who reads it
            special = 3
    step = (Pull if way == "pull" else Push)(
        "t", str(end / "new") if way == "local" else "new", recurse=True, timeout=20
    )
    alone = (Pull if way == "pull" else Push)(
        "t/fifo", str(end / "one") if way == "local" else "one", timeout=20
    )
    text, one = (
        run(outcome(LocalNode(), each)) if way == "local" else copied(sshd, each)
        for each in (step, alone)
    )
    host = "LOCALNODE" if way == "local" else "127.0.0.1"
    side = "remote" if way == "pull" else "local"
    why = "not a regular file, folder or link"
    names = ["fifo", "sock", "zero"][:special]
    assert text.startswith(f"{host}: {side}: ")
    said = sorted(text.removeprefix(f"{host}: {side}: ").split("; "))
    assert said == [f"t/{name}: {why}" for name in names]
    assert one == f"{host}: {side}: t/fifo: {why}"
    assert listing(end / "new") == {"a": "A", "z/": "", "z/b": "B"}


@pytest.mark.parametrize("way", ["push", "pull", "local"])
def test_links_that_lead_to_their_own_folder(sshd: Sshd, home: Path, way: str) -> None:
    """Followed, they would be endless: they are named instead, as cp does."""
    begin, end = (sshd.home, home) if way == "pull" else (home, sshd.home)
    build(
        begin, {"t/a": "A", "t/d/b": "B", "t/d/up": "-> ..", "t/here": "-> .", "t/twin": "-> d/b"}
    )
    step = (Pull if way == "pull" else Push)(
        "t", f"{end}/new" if way == "local" else "new", recurse=True, follow_symlinks=True
    )
    text = run(outcome(LocalNode(), step)) if way == "local" else copied(sshd, step)
    host = "LOCALNODE" if way == "local" else "127.0.0.1"
    side, why = "remote" if way == "pull" else "local", "a link to a folder it is in"
    assert text.startswith(f"{host}: {side}: ")
    said = sorted(text.removeprefix(f"{host}: {side}: ").split("; "))
    assert said == [f"t/d/up: {why}", f"t/here: {why}"]
    assert listing(end / "new") == {"a": "A", "d/": "", "d/b": "B", "twin": "B"}


def test_push_follows_no_remote_link_to_a_folder(sshd: Sshd, home: Path) -> None:
    """As cp: below what was named, a folder is not written through a link that is in its place."""
    build(home, {"t/d/f": "new", "t/a": "A"})
    build(sshd.home, {"out/f": "precious", "t/d": "-> ../out"})
    assert (
        copied(sshd, Push("t", ".", recurse=True)) == "127.0.0.1: remote: t/d: a link has that name"
    )
    assert listing(sshd.home) == {
        "out/": "",
        "out/f": "precious",
        "t/": "",
        "t/a": "A",
        "t/d": "-> ../out",
    }


@pytest.mark.parametrize("inplace", [False, True])
def test_push_writes_through_no_remote_link_of_a_tree(
    sshd: Sshd, home: Path, inplace: bool
) -> None:
    """What was named may be a link over there; what is found in a tree may not: somebody else may
    have put it there.
    """
    build(home, {"t/f": "new", "g": "G"})
    build(
        sshd.home, {"secret": "kept", "t/f": "-> ../secret", "named": "-> target", "target": "old"}
    )
    said = copied(
        sshd, Push("t", ".", recurse=True, inplace=inplace), Push("g", "named", inplace=inplace)
    )
    assert said == ("127.0.0.1: remote: t/f: a link has that name" if inplace else "")
    assert listing(sshd.home) == {
        "secret": "kept",
        "t/": "",
        "t/f": "-> ../secret" if inplace else "new",
        "named": "-> target",
        "target": "G",
    }


@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize("way", ["push", "pull", "local"])
def test_mode_of_a_folder_that_was_there(sshd: Sshd, home: Path, way: str, preserve: bool) -> None:
    """As cp -r: it is kept, unless preserve is asked for; a new one gets its source's."""
    source, destination = (
        (sshd.home, home)
        if way == "pull"
        else (home, sshd.home)
        if way == "push"
        else (home, home / "d")
    )
    build(source, {"t/old/f": "F", "t/new/f": "F"})
    build(destination, {"t/old/": ""})
    for path, mode in (
        (source / "t", 0o777),
        (source / "t/old", 0o777),
        (source / "t/new", 0o751),
        (destination / "t", 0o700),
        (destination / "t/old", 0o700),
    ):
        path.chmod(mode)
    options = {"recurse": True, "preserve": preserve}
    said = (
        run(outcome(LocalNode(), Push("t", "d", **options)))
        if way == "local"
        else copied(sshd, Push("t", ".", **options) if way == "push" else Pull("t", ".", **options))
    )
    modes = [stat.S_IMODE((destination / name).stat().st_mode) for name in ("t", "t/old", "t/new")]
    assert (said, modes) == ("", [0o777, 0o777, 0o751] if preserve else [0o700, 0o700, 0o751])


@pytest.mark.parametrize("way", ["push", "pull", "local"])
def test_long_names_that_are_not_ascii(sshd: Sshd, home: Path, way: str) -> None:
    """A temporary name is no longer than what a file system takes."""
    name = "\u20ac" * 80
    build(sshd.home if way == "pull" else home, {name: "content"})
    build(home, {"d/": ""})
    step = Pull(name, "d") if way == "pull" else Push(name, "d" if way == "local" else name)
    assert (run(outcome(LocalNode(), step)) if way == "local" else copied(sshd, step)) == ""
    assert ((sshd.home if way == "push" else home / "d") / name).read_text() == "content"


@pytest.mark.parametrize("inplace", [False, True])
def test_missing_remote_folder_is_what_is_missing(sshd: Sshd, home: Path, inplace: bool) -> None:
    build(home, {"f": "F"})
    assert (
        copied(sshd, Push("f", "no/such/g", inplace=inplace))
        == "127.0.0.1: remote: f: no/such: no such folder"
    )


def test_unreadable_file_is_named(sshd: Sshd, home: Path) -> None:
    build(home, {"t/a": "A", "t/b": "B"})
    build(sshd.home, {"p/a": "A", "p/b": "B"})
    if os.getuid() == 0:
        pytest.skip("root reads everything")
    (home / "t/a").chmod(0)
    (sshd.home / "p/a").chmod(0)
    assert (
        copied(sshd, Push("t", "new", recurse=True)) == "127.0.0.1: local: t/a: permission denied"
    )
    assert (
        copied(sshd, Pull("p", "new", recurse=True)) == "127.0.0.1: remote: p/a: permission denied"
    )
    assert listing(home / "new") == listing(sshd.home / "new") == {"b": "B"}


async def test_what_is_under_way_keeps_a_cancellation() -> None:
    """One from outside is not taken for that of a failure; and a failure leaves no count behind."""

    async def failing(begun: asyncio.Event) -> None:
        await begun.wait()
        raise OSError("lost")

    async def slow() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.1)

    async def work(begun: asyncio.Event) -> None:
        async with apssh._UnderWay(4) as under_way:
            await under_way.start(slow)
            await under_way.start(failing, begun)

    begun, task = asyncio.Event(), asyncio.current_task()
    begun.set()
    with pytest.raises(OSError, match="lost"):
        await work(begun)
    assert task and task.cancelling() == 0
    later = asyncio.create_task(work(begun := asyncio.Event()))
    await asyncio.sleep(0)
    begun.set()
    await asyncio.sleep(0.05)  # it has failed, and waits for the slow one
    later.cancel()
    await asyncio.wait([later])
    assert later.cancelled()


@pytest.mark.parametrize("pushing", [True, False])
def test_cancelled_copy_leaves_nothing(sshd: Sshd, home: Path, pushing: bool) -> None:
    begin, end = (home, sshd.home) if pushing else (sshd.home, home)
    build(end, {"d/0": "old"})
    for number in range(5):
        with open(begin / str(number), "wb") as file:
            file.truncate(1 << 40)  # holes: it would take hours

    async def main() -> None:
        async with sshd.node() as node:
            step = (Push if pushing else Pull)([str(number) for number in range(5)], "d")
            task = asyncio.create_task(outcome(node, step))
            await eventually_async(lambda: len(os.listdir(end / "d")) == 6)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await node.run("true") == 0
            step = (Push if pushing else Pull)("1", "d/1", timeout=0.3)
            assert (
                await outcome(node, step)
                == f"127.0.0.1: timeout: no end within 0.3 s: {step.listing_line()}"
            )

    run(main())
    assert listing(end / "d") == {"0": "old"}


def test_lost_connection_during_a_push_of_many_files_is_one_error(
    make_sshd: Callable[..., Sshd], home: Path, capfd: Any, caplog: Any
) -> None:
    """The files that were under way with the one that told it leave no exception to nobody."""
    server = make_sshd()
    build(home, {f"t/f{number}": "x" * 50_000 for number in range(300)})

    async def main() -> str:
        node = server.node()
        task = asyncio.create_task(outcome(node, Push("t", ".", recurse=True)))
        await eventually_async(lambda: len(list(server.home.glob("t/*"))) > 5)
        for process in descendants(server._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        text = await task
        await node.close()
        return text

    assert run(main()).startswith("127.0.0.1: lost: connection lost during ")
    gc.collect()
    assert "never retrieved" not in caplog.text + capfd.readouterr().err


def test_lost_connection_during_a_pull_leaves_nothing(sshd: Sshd, home: Path) -> None:
    with open(sshd.home / "f", "wb") as file:
        file.truncate(1 << 40)
    (home / "d").mkdir()

    async def main() -> None:
        node = sshd.node()
        task = asyncio.create_task(outcome(node, Pull("f", "d")))
        await eventually_async(lambda: os.listdir(home / "d"))
        (await node.connect_lazy()).abort()
        assert await task == "127.0.0.1: lost: connection lost during the copy of f"
        await node.close()

    run(main())
    assert os.listdir(home / "d") == []


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of this size, mounted here."""
    if (
        os.getuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "none", str(folder)],
            capture_output=True,
            check=False,
        ).returncode
    ):
        pytest.skip("mounts are not permitted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("way", ["push", "pull", "local"])
def test_disk_full(sshd: Sshd, home: Path, way: str) -> None:
    """Whatever the size: a last block that fits in part only must not pass for a whole file."""
    begin, end = (sshd.home, home) if way == "pull" else (home, sshd.home)
    (end / "d").mkdir()
    sizes = {"62k": 62_000, "100k": 100_000, "2M": 2_000_000}
    for name, size in sizes.items():
        (begin / name).write_bytes(os.urandom(size))
    build(begin, {"tiny": "T"})
    step = Pull if way == "pull" else Push
    there = str(end / "d") if way == "local" else "d"
    with small_disk(end / "d", "60k"):
        for name in sizes:
            commands = step(["tiny"], there), step([name], there)
            text = "".join(
                run(outcome(LocalNode(), each)) if way == "local" else copied(sshd, each)
                for each in commands
            )
            host = "LOCALNODE" if way == "local" else "127.0.0.1"
            side, device = ("remote", "the device") if way == "push" else ("local", "device")
            assert text == f"{host}: {side}: {name}: no space left on {device}"
            assert listing(end / "d") == {"tiny": "T"}


@pytest.mark.slow
@pytest.mark.parametrize("pushing", [True, False])
def test_large_file(sshd: Sshd, home: Path, pushing: bool) -> None:
    begin, end = (home, sshd.home) if pushing else (sshd.home, home)
    block = os.urandom(1_000_003)
    with open(begin / "f", "wb") as file:
        for _ in range(300):
            file.write(block)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert copied(sshd, (Push if pushing else Pull)("f", "g")) == ""
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    assert subprocess.run(["cmp", str(begin / "f"), str(end / "g")], check=False).returncode == 0


@pytest.mark.parametrize("pushing", [True, False])
def test_copies_wait_for_files_that_can_be_open(
    make_sshd: Callable[..., Sshd], home: Path, pushing: bool
) -> None:
    """Where few can be: hosts have their turns, and none fails."""
    servers = [make_sshd() for _ in range(3)]
    for place in [home] if pushing else [server.home for server in servers]:
        build(place, {f"t/{number}": "text" for number in range(150)})
    argv = ["-F", "none", "-t", ",".join(server.target for server in servers), "-r"]
    argv += ["t", "@:x"] if pushing else ["@:t", "{host}"]
    main = "main_push" if pushing else "main_pull"
    done = run_python(
        "-c",
        "import resource, sys, apssh\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (170, 170))\n"
        f"sys.exit(apssh.{main}({argv}))",
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr.partition("\n")[0]) == (0, "3 ok")


def test_soft_limit_on_files_is_raised_for_jobs(sshd: Sshd) -> None:
    done = run_python(
        "-c",
        f"""
import resource, apssh
from asynciojobs import Scheduler
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (30, hard))
nodes = [apssh.SshNode("127.0.0.1", port={sshd.port}, username={ME!r}) for _ in range(30)]
jobs = [apssh.SshJob(node, command="true") for node in nodes]
print(Scheduler(*jobs).run())
""",
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_many_folders_with_links_need_few_files(sshd: Sshd, home: Path) -> None:
    build(sshd.home, {f"t/{number}/l": "-> ../x" for number in range(150)})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(120, hard), hard))
        text = copied(sshd, Pull("t", "new", recurse=True))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert text == ""
    assert sum((home / f"new/{number}/l").is_symlink() for number in range(150)) == 150


@pytest.mark.parametrize("way", ["push", "pull", "local"])
@pytest.mark.parametrize(
    ("options", "mode"),
    [({}, 0o600), ({"inplace": True}, 0o600), ({"preserve": True}, 0o644)],
    ids=["replaced", "inplace", "preserve"],
)
def test_mode_of_a_file_that_was_there(
    sshd: Sshd, home: Path, way: str, options: dict[str, bool], mode: int
) -> None:
    """As with scp it is kept: who closed a file wants it closed; a new one gets its source's."""
    begin, end = (sshd.home, home) if way == "pull" else (home, sshd.home)
    build(begin, {"f": "new", "t/g": "new", "t/new": "new"})
    build(end, {"d/f": "old", "d/t/g": "old"})
    for path in (begin / "f", begin / "t/g"):
        path.chmod(0o644)
    for path in (end / "d/f", end / "d/t/g"):
        path.chmod(0o600)
    (begin / "t/new").chmod(0o640)
    step = Pull if way == "pull" else Push
    there = str(end / "d") if way == "local" else "d"
    steps = step("f", there, **options), step("t", there, recurse=True, **options)
    for each in steps:
        text = run(outcome(LocalNode(), each)) if way == "local" else copied(sshd, each)
        assert text == ""
    for name, wanted in {"f": mode, "t/g": mode, "t/new": 0o640}.items():
        assert (end / "d" / name).read_text() == "new"
        assert stat.S_IMODE((end / "d" / name).stat().st_mode) == wanted, name


@as_root
def test_setuid_of_a_file_that_was_there(sshd: Sshd, home: Path) -> None:
    """A change of owner clears it: it is given again. From a server it is never taken."""
    build(home, {"f": "new"})
    build(sshd.home, {"f": "old", "g": "new"})
    os.chown(sshd.home / "f", 1234, 4321)
    (sshd.home / "f").chmod(0o4755)
    (sshd.home / "g").chmod(0o4755)
    assert copied(sshd, Push("f", "f"), Pull("g", "g", preserve=True)) == ""
    info = (sshd.home / "f").stat()
    assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (1234, 4321, 0o4755)
    assert stat.S_IMODE((home / "g").stat().st_mode) == 0o755


def test_mode_that_may_not_be_changed(
    keys: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another's file that could be written is no failure, on either side; a new file is one."""

    def denied(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    class Others(asyncssh.SFTPServer):
        def __init__(self, chan: Any) -> None:
            super().__init__(chan, chroot=os.fsencode(tmp_path / "far"))

        def fsetstat(self, file_obj: Any, attrs: asyncssh.SFTPAttrs) -> None:
            denied()

    build(tmp_path / "far", {"f": "old", "g": "pulled"})
    build(home, {"f": "new", "h": "old"})

    async def main() -> list[str]:
        async with (
            ssh_server(keys, sftp=Others) as port,
            SshNode("127.0.0.1", port=port, username=ME) as node,
        ):
            monkeypatch.setattr(os, "fchmod", denied)
            return [
                await outcome(node, Push("f", "f", inplace=True, preserve=True)),
                await outcome(node, Push("f", "f")),
                await outcome(node, Push("f", "new")),
                await outcome(node, Pull("g", "h", inplace=True, preserve=True)),
                await outcome(node, Pull("g", "h")),
                await outcome(node, Pull("g", "new")),
            ]

    assert run(main()) == [
        "",
        "",
        "127.0.0.1: remote: f: operation not permitted",
        "",
        "",
        "127.0.0.1: local: g: operation not permitted",
    ]
    assert listing(tmp_path / "far") == {"f": "new", "g": "pulled"}
    assert listing(home) == {"f": "new", "h": "pulled"} | {
        name: text for name, text in listing(home).items() if name.startswith(".ssh")
    }


def test_mode_of_a_folder_that_cannot_be_set_is_told(
    keys: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chmod = os.fchmod

    def denied(path: Any, *_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    def no_folder(fd: int, mode: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            denied(fd)
        chmod(fd, mode)

    class Others(asyncssh.SFTPServer):
        def __init__(self, chan: Any) -> None:
            super().__init__(chan, chroot=os.fsencode(tmp_path / "far"))

        def setstat(self, path: bytes, attrs: asyncssh.SFTPAttrs) -> None:
            denied(path)

    build(tmp_path / "far", {"t/f": "F"})
    build(home, {"t/f": "F"})

    async def main() -> str:
        async with (
            ssh_server(keys, sftp=Others) as port,
            SshNode("127.0.0.1", port=port, username=ME) as node,
        ):
            monkeypatch.setattr(os, "fchmod", no_folder)
            steps = Push("t", "new", recurse=True), Pull("t", "new", recurse=True)
            return " | ".join([await outcome(node, step) for step in steps])

    assert run(main()) == (
        "127.0.0.1: remote: new: mode and times not set: operation not permitted | "
        "127.0.0.1: local: new: mode and times not set: operation not permitted"
    )
    assert listing(tmp_path / "far/new") == listing(home / "new") == {"f": "F"}


@pytest.mark.parametrize("way", ["push", "pull", "local"])
def test_all_failures_of_a_tree_are_named(
    sshd: Sshd, home: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """The first few in the line, each of them in the error; memory for them is bounded."""
    begin, end = (sshd.home, home) if way == "pull" else (home, sshd.home)
    build(begin, {"t/a": "A"})
    for number in range(9):
        os.mkfifo(begin / f"t/{number}")
    there = str(end / "new") if way == "local" else "new"
    step = (Pull if way == "pull" else Push)("t", there, recurse=True)

    async def main() -> TransferError:
        node = LocalNode() if way == "local" else sshd.node()
        async with node:
            with pytest.raises(TransferError) as caught:
                await (step.co_run_local if way == "local" else step.co_run_remote)(node)
        return caught.value

    failure = run(main())
    why = "not a regular file, folder or link"
    assert sorted(failure.failures) == [f"t/{number}: {why}" for number in range(9)]
    assert failure.message == "; ".join(failure.failures[:5]) + " (and 4 more)"
    assert failure.kind == ("remote" if way == "pull" else "local")
    assert listing(end / "new") == {"a": "A"}
    monkeypatch.setattr(apssh, "FAILURES_KEPT", 6)
    failure = run(main())
    assert len(failure.failures) == 6 and failure.message.endswith(" (and 4 more)")


def test_all_failures_of_a_copy_are_told(sshd: Sshd, home: Path, capfd: Any) -> None:
    """With -v each; without it the first few and a count; all of them in JSON and the Result."""
    build(home, {"t/a": "A"})
    for number in range(7):
        os.mkfifo(home / f"t/{number}")
    all_lines = [f"t/{number}: not a regular file, folder or link" for number in range(7)]
    copy = ["-F", "none", "-t", sshd.target, "-r", "t", "@:"]

    def told(*options: str) -> list[str]:
        assert apssh.main_push([*options, *copy]) == 1
        return [line for line in capfd.readouterr().err.splitlines() if "not a regular" in line]

    (line,) = told()
    assert line.startswith("127.0.0.1: local: t/") and line.endswith(" (and 2 more)")
    assert sorted(told("-v")) == [f"127.0.0.1: local: {line}" for line in all_lines]
    (result,) = apssh.push([sshd.target], "t", ".", recurse=True)
    assert isinstance(result.failures, list) and sorted(result.failures) == all_lines
    (result,) = apssh.run([sshd.target], "exit 3")
    assert result.failures == []


def test_failures_beyond_those_kept_are_counted(capfd: Any) -> None:
    result = dataclasses.replace(
        result_of("box", b"", b""),
        kind="remote",
        error="f0: why (and 1200 more)",
        failures=[f"f{number}: why" for number in range(apssh.FAILURES_KEPT)],
    )
    apssh._Failures(verbose=True).done(result)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == apssh.FAILURES_KEPT + 1
    assert lines[0] == "box: remote: f0: why"
    assert lines[-1] == "box: remote: f0: why (and 1200 more)"


def test_links_that_lead_out_are_followed_on_demand(sshd: Sshd, home: Path, capfd: Any) -> None:
    build(
        sshd.home,
        {
            "alternatives/editor": "-> ../bin/vi",
            "alternatives/pager": "-> {home}/bin".replace("{home}", str(sshd.home)),
            "bin/vi": "VI",
        },
    )
    assert apssh.main_pull(["-t", sshd.target, "-r", "@:alternatives", "new"]) == 1
    said = capfd.readouterr().err.splitlines()[0]
    assert said.startswith("127.0.0.1: remote: alternatives/")
    for path, link in (("editor", "../bin/vi"), ("pager", f"{sshd.home}/bin")):
        assert led_out(f"alternatives/{path}", apssh._brief(link)) in said
    assert listing(home / "new") == {}
    shutil.rmtree(home / "new")
    assert apssh.main_pull(["-t", sshd.target, "-r", "--follow", "@:alternatives", "new"]) == 0
    assert listing(home / "new") == {"editor": "VI", "pager/": "", "pager/vi": "VI"}
    assert apssh.main_push(["-t", sshd.target, "-r", "--follow", "new", "@:back"]) == 0
    assert listing(sshd.home / "back") == listing(home / "new")


@pytest.mark.parametrize(
    ("source", "arrived"),
    [
        ("f[1].txt", {"f1.txt"}),
        (r"f\[1\].txt", {"f[1].txt"}),
        (r"f\[1].txt", {"f[1].txt"}),
        (r"d\*/f[[]1].txt", {"f[1].txt"}),
        (r"d\*/f\[1].txt", {"f[1].txt"}),
        ("d*/f[1].txt", {"f1.txt"}),
        ("g[2].txt", {"g[2].txt"}),
        (r"\*", {"*"}),
        (r"\?*", {"?x"}),
        (r"back\slash", {r"back\slash"}),
        (r"back\\slash", {r"back\slash"}),
        (r"back\\*", {r"back\slash"}),
    ],
)
@pytest.mark.parametrize("local", [False, True])
def test_quoted_names(
    sshd: Sshd, home: Path, monkeypatch: pytest.MonkeyPatch, local: bool, source: str, arrived: Any
) -> None:
    """A backslash quotes what has a meaning in a pattern; a pattern wins over a name that is like
    it, and is a name where it matches nothing: as a shell has it.
    """
    names = ["f[1].txt", "f1.txt", "g[2].txt", "*", "?x", "ax", r"back\slash", r"back\\slashes"]
    names += ["d*/f[1].txt", "d*/f1.txt"]
    names.remove(r"back\\slashes")
    (home / "there").mkdir()
    far = home / "there" if local else sshd.home
    build(far, dict.fromkeys(names, "text"))
    (home / "in").mkdir()
    if local:
        monkeypatch.chdir(far)
    step = Pull(source, str(home / "in"))
    assert (run(outcome(LocalNode(), step)) if local else copied(sshd, step)) == ""
    assert set(os.listdir(home / "in")) == arrived


def test_braces_in_paths(sshd: Sshd, home: Path, capfd: Any) -> None:
    build(home, {"{host}.txt": "braces", "127.0.0.1.txt": "host"})
    push = ["-t", sshd.target, "{{host}}.txt", "{host}.txt"]
    assert apssh.main_push([*push, "@:"]) == 0
    assert listing(sshd.home) == {"{host}.txt": "braces", "127.0.0.1.txt": "host"}
    assert apssh.main_pull(["-t", sshd.target, "@:{{host}}.txt", "a{{b}}{{{host}}}"]) == 0
    assert (home / "a{b}{127.0.0.1}").read_text() == "braces"
    assert apssh.main_pull(["-t", sshd.target, "@:{{host}}.txt", "no{{b}}/x"]) == 2
    assert capfd.readouterr().err == "appull: no{b}: no such folder\n"


@pytest.mark.parametrize("sources", [["@:a.log", "@:b.log"], ["@:*.log"], ["@:[b]*"]])
def test_several_sources_make_the_folder_of_a_host(
    sshd: Sshd, home: Path, sources: list[str]
) -> None:
    build(sshd.home, {"a.log": "A", "b.log": "B"})
    assert apssh.main_pull(["-t", sshd.target, *sources, "x/logs-{host}"]) == 0
    wanted = {"b.log": "B"} if sources == ["@:[b]*"] else {"a.log": "A", "b.log": "B"}
    assert listing(home / "x/logs-127.0.0.1") == wanted


@pytest.mark.parametrize(
    ("sources", "destination", "message"),
    [
        ("f", "gone/", "gone/: no such folder"),
        ("f", "gone/f", "gone: no such folder"),
        (["f", "g"], "gone", "gone: no such folder"),
        ("f", "file/", "file/: not a folder"),
        (["f", "g"], "file", "file: not a folder"),
        ("f", "file/f", "file: not a folder"),
    ],
)
def test_folder_of_a_pull_is_looked_for_first(
    sshd: Sshd, home: Path, sources: Any, destination: str, message: str
) -> None:
    """Before the experiment, whose results it is to take."""
    build(home, {"file": "text"})
    build(sshd.home, {"f": "F", "g": "G"})

    async def main(place: str) -> str:
        async with sshd.node() as node:
            job = SshJob(node, commands=[Run("touch ran"), Pull(sources, place)])
            try:
                await job.co_run()
            except UsageError as exc:
                return str(exc)
            return ""

    assert run(main(destination)) == f"127.0.0.1: local: {message}"
    assert not (sshd.home / "ran").exists()
    (home / "there").mkdir()
    assert run(main("there")) == ""
    assert (sshd.home / "ran").exists() and (home / "there/f").exists()


async def test_home_of_this_machine(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LocalNode knows it wherever an SshNode does."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    build(work, {"f": "F"})
    async with LocalNode() as node:
        await node.mkdir("~/x/y")
        await node.mkdir("~/x/y")
        await node.put_string_script("echo hi", "~/x/script")
        await node.put_file_s("f", "~/x")
        await node.get_file_s("~/x/f", "g")
        with pytest.raises(TransferError) as caught:
            await node.mkdir("~/x/f/z")
        assert str(caught.value) == "LOCALNODE: local: ~/x/f/z: not a directory"
        with pytest.raises(TransferError) as caught:
            await node.put_string_script("echo hi", "~/none/script")
        assert str(caught.value) == (
            "LOCALNODE: local: ~/none/script: ~/none: no such folder".replace(
                ": ~/none:", f": {home}/none:"
            )
        )
    assert listing(home / "x") == {"f": "F", "script": "echo hi", "y/": ""}
    assert stat.S_IMODE((home / "x/script").stat().st_mode) == 0o755
    assert listing(work) == {"f": "F", "g": "F"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"ForceCommand": "echo Your password has expired. >&2; exit 1"},
            "Your password has expired.",
        ),
        (
            {"ForceCommand": r"printf '\033[2Jgone' >&2; exit 1"},
            r"\x1b[2Jgone",
        ),
        ({"Subsystem": "sftp /no/such/sftp-server"}, "its server ended with status 127"),
        ({"Subsystem": "sftp echo hello"}, "max packet size exceeded"),
        ({"Subsystem": "other /bin/true"}, "Session request failed"),
    ],
    ids=["expired password", "hostile words", "no program", "start-up file", "no subsystem"],
)
def test_no_sftp_over_there(
    make_sshd: Callable[..., Sshd], home: Path, options: dict[str, str], message: str
) -> None:
    """What the server says in its place is what helps."""
    server = make_sshd(**options)
    build(home, {"f": "F"})
    said = f"127.0.0.1: remote: no SFTP over there: {message}"
    assert copied(server, Push("f", "f")) == said


async def test_words_of_an_sftp_server_on_its_own_channel(keys: Path) -> None:
    """Where stderr of a subsystem is sent, unlike OpenSSH's, nothing else is asked."""

    class Missing(asyncssh.SFTPServer):
        def __init__(self, chan: asyncssh.SSHServerChannel[bytes]) -> None:
            super().__init__(chan)
            chan.write_stderr(b"sh: sftp-server: not found\n")
            chan.exit(127)

    async with (
        ssh_server(keys, sftp=Missing) as port,
        SshNode("127.0.0.1", port=port, known_hosts=None) as node,
    ):
        with pytest.raises(TransferError) as caught:
            await node.sftp_connect_lazy()
        said = "sh: sftp-server: not found"
        assert str(caught.value) == f"127.0.0.1: remote: no SFTP over there: {said}"


# hostile servers: what is pulled from them must change nothing but the destination

REGULAR, FOLDER, LINK, FIFO = (
    stat.S_IFREG | 0o644,
    stat.S_IFDIR | 0o755,
    stat.S_IFLNK | 0o777,
    stat.S_IFIFO | 0o644,
)


@dataclasses.dataclass
class Node:
    """One name of a hostile server: what it says, and what it does, which need not agree."""

    content: bytes = b""
    names: Callable[[], Iterable[tuple[bytes, Node]]] | None = (
        None  # a folder's names, made as they are asked for
    )
    target: bytes = b""  # of a link
    mode: int | None = None  # what stat says; None: what it is
    said: int | None = None  # what scandir says, where it differs
    size: int | None = None  # what both say; None: the truth; -1: nothing
    endless: bool = False
    error: str = ""  # opening it fails so

    def attrs(self, mode: int | None = None) -> asyncssh.SFTPAttrs:
        if mode is None:
            mode = (
                self.mode
                if self.mode is not None
                else FOLDER
                if self.names
                else LINK
                if self.target
                else REGULAR
            )
        size = len(self.content) if self.size is None else self.size
        return asyncssh.SFTPAttrs(
            permissions=None if mode == -1 else mode, size=None if size == -1 else size
        )


def folder(*names: tuple[bytes, Node], **says: Any) -> Node:
    return Node(names=lambda: names, **says)


class HostileServer(asyncssh.SFTPServer):
    """An SFTP server that has one tree called ``tree``, and checks nothing of what it sends."""

    root = Node()
    area = b""

    def __init__(self, chan: Any) -> None:
        super().__init__(chan)
        self._known = {b"tree": self.root}

    def _node(self, path: bytes) -> Node:
        if path not in self._known:
            raise asyncssh.SFTPNoSuchFile("No such file")
        return self._known[path]

    def stat(self, path: bytes) -> Any:
        return self._node(path).attrs()

    lstat = stat

    def realpath(self, path: bytes) -> Any:
        return path

    def readlink(self, path: bytes) -> Any:
        return self._node(path).target.replace(b"{area}", self.area)

    async def scandir(self, path: bytes) -> AsyncIterator[asyncssh.SFTPName]:
        node = self._node(path)
        if not node.names:
            raise asyncssh.SFTPNotADirectory("Not a directory")
        for name, child in node.names():
            name = name.replace(b"{area}", self.area)
            if len(self._known) < 5000:
                self._known.setdefault(posixpath.join(path, name), child)
            yield asyncssh.SFTPName(name, b"-", child.attrs(child.said))

    def open(self, path: bytes, pflags: int, attrs: asyncssh.SFTPAttrs) -> Any:
        node = self._node(path)
        if node.error or node.names:
            raise asyncssh.SFTPFailure(node.error or "Failure")
        return node

    def read(self, file_obj: Any, offset: int, size: int) -> Any:
        return b"x" * size if file_obj.endless else file_obj.content[offset : offset + size]

    def fstat(self, file_obj: Any) -> Any:
        return file_obj.attrs()

    def close(self, file_obj: Any) -> Any:
        return None


def hostile(root: Node, area: Path) -> type[HostileServer]:
    return type("Hostile", (HostileServer,), {"root": root, "area": os.fsencode(area)})


def led_out(path: str, target: str) -> str:
    return (
        f"{path}: refused a link that leads out, to {target} "
        "(follow_symlinks, --follow, copies what it leads to)"
    )


EVIL = Node(b"evil")
GOOD = (b"good", Node(b"good"))
ALSO = {"out/tree/": "", "out/tree/good": "good"}
LOOP = folder()
LOOP.names = lambda: [(b"a", LOOP)]

# attack: what the server has, what is then in the area (besides what it had), the message;
# the area has ``secret``, ``outside/keep`` and ``out/``
ATTACKS: dict[str, tuple[Node, dict[str, str], str]] = {
    "name ../x": (
        folder((b"../x", EVIL), (b"../../x", EVIL), GOOD),
        ALSO,
        "tree/../x: refused the name '../x'; tree/../../x: refused the name '../../x'",
    ),
    "name ../../secret, a folder first": (
        folder((b"..", folder((b"..", folder((b"secret", EVIL))), (b"secret", EVIL))), GOOD),
        ALSO,
        "",
    ),
    "absolute name": (
        folder((b"{area}/x", EVIL), (b"{area}/secret", EVIL), GOOD),
        ALSO,
        "{area}/x: refused the name '{area}/x'; {area}/secret: refused the name '{secret}'",
    ),
    "name a/b": (
        folder((b"a", folder()), (b"a/b", EVIL), GOOD),
        ALSO | {"out/tree/a/": ""},
        "tree/a/b: refused the name 'a/b'",
    ),
    "name with NUL": (
        folder((b"a\0b", EVIL), GOOD),
        ALSO,
        r"tree/a\x00b: refused the name 'a\x00b'",
    ),
    "empty name": (
        folder((b"", EVIL), GOOD),
        ALSO,
        "tree/: refused the name ''",
    ),
    "name that is a control sequence": (
        folder((b"\x1b[2J", Node(error="No\x1b[2J\n")), GOOD),
        ALSO,
        r"tree/\x1b[2J: no\x1b[2J\n",
    ),
    "name of 100,000 bytes": (
        folder((b"n" * 100_000, EVIL), GOOD),
        ALSO,
        f"tree/{'n' * 192}...: refused the name '{'n' * 77}...'",
    ),
    "one name twice": (
        folder((b"a", Node(b"first")), (b"a", EVIL), GOOD),
        ALSO | {"out/tree/a": "first"},
        "tree/a: the name a comes twice",
    ),
    "a link, then a file of that name": (
        folder((b"a", Node(target=b"../../secret")), (b"a", EVIL), GOOD),
        ALSO,
        "tree/a: the name a comes twice; " + led_out("tree/a", "../../secret"),
    ),
    "a link, then a folder of that name": (
        folder((b"a", Node(target=b"../../outside")), (b"a", folder((b"x", EVIL))), GOOD),
        ALSO,
        "tree/a: the name a comes twice; " + led_out("tree/a", "../../outside"),
    ),
    "a folder, then a link of that name": (
        folder((b"a", folder((b"x", EVIL))), (b"a", Node(target=b"../../outside")), GOOD),
        ALSO | {"out/tree/a/": "", "out/tree/a/x": "evil"},
        "tree/a: the name a comes twice",
    ),
    "absolute link": (
        folder((b"a", Node(target=b"/etc/passwd")), GOOD),
        ALSO,
        led_out("tree/a", "/etc/passwd"),
    ),
    "link to what is beside the destination": (
        folder((b"a", Node(target=b"../../secret")), GOOD),
        ALSO,
        led_out("tree/a", "../../secret"),
    ),
    "link that goes in and out": (
        folder((b"a", Node(target=b"b/../../../secret")), GOOD),
        ALSO,
        led_out("tree/a", "b/../../../secret"),
    ),
    "links that chain out": (
        folder(
            (b"a", Node(target=b"b/..")),
            (b"b", Node(target=b"..")),
            (b"c", Node(target=b"b/../..")),
            GOOD,
        ),
        ALSO | {"out/tree/b": "-> .."},
        led_out("tree/a", "b/..") + "; " + led_out("tree/c", "b/../.."),
    ),
    "links that chain out through a folder": (
        folder(
            (b"d", folder((b"e", Node(target=b"../../..")), (b"f", Node(target=b"../..")))),
            (b"g", Node(target=b"d/f/../..")),
            GOOD,
        ),
        ALSO | {"out/tree/d/": "", "out/tree/d/f": "-> ../.."},
        led_out("tree/d/e", "../../..") + "; " + led_out("tree/g", "d/f/../.."),
    ),
    "link of 100,000 bytes": (
        folder((b"a", Node(target=b"n/" * 50_000)), GOOD),
        ALSO,
        led_out("tree/a", f"{'n/' * 38}n..."),
    ),
    "link with NUL": (
        folder((b"a", Node(target=b"b\0c")), GOOD),
        ALSO,
        led_out("tree/a", r"b\x00c"),
    ),
    "folder said to be a file": (
        folder((b"a", folder((b"x", EVIL), said=REGULAR)), GOOD),
        ALSO,
        "tree/a: failure",
    ),
    "file said to be a folder": (
        folder((b"a", Node(b"evil", said=FOLDER)), GOOD),
        ALSO | {"out/tree/a/": ""},
        "tree/a: not a directory",
    ),
    "link said to be a folder": (
        folder((b"a", Node(target=b"{area}/outside", said=FOLDER)), GOOD),
        ALSO | {"out/tree/a/": ""},
        "tree/a: not a directory",
    ),
    "folder said to be a link": (
        folder((b"a", folder((b"x", EVIL), said=LINK)), GOOD),
        ALSO,
        led_out("tree/a", "''"),
    ),
    "the named one is a link after all": (
        Node(target=b"outside"),
        {},
        "tree: not a regular file, folder or link",
    ),
    "the named one is a device": (
        Node(mode=stat.S_IFCHR | 0o666),
        {},
        "tree: not a regular file, folder or link",
    ),
    "names that differ in case": (
        folder((b"A", Node(b"upper")), (b"a", Node(b"lower")), GOOD),
        ALSO | {"out/tree/A": "upper", "out/tree/a": "lower"},
        "",
    ),
    "endless folders": (
        LOOP,
        {f"out/tree/{'a/' * depth}": "" for depth in range(100)},
        f"tree/{'a/' * 96}...: more than 100 folders deep",
    ),
    "endless names": (
        Node(names=lambda: ((b"%d" % number, Node(mode=FIFO)) for number in itertools.count())),
        {"out/tree/": ""},
        "tree/2000: more than 2,000 names: given up",
    ),
    "one name without end": (
        Node(names=lambda: ((b"a", Node(mode=FIFO)) for _ in itertools.count())),
        {"out/tree/": ""},
        "tree/a: more than 2,000 names: given up",
    ),
    "bad names without end": (
        Node(names=lambda: ((b"/%d" % number, EVIL) for number in itertools.count())),
        {"out/tree/": ""},
        "/2000: more than 2,000 names: given up",
    ),
    "dots without end": (
        Node(names=lambda: ((b"." * (1 + number % 2), folder()) for number in itertools.count())),
        {"out/tree/": ""},
        "tree/.: more than 2,000 names: given up",
    ),
    "links without end": (
        Node(names=lambda: ((b"%d" % number, Node(target=b"/x")) for number in itertools.count())),
        {"out/tree/": ""},
        "tree/2000: more than 2,000 names: given up",
    ),
    "huge size": (
        folder(
            (b"a", Node(b"small", size=1 << 62)), (b"b", Node(b"small", size=(1 << 64) - 1)), GOOD
        ),
        ALSO | {"out/tree/a": "small", "out/tree/b": "small"},
        "",
    ),
    "no size": (
        folder((b"a", Node(b"whole" * 100_000, size=-1)), GOOD),
        ALSO | {"out/tree/a": "whole" * 100_000},
        "",
    ),
    "size too small": (
        folder((b"a", Node(b"whole" * 100_000, size=3)), GOOD),
        ALSO | {"out/tree/a": "whole" * 100_000},
        "",
    ),
    "endless file": (
        folder((b"a", Node(endless=True, size=10)), GOOD),
        ALSO,
        "tree/a: goes on far beyond its size: given up",
    ),
    "mode bits of power": (
        folder(
            (b"a", Node(b"evil", mode=stat.S_IFREG | 0o7777)),
            (b"d", folder(mode=stat.S_IFDIR | 0o7777)),
            GOOD,
        ),
        ALSO | {"out/tree/a": "evil", "out/tree/d/": ""},
        "",
    ),
    "no attributes": (
        folder(
            (b"a", Node(b"text", mode=REGULAR, said=-1)),
            (b"b", Node(b"text", mode=-1, size=-1)),
            GOOD,
        ),
        ALSO | {"out/tree/a": "text"},
        "tree/b: not a regular file, folder or link",
    ),
}
AREA = {"secret": "precious", "outside/": "", "outside/keep": "precious", "out/": ""}

# the same with what an earlier pull, or somebody, left in the destination: what is there, the
# options, what then is there
TRAPS: dict[str, tuple[Node, dict[str, str], dict[str, bool], dict[str, str], str]] = {
    "a file's name is a link": (
        folder((b"f", EVIL), GOOD),
        {"out/tree/f": "-> ../../secret"},
        {},
        ALSO | {"out/tree/f": "evil"},
        "",
    ),
    "a file's name is a link, inplace": (
        folder((b"f", EVIL), GOOD),
        {"out/tree/f": "-> ../../secret"},
        {"inplace": True},
        ALSO | {"out/tree/f": "-> ../../secret"},
        "tree/f: a link has that name",
    ),
    "a file's name is a dangling link, inplace": (
        folder((b"f", EVIL), GOOD),
        {"out/tree/f": "-> ../../new"},
        {"inplace": True},
        ALSO | {"out/tree/f": "-> ../../new"},
        "tree/f: a link has that name",
    ),
    "a folder's name is a link": (
        folder((b"d", folder((b"keep", EVIL), (b"x", EVIL))), GOOD),
        {"out/tree/d": "-> ../../outside"},
        {},
        ALSO | {"out/tree/d": "-> ../../outside"},
        "tree/d: a link has that name",
    ),
    "the tree's name is a link": (
        folder((b"keep", EVIL), (b"x", EVIL)),
        {"out/tree": "-> ../outside"},
        {},
        {"out/tree": "-> ../outside"},
        "tree: a link has that name",
    ),
    "a link's name is a link": (
        folder((b"l", Node(target=b"good")), GOOD),
        {"out/tree/l": "-> ../../outside"},
        {},
        ALSO | {"out/tree/l": "-> good"},
        "",
    ),
    "a file's name is a hard link": (
        folder((b"f", EVIL), GOOD),
        {"out/tree/f": "hard"},
        {},
        ALSO | {"out/tree/f": "evil"},
        "",
    ),
}


async def attacked(
    keys: Path,
    root: Node,
    area: Path,
    source: str = "tree",
    destination: str = "out",
    **options: Any,
) -> str:
    """Pull from a hostile server into the area."""
    async with (
        ssh_server(keys, sftp=hostile(root, area)) as port,
        SshNode("127.0.0.1", port=port, username=ME) as node,
    ):
        return await outcome(
            node, Pull(source, str(area / destination), timeout=10, **{"recurse": True} | options)
        )


@pytest.mark.parametrize("attack", ATTACKS)
def test_hostile_server(
    keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: str
) -> None:
    root, leaves, message = ATTACKS[attack]
    area = tmp_path / "area"
    area.mkdir()
    build(area, AREA)
    monkeypatch.setattr(apssh, "TREE_LIMIT", 2000)
    monkeypatch.setattr(apssh, "SURPLUS_LIMIT", 1 << 20)
    if attack == "endless folders":
        leaves = leaves | {f"out/tree/{'a/' * depth}": "" for depth in range(100)}
    text = run(attacked(keys, root, area))
    secret = apssh._brief(f"{area}/secret")
    message = message.format(area=area, secret=secret)
    assert text == (f"127.0.0.1: remote: {message}" if message else "")
    left = listing(area)
    assert left == AREA | leaves
    assert not any(path.lstat().st_mode & 0o7000 for path in area.rglob("*"))
    assert sorted(os.listdir(tmp_path)) == ["area", "home"]


@pytest.mark.parametrize("trap", TRAPS)
def test_hostile_server_and_what_was_there(keys: Path, tmp_path: Path, trap: str) -> None:
    root, before, options, leaves, message = TRAPS[trap]
    area = tmp_path / "area"
    area.mkdir()
    build(area, AREA | before)
    if before.get("out/tree/f") == "hard":
        (area / "out/tree/f").unlink()
        (area / "out/tree/f").hardlink_to(area / "secret")
    assert run(attacked(keys, root, area, **options)) == (
        f"127.0.0.1: local: {message.format(area=area)}" if message else ""
    )
    assert listing(area) == AREA | leaves


def test_pulls_one_after_the_other_chain_nothing(keys: Path, tmp_path: Path) -> None:
    """What is a folder becomes a link, and a folder again: between two pulls, and between two calls
    of one.
    """
    area = tmp_path / "area"
    area.mkdir()
    build(area, AREA)
    turns = [
        (folder((b"d", Node(target=b"../outside"))), "remote: tree/d: refused", {"out/tree/": ""}),
        (folder((b"d", Node(target=b".."))), "", {"out/tree/": "", "out/tree/d": "-> .."}),
        (
            folder((b"d", folder((b"x", EVIL)))),
            "local: tree/d: a link has that name",
            {"out/tree/": "", "out/tree/d": "-> .."},
        ),
        (folder((b"d", EVIL)), "", {"out/tree/": "", "out/tree/d": "evil"}),
    ]
    turns[0][0].names = lambda: [(b"d", Node(target=b"../../outside"))]
    for root, message, leaves in turns:
        assert run(attacked(keys, root, area)).startswith(
            f"127.0.0.1: {message}" if message else ""
        )
        assert listing(area) == AREA | leaves


def test_folder_that_becomes_a_link_meanwhile(keys: Path, tmp_path: Path) -> None:
    """Somebody else on this machine swaps it when it has been looked at: nothing follows."""
    area = tmp_path / "area"
    area.mkdir()
    build(area, AREA)

    def swapping() -> Iterator[tuple[bytes, Node]]:
        (area / "out/tree/d").rename(area / "out/was")
        (area / "out/tree/d").symlink_to("../../outside")
        yield b"x", EVIL

    text = run(attacked(keys, folder((b"d", Node(names=swapping)), GOOD), area))
    assert text == (
        "127.0.0.1: local: tree/d/x: not a directory; "
        f"{area}/out/tree/d: mode and times not set: not a directory"
    )
    left = ALSO | {"out/tree/d": "-> ../../outside", "out/was/": ""}
    assert listing(area) == AREA | left


@pytest.mark.parametrize("name", ["out/new", "out"])
def test_named_file_never_becomes_a_link(keys: Path, tmp_path: Path, name: str) -> None:
    """Else the next pull onto it would write through: the destination is resolved, for it is the
    user's.
    """
    area = tmp_path / "area"
    area.mkdir()
    build(area, AREA | {"out/precious": "mine"})
    assert (
        run(attacked(keys, Node(target=b"precious"), area, destination=name))
        == "127.0.0.1: remote: tree: not a regular file, folder or link"
    )
    assert run(attacked(keys, EVIL, area, destination=name)) == ""
    assert (area / "out/precious").read_text() == "mine"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((b"../x", b"good"), "tree/../x: refused the name '../x'"),
        ((b"a/b", b"good"), "tree/a/b: refused the name 'a/b'"),
        ((b"{area}/x", b"good"), "{area}/x: refused the name '{area}/x'"),
        ((b"good", b"good"), "tree/good: the name good comes twice"),
        ((b"..", b"good"), ""),
        ((b"a\0", b"good"), r"tree/a\x00: refused the name 'a\x00'"),
    ],
)
def test_hostile_answer_to_a_glob(
    keys: Path, tmp_path: Path, names: tuple[bytes, ...], message: str
) -> None:
    area = tmp_path / "area"
    area.mkdir()
    build(area, AREA)
    root = folder(*((name, Node(b"text")) for name in names))
    assert run(attacked(keys, root, area, source="tree/*")) == (
        f"127.0.0.1: remote: {message.format(area=area)}" if message else ""
    )
    assert listing(area) == AREA | {"out/good": "text"}


@pytest.mark.parametrize("name", ["%d", "../%d"])
def test_endless_answer_to_a_glob(
    keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def names() -> Iterator[tuple[bytes, Node]]:
        return (((name % number).encode(), EVIL) for number in itertools.count())

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(apssh, "TREE_LIMIT", 2000)
    assert (
        run(attacked(keys, Node(names=names), tmp_path, source="tree/*"))
        == f"127.0.0.1: remote: tree/{name % 2000}: more than 2,000 names: given up"
    )
    assert os.listdir(tmp_path / "out") == []


def test_endless_links_followed(keys: Path, tmp_path: Path) -> None:
    """A server where every link is a folder with that link in it."""
    (tmp_path / "out").mkdir()
    LOOP.said = LINK
    try:
        text = run(attacked(keys, LOOP, tmp_path, follow_symlinks=True))
    finally:
        LOOP.said = None
    assert text == f"127.0.0.1: remote: tree/{'a/' * 96}...: more than 100 folders deep"


@pytest.mark.slow
@pytest.mark.parametrize("name", [b"%d"])
def test_a_million_names_need_little_memory(keys: Path, tmp_path: Path, name: bytes) -> None:
    (tmp_path / "out").mkdir()
    root = Node(names=lambda: ((name % number, Node(mode=FIFO)) for number in itertools.count()))

    async def main() -> str:
        async with (
            ssh_server(keys, sftp=hostile(root, tmp_path)) as port,
            SshNode("127.0.0.1", port=port, username=ME) as node,
        ):
            return await outcome(
                node, Pull("tree", str(tmp_path / "out"), recurse=True, timeout=600)
            )

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert run(main(), 600).endswith("more than 1,000,000 names: given up")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000


@pytest.mark.parametrize("pushing", [True, False])
def test_server_that_stops_answering(
    keys: Path, home: Path, monkeypatch: pytest.MonkeyPatch, pushing: bool
) -> None:
    """Its connection is alive, its disk is not: the deadline holds all the same."""

    class Stuck(HostileServer):
        root = Node(endless=True, size=1 << 40)

        async def _stuck(self, *_: Any) -> Any:
            await released.wait()
            raise asyncssh.SFTPFailure("too late")

        read = write = close = remove = _stuck

        def open(self, path: bytes, pflags: int, attrs: asyncssh.SFTPAttrs) -> Any:
            return self.root

        def lstat(self, path: bytes) -> Any:
            raise asyncssh.SFTPNoSuchFile("No such file")

        def fsetstat(self, file_obj: Any, attrs: asyncssh.SFTPAttrs) -> None:
            return None

    (home / "f").write_text("text")
    (home / "d").mkdir()

    monkeypatch.setattr(apssh, "CLOSE_TIMEOUT", 0.3)
    released = asyncio.Event()

    async def main() -> None:
        async with (
            ssh_server(keys, sftp=Stuck) as port,
            SshNode("127.0.0.1", port=port, username=ME) as node,
        ):
            step = (Push if pushing else Pull)(
                "f" if pushing else "tree", "new" if pushing else "d/new", timeout=0.5
            )
            begin = time.monotonic()
            if pushing:
                Stuck.stat = Stuck.lstat  # type: ignore[method-assign]
            assert (
                await outcome(node, step)
                == f"127.0.0.1: timeout: no end within 0.5 s: {step.listing_line()}"
            )
            assert time.monotonic() - begin < 2 * apssh.CLOSE_TIMEOUT + 4
            released.set()

    run(main())
    assert os.listdir(home / "d") == []


def test_server_without_posix_rename(keys: Path, home: Path, tmp_path: Path) -> None:
    class Plain(asyncssh.SFTPServer):
        def __init__(self, chan: Any) -> None:
            super().__init__(chan, chroot=os.fsencode(tmp_path / "far"))

        def posix_rename(self, oldpath: bytes, newpath: bytes) -> None:
            raise asyncssh.SFTPOpUnsupported("Operation not supported")

    build(tmp_path / "far", {"f": "old"})
    build(home, {"f": "new", "t/l": "-> ../f"})

    async def main() -> str:
        async with (
            ssh_server(keys, sftp=Plain) as port,
            SshNode("127.0.0.1", port=port, username=ME) as node,
        ):
            return (
                await outcome(node, Push("f", "f"))
                + await outcome(node, Push("t", "t", recurse=True))
                + await outcome(node, Push("t", ".", recurse=True))
            )

    assert run(main()) == ""
    assert listing(tmp_path / "far") == {"f": "new", "t/": "", "t/l": "-> ../f"}


def test_failing_rename_without_posix_rename_keeps_the_new_file(
    keys: Path, home: Path, tmp_path: Path, capfd: Any
) -> None:
    """The old one has made room by then: what has arrived is all that is left, and is named, by
    the error alone.
    """

    class Plain(asyncssh.SFTPServer):
        def __init__(self, chan: Any) -> None:
            super().__init__(chan, chroot=os.fsencode(tmp_path / "far"))

        def posix_rename(self, oldpath: bytes, newpath: bytes) -> None:
            raise asyncssh.SFTPOpUnsupported("Operation not supported")

        def rename(self, oldpath: bytes, newpath: bytes) -> None:
            raise asyncssh.SFTPFailure("No more names")

    build(tmp_path / "far/d\x1b[2J", {"f": "old"})
    build(home, {"f": "new"})

    async def main() -> str:
        async with (
            ssh_server(keys, sftp=Plain) as port,
            SshNode("127.0.0.1", port=port, username=ME) as node,
        ):
            steps = Push("f", "d\x1b[2J/f"), Push("f", "d\x1b[2J/g")
            return " | ".join([await outcome(node, step) for step in steps])

    said = run(main())
    [(name, text)] = listing(tmp_path / "far/d\x1b[2J").items()
    shown, hint = r"d\x1b[2J", "(inplace, or --inplace, writes onto the file itself)"
    assert text == "new"
    assert said == (
        f"127.0.0.1: remote: f: {shown}/f has been removed, and its new content is in "
        f"{shown}/{name}: no more names {hint} | "
        f"127.0.0.1: remote: f: {shown}/g cannot be replaced: no more names {hint}"
    )
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("slow", ["remove", "rename"])
@pytest.mark.parametrize("end", ["timeout", "cancelled", "lost"])
async def test_rename_without_posix_rename_that_is_broken_off(
    slow: str, end: str, keys: Path, home: Path, tmp_path: Path, capfd: Any
) -> None:
    """From when the old file is asked to make room, the new one stays, and is named."""
    asked = asyncio.Event()

    class Plain(asyncssh.SFTPServer):
        def __init__(self, chan: Any) -> None:
            super().__init__(chan, chroot=os.fsencode(tmp_path / "far"))

        def posix_rename(self, oldpath: bytes, newpath: bytes) -> None:
            raise asyncssh.SFTPOpUnsupported("Operation not supported")

        async def _slowly(self, what: str) -> None:
            if what == slow:
                asked.set()
                if end == "lost":
                    self.channel.get_connection().abort()
                await asyncio.sleep(1)

        async def remove(self, path: bytes) -> None:
            super().remove(path)
            await self._slowly("remove")

        async def rename(self, oldpath: bytes, newpath: bytes) -> None:
            await self._slowly("rename")
            raise asyncssh.SFTPFailure("No more names")

    build(tmp_path / "far", {"f": "old"})
    build(home, {"f": "new"})
    limit = 0.6 if end == "timeout" else None
    async with (
        ssh_server(keys, sftp=Plain) as port,
        SshNode("127.0.0.1", port=port, username=ME) as node,
    ):
        copy = asyncio.create_task(Push("f", "f", timeout=limit).co_run_remote(node))
        await asked.wait()
        if end == "cancelled":
            copy.cancel()
        with pytest.raises((ApsshError, asyncio.CancelledError)):
            await copy
    [(name, text)] = listing(tmp_path / "far").items()
    assert (text, capfd.readouterr().err) == (
        "new",
        f"127.0.0.1: f may be gone: its new content is then in {name}\n",
    )


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        (asyncssh.SFTPPermissionDenied("Not yours"), "not yours"),
        (asyncssh.SFTPNoSuchFile("Not there"), "it is there"),
    ],
)
def test_old_file_that_makes_no_room_without_posix_rename(
    refusal: asyncssh.SFTPError, said: str, keys: Path, home: Path, tmp_path: Path
) -> None:
    """The server said so: what has arrived goes."""

    class Plain(asyncssh.SFTPServer):
        def __init__(self, chan: Any) -> None:
            super().__init__(chan, chroot=os.fsencode(tmp_path / "far"))

        def posix_rename(self, oldpath: bytes, newpath: bytes) -> None:
            raise asyncssh.SFTPOpUnsupported("Operation not supported")

        def remove(self, path: bytes) -> None:
            if path == b"f":
                raise refusal
            super().remove(path)

        def rename(self, oldpath: bytes, newpath: bytes) -> None:
            raise asyncssh.SFTPFailure("It is there")

    build(tmp_path / "far", {"f": "old"})
    build(home, {"f": "new"})

    async def main() -> str:
        async with (
            ssh_server(keys, sftp=Plain) as port,
            SshNode("127.0.0.1", port=port, username=ME) as node,
        ):
            return await outcome(node, Push("f", "f"))

    assert run(main()) == (
        f"127.0.0.1: remote: f: f cannot be replaced: {said} "
        "(inplace, or --inplace, writes onto the file itself)"
    )
    assert listing(tmp_path / "far") == {"f": "old"}


def test_server_that_answers_in_parts_and_not_in_turn(keys: Path, tmp_path: Path) -> None:
    """The end of a file may be met while what is before it is still under way."""
    content = os.urandom(1_500_000)

    class Slow(HostileServer):
        root = Node(content)

        async def read(self, file_obj: Any, offset: int, size: int) -> Any:
            data = content[offset : offset + size]
            if offset + size < len(content):
                await asyncio.sleep(0.01)
                data = data[:50_000]
            return data

    async def main() -> str:
        async with (
            ssh_server(keys, sftp=Slow) as port,
            SshNode("127.0.0.1", port=port, username=ME) as node,
        ):
            return await outcome(node, Pull("tree", str(tmp_path / "f")))

    assert run(main()) == ""
    assert (tmp_path / "f").read_bytes() == content


@pytest.mark.parametrize("surplus", [1, 300_000])
@pytest.mark.parametrize("size", [0, 100, 1_500_000])
async def test_hostile_server_that_answers_more_than_was_asked(
    keys: Path, home: Path, size: int, surplus: int
) -> None:
    """At the end of a file too: it is this host's failure, told at once, and nothing arrives."""

    class Generous(HostileServer):
        root = Node(b"x", size=size)

        def read(self, file_obj: Any, offset: int, size: int) -> Any:
            return b"x" * (size + surplus)

    Path("here").mkdir()
    async with ssh_server(keys, sftp=Generous) as port:
        (result,) = await apssh.co_pull(f"{ME}@127.0.0.1:{port}", "tree", "here/f", timeout=20)
    assert (result.kind, result.error) == (
        "remote",
        "tree: the server sent more of it than was asked for",
    )
    assert listing(Path("here")) == {}


def test_lost_connection_before_the_copy(keys: Path, home: Path) -> None:
    class Leaves(asyncssh.SFTPServer):
        def stat(self, path: bytes) -> Any:
            self.channel.get_connection().abort()
            raise asyncssh.SFTPFailure("gone")

    (home / "f").write_text("text")

    async def main(step: Any) -> None:
        async with (
            ssh_server(keys, sftp=Leaves) as port,
            SshNode("127.0.0.1", port=port, username=ME) as node,
        ):
            with pytest.raises(ConnectionFailedError) as caught:
                await step.co_run_remote(node)
            assert str(caught.value) == "127.0.0.1: lost: connection lost during the copy of f"

    run(main(Push("f", "f")))
    run(main(Pull("f", "g")))


async def test_folder_of_a_script_is_removed_from_far_away(
    keys: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host may take longer for it than a failure would be given."""
    monkeypatch.setattr(apssh, "CLOSE_TIMEOUT", 0.1)

    class Far(asyncssh.SFTPServer):
        async def rmdir(self, path: bytes) -> None:
            await asyncio.sleep(0.5)
            os.rmdir(path)

    async with (
        ssh_server(keys, sftp=Far) as port,
        SshNode("127.0.0.1", port=port, username=ME) as node,
    ):
        assert await RunString("true").co_run_remote(node) == 0
    assert list((home / apssh.REMOTE_FOLDER).iterdir()) == []


# names of hosts and users that would lead elsewhere


@pytest.mark.parametrize(
    "target",
    ["../../etc/x", "/etc/x", "..", "a/../../b", "x\0y", "me@../x", "..->box", "[../x]:22", "-rf"],
)
def test_target_that_is_a_path(home: Path, tmp_path: Path, target: str) -> None:
    before = listing(tmp_path)
    for options in (["-o", "out", "-m"], ["-o", "out"]):
        assert apssh.main([*options, f"--target={target}", "true"]) == 2
    (home / "f").write_text("")
    assert apssh.main_pull([f"--target={target}", "@:f", "{host}/{fqdn}"]) == 2
    left = listing(tmp_path)
    assert {name for name in left if not name.startswith("home/")} == {
        name for name in before if not name.startswith("home/")
    }


@pytest.mark.parametrize("host", ["../../etc/x", "/etc/x", "..", "a/b", ""])
def test_node_that_is_a_path(host: str) -> None:
    with pytest.raises(UsageError):
        SshNode(host)


@pytest.mark.parametrize(
    "host", ["../../x", "/x", "..", ".", "a/b", "", "~", "\x1b[2J", "a\nb", "-rf", "x" * 5000]
)
def test_formatter_keeps_to_its_folder(tmp_path: Path, host: str) -> None:
    formatter = apssh.SubdirFormatter(tmp_path / "area/run")
    formatter.line("out\n", None, host)
    formatter.line("err\n", apssh.EXTENDED_DATA_STDERR, host)
    assert sorted(os.listdir(tmp_path)) == ["area", "home"]
    assert os.listdir(tmp_path / "area") == ["run"]
    names = sorted(os.listdir(tmp_path / "area/run"))
    assert len(names) == 2 and names[1] == f"{names[0]}.err"
    assert apssh.escape(names[0]) == names[0] and not names[0].startswith(("-", "."))


def test_user_that_is_a_path(sshd: Sshd, home: Path, tmp_path: Path) -> None:
    where = f"127.0.0.1:{sshd.port}"
    assert apssh.main_pull(["-t", where, "-l", "../../x", "@:f", "out/{user}/{host}/"]) == 1
    assert (
        apssh.main(["-t", where, "-t", sshd.target, "-l", "../../x", "-o", "files", "-m", "true"])
        == 1
    )
    assert sorted(os.listdir(tmp_path)) == ["home"]
    assert sorted(path.name for path in (home / "out").iterdir()) == ["_._.._x"]
    assert {
        str(path.relative_to(home / "files"))
        for path in (home / "files").rglob("*")
        if path.is_file()
    } - {"_._.._x@127.0.0.1"} == {
        f"{ME}@127.0.0.1",
        f"0ok/{ME}@127.0.0.1",
        "1failed/_._.._x@127.0.0.1",
        "_._.._x@127.0.0.1.err",
    }


@pytest.mark.parametrize("taken", ["0ok", "1failed", "box"])
def test_marks_and_outputs_share_no_name(tmp_path: Path, taken: str) -> None:
    """Hosts that are called as the folders of -m, or as another's .err file."""
    endpoints = [apssh.Endpoint("root", name, 22) for name in (taken, f"{taken}.err")]
    formatter = apssh.SubdirFormatter(tmp_path / "run")
    for endpoint in endpoints:
        formatter.add_endpoint(endpoint, verbose=False)
    folder = apssh._Folder(tmp_path / "run", mark=True)
    names = [formatter.endpoint_name(endpoint) for endpoint in endpoints]
    for error in (None, "broken"):  # two runs
        folder.begin(names)
        for endpoint, name in zip(endpoints, names, strict=True):
            formatter._write(endpoint, b"out\n", None)
            formatter._write(endpoint, b"err\n", 1)
            host = endpoint[1]
            folder.done(dataclasses.replace(result_of(name), host=host, error=error))
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) == 6  # a mark of another run is gone
    assert all(len(path.read_bytes().splitlines()) == 1 for path in files)


def test_pull_of_several_hosts_to_one_place_is_refused(home: Path) -> None:
    ports = free_port(), free_port()
    targets = [f"127.0.0.1:{port}" for port in ports]
    Path("sub").mkdir()
    for where in ("one", "sub/../one", "{fqdn}"):
        with pytest.raises(UsageError) as caught:
            apssh.pull(targets, "f", where)
        assert (
            str(caught.value)
            == f"127.0.0.1 and 127.0.0.1 would both write to {where}: put {{host}} in the path"
        )
    results = apssh.pull(targets, "f", "{host}")
    assert [result.kind for result in results] == ["refused", "refused"]


# what reaches a terminal

POWER = "\x1b[2Jclear \x1b]0;title\x07 \x1b[31mred\x1b[0m\ttab \x9b2J back\bspace over\rwrite end"
SHOWN = (
    rb"\x1b[2Jclear \x1b]0;title\x07 "
    + b"\x1b[31mred\x1b[0m\ttab "
    + rb"\x9b2J back\x08space over\rwrite end"
)


def test_output_has_no_power_over_a_terminal(sshd: Sshd, capfdbinary: Any) -> None:
    """Shown escaped on a terminal; as it is with -r, and anywhere else."""
    (sshd.home / "f").write_text(POWER + "\n")
    code, seen = on_terminal("--color", "never", "-t", sshd.target, "cat f; sleep 0.3; cat f >&2")
    seen = re.sub(rb"\d/1 [^\r]*\r\x1b\[K", b"", seen)  # the line of progress, on a slow day
    assert (code, seen) == (0, (b"127.0.0.1:" + SHOWN + b"\r\n") * 2)
    code, seen = on_terminal("-t", sshd.target, "-r", "cat f; sleep 0.3; cat f >&2")
    seen = re.sub(rb"\d/1 [^\r]*\r\x1b\[K", b"", seen)
    assert (code, seen.replace(b"\r\n", b"\n")) == (0, (POWER.encode() + b"\n") * 2)
    for options, prefix in (([], b"127.0.0.1:"), (["-r"], b"")):
        assert apssh.main(["-t", sshd.target, *options, "cat f; cat f >&2"]) == 0
        assert tuple(capfdbinary.readouterr()) == (prefix + POWER.encode() + b"\n",) * 2


def test_gathered_output_has_no_power_over_a_terminal(sshd: Sshd, capfdbinary: Any) -> None:
    (sshd.home / "f").write_text(POWER + "\n")
    code, seen = on_terminal("-t", sshd.target, "-b", "cat f")
    assert code == 0 and SHOWN in seen and b"\x1b[2J" not in seen and b"\x07" not in seen
    assert apssh.main(["-t", sshd.target, "-b", "cat f"]) == 0
    assert POWER.encode() in capfdbinary.readouterr().out


@pytest.mark.parametrize("options", [[], ["-r"], ["-o", "out"]])
def test_own_messages_are_always_escaped(
    sshd: Sshd, home: Path, capfd: Any, options: list[str]
) -> None:
    """Even in a file or with -r: a file's name, a command, an error's text."""
    name = "f\x1b[2J\x1b[31m\u202e\n"
    (home / name).write_text("text")
    shown = r"f\x1b[2J\x1b[31m\u202e\n"
    assert apssh.main_pull(["-t", sshd.target, f"@:{name}", "x"]) == 1
    assert capfd.readouterr().err.splitlines()[0] == f"127.0.0.1: remote: {shown}: no such file"
    assert apssh.main_push(["-t", sshd.target, name, f"@:{name}/"]) == 1
    assert capfd.readouterr().err.splitlines()[0] == f"127.0.0.1: remote: {shown}/: no such folder"
    for more, command in ((["-u", "0.2"], f"sleep 3 # {name}"), (["-v"], f"true # {name}")):
        apssh.main(["-t", sshd.target, *options, *more, command])
        out, err = capfd.readouterr()
        assert "\x1b" not in out + err and "\u202e" not in out + err and shown in err


@pytest.mark.parametrize("terminal", [False, True])
def test_banner_is_escaped(keys: Path, terminal: bool) -> None:
    class Greets(asyncssh.SSHServer):
        def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
            self._conn = conn

        def begin_auth(self, username: str) -> bool:
            self._conn.send_auth_banner(POWER + "\n")
            return True

    async def main() -> bytes:
        async with ssh_server(keys, server=Greets) as port:
            argv = ["-v", "-t", f"{ME}@127.0.0.1:{port}", "true"]
            if terminal:
                return (await asyncio.to_thread(on_terminal, *argv))[1]
            return (await asyncio.to_thread(cli, *argv)).stderr

    seen = run(main())
    assert b"banner: " in seen and rb"\x1b[2Jclear" in seen
    assert b"\x1b[2J" not in seen and b"\x1b[31m" not in seen and b"\x07" not in seen


def test_refusals_of_a_server_are_escaped(keys: Path) -> None:
    """The text of an exit signal, of a disconnection."""

    async def main(process: Any) -> bytes:
        async with ssh_server(keys, process=process) as port:
            done = await asyncio.to_thread(
                cli, "-t", f"{ME}@127.0.0.1:{port}", "--no-guard", "true"
            )
            assert done.returncode == 1
            return done.stderr

    async def killed(process: Any) -> None:
        process.channel.exit_with_signal("\x1b[2J", False, POWER)

    async def thrown_out(process: Any) -> None:
        process.get_extra_info("connection").disconnect(2, POWER)

    for seen in (run(main(killed)), run(main(thrown_out))):
        assert seen and b"\x1b" not in seen and b"\x07" not in seen


def test_two_sources_of_one_name_are_escaped(sshd: Sshd, home: Path) -> None:
    name = "f\x1b[2J"
    build(home, {f"a/{name}": "", f"b/{name}": "", "d/": ""})
    (sshd.home / "d").mkdir()
    text = copied(sshd, Push([f"a/{name}", f"b/{name}"], "d"))
    assert text == r"127.0.0.1: local: b/f\x1b[2J: the name f\x1b[2J comes twice"
    assert "\x1b" not in copied(sshd, Pull("x", f"{name}/")) + copied(
        sshd, Push(f"a/{name}", f"{name}/")
    )


# --------------------------------------------------------------------------------------------------
# the guard
# --------------------------------------------------------------------------------------------------


# command lines whose exit status, outputs and reading by the shell must be those of plain ssh
AS_PLAIN_SSH = [
    "true",
    "exit 7",
    "false",
    "no-such-command-here",
    "echo one; echo two >&2; exit 3",
    "kill -TERM $$",
    "kill -KILL $$",
    "kill -HUP $$",
    "sh -c 'kill -INT $$'",
    "cat",
    "wc -c",
    'read x; echo "[$x]"',
    "echo 'single' \"double\" $HOME",
    "echo a\\ b  c",
    "echo '!x' \\!",
    "printf '%s\\n' \"a'b\" 'c\"d'",
    "echo $0",
    "echo $#",
    "cd /; pwd",
    "pwd",
    "echo ~",
    "umask",
    "echo {1..3} $((2 + 3))",
    "if true; then echo yes; fi",
    "echo $(echo nested $(echo deep))",
    "x=5; echo $x ${x:-6}",
    "(exit 4)",
    "true | false",
    "false | true",
    "echo a && false || echo b",
    "cat <<EOF\nhere $((1 + 1))\nEOF",
    "echo one\necho two",
    "printf 'no newline'",
    "printf '\\000\\377' | od -c",
    "trap 'echo bye' EXIT; echo hi",
    "exec echo replaced",
    "test -t 0; echo $?",
    "test -t 1; echo $?",
    "echo é 名",
    "set | grep -c '^apssh'",
    "env | grep -c apssh",
    "ps -o pgid= -p $$ | tr -d ' ' | grep -qx $$ && echo leader",
    "# only a comment",
    ": &",
    "sleep 0.1 & wait; echo waited",
    "echo -n; echo -e 'a\\tb'",
    "ls -l /proc/self/fd | wc -l",
    "ulimit -c",
    "echo ${BASH_VERSION:+bash} $-",
    "seq 1 3 | while read i; do echo $i; done",
]


def plain_ssh(server: Sshd, keys: Path, command: str) -> tuple[int, bytes, bytes]:
    done = subprocess.run(
        [
            "ssh",
            "-F",
            "none",
            "-n",
            "-i",
            str(keys / "id_ed25519"),
            "-o",
            "IdentitiesOnly=yes",
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
            "-o",
            "LogLevel=ERROR",
            "-p",
            str(server.port),
            f"{ME}@127.0.0.1",
            command,
        ],
        capture_output=True,
        check=False,
        timeout=30,
    )
    return done.returncode, done.stdout, done.stderr


def same_as_plain_ssh(command: str, ours: apssh.Result, theirs: tuple[int, bytes, bytes]) -> None:
    status, out, err = theirs
    assert (ours.stdout_bytes, ours.stderr_bytes) == (out, err), command
    if ours.signal:
        assert status == 255, command  # all that ssh's own exit status tells of a signal
    else:
        assert ours.status == status, command


async def test_commands_are_those_of_plain_ssh(sshd: Sshd, keys: Path) -> None:
    if not shutil.which("ssh"):
        pytest.skip("no OpenSSH client (ssh) is installed here")
    formatter = apssh._HoldingFormatter()
    node = sshd.node(formatter=formatter)
    room = asyncio.Semaphore(4)

    async def one(command: str) -> None:
        async with room:
            theirs = await asyncio.to_thread(plain_ssh, sshd, keys, command)
            held = apssh._HeldSink()
            session = apssh._Session(command, apssh.StepRecord())
            status = await node._execute(session, held)
            result = apssh.Result(
                "h",
                "u",
                22,
                "h",
                "h",
                stdout_bytes=held.stdout(),
                stderr_bytes=held.stderr(),
                error=None,
            )
            result.status, result.signal = (
                (status, None) if isinstance(status, int) else (None, status)
            )
            same_as_plain_ssh(command, result, theirs)

    async with node:
        await asyncio.gather(*map(one, AS_PLAIN_SSH))


ENDINGS = ["cancel", "timeout", "close", "abort"]
STEPS = {"run": Run, "script": RunScript, "string": RunString, "gateway": Run}


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("how", ENDINGS)
async def test_no_process_outlives_its_command(
    sshd: Sshd, make_sshd: Callable[..., Sshd], how: str, kind: str, home: Path
) -> None:
    token = f"97{os.getpid()}{ENDINGS.index(how)}{list(STEPS).index(kind)}"
    command = f"trap '' HUP; sleep {token} & (trap '' TERM; sleep {token}) & sleep {token}"
    (home / "script").write_text(f"#!/bin/sh\n{command}\n")
    node = sshd.node(gateway=make_sshd().node() if kind == "gateway" else None)
    what = {"script": "script", "string": f"#!/bin/sh\n{command}\n"}.get(kind, command)
    task = asyncio.create_task(
        STEPS[kind](what, timeout=2 if how == "timeout" else None).co_run_remote(node)
    )
    await eventually_async(lambda: len(processes(f"sleep {token}")) >= 3)
    if how == "cancel":
        task.cancel()
    elif how == "close":
        await node.close()
    elif how == "abort":
        (await node.connect_lazy()).abort()
    with pytest.raises((asyncio.CancelledError, ApsshError)) as caught:
        await task
    if how == "timeout" and STEPS[kind] is Run:
        assert str(caught.value) == f"127.0.0.1: timeout: no end within 2 s: {command}"
    await eventually_async(
        lambda: not processes(f"sleep {token}") and not list(sshd.home.glob(".apssh-remote/*")),
        8,
    )
    for each in node._hops()[::-1]:
        await each.close()


as_root = pytest.mark.skipif(
    os.getuid() != 0, reason="the sshd of an ordinary user cannot give a terminal to its sessions"
)


@pytest.mark.parametrize(
    "options",
    [{"stdin": True}, {"stdin": True, "script": True}, pytest.param({"pty": True}, marks=as_root)],
    ids=["stdin", "script", "pty"],
)
async def test_no_process_outlives_a_timeout_when_stdin_is_data(
    sshd: Sshd, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    token = f"91{os.getpid()}{len(options)}{'pty' in options:d}"
    monkeypatch.setenv("TERM", "dumb")

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"data\n"
            await asyncio.sleep(0.1)

    async with sshd.node() as node:
        other = asyncio.create_task(node.run("sleep 3"))
        given = {"stdin": endless()} if "stdin" in options else {"pty": "pty" in options}
        step = (RunString if "script" in options else Run)(
            f"sleep {token} & sleep {token}", timeout=2, **given
        )
        task = asyncio.create_task(step.attempt(node, apssh.StepRecord()))
        await eventually_async(lambda: len(processes(f"sleep {token}")) == 2)
        with pytest.raises(CommandFailedError):
            await task
        await eventually_async(lambda: not processes(f"sleep {token}"), 8)
        await eventually_async(lambda: not list(sshd.home.glob(".apssh-remote/*")), 8)
        assert await other == 0  # what runs on other connections of the node is not disturbed


@pytest.mark.parametrize("freeze", [False, True], ids=["there", "gone"])
@pytest.mark.parametrize("stdin", [False, True], ids=["no stdin", "stdin"])
async def test_what_is_known_of_a_command_that_was_ended(
    sshd: Sshd, stdin: bool, freeze: bool
) -> None:
    """It may still be running only where the network has gone."""

    async def given() -> AsyncIterator[bytes]:
        yield b"data\n"
        await asyncio.sleep(60)

    frozen = asyncio.Event()
    async with (
        raw_server(network(sshd.port, frozen)) as port,
        SshNode("127.0.0.1", port=port, username=ME) as node,
    ):
        step = apssh.StepRecord()
        task = asyncio.create_task(
            Run("touch up; sleep 30", timeout=3, stdin=given() if stdin else None).attempt(
                node, step
            )
        )
        await eventually_async((sshd.home / "up").exists)
        if freeze:
            frozen.set()
        with pytest.raises(CommandFailedError):
            await task
        assert step.may_run == freeze


async def test_what_a_shell_left_behind_is_left_and_told(sshd: Sshd) -> None:
    """As with ssh, whether or not it holds the outputs; with another session on the connection."""
    token = f"96{os.getpid()}"
    async with sshd.node() as node:
        other = asyncio.create_task(node.run("sleep 2"))
        with pytest.raises(CommandFailedError) as caught:
            await node.run(f"sleep {token} & echo $! > left", timeout=1)
        assert str(caught.value) == (
            f"127.0.0.1: timeout: no end within 1 s: sleep {token} & echo $! > left "
            "(it may still be running)"
        )
        await eventually_async(lambda: processes(f"sleep {token}"))
        os.kill(int((sshd.home / "left").read_text()), signal.SIGKILL)
        assert await other == 0


async def test_printing_command_is_ended_with_its_children(sshd: Sshd) -> None:
    token = f"90{os.getpid()}"
    async with sshd.node(formatter=apssh.CaptureFormatter()) as node:
        for _ in range(5):
            with pytest.raises(CommandFailedError):
                await node.run(
                    f"sleep {token} & echo >> up; while :; do echo noise; sleep 0.01; done",
                    timeout=0.3,
                )
        assert (sshd.home / "up").read_text() == "\n" * 5
        await eventually_async(lambda: not processes(f"sleep {token}"), 8)


def test_what_left_its_group_lives(sshd: Sshd) -> None:
    token = f"98{os.getpid()}"

    async def main() -> None:
        async with sshd.node() as node:
            assert (
                await node.run(f"nohup setsid sleep {token} >/dev/null 2>&1 & sleep 0.2; exit 0")
                == 0
            )
            assert await node.run(f"sleep {token}1 > /dev/null 2>&1 &") == 0

    run(main())
    # the shell may be through before what it left has become a sleep
    eventually(lambda: len(processes(f"sleep {token}")) == 2)
    subprocess.run(["pkill", "-f", f"^sleep {token}"], check=True)


SHELLS = [
    shell for shell in ("dash", "bash", "busybox sh", "zsh") if shutil.which(shell.split()[0])
]


@contextlib.contextmanager
def guarded_by(shell: str, command: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command under the guard where /bin/sh is this shell; its leader's number is the pid."""
    line = apssh._guarded(command, apssh._Session(command, apssh.StepRecord())).replace(
        "/bin/sh", shell
    )
    with subprocess.Popen(
        ["sh", "-c", line],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=os.environ | {"SHELL": "/bin/sh"} | environment,
    ) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def watchdog_of(leader: int) -> tuple[int, str]:
    """The number and the command line of the watchdog that looks after this leader."""

    def find() -> tuple[int, str] | None:
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (folder / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
                if "apssh-guard" in words and str(leader) in words:
                    return int(folder.name), " ".join(words)
        return None

    found: tuple[int, str] = eventually(find)
    return found


@pytest.mark.parametrize("shell", SHELLS)
def test_guard_whatever_the_shell(shell: str) -> None:
    """TMOUT is the default time of read in bash; a signal that reaches the watchdog is no end."""
    with guarded_by(shell, "sleep 2; echo done", TMOUT="1") as process:
        number, line = watchdog_of(process.pid)
        assert not re.search("sleep|cat|kill|done", line)
        for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            os.kill(number, each)
        assert process.stdout
        assert process.stdout.read() == b"done\n"
        assert process.wait() == 0
        assert Path(f"/proc/{number}").exists()  # its stdin has not ended: sshd closes it by now
        assert process.stdin
        process.stdin.close()
        eventually(lambda: not Path(f"/proc/{number}").exists())


@pytest.mark.parametrize("shell", SHELLS)
def test_guard_ends_what_ignores_signals(shell: str) -> None:
    command = "trap '' TERM HUP; echo trapped; sleep 60 & sleep 60; sleep 60"
    with guarded_by(shell, command) as process:
        number, _ = watchdog_of(process.pid)
        assert process.stdin and process.stdout and process.stdout.readline() == b"trapped\n"
        process.stdin.close()
        assert process.wait(10) == -signal.SIGKILL
        eventually(lambda: not Path(f"/proc/{number}").exists())


async def test_guard_leaves_nothing_behind(sshd: Sshd) -> None:
    """It goes with its command; what a shell left on purpose stays."""
    async with sshd.node() as node:
        command = "echo $$ > leader; nohup sleep 60 >/dev/null 2>&1 & echo $! > left; sleep 1"
        task = asyncio.create_task(node.run(command))
        await eventually_async((sshd.home / "left").exists)
        leader = int(await eventually_async((sshd.home / "leader").read_text))
        number, _ = await asyncio.to_thread(watchdog_of, leader)
        assert await task == 0
        await eventually_async(lambda: not Path(f"/proc/{number}").exists())
        left = int((sshd.home / "left").read_text())
        assert Path(f"/proc/{left}").exists()
        os.kill(left, signal.SIGKILL)


@on_testbed
def test_dropbear_and_an_ordinary_login(capfd: Any) -> None:
    """Its process over there belongs to root, which may be neither signalled nor looked into."""
    token = f"93{os.getpid()}"

    async def main() -> None:
        async with box(1) as root:
            if await root.run("command -v dropbear >/dev/null"):
                pytest.skip("no dropbear on the test hosts")
            make = "dropbearkey -t ed25519 -f k >/dev/null 2>&1"
            start = "dropbear -p 2222 -r $d/k -P $d/pid"
            folder = "d=$(mktemp -d) && echo $d > /tmp/dropbear-of-tests && cd $d"
            assert await root.run(f"{folder} && {make} && {start}") == 0
            try:
                await commands(box(1, port=2222, username="tester", known_hosts=None))
            finally:
                stop = "d=$(cat /tmp/dropbear-of-tests); kill $(cat $d/pid); rm -r $d"
                assert await root.run(f"{stop} /tmp/dropbear-of-tests") == 0

    async def commands(node: SshNode) -> None:
        async with node:
            capfd.readouterr()
            assert await node.run("id -un") == 0
            assert await RunString("#!/bin/sh\nexit 4").co_run_remote(node) == 4
            assert await Run("cat", stdin=b"data\n").co_run_remote(node) == 0
            assert capfd.readouterr() == ("tester\ndata\n", "")
            for given in (None, b"data"):
                command = f"trap '' TERM; sleep {token} & sleep {token}"
                with pytest.raises(CommandFailedError):
                    await Run(command, timeout=1, stdin=given).co_run_remote(node)
            looking = Run(f"pgrep -f '^[s]leep {token}'", ignore_outputs=True)
            end = time.monotonic() + 10
            while await looking.co_run_remote(node) == 0:
                assert time.monotonic() < end, "still there"
            assert (
                await node.run(
                    f"sleep {token} >/dev/null & "
                    f"until pgrep -f '^[s]leep {token}'; do :; done; kill %1"
                )
                == 0
            )
            assert re.fullmatch(r"\d+\n", capfd.readouterr().out)  # it would have been seen

    run(main())


HINT = (
    "127.0.0.1: commands fail there because of their guard, which ends them with their connection "
    "(no POSIX shell, a forced command, or a start-up file that reads stdin?): "
    "--no-guard, guard=False, leaves it out\n"
)


@pytest.mark.parametrize(
    ("forced", "status"),
    [
        ("case $SSH_ORIGINAL_COMMAND in true) ;; *) echo only true; exit 7;; esac", 7),
        ('exec </dev/null; eval "$SSH_ORIGINAL_COMMAND"', "TERM"),
    ],
    ids=["allow list", "stdin taken"],
)
async def test_hosts_that_refuse_the_guard(
    make_sshd: Callable[..., Sshd], tmp_path: Path, forced: str, status: int | str, capfd: Any
) -> None:
    """The first command that fails for this reason alone says so, once."""
    script = tmp_path / "forced"
    script.write_text(f"#!/bin/sh\n{forced}\n")
    script.chmod(0o755)
    server = make_sshd(ForceCommand=script)
    formatter = apssh.CaptureFormatter()
    async with server.node(formatter=formatter) as node:
        assert await node.run("sleep 1; true" if status == "TERM" else "true") == status
        assert capfd.readouterr().err == HINT
        assert await node.run("sleep 1; true" if status == "TERM" else "true") == status
        assert capfd.readouterr().err == ""
    async with server.node(formatter=formatter, guard=False) as node:
        assert await node.run("true") == 0


@on_testbed
async def test_script_in_a_home_that_is_mounted_noexec(capfd: Any) -> None:
    async with box(formatter=apssh.CaptureFormatter()) as node:
        place = "/root/.apssh-remote"
        mount = f"mkdir -p {place} && mount -t tmpfs -o noexec,mode=700 none {place}"
        assert await node.run(mount) == 0
        try:
            assert await RunString("#!/bin/sh\ntrue").co_run_remote(node) == 126
            said = capfd.readouterr().err.splitlines()
            assert len(said) == 2
            assert "Permission denied" in said[0]
            assert re.fullmatch(
                rf"{re.escape(node.hostname)}: {place}/\w+ cannot be executed there; where its "
                "file system is mounted noexec, give the script as standard input: "
                "apssh -I ... sh -s < SCRIPT, stdin=",
                said[1],
            )
            assert await Run("sh -s", stdin=b"exit 4").co_run_remote(node) == 4
        finally:
            assert await node.run(f"umount {place}") == 0


async def test_failing_command_says_nothing_of_the_guard(sshd: Sshd, capfd: Any) -> None:
    async with sshd.node(formatter=apssh.CaptureFormatter()) as node:
        assert await node.run("exit 3") == 3
        assert await node.run("kill -TERM $$") == "TERM"
    assert capfd.readouterr() == ("", "")


async def test_channel_that_closes_without_a_status(keys: Path) -> None:
    """Some network devices do; the connection is still up."""

    async def device(process: asyncssh.SSHServerProcess[bytes]) -> None:
        process.stdout.write(b"shown\n")
        process.close()

    async with ssh_server(keys, process=device) as port:
        formatter = apssh.CaptureFormatter()
        options: dict[str, Any] = {"port": port, "known_hosts": None, "formatter": formatter}
        async with SshNode("127.0.0.1", **options) as node:
            with pytest.raises(CommandFailedError) as caught:
                await node.run("show")
            assert str(caught.value) == (
                "127.0.0.1: remote: ended without an exit status: show "
                "(--no-guard, guard=False, takes that for a success)"
            )
        async with SshNode("127.0.0.1", guard=False, **options) as node:
            assert await node.run("show") == 0
        assert formatter.get_capture() == "shown\nshown\n"


@pytest.mark.parametrize(("then", "told"), [("cut", ""), ("close", HINT)], ids=["cut", "close"])
async def test_no_status_of_what_asks_about_the_guard(
    keys: Path, then: str, told: str, capfd: Any
) -> None:
    """Nothing is known of a host that has gone; one that tells none fails."""
    begun: list[str] = []

    async def host(process: asyncssh.SSHServerProcess[bytes]) -> None:
        begun.append("")
        if len(begun) == 1:
            process.exit(1)
        elif then == "cut":
            process.get_extra_info("connection").abort()
        else:
            process.close()

    async with (
        ssh_server(keys, process=host) as port,
        SshNode("127.0.0.1", port=port, known_hosts=None) as node,
    ):
        assert await node.run("true") == 1
    assert (len(begun), capfd.readouterr().err) == (2, told)


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "without the guard"])
async def test_signal_without_a_name(keys: Path, guard: bool) -> None:
    """It is a failure like that of any other signal."""

    async def killed(process: asyncssh.SSHServerProcess[bytes]) -> None:
        process.exit_with_signal("")

    async with (
        ssh_server(keys, process=killed) as port,
        SshNode("127.0.0.1", port=port, known_hosts=None, guard=guard) as node,
    ):
        with pytest.raises(CommandFailedError) as caught:
            await Run("true").attempt(node, StepRecord())
        assert str(caught.value) == "127.0.0.1: signal: ended with signal unknown: true"


def test_loops_are_not_kept(sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []
    made = apssh._Loop

    def new_event_loop() -> asyncio.AbstractEventLoop:
        loop = made()
        loops.append(weakref.ref(loop))
        return loop

    monkeypatch.setattr(apssh, "_Loop", new_event_loop)
    for _ in range(3):
        assert apssh.run(sshd.target, "true")[0].ok
    gc.collect()
    assert len(loops) == 3
    assert [loop() for loop in loops] == [None, None, None]


def test_node_in_two_loops_that_run(sshd: Sshd) -> None:
    node = sshd.node()
    connected, done = threading.Event(), threading.Event()

    async def hold() -> None:
        await node.connect_lazy()
        connected.set()
        await asyncio.to_thread(done.wait, 30)
        await node.close()

    thread = threading.Thread(target=run, args=(hold(),))
    thread.start()
    connected.wait(30)
    try:
        with pytest.raises(UsageError) as caught:
            run(node.run("true"))
    finally:
        done.set()
        thread.join()
    assert str(caught.value) == (
        "127.0.0.1: local: it is connected in another event loop that runs: "
        "give each loop a node of its own, or close() it there first"
    )
    assert run(node.run("true")) == 0
    run(node.close())


async def test_without_the_guard(sshd: Sshd, capfd: Any) -> None:
    async with sshd.node(guard=False) as node:
        assert await node.run("cat; exit 5") == 5
        assert await node.run("echo lost; echo lost >&2; exit 6", ignore_outputs=True) == 6
        with pytest.raises(CommandFailedError):
            await node.run("sleep 0.1; cat > /dev/null; sleep 3", timeout=0.5)
    assert capfd.readouterr() == ("", "")


# --------------------------------------------------------------------------------------------------
# nodes
# --------------------------------------------------------------------------------------------------


class Sudoer:
    """A user of a testbed's host whom sudo there asks for a password."""

    def __init__(self, number: int, name: str, password: str, rules: str, nopasswd: bool) -> None:
        self.number, self.name, self.password = number, name, password
        allowed = f"{name} ALL=(ALL) {'NOPASSWD: ' * nopasswd}ALL\n"
        settings = "".join(f"Defaults:{name} {rule}\n" for rule in rules.split(","))
        self.host = TESTBED[number]
        self.as_root(
            f"useradd -m -s /bin/bash {name} && cd /home/{name} && "
            f"install -d -m 700 -o {name} .ssh && install -o {name} ~/.ssh/authorized_keys .ssh && "
            f"printf %s {shlex.quote(f'{name}:{password}')} | chpasswd && "
            f"printf %s {shlex.quote(settings + allowed)} > /etc/sudoers.d/{name}"
        )

    def as_root(self, command: str) -> str:
        """What a command of root's prints there."""
        held = apssh.CaptureFormatter()

        async def main() -> None:
            async with box(self.number, formatter=held) as node:
                assert await node.run(command) == 0, command

        asyncio.run(main())
        return held.get_capture()

    def remove(self) -> None:
        name = self.name
        self.as_root(
            f"pkill -KILL -u {name}; while pgrep -u {name}; do sleep 0.1; done; "
            f"userdel -f -r {name} 2>/dev/null; "
            f"rm -f /etc/sudoers.d/{name} /run/sudo/ts/{name} /var/lib/sudo/lectured/{name}"
        )

    def node(self, **options: Any) -> SshNode:
        return box(self.number, **{"username": self.name, "sudo_password": self.password} | options)

    def run(self, step: str | apssh.AbstractCommand, **options: Any) -> apssh.Result:
        """How a command ended there; one that is a line runs by sudo."""
        if isinstance(step, str):
            options = {"sudo": True} | options
        with_password = {"sudo_password": self.password} | options
        [result] = apssh.run(f"{self.name}@{self.host}", step, **REAL_HOSTS | with_password)
        return result

    @property
    def words(self) -> list[str]:
        """The options of a program that runs there as this user."""
        key = os.environ["TESTBED_KEY"]
        words = ["-F", "none", "--no-last", "--host-keys", "no", "-k", key, "-t"]
        return [*words, f"{self.name}@{self.host}"]


REAL_HOSTS: dict[str, Any] = {"keys": [os.environ.get("TESTBED_KEY", "")], "known_hosts": None}


@pytest.fixture
def sudoer() -> Iterator[Callable[..., Sudoer]]:
    """Makes users of the testbed's hosts who may do everything there by sudo; ``rules``: their
    settings of sudoers(5). They are gone afterwards, with all that sudo remembers of them.
    """
    made: list[Sudoer] = []

    def make(
        rules: str = "use_pty", *, number: int = 0, password: str = "", nopasswd: bool = False
    ) -> Sudoer:
        if "sudo" not in box_has_sudo(number):
            pytest.skip("no sudo is installed on the testbed's hosts")
        name = f"s{os.urandom(4).hex()}"
        secret = password or f"hush-{os.urandom(6).hex()}"
        made.append(Sudoer(number, name, secret, rules, nopasswd))
        return made[-1]

    yield make
    for one in made:
        one.remove()


@functools.cache
def box_has_sudo(number: int) -> str:
    """Where sudo is on a host of the testbed."""
    held = apssh.CaptureFormatter()
    asyncio.run(box(number, formatter=held).run("command -v sudo || echo none"))
    return held.get_capture()


class Asking:
    """A program at work that has a terminal to ask on, and its standard streams elsewhere, or there
    too.
    """

    def __init__(self, folder: Path, *argv: str, stdin: bytes = b"", streams: bool = True) -> None:
        self.terminal, theirs = pty.openpty()
        self._out, self._err = folder / "out", folder / "err"
        (folder / "in").write_bytes(stdin)
        with (
            open(folder / "in", "rb") as given,
            open(self._out, "wb") as out,
            open(self._err, "wb") as err,
        ):
            self.process = start_python(
                *on_its_terminal(str(theirs)),
                *argv,
                stdin=given if streams else theirs,
                stdout=out if streams else theirs,
                stderr=err if streams else theirs,
                pass_fds=[theirs],
                start_new_session=True,
            )
        os.close(theirs)
        self.seen = b""  # by who looks at the terminal

    @property
    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self.terminal)[3] & termios.ECHO)

    def prompt(self, text: str = "sudo password") -> None:
        """Wait until it asks: the prompt is there, and what is typed will not be shown."""
        while not self.seen.endswith(f"{text}: ".encode()):
            assert select.select([self.terminal], [], [], 30)[0], self.seen
            assert self.process.poll() is None, self.end()
            self.seen += os.read(self.terminal, 4096)
        eventually(lambda: not self.echoes)

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def end(self) -> tuple[int, bytes, bytes]:
        """Wait for its end: exit code, standard output and error."""
        code = self.process.wait(30)
        with contextlib.suppress(OSError):
            while select.select([self.terminal], [], [], 0)[0]:
                self.seen += os.read(self.terminal, 4096)
        return code, self._out.read_bytes(), self._err.read_bytes()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.terminal)


@pytest.fixture
def asking(tmp_path: Path) -> Iterator[Callable[..., Asking]]:
    """Starts programs that may ask on a terminal; ended afterwards."""
    made: list[Asking] = []

    def start(*argv: str, **options: Any) -> Asking:
        folder = tmp_path / f"asking{len(made)}"
        folder.mkdir()
        made.append(Asking(folder, *argv, **options))
        return made[-1]

    yield start
    for one in made:
        one.close()


ODD_PASSWORDS = ["a b'c\"d\\e$f`g", "ünï¢ødé", "%s%h %u", "-n", "#!\x7f\t;"]
PTY_OR_NOT = pytest.mark.parametrize("rules", ["use_pty", "!use_pty"])


@on_testbed
@PTY_OR_NOT
@pytest.mark.parametrize("nopasswd", [False, True], ids=["password", "NOPASSWD"])
def test_sudo_runs_commands_and_scripts(
    sudoer: Callable[..., Sudoer], rules: str, nopasswd: bool, home: Path
) -> None:
    """As root and as another user; with input, which never holds the password; what sudo itself
    says is none of the output.
    """
    user = sudoer(rules, nopasswd=nopasswd)
    (home / "go.sh").write_text('#!/bin/bash\n. "$(dirname "$0")/lib.sh"; say "$@"; cat; exit 3\n')
    (home / "lib.sh").write_text('say() { echo "$(id -un) $*"; }\n')
    data = bytes(range(256)) * 2000
    for command, options, status, out in [
        ("id -un; pwd; echo $HOME; cat", {}, 0, f"root\n/home/{user.name}\n/root\n"),
        ("id -un; cat; exit 7", {"sudo": "tester"}, 7, "tester\n"),
        ("echo $word", {"env": {"word": "a 'b"}}, 0, "a 'b\n"),
        ("cat", {"stdin": data}, 0, data),
        ("kill -TERM $$", {}, "TERM", ""),
        ("id -un; no-such-command", {}, 127, "root\n"),
        (RunScript("go.sh", "a  b", includes=["lib.sh"], sudo=True), {}, 3, "root a b\n"),
        (RunScript("go.sh", includes=["lib.sh"], sudo="tester"), {}, 3, "tester \n"),
        (RunString("id -un; cat", sudo="tester", stdin="in\n"), {}, 0, "tester\nin\n"),
    ]:
        result = user.run(command, **options)
        ended = (result.signal or result.status, result.stdout_bytes)
        assert ended == (status, out if isinstance(out, bytes) else out.encode()), command
    assert user.as_root(f"ls -A ~{user.name}/.apssh-remote; find /tmp -user {user.name}") == ""


@on_testbed
@pytest.mark.parametrize("rules", ["use_pty", "!use_pty", "requiretty"])
def test_sudo_with_a_terminal_over_there(sudoer: Callable[..., Sudoer], rules: str) -> None:
    user = sudoer(rules)
    result = user.run("id -un; test -t 0 && test -t 1 && echo tty", pty=True)
    assert (result.error, result.stdout_bytes.split()) == (None, [b"root", b"tty"])
    result = user.run("id -un", pty=True, sudo_password="wrong-one")
    assert result.error == "sudo: the password was refused"
    assert b"wrong-one" not in result.stdout_bytes + result.stderr_bytes


@on_testbed
@pytest.mark.parametrize("stdin", [None, "data"], ids=["no stdin", "stdin"])
@pytest.mark.parametrize(
    ("rules", "options", "why"),
    [
        ("use_pty", {"sudo_password": "wrong"}, "the password was refused"),
        ("use_pty,lecture=always", {"sudo_password": "wrong"}, "the password was refused"),
        ("passwd_tries=1", {"sudo_password": "wrong"}, "1 incorrect password attempt"),
        ("requiretty", {}, "sorry, you must have a tty to run sudo (--pty, pty=True, gives one)"),
        ("use_pty", {"sudo": "no-such-user"}, "unknown user no-such-user"),
    ],
)
def test_sudo_that_does_not_run_the_command(
    sudoer: Callable[..., Sudoer], rules: str, options: dict[str, Any], why: str, stdin: str | None
) -> None:
    user = sudoer(rules)
    result = user.run("echo never", stdin=stdin, **options)
    assert result.error == f"sudo: {why}"
    assert (result.kind, result.reached, result.stdout_bytes) == ("auth", True, b"")
    tries = user.as_root(
        "journalctl --sync; journalctl -o cat _COMM=sudo | "
        f"grep -c 'authentication failure.*user={user.name}' || true"
    )
    assert tries.strip() == ("1" if "sudo_password" in options else "0")


@on_testbed
def test_sudo_that_may_not_run_a_shell(sudoer: Callable[..., Sudoer]) -> None:
    """It prints the whole command, and the mark with it."""
    user = sudoer()
    user.as_root(f"echo '{user.name} ALL=(ALL) /bin/ls' > /etc/sudoers.d/{user.name}")
    result = user.run("echo " + "'it is long'" * 200)
    assert result.error == (
        f"sudo: Sorry, user {user.name} is not allowed to execute /bin/sh as root on box1."
    )
    assert (result.stdout_bytes, result.stderr_bytes) == (b"", b"")
    user.as_root(f"rm /etc/sudoers.d/{user.name}")
    result = user.run("true")
    assert result.error == f"sudo: {user.name} is not in the sudoers file."


@on_testbed
def test_sudo_output_is_the_command_s(sudoer: Callable[..., Sudoer]) -> None:
    """A lecture and what start-up files say come before, and are dropped with the question."""
    user = sudoer("lecture=always")
    result = user.run("echo out; echo err >&2")
    assert (result.stdout_bytes, result.stderr_bytes) == (b"out\n", b"err\n")
    noise = "head -c 300000 /dev/zero | tr '\\\\0' x >&2; echo hi"
    user.as_root(f'sed -i "1i {noise}" /home/{user.name}/.bashrc')
    result = user.run("echo out; echo err >&2")
    assert (result.stdout_bytes, result.stderr_bytes) == (b"hi\nout\n", b"err\n")


@on_testbed
@pytest.mark.parametrize("password", ODD_PASSWORDS)
def test_sudo_password_may_be_odd(sudoer: Callable[..., Sudoer], password: str) -> None:
    user = sudoer(password=password)
    assert user.run("id -un; cat").stdout == "root\n"


@on_testbed
def test_sudo_through_a_gateway(sudoer: Callable[..., Sudoer]) -> None:
    user = sudoer(number=1)

    async def main() -> None:
        held = apssh.CaptureFormatter()
        async with (
            box(0, username="tester") as gateway,
            user.node(gateway=gateway, formatter=held) as node,
        ):
            steps = Run("id -un", sudo=True), RunString("#!/bin/sh\nid -un; cat", sudo=True)
            assert [await step.attempt(node, StepRecord()) for step in steps] == [0, 0]
        assert held.get_capture() == "root\nroot\n"

    run(main())


@on_testbed
def test_sudo_asks_once_for_several_hosts(
    sudoer: Callable[..., Sudoer], asking: Callable[..., Asking], home: Path
) -> None:
    """On the terminal, whatever the standard streams are; the progress line waits meanwhile."""
    users = [sudoer(number=number, password="the same one") for number in (0, 1)]
    free = sudoer(number=2, nopasswd=True)
    words = [word for user in [*users, free] for word in user.words[-2:]]
    program = asking(*free.words[:-2], *words, "--sudo", "-I", "-b", "cat; id -un", stdin=b"in\n")
    program.prompt()
    program.type("the same one\n")
    code, out, err = program.end()
    names = apssh.fold_names([user.host for user in [*users, free]])
    title = f"{names} (3)"
    rule = "-" * len(title)
    assert (code, out.decode()) == (0, f"{rule}\n{title}\n{rule}\nin\nroot\n")
    assert program.seen.replace(b"\r\n", b"\n") == b"sudo password: \n"
    assert b"the same one" not in err
    (home / "go.sh").write_text("#!/bin/sh\necho $(id -un) $1\n")
    words = [*users[0].words, *users[1].words[-2:]]
    program = asking(*words, "--sudo=tester", "-u", "30", "-j", "-s", "go.sh", "one")
    program.prompt()
    program.type("the same one\n")
    code, out, err = program.end()
    assert code == 0
    assert [json.loads(line)["stdout"] for line in out.splitlines()] == ["tester one\n"] * 2


@on_testbed
def test_sudo_is_given_up_where_nobody_can_be_asked(sudoer: Callable[..., Sudoer]) -> None:
    user = sudoer()
    code, said = without_terminal(*user.words, "--sudo", "-q", "id")
    assert (code, said) == (1, [f"{user.host}: local: no terminal to ask: sudo password"])
    free = sudoer(nopasswd=True)
    assert without_terminal(*free.words, "--sudo", "-q", "true") == (0, [])


def test_interruption_while_a_passphrase_is_asked(
    sshd: Sshd, keys: Path, home: Path, asking: Callable[..., Asking]
) -> None:
    """Of a key that the config names, when its host is connected to: as while sudo asks."""
    (home / "cfg").write_text(f"IdentityFile {keys}/encrypted\n")
    program = asking("-F", "cfg", "-t", sshd.target, "id")
    program.prompt(f"passphrase for key {keys}/encrypted")
    program.type("\x03")
    eventually(lambda: program.echoes)
    code, out, err = program.end()
    assert (code, out) == (-signal.SIGINT, b"")
    assert err.decode() == "0 ok, 1 interrupted\n  interrupted: 127.0.0.1 (1)\n"


@on_testbed
@pytest.mark.parametrize("words", [["id -un"], ["-s", "id -un #"]], ids=["command", "script"])
def test_time_stands_still_while_sudo_asks(
    sudoer: Callable[..., Sudoer], asking: Callable[..., Asking], words: list[str]
) -> None:
    """How fast somebody types is no matter of the command."""
    user = sudoer()
    program = asking(*user.words, "-u", "4", "--sudo", *words)
    program.prompt()
    time.sleep(4.5)
    program.type(f"{user.password}\n")
    code, out, err = program.end()
    assert (code, out) == (0, f"{user.host}:root\n".encode()), err


@on_testbed
def test_interruption_while_sudo_asks(
    sudoer: Callable[..., Sudoer], asking: Callable[..., Asking]
) -> None:
    """The terminal shows again what is typed; a shell's loop around it ends too."""
    user = sudoer()
    program = asking(*user.words, "--sudo", "id")
    program.prompt()
    program.type("\x03")
    eventually(lambda: program.echoes)
    code, out, err = program.end()
    assert (code, out) == (-signal.SIGINT, b"")
    assert b"Traceback" not in err
    assert user.as_root(f"pgrep -u {user.name} -x sudo || true") == ""


@on_testbed
def test_no_progress_while_sudo_asks(
    sudoer: Callable[..., Sudoer], asking: Callable[..., Asking]
) -> None:
    user = sudoer()
    program = asking(*user.words, "--sudo", "sleep 2; id -un", streams=False)
    program.prompt()
    assert not select.select([program.terminal], [], [], 2)[0]
    program.type(f"{user.password}\n")
    code, _, _ = program.end()
    assert code == 0
    shown = program.seen.replace(b"\r\n", b"\n")
    assert shown.startswith(b"sudo password: \n0/1 done, 1 running: ")
    assert b":root\n" in shown


UNDER_SUDO = {
    "command": ([], "trap '' TERM HUP; sleep {0} & while :; do sleep {0}; done"),
    "printing": ([], "trap '' TERM HUP; sleep {0} & " + "while :; do echo noise; done"),
    "stdin": (["-I"], "trap '' TERM HUP; sleep {0} & while :; do sleep {0}; done"),
    "script": (["-s"], "#!/bin/bash\ntrap '' TERM HUP; sleep {0} & while :; do sleep {0}; done"),
}


@on_testbed
@PTY_OR_NOT
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind == "command" else pytest.mark.slow)
        for kind in UNDER_SUDO
    ],
)
@pytest.mark.parametrize("end", ["deadline", "Ctrl-C", "kill -9"])
def test_nothing_outlives_its_end_under_sudo(
    sudoer: Callable[..., Sudoer], asking: Callable[..., Asking], rules: str, kind: str, end: str
) -> None:
    """Though it ignores TERM and belongs to root: gone within 6 s, and its folder with it."""
    user = sudoer(rules)
    options, command = UNDER_SUDO[kind]
    token = f"93{int(user.name[1:], 16)}"
    deadline = ["-u", "3"] if end == "deadline" else []
    words = [*user.words, "--sudo", *deadline, *options]
    program = asking(*words, command.format(token), stdin=b"data\n")
    program.prompt()
    program.type(f"{user.password}\n")
    left = f"pgrep -u root -f '^sleep {token}' || true"
    eventually(lambda: user.as_root(left))
    if end == "kill -9":
        program.process.kill()
    elif end == "Ctrl-C":
        program.process.send_signal(signal.SIGINT)
    else:
        program.end()
    eventually(lambda: not user.as_root(left), 6)
    remains = f"pgrep -u {user.name}; pgrep -x sudo; ls -A /home/{user.name}/.apssh-remote || true"
    eventually(lambda: user.as_root(remains) == "", 6)


@on_testbed
def test_sudo_password_is_nowhere(
    sudoer: Callable[..., Sudoer], asking: Callable[..., Asking], home: Path
) -> None:
    """Neither here nor there, while the command runs: no argument, environment, file, record, log,
    repr or message holds it; the search finds one that is planted.
    """
    user = sudoer()
    secret = user.password
    (home / "jobs.yaml").write_text(
        f"nodes: [{{id: n, hostname: {user.host}, username: {user.name}, "
        f"keys: [{os.environ['TESTBED_KEY']}]}}]\n"
        "jobs: [{id: j, node: n, commands: [{type: Run, sudo: true, command: sleep 4}]}]\n"
    )
    words = [word for word in user.words if word != "--no-last"]
    programs = [
        asking(*words, "-D", "-v", "--sudo", "sleep 4; echo ended"),
        asking("--scenario", "jobs.yaml", "--record", "record.json", "-D", "-v"),
    ]
    for program in programs:
        program.prompt()
        program.type(f"{secret}\n")
    planted = subprocess.Popen(["sleep", "4"], env=os.environ | {"x": secret + "planted"})
    eventually(lambda: "sleep 4" in user.as_root("ps -e -o user,args | grep ^root"))
    look = (
        f"cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline; cat /tmp/* /home/{user.name}/.*; "
        "cat /var/log/*log; journalctl -n 300; true"
    )
    there = user.as_root(f"({look}) 2>/dev/null | tr '\\0' '\\n' | grep -a -e hush- -e 'sleep 4'")
    assert "sleep 4" in there
    assert secret not in there.replace(f"printf %s {user.name}:", "")
    here = b""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            here += (folder / "environ").read_bytes() + (folder / "cmdline").read_bytes()
    assert here.count(secret.encode()) == 1
    assert f"{secret}planted".encode() in here
    planted.wait()
    for program in programs:
        code, out, err = program.end()
        assert code == 0, err
        assert secret.encode() not in out + err + program.seen
        assert b"sleep 4" in err
    files = [path for path in home.rglob("*") if path.is_file()]
    assert {home / "record.json", home / ".apssh" / "last-ok"} <= set(files)
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    node = user.node()
    assert secret not in repr(node) + str(node)


class SudoServer:
    """What came of a server that plays sudo."""

    def __init__(self) -> None:
        self.target = ""
        self.heard: list[bytes] = []  # lines that it read, then the rest of its input


@contextlib.asynccontextmanager
async def sudo_server(
    keys: Path, *says: str, password: str = "", pieces: bool = False
) -> AsyncIterator[SudoServer]:
    """A host that says these things in place of running sudo, each (or each of its characters) in a
    packet of its own: on stdout what begins with ``out:``, PROMPT and MARK being the marks of the
    command. Where it says ``read`` it reads a line, and goes on when that is the password.
    """
    server = SudoServer()

    async def process(process: asyncssh.SSHServerProcess[bytes]) -> None:
        line = process.command or ""
        [prompt] = re.findall("sudo -S -p ([0-9a-f]{24}) ", line)
        [halves] = re.findall("printf %s ([0-9a-f]{12}) ([0-9a-f]{12}) >&2", line)
        for word in says:
            if word == "read":
                server.heard.append(await process.stdin.readline())
                if server.heard[-1] != f"{password}\n".encode():
                    word = "try again: PROMPT"
            text = word.replace("PROMPT", prompt).replace("MARK", "".join(halves))
            stream = process.stdout if text.startswith("out:") else process.stderr
            text = text.removeprefix("out:").removeprefix("read")
            for piece in text if pieces and len(text) < 1000 else [text]:
                stream.write(piece.encode())
                await stream.drain()
        await asyncio.sleep(0.2)  # for what should not come
        process.exit(0)
        server.heard.append(await process.stdin.read())

    async with ssh_server(keys, process=process) as port:
        server.target = f"{ME}@127.0.0.1:{port}"
        yield server


@pytest.mark.parametrize(
    ("says", "out", "err", "heard"),
    [
        (["PROMPT", "read", "MARK", "out:fine"], "fine", "", ["secret\n", ""]),
        (["MARK", "out:fine", "PROMPT"], "fine", "PROMPT", [""]),
        (["lecture: ", "PROMPT", "read", "\n", "MARKerr"], "", "err", ["secret\n", ""]),
        (["out:early", "warning\n", "MARK", "out:, late"], "early, late", "", [""]),
        (["x" * 300_000] * 5 + ["PROMPT", "read", "MARKerr"], "", "err", ["secret\n", ""]),
        (["PROMPT", "read", "PROMPT"], None, "the password was refused", None),
        (["sudo: no\n", "out:fine"], None, "no", None),
        ([], None, "it said nothing", None),
    ],
    ids=[
        *("asked", "asked by the command", "lecture", "out of order", "huge"),
        *("again", "words", "silent"),
    ],
)
@pytest.mark.parametrize("pieces", [False, True], ids=["whole", "pieces"])
async def test_what_sudo_says(
    keys: Path,
    says: list[str],
    out: str | None,
    err: str,
    heard: list[str] | None,
    pieces: bool,
) -> None:
    """The password is for its prompt alone, before the command begins. (A hostile host sees the
    prompt in the command line, and can ask as sudo does: who gives a password to a host trusts it.)
    """
    async with sudo_server(keys, *says, password="secret", pieces=pieces) as server:
        [result] = await apssh.co_run(
            server.target, "id", sudo=True, sudo_password="secret", known_hosts=None
        )
        if out is None:
            assert (result.kind, result.error) == ("auth", f"sudo: {err}")
            return
        shown = re.sub("[0-9a-f]{24}", "PROMPT", result.stderr)
        assert (result.error, result.stdout, shown) == (None, out, err)
        assert [line.decode() for line in server.heard] == heard


async def test_sudo_password_is_asked_anew_by_each_run(
    keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one loop, as in a notebook: a mistyped one is not remembered. A node that has its own asks
    nobody.
    """
    answers = ["wrong", "right"]
    monkeypatch.setattr(apssh, "_ask_secret", lambda prompt: answers.pop(0))
    says = "PROMPT", "read", "MARK", "out:fine"
    async with sudo_server(keys, *says, password="right") as server:

        async def outcome(**options: Any) -> str | None:
            [result] = await apssh.co_run(
                server.target, "id", sudo=True, known_hosts=None, **options
            )
            return result.error or result.stdout

        assert await outcome() == "sudo: the password was refused"
        assert await outcome() == "fine"
        assert await outcome(sudo_password="") == "sudo: the password was refused"
        assert await outcome(sudo_password="right") == "fine"


def test_failure_to_ask_for_sudo_ends_the_command(
    keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(prompt: str) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(apssh, "_ask_secret", fail)

    async def main() -> None:
        async with sudo_server(keys, "PROMPT", "read") as server:
            [result] = await apssh.co_run(server.target, "id", sudo=True, known_hosts=None)
            assert result.error == "sudo password: input/output error"

    run(main(), 10)


def test_sudo_misuse() -> None:
    with pytest.raises(UsageError) as caught:
        SshNode("h", sudo_password="a\nb")
    assert str(caught.value) == "sudo_password of h: there is a newline in it"


@pytest.mark.parametrize(
    ("hostname", "options", "message"),
    [
        ("", {}, "host '': a host is missing"),
        (None, {}, "host None: a host is missing"),
        ("a b", {}, "host 'a b': 'a b' is not a host name or an address"),
        ("-oX=y", {}, "host '-oX=y': '-oX=y' is not a host name or an address"),
        ("h", {"port": 0}, "host 'h': a port is a number from 1 to 65535"),
        ("h", {"port": "22"}, "host 'h': a port is a number from 1 to 65535"),
        ("h", {"timeout": -1}, "timeout -1: seconds, more than 0 (None: no limit)"),
        ("h", {"gateway": "gw"}, "gateway of h: an SshNode, not 'gw'"),
    ],
)
def test_node_misuse(hostname: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        SshNode(hostname, **options)
    assert str(caught.value) == message


def test_node_attributes() -> None:
    gateway = SshNode("gw")
    node = SshNode("box", username="me", port=2200, gateway=gateway)
    assert (node.hostname, node.username, node.port, node.gateway, gateway.username) == (
        "box",
        "me",
        2200,
        gateway,
        "root",
    )
    assert type(node.formatter) is apssh.HostFormatter
    assert (gateway.distance(), node.distance(), LocalNode().distance()) == (1, 2, 0)
    assert repr(node) == "<SshNode root@gw->me@box:2200>"
    assert not node.is_connected() and not node.is_sftp_connected()


def test_node_is_its_own_gateway() -> None:
    node = SshNode("box")
    node.gateway = node
    with pytest.raises(UsageError) as caught:
        run(node.run("true"))
    assert str(caught.value) == "box: its gateways go in a circle, through box"


def test_keys_are_known_by_name() -> None:
    """Keys are loaded once for all nodes that name the same."""
    one, same, other = (
        SshNode("h", keys=keys)._key_question()
        for keys in ([Path("a"), "b"], [Path("a"), "b"], Path("a"))
    )
    assert one == same != other


def test_hundreds_of_nodes_open_no_file() -> None:
    before = len(os.listdir("/proc/self/fd"))
    nodes = [SshNode(f"box{number}") for number in range(500)]
    assert len(os.listdir("/proc/self/fd")) == before and nodes


async def test_run_a_command(sshd: Sshd, capfd: Any) -> None:
    async with sshd.node() as node:
        assert node.is_connected()
        assert await node.run("echo out; echo err >&2; exit 3") == 3
        assert await node.run("kill -TERM $$") == "TERM"
        with pytest.raises(UsageError, match="an empty command"):
            await node.run("  ")
    assert not node.is_connected()
    assert capfd.readouterr() == ("127.0.0.1:out\n", "127.0.0.1:err\n")


async def test_first_uses_at_once_make_one_connection(make_sshd: Callable[..., Sshd]) -> None:
    sshd = make_sshd()
    before = sshd.logins()
    async with sshd.node() as node:
        assert await asyncio.gather(*(node.run("true") for _ in range(9))) == [0] * 9
        assert sshd.connections() == 1
    assert sshd.logins() == before + 1


async def test_closed_while_it_connects(
    make_sshd: Callable[..., Sshd], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection that comes later is not left to nobody."""
    sshd = make_sshd()
    node, connected, go_on = sshd.node(), asyncio.Event(), asyncio.Event()
    log_in = SshNode._log_in

    async def late(*args: Any) -> Any:
        link = await log_in(*args)
        connected.set()
        await go_on.wait()
        return link

    monkeypatch.setattr(SshNode, "_log_in", late)
    task = asyncio.create_task(node.run("true"))
    await connected.wait()
    await node.close()
    go_on.set()
    with pytest.raises(ConnectionFailedError) as caught:
        await task
    assert str(caught.value) == "127.0.0.1: lost: closed while it connected"
    await eventually_async(lambda: not sshd.connections())


async def test_cancelled_just_as_it_has_connected(
    make_sshd: Callable[..., Sshd], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is the node's, and closed with it."""
    sshd = make_sshd()
    node = sshd.node()
    log_in = SshNode._log_in

    async def ready(*args: Any) -> Any:
        link = await log_in(*args)
        task.cancel()
        return link

    monkeypatch.setattr(SshNode, "_log_in", ready)
    task = asyncio.create_task(node.run("true"))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (sshd.connections(), node.is_connected()) == (1, True)
    await node.close()
    await eventually_async(lambda: not sshd.connections())


async def test_work_that_is_shared_is_begun_once() -> None:
    """Who comes while somebody waits joins, though another has given up."""
    begun = 0

    async def work() -> str:
        nonlocal begun
        begun += 1
        await asyncio.sleep(0.3)
        return "done"

    tasks: dict[object, apssh._Shared] = {}
    ask = functools.partial(apssh._Shared.once, tasks, "it", work)
    first, second = asyncio.create_task(ask()), asyncio.create_task(ask())
    await asyncio.sleep(0.1)
    first.cancel()
    await asyncio.wait([first])
    assert (await ask(), await second, begun, tasks) == ("done", "done", 1, {})


@pytest.mark.parametrize(
    ("number", "why"),
    [(errno.ENOSPC, "no space left on device"), (errno.ETIMEDOUT, "connection timed out")],
    ids=["disk full", "file server away"],
)
@pytest.mark.parametrize("command", ["printf unfinished", "echo line; sleep 1"])
async def test_output_that_cannot_be_written(
    sshd: Sshd, command: str, number: int, why: str
) -> None:
    """A line while its command runs, or the last one when it has ended: no fault of the command,
    nor the end of its time.
    """

    class Fails(apssh.Formatter):
        def line(self, line: str, datatype: int | None, hostname: str) -> None:
            raise OSError(number, os.strerror(number))

    async with sshd.node(formatter=Fails()) as node:
        with pytest.raises(ApsshError) as caught:
            await node.run(command, timeout=30)
        assert str(caught.value) == f"127.0.0.1: local: its output could not be written: {why}"


async def test_formatter_that_fails_ends_the_command(sshd: Sshd) -> None:
    """Which has begun when the formatter hears of it."""
    token = f"89{os.getpid()}"

    class Fails(apssh.Formatter):
        def session_start(self, hostname: str, command: str) -> None:
            eventually(lambda: processes(f"sleep {token}"))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async with sshd.node(formatter=Fails()) as node:
        with pytest.raises(ApsshError) as caught:
            await node.run(f"sleep {token}")
        assert str(caught.value) == "127.0.0.1: local: on this machine: no space left on device"
        await eventually_async(lambda: not processes(f"sleep {token}"), 8)


def test_host_that_is_lost_while_a_folder_is_made(
    make_sshd: Callable[..., Sshd], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That host fails, and no other."""
    servers = make_sshd(), make_sshd()
    realpath = asyncssh.SFTPClient.realpath
    asked: list[str] = []

    async def lost(self: asyncssh.SFTPClient, *args: Any, **options: Any) -> Any:
        asked.append("")
        if len(asked) == 1:
            raise asyncssh.SFTPConnectionLost("Connection closed")
        return await realpath(self, *args, **options)

    monkeypatch.setattr(asyncssh.SFTPClient, "realpath", lost)
    results = apssh.run([server.target for server in servers], RunString("#!/bin/sh\ntrue"))
    assert sorted(str(result.kind) for result in results) == ["None", "lost"]


async def test_channel_that_opens_after_its_cancellation(
    sshd: Sshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is closed, and its command ends."""
    token = f"94{os.getpid()}"
    create = asyncssh.SSHClientConnection.create_session
    channels: list[asyncssh.SSHClientChannel[bytes]] = []

    async def late(self: asyncssh.SSHClientConnection, *args: Any, **options: Any) -> Any:
        opened = await create(self, *args, **options)
        channels.append(opened[0])
        await asyncio.sleep(0.3)
        return opened

    async with sshd.node() as node:
        monkeypatch.setattr(asyncssh.SSHClientConnection, "create_session", late)
        task = asyncio.create_task(node.run(f"sleep {token}"))
        await eventually_async(lambda: channels and processes(f"sleep {token}"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await eventually_async(lambda: channels[0].is_closing())
        await eventually_async(lambda: not processes(f"sleep {token}"), 8)


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
async def test_channel_that_is_refused_after_its_cancellation(
    sshd: Sshd, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody hears of that, on standard error neither."""
    asked, refused = asyncio.Event(), asyncio.Event()
    opening: set[Any] = set()
    said: list[str] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, context: said.append(context["message"]))
    monkeypatch.setattr(apssh, "CLOSE_TIMEOUT", 0.2)

    async def refuse(*args: Any, **options: Any) -> Any:
        opening.add(asyncio.current_task())
        asked.set()
        await refused.wait()
        raise asyncssh.ChannelOpenError(asyncssh.OPEN_CONNECT_FAILED, "no")

    async with sshd.node() as node:
        monkeypatch.setattr(asyncssh.SSHClientConnection, "create_session", refuse)
        task = asyncio.create_task(node.run("true"))
        await asked.wait()
        task.cancel()
        if not late:
            refused.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        refused.set()
    await asyncio.wait(opening)
    opening.clear()
    gc.collect()
    assert said == []


async def test_sink_that_fails_ends_a_command_with_stdin(
    sshd: Sshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose channel does not end by itself."""
    monkeypatch.setattr(apssh, "CAPTURE_LIMIT", 1000)
    token = f"85{os.getpid()}"

    async def given() -> AsyncIterator[bytes]:
        yield b"data\n"
        await asyncio.sleep(60)

    async with sshd.node() as node:
        step = Run(
            f"sleep {token} & while ! test -e go; do sleep 0.1; done; seq 1000; wait",
            stdin=given(),
            capture=Capture("x", Variables()),
        )
        task = asyncio.create_task(step.co_run_remote(node))
        await eventually_async(lambda: processes(f"sleep {token}"))
        (sshd.home / "go").touch()
        with pytest.raises(ApsshError, match="of output to hold"):
            await asyncio.wait_for(task, 5)
        await eventually_async(lambda: not processes(f"sleep {token}"))


@pytest.mark.parametrize("host", ["127.0.0.1", "LOCALNODE"])
def test_standard_input_that_fails(sshd: Sshd, host: str) -> None:
    async def given() -> AsyncIterator[bytes]:
        yield b"data\n"
        raise ValueError("no more")

    node = LocalNode() if host == "LOCALNODE" else sshd.node()
    error = failure_of(node.run("cat >/dev/null; sleep 30", stdin=given()))
    assert str(error) == f"{host}: local: standard input: no more"


@pytest.mark.parametrize(
    "subsystem", ["", "echo hello from a start-up file; exec "], ids=["cancelled", "garbage"]
)
async def test_sftp_that_does_not_come_holds_no_session(
    make_sshd: Callable[..., Sshd], subsystem: str
) -> None:
    """Whether it was cancelled as it opened, or a start-up file printed into it."""
    program = re.search(r"Subsystem sftp (.*)", (make_sshd().folder / "config").read_text())
    assert program
    sshd = make_sshd(
        MaxSessions=2,
        **{"Subsystem": f"sftp {subsystem}{program[1]}", "ForceCommand": "none"}
        if subsystem
        else {},
    )
    async with sshd.node() as node:
        for number in range(3 if subsystem else 8):  # the garbage takes 2 s each
            task = asyncio.create_task(node.sftp_connect_lazy())
            if subsystem:
                with pytest.raises(TransferError) as caught:
                    await task
                assert str(caught.value).startswith("127.0.0.1: remote: no SFTP over there: ")
            else:
                await asyncio.sleep(0.001 * number)  # at each point of the way
                task.cancel()
                await asyncio.wait([task])
        if subsystem:  # a server that has not noticed the end of a session refuses the next one
            await eventually_async(lambda: not sshd.below(program[1]))
        assert await asyncio.gather(node.run("true"), node.run("true")) == [0, 0]
        assert sshd.connections() == 1


async def test_cancelled_while_last_words_are_waited_for(
    make_sshd: Callable[..., Sshd], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a server that prints in place of SFTP, and does not end: its channel is closed."""
    sshd = make_sshd(MaxSessions=1, Subsystem="sftp echo hello; cat", ForceCommand="none")
    waits, last_words = asyncio.Event(), apssh._Sftp.last_words

    async def told(sftp: apssh._Sftp) -> str:
        waits.set()
        return await last_words(sftp)

    monkeypatch.setattr(apssh._Sftp, "last_words", told)
    async with sshd.node() as node:
        task = asyncio.create_task(node.sftp_connect_lazy())
        await waits.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        monkeypatch.setattr(SshNode, "_connect", refuse_to_connect)
        assert await node.run("true") == 0


async def test_sftp_that_never_answers(make_sshd: Callable[..., Sshd]) -> None:
    sshd = make_sshd(Subsystem="sftp sleep 30", ForceCommand="none")
    async with sshd.node(timeout=1) as node:
        error = await outcome(node, Push("/etc/passwd", "x"))
    assert error == "127.0.0.1: remote: no SFTP over there: no answer"


async def refuse_to_connect(*args: object) -> None:
    raise ConnectionFailedError("no further one", host="127.0.0.1", kind="refused")


async def test_gateway_that_takes_no_further_connection(
    sshd: Sshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command with standard input may not cut the connection that leads on."""
    async with sshd.node() as gateway, sshd.node(gateway=gateway) as node:
        monkeypatch.setattr(SshNode, "_connect", refuse_to_connect)
        with pytest.raises(ConnectionFailedError) as caught:
            await gateway.run("cat", stdin=b"x")
        assert str(caught.value) == "127.0.0.1: refused: no further one"
        assert await node.run("true") == 0


async def test_host_that_takes_no_session(make_sshd: Callable[..., Sshd]) -> None:
    """It is asked for a second, since it may not have noticed that one ended, and no longer."""
    sshd = make_sshd(MaxSessions=0)
    async with sshd.node() as node:
        with pytest.raises(ConnectionFailedError) as caught:
            await node.run("true")
        assert str(caught.value) == "127.0.0.1: refused: no session there: open failed"
    assert 1 < sshd.log().count("no more sessions") <= 21


async def test_sftp_that_ended_gives_its_session_back(
    make_sshd: Callable[..., Sshd], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a host takes one session on one connection, it is the command's then."""
    sshd = make_sshd(MaxSessions=1)
    async with sshd.node() as node:
        await node.sftp_connect_lazy()
        monkeypatch.setattr(SshNode, "_connect", refuse_to_connect)
        with pytest.raises(ConnectionFailedError) as caught:
            await node.run("true")
        assert str(caught.value) == "127.0.0.1: refused: no further one"
        (server,) = [
            process
            for process in descendants(sshd._process.pid)
            if "sftp-server" in Path(f"/proc/{process}/cmdline").read_text()
        ]
        os.kill(server, signal.SIGKILL)
        await eventually_async(lambda: not node.is_sftp_connected())
        assert await node.run("true") == 0
        await node.sftp_connect_lazy()


async def test_sftp_that_ends_as_soon_as_it_is_there(
    sshd: Sshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that looks for room has already forgotten it."""
    open_sftp = SshNode._open_sftp

    async def ends(node: SshNode, live: apssh._Live, link: apssh._Link) -> None:
        await open_sftp(node, live, link)
        assert live.sftp
        live.sftp.abort()
        live.room(alone=False)

    async with sshd.node() as node:
        monkeypatch.setattr(SshNode, "_open_sftp", ends)
        with pytest.raises(ConnectionFailedError) as caught:
            await node.mkdir("made")
        assert str(caught.value) == "127.0.0.1: lost: SFTP ended as soon as it was there"
        monkeypatch.setattr(SshNode, "_open_sftp", open_sftp)
        await node.mkdir("made")
    assert (sshd.home / "made").is_dir()


async def test_sftp_that_ended_opens_anew(make_sshd: Callable[..., Sshd], home: Path) -> None:
    """Its server was killed, or sshd's ChannelTimeout ended it: the connection is as good as
    before.
    """
    sshd = make_sshd()
    async with sshd.node() as node:
        await node.put_file_s("/etc/passwd", "first")
        (server,) = [
            process
            for process in descendants(sshd._process.pid)
            if "sftp-server" in Path(f"/proc/{process}/cmdline").read_text()
        ]
        os.kill(server, signal.SIGKILL)
        await eventually_async(lambda: not node.is_sftp_connected())
        await node.put_file_s("/etc/passwd", "second")
        assert sshd.logins() == 1
        (link,) = node._live.links if node._live else ()
        assert link.sessions == 1
    assert (sshd.home / "second").read_bytes() == Path("/etc/passwd").read_bytes()


async def test_more_sessions_than_sshd_allows(make_sshd: Callable[..., Sshd]) -> None:
    server = make_sshd(MaxSessions=3)
    async with server.node() as node:
        assert await asyncio.gather(*(node.run("sleep 0.2") for _ in range(30))) == [0] * 30
        assert server.connections() <= apssh.CONNECTIONS_PER_NODE


async def test_more_commands_than_sessions_and_connections(
    make_sshd: Callable[..., Sshd], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that come later wait until one ends."""
    monkeypatch.setattr(apssh, "SESSIONS_PER_CONNECTION", 2)
    monkeypatch.setattr(apssh, "CONNECTIONS_PER_NODE", 2)
    server = make_sshd()
    command = "mktemp up.XXXXXX >/dev/null; while ! test -e go; do sleep 0.1; done"
    async with server.node() as node:
        tasks = [asyncio.create_task(node.run(command)) for _ in range(8)]
        await eventually_async(lambda: len(list(server.home.glob("up.*"))) == 4)
        (server.home / "go").touch()
        assert await asyncio.gather(*tasks) == [0] * 8
        assert server.logins() == 2


async def test_host_that_takes_no_further_connection_while_one_is_at_work(
    make_sshd: Callable[..., Sshd], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked once, and then waited for."""
    server = make_sshd(MaxSessions=1)
    loop, refused = asyncio.get_running_loop(), list[OSError]()
    connect = loop.create_connection

    async def told(*args: Any, **options: Any) -> Any:
        try:
            return await connect(*args, **options)
        except OSError as exc:
            refused.append(exc)
            raise

    monkeypatch.setattr(loop, "create_connection", told)
    async with server.node() as node:
        first = asyncio.create_task(node.run("touch up; while ! test -e go; do sleep 0.1; done"))
        await eventually_async((server.home / "up").exists)
        server.stop()
        second = asyncio.create_task(node.run("touch too"))
        await eventually_async(lambda: refused)
        await asyncio.sleep(0.3)  # it would be asked again meanwhile
        (server.home / "go").touch()
        assert [await first, await second] == [0, 0]
    assert len(refused) == 1 and (server.home / "too").exists()


@pytest.mark.parametrize("most", [1, 2, 4])
async def test_sessions_and_sftp_where_few_are_allowed(
    make_sshd: Callable[..., Sshd], most: int
) -> None:
    """Commands, one after the other and at once, scripts and copies: a refused session is asked for
    again, or elsewhere.
    """
    server = make_sshd(MaxSessions=most)
    async with server.node() as node:
        assert [await node.run("true") for _ in range(20)] == [0] * 20
        busy = [asyncio.create_task(node.run("touch up; sleep 1")) for _ in range(most)]
        await eventually_async((server.home / "up").exists)
        await node.mkdir("made")
        steps = [each for _ in range(6) for each in (Run("exit 3"), RunString("exit 3"))]
        assert await asyncio.gather(*(each.co_run_remote(node) for each in steps)) == [3] * 12
        assert await asyncio.gather(*busy) == [0] * most and (server.home / "made").is_dir()


async def test_work_that_is_being_given_up_is_joined_by_nobody(
    sshd: Sshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes while a connection, or the loading of keys, is being cancelled begins anew."""
    load = apssh._keys_to_offer
    slow = threading.Event()

    def load_slowly(*args: Any) -> Any:
        slow.wait(5)
        return load(*args)

    monkeypatch.setattr(apssh, "_keys_to_offer", load_slowly)
    first = asyncio.create_task(sshd.node().run("true"))
    await asyncio.sleep(0)
    await eventually_async(lambda: apssh._Limits.here()._asking)
    first.cancel()
    second = sshd.node()
    task = asyncio.create_task(second.run("true"))
    await asyncio.sleep(0.1)
    slow.set()
    assert await task == 0
    with pytest.raises(asyncio.CancelledError):
        await first
    await second.close()


async def test_no_deadline_is_needed_where_a_script_cannot_be_sent(home: Path, keys: Path) -> None:
    """The time of a step bounds the upload of its script too."""
    over = asyncio.Event()

    class Stuck(asyncssh.SFTPServer):
        async def open(  # type: ignore[override]
            self, path: bytes, pflags: int, attrs: asyncssh.SFTPAttrs
        ) -> Any:
            await over.wait()

    async def shell(process: Any) -> None:
        process.stdout.write(b"/home/x/.apssh-remote/1\n")
        process.exit(0)

    async with ssh_server(keys, process=shell, sftp=Stuck) as port:
        node = SshNode("127.0.0.1", port=port, username=ME)
        begin = time.monotonic()
        error = await outcome(node, RunString("true", timeout=0.5))
        assert (
            error == "127.0.0.1: timeout: no end within 0.5 s: RunString: true..."
            and time.monotonic() - begin < 6
        )
        over.set()
        await node.close()


async def test_max_startups(make_sshd: Callable[..., Sshd]) -> None:
    server = make_sshd(MaxStartups="2:50:4")
    nodes = [server.node(timeout=60) for _ in range(25)]
    assert await asyncio.gather(*(node.run("true") for node in nodes)) == [0] * 25
    await asyncio.gather(*(node.close() for node in nodes))


@pytest.mark.parametrize("hops", [2, 4])
async def test_gateways_are_shared(make_sshd: Callable[..., Sshd], hops: int) -> None:
    servers = [make_sshd() for _ in range(hops)]
    gateway: SshNode | None = None
    for server in servers[:-1]:
        gateway = server.node(gateway=gateway)
    nodes = [servers[-1].node(gateway=gateway) for _ in range(5)]
    assert nodes[0].distance() == hops
    assert await asyncio.gather(*(node.run("true") for node in nodes)) == [0] * 5
    assert [server.connections() for server in servers] == [1] * (hops - 1) + [5]
    for node in (*nodes, *nodes[0]._hops()[:-1][::-1]):
        await node.close()
    await eventually_async(lambda: not any(server.connections() for server in servers))


async def test_gateway_waits_apart_from_the_others(
    sshd: Sshd, make_sshd: Callable[..., Sshd]
) -> None:
    """Behind it time runs: thousands of direct hosts before it in the queue must not use it up."""
    other = make_sshd()
    slots = apssh._Limits.here().gate(apssh.HANDSHAKES, "handshake", False)
    for _ in range(apssh.HANDSHAKES):
        await slots.acquire()
    direct, gateway = sshd.node(), sshd.node()
    behind = other.node(gateway=gateway)
    task = asyncio.create_task(direct.run("true"))
    waiting = asyncio.create_task(behind.run("true"))
    await eventually_async(gateway.is_connected)
    assert not direct.is_connected()
    for _ in range(apssh.HANDSHAKES):
        slots.release()
    assert await asyncio.gather(task, waiting) == [0, 0]
    for node in (direct, behind, gateway):
        await node.close()


async def test_gateway_that_fails(sshd: Sshd) -> None:
    port = free_port()
    node = sshd.node(gateway=SshNode("127.0.0.1", port=port, username=ME))
    with pytest.raises(ConnectionFailedError) as caught:
        await node.run("true")
    assert (
        str(caught.value)
        == f"127.0.0.1: refused: gateway 127.0.0.1: nothing listens on port {port}"
    )
    behind = SshNode("127.0.0.1", port=port, username=ME, gateway=sshd.node())
    with pytest.raises(ConnectionFailedError) as caught:
        await behind.run("true")
    assert str(caught.value) == f"127.0.0.1: refused: nothing listens on port {port}"
    assert behind.gateway
    await behind.gateway.close()


def descendants(process: int) -> list[int]:
    children = [
        int(each) for each in Path(f"/proc/{process}/task/{process}/children").read_text().split()
    ]
    return [*children, *(each for child in children for each in descendants(child))]


async def test_gateway_that_dies(make_sshd: Callable[..., Sshd]) -> None:
    """With fifty hosts behind it: each is told of, nothing hangs, the next use connects anew."""
    server, inner = make_sshd(), make_sshd()
    gateway = server.node()
    nodes = [inner.node(gateway=gateway) for _ in range(50)]
    tasks = [
        asyncio.create_task(node.run("mktemp up.XXXXXX >/dev/null; sleep 60")) for node in nodes
    ]
    await eventually_async(lambda: len(list(inner.home.glob("up.*"))) == 50, 60)
    for process in descendants(server._process.pid):
        os.kill(process, signal.SIGKILL)
    ended = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
    assert {type(each) for each in ended} == {ConnectionFailedError} and {
        each.kind for each in ended
    } == {"lost"}
    assert await nodes[0].run("true") == 0
    await asyncio.gather(*(node.close() for node in nodes))
    await gateway.close()


def failure_of(work: Coroutine[Any, Any, Any]) -> ApsshError:
    with pytest.raises(ApsshError) as caught:
        run(work)
    return caught.value


def test_unreachable_hosts(sshd: Sshd, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    assert (
        str(failure_of(SshNode("127.0.0.1", port=port).run("true")))
        == f"127.0.0.1: refused: nothing listens on port {port}"
    )
    for number, words, said in (
        (socket.EAI_NONAME, "Name or service not known", "unknown host name web1"),
        (
            socket.EAI_AGAIN,
            "Temporary failure in name resolution",
            "host name web1: temporary failure in name resolution",
        ),
    ):
        answer = unittest.mock.Mock(side_effect=socket.gaierror(number, words))
        monkeypatch.setattr(socket, "getaddrinfo", answer)
        assert str(failure_of(SshNode("web1").run("true"))) == f"web1: dns: {said}"


def test_time_stands_still_while_look_ups_queue(
    sshd: Sshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One at a time, these take longer than each host may."""
    real = socket.getaddrinfo

    def slow(host: str, *args: Any, **keywords: Any) -> Any:
        time.sleep(0.8)
        return real("127.0.0.1", *args, **keywords)

    monkeypatch.setattr(apssh, "LOOKUPS", 1)
    monkeypatch.setattr(socket, "getaddrinfo", slow)
    results = apssh.run(
        "web[1-8]", "true", login=ME, port=sshd.port, known_hosts=None, connect_timeout=5
    )
    assert [result.error for result in results] == [None] * 8


@pytest.mark.parametrize("more", [0, 1])
async def test_no_file_can_be_opened_any_more(sshd: Sshd, keys: Path, more: int) -> None:
    """It is this machine's failure, and not the host's; what is connected goes on."""
    key = asyncssh.read_private_key(keys / "id_ed25519")
    node = sshd.node(keys=[key], known_hosts=None)
    async with sshd.node() as connected:
        gc.collect()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + more, hard))
        try:
            with pytest.raises(ConnectionFailedError) as caught:
                await node.run("true")
            assert await connected.run("true") == 0
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert str(caught.value) == "127.0.0.1: local: too many open files"
    assert await node.run("true") == 0
    await node.close()


def test_refused_key(sshd: Sshd, keys: Path) -> None:
    error = failure_of(sshd.node(keys=[keys / "other"]).run("true"))
    assert str(error) == f"127.0.0.1: auth: login as {ME} refused, after 1 key"
    assert isinstance(error, ConnectionFailedError) and error.kind == "auth"


@pytest.mark.parametrize("password", [None, "wrong"])
async def test_words_about_a_password(password: str | None, keys: Path) -> None:
    """Only a password that there is was tried."""
    async with ssh_server(keys, server=password_server("password")) as port:
        with pytest.raises(ConnectionFailedError) as caught:
            await SshNode(
                "127.0.0.1", port=port, username=ME, keys=[keys / "other"], password=password
            ).run("true")
        assert caught.value.message == f"login as {ME} refused, after 1 key" + (
            " and the password" if password else ""
        )


@pytest.mark.parametrize(
    ("sends", "endless", "message"),
    [
        (b"", False, "timeout: no connection within 0.5 s: connected, but the server says nothing"),
        (
            b"SSH-2.0-stalls\r\n",
            False,
            "timeout: no connection within 0.5 s: the key exchange does not end",
        ),
        (b"word\r\n" * 100, True, "refused: not an ssh server: it says 'word'"),
        (
            b"HTTP/1.1 400 Bad Request\r\n\x1b[2J\r\n\r\n",
            False,
            "timeout: no connection within 0.5 s: not an ssh server: "
            "it says 'HTTP/1.1 400 Bad Request'",
        ),
    ],
    ids=["silent", "stalls", "endless", "http"],
)
async def test_servers_that_are_none(sends: bytes, endless: bool, message: str) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(sends)
        while endless:
            writer.write(sends)
            await writer.drain()
            await asyncio.sleep(0)
        await reader.read()

    async with raw_server(talk) as port:
        begin = time.monotonic()
        with pytest.raises(ConnectionFailedError) as caught:
            await SshNode("127.0.0.1", port=port, timeout=0.5).run("true")
        assert time.monotonic() - begin < 5
        assert str(caught.value) == f"127.0.0.1: {message}"


@pytest.mark.parametrize("reset", [False, True])
async def test_server_that_drops_before_login(reset: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apssh, "RETRIES_BEFORE_LOGIN", 2)
    tries = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tries.append(1)
        if reset:
            writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
        writer.transport.abort() if reset else writer.close()

    async with raw_server(talk) as port:
        with pytest.raises(ConnectionFailedError) as caught:
            await SshNode("127.0.0.1", port=port).run("true")
        assert str(caught.value) == "127.0.0.1: lost: dropped before login, 3 times"
        assert len(tries) == 3


async def test_lost_connection_is_a_failure(sshd: Sshd) -> None:
    node = sshd.node()
    task = asyncio.create_task(node.run("touch here; sleep 30"))
    await eventually_async((sshd.home / "here").exists)
    (await node.connect_lazy()).abort()
    with pytest.raises(ConnectionFailedError) as caught:
        await task
    assert str(caught.value) == "127.0.0.1: lost: connection lost during touch here; sleep 30"
    assert await node.run("true") == 0  # connects anew, by itself
    await node.close()


class CutsAsItOpens(asyncssh.SSHServer):
    """The connection is cut when a channel is asked for, or a command or SFTP in it, or, by the
    client, just as this is granted.
    """

    when = "channel"
    client: asyncssh.SSHClientConnection
    asked: ClassVar[list[str]] = []

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._conn = conn

    def session_requested(self) -> Any:
        self.asked.append("channel")
        if self.when == "channel":
            self._conn.abort()
            return False
        session: Any = asyncssh.SSHServerSession()
        session.exec_requested = session.subsystem_requested = self._requested
        return session

    def _requested(self, what: str) -> bool:
        if self.when == "request":
            self._conn.abort()
        else:  # the answer is there by then, and looked at after it
            asyncio.get_running_loop().call_soon(self.client.abort)
        return True


@pytest.mark.parametrize("when", ["channel", "request", "granted"])
async def test_connection_that_goes_as_a_command_begins(
    keys: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host may have got it, and run it."""
    monkeypatch.setattr(CutsAsItOpens, "when", when)
    async with (
        ssh_server(keys, server=CutsAsItOpens, process_factory=None) as port,
        SshNode("127.0.0.1", port=port, username=ME) as node,
    ):
        CutsAsItOpens.client = await node.connect_lazy()
        step = StepRecord()
        with pytest.raises(ConnectionFailedError) as caught:
            await Run("true").attempt(node, step)
    why = "" if when == "granted" else ": Connection lost"
    assert str(caught.value) == f"127.0.0.1: lost: connection lost during true{why}"
    assert step.may_run


async def test_command_that_may_have_begun_is_not_run_again(
    keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CutsAsItOpens, "asked", [])
    async with ssh_server(keys, server=CutsAsItOpens, process_factory=None) as port:
        (result,) = await apssh.co_run(f"{ME}@127.0.0.1:{port}", "true", retries=1)
    assert (result.error, result.kind, result.reached, result.may_run) == (
        "connection lost during true: Connection lost",
        "lost",
        True,
        True,
    )
    assert CutsAsItOpens.asked == ["channel"]


@pytest.mark.parametrize("when", ["channel", "request", "granted"])
async def test_connection_that_goes_as_sftp_begins(
    keys: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CutsAsItOpens, "when", when)
    async with (
        ssh_server(keys, server=CutsAsItOpens, process_factory=None) as port,
        SshNode("127.0.0.1", port=port, username=ME) as node,
    ):
        CutsAsItOpens.client = await node.connect_lazy()
        with pytest.raises(ConnectionFailedError) as caught:
            await node.mkdir("made")
    why = "connection lost" if when == "granted" else "Connection lost"
    assert str(caught.value) == f"127.0.0.1: lost: {why}"


@pytest.mark.parametrize(
    "keepalive", [0.3, pytest.param(apssh.KEEPALIVE_INTERVAL, marks=pytest.mark.slow)]
)
async def test_frozen_peer_is_found(keepalive: float) -> None:
    """A host that answers no more: keepalives tell, by default within 30 seconds."""

    async def sleeps(process: Any) -> None:
        process.stdout.write(b"begun\n")
        await process.channel.wait_closed()

    frozen = asyncio.Event()
    async with (
        ssh_server(Path(os.environ["HOME"], ".ssh"), process=sleeps) as inner,
        raw_server(network(inner, frozen)) as port,
    ):
        node = SshNode("127.0.0.1", port=port, keepalive=keepalive, guard=False, username=ME)
        task = asyncio.create_task(node.run("anything"))
        await eventually_async(lambda: node.is_connected())
        frozen.set()
        begin = time.monotonic()
        with pytest.raises(ConnectionFailedError) as caught:
            await task
        assert caught.value.kind == "lost" and time.monotonic() - begin < 30
        await node.close()


def test_loop_that_is_gone_leaves_nothing(make_sshd: Callable[..., Sshd]) -> None:
    sshd = make_sshd()
    node = sshd.node()
    for _ in range(2):  # the second use drops the socket of the first and connects anew
        assert asyncio.run(node.run("true")) == 0
        eventually(lambda: sshd.connections() == 1)
    asyncio.run(node.close())
    eventually(lambda: sshd.connections() == 0)


def test_node_that_is_forgotten_leaves_no_socket(make_sshd: Callable[..., Sshd]) -> None:
    sshd = make_sshd()
    assert asyncio.run(sshd.node().run("true")) == 0
    gc.collect()
    eventually(lambda: sshd.connections() == 0)


@pytest.mark.parametrize(
    ("step", "out"),
    [
        (Run("echo $FOO", env={"FOO": 'a\'b "c" $d\n!'}), 'a\'b "c" $d !\n'),
        pytest.param(Run("test -t 1 && echo terminal", pty=True), "terminal\n", marks=as_root),
    ],
    ids=["environment", "terminal"],
)
async def test_environment_and_terminal(step: Run, out: str, sshd: Sshd, capfd: Any) -> None:
    async with sshd.node(formatter=apssh.RawFormatter()) as node:
        await step.co_run_remote(node)
    assert capfd.readouterr().out.replace("\r", "") == out


async def test_methods_for_files(sshd: Sshd, home: Path) -> None:
    async with sshd.node() as node:
        (home / "f").write_text("text")
        await node.mkdir("a/b")
        await node.mkdir("a/b")
        await node.put_file_s(["f"], "a/b")
        await node.get_file_s("a/b/f", "back")
        await node.put_string_script("#!/bin/sh\nexit 4\n", "a/script")
        assert await node.run("a/script") == 4
        assert node.is_sftp_connected()
        with pytest.raises(TransferError) as caught:
            await node.mkdir("a/script/x")
        assert str(caught.value).startswith("127.0.0.1: remote: a/script/x: ")
    assert (home / "back").read_text() == "text"


async def test_local_node(home: Path, capfd: Any) -> None:
    node = LocalNode()
    async with node:
        assert (
            node.hostname,
            node.username,
            node.is_connected(),
            node.is_sftp_connected(),
        ) == ("LOCALNODE", ME, True, True)
        assert repr(node) == "<LocalNode>"
        await node.sftp_connect_lazy()
        assert await node.run("pwd; cat; echo err >&2; exit 3") == 3
        assert await node.run("kill -KILL $$") == "KILL"
        await node.mkdir("d/e")
        await node.put_string_script("exit 5", "d/script")
        assert await node.run("d/script") == 5
        await node.put_file_s("d/script", "d/e/")
        await node.get_file_s("d/e", "f", recurse=True)
        with pytest.raises(TransferError) as refused:
            await node.get_file_s(["d"], "d/e", recurse=True)
        assert str(refused.value) == "LOCALNODE: local: d: cannot be copied into itself"
        with pytest.raises(TransferError) as refused:  # it would be emptied before it is read
            await node.put_file_s("d/script", "d/script", inplace=True)
        assert str(refused.value) == "LOCALNODE: local: d/script: cannot be copied into itself"
        await node.get_file_s("/et[c]/passw[d]", "users")
        with pytest.raises(CommandFailedError) as caught:
            await node.run("sleep 30", timeout=0.2)
        assert str(caught.value) == "LOCALNODE: timeout: no end within 0.2 s: sleep 30"
        with pytest.raises(CommandFailedError) as caught:  # as with ssh
            await node.run(f"sleep 86{os.getpid()} & echo $! > left", timeout=0.5)
        assert str(caught.value).endswith("> left (it may still be running)")
        await eventually_async(lambda: processes(f"sleep 86{os.getpid()}"))
        os.kill(int(Path("left").read_text()), signal.SIGKILL)
        assert await Run("read x; test $x = 12; exit $?", stdin=b"12\n").co_run_local(node) == 0
        with pytest.raises(UsageError) as misused:
            await Run("tty", pty=True).co_run_local(node)
        assert str(misused.value) == "LOCALNODE: local: pty and sudo are for commands on an SshNode"
    assert sorted(str(path.relative_to(home)) for path in home.rglob("d/**/*")) == [
        "d/e",
        "d/e/script",
        "d/script",
    ]
    assert (home / "f" / "script").read_text() == "exit 5"
    assert (home / "users").read_text() == Path("/etc/passwd").read_text()
    assert capfd.readouterr() == (f"LOCALNODE:{home}\n", "LOCALNODE:err\n")


@pytest.mark.parametrize("host", ["127.0.0.1", "LOCALNODE"])
def test_time_of_a_command_whose_input_does_not_come(sshd: Sshd, host: str) -> None:
    async def given() -> AsyncIterator[bytes]:
        yield b"data\n"
        await asyncio.sleep(60)

    node = LocalNode() if host == "LOCALNODE" else sshd.node()
    error = failure_of(node.run("cat >/dev/null", stdin=given(), timeout=0.3))
    assert str(error) == f"{host}: timeout: no end within 0.3 s: cat >/dev/null"


def test_local_input_whatever_numbers_are_free() -> None:
    """The guard uses those from 3 on."""
    done = run_python(
        "-c",
        "import asyncio, os, apssh\n"
        "held = [os.open('/dev/null', 0) for _ in range(3)]\n"
        "async def main():\n"
        "    for each in held: os.close(each)\n"
        "    return await apssh.LocalNode().run('cat', stdin=b'data')\n"
        "print(asyncio.run(main()))",
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("LOCALNODE:data\n0\n", "")


async def test_local_output_that_cannot_be_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command fails, and is ended."""
    token = f"87{os.getpid()}"

    loop = asyncio.get_running_loop()
    connect, pipes = loop.connect_read_pipe, list[Any]()

    async def full(protocol: Any, pipe: Any) -> Any:
        pipes.append(pipe)
        if len(pipes) == 1:
            return await connect(protocol, pipe)
        await eventually_async(lambda: processes(f"sleep {token}"))
        pipe.close()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(loop, "connect_read_pipe", full)
    with pytest.raises(ApsshError) as caught:
        await LocalNode().run(f"sleep {token}")
    assert str(caught.value) == "LOCALNODE: local: on this machine: no space left on device"
    await eventually_async(lambda: not processes(f"sleep {token}"), 8)


def test_local_node_knows_the_home_and_globs(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    build(tmp_path, {"one": "1", "two": "2", "in/": ""})
    build(home, {"a.log": "a", "b.log": "b"})
    run(Push(["one", "two"], "~/").co_run_local(LocalNode()))
    run(Pull(["~/*.log", "one"], "in").co_run_local(LocalNode()))
    assert (home / "one").read_text() + (home / "two").read_text() == "12"
    assert sorted(os.listdir("in")) == ["a.log", "b.log", "one"]


def test_local_script_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/proc/none")
    with pytest.raises(TransferError) as caught:
        run(RunString("true").co_run_local(LocalNode()))
    assert re.fullmatch(
        r"LOCALNODE: local: /proc/none/\.apssh-remote: .*",
        str(caught.value),
    )


# --------------------------------------------------------------------------------------------------
# commands
# --------------------------------------------------------------------------------------------------


LINE_VARIABLES = Variables(known="value")


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (Run("ls", "-l", 3), "ls -l 3"),
        (Run("a  b"), "a b"),
        (Run("x", label="text"), "text"),
        (Run("x", label=""), ""),
        (Run("echo", Deferred("{{known}} {{unknown}}", LINE_VARIABLES)), "echo value {{unknown}}"),
        (Run("time", Run("ls", "/")), "time ls /"),
        (RunScript("dir/check.sh", "a", 1), "RunScript: check.sh a 1"),
        (RunScript("check.sh"), "RunScript: check.sh"),
        (
            RunString("#!/bin/sh\n# about\n\n  echo a long first line\n", "x"),
            "RunString: echo a long fir... x",
        ),
        (RunString("ls"), "RunString: ls..."),
        (Push("a", "b"), "Push: a onto b"),
        (Push(["a", "b", "c"], "d"), "Push: a ... (3 total) onto d"),
        (Pull("a", "b"), "Pull: a into b"),
        (Pull([Deferred("{{known}}", LINE_VARIABLES)], "b"), "Pull: value into b"),
        (apssh.AbstractCommand(), "AbstractCommand"),
    ],
)
def test_one_line_text(command: apssh.AbstractCommand, line: str) -> None:
    assert command.listing_line() == line


class Passes(apssh.AbstractCommand):
    """As users write them: it hands on what it does not know."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords)


STDIN_ONCE = (
    "stdin: this file cannot be read from its beginning for each host: give the bytes that it holds"
)


OPEN_AS_TEXT = io.StringIO("b")


def closed_file() -> io.BytesIO:
    file = io.BytesIO(b"x")
    file.close()
    return file


def step_with_a_pipe() -> Run:
    read, write = os.pipe()
    os.close(write)
    with open(read, "rb") as file:
        return Run("a", stdin=file)


def step_with_a_file_to_write() -> Run:
    with open(os.devnull, "wb") as file:
        return Run("a", stdin=file)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Run(), "Run: an empty command"),
        (lambda: Run("", " "), "Run: an empty command"),
        (lambda: Run("a", timeout=-1), "timeout -1: seconds, more than 0 (None: no limit)"),
        (
            lambda: Run(["ls", "-l"]),
            "Run: a word is a string, a number, a Deferred or a Run, not ['ls', '-l']",
        ),
        (lambda: Run("a", capture="a"), "Run: capture is a Capture(name, variables), not 'a'"),
        (lambda: Run("a", capure=None), "unknown option capure: did you mean capture?"),
        (lambda: RunScript("a", include=[]), "unknown option include: did you mean includes?"),
        (lambda: RunString("a", name="b"), "unknown option name: did you mean remote_name?"),
        (lambda: Push("a", "b", recursive=True), "unknown option recursive: did you mean recurse?"),
        (lambda: Pull("a", "b", follow=1), "unknown option follow: did you mean follow_symlinks?"),
        (
            lambda: Wait(every=3),
            "unknown option every: there is timeout, interval, label, allowed_exits, verbose",
        ),
        (lambda: Passes(lable="x"), "unknown option lable: did you mean label?"),
        (
            lambda: Run("a", env={"A": None}),
            "Run: env: A has no value; 'env -u A ...' as the command unsets it",
        ),
        (lambda: Run("a", env={"A=": "b"}), "Run: env: 'A=' is not the name of a variable"),
        (lambda: Run("a", env={3: "b"}), "Run: env: 3 is not the name of a variable"),
        (
            lambda: RunString("a", sudo="x; reboot"),
            "RunString: sudo is True (root) or the name of a user, not 'x; reboot'",
        ),
        (lambda: Run("a", sudo=""), "Run: sudo is True (root) or the name of a user, not ''"),
        (lambda: Run("a", sudo=1), "Run: sudo is True (root) or the name of a user, not 1"),
        (
            lambda: Run("a", stdin=["b"]),
            "stdin: bytes, text, a path object, an open binary file or an asynchronous iterator, "
            "not ['b']",
        ),
        (
            lambda: RunScript("a", stdin=OPEN_AS_TEXT),
            "stdin: bytes, text, a path object, an open binary file or an asynchronous iterator, "
            f"not {OPEN_AS_TEXT!r}",
        ),
        (lambda: Run("a", stdin=closed_file()), STDIN_ONCE),
        (step_with_a_pipe, STDIN_ONCE),
        (step_with_a_file_to_write, STDIN_ONCE),
        (
            lambda: Run("a", stdin=b"b", pty=True),
            "Run: pty and stdin: a terminal has no end of file: leave one out",
        ),
        (lambda: Wait(interval=0), "Wait: interval 0: seconds, more than 0"),
        (lambda: Wait(timeout=0), "timeout 0: seconds, more than 0 (None: no limit)"),
        (lambda: RunScript("a", includes=3), "a path or a list of paths, not 3"),
        (lambda: RunString(" "), "RunString: an empty script"),
        (
            lambda: RunString("x", remote_name="a/.."),
            "RunString: remote_name 'a/..' is not the name of a file",
        ),
        (lambda: Push([], "x"), "a path or a list of paths, not []"),
        (lambda: Push("", "x"), "a path or a list of paths, not ''"),
        (lambda: Push(3, "x"), "a path or a list of paths, not 3"),
        (lambda: Pull("x", 3), "Pull: the destination is a path, not 3"),
    ],
)
def test_command_misuse(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make()
    assert str(caught.value) == message


NODE_KINDS = ["remote", "local"]


@pytest.fixture(params=NODE_KINDS)
def node(request: pytest.FixtureRequest, sshd: Sshd) -> Iterator[Any]:
    """The same steps on a remote node and on this machine."""
    each = (
        sshd.node(formatter=apssh.RawFormatter())
        if request.param == "remote"
        else LocalNode(formatter=apssh.RawFormatter())
    )
    yield each
    asyncio.run(each.close())


def step(node: SshNode | LocalNode, command: apssh.AbstractCommand) -> int | str:
    """The status of a step, success or not."""
    try:
        return asyncio.run(command.attempt(node, StepRecord()))
    except CommandFailedError as exc:
        if exc.status is None:
            raise
        return exc.status


def test_run(node: Any, capfdbinary: Any) -> None:
    variables = Variables(word="late")
    assert (
        step(node, Run("echo", Deferred("{{word}}", variables), 3, Run("and", "more"), "; exit 4"))
        == 4
    )
    assert step(node, Run("echo lost; echo lost >&2; exit 5", ignore_outputs=True)) == 5
    assert step(node, Run("kill -USR1 $$")) == "USR1"
    assert capfdbinary.readouterr() == (b"late 3 and more\n", b"")
    with pytest.raises(UsageError) as caught:  # it is not known before
        step(node, Run(Deferred("{{word}}", {"word": ""})))
    assert str(caught.value) == (
        f"{node.hostname}: local: an empty command: it would open a shell that nobody talks to"
    )


@pytest.mark.parametrize(
    "cls",
    [apssh.AbstractCommand, Run, RunScript, RunString, Wait, Push, Pull, SshJob, apssh.Service],
)
def test_every_keyword_is_in_signature_and_docstring(cls: type) -> None:
    for parameter in inspect.signature(cls).parameters.values():
        assert parameter.kind is not parameter.VAR_KEYWORD, parameter
        assert parameter.annotation is not parameter.empty
        assert f"``{parameter.name}``" in (cls.__doc__ or ""), parameter


async def pieces(*given: bytes) -> AsyncIterator[bytes]:
    for each in given:
        yield each


STDIN_SOURCES: dict[str, Callable[[Path], Any]] = {
    "bytes": lambda path: path.read_bytes(),
    "text": lambda path: path.read_bytes().decode("utf-8", "surrogateescape"),
    "deferred": lambda path: Deferred("{{x}}", {"x": os.fsdecode(path.read_bytes())}),
    "path": lambda path: path,
    "path in the home": lambda path: Path("~", path.name),
    "open file": lambda path: path.open("rb"),
    "file at its end": lambda path: path.open("ab+"),
    "file in memory": lambda path: io.BytesIO(path.read_bytes()),
    "iterator": lambda path: pieces(path.read_bytes()[:7], b"", path.read_bytes()[7:]),
}


@pytest.mark.parametrize("source", STDIN_SOURCES)
@pytest.mark.parametrize("kind", ["Run", "RunScript", "RunString"])
def test_stdin_of_a_step(sshd: Sshd, home: Path, kind: str, source: str) -> None:
    """Each host gets all of it; what an iterator gives serves one."""
    (home / "data").write_bytes(b"\xffone\ntwo\n" + bytes(range(256)) * 2000)
    (home / "cat.sh").write_text("#!/bin/sh\ncat\n")
    wanted = (home / "data").read_bytes()
    given = STDIN_SOURCES[source](home / "data")
    step = getattr(apssh, kind)("cat.sh" if kind == "RunScript" else "cat", stdin=given)
    for _ in range(1 if source == "iterator" else 2):
        [result] = apssh.run(sshd.target, step)
        assert (result.error, result.stdout_bytes == wanted) == (None, True)
    if hasattr(given, "close"):
        given.close()


async def test_run_of_a_node_takes_what_the_command_is_given(
    sshd: Sshd, capfd: pytest.CaptureFixture[str]
) -> None:
    async with sshd.node(formatter=apssh.RawFormatter()) as node:
        assert await node.run("cat; echo $A", stdin=b"in\n", env={"A": "b"}) == 0
        if os.getuid() == 0:  # an ordinary user's sshd has no terminal to give
            assert await node.run("test -t 0", pty=True) == 0
        with pytest.raises(UsageError, match=r"^unknown option ptty: did you mean pty\?$"):
            await node.run("true", ptty=True)
    assert capfd.readouterr().out == "in\nb\n"


async def test_stdin_of_many_hosts_at_once(sshd: Sshd, home: Path) -> None:
    """One open file, read at each host's own place."""
    data = os.urandom(3_000_000)
    (home / "data").write_bytes(data)
    with open(home / "data", "rb") as file:
        step = Run("sha256sum", stdin=file)
        nodes = [sshd.node(formatter=apssh.CaptureFormatter()) for _ in range(5)]
        await asyncio.gather(*(step.co_run_remote(node) for node in nodes))
        for node in nodes:
            assert node.formatter.get_capture().split()[0] == hashlib.sha256(data).hexdigest()
            await node.close()
        assert not file.closed


async def test_iterator_as_stdin_serves_one_host(sshd: Sshd, capfd: Any) -> None:
    """A second use is refused before the command runs there."""
    step = Run("touch begun; cat", stdin=pieces(b"x\n"))
    async with sshd.node() as node:
        assert await step.co_run_remote(node) == 0
        (sshd.home / "begun").unlink()
        with pytest.raises(UsageError) as caught:
            await step.co_run_remote(node)
        assert str(caught.value) == (
            "stdin: an asynchronous iterator serves one host, once: give each host its own, "
            "or give bytes, a file or a path"
        )
        assert await node.run("test -e begun") == 1
    assert capfd.readouterr().out == "127.0.0.1:x\n"


def test_env_of_a_step(node: Any, capfdbinary: Any) -> None:
    found = Variables(late="b c")
    env = {"A": "", "B": Deferred("{{late}}", found), "N": 3}
    assert step(node, Run('echo "[$A][$B][$N]"', env=env)) == 0
    assert step(node, RunString('echo "[${A-unset}][$B]"', env=env)) == 0
    assert capfdbinary.readouterr().out == b"[][b c][3]\n[][b c]\n"


def test_failures_name_the_label_of_the_step(node: Any) -> None:
    host = node.hostname
    for command, message in (
        (Run("exit 3", label="warm\tup"), "status: warm up: ended with status 3: exit 3"),
        (Run("kill $$", label="x"), "signal: x: ended with signal TERM: kill $$"),
        (Run("exit 3", label=""), "status: ended with status 3: exit 3"),
        (Run("sleep 30", label="x", timeout=0.3), "timeout: x: no end within 0.3 s: sleep 30"),
        (
            RunString("sleep 30", label="x", timeout=0.5),
            "timeout: x: no end within 0.5 s: RunString: sleep 30...",
        ),
    ):
        with pytest.raises(CommandFailedError) as caught:
            asyncio.run(command.attempt(node, StepRecord()))
        assert str(caught.value) == f"{host}: {message}"


def test_wait_until_a_command_succeeds(node: Any, home: Path, sshd: Sshd, capfd: Any) -> None:
    where = home if isinstance(node, LocalNode) else sshd.home
    record = StepRecord()
    waiting = Wait("echo $$ >> tries; echo not yet; test -e", "up", interval=0.05, timeout=30)

    async def main() -> None:
        task = asyncio.create_task(waiting.attempt(node, record))
        await eventually_async(lambda: len((where / "tries").read_text().split()) > 2)
        (where / "up").touch()
        assert await task == 0
        await node.close()

    (where / "tries").touch()
    run(main())
    assert waiting.listing_line() == "Wait: echo $$ >> tries; echo not yet; test -e up"
    assert (Wait().listing_line(), record.status) == ("Wait: true", 0)
    assert capfd.readouterr() == ("", "")


def test_wait_past_its_time(node: Any) -> None:
    with pytest.raises(CommandFailedError) as caught:
        asyncio.run(Wait("echo a; echo b >&2; exit 3", timeout=1).attempt(node, StepRecord()))
    assert str(caught.value) == (
        f"{node.hostname}: timeout: not there within 1 s: echo a; echo b >&2; exit 3; seen last: "
        "status 3: b"
    )


async def test_wait_for_a_host_that_reboots(make_sshd: Callable[..., Sshd], sshd: Sshd) -> None:
    """The connection from before is not what is asked, though it stands."""
    before = make_sshd()
    node = before.node(known_hosts=None, gateway=sshd.node(), formatter=apssh.RawFormatter())
    await node.connect_lazy()
    before.stop()
    assert await node.run("true") == 0
    task = asyncio.create_task(Wait(interval=0.1, timeout=30).attempt(node, StepRecord()))
    await eventually_async(lambda: sshd.log().count("connect_to 127.0.0.1") > 1)
    assert not task.done()
    after = make_sshd(port=before.port)
    assert await task == 0
    assert await node.run("true") == 0 and after.logins() == 1
    await node.close()
    await node.gateway.close()


def test_wait_for_a_host_that_never_comes() -> None:
    port = free_port()
    node = SshNode("127.0.0.1", port=port)
    scheduler = Scheduler(SshJob(node, command=Wait(timeout=0.5, interval=0.1, label="box is up")))
    with pytest.raises(CommandFailedError) as caught:
        scheduler.run()
    assert str(caught.value) == (
        "127.0.0.1: timeout: box is up: not there within 0.5 s: true; seen last: refused: "
        f"nothing listens on port {port}"
    )


def test_wait_does_not_wait_for_another_host_key(make_sshd: Callable[..., Sshd]) -> None:
    before = make_sshd()
    node = before.node(formatter=apssh.RawFormatter())

    async def main() -> None:
        await node.connect_lazy()
        before.stop()
        make_sshd(port=before.port)
        with pytest.raises(HostKeyError):
            await Wait(timeout=30).attempt(node, StepRecord())
        await node.close()

    run(main(), 10)


@on_testbed
def test_wait_for_a_unit_that_takes_its_time(capfd: Any) -> None:
    """Five seconds until it listens."""
    port = 20000 + os.getpid() % 10000
    unit = f"apssh-wait-{port}"
    server = (
        "sleep 5; exec python3 -c 'import socket, time; "
        f's = socket.create_server(("127.0.0.1", {port})); time.sleep(600)\''
    )
    node = box()
    service = apssh.Service(server, service_id=unit)
    probe = f"python3 -c 'import socket; socket.create_connection((\"127.0.0.1\", {port}))' 2>&1"
    begin = time.monotonic()
    scheduler = Scheduler()
    with apssh.experiment(scheduler, teardown=[SshJob(node, command=service.stop_command())]):
        SshJob(
            node,
            scheduler=scheduler,
            commands=[
                service.start_command(),
                Run(f"! {probe}", ignore_outputs=True),
                Wait(probe, timeout=60),
                Run(probe),
            ],
        )
        assert scheduler.run()
    assert time.monotonic() - begin > 4
    assert capfd.readouterr() == ("", "")


def test_capture(node: Any, capfdbinary: Any) -> None:
    variables = Variables()
    assert (
        step(node, Run("echo one; echo err >&2; echo two", capture=Capture("out", variables))) == 0
    )
    assert variables.out == "one\ntwo"
    assert capfdbinary.readouterr() == (b"", b"err\n")


def test_capture_of_a_command_that_did_not_end(node: Any) -> None:
    """Half of an output is no value: a later step must not take it for one."""
    variables = Variables()
    with pytest.raises(CommandFailedError):
        step(node, Run("echo half; sleep 60", capture=Capture("out", variables), timeout=0.5))
    assert variables == {}


def test_output_beyond_the_limit_fails_the_command(
    node: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apssh, "CAPTURE_LIMIT", 1024 * 1024)
    with pytest.raises(ApsshError, match="more than 1 MiB of output to hold"):
        step(node, Run("yes", capture=Capture("out", Variables())))


def test_step_and_formatter_without_their_base_constructors(node: Any, capfd: Any) -> None:
    """Users' classes need not call ours."""

    class Says(apssh.AbstractCommand):
        def __init__(self, text: str) -> None:
            self.text = text

        async def co_run_remote(self, node: Any) -> int:
            return int(await node.run(f"echo {self.text}"))

        co_run_local = co_run_remote

    class Shouts(apssh.Formatter):
        def __init__(self) -> None:
            self.count = 0

        def line(self, line: str, datatype: int | None, hostname: str) -> None:
            self.count += 1
            print(line.upper(), end="")

    node.formatter = formatter = Shouts()
    formatter.add_endpoint(node._endpoint, False)
    scheduler = Scheduler(SshJob(node, command=Says("hello")))
    assert scheduler.run()
    apssh.close_ssh_in_scheduler(scheduler)
    assert (capfd.readouterr().out, formatter.count) == ("HELLO\n", 1)


def test_a_steps_own_timeout_error_is_no_deadline(node: Any) -> None:
    class Late(apssh.AbstractCommand):
        async def co_run_remote(self, node: Any) -> int:
            raise TimeoutError

        co_run_local = co_run_remote

    job = SshJob(node, command=Late(label=False), critical=False)
    Scheduler(job).run()
    assert str(job.result()) == f"{node.hostname}: timeout: timed out: Late"


def test_run_script(node: Any, home: Path, sshd: Sshd, capfdbinary: Any) -> None:
    (home / "check.sh").write_text(
        '#!/bin/bash\nsource "$(dirname "$BASH_SOURCE")/lib.sh"\nshow "$@"; pwd; exit 6\n'
    )
    (home / "lib.sh").write_text('show() { printf "[%s]" "$@"; echo; }\n')
    assert step(node, RunScript("check.sh", "a", "'b c'", "> redirected", includes=["lib.sh"])) == 6
    where = home if isinstance(node, LocalNode) else sshd.home
    assert (where / "redirected").read_text() == f"[a][b c]\n{where}\n"
    assert capfdbinary.readouterr() == (b"", b"")
    assert not list((where / ".apssh-remote").iterdir())
    assert stat.S_IMODE((where / ".apssh-remote").stat().st_mode) == 0o700


def test_includes_may_name_the_script_and_each_other(node: Any, home: Path, capfd: Any) -> None:
    """One list serves all scripts of an experiment."""
    (home / "lib").mkdir()
    (home / "lib/lib.sh").write_text("say() { echo said $1; }\n")
    (home / "nodes.sh").write_text('#!/bin/bash\n. "$(dirname "$BASH_SOURCE")/lib.sh"; say "$1"\n')
    (home / "copy").mkdir()
    (home / "copy/lib.sh").write_text("say() { echo said $1; }\n")
    includes = ["lib/lib.sh", "nodes.sh", "lib/../lib/lib.sh", home / "nodes.sh", "copy/lib.sh"]
    assert step(node, RunScript("nodes.sh", "go", includes=includes)) == 0
    assert step(node, RunString(". ${0%/*}/lib.sh; say 2", includes=includes)) == 0
    assert capfd.readouterr().out == "said go\nsaid 2\n"


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: RunScript("go.sh", includes=["a/lib.sh", "b/lib.sh"]), "lib.sh"),
        (lambda: RunScript("go.sh", includes=["a/go.sh"]), "go.sh"),
        (lambda: RunString("true", remote_name="go.sh", includes=["go.sh"]), "go.sh"),
        (
            lambda: RunString(Deferred("{{x}}", {}), includes=["a/lib.sh", "b/lib.sh"]),
            "lib.sh",
        ),
        (
            lambda: RunScript(Deferred("{{x}}", {}), includes=["a/lib.sh", "b/lib.sh"]),
            "lib.sh",
        ),
    ],
    ids=["includes", "script and include", "text and include", "late text", "late script"],
)
def test_two_files_of_one_name(
    make: Callable[[], apssh.AbstractCommand], name: str, home: Path
) -> None:
    """Found before anything runs, by jobs and by whatever checks before it connects."""
    for folder in ("a", "b", "."):
        (home / folder).mkdir(exist_ok=True)
        for file in ("lib.sh", "go.sh"):
            (home / folder / file).write_text(f"#!/bin/sh\n: {folder}\n")
    scheduler = Scheduler(SshJob(LocalNode(), commands=[Run("touch ran"), make()]))
    with pytest.raises(UsageError) as caught:
        scheduler.run()
    message = f"two different files for one folder are called {name}"
    assert str(caught.value) == f"LOCALNODE: local: {message}"
    assert not (home / "ran").exists()
    with pytest.raises(UsageError):
        apssh.run("192.0.2.1", make())


def test_programs_find_two_files_of_one_name(home: Path) -> None:
    for folder in ("a", "b"):
        (home / folder).mkdir()
        (home / folder / "lib.sh").write_text(folder)
    (home / "go.sh").write_text("#!/bin/sh\n")
    done = cli("-t", "192.0.2.1", "-s", "-i", "a/lib.sh", "-i", "b/lib.sh", "go.sh")
    assert done.returncode == 2
    assert b"two different files for one folder are called lib.sh" in done.stderr


def test_script_has_one_folder_name_on_all_hosts(make_sshd: Callable[..., Sshd]) -> None:
    """So equal messages of a script are equal texts; another name each time on one host."""
    servers = [make_sshd() for _ in range(3)]
    show = RunString('basename "${0%/*}"')
    for script, wanted in ((show, 1), (show, 1), (RunString('basename "${0%/*}"'), 1)):
        results = apssh.run([server.target for server in servers], script)
        assert all(result.ok for result in results)
        assert len({result.stdout for result in results}) == wanted
    first, second = apssh.run(servers[0].target, show), apssh.run(servers[0].target, show)
    assert first[0].stdout != second[0].stdout
    assert not any(list((server.home / ".apssh-remote").iterdir()) for server in servers)


def test_script_folder_that_cannot_be_made(node: Any, sshd: Sshd, home: Path) -> None:
    """It is told why not, and not that it is missing."""
    local = isinstance(node, LocalNode)
    side, there = ("local", home) if local else ("remote", sshd.home)
    why = "operation not permitted" if local and os.getuid() == 0 else "permission denied"
    with unwritable(there), pytest.raises(TransferError) as caught:
        step(node, RunString("true"))
    assert str(caught.value) == f"{node.hostname}: {side}: {there}/.apssh-remote: {why}"


def test_scripts_of_hosts_that_share_a_home(sshd: Sshd) -> None:
    """The name is taken there: each has a folder of its own."""
    both = RunString(
        'echo $$ >> ids; while [ $(wc -l < ids) -lt 2 ]; do sleep 0.1; done; basename "${0%/*}"',
        timeout=30,
    )
    results = apssh.run([sshd.target, sshd.target.replace("127.0.0.1", "localhost")], both)
    assert [result.error for result in results] == [None, None]
    assert results[0].stdout != results[1].stdout
    assert not list((sshd.home / ".apssh-remote").iterdir())


def test_same_script_after_one_that_was_given_up(sshd: Sshd) -> None:
    """What ends the first does not take the second's folder away."""
    slow = RunString("[ -e once ] || { touch once; sleep 60; }; sleep 3; cat $0", timeout=4)
    [first] = apssh.run(sshd.target, slow)
    [second] = apssh.run(sshd.target, slow)
    assert (first.kind, second.error) == ("timeout", None)


async def test_script_cancelled_while_its_folder_is_made(
    sshd: Sshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host has made it by then, and nobody has heard of it: it is removed."""
    mkdir, made = asyncssh.SFTPClient.mkdir, asyncio.Event()

    async def late(self: asyncssh.SFTPClient, *args: Any) -> None:
        await mkdir(self, *args)
        made.set()
        await asyncio.sleep(0.2)

    async with sshd.node() as node:
        assert await RunString("true").co_run_remote(node) == 0
        hall = sshd.home / ".apssh-remote"
        monkeypatch.setattr(asyncssh.SFTPClient, "mkdir", late)
        task = asyncio.create_task(RunString("true").co_run_remote(node))
        await made.wait()
        assert len(list(hall.iterdir())) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert list(hall.iterdir()) == []


async def test_failures_of_a_script_name_it(sshd: Sshd, home: Path) -> None:
    """As people know it: the folder over there tells them nothing."""
    (home / "check.sh").write_text("#!/bin/sh\n[ $1 = fast ] && exit 3\ntouch up; sleep 30\n")
    async with sshd.node() as node:
        job = SshJob(node, command=RunScript("check.sh", "fast"))
        with pytest.raises(CommandFailedError) as caught:
            await job.co_run()
        assert (
            str(caught.value) == "127.0.0.1: status: ended with status 3: RunScript: check.sh fast"
        )
        with pytest.raises(CommandFailedError) as caught:
            await RunScript("check.sh", "slow", timeout=0.5).co_run_remote(node)
        assert (
            str(caught.value) == "127.0.0.1: timeout: no end within 0.5 s: RunScript: check.sh slow"
        )
        (sshd.home / "up").unlink(missing_ok=True)
        task = asyncio.create_task(RunScript("check.sh", "slow").co_run_remote(node))
        await eventually_async((sshd.home / "up").exists)
        (await node.connect_lazy()).abort()
        with pytest.raises(ConnectionFailedError) as lost:
            await task
        assert str(lost.value) == "127.0.0.1: lost: connection lost during RunScript: check.sh slow"


def test_run_string(node: Any, capfdbinary: Any) -> None:
    variables = Variables(n=3)
    body = Deferred(
        "#!/usr/bin/env python3\nimport os, sys\n"
        "print(sys.argv[1:], {{n}}, os.path.basename(sys.argv[0]), "
        "oct(os.stat(os.path.dirname(sys.argv[0])).st_mode)[-3:])",
        variables,
    )
    assert step(node, RunString(body, "x", 1, remote_name="mine")) == 0
    assert step(node, RunString("echo no interpreter line; exit 2")) == 2
    assert capfdbinary.readouterr().out == b"['x', '1'] 3 mine 700\nno interpreter line\n"


@pytest.mark.parametrize(
    ("before", "options"),
    [
        ("printf 'half a line'; ", {}),
        ("cd /; ", {}),
        ("exec 3>&1 4>&1 5>&2; ", {}),
        pytest.param(
            "",
            {"Subsystem": "sftp /usr/lib/openssh/sftp-server -d /"},
            marks=pytest.mark.skipif(os.getuid() != 0, reason="SFTP begins in a folder of root's"),
        ),
    ],
    ids=["prints", "goes elsewhere", "keeps copies", "sftp elsewhere"],
)
def test_scripts_under_odd_start_up_files(
    make_sshd: Callable[..., Sshd], before: str, options: dict[str, Any], capfd: Any
) -> None:
    """What a login shell does before (a printing or moving start-up file; csh keeps copies of its
    outputs) does not disturb a script.
    """
    if options and not os.path.exists(options["Subsystem"].split()[1]):
        pytest.skip("sftp-server is elsewhere")
    server = make_sshd(**options)
    session = server.folder / "session"
    session.write_text(
        session.read_text().replace(
            "exec ", f"case $c in *sftp-server*) ;; *) {before}:;; esac; exec ", 1
        )
    )

    async def main() -> int | str:
        async with server.node(formatter=apssh.CaptureFormatter()) as node:
            return await asyncio.wait_for(RunString("echo hello; exit 3").co_run_remote(node), 10)

    assert run(main()) == 3
    eventually(lambda: not list(server.home.glob(".apssh-remote/*")))


def test_many_scripts_at_once(sshd: Sshd) -> None:
    async def main() -> None:
        async with sshd.node() as node:
            captured = Variables()
            scripts = [
                RunString(f"sleep 0.1; echo {number}", capture=Capture(f"v{number}", captured))
                for number in range(12)
            ]
            assert (
                await asyncio.gather(*(script.co_run_remote(node) for script in scripts))
                == [0] * 12
            )
            assert captured == {f"v{number}": str(number) for number in range(12)}

    run(main())
    assert not list((sshd.home / ".apssh-remote").iterdir())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RunScript("gone.sh"), "script gone.sh: no such file"),
        (lambda: RunString("x", includes="gone"), "include gone: no such file"),
        (lambda: RunScript("dir"), "script dir: not a file"),
        (lambda: RunScript("/proc/self/mem"), "script /proc/self/mem: input/output error"),
        (
            lambda: RunString("x", includes="/proc/self/mem"),
            "include /proc/self/mem: input/output error",
        ),
    ],
)
def test_missing_files(make: Callable[[], Any], message: str, home: Path) -> None:
    """Raised when the job starts, before its first step and any connection."""
    (home / "dir").mkdir()
    scheduler = Scheduler(
        job := SshJob(SshNode("127.0.0.1", port=1), commands=[Run("true"), make()])
    )
    with pytest.raises(UsageError) as caught:
        scheduler.run()
    assert str(caught.value) == f"127.0.0.1: local: {message}"
    assert job.records == []


def test_folder_that_an_earlier_job_makes_for_a_pull(sshd: Sshd, home: Path) -> None:
    """It is looked for when the job starts; one whose name is not known yet is not."""
    (sshd.home / "f").write_text("x")
    make = SshJob(LocalNode(), command="mkdir logs")
    late = Pull("f", Deferred("{{name}}/late", Variables(name="logs")))
    scheduler = Scheduler(
        make, SshJob(sshd.node(), commands=[Pull("f", "logs/f"), late], required=make)
    )
    assert scheduler.run()
    apssh.close_ssh_in_scheduler(scheduler)
    assert sorted(os.listdir("logs")) == ["f", "late"]


def test_paths_known_when_the_step_runs(home: Path) -> None:
    (home / "one").write_text("")
    (home / "two").write_text("")
    (home / "there").mkdir()
    found = Variables()
    job = SshJob(
        LocalNode(),
        commands=[
            Run("echo one", capture=Capture("name", found)),
            Push([Deferred("{{name}}", found)], "there"),
            Push(home.glob("tw*"), "there"),
        ],
    )
    assert Scheduler(job).run()
    assert job.commands[2].listing_line().endswith("two onto there")
    assert sorted(os.listdir("there")) == ["one", "two"]


def test_push_of_what_was_pulled(sshd: Sshd, home: Path) -> None:
    """A step before it may have brought what a Push needs."""
    (sshd.home / "there").write_text("x")
    scheduler = Scheduler(
        SshJob(sshd.node(), commands=[Pull("there", "here"), Push("here", "back")])
    )
    assert scheduler.run()
    apssh.close_ssh_in_scheduler(scheduler)
    assert (sshd.home / "back").read_text() == "x"


def test_step_of_a_users_own_class(node: Any, capfd: Any) -> None:
    class Mine(apssh.AbstractCommand):
        async def co_run_remote(self, node: Any) -> int | str | None:
            return await node.run("echo mine; exit 7")  # type: ignore[no-any-return]

        async def co_run_local(self, node: Any) -> int | str | None:
            await asyncio.sleep(0)
            return None

    assert step(node, Mine()) == (0 if isinstance(node, LocalNode) else 7)

    class Derived(Run):
        async def co_run_remote(self, node: Any) -> int | str | None:
            return await super().co_run_remote(node) or 9

        co_run_local = co_run_remote

    assert step(node, Derived("true")) == 9

    class Nothing(apssh.AbstractCommand):
        pass

    with pytest.raises(
        UsageError,
        match=r"^Nothing: a step defines co_run_remote\(node\), and co_run_local\(node\) "
        "to run on a LocalNode$",
    ):
        step(node, Nothing())

    class Slow(Mine):
        async def co_run_remote(self, node: Any) -> int | str | None:
            await asyncio.sleep(3600)
            return 0

        co_run_local = co_run_remote

    with pytest.raises(CommandFailedError) as caught:
        step(node, Slow(timeout=0.1))
    assert str(caught.value) == f"{node.hostname}: timeout: no end within 0.1 s: Slow"


def test_verbose_step(node: Any, home: Path, capfd: Any) -> None:
    (home / "f").write_text("")
    assert step(node, Run("true", verbose=True)) == step(node, Push("f", "g", verbose=True)) == 0
    assert (
        capfd.readouterr().err
        == f"{node.hostname}: runs: true\n{node.hostname}: runs: Push: f onto g\n"
    )

    class Mine(apssh.AbstractCommand):
        async def co_run_remote(self, node: Any) -> int:
            return 0

        co_run_local = co_run_remote

    assert step(node, Mine(label="by hand", verbose=True)) == 0
    assert capfd.readouterr().err == f"{node.hostname}: runs: by hand\n"


def test_x11_needs_a_display(sshd: Sshd) -> None:
    assert (
        str(failure_of(Run("xterm", x11=True).co_run_remote(sshd.node())))
        == "x11: no DISPLAY here to forward to"
    )
    # programs and jobs find it before they connect
    done = cli("-F", "none", "-t", "h1", "-K", "-X", "xterm")
    assert (done.returncode, done.stderr) == (2, b"apssh: x11: no DISPLAY here to forward to\n")


def test_x11(sshd: Sshd, monkeypatch: pytest.MonkeyPatch, capfd: Any, tmp_path: Path) -> None:
    if not (shutil.which("Xvfb") and shutil.which("xauth")):
        pytest.skip("needs Xvfb and xauth")
    read, write = os.pipe()
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(write), "-nolisten", "tcp", "-noreset"],
        pass_fds=[write],
        stderr=subprocess.DEVNULL,
    )
    try:
        monkeypatch.setenv("DISPLAY", f":{os.read(read, 10).decode().strip()}")
        code = (
            "import socket, os; h, d = os.environ['DISPLAY'].split(':'); "
            "s = socket.create_connection(('127.0.0.1', 6000 + int(d.split('.')[0]))); "
            "print('shown')"
        )
        probe = f'python3 -c "{code}"'

        async def main() -> None:
            async with sshd.node(formatter=apssh.RawFormatter()) as node:
                assert await node.run(probe, x11=True) == 0

        run(main())
        assert capfd.readouterr().out == "shown\n"
    finally:
        server.terminate()
        server.wait()
        os.close(read)
        os.close(write)


def test_x11_at_a_name(sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ssh -X leaves it, of which the plain functions' loop looks the name up."""
    if not shutil.which("xauth"):
        pytest.skip("needs xauth")
    for number in range(10, 100):
        with contextlib.suppress(OSError):
            screen = socket.create_server(("127.0.0.1", 6000 + number))
            break
    _open_ports.add(6000 + number)
    monkeypatch.setenv("DISPLAY", f"localhost:{number}")
    code = (
        "import socket, os; h, d = os.environ['DISPLAY'].split(':'); "
        "s = socket.create_connection(('127.0.0.1', 6000 + int(d.split('.')[0]))); "
        "s.sendall(bytes(100)); s.recv(1)"
    )
    with screen:
        shown = threading.Thread(target=lambda: screen.accept()[0].close(), daemon=True)
        shown.start()
        (result,) = apssh.run(sshd.target, f'python3 -c "{code}"; :', x11=True)
        shown.join(30)
        assert (result.error, shown.is_alive()) == (None, False)


# --------------------------------------------------------------------------------------------------
# jobs
# --------------------------------------------------------------------------------------------------


UNKNOWN_OF_JOB = (
    "unknown option depends: there is command, commands, keep_connection, verbose, forever, "
    "critical, label, required, scheduler"
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "SshJob: give exactly one of command= and commands="),
        (
            {"command": "a", "commands": ["b"]},
            "SshJob: give exactly one of command= and commands=",
        ),
        ({"commands": []}, "Run: an empty command"),
        ({"commands": [None, None]}, "Run: an empty command"),
        (
            {"commands": ["ls", Run("x")]},
            "SshJob: a mix of words and commands: write each command as Run(...), "
            "RunScript(...), ...",
        ),
        (
            {"command": 3},
            "SshJob: a string, a Deferred, a command, or a list of commands or of words, not 3",
        ),
        ({"command": ""}, "Run: an empty command"),
        ({"comand": "x"}, "unknown option comand: did you mean command?"),
        ({"command": "x", "depends": []}, UNKNOWN_OF_JOB),
    ],
)
def test_job_misuse(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        SshJob(SshNode("h"), **arguments)
    assert str(caught.value) == message


def test_job_needs_a_node() -> None:
    with pytest.raises(
        UsageError, match=r"^SshJob: the node is an SshNode or a LocalNode, not 'h'$"
    ):
        SshJob("h", command="ls")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments",
    [
        {"command": "echo a b"},
        {"commands": "echo a b"},
        {"command": Run("echo a b")},
        {"commands": [Run("echo", "a", "b"), None]},
        {"command": ["echo", "a", "b"]},
        {"commands": ("echo", "a", "b")},
        {"command": Deferred("echo a {{x}}", {"x": "b"})},
    ],
)
def test_job_forms(arguments: dict[str, Any], capfd: Any) -> None:
    job = SshJob(LocalNode(), **arguments)
    assert Scheduler(job).run() and job.result() == 0
    assert capfd.readouterr().out == "LOCALNODE:a b\n"


def test_verbose_job(capfd: Any) -> None:
    steps = [Run("true"), Run("true", label="again")]
    assert Scheduler(SshJob(LocalNode(), commands=steps, verbose=True)).run()
    assert capfd.readouterr() == ("", "LOCALNODE: step: true\nLOCALNODE: step: again\n")


def test_critical_job_stops_at_its_first_failure(sshd: Sshd, capfd: Any) -> None:
    job = SshJob(sshd.node(), commands=[Run("echo one; exit 3"), Run("echo two")])
    scheduler = Scheduler(job, SshJob(sshd.node(), command="echo later", required=job))
    with pytest.raises(CommandFailedError) as caught:
        scheduler.run()
    error = caught.value
    assert str(error) == "127.0.0.1: status: ended with status 3: echo one; exit 3"
    assert (error.host, error.command, error.status, error.kind) == (
        "127.0.0.1",
        "echo one; exit 3",
        3,
        "status",
    )
    assert [line for line in capfd.readouterr().out.splitlines() if "SCHEDULER" not in line] == [
        "127.0.0.1:one"
    ]
    assert job.repr_result() == f"!! step 1 `echo one; exit 3`: {error} !!"
    apssh.close_ssh_in_scheduler(scheduler)


def test_non_critical_job_runs_all_its_steps(sshd: Sshd, capfd: Any) -> None:
    job = SshJob(
        sshd.node(),
        commands=[Run("exit 3"), Run("kill -TERM $$"), Run("echo last")],
        critical=False,
    )
    allowed = SshJob(
        sshd.node(),
        commands=[Run("exit 4", allowed_exits=[4]), Run("kill -TERM $$", allowed_exits="SIGTERM")],
    )
    scheduler = Scheduler(job, allowed)
    assert scheduler.run()
    assert (job.result(), allowed.result()) == ("TERM", 0)
    assert capfd.readouterr().out == "127.0.0.1:last\n"
    assert [(step.status, step.kind) for step in job.records] == [
        (3, "status"),
        ("TERM", "signal"),
        (0, None),
    ]
    apssh.close_ssh_in_scheduler(scheduler)


def test_unreachable_host_is_never_a_success() -> None:
    lost = SshNode("127.0.0.1", port=free_port())
    job = SshJob(lost, command=Run("true", allowed_exits=[1, 255]), critical=False)
    assert Scheduler(job).run()
    assert isinstance(job.result(), ConnectionFailedError) and job.result()
    with pytest.raises(ConnectionFailedError):
        Scheduler(SshJob(lost, command="true")).run()


def test_failure_that_nodes_share_names_each_of_them(capfd: Any) -> None:
    jobs = [
        SshJob(SshNode(f"127.0.0.{number}", keys=["gone"]), command="true", critical=False)
        for number in (1, 2)
    ]
    assert Scheduler(*jobs).run()
    assert [str(job.failure) for job in jobs] == [
        f"127.0.0.{number}: local: key gone: no such file or directory" for number in (1, 2)
    ]


def test_failure_of_a_job_that_is_not_critical(sshd: Sshd, capfd: Any) -> None:
    """It is the result and the exception, as published scripts look for it, and it is told."""
    lost = SshNode("127.0.0.1", port=free_port())
    away = SshJob(lost, command="true", critical=False, label="away")
    status = SshJob(sshd.node(), command="exit 3", critical=False)
    good = SshJob(sshd.node(), command="true", critical=False)
    missing = SshJob(sshd.node(), command=RunScript("gone.sh"), critical=False)
    idle = SshJob(sshd.node(), command="true", critical=False)
    scheduler = Scheduler(away, status, good, missing)
    assert scheduler.run()
    assert isinstance(away.raised_exception(), ConnectionFailedError)
    assert away.raised_exception() is away.result()
    assert (status.raised_exception(), status.result()) == (None, 3)
    assert (good.raised_exception(), good.result()) == (None, 0)
    no_script = "127.0.0.1: local: script gone.sh: no such file"
    assert str(missing.raised_exception()) == no_script
    assert idle.raised_exception() is None
    told = capfd.readouterr().err.splitlines()
    assert sorted(told) == [
        "127.0.0.1:failed (not critical): local: script gone.sh: no such file",
        "127.0.0.1:failed (not critical): status: ended with status 3: exit 3",
        f"127.0.0.1:job away failed (not critical): refused: nothing listens on port {lost.port}",
    ]
    scheduler.debrief()
    shown = capfd.readouterr().out
    assert f"non-critical: away: exception {away.result()}" in shown
    assert "2 job(s) with an exception, including 0 critical" in shown
    apssh.close_ssh_in_scheduler(scheduler)


def test_failure_of_a_job_whose_formatter_is_silenced(capfd: Any) -> None:
    class Silent(apssh.Formatter):
        def line(self, line: str, datatype: int | None, hostname: str) -> None:
            pass

    job = SshJob(LocalNode(formatter=Silent()), command="echo x; exit 3", critical=False)
    assert Scheduler(job).run() and job.result() == 3
    assert capfd.readouterr() == ("", "")


def test_critical_none_means_critical() -> None:
    assert SshJob(SshNode("h"), command="x", critical=None).is_critical() is True
    with pytest.raises(CommandFailedError):
        Scheduler(SshJob(LocalNode(), command="exit 1", critical=None)).run()


def test_failing_jobs_give_back_their_window_slot() -> None:
    lost = SshNode("127.0.0.1", port=free_port())
    jobs = [SshJob(lost, command="true", critical=False) for _ in range(12)]
    scheduler = Scheduler(*jobs, jobs_window=2, timeout=30)
    assert scheduler.run()
    assert all(isinstance(job.result(), ApsshError) for job in jobs)


def test_scheduler_that_runs_twice(make_sshd: Callable[..., Sshd]) -> None:
    sshd = make_sshd()
    gateway = sshd.node()
    nodes = [sshd.node(gateway=gateway) for _ in range(2)]
    for _ in range(2):
        scheduler = Scheduler(*(SshJob(node, command="true") for node in nodes))
        assert scheduler.run()
        eventually(lambda: sshd.connections() == 3)
    apssh.close_ssh_in_scheduler(scheduler)
    eventually(lambda: sshd.connections() == 0)
    assert not gateway.is_connected()


async def test_scheduler_in_a_running_loop(make_sshd: Callable[..., Sshd]) -> None:
    sshd = make_sshd()
    scheduler = Scheduler(SshJob(sshd.node(), command="true"))
    assert await scheduler.co_run()
    assert sshd.connections() == 1
    await apssh.co_close_ssh_in_scheduler(scheduler)
    await eventually_async(lambda: not sshd.connections())


def test_many_jobs_on_one_node(sshd: Sshd) -> None:
    """Six times what MaxSessions permits by default."""
    variables, node = Variables(), sshd.node()
    jobs = [
        SshJob(
            node,
            command=Run(
                f"for i in 1 2 3; do echo {number}; sleep 0.05; done",
                capture=Capture(f"v{number}", variables),
            ),
        )
        for number in range(60)
    ]
    scheduler = Scheduler(*jobs)
    assert scheduler.run()
    assert variables == {f"v{number}": f"{number}\n{number}\n{number}" for number in range(60)}
    apssh.close_ssh_in_scheduler(scheduler)


@pytest.mark.slow
def test_thousands_of_jobs() -> None:
    """Ten on each of 300 nodes, some of which fail: nothing is held afterwards."""

    async def main() -> None:
        apssh._raise_file_limit()
        async with apssh.demo_fleet(300, formatter=apssh.Formatter()) as nodes:
            _open_ports.update(node.port for node in nodes)
            jobs = [
                SshJob(nodes[number % 300], command=f"exit {number % 7}", critical=False)
                for number in range(3000)
            ]
            assert await Scheduler(*jobs, jobs_window=500).co_run()
            assert [job.result() for job in jobs] == [number % 7 for number in range(3000)]
            links = [link for node in nodes for link in getattr(node._live, "links", ())]
            assert len(links) == 300 and not any(link.sessions for link in links)

    run(main(), 300)


def test_output_of_jobs_is_never_mixed(sshd: Sshd, capfdbinary: Any) -> None:
    formatter = apssh.TerminalFormatter("{linenl}")
    nodes = [sshd.node(formatter=formatter) for _ in range(4)]
    scheduler = Scheduler(
        *(
            SshJob(
                nodes[number % 4],
                command=f"for i in $(seq 300); do echo {number} {'x' * 100} $i; done",
            )
            for number in range(12)
        )
    )
    assert scheduler.run()
    apssh.close_ssh_in_scheduler(scheduler)
    lines = capfdbinary.readouterr().out.splitlines()
    assert len(lines) == 12 * 300
    for number in range(12):
        mine = [line for line in lines if line.startswith(b"%d " % number)]
        assert mine == [b"%d %s %d" % (number, b"x" * 100, index) for index in range(1, 301)]


def test_scheduler_timeout_ends_remote_commands(sshd: Sshd) -> None:
    token = f"96{os.getpid()}"
    scheduler = Scheduler(
        SshJob(sshd.node(), command=f"sleep {token} & echo >> up; wait"),
        SshJob(sshd.node(), command=f"sleep {token} & echo >> up; wait", forever=True),
        timeout=2,
    )
    with pytest.raises(TimeoutError):
        scheduler.run()
    assert (sshd.home / "up").read_text() == "\n\n"
    eventually(lambda: not processes(f"sleep {token}"))
    apssh.close_ssh_in_scheduler(scheduler)


def test_critical_failure_ends_commands_elsewhere(sshd: Sshd) -> None:
    token = f"95{os.getpid()}"
    scheduler = Scheduler(
        SshJob(sshd.node(), command=f"sleep {token} & touch up; wait"),
        SshJob(sshd.node(), command="while ! test -e up; do sleep 0.1; done; exit 1"),
    )
    with pytest.raises(CommandFailedError):
        scheduler.run()
    eventually(lambda: not processes(f"sleep {token}"))
    apssh.close_ssh_in_scheduler(scheduler)


@on_testbed
@pytest.mark.parametrize("login", ["root", "tester"])
@pytest.mark.parametrize("hops", [1, 2, 4])
def test_on_real_hosts(login: str, hops: int, home: Path, capfd: Any) -> None:
    """Everything a job can do, through gateways: one connection each; none after the close; nothing
    left in the remote home.
    """
    (home / "go.sh").write_text('#!/bin/bash\n. "$(dirname "$BASH_SOURCE")/lib.sh"; say "$@"\n')
    (home / "lib.sh").write_text('say() { echo "$(id -un) says $*"; }\n')
    (home / "data").write_bytes(bytes(range(256)) * 4000)
    gateway: SshNode | None = None
    for number in range(hops - 1):
        gateway = box(number % 3, username=login, gateway=gateway)
    nodes = [box((hops - 1 + number) % 3, username=login, gateway=gateway) for number in range(2)]
    found, scheduler = Variables(), Scheduler()
    for number, node in enumerate(nodes):
        SshJob(
            node,
            scheduler=scheduler,
            commands=[
                Run("uname -s", capture=Capture(f"kernel{number}", found)),
                RunScript("go.sh", "script", 1, includes=["lib.sh"]),
                RunString("#!/bin/bash\necho string $1", number),
                Push("data", f"data{number}"),
                Run(f"cmp data{number} data{number}; chmod 640 data{number}"),
                Pull(f"data{number}", f"back{number}"),
                Run(
                    f"rm data{number}; ls -A .apssh-remote", capture=Capture(f"left{number}", found)
                ),
            ],
        )

    def local():
        return sum(
            f" {socket.inet_aton(host)[::-1].hex().upper()}:0016 01"
            in Path("/proc/net/tcp").read_text()
            for host in TESTBED
        )

    assert scheduler.run()
    assert local() == (1 if gateway else 2)
    apssh.close_ssh_in_scheduler(scheduler)
    eventually(lambda: local() == 0)
    assert found == {"kernel0": "Linux", "kernel1": "Linux", "left0": "", "left1": ""}
    assert sorted(capfd.readouterr().out.splitlines()) == sorted(
        [f"{login} says script 1"] * 2 + ["string 0", "string 1"]
    )
    for number in range(2):
        back = home / f"back{number}"
        assert (
            back.read_bytes() == (home / "data").read_bytes()
            and stat.S_IMODE(back.stat().st_mode) == 0o640
        )


@on_testbed
@pytest.mark.parametrize("login", ["root", "tester"])
async def test_endings_on_real_hosts(login: str) -> None:
    token = f"89{os.getpid()}"
    async with box(0, username=login) as node, box(0, username="root") as other:
        for step in (
            Run(f"trap '' HUP TERM; sleep {token} & sleep {token}", timeout=2),
            RunString(f"#!/bin/bash\nsleep {token} & sleep {token}", timeout=2),
        ):
            task = asyncio.create_task(step.co_run_remote(node))
            for running in (True, False):
                for _ in range(60):
                    found = await other.run(f"pgrep -x -f 'sleep {token}' >/dev/null") == 0
                    if found == running:
                        break
                    await asyncio.sleep(0.1)
                else:
                    raise AssertionError("still running" if found else "never ran")
            with pytest.raises(CommandFailedError):
                await task
        assert await node.run('test -z "$(ls -A .apssh-remote)"') == 0


def test_forever_jobs_beyond_max_sessions(sshd: Sshd) -> None:
    node = sshd.node()
    scheduler = Scheduler(
        *(SshJob(node, command="sleep 60", forever=True) for _ in range(12)),
        SshJob(node, command="true"),
    )
    assert scheduler.run()
    apssh.close_ssh_in_scheduler(scheduler)


async def test_closing_in_a_running_loop_names_the_coroutine() -> None:
    with pytest.raises(UsageError) as caught:
        apssh.close_ssh_in_scheduler(Scheduler())
    assert str(caught.value) == (
        "close_ssh_in_scheduler in a running loop: await co_close_ssh_in_scheduler(scheduler) there"
    )


def test_nested_schedulers(make_sshd: Callable[..., Sshd]) -> None:
    sshd = make_sshd()
    inner = Scheduler(SshJob(sshd.node(), command="true"), label="inner")
    outer = Scheduler(inner, SshJob(sshd.node(), command="true", required=inner))
    assert outer.run()
    eventually(lambda: sshd.connections() == 2)
    apssh.close_ssh_in_scheduler(outer)
    eventually(lambda: sshd.connections() == 0)


def test_labels_and_listings(capfd: Any) -> None:
    node = SshNode("box", username="me")
    job = SshJob(node, commands=[Run("ls"), Push("a", "b"), Run("hidden", label="")])
    labelled = SshJob(node, command="x", label="a label", required=job)
    scheduler = Scheduler(job, labelled, PrintJob("hello", required=labelled))
    scheduler.list(details=True)
    assert (job.text_label(), labelled.text_label()) == ("me@box: ls (+1)", "me@box: x")
    assert job.graph_label().splitlines()[1:] == [
        "ls",
        "Push: a onto b",
    ] and job.graph_label().splitlines()[0].endswith(": me@box")
    assert labelled.graph_label().splitlines()[1:] == ["a label", "x"]
    assert job.details() == "  me@box: ls\n  me@box: Push: a onto b\n  me@box: (hidden)"
    assert "me@box: Push: a onto b" in capfd.readouterr().out


def test_pictures_of_asynciojobs(home: Path) -> None:
    scheduler = Scheduler(
        SshJob(SshNode("box"), commands=[Run('echo "quoted" <&>'), RunScript("not-there.sh")])
    )
    scheduler.export_as_dotfile("s.dot")
    assert "RunScript: not-there.sh" in (home / "s.dot").read_text()
    if shutil.which("dot"):
        scheduler.export_as_svgfile("s")
        scheduler.export_as_pngfile("s")
        assert (home / "s.svg").stat().st_size and (home / "s.png").stat().st_size
        odd = 'grep "\\"x\\"" f && awk "{print \\$1 \\"\\\\n\\"}" &amp; echo end\\'
        Scheduler(SshJob(SshNode("box"), command=odd)).export_as_svgfile("odd")
        texts = ElementTree.parse(home / "odd.svg").iter("{http://www.w3.org/2000/svg}text")
        assert odd in [text.text for text in texts]


async def test_cancelled_job_tells_what_may_still_be_running(sshd: Sshd, capfd: Any) -> None:
    token = f"3.{os.getpid()}"  # it ends by itself
    async with sshd.node(guard=False) as node:
        task = asyncio.create_task(SshJob(node, command=f"sleep {token}").co_run())
        await eventually_async(lambda: processes(f"sleep {token}"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert capfd.readouterr().err == f"127.0.0.1: it may still be running: sleep {token}\n"


def test_inner_cancellation_does_not_break_the_scheduler() -> None:
    class Cancels(apssh.AbstractCommand):
        async def co_run_local(self, node: Any) -> int | str | None:
            raise asyncio.CancelledError

    job = SshJob(LocalNode(), command=Cancels(), critical=False)
    other = SshJob(LocalNode(), command="true", required=job)
    assert Scheduler(job, other).run()
    assert str(job.result()) == "LOCALNODE: local: cancelled from inside" and other.result() == 0


def test_any_exception_of_a_step_is_a_result(capfd: Any) -> None:
    class Breaks(apssh.AbstractCommand):
        async def co_run_local(self, node: Any) -> int | str | None:
            return 1 // 0

    job = SshJob(LocalNode(), commands=[Breaks(), Run("echo goes on")], critical=False)
    assert Scheduler(job).run()
    assert (
        str(job.result())
        == "LOCALNODE: local: ZeroDivisionError: integer division or modulo by zero"
    )
    assert capfd.readouterr().out == "LOCALNODE:goes on\n"
    with pytest.raises(ZeroDivisionError):
        Scheduler(SshJob(LocalNode(), command=Breaks())).run()


def test_plain_jobs_between_ssh_jobs(capfd: Any) -> None:
    async def plain() -> int:
        return 42

    scheduler = Scheduler()
    first = SshJob(LocalNode(), command="echo first", scheduler=scheduler)
    job = Job(plain(), required=(first, None), scheduler=scheduler)
    Sequence(
        SshJob(LocalNode(), command="echo second", required=[job]),
        PrintJob("printed"),
        scheduler=scheduler,
    )
    assert scheduler.orchestrate()
    scheduler.debrief()
    assert capfd.readouterr().out.splitlines()[:3] == [
        "LOCALNODE:first",
        "LOCALNODE:second",
        "printed",
    ]


# experiment


def teardown_jobs(node: SshNode | LocalNode) -> list[SshJob]:
    """The second fails, the third takes too long."""
    return [
        SshJob(node, command="echo a >> down"),
        SshJob(node, command="echo b >> down; exit 5"),
        SshJob(node, command="echo c >> down; sleep 60"),
        SshJob(node, command="echo d >> down", critical=False),
    ]


@pytest.fixture
def brief_teardown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apssh.experiment, "teardown_timeout", 1)


def saved(path: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(Path(path).read_text())
    return record


@pytest.mark.parametrize("way", ["with", "async with"])
@pytest.mark.parametrize("ending", ["done", "failed", "raised"])
def test_experiment_leaves_nothing_behind(
    make_sshd: Callable[..., Sshd], brief_teardown: None, way: str, ending: str, capfd: Any
) -> None:
    """However the block ends: all of the teardown, the files, no connection; the first failure is
    the one that is seen.
    """
    sshd = make_sshd()
    gateway = sshd.node()
    node, other = sshd.node(gateway=gateway), sshd.node()
    token = f"93{os.getpid()}"
    until_up = "while ! test -e up; do sleep 0.1; done"
    scheduler = Scheduler(
        SshJob(node, command=f"sleep {token} & touch up; wait", forever=True),
        SshJob(node, command=f"{until_up}; exit {4 if ending == 'failed' else 0}", label="last"),
    )
    around = apssh.experiment(
        scheduler, record="run.json", timeline="run.svg", teardown=teardown_jobs(other)
    )

    async def main() -> None:
        async with around:
            await scheduler.co_run()
            assert ending != "raised", "mine"

    failures: dict[str, type[BaseException]] = {"raised": AssertionError}
    with pytest.raises(failures.get(ending, CommandFailedError)) as caught:
        if way == "async with":
            run(main())
        else:
            with around:
                scheduler.run()
                assert ending != "raised", "mine"
    third = "teardown: me: no end within 1 s".replace(
        "me", f"{ME}@127.0.0.1: echo c >> down; sleep 60"
    )
    second = "127.0.0.1: status: ended with status 5: echo b >> down; exit 5"
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("teardown")]
    if ending == "done":
        assert (str(caught.value), told) == (second, [third])
    else:
        assert told == [f"teardown: {second}", third]
    assert (sshd.home / "down").read_text() == "a\nb\nc\nd\n"
    states = {job["label"]: job["state"] for job in saved("run.json")["jobs"]}
    assert states["last"] == ("failed" if ending == "failed" else "ok")
    assert "<svg" in Path("run.svg").read_text()
    eventually(lambda: not sshd.connections())
    assert not gateway.is_connected()
    eventually(lambda: not processes(f"sleep {token}"))


@pytest.mark.parametrize("way", ["with", "async with"])
def test_experiment_that_is_interrupted(make_sshd: Callable[..., Sshd], way: str) -> None:
    """Ctrl-C: what runs is ended, the teardown runs, the files are written."""
    sshd = make_sshd()
    token = f"92{os.getpid()}"
    block = {
        "with": "with around:\n    scheduler.run()\n",
        "async with": "async def main():\n    async with around:\n"
        "        await scheduler.co_run()\nasyncio.run(main())\n",
    }[way]
    script = (
        f"""
import asyncio
import apssh
from asynciojobs import Scheduler
node = apssh.SshNode("127.0.0.1", port={sshd.port}, username={ME!r})
scheduler = Scheduler(apssh.SshJob(node, command="sleep {token}", label="long"))
stop = apssh.SshJob(node, command="echo down >> down")
around = apssh.experiment(scheduler, record="run.json", timeline="run.svg", teardown=[stop])
"""
        + block
    )
    process = start_python("-c", script)
    eventually(lambda: processes(f"sleep {token}"))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err.strip().split(b"\n")[-1]) == (
        -signal.SIGINT,
        b"KeyboardInterrupt",
    )
    assert (sshd.home / "down").read_text() == "down\n"
    assert out == b""
    eventually(lambda: not processes(f"sleep {token}"))
    states = {job["label"]: job["state"] for job in saved("run.json")["jobs"]}
    assert states == {"long": "cancelled", "echo down >> down": "ok"}
    eventually(lambda: not sshd.connections())


def test_experiment_whose_teardown_requires_what_ran_before(home: Path) -> None:
    before = SshJob(LocalNode(), command="true", label="before")
    assert Scheduler(before).run()
    stop = SshJob(LocalNode(), command="touch down", required=before)
    with apssh.experiment(Scheduler(), record="run.json", teardown=[stop]):
        pass
    assert (home / "down").exists()
    (job,) = saved("run.json")["jobs"]
    assert (job["label"], job["state"]) == ("touch down", "ok")


def test_experiment_with_nothing_to_tear_down(capfd: Any) -> None:
    scheduler = Scheduler(SshJob(LocalNode(), command="echo x"))
    with apssh.experiment(scheduler) as around:
        assert scheduler.run() and around.scheduler is scheduler
    assert capfd.readouterr() == ("LOCALNODE:x\n", "")


def test_experiment_teardown_of_other_jobs(capfd: Any) -> None:
    """A Scheduler runs its jobs at once; plain jobs do; a failure in one of them is told."""

    async def plain() -> None:
        raise ValueError("plain")

    scheduler = Scheduler(SshJob(LocalNode(), command="true"))
    both = Scheduler(
        *(SshJob(LocalNode(), command=f"touch {name}") for name in "ab"),
        SshJob(LocalNode(), command="exit 1"),
        label="both",
        critical=False,
    )
    teardown = [both, Job(plain(), label="p"), PrintJob("printed")]
    with pytest.raises(ApsshError) as caught, apssh.experiment(scheduler, teardown=teardown):
        scheduler.run()
    assert str(caught.value) == "both: not all of its jobs succeeded"
    shown = capfd.readouterr()
    assert shown.err == "teardown: plain\n" and shown.out.endswith("printed\n")


@pytest.mark.parametrize("ending", ["done", "raised"])
def test_experiment_whose_record_has_no_place_any_more(
    home: Path, ending: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """What the block raised is the failure that is seen."""
    (home / "out").mkdir()
    scheduler = Scheduler(SshJob(LocalNode(), command="true"))
    with (
        pytest.raises((FileNotFoundError, AssertionError)) as caught,
        apssh.experiment(scheduler, record="out/run.json"),
    ):
        scheduler.run()
        shutil.rmtree("out")
        assert ending == "done", "mine"
    gone = rf"\[Errno 2\] No such file or directory: '{re.escape(str(home))}/out/\.apssh-\w+'"
    seen, told = ("mine", f"teardown: {gone}\n") if ending == "raised" else (gone, "")
    assert re.match(seen, str(caught.value))
    assert re.fullmatch(told, capfd.readouterr().err)


def test_experiment_misuse(home: Path) -> None:
    job = SshJob(LocalNode(), command="true", label="mine")
    scheduler = Scheduler(Scheduler(job))
    for arguments, message in (
        (
            {"teardown": [job]},
            "experiment: teardown is a list of jobs made without scheduler=",
        ),
        ({"teardown": ["x"]}, "experiment: teardown is a list of jobs made without scheduler="),
        ({"recrod": "x"}, "unknown option recrod: did you mean record?"),
    ):
        with pytest.raises(UsageError) as caught:
            apssh.experiment(scheduler, **arguments)  # type: ignore[arg-type]
        assert str(caught.value) == message
    for option in ("record", "timeline"):
        with pytest.raises(FileNotFoundError), apssh.experiment(scheduler, **{option: "no/x"}):
            raise AssertionError("it was told too late")

    async def main() -> None:
        with pytest.raises(UsageError) as caught, apssh.experiment(scheduler):
            raise AssertionError
        assert str(caught.value) == (
            "experiment in a running loop: async with apssh.experiment(...) there"
        )

    run(main())


def test_uvloop(sshd: Sshd, capfd: Any) -> None:
    """Nodes, a real gateway, copies, jobs and the demo fleet, in uvloop's loop."""
    uvloop = pytest.importorskip("uvloop")  # not for every Python, as in its first months
    Path("f").write_text("sent")

    async def main() -> list[Any]:
        gateway = sshd.node()
        node = sshd.node(gateway=gateway)
        scheduler = Scheduler(
            SshJob(
                node,
                commands=[
                    Wait(),
                    Push("f", "there"),
                    RunString("cat there; echo"),
                    Pull("there", "back"),
                ],
            ),
            SshJob(LocalNode(), command="echo here"),
        )
        async with apssh.experiment(scheduler):
            found = [await node.run("exit 3"), await scheduler.co_run()]
        async with apssh.demo_fleet(2) as nodes:
            _open_ports.update(node.port for node in nodes)
            nodes[1].gateway = nodes[0]
            found += [await node.run("true") for node in nodes]
        (result,) = await apssh.co_run(sshd.target, "echo quick")
        return [*found, result.stdout]

    assert uvloop.run(main()) == [3, True, 0, 0, "quick\n"]
    shown = capfd.readouterr()
    assert sorted(shown.out.splitlines()) == ["127.0.0.1:sent", "LOCALNODE:here"]
    assert (shown.err, Path("back").read_text()) == ("", "sent")


def test_node_outlives_event_loops(make_sshd: Callable[..., Sshd]) -> None:
    """Each loop has a connection of its own, and the last one is closed with the node."""
    sshd = make_sshd()
    node = sshd.node(gateway=sshd.node())
    for logins in (2, 4):
        assert asyncio.run(node.run("true")) == 0
        assert sshd.logins() == logins
    assert Scheduler(SshJob(node, command="true")).run() and sshd.logins() == 6

    async def close() -> None:
        await node.close()
        assert node.gateway
        await node.gateway.close()

    asyncio.run(close())
    eventually(lambda: not sshd.connections())


MANY_RUNS = """
import asyncio, gc, json, os, threading
from pathlib import Path
from asynciojobs import Scheduler
import apssh
target, port = {target!r}, {port}
node = apssh.SshNode("127.0.0.1", port=port, username={user!r}, formatter=apssh.Formatter())

def quick():
    (result,) = apssh.run(target, "echo x")
    assert result.stdout == "x\\n", result

def scheduled():
    scheduler = Scheduler(apssh.SshJob(node, command="true"))
    with apssh.experiment(scheduler):
        assert scheduler.run()

def unclosed():
    assert Scheduler(apssh.SshJob(node, command="true")).run()

def state():
    gc.collect()
    objects = gc.get_objects()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return dict(
        files=len(os.listdir("/proc/self/fd")),
        threads=threading.active_count(),
        loops=sum(isinstance(each, asyncio.AbstractEventLoop) for each in objects),
        objects=len(objects),
        memory=pages * os.sysconf("SC_PAGESIZE") // 1024,
    )

seen = []
loop = asyncio.new_event_loop()
assert state()["loops"] == 1
loop.close()
del loop
for quick_runs, schedulers in {turns}:
    for _ in range(quick_runs):
        quick()
    for number in range(schedulers):
        scheduled() if number % 2 else unclosed()
    asyncio.run(node.close())
    seen.append(state())
print(json.dumps(seen))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts by /proc")
def test_many_runs_in_one_process(make_sshd: Callable[..., Sshd]) -> None:
    """1,000 ``apssh.run`` and 200 ``Scheduler.run()`` leave no loop, file, thread or memory."""
    sshd = make_sshd()
    turns = [(100, 20), (450, 90), (450, 90)]
    script = MANY_RUNS.format(target=sshd.target, port=sshd.port, user=ME, turns=turns)
    done = run_python(
        "-c",
        script,
        text=True,
        timeout=600,
        env={name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")},
    )
    assert (done.returncode, done.stderr) == (0, "")
    first, middle, last = json.loads(done.stdout)
    print(done.stdout)
    for what in ("files", "threads", "loops"):
        assert first[what] == middle[what] == last[what], done.stdout
    # a run that left one object behind would leave 540
    assert last["objects"] - middle["objects"] < 100, done.stdout
    assert last["memory"] - middle["memory"] < 1024, done.stdout  # KiB


# published scripts


def test_script_in_the_style_of_a_testbed_kit(
    make_sshd: Callable[..., Sshd], home: Path, capfd: Any
) -> None:
    """One list of includes, verbose=None everywhere, a shared formatter, nested schedulers, a
    window, plain jobs in between, listings and pictures, and what came of it looked at afterwards.
    """
    sshd = make_sshd()
    (home / "nodes.sh").write_text(
        '#!/bin/bash\nsource $(dirname "$BASH_SOURCE")/r2labutils.sh\n"$@"\n'
    )
    (home / "r2labutils.sh").write_text("init() { echo init $1; }\nfails() { return 7; }\n")
    includes = ["r2labutils.sh", "nodes.sh"]
    verbose = None
    formatter = TimeHostFormatter(verbose=verbose)
    found = Variables()

    async def measured() -> str:
        return f"computed {found.kernel}"

    for _ in range(2):
        gateway = sshd.node(formatter=formatter, verbose=verbose)
        nodes = [sshd.node(gateway=gateway, formatter=formatter, verbose=verbose) for _ in range(3)]
        lease = SshJob(
            gateway, critical=True, verbose=verbose, command=Run("true", verbose=verbose)
        )
        inner = Scheduler(critical=None, verbose=verbose, label="prepare", required=lease)
        prepared = [
            SshJob(
                node,
                scheduler=inner,
                critical=None,
                verbose=verbose,
                commands=[
                    RunScript("nodes.sh", "init", number, includes=includes, verbose=verbose),
                    None,
                    Push("nodes.sh", f"copy{number}", verbose=verbose),
                ],
            )
            for number, node in enumerate(nodes)
        ]
        bad = SshJob(
            nodes[0],
            critical=False,
            required=inner,
            label="bad",
            command=RunScript("nodes.sh", "fails", includes=includes, verbose=verbose),
        )
        dead = SshJob(
            SshNode("127.0.0.1", port=free_port(), gateway=gateway, formatter=formatter),
            critical=False,
            required=inner,
            command="true",
        )
        kernel = SshJob(
            nodes[1],
            required=[bad, (dead, None)],
            command=Run("uname -s", capture=Capture("kernel", found)),
        )
        said = PrintJob("measuring", sleep=0.1, required=kernel)
        compute = Job(measured(), label="compute", required=said)
        scheduler = Scheduler(
            lease, inner, bad, dead, kernel, said, compute, jobs_window=2, verbose=verbose
        )
        scheduler.check_cycles()
        scheduler.list()
        scheduler.export_as_dotfile("kit.dot")
        assert scheduler.run(), scheduler.debrief()
        assert (bad.result(), bad.raised_exception()) == (7, None)
        assert isinstance(dead.raised_exception(), ConnectionFailedError)
        assert [job.result() for job in prepared] == [0, 0, 0]
        assert compute.result() == "computed Linux"
        scheduler.list(details=True)
        apssh.close_ssh_in_scheduler(scheduler)
        eventually(lambda: not sshd.connections())
    shown = capfd.readouterr()
    assert shown.out.count(":init ") == 6 and shown.out.count("measuring") >= 2
    assert shown.err.count("job bad failed (not critical): status: ended with status 7") == 2
    assert "RunScript: nodes.sh init 2" in Path("kit.dot").read_text()


def test_scheduler_in_a_thread_with_a_loop_of_its_own(sshd: Sshd, capfd: Any) -> None:
    """Nodes and scheduler are made elsewhere, as at the import of a script."""
    scheduler = Scheduler(SshJob(sshd.node(), commands=[Run("echo threaded"), Run("true")]))
    outcome: list[bool] = []

    def work() -> None:
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        try:
            outcome.append(loop.run_until_complete(scheduler.co_run()))
            loop.run_until_complete(apssh.co_close_ssh_in_scheduler(scheduler))
        finally:
            loop.close()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert outcome == [True]
    assert capfd.readouterr().out == "127.0.0.1:threaded\n"


# --------------------------------------------------------------------------------------------------
# the record of a run, and its picture
# --------------------------------------------------------------------------------------------------


SVG = "{http://www.w3.org/2000/svg}"


def fleet() -> tuple[SshNode, list[SshNode]]:
    gateway = SshNode("gw.example.org", username="slice")
    return gateway, [SshNode(f"node{number}", gateway=gateway) for number in (10, 2)]


def made(
    job: SshJob,
    *times: tuple[float, float | None],
    kind: str | None = None,
    error: str | None = None,
) -> SshJob:
    """A job with records of a run that was not: steps from and to these seconds."""
    job.records = [
        StepRecord(
            label=str(step),
            command=str(step),
            start_wall=1e9 + start,
            start=start,
            end=end,
            end_wall=None if end is None else 1e9 + end,
            status=0,
            kind=kind,
            error=error,
        )
        for step, (start, end) in zip(("one", "two", "three"), times, strict=False)
    ]
    return job


def record_of(*jobs: SshJob) -> dict[str, Any]:
    """The record of a run that was not: made jobs have ended, others never ran."""
    record = run_record(Scheduler(*jobs))
    for job in record["jobs"]:
        if job["steps"]:
            last = job["steps"][-1]
            states = {None: "ok", "cancelled": "cancelled"}
            job["state"], job["error"] = states.get(last["kind"], "failed"), last["error"]
    return record


def elements(path: str | Path, kind: str, name: str) -> list[ElementTree.Element]:
    """The elements of this class, after the picture parsed as XML."""
    root = ElementTree.parse(path).getroot()
    assert root.tag == f"{SVG}svg"
    return [each for each in root.iter(f"{SVG}{kind}") if name in each.get("class", "").split()]


def bars_of(path: str | Path) -> dict[str, ElementTree.Element]:
    """The bars of a picture by their labels."""
    bars = elements(path, "svg", "bar")
    return {bar.findtext(f"{SVG}text") or "": bar for bar in bars}


def titles(path: str | Path) -> list[str]:
    """What shows when the pointer is on a bar."""
    return [bar.findtext(f"{SVG}title") or "" for bar in elements(path, "svg", "bar")]


def texts(path: str | Path, name: str) -> list[str]:
    return [each.text or "" for each in elements(path, "text", name)]


def number_of(element: ElementTree.Element, attribute: str) -> float:
    return float((element.get(attribute) or "").removesuffix("%"))


def jobs_by_label(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {job["label"]: job for job in record["jobs"]}


# topology


def behind(gateway: str, port: int, hostname: str) -> SshNode:
    return SshNode(hostname, gateway=SshNode(gateway, username="slice", port=port))


@pytest.mark.parametrize(
    "node, text",
    [
        pytest.param(SshNode("box"), "root@box", id="direct"),
        pytest.param(SshNode("box", username="me", port=2222), "me@box:2222", id="port"),
        pytest.param(SshNode("::1", port=2222), "root@[::1]:2222", id="address"),
        pytest.param(behind("gw", 22, "box"), "slice@gw->root@box", id="gateway"),
        pytest.param(behind("gw", 222, "box"), "slice@gw:222->root@box", id="gateway's port"),
        pytest.param(LocalNode(), "Local Node", id="here"),
    ],
)
def test_text_of_a_node_is_its_way(node: SshNode | LocalNode, text: str) -> None:
    assert str(node) == text
    record = run_record(Scheduler(SshJob(node, command="true")))
    assert record["nodes"][-1]["way"] == text
    assert record["nodes"][-1]["label"] == text.split("->")[-1]


def test_topology_goes_from_here_outwards() -> None:
    _, nodes = fleet()
    scheduler = Scheduler(
        *(SshJob(node, command="true") for node in nodes),
        SshJob(LocalNode(), command="true"),
        Scheduler(SshJob(SshNode("direct", port=2222), command="true")),
        SshJob(SshNode("direct", port=2222), command="another node object, one place"),
    )
    assert (
        topology_dot(scheduler)
        == """digraph topology {
  rankdir=LR;
  local [label="Local Node" shape=box];
  n1 [label="root@direct:2222"];
  local -> n1;
  n2 [label="slice@gw.example.org"];
  local -> n2;
  n3 [label="root@node2"];
  n2 -> n3;
  n4 [label="root@node10"];
  n2 -> n4;
}
"""
    )


def test_topology_quotes_names() -> None:
    node = SshNode("host", username='a"b\\N&lt;\n')
    assert r'label="a\"b\\N&amp;lt; @host"' in topology_dot(Scheduler(SshJob(node, command="true")))


def test_topology_files(tmp_path: Path) -> None:
    _, nodes = fleet()
    scheduler = Scheduler(SshJob(nodes[0], command="true"))
    topology_as_dotfile(scheduler, tmp_path / "a.dot")
    assert (tmp_path / "a.dot").read_text() == topology_dot(scheduler)
    try:
        subprocess.run(["dot", "-V"], capture_output=True, check=True)
    except FileNotFoundError:
        pytest.skip("no dot program")
    name = topology_as_pngfile(scheduler, str(tmp_path / "-b"))
    assert name == str(tmp_path / "-b.png")
    assert (tmp_path / "-b.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "-b.dot").read_text() == topology_dot(scheduler)


def test_topology_without_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        UsageError, match=r"^no dot program \(graphviz\) to draw .*x\.png: .* 'dot'$"
    ):
        topology_as_pngfile(Scheduler(), tmp_path / "x")


def test_topology_with_a_dot_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    (tmp_path / "dot").write_text("#!/bin/sh\necho 'no fonts' >&2; exit 1\n")
    (tmp_path / "dot").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UsageError, match=r"^dot could not draw .*x\.png$"):
        topology_as_pngfile(Scheduler(), tmp_path / "x")
    assert capfd.readouterr().err == "no fonts\n"
    assert not (tmp_path / "x.png").exists()


def test_topology_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "graphviz", None)
    with pytest.raises(UsageError, match="pip install graphviz"):
        topology_graph(Scheduler())
    monkeypatch.delitem(sys.modules, "graphviz")
    graphviz = pytest.importorskip("graphviz")
    graph = topology_graph(Scheduler())
    assert isinstance(graph, graphviz.Source)
    assert graph.source == topology_dot(Scheduler())


# records


def test_record_of_a_run() -> None:
    here = LocalNode()
    first = SshJob(
        here, commands=[Run("printf hello"), Run("exit 3")], label="first", critical=False
    )
    plain = PrintJob("word", label="plain", required=first)
    inner = Scheduler(
        SshJob(LocalNode(), command=RunString("sleep 0.1", label="nap")),
        label="inner",
        required=[plain, first],
    )
    last = SshJob(here, command="true", required=inner)
    scheduler = Scheduler(first, plain, inner, last, critical=False)
    assert scheduler.run()
    last.forever = True
    record = json.loads(json.dumps(run_record(scheduler)))
    assert list(record) == [
        "versions",
        "started",
        "started_epoch",
        "ended",
        "ended_epoch",
        "nodes",
        "jobs",
    ]
    assert set(record["versions"]) == {"apssh", "asyncssh", "asynciojobs", "python"}
    assert all(record["versions"].values())
    assert 0.1 < record["ended_epoch"] - record["started_epoch"] < 30
    assert record["started"] < record["ended"]
    assert record["nodes"] == [
        {
            "id": 1,
            "label": "Local Node",
            "way": "Local Node",
            "hostname": "LOCALNODE",
            "username": ME,
            "port": 22,
            "gateway": None,
            "host_key": None,
        }
    ]
    jobs = record["jobs"]
    assert [
        (job["id"], job["label"], job["parent"], job["requirements"], job["state"], job["node"])
        for job in jobs
    ] == [
        (1, "first", None, [], "failed", 1),
        (2, "plain", None, [1], "ok", None),
        (3, "inner", None, [1, 2], "ok", None),
        (4, "nap", 3, [], "ok", 1),
        (5, "true", None, [3], "ok", 1),
    ]
    assert [job["type"] for job in jobs] == ["SshJob", "PrintJob", "Scheduler", "SshJob", "SshJob"]
    assert [job["critical"] for job in jobs] == [False, True, True, True, True]
    assert [job["forever"] for job in jobs] == [False, False, False, False, True]
    assert jobs[0]["error"] == "LOCALNODE: status: ended with status 3: exit 3"
    assert [job["error"] for job in jobs[1:]] == [None, None, None, None]
    hello, exits = jobs[0]["steps"]
    assert (hello["label"], hello["status"], hello["kind"]) == ("printf hello", 0, None)
    assert hello["bytes_out"] >= 5
    assert hello["end"] >= hello["start"]
    assert (exits["label"], exits["status"], exits["kind"]) == ("exit 3", 3, "status")
    assert len(jobs[3]["steps"][0]["script_sha256"]) == 64


def test_record_before_a_run() -> None:
    gateway, nodes = fleet()
    gateway._host_key_shown = "SHA256:abc"
    scheduler = Scheduler(
        Sequence(
            SshJob(nodes[0], command="true", label="a"), SshJob(nodes[1], command="true", label="b")
        )
    )
    record = run_record(scheduler)
    assert [
        (node["label"], node["way"], node["gateway"], node["host_key"]) for node in record["nodes"]
    ] == [
        ("slice@gw.example.org", "slice@gw.example.org", None, "SHA256:abc"),
        ("root@node2", "slice@gw.example.org->root@node2", 1, None),
        ("root@node10", "slice@gw.example.org->root@node10", 1, None),
    ]
    assert [
        (job["label"], job["node"], job["state"], job["requirements"], job["steps"])
        for job in record["jobs"]
    ] == [("a", 3, "idle", [], []), ("b", 2, "idle", [1], [])]
    assert record["started"] is record["started_epoch"] is None
    assert record["ended"] is record["ended_epoch"] is None


def test_record_of_a_stopped_run() -> None:
    here = LocalNode()
    sleeper = SshJob(here, command="sleep 30", label="sleeper")
    server = SshJob(here, command="sleep 30", label="server", forever=True)
    plain = Job(asyncio.sleep(30), label="plain")
    never = SshJob(here, command="true", label="never", required=sleeper)
    bad = SshJob(here, command="sleep 0.2; exit 4", label="bad")
    scheduler = Scheduler(sleeper, server, plain, never, bad, critical=False)
    assert not scheduler.run()
    jobs = jobs_by_label(run_record(scheduler))
    assert {label: job["state"] for label, job in jobs.items()} == {
        "sleeper": "cancelled",
        "server": "cancelled",
        "plain": "cancelled",
        "never": "idle",
        "bad": "failed",
    }
    assert jobs["bad"]["error"] == "LOCALNODE: status: ended with status 4: sleep 0.2; exit 4"
    assert jobs["sleeper"]["steps"][0]["kind"] == "cancelled"


def test_record_of_a_stopped_run_while_the_loop_runs() -> None:
    """Who awaits ``co_run`` looks at the record inside of the loop: what was cancelled does not
    run any more there either.
    """

    async def experiment() -> dict[str, Any]:
        plain = Job(asyncio.sleep(30), label="plain")
        bad = SshJob(LocalNode(), command="exit 4", label="bad")
        scheduler = Scheduler(plain, bad, critical=False)
        assert not await scheduler.co_run()
        return run_record(scheduler)

    states = [job["state"] for job in asyncio.run(experiment())["jobs"]]
    assert sorted(states) == ["cancelled", "failed"]


class TellsTwice(SshJob):
    """A non-critical job whose error is its result, and its exception too."""

    def raised_exception(self) -> BaseException | None:
        result = self.result() if self.is_done() else None
        return result if isinstance(result, ApsshError) else None


@pytest.mark.parametrize("kind", [SshJob, TellsTwice])
@pytest.mark.parametrize(
    "command, state, error",
    [
        pytest.param("true", "ok", None, id="ok"),
        pytest.param(
            "exit 3", "failed", "LOCALNODE: status: ended with status 3: exit 3", id="status"
        ),
        pytest.param(
            RunScript("missing.sh"),
            "failed",
            "LOCALNODE: local: script missing.sh: no such file",
            id="no first step",
        ),
    ],
)
def test_state_of_a_job_that_is_not_critical(
    kind: type[SshJob], command: str | RunScript, state: str, error: str | None
) -> None:
    scheduler = Scheduler(kind(LocalNode(), command=command, critical=False))
    assert scheduler.run()
    (job,) = run_record(scheduler)["jobs"]
    assert (job["state"], job["error"]) == (state, error)


def test_state_of_jobs_that_are_not_ours() -> None:
    async def fails() -> None:
        raise KeyError("k")

    inner = Scheduler(Job(asyncio.sleep(30), label="naps"), timeout=0.1, critical=False, label="in")
    scheduler = Scheduler(Job(fails(), critical=False, label="fails"), inner)
    scheduler.run()
    jobs = jobs_by_label(run_record(scheduler))
    assert {label: (job["state"], job["error"]) for label, job in jobs.items()} == {
        "fails": ("failed", "KeyError('k')"),
        "in": ("failed", "TIMED OUT after 0.1s"),
        "naps": ("cancelled", None),
    }


def test_record_and_picture_in_the_middle_of_a_run(tmp_path: Path) -> None:
    here = LocalNode()
    scheduler = Scheduler(critical=False)
    seen: list[dict[str, Any]] = []

    async def look() -> None:
        await asyncio.sleep(0.3)
        seen.append(run_record(scheduler))
        timeline_as_svgfile(scheduler, tmp_path / "now")

    first = SshJob(here, command="true", label="first")
    runs = SshJob(here, command="sleep 0.6", label="runs", required=first)
    inside = Scheduler(SshJob(here, command="true", label="later"), label="in", required=runs)
    scheduler.update([first, runs, Job(look(), label="looks"), inside])
    assert scheduler.run()
    states = {label: job["state"] for label, job in jobs_by_label(seen[0]).items()}
    assert states == {
        "first": "ok",
        "runs": "running",
        "looks": "running",
        "later": "idle",
        "in": "idle",
    }
    assert seen[0]["ended_epoch"] - seen[0]["started_epoch"] > 0.2
    bars = bars_of(tmp_path / "now.svg")
    assert bars["first"].get("class") == "bar ok"
    assert bars["runs"].get("class") == "bar running"
    assert number_of(bars["runs"], "x") + number_of(bars["runs"], "width") == pytest.approx(
        100, 0.1
    )
    assert all(job["state"] == "ok" for job in run_record(scheduler)["jobs"])


def test_record_and_picture_under_a_window() -> None:
    jobs = [
        SshJob(LocalNode(), command="sleep 0.3", label=f"job{number}", critical=False)
        for number in range(3)
    ]
    scheduler = Scheduler(*jobs, jobs_window=1, timeout=0.45, critical=False)
    assert not scheduler.run()
    labels = {job["state"]: job["label"] for job in run_record(scheduler)["jobs"]}
    assert sorted(labels) == ["cancelled", "ok", "waiting"]
    assert timeline_as_text(scheduler).splitlines()[-1] == f"never ran: {labels['waiting']}"


def test_saved_record_is_private_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("old")
    scheduler = Scheduler(SshJob(LocalNode(), command="true"))
    scheduler.run()
    save_record(scheduler, path)
    assert json.loads(path.read_text()) == run_record(scheduler)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in tmp_path.iterdir() if each.is_file()] == ["run.json"]


def test_what_a_record_is_saved_to(tmp_path: Path) -> None:
    """A link leads to the file that is replaced; a pipe, or a device, is written to and stays what
    it is.
    """
    (tmp_path / "link").symlink_to("run.json")
    save_record(Scheduler(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "run.json").read_text())["jobs"] == []
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    save_record(Scheduler(), tmp_path / "pipe")
    assert json.loads(os.read(reader, 65536))["jobs"] == []
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    os.close(reader)


def test_recording_to_a_bad_place_is_told_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), recording(Scheduler(), tmp_path / "none" / "run.json"):
        raise AssertionError("it must not run")
    with recording(Scheduler(), tmp_path / "run.json"):
        # a program that is killed leaves this
        assert json.loads((tmp_path / "run.json").read_text())["jobs"] == []


def test_saving_that_fails_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    path.write_text("old")
    monkeypatch.setattr(apssh, "run_record", lambda scheduler: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_record(Scheduler(), path)
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir() if each.is_file()] == ["run.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_recording_saves_whatever_happens(tmp_path: Path, error: type[BaseException]) -> None:
    scheduler = Scheduler(
        SshJob(LocalNode(), command="true", label="done"),
        SshJob(LocalNode(), command="exit 3", label="bad"),
    )
    with pytest.raises(error), recording(scheduler, tmp_path / "run.json"):
        with pytest.raises(Exception, match="status 3"):
            scheduler.run()
        raise error
    saved = jobs_by_label(json.loads((tmp_path / "run.json").read_text()))
    assert saved["bad"]["state"] == "failed"


# pictures


def test_picture_of_a_run(tmp_path: Path) -> None:
    here = LocalNode()
    first = SshJob(here, commands=["sleep", "0.1"], label="first")
    bad = SshJob(here, commands=[Run("true"), Run("exit 3")], critical=False, required=first)
    side = SshJob(here, command="true", label="side")
    plain = PrintJob("x", label="plain", required=bad)
    never = SshJob(here, command="true", label="never")
    scheduler = Scheduler(first, bad, side, plain, critical=False)
    scheduler.run()
    scheduler.add(never)
    name = timeline_as_svgfile(scheduler, tmp_path / "run")
    assert name == str(tmp_path / "run.svg") == timeline_as_svgfile(scheduler, name)
    assert texts(name, "way") == ["Local Node"]
    assert set(bars_of(name)) == set(titles(name)) == {"first", "side", "true", "exit 3"}
    assert texts(name, "heading") == [run_record(scheduler)["started"]]
    assert texts(name, "note") == [
        "failed: true (+1): LOCALNODE: status: ended with status 3: exit 3",
        "never ran: never",
    ]


def test_lanes_are_grouped_and_rows_stacked(tmp_path: Path) -> None:
    gateway, (ten, two) = fleet()
    record = record_of(
        made(SshJob(gateway, command="g", label="g"), (0, 9)),
        made(SshJob(ten, command="a", label="a"), (0, 5)),
        made(SshJob(ten, command="b", label="b"), (3, 8)),
        made(SshJob(ten, command="c", label="c"), (5, 6)),
        made(SshJob(two, command="d", label="d"), (0, 1)),
        SshJob(two, command="never", label="nope"),
    )
    name = timeline_as_svgfile(record, tmp_path / "x")
    assert texts(name, "way") == [
        "slice@gw.example.org",
        "slice@gw.example.org->root@node2",
        "slice@gw.example.org->root@node10",
    ]
    rows = [number_of(way, "y") for way in elements(name, "text", "way")]
    bars = bars_of(name)
    tops = {label: number_of(bar, "y") for label, bar in bars.items()}
    assert rows[0] < rows[1] < rows[2]
    assert tops["g"] < tops["d"] < tops["a"] == tops["c"] < tops["b"]
    height = number_of(bars["a"], "height")
    assert tops["b"] >= tops["a"] + height
    widths = {label: number_of(bar, "width") for label, bar in bars.items()}
    assert widths == {"g": 100, "a": 55.56, "b": 55.56, "c": 11.11, "d": 11.11}
    assert number_of(bars["b"], "x") == 33.33
    assert texts(name, "note") == ["never ran: nope"]


def test_lanes_follow_the_tree_of_gateways(tmp_path: Path) -> None:
    top = SshNode("zoo1", username="slice")
    middle = SshNode("middle", gateway=top)
    nodes = [
        SshNode("a-deep", gateway=middle),
        SshNode("b-behind-zoo", gateway=top),
        middle,
        top,
        SshNode("zoo1-2", username="slice"),
        SshNode("first"),
    ]
    name = timeline_as_svgfile(
        record_of(*(made(SshJob(node, command="y"), (0, 1)) for node in nodes)), tmp_path / "x"
    )
    assert texts(name, "way") == [
        "root@first",
        "slice@zoo1",
        "slice@zoo1-2",
        "slice@zoo1->root@b-behind-zoo",
        "slice@zoo1->root@middle",
        "slice@zoo1->root@middle->root@a-deep",
    ]


def test_failures_stand_out(tmp_path: Path) -> None:
    node = SshNode("box")
    jobs = [
        made(SshJob(node, command="x", label=kind), (0, 1), kind=kind, error=f"box: {kind}")
        for kind in ("status", "lost", "timeout", "cancelled")
    ]
    name = timeline_as_svgfile(record_of(*jobs), tmp_path / "x")
    assert {label: bar.get("class") for label, bar in bars_of(name).items()} == {
        "status": "bar failed",
        "lost": "bar failed",
        "timeout": "bar failed",
        "cancelled": "bar cancelled",
    }
    assert ".failed rect { fill: #e8590c; stroke-width: 4 }" in Path(name).read_text()
    assert texts(name, "note") == [
        "failed: lost: box: lost",
        "failed: status: box: status",
        "failed: timeout: box: timeout",
    ]
    # a bar is seen, however short it is
    short = made(SshJob(node, command="x", label="short"), (50, 50))
    name = timeline_as_svgfile(record_of(*jobs, short), tmp_path / "y")
    assert number_of(bars_of(name)["short"], "width") == 0.3


NASTY = "<&\"'> \x1b[31m\x00\udc80\ufffe\u202e]]>é漢"
HARMLESS = "<&\"'>  [31m    ]]>é漢"


def test_texts_cannot_break_the_picture(tmp_path: Path) -> None:
    node = SshNode("host", username='a<&"b')
    broken = made(SshJob(node, command="x", label=NASTY), (0, 9), kind="lost", error=NASTY)
    record = record_of(broken, SshJob(node, command="y", label=NASTY + "2" * 900))
    name = timeline_as_svgfile(record, tmp_path / "x")
    assert list(bars_of(name)) == titles(name) == [HARMLESS]
    assert texts(name, "way") == ['a<&"b@host']
    notes = texts(name, "note")
    assert max(map(len, notes)) <= 190
    assert notes[0] == f"failed: {HARMLESS}: {HARMLESS}"
    assert notes[1].startswith(f"never ran: {HARMLESS}")
    text = timeline_as_text(record, 120)
    assert HARMLESS in text
    assert set(NASTY) & set(text) == set(HARMLESS)


def test_picture_needs_no_other_file_and_has_a_page_of_its_own(tmp_path: Path) -> None:
    name = timeline_as_svgfile(Scheduler(SshJob(LocalNode(), command="true")), tmp_path / "x")
    picture = Path(name).read_text()
    assert re.findall('http[^"]*|href|@import|<image|<script', picture) == [
        "http://www.w3.org/2000/svg"
    ]
    assert re.findall(r"url\([^)]*\)", picture) == ["url(#stripes)"]
    shapes = [each for each in ElementTree.parse(name).getroot() if each.tag != f"{SVG}style"]
    assert [each.tag.removeprefix(SVG) for each in shapes[:2]] == ["pattern", "path"]
    assert shapes[1].get("fill") == "#fff"  # a light page, on a dark one too


def test_a_record_read_back_gives_the_same_picture(tmp_path: Path) -> None:
    scheduler = Scheduler(made(SshJob(LocalNode(), command="x"), (0, 9)))
    save_record(scheduler, tmp_path / "run.json")
    record = json.loads((tmp_path / "run.json").read_text())
    timeline_as_svgfile(record, tmp_path / "a")
    timeline_as_svgfile(scheduler, tmp_path / "b")
    assert (tmp_path / "a.svg").read_text() == (tmp_path / "b.svg").read_text()
    assert timeline_as_text(record) == timeline_as_text(scheduler)


@pytest.mark.parametrize("labels", [[], ["a"], ["a", "b"]])
def test_nothing_ran(tmp_path: Path, labels: list[str]) -> None:
    scheduler = Scheduler(*(SshJob(LocalNode(), command="true", label=label) for label in labels))
    name = timeline_as_svgfile(scheduler, tmp_path / "x")
    assert not titles(name)
    notes = [f"never ran: {label}" for label in labels]
    assert (texts(name, "heading"), texts(name, "note")) == (["nothing ran"], notes)
    assert timeline_as_text(scheduler).splitlines() == ["nothing ran", *notes]


def test_texts_of_a_picture_do_not_overlap(tmp_path: Path) -> None:
    """Each label is inside of its bar, whose edge cuts it, and no bar is on another."""
    jobs = []
    for node in (SshNode(f"node{number}") for number in range(50)):
        for number in range(6):
            start = number * 10 + (number * 7 + int(node.hostname[4:]) * 3) % 9
            job = SshJob(node, command="x", label=f"job number {number}")
            jobs.append(made(job, (start, start + (number * 5) % 11 + 0.3)))
    name = timeline_as_svgfile(record_of(*jobs), tmp_path / "x")
    rows: dict[float, list[tuple[float, float]]] = {}
    bars = elements(name, "svg", "bar")
    for bar in bars:
        assert len(bar.findall(f"{SVG}text")) == 1
        assert bar.get("overflow") is None
        x, width = number_of(bar, "x"), number_of(bar, "width")
        rows.setdefault(number_of(bar, "y"), []).append((x, x + width))
    assert len(bars) == len(texts(name, "label")) == 300
    assert len(rows) > 50
    assert "overflow" not in Path(name).read_text().partition("</style>")[0]
    for row in rows.values():
        for (_, end), (start, _) in itertools.pairwise(sorted(row)):
            assert end <= start + 0.02  # per cent; both are rounded


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0 s"),
        (0.00735, "0.007 s"),
        (0.25, "0.25 s"),
        (59, "59 s"),
        (59.97, "0:01:00"),
        (90, "0:01:30"),
        (5400, "1:30:00"),
        (90_000, "1 day, 1:00:00"),
    ],
)
def test_durations(tmp_path: Path, seconds: float, text: str) -> None:
    record = record_of(made(SshJob(LocalNode(), command="x"), (0, seconds)))
    line = timeline_as_text(record).splitlines()[-1]
    assert line.split("| ")[1].split(" ok")[0].strip() == text


def test_the_time_axis_has_ten_parts(tmp_path: Path) -> None:
    record = record_of(made(SshJob(LocalNode(), command="x"), (0, 250)))
    name = timeline_as_svgfile(record, tmp_path / "x")
    seconds = ["0 s", "25 s", "50 s"]
    later = [f"0:0{each // 60}:{each % 60:02}" for each in range(75, 251, 25)]
    assert texts(name, "tick") == seconds + later
    places = [number_of(tick, "x") for tick in elements(name, "text", "tick")]
    assert places == list(range(0, 101, 10))


@pytest.mark.parametrize("columns", [1, 5, 20, 40, 80, 200])
def test_text_is_never_wider_than_the_terminal(columns: int) -> None:
    _, nodes = fleet()
    labels = ["a" * 50, "b" * 9999]
    jobs = [
        made(SshJob(node, command="x", label=label), (0, 5), kind="lost", error=label)
        for node, label in zip(nodes, labels, strict=True)
    ]
    text = timeline_as_text(record_of(*jobs, SshJob(nodes[0], command="never")), columns)
    assert max(map(len, text.splitlines())) == columns
    if columns == 200:
        assert labels[0] in text
        assert "never ran: never" in text


def test_text_of_a_run() -> None:
    here, gateway = LocalNode(), SshNode("gateway.example.org")
    record = record_of(
        made(SshJob(here, commands=["x", "y"], label="both"), (0, 5), (5, 10)),
        made(SshJob(here, command="x", label="bad"), (2, 4), kind="status", error="status 3"),
        made(SshJob(SshNode("a", gateway=gateway), command="x"), (10, 10), kind="cancelled"),
        SshJob(here, command="x", label="late"),
    )
    heading, *lines = timeline_as_text(record, 70).splitlines()
    assert heading == record["started"]
    assert lines == [
        "Local Node          |###########          | 5 s      ok        one",
        "Local Node          |    #####            | 2 s      failed    bad",
        "Local Node          |          ###########| 5 s      ok        two",
        ".example.org->root@a|                    #| 0 s      cancelled x",
        "failed: bad: status 3",
        "never ran: late",
    ]


# --------------------------------------------------------------------------------------------------
# services
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"service_id": "a b"}, "service_id 'a b': letters, digits and :-_.@ only"),
        (
            {"service_id": "x", "systemd_type": "a;b"},
            "systemd_type 'a;b': as in systemd.service(5): simple, forking, oneshot...",
        ),
        (
            {"service_id": "x", "environ": {"A B": 1}},
            "environ: 'A B' is not the name of a variable",
        ),
        (
            {"service_id": "x", "environ": {"A": None}},
            "environ: A has no value; 'env -u A ...' as the command unsets it",
        ),
        (
            {"service_id": Deferred("x", {})},
            "service_id Deferred('x'): letters, digits and :-_.@ only",
        ),
        (
            {"service_id": "x", "command": ["a", "b"]},
            "Service: the command is a shell line or a Deferred, not ['a', 'b']",
        ),
        (
            {"service_id": "x", "command": " "},
            "Service: the command is a shell line or a Deferred, not ' '",
        ),
        (
            {"service_id": "x", "tty": True, "systemd_type": "forking"},
            "tty: script(1), which gives the terminal, does not fork: leave systemd_type out",
        ),
    ],
)
def test_service_misuse(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        apssh.Service(**{"command": "true"} | keywords)
    assert str(caught.value) == message


def captured_on(node: SshNode, *commands: apssh.AbstractCommand) -> str:
    """What a last command prints after some others, of which each must succeed."""
    variables = Variables()
    last = commands[-1]
    assert isinstance(last, Run)
    last.capture = Capture("out", variables)
    assert Scheduler(SshJob(node, commands=list(commands))).run()
    asyncio.run(node.close())
    return str(variables.out)


SERVICE_COMMANDS = [
    "echo plain",
    "echo \"double\" 'single' $HOME; echo second",
    "echo a; exit 0 # comment",
    "printf '%s\\n' '100% $$ \\\\ back'",
    "for i in 1 2\ndo echo ${i}x $i\ndone",
    Deferred("echo {{word}}", {"word": "late 'quoted \\\"'"}),
    "echo '${HOME} $$' \"${WORD}\" $((6 * 7))",
]


@on_testbed
@pytest.mark.parametrize("command", SERVICE_COMMANDS, ids=range(len(SERVICE_COMMANDS)))
def test_service_runs_the_command_as_a_shell_does(command: Any) -> None:
    text = command.render() if isinstance(command, Deferred) else command
    word, name = (
        "a 'b' $c ${d} \"e\" %h; touch /tmp/apssh-never",
        f"apssh-test-{os.getpid()}-{SERVICE_COMMANDS.index(command)}",
    )
    service = apssh.Service(
        command,
        service_id=name,
        systemd_type="oneshot",
        environ={"HOME": "/root", "WORD": Deferred("{{word}}", {"word": word})},
    )
    out = captured_on(
        box(),
        service.start_command(),
        Run(
            f"journalctl --sync; journalctl -o cat _SYSTEMD_UNIT={name}.service; "
            "ls /tmp/apssh-never || true"
        ),
    )
    expected = subprocess.run(
        ["/bin/sh", "-c", text],
        env={"HOME": "/root", "WORD": word, "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert out == expected.removesuffix("\n")


@on_testbed
def test_service_life(capfd: Any) -> None:
    node = box()
    name = f"apssh-life-{os.getpid()}"
    service = apssh.Service(
        "echo \"begun $WORD\"; trap 'echo asked to stop; exit 0' TERM; sleep 1000 & wait",
        service_id=name,
        environ={"WORD": "it's $5"},
    )
    scheduler = Scheduler(
        SshJob(
            node,
            commands=[
                service.start_command(),
                service.start_command(),
                Run("sleep 0.5"),
                service.status_command(),
                service.stop_command(),
                service.status_command(),
                service.stop_command(),
                service.journal_command(),
            ],
        )
    )
    assert scheduler.run()
    apssh.close_ssh_in_scheduler(scheduler)
    out = capfd.readouterr().out
    assert "Active: active (running)" in out and "begun it's $5" in out and "asked to stop" in out


@on_testbed
def test_journal_of_the_last_start_only() -> None:
    name = f"apssh-journal-{os.getpid()}"
    first, second = (
        apssh.Service(f"echo printed by the {which}; exit {status}", service_id=name)
        for which, status in (("first", 0), ("second", 3))
    )
    lasting = apssh.Service("echo printed by the third; sleep 60", service_id=name)
    gone = Run(f"until ! systemctl is-active -q {name}; do sleep 0.1; done")
    node = box()
    try:
        before = captured_on(node, first.journal_command())
        out = captured_on(node, first.start_command(), gone, first.journal_command())
        assert before == "-- No entries --"
        assert "printed by the first" in out
        assert "Deactivated successfully" in out
        out = captured_on(node, second.start_command(), gone, second.journal_command())
        assert "printed by the second" in out
        assert "Failed with result" in out
        assert "first" not in out
        starts = Run(f"until journalctl -u {name} | grep -q third; do sleep 0.1; done")
        out = captured_on(node, lasting.start_command(), starts, lasting.journal_command())
        assert "printed by the third" in out
        assert "second" not in out
        out = captured_on(node, lasting.journal_command(since="-1h"))
        assert all(which in out for which in ("first", "second", "third"))
        assert captured_on(node, lasting.journal_command("2000-01-01", pty=False)) == out
    finally:
        asyncio.run(lasting.stop_command().co_run_remote(node))
        asyncio.run(node.close())


@on_testbed
def test_status_of_a_service_into_a_file_of_the_host(capfd: Any) -> None:
    name = f"apssh-status-{os.getpid()}"
    service = apssh.Service("sleep 60", service_id=name)
    path = Deferred("{{folder}}/it's a $status", {"folder": f"/tmp/{name}"})
    node = box()
    try:
        out = captured_on(
            node,
            Run(f"mkdir /tmp/{name}"),
            service.start_command(),
            service.status_command(path),
            service.status_command(f"~/{name}"),
            Run(f"cat /tmp/{name}/it*; cat ~/{name}; rm -r /tmp/{name} ~/{name}"),
        )
        assert out.count("Active: active (running)") == 2
        assert capfd.readouterr().out == ""
    finally:
        asyncio.run(service.stop_command().co_run_remote(node))
        asyncio.run(node.close())


@pytest.mark.parametrize("action", ["start", "stop", "status", "journal"])
def test_commands_of_a_service_show_and_take_the_keywords_of_run(action: str) -> None:
    service = apssh.Service("x", service_id="unit.service", verbose=True)
    method = getattr(service, f"{action}_command")
    shown = inspect.signature(method).parameters
    for each in inspect.signature(Run, eval_str=True).parameters.values():
        assert each.kind is each.VAR_POSITIONAL or shown[each.name] == each
    step, own = method(), method(label=False, verbose=False, allowed_exits=[7], env={"A": "b"})
    assert (step.listing_line(), step.verbose) == (f"Service unit: {action}", True)
    assert (own.listing_line(), own.verbose, own.allowed_exits) == ("", False, {7})
    assert own.env == {"A": "b"}
    with pytest.raises(UsageError, match=r"^unknown option timeuot: did you mean timeout\?$"):
        method(timeuot=3)


@on_testbed
@pytest.mark.parametrize(
    "keywords",
    [{"tty": True}, {"systemd_type": "forking"}, {"stop_if_running": False}],
    ids=["tty", "forking", "no stop"],
)
def test_service_kinds(keywords: dict[str, Any]) -> None:
    name = f"apssh-kind-{os.getpid()}-{len(str(keywords))}"
    shell = (
        "(sleep 30) & exit 0"
        if "systemd_type" in keywords
        else "test -t 1 && printf '%s%s\\n' is-a- terminal; sleep 30"
    )
    service = apssh.Service(shell, service_id=name, **keywords)
    node = box()
    try:
        out = captured_on(
            node,
            service.start_command(),
            Run("sleep 0.5;", f"systemctl is-active {name}; journalctl -o cat -u {name}"),
        )
        assert out.splitlines()[0] == "active"
        assert ("is-a-terminal" in out) == ("tty" in keywords)
    finally:
        asyncio.run(service.stop_command().co_run_remote(node))
        asyncio.run(node.close())


# --------------------------------------------------------------------------------------------------
# scenarios
# --------------------------------------------------------------------------------------------------


NODE = "nodes: [{id: n1, hostname: h1}]\n"
JOB = "jobs: [{id: j1, node: n1, command: uname}]\n"
JOB1 = NODE + "jobs:\n  - id: j1\n    node: n1\n"
STEP = JOB1 + "    commands:\n      - "
NODE1 = "nodes:\n  - id: n1\n    "
MISTAKES = {  # text of the file, the whole message
    "empty file": (
        "",
        "s.yaml:1: here must be a mapping (lines of 'key: value')",
    ),
    "only a comment": (
        "# nothing\n",
        "s.yaml:1: here must be a mapping (lines of 'key: value')",
    ),
    "null": (
        "~\n",
        "s.yaml:1: here must be a mapping (lines of 'key: value')",
    ),
    "a list": (
        "- nodes\n",
        "s.yaml:1: here must be a mapping (lines of 'key: value')",
    ),
    "text": (
        "nodes\n",
        "s.yaml:1: here must be a mapping (lines of 'key: value')",
    ),
    "unknown section": (
        "node: []\n" + JOB,
        "s.yaml:1: unknown section node: did you mean nodes?",
    ),
    "section far off": (
        NODE + "jobs: [{id: j1, node: n1, command: uname}]\nextra: 1\n",
        "s.yaml:3: unknown section extra: there is nodes, jobs",
    ),
    "no nodes section": (
        JOB,
        "s.yaml:1: section nodes: no list: add 'nodes:' and '- id: ...' below it",
    ),
    "no jobs section": (
        NODE,
        "s.yaml:1: section jobs: no list: add 'jobs:' and '- id: ...' below it",
    ),
    "empty nodes": (
        "nodes: []\n" + JOB,
        "s.yaml:1: section nodes: no list: add 'nodes:' and '- id: ...' below it",
    ),
    "null jobs": (
        NODE + "jobs:\n",
        "s.yaml:2: section jobs: no list: add 'jobs:' and '- id: ...' below it",
    ),
    "nodes as mapping": (
        "nodes: {n1: {hostname: h1}}\n" + JOB,
        "s.yaml:1: section nodes: no list: add 'nodes:' and '- id: ...' below it",
    ),
    "node as text": (
        "nodes: [n1]\n" + JOB,
        "s.yaml:1: section nodes: here must be a mapping (lines of 'key: value')",
    ),
    "no node id": (
        "nodes: [{hostname: h1}]\n" + JOB,
        "s.yaml:1: section nodes: no 'id': add 'id: ...'",
    ),
    "null id": (
        "nodes: [{id: , hostname: h1}]\n" + JOB,
        "s.yaml:1: section nodes: 'id' must be text",
    ),
    "list id": (
        "nodes: [{id: [a], hostname: h1}]\n" + JOB,
        "s.yaml:1: section nodes: 'id' must be text",
    ),
    "duplicate node id": (
        "nodes:\n  - {id: n1, hostname: h1}\n  - {id: n1, hostname: h2}\n" + JOB,
        "s.yaml:3: section nodes: duplicate id 'n1'",
    ),
    "duplicate job id": (
        NODE + "jobs:\n  - {id: j1, node: n1, command: a}\n  - {id: j1, node: n1, command: b}\n",
        "s.yaml:4: section jobs: duplicate id 'j1'",
    ),
    "duplicate key": (
        NODE1 + "hostname: h1\n    port: 22\n    hostname: h2\n" + JOB,
        "s.yaml:5: section nodes, id n1: wrong YAML: duplicate key 'hostname'",
    ),
    "no hostname": (
        NODE1 + "port: 22\n" + JOB,
        "s.yaml:2: section nodes, id n1: no 'hostname': add 'hostname: ...'",
    ),
    "unknown node key": (
        NODE1 + "hostname: h1\n    usernam: x\n" + JOB,
        "s.yaml:4: section nodes, id n1: unknown key usernam: did you mean username?",
    ),
    "local node key": (
        NODE1 + "localnode: true\n    gateway: x\n" + JOB,
        "s.yaml:4: section nodes, id n1: unknown key gateway: there is id, localnode, "
        "formatter, verbose",
    ),
    "localnode text": (
        NODE1 + "hostname: h1\n    localnode: maybe\n" + JOB,
        "s.yaml:4: section nodes, id n1: 'localnode' must be true or false",
    ),
    "unknown gateway": (
        "nodes:\n  - {id: n1, hostname: h1, gateway: n22}\n  - {id: n2, hostname: h2}\n" + JOB,
        "s.yaml:2: section nodes, id n1: unknown node n22: did you mean n2?",
    ),
    "gateway itself": (
        NODE1 + "hostname: h1\n    gateway: n1\n" + JOB,
        "s.yaml:4: section nodes, id n1: 'gateway' goes in a circle: n1 -> n1: take one out",
    ),
    "gateway circle": (
        "nodes: [{id: a, hostname: a, gateway: b}, "
        "{id: b, hostname: b, gateway: c}, {id: c, hostname: c, gateway: a}]\n" + JOB,
        "s.yaml:1: section nodes, id a: 'gateway' goes in a circle: a -> b -> c -> a: take one out",
    ),
    "gateway local": (
        "nodes:\n  - {id: n1, hostname: h1, gateway: n2}\n  - {id: n2, localnode: true}\n" + JOB,
        "s.yaml:2: section nodes, id n1: gateway of h1: an SshNode, not <LocalNode>",
    ),
    "gateway list": (
        NODE1 + "hostname: h1\n    gateway: [n2]\n" + JOB,
        "s.yaml:4: section nodes, id n1: 'gateway' must be the id of a node",
    ),
    "bad port": (
        NODE1 + "hostname: h1\n    port: 99999\n" + JOB,
        "s.yaml:2: section nodes, id n1: host 'h1': a port is a number from 1 to 65535",
    ),
    "bad hostname": (
        NODE1 + "hostname: 'a b'\n" + JOB,
        "s.yaml:2: section nodes, id n1: host 'a b': 'a b' is not a host name or an address",
    ),
    "timeout text": (
        NODE1 + "hostname: h1\n    timeout: long\n" + JOB,
        "s.yaml:4: section nodes, id n1: 'timeout' must be a number",
    ),
    "keys mapping": (
        NODE1 + "hostname: h1\n    keys: {a: b}\n" + JOB,
        "s.yaml:4: section nodes, id n1: 'keys' must be text",
    ),
    "unknown formatter": (
        NODE1 + "hostname: h1\n    formatter: HostFormater\n" + JOB,
        "s.yaml:4: section nodes, id n1: unknown type of formatter HostFormater: did "
        "you mean HostFormatter?",
    ),
    "formatter list": (
        NODE1 + "hostname: h1\n    formatter: [HostFormatter]\n" + JOB,
        "s.yaml:4: section nodes, id n1: 'formatter' must be the name of a formatter",
    ),
    "formatter argument": (
        NODE1 + "hostname: h1\n    formatter: SubdirFormatter\n" + JOB,
        "s.yaml:4: section nodes, id n1: no 'run_name': add 'run_name: ...'",
    ),
    "formatter format": (
        NODE1
        + "hostname: h1\n    formatter: {type: TerminalFormatter, custom_format: '{lin}'}\n"
        + JOB,
        "s.yaml:4: section nodes, id n1: unknown field {lin} in format '{lin}': the "
        "fields are {time} {host} {fqdn} {user} {line} {linenl} {nl}",
    ),
    "template without env": (
        NODE1 + "hostname: {{gw}}\n" + JOB,
        "s.yaml:3: section nodes, id n1: wrong YAML: a key must be text: put {{...}} in "
        "quotes (a template? give load() an env, or --set NAME=value)",
    ),
    "template block without env": (
        "{% if x %}\nnodes: [{id: n1, hostname: h1}]\n" + JOB,
        "s.yaml:1: wrong YAML: while scanning for the next token: found character '%' "
        "that cannot start any token",
    ),
    "unknown job key": (
        JOB1 + "    comand: uname\n",
        "s.yaml:5: section jobs, id j1: unknown key comand: did you mean command?",
    ),
    "job without commands": (
        JOB1,
        "s.yaml:3: section jobs, id j1: SshJob: give exactly one of command= and commands=",
    ),
    "job with an empty list": (
        JOB1 + "    commands: []\n",
        "s.yaml:3: section jobs, id j1: Run: an empty command",
    ),
    "job with nulls": (
        JOB1 + "    commands: [~]\n",
        "s.yaml:3: section jobs, id j1: Run: an empty command",
    ),
    "job null commands": (
        JOB1 + "    commands:\n",
        "s.yaml:3: section jobs, id j1: SshJob: give exactly one of command= and commands=",
    ),
    "both command and commands": (
        JOB1 + "    command: a\n    commands: b\n",
        "s.yaml:3: section jobs, id j1: SshJob: give exactly one of command= and commands=",
    ),
    "no node": (
        NODE + "jobs:\n  - {id: j1, command: a}\n",
        "s.yaml:3: section jobs, id j1: no 'node': add 'node: ...'",
    ),
    "unknown node": (
        NODE + "jobs:\n  - {id: j1, node: n2, command: a}\n",
        "s.yaml:3: section jobs, id j1: unknown node n2: there is n1",
    ),
    "unknown node far": (
        NODE + "jobs:\n  - {id: j1, node: zz, command: a}\n",
        "s.yaml:3: section jobs, id j1: unknown node zz: there is n1",
    ),
    "unknown required": (
        JOB1 + "    required: j0\n    command: a\n",
        "s.yaml:5: section jobs, id j1: unknown job j0: there is j1",
    ),
    "required mapping": (
        JOB1 + "    required: {j0: 1}\n    command: a\n",
        "s.yaml:5: section jobs, id j1: 'required' must be the id of a job",
    ),
    "required itself": (
        JOB1 + "    required: [j1]\n    command: a\n",
        "s.yaml:5: section jobs, id j1: 'required' goes in a circle: j1 -> j1: take one out",
    ),
    "required circle": (
        NODE + "jobs:\n  - {id: a, node: n1, required: b, command: x}\n"
        "  - {id: b, node: n1, required: [a], command: x}\n",
        "s.yaml:3: section jobs, id a: 'required' goes in a circle: a -> b -> a: take one out",
    ),
    "command as list of text": (
        JOB1 + "    commands: [uname, ls]\n",
        "s.yaml:5: section jobs, id j1: here must be a mapping (lines of 'key: value')",
    ),
    "no type": (
        STEP + "command: uname\n        ",
        "s.yaml:6: section jobs, id j1: no 'type': add 'type: ...'",
    ),
    "unknown type": (
        STEP + "type: Runs\n        command: uname\n        ",
        "s.yaml:6: section jobs, id j1: unknown type of command Runs: did you mean Run?",
    ),
    "unknown type far": (
        STEP + "type: Shell\n        command: uname\n        ",
        "s.yaml:6: section jobs, id j1: unknown type of command Shell: there is "
        "Run, RunScript, RunString, Push, Pull, Wait, Service",
    ),
    "type list": (
        STEP + "type: [Run]\n        command: uname\n        ",
        "s.yaml:6: section jobs, id j1: 'type' must be text",
    ),
    "unknown command key": (
        STEP + "type: Run\n        comand: uname\n        ",
        "s.yaml:7: section jobs, id j1: unknown key comand: did you mean command?",
    ),
    "run without command": (
        STEP + "type: Run\n        ",
        "s.yaml:6: section jobs, id j1: Run: an empty command",
    ),
    "command list": (
        STEP + "type: Run\n        command: [a, b]\n        ",
        "s.yaml:7: section jobs, id j1: 'command' must be text",
    ),
    "command null": (
        STEP + "type: Run\n        command:\n        ",
        "s.yaml:7: section jobs, id j1: 'command' must be text",
    ),
    "command blank": (
        STEP + "type: Run\n        command: ' '\n        ",
        "s.yaml:6: section jobs, id j1: Run: an empty command",
    ),
    "argv empty": (
        STEP + "type: Run\n        argv: []\n        ",
        "s.yaml:6: section jobs, id j1: Run: an empty command",
    ),
    "argv nested": (
        STEP + "type: Run\n        argv: [a, [b]]\n        ",
        "s.yaml:7: section jobs, id j1: 'argv' must be text",
    ),
    "script both": (
        STEP + "type: RunScript\n        command: a b\n        local_script: c\n        ",
        "s.yaml:6: section jobs, id j1: give one of 'command' and 'local_script'",
    ),
    "script none": (
        STEP + "type: RunScript\n        args: [a]\n        ",
        "s.yaml:6: section jobs, id j1: no 'local_script': add 'local_script: ...'",
    ),
    "script blank": (
        STEP + "type: RunScript\n        command: ' '\n        ",
        "s.yaml:6: section jobs, id j1: no 'local_script': add 'local_script: ...'",
    ),
    "script list": (
        STEP + "type: RunScript\n        local_script: [c]\n        ",
        "s.yaml:7: section jobs, id j1: 'local_script' must be text",
    ),
    "script args mapping": (
        STEP + "type: RunScript\n        local_script: c\n        args: {a: b}\n        ",
        "s.yaml:8: section jobs, id j1: 'args' must be text",
    ),
    "string none": (
        STEP + "type: RunString\n        args: a\n        ",
        "s.yaml:6: section jobs, id j1: no 'script_body': add 'script_body: ...'",
    ),
    "string blank": (
        STEP + "type: RunString\n        script_body: ' '\n        ",
        "s.yaml:6: section jobs, id j1: RunString: an empty script",
    ),
    "push none": (
        STEP + "type: Push\n        remotepath: a\n        ",
        "s.yaml:6: section jobs, id j1: no 'localpaths': add 'localpaths: ...'",
    ),
    "push empty": (
        STEP + "type: Push\n        localpaths: []\n        remotepath: a\n        ",
        "s.yaml:6: section jobs, id j1: a path or a list of paths, not []",
    ),
    "push list": (
        STEP + "type: Push\n        localpaths: a\n        remotepath: [a]\n        ",
        "s.yaml:8: section jobs, id j1: 'remotepath' must be text",
    ),
    "pull none": (
        STEP + "type: Pull\n        remotepaths: a\n        ",
        "s.yaml:6: section jobs, id j1: no 'localpath': add 'localpath: ...'",
    ),
    "pull key": (
        STEP + "type: Pull\n        remotepaths: a\n        localpaths: b\n        ",
        "s.yaml:8: section jobs, id j1: unknown key localpaths: did you mean localpath?",
    ),
    "step timeout": (
        STEP + "type: Run\n        command: a\n        timeout: -1\n        ",
        "s.yaml:6: section jobs, id j1: timeout -1.0: seconds, more than 0 (None: no limit)",
    ),
    "env value": (
        STEP + "type: Run\n        command: a\n        env: {A: [b]}\n        ",
        "s.yaml:8: section jobs, id j1: 'env.A' must be text",
    ),
    "tag": (
        STEP + "type: Run\n        command: !secret a\n        ",
        "s.yaml:7: section jobs, id j1: wrong YAML: could not determine a constructor "
        "for the tag '!secret'",
    ),
    "python tag": (
        STEP + "type: Run\n        argv: !!python/object/apply:os.system [id]\n        ",
        "s.yaml:7: section jobs, id j1: wrong YAML: could not determine a constructor "
        "for the tag 'tag:yaml.org,2002:python/object/apply:os.system'",
    ),
    "bad yaml": (
        "nodes:\n  - id: n1\n   hostname: h1\n",
        "s.yaml:3: section nodes, id n1: wrong YAML: while parsing a block collection: "
        "expected <block end>, but found '<block mapping start>'",
    ),
    "tab": (
        "nodes:\n\t- id: n1\n",
        "s.yaml:2: section nodes, id ?: wrong YAML: while scanning for the next token: "
        "found character '\\t' that cannot start any token",
    ),
    "open quote": (
        "nodes:\n  - id: 'n1\n",
        "s.yaml:3: section nodes, id ?: wrong YAML: while scanning a quoted scalar: "
        "found unexpected end of stream",
    ),
    "unknown alias": (
        "nodes: *all\n",
        "s.yaml:1: section nodes, id ?: wrong YAML: found undefined alias 'all'",
    ),
    "two documents": (
        NODE + "---\n" + JOB,
        "s.yaml:2: section nodes, id n1: wrong YAML: expected a single document in the "
        "stream: but found another document",
    ),
    "control character": (
        NODE + "# \u0007\n",
        "s.yaml:2: section nodes, id n1: wrong YAML: special characters are not allowed",
    ),
    "deferred without quotes": (
        "nodes:\n  - {id: n, localnode: true}\njobs:\n  - {id: j, node: n, command: {{x}}}\n",
        "s.yaml:4: section jobs, id j: wrong YAML: a key must be text: put {{...}} in "
        "quotes (a template? give load() an env, or --set NAME=value)",
    ),
    "key of a mapping": (
        "nodes:\n  - {? {a: b} : c}\n",
        "s.yaml:2: section nodes, id ?: wrong YAML: a key must be text: put {{...}} in "
        "quotes (a template? give load() an env, or --set NAME=value)",
    ),
    "merge of text": (
        "nodes:\n  - {<<: text, id: n1}\n",
        "s.yaml:2: section nodes, id ?: wrong YAML: while constructing a mapping: "
        "expected a mapping or list of mappings for merging, but found scalar",
    ),
    "int tag": (
        NODE1 + "hostname: h1\n    port: !!int many\n" + JOB,
        "s.yaml:4: section nodes, id n1: 'port' must be a whole number",
    ),
    "empty key": (
        NODE + "jobs:\n  - {id: j1, node: n1, '': x}\n",
        "s.yaml:3: section jobs, id j1: unknown key : there is id, required, teardown, node, "
        "command, commands, keep_connection, verbose, forever, critical, label",
    ),
    "list in itself": (
        NODE + "jobs: &a [*a]\n",
        "s.yaml:2: section jobs, id ?: wrong YAML: found unconstructable recursive node",
    ),
    "service without action": (
        STEP + "type: Service\n        service_id: a\n        ",
        "s.yaml:6: section jobs, id j1: no 'action': add 'action: ...'",
    ),
    "service action": (
        STEP + "type: Service\n        action: restart\n        service_id: a\n        ",
        "s.yaml:7: section jobs, id j1: unknown action restart: did you mean start?",
    ),
    "service without name": (
        STEP + "type: Service\n        action: stop\n        ",
        "s.yaml:6: section jobs, id j1: no 'service_id': add 'service_id: ...'",
    ),
    "service started without command": (
        STEP + "type: Service\n        action: start\n        service_id: a\n        ",
        "s.yaml:6: section jobs, id j1: no 'command': add 'command: ...'",
    ),
    "key of another action": (
        STEP + "type: Service\n        action: start\n        output: a\n        ",
        "s.yaml:8: section jobs, id j1: unknown key output: did you mean ignore_outputs?",
    ),
    "service name": (
        STEP + "type: Service\n        action: stop\n        service_id: a b\n        ",
        "s.yaml:6: section jobs, id j1: service_id 'a b': letters, digits and :-_.@ only",
    ),
    "requires a teardown": (
        NODE
        + "jobs:\n"
        + "  - {id: j1, node: n1, command: x, teardown: true}\n"
        + "  - id: j2\n    node: n1\n    command: x\n    required: j1\n",
        "s.yaml:7: section jobs, id j2: 'required' names a job of the teardown, which runs when "
        "all end",
    ),
    "wait": (
        STEP + "type: Wait\n        interval: soon\n        ",
        "s.yaml:7: section jobs, id j1: 'interval' must be a number",
    ),
    "deep": (
        "[" * 3000,
        "s.yaml:1: wrong YAML: nested too deeply, or merged into itself",
    ),
    "escape": (
        'nodes:\n  - {id: "a\\e[31m", hostnam: "\\u202e"}\n' + JOB,
        "s.yaml:2: section nodes, id a\\x1b[31m: unknown key hostnam: did you mean hostname?",
    ),
}


def loaded(
    text: str, name: str = "s.yaml", **options: Any
) -> tuple[dict[str, Any], dict[str, Any], Any]:
    Path(name).write_text(text)
    return YamlLoader(name).load_with_maps(**options)


def refused(text: str, **options: Any) -> str:
    with pytest.raises(ScenarioError) as caught:
        loaded(text, **options)
    return str(caught.value)


@pytest.mark.parametrize(("text", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_a_scenario_is_told_with_its_place(text: str, message: str) -> None:
    assert refused(text) == message


TEMPLATE_MISTAKES = {
    "undefined": (
        "nodes:\n  - id: {{ nobody }}\n",
        "s.yaml:2: template: 'nobody' is undefined: add it to env (--set NAME=value)",
    ),
    "undefined attribute": (
        "\n\n{{ x.y }}\n",
        "s.yaml:3: template: 'int object' has no attribute 'y': add it to env (--set NAME=value)",
    ),
    "syntax": (
        "nodes:\n{% for %}\n",
        "s.yaml:2: template: Expected an expression, got 'end of statement block'",
    ),
    "arithmetic": (
        "nodes:\n\n# {{ 1 // 0 }}\n",
        "s.yaml:3: template: integer division or modulo by zero",
    ),
    "after rendering": (
        "{% if x %}\n\n\n{% endif %}nodes: {{ x }}\n",
        "s.yaml (rendered):4: section nodes: no list: add 'nodes:' and '- id: ...' below it",
    ),
    "nothing left": (
        "{% if not x %}nodes: []{% endif %}",
        "s.yaml (rendered):1: here must be a mapping (lines of 'key: value')",
    ),
}


@pytest.mark.parametrize(("text", "message"), TEMPLATE_MISTAKES.values(), ids=TEMPLATE_MISTAKES)
def test_a_mistake_in_a_template_is_told_with_its_line(text: str, message: str) -> None:
    assert refused(text, env={"x": 1}) == message


def test_files_that_cannot_be_read(home: Path) -> None:
    Path("b.yaml").write_bytes(b"nodes: \xff\n")
    reasons = {
        "none.yaml": "no such file or directory",
        ".": "is a directory",
        "b.yaml": "not UTF-8 text: save it as UTF-8",
    }
    for name, reason in reasons.items():
        with pytest.raises(ScenarioError) as caught:
            YamlLoader(name).load()
        assert str(caught.value) == f"{name}: {reason}"
    with pytest.raises(ScenarioError, match=r"^a\\x1b\.yaml: no such file or directory$"):
        YamlLoader("a\x1b.yaml").load()


def test_constructing_a_loader_reads_nothing() -> None:
    YamlLoader("nowhere.yaml")


FULL = """
jobs:
  - id: send
    node: n1
    required: [warmup, ~]
    critical: false
    forever: false
    verbose: true
    label: >
      send
      it
    commands:
      - type: RunScript
        local_script: demo.sh
        args: [a, 010, yes, 1.10]
        includes: inc.sh
        allowed_exits: [TERM, 4]
        timeout: 5
      - type: RunScript
        command: other.sh one  'two three' > out
      - ~
      - type: RunString
        script_body: |
          #!/bin/bash
          echo $1
        args: x y
        remote_name: it.sh
        label: false
      - {type: Push, localpaths: [a, b], remotepath: /tmp/, preserve: true}
      - {type: Push, localpaths: a, remotepath: b}
      - {type: Pull, remotepaths: [c], localpath: d, recurse: yes}
  - {id: warmup, node: gw, required: ~, \
commands: [{type: Run, command: check --all}, {type: Run, argv: [echo, 1, true]}]}
  - {id: 7, node: here, command: 'uname -r', required: send}
nodes:
  - {id: n1, hostname: node1, gateway: gw, port: 2200, timeout: 2.5, keys: [k1], \
known_hosts: ~, config: true, password: 0123}
  - id: gw
    hostname: gateway.example.org
    username: slice
    formatter: TimeHostFormatter
    verbose: true
  - {id: gw2, hostname: gw2, formatter: TimeHostFormatter}
  - {id: out, hostname: o, formatter: {type: SubdirFormatter, run_name: results}}
  - {id: c1, hostname: o, formatter: CaptureFormatter}
  - {id: c2, hostname: o, formatter: CaptureFormatter}
  - id: here
    localnode: true
  - {id: far, localnode: false, hostname: far}
"""


def test_a_whole_scenario() -> None:
    nodes, jobs, scheduler = loaded(FULL)
    assert list(nodes) == ["n1", "gw", "gw2", "out", "c1", "c2", "here", "far"]
    assert list(jobs) == ["send", "warmup", "7"]
    n1, gw = nodes["n1"], nodes["gw"]
    assert (n1.hostname, n1.username, n1.port, n1.timeout, n1.keys, n1.known_hosts) == (
        "node1",
        "root",
        2200,
        2.5,
        ["k1"],
        None,
    )
    assert n1.gateway is gw and n1._password == "0123" and n1._config is True
    assert (gw.username, gw.verbose, type(gw.formatter)) == ("slice", True, TimeHostFormatter)
    assert nodes["gw2"].formatter is gw.formatter
    assert nodes["c1"].formatter is not nodes["c2"].formatter
    assert isinstance(nodes["out"].formatter, SubdirFormatter) and nodes[
        "out"
    ].formatter.run_name == Path("results")
    assert isinstance(nodes["here"], LocalNode) and isinstance(nodes["far"], SshNode)
    send, warmup, last = jobs.values()
    assert (
        set(scheduler.jobs) == {send, warmup, last}
        and list(send.required) == [warmup]
        and list(last.required) == [send]
    )
    assert (send.critical, send.forever, send.verbose, send.label, warmup.critical) == (
        False,
        False,
        True,
        "send it",
        True,
    )
    assert send.node is n1 and last.node is nodes["here"]
    assert [step.listing_line() for step in send.commands] == [
        "RunScript: demo.sh a 010 yes 1.10",
        "RunScript: other.sh one 'two three' > out",
        "",
        "Push: a ... (2 total) onto /tmp/",
        "Push: a onto b",
        "Pull: c into d",
    ]
    assert [step.listing_line() for step in warmup.commands + last.commands] == [
        "check --all",
        "echo 1 true",
        "uname -r",
    ]
    script, _, string, push, push_one, pull = send.commands
    assert (script.includes, script.allowed_exits, script.timeout) == (("inc.sh",), {"TERM", 4}, 5)
    assert (string.source, string.remote_name, string.words) == (
        "#!/bin/bash\necho $1",
        "it.sh",
        ("x y",),
    )
    assert (push.sources, push_one.sources, pull.sources) == (["a", "b"], ["a"], ["c"])
    assert push.options["preserve"] and pull.options["recurse"]
    scheduler.list()


def test_jobs_are_listed_by_their_ids(capsys: pytest.CaptureFixture[str]) -> None:
    _, jobs, scheduler = loaded(FULL)
    assert [job.label for job in jobs.values()] == ["send it", "warmup", "7"]
    scheduler.list()
    listed = capsys.readouterr().out
    assert all(job.label in listed for job in jobs.values())


def test_steps_of_a_service() -> None:
    _, jobs, _ = loaded(
        NODE
        + """
jobs:
  - id: j
    node: n1
    commands:
      - &unit
        type: Service
        action: start
        service_id: web
        command: serve {{port}}
        environ: {A: 010, B: "{{b}}"}
        tty: true
        label: it starts
        timeout: 5
      - {<<: *unit, action: status, output: "~/a b", label: ~}
      - {type: Service, action: journal, service_id: web, since: -1h}
      - {type: Service, action: stop, service_id: web, allowed_exits: 4, verbose: true}
"""
    )
    service = apssh.Service(
        Deferred("serve {{port}}", {}),
        service_id="web",
        environ={"A": "010", "B": Deferred("{{b}}", {})},
        tty=True,
    )
    expected = [
        service.start_command(label="it starts", timeout=5),
        service.status_command("~/a b", timeout=5),
        service.journal_command("-1h"),
        service.stop_command(allowed_exits=[4], verbose=True),
    ]
    for step, other in zip(jobs["j"].commands, expected, strict=True):
        assert [str(word) for word in step.words] == [str(word) for word in other.words]
        assert step.listing_line() == other.listing_line()
        for name in ("timeout", "allowed_exits", "verbose"):
            assert getattr(step, name) == getattr(other, name)


def test_keys_that_the_signatures_of_steps_bring() -> None:
    _, jobs, _ = loaded(
        NODE
        + """
jobs:
  - id: j
    node: n1
    commands:
      - {type: Wait, command: test -e up, timeout: 60, interval: 0.5}
      - {type: Wait}
      - {type: Wait, argv: [test, =, -e, "{{up}}"]}
      - {type: Run, command: cat, stdin: "a b", sudo: true}
      - {type: RunScript, command: a.sh b, args: [c], sudo: admin, stdin: "{{text}}"}
"""
    )
    wait, bare, words, run, script = jobs["j"].commands
    assert (wait.words, wait.timeout, wait.interval) == (("test -e up",), 60, 0.5)
    assert (bare.words, bare.timeout, bare.interval) == ((), 300, 1)
    assert [str(word) for word in words.words] == ["test", "=", "-e", "{{up}}"]
    assert isinstance(words.words[3], Deferred)
    assert (run.sudo, script.sudo, script.words) == ("root", "admin", ("b", "c"))
    assert run.stdin is not None
    assert script.stdin is not None


def test_numbers_and_truth_may_be_quoted() -> None:
    """As templates write them."""
    nodes, jobs, _ = loaded(
        "nodes: [{id: n, hostname: h, port: '2200', verbose: 'yes', timeout: '7'}]\n"
        "jobs: [{id: j, node: n, command: x, critical: 'no', forever: 'True'}]\n"
    )
    node, job = nodes["n"], jobs["j"]
    assert (node.port, node.verbose, node.timeout) == (2200, True, 7)
    assert (job.critical, job.forever) == (False, True)


def test_anchors_and_merges() -> None:
    nodes, jobs, _ = loaded(
        "nodes:\n  - &one {id: a, hostname: h, port: 2200}\n"
        "  - {<<: *one, id: b}\n  - {id: c, <<: [{username: u}, *one]}\n"
        "jobs:\n  - {id: x, node: a, commands: &steps [{type: Run, command: ls}]}\n"
        "  - {id: y, node: b, commands: *steps}\n"
    )
    assert [(node.hostname, node.port, node.username) for node in nodes.values()] == [
        ("h", 2200, "root"),
        ("h", 2200, "root"),
        ("h", 2200, "u"),
    ]
    assert jobs["x"].commands[0] is not jobs["y"].commands[0]


def test_steps_that_merge_and_are_used_twice() -> None:
    _, jobs, _ = loaded(
        NODE
        + """
jobs:
  - {id: x, node: n1, commands: [&one {type: Run, command: ls}, &two {<<: *one, command: id}]}
  - {id: y, node: n1, commands: [*two, *two, {<<: *two, label: third}]}
"""
    )
    lines = [step.listing_line() for step in jobs["y"].commands]
    assert (lines, jobs["x"].commands[1].words) == (["id", "id", "third"], ("id",))


def test_jobs_may_come_before_those_that_they_require() -> None:
    """A thousand in a row, the last one first."""
    rows = [f"  - {{id: j{n}, node: n1, command: x, required: j{n + 1}}}\n" for n in range(999)]
    _, jobs, _ = loaded(f"{NODE}jobs:\n{''.join(rows)}  - {{id: j999, node: n1, command: x}}\n")
    assert list(jobs) == [f"j{n}" for n in range(1000)]
    assert list(jobs["j7"].required) == [jobs["j8"]]


TEMPLATE = """nodes:
{% for name in names %}
  - id: {{ name }}
    localnode: true
{% endfor %}
jobs:
  - id: j
    node: {{ names[0] }}
    commands:
      - {type: Run, command: "echo {% raw %}{{x}}{% endraw %} {{ word }}"}
"""
ENV = {"names": ["a", "b"], "word": "hello"}


@pytest.mark.parametrize(
    ("name", "save", "written"),
    [
        ("s.yaml.j2", True, "s.yaml"),
        ("s.yaml", True, "s.yaml.tmp"),
        ("s.yaml.j2", "other.yaml", "other.yaml"),
        ("s.yaml.j2", Path("other.yaml"), "other.yaml"),
        ("s.yaml.j2", None, None),
        ("s.yaml.j2", False, None),
    ],
)
def test_a_template_and_its_intermediate_file(
    home: Path, name: str, save: Any, written: str | None
) -> None:
    nodes, jobs, _ = loaded(TEMPLATE, name, env=ENV, save_intermediate=save)
    assert list(nodes) == ["a", "b"] and jobs["j"].commands[0].listing_line() == "echo {{x}} hello"
    assert {path.name for path in home.iterdir() if path.is_file()} == {name} | (
        {written} if written else set()
    )
    if written:
        assert "  - id: b\n    localnode: true\n" in Path(written).read_text()
        assert list(YamlLoader(written).load_with_maps()[0]) == ["a", "b"]
        loaded(TEMPLATE, name, env=ENV, save_intermediate=save)  # it may be there


def test_the_intermediate_file_says_that_it_is_generated_and_from_what() -> None:
    loaded(TEMPLATE, "s\x1b.yaml.j2", env=ENV, save_intermediate="t.yaml")
    first, rest = Path("t.yaml").read_text().split("\n", 1)
    assert first == (r"# generated by apssh from s\x1b.yaml.j2: edit that file, not this one")
    assert rest.startswith("nodes:\n")


def test_without_env_there_is_no_template_and_no_intermediate_file(home: Path) -> None:
    loaded("# {{ x }} {% y %}\n" + NODE + JOB, save_intermediate=True)
    loaded("# {{ x }} {% y %}\n" + NODE + JOB, env={}, save_intermediate="t")
    assert [path.name for path in home.iterdir() if path.is_file()] == ["s.yaml"]


def test_mistakes_after_rendering_name_the_intermediate_file() -> None:
    with pytest.raises(
        ScenarioError, match=r"^t\.yaml:3: unknown section jbos: did you mean jobs\?$"
    ):
        loaded(NODE + "jbos: {{ x }}\n", "s.yaml.j2", env={"x": 1}, save_intermediate="t.yaml")


def test_the_intermediate_file_never_replaces_the_template() -> None:
    assert (
        refused(TEMPLATE, env=ENV, save_intermediate="s.yaml")
        == "s.yaml: save_intermediate would overwrite the template: give another path"
    )
    assert Path("s.yaml").read_text() == TEMPLATE
    assert (
        refused(TEMPLATE, env=ENV, save_intermediate="no/where")
        == "no/where: no such file or directory"
    )


def test_list_of_paths_that_an_earlier_step_finds(home: Path) -> None:
    found = Variables()
    Path("f").write_text("text")
    Path("g").mkdir()
    job = SshJob(
        LocalNode(),
        commands=[
            Run("echo f", capture=Capture("name", found)),
            Push([Deferred("{{name}}", found)], "g"),
        ],
    )
    asyncio.run(job.co_run())
    assert Path("g/f").read_text() == "text"


@pytest.mark.parametrize(
    ("text", "deferred"),
    [
        ("docker ps --format '{{.Names}}'", False),
        ("kubectl -o go-template='{{range .items}}{{end}}'", False),
        ("echo '{{json .}}' {{x}}", False),
        ("echo '{{json .}}' {{now}}", True),
        ("echo {{ x }}", True),
        ("echo {{ now | int + 1 }}", True),
        ("echo {{ nowhere | int + 1 }}", True),
        ("echo {{ now + }}", True),
        ("docker ps --format '{{.now}}'", False),
        ("echo {% if now %}a{% endif %}", True),
        ("printf {%s} now", False),
    ],
)
def test_templates_of_others_are_text(text: str, deferred: bool) -> None:
    """What a command captures, and plain names, are looked up; the rest is as it is written."""
    Path("s.yaml").write_text(
        f"{NODE}jobs:\n  - id: j1\n    node: n1\n    commands:\n"
        f"      - {{type: Run, command: date, capture: now}}\n"
        f"      - {{type: Run, command: {json.dumps(text)}}}\n"
    )
    step: Any = YamlLoader("s.yaml").load_with_maps()[1]["j1"].commands[1]
    assert [isinstance(word, Deferred) for word in step.words] == [deferred]
    assert step.listing_line() == text


def test_older_formatter_names_in_scenarios() -> None:
    nodes, _, _ = loaded("nodes: [{id: n1, hostname: h1, formatter: ColonFormatter}]\n" + JOB)
    assert type(nodes["n1"].formatter) is apssh.HostFormatter


def test_deferred_values_and_captures() -> None:
    Path("s.yaml").write_text(
        NODE
        + """jobs:
  - id: j1
    node: n1
    commands:
      - {type: Run, command: "date +%s", capture: now}
      - {type: Run, argv: [echo, "{{now}}"]}
      - {type: RunScript, command: "{{ dir }}/a.sh {{ now }} b"}
      - {type: RunString, script_body: "echo {{now}}", args: "{{now}}"}
      - {type: Push, localpaths: ["{{now}}", plain], remotepath: "/tmp/{{now}}"}
      - {type: Pull, remotepaths: "{{now}}", localpath: plain}
"""
    )
    loader = YamlLoader("s.yaml")
    _, jobs, _ = loader.load_with_maps()
    run, echo, script, string, push, pull = jobs["j1"].commands
    assert (
        isinstance(run.capture, Capture)
        and run.capture.varname == "now"
        and run.capture.variables is loader.variables
    )
    found = [
        echo.words[1],
        script.source,
        script.words[0],
        string.source,
        string.words[0],
        push.sources[0],
        push.destination,
        pull.sources[0],
    ]
    assert [type(each) for each in found] == [Deferred] * len(found)
    assert all(each.variables is loader.variables for each in found)
    assert [str(each) for each in found[1:3]] == ["{{ dir }}/a.sh", "{{ now }} b"]
    assert (run.words, push.sources[1], pull.destination) == (("date +%s",), "plain", "plain")
    first = loader.variables
    loader.load()
    assert loader.variables is not first


def test_a_scenario_runs_here(capfd: pytest.CaptureFixture[str]) -> None:
    Path("show.sh").write_text('#!/bin/sh\necho "script $*"\n')
    _, jobs, scheduler = loaded("""
nodes: [{id: here, localnode: true, formatter: RawFormatter}]
jobs:
  - id: second
    node: here
    required: first
    commands:
      - {type: RunScript, command: "show.sh {{word}} 'b  c'"}
      - {type: RunString, script_body: 'echo "string $*"', args: [d, e]}
      - {type: Push, localpaths: show.sh, remotepath: "{{word}}.sh"}
      - {type: Pull, remotepaths: "{{word}}.sh", localpath: got.sh}
  - {id: first, node: here, commands: [{type: Run, command: echo hello, capture: word}]}
  - {id: third, node: here, required: second, critical: false, command: exit 3}
""")
    assert scheduler.run()
    assert capfd.readouterr().out == "script hello b  c\nstring d e\n"
    assert (Path("hello.sh").is_file(), Path("got.sh").is_file()) == (True, True)
    assert [job.result() for job in jobs.values()] == [0, 0, 3]


def test_scenario_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(UsageError, match=r"^this needs yaml: pip install 'apssh\[yaml\]'$"):
        loaded(NODE + JOB)


# --------------------------------------------------------------------------------------------------
# targets
# --------------------------------------------------------------------------------------------------


def targets(*texts: str, stdin: str | None = None, **options: Any) -> list[str]:
    """Told of no word that is a file."""
    sources = apssh._Sources(None if stdin is None else lambda: stdin, lambda text: None)
    found = apssh._parse_targets(texts, sources=sources, **options)
    return [str(target) for target in found]


@pytest.fixture
def files(home: Path) -> Path:
    """Files and folders of targets, here and in ~/.apssh."""
    (home / "hosts").write_text(
        "a b # the first ones\n\n# none here\nu@c:22, gw -> d\nnode[1-2],k#x\n"
    )
    (home / "dos").write_text("\ufeffa\r\nb, c\r\n", newline="")
    (home / "no-end").write_text("a\nb")
    (home / "empty").write_text("# nothing\n\n")
    (home / "names").write_text("hosts mine\n")
    (home / "itself").write_text("itself\n")
    (home / "bad").write_text("a\n\nb:99999 # too high\n")
    (home / "bad-range").write_text("a\nnode[3-1]\n")
    (home / "binary").write_bytes(b"\x7fELF\0\0")
    (home / "latin").write_bytes(b"caf\xe9\n")
    (home / "two words").write_text("a\n")
    marks = home / "out" / "1failed"
    (marks / "folder").mkdir(parents=True)
    for name in ("web", "u@db:2200", ".hidden"):
        (marks / name).write_text("1\n")
    own = home / ".apssh"
    (own / "group").mkdir(parents=True)
    (own / "group" / "g1").touch()
    (own / "mine").write_text("m1 m2\n")
    (own / "hosts").write_text("not-this-one\n")
    (own / "www").write_text("w[1-2] @dbs # and what is behind\n")
    (own / "dbs").write_text("u@db1,@hosts\n")
    (own / "all").write_text("@www\n@dbs @www, @group\n")
    (own / "self").write_text("@self\n")
    (own / "one").write_text("@two\n")
    (own / "two").write_text("a @three\n")
    (own / "three").write_text("b\n@one\n")
    (own / "bad-group").write_text("a\n@lost\n")
    (own / "lost").write_text("\n@nowhere\n")
    return home


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", "a"),
        ("a b,c", "a b c"),
        ("a\tb\nc\r\nd", "a b c d"),
        ("a ,, b,", "a b"),
        ("u@a", "u@a"),
        ("a:2200", "a:2200"),
        ("u@a:2200", "u@a:2200"),
        ("web.example.org", "web.example.org"),
        ("web.example.org.", "web.example.org."),
        ("x_y-z", "x_y-z"),
        ("bücher.example", "bücher.example"),
        ("10.0.0.1", "10.0.0.1"),
        ("10.0.0.1:22", "10.0.0.1:22"),
        ("::1", "::1"),
        ("[::1]", "::1"),
        ("[::1]:22", "[::1]:22"),
        ("u@::1", "u@::1"),
        ("u@[2001:db8::1]:2200", "u@[2001:db8::1]:2200"),
        ("fe80::1%eth0", "fe80::1%eth0"),
        ("[fe80::1%eth0]:22", "[fe80::1%eth0]:22"),
        ("me@example.org@a", "me@example.org@a"),
        (r"DOM\me@a", r"DOM\me@a"),
        ("u:p@a", "u:p@a"),
        ("node[1-3]", "node1 node2 node3"),
        ("node[01-03,25]", "node01 node02 node03 node25"),
        ("n[9-11]", "n9 n10 n11"),
        ("n[098-100]", "n098 n099 n100"),
        ("n[1-2]x[1-2]", "n1x1 n1x2 n2x1 n2x2"),
        ("u@n[1-2].org:22", "u@n1.org:22 u@n2.org:22"),
        ("10.0.0.[1-2]", "10.0.0.1 10.0.0.2"),
        ("a:[1-2]", "a:1 a:2"),
        ("a,b[1,3],c", "a b1 b3 c"),
        ("[1-2].org", "1.org 2.org"),
        ("n[7]", "n7"),
        ("n[1-6/2],m", "n1 n3 n5 m"),
        ("gw->a", "gw->a"),
        ("gw→a", "gw->a"),
        ("gw -> a", "gw->a"),
        ("gw ->\n a, b", "gw->a b"),
        ("u@g:1->v@h:2->w@a:3", "u@g:1->v@h:2->w@a:3"),
        ("gw[1-2]->n[1-2]", "gw1->n1 gw1->n2 gw2->n1 gw2->n2"),
        ("[::1]:22->[::2]:22", "[::1]:22->[::2]:22"),
        ("gw:22->gw:23", "gw:22->gw:23"),
        ("None->a", "None->a"),
        ("None->gw->a", "None->gw->a"),
        ("None", "None"),
        ("a a b a", "a b"),
        ("gw->a a gw->a", "gw->a a"),
        ("u@a v@a", "u@a v@a"),
        ("a A U@a u@A", "a A U@a u@A"),
        ("node[1-3] node[2-4]", "node1 node2 node3 node4"),
        ("WEB", "WEB"),
    ],
    ids=lambda value: repr(value),
)
def test_targets(text: str, expected: str) -> None:
    assert targets(text) == expected.split()
    assert targets(*targets(text)) == targets(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hosts", "a b u@c:22 gw->d node1 node2 k"),
        ("./hosts", "a b u@c:22 gw->d node1 node2 k"),
        ("x,hosts,y", "x a b u@c:22 gw->d node1 node2 k y"),
        ("dos", "a b c"),
        ("no-end", "a b"),
        ("two words", "a"),
        ("names", "hosts mine"),
        ("itself", "itself"),
        ("mine", "m1 m2"),
        ("~/.apssh/mine", "m1 m2"),
        ("out/1failed", "u@db:2200 web"),
        ("out/1failed/", "u@db:2200 web"),
        ("group", "g1"),
        ("empty a", "a"),
        ("@hosts", "not-this-one"),
        ("@www", "w1 w2 u@db1 not-this-one"),
        ("www", "w1 w2 u@db1 not-this-one"),
        ("x,@dbs,@mine", "x u@db1 not-this-one m1 m2"),
        ("@all", "w1 w2 u@db1 not-this-one g1"),
        ("@group", "g1"),
    ],
    ids=lambda value: repr(value),
)
def test_target_files(text: str, expected: str, files: Path) -> None:
    assert targets(text) == expected.split()


def test_targets_of_a_pipe(capfd: pytest.CaptureFixture[str]) -> None:
    """As the shell's <(command) gives them, once."""
    reading, writing = os.pipe()
    os.write(writing, b"a # one\nb\n")
    os.close(writing)
    assert apssh.main(["-t", f"/dev/fd/{reading}", "-x", "b", "-L"]) == 0
    os.close(reading)
    assert capfd.readouterr() == ("a\n", "")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("10.0.0.1 root", "10.0.0.1 root: one host, or two? write root@10.0.0.1"),
        ("10.0.0.1\troot # x", "10.0.0.1 root: one host, or two? write root@10.0.0.1"),
        ("a,10.0.0.1 root", "10.0.0.1 root: one host, or two? write root@10.0.0.1"),
        ("10.0.0.1 22", None),
        ("10.0.0.1:22 root", "10.0.0.1:22 root: one host, or two? write root@10.0.0.1:22"),
        ("web.example.org root", None),
        ("web.example.org:22 root", None),
        ("u@web.example.org web", None),
        ("10.0.0.1 web.example.org web", None),
        ("10.0.0.1 web.example.org", None),
        ("::1 localhost", "::1 localhost: one host, or two? write localhost@::1"),
        ("fe80::1 web.example.org", None),
        ("gw -> 10.0.0.1 root", None),
        ("a.example.org b.example.org c", None),
        ("10.0.0.1, root", ""),
        ("10.0.0.1 10.0.0.2", ""),
        ("web.example.org db.example.org:22", ""),
        ("web.example.org:22 db.example.org", ""),
        ("web root", ""),
        ("10.0.0.1 u@web", ""),
        ("web.example.org gw->a", ""),
        ("@a.b web", ""),
        ("gw.example.org -> web", ""),
        ("gw.example.org->web db", ""),
        ("gw.example.org→web -> db x", ""),
        ("gw->10.0.0.[1-2] root", None),
    ],
    ids=lambda value: repr(value),
)
def test_columns_of_other_tools(line: str, message: str | None, home: Path) -> None:
    """A user, a port or an alias after a host: not two hosts. None: refused, however it is said."""
    (home / ".apssh").mkdir()
    (home / ".apssh" / "a.b").write_text("x\n")
    (home / "list").write_text(f"first\n{line}\n")
    if message == "":
        assert len(targets("list")) > 1
        return
    for text, stdin in (("list", None), ("-", f"first\n{line}\n")):
        with pytest.raises(UsageError) as caught:
            targets(text, stdin=stdin)
        if message:
            expected = f"{text}:2: {message}, or a comma between hosts"
            assert str(caught.value) == expected
        assert str(caught.value).startswith(f"{text}:2: ")


def test_word_that_is_a_file_here_and_could_be_a_host(files: Path) -> None:
    told: list[str] = []
    for name in ("web2", "list.txt"):
        (files / name).write_text("a\n")
    sources = apssh._Sources(None, told.append)
    for _ in range(2):
        texts = ["web2", "./web2", "out", "list.txt", "@dbs", "mine", "two words", "b"]
        apssh._parse_targets(texts, exclude=["hosts"], sources=sources)
    assert told == [
        f"{word} is a file or folder here: what it holds are the targets "
        f"(./{word} says so; USER@{word} is the host)"
        for word in ("web2", "out")
    ]


def test_groups_of_the_last_run(home: Path) -> None:
    folder = home / ".apssh"
    for _ in range(2):
        apssh._save_last(
            [
                result_of("a"),
                result_of("gw->u@b:22", status=3, error="x", kind="status"),
                result_of("c", status=None, signal="TERM", error="x", kind="signal"),
                result_of("d", status=None, error="x", kind="timeout", reached=False),
            ]
        )
        assert {path.name: path.read_text() for path in folder.iterdir()} == {
            "last-ok": "a  # ok\n",
            "last-failed": "gw->u@b:22  # status 3\nc  # signal TERM\n",
            "last-unreached": "d  # timeout\n",
        }
        for path in [folder, *folder.iterdir()]:
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    assert targets("@last-ok @last-failed,@last-unreached") == ["a", "gw->u@b:22", "c", "d"]
    apssh._save_last([result_of("a")])
    with pytest.raises(UsageError, match=r"^no target in @last-failed$"):
        targets("@last-failed")


def test_groups_of_the_last_run_that_cannot_be_written(
    home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (home / ".apssh").write_text("")
    apssh._save_last([result_of("a")])
    assert capfd.readouterr().err == f"apssh: {home}/.apssh: file exists\n"


@pytest.mark.parametrize(
    ("texts", "stdin", "expected"),
    [
        (["-"], "a b # c\nd, u@e\n", "a b d u@e"),
        (["x", "-", "y"], "a\n", "x a y"),
        (["-"], "gw -> a\r\nb", "gw->a b"),
        (["-"], "hosts\n", "hosts"),
    ],
    ids=["lines", "between", "arrows", "no-files"],
)
def test_targets_of_standard_input(
    texts: list[str], stdin: str, expected: str, files: Path
) -> None:
    assert targets(*texts, stdin=stdin) == expected.split()


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("a v@b", {"login": "u"}, "u@a v@b"),
        ("gw->a", {"login": "u"}, "u@gw->u@a"),
        ("v@gw->a", {"login": "u"}, "v@gw->u@a"),
        ("a b:7", {"port": 5}, "a:5 b:7"),
        ("gw->a", {"port": 5}, "gw->a:5"),
        ("::1", {"port": 5}, "[::1]:5"),
        ("a", {"gateway": "gw"}, "gw->a"),
        ("a", {"gateway": "u@g1:5 -> g2"}, "u@g1:5->g2->a"),
        ("other->a", {"gateway": "gw"}, "other->a"),
        ("None->a", {"gateway": "gw"}, "None->a"),
        ("None->b->a", {"gateway": "gw"}, "None->b->a"),
        ("a", {"gateway": ""}, "a"),
        ("a", {"gateway": "None->gw"}, "None->gw->a"),
        ("a", {"gateway": "gw1", "login": "u", "port": 5}, "u@gw1->u@a:5"),
        ("a", {"gateway": "[::1]:5"}, "[::1]:5->a"),
        ("a", {"gateway": "None"}, "a"),
        ("gw:23", {"gateway": "gw"}, "gw->gw:23"),
    ],
    ids=lambda value: repr(value) if isinstance(value, str) else "-".join(value),
)
def test_target_defaults(text: str, options: dict[str, Any], expected: str) -> None:
    found = apssh._parse_targets([text], **options)
    assert [str(target) for target in found] == expected.split()
    assert all(
        len(target.chain) == len(str(target).removeprefix("None->").split("->")) for target in found
    )


@pytest.mark.parametrize(
    ("text", "exclude", "expected"),
    [
        ("n[1-4]", ["n2"], "n1 n3 n4"),
        ("n[1-4]", ["n[1-2]", "n4"], "n3"),
        ("u@a v@a b", ["a"], "b"),
        ("u@a v@a", ["u@a"], "v@a"),
        ("a:1 a:2", ["a:1"], "a:2"),
        ("u@a:1 u@a:2 v@a:1", ["u@a:1"], "u@a:2 v@a:1"),
        ("gw->a b", ["a"], "b"),
        ("gw->a a", ["gw->a"], "a"),
        ("gw->a a", ["None->a"], "gw->a"),
        ("u@gw->a v@gw->a", ["u@gw->a"], "v@gw->a"),
        ("A b", ["a"], "b"),
        ("a b", ["c"], "a b"),
        ("a b", [""], "a b"),
        ("a b", ["empty"], "a b"),
        ("a b c", ["hosts"], "c u@c:1"),
        ("hosts", ["b", "d", "node[1-9]"], "a u@c:22 k"),
        ("w[1-3] root@www u@db1", ["www"], "w3"),
        ("w[1-3] u@db1 root@www", ["@www"], "w3 root@www"),
        ("root@empty a", ["empty"], "a"),
        ("root@empty a", ["./empty"], "root@empty a"),
        ("a b", ["-"], "b"),
        ("web db", ["out/1failed"], "db"),
        ("::1 ::2", ["[::1]:22", "::2"], "::1"),
    ],
    ids=lambda value: repr(value),
)
def test_exclude(text: str, exclude: list[str], expected: str, files: Path) -> None:
    texts = [text] if exclude != ["hosts"] else [text, "u@c:1"]
    assert targets(*texts, exclude=exclude, stdin="a\n") == expected.split()


@pytest.mark.parametrize(
    "argv",
    [
        ["-t", "n[1-3]", "-x", "n2"],
        ["-x", "n2", "-t", "n[1-3]"],
        ["-t", "n1", "-x", "n[2,2]", "-t", "n[2-3]", "-t", "n1"],
    ],
    ids=["after", "before", "between"],
)
def test_order_of_options(argv: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert apssh.main([*argv, "-L"]) == 0
    assert capfd.readouterr() == ("n1\nn3\n", "")


BRACKETS = "brackets must be closed and not nested, as in node[01-20,25]"
PORT = "a port is a number from 1 to 65535"
NO_GROUP = "no such group; a group is a file in ~/.apssh"
NUMBER = "a bare number is no host; an address is written whole, as 10.0.0.10"
NO_HOST = "is not a host name or an address"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no target: use -t HOST ..."),
        (" , ", "no target: use -t HOST ..."),
        ("empty", "no target in empty"),
        ("u@", "u@: a host is missing"),
        (":22", ":22: a host is missing"),
        ("u@:22", "u@:22: a host is missing"),
        ("[]", "[]: '' is not a number or a range such as 01-20"),
        ("->a", "->a: a host is missing"),
        ("a->", "a->: a host is missing"),
        ("a->->b", "a->->b: a host is missing"),
        ("None->", "None->: a host is missing"),
        ("-u@a", "-u@a: '-u' is not a user name"),
        ("u'x@a", "u'x@a: 'u'x' is not a user name"),
        ("$USER@a", "$USER@a: '$USER' is not a user name"),
        ("u;x@a", "u;x@a: 'u;x' is not a user name"),
        ("`id`@a", "`id`@a: '`id`' is not a user name"),
        ("u\\@a", "u\\@a: 'u\\' is not a user name"),
        ("a|b@c", "a|b@c: 'a|b' is not a user name"),
        ("u\x07@a", r"u\x07@a: 'u\x07' is not a user name"),
        ("ok,u<x@a", "u<x@a: 'u<x' is not a user name"),
        ("gw->u&x@a", "gw->u&x@a: 'u&x' is not a user name"),
        ("a:", f"a:: {PORT}"),
        ("a:0", f"a:0: {PORT}"),
        ("a:65536", f"a:65536: {PORT}"),
        ("a:22x", f"a:22x: {PORT}"),
        ("a:-1", f"a:-1: {PORT}"),
        ("a:+5", f"a:+5: {PORT}"),
        ("a:２２", f"a:２２: {PORT}"),
        ("[::1]:", f"[::1]:: {PORT}"),
        ("[::1]:0", f"[::1]:0: {PORT}"),
        ("gw:0->a", f"gw:0->a: {PORT}"),
        ("node[3-1]", "node[3-1]: '3-1' is not a number or a range such as 01-20"),
        ("node[10-09]", "node[10-09]: '10-09' is not a number or a range such as 01-20"),
        ("node[1-", f"node[1-: {BRACKETS}"),
        ("node[1-3", f"node[1-3: {BRACKETS}"),
        ("node]1[", f"node]1[: {BRACKETS}"),
        ("n[[1]]", f"n[[1]]: {BRACKETS}"),
        ("::1]", f"::1]: {BRACKETS}"),
        ("[::1", f"[::1: {BRACKETS}"),
        ("node[]", "node[]: '' is not a number or a range such as 01-20"),
        ("node[a-c]", "node[a-c]: 'a-c' is not a number or a range such as 01-20"),
        ("node[1,]", "node[1,]: '' is not a number or a range such as 01-20"),
        ("node[1-2-3]", "node[1-2-3]: '1-2-3' is not a number or a range such as 01-20"),
        ("[abc]:22", "[abc]:22: 'abc' is not a number or a range such as 01-20"),
        ("node[1-100001]", "node[1-100001]: more than 100000 names"),
        ("n[1-1000]x[1-1000]", "n[1-1000]x[1-1000]: more than 100000 names"),
        ("n[1-999999999999999999]", "n[1-999999999999999999]: more than 100000 names"),
        ("a;b", f"a;b: 'a;b' {NO_HOST}"),
        ("$(id)", f"$(id): '$(id)' {NO_HOST}"),
        ("a`b", f"a`b: 'a`b' {NO_HOST}"),
        ("a|b", f"a|b: 'a|b' {NO_HOST}"),
        ("*", f"*: '*' {NO_HOST}"),
        ("!a", f"!a: '!a' {NO_HOST}"),
        ("-a", f"-a: '-a' {NO_HOST}"),
        ("gw-", "gw-: no name ends in '-'; quote 'gw->host'"),
        ("gw->web-", "gw->web-: no name ends in '-'; quote 'gw->host'"),
        ("gw->gw", "gw->gw: it is its own gateway"),
        ("u@a->b->u@a", "u@a->b->u@a: it is its own gateway"),
        ("10", f"10: {NUMBER}"),
        ("u@10:22", f"u@10:22: {NUMBER}"),
        ("n1,[1-3]", f"[1-3]: {NUMBER}"),
        ("１０", f"１０: {NUMBER}"),
        ("n[1-9/0]", "n[1-9/0]: '1-9/0' is not a number or a range such as 01-20"),
        ("n[1/2]", "n[1/2]: '1/2' is not a number or a range such as 01-20"),
        ("n[1-999999/2]", "n[1-999999/2]: more than 100000 names"),
        ("n[1-3]/x", "n[1-3]/x: no such file"),
        ("a@b#c", f"a@b#c: 'b#c' {NO_HOST}"),
        ("a#b@c", "a#b@c: 'a#b' is not a user name"),
        ("gw->@b@c", "gw->@b@c: '@b' is not a user name"),
        ("gw->-oProxyCommand=x", f"gw->-oProxyCommand=x: '-oProxyCommand=x' {NO_HOST}"),
        ("a..b", f"a..b: 'a..b' {NO_HOST}"),
        (".a", f".a: '.a' {NO_HOST}"),
        ("a%b", f"a%b: 'a%b' {NO_HOST}"),
        ("a#b", f"a#b: 'a#b' {NO_HOST}"),
        ("x" * 64, f"{'x' * 64}: '{'x' * 64}' {NO_HOST}"),
        ("1:2:3", f"1:2:3: '1:2:3' {NO_HOST}"),
        ("::1:99999", f"::1:99999: '::1:99999' {NO_HOST}"),
        ("fe80::1%", f"fe80::1%: 'fe80::1%' {NO_HOST}"),
        ("a\x1bb", rf"a\x1bb: 'a\x1bb' {NO_HOST}"),
        ("\u202ea", rf"\u202ea: '\u202ea' {NO_HOST}"),
        ("x." * 130, f"{('x.' * 130)[:77]}...: '{('x.' * 130)[:77]}...' {NO_HOST}"),
        ("x" * 5000, f"{'x' * 77}...: too long for a target"),
        ("../etc/x", "../etc/x: no such file"),
        ("/nowhere", "/nowhere: no such file"),
        ("a/b@c", "a/b@c: no such file"),
        ("binary", "binary: not a text file of targets"),
        ("latin", "latin: not a text file of targets"),
        ("/dev/zero", "/dev/zero: not a text file of targets"),
        pytest.param(
            "/proc/self/mem",
            "/proc/self/mem: input/output error",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="no /proc here"),
        ),
        ("bad", f"bad:3: b:99999: {PORT}"),
        ("x,./bad", f"./bad:3: b:99999: {PORT}"),
        ("bad-range", "bad-range:2: node[3-1]: '3-1' is not a number or a range such as 01-20"),
        ("-", f"-: '-' {NO_HOST}"),
        ("@last:failed", f"@last:failed: {NO_GROUP}"),
        ("@a", f"@a: {NO_GROUP}"),
        ("@", f"@: {NO_GROUP}"),
        ("@..", f"@..: {NO_GROUP}"),
        ("@../hosts", f"@../hosts: {NO_GROUP}"),
        ("@/etc/passwd", f"@/etc/passwd: {NO_GROUP}"),
        ("@hosts/", f"@hosts/: {NO_GROUP}"),
        ("@bad-group", f"@lost:2: @nowhere: {NO_GROUP}"),
        ("@self", "@self:1: groups in a circle, or nested too deep: @self -> @self"),
        (
            "@one",
            "@three:2: groups in a circle, or nested too deep: @one -> @two -> @three -> @one",
        ),
        (
            "two",
            "@two:1: groups in a circle, or nested too deep: "
            "two -> @three -> @one -> @two -> @three",
        ),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_bad_targets(text: str, message: str, files: Path) -> None:
    with pytest.raises(UsageError) as caught:
        targets(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gateway": "g1,g2"}, f"a: 'g1,g2' {NO_HOST}"),
        ({"gateway": "g[1-2]"}, f"a: 'g[1-2]' {NO_HOST}"),
        ({"gateway": "g->"}, "a: a host is missing"),
        ({"gateway": "g;h"}, f"a: 'g;h' {NO_HOST}"),
        ({"login": "two words"}, "a: 'two words' is not a user name"),
        ({"login": ""}, "a: '' is not a user name"),
        ({"login": "$(id)"}, "a: '$(id)' is not a user name"),
        ({"login": "u[1-2]"}, "a: 'u[1-2]' is not a user name"),
        ({"login": "a,b"}, "a: 'a,b' is not a user name"),
        ({"login": "@b"}, "a: '@b' is not a user name"),
        ({"login": "a→b"}, "a: 'a→b' is not a user name"),
        ({"port": 0}, f"a: {PORT}"),
        ({"exclude": ["a"]}, "no target: -x excludes them all"),
        ({"exclude": ["bad"]}, f"bad:3: b:99999: {PORT}"),
        ({"exclude": ["/nowhere"]}, "/nowhere: no such file"),
        ({"exclude": ["n[2-1]"]}, "n[2-1]: '2-1' is not a number or a range such as 01-20"),
        ({"exclude": ["b;c"]}, f"b;c: 'b;c' {NO_HOST}"),
        ({"exclude": ["-"], "stdin": "x\ny:0\n"}, f"-:2: y:0: {PORT}"),
    ],
    ids=lambda value: repr(value) if isinstance(value, str) else "-".join(value),
)
def test_bad_target_options(options: dict[str, Any], message: str, files: Path) -> None:
    with pytest.raises(UsageError) as caught:
        targets("a", **options)
    assert str(caught.value) == message


def test_too_many_targets(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In all, however many texts and lines they come from."""
    monkeypatch.setattr(apssh, "MAX_TARGETS", 10)
    (home / "many").write_text("a[1-6]\nb[1-6]\n")
    for texts, message in (
        (["a[1-6]", "b[1-6]"], "more than 10 targets"),
        (["many"], "more than 10 targets"),
    ):
        with pytest.raises(UsageError) as caught:
            apssh._parse_targets(texts)
        assert str(caught.value) == message


def test_groups_nest_to_a_sane_depth(home: Path) -> None:
    (home / ".apssh").mkdir()
    for number in range(1000):
        (home / ".apssh" / f"g{number}").write_text(f"h{number} @g{number + 1}\n")
    (home / ".apssh" / "g1000").write_text("last\n")
    assert targets("@g950")[-1] == "last"
    with pytest.raises(
        UsageError, match=r"^@g100:1: groups in a circle, or nested too deep: @g0 -> @g1 -> "
    ):
        targets("@g0")


@pytest.mark.skipif(os.getuid() == 0, reason="root reads every file")
def test_unreadable_targets(files: Path) -> None:
    for name in ("hosts", "out"):
        (files / name).chmod(0)
        with pytest.raises(UsageError) as caught:
            apssh._parse_targets([name])
        (files / name).chmod(0o700)
        assert str(caught.value) == f"{name}: permission denied"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-t", "node[1-", "true"], f"apssh: node[1-: {BRACKETS}"),
        (["-p", "0", "-t", "a", "true"], None),
        (["true"], "apssh: no target: use -t HOST ..."),
        (["-t", "./bad", "-L"], f"apssh: ./bad:3: b:99999: {PORT}"),
        (["-t", "a", "-g", "a", "true"], "apssh: a: it is its own gateway"),
    ],
    ids=["range", "port", "none", "file", "gateway"],
)
def test_bad_targets_of_the_program(
    argv: list[str], message: str | None, files: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert apssh.main(argv) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message is None or err == f"{message}\n"


LABEL = st.from_regex(r"[A-Za-z0-9_é][A-Za-z0-9_é-]{0,8}", fullmatch=True)
NAME = (
    st.lists(LABEL, min_size=1, max_size=3)
    .map(".".join)
    .filter(lambda name: not name.isdecimal() and not name.endswith("-"))
)
ADDRESS = NAME | st.ip_addresses().map(str) | st.builds("{}%{}".format, st.ip_addresses(v=6), LABEL)
USER = st.none() | st.from_regex(r"[A-Za-z0-9_.@:+%\\*~é-]{0,6}[a-z0-9]", fullmatch=True).filter(
    lambda text: not text.startswith(("-", "@"))
)
HOP = st.builds(apssh.Hop, ADDRESS, USER, st.none() | st.integers(1, 65535))


CHAIN = st.lists(
    HOP, min_size=1, max_size=4, unique_by=lambda hop: (hop.host.lower(), hop.port or 22)
).map(tuple)


@given(st.builds(apssh.Target, CHAIN, st.booleans()))
@example(apssh.Target((apssh.Hop("::1", "u", 23), apssh.Hop("::1")), True))
@example(apssh.Target((apssh.Hop("None"),)))
@settings(max_examples=150, deadline=None)
def test_targets_say_themselves(target: apssh.Target) -> None:
    """What -L prints, -t reads."""
    if str(target).startswith("None->") and not target.direct:
        return
    (again,) = apssh._parse_targets([str(target)])
    assert (again, again.direct, str(again)) == (
        target,
        target.direct and len(str(target).split("->")) > 1,
        str(target),
    )


@given(st.text(max_size=30) | st.text("ab1[]-,@:>. #/%→", max_size=20))
@settings(max_examples=150, deadline=None)
def test_any_text_is_targets_or_an_error(text: str) -> None:
    """One line that a terminal can show, whatever is given; and what is taken can be a host."""
    try:
        found = apssh._parse_targets(
            [text], sources=apssh._Sources(lambda: text.replace("-", "x"), lambda word: None)
        )
    except UsageError as exc:
        assert exc.message == apssh.escape(exc.message)
    else:
        assert all(
            apssh._is_host(hop.host) and (hop.port is None or 0 < hop.port < 65536)
            for target in found
            for hop in target.chain
        )


def test_same_endpoint_runs_once(tmp_path: Path) -> None:
    """However it is named: by case, by the port and the user that it would have anyway."""
    (tmp_path / "config").write_text("Host db\n User bob\n Port 2200\n")
    named = [
        "a",
        "A",
        "a:22",
        f"{ME}@a",
        f"{ME}@a:22",
        "db",
        "bob@db",
        "db:2200",
        "gw->a",
        "gw:22->a",
        "ann@a",
    ]
    nodes = apssh._build_nodes(
        apssh._parse_targets(named),
        formatter=apssh.HostFormatter(),
        config=str(tmp_path / "config"),
    )
    assert [node._target for node in nodes] == ["a", "db", "gw->a", "ann@a"]


def test_endpoint_that_is_named_twice_keeps_its_short_name() -> None:
    formatter = apssh.HostFormatter()
    named = apssh._parse_targets(["localhost", "LOCALHOST:22", f"{ME}@LocalHost"])
    (node,) = apssh._build_nodes(named, formatter=formatter, config="none")
    assert formatter.endpoint_name(node._endpoint) == "localhost"


# --------------------------------------------------------------------------------------------------
# fan-out
# --------------------------------------------------------------------------------------------------


def test_name_stays_while_a_gateway_learns_its_user(sshd: Sshd, home: Path, capfd: Any) -> None:
    """From its config, when it is connected to."""
    (home / "cfg").write_text(f"User {ME}\nHostName 127.0.0.1\nPort {sshd.port}\n")

    async def main() -> None:
        gateway = SshNode("gw.site", config="cfg")
        node = SshNode(
            "box.site", username=ME, gateway=gateway, address="127.0.0.1", port=sshd.port
        )
        for word in ("one", "two"):
            await node.run(f"echo {word}")
        await node.close()
        await gateway.close()

    run(main())
    assert capfd.readouterr().out == "box:one\nbox:two\n"


def test_one_address_behind_two_gateways(sshd: Sshd, make_sshd: Callable[..., Sshd]) -> None:
    """Private addresses are used on many sites: two hosts, with names and outputs of their own."""
    gateways = [make_sshd().target, make_sshd().target]
    ways = [f"{gateway}->{sshd.target}" for gateway in gateways]
    results = apssh.run(ways, "echo to $SSH_CLIENT", keys=["~/.ssh/id_ed25519"])
    assert len({result.stdout for result in results}) == 2
    assert all(re.fullmatch("to 127.0.0.1 .*\n", result.stdout) for result in results)
    names = [f"{gateway}->127.0.0.1" for gateway in gateways]
    assert [result.name for result in results] == names
    apssh.pull(ways, "/etc/hosts", "got/{host}", keys=["~/.ssh/id_ed25519"])
    assert sorted(path.name for path in Path("got").iterdir()) == sorted(names)


def test_quick_run(sshd: Sshd) -> None:
    port = free_port()
    good, bad = apssh.run(
        [sshd.target, f"127.0.0.1:{port}"],
        "echo out; echo err >&2; printf '\\377'; exit 3",
        keys=["~/.ssh/id_ed25519"],
    )
    assert (good.host, good.user, good.status, good.signal, good.kind, good.ok) == (
        "127.0.0.1",
        ME,
        3,
        None,
        "status",
        False,
    )
    assert (good.stdout, good.stdout_bytes, good.stderr) == ("out\n\udcff", b"out\n\xff", "err\n")
    assert (
        good.seconds > 0
        and good.error == "ended with status 3: echo out; echo err >&2; printf '\\377'; exit 3"
    )
    assert (bad.status, bad.kind, bad.error, bad.ok) == (
        None,
        "refused",
        f"nothing listens on port {port}",
        False,
    )
    assert re.fullmatch(
        rf"<Result 127.0.0.1:{port}: refused in [0-9.]+ s: nothing listens on port {port}>",
        repr(bad),
    )
    assert re.fullmatch(
        rf"<Result 127.0.0.1:{sshd.port}: status 3 in [0-9.]+ s, "
        r"stdout 'out.*: ended with status 3: .*>",
        repr(good),
    )
    assert "stdout 'out\\n\\xff': ended with status 3: echo out" in repr(good)
    assert (good.reached, bad.reached) == (True, False)
    again = pickle.loads(pickle.dumps([good, bad]))
    assert [vars(result) for result in again] == [vars(good), vars(bad)]
    assert apssh.run([], "x") == []  # as in a script that goes on with those that failed


async def test_quick_run_in_a_running_loop(sshd: Sshd) -> None:
    for plain in (apssh.run, apssh.push, apssh.pull):
        with pytest.raises(UsageError) as caught:
            plain(sshd.target, "x", "y") if plain is not apssh.run else plain("h", "x")
        name = plain.__name__
        assert str(caught.value) == (
            f"apssh.{name} in a running loop: await apssh.co_{name}(...) there"
        )
    (result,) = await apssh.co_run(sshd.target, "exit 4", allowed_exits=[4])
    assert result.ok and result.status == 4


@pytest.mark.parametrize("name", ["run", "push", "pull"])
def test_quick_functions_tell_all_their_keywords(name: str) -> None:
    """Each in the signature, with its type and default, and in the docstring."""
    plain, coroutine = getattr(apssh, name), getattr(apssh, f"co_{name}")
    signature = inspect.signature(plain)
    assert signature == inspect.signature(coroutine)
    assert plain.__name__ == name and plain.__doc__ == coroutine.__doc__
    assert len(signature.parameters) > 20
    for parameter in signature.parameters.values():
        assert parameter.annotation and f"``{parameter.name}``" in plain.__doc__, parameter
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            assert parameter.kind is parameter.KEYWORD_ONLY
            assert parameter.default is not parameter.empty


def test_quick_run_gives_input_and_tells_of_each_result(sshd: Sshd) -> None:
    """``done`` hears of a host as it is done, with its output."""
    told: list[tuple[str, str]] = []
    results = apssh.run(
        [sshd.target, f"127.0.0.1:{free_port()}"],
        "cat",
        stdin=b"given",
        done=lambda result: told.append((result.name, result.stdout)),
    )
    assert sorted(told) == sorted((result.name, result.stdout) for result in results)
    assert [result.stdout for result in results] == ["given", ""]


async def test_results_come_one_by_one_and_pickle(sshd: Sshd) -> None:
    """``done=`` hears of each copy while others are under way; what it is given can be kept."""
    Path("f").write_text("sent")
    kept: list[bytes] = []
    targets = [sshd.target, f"{ME}@127.0.0.1:{free_port()}"]
    gone = asyncio.Event()

    def done(result: apssh.Result) -> None:
        kept.append(pickle.dumps(result))
        gone.set()

    command = apssh.co_run(
        [sshd.target, targets[1]], "while ! test -e go; do sleep 0.1; done", done=done
    )
    running = asyncio.create_task(command)
    await gone.wait()  # of the host that is not there
    assert not running.done() and len(kept) == 1
    await apssh.co_push(targets, "f", "go", done=done)
    await running
    await apssh.co_pull(targets, "go", "{host}", done=done)
    results = [pickle.loads(each) for each in kept]
    assert sorted(result.outcome for result in results) == ["ok", "ok", "ok"] + ["refused"] * 3
    assert {result.target for result in results} == set(targets)
    (name,) = {result.name for result in results if result.ok}
    assert Path(name).read_text() == "sent"


def test_quick_run_shows_and_holds_the_output(
    sshd: Sshd, capfd: pytest.CaptureFixture[str]
) -> None:
    """A user's formatter hears of all that happens, whether the output is held or not."""
    heard: list[str] = []

    class Mine(apssh.HostFormatter):
        def session_start(self, hostname: str, command: str) -> None:
            heard.append(command)

    for hold, stdout in ((False, ""), (True, "out\n")):
        (result,) = apssh.run(sshd.target, "echo out", formatter=Mine(), hold=hold)
        assert result.stdout == stdout
        assert capfd.readouterr().out == "127.0.0.1:out\n"
    assert heard == ["echo out"] * 2


def test_quick_copies(sshd: Sshd, home: Path) -> None:
    (home / "f").write_text("text")
    assert [result.ok for result in apssh.push(sshd.target, "f", "g")] == [True]
    assert [result.ok for result in apssh.pull(sshd.target, "g", "{host}-{user}-{fqdn}")] == [True]
    assert (home / f"127.0.0.1-{ME}-127.0.0.1").read_text() == "text"
    (failed,) = apssh.pull(sshd.target, "gone", "x")
    assert (failed.kind, failed.error) == ("remote", "gone: no such file")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: apssh.run("", "x"), "no target: use -t HOST ..."),
        (
            lambda: apssh.run("h", "x", window=-1),
            "window, retries and max_failures are numbers, 0 or more",
        ),
        (
            lambda: apssh.run("h", Run("x"), timeout=1, env={}),
            "env, timeout: give it to Run(...) itself",
        ),
        (
            lambda: apssh.run("h", "x", connect_timeout=0),
            "timeout 0: seconds, more than 0 (None: no limit)",
        ),
        (lambda: apssh.run("h", ""), "Run: an empty command"),
        (
            lambda: apssh.run("h", "x", windwo=3),
            "unknown option windwo: did you mean window?",
        ),
        (
            lambda: apssh.pull("h", "x", "y", user="me"),
            "unknown option user: did you mean login?",
        ),
        (
            lambda: SshNode("h", login="me"),
            "unknown option login: did you mean username?",
        ),
        (lambda: apssh.run("h", RunScript("gone")), "script gone: no such file"),
        (
            lambda: apssh.run("h", "x", env={"A": "1"}, guard=False),
            "env and sudo need the guard: leave out --no-guard, guard=False",
        ),
        (
            lambda: apssh.run("h", Run("x", sudo=True), guard=False),
            "env and sudo need the guard: leave out --no-guard, guard=False",
        ),
        (
            lambda: apssh.demo_fleet(2, formater=None),
            "unknown option formater: did you mean formatter?",
        ),  # type: ignore[call-arg]
        (
            lambda: apssh.Service("x", service_id="a", enviro={}),
            "unknown option enviro: did you mean environ?",
        ),
        (
            lambda: apssh.HostFormatter(verbos=True),
            "unknown option verbos: did you mean verbose?",
        ),
        (
            lambda: YamlLoader("x").load(envv={}),
            "unknown option envv: did you mean env?",
        ),
        (lambda: apssh.push("h", "gone", "x"), "gone: no such file"),
        (
            lambda: apssh.run("h", "x", host_keys="perhaps"),
            "host key policy perhaps: accept-new, yes or no",
        ),
        (
            lambda: apssh.pull("a,b", "x", "y"),
            "a and b would both write to y: put {host} in the path",
        ),
    ],
)
def test_quick_misuse(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        call()
    assert str(caught.value) == message


def test_window(tmp_path: Path) -> None:
    script = f"f=$(mktemp {tmp_path}/run.XXXXXX); ls {tmp_path}/run.* | wc -l; sleep 0.3; rm $f"
    done = cli("--demo", "7", "-w", "2", "-r", "-q", script)
    assert (
        sorted(set(done.stdout.split())) in ([b"1", b"2"], [b"2"]) and len(done.stdout.split()) == 7
    )


def test_change_that_stops_itself(home: Path) -> None:
    """What was not started is counted, named, and can be run again."""
    done = cli(
        "--demo", "5", "-w", "1", "--max-failures", "0", "-j", "case $HOME in *demo2) exit 3; esac"
    )
    found = {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 1
    assert [(line["kind"], line["reached"]) for _, line in sorted(found.items())] == [
        (None, True),
        ("status", True),
        *[("not started", False)] * 3,
    ]
    assert messages(done) == [
        "1 ok, 1 failed, 3 not started",
        "  not started: demo[3-5] (3)",
        "  status 3: demo2 (1)",
    ]


@pytest.mark.parametrize(("limit", "started"), [(0, 1), (1, 2), (5, 3)])
def test_number_of_failures_that_stop(limit: int, started: int) -> None:
    hosts = [f"127.0.0.1:{free_port()}" for _ in range(3)]
    results = apssh.run(hosts, "true", window=1, max_failures=limit)
    assert [result.kind for result in results] == (
        ["refused"] * started + ["not started"] * (3 - started)
    )
    assert not any(result.ok or result.reached for result in results)


def test_retries(make_sshd: Callable[..., Sshd], monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that comes up in time; and one that does not."""
    attempts: list[int] = []
    connect = SshNode._connect

    async def counted(node: SshNode) -> Any:
        attempts.append(node.port)
        if node.port == ports[0] and attempts.count(ports[0]) == 2:
            await asyncio.to_thread(make_sshd, port=ports[0])
        return await connect(node)

    ports = [free_port(), free_port()]
    monkeypatch.setattr(SshNode, "_connect", counted)
    late, never = apssh.run([f"{ME}@127.0.0.1:{port}" for port in ports], "echo here", retries=2)
    assert (late.ok, late.stdout, never.kind, never.error) == (
        True,
        "here\n",
        "refused",
        f"nothing listens on port {ports[1]}",
    )
    assert (attempts.count(ports[0]), attempts.count(ports[1])) == (2, 3)


class Raises(apssh.AbstractCommand):
    """A step that somebody wrote, with a mistake that shows on one host."""

    def __init__(self, mistake: BaseException, port: int) -> None:
        super().__init__()
        self._mistake, self._port = mistake, port

    async def co_run_remote(self, node: Any) -> int:
        if node.port == self._port:
            raise self._mistake
        return int(await node.run("true"))


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (ValueError("a\nb"), r"ValueError: a\nb"),
        (KeyError("x"), "KeyError: 'x'"),
        (
            PermissionError(13, "Permission denied", "f"),
            "PermissionError: [Errno 13] Permission denied: 'f'",
        ),
        (
            UnicodeEncodeError("utf-8", "\udcff", 0, 1, "no"),
            r"UnicodeEncodeError: 'utf-8' codec can't encode character '\udcff' in position 0: no",
        ),
    ],
)
def test_unexpected_failure_is_its_hosts_alone(
    sshd: Sshd, make_sshd: Callable[..., Sshd], mistake: Exception, said: str
) -> None:
    other = make_sshd()
    bad, good = apssh.run([sshd.target, other.target], Raises(mistake, sshd.port))
    assert (good.ok, bad.kind, bad.status, bad.error) == (True, "local", None, said)


@pytest.mark.parametrize("end", [BrokenPipeError(), KeyboardInterrupt(), asyncio.CancelledError()])
async def test_what_ends_a_run_is_no_failure_of_its_host(end: BaseException) -> None:
    """Nobody reads what we print, or it was interrupted: the views hear so, and it passes."""
    told: list[str | None] = []

    class View(apssh._View):
        def done(self, result: apssh.Result) -> None:
            told.append(result.kind)

    node = SshNode("127.0.0.1", port=free_port())
    with pytest.raises(type(end)):
        await apssh._run_on(node, Raises(end, node.port), [View()], 0)
    assert told == ["interrupted"]


# --------------------------------------------------------------------------------------------------
# views
# --------------------------------------------------------------------------------------------------


def result_of(name: str, out: bytes = b"", err: bytes = b"", **fields: Any) -> apssh.Result:
    return apssh.Result(
        name,
        "root",
        22,
        name,
        name,
        **{"status": 0, "reached": True} | fields,
        stdout_bytes=out,
        stderr_bytes=err,
    )


def test_gather(capfd: Any) -> None:
    view = apssh._Gather(diff=False)
    for number in (3, 1, 2):
        view.done(result_of(f"node{number}", b"same\n"))
    view.done(result_of("node4", b"other", b"trouble\n", status=2, error="x", kind="status"))
    view.done(result_of("node5", status=None, error="nothing listens", kind="refused"))
    view.done(result_of("node6", status=None, signal="TERM", error="x", kind="signal"))
    view.finish()
    out, err = capfd.readouterr()
    assert (
        out == "-------------\nnode[1-3] (3)\n-------------\nsame\n"
        "------------------\nnode4 (1) status 2\n------------------\nother\n"
        "---------------------\nnode6 (1) signal TERM\n---------------------\n"
    )
    assert (
        err == "-------------------------\nnode4 (1) status 2 stderr\n"
        "-------------------------\ntrouble\n"
    )


def test_gather_differences(capfd: Any) -> None:
    view = apssh._Gather(diff=True)
    for number in (1, 2):
        view.done(result_of(f"node{number}", b"a\nb\nc\n"))
    view.done(result_of("node3", b"a\nB\nc\n"))
    view.finish()
    assert capfd.readouterr().out.splitlines()[3:] == [
        "a",
        "b",
        "c",
        "-----------------",
        "node3 (1) differs",
        "-----------------",
        "@@ -1,3 +1,3 @@",
        " a",
        "-b",
        "+B",
        " c",
    ]


def test_gather_differences_from_what_succeeded(capfd: Any) -> None:
    """A failed group is no measure, though it be the largest."""
    view = apssh._Gather(diff=True)
    for number in (1, 2):
        view.done(result_of(f"n{number}", status=1, error="ended with status 1", kind="status"))
    view.done(result_of("n3", b"x\n", status=0))
    view.finish()
    assert capfd.readouterr().out == (
        "-----------------------------\nn[1-2] (2) status 1 differs\n"
        "-----------------------------\n@@ -1 +1 @@\n-x\n+\n------\nn3 (1)\n------\nx\n"
    ).replace("-" * 29, "-" * 27)


def test_gather_differences_of_the_last_newline(capfd: Any) -> None:
    view = apssh._Gather(diff=True)
    for name, text in (("a1", b"x\ny\n"), ("a2", b"x\ny\n"), ("b", b"x\ny")):
        view.done(result_of(name, text))
    view.finish()
    assert capfd.readouterr().out.splitlines()[-2:] == ["b (1) differs", "-" * 13]


def test_json_lines(capfd: Any) -> None:
    apssh._JsonLines().done(result_of("box", b"out\xff\n", b"err\n"))
    line = capfd.readouterr().out
    assert json.loads(line) == {
        "host": "box",
        "user": "root",
        "port": 22,
        "name": "box",
        "status": 0,
        "signal": None,
        "error": None,
        "kind": None,
        "failures": [],
        "reached": True,
        "seconds": 0.0,
        "stdout": "out\udcff\n",
        "stderr": "err\n",
    }
    assert json.loads(line)["stdout"].encode("utf-8", "surrogateescape") == b"out\xff\n"


def test_summary() -> None:
    results = [
        *(result_of(f"n{number}") for number in (1, 2, 3)),
        result_of("n4", status=3, error="x", kind="status"),
        result_of("n5", status=None, signal="KILL", error="x", kind="signal"),
        result_of("n6", status=None, error="x", kind="timeout", may_run=True),
        result_of("n7", status=None, error="x", kind="timeout", reached=False),
        result_of("n8", status=None, error="interrupted", kind="interrupted"),
    ]
    assert apssh._summary(results) == [
        "3 ok, 3 failed, 1 not reached, 1 interrupted",
        "  interrupted: n8 (1)",
        "  signal KILL: n5 (1)",
        "  status 3: n4 (1)",
        "  timeout: n[6-7] (2)",
    ]


def test_progress_is_gone_at_the_end(sshd: Sshd) -> None:
    code, seen = on_terminal("-F", "none", "-t", sshd.target, "sleep 1.6; echo shown; sleep 0.5")
    text = seen.decode()
    assert code == 0
    assert "0/1 done, 1 running: 127.0.0.1" in text
    assert "\r\x1b[K\x1b[36m127.0.0.1\x1b[0m:shown" in text and text.endswith("\r\x1b[K")


@pytest.mark.parametrize(
    ("failed", "moved", "shown"),
    [
        (False, 1, "1/3 done, 2 running, 0.0 MB: n[2-3]"),
        (True, 2_460_000, "1/3 done, 1 failed, 2 running, 2.5 MB: n[2-3]"),
    ],
    ids=["little", "failure"],
)
async def test_progress_tells_failures_and_bytes(
    failed: bool, moved: int, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(apssh._screen, "show", lines.append)
    view = apssh._Progress()
    view.begin(["n1", "n2", "n3"])
    for name in ("n1", "n2", "n3"):
        view.started(name, StepRecord(bytes_transferred=moved if name == "n2" else 0))
    view.done(result_of("n1", error="x" if failed else None))
    await eventually_async(lambda: lines)
    view.finish()
    assert list(dict.fromkeys(lines)) == [shown, ""]


def test_progress_wipes_no_line_that_is_not_ended(sshd: Sshd) -> None:
    code, seen = on_terminal(
        "--demo",
        "2",
        "-r",
        "case $HOME in *demo1) printf hello;; *) sleep 2; echo; sleep 1.5; esac",
    )
    assert code == 0 and re.search(rb"(^|\x1b\[K)hello\r\n1/2 done", seen), seen


def test_no_progress_when_quiet(sshd: Sshd) -> None:
    code, seen = on_terminal("-F", "none", "-t", sshd.target, "-q", "sleep 1.6; echo a")
    assert code == 0 and b"done" not in seen


def test_log_of_the_library_is_lines_of_ours(sshd: Sshd) -> None:
    """With -D: escaped, and never in the line of progress."""
    code, seen = on_terminal(
        *("-F", "none", "-t", sshd.target, "-D", "--color", "never"),
        "sleep 1.5; echo $'\\x1b[2J'",
        timeout=20,
    )
    assert code == 0 and all(
        line.startswith((b"asyncssh: ", b"127.0.0.1", b"asyncio: "))
        for line in re.sub(rb"\d/1 [^\r]*\r\x1b\[K", b"", seen).split(b"\r\n")[:-1]
    )


# --------------------------------------------------------------------------------------------------
# demo
# --------------------------------------------------------------------------------------------------


def test_demo_fleet(capfd: Any) -> None:
    async def main() -> list[str]:
        async with apssh.demo_fleet(3) as nodes:
            _open_ports.update(node.port for node in nodes)
            assert [node.hostname for node in nodes] == ["demo1", "demo2", "demo3"]
            nodes[2].gateway = nodes[0]
            homes = Variables()
            await asyncio.gather(
                *(
                    Run("echo $HOME; pwd", capture=Capture(node.hostname, homes)).co_run_remote(
                        node
                    )
                    for node in nodes
                )
            )
            assert await nodes[1].run("cat; exit 5") == 5
            assert await nodes[1].run("kill -TERM $$") == "TERM"
            await nodes[1].put_string_script("echo hi", "script")
            assert await RunString("test -x script && exec ./script").co_run_remote(nodes[1]) == 0
            stranger = SshNode("127.0.0.1", port=nodes[0].port, known_hosts=None, username=ME)
            with pytest.raises(ConnectionFailedError) as caught:
                await stranger.run("true")
            assert caught.value.kind == "auth"
            with socket.create_server(("127.0.0.1", 0)) as other:  # the fleet leads to itself only
                for host, port in (
                    ("127.0.0.2", nodes[1].port),
                    ("127.0.0.1", other.getsockname()[1]),
                ):
                    stranger = SshNode(host, port=port, gateway=nodes[0])
                    with pytest.raises(ConnectionFailedError) as caught:
                        await stranger.run("true")
                    text = f"{host}: refused: nothing listens on port {port}"
                    assert str(caught.value) == text
            return [text.splitlines()[0] for text in homes.values()]

    homes = run(main())
    assert len(set(homes)) == 3 and not any(os.path.exists(home) for home in homes)
    assert capfd.readouterr().out == "demo2:hi\n"


def test_demo_hosts_inherit_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """As over a real login, little of the environment of whoever runs the demo is there."""
    settings = {"LC_ALL": "C.UTF-8", "LANG": "C", "TZ": "UTC", "TMPDIR": "/tmp", "SHELL": "/bin/sh"}
    mine = {"API_TOKEN": "secret", "SSH_AUTH_SOCK": "/gone", "LD_PRELOAD": "", "LC_MINE": "x"}
    for name, value in (settings | mine).items():
        monkeypatch.setenv(name, value)
    done = cli("--demo", "1", "-r", "env -0", USER="me", LOGNAME="me")
    pairs = (text.partition("=") for text in done.stdout.decode().split("\0") if text)
    found = {name: value for name, _, value in pairs}
    assert found.pop("HOME").endswith("/demo1")
    for name in ("PWD", "OLDPWD", "SHLVL", "_"):  # some shells set these
        found.pop(name, None)
    assert found == settings | {"PATH": os.environ["PATH"], "USER": "me", "LOGNAME": "me"}


def test_demo_hosts_know_their_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not in the environment, as under cron."""
    for name in ("USER", "LOGNAME"):
        monkeypatch.delenv(name, raising=False)
    assert cli("--demo", "1", "-r", "echo $USER $LOGNAME").stdout.decode() == f"{ME} {ME}\n"


@pytest.mark.parametrize("count", [0, 1001])
def test_demo_size(count: int) -> None:
    async def main() -> None:
        async with apssh.demo_fleet(count):
            pass

    with pytest.raises(UsageError, match=rf"^a demo has from 1 to 1000 hosts, not {count}$"):
        asyncio.run(main())


# --------------------------------------------------------------------------------------------------
# programs
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no command: apssh [options] command ..."),
        (["true"], "no target: use -t HOST ..."),
        (["-t", "h", ""], "no command: apssh [options] command ..."),
        (["-t", "node[3-1]", "x"], "node[3-1]: '3-1' is not a number or a range such as 01-20"),
        (
            ["-t", "node[1-", "x"],
            "node[1-: brackets must be closed and not nested, as in node[01-20,25]",
        ),
        (["-t", "me@", "x"], "me@: a host is missing"),
        (["-t", "h:99999", "x"], "h:99999: a port is a number from 1 to 65535"),
        (["--nope", "x"], "unknown option --nope (see apssh --help)"),
        (["--tagret", "x"], "unknown option --tagret: did you mean --target?"),
        (["--user", "me", "x"], "unknown option --user: did you mean --login?"),
        (["--fail-fast", "x"], "unknown option --fail-fast (see apssh --help)"),
        (["-t", " ", "-t", "/dev/null", "x"], "no target in /dev/null"),
        (["-t", "h", "-s", "gone.sh"], "script gone.sh: no such file"),
        (["-t", "h", "-s", "-i", "gone", "echo a"], "include gone: no such file"),
        (["-t", "h", "-i", "x", "ls"], "--includes goes with --script"),
        (["-t", "h", "-m", "ls"], "--mark goes with --out-dir or --date-time"),
        (["-t", "h", "--diff", "ls"], "--diff goes with --gather"),
        (
            ["-t", "h", "-w", "-1", "x"],
            "argument -w/--window: '-1': hosts at once, 0 for no limit; -t is for targets "
            "(see apssh --help)",
        ),
        (
            ["-t", "h", "-c", "-1", "x"],
            "argument -c/--connect-timeout: '-1': seconds, more than 0 (see apssh --help)",
        ),
        (
            ["-t", "h", "-u", "0", "x"],
            "argument -u/--command-timeout: '0': seconds, more than 0 (see apssh --help)",
        ),
        (
            ["-w", "node[1-3]", "x"],
            "argument -w/--window: 'node[1-3]': hosts at once, 0 for no limit; -t is for targets "
            "(see apssh --help)",
        ),
        (
            ["-t", "h", "-f", "20", "x"],
            "argument -f/--format: '20' is no format; "
            "use -w for the number of hosts at once (see apssh --help)",
        ),
        (
            ["-t", "h", "-f", "{x}", "x"],
            "argument -f/--format: unknown field {x} in format '{x}': the fields are {time} {host} "
            "{fqdn} {user} {line} {linenl} {nl} (see apssh --help)",
        ),
        (
            ["-t", "h", "-r", "-b", "x"],
            "argument -b/--gather: not allowed with argument -r/--raw-format (see apssh --help)",
        ),
        (["-t", "h", "-k", "gone", "x"], "key gone: no such file or directory"),
        (["-t", "h", "-k", "/", "x"], "key /: is a directory"),
        (
            ["-t", "h", "--env", "A B=1", "x"],
            "argument --env: 'A B=1': write NAME=value (see apssh --help)",
        ),
        (["-t", "h", "--demo", "2", "x"], "--demo brings its own hosts: leave out --target"),
        (["--demo", "2", "--no-guard", "x"], "--demo brings its own hosts: leave out --no-guard"),
        (
            ["-t", "h", "-K", "--no-guard", "--sudo", "x"],
            "env and sudo need the guard: leave out --no-guard, guard=False",
        ),
        (
            ["-t", "h", "-F", "gone", "x"],
            "ssh config: Can't open user config file gone: No such file or directory",
        ),
        (["-t", "gone/targets", "x"], "gone/targets: no such file"),
        (["-t", "@last-ok", "x"], "@last-ok: no such group; a group is a file in ~/.apssh"),
        (
            ["-t", "-", "-I", "x"],
            "-: -t - and -I both take standard input: put the targets in a file",
        ),
        (["-t", "a", "-x", "a", "x"], "no target: -x excludes them all"),
        (["-g", "gw", "-t", "gw", "x"], "gw: it is its own gateway"),
        (["-g", "gw", "-t", "gw", "-L"], "gw: it is its own gateway"),
        (
            ["--scenario", "s.yaml", "-t", "h"],
            "--scenario brings its own hosts and commands: leave out --target",
        ),
        (["--set", "a=1", "-t", "h", "x"], "--set goes with --scenario"),
        (["--record", "f", "-t", "h", "x"], "--record goes with --scenario"),
        (["--timeline", "f", "-t", "h", "x"], "--timeline goes with --scenario"),
        (
            ["-t", "h", "--shard", "3/2", "x"],
            "argument --shard: '3/2': I/N, as in 1/4, 2/4, 3/4 and 4/4 (see apssh --help)",
        ),
        (
            ["-t", "h", "--sudo=a b", "x"],
            "Run: sudo is True (root) or the name of a user, not 'a b'",
        ),
        (
            ["-t", "h", "-o", "StrictHostKeyChecking=no", "x"],
            "argument -o/--out-dir: 'StrictHostKeyChecking=no' is an option of ssh, and -o takes a "
            "folder (./StrictHostKeyChecking=no): for host keys there is --host-keys, for others "
            "an ssh config (-F) (see apssh --help)",
        ),
        (["--scenario", "gone.yaml"], "gone.yaml: no such file or directory"),
    ],
)
def test_apssh_misuse(argv: list[str], message: str, home: Path, capfd: Any) -> None:
    assert apssh.main(argv) == 2
    assert capfd.readouterr() == ("", f"apssh: {message}\n".replace("HOME", str(home)))


@pytest.mark.parametrize(
    ("main", "argv", "message"),
    [
        ("push", ["-t", "h", "f"], "from what to what? appush [options] local ... @:remote"),
        (
            "push",
            ["-t", "h", "f", "g"],
            "'g': remote paths begin with @: and local ones do not: "
            "appush [options] local ... @:remote",
        ),
        (
            "push",
            ["-t", "h", "@:f", "@:g"],
            "'@:f': remote paths begin with @: and local ones do not: "
            "appush [options] local ... @:remote",
        ),
        ("push", ["-t", "h", "gone", "@:g"], "gone: no such file"),
        (
            "push",
            ["-t", "h", ".ssh", "@:g"],
            ".ssh: is a folder (recurse, -r, copies folders)",
        ),
        (
            "push",
            ["-t", "h", "", "@:g"],
            "'': remote paths begin with @: and local ones do not: "
            "appush [options] local ... @:remote",
        ),
        (
            "pull",
            ["-t", "h", "f", "g"],
            "'f': remote paths begin with @: and local ones do not: "
            "appull [options] @:remote ... local",
        ),
        (
            "pull",
            ["-t", "h", "@:f", "@:g"],
            "'@:g': remote paths begin with @: and local ones do not: "
            "appull [options] @:remote ... local",
        ),
        (
            "pull",
            ["-t", "h,i", "@:f", "g"],
            "h and i would both write to g: put {host} in the path",
        ),
        ("pull", ["-t", "h", "@:f", "gone/"], "gone/: no such folder"),
        ("pull", ["@:f", "g"], "no target: use -t HOST ..."),
    ],
)
def test_copy_misuse(main: str, argv: list[str], message: str, capfd: Any) -> None:
    assert getattr(apssh, f"main_{main}")(argv) == 2
    assert capfd.readouterr() == ("", f"ap{main}: {message}\n")


def test_no_key_anywhere(home: Path, capfd: Any) -> None:
    (home / ".ssh" / "id_ed25519").unlink()
    assert apssh.main(["-t", "h", "true"]) == 2
    assert (
        capfd.readouterr().err == "apssh: no key: give one with -k, load one into an agent, "
        "or use -A (password) or -K (go on without)\n"
    )


@pytest.mark.parametrize(
    ("argv", "out"),
    [
        (["-t", "b,a node[01-02]", "-L"], "b\na\nnode01\nnode02\n"),
        (["--demo", "2", "-L"], "demo1\ndemo2\n"),
        (["-F", "none", "-t", "a,b", "-n", "ls", "-l"], f"{ME}@a: ls -l\n{ME}@b: ls -l\n"),
        (["--demo", "2", "-n", "ls"], f"{ME}@demo1: ls\n{ME}@demo2: ls\n"),
        (
            ["-F", "none", "-t", "a", "-n", "-s", "echo one\n echo two", "x"],
            f"{ME}@a: RunString: echo one... x\\necho one\\n echo two\n",
        ),
        (
            ["-g", "gw", "-l", "me", "-p", "2200", "-t", "a,you@b:23,None->c,d", "-x", "d", "-L"],
            "me@gw->me@a:2200\nme@gw->you@b:23\nNone->me@c:2200\n",
        ),
        (["-V"], f"apssh {apssh.__version__}\n"),
        (["-t", "n[1-5]", "--shard", "1/2", "-L"], "n1\nn3\nn5\n"),
        (["-t", "n[1-5]", "--shard", "2/2", "-L"], "n2\nn4\n"),
        (["-F", "none", "-t", "a", "--shard", "2/2", "-n", "ls"], ""),
        (
            ["-F", "none", "-t", "a", "-n", "--sudo", "ls", "--sudo"],
            f"{ME}@a: sudo -u root: ls --sudo\n",
        ),
        (["-F", "none", "-t", "a", "-n", "--sudo=bob", "ls"], f"{ME}@a: sudo -u bob: ls\n"),
    ],
)
def test_listings(argv: list[str], out: str, capfd: Any) -> None:
    assert apssh.main(argv) == 0
    assert capfd.readouterr() == (out, "")


@pytest.mark.parametrize("main", [apssh.main_push, apssh.main_pull])
def test_listing_of_a_copy(main: Callable[..., int], capfd: Any) -> None:
    """It needs no paths."""
    assert main(["-t", "n[1-2]", "-L"]) == 0
    assert capfd.readouterr() == ("n1\nn2\n", "")


@pytest.mark.parametrize(
    ("argv", "status", "out", "err"),
    [
        (["echo out; echo err >&2"], 0, b"127.0.0.1:out\n", b"127.0.0.1:err\n"),
        (["-r", "printf 'a\\nb'"], 0, b"a\nb", b""),
        (
            ["exit 3"],
            1,
            b"",
            b"127.0.0.1: status: ended with status 3: exit 3\n"
            b"0 ok, 1 failed\n  status 3: 127.0.0.1 (1)\n",
        ),
        (["-q", "exit 3"], 1, b"", b"127.0.0.1: status: ended with status 3: exit 3\n"),
        (
            ["-b", "-q", "echo x; kill $$"],
            1,
            b"-------------------------\n127.0.0.1 (1) signal TERM\n-------------------------\nx\n",
            b"",
        ),
        (["-q", "-o", "out", "echo x"], 0, b"", b""),
        (
            ["-f", "{host} {fqdn} {user}{linenl}", "echo x"],
            0,
            f"127.0.0.1 127.0.0.1 {ME}@x\n".encode(),
            b"",
        ),
        (["-b", "echo x"], 0, b"-------------\n127.0.0.1 (1)\n-------------\nx\n", b""),
        (["cat"], 0, b"", b""),
        (["-I", "cat"], 0, b"127.0.0.1:given\n", b""),
        (["--env", "A=x y", "echo $A"], 0, b"127.0.0.1:x y\n", b""),
        (["-s", "#!/bin/bash\necho $#", "a", "b"], 0, b"127.0.0.1:2\n", b""),
        (["-I", "-s", "#!/bin/sh\ncat; echo $1", "a"], 0, b"127.0.0.1:given\n127.0.0.1:a\n", b""),
        (
            ["-u", "0.5", "sleep 30"],
            1,
            b"",
            b"127.0.0.1: timeout: no end within 0.5 s: sleep 30\n"
            b"0 ok, 1 failed\n  timeout: 127.0.0.1 (1)\n",
        ),
        (["--", "echo", "-e"], 0, b"127.0.0.1:\n", b""),
    ],
)
def test_apssh(argv: list[str], status: int, out: bytes, err: bytes, sshd: Sshd) -> None:
    done = cli("-F", "none", "-t", sshd.target, *argv, input=b"given\n")
    assert (done.returncode, done.stdout, done.stderr) == (status, out, err)


def test_none_where_collections_may_be() -> None:
    (result,) = apssh.run("127.0.0.1", "x", exclude=None, port=free_port())
    assert result.kind == "refused"
    assert apssh.experiment(Scheduler(), teardown=None).teardown == []


def test_quiet_run_tells_what_may_still_be_running(sshd: Sshd) -> None:
    """Where no line of the host's own tells it."""
    token = f"9.{os.getpid()}"  # it ends by itself
    words = ["-F", "none", "-t", sshd.target, "-q", "--no-guard", f"sleep {token}"]
    with start_python(*main_of(), *words, text=True) as process:
        eventually(lambda: processes(f"sleep {token}"))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert err == "  the command may still be running on: 127.0.0.1\n"
    done = cli(*words[:-1], "-u", "1", words[-1])
    told = f"timeout: no end within 1 s: sleep {token} (it may still be running)"
    assert done.stderr.decode() == f"127.0.0.1: {told}\n"


def test_exclusion_that_excludes_nothing_is_told(capfd: Any) -> None:
    assert apssh.main(["-t", "a,b", "-x", "b", "-x", "nosuch", "-L"]) == 0
    assert capfd.readouterr() == ("a\n", "apssh: -x nosuch excludes none of the targets\n")


def test_marks_and_outputs_of_another_run(sshd: Sshd, home: Path) -> None:
    """What a host did before does not count any more; and the files of errors are no hosts."""
    for command in ("echo out; echo err >&2; exit 3", "echo out"):
        cli("-F", "none", "-t", sshd.target, "-o", "out", "-m", command)
    name = "127.0.0.1"
    assert sorted(
        str(path.relative_to("out")) for path in Path("out").rglob("*") if path.is_file()
    ) == [f"0ok/{name}", name]
    Path("out", f"{name}.err").touch()
    assert cli("-t", "out", "-L").stdout.decode() == f"{name}\n"


def test_folder_keeps_nothing_of_an_earlier_run(home: Path) -> None:
    """Of hosts of this run, that is, reached or not; those of others are told."""
    Path("out/0ok").mkdir(parents=True)
    port = free_port()
    names = ["127.0.0.1", "127.0.0.1.err", "0ok/127.0.0.1", "web1", "web2.err", "0ok/web1"]
    for name in names:
        Path("out", name).write_text("earlier")
    words = ["-F", "none", "-t", f"127.0.0.1:{port}", "-o", "out", "-m", "echo x"]
    told = f"127.0.0.1: refused: nothing listens on port {port}\n"
    done = cli("-q", *words)
    assert (done.returncode, done.stdout, done.stderr.decode()) == (1, b"", told)
    done = cli(*words)
    assert done.stderr.decode().startswith(
        f"apssh: out also holds files of hosts that are not of this run: web[1-2]\n{told}"
    )
    found = {str(path.relative_to("out")): path.read_text() for path in Path("out").rglob("*.*")}
    assert found == {
        "127.0.0.1.err": told,
        "1failed/127.0.0.1": "None\n",
        "web2.err": "earlier",
    }


@pytest.mark.parametrize(
    ("folder", "told"),
    [
        ("/proc/x", "/proc/x: no such file or directory"),
        ("/dev/full", "/dev/full: file exists"),
        ("out", "out/demo1: is a directory"),
        ("marks", "marks/0ok/demo1: not a directory"),
    ],
)
def test_folder_that_cannot_be_is_misuse(folder: str, told: str, home: Path) -> None:
    """Told before standard input is read, which has no end here."""
    build(home, {"out/demo1/": "", "marks/0ok": ""})
    words = (*main_of(), "--demo", "2", "-I", "-m", "-o", folder, "true")
    process = start_python(*words, stdin=subprocess.PIPE)
    assert process.stdout and process.stderr and process.stdin
    assert (process.wait(8), process.stderr.read().decode()) == (2, f"apssh: {told}\n")
    for file in (process.stdin, process.stdout, process.stderr):
        file.close()


def test_misuse_leaves_no_folder(home: Path) -> None:
    assert cli("-t", "", "-o", "out", "true").returncode == 2 and not Path("out").exists()


def test_options_between_paths(home: Path) -> None:
    Path("f").touch()
    done = cli("f", "-F", "none", "-t", "me@h", "-n", "@:x", program="appush")
    assert (done.stdout, done.stderr) == (b"me@h: Push: f onto x\n", b"")


def test_paths_after_two_dashes(home: Path) -> None:
    Path("-f").touch()
    done = cli("-F", "none", "-t", "me@h", "-n", "--", "-f", "@:", program="appush")
    assert (done.stdout, done.stderr) == (b"me@h: Push: -f onto ~\n", b"")


@pytest.mark.parametrize(
    ("sources", "destination", "arrive"),
    [
        (["@:f"], "new/{host}", ["demo1", "demo2"]),
        (["@:f"], "new/{host}/", ["demo1/f", "demo2/f"]),
        (["@:f", "@:g"], "new/{host}", ["demo1/f", "demo1/g", "demo2/f", "demo2/g"]),
    ],
    ids=["files", "folders", "several"],
)
def test_folders_that_tell_hosts_apart_are_made(
    sources: list[str], destination: str, arrive: list[str], home: Path
) -> None:
    paths = [source[2:] for source in sources]
    code = f"""import asyncio, apssh
async def main():
    async with apssh.demo_fleet(2) as nodes:
        for node in nodes:
            await node.run("touch f g")
        steps = apssh._copies(apssh.Pull, {paths!r}, {destination!r}, {{}}, nodes)
        assert all(result.ok for result in await apssh._fan_out(steps))
asyncio.run(main())"""
    run_python("-c", code, capture_output=False, check=True)
    assert (
        sorted(str(path.relative_to("new")) for path in Path("new").rglob("*") if path.is_file())
        == arrive
    )


def test_local_folder_that_cannot_be_made_is_its_hosts_failure(home: Path) -> None:
    Path("m").mkdir()
    Path("m", "demo1").touch()
    done = cli("--demo", "2", "@:f", "m/{host}/", program="appull")
    assert (done.returncode, sorted(done.stderr.splitlines())) == (
        1,
        sorted(
            [
                b"demo1: local: m/demo1/: file exists",
                b"demo2: remote: f: no such file or directory",
                b"0 ok, 1 failed, 1 not reached",
                b"  local: demo1 (1)",
                b"  remote: demo2 (1)",
            ]
        ),
    )


def test_size_of_the_terminal(sshd: Sshd) -> None:
    if os.getuid():
        pytest.skip("the sshd of an ordinary user cannot give a terminal to its sessions")
    code, seen = on_terminal(
        "-F", "none", "-t", sshd.target, "-r", "--pty", "sleep 0.3; stty size", columns=91
    )
    assert code == 0 and seen.strip() == b"24 91"


class Dialogue:
    """apssh on a terminal of its own, which somebody types on."""

    def __init__(self, *argv: str) -> None:
        self._ours, self._theirs = pty.openpty()
        self.resize(91)
        self._before = termios.tcgetattr(self._theirs)
        self._seen = b""
        self.process = start_python(
            *on_its_terminal(),
            *argv,
            stdin=self._theirs,
            stdout=self._theirs,
            stderr=self._theirs,
            start_new_session=True,
        )

    def __enter__(self) -> Dialogue:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def type(self, data: bytes) -> None:
        os.write(self._ours, data)

    def read_until(self, text: bytes, timeout: float = 30) -> bytes:
        """What the terminal got, up to the end of this."""
        end = time.monotonic() + timeout
        while text not in self._seen:
            assert select.select([self._ours], [], [], max(end - time.monotonic(), 0))[0], (
                self._seen
            )
            self._seen += os.read(self._ours, 65536)
        before, _, self._seen = self._seen.partition(text)
        return before + text

    def is_raw(self) -> bool:
        """Whether the terminal is not as it was at first."""
        return termios.tcgetattr(self._theirs) != self._before

    def end(self) -> tuple[int, bytes]:
        """The exit code, and the rest of what the terminal got."""
        code = self.process.wait(30)
        while select.select([self._ours], [], [], 0)[0]:
            self._seen += os.read(self._ours, 65536)
        return code, self._seen


LISTENING = "trap 'echo caught' INT; trap 'stty size' WINCH; trap 'exit 3' QUIT; echo begun; "
LISTENING += "while :; do sleep 0.1; done"


@as_root
def test_terminal_of_the_one_host_is_ours(sshd: Sshd) -> None:
    """What is unfinished is seen at once, what is typed goes there as it is and is echoed once, by
    the host; it knows the size; at the end the terminal is as it was.
    """
    words = "printf 'name? '; read name; echo \"hello $name\"; stty size; " + LISTENING
    with Dialogue("-F", "none", "-t", sshd.target, "--pty", words) as dialogue:
        assert dialogue.read_until(b"? ") == b"name? "
        assert dialogue.is_raw()
        dialogue.type(b"ann\r")
        assert dialogue.read_until(b"begun\r\n") == b"ann\r\nhello ann\r\n24 91\r\nbegun\r\n"
        dialogue.type(b"\x03")
        assert dialogue.read_until(b"\r\n") == b"^Ccaught\r\n"
        dialogue.resize(66)
        assert dialogue.read_until(b"\r\n") == b"24 66\r\n"
        dialogue.type(b"\x1c")
        code, seen = dialogue.end()
        assert not dialogue.is_raw()
    assert code == 1
    message, summary, _ = seen.split(b"127.0.0.1: ")[1].split(b"\r\n", 2)
    assert message.startswith(b"status: ended with status 3: ")
    assert summary == b"\x1b[31m0 ok, 1 failed\x1b[0m"


@pytest.mark.parametrize("way", ["escape", "terminated", "interrupted twice", "lost"])
@as_root
def test_terminal_is_given_back(sshd: Sshd, way: str) -> None:
    words = {
        "lost": "echo begun; read x; kill -KILL $PPID; sleep 9",
        "interrupted twice": "echo begun; read x; kill -STOP $PPID; touch up; sleep 5; "
        "kill -CONT $PPID",  # the first waits for its server, in vain
    }.get(way, LISTENING)
    with Dialogue("-F", "none", "-t", sshd.target, "--pty", words) as dialogue:
        dialogue.read_until(b"begun")
        eventually(dialogue.is_raw)
        if way == "escape":
            dialogue.type(b"x\r")
            dialogue.type(b"~")
            dialogue.type(b".")
        elif way == "terminated":
            dialogue.process.terminate()
        else:
            dialogue.type(b"\r")
        if way == "interrupted twice":
            eventually((sshd.home / "up").exists)
            dialogue.process.terminate()
            time.sleep(0.05)
            dialogue.process.send_signal(signal.SIGINT)
        code, seen = dialogue.end()
        assert code == (1 if way == "lost" else -signal.SIGINT)
        assert not dialogue.is_raw()
    if way == "lost":
        assert b"\r\n\x1b[31m127.0.0.1: lost: connection lost during " in seen
    elif way != "interrupted twice":
        assert b"0 ok, 1 interrupted\x1b[0m\r\n  interrupted: 127.0.0.1 (1)\r\n" in seen


@as_root
@pytest.mark.parametrize("options", [[], ["-r"]], ids=["several hosts", "an output option"])
def test_terminal_of_others_gets_no_input(
    sshd: Sshd, make_sshd: Callable[..., Sshd], options: list[str]
) -> None:
    """Several hosts cannot share it, and an output option is about whole lines."""
    other = ["-t", make_sshd().target] if not options else []
    words = ["-F", "none", "-q", "-t", sshd.target, *other, *options, "-u", "3", "--pty"]
    with Dialogue(*words, "printf na; printf 'me? '; touch up; read x; echo nev''er") as dialogue:
        eventually((sshd.home / "up").exists)
        assert not dialogue.is_raw()
        dialogue.type(b"ann\n")
        code, seen = dialogue.end()
    assert code == 1 and b"never" not in seen
    assert seen.startswith(b"ann\r\n") and seen.count(b"name? ") == 2 - len(options)
    assert seen.count(b"timeout: no end within 3 s") == 2 - len(options)


def test_folders_and_marks(sshd: Sshd, home: Path) -> None:
    port = free_port()
    done = cli(
        "-F",
        "none",
        "-t",
        sshd.target,
        "-t",
        f"127.0.0.1:{port}",
        "-o",
        "out",
        "-m",
        "echo kept; echo err >&2; exit 4",
    )
    assert (done.returncode, done.stdout) == (1, b"out\n")
    files = {
        str(path.relative_to("out")): path.read_text()
        for path in Path("out").rglob("*")
        if path.is_file()
    }
    name, other = f"{ME}@127.0.0.1:{sshd.port}".replace(f"{ME}@", ""), f"127.0.0.1:{port}"
    assert files == {
        name: "kept\n",
        f"{name}.err": "err\n",
        f"1failed/{name}": "4\n",
        f"1failed/{other}": "None\n",
        f"{other}.err": f"{other}: refused: nothing listens on port {port}\n",
    }
    assert sorted(cli("-t", "out/1failed", "-L").stdout.decode().split()) == sorted([name, other])
    dated = cli("-F", "none", "-t", sshd.target, "-d", "true").stdout.decode().strip()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d@\d\d:\d\d:\d\d", dated) and Path(dated).is_dir()


def test_script_with_includes(sshd: Sshd, home: Path) -> None:
    Path("go.sh").write_text('#!/bin/bash\n. "$(dirname "$BASH_SOURCE")/lib"; say "$@"\n')
    Path("lib").write_text('say() { echo "said $*"; }\n')
    done = cli("-F", "none", "-t", sshd.target, "-s", "-i", "lib", "go.sh", "a", "-b", "'c d'")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"127.0.0.1:said a -b c d\n", b"")


@pytest.mark.parametrize("options", [[], ["-j"], ["-q"], ["-v"]], ids=" ".join)
def test_hosts_never_seen_are_told_once_at_the_end(
    make_sshd: Callable[..., Sshd], options: list[str]
) -> None:
    """Gateways too; with -v each as it happens; those known before are not told."""
    servers = [make_sshd() for _ in range(3)]
    gateway, *others = (server.target for server in servers)
    recorded = [
        f"127.0.0.1: recorded its key {fingerprint(server.key)}".encode() for server in servers
    ]

    def said(*targets: str) -> list[bytes]:
        words = itertools.chain.from_iterable(("-t", target) for target in targets)
        done = cli("-F", "none", "--no-last", *options, *words, "true")
        assert done.returncode == 0
        return [line for line in done.stderr.splitlines() if b"recorded" in line]

    told = said(f"{gateway}->{others[0]}")
    if "-v" in options:
        assert told == recorded[:2]
    elif "-q" in options:
        assert told == []
    else:
        assert told == [b"recorded the keys of 2 hosts never seen: 127.0.0.1"]
    told = said(*others)
    if "-v" in options:
        assert told == recorded[2:]
    elif "-q" in options:
        assert told == []
    else:
        assert told == [
            f"recorded the key of 1 host never seen: 127.0.0.1:{servers[2].port}".encode()
        ]
    assert said(*others) == []


@pytest.mark.usefixtures("never_seen")
def test_hosts_never_seen_by_a_scenario_are_told(sshd: Sshd, home: Path) -> None:
    Path("s.yaml").write_text(
        f"nodes: [{{id: n, hostname: 127.0.0.1, port: {sshd.port}, username: {ME}}}]\n"
        "jobs: [{id: j, node: n, command: echo x}]\n"
    )
    for err in (b"1 ok\nrecorded the key of 1 host never seen: 127.0.0.1\n", b"1 ok\n"):
        assert cli("--scenario", "s.yaml").stderr == err


def test_json(sshd: Sshd) -> None:
    port = free_port()
    done = cli("-F", "none", "-t", f"{sshd.target},127.0.0.1:{port}", "-j", "echo x")
    good, bad = sorted(
        map(json.loads, done.stdout.splitlines()), key=lambda each: each["status"] is None
    )
    assert (done.returncode, good["stdout"], good["status"], bad["kind"], bad["error"]) == (
        1,
        "x\n",
        0,
        "refused",
        f"nothing listens on port {port}",
    )


async def test_sick_hosts_disturb_nobody(
    sshd: Sshd, make_sshd: Callable[..., Sshd], home: Path
) -> None:
    """All the ways not to be reached in one run, beside hosts that are well: a line each, its kind
    in JSON, nothing past its bound.
    """
    locked, changed = make_sshd(AuthorizedKeysFile="/dev/null"), make_sshd()
    old = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode()
    (home / ".ssh" / "known_hosts").write_text(f"[127.0.0.1]:{changed.port} {old}")
    shown = [fingerprint(key) for key in (changed.key, asyncssh.import_public_key(old))]
    refused, late = free_port(), "no connection within 4 s: "

    def says(data: bytes, *, endless: bool = False, closes: bool = False) -> Callable[..., Any]:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(data)
            while endless:
                writer.write(data)
                await writer.drain()
            if not closes:
                await reader.read()

        return talk

    async with contextlib.AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(raw_server(talk))
            for talk in (
                says(b""),
                says(b"SSH-2.0-stalls\r\n"),
                says(b"word\r\n", endless=True),
                says(b"220 mail\r\n"),
                says(b"", closes=True),
            )
        ]
        silent, stalls, endless, mail, drops = (f"127.0.0.1:{port}" for port in servers)
        expected = {
            "no-such-host": ("dns", "unknown host name no-such-host.invalid"),
            f"127.0.0.1:{refused}": ("refused", f"nothing listens on port {refused}"),
            f"127.0.0.1:{locked.port}": ("auth", f"login as {ME} refused, after 1 key"),
            f"127.0.0.1:{changed.port}": (
                "hostkey",
                f"HOST KEY CHANGED: it presents {shown[0]}, known is {shown[1]} "
                f"in {home}/.ssh/known_hosts:1; "
                "somebody may be in the middle. If it was reinstalled: "
                f"ssh-keygen -R '[127.0.0.1]:{changed.port}' -f {home}/.ssh/known_hosts "
                "(hosts reinstalled all day: --host-keys no, known_hosts=None, "
                "or APSSH_HOST_KEYS=no:PATTERN)",
            ),
            silent: ("timeout", f"{late}connected, but the server says nothing"),
            stalls: ("timeout", f"{late}the key exchange does not end"),
            endless: ("refused", "not an ssh server: it says 'word'"),
            mail: ("timeout", f"{late}not an ssh server: it says '220 mail'"),
            drops: ("lost", f"{late}dropped before login, N times"),
        }
        well = f"127.0.0.1:{sshd.port}"
        argv = [
            "-F",
            "none",
            "-c",
            "4",
            *itertools.chain.from_iterable(
                ("-t", host) for host in (well, "no-such-host.invalid", *[*expected][1:])
            ),
        ]
        begin = time.monotonic()
        done = await asyncio.to_thread(
            cli, *argv, "-j", "echo well", RES_OPTIONS="timeout:1 attempts:1"
        )
        assert done.returncode == 1 and time.monotonic() - begin < 30
        found = {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}
        good = found.pop(well)
        assert (good["status"], good["stdout"], good["kind"]) == (0, "well\n", None) and good[
            "seconds"
        ] < 4
        assert {
            name: (line["kind"], re.sub(r"\d+ times", "N times", line["error"]))
            for name, line in found.items()
        } == expected
        done = await asyncio.to_thread(cli, *argv, "echo well", RES_OPTIONS="timeout:1 attempts:1")
        assert (done.returncode, done.stdout) == (1, f"{well}:well\n".encode())
        *lines, _, _, _, _, _, _, _ = re.sub(
            r"\d+ times", "N times", done.stderr.decode()
        ).splitlines()
        assert sorted(lines) == sorted(
            f"{name}: {kind}: {message}" for name, (kind, message) in expected.items()
        )
        kinds = {
            kind: [name for name, (each, _) in expected.items() if each == kind]
            for kind, _ in expected.values()
        }
        assert done.stderr.decode().splitlines()[-7:] == [
            "1 ok, 9 not reached",
            *(
                f"  {kind}: {apssh.fold_names(names)} ({len(names)})"
                for kind, names in sorted(kinds.items())
            ),
        ]


@pytest.mark.parametrize(
    ("command", "status", "signal_name", "kind", "error"),
    [
        ("exit 3", 3, None, "status", "ended with status 3: exit 3"),
        ("kill -KILL $$", None, "KILL", "signal", "ended with signal KILL: kill -KILL $$"),
        (
            "no-such-command 2>/dev/null",
            127,
            None,
            "status",
            "ended with status 127: no-such-command 2>/dev/null",
        ),
        (
            "/etc/passwd 2>/dev/null",
            126,
            None,
            "status",
            "ended with status 126: /etc/passwd 2>/dev/null",
        ),
    ],
    ids=["status", "killed", "not found", "permission"],
)
def test_failing_commands_have_a_kind(
    command: str, status: int | None, signal_name: str | None, kind: str, error: str, sshd: Sshd
) -> None:
    done = cli("-F", "none", "-t", sshd.target, "-j", command)
    line = json.loads(done.stdout)
    assert (done.returncode, line["status"], line["signal"], line["kind"], line["error"]) == (
        1,
        status,
        signal_name,
        kind,
        error,
    )


def test_targets_from_a_file_are_told(home: Path, capfd: Any) -> None:
    Path("web").write_text("a\n")
    said = (
        "apssh: web is a file or folder here: what it holds are the targets "
        "(./web says so; USER@web is the host)\n"
    )
    for options, err in (([], said), (["-q"], "")):
        assert apssh.main(["-t", "web", "-x", "b", "-x", "c,d", *options, "-L"]) == 0
        out, told = capfd.readouterr()
        assert (out, re.sub("apssh: -x .* excludes none of the targets\n", "", told)) == (
            "a\n",
            err,
        )


@pytest.mark.parametrize(
    ("argv", "environment", "coloured"),
    [
        ([], {}, True),
        (["--color", "never"], {}, False),
        ([], {"NO_COLOR": "1"}, False),
        (["--color", "always"], {"NO_COLOR": "1"}, True),
    ],
)
def test_colour(
    argv: list[str],
    environment: dict[str, str],
    coloured: bool,
    sshd: Sshd,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    _, seen = on_terminal("-F", "none", "-t", sshd.target, *argv, "false")
    assert (b"\x1b[31m0 ok, 1 failed\x1b[0m" in seen) == coloured


def test_gather_of_many_hosts_needs_little_memory() -> None:
    view = apssh._Gather(diff=False)
    for number in range(2000):
        view.done(result_of(f"node{number}", b"x" * 100_000))
    assert sum(len(out) for _, out, _ in view._groups) == 100_000


def test_last_run_again(sshd: Sshd) -> None:
    port = free_port()
    both = f"{sshd.target},127.0.0.1:{port}"
    assert cli("-F", "none", "-t", both, "true").returncode == 1
    assert cli("-t", "@last-unreached", "-L").stdout.decode() == f"127.0.0.1:{port}\n"
    assert cli("-t", "@last-ok", "-L").stdout.decode() == f"{sshd.target}\n"
    assert cli("-F", "none", "-t", "@last-ok", "--no-last", "false").returncode == 1
    assert cli("-t", "@last-ok", "-L").stdout.decode() == f"{sshd.target}\n"
    _, seen = on_terminal("-t", "@last-ok", "-L")
    assert seen.decode() == f"@last-ok: {sshd.target} (1)\r\n{sshd.target}\r\n"


def test_copy_programs(sshd: Sshd, home: Path) -> None:
    Path("tree/sub").mkdir(parents=True)
    Path("tree/sub/f").write_text("text")
    Path("127.0.0.1").write_text("mine")
    done = cli("-F", "none", "-t", sshd.target, "-r", "tree", "{host}", "@:", program="appush")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert (sshd.home / "tree/sub/f").read_text() == "text" and (
        sshd.home / "127.0.0.1"
    ).read_text() == "mine"
    done = cli("-F", "none", "-t", sshd.target, "-r", "@:tree", "got-{user}/", program="appull")
    assert (done.returncode, done.stderr) == (0, b"")
    assert Path(f"got-{ME}/tree/sub/f").read_text() == "text"
    done = cli("-F", "none", "-t", sshd.target, "@:gone", "x", program="appull")
    assert (done.returncode, done.stderr) == (
        1,
        b"127.0.0.1: remote: gone: no such file\n0 ok, 1 failed\n  remote: 127.0.0.1 (1)\n",
    )
    assert (
        cli("-t", "me@h,i:23", "-n", "-r", "tree", "{host}", "@:/x/{host}", program="appush").stderr
        == b"appush: h: no such file\n"
    )
    Path("h").touch()
    Path("i").touch()
    shown = cli(
        "-F",
        "none",
        "-l",
        "me",
        "-t",
        "gw->h,i:23",
        "-n",
        "-r",
        "tree",
        "{host}",
        "@:/x/{host}",
        program="appush",
    ).stdout.decode()
    assert (
        shown == "me@gw->me@h: Push: tree h onto /x/h, recurse\n"
        "me@i:23: Push: tree i onto /x/i, recurse\n"
    )
    shown = cli(
        "-F", "none", "-t", "me@h", "-n", "@:/x", "@:y", "new-{host}/", program="appull"
    ).stdout.decode()
    assert shown == "me@h: Pull: /x y into new-h/\n" and not Path("new-h").exists()


SHELLS = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
}
COMPLETED = {
    "apssh --max": "apssh --max-failures",
    "apssh -t @w": "apssh -t @web",
    "apssh -t gam": "apssh -t gamma",
    "apssh -t del": "apssh -t delta:2200",
    "apssh -t me@bet": "apssh -t me@beta",
    "apssh -t alpha,bet": "apssh -t alpha,beta",
    "appull --rec": "appull --recurse",
}


@pytest.mark.parametrize("shell", SHELLS)
def test_completion(shell: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By argcomplete in a real shell: options, groups, hosts of the ssh config and known_hosts."""
    pytest.importorskip("argcomplete")
    if not shutil.which(shell):
        pytest.skip(f"no {shell} is installed here")
    (home / ".ssh" / "config").write_text("Host alpha alpine *.x\n  User me\nHost beta\n")
    (home / ".ssh" / "known_hosts").write_text(
        "gamma ssh-ed25519 AAAA\n[delta]:2200 ssh-ed25519 AAAA\n|1|YWE=|YmI= ssh-ed25519 AAAA\n"
    )
    (home / ".apssh").mkdir()
    (home / ".apssh" / "web").write_text("alpha\n")
    (home / "bin").mkdir()
    for program, function in MAINS.items():
        (home / "bin" / program).write_text(
            f"#!{sys.executable}\nimport sys, apssh\nsys.exit(apssh.{function}())\n"
        )
        (home / "bin" / program).chmod(0o755)
    scripts = os.path.dirname(sys.executable)
    monkeypatch.setenv("PATH", f"{home}/bin:{scripts}:{os.environ['PATH']}")
    monkeypatch.setenv("TERM", "dumb")
    profile = {
        "bash": "COMP_WORDBREAKS=${COMP_WORDBREAKS//@/}",
        "zsh": "autoload -U compinit; compinit -u",
    }
    programs = 'eval "$(register-python-argcomplete apssh appush appull)"'
    start = f"{profile[shell]}; {programs}; PS1=GO-; echo up"
    pid, fd = pty.fork()
    if pid == 0:
        os.execvp(shell, SHELLS[shell])
    seen = b""

    def answer(line: str, until: bytes) -> bytes:
        nonlocal seen
        seen = b""
        os.write(fd, line.encode())
        end = time.monotonic() + 20
        while not (found := re.search(until, seen)):
            left = max(end - time.monotonic(), 0)
            assert select.select([fd], [], [], left)[0], seen
            seen += os.read(fd, 4096)
        return found[1]

    try:
        answer(f"{start}\r", rb"(?s)\n(up)\r.*GO-")
        # Ctrl-A and Ctrl-E: the completed line becomes the words of an echo
        found = {
            line: answer(f"{line}\t\x01echo : \x05 :\r", rb"(?s)\n: ([^\r\n]*) :\r.*GO-")
            .decode()
            .strip()
            for line in COMPLETED
        }
        assert found == COMPLETED
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(fd)


def start(*argv: str, program: str = "apssh") -> subprocess.Popen[bytes]:
    """A program at work."""
    return start_python(*main_of(program), *argv)


def interrupted(
    argv: list[str],
    number: int,
    started: Callable[[], Any],
    twice: bool = False,
    program: str = "apssh",
) -> tuple[int, bytes, bytes, float]:
    """Run a program, interrupt it once something is there; its exit code, outputs, and how long it
    took to go.
    """
    process = start(*argv, program=program)
    eventually(started)
    begin = time.monotonic()
    process.send_signal(number)
    if twice:
        time.sleep(0.05)
        process.send_signal(number)
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err, time.monotonic() - begin


@pytest.mark.parametrize("twice", [False, True])
def test_interruption(sshd: Sshd, twice: bool) -> None:
    token = f"94{os.getpid()}{int(twice)}"
    code, out, err, seconds = interrupted(
        ["-F", "none", "-t", sshd.target, f"echo begun; touch up; sleep {token}"],
        signal.SIGINT,
        lambda: processes(f"sleep {token}"),
        twice,
    )
    assert code == -signal.SIGINT and seconds < 5  # the second may come when it is on its way out
    if not twice:
        assert (out, err) == (
            b"127.0.0.1:begun\n",
            b"0 ok, 1 interrupted\n  interrupted: 127.0.0.1 (1)\n",
        )
    eventually(lambda: not processes(f"sleep {token}"))


def test_json_of_an_interruption(sshd: Sshd) -> None:
    """Its kind is that of the summary, for a host whose turn never came too."""
    token = f"83{os.getpid()}"
    targets = ["-t", sshd.target, "-t", f"127.0.0.1:{free_port()}", "-w", "1"]
    code, out, err, _ = interrupted(
        ["-F", "none", *targets, "-j", f"echo begun; sleep {token}"],
        signal.SIGINT,
        lambda: processes(f"sleep {token}"),
    )
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line["kind"], line["error"], line["stdout"]) for line in lines] == [
        ("interrupted", "interrupted", "begun\n"),
        ("interrupted", "interrupted", ""),
    ]
    assert code == -signal.SIGINT and err.startswith(b"0 ok, 2 interrupted\n  interrupted: ")


def test_interruption_ends_a_loop_of_the_shell_too(sshd: Sshd, home: Path) -> None:
    """bash goes on after a program that exits with 130; it ends with one that SIGINT has ended."""
    for name in MAINS:
        Path(name).write_text(f'#!/bin/sh\nexec {sys.executable} {MODULE} "$@"\n')
        Path(name).chmod(0o755)
    one = f"./apssh -F none -t {sshd.target} 'touch up; sleep 90{os.getpid()}'"
    process = subprocess.Popen(
        ["/bin/bash", "-c", f"for i in 1 2 3; do echo turn $i; {one}; done; echo went on"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    eventually((sshd.home / "up").exists)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (-signal.SIGINT, b"turn 1\n")
    assert err == b"0 ok, 1 interrupted\n  interrupted: 127.0.0.1 (1)\n"


def test_interruption_during_the_imports_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "asynciojobs.py").write_text(
        "import sys, time; print('here', flush=True); time.sleep(60)\n"
    )
    process = start_python(MODULE, "-V", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert process.stdout and process.stdout.readline() == b"here\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10) == (b"", b"")
    assert process.returncode == -signal.SIGINT


def test_import_leaves_the_handler_of_ctrl_c_alone() -> None:
    code = """import signal, sys
sys.argv[0] = {!r}
import apssh; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"""
    for name in ("script.py", "apssh"):
        run_python("-c", code.replace("{!r}", repr(name)), capture_output=False, check=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["term", "hangup"])
def test_signals_that_end_in_order(sshd: Sshd, number: int) -> None:
    token = f"91{os.getpid()}{int(number)}"
    code, _, err, _ = interrupted(
        ["-F", "none", "-t", sshd.target, f"touch up; sleep {token}"],
        number,
        lambda: processes(f"sleep {token}"),
    )
    assert (code, err) == (-signal.SIGINT, b"0 ok, 1 interrupted\n  interrupted: 127.0.0.1 (1)\n")
    eventually(lambda: not processes(f"sleep {token}"))


def test_hangup_that_was_ignored_ends_nothing(sshd: Sshd) -> None:
    """As nohup does."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start("-F", "none", "-t", sshd.target, "touch up; sleep 1; echo done")
    finally:
        signal.signal(signal.SIGHUP, before)
    eventually((sshd.home / "up").exists)
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=20) == (b"127.0.0.1:done\n", b"")


PRINTING = "while :; do echo noise; done"
KILLED = {
    "silent": ([], "sleep {}; :"),
    "printing": ([], "sleep {0} & " + PRINTING),
    "stdin": (["-I"], "sleep {}; :"),
    "stdin and printing": (["-I"], "sleep {0} & " + PRINTING),
    "script": (["-s"], "#!/bin/sh\necho $$ > leader\nsleep {0} & sleep {0}"),
    "script and stdin": (["-I", "-s"], "#!/bin/sh\necho $$ > leader\nsleep {0} & " + PRINTING),
    "hup and term": ([], "trap '' HUP TERM; sleep {0} & sleep {0}; sleep {0}"),
}


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("way", KILLED)
def test_killed_client_leaves_no_process(sshd: Sshd, way: str) -> None:
    """What a client that was killed ran, in its whole group, is gone; and so are its scripts."""
    token, (options, command) = f"93{os.getpid()}{list(KILLED).index(way)}", KILLED[way]
    if "-s" not in options:
        command = f"echo $$ > leader; {command}"
    words = ["-F", "none", "-t", sshd.target, *options, command.format(token)]
    process = start_python(*main_of(), *words, stdout=subprocess.DEVNULL, stderr=None)
    eventually(lambda: processes(f"sleep {token}"))
    group = os.getpgid(int((sshd.home / "leader").read_text()))
    assert group_lives(group)
    assert list(sshd.home.glob(".apssh-remote/*")) or "-s" not in options
    process.kill()
    process.communicate()
    eventually(lambda: not group_lives(group) and not processes(f"sleep {token}"))
    eventually(lambda: not list(sshd.home.glob(".apssh-remote/*")))


def test_killed_client_leaves_what_its_shell_has_left(sshd: Sshd) -> None:
    """As ssh does, though it holds the outputs."""
    token = f"99{os.getpid()}"
    process = start("-F", "none", "-t", sshd.target, f"sleep {token} & echo $! > left")
    left = int(
        eventually(lambda: (sshd.home / "left").exists() and (sshd.home / "left").read_text())
    )
    process.kill()
    process.communicate()
    eventually(lambda: not sshd.connections())
    time.sleep(3)  # what the guard takes to end something
    assert processes(f"sleep {token}")
    os.kill(left, signal.SIGKILL)


@pytest.mark.parametrize("login", ["root", "tester"])
@on_testbed
def test_killed_client_leaves_nothing_on_real_hosts(login: str, tmp_path: Path) -> None:
    """The same, many times, with a command that prints: the end of its input races with SIGPIPE."""
    token = f"95{os.getpid()}"
    words = [
        "-F",
        "none",
        "--no-last",
        "--host-keys",
        "no",
        "-k",
        os.environ["TESTBED_KEY"],
        "-l",
        login,
        "-t",
        TESTBED[0],
    ]
    node = box(username=login, formatter=apssh.CaptureFormatter())
    for number in range(10):
        process = start(*words, f"sleep {token}{number} & {PRINTING}")
        assert process.stdout
        assert process.stdout.read(5)
        if not number:  # it would be seen
            assert asyncio.run(node.run(f"pgrep -f '^sleep {token}'")) == 0
        process.kill()
        process.communicate()
    eventually(lambda: asyncio.run(node.run(f"pgrep -f '^sleep {token}'")) == 1)
    asyncio.run(node.close())


@pytest.mark.parametrize("late", [0.05 * number for number in range(12)])
def test_interruption_while_targets_are_typed(late: float) -> None:
    """At any time: before it reads, just then, and while it waits."""
    words = main_of(first="import apssh; sys.stderr.write('up'); sys.stderr.flush()")
    with start_python(*words, "-t", "-", "true", stdin=subprocess.PIPE, stdout=None) as process:
        assert process.stderr and process.stdin
        process.stderr.read(2)
        time.sleep(late)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == -signal.SIGINT


@pytest.mark.parametrize("interrupted", [False, True])
def test_resolver_that_never_answers(interrupted: bool) -> None:
    """Nothing waits for it: neither the deadline, nor Ctrl-C, nor the end of the program."""
    argv = ["-F", "none", "-K", "-c", "30" if interrupted else "0.3", "-t", "nosuch", "true"]
    code = (
        "import sys, time, socket, apssh\n"
        "def never(*args, **keywords):\n"
        "    sys.stdout.write('asked'); sys.stdout.flush(); time.sleep(60)\n"
        f"socket.getaddrinfo = never; sys.exit(apssh.main({argv}))"
    )
    with start_python("-c", code) as process:
        assert process.stdout and process.stderr
        assert process.stdout.read(5) == b"asked"
        if interrupted:
            process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        assert process.wait(30) == (130 if interrupted else 1) and time.monotonic() - begin < 5
        assert process.stderr.read() == (
            b"0 ok, 1 interrupted\n  interrupted: nosuch (1)\n"
            if interrupted
            else b"nosuch: timeout: no connection within 0.3 s: no answer\n"
            b"0 ok, 1 not reached\n  timeout: nosuch (1)\n"
        )


def test_interruption_of_a_quick_script(sshd: Sshd, home: Path) -> None:
    token = f"98{os.getpid()}"
    code = f"import apssh; apssh.run({sshd.target!r}, 'sleep {token}')"
    process = start_python("-c", code, stdout=None)
    try:
        eventually(lambda: processes(f"sleep {token}"))
        process.send_signal(signal.SIGINT)
        assert process.wait(15) != 0
    finally:
        process.kill()
        said = process.communicate()[1].decode()
    assert said.splitlines()[-1] == "KeyboardInterrupt", said
    eventually(lambda: not processes(f"sleep {token}"))


def test_quick_script_keeps_a_users_own_handler(sshd: Sshd, home: Path) -> None:
    code = (
        "import signal, apssh\n"
        "signal.signal(signal.SIGINT, lambda *_: print('mine', flush=True))\n"
        f"print(apssh.run({sshd.target!r}, 'touch up; sleep 2; echo done')[0].stdout)"
    )
    process = start_python("-c", code, stderr=None)
    eventually((sshd.home / "up").exists)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[0].split() == [b"mine", b"done"]


def test_interrupted_copy_leaves_nothing(sshd: Sshd, home: Path) -> None:
    with open("big", "wb") as file:
        file.truncate(400_000_000)
    code, _, err, _ = interrupted(
        ["-F", "none", "-t", sshd.target, "big", "@:there"],
        signal.SIGINT,
        lambda: list(sshd.home.iterdir()),
        program="appush",
    )
    assert code == -signal.SIGINT and b"Traceback" not in err
    eventually(lambda: not list(sshd.home.iterdir()))
    os.rename("big", sshd.home / "big")
    before = set(home.iterdir())
    code, _, err, _ = interrupted(
        ["-F", "none", "-t", sshd.target, "@:big", "here"],
        signal.SIGINT,
        lambda: set(home.iterdir()) - before - {home / ".ssh", home / ".apssh"},
        program="appull",
    )
    assert code == -signal.SIGINT and b"Traceback" not in err
    assert {path.name for path in home.iterdir()} <= {".ssh", ".apssh"}


def test_program_in_another_thread(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """Signals, and what else a process has once, are left to whoever has the main thread."""
    monkeypatch.setattr(sys, "argv", ["apssh", "-t", "a,b", "-L"])
    codes: list[int] = []
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    thread = threading.Thread(target=lambda: codes.append(apssh.main()))
    thread.start()
    thread.join()
    assert (codes, capfd.readouterr()) == ([0], ("a\nb\n", ""))
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_closed_pipe_ends_quietly(sshd: Sshd) -> None:
    token = f"92{os.getpid()}"
    program = shlex.join([*PYTHON, *main_of()])
    done = subprocess.run(
        f"{program} -F none -t {sshd.target} 'yes {token}'"
        f" | (head -n 1; pgrep -f ^yes.{token} >yes)",
        shell=True,
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert (done.stdout, done.stderr) == (
        f"127.0.0.1:yes {token}\n".encode().replace(b"yes ", b""),
        b"",
    )
    assert re.fullmatch(r"\d+\n", Path("yes").read_text())
    eventually(lambda: not processes(f"yes {token}"))


@pytest.mark.parametrize("name", ["apssh", "appush", "appull"])
def test_copy_or_link_of_the_file_is_a_program(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH")
    (tmp_path / name).symlink_to(MODULE)
    done = run_python(tmp_path / name, "--help", text=True, check=True)
    assert done.stdout.startswith(f"usage: {name} [options]")


def test_vendored_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH")
    (tmp_path / "vendor").mkdir()
    shutil.copy(MODULE, tmp_path / "vendor" / "apssh.py")
    code = (
        "from vendor import apssh; from vendor.apssh import SshNode; "
        "from vendor.apssh.formatters import TimeHostFormatter as T; "
        "assert T is apssh.TimeHostFormatter"
    )
    run_python("-c", code, cwd=tmp_path, capture_output=False, check=True)
    done = run_python("apssh.py", "--demo", "2", "uname", cwd=tmp_path / "vendor", check=True)
    assert (
        sorted(done.stdout.splitlines()) == [b"demo1:Linux", b"demo2:Linux"]
        if sys.platform == "linux"
        else done.stdout
    )


def test_submodules_of_the_older_package() -> None:
    for name in (
        "formatters",
        "nodes",
        "sshproxy",
        "commands",
        "sshjob",
        "service",
        "deferred",
        "topology",
        "keys",
        "yaml_loader",
    ):
        assert importlib.import_module(f"apssh.{name}") is apssh is getattr(apssh, name)
    assert apssh.SshProxy is apssh.SshNode


def test_public_names_are_documented() -> None:
    for name in apssh.__all__:
        assert getattr(apssh, name).__doc__, name
    assert not any(name.startswith("_") for name in apssh.__all__)


def test_scenario_program(home: Path, capfd: Any) -> None:
    Path("s.yaml.j2").write_text(
        "nodes: [{id: here, localnode: true}]\n"
        "jobs:\n  - {id: a, node: here, command: 'echo {{word}}'}\n"
        "  - {id: b, node: here, required: a, command: exit 3}\n"
        "  - {id: c, node: here, required: b, command: 'true'}\n"
    )
    assert apssh.main(["--scenario", "s.yaml.j2", "--set", "word=given"]) == 1
    out, err = capfd.readouterr()
    assert out == "LOCALNODE:given\n"  # what asynciojobs says of it is on stderr
    assert err == "b: LOCALNODE: status: ended with status 3: exit 3\n1 ok, 1 failed, 1 never ran\n"
    assert apssh.main(["--scenario", "s.yaml.j2"]) == 2
    assert (
        capfd.readouterr().err
        == "apssh: s.yaml.j2:3: template: 'word' is undefined: add it to env (--set NAME=value)\n"
    )


SCENARIO = """
nodes:
  - {id: gw, hostname: gw.example.org, username: slice}
  - {id: n1, hostname: node1, gateway: gw, port: 2200}
  - {id: here, localnode: true}
jobs:
  - {id: look, node: n1, label: a look, \
commands: [{type: Run, command: uname -r, label: kernel, capture: ver}]}
  - id: act
    node: here
    required: look
    critical: false
    commands:
      - {type: Run, command: "if true\\nthen  echo {{ver}} {{nope}}; fi"}
      - {type: RunString, script_body: "echo one\\necho two", args: [a, "{{ver}}"]}
      - {type: RunScript, local_script: later.sh, includes: [lib.sh]}
      - {type: Push, localpaths: [x, y, z], remotepath: d/, recurse: true, label: ""}
"""


def test_forever_job_that_fails_by_itself_is_a_failure(home: Path, capfd: Any) -> None:
    jobs = """
nodes: [{id: here, localnode: true}]
jobs:
  - {id: a, node: here, forever: true, critical: false, command: %s}
  - {id: b, node: here, %s command: test 1}
"""
    Path("s.yaml").write_text(jobs % ("exit 3", "required: a,"))
    assert apssh.main(["--scenario", "s.yaml"]) == 1
    assert capfd.readouterr() == (
        "",
        "LOCALNODE:job a failed (not critical): status: ended with status 3: exit 3\n"
        "1 failed, 1 ok\n",
    )
    Path("s.yaml").write_text(jobs % ("sleep 60", ""))
    assert apssh.main(["--scenario", "s.yaml"]) == 0
    assert capfd.readouterr() == ("", "1 cancelled, 1 ok\n")


def test_jobs_of_a_dry_run_come_in_the_order_of_the_file(home: Path, capfd: Any) -> None:
    rows = ["  - {id: last, node: here, command: x, required: [j3, j9]}"]
    rows += [f"  - {{id: j{number}, node: here, command: x}}" for number in range(30)]
    Path("s.yaml").write_text(
        "nodes: [{id: here, localnode: true}]\njobs:\n" + "\n".join(rows) + "\n"
    )
    assert apssh.main(["--scenario", "s.yaml", "-n"]) == 0
    shown = [line for line in capfd.readouterr().out.splitlines() if line[0] != " "]
    assert [line.split(":")[0] for line in shown] == ["last", *(f"j{n}" for n in range(30))]
    assert shown[0] == "last: Local Node (after j3, after j9)"


@pytest.mark.parametrize(
    ("command", "code", "state"),
    [("true", 0, "ok"), ("exit 3", 1, "failed")],
    ids=["ok", "failed"],
)
def test_scenario_with_a_record_and_a_timeline(
    command: str, code: int, state: str, home: Path, capfd: Any
) -> None:
    Path("s.yaml").write_text(
        "nodes: [{id: here, localnode: true}]\n"
        f"jobs: [{{id: first, node: here, command: {command!r}}}]\n"
    )
    argv = ["--scenario", "s.yaml", "--record", "r.json", "--timeline", "t"]
    assert apssh.main([*argv, "-n"]) == 0
    assert [path.name for path in home.iterdir() if path.is_file()] == ["s.yaml"]
    assert apssh.main(argv) == code
    [job] = json.loads(Path("r.json").read_text())["jobs"]
    assert (job["label"], job["state"]) == ("first", state)
    assert "first" in Path("t.svg").read_text()


def test_record_of_an_interrupted_scenario(home: Path) -> None:
    token = f"95{os.getpid()}"
    Path("s.yaml").write_text(
        "nodes: [{id: here, localnode: true}]\n"
        f"jobs: [{{id: a, node: here, command: 'touch up; sleep {token}'}}]\n"
    )
    process = start("--scenario", "s.yaml", "--record", "r.json", "--timeline", "t.svg")
    eventually(Path("up").exists)
    process.send_signal(signal.SIGINT)
    assert (*process.communicate(timeout=10), process.returncode) == (
        b"",
        b"1 cancelled\n",
        -signal.SIGINT,
    )
    [job] = json.loads(Path("r.json").read_text())["jobs"]
    assert (job["state"], job["steps"][0]["kind"]) == ("cancelled", "cancelled")
    assert Path("t.svg").exists()


def test_record_that_cannot_be_written_is_told_before_anything_runs(home: Path, capfd: Any) -> None:
    Path("s.yaml").write_text(
        "nodes: [{id: here, localnode: true}]\njobs: [{id: a, node: here, command: touch ran}]\n"
    )
    assert apssh.main(["--scenario", "s.yaml", "--record", "gone/r.json"]) == 1
    out, err = capfd.readouterr()
    assert (out, err[-28:]) == ("", ": no such file or directory\n")
    assert not Path("ran").exists()


@pytest.mark.usefixtures("never_seen")
def test_host_keys_of_a_scenario_are_those_of_the_option(
    home: Path, sshd: Sshd, capfd: Any
) -> None:
    Path("s.yaml").write_text(
        f"nodes: [{{id: n, hostname: 127.0.0.1, port: {sshd.port}, username: {ME}, "
        f"host_keys: 'yes'}}]\n"
        "jobs: [{id: a, node: n, command: echo hi}]\n"
    )
    assert apssh.main(["--scenario", "s.yaml"]) == 1
    assert "hostkey: " in capfd.readouterr().err
    assert apssh.main(["--scenario", "s.yaml", "--host-keys", "no"]) == 0
    assert capfd.readouterr() == ("127.0.0.1:hi\n", "1 ok\n")


def test_options_reach_the_nodes_of_a_scenario(home: Path) -> None:
    Path("s.yaml").write_text(
        "nodes:\n"
        "  - {id: gw, hostname: gw.example.org, username: u, port: 7, config: true}\n"
        "  - {id: n, hostname: n1, gateway: gw, proxy_command: exit 1, host_keys: 'yes'}\n"
        "jobs: [{id: a, node: n, command: echo hi}]\n"
    )
    process = start("--scenario", "s.yaml", "--demo", "2", "-v")
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, b"n1:hi\n")
    assert f"n1: logged in as {ME}\n".encode() in err
    assert f"gw.example.org: logged in as {ME}\n".encode() in err


def test_scenario_is_shown_as_it_would_run(home: Path, capfd: Any) -> None:
    Path("s.yaml").write_text(SCENARIO)
    assert apssh.main(["--scenario", "s.yaml", "-n"]) == 0
    assert capfd.readouterr() == (
        """\
look: slice@gw.example.org->root@node1:2200
    [kernel]
    uname -r
act: Local Node (after look)
    if true
    then  echo {{ver}} {{nope}}; fi
    RunString: echo one... a {{ver}}
    echo one
    echo two
    RunScript: later.sh with lib.sh
    Push: x y z onto d/, recurse
""",
        "",
    )
    assert apssh.main(["--scenario", "s.yaml", "-L"]) == 0
    assert capfd.readouterr() == (
        "slice@gw.example.org\nslice@gw.example.org->root@node1:2200\nLocal Node\n",
        "",
    )


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["-o", "d", "-m", "-u", "1"], "--out-dir"),
        (["-t", "h", "-x", "i"], "--target"),
        (["-l", "me"], "--login"),
        (["ls"], "the command"),
        (["-b"], "--gather"),
        (["-w", "3"], "--window"),
        (["-t", "-"], "--target"),
    ],
)
def test_scenario_takes_no_option_that_it_would_ignore(
    argv: list[str], named: str, home: Path, capfd: Any
) -> None:
    Path("s.yaml").write_text(
        "nodes: [{id: here, localnode: true}]\njobs: [{id: a, node: here, command: echo RAN}]\n"
    )
    assert apssh.main(["--scenario", "s.yaml", *argv]) == 2
    assert capfd.readouterr() == (
        "",
        f"apssh: --scenario brings its own hosts and commands: leave out {named}\n",
    )


def test_interrupted_scenario_tells_what_is_known(home: Path) -> None:
    Path("s.yaml").write_text(
        "nodes: [{id: here, localnode: true}]\njobs:\n  - {id: a, node: here, command: echo done}\n"
        f"  - {{id: b, node: here, required: a, command: sleep 97{os.getpid()}}}\n"
        "  - {id: c, node: here, required: b, command: 'true'}\n"
    )
    process = start("--scenario", "s.yaml")
    eventually(lambda: processes(f"sleep 97{os.getpid()}"))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (
        -signal.SIGINT,
        b"LOCALNODE:done\n",
        b"1 ok, 1 cancelled, 1 never ran\n",
    )
    eventually(lambda: not processes(f"sleep 97{os.getpid()}"))


@pytest.mark.parametrize(
    ("options", "out"),
    [(["-b"], b"-------------\ndemo[1-2] (2)\n-------------\nhi\n"), (["-r"], b"hi\nhi\n")],
)
def test_closed_standard_error_costs_nothing(options: list[str], out: bytes) -> None:
    process = start("--demo", "2", "-v", *options, "echo hi")
    assert process.stdout and process.stderr
    process.stderr.close()
    assert (process.stdout.read(), process.wait(20)) == (out, 0)
    process.stdout.close()


def test_interruption_when_nobody_reads(sshd: Sshd) -> None:
    """A pager, Ctrl-S: the second Ctrl-C leaves at once even so."""
    token = f"84{os.getpid()}"
    process = start("-F", "none", "-t", sshd.target, f"sleep {token} & yes")
    assert process.stdout and process.stderr
    waiting = array.array("i", [0])
    eventually(
        lambda: fcntl.ioctl(process.stdout, termios.FIONREAD, waiting) == 0 and waiting[0] >= 60_000
    )
    eventually(lambda: processes(f"sleep {token}"))
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)  # two that come at once are one
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == -signal.SIGINT
    process.stdout.close()
    process.stderr.close()
    eventually(lambda: not processes(f"sleep {token}"))


def test_folder_told_to_a_closed_pipe_costs_no_summary(home: Path) -> None:
    process = start("--demo", "2", "-o", "out", "sleep 0.3; echo x")
    assert process.stdout and process.stderr
    process.stdout.close()
    assert (process.wait(20), process.stderr.read()) == (1, b"2 ok\n")
    process.stderr.close()


@pytest.mark.parametrize("options", [["-b"], ["-b", "--diff"], ["-o", "out"]], ids=" ".join)
def test_output_that_cannot_be_shown_costs_no_summary(options: list[str], sshd: Sshd) -> None:
    """A full disk behind standard output, at the end: the groups of this run are there too."""
    dead = f"{ME}@127.0.0.1:{free_port()}"
    with open("/dev/full", "wb") as full:
        done = run_python(
            *main_of("apssh"),
            *("-F", "none", "-t", f"{sshd.target},{dead}", *options, "echo x"),
            capture_output=False,
            stdout=full,
            stderr=subprocess.PIPE,
        )
    port = dead.rpartition(":")[2]
    assert (done.returncode, messages(done)) == (
        1,
        [
            f"127.0.0.1:{port}: refused: nothing listens on port {port}",
            "1 ok, 1 not reached",
            f"  refused: 127.0.0.1:{port} (1)",
            "apssh: no space left on device",
        ],
    )
    assert Path(".apssh/last-ok").read_text() == f"{sshd.target}  # ok\n"
    assert Path(".apssh/last-unreached").read_text() == f"{dead}  # refused\n"


def test_interruption_tells_the_folder(home: Path) -> None:
    code, out, _, _ = interrupted(
        ["--demo", "2", "-w", "1", "-o", os.fsdecode(b"o\xff"), "echo up; sleep 30"],
        signal.SIGINT,
        lambda: list(home.glob("o*/demo1")),
    )
    assert (code, out) == (-signal.SIGINT, b"o\xff\n")


def test_scenario_into_a_closed_pipe_ends_quietly(home: Path) -> None:
    Path("s.yaml").write_text(
        "nodes: [{id: here, localnode: true}]\njobs: [{id: a, node: here, command: seq 100000}]\n"
    )
    process = start("--scenario", "s.yaml")
    assert process.stdout and process.stderr
    process.stdout.close()
    assert (process.wait(20), process.stderr.read()) == (1, b"")
    process.stderr.close()


TORN_DOWN = """\
nodes: [{id: here, localnode: true}]
jobs:
  - {id: a, node: here, command: exit %d}
  - {id: b, node: here, required: a, command: echo b}
  - {id: down, node: here, teardown: true, command: echo down; exit %d}
"""


@pytest.mark.parametrize(
    ("statuses", "out", "err", "code"),
    [
        ((0, 0), ["b", "down"], ["3 ok"], 0),
        (
            (4, 0),
            ["down"],
            ["a: LOCALNODE: status: ended with status 4: exit 4", "1 failed, 1 never ran, 1 ok"],
            1,
        ),
        (
            (0, 5),
            ["b", "down"],
            ["down: LOCALNODE: status: ended with status 5: echo down; exit 5", "2 ok, 1 failed"],
            1,
        ),
    ],
    ids=["well", "failed", "fails itself"],
)
def test_scenario_with_a_teardown(
    statuses: tuple[int, int], out: list[str], err: list[str], code: int, home: Path
) -> None:
    """Jobs with ``teardown: true`` run at the end, however it comes; in Python they are given to
    experiment.
    """
    Path("s.yaml").write_text(TORN_DOWN % statuses)
    done = cli("--scenario", "s.yaml")
    assert done.stdout.decode().splitlines() == [f"LOCALNODE:{word}" for word in out]
    assert (messages(done), done.returncode) == (err, code)
    loader = YamlLoader("s.yaml")
    _, jobs, scheduler = loader.load_with_maps()
    assert loader.teardown == [jobs["down"]] and jobs["down"] not in scheduler.jobs


EXAMPLES = MODULE.parent / "examples"


def example_run(*argv: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return run_python(*argv, cwd=cwd, text=True)


LOSSES = """\
1 Mbit/s: 1 % lost
6 Mbit/s: 6 % lost
24 Mbit/s: 8 % lost
54 Mbit/s: 34 % lost
"""
TWO_NODES = str(EXAMPLES / "two_nodes.py")


def losses(folder: str = "out") -> str:
    """What the example has brought here, by rate."""
    files = sorted(Path(folder).glob("rate-*"), key=lambda path: int(path.name[5:]))
    return "".join(path.read_text() for path in files)


def yaml_example(*argv: str) -> subprocess.CompletedProcess[str]:
    """The YAML form, which finds the radio beside itself; it leaves what it brings in ``out``."""
    Path("out").mkdir(exist_ok=True)
    out = f"out={Path('out').absolute()}"
    scenario = [str(MODULE), "--scenario", "two_nodes.yaml.j2", "--set", out]
    return example_run(*scenario, *argv, cwd=EXAMPLES)


def radios(doing: str, where: str) -> list[str]:
    """The radios at work; not the shells that are told to start them."""
    begin = rf"\S*python\S* \S*radio\.py {doing} "
    return [line for line in processes("") if re.match(begin, line) and where in line]


def test_example_of_two_nodes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python and YAML measure the same; a run that fails stops its service, and resumes."""
    demo = [TWO_NODES, "--demo", "--out", "out"]
    told = "no systemd on the demo fleet: the shell stands in for it\n"
    monkeypatch.setenv("TMPDIR", str(home))  # of the demo's homes, hence in the radio's words
    failed = example_run(*demo, "--rates", "1", "0", "24")
    assert failed.returncode == 1
    last = "two_nodes: demo3: status: ended with status 1: RunScript: radio.py send 127.0.0.1 PORT"
    assert re.sub(r"127.0.0.1 \d+", "127.0.0.1 PORT", failed.stderr) == (
        f"{told}demo3:radio: nothing can be sent at 0 Mbit/s\n{last} 0 > rate-0\n"
    )
    assert losses() == "1 Mbit/s: 1 % lost\n" and not radios("receive", str(home))
    jobs = {job["label"]: job["state"] for job in saved("out/run.json")["jobs"]}
    assert (jobs["1 Mbit/s"], jobs["0 Mbit/s"], jobs["24 Mbit/s"]) == ("ok", "failed", "idle")

    done = example_run(*demo)
    assert (done.returncode, done.stderr) == (0, told)
    report = "".join(f"LOCALNODE:{line}\n" for line in LOSSES.splitlines())
    assert done.stdout == f"rate-1: done before\ndemo1:the gateway is there: Linux\n{report}"
    assert losses() == LOSSES and not radios("receive", str(home))
    record = saved("out/run.json")
    assert {job["state"] for job in record["jobs"]} == {"ok"}
    assert [node["gateway"] for node in record["nodes"]].count(None) == 2
    assert Path("out/run.svg").read_text().count('class="bar ok"') > 10
    assert "demo1" in Path("out/topology.dot").read_text()

    shutil.rmtree("out")
    yaml = yaml_example("--demo", "3", "--set", "systemd=no")
    assert (yaml.returncode, yaml.stderr, losses()) == (0, "9 ok\n", LOSSES)
    assert yaml.stdout == f"gw   :the gateway is there: Linux\n{report}"


def test_example_that_is_interrupted(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while it measures: the service is stopped, the record written."""
    monkeypatch.setenv("TMPDIR", str(home))
    words = ("--demo", "--out", "out", "--rates", "1", "0.01")
    process = start_python(TWO_NODES, *words, stdout=None)
    eventually(lambda: radios("send", "127.0.0.1") and losses())
    assert radios("receive", str(home))
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == (
        b"no systemd on the demo fleet: the shell stands in for it\n"
    )
    assert process.returncode == 130
    assert losses() == "1 Mbit/s: 1 % lost\n" and not radios("receive", str(home))
    jobs = {job["label"]: job["state"] for job in saved("out/run.json")["jobs"]}
    assert (jobs["1 Mbit/s"], jobs["0.01 Mbit/s"]) == ("ok", "cancelled")


@on_testbed
@pytest.mark.parametrize("form", ["python", "yaml"])
def test_example_on_real_hosts(form: str, home: Path) -> None:
    """The two forms, with a unit of systemd: what they bring is what the demo fleet gives."""
    shutil.copy2(os.environ["TESTBED_KEY"], home / ".ssh" / "id_ed25519")
    gateway, receiver, sender = TESTBED[:3]

    def measure(*rates: str) -> subprocess.CompletedProcess[str]:
        if form == "python":
            more = ["--rates", *rates] if rates else []
            return example_run(TWO_NODES, gateway, receiver, sender, "--out", "out", *more)
        hosts = {"gateway": gateway, "receiver": receiver, "sender": sender}
        if rates:
            hosts["rates"] = " ".join(rates)
        return yaml_example(
            *itertools.chain.from_iterable(("--set", f"{key}={hosts[key]}") for key in hosts)
        )

    def units() -> str:
        show = Run("systemctl is-active apssh-radio; true", capture=Capture("state", found))
        assert Scheduler(SshJob(box(TESTBED.index(receiver)), command=show)).run()
        return str(found.state)

    found = Variables()
    failed = measure("1", "0", "24")
    assert failed.returncode == 1 and "radio: nothing can be sent at 0 Mbit/s" in failed.stderr
    assert losses() == "1 Mbit/s: 1 % lost\n" and units() == "inactive"
    done = measure()
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("".join(f"LOCALNODE:{line}\n" for line in LOSSES.splitlines()))
    assert losses() == LOSSES and units() == "inactive"


def test_example_of_a_scenario_before_it_runs(home: Path) -> None:
    shown = yaml_example("-n")
    assert shown.returncode == 0
    assert "6 Mbit/s: root@gw->root@node2 (after 1 Mbit/s)\n" in shown.stdout
    assert shown.stdout.splitlines()[-3:] == [
        "stop: root@gw->root@node1 (teardown)",
        "    [Service apssh-radio: stop]",
        "    systemctl stop apssh-radio.service",
    ]
    few = yaml_example("--demo", "2")
    assert (few.returncode, few.stderr) == (2, "apssh: --demo 2: the scenario has more hosts\n")


def test_example_of_a_sweep(home: Path) -> None:
    sweep = [str(EXAMPLES / "sweep.py"), "--demo"]
    first = example_run(*sweep, "--fail", "24-2")
    assert (
        first.returncode == 1
        and first.stdout.splitlines()[3] == "24-2: failed {'demo1': '48', 'demo2': '48'}"
    )
    again = example_run(*sweep)
    assert again.returncode == 0
    assert [line for line in again.stdout.splitlines() if "done before" not in line] == [
        "24-2: ok {'demo1': '48', 'demo2': '48'}"
    ]


SHARDS = str(EXAMPLES / "shards.py")
# the first run of it waits for a word, and each says who it is
GATED = (
    "set -- $SSH_CONNECTION; if [ ! -e go ]; then touch at-$3; "
    "while [ ! -e go ]; do sleep 0.1; done; fi; echo by $3 >> runs; echo here $3"
)


def addresses(first: int, last: int) -> list[str]:
    return [f"127.0.0.{number}" for number in range(first, last + 1)]


def children(pid: int) -> dict[int, str]:
    """The processes that this one started, and their command lines."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == pid:
                found[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
    return found


linux_loopback = pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere not all of 127/8 is loopback"
)


@linux_loopback
@pytest.mark.parametrize("engine", ["processes", pytest.param("dask", marks=pytest.mark.slow)])
def test_shards_whose_worker_is_killed(engine: str, make_sshd: Callable[..., Sshd]) -> None:
    """A shard in the middle of its work runs again elsewhere: each host has its result once."""
    if engine == "dask":
        pytest.importorskip("distributed")
    sshd = make_sshd(ListenAddress="0.0.0.0", Port=(port := free_port()))
    hosts = addresses(2, 9)
    process = start_python(
        *(SHARDS, "--engine", engine, "--shards", "2", "-l", ME),
        *("-t", f"127.0.0.[2-9]:{port}", GATED),
        text=True,
    )
    try:
        eventually(lambda: len(list(sshd.home.glob("at-*"))) == len(hosts), 120)
        workers = [
            pid for pid, line in children(process.pid).items() if "multiprocessing.spawn" in line
        ]
        assert len(workers) >= 2
        os.kill(workers[0], signal.SIGKILL)
        # what was killed leaves its commands to the guard, which ends them
        (sshd.home / "go").touch()
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, err
    assert out.splitlines() == [f"{ME}@{host}:{port}: ok: here {host}" for host in hosts]
    assert ("died" in err) is (engine == "processes")
    assert set((sshd.home / "runs").read_text().splitlines()) == {f"by {host}" for host in hosts}


@linux_loopback
def test_shards_that_are_interrupted(make_sshd: Callable[..., Sshd]) -> None:
    """Ctrl-C goes to all of the workers: each ends its commands, and nothing runs again."""
    port = free_port()
    sshd = make_sshd(ListenAddress="0.0.0.0", Port=port)
    token = f"91{os.getpid()}"
    process = start_python(
        *(SHARDS, "--shards", "2", "-l", ME),
        *("-t", f"127.0.0.[2-3]:{port}", f"echo x >> runs; exec sleep {token}"),
        text=True,
        start_new_session=True,
    )

    try:
        eventually(lambda: len(processes(f"sleep {token}")) == 2, 60)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out, err) == (130, "", "")
    assert not processes(f"sleep {token}") and (sshd.home / "runs").read_text() == "x\n" * 2


@pytest.mark.parametrize(
    "engine", ["by_processes", pytest.param("by_dask", marks=pytest.mark.slow)]
)
def test_shards_whose_workers_go_on_dying(
    engine: str, sshd: Sshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their hosts are named; the others have their results."""
    if engine == "by_dask":
        pytest.importorskip("distributed")
    Path("deadly.py").write_text(
        f"""import os, signal, apssh, shards
def run(targets, command):
    if "x@h2" in targets:
        os.kill(os.getpid(), signal.SIGKILL)
    return apssh.run(targets, command)
if __name__ == "__main__":
    apssh.run = run
    targets = [{sshd.target!r}, "x@h2"]
    results, lost = shards.run_shards(targets, "true", parts=2, engine=shards.{engine})
    print([result.target for result in results], lost)
"""
    )
    monkeypatch.setenv("PYTHONPATH", f"{MODULE.parent}{os.pathsep}{EXAMPLES}")
    done = example_run("deadly.py")
    assert done.stdout == f"{[sshd.target]} ['x@h2']\n", done.stderr


def test_picture_of_the_readme(tmp_path: Path) -> None:
    """The picture shows what the script draws: the same lines, in any order."""

    def lines(path: Path) -> list[str]:
        texts = ElementTree.parse(path).getroot().findall("{http://www.w3.org/2000/svg}text")
        return sorted("".join(text.itertext()) for text in texts)

    new = tmp_path / "new.svg"
    run_python(EXAMPLES / "terminal.py", "--out", new, capture_output=False, check=True)
    shown = lines(EXAMPLES / "terminal.svg")
    assert "demo[1-4,6-9] (8)" in shown and "20 ok" in shown
    assert lines(new) == shown
    colours = {each.get("fill") for each in ElementTree.parse(new).iter()}
    assert len(colours) >= 6  # paper, and text in plain, green, cyan and red


README = MODULE.parent / "README.md"


def test_slurm_array_of_the_readme(sshd: Sshd) -> None:
    """Each task leaves a part that is whole, hosts that failed included, or none."""
    [script] = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", README.read_text(), re.DOTALL)
    assert "/64 -t hosts" in script
    Path("hosts").write_text(f"{sshd.target} 127.0.0.1:{free_port()}\n{sshd.target}\n")
    program = Path("bin/apssh")
    program.parent.mkdir()

    def task(number: int, *words: str) -> int:
        program.write_text(shlex.join([*words, "$@"]).replace("'$@'", '"$@"') + "\n")
        program.chmod(0o755)
        path = f"{program.parent.resolve()}:{os.environ['PATH']}"
        env = os.environ | {"PATH": path, "SLURM_ARRAY_TASK_ID": str(number)}
        done = subprocess.run(["bash", "-c", script.replace("64", "2")], env=env, timeout=60)
        return done.returncode

    works = [*PYTHON, *main_of(), "-F", "none"]
    assert task(1, *works) == 0 and task(2, *works) == 0
    parts = [Path(f"part-{number}.json").read_text().splitlines() for number in (1, 2)]
    assert [[json.loads(line)["kind"] for line in part] for part in parts] == [[None], ["refused"]]
    assert not list(Path().glob("*.tmp"))
    for path in Path().glob("part-*"):
        path.unlink()
    # what ends the program, whole parts apart: its own misuse, a signal
    assert task(1, *works, "--no-such-option") == 1
    assert task(1, "sh", "-c", "kill -9 $$", "--") == 1
    assert [path.name for path in Path().glob("part-*")] == ["part-1.tmp"]


def test_readme_is_short() -> None:
    text = README.read_text()
    assert len(text.split()) <= 3000
    assert [line for line in text.splitlines() if len(line) > 120] == []
    assert text.count("pip install -q '.[test]'") == 1  # the line that .ci/run looks for
    links = re.findall(r"\]\((?!http)([^)]+)\)|`((?:examples|bench)/[\w./]+)`", text)
    assert len(links) >= 2
    for link in links:
        assert (MODULE.parent / "".join(link)).exists(), link


def readme_section(heading: str) -> str:
    """What stands below a heading, up to the next one of any level."""
    return re.split(rf"^##+ {re.escape(heading)}\n", README.read_text(), flags=re.MULTILINE)[
        1
    ].split("\n##")[0]


def readme_rows(heading: str) -> list[list[str]]:
    """The cells of the tables below a heading, without the heads."""
    rows = []
    for line in readme_section(heading).splitlines():
        if " |" in line:
            rows.append([cell.strip() for cell in line.split(" | ")])
    return [row for row, before in zip(rows[2:], rows[1:], strict=False) if "---" not in row[0]]


def readme_blocks(language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    return [text for name, text in blocks if name == language]


# Hosts that the README names: those of a demo, in a process of its own, where programs that a test
# cannot have (systemctl, sudo) are answered by a few lines of shell. Standard input keeps it alive.
README_HOSTS = ("gw", "web1", "web2", "web3", "web4", "db1", "new1")
README_FLEET = """
import asyncio, os, sys, asyncssh, apssh
folder, *names = sys.argv[1:]
asyncssh.SSHServer.password_auth_supported = lambda self: True
asyncssh.SSHServer.validate_password = lambda self, user, password: password == "secret"

async def main():
    async with apssh.demo_fleet(len(names), formatter=apssh.RawFormatter()) as nodes:
        nodes[0].keys[0].write_private_key(f"{folder}/key")
        os.chmod(f"{folder}/key", 0o600)
        with open(f"{folder}/config", "w") as config:
            for name, node in zip(names, nodes):
                key = f" IdentityFile {folder}/key\\n StrictHostKeyChecking no\\n"
                if name == "new1":
                    key = f" UserKnownHostsFile {folder}/known_hosts\\n"
                at = f" HostName 127.0.0.1\\n Port {node.port}\\n"
                config.write(f"Host {name} {name}.example.org\\n{at}{key}")
                assert await node.run(
                    f"echo {name} > .name; mkdir -p etc/nginx var/log/nginx; "
                    "echo listen=80 > etc/app.conf; "
                    "echo a line | tee var/log/nginx/access.log > var/log/nginx/error.log; "
                    f"[ {name} != web4 ] || echo listen=8080 > etc/app.conf"
                ) == 0
            config.write("Host *\\n UserKnownHostsFile /dev/null\\n")
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""
README_PROGRAMS = {
    "hostname": 'cat "$HOME/.name"',
    "uname": "case $(hostname) in web3) echo 6.1.0-13-amd64;; *) echo 6.1.0-18-amd64;; esac",
    "id": 'echo "${BECOME:-admin}"',
    "sudo": 'while [ "$1" != -- ]; do [ "$1" = -u ] && BECOME=$2; shift; done; shift\n'
    'export BECOME; exec "$@"',
    "systemctl": 'case "$1 $2 $(hostname)" in\n'
    '"is-active nginx web3") echo inactive; exit 3;;\n'
    "is-active*) echo active;;\n"
    '"restart app web2") echo "Job for app.service failed." >&2; exit 1;;\n'
    "esac",
    "nodeset": "echo n1 n2",
    "ansible": r'printf "  hosts (1):\n    db1\n"',
}


def shell_programs(folder: Path, programs: Mapping[str, str]) -> str:
    """These programs in a folder; a PATH that begins with it."""
    folder.mkdir()
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.fixture(scope="session")
def readme_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The README's hosts; the folder of the ssh config that leads there, and of its key."""
    folder = tmp_path_factory.mktemp("readme")
    path = shell_programs(folder / "over-there", README_PROGRAMS)
    fleet = start_python(
        *("-c", README_FLEET, folder, *README_HOSTS),
        cwd=MODULE.parent,
        env=os.environ | {"PATH": path, "SHELL": "/bin/sh"},
        stdin=subprocess.PIPE,
        stderr=None,
    )
    assert fleet.stdin and fleet.stdout
    assert fleet.stdout.readline() == b"ready\n"
    yield folder
    fleet.stdin.close()
    fleet.stdout.close()
    assert fleet.wait(30) == 0


@pytest.fixture
def readme_hosts(
    readme_fleet: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The programs on PATH as a person has them, who can reach these hosts; and that person's
    files.
    """
    programs = {name: README_PROGRAMS[name] for name in ("nodeset", "ansible")}
    for name in MAINS:
        (tmp_path / f"{name}.py").symlink_to(MODULE)
        config = f"-F {readme_fleet}/config"
        programs[name] = f'exec {sys.executable} {tmp_path}/{name}.py {config} "$@"'
    monkeypatch.setenv("PATH", shell_programs(tmp_path / "here", programs))
    shutil.copy(readme_fleet / "key", home / ".ssh" / "cron")
    (home / "nginx.conf").write_text("worker_processes 2;\n")
    (home / "pssh-hosts").write_text("10.0.0.1 root\n10.0.0.2\n")
    (home / "lib.sh").write_text('say() { echo "check: $1, $2"; }\n')
    (home / "check.sh").write_text('. "$(dirname "$0")/lib.sh"\nsay "$@"\n')
    (home / ".apssh").mkdir()
    (home / ".apssh" / "web").write_text("web[1-3]   # front\n@db\n")
    (home / ".apssh" / "db").write_text("root@db1\n")


def in_terminal(command: str, answer: bytes) -> str:
    """What a command says on a terminal that answers its first question."""
    pid, fd = pty.fork()
    if pid == 0:
        os.execv("/bin/bash", ["bash", "-c", command])
    seen = b""
    with contextlib.suppress(OSError):
        while data := os.read(fd, 65536):
            seen += data
            if answer and seen.endswith(b": "):
                os.write(fd, answer)
                answer = b""
    os.close(fd)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return seen.decode().replace("\r\n", "\n")


SESSIONS = [
    heading
    for heading in re.findall(r"^##+ (.*)$", README.read_text(), re.MULTILINE)
    if "\n```console\n" in readme_section(heading)
]


@pytest.mark.parametrize("heading", SESSIONS)
@pytest.mark.usefixtures("readme_hosts")
def test_sessions_of_the_readme(heading: str) -> None:
    """Each command says what is shown, in any order: hosts finish as they like."""
    section = readme_section(heading)
    if "jq" in section and not shutil.which("jq"):
        pytest.skip("needs jq")
    (session,) = re.findall(r"^```console\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    shown = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", session, re.MULTILINE)
    assert shown
    for command, output in shown:
        # the folders of a host's system are here those of its home
        here = re.sub(r"(?<=[ :])/(etc|var)/", r"\1/", command)
        if " -A " in here:
            said = in_terminal(here, b"secret\n")
        else:
            said = subprocess.run(
                ["/bin/bash", "-c", f"({here}) 2>&1"],
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
            ).stdout
        assert sorted(said.splitlines()) == sorted(output.splitlines()), command


def test_readme_has_its_sessions() -> None:
    assert len(SESSIONS) >= 14 and "First login" in SESSIONS and "A tour" in SESSIONS


def test_options_of_the_readme() -> None:
    """One a row, in the groups and the order of --help."""
    expected: dict[str, list[str]] = {}
    for build in (apssh.build_parser, apssh.build_push_parser, apssh.build_pull_parser):
        for title, group in build().groups.items():
            names = expected.setdefault(title, [])
            for action in group._group_actions:
                text = ", ".join(f"`{name}`" for name in action.option_strings)
                if text not in names:
                    names.append(text)
    documented: dict[str, list[str]] = {}
    for name, *_ in readme_rows("Options"):
        if name.startswith("**"):
            names = documented.setdefault(name.strip("*| "), [])
        else:
            names.append(name.removesuffix(" |"))
    assert documented == expected
    assert list(documented) == list(expected)


@pytest.mark.parametrize("row", readme_rows("Targets"), ids=lambda row: row[0][:12].strip("`"))
def test_targets_of_the_readme(row: list[str], home: Path, program: Program) -> None:
    for name in ("hosts.txt", ".apssh/web", "out/1failed/box"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("box\n")
    for target in re.findall("`([^`]+)`", row[0]):
        if target != "-":
            code, out, _ = program("-F", "none", "-t", target, "-L")
            assert (code, bool(out)) == (0, True), target


def test_kinds_of_the_readme() -> None:
    documented = {
        kind
        for row in readme_rows("What a failure means")
        for kind in re.findall("`([^`]+)`", row[0])
    }
    text = " ".join(str(ApsshError.__doc__).split())
    listed = re.search(r"``kind``: (.*?);", text)
    assert listed
    kinds = re.sub(r"\(.*?\)| or ", ",", listed[1])
    assert documented == {*filter(None, re.split(r"[, ]+", kinds)), "not started"}


def test_limits_of_the_readme() -> None:
    numbers = {
        "targets of a run": [apssh.MAX_TARGETS],
        "key exchanges at once": [apssh.HANDSHAKES],
        "logins at once on one endpoint": [apssh.STARTUPS_PER_HOST],
        "TCP connects at once": [apssh.CONNECTS],
        "name look-ups at once": [apssh.LOOKUPS],
        "sessions on one node at once": [
            apssh.CONNECTIONS_PER_NODE,
            apssh.SESSIONS_PER_CONNECTION,
        ],
        "open files": [],
        "time to be logged in": [apssh.CONNECT_TIMEOUT],
        "silence of a connection": [apssh.KEEPALIVE_COUNT, apssh.KEEPALIVE_INTERVAL],
        "held output of a command": [apssh.CAPTURE_LIMIT / 2**20],
        "a line of output": [apssh.LINE_LIMIT / 2**20],
    }
    documented = {
        row[0]: [float(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", row[1])]
        for row in readme_rows("Limits")
    }
    assert documented == numbers


def constructor_keys(*calls: Callable[..., Any]) -> set[str]:
    keys = {name for call in calls for name in inspect.signature(call).parameters}
    return keys - {"self", "command_line_keys", "scheduler", "command"}


def test_keys_of_the_readme(tmp_path: Path) -> None:
    """The loader knows each key of the table, and the table each key of a constructor."""
    rows = {
        row[0].strip("`"): re.findall("`([a-z0-9_]+)[`:]", row[1])
        for row in readme_rows("YAML scenarios")
    }
    shell, copies, step = rows["these three"], rows["these two"], rows["any step"]
    start = rows["Service"][:1] + rows["Service"][5:]
    service = [*start, *rows["its rest"], *shell, "ignore_outputs"]
    steps = {
        "Run": [*rows["Run"], *shell],
        "RunScript": [*rows["RunScript"], *shell],
        "RunString": [*rows["RunString"], *shell],
        "Push": [*rows["Push"], *copies],
        "Pull": [*rows["Pull"], *copies],
        "Wait": rows["Wait"],
        "Service": [name for name in service if name not in ("output", "since", "argv")],
    }
    assert set(steps) == {name for name in rows if name.istitle() or name.startswith("Run")}
    nodes = rows["a node"] + rows["its login"] + rows["its way"]

    def unknown(text: str) -> bool:
        (tmp_path / "x.yaml").write_text(text)
        try:
            YamlLoader(tmp_path / "x.yaml").load()
        except ScenarioError as exc:
            return "unknown key" in str(exc)
        return False

    job = "jobs:\n- id: j\n  node: n\n  commands:\n  - type: "
    node = "nodes:\n- id: n\n  hostname: h\n"
    assert unknown(node + job + "Run\n    x: y\n") and unknown(node + "  x: y\n" + job + "Run\n")
    for name, keys in steps.items():
        for key in {*keys, *step} - {"type", "allowed_exits" if name == "Service" else ""}:
            more = "" if name != "Service" or key == "action" else "    action: start\n"
            assert not unknown(f"{node}{job}{name}\n{more}    {key}: y\n"), (name, key)
    for key in {*nodes} - {"id", "hostname"}:
        assert not unknown(f"{node}  {key}: y\n{job}Run\n"), key
    for key in {*rows["a job"]} - {"id", "node", "commands"}:
        assert not unknown(f"{node}jobs:\n- id: j\n  node: n\n  commands: []\n  {key}: y\n"), key
    assert {*nodes, "id"} == constructor_keys(SshNode) | {"id"}
    of_file = {"id", "command", "required", "teardown"}
    assert {*rows["a job"], *rows["its end"]} == constructor_keys(SshJob) | of_file
    for cls in (Run, RunScript, RunString, Push, Pull, Wait):
        documented = {*steps[cls.__name__], *step} - {"command", "type"}
        assert documented >= constructor_keys(cls), cls


def test_scenario_of_the_readme(home: Path, tmp_path: Path) -> None:
    (text,) = readme_blocks("yaml")
    (home / "file.yaml").write_text(text)
    line = re.search("^`(apssh --scenario .*?)`", readme_section("YAML scenarios"), re.MULTILINE)
    assert line
    done = run_python(
        *(MODULE, *shlex.split(line[1])[1:], "--demo", "2", "-q"),
        text=True,
        env=os.environ | {"PATH": experiment_path(tmp_path), "SHELL": "/bin/sh"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (home / "result.txt").read_text() == "measured 192.0.2.7\n"
    units = (tmp_path / "units").read_text().split()
    assert "started" in units and "stop" in units[units.index("started") :]
    assert json.loads((home / "run.json").read_text()) and (home / "run.svg").exists()


def experiment_path(folder: Path) -> str:
    """Programs of the experiment that the README shows."""
    return shell_programs(
        folder / "experiment",
        {
            "hostname": "echo 192.0.2.7",
            "iperf3": 'echo "measured $2"',
            "systemd-run": f"echo started >> {folder}/units",
            "systemctl": f'echo "$1" >> {folder}/units; [ "$1" != is-active ]',
        },
    )


@pytest.mark.parametrize("number", range(4))
def test_quick_scripts_of_the_readme(
    number: int, sshd: Sshd, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """Each at most eight lines; whatever host they name is the test's server."""
    script = [block for block in readme_blocks("python") if "Scheduler" not in block][number]
    assert len(script.splitlines()) <= 8
    loops = asyncio.BaseEventLoop
    original = loops.create_connection

    async def here(self: Any, factory: Any, host: Any = None, port: Any = None, **how: Any) -> Any:
        if host:
            host, port = "127.0.0.1", sshd.port
        return await original(self, factory, host, port, **how)

    monkeypatch.setattr(loops, "create_connection", here)
    monkeypatch.setenv("APSSH_HOST_KEYS", "no")
    (home / "hosts.txt").write_text("node1 node2\n")
    (home / "hosts").write_text("127.0.0.1 me\n")
    (home / "resolv.conf").write_text("")
    (sshd.home / "etc").mkdir()
    (sshd.home / "log").mkdir()
    (sshd.home / "log/syslog").write_text("a line\n")
    script = script.replace('login="root"', f"login={ME!r}")
    names: dict[str, Any] = {}
    code = compile(script, "README.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    waits = eval(code, names)
    if waits:
        run(waits)
    release = os.uname().release
    if number == 0:
        assert sorted(capfd.readouterr().out.splitlines()) == [
            f"node{each} {release}" for each in (1, 2, 3)
        ]
    elif number == 1:
        assert names["broken"] == ["node1", "node2"]
    elif number == 2:
        assert (home / "logs-node3").read_text() == "a line\n"
        assert (sshd.home / "etc" / "hosts").read_text() == "127.0.0.1 me\n"
    else:
        assert [each.stdout for each in names["results"]] == [f"{release}\n"] * 3


NOTEBOOK = [
    """import asyncio
import apssh
from asynciojobs import Scheduler
from apssh import SshJob
results = await apssh.co_run(TARGET, "echo quick")
results[0].stdout""",
    """try:
    apssh.run(TARGET, "true")
except apssh.UsageError as exc:
    print(exc)""",
    """user, _, host = TARGET.partition("@")
node = apssh.SshNode(host.split(":")[0], port=int(host.split(":")[1]), username=user)
scheduler = Scheduler(SshJob(node, command="echo job; echo problem >&2"))
async with apssh.experiment(scheduler):
    await scheduler.co_run()""",
    """async with apssh.demo_fleet(2) as nodes:
    print([await node.run("echo cell") for node in nodes])""",
    """node.is_connected(), len(asyncio.all_tasks()) - len(tasks)""",
]


@pytest.mark.slow
def test_notebook(sshd: Sshd, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cells of a notebook, and the README's lines for one, in a real kernel."""
    pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    cells = [
        block.replace("node[1-3]", sshd.target)
        for block in readme_blocks("python")
        if re.search("^(results = )?await ", block, re.MULTILINE)
    ]
    setup = f"import asyncio; TARGET = {sshd.target!r}; tasks = asyncio.all_tasks()"
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(text) for text in (setup, *NOTEBOOK, *cells)]
    )
    script = """if True:
        import nbclient, nbformat, sys
        notebook = nbformat.read("in.ipynb", as_version=4)
        nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
        nbformat.write(notebook, "out.ipynb")
    """
    nbformat.write(notebook, "in.ipynb")
    # a process of its own: the kernel's ports are not the rig's
    run_python("-c", script, capture_output=False, check=True, timeout=120)
    outputs = [
        "".join(
            output.get("text") or output["data"]["text/plain"]
            for output in sorted(cell.outputs, key=lambda output: output.get("name", ""))
        ).strip()
        for cell in nbformat.read("out.ipynb", as_version=4).cells
    ]
    assert outputs[1:6] == [
        r"'quick\n'",
        "apssh.run in a running loop: await apssh.co_run(...) there",
        "127.0.0.1:problem\n127.0.0.1:job",
        "demo1:cell\ndemo2:cell\n[0, 0]",
        "(False, 0)",
    ]


def test_result_of_the_readme() -> None:
    sentence = readme_section("Python").split("A Result has ")[1].split("`help(")[0]
    documented = set(re.findall("`([a-z_]+)`", sentence)) - {"ok"}
    public = {name for name in dir(apssh.Result) if not name.startswith("_")}
    fields = {field.name for field in dataclasses.fields(apssh.Result)}
    assert documented == (public | fields) - {"ok"}


def test_names_of_the_readme() -> None:
    """Steps and formatters that it names are there, and take what it shows."""
    text = readme_section("An experiment")
    names = set(re.findall(r"`(?:\w+\.)?([A-Z][A-Za-z]+|topology_as_\w+)\(", text))
    assert len(names) > 12
    assert names <= set(apssh.__all__)


def test_experiment_of_the_readme(home: Path, tmp_path: Path) -> None:
    (script,) = (block for block in readme_blocks("python") if "Scheduler" in block)
    environment = os.environ | {"PATH": experiment_path(tmp_path), "SHELL": "/bin/sh"}
    done = run_python("-c", script, env=environment, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (home / "result.txt").read_text() == "measured 192.0.2.7\n"
    units = (tmp_path / "units").read_text().split()
    assert "started" in units and "stop" in units[units.index("started") :]
    jobs = json.loads((home / "run.json").read_text())["jobs"]
    assert [job["state"] for job in jobs] == ["ok"] * 3
    assert ElementTree.parse(home / "run.svg")


def test_changelog_begins_with_this_version() -> None:
    text = (MODULE.parent / "CHANGELOG.md").read_text()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE)[0].split()[0] == apssh.__version__


def test_contributing_names_what_is_there() -> None:
    """The rooms are those of the module, in its order; the names of its recipes exist."""
    text = (MODULE.parent / ".github" / "CONTRIBUTING.md").read_text()
    source = MODULE.read_text()
    rooms = re.findall(r"^\| ([a-z][a-z-]+) \| ", text.split("## The rooms")[1], re.MULTILINE)
    banners = re.findall(r"^# -{90,}\n# ([a-z-]+): .*\n# -{90,}$", source, re.MULTILINE)
    assert rooms == ["room", "head", *banners]
    names = set(re.findall(r"`(_[A-Za-z_]+|co_[a-z]+|build_[a-z]+)\b", text))
    assert len(names) > 25
    assert [name for name in names if not re.search(rf"\b{name}\b", source)] == []


@pytest.mark.parametrize("width", [80, 132])
def test_help_is_wrapped(width: int, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for main in (apssh.main, apssh.main_push, apssh.main_pull):
        assert main(["--help"]) == 0
        out = capfd.readouterr().out
        assert "examples:" in out and max(map(len, out.splitlines())) <= width


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere not all of 127/8 is loopback")
def test_thousands_of_hosts() -> None:
    """bench/scale.py, smaller: bars on CPU and memory a host, silent hosts, the window, one
    gateway, Ctrl-C.
    """
    done = run_python(
        *(MODULE.parent / "bench" / "scale.py", "--hosts", "2000"),
        text=True,
        timeout=None,
        env={name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")},
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("program", ["apssh", "appush", "appull"])
def test_man_page(program: str) -> None:
    """One that argparse-manpage makes holds every option, in the groups of --help."""
    tool = Path(sys.executable).with_name("argparse-manpage")
    if not tool.exists():
        pytest.skip("no argparse-manpage is installed here")
    parsers = {
        "apssh": apssh.build_parser,
        "appush": apssh.build_push_parser,
        "appull": apssh.build_pull_parser,
    }
    function = parsers[program]
    made = subprocess.run(
        [tool, "--pyfile", MODULE, "--function", function.__name__, "--project-name", "apssh"],
        capture_output=True,
        text=True,
        check=True,
    )
    page = made.stdout.replace("\\-", "-").replace("\\fR", "").replace("\\fB", "")
    assert f'.TH {program.upper()} "1"' in page
    options = [name for name in function()._option_string_actions if name.startswith("--")]
    assert [name for name in options if name not in page] == ["--help"]
    assert page.index(".SH TARGETS") < page.index(".SH LOGIN") < page.index(".SH MESSAGES")


@pytest.mark.slow
def test_import_costs_little(tmp_path: Path) -> None:
    quiet = ("COVERAGE", "PYTHONDONTWRITEBYTECODE")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(quiet)
    } | {"PYTHONPYCACHEPREFIX": str(tmp_path)}

    def seconds(name: str) -> float:
        """Of the processor: a loaded machine disturbs it least, and the least of several turns
        hardly at all.
        """
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run_python("-c", f"import {name}", capture_output=False, check=True, env=environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    seconds("apssh")  # compiled once
    turns = [(seconds("apssh"), seconds("asyncssh")) for _ in range(12)]
    mine, theirs = (min(each) for each in zip(*turns, strict=True))
    assert mine / theirs < 1.4, turns
