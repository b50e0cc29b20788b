// Mooncake's C interface from C++: an engine that ends with its scope, errors as exceptions.
// c++ transfer_engine.cpp -ltransfer_engine && ./a.out [PROTOCOL]
// SPDX-License-Identifier: Apache-2.0
#include <transfer_engine_c.h>

#include <algorithm>
#include <cstdint>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

static void check(bool done, const char *what) {
    if (!done) throw std::runtime_error(std::string(what) + " failed; the log says why");
}

struct End {
    using pointer = transfer_engine_t;
    void operator()(transfer_engine_t engine) const { destroyTransferEngine(engine); }
};
using Engine = std::unique_ptr<void, End>;

static Engine make_engine(const std::string &protocol, std::vector<char> &memory) {
    Engine engine(createTransferEngine("P2PHANDSHAKE", "127.0.0.1", "", 0, 0));
    check(engine != nullptr, "createTransferEngine");
    if (protocol == "efa") check(discoverTopology(engine.get()) == 0, "discoverTopology");
    check(installTransport(engine.get(), protocol.c_str(), nullptr) != nullptr, "installTransport");
    check(registerLocalMemory(engine.get(), memory.data(), memory.size(), "*", 1) == 0, "registerLocalMemory");
    return engine;
}

int main(int argc, char **argv) try {
    const std::string protocol = argc > 1 ? argv[1] : "efa";
    std::vector<char> ours(1 << 20, 'x'), theirs(1 << 20);
    const Engine near = make_engine(protocol, ours), far = make_engine(protocol, theirs);

    std::string name(256, '\0');
    check(getLocalIpAndPort(far.get(), name.data(), name.size()) == 0, "getLocalIpAndPort");
    const segment_id_t segment = openSegment(near.get(), name.c_str());
    check(segment >= 0, "openSegment");
    const batch_id_t batch = allocateBatchID(near.get(), 1);
    transfer_request_t request{OPCODE_WRITE, ours.data(), segment, reinterpret_cast<std::uintptr_t>(theirs.data()),
                               ours.size()};
    check(submitTransfer(near.get(), batch, &request, 1) == 0, "submitTransfer");
    transfer_status_t status{STATUS_WAITING, 0};
    while (status.status == STATUS_WAITING)
        check(getTransferStatus(near.get(), batch, 0, &status) == 0, "getTransferStatus");
    check(freeBatchID(near.get(), batch) == 0, "freeBatchID");
    check(status.status == STATUS_COMPLETED && ours == theirs, "the transfer");
    std::cout << status.transferred_bytes << " bytes moved and verified\n";
    return 0;
} catch (const std::exception &error) {
    std::cerr << error.what() << '\n';
    return 1;
}
