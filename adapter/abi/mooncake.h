// SPDX-License-Identifier: Apache-2.0
//
// The structures of Mooncake's that a preloaded library has to read and write, laid out as in the hosts of
// hosts.tsv: default build, metrics on, event-driven completion off. Of the fields that are used, only those
// of a handshake differ between the layouts.
// Written from the facts that survey.py finds in the machine code; all other structures stay closed to us.

#ifndef MOONCAKE_EFA_ABI_MOONCAKE_H
#define MOONCAKE_EFA_ABI_MOONCAKE_H

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace mooncake_efa::abi {

// Transport::TransferRequest. Only ever seen by pointer.
struct Request {
    std::int32_t opcode; // 0 read, 1 write
    void *source;
    std::uint64_t target_id;
    std::uint64_t target_offset;
    std::size_t length;
    // What follows is not used, and not the same in all layouts.
};
static_assert(offsetof(Request, target_id) == 16 && offsetof(Request, length) == 32);

// Transport::TransferTask. Only ever seen by pointer.
struct Task {
    std::uint64_t slice_count;
    std::uint64_t success_slice_count;
    std::uint64_t failed_slice_count;
    std::uint64_t transferred_bytes;
    bool is_finished;
    std::uint64_t total_bytes;
    std::uint64_t batch_id;
    void *transport;
    std::int64_t start_time;
    const Request *request;
    // What follows is not used, and not the same in all layouts.
};
static_assert(offsetof(Task, is_finished) == 32 && offsetof(Task, total_bytes) == 40 && offsetof(Task, request) == 72);

// Transport::TransferStatus.
struct TaskStatus {
    std::int32_t status; // 0 waiting
    std::size_t transferred_bytes;
};
static_assert(sizeof(TaskStatus) == 16);

// Transport::BufferEntry.
struct Buffer {
    void *addr;
    std::size_t length;
};
static_assert(sizeof(Buffer) == 16);

// TransferMetadata::HandShakeDesc.
struct Handshake {
    static constexpr const char *layout = "mooncake-0.3.13";
    std::string payload;
    std::string local_nic_path;
    std::uint16_t local_lid = 0;
    std::string local_gid;
    std::string peer_nic_path;
    std::vector<std::uint32_t> qp_num;
    bool ready_ack = false;
    bool ready_ack_supported = false;
    // Three of other transports; Mooncake's public source did not have them when it was read.
    std::int32_t notify_qp_num = 0;
    std::uint16_t notify_rq_depth = 0;
    bool ctrl_channel = false;
    std::string reply_msg;
    std::string efa_addr;
};
static_assert(sizeof(std::string) == 32, "the hosts use libstdc++ with its C++11 strings");
static_assert(sizeof(Handshake) == 240 && offsetof(Handshake, reply_msg) == 176 && offsetof(Handshake, efa_addr) == 208);

struct Handshake312 {
    static constexpr const char *layout = "mooncake-0.3.12";
    std::string local_nic_path;
    std::uint16_t local_lid = 0;
    std::string local_gid;
    std::string peer_nic_path;
    std::vector<std::uint32_t> qp_num;
    bool ready_ack = false;
    bool ready_ack_supported = false;
    std::string reply_msg;
    std::string efa_addr;
};
static_assert(sizeof(Handshake312) == 200 && offsetof(Handshake312, reply_msg) == 136);

// Status, as a function of the host's returns it: by a hidden pointer, because it has a destructor. The text,
// if there is one, was allocated by the host's own constructor.
struct Status {
    using Construct = void (*)(Status *, std::uint16_t code, std::size_t length, const char *text);

    Status() = default;
    Status(Construct construct, std::uint16_t code, const std::string &text) {
        construct(this, code, text.size(), text.data());
    }
    Status(const Status &) = delete;
    ~Status() {} // NOLINT: makes it a type that is returned in memory; the caller's is the one that frees

    std::uint16_t code = 0;
    const char *message = nullptr;
};
static_assert(sizeof(Status) == 16);

} // namespace mooncake_efa::abi

#endif // MOONCAKE_EFA_ABI_MOONCAKE_H
