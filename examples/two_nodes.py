#!/usr/bin/env python3
"""Two nodes behind a gateway: one sends, one receives, over a range of bit rates; the loss comes
back as files.

    python two_nodes.py --demo                              on throw-away hosts inside this process
    python two_nodes.py slice@gw.example.org node1 node2    on your own

Leaves in --out: a file per rate, run.json (the record), run.svg (who did what when) and
topology.dot.
"""

import argparse
import asyncio
import contextlib
import sys
from pathlib import Path

from asynciojobs import PrintJob, Scheduler, Sequence

import apssh
from apssh import (
    Capture,
    Deferred,
    LocalNode,
    Pull,
    Push,
    Run,
    RunScript,
    RunString,
    SshJob,
    SshNode,
    Variables,
)

HERE = Path(__file__).parent
RATES = (1, 6, 24, 54)  # Mbit/s


def scenario(gateway: SshNode, sender: SshNode, receiver: SshNode, out: Path) -> Scheduler:
    """The jobs; nothing runs yet."""
    found, scheduler = Variables(), Scheduler(label="two nodes")
    check = SshJob(gateway, command="echo the gateway is there: $(uname -s)", scheduler=scheduler)
    ready = [
        SshJob(
            node,
            commands=[Run("mkdir -p measure"), Push(HERE / "lib.sh", "measure/")],
            required=check,
            scheduler=scheduler,
        )
        for node in (sender, receiver)
    ]
    address = SshJob(
        receiver,
        command=Run("echo 192.0.2.$((RANDOM % 100 + 1))", capture=Capture("address", found)),
        required=ready,
        scheduler=scheduler,
    )
    steps: list = [PrintJob("measuring")]
    for rate in RATES:
        send = RunScript(
            HERE / "measure.sh",
            Deferred("{{address}}", found),
            rate,
            f"> measure/rate-{rate}",
            includes=[HERE / "lib.sh"],
        )
        steps.append(SshJob(sender, commands=[send, Pull(f"measure/rate-{rate}", out)]))
    measured = Sequence(*steps, required=address, scheduler=scheduler)
    SshJob(
        receiver,
        command=Run("while :; do echo listening; sleep 1; done", ignore_outputs=True),
        forever=True,
        required=address,
        scheduler=scheduler,
    )
    SshJob(
        LocalNode(),
        command=RunString(f"cd '{out}'; echo loss by rate:; grep . rate-* | sort -t- -k2n"),
        required=measured,
        scheduler=scheduler,
    )
    return scheduler


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "hosts",
        nargs="*",
        metavar="HOST",
        help="gateway, sender, receiver; user@ may stand before the gateway",
    )
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("two_nodes.out"))
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    async with contextlib.AsyncExitStack() as stack:
        if options.demo:
            gateway, sender, receiver = await stack.enter_async_context(apssh.demo_fleet(3))
            sender.gateway = receiver.gateway = gateway
        elif len(options.hosts) == 3:
            user, _, host = options.hosts[0].rpartition("@")
            gateway = SshNode(host, username=user or None)
            sender, receiver = (
                SshNode(host, gateway=gateway, formatter=gateway.formatter)
                for host in options.hosts[1:]
            )
        else:
            parser.error("give a gateway and two hosts, or --demo")
        scheduler = scenario(gateway, sender, receiver, options.out)
        apssh.topology_as_dotfile(scheduler, options.out / "topology.dot")
        try:
            with apssh.recording(scheduler, options.out / "run.json"):
                done = await scheduler.co_run()
        finally:
            apssh.timeline_as_svgfile(scheduler, options.out / "run")
            await apssh.co_close_ssh_in_scheduler(scheduler)
        return 0 if done else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
