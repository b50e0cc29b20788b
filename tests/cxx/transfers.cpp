// SPDX-License-Identifier: Apache-2.0
//
// Bytes to and from another process: every length, many places, several regions, past 4 GiB. Each
// byte is checked, and so are those around it.
#include "pair.h"

using Transfers = Pair;
OVER(Transfers, "tcp", "shm", "efa");

TEST_P(Transfers, EveryLengthBothWaysAtOddPlaces) {
    Target target(provider(), 66 * MiB);
    Memory memory(66 * MiB);
    auto transport = install();
    auto registered = must(transport.register_memory(memory.data(), memory.size()));
    auto segment = must(transport.open_json(target.descriptor()));
    const std::uint64_t lengths[] = {0, 1, 3, 4095, 4096, 65537, MiB + 13, 64 * MiB};
    const std::uint64_t places[][2] = {{4097, 8191}, {8192, 4099}, {4103, 8192}};
    const std::uint64_t guard = 4096;
    std::uint64_t seed = 0;
    for (const std::uint64_t length : lengths) {
        for (const auto &[here, there] : places) {
            SCOPED_TRACE("length " + std::to_string(length) + " from " + std::to_string(here) + " to " + std::to_string(there));
            const std::uint64_t ours = ++seed, guards = ++seed, theirs = ++seed;
            target.fill(there - guard, length + 2 * guard, guards);
            memory.fill(here, length, ours, there);
            ASSERT_EQ(run(transport, segment.write(memory + here, target.base() + there, length)), MEFA_STATUS_COMPLETED);
            ASSERT_TRUE(target.is(there, length, ours));
            ASSERT_TRUE(target.is(there - guard, guard, guards));
            ASSERT_TRUE(target.is(there + length, guard, guards));
            ASSERT_TRUE(memory.is(here, length, ours, there));

            target.fill(there, length, theirs);
            memory.fill(0, here + length + guard, guards, 0);
            ASSERT_EQ(run(transport, segment.read(memory + here, target.base() + there, length)), MEFA_STATUS_COMPLETED);
            ASSERT_TRUE(memory.is(here, length, theirs, there));
            ASSERT_TRUE(memory.is(0, here, guards, 0));
            ASSERT_TRUE(memory.is(here + length, guard, guards, here + length));
            ASSERT_TRUE(target.is(there, length, theirs));
            if (length == 64 * MiB) break; // one place is enough of that
        }
    }
}

// Our memory in five registrations, the target's in seven: a transfer crosses all of their borders.
TEST_P(Transfers, AcrossNeighbouringRegistrations) {
    Target target(provider(), 64 * MiB + 77, 7);
    Memory memory(65 * MiB);
    auto transport = install();
    const std::uint64_t borders[] = {0, 1, 3 * MiB, 3 * MiB + 4096, 40 * MiB + 5, memory.size()};
    std::vector<mefa_memory> parts;
    for (int part = 0; part < 5; ++part)
        parts.push_back({memory + borders[part], borders[part + 1] - borders[part], nullptr});
    auto registered = must(transport.register_many(parts));
    auto segment = must(transport.open_json(target.descriptor()));
    memory.fill(0, 64 * MiB, 1, 77);
    ASSERT_EQ(run(transport, segment.write(memory.data(), target.base() + 77, 64 * MiB)), MEFA_STATUS_COMPLETED);
    EXPECT_TRUE(target.is(77, 64 * MiB, 1));
    EXPECT_TRUE(target.is(0, 77, 0));
    target.fill(0, 64 * MiB, 2);
    ASSERT_EQ(run(transport, segment.read(memory + 1, target.base(), 64 * MiB)), MEFA_STATUS_COMPLETED);
    EXPECT_TRUE(memory.is(1, 64 * MiB, 2, 0));
    EXPECT_TRUE(memory.is(0, 1, 1, 77));
    EXPECT_TRUE(memory.is(1 + 64 * MiB, MiB - 1, 0, 0));
}

