"""The wheel's engine on one side, Mooncake's C interface (libtransfer_engine.so) on the other, in both directions; and that
interface on both sides. What they do is what test_transfer.py does, and so is what is looked at."""
import pytest

import conftest
import harness
from harness import Memory
# With the pair of this file.
from test_transfer import (test_batch, test_batches_at_once, test_both_directions_at_once, test_large,  # noqa: F401
                           test_no_such_segment, test_nothing_is_moved, test_notify_comes_with_the_data,
                           test_own_segment, test_past_the_end, test_register_many, test_size,
                           test_submit_and_poll, test_threads, test_unregister, test_unregistered,
                           test_unregistered_in_a_batch, test_what_is_registered_later_is_found)

KINDS = {"c to wheel": "cw", "wheel to c": "wc", "c to c": "cc"}


def variables(kind):
    if kind == "w":
        return {}
    return {"MEFA_ENGINE": "c", "TRANSFER_ENGINE_LIBRARY": str(harness.transfer_engine_library())}


@pytest.fixture(scope="module")
def c_pairs(tmp_path_factory, swap):
    starter = conftest.Starter(tmp_path_factory.mktemp("c_pairs"), swap)
    try:
        yield starter, {}
    finally:
        starter.end_all()


@pytest.fixture(params=KINDS)
def pair(request, fabric, c_pairs):
    starter, shared = c_pairs
    key = fabric, request.param
    pair = shared.get(key)
    if pair is None or any(peer.process.poll() is not None for peer in pair):
        for peer in pair or ():
            peer.kill()
        kinds = KINDS[request.param]
        pair = [conftest.engine(starter, fabric, host, **variables(kind)) for host, kind in enumerate(kinds)]
        shared[key] = pair
    return pair


def test_it_is_what_it_says(pair, request):
    """No wheel in the process of the C interface, and none of our library's in the wheel's but the swapped one."""
    kinds = KINDS[request.node.callspec.params["pair"]]
    for peer, kind in zip(pair, kinds):
        files = "\n".join(peer.ask("maps"))
        assert ("libtransfer_engine.so" in files) == (kind == "c")
        assert ("/mooncake/engine" in files) == (kind == "w")


def test_warm_up(pair):
    near, far = pair
    for _ in range(2):
        assert near.call("warmup_efa_segment", far.name) == 0, near.stderr()
    with Memory(near, 100) as ours, Memory(far, 100) as theirs:
        ours.fill(seed=5)
        assert near.call("transfer_sync_write", far.name, ours.address, theirs.address, 100) == 0, near.stderr()
        theirs.holds([0, 100, 5])
