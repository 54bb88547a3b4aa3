// The protected entries of a prompt: many departures at once, with the floats and the choices of src/cpu/protect.cc.
//
// Means of runs and scores do not depend on choices: blocks share the departures out among themselves, and every key
// is read once (and the run before a block's own once more, for its mean). What is left, who beats the weakest, is
// admit_select.cu.
#include <algorithm>

#include "src/cuda/admit.cuh"

namespace express::cuda {
namespace {

constexpr int64_t kRun = 256;  // departures that a mean is taken over

// ---- scores ----

constexpr int kThreads = 256;
constexpr int kSummers = 128;                   // threads that sum, by dimension; the others score, by key
constexpr int kMostTile = kThreads - kSummers;  // keys of a tile
constexpr int64_t kTileBytes = 36 * 1024;       // of a tile, at most
constexpr int kMostStages = 6;                  // tiles
constexpr int64_t kMostRuns = 16;               // of a block
constexpr int64_t kBlocks = 352;                // that are wanted before a block takes more than one run

struct Shape {
  int32_t tile;    // keys
  int32_t stages;  // tiles that are on their way or in hand
  int32_t stride;  // bytes of a row of the tile: an odd multiple of 16, so that lanes read different rows at once
  int32_t runs;    // of a block
  int32_t scored_stride;  // of a row of keys as scores see them
};

// What one block does for one head. kUndo: scores without positions. Keys of a tile are turned back into another one, of floats.
template <class T, bool kUndo>
class Scorer {
 public:
  __device__ Scorer(const AdmitArgs& args, const Shape& shape, const AdmitHead& head, char* memory)
      : args_(args),
        shape_(shape),
        head_(head),
        mean_(reinterpret_cast<float*>(memory)),
        sum_(mean_ + args.key_dim),
        tiles_(reinterpret_cast<char*>(sum_ + args.key_dim)),
        undone_(tiles_ + shape.stages * shape.tile * shape.stride),
        norms_(reinterpret_cast<float*>(undone_ + shape.tile * shape.scored_stride)),
        pieces_(args.key_dim * static_cast<int32_t>(sizeof(T)) / 16) {}

  // Runs [run, run + shape.runs) of the stream, as far as the call goes.
  __device__ void Score(int64_t run) const {
    const int64_t mine = max(run * kRun, args_.first);
    const int64_t begin = max((run - 1) * kRun, args_.first);  // the run before gives the first mean
    const int64_t last = args_.first + args_.count;
    const int64_t end = min((run + shape_.runs) * kRun, last);
    // What departs first is scored by the mean of the exact tail, or by what the head has.
    const bool first = mine == args_.first, centre = first && args_.centre > 0;
    ForDimensions([&](int32_t d) {
      mean_[d] = first && !centre ? head_.mean[d] : 0;
      sum_[d] = begin == args_.first && !centre ? head_.sum[d] : 0;
    });
    // The first departures are the tail's first entries: if all of these are in tiles, they are read once.
    const int64_t centred = args_.first + args_.centre;
    const bool kept =
        centre && end <= centred && TileBegin(centred - 1) - TileBegin(begin) <= (shape_.stages - 1) * shape_.tile;
#pragma unroll 1
    for (int pass = centre ? 0 : 1; pass < 2; ++pass) {
      const int64_t scored = pass == 0 ? centred : mine;
      Stream(begin, pass == 0 ? centred : end, scored, pass == 0 || !kept, pass == 0,
             [&](int64_t at, int32_t count, const char* tile) {
               if (pass == 1 && at > 0 && at % kRun == 0) {
                 ForDimensions([&](int32_t d) {
                   mean_[d] = __fdiv_rn(sum_[d], static_cast<float>(kRun));
                   sum_[d] = 0;
                 });
                 __syncthreads();
               }
               if (thread_ < kSummers)
                 Add(tile, count);
               else if (at >= scored && thread_ - kSummers < count)
                 ScoreOne(at - args_.first + thread_ - kSummers, tile + (thread_ - kSummers) * shape_.scored_stride);
             });
      if (pass == 0)
        ForDimensions([&](int32_t d) {
          mean_[d] = __fdiv_rn(sum_[d], static_cast<float>(args_.centre));
          sum_[d] = head_.sum[d];
        });
    }
    if (end < last) return;
    ForDimensions([&](int32_t d) {  // other blocks may yet read the head's state, so it is kept aside
      head_.run_means[d] = mean_[d];
      head_.run_means[args_.key_dim + d] = sum_[d];
    });
  }

