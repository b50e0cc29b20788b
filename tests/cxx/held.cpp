// SPDX-License-Identifier: Apache-2.0
//
// A provider whose calls do not return, or whose completion queue is broken (tests/c/held_fabric.c): deadlines
// hold, and so do the limits of a shutdown, after which nobody is called.
#include "pair.h"

#include <atomic>
#include <condition_variable>
#include <dirent.h>
#include <dlfcn.h>
#include <fstream>
#include <functional>
#include <mutex>

namespace {

class Held : public Pair {
protected:
    void SetUp() override {
        setenv("MC_EFA_LIBFABRIC", HELD_FABRIC, 1);
        Pair::SetUp();
        if (IsSkipped()) return;
        void *fabric = dlopen(HELD_FABRIC, RTLD_LAZY | RTLD_NOLOAD);
        ASSERT_NE(fabric, nullptr) << dlerror();
        const auto find = [&](auto &function, const char *name) {
            function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(fabric, name));
            ASSERT_NE(function, nullptr) << name;
        };
        find(hold, "held_fabric_hold");
        find(inside, "held_fabric_inside");
        find(last, "held_fabric_last");
        find(fail, "held_fabric_fail");
        find(failed, "held_fabric_failed");
    }
    void pair_up(mefa::Config config = mefa::Config("here:1")) {
        config.on_completion([this](const mefa_completion *items, std::size_t count) {
            for (std::size_t i = 0; i < count; ++i) {
                ++told;
                ++by_status[items[i].status & 7];
            }
        });
        target.emplace(provider(), MiB);
        transport.emplace(install(std::move(config)));
        registered.emplace(must(transport->register_memory(memory.data(), MiB)));
        segment.emplace(must(transport->open_json(target->descriptor())));
        ASSERT_EQ(run(*transport, segment->write(memory.data(), target->base(), 1)), MEFA_STATUS_COMPLETED);
        told = 0;
    }
    // Nobody reads completions any more, and somebody is in a read that does not return.
    void hold_reads() {
        hold(READS);
        ASSERT_TRUE(eventually([&] { return inside() == 1; }));
    }
    mefa_request one() { return segment->write(memory.data(), target->base(), 1000); }
    void submit_detached(mefa::nanoseconds timeout) {
        const mefa_request request = one();
        ASSERT_EQ(mefa_submit(transport->raw(), 0, &request, 1, std::uint64_t(timeout.count())), 0);
    }
    // The library's threads that there are.
    static int threads() {
        int count = 0;
        DIR *tasks = opendir("/proc/self/task");
        while (const dirent *task = readdir(tasks)) {
            std::string name;
            std::getline(std::ifstream("/proc/self/task/" + std::string(task->d_name) + "/comm"), name);
            count += name.rfind("mefa-", 0) == 0;
        }
        closedir(tasks);
        return count;
    }
    // Uninstalled, with somebody left behind: who is told nothing when he comes back.
    void close_busy(std::function<void()> release) {
        const auto start = std::chrono::steady_clock::now();
        EXPECT_TRUE(fails(MEFA_CODE_BUSY, transport->close()));
        EXPECT_LT(std::chrono::steady_clock::now() - start, 60s); // far from "never"
        const int then = told;
        release();
        EXPECT_TRUE(eventually([] { return threads() == 0; }));
        EXPECT_EQ(told, then);
        // What there is of it is gone: the memory is free for another.
        transport.emplace(install());
        registered.emplace(must(transport->register_memory(memory.data(), MiB)));
        segment.emplace(must(transport->open_json(target->descriptor())));
        EXPECT_EQ(run(*transport, one()), MEFA_STATUS_COMPLETED);
    }

    enum { NOTHING, READS, WRITES, CLOSES = 4 };
    void (*hold)(int) = nullptr, (*fail)(int) = nullptr;
    int (*inside)() = nullptr, (*last)() = nullptr, (*failed)() = nullptr;
    std::atomic<int> told{0}, by_status[8] = {};
    Memory memory{MiB};
    std::optional<Target> target;
    std::optional<mefa::Transport> transport;
    std::optional<mefa::Registration> registered;
    std::optional<mefa::Segment> segment;
};
OVER(Held, "tcp");

