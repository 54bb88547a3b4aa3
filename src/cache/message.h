// Status messages: what was wrong with which argument, what was expected and what came.
#ifndef EXPRESS_SRC_CACHE_MESSAGE_H_
#define EXPRESS_SRC_CACHE_MESSAGE_H_

#include <sstream>

#include "express/status.h"

namespace express::cache {

// Error(StatusCode::kOutOfRange, "layer: expected 0 .. ", layers - 1, ", got ", layer)
template <class... Parts>
Status Error(StatusCode code, const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return Status(code, text.str());
}

}  // namespace express::cache

#define EXPRESS_RETURN_IF_ERROR(expression) \
  if (::express::Status returned_ = (expression); !returned_.ok()) return returned_

#endif  // EXPRESS_SRC_CACHE_MESSAGE_H_
