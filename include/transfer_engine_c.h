/* Mooncake's C interface, as libtransfer_engine.so of mooncake-efa has it: the same names, layouts and numbers as
 * Mooncake's transfer_engine_c.h. Written by hand, since what it must say is given; tests compare it with the library.
 * SPDX-License-Identifier: Apache-2.0
 *
 * Every function may be called from any thread. None keeps a pointer that it is given, but for registered memory.
 * What is refused (NULL, a handle that is none or was freed, a number out of range) gives an error and a line in the
 * log (MC_LOG_LEVEL, MC_LOG_DIR; standard error by default), and changes nothing. docs/c-api.md tells more.
 */
#ifndef TRANSFER_ENGINE_C
#define TRANSFER_ENGINE_C

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define segment_handle_t int32_t
#define segment_id_t int32_t
#define batch_id_t uint64_t

/* Our own segment's handle. */
#define LOCAL_SEGMENT (0)
#define INVALID_BATCH UINT64_MAX

/* transfer_request.opcode */
#define OPCODE_READ (0)
#define OPCODE_WRITE (1)

/* transfer_status.status */
#define STATUS_WAITING (0) /* under way */
#define STATUS_PENDING (1) /* not used */
#define STATUS_INVALID (2)
#define STATUS_CANCELED (3)
#define STATUS_COMPLETED (4) /* all bytes are in place, and the memory is free again */
#define STATUS_TIMEOUT (5)   /* only where MC_SLICE_TIMEOUT is set; otherwise this is STATUS_FAILED */
#define STATUS_FAILED (6)    /* the memory may still be in use if its deadline passed: unregisterLocalMemory waits */

typedef void *transfer_engine_t;
typedef void *transport_t;

struct transfer_request {
    int opcode;             /* OPCODE_READ: from the segment to source; OPCODE_WRITE: the other way */
    void *source;           /* our memory, registered */
    segment_id_t target_id; /* handle of the segment */
    uint64_t target_offset; /* address in its process */
    uint64_t length;        /* bytes */
};
typedef struct transfer_request transfer_request_t;

struct transfer_status {
    int status; /* STATUS_... */
    uint64_t transferred_bytes;
};
typedef struct transfer_status transfer_status_t;

struct notify_msg {
    char *name; /* who sends it: free text */
    char *msg;  /* what */
};
typedef struct notify_msg notify_msg_t;

struct buffer_entry {
    void *addr;
    size_t length;
};
typedef struct buffer_entry buffer_entry_t;

struct nic_load_stat {
    char device_name[64];
    uint64_t inflight_bytes;   /* queued or in flight */
    double ewma_bandwidth_bps; /* bytes a second, of late: measured from one call to the next */
};
typedef struct nic_load_stat nic_load_stat_t;

/* No function takes it; it is here for programs that name it. */
struct segment_desc {
    int type;
    union {
        struct {
            void *addr;
            uint64_t size;
            const char *location;
        } rdma;
        struct {
            const char *file_path;
            const char *subsystem_name;
            const char *proto;
            const char *ip;
            uint64_t port;
        } nvmeof;
    } desc_;
};
typedef struct segment_desc segment_desc_t;

/* ---- engine: NULL on failure ---- */

/* metadata_conn_string: "P2PHANDSHAKE" (no server), "http://...", "etcd://...", "redis://...".
 * local_server_name: our name for peers, "host:port"; with P2PHANDSHAKE a free port is taken instead, and
 * getLocalIpAndPort tells the name. ip_or_host_name and rpc_port are not used.
 * auto_discover: install "efa" where there is EFA, else "tcp". */
transfer_engine_t createTransferEngine(const char *metadata_conn_string, const char *local_server_name,
                                       const char *ip_or_host_name, uint64_t rpc_port, int auto_discover);
void destroyTransferEngine(transfer_engine_t engine);
/* Finds the NICs and what they are near to; needed before installTransport(engine, "efa", NULL). */
int discoverTopology(transfer_engine_t engine);
int getLocalIpAndPort(transfer_engine_t engine, char *buf_out, size_t buf_len);
/* proto: "efa"; or "tcp", libfabric's, which only peers with this library speak.
 * args: NULL, or args[0] is NULL or a NIC priority matrix (JSON). */
transport_t installTransport(transfer_engine_t engine, const char *proto, void **args);
int uninstallTransport(transfer_engine_t engine, const char *proto);
/* SIGTERM, SIGINT and exit() take the process's engines out of the metadata. */
void enableGracefulShutdown(transfer_engine_t engine);
int getNicLoadStats(transfer_engine_t engine, nic_load_stat_t *stats, size_t *count);
int showLinks(transfer_engine_t engine, char *buf_out, size_t buf_len, int json);

/* ---- memory: 0, or a negative number ---- */

/* location: "cpu:0", "cuda:3", ...; "*" or NULL: find out. */
int registerLocalMemory(transfer_engine_t engine, void *addr, size_t length, const char *location,
                        int remote_accessible);
int unregisterLocalMemory(transfer_engine_t engine, void *addr);
/* All or none. */
int registerLocalMemoryBatch(transfer_engine_t engine, buffer_entry_t *buffer_list, size_t buffer_len,
                             const char *location);
int unregisterLocalMemoryBatch(transfer_engine_t engine, void **addr_list, size_t addr_len);

/* ---- segments: a handle, or a negative number ---- */

segment_id_t openSegment(transfer_engine_t engine, const char *segment_name);
segment_id_t openSegmentNoCache(transfer_engine_t engine, const char *segment_name);
int closeSegment(transfer_engine_t engine, segment_id_t segment_id);
int removeLocalSegment(transfer_engine_t engine, const char *segment_name);
/* Connects all NICs, so that the first transfer does not have to. */
int warmupEfaSegment(transfer_engine_t engine, const char *segment_name);
int syncSegmentCache(transfer_engine_t engine);

/* ---- transfers: 0, or a positive number (1 argument, 2 too many, 3 address not registered, 4 busy, ...) ---- */

batch_id_t allocateBatchID(transfer_engine_t engine, size_t batch_size);
/* All or none of them are started. */
int submitTransfer(transfer_engine_t engine, batch_id_t batch_id, struct transfer_request *entries, size_t count);
/* The notification goes to the first one's segment when all are complete and their status was asked for. */
int submitTransferWithNotify(transfer_engine_t engine, batch_id_t batch_id, struct transfer_request *entries,
                             size_t count, notify_msg_t notify_msg);
int getTransferStatus(transfer_engine_t engine, batch_id_t batch_id, size_t task_id,
                      struct transfer_status *status);
int freeBatchID(transfer_engine_t engine, batch_id_t batch_id);

/* ---- notifications ---- */

/* What came since the last call; NULL if nothing did. */
notify_msg_t *getNotifsFromEngine(transfer_engine_t engine, int *size);
int freeNotifsMsgBuf(notify_msg_t *msg, int size);
int genNotifyInEngine(transfer_engine_t engine, uint64_t target_id, notify_msg_t notify_msg);

#ifdef __cplusplus
}
#endif

#endif
