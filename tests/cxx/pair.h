// SPDX-License-Identifier: Apache-2.0
//
// What the C++ tests share: a second process to transfer to and from (tests/c/target.h says what it
// can be asked), memory, and a fixture that gives every test its limits and skips where there is no
// such provider.
#pragma once

#include "../c/check.h"

#include <mooncake_efa.hpp>

#include <gtest/gtest.h>

#include <cinttypes>
#include <csignal>
#include <fcntl.h>
#include <filesystem>
#include <iostream>
#include <poll.h>
#include <stdexcept>
#include <string>
#include <sys/wait.h>
#include <thread>
#include <vector>

namespace mefa = mooncake_efa;
using namespace std::chrono_literals;

constexpr std::uint64_t MiB = 1 << 20;
// No test waits as long as this; it only keeps one that hangs from hanging for ever.
constexpr auto LONG = 60s;

// Zeroed pages, of which only those that are touched cost memory.
class Memory {
public:
    explicit Memory(std::uint64_t length) : data_(map_memory(length)), length_(length) {}
    Memory(const Memory &) = delete;
    ~Memory() { munmap(data_, length_); }
    unsigned char *data() const { return data_; }
    std::uint64_t size() const { return length_; }
    unsigned char *operator+(std::uint64_t offset) const { return data_ + offset; }
    void fill(std::uint64_t offset, std::uint64_t length, std::uint64_t seed, std::uint64_t at) const {
        pattern_fill(data_ + offset, length, seed, at);
    }
    // That a range is as pattern `seed` from place `at` on.
    testing::AssertionResult is(std::uint64_t offset, std::uint64_t length, std::uint64_t seed,
                                std::uint64_t at) const {
        const std::uint64_t first = pattern_differs(data_ + offset, length, seed, at);
        if (first == length) return testing::AssertionSuccess();
        return testing::AssertionFailure() << "byte " << offset + first << " of ours differs";
    }

private:
    unsigned char *data_;
    std::uint64_t length_;
};

// What a process's endpoints of the provider shm have in the file system, and leave there if it is killed.
inline std::vector<std::filesystem::path> shm_files(pid_t process) {
    std::vector<std::filesystem::path> files;
    for (const auto &entry : std::filesystem::directory_iterator("/dev/shm"))
        if (entry.path().filename().string().rfind(std::to_string(process) + ":", 0) == 0) files.push_back(entry.path());
    return files;
}

// Another process, which answers one-line commands. Whatever it does wrong ends the test by an exception.
class Process {
public:
    // The program and its arguments.
    explicit Process(std::vector<std::string> words) {
        int to[2], from[2];
        // Two pipes whose ends no other child inherits.
        if (pipe2(to, O_CLOEXEC) != 0 || pipe2(from, O_CLOEXEC) != 0) throw std::runtime_error("pipe");
        std::vector<char *> arguments;
        for (std::string &word : words) arguments.push_back(word.data());
        arguments.push_back(nullptr);
        process_ = fork();
        if (process_ == 0) {
            dup2(to[0], 0);
            dup2(from[1], 1);
            setenv("SOFTEFA_HOST", "1", 1); // on an emulated EFA device: another host
            execv(arguments[0], arguments.data());
            _exit(127);
        }
        close(to[0]);
        close(from[1]);
        commands_ = to[1];
        answers_ = from[0];
    }
    Process(const Process &) = delete;
    ~Process() {
        finish();
        close(answers_);
        if (commands_ >= 0) close(commands_);
    }
    // It ends when its commands do, and cleans up; if it does not, it is killed. Its exit status, as waitpid gives it.
    int finish() {
        if (process_ <= 0) return status_;
        close(commands_);
        commands_ = -1;
        resume();
        pollfd ended = {answers_, POLLIN, 0};
        poll(&ended, 1, 20000);
        kill();
        return status_;
    }

    std::string ask(const std::string &command) {
        const std::string line = command + "\n";
        if (write(commands_, line.data(), line.size()) != static_cast<ssize_t>(line.size()))
            throw std::runtime_error("the target takes no commands");
        return answer();
    }

    // Returns when it has stopped: it does nothing for its peers until resume().
    void stop() {
        int status = 0;
        ::kill(process_, SIGSTOP);
        if (waitpid(process_, &status, WUNTRACED) != process_ || !WIFSTOPPED(status)) throw std::runtime_error("stop");
    }
    void resume() { ::kill(process_, SIGCONT); }
    // Returns when it is dead.
    void kill() {
        if (process_ <= 0) return;
        ::kill(process_, SIGKILL);
        waitpid(process_, &status_, 0);
        for (const auto &left : shm_files(process_)) std::filesystem::remove(left);
        process_ = -1;
    }
    pid_t process() const { return process_; }

protected:
    std::string answer() {
        for (;;) {
            const std::size_t end = said_.find('\n');
            if (end != std::string::npos) {
                const std::string line = said_.substr(0, end);
                said_.erase(0, end + 1);
                return line;
            }
            pollfd ready = {answers_, POLLIN, 0};
            char piece[65536];
            if (poll(&ready, 1, 60000) != 1) throw std::runtime_error("the target does not answer");
            const ssize_t length = ::read(answers_, piece, sizeof piece);
            if (length <= 0) throw std::runtime_error("the target has ended");
            said_.append(piece, static_cast<std::size_t>(length));
        }
    }

private:
    pid_t process_ = -1;
    int commands_ = -1, answers_ = -1, status_ = -1;
    std::string said_;
};

