/* The C interface of libmooncake_efa.so.
 * Generated from capi/ by `make header`; do not edit. */
/* SPDX-License-Identifier: Apache-2.0 */

#ifndef MOONCAKE_EFA_H
#define MOONCAKE_EFA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/**
 * The version of the interface that this header describes.
 */
#define MEFA_ABI_VERSION 1

/**
 * mefa_request.opcode: read the target's memory into ours.
 */
#define MEFA_READ 0

/**
 * mefa_request.opcode: write our memory into the target's.
 */
#define MEFA_WRITE 1

/**
 * What functions return: 0, or one of these. The numbers are Mooncake's where it has one.
 */
typedef enum mefa_code {
    /**
     * Done.
     */
    MEFA_CODE_OK = 0,
    /**
     * An argument is NULL, out of range, malformed, or names something that does not exist.
     */
    MEFA_CODE_INVALID_ARGUMENT = -1,
    /**
     * The batch is full, or a table of the library is.
     */
    MEFA_CODE_TOO_MANY_REQUESTS = -2,
    /**
     * A local or remote range is not (wholly) inside registered memory.
     */
    MEFA_CODE_ADDRESS_NOT_REGISTERED = -3,
    /**
     * Transfers are under way on the batch or memory.
     */
    MEFA_CODE_BUSY = -4,
    /**
     * No network device that could be used.
     */
    MEFA_CODE_DEVICE_NOT_FOUND = -6,
    /**
     * The range overlaps one that is registered already.
     */
    MEFA_CODE_ADDRESS_OVERLAPPED = -7,
    /**
     * Text that should be JSON of a known shape is not.
     */
    MEFA_CODE_MALFORMED_JSON = -103,
    /**
     * A handshake was refused.
     */
    MEFA_CODE_REJECT_HANDSHAKE = -104,
    /**
     * The host's metadata could not be had.
     */
    MEFA_CODE_METADATA = -200,
    /**
     * An endpoint could not be made, or the peer could not be reached.
     */
    MEFA_CODE_ENDPOINT = -201,
    /**
     * libfabric could not be loaded, or a device, domain or queue could not be opened.
     */
    MEFA_CODE_CONTEXT = -202,
    /**
     * Memory could not be registered.
     */
    MEFA_CODE_MEMORY = -302,
    /**
     * Not possible with this provider or this build.
     */
    MEFA_CODE_NOT_IMPLEMENTED = -303,
    /**
     * The time given passed first.
     */
    MEFA_CODE_TIMEOUT = -400,
    /**
     * A bug in this library; please report it.
     */
    MEFA_CODE_INTERNAL = -500,
} mefa_code;

/**
 * Status of a task or a batch, in Mooncake's numbers.
 */
typedef enum mefa_status {
    /**
     * Not submitted.
     */
    MEFA_STATUS_WAITING = 0,
    /**
     * Under way.
     */
    MEFA_STATUS_PENDING = 1,
    /**
     * Refused.
     */
    MEFA_STATUS_INVALID = 2,
    /**
     * Cancelled; its memory is quiet.
     */
    MEFA_STATUS_CANCELED = 3,
    /**
     * All bytes are in place, and its memory is quiet.
     */
    MEFA_STATUS_COMPLETED = 4,
    /**
     * Its deadline passed. Its memory may still be in use: mefa_batch_quiet tells, mefa_wait_quiet waits.
     */
    MEFA_STATUS_TIMEOUT = 5,
    /**
     * It failed; its memory is quiet. mefa_task_error tells why.
     */
    MEFA_STATUS_FAILED = 6,
} mefa_status;

/**
 * Receives log lines: level 1 error, 2 warning, 3 info, 4 debug, 5 trace. Called on any thread,
 * possibly on several at once. Must not call back into the library.
 */
typedef void (*mefa_log_fn)(void *context, int level, const char *text);

/**
 * Receives a text: `length` bytes, followed by a NUL. Called once, before the function that takes it
 * returns, on the same thread; the text is gone afterwards.
 */
typedef void (*mefa_text_fn)(void *context, const char *text, size_t length);

