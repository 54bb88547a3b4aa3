// The cache on an NVIDIA GPU: the plans run on the host, ahead of the device, and kernels execute what they say.
//
// Nothing here waits for the device but creation, reset and destruction. A token's operations travel in kernel arguments to a
// ring in device memory (src/cuda/ring.h), and the kernels of append read them there, eagerly or in a captured graph.
#ifndef EXPRESS_SRC_CACHE_CUDA_CACHE_H_
#define EXPRESS_SRC_CACHE_CUDA_CACHE_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>

#include "src/cache/cache.h"
#include "src/cuda/kernels.h"
#include "src/cuda/ring.h"

namespace express::cache {

// What the device and the kernels can do with this configuration.
Status CheckCudaConfig(const Config& config);
TensorCheck CudaTensorCheck(int32_t device_id);
Status CudaError(const char* what, cudaError_t error);

// Makes a device current until the end of the scope.
class DeviceScope {
 public:
  explicit DeviceScope(int32_t device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = -1, device_;
  cudaError_t error_;
};

// Properties of a device that kernels are chosen by.
struct DeviceTraits {
  int32_t multiprocessors = 0;
  int32_t compute_capability = 0;                      // 90: 9.0
  int32_t shared_bytes = 0;                            // of a block, at most
  cuda::AttendMachine attend[cuda::kMostBlocks] = {};  // with one block of a multiprocessor, with two, ..
};

// Streams beside the caller's, for the selection of a prompt's entries, and the events that order them.
struct SideStream {
  cudaStream_t stream = nullptr, graph = nullptr;
  cudaEvent_t begun = nullptr, scored = nullptr, admitted = nullptr, selected[2] = {}, attended[2] = {};
  cudaError_t Create();
  void Destroy();
};

// The host's side of one plan's ring.
struct RingState {
  static constexpr int64_t kMostSteps = 256;  // records that may wait at once
  int32_t write = 0;                          // offset of the next record
  int64_t written = 0;                        // records written: the sequence number of the last one
  int64_t launched = 0;                       // of them, those that eager launches have taken up
  int32_t begin[kMostSteps] = {};             // where record s begins, at s % kMostSteps
};

// Where the parts of a cache lie: on the device, and their descriptions on the host.
struct CudaParts {
  KeptScoring* scoring;     // host; null where scores are energies of keys as they come
  uint64_t* turns;          // device (pairs)
  Budgets budgets;          // host; what was observed is in pinned memory
  Plans plans;              // host
  cuda::Head* head_copies;  // host (layers, kv_heads)
  cuda::Ring* ring_copies;  // host (plan_capacity)
  char* plans_begin;        // host (plans_bytes): all that `plans` points to
  char* plans_saved;        // host (plans_bytes): as it was before steps were prepared
  int64_t plans_bytes;
  RingState* ring_states;  // host (plan_capacity)
  uint8_t* ahead;          // host (layers): one step is planned, and its halvings are enqueued
  int32_t* record;         // host (record_words): one record, encoded
  int64_t record_words;    // the longest one
  cuda::Head* heads;       // device (layers, kv_heads)
  cuda::Ring* rings;       // device (plan_capacity)
  int32_t* slot_scratch;   // device (2, most budget): lists of slots and weights of an export
  char* buffer;            // device (buffer_bytes): partial results of attention, of no use between kernels
  size_t buffer_bytes;
  char* state;  // device (state_bytes): all that heads hold
  size_t state_bytes;
  cuda::Seen* seen;  // device (layers, kv_heads), in front of the state; null where budgets are fixed
  char* arrays;      // device (array_bytes): the arrays of heads, at the end of the state
  size_t array_bytes;
  char* work;  // device (work_bytes): where budgets are observed, rings and scratch of heads; nothing that lasts
  size_t work_bytes;
};

// The host's memory that the device writes to, without being asked.
struct PinnedMemory {
  int32_t* progress;   // (plan_capacity, 2)
  Observed* observed;  // (layers, kv_heads), or null
};

struct PromptHost;  // cuda_prompt.h

class CudaCache final : public Cache {
 public:
  static Status Create(const Resolved& resolved, int64_t bytes, Cache** cache);
  // Bytes of device memory.
  static Status Bytes(const Resolved& resolved, int64_t* bytes);
  static Status OneShotBytes(const Resolved& resolved, int64_t* bytes);
  static Status CompressOnce(const Resolved& resolved, void* memory, int64_t bytes, const Tensor& k, const Tensor& v,
                             const OneShotOutput& out, int64_t* count);

 private:
  friend class PromptRun;
  CudaCache(const Resolved& resolved, const CudaParts& parts, int64_t bytes, void* device_memory, int32_t* progress,
            DeviceTraits traits);
  ~CudaCache() override;
  static CudaParts Layout(const Shape& shape, const PinnedMemory& pinned, Arena& host, Arena& device);
  // What does not depend on the budgets of heads, and the arrays of heads, one head behind the other.
  static void LayoutFixed(const Shape& shape, const PinnedMemory& pinned, Arena& device, CudaParts* parts);
  static void LayoutArrays(const Shape& shape, const Plans& plans, Arena& device, cuda::Head* heads);
  static void LayoutWork(const Shape& shape, const Plans& plans, Arena& device, cuda::Head* heads, cuda::Ring* rings);
  static constexpr int32_t kRingExtra = 64 * 32 + 8;  // words beside two records of the largest kind
  int64_t RecordWords(int32_t plan) const { return (parts_.ring_copies[plan].capacity - kRingExtra) / 2; }
  // A cache in device memory of the caller's, for one prompt: no ring progress, and Delete leaves the memory alone.
  static Status Place(const Resolved& resolved, int64_t bytes, void* device_memory, CudaCache** cache);
  static int64_t AlignedBytes(int64_t bytes) { return (bytes + 255) / 256 * 256; }
  // Sends descriptions and initial state, without waiting.
  void InitDevice();

