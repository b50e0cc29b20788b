/* SPDX-License-Identifier: Apache-2.0
 *
 * transfer [PROVIDER]: one process writes into another's memory, and reads it back.
 *
 *     cc transfer.c -o transfer $(pkg-config --cflags --libs mooncake_efa)
 *     ./transfer tcp          # or shm; without an argument: efa, or what MC_EFA_PROVIDER says
 *
 * Two processes of one host here; on two hosts the descriptor goes by whatever connects them. */
#include <mooncake_efa.h>

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define SECOND UINT64_C(1000000000)

/* Every function returns 0 or a negative code; the text says what happened. */
static void check(int code, const char *what) {
    if (code == 0) return;
    fprintf(stderr, "%s: %s (%d)\n", what, mefa_last_error(), code);
    exit(1);
}

static mefa_transport install(const char *name, const char *provider) {
    mefa_config config = {0}; /* zero is the default of every field */
    mefa_transport transport = 0;
    config.size = sizeof config;
    config.server_name = name;
    config.provider = provider;
    check(mefa_install(&config, &transport), "install");
    return transport;
}

/* A text lives as long as the call that gives it. */
static void send_text(void *context, const char *text, size_t length) {
    if (write(*(int *)context, text, length + 1) < 0) exit(1);
}

/* The target: registers its memory, tells how to reach it, and then has nothing to do. */
static int target(const char *provider, int to, int from) {
    static char memory[4096];
    char end;
    uint64_t address = (uint64_t)(uintptr_t)memory;
    mefa_transport transport = install("target:1", provider);
    check(mefa_register(transport, memory, sizeof memory, NULL, NULL, NULL), "register");
    if (write(to, &address, sizeof address) < 0) return 1;
    check(mefa_descriptor_json(transport, send_text, &to), "descriptor");
    close(to);
    (void)!read(from, &end, 1); /* until the other side is done, and closes */
    printf("target: \"%s\" is in my memory\n", memory);
    check(mefa_uninstall(transport), "uninstall");
    return 0;
}

/* The initiator: opens the target's segment, and transfers. */
static void initiator(const char *provider, int from) {
    static char memory[2][4096] = {"hello"}, descriptor[65536];
    uint64_t address = 0, length = sizeof memory[0];
    size_t known = 0;
    int32_t status = 0;
    mefa_segment segment = 0;
    mefa_batch batch = 0;
    mefa_transport transport = install("initiator:1", provider);

    /* The descriptor names the target's devices and registered memory; its text ends with a NUL. */
    if (read(from, &address, sizeof address) != sizeof address) exit(1);
    for (ssize_t got; (got = read(from, descriptor + known, sizeof descriptor - 1 - known)) > 0;)
        known += (size_t)got;
    check(mefa_segment_open_json(transport, descriptor, &segment), "open the segment");

    /* Memory that is sent from or received into is registered, too. */
    check(mefa_register(transport, memory, sizeof memory, NULL, NULL, NULL), "register");

    /* A batch takes requests, all of a submission or none. */
    check(mefa_batch_allocate(transport, 2, &batch), "allocate a batch");
    mefa_request there = {MEFA_WRITE, 0, (uint64_t)(uintptr_t)memory[0], segment, address, length, 0};
    check(mefa_submit(transport, batch, &there, 1, 10 * SECOND), "submit");
    check(mefa_wait(transport, batch, 20 * SECOND, &status), "wait");

    /* Requests of a batch have no order: the read is submitted when the write is done. */
    mefa_request back = {MEFA_READ, 0, (uint64_t)(uintptr_t)memory[1], segment, address, length, 0};
    check(mefa_submit(transport, batch, &back, 1, 10 * SECOND), "submit");
    check(mefa_wait(transport, batch, 20 * SECOND, &status), "wait");
    if (status != MEFA_STATUS_COMPLETED) {
        fprintf(stderr, "the transfers ended with status %d\n", status);
        exit(1);
    }
    printf("initiator: \"%s\" came back\n", memory[1]);
    if (memcmp(memory[0], memory[1], sizeof memory[0]) != 0) exit(1);

    check(mefa_batch_free(transport, batch), "free the batch");
    check(mefa_segment_close(transport, segment), "close the segment");
    check(mefa_unregister(transport, memory), "unregister");
    check(mefa_uninstall(transport), "uninstall");
}

int main(int count, char **arguments) {
    const char *provider = count > 1 ? arguments[1] : NULL;
    int descriptor[2], done[2], status = 0;
    if (pipe(descriptor) != 0 || pipe(done) != 0) return 1;
    /* Forked before the library is used: a transport does not survive a fork. */
    pid_t child = fork();
    if (child == 0) {
        close(descriptor[0]);
        close(done[1]);
        return target(provider, descriptor[1], done[0]);
    }
    close(descriptor[1]);
    close(done[0]);
    initiator(provider, descriptor[0]);
    close(done[1]);
    return waitpid(child, &status, 0) == child && status == 0 ? 0 : 1;
}
