// SPDX-License-Identifier: Apache-2.0
//
// What the tests of Mooncake's C interface share: an engine that ends with its scope, memory, a second process.
#pragma once

#include "../c/pattern.h"

#include <transfer_engine_c.h>

#include <gtest/gtest.h>

#include <chrono>
#include <cinttypes>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fcntl.h>
#include <memory>
#include <stdexcept>
#include <string>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#include <utility>
#include <vector>

namespace te {

constexpr std::size_t KiB = 1024, MiB = 1024 * KiB;
constexpr char HOST[] = "127.0.0.1:12345";

// Whatever a test waits for comes sooner, on the slowest machine.
inline constexpr std::chrono::seconds LONG{60};

template <class Done> bool eventually(Done done) {
    const auto limit = std::chrono::steady_clock::now() + LONG;
    while (!done()) {
        if (std::chrono::steady_clock::now() > limit) return false;
        usleep(200);
    }
    return true;
}

class Engine {
public:
    explicit Engine(const char *metadata = "P2PHANDSHAKE", const char *name = HOST, int discover = 0)
        : handle_(createTransferEngine(metadata, name, "", 0, discover)) {}
    ~Engine() { end(); }
    Engine(Engine &&other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}

    operator transfer_engine_t() const { return handle_; }
    void end() {
        if (handle_ != nullptr) destroyTransferEngine(std::exchange(handle_, nullptr));
    }
    // `tcp`, or `efa` over the provider that MC_EFA_PROVIDER names.
    bool install(const std::string &provider) const {
        if (provider != "tcp" && discoverTopology(handle_) != 0) return false;
        return installTransport(handle_, provider == "tcp" ? "tcp" : "efa", nullptr) != nullptr;
    }
    std::string name() const {
        char text[256];
        return getLocalIpAndPort(handle_, text, sizeof text) == 0 ? text : "";
    }
    // Status of one transfer when it has ended, or -1.
    int run(int opcode, void *ours, segment_id_t segment, std::uint64_t theirs, std::uint64_t length) const {
        transfer_request_t request{opcode, ours, segment, theirs, length};
        return run({request});
    }
    int run(std::vector<transfer_request_t> requests) const {
        const batch_id_t batch = allocateBatchID(handle_, requests.size());
        if (batch == INVALID_BATCH) return -1;
        int ended = submitTransfer(handle_, batch, requests.data(), requests.size()) == 0 ? STATUS_COMPLETED : -1;
        for (std::size_t task = 0; ended == STATUS_COMPLETED && task < requests.size(); ++task) ended = wait(batch, task);
        return freeBatchID(handle_, batch) == 0 ? ended : -1;
    }
    int wait(batch_id_t batch, std::size_t task) const {
        transfer_status_t status{-1, 0};
        const bool ended = eventually([&] {
            return getTransferStatus(handle_, batch, task, &status) != 0 || status.status != STATUS_WAITING;
        });
        return ended ? status.status : -1;
    }

private:
    transfer_engine_t handle_;
};

class Memory {
public:
    explicit Memory(std::size_t length) : length_(length) {
        void *mapped = mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped == MAP_FAILED) throw std::runtime_error("mmap");
        data_ = static_cast<unsigned char *>(mapped);
    }
    ~Memory() { munmap(data_, length_); }
    Memory(const Memory &) = delete;
    unsigned char *data() const { return data_; }
    std::size_t size() const { return length_; }
    std::uint64_t at(std::size_t offset) const { return reinterpret_cast<std::uintptr_t>(data_) + offset; }

private:
    unsigned char *data_;
    std::size_t length_;
};

// Another process with an engine and some memory, which is filled with pattern 1.
class Peer {
public:
    Peer(const std::string &provider, std::size_t length, const char *metadata = "P2PHANDSHAKE",
         const char *name = HOST) {
        int in[2], out[2];
        if (pipe2(in, O_CLOEXEC) != 0 || pipe2(out, O_CLOEXEC) != 0) throw std::runtime_error("pipe");
        process_ = fork();
        if (process_ == 0) {
            dup2(in[0], 0);
            dup2(out[1], 1);
            const std::string bytes = std::to_string(length);
            execl("/proc/self/exe", "peer", "--peer", provider.c_str(), bytes.c_str(), metadata, name, nullptr);
            _exit(127);
        }
        close(in[0]);
        close(out[1]);
        to_ = fdopen(in[1], "w");
        from_ = fdopen(out[0], "r");
        char line[512] = "", peer[256] = "";
        if (fgets(line, sizeof line, from_) == nullptr || sscanf(line, "%255s %" SCNu64, peer, &base_) != 2)
            throw std::runtime_error("the peer did not start");
        name_ = peer;
    }
    ~Peer() { kill(); }
    Peer(const Peer &) = delete;

