// SPDX-License-Identifier: Apache-2.0
//
// A target that dies: every task of it ends in time, and the others are served as before. And one that
// comes back under its old name.
#include "pair.h"

namespace {

class Dying : public Pair {
protected:
    static constexpr std::uint64_t COUNT = 64;

    // Every task of the batch has its final status within the time given, and a margin for a slow
    // machine that is far from "never".
    void ends_in_time(mefa::Batch &batch, std::size_t tasks, mefa::nanoseconds given, bool may_complete) {
        const auto start = std::chrono::steady_clock::now();
        const auto status = batch.wait(given + 30s);
        ASSERT_TRUE(status) << status.error().text;
        EXPECT_LT(std::chrono::steady_clock::now() - start, given + 30s);
        for (std::size_t task = 0; task < tasks; ++task) {
            const auto state = must(batch.task(task));
            const std::string why = must(batch.task_error(task));
            switch (state.status) {
            case MEFA_STATUS_COMPLETED: EXPECT_TRUE(may_complete) << task; break;
            case MEFA_STATUS_FAILED: EXPECT_NE(why, "") << task; [[fallthrough]];
            case MEFA_STATUS_TIMEOUT: EXPECT_EQ(state.bytes, 0u); break;
            default: FAIL() << "task " << task << " has status " << state.status;
            }
        }
    }
    // shm (libfabric 1.17) takes its peers' answers in order: one that never comes keeps back all later
    // ones, so an endpoint with operations at a dead peer is of no more use. A new transport is.
    void serves_others_after(mefa::Transport &transport, const Memory &memory) {
        if (provider() != "shm") return serves_others(transport, memory);
        auto fresh = install();
        auto registered = must(fresh.register_memory(memory.data(), memory.size()));
        serves_others(fresh, memory);
    }
    void serves_others(mefa::Transport &transport, const Memory &memory) {
        Target other(provider(), 2 * MiB, 1, "there:2");
        auto to = must(transport.open_json(other.descriptor()));
        for (std::uint64_t round = 0; round < 10; ++round) {
            memory.fill(0, 2 * MiB, 70 + round, 0);
            ASSERT_EQ(run(transport, to.write(memory.data(), other.base(), 2 * MiB)), MEFA_STATUS_COMPLETED);
            ASSERT_TRUE(other.is(0, 2 * MiB, 70 + round));
            ASSERT_EQ(run(transport, to.read(memory + 2 * MiB, other.base(), 2 * MiB)), MEFA_STATUS_COMPLETED);
            ASSERT_TRUE(memory.is(2 * MiB, 2 * MiB, 70 + round, 0));
        }
    }
};
OVER(Dying, "tcp", "shm", "efa");

// Killed while it is stopped with all of the transfers under way: none of them can have completed.
TEST_P(Dying, WithTransfersUnderWay) {
    Target target(provider(), COUNT * MiB);
    Memory memory(COUNT * MiB);
    auto transport = install();
    auto registered = must(transport.register_memory(memory.data(), memory.size()));
    auto segment = must(transport.open_json(target.descriptor()));
    ASSERT_EQ(run(transport, segment.write(memory.data(), target.base(), 1)), MEFA_STATUS_COMPLETED);
    target.stop();
    std::vector<mefa_request> requests;
    for (std::uint64_t i = 0; i < COUNT; ++i) {
        const std::uint64_t there = target.base() + (i * 7 % COUNT) * MiB;
        requests.push_back(i % 2 ? segment.read(memory + i * MiB, there, MiB) : segment.write(memory + i * MiB, there, MiB));
    }
    auto batch = must(transport.batch(COUNT));
    must(batch.submit(requests, 3s));
    target.kill();
    // shm needs no help of a stopped process to copy, nor has an EFA device to read, so some may have
    // completed before.
    ends_in_time(batch, COUNT, 3s, provider() != "tcp");
    serves_others_after(transport, memory);
    // And what comes now for the dead one ends, too.
    auto more = must(transport.batch(COUNT));
    must(more.submit(requests, 2s));
    ends_in_time(more, COUNT, 2s, provider() == "shm");
    serves_others_after(transport, memory);
}

// Killed while bytes are flowing.
TEST_P(Dying, InTheMiddleOfTransfers) {
    Target target(provider(), COUNT * MiB);
    Memory memory(COUNT * MiB);
    auto transport = install();
    auto registered = must(transport.register_memory(memory.data(), memory.size()));
    auto segment = must(transport.open_json(target.descriptor()));
    std::vector<mefa_request> requests;
    for (std::uint64_t i = 0; i < 8 * COUNT; ++i) {
        const std::uint64_t at = (i * 7 % COUNT) * MiB;
        requests.push_back(i % 2 ? segment.read(memory + at, target.base() + at, MiB) : segment.write(memory + at, target.base() + at, MiB));
    }
    auto batch = must(transport.batch(requests.size()));
    must(batch.submit(requests, 5s));
    ASSERT_TRUE(eventually([&] { return must(batch.task(0)).status != MEFA_STATUS_PENDING; }));
    target.kill();
    ends_in_time(batch, requests.size(), 5s, true);
    serves_others_after(transport, memory);
}

// Killed before there was ever a connection.
TEST_P(Dying, BeforeTheFirstTransfer) {
    std::string descriptor;
    std::uint64_t base = 0;
    {
        Target target(provider(), MiB);
        descriptor = target.descriptor();
        base = target.base();
    }
    Memory memory(4 * MiB);
    auto transport = install();
    auto registered = must(transport.register_memory(memory.data(), memory.size()));
    auto segment = must(transport.open_json(descriptor));
    auto batch = must(transport.batch(2));
    const mefa_request both[] = {segment.write(memory.data(), base, MiB), segment.read(memory + MiB, base, 100)};
    const auto submitted = batch.submit(both, 2s);
    if (submitted) {
        ends_in_time(batch, 2, 2s, false);
    } else {
        // A provider that sees it at once may say so at once.
        EXPECT_TRUE(fails(MEFA_CODE_ENDPOINT, submitted));
        EXPECT_EQ(must(batch.status()).tasks, 0u);
    }
    serves_others(transport, memory);
}

// Dead and uninstalled at once: the destructors are bounded.
TEST_P(Dying, AndNobodyWaits) {
    Target target(provider(), COUNT * MiB);
    Memory memory(COUNT * MiB);
    auto transport = install();
    auto registered = must(transport.register_memory(memory.data(), memory.size()));
    auto segment = must(transport.open_json(target.descriptor()));
    ASSERT_EQ(run(transport, segment.write(memory.data(), target.base(), 1)), MEFA_STATUS_COMPLETED);
    target.stop();
    auto batch = must(transport.batch(1));
    must(batch.submit(segment.write(memory.data(), target.base(), COUNT * MiB), LONG));
    target.kill();
    const auto start = std::chrono::steady_clock::now();
    must(transport.close());
    EXPECT_LT(std::chrono::steady_clock::now() - start, 30s);
}

// With shm, processes leave files behind when they are killed.
class Left : public Dying {};
OVER(Left, "shm");

// One that had the number that we have now.
TEST_P(Left, ByAFormerProcessOfOurNumber) {
    auto transport = install();
    const auto own = shm_files(getpid());
    ASSERT_EQ(own.size(), 1u);
    // Under the names that libfabric would give the next endpoints.
    std::vector<std::filesystem::path> left;
    for (int i = 0; i < 10; ++i) {
        left.push_back("/dev/shm/" + std::to_string(getpid()) + ":" + std::to_string(getuid()) + ":" + std::to_string(i));
        std::filesystem::copy_file(own[0], left.back());
    }
    Memory memory(4 * MiB);
    auto registered = must(transport.register_memory(memory.data(), memory.size()));
    serves_others(transport, memory);
    serves_others_after(transport, memory);
    for (const auto &file : left) EXPECT_TRUE(std::filesystem::remove(file)); // not ours to touch
}

// They are removed by the next to come.
TEST_P(Left, IsRemoved) {
    Target target(provider(), MiB), survivor(provider(), MiB, 1, "there:2");
    const auto left = shm_files(target.process()), used = shm_files(survivor.process());
    ASSERT_EQ(left.size(), 1u);
    ASSERT_EQ(used.size(), 1u);
    kill(target.process(), SIGKILL); // and nobody has waited for it yet
    ASSERT_TRUE(eventually([&] { install(); return !std::filesystem::exists(left[0]); }));
    EXPECT_TRUE(std::filesystem::exists(used[0]));
    Memory memory(4 * MiB);
    auto transport = install();
    auto registered = must(transport.register_memory(memory.data(), memory.size()));
    auto to = must(transport.open_json(survivor.descriptor()));
    EXPECT_EQ(run(transport, to.write(memory.data(), survivor.base(), MiB)), MEFA_STATUS_COMPLETED);
}

// A new process under the old name: with its descriptor, transfers go to it.
TEST_P(Dying, AndComingBack) {
    Memory memory(4 * MiB);
    auto transport = install();
    auto registered = must(transport.register_memory(memory.data(), memory.size()));
    auto first = std::make_unique<Target>(provider(), 2 * MiB);
    auto segment = must(transport.open_json(first->descriptor()));
    memory.fill(0, 2 * MiB, 1, 0);
    ASSERT_EQ(run(transport, segment.write(memory.data(), first->base(), 2 * MiB)), MEFA_STATUS_COMPLETED);
    first.reset();
    Target second(provider(), 2 * MiB);
    must(segment.update_json(second.descriptor()));
    ASSERT_EQ(run(transport, segment.write(memory.data(), second.base(), 2 * MiB)), MEFA_STATUS_COMPLETED);
    EXPECT_TRUE(second.is(0, 2 * MiB, 1));
    serves_others(transport, memory);
}

} // namespace
