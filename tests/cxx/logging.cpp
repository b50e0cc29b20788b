// SPDX-License-Identifier: Apache-2.0
//
// Where log lines go. The only test of its file, as the level is read once a process.
#include "pair.h"

#include <cstdio>
#include <mutex>

TEST(Logging, GoesWhereItIsSent) {
    check_start(115);
    setenv("MC_LOG_LEVEL", "INFO", 1);
    static std::mutex mutex;
    static std::vector<std::pair<int, std::string>> lines;
    const auto count = [] {
        const std::lock_guard<std::mutex> guard(mutex);
        return lines.size();
    };
    const auto keep = [](int level, const char *text) {
        const std::lock_guard<std::mutex> guard(mutex);
        lines.emplace_back(level, text);
    };
    must(mefa::log_to(keep));
    const auto install = [] { return mefa::Transport::install(mefa::Config("here:1").provider("tcp")); };
    {
        auto transport = install();
        if (transport.code() == MEFA_CODE_DEVICE_NOT_FOUND) GTEST_SKIP() << transport.error().text;
        ASSERT_TRUE(transport) << transport.error().text;
    }
    EXPECT_GT(count(), 0u);
    for (const auto &[level, text] : lines) {
        EXPECT_GE(level, 1);
        EXPECT_LE(level, 3) << text; // INFO is the most that was asked for
        EXPECT_FALSE(text.empty());
        EXPECT_EQ(text.find('\n'), std::string::npos);
    }
    must(mefa::log_to(nullptr));
    const std::size_t before = count();
    testing::internal::CaptureStderr();
    must(install());
    EXPECT_NE(testing::internal::GetCapturedStderr().find("mooncake-efa"), std::string::npos);
    EXPECT_EQ(count(), before);
    must(mefa::log_to(keep));
    {
        auto transport = must(install());
        EXPECT_GT(count(), before);

        // Any stranger can send these, as fast as he likes.
        for (int i = 0; i < 200; i++) {
            must(transport.answer_handshake(R"({"local_nic_path": "there:1@x", "peer_nic_path": "here:1@none"})"));
        }
    }
    int told = 0, more = 0, held_back = 0;
    for (const auto &[level, text] : lines) {
        told += text.find("handshake from there:1@x refused") != std::string::npos;
        if (std::sscanf(text.c_str(), "and %d more refused handshakes", &more) == 1) held_back += more;
    }
    EXPECT_LT(told, 200);
    EXPECT_EQ(told + held_back, 200);
}
