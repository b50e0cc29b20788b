// SPDX-License-Identifier: Apache-2.0
//
// Batches: their limits, all or none, tasks and their numbers, completions, many threads.
#include "pair.h"

#include <atomic>

using Batches = Pair;
OVER(Batches, "tcp", "shm", "efa");

TEST_P(Batches, FilledToTheLimitAndNotBeyond) {
    Target target(provider(), MiB);
    Memory memory(MiB);
    auto transport = install();
    auto registered = must(transport.register_memory(memory.data(), memory.size()));
    auto segment = must(transport.open_json(target.descriptor()));
    memory.fill(0, MiB, 1, 0);
    std::vector<mefa_request> all;
    for (std::uint64_t i = 0; i < 257; ++i)
        all.push_back(segment.write(memory + i * 1000, target.base() + i * 1000, i % 5 == 0 ? 0 : 1000));
    auto batch = must(transport.batch(256));

    EXPECT_TRUE(fails(MEFA_CODE_TOO_MANY_REQUESTS, batch.submit(all, LONG)));
    EXPECT_EQ(must(batch.status()).tasks, 0u);
    EXPECT_EQ(must(batch.status()).status, MEFA_STATUS_COMPLETED);

    must(batch.submit({all.data(), 100}, LONG));
    EXPECT_EQ(must(batch.status()).tasks, 100u);
    must(batch.submit({all.data() + 100, 1}, LONG));
    EXPECT_TRUE(fails(MEFA_CODE_TOO_MANY_REQUESTS, batch.submit({all.data() + 101, 156}, LONG)));
    EXPECT_EQ(must(batch.status()).tasks, 101u);
    must(batch.submit({all.data() + 101, 155}, LONG));
    EXPECT_TRUE(fails(MEFA_CODE_TOO_MANY_REQUESTS, batch.submit(all[256], LONG)));
    EXPECT_EQ(must(batch.wait(LONG)), MEFA_STATUS_COMPLETED);
    // Not one more after they are done, either: tasks are never used again.
    EXPECT_TRUE(fails(MEFA_CODE_TOO_MANY_REQUESTS, batch.submit(all[256], LONG)));
    must(batch.submit({all.data(), 0}, LONG));
    EXPECT_EQ(must(batch.status()).tasks, 256u);

    for (std::size_t task = 0; task < 256; ++task) {
        const auto state = must(batch.task(task));
        EXPECT_EQ(state.status, MEFA_STATUS_COMPLETED);
        EXPECT_EQ(state.bytes, task % 5 == 0 ? 0u : 1000u);
        EXPECT_EQ(must(batch.task_error(task)), "");
        EXPECT_TRUE(target.is(task * 1000, 1000, task % 5 == 0 ? 0 : 1));
    }
    EXPECT_TRUE(fails(MEFA_CODE_INVALID_ARGUMENT, batch.task(256)));
    EXPECT_TRUE(target.is(256 * 1000, MiB - 256 * 1000, 0)); // the one that was one too many
    EXPECT_TRUE(must(batch.quiet()));
}

