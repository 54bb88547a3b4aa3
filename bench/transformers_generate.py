#!/usr/bin/env python3
"""Hugging Face generate with an ExpressCache beside its own DynamicCache: one Llama model with random weights, one run.

    python3 bench/transformers_generate.py --out bench/results/h200_generate.json            # on a GPU: 16 layers, 32K and 128K tokens, bfloat16
    python3 bench/transformers_generate.py --tiny                                            # a minute on a CPU

For each context and cache: the time of the prefill (to the first token), tokens/s of the decode that follows, bytes of keys and values, and the
peak of memory (a GPU's: PyTorch's allocations, weights included, and the Express caches, which allocate for themselves). The exact side's decode steps
run without cuDNN's attention, which PyTorch would take and which plans anew for every length (--cudnn-decode: with it). Medians over --repeat;
the JSON has every repetition. A cache that the GPU's memory has no room for is a row that says so. Needs express_kv, PyTorch and transformers; --attention is the exact side's ("sdpa", "flash_attention_2").
"""
import argparse
import contextlib
import datetime
import gc
import importlib.metadata
import itertools
import json
import platform
import statistics
import time

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StoppingCriteria

from express_kv.transformers import ExpressCache, decode_graph

TINY = {"contexts": "1024,4096", "layers": 2, "query_heads": 8, "kv_heads": 2, "dim": 32, "intermediate": 512, "vocabulary": 256, "new": 32,
        "budget": 256, "dtype": "float32", "device": "cpu", "repeat": 2}


NAMES = {"dynamic": "DynamicCache", "express": "ExpressCache", "graph": "ExpressCache, `decode_graph`"}
WARM = 4  # steps that are not counted: the first ones load kernels, or capture a graph


