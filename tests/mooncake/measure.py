#!/usr/bin/env python3
"""GB/s of transfer_sync_write between two processes over the emulated EFA device: ours in the
published wheel (swap) against the wheel as it was published (plain), turn about, so that a slow
minute of the machine hits both.

The emulated device copies memory; it is not a network, and so the figures say what the software
costs, not how fast a network is. Run it by .tools/mooncake/bin/python.
"""
import argparse
import contextlib
import signal
import statistics
import sys
import tempfile
from pathlib import Path

import harness
from harness import Memory, MiB


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--libfabric-dir", metavar="DIR[:DIR]", help="where a libfabric 1.18 or later is, for both; the plain wheel needs it")
    p.add_argument("--size", type=float, default=64, metavar="MIB")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--times", type=int, default=10, help="transfers of a side in a round")
    return p.parse_args()


def pair(stack, fabric, swap, directory):
    peers = []
    for host in (0, 1):
        name = f"{'swap' if swap else 'plain'}{host}"
        peer = harness.Peer(directory / f"{name}.log", fabric.environment(host, swap))
        stack.callback(peer.kill)
        if peer.start_engine() != 0:
            sys.exit(f"{name}: initialize failed\n{peer.stderr()}")
        if bool(peer.serves()) != bool(swap):
            sys.exit(f"{name}: not the transport that was to be measured\n{peer.stderr()}")
        peers.append(peer)
    return peers


def main():
    args = arguments()
    swap = harness.swap_library()
    if swap is None:
        sys.exit("MEFA_SWAP=none: there would be nothing to compare")
    size = int(args.size * MiB)
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mefa-measure-")))
        sides = {}
        for name, library in ("swap", swap), ("plain", None):
            # A fabric each: two emulated machines of their own.
            fabric = stack.enter_context(contextlib.closing(harness.Emulated(args.libfabric_dir)))
            near, far = pair(stack, fabric, library, directory)
            ours, theirs = Memory(near, size), Memory(far, size)
            ours.fill(seed=1)
            sides[name] = near, far, [far.name, ours.address, theirs.address, size], theirs
        version = near.ask("libfabric_version")
        print(f"transfer_sync_write of {args.size:g} MiB, libfabric {version[0]}.{version[1]}, "
              f"{args.rounds} rounds of {args.times}", flush=True)

        def run(name, times):
            near, far, call, _ = sides[name]
            # The plain wheel spins while it has nothing to do: whoever is not measured stands still.
            for peer in near, far:
                peer.process.send_signal(signal.SIGCONT)
            spans = near.ask("timed", timeout=300, on="engine", name="transfer_sync_write", args=call, times=times)
            for peer in near, far:
                peer.process.send_signal(signal.SIGSTOP)
            return spans

        for name, (_, far, _, theirs) in sides.items():
            run(name, 2)  # connects, and touches the memory
            far.process.send_signal(signal.SIGCONT)
            theirs.holds([0, size, 1])
            far.process.send_signal(signal.SIGSTOP)
        speeds = {name: [] for name in sides}
        for number in range(args.rounds):
            for name in sorted(sides, reverse=number % 2 == 0):
                speeds[name].append(size / statistics.median(run(name, args.times)))
        for name, values in speeds.items():
            print(f"{name:6} {statistics.median(values):6.2f} GB/s  ({min(values):.2f} to {max(values):.2f})")
        ratios = [a / b for a, b in zip(speeds["swap"], speeds["plain"])]
        print(f"ratio  {statistics.median(ratios):6.2f}       ({min(ratios):.2f} to {max(ratios):.2f})")


main()
