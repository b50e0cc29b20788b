/* SPDX-License-Identifier: Apache-2.0
 *
 * The yardstick for GPU memory: plain copies by the CUDA driver. bench/gpu asks for them, line by line on standard
 * input, so that they alternate with what is measured against them and CUDA is started once:
 *
 *   info                             what GPUs and which CUDA there is
 *   copy FROM TO SIZE BATCH SECONDS  FROM and TO: host (pinned), or a GPU's number
 *   quit
 *
 * Each is answered by a line of JSON. A copy moves BATCH blocks of SIZE bytes that lie one after the other, waits, and
 * does it again, in each of these ways for its share of SECONDS; the best one is the answer:
 *   blocks  one cuMemcpyAsync a block
 *   large   one for all of them
 * and between two GPUs each of them in a stream of the one and of the other.
 *
 * Needs no CUDA to be compiled: cc -O2 -o gpu_copy gpu_copy.c -ldl
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Of cuda.h. */
static int (*cuInit)(unsigned);
static int (*cuGetErrorName)(int, const char **);
static int (*cuDriverGetVersion)(int *);
static int (*cuDeviceGetCount)(int *);
static int (*cuDeviceGet)(int *, int);
static int (*cuDeviceGetName)(char *, int, int);
static int (*cuDevicePrimaryCtxRetain)(void **, int);
static int (*cuDeviceCanAccessPeer)(int *, int, int);
static int (*cuCtxSetCurrent)(void *);
static int (*cuCtxEnablePeerAccess)(void *, unsigned);
static int (*cuMemAlloc)(uint64_t *, size_t);
static int (*cuMemFree)(uint64_t);
static int (*cuMemHostAlloc)(void **, size_t, unsigned);
static int (*cuMemFreeHost)(void *);
static int (*cuMemcpyAsync)(uint64_t, uint64_t, size_t, void *);
static int (*cuStreamCreate)(void **, unsigned);
static int (*cuStreamSynchronize)(void *);

#define MAX_GPUS 16
#define HOST (-1)
#define PEER_ACCESS_ALREADY_ENABLED 704
#define PORTABLE 1
#define NON_BLOCKING 1

static struct gpu {
    void *context, *stream;
    int introduced[MAX_GPUS];
} gpus[MAX_GPUS];
static int gpu_count;
static char *pinned;
static size_t pinned_size;

static _Noreturn void die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fputs("gpu_copy: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(1);
}

static void check(int ret, const char *what) {
    const char *name = NULL;
    if (ret)
        die("%s: %s (%d)", what, cuGetErrorName(ret, &name) == 0 && name ? name : "an unknown error", ret);
}

static void load(void) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    if (!library)
        die("no CUDA on this host: %s", dlerror());
    const struct {
        const char *name;
        void *function;
    } wanted[] = {
        {"cuInit", &cuInit},
        {"cuGetErrorName", &cuGetErrorName},
        {"cuDriverGetVersion", &cuDriverGetVersion},
        {"cuDeviceGetCount", &cuDeviceGetCount},
        {"cuDeviceGet", &cuDeviceGet},
        {"cuDeviceGetName", &cuDeviceGetName},
        {"cuDevicePrimaryCtxRetain", &cuDevicePrimaryCtxRetain},
        {"cuDeviceCanAccessPeer", &cuDeviceCanAccessPeer},
        {"cuCtxSetCurrent", &cuCtxSetCurrent},
        {"cuCtxEnablePeerAccess", &cuCtxEnablePeerAccess},
        {"cuMemAlloc_v2", &cuMemAlloc},
        {"cuMemFree_v2", &cuMemFree},
        {"cuMemHostAlloc", &cuMemHostAlloc},
        {"cuMemFreeHost", &cuMemFreeHost},
        {"cuMemcpyAsync", &cuMemcpyAsync},
        {"cuStreamCreate", &cuStreamCreate},
        {"cuStreamSynchronize", &cuStreamSynchronize},
    };
    for (size_t i = 0; i < sizeof(wanted) / sizeof(*wanted); i++) {
        void *symbol = dlsym(library, wanted[i].name);
        if (!symbol)
            die("the CUDA driver lacks %s", wanted[i].name);
        memcpy(wanted[i].function, &symbol, sizeof(symbol));
    }
    check(cuInit(0), "cuInit");
    check(cuDeviceGetCount(&gpu_count), "cuDeviceGetCount");
    if (gpu_count > MAX_GPUS)
        gpu_count = MAX_GPUS;
}

/* Makes a GPU's context current; only those that are asked for get one. */
static struct gpu *enter(int number) {
    struct gpu *gpu = &gpus[number];
    if (!gpu->context) {
        int device;
        check(cuDeviceGet(&device, number), "cuDeviceGet");
        check(cuDevicePrimaryCtxRetain(&gpu->context, device), "cuDevicePrimaryCtxRetain");
        check(cuCtxSetCurrent(gpu->context), "cuCtxSetCurrent");
        check(cuStreamCreate(&gpu->stream, NON_BLOCKING), "cuStreamCreate");
    }
    check(cuCtxSetCurrent(gpu->context), "cuCtxSetCurrent");
    return gpu;
}