// The one thread that polls is the one that is stuck, and nobody waits.
TEST_P(Held, DeadlinesHoldThoughNobodyAsks) {
    pair_up();
    hold_reads();
    submit_detached(50ms);
    auto batch = must(transport->batch(1));
    must(batch.submit(one(), 50ms));
    EXPECT_TRUE(eventually([&] { return told == 2; }));
    EXPECT_EQ(by_status[MEFA_STATUS_TIMEOUT], 2);
    EXPECT_EQ(inside(), 1);
    EXPECT_NE(must(batch.task_error(0)).find("does not return"), std::string::npos) << must(batch.task_error(0));
    // Again, once all was at rest for the others: with the first ones' memory still in use.
    submit_detached(50ms);
    EXPECT_TRUE(eventually([&] { return told == 3; }));
    hold(NOTHING);
    must(batch.wait_quiet(LONG));
    EXPECT_EQ(told, 3);
    EXPECT_EQ(run(*transport, one()), MEFA_STATUS_COMPLETED);
    must(transport->close());
}

TEST_P(Held, ShutdownLeavesAStuckPollerBehind) {
    pair_up();
    hold_reads();
    submit_detached(LONG);
    close_busy([&] { hold(NOTHING); });
}

TEST_P(Held, ShutdownLeavesAStuckCallerBehind) {
    pair_up();
    std::thread caller;
    for (std::atomic<int> who{0};; hold(NOTHING), caller.join()) {
        hold(WRITES);
        caller = std::thread([&] { who = gettid(), submit_detached(LONG); });
        ASSERT_TRUE(eventually([&] { return inside() == 1; }));
        if (last() == who) break; // otherwise the poller was there first
    }
    close_busy([&] {
        hold(NOTHING);
        caller.join();
    });
}

TEST_P(Held, ShutdownLeavesAStuckCloseBehind) {
    pair_up();
    hold(CLOSES);
    close_busy([&] { hold(NOTHING); });
}

// A callback that has begun may need what it has for as long as it takes; none begins.
TEST_P(Held, ShutdownLeavesACallbackBehind) {
    std::mutex mutex;
    std::condition_variable changed;
    int asked = 0;
    bool answer = false;
    // Only the callback has it: gone, if the callback is destroyed under itself.
    auto kept = std::make_shared<std::string>("{}");
    std::weak_ptr<std::string> watched = kept;
    pair_up(mefa::Config("here:1").fetch_segment([&, kept = std::move(kept)](const char *) -> std::optional<std::string> {
        std::unique_lock<std::mutex> lock(mutex);
        ++asked;
        changed.notify_all();
        changed.wait(lock, [&] { return answer; });
        return *kept;
    }));
    std::thread caller([&] { EXPECT_FALSE(transport->open_name("somebody:1")); });
    {
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait(lock, [&] { return asked == 1; });
    }
    close_busy([&] {
        EXPECT_FALSE(watched.expired());
        {
            const std::lock_guard<std::mutex> lock(mutex);
            answer = true;
            changed.notify_all();
        }
        caller.join();
    });
    EXPECT_EQ(asked, 1);
}

// A completion queue that is broken is told of, but not at every poll, and what is in flight ends in time.
TEST_P(Held, ABrokenQueueTimesOutAndIsNotRepeatedForEver) {
    static std::atomic<int> lines{0};
    must(mefa::log_to([](int, const char *text) { lines += std::string(text).find("reading completions failed") != std::string::npos; }));
    pair_up();
    auto batch = must(transport->batch(1));
    fail(5); // EIO
    must(batch.submit(one(), 100ms));
    EXPECT_EQ(must(batch.wait(LONG)), MEFA_STATUS_FAILED);
    EXPECT_EQ(must(batch.task(0)).status, MEFA_STATUS_TIMEOUT);
    EXPECT_FALSE(must(batch.quiet()));
    ASSERT_TRUE(eventually([&] { return failed() >= 1000; }));
    EXPECT_GE(lines, 1);
    EXPECT_LE(lines, 32); // of any int's worth of failures
    fail(0);
    must(batch.wait_quiet(LONG));
    EXPECT_EQ(run(*transport, one()), MEFA_STATUS_COMPLETED);
    must(transport->close());
}

} // namespace
