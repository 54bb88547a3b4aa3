// Random sequences of calls against a slow model: the design's text as plain lists of tokens, with no slots, no plan, no batches. Halving by coins,
// so that what is kept does not depend on rounding; draws are the documented ones.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <map>
#include <random>

#include "src/core/random.h"
#include "src/cpu/reference.h"
#include "tests/cache/testing.h"

namespace express {
namespace {

struct Shape {
  int64_t sinks, tail, protect, coreset, window;
  int64_t floor() const { return std::max<int64_t>(2, std::min<int64_t>(64, coreset / 16)); }
  int64_t levels() const { return std::max<int64_t>(2, std::min(coreset / 4, coreset / (2 * floor()))); }
};

struct Rotary {
  std::vector<float> frequency;
  bool interleaved, value_norm;
};

// One head stream, token by token.
class SlowHead {
 public:
  // rotary: scores are those without positions, and times the value's norm if it says so.
  SlowHead(const Shape& shape, const StreamKey& key, const Rotary* rotary) : s_(shape), key_(key), rotary_(rotary) {}

  void Append(const std::vector<float>& k,
              const std::vector<float>& v) {  // the token's key and value, as they are stored
    keys_.resize(static_cast<size_t>(tokens_));
    values_.resize(static_cast<size_t>(tokens_));
    keys_.push_back(k);
    values_.push_back(v);
    const int64_t token = tokens_++;
    if (static_cast<int64_t>(sinks_.size()) < s_.sinks) {
      sinks_.push_back(token);
      return;
    }
    if (static_cast<int64_t>(tail_.size()) == s_.tail) Depart();
    tail_.push_back(token);
  }
  int64_t RollbackAvailable() const {
    return departures_ == 0 ? tokens_ : std::max<int64_t>(0, static_cast<int64_t>(tail_.size()) - s_.window);
  }
  void Rollback(int64_t count) {
    for (; count > 0; --count, --tokens_) {
      if (!tail_.empty()) {
        tail_.pop_back();
      } else {
        sinks_.pop_back();
      }
    }
  }
  void Compress(int64_t tokens) {
    while (Room() < tokens && population_ > s_.coreset / 2) HalveOne();
  }
  int64_t Room() const {
    return s_.sinks - static_cast<int64_t>(sinks_.size()) + s_.tail - static_cast<int64_t>(tail_.size()) + s_.protect -
           static_cast<int64_t>(protected_.size()) + ((s_.coreset - population_ + 1) << bottom_) - reservoir_weight_ -
           1;
  }
  const std::vector<float>& key(int64_t token) const { return keys_[static_cast<size_t>(token)]; }
  const std::vector<float>& value(int64_t token) const { return values_[static_cast<size_t>(token)]; }
  // position -> weight
  std::map<int64_t, int64_t> Entries() const {
    std::map<int64_t, int64_t> all;
    for (const int64_t token : sinks_) all[token] = 1;
    for (const int64_t token : tail_) all[token] = 1;
    for (const auto& entry : protected_) all[entry.token] = 1;
    for (const auto& [level, list] : levels_)
      for (const int64_t token : list) all[token] = int64_t{1} << level;
    if (reservoir_weight_ > 0) all[reservoir_] = reservoir_weight_;
    return all;
  }

 private:
  struct Guarded {
    int64_t token;
    float score;
  };

