// express-lm: a small language model that reads, recalls and writes with its KV cache inside a budget.
#include <tbb/global_control.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <optional>
#include <stdexcept>

#include "commands.h"

namespace {

void AddCommon(CLI::App* app, CommonOptions& o) {
  app->add_option("--model", o.model, "Folder with config.json and model.safetensors")->required();
  app->add_option("--threads", o.kv.threads, "Threads to compute on (-1: one per hardware thread)")
      ->capture_default_str();
  app->add_flag("--progress", o.progress, "Show progress even when stderr is no terminal");
}

void AddCache(CLI::App* app, CommonOptions& o) {
  AddCommon(app, o);
  app->add_flag("--json", o.json, "Print one JSON object");
  app->add_option("--policy", o.kv.policy,
                  "exact: keep everything; window: sinks and the last tokens; uniform: Express with fair coins and "
                  "nothing protected; express")
      ->check(CLI::IsMember({"exact", "window", "uniform", "express"}))
      ->capture_default_str();
  app->add_option("--budget", o.kv.budget, "Mean entries per KV head over all layers, or bytes: --budget-unit")
      ->capture_default_str();
  app->add_option("--budget-unit", o.kv.budget_unit, "entries, or bytes of the whole cache")
      ->check(CLI::IsMember({"entries", "bytes"}))
      ->capture_default_str();
  app->add_option("--profile", o.kv.profile,
                  "Far masses (express-lm profile): heads that look far get more of the budget");
  app->add_option("--power", o.kv.power, "Budgets beyond the base go by far mass to this power")->capture_default_str();
  app->add_option("--sinks", o.kv.sinks, "First tokens, kept exactly")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app->add_option("--window", o.kv.window, "Last tokens, kept exactly (-1: from the budget)")->capture_default_str();
  app->add_option("--protected", o.kv.protect, "Outlying older tokens, kept exactly (-1: from the budget)")
      ->capture_default_str();
  app->add_option("--alpha", o.kv.alpha, "Weight exponent, 0 to 1; -1: from the budget")->capture_default_str();
  app->add_option("--gamma", o.kv.gamma, "Key kernel: 0 exponential to 1 Gaussian")->capture_default_str();
  app->add_option("--tau", o.kv.tau, "Scale of the halving thresholds")->capture_default_str();
  app->add_option("--schedule", o.kv.schedule, "budget or rounds")
      ->check(CLI::IsMember({"budget", "rounds"}))
      ->capture_default_str();
  app->add_option(
         "--head-budgets", o.kv.head_budgets,
         "fixed, or observed: heads that are seen to look far get more of the budget; auto: observed where the rest "
         "allows it, as without a profile")
      ->capture_default_str()
      ->check(CLI::IsMember({"auto", "fixed", "observed"}));
  app->add_option(
         "--score", o.kv.score,
         "What older tokens are kept exactly for. energy: keys far from the mean, without their rotary positions; "
         "energy-value: the same times the norm of the value; auto: by the budget")
      ->capture_default_str()
      ->check(CLI::IsMember({"auto", "energy", "energy-value"}));
  app->add_flag("!--no-rotary", o.kv.rotary, "Keep the model's rotary positions from the library: scores with them");
  app->add_option("--halving", o.kv.halving, "kernel, or coin: uniform sampling, for comparison")
      ->check(CLI::IsMember({"kernel", "coin"}))
      ->capture_default_str();
  app->add_option("--block", o.kv.block, "Tokens taken at a time; 1 is decoding")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_option("--chunk", o.kv.chunk, "Tokens given to the cache in one call (0: a block)")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app->add_option("--dtype", o.kv.dtype, "Storage of keys and values; i8: 8-bit codes, and a scale for each")
      ->check(CLI::IsMember({"f32", "f16", "bf16", "i8"}))
      ->capture_default_str();
  app->add_option("--seed", o.kv.seed, "Seed of all random choices")->capture_default_str();
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("A byte-level language model with its KV cache inside a fixed budget (Express)");
  app.require_subcommand(1);
  CommonOptions common;

  ScoreOptions score;
  CLI::App* score_app = app.add_subcommand("score", "Bits per byte on a text");
  AddCache(score_app, common);
  score_app->add_option("--text", score.text, "Text file")->required();
  score_app->add_option("--tokens", score.tokens, "Bytes of it")->check(CLI::PositiveNumber)->capture_default_str();
  score_app->add_option("--unit", score.unit, "Take this one of its NUL-separated parts (-1: all)")
      ->capture_default_str();
  score_app->add_option("--offset", score.offset, "Begin at this byte")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();

  std::vector<std::string> cases;
  CLI::App* recall_app =
      app.add_subcommand("recall", "Recall of facts planted in a text, each answer given the true bytes before it");
  AddCache(recall_app, common);
  recall_app->add_option("--case", cases, "Description of a case (.json beside its .txt); several may follow")
      ->required();

  ProfileOptions profile;
  CLI::App* profile_app =
      app.add_subcommand("profile", "Measure far mass per KV head with exact attention and derive budgets");
  AddCommon(profile_app, common);
  profile_app->add_option("--text", profile.text, "Text file")->required();
  profile_app->add_option("--tokens", profile.tokens, "Bytes of it")->check(CLI::PositiveNumber)->capture_default_str();
  profile_app->add_option("--unit", profile.unit, "Take this one of its NUL-separated parts (-1: all)")
      ->capture_default_str();
  profile_app->add_option("--offset", profile.offset, "Begin at this byte")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  profile_app->add_option("--beyond", profile.beyond, "A token more than so many back is far")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  profile_app->add_option("--budget", common.kv.budget, "Mean entries per KV head to share out")->capture_default_str();
  profile_app->add_option("--power", common.kv.power, "Budgets beyond the base go by far mass to this power")
      ->capture_default_str();
  profile_app->add_option("--output", profile.output, "File to write (default: standard output)");

  GenerateOptions generate;
  CLI::App* generate_app = app.add_subcommand("generate", "Continue a prompt, one token a step");
  AddCache(generate_app, common);
  generate_app->add_option("--prompt-file", generate.prompt_file, "Text to continue")->required();
  generate_app->add_option("--prompt-tokens", generate.prompt_tokens, "At most so many bytes of it")
      ->check(CLI::PositiveNumber);
  generate_app->add_option("--tokens", generate.tokens, "Bytes to write")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  generate_app->add_option("--temperature", generate.temperature, "0: always the most likely byte")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();

  CLI::App* check_app = app.add_subcommand("check", "Compare the logits with the model's reference.json");
  AddCommon(check_app, common);

  CLI11_PARSE(app, argc, argv);
  try {
    const int threads = common.kv.threads;
    if (threads != EXPRESS_AUTO && threads < 1) throw std::runtime_error("--threads: expected at least 1, or -1");
    std::optional<tbb::global_control> limit;  // of the engine's own loops and of the library's
    if (threads > 0) limit.emplace(tbb::global_control::max_allowed_parallelism, static_cast<size_t>(threads));
    if (*score_app) Score(common, score);
    if (*recall_app) Recall(common, cases);
    if (*profile_app) MeasureProfile(common, profile);
    if (*generate_app) Generate(common, generate);
    if (*check_app) CheckReference(common);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "express-lm: %s\n", error.what());
    return 1;
  }
  return 0;
}