 private:
  using Scored = std::conditional_t<kUndo, float, T>;  // of keys as scores see them
  // Codes of a row in a tile: its scale lies behind them.
  template <class X = Scored>
  __device__ float ScaleOf(const char* row) const {
    if constexpr (kScaled<X>)
      return *reinterpret_cast<const float*>(row + args_.key_dim);
    else
      return 1;
  }
  template <class X>
  __device__ static float Number(X x, float scale) {
    if constexpr (kScaled<X>)
      return scale * ToFloat(x);
    else
      return ToFloat(x);
  }
  template <class X, int kCount>
  struct alignas(16) Pack16 {
    X x[kCount];
  };

  // Those threads that Add has sum these dimensions.
  template <class Body>
  __device__ void ForDimensions(const Body& body) const {
    const int32_t d = 2 * thread_;
    if (d >= args_.key_dim) return;
    body(d);
    body(d + 1);
  }

  __device__ int64_t TileBegin(int64_t at) const { return at & ~int64_t{shape_.tile - 1}; }

  // body(first departure, count, tile) for departures [begin, end) of the stream; no tile reaches into two runs. Those from `scored`
  // on are to be scored. `loads`: they are not in tiles yet, and are copied by half of the threads: by those that score, or sum.
  template <class Body>
  __device__ void Stream(int64_t begin, int64_t end, int64_t scored, bool loads, bool scorers_load,
                         const Body& body) const {
    const auto after = [&](int64_t at) { return min(TileBegin(at) + shape_.tile, end); };
    const int32_t loader = loads ? thread_ - (scorers_load ? kSummers : 0) : -1;
    int64_t loaded = begin, at = begin;
    int32_t ahead = loads ? 0 : shape_.stages - 1;  // tiles that have been asked for, and are not done
    for (int load = 0, done = 0; at < end;) {
      const bool wait = ahead == shape_.stages - 1;
      if (wait) {
        CopyAsyncWaitFor(shape_.stages - 2);
        __syncthreads();  // all are done with the tile before, too
      }
      if (loader >= 0 && loader < kSummers && loaded < end) Load(loaded, after(loaded), load, loader);
      CopyAsyncCommit();
      loaded = after(loaded);
      load = load + 1 < shape_.stages ? load + 1 : 0;
      if (!wait) {
        ++ahead;
        continue;
      }
      const int64_t next = after(at);
      const auto count = static_cast<int32_t>(next - at);
      if constexpr (kUndo) {
        if (at >= scored && args_.scoring.value_norm) Norms(at - args_.first, count);
        Undo(at - args_.first, count, Tile(done));
        __syncthreads();
        body(at, count, undone_);
      } else {
        body(at, count, Tile(done));
      }
      done = done + 1 < shape_.stages ? done + 1 : 0;
      at = next;
    }
    __syncthreads();
  }