TEST_P(Transfers, AcrossThePartsOfASplitRegistration) {
    const std::string setting = "MC_MAX_MR_SIZE=16777216";
    Target target(provider(), 64 * MiB + 4096, 1, "there:1", {setting});
    Memory memory(64 * MiB + 4096);
    setenv("MC_MAX_MR_SIZE", "16777216", 1);
    auto transport = install();
    unsetenv("MC_MAX_MR_SIZE");
    auto registered = must(transport.register_memory(memory.data(), memory.size()));
    ASSERT_EQ(registered.regions().size(), 5u);
    std::uint64_t next = reinterpret_cast<std::uintptr_t>(memory.data());
    for (const auto &region : registered.regions()) {
        EXPECT_EQ(region.address, next);
        EXPECT_LE(region.length, 16 * MiB);
        EXPECT_EQ(region.keys.size(), must(transport.nic_count()));
        next += region.length;
    }
    EXPECT_EQ(next, reinterpret_cast<std::uintptr_t>(memory + memory.size()));
    auto segment = must(transport.open_json(target.descriptor()));
    memory.fill(1, 64 * MiB, 3, 4095);
    ASSERT_EQ(run(transport, segment.write(memory + 1, target.base() + 4095, 64 * MiB)), MEFA_STATUS_COMPLETED);
    EXPECT_TRUE(target.is(4095, 64 * MiB, 3));
    EXPECT_TRUE(target.is(0, 4095, 0));
    EXPECT_TRUE(target.is(64 * MiB + 4095, 1, 0));
    target.fill(0, 64 * MiB + 4096, 4);
    memory.fill(0, memory.size(), 5, 0);
    ASSERT_EQ(run(transport, segment.read(memory + 33, target.base() + 7, 64 * MiB)), MEFA_STATUS_COMPLETED);
    EXPECT_TRUE(memory.is(33, 64 * MiB, 4, 7));
    EXPECT_TRUE(memory.is(0, 33, 5, 0));
    EXPECT_TRUE(memory.is(33 + 64 * MiB, 4096 - 33, 5, 33 + 64 * MiB));
    // One call ends them all.
    ASSERT_EQ(registered.close().code(), 0);
    EXPECT_TRUE(fails(MEFA_CODE_ADDRESS_NOT_REGISTERED,
                      must(transport.batch(1)).submit(segment.read(memory + 20 * MiB, target.base(), 1))));
}

TEST_P(Transfers, PastFourGib) {
    const std::uint64_t size = (std::uint64_t(4) << 30) + 64 * MiB;
    Target target(provider(), size);
    Memory memory(size);
    auto transport = install();
    auto registered = transport.register_memory(memory.data(), memory.size());
    if (!registered) GTEST_SKIP() << provider() << " takes no region of that size: " << registered.error().text;
    auto segment = must(transport.open_json(target.descriptor()));
    const std::uint64_t length = 9 * MiB + 1;
    target.fill(0, 32 * MiB, 6); // where it would go with 32 bits of offset
    std::uint64_t seed = 10;
    // Over the border, and beyond it.
    for (const std::uint64_t there : {(std::uint64_t(4) << 30) - 3 * MiB - 5, (std::uint64_t(4) << 30) + 20 * MiB + 1}) {
        const std::uint64_t here = there + 3, guards = ++seed, ours = ++seed, theirs = ++seed, low = ++seed;
        target.fill(there - 4096, length + 8192, guards);
        memory.fill(0, 32 * MiB, low, 0);
        memory.fill(here, length, ours, there);
        ASSERT_EQ(run(transport, segment.write(memory + here, target.base() + there, length)), MEFA_STATUS_COMPLETED);
        EXPECT_TRUE(target.is(there, length, ours));
        EXPECT_TRUE(target.is(there - 4096, 4096, guards));
        EXPECT_TRUE(target.is(there + length, 4096, guards));
        EXPECT_TRUE(target.is(0, 32 * MiB, 6));
        target.fill(there, length, theirs);
        ASSERT_EQ(run(transport, segment.read(memory + here, target.base() + there, length)), MEFA_STATUS_COMPLETED);
        EXPECT_TRUE(memory.is(here, length, theirs, there));
        EXPECT_TRUE(memory.is(0, 32 * MiB, low, 0));
    }
}

