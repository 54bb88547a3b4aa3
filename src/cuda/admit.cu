// The protected entries of a prompt: many departures at once, with the floats and the choices of src/cpu/protect.cc.
//
// Means of runs and scores do not depend on choices: blocks share the departures out among themselves, and every key
// is read once (and the run before a block's own once more, for its mean). What is left, who beats the weakest, goes in
// order; but once the set is full few departures beat it. So a block per head looks at many scores at a time, and one
// of its warps takes those that stand out, with the weakest entries sorted in its registers.
#include <algorithm>
#include <limits>

#include "src/cuda/device.cuh"
#include "src/cuda/kernels.h"

namespace express::cuda {
namespace {

constexpr int64_t kRun = 256;  // departures that a mean is taken over
constexpr uint32_t kAll = 0xFFFFFFFFu;

// The entry that departs i departures after the call's first one.
__device__ __forceinline__ int32_t DepartureIndex(const AdmitArgs& args, const AdmitHead& head, int64_t i) {
  return i < args.source_count ? head.source[args.source_begin + i]
                               : static_cast<int32_t>(args.first_row + i - args.source_count);
}

// ---- scores ----

constexpr int kThreads = 256;
constexpr int kSummers = 128;                   // threads that sum, by dimension; the others score, by key
constexpr int kMostTile = kThreads - kSummers;  // keys of a tile
constexpr int64_t kTileBytes = 36 * 1024;       // of one of the two tiles at most: three blocks fit a multiprocessor
constexpr int64_t kMostRuns = 16;               // of a block
constexpr int64_t kBlocks = 352;                // that are wanted before a block takes more than one run

struct Shape {
  int32_t tile;    // keys
  int32_t stride;  // bytes of a row of the tile: an odd multiple of 16, so that lanes read different rows at once
  int32_t runs;    // of a block
};

// What one block does for one head.
template <class T>
class Scorer {
 public:
  __device__ Scorer(const AdmitArgs& args, const Shape& shape, const AdmitHead& head, char* memory)
      : args_(args),
        shape_(shape),
        head_(head),
        mean_(reinterpret_cast<float*>(memory)),
        sum_(mean_ + args.key_dim),
        tiles_(reinterpret_cast<char*>(sum_ + args.key_dim)),
        pieces_(args.key_dim * static_cast<int32_t>(sizeof(T)) / 16),
        first_row_(static_cast<int32_t>(threadIdx.x) / pieces_),
        first_piece_(static_cast<int32_t>(threadIdx.x) % pieces_) {}

  // Runs [run, run + shape.runs) of the stream, as far as the call goes.
  __device__ void Score(int64_t run) const {
    const int64_t mine = max(run * kRun, args_.first);
    const int64_t begin = max((run - 1) * kRun, args_.first);  // the run before gives the first mean
    const int64_t last = args_.first + args_.count;
    const int64_t end = min((run + shape_.runs) * kRun, last);
    if (begin == args_.first) {
      if (args_.centre > 0)
        Centre();
      else
        ForDimensions([&](int32_t d) { mean_[d] = head_.mean[d]; });
      ForDimensions([&](int32_t d) { sum_[d] = head_.sum[d]; });
    } else {
      ForDimensions([&](int32_t d) { mean_[d] = sum_[d] = 0; });
    }
    Stream(begin, end, [&](int64_t at, int32_t count, const char* tile) {
      if (at > 0 && at % kRun == 0) {
        ForDimensions([&](int32_t d) {
          mean_[d] = __fdiv_rn(sum_[d], static_cast<float>(kRun));
          sum_[d] = 0;
        });
        __syncthreads();
      }
      if (thread_ < kSummers)
        Add(tile, count);
      else if (at >= mine && thread_ - kSummers < count)
        ScoreOne(at - args_.first + thread_ - kSummers, tile + (thread_ - kSummers) * shape_.stride);
    });
    if (end < last) return;
    ForDimensions([&](int32_t d) {  // other blocks may yet read the head's state, so it is kept aside
      head_.run_means[d] = mean_[d];
      head_.run_means[args_.key_dim + d] = sum_[d];
    });
  }

