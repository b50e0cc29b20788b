// SPDX-License-Identifier: Apache-2.0
//
// mooncake::EfaTransport on mooncake_efa.h, against Mooncake's own header: takes the place of the sources
// of Mooncake's target efa_transport (cmake/MooncakeEfaDropIn.cmake).

#include "transport/efa_transport/efa_transport.h"

#include <glog/logging.h>
#include <jsoncpp/json/json.h>

#include <algorithm>
#include <utility>

#include "adapter.h"
#include "common.h"
#include "error.h"
#include "memory_location.h"

namespace mooncake {
namespace adapter = mooncake_efa::adapter;
using adapter::Adapter;

namespace {

using Slice = Transport::Slice;
using SegmentDesc = TransferMetadata::SegmentDesc;
using HandShakeDesc = TransferMetadata::HandShakeDesc;

void to_glog(int level, const char *text) noexcept {
    switch (level) {
        case 1: LOG(ERROR) << "EfaTransport: " << text; break;
        case 2: LOG(WARNING) << "EfaTransport: " << text; break;
        case 3: LOG(INFO) << "EfaTransport: " << text; break;
        default: VLOG(level - 3) << "EfaTransport: " << text; break;
    }
}

const SegmentDesc &as_segment(const std::shared_ptr<void> &descriptor) {
    return *static_cast<const SegmentDesc *>(descriptor.get());
}

} // namespace

// Mooncake's header only declares this class, and holds a list of shared pointers to it: it is where our
// state has its place. There is one for all NICs.
class EfaContext final : public mooncake_efa::adapter::Host {
public:
    EfaContext(std::shared_ptr<TransferMetadata> metadata, std::string name)
        : metadata_(std::move(metadata)), name_(std::move(name)), adapter(*this) {}

    std::shared_ptr<void> segment(std::uint64_t id) override { return metadata_->getSegmentDescByID(id); }

    std::optional<std::uint64_t> segment_id(const std::string &name) override {
        if (!metadata_->getSegmentDescByName(name)) return std::nullopt;
        return metadata_->getSegmentID(name);
    }

    std::shared_ptr<void> fetch(const std::string &name) override {
        return metadata_->getSegmentDescByName(name, true);
    }

    std::string segment_json(const std::shared_ptr<void> &descriptor) override {
        const SegmentDesc &desc = as_segment(descriptor);
        Json::Value json;
        json["name"] = desc.name;
        json["protocol"] = desc.protocol;
        if (!desc.rdma_server_name.empty()) json["rdma_server_name"] = desc.rdma_server_name;
        json["devices"] = json["buffers"] = Json::Value(Json::arrayValue);
        for (const auto &device : desc.devices) {
            Json::Value one;
            one["name"] = device.name;
            one["lid"] = device.lid;
            one["gid"] = device.gid;
            json["devices"].append(one);
        }
        for (const auto &buffer : desc.buffers) {
            Json::Value one;
            one["name"] = buffer.name;
            one["addr"] = Json::UInt64(buffer.addr);
            one["length"] = Json::UInt64(buffer.length);
            one["rkey"] = one["lkey"] = Json::Value(Json::arrayValue);
            for (const auto key : buffer.rkey) one["rkey"].append(Json::UInt64(key));
            for (const auto key : buffer.lkey) one["lkey"].append(Json::UInt64(key));
            json["buffers"].append(one);
        }
        json["priority_matrix"] = desc.topology.toJson();
        return Json::FastWriter().write(json);
    }

