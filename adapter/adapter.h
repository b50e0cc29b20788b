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

// What the engine does for us.
class Host {
public:
    virtual ~Host() = default;

    // A segment's descriptor as the engine has it now, fetched if it has none; nothing if there is none. It
    // is only compared, and handed to segment_json; a changed segment is another object.
    virtual std::shared_ptr<void> segment(std::uint64_t id) = 0;
    // The same by name, and anew from the peer or the metadata service.
    virtual std::shared_ptr<void> fetch(const std::string &name) = 0;
    // Its JSON.
    virtual std::string segment_json(const std::shared_ptr<void> &descriptor) = 0;
    // Makes a descriptor that of our own segment; with `advertise` it is sent to the metadata service.
    virtual int publish(const mefa_segment_desc &descriptor, bool advertise) = 0;
    // Sends a handshake, and hands its answer to `answered`.
    virtual int handshake(const char *server, const mefa_handshake &ours,
                          const std::function<void(const mefa_handshake &)> &answered) = 0;
    // Tells of requests that ended; on any thread, on the hot path.
    virtual void finished(const mefa_completion *completions, std::size_t count) noexcept = 0;
};

class Adapter {
public:
    // The host must outlive it.
    explicit Adapter(Host &host) : host_(host) {}
    // Ends what is under way. No call of the host comes afterwards.
    ~Adapter();
    Adapter(const Adapter &) = delete;
    Adapter &operator=(const Adapter &) = delete;

    // topology_json: Mooncake's priority matrix. devices: NICs to use in this order, empty: the topology's.
    int install(const std::string &server_name, const std::string &topology_json,
                const std::vector<std::string> &devices);
    // Publishes the local segment as it is now.
    int publish(bool advertise);

    // Registers all of `memories` or none.
    int add_memory(const std::vector<mefa_memory> &memories, bool advertise);
    // Goes on after an error; the first one.
    int remove_memory(const std::vector<void *> &addresses, bool advertise);

    // Starts requests, all or none; their `target` is the engine's segment id (it is replaced by ours). Each
    // cookie comes back in Host::finished.
    int submit(std::vector<mefa_request> &requests);
    // For somebody who waits for what `finished` tells.
    void progress() { mefa_progress(transport_); }
    // Connects all NICs to all NICs of the peer with this segment id.
    int warm_up(std::uint64_t id);
    // Answers a peer's handshake. A refusal is an answer with `reply_msg` set, and 0.
    int answer(const mefa_handshake &request, const std::function<void(const mefa_handshake &)> &answered);

    // The transport itself.
    mefa_transport raw() const { return transport_; }
    // NICs in use, by number of their key in a region.
    const std::vector<std::string> &nics() const { return nics_; }
    // What went wrong last on this thread.
    static const char *error() { return mefa_last_error(); }

private:
    struct Known {
        std::shared_ptr<void> descriptor;
        mefa_segment segment;
    };
    int find(std::uint64_t id, mefa_segment *segment);
    int learn(std::uint64_t id, const std::shared_ptr<void> &descriptor, mefa_segment *segment);

    Host &host_;
    mefa_transport transport_ = 0;
    std::vector<std::string> nics_;
    // Publication in the order of registration.
    std::mutex publishing_;
    // By the engine's segment id.
    std::shared_mutex mutex_;
    std::unordered_map<std::uint64_t, Known> known_;
};

// Sends the library's log lines to `sink`, for good.
void log_to(void (*sink)(int level, const char *text) noexcept);

} // namespace mooncake_efa::adapter

#endif // MOONCAKE_EFA_ADAPTER_H
