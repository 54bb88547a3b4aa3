// What the warpgroups of the prefill for Hopper share, and the one of them that gathers: it copies keys and values, the rows of
// far lists one by one, into a ring of tiles in shared memory.
#ifndef EXPRESS_SRC_CUDA_PREFILL_SM90_CUH_
#define EXPRESS_SRC_CUDA_PREFILL_SM90_CUH_

#include <algorithm>

#include "src/cuda/hopper.cuh"
#include "src/cuda/prefill.cuh"

namespace express::cuda::sm90 {

inline constexpr int kConsumers = 2;  // warpgroups of 64 query rows
inline constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
inline constexpr int kRows = kConsumers * 64;
inline constexpr int kKeys = 128;  // of a tile
inline constexpr int kStages = 2;
inline constexpr int kProducerRegisters = 104, kConsumerRegisters = 200;
static_assert(kWarpgroup * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 64 * 1024);

// A tile of `kCount` rows of kDim elements: panels of 64 elements, each (kCount, 128 bytes), swizzled as SharedMatrix says.
template <int kDim, int kCount>
struct Tile {
  static constexpr int kPieces = kDim / 8;  // of 16 bytes, of a row
  static constexpr uint32_t kPanel = kCount * 128, kBytes = kDim / 64 * kPanel;
  static __device__ __forceinline__ uint32_t At(int row, int piece) {
    return static_cast<uint32_t>(piece / 8) * kPanel + static_cast<uint32_t>(row * 128 + ((piece ^ row) & 7) * 16);
  }
};

// What the warpgroups that multiply do with the queries of one buffer.
struct __align__(16) Work {
  int32_t tiles;      // 0: no more work
  int32_t far_count;  // keys with a bias are the first
  int32_t away;       // key j is seen by query row r if j <= r + away
  int32_t rows;
  int64_t first;  // row of the prompt
  int32_t query_head, unused;
};

template <int kDim>
struct Memory {
  using Queries = Tile<kDim, kRows>;
  using Keys = Tile<kDim, kKeys>;
  static constexpr uint32_t kQuery = 0;  // (2): one job's queries are fetched while the last one's are in use
  static constexpr uint32_t kKey = kQuery + 2 * Queries::kBytes;
  static constexpr uint32_t kValue = kKey + kStages * Keys::kBytes;
  static constexpr uint32_t kBias = kValue + kStages * Keys::kBytes;  // (kStages, kKeys), over the softmax scale
  static constexpr uint32_t kWork = kBias + kStages * kKeys * sizeof(float);  // (2): of the queries in each buffer
  static constexpr uint32_t kBarriers = kWork + 2 * sizeof(Work);
  static constexpr uint32_t kFrom = kBarriers + 12 * sizeof(uint64_t) + 32;  // (4, kKeys / 2): where rows are, a warp's
  static constexpr uint32_t kBytes = kFrom + 4 * (kKeys / 2) * sizeof(uint64_t);
  static constexpr uint32_t kAligned = 1024;  // and so many bytes more, to begin at a multiple of this
  static_assert(kStages == 2 && kFrom % 16 == 0);

  uint32_t base;  // shared address
  __device__ uint32_t Query(uint32_t buffer) const { return base + kQuery + buffer * Queries::kBytes; }
  __device__ uint32_t Key(uint32_t stage) const { return base + kKey + stage * Keys::kBytes; }
  __device__ uint32_t Value(uint32_t stage) const { return base + kValue + stage * Keys::kBytes; }
  __device__ uint32_t Bias(uint32_t stage) const { return base + kBias + stage * kKeys * 4; }
  __device__ uint32_t WorkOf(uint32_t buffer) const { return base + kWork + buffer * sizeof(Work); }
  __device__ uint32_t From(int warp) const { return base + kFrom + static_cast<uint32_t>(warp) * (kKeys / 2 * 8); }
  __device__ uint32_t Barrier(int which, uint32_t i) const { return base + kBarriers + (which * 2 + i) * 8; }
  __device__ uint32_t QueryFull(uint32_t i) const { return Barrier(0, i); }
  __device__ uint32_t QueryEmpty(uint32_t i) const { return Barrier(1, i); }
  __device__ uint32_t KeyFull(uint32_t i) const { return Barrier(2, i); }
  __device__ uint32_t KeyEmpty(uint32_t i) const { return Barrier(3, i); }
  __device__ uint32_t ValueFull(uint32_t i) const { return Barrier(4, i); }
  __device__ uint32_t ValueEmpty(uint32_t i) const { return Barrier(5, i); }

