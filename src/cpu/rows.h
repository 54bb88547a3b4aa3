// Rows of a slab as numbers, whatever they are stored in.
#ifndef EXPRESS_SRC_CPU_ROWS_H_
#define EXPRESS_SRC_CPU_ROWS_H_

#include <cstdint>

#include "src/cpu/kernels.h"
#include "src/cpu/scalar.h"

namespace express::cpu {

template <class T>
struct StoredRow {
  const T* data;
  float scale = 1;  // of 8-bit codes
  float operator[](int64_t i) const {
    if constexpr (kScaled<T>) return scale * ToFloat(data[i]);
    return ToFloat(data[i]);
  }
};

// T is what slab.dtype says.
template <class T>
StoredRow<T> KeyRow(const Slab& slab, int64_t slot) {
  StoredRow<T> row{static_cast<const T*>(slab.key) + slot * slab.key_dim};
  if constexpr (kScaled<T>) row.scale = ToFloat(BFloat16{slab.scale[slot].key});
  return row;
}
template <class T>
StoredRow<T> ValueRow(const Slab& slab, int64_t slot) {
  StoredRow<T> row{static_cast<const T*>(slab.value) + slot * slab.value_dim};
  if constexpr (kScaled<T>) row.scale = ToFloat(BFloat16{slab.scale[slot].value});
  return row;
}

}  // namespace express::cpu

#endif  // EXPRESS_SRC_CPU_ROWS_H_
