# SPDX-License-Identifier: MIT - Copyright (c) 2026 the apssh authors -
# https://spdx.org/licenses/MIT.html
"""apssh: run commands, scripts and copies on many hosts at once, over ssh, from one Python file.

    apssh  [options] command ...               run a command, or a local script (-s), on every target
    appush [options] local ... @:remote        copy local files to every target
    appull [options] @:remote ... local        copy files from every target

    apssh -t root@node[01-20] uptime           twenty hosts, one prefixed line each
    apssh -t 'gw.example.org->node1' df -h /  through a gateway
    apssh --demo 3 'echo hello; id -un'        three throw-away hosts inside this process

In Python, a node reaches a host, a step is one command, a job is a list of steps that an
asynciojobs Scheduler runs:

    from asynciojobs import Scheduler
    from apssh import SshNode, SshJob, Run
    gateway = SshNode("gw.example.org", username="slice")
    node = SshNode("node1", gateway=gateway)
    scheduler = Scheduler()
    SshJob(node, command=Run("uname", "-r"), scheduler=scheduler)
    scheduler.run()

Without a scheduler: ``apssh.run("node[1-3]", "uname -r")`` gives a list of results. README.md has
the rest.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import base64
import collections
import contextlib
import copy
import dataclasses
import datetime
import difflib
import errno
import fcntl
import fnmatch
import functools
import gc
import getpass
import glob
import graphlib
import hashlib
import hmac
import html
import importlib
import inspect
import io
import ipaddress
import itertools
import json
import logging
import os
import posixpath
import pwd
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import unicodedata
import weakref
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Protocol, Self, TextIO, TypeVar, cast

import asynciojobs
import asyncssh

__version__ = "1.0.0"

__all__ = [
    "EXTENDED_DATA_STDERR",
    "AbstractCommand",
    "ApsshError",
    "Capture",
    "CaptureFormatter",
    "ColonFormatter",
    "CommandFailedError",
    "ConnectionFailedError",
    "Deferred",
    "Formatter",
    "HostFormatter",
    "HostKeyError",
    "LocalNode",
    "Pull",
    "Push",
    "RawFormatter",
    "Result",
    "Run",
    "RunScript",
    "RunString",
    "ScenarioError",
    "Service",
    "SshJob",
    "SshNode",
    "SshProxy",
    "StepRecord",
    "SubdirFormatter",
    "TerminalFormatter",
    "TimeColonFormatter",
    "TimeHostFormatter",
    "TransferError",
    "UndefinedVariableError",
    "UsageError",
    "Variables",
    "YamlLoader",
    "close_ssh_in_scheduler",
    "co_close_ssh_in_scheduler",
    "co_pull",
    "co_push",
    "co_run",
    "demo_fleet",
    "escape",
    "fold_names",
    "import_private_key",
    "load_agent_keys",
    "load_private_keys",
    "main",
    "main_pull",
    "main_push",
    "pull",
    "push",
    "recording",
    "run",
    "run_record",
    "save_record",
    "timeline_as_svgfile",
    "timeline_as_text",
    "topology_as_dotfile",
    "topology_as_pngfile",
    "topology_dot",
    "topology_graph",
]

EXTENDED_DATA_STDERR = asyncssh.EXTENDED_DATA_STDERR

CONNECT_TIMEOUT = (
    30.0  # seconds to a ready connection, all hops included: twice what a loaded host takes
)
KEEPALIVE_INTERVAL = (
    9.0  # seconds; with KEEPALIVE_COUNT a frozen peer is found in 27 s, below the 30 s people wait
)
KEEPALIVE_COUNT = 2
# key exchanges at once: each is 3 ms of this thread, so the last one waits 0.4 s; distant hosts
# need many
HANDSHAKES = 128
# seconds that a host may hold one of these, so that those who stall do not keep the others
# waiting
HANDSHAKE_TURN = 0.5
CONNECTS = 1024  # TCP connects at once; they cost nothing but a descriptor
LOOKUPS = 64  # host names asked for at once, a thread each
STARTUPS_PER_HOST = (
    8  # logins at once on one endpoint: sshd's MaxStartups drops at random from 10 on
)
SESSIONS_PER_CONNECTION = 10  # sshd's MaxSessions default
CONNECTIONS_PER_NODE = (
    8  # connections that one node may open to run more sessions than that at once
)
RETRIES_BEFORE_LOGIN = 6  # when sshd drops us before login: 0.2 s, then twice as long each time
CLOSE_TIMEOUT = 2.0  # seconds that a polite close may take before the connection is cut
SESSION_WINDOW = (
    128 * 1024
)  # bytes in flight for a command's output: costs no speed and bounds memory
LINE_LIMIT = 1024 * 1024  # bytes; a longer line is cut, so that memory stays bounded
CAPTURE_LIMIT = (
    256 * 1024 * 1024
)  # bytes of one command's output that are held (captures, gather, JSON, results)
MAX_AUTH_ROUNDS = (
    8  # connections spent on offering keys, when a server takes only a few on each (MaxAuthTries)
)
KNOWN_HOSTS_FILES = (
    "~/.ssh/known_hosts",
    "~/.ssh/known_hosts2",
    "/etc/ssh/ssh_known_hosts",
    "/etc/ssh/ssh_known_hosts2",
)
DEFAULT_KEYS = (
    "~/.ssh/id_ed25519",
    "~/.ssh/id_ecdsa",
    "~/.ssh/id_rsa",
    "~/.ssh/id_ed25519_sk",
    "~/.ssh/id_ecdsa_sk",
)
# names of one run: a slip such as node[1-10000000] is refused before it fills the memory
MAX_TARGETS = 100_000
MAX_TARGET_TEXT = 4096
MAX_TARGET_FILE = 16 * 1024 * 1024  # bytes; -t /dev/zero ends too
REMOTE_FOLDER = ".apssh-remote"
SEND_AT_ONCE = 8192  # bytes; a smaller packet waits for others of the same turn of the loop

# AES-GCM first: half the CPU of chacha20-poly1305 wherever the processor knows AES
CIPHERS = (
    "aes128-gcm@openssh.com",
    "aes256-gcm@openssh.com",
    "chacha20-poly1305@openssh.com",
    "aes128-ctr",
    "aes192-ctr",
    "aes256-ctr",
)

_T = TypeVar("_T")
Endpoint = tuple[
    str, str, int
]  # user, host, port: what tells two nodes apart in columns and file names


# --------------------------------------------------------------------------------------------------
# errors: one root, one line each, and the data they are about
# --------------------------------------------------------------------------------------------------


class ApsshError(Exception):
    """The root of all that apssh raises.

    Attributes: ``message`` (the cause, one line); ``host`` (empty when no host is concerned);
    ``kind``: dns, refused, timeout, hostkey, auth, lost, signal, status, interrupted, remote (a
    file or a limit over there) or local (on this machine); ``command``; ``label`` (of the step, if
    it has one); ``status`` (exit status, or the signal's name; None when there is none).
    """

    kind = "local"

    def __init__(
        self,
        message: str,
        *,
        host: str = "",
        kind: str | None = None,
        command: str = "",
        label: str = "",
        status: int | str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.host = host
        self.command = command
        self.label = label
        self.status = status
        if kind:
            self.kind = kind

    def __str__(self) -> str:
        before = [escape(self.host), self.kind] if self.host else []
        if self.label:
            before.append(escape(self.label))
        return ": ".join([*before, self.message])


class UsageError(ApsshError, ValueError):
    """Something cannot mean anything: raised before anything runs, with the remedy in the message."""


class ConnectionFailedError(ApsshError):
    """A host could not be reached, or was lost: ``kind`` is dns, refused, timeout, hostkey, auth or
    lost.
    """

    kind = "lost"


class HostKeyError(ConnectionFailedError):
    """The key that a host presented is not the one it must have, or is revoked, or (under policy
    yes) not known.
    """

    kind = "hostkey"


class CommandFailedError(ApsshError):
    """A command ended with a status that is no success, or by a signal, or had to be ended: ``kind``
    is status, signal or timeout. The text names the step's label, if it has one.
    """

    kind = "status"


class TransferError(ApsshError):
    """A file could not be copied; the message names the path and the reason."""


class UndefinedVariableError(ApsshError, NameError):
    """A Deferred names a variable that has no value at the time its command must run."""


class ScenarioError(UsageError):
    """A mistake in a YAML scenario; the message names file, line, section and id."""


# --------------------------------------------------------------------------------------------------
# text: names, ranges and folding, control characters: pure functions
# --------------------------------------------------------------------------------------------------

# Patterns are texts, for re to compile when they are first used: at import they would cost a tenth
# of it. _CONTROLS: C0, C1, what has no width, bidi.
_CONTROLS = r"\x00-\x08\x0a-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff"
_NOT_SHOWN = f"[{_CONTROLS}]"
_NOT_SHOWN_OUTPUT = r"\r\n|\x1b(?!\[[0-9;:]*+m)|[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f\udc80-\udc9f]"
_COLOUR_LEFT_ON = r"(\x1b\[(?!0?m)[^\n\x1b]*)(?=\n|$)"
_PLAIN_BYTES = bytes([*b"\t\n", *range(0x20, 0x7F), *range(0xA0, 0x100)])
_NOT_IN_FILE_NAME = rf"^[-.]|[\t/~{_CONTROLS}]"


def escape(text: str) -> str:
    r"""The text on one line, with no power over a terminal: control characters but tab, line
    separators and bidi overrides are shown as ``\n``, ``\x1b``, ``\u202e``; bytes that were not
    UTF-8 (surrogateescape) as ``\xff``.
    """
    return re.sub(_NOT_SHOWN, _visible, text)


def _escape_bytes(data: bytes) -> bytes:
    """Whole lines of a host's output, made harmless for a terminal: newlines, tabs, colours and
    UTF-8 text pass; no colour runs on into the next line.
    """
    # true of most output, and ten times faster than a search
    if not data.translate(None, _PLAIN_BYTES):
        return data
    text = re.sub(_NOT_SHOWN_OUTPUT, _visible, data.decode("utf-8", "surrogateescape"))
    text = re.sub(_COLOUR_LEFT_ON, "\\1\x1b[0m", text)
    return text.encode("utf-8", "surrogateescape")


def _visible(match: re.Match[str]) -> str:
    if match[0] == "\r\n":
        return "\n"
    return ascii(match[0])[1:-1].replace(r"\udc", r"\x")  # bytes that were not UTF-8


def _brief(text: str, most: int = 80) -> str:
    """A text from outside as an error shows it: a server may send a hundred thousand bytes."""
    return escape(text if len(text) <= most else text[: most - 3] + "...")


def _expand_ranges(text: str) -> list[str]:
    """The names meant by ``node[01-20,25]`` or ``node[1-9/2]`` (each second): brackets multiply,
    zeros are kept, an IPv6 address in brackets stays.
    """
    pieces = re.split(r"(\[[^][]*+\])", text)
    fixed = "".join(pieces[::2])
    try:
        if "[" in fixed or "]" in fixed:
            raise UsageError("brackets must be closed and not nested, as in node[01-20,25]")
        if len(fixed) + len(pieces) > MAX_TARGET_TEXT:
            raise UsageError("too long for a target")
        names = [pieces[0]]
        for bracket, rest in zip(pieces[1::2], pieces[2::2], strict=True):
            numbers = [bracket]
            if ":" not in bracket:
                numbers = _expand_numbers(bracket, most=MAX_TARGETS // len(names))
            names = [name + number + rest for name, number in itertools.product(names, numbers)]
    except UsageError as exc:
        raise UsageError(f"{_brief(text)}: {exc}") from None
    return names


_NUMBERS = r"([0-9]{1,18})(?:-([0-9]{1,18})(?:/([0-9]{1,18}))?)?"


def _expand_numbers(bracket: str, *, most: int) -> list[str]:
    numbers: list[str] = []
    for item in bracket[1:-1].split(","):
        match = re.fullmatch(_NUMBERS, item)
        if not match:
            raise UsageError(f"'{_brief(item)}' is not a number or a range such as 01-20")
        first, last, step = match[1], match[2] or match[1], int(match[3] or 1)
        if int(first) > int(last):
            raise UsageError(f"{item} runs backwards; write {last}-{first}")
        if step == 0:
            raise UsageError(f"{item} never ends; a step is 1 or more")
        found = range(int(first), int(last) + 1, step)
        if len(found) > most - len(numbers):
            raise UsageError(f"more than {MAX_TARGETS} names")
        numbers += [str(number).zfill(len(first)) for number in found]
    return numbers


def fold_names(names: Iterable[str]) -> str:
    """The names sorted, each once, in target syntax: ``node[01-03,07],web``; IPv6 addresses stand
    as they are.
    """
    rows = sorted(
        map(_cut_at_numbers, set(names)),
        key=lambda row: (row[::2], [(int(digits), len(digits)) for digits in row[1::2]]),
    )
    # from the last number on, so that racks [1-2] of nodes [1-30] come out; a row without a number
    # at this place stays as it is
    for place in reversed(range(1, max(map(len, rows), default=0), 2)):
        alike: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
        for row in rows:
            around = row[:place], row[place + 1 :]
            alike.setdefault(around, []).extend(row[place : place + 1])
        rows = [(*left, _fold_numbers(numbers), *right) for (left, right), numbers in alike.items()]
    return ",".join(map("".join, rows))


def _cut_at_numbers(name: str) -> tuple[str, ...]:
    """Text, number, text, ..., text."""
    if name.count(":") > 1 or "[" in name:
        return (name,)
    return tuple(re.split("([0-9]{1,18})", name))


def _fold_numbers(numbers: Sequence[str]) -> str:
    """``01 02 03 07`` as ``[01-03,07]``; a run goes on only where expanding gives these very
    digits. One number, or none, stands as it is.
    """
    if len(numbers) < 2:
        return "".join(numbers)
    runs: list[list[str]] = []
    for digits in numbers:
        if runs and digits == str(int(runs[-1][-1]) + 1).zfill(len(runs[-1][0])):
            runs[-1][1:] = [digits]
        else:
            runs.append([digits])
    return f"[{','.join(map('-'.join, runs))}]"


def _is_address(host: str) -> bool:
    """Whether a host is named by its IP address: no name's last label is a number (RFC 1123)."""
    return ":" in host or host.rpartition(".")[2].isdecimal()


def _short_name(host: str) -> str:
    """Up to the first dot; an IP address stays whole."""
    return host if _is_address(host) else host.partition(".")[0] or host


def _endpoint_text(host: str, user: str | None = None, port: int | None = None) -> str:
    address = host
    if port is not None:
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return f"{user}@{address}" if user else address


# What may be said of an endpoint besides its short name, the shortest first.
_NAME_FORMS = (
    "",
    "domain",
    "user",
    "port",
    "user domain",
    "domain port",
    "user port",
    "user domain port",
)


def _file_name(endpoint: Endpoint, form: str) -> str:
    """The name of an endpoint in this form, as one visible file name of at most 200 bytes; ``~`` is
    kept for numbers, and the names that -o and -m give to other things for them.
    """
    user, host, port = endpoint
    text = _endpoint_text(
        host if "domain" in form else _short_name(host),
        user if "user" in form else None,
        port if "port" in form else None,
    )
    name = re.sub(_NOT_IN_FILE_NAME, "_", text or "_").encode()[:200].decode("utf-8", "ignore")
    return f"{name}_" if name in ("0ok", "1failed") or name.endswith(".err") else name


def _distinct_names(
    endpoints: Collection[Endpoint], used: Mapping[Endpoint, str]
) -> dict[Endpoint, str]:
    """For each endpoint the shortest text that no other has, even where case is ignored, made safe
    as a file's name; names in use stay. Hosts that differ by case alone are one.
    """
    named: dict[Endpoint, Endpoint] = {}
    for endpoint in (*used, *endpoints):
        named.setdefault(_caseless(endpoint), endpoint)
    names = dict(used)
    taken = {name.casefold() for name in used.values()}
    for form in _NAME_FORMS:
        texts = {endpoint: _file_name(endpoint, form) for endpoint in named.values()}
        counts = collections.Counter(map(str.casefold, texts.values()))
        for endpoint, text in texts.items():
            alike = text.casefold()
            if endpoint not in names and counts[alike] == 1 and alike not in taken:
                names[endpoint] = text
                taken.add(alike)
        if len(names) == len(named):
            break
    # those left differ by refused characters, or by the case of a user, only
    for number, (endpoint, text) in enumerate(texts.items(), 1):
        names.setdefault(endpoint, f"{text}~{number}")
    return {endpoint: names[named[_caseless(endpoint)]] for endpoint in endpoints}


def _caseless(endpoint: Endpoint) -> Endpoint:
    user, host, port = endpoint
    return user, host.lower(), port


def _write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Replace a file at once, for its owner's eyes only; a link is followed, and what is no file
    (/dev/null) is written to.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        Path(path).write_text(text, "utf-8")
        return
    place = os.path.realpath(path)
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(place), prefix=".apssh-")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, place)
    except BaseException:
        os.unlink(temporary)
        raise


_HOST = r"(?!-)[\w-]{1,63}(\.[\w-]{1,63})*\.?|[0-9a-fA-F.]*:[0-9a-fA-F:.]*(%[\w.-]+)?"


def _is_host(text: str) -> bool:
    if len(text) > 253 or not re.fullmatch(_HOST, text):
        return False
    try:
        return ":" not in text or bool(ipaddress.IPv6Address(text))
    except ValueError:
        return False


# What OpenSSH takes since 9.6, less what would read as something else in a list of targets.
_USER = rf"(?!-)[^\s{_CONTROLS}'\"`$;&<>|(){{}}\[\],#→]+(?<!\\)"


@dataclasses.dataclass(frozen=True, slots=True)
class Hop:
    """One host on the way; what is None is for the config to say, then for the defaults."""

    host: str
    user: str | None = None
    port: int | None = None

    def __str__(self) -> str:
        return _endpoint_text(self.host, self.user, self.port)


def _parse_hop(text: str, target: str, login: str | None, port: int | None = None) -> Hop:
    """One hop of a target; ``login`` and ``port`` are for what it does not say."""
    user, at, address = text.rpartition("@")
    host, colon, digits = address, "", ""
    # with more than one colon it is an IPv6 address, whose port comes after brackets
    if not address.endswith("]") and (address.startswith("[") or address.count(":") == 1):
        host, colon, digits = address.rpartition(":")
    if colon:
        port = int(digits) if re.fullmatch("[0-9]{1,5}", digits) else 0
    hop = Hop(host.removeprefix("[").removesuffix("]"), user if at else login, port)
    if problem := _problem(hop):
        raise UsageError(f"{_brief(target)}: {problem}")
    return hop


def _problem(hop: Hop) -> str:
    """Why this can be no hop, or nothing."""
    if not hop.host:
        return "a host is missing"
    if re.fullmatch(r"\w[\w.-]*-", hop.host):
        return "no name ends in '-'; quote 'gw->host'"
    if hop.host.isdecimal():  # 10 would be 0.0.0.10
        return "a bare number is no host; an address is written whole, as 10.0.0.10"
    if not _is_host(hop.host):
        return f"'{_brief(hop.host)}' is not a host name or an address"
    if hop.user is not None and not re.fullmatch(_USER, hop.user):
        return f"'{_brief(hop.user)}' is not a user name"
    if hop.port is not None and not 0 < hop.port < 65536:
        return "a port is a number from 1 to 65535"
    return ""


def _reason(exc: BaseException) -> str:
    """Why a file operation failed, in a few words."""
    if isinstance(exc, asyncssh.SFTPError):
        return _brief(exc.reason[:1].lower() + exc.reason[1:], 200)
    if isinstance(exc, OSError):
        return (exc.strerror or str(exc)).lower()
    return escape(str(exc))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


# --------------------------------------------------------------------------------------------------
# formatters: events in, bytes out
# --------------------------------------------------------------------------------------------------