  // Departures [first, first + count) of the call, from `tile`. A thread takes two elements at a time that are a pair, or that are not
  // turned.
  __device__ void Undo(int64_t first, int32_t count, const char* tile) const {
    const Rotation& r = args_.scoring.rotation;
    const int32_t twos = args_.key_dim / 2, items = count * twos;
#pragma unroll 4
    for (int32_t i = thread_; i < items; i += kThreads) {
      const int32_t row = i / twos, two = i % twos;
      const char* from = tile + row * shape_.stride;
      auto* to = reinterpret_cast<float*>(undone_ + row * shape_.scored_stride);
      const bool turned = two < r.pairs, halves = r.interleaved == 0 && turned;
      const int32_t a = halves ? two : 2 * two, b = halves ? r.pairs + two : 2 * two + 1;
      const float scale = ScaleOf<T>(from);
      const float x = Number(reinterpret_cast<const T*>(from)[a], scale);
      const float y = Number(reinterpret_cast<const T*>(from)[b], scale);
      if (turned) {
        const Angle angle = AngleAt(r, two, Position(first + row));
        to[a] = FirstUndone(x, y, angle);
        to[b] = SecondUndone(x, y, angle);
      } else {
        to[a] = x;
        to[b] = y;
      }
    }
  }
  // Of the departure i after the call's first one.
  __device__ int64_t Position(int64_t i) const {
    const int64_t index = DepartureIndex(args_, head_, i);
    return index < 0 ? head_.slab_position[-1 - index] : args_.first_position + index;
  }

  __device__ char* Tile(int buffer) const { return tiles_ + int64_t{buffer} * shape_.tile * shape_.stride; }

  // Keys of departures [begin, end) of the stream, by kSummers threads: eight of them copy 128 bytes of a key at a time.
  __device__ void Load(int64_t begin, int64_t end, int buffer, int32_t loader) const {
    const auto rows = static_cast<int32_t>(end - begin);
    const uint32_t tile = SharedAddress(Tile(buffer));
    const int64_t i = begin - args_.first;
    if constexpr (kScaled<T>)
#pragma unroll 1
      for (int32_t row = loader; row < rows; row += kSummers)
        *reinterpret_cast<float*>(Tile(buffer) + row * shape_.stride + args_.key_dim) =
            Scale(DepartureIndex(args_, head_, i + row));
#pragma unroll 4
    for (int32_t row = loader / 8; row < rows; row += kSummers / 8) {
      const char* key = Key(DepartureIndex(args_, head_, i + row));
#pragma unroll 2
      for (int32_t piece = loader % 8; piece < pieces_; piece += 8)
        CopyAsync16(tile + static_cast<uint32_t>(row * shape_.stride + piece * 16), key + piece * 16);
    }
  }
  __device__ const char* Key(int64_t index) const {
    const T* key = index < 0 ? static_cast<const T*>(head_.slab_key) + (-1 - index) * args_.key_dim
                             : static_cast<const T*>(args_.k.data) + index * args_.k.row_stride +
                                   head_.kv_head * args_.k.head_stride;
    return reinterpret_cast<const char*>(key);
  }

  __device__ float Scale(int64_t index) const {
    return FromScale(index < 0 ? head_.slab_scale[-1 - index].key
                               : args_.k.scale[head_.kv_head * args_.k.scale_stride + index].key);
  }

  // One addition per key and dimension, in the order of departure.
  __device__ void Add(const char* tile, int32_t count) const {
    args_.key_dim <= kSummers ? AddOf<1>(tile, count) : AddOf<2>(tile, count);
  }
  template <int kEach>
  __device__ void AddOf(const char* tile, int32_t count) const {
    struct alignas(kEach * sizeof(Scored)) Some {
      Scored x[kEach];
    };
    const int32_t d = kEach * thread_;
    if (d >= args_.key_dim) return;
    const char* at = tile + d * static_cast<int32_t>(sizeof(Scored));
    float sum[kEach];
#pragma unroll
    for (int e = 0; e < kEach; ++e) sum[e] = sum_[d + e];
#pragma unroll 16
    for (int32_t j = 0; j < count; ++j) {
      const Some some = *reinterpret_cast<const Some*>(at + j * shape_.scored_stride);
      const float scale = ScaleOf(tile + j * shape_.scored_stride);
#pragma unroll
      for (int e = 0; e < kEach; ++e) sum[e] = __fadd_rn(sum[e], Number(some.x[e], scale));
    }
#pragma unroll
    for (int e = 0; e < kEach; ++e) sum_[d + e] = sum[e];
  }

