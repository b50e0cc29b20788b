"""Mooncake's C interface from Python, with nothing but ctypes: python3 transfer_engine.py [PROTOCOL]

TRANSFER_ENGINE_LIBRARY says where libtransfer_engine.so is, if the loader does not know it.
"""
import ctypes
import os
import sys
from ctypes import POINTER, Structure, byref, c_char_p, c_double, c_int, c_int32, c_size_t, c_uint64, c_void_p

READ, WRITE = 0, 1
WAITING, COMPLETED = 0, 4
INVALID_BATCH = 2**64 - 1


class Request(Structure):
    _fields_ = [("opcode", c_int), ("source", c_void_p), ("target_id", c_int32), ("target_offset", c_uint64),
                ("length", c_uint64)]


class Status(Structure):
    _fields_ = [("status", c_int), ("transferred_bytes", c_uint64)]


class Message(Structure):
    _fields_ = [("name", c_char_p), ("msg", c_char_p)]


class Buffer(Structure):
    _fields_ = [("addr", c_void_p), ("length", c_size_t)]


class NicLoad(Structure):
    _fields_ = [("device_name", ctypes.c_char * 64), ("inflight_bytes", c_uint64), ("ewma_bandwidth_bps", c_double)]


def load():
    """The library, every function with its types."""
    lib = ctypes.CDLL(os.environ.get("TRANSFER_ENGINE_LIBRARY", "libtransfer_engine.so"))
    engine = c_void_p
    for name, result, *arguments in [
        ("createTransferEngine", engine, c_char_p, c_char_p, c_char_p, c_uint64, c_int),
        ("destroyTransferEngine", None, engine),
        ("discoverTopology", c_int, engine),
        ("getLocalIpAndPort", c_int, engine, c_char_p, c_size_t),
        ("installTransport", c_void_p, engine, c_char_p, POINTER(c_char_p)),
        ("uninstallTransport", c_int, engine, c_char_p),
        ("openSegment", c_int32, engine, c_char_p),
        ("openSegmentNoCache", c_int32, engine, c_char_p),
        ("closeSegment", c_int, engine, c_int32),
        ("removeLocalSegment", c_int, engine, c_char_p),
        ("warmupEfaSegment", c_int, engine, c_char_p),
        ("syncSegmentCache", c_int, engine),
        ("registerLocalMemory", c_int, engine, c_void_p, c_size_t, c_char_p, c_int),
        ("unregisterLocalMemory", c_int, engine, c_void_p),
        ("registerLocalMemoryBatch", c_int, engine, POINTER(Buffer), c_size_t, c_char_p),
        ("unregisterLocalMemoryBatch", c_int, engine, POINTER(c_void_p), c_size_t),
        ("allocateBatchID", c_uint64, engine, c_size_t),
        ("freeBatchID", c_int, engine, c_uint64),
        ("submitTransfer", c_int, engine, c_uint64, POINTER(Request), c_size_t),
        ("submitTransferWithNotify", c_int, engine, c_uint64, POINTER(Request), c_size_t, Message),
        ("getTransferStatus", c_int, engine, c_uint64, c_size_t, POINTER(Status)),
        ("getNotifsFromEngine", POINTER(Message), engine, POINTER(c_int)),
        ("freeNotifsMsgBuf", c_int, POINTER(Message), c_int),
        ("genNotifyInEngine", c_int, engine, c_uint64, Message),
        ("getNicLoadStats", c_int, engine, POINTER(NicLoad), POINTER(c_size_t)),
        ("showLinks", c_int, engine, c_char_p, c_size_t, c_int),
        ("enableGracefulShutdown", None, engine),
    ]:
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def main(protocol):
    lib = load()
    engines, areas = [], [ctypes.create_string_buffer(1 << 20) for _ in range(2)]
    for area in areas:
        engine = lib.createTransferEngine(b"P2PHANDSHAKE", b"127.0.0.1", b"", 0, 0)
        assert engine and (protocol != "efa" or lib.discoverTopology(engine) == 0)
        assert lib.installTransport(engine, protocol.encode(), None)
        assert lib.registerLocalMemory(engine, area, len(area), b"*", 1) == 0
        engines.append(engine)
    ctypes.memset(areas[0], ord("x"), len(areas[0]))
    name = ctypes.create_string_buffer(256)
    assert lib.getLocalIpAndPort(engines[1], name, len(name)) == 0
    segment = lib.openSegment(engines[0], name.value)
    batch = lib.allocateBatchID(engines[0], 1)
    assert segment >= 0 and batch != INVALID_BATCH
    request = Request(WRITE, ctypes.addressof(areas[0]), segment, ctypes.addressof(areas[1]), len(areas[0]))
    assert lib.submitTransfer(engines[0], batch, byref(request), 1) == 0
    status = Status()
    while status.status == WAITING:
        assert lib.getTransferStatus(engines[0], batch, 0, byref(status)) == 0
    assert status.status == COMPLETED and areas[0].raw == areas[1].raw
    print(f"{status.transferred_bytes} bytes moved and verified")
    lib.freeBatchID(engines[0], batch)
    for engine in engines:
        lib.destroyTransferEngine(engine)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "efa")
