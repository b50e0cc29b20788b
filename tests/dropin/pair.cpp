// SPDX-License-Identifier: Apache-2.0
//
// Two processes of Mooncake's TransferEngine move memory and look at every byte: built by Mooncake's build
// (pair.cmake), with this transport in it or with the C++ one. tests/dropin/pairs starts them.
//   pair target              prints its segment's name; answers lines on standard input:
//                              check SEED   whether its second buffer holds that seed's bytes
//   pair initiator NAME MS   reads the target's first buffer, which holds seed 1, and writes the second one;
//                            it waits so many milliseconds from a write to reading it back
// Each prints "ok WHAT" or "bad WHAT" a line, and exits with 1 after a bad one.

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "transfer_engine.h"
#include "transport/transport.h"

using namespace mooncake;

namespace {

constexpr size_t kBuffer = size_t(48) << 20;
// Odd, so that both ends of a transfer lie at odd places.
constexpr size_t kShift = 5;
int bad = 0;

uint8_t byte_of(uint64_t seed, size_t at) {
    const uint64_t mixed = (seed * 0x9e3779b97f4a7c15ull) ^ ((at + 1) * 0xff51afd7ed558ccdull);
    return uint8_t(mixed >> 40);
}

void fill(uint8_t *memory, size_t length, uint64_t seed, size_t at = 0) {
    for (size_t i = 0; i < length; ++i) memory[i] = byte_of(seed, at + i);
}

void tell(bool good, const std::string &what) {
    if (!good) bad = 1;
    std::cout << (good ? "ok " : "bad ") << what << std::endl;
}

bool holds(const uint8_t *memory, size_t length, uint64_t seed, size_t at = 0) {
    for (size_t i = 0; i < length; ++i) {
        if (memory[i] == byte_of(seed, at + i)) continue;
        std::cout << "# byte " << at + i << " of " << at + length << " is " << int(memory[i]) << ", not "
                  << int(byte_of(seed, at + i)) << std::endl;
        return false;
    }
    return true;
}

struct Peer {
    TransferEngine engine{false};
    std::vector<uint8_t> first = std::vector<uint8_t>(kBuffer), second = std::vector<uint8_t>(kBuffer);

    Peer() {
        engine.getLocalTopology()->discover({});
        if (engine.init("P2PHANDSHAKE", "127.0.0.1:12345", "127.0.0.1", 12345) != 0) exit(2);
        if (engine.installTransport("efa", nullptr) == nullptr) exit(2);
        for (auto *buffer : {&first, &second})
            if (engine.registerLocalMemory(buffer->data(), kBuffer, "cpu:0") != 0) exit(2);
    }
    ~Peer() {
        for (auto *buffer : {&first, &second}) engine.unregisterLocalMemory(buffer->data());
    }

