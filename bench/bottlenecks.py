#!/usr/bin/env python3
"""The four uses of the library on one page, from the results that are committed: bench/results/bottlenecks.md.

    python3 bench/bottlenecks.py [--results bench/results] [--out bench/results/bottlenecks.md]

What is called, what it has to show, and what was measured. Every number is read from a file under bench/results; none is written here. Needs matplotlib (of bench/quality/report.py).
"""
import argparse
import itertools
import json
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "quality"))
import report  # noqa: E402

ENTRY = 16 * 256  # bytes of one entry of 16 bits in each of the example model's 16 KV heads
OURS, PLAIN = "express, observed, 8 bits, equal bytes", "express, observed, equal bytes"
LENGTH = 16384


def load(folder, name):
    with open(os.path.join(folder, name)) as file:
        return json.load(file)


def find(rows, **fields):
    found = [row for row in rows if all(row[key] == value for key, value in fields.items())]
    if not found:
        raise SystemExit(f"bottlenecks.py: no row with {fields}")
    return found


def least(rows, field):
    return min(row[field] for row in rows)


def table_of(path, first, section=""):
    """Rows of the first Markdown table whose first column is called `first`, behind the heading that begins with `section`, as dictionaries."""
    with open(path) as file:
        lines = file.read().split("\n" + section, 1)[1].splitlines()
    cells = lambda line: [cell.strip() for cell in line.strip().strip("|").split("|")]
    at = next(i for i, line in enumerate(lines) if line.startswith("|") and cells(line)[0] == first)
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[at + 2:])
    return [dict(zip(cells(lines[at]), cells(line))) for line in rows]


def quality(results, policy, budget, kind, protocol="stream"):
    return report.show(results.excess(policy, budget, LENGTH, kind, protocol=protocol), 3)


def recall(results, policy, budget, protocol="stream"):
    values = results.recall(policy, budget, LENGTH, "recall", protocol)
    return f"{100 * sum(values) / len(values):.0f}" if values else "–"


def best(results, budget, protocol="stream"):
    """The rival with the least excess on plain texts: no Express, and no cache that keeps all."""
    names = [name for name in results.policies if not name.startswith("express") and not name.endswith(", prompt") and 0 not in results.budgets_of(name)
             and len(results.excess(name, budget, LENGTH, "plain", protocol=protocol)) >= 8]
    return min(names, key=lambda name: report.mean_error(results.excess(name, budget, LENGTH, "plain", protocol=protocol))[0])


def prefill(folder, results):
    gpu = load(folder, "h200_prefill.json")
    rows = []
    for n in sorted({row["n"] for row in gpu["rows"]}):
        ours = least([row for row in find(gpu["rows"], n=n, method="express") if row["budget"] == 1024], "ms")
        flash, cudnn = (least(find(gpu["rows"], n=n, method=method), "ms") for method in ("flash", "cudnn"))
        rows.append([str(n), f"{flash:.3f}", f"{cudnn:.3f}", f"{ours:.3f}", f"{flash / ours:.2f}", f"{cudnn / ours:.2f}"])
    lines = [f"{gpu['machine']}, 32 heads of 128, bf16, 1024 entries per head, ms a layer ([h200_prefill.json](h200_prefill.json)):", ""]
    lines += report.table(["tokens", "FlashAttention-2", "cuDNN", "Express", "FlashAttention-2 ÷", "cuDNN ÷"], rows)
    cpu = table_of(os.path.join(folder, "cpu.md"), "n", "## Causal prefill")
    lines += ["Two CPU cores, 4 query / 2 KV heads of 128 ([cpu.md](cpu.md)):", ""]
    lines += report.table(["tokens", "exact, ms", "Express, ms", "ratio"], [[row["n"], row["exact, ms"], row["Express, ms"], row["ratio"]] for row in cpu])
    generate = load(folder, "h100_generate.json")
    rows = []
    for context in (32768, 131072):
        exact, ours = (find(generate["rows"], batch=1, context=context, cache=cache)[0] for cache in ("dynamic", "express"))
        rows.append([str(context), f"{exact['prefill_s']:.2f}", f"{ours['prefill_s']:.2f}", f"{exact['prefill_s'] / ours['prefill_s']:.1f} ×"])
    lines += [f"A whole model under transformers, {generate['device']} ([transformers_generate.md](transformers_generate.md)):", ""]
    lines += report.table(["prompt", "DynamicCache, s", "ExpressCache, s", "ratio"], rows)
    rows = []
    for budget in (512, 1024, 2048, 4096):
        if results.excess("express, observed", budget, LENGTH, "plain", protocol="prefill"):
            rival = best(results, budget, "prefill")
            rows.append([str(budget)] + [quality(results, "express, observed", budget, kind, "prefill") for kind in ("plain", "recall")]
                        + [recall(results, "express, observed", budget, "prefill"), f"{rival}: {quality(results, rival, budget, 'plain', 'prefill')}"])
    lines += [f"Quality, yardstick model: three quarters of {LENGTH} tokens taken approximately, the last quarter decoded exactly over what that left; excess over exact in bits per byte of that quarter ([quality](quality)):", ""]
    lines += report.table(["entries", "plain", "with facts", "recall, %", "best rival, plain"], rows)
    return lines


