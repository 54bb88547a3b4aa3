// express_kv._core: the C ABI for Python, one to one. Arrays come and go by DLPack and the buffer protocol, without copies. Every call
// runs without the GIL; calls that change a cache have it to themselves, so that threads cannot do harm.
#include <express.h>
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <string>
#include <utility>
#include <vector>

namespace nb = nanobind;

namespace {

constexpr size_t kMostDims = 4;

// Raises express_kv.Error, or the subclass that fits the status.
[[noreturn]] void Raise(express_status status, const std::string& message) {
  const nb::object error =
      nb::module_::import_("express_kv._errors").attr("make_error")(static_cast<int>(status), message);
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
  throw nb::python_error();
}

// call() without the GIL; the message of a failure belongs to this thread.
template <class Call>
void Run(const Call& call) {
  express_status status = EXPRESS_STATUS_OK;
  std::string message;
  {
    const nb::gil_scoped_release release;
    status = call();
    if (status != EXPRESS_STATUS_OK) message = express_last_error();
  }
  if (status != EXPRESS_STATUS_OK) Raise(status, message);
}

using In = nb::ndarray<nb::ro>;
using Out = nb::ndarray<>;

// An array as the C ABI sees it. Lives as long as the array.
class View {
 public:
  template <class Array>
  View(const char* name, const Array& array) {
    tensor_.data = const_cast<void*>(static_cast<const void*>(array.data()));
    tensor_.device_type = array.device_type();
    tensor_.device_id = tensor_.device_type == EXPRESS_DEVICE_CPU ? 0 : array.device_id();
    tensor_.dtype = TypeOf(name, array.dtype());
    if (array.ndim() > kMostDims)
      Raise(EXPRESS_STATUS_SHAPE_MISMATCH,
            std::string(name) + ".ndim: expected at most 4, got " + std::to_string(array.ndim()));
    tensor_.ndim = static_cast<int32_t>(array.ndim());
    for (size_t i = 0; i < array.ndim(); ++i) {
      shape_[i] = static_cast<int64_t>(array.shape(i));
      strides_[i] = array.stride(i);
    }
    tensor_.shape = shape_;
    tensor_.strides = strides_;
  }
  View(const View&) = delete;
  View& operator=(const View&) = delete;
  const express_tensor* get() const { return &tensor_; }

 private:
  static int32_t TypeOf(const char* name, nb::dlpack::dtype type) {
    using Code = nb::dlpack::dtype_code;
    const auto is = [&](Code code, int bits) {
      return type.code == static_cast<uint8_t>(code) && type.bits == bits && type.lanes == 1;
    };
    if (is(Code::Float, 32)) return EXPRESS_DTYPE_F32;
    if (is(Code::Float, 16)) return EXPRESS_DTYPE_F16;
    if (is(Code::Bfloat, 16)) return EXPRESS_DTYPE_BF16;
    if (is(Code::Int, 64)) return EXPRESS_DTYPE_I64;
    Raise(EXPRESS_STATUS_DTYPE_MISMATCH, std::string(name) + ".dtype: expected float32, float16, bfloat16 or int64");
  }

  express_tensor tensor_{};
  int64_t shape_[kMostDims] = {}, strides_[kMostDims] = {};
};

// An argument that may be None.
template <class Array>
class OptionalView {
 public:
  OptionalView(const char* name, const std::optional<Array>& array) {
    if (array) view_.emplace(name, *array);
  }
  const express_tensor* get() const { return view_ ? view_->get() : nullptr; }

 private:
  std::optional<View> view_;
};

// A config from keyword arguments; it refers to the arrays, so it is used at once.
class ConfigOf {
 public:
  explicit ConfigOf(const nb::dict& fields) {
    for (const auto& [key, value] : fields) Set(nb::cast<std::string>(key), value);
  }
  ConfigOf(const ConfigOf&) = delete;
  ConfigOf& operator=(const ConfigOf&) = delete;
  const express_config* get() const { return &config_; }