/**
 * Asks the host for the current descriptor of a segment, as JSON: call `text` with it and return 0, or
 * return an error. Called inside mefa_submit and the mefa_segment functions; may block; must not call
 * back into the transport.
 */
typedef int (*mefa_fetch_segment_fn)(void *context,
                                     const char *name,
                                     mefa_text_fn text,
                                     void *text_context);

/**
 * Asks the host to send a handshake (JSON) to the server of a segment: call `text` with the answer and
 * return 0, or return an error. Called inside mefa_submit and mefa_segment_warm_up, for peers whose
 * descriptor has no endpoint addresses (C++ ones); may block; must not call back into the transport.
 */
typedef int (*mefa_handshake_fn)(void *context,
                                 const char *server,
                                 const char *request,
                                 mefa_text_fn text,
                                 void *text_context);

/**
 * A task that got its final status.
 */
typedef struct mefa_completion {
    /**
     * As in its mefa_request.
     */
    uint64_t cookie;
    /**
     * Bytes moved: all, or 0.
     */
    uint64_t bytes;
    /**
     * A mefa_status.
     */
    int32_t status;
    /**
     * 0.
     */
    uint32_t reserved;
} mefa_completion;

/**
 * Told of tasks that got their final status, before mefa_task_status and mefa_batch_status show it.
 * Called on whatever thread made the progress (one of ours, or one inside mefa_submit, mefa_progress,
 * mefa_wait, mefa_wait_quiet, mefa_task_status, mefa_batch_status, mefa_cancel, mefa_batch_quiet,
 * mefa_unregister or mefa_uninstall), possibly on several at once. It may call mefa_submit; it must not block,
 * uninstall, or throw. It is not called inside itself: tasks that end by its own calls get their status, and
 * are told of, when it has returned.
 */
typedef void (*mefa_completion_fn)(void *context,
                                   const struct mefa_completion *completions,
                                   size_t count);

/**
 * How to install a transport. Zero everything, set `size`, then what you need.
 */
typedef struct mefa_config {
    /**
     * sizeof(mefa_config).
     */
    size_t size;
    /**
     * Our name for peers: "host:port". Required.
     */
    const char *server_name;
    /**
     * Mooncake's NIC priority matrix as JSON, or NULL: all NICs are alike.
     */
    const char *topology_json;
    /**
     * libfabric provider, or NULL: MC_EFA_PROVIDER, or "efa".
     */
    const char *provider;
    /**
     * Names of devices to use, in this order; or NULL: those of the topology, or all.
     */
    const char *const *devices;
    /**
     * Count of devices.
     */
    size_t device_count;
    /**
     * Or NULL: descriptors are only those given by mefa_segment_open and mefa_segment_update.
     */
    mefa_fetch_segment_fn fetch_segment;
    /**
     * Or NULL: only peers that give their endpoints' addresses can be reached.
     */
    mefa_handshake_fn handshake;
    /**
     * Or NULL.
     */
    mefa_completion_fn on_completion;
    /**
     * Handed to the three callbacks.
     */
    void *context;
} mefa_config;

/**
 * An installed transport. An opaque number, never 0; a number that is no transport (any more) is
 * refused by every function.
 */
typedef uint64_t mefa_transport;

/**
 * One registered region: all of a memory range, or a part of it if that was too long for one.
 */
typedef struct mefa_region {
    /**
     * First byte.
     */
    uint64_t address;
    /**
     * Bytes.
     */
    uint64_t length;
    /**
     * Keys for peers, one a NIC in the order of the descriptor's devices; 0: not registered there.
     */
    const uint64_t *keys;
    /**
     * Count of keys.
     */
    size_t key_count;
    /**
     * Which of the ranges of the call it belongs to.
     */
    size_t memory;
} mefa_region;

/**
 * Receives regions that were registered. Called once, before the function that takes it returns, on
 * the same thread; the array is gone afterwards.
 */
typedef void (*mefa_region_fn)(void *context, const struct mefa_region *regions, size_t count);

/**
 * Memory to register.
 */
