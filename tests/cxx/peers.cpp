// SPDX-License-Identifier: Apache-2.0
//
// How peers find each other: handshakes with those whose descriptor has no address, descriptors from
// the host, keys that are wrong, structures instead of JSON.
#include "pair.h"

#include <atomic>
#include <mutex>
#include <sstream>

namespace {

// As C++ peers have it: a gid that tells no address.
std::string without_address(const std::string &descriptor) {
    return replaced(descriptor, "\"gid\":\"", '"', "fe80::1");
}

// The keys of the first buffer in a descriptor.
std::vector<std::uint64_t> keys_in(const std::string &descriptor) {
    std::vector<std::uint64_t> keys;
    std::stringstream list(between(descriptor, "\"rkey\":[", ']').at(0));
    for (std::string one; std::getline(list, one, ',');) keys.push_back(std::stoull(one));
    return keys;
}

class Handshakes : public Pair {
protected:
    void SetUp() override {
        Pair::SetUp();
        if (!IsSkipped()) target.emplace(provider(), MiB);
    }
    // A host that forwards handshakes to the target, as `change` makes them.
    mefa::Config host(std::function<std::string(std::string)> change = [](std::string text) { return text; }) {
        return mefa::Config("here:1").handshake([this, change](const char *server, const char *request) -> std::optional<std::string> {
            const std::lock_guard<std::mutex> guard(mutex);
            ++count;
            servers += server;
            const std::string answer = target->ask("handshake " + change(request));
            if (answer.substr(0, 2) != "0 ") return std::nullopt;
            return answer.substr(2);
        });
    }
    // That nothing can be sent, for a reason that contains `part`; and that nothing was started.
    void refused(mefa::Transport &transport, int code, const std::string &part) {
        auto segment = must(transport.open_json(without_address(target->descriptor())));
        auto registered = must(transport.register_memory(memory.data(), MiB));
        auto batch = must(transport.batch(2));
        const auto warmed = segment.warm_up();
        EXPECT_TRUE(fails(code, warmed));
        EXPECT_NE(warmed.error().text.find(part), std::string::npos) << warmed.error().text;
        const mefa_request both[] = {segment.write(memory.data(), target->base(), 16), segment.read(memory + 16, target->base(), 16)};
        const auto submitted = batch.submit(both, LONG);
        EXPECT_TRUE(fails(code, submitted));
        EXPECT_NE(submitted.error().text.find(part), std::string::npos) << submitted.error().text;
        EXPECT_EQ(must(batch.status()).tasks, 0u);
        EXPECT_TRUE(target->is(0, MiB, 0));
        must(registered.close()); // not in use
    }

