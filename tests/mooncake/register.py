#!/usr/bin/env python3
"""Milliseconds of batch_register_memory over the emulated EFA device: ours in the published wheel (swap)
against the wheel as it was published (plain), turn about. Run it by .tools/mooncake/bin/python.
"""
import argparse
import contextlib
import statistics
import tempfile
from pathlib import Path

import harness
from harness import MiB


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--libfabric-dir", metavar="DIR[:DIR]", help="where a libfabric 1.18 or later is, for both; the plain wheel needs it")
    p.add_argument("--nics", type=int, default=4)
    p.add_argument("--buffers", type=int, default=1000, help="of 1 MiB each")
    p.add_argument("--rounds", type=int, default=3)
    return p.parse_args()


def once(name, library, args, directory):
    with contextlib.ExitStack() as stack:
        fabric = stack.enter_context(contextlib.closing(harness.Emulated(args.libfabric_dir)))
        environment = {**fabric.environment(0, library), "SOFTEFA_DEVICES": str(args.nics)}
        peer = harness.Peer(directory / f"{name}.log", environment)
        stack.callback(peer.kill)
        if peer.start_engine() != 0:
            raise SystemExit(f"{name}: initialize failed\n{peer.stderr()}")
        size = MiB + 4096  # a gap, so that no two are neighbours
        start = peer.ask("alloc", size=args.buffers * size)
        call = [[start + at * size for at in range(args.buffers)], [MiB] * args.buffers]
        return peer.ask("timed", timeout=300, on="engine", name="batch_register_memory", args=call, times=1)[0] / 1e6


def main():
    args = arguments()
    sides = {"swap": harness.swap_library(), "plain": None}
    found = {name: [] for name in sides}
    with tempfile.TemporaryDirectory(prefix="mefa-register-") as directory:
        for _ in range(args.rounds):
            for name, library in sides.items():
                found[name].append(once(name, library, args, Path(directory)))
    print(f"{args.buffers} buffers of 1 MiB on {args.nics} NICs, {args.rounds} rounds")
    for name, values in found.items():
        print(f"{name:6} {statistics.median(values):9.1f} ms  ({min(values):.1f} to {max(values):.1f})")
    ratios = [a / b for a, b in zip(found["plain"], found["swap"])]
    print(f"ratio  {statistics.median(ratios):9.1f}     ({min(ratios):.1f} to {max(ratios):.1f})")


main()
