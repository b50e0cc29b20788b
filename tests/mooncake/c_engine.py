"""The wheel's `TransferEngine`, as far as the tests use it, on Mooncake's C interface as libtransfer_engine.so has it."""
import ctypes
import sys
import time
from ctypes import byref
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "python"))

import transfer_engine as c  # noqa: E402


class TransferEngine:
    def __init__(self):
        self.lib, self.engine, self.segments, self.counts = c.load(), None, {}, {}

    def __del__(self):
        if self.engine:
            self.lib.destroyTransferEngine(self.engine)

    def initialize(self, host, metadata, protocol, devices):
        self.engine = self.lib.createTransferEngine(metadata.encode(), host.encode(), b"", 0, 0)
        if not self.engine or self.lib.discoverTopology(self.engine) != 0:
            return -1
        return 0 if self.lib.installTransport(self.engine, protocol.encode(), None) else -1

    def get_rpc_port(self):
        text = ctypes.create_string_buffer(256)
        assert self.lib.getLocalIpAndPort(self.engine, text, len(text)) == 0
        return int(text.value.rsplit(b":", 1)[1])

    def register_memory(self, address, length):
        return self.lib.registerLocalMemory(self.engine, address, length, b"*", 1)

    def unregister_memory(self, address):
        return self.lib.unregisterLocalMemory(self.engine, address)

    def batch_register_memory(self, addresses, lengths):
        entries = [c.Buffer(*entry) for entry in zip(addresses, lengths)]
        return self.lib.registerLocalMemoryBatch(self.engine, (c.Buffer * len(entries))(*entries), len(entries), b"*")

    def batch_unregister_memory(self, addresses):
        return self.lib.unregisterLocalMemoryBatch(self.engine, (ctypes.c_void_p * len(addresses))(*addresses),
                                                   len(addresses))

    def enable_graceful_shutdown(self):
        self.lib.enableGracefulShutdown(self.engine)

    def open_segment(self, name):
        return self.lib.openSegment(self.engine, name.encode())

    def warmup_efa_segment(self, name):
        return self.lib.warmupEfaSegment(self.engine, name.encode())

    def _submit(self, target, opcode, ours, theirs, lengths, notify=None):
        """The batch, or 0."""
        if target not in self.segments:
            self.segments[target] = self.lib.openSegment(self.engine, target.encode())
        batch = self.lib.allocateBatchID(self.engine, len(lengths))
        requests = [c.Request(opcode, a, self.segments[target], b, length) for a, b, length in zip(ours, theirs, lengths)]
        array = (c.Request * len(requests))(*requests)
        if notify is None:
            code = self.lib.submitTransfer(self.engine, batch, array, len(requests))
        else:
            message = c.Message(*(text.encode() for text in notify))
            code = self.lib.submitTransferWithNotify(self.engine, batch, array, len(requests), message)
        if code != 0:
            self.lib.freeBatchID(self.engine, batch)
            return 0
        self.counts[batch] = len(lengths)
        return batch

    def _status(self, batch, task):
        status = c.Status()
        assert self.lib.getTransferStatus(self.engine, batch, task, byref(status)) == 0
        return status.status

    def _wait(self, batch):
        """0 if all of it is complete, -1 if not."""
        statuses = set()
        for task in range(self.counts.pop(batch)):
            while (status := self._status(batch, task)) == c.WAITING:
                time.sleep(0)
            statuses.add(status)
        return self.lib.freeBatchID(self.engine, batch) if statuses == {c.COMPLETED} else -1

    def _sync(self, target, opcode, ours, theirs, lengths, notify=None):
        batch = self._submit(target, opcode, ours, theirs, lengths, notify)
        return self._wait(batch) if batch else -1

    def transfer_sync_write(self, target, ours, theirs, length):
        return self._sync(target, c.WRITE, [ours], [theirs], [length])

    def transfer_sync_read(self, target, ours, theirs, length):
        return self._sync(target, c.READ, [ours], [theirs], [length])

    def batch_transfer_sync_write(self, target, ours, theirs, lengths):
        return self._sync(target, c.WRITE, ours, theirs, lengths)

    def batch_transfer_sync_read(self, target, ours, theirs, lengths):
        return self._sync(target, c.READ, ours, theirs, lengths)

    def batch_transfer_async_write(self, target, ours, theirs, lengths):
        return self._submit(target, c.WRITE, ours, theirs, lengths)

    def batch_transfer_async_read(self, target, ours, theirs, lengths):
        return self._submit(target, c.READ, ours, theirs, lengths)

    def get_batch_transfer_status(self, batches):
        return min(self._wait(batch) for batch in batches)

    def transfer_submit_write(self, target, ours, theirs, length):
        return self._submit(target, c.WRITE, [ours], [theirs], [length])

    def transfer_check_status(self, batch):
        """1 if it is complete, 0 if it is not yet, -1 if it failed."""
        status = self._status(batch, 0)
        if status == c.WAITING:
            return 0
        self.lib.freeBatchID(self.engine, batch)
        return 1 if status == c.COMPLETED else -1

    class TransferOpcode:
        Write, Read = c.WRITE, c.READ

    def transfer_sync(self, target, ours, theirs, length, opcode, notify):
        return self._sync(target, opcode, [ours], [theirs], [length], [notify.name, notify.msg])

    def get_notifies(self):
        count = ctypes.c_int()
        messages = self.lib.getNotifsFromEngine(self.engine, byref(count))
        found = [TransferNotify(messages[i].name.decode(), messages[i].msg.decode()) for i in range(count.value)]
        self.lib.freeNotifsMsgBuf(messages, count)
        return found


class TransferNotify:
    def __init__(self, name, msg):
        self.name, self.msg = name, msg
