# SPDX-License-Identifier: MIT - Copyright (c) 2026 the apssh authors -
# https://spdx.org/licenses/MIT.html
# PYTHON_ARGCOMPLETE_OK
"""apssh: run commands, scripts and copies on many hosts at once, over ssh, from one Python file.

    apssh  [options] command ...               run a command, or a local script (-s), everywhere
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

The rooms of this file, each of which uses only those above it:

    errors        one root, ApsshError; each kind keeps its data and says it in one line
    text          host names, ranges and folding, quoting, reasons, keywords: pure functions
    formatters    where output goes: events and bytes in, lines out; the one screen
    credentials   keys and agent, known hosts and their policy, what ssh -G says of a host
    values        Variables, Capture, Deferred; the record of a step
    transfers     copies: one walk and one file engine for both directions and for this machine
    nodes         connections, sessions and their guard, sudo; SshNode, LocalNode
    commands      the steps: Run, RunScript, RunString, Push, Pull, Wait
    jobs          SshJob, closing, topology, records, timelines, experiment
    services      Service: units of the remote systemd
    scenarios     YamlLoader
    targets       what -t and -x name, groups, frozen Target values
    fan-out       steps on many nodes within limits: run, push, pull stand on it
    views         what the programs show of a fan-out: marks, gather, JSON, progress, summary
    demo          a throw-away fleet inside this process
    programs      options, and the mains of apssh, appush and appull
"""

from __future__ import annotations

import gc
import os
import signal
import sys

# While a program imports what it needs, Ctrl-C ends it without a traceback, and nothing looks for
# garbage, of which there is none yet: that is a tenth of the start. A program is known by its name:
# for whoever else imports this module all stays as it is. (Python's own start, before this line, is
# in nobody's hands.)
if (
    __name__ == "__main__" or os.path.basename(sys.argv[0]) in ("apssh", "appush", "appull")
) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.disable()
    _starting = True
else:
    _starting = False

import argparse
import asyncio
import atexit
import base64
import collections
import contextlib
import contextvars
import copy
import dataclasses
import datetime
import difflib
import enum
import errno
import fcntl
import fnmatch
import functools
import getpass
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
import posixpath
import pwd
import random
import re
import resource
import shlex
import shutil
import socket
import stat
import subprocess
import tempfile
import termios
import textwrap
import threading
import time
import traceback
import tty
import types
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
    MutableMapping,
    Sequence,
)
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import (
    IO,
    Annotated,
    Any,
    BinaryIO,
    ClassVar,
    NamedTuple,
    NoReturn,
    ParamSpec,
    Protocol,
    Self,
    TextIO,
    TypeAlias,
    TypedDict,
    TypeVar,
    Union,
    Unpack,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

import asynciojobs
import asyncssh

__version__ = "1.1.0"

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
    "Wait",
    "YamlLoader",
    "close_ssh_in_scheduler",
    "co_close_ssh_in_scheduler",
    "co_pull",
    "co_push",
    "co_run",
    "demo_fleet",
    "escape",
    "experiment",
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

# connecting

# seconds to a ready connection, all hops included: twice what a loaded host takes
CONNECT_TIMEOUT = 30.0
# seconds; a frozen peer is found in 27 s, below the 30 s that people wait
KEEPALIVE_INTERVAL = 9.0
KEEPALIVE_COUNT = 2
# key exchanges at once: each is 3 ms of this thread, so the last one waits 0.4 s; distant hosts
# need many
HANDSHAKES = 128
# seconds that a host may hold one of these: those who stall do not keep the others waiting
HANDSHAKE_TURN = 0.5
CONNECTS = 1024  # TCP connects at once; they cost nothing but a descriptor
LOOKUPS = 64  # host names asked for at once, a thread each
STARTUPS_PER_HOST = 8  # logins at once on one endpoint: MaxStartups drops at random from 10 on
RETRIES_BEFORE_LOGIN = 6  # when sshd drops us before login: 0.2 s, then twice as long each time
# connections spent on offering keys, when a server takes only a few on each (MaxAuthTries)
MAX_AUTH_ROUNDS = 8
KEY_LOADS = 16  # sets of keys loaded at once, a thread each
AGENT_TIMEOUT = 5.0  # seconds that an agent may take to list its keys
CLOSE_TIMEOUT = 2.0  # seconds that a polite close may take before the connection is cut

# commands

SESSIONS_PER_CONNECTION = 10  # sshd's MaxSessions default
CONNECTIONS_PER_NODE = 8  # that one node may open to run more sessions than that at once
GUARD_TIMEOUT = 2.6  # seconds until the guard has ended a command: 2 from TERM to KILL, and the way
SUDO_SAYS = 128 * 1024  # bytes kept of sudo: one that refuses a command quotes it (execve(2))
# bytes in flight for a command's output: costs no speed and bounds memory
SESSION_WINDOW = 128 * 1024
LINE_LIMIT = 1024 * 1024  # bytes; a longer line is cut, so that memory stays bounded
# bytes of one command's output that are held (captures, gather, JSON, results)
CAPTURE_LIMIT = 256 * 1024 * 1024
REMOTE_FOLDER = ".apssh-remote"

# what is read

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
_P = ParamSpec("_P")
StrPath = str | os.PathLike[str]


class Endpoint(NamedTuple):
    """What tells two nodes apart in columns and file names; ``way``: the gateways, as a target
    names them.
    """

    user: str
    host: str
    port: int
    way: str = ""


# --------------------------------------------------------------------------------------------------
# errors: one root, one line each, and the data they are about
# --------------------------------------------------------------------------------------------------


class ApsshError(Exception):
    """The root of all that apssh raises.

    Attributes: ``message`` (the cause, one line); ``host`` (empty when no host is concerned);
    ``kind``: dns, refused, timeout, hostkey, auth, lost, signal, status, interrupted, remote (a
    file or a limit over there) or local (on this machine); ``command``; ``label`` (of the step, if
    it has one); ``status`` (exit status, or the signal's name; None when there is none);
    ``failures`` (of a copy: each path with its reason, a line each, up to 1,000).
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
        failures: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.host = host
        self.command = command
        self.label = label
        self.status = status
        self.failures = tuple(failures)
        if kind:
            self.kind = kind

    def __str__(self) -> str:
        before = [escape(self.host), self.kind] if self.host else []
        if self.label:
            before.append(escape(self.label))
        return ": ".join([*before, self.message])


class UsageError(ApsshError, ValueError):
    """Something cannot mean anything: raised before anything runs, the remedy in its message."""


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
    """A command ended with a status that is no success, or by a signal, or had to be ended:
    ``kind`` is status, signal or timeout. The text names the step's label, if it has one.
    """

    kind = "status"


class TransferError(ApsshError):
    """Files could not be copied, or SFTP is not there; ``kind`` is the side: local, or remote.

    The message names the first few paths, each with its reason, and counts the others;
    ``failures`` has all of them.
    """


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
# nor what -o and -m give to other things, HOST.err, 0ok and 1failed
_NOT_IN_FILE_NAME = rf"^$|^[-.]|^(?=(?:0ok|1failed)$)|[\t/~{_CONTROLS}]|\.(?=err$)"


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
    fixed = re.sub(r"\[[^][]*+\]", "#", text)
    if re.search(r"[][]", fixed):
        raise UsageError("brackets must be closed and not nested, as in node[01-20,25]")
    if len(fixed) > MAX_TARGET_TEXT:
        raise UsageError("too long for a target")
    names = [""]
    for index, piece in enumerate(re.split(r"\[([^][:]*+)\]", text)):
        parts = _expand_numbers(piece, MAX_TARGETS // len(names)) if index % 2 else [piece]
        names = list(map("".join, itertools.product(names, parts)))
    return names


_NUMBERS = r"([0-9]{1,18})(?:-([0-9]{1,18})(?:/([1-9][0-9]{0,17}))?)?"


def _expand_numbers(listed: str, most: int) -> list[str]:
    numbers: list[str] = []
    for item in listed.split(","):
        match = re.fullmatch(_NUMBERS, item)
        first, last, step = match.groups() if match else ("1", "0", "1")
        found = range(int(first), int(last or first) + 1, int(step or 1))
        if not found:
            raise UsageError(f"'{_brief(item)}' is not a number or a range such as 01-20")
        if len(found) > most - len(numbers):
            raise UsageError(f"more than {MAX_TARGETS} names")
        numbers += [str(number).zfill(len(first)) for number in found]
    return numbers


_Row = tuple[str, ...]  # a name: text, number, text, ..., text


def fold_names(names: Iterable[str]) -> str:
    """The names sorted, each once, in target syntax: ``node[01-03,07],web``; IPv6 addresses stand
    as they are.
    """
    rows = sorted(
        map(_cut_at_numbers, set(names)),
        key=lambda row: (row[::2], [(len(digits), digits) for digits in row[1::2]]),
    )
    # from the last number on, so that racks [1-2] of nodes [1-30] come out; a row without a number
    # at this place stays as it is
    for place in reversed(range(1, max(map(len, rows), default=0), 2)):
        alike: dict[tuple[_Row, _Row], list[str]] = collections.defaultdict(list)
        for row in rows:
            alike[row[:place], row[place + 1 :]].extend(row[place : place + 1])
        rows = [(*left, _fold_numbers(numbers), *right) for (left, right), numbers in alike.items()]
    return ",".join(map("".join, rows))


def _cut_at_numbers(name: str) -> _Row:
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


# What may be said of an endpoint besides its short name, the shortest first. An IP address has no
# shorter one.
_NAME_FORMS = (
    "",
    "domain",
    "user",
    "port",
    "user domain",
    "domain port",
    "user port",
    "user domain port",
    "way",
    "way user domain port",
)


def _file_name(endpoint: Endpoint, form: str) -> str:
    """The name of an endpoint in this form, as one visible file name; ``~`` is kept for numbers."""
    user, host, port, way = endpoint
    if "domain" not in form and not _is_address(host):
        host = host.partition(".")[0]
    text = str(Hop(host, user if "user" in form else None, port if "port" in form else None))
    if way and "way" in form:
        text = f"{way}->{text}"
    return re.sub(_NOT_IN_FILE_NAME, "_", text[:200])


def _name_endpoints(names: dict[Endpoint, str]) -> None:
    """Give each endpoint that has no name the shortest text that no other has, even where case is
    ignored. Hosts that differ by case alone are no others.
    """
    for form in _NAME_FORMS:
        texts = {each: name or _file_name(each, form) for each, name in names.items()}
        owners = collections.defaultdict(set)
        for endpoint, text in texts.items():
            owners[text.lower()].add(endpoint._replace(host=endpoint.host.lower()))
        for endpoint, text in texts.items():
            if len(owners[text.lower()]) == 1:
                names[endpoint] = text
    # those left differ by refused characters, by the case of a user, or far behind
    for number, (endpoint, text) in enumerate(texts.items(), 1):
        names[endpoint] = names[endpoint] or f"{text}~{number}"


def _write_whole(path: StrPath, text: str) -> None:
    """Replace a file at once, for its owner's eyes only; a link is followed, and what is no file
    (/dev/null) is written to.
    """
    place = Path(os.path.realpath(path))
    if place.exists() and not place.is_file():
        place.write_text(text, "utf-8")
        return
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".apssh-") as folder:
        whole = Path(folder, "whole")
        whole.touch(0o600)
        whole.write_text(text, "utf-8")
        whole.replace(place)


_HOST = r"(?!-)[\w-]{1,63}(\.[\w-]{1,63})*\.?|[0-9a-fA-F.]*:[0-9a-fA-F:.]*(%[\w.-]+)?"


def _is_host(text: str) -> bool:
    if len(text) > 253 or not re.fullmatch(_HOST, text):
        return False
    try:
        return ":" not in text or bool(ipaddress.IPv6Address(text))
    except ValueError:
        return False


# What OpenSSH takes since 9.6, less what would read as something else in a list of targets.
_USER = rf"(?![-@])[^\s{_CONTROLS}'\"`$;&<>|(){{}}\[\],#→]+(?<!\\)"


@dataclasses.dataclass(frozen=True, slots=True)
class Hop:
    """One host on the way; what is None is for the config to say, then for the defaults."""

    host: str
    user: str | None = None
    port: int | None = None

    def __str__(self) -> str:
        address = self.host
        if self.port is not None:
            host = f"[{self.host}]" if ":" in self.host else self.host
            address = f"{host}:{self.port}"
        return f"{self.user}@{address}" if self.user else address


# With more than one colon and no brackets it is an IPv6 address.
_HOP = r"(?s)(?:(.*)@)?(\[.*\]|[^:]*|.*:.*:.*)(?::([^:]*))?"


def _parse_hop(text: str, login: str | None = None, port: int | None = None) -> Hop:
    """One hop of a target; ``login`` and ``port`` are for what it does not say."""
    match = re.fullmatch(_HOP, text)
    assert match  # any text is, right or wrong
    user, host, digits = match.groups()
    if digits is not None:
        port = int(digits) if re.fullmatch("[0-9]{1,5}", digits) else 0
    if host.startswith("["):
        host = host[1:-1]
    hop = Hop(host, login if user is None else user, port)
    if problem := _problem(hop):
        raise UsageError(problem)
    return hop


def _problem(hop: Hop) -> str:
    """Why this can be no hop, or nothing."""
    if not isinstance(hop.host, str) or not hop.host:
        return "a host is missing"
    if re.fullmatch(r"\w[\w.-]*-", hop.host):
        return "no name ends in '-'; quote 'gw->host'"
    if hop.host.isdecimal():  # 10 would be 0.0.0.10
        return "a bare number is no host; an address is written whole, as 10.0.0.10"
    if not _is_host(hop.host):
        return f"'{_brief(hop.host)}' is not a host name or an address"
    if hop.user is not None and not re.fullmatch(_USER, hop.user):
        return f"'{_brief(hop.user)}' is not a user name"
    if hop.port is not None and hop.port not in range(1, 65536):
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


# One thing under the names that ssh, pssh, pdsh, clush, ansible and this library give it.
_SYNONYMS = (
    ("login", "username", "user"),
    ("target", "targets", "hostname", "host", "hosts", "hostfile"),
    ("window", "par", "parallel", "fanout", "forks"),
    ("command-timeout", "timeout"),
    ("out-dir", "outdir"),
    ("key", "keys", "identity"),
)


def _unknown_option(
    word: str, known: Iterable[str], otherwise: str, what: str = "option"
) -> UsageError:
    """The answer to an option, or a keyword, that there is not: the nearest one that there is, or
    another text: a far one would be worse than none.
    """
    name = word.partition("=")[0].lstrip("-")
    options = {option.lstrip("-"): option for option in known}
    near = [each for each in options if len(name) > 2 and name in each]
    near = difflib.get_close_matches(name, options, 1, 0.7) or near
    for names in _SYNONYMS:
        if name in names:
            near = [other for other in names if other in options] or near
    hint = f": did you mean {options[near[0]]}?" if near else otherwise
    return UsageError(f"unknown {what} {escape(word)}{hint}")


# Many public functions take the same keywords. Each is said once, in a TypedDict, with its type and
# default (``x11: Annotated[bool, False]``), and a function takes ``**keywords: Unpack[...]`` of it.
# Type checkers read that; help() and inspect.signature() see what is made of it here.


def _keywords_shown(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """The function, with each of its ``**keywords: Unpack[...]`` in its signature."""
    if "keywords" in function.__annotations__:
        signature = inspect.signature(function, eval_str=True)
        *shown, keywords = signature.parameters.values()
        (kind,) = get_args(keywords.annotation)
        for name, hint in get_type_hints(kind, include_extras=True).items():
            meant, default = get_args(hint) if get_origin(hint) is Annotated else (hint, None)
            each = inspect.Parameter(name, keywords.KEYWORD_ONLY, annotation=meant, default=default)
            shown.append(each)
        vars(function)["__signature__"] = signature.replace(parameters=shown)
    return function


def _keywords_checked(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """The function (or constructor), which gets the default of each keyword that is left out; one
    that it does not take raises UsageError.

    Python's own answer names the constructor that found it, which is often that of a class of which
    the user has never heard.
    """
    known = inspect.signature(_keywords_shown(function)).parameters
    defaults = {}
    for name, each in known.items():
        if each.kind is each.KEYWORD_ONLY and each.default is not each.empty:
            defaults[name] = each.default
    offered = [name for name in known if name != "self"]

    @functools.wraps(function)
    def checked(*args: _P.args, **keywords: _P.kwargs) -> _T:
        for name in keywords.keys() - known.keys():
            raise _unknown_option(name, offered, f": there is {', '.join(defaults or offered)}")
        return cast("Callable[..., _T]", function)(*args, **(defaults | keywords))

    return checked


def _part(keywords: Mapping[str, object], kind: type) -> dict[str, Any]:
    """Those of the keywords that a TypedDict names."""
    return {name: keywords[name] for name in kind.__annotations__}


# --------------------------------------------------------------------------------------------------
# formatters: events in, bytes out
# --------------------------------------------------------------------------------------------------


class _Screen:
    """Standard output and error, shared by all that writes to them, with at most one line of
    progress on a terminal.

    Attributes: ``colour`` (auto, always or never); ``quiet``: no word of what is no failure;
    ``out``: the standard output, while others' prints are sent elsewhere; ``closed``: nobody reads
    standard output any more.
    """

    def __init__(self) -> None:
        self.colour, self.quiet = "auto", False
        self.out: TextIO | None = None
        self.closed = False
        self._progress = ""
        self._shown = False
        self._mid_line = False  # what a host printed waits for its end: no progress there
        self._settings: list[Any] | None = None  # of the terminal, before raw mode
        self._asking = 0  # questions that wait for somebody to type: no progress there, either
        self._before_asking: list[Any] | None = None  # settings of the terminal
        self._broken_off = False  # one of them

    def write(self, data: bytes, *, err: bool = False, raw: bool = False) -> None:
        """Write at once; what a host sent has no power over a terminal, unless raw."""
        stream = self._stream(err)
        terminal = stream.isatty()
        if terminal and not raw:
            data = _escape_bytes(data)
            if self._settings:
                data = data.replace(b"\n", b"\r\n")
        self._draw("")
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

    def notice(self, text: str) -> None:
        """A word on stderr of what may not have been meant, unless quiet."""
        if not self.quiet:
            self.say(text)

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
        self._progress = progress
        self._draw("" if self._mid_line or self._asking else progress)

    def begin_raw_mode(self) -> None:
        """What is typed comes at once and as it is, Ctrl-C too, and nothing is added to what the
        terminal gets.
        """
        if not self._settings:
            self._settings = termios.tcgetattr(0)
            tty.setraw(0, termios.TCSANOW)

    def end_raw_mode(self) -> None:
        """The terminal is as it was before."""
        settings, self._settings = self._settings, None
        if settings:
            with contextlib.suppress(termios.error):  # it has gone
                termios.tcsetattr(0, termios.TCSANOW, settings)

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Somebody is asked on the terminal: no progress meanwhile. Where one of the questions
        that overlap is broken off, the terminal is in the end as it was before the first.
        """
        no_terminal = contextlib.suppress(OSError, termios.error)  # who asks says so
        if not self._asking:
            self._before_asking, self._broken_off = None, False
            with no_terminal, open("/dev/tty", "rb", 0) as terminal:
                self._before_asking = termios.tcgetattr(terminal)
        self.show("")
        self._asking += 1
        try:
            yield
        except asyncio.CancelledError:
            self._broken_off = True
            raise
        finally:
            self._asking -= 1
            if self._broken_off and self._before_asking and not self._asking:
                with no_terminal, open("/dev/tty", "rb", 0) as terminal:
                    if termios.tcgetattr(terminal) != self._before_asking:
                        termios.tcsetattr(terminal, termios.TCSANOW, self._before_asking)

    def _stream(self, err: bool) -> TextIO:
        if err:
            return sys.stderr
        return self.out or sys.stdout

    def _write_all(self, stream: TextIO, data: bytes) -> None:
        """Bytes as they are; an unbuffered stream (python -u) may take a part only."""
        binary: BinaryIO | None = getattr(stream, "buffer", None)
        stream.flush()
        if binary is None:  # a notebook, a StringIO
            stream.write(data.decode("utf-8", "replace"))
            return
        while data:
            data = data[binary.write(data) :]
        binary.flush()

    def _draw(self, line: str) -> None:
        """Replace the line of progress that is there, if one is."""
        if line or self._shown:
            wiped = "\r\x1b[K" if self._shown else ""
            sys.stderr.write(wiped + line[: shutil.get_terminal_size().columns - 1])
            sys.stderr.flush()
        self._shown = bool(line)


_screen = _Screen()


# The way of a host's output: a node asks its formatter for a sink (endpoint_sink), which a session
# gives what comes (data, end). The usual sink makes whole lines of it and hands them to the
# formatter (endpoint_lines); they go one by one through ``line`` where a user has redefined that,
# are put in the format (_render), and leave (_write): for the screen, a file, or a hold.


class _Sink(Protocol):
    """Where the two streams of one command go, in the order they arrive."""

    def data(self, data: bytes, datatype: int | None) -> None:
        """What came, of stdout (None) or stderr (EXTENDED_DATA_STDERR)."""

    def end(self) -> None:
        """Nothing more comes."""


class _LineSink:
    """The usual sink: whole lines, handed to a formatter; what is left of a stream, at most
    LINE_LIMIT bytes, waits for the end of its line.
    """

    def __init__(self, formatter: Formatter, endpoint: Endpoint) -> None:
        self._formatter, self._endpoint = formatter, endpoint
        self._rests = {None: bytearray(), EXTENDED_DATA_STDERR: bytearray()}

    def data(self, data: bytes, datatype: int | None) -> None:
        rest = self._rests[datatype]
        cut = data.rfind(b"\n") + 1
        if not cut and len(rest) < LINE_LIMIT:
            rest += data
            return
        lines = bytes(rest) + data[:cut]
        rest[:] = data[cut:]
        self._formatter.endpoint_lines(self._endpoint, lines, datatype)

    def end(self) -> None:
        for datatype, rest in self._rests.items():
            if rest:
                self._formatter.endpoint_lines(self._endpoint, bytes(rest), datatype)


class _HeldSink:
    """Holds what a command prints, up to CAPTURE_LIMIT. ``passed``, if there is one, sees stderr in
    its place, or (``both``) all of it too.
    """

    def __init__(self, passed: _Sink | None = None, *, both: bool = False) -> None:
        self._out, self._err = bytearray(), bytearray()
        self._passed, self._both = passed, both

    def data(self, data: bytes, datatype: int | None) -> None:
        if self._passed and (datatype or self._both):
            self._passed.data(data, datatype)
            if not self._both:
                return
        held = self._err if datatype else self._out
        held += data
        if len(self._out) + len(self._err) > CAPTURE_LIMIT:
            raise ApsshError(f"more than {CAPTURE_LIMIT // 1024**2} MiB of output to hold")

    def end(self) -> None:
        if self._passed:
            self._passed.end()

    def stdout(self) -> bytes:
        return bytes(self._out)

    def stderr(self) -> bytes:
        return bytes(self._err)


_FIELD = r"\{\w+\}"
_FIELDS = "{time} {host} {fqdn} {user} {line} {linenl} {nl}"

# SGR codes of the host column, of stdout and stderr: cyan and magenta are readable on dark and on
# light, differ for eyes that see no red or green, and leave red to failures
_HOST_COLOURS = ("36", "35")


@functools.lru_cache(10_000)
def _fill(form: str, host: str, fqdn: str, user: str) -> list[bytes]:
    """A format, cut where the line goes; its end is a newline, since lines of two hosts never share
    one.
    """
    values = {"{host}": host, "{fqdn}": fqdn, "{user}": f"{user}@" if user else "", "{nl}": "\n"}
    form = form.replace("{linenl}", "{line}{nl}")
    if not form.endswith(("{nl}", "\n")):
        form += "{nl}"
    form = re.sub(_FIELD, lambda match: values.get(match[0], match[0]), form)
    return os.fsencode(form).split(b"{line}")


class Formatter:
    """Shows what hosts print, and (with ``verbose``) what happens to connections.

    Subclasses may redefine ``line``, and any of the events; the methods whose names speak of
    endpoints are how nodes reach a formatter. ``custom_format`` is a template of
    strftime's fields and ``{time}`` (%H-%M-%S), ``{host}`` (short name), ``{fqdn}``, ``{user}``
    (``user@``), ``{line}``, ``{linenl}``, ``{nl}``; an unknown field raises UsageError. Text from a
    host is never read as a template.
    """

    custom_format = "{linenl}"
    # bytes as they are: no format, nothing escaped on a terminal, no newline added
    raw = False

    verbose = False
    # whether lines go to the screen, where host columns may be coloured
    _on_screen = True
    _name_width = _fqdn_width = 0
    _verbose_hosts: frozenset[str] = frozenset()

    # state that a subclass has even when its constructor does not call this one's

    @functools.cached_property
    def _names(self) -> dict[Endpoint, str]:
        """The endpoints that share this formatter, each with its name, once that is asked for."""
        return {}

    @functools.cached_property
    def _speakers(self) -> dict[str, Endpoint]:
        """Who is meant by a host, which is all that ``line`` is told: who spoke last."""
        return {}

    @_keywords_checked
    def __init__(self, custom_format: str | None = None, verbose: bool = False) -> None:
        self.verbose = verbose
        if custom_format is not None:
            self.custom_format = custom_format
        for field in re.findall(_FIELD, self.custom_format):
            if field not in _FIELDS:
                raise UsageError(
                    f"unknown field {field} in format {self.custom_format!r}: "
                    f"the fields are {_FIELDS}"
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
        endpoint = self._speakers.get(hostname, Endpoint("", hostname, 22))
        data = line.encode("utf-8", "surrogateescape")
        self._write(endpoint, self._render(endpoint, data, datatype), datatype)

    def stderr_line(self, line: str, hostname: str) -> None:
        """One line of apssh's own about a host."""
        self.line(line, EXTENDED_DATA_STDERR, hostname)

    # what nodes tell and ask

    def add_endpoint(
        self, endpoint: Endpoint, verbose: bool = False, before: Endpoint | None = None
    ) -> None:
        """A node that shares this formatter: names and columns are chosen among them. ``verbose``:
        its events are shown; ``before``: what this node was until now.
        """
        if verbose:
            self._verbose_hosts |= {endpoint.host}
        if before and before != endpoint:
            self._names.pop(before, None)
        self._names.setdefault(endpoint, "")
        self._speakers[endpoint.host] = endpoint

    def endpoint_name(self, endpoint: Endpoint) -> str:
        """The short name of an endpoint, which no other has; it stays once it was used."""
        if self._names.get(endpoint) == "":
            _name_endpoints(self._names)
            self._name_width = max(map(len, self._names.values()))
            self._fqdn_width = max(len(each.host) for each in self._names)
        return self._names.get(endpoint) or _file_name(endpoint, "domain")

    def endpoint_sink(self, endpoint: Endpoint) -> _Sink:
        """Where one command's output goes: by default whole lines, to this formatter."""
        return _LineSink(self, endpoint)

    def endpoint_started(self, endpoint: Endpoint) -> None:
        """A command is about to run there."""

    def endpoint_lines(self, endpoint: Endpoint, lines: bytes, datatype: int | None) -> None:
        """Whole lines of one stream; a subclass that redefines ``line`` gets them one by one. What
        has no end, the last one or a part of a long one, is given it.
        """
        if not (self.raw or lines.endswith(b"\n")):
            lines += b"\n"
        if type(self).line is Formatter.line:
            self._write(endpoint, self._render(endpoint, lines, datatype), datatype)
            return
        self._speakers[endpoint.host] = endpoint
        for line in io.BytesIO(lines):
            self.line(line.decode("utf-8", "surrogateescape"), datatype, endpoint.host)

    # inside

    def _event(self, hostname: str, text: str) -> None:
        if self.verbose or hostname in self._verbose_hosts:
            _screen.say(f"{escape(hostname)}: {escape(text)}")

    def _write(self, endpoint: Endpoint, data: bytes, datatype: int | None) -> None:
        """Rendered lines on their way out."""
        _screen.write(data, err=datatype is not None, raw=self.raw)

    # The format is filled once for each stream of a host (each second, where it tells the time),
    # and the lines of a chunk are put in by one ``replace``: a call a line would cost ten times
    # more. strftime sees nothing but the format, and fields are filled in before the lines are: no
    # text of a host is ever read as one. Columns are as wide as the endpoints of the moment want.
    def _render(self, endpoint: Endpoint, lines: bytes, datatype: int | None) -> bytes:
        """Each line put in the format."""
        if self.raw:
            return lines
        form = self.custom_format.replace("{time}", "%H-%M-%S")
        if "%" in form:
            form = time.strftime(form)
        name = self.endpoint_name(endpoint)
        columns = [name.ljust(self._name_width), endpoint.host.ljust(self._fqdn_width)]
        if self._on_screen:
            err = datatype is not None
            columns = [_screen.paint(each, _HOST_COLOURS[err], err=err) for each in columns]
        parts = _fill(form, *columns, endpoint.user)
        if len(parts) != 2:
            return b"".join(line.rstrip(b"\n").join(parts) for line in io.BytesIO(lines))
        head, tail = parts
        return head + lines.removesuffix(b"\n").replace(b"\n", tail + head) + tail


class TerminalFormatter(Formatter):
    """Stdout to stdout, stderr to stderr, in the format given (None: the lines alone)."""


class RawFormatter(Formatter):
    """What hosts print, and nothing else: bytes as they were sent (lines of several hosts are kept
    whole).
    """

    raw = True


class HostFormatter(Formatter):
    """Each line after the name of its host."""

    custom_format = "{host}:{linenl}"


class TimeHostFormatter(Formatter):
    """Each line after the time and the name of its host."""

    custom_format = "{time}:{host}:{linenl}"


class _LiveFormatter(HostFormatter):
    """What the one host of a run prints, as it comes, unfinished lines (a prompt) too: a sink that
    holds nothing. With several hosts it is a HostFormatter.
    """

    @property
    def has_one_host(self) -> bool:
        return len(self._names) == 1

    def endpoint_sink(self, endpoint: Endpoint) -> _Sink:
        return self if self.has_one_host else super().endpoint_sink(endpoint)

    def data(self, data: bytes, datatype: int | None) -> None:
        _screen.write(data, err=datatype is not None, raw=True)

    def end(self) -> None:
        """Nothing is left to show."""


# older names, in published tutorials
ColonFormatter = HostFormatter
TimeColonFormatter = TimeHostFormatter


class SubdirFormatter(Formatter):
    """Files instead of a terminal: ``<run_name>/<hostname>`` for stdout, ``<hostname>.err`` for
    stderr (if any).
    """

    _on_screen = False

    @_keywords_checked
    def __init__(self, run_name: StrPath, verbose: bool = False) -> None:
        super().__init__(None, verbose)
        self.run_name = Path(run_name)
        self._begun: set[Endpoint] = set()

    def endpoint_started(self, endpoint: Endpoint) -> None:
        """What an earlier run left of this host goes, links too, once."""
        if endpoint in self._begun:
            return
        self._begun.add(endpoint)
        self.run_name.mkdir(parents=True, exist_ok=True)
        for datatype in (None, EXTENDED_DATA_STDERR):
            self._path(endpoint, datatype).unlink(missing_ok=True)
        self._write(endpoint, b"", None)

    def _path(self, endpoint: Endpoint, datatype: int | None) -> Path:
        return self.run_name / (self.endpoint_name(endpoint) + (".err" if datatype else ""))

    def _write(self, endpoint: Endpoint, data: bytes, datatype: int | None) -> None:
        self.endpoint_started(endpoint)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        with open(os.open(self._path(endpoint, datatype), flags, 0o666), "ab") as file:
            file.write(data)


class CaptureFormatter(Formatter):
    """Holds stdout, at most CAPTURE_LIMIT bytes; stderr is shown. Captures from its creation."""

    _on_screen = False

    @functools.cached_property
    def _held(self) -> _HeldSink:
        return _HeldSink()

    def start_capture(self) -> None:
        """Forget what was captured so far."""
        self._held = _HeldSink()

    def get_capture(self) -> str:
        """What was printed on stdout since ``start_capture()`` (UTF-8, surrogateescape)."""
        return self._held.stdout().decode("utf-8", "surrogateescape")

    def _write(self, endpoint: Endpoint, data: bytes, datatype: int | None) -> None:
        if datatype:
            super()._write(endpoint, data, datatype)
        else:
            self._held.data(data, None)


# --------------------------------------------------------------------------------------------------
# credentials: keys, agent, passphrases; known hosts and their policy; what ssh -G says of a host
# --------------------------------------------------------------------------------------------------


class _KeyMemory:
    """What this process remembers of keys: in ``accepted`` the public halves of those that logged
    in, which are offered first to the next hosts; in ``given_up`` the files whose passphrase was
    not given, and why. While ``lock`` is held a passphrase is asked.
    """

    def __init__(self) -> None:
        self.accepted: set[bytes] = set()
        self.given_up: dict[bytes, str] = {}  # by what is in the file
        self.lock = threading.Lock()


_key_memory = _KeyMemory()


@functools.cache
def _say_once(text: str) -> None:
    """What is wrong with a key: keys are looked for again after each refused login."""
    _screen.notice(text)


@dataclasses.dataclass(frozen=True, eq=False)
class _AgentKey:
    """A key that an agent holds."""

    agent_path: str
    algorithm: bytes
    public_data: bytes = dataclasses.field(repr=False)

    def pair(self, agent: asyncssh.SSHAgentClient) -> asyncssh.SSHKeyPair:
        """To log in with: the agent is connected to when it must sign, and not before."""
        return asyncssh.SSHAgentKeyPair(agent, self.algorithm, self.public_data, b"")


_PlainKey = asyncssh.SSHKey | _AgentKey
Key = _PlainKey | asyncssh.SSHKeyPair | tuple[_PlainKey, asyncssh.SSHCertificate]


def _ask_secret(prompt: str) -> str:
    """Asked on the terminal itself, never on standard input. Raises UsageError where there is none,
    or no answer.
    """
    try:
        open("/dev/tty", "rb").close()
    except OSError:
        raise UsageError(f"no terminal to ask: {prompt}") from None
    try:
        return getpass.getpass(f"{prompt}: ")
    except EOFError:
        raise UsageError(f"no answer: {prompt}") from None


def import_private_key(filename: StrPath) -> asyncssh.SSHKey:
    """Load one private key; an encrypted one asks for its passphrase on the terminal, once for the
    whole run.

    Raises UsageError when the file is missing, unreadable or not a private key, when the passphrase
    is wrong three times, and when it is encrypted and there is no terminal.
    """
    _key_memory.given_up.clear()
    return _load_key(filename)


def _load_key(filename: StrPath) -> asyncssh.SSHKey:
    path = Path(filename).expanduser()
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise UsageError(f"key {escape(str(path))}: {_reason(exc)}") from None
    with _key_memory.lock:
        return _decode_key(path, data)


@functools.cache
def _decode_key(path: Path, data: bytes) -> asyncssh.SSHKey:
    """The key in the text of a file, with its passphrase if it needs one: asked once for a run, for
    what is given here is kept.
    """
    try:
        return asyncssh.import_private_key(data)
    except ValueError as exc:
        # asyncssh has one class for a key that is encrypted and for what is no key
        if not str(exc).startswith("Passphrase"):
            raise UsageError(f"key {path}: not a private key ({exc})") from None
    # keys are looked for again after each refused login, and nobody wants to be asked again
    if data in _key_memory.given_up:
        raise UsageError(_key_memory.given_up[data])
    try:
        for _ in range(3):
            secret = _ask_secret(f"passphrase for key {path}")
            with contextlib.suppress(ValueError):
                return asyncssh.import_private_key(data, secret)
        raise UsageError(f"key {path}: wrong passphrase")
    except UsageError as exc:
        _key_memory.given_up[data] = exc.message
        raise


@_keywords_checked
def load_agent_keys(agent_path: str | None = None) -> list[_AgentKey]:
    """The keys of the agent at this socket (default: SSH_AUTH_SOCK); none when there is no agent,
    or no answer within AGENT_TIMEOUT seconds. Works with or without a running loop.
    """
    path = agent_path or os.environ.get("SSH_AUTH_SOCK", "")

    async def load() -> list[_AgentKey]:
        async with asyncio.timeout(AGENT_TIMEOUT), asyncssh.connect_agent(path) as agent:
            pairs = await agent.get_keys()
        return [_AgentKey(path, pair.algorithm, pair.public_data) for pair in pairs]

    if not path:
        return []
    with contextlib.suppress(OSError, ValueError), ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, load()).result()
    return []


def _certified(keys: Iterable[Key], file: str | Path) -> list[Key]:
    """Those of these keys that the certificate in a file is about, with it."""
    certified: list[Key] = []
    with contextlib.suppress(OSError, ValueError):
        certificate = asyncssh.read_certificate(file)
        for key in keys:
            if isinstance(key, _PlainKey) and key.public_data == certificate.key.public_data:
                certified.append((key, certificate))
    return certified


# Which keys are offered to a host: SshNode._login_keys asks _keys_to_offer, once for all nodes that
# would get the same answer; load_private_keys is the same question of a host without a config. Each
# login then makes its own pairs of them (_login_pairs).


def _keys_of(named: StrPath | Key, held: Collection[_AgentKey]) -> list[Key]:
    """What is to be offered for a key, or for the name of a file: the key that the agent holds of
    it, else the file's, with the certificate beside it. Raises UsageError.

    The agent knows a key by its public half. That is in clear in an OpenSSH key file, though the
    key be encrypted (OpenSSH's PROTOCOL.key); for other forms it is in the ``.pub`` file.
    """
    if not isinstance(named, str | os.PathLike):
        return [named]
    path = Path(named).expanduser()
    data = b""
    for public in (Path(f"{path}.pub"), path):
        # a pipe, -k <(...), is read once
        if held and public.is_file():
            with contextlib.suppress(OSError, ValueError):
                data = asyncssh.read_public_key(public).public_data
    found: list[Key] = [key for key in held if key.public_data == data]
    if not found:
        found = [_load_key(path)]
    return [*_certified(found, f"{path}".removesuffix(".pub") + "-cert.pub"), *found]


def _usable_keys(files: Iterable[str], held: Collection[_AgentKey]) -> Iterator[Key]:
    """What the files of a config stand for; one that cannot be used is skipped, as ssh does."""
    for file in files:
        try:
            if file != "none":
                yield from _keys_of(file, held)
        except UsageError as exc:
            _say_once(f"skipped: {exc}")


def _keys_to_offer(
    named: Collection[StrPath | Key], config: _HostConfig
) -> tuple[list[Key], list[str]]:
    """The keys to offer to a host, and where else they were looked for: told when there are none.

    Those named, and only they; or what the host's config names and the agent holds, as ssh takes
    them; or the agent's, else those of the default files. Raises UsageError for a named one that
    cannot be used.
    """
    agent = config.identity_agent or os.environ.get("SSH_AUTH_SOCK")
    held: list[_AgentKey] = []
    if not named or any(isinstance(each, str | os.PathLike) for each in named):
        held = load_agent_keys(agent)
    keys: list[Key] = []
    for each in named:
        keys += _keys_of(each, held)
    if keys:
        return keys, []
    only = config.one("identitiesonly")
    if held and not (only or config.names_keys):
        return [*held], []
    files = config.paths("identityfile")
    default = filter(os.path.exists, map(os.path.expanduser, DEFAULT_KEYS))
    keys += _usable_keys(files or default, held)
    certified: list[Key] = []
    for file in config.paths("certificatefile"):
        certified += _certified([*keys, *held], file)
    if not only:
        keys += held
    looked = f"agent {agent}: {_count(len(held), 'key')}" if agent else "no SSH_AUTH_SOCK"
    return [*certified, *keys], [looked, f"no key in {', '.join(files or ['~/.ssh'])}"]


@_keywords_checked
def load_private_keys(
    command_line_keys: Collection[StrPath | Key] | None = None, verbose: bool = False
) -> list[Key]:
    """The keys to log in with: those named, and only they; else the agent's; else
    ~/.ssh/id_ed25519, id_ecdsa, id_rsa and their _sk forms, as far as they exist.

    A named key that the agent holds too is used through the agent; a certificate beside a key
    (``key-cert.pub``) goes with it. ``verbose`` says on stderr how many there are. Works with or
    without a running loop. Raises UsageError for a named key that does not exist or parse.
    """
    _key_memory.given_up.clear()
    keys, _ = _keys_to_offer(command_line_keys or (), _UNCONFIGURED)
    if verbose:
        _screen.say(f"{_count(len(keys), 'key')} to log in with")
    return keys


_OLD_RSA_CERTIFICATE = b"ssh-rsa-cert-v01@openssh.com"
_RSA_CERTIFICATE = b"rsa-sha2-512-cert-v01@openssh.com"


def _offers(pair: asyncssh.SSHKeyPair) -> list[asyncssh.SSHKeyPair]:
    """A key pair in the forms to offer it in: one, but for RSA certificates.

    Those have a name for each signature, which servers since OpenSSH 8.8 insist on, and an older
    one, the only one before 7.8. asyncssh begins with the older one, and tries the other when a
    further key follows: for the last key that never comes.
    """
    if pair.algorithm != _OLD_RSA_CERTIFICATE:
        return [pair]
    current = copy.copy(pair)
    current.algorithm = _RSA_CERTIFICATE
    current.sig_algorithms = (b"rsa-sha2-512",)
    current.set_sig_algorithm(b"rsa-sha2-512")
    return [current, pair]


@contextlib.asynccontextmanager
async def _login_pairs(keys: Iterable[Key]) -> AsyncIterator[list[asyncssh.SSHKeyPair]]:
    """Fresh key pairs for one login (asyncssh keeps a login's signature algorithm in them), those
    that have logged in elsewhere first. Agents that had to sign are left at the end.
    """
    agents: list[asyncssh.SSHAgentClient] = []
    pairs: dict[object, asyncssh.SSHKeyPair] = {}
    for key in keys:
        plain, certificate = key if isinstance(key, tuple) else (key, None)
        if isinstance(plain, _AgentKey):
            agents.append(asyncssh.SSHAgentClient(plain.agent_path))
            plain = plain.pair(agents[-1])
        # its annotations know of no certificate for a key pair
        for pair in asyncssh.load_keypairs(cast("Any", [(plain, certificate)])):
            for offer in _offers(copy.copy(pair)):
                pairs.setdefault((offer.algorithm, offer.public_data), offer)
    try:
        yield sorted(pairs.values(), key=lambda pair: pair.public_data not in _key_memory.accepted)
    finally:
        for agent in agents:
            agent.close()
            with contextlib.suppress(OSError):
                await agent.wait_closed()


# known hosts: sshd(8), "SSH_KNOWN_HOSTS FILE FORMAT"


class _KnownKey(NamedTuple):
    """One line of a known_hosts file."""

    marker: str | None  # @revoked or @cert-authority
    key: asyncssh.SSHKey
    file: str
    line: int

    def __str__(self) -> str:
        return f"{_fingerprint(self.key)} in {self.file}:{self.line}"


def _files_of_keys(lines: Iterable[_KnownKey], marker: str | None) -> dict[asyncssh.SSHKey, str]:
    """The keys of the lines with this marker, and the file that each is in."""
    return {line.key: line.file for line in lines if line.marker == marker}


def _fingerprint(key: asyncssh.SSHKey) -> str:
    """As ssh shows it: ED25519 SHA256:..."""
    kind = re.sub("^ssh-|-sha2-.*", "", key.get_algorithm()).upper()
    return f"{kind} {key.get_fingerprint()}"


def _is_listed(name: str, patterns: Collection[str]) -> bool:
    """Whether one of these patterns (fnmatch's) matches and none that begins with ``!``, which
    excludes whatever else matches.
    """
    matching = [each for each in patterns if fnmatch.fnmatchcase(name, each.removeprefix("!"))]
    return bool(matching) and not any(each.startswith("!") for each in matching)


def _as_fnmatch(patterns: str) -> str:
    """OpenSSH's patterns, which have ``*`` and ``?`` and no sets, as fnmatch's."""
    return patterns.replace("[", "[[]")


_Line = tuple[str | None, str, str, int]  # marker, key as it is written, file, number of the line
_KNOWN_HOSTS_LINE = re.compile(r"\s*(?:(@revoked|@cert-authority)\s+)?([^\s@#]\S*)\s+(\S+\s+\S+)")


class _KnownHosts:
    """Some known_hosts files, parsed once as long as they do not change; the first is the one that
    is written to.

    A run may ask for thousands of names, and record as many: plain names are looked up, a key is
    decoded when its line is wanted, and a line that was written here is added without parsing the
    file again. ``_plain`` has the lines by name, ``_hashed`` by salt and digest, ``_patterns`` by
    lists of patterns.
    """

    def __init__(self, *files: str) -> None:
        self._files = files
        self._lock = threading.RLock()
        self._stamp: object = None

    def _refresh(self) -> None:
        """Parse again if a file has changed."""
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        self._plain: dict[str, list[_Line]] = {}
        self._hashed: list[tuple[bytes, bytes, _Line]] = []
        self._patterns: list[tuple[list[str], _Line]] = []
        self._lengths = dict.fromkeys(self._files, 0)  # lines of each file
        for file in self._files:
            with (
                contextlib.suppress(OSError),
                open(file, encoding="utf-8", errors="surrogateescape", newline="\n") as lines,
            ):
                for line in lines:
                    self._parse(line, file)

    def _stamp_now(self) -> list[object]:
        """Changes when one of the files does; which is not there has none."""
        stamp: list[object] = []
        for file in self._files:
            with contextlib.suppress(OSError):
                info = os.stat(file)
                stamp += file, info.st_ino, info.st_size, info.st_mtime_ns
        return stamp

    def _parse(self, text: str, file: str) -> None:
        """The next line of a file; one that is not one is skipped, as ssh does."""
        self._lengths[file] += 1
        match = _KNOWN_HOSTS_LINE.match(text)
        if match is None:
            return
        names, line = match[2], (match[1], match[3], file, self._lengths[file])
        if names.startswith("|1|"):
            with contextlib.suppress(ValueError):
                salt, digest = map(base64.b64decode, names.split("|")[2:])
                self._hashed.append((salt, digest, line))
        elif re.search("[*?!]", names):
            self._patterns.append((_as_fnmatch(names.lower()).split(","), line))
        else:
            for name in names.lower().split(","):
                self._plain.setdefault(name, []).append(line)

    def names(self) -> set[str]:
        """The hosts that are named, as targets; hashes and patterns name none."""
        self._refresh()
        return {re.sub(r"\[(.*)\]:", r"\1:", name) for name in self._plain}

    def find(self, name: str, *, marked: bool = False) -> list[_KnownKey]:
        """The lines about a name (``host``, or ``[host]:port``); ``marked``: those that have a
        marker. One whose data is no key, or of a type unheard of, is skipped, as ssh does.
        """
        name = name.lower()
        data = os.fsencode(name)
        with self._lock:
            self._refresh()
            found = list(self._plain.get(name, ()))
            found += [line for patterns, line in self._patterns if _is_listed(name, patterns)]
            for salt, digest, line in self._hashed:
                # a marker costs nothing to look at, and a digest 2 microseconds
                if (line[0] or not marked) and hmac.digest(salt, data, "sha1") == digest:
                    found.append(line)
        keys: list[_KnownKey] = []
        for marker, text, file, number in found:
            with contextlib.suppress(ValueError, OverflowError):
                if marker or not marked:
                    key = asyncssh.import_public_key(text)
                    keys.append(_KnownKey(marker, key, file, number))
        return keys

    def record(self, name: str, key: asyncssh.SSHKey) -> bool:
        """Append a line for this name; False when there is one, or where nothing can be kept
        (/dev/null). Raises ApsshError, without a host, when it cannot be.
        """
        path = Path(self._files[0])
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            with self._lock, open(opened, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                # somebody else may have added it
                known = {each.key: each for each in self.find(name) if not each.marker}
                if key in known:
                    return False
                for other in known.values():
                    raise ApsshError(f"its key was not recorded: known is {other}")
                # thousands may follow: nothing is read or parsed twice
                if file.seek(0, os.SEEK_END):
                    file.seek(-1, os.SEEK_END)
                    if file.read() != b"\n":
                        file.write(b"\n")
                line = f"{name} {key.export_public_key().decode()}"
                file.write(line.encode())
                file.flush()
                self._parse(line, self._files[0])
                self._stamp = self._stamp_now()
        except OSError as exc:
            raise ApsshError(f"its key could not be recorded in {path}: {_reason(exc)}") from None
        return str(path) != os.devnull


_known_hosts_of = functools.cache(_KnownHosts)


# the words of StrictHostKeyChecking; ask means accept-new: nobody is asked
_POLICIES = {
    "accept-new": "accept-new",
    "ask": "accept-new",
    "yes": "yes",
    "no": "no",
    "true": "yes",
    "false": "no",
}


def _host_key_policy(host: str, given: str | None, configured: str | None) -> str:
    """The policy for a host: what was given, else APSSH_HOST_KEYS, a policy or a policy for host
    patterns, else the ssh config's, else accept-new. Raises UsageError for a variable that is
    neither.
    """
    variable = os.environ.get("APSSH_HOST_KEYS", "")
    policy, colon, patterns = variable.partition(":")
    if policy not in ("", *_POLICIES):
        raise UsageError(
            f"APSSH_HOST_KEYS={escape(variable)}: write accept-new, yes or no, "
            "perhaps with host patterns: no:fit*,node[1-9]*"
        )
    if colon and not _is_listed(host, re.split(r"\s*,\s*", patterns.strip())):
        policy = ""
    return _POLICIES[given or policy or configured or "accept-new"]


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


class _Verify:
    """``known_hosts`` where nothing was said: the files of the config, or ssh's own."""


_VERIFY = _Verify()
_KnownHostsChoice = _Verify | StrPath | Collection[asyncssh.SSHKey] | None


# How a host's key is judged, and how a changed one comes to the user. SshNode._log_in makes a
# _Trust for each attempt. asyncssh is told of no known host, so that it asks about each key that a
# server presents: _Link.validate_host_public_key hands it to ``check``, which raises a HostKeyError
# with the whole message as it is shown ("HOST KEY CHANGED: it presents ED25519 SHA256:..., known is
# ED25519 SHA256:... in FILE:LINE; ..."). _Link keeps that error and answers no; asyncssh breaks the
# attempt off in words of its own, and SshNode._login_failure gives the kept error in their place
# (_log_in of what lies behind a gateway puts "gateway GW: " before it). Neither a verdict nor
# --retries tries again. From there on it is a failure like others: raised in a job; for the
# programs the Result's error, of kind hostkey, which _Failures prints as "NAME: hostkey: HOST KEY
# CHANGED...", and the summary counts. Under policy no the login goes on, but no password is sent.
#
# A certificate goes the same way: check_authority is asked about the key that signed it and, when
# asyncssh has accepted it, _Link.begin_auth has check_certified look at the key in it; where nobody
# knows the authority the next attempt asks for the plain key. begin_auth then calls record: what is
# written down is a key that the host has proved to hold.


@dataclasses.dataclass(eq=False)
class _Trust:
    """Decides about the key that one host presents; every connection and every hop comes through
    here.

    ``address`` and ``port``: what is connected to, the name in known_hosts unless the config has an
    alias; ``hostname``: what errors are about. ``known_hosts`` and ``host_keys``: as SshNode has
    them. ``asking``: whether certificates may be asked for, where there is an authority.

    Attributes: ``shown``, the fingerprint that was presented; ``certified``, whether certificates
    are asked for; ``changed``, under policy no, whether the key is not the known one: ssh too then
    sends no password; ``recorded``, whether the host was never seen, and a line was written.
    """

    hostname: str
    address: str
    port: int
    known_hosts: _KnownHostsChoice
    host_keys: str | None
    config: _HostConfig
    asking: bool = True

    def __post_init__(self) -> None:
        alias = self.config.one("hostkeyalias")
        host = alias or self.address
        self.name = host if alias or self.port == 22 else f"[{host}]:{self.port}"
        self.policy = "no" if self.known_hosts is None else "yes"
        self.shown = ""
        self.changed = self.recorded = False
        self._new: asyncssh.SSHKey | None = None
        self._file: _KnownHosts | None = None
        self._known: list[_KnownKey] = []
        if isinstance(self.known_hosts, _Verify | str | os.PathLike):
            configured = self.config.one("stricthostkeychecking")
            self.policy = _host_key_policy(self.hostname, self.host_keys, configured)
            files = self.config.known_hosts_files
            if not isinstance(self.known_hosts, _Verify):
                files = [os.path.expanduser(self.known_hosts)]
            self._file = _known_hosts_of(*files)
            lines = self._file.find(self.name)
            self._known = [line for line in lines if not line.marker]
            if self.name != host:
                # Authorities and revoked keys count whatever the port; a key without port counts
                # when none is known for the port, and nobody is told that it has changed.
                lines += self._file.find(host, marked=bool(self._known))
        else:
            given = self.known_hosts or ()
            lines = [_KnownKey(None, key.convert_to_public(), "", 0) for key in given]
        self._keys = _files_of_keys(lines, None)
        self._revoked = _files_of_keys(lines, "@revoked")
        self._authorities = _files_of_keys(lines, "@cert-authority")
        self.certified = self.asking and self.policy != "no" and bool(self._authorities)

    def algorithms(self) -> list[str]:
        """What to ask of the server: what is configured, else the types that are known of it
        first.
        """
        certificates = _CERTIFICATE_ALGORITHMS if self.certified else []
        if configured := self.config.one("hostkeyalgorithms"):
            allowed = {*certificates, *_usable_algorithms(configured)}
            return [each for each in configured.split(",") if each in allowed]
        known: list[str] = []
        for key in self._keys:
            algorithm = key.get_algorithm()
            known += _RSA if algorithm == "ssh-rsa" else [algorithm]
        return list(dict.fromkeys([*certificates, *known, *_HOST_KEY_ALGORITHMS]))

    def check(self, key: asyncssh.SSHKey) -> None:
        """Raises HostKeyError unless this plain key may be the host's."""
        self.check_certified(key)
        if key in self._keys:
            return
        if self.policy == "no":
            self.changed = bool(self._known)
        elif self._known:
            # of the same type, if there is one: a person compares the two
            known = min(self._known, key=lambda line: line.key.algorithm != key.algorithm)
            raise self._error(
                f"HOST KEY CHANGED: it presents {self.shown}, known is {known}; somebody may be in "
                f"the middle. If it was reinstalled: ssh-keygen -R '{self.name}' -f "
                f"{known.file} (hosts reinstalled all day: --host-keys no, known_hosts=None, or "
                "APSSH_HOST_KEYS=no:PATTERN)"
            )
        elif self._file is None:
            raise self._error(f"it presents {self.shown}, which is not the key given for it")
        elif self.policy == "yes":
            raise self._error(
                f"its key {self.shown} is not known, and the policy refuses unknown hosts "
                "(--host-keys accept-new records them)"
            )
        else:
            self._new = key

    def check_authority(self, key: asyncssh.SSHKey) -> bool:
        """Whether this key may sign certificates for the host; raises HostKeyError if it is
        revoked.
        """
        self._check_revoked(key, f"its certificate is signed by {_fingerprint(key)}, which")
        return self.certified and key in self._authorities

    def check_certified(self, key: asyncssh.SSHKey) -> None:
        """Raises HostKeyError if the host's key, which a certificate may vouch for, is revoked."""
        self.shown = _fingerprint(key)
        self._check_revoked(key, f"its key {self.shown}")

    def record(self) -> bool:
        """Record a host never seen: whether a line was written. Raises ApsshError, without a host,
        when that could not be done.
        """
        if self._new and self._file:
            self.recorded = self._file.record(self.name, self._new)
        return self.recorded

    def _check_revoked(self, key: asyncssh.SSHKey, what: str) -> None:
        revoked = self._revoked
        file = self.config.one("revokedhostkeys")
        if self.policy == "no":
            return
        if file:
            try:
                path = Path(file).expanduser()
                listed = asyncssh.read_public_key_list(path)
                if path.read_bytes().startswith(b"SSHKRL"):
                    raise ValueError("a binary list")
            except (OSError, ValueError):
                raise self._error(
                    f"RevokedHostKeys {file} is not a readable list of public keys: "
                    "no host is trusted"
                ) from None
            revoked = revoked | dict.fromkeys(listed, file)
        if key in revoked:
            raise self._error(f"{what} is revoked in {revoked[key]}: the host needs a new one")

    def _error(self, message: str) -> HostKeyError:
        return HostKeyError(escape(message), host=self.hostname)


# ssh_config(5), answered by ssh itself

_Said = Mapping[str, list[str]]  # keyword to values

_ALGORITHMS = {
    *asyncssh.encryption.get_encryption_algs(),
    *asyncssh.kex.get_kex_algs(),
    *asyncssh.mac.get_mac_algs(),
    *asyncssh.public_key.get_public_key_algs(),
}


def _usable_algorithms(names: str) -> list[str]:
    """Those of a list that asyncssh knows, certificates apart."""
    return [name for name in names.split(",") if name.encode() in _ALGORITHMS]


def _is_yes(value: str) -> bool:
    return value not in ("no", "false")


_Arguments = Mapping[str, tuple[str, Callable[[str], Any]]]

# keyword: argument of asyncssh.connect, and what to make of the value
_LOGIN_ARGUMENTS: _Arguments = {
    "ciphers": ("encryption_algs", _usable_algorithms),
    "kexalgorithms": ("kex_algs", _usable_algorithms),
    "macs": ("mac_algs", _usable_algorithms),
    "pubkeyacceptedalgorithms": ("signature_algs", _usable_algorithms),
    "pubkeyauthentication": ("public_key_auth", _is_yes),
    "passwordauthentication": ("password_auth", _is_yes),
    "kbdinteractiveauthentication": ("kbdint_auth", _is_yes),
    "preferredauthentications": ("preferred_auth", str),
}
# of loop.create_connection
_SOCKET_ARGUMENTS: _Arguments = {
    "addressfamily": ("family", {"inet": socket.AF_INET, "inet6": socket.AF_INET6}.get),
    "bindaddress": ("local_addr", lambda address: (address, 0)),
}


class _HostConfig:
    """What is configured for a host: an answer of ``ssh -G`` (with ssh's own defaults, which say
    nothing), read where something is wanted of it; nothing in it changes.

    The question may have been about another host of its class, ``asked``. As with ssh, what the
    target says itself comes first: ``user``, else the local one, and ``port`` are in here.
    ``hostname``, ``port`` and what the methods give are None or empty where nothing was said.
    Raises UsageError where a name cannot stand in a command.
    """

    def __init__(self, hop: Hop, said: _Said, defaults: _Said, asked: str) -> None:
        self._said, self._defaults, self._name = said, defaults, hop.host
        hostname, port = self.one("hostname"), self.one("port")
        self.hostname = None if hostname == asked.lower() else hostname
        self.user = hop.user or self.one("user") or getpass.getuser()
        self.port = hop.port or (int(port) if port else None)

    def values(self, keyword: str) -> list[str]:
        """All that was configured for a keyword."""
        values = self._said.get(keyword, [])
        return [] if values == self._defaults.get(keyword) else values

    def one(self, keyword: str) -> str | None:
        """What was configured for a keyword, unless it is ``none``."""
        values = self.values(keyword)
        return values[0] if values and values[0] != "none" else None

    def seconds(self, keyword: str) -> float:
        """A time; 0 where none was configured."""
        return float(self.one(keyword) or 0)

    def paths(self, keyword: str) -> list[str]:
        """Names of files."""
        return [self._path(value) for value in self.values(keyword)]

    def command(self, keyword: str) -> str | None:
        """What a shell will see, so that the names in it must be harmless."""
        text = self.one(keyword)
        if text is None:
            return None
        names = self._expand("%h%n%r")
        if not re.fullmatch(r"[\w.:@\[\]%+-]*", names, re.ASCII):
            raise UsageError(
                f"{escape(self._name)}: a host or user name with such characters "
                "cannot stand in a ProxyCommand"
            )
        return self._expand(text)

    def _path(self, text: str) -> str:
        """The name of a file; in it a variable that is not set stays."""
        return os.path.expanduser(os.path.expandvars(self._expand(text)))

    def _expand(self, text: str) -> str:
        """ssh_config(5), TOKENS"""
        if "%" not in text:
            return text
        here = socket.gethostname()
        tokens = {
            "h": self.hostname or self._name.lower(),
            "n": self._name,
            "r": self.user,
            "u": getpass.getuser(),
            "p": str(self.port or 22),
            "d": os.path.expanduser("~"),
            "i": str(os.getuid()),
            "l": here,
            "L": here.partition(".")[0],
            "k": self.one("hostkeyalias") or self._name,
            "%": "%",
        }
        return re.sub(r"%(.)", lambda match: tokens.get(match[1], match[0]), text)

    @property
    def jumps(self) -> tuple[Hop, ...]:
        """The hops of a ProxyJump."""
        jumps = self.command("proxyjump")
        texts = [each.removeprefix("ssh://") for each in jumps.split(",")] if jumps else []
        return tuple(_parse_hop(text.removesuffix("/")) for text in texts)

    @property
    def identity_agent(self) -> str | None:
        """Where the agent listens; for ``none``, where no agent answers."""
        agent = "".join(self.values("identityagent"))
        if agent == "none":
            return os.devnull
        return None if agent in ("", "SSH_AUTH_SOCK") else self._path(agent)

    @property
    def names_keys(self) -> bool:
        """Whether it says which keys to offer."""
        return any(map(self.values, ("identityfile", "certificatefile", "identityagent")))

    @property
    def known_hosts_files(self) -> list[str]:
        """The user's and everybody's."""
        user = self.values("userknownhostsfile") or KNOWN_HOSTS_FILES[:2]
        everybody = self.values("globalknownhostsfile") or KNOWN_HOSTS_FILES[2:]
        # ssh quotes no blank that is in a name
        files = re.split(r"\s+(?=[/~%$]|none$|none\s)", " ".join([*user, *everybody]))
        return [os.devnull if file == "none" else self._path(file) for file in files]

    def arguments(self, table: _Arguments) -> dict[str, Any]:
        """The arguments of a call that were configured."""
        arguments: dict[str, Any] = {}
        for keyword, (name, convert) in table.items():
            if value := self.one(keyword):
                arguments[name] = convert(value)
        return arguments


_UNCONFIGURED = _HostConfig(Hop("", "root"), {}, {}, "")  # of a node that reads no config

# What ssh says of hosts: _SshConfig.lookup_all asks ``ssh -G`` (_ask_ssh), and makes a _HostConfig
# of each answer. A question takes 4 ms, so hosts that match the same Host patterns share one
# (_questions). The files are read for these patterns alone, and ssh tells which files they are.

# lines after which such hosts may be answered differently; ssh -G expands the %-tokens in them
_HOST_BY_HOST = r"""(?imx) ^[ \t]* (
    match\b (?![ \t=]+all\s*$) | canonicalizehostname | host\b .*['\\]
    | (hostname|userknownhostsfile|include)\b .*% )
"""


class _SshConfig:
    """The user's ssh configuration (None), that of a file, or none at all (``none``)."""

    def __init__(self, path: str | None) -> None:
        user, site = os.path.expanduser("~/.ssh/config"), "/etc/ssh/ssh_config"
        if path is None:
            home = os.path.expanduser("~")
            with contextlib.suppress(KeyError):
                home = pwd.getpwuid(os.getuid()).pw_dir
            if user != f"{home}/.ssh/config":  # ssh does not look at HOME
                path = user if os.path.exists(user) else "none"
            elif not (os.path.exists(user) or os.path.exists(site)):
                path = "none"
        if path != "none" and not shutil.which("ssh"):
            _screen.notice("apssh: no ssh program here to read the ssh config: it is not used")
            path = "none"
        self._path = path

    def _text(self, host: str) -> str:
        """All that there is, but for quotes and comments: ssh -v names the files that it reads,
        whichever blocks the host is in.
        """
        said = _run_ssh(self._path, Hop(host), "-v").stderr
        files = re.findall("(?m)^debug1: Reading configuration data (.*)", said)
        texts = [Path(file).read_text("utf-8", "surrogateescape") for file in files]
        return re.sub(r'"|\s#.*', "", "\n".join(texts))

    def names(self) -> set[str]:
        """The hosts that it names; patterns name none."""
        text = "" if self._path == "none" else self._text("localhost")
        names = " ".join(_read_keywords(text)["host"]).split()
        return {name for name in names if not re.search(r"[*?!\[]", name)}

    def lookup_all(self, hops: Iterable[Hop]) -> dict[Hop, _HostConfig]:
        """What is configured for each of these hops, and for those that they jump through. Raises
        UsageError when ssh refuses the configuration.
        """
        if self._path == "none":
            return {hop: _HostConfig(hop, {}, {}, "") for hop in hops}
        answers: dict[Hop, _HostConfig] = {}
        missing = set(hops)
        with ThreadPoolExecutor(8) as pool:
            defaults = pool.submit(_ask_ssh, "none", Hop("default"))
            ask = functools.cache(lambda hop: pool.submit(_ask_ssh, self._path, hop))
            while missing:
                asked = self._questions(missing)
                said = {hop: ask(question) for hop, question in asked.items()}
                for hop, answer in said.items():
                    name = asked[hop].host
                    answers[hop] = _HostConfig(hop, answer.result(), defaults.result(), name)
                jumps = itertools.chain.from_iterable(answers[hop].jumps for hop in missing)
                missing = set(jumps) - answers.keys()
        return answers

    def _questions(self, hops: Collection[Hop]) -> dict[Hop, Hop]:
        """What to ask ssh about for each hop: one for all that match the same patterns. A HostName
        equal to what was asked would say nothing.
        """
        asked = {hop: hop for hop in hops}
        if len(hops) == 1:
            return asked
        text = self._text(next(iter(hops)).host)
        if re.search(_HOST_BY_HOST, text):
            return asked
        said = _read_keywords(text)
        blocks = [_as_fnmatch(value).split() for value in said["host"]]
        hostnames = {value.strip().lower() for value in said["hostname"]}
        first: dict[object, Hop] = {}
        for hop in hops:
            if hop.host.lower() not in hostnames:
                matching = tuple(_is_listed(hop.host, block) for block in blocks)
                asked[hop] = first.setdefault(matching, Hop(hop.host))
        return asked


def _run_ssh(path: str | None, hop: Hop, *options: str) -> subprocess.CompletedProcess[str]:
    """ssh -G. Raises UsageError where it does not end."""
    words = ["ssh", "-G", *options]
    for option, value in (("-F", path), ("-l", hop.user), ("-p", hop.port)):
        words += [option, str(value)] if value else []
    try:
        return subprocess.run(
            [*words, "--", hop.host],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=CONNECT_TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        raise UsageError(
            f"ssh config: no answer about {hop.host} within {CONNECT_TIMEOUT:g} s (a Match exec?)"
        ) from None


def _ask_ssh(path: str | None, hop: Hop) -> _Said:
    """What is configured for a host. Raises UsageError."""
    done = _run_ssh(path, hop)
    if done.returncode:
        raise UsageError("ssh config: " + escape(" ".join(done.stderr.split())))
    return _read_keywords(done.stdout)


def _read_keywords(text: str) -> _Said:
    """The values of each keyword, in a config and in what ssh says of one."""
    values: _Said = collections.defaultdict(list)
    for keyword, value in re.findall(r"(?m)^[ \t]*(\w+)[ \t=]+(.*)", text):
        values[keyword.lower()].append(value)
    return values


# --------------------------------------------------------------------------------------------------
# values: what steps are given by keyword, and what one finds and a later one uses
# --------------------------------------------------------------------------------------------------


class Variables(dict[str, Any]):
    """A dict whose keys are attributes too: ``v.x = 1``. A missing one raises AttributeError."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"no variable {name!r}")
        return self[name]

    __setattr__ = dict.__setitem__

    def __delattr__(self, name: str) -> None:
        self.__getattr__(name)
        del self[name]


class Capture:
    """Where a command's standard output is kept: ``Run(..., capture=Capture("x", variables))``.

    ``varname``: the key; ``variables``: the dict that gets the text, its last newline removed, when
    the command has ended. A command that did not end stores nothing.
    """

    @_keywords_checked
    def __init__(self, varname: str, variables: dict[str, Any]) -> None:
        self.varname, self.variables = varname, variables

    def store(self, text: str) -> None:
        """Keep this output, without its last newline."""
        self.variables[self.varname] = text.removesuffix("\n")


class Deferred:
    """A text made when its job runs: in ``template``, ``{{name}}`` stands for ``variables[name]``.

    Other Jinja2 expressions need Jinja2 (extra yaml). As a string (in graphs and listings) a name
    with no value yet shows as it is. Values are never read as templates.
    """

    _PLAIN = r"(?a)\{\{\s*([A-Za-z_]\w*)\s*\}\}"

    @_keywords_checked
    def __init__(self, template: str, variables: Mapping[str, Any]) -> None:
        self.template, self.variables = template, variables

    def __repr__(self) -> str:
        return f"Deferred({self.template!r})"

    def __str__(self) -> str:
        values = self.variables
        return re.sub(self._PLAIN, lambda name: str(values.get(name[1], name[0])), self.template)

    def render(self) -> str:
        """The text. Raises UndefinedVariableError naming what has no value, UsageError for an
        expression that cannot be.
        """
        shown = escape(self.template)
        # whole tags: a shell has the beginning of one in ${#a[@]} and printf {%s}
        rest = re.sub(self._PLAIN, "", self.template)
        if not re.search(r"(?s)\{\{|\{%.*?%\}|\{#.*?#\}", rest):
            names = re.findall(self._PLAIN, self.template)
            if missing := ", ".join(name for name in names if name not in self.variables):
                raise UndefinedVariableError(f"no value yet for {missing} in {shown}")
            return str(self)
        jinja2 = _extra("jinja2")
        how = {"undefined": jinja2.StrictUndefined, "keep_trailing_newline": True}
        try:
            return str(jinja2.Template(self.template, **how).render(self.variables))
        except jinja2.UndefinedError as exc:
            raise UndefinedVariableError(f"no value yet in {shown}: {exc}") from None
        except Exception as exc:  # an expression may compute anything
            raise UsageError(f"{shown}: {exc}") from None


_Path = StrPath | Deferred
_Paths = _Path | Iterable[_Path]


def _text_of(value: object) -> str:
    """The text of what a job is given, when it runs."""
    if isinstance(value, Deferred):
        return value.render()
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)


@dataclasses.dataclass(eq=False)
class _Quoted(Deferred):
    """What is made of another text, as one word of the remote shell."""

    inner: object
    make: Callable[[str], str]

    def __str__(self) -> str:
        return shlex.quote(self.make(str(self.inner)))

    def render(self) -> str:
        return shlex.quote(self.make(_text_of(self.inner)))


def _extra(module: str) -> Any:
    """A module of the extra ``yaml``."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UsageError(f"this needs {module}: pip install 'apssh[yaml]'") from None


@dataclasses.dataclass(eq=False)
class StepRecord:
    """What is known of one step that ran.

    ``label``: its line in listings; ``command``: what ran. ``start`` and ``end``: seconds of a
    monotonic clock; ``start_wall`` and ``end_wall``: seconds since the epoch; None before it began,
    or ended. ``status``: exit status, or the signal's name. ``kind`` (see ApsshError; None is a
    success) and ``error`` tell how it failed. ``bytes_out``, ``bytes_err``: what it printed;
    ``bytes_transferred``: what a copy moved. ``script_sha256``: of the script that ran.
    ``may_run``: the command may still be running over there.
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
    may_run: bool = False

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Notes the times, and how it failed."""
        self.start_wall, self.start = time.time(), time.monotonic()
        try:
            yield
        except ApsshError as exc:
            self.kind, self.error = exc.kind, str(exc)
            raise
        except asyncio.CancelledError:
            self.kind = self.error = "cancelled"
            raise
        except BaseException as exc:
            self.kind, self.error = "local", repr(exc)
            raise
        finally:
            self.end_wall, self.end = time.time(), time.monotonic()


_Word = Union[int, float, _Path, "Run"]
_ScriptFiles = dict[str, tuple[bytes, int]]  # by name: content and mode
_StdinSource = bytes | _Path | BinaryIO | AsyncIterator[bytes]
_Exits = Collection[int | str] | None

# Keywords: types with their defaults, as _keywords_shown reads them; None is said of no default.
_Flag = Annotated[bool, False]
_TextOrNone = str | None
_NumberOrNone = int | None
_SecondsOrNone = float | None


class _StepKeywords(TypedDict, total=False):
    """What every step takes."""

    label: str | bool | None
    allowed_exits: _Exits
    verbose: Annotated[bool | None, False]


class _TimedKeywords(_StepKeywords, total=False):
    timeout: _SecondsOrNone


class _SetupKeywords(TypedDict, total=False):
    """What a command line is given, besides its words."""

    x11: _Flag
    env: Mapping[str, str] | None
    pty: _Flag
    stdin: _StdinSource | None
    sudo: Annotated[bool | str, False]


class _ShellKeywords(_SetupKeywords, _TimedKeywords, total=False):
    capture: Capture | None


class _RunKeywords(_ShellKeywords, total=False):
    ignore_outputs: _Flag


class _ScriptKeywords(_ShellKeywords, total=False):
    includes: Annotated[Collection[StrPath] | None, ()]


class _TransferKeywords(TypedDict, total=False):
    """How a copy is made."""

    preserve: _Flag
    recurse: _Flag
    follow_symlinks: _Flag
    inplace: _Flag


class _CopyKeywords(_TransferKeywords, _TimedKeywords, total=False):
    block_size: _NumberOrNone
    max_requests: _NumberOrNone


# --------------------------------------------------------------------------------------------------
# transfers: one SFTP engine; what arrives is whole, and stays inside the destination
# --------------------------------------------------------------------------------------------------

CHUNK = 1024 * 1024  # bytes of a file handled at once; two of them are under way
BLOCK = 32 * 1024  # bytes of a request that every server takes
FILES_IN_FLIGHT = 64  # small files cost round trips: many at once is what makes them cheap
TREE_LIMIT = 1_000_000  # names in one copy, and links: more is an endless tree
DEPTH_LIMIT = 100  # folders in folders
# bytes past the announced size (/proc announces 0, a log grows): more is an endless file
SURPLUS_LIMIT = 1 << 30
FAILURES_SHOWN = 5  # in the one line of an error
FAILURES_KEPT = 1000  # in TransferError.failures: a hostile server has no end of them

_Attrs = asyncssh.SFTPAttrs
_LOST = (
    asyncssh.SFTPConnectionLost,
    asyncssh.SFTPNoConnection,
    asyncssh.ConnectionLost,
    ConnectionError,
)
_MISSING = (FileNotFoundError, asyncssh.SFTPNoSuchFile, asyncssh.SFTPNoSuchPath)
_DENIED = (PermissionError, asyncssh.SFTPPermissionDenied)
_INPLACE = "inplace, or --inplace, writes onto the file itself"

_REGULAR = asyncssh.FILEXFER_TYPE_REGULAR
_FOLDER_TYPE = asyncssh.FILEXFER_TYPE_DIRECTORY
_LINK = asyncssh.FILEXFER_TYPE_SYMLINK
_UNKNOWN = asyncssh.FILEXFER_TYPE_UNKNOWN  # some servers list names only
_TYPES = {stat.S_IFREG: _REGULAR, stat.S_IFDIR: _FOLDER_TYPE, stat.S_IFLNK: _LINK}
_CALLED = {_REGULAR: "a file", _FOLDER_TYPE: "a folder", _LINK: "a link"}

# the ways to open a file, as asyncssh names them; a new one never takes what is there
_HOW = {
    "rb": os.O_RDONLY,
    "xb": os.O_WRONLY | os.O_CREAT | os.O_EXCL,
    "wb": os.O_WRONLY | os.O_TRUNC,
}
_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY

# a backslash before what has a meaning in a pattern; elsewhere it is itself
_QUOTED = r"\\([][*?\\])"
# what cannot be the name of an entry: it leads elsewhere, or no file system has such long ones
_NO_NAME = re.compile(r"\.{,2}\Z|.*[/\0]|.{256}", re.DOTALL)


def _paths(paths: Any) -> list[Any]:
    """One path or several, as a list; a list of one means that path."""
    each = [paths] if isinstance(paths, str) or not isinstance(paths, Iterable) else list(paths)
    if not each or not all(
        isinstance(path, str | os.PathLike | Deferred) and str(path) for path in each
    ):
        raise UsageError(f"a path or a list of paths, not {paths!r}")
    return each


def _is_pattern(path: str) -> bool:
    """Whether a remote path has a ``*``, ``?`` or ``[`` that no backslash quotes."""
    return re.search(r"[*?[]", re.sub(_QUOTED, "", path)) is not None


def _check_landing(destination: str, *, several: bool) -> None:
    """The local folder that a Pull writes into is there. Raises UsageError."""
    folder = destination if several or destination.endswith("/") else os.path.dirname(destination)
    if folder and not os.path.isdir(folder):
        what = "not a folder" if os.path.exists(folder.rstrip("/")) else "no such folder"
        raise UsageError(f"{escape(folder)}: {what}")


# The files of this machine have the methods of asyncssh's SFTP client that a copy calls, so that
# one walk and one engine serve push, pull and LocalNode. An error tells on which side it was by its
# class: OSError here, SFTPError over there.


class _LocalFile:
    """An open file of this machine, as asyncssh's SFTPClientFile."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    async def read(self, size: int, offset: int) -> bytes:
        return os.pread(self._fd, size, offset)

    async def write(self, data: bytes, offset: int) -> None:
        """A full disk takes a part without an error: the next write tells."""
        while data:
            written = os.pwrite(self._fd, data, offset)
            data, offset = data[written:], offset + written

    async def setstat(self, attrs: _Attrs) -> None:
        """In OpenSSH's order: the owner last, which only root may change."""
        if attrs.permissions is not None:
            os.fchmod(self._fd, attrs.permissions)
        if attrs.atime is not None and attrs.mtime is not None:
            os.utime(self._fd, (attrs.atime, attrs.mtime))
        if attrs.uid is not None and attrs.gid is not None:
            os.fchown(self._fd, attrs.uid, attrs.gid)

    async def close(self) -> None:
        os.close(self._fd)


class _LocalFiles:
    """The files of this machine, as asyncssh's SFTPClient.

    ``top``: a folder that is held by descriptor. All paths are then below it, and are reached from
    there, one open folder after the other and never through a link: whoever swaps a name for a link
    meanwhile gains nothing. Without it paths are the user's own, and mean what they say.
    """

    limits = asyncssh.SFTPLimits(CHUNK, CHUNK, CHUNK, 0)

    def __init__(self, top: str | None = None) -> None:
        self._top = top
        self._folder: str | None = None  # the one that is open beside the top
        if top is not None:
            self._top_fd = os.open(top or ".", _OPEN_FOLDER)
            self._fd = os.dup(self._top_fd)

    def close(self) -> None:
        os.close(self._top_fd)
        os.close(self._fd)

    def _at(self, path: str) -> tuple[int | None, str]:
        """The open folder that this path is in, for the next call only, and the name there."""
        if self._top is None:
            return None, path
        folder, name = posixpath.split(path)
        if folder != self._folder:
            self._folder = None  # until we are there
            self._move_to(os.dup(self._top_fd))
            for each in filter(None, folder[len(self._top) :].split("/")):
                self._move_to(os.open(each, _OPEN_FOLDER | os.O_NOFOLLOW, dir_fd=self._fd))
            self._folder = folder
        return self._fd, name

    def _move_to(self, fd: int) -> None:
        os.close(self._fd)
        self._fd = fd

    async def stat(self, path: str, *, follow_symlinks: bool = True) -> _Attrs:
        """What a copy needs to know. Not asyncssh's from_local: that asks for the owner's name,
        which may take a server.
        """
        fd, name = self._at(path)
        info = os.stat(name, dir_fd=fd, follow_symlinks=follow_symlinks)
        return _Attrs(
            type=_TYPES.get(stat.S_IFMT(info.st_mode), asyncssh.FILEXFER_TYPE_SPECIAL),
            size=info.st_size,
            uid=info.st_uid,
            gid=info.st_gid,
            permissions=stat.S_IMODE(info.st_mode),
            atime=int(info.st_atime),
            mtime=int(info.st_mtime),
        )

    async def realpath(self, path: str) -> str:
        return os.path.realpath(path)

    async def readlink(self, path: str) -> str:
        return os.readlink(path)

    async def scandir(self, path: str) -> AsyncIterator[asyncssh.SFTPName]:
        for name in os.listdir(path):
            yield asyncssh.SFTPName(name)

    async def mkdir(self, path: str, attrs: object) -> None:
        """A private one."""
        fd, name = self._at(path)
        os.mkdir(name, 0o700, dir_fd=fd)

    async def makedirs(self, path: str, *, exist_ok: bool) -> None:
        os.makedirs(path, exist_ok=exist_ok)

    async def rmtree(self, path: str, *, ignore_errors: bool) -> None:
        shutil.rmtree(path, ignore_errors=ignore_errors)

    async def open(
        self, path: str, mode: str, attrs: object = None, *, block_size: int
    ) -> _LocalFile:
        """Never through a link, and a regular file whatever was put there since it was looked at:
        a FIFO would hold us for ever. A new one is private.
        """
        folder, name = self._at(path)
        how = _HOW[mode] | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = os.open(name, how, 0o600, dir_fd=folder)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise TransferError("not a regular file")
        return _LocalFile(fd)

    async def setstat(self, path: str, attrs: _Attrs) -> None:
        """Of a folder."""
        fd, name = self._at(path)
        folder = _LocalFile(os.open(name, _OPEN_FOLDER | os.O_NOFOLLOW, dir_fd=fd))
        async with _closing(folder):
            await folder.setstat(attrs)

    async def symlink(self, target: str, path: str) -> None:
        fd, name = self._at(path)
        os.symlink(target, name, dir_fd=fd)

    async def posix_rename(self, path: str, target: str) -> None:
        """Within a folder."""
        fd, name = self._at(path)
        os.rename(name, self._at(target)[1], src_dir_fd=fd, dst_dir_fd=fd)

    rename = posix_rename

    async def remove(self, path: str) -> None:
        fd, name = self._at(path)
        os.unlink(name, dir_fd=fd)


_Files = _LocalFiles | asyncssh.SFTPClient
_File = _LocalFile | asyncssh.SFTPClientFile


def _side(files: _Files) -> str:
    return "local" if isinstance(files, _LocalFiles) else "remote"


def _there(files: _Files, path: str) -> str:
    """A path of a step as its host has it: ``~`` and nothing are the home, where SFTP starts."""
    if isinstance(files, _LocalFiles):
        return os.path.expanduser(path) or "."
    return re.sub("^~(/+|$)", "", path) or "."


@contextlib.contextmanager
def _file_errors(host: str, path: str, what: str = "") -> Iterator[None]:
    """What goes wrong with a path, as an error of ours that names the host, the path and the
    reason; the first note on an error is a better one.
    """
    shown = _brief(path, 200)
    try:
        yield
    except _LOST as exc:
        message = f"connection lost during the copy of {shown}"
        raise ConnectionFailedError(message, host=host) from exc
    except (TransferError, OSError, asyncssh.SFTPError, ValueError) as exc:
        side = "remote" if isinstance(exc, asyncssh.SFTPError) else "local"
        why = [*getattr(exc, "__notes__", []), _reason(exc)]
        raise TransferError(
            f"{shown}: {what}{why[0]}", host=host, kind=getattr(exc, "kind", side)
        ) from exc


@contextlib.asynccontextmanager
async def _in_short(seconds: float = CLOSE_TIMEOUT) -> AsyncIterator[None]:
    """To clean up after a failure: no further error, and no waiting for a host that is stuck."""
    with contextlib.suppress(OSError, ValueError, asyncssh.Error):
        async with asyncio.timeout(seconds):
            yield


@contextlib.asynccontextmanager
async def _closing(file: _File) -> AsyncIterator[_File]:
    """Closed at the end; after a failure or a cancellation within a short time."""
    try:
        yield file
    except BaseException:
        async with _in_short():
            await file.close()
        raise
    await file.close()


class _UnderWay:
    """Files, or requests on one file, under way, at most so many; leaving it waits for all of them,
    or, on a failure, cancels them. No asyncio.TaskGroup: that takes a cancellation from outside for
    its own, when one of its tasks has just failed.
    """

    def __init__(self, most: int) -> None:
        self._room = asyncio.Semaphore(most)
        self._tasks = set[asyncio.Task[None]]()  # those that run, and those that failed

    async def start(self, work: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        """One more, when there is room. Raises what an earlier one raised."""
        await self._room.acquire()
        for earlier in self._tasks:
            if earlier.done():
                earlier.result()
        task = asyncio.create_task(work(*args))
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._room.release()
        if task.cancelled() or not task.exception():
            self._tasks.discard(task)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, *exc_info: object) -> None:
        try:
            if kind is None:
                await asyncio.gather(*self._tasks)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._tasks.clear()  # a failure that is kept keeps its frames


class _CopyItem(NamedTuple):
    """One entry on its way."""

    path: str
    target: str  # the path on the destination's side
    level: int = 0  # how many folders lie between it and what was named
    depth: int = 0  # how many folders lie between it and the destination
    fresh: bool = False  # its folder was made by this copy: nothing can be there
    inside: str = ""  # the real path of its folder, when links are followed


# How a file replaces another, in push, pull and on this machine alike. ``_copy_file`` opens the
# source; ``_existing`` says where the file goes and what is there (a link at the place that the
# user named is followed, one inside a tree replaced; a folder or a special file gives way to
# nothing); ``_arriving`` makes the new file and ends with its attributes; ``_stream`` copies.
#
# The new file is made beside the target by ``_replacing``, as .new.apssh- and 16 hex digits, never
# taking what is there, with mode 600. When it is whole ``_given`` says what it gets: a new one the
# mode bits of its source; one that takes the place of another the mode and the owner of that; with
# preserve it is the source's mode and times, for both. Where a file was, what is not permitted then
# is left: the file could be written, and that was the wish. It is then renamed over the target, by
# posix-rename@openssh.com; other hard links keep the old content. A server without that renames to
# free names only: the target is removed first, and where it fails after that the new file is all
# that is left: it stays, and the error names it, or a message if the copy is broken off meanwhile.
# Any other failure, and a cancellation, removes the new file, within 2 s and if the connection is
# there, and leaves the old one as it was. OpenSSH says only "Failure" of a full disk: it is asked
# how full it is. Where nothing can be made or renamed (a folder that is not writable, a busy file)
# the error names inplace: with that, a file that is there is written itself, and a failure leaves
# half of it.


@dataclasses.dataclass(eq=False)
class _Copy:
    """One Push or Pull with one host: its options, what it has moved (``step``), what failed while
    the other files went on.

    The source's side and the destination's are asyncssh's SFTPClient or the local one. In a tree,
    folders are walked one after the other, files and links copied beside each other; modes and
    times of folders are set when all is there, for a folder may forbid to write in it. What comes
    from a server is not trusted: names and links are checked, and everything is made below an open
    folder. Cancelling a copy removes what it was making, unless its target has made room for it.
    """

    host: str
    step: StepRecord
    preserve: bool = False
    recurse: bool = False
    follow_symlinks: bool = False
    inplace: bool = False

    def __post_init__(self) -> None:
        self._source: _Files = _LocalFiles()
        self._destination: _Files = self._source
        self._pushing = self._wary = False
        self._into = False  # the destination is a folder that sources arrive in
        self._links: list[_CopyItem] = []
        self._late: list[tuple[str, _Attrs]] = []  # folders, to have these at the end
        self._under_way = _UnderWay(FILES_IN_FLIGHT)
        self._names = 0
        self._failures: list[str] = []
        self._failed, self._kind = 0, ""

    async def push(self, sftp: _Files, sources: Sequence[str], destination: str) -> None:
        """Copy local files onto a path over there. Raises TransferError, ConnectionFailedError."""
        self._destination, self._pushing = sftp, True
        with self._telling(destination):
            place = _there(sftp, destination)
            await self._land(place, several=len(sources) > 1)
            await self._walk(sources, place)

    async def pull(self, sftp: _Files, sources: Sequence[str], destination: str) -> None:
        """Copy files from over there (globs are expanded) onto a local path. Raises TransferError,
        ConnectionFailedError.
        """
        self._source, self._wary = sftp, not isinstance(sftp, _LocalFiles)
        with self._telling(destination):
            paths: list[str] = []
            for source in sources:
                there = _there(sftp, source)
                if not source.removeprefix("~").rstrip("/"):  # the home, by its name
                    there = str(await sftp.realpath(there))
                paths += await self._matches(there)
            place = destination or "."
            await self._land(place, several=len(paths) > 1)
            place = os.path.realpath(place) if os.path.islink(place) else place
            here = _LocalFiles(place if self._into else os.path.dirname(place))
            with contextlib.closing(here) as self._destination:
                await self._walk(paths, place)

    async def put(self, sftp: _Files, content: bytes, path: str, mode: int) -> None:
        """Write a file over there, with this mode. Raises TransferError, ConnectionFailedError."""
        self._destination, self._pushing, self.preserve = sftp, True, True
        with self._telling(path):
            item = _CopyItem(path, _there(sftp, path))
            async with self._arriving(item, _Attrs(permissions=mode)) as file:
                for position in range(0, len(content), BLOCK):
                    await file.write(content[position : position + BLOCK], position)

    # what goes wrong

    def _wrong(self, files: _Files, message: str) -> TransferError:
        """An error of what this side has."""
        return TransferError(message, kind=_side(files))

    @contextlib.contextmanager
    def _failing(self, path: str, what: str = "") -> Iterator[None]:
        """A failure of this path is kept for the end; only the loss of the connection stops the
        rest.
        """
        try:
            with _file_errors(self.host, path, what):
                yield
        except TransferError as exc:
            self._kind = self._kind or exc.kind
            self._failed += 1
            if self._failed <= FAILURES_KEPT:
                self._failures.append(exc.message)

    @contextlib.contextmanager
    def _telling(self, path: str) -> Iterator[None]:
        """At the end of a copy onto this path: all that failed, the first few of it in the
        message.
        """
        with self._failing(path):
            yield
        if self._failed:
            message = "; ".join(self._failures[:FAILURES_SHOWN])
            if self._failed > FAILURES_SHOWN:
                message += f" (and {self._failed - FAILURES_SHOWN} more)"
            raise TransferError(message, host=self.host, kind=self._kind, failures=self._failures)

    # the walk

    async def _land(self, place: str, *, several: bool) -> None:
        """Whether sources arrive in a folder, or one of them under this very name."""
        existing = await self._look(place.rstrip("/") or "/", follow=True)
        is_folder = existing is not None and existing.type == _FOLDER_TYPE
        self._into = several or is_folder or place.endswith("/")
        if self._into and not is_folder:
            what = "not a folder" if existing else "no such folder"
            raise self._wrong(self._destination, what)

    async def _look(self, path: str, *, follow: bool = False) -> _Attrs | None:
        """What is there on the destination's side."""
        try:
            return await self._destination.stat(path, follow_symlinks=follow)
        except _MISSING:
            return None

    async def _matches(self, pattern: str) -> list[str]:
        """The paths that a pattern matches, in order; as in a shell, ``*`` matches no leading dot,
        and what matches nothing stands for itself.
        """
        literal = re.sub(_QUOTED, r"\1", pattern)
        if not _is_pattern(pattern):
            return [literal]
        head, slash, last = pattern.rpartition("/")
        wanted = re.sub(_QUOTED, r"[\1]", last)
        found: list[str] = []
        for folder in await self._matches(head) if head else [slash]:
            with contextlib.suppress(OSError, asyncssh.SFTPError):
                async for path, name, _ in self._entries(folder):
                    hidden = name.startswith(".") and not last.startswith(".")
                    if fnmatch.fnmatchcase(name, wanted) and not hidden:
                        found.append(path)
        return sorted(found) or [literal]

    async def _entries(self, folder: str) -> AsyncIterator[tuple[str, str, _Attrs]]:
        """What a folder is said to hold: path, name, attributes. A name that cannot be used is a
        failure; each counts, whatever becomes of it.
        """
        taken = set[str]()
        async for found in self._source.scandir(folder or "."):
            name = str(found.filename)
            path = posixpath.join(folder, name)
            self._names += 1
            if self._names > TREE_LIMIT:
                raise ApsshError(
                    f"{_brief(path, 200)}: more than {TREE_LIMIT:,} names: given up",
                    host=self.host,
                    kind=_side(self._source),
                )
            if name not in (".", ".."):
                with self._failing(path):
                    self._take(name, taken)
                    yield path, name, found.attrs

    async def _walk(self, paths: Iterable[str], place: str) -> None:
        """Copy what was named, each to its own name in the folder or the only one to this name."""
        taken = set[str]()
        async with self._under_way:
            for path in dict.fromkeys(paths):
                with self._failing(path):
                    name = posixpath.basename(path.rstrip("/"))
                    if name in ("", ".", ".."):
                        name = "."  # as for cp, what the folder holds
                    target, depth = place, 0
                    if self._into:
                        self._take_once(name, taken)
                        target = posixpath.join(place, name)
                        depth = int(name != ".")
                    attrs = await self._source.stat(path)
                    self._check_apart(path, target, attrs)
                    await self._enter(_CopyItem(path, target, depth=depth), attrs)
            for link in self._links:
                await self._under_way.start(self._copy_link, link)
        for target, attrs in reversed(self._late):
            with self._failing(target, "mode and times not set: "):
                await self._destination.setstat(target, attrs)

    def _take(self, name: str, taken: set[str]) -> None:
        """A name for one entry of a folder, that none has before: it cannot lead elsewhere, and no
        file system has longer ones.
        """
        if _NO_NAME.match(name):
            raise self._wrong(self._source, f"refused the name '{_brief(name)}'")
        self._take_once(name, taken)

    def _take_once(self, name: str, taken: set[str]) -> None:
        """A name of the user's own, which may be a dot."""
        if name in taken:
            raise self._wrong(self._source, f"the name {escape(name)} comes twice")
        taken.add(name)

    def _check_apart(self, path: str, target: str, attrs: _Attrs) -> None:
        """On one machine: a tree in itself has no end, a file onto itself would be emptied."""
        if self._wary or not isinstance(self._destination, _LocalFiles):
            return
        inside = Path(target).resolve().is_relative_to(Path(path).resolve())
        if inside and (self.inplace or attrs.type == _FOLDER_TYPE):
            raise TransferError("cannot be copied into itself")

    async def _enter(self, item: _CopyItem, attrs: _Attrs) -> None:
        """One item, that was named (a link is followed) or found in a folder. Links come last."""
        unsure = (_UNKNOWN, _LINK) if self.follow_symlinks else (_UNKNOWN,)
        if item.level and attrs.type in unsure:
            attrs = await self._source.stat(item.path, follow_symlinks=self.follow_symlinks)
        if attrs.type == _REGULAR:
            await self._under_way.start(self._copy_file, item, attrs)
        elif attrs.type == _LINK and item.level:
            self._links.append(item)
        else:
            await self._copy_folder(item, attrs)

    async def _copy_folder(self, item: _CopyItem, attrs: _Attrs) -> None:
        """Make the folder, if need be, and enter what it holds."""
        real = str(await self._source.realpath(item.path)) if self.follow_symlinks else ""
        for wrong, why in (
            (attrs.type != _FOLDER_TYPE, "not a regular file, folder or link"),
            (not self.recurse, "is a folder (recurse, -r, copies folders)"),
            (item.level >= DEPTH_LIMIT, f"more than {DEPTH_LIMIT} folders deep"),
            (real and f"{item.inside}/".startswith(f"{real}/"), "a link to a folder it is in"),
        ):
            if wrong:
                raise self._wrong(self._source, why)
        target, existing = await self._existing(item, _FOLDER_TYPE)
        if not existing:
            await self._destination.mkdir(target, _Attrs(permissions=0o700))
        if self.preserve or not existing:
            self._late.append((target, self._given(attrs, None)))
        level, fresh = item.level + 1, existing is None
        async for path, name, attrs in self._entries(item.path):
            child = _CopyItem(
                path, posixpath.join(target, name), level, item.depth + 1, fresh, real
            )
            with self._failing(path):
                await self._enter(child, attrs)

    async def _copy_link(self, item: _CopyItem) -> None:
        """A link of a tree, as it is; from a server only where it leads inside: relative, ``..``
        only in front and no further than the destination.
        """
        with self._failing(item.path):
            link = str(await self._source.readlink(item.path))
            steps = [step for step in link.split("/") if step not in ("", ".")]
            ups = steps.count("..")
            if self._wary and (
                not re.fullmatch(r"[^/\0][^\0]{,4000}", link)
                or ups >= item.depth
                or ".." in steps[ups:]
            ):
                raise self._wrong(
                    self._source,
                    f"refused a link that leads out, to {_brief(link) or repr('')} "
                    "(follow_symlinks, --follow, copies what it leads to)",
                )
            await self._existing(item, _LINK)
            async with self._replacing(item.target) as temporary:
                await self._destination.symlink(link, temporary)

    # one file

    async def _copy_file(self, item: _CopyItem, attrs: _Attrs) -> None:
        with self._failing(item.path):
            path = item.path
            if not self._wary and (self.follow_symlinks or not item.level):
                path = str(await self._source.realpath(path))
            source = await self._source.open(path, "rb", block_size=0)
            async with _closing(source) as file, self._arriving(item, attrs) as copied:
                await self._stream(file, copied, attrs.size or 0)

    async def _existing(self, item: _CopyItem, wanted: int) -> tuple[str, _Attrs | None]:
        """Where this entry goes, and what of the wanted kind is there. A link that the user named
        is resolved; in a tree it is replaced, for somebody else may have put it there. A folder,
        and what is neither file nor link, gives way to nothing.
        """
        target = item.target
        existing = None if item.fresh else await self._look(target)
        if self._pushing and item.level == 0 and existing and existing.type == _LINK:
            target = str(await self._destination.realpath(target))
            existing = await self._look(target)
        if existing is None or existing.type in (wanted, _UNKNOWN):
            return target, existing
        if {existing.type, wanted} == {_LINK, _REGULAR} and not self.inplace:
            return target, None
        what = _CALLED.get(existing.type, "a special file")
        raise self._wrong(self._destination, f"{what} has that name")

    def _given(self, source: _Attrs, existing: _Attrs | None) -> _Attrs:
        """What a copy gets: the mode bits of its source, with preserve the times too; else those
        of what was there. Setuid and the like not from a server.
        """
        given = _Attrs()
        like = source if self.preserve or existing is None else existing
        if like.permissions is not None:
            plain = self._wary or not (existing or self.preserve)
            given.permissions = like.permissions & (0o777 if plain else 0o7777)
        if self.preserve:
            given.atime, given.mtime = source.atime, source.mtime
        if existing:
            given.uid, given.gid = existing.uid, existing.gid
        return given

    @contextlib.asynccontextmanager
    async def _arriving(self, item: _CopyItem, attrs: _Attrs) -> AsyncIterator[_File]:
        """A file to write, that becomes the target when it is whole."""
        target, existing = await self._existing(item, _REGULAR)
        overwriting = existing is not None and self.inplace
        place = contextlib.nullcontext(target) if overwriting else self._replacing(target)
        async with place as path:
            folder = _brief(posixpath.dirname(path) or ".", 200)
            private = _Attrs(permissions=0o600)
            how = "wb" if overwriting else "xb"
            try:
                file = await self._destination.open(path, how, private, block_size=0)
            except _MISSING as exc:
                exc.add_note(f"{folder}: no such folder")
                raise
            except _DENIED as exc:
                if not overwriting:
                    exc.add_note(f"{folder}: {_reason(exc)} for a temporary file ({_INPLACE})")
                raise
            async with _closing(file):
                yield file
                given = self._given(attrs, existing)
                if existing is None:
                    await file.setstat(given)
                    return
                with contextlib.suppress(OSError, asyncssh.SFTPError):
                    await file.setstat(given)
                    if (given.permissions or 0) & 0o7000:  # the change of owner has cleared these
                        await file.setstat(_Attrs(permissions=given.permissions))

    @contextlib.asynccontextmanager
    async def _replacing(self, target: str) -> AsyncIterator[str]:
        """A name beside the target; what is made there becomes the target, or is removed."""
        files, shown = self._destination, _brief(target, 200)
        folder = posixpath.dirname(target)
        temporary = posixpath.join(folder, f".new.apssh-{os.urandom(8).hex()}")
        new, problem, removed = escape(temporary), "", False
        try:
            yield temporary
            problem = f"{shown} cannot be replaced"
            try:
                await files.posix_rename(temporary, target)
            except asyncssh.SFTPOpUnsupported:
                removed = True  # from the request on: its answer may never come
                try:
                    await files.remove(target)
                    problem = f"{shown} has been removed, and its new content is in {new}"
                except asyncssh.SFTPError as exc:
                    removed = isinstance(exc, _LOST)
                    if not isinstance(exc, _MISSING):
                        raise
                await files.rename(temporary, target)
        except BaseException as exc:
            if removed and isinstance(exc, (asyncio.CancelledError, *_LOST)):
                # a timeout too: nobody sees the notes of these
                _screen.say(
                    f"{escape(self.host)}: {shown} may be gone: its new content is then in {new}"
                )
            if problem:
                exc.add_note(f"{problem}: {_reason(exc)} ({_INPLACE})")
            if removed:
                raise
            if isinstance(exc, asyncssh.SFTPFailure) and isinstance(files, asyncssh.SFTPClient):
                async with _in_short():  # OpenSSH says only "Failure" when a disk is full
                    disk = await files.statvfs(folder or ".")
                    if disk.bavail * disk.frsize < CHUNK:
                        exc.add_note("no space left on the device")
            async with _in_short():
                await files.remove(temporary)
            raise

    async def _stream(self, file: _File, copied: _File, size: int) -> None:
        """Block after block to the real end, by as many workers as fill the window for the size
        that was announced; it may be any. A worker that meets the end, or fails, lets the others
        finish the blocks that they have. One that gets all that was announced, where it asked for
        more, needs no further request to know the end. The requests are ours, for asyncssh's own
        would outlive a loss or a cancellation.
        """
        most = min(self._source.limits.max_read_len, self._destination.limits.max_write_len)
        block = max(min(most, CHUNK // 4), 1)
        starts = itertools.count(0, block)
        ended = False

        async def work() -> None:
            nonlocal ended
            try:
                while not ended:
                    position = next(starts)
                    wanted = block
                    while wanted:
                        # no more than there may be: space for a block costs as much as a file
                        ask = min(wanted, size + 1 - position) if position <= size else wanted
                        data = cast("bytes", await file.read(ask, position))
                        if len(data) > ask:
                            raise self._wrong(
                                self._source, "the server sent more of it than was asked for"
                            )
                        if data:
                            await copied.write(data, position)
                        position += len(data)
                        wanted -= len(data)
                        self.step.bytes_transferred += len(data)
                        if not data or (wanted and position == size):
                            return
                    if position > size + SURPLUS_LIMIT:
                        raise self._wrong(self._source, "goes on far beyond its size: given up")
            finally:
                ended = True

        workers = min(size, 2 * CHUNK) // block
        if workers < 2:  # most files: a task would cost as much as the copy
            await work()
            return
        async with _UnderWay(workers) as under_way:
            for _ in range(workers):
                await under_way.start(work)


# --------------------------------------------------------------------------------------------------
# nodes: connections, sessions and their guard, SshNode and LocalNode
# --------------------------------------------------------------------------------------------------


def _in_daemon(function: Callable[..., _T], *args: Any) -> asyncio.Future[_T]:
    """Run it in a thread that nobody waits for at the end: a resolver may never answer, who types
    may never type.
    """
    came: Future[_T] = Future()
    # the thread may end it, whatever becomes of us
    came.set_running_or_notify_cancel()

    def work() -> None:
        try:
            came.set_result(function(*args))
        except BaseException as exc:
            came.set_exception(exc)

    threading.Thread(target=work, daemon=True).start()
    return asyncio.wrap_future(came)


def _raise_file_limit() -> int:
    """Raise the soft limit on open files to the hard one; the number of files that can be open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 1 << 20 if hard == resource.RLIM_INFINITY else hard
    if soft < most:
        with contextlib.suppress(ValueError, OSError):  # macOS refuses more than it names elsewhere
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


# Who queues for what, in the order in which a host comes through it:
#
# - its turn: the window, and no more hosts than files can be open, less 100 (_fan_out; a copy
#   needs 66, a proxy command two; jobs have asynciojobs' window), until its node is closed;
# - a login: STARTUPS_PER_HOST at once for one address, port and gateway, from before its connection
#   to its end (_try);
# - a TCP connection: CONNECTS, until it is connected (_open_socket; no gateway, no proxy command);
# - the look-up of its name meanwhile: LOOKUPS, in the loop of programs and plain functions (_Loop);
# - the key exchange: HANDSHAKES, gateways apart, from the server's first bytes (or the gateway's
#   login) to the end of the login, or HANDSHAKE_TURN seconds (_try);
# - a session: SESSIONS_PER_CONNECTION on a link, until its channel ends; a refusal lowers that for
#   the link (_on_link). CONNECTIONS_PER_NODE links, opened one at a time; one that fails while
#   others are at work lowers that for the node (_with_room). SFTP holds a session as long as it
#   lives. A command with stdin has a link of its own;
# - files of one copy, or of a script: FILES_IN_FLIGHT (_UnderWay).
#
# The time-out of a connection stands still while it queues for a turn of _Clock, and only then: it
# runs while a name is looked up, and between attempts.
class _Limits:
    """What one event loop may do at once, whatever asks for it: programs, jobs, quick scripts."""

    def __init__(self) -> None:
        self.open_files = _raise_file_limit()
        _key_memory.given_up.clear()  # a new run asks anew
        self._asking: dict[object, _Shared] = {}
        self._answers: dict[object, Any] = {}
        # those of configs
        self.gateways = weakref.WeakValueDictionary[object, SshNode]()
        self._gates = weakref.WeakValueDictionary[tuple[object, ...], asyncio.Semaphore]()

    @classmethod
    def here(cls) -> _Limits:
        """Those of the running loop, kept by the loop itself: they refer to it, and go with it."""
        state = vars(asyncio.get_running_loop())
        if "_apssh_limits" not in state:
            state["_apssh_limits"] = cls()
        limits: _Limits = state["_apssh_limits"]
        return limits

    async def answer(self, question: object, find: Callable[[], Awaitable[_T]]) -> _T:
        """What is found out once, for all who ask this question until the answer is forgotten."""
        if question not in self._answers:
            self._answers[question] = await _Shared.once(self._asking, question, find)
        answer: _T = self._answers[question]
        return answer

    def forget(self, question: object) -> None:
        """Who asks this next has it found out anew: it was wrong, or may be by now."""
        self._answers.pop(question, None)

    def gate(self, most: int, *what: object) -> asyncio.Semaphore:
        """At most so many at once of what is named; it is there as long as somebody has a turn."""
        return self._gates.setdefault(what, asyncio.Semaphore(most))


class _Clock:
    """The time that a connection, or a command, may take; it stands still while that queues for a
    turn, or somebody is asked.
    """

    def __init__(self, seconds: float | None) -> None:
        self.scope = asyncio.timeout(seconds)
        self.stage = ""  # how far the last attempt came
        self.drops = 0  # how often the server cut it before login

    @property
    def progress(self) -> str:
        """How far it came, for somebody who has waited in vain."""
        if self.drops:
            return f"dropped before login, {_count(self.drops, 'time')}"
        return self.stage

    @contextlib.asynccontextmanager
    async def turn(
        self, gate: asyncio.Semaphore, at_most: float | None = None
    ) -> AsyncIterator[None]:
        """Take a slot of this gate; it is given back after ``at_most`` seconds, when the work takes
        longer.
        """
        with self.stopped():
            await gate.acquire()
        give_back = functools.cache(gate.release)  # once
        loop = asyncio.get_running_loop()
        timer = loop.call_later(at_most, give_back) if at_most else None
        try:
            yield
        finally:
            give_back()
            if timer:
                timer.cancel()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """It stands still meanwhile."""
        when, now = self.scope.when(), asyncio.get_running_loop().time
        since = now()
        self.scope.reschedule(None)
        yield
        if when is not None:
            self.scope.reschedule(when + now() - since)


# of the connection that a task makes: asyncio looks its name up with no word of whose it is
_clock_here = contextvars.ContextVar[_Clock]("clock")


class _Loop(asyncio.SelectorEventLoop):
    """The event loop of the programs and of the plain functions: names are looked up in threads
    that do not keep it from ending.
    """

    async def getaddrinfo(self, *args: Any, **keywords: Any) -> Any:
        """Look a name up as socket.getaddrinfo does, LOOKUPS of them at once."""
        gate = _Limits.here().gate(LOOKUPS, "lookup")
        clock = _clock_here.get(None)
        async with clock.turn(gate) if clock else gate:
            return await _in_daemon(functools.partial(socket.getaddrinfo, *args, **keywords))


def _retrieve_exception(task: asyncio.Future[Any]) -> None:
    """For a task that perhaps nobody waits for any more: asyncio would warn of its failure."""
    if not task.cancelled():
        task.exception()


class _Shared:
    """A task that several coroutines wait for."""

    def __init__(self, work: Awaitable[Any]) -> None:
        self.task = asyncio.ensure_future(work)
        self.task.add_done_callback(_retrieve_exception)
        self.waiters = 0

    @classmethod
    async def once(
        cls,
        under_way: dict[object, _Shared],
        name: object,
        work: Callable[[], Awaitable[Any]],
    ) -> Any:
        """The result of this work, or its exception; who asks while it is under way waits for the
        same. Cancelling the last wait cancels the work, and waits for its clean-up.
        """
        if name not in under_way:
            under_way[name] = cls(work())
        shared = under_way[name]
        shared.waiters += 1
        try:
            return await asyncio.shield(shared.task)
        finally:
            shared.waiters -= 1
            if shared.task.done() or not shared.waiters:
                # nobody may join any more
                if under_way.get(name) is shared:
                    del under_way[name]
                if shared.task.cancel():
                    await asyncio.wait([shared.task], timeout=CLOSE_TIMEOUT)


# The guard: what ends a command over there when its channel closes before it.
#
# sshd made the session's process leader of a process group. Before it becomes the user's login
# shell with the command, as under plain ssh, it leaves a watchdog in that group (so that the
# group's number cannot be used again), which waits for the end of the channel's stdin; the command
# itself gets /dev/null. Where stdin is data the watchdog looks each second for sshd's process of
# this connection and for the leader instead. When the leader ends first sshd closes stdin, and
# the watchdog goes; when the leader still lives, it sends TERM to the group, and 2 s later KILL,
# which takes the watchdog too. Without these details it fails:
#
# - TMOUT, which hardening guides export, is the default time of `read` where sh is bash.
# - Signals are ignored by an empty trap: with a handler the `read` of dash and busybox ends at a
#   TERM or HUP, and the command with it. Its `sleep` inherits that, and survives its own TERM.
# - It keeps the reading ends of the outputs (where /proc gives them): a command that prints would
#   else die of SIGPIPE before its children are ended, and these be taken for left on purpose.
#   A dropbear server's cannot be opened, nor any without /proc; the attempt is silent.
# - Its outputs are /dev/null, or the channel would never close; csh leaves copies of its own
#   outputs in 3 to 5, so these are closed first.
# - Its text comes in the environment, so that its argument list holds no word that an
#   administrator's `pkill -f` looks for; nor the command's.
# - An ordinary user may not signal root's processes (sudo, dropbear's server): EPERM is no sign of
#   a process that has gone, so /proc is asked as well.
#
# All of it travels as one word in single quotes that holds no single quote, no exclamation mark and
# no backslash but before the digits of a byte, so that any login shell (csh, fish) passes it on;
# printf %b decodes it.
_WATCHDOG = (
    'unset TMOUT; trap "" HUP INT TERM; lives() {{ kill -0 $1 || [ -d /proc/$1 ]; }}; {wait}; '
    "if lives $1; then kill -s TERM 0; kill -s CONT 0; sleep 2; {cleanup}kill -s KILL 0; fi"
)
# What the watchdog waits for, by what must end the command; and what goes before and after it, for
# the end of stdin: the command's own is /dev/null.
_WATCHED = {
    "stdin": {
        "wait": "while read -r x; do :; done",
        "before": "exec 3<&0 </dev/null; ",
        "stdin": "<&3",
        "after": "exec 3<&-; ",
    },
    "connection": {
        "wait": "while [ $2 -gt 1 ] && lives $2 && lives $1; do sleep 1; done",
        "before": "",
        "stdin": "</dev/null",
        "after": "",
    },
}
_LEAVE_WATCHDOG = (
    "{before}( ( exec 4<&- 5<&- 6>&2 2>/dev/null; "
    "command exec 4</proc/self/fd/1; command exec 5</proc/self/fd/6; exec 6>&- >/dev/null; "
    "apssh_guard={watchdog} exec /bin/sh -c 'eval \"$apssh_guard\"' apssh-guard $$ {sshd} ) "
    "{stdin} 3<&- & ); {after}"
)
# sshd gives the login shell its short name, which $0 and its messages show
_LOGIN_SHELL = (
    "apssh_x=${SHELL:=/bin/sh}; apssh_y=${apssh_x##*/}; "
    '[ "$(command -v "$apssh_y")" -ef "$apssh_x" ] 2>/dev/null && apssh_x=$apssh_y; '
    'exec "$apssh_x" -c '
)


def _inert(text: str) -> str:
    """Text in an alphabet that no shell reads inside single quotes, for printf %b."""
    return re.sub(
        r"[^ -~\xa0-\ud7ff\ue000-\U0010ffff]|[\\'!]",
        lambda match: "".join(f"\\0{byte:03o}" for byte in os.fsencode(match[0])),
        text,
    )


def _decoded(script: str) -> str:
    """The command line that has sh run this script."""
    return f"""/bin/sh -c 'eval "$(printf %b "$1")"' apssh '{_inert(script)}'"""


def _guarded(command: str, session: _Session) -> str:
    """The command line to send so that this command runs as it would anyway, under the guard.

    Under sudo the guard is root's, so that it may end the command, and says with a mark that the
    command begins.
    """
    steps, talk = [], session.talk
    if session.watch:
        cleanup = f"rm -rf {shlex.quote(session.folder)}; " if session.folder else ""
        watched = _WATCHED[session.watch]
        watchdog = shlex.quote(_WATCHDOG.format(cleanup=cleanup, **watched))
        sshd = "$2" if talk else "$PPID"
        steps.append(_LEAVE_WATCHDOG.format(watchdog=watchdog, sshd=sshd, **watched))
    steps += [f"export {name}={shlex.quote(value)}; " for name, value in session.env.items()]
    if talk:
        mark = " ".join(talk.halves)
        steps.append(f"printf %s {mark} >&2; cd . 2>/dev/null || cd /; ")
    if session.quiet:
        steps.append("exec >/dev/null 2>&1; ")
    line = _decoded("".join([*steps, _LOGIN_SHELL, shlex.quote(command)]))
    if talk:
        sudo = f"sudo -S -p {talk.prompt} -u {shlex.quote(str(session.sudo))}"
        line = _decoded(f"exec {sudo} -- {line} $PPID")
    return f"exec {line}"


class _SudoTalk:
    """What sudo says before its command begins, held until a mark made for this run shows that it
    has begun. The prompt is another such mark, so that nothing else gets a password.
    """

    def __init__(self, sink: _Sink, pty: bool) -> None:
        self._sink, self._pty = sink, pty
        self.prompt = os.urandom(12).hex()
        # printed as one; a sudo that refuses the command prints all of it
        self.halves = os.urandom(6).hex(), os.urandom(6).hex()
        self.heard, self.begun = asyncio.Event(), asyncio.Event()  # heard: it asks, or has begun
        self._said = b""

    def data(self, data: bytes, datatype: int | None) -> None:
        """Pass what the command prints, and hold what sudo says. Raises CommandFailedError when
        sudo asks again: the password was refused.
        """
        # sudo talks on stderr; the command's stdout may overtake the mark
        if self.begun.is_set() or not (datatype or self._pty):
            self._sink.data(data, datatype)
            return
        # lectures and warnings are none of the command's output
        mark = "".join(self.halves).encode()
        said, begun, output = (self._said + data).partition(mark)
        if begun:
            self.begun.set()
            self.heard.set()
            self._sink.data(output, datatype)
            return
        before, asks, after = said.partition(self.prompt.encode())
        self._said = (before + after)[-SUDO_SAYS:]
        if asks and self.heard.is_set():
            _Limits.here().forget("sudo")  # it may have been mistyped
            raise CommandFailedError("sudo: the password was refused", kind="auth")
        if asks:
            self.heard.set()

    def end(self) -> None:
        self._sink.end()

    def failure(self) -> ApsshError:
        """Why sudo did not run the command: its last words."""
        said = self._said.decode("utf-8", "replace").strip()
        said = re.sub("execute '.*' as", "execute /bin/sh as", said)
        # the last line but that of a plugin, which fails with the rest
        lines = [line for line in said.splitlines() if "audit plugin" not in line]
        why = _brief(lines[-1].removeprefix("sudo: "), 200) if lines else "it said nothing"
        hint = " (--pty, pty=True, gives one)" if "must have a tty" in why else ""
        return CommandFailedError(f"sudo: {why}{hint}", kind="auth")


class _ProxyCommand:
    """A proxy command of ssh_config(5): a process whose standard input and output lead to the
    server.
    """

    def __init__(self, command: str) -> None:
        self.command = command
        self.last_words = b""  # of its standard error
        self.socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", f"exec {command}"],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        """Keep the end of what it says, and leave no zombie."""
        assert self._process.stderr
        with self._process.stderr as stderr:
            while said := os.read(stderr.fileno(), 4096):
                self.last_words = (self.last_words + said)[-2000:]
        self._process.wait()

    def end(self) -> None:
        """Send TERM to its process group, and wait for nobody."""
        with contextlib.suppress(OSError):
            if self._process.returncode is None:
                os.killpg(self._process.pid, signal.SIGTERM)

    async def epitaph(self) -> str:
        """What is to be said of one that gave no connection."""
        await asyncio.to_thread(self._listener.join, CLOSE_TIMEOUT)
        lines = self.last_words.decode("utf-8", "replace").strip().splitlines()
        said = f": {_brief(lines[-1], 200)}" if lines else ""
        return f"the proxy command ended: {_brief(self.command, 200)}{said}"


class _Connected(asyncio.Protocol):
    """Gives a link the socket of a transport as soon as it is connected, and ends the transport at
    once, so that nothing is read: uvloop goes on to read where the reading was only paused here.
    """

    def __init__(self, link: _Link) -> None:
        self._link = link

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        connected = transport.get_extra_info("socket")
        try:
            self._link.sock = socket.socket(fileno=os.dup(connected.fileno()))
        except OSError as exc:  # it was the last file that can be open
            self._link.why = exc
        cast("asyncio.Transport", transport).abort()


async def _while_asking(function: Callable[..., _T], *args: Any) -> _T:
    """Do what may ask on the terminal while the loop runs on, and sees Ctrl-C. Cancelling it gives
    the terminal back as it was: who types may never type, and the thread that waits is left behind.
    """
    with _screen.asking():
        return await _in_daemon(function, *args)


class _Verdict(enum.Enum):
    """What to do after an attempt to log in that failed."""

    AGAIN = "after a pause, for the server dropped it before the login (sshd's MaxStartups)"
    PLAIN_KEY = "with the plain host key: its certificate did not count, as ssh does"
    NEXT_KEYS = "with the keys that were not offered: the server takes a few only (MaxAuthTries)"
    FAIL = "not at all"


class _Link(asyncssh.SSHClient):
    """One ssh connection: the attempt to make it (``SshNode._try``), what asyncssh asks meanwhile
    (host keys, keys and password to offer), the sessions that are open on it, its end.

    It refers to no node, since asyncssh refers to it: a node that is forgotten is gone at once, and
    its sockets with it.
    """

    conn: asyncssh.SSHClientConnection  # once there is a way to the server
    sock: socket.socket | None = None  # there is none behind a gateway
    proxy: _ProxyCommand | None = None
    stage = "no answer"  # how far it came
    foreign = ""  # what the server said instead of an ssh banner
    begun = False  # the server's key was accepted and the login has begun
    alive = True
    why: Exception | None = None  # it was lost
    host_key_error: HostKeyError | None = None
    sessions = 0
    forwards = False  # leads to other nodes
    reserved = False  # for one session that must be alone
    _kbdint_begun = False

    def __init__(self, node: SshNode, pairs: list[asyncssh.SSHKeyPair], trust: _Trust) -> None:
        self._host, self._username = node.hostname, node.username
        self._formatter, self._password = node.formatter, node._password
        self._talks = node.verbose or node.formatter.verbose
        self.trust, self._pairs = trust, pairs
        self.offered: list[asyncssh.SSHKeyPair] = []
        self.password_tried: set[str] = set()
        self.limit = SESSIONS_PER_CONNECTION

    # the attempt

    async def hear(self) -> None:
        """Wait for the first bytes of the server, and look at them; asyncssh will read them."""
        sock = self.sock
        assert sock
        sock.setblocking(False)
        loop, readable = asyncio.get_running_loop(), asyncio.Event()
        self.stage = "connected, but the server says nothing"
        loop.add_reader(sock, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(sock)
        greeting = sock.recv(100, socket.MSG_PEEK)
        if not greeting:
            raise asyncssh.ConnectionLost("Connection lost")
        self.stage = "the key exchange does not end"
        if b"SSH-" not in greeting:
            line = greeting.decode("ascii", "replace").strip().partition("\n")[0].strip()
            self.stage = self.foreign = f"not an ssh server: it says {_brief(line)!r}"

    @property
    def greeted(self) -> bool:
        """Whether the server has shown itself as one of ssh."""
        return hasattr(self, "conn") and bool(self.conn.get_extra_info("server_version"))

    def was_dropped(self, exc: Exception) -> bool:
        """Whether the server, or what leads to it, cut the connection before the login began."""
        cut = isinstance(exc, asyncssh.ConnectionLost | ConnectionResetError | BrokenPipeError)
        foreign = self.foreign and "MaxStartups" not in self.foreign
        return cut and not (foreign or self.begun or self.proxy)

    def verdict(self, exc: Exception, drops: int, rounds: int) -> _Verdict:
        """What to do after this attempt, which ended so: the server has dropped that many of them,
        and that many connections were spent on keys.
        """
        if self.host_key_error:
            return _Verdict.FAIL
        if self.was_dropped(exc):
            # a server that has shown itself has begun the key exchange: MaxStartups comes earlier
            most = 1 if self.greeted else RETRIES_BEFORE_LOGIN
            return _Verdict.AGAIN if drops <= most else _Verdict.FAIL
        if isinstance(exc, asyncssh.HostKeyNotVerifiable) and self.trust.certified:
            return _Verdict.PLAIN_KEY
        refused = isinstance(exc, asyncssh.PermissionDenied)
        if self.offered and self._pairs and not refused and rounds < MAX_AUTH_ROUNDS:
            return _Verdict.NEXT_KEYS
        return _Verdict.FAIL

    # what asyncssh asks

    def _passes(self, check: Callable[[asyncssh.SSHKey], object], key: asyncssh.SSHKey) -> bool:
        try:
            return check(key) is not False
        except HostKeyError as exc:
            self.host_key_error = exc
            return False

    def validate_host_public_key(
        self, host: str, addr: str, port: int, key: asyncssh.SSHKey
    ) -> bool:
        return self._passes(self.trust.check, key)

    def validate_host_ca_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        return self._passes(self.trust.check_authority, key)

    def connection_made(self, conn: asyncssh.SSHClientConnection) -> None:
        self.conn = conn
        if self.sock and not self.proxy and hasattr(socket, "TCP_QUICKACK"):
            self._acknowledge_at_once(self.sock)
        self._formatter.connection_made(self._host, self._username, self.sock is not None)

    def _acknowledge_at_once(self, sock: socket.socket) -> None:
        """Acknowledge what it receives without the usual delay, which the kernel falls back to by
        itself: the first command would else stall for 40 ms (the server's Nagle against our delayed
        acknowledgement).
        """
        receive = self.conn.data_received

        def data_received(data: bytes, datatype: int | None = None) -> None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            receive(data, datatype)

        vars(self.conn)["data_received"] = data_received

    def begin_auth(self, username: str) -> None:
        if self.trust.certified:
            key = self.conn.get_server_host_key()
            assert key
            if not self._passes(self.trust.check_certified, key):
                raise asyncssh.HostKeyNotVerifiable("revoked")
        self.begun = True
        self.stage = "the login does not end"
        try:
            if self.trust.record() and self._talks:
                _tell(self._host, f"recorded its key {self.trust.shown}")
        except ApsshError as exc:
            _tell(self._host, exc.message)

    def auth_banner_received(self, msg: str, lang: str) -> None:
        if self._talks:
            _tell(self._host, "banner: " + " ".join(msg.split()))

    def public_key_auth_requested(self) -> asyncssh.SSHKeyPair | None:
        if not self._pairs:
            return None
        self.offered.append(self._pairs.pop(0))
        return self.offered[-1]

    def _password_once(self, method: str) -> str | None:
        """The password, once for each method: PAM may refuse it in the one and take it in the
        other.
        """
        if method in self.password_tried or self._password is None:
            return None
        if self.trust.changed:
            _tell(
                self._host,
                "no password for a host whose key has changed: "
                "forget the old key (ssh-keygen -R), or known_hosts=None",
            )
            return None
        self.password_tried.add(method)
        return self._password

    def password_auth_requested(self) -> str | None:
        return self._password_once("password")

    def kbdint_auth_requested(self) -> str | None:
        begun, self._kbdint_begun = self._kbdint_begun, True
        return "" if self._password is not None and not begun else None

    def kbdint_challenge_received(
        self, name: str, instructions: str, lang: str, prompts: Sequence[tuple[str, bool]]
    ) -> list[str] | None:
        if not prompts:
            return []
        if len(prompts) > 1 or prompts[0][1]:  # what is echoed is no password
            return None
        secret = self._password_once("kbdint")
        return None if secret is None else [secret]

    def auth_completed(self) -> None:
        if self.offered:
            _key_memory.accepted.add(self.offered[-1].public_data)
        self._formatter.auth_completed(self._host, self._username)

    def connection_lost(self, exc: Exception | None) -> None:
        self.alive = False
        self.why = exc
        if self.proxy:
            self.proxy.end()
        if self.begun:
            self._formatter.connection_lost(self._host, exc, self._username)

    # its end

    def drop(self) -> None:
        """Cut it at once, whatever there is of it, even when its event loop is gone."""
        self.alive = False
        if hasattr(self, "conn"):
            transport = vars(self.conn).get("_transport")
            try:
                self.conn.abort()
            except RuntimeError:  # from a closed loop, which runs no callback
                if self.sock and isinstance(transport, asyncio.Transport):
                    # asyncio has no call to close such a transport, which would warn when collected
                    self.sock.close()
                    vars(transport)["_sock"] = None
        elif self.sock:
            self.sock.close()
        if self.proxy:
            self.proxy.end()

    async def close(self) -> None:
        """Close politely, within CLOSE_TIMEOUT; cancelling it cuts the connection."""
        self.alive = False
        try:
            with contextlib.suppress(TimeoutError, OSError, asyncssh.Error):
                self.conn.close()
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await self.conn.wait_closed()
        finally:
            self.drop()


_NEED_GUARD = "env and sudo need the guard: leave out --no-guard, guard=False"

# A failure to reach a host: the exception; what the server of a gateway says of it, whose words are
# all that there is; its kind; what we say.
_FAILURES = (
    (socket.gaierror, "not known|name resolution", "dns", "unknown host name {host}"),
    (ConnectionRefusedError, "refused", "refused", "nothing listens on port {port}"),
    (TimeoutError, "timed out", "timeout", "no answer"),
    (asyncssh.ChannelOpenError, "", "refused", "{where}: {words}"),
    (ValueError, "", "local", "{words}"),  # a config that leaves no algorithm
    (ConnectionError, "", "lost", "{words}"),
    (OSError, "", "refused", "{words}"),
    (Exception, "", "lost", "{words}"),
)
# what a resolver that works says of a name that is not there
_NO_SUCH_NAME = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", None))


_Channel: TypeAlias = asyncssh.SSHClientChannel[bytes]
_Status: TypeAlias = int | str  # of a command that ended: its exit status, or the signal's name


@dataclasses.dataclass(eq=False)
class _Session(asyncssh.SSHClientSession[bytes]):
    """One command line at work: how it is to run, as the keywords of Run say, its outputs on their
    way to the sink, and how it ended. ``quiet``: its outputs are /dev/null over there; ``folder``:
    what is removed with it; ``opened`` is told of its channel.

    An SshNode takes a link with room (``_on_link``) and opens a channel on it with what ``request``
    says (``_converse``); a LocalNode starts a process, with a channel to it. Both then have
    ``_Node._see_through`` call ``run``, the wait for its end with input meanwhile, and ``end``,
    which ends what still runs. ``outcome`` is the status of a remote one, or the error that tells
    why there is none.
    """

    command: str
    step: StepRecord
    x11: bool = False
    pty: bool = False
    stdin: AsyncIterator[bytes] | None = None
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sudo: bool | str = False
    quiet: bool = False
    folder: str = ""
    opened: Callable[[_Channel], None] | None = None
    timeout: float | None = None
    capture: Capture | None = None
    guard: bool = True
    link: _Link = dataclasses.field(init=False)
    sink: _Sink = dataclasses.field(init=False)
    clock: _Clock = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.chan: _Channel | None = None
        self.talk: _SudoTalk | None = None
        self.status: _Status | None = None
        self.error: Exception | None = None  # of this side
        self.whole = False  # all of the output has come
        self.ended = asyncio.Event()
        self._over = asyncio.Event()  # it has ended, or failed on this side
        self._writable = asyncio.Event()
        self._writable.set()

    @property
    def watch(self) -> str:
        """What tells the guard that it must end the command: the end of "stdin", the end of the
        "connection", or "" for no guard (a terminal hangs up).
        """
        if self.pty or not self.guard:
            return ""
        return "connection" if self.stdin else "stdin"

    def request(self) -> dict[str, Any]:
        """What asyncssh's create_session is told of it."""
        command = self.command
        if self.guard:
            command = _guarded(command, self)
        elif self.quiet:
            command = f"{{ {command}\n}} >/dev/null 2>&1"
        return {
            "command": command,
            "encoding": None,
            "window": SESSION_WINDOW,
            "x11_forwarding": self.x11,
            "request_pty": "force" if self.pty else False,
            "term_type": os.environ.get("TERM", "dumb"),
            "term_size": shutil.get_terminal_size(),
        }

    def connection_made(self, chan: _Channel) -> None:
        self.chan = chan

    def data_received(self, data: bytes, datatype: int | None) -> None:
        if datatype:
            self.step.bytes_err += len(data)
        else:
            self.step.bytes_out += len(data)
        try:
            if not self.error:
                with _writing_output():
                    self.sink.data(data, datatype)
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
        self.status = _brief(signal) if signal else "unknown"  # "" would be a status of none

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()
        self._over.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def fail(self, exc: Exception) -> None:
        """Let who waits for the end give up."""
        if not self._over.is_set():
            self.error = exc
            self._over.set()

    async def run(self, secret: Callable[[], Awaitable[str]]) -> None:
        """Wait for its end, or a failure on this side, and give it meanwhile what it reads;
        ``secret``: the password, for a sudo that asks. Cancelling it ends nothing over there.
        """
        assert self.chan
        if self.opened:
            self.opened(self.chan)
        giving = None
        if self.talk or self.stdin:
            giving = asyncio.create_task(self._give(secret))
        elif not self.watch and not self.pty:
            self.chan.write_eof()
        try:
            await self._over.wait()
        finally:
            if giving:
                giving.cancel()

    async def _give(self, secret: Callable[[], Awaitable[str]]) -> None:
        """Give sudo the password, if it asks, and then the command its standard input, at its pace,
        and the end of it.
        """
        assert self.chan
        what = "sudo password"
        try:
            if self.talk:
                await self.talk.heard.wait()
                if not self.talk.begun.is_set():
                    with self.clock.stopped():
                        typed = await secret()
                    self.chan.write(typed.encode() + b"\n")
                await self.talk.begun.wait()
            if self.stdin:
                what = "standard input"
                async for data in self.stdin:
                    await self._writable.wait()
                    if self.chan.is_closing():
                        return
                    self.chan.write(data)
                self.chan.write_eof()
        except Exception as exc:  # the iterator may be a user's
            known = isinstance(exc, ApsshError)
            self.fail(exc if known else ApsshError(f"{what}: {_reason(exc)}"))

    async def end(self) -> None:
        """End the command unless it has ended, and tell its step whether it may still be running.

        What the guard watches ends; the slot is free when the server says so. A shell that has
        ended by itself has left what holds its outputs, as under ssh: that stays. A second
        cancellation only waits no longer.
        """
        if self.ended.is_set():
            return
        assert self.chan
        self.step.may_run = True
        left_behind = self.status is not None
        within = CLOSE_TIMEOUT / 2
        try:
            if self.watch == "stdin" and not left_behind:
                self.chan.write_eof()
                within = GUARD_TIMEOUT  # TERM, and KILL 2 s later
            else:
                self.chan.abort()
            if self.watch == "connection":
                # the guard waits for the end of the connection: does the server hear us?
                self.link.conn.set_keepalive(CLOSE_TIMEOUT / 5, 1)
            # not asyncio.timeout, which in Python 3.11.2 (Debian 12) does not tell its own end from
            # a cancellation that was there before, such as that of a deadline
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.ended.wait(), within)
            heard = self.link.alive if self.watch == "connection" else self.ended.is_set()
            self.step.may_run = left_behind or not heard or not self.guard
        finally:
            self.abort()

    def abort(self) -> None:
        """Close its channel, and the connection where the guard waits for the end of that."""
        if self.chan:
            self.chan.abort()
        if self.watch == "connection":
            self.link.drop()

    def outcome(self) -> _Status:
        """The status of a command that has ended, or raises why there is none."""
        if self.error:
            raise self.error
        if self.link.alive:
            if self.talk and not self.talk.begun.is_set():
                raise self.talk.failure()
            if self.status is None and self.guard:
                raise CommandFailedError(
                    f"ended without an exit status: {escape(self.step.command)} "
                    "(--no-guard, guard=False, takes that for a success)",
                    kind="remote",
                    command=self.command,
                )
            return 0 if self.status is None else self.status  # some network devices tell none
        if self.status is None or not self.whole:
            raise self.lost()
        return self.status

    def lost(self) -> ConnectionFailedError:
        """The loss of its connection, whose host may run it all the same."""
        self.step.may_run = True
        why = f": {escape(str(self.link.why))}" if self.link.why else ""
        text = f"connection lost during {escape(self.step.command)}{why}"
        return ConnectionFailedError(text, command=self.command)


@contextlib.contextmanager
def _writing_output() -> Iterator[None]:
    """What goes wrong while a command's output is written here is told as that, a TimeoutError too,
    which would else be the end of the step's time. A closed pipe is nobody's failure.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as exc:
        raise ApsshError(f"its output could not be written: {_reason(exc)}") from exc


def _tell(host: str, text: str) -> None:
    """A word about a host on stderr, in apssh's own name."""
    _screen.say(f"{escape(host)}: {escape(text)}")


class _Node:
    """What SshNode and LocalNode share: running commands of a user's, and showing what happens."""

    hostname: str
    username: str
    port = 22
    gateway: SshNode | None = None
    _way = ""  # the gateways, as they were given
    formatter: Formatter
    verbose: bool | None
    guard = True
    debug = False
    _host_key_shown: str | None = None  # the fingerprint that it presented last
    _sudo_password: str | None = None

    async def connect_lazy(self) -> asyncssh.SSHClientConnection | None:
        """Connect unless it is done, or there is nothing to connect."""
        return None

    async def close(self) -> None:
        """Close what is open."""

    async def sftp_connect_lazy(self) -> _Files:
        """Open what gives access to the files there, unless it is open."""
        raise NotImplementedError

    async def _run_session(self, session: _Session) -> _Status:
        """Run one command line to its end, in a channel or a process of its own; its status."""
        raise NotImplementedError

    @property
    def _endpoint(self) -> Endpoint:
        return Endpoint(self.username, self.hostname, self.port, self._way)

    @property
    def shown_name(self) -> str:
        """The shortest text that tells it from the others of its formatter."""
        return self.formatter.endpoint_name(self._endpoint)

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

    @_keywords_checked
    async def run(
        self,
        command: str,
        *,
        timeout: float | None = None,
        ignore_outputs: bool = False,
        capture: Capture | None = None,
        **keywords: Unpack[_SetupKeywords],
    ) -> int | str:
        """Run a command line as ssh would; the exit status, or the signal's name without SIG.

        ``timeout``: seconds (None: no limit). ``ignore_outputs``: both streams are /dev/null over
        there. ``capture``: a Capture gets standard output. ``x11``: forward the DISPLAY. ``env``:
        variables for the command. ``pty``: give it a terminal. ``stdin``: what it reads (None: end
        of file at once). ``sudo``: run as root (True) or as the user of that name. Raises
        ConnectionFailedError when the host cannot be reached or is lost, CommandFailedError (kind
        timeout) when the command had to be ended. Cancelling it ends the command over there.
        """
        command_line = Run(
            command, timeout=timeout, ignore_outputs=ignore_outputs, capture=capture, **keywords
        )
        return await command_line.co_run_remote(cast("SshNode", self)) or 0

    @_keywords_checked
    async def put_file_s(
        self, localpaths: _Paths, remotepath: _Path, **keywords: Unpack[_CopyKeywords]
    ) -> None:
        """Copy local files there; the keywords are those of the command Push."""
        await Push(localpaths, remotepath, **keywords).co_run_remote(cast("SshNode", self))

    @_keywords_checked
    async def get_file_s(
        self, remotepaths: _Paths, localpath: _Path, **keywords: Unpack[_CopyKeywords]
    ) -> None:
        """Copy remote files here; the keywords are those of the command Pull."""
        await Pull(remotepaths, localpath, **keywords).co_run_remote(cast("SshNode", self))

    async def mkdir(self, path: str) -> None:
        """Make a folder there, parents included; one that exists is fine. ``~`` is the home.
        Raises TransferError, ConnectionFailedError.
        """
        sftp = await self.sftp_connect_lazy()
        with _file_errors(self.hostname, path):
            await sftp.makedirs(_there(sftp, path), exist_ok=True)

    async def put_string_script(self, body: str, remotefile: str) -> None:
        """Write a text into a file there that can be executed (mode 755). Raises TransferError,
        ConnectionFailedError.
        """
        sftp = await self.sftp_connect_lazy()
        await _Copy(self.hostname, StepRecord()).put(sftp, os.fsencode(body), remotefile, 0o755)

    @contextlib.asynccontextmanager
    async def _script_folder(
        self, files: _ScriptFiles, name: str, *, for_others: bool
    ) -> AsyncIterator[str]:
        """A private folder there that holds these files, removed afterwards: its path.

        It is called ``name``, unless there is one: hosts that share a home have one each.
        ``for_others``: for another user than the login, who may not enter its home; in /tmp then,
        under a name that nobody can guess nor list.
        """
        sftp = await self.sftp_connect_lazy()
        with _file_errors(self.hostname, f"~/{REMOTE_FOLDER}"):
            home = await sftp.realpath(_there(sftp, "~"))
        hall = f"{home}/{REMOTE_FOLDER}"
        if for_others:
            hall = f"/tmp/{REMOTE_FOLDER}-{os.urandom(8).hex()}"
        # where its maker is cancelled the host makes it all the same: it is waited for, and removed
        making = asyncio.ensure_future(self._make_private_folder(sftp, hall, name))
        patience = CLOSE_TIMEOUT
        try:
            with _file_errors(self.hostname, hall):
                folder = await asyncio.shield(making)
            async with _UnderWay(FILES_IN_FLIGHT) as writing:
                for file, (data, mode) in files.items():
                    mode |= 0o055 if for_others else 0
                    copying = _Copy(self.hostname, StepRecord())
                    await writing.start(copying.put, sftp, data, f"{folder}/{file}", mode)
            if for_others:
                for path, mode in ((folder, 0o755), (hall, 0o711)):
                    with _file_errors(self.hostname, path):
                        await sftp.setstat(path, asyncssh.SFTPAttrs(permissions=mode))
            yield folder
            patience = CONNECT_TIMEOUT  # nothing is wrong there: it may be far away
        finally:
            async with _in_short(patience):
                made = await making
                await sftp.rmtree(hall if for_others else made, ignore_errors=True)

    @staticmethod
    async def _make_private_folder(sftp: _Files, hall: str, name: str) -> str:
        """A new folder in a hall that is made if need be; its path. The name is tried once more
        when the hall is there, and another one where it is taken.
        """
        private = asyncssh.SFTPAttrs(permissions=0o700)
        # SFTP's version 3 has no word for what exists
        exists = FileExistsError, asyncssh.SFTPFileAlreadyExists, asyncssh.SFTPFailure
        folder = f"{hall}/{name}"
        for path in (folder, hall, folder):  # the hall is there, as a rule
            with contextlib.suppress(*exists, *_MISSING):
                await sftp.mkdir(path, private)
                if path == folder:
                    return folder
        folder = f"{hall}/{os.urandom(8).hex()}"
        await sftp.mkdir(folder, private)
        return folder

    async def _execute(self, session: _Session, sink: _Sink | None = None) -> _Status:
        """Run a command line; every way to run something comes through here. ``sink``: where the
        outputs go (default: the formatter).
        """
        command, step = session.command, session.step
        if not command.strip():
            raise UsageError(
                "an empty command: it would open a shell that nobody talks to", host=self.hostname
            )
        await self._apply_config()  # it may tell the user and the port, by which outputs are named
        sink = sink or self.formatter.endpoint_sink(self._endpoint)
        if session.capture:
            sink = held = _HeldSink(sink)
        session.sink = sink
        if session.sudo:
            session.sink = session.talk = _SudoTalk(sink, session.pty)
        step.command = step.command or command
        try:
            try:
                status = await self._run_session(session)
            finally:
                with _writing_output():
                    session.sink.end()
        except ApsshError as exc:
            if not isinstance(exc, UsageError):  # a session, a sink or standard input knows no host
                exc.host = exc.host or self.hostname
            raise
        except (TimeoutError, BrokenPipeError):  # the step's; not the command's failure
            raise
        except OSError as exc:
            message = f"on this machine: {_reason(exc)}"
            raise ApsshError(message, host=self.hostname, command=command) from exc
        if status == 126 and session.folder:
            _tell(
                self.hostname,
                f"{session.folder} cannot be executed there; where its file system is mounted "
                "noexec, give the script as standard input: apssh -I ... sh -s < SCRIPT, stdin=",
            )
        if session.capture:  # of a command that ended: half of an output, or none, is no value
            session.capture.store(held.stdout().decode("utf-8", "surrogateescape"))
        return status

    async def _apply_config(self) -> None:
        """Complete what was not given; nothing, as a rule."""

    async def _see_through(self, session: _Session) -> None:
        """From an open channel to the end, which the formatter hears of; what still runs when this
        is left, a formatter's failure included, is ended.
        """
        try:
            with _writing_output():
                self.formatter.endpoint_started(self._endpoint)
            self.formatter.session_start(self.hostname, session.command)
            try:
                await session.run(self._sudo_secret)
            finally:
                self.formatter.session_stop(self.hostname, session.command)
        finally:
            await session.end()

    async def _sudo_secret(self) -> str:
        """The password for sudo: the node's, or what the terminal answers, asked once for all."""
        if self._sudo_password is not None:
            return self._sudo_password
        ask = functools.partial(_while_asking, _ask_secret, "sudo password")
        return await _Limits.here().answer("sudo", ask)


def _check_time(seconds: float | None) -> None:
    """Raises UsageError for a limit that cannot be."""
    if seconds is not None and seconds <= 0:
        raise UsageError(f"timeout {seconds!r}: seconds, more than 0 (None: no limit)")


class SshNode(_Node):
    """How to reach a host by ssh: a lazy connection, shared by all that uses the node.

    Nothing is read, asked or opened before the first use. ``username`` defaults to root. ``keys``:
    file names or key objects; None or empty: what ``load_private_keys()`` finds. ``gateway``: the
    SshNode to go through, to any depth. ``known_hosts``: by default the host's key is verified, and
    recorded when the host was never seen; None verifies nothing; a path uses that file; a list of
    ``asyncssh.SSHKey`` trusts these alone. ``timeout``: seconds (30) to a ready connection, all
    hops, key exchange and login included, waiting for a turn excluded; None: no limit.
    ``formatter``: where output goes, by default a HostFormatter.

    ``verbose``, ``debug``: a word on stderr of what happens to its connections and commands.

    Further: ``password``, tried where keys do not do; ``sudo_password``: for sudo where it asks
    (else the terminal is asked, once for all hosts); ``host_keys``: accept-new, yes or no, over
    APSSH_HOST_KEYS; ``config``: an ssh_config file, or True for the user's own (the user is then
    its User, else yours; its jump hosts get keys, password, host_keys and timeout of this node);
    ``guard``: False for hosts without a POSIX shell (commands then outlive a lost connection, and a
    channel that closes without an exit status is a success); ``keepalive``: seconds between probes
    of a silent connection (9; dead after two unanswered); ``forward_agent``; ``address``: what to
    connect to when it is not ``hostname``; ``proxy_command``, as in ssh_config(5).
    Attributes ``reached``: whether it was ever logged in to; ``host_key_recorded``: whether its key
    was recorded then, the host never seen before. Raises UsageError for a host name, port or time
    that cannot be.
    """

    reached = False
    host_key_recorded = False
    _host_config = _UNCONFIGURED
    _keys_missed: Sequence[str] = ()  # where keys were looked for, when there were none
    _guard_works: bool | None = None  # not known yet
    _live: _Live | None = None
    _leads = False  # others go through it

    @_keywords_checked
    def __init__(
        self,
        hostname: str,
        *,
        username: str | None = None,
        keys: Collection[StrPath | Key] | None = None,
        gateway: SshNode | None = None,
        known_hosts: _KnownHostsChoice = _VERIFY,
        port: int = 22,
        formatter: Formatter | None = None,
        verbose: bool | None = None,
        debug: bool = False,
        timeout: float | None = CONNECT_TIMEOUT,
        password: str | None = None,
        sudo_password: str | None = None,
        host_keys: str | None = None,
        config: str | bool | _HostConfig | None = None,
        guard: bool = True,
        keepalive: float = KEEPALIVE_INTERVAL,
        forward_agent: bool = False,
        address: str | None = None,
        proxy_command: str | None = None,
    ) -> None:
        self._given = Hop(hostname, username or None, None if port == 22 else port)
        if problem := _problem(Hop(hostname, port=port)):
            raise UsageError(f"host {_brief(repr(hostname))}: {problem}")
        _check_time(timeout)
        if not isinstance(gateway, SshNode | None):
            raise UsageError(f"gateway of {hostname}: an SshNode, not {gateway!r}")
        if host_keys not in (None, *_POLICIES):
            raise UsageError(f"host key policy {_brief(str(host_keys))}: accept-new, yes or no")
        if sudo_password and "\n" in sudo_password:
            # the command would read what follows
            raise UsageError(f"sudo_password of {hostname}: there is a newline in it")
        self.hostname = hostname
        self.username = username or "root"
        self.port = port
        self.gateway = gateway
        self.keys = [keys] if isinstance(keys, str | os.PathLike) else list(keys or ())
        self.known_hosts = known_hosts
        self.host_keys = host_keys
        self.timeout = timeout
        self.debug = debug
        self.guard = guard
        self.keepalive = keepalive
        self.forward_agent = forward_agent
        self._way = str(gateway or "")
        self._address = address or hostname
        self._proxy_command = proxy_command
        self._password = password
        self._sudo_password = sudo_password
        self._config = config
        self._target = hostname  # as the command line named it
        if isinstance(config, _HostConfig):
            self._complete(config)
        self._adopt(formatter, verbose)

    def __str__(self) -> str:
        """The way to it: ``user@gw->root@host``; a port that is not 22 is shown, ``host:2222``."""
        return "->".join(
            str(Hop(hop.hostname, hop.username, None if hop.port == 22 else hop.port))
            for hop in self._hops()
        )

    def _complete(self, config: _HostConfig) -> None:
        """Take from a config what was not given, which is what has its default. The config holds
        the user and the port that the node, or a target, named.
        """
        self._host_config = config
        if self._address == self.hostname:
            self._address = config.hostname or self.hostname
        self.username = config.user
        self.port = config.port or 22
        if self.timeout == CONNECT_TIMEOUT:
            self.timeout = config.seconds("connecttimeout") or CONNECT_TIMEOUT
        if self.keepalive == KEEPALIVE_INTERVAL:
            self.keepalive = config.seconds("serveraliveinterval") or KEEPALIVE_INTERVAL
        self._proxy_command = self._proxy_command or config.command("proxycommand")

    def __repr__(self) -> str:
        return f"<SshNode {self}>"

    def __del__(self) -> None:
        # a node that is forgotten once its loop has gone leaves no socket
        if self._live:
            self._live.drop()

    # connection

    @property
    def open_files(self) -> int:
        """How many files one of its connections is: a proxy command is two."""
        return 2 if self._proxy_command else 1

    def distance(self) -> int:
        """The number of hops: 1 without a gateway. Raises UsageError when a gateway is behind
        itself.
        """
        return len(self._hops())

    def _hops(self) -> list[SshNode]:
        """The nodes on the way, the farthest gateway first, this node last."""
        hops = [self]
        while gateway := hops[0].gateway:
            if gateway in hops:
                raise UsageError(
                    f"{self.hostname}: its gateways go in a circle, through {gateway.hostname}"
                )
            hops.insert(0, gateway)
        return hops

    def is_connected(self) -> bool:
        """Whether a connection is up (it may have to be made anew if its event loop is gone)."""
        return bool(self._live and self._live.up)

    def is_sftp_connected(self) -> bool:
        """Whether an SFTP session is open."""
        return bool(self._live and self._live.sftp and self._live.sftp.alive)

    async def connect_lazy(self) -> asyncssh.SSHClientConnection:
        """Connect unless it is done; concurrent calls make one connection. Raises
        ConnectionFailedError.
        """
        return (await self._connected()).conn

    async def sftp_connect_lazy(self) -> asyncssh.SFTPClient:
        """Open an SFTP session (names are text with surrogateescape) unless it is done. Raises
        ConnectionFailedError, TransferError.
        """
        live = self._here()
        if not self.is_sftp_connected():
            open_sftp = functools.partial(self._open_sftp, live)
            await _Shared.once(live.opening, "sftp", lambda: self._on_link(open_sftp))
        if live.sftp is None:  # forgotten by a command that looked for room
            raise ConnectionFailedError("SFTP ended as soon as it was there", host=self.hostname)
        return live.sftp.client

    async def close(self) -> None:
        """Close the connections, politely if their loop runs, else at once. The gateway's stay
        open.
        """
        live, self._live = self._live, None
        if live and live.loop is asyncio.get_running_loop():
            if live.sftp:
                live.sftp.client.exit()
                self.formatter.sftp_stop(self.hostname)
            await asyncio.gather(*(link.close() for link in live.up))
        elif live:
            live.drop()

    def _here(self) -> _Live:
        """What is open in this event loop; what another loop has left is dropped. Raises
        UsageError while another loop, which runs, has something open.
        """
        loop = asyncio.get_running_loop()
        live = self._live
        if live and live.loop is not loop:
            if live.loop.is_running() and live.up:
                raise UsageError(
                    "it is connected in another event loop that runs: give each loop a node of "
                    "its own, or close() it there first",
                    host=self.hostname,
                )
            live.drop()
            live = None
        if live is None:
            self._live = live = _Live(loop)
        return live

    async def _connected(self) -> _Link:
        """A link that is up, by preference the first."""
        live = self._here()
        while not (links := [link for link in live.up if not link.reserved]):
            await self._add_link(live)
        return links[0]

    async def _add_link(self, live: _Live) -> None:
        """One more connection; concurrent calls wait for the same, and share its failure. A link
        that is ready is the node's at once: who waited may have been cancelled just then.
        """

        async def connect() -> None:
            link = await self._connect()
            self.reached = True
            if self._live is not live:
                await link.close()
                raise ConnectionFailedError("closed while it connected", host=self.hostname)
            live.links = [*live.up, link]
            live.wake()

        await _Shared.once(live.opening, "link", connect)

    async def _with_room(self, live: _Live, alone: bool) -> _Link:
        """A link with room for one more session; ``alone``: with nothing else on it, to be cut.

        sshd refuses the eleventh session of a connection (MaxSessions), so there may be further
        connections; a host that takes no more of them has its steps queue, if there is a session
        that will end.
        """
        while not (link := live.room(alone)):
            try:
                if len(live.up) < live.max_links or not live.is_busy:
                    await self._add_link(live)
                else:
                    await live.freed.wait()
            except ConnectionFailedError:
                if not live.is_busy:
                    raise
                live.max_links = len(live.up)
        return link

    async def _connect(self) -> _Link:
        """Make one connection. Cancelling it leaves no socket."""
        await self._apply_config()
        self._hops()
        keys = await self._login_keys()
        clock = _Clock(self.timeout)
        try:
            async with clock.scope, _login_pairs(keys) as pairs:
                return await self._log_in(clock, pairs)
        except TimeoutError:
            raise ConnectionFailedError(
                f"no connection within {self.timeout:g} s: {clock.progress}",
                host=self.hostname,
                kind="lost" if clock.drops else "timeout",
            ) from None

    async def _log_in(self, clock: _Clock, pairs: list[asyncssh.SSHKeyPair]) -> _Link:
        """Attempts to log in, until one succeeds or no other would. Each takes from ``pairs`` the
        keys that it offers.
        """
        rounds, certified = 0, True
        while True:
            # anew: the attempt before may have recorded the host
            trust = _Trust(
                self.hostname,
                self._address,
                self.port,
                known_hosts=self.known_hosts,
                host_keys=self.host_keys,
                config=self._host_config,
                asking=certified,
            )
            link = _Link(self, pairs, trust)
            try:
                await self._try(link, clock)
                return link
            except ConnectionFailedError as exc:  # the gateway's: it keeps its class and kind
                raise type(exc)(
                    f"gateway {exc.host}: {exc.message}", host=self.hostname, kind=exc.kind
                ) from None
            except (OSError, asyncssh.Error, ValueError) as exc:
                clock.drops += link.was_dropped(exc)
                verdict = link.verdict(exc, clock.drops, rounds)
                if verdict is _Verdict.FAIL:
                    raise await self._login_failure(exc, link, clock) from None
            finally:
                self._host_key_shown = trust.shown or self._host_key_shown
                self.host_key_recorded |= trust.recorded
                clock.stage = link.stage
            if verdict is _Verdict.AGAIN:
                await asyncio.sleep(random.uniform(0.5, 1) * 0.2 * 2**clock.drops)
            elif verdict is _Verdict.PLAIN_KEY:
                certified = False
            else:
                rounds += 1

    async def _try(self, link: _Link, clock: _Clock) -> None:
        """Connect; wait for the server's first bytes, so that silent hosts take nobody's turn to
        shake hands; then take that turn and log in.
        """
        limits = _Limits.here()
        tunnel = None
        try:
            endpoint = self._address, self.port, id(self.gateway)
            async with clock.turn(limits.gate(STARTUPS_PER_HOST, *endpoint)):
                if self.gateway:
                    self.gateway._leads = True
                    link.stage = f"gateway {escape(self.gateway.hostname)} does not answer"
                    gateway = await self.gateway._connected()
                    gateway.forwards = True
                    link.stage = "no answer"
                    tunnel = gateway.conn
                else:
                    await self._open_socket(link, clock)
                    await link.hear()
                # gateways wait apart: the time of those behind them runs meanwhile
                handshakes = limits.gate(HANDSHAKES, "handshake", self._leads)
                async with clock.turn(handshakes, HANDSHAKE_TURN):
                    await asyncssh.connect(
                        self._address,
                        self.port,
                        tunnel=tunnel,
                        sock=link.sock,
                        client_factory=lambda: link,
                        **self._login_arguments(link.trust),
                    )
        except BaseException:
            link.drop()
            raise

    async def _open_socket(self, link: _Link, clock: _Clock) -> None:
        """Give a link a socket that leads to the server. asyncio's transport for it has all of
        happy eyeballs (RFC 8305), and is only there to connect.
        """
        if self._proxy_command:
            link.proxy = _ProxyCommand(self._proxy_command)
            link.sock = link.proxy.socket
            return
        loop = asyncio.get_running_loop()
        how = self._host_config.arguments(_SOCKET_ARGUMENTS)
        # uvloop does not know it
        if isinstance(loop, asyncio.BaseEventLoop) and not _is_address(self._address):
            how["happy_eyeballs_delay"] = 0.25
        here = _clock_here.set(clock)
        try:
            async with clock.turn(_Limits.here().gate(CONNECTS, "connect")):
                await loop.create_connection(
                    lambda: _Connected(link), self._address, self.port, **how
                )
        finally:
            _clock_here.reset(here)
        if link.why:
            raise link.why

    def _login_arguments(self, trust: _Trust) -> dict[str, Any]:
        """What asyncssh.connect is told besides the way."""
        agent = os.environ.get("SSH_AUTH_SOCK") if self.forward_agent else None
        return {
            "username": self.username,
            "config": None,
            "client_keys": None,
            "agent_path": None,
            "agent_forwarding": agent,
            "host_key_alias": self._host_config.one("hostkeyalias"),
            "known_hosts": ([],) * 7,
            "server_host_key_algs": trust.algorithms(),
            "compression_algs": None,
            "keepalive_interval": self.keepalive,
            "keepalive_count_max": KEEPALIVE_COUNT,
            "login_timeout": 0,
            "gss_host": None,
            "encryption_algs": CIPHERS,
            **self._host_config.arguments(_LOGIN_ARGUMENTS),
        }

    async def _login_failure(
        self, exc: Exception, link: _Link, clock: _Clock
    ) -> ConnectionFailedError:
        """The one line that says why an attempt gave no connection."""
        if link.host_key_error:
            return link.host_key_error
        if link.proxy and not link.greeted:
            kind, text = "refused", await link.proxy.epitaph()
        elif link.was_dropped(exc):
            kind, text = "lost", clock.progress
            if link.greeted:
                text += ", in the key exchange (no algorithm in common?)"
        elif link.foreign and not link.begun:
            kind, text = "refused", link.foreign
        elif isinstance(exc, asyncssh.PermissionDenied) or (
            # sshd's "Too many authentication failures" has no code of its own
            link.begun and isinstance(exc, asyncssh.ProtocolError)
        ):
            kind, text = "auth", self._refused_login(link)
            # looked for anew at the next login: there may be others by then
            _Limits.here().forget(self._key_question())
        else:
            return self._failure(exc)
        return ConnectionFailedError(text, host=self.hostname, kind=kind)

    def _refused_login(self, link: _Link) -> str:
        """What was tried in vain."""
        default = "" if self._given.user or self._config else " (SshNode's default)"
        password = " and the password" if link.password_tried else ""
        looked = f" ({'; '.join(self._keys_missed)})" if self._keys_missed else ""
        tried = f"{_count(len(link.offered), 'key')}{looked}{password}"
        return f"login as {self.username}{default} refused, after {tried}"

    def _failure(self, exc: Exception) -> ConnectionFailedError:
        """The one line that says why the host cannot be reached."""
        number = exc.errno if isinstance(exc, OSError) else None
        words = os.strerror(number).lower() if number else str(exc)
        told = isinstance(exc, asyncssh.ChannelOpenError)
        kind, text = next(
            (kind, text)
            for known, said, kind, text in _FAILURES
            if isinstance(exc, known) or (told and re.search(said, words))
        )
        if isinstance(exc, socket.gaierror) and number not in _NO_SUCH_NAME:
            text = f"host name {{host}}: {str(exc.strerror).lower()}"
        text = text.format(
            host=self._address,
            port=self.port,
            where=f"gateway {self.gateway.hostname}" if self.gateway else "no session there",
            words=words or "connection lost",
        )
        if number in (errno.EMFILE, errno.ENFILE):
            kind = "local"
        return ConnectionFailedError(escape(text), host=self.hostname, kind=kind)

    def _key_question(self) -> tuple[object, ...]:
        """What the keys to offer depend on."""
        keywords = "identityfile", "certificatefile", "identityagent", "identitiesonly"
        return (*self.keys, *map(tuple, map(self._host_config.paths, keywords)))

    async def _login_keys(self) -> list[Key]:
        """The keys to offer: loaded once for all nodes that name the same; a passphrase may be
        asked.
        """
        limits = _Limits.here()

        async def find() -> tuple[list[Key], list[str]]:
            async with limits.gate(KEY_LOADS, "keys"):
                return await _while_asking(_keys_to_offer, self.keys, self._host_config)

        keys, missed = await limits.answer(self._key_question(), find)
        self._keys_missed = [] if keys else missed
        return keys

    async def _apply_config(self) -> None:
        """Complete what was not given from an ssh_config, once."""
        if not self._config or self._host_config is not _UNCONFIGURED:
            return
        config = _SshConfig(self._config if isinstance(self._config, str) else None)
        answers = await asyncio.to_thread(config.lookup_all, [self._given])
        before = self._endpoint
        if self.gateway is None:
            # known_hosts is about this node, not about the way there
            options: dict[str, Any] = {
                "keys": self.keys,
                "password": self._password,
                "host_keys": self.host_keys,
                "timeout": self.timeout,
            }
            self.gateway = _build_gateway(
                (self._given,),
                answers,
                _Limits.here().gateways,
                alike=f"{self._config} {options}",
                **options,
            )
            self._way = str(self.gateway or "")
        self._complete(answers[self._given])
        self.formatter.add_endpoint(self._endpoint, bool(self.verbose), before)

    # sessions

    async def _run_session(self, session: _Session) -> _Status:
        """In one channel; its time begins when it opens. Cancelling it ends the command."""
        if not self.guard and (session.sudo or session.env):
            raise UsageError(_NEED_GUARD)
        converse = functools.partial(self._converse, session)
        status = await self._on_link(converse, alone=session.watch == "connection")
        if self._guard_works is None:
            self._guard_works = True  # it is asked once
            if self.guard and status != 0:
                await self._doubt_guard(status)
        return status

    async def _on_link(self, work: Callable[[_Link], Awaitable[_T]], alone: bool = False) -> _T:
        """What this work gives, which opens a channel on a link with room for it; ``alone``: with
        nothing else on it.

        A server that refuses the channel takes fewer at once than others (MaxSessions), or has not
        yet noticed that one ended: it is asked again, and from now on for no more than it has.
        """
        refusals = 0
        while True:
            live = self._here()
            link = await self._with_room(live, alone)
            link.sessions += 1
            link.reserved = alone
            try:
                return await work(link)
            except asyncssh.ChannelOpenError as exc:
                refusals += 1
                most = SESSIONS_PER_CONNECTION * CONNECTIONS_PER_NODE
                if link.sessions == 1:  # with no other to make room: for about a second
                    most = 20
                if not _is_refusal(exc) or refusals > most:
                    raise self._failure(exc) from None
                link.limit = max(link.sessions - 1, 1)
                await asyncio.sleep(0.05)
            finally:
                link.sessions -= 1
                link.reserved = False
                live.wake()

    async def _converse(self, session: _Session, link: _Link) -> _Status:
        """Start a command on this link, and wait for its end; the status."""
        session.link, session.clock = link, _Clock(session.timeout)
        async with session.clock.scope:
            creating = link.conn.create_session(lambda: session, **session.request())
            try:
                await self._open(creating, session.abort)
            except (asyncssh.Error, ConnectionError) as exc:
                if link.alive and isinstance(exc, asyncssh.ChannelOpenError):
                    raise
                raise session.lost() from None  # the request may have arrived
            await self._see_through(session)
        return session.outcome()

    async def _doubt_guard(self, status: _Status) -> None:
        """After the first command on a host, if it failed: would any command fail so? A shell that
        is not POSIX, a key with a forced command or a start-up file that takes stdin does not let
        the guard be, and what the host says then speaks of no guard.
        """
        probe = "sleep 1" if status == "TERM" else ":"
        session = _Session(probe, StepRecord(command=probe), timeout=CLOSE_TIMEOUT * 5)
        session.sink = _HeldSink()
        try:
            if await self._run_session(session) == 0:
                return
        except (ConnectionFailedError, TimeoutError):
            return  # the host is slow, or has gone: who knows
        except ApsshError:
            pass  # it ended without a status
        _tell(
            self.hostname,
            "commands fail there because of their guard, which ends them with their connection "
            "(no POSIX shell, a forced command, or a start-up file that reads stdin?): "
            "--no-guard, guard=False, leaves it out",
        )

    @staticmethod
    async def _open(work: Awaitable[object], abort: Callable[[], None]) -> None:
        """Open a channel; cancelled meanwhile, the channel is closed as soon as it is there, so
        that its slot is not lost.
        """
        opening = asyncio.ensure_future(work)
        opening.add_done_callback(_retrieve_exception)
        try:
            await asyncio.shield(opening)
        except asyncio.CancelledError:
            abort()
            opening.add_done_callback(lambda _: abort())
            await asyncio.wait([opening], timeout=CLOSE_TIMEOUT)
            raise
        except AttributeError as exc:
            # asyncssh's, when the connection goes while the channel opens
            raise asyncssh.ConnectionLost(str(exc)) from None

    async def _open_sftp(self, live: _Live, link: _Link) -> None:
        """An SFTP session takes one of the connection's sessions, for as long as it lives."""
        sftp = _Sftp(link)
        try:
            async with asyncio.timeout(self.timeout):
                await self._open(sftp.start(), sftp.abort)
        except (asyncssh.Error, OSError) as exc:
            if not link.alive:  # whose words are of a channel
                raise self._failure(link.why or asyncssh.ConnectionLost("")) from None
            if _is_refusal(exc):
                raise
            why = await sftp.last_words()
            if not why:
                why = "no answer" if isinstance(exc, TimeoutError) else _reason(exc)
            raise TransferError(
                f"no SFTP over there: {why}", host=self.hostname, kind="remote"
            ) from None
        live.sftp = sftp
        link.sessions += 1
        self.formatter.sftp_start(self.hostname)


def _is_refusal(exc: Exception) -> bool:
    """Whether the server takes no further session on this connection, for now."""
    if isinstance(exc, asyncssh.ChannelOpenError):
        return exc.code == asyncssh.OPEN_CONNECT_FAILED
    return False


class _Sftp:
    """An SFTP session, and where it runs.

    It is the connection that asyncssh's start_sftp_client sees, so as to keep the channel, which
    asyncssh would leave open when no SFTP server answers on it (a start-up file that prints), and
    which tells when the server has ended SFTP but not the connection.
    """

    client: asyncssh.SFTPClient
    channel: _Channel | None = None
    stderr: asyncssh.SSHReader[bytes]  # of that channel

    def __init__(self, link: _Link) -> None:
        self.link = link

    def __getattr__(self, name: str) -> Any:
        return getattr(self.link.conn, name)

    async def start(self) -> None:
        """Open the session; names are text with surrogateescape."""
        connection: Any = self  # it has all that the method asks of a connection
        self.client = await asyncssh.SSHClientConnection.start_sftp_client(
            connection, path_errors="surrogateescape"
        )

    async def open_session(self, **options: Any) -> Any:
        """Open the channel, as the connection's method of this name."""
        opened: Any = await self.link.conn.open_session(**options)
        self.channel, self.stderr = opened[0].channel, opened[2]
        return opened

    @property
    def alive(self) -> bool:
        """Whether neither its connection nor its server has ended."""
        return self.link.alive and not (self.channel and self.channel.is_closing())

    def abort(self) -> None:
        """Close the channel, whose session is then free."""
        if self.channel:
            self.channel.abort()

    async def last_words(self) -> str:
        """Close the channel; what the server said in place of SFTP, if it ended.

        Where nothing comes of a subsystem's stderr, as from OpenSSH, what refuses every session (an
        expired password) says so to any command.
        """
        status, said = None, b""
        try:
            async with _in_short():
                if self.channel:
                    await self.channel.wait_closed()
                    status = self.channel.get_exit_status()
                if status:
                    said = await self.stderr.read(2000)
                if status and not said:
                    async with self.link.conn.create_process(
                        "true", encoding=None, stdin=asyncssh.DEVNULL, stdout=asyncssh.DEVNULL
                    ) as process:
                        said = await process.stderr.read(2000)
        finally:
            self.abort()
        text = " ".join(said.decode("utf-8", "replace").split())
        if status and not text:
            return f"its server ended with status {status}"
        return _brief(text, 200)


_quiet = Formatter()  # for gateways: they run nothing


def _build_gateway(
    chain: tuple[Hop, ...],
    answers: Mapping[Hop, _HostConfig],
    made: MutableMapping[object, SshNode],
    *,
    direct: bool = False,
    alike: str = "",
    **options: Any,
) -> SshNode | None:
    """What leads to the last hop of a chain: the hops before it, and before these, unless it is
    ``direct``, those that the config of the first one jumps through.

    ``answers``: what is configured for each hop. A gateway is one for all behind it that are
    ``alike``, and stays in ``made``. ``options`` are SshNode's. Raises UsageError for a hop that is
    behind itself.
    """
    while True:
        for hop in chain:
            if chain.count(hop) > 1:
                raise UsageError(f"{hop.host}: it is its own gateway")
        jumps = () if direct else answers[chain[0]].jumps
        if not jumps:
            break
        chain = (*jumps, *chain)
    gateway = None
    for length, hop in enumerate(chain[:-1], 1):
        place = alike, chain[:length]
        gateway = made.get(place) or SshNode(
            hop.host, gateway=gateway, formatter=_quiet, config=answers[hop], **options
        )
        made[place] = gateway
    return gateway


class _Live:
    """What a node has open in one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.links: list[_Link] = []
        self.max_links = CONNECTIONS_PER_NODE
        self.opening: dict[object, _Shared] = {}
        self.sftp: _Sftp | None = None
        self.freed = asyncio.Event()

    @property
    def up(self) -> list[_Link]:
        """The connections that are up."""
        return [link for link in self.links if link.alive]

    @property
    def is_busy(self) -> bool:
        """Whether there are sessions to wait for; SFTP's ends with the node only."""
        return sum(link.sessions for link in self.up) > bool(self.sftp)

    def room(self, alone: bool) -> _Link | None:
        """A link with room for one more session; ``alone``: on which nothing depends, so that the
        session may cut it. An SFTP that has ended gives back its session.
        """
        if self.sftp and not self.sftp.alive:
            self.sftp.link.sessions -= 1
            self.sftp = None
        for link in self.up:
            taken = link.reserved or link.sessions >= link.limit
            if not (taken or (alone and (link.sessions or link.forwards))):
                return link
        return None

    def wake(self) -> None:
        """A session has ended or a connection has come: those who wait for it look again."""
        self.freed.set()
        self.freed = asyncio.Event()

    def drop(self) -> None:
        """Cut everything at once, even when the loop is gone."""
        for link in self.up:
            link.drop()


class LocalNode(_Node):
    """This machine, with the same commands: through /bin/sh, in the program's current folder; Push
    and Pull are plain copies. There is no ``pty`` and no ``sudo`` for them.

    ``formatter``: where output goes, by default a HostFormatter; ``verbose``: its events too.
    """

    @_keywords_checked
    def __init__(self, formatter: Formatter | None = None, verbose: bool | None = None) -> None:
        self.hostname = "LOCALNODE"
        self.username = getpass.getuser()
        self._adopt(formatter, verbose)

    def __str__(self) -> str:
        return "Local Node"

    def __repr__(self) -> str:
        return "<LocalNode>"

    async def sftp_connect_lazy(self) -> _LocalFiles:
        """The files of this machine, as an SFTP client has them."""
        return _LocalFiles()

    def is_connected(self) -> bool:
        """Always True."""
        return True

    def is_sftp_connected(self) -> bool:
        """Always True."""
        return True

    def distance(self) -> int:
        """No hop: 0."""
        return 0

    async def _run_session(self, session: _Session) -> _Status:
        """A process group of its own, under the same guard as over there: it ends what is left
        when this program is killed.
        """
        if session.pty or session.sudo:
            raise UsageError("pty and sudo are for commands on an SshNode", host=self.hostname)
        async with asyncio.timeout(session.timeout):
            process = await self._start(session)
            channel = _LocalChannel(process, session)
            session.connection_made(cast("_Channel", channel))
            try:
                await self._see_through(session)
            finally:
                await asyncio.wait([channel.following])
        if session.error:
            raise session.error
        assert session.status is not None
        return session.status

    async def _start(self, session: _Session) -> subprocess.Popen[bytes]:
        """The process of a command, whose standard input is in a file before."""
        command = session.command
        with contextlib.ExitStack() as stack:
            given = []
            if session.stdin:
                spool = stack.enter_context(tempfile.TemporaryFile())
                await self._spool(session.stdin, spool)
                session.stdin = None
                # The process' own standard input is the guard's, which waits for its end, and uses
                # numbers below 10 for itself.
                given = [fcntl.fcntl(spool, fcntl.F_DUPFD_CLOEXEC, 10)]
                stack.callback(os.close, given[0])
                command = f"exec </dev/fd/{given[0]}\n{command}"
            # not asyncio's: its process waits for ever when cancelled too early
            return subprocess.Popen(
                ["/bin/sh", "-c", _guarded(command, session)],
                env=os.environ | {"SHELL": "/bin/sh"},
                start_new_session=True,
                pass_fds=given,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )

    @staticmethod
    async def _spool(stdin: AsyncIterator[bytes], spool: IO[bytes]) -> None:
        """Have all of this in a file, at whose beginning it is."""
        try:
            async for data in stdin:
                spool.write(data)
        except Exception as exc:  # the iterator may be a user's
            raise ApsshError(f"standard input: {_reason(exc)}") from None
        spool.seek(0)  # flushed; and where /dev/fd shares the place, it is the beginning


class _LocalChannel:
    """A process of this machine, as the channel of its session."""

    def __init__(self, process: subprocess.Popen[bytes], session: _Session) -> None:
        assert process.stdin
        self.following = asyncio.create_task(self._follow(process, session))
        self.write_eof = process.stdin.close  # for the guard, the end of the command
        self.abort = self.following.cancel  # who still holds its outputs keeps them

    async def _follow(self, process: subprocess.Popen[bytes], session: _Session) -> None:
        """Hand all that comes to the session, until the process and its outputs have ended."""
        assert process.stdout and process.stderr
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass_on(process.stdout, session, None))
                group.create_task(self._pass_on(process.stderr, session, EXTENDED_DATA_STDERR))
                status = await _in_daemon(process.wait)
                session.status = status
                if status < 0:
                    session.status = signal.Signals(-status).name.removeprefix("SIG")
        except* Exception as failures:
            session.fail(failures.exceptions[0])
        finally:
            self.write_eof()
            session.connection_lost(None)

    @staticmethod
    async def _pass_on(pipe: IO[bytes], session: _Session, datatype: int | None) -> None:
        """Hand an output of the process to the session, until its end."""
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), pipe
        )
        try:
            while data := await reader.read(SESSION_WINDOW):
                session.data_received(data, datatype)
        finally:
            transport.close()


# --------------------------------------------------------------------------------------------------
# commands: the steps of a job; a step gets its node as an argument and keeps none
# --------------------------------------------------------------------------------------------------


_AnyNode = SshNode | LocalNode


class AbstractCommand:
    """One step of a job.

    A class of yours that derives from it defines the coroutine ``co_run_remote(node)``, and
    ``co_run_local(node)`` to run on a LocalNode too; each returns an exit status (None: 0), or the
    name of a signal.

    ``label``: the text in graphs and listings (None: made from the command; any other false value
    hides the step's line). ``allowed_exits``: exit codes and signal names that count as success
    too, as ``["TERM", 4]``; they never hide a lost connection. ``timeout``: seconds for this step,
    from when its host is there (None: no limit). ``verbose``: a word on stderr when it runs.
    """

    # these serve classes of users' whose constructor does not call ours
    label: str | bool | None = None
    allowed_exits: Collection[int | str] = ()
    timeout: float | None = None
    verbose: bool | None = False

    @_keywords_checked
    def __init__(self, **keywords: Unpack[_TimedKeywords]) -> None:
        vars(self).update(keywords)
        _check_time(self.timeout)
        exits = keywords["allowed_exits"] or ()
        self.allowed_exits = {
            each.removeprefix("SIG") if isinstance(each, str) else each
            for each in ([exits] if isinstance(exits, int | str) else exits)
        }

    @property
    def open_files(self) -> int:
        """How many files of this machine it has open at once, at most."""
        return 0

    async def co_run_remote(self, node: SshNode) -> int | str | None:
        """Run on an SshNode; the exit status, or a signal's name without SIG."""
        step = StepRecord()
        with self._in_time(node, step):
            return await self._carry_out(node, step)

    async def co_run_local(self, node: LocalNode) -> int | str | None:
        """Run on a LocalNode; the exit status, or a signal's name without SIG."""
        step = StepRecord()
        with self._in_time(node, step):
            return await self._carry_out(node, step)

    async def attempt(self, node: _AnyNode, step: StepRecord) -> _Status:
        """Run on this node, as jobs do; the status, which is a success.

        ``step`` gets what becomes known. Raises CommandFailedError for any other status, and past
        its time; ConnectionFailedError, TransferError or UsageError where it could not run or end.
        Cancelling it ends its command over there.
        """
        if self.verbose:
            _tell(node.hostname, f"runs: {self.step_name()}")
        method = "co_run_local" if isinstance(node, LocalNode) else "co_run_remote"
        try:
            with self._in_time(node, step):
                # what is ours keeps a record; what a user has redefined has only its node
                if getattr(type(self), method) is getattr(AbstractCommand, method):
                    step.status = await self._carry_out(node, step)
                else:
                    async with asyncio.timeout(self.timeout):
                        step.status = await getattr(self, method)(node) or 0
            if not self._is_success(step.status):
                kind = "status" if isinstance(step.status, int) else "signal"
                command = step.command or self.step_name()
                raise CommandFailedError(
                    f"ended with {kind} {step.status}: {escape(command)}",
                    host=node.hostname,
                    kind=kind,
                    command=step.command,
                    status=step.status,
                )
        except CommandFailedError as exc:
            if self.label:
                exc.message = f"{escape(self.listing_line())}: {exc.message}"
            raise
        return step.status

    def _is_success(self, status: _Status | None) -> bool:
        return status == 0 or status in self.allowed_exits

    async def _carry_out(self, node: _AnyNode, step: StepRecord) -> _Status:
        """What a step of ours is."""
        raise UsageError(
            f"{type(self).__name__}: a step defines co_run_remote(node), and co_run_local(node) "
            "to run on a LocalNode"
        )

    @contextlib.contextmanager
    def _in_time(self, node: _AnyNode, step: StepRecord) -> Iterator[None]:
        """Tells the end of the step's time, which begins when its host is there. A TimeoutError
        with no limit is the system's own (ETIMEDOUT).
        """
        try:
            yield
        except TimeoutError:
            text = "timed out" if self.timeout is None else f"no end within {self.timeout:g} s"
            left = " (it may still be running)" if step.may_run else ""
            raise CommandFailedError(
                f"{text}: {escape(step.command or self.step_name())}{left}",
                host=node.hostname,
                kind="timeout",
                command=step.command,
            ) from None

    def check_files(self) -> None:
        """Raise UsageError for what can be found wrong on this machine before anything runs."""

    def listing_line(self) -> str:
        """One line for graphs and listings; empty when it is hidden."""
        text = self._text() if self.label is None else self.label
        return " ".join(str(text).split()) if text else ""

    def step_name(self) -> str:
        """One line for messages: the label, or the text made from the command."""
        return self.listing_line() or " ".join(self._text().split())

    def dry_run_text(self) -> str:
        """All of what would run, as far as it is known."""
        return self._text()

    def _text(self) -> str:
        """The text made from the command."""
        return type(self).__name__


class _Stdin:
    """What a step gives to its command as standard input; None: its end at once.

    Each host reads it at its own pace, from its beginning: a file is read a piece at a time at the
    place where this host is, whoever else reads it. Only what an asynchronous iterator gives cannot
    be had again. Raises UsageError for what cannot be read so.
    """

    def __init__(self, source: _StdinSource | None) -> None:
        self._source = source
        self._used = False
        if isinstance(source, bytes | str | Deferred | os.PathLike | AsyncIterator | None):
            return
        if not hasattr(source, "read") or hasattr(source, "encoding"):
            raise UsageError(
                "stdin: bytes, text, a path object, an open binary file or an asynchronous "
                f"iterator, not {source!r}"
            )
        if source.closed or not (source.readable() and source.seekable()):
            raise UsageError(
                "stdin: this file cannot be read from its beginning for each host: give the bytes "
                "that it holds"
            )

    def check(self) -> None:
        """A path must be that of a file by now."""
        if isinstance(self._source, os.PathLike):
            _check_file("stdin", self._source)

    def reader(self) -> AsyncIterator[bytes] | None:
        """All of it, for one host. Raises UsageError when it has been used up."""
        source = self._source
        if source is None:
            return None
        if isinstance(source, AsyncIterator):
            self._check_unused()
            return self._read_once(source)
        if isinstance(source, str | Deferred):
            source = os.fsencode(_text_of(source))
        return self._read(io.BytesIO(source) if isinstance(source, bytes) else source)

    def opened(self, channel: _Channel) -> None:
        """A command that reads it has begun, on this channel."""

    def _check_unused(self) -> None:
        if self._used:
            raise UsageError(
                "stdin: an asynchronous iterator serves one host, once: give each host its own, "
                "or give bytes, a file or a path"
            )

    async def _read_once(self, source: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        self._check_unused()
        self._used = True
        async for data in source:
            yield data

    async def _read(self, source: os.PathLike[str] | BinaryIO) -> AsyncIterator[bytes]:
        with contextlib.ExitStack() as stack:
            if isinstance(source, os.PathLike):
                source = stack.enter_context(open(_check_file("stdin", source), "rb"))
            place = 0
            while True:
                source.seek(place)
                data = source.read(SESSION_WINDOW)
                if not data:
                    return
                place += len(data)
                yield data


def _check_file(what: str, path: StrPath) -> str:
    """The path of this file of this machine. Raises UsageError, naming it, unless it is there."""
    place = os.path.expanduser(path)
    if not os.path.isfile(place):
        problem = "not a file" if os.path.exists(place) else "no such file"
        raise UsageError(f"{what} {escape(str(path))}: {problem}")
    return place


def _read_file(what: str, path: StrPath) -> tuple[bytes, int]:
    """Content and mode of a file of this machine. Raises UsageError, naming it."""
    place = Path(_check_file(what, path))
    try:
        return place.read_bytes(), place.stat().st_mode
    except OSError as exc:
        raise UsageError(f"{what} {escape(str(path))}: {_reason(exc)}") from None


def _check_env(where: str, env: Mapping[str, object]) -> None:
    for name, value in env.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", str(name), re.ASCII):
            raise UsageError(f"{where}: {name!r} is not the name of a variable")
        if value is None:
            raise UsageError(
                f"{where}: {name} has no value; 'env -u {name} ...' as the command unsets it"
            )


class _ShellCommand(AbstractCommand):
    """What Run, RunScript and RunString share: words read by the remote shell, what the command is
    given, and where its output goes.
    """

    ignore_outputs = False

    @_keywords_checked
    def __init__(self, words: tuple[_Word, ...], **keywords: Unpack[_ShellKeywords]) -> None:
        super().__init__(**_part(keywords, _TimedKeywords))
        self.words, self.capture, stdin = words, keywords["capture"], keywords["stdin"]
        self.x11, self.pty, self.sudo = keywords["x11"], keywords["pty"], keywords["sudo"]
        self.env = dict(keywords["env"] or {})
        self.stdin = _Stdin(stdin)
        kind = type(self).__name__
        if not isinstance(self.capture, Capture | None):
            raise UsageError(f"{kind}: capture is a Capture(name, variables), not {self.capture!r}")
        for word in words:
            if not isinstance(word, str | int | float | Deferred | Run | os.PathLike):
                raise UsageError(
                    f"{kind}: a word is a string, a number, a Deferred or a Run, not {word!r}"
                )
        _check_env(f"{kind}: env", self.env)
        if not isinstance(self.sudo, bool | str) or not re.fullmatch(_USER, str(self.sudo)):
            raise UsageError(
                f"{kind}: sudo is True (root) or the name of a user, not {self.sudo!r}"
            )
        if self.sudo is True:
            self.sudo = "root"
        # what follows a terminal's keys is an iterator, which ends when it likes
        if self.pty and not isinstance(stdin, AsyncIterator | None):
            raise UsageError(f"{kind}: pty and stdin: a terminal has no end of file: leave one out")

    def _words(self, text: Callable[[_Word], str] = _text_of) -> str:
        """The words joined by blanks, each as ``text`` has it: with ``str``, Deferred ones as far
        as is known.
        """
        return " ".join(
            word._words(text) if isinstance(word, Run) else text(word) for word in self.words
        )

    def dry_run_text(self) -> str:
        whom = f"sudo -u {self.sudo}: " if self.sudo else ""
        return whom + self._text()

    def check_files(self) -> None:
        self.stdin.check()
        if self.x11 and not os.environ.get("DISPLAY"):
            raise UsageError("x11: no DISPLAY here to forward to")

    async def _by_shell(
        self,
        node: _AnyNode,
        line: str,
        step: StepRecord,
        *,
        sink: _HeldSink | None = None,
        timeout: float | None = None,
        folder: str = "",
    ) -> _Status:
        """Have the node run a command line with all that this step gives it; the status."""
        _ShellCommand.check_files(self)
        session = _Session(
            line,
            step,
            x11=self.x11,
            pty=self.pty,
            stdin=self.stdin.reader(),
            env={name: _text_of(value) for name, value in self.env.items()},
            sudo=self.sudo,
            quiet=self.ignore_outputs,
            folder=folder,
            opened=self.stdin.opened,
            timeout=timeout,
            capture=self.capture,
            guard=node.guard,
        )
        return await node._execute(session, sink)


class Run(_ShellCommand):
    """A command line, read by the user's login shell over there, as ssh does.

    ``argv``: its words, joined by blanks: strings, numbers, paths, Deferred, or another Run, which
    stands for its command line. ``x11``: forward the DISPLAY. ``ignore_outputs``: both streams are
    /dev/null over there, which serves to leave something running. ``capture``: a Capture gets
    standard output, which is not shown then. ``env``: variables for the command, whatever the
    server's AcceptEnv says. ``pty``: give it a terminal. ``stdin``: what it reads: bytes, text, an
    open binary file or a path object, each host getting all of it, or an asynchronous iterator of
    bytes, which serves one host (None: end of file at once). ``sudo``: run as root (True) or as the
    user of that name.

    ``label``: the text in graphs and listings (None: the command; any other false value hides the
    line). ``allowed_exits``: exit codes and signal names that count as success too. ``timeout``:
    seconds, from when the host is there (None: no limit). ``verbose``: a word on stderr when it
    runs. Raises UsageError for what cannot mean anything.
    """

    @_keywords_checked
    def __init__(self, *argv: _Word, **keywords: Unpack[_RunKeywords]) -> None:
        super().__init__(argv, **_part(keywords, _ShellKeywords))
        self.ignore_outputs = keywords["ignore_outputs"]
        if all(isinstance(word, str) and not word.strip() for word in argv):
            raise UsageError("Run: an empty command")

    def _text(self) -> str:
        return self._words(str)

    async def _carry_out(self, node: _AnyNode, step: StepRecord) -> _Status:
        return await self._by_shell(node, self._words(), step, timeout=self.timeout)


class Wait(_ShellCommand):
    """Wait until the host is there and a command succeeds on it.

    ``argv``: the words of the command, as those of Run (none: ``true``). It is tried again and
    again, each time over a new connection, so that the host may reboot meanwhile; what else uses
    this very node at that time loses its connection. Its output is not shown. ``timeout``: seconds
    in all (default 300; None: no limit), past which it raises CommandFailedError, saying what was
    seen last. ``interval``: seconds between one try and the next (default 1). A wrong host key is
    no matter of time, and raises HostKeyError at once.

    ``label``: the text in graphs and listings (None: made from the command; any other false value
    hides the line). ``allowed_exits``: exit codes and signal names that count as success too.
    ``verbose``: a word on stderr when it runs.
    """

    @_keywords_checked
    def __init__(
        self,
        *argv: _Word,
        timeout: float | None = 300,
        interval: float = 1,
        **keywords: Unpack[_StepKeywords],
    ) -> None:
        super().__init__(argv, timeout=timeout, **keywords)
        self.interval = interval
        if interval <= 0:
            raise UsageError(f"Wait: interval {interval!r}: seconds, more than 0")

    def _text(self) -> str:
        return f"Wait: {self._words(str) or 'true'}"

    async def _carry_out(self, node: _AnyNode, step: StepRecord) -> _Status:
        line = self._words() or "true"
        seen = "no answer"
        try:
            async with asyncio.timeout(self.timeout):
                while True:
                    said = _HeldSink()
                    try:
                        await node.close()
                        status = await self._by_shell(node, line, step, sink=said)
                        if self._is_success(status):
                            return status
                        last = (said.stdout() + said.stderr()).strip().split(b"\n")[-1]
                        seen = f"status {status}: {_brief(os.fsdecode(last))}".rstrip(": ")
                    except HostKeyError:
                        raise
                    except ConnectionFailedError as exc:
                        seen = f"{exc.kind}: {exc.message}"
                    await asyncio.sleep(self.interval)
        except TimeoutError:
            raise CommandFailedError(
                f"not there within {self.timeout:g} s: {escape(line)}; seen last: {seen}",
                host=node.hostname,
                kind="timeout",
                command=line,
            ) from None


class _Script(_ShellCommand):
    """A script with its includes, in a private folder of the host for as long as it runs.

    All hosts have the folder under one name, so that equal messages of the script are equal texts
    (those of a shell begin with the path of the script). A host has it under another name each
    time, since what ends a script that was given up removes its folder up to seconds later.
    """

    @_keywords_checked
    def __init__(
        self,
        source: _Path,
        words: tuple[_Word, ...],
        **keywords: Unpack[_ScriptKeywords],
    ) -> None:
        super().__init__(words, **_part(keywords, _ShellKeywords))
        self.source = source
        if not str(source).strip():
            raise UsageError(f"{type(self).__name__}: an empty script")
        includes = keywords["includes"]
        self.includes = tuple(map(os.fspath, _paths(includes))) if includes else ()
        self._name = os.urandom(8).hex()
        self._uses: collections.Counter[str] = collections.Counter()  # by the way there

    def _script(self) -> _ScriptFiles:
        """The script alone: its name, with its content and mode."""
        raise NotImplementedError

    def _with_includes(self, files: _ScriptFiles) -> _ScriptFiles:
        """All files of the folder, from those that come first. The same one may come twice."""
        for include in self.includes:
            name, (content, mode) = os.path.basename(include), _read_file("include", include)
            if files.setdefault(name, (content, mode | 0o600))[0] != content:
                raise UsageError(f"two different files for one folder are called {escape(name)}")
        return files

    def check_files(self) -> None:
        super().check_files()
        # what is deferred is not known yet, or may be the name of a file that is not there yet
        self._with_includes({} if isinstance(self.source, Deferred) else self._script())

    def _titled(self, what: str) -> str:
        return f"{type(self).__name__}: {what} {self._words(str)}".rstrip()

    def dry_run_text(self) -> str:
        beside = f" with {' '.join(self.includes)}" if self.includes else ""
        return super().dry_run_text() + beside

    async def _carry_out(self, node: _AnyNode, step: StepRecord) -> _Status:
        files = self._with_includes(self._script())
        name = next(iter(files))
        step.script_sha256 = hashlib.sha256(files[name][0]).hexdigest()
        words, step.command = self._words(), self._text()  # what people know it by
        await node.sftp_connect_lazy()
        self._uses[str(node)] += 1
        folder_name = f"{self._name}{self._uses[str(node)]:02}"
        for_others = self.sudo not in (False, "root")
        folder = node._script_folder(files, folder_name, for_others=for_others)
        now = asyncio.get_running_loop().time
        async with asyncio.timeout(self.timeout) as scope, folder as path:
            line = f"{shlex.quote(f'{path}/{name}')} {words}".strip()
            left = scope.when()
            if left is not None:  # for the command, whose clock may have to stand still
                left -= now()
                scope.reschedule(None)
            return await self._by_shell(node, line, step, timeout=left, folder=path)


class RunScript(_Script):
    """Push a local script and run it over there, in the remote home.

    ``local_script``: its path (a Deferred may name a file that an earlier step makes). ``args``:
    its arguments, joined by blanks and read by the remote shell, so that quotes and redirections in
    them work. ``includes``: local files that land beside it; one file may be named twice, two
    different files of one name cannot be. The folder is private, and removed afterwards. A missing
    script or include raises UsageError when the job starts, before its first step.

    ``x11``: forward the DISPLAY. ``capture``: a Capture gets standard output, which is not shown
    then. ``env``: variables for the script, whatever the server's AcceptEnv says. ``pty``: give it
    a terminal. ``stdin``: what it reads: bytes, text, an open binary file or a path object, each
    host getting all of it, or an asynchronous iterator of bytes, which serves one host (None: end
    of file at once). ``sudo``: run as root (True) or as the user of that name; for another user
    than root the folder is in /tmp, under a name nobody can guess, and its files can be read.

    ``label``: the text in graphs and listings (None: made from the script; any other false value
    hides the line). ``allowed_exits``: exit codes and signal names that count as success too.
    ``timeout``: seconds, from when the host is there (None: no limit). ``verbose``: a word on
    stderr when it runs. Raises UsageError for what cannot mean anything.
    """

    @_keywords_checked
    def __init__(
        self, local_script: _Path, *args: _Word, **keywords: Unpack[_ScriptKeywords]
    ) -> None:
        super().__init__(local_script, args, **keywords)

    def _script(self) -> _ScriptFiles:
        path = _text_of(self.source)
        return {os.path.basename(path): (_read_file("script", path)[0], 0o700)}

    def _text(self) -> str:
        return self._titled(os.path.basename(str(self.source)))


class RunString(_Script):
    """Run a script that is given as a text, over there, in the remote home.

    ``script_body``: the text; without a ``#!`` line it runs as the login shell runs such a file.
    ``args``: its arguments, joined by blanks and read by the remote shell, so that quotes and
    redirections in them work. ``remote_name``: the file's name over there (None: ``script``).
    ``includes``: local files that land beside it; one file may be named twice, two different files
    of one name cannot be. The folder is private, and removed afterwards. A missing include raises
    UsageError when the job starts, before its first step.

    ``x11``: forward the DISPLAY. ``capture``: a Capture gets standard output, which is not shown
    then. ``env``: variables for the script, whatever the server's AcceptEnv says. ``pty``: give it
    a terminal. ``stdin``: what it reads: bytes, text, an open binary file or a path object, each
    host getting all of it, or an asynchronous iterator of bytes, which serves one host (None: end
    of file at once). ``sudo``: run as root (True) or as the user of that name; for another user
    than root the folder is in /tmp, under a name nobody can guess, and its files can be read.

    ``label``: the text in graphs and listings (None: made from the script; any other false value
    hides the line). ``allowed_exits``: exit codes and signal names that count as success too.
    ``timeout``: seconds, from when the host is there (None: no limit). ``verbose``: a word on
    stderr when it runs. Raises UsageError for what cannot mean anything.
    """

    @_keywords_checked
    def __init__(
        self,
        script_body: str | Deferred,
        *args: _Word,
        remote_name: str | None = None,
        **keywords: Unpack[_ScriptKeywords],
    ) -> None:
        super().__init__(script_body, args, **keywords)
        self.remote_name = os.path.basename(remote_name or "script")
        if _NO_NAME.match(self.remote_name):
            raise UsageError(f"RunString: remote_name {remote_name!r} is not the name of a file")

    def _script(self) -> _ScriptFiles:
        body = _text_of(self.source).removesuffix("\n") + "\n"
        return {self.remote_name: (os.fsencode(body), 0o700)}

    def _text(self) -> str:
        lines = (line.strip() for line in str(self.source).splitlines())
        first = next((line for line in lines if line and not line.startswith("#")), "")
        return self._titled(f"{first[:15]}...")

    def dry_run_text(self) -> str:
        return f"{super().dry_run_text()}\n{self.source}"


class _CopyCommand(AbstractCommand):
    """What Push and Pull share: paths, that may be Deferred, and the options of a copy."""

    pushing: ClassVar[bool]

    def __init__(self, sources: _Paths, destination: _Path, keywords: _CopyKeywords) -> None:
        super().__init__(**_part(keywords, _TimedKeywords))
        self.sources, self.destination = _paths(sources), destination
        self.options = _part(keywords, _TransferKeywords)
        if not isinstance(destination, str | os.PathLike | Deferred):
            raise UsageError(
                f"{type(self).__name__}: the destination is a path, not {destination!r}"
            )

    @property
    def open_files(self) -> int:
        """One for each file under way, and two folders."""
        several = self.options["recurse"] or any(map(_is_pattern, map(str, self.sources)))
        return 2 + (FILES_IN_FLIGHT if several else min(len(self.sources), FILES_IN_FLIGHT))

    def _line(self, sources: str) -> str:
        what, way = ("Push", "onto") if self.pushing else ("Pull", "into")
        return f"{what}: {sources} {way} {self.destination}"

    def _text(self) -> str:
        many = len(self.sources)
        return self._line(f"{self.sources[0]} ... ({many} total)" if many > 1 else self.sources[0])

    def dry_run_text(self) -> str:
        options = [name for name, value in self.options.items() if value]
        return ", ".join([self._line(" ".join(map(str, self.sources))), *options])

    async def _carry_out(self, node: _AnyNode, step: StepRecord) -> _Status:
        sources = [_text_of(path) for path in self.sources]
        destination = _text_of(self.destination)
        step.command = self._text()
        sftp = await node.sftp_connect_lazy()
        async with asyncio.timeout(self.timeout):
            copying = _Copy(node.hostname, step, **self.options)
            work = copying.push if self.pushing else copying.pull
            await work(sftp, sources, destination)
        return 0


class Push(_CopyCommand):
    """Copy local files to a host.

    ``localpaths``: a path or a list of paths, each may be Deferred; a list of one path means the
    same as that path. ``remotepath``: where to; into it when it is a folder or ends in ``/``;
    several sources need a folder; ``~`` is the remote home. ``preserve``: modes and times of the
    sources, too. ``recurse``: copy folders. ``follow_symlinks``: copy what links inside of a folder
    point to (else they stay links). ``inplace``: write onto existing files themselves instead of
    replacing them when the new one is complete. ``block_size`` and ``max_requests``: asyncssh's,
    accepted for published scripts; the engine chooses better itself.

    ``label``: the text in graphs and listings (None: made from the paths; any other false value
    hides the line). ``allowed_exits``: of no use to a copy. ``timeout``: seconds, from when the
    host is there (None: no limit). ``verbose``: a word on stderr when it runs. Raises UsageError
    for what cannot be paths, and TransferError, naming the path, when it runs.
    """

    pushing = True

    @_keywords_checked
    def __init__(
        self, localpaths: _Paths, remotepath: _Path, **keywords: Unpack[_CopyKeywords]
    ) -> None:
        super().__init__(localpaths, remotepath, keywords)


class Pull(_CopyCommand):
    """Copy files of a host here; nothing is written outside of the destination.

    ``remotepaths``: a path or a list of paths, each may be Deferred or have wildcards; a list of
    one path means the same as that path; ``~`` is the remote home. ``localpath``: where to; into it
    when it is a folder or ends in ``/``; several sources need a folder; one that is missing raises
    UsageError when the job starts, before its first step. ``preserve``: modes and
    times of the sources, too. ``recurse``: copy folders. ``follow_symlinks``: copy what links
    inside of a folder point to (else they stay links). ``inplace``: write onto existing files
    themselves instead of replacing them when the new one is complete. ``block_size`` and
    ``max_requests``: asyncssh's, accepted for published scripts; the engine chooses better itself.

    ``label``: the text in graphs and listings (None: made from the paths; any other false value
    hides the line). ``allowed_exits``: of no use to a copy. ``timeout``: seconds, from when the
    host is there (None: no limit). ``verbose``: a word on stderr when it runs. Raises UsageError
    for what cannot be paths, and TransferError, naming the path, when it runs.
    """

    pushing = False

    @_keywords_checked
    def __init__(
        self, remotepaths: _Paths, localpath: _Path, **keywords: Unpack[_CopyKeywords]
    ) -> None:
        super().__init__(remotepaths, localpath, keywords)

    def check_files(self) -> None:
        if not isinstance(self.destination, Deferred):
            _check_landing(os.fspath(self.destination), several=len(self.sources) > 1)


# --------------------------------------------------------------------------------------------------
# jobs: SshJob; closing a scheduler's nodes; topology; the record of a run, and its picture
# --------------------------------------------------------------------------------------------------


# asynciojobs has no annotations
_Job: TypeAlias = asynciojobs.AbstractJob
_Scheduler: TypeAlias = asynciojobs.PureScheduler
_Commands = AbstractCommand | str | Deferred | Sequence[AbstractCommand | _Word | None]
_Required: TypeAlias = "_Job | asynciojobs.Sequence | Iterable[_Required] | None"


def _steps(given: _Commands | None) -> list[AbstractCommand]:
    """What the user gave SshJob, as a list of commands; anything that is not clear raises
    UsageError.
    """
    if isinstance(given, AbstractCommand | str | Deferred):
        given = [given]
    if not isinstance(given, list | tuple):
        raise UsageError(
            "SshJob: a string, a Deferred, a command, or a list of commands or of words, "
            f"not {given!r}"
        )
    items = [item for item in given if item is not None]
    commands = [item for item in items if isinstance(item, AbstractCommand)]
    if not commands:
        return [Run(*items)]
    if len(commands) < len(items):
        raise UsageError(
            "SshJob: a mix of words and commands: write each command as Run(...), "
            "RunScript(...), ..."
        )
    return commands


class SshJob(asynciojobs.AbstractJob):  # type: ignore[misc]  # asynciojobs has no annotations
    """A list of steps on one node, run in order by an asynciojobs Scheduler.

    ``node``: an SshNode or a LocalNode. Exactly one of ``command`` and ``commands``: a string, a
    Deferred, a command, a list of commands (None items dropped), or a list of words (one Run).
    ``critical`` (default; None means True): the first failure stops the job, which raises
    CommandFailedError (or what else happened), and the scheduler with it. A job that is not runs
    all its steps, and tells its failure in one line where the host's stderr goes; ``result()`` is
    the last failing status, or 0; a host that cannot be reached or is lost, or a step that cannot
    run, is an ApsshError as ``result()`` and as ``raised_exception()``. ``forever``: the scheduler
    does not wait for it, and cancels it in the end. ``verbose``: a word on stderr for each step.
    ``keep_connection`` is accepted and changes nothing.

    ``label``: the text in listings (None: made from the first step); ``required``: the jobs that
    must be over before; ``scheduler``: the scheduler to add it to. Cancelling it ends its command
    over there. Raises UsageError for what cannot mean anything.

    Attributes: ``records``, a StepRecord for each step that began; ``failure``, how the job failed
    in its last run, an ApsshError or None.
    """

    @_keywords_checked
    def __init__(
        self,
        node: SshNode | LocalNode,
        *,
        command: _Commands | None = None,
        commands: _Commands | None = None,
        keep_connection: bool = False,
        verbose: bool | None = None,
        forever: bool = False,
        critical: bool | None = True,
        label: str | None = None,
        required: _Required = None,
        scheduler: _Scheduler | None = None,
    ) -> None:
        if not isinstance(node, SshNode | LocalNode):
            raise UsageError(f"SshJob: the node is an SshNode or a LocalNode, not {node!r}")
        if (command is None) == (commands is None):
            raise UsageError("SshJob: give exactly one of command= and commands=")
        self.node, self.verbose = node, verbose
        self.commands = _steps(command if commands is None else commands)
        self.records: list[StepRecord] = []
        self.failure: ApsshError | None = None
        super().__init__(
            forever=forever,
            critical=critical is None or critical,
            label=label,
            required=required,
            scheduler=scheduler,
        )

    async def co_run(self) -> ApsshError | _Status:
        """Run the steps, as the scheduler asks. Cancelling it ends the command that runs."""
        self.records, self.failure = [], None
        with self._failing():
            for command in self.commands:
                command.check_files()
            for command in self.commands:
                with self._failing():
                    await self._run_step(command)
        return 0 if self.failure is None else self._result_of(self.failure)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """What fails in here is the job's failure; it is raised if the job is critical."""
        try:
            yield
        except Exception as exc:
            failure = ApsshError(f"{type(exc).__name__}: {exc}")
            if isinstance(exc, ApsshError):
                failure = copy.copy(exc)  # it may be that of other nodes too
            failure.host = failure.host or self.node.hostname
            self.failure = failure
            if self.critical and isinstance(exc, ApsshError):
                raise failure from exc.__cause__
            if self.critical:
                raise

    async def _run_step(self, command: AbstractCommand) -> None:
        step = StepRecord(label=command.listing_line())
        self.records.append(step)
        if self.verbose:
            _tell(self.node.hostname, f"step: {command.step_name()}")
        try:
            with step.running():
                await command.attempt(self.node, step)
        except asyncio.CancelledError:
            # a job that ends in it breaks the scheduler, whose own must pass
            if step.may_run:
                _tell(self.node.hostname, f"it may still be running: {step.command}")
            task = asyncio.current_task()
            if task and task.cancelling():
                raise
            raise ApsshError("cancelled from inside", host=self.node.hostname) from None

    def _result_of(self, failure: ApsshError) -> ApsshError | _Status:
        """Tell a failure that stops nothing; a command's status, else an ApsshError.

        It is returned and not raised, since asynciojobs never gives back the window's slot of a
        job that raises.
        """
        host = self.node.hostname
        job = f"job {escape(self.label)} failed" if self.label else "failed"
        reason = str(failure).removeprefix(f"{escape(host)}: ")
        self.node.formatter.stderr_line(f"{job} (not critical): {reason}\n", host)
        return failure if failure.status is None else failure.status

    def raised_exception(self) -> BaseException | None:
        """What the job raised, or would have raised if it were critical and no command's status."""
        if raised := super().raised_exception():
            return cast("BaseException", raised)
        return self.failure if self.failure and self.failure.status is None else None

    async def co_shutdown(self) -> None:
        """Nothing: connections stay open until they are closed on purpose."""

    def close(self) -> None:
        """Nothing to give back for a job that did not run."""

    def _where(self) -> str:
        return f"{self.node.username}@{self.node.hostname}"

    def _lines(self) -> list[str]:
        lines = [command.listing_line() for command in self.commands]
        return [line for line in lines if line]

    def text_label(self) -> str:
        """One line: the first step, and how many more."""
        first, *others = self._lines() or [""]
        more = f" (+{len(others)})" if others else ""
        return f"{self._where()}: {first}{more}"

    def graph_label(self) -> str:
        """Id and user@host, the job's label if it has one, then one line for each step."""
        where = "Local Node" if isinstance(self.node, LocalNode) else self._where()
        label = [self.label] if self.label else []
        text = "\n".join([f"{self.repr_id()}: {where}", *label, *self._lines()])
        # for Graphviz; asynciojobs sees to quotes
        return text.replace("\\", "\\\\").replace("&", "&amp;")

    def details(self) -> str:
        """The steps, one a line."""
        lines = [command.listing_line() or "(hidden)" for command in self.commands]
        return "\n".join(f"  {self._where()}: {line}" for line in lines)

    def repr_result(self) -> str:
        """Which step failed, and how; or the result."""
        for number, step in enumerate(self.records, 1):
            if step.kind:
                return f"!! step {number} `{step.label}`: {step.error} !!"
        return str(super().repr_result())


def _with_gateways(nodes: Iterable[_AnyNode]) -> list[_AnyNode]:
    """These nodes, each once, and what leads to them."""
    found: dict[_AnyNode, None] = {}
    for each in nodes:
        node: _AnyNode | None = each
        while node and node not in found:
            found[node] = None
            node = node.gateway
    return list(found)


def _nodes_of(scheduler: _Scheduler, gateways: bool = True) -> list[_AnyNode]:
    """The nodes of a scheduler's jobs, nested schedulers included, and their gateways."""
    jobs = [job for job in scheduler.iterate_jobs() if isinstance(job, SshJob)]
    nodes = dict.fromkeys(job.node for job in jobs)
    return _with_gateways(nodes) if gateways else list(nodes)


@_keywords_checked
async def co_close_ssh_in_scheduler(scheduler: _Scheduler, manage_gateways: bool = True) -> None:
    """Close the connections of all nodes of a scheduler, nested ones included, the farthest first.

    ``manage_gateways``: their gateways too.
    """
    nodes = _nodes_of(scheduler, manage_gateways)
    for distance in sorted({node.distance() for node in nodes}, reverse=True):
        await asyncio.gather(*(node.close() for node in nodes if node.distance() == distance))


@_keywords_checked
def close_ssh_in_scheduler(scheduler: _Scheduler, manage_gateways: bool = True) -> None:
    """Close the connections of all nodes of a scheduler that has run, the farthest first.

    ``manage_gateways``: their gateways too. Raises UsageError inside of a running loop, where
    ``await co_close_ssh_in_scheduler(scheduler)`` does it.
    """
    _refuse_running_loop("close_ssh_in_scheduler", "await co_close_ssh_in_scheduler(scheduler)")
    asyncio.run(co_close_ssh_in_scheduler(scheduler, manage_gateways))


def _refuse_running_loop(what: str, remedy: str) -> None:
    with contextlib.suppress(RuntimeError):
        asyncio.get_running_loop()
        raise UsageError(f"{what} in a running loop: {remedy} there")


def _nodes_by_way(scheduler: _Scheduler) -> dict[str, _AnyNode]:
    """The nodes of a scheduler's jobs, and their gateways, by their ways (``user@gw->root@host``);
    in the order of these, node2 before node10, so that each comes behind its gateway.
    """
    nodes = {str(node): node for node in _nodes_of(scheduler)}
    ways = sorted(nodes, key=lambda way: re.sub(r"\d+", lambda found: found[0].zfill(20), way))
    return {way: nodes[way] for way in ways}


def topology_dot(scheduler: _Scheduler) -> str:
    """Graphviz source of which node is the gateway of which, from this machine (``Local Node``)
    outwards. The nodes are those of all jobs, nested schedulers included, and their gateways.
    """
    lines = ["digraph topology {", "  rankdir=LR;", '  local [label="Local Node" shape=box];']
    names = {"None": "local"}  # of ways; no gateway is None
    for way, node in _nodes_by_way(scheduler).items():
        if isinstance(node, SshNode):
            names[way] = f"n{len(names)}"
            # dot reads quotes and backslashes as JSON does, and entities as HTML does
            label = _clean(way.split("->")[-1]).replace("&", "&amp;")
            lines += [
                f"  {names[way]} [label={json.dumps(label, ensure_ascii=False)}];",
                f"  {names[str(node.gateway)]} -> {names[way]};",
            ]
    return "\n".join([*lines, "}", ""])


def topology_graph(scheduler: _Scheduler) -> Any:
    """Which node is the gateway of which, as a ``graphviz.Source``, that notebooks show. Raises
    UsageError without the Python package graphviz.
    """
    try:
        return importlib.import_module("graphviz").Source(topology_dot(scheduler))
    except ImportError:
        raise UsageError(
            "topology_graph needs the Python package graphviz: pip install graphviz"
        ) from None


def topology_as_dotfile(scheduler: _Scheduler, filename: StrPath) -> None:
    """Write Graphviz source of which node is the gateway of which (``topology_dot``) into a file
    of exactly this name.
    """
    Path(filename).write_text(topology_dot(scheduler), "utf-8")


def topology_as_pngfile(scheduler: _Scheduler, filename: StrPath) -> str:
    """Draw which node is the gateway of which: write ``filename.dot`` and ``filename.png``, and
    return the name of the second. Raises UsageError where there is no ``dot`` program (Graphviz),
    or it fails, after its own words on stderr.
    """
    png = f"{os.fspath(filename)}.png"
    topology_as_dotfile(scheduler, f"{os.fspath(filename)}.dot")
    try:
        source = topology_dot(scheduler).encode()
        subprocess.run(["dot", "-Tpng", f"-o{png}"], input=source, check=True)
    except OSError as exc:
        raise UsageError(f"no dot program (graphviz) to draw {_brief(png)}: {exc}") from None
    except subprocess.SubprocessError:
        raise UsageError(f"dot could not draw {_brief(png)}") from None
    return png


def _task_of(job: _Job) -> asyncio.Task[Any] | None:
    """What runs a job; asynciojobs has no call that tells of it."""
    return cast("asyncio.Task[Any] | None", vars(job).get("_task"))


def _job_state(job: _Job) -> tuple[str, str | None]:
    """What became of a job: idle, waiting (for a slot of the window), running, ok, failed or
    cancelled; and why, if it failed.
    """
    if job.is_running() and not job.is_done():
        # asynciojobs has no word for a job that it cancelled: not done, and "running" for ever
        task = _task_of(job)
        return "cancelled" if task and task.cancelled() else "running", None
    # a teardown job runs in no scheduler: its steps tell
    if not (job.is_done() or getattr(job, "records", None)):
        return "waiting" if job.is_scheduled() else "idle", None
    failure = job.failure if isinstance(job, SshJob) else job.raised_exception()
    if isinstance(job, asynciojobs.PureScheduler) and not (failure or job.result()):
        return "failed", str(job.why())
    if not failure:
        return "ok", None
    return "failed", str(failure) if isinstance(failure, ApsshError) else repr(failure)


def _iso_time(epoch: float | None) -> str | None:
    if epoch is None:
        return None
    return datetime.datetime.fromtimestamp(epoch).astimezone().isoformat(timespec="milliseconds")


def run_record(scheduler: _Scheduler) -> dict[str, Any]:
    """What is known of a run, at any moment of it, ready for JSON.

    ``versions``; ``started`` and ``ended`` (ISO 8601; ``_epoch``: seconds; None when no step ran);
    ``nodes``, each behind its gateway, with label, way (``user@gw->root@host``) and host key;
    ``jobs`` in the scheduler's order, those of nested schedulers (``parent``) included, with
    state, error, requirements and the StepRecords as ``steps``, whose start and end are seconds of
    one monotonic clock. Jobs that are no SshJob have neither node nor steps.
    """
    return _record_of(scheduler, scheduler.topological_order())


def _record_of(scheduler: _Scheduler, order: Iterable[_Job]) -> dict[str, Any]:
    """What is known of the jobs of a scheduler, in this order."""
    nodes = _nodes_by_way(scheduler)
    places = {way: number for number, way in enumerate(nodes, 1)}
    jobs = list(_job_records(order, places, numbers={}))
    steps = list(itertools.chain.from_iterable(job["steps"] for job in jobs))
    started = min((step["start_wall"] for step in steps), default=None)
    ended = max((step["end_wall"] or time.time() for step in steps), default=None)
    return {
        "versions": {
            "apssh": __version__,
            "asyncssh": asyncssh.__version__,
            "asynciojobs": asynciojobs.__version__,
            "python": sys.version.split()[0],
        },
        "started": _iso_time(started),
        "started_epoch": started,
        "ended": _iso_time(ended),
        "ended_epoch": ended,
        "nodes": [
            {
                "id": places[way],
                "label": way.split("->")[-1],
                "way": way,
                "hostname": node.hostname,
                "username": node.username,
                "port": node.port,
                "gateway": places.get(str(node.gateway)),
                "host_key": node._host_key_shown,
            }
            for way, node in nodes.items()
        ],
        "jobs": jobs,
    }


def _job_records(
    jobs: Iterable[_Job],
    places: Mapping[str, int],
    numbers: dict[_Job, int],
    parent: _Scheduler | None = None,
) -> Iterator[dict[str, Any]]:
    """These jobs, and behind each nested scheduler those in it. They come after what they require,
    and are numbered as they come: ``numbers`` has those so far, nested schedulers too.
    """
    for job in jobs:
        numbers[job] = len(numbers) + 1
        state, error = _job_state(job)
        label, node, steps = job.text_label() or "", None, []
        if isinstance(job, SshJob):
            label = label.partition(": ")[2]  # without the host
            node, steps = places[str(job.node)], job.records
        yield {
            "id": numbers[job],
            "parent": numbers.get(parent),
            "type": type(job).__name__,
            "label": str(job.label or label or type(job).__name__),
            "node": node,
            "critical": job.critical,
            "forever": job.forever,
            "state": state,
            "error": error,
            "requirements": sorted(numbers[each] for each in job.required if each in numbers),
            "steps": [dataclasses.asdict(step) for step in steps],
        }
        if isinstance(job, asynciojobs.PureScheduler):
            yield from _job_records(job.topological_order(), places, numbers, job)


def save_record(scheduler: _Scheduler, path: StrPath) -> None:
    """Write what is known of a run (``run_record``) as JSON, for its owner's eyes only: commands
    may hold secrets. The file is whole at any time. Raises OSError where it cannot be written.
    """
    _save(run_record(scheduler), path)


def _save(record: Mapping[str, Any], path: StrPath) -> None:
    _write_whole(path, json.dumps(record, indent=1, default=str))


@contextlib.contextmanager
def recording(scheduler: _Scheduler, path: StrPath) -> Iterator[None]:
    """``with recording(scheduler, path): scheduler.run()`` saves the record, whatever the end: an
    exception and Ctrl-C too. A first one is there before anything runs: OSError tells at once of a
    place that cannot be written.
    """
    save_record(scheduler, path)
    try:
        yield
    finally:
        save_record(scheduler, path)


# The picture of a run. Each bar is a step, and an <svg> of its own in the page: its edge cuts its
# text, so that nothing here needs to know how wide a letter is. One list of bars feeds the SVG and
# the text.


def _clean(text: str) -> str:
    """A text on one line, without characters that a picture or a terminal cannot show, nor more
    than anybody reads.
    """
    return re.sub(f"[{_CONTROLS}\t\ufffe\uffff]", " ", text[:500])


def _duration(seconds: float) -> str:
    if seconds < 59.95:
        return f"{round(seconds, 3):.3g} s"
    return str(datetime.timedelta(seconds=round(seconds)))


class _Bar(NamedTuple):
    """A step in a picture, in the order of these: ``place``: its node's in the record; ``start``,
    ``end``: seconds after the first one's start; ``state``: running, ok, failed or cancelled.
    """

    place: int
    start: float
    end: float
    label: str
    way: str
    state: str


_Run: TypeAlias = _Scheduler | Mapping[str, Any]
_TOLD = {"failed": "failed", "idle": "never ran", "waiting": "never ran"}
_ROW_HEIGHT = 18  # pixels
_SVG_HEAD = """\
<style>
text { font: 11px Helvetica, Arial, sans-serif; fill: #1a1a1a }
line { stroke: #000; opacity: 0.2 } rect { stroke: #1a1a1a }
.ok rect { fill: #a6d3f0 } .failed rect { fill: #e8590c; stroke-width: 4 }
.cancelled rect { fill: url(#stripes) } .running rect { fill: #fff; stroke-dasharray: 4 2 }
.failed text, .heading { font-weight: bold } .tick { text-anchor: middle } .way { text-anchor: end }
</style>
<pattern id="stripes" width="6" height="6" patternUnits="userSpaceOnUse">
<path d="M0 0H6V6H0Z" fill="#f5e88a"/><path d="M0 6L6 0" stroke="#b59f1d"/>
</pattern>
<path fill="#fff" d="M0 0H9999V99999H0Z"/>
<svg class="ok" x="270" y="30" width="80" height="16"><rect width="100%" height="100%"/>
<text x="3" y="12">ok</text></svg>
<svg class="failed" x="360" y="30" width="80" height="16"><rect width="100%" height="100%"/>
<text x="3" y="12">failed</text></svg>
<svg class="cancelled" x="450" y="30" width="80" height="16"><rect width="100%" height="100%"/>
<text x="3" y="12">cancelled</text></svg>
<svg class="running" x="540" y="30" width="80" height="16"><rect width="100%" height="100%"/>
<text x="3" y="12">running</text></svg>
<svg x="270" width="900" overflow="visible">"""


def _timeline(run: _Run) -> tuple[str, float, list[_Bar], list[str]]:
    """What both pictures of a run show: a heading; the seconds from the first step's start to the
    last one's end; the steps, by node and start; what failed, and what never ran.
    """
    record = run if isinstance(run, Mapping) else run_record(run)
    begin, last = record["started_epoch"], record["ended_epoch"]
    ways = {node["id"]: node["way"] for node in record["nodes"]}
    notes: list[str] = []
    bars: list[_Bar] = []
    for job in record["jobs"]:
        if told := _TOLD.get(job["state"]):
            notes.append(": ".join(filter(None, [told, job["label"], job["error"]])))
        for step in job["steps"]:
            state = {None: "ok", "cancelled": "cancelled"}.get(step["kind"], "failed")
            if step["end_wall"] is None:
                state = "running"
            bar = _Bar(
                place=job["node"],
                start=step["start_wall"] - begin,
                end=(step["end_wall"] or last) - begin,
                label=job["label"] if len(job["steps"]) == 1 else step["label"],
                way=ways[job["node"]],
                state=state,
            )
            bars.append(bar)
    span = max(last - begin, 0.001) if bars else 0.001
    # asynciojobs gives jobs that do not require each other in any order
    return record["started"] or "nothing ran", span, sorted(bars), sorted(notes)


def _svg_text(class_: str, x: str, y: float, text: str) -> str:
    return f'<text class="{class_}" x="{x}" y="{y}">{html.escape(_clean(text))}</text>'


def _svg_bar(bar: _Bar, span: float, y: float) -> str:
    width = max((bar.end - bar.start) / span, 0.003)  # as can be seen
    label = html.escape(_clean(bar.label))
    return (
        f'<svg class="bar {bar.state}" x="{bar.start / span:.2%}" y="{y}" width="{width:.2%}" '
        f'height="16"><title>{label}</title><rect width="100%" height="100%"/>'
        f'<text class="label" x="3" y="12">{label}</text></svg>'
    )


@_keywords_checked
def timeline_as_svgfile(scheduler: _Run, filename: StrPath) -> str:
    """Draw what ran where and when, as one SVG file that needs no other; its name (``.svg`` is
    added unless it is there).

    ``scheduler``: one that ran, runs or was stopped, or the record of it. A job that is no SshJob
    has no times, hence no bar. What failed and what never ran is named at the bottom.
    """
    heading, span, bars, notes = _timeline(scheduler)
    shapes = [_SVG_HEAD, _svg_text("heading", "-260", 20, heading)]
    y = 80
    for way, lane in itertools.groupby(bars, key=lambda bar: bar.way):
        shapes += [
            f'<line x1="-270" x2="930" y1="{y - 1}" y2="{y - 1}"/>',
            _svg_text("way", "-8", y + 12, way),
        ]
        ends: list[float] = []  # of the last bar in each row of the lane
        for bar in lane:
            row = next((row for row, end in enumerate(ends) if end <= bar.start), len(ends))
            ends[row : row + 1] = [bar.end]
            shapes.append(_svg_bar(bar, span, y + row * _ROW_HEIGHT))
        y += len(ends) * _ROW_HEIGHT
    for percent in range(0, 101, 10):
        shapes += [
            f'<line x1="{percent}%" x2="{percent}%" y1="76" y2="{y}"/>',
            _svg_text("tick", f"{percent}%", 70, _duration(span * percent / 100)),
        ]
    for note in notes:
        for line in textwrap.wrap(note, 190):
            y += 15
            shapes.append(_svg_text("note", "-260", y, line))
    y += 10
    size = f'width="1200" height="{y}" viewBox="0 0 1200 {y}"'
    name = os.fspath(filename).removesuffix(".svg") + ".svg"
    picture = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', *shapes, "</svg></svg>\n"]
    Path(name).write_text("\n".join(picture), "utf-8")
    return name


@_keywords_checked
def timeline_as_text(scheduler: _Run, columns: int = 80) -> str:
    """What ran where and when, for a terminal: a line for each step, by node and start, then what
    failed and what never ran. No line has more than ``columns`` (80) characters.

    ``scheduler``: one that ran, runs or was stopped, or the record of it.
    """
    heading, span, bars, notes = _timeline(scheduler)
    lines = [heading]
    for bar in bars:
        seconds = bar.end - bar.start
        shown = " " * int(bar.start * 20 / span) + "#" * int(seconds * 20 / span + 1)
        # names differ at their end: one that is too long loses its beginning
        name = f"{bar.way[-20:]:20}"
        lines.append(f"{name}|{shown:21}| {_duration(seconds):8} {bar.state:9} {bar.label}")
    for note in notes:
        lines += textwrap.wrap(note, columns)
    return "".join(f"{_clean(line)[:columns].rstrip()}\n" for line in lines)


class experiment:
    """What surrounds the run of a scheduler, so that it leaves nothing behind, however it ends.

        with apssh.experiment(scheduler, record="run.json", teardown=[stop]):
            scheduler.run()

    In a running loop it is ``async with``, around ``await scheduler.co_run()``. When the block is
    left (at its end, by an exception, by Ctrl-C) the jobs that still run are cancelled; then the
    teardown jobs run, one after the other, each to its end or for 30 s at most, all of them though
    one fails; then the files are written, and the nodes of all these jobs are closed, the farthest
    first.

    ``scheduler``: of asynciojobs. ``record``: a file for ``save_record``; ``timeline``: a file for
    ``timeline_as_svgfile`` (None: neither). They are written when the block begins, too: OSError
    tells at once of a place that cannot be. ``teardown``: jobs that are not in the scheduler; one
    that is itself a Scheduler runs its jobs at once. What the block raised is raised; after a block
    that raised nothing, the first failure of what follows; the other ones are words on stderr.
    Raises UsageError for what cannot be torn down so. Another Ctrl-C, or cancelling it, leaves the
    rest of the teardown undone.
    """

    teardown_timeout = 30.0  # seconds for each job

    @_keywords_checked
    def __init__(
        self,
        scheduler: _Scheduler,
        record: StrPath | None = None,
        timeline: StrPath | None = None,
        teardown: Iterable[_Job] | None = (),
    ) -> None:
        self.scheduler, self.record, self.timeline = scheduler, record, timeline
        self.teardown = list(teardown or ())
        members = set(scheduler.iterate_jobs(scan_schedulers=True))
        for job in self.teardown:
            if not isinstance(job, asynciojobs.AbstractJob) or job in members:
                raise UsageError("experiment: teardown is a list of jobs made without scheduler=")

    def __enter__(self) -> Self:
        _refuse_running_loop("experiment", "async with apssh.experiment(...)")
        self._write()
        return self

    def __exit__(self, kind: object, failure: BaseException | None, traceback: object) -> None:
        asyncio.run(self.__aexit__(kind, failure, traceback))

    async def __aenter__(self) -> Self:
        self._write()
        return self

    async def __aexit__(
        self, kind: object, failure: BaseException | None, traceback: object
    ) -> None:
        failures = [] if failure is None else [failure]
        try:
            await self._cancel_running()
            for job in self.teardown:
                try:
                    await self._finish(job)
                except Exception as exc:
                    failures.append(exc)
        finally:
            try:
                self._write()
            except Exception as exc:
                failures.append(exc)
            await co_close_ssh_in_scheduler(self._all_jobs())
        for other in failures[1:]:
            _screen.say(f"teardown: {escape(str(other))}")
        if failures and failure is None:
            raise failures[0]

    def _all_jobs(self) -> _Scheduler:
        """Those of the scheduler and of the teardown."""
        return asynciojobs.PureScheduler(*self.scheduler.jobs, *self.teardown)

    def _write(self) -> None:
        order = [*self.scheduler.topological_order(), *self.teardown]
        record = _record_of(self._all_jobs(), order)
        if self.record is not None:
            _save(record, self.record)
        if self.timeline is not None:
            timeline_as_svgfile(record, self.timeline)

    async def _cancel_running(self) -> None:
        """A scheduler that is cancelled leaves its jobs running."""
        tasks = map(_task_of, self.scheduler.iterate_jobs(scan_schedulers=True))
        running = [task for task in tasks if task and not task.done()]
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running, timeout=self.teardown_timeout)

    async def _finish(self, job: _Job) -> None:
        """Run one teardown job; raises what went wrong, unless the job tells it by itself."""
        name = escape(str(job.label or job.text_label()))
        try:
            result = await asyncio.wait_for(job.co_run(), self.teardown_timeout)
        except TimeoutError:
            raise ApsshError(f"{name}: no end within {self.teardown_timeout:g} s") from None
        if isinstance(job, asynciojobs.PureScheduler) and not result:
            raise ApsshError(f"{name}: not all of its jobs succeeded")


# --------------------------------------------------------------------------------------------------
# services: units of the remote systemd
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Service:
    """A command that runs on a host as a transient unit of its systemd, by systemd-run(1): it
    outlives the connection that starts it.

    ``command``: a shell line or a Deferred, run by /bin/sh. ``service_id``: the unit's name.
    ``tty``: whether it gets a terminal, by script(1). ``systemd_type``: simple, exec, forking,
    oneshot..., as in systemd.service(5). ``environ``: variables of the unit, whose values may be
    Deferred (None: no more than systemd's own). ``stop_if_running``: whether starting it first
    stops and resets an older unit of that name. ``verbose``: a word on stderr when one of its
    commands runs. Raises UsageError for a command, a name, a type or a variable that cannot be.

    The four methods make the steps of jobs: each gives a Run for a root login (or with ``sudo``),
    and takes Run's keywords; ``label`` is by default ``Service NAME: start`` and the like, and
    ``verbose`` the service's own.
    """

    command: str | Deferred
    _: dataclasses.KW_ONLY
    service_id: str
    tty: bool = False
    systemd_type: str = "simple"
    environ: Mapping[str, Any] | None = None
    stop_if_running: bool = True
    verbose: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.command, str | Deferred) or not str(self.command).strip():
            raise UsageError(
                f"Service: the command is a shell line or a Deferred, not {self.command!r}"
            )
        name = r"[A-Za-z0-9:_][A-Za-z0-9:_.@-]*"
        if not isinstance(self.service_id, str) or not re.fullmatch(name, self.service_id):
            raise UsageError(f"service_id {self.service_id!r}: letters, digits and :-_.@ only")
        if not re.fullmatch(r"[a-z-]+", self.systemd_type):
            raise UsageError(
                f"systemd_type {self.systemd_type!r}: as in systemd.service(5): "
                "simple, forking, oneshot..."
            )
        if self.tty and self.systemd_type == "forking":
            raise UsageError(
                "tty: script(1), which gives the terminal, does not fork: leave systemd_type out"
            )
        _check_env("environ", self.environ or {})
        self.service_id = self.service_id.removesuffix(".service")

    def _step(self, action: str, keywords: _RunKeywords, *words: str | Deferred) -> Run:
        if keywords.get("label") is None:
            keywords["label"] = f"Service {self.service_id}: {action}"
        keywords.setdefault("verbose", self.verbose)
        return Run(*words, **keywords)

    @_keywords_shown
    def start_command(self, **keywords: Unpack[_RunKeywords]) -> Run:
        """A Run that starts the unit; it fails when the unit cannot be started."""
        unit = f"{self.service_id}.service"
        words: list[str | Deferred] = []
        if self.stop_if_running:
            words.append(
                f"systemctl stop {unit} 2>/dev/null; systemctl reset-failed {unit} 2>/dev/null;"
            )
        words.append(f"systemd-run --quiet --unit={unit} --service-type={self.systemd_type}")
        for name, value in (self.environ or {}).items():
            words.append(_Quoted(value, f"--setenv={name}={{}}".format))
        # a terminal of the unit's own: that of systemd-run --pty would tie it to this connection
        shell = "/usr/bin/script /dev/null -qefc" if self.tty else "/bin/sh -c"
        # systemd.service(5): $ in words is expanded by systemd itself, before any shell
        command = _Quoted(self.command, lambda text: text.replace("$", "$$"))
        return self._step("start", keywords, *words, shell, command)

    @_keywords_shown
    def stop_command(self, **keywords: Unpack[_RunKeywords]) -> Run:
        """A Run that stops the unit. ``allowed_exits`` is by default 5: a unit that has gone is
        fine.
        """
        keywords.setdefault("allowed_exits", [5])
        return self._step("stop", keywords, f"systemctl stop {self.service_id}.service")

    @_keywords_shown
    def status_command(
        self, output: str | Deferred | None = None, **keywords: Unpack[_RunKeywords]
    ) -> Run:
        """A Run that shows the unit's state, as ``systemctl status`` does.

        ``output``: a file of the host that receives the text (a relative name: in the remote home);
        None: standard output. ``allowed_exits`` is by default 3 and 4: a unit that does not run or
        has gone is fine.
        """
        keywords.setdefault("allowed_exits", [3, 4])
        show = f"systemctl status --no-pager {self.service_id}.service"
        if output is None:
            return self._step("status", keywords, show)
        # the command begins in the home, and a quoted ~ is a name like another
        file = _Quoted(output, lambda path: path.removeprefix("~/"))
        return self._step("status", keywords, show, ">", file)

    @_keywords_shown
    def journal_command(
        self, since: str | Deferred | None = None, **keywords: Unpack[_RunKeywords]
    ) -> Run:
        """A Run that shows what the journal has of the unit, its own output and systemd's words
        about it.

        ``since``: a time as journalctl(1) reads it, as ``-1h``; None: since the unit's last start,
        whether it still runs or not.
        """
        unit = f"{self.service_id}.service"
        if since is not None:
            text = _Quoted(since, "--since={}".format)
            return self._step("journal", keywords, f"journalctl --no-pager --unit={unit}", text)
        # A transient unit vanishes when it ends, and `systemctl show` then knows its last start no
        # more: the journal does, by the last entry that has an invocation id (systemd.exec(5)).
        # What was printed last reaches it a moment later than the end: hence --sync, as far as one
        # may.
        last = (
            f"journalctl --unit={unit} --reverse --output=export"
            " --output-fields=INVOCATION_ID,_SYSTEMD_INVOCATION_ID"
            " | sed -n 's/.*INVOCATION_ID=//p' | head -n 1"
        )
        return self._step(
            "journal",
            keywords,
            f"journalctl --sync 2>/dev/null; id=$({last}); id=${{id:-none}};",
            "journalctl --no-pager _SYSTEMD_INVOCATION_ID=$id + _PID=1 INVOCATION_ID=$id",
        )


# a dataclass writes its own
Service.__init__ = _keywords_checked(Service.__init__)  # type: ignore[method-assign]


# --------------------------------------------------------------------------------------------------
# scenarios: nodes and jobs from a YAML file; a mistake is told with its place
# --------------------------------------------------------------------------------------------------

_STEP_TYPES: dict[str, Any] = {
    cls.__name__: cls for cls in (Run, RunScript, RunString, Push, Pull, Wait, Service)
}
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
} | {"ColonFormatter": ColonFormatter, "TimeColonFormatter": TimeColonFormatter}
_SERVICE_ACTIONS = {
    name: getattr(Service, f"{name}_command") for name in ("start", "stop", "status", "journal")
}

# What a mapping of the file may hold is told by the constructor that it stands for: its parameters
# are the keys, and the types that their annotations name are what a value may be (for an SshNode or
# an SshJob: its id). One value may stand for a list of one. Here is what no constructor says: the
# keys of the file's own, and values of parameters that take anything.
_TEXT = str | Deferred
_COMMAND_LINE: dict[str, object] = {"type": str, "command": str}
_OWN_KEYS: dict[object, dict[str, object]] = {
    SshNode: {"id": str, "localnode": bool, "known_hosts": str | None},
    LocalNode: {"id": str, "localnode": bool},
    SshJob: {"id": str, "required": Collection[SshJob] | None, "teardown": bool},
    Run: _COMMAND_LINE,
    Wait: _COMMAND_LINE,
    RunScript: _COMMAND_LINE,
    Service: {"type": str, "action": str, "environ": Mapping[str, _TEXT] | None},
}
_LISTS = {Collection, Iterable, Sequence}
_WANTED: dict[object, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Deferred: "text",
    Capture: "a name",
    SshNode: "the id of a node",
    SshJob: "the id of a job",
    Formatter: "the name of a formatter",
    AbstractCommand: "a list of commands",
    Mapping: "a mapping",
}


def _signature(call: Callable[..., Any]) -> inspect.Signature:
    """What a class or a function takes. Not that of the class itself: a ``__new__`` may take
    anything.
    """
    if isinstance(call, type):
        call = functools.partial(call.__init__, None)  # type: ignore[misc]
    return inspect.signature(call, eval_str=True)


def _kinds(hint: object) -> set[object]:
    """The types that an annotation names."""
    return {get_origin(hint) or hint}.union(*map(_kinds, get_args(hint)))


class _Fields(dict[str, Any]):
    """A mapping of the file, in which text stays as it is written. ``line``: where it begins;
    ``lines``: where its keys are.
    """

    def __init__(self, found: dict[str, Any], line: int, lines: dict[str, int]) -> None:
        super().__init__(found)
        self.line, self.lines = line, lines

    def line_of(self, key: str) -> int:
        return self.lines.get(key, self.line)  # what << merged has none


def _parsed(yaml: Any, text: str) -> Any:
    """A YAML text as _Fields, lists, texts and None. Raises what PyYAML does."""

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        pass

    def fields(loader: Any, node: Any) -> _Fields:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            problem = f"duplicate key '{key.value}'"
            if key.id != "scalar":
                problem = (
                    "a key must be text: put {{...}} in quotes "
                    "(a template? give load() an env, or --set NAME=value)"
                )
            elif key.value not in lines:
                lines[key.value] = key.start_mark.line + 1
                continue
            raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        loader.flatten_mapping(node)
        found = {key.value: loader.construct_object(value, True) for key, value in node.value}
        return _Fields(found, node.start_mark.line + 1, lines)

    Loader.add_constructor("tag:yaml.org,2002:map", fields)
    for tag in ("str", "int", "float", "bool", "timestamp", "value"):
        Loader.add_constructor(f"tag:yaml.org,2002:{tag}", Loader.construct_scalar)
    return yaml.load(text, Loader)


def _is_jinja(text: str) -> bool:
    """Whether Jinja2 can read it; where it is not installed, who renders it says so."""
    try:
        jinja2 = _extra("jinja2")
    except UsageError:
        return True
    try:
        jinja2.Environment().parse(text)
    except jinja2.TemplateSyntaxError:
        return False
    return True


class _Scenario:
    """One reading of a file. ``line`` and ``place`` (section and id) are where it is, to tell
    mistakes with.
    """

    def __init__(self, file: str, text: str, variables: Variables) -> None:
        self.file, self.text, self.variables = file, text, variables
        self.yaml = _extra("yaml")
        self.line, self.place = 1, ""
        self.formatters: dict[str, Formatter] = {}
        self.nodes: dict[str, SshNode | LocalNode] = {}
        self.jobs: dict[str, SshJob] = {}
        self.teardown: list[SshJob] = []
        self.captured = set(re.findall(r"\bcapture\W*:\s*\W?(\w+)", text))
        # in the order in which they are tried: ``yes`` may be a text too
        self.makers: dict[object, Callable[[str], Any]] = {
            bool: lambda text: self.yaml.SafeLoader.bool_values[text.lower()],
            int: int,
            float: float,
            Capture: lambda name: Capture(name, variables),
            Deferred: self.deferred,
            str: str,
        }

    def load(self, overrides: Callable[[type], dict[str, Any]] = lambda cls: {}) -> _Scheduler:
        """The scheduler; ``nodes``, ``jobs`` by id, in the order of the file, and ``teardown``.

        ``overrides``: keywords for the nodes of a class, whatever the file says.
        """
        root = self.fields(self.parsed())
        for name in root:
            self.line = root.line_of(name)
            self.known("section", {"nodes": "", "jobs": ""}, name)
        for name, fields in self.entries(root, "nodes", self.nodes, "gateway"):
            is_local = self.yaml.SafeLoader.bool_values.get(str(fields.get("localnode")).lower())
            cls = LocalNode if is_local else SshNode
            self.nodes[name] = self.make(cls, self.values(fields, cls) | overrides(cls))
        for name, fields in self.entries(root, "jobs", self.jobs, "required"):
            values = {"label": name} | self.values(fields, SshJob)
            self.jobs[name] = self.make(SshJob, values)
            if values.get("teardown"):
                self.teardown.append(self.jobs[name])
            elif set(values.get("required") or ()).intersection(self.teardown):
                self.line = fields.line_of("required")
                raise self.error("'required' names a job of the teardown, which runs when all end")
        scheduled = [job for job in self.jobs.values() if job not in self.teardown]
        return asynciojobs.Scheduler(*scheduled)

    def parsed(self) -> Any:
        try:
            return _parsed(self.yaml, self.text)
        except self.yaml.YAMLError as exc:
            mark = getattr(exc, "problem_mark", None)
            before = self.text[: mark.index if mark else exc.position]
            self.line = before.count("\n") + 1
            # the last section, and the last id in it
            if place := re.search(r"(?ms).*^(\w+):(?:.*\bid: *([\w.-]+))?", before):
                self.place = f"section {place[1]}, id {place[2] or '?'}"
            words = [getattr(exc, name, None) for name in ("context", "problem", "reason")]
            raise self.error(": ".join(filter(None, ["wrong YAML", *words]))) from None
        except RecursionError:
            raise self.error("wrong YAML: nested too deeply, or merged into itself") from None

    # mistakes

    def error(self, text: str) -> ScenarioError:
        parts = [f"{self.file}:{self.line}", self.place, text]
        return ScenarioError(_brief(": ".join(filter(None, parts)), 1000))

    def known(self, what: str, known: Mapping[str, Any], name: str) -> Any:
        """What a name stands for."""
        if name in known:
            return known[name]
        there = f": there is {', '.join(known)}"
        raise self.error(_unknown_option(name, known, there, what).message)

    def fields(self, value: Any) -> _Fields:
        if not isinstance(value, _Fields):
            raise self.error("here must be a mapping (lines of 'key: value')")
        self.line = value.line
        return value

    def field(self, value: Any, key: str) -> str:
        """A text that a mapping must have."""
        fields = self.fields(value)
        if key not in fields:
            raise self.error(f"no '{key}': add '{key}: ...'")
        self.line = fields.line_of(key)
        return cast("str", self.read(fields[key], {str}, key))

    # sections

    def entries(
        self, root: _Fields, section: str, made: dict[str, Any], key: str
    ) -> Iterator[tuple[str, _Fields]]:
        """What a section lists, each after those that its key names, and with its own place;
        ``made`` has all ids before, in the order of the file.
        """
        self.line, self.place = root.line_of(section), f"section {section}"
        listed = root.get(section)
        if not listed or not isinstance(listed, list):
            raise self.error(f"no list: add '{section}:' and '- id: ...' below it")
        found: dict[str, _Fields] = {}
        befores = {}
        for each in listed:
            id_ = self.field(each, "id")
            if id_ in found:
                raise self.error(f"duplicate id '{id_}'")
            found[id_] = each
            given = each.get(key) or []
            befores[id_] = map(str, given if isinstance(given, list) else [given])
        made.update(dict.fromkeys(found))
        try:
            for name in graphlib.TopologicalSorter(befores).static_order():
                if name in found:
                    self.place = f"section {section}, id {name}"
                    yield name, found[name]
        except graphlib.CycleError as exc:
            circle = exc.args[1][::-1]
            self.place = f"section {section}, id {circle[0]}"
            self.line = found[circle[0]].line_of(key)
            shown = " -> ".join(circle)
            raise self.error(f"'{key}' goes in a circle: {shown}: take one out") from None

    # values

    def values(self, fields: _Fields, *calls: Callable[..., Any]) -> dict[str, Any]:
        """What a mapping has for these calls."""
        hints: dict[str, object] = {}
        for call in calls:
            hints |= _OWN_KEYS.get(call, {"type": str})
            for name, each in _signature(call).parameters.items():
                several = each.kind is each.VAR_POSITIONAL
                hint = Collection[_TEXT] if several else each.annotation
                if _kinds(hint) & _WANTED.keys():
                    hints.setdefault(name, hint)
        found = {}
        for name, value in fields.items():
            self.line = fields.line_of(name)
            found[name] = self.read(value, _kinds(self.known("key", hints, name)), name)
        self.line = fields.line
        return found

    def make(self, call: Callable[..., Any], values: dict[str, Any]) -> Any:
        """Call it with those of the values that it takes; what it refuses is told with its
        place.
        """
        signature = _signature(call)
        for name, each in signature.parameters.items():
            needed = each.default is each.empty and each.kind is not each.VAR_POSITIONAL
            if needed and name not in values:
                raise self.error(f"no '{name}': add '{name}: ...'")
        given = inspect.BoundArguments(signature, collections.OrderedDict(values))
        try:
            return call(*given.args, **given.kwargs)
        except (ApsshError, TypeError, ValueError) as exc:
            raise self.error(str(exc)) from None

    def read(self, value: Any, kinds: set[object], key: str) -> Any:
        """What a value means where these types are wanted."""
        if value is None and types.NoneType in kinds:
            return None
        if AbstractCommand in kinds:
            return self.steps(value)
        if kinds & _LISTS:
            items = value if isinstance(value, list) else [value]
            return [self.read(item, kinds - _LISTS, key) for item in items]
        if isinstance(value, dict) and Mapping in kinds:
            kinds = kinds - {Mapping}
            return {name: self.read(each, kinds, f"{key}.{name}") for name, each in value.items()}
        if isinstance(value, str | _Fields) and Formatter in kinds:
            return self.formatter(value)
        if isinstance(value, str):
            with contextlib.suppress(LookupError):
                return self.meant(value.removesuffix("\n"), kinds)
        wanted = dict.fromkeys(words for kind, words in _WANTED.items() if kind in kinds)
        raise self.error(f"'{key}' must be {' or '.join(wanted)}")

    def meant(self, text: str, kinds: set[object]) -> Any:
        """What a text means where one of these is wanted. Raises LookupError: nothing."""
        if SshNode in kinds:
            return self.known("node", self.nodes, text)
        if SshJob in kinds:
            return self.known("job", self.jobs, text)
        for kind, make in self.makers.items():
            if kind in kinds:
                with contextlib.suppress(ValueError, LookupError):
                    return make(text)
        raise LookupError(text)

    def deferred(self, text: str) -> str | Deferred:
        """A Deferred where a text has ``{{name}}`` or other Jinja2. Others' templates, which are
        none (docker ps --format '{{.Names}}'), are text.
        """
        found = re.findall(r"(?s)\{[{%]\s*(.*?)\s*[}%]\}", text)
        ours = [each for each in found if not re.search(r"(?:^|\s)\.", each)]  # Go's are with dots
        names = re.findall(r"\w+", " ".join(ours))
        plain = all(re.fullmatch(r"(?a)[A-Za-z_]\w*", each) for each in found)
        alone = len(ours) == len(found) > 0 and (plain or _is_jinja(text))
        if alone or self.captured.intersection(names):
            return Deferred(text, self.variables)
        return text

    def formatter(self, value: str | _Fields) -> Formatter:
        """A formatter; the same words mean the same one, so that columns align."""
        words = str(value)
        if isinstance(value, str):
            value = _Fields({"type": value}, self.line, {})
        cls = self.known("type of formatter", _FORMATTER_TYPES, self.field(value, "type"))
        if words not in self.formatters or cls is CaptureFormatter:
            self.formatters[words] = self.make(cls, self.values(value, cls))
        return self.formatters[words]

    # steps

    def steps(self, value: Any) -> Any:
        """The commands of a job: a line for Run, a mapping, or a list of these (nulls dropped)."""
        if isinstance(value, str):
            return self.deferred(value)
        items = value if isinstance(value, list) else [value]
        return [self.step(self.fields(item)) for item in items if item is not None]

    def step(self, fields: _Fields) -> Any:
        cls = self.known("type of command", _STEP_TYPES, self.field(fields, "type"))
        if cls is Service:
            return self.service(fields)
        values = self.values(fields, cls)
        if "command" not in values:
            return self.make(cls, values)
        if "local_script" in values:
            raise self.error("give one of 'command' and 'local_script'")
        words = [values["command"]]
        if cls is RunScript:
            # a blank inside of {{ }} does not end the script's name
            words = re.findall(r"\s*((?:\{\{.*?\}\}|\S)*)\s*(.*)", words[0], re.DOTALL)[0]
        words = [self.deferred(word) for word in words if word]
        return self.make(functools.partial(cls, *words), values)

    def service(self, fields: _Fields) -> Any:
        """What one of a Service's methods makes."""
        action = self.field(fields, "action")
        method = self.known("action", _SERVICE_ACTIONS, action)
        values = self.values(fields, Service, method)
        if action != "start":
            values.setdefault("command", "true")  # the unit is known by its name
        service = self.make(Service, values)
        return self.make(functools.partial(method, service), values)


def _scenario_text(
    filename: StrPath, env: Mapping[str, Any] | None, save_intermediate: bool | StrPath | None
) -> tuple[str, str]:
    """The name of a scenario for messages, and its text: as it is, or as the template has it."""
    path = Path(filename)
    try:
        text = path.read_text("utf-8-sig")
        if not env:
            return str(path), text
        text = _rendered(path, text, env)
        if not save_intermediate:
            return f"{path} (rendered)", text
        target = Path(f"{path}.tmp")
        if save_intermediate is not True:
            target = Path(save_intermediate)
        elif path.suffix == ".j2":
            target = path.with_suffix("")
        if target.exists() and target.samefile(path):
            raise ScenarioError(
                escape(f"{path}: save_intermediate would overwrite the template: give another path")
            )
        text = (
            f"# generated by apssh from {escape(str(path))}: edit that file, not this one\n{text}"
        )
        target.write_text(text, "utf-8")
        return str(target), text
    except OSError as exc:
        raise ScenarioError(escape(f"{exc.filename}: {_reason(exc)}")) from None
    except UnicodeError:
        raise ScenarioError(escape(f"{path}: not UTF-8 text: save it as UTF-8")) from None


def _rendered(path: Path, text: str, env: Mapping[str, Any]) -> str:
    jinja2 = _extra("jinja2")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    try:
        return str(environment.from_string(text).render(env))
    except Exception as exc:  # a template may compute anything
        frames = traceback.extract_tb(exc.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == "<template>"]
        line = getattr(exc, "lineno", [1, *lines][-1])
        remedy = ""
        if isinstance(exc, jinja2.UndefinedError):
            remedy = ": add it to env (--set NAME=value)"
        raise ScenarioError(escape(f"{path}:{line}: template: {exc}{remedy}")) from None


class YamlLoader:
    """A scenario of nodes and jobs in a YAML file (README.md has the keys); needs ``pip install
    'apssh[yaml]'``.

    ``filename``: the file; it is read by ``load`` and ``load_with_maps``, not here.
    ``variables``: where ``capture: name`` stores, and where ``{{name}}`` in commands, paths,
    arguments and scripts is looked up when a job runs; new at each load. ``teardown``: the jobs
    with ``teardown: true``, which are in no scheduler, for ``experiment``. Loading connects to
    nothing. The label of a job is its id, unless the file gives another.
    """

    def __init__(self, filename: StrPath) -> None:
        self.filename = filename
        self.variables = Variables()
        self.teardown: list[SshJob] = []

    @_keywords_checked
    def load(
        self,
        env: Mapping[str, Any] | None = None,
        *,
        save_intermediate: bool | StrPath | None = None,
    ) -> asynciojobs.Scheduler:
        """Read the file; its jobs in an asynciojobs Scheduler, ready to run.

        ``env``: variables; when there are any, the text is a Jinja2 template.
        ``save_intermediate``: where to write what comes of the template: True beside the file
        (``x.yaml.j2`` gives ``x.yaml``, any other name gets ``.tmp``), a path there; None or False
        nowhere. Raises ScenarioError, with file, line, section, id and the remedy, for any mistake;
        UsageError where PyYAML or Jinja2 is missing.
        """
        return self.load_with_maps(env, save_intermediate=save_intermediate)[2]

    @_keywords_checked
    def load_with_maps(
        self,
        env: Mapping[str, Any] | None = None,
        *,
        save_intermediate: bool | StrPath | None = None,
    ) -> tuple[dict[str, SshNode | LocalNode], dict[str, SshJob], asynciojobs.Scheduler]:
        """Read the file; its nodes by id and its jobs by id, in the order of the file, and their
        Scheduler.

        ``env``: variables; when there are any, the text is a Jinja2 template.
        ``save_intermediate``: where to write what comes of the template: True beside the file
        (``x.yaml.j2`` gives ``x.yaml``, any other name gets ``.tmp``), a path there; None or False
        nowhere. Raises ScenarioError, with file, line, section, id and the remedy, for any mistake;
        UsageError where PyYAML or Jinja2 is missing.
        """
        name, text = _scenario_text(self.filename, env, save_intermediate)
        self.variables = Variables()
        scenario = _Scenario(name, text, self.variables)
        scheduler = scenario.load()
        self.teardown = scenario.teardown
        return scenario.nodes, scenario.jobs, scheduler


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
        chain = "->".join(map(str, self.chain))
        return f"None->{chain}" if self.direct else chain


# Texts are cut into words (_words). What a word stands for (_Sources) is the lines of a file, a
# folder or a group, whose words are looked at in turn, or itself: then its ranges are expanded
# (_expand_ranges), and each name is parsed hop by hop (_parse_target, _parse_hop).


def _parse_targets(
    texts: str | Iterable[str],
    *,
    exclude: str | Iterable[str] | None = None,
    login: str | None = None,
    gateway: str | None = None,
    port: int | None = None,
    sources: _Sources | None = None,
) -> list[Target]:
    """The targets that texts name (see the usage page), each once, in order, less the excluded
    ones. ``login`` is for each hop that names no user, ``port`` for the host itself, ``gateway``
    (or several, or the word None for no gateway) stands before targets that name no way;
    ``sources`` reads what words stand for (by default no standard input). UsageError names the
    text, its file and line.
    """
    if sources is None:
        sources = _Sources()
    texts = _texts(texts)
    way = "" if gateway in (None, "", "None") else _plain_arrows(f"{gateway}->")
    parse = functools.partial(_parse_target, login=login, port=port, way=way)
    found: dict[Target, None] = {}
    by_host = collections.defaultdict(list)
    for number, target in enumerate(sources.targets(texts, parse)):
        if number == MAX_TARGETS:
            raise UsageError(f"more than {MAX_TARGETS} targets")
        found[target] = None
        by_host[target.chain[-1].host.lower()].append(target)
    if not found:
        given = " ".join(texts).strip(" ,")
        raise UsageError(f"no target in {_brief(given)}" if given else "no target: use -t HOST ...")
    for text in _texts(exclude):
        excluded = 0
        for pattern in sources.targets([text], _parse_target, hosts_too=True):
            for target in by_host[pattern.chain[-1].host.lower()]:
                if _matches(pattern, target):
                    found.pop(target, None)
                    excluded += 1
        if not excluded:  # a slip here would run where it must not
            sources.notice(f"-x {escape(text)} excludes none of the targets")
    if not found:
        raise UsageError("no target: -x excludes them all")
    return list(found)


def _texts(given: str | Iterable[str] | None) -> list[str]:
    """One text, several or none, as a list."""
    return [given] if isinstance(given, str) else list(given or ())


def _parse_target(
    text: str, login: str | None = None, port: int | None = None, way: str = ""
) -> Target:
    """One target, its ranges expanded already; the arguments are for what it does not say."""
    if "->" not in text:
        text = way + text
    chain = text.removeprefix("None->")
    *gateways, host = chain.split("->")
    hops = [*(_parse_hop(hop, login) for hop in gateways), _parse_hop(host, login, port)]
    if len(set(hops)) < len(hops):
        raise UsageError("it is its own gateway")
    return Target(tuple(hops), direct=chain != text)


def _matches(pattern: Target, target: Target) -> bool:
    """Whether an exclusion names this target, in all the parts that it says; the way there only if
    it says one.
    """
    has_way = pattern.direct or len(pattern.chain) > 1
    chain = target.chain if has_way else target.chain[-1:]
    return len(chain) == len(pattern.chain) and all(map(_covers, pattern.chain, chain))


def _covers(named: Hop, hop: Hop) -> bool:
    return (
        named.host.lower() == hop.host.lower()
        and named.user in (None, hop.user)
        and named.port in (None, hop.port)
    )


def _plain_arrows(text: str) -> str:
    """Hops written in one way, ``a->b``, and no blank but the space."""
    text = re.sub(r"[ \t\r\n]+", " ", text.replace("→", "->"))
    return text.replace(" ->", "->").replace("-> ", "->")


def _words(text: str) -> list[str]:
    """What blanks and commas separate, but for commas in brackets and blanks around arrows."""
    return re.findall(r"(?:\[[^][ ]*+\]|[^][ ,]++|[][])++", _plain_arrows(text))


_GROUPS = "~/.apssh"
_GROUP_DEPTH = 100  # groups in one another: Python's own limit is some 600 of them


def _group_path(name: str) -> str:
    return os.path.join(os.path.expanduser(_GROUPS), name)


def _find(word: str) -> str:
    """The path of the file or folder that a word means, here or in ~/.apssh, or nothing."""
    places = (os.path.expanduser(word), _group_path(word))
    return next(filter(os.path.exists, places), "") if word else ""


_ParseTarget = Callable[[str], Target]


def _notice(text: str) -> None:
    _screen.notice(f"apssh: {text}")


class _Sources:
    """What words stand for besides hosts: files and folders (here or in ~/.apssh), groups, standard
    input. Each is read once: a pipe, as the shell's <(command) makes, gives its text once.

    ``stdin``: gives the text that ``-`` stands for; None: it is refused. ``notice`` hears, once
    each, of what may not have been meant, such as words that are taken for a file here and could as
    well be hosts; by default stderr does.
    """

    def __init__(
        self, stdin: Callable[[], str] | None = None, notice: Callable[[str], None] = _notice
    ) -> None:
        self._stdin = stdin
        self.notice = functools.cache(notice)
        self._lines = functools.cache(self._read)

    def targets(
        self, texts: Iterable[str], parse: _ParseTarget, *, hosts_too: bool = False
    ) -> Iterator[Target]:
        """Each target that is meant. ``hosts_too``: a word that is a file means the host of that
        name as well (an exclusion errs on the safe side).
        """
        for text in texts:
            for word in [text] if _find(text) else _words(text):
                yield from self._meant("", word, (), parse)
                host = _is_host(word)
                if host and hosts_too:
                    yield parse(word)
                elif host and os.path.exists(word) and not word.endswith((".txt", ".list")):
                    self.notice(
                        f"{word} is a file or folder here: what it holds are the targets "
                        f"(./{word} says so; USER@{word} is the host)"
                    )

    def _meant(
        self, place: str, word: str, within: Sequence[str], parse: _ParseTarget
    ) -> Iterator[Target]:
        """What a word means, ``within`` these files and groups; errors begin with its place."""
        try:
            lines = self._lines(word) if word.startswith("@") or not within else None
            if lines is None:
                yield from map(parse, _expand_ranges(word))
                return
        except UsageError as exc:
            raise UsageError(f"{place}{_brief(word)}: {exc.message}") from None
        within = (*within, word)
        for number, line in enumerate(lines, 1):
            here = f"{_brief(word)}:{number}: "
            listed = line.partition("#")[0]
            _refuse_columns(here, listed)
            for each in _words(listed):
                if each.startswith("@") and (each in within or len(within) > _GROUP_DEPTH):
                    way = _brief(" -> ".join([*within, each]), 400)
                    raise UsageError(f"{here}groups in a circle, or nested too deep: {way}")
                yield from self._meant(here, each, within, parse)

    def _read(self, word: str) -> list[str] | None:
        """The lines of what a word stands for; None: it stands for itself."""
        if word == "-" and self._stdin:
            return self._stdin().split("\n")
        path = _find(word)
        if word.startswith("@"):
            path = _group_path(word[1:])
            if not re.fullmatch(r"@[^./][^/]*", word) or not os.path.exists(path):
                raise UsageError(f"no such group; a group is a file in {_GROUPS}")
        if path:
            return _read_list(path)
        if "/" in re.sub(r"\[[^][]*\]", "", word):
            raise UsageError("no such file")
        return None


def _read_list(path: str) -> list[str]:
    """The lines of a file; or the names in a folder, but for the <host>.err that -o writes."""
    try:
        if os.path.isdir(path):
            names = sorted(file.name for file in os.scandir(path) if file.is_file())
            return [name for name in names if not re.search(r"^\.|\.err$", name)]
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            text = file.read(MAX_TARGET_FILE + 1)
    except OSError as exc:
        raise UsageError(_reason(exc)) from None
    if len(text) > MAX_TARGET_FILE or "\0" in text or "\ufffd" in text:
        raise UsageError("not a text file of targets")
    return text.split("\n")


# Other tools write ``10.0.0.1 root``, and /etc/hosts an address before its names: read as two
# hosts, a command would run twice on the one, or where nobody meant it. So a name after an address,
# and a bare word after a full name, are refused unless a comma stands between.
def _refuse_columns(place: str, line: str) -> None:
    for before, after in re.findall(
        r"(?<![^\s,])([^\s,@][^\s,]*+)(?=[ \t]+([\w.-]+)(?![^\s,]))", line
    ):
        host = re.sub(r".*(->|→|@)|:[0-9]+$", "", before)
        columns = _is_address(host) or ("." in host and "." not in after)
        if columns and not _is_address(after):
            raise UsageError(
                f"{place}{_brief(f'{before} {after}')}: one host, or two? "
                f"write {_brief(f'{after}@{before}')}, or a comma between hosts"
            )


# --------------------------------------------------------------------------------------------------
# fan-out: steps on many nodes, within limits; run, push, pull and the programs stand on it
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False, repr=False)
class Result:
    """What came of one host: ``status`` (exit status) or ``signal`` (its name), or neither and
    ``error`` and ``kind``.

    ``kind`` is None for a success; that of an ApsshError for a failure; ``interrupted`` where
    Ctrl-C or a cancellation came first; ``not started`` where more hosts than ``max_failures`` had
    failed before. ``name`` is the shortest text that tells this host from the
    others of the run; ``target`` is how the command line would name it; ``seconds`` counts from the
    first attempt to connect; ``reached``: whether the host was ever logged in to; ``may_run``: the
    command may still be running over there; ``failures``: of a copy, each path with the reason why
    it failed (up to 1,000; ``error`` names the first few and counts the others).
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
    reached: bool = False
    may_run: bool = False
    failures: list[str] = dataclasses.field(default_factory=list)

    def __repr__(self) -> str:
        text = f"{self.name}: {self.outcome} in {self.seconds:g} s"
        if self.stdout_bytes:
            text += f", stdout '{_brief(self.stdout)}'"
        if self.error:
            text += f": {self.error}"
        return f"<Result {text}>"

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
        """In a word or two: ok, status 3, signal TERM, or else the kind of the failure."""
        if self.kind == "status":
            return f"status {self.status}"
        if self.kind == "signal":
            return f"signal {self.signal}"
        return self.kind or "ok"


class _HoldingFormatter(Formatter):
    """Holds what each host prints until it is asked for. Another formatter, if there is one, shows
    it too, and hears of all that happens.
    """

    def __init__(self, shown: Formatter | None = None) -> None:
        super().__init__()
        self._held: dict[Endpoint, _HeldSink] = {}
        self._shown = shown
        if shown:
            # all that is said to a formatter goes to that one, but for where outputs go
            for name in vars(Formatter).keys() - {"endpoint_sink"}:
                if not name.startswith("_"):
                    vars(self)[name] = getattr(shown, name)

    def endpoint_sink(self, endpoint: Endpoint) -> _Sink:
        shown = self._shown.endpoint_sink(endpoint) if self._shown else None
        return self._held.setdefault(endpoint, _HeldSink(shown, both=True))

    def take(self, endpoint: Endpoint) -> tuple[bytes, bytes]:
        """Both streams of a host, which are then forgotten."""
        held = self._held.pop(endpoint, _HeldSink())
        return held.stdout(), held.stderr()


# A plan is given the nodes, looks for all that can be found wrong before any connection, and has a
# step for each. _fan_out has workers take these nodes one after the other. The turn of each is
# _run_on: its step is done (_attempts, again where a host was not reached), and whatever comes of
# it is made a Result, which all views hear of: a view is whoever wants to know.

_Steps = dict[SshNode, AbstractCommand]
_Plan = Callable[[Sequence[SshNode]], _Steps]


class _View:
    """Who follows a fan-out: a subclass redefines what it wants to hear of; here all is empty."""

    def begin(self, names: Collection[str]) -> None:
        """All is known to be right, and these hosts are about to have their turns."""

    def started(self, name: str, step: StepRecord) -> None:
        """A host's turn has come; ``step`` tells how far it is."""

    def done(self, result: Result) -> None:
        """A host is done, or was interrupted, or its turn never came."""

    def finish(self) -> None:
        """No host is at work any more."""


async def _fan_out(
    steps: _Steps,
    *,
    window: int = 0,
    retries: int = 0,
    max_failures: int | None = None,
    views: Sequence[_View] = (),
) -> list[Result]:
    """Run the step of each node, at most ``window`` nodes at once (0: as many as files can be
    open), and close the nodes; a Result each, in their order. Once more than ``max_failures`` have
    failed (None: no limit) no further one is started. Cancelling it ends the remote commands. The
    views hear of all hosts, those whose turn never came too.
    """
    if min(window, retries, max_failures or 0) < 0:
        raise UsageError("window, retries and max_failures are numbers, 0 or more")
    files = max((node.open_files + step.open_files for node, step in steps.items()), default=1)
    capacity = max((_Limits.here().open_files - 100) // files, 1)
    _Limits.here().forget("sudo")  # each run asks anew: it may have been mistyped
    results: dict[SshNode, Result] = {}
    waiting = iter(steps)
    failures = 0
    if max_failures is None:
        max_failures = len(steps)

    async def worker() -> None:
        nonlocal failures
        while failures <= max_failures and (node := next(waiting, None)):
            try:
                results[node] = await _run_on(node, steps[node], views, retries)
                failures += not results[node].ok
            finally:
                await node.close()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(window or capacity, capacity, len(steps))):
                group.create_task(worker())
    except BaseExceptionGroup as exc:
        raise exc.exceptions[0] from None
    finally:
        reason = "not started" if failures > max_failures else "interrupted"
        for node in waiting:
            unused = ApsshError(reason, kind=reason)
            results[node] = _conclude(node, StepRecord(), unused, views)
        await asyncio.gather(*(node.close() for node in _with_gateways(steps)))
    return [results[node] for node in steps]


async def _run_on(
    node: SshNode, command: AbstractCommand, views: Sequence[_View], retries: int
) -> Result:
    """Run one step on its node; what came of it, which the views hear of whatever the end. An error
    that nothing above knew of is this host's alone too.
    """
    step = StepRecord()
    failure: ApsshError | None = ApsshError("interrupted", kind="interrupted")
    for view in views:
        view.started(node.shown_name, step)
    try:
        with step.running():
            await _attempts(node, command, step, retries)
        failure = None
    except ApsshError as exc:
        failure = exc
    except asyncssh.Error as exc:
        failure = ConnectionFailedError(escape(str(exc)))
    except BrokenPipeError:  # nobody reads what the hosts print: the end of the run
        raise
    except Exception as exc:
        failure = ApsshError(f"{type(exc).__name__}: {_brief(str(exc), 200)}")
    finally:
        result = _conclude(node, step, failure, views)
    return result


def _conclude(
    node: SshNode, step: StepRecord, failure: ApsshError | None, views: Sequence[_View]
) -> Result:
    """What is known of a node when its turn has ended, or will never come; the views hear of it."""
    result = Result(
        node.hostname,
        node.username,
        node.port,
        name=node.shown_name,
        target=node._target,
        seconds=round((step.end or 0) - (step.start or 0), 3),
        bytes_transferred=step.bytes_transferred,
        reached=node.reached,
        may_run=step.may_run,
    )
    status = failure.status if failure else step.status
    if isinstance(status, str):
        result.signal = status
    else:
        result.status = status
    if failure:
        result.error, result.kind = failure.message, failure.kind
        result.failures = list(failure.failures)
    if isinstance(node.formatter, _HoldingFormatter):
        result.stdout_bytes, result.stderr_bytes = node.formatter.take(node._endpoint)
    for view in views:
        view.done(result)
    return result


async def _attempts(
    node: SshNode, command: AbstractCommand, step: StepRecord, retries: int
) -> None:
    """The step of one node; again when the host could not be reached."""
    for attempt in itertools.count():
        try:
            await command.attempt(node, step)
            return
        except ConnectionFailedError as exc:
            # again where no command began, and the host may think better of it
            if attempt >= retries or exc.command or exc.kind in ("hostkey", "auth"):
                raise
        await asyncio.sleep(random.uniform(0.5, 1) * min(2**attempt, 30))


def _build_nodes(
    targets: Sequence[Target],
    *,
    formatter: Formatter,
    config: str | None = None,
    connect_timeout: float | None = None,
    **options: Any,
) -> list[SshNode]:
    """A node for each target, gateways shared, completed from the config; ``options`` are
    SshNode's. Raises UsageError, ApsshError (a config that ssh refuses).
    """
    _check_time(connect_timeout)
    ssh_config = _SshConfig(config)
    answers = ssh_config.lookup_all({hop for target in targets for hop in target.chain})
    gateways: dict[object, SshNode] = {}
    nodes: dict[object, SshNode] = {}
    for target in targets:
        hop = target.chain[-1]
        node = SshNode(
            hop.host,
            gateway=_build_gateway(
                target.chain, answers, gateways, direct=target.direct, **options
            ),
            formatter=formatter,
            config=answers[hop],
            **options,
        )
        node._target = str(target)
        hops = node._hops()
        for each in hops if connect_timeout is not None else ():
            each.timeout = connect_timeout  # over the config's, though it be the default
        # `a a:22 A` runs once
        way = tuple((each.hostname.lower(), each.username, each.port) for each in hops)
        nodes.setdefault(way, node)
    return list(nodes.values())


def _same_for_all(command: AbstractCommand, nodes: Sequence[SshNode]) -> _Steps:
    """A plan: one step for all nodes, so that a script has one name everywhere."""
    command.check_files()
    needs_guard = isinstance(command, _ShellCommand) and (command.env or command.sudo)
    if needs_guard and not all(node.guard for node in nodes):
        raise UsageError(_NEED_GUARD)
    return dict.fromkeys(nodes, command)


class _PullApart(Pull):
    """A Pull into a place of this host's own, whose folder is made."""

    def check_files(self) -> None:
        """It need not be there."""

    async def _carry_out(self, node: _AnyNode, step: StepRecord) -> int | str:
        place = _text_of(self.destination)
        into = len(self.sources) > 1 or any(map(_is_pattern, map(_text_of, self.sources)))
        with _file_errors(node.hostname, place):  # this host's failure: the others go on
            os.makedirs(place if into else os.path.dirname(place) or ".", exist_ok=True)
        return await super()._carry_out(node, step)


def _copies(
    kind: type[Push | Pull],
    sources: StrPath | Iterable[StrPath],
    destination: str,
    options: Mapping[str, Any],
    nodes: Sequence[SshNode],
) -> _Steps:
    """A plan: a copy for each node, the fields of its paths filled in; ``options`` are Push's."""
    if kind is Pull and re.search(r"\{(host|fqdn|user)\}", re.sub(r"\{\{|\}\}", "", destination)):
        kind = _PullApart
    templates = [str(path) for path in _paths(sources)]
    steps: _Steps = {}
    places: dict[str, SshNode] = {}
    for node in nodes:
        paths = [_expand_path(path, node) for path in templates]
        place = _expand_path(destination, node)
        steps[node] = kind(paths, place, **options)
        steps[node].check_files()
        if kind is Push:
            for path in paths:
                if not os.path.lexists(path):
                    raise UsageError(f"{escape(path)}: no such file")
                if os.path.isdir(path) and not options["recurse"]:
                    raise UsageError(f"{escape(path)}: is a folder (recurse, -r, copies folders)")
            continue
        first = places.setdefault(os.path.realpath(place), node)
        if first is not node:
            raise UsageError(
                f"{first.hostname} and {node.hostname} would both write to {destination}: "
                "put {host} in the path"
            )
    return steps


def _expand_path(path: str, node: SshNode) -> str:
    """``{host}``, ``{fqdn}`` and ``{user}`` in a path; they are file names, and lead nowhere else.
    ``{{`` and ``}}`` stand for braces.
    """
    values = {
        "{{": "{",
        "}}": "}",
        "{host}": node.shown_name,
        "{fqdn}": re.sub(_NOT_IN_FILE_NAME, "_", node.hostname),
        "{user}": re.sub(_NOT_IN_FILE_NAME, "_", node.username),
    }
    return re.sub(rf"{{{{|}}}}|{_FIELD}", lambda match: values.get(match[0], match[0]), path)


# run, push and pull, and their coroutine forms. What they share is described once, here, and added
# to each docstring, so that help(apssh.run) says it all.

_SHARED_KEYWORDS = """
    ``targets`` are texts as on the command line: host names, ranges such as ``node[01-20]``, hops
    ``gw->user@host``, files of targets, groups. What the command line's options say is said by:

    - ``exclude``: targets to leave out; ``login``, ``gateway``, ``port``: for targets that do not
      say (default: the config's, else the local user, no gateway, 22);
    - ``window``: at most so many hosts at once (0: no limit); ``retries``: further attempts at
      hosts that could not be reached (0); ``max_failures``: once more hosts than that have failed
      no further one is started (None: no limit); ``connect_timeout``: seconds to be logged in, all
      hops included (30);
    - ``config``: None reads no ssh_config, True the user's own, a path that file;
    - ``keys``: file names or key objects, and only these (None: the agent's, else ~/.ssh/id_*);
      ``password``: tried on every host (None: none); ``forward_agent``: as ``ssh -A`` (False);
    - ``host_keys``: accept-new, yes or no (None: APSSH_HOST_KEYS, else the config's, else
      accept-new); ``known_hosts``: None verifies nothing, a path uses that file (default: the
      user's and the system's);
    - ``guard``: False for hosts without a POSIX shell (True); ``keepalive``: seconds between
      probes of a silent connection (9);
    - ``formatter``: shows the output as it comes, in place of holding it for the Result (None);
    - ``done``: called with each Result as it comes (None).

    Gives a Result for each target, in their order: a host that fails raises nothing. Raises
    UsageError for what cannot mean anything, before any connection, and for a call of the plain
    form inside of a running event loop, where ``await`` of the ``co_`` form is meant. Cancelling
    it, or Ctrl-C, ends the remote commands.
    """


def _with_shared_keywords(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """The docstring completed; an unknown keyword answered as an unknown option is."""
    function.__doc__ = f"{function.__doc__}{_SHARED_KEYWORDS}"
    return _keywords_checked(function)


@dataclasses.dataclass
class _Callback(_View):
    """Tells a user's function of each Result."""

    function: Callable[[Result], object]

    def done(self, result: Result) -> None:
        self.function(result)


class _TargetKeywords(TypedDict, total=False):
    exclude: Annotated[str | Iterable[str] | None, ()]
    login: _TextOrNone
    gateway: _TextOrNone
    port: _NumberOrNone


class _LimitKeywords(TypedDict, total=False):
    window: Annotated[int, 0]
    retries: Annotated[int, 0]
    max_failures: _NumberOrNone


class _NodeKeywords(TypedDict, total=False):
    connect_timeout: _SecondsOrNone
    keys: Collection[StrPath | Key] | None
    password: _TextOrNone
    forward_agent: _Flag
    host_keys: _TextOrNone
    known_hosts: Annotated[_KnownHostsChoice, _VERIFY]
    guard: Annotated[bool, True]
    keepalive: Annotated[float, KEEPALIVE_INTERVAL]


class _ManyKeywords(_TargetKeywords, _LimitKeywords, _NodeKeywords, total=False):
    """What co_run, co_push and co_pull share."""

    config: str | bool | None
    formatter: Formatter | None
    done: Callable[[Result], object] | None


class _StepOptions(_SetupKeywords, total=False):
    """What co_run hands on to its step."""

    timeout: _SecondsOrNone
    allowed_exits: Annotated[_Exits, None]


class _CopyOptions(_TransferKeywords, total=False):
    """What co_push and co_pull hand on to theirs."""

    timeout: _SecondsOrNone


class _RunManyKeywords(_StepOptions, _ManyKeywords, total=False):
    """What co_run takes besides what it names."""


class _CopyManyKeywords(_CopyOptions, _ManyKeywords, total=False):
    """What co_push and co_pull take besides what they name."""


async def _quick(
    targets: str | Iterable[str],
    plan: _Plan,
    keywords: _ManyKeywords,
    *,
    hold: bool = False,
    **node_options: Any,
) -> list[Result]:
    """Targets, nodes, fan-out."""
    if not isinstance(targets, str):
        targets = list(targets)
        if not targets:  # whatever is to be done to the hosts of an empty list is done
            return []
    _key_memory.given_up.clear()  # each run asks anew
    config, formatter, done = keywords["config"], keywords["formatter"], keywords["done"]
    if not isinstance(config, str):
        config = None if config else "none"
    if formatter is None or hold:
        formatter = _HoldingFormatter(formatter)
    nodes = await asyncio.to_thread(
        _build_nodes,
        _parse_targets(targets, **_part(keywords, _TargetKeywords)),
        formatter=formatter,
        config=config,
        **_part(keywords, _NodeKeywords),
        **node_options,
    )
    views = [_Callback(done)] if done else []
    return await _fan_out(plan(nodes), views=views, **_part(keywords, _LimitKeywords))


@_with_shared_keywords
async def co_run(
    targets: str | Iterable[str],
    command: str | AbstractCommand,
    *,
    sudo_password: str | None = None,
    hold: bool = False,
    **keywords: Unpack[_RunManyKeywords],
) -> list[Result]:
    """Run a command on many hosts at once; ``run`` is the plain form, ``co_run`` the coroutine.

    ``command`` is a line, read by the login shell over there, or a step such as
    ``RunScript("check.sh")``, which then has the next keywords itself (but for ``sudo_password``):

    - ``timeout``: seconds for the command (None: no limit); ``env``: variables for it, whatever
      the server accepts (None: none); ``pty``: give it a terminal (False); ``x11``: forward the
      DISPLAY (False); ``allowed_exits``: exit codes and signal names that are a success too, as
      ``["TERM", 4]`` (None: only 0);
    - ``stdin``: bytes, text, an open binary file or a path object, each host getting all of it
      (None: end of file at once); ``sudo``: run as root (True) or as the user of that name (False);
      ``sudo_password``: for sudo where it asks for one (None: the terminal is asked, once).

    ``hold``: with a formatter, hold the output for the Result too (False; without a formatter it is
    always held).
    """
    options = _part(keywords, _StepOptions)
    if not isinstance(command, AbstractCommand):
        command = Run(command, **options)
    elif given := [name for name, value in options.items() if value not in (None, False)]:
        raise UsageError(f"{', '.join(given)}: give it to {type(command).__name__}(...) itself")
    plan = functools.partial(_same_for_all, command)
    return await _quick(targets, plan, keywords, hold=hold, sudo_password=sudo_password)


@_with_shared_keywords
async def co_push(
    targets: str | Iterable[str],
    localpaths: StrPath | Iterable[StrPath],
    remotepath: str,
    **keywords: Unpack[_CopyManyKeywords],
) -> list[Result]:
    """Copy local files to many hosts at once; ``push`` is plain, ``co_push`` the coroutine form.

    ``localpaths`` is a path or a list of paths, ``remotepath`` where they go: into it when it is a
    folder, ends in ``/``, or there are several. ``{host}``, ``{fqdn}`` and ``{user}`` may stand in
    any path (``{{`` and ``}}`` for braces).

    - ``recurse``: copy folders too (False); ``preserve``: keep times too (False);
      ``follow_symlinks``: copy what links in a tree point to (False); ``inplace``: write onto
      existing files themselves, where a rename cannot be (False); ``timeout``: seconds for the
      copy to one host (None: no limit).
    """
    options = _part(keywords, _CopyOptions)
    plan = functools.partial(_copies, Push, localpaths, remotepath, options)
    return await _quick(targets, plan, keywords)


@_with_shared_keywords
async def co_pull(
    targets: str | Iterable[str],
    remotepaths: StrPath | Iterable[StrPath],
    localpath: str,
    **keywords: Unpack[_CopyManyKeywords],
) -> list[Result]:
    """Copy files of many hosts here; ``pull`` is the plain form, ``co_pull`` the coroutine.

    ``remotepaths`` is a path or a list of paths, globs expanded, ``localpath`` where they go.
    ``{host}``, ``{fqdn}`` and ``{user}`` in it keep hosts apart, and the folders of such a path are
    made (``{{`` and ``}}`` stand for braces). Two hosts that would write to one place are refused.

    - ``recurse``: copy folders too (False); ``preserve``: keep times too (False);
      ``follow_symlinks``: copy what links in a tree point to (False); ``inplace``: write onto
      existing files themselves, where a rename cannot be (False); ``timeout``: seconds for the
      copy from one host (None: no limit).
    """
    options = _part(keywords, _CopyOptions)
    plan = functools.partial(_copies, Pull, remotepaths, localpath, options)
    return await _quick(targets, plan, keywords)


def _plain_form(coroutine: Callable[_P, Coroutine[Any, Any, _T]]) -> Callable[_P, _T]:
    """A coroutine function as a function, with the name, keywords and docstring of the first."""
    name = coroutine.__name__.removeprefix("co_")

    @functools.wraps(coroutine)
    def call(*args: _P.args, **keywords: _P.kwargs) -> _T:
        _refuse_running_loop(f"apssh.{name}", f"await apssh.co_{name}(...)")
        with asyncio.Runner(loop_factory=_Loop) as runner:
            return runner.run(coroutine(*args, **keywords))

    call.__name__ = call.__qualname__ = name
    return call


run = _plain_form(co_run)
push = _plain_form(co_push)
pull = _plain_form(co_pull)


# --------------------------------------------------------------------------------------------------
# views: what the programs show of a fan-out; each sees every result
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Folder(_View):
    """-o and -d: files of output, which the formatter writes; here what comes of a host besides.

    A host that was not reached leaves its reason in its ``.err``. With ``mark`` (-m) a file below
    ``0ok`` or ``1failed`` has the status of each host; these folders can be targets of a next run.
    What an earlier run has left of hosts of this one goes first, so that nothing is taken for this
    run's that is not.
    """

    folder: Path
    mark: bool

    def begin(self, names: Collection[str]) -> None:
        """Make the folder, and clean it of these hosts. Raises UsageError where it cannot be."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            files = [path.name for path in self.folder.iterdir() if path.is_file()]
            for name in names:
                for path in (name, f"{name}.err", f"0ok/{name}", f"1failed/{name}"):
                    (self.folder / path).unlink(missing_ok=True)
        except OSError as exc:
            raise UsageError(f"{escape(str(exc.filename))}: {_reason(exc)}") from None
        here = {name.removesuffix(".err") for name in files}
        others = here.difference(names)
        if others:
            _notice(
                f"{escape(str(self.folder))} also holds files of hosts that are not of this run: "
                f"{escape(fold_names(others))}"
            )

    def done(self, result: Result) -> None:
        if not result.reached:
            with open(self.folder / f"{result.name}.err", "a", encoding="utf-8") as file:
                file.write(f"{result.name}: {result.kind}: {result.error}\n")
        if self.mark:
            marks = self.folder / ("0ok" if result.ok else "1failed")
            marks.mkdir(exist_ok=True)
            status = result.signal if result.status is None else result.status
            (marks / result.name).write_text(f"{status}\n")


class _JsonLines(_View):
    """-j: one JSON object a host, a line each, as hosts finish."""

    FIELDS = (
        *("host", "user", "port", "name", "status", "signal", "error", "kind"),
        *("failures", "reached", "seconds", "stdout", "stderr"),
    )

    def done(self, result: Result) -> None:
        fields = {name: getattr(result, name) for name in self.FIELDS}
        _screen.write(json.dumps(fields).encode("ascii") + b"\n", raw=True)


class _Gather(_View):
    """-b: hosts with the same output are shown once, under their folded names, the largest group
    first.
    """

    def __init__(self, diff: bool) -> None:
        self._diff = diff
        self._groups: dict[tuple[str, bytes, bytes], list[str]] = collections.defaultdict(list)

    def done(self, result: Result) -> None:
        outputs = result.stdout_bytes, result.stderr_bytes
        if result.status is not None or result.signal or any(outputs):
            self._groups[result.outcome, *outputs].append(result.name)

    def finish(self) -> None:
        groups = sorted(self._groups.items(), key=lambda group: (-len(group[1]), group[1]))
        # what failed is no measure for the others, unless all did
        outputs = [stdout for (outcome, stdout, _), _ in groups if outcome == "ok"]
        outputs += [stdout for (_, stdout, _), _ in groups[:1]]
        for (outcome, stdout, stderr), names in groups:
            header = f"{fold_names(names)} ({len(names)})"
            if outcome != "ok":
                header += f" {outcome}"
            if self._diff and stdout != outputs[0]:
                header += " differs"
                stdout = self._difference(outputs[0], stdout)
            if stdout or not stderr:
                self._show(header, stdout, err=False)
            if stderr:
                self._show(f"{header} stderr", stderr, err=True)

    @staticmethod
    def _show(header: str, text: bytes, *, err: bool) -> None:
        rule = "-" * min(len(header), 79)
        # each by itself: the screen lets no colour run on into the next line
        lines = [_screen.paint(line, "1", err=err).encode() for line in (rule, header, rule)]
        if text:
            lines.append(text.removesuffix(b"\n"))
        _screen.write(b"\n".join([*lines, b""]), err=err)

    @staticmethod
    def _difference(old: bytes, new: bytes) -> bytes:
        before, after = (text.removesuffix(b"\n").split(b"\n") for text in (old, new))
        lines = difflib.diff_bytes(difflib.unified_diff, before, after, lineterm=b"")
        return b"\n".join(itertools.islice(lines, 2, None))


class _Failures(_View):
    """A line on stderr for each host that failed, as it happens; with ``verbose`` one for each path
    that could not be copied. ``told``: the kinds that the output itself tells.
    """

    def __init__(self, verbose: bool, told: Collection[str] = ()) -> None:
        self._verbose = verbose
        self._told = (None, "interrupted", "not started", *told)

    def done(self, result: Result) -> None:
        if result.kind in self._told:
            return
        lines = result.failures if self._verbose else []
        if not 0 < len(lines) < FAILURES_KEPT:  # what is not kept is counted in the error
            lines = [*lines, str(result.error)]
        for line in lines:
            _screen.say(_screen.paint(f"{escape(result.name)}: {result.kind}: {line}", "31"))


class _Progress(_View):
    """One line at the bottom of the terminal while hosts are at work."""

    def begin(self, names: Collection[str]) -> None:
        self._total, self._failed = len(names), 0
        self._steps: list[StepRecord] = []
        self._running: set[str] = set()
        self._timer = asyncio.get_running_loop().call_later(1, self._tick)

    def started(self, name: str, step: StepRecord) -> None:
        self._steps.append(step)
        self._running.add(name)

    def done(self, result: Result) -> None:
        self._failed += not result.ok
        self._running.discard(result.name)

    def _tick(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(0.2, self._tick)
        moved = sum(step.bytes_transferred for step in self._steps)
        text = f"{len(self._steps) - len(self._running)}/{self._total} done"
        if self._failed:
            text += f", {self._failed} failed"
        text += f", {len(self._running)} running"
        if moved:
            text += f", {moved / 1e6:.1f} MB"
        if 0 < len(self._running) <= 8:
            text += f": {fold_names(self._running)}"
        _screen.show(text)

    def finish(self) -> None:
        self._timer.cancel()
        _screen.show("")


_Shown = tuple[Formatter, Sequence[_View]]  # where lines of hosts go, and where their results go


def _shown_in_folder(options: argparse.Namespace, folder: str) -> _Shown:
    formatter = SubdirFormatter(folder)
    return formatter, [_Folder(formatter.run_name, options.mark), _Failures(options.verbose)]


# An output format is a row here and one among the "output" options of _OPTIONS; the key is the
# option's long name, with _ for -. From it _Parser makes these options exclusive, and _output picks
# the row. A row gives a formatter, which gets lines as they come, and views (_View: begin, started,
# done, finish), which get a Result when its host is done, with _Failures among them where failures
# are to be told on stderr. Result.stdout is filled by a _HoldingFormatter alone, and emptied by
# _Conclusion, the last view: use it in ``done``. What is written goes through _screen.write, with
# raw=True where it is escaped already. An option that only varies a format stands in _GOES_WITH and
# not here. Without any of these options it is the last row.
_OUTPUTS: dict[str, Callable[[argparse.Namespace], _Shown]] = {
    "out_dir": lambda options: _shown_in_folder(options, options.out_dir),
    "date_time": lambda options: _shown_in_folder(options, time.strftime("%Y-%m-%d@%H:%M:%S")),
    "gather": lambda options: (
        _HoldingFormatter(),
        [_Gather(options.diff), _Failures(options.verbose, told=("status", "signal"))],
    ),
    "json": lambda options: (_HoldingFormatter(), [_JsonLines()]),
    "format": lambda options: (TerminalFormatter(options.format), [_Failures(options.verbose)]),
    "raw_format": lambda options: (RawFormatter(), [_Failures(options.verbose)]),
    "time_colon_format": lambda options: (TimeHostFormatter(), [_Failures(options.verbose)]),
    "": lambda options: (
        _LiveFormatter() if _is_dialogue(options) else HostFormatter(),
        [_Failures(options.verbose)],
    ),
}


def _is_dialogue(options: argparse.Namespace) -> bool:
    """Whether somebody at a terminal may talk to the command of a single host."""
    return bool(options.pty) and sys.stdin.isatty() and sys.stdout.isatty()


def _output(options: argparse.Namespace) -> _Shown:
    """What the options ask to show."""
    asked = [name for name in _OUTPUTS if name and getattr(options, name) not in (None, False)]
    formatter, views = _OUTPUTS["".join(asked)](options)
    formatter.verbose = options.verbose
    return formatter, views


def _save_last(results: Iterable[Result]) -> None:
    """The groups @last-ok, @last-failed and @last-unreached (never reached, or not started) of this
    run: a target a line, what came of it as a comment. Private, each replaced at once.
    """
    groups = collections.defaultdict(list)
    for result in results:
        name = "last-unreached"
        if result.ok:
            name = "last-ok"
        elif result.reached:
            name = "last-failed"
        groups[name].append(f"{result.target}  # {escape(result.outcome)}\n")
    folder = Path(_GROUPS).expanduser()
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        for name in ("last-ok", "last-failed", "last-unreached"):
            _write_whole(folder / name, "".join(groups[name]))
    except OSError as exc:
        _notice(f"{folder}: {_reason(exc)}")


def _summary(results: Sequence[Result]) -> list[str]:
    """Lines for a person: how many succeeded, failed, were not reached; which they are, by status
    or kind, with folded names.
    """
    counts = dict.fromkeys(("ok", "failed", "not reached", "interrupted", "not started"), 0)
    names = collections.defaultdict(list)
    for result in results:
        what = result.outcome
        names[what].append(result.name)
        if what not in counts:
            what = "failed" if result.reached else "not reached"
        counts[what] += 1
    parts = [f"{count} {what}" for what, count in counts.items() if count or what == "ok"]
    lines = [_screen.paint(", ".join(parts), "32" if counts["ok"] == len(results) else "31")]
    names.pop("ok", None)
    for what, hosts in sorted(names.items()):
        lines.append(f"  {what}: {fold_names(hosts)} ({len(hosts)})")
    return lines


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
    ) -> Any:
        allowed = dest_host == "127.0.0.1" and dest_port in self.ports
        return functools.partial(_demo_forward, dest_port) if allowed else False


async def _demo_pump(reader: Any, writer: Any, *, close: bool = False) -> None:
    """Hand on what comes, of asyncio's streams or asyncssh's, until the end of it."""
    try:
        with contextlib.suppress(OSError, asyncssh.Error):  # the other side has gone
            while data := await reader.read(SESSION_WINDOW):
                writer.write(data)
                await writer.drain()
    finally:
        if close:
            writer.close()


async def _demo_forward(port: int, reader: Any, writer: Any) -> None:
    """A connection through one demo host to another. Not asyncssh's own: no data comes through that
    one in uvloop.
    """
    there, back = await asyncio.open_connection("127.0.0.1", port)
    await asyncio.gather(
        _demo_pump(reader, back, close=True), _demo_pump(there, writer, close=True)
    )


async def _demo_session(
    home: str, children: set[subprocess.Popen[bytes]], process: asyncssh.SSHServerProcess[bytes]
) -> None:
    """One command, by the shell of whoever runs the demo, in the home of the demo host; of the
    environment it gets what it needs, and no secrets.

    Its process is not asyncio's: uvloop's keep the outputs open in what a command leaves behind.
    """
    shell, user = os.environ.get("SHELL") or "/bin/sh", getpass.getuser()
    env = {"HOME": home, "SHELL": shell, "USER": user, "LOGNAME": user}
    for name in {"PATH", "LANG", "LC_ALL", "TZ", "TMPDIR"} & os.environ.keys():
        env[name] = os.environ[name]
    ours, theirs = zip(*(socket.socketpair() for _ in range(3)), strict=True)
    child = subprocess.Popen(
        [shell, "-c", process.command or shell],
        cwd=home,
        start_new_session=True,
        stdin=theirs[0],
        stdout=theirs[1],
        stderr=theirs[2],
        env=env,
    )
    children.add(child)
    for end in theirs:
        end.close()
    streams = [await asyncio.open_connection(sock=end) for end in ours]
    (_, stdin), (stdout, _), (stderr, _) = streams
    feeding = asyncio.create_task(_demo_pump(process.stdin, stdin, close=True))
    try:
        await asyncio.gather(_demo_pump(stdout, process.stdout), _demo_pump(stderr, process.stderr))
        status = await _in_daemon(child.wait)
        if status >= 0:
            process.exit(status)
        else:
            process.exit_with_signal(signal.Signals(-status).name.removeprefix("SIG"))
    finally:
        children.discard(child)
        feeding.cancel()
        for _, writer in streams:
            writer.close()


@_keywords_checked
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
    children: set[subprocess.Popen[bytes]] = set()
    nodes: list[SshNode] = []
    async with contextlib.AsyncExitStack() as stack:
        homes = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="apssh-demo-", ignore_cleanup_errors=True)
        )
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
            await stack.enter_async_context(server)
            port = server.get_port()
            _DemoServer.ports.add(port)
            stack.callback(_DemoServer.ports.discard, port)
            node = SshNode(
                f"demo{number}",
                username=getpass.getuser(),
                keys=[key],
                known_hosts=[host_key],
                address="127.0.0.1",
                port=port,
                formatter=formatter,
            )
            stack.push_async_callback(node.close)
            nodes.append(node)
        try:
            yield nodes
        finally:
            for child in children:  # what ran without the guard
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)


# --------------------------------------------------------------------------------------------------
# programs: apssh, appush and appull
# --------------------------------------------------------------------------------------------------


class _ScreenHandler(logging.Handler):
    """The ssh library's log as lines of ours: it quotes hosts, and must not run into the line of
    progress.
    """

    def emit(self, record: logging.LogRecord) -> None:
        _screen.say(escape(self.format(record)))


_EXIT_CODES = """exit code:
  0 all succeeded; 1 some did not; 2 misuse, nothing was done; 130 interrupted"""


class _Parser(argparse.ArgumentParser):
    """argparse, with the options of a table, and hints in place of guesses.

    ``without``: the groups of _OPTIONS that this program does not have; to whoever asks, none of
    their options was given.
    """

    def __init__(
        self, usage: str, description: str, *examples: str, without: Collection[str]
    ) -> None:
        super().__init__(
            usage.split()[0],
            usage=usage,
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog="\n  ".join(["examples:", *examples]) + f"\n\n{_EXIT_CODES}",
            add_help=False,  # -h stands among the others
        )
        self.groups = {title: self.add_argument_group(title) for title in _OPTIONS}
        for title, group in self.groups.items():
            outputs = group.add_mutually_exclusive_group()
            for written, text, *more in _OPTIONS[title]:
                names = [word for word in written.split() if word.startswith("-")]
                dest = names[-1].strip("-").replace("-", "_")
                if title in without:
                    self.set_defaults(**{dest: None})
                    continue
                place = outputs if dest in _OUTPUTS else group
                value = written.split()[len(names) :]
                keywords: dict[str, Any] = {"help": text, "action": "store_true"}
                if value:
                    keywords |= {"action": "store", "metavar": value[0]}
                if "..." in value:
                    keywords |= {"action": "append", "default": []}
                keywords.update(*more)
                action = place.add_argument(*names, **keywords)
                if "T" in value:
                    vars(action)["completer"] = _complete_target

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def options(self, words: Sequence[str]) -> argparse.Namespace:
        """What a command line says, checked; raises UsageError."""
        # the way that takes options between paths loses the --
        plain = self.prog == "apssh" or "--" in words
        parse = self.parse_known_args if plain else self.parse_known_intermixed_args
        # --sudo takes a user after = alone: argparse would give it the next word, the command's
        root = {"--sudo": "--sudo=root"} if plain else {}
        options, rest = parse([root.get(word, word) for word in words])
        if options.command:
            options.command = list(words[-len(options.command) :])
            if options.command[0] == "--":
                options.command.pop(0)
            elif options.command[0].startswith("-"):
                rest.append(options.command[0])
        if rest:
            known = [option for option in self._option_string_actions if option.startswith("--")]
            raise _unknown_option(rest[0], known, f" (see {self.prog} --help)")
        self._check(options)
        return options

    def _check(self, options: argparse.Namespace) -> None:
        """Raise UsageError for options that mean nothing together."""
        given: list[str] = []
        for action in self._actions:
            if vars(options).get(action.dest, action.default) not in (action.default, []):
                given += action.option_strings[-1:] or ["the command"]
        for option in given:
            needed = _GOES_WITH.get(option, option)
            if not set(needed.split(" or ")).intersection(given):
                raise UsageError(f"{option} goes with {needed}")
            if options.demo and option in _NOT_WITH_DEMO:
                raise UsageError(f"--demo brings its own hosts: leave out {option}")
            if options.scenario and option not in _WITH_SCENARIO:
                raise UsageError(
                    f"--scenario brings its own hosts and commands: leave out {option}"
                )


def _number(kind: type[int] | type[float], least: float, what: str) -> Callable[[str], Any]:
    """An option's number, with a message that says which it must be."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if least <= (value := kind(text)) < 1e9:
                return value
        raise argparse.ArgumentTypeError(f"{text!r}: {what}")

    return parse


def _format(text: str) -> str:
    if text.isdigit():
        raise argparse.ArgumentTypeError(
            f"{text!r} is no format; use -w for the number of hosts at once"
        )
    try:
        Formatter(text)  # refuses unknown fields
    except UsageError as exc:  # which argparse, as any ValueError, would answer in its own words
        raise argparse.ArgumentTypeError(exc.message) from None
    return text


def _shard(text: str) -> tuple[int, int]:
    with contextlib.suppress(ValueError):
        part, parts = map(int, text.split("/"))
        if 0 < part <= parts:
            return part, parts
    raise argparse.ArgumentTypeError(f"{text!r}: I/N, as in 1/4, 2/4, 3/4 and 4/4")


def _assignment(text: str) -> Sequence[str]:
    match = re.fullmatch(r"(?s)([A-Za-z_][A-Za-z0-9_]*)=(.*)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=value")
    return match.groups()


def _folder(text: str) -> str:
    if re.match("[A-Za-z]+=", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is an option of ssh, and -o takes a folder (./{text}): for host keys there "
            "is --host-keys, for others an ssh config (-F)"
        )
    return text


def _complete_target(prefix: str, parsed_args: argparse.Namespace, **_: object) -> list[str]:
    """How a word of -t or -x may go on, for argcomplete: with a host of the ssh config or of
    known_hosts, or a group. What stands before it stays: other targets, gateways, a user.
    """
    [before] = re.findall(r"^(?:.*(?:[\s,→]|->))?(?:[^\s,@→]+@)?", prefix)
    names = _SshConfig(parsed_args.ssh_config).names()
    names |= _KnownHosts(*map(os.path.expanduser, KNOWN_HOSTS_FILES)).names()
    names |= {f"@{path.name}" for path in Path(_GROUPS).expanduser().glob("[!.]*")}
    return [before + name for name in sorted(names)]


def _answer_completion(parser: _Parser) -> None:
    """Where a shell completes our command line by argcomplete, answer it; that ends the process."""
    if "_ARGCOMPLETE" in os.environ:
        with contextlib.suppress(ImportError):
            importlib.import_module("argcomplete").autocomplete(parser)


_seconds = _number(float, 0.001, "seconds, more than 0")

# An option is a row, in its group and its place of --help: how it is written, what it does, and
# what else argparse is to know of it (a ``type`` refuses what cannot be). "-x --exclude T ..." has
# a value, which --help calls T, and may be given again; what has no value is a flag. A program has
# a group as a whole, or not at all; of the output formats (_OUTPUTS) one may be given. What else
# goes together, or does not, is said below the table.
_OPTIONS: dict[str, Sequence[tuple[Any, ...]]] = {
    "targets": (
        (
            "-t --target T ...",
            "a host, user@host, host:port, [v6]:port, ranges node[01-20,25], hops 'gw->host'; "
            "blanks and commas separate; an existing file holds targets, a folder's file names are "
            "targets; - is standard input; @web is the file ~/.apssh/web, @last-failed of the last "
            "run",
        ),
        ("-x --exclude T ...", "leave these out; same syntax, matching on the parts it names"),
        ("-L --list-targets", "show the targets and stop"),
        ("-n --dry-run", "show what would be done, connect to nothing, and stop"),
        (
            "--shard I/N",
            "only the I-th of N equal parts of the targets, the same parts on every machine",
            {"type": _shard},
        ),
        (
            "--demo N",
            "N throw-away hosts inside this process, in place of targets (or of a scenario's)",
            {"type": _number(int, 1, "a number of hosts")},
        ),
    ),
    "what runs": (
        (
            "-s --script",
            "the first word is a local script; or the text of one, if there is no such file and it "
            "holds a blank",
        ),
        (
            "-i --includes F ...",
            'with -s: a local file that lands beside the script, as $(dirname "$0")/F',
        ),
        ("-I --stdin", "give standard input to every host (without it they get end of file)"),
        (
            "--sudo [=USER]",
            "run by sudo as root, or as that user; a password is asked once, when a host asks",
            {"default": False},
        ),
        (
            "--pty",
            "give the command a terminal, as ssh -t does: yours, when it runs on one host and no "
            "output option is given (Enter ~ . interrupts it); else nothing can be typed there",
        ),
        (
            "--env K=V ...",
            "a variable for the command, whatever the server accepts",
            {"type": _assignment},
        ),
        ("-X --x11", "forward the DISPLAY"),
    ),
    "copying": (
        ("-r --recurse", "copy folders too"),
        ("--preserve", "keep times, and modes of existing files too"),
        ("--follow", "copy what links in a tree lead to"),
        ("--inplace", "write onto existing files themselves, where a rename cannot be"),
    ),
    "output": (
        ("-r --raw-format", "what hosts print, and nothing else"),
        ("-tc --time-colon-format", "each line after the time and the host"),
        (
            "-f --format FMT",
            "each line in this format: {time} {host} {fqdn} {user} {line} {linenl} {nl}, and "
            "strftime's %%H:%%M...",
            {"type": _format},
        ),
        ("-o --out-dir D", "files D/<host> and D/<host>.err; prints D", {"type": _folder}),
        (
            "-d --date-time",
            "files as of -o, in a folder named after date and time; prints its name",
        ),
        ("-b --gather", "hosts with the same output once, under folded names"),
        ("-j --json", "one JSON object a host, a line each"),
        ("--diff", "with -b: smaller groups as differences from the largest"),
        ("-m --mark", "with -o or -d: files 0ok/<host> or 1failed/<host> holding the status"),
    ),
    "login": (
        (
            "-l --login USER",
            "user for hops that do not say (default: the ssh config's, else yours)",
        ),
        (
            "-g --gateway T",
            "go through this host, or chain of hosts; 'None->host' goes direct in spite of it",
        ),
        (
            "-p --port N",
            "port of final hosts that do not say (default: the ssh config's, else 22)",
            {"type": _number(int, 1, "a port from 1 to 65535")},
        ),
        (
            "-k --key F ...",
            "a private key; only these are used (default: the agent's, else ~/.ssh/id_*)",
        ),
        ("-K --ok-if-no-key", "go on without any key"),
        ("-A --askpass", "ask once for a password, tried on every host"),
        ("-F --ssh-config F", "another ssh config than ~/.ssh/config; none: no config"),
        (
            "--host-keys P",
            "accept-new (default: record hosts never seen, refuse changed keys), yes (refuse "
            "unknown hosts), no (check nothing; a host whose key has changed gets no password)",
            {"choices": ("accept-new", "yes", "no")},
        ),
        ("--forward-agent", "let hosts use your agent, as ssh's option -A does"),
    ),
    "how many, how long": (
        (
            "-w --window N",
            "at most N hosts at once (default 0: no limit)",
            {
                "type": _number(int, 0, "hosts at once, 0 for no limit; -t is for targets"),
                "default": 0,
            },
        ),
        (
            "--max-failures N",
            "start no further host once more than N have failed (default: no limit)",
            {"type": _number(int, 0, "a number of hosts, 0 or more")},
        ),
        (
            "-c --connect-timeout S",
            "seconds to be logged in, all hops included (default 30)",
            {"type": _seconds},
        ),
        (
            "-u --command-timeout S",
            "seconds for the command, or the copy, on one host (default: no limit)",
            {"type": _seconds},
        ),
        (
            "--retries N",
            "try unreachable hosts N times more (default 0)",
            {"type": _number(int, 0, "a number, 0 or more"), "default": 0},
        ),
        (
            "--no-guard",
            "for hosts without a POSIX shell: commands may outlive timeouts and interruptions",
        ),
    ),
    "messages": (
        (
            "-q --quiet",
            "no progress and no summary: nothing but a line on stderr for each host that failed",
        ),
        ("-v --verbose", "say what happens to connections and commands"),
        ("-D --debug", "the ssh library's own log too, on stderr"),
        (
            "--color {auto,always,never}",
            "colour of messages (default auto; NO_COLOR is obeyed)",
            {"choices": ("auto", "always", "never"), "default": "auto"},
        ),
        ("--no-last", "leave the groups @last-... as they are"),
        (
            "-V --version",
            "show the version and stop",
            {"action": "version", "version": f"apssh {__version__}"},
        ),
        ("-h --help", "show this text and stop", {"action": "help"}),
    ),
    "scenarios": (
        (
            "--scenario F",
            "run a YAML scenario (x.yaml, or x.yaml.j2 with --set), in place of targets and "
            "command",
        ),
        (
            "--set K=V ...",
            "with --scenario: a variable of its Jinja2 template",
            {"type": _assignment},
        ),
        ("--record F", "with --scenario: what ran, when and how it ended, as JSON"),
        ("--timeline F", "with --scenario: the record as a picture, F.svg"),
    ),
}


_GOES_WITH = {
    "--diff": "--gather",
    "--mark": "--out-dir or --date-time",
    "--includes": "--script",
    "--set": "--scenario",
    "--record": "--scenario",
    "--timeline": "--scenario",
}
_NOT_WITH_DEMO = (
    *("--target", "--exclude", "--shard", "--login", "--gateway", "--port"),
    *("--key", "--askpass", "--forward-agent", "--pty", "--no-guard"),
)
_WITH_SCENARIO = (
    *("--scenario", "--set", "--record", "--timeline", "--demo", "--list-targets", "--dry-run"),
    *("--host-keys", "--quiet", "--verbose", "--debug", "--color", "--no-last"),
)


def build_parser() -> _Parser:
    """The command line of apssh."""
    parser = _Parser(
        "apssh [options] command ...",
        "Run a command, or a local script, on many hosts at once.",
        "apssh -t node[01-20] uptime",
        "apssh -t 'gw->node[1-3]' --sudo systemctl restart nginx",
        "apssh -t hosts.txt -b uname -r",
        "apssh -t @web -s check.sh --all",
        "apssh -t @web -w 1 --max-failures 0 systemctl restart nginx",
        "apssh -t @last-failed -o logs journalctl -n 100",
        "appush -t @web nginx.conf @:/etc/nginx/",
        "appull -t @web @:/var/log/nginx/error.log 'logs/{host}'",
        "apssh --demo 3 'echo hello; id -un'",
        without=("copying",),
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _build_copy_parser(
    kind: type[Push | Pull], usage: str, description: str, *examples: str
) -> _Parser:
    without = ("what runs", "output", "scenarios")
    parser = _Parser(usage, description, *examples, without=without)
    parser.set_defaults(kind=kind, usage=usage, command=None)
    parser.add_argument("paths", nargs="*", help=argparse.SUPPRESS)
    return parser


def build_push_parser() -> _Parser:
    """The command line of appush."""
    return _build_copy_parser(
        Push,
        "appush [options] local ... @:remote",
        "Copy local files to many hosts. {host}, {fqdn} and {user} may stand in any path.",
        "appush -t node[1-3] -l root hosts @:/etc/hosts",
        "appush -t node[1-3] -r site @:",
        "appush -t hosts.txt 'keys/{host}' @:.ssh/id_ed25519",
        "appush -t @web a.conf @: && apssh -t @web --sudo install a.conf /etc/",
    )


def build_pull_parser() -> _Parser:
    """The command line of appull."""
    return _build_copy_parser(
        Pull,
        "appull [options] @:remote ... local",
        "Copy files from many hosts; {host} in the local path keeps them apart.",
        "appull -t node[1-3] @:/var/log/syslog 'logs/{host}'",
        "appull -t node[1-3] -r @:results 'results/{host}/'",
        "appull -t 'gw->node1' '@:/var/log/*.log' logs/",
    )


def _targets(options: argparse.Namespace) -> list[Target]:
    """What -t and -x name, or the hosts of a demo; a word on stderr of what may not have been
    meant.
    """
    if options.demo:
        return _parse_targets(f"demo[1-{options.demo}]")

    def typed() -> str:
        if options.stdin:
            raise UsageError("-t - and -I both take standard input: put the targets in a file")
        return sys.stdin.read()

    targets = _parse_targets(
        options.target, sources=_Sources(typed), **_part(vars(options), _TargetKeywords)
    )
    named = " ".join(options.target)
    if "@last-" in named and sys.stderr.isatty() and not options.quiet:
        hosts = fold_names(map(str, targets))
        _screen.say(f"{_brief(named)}: {_brief(hosts, 1000)} ({len(targets)})")
    if options.shard:
        part, parts = options.shard
        return targets[part - 1 :: parts]
    return targets


# Ctrl-C, the first time: asyncio.Runner cancels the main task, which waits in _fan_out, whose
# TaskGroup cancels the workers. Each of them ends what it has: a login (_Shared.once: its socket is
# cut), a channel that opens (SshNode._open), a command (_Session.end: the end of stdin, or of the
# connection where stdin is data, has the guard send TERM and 2 s later KILL; the first is waited
# for, and what may go on is noted as may_run). _run_on tells the views a Result of kind
# interrupted, the worker closes its node, and _fan_out tells the hosts that never had a turn and
# closes the gateways. _work then finishes the views, _Conclusion (summary, @last-...) the last;
# Runner raises KeyboardInterrupt, and here _die_of_sigint ends the process by the signal, which a
# shell shows as 130 (main(argv) returns that). The second time KeyboardInterrupt is raised wherever
# the main thread is: nothing more is told; the kernel closes the sockets, and the guards over there
# end the commands. SIGTERM and SIGHUP go the same way (_own_process).
def _program(
    parser: _Parser,
    argv: Sequence[str] | None,
    body: Callable[[argparse.Namespace], Coroutine[Any, Any, int]],
) -> int:
    """What surrounds each program: errors to exit codes, Ctrl-C, a closed pipe."""
    # whether the process is there for this program alone
    own = argv is None and threading.current_thread() is threading.main_thread()
    if own:
        _answer_completion(parser)
        _own_process()
    try:
        options = parser.options(sys.argv[1:] if argv is None else argv)
        _screen.colour, _screen.quiet = options.color, options.quiet
        _log(options.debug)
        with asyncio.Runner(loop_factory=_Loop) as runner:
            try:
                return runner.run(body(options))
            except KeyboardInterrupt:
                # The main task has ended in order, and told what is known; or this is a second
                # Ctrl-C, that waits for nothing. What is left are tasks of connections, which end
                # with the process: to close the runner would wait for them.
                if own:
                    _die_of_sigint()
                raise
    except SystemExit:  # argparse: --help and --version
        return 0
    except ApsshError as exc:
        _screen.say(f"{parser.prog}: {exc}")
        return 2 if isinstance(exc, UsageError) else 1
    except KeyboardInterrupt:
        if own:
            _die_of_sigint()
        return 130
    except OSError as exc:
        if not isinstance(exc, BrokenPipeError):
            place = f"{escape(os.fsdecode(exc.filename))}: " if exc.filename else ""
            _screen.say(f"{parser.prog}: {place}{_reason(exc)}")
        with contextlib.suppress(OSError, AttributeError):  # what is buffered goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _die_of_sigint() -> None:
    """End as a program does that Ctrl-C has ended: a shell tells it by the signal, not by a status
    of 130, and then ends its own loop too.
    """
    _screen.end_raw_mode()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.raise_signal(signal.SIGINT)


def _own_process() -> None:
    """What a process needs that exists for this program alone."""
    # to look for garbage in all that was imported, at the end too, takes as long as to start; and
    # what a connection makes lives as long as it
    gc.freeze()
    gc.set_threshold(50_000)
    atexit.register(gc.freeze)
    # asyncio.Runner leaves Ctrl-C alone where it finds another handler
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _as_ctrl_c)
    # a stream that was closed when we were started is /dev/null, as for ssh
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115


def _as_ctrl_c(number: int, frame: object) -> None:
    """SIGTERM is answered as Ctrl-C is; SIGHUP too, unless it was ignored when we started (nohup).

    While the work goes on that is asyncio.Runner's handler: the first time it cancels the main
    task, wherever it waits; the second time it raises KeyboardInterrupt, which leaves a write that
    nobody takes too. A handler of the event loop would wait for that write.
    """
    signal.raise_signal(signal.SIGINT)


def _log(debug: bool) -> None:
    """-D: the ssh library's log; without it not even asyncio's, which warns of what is lost, as we
    do.
    """
    logging.getLogger("asyncio").setLevel(logging.NOTSET if debug else logging.ERROR)
    if debug:
        logging.basicConfig(handlers=[_ScreenHandler()], format="%(name)s: %(message)s")
        logging.getLogger("asyncssh").setLevel(logging.DEBUG)


async def _work(
    options: argparse.Namespace,
    plan: _Plan,
    formatter: Formatter,
    views: Sequence[_View],
    spool: BinaryIO | None = None,
) -> int:
    """The common body of the programs: nodes, then checks, then (-n) a listing or else the work,
    then what came of it.

    ``spool`` is the file that a step's standard input comes from: ours goes there first, and each
    host then reads it at its own pace. (Handed on as it comes, it would have to be kept for the
    slowest host all the same.)
    """
    async with _nodes_of_run(options, formatter) as nodes:
        steps = plan(nodes)
        if options.dry_run:
            return _list(f"{node}: {step.dry_run_text()}" for node, step in steps.items())
        names = [node.shown_name for node in nodes]
        for view in views:  # a folder that cannot be is told before anything is read
            view.begin(names)
        if spool:
            # not sys.stdin, whose lock would be held at the end by a thread that still waits
            with open(0, "rb", buffering=0, closefd=False) as stdin:
                await _in_daemon(shutil.copyfileobj, stdin, spool)
        views = [*views, _Conclusion(options, formatter, nodes)]
        quiet = options.quiet or (options.pty and len(nodes) == 1)
        if sys.stderr.isatty() and not quiet:
            progress = _Progress()
            progress.begin(names)
            views.insert(0, progress)
        try:
            results = await _fan_out(steps, views=views, **_part(vars(options), _LimitKeywords))
        finally:
            _screen.end_raw_mode()
            if not _screen.closed:
                _finish(views)
        return 0 if all(result.ok for result in results) else 1


def _finish(views: Iterable[_View]) -> None:
    """Each by itself: what one cannot write costs the others nothing. Raises the first error."""
    errors: list[Exception] = []
    for view in views:
        try:
            view.finish()
        except Exception as exc:
            errors.append(exc)
    if errors:
        raise errors[0]


@contextlib.asynccontextmanager
async def _nodes_of_run(
    options: argparse.Namespace, formatter: Formatter
) -> AsyncIterator[Sequence[SshNode]]:
    """The nodes that the options name, or those of a demo, which lives meanwhile."""
    if options.demo and not options.dry_run:
        async with demo_fleet(options.demo, formatter=formatter) as fleet:
            yield fleet
        return
    _Limits.here()  # the run begins: from now on it is remembered what was asked
    targets = await _while_asking(_targets, options)
    _host_key_policy("", options.host_keys, None)  # raises for a variable that means nothing
    keys: list[Key] = []
    password = None
    if options.key and not options.dry_run:
        keys = await _while_asking(load_private_keys, options.key, options.verbose)
    if options.askpass and not options.dry_run:
        password = await _while_asking(_ask_secret, "password")
    nodes = await asyncio.to_thread(  # a Match exec may take its time
        _build_nodes,
        targets,
        formatter=formatter,
        config="none" if options.demo else options.ssh_config,
        connect_timeout=options.connect_timeout,
        keys=keys,
        password=password,
        host_keys=options.host_keys,
        guard=not options.no_guard,
        forward_agent=options.forward_agent,
        verbose=options.verbose,
    )
    if not (keys or options.ok_if_no_key or options.askpass or options.dry_run):
        configured = any(node._host_config.names_keys for node in nodes)
        found = configured or bool(await _while_asking(load_private_keys))
        if not found:
            raise UsageError(
                "no key: give one with -k, load one into an agent, "
                "or use -A (password) or -K (go on without)"
            )
    yield nodes


def _list(lines: Iterable[object]) -> int:
    """-L and -n: these lines, and no more than that."""
    _screen.write("".join(f"{escape(str(line))}\n" for line in lines).encode())
    return 0


@dataclasses.dataclass
class _Conclusion(_View):
    """What came of the run: a summary where there is something to sum up, the hosts met for the
    first time, the groups of the last run, the folder. Results are kept until then, but for the
    outputs, which the other views have seen.
    """

    options: argparse.Namespace
    formatter: Formatter
    nodes: Sequence[SshNode]
    results: list[Result] = dataclasses.field(default_factory=list)

    def done(self, result: Result) -> None:
        result.stdout_bytes = result.stderr_bytes = b""
        self.results.append(result)

    def finish(self) -> None:
        loud = not self.options.quiet
        if loud and (len(self.results) > 1 or not all(result.ok for result in self.results)):
            for line in _summary(self.results):
                _screen.say(line)
        left = [each for each in self.results if each.may_run]
        if not loud:  # others have a line of their own, that tells it
            left = [each for each in left if each.kind == "interrupted"]
        _tell_what_may_run(each.name for each in left)
        _tell_first_contacts(self.options, self.nodes)
        if not self.options.no_last and not self.options.demo:
            _save_last(self.results)
        if loud and isinstance(self.formatter, SubdirFormatter):
            _screen.write(os.fsencode(self.formatter.run_name) + b"\n")


def _tell_what_may_run(names: Iterable[str]) -> None:
    if folded := fold_names(names):
        _screen.say(f"  the command may still be running on: {folded}")


def _tell_first_contacts(options: argparse.Namespace, nodes: Iterable[_AnyNode]) -> None:
    """The hosts, gateways too, whose keys were recorded; with -v each was told as it happened."""
    if options.quiet or options.verbose:
        return
    hops = [node for node in _with_gateways(nodes) if isinstance(node, SshNode)]
    names = [hop.shown_name for hop in hops if hop.host_key_recorded]
    if names:
        keys = "key" if len(names) == 1 else "keys"
        hosts = _count(len(names), "host")
        _screen.say(f"recorded the {keys} of {hosts} never seen: {escape(fold_names(names))}")


def main(argv: Sequence[str] | None = None) -> int:
    """The program apssh; the exit code: 0 all succeeded, 1 otherwise, 2 misuse, 130 interrupted."""
    return _program(build_parser(), argv, _run_program)


async def _run_program(options: argparse.Namespace) -> int:
    if options.scenario:
        return await _run_scenario(options)
    if options.list_targets:
        return _list(await _while_asking(_targets, options))
    formatter, views = _output(options)
    with contextlib.ExitStack() as stack:
        spool = stack.enter_context(tempfile.TemporaryFile()) if options.stdin else None
        step = _step_of(options, spool)

        def plan(nodes: Sequence[SshNode]) -> _Steps:
            if isinstance(formatter, _LiveFormatter) and len(nodes) == 1:
                step.stdin = _Keyboard(None)
            return _same_for_all(step, nodes)

        return await _work(options, plan, formatter, views, spool)


async def _run_scenario(options: argparse.Namespace) -> int:
    """--scenario: a YAML file in place of targets and command."""
    env = dict(options.set)
    if options.scenario.endswith(".j2"):
        env |= {"": ""}  # a template even so
    scenario = _Scenario(*_scenario_text(options.scenario, env, None), Variables())
    if options.list_targets or options.dry_run:
        scenario.load()
        return _list(_dry_run(scenario) if options.dry_run else scenario.nodes.values())
    async with contextlib.AsyncExitStack() as stack:
        fleet: list[SshNode] = []
        if options.demo:
            fleet += await stack.enter_async_context(demo_fleet(options.demo))
        scheduler = scenario.load(functools.partial(_scenario_overrides, options, fleet))
        _screen.out = sys.stdout  # what asynciojobs prints is no output of hosts
        try:
            # a critical job's failure is told below, that of a teardown too
            with contextlib.suppress(ApsshError):
                async with experiment(
                    scheduler, options.record, options.timeline, scenario.teardown
                ):
                    with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
                        await scheduler.co_run()
        finally:
            _screen.out = None
            ok = not _screen.closed and _scenario_succeeded(options, scenario)
    return 0 if ok else 1


def _scenario_overrides(
    options: argparse.Namespace, fleet: list[SshNode], cls: type
) -> dict[str, Any]:
    """What options say of a scenario's node; with --demo it stands for one of the fleet."""
    found: dict[str, Any] = {"verbose": True} if options.verbose else {}
    if cls is LocalNode:
        return found
    if options.host_keys:
        found["host_keys"] = options.host_keys
    if options.demo:
        if not fleet:
            raise UsageError(f"--demo {options.demo}: the scenario has more hosts")
        host = fleet.pop(0)
        found |= {name: getattr(host, name) for name in ("port", "username", "keys", "known_hosts")}
        # the file's lead to the real hosts
        found |= {"address": "127.0.0.1", "config": None, "proxy_command": None}
    return found


def _dry_run(scenario: _Scenario) -> Iterator[str]:
    """Every step, and where it would run."""
    for name, job in scenario.jobs.items():
        notes = [f"after {each}" for each in scenario.jobs if scenario.jobs[each] in job.required]
        if job in scenario.teardown:
            notes.append("teardown")
        yield f"{name}: {job.node} ({', '.join(notes)})".removesuffix(" ()")
        for command in job.commands:
            if command.label:
                yield f"    [{command.label}]"
            for line in command.dry_run_text().splitlines():
                yield f"    {line}"


def _scenario_succeeded(options: argparse.Namespace, scenario: _Scenario) -> bool:
    """Whether all did; tells what became of the jobs."""
    counts: collections.Counter[str] = collections.Counter()
    ok = True
    for name, job in scenario.jobs.items():
        state, error = _job_state(job)
        counts[_TOLD.get(state, state)] += 1
        if error and job.critical:  # others tell it when it happens
            _screen.say(_screen.paint(f"{escape(name)}: {escape(error)}", "31"))
        # a job that runs for ever ends when the others have: it may fail only by itself
        ok &= state == "ok" or (job.forever and not error)
    if not options.quiet:
        text = ", ".join(f"{count} {state}" for state, count in counts.items())
        _screen.say(_screen.paint(text, "32" if ok else "31"))
    _tell_first_contacts(options, scenario.nodes.values())
    return ok


class _Keyboard(_Stdin):
    """What is typed on the terminal, as it is typed, for the command of a single host, which hears
    of the terminal's size too. Enter, ~ and . interrupt this program, as they end ssh.
    """

    def reader(self) -> AsyncIterator[bytes]:
        return self._typed()

    async def _typed(self) -> AsyncIterator[bytes]:
        _screen.begin_raw_mode()
        last = b"\r"
        while data := await _in_daemon(os.read, 0, 4096):
            last = (last + data)[-3:]
            if last == b"\r~.":
                signal.raise_signal(signal.SIGINT)
            yield data

    def opened(self, channel: asyncssh.SSHClientChannel[bytes]) -> None:
        """Follow the size of the terminal, from now on."""

        def resize() -> None:
            with contextlib.suppress(OSError):  # it has ended
                channel.change_terminal_size(*os.get_terminal_size(0))

        resize()
        asyncio.get_running_loop().add_signal_handler(signal.SIGWINCH, resize)


def _step_of(options: argparse.Namespace, stdin: BinaryIO | None) -> _ShellCommand:
    """What the command line asks to run."""
    words = options.command
    if not any(map(str.strip, words)):
        raise UsageError("no command: apssh [options] command ...")
    kind: Callable[..., _ShellCommand] = Run
    if options.script:
        a_file = os.path.isfile(words[0]) or not re.search(r"\s", words[0])
        kind = RunScript if a_file else RunString
        kind = functools.partial(kind, includes=options.includes)
    return kind(
        *words,
        timeout=options.command_timeout,
        env=dict(options.env),
        pty=options.pty,
        x11=options.x11,
        stdin=stdin,
        sudo=options.sudo,
    )


def main_push(argv: Sequence[str] | None = None) -> int:
    """The program appush; exit codes as main."""
    return _program(build_push_parser(), argv, _copy_program)


def main_pull(argv: Sequence[str] | None = None) -> int:
    """The program appull; exit codes as main."""
    return _program(build_pull_parser(), argv, _copy_program)


async def _copy_program(options: argparse.Namespace) -> int:
    if options.list_targets:
        return _list(await _while_asking(_targets, options))
    *sources, destination = _copy_paths(options)
    copying = {
        "recurse": options.recurse,
        "preserve": options.preserve,
        "follow_symlinks": options.follow,
        "inplace": options.inplace,
        "timeout": options.command_timeout,
    }
    plan = functools.partial(_copies, options.kind, sources, destination, copying)
    return await _work(options, plan, *_output(options))


def _copy_paths(options: argparse.Namespace) -> list[str]:
    """The sources, then the destination, ``@:`` taken off the remote ones; which must all be on
    their side.
    """
    paths, usage = options.paths, options.usage
    if len(paths) < 2:
        raise UsageError(f"from what to what? {usage}")
    for number, path in enumerate(paths, 1):
        remote = (number == len(paths)) == (options.kind is Push)
        if not path or path.startswith("@:") != remote:
            rule = "remote paths begin with @: and local ones do not"
            raise UsageError(f"'{escape(path)}': {rule}: {usage}")
    return [path.removeprefix("@:") or "~" for path in paths]


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

if _starting:
    gc.freeze()
    gc.enable()
    signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":  # as the program that this file is called by
    sys.exit({"appush": main_push, "appull": main_pull}.get(Path(sys.argv[0]).stem, main)())