class _Screen:
    """Standard output and error, shared by all that writes to them, with at most one line of
    progress on a terminal.

    Attributes: ``colour`` (auto, always or never); ``out``: the standard output, while others'
    prints are sent elsewhere; ``closed``: nobody reads standard output any more.
    """

    def __init__(self) -> None:
        self.colour = "auto"
        self.out: TextIO | None = None
        self.closed = False
        self._progress = ""
        self._shown = False
        self._mid_line = False  # what a host printed waits for its end: no progress there

    def write(self, data: bytes, *, err: bool = False, raw: bool = False) -> None:
        """Write at once; what a host sent has no power over a terminal, unless raw."""
        stream = self._stream(err)
        terminal = stream.isatty()
        if terminal and not raw:
            data = _escape_bytes(data)
        self._erase()
        try:
            self._write_all(stream, data)
        except BrokenPipeError:
            self.closed = self.closed or not err
            raise
        if data and terminal:
            self._mid_line = not data.endswith(b"\n")
        if self._progress:
            self.show(self._progress)

    def say(self, text: str) -> None:
        """One message of apssh's own, on stderr."""
        with contextlib.suppress(OSError):  # whom could we tell?
            self.write(text.encode("utf-8", "backslashreplace") + b"\n", err=True)

    def paint(self, text: str, code: str, *, err: bool = True) -> str:
        """The text in a colour (a number of SGR) where colour is wanted: --color says, else
        NO_COLOR, else whether the stream is a terminal.
        """
        wanted = self.colour == "always"
        if self.colour == "auto":
            wanted = not os.environ.get("NO_COLOR") and self._stream(err).isatty()
        return f"\x1b[{code}m{text}\x1b[0m" if wanted else text

    def show(self, progress: str) -> None:
        """Put this line at the bottom of the terminal (empty: take it away)."""
        self._erase()
        self._progress = progress
        self._shown = bool(progress) and not self._mid_line
        if self._shown:
            sys.stderr.write(progress[: shutil.get_terminal_size().columns - 1])
            sys.stderr.flush()

    def _stream(self, err: bool) -> TextIO:
        if err:
            return sys.stderr
        return self.out or sys.stdout

    def _write_all(self, stream: TextIO, data: bytes) -> None:
        """Bytes as they are; an unbuffered stream (python -u) may take a part only."""
        binary: BinaryIO | None = getattr(stream, "buffer", None)
        if binary is None:  # a notebook, a StringIO
            stream.write(data.decode("utf-8", "replace"))
        else:
            stream.flush()
            rest = memoryview(data)
            while rest:
                rest = rest[binary.write(rest) :]
        stream.flush()

    def _erase(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._shown = False


_screen = _Screen()


class _Sink(Protocol):
    """Where the two streams of one command go, in the order they arrive."""

    def data(self, data: bytes, datatype: int | None) -> None:
        """What came, of stdout (None) or stderr (EXTENDED_DATA_STDERR)."""

    def end(self) -> None:
        """Nothing more comes."""


class _Lines:
    """Cuts a stream into whole lines; holds at most LINE_LIMIT bytes."""

    def __init__(self, raw: bool) -> None:
        self._rest = bytearray()
        self._raw = raw

    def feed(self, data: bytes) -> bytes:
        """The whole lines that are there now; the rest is kept."""
        cut = data.rfind(b"\n") + 1
        if cut:
            whole = b"".join((self._rest, data[:cut]))
            self._rest = bytearray(data[cut:])
            return whole
        self._rest += data
        return self.end() if len(self._rest) >= LINE_LIMIT else b""

    def end(self) -> bytes:
        """What is left, made a line (raw: as it is)."""
        if self._rest and not self._raw:
            self._rest += b"\n"
        rest, self._rest = bytes(self._rest), bytearray()
        return rest


class _LineSink:
    """The usual sink: whole lines, handed to a formatter."""

    def __init__(self, formatter: Formatter, endpoint: Endpoint) -> None:
        self._formatter, self._endpoint = formatter, endpoint
        self._streams = {each: _Lines(formatter.raw) for each in (None, EXTENDED_DATA_STDERR)}

    def data(self, data: bytes, datatype: int | None) -> None:
        self._pass(self._streams[datatype].feed(data), datatype)

    def end(self) -> None:
        for datatype, lines in self._streams.items():
            self._pass(lines.end(), datatype)

    def _pass(self, lines: bytes, datatype: int | None) -> None:
        if lines:
            self._formatter.endpoint_lines(self._endpoint, lines, datatype)


class _ScreenSink:
    """Bytes as they come, unfinished lines too: for the one host that somebody talks to."""

    def data(self, data: bytes, datatype: int | None) -> None:
        _screen.write(data, err=datatype is not None, raw=True)

    def end(self) -> None:
        """Nothing is held."""


class _HeldSink:
    """Holds what a command prints, up to CAPTURE_LIMIT; ``passed`` (if any) sees stderr in its
    place.
    """

    def __init__(self, passed: _Sink | None = None) -> None:
        self.pieces: dict[int | None, list[bytes]] = {None: [], EXTENDED_DATA_STDERR: []}
        self._size = 0
        self._passed = passed

    def data(self, data: bytes, datatype: int | None) -> None:
        if datatype and self._passed:
            self._passed.data(data, datatype)
            return
        self._size += len(data)
        if self._size > CAPTURE_LIMIT:
            raise ApsshError(f"more than {CAPTURE_LIMIT // 1024**2} MiB of output to hold")
        self.pieces[datatype].append(data)

    def end(self) -> None:
        if self._passed:
            self._passed.end()

    def stdout(self) -> bytes:
        return b"".join(self.pieces[None])

    def stderr(self) -> bytes:
        return b"".join(self.pieces[EXTENDED_DATA_STDERR])


_FIELD = r"\{(\w+)\}"
_FIELDS = ("time", "host", "fqdn", "user", "line", "linenl", "nl")

# SGR codes of the host column: both are readable on dark and on light, differ for eyes that see no
# red or green, and leave red to failures
_HOST_COLOUR = {False: "36", True: "35"}  # cyan for stdout, magenta for stderr


class Formatter:
    """Shows what hosts print, and (with ``verbose``) what happens to connections.

    Subclasses may redefine ``line``, and any of the events; the methods whose names speak of
    endpoints (user, host, port) are how nodes reach a formatter. ``custom_format`` is a template of
    strftime's fields and ``{time}`` (%H-%M-%S), ``{host}`` (short name), ``{fqdn}``, ``{user}``
    (``user@``), ``{line}``, ``{linenl}``, ``{nl}``; an unknown field raises UsageError. Text from a
    host is never read as a template.
    """

    custom_format = "{linenl}"
    # bytes as they are: nothing escaped on a terminal, no newline added, long lines not cut
    raw = False

    verbose = False
    # whether lines go to the screen, where host columns may be coloured
    _on_screen = True
    # whose lines are being handed to ``line``, which is told no more than the host
    _speaker: Endpoint = ("", "", 22)
    _endpoints: dict[Endpoint, None]
    _verbose_hosts: set[str]
    _names: dict[Endpoint, str]
    _columns: dict[Endpoint, dict[str, str]]

    def __new__(cls, *args: object, **keywords: object) -> Self:
        """State that a subclass has even when its constructor does not call this one's."""
        self = super().__new__(cls)
        self._endpoints, self._verbose_hosts, self._names, self._columns = {}, set(), {}, {}
        return self

    def __init__(self, custom_format: str | None = None, verbose: bool = False) -> None:
        self.verbose = verbose
        if custom_format is not None:
            self.custom_format = custom_format
        for field in re.findall(_FIELD, self.custom_format):
            if field not in _FIELDS:
                raise UsageError(
                    f"unknown field {{{field}}} in format {self.custom_format!r}: the fields are "
                    + " ".join(f"{{{name}}}" for name in _FIELDS)
                )

    # events; the ones about connections and sessions are words on stderr, when asked

    def connection_made(self, hostname: str, username: str, direct: bool) -> None:
        """A TCP connection (direct), or a channel of a gateway, is there."""
        self._event(
            hostname, f"connected as {username}" + ("" if direct else ", through a gateway")
        )

    def connection_lost(self, hostname: str, exc: Exception | None, username: str) -> None:
        """The connection has ended; ``exc`` says why, None when it was closed on purpose."""
        self._event(hostname, f"connection lost: {exc}" if exc else "connection closed")

    def auth_completed(self, hostname: str, username: str) -> None:
        """The login succeeded."""
        self._event(hostname, f"logged in as {username}")

    def session_start(self, hostname: str, command: str) -> None:
        """A command starts."""
        self._event(hostname, f"starts: {command}")

    def session_stop(self, hostname: str, command: str) -> None:
        """A command has ended."""
        self._event(hostname, f"ended: {command}")

    def sftp_start(self, hostname: str) -> None:
        """An SFTP session starts."""
        self._event(hostname, "SFTP session starts")

    def sftp_stop(self, hostname: str) -> None:
        """An SFTP session has ended."""
        self._event(hostname, "SFTP session ended")

    def line(self, line: str, datatype: int | None, hostname: str) -> None:
        """One line of output, newline included; ``datatype`` is EXTENDED_DATA_STDERR for stderr,
        None for stdout.

        Text is UTF-8 decoded with surrogateescape. Made to be redefined; a subclass may call it
        with another text.
        """
        endpoint = self._speaker
        if endpoint[1] != hostname:
            known = (each for each in self._endpoints if each[1] == hostname)
            endpoint = next(known, ("", hostname, 22))
        self._show(endpoint, line.encode("utf-8", "surrogateescape"), datatype)

    def stderr_line(self, line: str, hostname: str) -> None:
        """One line of apssh's own about a host."""
        self.line(line, EXTENDED_DATA_STDERR, hostname)

    # what nodes tell and ask; an endpoint is (user, host, port)

    def add_endpoint(
        self, endpoint: Endpoint, verbose: bool = False, before: Endpoint | None = None
    ) -> None:
        """A node that shares this formatter: names and columns are chosen among them. ``verbose``:
        its events are shown; ``before``: what this node was until now.
        """
        if verbose:
            self._verbose_hosts.add(endpoint[1])
        if before and before != endpoint:
            self._endpoints.pop(before, None)
            self._names.pop(before, None)
        if endpoint not in self._endpoints:
            self._endpoints[endpoint] = None
            self._columns.clear()

    def endpoint_name(self, endpoint: Endpoint) -> str:
        """The short name of an endpoint, which no other has; it stays once it was used."""
        if endpoint not in self._names:
            self._names = _distinct_names(self._endpoints, self._names)
        return self._names.get(endpoint) or _file_name(endpoint, "domain")

    def endpoint_sink(self, endpoint: Endpoint) -> _Sink:
        """Where one command's output goes: by default whole lines, to this formatter."""
        return _LineSink(self, endpoint)

    def endpoint_started(self, endpoint: Endpoint) -> None:
        """A command is about to run there."""

    def endpoint_lines(self, endpoint: Endpoint, lines: bytes, datatype: int | None) -> None:
        """Whole lines of one stream; a subclass that redefines ``line`` gets them one by one."""
        if type(self).line is Formatter.line:
            self._show(endpoint, lines, datatype)
            return
        self._speaker = endpoint
        try:
            for line in io.BytesIO(lines):
                self.line(line.decode("utf-8", "surrogateescape"), datatype, endpoint[1])
        finally:
            self._speaker = Formatter._speaker

    # inside

    def _event(self, hostname: str, text: str) -> None:
        if self.verbose or hostname in self._verbose_hosts:
            _screen.say(f"{escape(hostname)}: {escape(text)}")

    def _show(self, endpoint: Endpoint, lines: bytes, datatype: int | None) -> None:
        self._write(endpoint, self._render(endpoint, lines, datatype), datatype)

    def _write(self, endpoint: Endpoint, data: bytes, datatype: int | None) -> None:
        """Rendered lines on their way out."""
        _screen.write(data, err=datatype is not None, raw=self.raw)

    # The template is filled once a chunk, and each of the chunk's lines put in by one ``replace``: a
    # call a line would cost ten times more. It is cut where the line goes before anything is filled
    # in, and strftime sees nothing but the format itself: no text of a host is read as a template.
    def _render(self, endpoint: Endpoint, lines: bytes, datatype: int | None) -> bytes:
        """Each line put in the format; what follows the last one ends with a newline, since lines
        of two hosts never share one.
        """
        form = self.custom_format.replace("{time}", "%H-%M-%S").replace("{linenl}", "{line}{nl}")
        if "%" in form:
            form = time.strftime(form)
        if not form.endswith(("{nl}", "\n")):
            form += "{nl}"
        fields = self._fields(endpoint)

        def fill(match: re.Match[str]) -> str:
            value = fields.get(match[1], match[0])
            if match[1] not in ("host", "fqdn") or not self._on_screen:
                return value
            err = datatype is not None
            return _screen.paint(value, _HOST_COLOUR[err], err=err)

        parts = [os.fsencode(re.sub(_FIELD, fill, part)) for part in form.split("{line}")]
        if len(parts) != 2:
            return b"".join(line.rstrip(b"\n").join(parts) for line in io.BytesIO(lines))
        head, tail = parts
        if not head and tail == b"\n":
            return lines
        return head + lines.removesuffix(b"\n").replace(b"\n", tail + head) + tail

    def _fields(self, endpoint: Endpoint) -> dict[str, str]:
        """What the format may say of an endpoint, as wide as the widest of all."""
        if endpoint not in self._columns:
            user, fqdn, _ = endpoint
            name = self.endpoint_name(endpoint)
            self._columns[endpoint] = {
                "host": name.ljust(max(map(len, self._names.values()), default=0)),
                "fqdn": fqdn.ljust(max((len(each[1]) for each in self._endpoints), default=0)),
                "user": f"{user}@" if user else "",
                "nl": "\n",
            }
        return self._columns[endpoint]


class TerminalFormatter(Formatter):
    """Stdout to stdout, stderr to stderr, in the format given (required here)."""

    def __init__(self, custom_format: str, verbose: bool = False) -> None:
        super().__init__(custom_format, verbose)


class RawFormatter(Formatter):
    """What hosts print, and nothing else: bytes as they were sent (lines of several hosts are kept
    whole).
    """

    raw = True


class _LiveFormatter(RawFormatter):
    """What the one host of a run prints, as it comes, unfinished lines (a prompt) too."""

    def endpoint_sink(self, endpoint: Endpoint) -> _Sink:
        return _ScreenSink()


class HostFormatter(Formatter):
    """Each line after the name of its host."""

    custom_format = "{host}:{linenl}"


class TimeHostFormatter(Formatter):
    """Each line after the time and the name of its host."""

    custom_format = "{time}:{host}:{linenl}"


# older names, in published tutorials
ColonFormatter = HostFormatter
TimeColonFormatter = TimeHostFormatter


class SubdirFormatter(Formatter):
    """Files instead of a terminal: ``<run_name>/<hostname>`` for stdout, ``<hostname>.err`` for
    stderr (if any).
    """

    _on_screen = False

    def __init__(self, run_name: str | os.PathLike[str], verbose: bool = False) -> None:
        super().__init__(None, verbose)
        self.run_name = Path(run_name)
        self._begun: set[Path] = set()

    def endpoint_started(self, endpoint: Endpoint) -> None:
        errors = self._path(endpoint, EXTENDED_DATA_STDERR)
        if errors not in self._begun:
            errors.unlink(missing_ok=True)  # of another run
        self._write(endpoint, b"", None)

    def _path(self, endpoint: Endpoint, datatype: int | None) -> Path:
        return self.run_name / (self.endpoint_name(endpoint) + (".err" if datatype else ""))

    def _write(self, endpoint: Endpoint, data: bytes, datatype: int | None) -> None:
        path = self._path(endpoint, datatype)
        begin = os.O_APPEND
        if path not in self._begun:
            self._begun.add(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            begin = os.O_TRUNC
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | begin, 0o666)
        with open(fd, "ab") as file:
            file.write(data)


class CaptureFormatter(Formatter):
    """Holds stdout, at most CAPTURE_LIMIT bytes; stderr is shown. Captures from its creation."""

    _on_screen = False

    def __new__(cls, *args: object, **keywords: object) -> Self:
        self = super().__new__(cls)
        self.start_capture()
        return self

    def start_capture(self) -> None:
        """Forget what was captured so far."""
        self._held = _HeldSink()

    def get_capture(self) -> str:
        """What was printed on stdout since the last ``start_capture()`` (UTF-8, surrogateescape)."""
        return self._held.stdout().decode("utf-8", "surrogateescape")

    def _write(self, endpoint: Endpoint, data: bytes, datatype: int | None) -> None:
        if datatype:
            super()._write(endpoint, data, datatype)
        else:
            self._held.data(data, None)


# --------------------------------------------------------------------------------------------------
# credentials: keys, agent, passphrases; known hosts and their policy; what ssh -G says of a host
# --------------------------------------------------------------------------------------------------

Key = Any  # asyncssh.SSHKey, an SSHKeyPair, a (key, certificate) pair, or an _AgentKey


@dataclasses.dataclass(frozen=True, eq=False)
class _AgentKey:
    """A key that an agent holds; signing goes through the agent, at each login."""

    agent_path: str
    public_data: bytes = dataclasses.field(repr=False)
    comment: str


_imported: dict[
    bytes, asyncssh.SSHKey
] = {}  # digest of the file: a passphrase is asked once for the whole run
_import_lock = threading.Lock()
_accepted_keys: set[bytes] = set()  # public keys that logged in: offered first to the next hosts


@contextlib.contextmanager
def _ctrl_c_raises() -> Iterator[None]:
    """Ctrl-C is KeyboardInterrupt while this thread is blocked: a loop's own handler would wait for
    what we wait for.
    """
    handler = signal.getsignal(signal.SIGINT)
    module = str(
        getattr(getattr(handler, "func", handler), "__module__", "")
    )  # a user's own, or one that ignores it, stays
    loops = threading.current_thread() is threading.main_thread() and (
        module.startswith("asyncio.") or module == __name__
    )
    if loops:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if loops:
            signal.signal(signal.SIGINT, handler)


def _ask_secret(prompt: str) -> str:
    """Asked on the terminal itself, never on standard input."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        raise UsageError(f"no terminal to ask: {prompt}") from None
    try:
        with _ctrl_c_raises():
            return getpass.getpass(f"{prompt}: ")
    except EOFError:
        raise UsageError(f"no answer: {prompt}") from None


def import_private_key(filename: str | os.PathLike[str]) -> asyncssh.SSHKey:
    """Load one private key; an encrypted one asks for its passphrase on the terminal, once for the
    whole run.

    Raises UsageError when the file is missing, unreadable or not a private key, when the passphrase
    is wrong three times, and when it is encrypted and there is no terminal.
    """
    path = Path(filename).expanduser()
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise UsageError(f"key {escape(str(path))}: {_reason(exc)}") from None
    digest = hashlib.sha256(data).digest()
    with _import_lock:
        if digest not in _imported:
            _imported[digest] = _decode_key(path, data)
        return _imported[digest]


def _decode_key(path: Path, data: bytes) -> asyncssh.SSHKey:
    """The key in the text of a file, with its passphrase if it needs one."""
    try:
        return asyncssh.import_private_key(data)
    except ValueError as exc:
        if "assphrase" not in str(exc):
            raise UsageError(f"key {path}: not a private key ({exc})") from None
    for _ in range(3):
        secret = _ask_secret(f"passphrase for key {path}")
        with contextlib.suppress(ValueError):
            return asyncssh.import_private_key(data, secret)
    raise UsageError(f"key {path}: wrong passphrase")


def load_agent_keys(agent_path: str | None = None) -> list[Key]:
    """The keys of the agent at this socket (default: SSH_AUTH_SOCK); none when there is no agent."""
    path = agent_path or os.environ.get("SSH_AUTH_SOCK", "")

    async def load() -> list[Key]:
        async with _agent_pairs(path) as pairs:
            return [_AgentKey(path, data, pair.get_comment() or "") for data, pair in pairs.items()]

    if not path:
        return []
    with ThreadPoolExecutor(1) as thread:  # works inside of a running loop as well
        return thread.submit(asyncio.run, load()).result()


@contextlib.asynccontextmanager
async def _agent_pairs(path: str) -> AsyncIterator[dict[bytes, asyncssh.SSHKeyPair]]:
    """What the agent at this socket can sign with, by public key; empty when it does not answer."""
    agent, pairs = None, {}
    with contextlib.suppress(OSError, ValueError, asyncssh.Error):
        async with asyncio.timeout(5):
            agent = await asyncssh.connect_agent(path)
            pairs = {pair.public_data: pair for pair in await agent.get_keys()}
    try:
        yield pairs
    finally:
        if agent:
            agent.close()
            await agent.wait_closed()


def _key_from_file(filename: str, agent_keys: Callable[[], list[Key]]) -> list[Key]:
    """What a named key file stands for: the agent's key when it holds it, else the file, with its
    certificate.
    """
    path = Path(filename).expanduser()
    certificates: list[asyncssh.SSHCertificate] = []
    with contextlib.suppress(OSError, ValueError):
        certificates = [
            asyncssh.read_certificate(path.with_name(path.name.removesuffix(".pub") + "-cert.pub"))
        ]
    with contextlib.suppress(OSError, ValueError):
        public = path if path.suffix == ".pub" else path.with_name(path.name + ".pub")
        data = asyncssh.read_public_key(public).public_data
        if held := [key for key in agent_keys() if key.public_data == data]:
            return [(held[0], certificate) for certificate in certificates] + held
    key = import_private_key(path)
    return [(key, certificate) for certificate in certificates] or [key]


def _usable_keys(files: Sequence[str], agent_keys: Callable[[], list[Key]]) -> list[Key]:
    """What these files (none: the default ones that exist) stand for; one that cannot be used is
    skipped, as ssh does.
    """
    keys: list[Key] = []
    for file in files or [
        each for each in DEFAULT_KEYS if os.path.exists(os.path.expanduser(each))
    ]:
        try:
            keys += _key_from_file(file, agent_keys) if file != "none" else []
        except UsageError as exc:
            _screen.say(f"skipped: {exc}")
    return keys


def load_private_keys(
    command_line_keys: Collection[str | os.PathLike[str] | Key] | None = None, verbose: bool = False
) -> list[Key]:
    """The keys to log in with: those named, and only they; else the agent's; else
    ~/.ssh/id_ed25519, id_ecdsa, id_rsa and their _sk forms, as far as they exist.

    A named key that the agent holds too is used through the agent; a certificate beside a key
    (``key-cert.pub``) goes with it. Works with or without a running loop. Raises UsageError for a
    named key that does not exist or parse.
    """
    agent_keys = functools.cache(load_agent_keys)
    keys: list[Key] = []
    if command_line_keys:
        for named in command_line_keys:
            keys += (
                _key_from_file(os.fspath(named), agent_keys)
                if isinstance(named, str | os.PathLike)
                else [named]
            )
    else:
        keys = list(agent_keys()) or _usable_keys((), agent_keys)
    if verbose:
        _screen.say(f"{len(keys)} key(s) to log in with")
    return keys


@contextlib.asynccontextmanager
async def _login_pairs(keys: Iterable[Key]) -> AsyncIterator[list[asyncssh.SSHKeyPair]]:
    """Fresh key pairs for one login (asyncssh keeps a login's signature algorithm in them), best
    candidates first.
    """
    async with contextlib.AsyncExitStack() as stack:
        agents: dict[str, dict[bytes, asyncssh.SSHKeyPair]] = {}
        pairs: dict[bytes, asyncssh.SSHKeyPair] = {}
        for key in keys:
            certificate = None
            if isinstance(key, tuple) and isinstance(key[0], _AgentKey):
                key, certificate = key
            if isinstance(key, _AgentKey):
                if key.agent_path not in agents:
                    agents[key.agent_path] = await stack.enter_async_context(
                        _agent_pairs(key.agent_path)
                    )
                held = agents[key.agent_path].get(key.public_data)
                fresh = [held] if held else []
            else:
                fresh = list(asyncssh.load_keypairs([key]))
            for pair in map(copy.copy, fresh):
                if certificate:
                    pair.set_certificate(certificate)
                pairs.setdefault(pair.public_data, pair)
        yield sorted(pairs.values(), key=lambda pair: pair.public_data not in _accepted_keys)


# known hosts: sshd(8), "SSH_KNOWN_HOSTS FILE FORMAT"


@dataclasses.dataclass(frozen=True, eq=False)
class _KnownKey:
    """One line of a known_hosts file."""

    marker: str  # "", "@revoked" or "@cert-authority"
    algorithm: str
    blob: bytes
    file: str
    line: int

    @functools.cached_property
    def public(self) -> asyncssh.SSHKey | None:
        """None where the data is no key, or of a type unheard of: ssh skips such a line."""
        with contextlib.suppress(ValueError, OverflowError):
            return asyncssh.import_public_key(
                f"{self.algorithm} {base64.b64encode(self.blob).decode()}"
            )
        return None

    def __str__(self) -> str:
        return f"{_fingerprint(self.algorithm, self.blob)} in {self.file}:{self.line}"


def _fingerprint(algorithm: str, blob: bytes) -> str:
    """As ssh shows it: ED25519 SHA256:..."""
    digest = base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")
    kind = re.sub(r"^(sk-)?(ssh-|(ecdsa)-sha2-nistp\d+)", r"\3", algorithm.split("@")[0]).upper()
    return f"{kind}{'-SK' if algorithm.startswith('sk-') else ''} SHA256:{digest}"


def _matches_patterns(
    patterns: Iterable[str], name: str, flags: re.RegexFlag = re.IGNORECASE
) -> bool:
    """OpenSSH's pattern lists: ``*`` and ``?``, and ``!`` which excludes whatever else matches."""
    matching = [
        pattern
        for pattern in patterns
        if re.fullmatch(
            re.escape(pattern.lstrip("!")).replace(r"\*", ".*").replace(r"\?", "."), name, flags
        )
    ]
    return bool(matching) and not any(pattern.startswith("!") for pattern in matching)


_INNER, _OUTER = (bytes(byte ^ pad for byte in range(256)) for pad in (0x36, 0x5C))  # RFC 2104


def _hmac_states(salt: bytes) -> tuple[Any, Any]:
    """HMAC-SHA1 under this key as far as it is the same for all names: asking for a name then costs
    a third of hmac.digest.
    """
    key = salt.ljust(64, b"\0")
    return hashlib.sha1(key.translate(_INNER)), hashlib.sha1(key.translate(_OUTER))


class _KnownHosts:
    """Some known_hosts files, parsed once as long as they do not change; the first is the one that
    is written to.
    """

    _of_files: ClassVar[dict[tuple[str, ...], _KnownHosts]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, files: tuple[str, ...]) -> None:
        self._files = files
        self._stamp: object = None

    @classmethod
    def of(cls, files: Iterable[str]) -> _KnownHosts:
        """These files, as they are now."""
        paths = tuple(os.path.expanduser(file) for file in files)
        known = cls._of_files.setdefault(paths, cls(paths))
        with cls._lock:
            known._refresh()
        return known

    def _refresh(self) -> None:
        """Parse again if a file has changed."""
        if self._stamp == (stamp := self._stamp_now()):
            return
        self._stamp = stamp
        self._plain: dict[str, list[_KnownKey]] = {}
        self._hashed: dict[bool, list[tuple[Any, Any, bytes, _KnownKey]]] = {
            False: [],
            True: [],
        }  # by: has a marker
        self._patterns: list[tuple[list[str], _KnownKey]] = []
        self._lines = 0  # of the first file
        for file in self._files:
            with (
                contextlib.suppress(OSError),
                open(file, encoding="utf-8", errors="surrogateescape", newline="\n") as lines,
            ):
                for number, line in enumerate(lines, 1):
                    self._parse(line, file, number)
                    self._lines += file == self._files[0]

    def _stamp_now(self) -> list[tuple[int, int, int] | None]:
        stamps: list[tuple[int, int, int] | None] = []
        for file in self._files:
            try:
                info = os.stat(file)
                stamps.append((info.st_ino, info.st_size, info.st_mtime_ns))
            except OSError:
                stamps.append(None)
        return stamps

    def _parse(self, line: str, file: str, number: int) -> None:
        """A line that is not one is skipped, as ssh does."""
        fields = line.split(maxsplit=4)
        marker = fields.pop(0) if fields and fields[0].startswith("@") else ""
        if (
            len(fields) < 3
            or fields[0].startswith("#")
            or marker not in ("", "@revoked", "@cert-authority")
        ):
            return
        try:
            blob = base64.b64decode(fields[2], validate=True)
            if blob[4 : 4 + int.from_bytes(blob[:4], "big")] != fields[1].encode():
                return
            key = _KnownKey(marker, fields[1], blob, file, number)
            if fields[0].startswith("|1|"):
                salt, digest = map(base64.b64decode, fields[0].split("|")[2:])
                self._hashed[bool(marker)].append((*_hmac_states(salt), digest, key))
                return
        except ValueError:
            return
        names = fields[0].split(",")
        if any(mark in fields[0] for mark in "*?!"):
            self._patterns.append((names, key))
        else:
            for name in names:
                self._plain.setdefault(name.lower(), []).append(key)

    def find(self, name: str, *, marked: bool = False) -> list[_KnownKey]:
        """The lines about a name (``host``, or ``[host]:port``); ``marked``: of the hashed ones
        those that have a marker will do.
        """
        name = name.lower()
        data = name.encode("utf-8", "surrogateescape")
        found = list(self._plain.get(name, ()))
        for inner, outer, digest, key in itertools.chain(
            () if marked else self._hashed[False], self._hashed[True]
        ):
            (first := inner.copy()).update(data)
            (second := outer.copy()).update(first.digest())
            if second.digest() == digest:
                found.append(key)
        found += [key for patterns, key in self._patterns if _matches_patterns(patterns, name)]
        return [key for key in found if key.public]

    def record(self, name: str, key: asyncssh.SSHKey, hashed: bool) -> str | None:
        """Append a line for this name, unless it is there; None, or why that cannot be."""
        path = Path(self._files[0])
        public = key.export_public_key().decode().split()[:2]
        try:
            with self._lock:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                with open(
                    os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "r+b"
                ) as file:
                    fcntl.flock(file, fcntl.LOCK_EX)
                    self._refresh()  # somebody else may have added it
                    if known := [each for each in self.find(name) if not each.marker]:
                        same = any(each.blob == key.public_data for each in known)
                        return None if same else f"its key was not recorded: known is {known[0]}"
                    size = file.seek(0, os.SEEK_END)
                    file.seek(max(size - 1, 0))
                    newline = b"" if file.read(1) in (b"", b"\n") else b"\n"
                    if hashed:
                        salt = os.urandom(20)
                        parts = (salt, hmac.digest(salt, name.lower().encode(), "sha1"))
                        name = "|1|" + "|".join(base64.b64encode(part).decode() for part in parts)
                    text = f"{name} {' '.join(public)}\n"
                    file.write(newline + text.encode())
                    file.flush()
                    self._lines += 1
                    self._parse(text, str(path), self._lines)
                    self._stamp = self._stamp_now()
        except OSError as exc:
            return f"its key could not be recorded in {path}: {_reason(exc)}"
        return None


_POLICIES = ("accept-new", "ask", "yes", "no")  # ask means accept-new: nobody is asked


def _host_key_policy(host: str, given: str | None, configured: str | None) -> str:
    """The policy for a host: what was given, else APSSH_HOST_KEYS, else the ssh config's, else
    accept-new.
    """
    variable = os.environ.get("APSSH_HOST_KEYS", "")
    policy, colon, patterns = variable.partition(":")
    if policy not in ("", *_POLICIES):
        raise UsageError(
            f"APSSH_HOST_KEYS={escape(variable)}: write accept-new, yes or no, perhaps with host patterns: no:fit*,node[1-9]*"
        )
    matching = [
        word
        for each in patterns.split(",")
        if fnmatch.fnmatchcase(host, (word := each.strip()).removeprefix("!"))
    ]
    if (
        given is None
        and variable
        and (not colon or (matching and not any(word.startswith("!") for word in matching)))
    ):
        given = policy
    given = given or configured or "accept-new"
    if given not in _POLICIES:
        raise UsageError(f"host key policy {escape(given)}: accept-new, yes or no")
    return "accept-new" if given == "ask" else given


_RSA = ["rsa-sha2-512", "rsa-sha2-256"]
_HOST_KEY_ALGORITHMS = [
    "ssh-ed25519",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    *_RSA,
]
_CERTIFICATE_ALGORITHMS = [
    f"{algorithm}-cert-v01@openssh.com" for algorithm in _HOST_KEY_ALGORITHMS
]


class _Trust:
    """Decides about the key that one host presents; every connection and every hop comes through
    here.
    """

    def __init__(self, node: SshNode, certified: bool = True) -> None:
        self._node = weakref.proxy(node)
        alias, port = node._host_config.host_key_alias, node.port
        self._host = alias or node._address or node.hostname
        self._name = self._host if port == 22 or alias else f"[{self._host}]:{port}"
        self._new: asyncssh.SSHKey | None = None
        self._known: _KnownHosts | None = None
        self.certified = False  # whether certificates are asked for
        self.changed = False  # under policy no: ssh too then sends no password
        given = node.known_hosts
        if given is None or isinstance(given, list | tuple):
            self.policy = "no" if given is None else "yes"
            self._keys = [
                _KnownKey("", key.get_algorithm(), key.public_data, "known_hosts=", 1)
                for key in given or ()
            ]
            self._elsewhere: list[_KnownKey] = []
            return
        self.policy = _host_key_policy(
            node.hostname, node.host_keys, node._host_config.strict_host_key_checking
        )
        self._known = _KnownHosts.of(
            node._known_hosts_files if given is _VERIFY else [os.fspath(given)]
        )
        self._keys = self._known.find(self._name)
        self._elsewhere = (
            self._known.find(self._host, marked=any(not key.marker for key in self._keys))
            if self._name != self._host
            else []
        )
        self.certified = certified and self.policy != "no" and bool(self._marked("@cert-authority"))

    def _marked(self, marker: str) -> list[_KnownKey]:
        """Authorities and revoked keys count whatever the port."""
        return [key for key in self._keys + self._elsewhere if key.marker == marker]

    def algorithms(self) -> list[str]:
        """What to ask of the server: what is configured, else the types that are known of it first."""
        if configured := self._node._host_config.host_key_algorithms:
            allowed = {each.decode() for each in asyncssh.public_key.get_public_key_algs()} | set(
                _CERTIFICATE_ALGORITHMS * self.certified
            )
            return [each for each in configured if each in allowed]
        known = [
            algorithm
            for key in self._keys + self._elsewhere
            if not key.marker
            for algorithm in (_RSA if key.algorithm == "ssh-rsa" else [key.algorithm])
        ]
        certified = _CERTIFICATE_ALGORITHMS if self.certified else []
        return list(dict.fromkeys([*certified, *known, *_HOST_KEY_ALGORITHMS]))

    def check(self, key: asyncssh.SSHKey) -> None:
        """Raises HostKeyError unless this plain key may be the host's."""
        self._node._host_key_shown = shown = _fingerprint(key.get_algorithm(), key.public_data)
        known = [each for each in self._keys if not each.marker]
        matches = any(
            each.blob == key.public_data
            for each in (known or [each for each in self._elsewhere if not each.marker])
        )
        if self.policy == "no":
            self.changed = bool(known) and not matches
            return
        self._check_revoked(key, f"its key {shown} is revoked")
        if matches:
            return
        if known and self._known is None:
            raise self._error(f"it presents {shown}, which is not the key given for it")
        if known:
            raise self._error(
                f"HOST KEY CHANGED: it presents {shown}, known is {known[0]}; somebody may be in the middle. "
                f"If it was reinstalled: ssh-keygen -R '{self._name}' -f {known[0].file} (hosts reinstalled all day: "
                "--host-keys no, known_hosts=None, or APSSH_HOST_KEYS=no:PATTERN)"
            )
        if self.policy == "yes":
            raise self._error(
                f"its key {shown} is not known, and the policy refuses unknown hosts "
                "(--host-keys accept-new records them)"
            )
        self._new = key

    def check_authority(self, key: asyncssh.SSHKey) -> bool:
        """Whether this key may sign certificates for the host; raises HostKeyError if it is
        revoked.
        """
        self._check_revoked(
            key,
            f"its certificate is signed by {_fingerprint(key.get_algorithm(), key.public_data)}, which is revoked",
        )
        return self.certified and any(
            each.blob == key.public_data for each in self._marked("@cert-authority")
        )

    def check_certified(self, key: asyncssh.SSHKey) -> None:
        """Raises HostKeyError if this key, which a certificate vouches for, is revoked."""
        self._node._host_key_shown = shown = _fingerprint(key.get_algorithm(), key.public_data)
        self._check_revoked(key, f"its key {shown} is revoked")

    def _check_revoked(self, key: asyncssh.SSHKey, message: str) -> None:
        revoked = [(each.blob, each.file) for each in self._marked("@revoked")]
        if file := self._node._host_config.revoked_host_keys:
            try:
                if (path := Path(file).expanduser()).read_bytes().startswith(b"SSHKRL"):
                    raise ValueError("a binary list")
                revoked += [
                    (each.public_data, file) for each in asyncssh.read_public_key_list(path)
                ]
            except (OSError, ValueError):
                raise self._error(
                    f"RevokedHostKeys {file} is not a readable list of public keys: no host is trusted"
                ) from None
        for blob, place in revoked:
            if blob == key.public_data:
                raise self._error(f"{message} in {place}")

    def record(self) -> str | None:
        """Record a host never seen; None, or why that could not be done."""
        if self._new is None or self._known is None:
            return None
        return self._known.record(self._name, self._new, self._node._host_config.hash_known_hosts)

    def _error(self, message: str) -> HostKeyError:
        return HostKeyError(escape(message), host=self._node.hostname)


# ssh_config(5), answered by ssh itself


@dataclasses.dataclass(frozen=True, eq=False)
class _HostConfig:
    """What was configured for a host, as ``ssh -G`` tells it; None and () where ssh's default
    stands.
    """

    hostname: str | None = None
    user: str | None = None
    port: int | None = None
    identity_files: tuple[str, ...] = ()
    certificate_files: tuple[str, ...] = ()
    identities_only: bool = False
    identity_agent: str | None = None
    proxy_jump: str | None = None
    proxy_command: str | None = None
    known_hosts_files: tuple[str, ...] = ()
    strict_host_key_checking: str | None = None
    hash_known_hosts: bool = False
    host_key_alias: str | None = None
    connect_timeout: float | None = None
    keepalive: float | None = None
    host_key_algorithms: tuple[str, ...] = ()
    revoked_host_keys: str | None = None
    socket: Mapping[str, Any] = dataclasses.field(
        default_factory=dict
    )  # arguments of loop.create_connection
    login: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # and of asyncssh.connect

    @property
    def names_keys(self) -> bool:
        """Whether it says which keys to offer."""
        return bool(self.identity_files or self.certificate_files or self.identity_agent)


_UNCONFIGURED = _HostConfig()

_SUPPORTED = {  # lists of algorithms: asyncssh's argument, and what it knows
    "ciphers": ("encryption_algs", asyncssh.encryption.get_encryption_algs),
    "kexalgorithms": ("kex_algs", asyncssh.kex.get_kex_algs),
    "macs": ("mac_algs", asyncssh.mac.get_mac_algs),
    "pubkeyacceptedalgorithms": ("signature_algs", asyncssh.public_key.get_public_key_algs),
}
_METHODS = {
    "pubkeyauthentication": "public_key_auth",
    "passwordauthentication": "password_auth",
    "kbdinteractiveauthentication": "kbdint_auth",
}
_NOTHING_SAID = {
    "",
    "host",
    "include",
    "match",
    "sendenv",
    "setenv",
    "gssapiauthentication",
    "compression",
    "loglevel",
    "addkeystoagent",
    "forwardagent",
    "forwardx11",
    "controlmaster",
    "controlpath",
    "controlpersist",
}  # alone: no question


class _SshConfig:
    """The user's ssh configuration (None), that of a file, or none at all (``none``)."""

    def __init__(self, path: str | None) -> None:
        self.trouble = ""
        home = os.path.expanduser("~")
        path = "none" if path == os.devnull else path
        user_file = os.path.join(home, ".ssh", "config")
        with contextlib.suppress(KeyError):
            if (
                path is None and home != pwd.getpwuid(os.getuid()).pw_dir
            ):  # ssh itself does not look at $HOME
                path = user_file if os.path.exists(user_file) else "none"
        if path not in (None, "none") and not os.path.isfile(path or ""):
            raise UsageError(f"ssh config {escape(path or '')}: no such file")
        self._path = path
        self._patterns: list[list[str]] = []
        self._one_by_one = False
        self._keywords: set[str] = set()
        self._names: set[str] = set()
        if path is None:
            self._scan("/etc/ssh/ssh_config", "/etc/ssh", 0)
            self._keywords.discard("hashknownhosts")  # Debian's default
        if path != "none":
            self._scan(path or user_file, os.path.join(home, ".ssh"), 0)

    def _scan(self, file: str, folder: str, depth: int) -> None:
        """Find which keywords there are, and for which host patterns; the values are ssh's to tell."""
        try:
            lines = Path(file).read_text("utf-8", "surrogateescape").splitlines()
        except OSError:
            return
        for line in lines:
            keyword, value = [*re.split(r"\s*=\s*|\s+", line.strip(), maxsplit=1), ""][:2]
            keyword = keyword.lower()
            if keyword.startswith("#"):
                continue
            self._keywords.add(keyword)
            plain = value.replace('"', "")
            if '"' in keyword or (
                keyword in ("include", "host") and re.search(r"""['\\%$]|"[^"]*\s""", value)
            ):
                self._one_by_one = True  # such quoting is ssh's to read
            elif keyword == "include" and depth < 16:
                for pattern in plain.split():
                    for found in sorted(
                        glob.glob(os.path.join(folder, os.path.expanduser(pattern)))
                    ):
                        self._scan(found, folder, depth + 1)
            elif keyword == "host":
                self._patterns.append(plain.split())
            elif (
                (keyword == "match" and value.lower().strip() != "all")
                or keyword == "canonicalizehostname"
                or (keyword in ("hostname", "userknownhostsfile") and "%" in value)
            ):  # ssh -G expands these two
                self._one_by_one = True
            elif keyword == "hostname":
                self._names.add(value.strip(' "').lower())

    def lookup_all(self, hosts: Collection[Hop]) -> dict[Hop, _HostConfig]:
        """What is configured for each host. Raises UsageError when ssh refuses the configuration."""
        if self._path == "none" or not (self._one_by_one or self._keywords - _NOTHING_SAID):
            return dict.fromkeys(hosts, _HostConfig())
        if not shutil.which("ssh"):
            self.trouble = "no ssh program here to read the ssh config: it is not used"
            return dict.fromkeys(hosts, _HostConfig())
        classes: dict[object, list[Hop]] = {}
        for each in hosts:
            key: object = each
            if (
                not self._one_by_one and each.host.lower() not in self._names
            ):  # a HostName equal to what was asked says nothing
                key = tuple(
                    _matches_patterns(patterns, each.host, re.NOFLAG) for patterns in self._patterns
                )
            classes.setdefault(key, []).append(each)
        with ThreadPoolExecutor(8) as pool:
            defaults, *answers = pool.map(
                self._ask,
                ["none", *[self._path] * len(classes)],
                [Hop("default"), *(members[0] for members in classes.values())],
            )
        return {
            each: self._host_config(answer, defaults, members[0].host, each)
            for members, answer in zip(classes.values(), answers, strict=True)
            for each in members
        }

    def _ask(self, path: str | None, hop: Hop) -> dict[str, list[str]]:
        """ssh -G, as keyword to values."""
        words = [
            "ssh",
            *(["-F", path] if path else []),
            *(["-l", hop.user] if hop.user and self._one_by_one else []),
            *(["-p", str(hop.port)] if hop.port and self._one_by_one else []),
            "-G",
            "--",
            hop.host,
        ]
        try:
            done = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                timeout=CONNECT_TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            raise UsageError(
                f"ssh config: no answer about {hop.host} within {CONNECT_TIMEOUT:g} s (a Match exec?)"
            ) from None
        if done.returncode:
            raise UsageError(
                "ssh config: "
                + " ".join(escape(line) for line in os.fsdecode(done.stderr).splitlines())
            )
        answer: dict[str, list[str]] = {}
        for line in os.fsdecode(done.stdout).splitlines():
            keyword, _, value = line.partition(" ")
            answer.setdefault(keyword, []).append(value)
        return answer

    def _host_config(
        self, answer: dict[str, list[str]], defaults: dict[str, list[str]], asked: str, hop: Hop
    ) -> _HostConfig:
        """One host's part of an answer that was asked for another host of its class."""
        host = hop.host

        def get(keyword: str) -> str | None:
            values = answer.get(keyword)
            return (
                values[0]
                if values and values != defaults.get(keyword) and values[0] != "none"
                else None
            )

        def files(keyword: str) -> tuple[str, ...]:
            values = answer.get(keyword, [])
            return () if values == defaults.get(keyword) else tuple(map(expand, values))

        def expand(text: str, quote: bool = False) -> str:
            """ssh_config(5), TOKENS; a name that a shell will see must be harmless."""
            me = getpass.getuser()
            tokens = {
                "h": hostname or host.lower(),
                "n": host,
                "r": hop.user or get("user") or me,
                "u": me,
                "p": str(hop.port or get("port") or 22),
                "d": os.path.expanduser("~"),
                "i": str(os.getuid()),
                "l": socket.gethostname(),
                "%": "%",
                "L": socket.gethostname().partition(".")[0],
                "k": get("hostkeyalias") or host,
            }
            if quote and not all(
                re.fullmatch(r"[\w.:@\[\]%+-]*", tokens[each], re.ASCII) for each in "hnr"
            ):
                raise UsageError(
                    f"{escape(host)}: a host or user name with such characters cannot stand in a ProxyCommand"
                )
            if quote:
                return re.sub(r"%(.)", lambda match: tokens.get(match[1], match[0]), text)
            return os.path.expanduser(
                re.sub(
                    r"%(.)|\$\{(\w+)\}",
                    lambda match: (
                        tokens.get(match[1], match[0])
                        if match[1]
                        else os.environ.get(match[2], match[0])
                    ),
                    text,
                )
            )

        hostname = get("hostname")
        hostname = None if hostname is None or hostname == asked.lower() else hostname
        strict = {"true": "yes", "false": "no"}.get(
            get("stricthostkeychecking") or "", get("stricthostkeychecking")
        )
        command = get("proxycommand")
        jump = get("proxyjump")
        known = [
            os.devnull if file == "none" else file
            for keyword in ("userknownhostsfile", "globalknownhostsfile")
            for value in (answer if keyword in answer else defaults).get(keyword, [])
            for file in re.split(r"\s+(?=[/~%$]|none$|none\s)", value)
        ]  # ssh -G quotes no blank that is in a name
        changed = any(
            answer.get(keyword) != defaults.get(keyword)
            for keyword in ("userknownhostsfile", "globalknownhostsfile")
        )
        agent = {"none": os.devnull}.get(
            answer.get("identityagent", [""])[0], get("identityagent")
        )  # no agent answers there
        login: dict[str, Any] = {
            name: [each for each in value.split(",") if each.encode() in known_algorithms()]
            for keyword, (name, known_algorithms) in _SUPPORTED.items()
            if (value := get(keyword))
        }
        login |= {
            name: False for keyword, name in _METHODS.items() if get(keyword) in ("no", "false")
        }
        if preferred := get("preferredauthentications"):
            login["preferred_auth"] = preferred
        family = {"inet": socket.AF_INET, "inet6": socket.AF_INET6}.get(get("addressfamily") or "")
        connecting: dict[str, Any] = {"family": family} if family else {}
        if bind := get("bindaddress"):
            connecting["local_addr"] = (bind, 0)
        return _HostConfig(
            hostname,
            get("user"),
            int(get("port") or 0) or None,
            files("identityfile"),
            files("certificatefile"),
            get("identitiesonly") == "yes",
            None if agent in (None, "SSH_AUTH_SOCK") else os.path.expandvars(expand(agent)),
            expand(jump, quote=True) if jump else None,
            expand(command, quote=True) if command else None,
            tuple(expand(file) for file in known) if changed else (),
            strict,
            get("hashknownhosts") == "yes",
            get("hostkeyalias"),
            float(get("connecttimeout") or 0) or None,
            float(get("serveraliveinterval") or 0) or None,
            tuple(filter(None, (get("hostkeyalgorithms") or "").split(","))),
            get("revokedhostkeys"),
            connecting,
            login,
        )


def _jumps(config: _HostConfig) -> tuple[Hop, ...]:
    """The hops of a ProxyJump."""
    return (
        tuple(
            _parse_hop(text.removeprefix("ssh://").removesuffix("/"), text, None)
            for text in config.proxy_jump.split(",")
        )
        if config.proxy_jump
        else ()
    )


def _configure(node: SshNode, config: _HostConfig) -> None:
    """Complete a node from its configuration; what was given explicitly stays."""
    node._host_config = config
    node._address = node._address or config.hostname
    if not node._username_given and config.user:
        node.username = config.user
    node._known_hosts_files = config.known_hosts_files or node._known_hosts_files
    node.keepalive = config.keepalive or node.keepalive
    if node.gateway is None:
        node._proxy_command = node._proxy_command or config.proxy_command


def _keys_of_run(node: SshNode) -> list[Key]:
    """The keys to offer to a host: those named; or what its config says and the agent holds, as ssh
    does; or load_private_keys'.
    """
    config = node._host_config
    if node.keys or not (config.names_keys or config.identities_only):
        return load_private_keys(node.keys)
    agent_keys = functools.cache(functools.partial(load_agent_keys, config.identity_agent))
    keys = _usable_keys(config.identity_files, agent_keys) + (
        [] if config.identities_only else agent_keys()
    )
    certified: list[Key] = []
    for file in config.certificate_files:
        with contextlib.suppress(OSError, ValueError):
            certificate = asyncssh.read_certificate(file)
            certified += [
                (key, certificate)
                for key in [*keys, *agent_keys()]
                if isinstance(key, asyncssh.SSHKey | _AgentKey)
                and key.public_data == certificate.key.public_data
            ]
    return certified + keys


# The guard: what ends a command over there when its channel closes before it. sshd made the
# session's process leader of a process group; it starts a watchdog (outside of the group, where
# setsid is to be had) that holds the channel's stdin, takes /dev/null itself, and becomes the login
# shell of the user with the command, as under plain ssh. When stdin ends while the leader lives,
# the watchdog ends the group. It also keeps the reading ends of the outputs (where they are pipes,
# and /proc is there): else a command that prints could die of SIGPIPE before it, and the children
# be taken for left on purpose. When the leader ends first (sshd then closes stdin) it stays as long
# as the group and the connection do: whoever holds an output after that is ended too, for the
# command had not ended; who does not was left on purpose. All on one line without quote,
# exclamation mark and backslash, so that any login shell (csh, fish) can pass it on.
_WATCH_STDIN = "while read -r x; do :; done; "
# stdin is data: look for sshd's process
_WATCH_PARENT = "while [ $2 -gt 1 ] && kill -0 $2 && kill -0 $1; do sleep 1; done; "
_WATCHDOG = (
    "trap : HUP INT TERM; e=; {wait}"
    "if kill -0 $1; then e=1; else while [ $2 -gt 1 ] && kill -0 $2 && kill -s 0 -- -$1; do sleep 1; done; "
    "kill -s 0 -- -$1 && {{ {{ cat <&4; cat <&5; }} & sleep 0.2 || sleep 1; kill $! && e=1; }}; fi; "
    "if [ $e ]; then kill -s TERM -- -$1; kill -s CONT -- -$1; "
    "for x in 1 2 3 4; do kill -s 0 -- -$1 || break; sleep 0.5 || sleep 1; done; kill -s KILL -- -$1; fi"
)
_GUARD = (
    'd() {{ apssh_x=$(printf %b. "$1"); apssh_x=${{apssh_x%.}}; }}; '
    "exec 4<&- 5<&-; [ -p /proc/$$/fd/1 ] && command exec 4</proc/$$/fd/1; [ -p /proc/$$/fd/2 ] && command exec 5</proc/$$/fd/2; "
    '( set -- /bin/sh -c "$2" apssh-guard $$ $PPID; '
    'if command -v setsid >/dev/null 2>&1; then set -- setsid "$@"; fi; '
    '"$@" {stdin} >/dev/null 2>&1 & ){closing}; '
    'd "$1"; shift 2; set -- "$apssh_x" "$@"; '
    'while [ $# -gt 1 ]; do d "$2"; export "$apssh_x"; apssh_x=$1; shift 2; set -- "$apssh_x" "$@"; done; '
    # sshd gives the shell its short name: $0 and messages show it
    "{quiet}apssh_x=${{SHELL##*/}}; "
    'if [ "$(command -v "$apssh_x")" -ef "$SHELL" ] 2>/dev/null; then exec "$apssh_x" -c "$1"; fi; exec "$SHELL" -c "$1"'
)
# A private folder in the home, and who removes it when sshd's process of this connection is gone
# before it. A start-up file may have changed the folder and printed half a line; csh leaves copies
# of its outputs in 3 to 5.
_FOLDER = "cd; umask 077; mkdir -p {0} || exit; {sentinel}( cd {0} && echo && pwd -P )"
_SENTINEL = (
    "( trap : HUP INT TERM; while [ $PPID -gt 1 ] && kill -0 $PPID && [ -d {0} ]; do sleep 1; done; rm -rf {0} ) "
    "</dev/null >/dev/null 2>&1 3<&- 4<&- 5<&- & "
)


def _inert(text: str) -> str:
    """Text in an alphabet that no shell reads inside single quotes, for printf %b."""
    return re.sub(
        r"[^ -~\xa0-\ud7ff\ue000-\U0010ffff]|[\\'!]",
        lambda match: "".join(f"\\0{byte:03o}" for byte in os.fsencode(match[0])),
        text,
    )


def _guarded(
    command: str,
    *,
    stdin_is_data: bool = False,
    pty: bool = False,
    env: Mapping[str, str] | None = None,
    quiet: bool = False,
) -> str:
    """The command line to send so that this command runs as it would anyway, under the guard.
    ``env``: exported to it; ``quiet``: its outputs are /dev/null."""
    own = stdin_is_data or pty
    watchdog = _WATCHDOG.format(wait=_WATCH_PARENT if own else _WATCH_STDIN)
    script = _GUARD.format(
        stdin="</dev/null" if own else "<&3 3<&-",
        closing="; exec 4<&- 5<&-" if own else "; exec 3<&- 4<&- 5<&-",
        quiet="exec >/dev/null 2>&1; " if quiet else "",
    )
    if not own:
        script = f"exec 3<&0 </dev/null; {script}"
    words = [
        _inert(command),
        watchdog,
        *(_inert(f"{name}={value}") for name, value in (env or {}).items()),
    ]
    return f"exec /bin/sh -c '{script}' apssh " + " ".join(f"'{word}'" for word in words)


# --------------------------------------------------------------------------------------------------
# values: what one step finds and a later one uses
# --------------------------------------------------------------------------------------------------


class Variables(dict[str, Any]):
    """A dict whose keys are attributes too: ``v.x = 1``. A missing one raises AttributeError."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no variable {name!r}") from None

    __setattr__ = dict.__setitem__

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(f"no variable {name!r}") from None


class Capture:
    """Stores a command's stdout in ``variables[varname]``, its last newline removed: ``Run(...,
    capture=Capture("x", v))``.
    """

    def __init__(self, varname: str, variables: dict[str, Any]) -> None:
        self.varname, self.variables = varname, variables

    def store(self, text: str) -> None:
        """Keep this output."""
        self.variables[self.varname] = text.removesuffix("\n")


class Deferred:
    """A text made when its job runs: ``{{name}}`` stands for a variable. Other Jinja2 expressions
    need Jinja2 (extra yaml).

    As a string (in graphs and listings) a name with no value yet shows as it is. Values are never
    read as templates.
    """

    _PLAIN = r"(?a)\{\{\s*([A-Za-z_]\w*)\s*\}\}"

    def __init__(self, template: str, variables: Mapping[str, Any]) -> None:
        self.template, self.variables = template, variables

    def __repr__(self) -> str:
        return f"Deferred({self.template!r})"

    def __str__(self) -> str:
        return re.sub(
            self._PLAIN, lambda match: str(self.variables.get(match[1], match[0])), self.template
        )

    def render(self) -> str:
        """The text. Raises UndefinedVariableError naming what has no value, UsageError for an
        expression that cannot be.
        """
        if re.search(r"\{\{|\{%|\{#", re.sub(self._PLAIN, "", self.template)):
            return self._render_jinja()
        if missing := [
            name for name in re.findall(self._PLAIN, self.template) if name not in self.variables
        ]:
            raise UndefinedVariableError(
                f"no value yet for {', '.join(missing)} in {escape(self.template)}"
            )
        return str(self)

    def _render_jinja(self) -> str:
        jinja2 = _extra("jinja2")
        try:
            environment = jinja2.Environment(
                undefined=jinja2.StrictUndefined, keep_trailing_newline=True
            )
            return cast("str", environment.from_string(self.template).render(self.variables))
        except jinja2.UndefinedError as exc:
            raise UndefinedVariableError(
                f"no value yet in {escape(self.template)}: {exc}"
            ) from None
        except Exception as exc:  # an expression may compute anything
            raise UsageError(f"{escape(self.template)}: {exc}") from None


def _text_of(value: Any) -> str:
    """The text of what a job is given, when it runs."""
    return (
        value.render()
        if isinstance(value, Deferred)
        else os.fspath(value)
        if isinstance(value, os.PathLike)
        else str(value)
    )


class _Quoted(Deferred):
    """What is made of another text, as one word of the remote shell."""

    def __init__(self, inner: Any, make: Callable[[str], str]) -> None:
        super().__init__(
            inner.template if isinstance(inner, Deferred) else "",
            inner.variables if isinstance(inner, Deferred) else {},
        )
        self._inner, self._make = inner, make

    def __str__(self) -> str:
        return shlex.quote(self._make(str(self._inner)))

    def render(self) -> str:
        return shlex.quote(self._make(_text_of(self._inner)))


def _extra(module: str) -> Any:
    """A module of the extra ``yaml``."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UsageError(f"this needs {module}: pip install 'apssh[yaml]'") from None


@dataclasses.dataclass(eq=False)
class StepRecord:
    """What is known of one step that ran: times in seconds, of the wall clock (``_wall``: since the
    epoch) and of a monotonic one; ``kind`` None is a success.
    """

    label: str = ""
    command: str = ""
    start_wall: float | None = None
    start: float | None = None
    end: float | None = None
    status: int | str | None = None
    kind: str | None = None
    error: str | None = None
    bytes_out: int = 0
    bytes_err: int = 0
    bytes_transferred: int = 0
    end_wall: float | None = None
    script_sha256: str | None = None
    may_run: bool = False  # the command may still be running over there

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Notes the times, and how it failed."""
        self.start_wall, self.start = time.time(), time.monotonic()
        try:
            yield
        except ApsshError as exc:
            self.kind, self.error = exc.kind, str(exc)
            raise
        except BaseException as exc:
            cancelled = isinstance(exc, asyncio.CancelledError)
            self.kind, self.error = (
                "cancelled" if cancelled else "local",
                "cancelled" if cancelled else repr(exc),
            )
            raise
        finally:
            self.end_wall, self.end = time.time(), time.monotonic()


# --------------------------------------------------------------------------------------------------
# transfers: one SFTP engine; what arrives is whole, and stays inside the destination
# --------------------------------------------------------------------------------------------------

CHUNK = 1024 * 1024  # bytes of a file handled at once; two of them are under way
FILES_IN_FLIGHT = 64  # small files cost round trips: many at once is what makes them cheap
TREE_LIMIT = 1_000_000  # names in one copy, and links: more is an endless tree
DEPTH_LIMIT = 100  # folders in folders
SURPLUS_LIMIT = (
    1 << 30
)  # bytes past the announced size (/proc announces 0, a log grows): more is an endless file

_LOST = (
    asyncssh.SFTPConnectionLost,
    asyncssh.SFTPNoConnection,
    asyncssh.ConnectionLost,
    ConnectionError,
)


def _safe_name(name: str) -> str:
    """A name that a server sent, for one entry of a folder: it cannot lead elsewhere, and no file
    system has longer ones.
    """
    if (
        not name
        or name in (".", "..")
        or "/" in name
        or "\0" in name
        or len(os.fsencode(name)) > 255
    ):
        raise TransferError(f"refused the name '{_brief(name)}' sent by the server")
    return name


def _temporary_name(name: str) -> str:
    """One that nobody guesses, and that no file system finds too long."""
    return f".{os.fsencode(name)[:100].decode('utf-8', 'ignore')}.apssh-{os.urandom(6).hex()}"


def _write_all(fd: int, data: bytes, position: int) -> None:
    """A full disk takes a part without an error: the next write tells."""
    while (written := os.pwrite(fd, data, position)) < len(data):
        data, position = data[written:], position + written


def _paths(paths: Any) -> tuple[list[Any], bool]:
    """One path or several, as a list; whether they were several, be it a list of one (they then
    need a folder).
    """
    many = isinstance(paths, Iterable) and not isinstance(paths, str | os.PathLike)
    each = list(paths) if many else [paths]
    if not each or not all(
        isinstance(path, str | os.PathLike | Deferred) and str(path) for path in each
    ):
        raise UsageError(f"a path or a list of paths, not {paths!r}")
    return each, many


def _remote(path: str) -> str:
    """A remote path; the remote home is where SFTP starts, so ``~`` and nothing are the same."""
    return (
        path[2:].lstrip("/") or "." if path.startswith("~/") else "." if path in ("", "~") else path
    )


class _Folder:
    """A local folder held by descriptor, so that no name can be swapped for a link under us. Its
    files and subfolders refer to it: when the last is done it gets its final mode and times, and is
    closed.
    """

    def __init__(self, fd: int, path: str, parent: _Folder | None = None) -> None:
        self.fd, self.path, self.parent = fd, path, parent
        self.real = ""  # where its source really is, when links are followed
        self.depth: int = parent.depth + 1 if parent else 0
        self.mode: int | None = None
        self.times: tuple[float, float] | None = None

    def enter(self, name: str, attrs: asyncssh.SFTPAttrs, preserve: bool) -> _Folder:
        """The subfolder of this name, made if need be (one that was there keeps its mode, unless
        preserve); never through a link.
        """
        made = True
        try:
            os.mkdir(name, 0o700, dir_fd=self.fd)
        except FileExistsError:
            made = False
        try:
            fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=self.fd)
        except NotADirectoryError:
            link = stat.S_ISLNK(os.stat(name, dir_fd=self.fd, follow_symlinks=False).st_mode)
            raise TransferError(f"a {'link' if link else 'file'} has that name") from None
        folder = _Folder(fd, os.path.join(self.path, name), self)
        folder.mode = (
            attrs.permissions & 0o777
            if attrs.permissions is not None and (made or preserve)
            else None
        )
        if preserve and attrs.mtime is not None:
            folder.times = (attrs.atime or attrs.mtime, attrs.mtime)
        return folder

    def put_link(self, name: str, target: str) -> None:
        """A link of this name, in place of what is there."""
        temporary = _temporary_name(name)
        os.symlink(target, temporary, dir_fd=self.fd)
        try:
            os.rename(temporary, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except OSError as exc:
            os.unlink(temporary, dir_fd=self.fd)
            if isinstance(exc, IsADirectoryError):
                raise TransferError("a folder has that name") from exc
            raise

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            if self.times:
                os.utime(self.fd, self.times)
            if self.mode is not None:
                os.fchmod(self.fd, self.mode)
        os.close(self.fd)


class _UnderWay:
    """Files, or requests on one file, under way, at most so many; leaving it waits for all of them,
    or, on a failure, cancels them. No asyncio.TaskGroup: that takes a cancellation from outside for
    its own, when one of its tasks has just failed.
    """

    def __init__(self, most: int) -> None:
        self._room, self._tasks = asyncio.Semaphore(most), set[asyncio.Task[Any]]()
        self._failure: BaseException | None = None

    async def start(self, work: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> None:
        """One more, when there is room. Raises what an earlier one raised."""
        await self._room.acquire()
        if self._failure:
            raise self._failure
        self._tasks.add(task := asyncio.create_task(work(*args)))
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self._room.release()
        failure = (
            None if task.cancelled() else task.exception()
        )  # retrieved, whether or not it is the first
        self._failure = self._failure or failure

    async def __aenter__(self) -> _UnderWay:
        return self

    async def __aexit__(self, kind: object, *exc_info: object) -> None:
        try:
            while kind is None and self._tasks and not self._failure:
                await asyncio.wait(self._tasks, return_when=asyncio.FIRST_EXCEPTION)
            if kind is None and self._failure:
                raise self._failure
        finally:
            for task in (left := set(self._tasks)):
                task.cancel()
            if left:
                await asyncio.wait(left)
            self._failure = (
                None  # kept here, it would keep its frames, and the folder they hold open
            )


class _Copy:
    """One Push or Pull with one node: its options, what it has moved, what failed (the other files
    go on).
    """

    def __init__(
        self,
        node: _Node,
        step: StepRecord,
        *,
        preserve: bool = False,
        recurse: bool = False,
        follow_symlinks: bool = False,
        inplace: bool = False,
    ) -> None:
        self.node, self.step = node, step
        self.preserve, self.recurse, self.follow, self.inplace = (
            preserve,
            recurse,
            follow_symlinks,
            inplace,
        )
        self.failure, self.failed = (
            "",
            0,
        )  # the first, and how many: a hostile server has no end of them
        self.count = 0
        self._files = _UnderWay(FILES_IN_FLIGHT)

    @contextlib.contextmanager
    def _failing(self, path: str) -> Iterator[None]:
        """A failure of this path is noted; only the loss of the connection stops the rest."""
        try:
            yield
        except _LOST as exc:
            raise ConnectionFailedError(
                f"connection lost during the copy of {_brief(path, 200)}", host=self.node.hostname
            ) from exc
        except (TransferError, OSError, asyncssh.SFTPError, ValueError) as exc:
            reason = exc.message if isinstance(exc, TransferError) else _reason(exc)
            self.failure, self.failed = (
                self.failure or f"{_brief(path, 200)}: {reason}",
                self.failed + 1,
            )

    def _counted(self, path: str) -> None:
        """Every name that a folder is said to have counts, whatever becomes of it."""
        self.count += 1
        if self.count > TREE_LIMIT:
            raise ApsshError(
                f"{_brief(path, 200)}: more than {TREE_LIMIT:,} names: given up",
                host=self.node.hostname,
            )

    def _check_folder(self, is_folder: bool, depth: int, inside_itself: bool = False) -> None:
        """What is no file and no link must be a folder that can be copied, in a folder of this
        depth.
        """
        for wrong, why in (
            (not is_folder, "not a regular file, folder or link"),
            (not self.recurse, "is a folder (recurse, -r, copies folders)"),
            (depth >= DEPTH_LIMIT, f"more than {DEPTH_LIMIT} folders deep"),
            (inside_itself, "a link to a folder it is in"),
        ):
            if wrong:
                raise TransferError(why)

    async def _spawn(
        self, path: str, work: Callable[..., Coroutine[Any, Any, None]], *args: Any
    ) -> None:
        """Run this beside the others, as soon as there is room."""

        async def guarded() -> None:
            with self._failing(path):
                await work(*args)

        await self._files.start(guarded)

    async def run(self, walk: Coroutine[Any, Any, None]) -> None:
        """Walk, then tell what failed. Cancelling it leaves no temporary file."""
        await walk
        if self.failed:
            more = f" (and {self.failed - 1} more)" if self.failed > 1 else ""
            raise TransferError(self.failure + more, host=self.node.hostname)

    # push

    async def push(
        self, sftp: asyncssh.SFTPClient, sources: list[str], destination: str, many: bool
    ) -> None:
        """Local sources onto a remote file, or into a remote folder."""
        target = _remote(destination)
        with self._failing(destination):
            existing = await self._remote_stat(sftp, target, follow=True)
        if self.failed:
            return
        folder = existing is not None and existing.type == asyncssh.FILEXFER_TYPE_DIRECTORY
        into = many or folder or destination.endswith("/")
        if into and not folder:
            raise TransferError(
                f"{escape(destination)}: {'not a folder' if existing else 'no such folder'}",
                host=self.node.hostname,
            )
        late: list[tuple[str, asyncssh.SFTPAttrs]] = []
        names = [os.path.basename(os.path.abspath(source)) for source in sources]
        async with self._files:
            for source, name in zip(sources, names, strict=True):
                with self._failing(source):
                    if into and names.count(name) > 1:
                        raise TransferError(f"two sources are called {escape(name)}")
                    path = posixpath.join(target, name) if into else target
                    await self._push_entry(
                        sftp, source, path, await self._remote_stat(sftp, path), late, 0
                    )
        for path, attrs in reversed(late):
            with self._failing(path):
                await sftp.setstat(path, attrs)

    @staticmethod
    async def _remote_stat(
        sftp: asyncssh.SFTPClient, path: str, follow: bool = False
    ) -> asyncssh.SFTPAttrs | None:
        try:
            return await (sftp.stat(path) if follow else sftp.lstat(path))
        except (asyncssh.SFTPNoSuchFile, asyncssh.SFTPNoSuchPath):
            return None

    async def _push_entry(
        self,
        sftp: asyncssh.SFTPClient,
        source: str,
        target: str,
        existing: asyncssh.SFTPAttrs | None,
        late: list[tuple[str, asyncssh.SFTPAttrs]],
        depth: int,
        within: tuple[tuple[int, int], ...] = (),
    ) -> None:
        """One local entry, named (depth 0: a link is followed) or found in a tree."""
        self._counted(source)
        info = os.stat(source) if self.follow or depth == 0 else os.lstat(source)
        if stat.S_ISREG(info.st_mode):
            if (
                depth and existing and existing.type == asyncssh.FILEXFER_TYPE_SYMLINK
            ):  # the user named no link: it is replaced
                if self.inplace:
                    raise TransferError("a link has that name")
                existing = None
            await self._spawn(
                source, self._push_file, sftp, source, target, existing, self.follow or depth == 0
            )
        elif stat.S_ISLNK(info.st_mode):
            await self._spawn(source, self._push_link, sftp, os.readlink(source), target, existing)
        else:
            self._check_folder(
                stat.S_ISDIR(info.st_mode), depth - 1, (info.st_dev, info.st_ino) in within
            )
            present: dict[str, asyncssh.SFTPAttrs] = {}
            if existing and existing.type == asyncssh.FILEXFER_TYPE_SYMLINK and depth == 0:
                existing = await self._remote_stat(
                    sftp, target, follow=True
                )  # what is named may be a link, over there too
            if existing and existing.type in (
                asyncssh.FILEXFER_TYPE_SYMLINK,
                asyncssh.FILEXFER_TYPE_REGULAR,
            ):
                raise TransferError(
                    f"a {'link' if existing.type == asyncssh.FILEXFER_TYPE_SYMLINK else 'file'} has that name"
                )
            within += ((info.st_dev, info.st_ino),)
            if existing is None:
                await sftp.mkdir(target, asyncssh.SFTPAttrs(permissions=0o700))
            else:
                ours = set(os.listdir(source))
                async for found in sftp.scandir(target):
                    self._counted(target)
                    if (name := str(found.filename)) in ours:
                        present[name] = found.attrs
            if existing is None or self.preserve:
                late.append((target, self._attrs(info)))
            with os.scandir(source) as entries:
                for entry in entries:
                    with self._failing(entry.path):
                        await self._push_entry(
                            sftp,
                            entry.path,
                            posixpath.join(target, entry.name),
                            present.get(entry.name),
                            late,
                            depth + 1,
                            within,
                        )

    def _attrs(self, info: os.stat_result) -> asyncssh.SFTPAttrs:
        """The mode bits to give; times with preserve."""
        mode = stat.S_IMODE(info.st_mode) if self.preserve else info.st_mode & 0o777
        times = {"atime": int(info.st_atime), "mtime": int(info.st_mtime)} if self.preserve else {}
        return asyncssh.SFTPAttrs(permissions=mode, **times)

    async def _push_file(
        self,
        sftp: asyncssh.SFTPClient,
        source: str,
        target: str,
        existing: asyncssh.SFTPAttrs | None,
        follow: bool,
    ) -> None:
        """One file, under a temporary name until it is whole."""
        fd = os.open(
            source, os.O_RDONLY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
        )  # a FIFO put there meanwhile blocks nobody
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise TransferError("not a regular file")
            await self.push_content(
                sftp,
                lambda size, position: os.pread(fd, size, position),
                target,
                existing,
                self._attrs(info),
            )
        finally:
            os.close(fd)

    async def push_content(
        self,
        sftp: asyncssh.SFTPClient,
        read: Callable[[int, int], bytes],
        target: str,
        existing: asyncssh.SFTPAttrs | None,
        attrs: asyncssh.SFTPAttrs,
    ) -> None:
        """Content onto a remote file: whole, or not at all."""
        if existing and existing.type == asyncssh.FILEXFER_TYPE_SYMLINK:
            target = str(await sftp.realpath(target))
            existing = await self._remote_stat(sftp, target)
        if existing and existing.type == asyncssh.FILEXFER_TYPE_DIRECTORY:
            raise TransferError("a folder has that name")
        if existing and existing.type not in (
            asyncssh.FILEXFER_TYPE_REGULAR,
            asyncssh.FILEXFER_TYPE_UNKNOWN,
        ):
            raise TransferError(f"{_brief(target, 200)} is there and not a regular file")
        folder = _brief(posixpath.dirname(target) or ".", 200)
        flags = (
            asyncssh.FXF_WRITE
            | asyncssh.FXF_CREAT
            | (asyncssh.FXF_TRUNC if self.inplace else asyncssh.FXF_EXCL)
        )
        async with (
            contextlib.nullcontext(target)
            if self.inplace
            else self._replacing(sftp, target) as path
        ):
            try:
                opened = await sftp.open(
                    path,
                    flags,
                    asyncssh.SFTPAttrs(permissions=None if self.inplace else 0o600),
                    encoding=None,
                    block_size=0,
                )
            except asyncssh.SFTPPermissionDenied as exc:
                if self.inplace:
                    raise
                raise TransferError(
                    f"{folder}: permission denied for a temporary file (inplace writes onto the file itself)"
                ) from exc
            except asyncssh.SFTPNoSuchFile:
                raise TransferError(f"{folder}: no such folder") from None
            async with self._closing(opened) as file:
                if existing and not self.inplace:
                    mine = await file.stat()
                    if (mine.uid, mine.gid) != (existing.uid, existing.gid):
                        with contextlib.suppress(
                            asyncssh.SFTPError
                        ):  # only root may: the file then becomes ours
                            await file.setstat(
                                asyncssh.SFTPAttrs(uid=existing.uid, gid=existing.gid)
                            )
                await self._push_bytes(sftp, file, read)
                await file.setstat(attrs)

    @contextlib.asynccontextmanager
    async def _replacing(self, sftp: asyncssh.SFTPClient, target: str) -> AsyncIterator[str]:
        """A name beside the target that nobody guesses; what is made there becomes the target, or
        is removed.
        """
        folder, name = posixpath.split(target)
        temporary = posixpath.join(folder, _temporary_name(name))
        try:
            yield temporary
            try:
                await self._replace(sftp, temporary, target)
            except (asyncssh.SFTPFailure, asyncssh.SFTPPermissionDenied) as exc:
                raise TransferError(
                    f"{_brief(target, 200)} cannot be replaced: {_reason(exc)} "
                    "(inplace writes onto the file itself)"
                ) from exc
        except BaseException as exc:
            full = False
            with contextlib.suppress(OSError, ValueError, asyncssh.Error):
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    full = isinstance(exc, asyncssh.SFTPFailure) and await self._disk_full(
                        sftp, target
                    )
                    await sftp.remove(temporary)
            if full:
                raise TransferError("no space left on the device") from exc
            raise

    @staticmethod
    @contextlib.asynccontextmanager
    async def _closing(file: asyncssh.SFTPClientFile) -> AsyncIterator[asyncssh.SFTPClientFile]:
        """Closed at the end; after a failure or a cancellation without waiting for ever for a host
        that answers no more.
        """
        try:
            yield file
        except BaseException:
            with contextlib.suppress(OSError, ValueError, asyncssh.Error):
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await file.close()
            raise
        await file.close()

    async def _push_bytes(
        self,
        sftp: asyncssh.SFTPClient,
        file: asyncssh.SFTPClientFile,
        read: Callable[[int, int], bytes],
    ) -> None:
        """As many requests under way as fill the window; ours, for asyncssh's own would outlive a
        loss or a cancellation.
        """
        size = max(min(sftp.limits.max_write_len, CHUNK // 4), 1)
        position, under_way = 0, _UnderWay(2 * CHUNK // size)
        async with under_way:
            while data := read(size, position):
                await under_way.start(file.write, data, position)
                position += len(data)
                self.step.bytes_transferred += len(data)

    @staticmethod
    async def _replace(sftp: asyncssh.SFTPClient, temporary: str, target: str) -> None:
        """Rename over the target (posix-rename@openssh.com); a server without that must remove it
        first.
        """
        try:
            await sftp.posix_rename(temporary, target)
        except asyncssh.SFTPOpUnsupported:
            try:
                await sftp.rename(temporary, target)
            except asyncssh.SFTPError:
                await sftp.remove(target)
                await sftp.rename(temporary, target)

    @staticmethod
    async def _disk_full(sftp: asyncssh.SFTPClient, target: str) -> bool:
        """OpenSSH says only "Failure" when a disk is full: ask how full it is."""
        with contextlib.suppress(asyncssh.Error, ValueError):
            disk = await sftp.statvfs(posixpath.dirname(target) or ".")
            return (disk.bavail or 0) * (disk.frsize or 0) < CHUNK
        return False

    async def _push_link(
        self, sftp: asyncssh.SFTPClient, link: str, target: str, existing: asyncssh.SFTPAttrs | None
    ) -> None:
        if existing and existing.type == asyncssh.FILEXFER_TYPE_DIRECTORY:
            raise TransferError("a folder has that name")
        async with self._replacing(sftp, target) as temporary:
            await sftp.symlink(link, temporary)

    # pull: the server is not trusted

    async def pull(
        self, sftp: asyncssh.SFTPClient, sources: list[str], destination: str, many: bool
    ) -> None:
        """Remote sources (globs in them expanded) onto a local file, or into a local folder."""
        found: list[str] = []
        for source in sources:
            path = _remote(source)
            with self._failing(source):
                matches = (
                    [each async for each in self._glob(sftp, path)]
                    if re.search(r"[*?[]", path)
                    else []
                )
                many = many or len(matches) > 1
                found += matches or [path]
        folder, name = self._landing(destination, many)
        taken: set[str] = set()
        async with self._files:
            for path in found:
                with self._failing(path):
                    own = name or posixpath.basename(path.rstrip("/"))
                    if own in ("", ".", ".."):
                        own = posixpath.basename(str(await sftp.realpath(path)))
                    attrs = await sftp.stat(path)
                    self._counted(path)
                    await self._pull_entry(
                        sftp, path, folder, self._unique(own, taken), attrs, followed=True
                    )

    def _landing(self, destination: str, many: bool) -> tuple[_Folder, str]:
        """The local folder that sources arrive in, and the name there, if it is not their own."""
        into = many or destination.endswith("/") or os.path.isdir(destination)
        if into and not os.path.isdir(destination):
            what = "not a folder" if os.path.exists(destination.rstrip("/")) else "no such folder"
            raise TransferError(f"{escape(destination)}: {what}", host=self.node.hostname)
        place = (
            os.path.realpath(destination) if os.path.islink(destination) else destination
        )  # a link that the user named is resolved
        path = place if into else os.path.dirname(place)
        folder = _Folder(os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY), path)
        folder.depth = 0 if into else -1  # how many ``..`` a link in it may begin with
        return folder, "" if into else os.path.basename(place)

    @staticmethod
    def _unique(name: str, taken: set[str]) -> str:
        """This name, checked, once in a folder (some file systems ignore case: so do we there)."""
        key = _safe_name(name).casefold() if sys.platform == "darwin" else _safe_name(name)
        if key in taken:
            raise TransferError(f"the name {escape(name)} comes twice")
        taken.add(key)
        return name

    async def _glob(self, sftp: asyncssh.SFTPClient, pattern: str) -> AsyncIterator[str]:
        """The remote paths that a pattern matches, in order; as in a shell, ``*`` matches no
        leading dot.
        """
        head, _, last = pattern.rpartition("/")
        folders = [head or ("/" if pattern.startswith("/") else ".")]
        if re.search(r"[*?[]", head):
            folders = [each async for each in self._glob(sftp, head)]
        for folder in folders:
            names: list[str] = []
            with contextlib.suppress(
                asyncssh.SFTPNoSuchFile, asyncssh.SFTPNotADirectory, asyncssh.SFTPFailure
            ):
                async for entry in sftp.scandir(folder):
                    self._counted(pattern)
                    name = str(entry.filename)
                    if (
                        fnmatch.fnmatchcase(name, last)
                        and name not in (".", "..")
                        and name.startswith(".") <= last.startswith(".")
                    ):
                        with self._failing(pattern):
                            names.append(_safe_name(name))
            for name in sorted(set(names)):
                yield (
                    name
                    if folder == "." and not pattern.startswith("./")
                    else posixpath.join(folder, name)
                )

    async def _pull_entry(
        self,
        sftp: asyncssh.SFTPClient,
        path: str,
        folder: _Folder,
        name: str,
        attrs: asyncssh.SFTPAttrs,
        *,
        followed: bool = False,
    ) -> None:
        """One remote entry to a checked name in an open folder; ``followed``: the attributes are
        those that a link leads to.
        """
        if attrs.type == asyncssh.FILEXFER_TYPE_UNKNOWN and not followed:
            attrs = await sftp.lstat(path)  # some servers list names only
        if linked := attrs.type == asyncssh.FILEXFER_TYPE_SYMLINK and self.follow and not followed:
            attrs, followed = await sftp.stat(path), True
        kind = attrs.type
        if kind == asyncssh.FILEXFER_TYPE_REGULAR:
            await self._spawn(path, self._pull_file, sftp, path, folder, name, attrs)
        elif kind == asyncssh.FILEXFER_TYPE_SYMLINK and not followed:
            self._make_link(folder, name, str(await sftp.readlink(path)))
        else:
            real = str(await sftp.realpath(path)) if self.follow else ""
            self._check_folder(
                kind == asyncssh.FILEXFER_TYPE_DIRECTORY,
                folder.depth,
                linked and f"{folder.real}/".startswith(f"{real}/"),
            )
            inner = folder.enter(name, attrs, self.preserve)
            inner.real = real
            taken: set[str] = set()
            links: list[str] = []  # made when the rest of the folder is on its way
            async for entry in sftp.scandir(path):
                child = str(entry.filename)
                self._counted(posixpath.join(path, child))
                if child in (".", ".."):
                    continue
                with self._failing(posixpath.join(path, child)):
                    self._unique(child, taken)
                    if entry.attrs.type == asyncssh.FILEXFER_TYPE_SYMLINK and not self.follow:
                        links.append(child)
                    else:
                        await self._pull_entry(
                            sftp, posixpath.join(path, child), inner, child, entry.attrs
                        )
            for child in links:
                with self._failing(posixpath.join(path, child)):
                    self._make_link(
                        inner, child, str(await sftp.readlink(posixpath.join(path, child)))
                    )

    async def _pull_file(
        self,
        sftp: asyncssh.SFTPClient,
        path: str,
        folder: _Folder,
        name: str,
        attrs: asyncssh.SFTPAttrs,
    ) -> None:
        """One file, read to its end, whatever size was announced."""
        with self._arriving(folder, name, attrs) as fd:
            await self._pull_bytes(sftp, path, fd, min(attrs.size or 0, 1 << 62))

    @contextlib.contextmanager
    def _arriving(self, folder: _Folder, name: str, attrs: asyncssh.SFTPAttrs) -> Iterator[int]:
        """A local file to write, under a temporary name until it is whole; what is there and is no
        file is left alone.
        """
        try:
            existing: os.stat_result | None = os.stat(name, dir_fd=folder.fd, follow_symlinks=False)
        except FileNotFoundError:
            existing = None
        place = escape(os.path.join(folder.path, name))
        if existing and stat.S_ISDIR(existing.st_mode):
            raise TransferError("a folder has that name")
        if (
            existing
            and not stat.S_ISREG(existing.st_mode)
            and (self.inplace or not stat.S_ISLNK(existing.st_mode))
        ):
            raise TransferError(f"{place} is there and not a regular file")
        inplace = self.inplace and existing
        temporary = name if inplace else _temporary_name(name)
        creation = os.O_NONBLOCK if inplace else os.O_CREAT | os.O_EXCL
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_NOFOLLOW | creation, 0o600, dir_fd=folder.fd)
        except OSError as exc:
            if inplace or exc.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            raise TransferError(
                f"{escape(folder.path) or '.'}: {_reason(exc)} for a temporary file "
                "(inplace writes onto the file itself)"
            ) from exc
        try:
            if inplace:
                os.ftruncate(fd, 0)
            yield fd
            if existing and not inplace and stat.S_ISREG(existing.st_mode):
                with contextlib.suppress(OSError):  # only root may
                    os.fchown(fd, existing.st_uid, existing.st_gid)
            if attrs.permissions is not None:
                os.fchmod(fd, attrs.permissions & 0o777)
            if self.preserve and attrs.mtime is not None:
                os.utime(fd, (attrs.atime or attrs.mtime, attrs.mtime))
            if not inplace:
                try:
                    os.rename(temporary, name, src_dir_fd=folder.fd, dst_dir_fd=folder.fd)
                except OSError as exc:
                    raise TransferError(
                        f"{place} cannot be replaced: {_reason(exc)} (inplace writes onto the file itself)"
                    ) from exc
        except BaseException:
            if not inplace:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=folder.fd)
            raise
        finally:
            os.close(fd)

    async def _pull_bytes(self, sftp: asyncssh.SFTPClient, path: str, fd: int, size: int) -> None:
        """The announced size in parallel, then on to the real end, unless asking for one byte more
        than announced has shown it.
        """
        end, ended = 0, False
        block = max(min(sftp.limits.max_read_len, CHUNK // 4), 1)
        async with self._closing(await sftp.open(path, "rb", encoding=None, block_size=0)) as file:

            async def fetch(position: int, wanted: int) -> None:
                nonlocal end, ended
                while wanted > 0 and (data := cast("bytes", await file.read(wanted, position))):
                    _write_all(fd, data, position)
                    position, wanted, end = (
                        position + len(data),
                        wanted - len(data),
                        max(end, position + len(data)),
                    )
                    self.step.bytes_transferred += len(data)
                    if position == size and wanted == 1:
                        break
                ended |= wanted > 0

            async with _UnderWay(2 * CHUNK // block) as under_way:
                for position in range(0, size, block):
                    if ended:
                        break
                    await under_way.start(fetch, position, min(block, size + 1 - position))
            while not ended and (data := cast("bytes", await file.read(CHUNK // 4, end))):
                _write_all(fd, data, end)
                end += len(data)
                self.step.bytes_transferred += len(data)
                if end > size + SURPLUS_LIMIT:
                    raise TransferError("goes on far beyond its size: given up")

    def _make_link(self, folder: _Folder, name: str, target: str) -> None:
        """A link of the tree, only where it leads inside: relative, ``..`` only in front and no
        further than the top.
        """
        steps = [step for step in target.split("/") if step not in ("", ".")]
        ups = len(list(itertools.takewhile(lambda step: step == "..", steps)))
        if (
            not target
            or len(target) > 4000
            or target.startswith("/")
            or "\0" in target
            or ups > folder.depth
            or ".." in steps[ups:]
        ):
            raise TransferError(f"refused a link that leads out, to {_brief(target) or repr('')}")
        folder.put_link(name, target)

    # on this machine

    async def local(self, sources: list[str], destination: str, many: bool) -> None:
        """A plain copy, for LocalNode; the same rules about folders, links, names and what arrives."""
        folder, name = self._landing(destination, many)
        names = [name or os.path.basename(os.path.abspath(source)) for source in sources]
        for source, own in zip(sources, names, strict=True):
            with self._failing(source):
                if names.count(own) > 1:
                    raise TransferError(f"two sources are called {escape(own)}")
                target = Path(folder.path, own).resolve()
                if (
                    Path(source).is_dir()
                    and Path(source).resolve() in (target, *target.parents)
                    and self.recurse
                ):
                    raise TransferError("cannot be copied into itself")
                await self._local_entry(source, folder, own, ())

    async def _local_entry(
        self,
        source: str,
        folder: _Folder,
        name: str,
        within: tuple[tuple[int, int], ...],
        named: bool = True,
    ) -> None:
        self._counted(source)
        info = os.stat(source) if self.follow or named else os.lstat(source)
        if stat.S_ISREG(info.st_mode):
            await asyncio.to_thread(self._local_file, source, folder, name)
        elif stat.S_ISLNK(info.st_mode):
            folder.put_link(name, os.readlink(source))
        else:
            self._check_folder(
                stat.S_ISDIR(info.st_mode), folder.depth, (info.st_dev, info.st_ino) in within
            )
            inner = folder.enter(name, self._attrs(info), self.preserve)
            for child in os.listdir(source):
                path = os.path.join(source, child)
                with self._failing(path):
                    await self._local_entry(
                        path, inner, child, (*within, (info.st_dev, info.st_ino)), False
                    )

    def _local_file(self, source: str, folder: _Folder, name: str) -> None:
        with (
            open(os.open(source, os.O_RDONLY | os.O_NONBLOCK), "rb") as file,
            self._arriving(folder, name, self._attrs(os.fstat(file.fileno()))) as fd,
            open(fd, "wb", closefd=False) as copied,
        ):
            shutil.copyfileobj(file, copied, CHUNK)
            self.step.bytes_transferred += copied.tell()


# --------------------------------------------------------------------------------------------------
# nodes: connections, sessions, SshNode and LocalNode
# --------------------------------------------------------------------------------------------------


def _in_daemon(function: Callable[..., _T], *args: Any) -> asyncio.Future[_T]:
    """In a thread that nobody waits for at the end: a resolver may never answer, who types may
    never type.
    """
    came: Future[_T] = Future()
    came.set_running_or_notify_cancel()  # the thread may end it, whatever becomes of us

    def work() -> None:
        try:
            came.set_result(function(*args))
        except BaseException as exc:
            came.set_exception(exc)

    threading.Thread(target=work, daemon=True).start()
    return asyncio.wrap_future(came)


class _Loop(asyncio.SelectorEventLoop):
    """The programs' event loop: names are looked up in threads that do not keep it from ending."""

    async def getaddrinfo(self, *args: Any, **keywords: Any) -> Any:
        """As socket.getaddrinfo, LOOKUPS at once."""
        async with _Limits.here().lookups:
            return await _in_daemon(functools.partial(socket.getaddrinfo, *args, **keywords))


class _Limits:
    """What one event loop may do at once, whatever asks for it: programs, jobs, quick scripts."""

    _of_loop: ClassVar[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Limits]] = (
        weakref.WeakKeyDictionary()
    )

    def __init__(self) -> None:
        self.connects = asyncio.Semaphore(CONNECTS)
        self.lookups = asyncio.Semaphore(LOOKUPS)
        self.handshakes = {
            leads: asyncio.Semaphore(HANDSHAKES) for leads in (False, True)
        }  # gateways wait apart: others wait for them
        self.keys: dict[object, _Shared] = {}
        self._startups: weakref.WeakValueDictionary[tuple[Any, ...], asyncio.Semaphore] = (
            weakref.WeakValueDictionary()
        )

    @classmethod
    def here(cls) -> _Limits:
        """Those of the running loop."""
        return cls._of_loop.setdefault(asyncio.get_running_loop(), cls())

    def startups(self, *endpoint: Any) -> asyncio.Semaphore:
        """How many logins may be under way on one endpoint."""
        return self._startups.setdefault(endpoint, asyncio.Semaphore(STARTUPS_PER_HOST))


