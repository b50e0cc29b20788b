// SPDX-License-Identifier: Apache-2.0
//
// transfer [PROVIDER]: one process writes into another's memory, and reads it back; in C++.
//
//     c++ -std=c++17 transfer.cpp -o transfer $(pkg-config --cflags --libs mooncake_efa)
//     ./transfer tcp          # or shm; without an argument: efa, or what MC_EFA_PROVIDER says
//
// examples/c/transfer.c is the same, with more words.
#include <mooncake_efa.hpp>

#include <cstdio>
#include <cstdlib>
#include <sys/wait.h>
#include <unistd.h>

using namespace std::chrono_literals;
using mooncake_efa::Config, mooncake_efa::Transport;

// A result is looked at, or the compiler complains.
template <class T> static T must(mooncake_efa::Result<T> result, const char *what) {
    if (!result) {
        std::fprintf(stderr, "%s: %s (%d)\n", what, result.error().text.c_str(), result.code());
        std::exit(1);
    }
    return std::move(*result);
}

// The target: registers its memory, tells how to reach it, and then has nothing to do.
static int target(Config config, int to, int from) {
    static char memory[4096];
    const char *const address = memory;
    char end;
    auto transport = must(Transport::install(std::move(config)), "install");
    auto registered = must(transport.register_memory(memory, sizeof memory), "register");
    const std::string descriptor = must(transport.descriptor_json(), "descriptor");
    if (write(to, &address, sizeof address) < 0 || write(to, descriptor.data(), descriptor.size()) < 0) return 1;
    close(to);
    (void)!read(from, &end, 1); // until the other side is done, and closes
    std::printf("target: \"%s\" is in my memory\n", memory);
    return 0;
}

// The initiator: opens the target's segment, and transfers.
static int initiator(Config config, int from) {
    static char memory[2][4096] = {"hello"}, piece[4096];
    std::uintptr_t address = 0;
    std::string descriptor;
    if (read(from, &address, sizeof address) != sizeof address) return 1;
    for (ssize_t got; (got = read(from, piece, sizeof piece)) > 0;) descriptor.append(piece, static_cast<std::size_t>(got));

    // Destroyed in the opposite order: the transport last, and what is transferred before its memory.
    auto transport = must(Transport::install(std::move(config)), "install");
    auto registered = must(transport.register_memory(memory, sizeof memory), "register");
    auto segment = must(transport.open_json(descriptor), "open the segment");
    auto batch = must(transport.batch(2), "allocate a batch");

    must(batch.submit(segment.write(memory[0], address, sizeof memory[0]), 10s), "submit");
    must(batch.wait(20s), "wait");
    // Requests of a batch have no order: the read is submitted when the write is done.
    must(batch.submit(segment.read(memory[1], address, sizeof memory[1]), 10s), "submit");
    if (must(batch.wait(20s), "wait") != MEFA_STATUS_COMPLETED) {
        for (std::size_t task = 0; task < 2; ++task)
            std::fprintf(stderr, "task %zu: %s\n", task, must(batch.task_error(task), "its error").c_str());
        return 1;
    }
    std::printf("initiator: \"%s\" came back\n", memory[1]);
    return std::string(memory[0]) == memory[1] ? 0 : 1;
}

int main(int count, char **arguments) {
    const auto config = [&](const char *name) {
        Config config(name);
        if (count > 1) config.provider(arguments[1]);
        return config;
    };
    int descriptor[2], done[2], status = 0;
    if (pipe(descriptor) != 0 || pipe(done) != 0) return 1;
    // Forked before the library is used: a transport does not survive a fork.
    const pid_t child = fork();
    if (child == 0) {
        close(descriptor[0]);
        close(done[1]);
        return target(config("target:1"), descriptor[1], done[0]);
    }
    close(descriptor[1]);
    close(done[0]);
    const int failed = initiator(config("initiator:1"), descriptor[0]);
    close(done[1]);
    return waitpid(child, &status, 0) == child && status == 0 ? failed : 1;
}
