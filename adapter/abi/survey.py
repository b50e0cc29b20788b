#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Finds the layouts that published Mooncake wheels were compiled with, and prints lines for hosts.tsv.

    adapter/abi/survey.py [--table FILE] [--facts] [--jobs N] WHEEL...

Needs python3 (3.9 or newer) and binutils (readelf, objdump); x86-64 only. Each wheel's engine.so and
store.so is one host. What is looked at is the machine code of a few exported functions: a small dataflow
over registers and stack slots says which field of which argument an instruction touches. What cannot be
read off that way is `unknown`; nothing is guessed.

Hosts with equal facts have one layout. Its name comes from layouts.txt beside this file. Facts that are
not there print as `UNNAMED-...`, those with an unknown among them as `UNKNOWN-...`, and the exit status is
1; the facts are on standard error. README.md says what to do then. With --table the lines of hosts that
have a layout are merged into that file.
"""

import argparse
import collections
import concurrent.futures
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile

# --- what is asked -----------------------------------------------------------------------------------

STRING = "NSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"
EFA = "_ZN8mooncake12EfaTransport"
META = "_ZN8mooncake16TransferMetadata"
MULTI = "_ZN8mooncake14MultiTransport"

INSTALL = "7installERNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEESt10shared_ptrINS_16TransferMetadataEES8_INS_8TopologyEE"
REGISTER = EFA + "19registerLocalMemoryEPvmRK" + STRING + "bb"
UNREGISTER = EFA + "21unregisterLocalMemoryEPvb"
REGISTER_BATCH = EFA + "24registerLocalMemoryBatchERKSt6vectorINS_9Transport11BufferEntryESaIS3_EERK" + STRING
UNREGISTER_BATCH = EFA + "26unregisterLocalMemoryBatchERKSt6vectorIPvSaIS2_EE"
SUBMIT_TASK = EFA + "18submitTransferTaskERKSt6vectorIPNS_9Transport12TransferTaskESaIS4_EE"
STATUS = EFA + "17getTransferStatusEmmRNS_9Transport14TransferStatusE"
ON_SETUP = EFA + "21onSetupEfaConnectionsERKNS_16TransferMetadata13HandShakeDescERS2_"
STATUS_NEW = "_ZN8mooncake6StatusC1ENS0_4CodeESt17basic_string_viewIcSt11char_traitsIcEE"
BASE_INSTALL = "_ZN8mooncake9Transport" + INSTALL

# What the preloaded library defines in the host's place, or calls in the host.
USED = [
    EFA + "C1Ev", EFA + "D0Ev", EFA + "D1Ev", EFA + INSTALL, REGISTER, UNREGISTER, REGISTER_BATCH,
    UNREGISTER_BATCH, SUBMIT_TASK, STATUS, EFA + "13warmupSegmentERK" + STRING,
    EFA + "20startHandshakeDaemonER" + STRING, ON_SETUP, BASE_INSTALL,
    META + "17decodeSegmentDescERN4Json5ValueERK" + STRING,
    META + "17encodeSegmentDescERKNS0_11SegmentDescERN4Json5ValueE",
    META + "15addLocalSegmentEmRK" + STRING + "OSt10shared_ptrINS0_11SegmentDescEE",
    META + "12getSegmentIDERK" + STRING, META + "18getSegmentDescByIDEmb", META + "20getSegmentDescByNameERK" + STRING + "b",
    META + "22updateLocalSegmentDescEm",
    META + "13sendHandshakeERK" + STRING + "RKNS0_13HandShakeDescERS9_",
    "_ZNK8mooncake8Topology8toStringB5cxx11Ev", STATUS_NEW,
]
# The same, in the libjsoncpp that comes with the wheel.
USED_JSON = [
    "_ZN4Json5ValueC1ENS_9ValueTypeE", "_ZN4Json5ValueD1Ev", "_ZN4Json6ReaderC1Ev",
    "_ZN4Json6Reader5parseERKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEERNS_5ValueEb",
    "_ZNK4Json5Value14toStyledStringB5cxx11Ev",
]

UNKNOWN = "unknown"

# --- the file ----------------------------------------------------------------------------------------


def run(*argv):
    done = subprocess.run(argv, capture_output=True, text=True, errors="replace")
    if done.returncode:
        sys.exit(f"{argv[0]} failed: {done.stderr.strip()}")
    return done.stdout


class Elf:
    def __init__(self, path):
        self.path = path
        found = re.search(r"Build ID: ([0-9a-f]+)", run("readelf", "-nW", path))
        self.build_id = found.group(1) if found else None
        # name -> (address, size), of what is defined, exported and open to interposition.
        self.symbols = {}
        for line in run("readelf", "--dyn-syms", "-W", path).splitlines():
            part = line.split()
            if len(part) == 8 and re.fullmatch(r"\d+:", part[0]) and part[6] != "UND" and part[4] != "LOCAL" and part[5] == "DEFAULT":
                self.symbols[part[7].split("@")[0]] = (int(part[1], 16), int(part[2], 0))
        self.sections = []  # (address, offset, size)
        for found in re.finditer(
            r"^\s*\[\s*\d+\] \S+\s+PROGBITS\s+([0-9a-f]+) ([0-9a-f]+) ([0-9a-f]+)",
            run("readelf", "-SW", path), re.M,
        ):
            self.sections.append(tuple(int(x, 16) for x in found.groups()))
        self.functions = {}

    def string(self, address):
        """The zero-terminated text at an address of initialised data."""
        for start, offset, size in self.sections:
            if start <= address < start + size:
                with open(self.path, "rb") as file:
                    file.seek(offset + address - start)
                    text = file.read(min(256, start + size - address)).split(b"\0")[0]
                try:
                    return text.decode("ascii")
                except UnicodeDecodeError:
                    return None
        return None

    def vtable(self, name):
        """Slot -> symbol, from the symbolic relocations; the first slot is at 0x10."""
        if name not in self.symbols:
            return None
        start, size = self.symbols[name]
        slots = [None] * ((size - 16) // 8)
        for line in run("readelf", "-rW", self.path).splitlines():
            part = line.split()
            if len(part) >= 5 and re.fullmatch("[0-9a-f]{8,16}", part[0]):
                at = int(part[0], 16) - start - 16
                if 0 <= at < size - 16:
                    symbolic = part[2] == "R_X86_64_64" and part[-1] == "0"
                    slots[at // 8] = part[4] if symbolic else "?" + part[2]
        return slots

    def function(self, name):
        """The exported function of this name, taken apart; None if there is none."""
        if name not in self.symbols:
            return None
        if name not in self.functions:
            start, size = self.symbols[name]
            self.functions[name] = Function(self, start, size)
        return self.functions[name]

    def find(self, prefix):
        return [self.function(name) for name in sorted(self.symbols) if name.startswith(prefix)]


# --- the dataflow ------------------------------------------------------------------------------------
#
# A value is None (not known) or one of
#   ("arg", n)             the nth integer argument, 0 to 5
#   ("sp",)                the stack pointer at entry
#   ("const", n)
#   ("at", base, n)        base + n, base one of those above or below
#   ("load", value, size)  what is in memory there
#   ("times", v, n)        n times v
#   ("index", base, v, n)  base + n times v; v may be None
#   ("sum", {a, b})        the sum of two loads
#   ("span", value, s, m)  (end - begin of the vector at `value`) >> s, times m
#   ("ret", name, args)    what a call returned

ARGS = ["rdi", "rsi", "rdx", "rcx", "r8", "r9"]
CLOBBERED = ["rax", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11"]

REGISTERS = {}
for _r in ["ax", "bx", "cx", "dx"]:
    REGISTERS.update({"r" + _r: ("r" + _r, 8), "e" + _r: ("r" + _r, 4), _r: ("r" + _r, 2)})
    REGISTERS.update({_r[0] + "l": ("r" + _r, 1), _r[0] + "h": ("r" + _r, 1)})
for _r in ["si", "di", "bp", "sp"]:
    REGISTERS.update({"r" + _r: ("r" + _r, 8), "e" + _r: ("r" + _r, 4), _r: ("r" + _r, 2), _r + "l": ("r" + _r, 1)})
for _n in range(8, 16):
    for _suffix, _size in [("", 8), ("d", 4), ("w", 2), ("b", 1)]:
        REGISTERS[f"r{_n}{_suffix}"] = (f"r{_n}", _size)
SIZES = {"BYTE": 1, "WORD": 2, "DWORD": 4, "QWORD": 8, "XMMWORD": 16, "YMMWORD": 32}

MASK = (1 << 64) - 1


def signed(n):
    n &= MASK
    return n - (1 << 64) if n >> 63 else n


def at(base, n):
    if base is None:
        return None
    if base[0] == "const":
        return ("const", signed(base[1] + n))
    if base[0] == "at":
        base, n = base[1], base[2] + n
    n = signed(n)
    return base if n == 0 else ("at", base, n)


def split(value):
    """base, offset"""
    if value is not None and value[0] == "at":
        return value[1], value[2]
    return value, 0


def times(value, n):
    if value is None:
        return None
    if value[0] == "const":
        return ("const", signed(value[1] * n))
    if value[0] == "times":
        return ("times", value[1], value[2] * n)
    return ("times", value, n)


def pointer(value):
    base, _ = split(value)
    return base is not None and base[0] in ("arg", "load", "ret", "sp", "index")


def index(base, value, n):
    if value is not None and value[0] == "times":
        value, n = value[1], n * value[2]
    inner, offset = split(base)
    return at(("index", inner, value, n), offset)


def add(a, b):
    for x, y in ((a, b), (b, a)):
        if x is not None and x[0] == "const":
            return at(y, x[1])
    if a is None or b is None:
        return None
    for x, y in ((a, b), (b, a)):
        if y[0] == "times" and x[0] == "times" and x[1] == y[1]:
            return ("times", x[1], x[2] + y[2])
        if y[0] == "times" and x == y[1]:
            return ("times", x, 1 + y[2])
    if a == b and a[0] == "arg":
        return ("times", a, 2)
    for x, y in ((a, b), (b, a)):
        if y[0] == "times" and pointer(x):
            return index(x, y, 1)
    if a[0] == "load" and b[0] == "load":
        return ("sum", frozenset((a, b)))
    return None


def subtract(a, b):
    if b is not None and b[0] == "const":
        return at(a, -b[1])
    if a is None or b is None:
        return None
    if a[0] == "times" and a[1] == b:
        return ("times", b, a[2] - 1)
    if a[0] == "times" and b[0] == "times" and a[1] == b[1]:
        return ("times", a[1], a[2] - b[2])
    if a[0] == "load" and b[0] == "load" and at(b[1], 8) == a[1]:
        return ("span", b[1], 0, 1)
    return None


Call = collections.namedtuple("Call", "at name args")
Access = collections.namedtuple("Access", "at where size value")
Compare = collections.namedtuple("Compare", "at left right")


class Function:
    """Calls, loads, stores and comparisons of one function, in the order of addresses."""

    def __init__(self, elf, start, size):
        self.elf = elf
        self.calls, self.loads, self.stores, self.compares, self.values = [], [], [], [], []
        self.code = []  # (address, mnemonic, operands, target or None, rip-relative address or None)
        text = run("objdump", "-d", "-M", "intel", "--no-show-raw-insn",
                   f"--start-address={start}", f"--stop-address={start + size}", elf.path)
        for line in text.splitlines():
            found = re.match(r"\s*([0-9a-f]+):\t(.*)$", line)
            if not found:
                continue
            address, rest = int(found.group(1), 16), found.group(2)
            rest, _, comment = rest.partition("#")
            rip = re.match(r"\s*([0-9a-f]+) <", comment)
            rip = int(rip.group(1), 16) if rip else None
            rest = re.sub(r"^((bnd|notrack|lock|rep|repz|repnz|data16|cs) )+", "", rest.strip())
            mnemonic, _, operands = rest.partition(" ")
            target = re.match(r"\s*([0-9a-f]+) <(.*)>$", operands)
            if target:
                target = (int(target.group(1), 16), target.group(2).replace("@plt", "").split("@@")[0])
                operands = ""
            ops = [x.strip() for x in operands.split(",")] if operands.strip() else []
            self.code.append((address, mnemonic, ops, target or None, rip))
        self.flow(start, start + size)

    def flow(self, start, end):
        number = {code[0]: i for i, code in enumerate(self.code)}
        leaders = {0}
        for i, (_, mnemonic, _, target, _) in enumerate(self.code):
            if mnemonic.startswith("j") or mnemonic in ("ret", "ud2"):
                leaders.add(i + 1)
                if target and target[0] in number:
                    leaders.add(number[target[0]])
        leaders = sorted(x for x in leaders if x < len(self.code))
        bounds = {a: b for a, b in zip(leaders, leaders[1:] + [len(self.code)])}
        # Where the address of a stack object is taken calls may write, there and above. The first round finds
        # the lowest one.
        self.escaped = None
        entry = {register: ("arg", i) for i, register in enumerate(ARGS)}
        entry["rsp"] = ("sp",)
        next_of = {block: self.successors(block, bounds[block], number) for block in leaders}
        # Blocks in an order in which loops aside those before a block come first.
        order, open_blocks = {}, [(0, iter(next_of[0]))]
        entered = {0}
        while open_blocks:
            block, rest = open_blocks[-1]
            to = next((x for x in rest if x not in entered), None)
            if to is None:
                order[block] = -len(order)
                open_blocks.pop()
            else:
                entered.add(to)
                open_blocks.append((to, iter(next_of[to])))
        for _ in range(2):
            # outs[b][a]: the state at the end of a, from where b is entered. killed: what the ways into a block
            # do not agree on.
            states, outs, killed, lowest = {0: entry}, {0: {-1: entry}}, collections.defaultdict(set), None
            work, seen = [0], set()
            while work:
                block = min(work, key=order.get)
                work.remove(block)
                seen.add(block)
                state, taken = self.block(block, bounds[block], dict(states[block]), False)
                lowest = min(taken + ([] if lowest is None else [lowest]), default=None)
                for to in next_of[block]:
                    outs.setdefault(to, {})[block] = state
                    ways = list(outs[to].values())
                    new = {k: v for k, v in ways[0].items() if k not in killed[to] and all(way.get(k) == v for way in ways[1:])}
                    old = states.get(to)
                    if old is not None and to in seen:
                        # Never more than before, so that this ends.
                        new = {k: v for k, v in new.items() if k in old}
                    if old == new:
                        continue
                    if old is not None and to in seen:
                        # What follows was found with too much: it is found again.
                        killed[to] |= {k for k, v in old.items() if new.get(k) != v}
                        behind, todo = set(), [to]
                        while todo:
                            last = todo.pop()
                            for x in next_of[last]:
                                if order[x] > order[last] and x not in behind:
                                    behind.add(x)
                                    todo.append(x)
                        for x in behind:
                            states.pop(x, None)
                        for x in outs.values():
                            for y in behind.intersection(x):
                                del x[y]
                        seen -= behind
                        work = [x for x in work if x not in behind]
                        ways = list(outs[to].values())
                        new = {k: v for k, v in old.items() if k not in killed[to] and all(way.get(k) == v for way in ways)}
                    states[to] = new
                    if to not in work:
                        work.append(to)
                    if block not in states:
                        break
            self.escaped = lowest
        self.turn = {}  # address -> place in an order in which what leads to something comes before it
        for block in sorted(states, key=order.get):
            for i in range(block, bounds[block]):
                self.turn[self.code[i][0]] = len(self.turn)
            self.block(block, bounds[block], dict(states[block]), True)

    def successors(self, first, last, number):
        _, mnemonic, _, target, _ = self.code[last - 1]
        out = []
        if mnemonic.startswith("j") and target and target[0] in number:
            out.append(number[target[0]])
        falls = not (mnemonic in ("jmp", "ret", "ud2"))
        if mnemonic == "call" and target and re.search(r"throw|_Unwind_Resume|stack_chk_fail|abort|terminate", target[1]):
            falls = False
        if falls and last < len(self.code):
            out.append(last)
        return out

    def block(self, first, last, state, record):
        taken = []
        for i in range(first, last):
            self.step(self.code[i], state, record, taken)
        return state, taken

    # One operand.
    def memory(self, operand, state, rip):
        """(address as a value, size) of a memory operand; None for another."""
        found = re.match(r"(?:(\w+) PTR )?(?:(\w\w):)?\[(.*)\]$", operand)
        if not found:
            found = re.match(r"(?:(\w+) PTR )?(fs|gs):", operand)
            return (None, SIZES.get(found.group(1), 0)) if found else None
        size, segment, inside = SIZES.get(found.group(1), 0), found.group(2), found.group(3)
        if segment in ("fs", "gs"):
            return None, size
        if "rip" in inside:
            return (("const", rip) if rip is not None else None), size
        value, scaled, offset = None, None, 0
        bases = []
        for sign, term in re.findall(r"([+-]?)([^+-]+)", inside):
            if "*" in term:
                register, _, factor = term.partition("*")
                scaled = (register, int(factor))
            elif term in REGISTERS:
                bases.append(term)
            else:
                offset += -int(term, 0) if sign == "-" else int(term, 0)
        got = [state.get(REGISTERS[x][0]) for x in bases]
        if not bases and scaled:
            if scaled[0] not in REGISTERS:
                return None, size
            value = times(state.get(REGISTERS[scaled[0]][0]), scaled[1])
        elif len(got) == 1 and not scaled:
            value = got[0]
        elif len(got) == 1 and scaled and scaled[0] in REGISTERS:
            by = state.get(REGISTERS[scaled[0]][0])
            base = got[0]
            value = add(base, by if scaled[1] == 1 else times(by, scaled[1]))
            if value is None and by is None and pointer(base):
                value = index(base, None, scaled[1])
        return at(value, offset), size

    def read(self, operand, state, rip, where, record):
        if operand in REGISTERS:
            register, size = REGISTERS[operand]
            value = state.get(register)
            if size == 8 or value is None:
                return value
            # A narrower view is the same only of what is that narrow.
            if value[0] == "const" or (value[0] == "load" and value[2] <= size):
                return value
            return None
        if re.fullmatch(r"-?(0x)?[0-9a-f]+", operand):
            return ("const", signed(int(operand, 16)))
        memory = self.memory(operand, state, rip)
        if memory is None or memory[0] is None:
            return None
        address, size = memory
        base, offset = split(address)
        if base == ("sp",):
            held = state.get(("stack", offset))
            return held[0] if held and held[1] == size else None
        value = ("load", address, size)
        if record:
            self.loads.append(Access(where, address, size, value))
        return value

    def write(self, operand, value, state, rip, where, record):
        if operand in REGISTERS:
            register, size = REGISTERS[operand]
            if size == 4 and value is not None and value[0] == "const":
                value = ("const", value[1] & 0xFFFFFFFF)
            elif size < 8 and not (value is not None and value[0] in ("const", "load")):
                value = None
            if size < 4 and value is not None and value[0] == "const":
                # The upper part stays; good enough for a store of this width.
                value = ("const", value[1] & ((1 << 8 * size) - 1))
            if value is None:
                state.pop(register, None)
            else:
                state[register] = value
            return
        memory = self.memory(operand, state, rip)
        if memory is None or memory[0] is None:
            return
        address, size = memory
        base, offset = split(address)
        if base == ("sp",):
            for slot in [k for k in state if k[0] == "stack" and offset - 32 < k[1] < offset + max(size, 1)]:
                if slot[1] + state[slot][1] > offset:
                    del state[slot]
            if value is not None and size:
                state[("stack", offset)] = (value, size)
            return
        if record:
            self.stores.append(Access(where, address, size, value))

    def step(self, code, state, record, taken):
        where, mnemonic, ops, target, rip = code
        if mnemonic == "call":
            name = target[1] if target else "*"
            if target and "+" in name:
                name = hex(target[0])
            args = tuple(state.get(register) for register in ARGS)
            if target is None and ops:
                self.read(ops[0], state, rip, where, record)
            if record:
                self.calls.append(Call(where, name, args))
            for register in CLOBBERED:
                state.pop(register, None)
            if self.escaped is not None:
                for slot in [k for k in state if k[0] == "stack" and k[1] >= self.escaped]:
                    del state[slot]
            # Arguments of an allocation only, or values would grow without end.
            state["rax"] = ("ret", name, args[:1] if name == "_Znwm" else (), where)
            return
        if mnemonic == "push":
            value = self.read(ops[0], state, rip, where, record)
            state["rsp"] = at(state.get("rsp"), -8)
            base, offset = split(state.get("rsp"))
            if base == ("sp",) and value is not None:
                state[("stack", offset)] = (value, 8)
            return
        if mnemonic == "pop":
            base, offset = split(state.get("rsp"))
            held = state.get(("stack", offset)) if base == ("sp",) else None
            self.write(ops[0], held[0] if held else None, state, rip, where, record)
            state["rsp"] = at(state.get("rsp"), 8)
            return
        if mnemonic == "leave":
            state["rsp"] = at(state.get("rbp"), 8)
            state.pop("rbp", None)
            return
        if mnemonic.startswith("j") or mnemonic in ("nop", "endbr64", "ret", "ud2", "pause"):
            return
        if mnemonic in ("cmp", "test"):
            left = self.read(ops[0], state, rip, where, record)
            right = self.read(ops[1], state, rip, where, record)
            if record:
                self.compares.append(Compare(where, left, right))
            return
        if mnemonic in ("mul", "div", "idiv", "cqo", "cdq", "cpuid", "cmpxchg", "xchg", "rdtsc"):
            state.pop("rax", None)
            state.pop("rdx", None)
        if mnemonic in ("stos", "movs", "scas", "lods", "cmps"):
            for register in ("rax", "rcx", "rdi", "rsi"):
                if register != "rax" or mnemonic == "lods":
                    state.pop(register, None)
            return
        if not ops:
            return
        if mnemonic in ("mov", "movabs", "movzx", "movsx", "movsxd"):
            value = self.read(ops[1], state, rip, where, record)
            # What a wider register holds may be stored narrower: a bool, a status.
            if value is None and ops[1] in REGISTERS:
                whole = state.get(REGISTERS[ops[1]][0])
                if whole is not None and whole[0] == "const":
                    value = whole
            self.write(ops[0], value, state, rip, where, record)
            return
        if mnemonic == "lea":
            memory = self.memory(ops[1], state, rip)
            value = memory[0] if memory else None
            base, offset = split(value)
            if base == ("sp",):
                taken.append(offset)
            self.write(ops[0], value, state, rip, where, record)
            return
        if len(ops) == 2 and mnemonic in ("add", "sub", "shl", "sal", "sar", "shr", "xor", "imul", "and", "or"):
            wide = ops[0] in REGISTERS and REGISTERS[ops[0]][1] == 8
            left = self.read(ops[0], state, rip, where, record)
            right = self.read(ops[1], state, rip, where, record)
            value = None
            if mnemonic == "xor" and ops[0] == ops[1]:
                value = ("const", 0)
            elif wide and mnemonic == "add":
                value = add(left, right)
                if value is None and left is not None and right is None and pointer(left):
                    value = index(left, None, 1)
                elif value is None and right is not None and left is None and pointer(right):
                    value = index(right, None, 1)
            elif wide and mnemonic == "sub":
                value = subtract(left, right)
            elif wide and right is not None and right[0] == "const":
                n = right[1]
                if mnemonic in ("shl", "sal") and 0 < n < 63:
                    value = times(left, 1 << n)
                elif mnemonic == "imul" and left is not None and left[0] == "span" and left[3] == 1:
                    value = left[:3] + (n & MASK,)
                elif mnemonic == "imul" and 0 < n < 1 << 32:
                    value = times(left, n)
                elif mnemonic in ("sar", "shr") and left is not None and left[0] == "span" and left[2:] == (0, 1):
                    value = left[:2] + (n, 1)
            elif wide and mnemonic == "imul" and left is not None and left[0] == "const" and right is not None and right[0] == "span" and right[3] == 1:
                value = right[:3] + (left[1] & MASK,)
            elif mnemonic == "or" and right == ("const", -1):
                value = right
            if record and value is not None and value[0] == "span":
                self.values.append(value)
            self.write(ops[0], value, state, rip, where, record)
            return
        if len(ops) == 3 and mnemonic == "imul":
            left = self.read(ops[1], state, rip, where, record)
            n = int(ops[2], 16)
            self.write(ops[0], times(left, n) if 0 < n < 1 << 32 else None, state, rip, where, record)
            return
        # Anything else: reads all, and makes its first operand unknown.
        for operand in ops[1:]:
            self.read(operand, state, rip, where, record)
        if ops[0] not in REGISTERS and self.memory(ops[0], state, rip) is not None and not mnemonic.startswith("mov"):
            self.read(ops[0], state, rip, where, record)
        self.write(ops[0], None, state, rip, where, record)
        if mnemonic in ("xchg", "xadd") and ops[1] in REGISTERS:
            state.pop(REGISTERS[ops[1]][0], None)


# --- the questions -----------------------------------------------------------------------------------


def only(found):
    """The one thing that was found."""
    found = {x for x in found if x is not None}
    return found.pop() if len(found) == 1 else UNKNOWN


def stride(span):
    """The element size that a division of a vector's length tells of."""
    _, _, shift, factor = span
    if factor == 1:
        return 1 << shift if shift else None
    if not factor & 1:
        return None
    odd = pow(factor, -1, 1 << 64)
    return odd << shift if odd < 1 << 16 else None