 private:
  void Set(const std::string& name, nb::handle value) {
    const auto int32 = [&](int32_t& field) { field = nb::cast<int32_t>(value); };
    const auto int64 = [&](int64_t& field) { field = nb::cast<int64_t>(value); };
    const auto real = [&](double& field) { field = nb::cast<double>(value); };
    express_config& c = config_;
    if (name == "layers") return int32(c.layers);
    if (name == "query_heads") return int32(c.query_heads);
    if (name == "kv_heads") return int32(c.kv_heads);
    if (name == "key_dim") return int32(c.key_dim);
    if (name == "value_dim") return int32(c.value_dim);
    if (name == "scale") return real(c.scale);
    if (name == "dtype") return int32(c.dtype);
    if (name == "device_type") return int32(c.device_type);
    if (name == "device_id") return int32(c.device_id);
    if (name == "first_layer") return int32(c.first_layer);
    if (name == "first_kv_head") return int32(c.first_kv_head);
    if (name == "budget_unit") return int32(c.budget_unit);
    if (name == "budget") return int64(c.budget);
    if (name == "sinks") return int64(c.sinks);
    if (name == "window") return int64(c.window);
    if (name == "protected_entries") return int64(c.protected_entries);
    if (name == "rollback_reserve") return int64(c.rollback_reserve);
    if (name == "head_share") {
      head_share_ = nb::cast<std::vector<float>>(value);
      c.head_share = head_share_.data();
      c.head_share_count = static_cast<int64_t>(head_share_.size());
      return;
    }
    if (name == "rope_frequencies") {
      rope_frequencies_ = nb::cast<std::vector<float>>(value);
      c.rope_frequencies = rope_frequencies_.data();
      c.rope_frequency_count = static_cast<int64_t>(rope_frequencies_.size());
      return;
    }
    if (name == "head_settings") {
      for (const auto& row : nb::cast<std::vector<std::vector<int64_t>>>(value)) {
        if (row.size() != 4)
          throw nb::value_error("head_settings: expected (budget, sinks, window, protected_entries)");
        head_settings_.push_back({row[0], row[1], row[2], row[3]});
      }
      c.head_settings = head_settings_.data();
      c.head_settings_count = static_cast<int64_t>(head_settings_.size());
      return;
    }
    if (name == "schedule") return int32(c.schedule);
    if (name == "halving") return int32(c.halving);
    if (name == "weight_exponent") return real(c.weight_exponent);
    if (name == "gamma") return real(c.gamma);
    if (name == "tau") return real(c.tau);
    if (name == "delta") return real(c.delta);
    if (name == "level_fraction") return real(c.level_fraction);
    if (name == "level_floor") return int64(c.level_floor);
    if (name == "max_levels") return int64(c.max_levels);
    if (name == "seed") {
      c.seed = nb::cast<uint64_t>(value);
      return;
    }
    if (name == "prefill_block") return int32(c.prefill_block);
    if (name == "auto_compress") return int32(c.auto_compress);
    if (name == "validate") return int32(c.validate);
    if (name == "threads") return int32(c.threads);
    if (name == "head_budgets") return int32(c.head_budgets);
    if (name == "protection_score") return int32(c.protection_score);
    if (name == "rope_layout") return int32(c.rope_layout);
    if (name == "stream") {
      c.stream = reinterpret_cast<void*>(nb::cast<uintptr_t>(value));
      return;
    }
    throw nb::type_error(("config has no field " + name).c_str());
  }

  express_config config_ = EXPRESS_CONFIG_INIT;
  std::vector<float> head_share_, rope_frequencies_;
  std::vector<express_head_setting> head_settings_;
};

class Cache {
 public:
  explicit Cache(const nb::dict& fields) {
    const ConfigOf config(fields);
    Run([&] { return express_create(config.get(), &cache_); });
  }
  ~Cache() { express_destroy(&cache_); }
  Cache(const Cache&) = delete;
  Cache& operator=(const Cache&) = delete;

