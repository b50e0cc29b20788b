// SPDX-License-Identifier: Apache-2.0
//
// C++17 over mooncake_efa.h, header only: owning types, results that cannot be overlooked, and the
// C functions' work without any of our own. What a call does, may return and costs is documented there.
//
//   auto transport = mooncake_efa::Transport::install(mooncake_efa::Config("host:port").provider("tcp"));
//   if (!transport) return complain(transport.error().text);
//
// Nothing here throws (std::bad_alloc apart); it compiles with -fno-exceptions and -fno-rtti. All types
// are move-only handles; one that was moved from, or whose Transport is gone, is refused by the library
// with MEFA_CODE_INVALID_ARGUMENT. Any thread may use a handle, several at once too; only moving,
// assigning, closing and destroying it must not race with its other uses.
//
// Callbacks come on the threads that mooncake_efa.h names, possibly on several at once, and must not
// throw: an exception ends the process.

#ifndef MOONCAKE_EFA_HPP
#define MOONCAKE_EFA_HPP

#include "mooncake_efa.h"

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace mooncake_efa {
using std::chrono::nanoseconds;

// Why a call failed: a mefa_code (0 means that it did not), and one line for a person.
struct Error { int code = MEFA_CODE_OK; std::string text; };

// A T, or why there is none; Result<> has nothing to give. Look before you dereference it.
template <class T = std::monostate> class [[nodiscard]] Result {
public:
    Result(T value) : value_(std::move(value)) {}
    Result(Error error) : error_(std::move(error)) {}
    explicit operator bool() const noexcept { return value_.has_value(); }
    T &operator*() & noexcept { return *value_; }
    T &&operator*() && noexcept { return std::move(*value_); }
    T *operator->() noexcept { return &*value_; }
    const Error &error() const noexcept { return error_; }
    int code() const noexcept { return error_.code; }
private:
    std::optional<T> value_;
    Error error_;
};

// Items that the caller keeps alive for one call: {pointer, count}, one item, a vector, or an array.
template <class T> struct Span {
    const T *data;
    std::size_t size;
    Span(const T *items, std::size_t count) : data(items), size(count) {}
    Span(const T &item) : Span(&item, 1) {}
    Span(const std::vector<T> &items) : data(items.data()), size(items.size()) {}
    template <std::size_t N> Span(const T (&items)[N]) : data(items), size(N) {}
};

namespace detail {
// A call's result. An error takes this thread's last text, so nothing may fail between the two.
template <class T = std::monostate> Result<T> done(int code, T value = T()) {
    return code == 0 ? Result<T>(std::move(value)) : Result<T>(Error{code, mefa_last_error()});
}

// What `function(arguments..., &value)` puts into a value.
template <class T, class F, class... A> Result<T> get(F function, A... arguments) {
    T value = {};
    const int code = function(arguments..., &value);
    return done(code, std::move(value));
}

// The same for a number that is to be a T.
template <class T, class F, class... A> Result<T> number(F function, A... arguments) {
    auto raw = get<std::int32_t>(function, arguments...);
    return raw ? Result<T>(static_cast<T>(*raw)) : Result<T>(raw.error());
}

// The text that `function(arguments..., text_function, context)` gives.
template <class F, class... A> Result<std::string> text(F function, A... arguments) {
    const mefa_text_fn keep = [](void *kept, const char *text, std::size_t length) noexcept {
        static_cast<std::string *>(kept)->assign(text, length);
    };
    return get<std::string>(function, arguments..., keep);
}

// A T that owns the number that `function(transport, arguments..., &number)` gives.
template <class T, class F, class... A> Result<T> make(F function, mefa_transport transport, A... arguments) {
    auto raw = get<std::uint64_t>(function, transport, arguments...);
    return raw ? Result<T>(T(transport, *raw)) : Result<T>(raw.error());
}

// A number of the library's, which `Drop` gives up in the destructor and `Close` in close().
template <class Raw, int (*Close)(mefa_transport, Raw), int (*Drop)(mefa_transport, Raw) = Close> class Owned {
public:
    Owned(mefa_transport transport, Raw raw) noexcept : transport_(transport), raw_(raw) {}
    Owned(Owned &&other) noexcept : transport_(std::exchange(other.transport_, 0)), raw_(other.raw_) {}
    Owned &operator=(Owned &&other) noexcept {
        const Owned old(transport_, raw_);
        transport_ = std::exchange(other.transport_, 0);
        raw_ = other.raw_;
        return *this;
    }
    ~Owned() { if (transport_ != 0) Drop(transport_, raw_); }
    // Gives it up now, and says how that went. What could not be given up stays as it is.
    Result<> close() {
        const int code = Close(transport_, raw_);
        if (code == 0) transport_ = 0;
        return done(code);
    }
    // The transport it belongs to, and its number or address, as the C functions take them.
    mefa_transport transport() const noexcept { return transport_; }
    Raw raw() const noexcept { return raw_; }
private:
    mefa_transport transport_;
    Raw raw_;
};

// Ends a batch's transfers, and frees it.
inline int end_batch(mefa_transport transport, mefa_batch batch) {
    const int code = mefa_batch_free(transport, batch);
    if (code != MEFA_CODE_BUSY) return code;
    std::int32_t status = 0;
    mefa_cancel(transport, batch);
    mefa_wait(transport, batch, 5000000000, &status);
    return mefa_batch_free(transport, batch);
}
} // namespace detail

// A peer's segment; closed by the destructor. Transfers under way go on.
struct Segment : detail::Owned<mefa_segment, &mefa_segment_close> {
    using Owned::Owned;
    Result<> update_json(const std::string &json) {
        return detail::done(mefa_segment_update_json(transport(), raw(), json.c_str()));
    }
    Result<> update(const mefa_segment_desc &desc) {
        return detail::done(mefa_segment_update(transport(), raw(), &desc));
    }
    Result<> warm_up() { return detail::done(mefa_segment_warm_up(transport(), raw())); }
    // Requests for Batch::submit: write `length` bytes from `ours` to the target's `address`, or read
    // from there into `ours`.
    mefa_request write(const void *ours, std::uint64_t address, std::uint64_t length, std::uint64_t cookie = 0) {
        return {MEFA_WRITE, 0, reinterpret_cast<std::uintptr_t>(ours), raw(), address, length, cookie};
    }
    mefa_request read(void *ours, std::uint64_t address, std::uint64_t length, std::uint64_t cookie = 0) {
        return {MEFA_READ, 0, reinterpret_cast<std::uintptr_t>(ours), raw(), address, length, cookie};
    }
};

// A batch of transfers; freed by the destructor, which cancels those under way and waits up to 5
// seconds for them. One that is still busy then is freed with the Transport. close() does not cancel.
struct Batch : detail::Owned<mefa_batch, &mefa_batch_free, &detail::end_batch> {
    using Owned::Owned;
    struct State { mefa_status status; std::size_t tasks; };
    // Starts all of the requests, or none. A timeout of 0 is MC_SLICE_TIMEOUT; a negative one has passed.
    Result<> submit(Span<mefa_request> requests, nanoseconds timeout = nanoseconds(0)) {
        const std::int64_t time = timeout.count() < 0 ? 1 : timeout.count();
        return detail::done(mefa_submit(transport(), raw(), requests.data, requests.size, std::uint64_t(time)));
    }
    Result<mefa_task_state> task(std::size_t task) const {
        return detail::get<mefa_task_state>(mefa_task_status, transport(), raw(), task);
    }
    Result<State> status() const {
        std::size_t tasks = 0;
        std::int32_t status = 0;
        const int code = mefa_batch_status(transport(), raw(), &status, &tasks);
        return detail::done(code, State{static_cast<mefa_status>(status), tasks});
    }
    // The batch's final status; MEFA_CODE_TIMEOUT if it has none by then.
    Result<mefa_status> wait(nanoseconds timeout) const {
        const std::int64_t time = timeout.count() < 0 ? 0 : timeout.count();
        return detail::number<mefa_status>(mefa_wait, transport(), raw(), std::uint64_t(time));
    }
    Result<std::string> task_error(std::size_t task) const {
        return detail::text(mefa_task_error, transport(), raw(), task);
    }
    Result<> cancel() { return detail::done(mefa_cancel(transport(), raw())); }
    // Whether the memory may be used again, which after MEFA_STATUS_TIMEOUT need not be so.
    Result<bool> quiet() const { return detail::number<bool>(mefa_batch_quiet, transport(), raw()); }
    // Waits until it may; MEFA_CODE_TIMEOUT if it may not by then.
    Result<> wait_quiet(nanoseconds timeout) const {
        const std::int64_t time = timeout.count() < 0 ? 0 : timeout.count();
        return detail::done(mefa_wait_quiet(transport(), raw(), std::uint64_t(time)));
    }
};

// Registered memory; unregistered by the destructor, which waits up to 5 seconds for transfers that use it. If
// that is not enough it stays registered until Transport's end: let Batches end first, or call close() and look.
class Registration : public detail::Owned<void *, &mefa_unregister> {
public:
    struct Region { std::uint64_t address, length; std::vector<std::uint64_t> keys; }; // a key a NIC
    using Owned::Owned;
    // What it became: one region, or several if it is longer than one may be.
    const std::vector<Region> &regions() const noexcept { return regions_; }
private:
    friend class Transport;
    std::vector<Region> regions_;
};

// How to install a transport. The callbacks live until it is uninstalled.
class Config {
public:
    using Completion = std::function<void(const mefa_completion *completions, std::size_t count)>;
    using Fetch = std::function<std::optional<std::string>(const char *name)>;
    using Handshake = std::function<std::optional<std::string>(const char *server, const char *request)>;
    // Our name for peers, "host:port".
    explicit Config(std::string name) : server_name_(std::move(name)) {}
    Config &provider(std::string name) { return provider_ = std::move(name), *this; }
    Config &topology(std::string json) { return topology_ = std::move(json), *this; }
    Config &device(std::string name) { return devices_.push_back(std::move(name)), *this; }
    // Gets completions; mefa_completion_fn tells on which threads and what it may do.
    Config &on_completion(Completion callback) { return completion_ = std::move(callback), *this; }
    // Gives a segment's descriptor as JSON, or nothing; see mefa_fetch_segment_fn.
    Config &fetch_segment(Fetch callback) { return fetch_ = std::move(callback), *this; }
    // Gives a handshake's answer, or nothing; see mefa_handshake_fn.
    Config &handshake(Handshake callback) { return handshake_ = std::move(callback), *this; }
private:
    friend class Transport;
    std::string server_name_;
    std::optional<std::string> provider_, topology_;
    std::vector<std::string> devices_;
    Completion completion_;
    Fetch fetch_;
    Handshake handshake_;
    mefa_transport raw_ = 0; // once it is installed
};

// An installed transport; uninstalled by the destructor, which may take seconds if work is under way.
class Transport {
public:
    static Result<Transport> install(Config config) {
        if (mefa_abi_version() != MEFA_ABI_VERSION)
            return Error{MEFA_CODE_NOT_IMPLEMENTED, "libmooncake_efa.so is of another ABI than its header"};
        auto host = std::make_unique<Config>(std::move(config));
        std::vector<const char *> devices;
        for (const std::string &name : host->devices_) devices.push_back(name.c_str());
        mefa_config c = {};
        c.size = sizeof c;
        c.server_name = host->server_name_.c_str();
        c.topology_json = host->topology_ ? host->topology_->c_str() : nullptr;
        c.provider = host->provider_ ? host->provider_->c_str() : nullptr;
        c.devices = devices.data();
        c.device_count = devices.size();
        if (host->fetch_)
            c.fetch_segment = [](void *to, const char *name, mefa_text_fn out, void *context) noexcept {
                return give(static_cast<Config *>(to)->fetch_(name), out, context);
            };
        if (host->handshake_)
            c.handshake = [](void *to, const char *server, const char *json, mefa_text_fn out,
                             void *context) noexcept {
                return give(static_cast<Config *>(to)->handshake_(server, json), out, context);
            };
        if (host->completion_)
            c.on_completion = [](void *to, const mefa_completion *completions, std::size_t count) noexcept {
                static_cast<Config *>(to)->completion_(completions, count);
            };
        c.context = host.get();
        const int code = mefa_install(&c, &host->raw_);
        return code == 0 ? Result(Transport(host.release())) : Error{code, mefa_last_error()};
    }
    // Uninstalls it now, and says how that went. It is not to be used any more, whatever the answer.
    Result<> close() { return detail::done(End()(host_.release())); }
    mefa_transport raw() const noexcept { return host_ ? host_->raw_ : 0; }
    // location: "cpu:0", "cuda:3", ...; NULL: find out. The memory must outlive its Registration.
    Result<Registration> register_memory(void *address, std::uint64_t length, const char *location = nullptr) {
        const mefa_memory one = {address, length, location};
        auto made = register_many(one);
        return made ? Result(std::move(made->front())) : made.error();
    }
    Result<std::vector<Registration>> register_many(Span<mefa_memory> memories) {
        std::vector<Registration> made;
        for (std::size_t i = 0; i < memories.size && memories.data != nullptr; ++i)
            made.emplace_back(mefa_transport(0), memories.data[i].address);
        const mefa_region_fn keep = [](void *to, const mefa_region *regions, std::size_t count) noexcept {
            for (const mefa_region *it = regions; it != regions + count; ++it)
                (*static_cast<std::vector<Registration> *>(to))[it->memory].regions_.push_back(
                    {it->address, it->length, {it->keys, it->keys + it->key_count}});
        };
        const int code = mefa_register_many(raw(), memories.data, memories.size, keep, &made);
        for (Registration &one : made)
            if (code == 0) static_cast<Registration::Owned &>(one) = {raw(), one.raw()};
        return detail::done(code, std::move(made));
    }
    // By address, whoever owns the registrations; goes on after an error, and returns the first one.
    Result<> unregister_many(Span<void *> addresses) {
        return detail::done(mefa_unregister_many(raw(), addresses.data, addresses.size));
    }
    Result<std::string> descriptor_json() const { return detail::text(mefa_descriptor_json, raw()); }
    // Calls `visit(const mefa_segment_desc &)` once; what it is given is gone afterwards.
    template <class F> Result<> descriptor(F visit) const {
        const mefa_segment_fn call = [](void *context, const mefa_segment_desc *segment) noexcept {
            (*static_cast<F *>(context))(*segment);
        };
        return detail::done(mefa_descriptor(raw(), call, &visit));
    }
    Result<Segment> open_json(const std::string &json) {
        return detail::make<Segment>(mefa_segment_open_json, raw(), json.c_str());
    }
    Result<Segment> open(const mefa_segment_desc &desc) {
        return detail::make<Segment>(mefa_segment_open, raw(), &desc);
    }
    Result<Segment> open_name(const std::string &name) {
        return detail::make<Segment>(mefa_segment_open_name, raw(), name.c_str());
    }
    Result<std::string> answer_handshake(const std::string &request) {
        return detail::text(mefa_handshake_answer, raw(), request.c_str());
    }
    Result<Batch> batch(std::size_t capacity) {
        return detail::make<Batch>(mefa_batch_allocate, raw(), capacity);
    }
    Result<std::size_t> nic_count() const { return detail::get<std::size_t>(mefa_nic_count, raw()); }
    Result<mefa_nic_stats> stats(std::size_t nic) const {
        mefa_nic_stats stats = {};
        stats.size = sizeof stats;
        const int code = mefa_stats(raw(), nic, &stats);
        return detail::done(code, stats);
    }
    Result<std::string> stats_json() const { return detail::text(mefa_stats_json, raw()); }
private:
    struct End { // If a callback may still be at work, it keeps what it has, for ever.
        int operator()(Config *host) const noexcept {
            const int code = mefa_uninstall(host != nullptr ? host->raw_ : 0);
            if (code != MEFA_CODE_BUSY) delete host;
            return code;
        }
    };
    explicit Transport(Config *host) : host_(host) {}
    static int give(const std::optional<std::string> &text, mefa_text_fn out, void *context) {
        if (text) out(context, text->c_str(), text->size());
        return text ? 0 : -1;
    }
    std::unique_ptr<Config, End> host_;
};

// Sends the process's log lines to `sink(level, text)`, on any thread; an empty one: standard error.
// A sink is kept until the process ends, as lines may be on their way to it.
inline Result<> log_to(std::function<void(int level, const char *text)> sink) {
    struct Kept { std::function<void(int, const char *)> sink; Kept *older; };
    static std::atomic<Kept *> newest{nullptr};
    const mefa_log_fn call = [](void *context, int level, const char *text) noexcept {
        static_cast<Kept *>(context)->sink(level, text);
    };
    if (!sink) return detail::done(mefa_log_to(nullptr, nullptr));
    Kept *kept = new Kept{std::move(sink), nullptr};
    kept->older = newest.exchange(kept);
    return detail::done(mefa_log_to(call, kept));
}
} // namespace mooncake_efa
#endif // MOONCAKE_EFA_HPP