    std::optional<Target> target;
    Memory memory{MiB};
    std::mutex mutex;
    std::string servers;
    int count = 0;
};
OVER(Handshakes, "tcp", "shm", "efa");

TEST_P(Handshakes, ConnectBothWays) {
    auto transport = install(host());
    auto registered = must(transport.register_memory(memory.data(), MiB));
    auto segment = must(transport.open_json(without_address(target->descriptor())));
    EXPECT_EQ(count, 0); // when it is needed, not before
    memory.fill(0, MiB / 2, 1, 0);
    ASSERT_EQ(run(transport, segment.write(memory.data(), target->base(), MiB / 2)), MEFA_STATUS_COMPLETED);
    EXPECT_TRUE(target->is(0, MiB / 2, 1));
    EXPECT_EQ(servers.substr(0, 7), "there:1");
    const int needed = count;
    EXPECT_GE(needed, 1);
    target->fill(0, MiB, 2);
    ASSERT_EQ(run(transport, segment.read(memory.data(), target->base(), MiB)), MEFA_STATUS_COMPLETED);
    EXPECT_TRUE(memory.is(0, MiB, 2, 0));
    EXPECT_EQ(count, needed); // once
    // A newer descriptor of the same peer may bring a new one, and changes nothing else.
    must(segment.update_json(without_address(target->descriptor())));
    ASSERT_EQ(run(transport, segment.read(memory.data(), target->base(), MiB)), MEFA_STATUS_COMPLETED);
}

TEST_P(Handshakes, AreDoneByWarmUp) {
    auto transport = install(host());
    auto registered = must(transport.register_memory(memory.data(), MiB));
    auto segment = must(transport.open_json(without_address(target->descriptor())));
    must(segment.warm_up());
    const int needed = count;
    EXPECT_GE(needed, 1);
    must(segment.warm_up());
    ASSERT_EQ(run(transport, segment.write(memory.data(), target->base(), MiB)), MEFA_STATUS_COMPLETED);
    EXPECT_EQ(count, needed);
    // Where the descriptor has addresses none is needed.
    auto direct = must(transport.open_json(target->descriptor()));
    must(direct.warm_up());
    ASSERT_EQ(run(transport, direct.write(memory.data(), target->base(), MiB)), MEFA_STATUS_COMPLETED);
    EXPECT_EQ(count, needed);
}

TEST_P(Handshakes, AreRefusedWithoutAHost) {
    auto transport = install();
    refused(transport, MEFA_CODE_REJECT_HANDSHAKE, "there:1");
    EXPECT_EQ(count, 0);
}

TEST_P(Handshakes, BringTheReasonOfARefusal) {
    auto transport = install(host([](const std::string &request) {
        return replaced(request, "\"peer_nic_path\":\"", '"', "there:1@nonsense0");
    }));
    refused(transport, MEFA_CODE_REJECT_HANDSHAKE, "there:1@nonsense0 is not a NIC of there:1");
    EXPECT_GE(count, 1);
}

TEST_P(Handshakes, FailWithTheHost) {
    auto transport = install(host([](const std::string &) { return std::string("{"); }));
    refused(transport, MEFA_CODE_REJECT_HANDSHAKE, "there:1"); // the target cannot read it: no answer
    // A host that gives an answer which is none.
    for (const char *answer : {"{}", "{\"efa_addr\":\"\"}"}) {
        auto odd = install(mefa::Config("here:1").handshake([&](const char *, const char *) { return std::string(answer); }));
        refused(odd, MEFA_CODE_REJECT_HANDSHAKE, "there:1");
    }
    for (const char *answer : {"", "{", "{\"efa_addr\":\"zz\"}"}) {
        auto odd = install(mefa::Config("here:1").handshake([&](const char *, const char *) { return std::string(answer); }));
        auto segment = must(odd.open_json(without_address(target->descriptor())));
        EXPECT_FALSE(segment.warm_up());
        EXPECT_STRNE(mefa_last_error(), "");
    }
}

// The JSON of a handshake and its fields are the same thing.
TEST(HandshakeFields, GoThereAndBack) {
    const auto keep = [](void *to, const char *text, std::size_t length) { static_cast<std::string *>(to)->assign(text, length); };
    const mefa_handshake fields = {sizeof fields, "here:1@a\"b", "there:1@c", "0a0b", nullptr};
    std::string json, again;
    ASSERT_EQ(mefa_handshake_format(&fields, keep, &json), 0) << mefa_last_error();
    ASSERT_EQ(mefa_handshake_parse(json.c_str(), [](void *to, const mefa_handshake *read) {
        EXPECT_STREQ(read->local_nic_path, "here:1@a\"b");
        EXPECT_STREQ(read->peer_nic_path, "there:1@c");
        EXPECT_STREQ(read->efa_addr, "0a0b");
        EXPECT_STREQ(read->reply_msg, "");
        mefa_handshake_format(read, [](void *text, const char *from, std::size_t length) {
            static_cast<std::string *>(text)->assign(from, length);
        }, to);
    }, &again), 0) << mefa_last_error();
    EXPECT_EQ(again, json);
    const auto never = [](void *, const mefa_handshake *) { ADD_FAILURE(); };
    EXPECT_EQ(mefa_handshake_parse("{", never, nullptr), MEFA_CODE_MALFORMED_JSON);
    EXPECT_EQ(mefa_handshake_parse(nullptr, never, nullptr), MEFA_CODE_INVALID_ARGUMENT);
    EXPECT_EQ(mefa_handshake_parse(json.c_str(), nullptr, nullptr), MEFA_CODE_INVALID_ARGUMENT);
    const mefa_handshake small = {8, nullptr, nullptr, nullptr, nullptr};
    EXPECT_EQ(mefa_handshake_format(&small, keep, &json), MEFA_CODE_INVALID_ARGUMENT);
    EXPECT_EQ(mefa_handshake_format(nullptr, keep, &json), MEFA_CODE_INVALID_ARGUMENT);
    EXPECT_EQ(mefa_handshake_format(&fields, nullptr, nullptr), MEFA_CODE_INVALID_ARGUMENT);
}

TEST_P(Handshakes, ManyThreadsAtOnce) {
    auto transport = install(host());
    auto registered = must(transport.register_memory(memory.data(), MiB));
    auto segment = must(transport.open_json(without_address(target->descriptor())));
    memory.fill(0, MiB, 1, 0);
    std::vector<std::thread> threads;
    std::atomic<int> wrong{0};
    for (std::uint64_t i = 0; i < 8; ++i)
        threads.emplace_back([&, i] {
            const std::uint64_t at = i * MiB / 8;
            if (run(transport, segment.write(memory + at, target->base() + at, MiB / 8)) != MEFA_STATUS_COMPLETED) ++wrong;
        });
    for (std::thread &thread : threads) thread.join();
    EXPECT_EQ(wrong, 0);
    EXPECT_TRUE(target->is(0, MiB, 1));
}

// A peer that was known by a handshake dies, and comes back under its name: its new descriptor brings a
// new handshake, not the dead one's address.
TEST_P(Handshakes, AgainWithAPeerThatCameBack) {
    auto transport = install(host());
    auto registered = must(transport.register_memory(memory.data(), MiB));
    auto segment = must(transport.open_json(without_address(target->descriptor())));
    ASSERT_EQ(run(transport, segment.write(memory.data(), target->base(), 16)), MEFA_STATUS_COMPLETED);
    target.reset();
    target.emplace(provider(), MiB);
    must(segment.update_json(without_address(target->descriptor())));
    memory.fill(0, MiB, 1, 0);
    ASSERT_EQ(run(transport, segment.write(memory.data(), target->base(), MiB), 5s), MEFA_STATUS_COMPLETED);
    EXPECT_TRUE(target->is(0, MiB, 1));
}

class Fetching : public Pair {};
OVER(Fetching, "tcp", "shm", "efa");

TEST_P(Fetching, OpensByNameAndFindsWhatIsRegisteredLater) {
    Target target(provider(), MiB);
    int fetched = 0;
    std::string answer;
    Memory memory(MiB);
    auto transport = install(mefa::Config("here:1").fetch_segment([&](const char *name) -> std::optional<std::string> {
        ++fetched;
        if (!answer.empty()) return answer;
        if (std::string(name) != "there:1") return std::nullopt;
        return target.descriptor();
    }));
    auto registered = must(transport.register_memory(memory.data(), MiB));
    auto segment = must(transport.open_name("there:1"));
    EXPECT_EQ(fetched, 1);
    memory.fill(0, MiB, 1, 0);
    ASSERT_EQ(run(transport, segment.write(memory.data(), target.base(), MiB)), MEFA_STATUS_COMPLETED);
    EXPECT_TRUE(target.is(0, MiB, 1));
    EXPECT_EQ(fetched, 1);

    const std::uint64_t more = target.register_more(MiB);
    ASSERT_EQ(run(transport, segment.write(memory.data(), more, MiB)), MEFA_STATUS_COMPLETED);
    EXPECT_EQ(fetched, 2);
    memory.fill(0, MiB, 2, 0);
    ASSERT_EQ(run(transport, segment.read(memory.data(), more, MiB)), MEFA_STATUS_COMPLETED);
    EXPECT_TRUE(memory.is(0, MiB, 1, 0));
    EXPECT_EQ(fetched, 2);

    // What is nowhere is asked for once a submission, and then refused.
    auto batch = must(transport.batch(1));
    EXPECT_TRUE(fails(MEFA_CODE_ADDRESS_NOT_REGISTERED, batch.submit(segment.read(memory.data(), 4096, 1))));
    EXPECT_EQ(fetched, 3);
    EXPECT_TRUE(fails(MEFA_CODE_METADATA, transport.open_name("elsewhere:1")));
    answer = "{";
    EXPECT_TRUE(fails(MEFA_CODE_MALFORMED_JSON, transport.open_name("there:1")));
    EXPECT_FALSE(batch.submit(segment.read(memory.data(), 4096, 1)));
    EXPECT_EQ(must(batch.status()).tasks, 0u);
    // All of which left what was known of the segment as it was.
    ASSERT_EQ(run(transport, segment.read(memory.data(), more, MiB)), MEFA_STATUS_COMPLETED);

    // Without a host, the newer descriptor is given by hand.
    auto alone = install();
    auto mine = must(alone.register_memory(memory.data(), MiB));
    auto there = must(alone.open_json(target.descriptor()));
    const std::uint64_t third = target.register_more(MiB);
    auto lone = must(alone.batch(1));
    EXPECT_TRUE(fails(MEFA_CODE_ADDRESS_NOT_REGISTERED, lone.submit(there.write(memory.data(), third, 1))));
    EXPECT_TRUE(fails(MEFA_CODE_METADATA, alone.open_name("there:1")));
    must(there.update_json(target.descriptor()));
    ASSERT_EQ(run(alone, there.write(memory.data(), third, MiB)), MEFA_STATUS_COMPLETED);
}

// Keys that the peer does not know (any more). Its provider must refuse them, and nothing may be touched.
class Keys : public Pair {
protected:
    void SetUp() override {
        Pair::SetUp();
        if (IsSkipped()) return;
        target.emplace(provider(), MiB);
        transport.emplace(install());
        registered.emplace(must(transport->register_memory(memory.data(), MiB)));
    }
    // That a write and a read fail, tell why, and leave their memory quiet. Each on a connection of its
    // own, which does not survive it.
    void refused(const std::string &bad, std::uint64_t there) {
        for (const bool write : {true, false}) {
            SCOPED_TRACE(write ? "write" : "read");
            auto own = install();
            auto mine = must(own.register_memory(memory.data(), MiB));
            auto segment = must(own.open_json(bad));
            auto batch = must(own.batch(1));
            must(batch.submit(write ? segment.write(memory.data(), there, 65536) : segment.read(memory.data(), there, 65536), LONG));
            EXPECT_EQ(must(batch.wait(2 * LONG)), MEFA_STATUS_FAILED);
            const auto state = must(batch.task(0));
            EXPECT_EQ(state.status, MEFA_STATUS_FAILED);
            EXPECT_EQ(state.bytes, 0u);
            EXPECT_NE(must(batch.task_error(0)), "");
            EXPECT_TRUE(must(batch.quiet()));
            // tcp only closes the connection, which could be anybody's fault: it is tried again.
            EXPECT_GE(total(own, &mefa_nic_stats::failed), 1u);
        }
    }
    // Ours, too, hits one; then good transfers go on, once the connection that it cost is made again. Until then
    // they may be refused: the peer could not be reached, as far as tcp tells.
    void goes_on(mefa::Segment &bad, std::uint64_t there, mefa::Segment &good) {
        EXPECT_EQ(run(*transport, bad.write(memory.data(), there, 65536)), MEFA_STATUS_FAILED);
        memory.fill(0, MiB, 3, 0);
        EXPECT_TRUE(eventually([&] {
            auto batch = must(transport->batch(1));
            if (!batch.submit(good.write(memory.data(), target->base(), MiB), LONG)) return false;
            return must(batch.wait(2 * LONG)) == MEFA_STATUS_COMPLETED;
        }));
        EXPECT_TRUE(target->is(0, MiB, 3));
    }
    // What shm does instead (libfabric 1.17): it reads by address, whatever the key; and a write that the
    // target refuses never ends. But it writes nowhere else.
    void shm_without_keys(mefa::Segment &bad) {
        auto batch = must(transport->batch(1));
        must(batch.submit(bad.write(memory.data(), target->base() + 4096, 65536), 500ms));
        must(batch.wait(LONG));
        const auto state = must(batch.task(0));
        EXPECT_TRUE(target->is(0, 4096, 1));
        EXPECT_TRUE(target->is(4096 + 65536, MiB - 4096 - 65536, 1));
        EXPECT_TRUE(memory.is(0, MiB, 2, 0));
        GTEST_SKIP() << "the provider shm does not refuse a wrong key: a write ended with status " << state.status;
    }

