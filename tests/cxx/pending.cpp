// SPDX-License-Identifier: Apache-2.0
//
// Transfers that do not end: the target's process is stopped, so with a provider that needs its help
// they stay under way for as long as the test wants.
#include "pair.h"

#include <atomic>

namespace {

// With shm, the kernel copies to and from a stopped process without its help, and what does need it
// depends on the version: only tcp is sure to wait.
class Pending : public Pair {
protected:
    static constexpr std::uint64_t SIZE = 64 * MiB;

    void SetUp() override {
        Pair::SetUp();
        if (IsSkipped()) return;
        target.emplace(provider(), SIZE);
        transport.emplace(install(mefa::Config("here:1").on_completion([this](const mefa_completion *items, std::size_t count) {
            for (std::size_t i = 0; i < count; ++i) {
                ++told;
                ++by_status[items[i].status & 7];
            }
        })));
        registered.emplace(must(transport->register_memory(memory.data(), SIZE)));
        segment.emplace(must(transport->open_json(target->descriptor())));
        // Connected before it stops: what follows is under way, not on its way to be.
        ASSERT_EQ(run(*transport, segment->write(memory.data(), target->base(), 1)), MEFA_STATUS_COMPLETED);
        target->stop();
        told = 0;
        by_status[MEFA_STATUS_COMPLETED] = 0;
    }
    mefa_request whole() { return segment->write(memory.data(), target->base(), SIZE); }
    // A transfer to another process than the stopped one, with all that is under way.
    void works_still() {
        Target other(provider(), MiB, 1, "there:2");
        auto to = must(transport->open_json(other.descriptor()));
        memory.fill(0, MiB, 99, 0);
        EXPECT_EQ(run(*transport, to.write(memory.data(), other.base(), MiB)), MEFA_STATUS_COMPLETED);
        EXPECT_TRUE(other.is(0, MiB, 99));
        memory.fill(0, MiB, 98, 0);
        EXPECT_EQ(run(*transport, to.read(memory.data(), other.base(), MiB)), MEFA_STATUS_COMPLETED);
        EXPECT_TRUE(memory.is(0, MiB, 99, 0));
    }
    int unregister() { return mefa_unregister(transport->raw(), memory.data()); }

