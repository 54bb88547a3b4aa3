// Decode attention over 16-bit slabs, the end of a head: what the warps of a cluster have, and then what several shares of a
// head have, is merged, in a fixed order: equal calls give equal bits.
#ifndef EXPRESS_SRC_CUDA_ATTEND_MERGE_CUH_
#define EXPRESS_SRC_CUDA_ATTEND_MERGE_CUH_

#include "src/cuda/attend.cuh"

namespace express::cuda {

// Shared memory of it: what warps have, then what blocks of the cluster send to this one, for two heads in turn.
template <int kValueDim>
struct MergeMemory {
  static constexpr int kPairs = kMergeRows * kValueDim / 2;  // of neighbouring elements
  struct Inbox {
    float2 pairs[kPairs + kMostCluster];  // (blocks, pairs of this block)
    float2 states[kMostCluster][kMergeRows];
  };
  struct alignas(16) Warp {                 // written by 16 bytes
    float rows[kMergeRows][kValueDim + 8];  // so that threads that store together do so to different banks
    float2 states[kMergeRows];
  };
  Inbox inbox[2];
  bool last[2];
  Warp warp[1];  // (warps)
  static constexpr int64_t Bytes(int64_t warps) {
    return (static_cast<int64_t>(sizeof(MergeMemory)) + (warps - 1) * static_cast<int64_t>(sizeof(Warp)) + 127) / 128 *
           128;
  }
};

// One head of one cache as its results are stored: a part of it where there are several.
template <int kValueDim>
struct Result {
  const AttendLaunch& launch;
  int32_t cache, kv_head;
  float* partial;  // (kPartialRows, kValueDim + 2) of this part, or null: the result itself
  __device__ __forceinline__ void Store(int32_t row, int32_t dim, const Merged& m, float2 x) const {
    if (partial != nullptr) {
      float* to = partial + row * (kValueDim + 2);
      *reinterpret_cast<float2*>(to + dim) = x;
      if (dim == 0) *reinterpret_cast<float2*>(to + kValueDim) = make_float2(m.max, m.sum);
      return;
    }
    const float inverse = m.Inverse();
    StoreOut(launch, row, cache, kv_head, dim, make_float2(x.x * inverse, x.y * inverse));
    if (dim == 0) StoreLse(launch, row, cache, kv_head, m.Lse());
  }
};

// The last share of a head to finish: partial results become the result.
template <int kValueDim>
__device__ __noinline__ void MergeSplits(const Result<kValueDim>& result, const float* partial, int32_t splits) {
  const auto threads = static_cast<int32_t>(blockDim.x), thread = static_cast<int32_t>(threadIdx.x);
  constexpr int64_t kStride = int64_t{kPartialRows} * (kValueDim + 2);
  constexpr int kAtOnce = 8;
  for (int32_t i = 2 * thread; i < result.launch.rows * kValueDim; i += 2 * threads) {
    const int32_t row = i / kValueDim, dim = i % kValueDim;
    const float* from = partial + row * (kValueDim + 2);
    Merged all;
    float2 total{};
    for (int32_t first = 0; first < splits; first += kAtOnce) {
      float2 x[kAtOnce], state[kAtOnce];
#pragma unroll
      for (int32_t j = 0; j < kAtOnce; ++j) {
        const float* at = from + min(first + j, splits - 1) * kStride;
        x[j] = __ldcg(reinterpret_cast<const float2*>(at + dim));
        state[j] = __ldcg(reinterpret_cast<const float2*>(at + kValueDim));
      }
#pragma unroll
      for (int32_t j = 0; j < kAtOnce; ++j) {
        if (first + j >= splits || state[j].x == kMinusInfinity) continue;
        const float top = fmaxf(all.max, state[j].x), before = Exp2(all.max - top), now = Exp2(state[j].x - top);
        total.x = total.x * before + x[j].x * now;
        total.y = total.y * before + x[j].y * now;
        all.sum = all.sum * before + state[j].y * now;
        all.max = top;
      }
    }
    result.Store(row, dim, all, total);
  }
}

// What the warps of a cluster have becomes the result, or, with several splits, a partial result (see FinishSplits). Called by all threads of the cluster; `turn` counts the calls' chunks of rows.
template <class State, int kValueDim>
__device__ __forceinline__ void Finish(const AttendLaunch& launch, const State& state, MergeMemory<kValueDim>& memory,
                                       int32_t head_index, int32_t split, int32_t splits, uint32_t& turn) {
  using Memory = MergeMemory<kValueDim>;
  const auto threads = static_cast<int32_t>(blockDim.x), thread = static_cast<int32_t>(threadIdx.x);
  const int32_t warp = thread / kWarp, warps = threads / kWarp;
  const auto blocks = static_cast<int32_t>(ClusterSize()), rank = static_cast<int32_t>(ClusterRank());
  Result<kValueDim> result{launch, head_index / launch.args.kv_heads, head_index % launch.args.kv_heads, nullptr};
  const Head& head = launch.args.heads[result.cache][result.kv_head];
  if (splits > 1) result.partial = head.partial + int64_t{split} * kPartialRows * (kValueDim + 2);
  constexpr int kStride = static_cast<int>(sizeof(typename Memory::Warp) / sizeof(float2));
  for (int32_t first = 0; first < launch.rows; first += kMergeRows, ++turn) {
    const int32_t pairs = min(kMergeRows, launch.rows - first) * kValueDim / 2,
                  each = static_cast<int32_t>(CeilDiv(pairs, blocks));
    auto& inbox = memory.inbox[turn % 2];
    __syncthreads();  // nobody reads any more what is overwritten now
    state.template StoreRows<kValueDim + 8>(first, &memory.warp[warp].rows[0][0], memory.warp[warp].states);
    if (blocks > 1 && turn == 0) ClusterWait();  // all blocks are there
    __syncthreads();
    for (int32_t i = thread; i < pairs; i += threads) {
      const int32_t row = 2 * i / kValueDim, dim = 2 * i % kValueDim;
      Merged m;
      const float2* states = memory.warp[0].states + row;
      m.template AddAll<kMostWarps>(states, kStride, warps);
      float2 sum{};
#pragma unroll
      for (int w = 0; w < kMostWarps; ++w)
        if (w < warps) {
          const float weight = m.Weight(states[w * kStride].x);
          const float2 x = *reinterpret_cast<const float2*>(&memory.warp[w].rows[row][dim]);
          sum.x += weight * x.x, sum.y += weight * x.y;
        }
      if (blocks == 1)
        result.Store(first + row, dim, m, sum);
      else
        StoreRemote(inbox.pairs + rank * each + i % each, static_cast<uint32_t>(i / each), sum);
    }
    if (blocks == 1) continue;
    for (int32_t i = thread; i < kMergeRows * blocks; i += threads) {
      Merged m;
      m.template AddAll<kMostWarps>(memory.warp[0].states + i % kMergeRows, kStride, warps);
      StoreRemote(&inbox.states[rank][i % kMergeRows], static_cast<uint32_t>(i / kMergeRows),
                  make_float2(m.max, m.sum));
    }
    ClusterArrive();
    ClusterWait();
    // This block's part of the rows. Two barriers on, others write to the same memory again.
    for (int32_t i = thread; i < each && rank * each + i < pairs; i += threads) {
      const int32_t at = rank * each + i, row = 2 * at / kValueDim, dim = 2 * at % kValueDim;
      Merged m;
      m.template AddAll<kMostCluster>(&inbox.states[0][row], kMergeRows, blocks);
      float2 sum{};
#pragma unroll 4
      for (int32_t b = 0; b < blocks; ++b) {
        const float weight = m.Weight(inbox.states[b][row].x);
        const float2 x = inbox.pairs[b * each + i];
        sum.x += weight * x.x, sum.y += weight * x.y;
      }
      result.Store(first + row, dim, m, sum);
    }
  }
}

// Once all of a share is done: whoever is the last one of a head that several shares have merges what they have. Waiting for the
// others to see what was written means to wait for all that was asked for, too: so this is not done between heads.
template <int kValueDim>
__device__ __forceinline__ void FinishSplits(const AttendLaunch& launch, MergeMemory<kValueDim>& memory,
                                             const Share& share, const Share& next) {
  const bool first = share.splits > 1, last = next.tile > 0 && next.head != share.head && next.splits > 1;
  if (!first && !last) return;
  const bool leader = threadIdx.x == 0;
  const auto head = [&](int32_t index) -> const Head& {
    return launch.args.heads[index / launch.args.kv_heads][index % launch.args.kv_heads];
  };
  __threadfence();
  if (ClusterSize() > 1) {
    ClusterArrive();
    ClusterWait();
    if (ClusterRank() != 0) return;
  } else {
    __syncthreads();
  }
  if (leader) {
    __threadfence();
    memory.last[0] = first && atomicAdd(head(share.head).ticket, 1) == share.splits - 1;
    memory.last[1] = last && atomicAdd(head(next.head).ticket, 1) == next.splits - 1;
  }
  __syncthreads();
  __threadfence();
  for (int i = 0; i < 2; ++i) {
    if (!memory.last[i]) continue;
    const int32_t index = i == 0 ? share.head : next.head;
    const Result<kValueDim> result{launch, index / launch.args.kv_heads, index % launch.args.kv_heads, nullptr};
    MergeSplits<kValueDim>(result, head(index).partial, i == 0 ? share.splits : next.splits);
    if (leader) *head(index).ticket = 0;
  }
}

}  // namespace express::cuda

#endif  // EXPRESS_SRC_CUDA_ATTEND_MERGE_CUH_
