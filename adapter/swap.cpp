// SPDX-License-Identifier: Apache-2.0
//
// libmooncake_efa_swap.so, for LD_PRELOAD: takes the place of mooncake::EfaTransport inside a binary that
// was built with the C++ one and exports it (engine.so and store.so of the published wheels, a shared
// libtransfer_engine.so).
//
// The dynamic linker finds our definitions of the class's methods before the binary's own, also for the
// entries of its vtable. The object stays the binary's: its constructor makes it, its destructor destroys
// it, and we do not know its layout; what we know of one is in a table by address. Descriptors are made
// and read by the binary's own functions, as JSON. What is left to know are a few plain structures
// (abi/mooncake.h), in binaries whose build id is in a table (abi/hosts.tsv); in any other, nothing of it
// is touched.

#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ostream>

#include "abi/mooncake.h"
#include "adapter.h"

#define EXPORT __attribute__((visibility("default"), used))
// Parts of mangled names: const std::string &, std::string &, what both install methods take.
#define STRING "RKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"
#define MUTABLE_STRING "RNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"
#define INSTALL "7installE" MUTABLE_STRING "St10shared_ptrINS_16TransferMetadataEES8_INS_8TopologyEE"
// The methods whose place we take: what we define, and what we call in the binary where we do not serve it.
#define EFA "_ZN8mooncake12EfaTransport"
#define EFA_INSTALL EFA INSTALL
#define EFA_REGISTER_ONE EFA "19registerLocalMemoryEPvm" STRING "bb"
#define EFA_UNREGISTER_ONE EFA "21unregisterLocalMemoryEPvb"
#define EFA_REGISTER_MANY EFA "24registerLocalMemoryBatchERKSt6vectorINS_9Transport11BufferEntryESaIS3_EE" STRING
#define EFA_UNREGISTER_MANY EFA "26unregisterLocalMemoryBatchERKSt6vectorIPvSaIS2_EE"
#define EFA_SUBMIT EFA "18submitTransferTaskERKSt6vectorIPNS_9Transport12TransferTaskESaIS4_EE"
#define EFA_STATUS EFA "17getTransferStatusEmmRNS_9Transport14TransferStatusE"
#define EFA_WARM_UP EFA "13warmupSegmentE" STRING
#define EFA_ANSWER EFA "21onSetupEfaConnectionsERKNS_16TransferMetadata13HandShakeDescERS2_"
#define EFA_DESTROY EFA "D1Ev"
#define EFA_DESTROY_AND_FREE EFA "D0Ev"

namespace {

using namespace mooncake_efa;
using adapter::Adapter;
using Shared = std::shared_ptr<void>;

// What abi/hosts.tsv knows.
struct KnownHost {
    const char *build_id, *layout;
};
constexpr KnownHost known_hosts[] = {
#include "hosts.inc"
    {nullptr, nullptr},
};

// ---- the binary that we are in

// A function of the binary's (or of a library that it needs), by its mangled name.
template <class F> struct Function;
template <class R, class... A> struct Function<R(A...)> {
    const char *name;
    R (*call)(A...) = nullptr;
    R operator()(A... arguments) const { return call(static_cast<A>(arguments)...); }
};

// A module that has a mooncake::EfaTransport of its own.
struct Module {
    void *base = nullptr;
    void *handle = nullptr;
    std::string path;
    std::string build_id;
    // Why it is not swapped; empty if it is.
    std::string refusal;
    bool fall_back = false;
    // Laid out as 0.3.12, not as 0.3.13.
    bool is_312 = false;

    // The binary's JSON reader: one for good, as its destructor is not exported. Larger than any release's.
    std::mutex reading;
    alignas(16) char reader[8192];