  // Who does not beat the weakest loses: so a departure is its own loser until AdmitSelect knows better.
  __device__ void ScoreOne(int64_t i, const char* key) const {
    const int32_t index = DepartureIndex(args_, head_, i);
    if constexpr (kUndo)
      head_.scores[i] = JoinScore(EnergyInLanes(reinterpret_cast<const float4*>(key)),
                                  args_.scoring.value_norm ? norms_[thread_ - kSummers] : 1);
    else
      head_.scores[i] = Energy(key);
    head_.loser[i] = index;
  }

  // ||k - mu||^2, summed in lanes.
  __device__ float EnergyInLanes(const float4* key) const {
    const auto* means = reinterpret_cast<const float4*>(mean_);
    float lane[kScoreLanes] = {};
    const auto add = [](float& sum, float x, float mean) {
      const float centred = __fsub_rn(x, mean);
      sum = __fadd_rn(sum, __fmul_rn(centred, centred));
    };
#pragma unroll 4
    for (int32_t p = 0; p < args_.key_dim / kScoreLanes; ++p)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float4 x = key[2 * p + j], mean = means[2 * p + j];
        add(lane[4 * j], x.x, mean.x);
        add(lane[4 * j + 1], x.y, mean.y);
        add(lane[4 * j + 2], x.z, mean.z);
        add(lane[4 * j + 3], x.w, mean.w);
      }
    return SumLanes(lane);
  }
  // ||v||^2 of departures [first, first + count) of the call. Four threads have a value, two lanes each.
  __device__ void Norms(int64_t first, int32_t count) const {
    constexpr int kEach = 4, kLanes = kScoreLanes / kEach;
    const int32_t part = thread_ % kEach;
    for (int32_t base = 0; base < count; base += kThreads / kEach) {
      const int32_t row = base + thread_ / kEach;
      const int64_t index = DepartureIndex(args_, head_, first + min(row, count - 1));
      const T* value = index < 0 ? static_cast<const T*>(head_.slab_value) + (-1 - index) * args_.value_dim
                                 : static_cast<const T*>(args_.v.data) + index * args_.v.row_stride +
                                       head_.kv_head * args_.v.head_stride;
      float scale = 1;
      if constexpr (kScaled<T>)
        scale = FromScale(index < 0 ? head_.slab_scale[-1 - index].value
                                    : args_.v.scale[head_.kv_head * args_.v.scale_stride + index].value);
      float sum[kLanes] = {};
#pragma unroll 8
      for (int32_t d = 0; d < args_.value_dim; d += kScoreLanes) {
        struct alignas(kLanes * sizeof(T)) Some {
          T x[kLanes];
        };
        const Some some = *reinterpret_cast<const Some*>(value + d + kLanes * part);
#pragma unroll
        for (int j = 0; j < kLanes; ++j) {
          const float x = Number(some.x[j], scale);
          sum[j] = __fadd_rn(sum[j], __fmul_rn(x, x));
        }
      }
#pragma unroll
      for (int half = kEach / 2; half > 0; half /= 2)
#pragma unroll
        for (int j = 0; j < kLanes; ++j) sum[j] = __fadd_rn(sum[j], __shfl_down_sync(0xFFFFFFFFu, sum[j], half));
      if (part == 0 && row < count) norms_[row] = __fadd_rn(sum[0], sum[1]);
    }
  }

  // ||k - mu||^2, summed in the order of the dimensions.
  __device__ float Energy(const char* key) const {
    constexpr int kPiece = 16 / sizeof(T);
    float score = 0;
    const float scale = ScaleOf(key);
#pragma unroll 4
    for (int32_t p = 0; p < pieces_; ++p) {
      const auto x = *reinterpret_cast<const Pack16<T, kPiece>*>(key + p * 16);
      const auto mean = *reinterpret_cast<const Pack16<float4, kPiece / 4>*>(mean_ + p * kPiece);
#pragma unroll
      for (int j = 0; j < kPiece; ++j) {
        const float4& four = mean.x[j / 4];
        const float centre = j % 4 == 0 ? four.x : j % 4 == 1 ? four.y : j % 4 == 2 ? four.z : four.w;
        const float centred = __fsub_rn(Number(x.x[j], scale), centre);
        score = __fadd_rn(score, __fmul_rn(centred, centred));
      }
    }
    return score;
  }

