// SPDX-License-Identifier: Apache-2.0
//
// The fake driver itself: what makes tests on it worth something is that it refuses, and that it is late.
#include "driver.h"

#include <gtest/gtest.h>

#include <csetjmp>
#include <csignal>
#include <cstring>
#include <string>
#include <sys/mman.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <vector>

using namespace gpu;

namespace {

constexpr std::size_t KiB = 1024, MiB = 1 << 20;

class FakeCuda : public testing::Test {
protected:
    void SetUp() override {
        std::string why;
        driver = Driver::get(&why);
        ASSERT_NE(driver, nullptr) << why;
        ASSERT_TRUE(driver->fake());
        driver->fake_fail(nullptr);
        for (Handle &context : contexts) {
            driver->ok(driver->cuDevicePrimaryCtxRetain(&context, static_cast<int>(&context - contexts)));
            driver->ok(driver->cuCtxPushCurrent_v2(context));
        }
        driver->ok(driver->cuCtxPopCurrent_v2(nullptr)); // device 0 is current
        driver->ok(driver->cuStreamCreate(&stream, 1));
        driver->ok(driver->cuEventCreate(&event, 2));
        driver->ok(driver->cuMemHostAlloc(&host, MiB, 0));
        driver->ok(driver->cuMemAlloc_v2(&device, MiB));
        before = driver->counts();
    }
    void TearDown() override {
        driver->fake_fail(nullptr);
        Handle current = nullptr;
        while (driver->cuCtxPopCurrent_v2(&current) == 0) {}
        for (int number : {0, 1}) driver->ok(driver->cuDevicePrimaryCtxRelease_v2(number));
        const auto after = driver->counts();
        // With the contexts goes what was in them, and it is counted.
        EXPECT_GE(after.left - before.left, 4);
        EXPECT_EQ(after.allocations, 0);
        EXPECT_EQ(after.streams, 0);
        EXPECT_EQ(after.events, 0);
        EXPECT_EQ(after.retained[0], 0);
    }
    unsigned char *bytes() const { return static_cast<unsigned char *>(host); }
    Address pinned() const { return reinterpret_cast<Address>(host); }