def _raise_file_limit() -> int:
    """Raise the soft limit on open files to the hard one; the number of files that can be open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 1 << 20 if hard == resource.RLIM_INFINITY else hard
    if soft < most:
        with contextlib.suppress(ValueError, OSError):  # macOS refuses more than it names elsewhere
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


class _Clock:
    """The time one connection may take; it stands still while the connection queues for its turn."""

    def __init__(self, scope: asyncio.Timeout) -> None:
        self._scope = scope
        self.progress = ""  # how far it came
        self.drops = 0  # how often the server cut the connection before login

    @contextlib.asynccontextmanager
    async def turn(
        self, gate: asyncio.Semaphore, at_most: float | None = None
    ) -> AsyncIterator[None]:
        """Take a slot of this gate; it is given back after ``at_most`` seconds, when the work takes
        longer.
        """
        when, now = self._scope.when(), asyncio.get_running_loop().time
        queued = now()
        self._scope.reschedule(None)
        await gate.acquire()
        give_back = functools.cache(gate.release)  # once
        timer = asyncio.get_running_loop().call_later(at_most, give_back) if at_most else None
        try:
            if when is not None:
                self._scope.reschedule(when + now() - queued)
            yield
        finally:
            give_back()
            if timer:
                timer.cancel()


class _Shared:
    """One task that several coroutines wait for; it is cancelled when the last of them has given
    up.
    """

    def __init__(self, work: Coroutine[Any, Any, Any]) -> None:
        self._task = asyncio.ensure_future(work)
        self._task.add_done_callback(
            lambda task: task.cancelled() or task.exception()
        )  # retrieved, if nobody waits
        self._waiters = 0
        self.abandoned = False  # being cancelled: nobody may join any more

    async def wait(self) -> Any:
        """The task's result or exception. Cancelling the last wait cancels the task, and waits for
        its clean-up.
        """
        self._waiters += 1
        try:
            return await asyncio.shield(self._task)
        finally:
            self._waiters -= 1
            if not self._waiters and not self._task.done():
                self.abandoned = True
                self._task.cancel()
                await asyncio.wait([self._task], timeout=CLOSE_TIMEOUT)

    @classmethod
    async def once(
        cls, tasks: dict[str, _Shared], name: str, work: Callable[[], Coroutine[Any, Any, Any]]
    ) -> Any:
        """The result of this work; who asks while it is under way waits for the same."""
        if name not in tasks or tasks[name].abandoned:
            tasks[name] = cls(work())
        shared = tasks[name]
        try:
            return await shared.wait()
        finally:
            if tasks.get(name) is shared:
                del tasks[name]


class _Gathered:
    """A transport as asyncssh sees it: what it writes in one turn of the loop leaves in one piece.
    It writes each packet by itself, and an empty one before each; of 2,000 small files a third of
    the time was such calls.
    """

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._pieces: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Soon."""
        if not self._pieces and len(data) < SEND_AT_ONCE:
            asyncio.get_running_loop().call_soon(self._flush)
        self._pieces.append(data)
        if len(data) >= SEND_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        pieces, self._pieces = self._pieces, []
        if pieces:
            with contextlib.suppress(
                ConnectionError
            ):  # its loss is told to the other side of the wire
                self._transport.write(b"".join(pieces) if len(pieces) > 1 else pieces[0])

    def close(self) -> None:
        """After what was written."""
        self._flush()
        self._transport.close()


