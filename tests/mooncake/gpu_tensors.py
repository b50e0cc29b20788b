"""Mooncake's wheel on GPU memory, with PyTorch: two processes of one host write and read each other's tensors, and every
element is checked. By hand, where there is a GPU, PyTorch and a wheel (no CI of ours has them):

    MC_EFA_PROVIDER=tcp mooncake-efa run -- python3 gpu_tensors.py
"""

import subprocess
import sys

import torch
from mooncake.engine import TransferEngine

ELEMENTS = (5 << 20) // 4 + 3


def numbers(seed, device):
    """What no other seed gives."""
    return torch.arange(ELEMENTS, dtype=torch.int32, device=device) * 2654435 + seed


def engine():
    new = TransferEngine()
    assert new.initialize("127.0.0.1", "P2PHANDSHAKE", "efa", "") == 0
    return new, f"127.0.0.1:{new.get_rpc_port()}"


def serve():
    gpu = f"cuda:{torch.cuda.device_count() - 1}"
    ours, name = engine()
    tensors = [numbers(1, gpu), numbers(2, "cpu")]
    for tensor in tensors:
        assert ours.register_memory(tensor.data_ptr(), tensor.nbytes) == 0
    print(name, *(tensor.data_ptr() for tensor in tensors), flush=True)
    for line in sys.stdin:
        which, seed = map(int, line.split())
        tensor = tensors[which]
        torch.cuda.synchronize()
        print(int((tensor != numbers(seed, tensor.device)).sum()), flush=True)
    for tensor in tensors:
        assert ours.unregister_memory(tensor.data_ptr()) == 0


def main():
    with subprocess.Popen([sys.executable, __file__, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as peer:
        name, *addresses = peer.stdout.readline().split()
        ours, _ = engine()
        seed = 10
        for here in "cuda:0", "cpu":
            memory = torch.zeros(ELEMENTS, dtype=torch.int32, device=here)
            assert ours.register_memory(memory.data_ptr(), memory.nbytes) == 0
            for which, there in enumerate(("GPU", "host")):
                theirs, seed = int(addresses[which]), seed + 1
                memory.copy_(numbers(seed, here))
                torch.cuda.synchronize()
                assert ours.transfer_sync_write(name, memory.data_ptr(), theirs, memory.nbytes) == 0
                peer.stdin.write(f"{which} {seed}\n")
                peer.stdin.flush()
                wrong = int(peer.stdout.readline())
                memory.zero_()
                torch.cuda.synchronize()
                assert ours.transfer_sync_read(name, memory.data_ptr(), theirs, memory.nbytes) == 0
                read = int((memory != numbers(seed, here)).sum())
                print(f"{here} to and from the peer's {there}: {wrong} and {read} of {ELEMENTS} elements wrong", flush=True)
                assert wrong == read == 0
            assert ours.unregister_memory(memory.data_ptr()) == 0
        peer.stdin.close()
        assert peer.wait(60) == 0


serve() if sys.argv[1:] == ["serve"] else main()
