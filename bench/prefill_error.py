#!/usr/bin/env python3
"""Relative output error of Express's causal prefill against exact attention, on recorded activations and on random data.

    python3 bench/record_activations.py build/activations.npz
    python3 bench/prefill_error.py --library build/release/libexpress.so --activations build/activations.npz [--out bench/results]

Writes prefill_error.json and prints its tables as Markdown. The error is ||out - exact||_F / ||exact||_F over all query rows of a layer;
exact is float32 attention over the same bfloat16 inputs; Express takes and returns bfloat16, stores bfloat16 and is default but for budget,
block and seed. Rivals hold as many entries per KV head, with the same sinks (and but for `window`, the same window):

    express       the default
    coin          the default with a fair coin per pair in place of kernel halving
    uniform       uniform sampling: fair coins, nothing protected (those entries go to the sample), weight exponent 1
    uniform, 0.5  the same with Express's default weight exponent (what express-lm calls uniform)
    window        the first tokens and the last ones, nothing else
    rounding      exact attention rounded to bfloat16: the floor

With "by far mass", heads have different budgets (examples/byte_lm/model/profile.json, head_share = far mass squared) and the model as a whole as
many entries as without.

A prefix of a prefill is the prefill of the prefix, so one run at the largest n gives all n. NumPy and the CPU backend: a CUDA cache keeps the
same entries.
"""
import argparse
import ctypes as C
import datetime
import json
import os
import statistics
import sys

import record_activations as activations
import numpy as np
from express_abi import BF16, COIN, Express

LENGTHS = (2048, 8192, 16384, 32768)
BUDGETS = (512, 1024, 2048)
SEEDS = (0, 1, 2)
RIVALS = {
    "express": {},
    "coin": {"halving": COIN},
    "uniform": {"halving": COIN, "protected_entries": 0, "weight_exponent": 1.0},
    "uniform, 0.5": {"halving": COIN, "protected_entries": 0},
}
BY_FAR_MASS = ", by far mass"
SINKS = 4  # the default
PROFILE = os.path.join(activations.MODEL, "profile.json")


class NumpyBackend:
    """Arrays are bfloat16 bits (uint16)."""

    device = {}  # fields of the config

    def load(self, bits):
        return np.ascontiguousarray(bits)

    def random(self, n, heads, dim, seed):
        return activations.to_bf16(np.random.default_rng(seed).standard_normal((n, heads, dim), np.float32))

    def empty_like(self, q):
        return np.full_like(q, 0x7FC0)  # NaN

    def scratch(self, size):
        return np.empty(size, np.uint8) if size else None

    def exact(self, q, k, v):
        """float32 causal attention, the last query at the last key: q (n, ...), k and v (m >= n, ...)."""
        return activations.exact_attention(*(activations.from_bf16(x) for x in (q, k, v)))

    def concatenate(self, parts, axis=0):
        return np.concatenate(parts, axis)

    def references(self, q, k, v, exact):
        """What rivals that are exact give: name, out."""
        yield "rounding", activations.to_bf16(exact)

    def squares(self, x):
        """Sum of squares of every token's row, in float64: x (n, heads, dim)."""
        x = activations.from_bf16(x) if x.dtype == np.uint16 else x
        return np.square(x, dtype=np.float64).sum((1, 2))

    def difference_squares(self, out, exact):
        out = activations.from_bf16(out) if out.dtype == np.uint16 else out
        return self.squares(out - exact)


def window_attention(backend, q, k, v, budgets, block):
    """Per KV head the sinks and the last tokens, budgets[g] entries when a block begins, and the block itself: the causality of
    express_prefill."""
    group, parts = q.shape[1] // k.shape[1], []
    for s in range(0, len(q), block):
        e, heads = min(len(q), s + block), []
        for g, budget in enumerate(budgets):
            a = s - (budget - SINKS)
            keys, values = (x[:e, g:g + 1] if a <= SINKS else backend.concatenate([x[:SINKS, g:g + 1], x[a:e, g:g + 1]]) for x in (k, v))
            heads.append(backend.exact(q[s:e, g * group:(g + 1) * group], keys, values))
        parts.append(backend.concatenate(heads, 1))
    return backend.concatenate(parts)


def prefill(express, backend, q, k, v, layer=0, **fields):
    cache = express.create(query_heads=q.shape[1], kv_heads=k.shape[1], key_dim=q.shape[2], value_dim=v.shape[2], dtype=BF16,
                           **backend.device, **fields)
    out = backend.empty_like(q)
    express.prefill(cache, q, k, v, out, backend.scratch(express.workspace_size(cache, len(q))), layer)
    express.destroy(cache)
    return out


def divisions(layer, kv_heads, budget, share):
    """How a mean budget is divided over heads: name, budgets of this layer's heads, fields of the config."""
    yield "", [budget] * kv_heads, {"budget": budget}
    if layer != "random" and share is not None and kv_heads == share.shape[1]:
        base = budget * 5 // 16  # as the library divides
        own = [base + int((budget - base) * share.size * x / share.sum()) for x in share[layer]]
        flat = (C.c_float * share.size)(*share.ravel())
        yield BY_FAR_MASS, own, {"budget": budget, "layers": len(share), "layer": layer, "head_share": C.addressof(flat),
                                 "head_share_count": share.size}


