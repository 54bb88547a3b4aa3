#include "src/cache/check.h"

#include <limits>
#include <string>

#include "src/cache/message.h"
#include "src/cpu/kernels.h"

namespace express::cache {
namespace {

std::string ShapeText(const int64_t* shape, int32_t rank) {
  std::string text = "(";
  for (int32_t i = 0; i < rank; ++i) {
    if (i > 0) text += ", ";
    text += shape[i] == kAnySize ? "n" : std::to_string(shape[i]);
  }
  return text + ")";
}

Status CheckType(const char* name, DType dtype, Types types) {
  const auto number = static_cast<int32_t>(dtype);
  switch (types) {
    case Types::kFloat:
      if (dtype == DType::kF32 || dtype == DType::kF16 || dtype == DType::kBF16) return Status();
      return Error(StatusCode::kDtypeMismatch, name, ".dtype: expected F32 (0), F16 (1) or BF16 (2), got ", number);
    case Types::kF32:
      if (dtype == DType::kF32) return Status();
      return Error(StatusCode::kDtypeMismatch, name, ".dtype: expected F32 (0), got ", number);
    case Types::kI64:
      if (dtype == DType::kI64) return Status();
      return Error(StatusCode::kDtypeMismatch, name, ".dtype: expected I64 (16), got ", number);
  }
  return Status(StatusCode::kInternal, "unknown kind of type");
}

// The strides, the caller's or contiguous ones, and that the last element's address can be formed.
Status TakeStrides(const char* name, const Tensor& tensor, Array* array) {
  int64_t contiguous = 1, last = 0;
  for (int32_t i = tensor.ndim - 1; i >= 0; --i) {
    const int64_t size = array->shape[i];
    array->stride[i] = tensor.strides != nullptr ? tensor.strides[i] : contiguous;
    if (array->stride[i] < 0)
      return Error(StatusCode::kShapeMismatch, name, ".strides[", i, "]: expected >= 0, got ", array->stride[i]);
    int64_t reach = 0;
    if (__builtin_mul_overflow(contiguous, size, &contiguous) ||
        __builtin_mul_overflow(array->stride[i], size, &reach) || __builtin_add_overflow(last, reach, &last) ||
        last > std::numeric_limits<int64_t>::max() / 16)
      return Error(StatusCode::kSizeOverflow, name, ": shape ", ShapeText(array->shape, tensor.ndim),
                   " with its strides does not fit into the address space");
  }
  const int32_t inner = tensor.ndim - 1;
  if (tensor.ndim > 1 && array->shape[inner] > 1 && array->stride[inner] != 1)
    return Error(StatusCode::kShapeMismatch, name, ".strides[", inner, "]: the innermost stride must be 1, got ",
                 array->stride[inner]);
  return Status();
}

// Kernels read rows in pieces of this many bytes.
Status CheckRowAlignment(const TensorCheck& check, const char* name, const Array& array) {
  const int64_t element = SizeOf(array.dtype);
  if (reinterpret_cast<uintptr_t>(array.data) % static_cast<uintptr_t>(check.row_alignment) != 0)
    return Error(StatusCode::kInvalidArgument, name, ".data: expected an address aligned to ", check.row_alignment,
                 " bytes");
  for (int32_t i = 0; i < array.rank - 1; ++i)
    if (array.shape[i] > 1 && array.stride[i] * element % check.row_alignment != 0)
      return Error(StatusCode::kShapeMismatch, name, ".strides[", i, "]: expected a multiple of ", check.row_alignment,
                   " bytes, got ", array.stride[i], " elements of ", element);
  return Status();
}

}  // namespace

Status CheckTensor(const TensorCheck& check, const char* name, const Tensor& tensor, Types types,
                   std::initializer_list<int64_t> shape, Array* array) {
  const auto rank = static_cast<int32_t>(shape.size());
  const auto expected = [&] {
    return ShapeText(shape.begin(), rank);
  };  // strings only on failure: success allocates nothing
  if (tensor.ndim != rank)
    return Error(StatusCode::kShapeMismatch, name, ".ndim: expected ", rank, " for shape ", expected(), ", got ",
                 tensor.ndim);
  if (tensor.shape == nullptr) return Error(StatusCode::kInvalidArgument, name, ".shape: expected a pointer, got NULL");
  for (int32_t i = 0; i < rank; ++i) {
    const int64_t want = shape.begin()[i];
    if (tensor.shape[i] < 0 || (want != kAnySize && tensor.shape[i] != want))
      return Error(StatusCode::kShapeMismatch, name, ".shape: expected ", expected(), ", got ",
                   ShapeText(tensor.shape, rank));
    array->shape[i] = tensor.shape[i];
  }
  EXPRESS_RETURN_IF_ERROR(CheckType(name, tensor.dtype, types));
  if (tensor.device_type != check.device_type || tensor.device_id != check.device_id)
    return Error(StatusCode::kDeviceMismatch, name, ": expected memory of ",
                 check.device_type == DeviceType::kCpu ? "the CPU" : "CUDA", " (device type ",
                 static_cast<int32_t>(check.device_type), ", id ", check.device_id, "), got device type ",
                 static_cast<int32_t>(tensor.device_type), ", id ", tensor.device_id);
  array->data = static_cast<char*>(tensor.data);
  array->dtype = tensor.dtype;
  array->rank = rank;
  EXPRESS_RETURN_IF_ERROR(TakeStrides(name, tensor, array));
  if (array->elements() == 0) return Status();
  if (tensor.data == nullptr) return Error(StatusCode::kInvalidArgument, name, ".data: expected a pointer, got NULL");
  if (reinterpret_cast<uintptr_t>(tensor.data) % static_cast<uintptr_t>(SizeOf(tensor.dtype)) != 0)
    return Error(StatusCode::kInvalidArgument, name, ".data: expected an address aligned to the element size of ",
                 SizeOf(tensor.dtype), " bytes");
  if (types == Types::kFloat) EXPRESS_RETURN_IF_ERROR(CheckRowAlignment(check, name, *array));
  return check.check_pointer != nullptr ? check.check_pointer(name, tensor.data, check.device_id) : Status();
}

Status CheckFinite(const char* name, const Array& array) {
  if (array.elements() == 0) return Status();
  const int64_t width = array.shape[array.rank - 1];
  int64_t index[kMaxRank] = {};
  while (true) {
    int64_t at = 0;
    for (int32_t i = 0; i < array.rank - 1; ++i) at += index[i] * array.stride[i];
    if (!cpu::AllFinite(array.data + at * SizeOf(array.dtype), array.dtype, width))
      return Error(StatusCode::kNotFinite, name, ": NaN or infinity in row ", ShapeText(index, array.rank - 1));
    int32_t i = array.rank - 2;
    while (i >= 0 && ++index[i] == array.shape[i]) index[i--] = 0;
    if (i < 0) return Status();
  }
}

}  // namespace express::cache
