// SPDX-License-Identifier: Apache-2.0
//
// Transfers through Mooncake's C interface, between two processes, every byte checked.
#include "te.h"

#include <algorithm>
#include <atomic>
#include <iostream>
#include <thread>

using namespace te;

namespace {

class Transfers : public Over {};
OVER(Transfers, "tcp", "shm", "efa");

TEST_P(Transfers, WritesAndReads) {
    Linked linked(provider(), 8 * MiB);
    auto &[peer, memory, engine, segment] = linked;
    std::uint64_t seed = 2;
    for (const std::size_t length : {std::size_t(1), std::size_t(7), 4 * KiB, 64 * KiB + 1, MiB, 8 * MiB}) {
        SCOPED_TRACE(length);
        const std::size_t ours = (8 * MiB - length) / 3, theirs = (8 * MiB - length) / 2;
        pattern_fill(memory.data() + ours, length, ++seed, 0);
        ASSERT_EQ(engine.run(OPCODE_WRITE, memory.data() + ours, segment, peer.base() + theirs, length), STATUS_COMPLETED);
        EXPECT_TRUE(peer.has(theirs, length, seed));
        std::memset(memory.data(), 0, memory.size());
        ASSERT_EQ(engine.run(OPCODE_READ, memory.data() + ours, segment, peer.base() + theirs, length), STATUS_COMPLETED);
        EXPECT_EQ(pattern_differs(memory.data() + ours, length, seed, 0), length);
        for (const std::size_t around : {ours - 1, ours + length})
            if (around < memory.size()) {
                EXPECT_EQ(memory.data()[around], 0) << around;
            }
    }
}

TEST_P(Transfers, Batch) {
    constexpr std::size_t COUNT = 128, LENGTH = 3 * KiB, STEP = 4 * KiB;
    Linked linked(provider(), COUNT * STEP);
    auto &[peer, memory, engine, segment] = linked;
    const batch_id_t batch = allocateBatchID(engine, COUNT);
    ASSERT_NE(batch, INVALID_BATCH);
    // In two parts; one with a transfer of nothing.
    std::vector<transfer_request_t> requests;
    for (std::size_t i = 0; i < COUNT; ++i) {
        pattern_fill(memory.data() + i * STEP, LENGTH, 2 + i, 0);
        requests.push_back({OPCODE_WRITE, memory.data() + i * STEP, segment, peer.base() + (COUNT - 1 - i) * STEP,
                            i == 5 ? 0 : LENGTH});
    }
    ASSERT_EQ(submitTransfer(engine, batch, requests.data(), 100), 0);
    EXPECT_EQ(submitTransfer(engine, batch, requests.data(), 29), 2) << "more than its size";
    ASSERT_EQ(submitTransfer(engine, batch, requests.data() + 100, 28), 0);
    for (std::size_t i = 0; i < COUNT; ++i) {
        ASSERT_EQ(engine.wait(batch, i), STATUS_COMPLETED) << i;
        transfer_status_t status;
        ASSERT_EQ(getTransferStatus(engine, batch, i, &status), 0);
        EXPECT_EQ(status.transferred_bytes, i == 5 ? 0 : LENGTH);
    }
    EXPECT_EQ(freeBatchID(engine, batch), 0);
    for (std::size_t i = 0; i < COUNT; ++i)
        if (i != 5) {
            EXPECT_TRUE(peer.has((COUNT - 1 - i) * STEP, LENGTH, 2 + i)) << i;
        }
}

// Handle 0 is our own memory, and what of it is registered now.
TEST_P(Transfers, ToOurselves) {
    Memory memory(2 * MiB), later(MiB);
    Engine engine;
    ASSERT_TRUE(engine.install(provider()));
    ASSERT_EQ(registerLocalMemory(engine, memory.data(), memory.size(), "*", 1), 0);
    EXPECT_EQ(openSegment(engine, engine.name().c_str()), LOCAL_SEGMENT);
    pattern_fill(memory.data(), MiB, 2, 0);
    ASSERT_EQ(engine.run(OPCODE_WRITE, memory.data(), LOCAL_SEGMENT, memory.at(MiB), MiB), STATUS_COMPLETED);
    EXPECT_EQ(pattern_differs(memory.data() + MiB, MiB, 2, 0), MiB);
    EXPECT_NE(engine.run(OPCODE_WRITE, memory.data(), LOCAL_SEGMENT, later.at(0), MiB), STATUS_COMPLETED);
    ASSERT_EQ(registerLocalMemory(engine, later.data(), later.size(), "*", 1), 0);
    ASSERT_EQ(engine.run(OPCODE_WRITE, memory.data(), LOCAL_SEGMENT, later.at(0), MiB), STATUS_COMPLETED);
    EXPECT_EQ(pattern_differs(later.data(), MiB, 2, 0), MiB);
    ASSERT_EQ(unregisterLocalMemory(engine, later.data()), 0);
    EXPECT_NE(engine.run(OPCODE_WRITE, memory.data(), LOCAL_SEGMENT, later.at(0), MiB), STATUS_COMPLETED);
}

// The same memory that was registered before there was a transport, and several at once.
TEST_P(Transfers, MemoryRegisteredBeforeTheTransport) {
    Peer peer(provider(), MiB);
    Memory first(MiB), second(MiB);
    Engine engine;
    buffer_entry_t entries[] = {{first.data(), MiB}, {second.data(), MiB}};
    ASSERT_EQ(registerLocalMemoryBatch(engine, entries, 2, "cpu:0"), 0);
    EXPECT_EQ(registerLocalMemory(engine, first.data() + 5, 1, "cpu:0", 1), -7) << "it is registered";
    ASSERT_TRUE(engine.install(provider()));
    EXPECT_EQ(registerLocalMemory(engine, first.data() + 5, 1, "cpu:0", 1), -7);
    const segment_id_t segment = openSegment(engine, peer.name().c_str());
    for (Memory *memory : {&first, &second}) {
        ASSERT_EQ(engine.run(OPCODE_READ, memory->data(), segment, peer.base(), MiB), STATUS_COMPLETED);
        EXPECT_EQ(pattern_differs(memory->data(), MiB, 1, 0), MiB);
    }
    void *both[] = {first.data(), second.data()};
    EXPECT_EQ(unregisterLocalMemoryBatch(engine, both, 2), 0);
    EXPECT_EQ(unregisterLocalMemoryBatch(engine, both, 2), -3) << "they are not registered any more";
    EXPECT_EQ(engine.run(OPCODE_READ, first.data(), segment, peer.base(), MiB), -1);
}

TEST_P(Transfers, MemoryThatThePeerRegistersLater) {
    Linked linked(provider(), MiB);
    auto &[peer, memory, engine, segment] = linked;
    ASSERT_EQ(engine.run(OPCODE_READ, memory.data(), segment, peer.base(), MiB), STATUS_COMPLETED);
    const std::uint64_t later = peer.grow(MiB);
    std::memset(memory.data(), 0, MiB);
    ASSERT_EQ(engine.run(OPCODE_READ, memory.data(), segment, later, MiB), STATUS_COMPLETED);
    EXPECT_EQ(pattern_differs(memory.data(), MiB, 1, 0), MiB);
    EXPECT_EQ(openSegmentNoCache(engine, peer.name().c_str()), segment);
    EXPECT_EQ(syncSegmentCache(engine), 0);
}

TEST_P(Transfers, Notifications) {
    Linked linked(provider(), MiB);
    auto &[peer, memory, engine, segment] = linked;
    char us[] = "us", first[] = "first \"quoted\" \xc3\xa4", done[] = "done";
    ASSERT_EQ(genNotifyInEngine(engine, segment, {us, first}), 0);
    EXPECT_EQ(peer.notifications(), "us=first \"quoted\" \xc3\xa4;");

    const batch_id_t batch = allocateBatchID(engine, 2);
    transfer_request_t requests[] = {{OPCODE_WRITE, memory.data(), segment, peer.base(), KiB},
                                     {OPCODE_WRITE, memory.data() + KiB, segment, peer.base() + MiB - KiB, KiB}};
    EXPECT_EQ(submitTransferWithNotify(engine, batch, requests, 0, {us, done}), 1) << "of nothing";
    ASSERT_EQ(submitTransferWithNotify(engine, batch, requests, 2, {us, done}), 0);
    ASSERT_EQ(engine.wait(batch, 1), STATUS_COMPLETED);
    ASSERT_EQ(engine.wait(batch, 0), STATUS_COMPLETED);
    ASSERT_EQ(engine.wait(batch, 1), STATUS_COMPLETED); // sent by now, and once
    EXPECT_EQ(peer.notifications(), "us=done;");
    ASSERT_EQ(freeBatchID(engine, batch), 0);

    // To ourselves, and in order.
    for (char text[] = "0"; text[0] <= '9'; ++text[0]) ASSERT_EQ(genNotifyInEngine(engine, 0, {us, text}), 0);
    int count = -1;
    notify_msg_t *messages = getNotifsFromEngine(engine, &count);
    ASSERT_EQ(count, 10);
    for (int i = 0; i < count; ++i) {
        EXPECT_STREQ(messages[i].name, "us");
        EXPECT_STREQ(messages[i].msg, std::to_string(i).c_str());
    }
    EXPECT_EQ(freeNotifsMsgBuf(messages, count), 0);
    EXPECT_EQ(getNotifsFromEngine(engine, &count), nullptr);
    EXPECT_EQ(count, 0);
}

TEST_P(Transfers, SegmentsOpenAndClose) {
    Peer peer(provider(), MiB);
    Memory memory(MiB);
    Engine engine;
    ASSERT_TRUE(engine.install(provider()));
    ASSERT_EQ(registerLocalMemory(engine, memory.data(), MiB, "*", 1), 0);
    const auto reads = [&](segment_id_t segment) {
        return engine.run(OPCODE_READ, memory.data(), segment, peer.base(), MiB);
    };
    EXPECT_EQ(warmupEfaSegment(engine, peer.name().c_str()), 0);
    const segment_id_t segment = openSegment(engine, ("/" + peer.name()).c_str());
    ASSERT_GT(segment, 0);
    EXPECT_EQ(openSegment(engine, peer.name().c_str()), segment);
    EXPECT_EQ(reads(segment), STATUS_COMPLETED);
    EXPECT_EQ(removeLocalSegment(engine, peer.name().c_str()), 0);
    EXPECT_EQ(reads(segment), -1) << "it is forgotten";
    EXPECT_EQ(openSegment(engine, peer.name().c_str()), segment);
    EXPECT_EQ(openSegment(engine, peer.name().c_str()), segment);
    EXPECT_EQ(closeSegment(engine, segment), 0);
    EXPECT_EQ(reads(segment), STATUS_COMPLETED) << "it is open still";
    EXPECT_EQ(closeSegment(engine, segment), 0);
    EXPECT_EQ(reads(segment), -1);
    EXPECT_EQ(closeSegment(engine, segment), -1) << "it is closed";
    EXPECT_EQ(openSegment(engine, peer.name().c_str()), segment);
    EXPECT_EQ(reads(segment), STATUS_COMPLETED);
    EXPECT_EQ(openSegment(engine, "127.0.0.1:1"), -1) << "nobody is there";
}

TEST_P(Transfers, TransportGoesAndComes) {
    Peer peer(provider(), MiB);
    Memory memory(MiB);
    Engine engine;
    ASSERT_TRUE(engine.install(provider()));
    EXPECT_TRUE(engine.install(provider())) << "it is installed already";
    ASSERT_EQ(registerLocalMemory(engine, memory.data(), MiB, "*", 1), 0);
    const segment_id_t segment = openSegment(engine, peer.name().c_str());
    ASSERT_EQ(engine.run(OPCODE_READ, memory.data(), segment, peer.base(), MiB), STATUS_COMPLETED);
    const batch_id_t old = allocateBatchID(engine, 1);
    EXPECT_EQ(uninstallTransport(engine, "rdma"), 0) << "it never was installed";
    ASSERT_EQ(uninstallTransport(engine, provider() == "tcp" ? "tcp" : "efa"), 0);
    EXPECT_EQ(engine.run(OPCODE_READ, memory.data(), segment, peer.base(), MiB), -1);
    EXPECT_EQ(allocateBatchID(engine, 1), INVALID_BATCH);
    ASSERT_TRUE(engine.install(provider()));
    EXPECT_EQ(freeBatchID(engine, old), 1) << "a batch of the former transport";
    std::memset(memory.data(), 0, MiB);
    ASSERT_EQ(engine.run(OPCODE_READ, memory.data(), segment, peer.base(), MiB), STATUS_COMPLETED);
    EXPECT_EQ(pattern_differs(memory.data(), MiB, 1, 0), MiB);
}

TEST_P(Transfers, LoadAndLinks) {
    Linked linked(provider(), MiB);
    auto &[peer, memory, engine, segment] = linked;
    std::vector<nic_load_stat_t> loads(64);
    std::size_t count = 0;
    ASSERT_EQ(getNicLoadStats(engine, loads.data(), &count), 0);
    const std::size_t nics = count;
    ASSERT_GT(nics, 0u);
    // So much that it takes a while.
    double bandwidth = 0;
    for (int round = 0; round < 20; ++round) {
        ASSERT_EQ(engine.run(OPCODE_READ, memory.data(), segment, peer.base(), MiB), STATUS_COMPLETED);
        count = loads.size();
        ASSERT_EQ(getNicLoadStats(engine, loads.data(), &count), 0);
        ASSERT_EQ(count, nics);
        for (std::size_t nic = 0; nic < nics; ++nic) bandwidth += loads[nic].ewma_bandwidth_bps;
    }
    EXPECT_GT(bandwidth, 0);
    EXPECT_GT(std::strlen(loads[0].device_name), 0u);
    std::string links(65536, '\0');
    for (const int json : {0, 1}) {
        ASSERT_EQ(showLinks(engine, links.data(), links.size(), json), 0);
        for (std::size_t nic = 0; nic < nics; ++nic) EXPECT_NE(links.find(loads[nic].device_name), std::string::npos);
    }
    char little[8] = "xxxxxxx";
    EXPECT_EQ(getLocalIpAndPort(engine, little, 5), 0);
    EXPECT_EQ(engine.name().substr(0, 4), little);
    EXPECT_STREQ(little + 5, "xx");
}

// Eight threads with one engine, and with the same segment and memory.
TEST_P(Transfers, ManyThreads) {
    constexpr std::size_t THREADS = 8, LENGTH = 256 * KiB;
    Peer peer(provider(), THREADS * LENGTH);
    Memory memory(THREADS * LENGTH);
    Engine engine;
    ASSERT_TRUE(engine.install(provider()));
    ASSERT_EQ(registerLocalMemory(engine, memory.data(), memory.size(), "*", 1), 0);
    std::atomic<int> wrong{0};
    std::vector<std::thread> threads;
    for (std::size_t thread = 0; thread < THREADS; ++thread)
        threads.emplace_back([&, thread] {
            Memory own(LENGTH);
            for (int round = 0; round < 20; ++round) {
                const segment_id_t segment = openSegment(engine, peer.name().c_str());
                wrong += registerLocalMemory(engine, own.data(), LENGTH, "*", 1) != 0;
                unsigned char *ours = memory.data() + thread * LENGTH;
                const std::uint64_t theirs = peer.base() + thread * LENGTH;
                pattern_fill(ours, LENGTH, 100 * thread + round + 2, 0);
                wrong += engine.run(OPCODE_WRITE, ours, segment, theirs, LENGTH) != STATUS_COMPLETED;
                wrong += engine.run(OPCODE_READ, own.data(), segment, theirs, LENGTH) != STATUS_COMPLETED;
                wrong += pattern_differs(own.data(), LENGTH, 100 * thread + round + 2, 0) != LENGTH;
                wrong += unregisterLocalMemory(engine, own.data()) != 0;
                wrong += closeSegment(engine, segment) != 0;
            }
        });
    for (std::thread &thread : threads) thread.join();
    EXPECT_EQ(wrong, 0);
}

// An engine that others use is destroyed: they get errors, and nobody crashes.
TEST_P(Transfers, DestroyedWhileInUse) {
    Peer peer(provider(), MiB);
    for (int round = 0; round < 3; ++round) {
        Memory memory(4 * MiB);
        Engine engine;
        ASSERT_TRUE(engine.install(provider()));
        ASSERT_EQ(registerLocalMemory(engine, memory.data(), memory.size(), "*", 1), 0);
        const segment_id_t segment = openSegment(engine, peer.name().c_str());
        const transfer_engine_t raw = engine;
        std::atomic<int> done{0}, refused{0};
        std::vector<std::thread> threads;
        for (int thread = 0; thread < 4; ++thread)
            threads.emplace_back([&, thread] {
                for (;;) {
                    const batch_id_t batch = allocateBatchID(raw, 1);
                    if (batch == INVALID_BATCH) break;
                    transfer_request_t request{OPCODE_READ, memory.data() + thread * MiB, segment, peer.base(), MiB};
                    transfer_status_t status{STATUS_WAITING, 0};
                    if (submitTransfer(raw, batch, &request, 1) != 0) break;
                    while (getTransferStatus(raw, batch, 0, &status) == 0 && status.status == STATUS_WAITING) {}
                    if (status.status == STATUS_COMPLETED) ++done;
                    freeBatchID(raw, batch);
                }
                ++refused;
            });
        ASSERT_TRUE(eventually([&] { return done > 4; }));
        engine.end();
        for (std::thread &thread : threads) thread.join();
        EXPECT_EQ(refused, 4);
        EXPECT_EQ(registerLocalMemory(raw, memory.data(), MiB, "*", 1), -1);
    }
}

// A peer that does not answer. (A device does without the peer's processor.)
TEST_P(Transfers, TimeOut) {
    if (provider() != "tcp") return;
    setenv("MC_SLICE_TIMEOUT", "1", 1);
    Peer peer(provider(), MiB);
    Memory memory(MiB);
    Engine engine;
    unsetenv("MC_SLICE_TIMEOUT");
    ASSERT_TRUE(engine.install(provider()));
    ASSERT_EQ(registerLocalMemory(engine, memory.data(), memory.size(), "*", 1), 0);
    const segment_id_t segment = openSegment(engine, peer.name().c_str());
    ASSERT_EQ(engine.run(OPCODE_READ, memory.data(), segment, peer.base(), MiB), STATUS_COMPLETED);
    peer.stop();
    const batch_id_t batch = allocateBatchID(engine, 1);
    transfer_request_t request{OPCODE_READ, memory.data(), segment, peer.base(), MiB};
    ASSERT_EQ(submitTransfer(engine, batch, &request, 1), 0);
    EXPECT_EQ(freeBatchID(engine, batch), 4) << "it is under way";
    EXPECT_EQ(engine.wait(batch, 0), STATUS_TIMEOUT);
    EXPECT_EQ(freeBatchID(engine, batch), 0);
    peer.go_on();
    EXPECT_EQ(unregisterLocalMemory(engine, memory.data()), 0) << "it waits for the memory";
}

// EFA where there is EFA, and TCP elsewhere.
TEST_P(Transfers, AutoDiscover) {
    if (provider() == "shm") return; // as efa, for this
    Memory memory(2 * MiB);
    Engine engine("P2PHANDSHAKE", HOST, 1);
    ASSERT_TRUE(engine);
    ASSERT_EQ(registerLocalMemory(engine, memory.data(), memory.size(), "*", 1), 0);
    pattern_fill(memory.data(), MiB, 2, 0);
    ASSERT_EQ(engine.run(OPCODE_WRITE, memory.data(), LOCAL_SEGMENT, memory.at(MiB), MiB), STATUS_COMPLETED);
    EXPECT_EQ(pattern_differs(memory.data() + MiB, MiB, 2, 0), MiB);
    const bool efa = provider() == "efa";
    EXPECT_NE(installTransport(engine, efa ? "efa" : "tcp", nullptr), nullptr) << "it is installed";
    EXPECT_EQ(installTransport(engine, efa ? "tcp" : "efa", nullptr), nullptr) << "an engine has one";
    setenv("MC_FORCE_TCP", "1", 1);
    Engine forced("P2PHANDSHAKE", HOST, 1), asked("P2PHANDSHAKE", HOST, 0);
    unsetenv("MC_FORCE_TCP");
    EXPECT_NE(installTransport(forced, "tcp", nullptr), nullptr);
    EXPECT_EQ(installTransport(asked, "efa", nullptr), nullptr);
}

// What a program waits for at its start.
TEST_P(Transfers, FromNothingToTheFirst) {
    Peer peer(provider(), MiB);
    Memory memory(MiB);
    std::vector<double> took;
    for (int round = 0; round < 5; ++round) {
        std::memset(memory.data(), 0, MiB);
        const auto start = std::chrono::steady_clock::now();
        Engine engine;
        ASSERT_TRUE(engine.install(provider()));
        ASSERT_EQ(registerLocalMemory(engine, memory.data(), MiB, "*", 1), 0);
        const segment_id_t segment = openSegment(engine, peer.name().c_str());
        ASSERT_EQ(engine.run(OPCODE_READ, memory.data(), segment, peer.base(), MiB), STATUS_COMPLETED);
        ASSERT_EQ(pattern_differs(memory.data(), MiB, 1, 0), MiB);
        took.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
    }
    std::sort(took.begin(), took.end());
    std::cout << "engine to first verified transfer over " << provider() << ": " << took[2] << " ms (" << took.front()
              << " to " << took.back() << ")\n";
}

} // namespace

TE_MAIN
