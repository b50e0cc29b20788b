/* SPDX-License-Identifier: Apache-2.0
 *
 * The yardstick: the plainest loop that moves memory over libfabric. Two processes, one endpoint
 * each, one buffer each; the initiator keeps a fixed number of operations in flight and does
 * nothing else. What a library on top of libfabric adds can be read off against this.
 *
 * Several loops are threads of the one initiator, each on a device, with libfabric objects and a
 * buffer of its own; nothing is shared between them. The one target has an endpoint and a buffer
 * for each, and one thread that polls all: operations that the device executes need nothing of it.
 *
 * The program forks itself before it touches libfabric: the child is the target, the parent the
 * initiator. They exchange what they need over a socket pair.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>

static const char *role = "raw_rma";
static pthread_t main_thread;
static atomic_bool failed;

/* Ends the program, with one message however many loops fail. A loop's thread only ends itself:
 * libfabric cleans up in exit(), when no other loop may be using it. */
static _Noreturn void die(const char *format, ...) {
    if (!atomic_exchange(&failed, true)) {
        va_list args;
        va_start(args, format);
        fprintf(stderr, "raw_rma (%s): ", role);
        vfprintf(stderr, format, args);
        fputc('\n', stderr);
        va_end(args);
    }
    if (!pthread_equal(pthread_self(), main_thread))
        pthread_exit(NULL);
    exit(1);
}

#include "common.h"

/* For calls that return 0 or a negative libfabric error. */
static void check(ssize_t ret, const char *what) {
    if (ret < 0)
        die("%s: %s", what, fi_strerror((int)-ret));
}

static void on_alarm(int signal) {
    (void)signal;
    static const char text[] = "raw_rma: no end in sight, giving up\n";
    if (write(2, text, sizeof(text) - 1) < 0)
        _exit(4);
    _exit(3);
}

/* Set when the child ends. Before the last message that is too early, and the operations in flight
 * to it might never complete. */
static volatile sig_atomic_t child_ended;

static void on_child(int signal) {
    (void)signal;
    child_ended = 1;
}

/* ---- options */

static struct {
    const char *provider;
    bool read;
    size_t size;
    size_t window;
    double duration;
    size_t buffer;
    char **devices; /* of each loop; NULL: the provider's first */
    size_t loops;
    bool delivery;
    const char *fabric; /* of the initiator, where the provider is efa */
    size_t more;        /* posts a doorbell, where that can be asked for */
    bool json;
} opt = {
    .provider = "shm",
    .size = 65536,
    .window = 64,
    .duration = 3,
    .buffer = 64 << 20,
    .devices = (char *[]){NULL},
    .loops = 1,
    .delivery = true,
    .fabric = "efa",
    .more = 1,
};

static void usage(int status) {
    fprintf(status ? stderr : stdout,
            "raw_rma: a plain libfabric RMA loop between two processes of this host\n"
            "  --provider NAME      shm, tcp, sockets, efa, ... (shm)\n"
            "  --op write|read      (write)\n"
            "  --size BYTES         of one operation (65536)\n"
            "  --window N           operations in flight of a loop (64)\n"
            "  --duration SECONDS   (3)\n"
            "  --buffer BYTES       memory that a loop's operations walk through (67108864)\n"
            "  --devices A[,B,...]  domains; one loop on each, all at the same time (the first)\n"
            "  --complete delivery|transmit   when a write counts as done (delivery)\n"
            "  --fabric NAME        the initiator's, with provider efa: efa or efa-direct (efa)\n"
            "  --more N             FI_MORE on all but each Nth post and the last before a poll (1)\n"
            "  --json               one JSON object instead of a line of text\n");
    exit(status);
}

static void parse_devices(char *names) {
    opt.devices = NULL;
    opt.loops = 0;
    for (char *name = strtok(names, ","); name; name = strtok(NULL, ",")) {
        opt.devices = realloc(opt.devices, (opt.loops + 1) * sizeof(*opt.devices));
        if (!opt.devices)
            die("out of memory");
        opt.devices[opt.loops++] = name;
    }
    if (!opt.loops)
        die("--devices: at least one name");
}