    // The C++ class.
    Function<int(void *, std::string &, Shared, Shared)> install{EFA_INSTALL};
    Function<int(void *, void *, std::size_t, const std::string &, bool, bool)> register_one{EFA_REGISTER_ONE};
    Function<int(void *, void *, bool)> unregister_one{EFA_UNREGISTER_ONE};
    Function<int(void *, const std::vector<abi::Buffer> &, const std::string &)> register_many{EFA_REGISTER_MANY};
    Function<int(void *, const std::vector<void *> &)> unregister_many{EFA_UNREGISTER_MANY};
    Function<abi::Status(void *, const std::vector<abi::Task *> &)> submit{EFA_SUBMIT};
    Function<abi::Status(void *, std::uint64_t, std::size_t, abi::TaskStatus &)> status{EFA_STATUS};
    Function<int(void *, const std::string &)> warm_up{EFA_WARM_UP};
    Function<int(void *, const void *, void *)> answer{EFA_ANSWER};
    Function<int(void *, std::string &)> start_handshakes{EFA "20startHandshakeDaemonE" MUTABLE_STRING};
    Function<void(void *)> destroy{EFA_DESTROY};
    Function<void(void *)> destroy_and_free{EFA_DESTROY_AND_FREE};
    // What it stands on.
    Function<int(void *, std::string &, Shared, Shared)> base_install{"_ZN8mooncake9Transport" INSTALL};
    Function<std::string(const void *)> topology_text{"_ZNK8mooncake8Topology8toStringB5cxx11Ev"};
    Function<Shared(void *, std::uint64_t, bool)> segment_by_id{
        "_ZN8mooncake16TransferMetadata18getSegmentDescByIDEmb"};
    Function<Shared(void *, const std::string &, bool)> segment_by_name{
        "_ZN8mooncake16TransferMetadata20getSegmentDescByNameE" STRING "b"};
    Function<std::uint64_t(void *, const std::string &)> segment_id{
        "_ZN8mooncake16TransferMetadata12getSegmentIDE" STRING};
    Function<int(void *, const void *, void *)> encode{
        "_ZN8mooncake16TransferMetadata17encodeSegmentDescERKNS0_11SegmentDescERN4Json5ValueE"};
    Function<Shared(void *, void *, const std::string &)> decode{
        "_ZN8mooncake16TransferMetadata17decodeSegmentDescERN4Json5ValueE" STRING};
    Function<int(void *, std::uint64_t, const std::string &, Shared &&)> set_local_segment{
        "_ZN8mooncake16TransferMetadata15addLocalSegmentEm" STRING "OSt10shared_ptrINS0_11SegmentDescEE"};
    Function<int(void *, std::uint64_t)> advertise{"_ZN8mooncake16TransferMetadata22updateLocalSegmentDescEm"};
    Function<int(void *, const std::string &, const void *, void *)> send_handshake{
        "_ZN8mooncake16TransferMetadata13sendHandshakeE" STRING "RKNS0_13HandShakeDescERS9_"};
    Function<void(abi::Status *, std::uint16_t, std::size_t, const char *)> make_status{
        "_ZN8mooncake6StatusC1ENS0_4CodeESt17basic_string_viewIcSt11char_traitsIcEE"};
    Function<void(void *, int)> json_make{"_ZN4Json5ValueC1ENS_9ValueTypeE"};
    Function<void(void *)> json_drop{"_ZN4Json5ValueD1Ev"};
    Function<void(void *)> json_reader_make{"_ZN4Json6ReaderC1Ev"};
    Function<bool(void *, const std::string &, void *, bool)> json_read{
        "_ZN4Json6Reader5parseE" STRING "RNS_5ValueEb"};
    Function<std::string(const void *)> json_text{"_ZNK4Json5Value14toStyledStringB5cxx11Ev"};
    // Its log.
    Function<void(void *, const char *, int, int)> log_make{"_ZN6google10LogMessageC1EPKcii"};
    Function<std::ostream &(void *)> log_stream{"_ZN6google10LogMessage6streamEv"};
    Function<void(void *)> log_end{"_ZN6google10LogMessageD1Ev"};

