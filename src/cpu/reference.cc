#include "src/cpu/reference.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace express::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

double Dot(const double* a, const double* b, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

std::vector<double> MeanRow(const Matrix& m) {
  std::vector<double> mean(static_cast<size_t>(m.columns));
  for (int64_t i = 0; i < m.rows; ++i)
    for (int64_t d = 0; d < m.columns; ++d) mean[static_cast<size_t>(d)] += m.row(i)[d] / static_cast<double>(m.rows);
  return mean;
}

// The key-value kernel of one list.
class Kernel {
 public:
  Kernel(const Matrix& key, const Matrix& value, double beta, double gamma)
      : key_(key), value_(value), beta_(beta), c_(static_cast<size_t>(key.rows)) {
    const std::vector<double> mean = MeanRow(key);
    double largest = 0, b = 0;
    for (int64_t i = 0; i < key.rows; ++i) {
      for (int64_t d = 0; d < key.columns; ++d) key_.row(i)[d] -= mean[static_cast<size_t>(d)];
      largest = std::max(largest, Norm(i));
      for (int64_t d = 0; d < value.columns; ++d) b = std::max(b, std::abs(value.row(i)[d]));
    }
    // c_i = gamma beta ||k_i||^2 / 2 + (1 - gamma) beta max_j ||k_j||^2 / 2
    for (int64_t i = 0; i < key.rows; ++i)
      c_[static_cast<size_t>(i)] = beta * (gamma * Norm(i) + (1 - gamma) * largest) / 2;
    b2_ = b > 0 ? b * b : 1;
  }

  // kappa(i, j) = exp(beta <k_i, k_j> - c_i - c_j) (<v_i, v_j> + b^2)
  double operator()(int64_t i, int64_t j) const {
    const double exponent = beta_ * Dot(key_.row(i), key_.row(j), key_.columns) - c(i) - c(j);
    return std::exp(exponent) * (Dot(value_.row(i), value_.row(j), value_.columns) + b2_);
  }
  double c(int64_t i) const { return c_[static_cast<size_t>(i)]; }

 private:
  double Norm(int64_t i) const { return Dot(key_.row(i), key_.row(i), key_.columns); }

  Matrix key_;  // centred
  const Matrix& value_;
  double beta_, b2_;
  std::vector<double> c_;
};

// Pair a against pair b, x = 2a and y = 2a + 1.
struct PairProduct {
  double d;        // D_ab = kappa(x_a, x_b) - kappa(x_a, y_b) - kappa(y_a, x_b) + kappa(y_a, y_b)
  double squares;  // of the four terms, each times one plus the size of its exponent's parts
};
PairProduct Product(const Kernel& kappa, int64_t a, int64_t b) {
  PairProduct out{0, 0};
  for (int64_t i = 0; i < 2; ++i)
    for (int64_t j = 0; j < 2; ++j) {
      const double term = kappa(2 * a + i, 2 * b + j);
      const double error = term * (1 + kappa.c(2 * a + i) + kappa.c(2 * b + j));
      out.d += i == j ? term : -term;
      out.squares += error * error;
    }
  return out;
}

double Uniform(const StreamKey& stream, RandomPurpose purpose, uint64_t number, int64_t index) {
  return static_cast<double>(UniformFromBits(DrawBits(stream, purpose, number, static_cast<uint32_t>(index))));
}

Decision Coin(double r) { return {r < 0.5, true, 0, 0, r, kInfinity}; }

}  // namespace

Quantised Quantise(const std::vector<float>& x) {
  Quantised out{0, std::vector<int>(x.size())};
  double largest = 0;
  for (const float e : x) {
    if (!std::isfinite(e)) return {std::nan(""), out.code};
    largest = std::max(largest, std::abs(static_cast<double>(e)));
  }
  if (largest == 0) return out;
  // 8 binary digits: scale = digits * 2^exponent with digits in [128, 256), rounded up.
  const auto exact = static_cast<double>(static_cast<float>(std::max(largest / 127, 0x1p-126)));
  const int exponent = std::ilogb(exact) - 7;
  out.scale = std::ldexp(std::ceil(std::ldexp(exact, -exponent)), exponent);
  for (size_t i = 0; i < x.size(); ++i) {
    // The nearest integer; of two as near, the even one.
    const double quotient = static_cast<double>(static_cast<float>(static_cast<double>(x[i]) / out.scale));
    const double below = std::floor(quotient), rest = quotient - below;
    const auto integer = static_cast<int>(below);
    out.code[i] = rest > 0.5 || (rest == 0.5 && integer % 2 != 0) ? integer + 1 : integer;
  }
  return out;
}

