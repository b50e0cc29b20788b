// SPDX-License-Identifier: Apache-2.0

#include "adapter.h"

#include <exception>

namespace mooncake_efa::adapter {
namespace {

// Mooncake has no number for these two of ours.
int code_of(int code) {
    return code == MEFA_CODE_TIMEOUT || code == MEFA_CODE_INTERNAL ? int(MEFA_CODE_CONTEXT) : code;
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

using Answered = std::function<void(const mefa_handshake &)>;

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

Adapter::~Adapter() {
    if (transport_ != 0) mefa_uninstall(transport_);
}

int Adapter::install(const std::string &server_name, const std::string &topology_json,
                     const std::vector<std::string> &devices) {
    std::vector<const char *> names;
    for (const std::string &name : devices) names.push_back(name.c_str());
    mefa_config config = {};
    config.size = sizeof config;
    config.server_name = server_name.c_str();
    config.topology_json = topology_json.c_str();
    config.devices = names.data();
    config.device_count = names.size();
    config.fetch_segment = fetch_segment;
    config.handshake = handshake;
    config.on_completion = finished;
    config.context = &host_;
    if (const int code = mefa_install(&config, &transport_)) return code_of(code);
    const auto keep_names = [](void *to, const mefa_segment_desc *desc) noexcept {
        for (std::size_t i = 0; i < desc->device_count; ++i)
            static_cast<std::vector<std::string> *>(to)->push_back(desc->devices[i].name);
    };
    return code_of(mefa_descriptor(transport_, keep_names, &nics_));
}

int Adapter::publish(bool advertise) {
    struct Call {
        Host &host;
        bool advertise;
        int code;
    } call{host_, advertise, 0};
    const std::lock_guard<std::mutex> lock(publishing_);
    const int code = mefa_descriptor(
        transport_,
        [](void *to, const mefa_segment_desc *desc) noexcept {
            Call &ours = *static_cast<Call *>(to);
            ours.code = guarded([&] { return ours.host.publish(*desc, ours.advertise); });
        },
        &call);
    return code != 0 ? code_of(code) : call.code;
}

int Adapter::add_memory(const std::vector<mefa_memory> &memories, bool advertise) {
    if (const int code = mefa_register_many(transport_, memories.data(), memories.size(), nullptr, nullptr))
        return code_of(code);
    return publish(advertise);
}

int Adapter::remove_memory(const std::vector<void *> &addresses, bool advertise) {
    const int code = mefa_unregister_many(transport_, addresses.data(), addresses.size());
    const int published = publish(advertise);
    return code != 0 ? code_of(code) : published;
}

int Adapter::submit(std::vector<mefa_request> &requests) {
    std::uint64_t id = 0;
    mefa_segment segment = 0;
    for (mefa_request &request : requests) {
        if (segment == 0 || request.target != id) {
            id = request.target;
            if (const int code = find(id, &segment)) return code;
        }
        request.target = segment;
    }
    return code_of(mefa_submit(transport_, 0, requests.data(), requests.size(), 0));
}

int Adapter::find(std::uint64_t id, mefa_segment *segment) {
    const std::shared_ptr<void> descriptor = host_.segment(id);
    if (!descriptor) return MEFA_CODE_METADATA;
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
        if (const int code = mefa_segment_open_json(transport_, json.c_str(), segment)) return code_of(code);
        known_.emplace(id, Known{descriptor, *segment});
        return 0;
    }
    *segment = known->second.segment;
    if (const int code = mefa_segment_update_json(transport_, *segment, json.c_str())) return code_of(code);
    known->second.descriptor = descriptor;
    return 0;
}

int Adapter::warm_up(std::uint64_t id) {
    mefa_segment segment = 0;
    if (const int code = find(id, &segment)) return code;
    return code_of(mefa_segment_warm_up(transport_, segment));
}

int Adapter::answer(const mefa_handshake &request, const Answered &answered) {
    std::string asked, answer;
    if (const int code = mefa_handshake_format(&request, keep_text, &asked)) return code_of(code);
    if (const int code = mefa_handshake_answer(transport_, asked.c_str(), keep_text, &answer))
        return code_of(code);
    return code_of(mefa_handshake_parse(answer.c_str(), give_fields, const_cast<Answered *>(&answered)));
}

void log_to(void (*sink)(int level, const char *text) noexcept) {
    static void (*ours)(int, const char *) noexcept;
    ours = sink;
    mefa_log_to([](void *, int level, const char *text) noexcept { ours(level, text); }, nullptr);
}

} // namespace mooncake_efa::adapter
