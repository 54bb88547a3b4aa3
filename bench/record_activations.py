#!/usr/bin/env python3
"""Queries, keys and values of the example model on a text, under exact attention, for measurements on what attention really sees.

    python3 bench/record_activations.py OUTPUT.npz [--text ../shared/lm/dev.txt] [--tokens 32768] [--layers 0,3,7] [--kv-heads 0,1] [--compress]

Token 256 comes first, then the bytes of the text (a NUL byte is token 256). OUTPUT holds, for each layer i, q{i} (N, 6, 64), k{i} and v{i}
(N, 2, 64) after RoPE, in bfloat16 as uint16 bits: torch.from_numpy(x.view("int16")).view(torch.bfloat16). With --kv-heads only those, and the
query heads of their groups. The format is described in bench/quality/README.md. NumPy only; 32768 tokens take minutes.
The model is examples/byte_lm/model, which has a text of its own (demo.txt) for where dev.txt is not.
"""
import argparse
import concurrent.futures
import json
import os
import struct

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the threads are ours
import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
MODEL = os.path.join(HERE, "..", "examples", "byte_lm", "model")
TEXT = os.path.join(HERE, "..", "..", "shared", "lm", "dev.txt")


def to_bf16(x):
    """float32 to the bits of bfloat16, to nearest, ties to even (finite values)."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def threads():
    """As many as this process may use (taskset)."""
    return len(os.sched_getaffinity(0))


def parallel(task, items):
    with concurrent.futures.ThreadPoolExecutor(threads()) as pool:
        list(pool.map(task, items))


def exact_attention(q, k, v, query_block=128, key_block=1024):
    """Causal softmax attention in float32, the last query at the last key.

    q: (n, heads, dim)   k, v: (m >= n, kv_heads, dim)   returns (n, heads, dim)
    """
    n, heads, dim = q.shape
    m, kv_heads, group = len(k), k.shape[1], heads // k.shape[1]
    scale = np.float32(1 / np.sqrt(dim))
    out = np.empty((n, heads, v.shape[2]), np.float32)
    keys, values = (np.ascontiguousarray(x.transpose(1, 0, 2)) for x in (k, v))  # (kv_heads, m, dim)

    def block(task):
        g, s = task
        e = min(n, s + query_block)
        rows = np.ascontiguousarray(q[s:e, g * group:(g + 1) * group].transpose(1, 0, 2)).reshape(-1, dim) * scale
        position = np.tile(np.arange(s, e) + (m - n), group)
        top = np.full((len(rows), 1), -np.inf, np.float32)
        total, weighted = np.zeros((len(rows), 1), np.float32), np.zeros((len(rows), v.shape[2]), np.float32)
        for a in range(0, m - n + e, key_block):  # softmax over blocks of keys, rescaled as the maximum grows
            b = min(m - n + e, a + key_block)
            logits = rows @ keys[g, a:b].T
            if b > m - n + s + 1:
                logits[np.arange(a, b)[None] > position[:, None]] = -np.inf
            new_top = np.maximum(top, logits.max(1, keepdims=True))
            logits -= new_top
            np.exp(logits, out=logits)
            shrink = np.exp(top - new_top)
            total = total * shrink + logits.sum(1, keepdims=True)
            weighted = weighted * shrink + logits @ values[g, a:b]
            top = new_top
        out[s:e, g * group:(g + 1) * group] = (weighted / total).reshape(group, e - s, -1).transpose(1, 0, 2)

    # The longest first, so that the threads end together.
    parallel(block, [(g, s) for s in reversed(range(0, n, query_block)) for g in range(kv_heads)])
    return out


def load_safetensors(path):
    blob = open(path, "rb").read()
    size = struct.unpack("<Q", blob[:8])[0]
    tensors = {}
    for name, entry in json.loads(blob[8:8 + size]).items():
        if name != "__metadata__":
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            tensors[name] = from_bf16(np.frombuffer(blob[begin:end], "<u2")).reshape(entry["shape"])
    return tensors


def rmsnorm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True, dtype=np.float32) + np.float32(eps)) * weight


def rope(x, cos, sin):
    """x: (tokens, heads, dim); pairs are (i, i + dim / 2)."""
    a, b = np.split(x, 2, -1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def encode(text):
    return np.array([256] + [256 if byte == 0 else byte for byte in text])


def forward(model, ids, record, last_layer, chunk=2048):
    """Calls record(layer, q, k, v) with float32 activations of every layer up to last_layer; returns the final residual stream."""
    config = json.load(open(os.path.join(model, "config.json")))
    tensors = load_safetensors(os.path.join(model, "model.safetensors"))
    heads, kv_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    n, eps = len(ids), config["rms_norm_eps"]
    angle = np.outer(np.arange(n), 1.0 / config["rope_theta"] ** (np.arange(0, dim, 2, dtype=np.float64) / dim))
    cos, sin = (f(angle).astype(np.float32)[:, None] for f in (np.cos, np.sin))
    x = tensors["model.embed_tokens.weight"][ids]  # (n, hidden)
    q, k, v = (np.empty((n, h, dim), np.float32) for h in (heads, kv_heads, kv_heads))
    for layer in range(last_layer + 1):
        w = lambda name: tensors[f"model.layers.{layer}.{name}.weight"]

        def project(s):
            e = min(n, s + chunk)
            h = rmsnorm(x[s:e], w("input_layernorm"), eps)
            for to, name, rotate in ((q, "q_proj", True), (k, "k_proj", True), (v, "v_proj", False)):
                y = (h @ w("self_attn." + name).T).reshape(e - s, -1, dim)
                to[s:e] = rope(y, cos[s:e], sin[s:e]) if rotate else y

        def finish(s):
            e = min(n, s + chunk)
            x[s:e] += out[s:e].reshape(e - s, -1) @ w("self_attn.o_proj").T
            h = rmsnorm(x[s:e], w("post_attention_layernorm"), eps)
            gate = h @ w("mlp.gate_proj").T
            x[s:e] += ((gate / (1 + np.exp(-gate))) * (h @ w("mlp.up_proj").T)) @ w("mlp.down_proj").T

        parallel(project, range(0, n, chunk))
        record(layer, q, k, v)
        if layer == last_layer:
            break
        out = exact_attention(q, k, v)
        parallel(finish, range(0, n, chunk))
    return x


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--offset", type=int, default=0, help="begin at this byte")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--layers", default="0,1,2,3,4,5,6,7")
    parser.add_argument("--kv-heads", help="default: all")
    parser.add_argument("--compress", action="store_true")
    options = parser.parse_args()
    with open(os.path.join(options.model, "config.json")) as file:
        config = json.load(file)
    kv_heads = [int(i) for i in options.kv_heads.split(",")] if options.kv_heads else list(range(config["num_key_value_heads"]))
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    heads = {"q": [h * group + i for h in kv_heads for i in range(group)], "k": kv_heads, "v": kv_heads}
    layers = sorted(int(i) for i in options.layers.split(","))
    with open(options.text, "rb") as file:
        file.seek(options.offset)
        ids = encode(file.read(options.tokens - 1))
    arrays = {"layers": np.array(layers), "text": np.array(os.path.basename(options.text)), "offset": np.array(options.offset),
              "kv_heads": np.array(kv_heads), "model_layers": np.array(config["num_hidden_layers"]), "rope_theta": np.array(config["rope_theta"]),
              "scale": np.array(config["head_dim"] ** -0.5)}

    def record(layer, q, k, v):
        print(f"layer {layer}: {len(ids)} tokens", flush=True)
        if layer in layers:
            arrays.update({f"{name}{layer}": to_bf16(x[:, heads[name]]) for name, x in (("q", q), ("k", k), ("v", v))})

    forward(options.model, ids, record, layers[-1])
    (np.savez_compressed if options.compress else np.savez)(options.output, **arrays)


if __name__ == "__main__":
    main()