  const AdmitArgs& args_;
  const Shape& shape_;
  const AdmitHead& head_;
  float* mean_;     // (key_dim), shared: of the run in hand
  float* sum_;      // (key_dim), shared
  char* tiles_;     // (stages, tile, stride), shared
  char* undone_;    // (tile, scored_stride), shared: of kUndo
  float* norms_;    // (tile), shared: of kUndo
  int32_t pieces_;  // of 16 bytes, of a key
  const int32_t thread_ = static_cast<int32_t>(threadIdx.x);
};

template <class T, bool kUndo>
__global__ __launch_bounds__(kThreads, 3) void ScoreKernel(const __grid_constant__ AdmitArgs args, const Shape shape) {
  extern __shared__ __align__(16) char memory[];
  const AdmitHead head = args.heads[blockIdx.y];
  Scorer<T, kUndo>(args, shape, head, memory).Score(args.first / kRun + int64_t{blockIdx.x} * shape.runs);
}

__global__ void BeginKernel(const AdmitHead* heads, const Head* layer_heads) {
  const AdmitHead& admit = heads[blockIdx.x];
  if (admit.protect == 0) return;
  const Head& head = layer_heads[admit.kv_head];
  const int32_t count = admit.protected_count[0];
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < count; i += static_cast<int32_t>(blockDim.x))
    admit.protected_index[i] = -1 - head.protected_slot[i];
}

template <class T, bool kUndo>
void LaunchScores(const AdmitArgs& args, cudaStream_t stream) {
  const int64_t runs = (args.first + args.count - 1) / kRun - args.first / kRun + 1;
  const int64_t row = args.key_dim * int64_t{sizeof(T)} + 16;
  Shape shape{kMostTile, 2, static_cast<int32_t>(row),
              static_cast<int32_t>(std::clamp<int64_t>(runs * args.head_count / kBlocks, 1, kMostRuns)),
              static_cast<int32_t>(kUndo ? args.key_dim * int64_t{sizeof(float)} + 16 : row)};
  // Of one key once, and its value's norm; and of tiles.
  const int64_t once = kUndo ? shape.scored_stride + int64_t{sizeof(float)} : 0,
                means = 2 * args.key_dim * int64_t{sizeof(float)};
  while (shape.tile > 1 && shape.tile * (2 * row + once) > 2 * kTileBytes) shape.tile /= 2;
  // All that blocks have the memory for is on its way at once: the fewer they are, the more.
  const int64_t blocks = CeilDiv(runs, shape.runs) * args.head_count,
                of_block = args.shared_bytes / CeilDiv(blocks, std::max(1, args.multiprocessors)) - 2048 - means;
  shape.stages = static_cast<int32_t>(std::clamp<int64_t>((of_block / shape.tile - once) / row, 2, kMostStages));
  const int64_t shared = means + shape.tile * (shape.stages * row + once);
  // Always the same number: calls of several threads do not change it under each other.
  cudaFuncSetAttribute(ScoreKernel<T, kUndo>, cudaFuncAttributeMaxDynamicSharedMemorySize, args.shared_bytes);
  const dim3 grid(static_cast<uint32_t>(CeilDiv(runs, shape.runs)), static_cast<uint32_t>(args.head_count));
  ScoreKernel<T, kUndo><<<grid, kThreads, static_cast<size_t>(shared), stream>>>(args, shape);
}

}  // namespace

void AdmitBegin(const AdmitHead* heads, int32_t head_count, const Head* layer_heads, cudaStream_t stream) {
  BeginKernel<<<static_cast<uint32_t>(head_count), 128, 0, stream>>>(heads, layer_heads);
}

void AdmitScore(const AdmitArgs& args, cudaStream_t stream) {
  if (args.count == 0) return;
  WithStorage(args.dtype, [&](auto type) {
    using T = decltype(type);
    args.scoring.without_position ? LaunchScores<T, true>(args, stream) : LaunchScores<T, false>(args, stream);
  });
}

}  // namespace express::cuda
