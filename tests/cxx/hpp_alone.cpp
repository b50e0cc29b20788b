// SPDX-License-Identifier: Apache-2.0
//
// mooncake_efa.hpp compiled before anything else, with every function of it instantiated.
#include <mooncake_efa.hpp>
#include <mooncake_efa.hpp>

using namespace mooncake_efa;

Result<> everything(Config config, mefa_segment_desc *desc, void *memory);

Result<> everything(Config config, mefa_segment_desc *desc, void *memory) {
    config.provider("tcp").topology("{}").device("eth0");
    config.on_completion([](const mefa_completion *, std::size_t) {});
    config.fetch_segment([](const char *name) { return std::optional<std::string>(name); });
    config.handshake([](const char *, const char *) { return std::nullopt; });
    auto transport = Transport::install(std::move(config));
    if (!transport) return transport.error();
    auto registered = transport->register_memory(memory, 1);
    auto several = transport->register_many({{memory, 1, nullptr}});
    auto segment = transport->open(*desc);
    segment = transport->open_json("{}");
    segment = transport->open_name("there:1");
    auto batch = transport->batch(2);
    if (!registered || !several || !segment || !batch) return segment.error();
    const mefa_request both[] = {segment->write(memory, 1, 1), segment->read(memory, 1, 1, 7)};
    (void)batch->submit(both);
    (void)batch->submit(both[0], std::chrono::seconds(1));
    (void)batch->submit({both, 2}, std::chrono::milliseconds(1));
    (void)batch->submit(std::vector<mefa_request>(both, both + 2));
    (void)batch->wait(std::chrono::hours(1));
    (void)batch->task(0);
    (void)batch->task_error(0);
    (void)batch->status();
    (void)batch->quiet();
    (void)batch->wait_quiet(std::chrono::seconds(1));
    (void)batch->cancel();
    (void)batch->close();
    (void)segment->update(*desc);
    (void)segment->update_json("{}");
    (void)segment->warm_up();
    (void)segment->close();
    (void)transport->unregister_many(memory);
    (void)transport->answer_handshake("{}");
    (void)transport->descriptor([](const mefa_segment_desc &) {});
    (void)transport->descriptor_json();
    (void)transport->nic_count();
    (void)transport->stats(0);
    (void)transport->stats_json();
    (void)log_to([](int, const char *) {});
    return transport->close();
}