Halved Halve(const Matrix& key, const Matrix& value, const cpu::HalveParams& params, const StreamKey& stream,
             uint64_t number) {
  const int64_t pairs = key.rows / 2;
  const Kernel kappa(key, value, static_cast<double>(params.scale), static_cast<double>(params.gamma));
  // t_a = tau sqrt(D_aa) max_{b <= a} sqrt(D_bb) (1/2 + ln(2 (2h) / delta))
  const double factor = static_cast<double>(params.tau) *
                        (0.5 + std::log(2.0 * static_cast<double>(2 * pairs) / static_cast<double>(params.delta)));
  Halved out;
  double largest = 0;
  for (int64_t a = 0; a < pairs; ++a) {
    const double r = Uniform(stream, RandomPurpose::kHalve, number, a);
    if (params.coin) {
      out.decisions.push_back(Coin(r));
      continue;
    }
    const double root = std::sqrt(std::max(0.0, Product(kappa, a, a).d));
    largest = std::max(largest, root);
    const double threshold = factor * root * largest;
    double sum = 0, squares = 0;  // S_a = sum_{b < a} +- D_ab, + where x_b was kept
    for (int64_t b = 0; b < a; ++b) {
      const PairProduct product = Product(kappa, a, b);
      sum += out.decisions[static_cast<size_t>(b)].keep_y ? -product.d : product.d;
      squares += product.squares;
    }
    if (a == 0 || threshold == 0) {
      out.decisions.push_back(Coin(r));
      if (a > 0 && factor > 0) out.decisions.back().margin = 0;
      continue;
    }
    const double u = (2 * r - 1) * threshold;  // uniform on (-t_a, t_a)
    const double error = std::sqrt(squares + threshold * threshold);
    out.decisions.push_back({u < sum, false, sum, threshold, u, std::abs(u - sum) / error});
  }
  out.complement = Uniform(stream, RandomPurpose::kComplement, number, 0) < 0.5;
  for (int64_t a = 0; a < pairs; ++a)
    out.kept.push_back(2 * a + (out.decisions[static_cast<size_t>(a)].keep_y != out.complement ? 1 : 0));
  return out;
}

Attention Attend(const double* q, double scale, const Matrix& key, const Matrix& value,
                 const std::vector<float>& log_weight, double exponent) {
  return AttendCausal(q, scale, key, value, log_weight, exponent, Matrix(0, key.columns), Matrix(0, value.columns), -1);
}

Attention AttendCausal(const double* q, double scale, const Matrix& key, const Matrix& value,
                       const std::vector<float>& log_weight, double exponent, const Matrix& block_key,
                       const Matrix& block_value, int64_t t) {
  std::vector<double> logits;
  std::vector<const double*> values;
  for (int64_t j = 0; j < key.rows; ++j) {
    const double log_w = static_cast<double>(log_weight[static_cast<size_t>(j)]);
    if (log_w == -kInfinity) continue;
    logits.push_back(scale * Dot(q, key.row(j), key.columns) + exponent * log_w);
    values.push_back(value.row(j));
  }
  for (int64_t j = 0; j <= t; ++j) {
    logits.push_back(scale * Dot(q, block_key.row(j), key.columns));
    values.push_back(block_value.row(j));
  }
  Attention result{std::vector<double>(static_cast<size_t>(value.columns)), -kInfinity};
  if (logits.empty()) return result;
  const double max = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const double logit : logits) sum += std::exp(logit - max);
  for (size_t j = 0; j < logits.size(); ++j)
    for (size_t d = 0; d < result.out.size(); ++d) result.out[d] += std::exp(logits[j] - max) / sum * values[j][d];
  result.lse = max + std::log(sum);
  return result;
}

std::vector<double> WithoutPosition(const double* key, int64_t key_dim, int64_t position,
                                    const std::vector<float>& frequency, bool interleaved) {
  std::vector<double> out(key, key + key_dim);
  const size_t pairs = frequency.size();
  for (size_t i = 0; i < pairs; ++i) {
    const double angle = static_cast<double>(position) * static_cast<double>(frequency[i]);
    const size_t first = interleaved ? 2 * i : i, second = interleaved ? 2 * i + 1 : pairs + i;
    const double x = key[first], y = key[second];
    out[first] = x * std::cos(angle) + y * std::sin(angle);
    out[second] = y * std::cos(angle) - x * std::sin(angle);
  }
  return out;
}

Protected::Protected(int64_t capacity, const Matrix& tail)
    : capacity_(static_cast<size_t>(capacity)), mean_(MeanRow(tail)), sum_(mean_.size()) {}

int64_t Protected::Depart(const double* key, double factor) {
  const auto departure = score_.size();
  // mu is the mean of the last full run of 256 departures, and before the first that of the tail.
  if (departure > 0 && departure % 256 == 0) {
    for (size_t d = 0; d < mean_.size(); ++d) mean_[d] = sum_[d] / 256;
    std::fill(sum_.begin(), sum_.end(), 0.0);
  }
  double score = 0;
  for (size_t d = 0; d < mean_.size(); ++d) {
    score += (key[d] - mean_[d]) * (key[d] - mean_[d]);
    sum_[d] += key[d];
  }
  score_.push_back(score * factor);
  members_.push_back(static_cast<int64_t>(departure));
  if (members_.size() <= capacity_) return -1;
  size_t weakest = 0;  // the youngest of the lowest scores
  const auto score_of = [&](size_t m) { return score_[static_cast<size_t>(members_[m])]; };
  for (size_t m = 1; m < members_.size(); ++m)
    if (score_of(m) <= score_of(weakest)) weakest = m;
  const int64_t loser = members_[weakest];
  members_.erase(members_.begin() + static_cast<int64_t>(weakest));
  return loser;
}

}  // namespace express::reference