  void Depart() {
    if (s_.protect > 0 && departures_ == 0) {
      mean_.assign(keys_[0].size(), 0.0f);
      sum_ = mean_;
      for (const int64_t token : tail_)
        for (size_t d = 0; d < mean_.size(); ++d) mean_[d] += Seen(token)[d];
      for (float& m : mean_) m /= static_cast<float>(tail_.size());
    }
    int64_t token = tail_.front();
    tail_.pop_front();
    if (s_.protect > 0) {
      token = Admit(token);
    }
    ++departures_;
    if (token >= 0) Insert(token);
  }
  // Returns the loser, or -1.
  int64_t Admit(int64_t token) {
    if (departures_ > 0 && departures_ % 256 == 0)
      for (size_t d = 0; d < mean_.size(); ++d) mean_[d] = sum_[d] / 256, sum_[d] = 0;
    const std::vector<float> k = Seen(token);
    float score = 0;
    for (size_t d = 0; d < mean_.size(); ++d) score += (k[d] - mean_[d]) * (k[d] - mean_[d]), sum_[d] += k[d];
    if (rotary_ != nullptr && rotary_->value_norm) {
      float norm = 0;
      for (const float x : value(token)) norm += x * x;
      score *= std::sqrt(norm);
    }
    protected_.push_back({token, score});
    if (static_cast<int64_t>(protected_.size()) <= s_.protect) return -1;
    const auto weakest = std::min_element(protected_.begin(), protected_.end(), [](const Guarded& a, const Guarded& b) {
      return a.score != b.score ? a.score < b.score : a.token > b.token;
    });
    const int64_t loser = weakest->token;
    protected_.erase(weakest);
    return loser;
  }
  // The key that scores are about.
  std::vector<float> Seen(int64_t token) const {
    if (rotary_ == nullptr) return key(token);
    const std::vector<double> exact(key(token).begin(), key(token).end());
    const auto undone = reference::WithoutPosition(exact.data(), static_cast<int64_t>(exact.size()), token,
                                                   rotary_->frequency, rotary_->interleaved);
    return std::vector<float>(undone.begin(), undone.end());
  }
  void Absorb(int64_t token, int64_t weight) {
    reservoir_weight_ += weight;
    if (reservoir_weight_ == weight ||
        DrawChance(key_, RandomPurpose::kSample, samples_++, static_cast<uint64_t>(weight),
                   static_cast<uint64_t>(reservoir_weight_)))
      reservoir_ = token;
  }
  void Insert(int64_t hand) {
    int64_t weight = 1;
    while (true) {
      if (weight < int64_t{1} << bottom_) {
        Absorb(hand, weight);
        if (reservoir_weight_ < int64_t{1} << bottom_) return;
        hand = reservoir_;
        weight = reservoir_weight_;
        reservoir_weight_ = 0;
      }
      if (population_ < s_.coreset) break;
      HalveOne();
    }
    levels_[bottom_].push_back(hand);
    ++population_;
  }
  int Top() const {
    for (auto it = levels_.rbegin(); it != levels_.rend(); ++it)
      if (!it->second.empty()) return it->first;
    return bottom_;
  }
  double Cap(int level) const {
    return std::max(static_cast<double>(s_.floor()),
                    static_cast<double>(s_.coreset) * 0.4 * std::pow(0.6, Top() - level));
  }
  void HalveOne() {
    int chosen = -1, fullest = bottom_;
    for (int h = bottom_; h <= Top() && chosen < 0; ++h) {
      if (static_cast<double>(levels_[h].size()) >= Cap(h)) chosen = h;
      if (levels_[h].size() > levels_[fullest].size()) fullest = h;
    }
    if (chosen < 0) chosen = fullest;
    Halve(chosen, std::min(static_cast<int64_t>(levels_[chosen].size()), static_cast<int64_t>(Cap(chosen))) / 2 * 2);
    if (Top() - bottom_ + 1 <= s_.levels()) return;
    const int64_t longest = std::max(s_.floor(), static_cast<int64_t>(static_cast<double>(s_.coreset) * 0.4)) / 2 * 2;
    while (levels_[bottom_].size() >= 2)
      Halve(bottom_, std::min(static_cast<int64_t>(levels_[bottom_].size()), longest) / 2 * 2);
    if (!levels_[bottom_].empty()) {
      Absorb(levels_[bottom_].front(), int64_t{1} << bottom_);
      levels_[bottom_].clear();
      --population_;
    }
    ++bottom_;
  }
  void Halve(int level, int64_t count) {
    const uint64_t number = halvings_++;
    const bool complement = UniformFromBits(DrawBits(key_, RandomPurpose::kComplement, number, 0)) < 0.5f;
    auto& list = levels_[level];
    for (uint32_t pair = 0; pair < count / 2; ++pair) {
      const bool second = UniformFromBits(DrawBits(key_, RandomPurpose::kHalve, number, pair)) < 0.5f;
      levels_[level + 1].push_back(list[static_cast<size_t>(2 * pair + (second != complement))]);
    }
    list.erase(list.begin(), list.begin() + count);
    population_ -= count / 2;
  }

