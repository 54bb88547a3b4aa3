// Protected entries, once departures have their scores: who beats the weakest drives it out, in order.
//
// One block per head. Once the set is full few departures beat its weakest entry; those that beat the weakest of now are listed,
// and up to 256 of them compete at once. With w_0, w_1, ... the set's entries, weakest first, and c_0, c_1, ... the candidates,
// the weakest entry that candidate i meets is the (i + 1)-th weakest of all w and of c_0 .. c_{i-1}: i entries weaker than it
// have gone by then, whoever they were. So all candidates find whom they meet at once: they are ranked among the w and among each
// other, and every one then looks for the (i + 1)-th bit of a mask of ranks of those that are there by its time.
#include <algorithm>
#include <limits>

#include "src/cuda/admit.cuh"

namespace express::cuda {
namespace {

constexpr uint32_t kAll = 0xFFFFFFFFu;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kStage = 2048;  // scores that are fetched at a time
constexpr int kStages = 3;    // of which so many are on their way or in hand
constexpr int kQuads = kStage / (4 * kThreads);
constexpr int32_t kMostShared = 4608;  // protected entries that find room in shared memory
constexpr int32_t kMost = kThreads;    // candidates that compete at once, and weakest entries that are kept sorted
constexpr int32_t kFew = kMost / 2;    // sorted entries below which more are looked for
constexpr uint32_t kNone = std::numeric_limits<uint32_t>::max();

// Masks of ranks: a candidate's or a sorted entry's, among both.
constexpr int32_t kWords = 2 * kMost / 32;
constexpr int32_t kPiece = kMost / kWords;   // candidates that one half of a warp goes through, word by word
constexpr int32_t kMaskStride = kWords + 4;  // so that lanes read different banks
static_assert(kWords * 2 == kWarp && kPiece * kWords == kMost && kThreads == kPiece * kWords);

struct SelectionMemory {  // shared
  // The set's weakest entries, the weakest first: those that departures can drive out next. Held are all up to a bound. No score
  // is negative, so their bits are ordered as they are.
  uint32_t bits[kMost];
  int32_t at[kMost];  // which protected entry
  // Candidates at work.
  __align__(16) uint32_t candidate_bits[kMost];
  int32_t at_rank[kMost];    // of Rank
  int32_t above[kMost];      // of candidates by rank: sorted entries that are weaker
  int32_t owner[2 * kMost];  // by rank among both: sorted entry i, or ~i: candidate i
  int32_t link[kMost];  // by candidate: the protected entry whose place it takes, or ~i: that which candidate i took
  __align__(16) uint32_t candidate_mask[kWords];
  __align__(16) uint32_t mask[kMost][kMaskStride];     // ranks of candidates before this one, of its piece
  __align__(16) uint32_t before[kWords][kMaskStride];  // ranks of candidates of pieces before this one
  uint32_t piece[kWords][kWords];
  // Of FillWeakest: unsorted.
  __align__(16) uint32_t list_bits[kMost];
  int32_t list_at[kMost];
  int32_t sums[2][kWarps];
  int32_t listed;
  uint16_t candidates[kStage];  // of a stage, in order: scores that beat the weakest of then
};
static_assert(kStage <= 1 << 16);

// ---- code that is run once or twice in a short call is kept small: it is fetched while it runs ----

// How many of values[0, count) are less than x; behind them there are as many of kNone as fill four.
__device__ __forceinline__ int32_t CountLess(const uint32_t* values, int32_t count, uint32_t x) {
  const auto* quads = reinterpret_cast<const uint4*>(values);
  int32_t less = 0;
#pragma unroll 4
  for (int32_t j = 0; j < (count + 3) / 4; ++j) {
    const uint4 q = quads[j];
    less += (q.x < x) + (q.y < x) + (q.z < x) + (q.w < x);
  }
  return less;
}

// The full set, to look for its weakest entries: the lowest scores, among equals the youngest.
struct FullSet {
  const float* score;    // (count)
  const int32_t* entry;  // (count)
  const int64_t* slab_position;
  int64_t first_position;
  int32_t count;

