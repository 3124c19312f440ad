// SPDX-License-Identifier: BSD-3-Clause
// A grid: blocks and their start values, clusters in turn, the scheduler of warps, deadlocks.
#include <algorithm>
#include <cstring>
#include <map>
#include <numeric>

#include "decode.h"
#include "machine.h"

namespace hopper_sim {

u32 Cta::threads() const { return grid().shape.block_threads(); }
Grid& Cta::grid() const { return *cluster->grid; }

std::string Cta::name_of(u32 offset) const {
    std::string text = format("0x%x", offset);
    for (const NamedRange& range : grid().smem_names)
        if (offset >= range.offset && offset < range.offset + range.bytes)
            return text + " (" + range.name + format(" + 0x%x)", offset - range.offset);
    return text;
}

bool Cluster::done() const {
    return std::all_of(ctas.begin(), ctas.end(), [](auto& cta) { return cta->live_warps == 0; });
}

namespace {

// Registers of a thread at launch: as ptxas sets them in kernels with setmaxnreg.
u32 launch_registers(const Kernel& kernel, u32 threads) {
    if (kernel.max_registers) return (kernel.max_registers + 7) / 8 * 8;
    if (!kernel.largest_setmaxnreg) return 255;
    u32 block = kernel.max_threads ? kernel.max_threads : threads;
    u32 share = 65536 / (block * std::max(kernel.min_blocks, 1u)) / 8 * 8;
    return std::min({kernel.largest_setmaxnreg, share, 255u});
}

u64 special_value(const Cta& cta, u32 id, u32 thread) {
    const LaunchShape& s = cta.grid().shape;
    u32 axis = id < kClusterCtarank ? (id - kTid) % 3 : 0;
    u32 lane = thread % kWarpSize;
    switch (id - (id < kClusterCtarank ? axis : 0)) {
        case kTid: {
            u32 position[3] = {thread % s.block[0], thread / s.block[0] % s.block[1],
                               thread / s.block[0] / s.block[1]};
            return position[axis];
        }
        case kNtid:
            return s.block[axis];
        case kCtaid:
            return cta.index[axis];
        case kNctaid:
            return s.grid[axis];
        case kClusterCtaid:
            return cta.index[axis] % s.cluster[axis];
        case kClusterNctaid:
            return s.cluster[axis];
        case kClusterid:
            return cta.index[axis] / s.cluster[axis];
        case kNclusterid:
            return s.grid[axis] / s.cluster[axis];
        case kClusterCtarank:
            return cta.rank;
        case kClusterNctarank:
            return s.cluster_blocks();
        case kLaneid:
            return lane;
        case kWarpid:
            return thread / kWarpSize;
        case kNwarpid:
            return cta.warps.size();
        case kNsmid:
            return cta.grid().config.sms;
        case kLanemaskEq:
            return 1u << lane;
        case kLanemaskLt:
            return (1u << lane) - 1;
        case kLanemaskLe:
            return (2u << lane) - 1;
        case kLanemaskGt:
            return ~((2u << lane) - 1);
        case kLanemaskGe:
            return ~((1u << lane) - 1);
        case kDynamicSmemSize:
            return s.dynamic_smem;
        case kTotalSmemSize:
            return cta.smem_end;
        default:
            return 0;  // %smid; clocks stand still
    }
}

u64 start_value(const Cta& cta, const StartValue& value, u32 thread) {
    switch (value.kind) {
        case StartValue::special_register:
            return special_value(cta, value.value, thread);
        case StartValue::shared_symbol:
            return value.value | static_cast<u64>(cta.rank) << kRankShift;
        default:
            return reinterpret_cast<u64>(cta.grid().parameters) + value.value;
    }
}

void start_warp(Cta& cta, u32 id, u8* registers) {
    const Kernel& kernel = *cta.grid().kernel;
    Warp& w = cta.warps[id];
    w.cta = &cta;
    w.id = id;
    w.registers = registers;
    u32 lanes = std::min(kWarpSize, cta.threads() - id * kWarpSize);
    w.alive = lanes == kWarpSize ? kAllLanes : (1u << lanes) - 1;
    w.lanes = w.alive;
    Agents& agents = cta.cluster->agents;
    w.agent = agents.add(&w);
    w.copy_agent = agents.add(&w);
    w.wgmma_agent = id % 4 == 0 ? agents.add(&w) : cta.warps[id / 4 * 4].wgmma_agent;
    w.next_epoch();
    if (cta.grid().config.check) w.tags.resize(kernel.tagged_registers);
    w.splits.push_back({0, w.alive, false, {}});
    w.register_count = launch_registers(kernel, cta.threads());
    std::memcpy(registers, kernel.register_image.data(), kernel.register_image.size());
    for (const StartValue& value : kernel.start_values)
        for (u32 lane = 0; lane < kWarpSize; ++lane) {
            u64 bits = start_value(cta, value, id * kWarpSize + lane);
            std::memcpy(registers + value.slot + lane * value.register_bytes, &bits,
                        value.register_bytes);
        }
}

u8* aligned(std::unique_ptr<u8[]>& storage, size_t bytes) {
    constexpr size_t kAlignment = 128;
    storage.reset(new u8[bytes + kAlignment]);
    u64 address = reinterpret_cast<u64>(storage.get());
    return storage.get() + (kAlignment - address % kAlignment) % kAlignment;
}

std::unique_ptr<Cta> start_cta(Cluster& cluster, const u32 (&index)[3]) {
    const Kernel& kernel = *cluster.grid->kernel;
    auto cta = std::make_unique<Cta>();
    cta->cluster = &cluster;
    cta->rank = static_cast<u32>(cluster.ctas.size());
    std::memcpy(cta->index, index, sizeof index);
    const u32(&grid)[3] = cluster.grid->shape.grid;
    cta->global.number = index[0] + grid[0] * (index[1] + grid[1] * index[2]);
    cta->smem_end = kernel.dynamic_offset + cluster.grid->shape.dynamic_smem;
    cta->smem.reset(new u8[cta->smem_end + kPieceBytes]);
    std::memset(cta->smem.get(), 0xff, cta->smem_end + kPieceBytes);
    const Config& config = cluster.grid->config;
    if (config.check) cta->shadow = std::make_unique<Shadow>(*cta, cta->smem_end, config.races);
    u32 warps = (cta->threads() + kWarpSize - 1) / kWarpSize;
    cta->live_warps = warps;
    cta->warps.resize(warps);
    size_t registers = (kernel.register_image.size() + 63) / 64 * 64;
    u8* storage = aligned(cta->register_storage, registers * warps);
    if (kernel.local_bytes) {
        size_t bytes = static_cast<size_t>(kernel.local_bytes) * kWarpSize * warps;
        cta->local_storage.reset(new u8[bytes]);
        std::memset(cta->local_storage.get(), 0xff, bytes);
    }
    for (u32 id = 0; id < warps; ++id) start_warp(*cta, id, storage + registers * id);
    return cta;
}

class Scheduler {
  public:
    Scheduler(Grid& grid) : grid_(grid) {
        for (u32 axis = 0; axis < 3; ++axis)
            clusters_[axis] = grid.shape.grid[axis] / grid.shape.cluster[axis];
        order_.resize(static_cast<size_t>(clusters_[0]) * clusters_[1] * clusters_[2]);
        std::iota(order_.begin(), order_.end(), 0);
        if (grid.config.cta_order == CtaOrder::backward) std::reverse(order_.begin(), order_.end());
        if (grid.config.cta_order == CtaOrder::random)
            std::shuffle(order_.begin(), order_.end(), grid.random);
    }