  void Delete() override;
  Status DoSetStream(void* stream) override;
  Status Ingest(const Input& input) override;
  Status DoAttend(int32_t layer, const Queries& queries) const override;
  Status DoWorkspaceSize(int64_t n, size_t* bytes) const override;
  Status DoPrefill(int32_t layer, const Queries& queries, const Input& input, const Workspace& workspace) override;
  Status ExecuteOperations(int32_t plan) override;
  Status ExportHead(int32_t head, const Array& k, const Array& v, const Array* log_weight,
                    const Array* position) const override;
  size_t StagingBytes() const override;
  Status OpenHead(int32_t head, bool read, void* staging, HeadArrays* arrays) const override;
  Status StoreHead(int32_t head, const HeadArrays& arrays) override;
  Status FinishLoad() override;
  Status CopyHeads(const Cache& from) override;
  Status ResetData() override;
  // cuda_observed.cc
  Status CloseObservation() override;
  Status AwaitObservation() override;
  Status FetchObserved() const override;
  Status StoreObserved() override;
  bool ObservationKnown() const override;
  Status BeginCopy() override;
  bool CanResize() const override;
  bool ResizeFits() const override;
  Status SplitPlans() override;
  Status GiveUpAndCompact() override;
  Status FinishResize() override;
  Shape ShapeOf(const plan::Setting* settings) const;  // with the leaders that come next
  void LayoutRings(cuda::Uploader& uploader);
  int64_t GiveUpSome(int32_t plan);
  void ExecuteForAll(cuda::Uploader& uploader);
  void MoveArrays(const Arena::Piece* from, const Arena::Piece* to, int64_t count);
  void ObserveQueries(const Cache* const* caches, int32_t layer, const cuda::AttendArgs& attend) const;
  void ObservePrompt(int32_t layer, const Queries& queries, const Input& input, const cuda::Rows& k) const;
  Status PrefillPart(int32_t layer, const Queries& queries, const Input& input, void* workspace);
  static Status CompressCodes(CudaCache* cache, Input input, void* workspace, const OneShotOutput& out);
  int64_t MostBudget() const;
  const plan::Setting* largest() const { return budgets_.observed != nullptr ? &largest_ : nullptr; }

  Status DoStepPrepare(int64_t n) override;
  Status DoStepCancel() override;
  Status CheckSettled() const override;
  int64_t LayerTokens(int32_t layer) const override;
  Status DoAppendBatch(Cache* const* caches, int64_t count, const Input& input) override;
  Status DoAttendBatch(const Cache* const* caches, int64_t count, int32_t layer, const Queries& queries) const override;

  // cuda_step.cc
  bool Capturing() const;
  int64_t Pending(int32_t plan) const;  // records written and, as far as the host knows, not taken up
  bool AllLayersEven() const;
  bool HasRoom(int32_t plan) const;  // for any one record more
  // plans_.operations, as the next record; true if there is a halving among them.
  bool WriteRecord(int32_t plan, cuda::Uploader& uploader, int32_t flags = 0);
  bool PlanToken(int32_t plan, cuda::Uploader& uploader);  // the same
  // Whether all but the write of a token may run ahead of it, halvings first, for all layers in one launch each: under the schedule
  // of rounds a list can contain the token that fills it.
  bool Hoistable() const { return config_.schedule == Schedule::kBudget; }
  // Plans the layer's next token, and that of all layers if a step begins; what of all layers is to be launched ahead.
  enum class Ahead { kNothing, kAdmissions, kHalvingsToo };
  Ahead PlanStep(int32_t layer, cuda::Uploader& uploader);
  cuda::Part TakeStep(int32_t layer);  // the planned token is about to be executed: which part is left of it
  void MarkLaunched(int32_t layer, int64_t steps);
  Status Settle();  // before a call that plans
  void CopyHeads(int32_t layer, int32_t index, cuda::ExecuteArgs* args) const;
  Status IngestLayer(const Input& input, int32_t layer);
  Status IngestCaptured(const Input& input);
  cuda::ExecuteArgs Arguments(const Input& input, int32_t layer) const;
  cuda::Rows RowsOf(const Input& input, const Array& array, int32_t layer) const;
  Status CheckUnderflow() const;
  Status TakeBack(int64_t last_steps);
  Status CheckOneStream(const Cache* const* caches, int64_t count) const;
  Status AttendCaches(const Cache* const* caches, int64_t count, int32_t layer, const Queries& queries,
                      int64_t tokens) const;
  Status Launched(const char* what) const;
  Status BreakOn(const Status& status);
  // cuda_save.cc
  template <class Body>
  Status ForEachArray(int32_t head, const HeadArrays& arrays, const Body& body) const;
  cuda::HalveParams Halve() const;
  Scoring DeviceScoring() const;

  CudaParts parts_;
  void* device_memory_;
  int32_t* progress_;  // pinned host memory (plan_capacity, 2), written by the device; null for a one-shot cache
  DeviceTraits traits_;
  cudaStream_t stream_;
  SideStream side_;
  plan::Setting largest_;                    // where budgets are observed: of any head, ever
  cudaEvent_t observed_ = nullptr;           // what was observed is there, on the host
  std::unique_ptr<PromptHost> prompt_host_;  // once there was a prompt
  bool prepared_ = false;                    // plans_saved holds the plans of before the prepared steps
};

}  // namespace express::cache

#endif  // EXPRESS_SRC_CACHE_CUDA_CACHE_H_
