"""With a metadata server between them: the wheel's engine and Mooncake's C interface find each other by the keys and JSON that
both have."""
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import harness
from harness import KiB, LONG, Memory, MiB
from test_c_api import KINDS, variables


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def program(name):
    """Where scripts/setup has put it."""
    path = shutil.which(name, path=os.pathsep.join([os.environ["PATH"], str(harness.ROOT / ".tools/bin")]))
    assert path, f"{name} is missing: scripts/setup mooncake brings it"
    return path


def http(directory, port):
    server = Path(sys.executable).with_name("mooncake_http_metadata_server")
    return [server, "--host", "127.0.0.1", "--port", str(port)], f"http://127.0.0.1:{port}/metadata"


def etcd(directory, port):
    at, peers = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{free_port()}"
    return [program("etcd"), "--data-dir", directory, "--listen-client-urls", at, "--advertise-client-urls", at,
            "--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers,
            "--initial-cluster", f"default={peers}"], f"etcd://127.0.0.1:{port}"


def redis(directory, port):
    return [program("redis-server"), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", directory], f"redis://127.0.0.1:{port}"


@pytest.fixture(scope="module", params=[http, etcd, redis])
def metadata(request, tmp_path_factory):
    """A metadata server, and how engines are told where it is."""
    directory, port = tmp_path_factory.mktemp("metadata"), free_port()
    command, connection = request.param(directory, port)
    with open(directory / "log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=directory)
    try:
        deadline = time.monotonic() + LONG
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, (directory / "log").read_text()
                time.sleep(0.01)
        yield connection
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("kinds", KINDS)
def test_they_find_each_other(start, fabric, metadata, kinds):
    if metadata.startswith("redis:") and "w" in KINDS[kinds]:
        pytest.skip("the wheel is built without Redis")
    pair = []
    for host, kind in enumerate(KINDS[kinds]):
        peer = start(fabric, host, MC_TCP_BIND_ADDRESS="127.0.0.1", **variables(kind))
        name = f"127.0.0.{host + 2}:{free_port()}"
        assert peer.start_engine(metadata=metadata, name=name) == 0, peer.stderr()
        pair.append(peer)
    for near, far in pair, pair[::-1]:
        with Memory(near, MiB) as ours, Memory(far, MiB) as theirs:
            for i, size in enumerate([1, 4 * KiB, MiB]):
                ours.fill(seed=i + 1, length=size)
                assert near.call("transfer_sync_write", far.name, ours.address, theirs.address, size) == 0, near.stderr()
                theirs.holds([0, size, i + 1])
            theirs.fill(seed=9)
            assert near.call("transfer_sync_read", far.name, ours.address, theirs.address, MiB) == 0, near.stderr()
            ours.holds([0, MiB, 9])
        args = dict(target=far.name, buffer=0, remote=0, length=0)
        with Memory(near, 64) as ours, Memory(far, 64) as theirs:
            args.update(buffer=ours.address, remote=theirs.address, length=64)
            assert near.ask("sync", on="engine", opcode="Write", notify=["a", "b"], **args) == 0, near.stderr()
        assert far.ask("notifies", on="engine") == [["a", "b"]]


def test_nobody_of_that_name(start, fabric, metadata):
    peer = start(fabric, 0, MC_TCP_BIND_ADDRESS="127.0.0.1", **variables("c"))
    assert peer.start_engine(metadata=metadata, name="127.0.0.2:1") == 0
    with Memory(peer, 64) as ours:
        assert peer.call("transfer_sync_write", "nobody", ours.address, ours.address, 64) != 0
    assert "segment nobody is not in the metadata" in peer.stderr()


@pytest.mark.parametrize("signal", [signal.SIGTERM, signal.SIGINT])
def test_graceful_shutdown(start, metadata, signal):
    fabric = harness.Software()
    peers = [start(fabric, MC_TCP_BIND_ADDRESS="127.0.0.1", **variables("c")) for _ in range(2)]
    for i, peer in enumerate(peers):
        assert peer.start_engine(metadata=metadata, name=f"127.0.0.{i + 2}:{free_port()}") == 0
    near, far = peers
    far.call("enable_graceful_shutdown")
    assert near.call("open_segment", far.name) > 0
    far.process.send_signal(signal)
    assert far.process.wait(LONG) == 128 + signal
    # Another engine, which does not know it yet.
    assert near.start_engine(on="second", metadata=metadata, name=f"127.0.0.4:{free_port()}") == 0
    assert near.call("open_segment", far.name, on="second") == -1
    assert f"segment {far.name} is not in the metadata" in near.stderr()


def test_destroyed(start, metadata):
    peer = start(harness.Software(), MC_TCP_BIND_ADDRESS="127.0.0.1", **variables("c"))
    for on in "engine", "other":
        assert peer.start_engine(on=on, metadata=metadata, name=f"127.0.0.2:{free_port()}") == 0
    name = peer.name
    assert peer.call("open_segment", name) > 0
    peer.ask("drop", name="other")
    assert peer.start_engine(on="third", metadata=metadata, name=f"127.0.0.2:{free_port()}") == 0
    assert peer.call("open_segment", name, on="third") == -1


def test_restarted(start, metadata):
    """Killed, and started again under its name, before the server knows that it is gone."""
    fabric, name = harness.Software(), f"127.0.0.2:{free_port()}"

    def engine():
        peer = start(fabric, MC_TCP_BIND_ADDRESS="127.0.0.1", **variables("c"))
        return peer, peer.start_engine(metadata=metadata, name=name)

    first, code = engine()
    assert code == 0
    if metadata.startswith("http:"):  # the others take a key twice
        second, code = engine()
        assert code == -1
        assert f"an engine named {name} answers at 127.0.0.1:" in second.stderr()
    first.kill()
    third, code = engine()
    assert code == 0, third.stderr()
