// What a call returns: a code, and a message that names the argument, what was expected and what came.
#ifndef EXPRESS_STATUS_H_
#define EXPRESS_STATUS_H_

#include <string>
#include <utility>

#include "express/types.h"

namespace express {

// The numbers are those of express_status in the C ABI.
enum class StatusCode : int32_t {
  kOk = 0,
  kInvalidArgument = 1,
  kOutOfRange = 2,
  kShapeMismatch = 3,
  kDtypeMismatch = 4,
  kDeviceMismatch = 5,
  kNotFinite = 6,
  kBudgetTooSmall = 7,
  kWouldCompress = 8,
  kRollbackUnavailable = 9,
  kBufferTooSmall = 10,
  kSizeOverflow = 11,
  kOutOfMemory = 12,
  kUnsupported = 13,
  kBroken = 14,
  kInternal = 15,
  kDeviceError = 16,
  kStepsPending = 17,
  kRingFull = 18,
};

class [[nodiscard]] Status {
 public:
  Status() = default;  // OK
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

}  // namespace express

#endif  // EXPRESS_STATUS_H_
