"""The byte model of examples/byte_lm/model in PyTorch, S sequences side by side, its attention done by a policy.

A policy answers extend(layer, q, k, v) -> out for consecutive blocks of tokens; it keeps the cache.
q: (S, Hq, n, d)   k, v: (S, Hkv, n, d)   out: (S, Hq, n, d), keys and queries after RoPE.
"""
import json
import os
import struct

import numpy as np
import torch
import torch.nn.functional as F

BLOCK = 64  # a block's queries see the cache at the block's start and the block itself


def load_safetensors(path, device):
    blob = open(path, "rb").read()
    size = struct.unpack("<Q", blob[:8])[0]
    tensors = {}
    for name, entry in json.loads(blob[8:8 + size]).items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        bits = np.frombuffer(blob[8 + size + begin:8 + size + end], "<u2").astype(np.uint32) << 16
        tensors[name] = torch.from_numpy(bits.view(np.float32).reshape(entry["shape"]).copy()).to(device)
    return tensors


def rotate(x, cos, sin):
    """x: (..., n, d); cos, sin: (n, d / 2) or broadcastable; pairs are (i, i + d / 2)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Model:
    def __init__(self, folder, device="cpu"):
        c = json.load(open(os.path.join(folder, "config.json")))
        self.layers, self.q_heads, self.kv_heads = c["num_hidden_layers"], c["num_attention_heads"], c["num_key_value_heads"]
        self.dim, self.eps, self.theta, self.device = c["head_dim"], c["rms_norm_eps"], c["rope_theta"], device
        w = load_safetensors(os.path.join(folder, "model.safetensors"), device)
        self.embed, self.norm = w["model.embed_tokens.weight"], w["model.norm.weight"]
        self.blocks = []
        for i in range(self.layers):
            g = lambda name: w["model.layers.%d.%s.weight" % (i, name)]
            qkv = torch.cat([g("self_attn.q_proj"), g("self_attn.k_proj"), g("self_attn.v_proj")])
            self.blocks.append((g("input_layernorm"), qkv, g("self_attn.o_proj"), g("post_attention_layernorm"),
                                torch.cat([g("mlp.gate_proj"), g("mlp.up_proj")]), g("mlp.down_proj")))
        self.frequency = 1.0 / self.theta ** (torch.arange(0, self.dim, 2, dtype=torch.float64) / self.dim)

    def angles(self, begin, end):
        angle = torch.outer(torch.arange(begin, end, dtype=torch.float64), self.frequency)
        return angle.cos().float().to(self.device), angle.sin().float().to(self.device)

    def normed(self, x, weight):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps) * weight

    def chunk(self, ids, at, policy):
        """ids: (S, n) -> logits (S, n, 320)."""
        S, n = ids.shape
        H, G, d = self.q_heads, self.kv_heads, self.dim
        cos, sin = self.angles(at, at + n)
        x = self.embed[ids]
        for layer, (n1, qkv, o, n2, gate_up, down) in enumerate(self.blocks):
            y = (self.normed(x, n1) @ qkv.T).view(S, n, H + 2 * G, d).transpose(1, 2)  # (S, heads, n, d)
            q, k, v = y[:, :H], y[:, H:H + G], y[:, H + G:]
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            out = torch.cat([policy.extend(layer, q[:, :, s:s + BLOCK], k[:, :, s:s + BLOCK], v[:, :, s:s + BLOCK])
                             for s in range(0, n, BLOCK)], 2)
            x = x + out.transpose(1, 2).reshape(S, n, H * d) @ o.T
            gate, up = (self.normed(x, n2) @ gate_up.T).chunk(2, -1)
            x = x + (F.silu(gate) * up) @ down.T
        return self.normed(x, self.norm) @ self.embed.T


@torch.inference_mode()
def score(model, ids, policy, chunk=512):
    """ids: (S, n + 1). Bits of each byte (S, n) and whether it was the first choice (S, n)."""
    n = ids.shape[1] - 1
    bits, first = [], []
    for at in range(0, n, chunk):
        end = min(n, at + chunk)
        logits = model.chunk(ids[:, at:end], at, policy).float()
        target = ids[:, at + 1:end + 1]
        lse = logits.logsumexp(-1)
        bits.append((lse - logits.gather(-1, target[..., None])[..., 0]) / np.log(2))
        first.append(logits.argmax(-1) == target)
        policy.tick(end)
    return torch.cat(bits, 1).cpu(), torch.cat(first, 1).cpu()
