/* SPDX-License-Identifier: Apache-2.0
 *
 * What tests may ask of the fake CUDA driver (fake_cuda.c), beyond what CUDA's own has. Look the functions up in the
 * library; where they are not, the driver is a real one. */
#ifndef MEFA_FAKE_CUDA_H
#define MEFA_FAKE_CUDA_H

#include <stdint.h>

#define FAKE_CUDA_MAX_DEVICES 8

/* Of this process. */
struct fake_cuda_counts {
    /* By device, as this process numbers them: how often its primary context was made, how often it is retained now,
     * and the bytes of its memory that are allocated. */
    int64_t contexts_created[FAKE_CUDA_MAX_DEVICES];
    int64_t retained[FAKE_CUDA_MAX_DEVICES];
    int64_t device_bytes[FAKE_CUDA_MAX_DEVICES];
    /* What there is now. Pinned: bytes of cuMemHostAlloc and cuMemHostRegister. */
    int64_t allocations, streams, events, imports, pinned_bytes;
    /* Copies that have run, and those of cuMemcpyAsync that had to wait because host memory was not pinned. */
    int64_t copies, pageable;
    /* Copies that were queued and whose memory was gone when they ran, and memory freed with copies queued for it. */
    int64_t wild, freed_in_use;
    /* Memory, streams and events that were still there when their context went. */
    int64_t left;
};

/* void fake_cuda_counts(struct fake_cuda_counts *out); */
typedef void (*fake_cuda_counts_fn)(struct fake_cuda_counts *out);
/* void fake_cuda_fail(const char *rules);  replaces the rules of FAKE_CUDA_FAIL; NULL: none. Counts begin anew. */
typedef void (*fake_cuda_fail_fn)(const char *rules);

#endif
