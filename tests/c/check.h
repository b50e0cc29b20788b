/* SPDX-License-Identifier: Apache-2.0
 *
 * What the C tests share: checks that end the program, patterns to tell bytes by, memory, texts.
 * Exit status: 0 passed, 1 failed, 77 skipped (with the reason on standard error). */
#ifndef MEFA_TEST_CHECK_H
#define MEFA_TEST_CHECK_H

#include "pattern.h"

#include <mooncake_efa.h>

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define CHECK(condition) \
    do { \
        if (!(condition)) check_failed(__FILE__, __LINE__, "%s", #condition); \
    } while (0)

/* Both as signed numbers. */
#define CHECK_EQ(got, wanted) \
    do { \
        long long got_ = (long long)(got), wanted_ = (long long)(wanted); \
        if (got_ != wanted_) \
            check_failed(__FILE__, __LINE__, "%s is %lld, not %lld (%s)", #got, got_, wanted_, #wanted); \
    } while (0)

#define CHECK_OK(call) CHECK_EQ(call, MEFA_CODE_OK)

static inline void check_failed(const char *file, int line, const char *format, ...)
    __attribute__((noreturn, format(printf, 3, 4)));

static inline void check_failed(const char *file, int line, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "%s:%d: ", file, line);
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "; last error: \"%s\"\n", mefa_last_error());
    va_end(arguments);
    exit(1);
}

static inline void skip(const char *why) __attribute__((noreturn));

static inline void skip(const char *why) {
    fprintf(stderr, "skipped: %s\n", why);
    exit(77);
}

/* The rest of this process's life is at most so many seconds. And its environment's settings do not
 * matter to it. */
static inline void check_start(unsigned seconds) {
    extern char **environ;
    alarm(seconds);
    for (char **variable = environ; *variable != NULL;) {
        char name[128] = "";
        if (strncmp(*variable, "MC_", 3) == 0 && strncmp(*variable, "MC_EFA_LIBFABRIC", 16) != 0)
            snprintf(name, sizeof name, "%.*s", (int)strcspn(*variable, "="), *variable);
        if (name[0] != '\0') {
            unsetenv(name);
            variable = environ;
        } else {
            variable++;
        }
    }
    setenv("MC_LOG_LEVEL", "ERROR", 1);
}

/* A transport of this provider, all else as it comes; skips the test where there is no such device. */
static inline mefa_transport check_install(const char *provider, const char *name) {
    mefa_config config;
    mefa_transport transport = 0;
    memset(&config, 0, sizeof config);
    config.size = sizeof config;
    config.server_name = name;
    config.provider = provider;
    int code = mefa_install(&config, &transport);
    if (code == MEFA_CODE_DEVICE_NOT_FOUND) skip(mefa_last_error());
    CHECK_OK(code);
    CHECK(transport != 0);
    return transport;
}

/* Zeroed pages, of which only those that are touched cost memory. */
static inline unsigned char *map_memory(uint64_t length) {
    void *memory = mmap(NULL, (size_t)length, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(memory != MAP_FAILED);
    return (unsigned char *)memory;
}

/* A mefa_text_fn; the context is a struct text, zeroed before the first use. */
struct text {
    char *text;
    size_t length;
    int calls;
};

static inline void keep_text(void *context, const char *text, size_t length) {
    struct text *kept = (struct text *)context;
    free(kept->text);
    kept->text = (char *)malloc(length + 1);
    memcpy(kept->text, text, length + 1);
    kept->length = length;
    kept->calls++;
}

#endif