/* Lets GPU `one` get at the memory of the other, where it can. */
static int introduce(int one, int other) {
    int device, peer, can = 0;
    struct gpu *gpu = &gpus[one];
    check(cuDeviceGet(&device, one), "cuDeviceGet");
    check(cuDeviceGet(&peer, other), "cuDeviceGet");
    check(cuDeviceCanAccessPeer(&can, device, peer), "cuDeviceCanAccessPeer");
    if (can && !gpu->introduced[other]) {
        void *context = enter(other)->context;
        enter(one);
        int ret = cuCtxEnablePeerAccess(context, 0);
        if (ret != PEER_ACCESS_ALREADY_ENABLED)
            check(ret, "cuCtxEnablePeerAccess");
        gpu->introduced[other] = 1;
    }
    return can;
}

static uint64_t allocate(int where, size_t size) {
    if (where != HOST) {
        uint64_t address;
        enter(where);
        check(cuMemAlloc(&address, size), "cuMemAlloc");
        return address;
    }
    /* To lock memory takes its time, so it is kept. */
    if (pinned_size < size) {
        if (pinned)
            check(cuMemFreeHost(pinned), "cuMemFreeHost");
        check(cuMemHostAlloc((void **)&pinned, size, PORTABLE), "cuMemHostAlloc");
        memset(pinned, 1, size);
        pinned_size = size;
    }
    return (uintptr_t)pinned;
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

/* Bytes a second. */
static double rate(struct gpu *gpu, uint64_t to, uint64_t from, size_t size, size_t count, double seconds) {
    double start = 0, passed;
    size_t turns = 0;
    check(cuCtxSetCurrent(gpu->context), "cuCtxSetCurrent");
    do {
        for (size_t i = 0; i < count; i++)
            check(cuMemcpyAsync(to + i * size, from + i * size, size, gpu->stream), "cuMemcpyAsync");
        check(cuStreamSynchronize(gpu->stream), "cuStreamSynchronize");
        if (start == 0) /* the first one only warms up */
            start = now();
        else
            turns++;
        passed = now() - start;
    } while (passed < seconds || turns == 0);
    return (double)turns * (double)size * (double)count / passed;
}

static void copy(int from, int to, size_t size, size_t batch, double seconds) {
    if (from == HOST && to == HOST)
        die("a copy from host to host is none of CUDA's");
    uint64_t source = allocate(from, size * batch), target = allocate(to, size * batch);
    int peers = 1;
    if (from != HOST && to != HOST && from != to) {
        peers = introduce(from, to);
        peers &= introduce(to, from);
    }
    double best = 0;
    const char *separator = "";
    int streams[2] = {from != HOST ? from : to, to}, both = from != HOST && to != HOST && from != to;
    printf("{\"ways\": {");
    for (int stream = 0; stream <= both; stream++) {
        for (int large = 0; large <= 1; large++) {
            struct gpu *gpu = enter(streams[stream]);
            double found = rate(gpu, target, source, large ? size * batch : size, large ? 1 : batch,
                                seconds / (both ? 4 : 2));
            printf("%s\"%s, stream of GPU %d\": %.0f", separator, large ? "large" : "blocks", streams[stream], found);
            separator = ", ";
            best = found > best ? found : best;
        }
    }
    printf("}, \"peer_access\": %s, \"bytes_per_s\": %.0f}\n", peers ? "true" : "false", best);
    if (from != HOST) {
        enter(from);
        check(cuMemFree(source), "cuMemFree");
    }
    if (to != HOST) {
        enter(to);
        check(cuMemFree(target), "cuMemFree");
    }
}

static void info(void) {
    int version = 0;
    check(cuDriverGetVersion(&version), "cuDriverGetVersion");
    printf("{\"cuda\": \"%d.%d\", \"gpus\": [", version / 1000, version % 1000 / 10);
    for (int i = 0; i < gpu_count; i++) {
        int device;
        char name[256] = "";
        check(cuDeviceGet(&device, i), "cuDeviceGet");
        check(cuDeviceGetName(name, sizeof(name), device), "cuDeviceGetName");
        for (char *c = name; *c; c++) /* nothing that JSON would not take */
            if (*c < ' ' || *c > '~' || *c == '"' || *c == '\\')
                *c = '?';
        printf("%s\"%s\"", i ? ", " : "", name);
    }
    printf("]}\n");
}

static int place(const char *text) {
    if (strcmp(text, "host") == 0)
        return HOST;
    char *end;
    long number = strtol(text, &end, 10);
    if (end == text || *end || number < 0 || number >= gpu_count)
        die("%s is neither host nor one of %d GPUs", text, gpu_count);
    return (int)number;
}

int main(void) {
    char line[256], from[32], to[32];
    size_t size, batch;
    double seconds;
    load();
    while (fgets(line, sizeof(line), stdin)) {
        if (strcmp(line, "info\n") == 0)
            info();
        else if (sscanf(line, "copy %31s %31s %zu %zu %lf", from, to, &size, &batch, &seconds) == 5 && size && batch &&
                 size <= SIZE_MAX / batch)
            copy(place(from), place(to), size, batch, seconds);
        else if (strcmp(line, "quit\n") == 0)
            break;
        else
            die("not understood: %s", line);
        fflush(stdout);
    }
    return 0;
}