// Many small ones with gaps, in an order that merges some and not others; what is in the gaps stays.
TEST_P(Transfers, ManySmallOnesAndNothingBetween) {
    Target target(provider(), 4 * MiB);
    Memory memory(4 * MiB);
    auto transport = install();
    auto registered = must(transport.register_memory(memory.data(), memory.size()));
    auto segment = must(transport.open_json(target.descriptor()));
    target.fill(0, 4 * MiB, 1);
    memory.fill(0, 4 * MiB, 2, 0);
    std::vector<mefa_request> writes, reads;
    for (std::uint64_t i = 0; i < 999; ++i) {
        // Three that touch, then a gap; every other group backwards.
        const std::uint64_t group = i / 3, at = group * 1500 + (group % 2 ? 2 - i % 3 : i % 3) * 333;
        writes.push_back(segment.write(memory + at, target.base() + at, 333));
        reads.push_back(segment.read(memory + 2 * MiB + at, target.base() + 2 * MiB + at, 333));
    }
    ASSERT_EQ(run(transport, writes), MEFA_STATUS_COMPLETED);
    ASSERT_EQ(run(transport, reads), MEFA_STATUS_COMPLETED);
    for (std::uint64_t group = 0; group < 333; ++group) {
        const std::uint64_t at = group * 1500, full = 999;
        ASSERT_TRUE(target.is(at, full, 2)) << group;
        ASSERT_TRUE(target.is(at + full, 1500 - full, 1)) << group;
        ASSERT_TRUE(memory.is(2 * MiB + at, full, 1, 2 * MiB + at)) << group;
        ASSERT_TRUE(memory.is(2 * MiB + at + full, 1500 - full, 2, 2 * MiB + at + full)) << group;
    }
    EXPECT_EQ(total(transport, &mefa_nic_stats::strays), 0u);
    EXPECT_EQ(total(transport, &mefa_nic_stats::failed), 0u);
    EXPECT_EQ(total(transport, &mefa_nic_stats::pending_bytes), 0u);
}

// Neighbours on one side that are none on the other: not to be taken for one range.
TEST_P(Transfers, GatheredAndScattered) {
    constexpr std::uint64_t COUNT = 200, PIECE = 500, STRIDE = 700;
    Target target(provider(), MiB);
    Memory memory(MiB);
    auto transport = install();
    auto registered = must(transport.register_memory(memory.data(), memory.size()));
    auto segment = must(transport.open_json(target.descriptor()));
    for (const bool ours_apart : {false, true}) {
        for (const bool write : {true, false}) {
            SCOPED_TRACE(std::string(write ? "write" : "read") + (ours_apart ? " ours apart" : " theirs apart"));
            const std::uint64_t ours = ours_apart ? STRIDE : PIECE, theirs = ours_apart ? PIECE : STRIDE;
            target.fill(0, MiB, 1);
            memory.fill(0, MiB, 2, 0);
            std::vector<mefa_request> requests;
            for (std::uint64_t i = 0; i < COUNT; ++i) {
                unsigned char *here = memory + i * ours;
                const std::uint64_t there = target.base() + i * theirs;
                requests.push_back(write ? segment.write(here, there, PIECE) : segment.read(here, there, PIECE));
            }
            ASSERT_EQ(run(transport, requests), MEFA_STATUS_COMPLETED);
            Memory expected(MiB), pattern(MiB);
            expected.fill(0, MiB, write ? 1 : 2, 0);
            pattern.fill(0, MiB, write ? 2 : 1, 0);
            for (std::uint64_t i = 0; i < COUNT; ++i) {
                const std::uint64_t from = i * (write ? ours : theirs), to = i * (write ? theirs : ours);
                memcpy(expected + to, pattern + from, PIECE);
            }
            if (write) {
                // The target's bytes, fetched by one plain read.
                ASSERT_EQ(run(transport, segment.read(memory.data(), target.base(), MiB)), MEFA_STATUS_COMPLETED);
            } else {
                EXPECT_TRUE(target.is(0, MiB, 1));
            }
            EXPECT_EQ(memcmp(memory.data(), expected.data(), MiB), 0);
        }
    }
}

// A segment of our own, beside one of a peer, in the same batch.
TEST_P(Transfers, OneTransportToItselfAndToAnother) {
    Target target(provider(), MiB);
    Memory memory(4 * MiB);
    auto here = install();
    auto registered = must(here.register_memory(memory.data(), 4 * MiB));
    auto self = must(here.open_json(must(here.descriptor_json())));
    auto there = must(here.open_json(target.descriptor()));
    memory.fill(0, MiB, 1, 0);
    const std::uint64_t base = reinterpret_cast<std::uintptr_t>(memory.data());
    const mefa_request both[] = {self.write(memory.data(), base + 2 * MiB, MiB), there.write(memory.data(), target.base(), MiB)};
    ASSERT_EQ(run(here, both), MEFA_STATUS_COMPLETED);
    EXPECT_TRUE(memory.is(2 * MiB, MiB, 1, 0));
    EXPECT_TRUE(memory.is(MiB, MiB, 0, 0));
    EXPECT_TRUE(target.is(0, MiB, 1));
    ASSERT_EQ(run(here, self.read(memory + 3 * MiB + 1, base, 4097)), MEFA_STATUS_COMPLETED);
    EXPECT_TRUE(memory.is(3 * MiB + 1, 4097, 1, 0));
}