def strides(function, vector):
    out = set()
    spans = [x for x in function.values if x[1] == vector]
    multiplied = [x for x in spans if x[3] != 1]
    # A shift that is followed by a multiplication is half a division only.
    for span in multiplied or [x for x in spans if x[2]]:
        out.add(stride(span))
    return out


def vtable(elf, facts):
    slots = elf.vtable("_ZTVN8mooncake12EfaTransportE")
    if slots is None or None in slots:
        facts["vtable"] = UNKNOWN
        return
    facts["vtable.slots"] = len(slots)
    # What a member that is not ours does is the host's business; where ours are is not.
    names = {
        EFA + "D1Ev": "~EfaTransport", EFA + "D0Ev": "~EfaTransport(delete)", EFA + INSTALL: "install",
        "_ZNK8mooncake12EfaTransport7getNameEv": "getName", REGISTER: "registerLocalMemory",
        UNREGISTER: "unregisterLocalMemory", REGISTER_BATCH: "registerLocalMemoryBatch",
        UNREGISTER_BATCH: "unregisterLocalMemoryBatch", SUBMIT_TASK: "submitTransferTask",
        EFA + "14submitTransferEmRKSt6vectorINS_9Transport15TransferRequestESaIS3_EE": "submitTransfer",
        STATUS: "getTransferStatus",
        "_ZN8mooncake9Transport15allocateBatchIDEm": "Transport::allocateBatchID",
        "_ZN8mooncake9Transport11freeBatchIDEm": "Transport::freeBatchID",
    }
    for i, slot in enumerate(slots):
        name = names.get(slot)
        if name is None:
            found = re.match(r"_ZNK?8mooncake(?:9Transport|12EfaTransport)(\d+)(\w+)", slot)
            name = ("Transport::" if "mooncake9Transport" in slot else "EfaTransport::") + found.group(2)[: int(found.group(1))] if found else slot
        facts[f"vtable.{i}"] = name


