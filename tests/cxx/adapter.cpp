// SPDX-License-Identifier: Apache-2.0
//
// The end of the adapter's host: with everybody gone it is destroyed, with somebody inside it stays.
#include "pair.h"

#include "adapter.h"

#include <atomic>
#include <condition_variable>
#include <mutex>

namespace {
namespace adapter = mooncake_efa::adapter;

struct World {
    std::string descriptor;
    std::mutex mutex;
    std::condition_variable changed;
    bool asked = false, answered = true;
    std::atomic<int> finished{0};
    std::atomic<bool> destroyed{false};
};

// The engine: it knows one segment.
class Engine final : public adapter::Host {
public:
    explicit Engine(World &world) : world_(world), adapter(*this) {}
    ~Engine() override { world_.destroyed = true; }
    std::shared_ptr<void> segment(std::uint64_t) override { return known_; }
    std::optional<std::uint64_t> segment_id(const std::string &) override { return 1; }
    std::shared_ptr<void> fetch(const std::string &) override {
        std::unique_lock<std::mutex> lock(world_.mutex);
        world_.asked = true;
        world_.changed.notify_all();
        world_.changed.wait(lock, [&] { return world_.answered; });
        return known_;
    }
    std::string segment_json(const std::shared_ptr<void> &) override { return world_.descriptor; }
    int publish(const mefa_segment_desc &, bool) override { return 0; }
    int handshake(const char *, const mefa_handshake &, const adapter::Answered &) override { return -1; }
    void finished(const mefa_completion *, std::size_t count) noexcept override { world_.finished += int(count); }

private:
    World &world_;
    std::shared_ptr<void> known_ = std::make_shared<int>();

public:
    adapter::Adapter adapter;
};

class Adapted : public Pair {
protected:
    void SetUp() override {
        Pair::SetUp();
        if (IsSkipped()) return;
        setenv("MC_EFA_PROVIDER", provider().c_str(), 1);
        target.emplace(provider(), MiB);
        world.descriptor = target->descriptor();
        engine = std::make_unique<Engine>(world);
        ASSERT_EQ(engine->adapter.install("here:1", "{}"), 0) << adapter::Adapter::error();
        ASSERT_EQ(engine->adapter.add_memory({{memory.data(), MiB, nullptr}}, true), 0);
    }
    int write(std::uint64_t address) {
        std::vector<mefa_request> requests = {
            {MEFA_WRITE, 0, reinterpret_cast<std::uintptr_t>(memory.data()), 1, address, 1, 7}};
        return engine->adapter.submit(requests);
    }

    World world;
    Memory memory{MiB};
    std::optional<Target> target;
    std::unique_ptr<Engine> engine;
};
OVER(Adapted, "tcp");

TEST_P(Adapted, EndsWithItsTransport) {
    ASSERT_EQ(write(target->base()), 0);
    ASSERT_TRUE(eventually([&] { return world.finished == 1; }));
    ASSERT_EQ(engine->adapter.remove_memory({memory.data()}, true), 0);
    adapter::end(std::move(engine));
    EXPECT_TRUE(world.destroyed);
}

TEST_P(Adapted, StaysWhileSomebodyIsInside) {
    world.answered = false;
    // To an address that the target does not have: the engine is asked for a newer descriptor.
    int code = 0;
    std::thread caller([&] { code = write(1); });
    {
        std::unique_lock<std::mutex> lock(world.mutex);
        world.changed.wait(lock, [&] { return world.asked; });
    }
    adapter::end(std::move(engine));
    EXPECT_FALSE(world.destroyed);
    {
        const std::lock_guard<std::mutex> lock(world.mutex);
        world.answered = true;
        world.changed.notify_all();
    }
    caller.join();
    EXPECT_EQ(code, MEFA_CODE_ADDRESS_NOT_REGISTERED);
    EXPECT_FALSE(world.destroyed);
    EXPECT_EQ(world.finished, 0);
}

} // namespace
