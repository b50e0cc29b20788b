// SPDX-License-Identifier: Apache-2.0
//
// What mooncake_efa.hpp adds to the C functions: who owns what, moves, callbacks, results. And how a
// transport ends while others are inside.
#include "pair.h"

#include <atomic>

namespace {

template <class T> constexpr bool move_only =
    !std::is_copy_constructible_v<T> && !std::is_copy_assignable_v<T> && std::is_nothrow_move_constructible_v<T> &&
    std::is_nothrow_move_assignable_v<T>;
static_assert(move_only<mefa::Transport> && move_only<mefa::Batch> && move_only<mefa::Segment> && move_only<mefa::Registration>);
// Not one in place of another.
static_assert(!std::is_constructible_v<mefa::Batch, mefa::Segment> && !std::is_assignable_v<mefa::Segment &, mefa::Batch>);

using Raii = Pair;
OVER(Raii, "tcp", "shm", "efa");

TEST_P(Raii, DestructorsGiveUpWhatTheyOwn) {
    Memory memory(MiB);
    auto transport = install();
    const mefa_transport raw = transport.raw();
    mefa_batch batch = 0;
    mefa_segment segment = 0;
    std::int32_t status = 0;
    {
        auto registered = must(transport.register_memory(memory.data(), MiB));
        ASSERT_EQ(registered.regions().size(), 1u);
        EXPECT_EQ(registered.regions()[0].length, MiB);
        EXPECT_NE(registered.regions()[0].keys.at(0), 0u);
        auto b = must(transport.batch(1));
        auto s = must(transport.open_json(must(transport.descriptor_json())));
        batch = b.raw();
        segment = s.raw();
        EXPECT_EQ(mefa_batch_status(raw, batch, &status, nullptr), 0);
        EXPECT_EQ(mefa_segment_warm_up(raw, segment), 0);
    }
    EXPECT_EQ(mefa_batch_status(raw, batch, &status, nullptr), MEFA_CODE_INVALID_ARGUMENT);
    EXPECT_EQ(mefa_segment_warm_up(raw, segment), MEFA_CODE_INVALID_ARGUMENT);
    EXPECT_EQ(mefa_unregister(raw, memory.data()), MEFA_CODE_ADDRESS_NOT_REGISTERED);
    { const mefa::Transport gone = std::move(transport); }
    EXPECT_EQ(mefa_uninstall(raw), MEFA_CODE_INVALID_ARGUMENT);
    EXPECT_EQ(transport.raw(), 0u);
}

TEST_P(Raii, MovedFromOwnsNothing) {
    Memory memory(2 * MiB);
    auto first = install(), second = install(mefa::Config("here:2"));
    const mefa_transport raw_first = first.raw(), raw_second = second.raw();
    auto one = must(first.batch(1)), two = must(first.batch(1));
    const mefa_batch kept = one.raw(), replaced = two.raw();
    std::int32_t status = 0;
    two = std::move(one);
    EXPECT_EQ(two.raw(), kept);
    EXPECT_EQ(mefa_batch_status(raw_first, replaced, &status, nullptr), MEFA_CODE_INVALID_ARGUMENT); // freed at once
    EXPECT_TRUE(fails(MEFA_CODE_INVALID_ARGUMENT, one.status()));
    EXPECT_TRUE(fails(MEFA_CODE_INVALID_ARGUMENT, one.close()));
    must(two.status());
    must(two.close());
    EXPECT_TRUE(fails(MEFA_CODE_INVALID_ARGUMENT, two.close()));

    auto memory_one = must(first.register_memory(memory.data(), MiB));
    auto memory_two = std::move(memory_one);
    EXPECT_TRUE(fails(MEFA_CODE_INVALID_ARGUMENT, memory_one.close()));
    EXPECT_EQ(memory_two.regions().size(), 1u);

    first = std::move(second);
    EXPECT_EQ(first.raw(), raw_second);
    EXPECT_EQ(mefa_uninstall(raw_first), MEFA_CODE_INVALID_ARGUMENT); // uninstalled at once
    EXPECT_TRUE(fails(MEFA_CODE_INVALID_ARGUMENT, second.nic_count()));
    EXPECT_TRUE(fails(MEFA_CODE_INVALID_ARGUMENT, second.close()));
    EXPECT_TRUE(fails(MEFA_CODE_INVALID_ARGUMENT, memory_two.close())); // its transport is gone
    must(first.close());
    EXPECT_TRUE(fails(MEFA_CODE_INVALID_ARGUMENT, first.close()));
}

TEST_P(Raii, RegistersSeveralAtOnceOrNone) {
    Memory memory(4 * MiB);
    auto transport = install();
    const mefa_memory bad[] = {{memory.data(), MiB, nullptr}, {memory + MiB - 1, MiB, nullptr}};
    EXPECT_TRUE(fails(MEFA_CODE_ADDRESS_OVERLAPPED, transport.register_many(bad)));
    EXPECT_TRUE(fails(MEFA_CODE_INVALID_ARGUMENT, transport.register_many({nullptr, 2})));
    EXPECT_TRUE(must(transport.register_many(std::vector<mefa_memory>())).empty());
    const mefa_memory good[] = {{memory + 2 * MiB, MiB, nullptr}, {memory.data(), MiB, "cpu:0"}};
    auto both = must(transport.register_many(good));
    ASSERT_EQ(both.size(), 2u);
    EXPECT_EQ(both[0].raw(), memory + 2 * MiB);
    EXPECT_EQ(both[0].regions().at(0).address, reinterpret_cast<std::uintptr_t>(memory + 2 * MiB));
    EXPECT_EQ(both[1].regions().at(0).address, reinterpret_cast<std::uintptr_t>(memory.data()));
    void *addresses[] = {memory.data(), memory + MiB, memory + 2 * MiB};
    EXPECT_TRUE(fails(MEFA_CODE_ADDRESS_NOT_REGISTERED, transport.unregister_many(addresses)));
    EXPECT_TRUE(fails(MEFA_CODE_ADDRESS_NOT_REGISTERED, both[0].close()));
}

TEST_P(Raii, ConfigReachesTheLibrary) {
    EXPECT_TRUE(fails(MEFA_CODE_DEVICE_NOT_FOUND, mefa::Transport::install(mefa::Config("here:1").provider("nonsense"))));
    EXPECT_TRUE(fails(MEFA_CODE_DEVICE_NOT_FOUND, mefa::Transport::install(mefa::Config("here:1").provider(provider()).device("no-such-nic0"))));
    EXPECT_TRUE(fails(MEFA_CODE_MALFORMED_JSON, mefa::Transport::install(mefa::Config("here:1").provider(provider()).topology("{"))));
    std::string name;
    auto transport = install();
    must(transport.descriptor([&](const mefa_segment_desc &desc) { name = desc.devices[0].name; }));
    // The same device twice is two NICs; a topology orders them.
    auto twice = install(mefa::Config("here:2").device(name).device(name));
    EXPECT_EQ(must(twice.nic_count()), 2u);
    EXPECT_NE(must(twice.stats_json()).find("\"provider\""), std::string::npos);
    EXPECT_TRUE(fails(MEFA_CODE_INVALID_ARGUMENT, twice.stats(2)));
    auto topology = install(mefa::Config("here:3").topology("{\"cpu:0\":[[\"" + name + "\"],[]]}"));
    EXPECT_EQ(must(topology.nic_count()), 1u);
    EXPECT_NE(must(topology.descriptor_json()).find("{\"cpu:0\":[[\"" + name + "\"],[]]}"), std::string::npos);
}

// Two NICs: transfers are spread over both, and arrive whole.
TEST_P(Raii, SeveralNicsShareTheWork) {
    Target target(provider(), 32 * MiB);
    Memory memory(64 * MiB);
    std::string name;
    {
        auto transport = install();
        must(transport.descriptor([&](const mefa_segment_desc &desc) { name = desc.devices[0].name; }));
    }
    auto transport = install(mefa::Config("here:1").device(name).device(name).device(name));
    auto registered = must(transport.register_memory(memory.data(), memory.size()));
    auto segment = must(transport.open_json(target.descriptor()));
    memory.fill(0, 32 * MiB, 1, 0);
    ASSERT_EQ(run(transport, segment.write(memory.data(), target.base(), 32 * MiB)), MEFA_STATUS_COMPLETED);
    EXPECT_TRUE(target.is(0, 32 * MiB, 1));
    ASSERT_EQ(run(transport, segment.read(memory + 32 * MiB, target.base(), 32 * MiB)), MEFA_STATUS_COMPLETED);
    EXPECT_TRUE(memory.is(32 * MiB, 32 * MiB, 1, 0));
    std::uint64_t written = 0, read = 0;
    for (std::size_t nic = 0; nic < 3; ++nic) {
        const auto stats = must(transport.stats(nic));
        EXPECT_GT(stats.bytes_written, 0u) << nic;
        written += stats.bytes_written;
        read += stats.bytes_read;
    }
    EXPECT_EQ(written, 32 * MiB);
    EXPECT_EQ(read, 32 * MiB);
}

// A thread inside the library is waited for, and everything is there for it until it leaves.
TEST_P(Raii, EndsWhenTheLastThreadHasLeft) {
    std::atomic<bool> inside{false}, leave{false}, closed{false};
    auto transport = install(mefa::Config("here:1").fetch_segment([&](const char *) -> std::optional<std::string> {
        inside = true;
        while (!leave) std::this_thread::sleep_for(1ms);
        return std::nullopt;
    }));
    const mefa_transport raw = transport.raw();
    std::thread asker([&] {
        mefa_segment segment = 0;
        EXPECT_EQ(mefa_segment_open_name(raw, "there:1", &segment), MEFA_CODE_METADATA);
    });
    ASSERT_TRUE(eventually([&] { return inside.load(); }));
    std::thread closer([&] {
        must(transport.close());
        closed = true;
    });
    // It is unknown to all others from now on, while it waits.
    ASSERT_TRUE(eventually([&] {
        std::size_t count = 0;
        return mefa_nic_count(raw, &count) == MEFA_CODE_INVALID_ARGUMENT;
    }));
    std::this_thread::sleep_for(50ms);
    EXPECT_FALSE(closed);
    leave = true;
    closer.join();
    asker.join();
    EXPECT_TRUE(closed);
}

// Threads use handles while they are closed: each call is done or refused, nothing else.
TEST_P(Raii, ClosingRacesWithUsing) {
    Target target(provider(), MiB);
    Memory memory(MiB);
    for (int round = 0; round < 5; ++round) {
        auto transport = install();
        const mefa_transport raw = transport.raw();
        auto registered = must(transport.register_memory(memory.data(), MiB));
        auto segment = must(transport.open_json(target.descriptor()));
        std::atomic<bool> go{true};
        std::atomic<int> wrong{0}, done{0};
        std::vector<std::thread> threads;
        for (std::uint64_t thread = 0; thread < 4; ++thread)
            threads.emplace_back([&, thread] {
                while (go) {
                    mefa_batch batch = 0;
                    std::int32_t status = 0;
                    const std::uint64_t at = thread * MiB / 4;
                    const mefa_request request = segment.write(memory + at, target.base() + at, MiB / 4);
                    for (const int code : {mefa_batch_allocate(raw, 1, &batch), mefa_submit(raw, batch, &request, 1, 60000000000),
                                           mefa_wait(raw, batch, 60000000000, &status), mefa_batch_free(raw, batch)})
                        if (code != 0 && code != MEFA_CODE_INVALID_ARGUMENT) ++wrong;
                    ++done;
                }
            });
        EXPECT_TRUE(eventually([&] { return done > 20; }));
        must(transport.close());
        go = false;
        for (std::thread &thread : threads) thread.join();
        EXPECT_EQ(wrong, 0);
    }
}

} // namespace
