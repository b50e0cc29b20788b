// SPDX-License-Identifier: Apache-2.0
//
// Memory of every kind, with patterns in it.
#pragma once

#include "../cxx/pair.h"
#include "driver.h"

#include <cstring>
#include <memory>

namespace gpu {

// The primary context of a device: it is there while one of these is, and current only where somebody enters it.
class Context {
public:
    Context(const Driver &driver, int device) : driver_(driver), device_(device) {
        driver_.ok(driver_.cuDevicePrimaryCtxRetain(&raw_, device));
    }
    Context(const Context &) = delete;
    ~Context() { driver_.cuDevicePrimaryCtxRelease_v2(device_); }
    Handle raw() const { return raw_; }

    class Entered {
    public:
        Entered(const Driver &driver, Handle context) : driver_(driver) { driver_.ok(driver_.cuCtxPushCurrent_v2(context)); }
        Entered(const Entered &) = delete;
        ~Entered() { driver_.cuCtxPopCurrent_v2(&popped_); }

    private:
        const Driver &driver_;
        Handle popped_ = nullptr;
    };
    Entered enter() const { return Entered(driver_, raw_); }

private:
    const Driver &driver_;
    int device_;
    Handle raw_ = nullptr;
};

inline std::uint64_t rounded(std::uint64_t value, std::uint64_t unit) { return (value + unit - 1) / unit * unit; }

// Physical memory of devices, mapped one piece after the other from `address` on; all of these devices may use all of it.
class Mapping {
public:
    // A piece for each of `devices`; a hint for the address.
    Mapping(const Driver &driver, const std::vector<int> &devices, std::uint64_t piece, Address hint = 0)
        : driver_(driver), piece_(piece) {
        try {
            driver_.ok(driver_.cuMemAddressReserve(&address_, piece * devices.size(), 0, hint, 0));
            size_ = piece * devices.size();
            for (const int device : devices) {
                Properties properties;
                properties.location.id = device;
                std::uint64_t handle = 0;
                driver_.ok(driver_.cuMemCreate(&handle, piece, &properties, 0));
                const int error = driver_.cuMemMap(address_ + mapped_, piece, 0, handle, 0);
                driver_.ok(driver_.cuMemRelease(handle));
                driver_.ok(error);
                mapped_ += piece;
            }
            std::vector<Access> access;
            for (const int device : devices)
                if (access.empty() || access.back().location.id != device) access.push_back({{1, device}, 3});
            driver_.ok(driver_.cuMemSetAccess(address_, size_, access.data(), access.size()));
        } catch (...) {
            end();
            throw;
        }
    }
    Mapping(const Mapping &) = delete;
    ~Mapping() { end(); }
    Address address() const { return address_; }
    std::uint64_t size() const { return size_; }

    static std::uint64_t unit(const Driver &driver, int device) {
        Properties properties;
        properties.location.id = device;
        std::size_t unit = 0;
        driver.ok(driver.cuMemGetAllocationGranularity(&unit, &properties, 0));
        return unit;
    }

private:
    void end() {
        if (mapped_ != 0) driver_.cuMemUnmap(address_, mapped_);
        if (size_ != 0) driver_.cuMemAddressFree(address_, size_);
    }

    const Driver &driver_;
    std::uint64_t piece_, size_ = 0, mapped_ = 0;
    Address address_ = 0;
};

// Memory of a kind:
//   pageable     the process's own
//   pinned:0     of the host, by CUDA in the context of device 0
//   device:1     of device 1
//   managed:0    what CUDA moves between host and device
//   vmm:0        of cuMemCreate, in one piece
//   pieces:0     the same in several pieces, none longer than has to be
class Buffer {
public:
    Buffer(const std::string &kind, std::uint64_t length) : kind_(kind), length_(length) {
        const auto colon = kind.find(':');
        if (colon == std::string::npos) {
            host_ = std::make_unique<Memory>(length);
            address_ = reinterpret_cast<Address>(host_->data());
            return;
        }
        driver_ = Driver::get();
        if (driver_ == nullptr) throw std::runtime_error("no CUDA for " + kind);
        device_ = std::stoi(kind.substr(colon + 1));
        context_ = std::make_unique<Context>(*driver_, device_);
        const auto entered = context_->enter();
        const std::string what = kind.substr(0, colon);
        if (what == "pinned") {
            void *pinned = nullptr;
            driver_->ok(driver_->cuMemHostAlloc(&pinned, length, 0));
            address_ = reinterpret_cast<Address>(pinned);
        } else if (what == "device") {
            driver_->ok(driver_->cuMemAlloc_v2(&address_, length));
        } else if (what == "managed") {
            driver_->ok(driver_->cuMemAllocManaged(&address_, length, 1));
        } else if (what == "vmm" || what == "pieces") {
            const std::uint64_t unit = Mapping::unit(*driver_, device_), whole = rounded(length, unit);
            mapping_ = what == "vmm" ? std::make_unique<Mapping>(*driver_, std::vector<int>{device_}, whole)
                                     : std::make_unique<Mapping>(*driver_, std::vector<int>(whole / unit, device_), unit);
            address_ = mapping_->address();
        } else {
            throw std::runtime_error("no memory of kind " + kind);
        }
        set(0, length, 0);
    }
    Buffer(const Buffer &) = delete;
    ~Buffer() {
        if (!context_) return;
        // What is wrong with the context shows in other ways.
        if (driver_->cuCtxPushCurrent_v2(context_->raw()) != 0) return;
        if (mapping_) mapping_.reset();
        else if (kind_.rfind("pinned", 0) == 0) driver_->cuMemFreeHost(data());
        else driver_->cuMemFree_v2(address_);
        Handle popped = nullptr;
        driver_->cuCtxPopCurrent_v2(&popped);
    }

