"""What the tests and measure.py share: peers (processes with a Mooncake), fabrics, memory."""
import json
import os
import re
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KiB, MiB = 1 << 10, 1 << 20

# No test waits as long as this; it only keeps one that hangs from hanging for ever.
LONG = 60
GUARD = 4096
P2P = "P2PHANDSHAKE"
SERVES = re.compile(r"mooncake-efa \d\S* serves protocol efa in (\S+)")


def swap_library():
    """MEFA_SWAP: the library to preload. None for "none": then the wheel is as it was published."""
    path = os.environ.get("MEFA_SWAP") or str(ROOT / "build/adapter/libmooncake_efa_swap.so")
    if path == "none":
        return None
    path = Path(path).absolute()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: build it by `make test-mooncake`, or say where it is in MEFA_SWAP")
    return path


def transfer_engine_library():
    """libtransfer_engine.so: MEFA_TRANSFER_ENGINE, or what was built."""
    built = ROOT / os.environ.get("CARGO_TARGET_DIR", "target") / "release/libtransfer_engine.so"
    path = Path(os.environ.get("MEFA_TRANSFER_ENGINE") or built).absolute()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: build it by `make`, or say where it is in MEFA_TRANSFER_ENGINE")
    return path


class Fabric:
    """How peers get at each other: environment variables and libraries."""

    devices = ""  # for a store's rdma_devices
    wrong_key_kills = False

    def variables(self, host):
        raise NotImplementedError

    preload = ()
    library_dirs = ()

    def environment(self, host, swap):
        # Nobody's settings but ours.
        env = {k: v for k, v in os.environ.items() if not k.startswith(("MC_", "FI_", "SOFTEFA_", "LD_PRELOAD"))}
        env.update(self.variables(host))
        if swap is None:
            # The C++ transport does not look again for memory that was registered after it first looked.
            env["MC_DISABLE_METACACHE"] = "1"
        # Ours first: what is in front is found first.
        env["LD_PRELOAD"] = ":".join(str(path) for path in [swap, *self.preload] if path)
        dirs = [*self.library_dirs, *filter(None, [env.get("LD_LIBRARY_PATH")])]
        if dirs:
            env["LD_LIBRARY_PATH"] = ":".join(map(str, dirs))
        return env

    def close(self):
        pass


class Software(Fabric):
    """libfabric's provider for TCP. Only our transport has it."""

    # The wheel finds no device, so a store that is to look for some itself would take plain TCP. Any
    # name will do: the one transport device is not among those that the wheel knows.
    devices = "tcp"

    def variables(self, host):
        return {"MC_EFA_PROVIDER": "tcp"}


class Emulated(Fabric):
    """An EFA device in user space, under libfabric's own efa provider: softefa/.

    libfabric_dirs: where another libfabric is, and a libefa that has what it was built with."""

    wrong_key_kills = True

    def __init__(self, libfabric_dirs=None):
        # Devices of this run only.
        self.state = Path(tempfile.mkdtemp(prefix="mefa-", dir="/dev/shm"))
        self.preload = [softefa_library()]
        self.library_dirs = [libfabric_dirs] if libfabric_dirs else []

    def variables(self, host):
        return {
            "SOFTEFA_DIR": str(self.state / "softefa"),
            "SOFTEFA_HOST": str(host),
            "SOFTEFA_DEVICES": "2",
            "FI_EFA_USE_DEVICE_RDMA": "1",
            "FI_EFA_ENABLE_SHM_TRANSFER": "0",
        }

    def close(self):
        shutil.rmtree(self.state)


class Nowhere(Fabric):
    """No device and no provider named."""

    def variables(self, host):
        return {}


def softefa_library():
    """MEFA_SOFTEFA: the emulator to preload, the project's own if unset."""
    path = os.environ.get("MEFA_SOFTEFA") or ROOT / os.environ.get("CARGO_TARGET_DIR", "target") / "release/libsoftefa.so"
    path = Path(path).absolute()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: build it by `make`, or say where it is in MEFA_SOFTEFA")
    return path


class PeerError(Exception):
    pass