 private:
  struct alignas(2 * sizeof(T)) Two {
    T first, second;
  };
  template <class X, int kCount>
  struct alignas(16) Pack16 {
    X x[kCount];
  };

  // Those threads that Add has sum these dimensions.
  template <class Body>
  __device__ void ForDimensions(const Body& body) const {
    if (thread_ >= kSummers) return;
    for (int32_t d = 2 * thread_; d < args_.key_dim; d += 2 * kSummers) {
      body(d);
      body(d + 1);
    }
  }

  // The mean of the exact tail, which is what departs first.
  __device__ void Centre() const {
    ForDimensions([&](int32_t d) { sum_[d] = 0; });
    Stream(args_.first, args_.first + args_.centre, [&](int64_t, int32_t count, const char* tile) {
      if (thread_ < kSummers) Add(tile, count);
    });
    ForDimensions([&](int32_t d) { mean_[d] = __fdiv_rn(sum_[d], static_cast<float>(args_.centre)); });
  }

  // body(first departure, count, tile) for departures [begin, end) of the stream; no tile reaches into two runs.
  template <class Body>
  __device__ void Stream(int64_t begin, int64_t end, const Body& body) const {
    const auto after = [&](int64_t at) { return min((at / shape_.tile + 1) * shape_.tile, end); };
    int buffer = 0;
    Load(begin, after(begin), buffer);
    for (int64_t at = begin; at < end; buffer ^= 1) {
      const int64_t next = after(at);
      CopyAsyncWait<0>();
      __syncthreads();  // all are done with the other tile, too
      if (next < end) Load(next, after(next), buffer ^ 1);
      body(at, static_cast<int32_t>(next - at), Tile(buffer));
      at = next;
    }
    __syncthreads();
  }

  __device__ char* Tile(int buffer) const { return tiles_ + int64_t{buffer} * shape_.tile * shape_.stride; }

  // Keys of departures [begin, end) of the stream; thread after thread copies piece after piece.
  __device__ void Load(int64_t begin, int64_t end, int buffer) const {
    const auto rows = static_cast<int32_t>(end - begin);
    const uint32_t tile = SharedAddress(Tile(buffer));
    const int64_t i = begin - args_.first;
    if (i >= args_.source_count) {
      const char* first = Key(args_.first_row + i - args_.source_count);
      const int64_t stride = args_.k.row_stride * static_cast<int64_t>(sizeof(T));
      LoadRows(rows, tile, [&](int32_t row) { return first + row * stride; });
    } else {
      LoadRows(rows, tile, [&](int32_t row) { return Key(DepartureIndex(args_, head_, i + row)); });
    }
    CopyAsyncCommit();
  }
  template <class KeyOf>
  __device__ void LoadRows(int32_t rows, uint32_t tile, const KeyOf& key_of) const {
    int32_t piece = first_piece_;
#pragma unroll 4
    for (int32_t row = first_row_; row < rows;) {
      CopyAsync16(tile + static_cast<uint32_t>(row * shape_.stride + piece * 16), key_of(row) + piece * 16);
      row += kThreads / pieces_;
      piece += kThreads % pieces_;
      if (piece >= pieces_) piece -= pieces_, ++row;
    }
  }
  __device__ const char* Key(int64_t index) const {
    const T* key = index < 0 ? static_cast<const T*>(head_.slab_key) + (-1 - index) * args_.key_dim
                             : static_cast<const T*>(args_.k.data) + index * args_.k.row_stride +
                                   head_.kv_head * args_.k.head_stride;
    return reinterpret_cast<const char*>(key);
  }

