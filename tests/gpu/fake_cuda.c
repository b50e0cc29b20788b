/* SPDX-License-Identifier: Apache-2.0
 *
 * A CUDA driver without a GPU, for tests: it is loaded in place of libcuda.so.1.
 *
 * Device memory is a file in memory, mapped twice: no one can read or write at the addresses that callers get, as with
 * a real GPU, and the driver copies through the other mapping. Streams are queues that run late: an event is ready when
 * it is asked about for the third time, and only then what was queued before it is done; so who takes a copy for done
 * too early sees the wrong bytes. Whatever CUDA may refuse is refused: calls without a current context, streams of
 * another one, memory that is not known.
 *
 *   FAKE_CUDA_DEVICES=2        how many GPUs; CUDA_VISIBLE_DEVICES=1,0 hides and reorders them
 *   FAKE_CUDA_READABLE=1       device memory may be read and written where callers see it
 *   FAKE_CUDA_NO_IPC=1         no IPC handles
 *   FAKE_CUDA_NO_PEER=1        GPUs cannot access each other's memory
 *   FAKE_CUDA_LATE=3000        events are done when they are asked about for the 3000th time, not for the third
 *   FAKE_CUDA_FAIL=cuMemcpyAsync=700@3,cuIpcOpenMemHandle=1
 *                              the third call of the one fails with 700, every call of the other with 1; @3+: the third
 *                              and all after it
 */
#define _GNU_SOURCE
#include "fake_cuda.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#undef MAP_FAILED /* mmap's; here it is CUDA's */
#define NO_MAPPING ((void *)-1)

#define API __attribute__((visibility("default")))

enum {
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    MAP_FAILED = 205,
    PEER_ACCESS_UNSUPPORTED = 217,
    OPERATING_SYSTEM = 304,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    PEER_ACCESS_ALREADY_ENABLED = 704,
    CONTEXT_IS_DESTROYED = 709,
    HOST_MEMORY_ALREADY_REGISTERED = 712,
    HOST_MEMORY_NOT_REGISTERED = 713,
    NOT_SUPPORTED = 801,
};

#define PAGE ((uint64_t)4096)
#define GRANULARITY ((uint64_t)2 << 20)
#define DEVICE_BYTES ((uint64_t)4 << 30)
#define MAX_DEVICES FAKE_CUDA_MAX_DEVICES

/* Primary contexts, the only ones there are. */
struct context {
    int device;
    int64_t retained, created;
    bool peers[MAX_DEVICES];
    int error; /* a copy that went wrong spoils the context */
};

/* The bytes of device memory. */
struct store {
    int fd;
    uint64_t size;
    char *alias; /* where this driver reads and writes them */
    int users;
    int device;
};

enum kind { DEVICE, MAPPED, IMPORTED, MANAGED, PINNED, REGISTERED };

/* Memory at one address. */
struct memory {
    struct memory *next;
    enum kind kind;
    uint64_t address, size, id;
    struct context *context; /* NULL: of none */
    int device;
    struct store *store;   /* DEVICE, MAPPED, IMPORTED */
    uint64_t offset;       /* of `address` in the store */
    void *mapping;         /* what to unmap, and how much */
    uint64_t mapping_size;
    unsigned access;       /* MAPPED: devices that may */
    uint64_t handle_types; /* MAPPED */
    int users;             /* IMPORTED: how often it was opened */
    ino_t inode;           /* IMPORTED */
    int queued;            /* copies queued for it */
    bool ordered;          /* DEVICE: synchronous copies wait */
};

struct reservation {
    struct reservation *next;
    uint64_t address, size;
    void *mapping;
    uint64_t mapping_size;
};

/* Physical memory of cuMemCreate. */
struct physical {
    struct physical *next;
    uint64_t id, handle_types;
    struct store *store;
};

enum what { COPY, SET, AWAIT };

struct operation {
    struct operation *next;
    enum what what;
    uint64_t to, from, size;
    unsigned char value;
    uint64_t stream, number; /* AWAIT: until then */
    struct memory *uses[2];
};

struct stream {
    struct stream *next;
    uint64_t id;
    struct context *context;
    bool is_default, blocking;
    struct operation *first, **last;
    uint64_t queued, done; /* numbers of operations */
    unsigned queries;
};

struct event {
    struct event *next;
    struct context *context;
    uint64_t stream, number; /* what it waits for; stream 0: nothing */
    unsigned queries, ready_at;
};

struct rule {
    char function[64];
    int error;
    long from, to, calls;
};

/* CUmemLocation, CUmemAccessDesc and CUmemAllocationProp of cuda.h. */
struct location { int type, id; };
struct access { struct location location; int flags; };
struct properties {
    int type, handle_types;
    struct location location;
    void *metadata;
    unsigned char flags[8];
};

