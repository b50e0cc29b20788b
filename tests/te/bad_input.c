/* SPDX-License-Identifier: Apache-2.0
 *
 * bad_input [PROTOCOL]: every function of transfer_engine_c.h with every kind of bad argument. Each refuses it with its
 * error, changes nothing, and nothing crashes. */
#include <transfer_engine_c.h>

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MIB ((size_t)1 << 20)

static int complaints;

#define IS(wanted, call) \
    do { \
        long long got_ = (long long)(call); \
        if (got_ != (long long)(wanted)) { \
            fprintf(stderr, "%s:%d: %s gives %lld, not %s\n", __FILE__, __LINE__, #call, got_, #wanted); \
            complaints++; \
        } \
    } while (0)
#define NONE(call) IS(1, (call) == NULL)

static char text[256];
static const char *no_text[] = {"\xff\xfe", "\xc3"};

/* Everything, on what is no engine. */
static void on_no_engine(transfer_engine_t engine) {
    char memory[16];
    void *addresses[] = {memory};
    buffer_entry_t entry = {memory, sizeof memory};
    transfer_request_t request = {OPCODE_READ, memory, 0, (uintptr_t)memory, 1};
    transfer_status_t status = {77, 77};
    notify_msg_t message = {text, text};
    nic_load_stat_t load;
    size_t count = 1;
    int size = 77;
    IS(-1, discoverTopology(engine));
    IS(-1, getLocalIpAndPort(engine, text, sizeof text));
    NONE(installTransport(engine, "tcp", NULL));
    IS(-1, uninstallTransport(engine, "tcp"));
    IS(-1, openSegment(engine, "127.0.0.1:1"));
    IS(-1, openSegmentNoCache(engine, "127.0.0.1:1"));
    IS(-1, closeSegment(engine, 0));
    IS(-1, removeLocalSegment(engine, "127.0.0.1:1"));
    IS(-1, warmupEfaSegment(engine, "127.0.0.1:1"));
    IS(-1, syncSegmentCache(engine));
    IS(-1, registerLocalMemory(engine, memory, sizeof memory, "*", 1));
    IS(-1, unregisterLocalMemory(engine, memory));
    IS(-1, registerLocalMemoryBatch(engine, &entry, 1, "*"));
    IS(-1, unregisterLocalMemoryBatch(engine, addresses, 1));
    IS(INVALID_BATCH, allocateBatchID(engine, 1));
    IS(1, submitTransfer(engine, 1, &request, 1));
    IS(1, submitTransferWithNotify(engine, 1, &request, 1, message));
    IS(1, getTransferStatus(engine, 1, 0, &status));
    IS(77, status.status);
    IS(1, freeBatchID(engine, 1));
    NONE(getNotifsFromEngine(engine, &size));
    IS(0, size);
    IS(-1, genNotifyInEngine(engine, 0, message));
    IS(-1, getNicLoadStats(engine, &load, &count));
    IS(-1, showLinks(engine, text, sizeof text, 0));
    enableGracefulShutdown(engine);
    destroyTransferEngine(engine);
}

static void creation(void) {
    NONE(createTransferEngine(NULL, "127.0.0.1", "", 0, 0));
    NONE(createTransferEngine("P2PHANDSHAKE", NULL, "", 0, 0));
    for (size_t i = 0; i < 2; i++) {
        NONE(createTransferEngine("P2PHANDSHAKE", no_text[i], "", 0, 0));
        NONE(createTransferEngine(no_text[i], "127.0.0.1", "", 0, 0));
    }
    NONE(createTransferEngine("gopher://127.0.0.1:70", "127.0.0.1", "", 0, 0));
    NONE(createTransferEngine("http://", "127.0.0.1", "", 0, 0));
    NONE(createTransferEngine("http://127.0.0.1:1/metadata", "127.0.0.1", "", 0, 0)); /* nobody is there */
    NONE(createTransferEngine("etcd://127.0.0.1:1", "127.0.0.1", "", 0, 0));
    NONE(createTransferEngine("redis://127.0.0.1:1", "127.0.0.1", "", 0, 0));
    NONE(createTransferEngine("", "127.0.0.1", "", 0, 0));
}

static void transports(transfer_engine_t engine, const char *protocol) {
    void *args[2] = {NULL, NULL};
    NONE(installTransport(engine, NULL, NULL));
    NONE(installTransport(engine, "", NULL));
    NONE(installTransport(engine, "rdma", NULL));
    NONE(installTransport(engine, no_text[0], NULL));
    const char *matrices[] = {"", "{", "[]", "{\"cpu:0\": 1}", "{\"cpu:0\": [[\"no such NIC\"], []]}", "{}", no_text[1]};
    for (size_t i = 0; i < sizeof matrices / sizeof matrices[0]; i++) {
        args[0] = (void *)(uintptr_t)matrices[i];
        NONE(installTransport(engine, "efa", args));
    }
    IS(-1, uninstallTransport(engine, NULL));
    /* Nothing is installed, and everything that needs a transport says so. */
    transfer_request_t request = {OPCODE_READ, text, 0, (uintptr_t)text, 1};
    IS(INVALID_BATCH, allocateBatchID(engine, 1));
    IS(1, submitTransfer(engine, 1, &request, 1));
    IS(0, warmupEfaSegment(engine, "127.0.0.1:1"));
    args[0] = NULL;
    IS(0, installTransport(engine, protocol, args) == NULL);
    NONE(installTransport(engine, strcmp(protocol, "tcp") == 0 ? "efa" : "tcp", NULL)); /* an engine has one */
    IS(0, installTransport(engine, protocol, NULL) == NULL);
}

static void memory(transfer_engine_t engine, char *base) {
    void *addresses[] = {base, base + MIB};
    buffer_entry_t entries[] = {{base, MIB}, {base + MIB, 0}};
    IS(-1, registerLocalMemory(engine, NULL, MIB, "*", 1));
    IS(-1, registerLocalMemory(engine, base, 0, "*", 1));
    IS(-1, registerLocalMemory(engine, base, SIZE_MAX, "*", 1));
    IS(-1, registerLocalMemory(engine, base, MIB, no_text[0], 1));
    IS(-1, registerLocalMemory(engine, base, MIB, "two\nlines", 1));
    IS(-1, registerLocalMemoryBatch(engine, NULL, 1, "*"));
    IS(0, registerLocalMemoryBatch(engine, NULL, 0, "*"));
    IS(-1, registerLocalMemoryBatch(engine, entries, SIZE_MAX / 8, "*"));
    IS(-1, registerLocalMemoryBatch(engine, entries, 2, "*")); /* one is empty: none is registered */
    IS(-3, unregisterLocalMemory(engine, base));
    entries[1] = (buffer_entry_t){base + MIB - 1, MIB};
    IS(-7, registerLocalMemoryBatch(engine, entries, 2, "*")); /* they overlap */
    IS(-3, unregisterLocalMemory(engine, base));
    IS(-3, unregisterLocalMemory(engine, NULL));
    IS(-1, unregisterLocalMemoryBatch(engine, NULL, 1));
    IS(0, unregisterLocalMemoryBatch(engine, NULL, 0));
    IS(0, registerLocalMemory(engine, base, MIB, NULL, 0));
    IS(-7, registerLocalMemory(engine, base, MIB, "*", 1));
    IS(-3, unregisterLocalMemory(engine, base + 1));
    IS(-3, unregisterLocalMemoryBatch(engine, addresses, 2)); /* the first was, and is not any more */
    IS(-3, unregisterLocalMemory(engine, base));
    /* Not ours to read: the provider says no, or nobody ever looks at it. */
    void *guard = mmap(NULL, MIB, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (registerLocalMemory(engine, guard, MIB, "*", 1) == 0) IS(0, unregisterLocalMemory(engine, guard));
    munmap(guard, MIB);
}

static void segments(transfer_engine_t engine) {
    const char *names[] = {"", "/", "///", "127.0.0.1:1", "no.such.host.invalid:1", "[::1", "a\nb", no_text[0]};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        IS(-1, openSegment(engine, names[i]));
        IS(-1, openSegmentNoCache(engine, names[i]));
    }
    IS(-1, openSegment(engine, NULL));
    IS(-1, openSegmentNoCache(engine, NULL));
    IS(0, warmupEfaSegment(engine, NULL));
    IS(0, warmupEfaSegment(engine, "") != 0);
    IS(1, warmupEfaSegment(engine, "127.0.0.1:1") < 0);
    const segment_id_t handles[] = {1, -1, 77, INT32_MAX, INT32_MIN};
    for (size_t i = 0; i < sizeof handles / sizeof handles[0]; i++) IS(-1, closeSegment(engine, handles[i]));
    IS(0, closeSegment(engine, LOCAL_SEGMENT));
    IS(-1, removeLocalSegment(engine, NULL));
    IS(-1, removeLocalSegment(engine, ""));
    IS(0, removeLocalSegment(engine, "never opened"));
    IS(0, removeLocalSegment(engine, text));
}

static int ended(transfer_engine_t engine, batch_id_t batch, size_t task) {
    transfer_status_t status;
    do
        if (getTransferStatus(engine, batch, task, &status) != 0) return -1;
    while (status.status == STATUS_WAITING);
    return status.status;
}

static void batches(transfer_engine_t engine, transfer_engine_t other, char *base) {
    IS(0, registerLocalMemory(engine, base, 2 * MIB, "*", 1));
    transfer_request_t good = {OPCODE_WRITE, base, LOCAL_SEGMENT, (uintptr_t)base + MIB, 64};
    transfer_request_t requests[3] = {good, good, good};
    transfer_status_t status = {77, 77};
    const size_t sizes[] = {0, (size_t)1 << 31, SIZE_MAX};
    for (size_t i = 0; i < 3; i++) IS(INVALID_BATCH, allocateBatchID(engine, sizes[i]));

    /* What is no batch: NULL, pointers, another engine's, a freed one. */
    const batch_id_t freed = allocateBatchID(engine, 1);
    IS(0, freeBatchID(engine, freed));
    const batch_id_t foreign = allocateBatchID(other, 1);
    const batch_id_t none[] = {0, INVALID_BATCH, (uintptr_t)base, (uintptr_t)&good, 1, freed, foreign};
    for (size_t i = 0; i < sizeof none / sizeof none[0]; i++) {
        IS(1, submitTransfer(engine, none[i], &good, 1));
        IS(1, getTransferStatus(engine, none[i], 0, &status));
        IS(1, freeBatchID(engine, none[i]));
    }
    IS(0, freeBatchID(other, foreign));

    const batch_id_t batch = allocateBatchID(engine, 2);
    IS(1, submitTransfer(engine, batch, NULL, 1));
    IS(0, submitTransfer(engine, batch, NULL, 0));
    IS(2, submitTransfer(engine, batch, requests, 3));
    IS(1, submitTransfer(engine, batch, requests, SIZE_MAX / 16));
    /* One bad request among good ones: none is started. */
    requests[1].opcode = 2;
    IS(1, submitTransfer(engine, batch, requests, 2));
    requests[1] = good;
    requests[1].source = NULL;
    IS(3, submitTransfer(engine, batch, requests, 2));
    requests[1].source = base + 2 * MIB - 63;
    IS(3, submitTransfer(engine, batch, requests, 2));
    requests[1] = good;
    requests[1].target_id = 5;
    IS(1, submitTransfer(engine, batch, requests, 2));
    requests[1].target_id = -1;
    IS(1, submitTransfer(engine, batch, requests, 2));
    requests[1] = good;
    requests[1].target_offset = 0;
    IS(3, submitTransfer(engine, batch, requests, 2));
    requests[1].target_offset = UINT64_MAX;
    IS(1, submitTransfer(engine, batch, requests, 2));
    requests[1] = good;
    requests[1].length = UINT64_MAX;
    IS(1, submitTransfer(engine, batch, requests, 2));
    IS(1, getTransferStatus(engine, batch, 0, &status)); /* nothing was */
    IS(77, status.status);

    IS(0, submitTransfer(engine, batch, &good, 1));
    IS(1, getTransferStatus(engine, batch, 0, NULL));
    IS(1, getTransferStatus(engine, batch, 1, &status));
    IS(1, getTransferStatus(engine, batch, SIZE_MAX, &status));
    IS(STATUS_COMPLETED, ended(engine, batch, 0));
    notify_msg_t messages[] = {{NULL, text}, {text, NULL}, {text, (char *)(uintptr_t)no_text[0]}};
    for (size_t i = 0; i < 3; i++) {
        IS(1, submitTransferWithNotify(engine, batch, &good, 1, messages[i]));
        IS(-1, genNotifyInEngine(engine, LOCAL_SEGMENT, messages[i]));
    }
    IS(-1, genNotifyInEngine(engine, 5, (notify_msg_t){text, text}));
    IS(-1, genNotifyInEngine(engine, UINT64_MAX, (notify_msg_t){text, text}));
    IS(0, freeBatchID(engine, batch));
    IS(1, freeBatchID(engine, batch));
    IS(0, unregisterLocalMemory(engine, base));
}

static void outputs(transfer_engine_t engine) {
    nic_load_stat_t load;
    size_t count = 1;
    IS(-1, getLocalIpAndPort(engine, NULL, 10));
    IS(-1, getLocalIpAndPort(engine, text, 0));
    IS(-1, showLinks(engine, NULL, 10, 1));
    IS(-1, showLinks(engine, text, 0, 1));
    text[1] = 'x';
    IS(0, showLinks(engine, text, 1, 1));
    IS(0, text[0]);
    IS('x', text[1]);
    IS(-1, getNicLoadStats(engine, NULL, &count));
    IS(-1, getNicLoadStats(engine, &load, NULL));
    IS(1, count);
    NONE(getNotifsFromEngine(engine, NULL));
    IS(0, freeNotifsMsgBuf(NULL, 0));
    IS(0, freeNotifsMsgBuf(NULL, 5));
    IS(-1, freeNotifsMsgBuf((notify_msg_t *)text, -1));
}

static void *uses_it(void *engine) {
    for (int i = 0; i < 50; i++) on_no_engine(engine);
    return NULL;
}

int main(int argc, char **argv) {
    alarm(120);
    const char *protocol = argc > 1 ? argv[1] : "tcp";
    char *base = mmap(NULL, 2 * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    on_no_engine(NULL);
    on_no_engine((transfer_engine_t)&complaints);
    on_no_engine((transfer_engine_t)1);
    creation();
    transfer_engine_t engine = createTransferEngine("P2PHANDSHAKE", "127.0.0.1:1", NULL, UINT64_MAX, 0);
    transfer_engine_t other = createTransferEngine("P2PHANDSHAKE", "127.0.0.1:1", NULL, 0, 0);
    if (engine == NULL || other == NULL) return fprintf(stderr, "no engine\n"), 1;
    if (strcmp(protocol, "efa") == 0) IS(0, discoverTopology(engine) | discoverTopology(other));
    transports(engine, protocol);
    IS(0, installTransport(other, protocol, NULL) == NULL);
    memory(engine, base);
    IS(0, getLocalIpAndPort(engine, text, sizeof text));
    segments(engine);
    batches(engine, other, base);
    outputs(engine);
    destroyTransferEngine(engine);
    destroyTransferEngine(other);
    destroyTransferEngine(engine);
    on_no_engine(engine);
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) pthread_create(&threads[i], NULL, uses_it, engine);
    for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);
    if (complaints > 0) fprintf(stderr, "%d complaints\n", complaints);
    return complaints > 0;
}
