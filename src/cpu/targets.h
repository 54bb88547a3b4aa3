// How SIMD code is compiled: targets and attributes; to be included before anything of Highway.
#ifndef EXPRESS_SRC_CPU_TARGETS_H_
#define EXPRESS_SRC_CPU_TARGETS_H_

// Vectors of unknown length cannot be elements of arrays, which the kernels keep their sums in; those machines have
// NEON too.
#define EXPRESS_UNFIT_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV)

// A build may leave out more (the sanitizers': one target of each width is enough to look at).
#ifdef EXPRESS_DISABLED_TARGETS
#define HWY_DISABLED_TARGETS (EXPRESS_UNFIT_TARGETS | EXPRESS_DISABLED_TARGETS)
#else
#define HWY_DISABLED_TARGETS EXPRESS_UNFIT_TARGETS
#endif

// Behind the parameters of a lambda that holds vector code: it must be inlined for its vectors to stay in registers.
#define EXPRESS_INLINE_LAMBDA HWY_ATTR __attribute__((always_inline))

#endif  // EXPRESS_SRC_CPU_TARGETS_H_
