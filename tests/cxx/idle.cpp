// SPDX-License-Identifier: Apache-2.0
//
// What the library's threads cost with nothing under way: how often they go to sleep, and what they run, over some
// seconds. A machine that is busy with other things can only make it less.
#include "pair.h"

#include <algorithm>
#include <fstream>
#include <map>

namespace {

class Idle : public Pair {
protected:
    static constexpr int SECONDS = 3;

    struct Cost { std::uint64_t sleeps, microseconds; };

    // Of each of the library's threads, how often it went to sleep and what it ran, so far.
    static std::map<std::string, Cost> costs() {
        std::map<std::string, Cost> all;
        for (const auto &task : std::filesystem::directory_iterator("/proc/self/task")) {
            std::ifstream status(task.path() / "status");
            std::string line, name;
            while (std::getline(status, line)) {
                if (line.rfind("Name:\t", 0) == 0) name = line.substr(6);
                if (line.rfind("voluntary_ctxt_switches:\t", 0) != 0 || name.rfind("mefa-", 0) != 0) continue;
                std::uint64_t nanoseconds = 0;
                std::ifstream(task.path() / "schedstat") >> nanoseconds;
                all[name] = {std::stoull(line.substr(25)), nanoseconds / 1000};
            }
        }
        return all;
    }
    // And in so much time from now.
    static std::map<std::string, Cost> costs_of(std::chrono::milliseconds time) {
        const auto before = costs();
        std::this_thread::sleep_for(time);
        auto after = costs();
        for (auto &[name, cost] : after) {
            cost.sleeps -= before.at(name).sleeps;
            cost.microseconds -= before.at(name).microseconds;
        }
        return after;
    }
};
// efa is for libfabric 2.x on an emulated device, by hand: that of 1.17 has no events to wake a poller, and comes to
// rest too late to be waited for.
OVER(Idle, "tcp", "shm", "efa");

TEST_P(Idle, ThreadsSleep) {
    Target target(provider(), 4 * MiB);
    Memory memory(4 * MiB);
    auto transport = install();
    auto registered = must(transport.register_memory(memory.data(), memory.size()));
    auto to = must(transport.open_json(target.descriptor()));
    const auto work = [&] {
        ASSERT_EQ(run(transport, to.write(memory.data(), target.base(), 4 * MiB)), MEFA_STATUS_COMPLETED);
        ASSERT_EQ(run(transport, to.read(memory.data(), target.base(), 4 * MiB)), MEFA_STATUS_COMPLETED);
    };
    for (int round = 0; round < 2; ++round) {
        work();
        // The watchdog looks after that, once or twice. And where a poll cannot be told from one that did something
        // for a peer (shm, efa of libfabric 1.17), a poller may first have to learn that polls became slower.
        ASSERT_TRUE(eventually([] {
            const auto all = costs_of(1500ms);
            const auto rests = [](const auto &one) { return one.second.microseconds <= 150000; };
            return all.at("mefa-watch").sleeps == 0 && std::all_of(all.begin(), all.end(), rests);
        }));
        for (const auto &[name, cost] : costs_of(std::chrono::seconds(SECONDS))) {
            std::cout << name << " went to sleep " << cost.sleeps << " times in " << SECONDS << " s, and ran "
                      << cost.microseconds << " us\n";
            // A poller that events wake looks once a second all the same.
            const std::uint64_t most = name == "mefa-watch" ? 0 : provider() == "tcp" ? 4 : 1500;
            EXPECT_LE(cost.sleeps, most * SECONDS) << name;
        }
    }
    work();
}

} // namespace
