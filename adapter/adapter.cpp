// SPDX-License-Identifier: Apache-2.0

#include "adapter.h"

#include <exception>

namespace mooncake_efa::adapter {
namespace {

void (*log_sink)(int level, const char *text) noexcept;

// Of this thread's last failure.
thread_local std::string last_error;

// Keeps why something failed; its code. Mooncake has no number for two of the library's.
int because(int code, std::string why) {
    last_error = std::move(why);
    return code == MEFA_CODE_TIMEOUT || code == MEFA_CODE_INTERNAL ? int(MEFA_CODE_CONTEXT) : code;
}

// The same for a code of the library's, which says why.
int checked(int code) { return code == 0 ? 0 : because(code, mefa_last_error()); }

// Logs what failed, if it did.
int told(const std::string &what, int code) {
    if (code != 0 && log_sink != nullptr) log_sink(1, (what + ": " + last_error).c_str());
    return code;
}

// A callback of the library's: an exception must not pass through it.
template <class F> int guarded(F f) noexcept {
    try {
        return f();
    } catch (const std::exception &) {
        return MEFA_CODE_METADATA;
    }
}

void keep_text(void *text, const char *from, std::size_t length) noexcept {
    static_cast<std::string *>(text)->assign(from, length);
}

void give_fields(void *answered, const mefa_handshake *fields) noexcept {
    (*static_cast<const Answered *>(answered))(*fields);
}

int fetch_segment(void *host, const char *name, mefa_text_fn text, void *context) noexcept {
    return guarded([&] {
        Host &ours = *static_cast<Host *>(host);
        const std::shared_ptr<void> newest = ours.fetch(name);
        if (!newest) return int(MEFA_CODE_METADATA);
        const std::string json = ours.segment_json(newest);
        text(context, json.c_str(), json.size());
        return 0;
    });
}

int handshake(void *host, const char *server, const char *request, mefa_text_fn text,
              void *context) noexcept {
    return guarded([&] {
        int sent = 0;
        const Answered send = [&](const mefa_handshake &ours) {
            sent = static_cast<Host *>(host)->handshake(server, ours, [&](const mefa_handshake &answer) {
                sent = mefa_handshake_format(&answer, text, context);
            });
        };
        const int code = mefa_handshake_parse(request, give_fields, const_cast<Answered *>(&send));
        return code != 0 ? code : sent;
    });
}

void finished(void *host, const mefa_completion *completions, std::size_t count) noexcept {
    static_cast<Host *>(host)->finished(completions, count);
}

} // namespace

bool Adapter::close() {
    // Its number is no transport's any more, if this is not the first time.
    const int code = transport_ == 0 ? 0 : checked(mefa_uninstall(transport_));
    if (code == MEFA_CODE_BUSY) told("something stays behind", code);
    return code != MEFA_CODE_BUSY;
}

int Adapter::install(const std::string &server_name, const std::string &topology_json) {
    server_name_ = server_name;
    mefa_config config = {};
    config.size = sizeof config;
    config.server_name = server_name.c_str();
    config.topology_json = topology_json.c_str();
    config.fetch_segment = fetch_segment;
    config.handshake = handshake;
    config.on_completion = finished;
    config.context = &host_;
    const auto keep_names = [](void *to, const mefa_segment_desc *desc) noexcept {
        for (std::size_t i = 0; i < desc->device_count; ++i)
            static_cast<std::vector<std::string> *>(to)->push_back(desc->devices[i].name);
    };
    int code = checked(mefa_install(&config, &transport_));
    if (code == 0) code = checked(mefa_descriptor(transport_, keep_names, &nics_));
    return told("cannot be installed", code);
}

int Adapter::publish(bool advertise) {
    struct Call {
        Host &host;
        bool advertise;
        int code;
    } call{host_, advertise, 0};
    const std::lock_guard<std::mutex> lock(publishing_);
    int code = checked(mefa_descriptor(
        transport_,
        [](void *to, const mefa_segment_desc *desc) noexcept {
            Call &ours = *static_cast<Call *>(to);
            ours.code = guarded([&] { return ours.host.publish(*desc, ours.advertise); });
        },
        &call));
    if (code == 0 && call.code != 0)
        code = because(call.code, "Mooncake's metadata answered " + std::to_string(call.code));
    return told("our segment " + server_name_ + " cannot be published", code);
}

int Adapter::add_memory(const std::vector<mefa_memory> &memories, bool advertise) {
    const int code =
        checked(mefa_register_many(transport_, memories.data(), memories.size(), nullptr, nullptr));
    return code != 0 ? told("memory cannot be registered", code) : publish(advertise);
}

int Adapter::remove_memory(const std::vector<void *> &addresses, bool advertise) {
    const int code = checked(mefa_unregister_many(transport_, addresses.data(), addresses.size()));
    told("memory cannot be unregistered", code);
    const int published = publish(advertise);
    return code != 0 ? code : published;
}

int Adapter::submit(std::vector<mefa_request> &requests) {
    std::uint64_t id = 0;
    mefa_segment segment = 0;
    int code = 0;
    for (mefa_request &request : requests) {
        if (segment == 0 || request.target != id) {
            id = request.target;
            code = find(id, &segment);
            if (code != 0) break;
        }
        request.target = segment;
    }
    if (code == 0) code = checked(mefa_submit(transport_, 0, requests.data(), requests.size(), 0));
    return code == 0 ? 0 : told("submission refused", code);
}

int Adapter::find(std::uint64_t id, mefa_segment *segment) {
    const std::shared_ptr<void> descriptor = host_.segment(id);
    if (!descriptor)
        return because(MEFA_CODE_METADATA, "Mooncake's metadata has no segment with id " + std::to_string(id));
    {
        const std::shared_lock<std::shared_mutex> lock(mutex_);
        const auto known = known_.find(id);
        if (known != known_.end() && known->second.descriptor == descriptor) {
            *segment = known->second.segment;
            return 0;
        }
    }
    return learn(id, descriptor, segment);
}

// The engine has a segment that we do not know, or has replaced its descriptor.
int Adapter::learn(std::uint64_t id, const std::shared_ptr<void> &descriptor, mefa_segment *segment) {
    const std::string json = host_.segment_json(descriptor);
    const std::unique_lock<std::shared_mutex> lock(mutex_);
    const auto known = known_.find(id);
    if (known == known_.end()) {
        if (const int code = checked(mefa_segment_open_json(transport_, json.c_str(), segment))) return code;
        known_.emplace(id, Known{descriptor, *segment});
        return 0;
    }
    *segment = known->second.segment;
    if (const int code = checked(mefa_segment_update_json(transport_, *segment, json.c_str()))) return code;
    known->second.descriptor = descriptor;
    return 0;
}

int Adapter::warm_up(const std::string &name) {
    if (name.empty() || name == server_name_) return 0;
    mefa_segment segment = 0;
    const std::optional<std::uint64_t> id = host_.segment_id(name);
    int code = id ? find(*id, &segment) : because(MEFA_CODE_INVALID_ARGUMENT, "it is not in the metadata");
    if (code == 0) code = checked(mefa_segment_warm_up(transport_, segment));
    return told("warm-up of segment " + name, code);
}

int Adapter::answer_fields(const mefa_handshake &request, const Answered &answered) {
    std::string asked, answer;
    int code = checked(mefa_handshake_format(&request, keep_text, &asked));
    if (code == 0) code = checked(mefa_handshake_answer(transport_, asked.c_str(), keep_text, &answer));
    if (code == 0)
        code = checked(mefa_handshake_parse(answer.c_str(), give_fields, const_cast<Answered *>(&answered)));
    return told("a handshake cannot be answered", code);
}

const char *Adapter::error() { return last_error.c_str(); }

void log_to(void (*sink)(int level, const char *text) noexcept) {
    log_sink = sink;
    mefa_log_to([](void *, int level, const char *text) noexcept { log_sink(level, text); }, nullptr);
}

} // namespace mooncake_efa::adapter