  __device__ int64_t Position(int32_t at) const {
    const int32_t index = entry[at];
    return index < 0 ? slab_position[-1 - index] : first_position + index;
  }
  // Entries that the predicate is true of, by their number and the bits of their score.
  template <class Predicate>
  __device__ int32_t Count(SelectionMemory& memory, int parity, const Predicate& predicate) const {
    int32_t own = 0;
#pragma unroll 1
    for (auto i = static_cast<int32_t>(threadIdx.x); i < count; i += kThreads)
      own += predicate(i, __float_as_uint(score[i]));
    int32_t(&sums)[kWarps] = memory.sums[parity];
    const int32_t warp = __reduce_add_sync(kAll, own);
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = warp;
    __syncthreads();  // one is enough: the next count uses the other sums
    int32_t all = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) all += sums[w];
    return all;
  }
  // The entry of rank `wanted`, counted from 1, by its score and position.
  __device__ void FindBound(SelectionMemory& memory, int32_t wanted, uint32_t* bound, int64_t* position) const {
    uint32_t value = 0;
#pragma unroll 1
    for (int bit = 31; bit >= 0; --bit) {
      const uint32_t next = value | (1u << bit);
      if (Count(memory, bit % 2, [&](int32_t, uint32_t bits) { return bits < next; }) < wanted) value = next;
    }
    *bound = value;
    const int32_t equals = wanted - Count(memory, 1, [&](int32_t, uint32_t bits) { return bits < value; });
    if (equals == Count(memory, 0, [&](int32_t, uint32_t bits) { return bits == value; })) return;
#pragma unroll 1
    for (int bit = 62; bit >= 0; --bit) {
      const int64_t next = *position | (int64_t{1} << bit);
      const auto younger = [&](int32_t i, uint32_t bits) { return bits == value && Position(i) >= next; };
      if (Count(memory, 1 - bit % 2, younger) >= equals) *position = next;
    }
  }
};

// Where there are equals: `weaker(j)` says whether the j-th is weaker than the thread's own, if it is equal to it.
template <class Weaker>
__device__ __noinline__ int32_t RankAmongEquals(const uint32_t* values, int32_t count, const Weaker weaker) {
  const uint32_t own = values[threadIdx.x];
  int32_t rank = 0;
#pragma unroll 1
  for (int32_t j = 0; j < count; ++j) rank += values[j] < own || (values[j] == own && weaker(j));
  return rank;
}

// The rank of the thread's own among values[0, count), of threads that have one. All threads of the block call it.
template <class Weaker>
__device__ __forceinline__ int32_t Rank(const uint32_t* values, int32_t count, int32_t* at_rank, const Weaker& weaker) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const bool has = thread < count;
  const int32_t rank = has ? CountLess(values, count, values[thread]) : 0;
  if (has) atomicExch(&at_rank[rank], thread);  // equals meet there: whoever is the last
  __syncthreads();
  const bool equals = __syncthreads_or(has && at_rank[rank] != thread);
  return equals && has ? RankAmongEquals(values, count, weaker) : rank;
}

// Fills memory.bits and .at with the weakest entries, kMost if there are as many, sorted. Returns the bound: all others are at least
// as strong as an entry of this score.
__device__ __noinline__ uint32_t FillWeakest(const FullSet set, SelectionMemory& memory) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t wanted = min(kMost, set.count);
  uint32_t bound = kNone;
  int64_t position = 0;
  __syncthreads();
  if (wanted < set.count) set.FindBound(memory, wanted, &bound, &position);
  if (thread == 0) memory.listed = 0;
  if (thread >= wanted) memory.list_bits[thread] = kNone;
  __syncthreads();
#pragma unroll 1
  for (int32_t i = thread; i < set.count; i += kThreads) {
    const uint32_t bits = __float_as_uint(set.score[i]);
    if (bits > bound || (bits == bound && set.Position(i) < position)) continue;
    const int32_t to = atomicAdd(&memory.listed, 1);
    if (to >= kMost) continue;  // never, as no two entries have one position
    memory.list_bits[to] = bits;
    memory.list_at[to] = i;
  }
  __syncthreads();
  const int32_t* list_at = memory.list_at;
  const int32_t rank = Rank(memory.list_bits, wanted, memory.at_rank,
                            [=](int32_t j) { return set.Position(list_at[j]) > set.Position(list_at[thread]); });
  if (thread < wanted) {
    memory.bits[rank] = memory.list_bits[thread];
    memory.at[rank] = memory.list_at[thread];
  }
  __syncthreads();
  return bound;
}

