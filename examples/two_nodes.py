#!/usr/bin/env python3
"""Two nodes behind a gateway: one receives, a service of its systemd; the other sends at several
bit rates; the losses come back as files.

    python two_nodes.py --demo                              on throw-away hosts inside this process
    python two_nodes.py slice@gw.example.org node1 node2    on your own

Leaves in --out: a file for each rate, run.json (the record), run.svg (who did what when) and
topology.dot. A rate that has its file is not measured again: after a failure (--rates 6 0 24 shows
one) or a Ctrl-C, start it again. The service is stopped in any case.
"""

import argparse
import asyncio
import contextlib
import shlex
import sys
from pathlib import Path

from asynciojobs import Scheduler, Sequence

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
    Service,
    SshJob,
    SshNode,
    Variables,
    Wait,
)

RADIO = Path(__file__).with_name("radio.py")
RECEIVE = "exec python3 {{home}}/measure/radio.py receive {{home}}/measure/port"


class ShellService:
    """Stands in for Service where there is no systemd: the two commands, by the shell."""

    def __init__(self, command: Deferred) -> None:
        self.command = command

    def start_command(self) -> Run:
        there = "</dev/null >measure/log 2>&1 & echo $! >measure/pid"
        return Run("nohup setsid sh -c '", self.command, "'", there, label="Shell: start")

    def stop_command(self) -> Run:
        return Run("test ! -e measure/pid || kill -- -$(cat measure/pid)", label="Shell: stop")


def scenario(
    gateway: SshNode, sender: SshNode, receiver: SshNode, *, out: Path, rates: list[str], demo: bool
) -> tuple[Scheduler, list[SshJob]]:
    """The jobs, and those of the teardown; nothing runs yet."""
    found = Variables()
    command = Deferred(RECEIVE, found)
    service = ShellService(command) if demo else Service(command, service_id="apssh-radio")
    check = SshJob(gateway, command="echo the gateway is there: $(uname -s)")
    prepare = SshJob(
        receiver,
        commands=[
            Run("mkdir -p measure && rm -f measure/port && pwd", capture=Capture("home", found)),
            Push(RADIO, "measure/"),
        ],
        required=check,
    )
    listen = SshJob(
        receiver,
        commands=[
            service.start_command(),
            Wait("test -e measure/port", timeout=30, interval=0.2),
            Run(
                # by which address ssh found the receiver; a demo host is on the loopback
                "set -- $SSH_CONNECTION; echo ${3:-127.0.0.1} $(cat measure/port)",
                capture=Capture("address", found),
            ),
        ],
        required=prepare,
    )
    measures = []
    for rate in rates:
        if (out / f"rate-{rate}").exists():
            print(f"rate-{rate}: done before")
            continue
        send = RunScript(RADIO, "send", Deferred("{{address}}", found), rate, f"> rate-{rate}")
        pull = Pull(f"rate-{rate}", out / f"rate-{rate}")
        measures.append(SshJob(sender, commands=[send, pull], label=f"{rate} Mbit/s"))
    report = RunString(f"cd {shlex.quote(str(out))} && cat rate-* | sort -n", label="report")
    jobs = Sequence(check, prepare, listen, *measures, SshJob(LocalNode(), command=report))
    return Scheduler(jobs), [SshJob(receiver, command=service.stop_command())]


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("hosts", nargs="*", metavar="HOST", help="[USER@]GATEWAY RECEIVER SENDER")
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("two_nodes.out"))
    parser.add_argument("--rates", nargs="+", default=["1", "6", "24", "54"], help="Mbit/s")
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    async with contextlib.AsyncExitStack() as stack:
        if options.demo:
            print("no systemd on the demo fleet: the shell stands in for it", file=sys.stderr)
            gateway, receiver, sender = await stack.enter_async_context(apssh.demo_fleet(3))
            receiver.gateway = sender.gateway = gateway
        elif len(options.hosts) == 3:
            user, _, host = options.hosts[0].rpartition("@")
            gateway = SshNode(host, username=user or None)
            receiver, sender = (
                SshNode(host, gateway=gateway, formatter=gateway.formatter)
                for host in options.hosts[1:]
            )
        else:
            parser.error("give a gateway and two hosts, or --demo")
        scheduler, teardown = scenario(
            gateway, sender, receiver, out=options.out, rates=options.rates, demo=options.demo
        )
        apssh.topology_as_dotfile(scheduler, options.out / "topology.dot")
        async with apssh.experiment(
            scheduler,
            record=options.out / "run.json",
            timeline=options.out / "run.svg",
            teardown=teardown,
        ):
            await scheduler.co_run()


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except apssh.ApsshError as exc:
        sys.exit(f"two_nodes: {exc}")
    except KeyboardInterrupt:
        sys.exit(130)
