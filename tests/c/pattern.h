/* SPDX-License-Identifier: Apache-2.0
 *
 * Patterns to tell bytes by. */
#ifndef MEFA_TEST_PATTERN_H
#define MEFA_TEST_PATTERN_H

#include <stdint.h>
#include <string.h>

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

#endif