    int publish(const mefa_segment_desc &ours, bool advertise) override {
        auto desc = std::make_shared<SegmentDesc>();
        desc->name = name_;
        desc->protocol = "efa";
        desc->tcp_data_port = 0;
        for (size_t i = 0; i < ours.device_count; ++i) {
            TransferMetadata::DeviceDesc device = {};
            device.name = ours.devices[i].name;
            device.lid = ours.devices[i].lid;
            device.gid = ours.devices[i].gid;
            desc->devices.push_back(std::move(device));
        }
        for (size_t i = 0; i < ours.buffer_count; ++i) {
            const mefa_buffer &buffer = ours.buffers[i];
            TransferMetadata::BufferDesc one = {};
            one.name = buffer.name;
            one.addr = buffer.address;
            one.length = buffer.length;
            one.rkey.assign(buffer.rkeys, buffer.rkeys + buffer.rkey_count);
            // Local keys stay inside the library; a receiver wants as many as there are NICs.
            one.lkey.assign(buffer.rkey_count, 0);
            desc->buffers.push_back(std::move(one));
        }
        if (ours.topology_json != nullptr) desc->topology.parse(ours.topology_json);
        const int code = metadata_->addLocalSegment(LOCAL_SEGMENT_ID, name_, std::move(desc));
        return code != 0 || !advertise ? code : metadata_->updateLocalSegmentDesc();
    }

    int handshake(const char *server, const mefa_handshake &ours, const adapter::Answered &answered) override {
        return adapter::shake_hands<HandShakeDesc>(ours, answered, [&](const HandShakeDesc &request, HandShakeDesc &answer) {
            return metadata_->sendHandshake(server, request, answer);
        });
    }

