// profile: how much attention each KV head pays to far tokens, and the budgets that follow.
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "commands.h"
#include "text.h"

void MeasureProfile(const CommonOptions& common, const ProfileOptions& options) {
  Model model(common.model);
  const ModelConfig& m = model.config();
  const std::vector<int32_t> tokens =
      Encode(Excerpt(ReadText(options.text), options.unit, options.offset, options.tokens));
  const auto n = static_cast<int64_t>(tokens.size());
  if (n <= options.beyond + 1)
    throw std::runtime_error("--tokens: expected more than --beyond = " + std::to_string(options.beyond));
  const auto heads = static_cast<size_t>(m.layers * m.kv_heads);
  PlainKv kv(m, std::vector<int64_t>(heads, n), 0, options.beyond);
  Progress progress("profile", n, common.progress);
  std::vector<float> logits;
  for (int64_t at = 0; at < n; at += 256) {
    const int64_t count = std::min<int64_t>(256, n - at);
    model.Forward(tokens.data() + at, count, at, kv, logits);
    progress.At(at + count);
  }
  const Profile profile{options.beyond, kv.FarMass()};
  const std::vector<int64_t> budgets = ProfileBudgets(profile, common.kv.budget, common.kv.power);
  nlohmann::json mass = nlohmann::json::array(), budget = nlohmann::json::array();
  for (int64_t layer = 0; layer < m.layers; ++layer) {
    const auto begin = layer * m.kv_heads, end = begin + m.kv_heads;
    mass.push_back(std::vector<double>(profile.far_mass.begin() + begin, profile.far_mass.begin() + end));
    budget.push_back(std::vector<int64_t>(budgets.begin() + begin, budgets.begin() + end));
  }
  const nlohmann::json json = {
      {"beyond", options.beyond},        {"tokens", n},      {"far_mass", mass}, {"power", common.kv.power},
      {"mean_budget", common.kv.budget}, {"budgets", budget}};
  if (options.output.empty()) {
    std::printf("%s\n", json.dump(1).c_str());
    return;
  }
  std::ofstream file(options.output);
  file << json.dump(1) << "\n";
  if (!file) throw std::runtime_error("--output: cannot write " + options.output);
}