static void parse(int argc, char **argv) {
    static const struct option names[] = {
        {"provider", required_argument, NULL, 'p'}, {"op", required_argument, NULL, 'o'},
        {"size", required_argument, NULL, 's'},     {"window", required_argument, NULL, 'w'},
        {"duration", required_argument, NULL, 'd'}, {"buffer", required_argument, NULL, 'b'},
        {"devices", required_argument, NULL, 'D'},  {"complete", required_argument, NULL, 'c'},
        {"fabric", required_argument, NULL, 'f'},   {"more", required_argument, NULL, 'm'},
        {"json", no_argument, NULL, 'j'},           {"help", no_argument, NULL, 'h'},
        {0},
    };
    int c;
    while ((c = getopt_long(argc, argv, "h", names, NULL)) != -1) {
        switch (c) {
        case 'p': opt.provider = optarg; break;
        case 'o': opt.read = is_read(optarg); break;
        case 's': opt.size = number(optarg, "size", SIZE_MAX); break;
        case 'w': opt.window = number(optarg, "window", SIZE_MAX); break;
        case 'd':
            opt.duration = strtod(optarg, NULL);
            if (!(opt.duration > 0 && opt.duration <= 3600))
                die("--duration: seconds, more than 0, at most 3600");
            break;
        case 'b': opt.buffer = number(optarg, "buffer", SIZE_MAX); break;
        case 'D': parse_devices(optarg); break;
        case 'c':
            if (strcmp(optarg, "delivery") && strcmp(optarg, "transmit"))
                die("--complete: delivery or transmit");
            opt.delivery = !strcmp(optarg, "delivery");
            break;
        case 'f': opt.fabric = optarg; break;
        case 'm': opt.more = number(optarg, "more", SIZE_MAX); break;
        case 'j': opt.json = true; break;
        case 'h': usage(0); break;
        default: usage(2);
        }
    }
    if (optind != argc)
        usage(2);
    /* Whole blocks only, and never two operations in flight on one block. */
    opt.buffer = opt.buffer / opt.size * opt.size;
    if (opt.buffer < opt.size * opt.window)
        opt.buffer = opt.size * opt.window;
}

/* ---- one side of a loop: its libfabric objects and its buffer */

struct side {
    struct fi_info *info;
    struct fid_fabric *fabric;
    struct fid_domain *domain;
    struct fid_av *av;
    struct fid_cq *cq;
    struct fid_ep *ep;
    struct fid_mr *mr;
    unsigned char *buffer;
    void *desc;
};

/* What each side tells the other. */
struct hello {
    uint64_t key;
    uint64_t base;
    uint64_t address_len;
    unsigned char address[512];
};

static struct fi_info *get_info(const char *provider, const char *device, const char *fabric) {
    struct fi_info *hints = fi_allocinfo();
    if (!hints)
        die("fi_allocinfo: out of memory");
    hints->caps = FI_MSG | FI_RMA;
    hints->mode = FI_CONTEXT | FI_CONTEXT2;
    hints->ep_attr->type = FI_EP_RDM;
    hints->domain_attr->threading = FI_THREAD_DOMAIN;
    hints->domain_attr->mr_mode =
        FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY | FI_MR_ENDPOINT;
    hints->domain_attr->av_type = FI_AV_TABLE;
    hints->tx_attr->op_flags = opt.delivery ? FI_DELIVERY_COMPLETE : FI_TRANSMIT_COMPLETE;
    hints->fabric_attr->prov_name = strdup(provider);
    if (strcmp(provider, "efa") == 0)
        hints->fabric_attr->name = strdup(fabric);
    hints->domain_attr->name = device ? strdup(device) : NULL;

    /* The older of what we were compiled against and what is loaded: both understand that. */
    uint32_t compiled = FI_VERSION(FI_MAJOR_VERSION, FI_MINOR_VERSION);
    uint32_t version = fi_version() < compiled ? fi_version() : compiled;
    struct fi_info *all = NULL;
    int ret = fi_getinfo(version, NULL, NULL, 0, hints, &all);
    fi_freeinfo(hints);
    if (ret == -FI_ENODATA)
        return NULL;
    check(ret, "fi_getinfo");
    /* Some providers offer other domains than the one asked for. */
    struct fi_info *info = all;
    while (device && info && strcmp(info->domain_attr->name, device))
        info = info->next;
    info = info ? fi_dupinfo(info) : NULL;
    fi_freeinfo(all);
    return info;
}