def sizes(elf, facts):
    found = set()
    for function in elf.find(MULTI + "16installTransportE"):
        for call in function.calls:
            if call.name == EFA + "C1Ev":
                made = call.args[0]
                if made is not None and made[0] == "ret" and made[1] == "_Znwm" and made[2][0] and made[2][0][0] == "const":
                    found.add(made[2][0][1])
                else:
                    found.add(UNKNOWN)
    facts["EfaTransport.size"] = only(found)

    made, member, tasks = set(), collections.defaultdict(set), set()
    for function in elf.find(MULTI + "15allocateBatchIDEm"):
        for store in function.stores:
            base, offset = split(store.where)
            if base is not None and base[0] == "ret" and base[1] == "_Znwm" and base[2][0] and base[2][0][0] == "const":
                made.add(base[2][0][1])
                if store.value == base:
                    member["id"].add(offset)
                elif store.value == ("arg", 1):
                    member["batch_size"].add(offset)
                elif store.value is not None and store.value[0] == "ret" and store.value[1] == "_Znwm":
                    # Room for tasks, as many as the argument says: begin and end of a vector.
                    room = store.value[2][0]
                    if room is not None and room[:2] == ("times", ("arg", 1)):
                        tasks.add((offset, room[2]))
        for call in function.calls:
            if "TransferTask" in call.name and "7reserveEm" in call.name:
                base, offset = split(call.args[0])
                if base is not None and base[0] == "ret" and base[1] == "_Znwm":
                    member["task_list"].add(offset)
    for offset, size in tasks:
        if (offset + 8, size) in tasks:
            member["task_list"].add(offset)
    facts["BatchDesc.size"] = only(made)
    for name in ("id", "batch_size", "task_list"):
        facts["BatchDesc." + name] = only(member[name])


