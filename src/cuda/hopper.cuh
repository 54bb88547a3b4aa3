// Hopper's instructions: asynchronous products of a warpgroup (wgmma), barriers in shared memory, registers handed from
// warpgroup to warpgroup. PTX ISA 8.0, sm_90a.
#ifndef EXPRESS_SRC_CUDA_HOPPER_CUH_
#define EXPRESS_SRC_CUDA_HOPPER_CUH_

#include <type_traits>

#include "src/cuda/device.cuh"

namespace express::cuda {

inline constexpr int kWarpgroup = 128;  // threads

// ---- barriers in shared memory: phases of a fixed number of arrivals ----

__device__ __forceinline__ void BarrierInit(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void BarrierArrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives once all copies that this thread has begun with CopyAsync16 are done.
__device__ __forceinline__ void BarrierArriveAfterCopies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
// Until the phase of this parity is over; the one before a barrier's first has parity 1.
__device__ __forceinline__ void BarrierWait(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (done == 0)
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
}
// Barriers by number, of a number of threads: waits until the others have come, or only comes. Alike in all threads of a warp.
__device__ __forceinline__ void MeetThreads(int barrier, int threads) {
  asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void ArriveForThreads(int barrier, int threads) {
  asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// What ordinary accesses wrote, and this thread knows of, is seen by the products that follow.
__device__ __forceinline__ void FenceForProducts() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <int kRegisters>
__device__ __forceinline__ void TakeRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void GiveRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Four 8 x 8 matrices of 16-bit elements, laid out as LoadMatrices says.
__device__ __forceinline__ void StoreMatrices(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}

// ---- products of a warpgroup ----

__device__ __forceinline__ void ProductsBegin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void ProductsCommit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void ProductsWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Registers that products in flight write: what follows uses them as they are from here on.
template <int kCount>
__device__ __forceinline__ void ProductsHold(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// A matrix in shared memory: rows of 128 bytes, 16-byte pieces swizzled by row % 8, from a 1024-byte boundary on.
// Elements of 16 bits, 64 to a row; `leading` bytes on, the next 64 columns of all rows (for Product's b only).
// This is the lower half of a matrix descriptor; the upper one is always the same. Alike in all threads of a warp.
__device__ __forceinline__ uint32_t SharedMatrix(uint32_t address, uint32_t leading) {
  return __shfl_sync(0xFFFFFFFFu, (leading >> 4) << 16 | (address & 0x3FFFF) >> 4, 0);
}
// The same matrix from `bytes` on.
__device__ __forceinline__ uint32_t Advance(uint32_t matrix, uint32_t bytes) { return matrix + (bytes >> 4); }
// 128-byte swizzle; eight rows are 1024 bytes.
#define EXPRESS_MATRIX "0x40000040"

#define EXPRESS_REGISTERS_32                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define EXPRESS_REGISTERS_64                                                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define EXPRESS_SUMS_32                                                                                       \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
      "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),  \
      "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), \
      "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define EXPRESS_SUMS_64                                                                                       \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
      "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),  \
      "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), \
      "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), \
      "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), \
      "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), \
      "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), \
      "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])

// d (64 x 2 kCount) of a warpgroup: warp w has rows 16 w .. 16 w + 15, laid out as the c of Mma, 8 columns after 8.
// a (64 x 16) and b (16 x 2 kCount) are in shared memory, both by rows of the contraction: a row holds a query's or a key's
// elements. d += a b.
template <class T, int kCount>
__device__ __forceinline__ void ProductOfRows(float (&d)[kCount], uint32_t a, uint32_t b) {
  static_assert(kCount == 32 || kCount == 64);
  if constexpr (kCount == 32 && std::is_same_v<T, BFloat16>)
    asm volatile(
        "{\n.reg .pred p;\n.reg .b64 a, b;\nsetp.eq.b32 p, 0, 0;\n"
        "mov.b64 a, {%32, " EXPRESS_MATRIX "};\nmov.b64 b, {%33, " EXPRESS_MATRIX
        "};\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" EXPRESS_REGISTERS_32 "}, a, b, p, 1, 1, 0, 0;\n}"
        : EXPRESS_SUMS_32
        : "r"(a), "r"(b));
  else if constexpr (kCount == 32 && std::is_same_v<T, Half>)
    asm volatile(
        "{\n.reg .pred p;\n.reg .b64 a, b;\nsetp.eq.b32 p, 0, 0;\n"
        "mov.b64 a, {%32, " EXPRESS_MATRIX "};\nmov.b64 b, {%33, " EXPRESS_MATRIX
        "};\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" EXPRESS_REGISTERS_32 "}, a, b, p, 1, 1, 0, 0;\n}"
        : EXPRESS_SUMS_32
        : "r"(a), "r"(b));
  else if constexpr (kCount == 64 && std::is_same_v<T, BFloat16>)
    asm volatile(
        "{\n.reg .pred p;\n.reg .b64 a, b;\nsetp.eq.b32 p, 0, 0;\n"
        "mov.b64 a, {%64, " EXPRESS_MATRIX "};\nmov.b64 b, {%65, " EXPRESS_MATRIX
        "};\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" EXPRESS_REGISTERS_64 "}, a, b, p, 1, 1, 0, 0;\n}"
        : EXPRESS_SUMS_64
        : "r"(a), "r"(b));
  else if constexpr (kCount == 64 && std::is_same_v<T, Half>)
    asm volatile(
        "{\n.reg .pred p;\n.reg .b64 a, b;\nsetp.eq.b32 p, 0, 0;\n"
        "mov.b64 a, {%64, " EXPRESS_MATRIX "};\nmov.b64 b, {%65, " EXPRESS_MATRIX
        "};\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" EXPRESS_REGISTERS_64 "}, a, b, p, 1, 1, 0, 0;\n}"
        : EXPRESS_SUMS_64
        : "r"(a), "r"(b));
}

// d += a b. a (64 x 16) in registers, laid out as the a of Mma; b (16 x 2 kCount): a row of shared memory holds one row of b.
template <class T, int kCount>
__device__ __forceinline__ void Product(float (&d)[kCount], const uint32_t (&a)[4], uint32_t b) {
  static_assert(kCount == 32 || kCount == 64);
  if constexpr (kCount == 32 && std::is_same_v<T, BFloat16>)
    asm volatile("{\n.reg .pred p;\n.reg .b64 b;\nsetp.eq.b32 p, 0, 0;\nmov.b64 b, {%36, " EXPRESS_MATRIX
                 "};\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" EXPRESS_REGISTERS_32
                 "}, {%32, %33, %34, %35}, b, p, 1, 1, 1;\n}"
                 : EXPRESS_SUMS_32
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b));
  else if constexpr (kCount == 32 && std::is_same_v<T, Half>)
    asm volatile("{\n.reg .pred p;\n.reg .b64 b;\nsetp.eq.b32 p, 0, 0;\nmov.b64 b, {%36, " EXPRESS_MATRIX
                 "};\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" EXPRESS_REGISTERS_32
                 "}, {%32, %33, %34, %35}, b, p, 1, 1, 1;\n}"
                 : EXPRESS_SUMS_32
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b));
  else if constexpr (kCount == 64 && std::is_same_v<T, BFloat16>)
    asm volatile("{\n.reg .pred p;\n.reg .b64 b;\nsetp.eq.b32 p, 0, 0;\nmov.b64 b, {%68, " EXPRESS_MATRIX
                 "};\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" EXPRESS_REGISTERS_64
                 "}, {%64, %65, %66, %67}, b, p, 1, 1, 1;\n}"
                 : EXPRESS_SUMS_64
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b));
  else if constexpr (kCount == 64 && std::is_same_v<T, Half>)
    asm volatile("{\n.reg .pred p;\n.reg .b64 b;\nsetp.eq.b32 p, 0, 0;\nmov.b64 b, {%68, " EXPRESS_MATRIX
                 "};\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" EXPRESS_REGISTERS_64
                 "}, {%64, %65, %66, %67}, b, p, 1, 1, 1;\n}"
                 : EXPRESS_SUMS_64
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b));
}

#undef EXPRESS_MATRIX
#undef EXPRESS_REGISTERS_32
#undef EXPRESS_REGISTERS_64
#undef EXPRESS_SUMS_32
#undef EXPRESS_SUMS_64

}  // namespace express::cuda

#endif  // EXPRESS_SRC_CUDA_HOPPER_CUH_