// The protected set of one head, by all threads of a block.
class Selection {
 public:
  __device__ Selection(const AdmitArgs& args, const AdmitHead& head, SelectionMemory& memory, float* score,
                       int32_t* entry)
      : args_(args), head_(head), memory_(memory), score_(score), entry_(entry) {}

  __device__ int32_t room() const { return args_.protect - count_; }

  __device__ void Load() {
    const int32_t count = head_.protected_count[0];
#pragma unroll 1
    for (int32_t i = thread_; i < count; i += kThreads) {
      entry_[i] = head_.protected_index[i];
      score_[i] = head_.score[i];
    }
    Grow(count);
  }
  __device__ void Store() {
    if (room() == 0 && sorted_ == 0) Refill();
#pragma unroll 1
    for (int32_t i = thread_; i < count_; i += kThreads) {
      head_.protected_index[i] = entry_[i];
      head_.score[i] = score_[i];
    }
    if (thread_ != 0) return;
    head_.protected_count[0] = count_;
    head_.protected_count[1] = room() == 0 ? memory_.at[0] : 0;
  }
  __device__ void Snapshot(int32_t* to) const {
#pragma unroll 1
    for (int32_t i = thread_; i < count_; i += kThreads) to[i] = entry_[i];
  }

  // Departures i .. i + count - 1 join; there is room.
  __device__ void Join(int64_t i, int32_t count, const float* scores) {
#pragma unroll 1
    for (int32_t j = thread_; j < count; j += kThreads) {
      entry_[count_ + j] = DepartureIndex(args_, head_, i + j);
      score_[count_ + j] = scores[j];
      head_.loser[i + j] = kSkip;
    }
    Grow(count);
  }

  // Departures [begin, end) of the call, which lie in the stage from `stage_begin` on, compete with the full set.
  __device__ void Compete(int64_t stage_begin, const float* stage, int64_t begin, int64_t end) {
    const auto last = static_cast<int32_t>(end - stage_begin);
    for (auto at = static_cast<int32_t>(begin - stage_begin); at < last;) {
      if (sorted_ == 0) Refill();
      const int32_t count = Collect(stage, at, last);
      if (count == 0) return;
      const bool all_sorted = bound_ == kNone;
      if (!all_sorted && sorted_ < min(count, kFew)) Refill();
      const int32_t now = min(count, all_sorted ? kMost : sorted_);
      at = now < count ? memory_.candidates[now - 1] + 1 : last;
      CompeteAtOnce(stage_begin, stage, now);
    }
  }

 private:
  __device__ void Grow(int32_t count) {
    count_ += count;
    __syncthreads();
  }
  __device__ void Refill() {
    bound_ = FillWeakest({score_, entry_, head_.slab_position, args_.first_position, args_.protect}, memory_);
    sorted_ = min(kMost, args_.protect);
  }

