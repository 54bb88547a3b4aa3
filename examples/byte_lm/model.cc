#include "model.h"

#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <stdexcept>

namespace {

using nlohmann::json;

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

// A .safetensors file of bfloat16 tensors: 8 bytes of header length, a JSON header, the data.
class SafeTensors {
 public:
  explicit SafeTensors(const std::string& path) : path_(path), blob_(ReadFile(path)) {
    uint64_t length = 0;
    if (blob_.size() < 8) throw std::runtime_error(path + ": too short");
    std::memcpy(&length, blob_.data(), 8);
    if (length > blob_.size() - 8) throw std::runtime_error(path + ": the header is longer than the file");
    header_ = json::parse(blob_.begin() + 8, blob_.begin() + 8 + static_cast<int64_t>(length));
    data_ = blob_.data() + 8 + length;
    size_ = blob_.size() - 8 - length;
  }
  const uint16_t* Get(const std::string& name, const std::vector<int64_t>& shape) const {
    if (!header_.contains(name)) throw std::runtime_error(path_ + ": no tensor " + name);
    const json& entry = header_[name];
    if (entry["dtype"] != "BF16" || entry["shape"].get<std::vector<int64_t>>() != shape)
      throw std::runtime_error(path_ + ": " + name + " is not bfloat16 of the shape that config.json says");
    const auto begin = entry["data_offsets"][0].get<uint64_t>(), end = entry["data_offsets"][1].get<uint64_t>();
    uint64_t bytes = 2;
    for (const int64_t dim : shape) bytes *= static_cast<uint64_t>(dim);
    if (end > size_ || begin > end || end - begin != bytes)
      throw std::runtime_error(path_ + ": " + name + " lies outside the file");
    return reinterpret_cast<const uint16_t*>(data_ + begin);
  }
  std::vector<float> Floats(const std::string& name, int64_t count) const {
    const uint16_t* bits = Get(name, {count});
    std::vector<float> values(static_cast<size_t>(count));
    for (size_t i = 0; i < values.size(); ++i) {
      const uint32_t word = static_cast<uint32_t>(bits[i]) << 16;
      std::memcpy(&values[i], &word, 4);
    }
    return values;
  }
  Linear Matrix(const std::string& name, int64_t outputs, int64_t inputs) const {
    return Linear(Get(name, {outputs, inputs}), outputs, inputs);
  }

 private:
  std::string path_, blob_;
  json header_;
  const char* data_;
  uint64_t size_;
};

ModelConfig ReadConfig(const std::string& path) {
  const json c = json::parse(ReadFile(path));
  ModelConfig m{c.at("num_hidden_layers"),
                c.at("hidden_size"),
                c.at("num_attention_heads"),
                c.at("num_key_value_heads"),
                c.at("head_dim"),
                c.at("intermediate_size"),
                c.at("vocab_size"),
                c.at("max_position_embeddings"),
                c.at("rms_norm_eps"),
                c.at("rope_theta")};
  if (m.layers < 1 || m.kv_heads < 1 || m.heads % m.kv_heads != 0)
    throw std::runtime_error(path + ": num_attention_heads must be a multiple of num_key_value_heads");
  for (const int64_t dim : {m.hidden, m.heads * m.head_dim, m.kv_heads * m.head_dim, m.intermediate, m.vocab})
    if (dim <= 0 || dim % 32 != 0) throw std::runtime_error(path + ": every dimension must be a multiple of 32");
  return m;
}

}  // namespace

