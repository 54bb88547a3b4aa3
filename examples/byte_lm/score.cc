// score, recall: how well the model predicts a text, and planted facts in it, with its cache under a policy.
#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "commands.h"
#include "text.h"

namespace {

using nlohmann::json;

struct Result {
  std::vector<double> bits;  // of each byte of the text
  std::vector<bool> first;   // whether it was the model's first choice
  double seconds = 0;
  int64_t bytes_peak = 0, entries_peak = 0, entry_bytes = 0;

  double Mean(size_t begin, size_t end) const {
    double sum = 0;
    for (size_t i = begin; i < end; ++i) sum += bits[i];
    return end > begin ? sum / static_cast<double>(end - begin) : 0;
  }
};

// Feeds the text in blocks; each byte is predicted from the true ones before it.
Result Run(Model& model, const CommonOptions& common, const std::string& text, const std::string& what) {
  const std::vector<int32_t> tokens = Encode(text);
  const auto n = static_cast<int64_t>(tokens.size()) - 1;  // the last token predicts nothing that is known
  const int64_t vocab = model.config().vocab, block = common.kv.block,
                chunk = common.kv.chunk > 0 ? common.kv.chunk : block;
  if (block < 1) throw std::runtime_error("--block: expected at least 1");
  const std::unique_ptr<KvCache> kv = MakeKv(common.kv, model.config(), n);
  Progress progress(what, n, common.progress);
  Result result;
  std::vector<float> logits;  // (block, vocab)
  const double begin = Seconds();
  for (int64_t at = 0; at < n; at += chunk) {
    const int64_t count = std::min(chunk, n - at);
    model.Forward(tokens.data() + at, count, at, *kv, logits);
    for (int64_t i = 0; i < count; ++i) {
      const int32_t target = tokens[static_cast<size_t>(at + i + 1)];
      result.bits.push_back(Bits(logits.data() + i * vocab, vocab, target));
      result.first.push_back(ArgMax(logits.data() + i * vocab, vocab) == target);
    }
    progress.At(at + count);
  }
  result.seconds = Seconds() - begin;
  result.bytes_peak = kv->BytesPeak();
  result.entries_peak = kv->EntriesPeak();
  result.entry_bytes = kv->EntryBytes();
  return result;
}

// Bits per byte of the bytes [0, 1K), [1K, 2K), [2K, 4K), [4K, 8K) and so on.
json ByPosition(const Result& result) {
  json by = json::array();
  for (size_t begin = 0, end = 1024; begin < result.bits.size(); begin = end, end *= 2)
    by.push_back({{"from", begin}, {"bits_per_byte", result.Mean(begin, std::min(end, result.bits.size()))}});
  return by;
}

json Describe(const CommonOptions& common, const Result& result) {
  const size_t n = result.bits.size();
  const bool prefill = common.kv.block > 1;
  return {{"policy", common.kv.policy},
          {"budget", common.kv.budget},
          {"tokens", n},
          {"bits_per_byte", result.Mean(0, n)},
          {"bits_per_byte_second_half", result.Mean(n / 2, n)},
          {"by_position", ByPosition(result)},
          {"kv_bytes_peak", result.bytes_peak},
          {"kv_entry_bytes_peak", result.entries_peak * result.entry_bytes},
          {"entries_peak", result.entries_peak},
          {"prefill_seconds", prefill ? result.seconds : 0.0},
          {"decode_seconds", prefill ? 0.0 : result.seconds},
          {"block", common.kv.block},
          {"alpha", common.kv.alpha},
          {"profile", common.kv.profile},
          {"seed", common.kv.seed}};
}

void Print(const CommonOptions& common, const json& r) {
  if (common.json) {
    std::printf("%s\n", r.dump().c_str());
    return;
  }
  std::printf("policy %s, budget %lld %s, %lld tokens\n", common.kv.policy.c_str(),
              static_cast<long long>(common.kv.budget),
              common.kv.budget_unit == "bytes" ? "bytes" : "entries per KV head", r["tokens"].get<long long>());
  std::printf("bits per byte              %8.4f\n", r["bits_per_byte"].get<double>());
  std::printf("  second half              %8.4f\n", r["bits_per_byte_second_half"].get<double>());
  for (const json& part : r["by_position"])
    std::printf("  from byte %-8lld       %8.4f\n", part["from"].get<long long>(), part["bits_per_byte"].get<double>());
  std::printf("KV bytes at peak           %8.2f MB, %.2f MB of them keys and values\n",
              r["kv_bytes_peak"].get<double>() / 1e6, r["kv_entry_bytes_peak"].get<double>() / 1e6);
  std::printf("entries at peak            %8lld\n", r["entries_peak"].get<long long>());
  std::printf("prefill, decode            %8.2f s, %.2f s\n", r["prefill_seconds"].get<double>(),
              r["decode_seconds"].get<double>());
  if (r.contains("asked"))
    std::printf("facts recalled             %lld of %lld\n", r["recalled"].get<long long>(),
                r["asked"].get<long long>());
}

}  // namespace

