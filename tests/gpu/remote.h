// SPDX-License-Identifier: Apache-2.0
//
// The other process of the GPU tests: this program, as `gpu_tests --peer PROVIDER NAME [SETTING=VALUE...]`. It obeys
// one-line commands; N is the number of a buffer:
//
//   allocate KIND LENGTH             memory (buffer.h has the kinds), registered         -> ADDRESS
//   fill N OFFSET LENGTH SEED AT     writes a pattern into it                            -> ok
//   check N OFFSET LENGTH SEED AT    compares it with one                                -> ok, or what differs
//   descriptor                       its segment descriptor                              -> JSON
//   open JSON                        the segment that it transfers to and from           -> ok
//   write|read N OFFSET ADDRESS LENGTH   one transfer                                    -> its status
//   unregister N                     ends a registration                                 -> the return code
//   free N                           frees the memory
//   contexts                         which GPUs have a context, and had one              -> 0 or 1 for each
//   cuda                             whether a CUDA driver is in the process             -> yes or no
//   imports                          how much of others' memory it has by IPC, as the fake driver counts
//   logged TEXT                      how many lines of its log have this text            -> a number
//
// It ends when the commands do, with 0 if it left nothing behind. Settings: MEFA_TEST_NO_CUDA=1 it never loads CUDA,
// MEFA_TEST_LATE_CUDA=1 it loads CUDA after its transport.
#pragma once

#include "buffer.h"

#include <algorithm>
#include <fstream>
#include <mutex>
#include <sstream>
#include <sys/prctl.h>

namespace gpu {

inline bool cuda_is_loaded() {
    std::ifstream maps("/proc/self/maps");
    for (std::string line; std::getline(maps, line);)
        if (line.find("libcuda.so") != std::string::npos) return true;
    return false;
}

// What the library has said, for as long as the process lives.
class Log {
public:
    void add(int level, const char *text) {
        const std::lock_guard<std::mutex> guard(lock_);
        lines_.push_back(text);
        if (level == 1) std::cerr << "the peer: " << text << std::endl;
    }
    std::ptrdiff_t count(const std::string &text) {
        const std::lock_guard<std::mutex> guard(lock_);
        return std::count_if(lines_.begin(), lines_.end(), [&](const std::string &line) { return line.find(text) != std::string::npos; });
    }

private:
    std::mutex lock_;
    std::vector<std::string> lines_;
};

inline Log &log() {
    static Log *log = new Log; // lines may come until the very end
    return *log;
}

class Serving {
public:
    explicit Serving(mefa::Transport transport) : transport_(std::move(transport)) {}

    std::string answer(const std::string &line) {
        std::istringstream words(line);
        std::string verb;
        words >> verb;
        std::uint64_t number = 0, a = 0, b = 0, c = 0, d = 0;
        if (verb == "allocate") {
            std::string kind;
            words >> kind >> a;
            buffers_.push_back(std::make_unique<Buffer>(kind, a));
            const int code = mefa_register(transport_.raw(), buffers_.back()->data(), a, nullptr, nullptr, nullptr);
            if (code != 0) {
                buffers_.pop_back();
                return "error " + std::to_string(code) + " " + mefa_last_error();
            }
            return std::to_string(buffers_.back()->address());
        }
        if (verb == "descriptor") return must(transport_.descriptor_json());
        if (verb == "open") {
            std::string json;
            std::getline(words >> std::ws, json);
            segment_.emplace(must(transport_.open_json(json)));
            return "ok";
        }
        if (verb == "logged") {
            std::string text;
            std::getline(words >> std::ws, text);
            return std::to_string(log().count(text));
        }
        if (verb == "imports") return std::to_string(Driver::get()->counts().imports);
        if (verb == "contexts") return contexts();
        if (verb == "cuda") return cuda_is_loaded() ? "yes" : "no";
        words >> number >> a >> b >> c >> d;
        const auto &buffer = buffers_.at(number);
        if (verb == "free") {
            buffers_.at(number).reset();
            return "ok";
        }
        if (!buffer) throw std::runtime_error("it is free: " + line);
        if (verb == "fill") {
            buffer->fill(a, b, c, d);
            return "ok";
        }
        if (verb == "check") {
            const auto same = buffer->is(a, b, c, d);
            return same ? "ok" : same.message();
        }
        if (verb == "unregister") return std::to_string(mefa_unregister(transport_.raw(), buffer->data()));
        if (verb == "write" || verb == "read") {
            const void *ours = reinterpret_cast<const void *>(buffer->address() + a);
            void *ours_too = reinterpret_cast<void *>(buffer->address() + a);
            return std::to_string(run(transport_, verb == "write" ? segment_.value().write(ours, b, c)
                                                                  : segment_.value().read(ours_too, b, c)));
        }
        throw std::runtime_error("no such command: " + line);
    }