// One bad request, wherever it stands in the list, and none of the good ones around it is started.
TEST_P(Batches, ABadRequestStartsNone) {
    Target target(provider(), MiB);
    Memory memory(2 * MiB);
    auto transport = install();
    auto registered = must(transport.register_memory(memory.data(), MiB));
    auto segment = must(transport.open_json(target.descriptor()));
    auto batch = must(transport.batch(16));
    memory.fill(0, 2 * MiB, 1, 0);
    target.fill(0, MiB, 2);
    const auto good = [&](std::uint64_t i) { return segment.write(memory + i * 4096, target.base() + i * 4096, 4096); };
    mefa_request bad_opcode = good(3), bad_flags = good(3), closed = good(3);
    bad_opcode.opcode = 2;
    bad_flags.flags = 1;
    closed.target = must(transport.open_json(target.descriptor())).raw();
    const std::pair<int, mefa_request> bad[] = {
        {MEFA_CODE_INVALID_ARGUMENT, bad_opcode},
        {MEFA_CODE_INVALID_ARGUMENT, bad_flags},
        {MEFA_CODE_INVALID_ARGUMENT, closed},
        {MEFA_CODE_INVALID_ARGUMENT, segment.write(memory.data(), target.base(), UINT64_MAX)},
        {MEFA_CODE_INVALID_ARGUMENT, segment.read(memory.data(), UINT64_MAX - 5, 7)},
        {MEFA_CODE_ADDRESS_NOT_REGISTERED, segment.write(memory + MiB - 1, target.base(), 2)},
        {MEFA_CODE_ADDRESS_NOT_REGISTERED, segment.read(memory + MiB, target.base(), 1)},
        {MEFA_CODE_ADDRESS_NOT_REGISTERED, segment.write(memory.data(), target.base() - 1, 1)},
        {MEFA_CODE_ADDRESS_NOT_REGISTERED, segment.write(memory.data(), target.base() + MiB - 1, 2)},
        {MEFA_CODE_ADDRESS_NOT_REGISTERED, segment.write(memory.data(), target.base() + MiB, 1)},
    };
    for (const auto &[code, request] : bad) {
        for (std::size_t place = 0; place < 8; ++place) {
            std::vector<mefa_request> list;
            for (std::uint64_t i = 0; i < 8; ++i) list.push_back(i == place ? request : good(i));
            ASSERT_TRUE(fails(code, batch.submit(list, LONG))) << place;
            ASSERT_EQ(must(batch.status()).tasks, 0u);
        }
        ASSERT_TRUE(fails(code, batch.submit(request, LONG)));
    }
    // Had one been started, it would be before this one on its way to the same place.
    auto last = good(0);
    ASSERT_EQ(run(transport, last), MEFA_STATUS_COMPLETED);
    EXPECT_TRUE(target.is(4096, MiB - 4096, 2));
    EXPECT_TRUE(memory.is(0, 2 * MiB, 1, 0));
    EXPECT_EQ(total(transport, &mefa_nic_stats::posted), 1u);
    must(registered.close()); // nothing left in use by the refused ones
}

// Every cookie comes back once, from whatever thread, and before its task's status can be seen.
TEST_P(Batches, CookiesComeBackOnceAndFirst) {
    constexpr std::size_t ROUNDS = 20, COUNT = 64;
    struct Seen {
        std::atomic<int> times[ROUNDS * COUNT] = {};
        std::atomic<int> wrong{0};
    };
    auto seen = std::make_unique<Seen>();
    Target target(provider(), 4 * MiB);
    Memory memory(4 * MiB);
    auto transport = install(mefa::Config("here:1").on_completion([&](const mefa_completion *items, std::size_t count) {
        // Whoever looks at the status too early gets his chance.
        std::this_thread::sleep_for(1ms);
        for (std::size_t i = 0; i < count; ++i) {
            const std::uint64_t cookie = items[i].cookie ^ 0xabcdef0000000000;
            const bool known = cookie < ROUNDS * COUNT;
            if (!known || items[i].status != MEFA_STATUS_COMPLETED || items[i].reserved != 0 || items[i].bytes != cookie % 7 * 100)
                ++seen->wrong;
            if (known) ++seen->times[cookie];
        }
    }));
    auto registered = must(transport.register_memory(memory.data(), memory.size()));
    auto segment = must(transport.open_json(target.descriptor()));
    for (std::size_t round = 0; round < ROUNDS; ++round) {
        auto batch = must(transport.batch(COUNT));
        // Two submissions into one batch; some requests are empty.
        for (std::size_t half = 0; half < 2; ++half) {
            std::vector<mefa_request> requests;
            for (std::size_t i = half * COUNT / 2; i < (half + 1) * COUNT / 2; ++i) {
                const std::uint64_t cookie = round * COUNT + i;
                requests.push_back(segment.write(memory + i * 1000, target.base() + i * 1000, cookie % 7 * 100,
                                                 cookie ^ 0xabcdef0000000000));
            }
            must(batch.submit(requests, LONG));
        }
        for (std::size_t task = 0; task < COUNT; ++task) {
            ASSERT_TRUE(eventually([&] { return must(batch.task(task)).status == MEFA_STATUS_COMPLETED; }));
            ASSERT_EQ(seen->times[round * COUNT + task], 1) << "round " << round << " task " << task;
        }
        ASSERT_EQ(must(batch.status()).status, MEFA_STATUS_COMPLETED);
    }
    must(transport.close());
    for (const auto &times : seen->times) ASSERT_EQ(times, 1);
    EXPECT_EQ(seen->wrong, 0);
}