typedef struct mefa_memory {
    /**
     * First byte (host, or device as CUDA names it).
     */
    void *address;
    /**
     * Bytes, at least 1.
     */
    uint64_t length;
    /**
     * Where it is: "cpu:0", "cuda:3", ...; NULL or "*": find out.
     */
    const char *location;
} mefa_memory;

/**
 * A NIC in a segment descriptor.
 */
typedef struct mefa_device {
    /**
     * Name.
     */
    const char *name;
    /**
     * Mooncake's gid: carries the endpoint's address where the peer is one of ours. Never empty.
     */
    const char *gid;
    /**
     * 0 for EFA.
     */
    uint16_t lid;
} mefa_device;

/**
 * A registered region in a segment descriptor.
 */
typedef struct mefa_buffer {
    /**
     * Location, for instance "cpu:0".
     */
    const char *name;
    /**
     * First byte.
     */
    uint64_t address;
    /**
     * Bytes.
     */
    uint64_t length;
    /**
     * Remote keys, one a device; 0: not registered there.
     */
    const uint64_t *rkeys;
    /**
     * Count of rkeys: the count of devices.
     */
    size_t rkey_count;
} mefa_buffer;

/**
 * A segment descriptor: what a peer must know to transfer to and from us.
 */
typedef struct mefa_segment_desc {
    /**
     * sizeof(mefa_segment_desc).
     */
    size_t size;
    /**
     * The peer's server name: "host:port".
     */
    const char *name;
    /**
     * Its NICs.
     */
    const struct mefa_device *devices;
    /**
     * Count of devices.
     */
    size_t device_count;
    /**
     * Its registered memory.
     */
    const struct mefa_buffer *buffers;
    /**
     * Count of buffers.
     */
    size_t buffer_count;
    /**
     * Mooncake's NIC priority matrix as JSON, or NULL.
     */
    const char *topology_json;
} mefa_segment_desc;

/**
 * Receives a segment descriptor. Called once, before the function that takes it returns, on the same
 * thread; the descriptor and all it points to are gone afterwards.
 */
typedef void (*mefa_segment_fn)(void *context, const struct mefa_segment_desc *segment);

/**
 * A peer's segment, opened. An opaque number, never 0, for the transport that gave it: every function
 * refuses it with another one (MEFA_CODE_INVALID_ARGUMENT).
 */
typedef uint64_t mefa_segment;

/**
 * The fields of a handshake: what two NICs tell each other of where they are. NULL is "".
 */
typedef struct mefa_handshake {
    /**
     * sizeof(mefa_handshake).
     */
    size_t size;
    /**
     * `host:port@nic` of the sender.
     */
    const char *local_nic_path;
    /**
     * `host:port@nic` of the receiver.
     */
    const char *peer_nic_path;
    /**
     * The sender's endpoint address in hexadecimal digits; "" in a refusal.
     */
    const char *efa_addr;
    /**
     * Why the receiver refuses; "" in a request and on success.
     */
    const char *reply_msg;
} mefa_handshake;

/**
 * Receives a handshake's fields. Called once, before the function that takes it returns, on the same
 * thread; they are gone afterwards.
 */
typedef void (*mefa_handshake_fields_fn)(void *context, const struct mefa_handshake *handshake);

/**
 * A batch of transfer requests. An opaque number, never 0, for the transport that gave it: every
 * function refuses it with another one (MEFA_CODE_INVALID_ARGUMENT).
 */
typedef uint64_t mefa_batch;

/**
 * One transfer request.
 */
typedef struct mefa_request {
    /**
     * MEFA_READ or MEFA_WRITE.
     */
    int32_t opcode;
    /**
     * Must be 0.
     */
    uint32_t flags;
    /**
     * Address of our memory; the whole range must be registered.
     */
    uint64_t source;
    /**
     * Whose memory is at the other end.
     */
    mefa_segment target;
    /**
     * Address in the target's memory, as its buffers give it (absolute).
     */
    uint64_t offset;
    /**
     * Bytes. 0 completes at once.
     */
    uint64_t length;
    /**
     * The caller's own; comes back in mefa_completion.
     */
    uint64_t cookie;
} mefa_request;

