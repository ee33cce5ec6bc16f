"""Tests of apssh, in the order of the module, against real servers.

First the rig: keys, an OpenSSH sshd on a free loopback port, faulty servers, a HOME of its own. Then pure tests, then the rest.
``pytest`` runs the default tier; ``pytest -m ''`` adds the slow one. With TESTBED_HOSTS (addresses separated by commas) and TESTBED_KEY set, the tests
that need several real hosts run too.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import getpass
import importlib
import io
import json
import os
import pty
import re
import shlex
import shutil
import signal
import socket
import stat
import statistics
import struct
import subprocess
import sys
import termios
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
on_testbed = pytest.mark.skipif(not TESTBED, reason="needs several real hosts: set TESTBED_HOSTS and TESTBED_KEY")
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
    key.write_private_key(folder / "encrypted", passphrase="secret", rounds=50)
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
                                        'exec "${SHELL##*/}" -c "$c"\n')
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


# ---------------------------------------------------------------------------------------------------------------
# text
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "shown"), [
    ("plain é 名", "plain é 名"), ("a\nb", r"a\nb"), ("\x1b[31mred", r"\x1b[31mred"), ("\u202eevil", r"\u202eevil"), ("a\tb", "a\tb"),
    ("\udcff", r"\xff"), ("\x9b2J", r"\x9b2J"), ("\u2028", r"\u2028"),
])
def test_escape(text: str, shown: str) -> None:
    assert apssh.escape(text) == shown


@pytest.mark.parametrize(("data", "shown"), [
    (b"plain\ttext\n", b"plain\ttext\n"), (b"\x1b[1;31mcolour\x1b[0m\n", b"\x1b[1;31mcolour\x1b[0m\n"), (b"\x1b[2J\n", b"\\x1b[2J\n"),
    (b"\x1b]0;title\x07\n", b"\\x1b]0;title\\x07\n"), (b"dos\r\n", b"dos\n"), (b"over\rwrite\n", b"over\\rwrite\n"),
    ("é 名\n".encode(), "é 名\n".encode()), (b"\xff\n", b"\xff\n"), (b"\x9b2J\n", b"\\x9b2J\n"), (b"\xc2\x9b2J\n", b"\\x9b2J\n"),
])
def test_escape_bytes(data: bytes, shown: bytes) -> None:
    assert apssh._escape_bytes(data) == shown


@pytest.mark.parametrize(("text", "names"), [
    ("node", ["node"]), ("node[1-3]", ["node1", "node2", "node3"]), ("n[08-11]", ["n08", "n09", "n10", "n11"]), ("n[1,3]", ["n1", "n3"]),
    ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]), ("10.0.0.[1-2]", ["10.0.0.1", "10.0.0.2"]), ("[::1]:22", ["[::1]:22"]),
    ("h[1-2].x.org", ["h1.x.org", "h2.x.org"]), ("2001:db8::1", ["2001:db8::1"]),
])
def test_ranges(text: str, names: list[str]) -> None:
    assert apssh._expand_ranges(text) == names


@pytest.mark.parametrize(("names", "folded"), [
    (["b"], "b"), (["n3", "n1", "n2"], "n[1-3]"), (["n01", "n02", "n03", "n07"], "n[01-03,07]"), (["n1", "n01"], "n[1,01]"),
    (["r1n1", "r1n2", "r2n1", "r2n2"], "r[1-2]n[1-2]"), (["::1", "n1"], "::1,n1"), (["n9", "n10"], "n[9-10]"), (["a", "b", "a"], "a,b"),
    (["n098", "n099", "n100"], "n[098-100]"), (["10.0.0.1", "10.0.0.2"], "10.0.0.[1-2]"), ([], ""),
])
def test_fold_names(names: list[str], folded: str) -> None:
    assert apssh.fold_names(names) == folded


@given(st.sets(st.from_regex(r"[a-c]{1,2}[0-9]{0,3}(-[a-b][0-9]{1,3})?", fullmatch=True), min_size=1, max_size=40))
@settings(max_examples=200, deadline=None)
def test_folding_is_the_inverse_of_ranges(names: set[str]) -> None:
    assert {str(target) for target in apssh._parse_targets([apssh.fold_names(names)])} == names


@pytest.mark.parametrize(("endpoints", "names"), [
    ([("root", "box1", 22)], ["box1"]),
    ([("root", "box1.a.org", 22), ("root", "box2.a.org", 22)], ["box1", "box2"]),
    ([("root", "box1.a.org", 22), ("root", "box1.b.org", 22)], ["box1.a.org", "box1.b.org"]),
    ([("root", "box1", 22), ("tester", "box1", 22)], ["root@box1", "tester@box1"]),
    ([("root", "box1", 22), ("root", "box1", 2200)], ["box1:22", "box1:2200"]),
    ([("root", "10.0.0.1", 22), ("root", "10.0.0.2", 22)], ["10.0.0.1", "10.0.0.2"]),
    ([("root", "::1", 22)], ["::1"]), ([("root", "Box", 22), ("root", "box", 22)], ["root@Box:22~1", "root@box:22~2"]),
    ([("root", "../../etc/x", 22)], ["_._.._etc_x"]), ([("root", "a/b", 22)], ["a_b"]), ([("root", "-rf", 22)], ["_rf"]),
])
def test_distinct_names(endpoints: list[apssh.Endpoint], names: list[str]) -> None:
    assert apssh._distinct_names(endpoints) == names


# ---------------------------------------------------------------------------------------------------------------
# formatters
# ---------------------------------------------------------------------------------------------------------------

BOX: apssh.Endpoint = ("root", "box1.a.org", 22)


def rendered(formatter: apssh.Formatter, lines: bytes, endpoint: apssh.Endpoint = BOX) -> bytes:
    formatter._node_added(endpoint, verbose=False)
    return formatter._render(endpoint, lines)


@pytest.mark.parametrize(("template", "lines", "shown"), [
    ("{host}:{linenl}", b"a\nb\n", b"box1:a\nbox1:b\n"), ("{fqdn} {user}{line}{nl}", b"a\n", b"box1.a.org root@a\n"),
    ("{line}", b"a\n", b"a\n"), ("{line} at {host}", b"x\ny\n", b"x at box1\ny at box1\n"), ("{linenl}", b"as it is\n", b"as it is\n"),
    ("{host} {line} {line}", b"twice\n", b"box1 twice twice\n"), ("{host}:{linenl}", b"{host} %H {nl}\n", b"box1:{host} %H {nl}\n"),
    ("{host}%%{linenl}", b"a\n", b"box1%a\n"), ("no line", b"a\nb\n", b"no line\nno line\n"), ("{host}:{linenl}", b"\xff\n", b"box1:\xff\n"),
])
def test_templates(template: str, lines: bytes, shown: bytes) -> None:
    assert rendered(apssh.TerminalFormatter(template), lines) == shown


def test_template_times() -> None:
    assert re.fullmatch(rb"\d\d-\d\d-\d\d:box1:x\n", rendered(apssh.TimeHostFormatter(), b"x\n"))
    assert re.fullmatch(rb"\d\d:\d\d box1 x\n", rendered(apssh.TerminalFormatter("%H:%M {host} {linenl}"), b"x\n"))


def test_template_unknown_field() -> None:
    with pytest.raises(UsageError) as caught:
        apssh.TerminalFormatter("{hots}:{line}")
    assert str(caught.value) == ("unknown field {hots} in format '{hots}:{line}': the fields are "
                                 "{time} {host} {fqdn} {user} {line} {linenl} {nl}")


def test_columns_align() -> None:
    formatter = apssh.HostFormatter()
    formatter._node_added(BOX, verbose=False)
    formatter._node_added(("root", "longer-name", 22), verbose=False)
    assert rendered(formatter, b"a\n") == b"box1       :a\n"
    assert rendered(formatter, b"a\n", ("root", "longer-name", 22)) == b"longer-name:a\n"


def sunk(formatter: apssh.Formatter, capfdbinary: Any, *pieces: tuple[bytes, int | None]) -> tuple[bytes, bytes]:
    """What a command's chunks become on stdout and stderr."""
    formatter._node_added(BOX, verbose=False)
    sink = formatter._sink(BOX)
    for data, datatype in pieces:
        sink.data(data, datatype)
    sink.end()
    out, err = capfdbinary.readouterr()
    return out, err


def test_lines_are_whole(capfdbinary: Any) -> None:
    pieces = [(b"one\ntw", None), (b"err", 1), (b"o\nthree", None), (b"or\n", 1)]
    assert sunk(apssh.HostFormatter(), capfdbinary, *pieces) == (b"box1:one\nbox1:two\nbox1:three\n", b"box1:error\n")


def test_raw_is_byte_for_byte(capfdbinary: Any) -> None:
    data = bytes(range(256)) * 10
    assert sunk(apssh.RawFormatter(), capfdbinary, (data[:1000], None), (data[1000:], None)) == (data, b"")


def test_long_line_is_cut(capfdbinary: Any) -> None:
    out, _ = sunk(apssh.HostFormatter(), capfdbinary, *[(b"x" * 65536, None)] * 40)
    lines = out.splitlines()
    assert len(lines) == 3
    assert all(len(line) <= apssh.LINE_LIMIT + len("box1:") for line in lines)
    assert sum(len(line) - len("box1:") for line in lines) == 40 * 65536


