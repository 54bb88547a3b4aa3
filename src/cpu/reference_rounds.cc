#include "src/cpu/reference_rounds.h"

#include <algorithm>
#include <bit>

namespace express::reference {

Subsampled Subsample(const std::vector<int64_t>& tokens, int64_t block, const Chance& chance) {
  Subsampled out;
  for (const int64_t token : tokens) {
    if (out.open == 0) {
      out.tokens.push_back(token);
    } else if (chance(1, out.open + 1)) {
      out.tokens.back() = token;
    }
    out.open = (out.open + 1) % block;
  }
  return out;
}

std::vector<Entry> Compress2(const std::vector<int64_t>& tokens, int64_t s, int m, const Halver& halve) {
  std::vector<Entry> left;  // in the buffers
  std::vector<int64_t> level_input = tokens;
  for (int level = 0; level < m; ++level) {
    const int64_t capacity = (s << (level + 2)) >> m;  // s 2^(l + 2 - m)
    std::vector<int64_t> next;
    size_t at = 0;
    for (; at + static_cast<size_t>(capacity) <= level_input.size(); at += static_cast<size_t>(capacity)) {
      const auto begin = level_input.begin() + static_cast<int64_t>(at);
      const std::vector<int64_t> kept = halve({begin, begin + capacity});
      next.insert(next.end(), kept.begin(), kept.end());
    }
    for (; at < level_input.size(); ++at) left.push_back({level_input[at], int64_t{1} << level});
    level_input = next;
  }
  for (const int64_t token : level_input) left.push_back({token, int64_t{1} << m});
  return left;
}

std::vector<Entry> Express(int64_t n, int64_t s, const Halver& halve, const Chance& chance) {
  const int m_bar = static_cast<int>(std::bit_width(static_cast<uint64_t>(s)));  // log2(s) + 1
  std::vector<Entry> cache;
  int64_t next = 0;  // token
  const auto take = [&](int64_t count) {
    std::vector<int64_t> tokens;
    for (; count > 0 && next < n; --count) tokens.push_back(next++);
    return tokens;
  };
  for (const int64_t token : take(4 * s)) cache.push_back({token, 1});
  int m = 0;
  while (static_cast<int64_t>(cache.size()) == 4 * s && cache.back().weight == int64_t{1} << m) {
    // 4 s entries of weight 2^m: halved twice, then three blocks of s 2^(m + 2) tokens.
    std::vector<int64_t> tokens;
    for (const Entry& entry : cache) tokens.push_back(entry.token);
    tokens = halve(halve(tokens));
    m += 2;
    cache.clear();
    for (const int64_t token : tokens) cache.push_back({token, int64_t{1} << m});
    const int rungs = std::min(m, m_bar);
    const int64_t block = int64_t{1} << (m - rungs);
    for (int i = 0; i < 3; ++i) {
      Subsampled sampled = Subsample(take(s << m), block, chance);
      if (sampled.open > 0) {
        cache.push_back({sampled.tokens.back(), sampled.open});
        sampled.tokens.pop_back();
      }
      for (const Entry& entry : Compress2(sampled.tokens, s, rungs, halve))
        cache.push_back({entry.token, entry.weight * block});
    }
  }
  return cache;
}

}  // namespace express::reference