    template <class Each> void originals(Each each) {
        each(install), each(register_one), each(unregister_one), each(register_many), each(unregister_many);
        each(submit), each(status), each(warm_up), each(answer), each(destroy), each(destroy_and_free);
    }
    template <class Each> void needed(Each each) {
        each(start_handshakes), each(base_install), each(topology_text), each(segment_by_id);
        each(segment_by_name), each(segment_id), each(encode), each(decode), each(set_local_segment);
        each(advertise), each(send_handshake), each(make_status), each(json_make), each(json_drop);
        each(json_reader_make), each(json_read), each(json_text);
    }
    template <class F> bool find(F &function) {
        function.call = reinterpret_cast<decltype(function.call)>(dlsym(handle, function.name));
        return function.call != nullptr;
    }
};

// Our own lines, also where there is no log of the host's.
Module *log_module;

void to_log(int level, const char *text) noexcept {
    const Module *module = log_module;
    if (module == nullptr || module->log_end.call == nullptr) {
        std::fprintf(stderr, "mooncake-efa: %s\n", text);
        return;
    }
    if (level > 3) return; // glog's VLOG is not to be had from outside; MC_LOG_LEVEL's finer lines are lost
    constexpr int info = 0, warning = 1, error = 2;
    // Larger than a LogMessage of any release.
    alignas(16) char message[1024];
    module->log_make(message, "mooncake_efa", 0, level == 1 ? error : level == 2 ? warning : info);
    module->log_stream(message) << "EfaTransport: " << text;
    module->log_end(message);
}

std::string build_id_at(const void *base) {
    struct Search {
        const void *base;
        std::string found;
    } search{base, {}};
    dl_iterate_phdr(
        [](dl_phdr_info *info, std::size_t, void *to) {
            auto &search = *static_cast<Search *>(to);
            std::uintptr_t start = UINTPTR_MAX;
            for (int i = 0; i < info->dlpi_phnum; ++i)
                if (info->dlpi_phdr[i].p_type == PT_LOAD)
                    start = std::min<std::uintptr_t>(start, info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
            if ((start & ~std::uintptr_t(4095)) != reinterpret_cast<std::uintptr_t>(search.base)) return 0;
            for (int i = 0; i < info->dlpi_phnum; ++i) {
                const auto &header = info->dlpi_phdr[i];
                if (header.p_type != PT_NOTE) continue;
                const char *note = reinterpret_cast<const char *>(info->dlpi_addr + header.p_vaddr);
                const char *end = note + header.p_memsz;
                while (note + sizeof(ElfW(Nhdr)) <= end) {
                    const auto *head = reinterpret_cast<const ElfW(Nhdr) *>(note);
                    const char *name = note + sizeof *head;
                    const char *bytes = name + ((head->n_namesz + 3) & ~3U);
                    if (head->n_type == NT_GNU_BUILD_ID && head->n_namesz == 4 &&
                        std::memcmp(name, "GNU", 4) == 0) {
                        char digits[3];
                        for (std::size_t at = 0; at < head->n_descsz; ++at) {
                            std::snprintf(digits, sizeof digits, "%02x", static_cast<unsigned char>(bytes[at]));
                            search.found += digits;
                        }
                        return 1;
                    }
                    note = bytes + ((head->n_descsz + 3) & ~3U);
                }
            }
            return 1;
        },
        &search);
    return search.found;
}

bool is_set(const char *variable) {
    const char *value = std::getenv(variable);
    return value != nullptr && *value != '\0' && std::strcmp(value, "0") != 0;
}

// Fills in what can be known of a module, and whether it is to be swapped.
void recognise(Module &module) {
    module.build_id = build_id_at(module.base);
    bool whole = true;
    module.originals([&](auto &function) { whole = module.find(function) && whole; });
    module.fall_back = whole && is_set("MC_EFA_SWAP_FALLBACK");

    const char *layout = std::getenv("MC_EFA_SWAP_LAYOUT");
    for (const KnownHost *host = known_hosts; layout == nullptr && host->build_id != nullptr; ++host)
        if (module.build_id == host->build_id) layout = host->layout;
    if (layout == nullptr) {
        module.refusal = "this build of Mooncake is not one that mooncake-efa " + std::string(mefa_version()) +
                         " knows";
    } else if (std::strcmp(layout, abi::Handshake::layout) != 0 && std::strcmp(layout, abi::Handshake312::layout) != 0) {
        module.refusal = "there is no layout " + std::string(layout) + " (MC_EFA_SWAP_LAYOUT)";
    } else {
        module.is_312 = std::strcmp(layout, abi::Handshake312::layout) == 0;
        std::string missing;
        module.needed([&](auto &function) {
            if (!module.find(function)) missing = function.name;
        });
        if (!whole || !missing.empty())
            module.refusal = "it does not export what is needed (" + (whole ? missing : "the transport") + ")";
        else
            module.json_reader_make(module.reader);
    }
    // The log is no condition.
    if (!(module.find(module.log_make) && module.find(module.log_stream) && module.find(module.log_end)))
        module.log_end.call = nullptr;
}

// The module with the code at `address`. They are few, and stay.
Module &module_of(const void *address) {
    static std::mutex mutex;
    static std::vector<std::unique_ptr<Module>> modules;
    Dl_info info = {};
    dladdr(address, &info);
    const std::lock_guard<std::mutex> lock(mutex);
    for (const auto &module : modules)
        if (module->base == info.dli_fbase) return *module;
    auto module = std::make_unique<Module>();
    module->base = info.dli_fbase;
    module->path = info.dli_fname != nullptr ? info.dli_fname : "";
    module->handle = dlopen(module->path.c_str(), RTLD_NOLOAD | RTLD_LAZY);
    // The program itself is not found by its name.
    if (module->handle == nullptr) module->handle = dlopen(nullptr, RTLD_LAZY);
    recognise(*module);
    modules.push_back(std::move(module));
    return *modules.back();
}

// ---- one transport

// A value of the binary's JSON library, whose size we do not know; it is much smaller than this.
class Json {
public:
    explicit Json(Module &module) : module_(module) {
        constexpr int object = 7;
        module_.json_make(storage_, object);
    }
    ~Json() { module_.json_drop(storage_); }
    Json(const Json &) = delete;
    Json &operator=(const Json &) = delete;
    void *raw() { return storage_; }
    bool read(const std::string &text) {
        const std::lock_guard<std::mutex> lock(module_.reading);
        return module_.json_read(module_.reader, text, storage_, false);
    }
    std::string text() const { return module_.json_text(storage_); }

private:
    Module &module_;
    alignas(16) char storage_[256];
};

class Installed final : public adapter::Host {
public:
    Installed(Module &module, void *self, std::string name, Shared metadata)
        : module(module), self(self), name_(std::move(name)), metadata_(std::move(metadata)), adapter(*this) {}

    Shared segment(std::uint64_t id) override { return module.segment_by_id(metadata_.get(), id, false); }
    std::optional<std::uint64_t> segment_id(const std::string &name) override {
        if (!module.segment_by_name(metadata_.get(), name, false)) return std::nullopt;
        return module.segment_id(metadata_.get(), name);
    }
    Shared fetch(const std::string &name) override {
        return module.segment_by_name(metadata_.get(), name, true);
    }
    std::string segment_json(const Shared &descriptor) override {
        Json json(module);
        if (module.encode(metadata_.get(), descriptor.get(), json.raw()) != 0) return {};
        return json.text();
    }
    int publish(const mefa_segment_desc &, bool advertise) override {
        std::string text;
        const int code = mefa_descriptor_json(
            adapter.raw(),
            [](void *to, const char *json, std::size_t length) noexcept {
                static_cast<std::string *>(to)->assign(json, length);
            },
            &text);
        if (code != 0) return code;
        Json json(module);
        if (!json.read(text)) return MEFA_CODE_MALFORMED_JSON;
        Shared descriptor = module.decode(metadata_.get(), json.raw(), name_);
        if (!descriptor) return MEFA_CODE_MALFORMED_JSON;
        constexpr std::uint64_t local = 0;
        const int set = module.set_local_segment(metadata_.get(), local, name_, std::move(descriptor));
        return set != 0 || !advertise ? set : module.advertise(metadata_.get(), local);
    }
    int handshake(const char *server, const mefa_handshake &ours, const adapter::Answered &answered) override {
        const auto send = [&](const auto &request, auto &answer) {
            return module.send_handshake(metadata_.get(), server, &request, &answer);
        };
        return module.is_312 ? adapter::shake_hands<abi::Handshake312>(ours, answered, send)
                             : adapter::shake_hands<abi::Handshake>(ours, answered, send);
    }
    void finished(const mefa_completion *completions, std::size_t count) noexcept override {
        for (const mefa_completion *it = completions; it != completions + count; ++it) {
            auto *task = reinterpret_cast<abi::Task *>(it->cookie);
            const bool good = it->status == MEFA_STATUS_COMPLETED;
            __atomic_fetch_add(&task->transferred_bytes, it->bytes, __ATOMIC_RELAXED);
            // Last: afterwards the task may be gone.
            __atomic_fetch_add(good ? &task->success_slice_count : &task->failed_slice_count, 1,
                               __ATOMIC_ACQ_REL);
        }
    }

    template <class Handshake> int answer(const void *peer, void *local) {
        return adapter.answer(*static_cast<const Handshake *>(peer), *static_cast<Handshake *>(local));
    }

    Module &module;
    void *const self;

private:
    std::string name_;
    Shared metadata_;

public:
    // Last: its end may still call the rest.
    Adapter adapter;
};

// The transports that are ours, by the object's address. Looked up on every call, so without a lock; there are
// as many as engines in the process.
constexpr std::size_t most_installed = 256;
std::array<std::atomic<Installed *>, most_installed> table;
std::atomic<std::size_t> table_used;
std::mutex table_mutex;
// Held by whoever answers a peer's handshake: they come on a thread of the metadata's, which outlives the
// transport.
std::mutex answering;
// Objects of modules that were refused. Their own destructor must not run: it takes for granted that install
// began.
std::vector<void *> refused;

Installed *installed(const void *self) {
    const std::size_t used = table_used.load(std::memory_order_acquire);
    for (std::size_t i = 0; i < used; ++i) {
        Installed *one = table[i].load(std::memory_order_acquire);
        if (one != nullptr && one->self == self) return one;
    }
    return nullptr;
}

bool add(Installed *one) {
    const std::lock_guard<std::mutex> lock(table_mutex);
    const std::size_t used = table_used.load(std::memory_order_relaxed);
    for (std::size_t i = 0; i <= used && i < most_installed; ++i) {
        if (table[i].load(std::memory_order_relaxed) != nullptr) continue;
        table[i].store(one, std::memory_order_release);
        if (i == used) table_used.store(used + 1, std::memory_order_release);
        return true;
    }
    return false;
}

std::unique_ptr<Installed> take(const void *self) {
    const std::lock_guard<std::mutex> lock(table_mutex);
    for (auto &slot : table) {
        Installed *one = slot.load(std::memory_order_relaxed);
        if (one == nullptr || one->self != self) continue;
        slot.store(nullptr, std::memory_order_release);
        // Whoever found it before has answered then.
        const std::lock_guard<std::mutex> answered(answering);
        return std::unique_ptr<Installed>(one);
    }
    return nullptr;
}

// Ends what is ours of an object; the module that has the rest.
const Module &end(const void *self, const void *caller) {
    std::unique_ptr<Installed> one = take(self);
    const Module &module = one ? one->module : module_of(caller);
    adapter::end(std::move(one));
    return module;
}

bool forget_refused(const void *self) {
    const std::lock_guard<std::mutex> lock(table_mutex);
    for (std::size_t i = 0; i < refused.size(); ++i) {
        if (refused[i] != self) continue;
        refused.erase(refused.begin() + std::ptrdiff_t(i));
        return true;
    }
    return false;
}

int refuse(void *self, const Module &module) {
    const std::string text =
        "protocol efa is not available in " + module.path + " (build id " + module.build_id +
        "): " + module.refusal +
        ". Build Mooncake with cmake/MooncakeEfaDropIn.cmake, or run it without mooncake-efa; with "
        "MC_EFA_SWAP_FALLBACK=1 it goes on with its own C++ transport";
    to_log(1, text.c_str());
    const std::lock_guard<std::mutex> lock(table_mutex);
    refused.push_back(self);
    return MEFA_CODE_NOT_IMPLEMENTED;
}

int install(void *self, std::string &name, Shared metadata, Shared topology, Module &module) {
    if (log_module == nullptr) log_module = &module;
    if (!module.refusal.empty()) {
        if (!module.fall_back) return refuse(self, module);
        const std::string text = module.path + " goes on with its own C++ transport: " + module.refusal;
        to_log(2, text.c_str());
        return module.install(self, name, std::move(metadata), std::move(topology));
    }
    if (!topology) {
        to_log(1, "missing topology");
        return MEFA_CODE_INVALID_ARGUMENT;
    }
    // Gives the object its name and its metadata, for whoever asks for them.
    if (const int code = module.base_install(self, name, metadata, topology)) return code;
    adapter::log_to(to_log);
    auto one = std::make_unique<Installed>(module, self, name, std::move(metadata));
    int code = one->adapter.install(name, module.topology_text(topology.get()));
    if (code == 0) code = one->adapter.publish(false);
    if (code != 0) return code;
    Installed *const raw = one.get();
    if (!add(raw)) {
        to_log(1, "too many transports in this process");
        return MEFA_CODE_TOO_MANY_REQUESTS;
    }
    one.release();
    to_log(3, (std::string("mooncake-efa ") + mefa_version() + " serves protocol efa in " + module.path).c_str());
    // From here on peers may call.
    code = module.start_handshakes(self, name);
    if (code != 0) to_log(1, ("handshakes cannot be received (" + std::to_string(code) + ")").c_str());
    if (code == 0) code = raw->adapter.publish(true);
    if (code != 0) adapter::end(take(self));
    return code;
}

} // namespace

// ---- the methods that take the place of the binary's
//
// Functions with the methods' symbols and calling convention: the object comes first.

#define CALLER module_of(__builtin_return_address(0))

EXPORT int swap_install(void *self, std::string &name, Shared metadata, Shared topology) asm(EFA_INSTALL);
int swap_install(void *self, std::string &name, Shared metadata, Shared topology) {
    return install(self, name, std::move(metadata), std::move(topology), CALLER);
}

EXPORT int swap_register_one(void *self, void *address, std::size_t length, const std::string &location,
                             bool remote, bool advertise) asm(EFA_REGISTER_ONE);
int swap_register_one(void *self, void *address, std::size_t length, const std::string &location, bool remote,
                      bool advertise) {
    if (Installed *one = installed(self))
        return one->adapter.add_memory({{address, length, location.c_str()}}, advertise);
    return CALLER.register_one(self, address, length, location, remote, advertise);
}

EXPORT int swap_unregister_one(void *self, void *address, bool advertise)
    asm(EFA_UNREGISTER_ONE);
int swap_unregister_one(void *self, void *address, bool advertise) {
    if (Installed *one = installed(self)) return one->adapter.remove_memory({address}, advertise);
    return CALLER.unregister_one(self, address, advertise);
}

EXPORT int swap_register_many(void *self, const std::vector<abi::Buffer> &buffers, const std::string &location)
    asm(EFA_REGISTER_MANY);
int swap_register_many(void *self, const std::vector<abi::Buffer> &buffers, const std::string &location) {
    Installed *one = installed(self);
    if (one == nullptr) return CALLER.register_many(self, buffers, location);
    return one->adapter.add_memory(buffers, location);
}

EXPORT int swap_unregister_many(void *self, const std::vector<void *> &addresses)
    asm(EFA_UNREGISTER_MANY);
int swap_unregister_many(void *self, const std::vector<void *> &addresses) {
    if (Installed *one = installed(self)) return one->adapter.remove_memory(addresses, true);
    return CALLER.unregister_many(self, addresses);
}

EXPORT abi::Status swap_submit(void *self, const std::vector<abi::Task *> &tasks)
    asm(EFA_SUBMIT);
abi::Status swap_submit(void *self, const std::vector<abi::Task *> &tasks) {
    Installed *one = installed(self);
    if (one == nullptr) return CALLER.submit(self, tasks);
    thread_local std::vector<mefa_request> requests;
    requests.clear();
    for (abi::Task *task : tasks) {
        const abi::Request &request = *task->request;
        // One piece a task, as far as the binary can see.
        task->total_bytes += request.length;
        __atomic_fetch_add(&task->slice_count, 1, __ATOMIC_RELAXED);
        requests.push_back({request.opcode == 0 ? MEFA_READ : MEFA_WRITE, 0,
                            reinterpret_cast<std::uintptr_t>(request.source), request.target_id,
                            request.target_offset, request.length, reinterpret_cast<std::uintptr_t>(task)});
    }
    const int code = one->adapter.submit(requests);
    if (code == 0) return abi::Status();
    // None was started: all end here, so that the batch can be freed without a look at them.
    for (abi::Task *task : tasks) task->is_finished = true;
    for (abi::Task *task : tasks) __atomic_fetch_add(&task->failed_slice_count, 1, __ATOMIC_ACQ_REL);
    return abi::Status(one->module.make_status.call, adapter::status_of(code), Adapter::error());
}

EXPORT abi::Status swap_status(void *self, std::uint64_t batch, std::size_t task, abi::TaskStatus &status)
    asm(EFA_STATUS);
abi::Status swap_status(void *self, std::uint64_t batch, std::size_t task, abi::TaskStatus &status) {
    Installed *one = installed(self);
    if (one == nullptr) return CALLER.status(self, batch, task, status);
    // The binary's own reads the task's counters; if it is not done, ours makes them move.
    constexpr std::int32_t waiting = 0;
    status.status = waiting;
    {
        const abi::Status seen = one->module.status(self, batch, task, status);
        if (seen.code == 0 && status.status != waiting) return abi::Status();
        delete[] seen.message;
    }
    one->adapter.progress();
    return one->module.status(self, batch, task, status);
}

EXPORT int swap_warm_up(void *self, const std::string &name) asm(EFA_WARM_UP);
int swap_warm_up(void *self, const std::string &name) {
    if (Installed *one = installed(self)) return one->adapter.warm_up(name);
    return CALLER.warm_up(self, name);
}

EXPORT int swap_answer(void *self, const void *peer, void *local)
    asm(EFA_ANSWER);
int swap_answer(void *self, const void *peer, void *local) {
    const std::lock_guard<std::mutex> answers(answering);
    Installed *one = installed(self);
    if (one == nullptr) {
        const Module &module = CALLER;
        // Where we serve, it is one that has just ended: there is nothing behind it any more.
        return module.refusal.empty() ? MEFA_CODE_ENDPOINT : module.answer(self, peer, local);
    }
    return one->module.is_312 ? one->answer<abi::Handshake312>(peer, local)
                              : one->answer<abi::Handshake>(peer, local);
}

EXPORT void swap_destroy(void *self) asm(EFA_DESTROY);
void swap_destroy(void *self) {
    const Module &module = end(self, __builtin_return_address(0));
    if (!forget_refused(self)) module.destroy(self);
}

EXPORT void swap_destroy_and_free(void *self) asm(EFA_DESTROY_AND_FREE);
void swap_destroy_and_free(void *self) {
    const Module &module = end(self, __builtin_return_address(0));
    if (!forget_refused(self)) module.destroy_and_free(self);
}