/**
 * Status of one task.
 */
typedef struct mefa_task_state {
    /**
     * A mefa_status.
     */
    int32_t status;
    /**
     * 0.
     */
    uint32_t reserved;
    /**
     * Bytes moved: all, or 0.
     */
    uint64_t bytes;
} mefa_task_state;

/**
 * Counters of one NIC since the transport was installed.
 */
typedef struct mefa_nic_stats {
    /**
     * sizeof(mefa_nic_stats), set by the caller; fields beyond it are not written.
     */
    size_t size;
    /**
     * Operations posted.
     */
    uint64_t posted;
    /**
     * Operations completed without an error.
     */
    uint64_t completed;
    /**
     * Operations that failed.
     */
    uint64_t failed;
    /**
     * Bytes of completed writes.
     */
    uint64_t bytes_written;
    /**
     * Bytes of completed reads.
     */
    uint64_t bytes_read;
    /**
     * Posts that the provider put off.
     */
    uint64_t put_off;
    /**
     * Turns that left work queued for lack of credits.
     */
    uint64_t starved;
    /**
     * Completions that belong to no operation in flight.
     */
    uint64_t strays;
    /**
     * Operations whose deadline passed.
     */
    uint64_t overdue;
    /**
     * Bytes queued or in flight now.
     */
    uint64_t pending_bytes;
    /**
     * Operations that failed, of this NIC or another, and were tried again over this one.
     */
    uint64_t retried;
    /**
     * Operations that failed because of the request itself: a wrong key, range or length.
     */
    uint64_t faults_permanent;
    /**
     * Because of the peer or its NIC.
     */
    uint64_t faults_peer;
    /**
     * Because of this NIC, or the way from it to the peer.
     */
    uint64_t faults_rail;
    /**
     * For lack of room somewhere.
     */
    uint64_t faults_pressure;
    /**
     * Because this library used the provider wrongly.
     */
    uint64_t faults_ours;
    /**
     * 1 if it failed too often in a row and is left out, but for a try now and then; else 0.
     */
    uint64_t paused;
} mefa_nic_stats;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * Version of this interface. It changes only when something that exists changes or goes away; compare
 * it with MEFA_ABI_VERSION. Never fails; any thread.
 */
uint32_t mefa_abi_version(void);

/**
 * Version of the library, for instance "0.1.0". A static string; never fails; any thread.
 */
const char *mefa_version(void);

/**
 * The text of this thread's last error: one line that says what happened, to whom, and what to do where
 * that is known. Empty if there was none. Valid until this thread's next failing call. Never fails.
 */
const char *mefa_last_error(void);

/**
 * Sends the library's log lines to `function` (with `context`), or back to standard error if it is NULL.
 * The level is that of MC_LOG_LEVEL. Affects the process; call it before mefa_install to see all lines.
 * After it returns, the former function may still be called for lines that were on their way.
 *
 * # Safety
 * `function` must be callable with `context`, from any thread, until it is replaced.
 */
int mefa_log_to(mefa_log_fn function,
                void *context);

/**
 * Opens the devices, starts the pollers, and gives the transport's number in `*out`. Environment
 * variables (MC_...) are read now. Takes some milliseconds a device. Any thread; several transports may
 * exist at once. The strings of `config` may go away afterwards; its callbacks and context must stay
 * until mefa_uninstall has returned 0.
 *
 * Errors: MEFA_CODE_INVALID_ARGUMENT, MEFA_CODE_MALFORMED_JSON (topology), MEFA_CODE_DEVICE_NOT_FOUND
 * (no such device, or none at all: the text says what was looked for; there is never a silent fallback),
 * MEFA_CODE_CONTEXT, MEFA_CODE_ENDPOINT.
 *
 * # Safety
 * `config` and what it points to must be valid; `out` must be writable.
 */
int mefa_install(const struct mefa_config *config,
                 mefa_transport *out);