    // Gives up everything; what is left behind, or "".
    std::string end(const std::string &state_before) {
        segment_.reset();
        for (const auto &buffer : buffers_)
            if (buffer) mefa_unregister(transport_.raw(), buffer->data());
        must(transport_.close());
        buffers_.clear();
        if (!cuda_is_loaded() || Driver::get() == nullptr) return "";
        const Driver &driver = *Driver::get();
        const std::string now = state(driver), wrong = misdeeds(driver);
        if (!wrong.empty()) return wrong;
        return state_before.empty() || now == state_before ? "" : "it was: " + state_before + "now: " + now;
    }

private:
    static std::string contexts() {
        const Driver *driver = cuda_is_loaded() ? Driver::get() : nullptr;
        std::string said;
        for (int device = 0; driver && device < driver->devices(); ++device) {
            unsigned flags = 0;
            int active = 0;
            driver->ok(driver->cuDevicePrimaryCtxGetState(device, &flags, &active));
            said += active || driver->counts().contexts_created[device] ? "1" : "0";
        }
        return said.empty() ? "none" : said;
    }

    mefa::Transport transport_;
    std::optional<mefa::Segment> segment_;
    std::vector<std::unique_ptr<Buffer>> buffers_;
};

// argv: --peer PROVIDER NAME [SETTING=VALUE...]
inline int serve(int count, char **arguments) {
    prctl(PR_SET_PDEATHSIG, SIGKILL); // also when stopped
    check_start(600);
    for (int i = 4; i < count; ++i) putenv(arguments[i]);
    try {
        std::string before;
        const auto cuda = [&before] {
            if (Driver::get() != nullptr) before = state(*Driver::get());
        };
        const bool none = std::getenv("MEFA_TEST_NO_CUDA") != nullptr, late = std::getenv("MEFA_TEST_LATE_CUDA") != nullptr;
        if (!none && !late) cuda();
        must(mefa::log_to([](int level, const char *text) { log().add(level, text); }));
        Serving serving(must(mefa::Transport::install(mefa::Config(arguments[3]).provider(arguments[2]))));
        if (!none && late) cuda();
        std::cout << "ready" << std::endl;
        for (std::string line; std::getline(std::cin, line);) std::cout << serving.answer(line) << std::endl;
        const std::string left = serving.end(before);
        if (!left.empty()) std::cerr << "the peer leaves things behind: " << left << std::endl;
        return left.empty() ? 0 : 1;
    } catch (const std::exception &error) {
        std::cerr << "the peer: " << error.what() << std::endl;
        return 1;
    }
}

class Remote : public Process {
public:
    explicit Remote(const std::string &provider, const std::string &name = "there:1", std::vector<std::string> settings = {})
        : Process(words(provider, name, std::move(settings))) {
        if (answer() != "ready") throw std::runtime_error("the peer is not ready");
    }
    // Memory of the peer's.
    class Theirs {
    public:
        Theirs(Remote &remote, std::string number, Address address)
            : remote_(&remote), number_(std::move(number)), address_(address) {}
        Address address() const { return address_; }
        void fill(std::uint64_t offset, std::uint64_t length, std::uint64_t seed, std::uint64_t at) const {
            const std::string said = remote_->ask("fill " + number_ + four(offset, length, seed, at));
            if (said != "ok") throw std::runtime_error("fill: " + said);
        }
        testing::AssertionResult is(std::uint64_t offset, std::uint64_t length, std::uint64_t seed, std::uint64_t at) const {
            const std::string said = remote_->ask("check " + number_ + four(offset, length, seed, at));
            if (said == "ok") return testing::AssertionSuccess();
            return testing::AssertionFailure() << "the peer's memory: " << said;
        }
        int unregister() const { return std::stoi(remote_->ask("unregister " + number_)); }
        void free() const { remote_->ask("free " + number_); }
        // Its process writes it to, or reads it from, memory of the segment that it has open.
        int write(std::uint64_t offset, Address to, std::uint64_t length) const { return move("write ", offset, to, length); }
        int read(std::uint64_t offset, Address from, std::uint64_t length) const { return move("read ", offset, from, length); }

    private:
        int move(const std::string &verb, std::uint64_t offset, Address other, std::uint64_t length) const {
            return std::stoi(remote_->ask(verb + number_ + " " + std::to_string(offset) + " " + std::to_string(other) + " " +
                                          std::to_string(length)));
        }
        static std::string four(std::uint64_t a, std::uint64_t b, std::uint64_t c, std::uint64_t d) {
            return " " + std::to_string(a) + " " + std::to_string(b) + " " + std::to_string(c) + " " + std::to_string(d);
        }
        Remote *remote_;
        std::string number_;
        Address address_;
    };
    Theirs allocate(const std::string &kind, std::uint64_t length) {
        const std::string said = ask("allocate " + kind + " " + std::to_string(length));
        if (said.rfind("error", 0) == 0) throw std::runtime_error("the peer cannot register " + kind + ": " + said);
        return Theirs(*this, std::to_string(buffers_++), std::stoull(said));
    }
    std::string descriptor() { return ask("descriptor"); }
    void open(const std::string &json) {
        if (ask("open " + json) != "ok") throw std::runtime_error("open");
    }
    // Ends it; that it left nothing behind.
    testing::AssertionResult ends_clean() {
        const int status = finish();
        if (status == 0) return testing::AssertionSuccess();
        return testing::AssertionFailure() << "the peer ended with status " << status;
    }

private:
    static std::vector<std::string> words(const std::string &provider, const std::string &name, std::vector<std::string> settings) {
        std::vector<std::string> words = {"/proc/self/exe", "--peer", provider, name};
        words.insert(words.end(), settings.begin(), settings.end());
        return words;
    }

    unsigned buffers_ = 0;
};

} // namespace gpu
