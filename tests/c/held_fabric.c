/* SPDX-License-Identifier: Apache-2.0
 *
 * The machine's libfabric, but that reads of completion queues, writes and closes of endpoints can be made not to
 * return, and reads to fail. For MC_EFA_LIBFABRIC; a test opens the same file and steers it by the functions at
 * the end. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>
#include <rdma/fi_rma.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static atomic_int held, inside, last, failing, failed;

/* What a test holds. */
enum { READS = 1, WRITES = 2, CLOSES = 4 };

static void hold_while(int what) {
    if (!(atomic_load(&held) & what)) return;
    atomic_store(&last, (int)syscall(SYS_gettid));
    atomic_fetch_add(&inside, 1);
    while (atomic_load(&held) & what) usleep(500);
    atomic_fetch_sub(&inside, 1);
}

/* An object's table of functions, to be changed; the provider's own stays behind it. It may be longer than our
 * headers know. They are never freed: objects are few, and this is a test. */
struct table {
    const void *real;
    _Alignas(16) char own[1024];
};

static void *own_table(const void *real, size_t size) {
    struct table *table = calloc(1, sizeof *table);
    if (table == NULL || size > sizeof table->own) abort();
    table->real = real;
    memcpy(table->own, real, size);
    return table->own;
}

#define REAL(type, ops) ((const type *)((const struct table *)((const char *)(ops) - offsetof(struct table, own)))->real)

static ssize_t cq_read(struct fid_cq *cq, void *entries, size_t count) {
    hold_while(READS);
    const int why = atomic_load(&failing);
    if (why != 0) {
        atomic_fetch_add(&failed, 1);
        return -why;
    }
    return REAL(struct fi_ops_cq, cq->ops)->read(cq, entries, count);
}

static int cq_open(struct fid_domain *domain, struct fi_cq_attr *attr, struct fid_cq **cq, void *context) {
    const int ret = REAL(struct fi_ops_domain, domain->ops)->cq_open(domain, attr, cq, context);
    if (ret == 0) {
        struct fi_ops_cq *ops = own_table((*cq)->ops, (*cq)->ops->size);
        ops->read = cq_read;
        (*cq)->ops = ops;
    }
    return ret;
}

static int ep_close(struct fid *fid) {
    hold_while(CLOSES);
    return REAL(struct fi_ops, fid->ops)->close(fid);
}

static ssize_t writemsg(struct fid_ep *ep, const struct fi_msg_rma *message, uint64_t flags) {
    hold_while(WRITES);
    return REAL(struct fi_ops_rma, ep->rma)->writemsg(ep, message, flags);
}

static int endpoint(struct fid_domain *domain, struct fi_info *info, struct fid_ep **ep, void *context) {
    const int ret = REAL(struct fi_ops_domain, domain->ops)->endpoint(domain, info, ep, context);
    if (ret == 0) {
        struct fi_ops *ops = own_table((*ep)->fid.ops, (*ep)->fid.ops->size);
        ops->close = ep_close;
        (*ep)->fid.ops = ops;
        struct fi_ops_rma *rma = own_table((*ep)->rma, (*ep)->rma->size);
        rma->writemsg = writemsg;
        (*ep)->rma = rma;
    }
    return ret;
}

static int domain(struct fid_fabric *fabric, struct fi_info *info, struct fid_domain **domain, void *context) {
    const int ret = REAL(struct fi_ops_fabric, fabric->ops)->domain(fabric, info, domain, context);
    if (ret == 0) {
        struct fi_ops_domain *ops = own_table((*domain)->ops, (*domain)->ops->size);
        ops->cq_open = cq_open;
        ops->endpoint = endpoint;
        (*domain)->ops = ops;
    }
    return ret;
}

/* Everything else of libfabric's is found behind this, as it is linked. */
int fi_fabric(struct fi_fabric_attr *attr, struct fid_fabric **fabric, void *context) {
    int (*real)(struct fi_fabric_attr *, struct fid_fabric **, void *) = NULL;
    *(void **)&real = dlsym(dlopen("libfabric.so.1", RTLD_LAZY | RTLD_NOLOAD), "fi_fabric");
    const int ret = real(attr, fabric, context);
    if (ret == 0) {
        struct fi_ops_fabric *ops = own_table((*fabric)->ops, (*fabric)->ops->size);
        ops->domain = domain;
        (*fabric)->ops = ops;
    }
    return ret;
}

/* What does not return until it is held no more. */
void held_fabric_hold(int what) { atomic_store(&held, what); }
/* Threads that are in there. */
int held_fabric_inside(void) { return atomic_load(&inside); }
/* The one that came last, by the kernel's number. */
int held_fabric_last(void) { return atomic_load(&last); }
/* What reads fail with; 0: they do not. */
void held_fabric_fail(int errno_) { atomic_store(&failing, errno_); }
/* Reads that have failed. */
int held_fabric_failed(void) { return atomic_load(&failed); }
