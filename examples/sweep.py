#!/usr/bin/env python3
"""A sweep over parameters that resumes: each run leaves its record, and one whose record says that
all went well is not run again.

    python sweep.py --demo                  on throw-away hosts inside this process
    python sweep.py node1 node2             on your own
    python sweep.py --demo --fail 24-2      one of the runs fails; run it again without --fail: only
                                            that one is left to do
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import sys
from pathlib import Path

from asynciojobs import Scheduler

import apssh
from apssh import Capture, Run, SshJob, SshNode, Variables

RATES, POWERS = (6, 24, 54), (1, 2)


def is_done(record: Path) -> bool:
    """Whether a former run succeeded."""
    with contextlib.suppress(OSError, ValueError):
        return all(job["state"] == "ok" for job in json.loads(record.read_text())["jobs"])
    return False


async def one_run(nodes: list[SshNode], rate: int, power: int, record: Path, fail: bool) -> bool:
    """All nodes at once, with these parameters."""
    found, scheduler = Variables(), Scheduler(timeout=60)
    for node in nodes:
        command = Run(
            f"echo $(({rate} * {power})); exit {int(fail)}", capture=Capture(node.hostname, found)
        )
        SshJob(
            node,
            command=command,
            critical=False,
            label=f"{rate} Mbit/s, {power} dBm",
            scheduler=scheduler,
        )
    with apssh.recording(scheduler, record):
        await scheduler.co_run()
    print(f"{record.stem}: {'ok' if is_done(record) else 'failed'} {dict(sorted(found.items()))}")
    return is_done(record)


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("hosts", nargs="*", metavar="HOST")
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("sweep.out"))
    parser.add_argument(
        "--fail", metavar="RATE-POWER", help="let this run fail, to see how it resumes"
    )
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    if not (options.hosts or options.demo):
        parser.error("give some hosts, or --demo")
    well = True
    async with contextlib.AsyncExitStack() as stack:
        nodes = (
            await stack.enter_async_context(apssh.demo_fleet(2))
            if options.demo
            else [SshNode(host) for host in options.hosts]
        )
        for rate, power in itertools.product(RATES, POWERS):
            record = options.out / f"{rate}-{power}.json"
            if is_done(record):
                print(f"{record.stem}: done before")
            else:
                well &= await one_run(nodes, rate, power, record, record.stem == options.fail)
        for node in nodes:
            await node.close()
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