  Shape s_;
  StreamKey key_;
  const Rotary* rotary_;
  std::vector<std::vector<float>> keys_, values_;
  std::vector<int64_t> sinks_;
  std::deque<int64_t> tail_;
  std::vector<Guarded> protected_;
  std::vector<float> mean_, sum_;
  std::map<int, std::deque<int64_t>> levels_;
  int bottom_ = 0;
  int64_t tokens_ = 0, departures_ = 0, population_ = 0, reservoir_ = -1, reservoir_weight_ = 0;
  uint64_t halvings_ = 0, samples_ = 0;
};

class Sequence {
 public:
  explicit Sequence(uint32_t seed) : rng_(seed) {
    shape_ = {Pick(0, 5), 0, Pick(0, 1) * Pick(1, 12), Pick(4, 60), Pick(0, 20)};
    c_.layers = 2;
    c_.kv_heads = static_cast<int32_t>(Pick(1, 3));
    c_.query_heads = c_.kv_heads * static_cast<int32_t>(Pick(1, 3));
    c_.key_dim = static_cast<int32_t>(Pick(1, 20));
    c_.value_dim = static_cast<int32_t>(Pick(1, 20));
    c_.sinks = shape_.sinks;
    c_.window = shape_.window;
    c_.rollback_reserve = Pick(0, 1) * Pick(0, 6);
    c_.protected_entries = shape_.protect;
    shape_.tail = std::max<int64_t>(1, c_.window + c_.rollback_reserve);
    c_.budget = shape_.sinks + shape_.tail + shape_.protect + 1 + shape_.coreset;
    c_.halving = Halving::kCoin;
    c_.prefill_block = static_cast<int32_t>(Pick(1, 40));
    c_.seed = seed;
    c_.first_layer = static_cast<int32_t>(Pick(0, 9));
    c_.first_kv_head = static_cast<int32_t>(Pick(0, 9));
    c_.threads = static_cast<int32_t>(Pick(1, 2));
    c_.dtype = seed % 2 == 0 ? DType::kI8 : DType::kF32;
    if (seed % 3 == 0) {
      rotary_.interleaved = Pick(0, 1) != 0;
      for (int64_t i = Pick(0, c_.key_dim / 2); i > 0; --i)
        rotary_.frequency.push_back(static_cast<float>(Pick(-1000, 1000)) / 1000);
      rotary_.value_norm = rotary_.frequency.empty() || Pick(0, 1) != 0;
      c_.protection_score = rotary_.value_norm ? ProtectionScore::kEnergyValue : ProtectionScore::kEnergy;
      c_.rope_frequencies = rotary_.frequency;
      c_.rope_layout = rotary_.interleaved ? RopeLayout::kInterleaved : RopeLayout::kHalves;
    }
    EXPECT_OK(ExpressCache::Create(c_, &cache_));
    EXPECT_OK(ExpressCache::Create(c_, &other_));
    Clear();
  }

  void Run(int calls) {
    for (int i = 0; i < calls && !testing::Test::HasFailure(); ++i) {
      const auto layer = static_cast<int32_t>(Pick(0, 1));
      switch (Pick(0, 12)) {
        case 0:
          Rollback();
          break;
        case 1:
          Compress(layer);
          break;
        case 2:
          if (Pick(0, 9) == 0) {
            EXPECT_OK(cache_.Reset());
            Clear();
          }
          break;
        case 3:
          GoOnInAnother();
          break;
        case 4:
        case 5:
          Append(layer, Pick(0, 150), true);
          break;
        default:
          Append(layer, Pick(0, 3) == 0 ? Pick(0, 200) : Pick(1, 3), false);
      }
      Compare();
    }
  }

 private:
  int64_t Pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng_); }
  void Clear() {
    heads_.clear();
    for (int32_t layer = 0; layer < c_.layers; ++layer)
      for (int32_t g = 0; g < c_.kv_heads; ++g)
        heads_.emplace_back(shape_,
                            MakeStreamKey(c_.seed, static_cast<uint32_t>(c_.first_layer + layer),
                                          static_cast<uint32_t>(c_.first_kv_head + g)),
                            c_.seed % 3 == 0 ? &rotary_ : nullptr);
  }
  SlowHead& head(int32_t layer, int32_t g) { return heads_[static_cast<size_t>(layer * c_.kv_heads + g)]; }