def layer_rows(express, backend, layer, q, k, v, lengths, budgets, block, seeds, share):
    """One layer's rows; each has the error at every length, over all queries and over the second half of them."""
    exact = backend.exact(q, k, v)
    norm = backend.squares(exact).cumsum(0)

    def rows(method, out, **fields):
        error = backend.difference_squares(out, exact).cumsum(0)
        for n in lengths:
            if n <= len(q):
                last, middle = n - 1, n // 2 - 1
                yield {"n": n, "layer": layer, "method": method, **fields,
                       "rel_error": float((error[last] / norm[last]) ** 0.5),
                       "rel_error_second_half": float(((error[last] - error[middle]) / (norm[last] - norm[middle])) ** 0.5)}

    for name, out in backend.references(q, k, v, exact):
        yield from rows(name, out)
    for budget in budgets:
        setting = {"budget": budget, "block": block}
        for division, own, division_fields in divisions(layer, k.shape[1], budget, share):
            yield from rows("window" + division, window_attention(backend, q, k, v, own, block), **setting)
            for method, fields in RIVALS.items():
                for seed in seeds:
                    out = prefill(express, backend, q, k, v, prefill_block=block, seed=seed, **division_fields, **fields)
                    yield from rows(method + division, out, **setting, seed=seed)


def measure(express, backend, recording, layers, lengths=LENGTHS, budgets=BUDGETS, block=256, seeds=SEEDS):
    """Rows of all recorded layers and of random data of the same shape (layer "random")."""
    n = max(m for m in lengths if m <= len(recording[f"q{recording['layers'][0]}"]))
    lengths = [m for m in lengths if m <= n]
    with open(PROFILE) as file:
        share = np.square(json.load(file)["far_mass"])
    rows = []
    for layer in layers + ["random"]:
        if layer == "random":
            q, k, v = (backend.random(*x.shape, seed) for seed, x in enumerate((q, k, v), 1))
        else:
            q, k, v = (backend.load(recording[f"{name}{layer}"][:n]) for name in "qkv")
        rows += layer_rows(express, backend, layer, q, k, v, lengths, budgets, block, seeds, share)
        print(f"layer {layer} done", file=sys.stderr, flush=True)
    return rows


# ---- tables ----


def spread(values):
    """Mean and standard deviation over seeds."""
    text = f"{statistics.mean(values):.4f}"
    return text + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def by_seed(rows, over, field):
    """The statistic `over` the layers, for every seed."""
    seeds = sorted({r.get("seed", -1) for r in rows})
    return [over([r[field] for r in rows if r.get("seed", -1) == seed]) for seed in seeds]


def tables(rows):
    """Markdown: means over layers, the worst layer, random data; then Express by layer."""
    lengths, budgets = (sorted({r[f] for r in rows if f in r}) for f in ("n", "budget"))
    methods = list(dict.fromkeys(r["method"] for r in rows if "budget" in r))
    floors = list(dict.fromkeys(r["method"] for r in rows if "budget" not in r))
    real = [r for r in rows if r["layer"] != "random"]
    layers = list(dict.fromkeys(r["layer"] for r in real))
    lines = []

    def table(title, rows, over, field):
        lines.extend(["", title, "", "| budget | method | " + " | ".join(f"n = {n}" for n in lengths) + " |", "|---|---|" + "---|" * len(lengths)])
        for budget in budgets:
            for method in (m for m in methods if any(r["method"] == m for r in rows)):
                chosen = [r for r in rows if r["method"] == method and r["budget"] == budget]
                lines.append(f"| {budget} | {method} | " + " | ".join(
                    spread(by_seed([r for r in chosen if r["n"] == n], over, field)) for n in lengths) + " |")
        for method in floors:
            lines.append(f"| – | {method} | " + " | ".join(
                spread(by_seed([r for r in rows if r["method"] == method and r["n"] == n], over, field)) for n in lengths) + " |")

    table(f"Mean over layers {', '.join(map(str, layers))}, all queries:", real, statistics.mean, "rel_error")
    table("Mean over layers, queries of the second half:", real, statistics.mean, "rel_error_second_half")
    table("Worst layer, all queries:", real, max, "rel_error")
    table("Random data (independent normal queries, keys and values), all queries:", [r for r in rows if r["layer"] == "random"],
          statistics.mean, "rel_error")
    n, methods = lengths[-1], [m for m in methods if BY_FAR_MASS not in m]
    lines.extend(["", f"By layer, n = {n}, all queries:", "", "| budget | method | " + " | ".join(f"layer {i}" for i in layers) + " |",
                  "|---|---|" + "---|" * len(layers)])
    for budget in budgets:
        for method in methods:
            cells = (spread([r["rel_error"] for r in real if r["n"] == n and r["layer"] == i and r["method"] == method
                             and r.get("budget") == budget]) for i in layers)
            lines.append(f"| {budget} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines).strip()


def processor():
    for line in open("/proc/cpuinfo"):
        if line.startswith("model name"):
            return f"{line.split(':')[1].strip()}, {os.cpu_count()} virtual cores"
    return "unknown"


def write(path, rows, recording, machine, **more):
    result = {"machine": machine, "date": datetime.date.today().isoformat(), "command": "python3 " + " ".join(sys.argv), **more,
              "text": str(recording["text"]), "offset": int(recording["offset"]), "rows": rows}
    text = json.dumps(result, indent=1)
    begin = text.index('"rows": [')
    with open(path, "w") as file:  # one row a line
        file.write(text[:begin] + '"rows": [\n' + ",\n".join(json.dumps(r) for r in rows) + "\n]}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True)
    parser.add_argument("--activations", required=True)
    parser.add_argument("--out", default="bench/results")
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--layers", help="of the recording, by commas; default: all")
    options = parser.parse_args()
    recording = np.load(options.activations)
    layers = options.layers.split(",") if options.layers else recording["layers"]
    rows = measure(Express(options.library), NumpyBackend(), recording, [int(i) for i in layers],
                   [int(n) for n in options.lengths.split(",")], block=options.block)
    write(os.path.join(options.out, "prefill_error.json"), rows, recording, processor())
    print(tables(rows))


if __name__ == "__main__":
    main()
