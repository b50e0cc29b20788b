"""That it is our code that runs, where it should and nowhere else."""
import pytest

import harness
from harness import Memory


@pytest.fixture(autouse=True)
def only_with_ours(swap):
    if swap is None:
        pytest.skip("MEFA_SWAP=none: there is nothing of ours to be seen")


def mapped(peer):
    return {harness.Path(file).name for file in peer.ask("maps")}


def has_ours(peer, swap):
    names = mapped(peer)
    return swap.name in names and any(name.startswith("libmooncake_efa.so") for name in names)


def test_ours_serves_efa(start, fabric, swap):
    peer = start(fabric)
    assert peer.start_engine() == 0, peer.stderr()
    assert peer.serves() == ["engine.so"], peer.stderr()
    assert has_ours(peer, swap)
    # What people look for in the log.
    for line in "EFA device (libfabric): ", "CQ polling worker threads", "EFA transport installed successfully":
        assert line in peer.stderr()


def test_only_ours_starts_on_an_old_libfabric(start, emulated, swap):
    """The C++ transport asks for the interface of libfabric 1.18."""
    with_ours, without = start(emulated), start(emulated, swap=False)
    major, minor = without.ask("libfabric_version")
    if (major, minor) >= (1, 18):
        pytest.skip(f"libfabric {major}.{minor} is here, on which the C++ transport starts too")
    assert without.start_engine() == -1, without.stderr()
    assert without.serves() == []
    assert not has_ours(without, swap)
    assert "fi_getinfo failed" in without.stderr()
    assert with_ours.start_engine() == 0, with_ours.stderr()
    assert with_ours.serves() == ["engine.so"]


def test_other_protocols_are_left_alone(start, fabric, swap):
    near, far = start(fabric, 0), start(fabric, 1)
    for peer in near, far:
        assert peer.start_engine("tcp") == 0, peer.stderr()
        assert has_ours(peer, swap)
    with Memory(near, 100001) as ours, Memory(far, 100001) as theirs:
        ours.fill(seed=1)
        assert near.call("transfer_sync_write", far.name, ours.address, theirs.address, 100001) == 0, near.stderr()
        theirs.holds([0, 100001, 1])
        # There is no efa to warm up.
        assert near.call("warmup_efa_segment", far.name) == 0
    for peer in near, far:
        assert peer.serves() == []
        assert "EFA device" not in peer.stderr()


def test_no_device(start):
    """Neither another transport nor a crash, but a word on what is missing."""
    peer = start(harness.Nowhere())
    assert peer.start_engine() == -1
    assert "No EFA devices found" in peer.stderr()
    assert peer.serves() == []
    # The process can go on with something else.
    assert peer.start_engine("tcp", on="other") == 0, peer.stderr()


def test_unknown_provider(start):
    class Wrong(harness.Fabric):
        def variables(self, host):
            return {"MC_EFA_PROVIDER": "no_such_provider"}

    peer = start(Wrong())
    assert peer.start_engine() == -1
    assert "no_such_provider" in peer.stderr()


@pytest.fixture
def unknown_build(tmp_path):
    """The wheel's package, with an engine.so of a build id that no table has."""
    import importlib.util
    import os

    package = harness.Path(importlib.util.find_spec("mooncake").origin).parent
    copy = tmp_path / "site" / package.name
    copy.mkdir(parents=True)
    for entry in package.iterdir():
        os.symlink(entry, copy / entry.name)
    for libraries in package.parent.glob("mooncake_transfer_engine*.libs"):
        os.symlink(libraries, copy.parent / libraries.name)
    engine = copy / "engine.so"
    data = engine.read_bytes()
    note = b"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0"  # a build id's header: 4 and 20 bytes, type 3
    at = data.index(note) + len(note)
    engine.unlink()
    engine.write_bytes(data[:at] + b"\xaa" * 20 + data[at + 20:])
    return copy.parent


def test_an_unknown_build_is_refused(start, unknown_build):
    peer = start(harness.Software(), PYTHONPATH=str(unknown_build))
    assert peer.start_engine() == -1
    assert "is not one that mooncake-efa" in peer.stderr()
    assert "aa" * 20 in peer.stderr()
    assert peer.serves() == []
    # Nothing else is taken away.
    assert peer.start_engine("tcp", on="other") == 0, peer.stderr()


def test_an_unknown_build_may_fall_back(start, unknown_build):
    peer = start(harness.Software(), PYTHONPATH=str(unknown_build), MC_EFA_SWAP_FALLBACK="1")
    # The C++ transport finds no device here; that it is the one that looked is what counts.
    assert peer.start_engine() == -1
    assert "goes on with its own C++ transport" in peer.stderr()
    assert "EfaTransport: No available EFA devices" in peer.stderr()
    assert peer.serves() == []


def test_an_unknown_build_can_be_vouched_for(start, unknown_build):
    peer = start(harness.Software(), PYTHONPATH=str(unknown_build), MC_EFA_SWAP_LAYOUT="mooncake-0.3.13")
    assert peer.start_engine() == 0, peer.stderr()
    assert peer.serves() == ["engine.so"]
    wrong = start(harness.Software(), PYTHONPATH=str(unknown_build), MC_EFA_SWAP_LAYOUT="none")
    assert wrong.start_engine() == -1
    assert "there is no layout none" in wrong.stderr()


def test_a_refusal_names_its_cause(start):
    """Mooncake hands on numbers only, so the line in the log is all that somebody has."""
    peer = start(harness.Software())
    assert peer.start_engine() == 0, peer.stderr()
    # Past the end of the address space: Mooncake itself does not look.
    assert peer.call("register_memory", (1 << 64) - 4096, 8192) != 0
    assert "memory cannot be registered: " in peer.stderr()
    assert peer.call("warmup_efa_segment", "127.0.0.1:1") != 0
    assert "warm-up of segment 127.0.0.1:1: it is not in the metadata" in peer.stderr()
