"""Mooncake Store: its master, and two clients that keep objects in each other's memory."""
import socket
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest

from harness import KiB, LONG, MiB

MASTER = Path(sysconfig.get_path("purelib")) / "mooncake/mooncake_master"
SIZES = [1, 4 * KiB - 1, 64 * KiB, MiB + 3, 12 * MiB]


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def listens(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True
    except OSError:
        return False


@pytest.fixture(scope="session")
def master(tmp_path_factory):
    """HOST:PORT of a master of our own."""
    log = tmp_path_factory.mktemp("master") / "master.log"
    for _ in range(5):
        # Somebody may take one of them first; then it ends, and others are tried.
        rpc, metrics = free_ports(2)
        flags = [f"-rpc_address=127.0.0.1", f"-rpc_port={rpc}", "-metrics_host=127.0.0.1", f"-metrics_port={metrics}"]
        with open(log, "ab") as to:
            process = subprocess.Popen([MASTER, *flags], stdin=subprocess.DEVNULL, stdout=to, stderr=to)
        try:
            deadline = time.monotonic() + LONG
            while process.poll() is None and not listens(rpc):
                assert time.monotonic() < deadline, f"mooncake_master does not listen\n{log.read_text()}"
                time.sleep(0.02)
            if process.poll() is None:
                yield f"127.0.0.1:{rpc}"
                return
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(LONG)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait(LONG)
    pytest.fail(f"mooncake_master does not start\n{log.read_text()}")


def client(start, fabric, master, host, segment):
    peer = start(fabric, host)
    peer.ask("store_make", name="store")
    setup = ["127.0.0.1", "P2PHANDSHAKE", segment, 64 * MiB, "efa", fabric.devices, master]
    assert peer.call("setup", *setup, on="store") == 0, peer.stderr()
    return peer


def test_objects_between_two_clients(start, fabric, master, swap):
    # All memory is one client's, so that whatever the other does goes over the fabric.
    guest = client(start, fabric, master, 0, segment=0)
    owner = client(start, fabric, master, 1, segment=96 * MiB)
    if swap:
        for peer in guest, owner:
            assert peer.serves() == ["store.so"], peer.stderr()
    for writer in guest, owner:
        reader = owner if writer is guest else guest
        for size in SIZES:
            key = f"{fabric.__class__.__name__}-{size}-{'guest' if writer is guest else 'owner'}"
            assert writer.ask("put", on="store", key=key, length=size, seed=size) == 0, writer.stderr()
            for peer in reader, writer:
                wrong = peer.ask("get_wrong", on="store", key=key, length=size, seed=size)
                assert wrong is None, f"{key}: {wrong}\n{peer.stderr()}"
    for peer in guest, owner:
        assert peer.call("close", on="store") == 0, peer.stderr()


def test_two_owners(start, fabric, master):
    """Each has memory, and the master says where an object goes."""
    clients = [client(start, fabric, master, host, segment=32 * MiB) for host in (0, 1)]
    for i in range(20):
        key = f"{fabric.__class__.__name__}-either-{i}"
        assert clients[i % 2].ask("put", on="store", key=key, length=200 * KiB + i, seed=i) == 0, clients[i % 2].stderr()
        for peer in clients:
            wrong = peer.ask("get_wrong", on="store", key=key, length=200 * KiB + i, seed=i)
            assert wrong is None, f"{key}: {wrong}\n{peer.stderr()}"
    for peer in clients:
        assert peer.call("close", on="store") == 0, peer.stderr()
