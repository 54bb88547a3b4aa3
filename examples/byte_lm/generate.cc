// generate: reads a prompt in blocks, then decodes one token a step and streams it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <random>
#include <stdexcept>

#include "commands.h"
#include "text.h"

namespace {

int32_t Sample(const float* logits, int64_t vocab, double temperature, std::mt19937_64& rng) {
  if (temperature <= 0) return ArgMax(logits, vocab);
  const double top = *std::max_element(logits, logits + vocab);
  std::vector<double> weight;
  for (int64_t i = 0; i < vocab; ++i) weight.push_back(std::exp((logits[i] - top) / temperature));
  return std::discrete_distribution<int32_t>(weight.begin(), weight.end())(rng);
}

}  // namespace

void Generate(const CommonOptions& common, const GenerateOptions& options) {
  Model model(common.model);
  const int64_t vocab = model.config().vocab;
  const std::vector<int32_t> prompt = Encode(Excerpt(ReadText(options.prompt_file), -1, 0, options.prompt_tokens));
  const auto n = static_cast<int64_t>(prompt.size());
  const std::unique_ptr<KvCache> kv = MakeKv(common.kv, model.config(), n + options.tokens);
  std::mt19937_64 rng(common.kv.seed);
  std::vector<float> logits;
  int64_t last = 0;  // rows of the last block
  double begin = Seconds();
  {
    Progress progress("prompt", n, common.progress);
    for (int64_t at = 0; at < n; at += last) {
      last = std::min(common.kv.block, n - at);
      model.Forward(prompt.data() + at, last, at, *kv, logits);
      progress.At(at + last);
    }
  }
  const double prefill = Seconds() - begin;
  int32_t token = Sample(logits.data() + (last - 1) * vocab, vocab, options.temperature, rng);
  begin = Seconds();
  for (int64_t i = 0; i < options.tokens; ++i) {
    if (!common.json && token < 256) {
      std::putchar(token);
      std::fflush(stdout);
    }
    model.Forward(&token, 1, n + i, *kv, logits);
    token = Sample(logits.data(), vocab, options.temperature, rng);
  }
  const double decode = Seconds() - begin;
  const double per_second = static_cast<double>(options.tokens) / decode;
  if (common.json) {
    const nlohmann::json r = {{"policy", common.kv.policy},
                              {"budget", common.kv.budget},
                              {"prompt_tokens", n},
                              {"tokens", options.tokens},
                              {"prefill_seconds", prefill},
                              {"prefill_tokens_per_second", static_cast<double>(n) / prefill},
                              {"decode_seconds", decode},
                              {"decode_tokens_per_second", per_second},
                              {"kv_bytes_peak", kv->BytesPeak()},
                              {"kv_entry_bytes_peak", kv->EntriesPeak() * kv->EntryBytes()},
                              {"entries_peak", kv->EntriesPeak()},
                              {"seed", common.kv.seed}};
    std::printf("%s\n", r.dump().c_str());
    return;
  }
  std::printf("\n");
  std::fprintf(stderr, "prompt: %lld tokens at %.0f tokens/s; decoded %lld tokens at %.0f tokens/s; KV cache %.2f MB\n",
               static_cast<long long>(n), static_cast<double>(n) / prefill, static_cast<long long>(options.tokens),
               per_second, static_cast<double>(kv->BytesPeak()) / 1e6);
}