def compression(folder, results):
    rows = []
    for budget in results.budgets:
        if not results.excess("express, prompt", budget, LENGTH, "recall"):
            continue
        for policy in ("express, prompt", "snapkv, prompt"):
            rows.append([str(budget), policy] + [quality(results, policy, budget, kind) for kind in ("plain", "recall")] + [recall(results, policy, budget)])
    return [f"Yardstick model: exact prefill of three quarters of {LENGTH} tokens, one compression to so many entries per KV head, then the cache grows; excess over exact in bits per byte of the second half "
            "(of which half is decoded under the compressed cache), recall of what exact attention answers ([quality](quality)):", ""] + report.table(
                ["entries", "policy", "plain", "with facts", "recall, %"], rows)


def memory(folder, results):
    rows = []
    for budget in (256, 512, 1024, 2048, 4096):
        held = max(row["bytes_peak"] for kind in results.kinds for row in results.get(OURS, budget, LENGTH, kind))
        rival = best(results, budget)
        rows.append([str(budget), f"{budget * ENTRY / 1e6:.2f}", f"{held / 1e6:.2f}"]
                    + [quality(results, OURS, budget, kind) for kind in ("plain", "recall")] + [recall(results, OURS, budget)]
                    + [quality(results, PLAIN, budget, "plain"), f"{rival}: {quality(results, rival, budget, 'plain')}", quality(results, rival, budget, "recall"), recall(results, rival, budget)])
    lines = [f"Yardstick model, {LENGTH} tokens, every token under the budget, all policies in the bytes of so many 16-bit entries; excess over exact in bits per byte of the second half ([quality](quality)). "
             "Held: all that the library allocates, at peak, in 8-bit slots.", ""]
    lines += report.table(["entries", "MB allowed", "MB held", "8-bit slots, plain", "with facts", "recall, %", "16-bit slots, plain", "best rival on plain text", "the same with facts", "recall, %"], rows)
    return lines


