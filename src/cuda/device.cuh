// What the kernels share: storage types as floats, and the tensor-core and copy instructions of sm_80 and above.
#ifndef EXPRESS_SRC_CUDA_DEVICE_CUH_
#define EXPRESS_SRC_CUDA_DEVICE_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#include "express/types.h"
#include "src/core/rotary.h"

namespace express::cuda {

using Half = __half;
using BFloat16 = __nv_bfloat16;

inline constexpr float kLog2E = 1.44269504088896341f;
inline constexpr int kWarp = 32;

__host__ __device__ constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// body(T()) with the type that stores `dtype`, one of the three floating ones.
template <class Body>
auto WithType(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kF16:
      return body(Half());
    case DType::kBF16:
      return body(BFloat16());
    default:
      return body(float());
  }
}

__device__ __forceinline__ float ToFloat(float x) { return x; }
__device__ __forceinline__ float ToFloat(Half x) { return __half2float(x); }
__device__ __forceinline__ float ToFloat(BFloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void FromFloat(float x, float* to) { *to = x; }
__device__ __forceinline__ void FromFloat(float x, Half* to) { *to = __float2half_rn(x); }
__device__ __forceinline__ void FromFloat(float x, BFloat16* to) { *to = __float2bfloat16_rn(x); }

// ---- 8-bit storage: what src/cpu/kernels.h says of it ----

struct Int8 {
  int8_t code;
};
// A row of codes; a number is scale * code, exactly, in f32.
struct CodeRow {
  const int8_t* code;
  float scale;
  __device__ __forceinline__ float operator[](int32_t i) const { return scale * static_cast<float>(code[i]); }
};
template <class T>
inline constexpr bool kScaled = std::is_same_v<T, Int8>;
// A row of the storage type T, and the type in which its numbers are without rounding.
template <class T>
using RowOf = std::conditional_t<kScaled<T>, CodeRow, const T*>;
template <class T>
using NumberOf = std::conditional_t<kScaled<T>, float, T>;

__device__ __forceinline__ float ToFloat(Int8 x) { return static_cast<float>(x.code); }  // not scaled
__device__ __forceinline__ float FromScale(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }
// The scale of a row whose largest magnitude this is: rounded up, of zeros 0, of what is not finite NaN.
__device__ __forceinline__ uint16_t ScaleFor(float largest, bool finite) {
  if (!finite) return 0x7FC0;
  if (largest == 0) return 0;
  const float scale = fmaxf(__fdiv_rn(largest, 127.0f), __uint_as_float(0x00800000u));
  return static_cast<uint16_t>((__float_as_uint(scale) + 0xFFFFu) >> 16);
}
__device__ __forceinline__ int8_t CodeFor(float x, uint16_t scale) {
  if (scale == 0 || scale == 0x7FC0) return 0;
  return static_cast<int8_t>(__float2int_rn(__fdiv_rn(x, FromScale(scale))));
}
// The bf16 of two codes: bytes 0 and 1 of a word, 2 and 3, 0 and 2, 1 and 3.
enum CodePair : uint32_t { kFirstTwo = 0x4140, kLastTwo = 0x4342, kEven = 0x4240, kOdd = 0x4341 };
template <CodePair kPair>
__device__ __forceinline__ uint32_t CodesToBFloat16(uint32_t word) {
  // With 0x43 above it, the low seven bits of a code make 128 + those; its sign makes 128, or 256 where it is set.
  const uint32_t pair = __byte_perm(word, 0x43434343u, kPair), low = pair & 0xFF7FFF7Fu, sign = pair & 0xFF80FF80u;
  constexpr uint32_t kMinusOne = 0xBF80BF80u;
  uint32_t codes;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(codes) : "r"(sign), "r"(kMinusOne), "r"(low));
  return codes;
}

// body(T()) with the type that slabs have.
template <class Body>
auto WithStorage(DType dtype, const Body& body) {
  return dtype == DType::kI8 ? body(Int8()) : WithType(dtype, body);
}

// Element i of a caller's tensor.
__device__ __forceinline__ float LoadAs(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kF16:
      return ToFloat(static_cast<const Half*>(data)[i]);
    case DType::kBF16:
      return ToFloat(static_cast<const BFloat16*>(data)[i]);
    default:
      return static_cast<const float*>(data)[i];
  }
}
__device__ __forceinline__ void StoreAs(float x, void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kF16:
      return FromFloat(x, static_cast<Half*>(data) + i);
    case DType::kBF16:
      return FromFloat(x, static_cast<BFloat16*>(data) + i);
    default:
      return FromFloat(x, static_cast<float*>(data) + i);
  }
}

