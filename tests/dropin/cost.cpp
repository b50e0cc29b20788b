// SPDX-License-Identifier: Apache-2.0
//
// What the adapter adds to a request: Mooncake's submitTransferTask against mefa_submit, on requests of no
// length, which end at once on either way. Prints nanoseconds a request, median (least-greatest) of nine.
// Built by Mooncake's build with the drop-in (pair.cmake); needs an EFA device, or an emulated one.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "mooncake_efa.h"
#include "transfer_engine.h"
#include "transport/transport.h"

using namespace mooncake;

namespace {

constexpr int kRequests = 128, kSubmissions = 2000, kRounds = 9;
uint8_t memory[1 << 20];
const uint64_t near = reinterpret_cast<uint64_t>(memory), far = near + sizeof memory / 2;

void must(bool good, const char *what) {
    if (good) return;
    std::fprintf(stderr, "%s: %s\n", what, mefa_last_error());
    std::exit(1);
}

template <class F> double nanoseconds(F f) {
    const auto start = std::chrono::steady_clock::now();
    f();
    return std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count();
}

void print(const char *what, std::vector<double> &rounds) {
    std::sort(rounds.begin(), rounds.end());
    std::printf("%-20s %.1f ns a request (%.1f-%.1f)\n", what, rounds[kRounds / 2], rounds.front(), rounds.back());
}

} // namespace

int main() {
    TransferEngine engine(false);
    engine.getLocalTopology()->discover({});
    must(engine.init("P2PHANDSHAKE", "127.0.0.1:12345", "127.0.0.1", 12345) == 0, "init");
    Transport *transport = engine.installTransport("efa", nullptr);
    must(transport != nullptr, "installTransport");
    must(engine.registerLocalMemory(memory, sizeof memory, "cpu:0") == 0, "registerLocalMemory");
    const auto segment = engine.openSegment(engine.getLocalIpAndPort());

    mefa_config config = {};
    config.size = sizeof config;
    config.server_name = "here:1";
    config.on_completion = [](void *, const mefa_completion *, size_t) {};
    mefa_transport plain = 0;
    mefa_segment itself = 0;
    must(mefa_install(&config, &plain) == 0, "mefa_install");
    must(mefa_register(plain, memory, sizeof memory, "cpu:0", nullptr, nullptr) == 0, "mefa_register");
    std::string json;
    const auto keep = [](void *to, const char *text, size_t length) {
        static_cast<std::string *>(to)->assign(text, length);
    };
    must(mefa_descriptor_json(plain, keep, &json) == 0, "mefa_descriptor_json");
    must(mefa_segment_open_json(plain, json.c_str(), &itself) == 0, "mefa_segment_open_json");

    std::vector<double> adapter, direct;
    for (int round = 0; round < kRounds; ++round) {
        double by_adapter = 0, by_itself = 0;
        for (int submission = 0; submission < kSubmissions; ++submission) {
            std::vector<Transport::TransferRequest> requests(kRequests);
            std::vector<Transport::TransferTask> tasks(kRequests);
            std::vector<Transport::TransferTask *> list;
            for (int i = 0; i < kRequests; ++i) {
                requests[i].opcode = Transport::TransferRequest::WRITE;
                requests[i].source = memory + 64 * i;
                requests[i].target_id = segment;
                requests[i].target_offset = far + 64 * i;
                requests[i].length = 0;
                tasks[i].request = &requests[i];
                list.push_back(&tasks[i]);
            }
            by_adapter += nanoseconds([&] { must(transport->submitTransferTask(list).ok(), "submitTransferTask"); });
            for (const auto &task : tasks) must(task.success_slice_count == 1, "a task did not end");
            std::vector<mefa_request> plain_requests(kRequests);
            by_itself += nanoseconds([&] {
                for (uint64_t i = 0; i < kRequests; ++i)
                    plain_requests[i] = {MEFA_WRITE, 0, near + 64 * i, itself, far + 64 * i, 0, i};
                must(mefa_submit(plain, 0, plain_requests.data(), kRequests, 0) == 0, "mefa_submit");
            });
        }
        adapter.push_back(by_adapter / kSubmissions / kRequests);
        direct.push_back(by_itself / kSubmissions / kRequests);
    }
    print("submitTransferTask", adapter);
    print("mefa_submit", direct);
    mefa_uninstall(plain);
}
