// SPDX-License-Identifier: Apache-2.0
//
// Transfers of GPU memory, through the C interface, every byte checked: on a real GPU (`make test-gpu`), and on the fake
// driver (fake_cuda.c) with MEFA_TEST_CUDA, where there is none. remote.h is the other process.
#include "remote.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <memory>
#include <numeric>
#include <random>
#include <set>

using namespace gpu;

namespace {

constexpr std::uint64_t KiB = 1 << 10;

// An environment variable, for as long as this lives.
class Setting {
public:
    Setting(std::string name, const std::string &value) : name_(std::move(name)) { setenv(name_.c_str(), value.c_str(), 1); }
    Setting(const Setting &) = delete;
    ~Setting() { unsetenv(name_.c_str()); }

private:
    std::string name_;
};

// Whatever a test does, it leaves the GPUs as they were, and did nothing that the fake driver holds against it.
class OnGpu : public Pair {
protected:
    void SetUp() override { prepare(); }
    void TearDown() override { finish(); }
    void prepare() {
        driver = Driver::get();
        ASSERT_NE(driver, nullptr);
        Pair::SetUp();
        alarm(600); // contexts take their time, and more under compute-sanitizer
        if (driver->fake()) driver->fake_fail(nullptr);
        before = state(*driver);
        const auto counts = driver->counts();
        misdeeds_before = {counts.pageable, counts.wild, counts.freed_in_use, counts.left};
    }
    void finish() {
        Pair::TearDown();
        if (driver == nullptr) return;
        if (driver->fake()) driver->fake_fail(nullptr);
        EXPECT_EQ(state(*driver), before);
        const auto counts = driver->counts();
        if (!copies_may_be_pageable) {
            EXPECT_EQ(counts.pageable, misdeeds_before[0]) << "a copy waited for pageable memory";
        }
        EXPECT_EQ(counts.wild, misdeeds_before[1]) << "a copy ran when its memory was gone";
        EXPECT_EQ(counts.freed_in_use, misdeeds_before[2]) << "memory was freed with copies queued for it";
        EXPECT_EQ(counts.left, misdeeds_before[3]) << "something was left in a context that went";
    }
    // Kinds name devices that there may not be.
    bool has(const std::string &kind) const {
        const auto colon = kind.find(':');
        return colon == std::string::npos || std::stoi(kind.substr(colon + 1)) < driver->devices();
    }
    mefa::Registration add(mefa::Transport &transport, const Buffer &buffer) {
        return must(transport.register_memory(buffer.data(), buffer.size()));
    }
    mefa::Segment ourselves(mefa::Transport &transport) { return must(transport.open_json(must(transport.descriptor_json()))); }
    Handle current() const {
        Handle context = nullptr;
        driver->ok(driver->cuCtxGetCurrent(&context));
        return context;
    }

    std::size_t free_memory(const Context &context) const {
        const auto entered = context.enter();
        std::size_t available = 0, total = 0;
        driver->ok(driver->cuMemGetInfo_v2(&available, &total));
        return available;
    }