class _Wire(asyncssh.SSHTCPSession[bytes]):
    """Stands between a transport (TCP, or a gateway's channel) and asyncssh's connection. It holds
    the server's first bytes until a key exchange may start, so that silent hosts take nobody's
    turn; and it acknowledges at once, since the first command would else stall for 40 ms (server's
    Nagle, our delayed ack).
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.banner: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._held: list[bytes] | None = []
        self._lost: Exception | None = None
        self.greeting = b""
        self.transport: Any = None
        self._socket: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        if hasattr(socket, "TCP_QUICKACK") and isinstance(transport, asyncio.Transport):
            sock = transport.get_extra_info("socket")
            self._socket = sock if sock.family in (socket.AF_INET, socket.AF_INET6) else None
        self._inner.connection_made(_Gathered(transport))

    def session_started(self) -> None:
        self._inner.session_started()

    def data_received(self, data: bytes, datatype: int | None = None) -> None:
        if self._socket:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        if self._held is None:
            self._inner.data_received(data)
            return
        self._held.append(data)
        self.greeting = self.greeting or data[:100]
        self.transport.pause_reading()
        if not self.banner.done():
            self.banner.set_result(None)

    def release(self) -> None:
        """The key exchange may start."""
        held, self._held = self._held or [], None
        for data in held:
            self._inner.data_received(data)
        if self._lost:
            self._inner.connection_lost(self._lost)
        else:
            self.transport.resume_reading()

    def eof_received(self) -> bool:
        return self._held is None and bool(self._inner.eof_received())

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = exc or asyncssh.ConnectionLost("Connection lost")
        if not self.banner.done():
            self.banner.set_exception(self._lost)
            self.banner.exception()
        if (
            self._held is None
        ):  # before, asyncssh waits for nothing, and would leave its exception to nobody
            self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()


class _Route:
    """How the bytes of one connection travel: TCP, a channel of the gateway, or a proxy command.
    asyncssh takes it for a tunnel: so its sockets, their turns and their failures are ours."""

    def __init__(self, node: SshNode, clock: _Clock, turns: contextlib.AsyncExitStack) -> None:
        self._node, self._clock, self._turns = weakref.proxy(node), clock, turns
        self.wire: _Wire | None = None
        self.process: subprocess.Popen[bytes] | None = None

    async def create_connection(
        self, factory: Callable[[], Any], host: str, port: int
    ) -> tuple[Any, Any]:
        """Connect, wait for the server's banner, then for the turn to shake hands."""
        limits, loop = _Limits.here(), asyncio.get_running_loop()
        inner = factory()

        def wire() -> _Wire:
            self.wire = _Wire(inner)
            return self.wire

        protocol = cast("Callable[[], asyncio.Protocol]", wire)
        if self._node.gateway:
            self._node.gateway._leads = True
            gateway = await self._node.gateway._connected()
            gateway.forwards = True
            await gateway.conn.create_connection(wire, host, port)
        elif self._node._proxy_command:
            ours, theirs = socket.socketpair()
            with theirs:
                self.process = subprocess.Popen(
                    ["/bin/sh", "-c", f"exec {self._node._proxy_command}"],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    start_new_session=True,
                )
            await loop.create_connection(protocol, sock=ours)
        else:
            numeric = host.replace(".", "").isdigit() or ":" in host
            async with self._clock.turn(limits.connects):
                await loop.create_connection(
                    protocol,
                    host,
                    port,
                    happy_eyeballs_delay=None if numeric else 0.25,
                    **self._node._host_config.socket,
                )
        assert self.wire
        self._node._formatter_event("connection_made", self._node.username, not self._node.gateway)
        await self.wire.banner
        await self._turns.enter_async_context(
            self._clock.turn(limits.handshakes[self._node._leads], HANDSHAKE_TURN)
        )
        self.wire.release()
        return self.wire.transport, inner

    @property
    def greeted(self) -> bool:
        """Whether the server has shown itself as one of ssh."""
        return self.wire is not None and b"SSH-" in self.wire.greeting

    def foreign(self) -> str:
        """What the server said instead of an ssh banner; empty, as a rule."""
        text = self.wire.greeting if self.wire else b""
        said = _brief(text.splitlines()[0].decode("ascii", "replace")) if text.strip() else ""
        return "" if not text or self.greeted else f"not an ssh server: it says {said!r}"

    def progress(self) -> str:
        """How far it came, for somebody who has waited in vain."""
        if not self.wire:
            gateway = self._node.gateway
            return (
                f"gateway {escape(gateway.hostname)} does not answer"
                if gateway and not gateway.is_connected()
                else "no answer"
            )
        return self.foreign() or (
            "the key exchange does not end"
            if self.wire.greeting
            else "connected, but the server says nothing"
        )

    def abandon(self) -> None:
        """Leave nothing of an attempt that gave no connection."""
        if self.wire and self.wire.transport:
            self.wire.transport.abort()
        self.reap()

    def reap(self) -> None:
        """End the proxy command, and wait for nobody."""
        process, self.process = self.process, None
        if process:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(RuntimeError):
                threading.Thread(target=process.wait, daemon=True).start()  # it leaves no zombie


class _Client(asyncssh.SSHClient):
    """One attempt to log in, and the connection that it gives: decides on host keys, offers keys
    and password.
    """

    def __init__(self, node: SshNode, pairs: list[asyncssh.SSHKeyPair], trust: _Trust) -> None:
        self._node, self._trust = (
            weakref.proxy(node),
            trust,
        )  # a node that is forgotten is gone at once, and its sockets with it
        self._pairs = pairs
        self.route: _Route | None = None
        self.offered: list[asyncssh.SSHKeyPair] = []
        self.begun = False  # the server's key was accepted and the login has begun
        self.lost = False
        self.why: Exception | None = None
        self.host_key_error: HostKeyError | None = None
        self._password_tried: set[str] = set()
        self._kbdint_begun = False

    def _check(self, check: Callable[[], bool | None]) -> bool:
        try:
            return check() is not False
        except HostKeyError as exc:
            self.host_key_error = exc
            return False

    def validate_host_public_key(
        self, host: str, addr: str, port: int, key: asyncssh.SSHKey
    ) -> bool:
        return self._check(lambda: self._trust.check(key))

    def validate_host_ca_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        return self._check(lambda: self._trust.check_authority(key))

    def connection_made(self, conn: asyncssh.SSHClientConnection) -> None:
        self._conn = weakref.proxy(conn)

    def begin_auth(self, username: str) -> None:
        if self._trust.certified and not self._check(
            lambda: self._trust.check_certified(self._conn.get_server_host_key())
        ):
            raise asyncssh.HostKeyNotVerifiable("revoked")
        self.begun = True
        if trouble := self._trust.record():
            self._node._say(trouble)

    def auth_banner_received(self, msg: str, lang: str) -> None:
        if self._node.verbose or self._node.formatter.verbose:
            self._node._say("banner: " + " ".join(msg.split()))

    def public_key_auth_requested(self) -> asyncssh.SSHKeyPair | None:
        if not self._pairs:
            return None
        self.offered.append(self._pairs.pop(0))
        return self.offered[-1]

    def _password_once(self, method: str) -> str | None:
        """The password, once for each method: PAM may refuse it in the one and take it in the
        other.
        """
        if method in self._password_tried or self._node._password is None:
            return None
        if self._trust.changed:
            self._node._say(
                "no password for a host whose key has changed: forget the old key (ssh-keygen -R), or known_hosts=None"
            )
            return None
        self._password_tried.add(method)
        return cast("str | None", self._node._password)

    def password_auth_requested(self) -> str | None:
        return self._password_once("password")

    def kbdint_auth_requested(self) -> str | None:
        begun, self._kbdint_begun = self._kbdint_begun, True
        return "" if self._node._password is not None and not begun else None

    def kbdint_challenge_received(
        self, name: str, instructions: str, lang: str, prompts: Sequence[tuple[str, bool]]
    ) -> list[str] | None:
        if not prompts:
            return []
        hidden = (
            len(prompts) == 1 and not prompts[0][1]
        )  # a question whose answer is echoed is no password's
        secret = self._password_once("kbdint") if hidden else None
        return None if secret is None else [secret]

    def auth_completed(self) -> None:
        if self.offered:
            _accepted_keys.add(self.offered[-1].public_data)
        self._node._formatter_event("auth_completed", self._node.username)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost, self.why = True, exc
        if self.route:
            self.route.reap()
        with contextlib.suppress(ReferenceError):
            if self.begun:
                self._node._formatter_event("connection_lost", exc, self._node.username)


class _Link:
    """One ssh connection, and the sessions open on it."""

    def __init__(self, conn: asyncssh.SSHClientConnection, client: _Client, route: _Route) -> None:
        self.conn = conn
        self.client, self._route = client, route
        self._loop = asyncio.get_running_loop()
        self.sessions = 0
        self.limit = SESSIONS_PER_CONNECTION
        self.forwards = False  # leads to other nodes
        self.reserved = False  # for one session that must be alone

    @property
    def alive(self) -> bool:
        return not self.client.lost

    def drop(self) -> None:
        """Cut the connection at once, even when its event loop is gone."""
        self.client.lost = True
        with contextlib.suppress(
            RuntimeError
        ):  # raised by a closed loop, which can run no callback
            self.conn.abort()
        transport = self._route.wire.transport if self._route.wire else None
        if (
            self._loop.is_closed()
            and isinstance(transport, asyncio.Transport)
            and (sock := vars(transport).get("_sock"))
        ):
            # asyncio has no call to close a transport whose loop is gone, and it would warn
            # when collected
            sock.close()
            vars(transport)["_sock"] = None
        self._route.reap()

    async def close(self) -> None:
        """Close politely, within CLOSE_TIMEOUT; cancelling it cuts the connection."""
        self.client.lost = True
        try:
            self.conn.close()
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self.conn.wait_closed()
            self._route.reap()
        except BaseException as exc:
            self.drop()
            if not isinstance(exc, TimeoutError | OSError | asyncssh.Error):
                raise


class _Session(asyncssh.SSHClientSession[bytes]):
    """One command's channel: bytes to the sink as they come, and how it ended."""

    def __init__(self, sink: _Sink, step: StepRecord) -> None:
        self._sink, self._step = sink, step
        self.chan: asyncssh.SSHClientChannel[bytes] | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.failed: asyncio.Future[None] = (
            asyncio.get_running_loop().create_future()
        )  # on this side
        self.status: int | str | None = None
        self.error: Exception | None = None
        self.guarded = False  # the guard over there waits for the end of stdin
        self.whole = False  # all of the output has come
        self.writable = asyncio.Event()
        self.writable.set()

    def connection_made(self, chan: asyncssh.SSHClientChannel[bytes]) -> None:
        self.chan = chan

    def data_received(self, data: bytes, datatype: int | None) -> None:
        if datatype:
            self._step.bytes_err += len(data)
        else:
            self._step.bytes_out += len(data)
        try:
            if not self.error:
                self._sink.data(data, datatype)
        except Exception as exc:
            # the sink's failure (a full disk, a closed pipe) is this command's, not the
            # connection's
            self.fail(exc)

    def eof_received(self) -> bool:
        self.whole = True
        # a command that closes its outputs goes on: answering with our end of file would end it
        return True

    def exit_status_received(self, status: int) -> None:
        self.status = status

    def exit_signal_received(self, signal: str, core_dumped: bool, msg: str, lang: str) -> None:
        self.status = _brief(signal)

    def connection_lost(self, exc: Exception | None) -> None:
        self.writable.set()
        if not self.ended.done():
            self.ended.set_result(None)

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def abort(self) -> None:
        """Over there, the end of stdin is what ends the command; the channel closes soon after.
        Closed at once, a command that prints could die of SIGPIPE before the guard sees that it was
        alive, and its children would be taken for left on purpose.
        """
        if self.chan and self.guarded:
            self.chan.write_eof()
            asyncio.get_running_loop().call_later(CLOSE_TIMEOUT / 4, self.chan.abort)
        elif self.chan:
            self.chan.abort()

    async def feed(self, stdin: AsyncIterator[bytes]) -> None:
        """Give standard input at the pace of the command, then its end."""
        assert self.chan
        try:
            async for data in stdin:
                await self.writable.wait()
                if self.ended.done() or self.chan.is_closing():
                    return
                self.chan.write(data)
            self.chan.write_eof()
        except Exception as exc:  # the iterator may be a user's
            if not self.ended.done():
                self.fail(ApsshError(f"standard input: {_reason(exc)}"))

    def fail(self, exc: Exception) -> None:
        """Let who waits for the end give up."""
        if not self.failed.done():
            self.error = exc
            self.failed.set_result(None)


class _Node:
    """What SshNode and LocalNode share: running commands of a user's, and showing what happens."""

    hostname: str
    username: str
    port = 22
    gateway: SshNode | None = None
    formatter: Formatter
    verbose: bool | None
    guard = True
    debug = False
    _host_key_shown: str | None = None

    @property
    def _endpoint(self) -> Endpoint:
        return self.username, self.hostname, self.port

    def _formatter_event(self, event: str, *args: Any) -> None:
        getattr(self.formatter, event)(self.hostname, *args)

    def _say(self, text: str) -> None:
        """A word about this host on stderr, in apssh's own name."""
        _screen.say(f"{escape(self.hostname)}: {escape(text)}")

    def _adopt(self, formatter: Formatter | None, verbose: bool | None) -> None:
        self.verbose = verbose
        talk = bool(verbose or self.debug)
        self.formatter = HostFormatter(verbose=talk) if formatter is None else formatter
        self.formatter.add_endpoint(self._endpoint, verbose=talk)

    async def __aenter__(self) -> Self:
        await self.connect_lazy()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def run(
        self,
        command: str,
        *,
        timeout: float | None = None,
        x11: bool = False,
        ignore_outputs: bool = False,
        capture: Capture | None = None,
    ) -> int | str:
        """Run a command line as ssh would; the exit status, or the signal's name without SIG.

        ``timeout`` in seconds (None: no limit). Raises ConnectionFailedError when the host cannot
        be reached or is lost, CommandFailedError (kind timeout) when the command had to be ended.
        Cancelling it ends the command over there.
        """
        step = Run(
            command, timeout=timeout, x11=x11, ignore_outputs=ignore_outputs, capture=capture
        )
        return await step._run(self, StepRecord())

    async def put_file_s(self, localpaths: Any, remotepath: str, **options: bool) -> None:
        """Copy local files there, as the command Push does."""
        await Push(localpaths, remotepath, **options)._run(self, StepRecord())

    async def get_file_s(self, remotepaths: Any, localpath: str, **options: bool) -> None:
        """Copy remote files here, as the command Pull does."""
        await Pull(remotepaths, localpath, **options)._run(self, StepRecord())

    async def _execute(
        self,
        command: str,
        step: StepRecord,
        *,
        sink: _Sink | None = None,
        timeout: float | None = None,
        **options: Any,
    ) -> int | str:
        """Run a command line within a time; every way to run something comes through here."""
        if not command.strip():
            raise UsageError(
                "an empty command: it would open a shell that nobody talks to", host=self.hostname
            )
        sink = sink or self.formatter.endpoint_sink(self._endpoint)
        step.command = step.command or command
        try:
            try:
                return await self._session(command, step, sink, timeout, **options)
            finally:
                sink.end()
        except ApsshError as exc:
            if not isinstance(exc, UsageError):  # a sink, or standard input, knows no host
                exc.host = exc.host or self.hostname
            raise
        except TimeoutError:
            raise _timed_out(timeout, self, command) from None
        except BrokenPipeError:
            raise
        except OSError as exc:
            raise ApsshError(
                f"its output could not be written: {_reason(exc)}",
                host=self.hostname,
                command=command,
            ) from exc

    async def _apply_config(self) -> None:
        """Nothing to complete, as a rule."""

    @contextlib.contextmanager
    def _shown(self, command: str) -> Iterator[None]:
        """What the formatter hears of a session that is open."""
        self.formatter.endpoint_started(self._endpoint)
        self._formatter_event("session_start", command)
        try:
            yield
        finally:
            self._formatter_event("session_stop", command)

    connect_lazy: Callable[[], Coroutine[Any, Any, Any]]
    close: Callable[[], Coroutine[Any, Any, None]]
    _session: Callable[..., Coroutine[Any, Any, int | str]]


def _timed_out(timeout: float | None, node: _Node, command: str) -> ApsshError:
    """A TimeoutError is the end of a step's time; with no limit, the system's own (ETIMEDOUT)."""
    if timeout is None:
        return ApsshError(f"timed out: {escape(command)}", host=node.hostname, command=command)
    return CommandFailedError(
        f"no end within {timeout:g} s: {escape(command)}",
        host=node.hostname,
        kind="timeout",
        command=command,
    )


_VERIFY = object()  # known_hosts: the default policy


class SshNode(_Node):
    """How to reach a host by ssh: a lazy connection, shared by all that uses the node.

    Nothing is read, asked or opened before the first use. ``username`` defaults to root. ``keys``:
    file names or key objects; None or empty: what ``load_private_keys()`` finds. ``gateway``: the
    SshNode to go through, to any depth. ``known_hosts``: by default the host's key is verified, and
    recorded when the host was never seen; None verifies nothing; a path uses that file; a list of
    ``asyncssh.SSHKey`` trusts these alone. ``timeout``: seconds (30) to a ready connection, all
    hops, key exchange and login included, waiting for a turn excluded; None: no limit.
    ``formatter``: where output goes, by default a HostFormatter.

    Further: ``password``; ``host_keys``: accept-new, yes or no, over APSSH_HOST_KEYS; ``config``:
    an ssh_config file, or True for the user's own (the user is then its User, else yours);
    ``guard``: False for hosts without a POSIX shell (commands then outlive a lost connection);
    ``keepalive``: seconds between probes of a silent connection (9; dead after two unanswered);
    ``forward_agent``; ``address``: what to connect to when it is not ``hostname``;
    ``proxy_command``, as in ssh_config(5). Raises UsageError for a host name, port or time that
    cannot be.
    """

    def __init__(
        self,
        hostname: str,
        *,
        username: str | None = None,
        keys: Collection[str | os.PathLike[str] | Key] | None = None,
        gateway: SshNode | None = None,
        known_hosts: Any = _VERIFY,
        port: int = 22,
        formatter: Formatter | None = None,
        verbose: bool | None = None,
        debug: bool = False,
        timeout: float | None = CONNECT_TIMEOUT,
        password: str | None = None,
        host_keys: str | None = None,
        config: str | bool | None = None,
        guard: bool = True,
        keepalive: float = KEEPALIVE_INTERVAL,
        forward_agent: bool = False,
        address: str | None = None,
        proxy_command: str | None = None,
    ) -> None:
        if not isinstance(hostname, str) or not _is_host(hostname):
            raise UsageError(f"{_brief(str(hostname))!r} is not a host name or an address")
        self.hostname = hostname
        self.username = username or "root"
        if not isinstance(port, int) or not 0 < port < 65536:
            raise UsageError(f"port {port!r} of {hostname}: a port is a number from 1 to 65535")
        if timeout is not None and timeout <= 0:
            raise UsageError(
                f"timeout {timeout!r} of {hostname}: seconds, more than 0 (None: no limit)"
            )
        if gateway is not None and not isinstance(gateway, SshNode):
            raise UsageError(f"gateway of {hostname}: an SshNode, not {type(gateway).__name__}")
        if host_keys not in (None, *_POLICIES):
            raise UsageError(f"host key policy {_brief(str(host_keys))}: accept-new, yes or no")
        self.port, self.gateway = port, gateway
        self.keys = [
            os.fspath(key) if isinstance(key, os.PathLike) else key
            for key in ([keys] if isinstance(keys, str | os.PathLike) else keys or ())
        ]
        self.known_hosts, self.host_keys = known_hosts, host_keys
        self.timeout, self.debug, self.guard = timeout, debug, guard
        self.keepalive, self.forward_agent = keepalive, forward_agent
        self._address, self._proxy_command = address, proxy_command
        self._password = password
        self._config, self._username_given = config, username is not None
        self._host_config = _UNCONFIGURED
        self._target = self.hostname  # as the command line named it
        self._known_hosts_files: tuple[str, ...] = KNOWN_HOSTS_FILES
        self._host_key_shown: str | None = None  # the fingerprint that it presented last
        self._live: _Live | None = None
        self._leads = False  # others go through it
        self._adopt(formatter, verbose)

    def __repr__(self) -> str:
        via = f" through {self.gateway!r}" if self.gateway else ""
        return (
            f"<SshNode {self.username}@{self.hostname}"
            + (f":{self.port}" if self.port != 22 else "")
            + f"{via}>"
        )

    def __del__(self) -> None:
        if live := vars(self).get(
            "_live"
        ):  # a node that is forgotten once its loop has gone leaves no socket
            live.drop()

    # connection

    def distance(self) -> int:
        """The number of hops: 1 without a gateway. Raises UsageError when a gateway is behind
        itself.
        """
        return len(self._hops())

    def _hops(self) -> list[SshNode]:
        """The nodes on the way, the farthest gateway first, this node last."""
        hops: list[SshNode] = []
        node: SshNode | None = self
        while node:
            if node in hops:
                raise UsageError(
                    f"{self.hostname}: its gateways go in a circle, through {node.hostname}"
                )
            hops.insert(0, node)
            node = node.gateway
        return hops

    def is_connected(self) -> bool:
        """Whether a connection is up (it may have to be made anew if its event loop is gone)."""
        return bool(self._live and any(link.alive for link in self._live.links))

    def is_sftp_connected(self) -> bool:
        """Whether an SFTP session is open."""
        return bool(self._live and self._live.sftp and not self._live.sftp_ended())

    async def connect_lazy(self) -> asyncssh.SSHClientConnection:
        """Connect unless it is done; concurrent calls make one connection. Raises
        ConnectionFailedError.
        """
        return (await self._connected()).conn

    async def sftp_connect_lazy(self) -> asyncssh.SFTPClient:
        """Open an SFTP session (names are bytes) unless it is done. Raises ConnectionFailedError,
        TransferError.
        """
        live = self._here()
        if not self.is_sftp_connected():
            await _Shared.once(live.opening, "sftp", functools.partial(self._open_sftp, live))
        assert live.sftp
        return live.sftp[0]

    async def close(self) -> None:
        """Close the connections, politely if their loop runs, else at once. The gateway's stay
        open.
        """
        live, self._live = self._live, None
        if live is None:
            return
        if live.loop is not asyncio.get_running_loop():
            live.drop()
            return
        if live.sftp:
            live.sftp[0].exit()
            self._formatter_event("sftp_stop")
        await asyncio.gather(*(link.close() for link in live.links if link.alive))

    def _here(self) -> _Live:
        """What is open in this event loop; what another loop has left is dropped."""
        loop = asyncio.get_running_loop()
        if self._live and self._live.loop is not loop:
            self._live.drop()
            self._live = None
        if self._live is None:
            self._live = _Live(loop)
        return self._live

    async def _connected(self) -> _Link:
        """A link that is up, by preference the first."""
        live = self._here()
        while True:
            if link := next(
                (link for link in live.links if link.alive and not link.reserved), None
            ):
                return link
            await self._add_link(live)

    async def _add_link(self, live: _Live) -> None:
        """One more connection; concurrent calls wait for the same, and share its failure."""
        link = await _Shared.once(live.opening, "link", self._connect)
        if self._live is not live:
            await link.close()
            raise ConnectionFailedError("closed while it connected", host=self.hostname)
        live.links = [each for each in live.links if each.alive and each is not link] + [link]
        live.wake()

    @contextlib.asynccontextmanager
    async def _slot(self, alone: bool = False) -> AsyncIterator[_Link]:
        """A link with room for one more session: sshd refuses the eleventh, so there may be further
        connections. ``alone``: with nothing else on it, so that it can be cut.
        """
        live = self._here()
        live.forget_sftp()
        while not (
            link := next(
                (
                    link
                    for link in live.links
                    if link.alive
                    and not link.reserved
                    and (
                        not link.sessions and not link.forwards
                        if alone
                        else link.sessions < link.limit
                    )
                ),
                None,
            )
        ):
            alive = sum(link.alive for link in live.links)
            if alive < live.max_links or "link" in live.opening:
                try:
                    await self._add_link(live)
                except ConnectionFailedError:
                    if not any(link.alive for link in live.links):
                        raise
                    live.max_links = alive  # the host takes no more: queue
            elif sum(link.sessions for link in live.links if link.alive) > bool(live.sftp):
                await live.freed.wait()
            else:
                raise ConnectionFailedError(
                    "the host takes one session, and SFTP holds it",
                    host=self.hostname,
                    kind="refused",
                )
            live.forget_sftp()
        link.sessions += 1
        link.reserved = alone
        try:
            yield link
        finally:
            link.sessions -= 1
            link.reserved = False
            live.wake()

    async def _connect(self) -> _Link:
        """Make one connection. Cancelling it leaves no socket."""
        await self._apply_config()
        self._hops()
        keys = await self._login_keys()
        scope = asyncio.timeout(self.timeout)
        clock = _Clock(scope)
        try:
            async with scope, _login_pairs(keys) as pairs:
                return await self._log_in(clock, pairs)
        except TimeoutError:
            raise ConnectionFailedError(
                f"no connection within {self.timeout:g} s{clock.progress and ': '}{clock.progress}",
                host=self.hostname,
                kind="lost" if clock.drops else "timeout",
            ) from None

    async def _log_in(self, clock: _Clock, pairs: list[asyncssh.SSHKeyPair]) -> _Link:
        """Attempts to connect: a drop before login (MaxStartups) is tried again after a pause; a
        server that takes only a few keys on a connection (MaxAuthTries) is offered the others on
        the next.
        """
        rounds, certified = 0, True
        startups = _Limits.here().startups(
            self._address or self.hostname, self.port, id(self.gateway)
        )
        while True:
            trust = _Trust(
                self, certified
            )  # anew each time: the first attempt may have recorded the host
            client, route, link = _Client(self, list(pairs), trust), None, None
            try:
                async with contextlib.AsyncExitStack() as turns:
                    await turns.enter_async_context(clock.turn(startups))
                    client.route = route = _Route(self, clock, turns)
                    conn = await asyncssh.connect(
                        self._address or self.hostname,
                        self.port,
                        tunnel=cast("Any", route),
                        username=self.username,
                        client_factory=lambda client=client: client,
                        config=None,
                        client_keys=None,
                        agent_path=None,
                        agent_forwarding=os.environ.get("SSH_AUTH_SOCK", False)
                        if self.forward_agent
                        else False,
                        host_key_alias=self._host_config.host_key_alias,
                        known_hosts=([],) * 7,
                        server_host_key_algs=trust.algorithms(),
                        compression_algs=None,
                        keepalive_interval=self.keepalive,
                        keepalive_count_max=KEEPALIVE_COUNT,
                        login_timeout=0,
                        gss_host=None,
                        **{"encryption_algs": CIPHERS, **self._host_config.login},
                    )
                    link = _Link(conn, client, route)
                    return link
            except ConnectionFailedError as exc:  # the gateway's
                raise ConnectionFailedError(
                    f"gateway {exc.host}: {exc.message}", host=self.hostname, kind=exc.kind
                ) from None
            except (OSError, asyncssh.Error, ValueError) as exc:
                refused = isinstance(exc, asyncssh.PermissionDenied)
                foreign = route.foreign() if route and not client.begun else ""
                if (
                    not client.begun
                    and isinstance(
                        exc, asyncssh.ConnectionLost | ConnectionResetError | BrokenPipeError
                    )
                    and not client.host_key_error
                    and (not foreign or "MaxStartups" in foreign)
                ):
                    clock.drops += 1
                    exchanging = (
                        route is not None and route.greeted
                    )  # MaxStartups drops before the banner
                    if clock.drops <= (1 if exchanging else RETRIES_BEFORE_LOGIN):
                        await asyncio.sleep(random.uniform(0.5, 1) * 0.2 * 2**clock.drops)
                        continue
                    raise ConnectionFailedError(
                        f"dropped before login, {clock.drops} times"
                        + (", in the key exchange (no algorithm in common?)" if exchanging else ""),
                        host=self.hostname,
                    ) from None
                if foreign:
                    raise ConnectionFailedError(
                        foreign, host=self.hostname, kind="refused"
                    ) from None
                if (
                    isinstance(exc, asyncssh.HostKeyNotVerifiable)
                    and not client.host_key_error
                    and trust.certified
                ):
                    # after a certificate that does not count try again with the plain key, as
                    # ssh does
                    certified = False
                    continue
                offered = {pair.public_data for pair in client.offered}
                left = [pair for pair in pairs if pair.public_data not in offered]
                if client.begun and not refused and offered and left and rounds < MAX_AUTH_ROUNDS:
                    rounds, pairs = rounds + 1, left
                    continue
                raise (client.host_key_error or self._failure(exc, client)) from None
            finally:
                if route and not link:
                    clock.progress = (
                        f"dropped before login, {_count(clock.drops, 'time')}"
                        if clock.drops
                        else "the login does not end"
                        if client.begun
                        else route.progress()
                    )
                    route.abandon()

    def _failure(self, exc: Exception, client: _Client | None = None) -> ConnectionFailedError:
        """The one line that says why there is no connection."""
        text, kind = str(exc), "lost"
        if (
            isinstance(exc, socket.gaierror)
            or "Name or service not known" in text
            or "name resolution" in text
        ):
            kind, text = "dns", f"unknown host name {self._address or self.hostname}"
        elif isinstance(exc, ConnectionRefusedError) or "Connection refused" in text:
            kind, text = "refused", f"nothing listens on port {self.port}"
        elif isinstance(exc, TimeoutError) or "timed out" in text:
            kind, text = "timeout", "no answer"
        elif isinstance(exc, asyncssh.PermissionDenied) or (
            client and client.begun and "authentication failures" in text
        ):
            tried = f"{len(client.offered)} key(s)" if client else "no key"
            kind, text = (
                "auth",
                f"login as {self.username} refused, after {tried}"
                + (" and the password" if client and client._password_tried else ""),
            )
        elif isinstance(exc, asyncssh.ChannelOpenError) and "SSH connection closed" not in text:
            where = (
                f"gateway {self.gateway.hostname}: "
                if client and self.gateway
                else "no session there: "
            )
            kind, text = "refused", f"{where}{text}"
        elif isinstance(exc, asyncssh.Error):
            text = exc.reason
        elif isinstance(exc, ValueError):  # a config that leaves no algorithm
            kind = "local"
        elif isinstance(exc, OSError):
            kind = (
                "lost"
                if isinstance(exc, ConnectionError)
                else "local"
                if exc.errno in (errno.EMFILE, errno.ENFILE)
                else "refused"
            )
            text = os.strerror(exc.errno).lower() if exc.errno else text
        return ConnectionFailedError(
            escape(text) or "connection lost", host=self.hostname, kind=kind
        )

    async def _login_keys(self) -> list[Key]:
        """The keys to offer: loaded once for all nodes that name the same, in a thread, since a
        passphrase may be asked.
        """
        loaded, config = _Limits.here().keys, self._host_config
        named = (
            *(key if isinstance(key, str) else id(key) for key in self.keys),
            config.identity_files,
            config.certificate_files,
            config.identities_only,
            config.identity_agent,
        )
        if named not in loaded or loaded[named].abandoned:
            loaded[named] = _Shared(asyncio.to_thread(_keys_of_run, self))
        try:
            return cast("list[Key]", await loaded[named].wait())
        except UsageError:
            loaded.pop(named, None)
            raise

    async def _apply_config(self) -> None:
        """Complete what was not given from an ssh_config, once."""
        if self._config and self._host_config is _UNCONFIGURED:
            config = _SshConfig(None if self._config is True else self._config)
            given = Hop(
                self.hostname,
                self.username if self._username_given else None,
                None if self.port == 22 else self.port,
            )
            answers = await asyncio.to_thread(config.lookup_all, [given])
            before = self._endpoint
            _configure(self, *answers.values())
            if not self._username_given and not self._host_config.user:
                self.username = getpass.getuser()  # as ssh
            self.port = self._host_config.port or 22 if self.port == 22 else self.port
            self.formatter.add_endpoint(self._endpoint, bool(self.verbose), before)
            if self.timeout == CONNECT_TIMEOUT:
                self.timeout = self._host_config.connect_timeout or CONNECT_TIMEOUT
            for index, hop in enumerate(
                jumps := _jumps(self._host_config) if self.gateway is None else ()
            ):
                way = (
                    jumps[: index + 1],
                    str(self._config),
                    *(key if isinstance(key, str) else id(key) for key in self.keys),
                    self.host_keys,
                )
                self.gateway = _jump_nodes.get(way) or SshNode(
                    hop.host,
                    username=hop.user,
                    port=hop.port or 22,
                    gateway=self.gateway,
                    config=self._config,
                    keys=self.keys,
                    host_keys=self.host_keys,
                    formatter=_quiet,
                )
                _jump_nodes[way] = self.gateway

    # sessions

    async def _session(
        self,
        command: str,
        step: StepRecord,
        sink: _Sink,
        timeout: float | None,
        *,
        x11: bool = False,
        pty: bool = False,
        stdin: AsyncIterator[bytes] | None = None,
        env: Mapping[str, str] | None = None,
        quiet: bool = False,
        plain: bool = False,
    ) -> int | str:
        """One channel; its time begins when it opens. Cancelling it closes the channel, which ends
        the command. ``plain``: a command of our own, that needs no guard and interests nobody.
        """
        if x11 and not os.environ.get("DISPLAY"):
            raise UsageError("x11: no DISPLAY here to forward to", host=self.hostname)
        guard = self.guard and not plain
        if guard:
            text = _guarded(command, stdin_is_data=stdin is not None, pty=pty, env=env, quiet=quiet)
        else:
            text = f"{{ {command}\n}} >/dev/null 2>&1" if quiet else command
        for attempt in itertools.count():
            async with (
                self._slot(alone=guard and (stdin is not None or pty)) as link,
                asyncio.timeout(timeout),
            ):
                session, feeder = _Session(sink, step), None
                session.guarded = guard and stdin is None and not pty
                try:
                    await self._open(
                        cast("Any", link.conn).create_session(
                            lambda session=session: session,
                            text,
                            encoding=None,
                            window=SESSION_WINDOW,
                            x11_forwarding=x11,
                            request_pty="force" if pty else False,
                            term_type=os.environ.get("TERM", "dumb") if pty else None,
                            term_size=tuple(shutil.get_terminal_size()) if pty else (),
                            env=None if guard else env,
                        ),
                        lambda opened: opened[1].abort(),
                    )
                    assert session.chan
                    if stdin:
                        feeder = asyncio.create_task(session.feed(stdin))
                    elif not guard:
                        # with the guard, the end of stdin is what ends the command
                        session.chan.write_eof()
                    with contextlib.nullcontext() if plain else self._shown(command):
                        # not awaited themselves: that would cancel them with us
                        await asyncio.wait(
                            [session.ended, session.failed], return_when=asyncio.FIRST_COMPLETED
                        )
                except (asyncssh.Error, ConnectionError) as exc:
                    if await self._refused(link, exc, attempt):
                        continue
                    step.may_run = not link.alive or isinstance(
                        exc, ConnectionError
                    )  # the request may have arrived
                    raise (
                        self._failure(exc)
                        if link.alive
                        else self._lost(link, step.command or command)
                    ) from None
                finally:
                    if feeder:
                        feeder.cancel()
                    if session.chan and not session.ended.done():
                        step.may_run = True
                        leaderless = (
                            session.status is not None
                        )  # it has ended, what holds its outputs has not
                        session.abort()
                        # for these, or where stdin is data, the guard waits for the end of the
                        # connection
                        if alone := not link.forwards and (
                            link.reserved or (leaderless and link.sessions == 1)
                        ):
                            link.reserved = True  # nobody may join what is to be cut
                            link.conn.set_keepalive(
                                CLOSE_TIMEOUT / 5, 1
                            )  # does the server hear us?
                        try:
                            # the slot is free when the server says so; the guard waits for 2 s
                            # before it kills
                            await asyncio.wait(
                                [session.ended], timeout=CLOSE_TIMEOUT * (0.5 if alone else 1.3)
                            )
                            step.may_run = not (
                                guard
                                and link.alive
                                and (alone or (session.ended.done() and not leaderless))
                            )
                        finally:
                            # cancelled again; or it ended by itself just before the guard could end
                            # it
                            if alone or (
                                guard
                                and session.status not in ("TERM", "KILL")
                                and link.sessions == 1
                                and not link.forwards
                            ):
                                link.drop()
                if session.error:
                    raise session.error
                if session.status is None or not (session.whole or link.alive):
                    step.may_run = True
                    raise self._lost(link, step.command or command)
                return session.status
        raise AssertionError

    @staticmethod
    async def _refused(link: _Link, exc: Exception, attempt: int) -> bool:
        """Whether a session was refused because there are too many (this server's MaxSessions is
        lower, or it has not yet noticed that one ended), and it is worth to ask again.
        """
        if (
            not link.alive
            or getattr(exc, "code", None) != asyncssh.OPEN_CONNECT_FAILED
            or "SSH connection closed" in str(exc)
            or attempt
            >= (20 if link.sessions <= 1 else SESSIONS_PER_CONNECTION * CONNECTIONS_PER_NODE)
        ):
            return False
        link.limit = max(link.sessions - 1, 1)
        await asyncio.sleep(0.05)
        return True

    def _lost(self, link: _Link, command: str) -> ConnectionFailedError:
        why = f": {escape(str(link.client.why))}" if link.client.why else ""
        return ConnectionFailedError(
            f"connection lost during {escape(command)}{why}",
            host=self.hostname,
            kind="lost",
            command=command,
        )

    @staticmethod
    async def _open(work: Awaitable[_T], close: Callable[[_T], None]) -> _T:
        """Open a channel; cancelled meanwhile, the channel is closed as soon as it is there, so
        that its slot is not lost.
        """
        opening = asyncio.ensure_future(work)
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(
                lambda task: (
                    close(task.result()) if not task.cancelled() and not task.exception() else None
                )
            )
            await asyncio.wait([opening], timeout=CLOSE_TIMEOUT)
            raise
        except (
            AttributeError
        ) as exc:  # asyncssh's, when the connection goes while the channel opens
            raise asyncssh.ConnectionLost(str(exc)) from None

    async def _open_sftp(self, live: _Live) -> None:
        """An SFTP session takes one of the connection's sessions, for as long as it lives."""
        for attempt in itertools.count():
            async with self._slot() as link:
                opener = cast("Any", _SftpOpener(link.conn))
                try:
                    async with asyncio.timeout(self.timeout):
                        sftp = await self._open(
                            asyncssh.SSHClientConnection.start_sftp_client(
                                opener, path_errors="surrogateescape"
                            ),
                            asyncssh.SFTPClient.exit,
                        )
                except BaseException as exc:
                    if opener.channel:  # nobody will use it: its session is free
                        opener.channel.abort()
                    if not isinstance(exc, asyncssh.Error | OSError):
                        raise
                    if await self._refused(link, exc, attempt):
                        continue
                    if not link.alive or "SSH connection closed" in str(exc):
                        raise self._failure(exc) from None
                    why = "no answer" if isinstance(exc, TimeoutError) else _reason(exc)
                    raise TransferError(f"no SFTP over there: {why}", host=self.hostname) from None
                live.sftp = sftp, link, opener.channel
                link.sessions += 1
                self._formatter_event("sftp_start")
                return

    # files

    async def mkdir(self, path: str) -> None:
        """Make a remote folder, parents included; one that exists is fine. Raises TransferError."""
        sftp = await self.sftp_connect_lazy()
        try:
            await sftp.makedirs(_remote(path), exist_ok=True)
        except (asyncssh.SFTPError, OSError) as exc:
            raise TransferError(f"{escape(path)}: {_reason(exc)}", host=self.hostname) from None

    async def put_string_script(self, body: str, remotefile: str) -> None:
        """Write a text into a remote file that can be executed (mode 755). Raises TransferError."""
        data, copy_ = os.fsencode(body), _Copy(self, StepRecord())
        sftp, target = await self.sftp_connect_lazy(), _remote(remotefile)
        try:
            await copy_.push_content(
                sftp,
                lambda size, position: data[position : position + size],
                target,
                await copy_._remote_stat(sftp, target),
                asyncssh.SFTPAttrs(permissions=0o755),
            )
        except asyncssh.SFTPError as exc:
            raise TransferError(
                f"{escape(remotefile)}: {_reason(exc)}", host=self.hostname
            ) from None

    async def _copy(
        self, copy_: _Copy, pushing: bool, sources: list[str], destination: str, many: bool
    ) -> None:
        sftp = await self.sftp_connect_lazy()
        await copy_.run((copy_.push if pushing else copy_.pull)(sftp, sources, destination, many))

    @contextlib.asynccontextmanager
    async def _script_folder(self, files: Mapping[str, tuple[bytes, int]]) -> AsyncIterator[str]:
        """A private folder of the host that holds these files, removed afterwards: its path."""
        sftp, said = await self.sftp_connect_lazy(), _HeldSink()
        folder = name = f"{REMOTE_FOLDER}/{os.urandom(8).hex()}"
        script = _FOLDER.format(folder, sentinel=_SENTINEL.format(folder) if self.guard else "")
        making = StepRecord(command=f"the making of ~/{folder}")
        try:
            try:
                status = await self._session(
                    f"exec /bin/sh -c '{script}'", making, said, None, plain=True
                )
                if status or not said.stdout():
                    why = said.stderr().decode("utf-8", "replace").strip() or f"status {status}"
                    raise TransferError(f"~/{name}: {_brief(why, 200)}", host=self.hostname)
                folder = os.fsdecode(
                    said.stdout().splitlines()[-1]
                )  # absolute: SFTP may begin elsewhere (internal-sftp -d)
                async with asyncio.TaskGroup() as group:
                    for file, (data, mode) in files.items():
                        group.create_task(self._write_private(sftp, f"{folder}/{file}", data, mode))
            except* (asyncssh.Error, OSError, ValueError) as group_exc:
                exc = group_exc.exceptions[0]
                if isinstance(exc, ApsshError):
                    raise exc from None
                if isinstance(exc, _LOST):
                    raise ConnectionFailedError(
                        f"connection lost while ~/{name} was made", host=self.hostname
                    ) from None
                raise TransferError(f"~/{name}: {_reason(exc)}", host=self.hostname) from None
            yield folder
        finally:
            with contextlib.suppress(asyncssh.Error, OSError, TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await sftp.rmtree(folder, ignore_errors=True)

    @staticmethod
    async def _write_private(sftp: asyncssh.SFTPClient, path: str, data: bytes, mode: int) -> None:
        opened = await sftp.open(
            path,
            asyncssh.FXF_WRITE | asyncssh.FXF_CREAT | asyncssh.FXF_EXCL,
            asyncssh.SFTPAttrs(permissions=mode & 0o700),
            encoding=None,
        )
        async with _Copy._closing(opened) as file:
            await file.write(data, 0)


class _SftpOpener:
    """A connection as asyncssh's start_sftp_client sees it. It keeps the channel, which asyncssh
    would leave open when no SFTP server answers on it (a start-up file that prints), and which
    tells when the server has ended SFTP but not the connection.
    """

    def __init__(self, conn: asyncssh.SSHClientConnection) -> None:
        self._conn = conn
        self.channel: asyncssh.SSHClientChannel[bytes] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._conn, name)

    async def open_session(self, **options: Any) -> Any:
        """As the connection's."""
        opened: Any = await self._conn.open_session(**options)
        self.channel = opened[0].channel
        return opened


