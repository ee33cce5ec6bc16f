"""Cheap ssh servers on loopback addresses, and a relay that makes them far away; for bench.py.

    python fleet.py servers PORT HOST_KEY AUTHORIZED_KEYS ADDRESS ...
    python fleet.py relay PORT DELAY FROM:TO ...

Each server logs in whoever has an authorized key and ends every command at once, in this process,
with status 0 and no output. The relay listens on each FROM and passes bytes on to TO, both on PORT,
DELAY seconds late each way. Both print "ready" and end with their standard input.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import resource
import sys
from typing import Any, cast

import asyncssh


class Session(asyncssh.SSHServerSession[bytes]):
    """A session in which every command succeeds at once."""

    def connection_made(self, chan: asyncssh.SSHServerChannel[bytes]) -> None:
        self._chan = chan

    def exec_requested(self, command: str) -> bool:
        return True

    def session_started(self) -> None:
        self._chan.exit(0)


class Server(asyncssh.SSHServer):
    """Sessions, and nothing else."""

    def session_requested(self) -> Any:
        return Session()


async def servers(port: int, host_key: str, authorized: str, *addresses: str) -> None:
    """A server on each address."""
    options = asyncssh.SSHServerConnectionOptions(
        server_factory=Server,
        server_host_keys=[asyncssh.read_private_key(host_key)],
        encoding=None,
        compression_algs=None,
        authorized_client_keys=asyncssh.read_authorized_keys(authorized),
        login_timeout=0,
    )
    for address in addresses:
        await asyncssh.listen(address, port, options=options, backlog=200)


class Late(asyncio.Protocol):
    """One side of a relayed connection: what comes in goes out on the other side, later."""

    def __init__(self, delay: float, target: tuple[str, int] | None = None) -> None:
        self._delay, self._target = delay, target
        self.other: Late | None = None
        self.transport: asyncio.Transport | None = None
        self._early: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        if self._target:
            self._connecting = asyncio.ensure_future(self._connect(*self._target))

    async def _connect(self, address: str, port: int) -> None:
        try:
            _, other = await asyncio.get_running_loop().create_connection(
                lambda: Late(self._delay), address, port
            )
        except OSError:
            cast("asyncio.Transport", self.transport).abort()
            return
        self.other, other.other = other, self
        for data in other._early:
            other.data_received(data)
        for data in self._early:
            self.data_received(data)

    def data_received(self, data: bytes) -> None:
        if self.other and self.other.transport:
            asyncio.get_running_loop().call_later(self._delay, self.other.transport.write, data)
        else:
            self._early.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other and self.other.transport:
            asyncio.get_running_loop().call_later(self._delay, self.other.transport.close)


async def relay(port: int, delay: float, *pairs: str) -> None:
    """A listener for each pair."""
    for pair in pairs:
        near, far = pair.split(":")
        await asyncio.get_running_loop().create_server(
            functools.partial(Late, delay, (far, port)), near, port, backlog=200
        )


async def main(kind: str, port: str, *rest: str) -> None:
    """Serve until standard input ends."""
    if kind == "servers":
        await servers(int(port), *rest)
    else:
        await relay(int(port), float(rest[0]), *rest[1:])
    print("ready", flush=True)
    with contextlib.suppress(OSError):
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(main(*sys.argv[1:]))