def status(elf, facts):
    """getTransferStatus: the result, this, batch, number, status."""
    names = ["slice_count", "success_slice_count", "failed_slice_count", "transferred_bytes", "is_finished"]
    for name in ["size"] + names:
        facts["TransferTask." + name] = UNKNOWN
    facts["TransferStatus.transferred_bytes"] = facts["TransferStatus.s"] = UNKNOWN
    facts["Status.code"] = facts["Status.message"] = UNKNOWN
    function = elf.function(STATUS)
    if function is None:
        return
    tasks = ("at", ("arg", 2), 16)
    if facts["BatchDesc.task_list"] != 16:
        return

    def field(value):
        """The offset in the task that a load is from."""
        if value is None or value[0] != "load":
            return None
        base, offset = split(value[1])
        if base is not None and base[0] == "index" and base[1] == ("load", tasks, 8) and base[2] == ("arg", 3):
            return offset
        return None

    size = strides(function, tasks)
    for access in function.loads + function.stores:
        base, _ = split(access.where)
        if base is not None and base[0] == "index" and base[1] == ("load", tasks, 8):
            size.add(base[3] if base[2] == ("arg", 3) else None)
    multi = set()
    for other in elf.find(MULTI + "17getTransferStatusEmmRNS_9Transport14TransferStatusE"):
        multi |= strides(other, tasks)
    size = {x for x in size if x is not None}
    facts["TransferTask.size"] = only(size) if multi and multi == size else UNKNOWN

    bytes_at, status_at, counts, whole, failed, finished, code = set(), set(), set(), set(), set(), set(), set()
    for store in function.stores:
        base, offset = split(store.where)
        if base == ("arg", 4) and field(store.value) is not None:
            bytes_at.add((offset, field(store.value)))
        elif base == ("arg", 4) and store.size == 4:
            status_at.add(offset)
        elif base is not None and base[0] == "index" and store.size == 1 and store.value == ("const", 1):
            finished.add(offset)
        elif base == ("arg", 0):
            code.add((offset, store.size, store.value))
    for compare in function.compares:
        for a, b in ((compare.left, compare.right), (compare.right, compare.left)):
            if a is not None and a[0] == "sum" and field(b) is not None:
                whole.add(field(b))
                counts.add(frozenset(field(x) for x in a[1]))
    both = only(counts)
    for compare in function.compares:
        offset = field(compare.left)
        if both != UNKNOWN and offset in both and (compare.right == compare.left or compare.right in (("const", 0), ("const", 1))):
            failed.add(offset)
    pair = only(bytes_at)
    if pair != UNKNOWN:
        facts["TransferStatus.transferred_bytes"], facts["TransferTask.transferred_bytes"] = pair
    facts["TransferStatus.s"] = only(status_at)
    facts["TransferTask.slice_count"] = only(whole)
    facts["TransferTask.failed_slice_count"] = only(failed)
    if both != UNKNOWN and only(failed) in both and len(both) == 2:
        facts["TransferTask.success_slice_count"] = only(both - {only(failed)})
    facts["TransferTask.is_finished"] = only(finished)
    facts["Status.code"] = only({o for o, size, value in code if size == 2 and value == ("const", 0)})
    facts["Status.message"] = only({o for o, size, value in code if size == 8 and value == ("const", 0)})