  void Append(int32_t layer, int64_t n, bool prefill) {
    const Stream s(c_, n, static_cast<uint32_t>(rng_()));
    if (prefill) {
      for (const float x : Prefill(cache_, c_, layer, s, 0, n).out) EXPECT_TRUE(std::isfinite(x));
    } else {
      EXPECT_OK(express::Append(cache_, c_, layer, s, 0, n));
    }
    for (int64_t t = 0; t < n; ++t)
      for (int32_t g = 0; g < c_.kv_heads; ++g) {
        const auto k = s.k.begin() + (t * c_.kv_heads + g) * c_.key_dim;
        const auto v = s.v.begin() + (t * c_.kv_heads + g) * c_.value_dim;
        head(layer, g).Append(Stored({k, k + c_.key_dim}), Stored({v, v + c_.value_dim}));
      }
  }
  // A row as it is once stored: rounded once, never again.
  std::vector<float> Stored(std::vector<float> row) const {
    if (c_.dtype != DType::kI8) return row;
    const reference::Quantised codes = reference::Quantise(row);
    for (size_t d = 0; d < row.size(); ++d) row[d] = static_cast<float>(codes.scale * codes.code[d]);
    return row;
  }
  void Rollback() {
    int64_t available = 0, expected = std::numeric_limits<int64_t>::max();
    EXPECT_OK(cache_.RollbackAvailable(&available));
    for (const SlowHead& h : heads_) expected = std::min(expected, h.RollbackAvailable());
    ASSERT_EQ(available, expected);
    EXPECT_EQ(cache_.Rollback(available + 1).code(), StatusCode::kRollbackUnavailable);
    const int64_t count = std::min(available, Pick(0, 8));
    EXPECT_OK(cache_.Rollback(count));
    for (SlowHead& h : heads_) h.Rollback(count);
  }
  void Compress(int32_t layer) {
    int64_t room = 0, expected = std::numeric_limits<int64_t>::max();
    const int64_t tokens = Pick(0, 60);
    EXPECT_OK(cache_.Compress(layer, tokens, &room));
    for (int32_t g = 0; g < c_.kv_heads; ++g) {
      head(layer, g).Compress(tokens);
      expected = std::min(expected, head(layer, g).Room());
    }
    EXPECT_EQ(room, expected);
  }
  // In a cache that has held something else, by saved bytes or by a copy.
  void GoOnInAnother() {
    const Stream s(c_, 50);
    EXPECT_OK(express::Append(other_, c_, 0, s, 0, Pick(0, 50)));
    if (Pick(0, 1) == 0) {
      EXPECT_OK(other_.Copy(cache_));
    } else {
      const std::vector<char> data = Saved(cache_);
      EXPECT_OK(other_.Load(data.data(), data.size()));
    }
    std::swap(cache_, other_);
  }
  void Compare() {
    for (int32_t layer = 0; layer < c_.layers; ++layer)
      for (int32_t g = 0; g < c_.kv_heads; ++g) {
        const Held held = Export(cache_, c_, layer, g);
        std::map<int64_t, int64_t> entries;
        for (size_t j = 0; j < held.position.size(); ++j)
          entries[held.position[j]] = std::llround(std::exp(static_cast<double>(held.log_weight[j])));
        ASSERT_EQ(entries, head(layer, g).Entries()) << "layer " << layer << " head " << g;
        for (size_t j = 0; j < held.position.size(); ++j) {
          const auto k = held.k.begin() + static_cast<int64_t>(j) * c_.key_dim;
          const auto v = held.v.begin() + static_cast<int64_t>(j) * c_.value_dim;
          ASSERT_TRUE(std::equal(k, k + c_.key_dim, head(layer, g).key(held.position[j]).begin()));
          ASSERT_TRUE(std::equal(v, v + c_.value_dim, head(layer, g).value(held.position[j]).begin()));
        }
      }
  }

  std::mt19937 rng_;
  Shape shape_;
  Config c_;
  Rotary rotary_{};
  ExpressCache cache_, other_;
  std::vector<SlowHead> heads_;
};

TEST(Sequences, RandomCallsHoldWhatTheSlowModelHolds) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  constexpr uint32_t kSequences = 30;
#else
  constexpr uint32_t kSequences = 200;
#endif
  for (uint32_t seed = 1; seed <= kSequences && !HasFailure(); ++seed) {
    SCOPED_TRACE(testing::Message() << "sequence " << seed);
    Sequence(seed).Run(60);
  }
}

}  // namespace
}  // namespace express