  void Close() {
    const nb::gil_scoped_release release;
    const std::unique_lock lock(mutex_);
    express_destroy(&cache_);
  }
  bool closed() const { return cache_ == nullptr; }

  // call(cache) while nobody changes it, and while nobody else is at it. A closed cache is refused by the library: it is NULL.
  template <class Call>
  void Look(const Call& call) const {
    Run([&] {
      const std::shared_lock lock(mutex_);
      return call(static_cast<const express_cache*>(cache_));
    });
  }
  template <class Call>
  void Change(const Call& call) {
    Run([&] {
      const std::unique_lock lock(mutex_);
      return call(cache_);
    });
  }

  express_cache* get() const { return cache_; }
  std::shared_mutex& mutex() const { return mutex_; }

 private:
  express_cache* cache_ = nullptr;
  mutable std::shared_mutex mutex_;
};

// All of a batch, locked in the order of their addresses.
template <class Lock>
class Batch {
 public:
  explicit Batch(const std::vector<Cache*>& caches) {
    for (const Cache* cache : caches)
      if (cache == nullptr) throw nb::type_error("caches: expected caches, got None");
    std::vector<Cache*> order = caches;
    std::sort(order.begin(), order.end());
    order.erase(std::unique(order.begin(), order.end()), order.end());
    order_ = std::move(order);
    caches_ = caches;
  }
  std::vector<express_cache*> Take() {
    for (const Cache* cache : order_) locks_.emplace_back(cache->mutex());
    std::vector<express_cache*> handles;
    for (const Cache* cache : caches_) handles.push_back(cache->get());
    return handles;
  }

 private:
  std::vector<Cache*> order_, caches_;
  std::vector<Lock> locks_;
};

nb::dict StatsOf(const Cache& cache, int32_t layer) {
  express_stats s = EXPRESS_STATS_INIT;
  cache.Look([&](const express_cache* c) { return express_get_stats(c, layer, &s); });
  nb::dict all;
  const std::pair<const char*, int64_t> counts[] = {{"tokens", s.tokens},
                                                    {"entries", s.entries},
                                                    {"entries_peak", s.entries_peak},
                                                    {"entries_budget", s.entries_budget},
                                                    {"min_weight", s.min_weight},
                                                    {"max_weight", s.max_weight},
                                                    {"halvings", s.halvings},
                                                    {"bytes", s.bytes},
                                                    {"bytes_peak", s.bytes_peak}};
  for (const auto& [name, count] : counts) all[name] = count;
  all["compress_seconds"] = s.compress_seconds;
  all["head_budgets"] = s.head_budgets;
  return all;
}

}  // namespace