static void open_side(struct side *s, const char *device, bool target) {
    /* The target's is the one that C++ peers know. */
    const char *fabric = target ? "efa" : opt.fabric;
    s->info = get_info(opt.provider, device, fabric);
    if (!s->info && !strcmp(opt.provider, "tcp")) {
        /* Before 1.18 the tcp provider had no RDM endpoints of its own. */
        s->info = get_info("tcp;ofi_rxm", device, fabric);
    }
    if (!s->info)
        die("provider '%s' with reliable datagrams and RMA%s%s not found%s",
            opt.provider, device ? " on domain " : "", device ? device : "",
            device ? "; `fi_info` lists domains" : "");

    struct fi_info *info = s->info;
    /* Both queues of the endpoint end in one completion queue that may not overflow. */
    if (info->tx_attr->size && info->tx_attr->size < opt.window)
        opt.window = info->tx_attr->size;
    info->tx_attr->op_flags = opt.delivery ? FI_DELIVERY_COMPLETE : FI_TRANSMIT_COMPLETE;

    check(fi_fabric(info->fabric_attr, &s->fabric, NULL), "fi_fabric");
    check(fi_domain(s->fabric, info, &s->domain, NULL), "fi_domain");
    struct fi_av_attr av_attr = {.type = FI_AV_TABLE, .count = 2};
    check(fi_av_open(s->domain, &av_attr, &s->av, NULL), "fi_av_open");
    struct fi_cq_attr cq_attr = {
        .size = info->tx_attr->size + info->rx_attr->size + opt.window,
        .format = FI_CQ_FORMAT_CONTEXT,
        .wait_obj = FI_WAIT_NONE,
    };
    check(fi_cq_open(s->domain, &cq_attr, &s->cq, NULL), "fi_cq_open");
    check(fi_endpoint(s->domain, info, &s->ep, NULL), "fi_endpoint");
    check(fi_ep_bind(s->ep, &s->av->fid, 0), "fi_ep_bind(av)");
    check(fi_ep_bind(s->ep, &s->cq->fid, FI_TRANSMIT | FI_RECV), "fi_ep_bind(cq)");
    check(fi_enable(s->ep), "fi_enable");

    s->buffer = mmap(NULL, opt.buffer, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (s->buffer == MAP_FAILED)
        die("mmap of %zu bytes: %s", opt.buffer, strerror(errno));
    int mode = info->domain_attr->mr_mode;
    if (target || (mode & FI_MR_LOCAL)) {
        uint64_t access = target ? FI_REMOTE_READ | FI_REMOTE_WRITE : FI_READ | FI_WRITE;
        uint64_t key = mode & FI_MR_PROV_KEY ? 0 : 0x5eed;
        check(fi_mr_reg(s->domain, s->buffer, opt.buffer, access, 0, key, 0, &s->mr, NULL),
              "fi_mr_reg");
        if (mode & FI_MR_ENDPOINT) {
            check(fi_mr_bind(s->mr, &s->ep->fid, 0), "fi_mr_bind");
            check(fi_mr_enable(s->mr), "fi_mr_enable");
        }
        s->desc = fi_mr_desc(s->mr);
    }
}

static void close_side(struct side *s) {
    struct fid *all[] = {
        s->ep ? &s->ep->fid : NULL,         s->mr ? &s->mr->fid : NULL,
        s->cq ? &s->cq->fid : NULL,         s->av ? &s->av->fid : NULL,
        s->domain ? &s->domain->fid : NULL, s->fabric ? &s->fabric->fid : NULL,
    };
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++)
        if (all[i])
            fi_close(all[i]);
    fi_freeinfo(s->info);
}

/* Reads what has completed; never waits. */
static size_t poll_cq(struct side *s, struct fi_cq_entry *entries, size_t count) {
    ssize_t ret = fi_cq_read(s->cq, entries, count);
    if (ret >= 0)
        return (size_t)ret;
    if (ret == -FI_EAGAIN)
        return 0;
    if (ret == -FI_EAVAIL) {
        struct fi_cq_err_entry error = {0};
        if (fi_cq_readerr(s->cq, &error, 0) == 1)
            die("operation failed: %s (%s)", fi_strerror(error.err),
                fi_cq_strerror(s->cq, error.prov_errno, error.err_data, NULL, 0));
    }
    die("fi_cq_read: %s", fi_strerror((int)-ret));
}