def submission(elf, facts):
    """submitTransferTask: the result, this, pointers to tasks."""
    names = ["TransferTask.request", "TransferTask.total_bytes", "TransferRequest.source", "TransferRequest.target_id", "TransferRequest.length"]
    for name in names:
        facts[name] = UNKNOWN
    function = elf.function(SUBMIT_TASK)
    if function is None:
        return

    def task(value):
        """Whether a value is an element of the vector of tasks."""
        if value is None or value[0] != "load":
            return False
        base, offset = split(value[1])
        begin = ("load", ("arg", 2), 8)
        return value[1] == begin or (base is not None and base[0] == "index" and base[1] == begin and base[3] == 8 and offset == 0)

    def request(value):
        """The offset in the task of the pointer that a value is."""
        if value is None or value[0] != "load":
            return None
        base, offset = split(value[1])
        return offset if task(base) else None

    touched, total, target, chosen, fields = set(), set(), set(), set(), set()
    for load in function.loads:
        base, offset = split(load.where)
        if request(base) is not None:
            touched.add(request(base))
            fields.add((offset, load.size))
    # Two counters are added to in place: of slices, which getTransferStatus tells, and of bytes.
    for store in function.stores:
        base, offset = split(store.where)
        if task(base) and store.size == 8 and any(load.at == store.at and load.where == store.where for load in function.loads):
            total.add(offset)
    total = total - {facts["TransferTask.slice_count"]} if facts["TransferTask.slice_count"] in total else {UNKNOWN}

    def member(value):
        if value is None or value[0] != "load":
            return None
        base, offset = split(value[1])
        return offset if request(base) is not None else None

    for call in function.calls:
        if call.name == META + "18getSegmentDescByIDEmb":
            # The segment 0 is the local one.
            if call.args[2] != ("const", 0):
                target.add(member(call.args[2]))
        if call.name.startswith(EFA + "12selectDeviceE"):
            chosen.add((member(call.args[1]), member(call.args[2])))
    # MultiTransport asks for the segment too: the result, this, request.
    for other in elf.find(MULTI + "15selectTransportERKNS_9Transport15TransferRequestE"):
        for call in other.calls:
            if call.name.startswith(META + "18getSegmentDescByIDE") and call.args[2] is not None and call.args[2][0] == "load":
                where, offset = split(call.args[2][1])
                target.add(offset if where == ("arg", 2) else UNKNOWN)
    facts["TransferTask.request"] = only(touched)
    facts["TransferRequest.fields_read"] = ",".join(f"{offset}:{size}" for offset, size in sorted(fields)) or UNKNOWN
    facts["TransferTask.total_bytes"] = only(total)
    facts["TransferRequest.target_id"] = only(target)
    pairs = {x for x in chosen if None not in x}
    if len(pairs) == 1:
        facts["TransferRequest.source"], facts["TransferRequest.length"] = pairs.pop()