    void run() {
        while (next_ < order_.size() || !active_.empty()) {
            while (active_.size() < grid_.config.coresident && next_ < order_.size())
                start_cluster(order_[next_++]);
            bool progress = false;
            for (auto& cluster : active_) progress |= run_cluster(*cluster);
            retire();
            if (instructions_ > grid_.config.budget)
                throw Error(kLaunchTimeout,
                            "the instruction budget is spent (a livelock?)" + waits());
            bool patient = ++rounds_ % kPatience != 0;
            if (progress && patient) continue;
            if (!complete_something() && !progress)
                throw Error(kLaunchTimeout, "deadlock" + waits());
        }
    }

  private:
    void start_cluster(u64 number) {
        auto cluster = std::make_unique<Cluster>();
        cluster->grid = &grid_;
        const LaunchShape& s = grid_.shape;
        u32 place[3] = {static_cast<u32>(number % clusters_[0]),
                        static_cast<u32>(number / clusters_[0] % clusters_[1]),
                        static_cast<u32>(number / clusters_[0] / clusters_[1])};
        for (u32 z = 0; z < s.cluster[2]; ++z)
            for (u32 y = 0; y < s.cluster[1]; ++y)
                for (u32 x = 0; x < s.cluster[0]; ++x)
                    cluster->ctas.push_back(start_cta(
                        *cluster, {place[0] * s.cluster[0] + x, place[1] * s.cluster[1] + y,
                                   place[2] * s.cluster[2] + z}));
        active_.push_back(std::move(cluster));
    }