    // All requests in one batch.
    bool move(const std::vector<TransferRequest> &requests) {
        const auto batch = engine.allocateBatchID(requests.size());
        if (const Status s = engine.submitTransfer(batch, requests); !s.ok()) {
            std::cout << "# submit: " << s.ToString() << std::endl;
            return false;
        }
#ifdef USE_EVENT_DRIVEN_COMPLETION
        // As Mooncake's store does: asleep until the last one wakes it.
        auto &desc = Transport::toBatchDesc(batch);
        std::unique_lock<std::mutex> lock(desc.completion_mutex);
        if (!desc.completion_cv.wait_for(lock, std::chrono::seconds(30), [&] { return desc.is_finished.load(); })) {
            std::cout << "# no wake-up" << std::endl;
            return false;
        }
        lock.unlock();
#endif
        bool good = true;
        for (size_t i = 0; i < requests.size(); ++i) {
            TransferStatus status;
            do {
                if (!engine.getTransferStatus(batch, i, status).ok()) return false;
            } while (status.s == TransferStatusEnum::WAITING || status.s == TransferStatusEnum::PENDING);
            // The C++ transport's bytes may be those of a moment before.
            if (!engine.getTransferStatus(batch, i, status).ok()) return false;
            good = good && status.s == TransferStatusEnum::COMPLETED &&
                   status.transferred_bytes == requests[i].length;
        }
        return engine.freeBatchID(batch).ok() && good;
    }
};

int target() {
    Peer peer;
    fill(peer.first.data(), kBuffer, 1);
    std::cout << "name " << peer.engine.getLocalIpAndPort() << std::endl;
    for (std::string word; std::cin >> word;) {
        uint64_t seed;
        if (word != "check" || !(std::cin >> seed)) return 2;
        tell(holds(peer.second.data() + kShift, kBuffer - kShift, seed, kShift),
             "target holds what was written");
    }
    return bad;
}

int initiator(const std::string &name, int patience) {
    Peer peer;
    const auto id = peer.engine.openSegment(name);
    const auto desc = peer.engine.getMetadata()->getSegmentDescByID(id);
    if (id == SegmentID(-1) || !desc || desc->buffers.size() < 2) return 2;
    // Registrations may be split: the second buffer's parts are the last half.
    const uint64_t theirs[] = {desc->buffers.front().addr, desc->buffers[desc->buffers.size() / 2].addr};
    uint8_t *ours[] = {peer.first.data(), peer.second.data()};

    for (const size_t size : {size_t(1), size_t(17), size_t(4095), size_t(65536), size_t(1048579), size_t(0)}) {
        std::memset(ours[0], 0, size + 64);
        const bool moved = peer.move({{TransferRequest::READ, ours[0] + 3, id, theirs[0] + kShift, size}});
        tell(moved && holds(ours[0] + 3, size, 1, kShift) && ours[0][3 + size] == 0 && ours[0][2] == 0,
             "read of " + std::to_string(size));
    }
    for (const size_t size : {size_t(1), size_t(4095), size_t(1048579)}) {
        fill(ours[1], size, size);
        const bool written = peer.move({{TransferRequest::WRITE, ours[1], id, theirs[1] + kShift, size}});
        // The C++ transport's writes may arrive a little after they are complete.
        std::this_thread::sleep_for(std::chrono::milliseconds(patience));
        const bool back = peer.move({{TransferRequest::READ, ours[0], id, theirs[1] + kShift, size}});
        tell(written && back && holds(ours[0], size, size), "write of " + std::to_string(size) + ", read back");
    }

    // A submission that is refused leaves nothing behind. (The C++ transport's batch cannot be freed then.)
    std::vector<uint8_t> stranger(64);
    const auto refused = peer.engine.allocateBatchID(2);
    const Status said = peer.engine.submitTransfer(
        refused, {{TransferRequest::READ, ours[0], id, theirs[0], 64},
                  {TransferRequest::READ, stranger.data(), id, theirs[0], 64}});
    std::cout << "# refused: " << said.ToString() << "; batch freed: " << peer.engine.freeBatchID(refused).ok()
              << std::endl;
    tell(!said.ok(), "memory that is not registered");

    // Everything, in pieces of all sizes, by four threads.
    for (const auto opcode : {TransferRequest::READ, TransferRequest::WRITE}) {
        const bool read = opcode == TransferRequest::READ;
        uint8_t *memory = ours[read ? 0 : 1];
        if (read) std::memset(memory, 0, kBuffer);
        else fill(memory, kBuffer, 7);
        std::vector<std::vector<TransferRequest>> batches(64);
        const size_t sizes[] = {1, 65536, 4097, 300001, 17, 1u << 20, 8192};
        size_t at = kShift;
        for (size_t i = 0; at < kBuffer; ++i) {
            const size_t size = std::min(sizes[i % 7], kBuffer - at);
            batches[i % 64].push_back({opcode, memory + at, id, theirs[read ? 0 : 1] + at, size});
            at += size;
        }
        std::vector<std::thread> threads;
        bool good[4] = {true, true, true, true};
        for (size_t t = 0; t < 4; ++t)
            threads.emplace_back([&, t] {
                for (size_t i = t; i < 64; i += 4) good[t] = peer.move(batches[i]) && good[t];
            });
        for (auto &thread : threads) thread.join();
        const bool all = good[0] && good[1] && good[2] && good[3];
        if (read) tell(all && holds(memory + kShift, kBuffer - kShift, 1, kShift), "read of all, four threads");
        else tell(all, "write of all, four threads");
    }
    return bad;
}

} // namespace

int main(int argc, char **argv) {
    google::InitGoogleLogging(argv[0]);
    FLAGS_logtostderr = true;
    if (argc == 2 && !std::strcmp(argv[1], "target")) return target();
    if (argc == 4 && !std::strcmp(argv[1], "initiator")) return initiator(argv[2], std::atoi(argv[3]));
    std::cerr << "usage: pair target | pair initiator NAME MS\n";
    return 2;
}