def request(elf, facts):
    found = set()
    for function in elf.find(MULTI + "14submitTransferEm"):
        for argument in (2, 3):  # whether or not the result is in memory
            found |= strides(function, ("arg", argument))
    facts["TransferRequest.size"] = only(found)


def base(elf, facts):
    """Transport::install: this, name, metadata, topology."""
    server, metadata = set(), set()
    function = elf.function(BASE_INSTALL)
    if function is not None:
        for store in function.stores:
            where, offset = split(store.where)
            if where == ("arg", 0) and store.value == ("load", ("arg", 2), 8):
                metadata.add(offset)
        for compare in function.compares:
            for a, b in ((compare.left, compare.right), (compare.right, compare.left)):
                where, offset = split(a)
                if where == ("arg", 0) and b == ("arg", 1):
                    server.add(offset)
        for call in function.calls:
            where, offset = split(call.args[0])
            if "basic_string" in call.name and "_M_assign" in call.name and where == ("arg", 0) and call.args[1] == ("arg", 1):
                server.add(offset)
    facts["Transport.local_server_name_"] = only(server)
    facts["Transport.metadata_"] = only(metadata)
    # registerLocalMemoryBatch divides the vector's length.
    function = elf.function(REGISTER_BATCH)
    facts["BufferEntry.size"] = only(strides(function, ("arg", 1))) if function else UNKNOWN


