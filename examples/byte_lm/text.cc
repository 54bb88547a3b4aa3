#include "text.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <stdexcept>

std::string ReadText(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::string Excerpt(const std::string& text, int64_t unit, int64_t offset, int64_t bytes) {
  size_t begin = 0, end = text.size();
  if (unit >= 0) {
    for (int64_t i = 0; i < unit; ++i) {
      begin = text.find('\0', begin);
      if (begin == std::string::npos)
        throw std::runtime_error("--unit: the text has only " + std::to_string(i + 1) + " units");
      ++begin;
    }
    end = std::min(text.find('\0', begin), text.size());
  }
  begin += static_cast<size_t>(offset);
  if (begin >= end) throw std::runtime_error("--offset: the text ends before it");
  return text.substr(begin, std::min(static_cast<size_t>(bytes), end - begin));
}

std::vector<int32_t> Encode(const std::string& bytes) {
  std::vector<int32_t> tokens = {kBos};
  for (const char byte : bytes) tokens.push_back(byte == 0 ? kBos : static_cast<unsigned char>(byte));
  return tokens;
}

double Bits(const float* logits, int64_t vocab, int32_t target) {
  const double top = *std::max_element(logits, logits + vocab);
  double sum = 0;
  for (int64_t i = 0; i < vocab; ++i) sum += std::exp(logits[i] - top);
  return (top + std::log(sum) - logits[target]) / std::log(2.0);
}

int32_t ArgMax(const float* logits, int64_t vocab) {
  return static_cast<int32_t>(std::max_element(logits, logits + vocab) - logits);
}

double Seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

Progress::Progress(std::string what, int64_t total, bool always)
    : what_(std::move(what)), total_(total), shown_(always || isatty(STDERR_FILENO) != 0), begin_(Seconds()) {}

Progress::~Progress() {
  if (shown_) std::fprintf(stderr, "\r\033[K");
}

void Progress::At(int64_t done) {
  const double now = Seconds();
  if (!shown_ || now - last_ < 0.2) return;
  last_ = now;
  const double elapsed = now - begin_;
  std::fprintf(stderr, "\r\033[K%s: %lld of %lld tokens, %.0f s, %.0f s to go", what_.c_str(),
               static_cast<long long>(done), static_cast<long long>(total_), elapsed,
               done > 0 ? elapsed * static_cast<double>(total_ - done) / static_cast<double>(done) : 0.0);
}