    bool starved(const Warp& w) const { return w.id < 64 && grid_.config.starve >> w.id & 1; }

    bool run_cluster(Cluster& cluster) {
        std::vector<Warp*> favoured, starving;
        for (auto& cta : cluster.ctas)
            for (Warp& w : cta->warps)
                if (!w.done()) (starved(w) ? starving : favoured).push_back(&w);
        bool random = grid_.config.policy == Policy::random;
        if (random) std::shuffle(favoured.begin(), favoured.end(), grid_.random);
        bool progress = run_warps(cluster, favoured);
        bool patient = rounds_ % kPatience != 0;
        if (progress && patient) return true;
        return run_warps(cluster, starving) || progress;
    }

    bool run_warps(Cluster& cluster, const std::vector<Warp*>& warps) {
        bool random = grid_.config.policy == Policy::random, progress = false;
        for (Warp* w : warps) {
            u32 quantum = random ? 1 + static_cast<u32>(grid_.draw(grid_.config.quantum))
                                 : grid_.config.quantum;
            u64 before = w->instructions;
            RunResult result = run_warp(*w, quantum);
            instructions_ += w->instructions - before;
            progress |= w->instructions != before || result == RunResult::done;
            if (result == RunResult::done) leave(*w);
            if (random && grid_.draw(4) == 0) progress |= advance_one(cluster);
        }
        return progress;
    }

    // Registers go back to the pool by setmaxnreg.dec only.
    void leave(Warp& w) {
        --w.cta->live_warps;
        Statistics& statistics = grid_.report->statistics;
        statistics.role(w.id).instructions += w.instructions;
        statistics.ticks = std::max(statistics.ticks, w.now());
    }

    bool complete_something() {
        for (auto& cluster : active_)
            if (advance_one(*cluster)) return true;
        return false;
    }

    void retire() {
        for (size_t n = active_.size(); n-- > 0;) {
            Cluster& cluster = *active_[n];
            if (!cluster.done()) continue;
            while (!cluster.in_flight.empty()) advance_one(cluster);
            active_.erase(active_.begin() + static_cast<long>(n));
        }
    }

    std::string waits() const {
        std::string text;
        for (auto& cluster : active_)
            for (auto& cta : cluster->ctas) text += waits(*cta);
        return text;
    }

    // What the warps of a block wait for; those that wait for the same in one paragraph.
    std::string waits(const Cta& cta) const {
        std::string text;
        std::map<std::pair<u32, std::string>, std::vector<const Warp*>> groups;
        for (const Warp& w : cta.warps)
            for (const Split& split : w.splits)
                groups[{split.pc, format("lanes 0x%x: ", split.mask) + describe_wait(w, split)}]
                    .push_back(&w);
        for (auto& [what, warps] : groups) {
            text += "\n  " + place(*warps.front(), grid_.kernel->code[what.first]);
            if (warps.size() > 1) text += "\n    and warps";
            for (size_t n = 1; n < warps.size(); ++n) text += format(" %u", warps[n]->id);
            text += "\n    " + what.second;
        }
        return text;
    }

    // Rounds until what a policy holds back goes on although others can run: they may only spin.
    static constexpr u64 kPatience = 100;

    Grid& grid_;
    u32 clusters_[3];
    u64 rounds_ = 0;
    std::vector<u64> order_;
    size_t next_ = 0;
    std::vector<std::unique_ptr<Cluster>> active_;
    u64 instructions_ = 0;

  public:
    u64 instructions() const { return instructions_; }
};

}  // namespace

void launch(const Kernel& kernel, const LaunchShape& shape, const u8* parameters,
            const Config& config, const std::vector<NamedRange>& smem_names, LaunchReport& report) {
    Grid grid;
    grid.kernel = &kernel;
    grid.shape = shape;
    grid.parameters = parameters;
    grid.config = config;
    grid.smem_names = smem_names;
    grid.report = &report;
    grid.random.seed(config.seed);
    if (config.check) grid.global = std::make_unique<GlobalOrder>(shape.programmatic, config.races,
                                                    config.ordered_sums);
    if (config.coverage) grid.coverage.resize(kernel.code.size());
    Scheduler scheduler(grid);
    auto finish = [&] {
        report.statistics.warp_instructions = scheduler.instructions();
        for (size_t n = 0; n < grid.coverage.size(); ++n)
            report.statistics.coverage[kernel.code[n].line] += grid.coverage[n];
    };
    try {
        scheduler.run();
    } catch (...) {
        finish();
        throw;
    }
    finish();
    if (grid.global) grid.global->finish();
}

}  // namespace hopper_sim
