// The protected entries of a prompt: many departures at once, with the floats and the choices of src/cpu/protect.cc.
//
// Means of runs and scores do not depend on choices: blocks share the departures out among themselves, and every key
// is read once (and the run before a block's own once more, for its mean). What is left, who beats the weakest, goes in
// order; but once the set is full few departures beat it. So one warp per head looks at many scores at a time and
// stops only at those.
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
  return i < args.source_count ? head.source[i] : static_cast<int32_t>(args.first_row + i - args.source_count);
}

// ---- scores ----

constexpr int kThreads = 256;
constexpr int kSummers = 128;                     // threads that sum, by dimension; the others score, by key
constexpr int kMostTile = kThreads - kSummers;    // keys of a tile
constexpr int64_t kTileBytes = 36 * 1024;         // of one of the two tiles at most: three blocks fit a multiprocessor
constexpr int64_t kMostRuns = 16;                 // of a block
constexpr int64_t kBlocks = 352;                  // that are wanted before a block takes more than one run

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
        pieces_(args.key_dim * static_cast<int32_t>(sizeof(T)) / 16) {}

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
  template <class Body>
  __device__ void ForDimensions(const Body& body) const {
    if (thread_ >= kSummers) return;
    for (int32_t d = thread_; d < args_.key_dim; d += kSummers) body(d);
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
    int32_t piece = thread_ % pieces_;
    for (int32_t row = thread_ / pieces_; row < rows;) {
      const char* key = Key(DepartureIndex(args_, head_, begin - args_.first + row));
      CopyAsync16(tile + static_cast<uint32_t>(row * shape_.stride + piece * 16), key + piece * 16);
      row += kThreads / pieces_;
      piece += kThreads % pieces_;
      if (piece >= pieces_) piece -= pieces_, ++row;
    }
    CopyAsyncCommit();
  }
  __device__ const char* Key(int64_t index) const {
    const T* key = index < 0 ? static_cast<const T*>(head_.slab_key) + (-1 - index) * args_.key_dim
                             : static_cast<const T*>(args_.k.data) + index * args_.k.row_stride +
                                   head_.kv_head * args_.k.head_stride;
    return reinterpret_cast<const char*>(key);
  }

  // One addition per key and dimension, in the order of departure.
  __device__ void Add(const char* tile, int32_t count) const {
    for (int32_t d = thread_; d < args_.key_dim; d += kSummers) {
      const char* at = tile + d * static_cast<int32_t>(sizeof(T));
      float sum = sum_[d];
#pragma unroll 8
      for (int32_t j = 0; j < count; ++j, at += shape_.stride)
        sum = __fadd_rn(sum, ToFloat(*reinterpret_cast<const T*>(at)));
      sum_[d] = sum;
    }
  }

  // ||k - mu||^2, summed in the order of the dimensions. Who does not beat the weakest loses: so a departure is its own
  // loser until SelectKernel knows better.
  __device__ void ScoreOne(int64_t i, const char* key) const {
    constexpr int kPiece = 16 / sizeof(T);
    float score = 0;
#pragma unroll 4
    for (int32_t p = 0; p < pieces_; ++p) {
      const uint4 raw = *reinterpret_cast<const uint4*>(key + p * 16);
      const T* x = reinterpret_cast<const T*>(&raw);
#pragma unroll
      for (int j = 0; j < kPiece; ++j) {
        const float centred = __fsub_rn(ToFloat(x[j]), mean_[p * kPiece + j]);
        score = __fadd_rn(score, __fmul_rn(centred, centred));
      }
    }
    head_.scores[i] = score;
    head_.loser[i] = DepartureIndex(args_, head_, i);
  }

  const AdmitArgs& args_;
  const Shape& shape_;
  const AdmitHead& head_;
  float* mean_;  // (key_dim), shared: of the run in hand
  float* sum_;   // (key_dim), shared
  char* tiles_;  // (2, tile, stride), shared
  int32_t pieces_;  // of 16 bytes, of a key
  const int32_t thread_ = static_cast<int32_t>(threadIdx.x);
};

template <class T>
__global__ __launch_bounds__(kThreads, 3) void ScoreKernel(const __grid_constant__ AdmitArgs args, const Shape shape) {
  extern __shared__ __align__(16) char memory[];
  const AdmitHead head = args.heads[blockIdx.y];
  Scorer<T>(args, shape, head, memory).Score(args.first / kRun + int64_t{blockIdx.x} * shape.runs);
}

// ---- selection ----

constexpr int kStage = 1024;  // scores that are fetched at a time
constexpr int kStages = 4;    // of which so many are on their way or in hand
constexpr int kQuads = kStage / (4 * kWarp);
constexpr int32_t kMostShared = 10 * 1024;  // protected entries that find room in shared memory

// A protected entry as a candidate for the weakest. No score is negative, so their bits are ordered as they are.
struct Candidate {
  uint32_t bits = std::numeric_limits<uint32_t>::max();
  int32_t at = -1;  // -1: none
};