// Requests of no batch: only the callback tells, once each, and nothing is left to free.
TEST_P(Batches, NoneIsNeededWhereACallbackTells) {
    constexpr std::size_t ROUNDS = 50, COUNT = 20;
    std::atomic<std::uint64_t> told{0}, bytes{0}, cookies{0}, wrong{0};
    Target target(provider(), MiB);
    Memory memory(MiB);
    auto transport = install(mefa::Config("here:1").on_completion([&](const mefa_completion *items, std::size_t count) {
        for (std::size_t i = 0; i < count; ++i) {
            if (items[i].status != MEFA_STATUS_COMPLETED) ++wrong;
            bytes += items[i].bytes;
            cookies += items[i].cookie;
        }
        told += count;
    }));
    auto registered = must(transport.register_memory(memory.data(), memory.size()));
    auto segment = must(transport.open_json(target.descriptor()));
    memory.fill(0, MiB, 3, 0);
    for (std::size_t round = 0; round < ROUNDS; ++round) {
        std::vector<mefa_request> requests;
        for (std::size_t i = 0; i < COUNT; ++i)
            requests.push_back(segment.write(memory + i * 1000, target.base() + i * 1000, 1000, i + 1));
        ASSERT_EQ(mefa_submit(transport.raw(), 0, requests.data(), COUNT, 0), 0) << mefa_last_error();
        ASSERT_TRUE(eventually([&] { return mefa_progress(transport.raw()) == 0 && told == (round + 1) * COUNT; }));
    }
    EXPECT_EQ(bytes, ROUNDS * COUNT * 1000);
    EXPECT_EQ(cookies, ROUNDS * COUNT * (COUNT + 1) / 2);
    EXPECT_EQ(wrong, 0u);
    EXPECT_TRUE(target.is(0, COUNT * 1000, 3));
    // Refused as a whole: nothing is told.
    auto bad = segment.write(memory.data(), target.base() + 2 * MiB, 1, 1);
    EXPECT_EQ(mefa_submit(transport.raw(), 0, &bad, 1, 0), MEFA_CODE_ADDRESS_NOT_REGISTERED);
    EXPECT_EQ(mefa_submit(transport.raw(), 0, nullptr, 0, 0), 0);
    EXPECT_EQ(mefa_progress(0), MEFA_CODE_INVALID_ARGUMENT);
    must(registered.close());
    must(transport.close());
    EXPECT_EQ(told, ROUNDS * COUNT);
}

// A completion may submit the next transfer.
TEST_P(Batches, ACompletionMaySubmit) {
    constexpr int LINKS = 200;
    Target target(provider(), MiB);
    Memory memory(MiB);
    std::atomic<int> links{0}, failures{0};
    mefa::Segment *to = nullptr;
    mefa::Batch *chain = nullptr;
    auto transport = install(mefa::Config("here:1").on_completion([&](const mefa_completion *items, std::size_t count) {
        for (std::size_t i = 0; i < count; ++i) {
            const int next = ++links;
            if (items[i].cookie != static_cast<std::uint64_t>(next)) ++failures;
            // Alternately one byte, and none, which completes at once.
            if (next < LINKS && !chain->submit(to->write(memory + next, target.base() + next, next % 2,
                                                        static_cast<std::uint64_t>(next) + 1), LONG))
                ++failures;
        }
    }));
    auto registered = must(transport.register_memory(memory.data(), memory.size()));
    auto segment = must(transport.open_json(target.descriptor()));
    auto batch = must(transport.batch(LINKS));
    memory.fill(0, MiB, 1, 0);
    to = &segment;
    chain = &batch;
    must(batch.submit(segment.write(memory.data(), target.base(), 1, 1), LONG));
    // Nobody makes progress here but the transport's own thread.
    ASSERT_TRUE(eventually([&] { return links == LINKS; }));
    EXPECT_EQ(failures, 0);
    ASSERT_EQ(must(batch.wait(LONG)), MEFA_STATUS_COMPLETED);
    EXPECT_EQ(must(batch.status()).tasks, std::size_t(LINKS));
    must(transport.close());
}

