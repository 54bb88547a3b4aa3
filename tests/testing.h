// What tests of caches on the CPU and on the GPU share.
#ifndef EXPRESS_TESTS_TESTING_H_
#define EXPRESS_TESTS_TESTING_H_

#include <gtest/gtest.h>

#include <vector>

#include "express/cache.h"

namespace express {

#define EXPECT_OK(expression) \
  if (const Status status_ = (expression); !status_.ok()) ADD_FAILURE() << #expression << ": " << status_.message()
#define ASSERT_OK(expression) \
  if (const Status status_ = (expression); !status_.ok()) FAIL() << #expression << ": " << status_.message()

// What Save writes, into bytes that were something else before.
inline std::vector<char> Saved(const ExpressCache& cache) {
  size_t bytes = 0;
  EXPECT_OK(cache.SaveSize(&bytes));
  std::vector<char> data(bytes, 0x5A);
  EXPECT_OK(cache.Save(data.data(), bytes));
  return data;
}

}  // namespace express

#endif  // EXPRESS_TESTS_TESTING_H_
