/* SPDX-License-Identifier: Apache-2.0
 *
 * The yardstick: the plainest loop that moves memory over libfabric. Two processes, one endpoint
 * each, one buffer each; the initiator keeps a fixed number of operations in flight and does
 * nothing else. What a library on top of libfabric adds can be read off against this.
 *
 * The program forks itself before it touches libfabric: the child is the target, the parent the
 * initiator. They exchange what they need over a socket pair.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
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

static _Noreturn void die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fprintf(stderr, "raw_rma (%s): ", role);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(1);
}

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

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static double cpu_seconds(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) +
           (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) * 1e-6;
}

/* ---- options */

static struct {
    const char *provider;
    bool read;
    size_t size;
    size_t window;
    double duration;
    size_t buffer;
    char *devices[2]; /* initiator's, target's; NULL: the provider's first */
    bool delivery;
    bool gate;
    bool json;
} opt = {
    .provider = "shm",
    .size = 65536,
    .window = 64,
    .duration = 3,
    .buffer = 64 << 20,
    .delivery = true,
};

static void usage(int status) {
    fprintf(status ? stderr : stdout,
            "raw_rma: a plain libfabric RMA loop between two processes of this host\n"
            "  --provider NAME      shm, tcp, sockets, efa, ... (shm)\n"
            "  --op write|read      (write)\n"
            "  --size BYTES         of one operation (65536)\n"
            "  --window N           operations in flight (64)\n"
            "  --duration SECONDS   (3)\n"
            "  --buffer BYTES       memory that the operations walk through (67108864)\n"
            "  --devices A[,B]      domain of the initiator, and of the target if another\n"
            "  --complete delivery|transmit   when a write counts as done (delivery)\n"
            "  --gate               when warm, say so in a line, and begin when told so by one on\n"
            "                       standard input: for several loops that run together\n"
            "  --json               one JSON object instead of a line of text\n");
    exit(status);
}

static size_t number(const char *text, const char *name) {
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 0);
    if (errno || end == text || *end || text[0] == '-' || value == 0)
        die("--%s: '%s' is not a positive number", name, text);
    return (size_t)value;
}

