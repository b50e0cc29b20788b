// SPDX-License-Identifier: Apache-2.0
//
// The CUDA driver, loaded at run time: a real one, or fake_cuda.c's where MEFA_TEST_CUDA names it. Only what the tests
// use, under the names of cuda.h, whose types they are (CUdeviceptr is a number, handles are pointers).
#pragma once

#include "fake_cuda.h"

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace gpu {

using Handle = void *; // CUcontext, CUstream, CUevent
using Address = std::uint64_t;

struct Location { int type, id; };
struct Access { Location location; int flags; };
struct Properties {
    int type = 1, handle_types = 0; // pinned
    Location location = {1, 0};     // on a device
    void *metadata = nullptr;
    unsigned char flags[8] = {};
};
struct IpcHandle { char bytes[64]; };

// Attributes of pointers.
enum { POINTER_CONTEXT = 1, POINTER_MEMORY_TYPE = 2, POINTER_IS_MANAGED = 8, POINTER_DEVICE = 9, POINTER_LEGACY_IPC = 10 };

#define GPU_FUNCTIONS(X)                                                                                               \
    X(cuInit, unsigned)                                                                                                \
    X(cuGetErrorName, int, const char **)                                                                              \
    X(cuDeviceGetCount, int *)                                                                                         \
    X(cuDeviceGetName, char *, int, int)                                                                               \
    X(cuDeviceGetPCIBusId, char *, int, int)                                                                           \
    X(cuDeviceGetAttribute, int *, int, int)                                                                           \
    X(cuDeviceCanAccessPeer, int *, int, int)                                                                          \
    X(cuDevicePrimaryCtxRetain, Handle *, int)                                                                         \
    X(cuDevicePrimaryCtxRelease_v2, int)                                                                               \
    X(cuDevicePrimaryCtxGetState, int, unsigned *, int *)                                                              \
    X(cuCtxPushCurrent_v2, Handle)                                                                                     \
    X(cuCtxPopCurrent_v2, Handle *)                                                                                    \
    X(cuCtxGetCurrent, Handle *)                                                                                       \
    X(cuCtxSetCurrent, Handle)                                                                                         \
    X(cuCtxSynchronize)                                                                                                \
    X(cuCtxEnablePeerAccess, Handle, unsigned)                                                                         \
    X(cuPointerGetAttribute, void *, int, Address)                                                                     \
    X(cuMemGetAddressRange_v2, Address *, std::size_t *, Address)                                                      \
    X(cuMemGetHandleForAddressRange, void *, Address, std::size_t, int, unsigned long long)                            \
    X(cuMemGetInfo_v2, std::size_t *, std::size_t *)                                                                   \
    X(cuMemAlloc_v2, Address *, std::size_t)                                                                           \
    X(cuMemFree_v2, Address)                                                                                           \
    X(cuMemAllocManaged, Address *, std::size_t, unsigned)                                                             \
    X(cuMemHostAlloc, void **, std::size_t, unsigned)                                                                  \
    X(cuMemFreeHost, void *)                                                                                           \
    X(cuMemHostRegister_v2, void *, std::size_t, unsigned)                                                             \
    X(cuMemHostUnregister, void *)                                                                                     \
    X(cuMemGetAllocationGranularity, std::size_t *, const Properties *, int)                                           \
    X(cuMemCreate, std::uint64_t *, std::size_t, const Properties *, unsigned long long)                               \
    X(cuMemRelease, std::uint64_t)                                                                                     \
    X(cuMemAddressReserve, Address *, std::size_t, std::size_t, Address, unsigned long long)                           \
    X(cuMemAddressFree, Address, std::size_t)                                                                          \
    X(cuMemMap, Address, std::size_t, std::size_t, std::uint64_t, unsigned long long)                                  \
    X(cuMemUnmap, Address, std::size_t)                                                                                \
    X(cuMemSetAccess, Address, std::size_t, const Access *, std::size_t)                                               \
    X(cuMemcpyAsync, Address, Address, std::size_t, Handle)                                                            \
    X(cuMemcpyHtoD_v2, Address, const void *, std::size_t)                                                             \
    X(cuMemcpyDtoH_v2, void *, Address, std::size_t)                                                                   \
    X(cuMemcpyDtoD_v2, Address, Address, std::size_t)                                                                  \
    X(cuMemsetD8_v2, Address, unsigned char, std::size_t)                                                              \
    X(cuStreamCreate, Handle *, unsigned)                                                                              \
    X(cuStreamDestroy_v2, Handle)                                                                                      \
    X(cuStreamSynchronize, Handle)                                                                                     \
    X(cuStreamQuery, Handle)                                                                                           \
    X(cuStreamWaitEvent, Handle, Handle, unsigned)                                                                     \
    X(cuEventCreate, Handle *, unsigned)                                                                               \
    X(cuEventDestroy_v2, Handle)                                                                                       \
    X(cuEventRecord, Handle, Handle)                                                                                   \
    X(cuEventQuery, Handle)                                                                                            \
    X(cuEventSynchronize, Handle)                                                                                      \
    X(cuIpcGetMemHandle, IpcHandle *, Address)                                                                         \
    X(cuIpcOpenMemHandle_v2, Address *, IpcHandle, unsigned)                                                           \
    X(cuIpcCloseMemHandle, Address)

class Driver {
public:
#define X(name, ...) int (*name)(__VA_ARGS__) = nullptr;
    GPU_FUNCTIONS(X)
#undef X
    // Of the fake driver, or NULL.
    fake_cuda_counts_fn fake_counts = nullptr;
    fake_cuda_fail_fn fake_fail = nullptr;

    bool fake() const { return fake_counts != nullptr; }
    fake_cuda_counts counts() const {
        fake_cuda_counts counts = {};
        if (fake_counts) fake_counts(&counts);
        return counts;
    }
    int devices() const {
        int count = 0;
        ok(cuDeviceGetCount(&count));
        return count;
    }
    // Ends the test where CUDA says no.
    void ok(int error) const {
        if (error == 0) return;
        const char *name = nullptr;
        cuGetErrorName(error, &name);
        throw std::runtime_error(std::string("CUDA says ") + (name ? name : "?") + " (" + std::to_string(error) + ")");
    }

    // NULL where there is no driver or no GPU; `why` says which.
    static const Driver *get(std::string *why = nullptr) {
        static std::string reason;
        static const Driver *driver = load(reason);
        if (why) *why = reason;
        return driver;
    }

private:
    static const Driver *load(std::string &why) {
        const char *path = std::getenv("MEFA_TEST_CUDA");
        void *library = dlopen(path && *path ? path : "libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
        if (!library) return why = dlerror(), nullptr;
        static Driver driver;
        const char *missing = nullptr;
        const auto find = [&](const char *name) {
            void *symbol = dlsym(library, name);
            if (!symbol) missing = name;
            return symbol;
        };
#define X(name, ...) driver.name = reinterpret_cast<int (*)(__VA_ARGS__)>(find(#name));
        GPU_FUNCTIONS(X)
#undef X
        if (missing) return why = std::string("the driver has no ") + missing, nullptr;
        driver.fake_counts = reinterpret_cast<fake_cuda_counts_fn>(dlsym(library, "fake_cuda_counts"));
        driver.fake_fail = reinterpret_cast<fake_cuda_fail_fn>(dlsym(library, "fake_cuda_fail"));
        const int error = driver.cuInit(0);
        if (error != 0) return why = "cuInit says " + std::to_string(error), nullptr;
        if (driver.devices() == 0) return why = "there is no GPU", nullptr;
        return &driver;
    }
};

} // namespace gpu