void Score(const CommonOptions& common, const ScoreOptions& options) {
  Model model(common.model);
  const std::string text = Excerpt(ReadText(options.text), options.unit, options.offset, options.tokens);
  Print(common, Describe(common, Run(model, common, text, "score")));
}

void Recall(const CommonOptions& common, const std::vector<std::string>& cases) {
  Model model(common.model);
  Result all;
  int64_t recalled = 0, asked = 0;
  double second_half = 0;
  json facts = json::array();
  for (const std::string& path : cases) {
    const json description = json::parse(ReadText(path));
    const std::string text = ReadText(path.substr(0, path.rfind(".json")) + ".txt");
    const Result result = Run(model, common, text, "recall " + path);
    for (const json& answer : description.at("answers")) {
      const auto offset = answer.at("offset").get<size_t>(), length = answer.at("length").get<size_t>();
      if (offset + length > result.first.size()) throw std::runtime_error(path + ": an answer lies beyond the text");
      const bool right =
          std::all_of(result.first.begin() + static_cast<int64_t>(offset),
                      result.first.begin() + static_cast<int64_t>(offset + length), [](bool f) { return f; });
      recalled += right;
      ++asked;
      facts.push_back({{"fact_offset", answer.at("fact_offset")}, {"recalled", right}});
    }
    all.bits.insert(all.bits.end(), result.bits.begin(), result.bits.end());
    all.seconds += result.seconds;
    all.bytes_peak = std::max(all.bytes_peak, result.bytes_peak);
    all.entries_peak = std::max(all.entries_peak, result.entries_peak);
    all.entry_bytes = result.entry_bytes;
    second_half += result.Mean(result.bits.size() / 2, result.bits.size()) / static_cast<double>(cases.size());
  }
  json r = Describe(common, all);
  r["bits_per_byte_second_half"] = second_half;  // the mean of the cases' second halves
  if (cases.size() > 1) r["by_position"] = json::array();
  r["recalled"] = recalled;
  r["asked"] = asked;
  r["facts"] = facts;
  Print(common, r);
}

void CheckReference(const CommonOptions& common) {
  Model model(common.model);
  const json reference = json::parse(ReadText(common.model + "/reference.json"));
  double worst = 0;
  for (const json& prompt : reference.at("prompts")) {
    const std::string text = Excerpt(ReadText(common.model + "/" + prompt.at("file").get<std::string>()), -1,
                                     prompt.at("offset"), prompt.at("length"));
    const std::vector<int32_t> tokens = Encode(text);
    const auto n = static_cast<int64_t>(tokens.size());
    const auto expected = prompt.at("logits_256").get<std::vector<double>>();
    KvOptions exact;
    exact.policy = "exact";
    exact.threads = common.kv.threads;
    for (const int64_t decoded : {0, 1}) {  // all tokens in one prefill; the last one in a decoding step of its own
      const std::unique_ptr<KvCache> kv = MakeKv(exact, model.config(), n);
      std::vector<float> logits;  // (n or 1, vocab)
      model.Forward(tokens.data(), n - decoded, 0, *kv, logits);
      if (decoded > 0) model.Forward(tokens.data() + n - 1, 1, n - 1, *kv, logits);
      const float* last = logits.data() + logits.size() - static_cast<size_t>(model.config().vocab);
      for (size_t i = 0; i < expected.size(); ++i) worst = std::max(worst, std::abs(last[i] - expected[i]));
    }
  }
  std::printf("largest logit difference %.2e\n", worst);
  if (!(worst <= 0.05)) throw std::runtime_error("the logits differ from reference.json by more than 0.05");
}
