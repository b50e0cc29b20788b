"""One process with a Mooncake in it, told what to do by lines of JSON on its standard input.

Each request {"op": NAME, ...} is answered by {"value": ...} or {"error": TRACEBACK}. Memory is named
by its address, so that the bindings' own functions can be called as they are. See harness.Peer.
"""
import ctypes
import hashlib
import json
import mmap
import os
import sys
import threading
import time
import traceback

BLOCK = 1 << 16
GUARD_BYTE = 0xA5

objects = {}
memory = {}


def pattern(seed, length):
    """Bytes that say which seed and which position they are of."""
    blocks = (hashlib.shake_128(b"%d:%d" % (seed, at)).digest(BLOCK) for at in range(0, length, BLOCK))
    return b"".join(blocks)[:length]


def alloc(size):
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    memory[address] = area
    ctypes.memset(address, GUARD_BYTE, size)
    return address


def free(address):
    # The pages only: no later memory gets this address, so that no test depends on what another left
    # in a cache of the peer's.
    memory[address].madvise(mmap.MADV_DONTNEED)


def fill(address, length, seed):
    ctypes.memmove(address, pattern(seed, length), length)


def wrong(address, size, pieces):
    """What is not as it should be: [offset, length, seed] hold patterns, the rest guard bytes."""
    at = 0
    for offset, length, seed in sorted(pieces) + [[size, 0, 0]]:
        for start, expected in (at, bytes([GUARD_BYTE]) * (offset - at)), (offset, pattern(seed, length)):
            found = ctypes.string_at(address + start, len(expected))
            if found != expected:
                first = next(i for i, (a, b) in enumerate(zip(found, expected)) if a != b)
                count = sum(a != b for a, b in zip(found, expected))
                return (f"{count} wrong bytes in [{start}, +{len(expected)}), the first at {start + first}: "
                        f"{found[first:first + 8].hex()}, not {expected[first:first + 8].hex()}")
        at = offset + length
    return None


def bindings():
    """The wheel's, or those on Mooncake's C interface."""
    if os.environ.get("MEFA_ENGINE") == "c":
        import c_engine

        return c_engine
    from mooncake import engine

    return engine


def engine_make(name):
    objects[name] = bindings().TransferEngine()


def store_make(name):
    from mooncake.store import MooncakeDistributedStore

    objects[name] = MooncakeDistributedStore()


def drop(name):
    del objects[name]


def call(on, name, args):
    return getattr(objects[on], name)(*args)


def together(on, calls):
    """Each call in a thread of its own, all let go at once."""
    gate = threading.Barrier(len(calls))
    results = [None] * len(calls)

    def run(i, name, args):
        gate.wait()
        results[i] = call(on, name, args)

    threads = [threading.Thread(target=run, args=(i, *c), daemon=True) for i, c in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def poll(on, batches):
    """transfer_check_status of each until it is no longer 0."""
    results = [0] * len(batches)
    while 0 in results:
        for i, batch in enumerate(batches):
            if results[i] == 0:
                results[i] = call(on, "transfer_check_status", [batch])
    return results


def timed(on, name, args, times):
    """Nanoseconds of each of `times` calls."""
    spans = []
    for _ in range(times):
        begin = time.perf_counter_ns()
        result = call(on, name, args)
        spans.append(time.perf_counter_ns() - begin)
        if result != 0:
            raise RuntimeError(f"{name} returned {result}")
    return spans


def sync(on, target, buffer, remote, length, opcode, notify):
    """transfer_sync with what cannot be said in JSON."""
    code = getattr(bindings().TransferEngine.TransferOpcode, opcode)
    return objects[on].transfer_sync(target, buffer, remote, length, code, bindings().TransferNotify(*notify))


def notifies(on):
    return [[note.name, note.msg] for note in objects[on].get_notifies()]


def methods(on):
    return dir(objects[on])


def put(on, key, length, seed):
    return objects[on].put(key, pattern(seed, length))


def get_wrong(on, key, length, seed):
    found = objects[on].get(key)
    return None if found == pattern(seed, length) else f"{len(found)} bytes, not those of seed {seed}"


def maps():
    """The files that are mapped."""
    with open("/proc/self/maps") as lines:
        return sorted({fields[5].strip() for fields in (line.split(None, 5) for line in lines) if len(fields) > 5})


def libfabric_version():
    number = ctypes.CDLL("libfabric.so.1").fi_version()
    return [number >> 16, number & 0xFFFF]


OPS = [alloc, free, fill, wrong, engine_make, store_make, drop, call, together, poll, timed, sync, notifies, methods]
OPS += [put, get_wrong, maps, libfabric_version]


def main():
    # Only answers go to the real standard output, whatever the libraries print.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    ops = {op.__name__: op for op in OPS}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"value": ops[request.pop("op")](**request)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    objects.clear()


main()