    const std::string &kind() const { return kind_; }
    // Whether it is a GPU's alone, and so its location is that GPU.
    bool on_device() const { return mapping_ || kind_.rfind("device", 0) == 0; }
    int device() const { return device_; }
    Address address() const { return address_; }
    void *data() const { return reinterpret_cast<void *>(address_); }
    std::uint64_t size() const { return length_; }

    // Writes places `at` and on of pattern `seed`. When it returns, any process and any copy sees it.
    void fill(std::uint64_t offset, std::uint64_t length, std::uint64_t seed, std::uint64_t at) const {
        if (!by_copy()) return pattern_fill(static_cast<unsigned char *>(data()) + offset, length, seed, at);
        std::vector<unsigned char> bytes(length);
        pattern_fill(bytes.data(), length, seed, at);
        const auto entered = context_->enter();
        driver_->ok(driver_->cuMemcpyHtoD_v2(address_ + offset, bytes.data(), length));
        driver_->ok(driver_->cuCtxSynchronize());
    }
    // Every byte the same.
    void set(std::uint64_t offset, std::uint64_t length, unsigned char value) const {
        if (!by_copy()) {
            std::memset(static_cast<unsigned char *>(data()) + offset, value, length);
            return;
        }
        const auto entered = context_->enter();
        driver_->ok(driver_->cuMemsetD8_v2(address_ + offset, value, length));
        driver_->ok(driver_->cuCtxSynchronize());
    }
    // That a range is as pattern `seed` from place `at` on. Waits for nothing but its own copy.
    testing::AssertionResult is(std::uint64_t offset, std::uint64_t length, std::uint64_t seed, std::uint64_t at) const {
        const unsigned char *bytes = static_cast<unsigned char *>(data()) + offset;
        std::vector<unsigned char> copied;
        if (by_copy()) {
            copied.resize(length);
            const auto entered = context_->enter();
            driver_->ok(driver_->cuMemcpyDtoH_v2(copied.data(), address_ + offset, length));
            bytes = copied.data();
        }
        const std::uint64_t first = pattern_differs(bytes, length, seed, at);
        if (first == length) return testing::AssertionSuccess();
        return testing::AssertionFailure() << "byte " << offset + first << " of " << kind_ << " is " << int(bytes[first])
                                           << ", not " << int(pattern_byte(seed, at + first));
    }

private:
    bool by_copy() const { return context_ && kind_.rfind("pinned", 0) != 0; }

    std::string kind_;
    std::uint64_t length_;
    const Driver *driver_ = nullptr;
    int device_ = -1;
    Address address_ = 0;
    std::unique_ptr<Memory> host_;
    std::unique_ptr<Context> context_;
    std::unique_ptr<Mapping> mapping_;
};

// What the fake driver counts and has to be as it was before. Of a real one: which contexts there are.
inline std::string state(const Driver &driver) {
    std::string said;
    for (int device = 0; device < driver.devices(); ++device) {
        unsigned flags = 0;
        int active = 0;
        driver.ok(driver.cuDevicePrimaryCtxGetState(device, &flags, &active));
        said += "GPU " + std::to_string(device) + (active ? " has a context, " : " has none, ");
    }
    if (!driver.fake()) return said;
    const auto counts = driver.counts();
    for (int device = 0; device < driver.devices(); ++device)
        said += "its context is retained " + std::to_string(counts.retained[device]) + " times, " +
                std::to_string(counts.device_bytes[device]) + " bytes of GPU " + std::to_string(device) + " are used, ";
    const auto add = [&said](const char *what, std::int64_t count) { said += std::to_string(count) + " " + what + ", "; };
    add("allocations", counts.allocations);
    add("streams", counts.streams);
    add("events", counts.events);
    add("imports", counts.imports);
    add("bytes pinned", counts.pinned_bytes);
    return said;
}

// What must not have happened. `pageable` is a matter of speed, the others of memory.
inline std::string misdeeds(const Driver &driver) {
    const auto counts = driver.counts();
    if (counts.pageable + counts.wild + counts.freed_in_use + counts.left == 0) return "";
    return std::to_string(counts.pageable) + " copies of pageable memory, " + std::to_string(counts.wild) +
           " copies of memory that was gone, " + std::to_string(counts.freed_in_use) + " times memory was freed in use, " +
           std::to_string(counts.left) + " things were left in contexts that went";
}

} // namespace gpu