  // One addition per key and dimension, in the order of departure.
  __device__ void Add(const char* tile, int32_t count) const {
    for (int32_t d = 2 * thread_; d < args_.key_dim; d += 2 * kSummers) {
      const char* at = tile + d * static_cast<int32_t>(sizeof(T));
      float first = sum_[d], second = sum_[d + 1];
#pragma unroll 16
      for (int32_t j = 0; j < count; ++j) {
        const Two two = *reinterpret_cast<const Two*>(at + j * shape_.stride);
        first = __fadd_rn(first, ToFloat(two.first));
        second = __fadd_rn(second, ToFloat(two.second));
      }
      sum_[d] = first;
      sum_[d + 1] = second;
    }
  }

  // ||k - mu||^2, summed in the order of the dimensions. Who does not beat the weakest loses: so a departure is its own
  // loser until SelectKernel knows better.
  __device__ void ScoreOne(int64_t i, const char* key) const {
    constexpr int kPiece = 16 / sizeof(T);
    float score = 0;
#pragma unroll 4
    for (int32_t p = 0; p < pieces_; ++p) {
      const auto x = *reinterpret_cast<const Pack16<T, kPiece>*>(key + p * 16);
      const auto mean = *reinterpret_cast<const Pack16<float4, kPiece / 4>*>(mean_ + p * kPiece);
#pragma unroll
      for (int j = 0; j < kPiece; ++j) {
        const float4& four = mean.x[j / 4];
        const float centre = j % 4 == 0 ? four.x : j % 4 == 1 ? four.y : j % 4 == 2 ? four.z : four.w;
        const float centred = __fsub_rn(ToFloat(x.x[j]), centre);
        score = __fadd_rn(score, __fmul_rn(centred, centred));
      }
    }
    head_.scores[i] = score;
    head_.loser[i] = DepartureIndex(args_, head_, i);
  }

  const AdmitArgs& args_;
  const Shape& shape_;
  const AdmitHead& head_;
  float* mean_;                      // (key_dim), shared: of the run in hand
  float* sum_;                       // (key_dim), shared
  char* tiles_;                      // (2, tile, stride), shared
  int32_t pieces_;                   // of 16 bytes, of a key
  int32_t first_row_, first_piece_;  // of a tile, that this thread copies
  const int32_t thread_ = static_cast<int32_t>(threadIdx.x);
};

template <class T>
__global__ __launch_bounds__(kThreads, 3) void ScoreKernel(const __grid_constant__ AdmitArgs args, const Shape shape) {
  extern __shared__ __align__(16) char memory[];
  const AdmitHead head = args.heads[blockIdx.y];
  Scorer<T>(args, shape, head, memory).Score(args.first / kRun + int64_t{blockIdx.x} * shape.runs);
}

// ---- selection ----

constexpr int kSelectThreads = 256;
constexpr int kSelectWarps = kSelectThreads / kWarp;
constexpr int kStage = 4096;  // scores that are fetched at a time
constexpr int kStages = 3;    // of which so many are on their way or in hand
constexpr int kQuads = kStage / (4 * kSelectThreads);
constexpr int kHeld = 8;
constexpr int kSorted = kHeld * kWarp;     // weakest entries that are kept sorted
constexpr int32_t kMostShared = 5 * 1024;  // protected entries that find room in shared memory
constexpr uint32_t kNone = std::numeric_limits<uint32_t>::max();

// The weakest entries of a protected set in the registers of one warp, the weakest first: those that a departure can
// drive out next. Held are all entries up to a bound; when the last of them has gone, it must be filled anew. No score
// is negative, so their bits are ordered as they are.
class Weakest {
 public:
  __device__ float score() const { return __uint_as_float(lowest_); }
  __device__ int32_t at() const { return lowest_at_; }
  __device__ bool empty() const { return lowest_ == kNone; }