/**
 * Cancels what is under way, waits up to 5 seconds for the provider to give it back, and closes
 * everything. The number and all batches and segments of the transport are unknown afterwards, and no callback
 * begins any more, whatever it returned. Waits for calls of other threads to leave; do not call it from a
 * callback.
 *
 * Errors: MEFA_CODE_INVALID_ARGUMENT for an unknown transport; MEFA_CODE_BUSY if other threads do not leave
 * within 10 seconds, or the provider does not return to ours, or from closing its devices, within 10 each, or a
 * callback that has begun within 5.
 * What they are in is closed when they leave; until then they use registered memory, and the context of a
 * callback that has begun, so neither may go away.
 */
int mefa_uninstall(mefa_transport transport);

/**
 * Registers one range; see mefa_register_many. `regions` may be NULL.
 *
 * # Safety
 * As mefa_register_many.
 */
int mefa_register(mefa_transport transport,
                  void *address,
                  uint64_t length,
                  const char *location,
                  mefa_region_fn regions,
                  void *context);

/**
 * Registers ranges for transfers from here and from peers, all or nothing. `regions`, which may be
 * NULL, is called once with the regions made and their keys. Any thread.
 *
 * Errors: MEFA_CODE_INVALID_ARGUMENT (NULL, empty, or wrapping range), MEFA_CODE_ADDRESS_OVERLAPPED,
 * MEFA_CODE_MEMORY (the provider refuses; the text says why), MEFA_CODE_TOO_MANY_REQUESTS.
 *
 * # Safety
 * The ranges must stay mapped, and free for peers to read and write, until mefa_unregister or mefa_uninstall
 * returned 0.
 */
int mefa_register_many(mefa_transport transport,
                       const struct mefa_memory *memories,
                       size_t count,
                       mefa_region_fn regions,
                       void *context);

/**
 * Ends the registration of the range that starts at `address`. Once it returned 0, nothing here uses
 * the memory any more. While transfers of ours use it, it waits for them, 5 seconds at most, and makes
 * progress; other memory may be registered meanwhile. Any thread.
 *
 * Errors: MEFA_CODE_ADDRESS_NOT_REGISTERED if no range starts there; MEFA_CODE_BUSY if transfers of ours
 * still use it then (it stays registered; the text says how many, and which is the oldest); MEFA_CODE_MEMORY
 * if the provider refuses (it is not registered any more).
 */
int mefa_unregister(mefa_transport transport,
                    void *address);

/**
 * Unregisters several ranges, and waits 5 seconds at most for all together. It goes on after an error, and
 * returns the first one. Any thread.
 *
 * # Safety
 * `addresses` must point to `count` pointers.
 */
int mefa_unregister_many(mefa_transport transport,
                         void *const *addresses,
                         size_t count);

/**
 * Gives our segment descriptor as Mooncake's JSON, for the host's metadata or for a peer. Any thread.
 *
 * # Safety
 * `text` must be callable with `context`.
 */
int mefa_descriptor_json(mefa_transport transport,
                         mefa_text_fn text,
                         void *context);

/**
 * Gives our segment descriptor as a structure. Any thread.
 *
 * # Safety
 * `segment` must be callable with `context`.
 */
int mefa_descriptor(mefa_transport transport, mefa_segment_fn segment, void *context);

/**
 * Opens a peer's segment from its descriptor as JSON (Mooncake's format, `length` not needed: it ends
 * with a NUL). Several may be open, also of the same peer. Any thread.
 *
 * Errors: MEFA_CODE_MALFORMED_JSON (the text says what and where), MEFA_CODE_ENDPOINT if the peer runs
 * another libfabric provider.
 *
 * # Safety
 * `json` must be a string; `out` must be writable.
 */
int mefa_segment_open_json(mefa_transport transport,
                           const char *json,
                           mefa_segment *out);

/**
 * As mefa_segment_open_json, from a structure.
 *
 * # Safety
 * `desc` and all it points to must be valid; `out` must be writable.
 */
int mefa_segment_open(mefa_transport transport,
                      const struct mefa_segment_desc *desc,
                      mefa_segment *out);

/**
 * Opens a segment by name: the host's fetch_segment gives the descriptor. Any thread; blocks as that
 * does.
 *
 * # Safety
 * `name` must be a string; `out` must be writable.
 */
