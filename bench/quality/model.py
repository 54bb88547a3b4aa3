"""The byte-level language model of examples/byte_lm/model in PyTorch, with its caches under a policy.

    python3 bench/quality/model.py [--model DIR] [--texts DIR]    checks it against reference.json

A Llama-style model (RMSNorm, rotary positions, grouped queries, SwiGLU, tied embeddings), in float32 from bfloat16 weights. Many sequences go
side by side, in chunks of at most CHUNK tokens, every chunk through all layers before the next, as a policy that couples layers needs it.
"""
import argparse
import json
import os
import struct

import torch

from policy import BLOCK, ModelSpec

HERE = os.path.dirname(os.path.abspath(__file__))
MODEL = os.path.join(HERE, "..", "..", "examples", "byte_lm", "model")
CHUNK = 16 * BLOCK
BEGIN = 256  # the token that begins a sequence, and stands for a NUL byte


def load_safetensors(path, device):
    with open(path, "rb") as file:
        blob = bytearray(file.read())
    size = struct.unpack("<Q", blob[:8])[0]
    tensors = {}
    for name, entry in json.loads(blob[8:8 + size]).items():
        if name != "__metadata__":
            if entry["dtype"] != "BF16":
                raise ValueError(f"{path}: {name}: expected BF16, got {entry['dtype']}")
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            flat = torch.frombuffer(blob, dtype=torch.bfloat16, count=(end - begin) // 2, offset=begin)
            tensors[name] = flat.reshape(entry["shape"]).to(device, torch.float32)
    return tensors


def encode(text):
    """Tokens of bytes, after the one that begins a sequence."""
    return [BEGIN] + [byte or BEGIN for byte in text]


def rmsnorm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rope(x, cos, sin):
    """x: (..., n, d), cos and sin (n, d / 2): turns the pairs (i, i + d / 2)."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def rope_angles(begin, end, dim, theta, device):
    """cos and sin (end - begin, dim / 2) of positions, computed in float64."""
    frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
    angle = torch.outer(torch.arange(begin, end, dtype=torch.float64, device=device), frequency)
    return angle.cos().float(), angle.sin().float()


class Model:
    def __init__(self, path=MODEL, device="cpu"):
        with open(os.path.join(path, "config.json")) as file:
            self.config = config = json.load(file)
        self.device = torch.device(device)
        self.tensors = load_safetensors(os.path.join(path, "model.safetensors"), self.device)
        self.layers, self.dim, self.vocab = config["num_hidden_layers"], config["head_dim"], config["vocab_size"]
        self.spec = ModelSpec(self.layers, config["num_attention_heads"], config["num_key_value_heads"], self.dim, self.dim ** -0.5,
                              config["rope_theta"])

    def weight(self, layer, name):
        return self.tensors[f"model.layers.{layer}.{name}.weight"]

    def forward_chunk(self, ids, begin, policy, observe=None):
        """Logits (S, n, vocab) of tokens ids (S, n) at positions begin ..., in float32.

        observe(layer, q, k, v, out), if given, sees what goes into and comes out of the policy.
        """
        S, n = ids.shape
        eps = self.config["rms_norm_eps"]
        cos, sin = rope_angles(begin, begin + n, self.dim, self.config["rope_theta"], self.device)
        x = self.tensors["model.embed_tokens.weight"][ids]  # (S, n, hidden)
        for layer in range(self.layers):
            h = rmsnorm(x, self.weight(layer, "input_layernorm"), eps)
            q, k, v = ((h @ self.weight(layer, f"self_attn.{name}_proj").T).view(S, n, -1, self.dim).transpose(1, 2) for name in "qkv")
            q, k = rope(q, cos, sin), rope(k, cos, sin)  # (S, heads, n, d)
            k, v = (x.contiguous().bfloat16().float() for x in (k, v))  # what a cache stores
            out = policy.extend(layer, q, k, v)
            if observe:
                observe(layer, q, k, v, out)
            x = x + out.transpose(1, 2).reshape(S, n, -1) @ self.weight(layer, "self_attn.o_proj").T
            h = rmsnorm(x, self.weight(layer, "post_attention_layernorm"), eps)
            gate = torch.nn.functional.silu(h @ self.weight(layer, "mlp.gate_proj").T)
            x = x + (gate * (h @ self.weight(layer, "mlp.up_proj").T)) @ self.weight(layer, "mlp.down_proj").T
        return rmsnorm(x, self.tensors["model.norm.weight"], eps) @ self.tensors["model.embed_tokens.weight"].T

    @torch.inference_mode()
    def run(self, ids, policy, see, observe=None):
        """Feeds ids (S, n); see(begin, logits) gets every chunk's logits (S, chunk, vocab)."""
        chunk = min(CHUNK, policy.chunk or CHUNK)
        for begin in range(0, ids.shape[1], chunk):
            see(begin, self.forward_chunk(ids[:, begin:begin + chunk], begin, policy, observe))


def main():
    from rivals.exact import Exact
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--texts", default=MODEL, help="where the files that reference.json names are")
    options = parser.parse_args()
    model, worst = Model(options.model), 0
    with open(os.path.join(options.texts, "reference.json")) as file:
        prompts = json.load(file)["prompts"]
    for prompt in prompts:
        with open(os.path.join(options.texts, prompt["file"]), "rb") as file:
            text = file.read()[prompt["offset"]:prompt["offset"] + prompt["length"]]
        last = {}
        model.run(torch.tensor([encode(text)]), Exact(model.spec, 1, 0), lambda begin, logits: last.update(logits=logits[0, -1]))
        worst = max(worst, (last["logits"][:256] - torch.tensor(prompt["logits_256"])).abs().max().item())
    print(f"{len(prompts)} prompts: largest logit difference {worst:.1e}")
    return worst > 0.05


if __name__ == "__main__":
    raise SystemExit(main())