  // Sorted entries; all others are at least as strong as an entry of score `bound`.
  __device__ void Fill(const uint32_t* bits, const int32_t* at, int32_t count, uint32_t bound) {
#pragma unroll
    for (int r = 0; r < kHeld; ++r) {
      const int32_t i = Lane() * kHeld + r;
      bits_[r] = i < count ? bits[i] : kNone;
      at_[r] = i < count ? at[i] : 0;
    }
    bound_ = bound;
    Look();
  }

  // The weakest's place is taken by an entry of this higher score. It is the youngest of all: weaker than its equals.
  __device__ void Replace(float score) {
    const uint32_t bits = __float_as_uint(score) > bound_ ? kNone : __float_as_uint(score);
    const uint32_t shifted = __shfl_down_sync(kAll, bits_[0], 1);
    const uint32_t next = Lane() == kWarp - 1 ? kNone : shifted;
    const int32_t next_at = __shfl_down_sync(kAll, at_[0], 1);
#pragma unroll
    for (int r = 0; r < kHeld; ++r) {
      const uint32_t after = r + 1 < kHeld ? bits_[(r + 1) % kHeld] : next;
      const int32_t after_at = r + 1 < kHeld ? at_[(r + 1) % kHeld] : next_at;
      const bool passed = after < bits, here = bits_[r] < bits;
      at_[r] = passed ? after_at : here ? lowest_at_ : at_[r];
      bits_[r] = passed ? after : here ? bits : bits_[r];
    }
    Look();
  }

 private:
  __device__ static int32_t Lane() { return static_cast<int32_t>(threadIdx.x) % kWarp; }
  __device__ void Look() {
    lowest_ = __shfl_sync(kAll, bits_[0], 0);
    lowest_at_ = __shfl_sync(kAll, at_[0], 0);
  }

  uint32_t bits_[kHeld];  // of entry kHeld * lane + r in order; kNone: none
  int32_t at_[kHeld];     // which protected entry
  uint32_t bound_, lowest_ = kNone;
  int32_t lowest_at_ = 0;
};

struct SelectionMemory {  // shared
  uint32_t list_bits[kSorted], sorted_bits[kSorted];
  int32_t list_at[kSorted], sorted_at[kSorted];
  int32_t sums[2][kSelectWarps];
  int32_t listed;
  uint16_t candidates[kStage];  // of a stage, in order: scores that beat the weakest of then
  float weakest_score;
  int32_t done;  // candidates, by warp 0
};
static_assert(kStage <= 1 << 16);

// The protected set of one head, by all threads of a block; only warp 0 replaces entries.
class Selection {
 public:
  __device__ Selection(const AdmitArgs& args, const AdmitHead& head, SelectionMemory& memory, float* score,
                       int32_t* entry)
      : args_(args), head_(head), memory_(memory), score_(score), entry_(entry) {}

  __device__ int32_t room() const { return args_.protect - count_; }

  __device__ void Load() {
    const int32_t count = head_.protected_count[0];
    for (int32_t i = thread_; i < count; i += kSelectThreads) {
      entry_[i] = head_.protected_index[i];
      score_[i] = head_.score[i];
    }
    Grow(count);
  }
  __device__ void Store() const {
    for (int32_t i = thread_; i < count_; i += kSelectThreads) {
      head_.protected_index[i] = entry_[i];
      head_.score[i] = score_[i];
    }
    if (thread_ != 0) return;
    head_.protected_count[0] = count_;
    head_.protected_count[1] = room() == 0 ? weakest_.at() : 0;
  }
  __device__ void Snapshot(int32_t* to) const {
    for (int32_t i = thread_; i < count_; i += kSelectThreads) to[i] = entry_[i];
  }

  // Departures i .. i + count - 1 join; there is room.
  __device__ void Join(int64_t i, int32_t count, const float* scores) {
    for (int32_t j = thread_; j < count; j += kSelectThreads) {
      entry_[count_ + j] = DepartureIndex(args_, head_, i + j);
      score_[count_ + j] = scores[j];
      head_.loser[i + j] = kSkip;
    }
    Grow(count);
  }