    const Driver *driver = nullptr;
    Handle contexts[2] = {}, stream = nullptr, event = nullptr;
    void *host = nullptr;
    Address device = 0;
    fake_cuda_counts before = {};
};

// The test that completes early: it must see the wrong bytes.
TEST_F(FakeCuda, ACopyIsLate) {
    std::memset(host, 7, KiB);
    driver->ok(driver->cuMemcpyAsync(device, pinned(), KiB, stream));
    std::memset(host, 9, KiB); // before it is done, so this is what is copied
    driver->ok(driver->cuMemcpyAsync(pinned() + 4 * KiB, device, KiB, stream));
    driver->ok(driver->cuEventRecord(event, stream));
    EXPECT_EQ(driver->cuEventQuery(event), 600);
    EXPECT_EQ(bytes()[4 * KiB], 0) << "it is not there yet";
    EXPECT_EQ(driver->cuEventQuery(event), 600);
    EXPECT_EQ(bytes()[4 * KiB], 0);
    EXPECT_EQ(driver->cuEventQuery(event), 0);
    EXPECT_EQ(bytes()[4 * KiB], 9);
    EXPECT_EQ(bytes()[5 * KiB - 1], 9);
    EXPECT_EQ(bytes()[5 * KiB], 0);
    EXPECT_EQ(driver->counts().copies - before.copies, 2);
    EXPECT_EQ(driver->counts().pageable, before.pageable);
}

// What is queued after the record does not come with it.
TEST_F(FakeCuda, AnEventEndsWhatWasBeforeIt) {
    driver->ok(driver->cuMemsetD8_v2(device, 5, MiB));
    driver->ok(driver->cuCtxSynchronize());
    driver->ok(driver->cuMemcpyAsync(pinned(), device, 1, stream));
    driver->ok(driver->cuEventRecord(event, stream));
    driver->ok(driver->cuMemcpyAsync(pinned() + 1, device, 1, stream));
    while (driver->cuEventQuery(event) == 600) {}
    EXPECT_EQ(bytes()[0], 5);
    EXPECT_EQ(bytes()[1], 0);
    driver->ok(driver->cuStreamSynchronize(stream));
    EXPECT_EQ(bytes()[1], 5);
}

// cuMemcpyDtoD is no barrier: other streams do not see it until someone waits.
TEST_F(FakeCuda, ACopyWithinADeviceDoesNotWait) {
    driver->ok(driver->cuMemsetD8_v2(device, 3, MiB));
    driver->ok(driver->cuCtxSynchronize());
    driver->ok(driver->cuMemsetD8_v2(device, 4, 1));
    driver->ok(driver->cuMemcpyDtoD_v2(device + KiB, device, 1));
    driver->ok(driver->cuMemcpyAsync(pinned(), device + KiB, 1, stream));
    driver->ok(driver->cuStreamSynchronize(stream));
    EXPECT_EQ(bytes()[0], 3) << "a non-blocking stream does not wait for the default one";
    driver->ok(driver->cuMemcpyDtoH_v2(host, device + KiB, 1));
    EXPECT_EQ(bytes()[0], 4) << "the default one does";
}

TEST_F(FakeCuda, StreamsWaitForEvents) {
    Handle other = nullptr;
    driver->ok(driver->cuStreamCreate(&other, 1));
    std::memset(host, 1, 1);
    driver->ok(driver->cuMemcpyAsync(device, pinned(), 1, stream));
    driver->ok(driver->cuEventRecord(event, stream));
    driver->ok(driver->cuStreamWaitEvent(other, event, 0));
    driver->ok(driver->cuMemcpyAsync(pinned() + 1, device, 1, other));
    driver->ok(driver->cuStreamSynchronize(other));
    EXPECT_EQ(bytes()[1], 1);
}

sigjmp_buf faulted;

TEST_F(FakeCuda, DeviceMemoryCannotBeTouchedByTheCpu) {
    const auto handler = +[](int) { siglongjmp(faulted, 1); };
    void (*const old)(int) = std::signal(SIGSEGV, handler);
    volatile bool fault = true;
    if (sigsetjmp(faulted, 1) == 0) {
        *reinterpret_cast<volatile char *>(device) = 1;
        fault = false;
    }
    std::signal(SIGSEGV, old);
    EXPECT_TRUE(fault);
    char byte;
    iovec here = {&byte, 1}, there = {reinterpret_cast<void *>(device), 1};
    EXPECT_EQ(process_vm_readv(getpid(), &here, 1, &there, 1, 0), -1);
    EXPECT_EQ(errno, EFAULT);
}

TEST_F(FakeCuda, CallsNeedTheRightContext) {
    Handle current = nullptr;
    driver->ok(driver->cuCtxPushCurrent_v2(contexts[1]));
    EXPECT_EQ(driver->cuMemcpyAsync(device, pinned(), 1, stream), 400);
    EXPECT_EQ(driver->cuStreamSynchronize(stream), 400);
    EXPECT_EQ(driver->cuEventQuery(event), 400);
    driver->ok(driver->cuCtxPopCurrent_v2(&current));
    EXPECT_EQ(current, contexts[1]);
    std::thread([&] {
        EXPECT_EQ(driver->cuMemcpyAsync(device, pinned(), 1, stream), 201);
        EXPECT_EQ(driver->cuMemAlloc_v2(&device, 1), 201);
        EXPECT_EQ(driver->cuEventQuery(event), 201);
        EXPECT_EQ(driver->cuCtxPopCurrent_v2(nullptr), 201);
        Handle none = &none;
        EXPECT_EQ(driver->cuCtxGetCurrent(&none), 0);
        EXPECT_EQ(none, nullptr);
        // Questions about pointers need none.
        unsigned type = 0;
        EXPECT_EQ(driver->cuPointerGetAttribute(&type, POINTER_MEMORY_TYPE, device + 5), 0);
        EXPECT_EQ(type, 2u);
    }).join();
    unsigned type = 0;
    int local = 0;
    EXPECT_EQ(driver->cuPointerGetAttribute(&type, POINTER_MEMORY_TYPE, reinterpret_cast<Address>(&local)), 1);
    EXPECT_EQ(driver->cuPointerGetAttribute(&type, POINTER_MEMORY_TYPE, device + MiB), 1) << "just past it";
}

TEST_F(FakeCuda, CountsContexts) {
    EXPECT_EQ(before.retained[1], 1);
    Handle again = nullptr;
    driver->ok(driver->cuDevicePrimaryCtxRetain(&again, 1));
    EXPECT_EQ(again, contexts[1]);
    EXPECT_EQ(driver->counts().contexts_created[1], before.contexts_created[1]) << "it was there";
    driver->ok(driver->cuDevicePrimaryCtxRelease_v2(1));
    EXPECT_EQ(driver->counts().retained[1], 1);
    unsigned flags = 0;
    int active = 0;
    driver->ok(driver->cuDevicePrimaryCtxGetState(1, &flags, &active));
    EXPECT_EQ(active, 1);
}

TEST_F(FakeCuda, PageableMemoryIsCounted) {
    std::vector<unsigned char> pageable(KiB, 8), back(KiB);
    driver->ok(driver->cuMemcpyAsync(device, reinterpret_cast<Address>(pageable.data()), KiB, stream));
    driver->ok(driver->cuMemcpyAsync(reinterpret_cast<Address>(back.data()), device, KiB, stream));
    EXPECT_EQ(back, pageable) << "it waits for these";
    EXPECT_EQ(driver->counts().pageable - before.pageable, 2);
    // Pinned by registration it is as good as cuMemHostAlloc's.
    void *mapping = mmap(nullptr, 8 * KiB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    driver->ok(driver->cuMemHostRegister_v2(mapping, 8 * KiB, 0));
    EXPECT_EQ(driver->cuMemHostRegister_v2(static_cast<char *>(mapping) + 4 * KiB, KiB, 0), 712);
    driver->ok(driver->cuMemcpyAsync(reinterpret_cast<Address>(mapping), device, KiB, stream));
    EXPECT_EQ(*static_cast<char *>(mapping), 0);
    driver->ok(driver->cuStreamSynchronize(stream));
    EXPECT_EQ(*static_cast<char *>(mapping), 8);
    EXPECT_EQ(driver->counts().pageable - before.pageable, 2);
    EXPECT_EQ(driver->counts().pinned_bytes - before.pinned_bytes, 8 * 1024);
    driver->ok(driver->cuMemHostUnregister(mapping));
    EXPECT_EQ(driver->cuMemHostUnregister(mapping), 713);
    munmap(mapping, 8 * KiB);
    EXPECT_EQ(driver->cuMemcpyAsync(device, reinterpret_cast<Address>(mapping), KiB, stream), 1) << "nobody's memory";
}

TEST_F(FakeCuda, MemoryThatIsGoneIsNoticed) {
    Address other = 0;
    driver->ok(driver->cuMemAlloc_v2(&other, KiB));
    driver->ok(driver->cuMemcpyAsync(other, device, KiB, stream));
    driver->ok(driver->cuMemFree_v2(other));
    EXPECT_EQ(driver->counts().freed_in_use - before.freed_in_use, 1);
    EXPECT_EQ(driver->cuStreamSynchronize(stream), 700);
    EXPECT_EQ(driver->counts().wild - before.wild, 1);
    EXPECT_EQ(driver->cuMemAlloc_v2(&other, KiB), 700) << "the context is spoilt";
    EXPECT_EQ(driver->cuMemcpyAsync(device, device + MiB, KiB, stream), 700);
}

TEST_F(FakeCuda, RangesAreChecked) {
    EXPECT_EQ(driver->cuMemcpyAsync(device + MiB - 1, pinned(), 2, stream), 1);
    EXPECT_EQ(driver->cuMemcpyAsync(pinned() + MiB - 1, device, 2, stream), 1);
    EXPECT_EQ(driver->cuMemcpyAsync(device - 1, pinned(), 2, stream), 1);
    EXPECT_EQ(driver->cuMemFree_v2(device + 1), 1);
    Address base = 0;
    std::size_t size = 0;
    driver->ok(driver->cuMemGetAddressRange_v2(&base, &size, device + 77));
    EXPECT_EQ(base, device);
    EXPECT_EQ(size, MiB);
    EXPECT_EQ(driver->cuMemAlloc_v2(&base, std::size_t(1) << 40), 2);
}

TEST_F(FakeCuda, VirtualMemory) {
    Properties properties;
    std::size_t unit = 0;
    driver->ok(driver->cuMemGetAllocationGranularity(&unit, &properties, 0));
    std::uint64_t handles[2] = {};
    Address range = 0;
    driver->ok(driver->cuMemAddressReserve(&range, 3 * unit, 0, 0, 0));
    for (int i : {0, 1}) {
        driver->ok(driver->cuMemCreate(&handles[i], unit, &properties, 0));
        driver->ok(driver->cuMemMap(range + i * unit, unit, 0, handles[i], 0));
        driver->ok(driver->cuMemRelease(handles[i]));
    }
    std::memset(host, 6, MiB);
    EXPECT_EQ(driver->cuMemcpyAsync(range, pinned(), 1, stream), 1) << "no one has access yet";
    const Access access = {{1, 0}, 3};
    driver->ok(driver->cuMemSetAccess(range, 2 * unit, &access, 1));
    // Over the border of the two.
    driver->ok(driver->cuMemcpyAsync(range + unit - KiB, pinned(), 2 * KiB, stream));
    driver->ok(driver->cuMemcpyAsync(pinned() + 512 * KiB, range + unit - KiB - 1, 2 * KiB + 2, stream));
    driver->ok(driver->cuStreamSynchronize(stream));
    EXPECT_EQ(bytes()[512 * KiB], 0);
    for (std::size_t i = 1; i <= 2 * KiB; ++i) ASSERT_EQ(bytes()[512 * KiB + i], 6) << i;
    EXPECT_EQ(bytes()[512 * KiB + 2 * KiB + 1], 0);
    EXPECT_EQ(driver->cuMemcpyAsync(range + 2 * unit - 1, pinned(), 2, stream), 1) << "nothing is mapped there";
    unsigned char legacy = 1;
    driver->ok(driver->cuPointerGetAttribute(&legacy, POINTER_LEGACY_IPC, range));
    EXPECT_EQ(legacy, 0);
    IpcHandle ipc;
    EXPECT_EQ(driver->cuIpcGetMemHandle(&ipc, range), 1);
    int fd = -1;
    driver->ok(driver->cuMemGetHandleForAddressRange(&fd, range, unit, 1, 0));
    unsigned char byte = 0;
    EXPECT_EQ(pread(fd, &byte, 1, static_cast<off_t>(unit - 1)), 1);
    EXPECT_EQ(byte, 6);
    close(fd);
    EXPECT_EQ(driver->cuMemAddressFree(range, 3 * unit), 1) << "still mapped";
    EXPECT_EQ(driver->cuMemUnmap(range, unit + 1), 1);
    driver->ok(driver->cuMemUnmap(range, 2 * unit));
    driver->ok(driver->cuMemAddressFree(range, 3 * unit));
    EXPECT_EQ(driver->counts().device_bytes[0], before.device_bytes[0]);
}

TEST_F(FakeCuda, ManagedMemory) {
    Address managed = 0;
    driver->ok(driver->cuMemAllocManaged(&managed, KiB, 1));
    *reinterpret_cast<char *>(managed) = 5;
    driver->ok(driver->cuMemcpyAsync(pinned(), managed, 1, stream));
    driver->ok(driver->cuStreamSynchronize(stream));
    EXPECT_EQ(bytes()[0], 5);
    unsigned char is = 0;
    driver->ok(driver->cuPointerGetAttribute(&is, POINTER_IS_MANAGED, managed));
    EXPECT_EQ(is, 1);
    driver->ok(driver->cuMemFree_v2(managed));
}

TEST_F(FakeCuda, AnotherProcessSeesTheSameBytes) {
    IpcHandle handle;
    driver->ok(driver->cuIpcGetMemHandle(&handle, device + 5));
    Address opened = 0;
    EXPECT_EQ(driver->cuIpcOpenMemHandle_v2(&opened, handle, 1), 201) << "one's own";
    std::memset(host, 4, KiB);
    driver->ok(driver->cuMemcpyHtoD_v2(device + KiB, host, KiB));
    const pid_t child = fork();
    if (child == 0) {
        // A copy of this process with a number of its own is another process to the driver.
        Address again = 0;
        unsigned char seen[2] = {};
        bool good = driver->cuIpcOpenMemHandle_v2(&opened, handle, 1) == 0 &&
                    driver->cuIpcOpenMemHandle_v2(&again, handle, 1) == 0 && again == opened &&
                    driver->cuMemcpyDtoH_v2(seen, opened + 2 * KiB - 1, 2) == 0 && seen[0] == 4 && seen[1] == 0 &&
                    driver->cuMemsetD8_v2(opened, 9, 1) == 0 && driver->cuCtxSynchronize() == 0 &&
                    driver->cuIpcCloseMemHandle(opened) == 0 && driver->counts().imports == 1 &&
                    driver->cuIpcCloseMemHandle(opened) == 0 && driver->counts().imports == 0 &&
                    driver->cuIpcCloseMemHandle(opened) == 1;
        _exit(good ? 0 : 1);
    }
    int status = 1;
    waitpid(child, &status, 0);
    EXPECT_EQ(status, 0);
    driver->ok(driver->cuMemcpyDtoH_v2(host, device, 1));
    EXPECT_EQ(bytes()[0], 9);
}

TEST_F(FakeCuda, FailsWhenTold) {
    driver->fake_fail("cuMemcpyAsync=700@2,cuMemAlloc=2,cuEventQuery=999@3+");
    EXPECT_EQ(driver->cuMemcpyAsync(device, pinned(), 1, stream), 0);
    EXPECT_EQ(driver->cuMemcpyAsync(device, pinned(), 1, stream), 700);
    EXPECT_EQ(driver->cuMemcpyAsync(device, pinned(), 1, stream), 0);
    Address address = 0;
    EXPECT_EQ(driver->cuMemAlloc_v2(&address, 1), 2);
    EXPECT_EQ(driver->cuMemAllocManaged(&address, 1, 1), 0) << "another function";
    for (int call = 1; call < 6; ++call) EXPECT_EQ(driver->cuEventQuery(event), call < 3 ? 0 : 999) << call;
    driver->fake_fail(nullptr);
    EXPECT_EQ(driver->cuEventQuery(event), 0);
    const char *name = nullptr;
    EXPECT_EQ(driver->cuGetErrorName(700, &name), 0);
    EXPECT_STREQ(name, "CUDA_ERROR_ILLEGAL_ADDRESS");
}

} // namespace
