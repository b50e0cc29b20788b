/* SPDX-License-Identifier: Apache-2.0
 *
 * The transport through mooncake_efa.h, as a C or C++ host uses it: threads that each submit a batch, wait
 * for it, and submit the next, over the same blocks of memory again and again. The requests are those of
 * `mooncake-efa bench`, so that the two can be compared.
 *
 * The program forks itself before it uses the library: the child is the target, the parent the initiator.
 * Settings are the library's own environment variables (MC_EFA_MERGE=0 keeps neighbours apart).
 */
#define _GNU_SOURCE
#include <mooncake_efa.h>

#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* Longest time that a batch may take. */
#define PATIENCE_NS UINT64_C(30000000000)

static const char *role = "initiator";

static _Noreturn void die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fprintf(stderr, "c_abi (%s): ", role);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(1);
}

#include "common.h"

static void check(int code, const char *what) {
    if (code != MEFA_CODE_OK)
        die("%s: %s (%d)", what, mefa_last_error(), code);
}

/* ---- options */

static struct {
    const char *provider;
    bool read;
    uint64_t size, batch, threads, duration, buffer;
    bool json;
} opt = {.provider = "efa", .size = 65536, .batch = 128, .threads = 1, .duration = 3};

static void usage(int status) {
    fprintf(status ? stderr : stdout,
            "c_abi: transfers through mooncake_efa.h between two processes of this host\n"
            "  --provider NAME      efa, tcp, shm, ... (efa)\n"
            "  --op write|read      (write)\n"
            "  --size BYTES         of one request (65536)\n"
            "  --batch N            requests of a batch; a thread has one under way (128)\n"
            "  --threads N          that submit (1)\n"
            "  --duration SECONDS   (3)\n"
            "  --buffer BYTES       of registered memory on each side (what the requests need)\n"
            "  --json               one JSON object instead of a line of text\n");
    exit(status);
}

static void parse(int argc, char **argv) {
    static const struct option names[] = {
        {"provider", required_argument, NULL, 'p'}, {"op", required_argument, NULL, 'o'},
        {"size", required_argument, NULL, 's'},     {"batch", required_argument, NULL, 'b'},
        {"threads", required_argument, NULL, 't'},  {"duration", required_argument, NULL, 'd'},
        {"buffer", required_argument, NULL, 'B'},   {"json", no_argument, NULL, 'j'},
        {"help", no_argument, NULL, 'h'},           {0},
    };
    int c;
    while ((c = getopt_long(argc, argv, "h", names, NULL)) != -1) {
        switch (c) {
        case 'p': opt.provider = optarg; break;
        case 'o': opt.read = is_read(optarg); break;
        case 's': opt.size = number(optarg, "size", UINT64_C(1) << 32); break;
        case 'b': opt.batch = number(optarg, "batch", 1 << 20); break;
        case 't': opt.threads = number(optarg, "threads", 4096); break;
        case 'd': opt.duration = number(optarg, "duration", 3600); break;
        case 'B': opt.buffer = number(optarg, "buffer", UINT64_C(1) << 46); break;
        case 'j': opt.json = true; break;
        case 'h': usage(0); break;
        default: usage(2);
        }
    }
    if (optind != argc)
        usage(2);
    uint64_t needed;
    if (__builtin_mul_overflow(opt.size * opt.batch, opt.threads, &needed) || needed > UINT64_C(1) << 46)
        die("--size x --batch x --threads is more memory than there is");
    if (opt.buffer < needed)
        opt.buffer = needed;
}

static uint64_t touched(void) { return opt.size * opt.batch * opt.threads; }

/* ---- what both sides do */