  // Departures [begin, end) of the call, which lie in the stage from `stage_begin` on, compete with the full set.
  __device__ void Compete(int64_t stage_begin, const float* stage, int64_t begin, int64_t end) {
    const int32_t count =
        Collect(stage, static_cast<int32_t>(begin - stage_begin), static_cast<int32_t>(end - stage_begin));
    for (int32_t at = 0; at < count;) {
      if (thread_ < kWarp) {
        const int32_t done = CompeteInOrder(static_cast<int32_t>(stage_begin), stage, at, count);
        if (thread_ == 0) memory_.done = done, memory_.weakest_score = weakest_.score();
      }
      __syncthreads();
      at = memory_.done;
      if (isnan(memory_.weakest_score)) FillWeakest();
    }
  }

 private:
  __device__ int64_t Position(int32_t at) const {
    const int32_t index = entry_[at];
    return index < 0 ? head_.slab_position[-1 - index] : args_.first_position + index;
  }

  __device__ void Grow(int32_t count) {
    count_ += count;
    __syncthreads();
    if (room() == 0) FillWeakest();
  }

  // Lists who of the stage's [begin, end) beats the weakest of now: others have no chance. Returns how many.
  __device__ int32_t Collect(const float* stage, int32_t begin, int32_t end) {
    constexpr int32_t kOwn = kStage / kSelectThreads;
    const float weakest = memory_.weakest_score;
    const int32_t first = thread_ * kOwn;
    uint32_t above = 0;
#pragma unroll
    for (int32_t q = 0; q < kOwn / 4; ++q) {
      const float4 s = reinterpret_cast<const float4*>(stage + first)[q];
      above |=
          static_cast<uint32_t>((s.x > weakest) | (s.y > weakest) << 1 | (s.z > weakest) << 2 | (s.w > weakest) << 3)
          << 4 * q;
    }
    if (begin > first) above &= begin - first < kOwn ? kAll << (begin - first) : 0;
    if (end < first + kOwn) above &= end > first ? ~(kAll << (end - first)) : 0;
    int32_t before = __popc(above);
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const int32_t less = __shfl_up_sync(kAll, before, offset);
      if (thread_ % kWarp >= offset) before += less;
    }
    int32_t(&sums)[kSelectWarps] = memory_.sums[parity_ ^= 1];
    if (thread_ % kWarp == kWarp - 1) sums[thread_ / kWarp] = before;
    __syncthreads();
    int32_t all = 0;
    before -= __popc(above);
#pragma unroll
    for (int w = 0; w < kSelectWarps; ++w) {
      before += w < thread_ / kWarp ? sums[w] : 0;
      all += sums[w];
    }
    for (; above != 0; above &= above - 1)
      memory_.candidates[before++] = static_cast<uint16_t>(first + __ffs(static_cast<int>(above)) - 1);
    __syncthreads();
    return all;
  }

  // By warp 0: candidates one after the other, up to `end` or until none of the weakest is left. Returns how far it came.
  __device__ int32_t CompeteInOrder(int32_t stage_begin, const float* stage, int32_t begin, int32_t end) {
    for (int32_t at = begin; at < end; at += kWarp) {
      const bool valid = at + thread_ < end;
      const int32_t own = valid ? memory_.candidates[at + thread_] : 0;
      const float score = valid ? stage[own] : -1;
      uint32_t above = __ballot_sync(kAll, score > weakest_.score());
      while (above != 0) {
        const int source = __ffs(static_cast<int>(above)) - 1;
        const float winner = __shfl_sync(kAll, score, source);
        const int32_t i = stage_begin + __shfl_sync(kAll, own, source);
        if (thread_ == swaps_) swap_ = {i, weakest_.at(), winner};
        if (++swaps_ == kWarp) Swap();
        weakest_.Replace(winner);
        if (weakest_.empty()) {
          Swap();
          return at + source + 1;
        }
        above = __ballot_sync(kAll, score > weakest_.score()) & (0xFFFFFFFEu << source);  // it only gets stronger
      }
    }
    Swap();
    return end;
  }