/* ---- the conversation over the socket pair */

/* Like get, but keeps the provider going: one that makes progress only when asked would otherwise
 * leave the other side waiting. */
static void get_polling(int fd, void *data, size_t len, struct side *sides) {
    struct fi_cq_entry entries[16];
    for (;;) {
        for (int i = 0; i < 256; i++)
            for (size_t j = 0; j < opt.loops; j++)
                poll_cq(&sides[j], entries, 16);
        ssize_t ret = recv(fd, data, len, MSG_DONTWAIT | MSG_PEEK);
        if (ret == 0)
            exit(1); /* the parent died */
        if (ret == (ssize_t)len)
            break;
    }
    get(fd, data, len);
}

static struct hello exchange(int fd, struct side *s) {
    struct hello mine = {.address_len = sizeof(mine.address)}, other;
    if (s->mr) {
        mine.key = fi_mr_key(s->mr);
        mine.base = s->info->domain_attr->mr_mode & FI_MR_VIRT_ADDR ? (uintptr_t)s->buffer : 0;
    }
    size_t len = sizeof(mine.address);
    check(fi_getname(&s->ep->fid, mine.address, &len), "fi_getname");
    mine.address_len = len;
    put(fd, &mine, sizeof(mine));
    get(fd, &other, sizeof(other));
    return other;
}

static fi_addr_t insert(struct side *s, const struct hello *other) {
    fi_addr_t address = FI_ADDR_UNSPEC;
    if (fi_av_insert(s->av, other->address, 1, &address, 0, NULL) != 1)
        die("fi_av_insert: address refused");
    return address;
}

/* ---- what the memory must hold afterwards */

static void fill(unsigned char *buffer, size_t len, size_t loop) {
    for (size_t i = 0; i < len; i++)
        buffer[i] = pattern(loop, i);
}

static void *allocate(size_t count, size_t size) {
    void *memory = calloc(count, size);
    if (!memory)
        die("out of memory");
    return memory;
}

/* ---- target */

static void run_target(int fd, pid_t parent) {
    role = "target";
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) /* it died before that call */
        exit(1);

    /* On an emulated EFA device the other side is another host. */
    setenv("SOFTEFA_HOST", "1", 1);
    struct side *sides = allocate(opt.loops, sizeof(*sides));
    for (size_t i = 0; i < opt.loops; i++) {
        open_side(&sides[i], opt.devices[i], true);
        if (opt.read)
            fill(sides[i].buffer, opt.buffer, i);
        struct hello initiator = exchange(fd, &sides[i]);
        insert(&sides[i], &initiator);
    }

    /* An initiator on efa-direct may start only when its address is known here. */
    uint64_t word = 0;
    put(fd, &word, sizeof(word));
    get_polling(fd, &word, sizeof(word), sides); /* the warm-up is over */
    double cpu = seconds_of(CLOCK_PROCESS_CPUTIME_ID);
    uint64_t *touched = allocate(opt.loops, sizeof(*touched));
    get_polling(fd, touched, opt.loops * sizeof(*touched), sides); /* the measurement is over */
    cpu = seconds_of(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    if (!opt.read)
        for (size_t i = 0; i < opt.loops; i++)
            verify(sides[i].buffer, touched[i], i);
    put(fd, &cpu, sizeof(cpu));
    /* The initiator closes first, and may need our progress for that. */
    get_polling(fd, &word, sizeof(word), sides);
    for (size_t i = 0; i < opt.loops; i++)
        close_side(&sides[i]);
    free(touched);
    free(sides);
}

/* ---- initiator */

struct slot {
    struct fi_context2 context; /* first, so that the completion's pointer is the slot's */
    struct slot *next;
};

struct loop {
    /* Two cache lines, which processors fetch together: loops must not slow each other down. */
    _Alignas(128) struct side side;
    fi_addr_t peer;
    uint64_t key, base;
    struct slot *slots, *free;
    size_t in_flight;
    uint64_t offset;
    uint64_t done;
    pthread_t thread;
};

static pthread_barrier_t begin;
static double end; /* of the measured time; set before the barrier opens */

static void reap(struct loop *l) {
    if (child_ended || failed)
        die("the target ended early");
    struct fi_cq_entry entries[16];
    size_t n = poll_cq(&l->side, entries, 16);
    for (size_t i = 0; i < n; i++) {
        struct slot *slot = entries[i].op_context;
        slot->next = l->free;
        l->free = slot;
    }
    l->in_flight -= n;
    l->done += n;
}

