// Counter-based random numbers: every draw is a pure function of (seed, layer, KV head, purpose, operation number,
// index), so that CPU and GPU, one process and many, streaming and offline execution make the same draws.
//
// Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#ifndef EXPRESS_SRC_CORE_RANDOM_H_
#define EXPRESS_SRC_CORE_RANDOM_H_

#include <array>
#include <cstdint>

namespace express {

using Philox = std::array<uint32_t, 4>;

constexpr Philox Philox4x32(Philox counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * counter[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter[2];
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key0, static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key1, static_cast<uint32_t>(product0)};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// What a draw is for; part of its counter.
enum class RandomPurpose : uint32_t { kStream = 0, kHalve = 1, kComplement = 2, kSample = 3 };

// The key of one head stream. Layer and KV head are global indices.
struct StreamKey {
  uint32_t key0;
  uint32_t key1;
};

constexpr StreamKey MakeStreamKey(uint64_t seed, uint32_t layer, uint32_t kv_head) {
  const Philox bits = Philox4x32({layer, kv_head, 0, static_cast<uint32_t>(RandomPurpose::kStream)},
                                 static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  return {bits[0], bits[1]};
}

// 32 uniform bits.
constexpr uint32_t DrawBits(const StreamKey& key, RandomPurpose purpose, uint64_t number, uint32_t index) {
  return Philox4x32(
      {index, static_cast<uint32_t>(number), static_cast<uint32_t>(number >> 32), static_cast<uint32_t>(purpose)},
      key.key0, key.key1)[0];
}

// True with probability weight / total, to within 2^-64.
constexpr bool DrawChance(const StreamKey& key, RandomPurpose purpose, uint64_t number, uint64_t weight,
                          uint64_t total) {
  const Philox bits = Philox4x32(
      {0, static_cast<uint32_t>(number), static_cast<uint32_t>(number >> 32), static_cast<uint32_t>(purpose)}, key.key0,
      key.key1);
  __extension__ using Wide = unsigned __int128;
  const uint64_t uniform = (uint64_t{bits[1]} << 32) | bits[0];
  return static_cast<uint64_t>((Wide{uniform} * total) >> 64) < weight;
}

// Uniform on (0, 1) in steps of 2^-24, symmetric about 1/2, exact in float.
constexpr float UniformFromBits(uint32_t bits) { return (static_cast<float>(bits >> 9) + 0.5f) * 0x1p-23f; }

}  // namespace express

#endif  // EXPRESS_SRC_CORE_RANDOM_H_