static void parse(int argc, char **argv) {
    static const struct option names[] = {
        {"provider", required_argument, NULL, 'p'}, {"op", required_argument, NULL, 'o'},
        {"size", required_argument, NULL, 's'},     {"window", required_argument, NULL, 'w'},
        {"duration", required_argument, NULL, 'd'}, {"buffer", required_argument, NULL, 'b'},
        {"devices", required_argument, NULL, 'D'},  {"complete", required_argument, NULL, 'c'},
        {"gate", no_argument, NULL, 'g'},           {"json", no_argument, NULL, 'j'},
        {"help", no_argument, NULL, 'h'},           {0},
    };
    int c;
    while ((c = getopt_long(argc, argv, "h", names, NULL)) != -1) {
        switch (c) {
        case 'p': opt.provider = optarg; break;
        case 'o':
            if (strcmp(optarg, "read") && strcmp(optarg, "write"))
                die("--op: write or read");
            opt.read = !strcmp(optarg, "read");
            break;
        case 's': opt.size = number(optarg, "size"); break;
        case 'w': opt.window = number(optarg, "window"); break;
        case 'd':
            opt.duration = strtod(optarg, NULL);
            if (!(opt.duration > 0 && opt.duration <= 3600))
                die("--duration: seconds, more than 0, at most 3600");
            break;
        case 'b': opt.buffer = number(optarg, "buffer"); break;
        case 'D':
            opt.devices[0] = strtok(optarg, ",");
            opt.devices[1] = strtok(NULL, ",");
            if (!opt.devices[1])
                opt.devices[1] = opt.devices[0];
            break;
        case 'c':
            if (strcmp(optarg, "delivery") && strcmp(optarg, "transmit"))
                die("--complete: delivery or transmit");
            opt.delivery = !strcmp(optarg, "delivery");
            break;
        case 'g': opt.gate = true; break;
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

/* ---- one side's libfabric objects */

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

static struct fi_info *get_info(const char *provider, const char *device) {
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
    /* efa has two; a target on efa-direct must know its initiators, and ours uses this one. */
    if (strcmp(provider, "efa") == 0) hints->fabric_attr->name = strdup("efa");
    hints->domain_attr->name = device ? strdup(device) : NULL;

    /* The older of what we were compiled against and what is loaded: both understand that. */
    uint32_t compiled = FI_VERSION(FI_MAJOR_VERSION, FI_MINOR_VERSION);
    uint32_t version = fi_version() < compiled ? fi_version() : compiled;
    struct fi_info *info = NULL;
    int ret = fi_getinfo(version, NULL, NULL, 0, hints, &info);
    fi_freeinfo(hints);
    if (ret == -FI_ENODATA)
        return NULL;
    check(ret, "fi_getinfo");
    return info;
}

static void open_side(struct side *s, bool target) {
    const char *device = opt.devices[target];
    s->info = get_info(opt.provider, device);
    if (!s->info && !strcmp(opt.provider, "tcp")) {
        /* Before 1.18 the tcp provider had no RDM endpoints of its own. */
        s->info = get_info("tcp;ofi_rxm", device);
    }
    if (!s->info)
        die("provider '%s' with reliable datagrams and RMA%s%s not found", opt.provider,
            device ? " on " : "", device ? device : "");

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

static void put(int fd, const void *data, size_t len) {
    if (send(fd, data, len, MSG_NOSIGNAL) != (ssize_t)len)
        die("the other side is gone");
}

static void get(int fd, void *data, size_t len) {
    if (recv(fd, data, len, MSG_WAITALL) != (ssize_t)len)
        die("the other side is gone");
}

/* Like get, but keeps the provider going: one that makes progress only when asked would otherwise
 * leave the other side waiting. */
static void get_polling(int fd, void *data, size_t len, struct side *s) {
    struct fi_cq_entry entries[16];
    for (;;) {
        for (int i = 0; i < 256; i++)
            poll_cq(s, entries, 16);
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

static unsigned char pattern(size_t offset) {
    uint64_t x = (offset >> 3) * UINT64_C(0x9e3779b97f4a7c15);
    return (unsigned char)(x >> (8 * (offset & 7)));
}

static void fill(unsigned char *buffer, size_t len) {
    for (size_t i = 0; i < len; i++)
        buffer[i] = pattern(i);
}

static void verify(const unsigned char *buffer, size_t len) {
    for (size_t i = 0; i < len; i++)
        if (buffer[i] != pattern(i))
            die("wrong byte at offset %zu: %u, not %u", i, buffer[i], pattern(i));
}

/* ---- target */

static void run_target(int fd, pid_t parent) {
    role = "target";
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) /* it died before that call */
        exit(1);

    /* On an emulated EFA device the other side is another host. */
    setenv("SOFTEFA_HOST", "1", 1);
    struct side s = {0};
    open_side(&s, true);
    if (opt.read)
        fill(s.buffer, opt.buffer);
    struct hello initiator = exchange(fd, &s);
    insert(&s, &initiator);

    uint64_t word;
    get_polling(fd, &word, sizeof(word), &s); /* the warm-up is over */
    double cpu = cpu_seconds();
    get_polling(fd, &word, sizeof(word), &s); /* the measurement is over; bytes to verify */
    cpu = cpu_seconds() - cpu;
    if (!opt.read)
        verify(s.buffer, word);
    put(fd, &cpu, sizeof(cpu));
    /* The initiator closes first, and may need our progress for that. */
    get_polling(fd, &word, sizeof(word), &s);
    close_side(&s);
}

/* ---- initiator */

struct slot {
    struct fi_context2 context; /* first, so that the completion's pointer is the slot's */
    struct slot *next;
};

struct loop {
    struct side *s;
    fi_addr_t peer;
    uint64_t key, base;
    struct slot *free;
    size_t in_flight;
    uint64_t offset;
};

static void reap(struct loop *l, uint64_t *done) {
    if (child_ended)
        die("the target ended early");
    struct fi_cq_entry entries[16];
    size_t n = poll_cq(l->s, entries, 16);
    for (size_t i = 0; i < n; i++) {
        struct slot *slot = entries[i].op_context;
        slot->next = l->free;
        l->free = slot;
    }
    l->in_flight -= n;
    *done += n;
}

static bool post(struct loop *l) {
    struct slot *slot = l->free;
    unsigned char *local = l->s->buffer + l->offset;
    uint64_t remote = l->base + l->offset;
    ssize_t ret = opt.read ? fi_read(l->s->ep, local, opt.size, l->s->desc, l->peer, remote,
                                     l->key, &slot->context)
                           : fi_write(l->s->ep, local, opt.size, l->s->desc, l->peer, remote,
                                      l->key, &slot->context);
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

static void drain(struct loop *l, uint64_t *done) {
    while (l->in_flight)
        reap(l, done);
}

static void run_initiator(int fd) {
    role = "initiator";
    struct side s = {0};
    open_side(&s, false);
    if (!opt.read)
        fill(s.buffer, opt.buffer);
    struct hello target = exchange(fd, &s);
    struct loop l = {
        .s = &s, .peer = insert(&s, &target), .key = target.key, .base = target.base};
    struct slot *slots = calloc(opt.window, sizeof(*slots));
    if (!slots)
        die("out of memory");
    for (size_t i = 0; i < opt.window; i++) {
        slots[i].next = l.free;
        l.free = &slots[i];
    }

    /* Connections and first-use costs are not what is measured: first one operation, then one
     * window of them. */
    uint64_t done = 0;
    while (!post(&l))
        reap(&l, &done);
    drain(&l, &done);
    while (done < opt.window + 1) {
        if (!l.free || !post(&l))
            reap(&l, &done);
    }
    drain(&l, &done);
    uint64_t word = 0;
    uint64_t warm = done;
    if (opt.gate) {
        puts("ready");
        fflush(stdout);
        if (getchar() == EOF)
            die("--gate: standard input ended");
    }
    put(fd, &word, sizeof(word));

    done = 0;
    double cpu = cpu_seconds(), start = now(), end = start + opt.duration;
    do {
        while (l.free && post(&l))
            ;
        reap(&l, &done);
    } while (now() < end);
    drain(&l, &done);
    double seconds = now() - start;
    cpu = cpu_seconds() - cpu;

    uint64_t moved = (done + warm) * opt.size;
    uint64_t touched = moved < opt.buffer ? moved : opt.buffer;
    double target_cpu;
    put(fd, &touched, sizeof(touched));
    get(fd, &target_cpu, sizeof(target_cpu));
    if (opt.read)
        verify(s.buffer, touched);

    double ops = (double)done / seconds, bytes = ops * (double)opt.size;
    uint32_t version = fi_version();
    if (opt.json)
        printf("{\"provider\": \"%s\", \"domain\": \"%s\", \"libfabric\": \"%u.%u\", "
               "\"operation\": \"%s\", \"block_size\": %zu, \"window\": %zu, \"buffer\": %zu, "
               "\"complete\": \"%s\", \"seconds\": %.6f, \"ops\": %" PRIu64 ", "
               "\"ops_per_s\": %.3f, \"bytes_per_s\": %.3f, \"initiator_cpu_s\": %.6f, "
               "\"target_cpu_s\": %.6f, \"verified_bytes\": %" PRIu64 "}\n",
               s.info->fabric_attr->prov_name, s.info->domain_attr->name, FI_MAJOR(version),
               FI_MINOR(version), opt.read ? "read" : "write", opt.size, opt.window, opt.buffer,
               opt.delivery ? "delivery" : "transmit", seconds, done, ops, bytes, cpu, target_cpu,
               touched);
    else
        printf("%s on %s: %s of %zu bytes, window %zu: %.0f op/s, %.3f GB/s; CPU %.2f s of "
               "initiator, %.2f s of target in %.2f s; %" PRIu64 " bytes verified\n",
               s.info->fabric_attr->prov_name, s.info->domain_attr->name,
               opt.read ? "read" : "write", opt.size, opt.window, ops, bytes * 1e-9, cpu,
               target_cpu, seconds, touched);
    fflush(stdout);
    free(slots);
    close_side(&s);
    put(fd, &word, sizeof(word));
}

int main(int argc, char **argv) {
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