/* With `more`, the next post follows before anything is polled. */
static bool post(struct loop *l, bool more) {
    struct slot *slot = l->free;
    struct side *s = &l->side;
    unsigned char *local = s->buffer + l->offset;
    uint64_t remote = l->base + l->offset;
    ssize_t ret;
    if (opt.more > 1) {
        struct iovec iov = {.iov_base = local, .iov_len = opt.size};
        struct fi_rma_iov rma = {.addr = remote, .len = opt.size, .key = l->key};
        struct fi_msg_rma msg = {.msg_iov = &iov, .desc = &s->desc, .iov_count = 1,
                                 .addr = l->peer, .rma_iov = &rma, .rma_iov_count = 1,
                                 .context = &slot->context};
        uint64_t flags = FI_COMPLETION | (more ? FI_MORE : 0);
        if (!opt.read)
            flags |= opt.delivery ? FI_DELIVERY_COMPLETE : FI_TRANSMIT_COMPLETE;
        ret = opt.read ? fi_readmsg(s->ep, &msg, flags) : fi_writemsg(s->ep, &msg, flags);
    } else if (opt.read) {
        ret = fi_read(s->ep, local, opt.size, s->desc, l->peer, remote, l->key, &slot->context);
    } else {
        ret = fi_write(s->ep, local, opt.size, s->desc, l->peer, remote, l->key, &slot->context);
    }
    if (ret == -FI_EAGAIN)
        return false;
    check(ret, opt.read ? "fi_read" : "fi_write");
    l->free = slot->next;
    l->in_flight++;
    l->offset += opt.size;
    if (l->offset == opt.buffer)
        l->offset = 0;
    return true;
}

static void drain(struct loop *l) {
    while (l->in_flight)
        reap(l);
}

/* Connections and first-use costs are not what is measured: first one operation, then one window
 * of them. */
static void warm_up(struct loop *l) {
    l->slots = allocate(opt.window, sizeof(*l->slots));
    for (size_t i = 0; i < opt.window; i++) {
        l->slots[i].next = l->free;
        l->free = &l->slots[i];
    }
    while (!post(l, false))
        reap(l);
    drain(l);
    while (l->done < opt.window + 1) {
        if (!l->free || !post(l, false))
            reap(l);
    }
    drain(l);
}

static void *run_loop(void *loop) {
    struct loop *l = loop;
    pthread_barrier_wait(&begin);
    do {
        size_t posts = 1;
        while (l->free && post(l, posts % opt.more && l->free->next))
            posts++;
        reap(l);
    } while (seconds_of(CLOCK_MONOTONIC) < end);
    drain(l);
    return NULL;
}

static void report(const struct loop *loops, const uint64_t *operations, double seconds, double cpu,
                   double target_cpu, uint64_t verified) {
    uint64_t sum = 0;
    for (size_t i = 0; i < opt.loops; i++)
        sum += operations[i];
    double ops = (double)sum / seconds, bytes = ops * (double)opt.size;
    uint32_t version = fi_version();
    const char *provider = loops[0].side.info->fabric_attr->prov_name;
    if (opt.json) {
        printf("{\"provider\": \"%s\", \"libfabric\": \"%u.%u\", \"operation\": \"%s\", "
               "\"block_size\": %zu, \"window\": %zu, \"buffer\": %zu, \"complete\": \"%s\", "
               "\"seconds\": %.6f, \"ops\": %" PRIu64 ", \"ops_per_s\": %.3f, "
               "\"bytes_per_s\": %.3f, \"initiator_cpu_s\": %.6f, \"target_cpu_s\": %.6f, "
               "\"verified_bytes\": %" PRIu64 ", \"loops\": [",
               provider, FI_MAJOR(version), FI_MINOR(version), opt.read ? "read" : "write",
               opt.size, opt.window, opt.buffer, opt.delivery ? "delivery" : "transmit", seconds,
               sum, ops, bytes, cpu, target_cpu, verified);
        for (size_t i = 0; i < opt.loops; i++)
            printf("%s{\"domain\": \"%s\", \"ops\": %" PRIu64 "}", i ? ", " : "",
                   loops[i].side.info->domain_attr->name, operations[i]);
        printf("]}\n");
    } else {
        printf("%s on ", provider);
        for (size_t i = 0; i < opt.loops; i++)
            printf("%s%s", i ? "," : "", loops[i].side.info->domain_attr->name);
        printf(": %s of %zu bytes, window %zu: %.0f op/s, %.3f GB/s; CPU %.2f s of initiator, "
               "%.2f s of target in %.2f s; %" PRIu64 " bytes verified\n",
               opt.read ? "read" : "write", opt.size, opt.window, ops, bytes * 1e-9, cpu,
               target_cpu, seconds, verified);
    }
    fflush(stdout);
}