_jump_nodes: weakref.WeakValueDictionary[object, SshNode] = (
    weakref.WeakValueDictionary()
)  # one for all nodes behind it
_quiet = Formatter()  # for gateways: they run nothing


class _Live:
    """What a node has open in one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.links: list[_Link] = []
        self.max_links = CONNECTIONS_PER_NODE
        self.opening: dict[str, _Shared] = {}
        self.sftp: (
            tuple[asyncssh.SFTPClient, _Link, asyncssh.SSHClientChannel[bytes] | None] | None
        ) = None
        self.freed = asyncio.Event()

    def sftp_ended(self) -> bool:
        """Whether the SFTP session is over: its connection is, or its server ended it."""
        return bool(
            self.sftp
            and not (self.sftp[1].alive and not (self.sftp[2] and self.sftp[2].is_closing()))
        )

    def forget_sftp(self) -> None:
        """Give back the session of an SFTP that has ended."""
        if self.sftp and self.sftp_ended():
            self.sftp[1].sessions -= 1
            self.sftp = None

    def wake(self) -> None:
        """A session has ended or a connection has come: those who wait for it look again."""
        self.freed.set()
        self.freed = asyncio.Event()

    def drop(self) -> None:
        """Cut everything at once, even when the loop is gone."""
        for link in self.links:
            if link.alive:
                link.drop()


class _LocalOutput(asyncio.Protocol):
    """An output of a command of this machine: bytes to the sink as they come, its end, and what
    broke.
    """

    def __init__(
        self, sink: _Sink, step: StepRecord, datatype: int | None, broken: asyncio.Future[None]
    ) -> None:
        self._sink, self._step, self._datatype, self._broken = sink, step, datatype, broken
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        if self._datatype:
            self._step.bytes_err += len(data)
        else:
            self._step.bytes_out += len(data)
        try:
            if not self._broken.done():
                self._sink.data(data, self._datatype)
        except Exception as exc:
            self._broken.set_exception(exc)

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set_result(None)


class LocalNode(_Node):
    """This machine, with the same commands: through /bin/sh, in the program's current folder; Push
    and Pull are plain copies.
    """

    def __init__(self, formatter: Formatter | None = None, verbose: bool | None = None) -> None:
        self.hostname = "LOCALNODE"
        self.username = getpass.getuser()
        self._adopt(formatter, verbose)

    def __repr__(self) -> str:
        return "<LocalNode>"

    async def connect_lazy(self) -> None:
        """Nothing to connect, nor to close."""

    sftp_connect_lazy = close = connect_lazy

    def is_connected(self) -> bool:
        """Always."""
        return True

    is_sftp_connected = is_connected

    def distance(self) -> int:
        """No hop."""
        return 0

    async def mkdir(self, path: str) -> None:
        """Make a folder, parents included; one that exists is fine."""
        os.makedirs(path, exist_ok=True)

    async def put_string_script(self, body: str, remotefile: str) -> None:
        """Write a text into a file that can be executed (mode 755)."""
        Path(remotefile).write_bytes(os.fsencode(body))
        os.chmod(remotefile, 0o755)

    async def _session(
        self,
        command: str,
        step: StepRecord,
        sink: _Sink,
        timeout: float | None,
        *,
        x11: bool = False,
        env: Mapping[str, str] | None = None,
        quiet: bool = False,
        pty: bool = False,
        stdin: AsyncIterator[bytes] | None = None,
    ) -> int | str:
        """A process group of its own, under the same guard as over there: closing its stdin ends
        it.
        """
        if pty or stdin:
            raise UsageError("pty and stdin are for commands on an SshNode", host=self.hostname)
        loop = asyncio.get_running_loop()
        broken: asyncio.Future[None] = loop.create_future()
        process = subprocess.Popen(
            ["/bin/sh", "-c", _guarded(command, env=env, quiet=quiet)],
            env=os.environ | {"SHELL": "/bin/sh"},
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdin and process.stdout and process.stderr
        ends: list[asyncio.Future[Any]] = [
            _in_daemon(process.wait)
        ]  # not asyncio's: it waits for ever when cancelled too early
        transports: list[asyncio.BaseTransport] = []
        try:
            for pipe, datatype in ((process.stdout, None), (process.stderr, EXTENDED_DATA_STDERR)):
                output = _LocalOutput(sink, step, datatype, broken)
                transports.append(
                    (
                        await loop.connect_read_pipe(
                            functools.partial(lambda each: each, output), pipe
                        )
                    )[0]
                )
                ends.append(output.ended)
            with self._shown(command):
                all_ends: asyncio.Future[Any] = asyncio.gather(*ends)
                async with asyncio.timeout(timeout):
                    await asyncio.wait([all_ends, broken], return_when=asyncio.FIRST_COMPLETED)
        finally:
            process.stdin.close()  # ends what is left of it
            if process.returncode is not None and not all(each.done() for each in ends):
                with contextlib.suppress(
                    ProcessLookupError
                ):  # its leader has gone, who holds its outputs has not
                    os.killpg(process.pid, signal.SIGKILL)
            try:
                await asyncio.wait(ends, timeout=5)
            finally:  # cancelled again
                for each in transports:
                    each.close()
                process.stdout.close()
                process.stderr.close()
        if broken.done():
            broken.result()
        status = process.returncode or 0
        return status if status >= 0 else signal.Signals(-status).name.removeprefix("SIG")

    async def _copy(
        self, copy_: _Copy, pushing: bool, sources: list[str], destination: str, many: bool
    ) -> None:
        """The side that is else remote knows ``~``, and globs to pull."""
        if pushing:
            destination = os.path.expanduser(destination)
        else:
            named = [os.path.expanduser(source) for source in sources]
            sources = [
                found
                for source in named
                for found in (not os.path.lexists(source) and sorted(glob.glob(source))) or [source]
            ]
        await copy_.run(copy_.local(sources, destination, many or len(sources) > 1))

    @contextlib.asynccontextmanager
    async def _script_folder(self, files: Mapping[str, tuple[bytes, int]]) -> AsyncIterator[str]:
        """A private folder below the home, removed afterwards."""
        folder = Path("~", REMOTE_FOLDER, os.urandom(8).hex()).expanduser()
        place = shlex.quote(str(folder))
        made = subprocess.run(
            ["/bin/sh", "-c", _FOLDER.format(place, sentinel=_SENTINEL.format(place))],
            capture_output=True,
            check=False,
        )
        if made.returncode:
            raise TransferError(
                f"{folder}: {_brief(os.fsdecode(made.stderr).strip(), 200)}", host=self.hostname
            )
        try:
            for name, (data, mode) in files.items():
                (folder / name).write_bytes(data)
                (folder / name).chmod(mode & 0o700)
            yield str(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


# --------------------------------------------------------------------------------------------------
# commands: the steps of a job; a step gets its node as an argument and keeps none
# --------------------------------------------------------------------------------------------------


class AbstractCommand:
    """One step. A subclass defines ``co_run_remote(node)``, and ``co_run_local(node)`` for
    LocalNode, which return a status.

    ``label``: the text in graphs and listings (None: made from the command; any other false value
    hides the step's line). ``allowed_exits``: exit codes and signal names that are a success too,
    as ``["TERM", 4]``; never hides a lost connection. ``timeout``: seconds for this step (None: no
    limit). ``verbose``: a word on stderr when it runs.
    """

    label: str | bool | None = (
        None  # these are here for classes of users' whose constructor does not call ours
    )
    timeout: float | None = None
    verbose = False
    allowed_exits: Collection[int | str] = ()

    def __init__(
        self,
        *,
        label: str | bool | None = None,
        allowed_exits: Collection[int | str] | None = None,
        timeout: float | None = None,
        verbose: bool = False,
    ) -> None:
        if timeout is not None and timeout <= 0:
            raise UsageError(f"timeout {timeout!r}: seconds, more than 0 (None: no limit)")
        self.label, self.timeout, self.verbose = label, timeout, verbose
        exits = [allowed_exits] if isinstance(allowed_exits, int | str) else allowed_exits or ()
        self.allowed_exits = {
            each.removeprefix("SIG") if isinstance(each, str) else each for each in exits
        }

    async def co_run_remote(self, node: Any) -> int | str | None:
        """Run on a remote node; the exit status, or a signal's name without SIG."""
        return await self._act(node, StepRecord())

    async def co_run_local(self, node: Any) -> int | str | None:
        """Run on a LocalNode."""
        return await self._act(node, StepRecord())

    async def _run(self, node: Any, step: StepRecord) -> int | str:
        """What a job does of it: the public method where a user's class defines that, else our own
        way, which keeps a record.
        """
        if self.verbose:
            node._say(f"runs: {self._line() or self._text()}")
        method = "co_run_local" if isinstance(node, LocalNode) else "co_run_remote"
        if getattr(type(self), method) is getattr(AbstractCommand, method):
            return await self._act(node, step)
        async with self._in_time(node, step):
            return await getattr(self, method)(node) or 0

    async def _act(self, node: Any, step: StepRecord) -> int | str:
        raise UsageError(
            f"{type(self).__name__}: a step defines co_run_remote(node), and co_run_local(node) to run on a LocalNode"
        )

    @contextlib.asynccontextmanager
    async def _in_time(self, node: _Node, step: StepRecord) -> AsyncIterator[None]:
        """The time of the step begins here: when its host is there."""
        try:
            async with asyncio.timeout(self.timeout):
                yield
        except TimeoutError:
            raise _timed_out(
                self.timeout, node, step.command or self._line() or self._text()
            ) from None

    def _check(self) -> None:
        """What can be found wrong on this machine, before the first step of a job."""

    def _text(self) -> str:
        """The text made from the command."""
        return type(self).__name__

    def _preview(self) -> str:
        """All of what would run, as far as it is known."""
        return self._text()

    def _line(self) -> str | None:
        """One line for graphs and listings; None when it is hidden."""
        text = self._text() if self.label is None else self.label
        return " ".join(str(text).split()) if text else None

    def _succeeded(self, status: int | str) -> bool:
        return status == 0 or status in self.allowed_exits

    def _as_error(self, node: _Node, status: int | str, command: str) -> CommandFailedError:
        kind = "status" if isinstance(status, int) else "signal"
        return CommandFailedError(
            f"ended with {kind} {status}: {escape(command or self._line() or '')}",
            host=node.hostname,
            kind=kind,
            command=command,
            status=status,
        )


class _ShellCommand(AbstractCommand):
    """What Run, RunScript and RunString share: words read by the remote shell, and where the output
    goes.
    """

    def __init__(
        self,
        words: tuple[Any, ...],
        *,
        x11: bool = False,
        capture: Capture | None = None,
        env: Mapping[str, str] | None = None,
        pty: bool = False,
        stdin: AsyncIterator[bytes] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.words, self.x11, self.capture, self.env, self.pty, self.stdin = (
            words,
            x11,
            capture,
            env,
            pty,
            stdin,
        )
        if capture is not None and not isinstance(capture, Capture):
            raise UsageError(
                f"{type(self).__name__}: capture is a Capture(name, variables), not {capture!r}"
            )
        for word in words:
            if not isinstance(word, str | int | float | Deferred | Run | os.PathLike):
                raise UsageError(
                    f"{type(self).__name__}: a word is a string, a number, a Deferred or a Run, not {word!r}"
                )

    def _words(self, text: Callable[[Any], str] = _text_of) -> str:
        """The words joined by blanks, each as ``text`` has it: with ``str``, Deferred ones as far
        as is known.
        """
        return " ".join(
            word._words(text) if isinstance(word, Run) else text(word) for word in self.words
        )

    async def _execute(
        self,
        node: Any,
        command: str,
        step: StepRecord,
        timeout: float | None = None,
        **options: Any,
    ) -> int | str:
        await node._apply_config()  # it may tell the user and the port, by which outputs are named
        options |= {
            name: value for name in ("x11", "env", "pty", "stdin") if (value := getattr(self, name))
        }
        held = _HeldSink(node.formatter.endpoint_sink(node._endpoint)) if self.capture else None
        status: int | str = await node._execute(
            command, step, sink=held, timeout=timeout, **options
        )
        if (
            held and self.capture
        ):  # of a command that ended: half of an output, or none, is no value
            self.capture.store(held.stdout().decode("utf-8", "surrogateescape"))
        return status


class Run(_ShellCommand):
    """Words that are joined by blanks and read by the user's login shell over there, as ssh does.

    A word is a string, a number, a Deferred, or another Run (its command line); ``x11`` forwards
    the DISPLAY; ``ignore_outputs`` binds both streams to /dev/null over there; ``capture`` stores
    stdout in a variable instead of showing it; ``env``: variables for the command, whatever the
    server's AcceptEnv says; ``pty``: give it a terminal; ``stdin``: an asynchronous iterator of
    bytes (None: end of file at once).
    """

    def __init__(
        self,
        *argv: Any,
        x11: bool = False,
        ignore_outputs: bool = False,
        capture: Capture | None = None,
        **common: Any,
    ) -> None:
        super().__init__(argv, x11=x11, capture=capture, **common)
        self.ignore_outputs = ignore_outputs
        if not argv or all(isinstance(word, str) and not word.strip() for word in argv):
            raise UsageError("Run: an empty command")

    def _text(self) -> str:
        return self._words(str)

    async def _act(self, node: Any, step: StepRecord) -> int | str:
        return await self._execute(
            node, self._words(), step, self.timeout, quiet=self.ignore_outputs
        )


class _Script(_ShellCommand):
    """A script with its includes, in a private folder of the host for as long as it runs."""

    includes: tuple[str, ...]
    _content: Callable[[], tuple[str, bytes]]  # the name and the text of the script

    def _beside(self) -> str:
        return f" with {' '.join(self.includes)}" if self.includes else ""

    def _files(self) -> dict[str, tuple[bytes, int]]:
        """All files of the folder, the script first: name to content and mode."""
        name, body = self._content()
        files = {name: (body, 0o700)}
        for include in self.includes:
            try:
                path = Path(include)
                content = path.read_bytes(), path.stat().st_mode | 0o600
            except OSError as exc:
                raise UsageError(f"include {escape(include)}: {_reason(exc)}") from None
            if files.setdefault(path.name, content) is not content:
                raise UsageError(f"two files for one folder are called {escape(path.name)}")
        return files

    def _check(self) -> None:
        for path in self.includes:
            if not os.path.isfile(path):
                raise UsageError(
                    f"include {escape(path)}: {'not a file' if os.path.exists(path) else 'no such file'}"
                )

    async def _act(self, node: Any, step: StepRecord) -> int | str:
        files = self._files()
        name, (body, _) = next(iter(files.items()))
        step.script_sha256 = hashlib.sha256(body).hexdigest()
        words, step.command = self._words(), self._text()  # what people know it by
        await node.sftp_connect_lazy()
        async with self._in_time(node, step), node._script_folder(files) as path:
            return await self._execute(
                node, f"{shlex.quote(f'{path}/{name}')} {words}".strip(), step
            )


class RunScript(_Script):
    """Push a local script and run it with these arguments (joined by blanks, read by the remote
    shell).

    ``includes``: local files that land beside it. The folder is private and removed afterwards. A
    missing script or include raises UsageError when the job starts, before its first step.
    """

    def __init__(
        self,
        local_script: str | os.PathLike[str] | Deferred,
        *args: Any,
        includes: Collection[str | os.PathLike[str]] | None = (),
        x11: bool = False,
        capture: Capture | None = None,
        **common: Any,
    ) -> None:
        super().__init__(args, x11=x11, capture=capture, **common)
        self.local_script, self.includes = (
            local_script,
            tuple(map(os.fspath, _paths(includes)[0])) if includes else (),
        )
        if not str(local_script):
            raise UsageError("RunScript: an empty script name")

    def _path(self) -> Path:
        return Path(_text_of(self.local_script)).expanduser()

    def _check(self) -> None:
        if (
            not isinstance(self.local_script, Deferred) and not self._path().is_file()
        ):  # a Deferred may name what a step makes
            raise UsageError(
                f"script {escape(str(self.local_script))}: {'not a file' if self._path().exists() else 'no such file'}"
            )
        super()._check()

    def _content(self) -> tuple[str, bytes]:
        path = self._path()
        try:
            return path.name, path.read_bytes()
        except OSError as exc:
            raise UsageError(f"script {escape(str(path))}: {_reason(exc)}") from None

    def _text(self) -> str:
        return f"RunScript: {os.path.basename(str(self.local_script))} {self._words(str)}".rstrip()

    def _preview(self) -> str:
        missing = (
            ""
            if os.path.isfile(os.path.expanduser(str(self.local_script)))
            else " (no such file yet)"
        )
        return (
            f"RunScript: {self.local_script} {self._words(str)}".rstrip() + missing + self._beside()
        )


class RunString(_Script):
    """The same from a text: without a ``#!`` line it runs as the login shell runs such a file.

    ``remote_name``: the file's name over there (default ``script``).
    """

    def __init__(
        self,
        script_body: str | Deferred,
        *args: Any,
        remote_name: str | None = None,
        includes: Collection[str | os.PathLike[str]] | None = (),
        x11: bool = False,
        capture: Capture | None = None,
        **common: Any,
    ) -> None:
        super().__init__(args, x11=x11, capture=capture, **common)
        self.script_body, self.remote_name = script_body, os.path.basename(remote_name or "script")
        self.includes = tuple(map(os.fspath, _paths(includes)[0])) if includes else ()
        if not str(script_body).strip():
            raise UsageError("RunString: an empty script")
        if self.remote_name in ("", ".", ".."):
            raise UsageError(f"RunString: remote_name {remote_name!r} is not the name of a file")

    def _content(self) -> tuple[str, bytes]:
        body = _text_of(self.script_body)
        return self.remote_name, os.fsencode(body if body.endswith("\n") else body + "\n")

    def _text(self) -> str:
        lines = (line.strip() for line in str(self.script_body).splitlines())
        first = next((line for line in lines if line and not line.startswith("#")), "")
        return f"RunString: {first[:15]}... {self._words(str)}".rstrip()

    def _preview(self) -> str:
        return f"RunString: {self._words(str)}".rstrip() + self._beside() + f"\n{self.script_body}"


class _CopyCommand(AbstractCommand):
    """What Push and Pull share: paths, that may be Deferred, and the options of a copy."""

    pushing: ClassVar[bool]
    preposition: ClassVar[str]

    def __init__(
        self,
        sources: Any,
        destination: Any,
        *,
        preserve: bool = False,
        recurse: bool = False,
        follow_symlinks: bool = False,
        inplace: bool = False,
        block_size: int | None = None,
        max_requests: int | None = None,
        **common: Any,
    ) -> None:
        super().__init__(
            **common
        )  # the last two are asyncssh's, for published scripts: the engine chooses better itself
        self.sources, self.destination = sources, destination
        self.options = {
            "preserve": preserve,
            "recurse": recurse,
            "follow_symlinks": follow_symlinks,
            "inplace": inplace,
        }
        self._sources, self._many = _paths(sources)
        if not isinstance(destination, str | os.PathLike | Deferred):
            raise UsageError(
                f"{type(self).__name__}: the destination is a path, not {destination!r}"
            )

    def _text(self) -> str:
        more = f" ... ({len(self._sources)} total)" if len(self._sources) > 1 else ""
        return (
            f"{type(self).__name__}: {self._sources[0]}{more} {self.preposition} {self.destination}"
        )

    def _preview(self) -> str:
        options = "".join(f", {name}" for name, value in self.options.items() if value)
        return f"{type(self).__name__}: {' '.join(map(str, self._sources))} {self.preposition} {self.destination}{options}"

    async def _act(self, node: Any, step: StepRecord) -> int | str:
        sources, destination = (
            [_text_of(path) for path in self._sources],
            _text_of(self.destination),
        )
        step.command = step.command or self._text()
        try:
            await node.sftp_connect_lazy()
            async with self._in_time(node, step):
                await node._copy(
                    _Copy(node, step, **self.options),
                    self.pushing,
                    sources,
                    destination,
                    self._many,
                )
        except _LOST as exc:
            raise ConnectionFailedError(
                f"connection lost during {escape(self._text())}",
                host=node.hostname,
                command=self._text(),
            ) from exc
        except (asyncssh.SFTPError, OSError) as exc:
            raise TransferError(
                f"{escape(destination)}: {_reason(exc)}", host=node.hostname
            ) from None
        return 0


class Push(_CopyCommand):
    """Copy local files onto a remote path: into it when it is a folder, ends in ``/``, or there is
    a list of them.

    ``recurse`` copies folders; ``preserve`` keeps times; ``follow_symlinks`` copies what links in a
    tree point to; ``inplace`` writes onto existing files themselves instead of replacing them at
    once. Raises TransferError.
    """

    pushing, preposition = True, "onto"

    def __init__(self, localpaths: Any, remotepath: Any, **options: Any) -> None:
        super().__init__(localpaths, remotepath, **options)


class Pull(_CopyCommand):
    """Copy remote files (globs are expanded) into a local path; options as Push. Nothing is written
    outside of it. Raises TransferError.
    """

    pushing, preposition = False, "into"

    def __init__(self, remotepaths: Any, localpath: Any, **options: Any) -> None:
        super().__init__(remotepaths, localpath, **options)


# --------------------------------------------------------------------------------------------------
# jobs: SshJob; closing a scheduler's nodes; topology; the record of a run, and its picture
# --------------------------------------------------------------------------------------------------


def _steps(given: Any) -> list[AbstractCommand]:
    """What the user gave SshJob, as a list of commands; anything that is not clear raises
    UsageError.
    """
    if isinstance(given, AbstractCommand):
        return [given]
    if isinstance(given, str | Deferred):
        return [Run(given)]
    if not isinstance(given, list | tuple):
        raise UsageError(
            f"SshJob: a string, a Deferred, a command, or a list of commands or of words, not {given!r}"
        )
    items = [item for item in given if item is not None]
    if not items:
        raise UsageError("SshJob: an empty list of commands: give it one, or leave the job out")
    if all(isinstance(item, AbstractCommand) for item in items):
        return items
    if any(isinstance(item, AbstractCommand) for item in items):
        raise UsageError(
            "SshJob: a mix of words and commands: write each command as Run(...), RunScript(...), ..."
        )
    return [Run(*items)]


class SshJob(asynciojobs.AbstractJob):  # type: ignore[misc]  # asynciojobs has no annotations
    """A list of steps on one node, run in order by an asynciojobs Scheduler.

    Exactly one of ``command`` and ``commands``; each takes a string, a Deferred, a command, a list
    of commands (None items dropped), or a list of words (one Run). A critical job stops at its
    first failure with CommandFailedError, and the scheduler with it. A non-critical one runs all
    its steps; ``result()`` is the last failing status, or 0; a host that cannot be reached, is
    lost, or a step that cannot run is an ApsshError, returned and not raised (asynciojobs never
    gives back the window slot of a job that raises). ``keep_connection`` is accepted and changes
    nothing. The other arguments are asynciojobs': label, required, scheduler. Cancelling it ends
    its remote command.
    """

    def __init__(
        self,
        node: SshNode | LocalNode,
        *,
        command: Any = None,
        commands: Any = None,
        keep_connection: bool = False,
        verbose: bool | None = None,
        forever: bool = False,
        critical: bool = True,
        **asynciojobs_arguments: Any,
    ) -> None:
        if not isinstance(node, _Node):
            raise UsageError(f"SshJob: the node is an SshNode or a LocalNode, not {node!r}")
        if (command is None) == (commands is None):
            raise UsageError(
                "SshJob: give one of command= and commands=, "
                + ("not both" if commands is not None else "there is neither")
            )
        self.node, self.commands, self.verbose = (
            node,
            _steps(commands if command is None else command),
            verbose,
        )
        self.records: list[StepRecord] = []
        super().__init__(forever=forever, critical=critical, **asynciojobs_arguments)

    async def co_run(self) -> Any:
        """Run the steps; called by the scheduler."""
        self.records = []
        result: Any = 0
        try:
            for command in self.commands:
                command._check()
        except Exception as exc:
            return self._failed(exc)
        for command in self.commands:
            try:
                await self._run_step(command)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task and task.cancelling():
                    raise
                result = self._failed(ApsshError("cancelled from inside", host=self.node.hostname))
            except Exception as exc:
                result = self._failed(exc)
        return result

    def _failed(self, exc: Exception) -> ApsshError | int | str:
        """Raise it (critical), or tell what it is as a result: a command's status, else an
        ApsshError.
        """
        if self.critical:
            raise exc
        if not isinstance(exc, ApsshError):
            return ApsshError(f"{type(exc).__name__}: {exc}", host=self.node.hostname)
        return exc if exc.status is None else exc.status

    async def _run_step(self, command: AbstractCommand) -> None:
        step = StepRecord(label=command._line() or "")
        self.records.append(step)
        if self.verbose:
            self.node._say(f"step: {step.label or command._text()}")
        with step.running():
            step.status = await command._run(self.node, step)
            if not command._succeeded(step.status):
                raise command._as_error(self.node, step.status, step.command)

    async def co_shutdown(self) -> None:
        """Nothing: connections stay open until they are closed on purpose."""

    def close(self) -> None:
        """Nothing to give back for a job that did not run."""

    def _where(self) -> str:
        return f"{self.node.username}@{self.node.hostname}"

    def text_label(self) -> str:
        """One line: the first step, and how many more."""
        lines = [line for command in self.commands if (line := command._line())]
        return (
            f"{self._where()}: {lines[0]}" + (f" (+{len(lines) - 1})" if len(lines) > 1 else "")
            if lines
            else self._where()
        )

    def graph_label(self) -> str:
        """Id and user@host, the job's label if it has one, then one line for each step."""
        lines = [line for command in self.commands if (line := command._line())]
        return "\n".join(
            [f"{self.repr_id()}: {self._where()}", *([self.label] if self.label else []), *lines]
        )

    def details(self) -> str:
        """The steps, one a line, with what came of them."""
        lines = []
        for command, step in itertools.zip_longest(self.commands, self.records):
            outcome = (
                ""
                if step is None
                else f" -> {step.error or step.status}"
                if step.end
                else " -> running"
            )
            lines.append(f"  {self._where()}: {command._line() or '(hidden)'}{outcome}")
        return "\n".join(lines)

    def repr_result(self) -> str:
        """Which step failed, and how; or the result."""
        for number, step in enumerate(self.records, 1):
            if step.kind:
                return f"!! step {number} `{step.label}`: {step.error} !!"
        return str(super().repr_result())


def _ssh_jobs(scheduler: Any) -> list[SshJob]:
    """The SshJobs of a scheduler, nested ones included."""
    return [job for job in scheduler.iterate_jobs(scan_schedulers=False) if isinstance(job, SshJob)]


async def co_close_ssh_in_scheduler(scheduler: Any, manage_gateways: bool = True) -> None:
    """Close the connections of all nodes of a scheduler, nested ones included, the farthest first,
    then their gateways.
    """
    nodes = {
        node
        for job in _ssh_jobs(scheduler)
        if isinstance(job.node, SshNode)
        for node in (job.node._hops() if manage_gateways else [job.node])
    }
    for _, group in itertools.groupby(
        sorted(nodes, key=SshNode.distance, reverse=True), key=SshNode.distance
    ):
        await asyncio.gather(*(node.close() for node in group))


def close_ssh_in_scheduler(scheduler: Any, manage_gateways: bool = True) -> None:
    """The same from code that is not a coroutine, once the scheduler has run. Raises UsageError
    inside of a running loop.
    """
    with contextlib.suppress(RuntimeError):
        asyncio.get_running_loop()
        raise UsageError(
            "close_ssh_in_scheduler in a running loop: await co_close_ssh_in_scheduler(scheduler) there"
        )
    asyncio.run(co_close_ssh_in_scheduler(scheduler, manage_gateways))


def _node_label(node: SshNode | LocalNode) -> str:
    port = None if node.port == 22 else node.port
    return (
        "Local Node"
        if isinstance(node, LocalNode)
        else _endpoint_text(node.hostname, node.username, port)
    )


def _natural(text: str) -> list[str | int]:
    """A key that sorts node2 before node10."""
    return [
        int(part) if number % 2 else part for number, part in enumerate(re.split(r"(\d+)", text))
    ]


def _numbered_nodes(scheduler: Any) -> list[SshNode | LocalNode]:
    """The nodes of a scheduler's jobs, gateways included, sorted by name; this machine comes once,
    first.
    """
    nodes = dict.fromkeys(
        node
        for job in _ssh_jobs(scheduler)
        if isinstance(job.node, SshNode)
        for node in job.node._hops()
    )
    local = [job.node for job in _ssh_jobs(scheduler) if isinstance(job.node, LocalNode)]
    return [
        *local[:1],
        *sorted(nodes, key=lambda node: (_natural(_node_label(node)), node.distance())),
    ]


def topology_dot(scheduler: Any) -> str:
    """Graphviz source of which node is the gateway of which, from this machine (``Local Node``)
    outwards.
    """
    nodes = [node for node in _numbered_nodes(scheduler) if isinstance(node, SshNode)]
    names = {None: "local"} | {node: f"n{number}" for number, node in enumerate(nodes, 1)}
    lines = ["digraph topology {", "  rankdir=LR;", '  local [label="Local Node" shape=box];']
    for node in nodes:
        label = (
            _clean(_node_label(node))
            .replace("\\", "\\\\")
            .replace('"', '\\"')
            .replace("&", "&amp;")
        )
        lines += [
            f'  {names[node]} [label="{label}"];',
            f"  {names[node.gateway]} -> {names[node]};",
        ]
    return "\n".join([*lines, "}", ""])


def topology_graph(scheduler: Any) -> Any:
    """The same as a ``graphviz.Source``, that notebooks show. Raises UsageError without the Python
    package graphviz.
    """
    try:
        return importlib.import_module("graphviz").Source(topology_dot(scheduler))
    except ImportError:
        raise UsageError(
            "topology_graph needs the Python package graphviz: pip install graphviz"
        ) from None


def topology_as_dotfile(scheduler: Any, filename: str | os.PathLike[str]) -> None:
    """Write ``topology_dot`` into this very file."""
    Path(filename).write_text(topology_dot(scheduler), "utf-8")


def topology_as_pngfile(scheduler: Any, filename: str | os.PathLike[str]) -> str:
    """Write ``filename.dot`` and ``filename.png``; the name of the second. Raises UsageError where
    there is no ``dot`` program.
    """
    source, png = (f"{os.fspath(filename)}.{suffix}" for suffix in ("dot", "png"))
    topology_as_dotfile(scheduler, source)
    try:
        subprocess.run(
            ["dot", "-Tpng", "-o", os.path.abspath(png), os.path.abspath(source)],
            check=True,
            capture_output=True,
        )
    except FileNotFoundError:
        raise UsageError(f"no dot program to draw {_brief(png)} with: install graphviz") from None
    except subprocess.CalledProcessError as exc:
        raise ApsshError(
            f"dot cannot draw {_brief(png)}: {_brief(exc.stderr.decode(errors='replace').strip())}"
        ) from None
    return png


def _walk(scheduler: Any, parent: Any = None) -> Iterator[tuple[Any, Any]]:
    """All jobs in the order that gives them their numbers, each with the nested scheduler it is in."""
    for job in list(scheduler.topological_order()):
        yield job, parent
        if isinstance(job, asynciojobs.PureScheduler):
            yield from _walk(job, job)


def _job_state(job: Any) -> tuple[str, str | None]:
    """idle, waiting (for a slot of the window), running, ok, failed or cancelled; and why."""
    steps = job.records if isinstance(job, SshJob) else []
    if not job.is_done():
        if (
            steps[-1].kind == "cancelled"
            if steps
            else job.is_running() and asyncio._get_running_loop() is None
        ):
            return "cancelled", None
        return "running" if job.is_running() else "waiting" if job.is_scheduled() else "idle", None
    if exc := job.raised_exception():
        return "failed", str(exc) if isinstance(exc, ApsshError) else f"{type(exc).__name__}: {exc}"
    if isinstance(job, SshJob) and (result := job.result()):
        return "failed", str(result) if isinstance(result, ApsshError) else next(
            (step.error for step in steps[::-1] if step.error), None
        )
    if isinstance(job, asynciojobs.PureScheduler) and not job.result():
        return "failed", str(job.why())
    return "ok", None


def _wall(epoch: float | None) -> str | None:
    return (
        None
        if epoch is None
        else datetime.datetime.fromtimestamp(epoch).astimezone().isoformat(timespec="milliseconds")
    )


def run_record(scheduler: Any) -> dict[str, Any]:
    """What is known of a run, at any moment of it, ready for JSON.

    ``versions``; ``started`` and ``ended`` (ISO 8601; ``_epoch``: seconds; None when no step ran);
    ``nodes``; ``jobs`` in the scheduler's order, those of nested schedulers (``parent``) included,
    with state, error, requirements and the StepRecords as ``steps``, whose start and end are
    seconds of one monotonic clock. Jobs that are no SshJob have neither node nor steps.
    """
    nodes = _numbered_nodes(scheduler)
    places = {node: number for number, node in enumerate(nodes, 1)}
    walk = list(_walk(scheduler))
    numbers = {job: number for number, (job, _) in enumerate(walk, 1)}
    jobs: list[dict[str, Any]] = []
    for job, parent in walk:
        state, error = _job_state(job)
        ssh = isinstance(job, SshJob)
        label = (
            job.label
            or (job.text_label().removeprefix(f"{job._where()}: ") if ssh else job.text_label())
            or type(job).__name__
        )
        jobs.append(
            {
                "id": numbers[job],
                "parent": numbers.get(parent),
                "type": type(job).__name__,
                "label": str(label),
                "node": (1 if isinstance(job.node, LocalNode) else places[job.node])
                if ssh
                else None,
                "critical": bool(job.critical),
                "forever": bool(job.forever),
                "state": state,
                "error": error,
                "requirements": sorted(numbers[each] for each in job.required if each in numbers),
                "steps": [dataclasses.asdict(step) for step in job.records] if ssh else [],
            }
        )
    steps = [step for job in jobs for step in job["steps"] if step["start"] is not None]
    started = min((step["start_wall"] for step in steps), default=None)
    ended = max((step["end_wall"] or time.time() for step in steps), default=None)
    return {
        "versions": {
            "apssh": __version__,
            "asyncssh": asyncssh.__version__,
            "asynciojobs": asynciojobs.__version__,
            "python": sys.version.split()[0],
        },
        "started": _wall(started),
        "started_epoch": started,
        "ended": _wall(ended),
        "ended_epoch": ended,
        "nodes": [
            {
                "id": places[node],
                "label": _node_label(node),
                "hostname": node.hostname,
                "username": node.username,
                "port": node.port,
                "gateway": places[node.gateway] if node.gateway else None,
                "host_key": node._host_key_shown,
            }
            for node in nodes
        ],
        "jobs": jobs,
    }


def save_record(scheduler: Any, path: str | os.PathLike[str]) -> None:
    """Write ``run_record`` as JSON, for its owner's eyes only (commands may hold secrets); the file
    is whole at any time.
    """
    _write_whole(path, json.dumps(run_record(scheduler), indent=1, default=str))


@contextlib.contextmanager
def recording(scheduler: Any, path: str | os.PathLike[str]) -> Iterator[None]:
    """``with recording(scheduler, path): scheduler.run()`` saves the record, whatever the end: an
    exception and Ctrl-C too. A first one is there before anything runs: OSError tells at once of a
    place that cannot be written.
    """
    save_record(scheduler, path)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # what the user must see is the other failure
            save_record(scheduler, path)
        raise
    save_record(scheduler, path)


def _clean(text: Any, most: int = 10_000) -> str:
    """A text on one line, without characters that a picture or a terminal cannot show."""
    line = re.sub(f"[{_CONTROLS}\t\ufffe\uffff]+", " ", str(text)).strip()
    return line if len(line) <= most else line[: most - 1] + "…"


def _ends(text: str, most: int) -> str:
    """The same, so long at the most; what is cut out is its middle, for names often differ at their
    end.
    """
    text = _clean(text)
    return text if len(text) <= most else text[: (most - 1) // 2] + "…" + text[-(most // 2) :]


def _cells(text: str) -> int:
    """The columns it takes on a terminal."""
    return sum(
        (unicodedata.east_asian_width(char) in "WF") + (not unicodedata.combining(char))
        for char in text
    )


def _fit(text: str, cells: int) -> str:
    """The text in exactly so many columns."""
    if _cells(text) > cells:
        widths = itertools.accumulate(map(_cells, text))
        text = text[: sum(width < cells for width in widths)] + "…" * (cells > 0)
    return text + " " * (cells - _cells(text))


def _duration(seconds: float) -> str:
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    parts = (minutes // 60, "h"), (minutes % 60, "min"), (rest, "s")
    return " ".join(f"{number} {unit}" for number, unit in parts if number)


def _tick(span: float) -> float:
    """Seconds between two marks of a time axis: a round number, for ten of them at most."""
    steps = [digit * 10.0**power for power in range(-4, 1) for digit in (1, 2, 5)]
    steps += [10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200]
    return next((step for step in steps if span / step <= 10), 86400 * (span // 864000 + 1))


@dataclasses.dataclass
class _Bar:
    """A step in a picture; times in seconds since the first one began."""

    start: float
    end: float
    state: str
    outcome: str
    label: str
    details: list[str]


class _Timeline:
    """When and where things happened in a run, given as its scheduler or its record: what its
    pictures show. ``bars``, ``times``: of each job that ran; ``rows``: node to sub-rows of jobs
    that do not overlap; ``before``: job to the jobs it waited for, seen through nested schedulers
    and jobs without times; ``ready``: job to the time when it had all that it requires.
    """

    def __init__(self, scheduler: Any) -> None:
        record = scheduler if isinstance(scheduler, Mapping) else run_record(scheduler)
        self.jobs: dict[int, dict[str, Any]] = {job["id"]: job for job in record["jobs"]}
        self.nodes: dict[int, dict[str, Any]] = {node["id"]: node for node in record["nodes"]}
        steps = [step for job in record["jobs"] for step in job["steps"]]
        zero = min((step["start"] for step in steps), default=0.0)
        self.span: float = max(
            [0.001, *(step["end"] - zero for step in steps if step["end"] is not None)]
        )
        if any(step["end"] is None for step in steps):
            self.span = max(self.span, record["ended_epoch"] - record["started_epoch"])
        self.bars = {
            number: [self.bar(job, step, zero) for step in job["steps"]]
            for number, job in self.jobs.items()
            if job["steps"]
        }
        self.times = {number: (bars[0].start, bars[-1].end) for number, bars in self.bars.items()}
        self.rows: dict[int, list[list[int]]] = {
            node: []
            for node in sorted(
                {job["node"] for job in record["jobs"] if job["node"]},
                key=lambda node: (self.way(node), node),
            )
        }
        for number in sorted(self.times, key=lambda number: self.times[number]):
            rows = self.rows[self.jobs[number]["node"]]
            row = next(
                (row for row in rows if self.times[row[-1]][1] <= self.times[number][0]), None
            )
            rows.append([number]) if row is None else row.append(number)
        self.nested: dict[int, list[int]] = {}
        for number, job in self.jobs.items():
            self.nested.setdefault(job["parent"], []).append(number)
        self.before: dict[int, set[int]] = {}
        for number, job in sorted(
            self.jobs.items()
        ):  # what a job requires, and what it is in, come before it
            self.before[number] = (
                set().union(*map(self.last, job["requirements"]))
                if job["requirements"]
                else self.before.get(job["parent"], set())
            )
        self.ready = {
            number: max(self.times[each][1] for each in self.before[number])
            for number in self.times
            if self.before[number]
            and all(
                each in self.times or each in self.nested
                for each in self.jobs[number]["requirements"]
            )
        }
        states = [job["state"] for job in record["jobs"]]
        counts = [
            f"{states.count(state)} {state}".replace("idle", "never ran")
            for state in ("ok", "failed", "cancelled", "running", "waiting", "idle")
            if state in states
        ]
        when = (
            [record["started"][:19].replace("T", " "), _duration(self.span)] if self.times else []
        )
        sizes = (
            f"{size} {noun}{'s' * (size != 1)}"
            for size, noun in ((len(states), "job"), (len(self.rows), "node"))
        )
        self.heading = ": ".join(filter(None, [" on ".join(sizes), ", ".join(counts + when)]))

    def bar(self, job: Mapping[str, Any], step: Mapping[str, Any], zero: float) -> _Bar:
        start, end = step["start"] - zero, self.span if step["end"] is None else step["end"] - zero
        kind, status = step["kind"], step["status"]
        outcome = (
            "running"
            if step["end"] is None
            else {None: "ok", "status": f"status {status}", "signal": str(status)}.get(kind, kind)
        )
        state = outcome if outcome in ("running", "ok", "cancelled") else "failed"
        why = step["error"] if state == "failed" else f"status {status}" if state == "ok" else ""
        sizes = (
            f"{step[f'bytes_{name}']:,} bytes {name}"
            for name in ("out", "err", "transferred")
            if step[f"bytes_{name}"]
        )
        label = job["label"] if len(job["steps"]) == 1 else step["label"]
        return _Bar(
            start,
            end,
            state,
            outcome,
            _clean(label),
            [
                self.name(job),
                *dict.fromkeys((step["label"], step["command"])),
                f"{state}: {why}".rstrip(": "),
                f"{_duration(end - start)}, from {_duration(start)}",
                ", ".join(sizes),
            ],
        )

    def last(self, number: int) -> set[int]:
        """The jobs that end when this one does."""
        inner = self.nested.get(number, [])
        if number in self.times or not inner:
            return {number} if number in self.times else self.before[number]
        required = {each for other in inner for each in self.jobs[other]["requirements"]}
        return set().union(*(self.last(other) for other in inner if other not in required))

    def gateway(self, node: int) -> str:
        gateway = self.nodes[node]["gateway"]
        return _ends(self.nodes[gateway]["label"], 26) if gateway else ""

    def way(self, node: int) -> list[list[str | int]]:
        """The gateways before it, the farthest first: lanes are sorted so, each group followed by
        those behind it.
        """
        gateway = self.nodes[node]["gateway"]
        return [*self.way(gateway), _natural(self.nodes[gateway]["label"])] if gateway else []

    def name(self, job: Mapping[str, Any]) -> str:
        return (
            f"{job['label']} ({self.nodes[job['node']]['label']})"
            if job["node"]
            else str(job["label"])
        )


_SVG_WIDTH = 1200
_SVG_HEAD = """<svg xmlns="http://www.w3.org/2000/svg" width="{0}" height="{1:.0f}" viewBox="0 0 {0} {1:.0f}">
<style>
text {{ font: {2}px Helvetica, Arial, sans-serif; fill: #1a1a1a }}
text.small {{ font-size: 11px }} text.head {{ font-size: 14px; font-weight: bold }} text.group {{ font-style: italic; fill: #444 }}
.lane {{ fill: #f1f3f5 }} .page, .odd {{ fill: #fff }} .plate {{ fill: #fafbfc; opacity: 0.8 }} .grid {{ stroke: #d5d9dd }}
.bar {{ stroke: #1a1a1a; stroke-width: 0.5 }} .ok {{ fill: #8fc8eb }} .failed {{ fill: #d55e00; stroke-width: 1 }}
.cancelled {{ fill: url(#cancelled) }} .running {{ fill: #fff; stroke: #0060a0; stroke-width: 1.2; stroke-dasharray: 4 2 }}
.wait {{ fill: url(#wait) }} .mark {{ stroke: #000; stroke-width: 1.5; fill: none }} .halo {{ stroke: #fff; stroke-width: 4; fill: none }}
.arrow {{ stroke: #6b5b95; stroke-width: 1; fill: none; marker-end: url(#head) }} .pale {{ stroke-width: 0.6; opacity: 0.45 }}
</style>
<defs>
<pattern id="cancelled" width="6" height="6" patternUnits="userSpaceOnUse"><path d="M0 0H6V6H0Z" fill="#f5e88a"/>
<path d="M0 6L6 0" stroke="#d8c64a"/></pattern>
<pattern id="wait" width="4" height="4" patternUnits="userSpaceOnUse"><path d="M0 0V4" stroke="#8a9099" stroke-width="2"/></pattern>
<marker id="head" markerWidth="6" markerHeight="6" refX="6" refY="3" orient="auto"><path d="M0 0L6 3L0 6Z" fill="#6b5b95"/></marker>
</defs>
<rect class="page" width="100%" height="100%"/>
<rect class="key bar ok" x="10" y="41" width="22" height="14"/><text class="small" x="38" y="52">ok</text>
<rect class="key bar failed" x="74" y="41" width="22" height="14"/><text class="small" x="102" y="52">failed</text>
<path class="mark" d="M82 45l6 6m-6 0l6 -6"/>
<rect class="key bar cancelled" x="162" y="41" width="22" height="14"/><text class="small" x="190" y="52">cancelled</text>
<rect class="key bar running" x="268" y="41" width="22" height="14"/><text class="small" x="296" y="52">running</text>
<rect class="key wait" x="362" y="46" width="22" height="4"/><text class="small" x="390" y="52">waited after its requirements</text>
<path class="key arrow" d="M588 48H610"/><text class="small" x="616" y="52">{3}</text>
"""


def _title(lines: Iterable[str]) -> str:
    """A text that shows when the pointer is on its element."""
    return (
        "<title>" + "\n".join(html.escape(_clean(line, 500)) for line in lines if line) + "</title>"
    )


class _Picture:
    """The SVG of a timeline, in layers of elements; ``y`` is where the next row goes."""

    def __init__(self, line: _Timeline) -> None:
        self.line = line
        self.height, self.font = (
            (22, 11) if sum(max(1, len(rows)) for rows in line.rows.values()) <= 40 else (14, 9)
        )
        self.glyph = self.font * 0.6  # the width of a character, rather more than less
        labels = [
            text
            for node in line.rows
            for text in (_ends(line.nodes[node]["label"], 34), f"behind {line.gateway(node)}")
        ]
        self.left = max(map(len, labels), default=0) * self.glyph + 22
        self.scale = (_SVG_WIDTH - self.left - 24) / line.span
        self.layers: dict[str, list[str]] = {
            name: [] for name in ("back", "arrows", "bars", "front")
        }
        self.middle: dict[int, float] = {}  # of a job's row
        self.y = 92.0

    def x(self, seconds: float) -> float:
        return self.left + seconds * self.scale

    def add(self, layer: str, name: str, class_: str, content: str = "", **attributes: Any) -> None:
        texts = {
            key: value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")
            for key, value in attributes.items()
        }
        shown = "".join(f' {key}="{text}"' for key, text in texts.items())
        self.layers[layer].append(f'<{name} class="{class_}"{shown}>{content}</{name}>')

    def text(
        self, x: float, text: str, class_: str = "row", y: float | None = None, **attributes: Any
    ) -> None:
        middle = self.y + self.height / 2 + self.font * 0.36
        self.add(
            "front",
            "text",
            class_,
            html.escape(_clean(text)),
            x=x,
            y=middle if y is None else y,
            **attributes,
        )

    def draw(self) -> str:
        top, group = self.y, ""
        for number, node in enumerate(self.line.rows):
            if (gateway := self.line.gateway(node)) != group:
                group = gateway
                self.text(8, f"behind {gateway}", "group")
                self.y += self.height
            self.lane(node, "lane odd" if number % 2 else "lane")
        self.arrows()
        self.frame(top)
        arrow = "last requirement to end" if len(self.middle) > 60 else "requirement"
        head = _SVG_HEAD.format(_SVG_WIDTH, self.y + 10, self.font, arrow)
        return "\n".join([head, *itertools.chain(*self.layers.values()), "</svg>", ""])

    def lane(self, node: int, class_: str) -> None:
        rows, label = self.line.rows[node] or [[]], self.line.nodes[node]["label"]
        self.add(
            "back",
            "rect",
            class_,
            _title([label]),
            x=4,
            y=self.y,
            width=_SVG_WIDTH - 8,
            height=self.height * len(rows),
        )
        self.text(10, _ends(label, 34))
        for row in rows:
            edge = self.left
            for number, after in itertools.zip_longest(row, row[1:]):
                edge = self.job(
                    number, edge, self.x(self.line.times[after][0]) if after else _SVG_WIDTH - 6.0
                )
            self.y += self.height

    def job(self, number: int, before: float, after: float) -> float:
        """Its wait and its bars, in the room from before to after; where the last bar ends."""
        self.middle[number] = self.y + self.height / 2
        start, ready = self.line.times[number][0], self.line.ready.get(number)
        if (
            ready is not None
            and (waited := self.x(start) - (since := max(self.x(ready), before))) > 2
        ):
            title = _title(
                [
                    self.line.name(self.line.jobs[number]),
                    f"waited {_duration(start - ready)} after its last requirement",
                ]
            )
            self.add(
                "back",
                "rect",
                "wait",
                title,
                x=since,
                y=self.middle[number] - 2,
                width=waited,
                height=4,
            )
        for bar, following in itertools.zip_longest(
            self.line.bars[number], self.line.bars[number][1:]
        ):
            before = self.bar(bar, self.x(following.start) if following else after)
        return before

    def bar(self, bar: _Bar, after: float) -> float:
        x, width = self.x(bar.start), max((bar.end - bar.start) * self.scale, 1.5)
        size: dict[str, Any] = {"y": self.y + 2, "height": self.height - 4}
        self.add("bars", "rect", f"bar {bar.state}", _title(bar.details), x=x, width=width, **size)
        label, inside, beside = _clean(bar.label, 60), 3.0, 4.0
        if bar.state == "failed":
            inside, beside = 13.0, max(4.0, 8 - width / 2)
            left, top = x + min(7, width / 2) - 3, self.y + self.height / 2 - 3
            for class_ in ["halo"] * (width <= 14) + ["mark"]:
                self.add("front", "path", class_, d=f"M{left:.1f} {top:.1f}l6 6m-6 0l6 -6")
        within, outside = (
            int((room - 3) / self.glyph) for room in (width - inside, after - x - width - beside)
        )  # characters
        room = within if _cells(label) <= within or within >= outside else outside
        if room >= min(4, _cells(label)):
            label = _fit(label, room).rstrip()
            if room == outside:
                self.add(
                    "bars",
                    "rect",
                    "plate",
                    x=x + width + 1,
                    width=beside + _cells(label) * self.glyph + 3,
                    **size,
                )
            self.text(x + (inside if room == within else width + beside), label)
        return x + width

    def arrows(self) -> None:
        """From what a job required: pale but for the last one to end; with many jobs, that one
        only.
        """
        many = len(self.middle) > 60
        for number, y2 in self.middle.items():
            before = sorted(self.line.before[number], key=lambda job: self.line.times[job][1])
            for each in before[-1:] if many else before:
                x1, x2, y1 = (
                    self.x(self.line.times[each][1]),
                    self.x(self.line.times[number][0]),
                    self.middle[each],
                )
                bend = max(10.0, (x2 - x1) / 2)
                self.add(
                    "arrows",
                    "path",
                    "arrow pale" if many or each != before[-1] else "arrow",
                    d=f"M{x1:.1f} {y1:.1f}C{x1 + bend:.1f} {y1:.1f} {x2 - bend:.1f} {y2:.1f} {x2:.1f} {y2:.1f}",
                )

    def frame(self, top: float) -> None:
        """The time axis, and at the bottom what failed, and what has no bar."""
        step, bottom = _tick(self.line.span), [self.y + 14] * (self.y > 700)
        for number in range(int(self.line.span / step + 1e-9) + 1):
            x = self.x(number * step)
            self.add("back", "path", "grid", d=f"M{x:.1f} {top - 4:.1f}V{self.y:.1f}")
            for y in [top - 8, *bottom]:
                self.text(x, _duration(number * step), "small", y, style="text-anchor: middle")
        self.text(10, self.line.heading, "head", 24)
        self.y += 20 if bottom else 6
        others = [
            job
            for number, job in self.line.jobs.items()
            if number not in self.line.times and number not in self.line.nested
        ]
        texts = [
            f"Failed: {_clean(job['label'], 60)}: {_clean(job['error'] or '', 200)}"
            for job in self.line.jobs.values()
            if job["state"] == "failed" and job["node"]
        ]
        texts[40:] = [f"and {len(texts) - 40} more"] * (len(texts) > 40)
        for heading, states in (
            ("Never ran", {"idle", "waiting"}),
            ("Times not known", {"ok", "failed", "cancelled", "running"}),
        ):
            if names := sorted(
                (_clean(self.line.name(job), 60) for job in others if job["state"] in states),
                key=_natural,
            ):
                texts.append(f"{heading}: {', '.join(names)}")
        for text in itertools.chain.from_iterable(
            textwrap.wrap(text, int(_SVG_WIDTH / 6.8), max_lines=40) for text in texts
        ):
            self.y += 15
            self.text(10, text, "small", self.y)


def timeline_as_svgfile(scheduler: Any, filename: str | os.PathLike[str]) -> str:
    """Draw what ran where and when, as one SVG file that needs no other; its name (``.svg`` is
    added unless it is there).

    ``scheduler``: one that ran, runs or was stopped, or the record of it. A job that is no SshJob
    has no times, hence no bar.
    """
    name = os.fspath(filename).removesuffix(".svg") + ".svg"
    Path(name).write_text(_Picture(_Timeline(scheduler)).draw(), "utf-8")
    return name


def timeline_as_text(scheduler: Any, columns: int = 80) -> str:
    """The same for a terminal: a line for each step, by node and start, none longer than
    ``columns``.
    """
    line = _Timeline(scheduler)
    table: list[tuple[str, _Bar]] = []
    for node, rows in line.rows.items():
        numbers = sorted(itertools.chain(*rows), key=lambda number: line.times[number])
        idle = [
            _Bar(0, 0, "", "never ran", label, [])
            for label in sorted(
                (
                    _clean(job["label"])
                    for number, job in line.jobs.items()
                    if job["node"] == node and number not in line.times
                ),
                key=_natural,
            )
        ]
        table += [
            (_clean(line.nodes[node]["label"]), bar)
            for bar in [*itertools.chain(*(line.bars[number] for number in numbers)), *idle]
        ]
    hosts = min(max((_cells(host) for host, _ in table), default=0), columns // 5)
    labels = min(max((_cells(bar.label) for _, bar in table), default=0), columns // 4)
    width = max(columns - hosts - labels - 25, 1)
    lines = [
        line.heading,
        " " * hosts + " " + _fit(f"|{_duration(line.span).rjust(width - 2)}|", width),
    ]
    for host, bar in table:
        first = min(int(bar.start / line.span * width), width - 1)
        full, rest = divmod(
            max(1, min(round((bar.end - bar.start) / line.span * width * 8), (width - first) * 8)),
            8,
        )
        shown = " " * first + "█" * full + ("", *"▏▎▍▌▋▊▉")[rest] if bar.state else ""
        seconds = _duration(bar.end - bar.start) if bar.state else ""
        cells = (
            (_ends(host, hosts), hosts),
            (shown, width),
            (seconds, 11),
            (bar.outcome, 10),
            (bar.label, labels),
        )
        lines.append(" ".join(itertools.starmap(_fit, cells)))
    return "".join(_fit(line, columns).rstrip() + "\n" for line in lines)


# --------------------------------------------------------------------------------------------------
# services: units of the remote systemd
# --------------------------------------------------------------------------------------------------


class Service:
    """A command that runs as a transient systemd unit, beyond the connection that starts it
    (systemd-run(1)).

    ``command``: a shell line or a Deferred, run by /bin/sh. ``service_id``: the unit's name.
    ``tty``: give it a terminal, by script(1). ``systemd_type``: simple, exec, forking, oneshot...
    ``environ``: variables of the unit (values may be Deferred). ``stop_if_running``: starting first
    stops and resets an older unit of that name. The commands are Runs for a root login. Raises
    UsageError for a command, a name or a type that cannot be.
    """

    def __init__(
        self,
        command: str | Deferred,
        *,
        service_id: str,
        tty: bool = False,
        systemd_type: str = "simple",
        environ: Mapping[str, Any] | None = None,
        stop_if_running: bool = True,
        verbose: bool = False,
    ) -> None:
        if not isinstance(command, str | Deferred) or not str(command).strip():
            raise UsageError(f"Service: the command is a shell line or a Deferred, not {command!r}")
        if not isinstance(service_id, str) or not re.fullmatch(
            r"[A-Za-z0-9:_][A-Za-z0-9:_.@-]*", service_id
        ):
            raise UsageError(f"service_id {service_id!r}: letters, digits and :-_.@ only")
        if not re.fullmatch(r"[a-z-]+", systemd_type):
            raise UsageError(
                f"systemd_type {systemd_type!r}: as in systemd.service(5): simple, forking, oneshot..."
            )
        if tty and systemd_type == "forking":
            raise UsageError(
                "tty: script(1), which gives the terminal, does not fork: leave systemd_type out"
            )
        for name, value in (environ or {}).items():
            if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
                raise UsageError(f"environ: {name!r} is not the name of a variable")
            if value is None:
                raise UsageError(f"environ: {name} has no value")
        self.command, self.service_id = command, service_id.removesuffix(".service")
        self.tty, self.systemd_type, self.environ = tty, systemd_type, dict(environ or {})
        self.stop_if_running, self.verbose = stop_if_running, verbose

    def _run(self, label: str | None, what: str, words: list[Any], keywords: dict[str, Any]) -> Run:
        return Run(
            *words,
            label=f"Service {self.service_id}: {what}" if label is None else label,
            **{"verbose": self.verbose} | keywords,
        )

    def start_command(self, *, label: str | None = None, **keywords: Any) -> Run:
        """Start the unit; fails if it cannot be started."""
        unit = f"{self.service_id}.service"
        before = f"systemctl stop {unit} 2>/dev/null; systemctl reset-failed {unit} 2>/dev/null;"
        words: list[Any] = [before] if self.stop_if_running else []
        words += ["systemd-run", "--quiet", f"--unit={unit}", f"--service-type={self.systemd_type}"]
        words += [
            _Quoted(value, f"--setenv={name}={{}}".format) for name, value in self.environ.items()
        ]
        shell = _Quoted(
            self.command, lambda text: text.replace("$", "$$")
        )  # systemd.service(5): it expands $ in words by itself
        # a pseudo terminal of the unit's own: systemd-run --pty would tie it to this connection
        words += (
            ["/usr/bin/script -qefc", shell, "/dev/null"] if self.tty else ["/bin/sh -c", shell]
        )
        return self._run(label, "start", words, keywords)

    def stop_command(self, *, label: str | None = None, **keywords: Any) -> Run:
        """Stop the unit; one that has gone is fine (status 5)."""
        return self._run(
            label,
            "stop",
            [f"systemctl stop {self.service_id}.service"],
            {"allowed_exits": [5]} | keywords,
        )

    def status_command(
        self, output: str | None = None, *, label: str | None = None, **keywords: Any
    ) -> Run:
        """Show the unit's state; ``output`` as journalctl's. One that does not run (status 3) or
        has gone (4) is fine.
        """
        words = [f"systemctl status --no-pager {self.service_id}.service"] + (
            [f"--output={shlex.quote(output)}"] if output else []
        )
        return self._run(label, "status", words, {"allowed_exits": [3, 4]} | keywords)

    def journal_command(
        self, since: str | None = None, *, label: str | None = None, **keywords: Any
    ) -> Run:
        """Show what the unit printed, all of it, or ``since`` a time as journalctl(1) reads it."""
        words = [f"journalctl --no-pager --unit={self.service_id}.service"] + (
            [f"--since={shlex.quote(since)}"] if since else []
        )
        return self._run(label, "journal", words, keywords)


# --------------------------------------------------------------------------------------------------
# scenarios: nodes and jobs from a YAML file; a mistake is told with its place
# --------------------------------------------------------------------------------------------------

_STEP_TYPES: dict[str, Any] = {cls.__name__: cls for cls in (Run, RunScript, RunString, Push, Pull)}
_FORMATTER_TYPES: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        TerminalFormatter,
        RawFormatter,
        HostFormatter,
        TimeHostFormatter,
        SubdirFormatter,
        CaptureFormatter,
    )
}
_Save = bool | str | os.PathLike[str] | None
_Maps = tuple[dict[str, Any], dict[str, SshJob], Any]
_WORDS, _PATHS = "Collection[Deferred]", "Deferred | Collection[Deferred]"
# what a key holds, in the notation of annotations, where the constructor does not say it or the
# file has its own way
_FILE_KEYS: dict[Any, dict[str, str]] = {
    SshNode: {
        "id": "str",
        "localnode": "bool",
        "gateway": "str | None",
        "known_hosts": "str | None",
    },
    LocalNode: {"id": "str", "localnode": "bool"},
    SshJob: {
        "id": "str",
        "node": "str",
        "command": "Step",
        "commands": "Step",
        "required": "str | Collection[str | None] | None",
        "label": "str | None",
    },
    Run: {"command": "Deferred", "argv": _WORDS},
    RunScript: {"command": "str", "args": _WORDS},
    RunString: {"args": _WORDS},
    Push: {"localpaths": _PATHS, "remotepath": "Deferred"},
    Pull: {"remotepaths": _PATHS, "localpath": "Deferred"},
}
_EITHER = {
    SshJob: ("command", "commands"),
    Run: ("command", "argv"),
    RunScript: ("command", "local_script"),
}  # exactly one of them
_WANTED = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "Deferred": "text",
    "Capture": "a name",
    "Collection": "a list",
    "Mapping": "a mapping",
    "Formatter": "the name of a formatter",
    "Step": "a list of commands",
}
_TAGS = {"map": "a mapping", "seq": "a list", "null": "nothing", "str": "the text"} | dict.fromkeys(
    ("bool", "int", "float", "timestamp", "value", "merge"), ""
)


def _kinds(annotation: str) -> set[str]:
    return set(re.sub(r"\[.*\]", "", annotation).split(" | "))


def _keys_of(cls: Any) -> tuple[dict[str, str], list[str]]:
    """The keys of a mapping that stands for this class, by its constructor and those that it hands
    on to; the positional ones.
    """
    keys, positional = dict(_FILE_KEYS.get(cls, {})), []
    for base in cls.__mro__:
        parameters = [*inspect.signature(base.__init__).parameters.values()][1:]
        for each in parameters:
            if (
                base is cls
                and each.kind is each.POSITIONAL_OR_KEYWORD
                and each.default is each.empty
            ):
                positional.append(each.name)
            if (base is cls or each.kind is each.KEYWORD_ONLY) and _kinds(
                str(each.annotation)
            ) & _WANTED.keys():
                keys.setdefault(each.name, str(each.annotation))
        if not any(each.kind is each.VAR_KEYWORD for each in parameters):
            break
    return keys, positional


class _Entry:
    """One mapping of the file: its place, its YAML nodes by key (each with the key's own); once
    read, its class and values.
    """

    def __init__(self, where: str, node: Any, pairs: dict[str, tuple[Any, Any]]) -> None:
        self.where, self.node, self.pairs = where, node, pairs
        self.cls: Any = None
        self.values: dict[str, Any] = {}


class _Scenario:
    """One reading of a file."""

    def __init__(self, name: str, text: str, variables: Variables) -> None:
        self.name, self.text, self.variables, self.yaml = name, text, variables, _extra("yaml")
        self.formatters: dict[str, Any] = {}

    def error(self, where: str, node: Any, text: str) -> ScenarioError:
        line = node.start_mark.line + 1 if node else 1
        return ScenarioError(escape(f"{self.name}:{line}: {where}{': ' if where else ''}{text}"))

    def unknown(
        self, where: str, node: Any, what: str, name: str, known: Iterable[str]
    ) -> ScenarioError:
        close = difflib.get_close_matches(name, known := list(known), 1)
        remedy = f"did you mean '{close[0]}'?" if close else f"there is {', '.join(known[:24])}"
        return self.error(where, node, f"unknown {what} '{_brief(name)}': {remedy}")

    def load(self) -> _Maps:
        """Nodes and jobs by id, in the order of the file, and the scheduler."""
        try:
            self.loader = self.yaml.SafeLoader(self.text)
            if (root := self.loader.get_single_node()) is None:
                raise self.error(
                    "", None, "nothing in it: a scenario has the sections 'nodes' and 'jobs'"
                )
            sections = self.entry("", root)
            for name, (key, _) in sections.pairs.items():
                if name not in ("nodes", "jobs"):
                    raise self.unknown("", key, "section", name, ("nodes", "jobs"))
            nodes, jobs = self.section("nodes", sections), self.section("jobs", sections)
            made: dict[str, Any] = dict.fromkeys(nodes)  # in the order of the file
            done: dict[str, Any] = dict.fromkeys(jobs)
            for name, entry, ids in self.order(nodes, "gateway", "node"):
                made[name] = self.make(entry, **{"gateway": made[ids[0]]} if ids else {})
            for name, entry, ids in self.order(jobs, "required", "job"):
                [node] = self.ids(entry, "node", "node", nodes)
                done[name] = self.make(entry, made[node], required=[done[each] for each in ids])
            return made, done, asynciojobs.Scheduler(*done.values())
        except self.yaml.YAMLError as exc:
            mark, start = getattr(exc, "problem_mark", None), getattr(exc, "context_mark", None)
            line = mark.line if mark else self.text.count("\n", 0, getattr(exc, "position", 0))
            context = f"{exc.context} (line {start.line + 1}): " if start else ""
            problem = getattr(exc, "problem", None) or getattr(exc, "reason", exc)
            hint = (
                " (a template? give load() an env, or --set NAME=value)"
                if "{%" in self.text
                else ""
            )
            raise ScenarioError(
                escape(f"{self.name}:{line + 1}: wrong YAML: {context}{problem}{hint}")
            ) from None
        except RecursionError:
            raise self.error(
                "", None, "wrong YAML: nested too deeply, or merged into itself"
            ) from None

    def tag(self, where: str, node: Any) -> str:
        """The YAML type of a value, which must be plain data."""
        if (tag := node.tag.removeprefix("tag:yaml.org,2002:")) not in _TAGS:
            raise self.error(where, node, f"unknown tag '{_brief(tag)}': leave it out")
        return str(tag)

    def mismatch(self, where: str, node: Any, what: str) -> ScenarioError:
        tag = self.tag(where, node)
        found = "an empty list" if tag == "seq" and not node.value else _TAGS[tag]
        if node.id == "scalar" and tag != "null":
            found = f"{found} '{_brief(node.value)}'".lstrip()
        if node.id == "mapping" and node.value and node.value[0][0].id == "mapping":  # {{...}}
            found += ": put {{...}} in quotes, or give load() an env (--set NAME=value)"
        return self.error(where, node, f"{what}, not {found}")

    def entry(self, where: str, node: Any) -> _Entry:
        """A mapping; its own keys win over what ``<<`` merges."""
        if self.tag(where, node) != "map":
            raise self.mismatch(where, node, "it must be a mapping (lines of 'key: value')")
        own: dict[str, tuple[Any, Any]] = {}
        merged: dict[str, tuple[Any, Any]] = {}
        for key, value in node.value:
            if key.tag.endswith(":merge"):
                for source in value.value if value.id == "sequence" else [value]:
                    merged = self.entry(where, source).pairs | merged
            elif key.id != "scalar":
                deferred = key.id == "mapping" and all(
                    each.tag.endswith(":null") for _, each in key.value
                )  # {{name}}
                raise self.mismatch(
                    where, key, "put {{...}} in quotes: " * deferred + "a key must be text"
                )
            elif key.value in own:
                line = own[key.value][0].start_mark.line + 1
                raise self.error(
                    where, key, f"duplicate key '{_brief(key.value)}': line {line} has it too"
                )
            else:
                own[key.value] = key, value
        return _Entry(where, node, merged | own)

    def read(self, entry: _Entry, cls: Any) -> None:
        """The values of an entry that stands for this class."""
        entry.cls, (keys, needed), either = cls, _keys_of(cls), _EITHER.get(cls, ())
        for name, (key, node) in entry.pairs.items():
            if name not in keys:
                raise self.unknown(entry.where, key, "key", name, keys)
            entry.values[name] = self.value(entry.where, name, node, keys[name])
        given = [name for name in either if name in entry.values]
        if either and len(given) != 1:
            what = (
                "both '{}' and '{}': leave one out"
                if given
                else "no '{}' and no '{}': add one of them"
            )
            raise self.error(entry.where, entry.node, what.format(*either))
        for name in ["id"] * ("id" in keys) + needed:
            if not entry.values.get(name) and name not in either:
                raise self.error(entry.where, entry.node, f"no '{name}': add '{name}: ...'")

    def read_type(self, entry: _Entry, what: str, types: Mapping[str, Any]) -> None:
        """The same for the class that its ``type`` names."""
        if "type" not in entry.pairs:
            raise self.error(entry.where, entry.node, f"no 'type': it is one of {', '.join(types)}")
        name = self.value(entry.where, "type", node := entry.pairs.pop("type")[1], "str")
        if name not in types:
            raise self.unknown(entry.where, node, f"type of {what}", name, types)
        self.read(entry, types[name])

    def value(self, where: str, key: str, node: Any, annotation: str) -> Any:
        """What a YAML value means for a parameter with this annotation; where text is due, ``010``
        and ``yes`` stay as written.
        """
        kinds, tag = _kinds(annotation), self.tag(where, node)
        text = node.value.removesuffix("\n") if node.id == "scalar" and tag != "null" else None
        if tag == "null" and "None" in kinds:
            return None
        if "Step" in kinds and tag != "null":
            return (
                self.steps(where, node) if text is None else self.deferred(text)
            )  # one line for Run
        if "Formatter" in kinds and (text or tag == "map"):
            return self.formatter(f"{where}, formatter", node)
        if "Capture" in kinds and text and text.isidentifier():
            return Capture(text, self.variables)
        if "Collection" in kinds and (
            tag == "seq" or (text is not None and not kinds & {"str", "Deferred"})
        ):
            inner = annotation[annotation.index("[") + 1 : annotation.rindex("]")]
            return [
                self.value(where, key, item, inner)
                for item in (node.value if tag == "seq" else [node])
            ]
        if "Mapping" in kinds and tag == "map":
            return {
                name: self.value(where, f"{key}.{name}", item, "str")
                for name, (_, item) in self.entry(where, node).pairs.items()
            }
        if tag in kinds & {"bool", "int", "float"} or (tag == "int" and "float" in kinds):
            with contextlib.suppress(
                ValueError, KeyError
            ):  # !!int and the like before some other text
                return self.loader.construct_object(node)
        if text is not None and kinds & {"str", "Deferred"}:
            return self.deferred(text) if "Deferred" in kinds else text
        wanted = " or ".join(
            dict.fromkeys(words for kind, words in _WANTED.items() if kind in kinds)
        )
        raise self.mismatch(where, node, f"'{_brief(key)}' must be {wanted}")

    def deferred(self, text: str) -> str | Deferred:
        return Deferred(text, self.variables) if "{{" in text else text

    def make(self, entry: _Entry, *args: Any, **keywords: Any) -> Any:
        """What an entry stands for; what the constructor refuses is told with its place."""
        try:
            return entry.cls(*args, **entry.values, **keywords)
        except (ApsshError, TypeError, ValueError) as exc:
            raise self.error(entry.where, entry.node, str(exc)) from None

    def formatter(self, where: str, node: Any) -> Any:
        """A name, or a mapping with ``type`` and arguments; the same words mean the same formatter,
        so that columns align.
        """
        words = self.yaml.serialize(node)
        if words not in self.formatters or "CaptureFormatter" in words:
            entry = (
                self.entry(where, node)
                if node.id == "mapping"
                else _Entry(where, node, {"type": (node, node)})
            )
            self.read_type(entry, "formatter", _FORMATTER_TYPES)
            self.formatters[words] = self.make(entry)
        return self.formatters[words]

    def steps(self, where: str, node: Any) -> list[Any]:
        """The commands of a job: a list of mappings (nulls dropped), or one mapping."""
        made = []
        for number, item in enumerate(node.value if node.id == "sequence" else [node], 1):
            if self.tag(where, item) == "null":
                continue
            entry = self.entry(f"{where}, command {number}", item)
            self.read_type(entry, "command", _STEP_TYPES)
            words = [*entry.values.pop("argv", []), *entry.values.pop("args", [])]
            line = entry.values.pop("command", "")
            if (
                line and entry.cls is RunScript
            ):  # a blank inside of {{ }} does not end the script's name
                script, line = re.findall(r"\s*((?:\{\{.*?\}\}|\S)*)\s*(.*)", line, re.DOTALL)[0]
                entry.values["local_script"], line = self.deferred(script), self.deferred(line)
            made.append(
                self.make(
                    entry,
                    *(entry.values.pop(name) for name in _keys_of(entry.cls)[1]),
                    *[line] * bool(line),
                    *words,
                )
            )
        return made

    def section(self, name: str, sections: _Entry) -> dict[str, _Entry]:
        """The entries of a section by id."""
        if name not in sections.pairs:
            raise self.error(
                "", sections.node, f"no section '{name}': add '{name}:' and a list below it"
            )
        listed = sections.pairs[name][1]
        if self.tag(f"section {name}", listed) != "seq" or not listed.value:
            raise self.mismatch(
                f"section {name}", listed, "it must be a list with at least one item ('- id: ...')"
            )
        entries: dict[str, _Entry] = {}
        for number, node in enumerate(listed.value, 1):
            ids = (
                [
                    value.value
                    for key, value in node.value
                    if (key.value, value.id) == ("id", "scalar")
                ]
                if node.id == "mapping"
                else []
            )
            entry = self.entry(
                f"section {name}, " + (f"id {_brief(ids[0])}" if any(ids) else f"item {number}"),
                node,
            )
            local = "localnode" in entry.pairs and self.value(
                entry.where, "localnode", entry.pairs["localnode"][1], "bool"
            )
            self.read(entry, SshJob if name == "jobs" else LocalNode if local else SshNode)
            entry.values.pop("localnode", None)
            if (other := entries.setdefault(entry.values.pop("id"), entry)) is not entry:
                raise self.error(
                    entry.where,
                    node,
                    f"duplicate id: line {other.node.start_mark.line + 1} has it too",
                )
        return entries

    def ids(self, entry: _Entry, key: str, what: str, known: Mapping[str, Any]) -> list[str]:
        """The ids that a key names, nulls dropped."""
        given = entry.values.pop(key, None)
        ids = [name for name in (given if isinstance(given, list) else [given]) if name is not None]
        for name in ids:
            if name not in known:
                raise self.unknown(entry.where, entry.pairs[key][1], what, name, known)
        return ids

    def order(
        self, entries: Mapping[str, _Entry], key: str, what: str
    ) -> Iterator[tuple[str, _Entry, list[str]]]:
        """Ids and entries, each after those that its key names, and these."""
        links = {name: self.ids(entry, key, what, entries) for name, entry in entries.items()}
        try:
            for name in graphlib.TopologicalSorter(links).static_order():
                yield name, entries[name], links[name]
        except graphlib.CycleError as exc:
            entry, circle = entries[exc.args[1][-1]], " -> ".join(map(_brief, exc.args[1][::-1]))
            raise self.error(
                entry.where,
                entry.pairs[key][0],
                f"'{key}' goes in a circle: {circle}: take one out",
            ) from None


class YamlLoader:
    """A scenario of nodes and jobs in a YAML file (README.md has the keys); needs ``pip install
    'apssh[yaml]'``.

    With a non-empty ``env`` the text is a Jinja2 template; ``save_intermediate`` writes what comes
    of it: True beside the input (``x.yaml.j2`` gives ``x.yaml``, any other name gets ``.tmp``), a
    path there. What is left of ``{{name}}`` in commands, paths, arguments and scripts is a Deferred
    over ``variables`` (new at each load), where ``capture: name`` stores. Loading connects to
    nothing. Every mistake raises ScenarioError, with file, line, section, id and the remedy.
    """

    def __init__(self, filename: str | os.PathLike[str]) -> None:
        self.filename, self.variables = filename, Variables()

    def load(self, env: Mapping[str, Any] | None = None, *, save_intermediate: _Save = None) -> Any:
        """The asynciojobs Scheduler, ready to run."""
        return self.load_with_maps(env, save_intermediate=save_intermediate)[2]

    def load_with_maps(
        self, env: Mapping[str, Any] | None = None, *, save_intermediate: _Save = None
    ) -> _Maps:
        """Nodes by id, jobs by id, and the Scheduler."""
        name, path = os.fspath(self.filename), Path(self.filename)
        try:
            text = path.read_text("utf-8-sig")
            if env:
                text, name = self._rendered(text, env), f"{name} (rendered)"
            if env and save_intermediate:
                beside = (
                    path.with_suffix("")
                    if path.suffix == ".j2"
                    else path.with_name(f"{path.name}.tmp")
                )
                path = beside if save_intermediate is True else Path(save_intermediate)
                if path.exists() and path.samefile(self.filename):
                    raise ScenarioError(
                        f"{escape(str(path))}: save_intermediate would overwrite the template: give another path"
                    )
                path.write_text(text, "utf-8")
                name = str(path)
        except OSError as exc:
            raise ScenarioError(f"{escape(str(path))}: {_reason(exc)}") from None
        except UnicodeError:
            raise ScenarioError(f"{escape(str(path))}: not UTF-8 text: save it as UTF-8") from None
        self.variables = Variables()
        return _Scenario(name, text, self.variables).load()

    def _rendered(self, text: str, env: Mapping[str, Any]) -> str:
        jinja2 = _extra("jinja2")
        try:
            return str(
                jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
                .from_string(text)
                .render(env)
            )
        except Exception as exc:  # a template may compute anything
            lines = [
                frame.lineno
                for frame in traceback.extract_tb(exc.__traceback__)
                if frame.filename == "<template>"
            ]
            line = getattr(exc, "lineno", None) or (lines[-1] if lines else 1)
            remedy = (
                ": add it to env (--set NAME=value)"
                if isinstance(exc, jinja2.UndefinedError)
                else ""
            )
            raise ScenarioError(
                escape(f"{os.fspath(self.filename)}:{line}: template: {exc}{remedy}")
            ) from None


# --------------------------------------------------------------------------------------------------
# targets: from what the command line names to frozen values
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """A host after the gateways that lead to it, nearest to us first; ``direct`` if ``None->``
    forbids default ones.
    """

    chain: tuple[Hop, ...]
    direct: bool = dataclasses.field(default=False, compare=False)

    def __str__(self) -> str:
        return "->".join(["None"] * self.direct + list(map(str, self.chain)))


def _parse_targets(
    texts: Iterable[str],
    *,
    exclude: Iterable[str] = (),
    login: str | None = None,
    gateway: str | None = None,
    port: int | None = None,
    stdin: Callable[[], str] | None = None,
    last: Callable[[str], list[str]] | None = None,
) -> list[Target]:
    """The targets that texts name (see the usage page), each once, in order, less the excluded
    ones. ``login`` is for each hop that names no user, ``port`` for the host itself, ``gateway``
    for targets that name no way; ``stdin`` answers ``-``, and ``last`` the selector of
    ``@last:selector``. UsageError names the text, its file and line.
    """
    ways = [
        _parse_target(name, login)
        for word in _words("" if gateway == "None" else gateway or "")
        for name in _expand_ranges(word)
    ]
    if len(ways) > 1:
        raise UsageError(f"-g {_brief(gateway or '')}: gateways make one chain, as in gw1->gw2")
    parse = functools.partial(
        _parse_target, login=login, port=port, gateways=ways[0].chain if ways else ()
    )
    found = dict.fromkeys(_read_targets(texts, stdin, last, parse))
    if not found:
        given = " ".join([texts] if isinstance(texts, str) else texts).strip(" ,")
        raise UsageError(f"no target in {_brief(given)}" if given else "no target: use -t HOST ...")
    refused: dict[str, list[Target]] = {}
    for pattern in _read_targets(exclude, stdin, last, _parse_target):
        refused.setdefault(pattern.chain[-1].host.lower(), []).append(pattern)
    kept = [
        target
        for target in found
        if not any(
            _matches(pattern, target) for pattern in refused.get(target.chain[-1].host.lower(), ())
        )
    ]
    if not kept:
        raise UsageError("no target: -x excludes them all")
    return kept


def _matches(pattern: Target, target: Target) -> bool:
    """Whether an exclusion names this target, in all the parts that it says; the way there only if
    it says one.
    """
    chain = target.chain if pattern.direct or len(pattern.chain) > 1 else target.chain[-1:]
    return len(chain) == len(pattern.chain) and all(
        named.host.lower() == hop.host.lower()
        and (named.user or hop.user, named.port or hop.port) == (hop.user, hop.port)
        for named, hop in zip(pattern.chain, chain, strict=True)
    )


def _read_targets(
    texts: Iterable[str],
    stdin: Callable[[], str] | None,
    last: Callable[[str], list[str]] | None,
    parse: Callable[[str], Target],
) -> Iterator[Target]:
    count = 0
    for text in [texts] if isinstance(texts, str) else texts:
        for word in [text] if _find(text) else _words(text):
            for place, line in _read_source(word, stdin, last):
                try:
                    for name in itertools.chain.from_iterable(map(_expand_ranges, _words(line))):
                        count += 1
                        if count > MAX_TARGETS:
                            raise UsageError(f"more than {MAX_TARGETS} targets")
                        yield parse(name)
                except UsageError as exc:
                    raise UsageError(place + exc.message) from None


def _read_source(
    word: str, stdin: Callable[[], str] | None, last: Callable[[str], list[str]] | None
) -> Iterable[tuple[str, str]]:
    """What a file, a folder or a stream holds, or else the word itself: lines, and the place of
    each.
    """
    found, shown, (origin, _, selector) = _find(word), _brief(word), word.partition(":")
    lines = None
    try:
        if word == "-":
            lines = stdin and stdin().split("\n")
        elif origin == "@last":
            lines = last and last(selector)
        elif os.path.isdir(found):
            lines = sorted(
                path.name
                for path in Path(found).iterdir()
                if path.name[0] != "." and path.suffix != ".err" and path.is_file()
            )  # -o writes <host>.err
        elif found:
            with open(found, encoding="utf-8-sig", errors="replace") as file:
                content = file.read(MAX_TARGET_FILE + 1)
            if len(content) > MAX_TARGET_FILE or "\0" in content or "\ufffd" in content:
                raise UsageError(f"{shown}: not a text file of targets")
            lines = content.split("\n")
        elif "/" not in word:
            return [("", word)]
    except OSError as exc:
        raise UsageError(f"{shown}: {(exc.strerror or str(exc)).lower()}") from None
    if lines is None:
        raise UsageError(f"{shown}: {'no such file' if '/' in word else 'cannot be read here'}")
    return ((f"{shown}:{number}: ", line.partition("#")[0]) for number, line in enumerate(lines, 1))


def _find(name: str) -> str:
    """The path of the file or folder that is meant, here or in ~/.apssh, or nothing."""
    places = (os.path.expanduser(name), os.path.join(os.path.expanduser("~/.apssh"), name))
    return next(filter(os.path.exists, places), "") if name else ""


def _words(text: str) -> list[str]:
    """What blanks and commas separate, but for commas in brackets and blanks around arrows."""
    text = (
        re.sub(r"[ \t\r\n]+", " ", text.replace("→", "->"))
        .replace(" ->", "->")
        .replace("-> ", "->")
    )
    return re.findall(r"(?:\[[^][ ]*+\]|[^][ ,]++|[][])++", text)


def _parse_target(
    text: str, login: str | None = None, port: int | None = None, gateways: Sequence[Hop] = ()
) -> Target:
    """One target, its ranges expanded already; the arguments are for what it does not say."""
    hops = text.split("->")
    direct = len(hops) > 1 and hops[0] == "None"
    *way, host = hops[direct:]
    before = [_parse_hop(hop, text, login) for hop in way] or ([] if direct else gateways)
    chain = (*before, _parse_hop(host, text, login, port))
    if len({(hop.host.lower(), hop.port or 22) for hop in chain}) < len(chain):
        raise UsageError(
            f"{_brief(text)}: {'->'.join(map(str, chain))} passes a host twice; None->HOST has no gateway"
        )
    return Target(chain, direct)


# --------------------------------------------------------------------------------------------------
# fan-out: steps on many nodes, within limits; run, push, pull and the programs stand on it
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False, repr=False)
class Result:
    """What came of one host: ``status`` (exit status) or ``signal`` (its name), or neither and
    ``error`` and ``kind`` (see ApsshError).

    ``name`` is the shortest text that tells this host from the others of the run; ``seconds``
    counts from the first attempt to connect; ``reached``: whether there was a connection to the
    end; ``may_run``: the command may still be running over there.
    """

    host: str
    user: str
    port: int
    name: str
    target: str
    status: int | None = None
    signal: str | None = None
    error: str | None = None
    kind: str | None = None
    seconds: float = 0.0
    stdout_bytes: bytes = b""
    stderr_bytes: bytes = b""
    bytes_transferred: int = 0
    reached: bool = True
    may_run: bool = False

    def __repr__(self) -> str:
        said = f", stdout {_brief(self.stdout)!r}" if self.stdout_bytes else ""
        return f"<Result {self.name}: {self.outcome} in {self.seconds:g} s{said}{f': {self.error}' if self.error else ''}>"

    @property
    def ok(self) -> bool:
        """Whether it succeeded."""
        return self.error is None

    @property
    def stdout(self) -> str:
        """Standard output as text (UTF-8, surrogateescape)."""
        return self.stdout_bytes.decode("utf-8", "surrogateescape")

    @property
    def stderr(self) -> str:
        """Standard error as text (UTF-8, surrogateescape)."""
        return self.stderr_bytes.decode("utf-8", "surrogateescape")

    @property
    def outcome(self) -> str:
        """In a word or two: ok, status 3, signal TERM, interrupted, or the kind of the failure."""
        if self.ok or self.error == "interrupted":
            return self.error or "ok"
        return (
            f"status {self.status}"
            if self.status is not None
            else f"signal {self.signal}"
            if self.signal
            else self.kind or "local"
        )


class _HoldingFormatter(Formatter):
    """Holds what each host prints until it is asked for."""

    def __init__(self, verbose: bool = False) -> None:
        super().__init__(None, verbose)
        self._held: dict[Endpoint, _HeldSink] = {}

    def endpoint_sink(self, endpoint: Endpoint) -> _Sink:
        return self._held.setdefault(endpoint, _HeldSink())

    def take(self, endpoint: Endpoint) -> tuple[bytes, bytes]:
        """Both streams of a host, which are then forgotten."""
        held = self._held.pop(endpoint, None)
        return (held.stdout(), held.stderr()) if held else (b"", b"")


_Steps = Callable[[SshNode], list[AbstractCommand]]


async def _fan_out(
    nodes: Sequence[SshNode],
    steps: _Steps,
    *,
    window: int = 0,
    retries: int = 0,
    started: Callable[[SshNode, StepRecord], None] = lambda node, step: None,
    done: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Run these steps on each node, at most ``window`` nodes at once (0: as many as files can be
    open); close the nodes. ``done`` gets each result as it comes. Cancelling it ends the remote
    commands; the other hosts are then done as interrupted.
    """
    if window < 0 or retries < 0:
        raise UsageError("window and retries are numbers, 0 or more")
    capacity = max(_raise_file_limit() - 100, 1)
    results = [
        Result(
            node.hostname,
            node.username,
            node.port,
            node.formatter.endpoint_name(node._endpoint),
            node._target,
            error="interrupted",
            kind="local",
        )
        for node in nodes
    ]
    waiting = iter(zip(nodes, results, strict=True))

    async def worker() -> None:
        for node, result in waiting:
            begin, step = time.monotonic(), StepRecord()
            started(node, step)
            try:
                await _attempts(node, steps, step, result, retries)
            finally:
                result.seconds = round(time.monotonic() - begin, 3)
                result.bytes_transferred, result.may_run = step.bytes_transferred, step.may_run
                if isinstance(node.formatter, _HoldingFormatter):
                    result.stdout_bytes, result.stderr_bytes = node.formatter.take(node._endpoint)
                done(result)
                await node.close()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(window or capacity, capacity, len(nodes))):
                group.create_task(worker())
    except BaseExceptionGroup as exc:
        raise exc.exceptions[0] from None
    finally:
        for _, result in waiting:  # interrupted before their turn
            done(result)
        await asyncio.gather(
            *(gateway.close() for gateway in {hop for node in nodes for hop in node._hops()[:-1]})
        )
    return results


async def _attempts(
    node: SshNode, steps: _Steps, step: StepRecord, result: Result, retries: int
) -> None:
    """The steps on one node, in order, up to the first failure; again when the host could not be
    reached.
    """
    for attempt in itertools.count():
        try:
            for command in steps(node):
                status = await command._run(node, step)
                result.status, result.signal = (
                    (status, None) if isinstance(status, int) else (None, status)
                )
                if not command._succeeded(status):
                    raise command._as_error(node, status, step.command)
        except ApsshError as exc:
            if (
                isinstance(exc, ConnectionFailedError)
                and not exc.command
                and attempt < retries
                and exc.kind not in ("hostkey", "auth")
            ):
                await asyncio.sleep(random.uniform(0.5, 1) * min(2**attempt, 30))
                continue
            result.error, result.kind, result.reached = (
                exc.message,
                exc.kind,
                not isinstance(exc, ConnectionFailedError),
            )
            if exc.status is None:
                result.status = result.signal = None
        else:
            result.error, result.kind, result.reached = None, None, True
        return


def _build_nodes(
    targets: Sequence[Target],
    *,
    formatter: Formatter,
    config: str | None = None,
    connect_timeout: float | None = None,
    **options: Any,
) -> list[SshNode]:
    """A node for each target, gateways shared, completed from the config. Raises UsageError,
    ApsshError (a config that ssh refuses).
    """
    ssh_config = _SshConfig(config)
    answers: dict[Hop, _HostConfig] = {}
    missing = {hop for target in targets for hop in target.chain}
    while missing:  # all of them at once, then the hosts that they jump through
        answers |= (found := ssh_config.lookup_all(missing))
        missing = {hop for each in found.values() for hop in _jumps(each)} - answers.keys()
    if ssh_config.trouble:
        _screen.say(f"apssh: {ssh_config.trouble}")
    gateways: dict[Any, SshNode] = {}

    def build(
        chain: tuple[Hop, ...], direct: bool, shown: Formatter, behind: frozenset[Hop] = frozenset()
    ) -> SshNode:
        hop = chain[-1]
        answer = answers[hop]
        before = chain[:-1] or (() if direct else _jumps(answer))
        gateway = None
        if before:
            for each in behind.union([hop]).intersection(before):
                raise UsageError(f"{each.host}: it is its own gateway")
            if (before, direct) not in gateways:
                gateways[before, direct] = build(before, direct, _quiet, behind | {hop})
            gateway = gateways[before, direct]
        node = SshNode(
            hop.host,
            username=hop.user or answer.user or getpass.getuser(),
            port=hop.port or answer.port or 22,
            gateway=gateway,
            formatter=shown,
            **options,
            timeout=(answer.connect_timeout or CONNECT_TIMEOUT)
            if connect_timeout is None
            else connect_timeout,
        )
        _configure(node, answer)
        return node

    nodes: dict[Any, SshNode] = {}
    for target in targets:
        node = build(target.chain, target.direct, formatter)
        node._target = str(target)
        nodes.setdefault(
            tuple((hop.hostname.lower(), hop.username, hop.port) for hop in node._hops()), node
        )  # `a a:22 A` runs once
    return list(nodes.values())


async def _co_quick(
    targets: str | Iterable[str],
    options: dict[str, Any],
    steps: _Steps,
    check: Callable[[Sequence[SshNode]], None] = lambda nodes: None,
) -> list[Result]:
    """What co_run, co_push and co_pull share: targets, nodes, fan-out."""
    texts = [targets] if isinstance(targets, str) else list(targets)
    if not texts:  # whatever is to be done to the hosts of an empty list is done
        return []
    parsing = {name: options.pop(name, None) for name in ("login", "gateway", "port")}
    limits = {"window": options.pop("window", 0), "retries": options.pop("retries", 0)}
    parsed = _parse_targets(texts, exclude=options.pop("exclude", ()), **parsing)
    config = options.pop("config", None)
    formatter = options.pop("formatter", None) or _HoldingFormatter()
    nodes = await asyncio.to_thread(
        lambda: _build_nodes(
            parsed,
            formatter=formatter,
            config="none" if config is None else None if config is True else config,
            **options,
        )
    )
    check(nodes)
    return await _fan_out(nodes, steps, **limits)


_COMMAND_OPTIONS = ("timeout", "x11", "env", "pty", "allowed_exits")


async def co_run(
    targets: str | Iterable[str], command: str | AbstractCommand, **options: Any
) -> list[Result]:
    """Run a command (a line, or a step such as RunScript) on targets (as on the command line); a
    Result each, in their order.

    Options: ``timeout`` (seconds for the command), ``env``, ``pty``; ``login``, ``gateway``,
    ``port``, ``exclude``, ``window`` and ``retries`` as the options of that name;
    ``connect_timeout`` (30 s); ``config``: None reads no ssh_config, True the user's, or a path;
    any other keyword of SshNode (keys, password, host_keys, known_hosts, guard...). Raises
    UsageError before any connection.
    """
    for_command = {name: options.pop(name) for name in _COMMAND_OPTIONS if name in options}
    if for_command and isinstance(command, AbstractCommand):
        raise UsageError(
            f"{', '.join(for_command)}: give it to {type(command).__name__}(...) itself"
        )
    step = command if isinstance(command, AbstractCommand) else Run(command, **for_command)
    step._check()
    return await _co_quick(targets, options, lambda node: [step])


async def co_push(
    targets: str | Iterable[str], localpaths: Any, remotepath: str, **options: Any
) -> list[Result]:
    """Copy local files to targets; ``{host}``, ``{fqdn}`` and ``{user}`` may stand in paths;
    options of Push and of co_run.
    """
    return await _co_quick(targets, options, *_copies(Push, localpaths, remotepath, options))


async def co_pull(
    targets: str | Iterable[str], remotepaths: Any, localpath: str, **options: Any
) -> list[Result]:
    """Copy files of targets here; ``{host}``, ``{fqdn}`` and ``{user}`` in ``localpath`` keep hosts
    apart; options of Pull and of co_run.

    Raises UsageError when two hosts would write to the same place.
    """
    return await _co_quick(targets, options, *_copies(Pull, remotepaths, localpath, options))


def _expand_path(path: str, node: SshNode) -> str:
    """``{host}``, ``{fqdn}`` and ``{user}`` in a path; they are file names, and lead nowhere else."""
    values = {
        "host": node.formatter.endpoint_name(node._endpoint),
        "fqdn": re.sub(_NOT_IN_FILE_NAME, "_", node.hostname),
        "user": re.sub(_NOT_IN_FILE_NAME, "_", node.username),
    }
    return re.sub(_FIELD, lambda match: values.get(match[1], match[0]), path)


def _copies(
    command: type[Push | Pull],
    sources: Any,
    destination: str,
    options: dict[str, Any],
    dry: bool = False,
) -> tuple[_Steps, Callable[[Sequence[SshNode]], None]]:
    """The copy of each node, and what raises UsageError before anything is copied; takes the copy's
    options out of ``options``.
    """
    texts, many = _paths(sources)
    copying = {
        name: options.pop(name)
        for name in ("preserve", "recurse", "follow_symlinks", "inplace", "timeout")
        if name in options
    }

    def steps(node: SshNode) -> list[AbstractCommand]:
        paths, place = (
            [_expand_path(str(path), node) for path in texts],
            _expand_path(destination, node),
        )
        if command is Pull and place != destination and not dry:
            try:
                os.makedirs(place if many else os.path.dirname(place) or ".", exist_ok=True)
            except OSError as exc:  # this host's failure: the others go on
                raise TransferError(
                    f"{escape(place)}: {_reason(exc)}", host=node.hostname
                ) from None
        return [command(paths if many else paths[0], place, **copying)]

    def check(nodes: Sequence[SshNode]) -> None:
        if command is Pull:
            _check_places(destination, nodes)
            return
        for path in dict.fromkeys(
            _expand_path(str(text), node) for node in nodes for text in texts
        ):
            if not os.path.lexists(path) or (os.path.isdir(path) and not copying.get("recurse")):
                reason = (
                    "is a folder (recurse, -r, copies folders)"
                    if os.path.lexists(path)
                    else "no such file"
                )
                raise UsageError(f"{escape(path)}: {reason}")

    return steps, check


def _check_places(localpath: str, nodes: Sequence[SshNode]) -> None:
    """The Pull of each node can write, and not where another does."""
    places: dict[str, SshNode] = {}
    for node in nodes:
        place = os.path.realpath(shown := _expand_path(localpath, node))
        into = os.path.isdir(place) or shown.endswith("/")
        folder = place if into else os.path.dirname(place)
        if not os.path.isdir(folder) and shown == localpath:  # those that differ by host are made
            raise UsageError(f"{escape(shown if into else os.path.dirname(shown))}: no such folder")
        if os.path.isdir(folder) and not os.access(folder, os.W_OK | os.X_OK):
            raise UsageError(f"{escape(folder)}: permission denied")
        if place in places:
            raise UsageError(
                f"{places[place].hostname} and {node.hostname} would both write to {localpath}: put {{host}} in the path"
            )
        places[place] = node


def run(
    targets: str | Iterable[str], command: str | AbstractCommand, **options: Any
) -> list[Result]:
    """co_run, from code that is not a coroutine (in a notebook too)."""
    return _synchronously(co_run(targets, command, **options))


def push(
    targets: str | Iterable[str], localpaths: Any, remotepath: str, **options: Any
) -> list[Result]:
    """co_push, from code that is not a coroutine (in a notebook too)."""
    return _synchronously(co_push(targets, localpaths, remotepath, **options))


def pull(
    targets: str | Iterable[str], remotepaths: Any, localpath: str, **options: Any
) -> list[Result]:
    """co_pull, from code that is not a coroutine (in a notebook too)."""
    return _synchronously(co_pull(targets, remotepaths, localpath, **options))


def _synchronously(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine to its end, in a thread of its own when a loop runs here already. Ctrl-C ends
    it in either case.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    interrupt: Callable[[], object] = lambda: None  # noqa: E731

    async def main() -> _T:
        nonlocal interrupt
        interrupt = functools.partial(
            asyncio.get_running_loop().call_soon_threadsafe,
            cast("Any", asyncio.current_task()).cancel,
        )
        return await work

    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(asyncio.run, main())
        try:
            with _ctrl_c_raises():
                return future.result()
        except KeyboardInterrupt:
            interrupt()
            raise


# --------------------------------------------------------------------------------------------------
# views: what the programs show of a fan-out; each sees every result
# --------------------------------------------------------------------------------------------------


class _Marks:
    """-m: the status of each host in a file below ``0ok`` or ``1failed``; the folders can be
    targets of a next run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def done(self, result: Result) -> None:
        folder, other = (
            self._folder / name
            for name in (("0ok", "1failed") if result.ok else ("1failed", "0ok"))
        )
        folder.mkdir(parents=True, exist_ok=True)
        (other / result.name).unlink(missing_ok=True)  # of another run
        (folder / result.name).write_text(
            f"{result.status if result.status is not None else result.signal}\n"
        )


class _JsonLines:
    """-j: one JSON object a host, a line each, as hosts finish."""

    def done(self, result: Result) -> None:
        fields = {
            name: getattr(result, name)
            for name in (
                "host",
                "user",
                "port",
                "name",
                "status",
                "signal",
                "error",
                "kind",
                "seconds",
                "stdout",
                "stderr",
            )
        }
        _screen.write(json.dumps(fields).encode("ascii") + b"\n", raw=True)


class _Gather:
    """-b: hosts with the same output are shown once, under their folded names, the largest group
    first.
    """

    def __init__(self, diff: bool) -> None:
        self._diff = diff
        self._groups: dict[tuple[str, bytes, bytes], list[str]] = {}

    def done(self, result: Result) -> None:
        if result.status is not None or result.signal or result.stdout_bytes or result.stderr_bytes:
            self._groups.setdefault(
                (result.outcome, result.stdout_bytes, result.stderr_bytes), []
            ).append(result.name)

    def finish(self) -> None:
        """Show the groups."""
        groups = sorted(self._groups.items(), key=lambda group: (-len(group[1]), group[1]))
        largest = groups[0][0][1] if groups else b""
        for index, ((outcome, stdout, stderr), names) in enumerate(groups):
            header = f"{fold_names(names)} ({len(names)})" + (
                "" if outcome == "ok" else f" {outcome}"
            )
            if self._diff and index and stdout != largest:
                header += " differs"
                stdout = self._difference(largest, stdout)
            if stdout or not stderr:
                self._show(header, stdout, err=False)
            if stderr:
                self._show(f"{header} stderr", stderr, err=True)

    @staticmethod
    def _show(header: str, text: bytes, *, err: bool) -> None:
        rule = "-" * min(len(header), 79)
        ending = b"" if text.endswith(b"\n") or not text else b"\n"
        _screen.write(
            _screen.paint(f"{rule}\n{header}\n{rule}\n", "1", err=err).encode() + text + ending,
            err=err,
        )

    @staticmethod
    def _difference(old: bytes, new: bytes) -> bytes:
        before, after = ([os.fsdecode(line) for line in io.BytesIO(text)] for text in (old, new))
        lines = itertools.islice(difflib.unified_diff(before, after), 2, None)
        return os.fsencode(
            "".join(
                line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"
                for line in lines
            )
        )


class _Progress:
    """One line at the bottom of the terminal while hosts are at work; nothing when stderr is no
    terminal.
    """

    def __init__(self, total: int, quiet: bool) -> None:
        self._total, self._finished, self._failed = total, 0, 0
        self._running: dict[str, StepRecord] = {}
        self._moved = 0  # bytes of the hosts that are done
        self._begin = time.monotonic()
        self._active = sys.stderr.isatty() and not quiet
        self._handle: asyncio.TimerHandle | None = None

    def started(self, node: SshNode, step: StepRecord) -> None:
        self._running[node.formatter.endpoint_name(node._endpoint)] = step
        if self._active and not self._handle:
            self._handle = asyncio.get_running_loop().call_later(1, self._tick)

    def done(self, result: Result) -> None:
        self._finished += 1
        self._failed += not result.ok
        self._moved += result.bytes_transferred
        self._running.pop(result.name, None)

    def _tick(self) -> None:
        self._handle = asyncio.get_running_loop().call_later(0.2, self._tick)
        text = f"{self._finished}/{self._total} done"
        if self._failed:
            text += f", {self._failed} failed"
        text += f", {len(self._running)} running"
        if moved := self._moved + sum(step.bytes_transferred for step in self._running.values()):
            text += f", {moved / 1e6:.1f} MB at {moved / 1e6 / (time.monotonic() - self._begin):.1f} MB/s"
        if 0 < len(self._running) <= 8:
            text += f": {fold_names(self._running)}"
        _screen.show(text)

    def finish(self) -> None:
        """Take it away."""
        if self._handle:
            self._handle.cancel()
        _screen.show("")


def _summary(results: Sequence[Result]) -> list[str]:
    """Lines for a person: how many succeeded, failed by status, could not be reached by kind; with
    folded names.
    """
    groups: dict[str, list[str]] = {}
    for result in results:
        groups.setdefault(result.outcome, []).append(result.name)
    ok, interrupted = len(groups.pop("ok", ())), len(groups.get("interrupted", ()))
    unreached = sum(not result.reached for result in results)
    counts = {
        "failed": len(results) - ok - unreached - interrupted,
        "not reached or lost": unreached,
        "interrupted": interrupted,
    }
    parts = [f"{ok} ok", *(f"{count} {what}" for what, count in counts.items() if count)]
    lines = [_screen.paint(", ".join(parts), "32" if ok == len(results) else "31")]
    lines += [
        f"  {outcome}: {fold_names(names)} ({len(names)})"
        for outcome, names in sorted(groups.items())
    ]
    if lost := [result.name for result in results if result.may_run]:
        lines.append(f"  the command may still be running on: {fold_names(lost)}")
    return lines


_LAST_RUN = "~/.apssh/last"
_LAST = (
    "ok",
    "failed",
    "all",
    "interrupted",
    "dns",
    "refused",
    "timeout",
    "hostkey",
    "auth",
    "lost",
    "local",
)


def _save_last(results: Sequence[Result]) -> None:
    """~/.apssh/last: names and outcomes of this run, for ``-t @last:failed``; private, replaced at
    once.
    """
    path = Path(_LAST_RUN).expanduser()
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        _write_whole(
            path,
            json.dumps(
                [{"target": result.target, "outcome": result.outcome} for result in results]
            ),
        )
    except OSError as exc:
        _screen.say(f"apssh: {path}: {_reason(exc)}")


def _load_last(selector: str) -> list[str]:
    """The targets of the last run with this outcome: ok, failed, a kind (timeout, auth...), rc=N,
    or signal=NAME. Raises UsageError.
    """
    name, equals, value = selector.partition("=")
    if name not in (_LAST if not equals else ("rc", "signal")) or (equals and not value):
        raise UsageError(
            f"@last{':' * bool(selector)}{_brief(selector)}: write @last: and one of {', '.join(_LAST)}, rc=N, signal=NAME"
        )
    path = Path(_LAST_RUN).expanduser()
    try:
        entries = [(entry["target"], entry["outcome"]) for entry in json.loads(path.read_text())]
    except FileNotFoundError:
        raise UsageError(f"@last: there is no {path} yet") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"@last: {path} is not readable") from None
    wanted = (
        f"status {value}"
        if name == "rc"
        else f"signal {value.removeprefix('SIG')}"
        if name == "signal"
        else selector
    )
    found = [
        target
        for target, outcome in entries
        if outcome == wanted or selector == "all" or (selector == "failed" and outcome != "ok")
    ]
    if not found:
        raise UsageError(f"@last:{_brief(selector)}: no host of the last run")
    return found


# --------------------------------------------------------------------------------------------------
# demo: a fleet of throw-away hosts in this process, to try anything with no machine at hand
# --------------------------------------------------------------------------------------------------


class _DemoSftp(asyncssh.SFTPServer):
    """Relative paths start at the home of the demo host."""

    def __init__(self, home: str, chan: asyncssh.SSHServerChannel[bytes]) -> None:
        super().__init__(chan)
        self._home = os.fsencode(home)

    def map_path(self, path: bytes) -> bytes:
        return os.path.join(self._home, path)


class _DemoServer(asyncssh.SSHServer):
    """Lets the one key in, and forwards to other demo hosts (so that one can be the gateway of
    another).
    """

    ports: ClassVar[set[int]] = set()

    def connection_requested(
        self, dest_host: str, dest_port: int, orig_host: str, orig_port: int
    ) -> bool:
        return dest_host == "127.0.0.1" and dest_port in self.ports


async def _demo_session(
    home: str, children: set[asyncio.subprocess.Process], process: asyncssh.SSHServerProcess[bytes]
) -> None:
    """One command, by the shell of whoever runs the demo, in the home of the demo host."""
    shell = os.environ.get("SHELL") or "/bin/sh"
    keep = {
        name: value
        for name, value in os.environ.items()
        if name in ("PATH", "LANG", "LC_ALL", "TZ", "TMPDIR")
    }
    child = await asyncio.create_subprocess_exec(
        shell,
        "-c",
        process.command or shell,
        cwd=home,
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=keep
        | {"HOME": home, "SHELL": shell, "USER": getpass.getuser(), "LOGNAME": getpass.getuser()},
    )
    assert child.stdin and child.stdout and child.stderr
    children.add(child)

    async def pump(reader: Any, writer: Any) -> None:
        with contextlib.suppress(OSError, asyncssh.Error):  # the other side has gone
            while data := await reader.read(SESSION_WINDOW):
                writer.write(data)
                await writer.drain()

    feeding = asyncio.create_task(pump(process.stdin, child.stdin))
    feeding.add_done_callback(lambda task: cast("asyncio.StreamWriter", child.stdin).close())
    try:
        await asyncio.gather(pump(child.stdout, process.stdout), pump(child.stderr, process.stderr))
        status = await child.wait()
        if status >= 0:
            process.exit(status)
        else:
            process.exit_with_signal(signal.Signals(-status).name.removeprefix("SIG"))
    finally:
        children.discard(child)
        feeding.cancel()


@contextlib.asynccontextmanager
async def demo_fleet(
    count: int = 3, *, formatter: Formatter | None = None
) -> AsyncIterator[list[SshNode]]:
    """``count`` hosts inside this process: real ssh servers on the loopback, each with a temporary
    home, gone at the end.

    They accept one key, made for this fleet, and nobody else's. Gives their SshNodes, ``demo1`` and
    on.
    """
    if not 0 < count <= 1000:
        raise UsageError(f"a demo has from 1 to 1000 hosts, not {count}")
    key, host_key = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(2))
    allowed = asyncssh.import_authorized_keys(key.export_public_key().decode())
    formatter = formatter or HostFormatter()
    servers: list[asyncssh.SSHAcceptor] = []
    children: set[asyncio.subprocess.Process] = set()
    nodes: list[SshNode] = []
    with tempfile.TemporaryDirectory(prefix="apssh-demo-", ignore_cleanup_errors=True) as homes:
        try:
            for number in range(1, count + 1):
                home = os.path.join(homes, f"demo{number}")
                os.mkdir(home, 0o700)
                server = await asyncssh.create_server(
                    _DemoServer,
                    "127.0.0.1",
                    0,
                    server_host_keys=[host_key],
                    authorized_client_keys=allowed,
                    encoding=None,
                    process_factory=functools.partial(_demo_session, home, children),
                    sftp_factory=functools.partial(_DemoSftp, home),
                )
                servers.append(server)
                _DemoServer.ports.add(server.get_port())
                nodes.append(
                    SshNode(
                        f"demo{number}",
                        username=getpass.getuser(),
                        keys=[key],
                        known_hosts=[host_key],
                        address="127.0.0.1",
                        port=server.get_port(),
                        formatter=formatter,
                    )
                )
            yield nodes
        finally:
            for node in nodes:
                await node.close()
            for child in children:  # what ran without the guard
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
            for server in servers:
                _DemoServer.ports.discard(server.get_port())
                server.close()
            await asyncio.gather(*(server.wait_closed() for server in servers))


# --------------------------------------------------------------------------------------------------
# programs: apssh, appush and appull
# --------------------------------------------------------------------------------------------------


class _ScreenHandler(logging.Handler):
    """The ssh library's log as lines of ours: it quotes hosts, and must not run into the line of
    progress.
    """

    def emit(self, record: logging.LogRecord) -> None:
        _screen.say(escape(self.format(record)))


class _Parser(argparse.ArgumentParser):
    """argparse, with what the three programs share, and hints in place of guesses."""

    def __init__(self, usage: str, description: str, *examples: str) -> None:
        super().__init__(
            usage.split()[0],
            usage=usage,
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog="\n  ".join(["examples:", *examples]),
        )
        _add_target_options(self)

    def error(self, message: str) -> Any:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def unknown(self, word: str) -> UsageError:
        """What to say of an option that does not exist."""
        options, name = (
            [option for option in self._option_string_actions if option.startswith("--")],
            word.split("=")[0],
        )
        near = (
            [_OTHER_TOOLS[name]]
            if name in _OTHER_TOOLS
            else difflib.get_close_matches(name, options, 1)
        )
        return UsageError(
            f"unknown option {escape(word)}"
            + (f": did you mean {near[0]}?" if near else f" (see {self.prog} --help)")
        )


_OTHER_TOOLS = {  # what pssh, pdsh, clush and ssh call it
    "--user": "--login",
    "--username": "--login",
    "--host": "--target",
    "--hosts": "--target",
    "--hostfile": "--target",
    "--par": "--window",
    "--parallel": "--window",
    "--fanout": "--window",
    "--timeout": "--command-timeout",
    "--outdir": "--out-dir",
    "--identity": "--key",
}


def _number(kind: type[int] | type[float], least: float, what: str) -> Callable[[str], Any]:
    """An option's number, with a message that says which it must be."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if least <= (value := kind(text)) < 1e9:
                return value
        raise argparse.ArgumentTypeError(f"{text!r}: {what}")

    return parse


def _window(text: str) -> int:
    if re.search(r"[^\d-]", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of hosts; use -t for targets")
    return cast("int", _number(int, 0, "a number of hosts, 0 for no limit")(text))


def _format(text: str) -> str:
    if text.isdigit():
        raise argparse.ArgumentTypeError(
            f"{text!r} is no format; use -w for the number of hosts at once"
        )
    try:
        Formatter(text)
    except UsageError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None
    return text


def _add_target_options(parser: argparse.ArgumentParser) -> None:
    """What the three programs share: targets, login, limits."""
    seconds = _number(float, 0.001, "seconds, more than 0")
    add = parser.add_argument_group("targets").add_argument
    add(
        "-t",
        "--target",
        action="append",
        default=[],
        metavar="T",
        help="a host, user@host, host:port, [v6]:port, ranges node[01-20,25], hops gw->host; blanks and commas separate; an existing "
        "file holds targets, a folder's file names are targets; - is standard input; @last:failed is from the last run",
    )
    add(
        "-x",
        "--exclude",
        action="append",
        default=[],
        metavar="T",
        help="leave these out; same syntax, matching on the parts it names",
    )
    add(
        "-l",
        "--login",
        metavar="USER",
        help="user for hops that do not say (default: the ssh config's, else yours)",
    )
    add(
        "-g",
        "--gateway",
        metavar="T",
        help="go through this host, or chain of hosts; None->host goes direct in spite of it",
    )
    add(
        "-p",
        "--port",
        type=_number(int, 1, "a port from 1 to 65535"),
        metavar="N",
        help="port of final hosts that do not say",
    )
    add("-L", "--list-targets", action="store_true", help="show the targets and stop")
    add(
        "-n",
        "--dry-run",
        action="store_true",
        help="show what would be done, connect to nothing, and stop",
    )
    add(
        "--demo",
        type=_number(int, 1, "a number of hosts"),
        metavar="N",
        help="N throw-away hosts inside this process, in place of targets (or of a scenario's hosts)",
    )
    add = parser.add_argument_group("connecting").add_argument
    add(
        "-w",
        "--window",
        type=_window,
        default=0,
        metavar="N",
        help="at most N hosts at once (default 0: no limit)",
    )
    add(
        "-c",
        "--connect-timeout",
        type=seconds,
        metavar="S",
        help="seconds to be logged in, all hops included (default 30)",
    )
    add(
        "-u",
        "--command-timeout",
        type=seconds,
        metavar="S",
        help="seconds for the command, or the copy, on one host (default: no limit)",
    )
    add(
        "--retries",
        type=_number(int, 0, "a number, 0 or more"),
        default=0,
        metavar="N",
        help="try unreachable hosts N times more",
    )
    add(
        "-k",
        "--key",
        action="append",
        default=[],
        metavar="F",
        help="a private key; only these are used (default: the agent's, else ~/.ssh/id_*)",
    )
    add("-K", "--ok-if-no-key", action="store_true", help="go on without any key")
    add("-A", "--askpass", action="store_true", help="ask once for a password, tried on every host")
    add(
        "-F",
        "--ssh-config",
        metavar="F",
        help="another ssh config than ~/.ssh/config; none: no config",
    )
    add(
        "--host-keys",
        choices=("accept-new", "yes", "no"),
        metavar="P",
        help="accept-new (default: record hosts never seen, refuse changed keys), yes (refuse unknown hosts), no (check nothing)",
    )
    add("--forward-agent", action="store_true", help="let hosts use your agent, as ssh -A does")
    add(
        "--no-guard",
        action="store_true",
        help="for hosts without a POSIX shell: commands may outlive timeouts and interruptions",
    )
    add = parser.add_argument_group("showing").add_argument
    add("-q", "--quiet", action="store_true", help="no progress and no summary")
    add("-v", "--verbose", action="store_true", help="say what happens to connections and commands")
    add("-D", "--debug", action="store_true", help="the ssh library's own log too, on stderr")
    add(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="colour of messages (default auto; NO_COLOR is obeyed)",
    )
    add("--no-last", action="store_true", help="do not note the outcomes in ~/.apssh/last")
    add("-V", "--version", action="version", version=f"apssh {__version__}")


def build_parser() -> argparse.ArgumentParser:
    """The command line of apssh."""
    parser = _Parser(
        "apssh [options] command ...",
        "Run a command, or a local script, on many hosts at once.",
        "apssh -t node[01-20] uptime",
        "apssh -t 'gw->node1' -s check.sh --all",
        "apssh -t hosts.txt -b uname -r",
        "apssh -t @last:failed -l root -o out systemctl restart web",
        "apssh --demo 3 'echo hello; id -un'",
    )
    add = parser.add_argument_group("what runs").add_argument
    add(
        "-s",
        "--script",
        action="store_true",
        help="the first word is a local script; or the text of one, if there is no such file and it holds a blank",
    )
    add(
        "-i",
        "--includes",
        action="append",
        default=[],
        metavar="F",
        help="with -s: a local file that lands beside the script, as $(dirname $0)/F",
    )
    add(
        "-I",
        "--stdin",
        action="store_true",
        help="give standard input to every host (without it they get end of file)",
    )
    add("--pty", action="store_true", help="give the command a terminal, as ssh -t does")
    add(
        "--env",
        action="append",
        default=[],
        metavar="K=V",
        help="a variable for the command, whatever the server accepts",
    )
    add("-X", "--x11", action="store_true", help="forward the DISPLAY")
    add(
        "--scenario",
        metavar="F",
        help="run a YAML scenario (x.yaml, or x.yaml.j2 with --set), in place of targets and command",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="K=V",
        help="with --scenario: a variable of its Jinja2 template",
    )
    group = parser.add_argument_group("output")
    add = group.add_mutually_exclusive_group().add_argument
    add("-r", "--raw-format", action="store_true", help="what hosts print, and nothing else")
    add(
        "-tc",
        "--time-colon-format",
        action="store_true",
        help="each line after the time and the host",
    )
    add(
        "-f",
        "--format",
        type=_format,
        metavar="FMT",
        help="each line in this format: {time} {host} {fqdn} {user} {line} {linenl} {nl}, and strftime's %%H:%%M...",
    )
    add("-o", "--out-dir", metavar="D", help="files D/<host> and D/<host>.err; prints D")
    add(
        "-d",
        "--date-time",
        action="store_true",
        help="the same in a folder named after date and time; prints its name",
    )
    add(
        "-b",
        "--gather",
        action="store_true",
        help="hosts with the same output once, under folded names",
    )
    add("-j", "--json", action="store_true", help="one JSON object a host, a line each")
    add = group.add_argument
    add(
        "--diff",
        action="store_true",
        help="with -b: smaller groups as differences from the largest",
    )
    add(
        "-m",
        "--mark",
        action="store_true",
        help="with -o or -d: files 0ok/<host> or 1failed/<host> holding the status",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _build_copy_parser(usage: str, description: str, *examples: str) -> argparse.ArgumentParser:
    parser = _Parser(usage, description, *examples)
    add = parser.add_argument_group("copying").add_argument
    add("-r", "--recurse", action="store_true", help="copy folders too")
    add("--preserve", action="store_true", help="keep times too (mode bits are always kept)")
    add(
        "--inplace",
        action="store_true",
        help="write onto existing files themselves, where a rename cannot be",
    )
    parser.add_argument("paths", nargs="*", help=argparse.SUPPRESS)
    return parser


def build_push_parser() -> argparse.ArgumentParser:
    """The command line of appush."""
    return _build_copy_parser(
        "appush [options] local ... @:remote",
        "Copy local files to many hosts. {host}, {fqdn} and {user} may stand in any path.",
        "appush -t node[1-3] hosts @:/etc/hosts",
        "appush -t node[1-3] -r site @:",
        "appush -t hosts.txt 'keys/{host}' @:.ssh/id_ed25519",
    )


def build_pull_parser() -> argparse.ArgumentParser:
    """The command line of appull."""
    return _build_copy_parser(
        "appull [options] @:remote ... local",
        "Copy files from many hosts; {host} in the local path keeps them apart.",
        "appull -t node[1-3] @:/var/log/syslog 'logs/{host}'",
        "appull -t node[1-3] -r @:results 'results/{host}/'",
    )


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked against one another; raises UsageError."""
    plain = parser.prog == "apssh" or "--" in (
        sys.argv[1:] if argv is None else argv
    )  # the other way loses the --
    options, rest = (parser.parse_known_args if plain else parser.parse_known_intermixed_args)(argv)
    if rest:
        raise cast("_Parser", parser).unknown(rest[0])
    _screen.colour = options.color
    command = getattr(options, "command", [])
    if command and command[0] == "--":
        command.pop(0)
    elif command and command[0].startswith("-"):
        raise cast("_Parser", parser).unknown(command[0])
    if options.demo and (
        given := [
            name
            for name in (
                "target",
                "exclude",
                "login",
                "gateway",
                "port",
                "key",
                "askpass",
                "forward_agent",
                "pty",
            )
            if getattr(options, name, False)
        ]
    ):
        raise UsageError(
            f"--demo brings its own hosts: leave out --{' --'.join(given).replace('_', '-')}"
        )
    # now, when Ctrl-C still works while somebody types
    if not getattr(options, "scenario", None) and any(
        "-" in _words(text) for text in options.target + options.exclude
    ):
        if getattr(options, "stdin", False):
            raise UsageError("-t - and -I both take standard input: put the targets in a file")
        options.piped = sys.stdin.read()
    return options


def _targets(options: argparse.Namespace) -> list[Target]:
    for word in itertools.chain.from_iterable(
        map(_words, options.target if options.verbose else ())
    ):
        if found := _find(word):
            _screen.say(
                f"apssh: {escape(word)} is a {'folder' if os.path.isdir(found) else 'file'} here: what it holds are the targets"
            )
    parse = functools.partial(
        _parse_targets,
        options.target,
        login=options.login,
        gateway=options.gateway,
        port=options.port,
        stdin=lambda: str(options.piped),
        last=_load_last,
    )
    targets = parse(exclude=options.exclude)
    everything = len(parse()) if options.exclude else 0
    for text in options.exclude:  # a slip there would run where it must not
        with contextlib.suppress(UsageError):
            if len(parse(exclude=[text])) == everything:
                _screen.say(f"apssh: -x {escape(text)} excludes none of the targets")
    return targets


def _program(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    body: Callable[[argparse.Namespace], Coroutine[Any, Any, int]],
) -> int:
    """What surrounds each program: errors to exit codes, Ctrl-C, a closed pipe."""
    if (
        argv is None
        # a process of our own: to look for garbage in all that was imported, at the end too, takes
        # as long as to start
    ):
        gc.freeze()
        atexit.register(gc.freeze)
    for name in (
        "stdin",
        "stdout",
        "stderr",
    ):  # one that was closed when we were started is /dev/null, as for ssh
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    try:
        with asyncio.Runner(loop_factory=_Loop) as runner:
            options = _parse(parser, argv)
            logging.getLogger("asyncio").setLevel(
                logging.NOTSET if options.debug else logging.ERROR
            )  # it warns of what is lost, as we do
            if options.debug:
                logging.basicConfig(handlers=[_ScreenHandler()], format="%(name)s: %(message)s")
                logging.getLogger("asyncssh").setLevel(logging.DEBUG)
            return runner.run(_interruptible(body(options)))
    except SystemExit as exc:  # argparse: --help and --version
        return int(exc.code or 0)
    except ApsshError as exc:
        _screen.say(f"{parser.prog}: {exc}")
        return 2 if isinstance(exc, UsageError) else 1
    except KeyboardInterrupt:
        return 130
    except OSError as exc:
        if not isinstance(exc, BrokenPipeError):
            place = f"{escape(os.fsdecode(exc.filename))}: " if exc.filename else ""
            _screen.say(f"{parser.prog}: {place}{_reason(exc)}")
        with contextlib.suppress(OSError, AttributeError):
            os.dup2(
                os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
            )  # what is buffered goes nowhere
        return 1


async def _interruptible(work: Coroutine[Any, Any, int]) -> int:
    """Ctrl-C ends the work in order; a second one leaves at once."""
    task, loop = cast("asyncio.Task[int]", asyncio.current_task()), asyncio.get_running_loop()
    interrupted = False

    def interrupt(
        *_: object,
        # no handler of the loop's: that would wait for a terminal or a pipe that takes no more
        # output
    ) -> None:
        nonlocal interrupted
        if interrupted or task.done():
            os._exit(130)
        interrupted = True
        loop.call_soon_threadsafe(task.cancel)

    main = threading.current_thread() is threading.main_thread()
    before = {
        number: signal.signal(number, interrupt)
        for number in (signal.SIGINT, signal.SIGTERM)
        if main
    }
    try:
        return await work
    except asyncio.CancelledError:
        if not interrupted:
            raise
        return 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


async def _work(
    options: argparse.Namespace,
    formatter: Formatter,
    steps: _Steps,
    views: Sequence[Any] = (),
    check: Callable[[Sequence[SshNode]], None] = lambda nodes: None,
) -> int:
    """Nodes, fan-out, views, summary: the common body of the programs; or, with -n, what they would
    do.
    """
    async with contextlib.AsyncExitStack() as stack:
        if options.demo and options.dry_run:
            nodes = [
                SshNode(f"demo{number}", username=getpass.getuser(), formatter=formatter)
                for number in range(1, options.demo + 1)
            ]
        elif options.demo:
            nodes = await stack.enter_async_context(demo_fleet(options.demo, formatter=formatter))
        else:
            targets = _targets(options)
            _host_key_policy(
                "", options.host_keys, None
            )  # raises for a variable that means nothing
            keys = (
                load_private_keys(options.key, options.verbose)
                if options.key and not options.dry_run
                else []
            )  # Ctrl-C reaches a prompt
            nodes = await asyncio.to_thread(  # a Match exec may take its time
                _build_nodes,
                targets,
                formatter=formatter,
                config=options.ssh_config,
                connect_timeout=options.connect_timeout,
                keys=keys,
                password=_ask_secret("password")
                if options.askpass and not options.dry_run
                else None,
                host_keys=options.host_keys,
                guard=not options.no_guard,
                forward_agent=options.forward_agent,
                verbose=options.verbose,
            )
            configured = any(node._host_config.names_keys for node in nodes)
            if not (
                keys
                or options.ok_if_no_key
                or options.askpass
                or options.dry_run
                or configured
                or load_private_keys()
            ):
                raise UsageError(
                    "no key: give one with -k, load one into an agent, or use -A (password) or -K (go on without)"
                )
        check(nodes)
        if options.dry_run:
            for node in nodes:
                for command in steps(node):
                    _screen.write(
                        f"{_way(node)}: {escape(command._preview())}\n".encode(
                            "utf-8", "surrogateescape"
                        )
                    )
            return 0
        if isinstance(formatter, SubdirFormatter):  # now that all the rest is known to be right
            try:
                os.makedirs(formatter.run_name, exist_ok=True)
            except OSError as exc:
                raise UsageError(f"{escape(str(formatter.run_name))}: {_reason(exc)}") from None
        progress = _Progress(
            len(nodes), options.quiet or (getattr(options, "stdin", False) and sys.stdin.isatty())
        )
        results: list[Result] = []

        def done(result: Result) -> None:
            results.append(result)
            for view in (progress, *views):
                view.done(result)
            result.stdout_bytes = result.stderr_bytes = b""  # the views have what they need of it
            if (
                result.kind not in (None, "status", "signal")
                and result.error != "interrupted"
                and not getattr(options, "json", False)
            ):
                _screen.say(
                    _screen.paint(f"{escape(result.name)}: {result.kind}: {result.error}", "31")
                )

        try:
            await _fan_out(
                nodes,
                steps,
                window=options.window,
                retries=options.retries,
                started=progress.started,
                done=done,
            )
        finally:
            progress.finish()
            for view in views if not _screen.closed else ():
                getattr(view, "finish", lambda: None)()
            if (
                not options.quiet
                and not _screen.closed
                and (len(nodes) > 1 or any(not result.ok for result in results))
            ):
                for line in _summary(results):
                    _screen.say(line)
            if not options.no_last and not options.demo and not _screen.closed:
                _save_last(results)
            if isinstance(formatter, SubdirFormatter):
                _screen.write(os.fsencode(formatter.run_name) + b"\n")
        return 0 if all(result.ok for result in results) else 1


def _way(node: _Node) -> str:
    """A node in the syntax of targets."""
    hops = node._hops() if isinstance(node, SshNode) else [node]
    return "->".join(
        _endpoint_text(hop.hostname, hop.username, None if hop.port == 22 else hop.port)
        for hop in hops
    )


def _show_targets(options: argparse.Namespace) -> int:
    """-L: the targets, one a line."""
    targets = (
        [f"demo{number}" for number in range(1, options.demo + 1)]
        if options.demo
        else _targets(options)
    )
    _screen.write("".join(f"{target}\n" for target in targets).encode("utf-8", "surrogateescape"))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The program apssh; the exit code: 0 all succeeded, 1 otherwise, 2 misuse, 130 interrupted."""
    return _program(build_parser(), argv, _run_program)


async def _run_program(options: argparse.Namespace) -> int:
    if options.scenario:
        return await _run_scenario(options)
    if options.set:
        raise UsageError("--set goes with --scenario")
    if options.list_targets:
        return _show_targets(options)
    command = _command(options)
    formatter, views = _views(options)
    with (
        contextlib.closing(_Spool())
        if options.stdin and not options.dry_run
        else contextlib.nullcontext() as spool
    ):
        return await _work(options, formatter, lambda node: [command(spool)], views)


def _assignments(option: str, texts: Iterable[str]) -> dict[str, str]:
    """NAME=value, several times."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise UsageError(f"{option} {escape(text)}: write NAME=value")
        found[name] = value
    return found


async def _run_scenario(options: argparse.Namespace) -> int:
    """--scenario: a YAML file in place of targets and command; interrupted, its remote commands end
    with the loop.
    """
    unset = vars(build_parser().parse_args([]))
    if others := [
        name
        for name, value in unset.items()
        if getattr(options, name) != value and name not in _WITH_SCENARIO
    ]:
        named = " ".join(
            "the command" if name == "command" else f"--{name.replace('_', '-')}" for name in others
        )
        raise UsageError(f"--scenario brings its own hosts and commands: leave out {named}")
    env = _assignments("--set", options.set) or (
        {"": ""} if options.scenario.endswith(".j2") else {}
    )  # a .j2 is a template even so
    nodes, jobs, scheduler = YamlLoader(options.scenario).load_with_maps(env)
    if options.list_targets or options.dry_run:
        _show_scenario(nodes, jobs, scheduler, options.dry_run)
        return 0
    for node in nodes.values():
        node.host_keys = options.host_keys or getattr(node, "host_keys", None)
        node.formatter.add_endpoint(node._endpoint, options.verbose)
    hosts = [node for node in nodes.values() if isinstance(node, SshNode)]
    async with contextlib.AsyncExitStack() as stack:
        if options.demo:
            if options.demo < len(hosts):
                raise UsageError(
                    f"--demo {options.demo}: the scenario has {_count(len(hosts), 'host')}"
                )
            for node, other in zip(
                hosts, await stack.enter_async_context(demo_fleet(options.demo)), strict=False
            ):
                before = node._endpoint
                node._address, node.port, node.username = other._address, other.port, other.username
                node.keys, node.known_hosts = other.keys, other.known_hosts
                node.formatter.add_endpoint(node._endpoint, False, before)
        _screen.out = sys.stdout  # what asynciojobs prints is no output of hosts
        try:
            with (
                contextlib.suppress(Exception),
                contextlib.redirect_stdout(sys.stderr if options.verbose else io.StringIO()),
            ):
                await scheduler.co_run()
            await co_close_ssh_in_scheduler(scheduler)  # a critical job's failure is told below
        except asyncio.CancelledError:
            _conclude_scenario(options, jobs, interrupted=True)
            raise
        finally:
            _screen.out = None
    return 1 if _screen.closed else _conclude_scenario(options, jobs)


_WITH_SCENARIO = (
    "scenario",
    "set",
    "demo",
    "list_targets",
    "dry_run",
    "host_keys",
    "quiet",
    "verbose",
    "debug",
    "color",
    "no_last",
)


def _show_scenario(
    nodes: Mapping[str, Any], jobs: Mapping[str, SshJob], scheduler: Any, steps: bool
) -> None:
    """-L: the hosts; -n: every step, where it would run, and who captures what has no value yet."""
    lines = [] if steps else [_way(node) for node in nodes.values()]
    names = {id(job): name for name, job in jobs.items()}
    captured = {
        command.capture.varname: name
        for name, job in jobs.items()
        for command in job.commands
        if isinstance(command, _ShellCommand) and command.capture
    }
    for job in scheduler.topological_order() if steps else ():
        after = ", ".join(names[id(each)] for each in job.required)
        notes = (
            [f"after {after}"] * bool(after)
            + ["not critical"] * (not job.critical)
            + ["forever"] * bool(job.forever)
        )
        lines.append(
            f"{names[id(job)]}: {_way(job.node)}" + (f" ({', '.join(notes)})" if notes else "")
        )
        for command in job.commands:
            text = command._preview()
            lines += [f"    [{command.label}]"] * bool(command.label) + [
                f"    {line}" for line in text.splitlines()
            ]
            for name in dict.fromkeys(re.findall(Deferred._PLAIN, text)):
                lines.append(
                    f"      {{{{{name}}}}}: "
                    + (
                        f"captured by {captured[name]}"
                        if name in captured
                        else "NO STEP CAPTURES IT"
                    )
                )
    _screen.write("".join(f"{escape(line)}\n" for line in lines).encode("utf-8", "surrogateescape"))


def _conclude_scenario(
    options: argparse.Namespace, jobs: Mapping[str, SshJob], interrupted: bool = False
) -> int:
    """What became of the jobs; the exit code."""
    states: dict[str, list[str]] = {}
    renamed = {"idle": "never ran", "waiting": "never ran"}
    renamed |= {"running": "interrupted", "cancelled": "interrupted"} if interrupted else {}
    for name, job in jobs.items():
        state, error = _job_state(job)
        states.setdefault(renamed.get(state, state), []).append(name)
        if state == "failed":
            _screen.say(_screen.paint(f"{escape(name)}: {escape(error or state)}", "31"))
    ok = all(
        jobs[name].forever for state, members in states.items() if state != "ok" for name in members
    )
    if not options.quiet:
        _screen.say(
            _screen.paint(
                ", ".join(f"{len(members)} {state}" for state, members in states.items()),
                "32" if ok else "31",
            )
        )
    return 0 if ok else 1


def _command(options: argparse.Namespace) -> Callable[[Any], _ShellCommand]:
    """What the command line asks to run, as a function of each host's standard input; checked on
    this machine.
    """
    words = options.command
    if not words or not any(word.strip() for word in words):
        raise UsageError("no command: apssh [options] command ...")
    common = {
        "timeout": options.command_timeout,
        "env": _assignments("--env", options.env),
        "pty": options.pty,
        "x11": options.x11,
    }
    if options.includes and not options.script:
        raise UsageError("-i goes with -s")
    if options.pty and options.stdin:
        raise UsageError("--pty and -I: a terminal has no end of file: leave one out")
    if options.x11 and not os.environ.get("DISPLAY"):
        raise UsageError("-X: no DISPLAY here to forward to")
    make: Callable[..., _ShellCommand] = Run
    if options.script:
        make = (
            RunScript if os.path.isfile(words[0]) or not re.search(r"\s", words[0]) else RunString
        )
        common["includes"] = options.includes
        make(*words, **common)._check()
    return lambda spool: make(*words, stdin=spool.read() if spool else None, **common)


class _Spool:
    """Standard input for many hosts, each at its own pace: read once, as fast as the fastest host
    wants it, kept in a temporary file.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the run
        self._size = 0
        self._ended = False
        self._reading: asyncio.Task[None] | None = None

    async def read(self) -> AsyncIterator[bytes]:
        """All of it, for one host."""
        position = 0
        while True:
            while position == self._size and not self._ended:
                self._reading = self._reading or asyncio.create_task(self._more())
                await asyncio.shield(self._reading)  # what one host waited for is the others' too
            data = os.pread(self._file.fileno(), SESSION_WINDOW, position)
            if not data:
                return
            position += len(data)
            yield data

    def close(self) -> None:
        """Forget it all."""
        self._file.close()

    async def _more(self) -> None:
        """Read once more."""
        try:
            data = await _in_daemon(os.read, 0, SESSION_WINDOW)
            self._ended = not data
            self._size += os.pwrite(self._file.fileno(), data, self._size)
        finally:
            self._reading = None


def _views(options: argparse.Namespace) -> tuple[Formatter, list[Any]]:
    """The formatter that the nodes print to, and the other views."""
    folder = options.out_dir or (
        datetime.datetime.now().strftime("%Y-%m-%d@%H:%M:%S") if options.date_time else None
    )
    if options.mark and not folder:
        raise UsageError("-m goes with -o or -d")
    if options.diff and not options.gather:
        raise UsageError("--diff goes with -b")
    if folder:
        return SubdirFormatter(folder, options.verbose), [_Marks(Path(folder))] * options.mark
    if options.gather or options.json:
        return _HoldingFormatter(options.verbose), [
            _Gather(options.diff) if options.gather else _JsonLines()
        ]
    if options.format is not None:
        return TerminalFormatter(options.format, options.verbose), []
    kind = (
        RawFormatter
        if options.raw_format
        else TimeHostFormatter
        if options.time_colon_format
        else HostFormatter
    )
    return kind(verbose=options.verbose), []


def main_push(argv: Sequence[str] | None = None) -> int:
    """The program appush; exit codes as main."""
    return _program(build_push_parser(), argv, functools.partial(_copy_program, True))


def main_pull(argv: Sequence[str] | None = None) -> int:
    """The program appull; exit codes as main."""
    return _program(build_pull_parser(), argv, functools.partial(_copy_program, False))


async def _copy_program(pushing: bool, options: argparse.Namespace) -> int:
    if options.list_targets:
        return _show_targets(options)
    *sources, destination = _copy_paths(pushing, options.paths)
    copying = {
        "recurse": options.recurse,
        "preserve": options.preserve,
        "inplace": options.inplace,
        "timeout": options.command_timeout,
    }
    steps, check = _copies(
        Push if pushing else Pull,
        sources if len(sources) > 1 else sources[0],
        destination,
        copying,
        options.dry_run,
    )
    return await _work(options, HostFormatter(verbose=options.verbose), steps, check=check)


def _copy_paths(pushing: bool, paths: list[str]) -> list[str]:
    """The sources, then the destination, ``@:`` taken off the remote ones; which must all be on
    their side.
    """
    usage = (
        "appush [options] local ... @:remote" if pushing else "appull [options] @:remote ... local"
    )
    if len(paths) < 2:
        raise UsageError(f"from what to what? {usage}")
    for index, path in enumerate(paths):
        remote = (index == len(paths) - 1) == pushing
        if path.startswith("@:") != remote:
            raise UsageError(
                f"{escape(path)}: a {'remote path is written @:path' if remote else 'local path has no @: in front'}: {usage}"
            )
        if not path:
            raise UsageError(f"an empty path: {usage}")
    return [path.removeprefix("@:") or "." for path in paths]


# Published scripts import from submodules of the older package (``from apssh.formatters import
# TimeHostFormatter``): answered as the standard library's os answers os.path, by names for this
# module.
SshProxy = SshNode
if __name__ != "__main__":
    for _name in (
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
        sys.modules[f"{__name__}.{_name}"] = globals()[_name] = sys.modules[__name__]


if __name__ == "__main__":  # as the program that this file is called by
    sys.exit({"appush": main_push, "appull": main_pull}.get(Path(sys.argv[0]).stem, main)())