def test_user_formatter_gets_text_lines(capfdbinary: Any) -> None:
    seen = []

    class Mine(apssh.Formatter):
        def line(self, line: str, datatype: int | None, hostname: str) -> None:
            seen.append((line, datatype, hostname))

    assert sunk(Mine(), capfdbinary, (b"a\nb\xff", None), (b"e\n", 1)) == (b"", b"")
    assert seen == [("a\n", None, "box1.a.org"), ("e\n", apssh.EXTENDED_DATA_STDERR, "box1.a.org"), ("b\udcff\n", None, "box1.a.org")]


def test_user_formatter_may_call_its_base(capfdbinary: Any) -> None:
    class Upper(apssh.HostFormatter):
        def line(self, line: str, datatype: int | None, hostname: str) -> None:
            super().line(line.upper(), datatype, hostname)

    assert sunk(Upper(), capfdbinary, (b"a\n", None)) == (b"box1:A\n", b"")


def test_subdir_formatter(tmp_path: Path, capfdbinary: Any) -> None:
    formatter = apssh.SubdirFormatter(tmp_path / "run")
    formatter._node_added(BOX, verbose=False)
    formatter._started(BOX)
    assert (tmp_path / "run" / "box1").read_bytes() == b""
    assert sunk(formatter, capfdbinary, (b"a\n", None), (b"e", 1), (b"b", None)) == (b"", b"")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == {"box1": b"a\nb\n", "box1.err": b"e\n"}


def test_subdir_formatter_begins_afresh_and_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("precious")
    (tmp_path / "box1").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic link"):
        sunk(apssh.SubdirFormatter(tmp_path), None, (b"x\n", None))
    assert (tmp_path / "target").read_text() == "precious"


def test_capture_formatter(capfdbinary: Any) -> None:
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


def test_events_are_silent_unless_asked(capfd: Any) -> None:
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
        assert capfd.readouterr().err.splitlines() == ([
            "box: connected as root", "box: connected as root, through a gateway", "box: logged in as root", r"box: starts: ls\x1b[2J",
            "box: ended: ls", "box: SFTP session starts", "box: SFTP session ended", "box: connection closed",
            "box: connection lost: cut"] if verbose else [])


def test_stderr_line(capfd: Any) -> None:
    apssh.HostFormatter().stderr_line("a word\n", "box")
    assert capfd.readouterr() == ("", "box:a word\n")


def test_output_to_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    apssh._screen.write(b"caf\xc3\xa9\n")
    assert stream.getvalue() == "café\n"


# ---------------------------------------------------------------------------------------------------------------
# the guard
# ---------------------------------------------------------------------------------------------------------------

# command lines whose exit status, outputs and reading by the shell must be those of plain ssh
AS_PLAIN_SSH = [
    "true", "exit 7", "false", "no-such-command-here", "echo one; echo two >&2; exit 3", "kill -TERM $$", "kill -KILL $$", "kill -HUP $$",
    "sh -c 'kill -INT $$'", "cat", "wc -c", "read x; echo \"[$x]\"", "echo 'single' \"double\" $HOME", "echo a\\ b  c", "echo '!x' \\!",
    "printf '%s\\n' \"a'b\" 'c\"d'", "echo $0", "echo $#", "cd /; pwd", "pwd", "echo ~", "umask", "echo {1..3} $((2 + 3))", "if true; then echo yes; fi",
    "echo $(echo nested $(echo deep))", "x=5; echo $x ${x:-6}", "(exit 4)", "true | false", "false | true", "echo a && false || echo b",
    "cat <<EOF\nhere $((1 + 1))\nEOF", "echo one\necho two", "printf 'no newline'", "printf '\\000\\377' | od -c", "trap 'echo bye' EXIT; echo hi",
    "exec echo replaced", "test -t 0; echo $?", "test -t 1; echo $?", "echo é 名", "set | grep -c '^apssh'", "env | grep -c apssh",
    "ps -o pgid= -p $$ | tr -d ' ' | grep -qx $$ && echo leader", "# only a comment", ": &", "sleep 0.1 & wait; echo waited", "echo -n; echo -e 'a\\tb'",
    "ls -l /proc/self/fd | wc -l", "ulimit -c", "echo ${BASH_VERSION:+bash} $-", "seq 1 3 | while read i; do echo $i; done",
]