constexpr int64_t kNoPosition = std::numeric_limits<int64_t>::min();

// The lane with the largest position. Rarely called: not worth its code in every place.
__device__ __noinline__ int LatestLane(int64_t position) {
  int winner = static_cast<int>(threadIdx.x) % kWarp;
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const int64_t other = __shfl_xor_sync(kAll, position, offset);
    const int whose = __shfl_xor_sync(kAll, winner, offset);
    if (other > position || (other == position && whose < winner)) position = other, winner = whose;
  }
  return winner;
}

// The protected set of one head. Lane g knows the weakest of segment g, a 32nd of the entries; so a replacement looks
// at one segment and at what the lanes know.
class Selection {
 public:
  __device__ Selection(const AdmitArgs& args, const AdmitHead& head, float* score, int32_t* entry)
      : args_(args), head_(head), score_(score), entry_(entry), segment_((args.protect + kWarp - 1) / kWarp) {}

  __device__ int32_t room() const { return args_.protect - count_; }
  __device__ float weakest_score() const { return __uint_as_float(weakest_.bits); }

  __device__ void Load() {
    const int32_t count = head_.protected_count[0];
    for (int32_t i = lane_; i < count; i += kWarp) {
      entry_[i] = head_.protected_index[i];
      score_[i] = head_.score[i];
    }
    Grow(count);
  }
  __device__ void Store() const {
    for (int32_t i = lane_; i < count_; i += kWarp) {
      head_.protected_index[i] = entry_[i];
      head_.score[i] = score_[i];
    }
    if (lane_ != 0) return;
    head_.protected_count[0] = count_;
    head_.protected_count[1] = room() == 0 ? weakest_.at : 0;
  }
  __device__ void Snapshot(int32_t* to) const {
    for (int32_t i = lane_; i < count_; i += kWarp) to[i] = entry_[i];
  }

  // Departures i .. i + count - 1 join; there is room.
  __device__ void Join(int64_t i, int32_t count, const float* scores) {
    for (int32_t j = lane_; j < count; j += kWarp) {
      entry_[count_ + j] = DepartureIndex(args_, head_, i + j);
      score_[count_ + j] = scores[j];
      head_.loser[i + j] = kSkip;
    }
    Grow(count);
  }

  // Departures i + 4 lane .. i + 4 lane + 3 of every lane, lane after lane. A negative score stands for none.
  __device__ void Compete(int64_t i, const float4& score) {
    const float most = fmaxf(fmaxf(score.x, score.y), fmaxf(score.z, score.w));
    uint32_t above = __ballot_sync(kAll, most > weakest_score());
    while (above != 0) {
      const int source = __ffs(static_cast<int>(above)) - 1;
      const float four[4] = {__shfl_sync(kAll, score.x, source), __shfl_sync(kAll, score.y, source),
                             __shfl_sync(kAll, score.z, source), __shfl_sync(kAll, score.w, source)};
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (four[j] > weakest_score()) Replace(i + 4 * source + j, four[j]);
      above = __ballot_sync(kAll, most > weakest_score()) & (0xFFFFFFFEu << source);  // the weakest only gets stronger
    }
  }

 private:
  __device__ int64_t Position(int32_t at) const {
    if (at < 0) return kNoPosition;
    const int32_t index = entry_[at];
    return index < 0 ? head_.slab_position[-1 - index] : args_.first_position + index;
  }

  __device__ void Grow(int32_t count) {
    count_ += count;
    __syncwarp();
    if (room() > 0) return;
    for (int32_t g = 0; g < kWarp; ++g) LookAt(g);
    FindWeakest();
  }

  // Lane g learns the weakest of segment g.
  __device__ void LookAt(int32_t g) {
    Candidate own;
    const int32_t end = min((g + 1) * segment_, args_.protect);
    for (int32_t i = g * segment_ + lane_; i < end; i += kWarp) {
      const uint32_t bits = __float_as_uint(score_[i]);
      if (bits < own.bits || (bits == own.bits && Position(i) > Position(own.at))) own = {bits, i};
    }
    const int winner = Weakest(own);
    const Candidate found{__shfl_sync(kAll, own.bits, winner), __shfl_sync(kAll, own.at, winner)};
    if (lane_ == g) known_ = found;
  }
  __device__ void FindWeakest() {
    weakest_segment_ = Weakest(known_);
    weakest_ = {__shfl_sync(kAll, known_.bits, weakest_segment_), __shfl_sync(kAll, known_.at, weakest_segment_)};
  }

  // The lane whose candidate has the lowest score; among equals the youngest.
  __device__ int Weakest(const Candidate& own) const {
    const uint32_t lowest = __reduce_min_sync(kAll, own.bits);
    const uint32_t holders = __ballot_sync(kAll, own.bits == lowest);
    const int first = __ffs(static_cast<int>(holders)) - 1;
    if ((holders & (holders - 1)) == 0) return first;
    return LatestLane(own.bits == lowest ? Position(own.at) : kNoPosition);
  }

