/* SPDX-License-Identifier: Apache-2.0
 *
 * What the C tests share: checks that end the program, patterns to tell bytes by, memory, texts.
 * Exit status: 0 passed, 1 failed, 77 skipped (with the reason on standard error). */
#ifndef MEFA_TEST_CHECK_H
#define MEFA_TEST_CHECK_H

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

/* The byte at place `at` of the pattern `seed`. Neighbours, and the same place of other seeds, differ
 * mostly; no short period. Pattern 0 is all zeros. */
static inline uint64_t pattern_word(uint64_t seed, uint64_t word) {
    uint64_t x = (word + seed * UINT64_C(0x9e3779b97f4a7c15)) * UINT64_C(0xbf58476d1ce4e5b9);
    x ^= x >> 29;
    x *= UINT64_C(0x94d049bb133111eb);
    return seed == 0 ? 0 : x ^ (x >> 32);
}

static inline unsigned char pattern_byte(uint64_t seed, uint64_t at) {
    return (unsigned char)(pattern_word(seed, at / 8) >> (at % 8 * 8));
}

/* Writes places `at` and on of a pattern. */
static inline void pattern_fill(unsigned char *memory, uint64_t length, uint64_t seed, uint64_t at) {
    for (uint64_t i = 0; i < length;) {
        if ((at + i) % 8 == 0 && length - i >= 8) {
            uint64_t word = pattern_word(seed, (at + i) / 8);
            memcpy(memory + i, &word, 8);
            i += 8;
        } else {
            memory[i] = pattern_byte(seed, at + i);
            i++;
        }
    }
}

/* The first of `length` bytes that is not as pattern_fill writes them, or `length`. */
static inline uint64_t pattern_differs(const unsigned char *memory, uint64_t length, uint64_t seed,
                                       uint64_t at) {
    for (uint64_t i = 0; i < length;) {
        uint64_t word = pattern_word(seed, (at + i) / 8);
        if ((at + i) % 8 == 0 && length - i >= 8 && memcmp(memory + i, &word, 8) == 0) {
            i += 8;
        } else if (memory[i] == pattern_byte(seed, at + i)) {
            i++;
        } else {
            return i;
        }
    }
    return length;
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