    std::atomic<int> told{0}, by_status[8] = {};
    Memory memory{SIZE};
    std::optional<Target> target;
    std::optional<mefa::Transport> transport;
    std::optional<mefa::Registration> registered;
    std::optional<mefa::Segment> segment;
};
OVER(Pending, "tcp");

TEST_P(Pending, KeepsItsBatchAndItsMemory) {
    memory.fill(0, SIZE, 1, 0);
    auto batch = must(transport->batch(4));
    must(batch.submit(whole(), LONG));
    EXPECT_TRUE(fails(MEFA_CODE_TIMEOUT, batch.wait(50ms)));
    EXPECT_TRUE(fails(MEFA_CODE_TIMEOUT, batch.wait(0ms)));
    const auto state = must(batch.task(0));
    EXPECT_EQ(state.status, MEFA_STATUS_PENDING);
    EXPECT_EQ(state.bytes, 0u);
    EXPECT_EQ(must(batch.status()).status, MEFA_STATUS_PENDING);
    EXPECT_FALSE(must(batch.quiet()));
    EXPECT_EQ(must(batch.task_error(0)), "");
    EXPECT_GT(total(*transport, &mefa_nic_stats::pending_bytes), 0u);

    EXPECT_TRUE(fails(MEFA_CODE_BUSY, batch.close()));
    EXPECT_EQ(unregister(), MEFA_CODE_BUSY);
    EXPECT_NE(std::string(mefa_last_error()).find("; the oldest: write of "), std::string::npos) << mefa_last_error();
    EXPECT_NE(std::string(mefa_last_error()).find(" to there:1 over "), std::string::npos) << mefa_last_error();
    void *addresses[] = {memory.data()};
    EXPECT_TRUE(fails(MEFA_CODE_BUSY, transport->unregister_many(addresses)));
    // It is registered still: for a further transfer, and in the descriptor.
    must(batch.submit(segment->write(memory + 1, target->base() + 1, 1), LONG));
    std::size_t buffers = 0;
    must(transport->descriptor([&](const mefa_segment_desc &desc) { buffers = desc.buffer_count; }));
    EXPECT_EQ(buffers, 1u);
    EXPECT_TRUE(fails(MEFA_CODE_ADDRESS_OVERLAPPED, transport->register_memory(memory.data(), 1)));
    // The segment may go, the transfer stays.
    must(segment->close());
    EXPECT_EQ(told, 0);

    target->resume();
    EXPECT_EQ(must(batch.wait(LONG)), MEFA_STATUS_COMPLETED);
    EXPECT_EQ(must(batch.task(0)).bytes, SIZE);
    EXPECT_TRUE(must(batch.quiet()));
    EXPECT_EQ(told, 2);
    EXPECT_TRUE(target->is(0, SIZE, 1));
    EXPECT_EQ(total(*transport, &mefa_nic_stats::pending_bytes), 0u);
    must(batch.close());
    must(registered->close());
    must(transport->close());
}

// To unregister memory in use waits until it is not, and holds up nobody else; of several who do it, one does.
TEST_P(Pending, UnregisterWaitsForWhatUsesItsMemory) {
    memory.fill(0, SIZE, 3, 0);
    auto batch = must(transport->batch(1));
    must(batch.submit(whole(), LONG));
    std::atomic<int> ended{0}, refused{0};
    const auto remove = [&] {
        int code;
        do code = unregister(); // the test may take longer than that waits
        while (code == MEFA_CODE_BUSY);
        // Registered anew at once, which is not for the other one to undo.
        if (code == 0) {
            EXPECT_EQ(mefa_register(transport->raw(), memory.data(), SIZE, nullptr, nullptr, nullptr), 0);
        }
        ended += code == 0;
        refused += code == MEFA_CODE_ADDRESS_NOT_REGISTERED;
    };
    std::thread first(remove), second(remove);
    for (int round = 0; round < 100; ++round) {
        Memory more(MiB);
        auto other = must(transport->register_memory(more.data(), MiB));
        EXPECT_FALSE(must(transport->descriptor_json()).empty());
        must(other.close());
    }
    EXPECT_EQ(ended + refused, 0);
    target->resume();
    first.join();
    second.join();
    EXPECT_EQ(ended, 1);
    EXPECT_EQ(refused, 1);
    EXPECT_EQ(must(batch.wait(0ms)), MEFA_STATUS_COMPLETED);
    EXPECT_TRUE(target->is(0, SIZE, 3));
    must(registered->close());
}

// A region in use closes none of the others that belong to the same range.
TEST_P(Pending, OneRegionInUseKeepsTheWholeRange) {
    setenv("MC_MAX_MR_SIZE", "1048576", 1);
    auto split = install();
    unsetenv("MC_MAX_MR_SIZE");
    auto range = must(split.register_memory(memory.data(), 4 * MiB));
    target->resume();
    auto real = must(split.open_json(target->descriptor()));
    ASSERT_EQ(run(split, real.write(memory.data(), target->base(), 1)), MEFA_STATUS_COMPLETED);
    target->stop();
    memory.fill(0, 4 * MiB, 2, 0);
    auto batch = must(split.batch(2));
    must(batch.submit(real.write(memory + 3 * MiB, target->base() + 3 * MiB, MiB), LONG));
    EXPECT_TRUE(fails(MEFA_CODE_BUSY, range.close()));
    must(batch.submit(real.write(memory.data(), target->base(), MiB), LONG));
    EXPECT_TRUE(fails(MEFA_CODE_BUSY, range.close()));
    target->resume();
    EXPECT_EQ(must(batch.wait(LONG)), MEFA_STATUS_COMPLETED);
    EXPECT_TRUE(target->is(0, MiB, 2));
    EXPECT_TRUE(target->is(3 * MiB, MiB, 2));
    must(range.close());
}

TEST_P(Pending, CancelledEndsWhenItsMemoryIsQuiet) {
    memory.fill(0, SIZE, 1, 0);
    auto batch = must(transport->batch(65));
    std::vector<mefa_request> requests;
    for (std::uint64_t i = 0; i < 64; ++i)
        requests.push_back(segment->write(memory + i * MiB, target->base() + (63 - i) * MiB, MiB));
    must(batch.submit(requests, LONG));
    must(batch.submit(segment->read(memory + 7, target->base(), 1), LONG));
    must(batch.cancel());
    must(batch.cancel()); // again changes nothing
    // What the provider has it keeps while the target is stopped, so the batch as a whole does not end.
    EXPECT_TRUE(fails(MEFA_CODE_TIMEOUT, batch.wait(50ms)));
    int pending = 0;
    for (std::size_t task = 0; task < 65; ++task) {
        const auto status = must(batch.task(task)).status;
        EXPECT_TRUE(status == MEFA_STATUS_PENDING || status == MEFA_STATUS_CANCELED) << status;
        pending += status == MEFA_STATUS_PENDING;
    }
    EXPECT_GT(pending, 0); // "cancelled" means quiet
    EXPECT_EQ(by_status[MEFA_STATUS_CANCELED], 65 - pending);
    EXPECT_FALSE(must(batch.quiet()));
    EXPECT_TRUE(fails(MEFA_CODE_BUSY, batch.close()));
    EXPECT_EQ(unregister(), MEFA_CODE_BUSY);
    works_still();
    target->resume();
    EXPECT_EQ(must(batch.wait(LONG)), MEFA_STATUS_FAILED);
    EXPECT_TRUE(must(batch.quiet()));
    for (std::size_t task = 0; task < 65; ++task) {
        const auto state = must(batch.task(task));
        EXPECT_EQ(state.status, MEFA_STATUS_CANCELED) << task;
        EXPECT_EQ(state.bytes, 0u);
        EXPECT_EQ(must(batch.task_error(task)), "");
    }
    EXPECT_EQ(by_status[MEFA_STATUS_CANCELED], 65);
    must(batch.close());
    must(registered->close());
    must(transport->close());
}

TEST_P(Pending, TimedOutIsNotQuietUntilItComesBack) {
    memory.fill(0, SIZE, 1, 0);
    auto batch = must(transport->batch(2));
    const auto start = std::chrono::steady_clock::now();
    must(batch.submit(whole(), 200ms));
    must(batch.submit(segment->read(memory + 7, target->base(), 1), LONG));
    ASSERT_TRUE(eventually([&] { return must(batch.task(0)).status != MEFA_STATUS_PENDING; }));
    EXPECT_GE(std::chrono::steady_clock::now() - start, 200ms);
    const auto state = must(batch.task(0));
    EXPECT_EQ(state.status, MEFA_STATUS_TIMEOUT);
    EXPECT_EQ(state.bytes, 0u);
    // The other one has more time; and the batch waits for it.
    EXPECT_EQ(must(batch.task(1)).status, MEFA_STATUS_PENDING);
    EXPECT_EQ(must(batch.status()).status, MEFA_STATUS_PENDING);
    EXPECT_EQ(told, 1);
    EXPECT_EQ(by_status[MEFA_STATUS_TIMEOUT], 1);
    EXPECT_GT(total(*transport, &mefa_nic_stats::overdue), 0u);
    EXPECT_FALSE(must(batch.quiet()));
    EXPECT_EQ(unregister(), MEFA_CODE_BUSY);
    works_still();
    EXPECT_FALSE(must(batch.quiet()));
    EXPECT_TRUE(fails(MEFA_CODE_TIMEOUT, batch.wait_quiet(50ms)));
    EXPECT_TRUE(fails(MEFA_CODE_TIMEOUT, batch.wait_quiet(-1ns)));

    target->resume();
    // Who else asks, or waits for it, keeps nobody from being told.
    std::thread other([&] { must(batch.wait_quiet(LONG)); });
    must(batch.wait_quiet(LONG));
    EXPECT_TRUE(must(batch.quiet()));
    other.join();
    EXPECT_EQ(must(batch.wait(0ms)), MEFA_STATUS_FAILED); // quiet is over
    EXPECT_EQ(must(batch.task(1)).status, MEFA_STATUS_COMPLETED);
    EXPECT_EQ(must(batch.task(0)).status, MEFA_STATUS_TIMEOUT); // what is final stays
    EXPECT_EQ(must(batch.status()).status, MEFA_STATUS_FAILED);
    must(batch.close());
    must(registered->close());
    EXPECT_EQ(total(*transport, &mefa_nic_stats::pending_bytes), 0u);
    EXPECT_EQ(total(*transport, &mefa_nic_stats::strays), 0u);
    must(transport->close());
}

// The transport's own thread sees deadlines, if nobody asks.
TEST_P(Pending, TimesOutUnwatched) {
    auto batch = must(transport->batch(1));
    must(batch.submit(whole(), 100ms));
    EXPECT_TRUE(eventually([&] { return by_status[MEFA_STATUS_TIMEOUT] == 1; }));
    auto passed = must(transport->batch(1));
    must(passed.submit(whole(), -1ns));
    EXPECT_EQ(must(passed.wait(LONG)), MEFA_STATUS_FAILED);
    EXPECT_EQ(must(passed.task(0)).status, MEFA_STATUS_TIMEOUT);
    // A batch that timed out may be freed while its memory is not quiet; the memory is what must stay.
    must(batch.close());
    EXPECT_EQ(unregister(), MEFA_CODE_BUSY);
    target->resume();
    EXPECT_TRUE(eventually([&] { return unregister() == 0; }));
    must(transport->close());
}

// The environment's limit holds where the submission gives none.
TEST_P(Pending, TheSliceTimeoutIsTheDefault) {
    setenv("MC_SLICE_TIMEOUT", "1", 1);
    auto hasty = install();
    unsetenv("MC_SLICE_TIMEOUT");
    auto range = must(hasty.register_memory(memory.data(), SIZE));
    target->resume();
    auto to = must(hasty.open_json(target->descriptor()));
    ASSERT_EQ(run(hasty, to.write(memory.data(), target->base(), 1)), MEFA_STATUS_COMPLETED);
    target->stop();
    auto batch = must(hasty.batch(1));
    must(batch.submit(to.write(memory.data(), target->base(), SIZE)));
    EXPECT_EQ(must(batch.wait(LONG)), MEFA_STATUS_FAILED);
    EXPECT_EQ(must(batch.task(0)).status, MEFA_STATUS_TIMEOUT);
    target->resume();
    must(batch.wait_quiet(LONG));
}

TEST_P(Pending, UninstallEndsIt) {
    auto batch = must(transport->batch(2)), late = must(transport->batch(1));
    must(batch.submit(whole(), LONG));
    must(late.submit(whole(), 1ms));
    ASSERT_EQ(must(late.wait(LONG)), MEFA_STATUS_FAILED);
    // Idle batches, segments and registrations of it are left to it.
    auto idle = must(transport->batch(7));
    const mefa_transport raw = transport->raw();
    const auto start = std::chrono::steady_clock::now();
    must(transport->close());
    EXPECT_LT(std::chrono::steady_clock::now() - start, 30s);
    const int told_then = told;
    EXPECT_EQ(mefa_uninstall(raw), MEFA_CODE_INVALID_ARGUMENT);
    EXPECT_TRUE(fails(MEFA_CODE_INVALID_ARGUMENT, batch.status()));
    EXPECT_TRUE(fails(MEFA_CODE_INVALID_ARGUMENT, batch.wait(LONG)));
    EXPECT_TRUE(fails(MEFA_CODE_INVALID_ARGUMENT, segment->warm_up()));
    EXPECT_TRUE(fails(MEFA_CODE_INVALID_ARGUMENT, registered->close()));
    transport.emplace(install());
    registered.emplace(must(transport->register_memory(memory.data(), SIZE)));
    works_still();
    // The target, when it goes on, does so with what it has.
    target->resume();
    EXPECT_FALSE(target->descriptor().empty());
    segment.emplace(must(transport->open_json(target->descriptor())));
    EXPECT_EQ(run(*transport, whole()), MEFA_STATUS_COMPLETED);
    EXPECT_EQ(told, told_then); // no callback comes any more
}

// Those who wait for what does not end are not waited for.
TEST_P(Pending, UninstallEndsWaits) {
    auto batch = must(transport->batch(1));
    must(batch.submit(whole(), LONG));
    std::atomic<int> waiting{0}, returned{0};
    std::thread waiters[] = {
        std::thread([&] { ++waiting, returned += batch.wait(LONG).code() == MEFA_CODE_INVALID_ARGUMENT; }),
        std::thread([&] { ++waiting, returned += batch.wait_quiet(LONG).code() == MEFA_CODE_INVALID_ARGUMENT; }),
    };
    ASSERT_TRUE(eventually([&] { return waiting == 2; }));
    must(transport->close());
    for (std::thread &waiter : waiters) waiter.join();
    EXPECT_EQ(returned, 2);
    transport.emplace(install());
}

// What goes out of scope ends in any order, with work under way, and nothing crashes.
TEST_P(Pending, DestructorsInAnyOrder) {
    {
        auto batch = must(transport->batch(1));
        must(batch.submit(whole(), 50ms));
        registered.reset(); // refused: it is in use
        segment.reset();
        // The batch's destructor cancels and waits; its deadline passes meanwhile.
    }
    EXPECT_TRUE(fails(MEFA_CODE_ADDRESS_OVERLAPPED, transport->register_memory(memory.data(), SIZE)));
    auto outlives = must(transport->batch(1));
    transport.reset();
}

} // namespace