static void run_initiator(int fd) {
    role = "initiator";
    struct loop *loops = aligned_alloc(_Alignof(struct loop), opt.loops * sizeof(*loops));
    if (!loops)
        die("out of memory");
    memset(loops, 0, opt.loops * sizeof(*loops));
    for (size_t i = 0; i < opt.loops; i++) {
        struct loop *l = &loops[i];
        open_side(&l->side, opt.devices[i], false);
        if (!opt.read)
            fill(l->side.buffer, opt.buffer, i);
        struct hello target = exchange(fd, &l->side);
        l->peer = insert(&l->side, &target);
        l->key = target.key;
        l->base = target.base;
    }
    uint64_t word;
    get(fd, &word, sizeof(word)); /* the target knows us */
    uint64_t *operations = allocate(opt.loops, sizeof(*operations));
    uint64_t *touched = allocate(opt.loops, sizeof(*touched));
    for (size_t i = 0; i < opt.loops; i++) {
        warm_up(&loops[i]);
        operations[i] = loops[i].done;
    }

    pthread_barrier_init(&begin, NULL, (unsigned)opt.loops + 1);
    for (size_t i = 0; i < opt.loops; i++) {
        int error = pthread_create(&loops[i].thread, NULL, run_loop, &loops[i]);
        if (error)
            die("pthread_create: %s", strerror(error));
    }
    put(fd, &word, sizeof(word));
    double cpu = seconds_of(CLOCK_PROCESS_CPUTIME_ID), start = seconds_of(CLOCK_MONOTONIC);
    end = start + opt.duration;
    pthread_barrier_wait(&begin);
    for (size_t i = 0; i < opt.loops; i++)
        pthread_join(loops[i].thread, NULL);
    if (failed)
        exit(1);
    double seconds = seconds_of(CLOCK_MONOTONIC) - start;
    cpu = seconds_of(CLOCK_PROCESS_CPUTIME_ID) - cpu;

    uint64_t verified = 0;
    for (size_t i = 0; i < opt.loops; i++) {
        uint64_t moved = loops[i].done * opt.size;
        touched[i] = moved < opt.buffer ? moved : opt.buffer;
        verified += touched[i];
        operations[i] = loops[i].done - operations[i];
    }
    double target_cpu;
    put(fd, touched, opt.loops * sizeof(*touched));
    get(fd, &target_cpu, sizeof(target_cpu));
    if (opt.read)
        for (size_t i = 0; i < opt.loops; i++)
            verify(loops[i].side.buffer, touched[i], i);

    report(loops, operations, seconds, cpu, target_cpu, verified);
    for (size_t i = 0; i < opt.loops; i++) {
        free(loops[i].slots);
        close_side(&loops[i].side);
    }
    free(touched);
    free(operations);
    free(loops);
    put(fd, &word, sizeof(word));
}

int main(int argc, char **argv) {
    main_thread = pthread_self();
    parse(argc, argv);
    int fds[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, fds) < 0)
        die("socketpair: %s", strerror(errno));
    signal(SIGALRM, on_alarm);
    signal(SIGCHLD, on_child);
    pid_t parent = getpid();
    pid_t child = fork();
    if (child < 0)
        die("fork: %s", strerror(errno));
    /* Alarms are not inherited: each side sets its own. */
    alarm((unsigned)opt.duration + 30);
    if (child == 0) {
        close(fds[0]);
        run_target(fds[1], parent);
        return 0;
    }
    close(fds[1]);
    run_initiator(fds[0]);
    int status;
    if (waitpid(child, &status, 0) != child || !WIFEXITED(status) || WEXITSTATUS(status) != 0)
        die("the target did not end well");
    return 0;
}