  // By warp 0: lane l < swaps_ has one, in their order; a protected place may have several.
  __device__ void Swap() {
    const bool valid = thread_ < swaps_;
    const uint32_t lanes = __ballot_sync(kAll, valid);
    if (valid) {
      const uint32_t same = __match_any_sync(lanes, swap_.at);
      const uint32_t before = same & ((1u << thread_) - 1), after = same >> thread_ >> 1;
      const int32_t entry = DepartureIndex(args_, head_, swap_.departure);
      const int32_t last = __shfl_sync(lanes, entry, before != 0 ? 31 - __clz(static_cast<int>(before)) : thread_);
      const int32_t held = entry_[swap_.at];
      head_.loser[swap_.departure] = before != 0 ? last : held;
      __syncwarp(lanes);
      if (after == 0) {
        entry_[swap_.at] = entry;
        score_[swap_.at] = swap_.score;
      }
    }
    __syncwarp();
    swaps_ = 0;
  }

  // The weakest entries of the full set, sorted: the lowest scores, among equals the youngest.
  __device__ void FillWeakest() {
    const int32_t wanted = min(kSorted, args_.protect);
    uint32_t score = kNone;
    int64_t position = 0;
    if (wanted < args_.protect) FindBound(wanted, &score, &position);
    if (thread_ == 0) memory_.listed = 0;
    __syncthreads();
    for (int32_t i = thread_; i < args_.protect; i += kSelectThreads) {
      const uint32_t bits = __float_as_uint(score_[i]);
      if (bits > score || (bits == score && Position(i) < position)) continue;
      const int32_t to = atomicAdd(&memory_.listed, 1);
      if (to >= kSorted) continue;  // never, as no two entries have one position
      memory_.list_bits[to] = bits;
      memory_.list_at[to] = i;
    }
    __syncthreads();
    if (thread_ < wanted) Sort(wanted);
    __syncthreads();
    if (thread_ < kWarp) weakest_.Fill(memory_.sorted_bits, memory_.sorted_at, wanted, score);
    if (thread_ == 0) memory_.weakest_score = weakest_.score();
    __syncthreads();
  }

  // The entry of rank `wanted`, counted from 1, by its score and position.
  __device__ void FindBound(int32_t wanted, uint32_t* score, int64_t* position) const {
    uint32_t value = 0;
    for (int bit = 31; bit >= 0; --bit) {
      const uint32_t next = value | (1u << bit);
      if (Count([&](int32_t, uint32_t bits) { return bits < next; }) < wanted) value = next;
    }
    *score = value;
    const int32_t equals = wanted - Count([&](int32_t, uint32_t bits) { return bits < value; });
    if (equals == Count([&](int32_t, uint32_t bits) { return bits == value; })) return;
    for (int bit = 62; bit >= 0; --bit) {
      const int64_t next = *position | (int64_t{1} << bit);
      if (Count([&](int32_t i, uint32_t bits) { return bits == value && Position(i) >= next; }) >= equals)
        *position = next;
    }
  }
  template <class Predicate>
  __device__ int32_t Count(const Predicate& predicate) const {
    int32_t own = 0;
    for (int32_t i = thread_; i < args_.protect; i += kSelectThreads) own += predicate(i, __float_as_uint(score_[i]));
    int32_t(&sums)[kSelectWarps] = memory_.sums[parity_ ^= 1];
    const int32_t warp = __reduce_add_sync(kAll, own);
    if (thread_ % kWarp == 0) sums[thread_ / kWarp] = warp;
    __syncthreads();  // one is enough: the next count uses the other sums
    int32_t all = 0;
#pragma unroll
    for (int w = 0; w < kSelectWarps; ++w) all += sums[w];
    return all;
  }

