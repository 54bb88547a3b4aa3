// Reference of the paper's algorithms (DESIGN 3.2 to 3.4), offline: all tokens are known, and all halvings of one level
// of a ladder are independent of each other. Written to be read beside the formulas; it works on token indices and
// weights alone, the halving and the draws are handed in. The plan's RoundsSchedule does the same token by token and
// must have the same distribution.
#ifndef EXPRESS_SRC_CPU_REFERENCE_ROUNDS_H_
#define EXPRESS_SRC_CPU_REFERENCE_ROUNDS_H_

#include <cstdint>
#include <functional>
#include <vector>

namespace express::reference {

struct Entry {
  int64_t token;
  int64_t weight;
};

// An even list of entries of equal weight in, half of them out, in order; the weights are doubled by the caller.
using Halver = std::function<std::vector<int64_t>(const std::vector<int64_t>& tokens)>;
// True with probability weight / total.
using Chance = std::function<bool(int64_t weight, int64_t total)>;

// Subsample(m, m-bar): one token, uniformly at random, of every `block` consecutive ones. The last block may be open:
// its candidate is the last of `out` and `open` counts its tokens (0: none open).
struct Subsampled {
  std::vector<int64_t> tokens;
  int64_t open = 0;
};
Subsampled Subsample(const std::vector<int64_t>& tokens, int64_t block, const Chance& chance);

// Compress2(m, Halve) on a block of at most s 2^m tokens: the finished s entries when the block is full, and what the
// buffers of the ladder hold when it is not. Weights are 2^level.
std::vector<Entry> Compress2(const std::vector<int64_t>& tokens, int64_t s, int m, const Halver& halve);

// Express(s, m-bar, Halve) of the tokens 0 .. n - 1: the weighted cache after n tokens.
std::vector<Entry> Express(int64_t n, int64_t s, const Halver& halve, const Chance& chance);

}  // namespace express::reference

#endif  // EXPRESS_SRC_CPU_REFERENCE_ROUNDS_H_