def plain_ssh(server: Sshd, keys: Path, command: str) -> tuple[int, bytes, bytes]:
    done = subprocess.run(
        ["ssh", "-F", "none", "-n", "-i", str(keys / "id_ed25519"), "-o", "IdentitiesOnly=yes", "-o", "StrictHostKeyChecking=no", "-o",
         "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "-p", str(server.port), f"{ME}@127.0.0.1", command],
        capture_output=True, check=False, timeout=30)
    return done.returncode, done.stdout, done.stderr


def same_as_plain_ssh(command: str, ours: apssh.Result, theirs: tuple[int, bytes, bytes]) -> None:
    status, out, err = theirs
    assert (ours.stdout_bytes, ours.stderr_bytes) == (out, err), command
    if ours.signal:
        assert status == 255, command  # all that ssh's own exit status tells of a signal
    else:
        assert ours.status == status, command


def test_commands_are_those_of_plain_ssh(sshd: Sshd, keys: Path) -> None:
    if not shutil.which("ssh"):
        pytest.skip("no OpenSSH client (ssh) is installed here")

    async def both() -> None:
        formatter = apssh._HoldingFormatter()
        node = sshd.node(formatter=formatter)
        room = asyncio.Semaphore(4)

        async def one(command: str) -> None:
            async with room:
                theirs = await asyncio.to_thread(plain_ssh, sshd, keys, command)
                held = apssh._HeldSink()
                status = await node._execute(command, apssh.StepRecord(), sink=held)
                result = apssh.Result("h", "u", 22, "h", "h", stdout_bytes=held.stdout(), stderr_bytes=held.stderr(), error=None)
                result.status, result.signal = (status, None) if isinstance(status, int) else (None, status)
                same_as_plain_ssh(command, result, theirs)

        async with node:
            await asyncio.gather(*map(one, AS_PLAIN_SSH))

    run(both())


ENDINGS = ["cancel", "timeout", "close", "abort"]


@pytest.mark.parametrize("how", ENDINGS)
def test_no_process_outlives_its_command(sshd: Sshd, how: str) -> None:
    token = f"97{os.getpid()}{ENDINGS.index(how)}"
    command = f"trap '' HUP; sleep {token} & (trap '' TERM; sleep {token}) & sleep {token}"

    async def main() -> None:
        node = sshd.node()
        task = asyncio.create_task(node.run(command, timeout=1.0 if how == "timeout" else None))
        await eventually_async(lambda: len(processes(f"sleep {token}")) >= 3)
        if how == "cancel":
            task.cancel()
        elif how == "close":
            await node.close()
        elif how == "abort":
            (await node.connect_lazy()).abort()
        with pytest.raises((asyncio.CancelledError, ApsshError)) as caught:
            await task
        if how == "timeout":
            assert str(caught.value) == f"127.0.0.1: timeout: no end within 1 s: {command}"
        await eventually_async(lambda: not processes(f"sleep {token}"), 8)
        await node.close()

    run(main())


def test_what_left_its_group_lives(sshd: Sshd) -> None:
    token = f"98{os.getpid()}"

    async def main() -> None:
        async with sshd.node() as node:
            assert await node.run(f"nohup setsid sleep {token} >/dev/null 2>&1 & sleep 0.2; exit 0") == 0
            assert await node.run(f"sleep {token}1 > /dev/null 2>&1 &") == 0

    run(main())
    assert len(processes(f"sleep {token}")) >= 2
    subprocess.run(["pkill", "-f", f"^sleep {token}"], check=True)


def test_without_the_guard(sshd: Sshd) -> None:
    async def main() -> None:
        async with sshd.node(guard=False) as node:
            assert await node.run("cat; exit 5") == 5
            assert await node.run("echo lost; exit 6", ignore_outputs=True) == 6
            with pytest.raises(CommandFailedError):
                await node.run("sleep 0.1; cat > /dev/null; sleep 3", timeout=0.5)

    run(main())


# ---------------------------------------------------------------------------------------------------------------
# nodes
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hostname", "options", "message"), [
    ("", {}, "'' is not a host name or an address"), ("a b", {}, "'a b' is not a host name or an address"),
    ("-oProxyCommand=x", {}, "'-oProxyCommand=x' is not a host name or an address"), ("h", {"port": 0}, "port 0 of h: a port is a number from 1 to 65535"),
    ("h", {"port": "22"}, "port '22' of h: a port is a number from 1 to 65535"),
    ("h", {"timeout": -1}, "timeout -1 of h: seconds, more than 0 (None: no limit)"), ("h", {"gateway": "gw"}, "gateway of h: an SshNode, not str"),
])
def test_node_misuse(hostname: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        SshNode(hostname, **options)
    assert str(caught.value) == message


def test_node_attributes() -> None:
    gateway = SshNode("gw")
    node = SshNode("box", username="me", port=2200, gateway=gateway)
    assert (node.hostname, node.username, node.port, node.gateway, gateway.username) == ("box", "me", 2200, gateway, "root")
    assert type(node.formatter) is apssh.HostFormatter
    assert (gateway.distance(), node.distance(), LocalNode().distance()) == (1, 2, 0)
    assert repr(node) == "<SshNode me@box:2200 through <SshNode root@gw>>"
    assert not node.is_connected() and not node.is_sftp_connected()


def test_node_is_its_own_gateway() -> None:
    node = SshNode("box")
    node.gateway = node
    with pytest.raises(UsageError) as caught:
        run(node.run("true"))
    assert str(caught.value) == "box: its gateway box is behind itself"


def test_hundreds_of_nodes_open_no_file() -> None:
    before = len(os.listdir("/proc/self/fd"))
    nodes = [SshNode(f"box{number}") for number in range(500)]
    assert len(os.listdir("/proc/self/fd")) == before and nodes


def test_run_a_command(sshd: Sshd, capfd: Any) -> None:
    async def main() -> None:
        async with sshd.node() as node:
            assert node.is_connected()
            assert await node.run("echo out; echo err >&2; exit 3") == 3
            assert await node.run("kill -TERM $$") == "TERM"
            with pytest.raises(UsageError, match="an empty command"):
                await node.run("  ")
        assert not node.is_connected()

    run(main())
    assert capfd.readouterr() == ("127.0.0.1:out\n", "127.0.0.1:err\n")


def test_first_uses_at_once_make_one_connection(make_sshd: Callable[..., Sshd]) -> None:
    sshd = make_sshd()
    before = sshd.logins()

    async def main() -> None:
        async with sshd.node() as node:
            assert await asyncio.gather(*(node.run("true") for _ in range(9))) == [0] * 9
            assert sshd.connections() == 1

    run(main())
    assert sshd.logins() == before + 1


def test_more_sessions_than_sshd_allows(make_sshd: Callable[..., Sshd]) -> None:
    server = make_sshd(MaxSessions=3)

    async def main() -> None:
        async with server.node() as node:
            assert await asyncio.gather(*(node.run("sleep 0.2") for _ in range(30))) == [0] * 30
            assert server.connections() <= apssh.CONNECTIONS_PER_NODE

    run(main())


def test_max_startups(make_sshd: Callable[..., Sshd]) -> None:
    server = make_sshd(MaxStartups="2:50:4")

    async def main() -> None:
        nodes = [server.node(timeout=60) for _ in range(25)]
        assert await asyncio.gather(*(node.run("true") for node in nodes)) == [0] * 25
        await asyncio.gather(*(node.close() for node in nodes))

    run(main())


@pytest.mark.parametrize("hops", [2, 4])
def test_gateways_are_shared(make_sshd: Callable[..., Sshd], hops: int) -> None:
    servers = [make_sshd() for _ in range(hops)]

    async def main() -> None:
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

    run(main())


def test_gateway_that_fails(sshd: Sshd) -> None:
    port = free_port()

    async def main() -> None:
        node = sshd.node(gateway=SshNode("127.0.0.1", port=port, username=ME))
        with pytest.raises(ConnectionFailedError) as caught:
            await node.run("true")
        assert str(caught.value) == f"127.0.0.1: refused: gateway 127.0.0.1: nothing listens on port {port}"
        behind = SshNode("127.0.0.1", port=port, username=ME, gateway=sshd.node())
        with pytest.raises(ConnectionFailedError) as caught:
            await behind.run("true")
        assert str(caught.value) == f"127.0.0.1: refused: nothing listens on port {port}"
        assert behind.gateway
        await behind.gateway.close()

    run(main())


def failure_of(work: Coroutine[Any, Any, Any]) -> ApsshError:
    with pytest.raises(ApsshError) as caught:
        run(work)
    return caught.value


def test_unreachable_hosts(sshd: Sshd, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    assert str(failure_of(SshNode("127.0.0.1", port=port).run("true"))) == f"127.0.0.1: refused: nothing listens on port {port}"
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: (_ for _ in ()).throw(socket.gaierror(-2, "Name or service not known")))
    assert str(failure_of(SshNode("no-such-host").run("true"))) == "no-such-host: dns: unknown host name"


def test_refused_key(sshd: Sshd, keys: Path) -> None:
    error = failure_of(sshd.node(keys=[keys / "other"]).run("true"))
    assert str(error) == f"127.0.0.1: auth: login as {ME} refused, after 1 key(s)"
    assert isinstance(error, ConnectionFailedError) and error.kind == "auth"


@pytest.mark.parametrize(("sends", "endless", "message"), [
    (b"", False, "timeout: no connection within 0.5 s: connected, but the server says nothing"),
    (b"SSH-2.0-stalls\r\n", False, "timeout: no connection within 0.5 s: the key exchange does not end"),
    (b"word\r\n" * 100, True, "refused: not an ssh server: it says 'word'"),
    (b"HTTP/1.1 400 Bad Request\r\n\x1b[2J\r\n\r\n", False, "timeout: no connection within 0.5 s: not an ssh server: it says 'HTTP/1.1 400 Bad Request'"),
], ids=["silent", "stalls", "endless", "http"])
def test_servers_that_are_none(sends: bytes, endless: bool, message: str) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(sends)
        while endless:
            writer.write(sends)
            await writer.drain()
            await asyncio.sleep(0)
        await reader.read()

    async def main() -> None:
        async with raw_server(talk) as port:
            begin = time.monotonic()
            with pytest.raises(ConnectionFailedError) as caught:
                await SshNode("127.0.0.1", port=port, timeout=0.5).run("true")
            assert time.monotonic() - begin < 5
            assert str(caught.value) == f"127.0.0.1: {message}"

    run(main())


@pytest.mark.parametrize("reset", [False, True])
def test_server_that_drops_before_login(reset: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apssh, "RETRIES_BEFORE_LOGIN", 2)
    tries = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tries.append(1)
        if reset:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort() if reset else writer.close()

    async def main() -> None:
        async with raw_server(talk) as port:
            with pytest.raises(ConnectionFailedError) as caught:
                await SshNode("127.0.0.1", port=port).run("true")
            assert str(caught.value) == "127.0.0.1: lost: dropped before login, 3 times"
            assert len(tries) == 3

    run(main())


def test_lost_connection_is_a_failure(sshd: Sshd) -> None:
    async def main() -> None:
        node = sshd.node()
        task = asyncio.create_task(node.run("touch here; sleep 30"))
        await eventually_async((sshd.home / "here").exists)
        (await node.connect_lazy()).abort()
        with pytest.raises(ConnectionFailedError) as caught:
            await task
        assert str(caught.value) == "127.0.0.1: lost: connection lost during touch here; sleep 30"
        assert await node.run("true") == 0  # connects anew, by itself
        await node.close()

    run(main())


def test_frozen_peer_is_found() -> None:
    """A host that answers no more: keepalives tell."""
    async def main() -> None:
        frozen = asyncio.Event()

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, back = await asyncio.open_connection("127.0.0.1", inner)

            async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
                while data := await source.read(65536):
                    if frozen.is_set():
                        await asyncio.sleep(3600)
                    sink.write(data)

            try:
                await asyncio.gather(pump(reader, back), pump(there, writer))
            finally:
                back.close()

        async def sleeps(process: Any) -> None:
            process.stdout.write(b"begun\n")
            await process.channel.wait_closed()

        async with ssh_server(Path(os.environ["HOME"], ".ssh"), process=sleeps) as inner, raw_server(talk) as port:
            node = SshNode("127.0.0.1", port=port, keepalive=0.3, guard=False, username=ME)
            task = asyncio.create_task(node.run("anything"))
            await eventually_async(lambda: node.is_connected())
            frozen.set()
            with pytest.raises(ConnectionFailedError) as caught:
                await task
            assert caught.value.kind == "lost"
            await node.close()

    run(main())


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


def test_environment_and_terminal(sshd: Sshd, capfd: Any) -> None:
    async def main() -> None:
        async with sshd.node(formatter=apssh.RawFormatter()) as node:
            await Run("echo $FOO", env={"FOO": "a'b \"c\" $d\n!"}).co_run_remote(node)
            await Run("test -t 1 && echo terminal", pty=True).co_run_remote(node)

    run(main())
    assert capfd.readouterr().out.replace("\r", "") == "a'b \"c\" $d !\nterminal\n"


def test_methods_for_files(sshd: Sshd, home: Path) -> None:
    async def main() -> None:
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
            assert str(caught.value).startswith("127.0.0.1: local: a/script/x: ")

    run(main())
    assert (home / "back").read_text() == "text"


def test_local_node(home: Path, capfd: Any) -> None:
    async def main() -> None:
        node = LocalNode()
        async with node:
            assert (node.hostname, node.username, node.is_connected(), node.is_sftp_connected()) == ("LOCALNODE", ME, True, True)
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
            with pytest.raises(CommandFailedError) as caught:
                await node.run("sleep 30", timeout=0.2)
            assert str(caught.value) == "LOCALNODE: timeout: no end within 0.2 s: sleep 30"

    run(main())
    assert sorted(str(path.relative_to(home)) for path in home.rglob("d/**/*")) == ["d/e", "d/e/script", "d/script"]
    assert (home / "f" / "script").read_text() == "exit 5"
    assert capfd.readouterr() == (f"LOCALNODE:{home}\n", "LOCALNODE:err\n")


# ---------------------------------------------------------------------------------------------------------------
# values
# ---------------------------------------------------------------------------------------------------------------


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
    assert (str(deferred), repr(deferred)) == ("ping {{ host }} {{count}}", "Deferred('ping {{ host }} {{count}}')")
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


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert Deferred("{{ n }}", {"n": 7}).render() == "7"
    with pytest.raises(UsageError) as caught:
        Deferred("{{ n + 1 }}", {"n": 7}).render()
    assert str(caught.value) == "this needs jinja2: pip install 'apssh[yaml]'"


# ---------------------------------------------------------------------------------------------------------------
# commands
# ---------------------------------------------------------------------------------------------------------------

LINE_VARIABLES = Variables(known="value")


@pytest.mark.parametrize(("command", "line"), [
    (Run("ls", "-l", 3), "ls -l 3"), (Run("a  b"), "a b"), (Run("x", label="text"), "text"), (Run("x", label=""), None),
    (Run("echo", Deferred("{{known}} {{unknown}}", LINE_VARIABLES)), "echo value {{unknown}}"), (Run("time", Run("ls", "/")), "time ls /"),
    (RunScript("dir/check.sh", "a", 1), "RunScript: check.sh a 1"), (RunScript("check.sh"), "RunScript: check.sh"),
    (RunString("#!/bin/sh\n# about\n\n  echo a long first line\n", "x"), "RunString: echo a long fir... x"), (RunString("ls"), "RunString: ls..."),
    (Push("a", "b"), "Push: a onto b"), (Push(["a", "b", "c"], "d"), "Push: a ... (3 total) onto d"), (Pull("a", "b"), "Pull: a into b"),
    (Pull([Deferred("{{known}}", LINE_VARIABLES)], "b"), "Pull: value into b"), (apssh.AbstractCommand(), "AbstractCommand"),
])
def test_one_line_text(command: apssh.AbstractCommand, line: str | None) -> None:
    assert command._line() == line


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Run(), "Run: an empty command"), (lambda: Run("", " "), "Run: an empty command"),
    (lambda: Run("a", timeout=-1), "timeout -1: seconds, more than 0 (None: no limit)"),
    (lambda: Run(["ls", "-l"]), "Run: a word is a string, a number, a Deferred or a Run, not ['ls', '-l']"),
    (lambda: RunString(" "), "RunString: an empty script"), (lambda: Push([], "x"), "a path or a list of paths, not []"),
    (lambda: Push("", "x"), "a path or a list of paths, not ''"), (lambda: Pull("x", 3), "Pull: the destination is a path, not 3"),
])
def test_command_misuse(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make()
    assert str(caught.value) == message


NODE_KINDS = ["remote", "local"]


@pytest.fixture(params=NODE_KINDS)
def node(request: pytest.FixtureRequest, sshd: Sshd) -> Iterator[Any]:
    """The same steps on a remote node and on this machine."""
    each = sshd.node(formatter=apssh.RawFormatter()) if request.param == "remote" else LocalNode(formatter=apssh.RawFormatter())
    yield each
    asyncio.run(each.close())


def step(node: Any, command: apssh.AbstractCommand) -> Any:
    return asyncio.run(command._run(node, apssh.StepRecord()))


def test_run(node: Any, capfdbinary: Any) -> None:
    variables = Variables(word="late")
    assert step(node, Run("echo", Deferred("{{word}}", variables), 3, Run("and", "more"), "; exit 4")) == 4
    assert step(node, Run("echo lost; echo lost >&2; exit 5", ignore_outputs=True)) == 5
    assert step(node, Run("kill -USR1 $$")) == "USR1"
    assert capfdbinary.readouterr() == (b"late 3 and more\n", b"")


def test_capture(node: Any, capfdbinary: Any) -> None:
    variables = Variables()
    assert step(node, Run("echo one; echo err >&2; echo two", capture=Capture("out", variables))) == 0
    assert variables.out == "one\ntwo"
    assert capfdbinary.readouterr() == (b"", b"err\n")


def test_output_beyond_the_limit_fails_the_command(node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apssh, "CAPTURE_LIMIT", 1024 * 1024)
    with pytest.raises(ApsshError, match="more than 1 MiB of output to hold"):
        step(node, Run("yes", capture=Capture("out", Variables())))


def test_run_script(node: Any, home: Path, sshd: Sshd, capfdbinary: Any) -> None:
    (home / "check.sh").write_text('#!/bin/bash\nsource "$(dirname "$BASH_SOURCE")/lib.sh"\nshow "$@"; pwd; exit 6\n')
    (home / "lib.sh").write_text('show() { printf "[%s]" "$@"; echo; }\n')
    assert step(node, RunScript("check.sh", "a", "'b c'", "> redirected", includes=["lib.sh"])) == 6
    where = home if isinstance(node, LocalNode) else sshd.home
    assert (where / "redirected").read_text() == f"[a][b c]\n{where}\n"
    assert capfdbinary.readouterr() == (b"", b"")
    assert not list((where / ".apssh-remote").iterdir())
    assert stat.S_IMODE((where / ".apssh-remote").stat().st_mode) == 0o700


def test_run_string(node: Any, capfdbinary: Any) -> None:
    variables = Variables(n=3)
    body = Deferred("#!/usr/bin/env python3\nimport os, sys\nprint(sys.argv[1:], {{n}}, os.path.basename(sys.argv[0]), "
                    "oct(os.stat(os.path.dirname(sys.argv[0])).st_mode)[-3:])", variables)
    assert step(node, RunString(body, "x", 1, remote_name="mine")) == 0
    assert step(node, RunString("echo no interpreter line; exit 2")) == 2
    assert capfdbinary.readouterr().out == b"['x', '1'] 3 mine 700\nno interpreter line\n"


def test_many_scripts_at_once(sshd: Sshd) -> None:
    async def main() -> None:
        async with sshd.node() as node:
            captured = Variables()
            scripts = [RunString(f"sleep 0.1; echo {number}", capture=Capture(f"v{number}", captured)) for number in range(12)]
            assert await asyncio.gather(*(script.co_run_remote(node) for script in scripts)) == [0] * 12
            assert captured == {f"v{number}": str(number) for number in range(12)}

    run(main())
    assert not list((sshd.home / ".apssh-remote").iterdir())


@pytest.mark.parametrize(("make", "message"), [
    (lambda: RunScript("gone.sh"), "script gone.sh: no such file"), (lambda: RunString("x", includes=["gone"]), "include gone: no such file"),
    (lambda: RunScript("dir"), "script dir: no such file"), (lambda: Push("gone", "x"), "gone: no such file"),
])
def test_missing_files(make: Callable[[], Any], message: str, home: Path) -> None:
    """Raised when the job starts, before its first step and any connection."""
    (home / "dir").mkdir()
    scheduler = Scheduler(job := SshJob(SshNode("127.0.0.1", port=1), commands=[Run("true"), make()]))
    with pytest.raises(UsageError) as caught:
        scheduler.run()
    assert str(caught.value) == message
    assert job.records == []


def test_step_of_a_users_own_class(node: Any, capfd: Any) -> None:
    class Mine(apssh.AbstractCommand):
        async def co_run_remote(self, node: Any) -> int | str | None:
            return await node.run("echo mine; exit 7")  # type: ignore[no-any-return]

        async def co_run_local(self, node: Any) -> int | str | None:
            await asyncio.sleep(0)
            return None

    assert step(node, Mine()) == (0 if isinstance(node, LocalNode) else 7)

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
    assert capfd.readouterr().err == f"{node.hostname}: runs: true\n{node.hostname}: runs: Push: f onto g\n"


def test_x11_needs_a_display(sshd: Sshd) -> None:
    assert str(failure_of(Run("xterm", x11=True)._run(sshd.node(), apssh.StepRecord()))) == "127.0.0.1: local: x11: no DISPLAY here to forward to"


def test_x11(sshd: Sshd, monkeypatch: pytest.MonkeyPatch, capfd: Any, tmp_path: Path) -> None:
    if not (shutil.which("Xvfb") and shutil.which("xauth")):
        pytest.skip("needs Xvfb and xauth")
    read, write = os.pipe()
    server = subprocess.Popen(["Xvfb", "-displayfd", str(write), "-nolisten", "tcp", "-noreset"], pass_fds=[write], stderr=subprocess.DEVNULL)
    try:
        monkeypatch.setenv("DISPLAY", f":{os.read(read, 10).decode().strip()}")
        probe = "python3 -c \"import socket,os; h,d=os.environ['DISPLAY'].split(':'); s=socket.create_connection(('127.0.0.1',6000+int(d.split('.')[0]))); print('shown')\""

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


# ---------------------------------------------------------------------------------------------------------------
# jobs
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "message"), [
    ({}, "SshJob: give one of command= and commands=, there is neither"),
    ({"command": "a", "commands": ["b"]}, "SshJob: give one of command= and commands=, not both"),
    ({"commands": []}, "SshJob: an empty list of commands: give it one, or leave the job out"),
    ({"commands": [None, None]}, "SshJob: an empty list of commands: give it one, or leave the job out"),
    ({"commands": ["ls", Run("x")]}, "SshJob: a mix of words and commands: write each command as Run(...), RunScript(...), ..."),
    ({"command": 3}, "SshJob: a string, a Deferred, a command, or a list of commands or of words, not 3"),
    ({"command": ""}, "Run: an empty command"),
])
def test_job_misuse(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        SshJob(SshNode("h"), **arguments)
    assert str(caught.value) == message


def test_job_needs_a_node() -> None:
    with pytest.raises(UsageError, match=r"^SshJob: the node is an SshNode or a LocalNode, not 'h'$"):
        SshJob("h", command="ls")  # type: ignore[arg-type]


@pytest.mark.parametrize("arguments", [
    {"command": "echo a b"}, {"commands": "echo a b"}, {"command": Run("echo a b")}, {"commands": [Run("echo", "a", "b"), None]},
    {"command": ["echo", "a", "b"]}, {"commands": ("echo", "a", "b")}, {"command": Deferred("echo a {{x}}", {"x": "b"})},
])
def test_job_forms(arguments: dict[str, Any], capfd: Any) -> None:
    job = SshJob(LocalNode(), **arguments)
    assert Scheduler(job).run() and job.result() == 0
    assert capfd.readouterr().out == "LOCALNODE:a b\n"


def test_critical_job_stops_at_its_first_failure(sshd: Sshd, capfd: Any) -> None:
    job = SshJob(sshd.node(), commands=[Run("echo one; exit 3"), Run("echo two")])
    scheduler = Scheduler(job, SshJob(sshd.node(), command="echo later", required=job))
    with pytest.raises(CommandFailedError) as caught:
        scheduler.run()
    error = caught.value
    assert str(error) == "127.0.0.1: status: ended with status 3: echo one; exit 3"
    assert (error.host, error.command, error.status, error.kind) == ("127.0.0.1", "echo one; exit 3", 3, "status")
    assert [line for line in capfd.readouterr().out.splitlines() if "SCHEDULER" not in line] == ["127.0.0.1:one"]
    assert job.repr_result() == "!! step 1 `echo one; exit 3`: 127.0.0.1: status: ended with status 3: echo one; exit 3 !!"
    apssh.close_ssh_in_scheduler(scheduler)


def test_non_critical_job_runs_all_its_steps(sshd: Sshd, capfd: Any) -> None:
    job = SshJob(sshd.node(), commands=[Run("exit 3"), Run("kill -TERM $$"), Run("echo last")], critical=False)
    allowed = SshJob(sshd.node(), commands=[Run("exit 4", allowed_exits=[4]), Run("kill -TERM $$", allowed_exits="SIGTERM")])
    scheduler = Scheduler(job, allowed)
    assert scheduler.run()
    assert (job.result(), allowed.result()) == ("TERM", 0)
    assert capfd.readouterr().out == "127.0.0.1:last\n"
    assert [(step.status, step.kind) for step in job.records] == [(3, "status"), ("TERM", "signal"), (0, None)]
    apssh.close_ssh_in_scheduler(scheduler)


def test_unreachable_host_is_never_a_success() -> None:
    lost = SshNode("127.0.0.1", port=free_port())
    job = SshJob(lost, command=Run("true", allowed_exits=[1, 255]), critical=False)
    assert Scheduler(job).run()
    assert isinstance(job.result(), ConnectionFailedError) and job.result()
    with pytest.raises(ConnectionFailedError):
        Scheduler(SshJob(lost, command="true")).run()


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


def test_scheduler_in_a_running_loop(make_sshd: Callable[..., Sshd]) -> None:
    sshd = make_sshd()
    async def main() -> None:
        scheduler = Scheduler(SshJob(sshd.node(), command="true"))
        assert await scheduler.co_run()
        assert sshd.connections() == 1
        await apssh.co_close_ssh_in_scheduler(scheduler)
        await eventually_async(lambda: not sshd.connections())

    run(main())


def test_many_jobs_on_one_node(sshd: Sshd) -> None:
    variables, node = Variables(), sshd.node()
    jobs = [SshJob(node, command=Run(f"for i in 1 2 3; do echo {number}; sleep 0.05; done", capture=Capture(f"v{number}", variables)))
            for number in range(25)]
    scheduler = Scheduler(*jobs)
    assert scheduler.run()
    assert variables == {f"v{number}": f"{number}\n{number}\n{number}" for number in range(25)}
    apssh.close_ssh_in_scheduler(scheduler)


def test_output_of_jobs_is_never_mixed(sshd: Sshd, capfdbinary: Any) -> None:
    formatter = apssh.TerminalFormatter("{linenl}")
    nodes = [sshd.node(formatter=formatter) for _ in range(4)]
    scheduler = Scheduler(*(SshJob(nodes[number % 4], command=f"for i in $(seq 300); do echo {number} {'x' * 100} $i; done") for number in range(12)))
    assert scheduler.run()
    apssh.close_ssh_in_scheduler(scheduler)
    lines = capfdbinary.readouterr().out.splitlines()
    assert len(lines) == 12 * 300
    for number in range(12):
        mine = [line for line in lines if line.startswith(b"%d " % number)]
        assert mine == [b"%d %s %d" % (number, b"x" * 100, index) for index in range(1, 301)]


def test_scheduler_timeout_ends_remote_commands(sshd: Sshd) -> None:
    token = f"96{os.getpid()}"
    scheduler = Scheduler(SshJob(sshd.node(), command=f"sleep {token}"), SshJob(sshd.node(), command=f"sleep {token}", forever=True), timeout=1)
    with pytest.raises(TimeoutError):
        scheduler.run()
    eventually(lambda: not processes(f"sleep {token}"))
    apssh.close_ssh_in_scheduler(scheduler)


def test_critical_failure_ends_commands_elsewhere(sshd: Sshd) -> None:
    token = f"95{os.getpid()}"
    scheduler = Scheduler(SshJob(sshd.node(), command=f"sleep {token}"), SshJob(sshd.node(), command="sleep 0.5; exit 1"))
    with pytest.raises(CommandFailedError):
        scheduler.run()
    eventually(lambda: not processes(f"sleep {token}"))
    apssh.close_ssh_in_scheduler(scheduler)


def test_forever_jobs_beyond_max_sessions(sshd: Sshd) -> None:
    node = sshd.node()
    scheduler = Scheduler(*(SshJob(node, command="sleep 60", forever=True) for _ in range(12)), SshJob(node, command="true"))
    assert scheduler.run()
    apssh.close_ssh_in_scheduler(scheduler)


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
    assert job.graph_label().splitlines()[1:] == ["ls", "Push: a onto b"] and job.graph_label().splitlines()[0].endswith(": me@box")
    assert labelled.graph_label().splitlines()[1:] == ["a label"]
    assert job.details() == "  me@box: ls\n  me@box: Push: a onto b\n  me@box: (hidden)"
    assert "me@box: Push: a onto b" in capfd.readouterr().out


def test_pictures_of_asynciojobs(home: Path) -> None:
    scheduler = Scheduler(SshJob(SshNode("box"), commands=[Run('echo "quoted" <&>'), RunScript("not-there.sh")]))
    scheduler.export_as_dotfile("s.dot")
    assert "RunScript: not-there.sh" in (home / "s.dot").read_text()
    if shutil.which("dot"):
        scheduler.export_as_svgfile("s")
        scheduler.export_as_pngfile("s")
        assert (home / "s.svg").stat().st_size and (home / "s.png").stat().st_size


def test_inner_cancellation_does_not_break_the_scheduler() -> None:
    class Cancels(apssh.AbstractCommand):
        async def co_run_local(self, node: Any) -> int | str | None:
            raise asyncio.CancelledError

    job = SshJob(LocalNode(), command=Cancels(), critical=False)
    other = SshJob(LocalNode(), command="true", required=job)
    assert Scheduler(job, other).run()
    assert str(job.result()) == "LOCALNODE: local: cancelled from inside" and other.result() == 0


def test_any_exception_of_a_step_is_a_result() -> None:
    class Breaks(apssh.AbstractCommand):
        async def co_run_local(self, node: Any) -> int | str | None:
            return 1 // 0

    job = SshJob(LocalNode(), command=Breaks(), critical=False)
    assert Scheduler(job).run()
    assert str(job.result()) == "LOCALNODE: local: ZeroDivisionError: integer division or modulo by zero"
    with pytest.raises(ZeroDivisionError):
        Scheduler(SshJob(LocalNode(), command=Breaks())).run()


def test_plain_jobs_between_ssh_jobs(capfd: Any) -> None:
    async def plain() -> int:
        return 42

    scheduler = Scheduler()
    first = SshJob(LocalNode(), command="echo first", scheduler=scheduler)
    job = Job(plain(), required=(first, None), scheduler=scheduler)
    Sequence(SshJob(LocalNode(), command="echo second", required=[job]), PrintJob("printed"), scheduler=scheduler)
    assert scheduler.orchestrate()
    scheduler.debrief()
    assert capfd.readouterr().out.splitlines()[:3] == ["LOCALNODE:first", "LOCALNODE:second", "printed"]


# ---------------------------------------------------------------------------------------------------------------
# services
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keywords", "message"), [
    ({"service_id": "a b"}, "service_id 'a b': letters, digits and :-_.@ only"),
    ({"service_id": "x", "systemd_type": "a;b"}, "systemd_type 'a;b': as in systemd.service(5): simple, forking, oneshot..."),
    ({"service_id": "x", "environ": {"A B": 1}}, "environ: 'A B' is not the name of a variable"),
])
def test_service_misuse(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        apssh.Service("true", **keywords)
    assert str(caught.value) == message


def box(number: int = 0, **options: Any) -> SshNode:
    return SshNode(TESTBED[number], **{"keys": [os.environ["TESTBED_KEY"]], "formatter": apssh.RawFormatter()} | options)


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
    "echo plain", "echo \"double\" 'single' $HOME; echo second", "echo a; exit 0 # comment", "printf '%s\\n' '100% $$ \\\\ back'",
    "for i in 1 2\ndo echo $i\ndone", Deferred("echo {{word}}", {"word": "late 'quoted \\\"'"}),
]