  // Entry `thread` of the list goes to its rank.
  __device__ void Sort(int32_t count) const {
    const uint32_t bits = memory_.list_bits[thread_];
    const int32_t at = memory_.list_at[thread_];
    int32_t rank = 0;
#pragma unroll 4
    for (int32_t j = 0; j < count; ++j) {
      const uint32_t other = memory_.list_bits[j];
      rank += other < bits || (other == bits && j != thread_ && Position(memory_.list_at[j]) > Position(at));
    }
    memory_.sorted_bits[rank] = bits;
    memory_.sorted_at[rank] = at;
  }

  const AdmitArgs& args_;
  const AdmitHead& head_;
  SelectionMemory& memory_;
  float* score_;    // (protect)
  int32_t* entry_;  // (protect)
  int32_t count_ = 0;
  Weakest weakest_;  // of warp 0
  struct OneSwap {
    int32_t departure, at;
    float score;
  };
  OneSwap swap_{};  // of warp 0
  int32_t swaps_ = 0;
  mutable int parity_ = 0;
  const int32_t thread_ = static_cast<int32_t>(threadIdx.x);
};

// The scores of the call, stage after stage through shared memory.
class Scores {
 public:
  __device__ Scores(const float* scores, int64_t count, float* ring) : scores_(scores), ring_(ring), count_(count) {
    for (int64_t stage = 0; stage < kStages - 1; ++stage) Load(stage);
  }
  // The next stage, once all threads are done with the last.
  __device__ const float* Next() {
    __syncthreads();
    Load(stage_ + kStages - 1);
    CopyAsyncWait<kStages - 1>();
    __syncthreads();
    return ring_ + stage_++ % kStages * kStage;
  }

 private:
  __device__ void Load(int64_t stage) const {
    const uint32_t to = SharedAddress(ring_ + stage % kStages * kStage);
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const int32_t at = 4 * (q * kSelectThreads + static_cast<int32_t>(threadIdx.x));
      const int64_t left = count_ - stage * kStage - at;
      const auto bytes = static_cast<int32_t>(4 * min(max(left, int64_t{0}), int64_t{4}));
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to + 4 * static_cast<uint32_t>(at)),
                   "l"(bytes > 0 ? scores_ + stage * kStage + at : scores_), "r"(bytes)
                   : "memory");
    }
    CopyAsyncCommit();
  }

  const float* scores_;  // (count)
  float* ring_;          // (kStages, kStage), shared
  int64_t count_, stage_ = 0;
};

// When snapshots are due; every warp knows 32 at a time, one per lane.
class Snapshots {
 public:
  __device__ explicit Snapshots(const AdmitArgs& args) : args_(args) { Fetch(); }
  __device__ int32_t next() const { return next_; }
  __device__ int64_t due() const { return due_; }
  __device__ void Advance() {
    ++next_;
    Fetch();
  }

 private:
  __device__ void Fetch() {
    const int32_t mine = next_ + static_cast<int32_t>(threadIdx.x) % kWarp;
    if (next_ % kWarp == 0 && mine < args_.snapshots) at_ = args_.snapshot_at[mine];
    const int32_t due = __shfl_sync(kAll, at_, next_ % kWarp);
    due_ = next_ < args_.snapshots ? int64_t{due} : std::numeric_limits<int64_t>::max();
  }

  const AdmitArgs& args_;
  int32_t next_ = 0, at_ = 0;
  int64_t due_ = 0;
};

