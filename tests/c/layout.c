/* SPDX-License-Identifier: Apache-2.0
 *
 * The binary interface, frozen: these numbers may be added to, never changed. */
#include "check.h"
#include "frozen.h"

#include <ctype.h>
#include <dlfcn.h>

FIELD(mefa_config, size, 0);
FIELD(mefa_config, server_name, 8);
FIELD(mefa_config, topology_json, 16);
FIELD(mefa_config, provider, 24);
FIELD(mefa_config, devices, 32);
FIELD(mefa_config, device_count, 40);
FIELD(mefa_config, fetch_segment, 48);
FIELD(mefa_config, handshake, 56);
FIELD(mefa_config, on_completion, 64);
FIELD(mefa_config, context, 72);
SIZE(mefa_config, 80);

FIELD(mefa_handshake, size, 0);
FIELD(mefa_handshake, local_nic_path, 8);
FIELD(mefa_handshake, peer_nic_path, 16);
FIELD(mefa_handshake, efa_addr, 24);
FIELD(mefa_handshake, reply_msg, 32);
FIELD(mefa_completion, cookie, 0);
FIELD(mefa_completion, bytes, 8);
FIELD(mefa_completion, status, 16);
FIELD(mefa_completion, reserved, 20);
SIZE(mefa_completion, 24);

FIELD(mefa_region, address, 0);
FIELD(mefa_region, length, 8);
FIELD(mefa_region, keys, 16);
FIELD(mefa_region, key_count, 24);
FIELD(mefa_region, memory, 32);
SIZE(mefa_region, 40);

FIELD(mefa_memory, address, 0);
FIELD(mefa_memory, length, 8);
FIELD(mefa_memory, location, 16);
SIZE(mefa_memory, 24);

FIELD(mefa_device, name, 0);
FIELD(mefa_device, gid, 8);
FIELD(mefa_device, lid, 16);
SIZE(mefa_device, 24);

FIELD(mefa_buffer, name, 0);
FIELD(mefa_buffer, address, 8);
FIELD(mefa_buffer, length, 16);
FIELD(mefa_buffer, rkeys, 24);
FIELD(mefa_buffer, rkey_count, 32);
SIZE(mefa_buffer, 40);

FIELD(mefa_segment_desc, size, 0);
FIELD(mefa_segment_desc, name, 8);
FIELD(mefa_segment_desc, devices, 16);
FIELD(mefa_segment_desc, device_count, 24);
FIELD(mefa_segment_desc, buffers, 32);
FIELD(mefa_segment_desc, buffer_count, 40);
FIELD(mefa_segment_desc, topology_json, 48);
SIZE(mefa_segment_desc, 56);

FIELD(mefa_request, opcode, 0);
FIELD(mefa_request, flags, 4);
FIELD(mefa_request, source, 8);
FIELD(mefa_request, target, 16);
FIELD(mefa_request, offset, 24);
FIELD(mefa_request, length, 32);
FIELD(mefa_request, cookie, 40);
SIZE(mefa_request, 48);

FIELD(mefa_task_state, status, 0);
FIELD(mefa_task_state, reserved, 4);
FIELD(mefa_task_state, bytes, 8);
SIZE(mefa_task_state, 16);

FIELD(mefa_nic_stats, size, 0);
FIELD(mefa_nic_stats, posted, 8);
FIELD(mefa_nic_stats, completed, 16);
FIELD(mefa_nic_stats, failed, 24);
FIELD(mefa_nic_stats, bytes_written, 32);
FIELD(mefa_nic_stats, bytes_read, 40);
FIELD(mefa_nic_stats, put_off, 48);
FIELD(mefa_nic_stats, starved, 56);
FIELD(mefa_nic_stats, strays, 64);
FIELD(mefa_nic_stats, overdue, 72);
FIELD(mefa_nic_stats, pending_bytes, 80);
FIELD(mefa_nic_stats, retried, 88);
FIELD(mefa_nic_stats, faults_permanent, 96);
FIELD(mefa_nic_stats, faults_peer, 104);
FIELD(mefa_nic_stats, faults_rail, 112);
FIELD(mefa_nic_stats, faults_pressure, 120);
FIELD(mefa_nic_stats, faults_ours, 128);
FIELD(mefa_nic_stats, paused, 136);
SIZE(mefa_nic_stats, 144);

SIZE(mefa_transport, 8);
SIZE(mefa_segment, 8);
SIZE(mefa_batch, 8);

NUMBER(MEFA_ABI_VERSION, 1);
NUMBER(MEFA_READ, 0);
NUMBER(MEFA_WRITE, 1);
NUMBER(MEFA_CODE_OK, 0);
NUMBER(MEFA_CODE_INVALID_ARGUMENT, -1);
NUMBER(MEFA_CODE_TOO_MANY_REQUESTS, -2);
NUMBER(MEFA_CODE_ADDRESS_NOT_REGISTERED, -3);
NUMBER(MEFA_CODE_BUSY, -4);
NUMBER(MEFA_CODE_DEVICE_NOT_FOUND, -6);
NUMBER(MEFA_CODE_ADDRESS_OVERLAPPED, -7);
NUMBER(MEFA_CODE_MALFORMED_JSON, -103);
NUMBER(MEFA_CODE_REJECT_HANDSHAKE, -104);
NUMBER(MEFA_CODE_METADATA, -200);
NUMBER(MEFA_CODE_ENDPOINT, -201);
NUMBER(MEFA_CODE_CONTEXT, -202);
NUMBER(MEFA_CODE_MEMORY, -302);
NUMBER(MEFA_CODE_NOT_IMPLEMENTED, -303);
NUMBER(MEFA_CODE_TIMEOUT, -400);
NUMBER(MEFA_CODE_INTERNAL, -500);
NUMBER(MEFA_STATUS_WAITING, 0);
NUMBER(MEFA_STATUS_PENDING, 1);
NUMBER(MEFA_STATUS_INVALID, 2);
NUMBER(MEFA_STATUS_CANCELED, 3);
NUMBER(MEFA_STATUS_COMPLETED, 4);
NUMBER(MEFA_STATUS_TIMEOUT, 5);
NUMBER(MEFA_STATUS_FAILED, 6);

/* Every function that the header declares is in the library. */
static int exported(const char *path) {
    static char text[1 << 20];
    FILE *file = fopen(path, "r");
    CHECK(file != NULL);
    text[fread(text, 1, sizeof text - 1, file)] = '\0';
    fclose(file);
    for (char *comment; (comment = strstr(text, "/*")) != NULL;) {
        char *end = strstr(comment, "*/");
        CHECK(end != NULL);
        memset(comment, ' ', (size_t)(end + 2 - comment));
    }
    int count = 0;
    for (char *at = text; (at = strstr(at, "mefa_")) != NULL;) {
        size_t length = 0;
        while (isalnum((unsigned char)at[length]) || at[length] == '_') length++;
        if (at[length] == '(') {
            char name[128];
            snprintf(name, sizeof name, "%.*s", (int)length, at);
            if (dlsym(RTLD_DEFAULT, name) == NULL) check_failed(path, 0, "%s is not exported", name);
            count++;
        }
        at += length;
    }
    return count;
}

int main(void) {
    check_start(60);
    CHECK_EQ(mefa_abi_version(), MEFA_ABI_VERSION);
    CHECK(mefa_version()[0] != '\0');
    CHECK_EQ(strcmp(mefa_last_error(), ""), 0);
    /* A header with fewer would be a broken test, or a broken interface. */
    CHECK(exported(MEFA_HEADER) >= 32);
    return 0;
}