static unsigned char *map_memory(void) {
    void *memory = mmap(NULL, opt.buffer, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        die("mmap of %" PRIu64 " bytes: %s", opt.buffer, strerror(errno));
    return memory;
}

/* The source of the transfers holds the pattern, the destination other bytes: memory that was never
 * written is one page of zeros, which is read at a cache's speed. */
static void fill(unsigned char *memory, bool source) {
    for (uint64_t i = 0; i < touched(); i++)
        memory[i] = source ? pattern(0, i) : (unsigned char)~pattern(0, i);
}

static mefa_transport install(const char *name) {
    mefa_config config = {.size = sizeof config, .server_name = name, .provider = opt.provider};
    mefa_transport transport;
    check(mefa_install(&config, &transport), "mefa_install");
    return transport;
}

/* ---- target */

static void put_text(void *context, const char *text, size_t length) {
    uint64_t size = length + 1;
    put(*(int *)context, &size, sizeof size);
    put(*(int *)context, text, size);
}

static void run_target(int fd) {
    role = "target";
    /* On an emulated EFA device the other side is another host. */
    setenv("SOFTEFA_HOST", "1", 1);
    mefa_transport transport = install("target:1");
    unsigned char *memory = map_memory();
    fill(memory, opt.read);
    check(mefa_register(transport, memory, opt.buffer, NULL, NULL, NULL), "mefa_register");
    uint64_t address = (uintptr_t)memory;
    put(fd, &address, sizeof address);
    check(mefa_descriptor_json(transport, put_text, &fd), "mefa_descriptor_json");

    char word;
    double cpu;
    for (int i = 0; i < 2; i++) { /* when the measurement begins, and when it is over */
        get(fd, &word, 1);
        cpu = seconds_of(CLOCK_PROCESS_CPUTIME_ID);
        put(fd, &cpu, sizeof cpu);
    }
    if (!opt.read)
        verify(memory, touched(), 0);
    put(fd, &word, 1);
    get(fd, &word, 1);
    check(mefa_uninstall(transport), "mefa_uninstall");
}

/* ---- initiator */

static struct {
    mefa_transport transport;
    mefa_segment target;
    uint64_t local, remote;
    pthread_barrier_t warm;
    atomic_bool stop;
} run;

struct worker {
    pthread_t thread;
    uint64_t index, done;
};

static void batch(const mefa_request *requests) {
    mefa_batch batch;
    int32_t status;
    check(mefa_batch_allocate(run.transport, opt.batch, &batch), "mefa_batch_allocate");
    check(mefa_submit(run.transport, batch, requests, opt.batch, PATIENCE_NS), "mefa_submit");
    check(mefa_wait(run.transport, batch, 2 * PATIENCE_NS, &status), "mefa_wait");
    if (status != MEFA_STATUS_COMPLETED)
        die("a batch ended with status %d", status);
    check(mefa_batch_free(run.transport, batch), "mefa_batch_free");
}

static void *work(void *context) {
    struct worker *worker = context;
    mefa_request *requests = calloc(opt.batch, sizeof *requests);
    if (!requests)
        die("out of memory");
    /* Blocks of all threads alternate, as in transfer_engine_bench. */
    for (uint64_t i = 0; i < opt.batch; i++) {
        uint64_t offset = (i * opt.threads + worker->index) * opt.size;
        requests[i] = (mefa_request){
            .opcode = opt.read ? MEFA_READ : MEFA_WRITE,
            .source = run.local + offset,
            .target = run.target,
            .offset = run.remote + offset,
            .length = opt.size,
        };
    }
    batch(requests); /* connections and first-use costs are not what is measured */
    pthread_barrier_wait(&run.warm);
    pthread_barrier_wait(&run.warm); /* the clock runs */
    while (!atomic_load_explicit(&run.stop, memory_order_relaxed)) {
        batch(requests);
        worker->done += opt.batch;
    }
    free(requests);
    return NULL;
}

static double target_cpu(int fd) {
    double cpu;
    put(fd, "", 1);
    get(fd, &cpu, sizeof cpu);
    return cpu;
}

static void run_initiator(int fd) {
    run.transport = install("initiator:1");
    unsigned char *memory = map_memory();
    fill(memory, !opt.read);
    check(mefa_register(run.transport, memory, opt.buffer, NULL, NULL, NULL), "mefa_register");
    run.local = (uintptr_t)memory;
    get(fd, &run.remote, sizeof run.remote);
    uint64_t length;
    get(fd, &length, sizeof length);
    char *descriptor = malloc(length);
    if (!descriptor)
        die("out of memory");
    get(fd, descriptor, length);
    check(mefa_segment_open_json(run.transport, descriptor, &run.target), "mefa_segment_open_json");
    free(descriptor);

    struct worker *workers = calloc(opt.threads, sizeof *workers);
    if (!workers)
        die("out of memory");
    pthread_barrier_init(&run.warm, NULL, (unsigned)opt.threads + 1);
    for (uint64_t i = 0; i < opt.threads; i++) {
        workers[i].index = i;
        int error = pthread_create(&workers[i].thread, NULL, work, &workers[i]);
        if (error)
            die("pthread_create: %s", strerror(error));
    }
    pthread_barrier_wait(&run.warm);
    double their_cpu = target_cpu(fd);
    double cpu = seconds_of(CLOCK_PROCESS_CPUTIME_ID), start = seconds_of(CLOCK_MONOTONIC);
    pthread_barrier_wait(&run.warm);
    sleep((unsigned)opt.duration);
    atomic_store(&run.stop, true);
    uint64_t done = 0;
    for (uint64_t i = 0; i < opt.threads; i++) {
        pthread_join(workers[i].thread, NULL);
        done += workers[i].done;
    }
    double seconds = seconds_of(CLOCK_MONOTONIC) - start;
    cpu = seconds_of(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    their_cpu = target_cpu(fd) - their_cpu;
    char word;
    get(fd, &word, 1); /* the target has looked at what was written */
    if (opt.read)
        verify(memory, touched(), 0);

    double ops = (double)done / seconds, bytes = ops * (double)opt.size;
    const char *operation = opt.read ? "read" : "write";
    if (opt.json)
        printf("{\"provider\": \"%s\", \"operation\": \"%s\", \"block_size\": %" PRIu64
               ", \"batch_size\": %" PRIu64 ", \"threads\": %" PRIu64 ", \"seconds\": %.6f, \"ops\": %" PRIu64
               ", \"ops_per_s\": %.3f, \"bytes_per_s\": %.3f, \"initiator_cpu_s\": %.6f, "
               "\"target_cpu_s\": %.6f, \"verified_bytes\": %" PRIu64 "}\n",
               opt.provider, operation, opt.size, opt.batch, opt.threads, seconds, done, ops, bytes, cpu,
               their_cpu, touched());
    else
        printf("%s of %" PRIu64 " bytes, batches of %" PRIu64 ", %" PRIu64 " threads: %.0f op/s, %.3f GB/s; "
               "%" PRIu64 " bytes verified\n",
               operation, opt.size, opt.batch, opt.threads, ops, bytes * 1e-9, touched());
    free(workers);
    check(mefa_segment_close(run.transport, run.target), "mefa_segment_close");
    check(mefa_uninstall(run.transport), "mefa_uninstall");
    put(fd, "", 1);
}

int main(int argc, char **argv) {
    parse(argc, argv);
    int fds[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, fds) < 0)
        die("socketpair: %s", strerror(errno));
    pid_t parent = getpid(), child = fork();
    if (child < 0)
        die("fork: %s", strerror(errno));
    /* Neither side outlives a hang. Alarms are not inherited: each sets its own. */
    alarm((unsigned)opt.duration + 90);
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent) /* it died before that call */
            return 1;
        close(fds[0]);
        run_target(fds[1]);
        return 0;
    }
    close(fds[1]);
    run_initiator(fds[0]);
    int status;
    if (waitpid(child, &status, 0) != child || !WIFEXITED(status) || WEXITSTATUS(status) != 0)
        die("the target did not end well");
    return 0;
}