# Fields, and their keys in JSON.
HANDSHAKE = ["payload", "local_nic_path", "local_lid", "local_gid", "peer_nic_path", "qp_num", "ready_ack", "reply_msg", "efa_addr"]


def handshake(elf, facts):
    """encode(desc) makes a Json::Value of a field, then asks for the key it goes under."""
    at_key = {}
    highest, booleans = 0, set()
    functions = elf.find("_ZN8mooncake21TransferHandshakeUtil6encodeERKNS_16TransferMetadata13HandShakeDescE")
    for function in functions:
        events = []
        for load in function.loads:
            where, offset = split(load.where)
            if where == ("arg", 1):
                events.append((function.turn[load.at], 0, offset, load.size))
        for call in function.calls:
            where, offset = split(call.args[1])
            if call.name.startswith("_ZN4Json5ValueC1ERKNSt7__cxx1112basic_string") and where == ("arg", 1):
                events.append((function.turn[call.at], 0, offset, 32))
            if call.name == "_ZN4Json5ValueC1Eb" and call.args[1] is not None and call.args[1][0] == "load":
                where, offset = split(call.args[1][1])
                if where == ("arg", 1):
                    booleans.add(offset)
            key = call.args[1]
            if call.name == "_ZN4Json5ValueixEPKc" and (key is None or key[0] != "const"):
                at_key[None] = []
            elif call.name == "_ZN4Json5ValueixEPKc":
                events.append((function.turn[call.at], 1, elf.string(key[1]), 0))
        events.sort(key=lambda event: event[:2])
        pending = []
        for _, kind, what, size in events:
            if kind == 0:
                pending.append((what, size))
                highest = max(highest, what + size)
            else:
                at_key.setdefault(what, []).append(list(pending))
                pending = []
    for key in HANDSHAKE:
        found = set()
        for pending in at_key.get(key, []):
            if key == "qp_num" and len(pending) >= 2:
                # begin and end of the vector
                offsets = sorted({o for o, size in pending if size == 8})
                if len(offsets) == 2 and offsets[1] == offsets[0] + 8:
                    found.add(offsets[0])
            elif key == "ready_ack":
                # The byte that is converted; another may say whether it is to be sent.
                found |= {offset for offset, size in pending if size == 1 and offset in booleans}
            elif len(pending) == 1:
                found.add(pending[0][0])
        facts["HandShakeDesc." + key] = only(found)
        if functions and at_key and key not in at_key and None not in at_key:
            facts["HandShakeDesc." + key] = "none"
    extra = sorted(key or UNKNOWN for key in at_key if key not in HANDSHAKE)
    facts["HandShakeDesc.other_keys"] = ",".join(extra) or "none"

    # Two functions of the transport's own say the same of three of them.
    check = {"local_nic_path": set(), "peer_nic_path": set(), "efa_addr": set()}
    function = elf.function(ON_SETUP)
    if function:
        for call in function.calls:
            where, offset = split(call.args[2])
            if call.name.startswith("_ZN8mooncake10EfaContext8endpointE") and where == ("arg", 1):
                check["local_nic_path"].add(offset)
        begin = {split(x.where)[1] for x in function.loads if split(x.where)[0] == ("arg", 1) and x.size == 8}
        for offset in begin:
            if offset + 8 in begin and offset == facts["HandShakeDesc.peer_nic_path"]:
                check["peer_nic_path"].add(offset)
    for function in elf.find("_ZN8mooncake11EfaEndPoint25setupConnectionsByPassiveE"):
        for call in function.calls:
            where, offset = split(call.args[1])
            if call.name.startswith("_ZN8mooncake10EfaContext14insertPeerAddrE") and where == ("arg", 1):
                check["efa_addr"].add(offset)
    for name, found in check.items():
        if only(found) != facts["HandShakeDesc." + name]:
            facts["HandShakeDesc." + name] = UNKNOWN

    # The size: no less than the end of the last field, no more than the distance of two on the stack.
    distance = set()
    for function in elf.find("_ZN8mooncake11EfaEndPoint24setupConnectionsByActiveEv"):
        for call in function.calls:
            if call.name.startswith(META + "13sendHandshakeE"):
                a, b = split(call.args[2]), split(call.args[3])
                if a[0] == b[0] == ("sp",):
                    distance.add(abs(a[1] - b[1]))
    room = only(distance)
    highest = (highest + 7) // 8 * 8
    # Objects on the stack are at multiples of 16, so that up to 8 bytes may be padding.
    facts["HandShakeDesc.size"] = highest if functions and room != UNKNOWN and highest <= room <= highest + 8 else UNKNOWN


