// SPDX-License-Identifier: Apache-2.0
//
// The half of the adapter that knows no type of Mooncake's: it owns a transport of mooncake_efa.h, knows
// which of Mooncake's segments is which of ours, and keeps the local segment published. The other half is
// a Host: dropin.cpp (compiled into Mooncake) or swap.cpp (preloaded into a published binary).
//
// Codes are Mooncake's (include/error.h there), 0 is success. Any thread, unless said otherwise.

#ifndef MOONCAKE_EFA_ADAPTER_H
#define MOONCAKE_EFA_ADAPTER_H

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "mooncake_efa.h"

namespace mooncake_efa::adapter {

using Answered = std::function<void(const mefa_handshake &)>;

// What the engine does for us.
class Host {
public:
    virtual ~Host() = default;

    // A segment's descriptor as the engine has it now, fetched if it has none; nothing if there is none. It
    // is only compared, and handed to segment_json; a changed segment is another object.
    virtual std::shared_ptr<void> segment(std::uint64_t id) = 0;
    // The id of a segment by its name; nothing if there is no such segment.
    virtual std::optional<std::uint64_t> segment_id(const std::string &name) = 0;
    // The descriptor by name, and anew from the peer or the metadata service.
    virtual std::shared_ptr<void> fetch(const std::string &name) = 0;
    // Its JSON.
    virtual std::string segment_json(const std::shared_ptr<void> &descriptor) = 0;
    // Makes a descriptor that of our own segment; with `advertise` it is sent to the metadata service.
    virtual int publish(const mefa_segment_desc &descriptor, bool advertise) = 0;
    // Sends a handshake, and hands its answer to `answered`.
    virtual int handshake(const char *server, const mefa_handshake &ours, const Answered &answered) = 0;
    // Tells of requests that ended; on any thread, on the hot path.
    virtual void finished(const mefa_completion *completions, std::size_t count) noexcept = 0;
};

// Between a handshake as Mooncake has it and its fields; in each host and layout it is another type.
template <class Desc> mefa_handshake fields_of(const Desc &desc) {
    return {sizeof(mefa_handshake), desc.local_nic_path.c_str(), desc.peer_nic_path.c_str(),
            desc.efa_addr.c_str(), desc.reply_msg.c_str()};
}
template <class Desc> void set_fields(Desc &desc, const mefa_handshake &fields) {
    desc.local_nic_path = fields.local_nic_path;
    desc.peer_nic_path = fields.peer_nic_path;
    desc.efa_addr = fields.efa_addr;
    desc.reply_msg = fields.reply_msg;
}

// A Host's `handshake`, where `send(request, answer)` is the engine's way to send one.
template <class Desc, class Send> int shake_hands(const mefa_handshake &ours, const Answered &answered, Send send) {
    Desc request, answer;
    set_fields(request, ours);
    const int code = send(request, answer);
    // A refusal is an error too, with an answer that says why.
    if (code != 0 && answer.reply_msg.empty()) return code;
    answered(fields_of(answer));
    return 0;
}

// Mooncake's Status::Code for an error code of its own.
inline std::uint16_t status_of(int code) {
    constexpr std::uint16_t not_implemented = 999;
    return code == MEFA_CODE_NOT_IMPLEMENTED ? not_implemented : static_cast<std::uint16_t>(-code);
}

// What fails goes to the log too, in one line.
class Adapter {
public:
    // The host must outlive it, and those who are inside after close(): see `end`.
    explicit Adapter(Host &host) : host_(host) {}
    ~Adapter() { close(); }
    Adapter(const Adapter &) = delete;
    Adapter &operator=(const Adapter &) = delete;

    // Ends what is under way; seconds, if it does not come back. No callback begins afterwards. False if threads
    // are still inside after all, which may be in a method of the host's.
    bool close();
    // topology_json: Mooncake's priority matrix, whose NICs are used.
    int install(const std::string &server_name, const std::string &topology_json);
    // Publishes the local segment as it is now.
    int publish(bool advertise);

    // Registers all of `memories` or none.
    int add_memory(const std::vector<mefa_memory> &memories, bool advertise);
    template <class Buffer>
    int add_memory(const std::vector<Buffer> &buffers, const std::string &location) {
        std::vector<mefa_memory> memories;
        memories.reserve(buffers.size());
        for (const Buffer &buffer : buffers) memories.push_back({buffer.addr, buffer.length, location.c_str()});
        return add_memory(memories, true);
    }
    // Goes on after an error; the first one. What transfers still use after 5 seconds stays registered, and
    // published; the engine keeps it in its own list too when it gets the error, so its caller may try again.
    int remove_memory(const std::vector<void *> &addresses, bool advertise);

    // Starts requests, all or none; their `target` is the engine's segment id (it is replaced by ours). Each
    // cookie comes back in Host::finished.
    int submit(std::vector<mefa_request> &requests);
    // For somebody who waits for what `finished` tells.
    void progress() { mefa_progress(transport_); }
    // Connects all NICs to all NICs of a peer. Nothing is to be done for our own segment, or without a name.
    int warm_up(const std::string &name);
    // Answers a peer's handshake. A refusal is an answer with `reply_msg` set, and 0.
    template <class Desc> int answer(const Desc &peer, Desc &local) {
        const Answered answered = [&](const mefa_handshake &fields) { set_fields(local, fields); };
        const int code = answer_fields(fields_of(peer), answered);
        if (code != 0) local.reply_msg = error();
        return code;
    }

    // The transport itself.
    mefa_transport raw() const { return transport_; }
    // NICs in use, by number of their key in a region.
    const std::vector<std::string> &nics() const { return nics_; }
    // What went wrong last on this thread, for a caller who has just got an error from one of the above.
    static const char *error();

private:
    struct Known {
        std::shared_ptr<void> descriptor;
        mefa_segment segment;
    };
    int answer_fields(const mefa_handshake &request, const Answered &answered);
    // These two log nothing: it is for their callers to say what it was for.
    int find(std::uint64_t id, mefa_segment *segment);
    int learn(std::uint64_t id, const std::shared_ptr<void> &descriptor, mefa_segment *segment);

    Host &host_;
    mefa_transport transport_ = 0;
    std::string server_name_;
    std::vector<std::string> nics_;
    // Publication in the order of registration.
    std::mutex publishing_;
    // By the engine's segment id.
    std::shared_mutex mutex_;
    std::unordered_map<std::uint64_t, Known> known_;
};

// Ends a host, whose member `adapter` is, by its last owner. If threads are still inside it stays for ever, with all
// that it holds.
template <class Owner> void end(Owner owner) {
    if (owner != nullptr && !owner->adapter.close()) new Owner(std::move(owner));
}

// Sends log lines, the library's and ours, to `sink`, for good.
void log_to(void (*sink)(int level, const char *text) noexcept);

} // namespace mooncake_efa::adapter

#endif // MOONCAKE_EFA_ADAPTER_H
