// Mooncake's C interface from Go. The compiler is told where header and library are:
//
//	CGO_CFLAGS=-I/usr/local/include CGO_LDFLAGS=-L/usr/local/lib go run transfer_engine.go [PROTOCOL]
//
// Memory that peers write to must not be Go's: its garbage collector does not know of them.
package main

// #cgo LDFLAGS: -ltransfer_engine
// #include <stdlib.h>
// #include <string.h>
// #include <transfer_engine_c.h>
import "C"

import (
	"errors"
	"fmt"
	"os"
	"unsafe"
)

const size = 1 << 20

func newEngine(protocol string, memory unsafe.Pointer) (C.transfer_engine_t, error) {
	texts := []string{"P2PHANDSHAKE", "127.0.0.1", protocol, "*"}
	var c [4]*C.char
	for i, text := range texts {
		c[i] = C.CString(text)
		defer C.free(unsafe.Pointer(c[i]))
	}
	engine := C.createTransferEngine(c[0], c[1], c[1], 0, 0)
	if engine == nil {
		return nil, errors.New("createTransferEngine failed; the log says why")
	}
	if protocol == "efa" && C.discoverTopology(engine) != 0 ||
		C.installTransport(engine, c[2], nil) == nil ||
		C.registerLocalMemory(engine, memory, size, c[3], 1) != 0 {
		C.destroyTransferEngine(engine)
		return nil, errors.New("an engine is not ready; the log says why")
	}
	return engine, nil
}

func run(protocol string) error {
	var memory [2]unsafe.Pointer
	var engines [2]C.transfer_engine_t
	for i := range engines {
		memory[i] = C.calloc(1, size)
		defer C.free(memory[i])
		engine, err := newEngine(protocol, memory[i])
		if err != nil {
			return err
		}
		defer C.destroyTransferEngine(engine)
		engines[i] = engine
	}
	C.memset(memory[0], 'x', size)

	var name [256]C.char
	if C.getLocalIpAndPort(engines[1], &name[0], C.size_t(len(name))) != 0 {
		return errors.New("getLocalIpAndPort")
	}
	segment := C.openSegment(engines[0], &name[0])
	batch := C.allocateBatchID(engines[0], 1)
	request := C.transfer_request_t{opcode: C.OPCODE_WRITE, source: memory[0], target_id: segment,
		target_offset: C.uint64_t(uintptr(memory[1])), length: size}
	if segment < 0 || C.submitTransfer(engines[0], batch, &request, 1) != 0 {
		return errors.New("the transfer was refused; the log says why")
	}
	var status C.transfer_status_t
	for status.status == C.STATUS_WAITING {
		if C.getTransferStatus(engines[0], batch, 0, &status) != 0 {
			return errors.New("getTransferStatus")
		}
	}
	C.freeBatchID(engines[0], batch)
	if status.status != C.STATUS_COMPLETED || C.memcmp(memory[0], memory[1], size) != 0 {
		return fmt.Errorf("status %d", status.status)
	}
	fmt.Printf("%d bytes moved and verified\n", uint64(status.transferred_bytes))
	return nil
}

func main() {
	protocol := "efa"
	if len(os.Args) > 1 {
		protocol = os.Args[1]
	}
	if err := run(protocol); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