NB_MODULE(_core, m) {
  m.doc() = "The C ABI of Express, one to one; use express_kv instead.";
  nb::class_<Cache>(m, "Cache")
      .def(nb::init<const nb::dict&>(), nb::arg("fields"))
      .def("close", &Cache::Close)
      .def_prop_ro("closed", &Cache::closed)
      .def(
          "append",
          [](Cache& cache, int32_t layer, const In& k, const In& v) {
            const View tk("k", k), tv("v", v);
            cache.Change([&](express_cache* c) { return express_append(c, layer, tk.get(), tv.get()); });
          },
          nb::arg("layer"), nb::arg("k"), nb::arg("v"))
      .def(
          "append_all",
          [](Cache& cache, const In& k, const In& v) {
            const View tk("k", k), tv("v", v);
            cache.Change([&](express_cache* c) { return express_append_all(c, tk.get(), tv.get()); });
          },
          nb::arg("k"), nb::arg("v"))
      .def(
          "attend",
          [](const Cache& cache, int32_t layer, const In& q, const Out& out, const std::optional<Out>& lse) {
            const View tq("q", q), to("out", out);
            const OptionalView<Out> tl("lse", lse);
            cache.Look([&](const express_cache* c) { return express_attend(c, layer, tq.get(), to.get(), tl.get()); });
          },
          nb::arg("layer"), nb::arg("q"), nb::arg("out"), nb::arg("lse").none())
      .def(
          "workspace_size",
          [](const Cache& cache, int64_t n) {
            size_t bytes = 0;
            cache.Look([&](const express_cache* c) { return express_workspace_size(c, n, &bytes); });
            return bytes;
          },
          nb::arg("n"))
      .def(
          "prefill",
          [](Cache& cache, int32_t layer, const In& q, const In& k, const In& v, const Out& out,
             const std::optional<Out>& lse, const std::optional<nb::ndarray<uint8_t>>& workspace) {
            const View tq("q", q), tk("k", k), tv("v", v), to("out", out);
            const OptionalView<Out> tl("lse", lse);
            express_workspace scratch = {nullptr, 0};
            if (workspace) scratch = {workspace->data(), workspace->size()};
            cache.Change([&](express_cache* c) {
              return express_prefill(c, layer, tq.get(), tk.get(), tv.get(), to.get(), tl.get(), &scratch);
            });
          },
          nb::arg("layer"), nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("out"), nb::arg("lse").none(),
          nb::arg("workspace").none())
      .def(
          "compress",
          [](Cache& cache, int32_t layer, int64_t tokens) {
            int64_t achieved = 0;
            cache.Change([&](express_cache* c) { return express_compress(c, layer, tokens, &achieved); });
            return achieved;
          },
          nb::arg("layer"), nb::arg("tokens"))
      .def(
          "rollback",
          [](Cache& cache, int64_t tokens) {
            cache.Change([&](express_cache* c) { return express_rollback(c, tokens); });
          },
          nb::arg("tokens"))
      .def("rollback_available",
           [](const Cache& cache) {
             int64_t tokens = 0;
             cache.Look([&](const express_cache* c) { return express_rollback_available(c, &tokens); });
             return tokens;
           })
      .def(
          "entries",
          [](const Cache& cache, int32_t layer, int32_t kv_head) {
            int64_t count = 0;
            cache.Look([&](const express_cache* c) { return express_entries(c, layer, kv_head, &count); });
            return count;
          },
          nb::arg("layer"), nb::arg("kv_head"))
      .def(
          "export",
          [](const Cache& cache, int32_t layer, int32_t kv_head, const Out& k, const Out& v,
             const std::optional<Out>& log_weight, const std::optional<Out>& position) {
            const View tk("k", k), tv("v", v);
            const OptionalView<Out> tw("log_weight", log_weight), tp("position", position);
            int64_t count = 0;
            cache.Look([&](const express_cache* c) {
              return express_export(c, layer, kv_head, tk.get(), tv.get(), tw.get(), tp.get(), &count);
            });
            return count;
          },
          nb::arg("layer"), nb::arg("kv_head"), nb::arg("k"), nb::arg("v"), nb::arg("log_weight").none(),
          nb::arg("position").none())
      .def("reset", [](Cache& cache) { cache.Change([](express_cache* c) { return express_reset(c); }); })
      .def("stats", &StatsOf, nb::arg("layer"))
      .def("bytes",
           [](const Cache& cache) {
             int64_t bytes = 0;
             cache.Look([&](const express_cache* c) { return express_bytes(c, &bytes); });
             return bytes;
           })
      .def("save",
           [](const Cache& cache) {
             size_t bytes = 0;
             cache.Look([&](const express_cache* c) { return express_save_size(c, &bytes); });
             nb::object data = nb::steal(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(bytes)));
             if (!data.is_valid()) throw nb::python_error();
             char* to = PyBytes_AsString(data.ptr());  // nobody else has seen it yet
             cache.Look([&](const express_cache* c) { return express_save(c, to, bytes); });
             return nb::borrow<nb::bytes>(data);
           })
      .def(
          "load",
          [](Cache& cache, const nb::bytes& data) {
            cache.Change([&](express_cache* c) { return express_load(c, data.c_str(), data.size()); });
          },
          nb::arg("data"))
      .def(
          "copy",
          [](Cache& cache, const Cache& from) {
            if (&cache == &from) return;
            Run([&] {
              std::unique_lock own(cache.mutex(), std::defer_lock);
              std::shared_lock other(from.mutex(), std::defer_lock);
              std::lock(own, other);
              return express_copy(cache.get(), from.get());
            });
          },
          nb::arg("from_"))
      .def(
          "set_stream",
          [](Cache& cache, uintptr_t stream) {
            cache.Change([&](express_cache* c) { return express_set_stream(c, reinterpret_cast<void*>(stream)); });
          },
          nb::arg("stream"))
      .def(
          "step_prepare",
          [](Cache& cache, int64_t n) { cache.Change([&](express_cache* c) { return express_step_prepare(c, n); }); },
          nb::arg("n"))
      .def("step_cancel", [](Cache& cache) { cache.Change([](express_cache* c) { return express_step_cancel(c); }); });

  m.def(
      "append_batch",
      [](const std::vector<Cache*>& caches, int32_t layer, const In& k, const In& v) {
        const View tk("k", k), tv("v", v);
        Batch<std::unique_lock<std::shared_mutex>> batch(caches);
        Run([&] {
          const std::vector<express_cache*> handles = batch.Take();
          return express_append_batch(handles.data(), static_cast<int64_t>(handles.size()), layer, tk.get(), tv.get());
        });
      },
      nb::arg("caches"), nb::arg("layer"), nb::arg("k"), nb::arg("v"));
  m.def(
      "attend_batch",
      [](const std::vector<Cache*>& caches, int32_t layer, const In& q, const Out& out, const std::optional<Out>& lse) {
        const View tq("q", q), to("out", out);
        const OptionalView<Out> tl("lse", lse);
        Batch<std::shared_lock<std::shared_mutex>> batch(caches);
        Run([&] {
          const std::vector<express_cache*> handles = batch.Take();
          const std::vector<const express_cache*> constant(handles.begin(), handles.end());
          return express_attend_batch(constant.data(), static_cast<int64_t>(constant.size()), layer, tq.get(), to.get(),
                                      tl.get());
        });
      },
      nb::arg("caches"), nb::arg("layer"), nb::arg("q"), nb::arg("out"), nb::arg("lse").none());
  m.def(
      "size",
      [](const nb::dict& fields) {
        const ConfigOf config(fields);
        int64_t bytes = 0, entries = 0;
        Run([&] { return express_size(config.get(), &bytes, &entries); });
        return std::pair(bytes, entries);
      },
      nb::arg("fields"));
  m.def(
      "compress_kv_workspace",
      [](const nb::dict& fields) {
        const ConfigOf config(fields);
        size_t bytes = 0;
        Run([&] { return express_compress_kv_workspace(config.get(), &bytes); });
        return bytes;
      },
      nb::arg("fields"));
  m.def(
      "compress_kv",
      [](const nb::dict& fields, const In& k, const In& v, const Out& out_k, const Out& out_v, const Out& log_weight,
         const std::optional<Out>& position, const nb::ndarray<uint8_t>& workspace) {
        const ConfigOf config(fields);
        const View tk("k", k), tv("v", v), ok("out_k", out_k), ov("out_v", out_v), ow("log_weight", log_weight);
        const OptionalView<Out> op("position", position);
        const express_workspace scratch = {workspace.data(), workspace.size()};
        int64_t count = 0;
        Run([&] {
          return express_compress_kv(config.get(), tk.get(), tv.get(), ok.get(), ov.get(), ow.get(), op.get(), &count,
                                     &scratch);
        });
        return count;
      },
      nb::arg("fields"), nb::arg("k"), nb::arg("v"), nb::arg("out_k"), nb::arg("out_v"), nb::arg("log_weight"),
      nb::arg("position").none(), nb::arg("workspace"));
  m.def(
      "status_name", [](int status) { return std::string(express_status_name(static_cast<express_status>(status))); },
      nb::arg("status"));
  m.def("version", [] { return std::string(express_version_string()); });
}
