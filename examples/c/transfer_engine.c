/* Mooncake's C interface: from nothing to a verified transfer, both ends in one program.
 * cc transfer_engine.c -ltransfer_engine && ./a.out          on hosts with EFA
 * ./a.out tcp                                                elsewhere
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <transfer_engine_c.h>

#define CHECK(what) do { if (!(what)) { fprintf(stderr, "failed: %s\n", #what); return 1; } } while (0)

static char memory[2][1 << 20];

int main(int argc, char **argv) {
    const char *protocol = argc > 1 ? argv[1] : "efa";
    transfer_engine_t engines[2];
    for (int i = 0; i < 2; ++i) {
        CHECK(engines[i] = createTransferEngine("P2PHANDSHAKE", "127.0.0.1", "", 0, 0));
        CHECK(strcmp(protocol, "efa") != 0 || discoverTopology(engines[i]) == 0);
        CHECK(installTransport(engines[i], protocol, NULL));
        CHECK(registerLocalMemory(engines[i], memory[i], sizeof memory[i], "*", 1) == 0);
    }
    memset(memory[0], 'x', sizeof memory[0]);

    char peer[256];
    CHECK(getLocalIpAndPort(engines[1], peer, sizeof peer) == 0);
    segment_id_t segment = openSegment(engines[0], peer);
    CHECK(segment >= 0);
    batch_id_t batch = allocateBatchID(engines[0], 1);
    transfer_request_t request = {OPCODE_WRITE, memory[0], segment, (uintptr_t)memory[1], sizeof memory[0]};
    CHECK(submitTransfer(engines[0], batch, &request, 1) == 0);
    transfer_status_t status;
    do CHECK(getTransferStatus(engines[0], batch, 0, &status) == 0);
    while (status.status == STATUS_WAITING);
    CHECK(status.status == STATUS_COMPLETED && memcmp(memory[0], memory[1], sizeof memory[0]) == 0);
    printf("%llu bytes moved and verified\n", (unsigned long long)status.transferred_bytes);
    freeBatchID(engines[0], batch);
    for (int i = 0; i < 2; ++i) destroyTransferEngine(engines[i]);
    return 0;
}
