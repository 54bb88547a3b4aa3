// Texts as tokens, log-probabilities in bits, and a progress line.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

inline constexpr int32_t kBos = 256;  // begins every sequence; also stands for a NUL byte, which separates documents

std::string ReadText(const std::string& path);  // throws std::runtime_error

// The `unit`-th of the NUL-separated parts of a text (-1: the whole text), from byte `offset` on, at most `bytes`
// bytes.
std::string Excerpt(const std::string& text, int64_t unit, int64_t offset, int64_t bytes);

// kBos and then every byte.
std::vector<int32_t> Encode(const std::string& bytes);

// -log2 softmax(logits)[target]
double Bits(const float* logits, int64_t vocab, int32_t target);
int32_t ArgMax(const float* logits, int64_t vocab);

double Seconds();

// One line on stderr, rewritten at most a few times a second; silent unless stderr is a terminal or `always`.
class Progress {
 public:
  Progress(std::string what, int64_t total, bool always);
  ~Progress();
  void At(int64_t done);

 private:
  std::string what_;
  int64_t total_;
  bool shown_;
  double begin_, last_ = 0;
};
