#!/usr/bin/env python3
"""One command on more hosts than one process serves well: the targets are cut into shards, each
shard is an apssh.run somewhere else, and the results come back as one list.

    python shards.py -t 'node[0001-9999]' uptime                   a process for each core here
    python shards.py -t hosts --engine dask uptime                 workers of Dask, on this machine
    python shards.py -t hosts --engine dask --cluster tcp://boss:8786 --shards 64 uptime

A worker that dies takes its shard with it. The shard then runs again as a whole, on hosts that
had done it too: let it be a command that may run twice. When workers go on dying, the hosts of
their shards are named, and the exit code is 1; a host's result is never lost, nor there twice.

A Slurm array needs none of this, for apssh cuts targets itself, alike on every machine (hosts is a
file on the shared disk):

    #!/bin/bash
    #SBATCH --array=1-64 --requeue
    part=part-$SLURM_ARRAY_TASK_ID
    apssh --shard $SLURM_ARRAY_TASK_ID/64 -t hosts --no-last -q -j uptime > $part.tmp
    [ $? -le 1 ] && mv $part.tmp $part.json            # 1: some hosts failed; more: it was ended

    $ cat part-*.json           # all results, an object a host
    $ for i in $(seq 64); do test -e part-$i.json || echo $i; done     # sbatch --array= these again
"""

import argparse
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context

import apssh

ATTEMPTS = 4  # of a shard whose worker dies, the first included: as many as Dask makes

Shard = list[str]  # targets
Work = Callable[[Shard], list[apssh.Result]]


def cut(targets: Shard, parts: int) -> list[Shard]:
    """Equal parts, those that ``apssh --shard I/N`` takes."""
    return [shard for part in range(parts) if (shard := targets[part::parts])]


def by_processes(work: Work, shards: list[Shard]) -> Iterable[list[apssh.Result] | None]:
    """What came of each shard; None: its workers died."""
    stopping = threading.Event()  # by Ctrl-C, which every worker gets as well

    def attempt(shard: Shard) -> list[apssh.Result] | None:
        # a pool for each shard, for a worker that dies breaks its pool, and all that is in it
        for _ in range(ATTEMPTS):
            if stopping.is_set():
                break
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                try:
                    return pool.submit(work, shard).result()
                except BrokenProcessPool:
                    print(f"shards: the worker of {shard[0]}... died", file=sys.stderr)
        return None

    with ThreadPoolExecutor(len(shards)) as threads:
        try:
            yield from threads.map(attempt, shards)
        finally:
            stopping.set()


def by_dask(
    work: Work, shards: list[Shard], cluster: str | None = None
) -> Iterable[list[apssh.Result] | None]:
    """What came of each shard; None: its workers died, once more than the scheduler of Dask allows
    (``distributed.scheduler.allowed-failures``: 3). ``cluster``: its address; None: one for now.
    """
    from dask.distributed import Client, KilledWorker

    here = {"n_workers": os.cpu_count(), "threads_per_worker": 1, "dashboard_address": None}
    with Client(cluster) if cluster else Client(**here) as client:
        # pure: Dask takes equal calls for one
        for future in client.map(work, shards, pure=False):
            try:
                yield future.result()
            except KilledWorker:
                yield None


def run_shards(
    targets: Shard, command: str, *, parts: int, engine: Callable[..., Iterable], **options: object
) -> tuple[list[apssh.Result], Shard]:
    """``apssh.run`` with these options on all targets: the results, in the order of the targets,
    and the targets that have none.
    """
    shards = cut(targets, parts)
    found: dict[str, apssh.Result] = {}
    lost: Shard = []
    work = partial(apssh.run, command=command, **options)
    for shard, results in zip(shards, engine(work, shards), strict=True):
        if results is None:
            lost += shard
        else:
            found |= {result.target: result for result in results}
    return [found[target] for target in targets if target in found], lost


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-t", "--target", action="append", required=True, help="as for apssh")
    parser.add_argument("-l", "--login", help="as for apssh")
    parser.add_argument("--engine", choices=["processes", "dask"], default="processes")
    parser.add_argument("--cluster", help="with dask: the address of its scheduler")
    parser.add_argument("--shards", type=int, default=os.cpu_count() or 1)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    # files and ranges are read here: other machines may not have them
    named = [f"--target={text}" for text in options.target]
    login = ["-l", options.login] if options.login else []
    lister = [sys.executable, apssh.__file__, "-F", "none", "-L", *login, *named]
    listed = subprocess.run(lister, stdout=subprocess.PIPE, text=True, check=False)
    if listed.returncode:
        return listed.returncode
    engine = by_processes if options.engine == "processes" else by_dask
    if options.cluster:
        engine = partial(by_dask, cluster=options.cluster)
    results, lost = run_shards(
        listed.stdout.splitlines(), " ".join(options.command), parts=options.shards, engine=engine
    )
    for result in results:
        print(f"{result.target}: {result.outcome}: {result.stdout.strip() or result.error}")
    if lost:
        print(f"shards: no result of {', '.join(lost)}", file=sys.stderr)
    return 0 if not lost and all(result.ok for result in results) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