    const Driver *driver = nullptr;
    bool copies_may_be_pageable = false;

private:
    std::string before;
    std::vector<std::int64_t> misdeeds_before;
};

// Writes and reads of every length between two places, and what is around them stays as it was. `Theirs` is a Buffer, or
// one of the peer's.
template <class Theirs>
void every_length(mefa::Transport &transport, mefa::Segment &segment, const Buffer &ours, const Theirs &theirs) {
    constexpr std::uint64_t guard = 4096;
    const std::uint64_t lengths[] = {1, 4095, 64 * KiB + 3, MiB, 5 * MiB + 1};
    std::uint64_t seed = 0, place = 0;
    for (const std::uint64_t length : lengths) {
        SCOPED_TRACE("length " + std::to_string(length));
        // Odd and even ones.
        const std::uint64_t here = 4096 + 3 * place, there = 8192 - 5 * place;
        ++place;
        const auto around = [&](const auto &memory, std::uint64_t offset, std::uint64_t around_seed) {
            ASSERT_TRUE(memory.is(offset - guard, guard, around_seed, offset - guard));
            ASSERT_TRUE(memory.is(offset + length, guard, around_seed, offset + length));
        };
        const std::uint64_t written = ++seed, read = ++seed, guards = ++seed;
        theirs.fill(there - guard, length + 2 * guard, guards, there - guard);
        ours.fill(here, length, written, 77);
        ASSERT_EQ(run(transport, segment.write(reinterpret_cast<void *>(ours.address() + here), theirs.address() + there, length)),
                  MEFA_STATUS_COMPLETED);
        ASSERT_TRUE(theirs.is(there, length, written, 77));
        around(theirs, there, guards);
        ASSERT_TRUE(ours.is(here, length, written, 77));

        theirs.fill(there, length, read, 99);
        ours.fill(here - guard, length + 2 * guard, guards, here - guard);
        ASSERT_EQ(run(transport, segment.read(reinterpret_cast<void *>(ours.address() + here), theirs.address() + there, length)),
                  MEFA_STATUS_COMPLETED);
        ASSERT_TRUE(ours.is(here, length, read, 99));
        around(ours, here, guards);
        ASSERT_TRUE(theirs.is(there, length, read, 99));
        if (testing::Test::HasFatalFailure()) return;
    }
}
constexpr std::uint64_t EVERY_LENGTH = 5 * MiB + 1 + 16 * KiB;

// Small ones, scattered at both ends, all in one batch; nothing between them changes.
template <class Theirs>
void many_small(mefa::Transport &transport, mefa::Segment &segment, const Buffer &ours, const Theirs &theirs) {
    constexpr std::uint64_t COUNT = 600, STEP = 3001;
    std::mt19937 random(8);
    std::vector<std::uint64_t> places(COUNT);
    std::iota(places.begin(), places.end(), 0);
    std::shuffle(places.begin(), places.end(), random);
    for (const bool write : {true, false}) {
        SCOPED_TRACE(write ? "write" : "read");
        const std::uint64_t sent = write ? 21 : 22, kept = write ? 23 : 24;
        const auto length = [](std::uint64_t i) { return 1 + i * 5 % 2999; };
        // Operation i is between slot i of ours and slot places[i] of theirs.
        ours.fill(0, COUNT * STEP, write ? sent : kept, 0);
        theirs.fill(0, COUNT * STEP, write ? kept : sent, 0);
        std::vector<mefa_request> requests;
        for (std::uint64_t i = 0; i < COUNT; ++i) {
            void *here = reinterpret_cast<void *>(ours.address() + i * STEP);
            const std::uint64_t there = theirs.address() + places[i] * STEP;
            requests.push_back(write ? segment.write(here, there, length(i)) : segment.read(here, there, length(i)));
        }
        ASSERT_EQ(run(transport, requests), MEFA_STATUS_COMPLETED);
        for (std::uint64_t i = 0; i < COUNT; ++i) {
            const std::uint64_t from = write ? i * STEP : places[i] * STEP, to = write ? places[i] * STEP : i * STEP;
            const auto check = [&](const auto &memory) {
                ASSERT_TRUE(memory.is(to, length(i), sent, from)) << "operation " << i;
                ASSERT_TRUE(memory.is(to + length(i), STEP - length(i), kept, to + length(i))) << "after operation " << i;
            };
            if (write) check(theirs);
            else check(ours);
            if (testing::Test::HasFatalFailure()) return;
        }
    }
}
constexpr std::uint64_t MANY_SMALL = 600 * 3001;

// ---- every kind of memory with every other

const std::vector<std::string> KINDS = {"pageable", "pinned:0", "device:0", "device:1", "managed:0", "vmm:0", "pieces:0"};

// The parameter: a provider, and the kind of memory of ours.
class Ways : public OnGpu {
protected:
    std::string kind() const {
        const std::string parameter = GetParam();
        return parameter.substr(parameter.find(' ') + 1);
    }
    void SetUp() override {
        prepare();
        if (driver != nullptr && !has(kind())) GTEST_SKIP() << "skipped: there is one GPU only";
    }
};
INSTANTIATE_TEST_SUITE_P(
    Over, Ways,
    testing::Values("tcp pageable", "tcp pinned:0", "tcp device:0", "tcp device:1", "tcp managed:0", "tcp vmm:0", "tcp pieces:0",
                    "shm pageable", "shm pinned:0", "shm device:0", "shm device:1", "shm managed:0", "shm vmm:0", "shm pieces:0"),
    [](const auto &info) {
        std::string name = info.param;
        name.erase(std::remove(name.begin(), name.end(), ':'), name.end());
        std::replace(name.begin(), name.end(), ' ', '_');
        return name;
    });

TEST_P(Ways, InOneProcess) {
    auto transport = install();
    const Buffer ours(kind(), EVERY_LENGTH);
    const auto registered = add(transport, ours);
    for (const std::string &other : KINDS) {
        if (!has(other)) continue;
        SCOPED_TRACE(kind() + " and " + other);
        const Buffer theirs(other, EVERY_LENGTH);
        const auto also = add(transport, theirs);
        auto segment = ourselves(transport);
        every_length(transport, segment, ours, theirs);
        if (HasFatalFailure()) return;
        many_small(transport, segment, ours, theirs);
        if (HasFatalFailure()) return;
    }
}

TEST_P(Ways, BetweenProcesses) {
    Remote peer(provider());
    auto transport = install();
    const Buffer ours(kind(), EVERY_LENGTH);
    const auto registered = add(transport, ours);
    for (const std::string &other : KINDS) {
        if (!has(other)) continue;
        SCOPED_TRACE(kind() + " and, of the peer, " + other);
        const auto theirs = peer.allocate(other, EVERY_LENGTH);
        auto segment = must(transport.open_json(peer.descriptor()));
        every_length(transport, segment, ours, theirs);
        if (HasFatalFailure()) return;
        many_small(transport, segment, ours, theirs);
        if (HasFatalFailure()) return;
        EXPECT_EQ(theirs.unregister(), 0);
        theirs.free();
    }
    EXPECT_TRUE(peer.ends_clean());
}

// ---- what may be registered, and as what

class Registering : public OnGpu {
protected:
    // What peers see of our memory: location and first byte.
    static std::vector<std::pair<std::string, std::uint64_t>> shown(const mefa::Transport &transport) {
        std::vector<std::pair<std::string, std::uint64_t>> found;
        must(transport.descriptor([&](const mefa_segment_desc &segment) {
            for (std::size_t i = 0; i < segment.buffer_count; ++i)
                found.emplace_back(segment.buffers[i].name, segment.buffers[i].address);
        }));
        return found;
    }
    static std::string hexadecimal(Address address) {
        char text[32];
        std::snprintf(text, sizeof text, "0x%" PRIx64, address);
        return text;
    }
    // That a range is refused whole, by a sentence that names an address in it.
    void refused(mefa::Transport &transport, Address first, std::uint64_t length, Address border) {
        const auto shown_before = shown(transport);
        const auto registered = transport.register_memory(reinterpret_cast<void *>(first), length);
        ASSERT_FALSE(registered) << "a range over a border was registered";
        const std::string &text = registered.error().text;
        EXPECT_TRUE(text.find(hexadecimal(first)) != std::string::npos || text.find(hexadecimal(border)) != std::string::npos)
            << text;
        EXPECT_EQ(shown(transport), shown_before);
        EXPECT_EQ(mefa_unregister(transport.raw(), reinterpret_cast<void *>(first)), MEFA_CODE_ADDRESS_NOT_REGISTERED);
    }
};
OVER(Registering, "tcp", "shm");

TEST_P(Registering, SaysWhereItIs) {
    auto transport = install();
    for (const std::string &kind : KINDS) {
        if (!has(kind)) continue;
        SCOPED_TRACE(kind);
        const Buffer buffer(kind, MiB);
        const auto registered = add(transport, buffer);
        ASSERT_EQ(shown(transport).size(), 1u);
        const auto [location, address] = shown(transport)[0];
        EXPECT_EQ(address, buffer.address());
        if (buffer.on_device()) {
            EXPECT_EQ(location, "cuda:" + std::to_string(buffer.device()));
        } else if (kind.rfind("managed", 0) != 0) {
            EXPECT_EQ(location.rfind("cpu:", 0), 0u) << location;
        }
    }
    EXPECT_TRUE(shown(transport).empty());
}

TEST_P(Registering, SaysOnceThatItIsStaged) {
    Remote peer(provider(), "there:1", {"MC_LOG_LEVEL=INFO"});
    peer.allocate("pageable", MiB);
    EXPECT_EQ(peer.ask("logged staged"), "0") << "of host memory there is nothing to say";
    for (const char *kind : {"device:0", "device:0", "vmm:0"}) {
        peer.allocate(kind, MiB);
        EXPECT_EQ(peer.ask("logged staged"), "1");
    }
    EXPECT_TRUE(peer.ends_clean());
}

TEST_P(Registering, AllOrNothing) {
    auto transport = install();
    const Buffer device("device:0", MiB), host("pageable", MiB), vmm("vmm:0", MiB), registered_before("device:0", MiB);
    const auto kept = add(transport, registered_before);
    const auto shown_before = shown(transport);
    const mefa_memory memories[] = {{device.data(), MiB, nullptr},
                                    {host.data(), MiB, nullptr},
                                    {vmm.data(), MiB, nullptr},
                                    {registered_before.data(), MiB, nullptr}}; // overlaps
    for (std::size_t bad_first = 0; bad_first < 4; ++bad_first) {
        mefa_memory turned[4];
        std::rotate_copy(memories, memories + bad_first, memories + 4, turned);
        EXPECT_TRUE(fails(MEFA_CODE_ADDRESS_OVERLAPPED, transport.register_many(turned)));
        EXPECT_EQ(shown(transport), shown_before);
        for (const Buffer *buffer : {&device, &host, &vmm})
            EXPECT_EQ(mefa_unregister(transport.raw(), buffer->data()), MEFA_CODE_ADDRESS_NOT_REGISTERED);
    }
    // And all of them can be.
    const auto all = must(transport.register_many({memories, 3}));
    EXPECT_EQ(shown(transport).size(), 4u);
}

// Several allocations of one device, one after the other, are one range like any other.
TEST_P(Registering, OverSeveralAllocations) {
    auto transport = install();
    const std::uint64_t unit = Mapping::unit(*driver, 0);
    const Buffer pieces("pieces:0", 3 * unit), host("pageable", 3 * unit);
    // From the middle of one to the middle of another.
    const Address first = pieces.address() + 4097;
    const std::uint64_t length = 3 * unit - 10000;
    const auto registered = must(transport.register_memory(reinterpret_cast<void *>(first), length));
    const auto other = add(transport, host);
    auto segment = ourselves(transport);
    pieces.fill(0, 3 * unit, 1, 0);
    host.fill(0, 3 * unit, 2, 0);
    ASSERT_EQ(run(transport, segment.read(host.data(), first, length)), MEFA_STATUS_COMPLETED);
    EXPECT_TRUE(host.is(0, length, 1, 4097));
    host.fill(0, 3 * unit, 2, 0);
    ASSERT_EQ(run(transport, segment.write(host.data(), first, length)), MEFA_STATUS_COMPLETED);
    EXPECT_TRUE(pieces.is(4097, length, 2, 0));
    EXPECT_TRUE(pieces.is(0, 4097, 1, 0));
    EXPECT_TRUE(pieces.is(4097 + length, 3 * unit - 4097 - length, 1, 4097 + length));
}

// The same with those of cuMemAlloc, where the driver puts two side by side.
TEST_P(Registering, OverNeighboursOfOrdinaryAllocations) {
    auto transport = install();
    const std::uint64_t size = 2 * MiB;
    std::vector<std::unique_ptr<Buffer>> buffers;
    for (int i = 0; i < 16; ++i) buffers.push_back(std::make_unique<Buffer>("device:0", size));
    std::sort(buffers.begin(), buffers.end(), [](const auto &a, const auto &b) { return a->address() < b->address(); });
    const auto one = std::adjacent_find(buffers.begin(), buffers.end(),
                                        [&](const auto &a, const auto &b) { return a->address() + size == b->address(); });
    if (one == buffers.end()) GTEST_SKIP() << "skipped: this driver puts no allocation right after another";
    const auto registered = must(transport.register_memory((*one)->data(), 2 * size));
    const Buffer host("pageable", 2 * size);
    const auto other = add(transport, host);
    auto segment = ourselves(transport);
    host.fill(0, 2 * size, 3, 0);
    ASSERT_EQ(run(transport, segment.write(host.data(), (*one)->address(), 2 * size)), MEFA_STATUS_COMPLETED);
    EXPECT_TRUE((*one)->is(0, size, 3, 0));
    EXPECT_TRUE((*(one + 1))->is(0, size, 3, size));
}

TEST_P(Registering, NotOverTwoGpus) {
    if (driver->devices() < 2) GTEST_SKIP() << "skipped: there is one GPU only";
    int can = 0;
    driver->ok(driver->cuDeviceCanAccessPeer(&can, 0, 1));
    if (!can) GTEST_SKIP() << "skipped: GPU 0 and 1 cannot have memory in one range";
    auto transport = install();
    const Context zero(*driver, 0), one(*driver, 1);
    const auto entered = zero.enter();
    const std::uint64_t unit = Mapping::unit(*driver, 0);
    const Mapping mapping(*driver, {0, 0, 1, 1}, unit);
    refused(transport, mapping.address(), mapping.size(), mapping.address() + 2 * unit);
    refused(transport, mapping.address() + 2 * unit - 1, 2, mapping.address() + 2 * unit);
    // Its halves are as good as any.
    const auto registered = must(transport.register_memory(reinterpret_cast<void *>(mapping.address()), 2 * unit));
    const auto other = must(transport.register_memory(reinterpret_cast<void *>(mapping.address() + 2 * unit), 2 * unit));
    EXPECT_EQ(shown(transport)[0].first, "cuda:0");
    EXPECT_EQ(shown(transport)[1].first, "cuda:1");
}

TEST_P(Registering, NotOverDeviceAndHost) {
    auto transport = install();
    const Context zero(*driver, 0);
    const auto entered = zero.enter();
    const std::uint64_t unit = Mapping::unit(*driver, 0);
    // Device memory at a place in the middle of what is the host's then, if the driver takes the hint.
    Memory around(5 * unit);
    const Address middle = rounded(reinterpret_cast<Address>(around.data()) + unit, unit);
    ASSERT_EQ(munmap(reinterpret_cast<void *>(middle), unit), 0);
    std::unique_ptr<Mapping> mapping = std::make_unique<Mapping>(*driver, std::vector<int>{0}, unit, middle);
    if (mapping->address() != middle) GTEST_SKIP() << "skipped: the driver puts memory elsewhere than it was told to";
    refused(transport, middle, unit + 4096, middle + unit);
    refused(transport, middle - 4096, 8192, middle);
    const auto registered = must(transport.register_memory(reinterpret_cast<void *>(middle), unit));
    const auto below = must(transport.register_memory(reinterpret_cast<void *>(middle - 4096), 4096));
    const auto above = must(transport.register_memory(reinterpret_cast<void *>(middle + unit), 4096));
    EXPECT_EQ(shown(transport).size(), 3u);
}

// Memory that was registered, is freed, and comes back at the same place as another's, or at another. Nobody keeps it.
TEST_P(Registering, WhatWasFreedIsForgotten) {
    Remote peer(provider());
    auto transport = install();
    const Context context(*driver, 0);
    std::size_t available = 0;
    std::set<Address> theirs_at;
    for (std::uint64_t round = 1; round <= 6; ++round) {
        SCOPED_TRACE(round);
        {
            const Buffer ours(round % 2 ? "device:0" : "pinned:0", 3 * MiB);
            const auto registered = add(transport, ours);
            const auto theirs = peer.allocate("device:0", 3 * MiB);
            theirs_at.insert(theirs.address());
            auto segment = must(transport.open_json(peer.descriptor()));
            ours.fill(0, 3 * MiB, round, 0);
            ASSERT_EQ(run(transport, segment.write(ours.data(), theirs.address(), 3 * MiB)), MEFA_STATUS_COMPLETED);
            ASSERT_TRUE(theirs.is(0, 3 * MiB, round, 0));
            theirs.fill(0, 3 * MiB, 100 + round, 0);
            ASSERT_EQ(run(transport, segment.read(ours.data(), theirs.address(), 3 * MiB)), MEFA_STATUS_COMPLETED);
            ASSERT_TRUE(ours.is(0, 3 * MiB, 100 + round, 0));
            EXPECT_EQ(theirs.unregister(), 0);
            theirs.free();
        }
        ASSERT_TRUE(eventually([&] { return peer.ask("imports") == "0"; })) << "the peer still has our memory";
        ASSERT_TRUE(eventually([&] { return driver->counts().imports == 0; })) << "we still have the peer's memory";
        // The first two make what stays: streams, and buffers to stage through.
        if (round == 2) available = free_memory(context);
        if (round > 2) {
            ASSERT_TRUE(eventually([&] { return free_memory(context) == available; })) << "memory of the GPU was lost";
        }
    }
    EXPECT_TRUE(peer.ends_clean());
    if (theirs_at.size() == 6) std::cout << "note: no address came twice, so this showed little\n";
}

// ---- threads, and their contexts

class Threads : public OnGpu {};
OVER(Threads, "tcp", "shm");

TEST_P(Threads, OneWithoutAContextHasNoneAfterwards) {
    Remote peer(provider());
    const auto theirs = peer.allocate("device:0", MiB);
    auto transport = install();
    const Buffer ours("device:0", MiB), host("pageable", MiB);
    ours.fill(0, MiB, 1, 0);
    std::thread([&] {
        const auto none = [&](const char *after) { EXPECT_EQ(current(), nullptr) << after; };
        none("at the beginning");
        auto registered = add(transport, ours);
        none("mefa_register");
        const auto other = add(transport, host);
        auto segment = must(transport.open_json(peer.descriptor())), own = ourselves(transport);
        auto batch = must(transport.batch(2));
        must(batch.submit(segment.write(ours.data(), theirs.address(), MiB), LONG));
        none("mefa_submit");
        ASSERT_EQ(must(batch.wait(LONG)), MEFA_STATUS_COMPLETED);
        none("mefa_wait");
        must(batch.submit(own.write(ours.data(), host.address(), MiB), LONG));
        ASSERT_TRUE(eventually([&] { return must(batch.task(1)).status != MEFA_STATUS_PENDING; }));
        none("mefa_task_status");
        EXPECT_EQ(must(batch.task(1)).status, MEFA_STATUS_COMPLETED);
        EXPECT_EQ(mefa_progress(transport.raw()), 0);
        none("mefa_progress");
        must(batch.close());
        must(registered.close());
        none("mefa_unregister");
    }).join();
    EXPECT_TRUE(theirs.is(0, MiB, 1, 0));
    EXPECT_TRUE(host.is(0, MiB, 1, 0));
    std::thread([&] {
        must(transport.close());
        EXPECT_EQ(current(), nullptr) << "mefa_uninstall";
    }).join();
    EXPECT_TRUE(peer.ends_clean());
}

// Of another GPU, where there are two.
TEST_P(Threads, OneWithAContextOfItsOwnKeepsIt) {
    Remote peer(provider());
    const auto theirs = peer.allocate("device:0", MiB);
    const Context context(*driver, driver->devices() - 1);
    if (driver->devices() < 2) std::cout << "note: there is one GPU only, so its context is the one of the memory, too\n";
    const auto entered = context.enter();
    const auto kept = [&](const char *after) { EXPECT_EQ(current(), context.raw()) << after; };
    auto transport = install();
    kept("mefa_install");
    {
        const Buffer ours("device:0", MiB), host("pageable", MiB);
        ours.fill(0, MiB, 1, 0);
        auto registered = add(transport, ours);
        kept("mefa_register");
        const auto other = add(transport, host);
        auto segment = must(transport.open_json(peer.descriptor())), own = ourselves(transport);
        const mefa_request requests[] = {segment.write(ours.data(), theirs.address(), MiB),
                                         own.write(ours.data(), host.address(), MiB)};
        EXPECT_EQ(run(transport, requests), MEFA_STATUS_COMPLETED);
        kept("mefa_wait");
        must(registered.close());
        kept("mefa_unregister");
        EXPECT_TRUE(theirs.is(0, MiB, 1, 0));
        EXPECT_TRUE(host.is(0, MiB, 1, 0));
    }
    must(transport.close());
    kept("mefa_uninstall");
    // And it was alone: nothing of ours is below it.
    Handle popped = nullptr;
    driver->ok(driver->cuCtxPopCurrent_v2(&popped));
    EXPECT_EQ(current(), nullptr);
    driver->ok(driver->cuCtxPushCurrent_v2(popped));
    EXPECT_TRUE(peer.ends_clean());
}

TEST_P(Threads, SixtyFourAtOnce) {
    constexpr std::uint64_t THREADS = 64, SLOT = 80 * KiB, ROUNDS = 6;
    Remote peer(provider());
    const auto theirs = peer.allocate("device:0", THREADS * SLOT);
    auto transport = install();
    const std::string second = driver->devices() > 1 ? "device:1" : "device:0";
    const Buffer ours("device:0", THREADS * SLOT), other(second, THREADS * SLOT), host("pageable", THREADS * SLOT);
    const auto a = add(transport, ours), b = add(transport, other), c = add(transport, host);
    auto segment = must(transport.open_json(peer.descriptor())), own = ourselves(transport);
    const Context context(*driver, 0);
    std::vector<std::thread> threads;
    for (std::uint64_t number = 0; number < THREADS; ++number)
        threads.emplace_back([&, number] {
            std::optional<Context::Entered> entered;
            if (number % 2) entered.emplace(*driver, context.raw());
            const std::uint64_t at = number * SLOT;
            for (std::uint64_t round = 0; round < ROUNDS; ++round) {
                const std::uint64_t seed = 1 + number * ROUNDS + round, length = 64 * KiB + 3 + number;
                // Once around: ours, the peer's, back to another GPU, the host, and ours again.
                ours.fill(at, length, seed, at);
                const auto move = [&](mefa_request request) { EXPECT_EQ(run(transport, request), MEFA_STATUS_COMPLETED); };
                const auto place = [at](const Buffer &buffer) { return reinterpret_cast<void *>(buffer.address() + at); };
                move(segment.write(place(ours), theirs.address() + at, length));
                move(segment.read(place(other), theirs.address() + at, length));
                move(own.write(place(other), host.address() + at, length));
                ours.fill(at, length, 0, at);
                move(own.read(place(ours), host.address() + at, length));
                ASSERT_TRUE(ours.is(at, length, seed, at)) << "thread " << number << ", round " << round;
                ASSERT_TRUE(other.is(at, length, seed, at));
            }
        });
    for (std::thread &thread : threads) thread.join();
    for (std::uint64_t number = 0; number < THREADS; ++number)
        EXPECT_TRUE(theirs.is(number * SLOT, 64 * KiB + 3 + number, number * ROUNDS + ROUNDS, number * SLOT));
}

// ---- ends of all sorts

class Ending : public OnGpu {
protected:
    static constexpr std::uint64_t COUNT = 48;