def compute(folder, results):
    step, decode, generate = (load(folder, name) for name in ("h200_step.json", "h200_decode.json", "h100_generate.json"))
    rows = [[str(row["batch"]), str(row["budget"]), row["storage"], str(row["tokens"]), f"{row['p50_us']:.0f}", f"{row['p99_us']:.0f}", f"{row['max_us']:.0f}", f"{row['max_us'] / row['p50_us']:.2f}", f"{100 * row['halving_share']:.1f} %"]
            for row in step["rows"]]
    lines = [f"{step['machine']}, 32 layers of 32 query / 8 KV heads of 128: append, halvings and attention of a token, over so many tokens ([h200_step.json](h200_step.json)). Flat: the slowest token of the stream against the median.", ""]
    lines += report.table(["batch", "entries", "slots", "tokens", "median, µs", "99 %", "max", "max ÷ median", "halvings' share"], rows)
    rows = []
    for batch in (1, 16):
        ours = find(decode["rows"], method="express", batch=batch, budget=1024)[0]["us"]
        for n in (32768, 131072):
            exact = min(find(decode["rows"], method=method, batch=batch, budget=n)[0]["us"] for method in ("cudnn", "flash"))
            rows.append([str(batch), str(n), f"{exact:.1f}", f"{ours:.1f}", f"{exact / ours:.1f} ×"])
    lines += ["Attention of one token and layer, the same machine: exact over all tokens (the faster of cuDNN and FlashAttention-2), Express over 1024 entries whatever the length ([h200_decode.json](h200_decode.json)):", ""]
    lines += report.table(["batch", "tokens", "exact, µs", "Express, µs", "ratio"], rows)
    rows = []
    for row in table_of(os.path.join(folder, "cpu.md"), "prompt"):
        rows.append(["express-lm, two CPU cores", "1", row["prompt"], row["exact, tokens/s"], row["16 × 1024 entries, tokens/s"], row["ratio"]])
    for batch, context in ((1, 32768), (1, 131072), (8, 32768)):
        exact, ours = (find(generate["rows"], batch=batch, context=context, cache=cache)[0]["decode_tokens_per_s"] for cache in ("dynamic", "graph"))
        rows.append([f"transformers, {generate['device']}, `decode_graph`", str(batch), str(context), f"{exact:.0f}", f"{ours:.0f}", f"{ours / exact:.1f} ×"])
    lines += ["Whole models, tokens a second while decoding ([cpu.md](cpu.md), [transformers_generate.md](transformers_generate.md), which says what part of the latter is launches):", ""]
    lines += report.table(["engine", "batch", "context", "exact", "Express, 1024 entries", "ratio"], rows)
    budget = 256
    rival = best(results, budget)
    lines += [f"Quality at a budget chosen for speed, 1/64 of the text: {quality(results, OURS, budget, 'plain')} bits per byte on plain text and {recall(results, OURS, budget)} % of the facts in the bytes of {budget} entries, "
              f"the best rival ({rival}) {quality(results, rival, budget, 'plain')} and {recall(results, rival, budget)} %.", ""]
    return lines


USES = (("Long-context prefill", "`express_prefill`", "a speed-up over exact causal attention that grows with the length", prefill),
        ("KV-cache compression", "`express_compress_kv`, or `express_export` of a cache", "quality at equal size", compression),
        ("Memory-constrained decoding", "`express_append` and `express_attend` under `budget` (with `budget_unit = BYTES`: of all that the cache takes)", "quality at equal size; peak bytes never above the budget", memory),
        ("Compute-constrained decoding", "the same with a small budget; `express_step_prepare` where steps are replayed from a CUDA graph", "flat time per token, compression a small share of it", compute))


def page(folder):
    results = report.Results([os.path.join(folder, "quality", "dev_rows.jsonl.xz")], "dev")
    lines = ["# The four uses", "", "What is called, what it has to show, what was measured: made by `bench/bottlenecks.py` from the results beside this page, each of which tells its machine and what disappointed. "
             "Development texts; test texts are in [quality](quality).", ""]
    lines += report.table(["use", "what the user calls", "what it has to show"], [[f"[{name}](#{name.lower().replace(' ', '-')})", calls, shows] for name, calls, shows, _ in USES])
    for name, _, _, part in USES:
        lines += [f"## {name}", ""] + part(folder, results)
    return "\n".join(lines).rstrip() + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default=os.path.join(HERE, "results"))
    parser.add_argument("--out")
    options = parser.parse_args()
    with open(options.out or os.path.join(options.results, "bottlenecks.md"), "w") as file:
        file.write(page(options.results))


if __name__ == "__main__":
    main()
