// The subcommands of express-lm. Each throws std::runtime_error with a message for the user.
#pragma once

#include <string>
#include <vector>

#include "kv.h"

struct CommonOptions {
  std::string model;
  bool json = false, progress = false;
  KvOptions kv;
};

struct ScoreOptions {
  std::string text;
  int64_t tokens = 16384, unit = -1, offset = 0;
};
void Score(const CommonOptions& common, const ScoreOptions& options);

void Recall(const CommonOptions& common, const std::vector<std::string>& cases);

struct ProfileOptions {
  std::string text, output;
  int64_t tokens = 12288, unit = -1, offset = 0, beyond = 1024;
};
void MeasureProfile(const CommonOptions& common, const ProfileOptions& options);

struct GenerateOptions {
  std::string prompt_file;
  int64_t prompt_tokens = 1 << 20, tokens = 256;
  double temperature = 0;
};
void Generate(const CommonOptions& common, const GenerateOptions& options);

// Compares the logits with those of reference.json in the model's folder; throws beyond 0.05.
void CheckReference(const CommonOptions& common);