// Two floats rounded into one 32-bit register, `low` in the low half.
template <class T>
__device__ __forceinline__ uint32_t Pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t Pack<Half>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
template <>
__device__ __forceinline__ uint32_t Pack<BFloat16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// c (16 x 8) += a (16 x 16, row) b (16 x 8, column), f32 sums. Lane l, group g = l / 4, t = l % 4: a = {(g, 2t..), (g + 8,
// 2t..), (g, 2t + 8..), (g + 8, 2t + 8..)}, b = {(2t.., g), (2t + 8.., g)}, c = {(g, 2t), (g, 2t + 1), (g + 8, 2t), (g +
// 8, 2t + 1)}.
template <class T>
__device__ __forceinline__ void Mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void Mma<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void Mma<Half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void LoadMatrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void LoadMatricesTransposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// 16 bytes from global to shared memory, asynchronously; zeros if !valid.
__device__ __forceinline__ void CopyAsync16(uint32_t shared, const void* global, bool valid = true) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}
__device__ __forceinline__ void CopyAsyncCommit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void CopyAsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// All but the last `pending` groups of copies, 0 .. 5.
__device__ __forceinline__ void CopyAsyncWaitFor(int pending) {
  switch (pending) {
    case 0:
      return CopyAsyncWait<0>();
    case 1:
      return CopyAsyncWait<1>();
    case 2:
      return CopyAsyncWait<2>();
    case 3:
      return CopyAsyncWait<3>();
    case 4:
      return CopyAsyncWait<4>();
    default:
      return CopyAsyncWait<5>();
  }
}
__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- kernels of a stream that are launched before the one before them is done (compute capability 9.0) ----

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
inline constexpr bool kHopper = true;
#else
inline constexpr bool kHopper = false;
#endif

// Lets the next kernel of the stream be launched.
__device__ __forceinline__ void DependentsMayStart() {
  if constexpr (kHopper) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
// Waits for the kernel before, and sees what it wrote. All threads of a kernel launched with LaunchEarly call this before they
// touch what others write: so the end of a kernel is the end of all before it, too.
__device__ __forceinline__ void WaitForKernelBefore() {
  if constexpr (kHopper) asm volatile("griddepcontrol.wait;" ::: "memory");
}
inline cudaLaunchAttribute LaunchEarly() {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

// ---- rotary positions, undone with the floats of src/cpu/protect.cc ----

// Not contracted into one another on the device. (What is constexpr is compiled for the host, too.)
struct RoundedOps {
  __host__ __device__ static float Sum(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
  }
  __host__ __device__ static float Product(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
  }
};
__device__ __forceinline__ Angle AngleAt(const Rotation& rotation, int32_t pair, int64_t position) {
  return CosSin<RoundedOps>(Phase(rotation.turns[pair], position));
}
// The two elements of a pair, turned back.
__device__ __forceinline__ float FirstUndone(float x, float y, const Angle& angle) {
  return __fadd_rn(__fmul_rn(x, angle.cos), __fmul_rn(y, angle.sin));
}
__device__ __forceinline__ float SecondUndone(float x, float y, const Angle& angle) {
  return __fsub_rn(__fmul_rn(y, angle.cos), __fmul_rn(x, angle.sin));
}
// The sum of lanes, in halves.
inline constexpr int kScoreLanes = 8;
__device__ __forceinline__ float SumLanes(float (&lane)[kScoreLanes]) {
#pragma unroll
  for (int half = kScoreLanes / 2; half > 0; half /= 2)
#pragma unroll
    for (int j = 0; j < half; ++j) lane[j] = __fadd_rn(lane[j], lane[j + half]);
  return lane[0];
}
// From the energy without position, and the value's squared norm: 1 where that does not count.
__device__ __forceinline__ float JoinScore(float energy, float squared_norm) {
  return energy > 0 && squared_norm > 0 ? __fmul_rn(energy, __fsqrt_rn(squared_norm)) : 0.0f;
}

template <class T, class F>
__device__ __forceinline__ T WarpReduce(T x, const F& f) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = f(x, __shfl_xor_sync(0xFFFFFFFFu, x, offset));
  return x;
}

}  // namespace express::cuda

#endif  // EXPRESS_SRC_CUDA_DEVICE_CUH_