  __device__ void Replace(int64_t i, float score) {
    if (lane_ == 0) {
      head_.loser[i] = entry_[weakest_.at];
      entry_[weakest_.at] = DepartureIndex(args_, head_, i);
      score_[weakest_.at] = score;
    }
    __syncwarp();
    LookAt(weakest_segment_);
    FindWeakest();
  }

  const AdmitArgs& args_;
  const AdmitHead& head_;
  float* score_;    // (protect)
  int32_t* entry_;  // (protect)
  int32_t segment_;  // entries of a segment
  int32_t count_ = 0;
  Candidate known_, weakest_;
  int weakest_segment_ = 0;
  const int32_t lane_ = static_cast<int32_t>(threadIdx.x);
};

// The scores of the call, stage after stage through shared memory.
class Scores {
 public:
  __device__ Scores(const float* scores, int64_t count, float* ring) : scores_(scores), ring_(ring), count_(count) {
    for (int64_t stage = 0; stage < kStages - 1; ++stage) Load(stage);
  }
  // The next stage, once all lanes are done with the last.
  __device__ const float* Next() {
    __syncwarp();
    Load(stage_ + kStages - 1);
    CopyAsyncWait<kStages - 1>();
    __syncwarp();
    return ring_ + stage_++ % kStages * kStage;
  }

 private:
  __device__ void Load(int64_t stage) const {
    const uint32_t to = SharedAddress(ring_ + stage % kStages * kStage);
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const int32_t at = 4 * (q * kWarp + static_cast<int32_t>(threadIdx.x));
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

// When snapshots are due; 32 at a time, one per lane.
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
    const int32_t mine = next_ + static_cast<int32_t>(threadIdx.x);
    if (next_ % kWarp == 0 && mine < args_.snapshots) at_ = args_.snapshot_at[mine];
    const int32_t due = __shfl_sync(kAll, at_, next_ % kWarp);
    due_ = next_ < args_.snapshots ? int64_t{due} : std::numeric_limits<int64_t>::max();
  }

  const AdmitArgs& args_;
  int32_t next_ = 0, at_ = 0;
  int64_t due_ = 0;
};

// Departures [begin, end) of the call, which lie in the stage from `stage_begin` on.
__device__ void CompeteAll(Selection& set, int64_t stage_begin, const float* stage, int64_t begin, int64_t end) {
  const auto* quads = reinterpret_cast<const float4*>(stage) + threadIdx.x;
  float most = 0;
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const float4 s = quads[q * kWarp];
    most = fmaxf(most, fmaxf(fmaxf(s.x, s.y), fmaxf(s.z, s.w)));
  }
  if (!__any_sync(kAll, most > set.weakest_score())) return;
#pragma unroll 1
  for (int q = 0; q < kQuads; ++q) {
    const int64_t i = stage_begin + q * 4 * kWarp, own = i + 4 * threadIdx.x;
    float4 s = quads[q * kWarp];
    if (own < begin || own >= end) s.x = -1;
    if (own + 1 < begin || own + 1 >= end) s.y = -1;
    if (own + 2 < begin || own + 2 >= end) s.z = -1;
    if (own + 3 < begin || own + 3 >= end) s.w = -1;
    set.Compete(i, s);
  }
}

// One warp per head.
template <bool kShared>
__global__ __launch_bounds__(kWarp) void SelectKernel(const __grid_constant__ AdmitArgs args) {
  __shared__ __align__(16) float ring[kStages * kStage];
  extern __shared__ __align__(16) char memory[];
  const AdmitHead head = args.heads[blockIdx.x];
  auto* score = kShared ? reinterpret_cast<float*>(memory) : head.score;
  auto* entry = kShared ? reinterpret_cast<int32_t*>(score + args.protect) : head.protected_index;
  Scores scores(head.scores, args.count, ring);
  Snapshots snapshots(args);
  Selection set(args, head, score, entry);
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
        CompeteAll(set, stage_begin, stage, at, end);
      }
    }
  }
  CopyAsyncWait<0>();
  take_snapshots(args.count);
  set.Store();
  if (args.count == 0) return;
  for (int32_t d = static_cast<int32_t>(threadIdx.x); d < args.key_dim; d += kWarp) {  // see Scorer::Score
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
  const auto heads = static_cast<uint32_t>(args.head_count);
  if (args.protect > kMostShared) return SelectKernel<false><<<heads, kWarp, 0, stream>>>(args);
  const size_t shared = static_cast<size_t>(args.protect) * (sizeof(float) + sizeof(int32_t));
  cudaFuncSetAttribute(SelectKernel<true>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  SelectKernel<true><<<heads, kWarp, shared, stream>>>(args);
}

}  // namespace express::cuda