/* What is in the 64 bytes of an IPC handle. */
struct ipc {
    char magic[8];
    int32_t process, fd, device, unused;
    uint64_t size, offset;
    ino_t inode;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static bool initialized, rules_read;
static int device_count, physical_device[MAX_DEVICES];
static struct context contexts[MAX_DEVICES];
static struct memory *memories;
static struct reservation *reservations;
static struct physical *physicals;
static struct stream *streams;
static struct event *events;
static uint64_t last_id;
static struct rule rules[16];
static struct fake_cuda_counts totals; /* copies, pageable, wild, freed_in_use, left */
static __thread struct context *stack[64];
static __thread int depth;

static bool setting(const char *name) {
    const char *value = getenv(name);
    return value && *value && strcmp(value, "0") != 0;
}

/* ---- faults on purpose, and the lock around every call */

static void read_rules(const char *text) {
    memset(rules, 0, sizeof rules);
    rules_read = true;
    for (size_t count = 0; text && *text && count < 16; count++) {
        struct rule *rule = &rules[count];
        char after = 0;
        int read = sscanf(text, "%63[a-zA-Z0-9_]=%d@%ld%c", rule->function, &rule->error, &rule->from, &after);
        if (read < 2) {
            fprintf(stderr, "FAKE_CUDA_FAIL: cannot read \"%s\"\n", text);
            abort();
        }
        rule->to = read >= 3 && after != '+' ? rule->from : __LONG_MAX__;
        text = strchr(text, ',') ? strchr(text, ',') + 1 : NULL;
    }
}

/* Names match with and without their version. */
static int fault(const char *function) {
    if (!rules_read) read_rules(getenv("FAKE_CUDA_FAIL"));
    for (struct rule *rule = rules; rule < rules + 16 && *rule->function; rule++) {
        size_t length = strlen(rule->function);
        if (strncmp(function, rule->function, length) != 0) continue;
        if (function[length] && strcmp(function + length, "_v2") != 0) continue;
        rule->calls++;
        if (rule->calls >= rule->from && rule->calls <= rule->to) return rule->error;
    }
    return 0;
}

static void leave(int *unused) {
    (void)unused;
    pthread_mutex_unlock(&lock);
}

static int enter(const char *function, bool needs_context) {
    pthread_mutex_lock(&lock);
    int failed = fault(function);
    if (failed) return failed;
    if (!initialized) return NOT_INITIALIZED;
    if (!needs_context) return 0;
    if (!depth || !stack[depth - 1]) return INVALID_CONTEXT;
    if (!stack[depth - 1]->retained) return CONTEXT_IS_DESTROYED;
    return stack[depth - 1]->error;
}

/* Every function begins with one of these; the lock is left when it returns. */
#define ENTER_WITH(needs_context)                                                                                      \
    __attribute__((cleanup(leave))) int entered = enter(__func__, needs_context);                                      \
    if (entered) return entered
#define ENTER ENTER_WITH(false)
#define ENTER_CURRENT ENTER_WITH(true)
#define CURRENT (stack[depth - 1])
#define REFUSE_IF(condition, error)                                                                                    \
    do {                                                                                                               \
        if (condition) return (error);                                                                                 \
    } while (0)

/* ---- memory */

static uint64_t round_up(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

static struct memory *find_memory(uint64_t address) {
    for (struct memory *memory = memories; memory; memory = memory->next)
        if (address >= memory->address && address - memory->address < memory->size) return memory;
    return NULL;
}

/* Whether any of a range is known. */
static bool touches(uint64_t address, uint64_t size) {
    for (struct memory *memory = memories; memory; memory = memory->next)
        if (address < memory->address + memory->size && memory->address < address + size) return true;
    return false;
}

static struct memory *add_memory(enum kind kind, uint64_t address, uint64_t size, struct context *context, int device) {
    struct memory *memory = calloc(1, sizeof *memory);
    if (!memory) abort();
    *memory = (struct memory){.next = memories, .kind = kind, .address = address, .size = size, .id = ++last_id,
                              .context = context, .device = device};
    memories = memory;
    return memory;
}

static uint64_t bytes_of(int device) {
    uint64_t bytes = 0;
    for (struct memory *memory = memories; memory; memory = memory->next)
        if (memory->device == device && (memory->kind == DEVICE || memory->kind == MANAGED)) bytes += memory->size;
    for (struct physical *physical = physicals; physical; physical = physical->next)
        if (physical->store->device == device) bytes += physical->store->size;
    return bytes;
}

/* NULL if there is no memory left. `fd` -1: new memory. */
static struct store *add_store(int fd, uint64_t size, int device) {
    if (fd < 0) {
        fd = memfd_create("fake device memory", MFD_CLOEXEC);
        if (fd < 0) return NULL;
        if (ftruncate(fd, (off_t)size) != 0) {
            close(fd);
            return NULL;
        }
    }
    void *alias = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    struct store *store = alias == NO_MAPPING ? NULL : calloc(1, sizeof *store);
    if (!store) {
        close(fd);
        return NULL;
    }
    *store = (struct store){.fd = fd, .size = size, .alias = alias, .users = 1, .device = device};
    return store;
}

static void drop_store(struct store *store) {
    if (!store || --store->users) return;
    munmap(store->alias, store->size);
    close(store->fd);
    free(store);
}

static int device_protection(void) { return setting("FAKE_CUDA_READABLE") ? PROT_READ | PROT_WRITE : PROT_NONE; }

/* Where callers see a store; pages around it that are nobody's. */
static void *show(struct store *store, uint64_t *mapping_size) {
    *mapping_size = store->size + 2 * GRANULARITY;
    char *place = mmap(NULL, *mapping_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (place == NO_MAPPING) return NULL;
    char *first = (char *)round_up((uint64_t)place + 1, GRANULARITY);
    if (mmap(first, store->size, device_protection(), MAP_SHARED | MAP_FIXED, store->fd, 0) == NO_MAPPING) {
        munmap(place, *mapping_size);
        return NULL;
    }
    return place;
}

static void drop_memory(struct memory *memory) {
    struct memory **at = &memories;
    while (*at != memory) at = &(*at)->next;
    *at = memory->next;
    if (memory->queued) totals.freed_in_use++;
    for (struct stream *stream = streams; stream; stream = stream->next)
        for (struct operation *operation = stream->first; operation; operation = operation->next)
            for (int i = 0; i < 2; i++)
                if (operation->uses[i] == memory) operation->uses[i] = NULL;
    if (memory->mapping) munmap(memory->mapping, memory->mapping_size);
    drop_store(memory->store);
    free(memory);
}

static bool is_device_side(const struct memory *memory) {
    return memory && (memory->kind == DEVICE || memory->kind == MAPPED || memory->kind == IMPORTED);
}

/* Whether `device` may touch all of a range that begins in `memory`: only mappings may follow each other. */
static bool covers(const struct memory *memory, uint64_t address, uint64_t size, int device) {
    while (memory) {
        if (memory->kind == MAPPED && !(memory->access >> device & 1)) return false;
        uint64_t here = memory->address + memory->size - address;
        if (size <= here) return true;
        if (memory->kind != MAPPED) return false;
        address += here;
        size -= here;
        memory = find_memory(address);
        if (memory && memory->kind != MAPPED) return false;
    }
    return false;
}

/* Where the driver finds the byte at `address`, and how many follow. NULL: pageable memory. */
static char *alias_of(uint64_t address, uint64_t *room) {
    struct memory *memory = find_memory(address);
    if (!memory) return NULL;
    uint64_t inside = address - memory->address;
    *room = memory->size - inside;
    return memory->store ? memory->store->alias + memory->offset + inside : (char *)address;
}

/* From or to memory that may be nobody's: the kernel looks, and says so. */
static bool move_pageable(char *known, uint64_t pageable, uint64_t size, bool from_pageable) {
    struct iovec here = {known, size}, there = {(void *)pageable, size};
    ssize_t moved = from_pageable ? process_vm_readv(getpid(), &here, 1, &there, 1, 0)
                                  : process_vm_writev(getpid(), &here, 1, &there, 1, 0);
    return moved == (ssize_t)size;
}

static bool move(uint64_t to, uint64_t from, uint64_t size) {
    while (size) {
        uint64_t to_room = size, from_room = size;
        char *target = alias_of(to, &to_room), *source = alias_of(from, &from_room);
        uint64_t piece = size;
        if (piece > to_room) piece = to_room;
        if (piece > from_room) piece = from_room;
        if (target && source)
            memmove(target, source, piece);
        else if (!target && !source)
            return false;
        else if (!move_pageable(target ? target : source, target ? from : to, piece, target != NULL))
            return false;
        to += piece;
        from += piece;
        size -= piece;
    }
    totals.copies++;
    return true;
}

/* ---- streams */

static struct stream *stream_by_id(uint64_t id) {
    struct stream *stream = streams;
    while (stream && stream->id != id) stream = stream->next;
    return stream;
}

static struct stream *add_stream(struct context *context, bool is_default, bool blocking) {
    struct stream *stream = calloc(1, sizeof *stream);
    if (!stream) abort();
    *stream = (struct stream){.next = streams, .id = ++last_id, .context = context, .is_default = is_default,
                              .blocking = blocking};
    stream->last = &stream->first;
    streams = stream;
    return stream;
}

/* The caller's stream; NULL if it is not one of the current context. */
static struct stream *find_stream(void *handle) {
    /* CU_STREAM_LEGACY and CU_STREAM_PER_THREAD are 1 and 2. */
    if ((uintptr_t)handle <= 2) {
        for (struct stream *stream = streams; stream; stream = stream->next)
            if (stream->is_default && stream->context == CURRENT) return stream;
        return add_stream(CURRENT, true, true);
    }
    for (struct stream *stream = streams; stream; stream = stream->next)
        if (stream == handle) return stream->context == CURRENT ? stream : NULL;
    return NULL;
}

static void run_stream(struct stream *stream, uint64_t number);

/* The default stream begins when all that block have ended. */
static void run_blocking(struct stream *than) {
    for (struct stream *stream = streams; stream; stream = stream->next)
        if (stream != than && stream->context == than->context && stream->blocking && !stream->is_default)
            run_stream(stream, stream->queued);
}

static void run_operation(struct stream *stream, struct operation *operation) {
    bool done = true;
    if (operation->what == AWAIT) {
        struct stream *other = stream_by_id(operation->stream);
        if (other) run_stream(other, operation->number);
        return;
    }
    if (!operation->uses[0] || (operation->what == COPY && !operation->uses[1])) {
        done = false;
    } else if (operation->what == COPY) {
        done = move(operation->to, operation->from, operation->size);
    } else {
        for (uint64_t at = 0; done && at < operation->size;) {
            uint64_t room = 0;
            char *target = alias_of(operation->to + at, &room);
            if (room > operation->size - at) room = operation->size - at;
            done = target != NULL;
            if (done) memset(target, operation->value, room);
            at += room;
        }
    }
    if (!done) {
        totals.wild++;
        stream->context->error = ILLEGAL_ADDRESS;
    }
}

/* All operations up to `number`. */
static void run_stream(struct stream *stream, uint64_t number) {
    if (stream->is_default && stream->first) run_blocking(stream);
    while (stream->first && stream->done < number) {
        struct operation *operation = stream->first;
        stream->first = operation->next;
        if (!stream->first) stream->last = &stream->first;
        stream->done++;
        run_operation(stream, operation);
        for (int i = 0; i < 2; i++)
            if (operation->uses[i]) operation->uses[i]->queued--;
        free(operation);
    }
}

static void run_context(struct context *context) {
    for (struct stream *stream = streams; stream; stream = stream->next)
        if (stream->context == context) run_stream(stream, stream->queued);
}

static void enqueue(struct stream *stream, struct operation what) {
    struct operation *operation = malloc(sizeof *operation);
    if (!operation) abort();
    *operation = what;
    operation->next = NULL;
    if (what.what == COPY) operation->uses[1] = find_memory(what.from);
    if (what.what != AWAIT) operation->uses[0] = find_memory(what.to);
    for (int i = 0; i < 2; i++)
        if (operation->uses[i]) operation->uses[i]->queued++;
    *stream->last = operation;
    stream->last = &operation->next;
    stream->queued++;
}

/* What every copy is checked for. */
static int check_range(uint64_t address, uint64_t size) {
    struct memory *memory = find_memory(address);
    if (!memory) return touches(address, size) ? INVALID_VALUE : 0; /* pageable, as far as anyone can know */
    return covers(memory, address, size, CURRENT->device) ? 0 : INVALID_VALUE;
}

static int copy(uint64_t to, uint64_t from, uint64_t size, struct stream *stream, bool asynchronous) {
    if (!size) return 0;
    REFUSE_IF(!to || !from || to + size < to || from + size < from, INVALID_VALUE);
    int wrong = check_range(to, size);
    if (!wrong) wrong = check_range(from, size);
    REFUSE_IF(wrong, wrong);
    struct memory *target = find_memory(to), *source = find_memory(from);
    bool pageable = !target || !source;
    /* A copy within devices does not wait, whichever function was called; nor does one of pinned memory. */
    if (!pageable && (asynchronous || (is_device_side(target) && is_device_side(source)))) {
        enqueue(stream, (struct operation){.what = COPY, .to = to, .from = from, .size = size});
        return 0;
    }
    if (asynchronous) totals.pageable++;
    if (stream->is_default) run_blocking(stream);
    run_stream(stream, stream->queued);
    REFUSE_IF(CURRENT->error, CURRENT->error);
    return move(to, from, size) ? 0 : INVALID_VALUE;
}

/* ---- the driver, and its devices */

API int cuInit(unsigned flags) {
    pthread_mutex_lock(&lock);
    __attribute__((cleanup(leave))) int failed = fault(__func__);
    if (failed) return failed;
    REFUSE_IF(flags, INVALID_VALUE);
    if (!initialized) {
        const char *count = getenv("FAKE_CUDA_DEVICES"), *visible = getenv("CUDA_VISIBLE_DEVICES");
        long all = count ? strtol(count, NULL, 10) : 2;
        if (all > MAX_DEVICES) all = MAX_DEVICES;
        device_count = 0;
        for (long device = 0; !visible && device < all; device++) physical_device[device_count++] = (int)device;
        while (visible && *visible && device_count < MAX_DEVICES) {
            char *end;
            long device = strtol(visible, &end, 10);
            if (end == visible || device < 0 || device >= all) break; /* CUDA stops at one that there is not */
            physical_device[device_count++] = (int)device;
            visible = *end == ',' ? end + 1 : "";
        }
        for (int device = 0; device < MAX_DEVICES; device++) contexts[device].device = device;
        initialized = device_count > 0;
    }
    return initialized ? 0 : NO_DEVICE;
}

API int cuDriverGetVersion(int *version) {
    REFUSE_IF(!version, INVALID_VALUE);
    *version = 13000;
    return 0;
}

API int cuGetErrorName(int error, const char **name) {
    REFUSE_IF(!name, INVALID_VALUE);
    switch (error) {
#define NAME(code)                                                                                                     \
    case code:                                                                                                         \
        *name = "CUDA_ERROR_" #code;                                                                                   \
        return 0
    case 0:
        *name = "CUDA_SUCCESS";
        return 0;
        NAME(INVALID_VALUE);
        NAME(OUT_OF_MEMORY);
        NAME(NOT_INITIALIZED);
        NAME(NO_DEVICE);
        NAME(INVALID_DEVICE);
        NAME(INVALID_CONTEXT);
        NAME(MAP_FAILED);
        NAME(PEER_ACCESS_UNSUPPORTED);
        NAME(OPERATING_SYSTEM);
        NAME(INVALID_HANDLE);
        NAME(NOT_FOUND);
        NAME(NOT_READY);
        NAME(ILLEGAL_ADDRESS);
        NAME(PEER_ACCESS_ALREADY_ENABLED);
        NAME(CONTEXT_IS_DESTROYED);
        NAME(HOST_MEMORY_ALREADY_REGISTERED);
        NAME(HOST_MEMORY_NOT_REGISTERED);
        NAME(NOT_SUPPORTED);
#undef NAME
    default:
        *name = NULL;
        return INVALID_VALUE;
    }
}

API int cuGetErrorString(int error, const char **text) {
    const char *name;
    int unknown = cuGetErrorName(error, &name);
    *text = unknown ? NULL : error == ILLEGAL_ADDRESS ? "an illegal memory access was encountered" : name;
    return unknown;
}

API int cuDeviceGetCount(int *count) {
    ENTER;
    *count = device_count;
    return 0;
}

API int cuDeviceGet(int *device, int ordinal) {
    ENTER;
    REFUSE_IF(ordinal < 0 || ordinal >= device_count, INVALID_DEVICE);
    *device = ordinal;
    return 0;
}

#define REFUSE_BAD_DEVICE(device) REFUSE_IF((device) < 0 || (device) >= device_count, INVALID_DEVICE)

API int cuDeviceGetName(char *name, int length, int device) {
    ENTER;
    REFUSE_BAD_DEVICE(device);
    snprintf(name, (size_t)length, "Fake GPU %d", physical_device[device]);
    return 0;
}

API int cuDeviceGetUuid(unsigned char *uuid, int device) {
    ENTER;
    REFUSE_BAD_DEVICE(device);
    for (int i = 0; i < 16; i++) uuid[i] = (unsigned char)(i * 17 + physical_device[device]);
    return 0;
}

API int cuDeviceGetUuid_v2(unsigned char *uuid, int device) { return cuDeviceGetUuid(uuid, device); }

API int cuDeviceGetPCIBusId(char *id, int length, int device) {
    ENTER;
    REFUSE_BAD_DEVICE(device);
    snprintf(id, (size_t)length, "0000:%02X:00.0", 0x18 + 0x11 * physical_device[device]);
    return 0;
}

API int cuDeviceGetAttribute(int *value, int attribute, int device) {
    ENTER;
    REFUSE_BAD_DEVICE(device);
    switch (attribute) {
    case 16: *value = 132; return 0;                                           /* multiprocessors */
    case 33: *value = 0x18 + 0x11 * physical_device[device]; return 0;         /* PCI bus */
    case 40: *value = 3; return 0;                                             /* copy engines */
    case 75: *value = 9; return 0;                                             /* compute capability */
    case 18: case 20: case 34: case 50: case 76: case 88: *value = 0; return 0; /* integrated, compute mode, PCI device
                                                    and domain, capability, pageable memory access */
    case 41: case 83: case 89: case 91: *value = 1; return 0; /* unified addresses, managed memory, also at the same
                                                                 time, host's addresses for registered memory */
    case 102: case 103: case 116: case 110: case 124: *value = 1; return 0; /* VMM, by descriptor, GPUDirect RDMA, also
                                                                               with VMM, dmabuf */
    case 128: *value = 0; return 0;                                         /* fabric handles */
    default: return INVALID_VALUE;
    }
}

API int cuDeviceCanAccessPeer(int *can, int device, int peer) {
    ENTER;
    REFUSE_BAD_DEVICE(device);
    REFUSE_BAD_DEVICE(peer);
    *can = device != peer && !setting("FAKE_CUDA_NO_PEER");
    return 0;
}

/* ---- contexts */

API int cuDevicePrimaryCtxRetain(struct context **context, int device) {
    ENTER;
    REFUSE_BAD_DEVICE(device);
    if (!contexts[device].retained++) {
        contexts[device].created++;
        contexts[device].error = 0;
        memset(contexts[device].peers, 0, sizeof contexts[device].peers);
    }
    *context = &contexts[device];
    return 0;
}

/* With a context goes all that is its. */
static void end_context(struct context *context) {
    run_context(context);
    for (struct stream **at = &streams; *at;) {
        struct stream *stream = *at;
        if (stream->context == context) {
            *at = stream->next;
            totals.left += !stream->is_default;
            free(stream);
        } else {
            at = &stream->next;
        }
    }
    for (struct event **at = &events; *at;) {
        struct event *event = *at;
        if (event->context == context) {
            *at = event->next;
            totals.left++;
            free(event);
        } else {
            at = &event->next;
        }
    }
    for (struct memory *memory = memories, *next; memory; memory = next) {
        next = memory->next;
        if (memory->context != context) continue;
        totals.left++;
        drop_memory(memory);
    }
}

API int cuDevicePrimaryCtxRelease_v2(int device) {
    ENTER;
    REFUSE_BAD_DEVICE(device);
    REFUSE_IF(!contexts[device].retained, INVALID_CONTEXT);
    if (!--contexts[device].retained) end_context(&contexts[device]);
    return 0;
}

API int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    ENTER;
    REFUSE_BAD_DEVICE(device);
    *flags = 0;
    *active = contexts[device].retained > 0;
    return 0;
}

static bool is_context(const struct context *context) {
    return context >= contexts && context < contexts + MAX_DEVICES;
}

API int cuCtxPushCurrent_v2(struct context *context) {
    ENTER;
    REFUSE_IF(!is_context(context), INVALID_CONTEXT);
    REFUSE_IF(!context->retained, CONTEXT_IS_DESTROYED);
    REFUSE_IF(depth == 64, INVALID_VALUE);
    stack[depth++] = context;
    return 0;
}

API int cuCtxPopCurrent_v2(struct context **context) {
    ENTER;
    REFUSE_IF(!depth, INVALID_CONTEXT);
    depth--;
    if (context) *context = stack[depth];
    return 0;
}

API int cuCtxGetCurrent(struct context **context) {
    ENTER;
    *context = depth ? CURRENT : NULL;
    return 0;
}

API int cuCtxSetCurrent(struct context *context) {
    ENTER;
    REFUSE_IF(context && !is_context(context), INVALID_CONTEXT);
    REFUSE_IF(context && !context->retained, CONTEXT_IS_DESTROYED);
    if (!context) {
        if (depth) depth--;
        return 0;
    }
    if (!depth) depth = 1;
    CURRENT = context;
    return 0;
}

API int cuCtxGetDevice(int *device) {
    ENTER_CURRENT;
    *device = CURRENT->device;
    return 0;
}

API int cuCtxSynchronize(void) {
    ENTER_CURRENT;
    run_context(CURRENT);
    return CURRENT->error;
}

API int cuCtxEnablePeerAccess(struct context *peer, unsigned flags) {
    ENTER_CURRENT;
    REFUSE_IF(flags, INVALID_VALUE);
    REFUSE_IF(!is_context(peer) || !peer->retained, INVALID_CONTEXT);
    REFUSE_IF(peer == CURRENT, INVALID_DEVICE);
    REFUSE_IF(setting("FAKE_CUDA_NO_PEER"), PEER_ACCESS_UNSUPPORTED);
    REFUSE_IF(CURRENT->peers[peer->device], PEER_ACCESS_ALREADY_ENABLED);
    CURRENT->peers[peer->device] = true;
    return 0;
}

/* ---- memory */

API int cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) {
    ENTER;
    struct memory *memory = find_memory(pointer);
    REFUSE_IF(!memory, INVALID_VALUE);
    bool on_host = memory->kind == PINNED || memory->kind == REGISTERED;
    switch (attribute) {
    case 1: memcpy(data, &memory->context, sizeof memory->context); return 0;
    case 2: memcpy(data, &(unsigned){on_host ? 1 : 2}, sizeof(unsigned)); return 0;
    case 6: *(unsigned char *)data = memory->ordered; return 0;
    case 7: memcpy(data, &memory->id, sizeof memory->id); return 0;
    case 8: *(unsigned char *)data = memory->kind == MANAGED; return 0;
    case 9: memcpy(data, &memory->device, sizeof memory->device); return 0;
    case 10: *(unsigned char *)data = memory->kind == DEVICE && !setting("FAKE_CUDA_NO_IPC"); return 0;
    case 11: memcpy(data, &memory->address, sizeof memory->address); return 0;
    case 12: memcpy(data, &memory->size, sizeof memory->size); return 0;
    case 13: *(unsigned char *)data = 1; return 0;
    case 14: memcpy(data, &memory->handle_types, sizeof memory->handle_types); return 0;
    default: return INVALID_VALUE;
    }
}

/* Not of VMM memory, as on an H100. */
API int cuPointerSetAttribute(const void *value, int attribute, uint64_t pointer) {
    ENTER;
    struct memory *memory = find_memory(pointer);
    REFUSE_IF(!memory || attribute != 6, INVALID_VALUE);
    REFUSE_IF(memory->kind != DEVICE, NOT_SUPPORTED);
    memory->ordered = *(const unsigned *)value != 0;
    return 0;
}

API int cuMemGetAddressRange_v2(uint64_t *base, size_t *size, uint64_t pointer) {
    ENTER_CURRENT;
    struct memory *memory = find_memory(pointer);
    REFUSE_IF(!memory || memory->kind == PINNED || memory->kind == REGISTERED, NOT_FOUND);
    if (base) *base = memory->address;
    if (size) *size = memory->size;
    return 0;
}

/* A dmabuf, or what passes for one: a descriptor of the same bytes, from the first one on. As on an H100: whole pages,
 * also around memory that does not fill them, and no mapping by PCIe (1), which is for GPUs with another way. */
API int cuMemGetHandleForAddressRange(void *handle, uint64_t address, size_t size, int type, unsigned long long flags) {
    ENTER_CURRENT;
    REFUSE_IF(type != 1 || flags > 1 || !size || address % PAGE || size % PAGE, INVALID_VALUE);
    REFUSE_IF(flags, NOT_SUPPORTED);
    struct memory *memory = find_memory(address);
    for (struct memory *other = memories; !memory && other; other = other->next) {
        if (other->address - address < PAGE) memory = other;
    }
    REFUSE_IF(!is_device_side(memory) || memory->kind == IMPORTED, INVALID_VALUE);
    REFUSE_IF(round_up(memory->address + memory->size, PAGE) - address < size, NOT_SUPPORTED);
    /* The caller takes the first byte of the range for the first of the descriptor. */
    REFUSE_IF(memory->offset + (address - memory->address), NOT_SUPPORTED);
    int fd = fcntl(memory->store->fd, F_DUPFD_CLOEXEC, 0);
    REFUSE_IF(fd < 0, OPERATING_SYSTEM);
    memcpy(handle, &fd, sizeof fd);
    return 0;
}

API int cuMemGetInfo_v2(size_t *available, size_t *total) {
    ENTER_CURRENT;
    *total = DEVICE_BYTES;
    *available = DEVICE_BYTES - bytes_of(CURRENT->device);
    return 0;
}

API int cuMemAlloc_v2(uint64_t *pointer, size_t size) {
    ENTER_CURRENT;
    REFUSE_IF(!size, INVALID_VALUE);
    REFUSE_IF(bytes_of(CURRENT->device) + size > DEVICE_BYTES, OUT_OF_MEMORY);
    /* CUDA cuts small ones from larger pieces, and so they do not begin where a page does. */
    uint64_t offset = size < GRANULARITY ? 512 : 0;
    struct store *store = add_store(-1, round_up(offset + size, PAGE), CURRENT->device);
    REFUSE_IF(!store, OUT_OF_MEMORY);
    uint64_t mapping_size;
    void *mapping = show(store, &mapping_size);
    if (!mapping) drop_store(store);
    REFUSE_IF(!mapping, OUT_OF_MEMORY);
    *pointer = round_up((uint64_t)mapping + 1, GRANULARITY) + offset;
    struct memory *memory = add_memory(DEVICE, *pointer, size, CURRENT, CURRENT->device);
    memory->store = store;
    memory->offset = offset;
    memory->mapping = mapping;
    memory->mapping_size = mapping_size;
    return 0;
}

API int cuMemAllocManaged(uint64_t *pointer, size_t size, unsigned flags) {
    ENTER_CURRENT;
    REFUSE_IF(!size || (flags != 1 && flags != 2), INVALID_VALUE);
    uint64_t mapping_size = round_up(size, PAGE);
    void *mapping = mmap(NULL, mapping_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    REFUSE_IF(mapping == NO_MAPPING, OUT_OF_MEMORY);
    struct memory *memory = add_memory(MANAGED, (uint64_t)mapping, size, CURRENT, CURRENT->device);
    memory->mapping = mapping;
    memory->mapping_size = mapping_size;
    *pointer = memory->address;
    return 0;
}

API int cuMemFree_v2(uint64_t pointer) {
    ENTER_CURRENT;
    if (!pointer) return 0;
    struct memory *memory = find_memory(pointer);
    REFUSE_IF(!memory || memory->address != pointer, INVALID_VALUE);
    REFUSE_IF(memory->kind != DEVICE && memory->kind != MANAGED, INVALID_VALUE);
    drop_memory(memory);
    return 0;
}

API int cuMemHostAlloc(void **pointer, size_t size, unsigned flags) {
    ENTER_CURRENT;
    REFUSE_IF(!size || flags > 7, INVALID_VALUE);
    uint64_t mapping_size = round_up(size, PAGE);
    void *mapping = mmap(NULL, mapping_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    REFUSE_IF(mapping == NO_MAPPING, OUT_OF_MEMORY);
    struct memory *memory = add_memory(PINNED, (uint64_t)mapping, size, CURRENT, CURRENT->device);
    memory->mapping = mapping;
    memory->mapping_size = mapping_size;
    *pointer = mapping;
    return 0;
}

API int cuMemFreeHost(void *pointer) {
    ENTER_CURRENT;
    struct memory *memory = find_memory((uint64_t)pointer);
    REFUSE_IF(!memory || memory->address != (uint64_t)pointer || memory->kind != PINNED, INVALID_VALUE);
    drop_memory(memory);
    return 0;
}

API int cuMemHostRegister_v2(void *pointer, size_t size, unsigned flags) {
    ENTER_CURRENT;
    uint64_t address = (uint64_t)pointer;
    REFUSE_IF(!pointer || !size || address + size < address || flags > 15, INVALID_VALUE);
    REFUSE_IF(touches(address, size), HOST_MEMORY_ALREADY_REGISTERED);
    add_memory(REGISTERED, address, size, CURRENT, CURRENT->device);
    return 0;
}

API int cuMemHostUnregister(void *pointer) {
    ENTER_CURRENT;
    struct memory *memory = find_memory((uint64_t)pointer);
    REFUSE_IF(!memory || memory->kind != REGISTERED, HOST_MEMORY_NOT_REGISTERED);
    REFUSE_IF(memory->address != (uint64_t)pointer, INVALID_VALUE);
    drop_memory(memory);
    return 0;
}

/* ---- virtual memory management */

API int cuMemGetAllocationGranularity(size_t *granularity, const struct properties *properties, int option) {
    ENTER;
    REFUSE_IF(properties->type != 1 || properties->location.type != 1 || option < 0 || option > 1, INVALID_VALUE);
    REFUSE_BAD_DEVICE(properties->location.id);
    *granularity = GRANULARITY;
    return 0;
}

API int cuMemCreate(uint64_t *handle, size_t size, const struct properties *properties, unsigned long long flags) {
    ENTER;
    REFUSE_IF(flags || properties->type != 1 || properties->location.type != 1, INVALID_VALUE);
    REFUSE_BAD_DEVICE(properties->location.id);
    REFUSE_IF(!size || size % GRANULARITY, INVALID_VALUE);
    REFUSE_IF(bytes_of(properties->location.id) + size > DEVICE_BYTES, OUT_OF_MEMORY);
    struct physical *physical = calloc(1, sizeof *physical);
    struct store *store = physical ? add_store(-1, size, properties->location.id) : NULL;
    if (!store) free(physical);
    REFUSE_IF(!store, OUT_OF_MEMORY);
    *physical = (struct physical){.next = physicals, .id = ++last_id, .store = store,
                                  .handle_types = (uint64_t)(unsigned)properties->handle_types};
    physicals = physical;
    *handle = physical->id;
    return 0;
}

/* The memory stays while it is mapped. */
API int cuMemRelease(uint64_t handle) {
    ENTER;
    for (struct physical **at = &physicals; *at; at = &(*at)->next)
        if ((*at)->id == handle) {
            struct physical *physical = *at;
            *at = physical->next;
            drop_store(physical->store);
            free(physical);
            return 0;
        }
    return INVALID_VALUE;
}

API int cuMemAddressReserve(uint64_t *pointer, size_t size, size_t alignment, uint64_t hint, unsigned long long flags) {
    ENTER;
    REFUSE_IF(flags || !size || size % GRANULARITY || (alignment & (alignment - 1)), INVALID_VALUE);
    if (alignment < GRANULARITY) alignment = GRANULARITY;
    struct reservation *reservation = calloc(1, sizeof *reservation);
    REFUSE_IF(!reservation, OUT_OF_MEMORY);
    /* There if it can be, anywhere otherwise. */
    const int flags_of_map = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    reservation->mapping = NO_MAPPING;
    reservation->mapping_size = size;
    if (hint && hint % alignment == 0)
        reservation->mapping = mmap((void *)hint, size, PROT_NONE, flags_of_map | MAP_FIXED_NOREPLACE, -1, 0);
    if (reservation->mapping == NO_MAPPING) {
        reservation->mapping_size = size + alignment;
        reservation->mapping = mmap(NULL, reservation->mapping_size, PROT_NONE, flags_of_map, -1, 0);
    }
    if (reservation->mapping == NO_MAPPING) {
        free(reservation);
        return OUT_OF_MEMORY;
    }
    reservation->address = round_up((uint64_t)reservation->mapping, alignment);
    reservation->size = size;
    reservation->next = reservations;
    reservations = reservation;
    *pointer = reservation->address;
    return 0;
}

API int cuMemAddressFree(uint64_t pointer, size_t size) {
    ENTER;
    REFUSE_IF(touches(pointer, size), INVALID_VALUE);
    for (struct reservation **at = &reservations; *at; at = &(*at)->next)
        if ((*at)->address == pointer && (*at)->size == size) {
            struct reservation *reservation = *at;
            *at = reservation->next;
            munmap(reservation->mapping, reservation->mapping_size);
            free(reservation);
            return 0;
        }
    return INVALID_VALUE;
}

API int cuMemMap(uint64_t pointer, size_t size, size_t offset, uint64_t handle, unsigned long long flags) {
    ENTER;
    REFUSE_IF(flags || offset || !size || size % GRANULARITY || pointer % GRANULARITY, INVALID_VALUE);
    struct reservation *reservation = reservations;
    while (reservation && (pointer < reservation->address ||
                           pointer - reservation->address + size > reservation->size))
        reservation = reservation->next;
    struct physical *physical = physicals;
    while (physical && physical->id != handle) physical = physical->next;
    REFUSE_IF(!reservation || !physical || size > physical->store->size || touches(pointer, size), INVALID_VALUE);
    void *place = (void *)pointer;
    void *mapped = mmap(place, size, device_protection(), MAP_SHARED | MAP_FIXED, physical->store->fd, 0);
    REFUSE_IF(mapped != place, MAP_FAILED);
    struct memory *memory = add_memory(MAPPED, pointer, size, NULL, physical->store->device);
    memory->store = physical->store;
    memory->store->users++;
    memory->handle_types = physical->handle_types;
    return 0;
}

API int cuMemUnmap(uint64_t pointer, size_t size) {
    ENTER;
    uint64_t end = pointer + size;
    /* Whole mappings only: look before anything is undone. */
    for (uint64_t at = pointer; at < end;) {
        struct memory *memory = find_memory(at);
        REFUSE_IF(!memory || memory->kind != MAPPED || memory->address != at || at + memory->size > end, INVALID_VALUE);
        at += memory->size;
    }
    while (pointer < end) {
        struct memory *memory = find_memory(pointer);
        mmap((void *)pointer, memory->size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
        pointer += memory->size;
        drop_memory(memory);
    }
    return 0;
}

API int cuMemSetAccess(uint64_t pointer, size_t size, const struct access *descriptors, size_t count) {
    ENTER;
    for (size_t i = 0; i < count; i++) {
        REFUSE_IF(descriptors[i].location.type != 1, INVALID_VALUE);
        REFUSE_BAD_DEVICE(descriptors[i].location.id);
    }
    for (uint64_t at = pointer; at < pointer + size;) {
        struct memory *memory = find_memory(at);
        REFUSE_IF(!memory || memory->kind != MAPPED || memory->address != at, INVALID_VALUE);
        for (size_t i = 0; i < count; i++) {
            int device = descriptors[i].location.id;
            REFUSE_IF(device != memory->device && setting("FAKE_CUDA_NO_PEER"), INVALID_DEVICE);
            memory->access &= ~(1u << device);
            if (descriptors[i].flags == 3) memory->access |= 1u << device;
        }
        at += memory->size;
    }
    return 0;
}

/* ---- copies */

API int cuMemcpyAsync(uint64_t to, uint64_t from, size_t size, void *stream) {
    ENTER_CURRENT;
    struct stream *in = find_stream(stream);
    REFUSE_IF(!in, INVALID_HANDLE);
    return copy(to, from, size, in, true);
}

static int copy_now(const char *function, uint64_t to, uint64_t from, size_t size) {
    __attribute__((cleanup(leave))) int entered = enter(function, true);
    if (entered) return entered;
    return copy(to, from, size, find_stream(NULL), false);
}

API int cuMemcpy(uint64_t to, uint64_t from, size_t size) { return copy_now(__func__, to, from, size); }

API int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t size) {
    return copy_now(__func__, to, (uint64_t)from, size);
}

API int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t size) { return copy_now(__func__, (uint64_t)to, from, size); }

API int cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t size) { return copy_now(__func__, to, from, size); }

static int set(uint64_t to, unsigned char value, size_t size, struct stream *stream) {
    struct memory *memory = find_memory(to);
    REFUSE_IF(!memory, INVALID_VALUE);
    REFUSE_IF(size && !covers(memory, to, size, CURRENT->device), INVALID_VALUE);
    if (size) enqueue(stream, (struct operation){.what = SET, .to = to, .size = size, .value = value});
    return 0;
}

/* Does not wait, either. */
API int cuMemsetD8_v2(uint64_t to, unsigned char value, size_t size) {
    ENTER_CURRENT;
    return set(to, value, size, find_stream(NULL));
}

API int cuMemsetD8Async(uint64_t to, unsigned char value, size_t size, void *stream) {
    ENTER_CURRENT;
    struct stream *in = find_stream(stream);
    REFUSE_IF(!in, INVALID_HANDLE);
    return set(to, value, size, in);
}

/* ---- streams and events */

API int cuStreamCreate(struct stream **stream, unsigned flags) {
    ENTER_CURRENT;
    REFUSE_IF(flags > 1, INVALID_VALUE);
    *stream = add_stream(CURRENT, false, flags == 0);
    return 0;
}

API int cuStreamDestroy_v2(struct stream *stream) {
    ENTER_CURRENT;
    stream = (uintptr_t)stream > 2 ? find_stream(stream) : NULL;
    REFUSE_IF(!stream, INVALID_HANDLE);
    run_stream(stream, stream->queued);
    struct stream **at = &streams;
    while (*at != stream) at = &(*at)->next;
    *at = stream->next;
    free(stream);
    return 0;
}

API int cuStreamSynchronize(void *stream) {
    ENTER_CURRENT;
    struct stream *in = find_stream(stream);
    REFUSE_IF(!in, INVALID_HANDLE);
    run_stream(in, in->queued);
    return CURRENT->error;
}

API int cuStreamQuery(void *stream) {
    ENTER_CURRENT;
    struct stream *in = find_stream(stream);
    REFUSE_IF(!in, INVALID_HANDLE);
    if (in->first && ++in->queries % 3) return NOT_READY;
    run_stream(in, in->queued);
    return CURRENT->error;
}

/* The caller's event; NULL if it is not one of the current context. */
static struct event *find_event(void *handle) {
    for (struct event *event = events; event; event = event->next)
        if (event == handle) return event->context == CURRENT ? event : NULL;
    return NULL;
}

API int cuEventCreate(struct event **event, unsigned flags) {
    ENTER_CURRENT;
    REFUSE_IF(flags > 7, INVALID_VALUE);
    *event = calloc(1, sizeof **event);
    REFUSE_IF(!*event, OUT_OF_MEMORY);
    **event = (struct event){.next = events, .context = CURRENT};
    events = *event;
    return 0;
}

API int cuEventDestroy_v2(struct event *event) {
    ENTER_CURRENT;
    event = find_event(event);
    REFUSE_IF(!event, INVALID_HANDLE);
    struct event **at = &events;
    while (*at != event) at = &(*at)->next;
    *at = event->next;
    free(event);
    return 0;
}

API int cuEventRecord(struct event *event, void *stream) {
    ENTER_CURRENT;
    struct stream *in = find_stream(stream);
    event = find_event(event);
    REFUSE_IF(!in || !event, INVALID_HANDLE);
    event->stream = in->id;
    event->number = in->queued;
    const char *late = getenv("FAKE_CUDA_LATE");
    event->queries = 0;
    event->ready_at = late ? (unsigned)atoi(late) : 3;
    return 0;
}

static void run_event(struct event *event) {
    struct stream *stream = event->stream ? stream_by_id(event->stream) : NULL;
    if (stream) run_stream(stream, event->number);
    event->stream = 0;
}

API int cuEventQuery(struct event *event) {
    ENTER_CURRENT;
    event = find_event(event);
    REFUSE_IF(!event, INVALID_HANDLE);
    if (event->stream && ++event->queries < event->ready_at) return NOT_READY;
    run_event(event);
    return CURRENT->error;
}

API int cuEventSynchronize(struct event *event) {
    ENTER_CURRENT;
    event = find_event(event);
    REFUSE_IF(!event, INVALID_HANDLE);
    run_event(event);
    return CURRENT->error;
}

/* The event may be of another context. */
API int cuStreamWaitEvent(void *stream, struct event *event, unsigned flags) {
    ENTER_CURRENT;
    struct stream *in = find_stream(stream);
    REFUSE_IF(!in || flags > 1, INVALID_HANDLE);
    struct event *known = events;
    while (known && known != event) known = known->next;
    REFUSE_IF(!known, INVALID_HANDLE);
    if (known->stream)
        enqueue(in, (struct operation){.what = AWAIT, .stream = known->stream, .number = known->number});
    return 0;
}

/* ---- between processes */

API int cuIpcGetMemHandle(char handle[64], uint64_t pointer) {
    ENTER_CURRENT;
    REFUSE_IF(setting("FAKE_CUDA_NO_IPC"), NOT_SUPPORTED);
    struct memory *memory = find_memory(pointer);
    REFUSE_IF(!memory || memory->kind != DEVICE, INVALID_VALUE);
    struct stat about;
    REFUSE_IF(fstat(memory->store->fd, &about) != 0, OPERATING_SYSTEM);
    struct ipc ipc = {.magic = "FAKECUD", .process = getpid(), .fd = memory->store->fd,
                      .device = physical_device[memory->device], .size = memory->size, .offset = memory->offset,
                      .inode = about.st_ino};
    memset(handle, 0, 64);
    memcpy(handle, &ipc, sizeof ipc);
    return 0;
}

struct handle { char bytes[64]; };

API int cuIpcOpenMemHandle_v2(uint64_t *pointer, struct handle handle, unsigned flags) {
    ENTER_CURRENT;
    REFUSE_IF(setting("FAKE_CUDA_NO_IPC"), NOT_SUPPORTED);
    struct ipc ipc;
    memcpy(&ipc, handle.bytes, sizeof ipc);
    REFUSE_IF(memcmp(ipc.magic, "FAKECUD", 8) != 0 || flags != 1, INVALID_VALUE);
    REFUSE_IF(ipc.process == getpid(), INVALID_CONTEXT);
    int device = 0;
    while (device < device_count && physical_device[device] != ipc.device) device++;
    REFUSE_BAD_DEVICE(device);
    REFUSE_IF(device != CURRENT->device && setting("FAKE_CUDA_NO_PEER"), PEER_ACCESS_UNSUPPORTED);
    for (struct memory *memory = memories; memory; memory = memory->next)
        if (memory->kind == IMPORTED && memory->inode == ipc.inode && memory->context == CURRENT) {
            memory->users++;
            *pointer = memory->address;
            return 0;
        }
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", ipc.process, ipc.fd);
    struct stat about;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    REFUSE_IF(fd < 0, MAP_FAILED);
    if (fstat(fd, &about) != 0 || about.st_ino != ipc.inode) { /* freed, and something else has its number */
        close(fd);
        return MAP_FAILED;
    }
    struct store *store = add_store(fd, (uint64_t)about.st_size, device);
    REFUSE_IF(!store, MAP_FAILED);
    uint64_t mapping_size;
    void *mapping = show(store, &mapping_size);
    if (!mapping) drop_store(store);
    REFUSE_IF(!mapping, MAP_FAILED);
    *pointer = round_up((uint64_t)mapping + 1, GRANULARITY) + ipc.offset;
    struct memory *memory = add_memory(IMPORTED, *pointer, ipc.size, CURRENT, device);
    memory->store = store;
    memory->offset = ipc.offset;
    memory->mapping = mapping;
    memory->mapping_size = mapping_size;
    memory->users = 1;
    memory->inode = ipc.inode;
    return 0;
}

API int cuIpcCloseMemHandle(uint64_t pointer) {
    ENTER_CURRENT;
    struct memory *memory = find_memory(pointer);
    REFUSE_IF(!memory || memory->kind != IMPORTED || memory->address != pointer || memory->context != CURRENT,
              INVALID_VALUE);
    if (!--memory->users) drop_memory(memory);
    return 0;
}

/* ---- for tests */

API void fake_cuda_fail(const char *text) {
    pthread_mutex_lock(&lock);
    read_rules(text);
    pthread_mutex_unlock(&lock);
}

API void fake_cuda_counts(struct fake_cuda_counts *out) {
    pthread_mutex_lock(&lock);
    *out = totals;
    for (int device = 0; device < MAX_DEVICES; device++) {
        out->contexts_created[device] = contexts[device].created;
        out->retained[device] = contexts[device].retained;
        out->device_bytes[device] = (int64_t)bytes_of(device);
    }
    for (struct memory *memory = memories; memory; memory = memory->next) {
        out->allocations++;
        out->imports += memory->kind == IMPORTED;
        if (memory->kind == PINNED || memory->kind == REGISTERED) out->pinned_bytes += (int64_t)memory->size;
    }
    for (struct stream *stream = streams; stream; stream = stream->next) out->streams += !stream->is_default;
    for (struct event *event = events; event; event = event->next) out->events++;
    pthread_mutex_unlock(&lock);
}