TEST_P(Batches, SixteenThreadsShareATransport) {
    constexpr std::uint64_t THREADS = 16;
    // On a busy machine every single operation of shm takes milliseconds.
    const std::uint64_t size = provider() == "shm" ? MiB / 8 : MiB;
    Target target(provider(), THREADS * size);
    Memory memory(2 * THREADS * size);
    auto transport = install();
    auto registered = must(transport.register_memory(memory.data(), memory.size()));
    auto segment = must(transport.open_json(target.descriptor()));
    std::atomic<std::uint64_t> wrong{0};
    std::vector<std::thread> threads;
    for (std::uint64_t thread = 0; thread < THREADS; ++thread) {
        threads.emplace_back([&, thread] {
            const std::uint64_t mine = thread * size, back = (THREADS + thread) * size;
            for (std::uint64_t round = 1; round <= 4; ++round) {
                memory.fill(mine, size, 100 * thread + round, mine);
                // Pieces of 1 to 3 KiB and their remainders, each thread and round others.
                const std::uint64_t piece = 1000 + 55 * thread + 200 * round;
                std::vector<mefa_request> writes, reads;
                for (std::uint64_t at = 0; at < size; at += piece) {
                    const std::uint64_t length = std::min(piece, size - at);
                    writes.push_back(segment.write(memory + mine + at, target.base() + mine + at, length));
                    reads.push_back(segment.read(memory + back + at, target.base() + mine + at, length));
                }
                // One submission each, so that the threads meet often.
                auto batch = must(transport.batch(writes.size()));
                for (const mefa_request &one : writes) must(batch.submit(one, LONG));
                if (must(batch.wait(LONG)) != MEFA_STATUS_COMPLETED) ++wrong;
                if (run(transport, reads) != MEFA_STATUS_COMPLETED) ++wrong;
                if (!memory.is(back, size, 100 * thread + round, mine)) ++wrong;
            }
        });
    }
    for (std::thread &thread : threads) thread.join();
    EXPECT_EQ(wrong, 0u);
    for (std::uint64_t thread = 0; thread < THREADS; ++thread)
        EXPECT_TRUE(target.is(thread * size, size, 100 * thread + 4));
    EXPECT_EQ(total(transport, &mefa_nic_stats::posted), total(transport, &mefa_nic_stats::completed));
    for (const auto counter : {&mefa_nic_stats::pending_bytes, &mefa_nic_stats::strays, &mefa_nic_stats::failed, &mefa_nic_stats::overdue})
        EXPECT_EQ(total(transport, counter), 0u);
}

// Several threads submit into one batch until it is full: as many as it holds, each task once.
TEST_P(Batches, ThreadsFillOneBatch) {
    constexpr std::size_t THREADS = 8, CAPACITY = 100, EACH = 20;
    std::atomic<int> completions{0};
    Target target(provider(), MiB);
    Memory memory(MiB);
    auto transport = install(
        mefa::Config("here:1").on_completion([&](const mefa_completion *, std::size_t count) { completions += int(count); }));
    auto registered = must(transport.register_memory(memory.data(), memory.size()));
    auto segment = must(transport.open_json(target.descriptor()));
    auto batch = must(transport.batch(CAPACITY));
    memory.fill(0, MiB, 1, 0);
    std::atomic<int> started{0}, refused{0}, other{0};
    std::vector<std::thread> threads;
    for (std::size_t thread = 0; thread < THREADS; ++thread) {
        threads.emplace_back([&, thread] {
            for (std::size_t i = 0; i < EACH; ++i) {
                const std::uint64_t at = (thread * EACH + i) * 4096;
                const auto result = batch.submit(segment.write(memory + at, target.base() + at, 4096), LONG);
                ++(result ? started : result.code() == MEFA_CODE_TOO_MANY_REQUESTS ? refused : other);
            }
        });
    }
    for (std::thread &thread : threads) thread.join();
    EXPECT_EQ(started, int(CAPACITY));
    EXPECT_EQ(refused, int(THREADS * EACH - CAPACITY));
    EXPECT_EQ(other, 0);
    EXPECT_EQ(must(batch.wait(LONG)), MEFA_STATUS_COMPLETED);
    EXPECT_EQ(must(batch.status()).tasks, CAPACITY);
    EXPECT_EQ(completions, int(CAPACITY));
    // Those that were started arrived, the others left no trace.
    int arrived = 0;
    for (std::size_t i = 0; i < THREADS * EACH; ++i) {
        const bool there = bool(target.is(i * 4096, 4096, 1));
        arrived += there;
        EXPECT_TRUE(there || target.is(i * 4096, 4096, 0));
    }
    EXPECT_EQ(arrived, int(CAPACITY));
}