#ifdef MEFA_TARGET
// tests/c/target.c as the other process.
class Target : public Process {
public:
    Target(const std::string &provider, std::uint64_t length, unsigned parts = 1, std::string name = "there:1",
           std::vector<std::string> settings = {})
        : Process(words(provider, length, parts, name, settings)), base_(std::stoull(answer())) {}

    // Address of its memory's first byte.
    std::uint64_t base() const { return base_; }
    std::string descriptor() { return ask("descriptor"); }
    void fill(std::uint64_t offset, std::uint64_t length, std::uint64_t seed) {
        if (ask("fill " + three(offset, length, seed)) != "ok") throw std::runtime_error("fill");
    }
    testing::AssertionResult is(std::uint64_t offset, std::uint64_t length, std::uint64_t seed) {
        const std::string said = ask("check " + three(offset, length, seed));
        if (said == "ok") return testing::AssertionSuccess();
        return testing::AssertionFailure() << "the target's memory: " << said;
    }
    std::uint64_t register_more(std::uint64_t length) { return std::stoull(ask("register " + std::to_string(length))); }

private:
    static std::vector<std::string> words(const std::string &provider, std::uint64_t length, unsigned parts,
                                          const std::string &name, const std::vector<std::string> &settings) {
        std::vector<std::string> words = {MEFA_TARGET, provider, name, std::to_string(length), std::to_string(parts)};
        words.insert(words.end(), settings.begin(), settings.end());
        return words;
    }
    static std::string three(std::uint64_t a, std::uint64_t b, std::uint64_t c) {
        return std::to_string(a) + " " + std::to_string(b) + " " + std::to_string(c);
    }

    std::uint64_t base_;
};
#endif

// A test over a provider, its parameter; what else is in that, after a blank, is for the test.
class Pair : public testing::TestWithParam<const char *> {
protected:
    std::string provider() const {
        const std::string parameter = GetParam();
        return parameter.substr(0, parameter.find(' '));
    }

    void SetUp() override {
        check_start(115);
        signal(SIGPIPE, SIG_IGN);
        auto transport = mefa::Transport::install(mefa::Config("probe:1").provider(provider()));
        if (!transport && transport.code() == MEFA_CODE_DEVICE_NOT_FOUND) GTEST_SKIP() << transport.error().text;
    }
    void TearDown() override { alarm(0); }

    mefa::Transport install(mefa::Config config) {
        auto transport = mefa::Transport::install(config.provider(provider()));
        if (!transport) throw std::runtime_error(transport.error().text);
        return std::move(*transport);
    }
    mefa::Transport install() { return install(mefa::Config("here:1")); }
};

// What a call gave; the test ends where it gave an error.
template <class T> T must(mefa::Result<T> result) {
    if (!result) throw std::runtime_error(std::to_string(result.code()) + " " + result.error().text);
    return std::move(*result);
}

// That a call failed with this code, and said something.
template <class T> testing::AssertionResult fails(int code, const mefa::Result<T> &result) {
    if (result.code() == code && !result.error().text.empty()) return testing::AssertionSuccess();
    return testing::AssertionFailure() << "it gave " << result.code() << " \"" << result.error().text << "\", not " << code;
}

// One batch of requests from start to end: its status.
inline mefa_status run(mefa::Transport &transport, mefa::Span<mefa_request> requests, mefa::nanoseconds timeout = LONG) {
    auto batch = must(transport.batch(requests.size));
    must(batch.submit(requests, timeout));
    const mefa_status status = must(batch.wait(LONG + timeout));
    for (std::size_t task = 0; task < requests.size; ++task) {
        const auto state = must(batch.task(task));
        if (status == MEFA_STATUS_COMPLETED) {
            EXPECT_EQ(state.status, MEFA_STATUS_COMPLETED);
            EXPECT_EQ(state.bytes, requests.data[task].length);
        } else if (state.status != MEFA_STATUS_COMPLETED) {
            std::cerr << "task " << task << " ended with status " << state.status << ": "
                      << must(batch.task_error(task)) << "\n";
        }
    }
    must(batch.close());
    return status;
}

// What stands in `text` between `before` and the next `after`, each time.
inline std::vector<std::string> between(const std::string &text, const std::string &before, char after) {
    std::vector<std::string> found;
    for (std::size_t at = 0; (at = text.find(before, at)) != std::string::npos;) {
        at += before.size();
        found.push_back(text.substr(at, text.find(after, at) - at));
    }
    if (found.empty()) throw std::runtime_error("no " + before + " in " + text);
    return found;
}

// `text` with `with` there instead, each time.
inline std::string replaced(std::string text, const std::string &before, char after, const std::string &with) {
    for (std::size_t at = 0; (at = text.find(before, at)) != std::string::npos; at += before.size())
        text.replace(at + before.size(), text.find(after, at + before.size()) - at - before.size(), with);
    return text;
}

// A counter over all NICs.
inline std::uint64_t total(const mefa::Transport &transport, std::uint64_t mefa_nic_stats::*counter) {
    std::uint64_t sum = 0;
    for (std::size_t nic = 0; nic < must(transport.nic_count()); ++nic) sum += must(transport.stats(nic)).*counter;
    return sum;
}

// Waits for a condition; false if it does not come.
template <class F> bool eventually(F condition) {
    const auto limit = std::chrono::steady_clock::now() + LONG;
    while (!condition()) {
        if (std::chrono::steady_clock::now() > limit) return false;
        std::this_thread::sleep_for(1ms);
    }
    return true;
}

#define OVER(suite, ...) \
    INSTANTIATE_TEST_SUITE_P(Over, suite, testing::Values(__VA_ARGS__), [](const auto &info) { return std::string(info.param); })