int mefa_segment_open_name(mefa_transport transport,
                           const char *name,
                           mefa_segment *out);

/**
 * Replaces what is known of a segment. Transfers under way go on. Any thread.
 *
 * # Safety
 * `json` must be a string.
 */
int mefa_segment_update_json(mefa_transport transport, mefa_segment segment, const char *json);

/**
 * As mefa_segment_update_json, from a structure.
 *
 * # Safety
 * `desc` and all it points to must be valid.
 */
int mefa_segment_update(mefa_transport transport,
                        mefa_segment segment,
                        const struct mefa_segment_desc *desc);

/**
 * Closes a segment. Transfers under way go on. Any thread.
 */
int mefa_segment_close(mefa_transport transport, mefa_segment segment);

/**
 * Connects every NIC of ours to every NIC of the segment, so that the first transfer finds it done. Any
 * thread; blocks for as many handshakes as are needed (none if the peer is one of ours).
 *
 * Errors: MEFA_CODE_REJECT_HANDSHAKE, MEFA_CODE_ENDPOINT, MEFA_CODE_MALFORMED_JSON (what the host
 * answered).
 */
int mefa_segment_warm_up(mefa_transport transport,
                         mefa_segment segment);

/**
 * Answers a handshake that a peer sent to the host (JSON, Mooncake's format): the answer goes to
 * `text`, to be sent back. A peer that is refused gets an answer that says why. Any thread.
 *
 * Errors: MEFA_CODE_MALFORMED_JSON if the request cannot be read (there is no answer then).
 *
 * # Safety
 * `json` must be a string; `text` must be callable with `context`.
 */
int mefa_handshake_answer(mefa_transport transport,
                          const char *json,
                          mefa_text_fn text,
                          void *context);

/**
 * Reads a handshake (JSON, Mooncake's format), for a host whose metadata has the fields apart. Any
 * thread.
 *
 * Errors: MEFA_CODE_MALFORMED_JSON.
 *
 * # Safety
 * `json` must be a string; `handshake` must be callable with `context`.
 */
int mefa_handshake_parse(const char *json, mefa_handshake_fields_fn handshake, void *context);

/**
 * The other way round: a handshake as JSON. Any thread.
 *
 * # Safety
 * `handshake` and its strings must be valid; `text` must be callable with `context`.
 */
int mefa_handshake_format(const struct mefa_handshake *handshake, mefa_text_fn text, void *context);

/**
 * A new batch for up to `capacity` requests, 1 to 1048576. Free it with mefa_batch_free. Any thread.
 *
 * # Safety
 * `out` must be writable.
 */
int mefa_batch_allocate(mefa_transport transport,
                        size_t capacity,
                        mefa_batch *out);

/**
 * Frees a batch. Any thread.
 *
 * Errors: MEFA_CODE_BUSY while a request of it is pending (it is not freed).
 */
int mefa_batch_free(mefa_transport transport, mefa_batch batch);

/**
 * Adds requests to a batch and starts them, all or none. Their tasks are numbered on from those
 * already in the batch; with `batch` 0 they belong to none, and only on_completion is told of their
 * end. They end by `timeout_ns` nanoseconds from now (0: MC_SLICE_TIMEOUT). Any thread,
 * also several on one batch. Does not wait for transfers; may wait for a handshake with a new peer.
 *
 * Errors, with nothing started: MEFA_CODE_INVALID_ARGUMENT (unknown batch or segment, bad opcode or
 * flags, a range past the end of the address space), MEFA_CODE_TOO_MANY_REQUESTS (the batch is full),
 * MEFA_CODE_ADDRESS_NOT_REGISTERED (ours or the target's), MEFA_CODE_REJECT_HANDSHAKE,
 * MEFA_CODE_METADATA, MEFA_CODE_ENDPOINT, MEFA_CODE_MALFORMED_JSON (what the host answered).
 *
 * # Safety
 * `requests` must point to `count` requests.
 */