    void finished(const mefa_completion *completions, size_t count) noexcept override {
        for (const mefa_completion *it = completions; it != completions + count; ++it) {
            auto *slice = reinterpret_cast<Slice *>(it->cookie);
            // From here on the task, and the slice with it, may be gone.
            if (it->status == MEFA_STATUS_COMPLETED)
                slice->markSuccess();
            else
                slice->markFailed();
        }
    }

private:
    std::shared_ptr<TransferMetadata> metadata_;
    std::string name_;

public:
    // Last: its end may still call the rest.
    Adapter adapter;
};

static void end_all(std::vector<std::shared_ptr<EfaContext>> &contexts) {
    for (auto &context : contexts) adapter::end(std::move(context));
    contexts.clear();
}

EfaTransport::EfaTransport() {
    LOG(INFO) << "[EFA] AWS Elastic Fabric Adapter transport initialized (mooncake-efa " << mefa_version()
              << ")";
}

EfaTransport::~EfaTransport() {
    end_all(context_list_);
    if (metadata_) metadata_->removeSegmentDesc(local_server_name_);
    batch_desc_set_.clear();
}

int EfaTransport::install(std::string &local_server_name, std::shared_ptr<TransferMetadata> meta,
                          std::shared_ptr<Topology> topo) {
    if (topo == nullptr) {
        LOG(ERROR) << "EfaTransport: missing topology";
        return ERR_INVALID_ARGUMENT;
    }
    metadata_ = meta;
    local_server_name_ = local_server_name;
    local_topology_ = topo;
    adapter::log_to(to_glog);
    int code = initializeEfaResources();
    if (code == 0) code = allocateLocalSegmentID();
    if (code == 0) code = startHandshakeDaemon(local_server_name);
    // Advertised last: from then on peers may call.
    if (code == 0) code = context_list_.front()->adapter.publish(true);
    if (code != 0) end_all(context_list_);
    return code;
}

int EfaTransport::initializeEfaResources() {
    auto context = std::make_shared<EfaContext>(metadata_, local_server_name_);
    const int code = context->adapter.install(local_server_name_, local_topology_->toString());
    if (code != 0) return code;
    // The engine's own topology tells no more than what is in use.
    const auto &nics = context->adapter.nics();
    const std::vector<std::string> all = local_topology_->getHcaList();
    for (const std::string &name : all)
        if (std::find(nics.begin(), nics.end(), name) == nics.end()) local_topology_->disableDevice(name);
    context_list_.push_back(std::move(context));
    return 0;
}

int EfaTransport::allocateLocalSegmentID() { return context_list_.front()->adapter.publish(false); }

int EfaTransport::startHandshakeDaemon(std::string &) {
    const auto &rpc = metadata_->localRpcMeta();
    // They come on a thread of the metadata's, which outlives us.
    const std::weak_ptr<EfaContext> ours = context_list_.front();
    const int code = metadata_->startHandshakeDaemon(
        [ours](const HandShakeDesc &peer, HandShakeDesc &local) {
            const auto context = ours.lock();
            return context ? context->adapter.answer(peer, local) : ERR_ENDPOINT;
        },
        rpc.rpc_port, rpc.sockfd);
    if (code != 0)
        LOG(ERROR) << "EfaTransport: handshakes cannot be received on port " << rpc.rpc_port << " (" << code << ")";
    return code;
}

int EfaTransport::onSetupEfaConnections(const HandShakeDesc &peer_desc, HandShakeDesc &local_desc) {
    if (context_list_.empty()) return ERR_ENDPOINT;
    return context_list_.front()->adapter.answer(peer_desc, local_desc);
}

int EfaTransport::registerLocalMemory(void *addr, size_t length, const std::string &location, bool,
                                      bool update_metadata) {
    if (context_list_.empty()) return ERR_CONTEXT;
    return context_list_.front()->adapter.add_memory({{addr, length, location.c_str()}}, update_metadata);
}

int EfaTransport::registerLocalMemoryBatch(const std::vector<BufferEntry> &buffer_list,
                                           const std::string &location) {
    if (context_list_.empty()) return ERR_CONTEXT;
    return context_list_.front()->adapter.add_memory(buffer_list, location);
}

int EfaTransport::unregisterLocalMemory(void *addr, bool update_metadata) {
    if (context_list_.empty()) return ERR_CONTEXT;
    return context_list_.front()->adapter.remove_memory({addr}, update_metadata);
}

int EfaTransport::unregisterLocalMemoryBatch(const std::vector<void *> &addr_list) {
    if (context_list_.empty()) return ERR_CONTEXT;
    return context_list_.front()->adapter.remove_memory(addr_list, true);
}

int EfaTransport::warmupSegment(const std::string &segment_name) {
    if (context_list_.empty()) return ERR_INVALID_ARGUMENT;
    return context_list_.front()->adapter.warm_up(segment_name);
}

Status EfaTransport::submitTransfer(BatchID batch_id, const std::vector<TransferRequest> &entries) {
    BatchDesc &batch = toBatchDesc(batch_id);
    const size_t first = batch.task_list.size();
    if (first + entries.size() > batch.batch_size) {
        return Status::InvalidArgument("EfaTransport: Exceed the limitation of capacity, batch id: " +
                                       std::to_string(batch_id));
    }
    batch.task_list.resize(first + entries.size());
    std::vector<TransferTask *> tasks;
    for (size_t i = 0; i < entries.size(); ++i) {
        TransferTask &task = batch.task_list[first + i];
        task.batch_id = batch_id;
        task.request = &entries[i];
        tasks.push_back(&task);
    }
    return submitTransferTask(tasks);
}

Status EfaTransport::submitTransferTask(const std::vector<TransferTask *> &task_list) {
    if (context_list_.empty()) return Status::Context("EfaTransport: not installed");
    thread_local std::vector<mefa_request> requests;
    requests.clear();
    for (TransferTask *task : task_list) {
        const TransferRequest &request = *task->request;
        Slice *slice = getSliceCache().allocate();
        slice->peer_nic_path.clear();
        slice->source_addr = request.source;
        slice->length = request.length;
        slice->opcode = request.opcode;
        slice->target_id = request.target_id;
        slice->rdma.dest_addr = request.target_offset;
        slice->task = task;
        slice->status = Slice::PENDING;
        slice->ts = 0;
        task->slice_list.push_back(slice);
        task->total_bytes += request.length;
        __atomic_fetch_add(&task->slice_count, 1, __ATOMIC_RELAXED);
        requests.push_back({request.opcode == TransferRequest::READ ? MEFA_READ : MEFA_WRITE, 0,
                            reinterpret_cast<std::uintptr_t>(request.source), request.target_id,
                            request.target_offset, request.length,
                            reinterpret_cast<std::uintptr_t>(slice)});
    }
    const int code = context_list_.front()->adapter.submit(requests);
    if (code != 0) {
        const Status status(static_cast<Status::Code>(adapter::status_of(code)), Adapter::error());
        // None was started: all end here, so that the batch can be freed without a look at them.
        for (TransferTask *task : task_list) task->is_finished = true;
        for (const mefa_request &request : requests) reinterpret_cast<Slice *>(request.cookie)->markFailed();
        return status;
    }
    return Status::OK();
}

Status EfaTransport::getTransferStatus(BatchID batch_id, size_t task_id, TransferStatus &status) {
    BatchDesc &batch = toBatchDesc(batch_id);
    if (task_id >= batch.task_list.size()) {
        return Status::InvalidArgument("EfaTransport: no such task, batch id: " + std::to_string(batch_id));
    }
    TransferTask &task = batch.task_list[task_id];
    const auto ended = [&] {
        const uint64_t failed = __atomic_load_n(&task.failed_slice_count, __ATOMIC_ACQUIRE);
        const uint64_t done = failed + __atomic_load_n(&task.success_slice_count, __ATOMIC_ACQUIRE);
        status.s = done != task.slice_count ? WAITING : failed != 0 ? FAILED : COMPLETED;
        return status.s != WAITING;
    };
    if (!ended() && !context_list_.empty()) {
        context_list_.front()->adapter.progress();
        ended();
    }
    status.transferred_bytes = task.transferred_bytes;
    if (status.s != WAITING) task.is_finished = true;
    return Status::OK();
}

Status EfaTransport::getTransferStatus(BatchID batch_id, std::vector<TransferStatus> &status) {
    status.resize(toBatchDesc(batch_id).task_list.size());
    for (size_t i = 0; i < status.size(); ++i) {
        const Status result = getTransferStatus(batch_id, i, status[i]);
        if (!result.ok()) return result;
    }
    return Status::OK();
}

EfaTransport::SegmentID EfaTransport::getSegmentID(const std::string &segment_name) {
    return metadata_->getSegmentID(segment_name);
}

// The rest is for Mooncake's tests and other callers; the library chooses NICs by itself.

#ifdef MOONCAKE_EFA_LOCAL_NIC_MAP
std::unordered_map<std::string, std::vector<size_t>> EfaTransport::buildLocalNicMap(
    const TopologyMatrix &matrix, const std::vector<std::string> &device_names) {
    std::unordered_map<std::string, std::vector<size_t>> map;
    for (const auto &[location, entry] : matrix) {
        std::vector<size_t> nics;
        for (size_t i = 0; i < device_names.size(); ++i) {
            const auto &near = entry.preferred_hca;
            if (std::find(near.begin(), near.end(), device_names[i]) != near.end()) nics.push_back(i);
        }
        if (!nics.empty()) map.emplace(location, std::move(nics));
    }
    return map;
}
#endif

int EfaTransport::selectDevice(SegmentDesc *desc, uint64_t offset, size_t length, std::string_view hint,
                               int &buffer_id, int &device_id, int retry_cnt) {
    if (desc == nullptr) return ERR_ADDRESS_NOT_REGISTERED;
    const auto pick = [&](const std::string &location, int attempt) {
        return hint.empty() ? desc->topology.selectDevice(location, attempt)
                            : desc->topology.selectDevice(location, hint, attempt);
    };
    for (size_t index = 0; index < desc->buffers.size(); ++index) {
        const auto &buffer = desc->buffers[index];
        if (offset < buffer.addr || length > buffer.length || offset - buffer.addr > buffer.length - length)
            continue;
        for (size_t attempt = 0; attempt < desc->devices.size(); ++attempt) {
            for (const std::string &location : {buffer.name, std::string(kWildcardLocation)}) {
                const int device = pick(location, retry_cnt + int(attempt));
                if (device < 0 || size_t(device) >= buffer.rkey.size() || buffer.rkey[device] == 0) continue;
                buffer_id = int(index);
                device_id = device;
                return 0;
            }
        }
    }
    return ERR_ADDRESS_NOT_REGISTERED;
}

int EfaTransport::selectDevice(SegmentDesc *desc, uint64_t offset, size_t length, int &buffer_id,
                               int &device_id, int retry_cnt) {
    return selectDevice(desc, offset, length, std::string_view(), buffer_id, device_id, retry_cnt);
}

} // namespace mooncake
