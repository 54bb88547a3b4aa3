// What plans do in a prompt on the GPU: recorded once, and used again by other layers and by later prompts of that length.
#include <algorithm>
#include <new>

#include "src/cache/cuda_prompt.h"

namespace express::cache {
namespace {

size_t StateBytes(plan::Plan& plan) {
  Archive archive;
  plan.Transfer(archive);
  return archive.used();
}

}  // namespace

// Finds what is recorded of this prompt's plans, and makes room for what is not.
void PromptRun::StartRecording() {
  PromptHost& host = *host_;
  if (host.tokens != input_.tokens || host.block != block_) host.recordings.clear();
  host.tokens = input_.tokens;
  host.block = block_;
  ++host.calls;
  const auto count = static_cast<size_t>(plan_count());
  std::vector<const plan::Plan*> plans;
  for (int32_t i = 0; i < plan_count(); ++i) plans.push_back(&plan(i).plan);
  recording_.assign(count, nullptr);
  alone_.assign(count, nullptr);
  host.alone.resize(std::max(host.alone.size(), count));
  if (count > 1) host.joined.Reserve(plans, shape_.span, shape_.blocks);
  for (int32_t i = 0; i < plan_count(); ++i) {
    PromptHost::Recording*& recording = recording_[static_cast<size_t>(i)];
    recording = FindRecording(plan(i).plan);
    if (recording != nullptr) recording->used = host.calls;
  }
  for (int32_t i = 0; i < plan_count(); ++i) {
    if (recording_[static_cast<size_t>(i)] != nullptr) continue;
    host.alone[static_cast<size_t>(i)].Reset({&plan(i).plan}, shape_.span, shape_.blocks);
    if (Records()) MakeRecording(i);
  }
}

bool PromptRun::Records() const {
  const int64_t tokens = input_.tokens;
  return tokens <= kRecorded || (tokens <= 2 * kRecorded && tokens * plan_count() <= kRecordings * kRecorded);
}

PromptHost::Recording* PromptRun::FindRecording(plan::Plan& plan) {
  for (const auto& recording : host_->recordings) {
    if (!recording->complete || !(recording->setting == plan.setting())) continue;
    Archive archive = Archive::Comparer(recording->before.data());
    plan.Transfer(archive);
    if (archive.same()) return recording.get();
  }
  return nullptr;
}

// In place of the one that has not been used for longest, if there are many.
void PromptRun::MakeRecording(int32_t i) {
  auto& recordings = host_->recordings;
  const int64_t most = input_.tokens <= kRecorded ? kRecordings : kRecordings / 2;
  if (recordings.size() >= static_cast<size_t>(std::max<int64_t>(most, plan_count())))
    recordings.erase(std::min_element(recordings.begin(), recordings.end(),
                                      [](const auto& a, const auto& b) { return a->used < b->used; }));
  auto recording = std::make_unique<PromptHost::Recording>();
  recording->setting = plan(i).plan.setting();
  recording->before.resize(StateBytes(plan(i).plan));
  Archive archive = Archive::Writer(recording->before.data());
  plan(i).plan.Transfer(archive);
  recording->after.resize(recording->before.size());
  recording->lists.Reserve(recording->setting.budget);
  recording->used = host_->calls;
  recording_[static_cast<size_t>(i)] = recording.get();
  recordings.push_back(std::move(recording));
}

// The next `tokens` tokens of one plan, with what has been recorded of them, or to be recorded.
const plan::Span* PromptRun::RecordAlone(int32_t i, int64_t tokens) {
  PromptHost::Recording*& recording = recording_[static_cast<size_t>(i)];
  if (recording != nullptr && recording->complete) return &recording->spans[static_cast<size_t>(spans_)];
  plan::Span& span = host_->alone[static_cast<size_t>(i)];
  span.Begin();
  span.Record(0, plan(i).plan, tokens, block_, cache_.plans_.operations);
  span.Finish(cuda::kSpanClasses, cuda::kSpanTogether);
  if (recording == nullptr) return &span;
  try {
    recording->spans.push_back(span);
  } catch (const std::bad_alloc&) {  // the prompt goes on without
    recording = nullptr;
  }
  return &span;
}

// The next `tokens` tokens of all plans.
void PromptRun::RecordSpan(int64_t tokens) {
  for (int32_t i = 0; i < plan_count(); ++i) alone_[static_cast<size_t>(i)] = RecordAlone(i, tokens);
  span_ = alone_[0];
  if (plan_count() > 1) {
    host_->joined.Join(alone_);
    host_->joined.Finish(cuda::kSpanClasses, cuda::kSpanTogether);
    span_ = &host_->joined;
  }
  for (const plan::SpanJoin& join : span_->joins()) joined_[static_cast<size_t>(join.plan)].push_back(join.slot);
}

// The plans as they are after the prompt.
void PromptRun::FinishPlans() {
  for (int32_t i = 0; i < plan_count(); ++i) {
    PromptHost::Recording* recording = recording_[static_cast<size_t>(i)];
    if (recording == nullptr) continue;
    char* const after = recording->after.data();
    Archive archive = recording->complete ? Archive::Reader(after) : Archive::Writer(after);
    plan(i).plan.Transfer(archive);
    recording->complete = true;
  }
}

}  // namespace express::cache