@on_testbed
@pytest.mark.parametrize("command", SERVICE_COMMANDS, ids=range(len(SERVICE_COMMANDS)))
def test_service_runs_the_command_as_a_shell_does(command: Any) -> None:
    text = command.render() if isinstance(command, Deferred) else command
    service = apssh.Service(command, service_id=f"apssh-test-{os.getpid()}", systemd_type="oneshot", environ={"HOME": "/root", "WORD": "a 'b' $c \"d\" %h"})
    out = captured_on(box(), service.start_command(), service.journal_command(since="-1min"))
    expected = subprocess.run(["/bin/sh", "-c", text], env={"HOME": "/root", "PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True).stdout
    assert all(line in out for line in expected.splitlines())


@on_testbed
def test_service_life(capfd: Any) -> None:
    node = box()
    name = f"apssh-life-{os.getpid()}"
    service = apssh.Service("echo \"begun $WORD\"; trap 'echo asked to stop; exit 0' TERM; sleep 1000 & wait", service_id=name, environ={"WORD": "it's $5"})
    scheduler = Scheduler(SshJob(node, commands=[service.start_command(), service.start_command(), Run("sleep 0.5"), service.status_command(),
                                                 service.stop_command(), service.status_command(), service.stop_command(), service.journal_command()]))
    assert scheduler.run()
    apssh.close_ssh_in_scheduler(scheduler)
    out = capfd.readouterr().out
    assert "Active: active (running)" in out and "begun it's $5" in out and "asked to stop" in out


@on_testbed
@pytest.mark.parametrize("keywords", [{"tty": True}, {"systemd_type": "forking"}, {"stop_if_running": False}], ids=["tty", "forking", "no stop"])
def test_service_kinds(keywords: dict[str, Any]) -> None:
    name = f"apssh-kind-{os.getpid()}-{len(str(keywords))}"
    shell = "(sleep 30) & exit 0" if "systemd_type" in keywords else "test -t 1 && printf '%s%s\\n' is-a- terminal; sleep 30"
    service = apssh.Service(shell, service_id=name, **keywords)
    node = box()
    try:
        out = captured_on(node, service.start_command(), Run("sleep 0.5;", f"systemctl is-active {name}; journalctl -o cat -u {name}"))
        assert out.splitlines()[0] == "active"
        assert ("is-a-terminal" in out) == ("tty" in keywords)
    finally:
        asyncio.run(service.stop_command().co_run_remote(node))
        asyncio.run(node.close())


# ---------------------------------------------------------------------------------------------------------------
# fan-out
# ---------------------------------------------------------------------------------------------------------------


def test_quick_run(sshd: Sshd) -> None:
    port = free_port()
    good, bad = apssh.run([sshd.target, f"127.0.0.1:{port}"], "echo out; echo err >&2; printf '\\377'; exit 3", keys=["~/.ssh/id_ed25519"])
    assert (good.host, good.user, good.status, good.signal, good.kind, good.ok) == ("127.0.0.1", ME, 3, None, "status", False)
    assert (good.stdout, good.stdout_bytes, good.stderr) == ("out\n\udcff", b"out\n\xff", "err\n")
    assert good.seconds > 0 and good.error == "ended with status 3: echo out; echo err >&2; printf '\\377'; exit 3"
    assert (bad.status, bad.kind, bad.error, bad.ok) == (None, "refused", f"nothing listens on port {port}", False)
    assert repr(bad).startswith("Result(host='127.0.0.1', user=") and "stdout" not in repr(bad)


def test_quick_run_in_a_running_loop(sshd: Sshd) -> None:
    async def notebook() -> None:
        assert [result.stdout for result in apssh.run(sshd.target, "echo there")] == ["there\n"]
        assert [result.ok for result in await apssh.co_run(sshd.target, "exit 4", allowed_exits=[4])] == [True]

    run(notebook())


def test_quick_copies(sshd: Sshd, home: Path) -> None:
    (home / "f").write_text("text")
    assert [result.ok for result in apssh.push(sshd.target, "f", "g")] == [True]
    assert [result.ok for result in apssh.pull(sshd.target, "g", "{host}-{user}-{fqdn}")] == [True]
    assert (home / f"127.0.0.1-{ME}-127.0.0.1").read_text() == "text"
    (failed,) = apssh.pull(sshd.target, "gone", "x")
    assert (failed.kind, failed.error) == ("local", "gone: no such file")


@pytest.mark.parametrize(("call", "message"), [
    (lambda: apssh.run([], "x"), "no target: use -t HOST ..."), (lambda: apssh.run("h", ""), "Run: an empty command"),
    (lambda: apssh.run("h", RunScript("gone")), "script gone: no such file"), (lambda: apssh.push("h", "gone", "x"), "gone: no such file"),
    (lambda: apssh.run("h", "x", host_keys="perhaps"), "host key policy perhaps: accept-new, yes or no"),
    (lambda: apssh.pull("a,b", "x", "y"), "a and b would both write to y: put {host} in the path"),
])
def test_quick_misuse(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        call()
    assert str(caught.value) == message


def test_window(sshd: Sshd) -> None:
    targets = [f"{ME}@127.0.0.{number}:{sshd.port}" for number in range(1, 2)]
    script = f"f=$(mktemp {sshd.home}/run.XXXXXX); ls {sshd.home}/run.* | wc -l; sleep 0.2; rm $f"
    results = apssh.run([f"demo{number}" for number in range(1)] and targets, script, window=1)
    assert [result.stdout.strip() for result in results] == ["1"]


def test_retries() -> None:
    port, tries = free_port(), []

    async def main() -> None:
        async def late() -> None:
            await asyncio.sleep(0.3)
            tries.append(1)

        task = asyncio.create_task(late())
        (result,) = await apssh.co_run(f"127.0.0.1:{port}", "true", retries=1)
        await task
        assert result.kind == "refused" and result.seconds >= 0.4

    run(main())


# ---------------------------------------------------------------------------------------------------------------
# views
# ---------------------------------------------------------------------------------------------------------------


def result_of(name: str, out: bytes = b"", err: bytes = b"", **fields: Any) -> apssh.Result:
    return apssh.Result(name, "root", 22, name, name, **{"status": 0} | fields, stdout_bytes=out, stderr_bytes=err)


def test_gather(capfd: Any) -> None:
    view = apssh._Gather(diff=False)
    for number in (3, 1, 2):
        view.done(result_of(f"node{number}", b"same\n"))
    view.done(result_of("node4", b"other", b"trouble\n", status=2, error="x", kind="status"))
    view.done(result_of("node5", status=None, error="nothing listens", kind="refused"))
    view.finish()
    out, err = capfd.readouterr()
    assert out == "-------------\nnode[1-3] (3)\n-------------\nsame\n------------------\nnode4 (1) status 2\n------------------\nother\n"
    assert err == "-------------------------\nnode4 (1) status 2 stderr\n-------------------------\ntrouble\n"


def test_gather_differences(capfd: Any) -> None:
    view = apssh._Gather(diff=True)
    for number in (1, 2):
        view.done(result_of(f"node{number}", b"a\nb\nc\n"))
    view.done(result_of("node3", b"a\nB\nc\n"))
    view.finish()
    assert capfd.readouterr().out.splitlines()[3:] == ["a", "b", "c", "-----------------", "node3 (1) differs", "-----------------", "@@ -1,4 +1,4 @@", " a", "-b", "+B", " c", " "]


def test_json_lines(capfd: Any) -> None:
    apssh._JsonLines().done(result_of("box", b"out\xff\n", b"err\n"))
    line = capfd.readouterr().out
    assert json.loads(line) == {"host": "box", "user": "root", "port": 22, "name": "box", "status": 0, "signal": None, "error": None, "kind": None,
                                "seconds": 0.0, "stdout": "out\udcff\n", "stderr": "err\n"}
    assert json.loads(line)["stdout"].encode("utf-8", "surrogateescape") == b"out\xff\n"


def test_summary() -> None:
    results = [*(result_of(f"n{number}") for number in (1, 2, 3)), result_of("n4", status=3, error="x", kind="status"),
               result_of("n5", status=None, signal="KILL", error="x", kind="signal"), result_of("n6", status=None, error="x", kind="timeout", may_run=True)]
    assert apssh._summary(results) == ["3 ok, 2 failed, 1 not reached or lost", "  signal KILL: n5 (1)", "  status 3: n4 (1)", "  timeout: n6 (1)",
                                       "  the command may still be running on: n6"]


@pytest.mark.parametrize(("selector", "targets"), [
    ("failed", ["b", "c", "d"]), ("ok", ["a"]), ("rc=3", ["b"]), ("timeout", ["d"]), ("signal=TERM", ["c"]), ("all", ["a", "b", "c", "d"]), ("dns", []),
])
def test_last(selector: str, targets: list[str], home: Path) -> None:
    apssh._save_last([result_of("a"), result_of("b", status=3, error="x", kind="status"), result_of("c", status=None, signal="TERM", error="x", kind="signal"),
                      result_of("d", status=None, error="x", kind="timeout")])
    assert apssh._load_last(selector) == targets
    assert stat.S_IMODE((home / ".apssh" / "last").stat().st_mode) == 0o600


def test_last_that_is_not_there(home: Path) -> None:
    with pytest.raises(UsageError, match=rf"^@last: there is no {home}/.apssh/last yet$"):
        apssh._load_last("ok")
    (home / ".apssh").mkdir()
    (home / ".apssh" / "last").write_text("[1]")
    with pytest.raises(UsageError, match=rf"^@last: {home}/.apssh/last is not readable$"):
        apssh._load_last("ok")


def test_progress_is_gone_at_the_end(sshd: Sshd) -> None:
    code, seen = on_terminal("-F", "none", "-t", sshd.target, "sleep 1.6; echo shown; sleep 0.5")
    text = seen.decode()
    assert code == 0
    assert "0/1 done, 1 running: 127.0.0.1" in text
    assert "\r\x1b[K127.0.0.1:shown" in text and text.endswith("\r\x1b[K")


# ---------------------------------------------------------------------------------------------------------------
# demo
# ---------------------------------------------------------------------------------------------------------------


def test_demo_fleet(capfd: Any) -> None:
    async def main() -> list[str]:
        async with apssh.demo_fleet(3) as nodes:
            _open_ports.update(node.port for node in nodes)
            assert [node.hostname for node in nodes] == ["demo1", "demo2", "demo3"]
            nodes[2].gateway = nodes[0]
            homes = Variables()
            await asyncio.gather(*(Run("echo $HOME; pwd", capture=Capture(node.hostname, homes)).co_run_remote(node) for node in nodes))
            assert await nodes[1].run("cat; exit 5") == 5
            assert await nodes[1].run("kill -TERM $$") == "TERM"
            await nodes[1].put_string_script("echo hi", "script")
            assert await RunString("test -x script && exec ./script").co_run_remote(nodes[1]) == 0
            stranger = SshNode("127.0.0.1", port=nodes[0].port, known_hosts=None, username=ME)
            with pytest.raises(ConnectionFailedError) as caught:
                await stranger.run("true")
            assert caught.value.kind == "auth"
            return [text.splitlines()[0] for text in homes.values()]

    homes = run(main())
    assert len(set(homes)) == 3 and not any(os.path.exists(home) for home in homes)
    assert capfd.readouterr().out == "demo2:hi\n"


@pytest.mark.parametrize("count", [0, 1001])
def test_demo_size(count: int) -> None:
    async def main() -> None:
        async with apssh.demo_fleet(count):
            pass

    with pytest.raises(UsageError, match=rf"^a demo has from 1 to 1000 hosts, not {count}$"):
        asyncio.run(main())


# ---------------------------------------------------------------------------------------------------------------
# programs
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("argv", "message"), [
    ([], "no command: apssh [options] command ..."), (["true"], "no target: use -t HOST ..."), (["-t", "h", ""], "no command: apssh [options] command ..."),
    (["-t", "node[3-1]", "x"], "node[3-1]: 3-1 runs backwards; write 1-3"),
    (["-t", "node[1-", "x"], "node[1-: brackets must be closed and not nested, as in node[01-20,25]"),
    (["-t", "me@", "x"], "me@: a host is missing"), (["-t", "h:99999", "x"], "h:99999: a port is a number from 1 to 65535"),
    (["--nope", "x"], "unknown option --nope (see apssh --help)"), (["--tagret", "x"], "unknown option --tagret: did you mean --target?"),
    (["-t", "h", "-s", "gone.sh"], "script gone.sh: no such file"), (["-t", "h", "-s", "-i", "gone", "echo a"], "include gone: no such file"),
    (["-t", "h", "-i", "x", "ls"], "-i goes with -s"), (["-t", "h", "-m", "ls"], "-m goes with -o or -d"), (["-t", "h", "--diff", "ls"], "--diff goes with -b"),
    (["-t", "h", "-w", "-1", "x"], "argument -w/--window: '-1': a number of hosts, 0 for no limit (see apssh --help)"),
    (["-t", "h", "-c", "-1", "x"], "argument -c/--connect-timeout: '-1': seconds, more than 0 (see apssh --help)"),
    (["-t", "h", "-u", "0", "x"], "argument -u/--command-timeout: '0': seconds, more than 0 (see apssh --help)"),
    (["-w", "node[1-3]", "x"], "argument -w/--window: 'node[1-3]' is no number of hosts; use -t for targets (see apssh --help)"),
    (["-t", "h", "-f", "20", "x"], "argument -f/--format: '20' is no format; use -w for the number of hosts at once (see apssh --help)"),
    (["-t", "h", "-r", "-b", "x"], "argument -b/--gather: not allowed with argument -r/--raw-format (see apssh --help)"),
    (["-t", "h", "-k", "gone", "x"], "key gone: no such file or directory"), (["-t", "h", "-k", "/", "x"], "key /: is a directory"),
    (["-t", "h", "--env", "A B=1", "x"], "--env A B=1: write NAME=value"), (["-t", "h", "--demo", "2", "x"], "--demo takes the place of -t and -g: leave them out"),
    (["-t", "h", "-I", "-s", "echo a"], "-I does not go with -s: push the data, or let the script read a file"),
    (["-t", "h", "-F", "gone", "x"], "ssh config gone: no such file"), (["-t", "h", "-o", "/proc/x", "x"], "/proc/x: no such file or directory"),
    (["-t", "gone/targets", "x"], "gone/targets: no such file"), (["-t", "@last:ok", "x"], "@last: there is no HOME/.apssh/last yet"),
    (["-t", "a", "-x", "a", "x"], "no target: -x excludes them all"), (["-g", "gw", "-t", "gw", "x"], "gw: gw->gw passes a host twice; None->HOST has no gateway"),
    (["--scenario", "s.yaml", "-t", "h"], "--scenario brings its own hosts and commands: leave -t, --demo and the command out"),
    (["--set", "a=1", "-t", "h", "x"], "--set goes with --scenario"), (["--scenario", "gone.yaml"], "gone.yaml: no such file or directory"),
])
def test_apssh_misuse(argv: list[str], message: str, home: Path, capfd: Any) -> None:
    assert apssh.main(argv) == 2
    assert capfd.readouterr() == ("", f"apssh: {message}\n".replace("HOME", str(home)))


@pytest.mark.parametrize(("main", "argv", "message"), [
    ("push", ["-t", "h", "f"], "from what to what? appush [options] local ... @:remote"),
    ("push", ["-t", "h", "f", "g"], "g: a remote path is written @:path: appush [options] local ... @:remote"),
    ("push", ["-t", "h", "@:f", "@:g"], "@:f: a local path has no @:: appush [options] local ... @:remote"),
    ("push", ["-t", "h", "gone", "@:g"], "gone: no such file"), ("push", ["-t", "h", "", "@:g"], "an empty path: appush [options] local ... @:remote"),
    ("pull", ["-t", "h", "f", "g"], "f: a remote path is written @:path: appull [options] @:remote ... local"),
    ("pull", ["-t", "h", "@:f", "@:g"], "@:g: a local path has no @:: appull [options] @:remote ... local"),
    ("pull", ["-t", "h,i", "@:f", "g"], "h and i would both write to g: put {host} in the path"),
    ("pull", ["-t", "h", "@:f", "gone/"], "gone/: no such folder"), ("pull", ["@:f", "g"], "no target: use -t HOST ..."),
])
def test_copy_misuse(main: str, argv: list[str], message: str, capfd: Any) -> None:
    assert getattr(apssh, f"main_{main}")(argv) == 2
    assert capfd.readouterr() == ("", f"ap{main}: {message}\n")


def test_no_key_anywhere(home: Path, capfd: Any) -> None:
    (home / ".ssh" / "id_ed25519").unlink()
    assert apssh.main(["-t", "h", "true"]) == 2
    assert capfd.readouterr().err == "apssh: no key: give one with -k, load one into an agent, or use -A (password) or -K (go on without)\n"


@pytest.mark.parametrize(("argv", "out"), [
    (["-t", "b,a node[01-02]", "-L"], "b\na\nnode01\nnode02\n"), (["-t", "a,b", "-n", "ls", "-l"], "a: ls -l\nb: ls -l\n"), (["--demo", "2", "-L"], "demo1\ndemo2\n"),
    (["-g", "gw", "-l", "me", "-p", "2200", "-t", "a,you@b:23,None->c", "-x", "nobody@a", "-L"], "me@gw->me@a:2200\nme@gw->you@b:23\nNone->me@c:2200\n"),
    (["-V"], f"apssh {apssh.__version__}\n"),
])
def test_listings(argv: list[str], out: str, capfd: Any) -> None:
    assert apssh.main(argv) == 0
    assert capfd.readouterr() == (out, "")


@pytest.mark.parametrize(("argv", "status", "out", "err"), [
    (["echo out; echo err >&2"], 0, b"127.0.0.1:out\n", b"127.0.0.1:err\n"), (["-r", "printf 'a\\nb'"], 0, b"a\nb", b""),
    (["exit 3"], 1, b"", b"1 failed\n  status 3: 127.0.0.1 (1)\n"), (["-q", "exit 3"], 1, b"", b""),
    (["-f", "{host} {fqdn} {user}{linenl}", "echo x"], 0, f"127.0.0.1 127.0.0.1 {ME}@x\n".encode(), b""),
    (["-b", "echo x"], 0, b"-------------\n127.0.0.1 (1)\n-------------\nx\n", b""), (["cat"], 0, b"", b""), (["-I", "cat"], 0, b"127.0.0.1:given\n", b""),
    (["--env", "A=x y", "echo $A"], 0, b"127.0.0.1:x y\n", b""), (["-s", "#!/bin/bash\necho $#", "a", "b"], 0, b"127.0.0.1:2\n", b""),
    (["-u", "0.5", "sleep 30"], 1, b"", b"127.0.0.1: timeout: no end within 0.5 s: sleep 30\n0 ok, 1 not reached or lost\n  timeout: 127.0.0.1 (1)\n"),
    (["--", "echo", "-e"], 0, b"127.0.0.1:\n", b""),
])
def test_apssh(argv: list[str], status: int, out: bytes, err: bytes, sshd: Sshd) -> None:
    done = cli("-F", "none", "-t", sshd.target, *argv, input=b"given\n")
    if err.startswith(b"1 failed"):
        err = b"0 ok, " + err
    assert (done.returncode, done.stdout, done.stderr) == (status, out, err)


def test_folders_and_marks(sshd: Sshd, home: Path) -> None:
    port = free_port()
    done = cli("-F", "none", "-t", sshd.target, "-t", f"127.0.0.1:{port}", "-o", "out", "-m", "echo kept; echo err >&2; exit 4")
    assert (done.returncode, done.stdout) == (1, b"out\n")
    files = {str(path.relative_to("out")): path.read_text() for path in Path("out").rglob("*") if path.is_file()}
    name, other = f"{ME}@127.0.0.1:{sshd.port}".replace(f"{ME}@", ""), f"127.0.0.1:{port}"
    assert files == {name: "kept\n", f"{name}.err": "err\n", f"1failed/{name}": "4\n", f"1failed/{other}": "None\n"}
    assert sorted(cli("-t", "out/1failed", "-L").stdout.decode().split()) == sorted([name, other])
    dated = cli("-F", "none", "-t", sshd.target, "-d", "true").stdout.decode().strip()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d@\d\d:\d\d:\d\d", dated) and Path(dated).is_dir()


def test_script_with_includes(sshd: Sshd, home: Path) -> None:
    Path("go.sh").write_text('#!/bin/bash\n. "$(dirname "$BASH_SOURCE")/lib"; say "$@"\n')
    Path("lib").write_text('say() { echo "said $*"; }\n')
    done = cli("-F", "none", "-t", sshd.target, "-s", "-i", "lib", "go.sh", "a", "-b", "'c d'")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"127.0.0.1:said a -b c d\n", b"")


def test_json(sshd: Sshd) -> None:
    port = free_port()
    done = cli("-F", "none", "-t", f"{sshd.target},127.0.0.1:{port}", "-j", "echo x")
    good, bad = sorted(map(json.loads, done.stdout.splitlines()), key=lambda each: each["status"] is None)
    assert (done.returncode, good["stdout"], good["status"], bad["kind"], bad["error"]) == (1, "x\n", 0, "refused", f"nothing listens on port {port}")


def test_last_run_again(sshd: Sshd) -> None:
    port = free_port()
    assert cli("-F", "none", "-t", f"{sshd.target},127.0.0.1:{port}", "true").returncode == 1
    assert cli("-t", "@last:failed", "-L").stdout.decode() == f"127.0.0.1:{port}\n"
    assert cli("-t", "@last:ok", "-L").stdout.decode() == f"{sshd.target}\n"
    assert cli("-F", "none", "-t", "@last:ok", "--no-last", "false").returncode == 1
    assert cli("-t", "@last:ok", "-L").stdout.decode() == f"{sshd.target}\n"


def test_copies(sshd: Sshd, home: Path) -> None:
    Path("tree/sub").mkdir(parents=True)
    Path("tree/sub/f").write_text("text")
    Path("127.0.0.1").write_text("mine")
    done = cli("-F", "none", "-t", sshd.target, "-r", "tree", "{host}", "@:", program="appush")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert (sshd.home / "tree/sub/f").read_text() == "text" and (sshd.home / "127.0.0.1").read_text() == "mine"
    done = cli("-F", "none", "-t", sshd.target, "-r", "@:tree", "got-{user}/", program="appull")
    assert (done.returncode, done.stderr) == (0, b"")
    assert Path(f"got-{ME}/tree/sub/f").read_text() == "text"
    done = cli("-F", "none", "-t", sshd.target, "@:gone", "x", program="appull")
    assert (done.returncode, done.stderr) == (1, b"127.0.0.1: local: gone: no such file\n0 ok, 1 failed\n  local: 127.0.0.1 (1)\n")
    assert cli("-t", "h", "-n", "tree", "@:x", program="appush").stdout == b"h: Push: tree onto x\n"


def interrupted(argv: list[str], number: int, started: Callable[[], Any], twice: bool = False, program: str = "apssh") -> tuple[int, bytes, bytes, float]:
    """Run a program, interrupt it once something is there; its exit code, outputs, and how long it took to go."""
    code = f"import sys; sys.path.insert(0, {str(MODULE.parent)!r}); import apssh; sys.exit(apssh.{MAINS[program]}())"
    process = subprocess.Popen([sys.executable, "-c", code, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
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
    code, out, err, seconds = interrupted(["-F", "none", "-t", sshd.target, f"echo begun; touch up; sleep {token}"], signal.SIGINT, (sshd.home / "up").exists, twice)
    assert code in ((130, -signal.SIGINT) if twice else (130,)) and seconds < 5  # the second may come when it is on its way out
    if not twice:
        assert (out, err) == (b"127.0.0.1:begun\n", b"0 ok, 1 interrupted\n  interrupted: 127.0.0.1 (1)\n")
    eventually(lambda: not processes(f"sleep {token}"))


def test_killed_client_leaves_no_process(sshd: Sshd) -> None:
    token = f"93{os.getpid()}"
    assert interrupted(["-F", "none", "-t", sshd.target, f"touch up; sleep {token}"], signal.SIGKILL, (sshd.home / "up").exists)[0] == -9
    eventually(lambda: not processes(f"sleep {token}"))


def test_interrupted_copy_leaves_nothing(sshd: Sshd, home: Path) -> None:
    with open("big", "wb") as file:
        file.truncate(400_000_000)
    code, _, err, _ = interrupted(["-F", "none", "-t", sshd.target, "big", "@:there"], signal.SIGINT, lambda: list(sshd.home.iterdir()), program="appush")
    assert code == 130 and b"Traceback" not in err
    eventually(lambda: not list(sshd.home.iterdir()))
    os.rename("big", sshd.home / "big")
    before = set(home.iterdir())
    code, _, err, _ = interrupted(["-F", "none", "-t", sshd.target, "@:big", "here"], signal.SIGINT, lambda: set(home.iterdir()) - before - {home / ".ssh", home / ".apssh"},
                                  program="appull")
    assert code == 130 and b"Traceback" not in err
    assert {path.name for path in home.iterdir()} <= {".ssh", ".apssh"}


def test_closed_pipe_ends_quietly(sshd: Sshd) -> None:
    token = f"92{os.getpid()}"
    code = f"import sys; sys.path.insert(0, {str(MODULE.parent)!r}); import apssh; sys.exit(apssh.main())"
    done = subprocess.run([f"{sys.executable} -c {shlex.quote(code)} -q -F none -t {sshd.target} 'yes {token}' | head -n 1"], shell=True, capture_output=True, timeout=30, check=False)
    assert (done.stdout, done.stderr) == (f"127.0.0.1:yes {token}\n".encode().replace(b"yes ", b""), b"")
    eventually(lambda: not processes(f"yes {token}"))


@pytest.mark.parametrize("name", ["apssh", "appush", "appull"])
def test_copy_or_link_of_the_file_is_a_program(name: str, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to(MODULE)
    done = subprocess.run([sys.executable, str(tmp_path / name), "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: {name} [options]")


def test_vendored_copy(tmp_path: Path) -> None:
    (tmp_path / "vendor").mkdir()
    shutil.copy(MODULE, tmp_path / "vendor" / "apssh.py")
    code = "from vendor import apssh; from vendor.apssh import SshNode; from vendor.apssh.formatters import TimeHostFormatter as T; assert T is apssh.TimeHostFormatter"
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, check=True)
    done = subprocess.run([sys.executable, "apssh.py", "--demo", "2", "uname"], cwd=tmp_path / "vendor", capture_output=True, check=True)
    assert sorted(done.stdout.splitlines()) == [b"demo1:Linux", b"demo2:Linux"] if sys.platform == "linux" else done.stdout


def test_submodules_of_the_older_package() -> None:
    for name in ("formatters", "nodes", "sshproxy", "commands", "sshjob", "service", "deferred", "topology", "keys", "yaml_loader"):
        assert importlib.import_module(f"apssh.{name}") is apssh is getattr(apssh, name)
    assert apssh.SshProxy is apssh.SshNode


def test_public_names_are_documented() -> None:
    for name in apssh.__all__:
        assert getattr(apssh, name).__doc__, name
    assert not any(name.startswith("_") for name in apssh.__all__)


def test_scenario_program(home: Path, capfd: Any) -> None:
    Path("s.yaml.j2").write_text("nodes: [{id: here, localnode: true}]\njobs:\n  - {id: a, node: here, command: 'echo {{word}}'}\n"
                                 "  - {id: b, node: here, required: a, command: exit 3}\n  - {id: c, node: here, required: b, command: 'true'}\n")
    assert apssh.main(["--scenario", "s.yaml.j2", "--set", "word=given", "-n"]) == 0
    assert capfd.readouterr().out == "a: <LocalNode>\n    echo given\nb: <LocalNode> after a\n    exit 3\nc: <LocalNode> after b\n    true\n"
    assert apssh.main(["--scenario", "s.yaml.j2", "--set", "word=given"]) == 1
    out, err = capfd.readouterr()
    assert out.splitlines()[0] == "LOCALNODE:given"
    assert err == "b: LOCALNODE: status: ended with status 3: exit 3\n1 ok, 1 failed, 1 never ran\n"


def readme_table(heading: str) -> list[str]:
    """The first column of a table of the README."""
    section = (MODULE.parent / "README.md").read_text().split(f"\n### {heading}\n")[1].split("\n#")[0]
    return [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]


def test_options_of_the_readme() -> None:
    documented = {option for row in readme_table("Options") for option in re.findall(r"--?[a-zA-Z0-9-]+", row)}
    parsers = [apssh.build_parser(), apssh.build_push_parser(), apssh.build_pull_parser()]
    assert documented == {option for parser in parsers for option in parser._option_string_actions}


@pytest.mark.parametrize("width", [80, 132])
def test_help_is_wrapped(width: int, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for main in (apssh.main, apssh.main_push, apssh.main_pull):
        assert main(["--help"]) == 0
        out = capfd.readouterr().out
        assert "examples:" in out and max(map(len, out.splitlines())) <= width


@pytest.mark.slow
def test_import_costs_little() -> None:
    def seconds(name: str) -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {name}"], cwd=MODULE.parent, check=True)
        return time.perf_counter() - begin

    seconds("apssh")
    assert statistics.median(seconds("apssh") / seconds("asyncssh") for _ in range(15)) < 1.4  # on a loaded machine; 1.15 on one at rest