Model::Model(const std::string& folder) : config_(ReadConfig(folder + "/config.json")) {
  const SafeTensors file(folder + "/model.safetensors");
  const ModelConfig& c = config_;
  const int64_t q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim;
  embedding_ = file.Matrix("model.embed_tokens.weight", c.vocab, c.hidden);
  final_norm_ = file.Floats("model.norm.weight", c.hidden);
  for (int64_t i = 0; i < c.layers; ++i) {
    const std::string p = "model.layers." + std::to_string(i) + ".";
    Layer layer;
    layer.attention_norm = file.Floats(p + "input_layernorm.weight", c.hidden);
    layer.mlp_norm = file.Floats(p + "post_attention_layernorm.weight", c.hidden);
    layer.q = file.Matrix(p + "self_attn.q_proj.weight", q, c.hidden);
    layer.k = file.Matrix(p + "self_attn.k_proj.weight", kv, c.hidden);
    layer.v = file.Matrix(p + "self_attn.v_proj.weight", kv, c.hidden);
    layer.o = file.Matrix(p + "self_attn.o_proj.weight", c.hidden, q);
    layer.gate = file.Matrix(p + "mlp.gate_proj.weight", c.intermediate, c.hidden);
    layer.up = file.Matrix(p + "mlp.up_proj.weight", c.intermediate, c.hidden);
    layer.down = file.Matrix(p + "mlp.down_proj.weight", c.hidden, c.intermediate);
    layers_.push_back(std::move(layer));
  }
}

void Model::Forward(const int32_t* tokens, int64_t n, int64_t position, KvCache& kv, std::vector<float>& logits) {
  const ModelConfig& c = config_;
  const auto size = [&](int64_t width) { return static_cast<size_t>(n * width); };
  x_.resize(size(c.hidden));
  h_.resize(size(c.hidden));
  q_.resize(size(c.heads * c.head_dim));
  a_.resize(size(c.heads * c.head_dim));
  k_.resize(size(c.kv_heads * c.head_dim));
  v_.resize(size(c.kv_heads * c.head_dim));
  gate_.resize(size(c.intermediate));
  up_.resize(size(c.intermediate));
  const int64_t half = c.head_dim / 2;
  cosine_.resize(size(half));
  sine_.resize(size(half));
  for (int64_t t = 0; t < n; ++t) {
    embedding_.Row(tokens[t], x_.data() + t * c.hidden);
    for (int64_t i = 0; i < half; ++i) {
      const double angle =
          static_cast<double>(position + t) /
          std::pow(static_cast<double>(c.theta), 2.0 * static_cast<double>(i) / static_cast<double>(c.head_dim));
      cosine_[static_cast<size_t>(t * half + i)] = static_cast<float>(std::cos(angle));
      sine_[static_cast<size_t>(t * half + i)] = static_cast<float>(std::sin(angle));
    }
  }
  for (int64_t i = 0; i < c.layers; ++i) {
    Attention(layers_[static_cast<size_t>(i)], i, n, kv);
    Mlp(layers_[static_cast<size_t>(i)], n);
  }
  RmsNorm(x_.data(), final_norm_.data(), n, c.hidden, c.eps, h_.data());
  logits.resize(size(c.vocab));
  embedding_.Apply(h_.data(), n, logits.data());
}

void Model::Attention(const Layer& layer, int64_t index, int64_t n, KvCache& kv) {
  const ModelConfig& c = config_;
  RmsNorm(x_.data(), layer.attention_norm.data(), n, c.hidden, c.eps, h_.data());
  layer.q.Apply(h_.data(), n, q_.data());
  layer.k.Apply(h_.data(), n, k_.data());
  layer.v.Apply(h_.data(), n, v_.data());
  Rope(q_.data(), n, c.heads, c.head_dim, cosine_.data(), sine_.data());
  Rope(k_.data(), n, c.kv_heads, c.head_dim, cosine_.data(), sine_.data());
  kv.Attend(index, n, q_.data(), k_.data(), v_.data(), a_.data());
  layer.o.Apply(a_.data(), n, h_.data());
  for (size_t i = 0; i < x_.size(); ++i) x_[i] += h_[i];
}

void Model::Mlp(const Layer& layer, int64_t n) {
  RmsNorm(x_.data(), layer.mlp_norm.data(), n, config_.hidden, config_.eps, h_.data());
  layer.gate.Apply(h_.data(), n, gate_.data());
  layer.up.Apply(h_.data(), n, up_.data());
  SwiGlu(gate_.data(), up_.data(), n * config_.intermediate);
  layer.down.Apply(gate_.data(), n, h_.data());
  for (size_t i = 0; i < x_.size(); ++i) x_[i] += h_[i];
}