  // Lists who of the stage's [begin, end) beats the weakest of now: others have no chance. Returns how many, kMost at least
  // if there are as many.
  __device__ int32_t Collect(const float* stage, int32_t begin, int32_t end) {
    constexpr int32_t kOwn = kStage / kThreads;
    static_assert(kOwn % 4 == 0 && kOwn <= 32);
    const float weakest = __uint_as_float(memory_.bits[0]);
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
    int32_t(&sums)[kWarps] = memory_.sums[parity_ ^= 1];
    if (thread_ % kWarp == kWarp - 1) sums[thread_ / kWarp] = before;
    __syncthreads();
    int32_t all = 0;
    before -= __popc(above);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      before += w < thread_ / kWarp ? sums[w] : 0;
      all += sums[w];
    }
#pragma unroll 1
    for (; above != 0; above &= above - 1)
      memory_.candidates[before++] = static_cast<uint16_t>(first + __ffs(static_cast<int>(above)) - 1);
    __syncthreads();
    return all;
  }

  // How many of ascending values[0, count) are below (kEqual: or equal to) x; count <= kMost.
  template <bool kEqual, class X>
  __device__ static int32_t Below(const X* values, int32_t count, X x) {
    int32_t low = 0;
#pragma unroll 1
    for (int32_t step = kMost; step > 0; step /= 2) {
      const int32_t next = low + step;
      if (next <= count && (kEqual ? values[next - 1] <= x : values[next - 1] < x)) low = next;
    }
    return low;
  }

  // The first `count` candidates, count > 0: thread i has candidate i and sorted entry i.
  __device__ void CompeteAtOnce(int64_t stage_begin, const float* stage, int32_t count) {
    SelectionMemory& m = memory_;
    const bool is_candidate = thread_ < count, is_sorted = thread_ < sorted_;
    const int32_t own = is_candidate ? m.candidates[thread_] : 0;
    const uint32_t bits = is_candidate ? __float_as_uint(stage[own]) : kNone;
    const uint32_t sorted_bits = is_sorted ? m.bits[thread_] : kNone;
    const int32_t sorted_at = is_sorted ? m.at[thread_] : 0;
    m.candidate_bits[thread_] = bits;
    if (thread_ < kWords) m.candidate_mask[thread_] = 0;
    __syncthreads();

    // Ranks. An entry is weaker than its equals that are older; candidates are younger than all that is sorted.
    const int32_t rank = Rank(m.candidate_bits, count, m.at_rank, [own = thread_](int32_t j) { return j > own; });
    const int32_t weaker = is_candidate ? Below<false>(m.bits, sorted_, bits) : 0;
    const int32_t place = weaker + rank;  // among both
    if (is_candidate) {
      m.above[rank] = weaker;
      m.owner[place] = ~thread_;
      m.link[thread_] = place;
      atomicOr(&m.candidate_mask[place / 32], 1u << place % 32);
    }
    __syncthreads();
    const int32_t sorted_place = thread_ + Below<true>(m.above, count, thread_);
    if (is_sorted) m.owner[sorted_place] = thread_;
    MaskPieces(count);
    __syncthreads();
    SumPieces();
    __syncthreads();
    const int32_t met = is_candidate ? RankMet(sorted_ + count) : 0;

    // Whom candidate i meets it drives out, if it is stronger, and takes its place.
    const int32_t other = is_candidate ? m.owner[met] : 0;
    const bool wins = is_candidate && met < place;
    int32_t loser = 0;
    if (wins)
      loser = other < 0 ? DepartureIndex(args_, head_, stage_begin + m.candidates[~other]) : entry_[m.at[other]];
    __syncthreads();
    int32_t link = !wins ? 0 : other < 0 ? other : m.at[other];
    m.link[thread_] = link;
    while (__syncthreads_or(link < 0)) {
      const int32_t next = link < 0 ? m.link[~link] : link;
      __syncthreads();
      m.link[thread_] = link = next;
    }
    if (wins) {
      const int64_t i = stage_begin + own;
      head_.loser[i] = loser;
      if (place >= count) {  // it is there in the end
        entry_[link] = DepartureIndex(args_, head_, i);
        score_[link] = __uint_as_float(bits);
      }
    }
    // The weakest `count` of both have gone.
    if (is_candidate && place >= count && bits <= bound_) m.bits[place - count] = bits, m.at[place - count] = link;
    if (is_sorted && sorted_place >= count)
      m.bits[sorted_place - count] = sorted_bits, m.at[sorted_place - count] = sorted_at;
    const bool beyond = is_candidate && bits > bound_;  // these are not sorted
    sorted_ -= __syncthreads_count(beyond);
  }

  // For every candidate, the ranks of those before it in its piece; half a warp has a piece, a lane a word of its ranks.
  __device__ void MaskPieces(int32_t count) const {
    SelectionMemory& m = memory_;
    const int32_t piece = thread_ / kWords, word = thread_ % kWords, first = piece * kPiece;
    uint32_t ranks = 0;
#pragma unroll 4
    for (int32_t i = first; i < first + kPiece; ++i) {
      m.mask[i][word] = ranks;
      const int32_t place = i < count ? m.link[i] : -1;
      if (place >> 5 == word) ranks |= 1u << (place & 31);
    }
    m.piece[piece][word] = ranks;
  }
  __device__ void SumPieces() const {
    SelectionMemory& m = memory_;
    const int32_t piece = thread_ / kWords, word = thread_ % kWords;
    uint32_t ranks = 0;
#pragma unroll
    for (int32_t p = 0; p < kWords - 1; ++p)
      if (p < piece) ranks |= m.piece[p][word];
    m.before[piece][word] = ranks;
  }

  // The rank of the entry that this thread's candidate i meets: the (i + 1)-th that is there, of `all` ranks.
  __device__ int32_t RankMet(int32_t all) const {
    const SelectionMemory& m = memory_;
    int32_t left = thread_ + 1, word = 0;
    uint32_t found = 0;
#pragma unroll 1
    for (int32_t quad = 0; quad < kWords / 4; ++quad) {
      const uint4 own = reinterpret_cast<const uint4*>(m.mask[thread_])[quad],
                  before = reinterpret_cast<const uint4*>(m.before[thread_ / kPiece])[quad],
                  candidates = reinterpret_cast<const uint4*>(m.candidate_mask)[quad];
      const uint32_t there[4] = {own.x | before.x | ~candidates.x, own.y | before.y | ~candidates.y,
                                 own.z | before.z | ~candidates.z, own.w | before.w | ~candidates.w};
#pragma unroll
      for (int32_t w = 0; w < 4; ++w) {
        const int32_t first = (4 * quad + w) * 32;
        const uint32_t valid = all >= first + 32 ? kAll : all > first ? ~(kAll << (all - first)) : 0;
        const uint32_t ranks = there[w] & valid;
        const int32_t bits = __popc(ranks);
        if (found == 0 && left <= bits) found = ranks, word = first;
        if (found == 0) left -= bits;
      }
    }
    // Bit number `left` of `found`, counted from 1.
    int32_t bit = 0;
#pragma unroll
    for (int32_t step = 16; step > 0; step /= 2) {
      const int32_t bits = __popc(found >> bit & ((1u << step) - 1));
      if (left > bits) left -= bits, bit += step;
    }
    return word + bit;
  }

  const AdmitArgs& args_;
  const AdmitHead& head_;
  SelectionMemory& memory_;
  float* score_;    // (protect)
  int32_t* entry_;  // (protect)
  int32_t count_ = 0;
  int32_t sorted_ = 0;      // entries of memory.bits; all others of the set are at least as strong as one of score
  uint32_t bound_ = kNone;  // `bound`
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
      const int32_t at = 4 * (q * kThreads + static_cast<int32_t>(threadIdx.x));
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

