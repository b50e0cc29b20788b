/* SPDX-License-Identifier: Apache-2.0
 *
 * What the bench programs have in common. Included after the program's own `die`.
 */
#pragma once

#include <errno.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

static _Noreturn void die(const char *format, ...);

/* Seconds that a clock shows: CLOCK_MONOTONIC, or this process's CPU time by CLOCK_PROCESS_CPUTIME_ID. */
static inline double seconds_of(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* The value of an option that is a number from 1 to `most`. */
static inline uint64_t number(const char *text, const char *name, uint64_t most) {
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 0);
    if (errno || end == text || *end || text[0] == '-' || value == 0 || value > most)
        die("--%s: '%s' is not a number from 1 to %" PRIu64, name, text, most);
    return value;
}

/* The value of --op: whether it is a read. */
static inline bool is_read(const char *text) {
    if (strcmp(text, "read") && strcmp(text, "write"))
        die("--op: write or read");
    return !strcmp(text, "read");
}

/* The byte that a buffer must hold at `offset`. Each buffer's differ, so that an operation between the wrong
 * ones is seen. */
static inline unsigned char pattern(uint64_t buffer, uint64_t offset) {
    uint64_t x = ((buffer << 40) + (offset >> 3) + 1) * UINT64_C(0x9e3779b97f4a7c15);
    return (unsigned char)(x >> (8 * (offset & 7)));
}

static inline void verify(const unsigned char *memory, uint64_t length, uint64_t buffer) {
    for (uint64_t i = 0; i < length; i++)
        if (memory[i] != pattern(buffer, i))
            die("buffer %" PRIu64 ": wrong byte at offset %" PRIu64 ": %u, not %u", buffer, i, memory[i],
                pattern(buffer, i));
}

/* The conversation of the two processes over a socket pair. */

static inline void put(int fd, const void *data, size_t length) {
    if (send(fd, data, length, MSG_NOSIGNAL) != (ssize_t)length)
        die("the other side is gone");
}

static inline void get(int fd, void *data, size_t length) {
    if (recv(fd, data, length, MSG_WAITALL) != (ssize_t)length)
        die("the other side is gone");
}