class Peer:
    """A process that runs peer.py. Its methods ask it something and wait for the answer."""

    def __init__(self, log, environment):
        self.log = Path(log)
        with open(self.log, "wb") as stderr:
            self.process = subprocess.Popen([sys.executable, HERE / "peer.py"], env=environment, stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, stderr=stderr, bufsize=0)
        self.unread = b""
        self.waiting = 0
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.process.stdout, selectors.EVENT_READ)
        self.name = None  # as an engine, HOST:PORT

    def stderr(self):
        return self.log.read_text(errors="replace")

    def _fail(self, what):
        # A late answer must not be taken for that of the next question.
        self.kill()
        tail = "\n".join(self.stderr().splitlines()[-40:])
        raise PeerError(f"process {self.process.pid} {what}; the end of {self.log}:\n{tail}")

    def send(self, op, **arguments):
        try:
            self.process.stdin.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
        except BrokenPipeError:
            self._fail(f"ended with {self.process.wait(LONG)} before {op}")

    def receive(self, timeout=LONG):
        deadline = time.monotonic() + timeout
        while b"\n" not in self.unread:
            if not self.selector.select(max(0, deadline - time.monotonic())):
                self._fail(f"did not answer in {timeout} s")
            some = os.read(self.process.stdout.fileno(), 1 << 16)
            if not some:
                self._fail(f"ended with {self.process.wait(LONG)}")
            self.unread += some
        line, self.unread = self.unread.split(b"\n", 1)
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer["value"]

    def ask(self, op, timeout=LONG, **arguments):
        self.send(op, **arguments)
        return self.receive(timeout)

    def call(self, name, *args, on="engine", timeout=LONG):
        """A method of the bindings."""
        return self.ask("call", timeout, on=on, name=name, args=args)

    def start_engine(self, protocol="efa", on="engine", metadata=P2P, name="127.0.0.1"):
        """What initialize returns. With a metadata server `name` is the segment's."""
        self.ask("engine_make", name=on)
        code = self.call("initialize", name, metadata, protocol, "", on=on)
        if code == 0:
            self.name = f"127.0.0.1:{self.call('get_rpc_port', on=on)}" if metadata == P2P else name
        return code

    def serves(self):
        """The files in which our transport said that it serves."""
        return [Path(path).name for path in SERVES.findall(self.stderr())]

    def end(self):
        """Lets it end by itself; its exit status."""
        if self.process.poll() is None:
            self.process.stdin.close()
            try:
                self.process.wait(LONG)
            except subprocess.TimeoutExpired:
                self._fail(f"did not end in {LONG} s")
        self.kill()
        return self.process.returncode

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(LONG)
        for pipe in self.process.stdin, self.process.stdout:
            pipe.close()
        self.selector.close()


class Memory:
    """`size` bytes of a peer, registered unless said otherwise, with guard bytes around them."""

    def __init__(self, peer, size, register=True, on="engine"):
        self.peer, self.size, self.on, self.registered = peer, size, on, False
        self.base = peer.ask("alloc", size=size + 2 * GUARD)
        self.whole = size + 2 * GUARD
        # Guards are registered too: what goes there is to be found, not refused.
        self.address = self.base + GUARD
        if register:
            assert self.register() == 0, peer.stderr()

    def register(self):
        code = self.peer.call("register_memory", self.base, self.whole, on=self.on)
        self.registered = code == 0
        return code

    def unregister(self):
        code = self.peer.call("unregister_memory", self.base, on=self.on)
        self.registered = False
        return code

    def fill(self, seed, length=None, offset=0):
        self.peer.ask("fill", address=self.address + offset, length=self.size if length is None else length, seed=seed)

    def holds(self, *pieces):
        """Every byte: [offset, length, seed] are patterns, all else is as it was allocated."""
        moved = [[GUARD + offset, length, seed] for offset, length, seed in pieces]
        wrong = self.peer.ask("wrong", address=self.base, size=self.whole, pieces=moved)
        assert wrong is None, f"{wrong} (from {GUARD} bytes before the memory)"

    def close(self):
        if self.registered:
            assert self.unregister() == 0, self.peer.stderr()
        self.peer.ask("free", address=self.base)

    def __enter__(self):
        return self

    def __exit__(self, failed, *_):
        # A peer that is gone would only hide why.
        if not failed or self.peer.process.poll() is None:
            self.close()