  __device__ void Init() const {
    constexpr int kReaders = kConsumers * kWarpgroup;
    for (uint32_t i = 0; i < 2; ++i) {
      BarrierInit(QueryFull(i), kWarpgroup + 1);  // copies and what work it is
      BarrierInit(QueryEmpty(i), kReaders);
      BarrierInit(KeyFull(i), kWarpgroup / 2 * 2);  // copies and biases
      BarrierInit(KeyEmpty(i), kReaders);
      BarrierInit(ValueFull(i), kWarpgroup / 2);
      BarrierInit(ValueEmpty(i), kReaders);
    }
  }
};

__device__ __forceinline__ void StoreShared(uint32_t address, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}
__device__ __forceinline__ void StoreShared(uint32_t address, const char* x) {
  asm volatile("st.shared.u64 [%0], %1;" ::"r"(address), "l"(x) : "memory");
}
__device__ __forceinline__ void StoreShared16(uint32_t address, const uint4& x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}
__device__ __forceinline__ float2 LoadShared2(uint32_t address) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
  return x;
}
// Two pointers, from a multiple of 16 bytes on.
__device__ __forceinline__ void LoadShared(const char* (&x)[2], uint32_t address) {
  asm volatile("ld.shared.v2.u64 {%0, %1}, [%2];" : "=l"(x[0]), "=l"(x[1]) : "r"(address) : "memory");
}
__device__ __forceinline__ uint4 LoadShared16(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

// ---- the warpgroup that gathers ----

// Query rows [first, first + rows) of one head. They see the far list of their block, then rows [begin, own row].
struct GatherJob {
  int32_t block;         // of the launch
  int32_t begin, first;  // rows of the prompt
  int32_t rows;          // 0: no job
  int32_t query_head, far_count;
};

// Jobs [begin, end) of one KV head, tile after tile, and the job after the one whose tiles are copied: what it needs from
// memory is asked for long before. Counted up, not divided: the warps that gather are what everything waits for.
class Cursor {
 public:
  static constexpr bool kOneHead = true;
  __device__ Cursor(const PrefillArgs& args, const PrefillHead& head, int32_t kv_head_, int32_t begin, int32_t end)
      : kv_head(kv_head_),
        args_(args),
        far_counts_(head.far_count),
        sinks_(head.sinks),
        tail_(head.tail),
        left_(end - begin) {
    const int32_t row_tiles = RowTiles(), head_tile = begin / row_tiles;
    row_tile_ = begin % row_tiles;
    query_head_ = kv_head * args.group + head_tile % args.group;
    heads_end_ = (kv_head + 1) * args.group;
    block_ = head_tile / args.group;
    FindNext();
  }
  __device__ void NextJob() {
    block = next.block;
    begin = next.begin;
    far_count = next.far_count;
    first = 0;
    count = next.rows == 0 ? 0 : far_count + next.first + next.rows - begin;
    FindNext();
  }
  __device__ bool valid() const { return first < count; }
  __device__ bool last() const { return first + kKeys >= count; }  // tile of the job

  const int32_t kv_head;
  int32_t block, begin, far_count;
  int32_t first, count;  // of the job's keys, [first, first + kKeys) is the tile
  GatherJob next;

 private:
  __device__ int32_t RowTiles() const { return (args_.block + kRows - 1) / kRows; }
  __device__ void FindNext() {
    next.rows = 0;
    while (left_ > 0 && next.rows <= 0) {
      const int64_t block = args_.first_block + block_, start = BlockStart(args_, block);
      const int64_t end = min(BlockStart(args_, block + 1), args_.tokens), first = start + row_tile_ * kRows;
      next = {block_,
              static_cast<int32_t>(FirstKeptRow(args_, sinks_, tail_, start)),
              static_cast<int32_t>(first),
              static_cast<int32_t>(min(end - first, int64_t{kRows})),
              query_head_,
              0};
      if (next.rows > 0 && far_counts_ != nullptr) next.far_count = far_counts_[block_];
      --left_;
      if (++row_tile_ < RowTiles()) continue;
      row_tile_ = 0;
      if (++query_head_ < heads_end_) continue;
      query_head_ -= args_.group;
      ++block_;
    }
    next.rows = max(next.rows, 0);
  }

  const PrefillArgs& args_;
  const int32_t* far_counts_;
  const int32_t sinks_, tail_;
  int32_t left_, row_tile_, query_head_, heads_end_, block_;
};

// The jobs of a launch without heads, of all KV heads: row tiles from the last one on, which sees most, of all query heads each. They
// are dealt out to blocks of threads there and back, so that all blocks get about as much.
class PlainCursor {
 public:
  static constexpr bool kOneHead = false;
  __device__ explicit PlainCursor(const PrefillArgs& args)
      : args_(args),
        heads_(args.kv_heads * args.group),
        row_tiles_(static_cast<int32_t>((args.tokens + kRows - 1) / kRows)) {
    FindNext();
  }
  __device__ void NextJob() {
    kv_head = next.query_head / args_.group;
    first = 0;
    count = next.rows == 0 ? 0 : next.first + next.rows;
    FindNext();
  }
  __device__ bool valid() const { return first < count; }
  __device__ bool last() const { return first + kKeys >= count; }  // tile of the job

  static constexpr int32_t block = 0, begin = 0, far_count = 0;
  int32_t kv_head;
  int32_t first, count;
  GatherJob next;

 private:
  __device__ void FindNext() {
    const auto blocks = static_cast<int32_t>(gridDim.x), own = static_cast<int32_t>(blockIdx.x);
    const int32_t job = round_ * blocks + (round_ % 2 == 0 ? own : blocks - 1 - own);
    ++round_;
    const int32_t row_tile = row_tiles_ - 1 - job / heads_;
    const int32_t rows = static_cast<int32_t>(min(args_.tokens - int64_t{row_tile} * kRows, int64_t{kRows}));
    next = {0, 0, row_tile * kRows, row_tile < 0 ? 0 : rows, job % heads_, 0};
  }

  const PrefillArgs& args_;
  const int32_t heads_, row_tiles_;
  int32_t round_ = 0;
};

// Each warp for itself: two fetch keys, two fetch values, half the rows of a tile each.
template <int kDim>
class Producer {
 public:
  __device__ Producer(const PrefillArgs& args, const PrefillHead& head, const Memory<kDim>& memory)
      : memory_(memory),
        args_(args),
        head_(head),
        slab_(static_cast<const char*>(keys_ ? head.slab_key : head.slab_value)),
        row_bytes_((keys_ ? args.k : args.v).row_stride * 2) {}

  template <class Jobs>
  __device__ void Run(Jobs cursor) {
    int32_t index[kOwn];
    float bias[kOwn];
    int32_t part = 0;  // parts of the next job's queries that are on their way
    LoadQueries(cursor.next, 0, kParts);
    cursor.NextJob();
    rows_ = RowAt(keys_ ? args_.k : args_.v, 0, cursor.kv_head);
    LookUp(cursor, index, bias);
    while (cursor.valid()) {
      const int32_t left = cursor.count - cursor.first - half_ * kHalf;  // rows of the tile's half
      BeginTile(index, bias);
      // The buffer of the next job's queries is free when two tiles of this one are multiplied. They are copied in parts: in
      // one piece they would make the products wait for keys.
      const GatherJob next = cursor.next;
      const bool last = cursor.last();
      const int32_t parts = last ? kParts : min(kParts, cursor.first / kKeys - 2);
      if (last) {
        cursor.NextJob();
        if constexpr (!Jobs::kOneHead) rows_ = RowAt(keys_ ? args_.k : args_.v, 0, cursor.kv_head);
      } else {
        cursor.first += kKeys;
      }
      LookUp(cursor, index, bias);  // on its way while this tile is copied
      left < kHalf ? Copy<false>(left) : Copy<true>(left);
      ++tiles_;
      if (parts > part) LoadQueries(next, part, parts);
      part = last ? 0 : max(part, parts);
    }
  }

 private:
  using Layout = typename Memory<kDim>::Keys;
  using QueryLayout = typename Memory<kDim>::Queries;
  static constexpr int kHalf = kKeys / 2, kOwn = kHalf / kWarp;  // rows of a warp, and of a lane
  static constexpr int kPieces = Layout::kPieces,
                       kAtOnce = kWarp / kPieces;  // of queries: lanes to a row, rows at once
  static constexpr int kParts = 4;

  // Lane l has rows l, l + 32 of the half.
  template <class Jobs>
  __device__ __forceinline__ void LookUp(const Jobs& cursor, int32_t (&index)[kOwn], float (&bias)[kOwn]) const {
    const int64_t list = int64_t{cursor.block} * head_.far_capacity;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int32_t j = cursor.first + half_ * kHalf + i * kWarp + lane_;
      index[i] = 0;
      bias[i] = 0;
      if (j < cursor.far_count && j < cursor.count) {
        index[i] = head_.far_index[list + j];
        if (keys_) bias[i] = head_.far_bias[list + j];
      } else if (j < cursor.count) {
        index[i] = cursor.begin + j - cursor.far_count;
      }
    }
  }

  // Waits for a free stage. Where rows are goes from their lanes to all lanes through shared memory: that takes fewer
  // instructions than shuffles, and registers only for rows that are about to be copied.
  __device__ __forceinline__ void BeginTile(const int32_t (&index)[kOwn], const float (&bias)[kOwn]) const {
    const uint32_t stage = tiles_ % kStages, free = tiles_ / kStages % 2 ^ 1;
    BarrierWait(keys_ ? memory_.KeyEmpty(stage) : memory_.ValueEmpty(stage), free);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      StoreShared(memory_.From(warp_) + (i * kWarp + lane_) * 8,
                  index[i] < 0 ? slab_ + int64_t{-1 - index[i]} * (kDim * 2) : rows_ + index[i] * row_bytes_);
      if (keys_) StoreShared(memory_.Bias(stage) + (half_ * kHalf + i * kWarp + lane_) * 4, bias[i] * inverse_scale_);
    }
    if (keys_) BarrierArrive(memory_.KeyFull(stage));
    __syncwarp();
  }

  // Eight lanes copy 128 bytes of a row at once, and two rows one after the other.
  template <bool kWhole>
  __device__ __forceinline__ void Copy(int32_t left) const {
    const uint32_t stage = tiles_ % kStages, offset = lane_ % 8 * 16;
    const int32_t row = lane_ / 8 * 2;
    const uint32_t tile =
        (keys_ ? memory_.Key(stage) : memory_.Value(stage)) + static_cast<uint32_t>(half_) * kHalf * 128;
    const uint32_t to[2] = {tile + Layout::At(row, lane_ % 8), tile + Layout::At(row + 1, lane_ % 8)};
#pragma unroll
    for (int i = 0; i < kHalf; i += 8) {
      const char* from[2];
      LoadShared(from, memory_.From(warp_) + (i + row) * 8);
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int panel = 0; panel < kDim / 64; ++panel)
          CopyAsync16(to[r] + i * 128 + panel * Layout::kPanel, from[r] + offset + panel * 128,
                      kWhole || i + row + r < left);
    }
    BarrierArriveAfterCopies(keys_ ? memory_.KeyFull(stage) : memory_.ValueFull(stage));
  }

  // Parts [part, end) of a quarter of the job's queries, and with the last one what is to be done with them.
  __device__ void LoadQueries(const GatherJob& job, int32_t part, int32_t end) {
    constexpr int kPart = kRows / 4 / kParts;  // rows
    const uint32_t buffer = jobs_ % 2;
    if (part == 0) BarrierWait(memory_.QueryEmpty(buffer), jobs_ / 2 % 2 ^ 1);
    const int32_t piece = lane_ % kPieces;
    int32_t row = warp_ * (kRows / 4) + part * kPart + lane_ / kPieces;
    const int64_t row_bytes = args_.q.row_stride * 2;
    const char* from = RowAt(args_.q, job.first, job.query_head) + row * row_bytes + piece * 16;
#pragma unroll 1
    for (; part < end && job.rows > 0; ++part)
#pragma unroll
      for (int i = 0; i < kPart; i += kAtOnce, row += kAtOnce, from += kAtOnce * row_bytes)
        CopyAsync16(memory_.Query(buffer) + QueryLayout::At(row, piece), from, row < job.rows);
    if (end < kParts) return;
    if (warp_ == 0 && lane_ == 0) {
      Work work{};
      const int32_t away = job.first - job.begin + job.far_count;
      if (job.rows > 0)
        work = {(away + job.rows + kKeys - 1) / kKeys, job.far_count, away, job.rows, job.first, job.query_head, 0};
      StoreShared16(memory_.WorkOf(buffer), *reinterpret_cast<const uint4*>(&work));
      StoreShared16(memory_.WorkOf(buffer) + 16, *(reinterpret_cast<const uint4*>(&work) + 1));
      BarrierArrive(memory_.QueryFull(buffer));
    }
    BarrierArriveAfterCopies(memory_.QueryFull(buffer));
    ++jobs_;
  }

  const Memory<kDim> memory_;
  const PrefillArgs& args_;
  const PrefillHead& head_;
  uint32_t jobs_ = 0, tiles_ = 0;
  const int32_t warp_ = static_cast<int32_t>(threadIdx.x) % kWarpgroup / kWarp,
                lane_ = static_cast<int32_t>(threadIdx.x) % kWarp;
  const int32_t half_ = warp_ % 2;
  const bool keys_ = warp_ < 2;
  const float inverse_scale_ = 1 / args_.scale;
  const char* rows_;
  const char* slab_;
  const int64_t row_bytes_;
};

}  // namespace express::cuda::sm90

#endif  // EXPRESS_SRC_CUDA_PREFILL_SM90_CUH_
