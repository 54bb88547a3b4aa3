// Kernel halving of four lists of four entries by one warp: the lists that nearly all halvings of a prompt have.
//
// One list of two pairs fills a quarter of a tile of products, so a warp takes four of them: eight pairs make one tile, of
// which the four products of each list with itself are used. Decisions are those of HalveList to the bit: every sum is taken in
// its order.
#ifndef EXPRESS_SRC_CUDA_HALVE_FOURS_CUH_
#define EXPRESS_SRC_CUDA_HALVE_FOURS_CUH_

#include "src/cuda/halve.cuh"

namespace express::cuda {

inline constexpr int32_t kFours = 4;        // lists
inline constexpr int32_t kFourEntries = 4;  // of a list
static_assert(kFours * kFourEntries == kWarpList);

namespace halve {

// Rows 4 l .. 4 l + 3 are list l; `numbers`: of the halvings.
template <class T, class RowsOf>
struct FourLists : List<T, kWarp, kWarpList, RowsOf> {
  using Base = List<T, kWarp, kWarpList, RowsOf>;
  using typename Base::Piece;
  using typename Base::RowSums;
  static constexpr int kHalfWarp = kWarp / 2;  // lanes that read a list

  __device__ __forceinline__ static float LargestOfList(float x) {
#pragma unroll
    for (int offset = kHalfWarp / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
    return x;
  }

  // Fills `pair` and, for every list, what Prepare finds. False if a list needs another origin or scale: then nothing is
  // decided here.
  __device__ __forceinline__ bool PreparePlain() {
    const float plain = 0.5f * kLog2E * fmaxf(0.0f, this->params.scale);
    bool odd = this->params.gamma != 1;
    float own_exponent = 0, own_inverse = 0;  // of list lane / 8 in the end
#pragma unroll
    for (int32_t half = 0; half < 2; ++half) {
      const int32_t a = half * kFours + this->lane / kRowLanes;
      RowSums k{}, v{};
      MeasurePair(a, k, v);
      const Pair out{
          Base::SumLanes(k.x), Base::SumLanes(k.y),       0, 0, Base::SumLanes(k.distance), Base::SumLanes(v.x),
          Base::SumLanes(v.y), Base::SumLanes(v.distance)};
      if (this->lane % kRowLanes == 0) this->pair[a] = out;
      const float key = LargestOfList(k.largest), value = LargestOfList(v.largest),
                  norm = LargestOfList(fmaxf(out.norm_x, out.norm_y));
      odd |= key > kLargestKey || (value > 0 && (value > kLargestValue || value < kSmallestValue)) ||
             !(plain * norm <= kPlainExponent);
      const float exponent =
          fminf(plain, kLargestExponent / fmaxf(4 * static_cast<float>(this->key_dim) * key * key, 1.0f));
      const float inverse = value > 0 ? 1 / (value * value) : 1;
      // Lanes 0 and 16 have lists 2 half and 2 half + 1.
      const int source = this->lane / kRowLanes % 2 * kHalfWarp;
      const float exponent_of = __shfl_sync(kAllLanes, exponent, source),
                  inverse_of = __shfl_sync(kAllLanes, inverse, source);
      if (this->lane / kHalfWarp == half) own_exponent = exponent_of, own_inverse = inverse_of;
    }
    if (__any_sync(kAllLanes, odd)) return false;
    this->exponent = own_exponent;
    this->inverse_square = own_inverse;
    return true;
  }
  __device__ __forceinline__ void MeasurePair(int32_t a, RowSums& k, RowSums& v) const {
    const typename Base::Row key_x = this->rows.Key(2 * a), key_y = this->rows.Key(2 * a + 1);
    const typename Base::Row value_x = this->rows.Value(2 * a), value_y = this->rows.Value(2 * a + 1);
    constexpr int32_t step = kRowLanes * kElements;
    for (int32_t at = this->lane % kRowLanes * kElements; at < max(this->key_dim, this->value_dim); at += 2 * step) {
      Piece keys[2], values[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        keys[i] = Base::LoadPiece(key_x, key_y, at + i * step, this->key_dim);
        values[i] = Base::LoadPiece(value_x, value_y, at + i * step, this->value_dim);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) Base::SumPiece(keys[i], at + i * step, this->key_dim, this->key_adjust, nullptr, k);
#pragma unroll
      for (int i = 0; i < 2; ++i)
        Base::SumPiece(values[i], at + i * step, this->value_dim, this->value_adjust, nullptr, v);
    }
  }

  // Lane a < 8 has pair a, of halving `number`: whether y is kept.
  __device__ __forceinline__ bool Decide(uint64_t number) const {
    const int lane = this->lane;
    __syncwarp();
    // Lane a finishes pair a with what lane 8 l has found of its list l.
    const int of_list = lane % 8 / 2 * 8;
    Base finish = *this;
    finish.exponent = __shfl_sync(kAllLanes, this->exponent, of_list);
    finish.inverse_square = __shfl_sync(kAllLanes, this->inverse_square, of_list);
    finish.Finish(0);
    float d[2];
    this->TileFromRows(0, 0, d);
    const int list = lane % 8 / 2;
    // Of a list, D_10: row 2 l + 1, column 2 l.
    const int source = 4 * (2 * list + 1) + 2 * (list % 2);
    const float first = __shfl_sync(kAllLanes, d[0], source), second = __shfl_sync(kAllLanes, d[1], source);
    const float d10 = list < 2 ? first : second;
    const float draw = UniformFromBits(DrawBits(this->stream, RandomPurpose::kHalve, number, lane % 2));
    const bool complement = UniformFromBits(DrawBits(this->stream, RandomPurpose::kComplement, number, 0)) < 0.5f;
    const float root = this->pair[lane % 8].centred_y;
    const float other = __shfl_xor_sync(kAllLanes, root, 1);
    const float threshold = this->Factor(kFourEntries / 2) * root * fmaxf(fmaxf(root, 0.0f), other);
    const float infinity = __int_as_float(0x7F800000);
    const bool coin = lane % 2 == 0 || !(threshold > 0);
    const float u = !coin ? (2 * draw - 1) * threshold : draw < 0.5f ? -infinity : infinity;
    const bool first_keeps_y = (__ballot_sync(kAllLanes, u < 0) >> (lane & ~1) & 1) != 0;
    const float sum = lane % 2 == 0 ? 0.0f : first_keeps_y ? -d10 : d10;
    return (u < sum) != complement;
  }
};

}  // namespace halve

// Four lists of four entries: rows 4 l .. 4 l + 3 of `rows` are list l; all lists are there, maybe one of them several times.
// `number`: of the halving of list lane % 8 / 2. Returns whether y of pair lane % 2 of that list survives; false in `done`
// if nothing has been decided, and HalveList must do it. All of the warp call it; `shared` has HalveWarpBytes.
template <class T, class RowsOf>
__device__ __forceinline__ bool HalveFours(const RowsOf& rows, int32_t key_dim, int32_t value_dim,
                                           const HalveParams& params, const StreamKey& key, uint64_t number,
                                           char* shared, bool& done) {
  done = false;
  if (params.coin) return false;
  const halve::Layout layout = halve::LayOut<kWarpList>(shared, key_dim);
  halve::FourLists<T, RowsOf> lists{
      {rows, kWarpList, kWarpList / 2, key_dim, value_dim, params, key, number, layout, layout.pairs, nullptr, false}};
  done = lists.PreparePlain();
  return done && lists.Decide(number);
}

}  // namespace express::cuda

#endif  // EXPRESS_SRC_CUDA_HALVE_FOURS_CUH_