// One block per head. Shared: the ring of scores; kShared: and the set's scores and entries.
template <bool kShared>
__global__ __launch_bounds__(kThreads, 1) void SelectKernel(const __grid_constant__ AdmitArgs args) {
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
#pragma unroll 1
  for (int32_t d = static_cast<int32_t>(threadIdx.x); d < args.key_dim; d += kThreads) {  // see Scorer::Score
    head.mean[d] = head.run_means[d];
    head.sum[d] = head.run_means[args.key_dim + d];
  }
}

}  // namespace

void AdmitSelect(const AdmitArgs& args, cudaStream_t stream) {
  constexpr size_t kRing = kStages * kStage * sizeof(float), kEntry = sizeof(float) + sizeof(int32_t);
  static_assert(kRing + kMostShared * kEntry + sizeof(SelectionMemory) <= 99 * 1024);  // of any GPU since Ampere
  const bool shared = args.protect <= kMostShared;
  const auto kernel = shared ? &SelectKernel<true> : &SelectKernel<false>;
  const size_t bytes = kRing + (shared ? static_cast<size_t>(args.protect) * kEntry : 0);
  // Always the same number: calls of several threads do not change it under each other.
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       static_cast<int>(kRing + (shared ? kMostShared * kEntry : 0)));
  kernel<<<static_cast<uint32_t>(args.head_count), kThreads, bytes, stream>>>(args);
}

}  // namespace express::cuda