    const std::string &name() const { return name_; }
    std::uint64_t base() const { return base_; }
    // Whether its memory is as pattern_fill makes it.
    bool has(std::uint64_t offset, std::uint64_t length, std::uint64_t seed) {
        return ask("check %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", offset, length, seed) == "yes";
    }
    // Registers more memory, with pattern 1; its address.
    std::uint64_t grow(std::uint64_t length) { return std::stoull(ask("grow %" PRIu64 "\n", length)); }
    // Its notifications so far, as "name=message;".
    std::string notifications() { return ask("notifications\n"); }
    // It does nothing any more, when this returns, and goes on as if nothing had been.
    void stop() {
        ::kill(process_, SIGSTOP);
        waitpid(process_, nullptr, WUNTRACED); // its threads do not stop at once
    }
    void go_on() { ::kill(process_, SIGCONT); }
    void kill() {
        if (process_ <= 0) return;
        ::kill(process_, SIGKILL);
        waitpid(process_, nullptr, 0);
        process_ = -1;
        fclose(to_);
        fclose(from_);
    }

    // The other process's main(); none of its business with Google Test.
    static int main(char **arguments) {
        const std::string provider = arguments[2];
        Engine engine(arguments[4], arguments[5]);
        if (!engine.install(provider)) return 1;
        std::vector<std::unique_ptr<Memory>> all;
        const auto add = [&](std::size_t length) {
            all.push_back(std::make_unique<Memory>(length));
            pattern_fill(all.back()->data(), length, 1, 0);
            if (registerLocalMemory(engine, all.back()->data(), length, "cpu:0", 1) != 0) std::exit(1);
            return all.back()->at(0);
        };
        const std::uint64_t base = add(std::stoull(arguments[3]));
        const std::string name = std::strcmp(arguments[4], "P2PHANDSHAKE") == 0 ? engine.name() : arguments[5];
        printf("%s %" PRIu64 "\n", name.c_str(), base);
        fflush(stdout);
        char line[256];
        while (fgets(line, sizeof line, stdin) != nullptr) {
            std::uint64_t a = 0, b = 0, c = 0;
            if (sscanf(line, "check %" SCNu64 " %" SCNu64 " %" SCNu64, &a, &b, &c) == 3) {
                puts(pattern_differs(all[0]->data() + a, b, c, 0) == b ? "yes" : "no");
            } else if (sscanf(line, "grow %" SCNu64, &a) == 1) {
                printf("%" PRIu64 "\n", add(a));
            } else {
                int count = 0;
                notify_msg_t *messages = getNotifsFromEngine(engine, &count);
                for (int i = 0; i < count; ++i) printf("%s=%s;", messages[i].name, messages[i].msg);
                puts("");
                freeNotifsMsgBuf(messages, count);
            }
            fflush(stdout);
        }
        return 0;
    }

private:
    template <class... Arguments> std::string ask(const char *format, Arguments... arguments) {
        fprintf(to_, format, arguments...);
        fflush(to_);
        char answer[65536];
        if (fgets(answer, sizeof answer, from_) == nullptr) throw std::runtime_error("the peer is gone");
        answer[std::strcspn(answer, "\n")] = 0;
        return answer;
    }

    pid_t process_ = -1;
    FILE *to_ = nullptr, *from_ = nullptr;
    std::string name_;
    std::uint64_t base_ = 0;
};

// Another process, and an engine here that has registered memory and opened the other's segment.
struct Linked {
    Linked(const std::string &provider, std::size_t length) : peer(provider, length), memory(length) {
        if (!engine.install(provider)) throw std::runtime_error("the transport is not installed");
        if (registerLocalMemory(engine, memory.data(), length, "cpu:0", 1) != 0)
            throw std::runtime_error("the memory is not registered");
        segment = openSegment(engine, peer.name().c_str());
        if (segment <= LOCAL_SEGMENT) throw std::runtime_error("the segment is not open");
    }
    Peer peer;
    Memory memory;
    Engine engine;
    segment_id_t segment = -1;
};

// Over a provider.
class Over : public testing::TestWithParam<const char *> {
protected:
    void SetUp() override {
        // Protocol tcp says itself which provider it is.
        if (provider() != "tcp") setenv("MC_EFA_PROVIDER", GetParam(), 1);
        Engine engine;
        ASSERT_TRUE(engine) << "no engine";
        if (!engine.install(provider())) GTEST_SKIP() << "no device of provider " << provider();
    }
    std::string provider() const { return GetParam(); }
};

} // namespace te

#define OVER(suite, ...) INSTANTIATE_TEST_SUITE_P(Over, suite, testing::Values(__VA_ARGS__), \
    [](const auto &info) { return std::string(info.param); })

// The program's main(): a test's, or the other process's.
#define TE_MAIN \
    int main(int argc, char **argv) { \
        alarm(300); \
        if (argc == 6 && std::strcmp(argv[1], "--peer") == 0) return te::Peer::main(argv); \
        testing::InitGoogleTest(&argc, argv); \
        return RUN_ALL_TESTS(); \
    }