def survey(path, json_symbols):
    """build id, facts"""
    elf = Elf(path)
    facts = {}
    missing = [name for name in USED if name not in elf.symbols]
    if json_symbols is None:
        missing.append("libjsoncpp")
    else:
        missing += [name for name in USED_JSON if name not in json_symbols]
    flags = re.findall(r"\((?:FLAGS|FLAGS_1|SYMBOLIC)\).*", run("readelf", "-dW", path))
    facts["bound_to_itself"] = "yes" if any("SYMBOLIC" in flag for flag in flags) else "no"
    facts["symbols"] = "missing " + ",".join(missing) if missing else "all"
    for question in (vtable, sizes, status, submission, request, base, handshake):
        question(elf, facts)
    return elf.build_id, facts


def text(facts):
    def natural(item):
        return [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", item[0])]

    return "".join(f"{key} {value}\n" for key, value in sorted(facts.items(), key=natural))


def layouts():
    """Name -> facts, as in layouts.txt."""
    out, name = {}, None
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "layouts.txt"), encoding="ascii") as file:
        for line in file.read().splitlines():
            if line.startswith("["):
                name = line.strip("[]")
                out[name] = ""
            elif line and not line.startswith("#"):
                out[name] += line + "\n"
    return out


def name_of(facts, known):
    if any(value == UNKNOWN for value in facts.values()) or facts["symbols"] != "all" or facts["bound_to_itself"] != "no":
        prefix = "UNKNOWN-"
    else:
        for name, expected in known.items():
            if expected == text(facts):
                return name
        prefix = "UNNAMED-"
    return prefix + hashlib.sha256(text(facts).encode()).hexdigest()[:8]


def wheel(path):
    """[(build id, facts, what)]"""
    part = os.path.basename(path).split("-")
    what = f"{part[0].replace('_', '-')} {part[1]} {part[2]}"
    out = []
    with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as directory:
        names = archive.namelist()
        json_symbols = None
        for member in names:
            if re.search(r"/libjsoncpp[^/]*\.so[^/]*$", member):
                json_symbols = Elf(archive.extract(member, directory)).symbols
        for module in ("engine.so", "store.so"):
            if "mooncake/" + module not in names:
                print(f"{os.path.basename(path)}: no {module}", file=sys.stderr)
                continue
            build_id, facts = survey(archive.extract("mooncake/" + module, directory), json_symbols)
            if build_id is None:
                print(f"{os.path.basename(path)}: {module} has no build id", file=sys.stderr)
                continue
            out.append((build_id, facts, f"{what} {module}"))
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", metavar="FILE", help="merge the lines into this file instead of printing them")
    parser.add_argument("--facts", action="store_true", help="print each host's facts instead")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="wheels at a time")
    parser.add_argument("wheels", nargs="+", metavar="WHEEL")
    options = parser.parse_args()

    rows, unnamed, known = set(), {}, layouts()
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        for hosts in pool.map(wheel, options.wheels):
            for build_id, facts, what in hosts:
                layout = name_of(facts, known)
                if options.facts:
                    print(f"[{layout}]\n# {what} {build_id}\n{text(facts)}")
                    continue
                if layout not in known:
                    unnamed.setdefault(layout, (what, facts))
                    if options.table:
                        print(f"left out: {layout} {what}", file=sys.stderr)
                        continue
                rows.add((build_id, layout, what))
    if options.facts:
        return 0
    for layout, (what, facts) in unnamed.items():
        print(f"[{layout}]\n# first in {what}\n{text(facts)}", file=sys.stderr)
    if options.table:
        with open(options.table, encoding="ascii") as file:
            lines = file.read().splitlines()
        header = [line for line in lines if line.startswith("#")]
        new = {what for _, _, what in rows}
        rows |= {row for row in (tuple(line.split("\t")) for line in lines if line and not line.startswith("#")) if row[2] not in new}
        with open(options.table, "w", encoding="ascii") as file:
            file.write("".join(line + "\n" for line in header + ["\t".join(row) for row in sorted(rows)]))
    else:
        for row in sorted(rows):
            print("\t".join(row))
    return 1 if unnamed else 0


if __name__ == "__main__":
    sys.exit(main())
