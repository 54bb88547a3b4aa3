#!/usr/bin/env python3
"""Relative output error of Express's causal prefill against exact attention, on recorded activations and on random data.

    python3 bench/record_activations.py build/activations.npz
    python3 bench/prefill_error.py --library build/release/libexpress.so --activations build/activations.npz [--out bench/results]

Writes prefill_error.json, after every layer, and prints its tables as Markdown. Needs NumPy; runs on the CPU.

The error is ||out - exact||_F / ||exact||_F over the queries of a layer, all heads; exact is float32 attention over the same bfloat16 inputs.
Every method gives bfloat16. Express stores bfloat16 and is default but for budget, block and seed. Rivals hold as many entries per KV head:

    express       the default
    coin          the default with a fair coin per pair in place of kernel halving
    uniform       the window and sinks of the default; of the rest a uniform sample (fair coins, nothing protected, weight exponent 1)
    uniform, 0.5  the same with Express's default weight exponent (what express-lm calls uniform)
    window        the first tokens and the last ones, nothing else
    rounding      exact attention rounded to bfloat16: the floor

"by far mass": the model's heads have different budgets (examples/byte_lm/model/profile.json, head_share = far mass squared), of the same mean.
A prefix of a causal prefill is the prefill of the prefix, so one run at the largest n gives all n.
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

LENGTHS = "2048,8192,16384,32768"
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


def exact_attention(q, k, v):
    """Of bfloat16 bits, in float32."""
    return activations.exact_attention(*(activations.from_bf16(x) for x in (q, k, v)))


def window_attention(q, k, v, budgets, block):
    """Per KV head the sinks and the last tokens, budgets[g] entries when a block begins, and the block itself: the causality of
    express_prefill."""
    group, out = q.shape[1] // k.shape[1], np.empty(q.shape, np.float32)
    for s in range(0, len(q), block):
        e = min(len(q), s + block)
        for g, budget in enumerate(budgets):
            held = np.r_[:min(SINKS, e), max(min(SINKS, e), s - (budget - SINKS)):e]
            heads = slice(g * group, (g + 1) * group)
            out[s:e, heads] = exact_attention(q[s:e, heads], k[held, g:g + 1], v[held, g:g + 1])
    return out


def prefill(express, q, k, v, layer=0, **fields):
    cache = express.create(query_heads=q.shape[1], kv_heads=k.shape[1], key_dim=q.shape[2], value_dim=v.shape[2], dtype=BF16,
                           threads=activations.threads(), **fields)
    out = np.full(q.shape, 0x7FC0, np.uint16)  # NaN
    express.prefill(cache, layer, q, k, v, out)
    express.destroy(cache)
    return activations.from_bf16(out)


def divisions(layer, kv_heads, budget, share):
    """How a mean budget is divided over heads: name, budgets of this layer's heads, fields of the config."""
    yield "", [budget] * kv_heads, {"budget": budget}
    if layer != "random":
        base = budget * 5 // 16  # as the library divides, but for rounding
        own = [base + int((budget - base) * share.size * x / share.sum()) for x in share[layer]]
        flat = (C.c_float * share.size)(*share.ravel())
        yield BY_FAR_MASS, own, {"budget": budget, "layers": len(share), "layer": layer, "head_share": C.addressof(flat),
                                 "head_share_count": share.size}


def layer_rows(express, layer, q, k, v, lengths, block, share):
    """One layer's rows: of every method and length the error over all queries and over the second half of them."""
    exact = exact_attention(q, k, v)
    squares = lambda x: np.square(x, dtype=np.float64).sum((1, 2)).cumsum()
    norm = squares(exact)

    def rows(method, out, **fields):
        error = squares(out - exact)
        for n in lengths:
            last, middle = n - 1, n // 2 - 1
            yield {"n": n, "layer": layer, "method": method, **fields, "rel_error": float((error[last] / norm[last]) ** 0.5),
                   "rel_error_second_half": float(((error[last] - error[middle]) / (norm[last] - norm[middle])) ** 0.5)}

    rounded = lambda x: activations.from_bf16(activations.to_bf16(x))
    yield from rows("rounding", rounded(exact))
    for budget in BUDGETS:
        for division, own, fields in divisions(layer, k.shape[1], budget, share):
            yield from rows("window" + division, rounded(window_attention(q, k, v, own, block)), budget=budget)
            for method, more in RIVALS.items():
                for seed in SEEDS:
                    out = prefill(express, q, k, v, prefill_block=block, seed=seed, **fields, **more)
                    yield from rows(method + division, out, budget=budget, seed=seed)


def measure(express, recording, lengths, block):
    """Yields lists of rows: of every recorded layer, and of random data of the same shape (layer "random")."""
    with open(PROFILE) as file:
        share = np.square(json.load(file)["far_mass"])
    if "kv_heads" in recording:
        share = np.ascontiguousarray(share[:, recording["kv_heads"]])
    for layer in [int(i) for i in recording["layers"]] + ["random"]:
        if layer == "random":
            q, k, v = (activations.to_bf16(np.random.default_rng(seed).standard_normal(x.shape, np.float32))
                       for seed, x in enumerate((q, k, v), 1))
        else:
            q, k, v = (np.ascontiguousarray(recording[f"{name}{layer}"][:lengths[-1]]) for name in "qkv")
        yield list(layer_rows(express, layer, q, k, v, lengths, block, share))
        print(f"layer {layer} done", file=sys.stderr, flush=True)


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
    with open("/proc/cpuinfo") as file:
        name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "unknown")
    return f"{name}, {activations.threads()} thread(s)"


def write(path, rows, **head):
    with open(path, "w") as file:  # one row a line
        file.write(json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n' + ",\n".join(json.dumps(r) for r in rows) + "\n]}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True)
    parser.add_argument("--activations", required=True)
    parser.add_argument("--out", default="bench/results")
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--lengths", default=LENGTHS, help="those beyond the recording are left out")
    options = parser.parse_args()
    recording = np.load(options.activations)
    recorded = len(recording[f"q{recording['layers'][0]}"])
    lengths = sorted(n for n in map(int, options.lengths.split(",")) if n <= recorded)
    rows = []
    for more in measure(Express(options.library), recording, lengths, options.block):
        rows += more
        write(os.path.join(options.out, "prefill_error.json"), rows, machine=processor(), date=datetime.date.today().isoformat(),
              block=options.block, text=str(recording["text"]), offset=int(recording["offset"]))
    print(tables(rows))


if __name__ == "__main__":
    main()
