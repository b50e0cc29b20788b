/* SPDX-License-Identifier: Apache-2.0
 *
 * Peers come, come back under other addresses, and go, by the thousand: memory does not grow.
 *     c_many_segments [PROVIDER [KEPT]]      tcp (the default) or efa
 * KEPT is how many NICs of peers may stay known without an open segment (MC_MAX_EP_PER_CTX): 64, or another number,
 * with which memory is not looked at. */
#include "check.h"

enum {
    ROUNDS = 5000,
    /* What is kept for later is there after so many. */
    SETTLED = 1000,
    /* KiB that may come after that: to keep 60 bytes of each round would take more. The provider efa of libfabric
     * 1.17 keeps some 200 itself. */
    ROOM = 240,
    ROOM_EFA = 1600
};

static long resident(void) {
    long pages = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    CHECK(file != NULL && fscanf(file, "%*s %ld", &pages) == 1);
    fclose(file);
    return pages * (sysconf(_SC_PAGESIZE) / 1024);
}

/* Gives the NICs of a descriptor addresses of which there is one for each `number`. */
static void readdress(char *descriptor, int efa, unsigned number) {
    char digits[9];
    int nics = 0;
    /* Behind a GID, the number of a queue pair; or behind family and port, an IPv4 address of the loopback's. */
    size_t at = efa ? 32 : 8, count = efa ? 4 : 8;
    snprintf(digits, sizeof digits, efa ? "%04x" : "7f%06x", number);
    for (char *gid = descriptor; (gid = strstr(gid, "\"mefa1:")) != NULL; nics++) {
        gid = strchr(gid + 7, ':') + 1;
        memcpy(gid + at, digits, count);
    }
    CHECK(nics > 0);
}

int main(int argc, char **argv) {
    check_start(110);
    setenv("MC_MAX_EP_PER_CTX", argc > 2 ? argv[2] : "64", 1);
    const char *provider = argc > 1 ? argv[1] : "tcp";
    mefa_transport transport = check_install(provider, "here:1");
    struct text descriptor = {0};
    CHECK_OK(mefa_descriptor_json(transport, keep_text, &descriptor));
    int efa = strcmp(provider, "efa") == 0;
    long settled = 0;
    for (unsigned round = 0; round < ROUNDS; round++) {
        mefa_segment segment = 0;
        if (round == SETTLED) settled = resident();
        readdress(descriptor.text, efa, 2 * round);
        CHECK_OK(mefa_segment_open_json(transport, descriptor.text, &segment));
        CHECK_OK(mefa_segment_warm_up(transport, segment));
        /* It was restarted. */
        readdress(descriptor.text, efa, 2 * round + 1);
        CHECK_OK(mefa_segment_update_json(transport, segment, descriptor.text));
        CHECK_OK(mefa_segment_warm_up(transport, segment));
        CHECK_OK(mefa_segment_close(transport, segment));
    }
    long grown = resident() - settled;
    printf("%s: %ld KiB after %d rounds, %+ld KiB after %d\n", provider, settled, SETTLED, grown, ROUNDS);
    if (argc < 3 && grown > (efa ? ROOM_EFA : ROOM)) check_failed(__FILE__, __LINE__, "it has grown by %ld KiB", grown);
    CHECK_OK(mefa_uninstall(transport));
    free(descriptor.text);
    return 0;
}
