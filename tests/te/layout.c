/* SPDX-License-Identifier: Apache-2.0
 *
 * The binary interface of Mooncake's transfer_engine_c.h (main at 3b5a594, read on 64-bit Linux): layouts, numbers, names.
 * They are Mooncake's, so they never change here. */
#include "../c/frozen.h"

#include <transfer_engine_c.h>

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

FIELD(transfer_request_t, opcode, 0);
FIELD(transfer_request_t, source, 8);
FIELD(transfer_request_t, target_id, 16);
FIELD(transfer_request_t, target_offset, 24);
FIELD(transfer_request_t, length, 32);
SIZE(transfer_request_t, 40);
SIZE(struct transfer_request, 40);

FIELD(notify_msg_t, name, 0);
FIELD(notify_msg_t, msg, 8);
SIZE(struct notify_msg, 16);

FIELD(transfer_status_t, status, 0);
FIELD(transfer_status_t, transferred_bytes, 8);
SIZE(struct transfer_status, 16);

FIELD(segment_desc_t, type, 0);
FIELD(segment_desc_t, desc_, 8);
FIELD(segment_desc_t, desc_.rdma.location, 24);
FIELD(segment_desc_t, desc_.nvmeof.port, 40);
SIZE(struct segment_desc, 48);

FIELD(buffer_entry_t, addr, 0);
FIELD(buffer_entry_t, length, 8);
SIZE(struct buffer_entry, 16);

FIELD(nic_load_stat_t, device_name, 0);
FIELD(nic_load_stat_t, inflight_bytes, 64);
FIELD(nic_load_stat_t, ewma_bandwidth_bps, 72);
SIZE(struct nic_load_stat, 80);

SIZE(segment_handle_t, 4);
SIZE(segment_id_t, 4);
SIZE(batch_id_t, 8);
SIZE(transfer_engine_t, 8);
SIZE(transport_t, 8);
_Static_assert((segment_id_t)-1 < 0, "segment_id_t has a sign");

NUMBER(LOCAL_SEGMENT, 0);
NUMBER(INVALID_BATCH, UINT64_MAX);
NUMBER(OPCODE_READ, 0);
NUMBER(OPCODE_WRITE, 1);
NUMBER(STATUS_WAITING, 0);
NUMBER(STATUS_PENDING, 1);
NUMBER(STATUS_INVALID, 2);
NUMBER(STATUS_CANCELED, 3);
NUMBER(STATUS_COMPLETED, 4);
NUMBER(STATUS_TIMEOUT, 5);
NUMBER(STATUS_FAILED, 6);

/* Each with its type: what the header declares must be this. */
#define FUNCTION(result, name, ...) static result (*const check_##name)(__VA_ARGS__) = name
FUNCTION(transfer_engine_t, createTransferEngine, const char *, const char *, const char *, uint64_t, int);
FUNCTION(int, discoverTopology, transfer_engine_t);
FUNCTION(int, getLocalIpAndPort, transfer_engine_t, char *, size_t);
FUNCTION(transport_t, installTransport, transfer_engine_t, const char *, void **);
FUNCTION(int, uninstallTransport, transfer_engine_t, const char *);
FUNCTION(int32_t, openSegment, transfer_engine_t, const char *);
FUNCTION(int32_t, openSegmentNoCache, transfer_engine_t, const char *);
FUNCTION(int, closeSegment, transfer_engine_t, int32_t);
FUNCTION(int, warmupEfaSegment, transfer_engine_t, const char *);
FUNCTION(int, removeLocalSegment, transfer_engine_t, const char *);
FUNCTION(void, destroyTransferEngine, transfer_engine_t);
FUNCTION(int, registerLocalMemory, transfer_engine_t, void *, size_t, const char *, int);
FUNCTION(int, unregisterLocalMemory, transfer_engine_t, void *);
FUNCTION(int, registerLocalMemoryBatch, transfer_engine_t, buffer_entry_t *, size_t, const char *);
FUNCTION(int, unregisterLocalMemoryBatch, transfer_engine_t, void **, size_t);
FUNCTION(uint64_t, allocateBatchID, transfer_engine_t, size_t);
FUNCTION(int, submitTransfer, transfer_engine_t, uint64_t, struct transfer_request *, size_t);
FUNCTION(int, submitTransferWithNotify, transfer_engine_t, uint64_t, struct transfer_request *, size_t, notify_msg_t);
FUNCTION(notify_msg_t *, getNotifsFromEngine, transfer_engine_t, int *);
FUNCTION(int, freeNotifsMsgBuf, notify_msg_t *, int);
FUNCTION(int, genNotifyInEngine, transfer_engine_t, uint64_t, notify_msg_t);
FUNCTION(int, getTransferStatus, transfer_engine_t, uint64_t, size_t, struct transfer_status *);
FUNCTION(int, freeBatchID, transfer_engine_t, uint64_t);
FUNCTION(int, syncSegmentCache, transfer_engine_t);
FUNCTION(int, getNicLoadStats, transfer_engine_t, nic_load_stat_t *, size_t *);
FUNCTION(void, enableGracefulShutdown, transfer_engine_t);
FUNCTION(int, showLinks, transfer_engine_t, char *, size_t, int);

#define NAMED(name) {#name, (const void *)&check_##name}
static const struct {
    const char *name;
    const void *function; /* where its address is */
} functions[] = {
    NAMED(createTransferEngine), NAMED(discoverTopology), NAMED(getLocalIpAndPort), NAMED(installTransport),
    NAMED(uninstallTransport), NAMED(openSegment), NAMED(openSegmentNoCache), NAMED(closeSegment),
    NAMED(warmupEfaSegment), NAMED(removeLocalSegment), NAMED(destroyTransferEngine), NAMED(registerLocalMemory),
    NAMED(unregisterLocalMemory), NAMED(registerLocalMemoryBatch), NAMED(unregisterLocalMemoryBatch),
    NAMED(allocateBatchID), NAMED(submitTransfer), NAMED(submitTransferWithNotify), NAMED(getNotifsFromEngine),
    NAMED(freeNotifsMsgBuf), NAMED(genNotifyInEngine), NAMED(getTransferStatus), NAMED(freeBatchID),
    NAMED(syncSegmentCache), NAMED(getNicLoadStats), NAMED(enableGracefulShutdown), NAMED(showLinks),
};
_Static_assert(sizeof functions / sizeof functions[0] == 27, "Mooncake's functions");

/* By dlopen, as programs that load it at run time do. */
int main(void) {
    void *library = dlopen("libtransfer_engine.so", RTLD_NOW);
    if (library == NULL) return fprintf(stderr, "%s\n", dlerror()), 1;
    int bad = 0;
    for (size_t i = 0; i < sizeof functions / sizeof functions[0]; i++) {
        void *found = dlsym(library, functions[i].name);
        if (found == NULL || memcmp(&found, functions[i].function, sizeof found) != 0)
            bad += fprintf(stderr, "%s is not what the library has under that name\n", functions[i].name) > 0;
    }
    return bad != 0;
}
