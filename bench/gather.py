"""The least that runs a command on many hosts with asyncssh: what apssh is measured against.

python gather.py KEY KNOWN_HOSTS PORT USER COMMAND HOST ...
"""

import asyncio
import sys

import asyncssh


async def one(
    host: str,
    key: asyncssh.SSHKey,
    known_hosts: asyncssh.SSHKnownHosts,
    port: str,
    user: str,
    command: str,
) -> None:
    async with asyncssh.connect(
        host,
        int(port),
        username=user,
        client_keys=[key],
        known_hosts=known_hosts,
        config=None,
        agent_path=None,
    ) as conn:
        result = await conn.run(command, check=True)
        sys.stdout.write("".join(f"{host}:{line}\n" for line in str(result.stdout).splitlines()))


async def main(key: str, known_hosts: str, port: str, user: str, command: str, *hosts: str) -> None:
    shared = asyncssh.read_private_key(key), asyncssh.read_known_hosts(known_hosts)
    await asyncio.gather(*(one(host, *shared, port, user, command) for host in hosts))


asyncio.run(main(*sys.argv[1:]))