class Clock(StoppingCriteria):
    """The time after each token; generate waits for the device there anyway."""

    def __init__(self, device, cudnn_decode):
        self.device, self.cudnn_decode, self.times = device, cudnn_decode, []

    def now(self):
        """Also the end of the prompt, when it is the second call."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        torch.backends.cuda.enable_cudnn_sdp(self.cudnn_decode or len(self.times) < 2)

    def __call__(self, input_ids, scores, **_):
        self.now()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def build(o):
    config = LlamaConfig(hidden_size=o.query_heads * o.dim, head_dim=o.dim, num_attention_heads=o.query_heads, num_key_value_heads=o.kv_heads,
                         num_hidden_layers=o.layers, intermediate_size=o.intermediate, vocab_size=o.vocabulary,
                         max_position_embeddings=1 << 20, rope_theta=500000.0, pad_token_id=0, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, o.dtype))
    with torch.device(o.device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def kv_bytes(cache):
    if isinstance(cache, ExpressCache):
        return cache.nbytes
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


def once(o, model, kind, batch, context, new):
    """One generation: seconds of the prefill, seconds of each later token, bytes of keys and values, peak bytes."""
    cuda = o.device == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    express = kind != "dynamic"
    model.set_attn_implementation("express" if express else o.attention)
    options = {} if o.threads is None else {"threads": o.threads}
    cache = ExpressCache(config=model.config, budget=o.budget, **options) if express else DynamicCache(config=model.config)
    generator = torch.Generator().manual_seed(context)
    ids = torch.randint(1, o.vocabulary, (batch, context), generator=generator).to(o.device)
    clock = Clock(o.device, o.cudnn_decode)
    clock.now()
    chunks = {"prefill_chunk_size": o.prefill_chunk} if o.prefill_chunk else {}
    with decode_graph(model) if kind == "graph" else contextlib.nullcontext():
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                       stopping_criteria=[clock], **chunks)
    steps = [b - a for a, b in zip(clock.times, clock.times[1:])]
    peak = torch.cuda.max_memory_allocated() + (cache.nbytes if express else 0) if cuda else None
    return {"prefill_s": steps[0], "step_s": steps[1:], "kv_bytes": kv_bytes(cache), "peak_bytes": peak,
            "stored": cache.get_stored_length() if express else context + new - 1}


def measure(o, model, kind, batch, context):
    """A row of the table: medians over the repetitions, and all of them."""
    row = {"batch": batch, "context": context, "cache": kind}
    try:
        runs = [once(o, model, kind, batch, context, o.new) for _ in range(o.repeat)]
    except torch.OutOfMemoryError:
        return {**row, "out_of_memory": True}
    rates = []
    for run in runs:
        steps = run["step_s"][min(WARM, len(run["step_s"]) // 2):]
        rates.append(batch * len(steps) / sum(steps))
    return {**row, "prefill_s": statistics.median(run["prefill_s"] for run in runs), "decode_tokens_per_s": statistics.median(rates),
            "kv_bytes": runs[0]["kv_bytes"], "peak_bytes": max(run["peak_bytes"] or 0 for run in runs), "stored": runs[0]["stored"], "runs": runs}


def line(row):
    where = f"{row['batch']:5d} {row['context']:8d} {row['cache']:>8} "
    if "out_of_memory" in row:
        return where + "out of memory"
    peak = format(row["peak_bytes"] / 1e9, "8.2f") if row["peak_bytes"] else "       -"
    return where + (f"{row['prefill_s']:10.3f} {row['decode_tokens_per_s']:13.1f} {1e3 * row['batch'] / row['decode_tokens_per_s']:8.2f} "
                    f"{row['kv_bytes'] / 1e6:9.1f} {peak} {row['stored']:8d}")


def markdown(files):
    """The rows of results as a table for bench/results."""
    yield "| batch | context | cache | prompt, s | decode, tokens/s | ms a step | keys and values, MB | peak, GB |"
    yield "|---:|---:|---|---:|---:|---:|---:|---:|"
    for file in files:
        with open(file) as opened:
            rows = json.load(opened)["rows"]
        for row in rows:
            where = f"| {row['batch']} | {row['context']} | {NAMES[row['cache']]} | "
            if "out_of_memory" in row:
                yield where + "out of memory | | | | |"
                continue
            rate = row["decode_tokens_per_s"]
            yield where + (f"{row['prefill_s']:.2f} | {rate:.1f} | {1e3 * row['batch'] / rate:.2f} | {row['kv_bytes'] / 1e6:.0f} | "
                           f"{row['peak_bytes'] / 1e9:.1f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON file")
    parser.add_argument("--markdown", nargs="+", metavar="FILE", help="only show these results as a table")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU, in place of the defaults")
    parser.add_argument("--contexts", default="32768,131072")
    parser.add_argument("--batches", default="1")
    parser.add_argument("--most-tokens", type=int, default=1 << 18, help="larger batch x context are left out: prompts are run whole")
    parser.add_argument("--new", type=int, default=128, help="tokens to generate")
    parser.add_argument("--budget", type=int, default=1024, help="entries per KV head")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--query-heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--attention", default="sdpa", help="of the exact cache")
    parser.add_argument("--caches", default="dynamic,express,graph", help="dynamic: DynamicCache; express: ExpressCache; graph: the same within decode_graph")
    parser.add_argument("--cudnn-decode", action="store_true", help="let PyTorch choose in decode steps, too")
    parser.add_argument("--prefill-chunk", type=int, default=0, help="0: the prompt whole")
    parser.add_argument("--threads", type=int, help="of Express, on a CPU")
    parser.add_argument("--repeat", type=int, default=3)
    if parser.parse_known_args()[0].tiny:
        parser.set_defaults(**TINY)
    o = parser.parse_args()
    if o.markdown:
        print("\n".join(markdown(o.markdown)))
        return
    model = build(o)
    kinds, contexts = o.caches.split(","), [int(n) for n in o.contexts.split(",")]
    device = torch.cuda.get_device_name() if o.device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    print(f"{device}; {o.layers} layers, {o.query_heads}/{o.kv_heads} heads of {o.dim}, {o.dtype}, {o.new} new tokens\n")
    print(f"{'batch':>5} {'context':>8} {'cache':>8} {'prefill s':>10} {'decode tok/s':>13} {'step ms':>8} {'KV MB':>9} {'peak GB':>8} {'entries':>8}")
    rows = []
    for kind in kinds:
        once(o, model, kind, 1, min(contexts[0], 2048), 4)  # loads kernels
    sizes = [(int(batch), context) for batch in o.batches.split(",") for context in contexts if int(batch) * context <= o.most_tokens]
    for (batch, context), kind in itertools.product(sizes, kinds):
        rows.append(measure(o, model, kind, batch, context))
        print(line(rows[-1]), flush=True)
    if o.out:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "express-kv")}
        with open(o.out, "w") as file:
            json.dump({"date": datetime.date.today().isoformat(), "device": device, "versions": versions, "options": vars(o), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
