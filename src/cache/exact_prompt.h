// Which prompts get exact attention, on every device (express_prefill in capi/express.h).
#ifndef EXPRESS_SRC_CACHE_EXACT_PROMPT_H_
#define EXPRESS_SRC_CACHE_EXACT_PROMPT_H_

#include <cstdint>

#include "express/config.h"
#include "src/plan/setting.h"

namespace express::cache {

inline constexpr int64_t kExactBudgets = 3;    // of at most so many budgets of the head,
inline constexpr int64_t kExactTokens = 4096;  // and of fewer tokens than this

// Whether all queries of a KV head see every token before them, exactly, although the head does not keep all: the prompt begins an
// empty cache and is short. (Up to the budget there is next to nothing that they could miss.) The rule is the head's own, so that
// it does not depend on how heads are split over processes. Where budgets are observed they are not settled before the prompt has
// begun, and blocks must be taken one after the other.
inline bool IsExactPrompt(const Config& config, const plan::Setting& setting, int64_t held, int64_t tokens) {
  return config.head_budgets != HeadBudgets::kObserved && held == 0 && tokens > setting.budget &&
         tokens < kExactTokens && tokens <= kExactBudgets * setting.budget;
}

}  // namespace express::cache

#endif  // EXPRESS_SRC_CACHE_EXACT_PROMPT_H_