// One block per head.
template <bool kShared>
__global__ __launch_bounds__(kSelectThreads, 1) void SelectKernel(const __grid_constant__ AdmitArgs args) {
  __shared__ SelectionMemory selection_memory;
  extern __shared__ __align__(16) char memory[];
  const AdmitHead head = args.heads[blockIdx.x];
  auto* ring = reinterpret_cast<float*>(memory);
  auto* score = kShared ? ring + kStages * kStage : head.score;
  auto* entry = kShared ? reinterpret_cast<int32_t*>(score + args.protect) : head.protected_index;
  Scores scores(head.scores, args.count, ring);
  Snapshots snapshots(args);
  Selection set(args, head, selection_memory, score, entry);
  set.Load();
  const auto take_snapshots = [&](int64_t at) {
    for (; snapshots.due() == at; snapshots.Advance())
      set.Snapshot(head.snapshots + int64_t{snapshots.next()} * args.protect);
  };
  for (int64_t stage_begin = 0; stage_begin < args.count; stage_begin += kStage) {
    const float* stage = scores.Next();
    const int64_t stage_end = min(stage_begin + kStage, args.count);
    for (int64_t at = stage_begin, end; at < stage_end; at = end) {
      take_snapshots(at);
      end = min(stage_end, snapshots.due());
      if (set.room() > 0) {
        end = min(end, at + set.room());
        set.Join(at, static_cast<int32_t>(end - at), stage + (at - stage_begin));
      } else {
        set.Compete(stage_begin, stage, at, end);
      }
    }
  }
  CopyAsyncWait<0>();
  take_snapshots(args.count);
  set.Store();
  if (args.count == 0) return;
  for (int32_t d = static_cast<int32_t>(threadIdx.x); d < args.key_dim; d += kSelectThreads) {  // see Scorer::Score
    head.mean[d] = head.run_means[d];
    head.sum[d] = head.run_means[args.key_dim + d];
  }
}

__global__ void BeginKernel(const AdmitHead* heads, const Head* layer_heads) {
  const AdmitHead& admit = heads[blockIdx.x];
  if (admit.protect == 0) return;
  const Head& head = layer_heads[admit.kv_head];
  const int32_t count = admit.protected_count[0];
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < count; i += static_cast<int32_t>(blockDim.x))
    admit.protected_index[i] = -1 - head.protected_slot[i];
}

template <class T>
void LaunchScores(const AdmitArgs& args, cudaStream_t stream) {
  const int64_t runs = (args.first + args.count - 1) / kRun - args.first / kRun + 1;
  const int64_t row = args.key_dim * int64_t{sizeof(T)} + 16;
  Shape shape{kMostTile, static_cast<int32_t>(row),
              static_cast<int32_t>(std::clamp<int64_t>(runs * args.head_count / kBlocks, 1, kMostRuns))};
  while (shape.tile > 1 && shape.tile * row > kTileBytes) shape.tile /= 2;
  const int64_t shared = 2 * args.key_dim * int64_t{sizeof(float)} + 2 * shape.tile * row;
  cudaFuncSetAttribute(ScoreKernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  const dim3 grid(static_cast<uint32_t>(CeilDiv(runs, shape.runs)), static_cast<uint32_t>(args.head_count));
  ScoreKernel<T><<<grid, kThreads, static_cast<size_t>(shared), stream>>>(args, shape);
}

}  // namespace

void AdmitBegin(const AdmitHead* heads, int32_t head_count, const Head* layer_heads, cudaStream_t stream) {
  BeginKernel<<<static_cast<uint32_t>(head_count), 128, 0, stream>>>(heads, layer_heads);
}

void Admit(const AdmitArgs& args, cudaStream_t stream) {
  if (args.count > 0) WithType(args.dtype, [&](auto type) { LaunchScores<decltype(type)>(args, stream); });
  const bool shared = args.protect <= kMostShared;
  const auto kernel = shared ? &SelectKernel<true> : &SelectKernel<false>;
  size_t bytes = kStages * kStage * sizeof(float);
  if (shared) bytes += static_cast<size_t>(args.protect) * (sizeof(float) + sizeof(int32_t));
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  kernel<<<static_cast<uint32_t>(args.head_count), kSelectThreads, bytes, stream>>>(args);
}

}  // namespace express::cuda