    // Alternately read and written, in an order that merges nothing.
    static std::vector<mefa_request> both_ways(mefa::Segment &segment, const Buffer &ours, Address theirs) {
        std::vector<mefa_request> requests;
        for (std::uint64_t i = 0; i < COUNT; ++i) {
            const std::uint64_t at = (i * 7 % COUNT) * MiB;
            void *here = reinterpret_cast<void *>(ours.address() + at);
            requests.push_back(i % 2 ? segment.read(here, theirs + at, MiB) : segment.write(here, theirs + at, MiB));
        }
        return requests;
    }
    // Unregisters memory with transfers under way until that is done.
    void unregister(mefa::Transport &transport, mefa::Batch &batch, const Buffer &buffer) {
        const int code = mefa_unregister(transport.raw(), buffer.data());
        if (code == 0) return;
        ASSERT_EQ(code, MEFA_CODE_BUSY) << mefa_last_error();
        must(batch.wait_quiet(LONG));
        ASSERT_EQ(mefa_unregister(transport.raw(), buffer.data()), 0);
    }
    // Every task has its final status within the time given and one more minute, and says why.
    void ends(mefa::Batch &batch, std::size_t tasks, mefa::nanoseconds given) {
        const auto status = batch.wait(given + LONG);
        ASSERT_TRUE(status) << status.error().text;
        for (std::size_t task = 0; task < tasks; ++task) {
            const auto state = must(batch.task(task));
            if (state.status == MEFA_STATUS_COMPLETED) continue;
            EXPECT_TRUE(state.status == MEFA_STATUS_FAILED || state.status == MEFA_STATUS_TIMEOUT) << state.status;
            EXPECT_EQ(state.bytes, 0u);
            EXPECT_NE(must(batch.task_error(task)), "");
        }
    }
};
OVER(Ending, "tcp", "shm");

// What is read into memory is there, or never comes; what is written is what was there before.
TEST_P(Ending, UnregisteredWithTransfersUnderWay) {
    Remote peer(provider());
    const auto theirs = peer.allocate("device:0", COUNT * MiB);
    auto transport = install();
    for (const char *kind : {"device:0", "vmm:0", "managed:0", "pageable"}) {
        for (const bool write : {false, true}) {
            SCOPED_TRACE(std::string(kind) + (write ? ", written from" : ", read into"));
            const Buffer ours(kind, COUNT * MiB);
            ASSERT_EQ(mefa_register(transport.raw(), ours.data(), ours.size(), nullptr, nullptr, nullptr), 0);
            auto segment = must(transport.open_json(peer.descriptor()));
            theirs.fill(0, COUNT * MiB, 1, 0);
            ours.fill(0, COUNT * MiB, 2, 0);
            std::vector<mefa_request> requests;
            for (std::uint64_t i = 0; i < COUNT; ++i) {
                const std::uint64_t at = (i * 7 % COUNT) * MiB;
                void *here = reinterpret_cast<void *>(ours.address() + at);
                requests.push_back(write ? segment.write(here, theirs.address() + at, MiB)
                                         : segment.read(here, theirs.address() + at, MiB));
            }
            auto batch = must(transport.batch(COUNT));
            must(batch.submit(requests, LONG));
            unregister(transport, batch, ours);
            if (HasFatalFailure()) return;
            ours.fill(0, COUNT * MiB, 3, 0);
            ends(batch, COUNT, LONG);
            must(batch.wait_quiet(LONG));
            EXPECT_TRUE(ours.is(0, COUNT * MiB, 3, 0)) << "something was written to memory that was given back";
            for (std::uint64_t i = 0; i < COUNT; ++i) {
                const std::uint64_t at = (i * 7 % COUNT) * MiB;
                EXPECT_EQ(must(batch.task(i)).status, MEFA_STATUS_COMPLETED) << must(batch.task_error(i));
                if (write) {
                    EXPECT_TRUE(theirs.is(at, MiB, 2, at)) << "something was read from memory that was given back";
                }
            }
        }
    }
}

// Within the process, both ends.
TEST_P(Ending, UnregisteredWithCopiesUnderWay) {
    const Setting late("FAKE_CUDA_LATE", "3000"); // so that they are under way
    auto transport = install();
    const Buffer from("device:0", COUNT * MiB);
    for (const bool source_first : {true, false}) {
        auto other = std::make_unique<Buffer>(driver->devices() > 1 ? "device:1" : "device:0", COUNT * MiB);
        const Buffer &to = *other;
        for (const Buffer *buffer : {&from, &to})
            ASSERT_EQ(mefa_register(transport.raw(), buffer->data(), buffer->size(), nullptr, nullptr, nullptr), 0);
        auto segment = ourselves(transport);
        from.fill(0, COUNT * MiB, 1, 0);
        to.fill(0, COUNT * MiB, 2, 0);
        std::vector<mefa_request> requests;
        for (std::uint64_t i = 0; i < COUNT; ++i) {
            const std::uint64_t at = (i * 7 % COUNT) * MiB;
            requests.push_back(segment.write(reinterpret_cast<void *>(from.address() + at), to.address() + at, MiB));
        }
        auto batch = must(transport.batch(COUNT));
        must(batch.submit(requests, LONG));
        unregister(transport, batch, source_first ? from : to);
        if (HasFatalFailure()) return;
        if (source_first) {
            from.fill(0, COUNT * MiB, 3, 0);
        } else {
            other.reset(); // the fake driver counts copies that are still queued for it
        }
        ends(batch, COUNT, LONG);
        must(batch.wait_quiet(LONG));
        if (source_first) {
            EXPECT_TRUE(to.is(0, COUNT * MiB, 1, 0));
        }
        ASSERT_EQ(mefa_unregister(transport.raw(), (source_first ? to : from).data()), 0);
    }
}

// The peer takes its memory back while we write to it: once it has, it is the peer's alone.
TEST_P(Ending, ThePeerUnregisters) {
    Remote peer(provider(), "there:1", {"FAKE_CUDA_LATE=3000"});
    auto transport = install();
    const Buffer ours("device:0", COUNT * MiB);
    const auto registered = add(transport, ours);
    ours.fill(0, COUNT * MiB, 1, 0);
    for (const bool freed : {false, true}) {
        SCOPED_TRACE(freed);
        const auto theirs = peer.allocate("device:0", COUNT * MiB);
        auto segment = must(transport.open_json(peer.descriptor()));
        std::vector<mefa_request> requests;
        for (std::uint64_t i = 0; i < COUNT; ++i) {
            const std::uint64_t at = (i * 7 % COUNT) * MiB;
            requests.push_back(segment.write(reinterpret_cast<void *>(ours.address() + at), theirs.address() + at, MiB));
        }
        auto batch = must(transport.batch(COUNT));
        must(batch.submit(requests, 5s));
        ASSERT_EQ(theirs.unregister(), 0);
        if (freed) {
            theirs.free(); // the peer's fake driver counts copies that are still queued for it
            ends(batch, COUNT, 5s);
        } else {
            theirs.fill(0, COUNT * MiB, 2, 0);
            ends(batch, COUNT, 5s);
            EXPECT_TRUE(theirs.is(0, COUNT * MiB, 2, 0)) << "something was written to memory that the peer had taken back";
        }
    }
    EXPECT_TRUE(peer.ends_clean());
}

TEST_P(Ending, ThePeerIsKilled) {
    auto transport = install();
    const Buffer ours("device:0", COUNT * MiB);
    auto registered = add(transport, ours);
    {
        Remote peer(provider());
        const auto theirs = peer.allocate("device:0", COUNT * MiB);
        auto segment = must(transport.open_json(peer.descriptor()));
        std::vector<mefa_request> requests;
        for (int i = 0; i < 8; ++i)
            for (const mefa_request &request : both_ways(segment, ours, theirs.address())) requests.push_back(request);
        auto batch = must(transport.batch(requests.size()));
        must(batch.submit(requests, 5s));
        ASSERT_TRUE(eventually([&] { return must(batch.task(0)).status != MEFA_STATUS_PENDING; }));
        peer.kill();
        ends(batch, requests.size(), 5s);
        // And what comes now for the dead one ends, too.
        auto more = must(transport.batch(COUNT));
        if (more.submit(both_ways(segment, ours, theirs.address()), 2s)) ends(more, COUNT, 2s);
    }
    // shm takes its peers' answers in order, so what still waits for the dead one's is in the way; a new transport is not.
    if (provider() == "shm") {
        must(registered.close());
        must(transport.close());
        transport = install();
        registered = add(transport, ours);
    }
    Remote other(provider(), "there:2");
    const auto theirs = other.allocate("device:0", EVERY_LENGTH);
    auto segment = must(transport.open_json(other.descriptor()));
    every_length(transport, segment, ours, theirs);
    EXPECT_TRUE(other.ends_clean());
}

// Stopped, not dead: what takes too long ends as such, and its memory is ours again when the library says so.
TEST_P(Ending, ThePeerStandsStill) {
    Remote peer(provider());
    const auto theirs = peer.allocate("device:0", COUNT * MiB);
    auto transport = install();
    const Buffer ours("device:0", COUNT * MiB);
    const auto registered = add(transport, ours);
    auto segment = must(transport.open_json(peer.descriptor()));
    ASSERT_EQ(run(transport, segment.write(ours.data(), theirs.address(), MiB)), MEFA_STATUS_COMPLETED);
    peer.stop();
    auto batch = must(transport.batch(COUNT));
    must(batch.submit(both_ways(segment, ours, theirs.address()), 1s));
    ends(batch, COUNT, 1s);
    peer.resume();
    must(batch.wait_quiet(LONG));
    ours.fill(0, COUNT * MiB, 4, 0);
    ASSERT_EQ(run(transport, segment.write(ours.data(), theirs.address(), COUNT * MiB)), MEFA_STATUS_COMPLETED);
    EXPECT_TRUE(theirs.is(0, COUNT * MiB, 4, 0));
    EXPECT_TRUE(ours.is(0, COUNT * MiB, 4, 0)) << "something came late";
    EXPECT_TRUE(peer.ends_clean());
}

TEST_P(Ending, Cancelled) {
    Remote peer(provider());
    const auto theirs = peer.allocate("device:0", COUNT * MiB);
    auto transport = install();
    const Buffer ours("device:0", COUNT * MiB), other("vmm:0", COUNT * MiB);
    const auto a = add(transport, ours), b = add(transport, other);
    auto segment = must(transport.open_json(peer.descriptor())), own = ourselves(transport);
    for (const bool local : {false, true}) {
        auto batch = must(transport.batch(COUNT));
        must(batch.submit(both_ways(local ? own : segment, ours, local ? other.address() : theirs.address()), LONG));
        must(batch.cancel());
        must(batch.wait(LONG));
        // CANCELED and COMPLETED both mean that the memory is ours again.
        ours.fill(0, COUNT * MiB, 5, 0);
        for (std::uint64_t task = 0; task < COUNT; ++task) {
            const int status = must(batch.task(task)).status;
            EXPECT_TRUE(status == MEFA_STATUS_COMPLETED || status == MEFA_STATUS_CANCELED) << status;
        }
        must(batch.close());
        ASSERT_EQ(run(transport, segment.write(ours.data(), theirs.address(), COUNT * MiB)), MEFA_STATUS_COMPLETED);
        EXPECT_TRUE(theirs.is(0, COUNT * MiB, 5, 0));
        EXPECT_TRUE(ours.is(0, COUNT * MiB, 5, 0));
    }
    EXPECT_TRUE(peer.ends_clean());
}

// ---- what is not touched

class Untouched : public OnGpu {
protected:
    // Which GPUs have a context, and, where the driver can say so, had one.
    std::string contexts() const {
        std::string said;
        for (int device = 0; device < driver->devices(); ++device) {
            unsigned flags = 0;
            int active = 0;
            driver->ok(driver->cuDevicePrimaryCtxGetState(device, &flags, &active));
            said += active || driver->counts().contexts_created[device] ? "1" : "0";
        }
        return said;
    }
    // PCI addresses of the GPUs that a process has memory on, as nvidia-smi tells. Empty where it cannot see processes.
    static std::set<std::string> gpus_of(pid_t process) {
        std::set<std::string> found;
        FILE *out = popen("nvidia-smi --query-compute-apps=pid,gpu_bus_id --format=csv,noheader 2>/dev/null", "r");
        char line[256], bus[128];
        int pid = 0;
        while (out && std::fgets(line, sizeof line, out))
            if (std::sscanf(line, "%d, %127s", &pid, bus) == 2 && pid == process) found.insert(bus);
        if (out) pclose(out);
        return found;
    }
};
OVER(Untouched, "tcp", "shm");

// Only the last GPU's memory is used, so the others must never have had a context: neither here nor in the peer.
TEST_P(Untouched, OtherGpus) {
    const int last = driver->devices() - 1;
    if (last == 0) GTEST_SKIP() << "skipped: there is one GPU only";
    if (driver->fake() && driver->counts().contexts_created[0] != 0)
        GTEST_SKIP() << "skipped: a test before this one, in the same process, used GPU 0";
    const std::string kind = "device:" + std::to_string(last), only = std::string(static_cast<std::size_t>(last), '0') + "1";
    Remote peer(provider());
    const auto theirs = peer.allocate(kind, EVERY_LENGTH);
    auto transport = install();
    {
        const Buffer ours(kind, EVERY_LENGTH), other("vmm:" + std::to_string(last), EVERY_LENGTH),
            pinned("pinned:" + std::to_string(last), EVERY_LENGTH), host("pageable", EVERY_LENGTH);
        const auto a = add(transport, ours), b = add(transport, other), c = add(transport, pinned), d = add(transport, host);
        EXPECT_EQ(contexts(), only);
        auto segment = must(transport.open_json(peer.descriptor())), own = ourselves(transport);
        for (const Buffer *buffer : {&ours, &other, &pinned, &host}) every_length(transport, segment, *buffer, theirs);
        for (const Buffer *buffer : {&other, &pinned, &host}) every_length(transport, own, ours, *buffer);
        EXPECT_EQ(contexts(), only);
        EXPECT_EQ(peer.ask("contexts"), only);
        for (const pid_t process : {getpid(), peer.process()}) {
            const auto used = gpus_of(process);
            EXPECT_LE(used.size(), 1u) << "nvidia-smi shows process " << process << " on more GPUs than it uses";
        }
    }
    EXPECT_TRUE(peer.ends_clean());
}

// The driver is here, and GPUs are; but nobody's memory is on them.
TEST_P(Untouched, AllGpusByHostMemory) {
    const std::string contexts_before = contexts();
    Remote peer(provider());
    const auto theirs = peer.allocate("pageable", EVERY_LENGTH);
    auto transport = install();
    const Buffer ours("pageable", EVERY_LENGTH);
    const auto registered = add(transport, ours);
    auto segment = must(transport.open_json(peer.descriptor())), own = ourselves(transport);
    every_length(transport, segment, ours, theirs);
    const Buffer other("pageable", EVERY_LENGTH);
    const auto also = add(transport, other);
    auto again = ourselves(transport);
    every_length(transport, again, ours, other);
    EXPECT_EQ(contexts(), contexts_before);
    EXPECT_EQ(peer.ask("contexts"), std::string(static_cast<std::size_t>(driver->devices()), '0'));
    EXPECT_EQ(gpus_of(getpid()).size(), 0u);
    EXPECT_TRUE(peer.ends_clean());
}

// Installed, used and uninstalled again and again: no memory of the GPU's is lost. The first time makes what the driver
// keeps for itself.
TEST_P(Untouched, MemoryOfTheGpu) {
    const Context context(*driver, 0);
    const auto once = [&] {
        Remote peer(provider());
        const auto theirs = peer.allocate("device:0", EVERY_LENGTH);
        auto transport = install();
        const Buffer ours("device:0", EVERY_LENGTH), other("vmm:0", EVERY_LENGTH), host("pageable", EVERY_LENGTH);
        const auto a = add(transport, ours), b = add(transport, other), c = add(transport, host);
        auto segment = must(transport.open_json(peer.descriptor())), own = ourselves(transport);
        every_length(transport, segment, ours, theirs);
        every_length(transport, segment, host, theirs);
        every_length(transport, own, ours, other);
        every_length(transport, own, host, ours);
        EXPECT_TRUE(peer.ends_clean());
    };
    once();
    const std::size_t available = free_memory(context);
    for (int i = 0; i < 3; ++i) {
        once();
        EXPECT_EQ(free_memory(context), available);
    }
}

// A process that never loads CUDA, and one that does so when its transport is there already.
TEST_P(Untouched, AProcessWithoutCuda) {
    Remote peer(provider(), "there:1", {"MEFA_TEST_NO_CUDA=1"});
    const auto theirs = peer.allocate("pageable", EVERY_LENGTH);
    auto transport = install();
    const Buffer ours("device:0", EVERY_LENGTH);
    const auto registered = add(transport, ours);
    auto segment = must(transport.open_json(peer.descriptor()));
    every_length(transport, segment, ours, theirs);
    // The other way round: it begins.
    peer.open(must(transport.descriptor_json()));
    theirs.fill(0, EVERY_LENGTH, 31, 0);
    ours.fill(0, EVERY_LENGTH, 32, 0);
    ASSERT_EQ(theirs.write(1, ours.address() + 3, 5 * MiB + 1), MEFA_STATUS_COMPLETED);
    EXPECT_TRUE(ours.is(3, 5 * MiB + 1, 31, 1));
    EXPECT_TRUE(ours.is(0, 3, 32, 0));
    ours.fill(0, EVERY_LENGTH, 33, 0);
    ASSERT_EQ(theirs.read(2, ours.address() + 5, 5 * MiB + 1), MEFA_STATUS_COMPLETED);
    EXPECT_TRUE(theirs.is(2, 5 * MiB + 1, 33, 5));
    EXPECT_EQ(peer.ask("cuda"), "no");
    EXPECT_TRUE(peer.ends_clean());
}

TEST_P(Untouched, AProcessThatLoadsCudaLate) {
    Remote peer(provider(), "there:1", {"MEFA_TEST_LATE_CUDA=1"});
    const auto theirs = peer.allocate("device:0", EVERY_LENGTH);
    auto transport = install();
    const Buffer ours("device:0", EVERY_LENGTH);
    const auto registered = add(transport, ours);
    auto segment = must(transport.open_json(peer.descriptor()));
    every_length(transport, segment, ours, theirs);
    EXPECT_EQ(peer.ask("cuda"), "yes");
    EXPECT_TRUE(peer.ends_clean());
}

// ---- when CUDA says no; on the fake driver only, which does so when told

class Refusing : public OnGpu {
protected:
    void SetUp() override {
        prepare();
        if (driver != nullptr && !driver->fake()) GTEST_SKIP() << "skipped: a real driver does not fail on demand";
    }
    // One transfer; its status, and what is said of it. It may be refused because of one before.
    std::pair<int, std::string> told(mefa::Transport &transport, mefa_request request) {
        auto batch = must(transport.batch(1));
        const auto submitted = batch.submit(request, LONG);
        if (!submitted) return {MEFA_STATUS_FAILED, submitted.error().text};
        const int status = must(batch.wait(LONG));
        const std::string text = must(batch.task_error(0));
        must(batch.wait_quiet(LONG));
        return {status == MEFA_STATUS_COMPLETED ? status : must(batch.task(0)).status, text};
    }
};
OVER(Refusing, "tcp", "shm");

TEST_P(Refusing, CopiesWithinTheProcess) {
    auto transport = install();
    const Buffer from("device:0", MiB), to("device:0", MiB);
    const auto a = add(transport, from), b = add(transport, to);
    auto segment = ourselves(transport);
    from.fill(0, MiB, 1, 0);
    for (const char *rule : {"cuMemcpyAsync=700", "cuStreamCreate=2", "cuEventRecord=999", "cuEventQuery=719"}) {
        SCOPED_TRACE(rule);
        to.fill(0, MiB, 2, 0);
        driver->fake_fail(rule);
        const auto [status, text] = told(transport, segment.write(from.data(), to.address(), MiB));
        driver->fake_fail(nullptr);
        // A stream may be there already; without its event a copy is waited for.
        if (status == MEFA_STATUS_COMPLETED && rule != std::string("cuMemcpyAsync=700")) {
            EXPECT_TRUE(to.is(0, MiB, 1, 0));
            continue;
        }
        EXPECT_EQ(status, MEFA_STATUS_FAILED);
        if (std::string(rule) == "cuMemcpyAsync=700") {
            EXPECT_NE(text.find("CUDA_ERROR_ILLEGAL_ADDRESS"), std::string::npos) << text;
        }
        EXPECT_NE(text, "");
        // It was for this time only.
        ASSERT_EQ(run(transport, segment.write(from.data(), to.address(), MiB)), MEFA_STATUS_COMPLETED);
        EXPECT_TRUE(to.is(0, MiB, 1, 0));
    }
}

// What memory is was asked when it was registered: a transfer asks nothing.
TEST_P(Refusing, QuestionsAboutPointers) {
    Remote peer(provider(), "there:1", {"MEFA_TEST_NO_CUDA=1"});
    const auto theirs = peer.allocate("pageable", MiB);
    auto transport = install();
    const Buffer from("device:0", MiB), to("device:0", MiB);
    const auto a = add(transport, from), b = add(transport, to);
    auto segment = ourselves(transport), far = must(transport.open_json(peer.descriptor()));
    from.fill(0, MiB, 1, 0);
    driver->fake_fail("cuPointerGetAttribute=1@1+");
    const auto inside = run(transport, segment.write(from.data(), to.address(), MiB));
    const auto staged = run(transport, far.write(from.data(), theirs.address(), MiB));
    driver->fake_fail(nullptr);
    EXPECT_EQ(inside, MEFA_STATUS_COMPLETED);
    EXPECT_EQ(staged, MEFA_STATUS_COMPLETED);
    EXPECT_TRUE(to.is(0, MiB, 1, 0));
    EXPECT_TRUE(theirs.is(0, MiB, 1, 0));
}

TEST_P(Refusing, CopiesOfWhatIsStaged) {
    Remote peer(provider(), "there:1", {"MEFA_TEST_NO_CUDA=1"});
    const auto theirs = peer.allocate("pageable", 8 * MiB);
    auto transport = install();
    const Buffer ours("device:0", 8 * MiB);
    const auto registered = add(transport, ours);
    auto segment = must(transport.open_json(peer.descriptor()));
    ours.fill(0, 8 * MiB, 1, 0);
    // The first copy, and one in the middle.
    for (const char *rule : {"cuMemcpyAsync=700", "cuMemcpyAsync=700@3"}) {
        for (const bool write : {true, false}) {
            SCOPED_TRACE(std::string(rule) + (write ? ", writing" : ", reading"));
            const auto request = write ? segment.write(ours.data(), theirs.address(), 8 * MiB)
                                       : segment.read(ours.data(), theirs.address(), 8 * MiB);
            driver->fake_fail(rule);
            const auto [status, text] = told(transport, request);
            driver->fake_fail(nullptr);
            if (status != MEFA_STATUS_COMPLETED) { // the third copy there may not be
                EXPECT_EQ(status, MEFA_STATUS_FAILED);
                EXPECT_NE(text.find("CUDA_ERROR_ILLEGAL_ADDRESS"), std::string::npos) << text;
            } else {
                EXPECT_STREQ(rule, "cuMemcpyAsync=700@3");
            }
        }
        ASSERT_EQ(run(transport, segment.write(ours.data(), theirs.address(), 8 * MiB)), MEFA_STATUS_COMPLETED);
    }
    every_length(transport, segment, ours, theirs);
    EXPECT_TRUE(peer.ends_clean());
}

// At the peer: we are told.
TEST_P(Refusing, CopiesOfThePeers) {
    const Setting no_ipc("FAKE_CUDA_NO_IPC", "1");
    Remote peer(provider(), "there:1", {"FAKE_CUDA_FAIL=cuMemcpyAsync=700"});
    const auto theirs = peer.allocate("device:0", EVERY_LENGTH);
    auto transport = install();
    const Buffer ours("pageable", EVERY_LENGTH);
    const auto registered = add(transport, ours);
    auto segment = must(transport.open_json(peer.descriptor()));
    for (const bool write : {true, false}) {
        const auto [status, text] = told(transport, write ? segment.write(ours.data(), theirs.address(), MiB)
                                                          : segment.read(ours.data(), theirs.address(), MiB));
        EXPECT_EQ(status, MEFA_STATUS_FAILED);
        EXPECT_NE(text.find("CUDA_ERROR_ILLEGAL_ADDRESS"), std::string::npos) << text;
    }
    EXPECT_TRUE(peer.ends_clean());
}

// Without IPC, or without the peer's memory by it, or without access from GPU to GPU, it is slower and as right.
TEST_P(Refusing, Ipc) {
    const std::pair<const char *, const char *> ways[] = {
        {"FAKE_CUDA_NO_IPC", "1"}, {"FAKE_CUDA_FAIL", "cuIpcOpenMemHandle=205"}, {"FAKE_CUDA_FAIL", "cuIpcGetMemHandle=801"},
        {"FAKE_CUDA_NO_PEER", "1"}};
    for (const auto &[name, value] : ways) {
        SCOPED_TRACE(std::string(name) + "=" + value);
        const Setting setting(name, value);
        if (std::string(name) == "FAKE_CUDA_FAIL") driver->fake_fail(value);
        Remote peer(provider());
        auto transport = install();
        const Buffer ours("device:0", EVERY_LENGTH), host("pageable", EVERY_LENGTH);
        const auto a = add(transport, ours), b = add(transport, host);
        for (const char *kind : {"device:0", "device:1"}) {
            const auto theirs = peer.allocate(kind, EVERY_LENGTH);
            auto segment = must(transport.open_json(peer.descriptor()));
            every_length(transport, segment, ours, theirs);
            every_length(transport, segment, host, theirs);
            if (HasFatalFailure()) return;
        }
        const Buffer other("device:1", EVERY_LENGTH);
        const auto c = add(transport, other);
        auto own = ourselves(transport);
        every_length(transport, own, ours, other);
        driver->fake_fail(nullptr);
        EXPECT_TRUE(peer.ends_clean());
    }
}

// Pinning is refused, as where locked memory is limited. Then it fails and says why, or it is slower and as right.
TEST_P(Refusing, PinnedMemory) {
    copies_may_be_pageable = true;
    auto transport = install();
    const Buffer device("device:0", MiB), host("pageable", MiB);
    const auto other = add(transport, host);
    driver->fake_fail("cuMemHostRegister=2,cuMemHostAlloc=2");
    std::string text;
    {
        const auto registered = transport.register_memory(device.data(), device.size());
        if (registered) {
            auto own = ourselves(transport);
            host.fill(0, MiB, 1, 0);
            const auto [status, why] = told(transport, own.write(host.data(), device.address(), MiB));
            if (status == MEFA_STATUS_COMPLETED) {
                EXPECT_TRUE(device.is(0, MiB, 1, 0));
            } else {
                text = why;
            }
        } else {
            text = registered.error().text;
        }
    }
    if (!text.empty()) {
        EXPECT_NE(text.find("CUDA_ERROR_OUT_OF_MEMORY"), std::string::npos) << text;
    }
    driver->fake_fail(nullptr);
    const auto registered = add(transport, device);
    auto own = ourselves(transport);
    host.fill(0, MiB, 2, 0);
    ASSERT_EQ(run(transport, own.write(host.data(), device.address(), MiB)), MEFA_STATUS_COMPLETED) << "it was for this time only";
    EXPECT_TRUE(device.is(0, MiB, 2, 0));
}

TEST_P(Refusing, Contexts) {
    auto transport = install();
    const Buffer ours("device:0", MiB);
    driver->fake_fail("cuDevicePrimaryCtxRetain=2");
    const auto registered = transport.register_memory(ours.data(), ours.size());
    driver->fake_fail(nullptr);
    ASSERT_FALSE(registered) << "it needs a context for it";
    EXPECT_NE(registered.error().text.find("CUDA_ERROR_OUT_OF_MEMORY"), std::string::npos) << registered.error().text;
    const auto again = add(transport, ours);
}

} // namespace

int main(int count, char **arguments) {
    if (count >= 4 && std::string(arguments[1]) == "--peer") return serve(count, arguments);
    testing::InitGoogleTest(&count, arguments);
    if (testing::GTEST_FLAG(list_tests)) return RUN_ALL_TESTS();
    std::string why;
    if (const Driver *driver = Driver::get(&why)) {
        for (int device = 0; device < driver->devices(); ++device) {
            char name[128] = "", bus[32] = "";
            driver->ok(driver->cuDeviceGetName(name, sizeof name, device));
            driver->ok(driver->cuDeviceGetPCIBusId(bus, sizeof bus, device));
            std::cout << "GPU " << device << ": " << name << ", " << bus << std::endl;
        }
        return RUN_ALL_TESTS();
    }
    const char *required = std::getenv("MEFA_REQUIRE_GPU");
    const bool must_run = required && std::string(required) == "1";
    std::cerr << (must_run ? "FAILED" : "SKIPPED") << ": no test of GPU memory was run: " << why << std::endl;
    return must_run ? 1 : 0;
}