int mefa_submit(mefa_transport transport,
                mefa_batch batch,
                const struct mefa_request *requests,
                size_t count,
                uint64_t timeout_ns);

/**
 * Makes progress, for a caller who waits for on_completion: completions that are there now are told of
 * before it returns. Without it they come from the pollers, a little later. Any thread.
 */
int mefa_progress(mefa_transport transport);

/**
 * Status of task number `task` of a batch. Makes progress if it is pending, so polling it is enough.
 * Any thread.
 *
 * # Safety
 * `out` must be writable.
 */
int mefa_task_status(mefa_transport transport,
                     mefa_batch batch,
                     size_t task,
                     struct mefa_task_state *out);

/**
 * Status of a batch as a whole: MEFA_STATUS_PENDING while a task is, then MEFA_STATUS_COMPLETED if all
 * tasks did (or there are none), otherwise MEFA_STATUS_FAILED. `tasks`, which may be NULL, gets the
 * count of tasks. Makes progress if it is pending. Any thread.
 *
 * # Safety
 * `status` must be writable; `tasks` too, unless it is NULL.
 */
int mefa_batch_status(mefa_transport transport,
                      mefa_batch batch,
                      int32_t *status,
                      size_t *tasks);

/**
 * Gives the reason of a task that failed or timed out to `text`, in one line: operation, bytes, peer, NIC
 * of ours, time since mefa_submit, and the cause, in the provider's words if it has any. An empty one for
 * every other task. Any thread.
 *
 * # Safety
 * `text` must be callable with `context`.
 */
int mefa_task_error(mefa_transport transport,
                    mefa_batch batch,
                    size_t task,
                    mefa_text_fn text,
                    void *context);

/**
 * Waits until no task of a batch is pending, making progress, and gives the batch's status as
 * mefa_batch_status does. Any thread.
 *
 * Errors: MEFA_CODE_TIMEOUT if `timeout_ns` nanoseconds pass first (the batch goes on; nothing is
 * written).
 *
 * # Safety
 * `status` must be writable.
 */
int mefa_wait(mefa_transport transport, mefa_batch batch, uint64_t timeout_ns, int32_t *status);

/**
 * Cancels a batch's pending tasks. What is not posted yet ends at once, the rest when the provider
 * gives it back; then the status is MEFA_STATUS_CANCELED. Does not wait. Any thread.
 */
int mefa_cancel(mefa_transport transport, mefa_batch batch);

/**
 * Whether the provider has given back all memory of a batch's requests: 1 or 0 in `*quiet`. It may be
 * 0 after MEFA_STATUS_TIMEOUT; do not reuse the memory then (mefa_wait_quiet waits for it). Any thread.
 *
 * # Safety
 * `quiet` must be writable.
 */
int mefa_batch_quiet(mefa_transport transport,
                     mefa_batch batch,
                     int32_t *quiet);

/**
 * Waits until the provider has given back all memory of a batch's requests, making progress: what a caller
 * does before he uses memory again of which a task ended with MEFA_STATUS_TIMEOUT. Every task has a final
 * status then. Any thread.
 *
 * Errors: MEFA_CODE_TIMEOUT if `timeout_ns` nanoseconds pass first (nothing has changed; the text says how
 * many requests it is about).
 */
int mefa_wait_quiet(mefa_transport transport,
                    mefa_batch batch,
                    uint64_t timeout_ns);

/**
 * Count of NICs in use in `*count`. Any thread.
 *
 * # Safety
 * `count` must be writable.
 */
int mefa_nic_count(mefa_transport transport, size_t *count);

/**
 * Counters of NIC number `nic`. Set `out->size` before the call. Any thread; the counters are each
 * right, but not all of one moment.
 *
 * # Safety
 * `out` must be writable in the size that it says.
 */
int mefa_stats(mefa_transport transport, size_t nic, struct mefa_nic_stats *out);

/**
 * Gives all counters as JSON, with the provider and NIC names. Any thread.
 *
 * # Safety
 * `text` must be callable with `context`.
 */
int mefa_stats_json(mefa_transport transport, mefa_text_fn text, void *context);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* MOONCAKE_EFA_H */