    std::optional<Target> target;
    Memory memory{MiB};
    std::optional<mefa::Transport> transport;
    std::optional<mefa::Registration> registered;
};
OVER(Keys, "tcp", "shm");

TEST_P(Keys, WrongOnesAreRefusedAndNothingIsTouched) {
    const std::string descriptor = target->descriptor();
    std::string others;
    for (const std::uint64_t key : keys_in(descriptor)) others += (others.empty() ? "" : ",") + std::to_string(key ^ 0x5a5a);
    const std::string altered = replaced(descriptor, "\"rkey\":[", ']', others);
    auto wrong = must(transport->open_json(altered));
    auto right = must(transport->open_json(descriptor));
    target->fill(0, MiB, 1);
    memory.fill(0, MiB, 2, 0);
    if (provider() == "shm") return shm_without_keys(wrong);
    refused(altered, target->base());
    EXPECT_TRUE(target->is(0, MiB, 1));
    EXPECT_TRUE(memory.is(0, MiB, 2, 0));
    goes_on(wrong, target->base(), right);
}

TEST_P(Keys, OfWhatIsNotRegisteredAnyMore) {
    if (provider() == "shm") GTEST_SKIP() << "the provider shm does not refuse a wrong key";
    const std::uint64_t more = target->register_more(MiB);
    const std::string stale = target->descriptor();
    auto segment = must(transport->open_json(stale));
    memory.fill(0, MiB, 1, 0);
    ASSERT_EQ(run(*transport, segment.write(memory.data(), more, MiB)), MEFA_STATUS_COMPLETED);
    ASSERT_EQ(target->ask("unregister " + std::to_string(more)), "0");
    refused(stale, more);
    EXPECT_TRUE(memory.is(0, MiB, 1, 0));
    goes_on(segment, more, segment);
}

// The same descriptor as a structure.
TEST_P(Keys, StructuresAreAsGoodAsJson) {
    must(registered->close());
    registered.emplace(must(transport->register_memory(memory.data(), MiB, "cpu:0")));
    memory.fill(0, MiB, 1, 0);
    // The target's JSON, through our own structure: ours, with its keys and addresses.
    const std::string json = target->descriptor();
    const std::vector<std::uint64_t> keys = keys_in(json);
    const std::vector<std::string> gids = between(json, "\"gid\":\"", '"');
    std::optional<mefa::Segment> segment;
    must(transport->descriptor([&](const mefa_segment_desc &ours) {
        ASSERT_EQ(ours.size, sizeof ours);
        EXPECT_STREQ(ours.name, "here:1");
        ASSERT_EQ(ours.device_count, keys.size());
        ASSERT_EQ(ours.buffer_count, 1u);
        EXPECT_STREQ(ours.buffers[0].name, "cpu:0");
        EXPECT_EQ(ours.buffers[0].address, reinterpret_cast<std::uintptr_t>(memory.data()));
        EXPECT_EQ(ours.buffers[0].length, MiB);
        EXPECT_EQ(ours.buffers[0].rkey_count, ours.device_count);
        std::vector<mefa_device> devices(ours.devices, ours.devices + ours.device_count);
        for (std::size_t i = 0; i < devices.size(); ++i) devices[i].gid = gids[i].c_str();
        const mefa_buffer buffer = {"cpu:0", target->base(), MiB, keys.data(), keys.size()};
        mefa_segment_desc theirs = ours;
        theirs.name = "there:1";
        theirs.devices = devices.data();
        theirs.buffers = &buffer;
        segment.emplace(must(transport->open(theirs)));
        must(segment->update(theirs));
    }));
    ASSERT_TRUE(segment);
    ASSERT_EQ(run(*transport, segment->write(memory.data(), target->base(), MiB)), MEFA_STATUS_COMPLETED);
    EXPECT_TRUE(target->is(0, MiB, 1));
}

} // namespace
