#!/usr/bin/env python3
"""Hugging Face generate with an ExpressCache beside its own DynamicCache: one Llama model with random weights, one run.

    python3 bench/transformers_generate.py --out bench/results/h200_generate.json            # on a GPU: 8 layers, 32K and 128K tokens, bfloat16
    python3 bench/transformers_generate.py --tiny                                            # a minute on a CPU

For each context and cache: the time of the prefill (to the first token), tokens/s of the decode that follows, bytes of keys and values, and the
peak of memory (a GPU's: PyTorch's allocations, weights included, and the Express caches, which allocate for themselves). Medians over --repeat;
the JSON has every repetition. Needs express_kv, PyTorch and transformers; --attention is the exact side's ("sdpa", "flash_attention_2").
"""
import argparse
import datetime
import gc
import importlib.metadata
import json
import platform
import statistics
import time

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StoppingCriteria

from express_kv.transformers import ExpressCache

TINY = {"contexts": "1024,4096", "layers": 2, "query_heads": 8, "kv_heads": 2, "dim": 32, "intermediate": 512, "vocabulary": 256, "new": 32,
        "budget": 256, "dtype": "float32", "device": "cpu", "repeat": 2}


class Clock(StoppingCriteria):
    """The time after each token; generate waits for the device there anyway."""

    def __init__(self, device):
        self.device, self.times = device, []

    def now(self):
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

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


def once(o, model, kind, context, new):
    """One generation: seconds of the prefill, seconds of each later token, bytes of keys and values, peak bytes."""
    cuda = o.device == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model.set_attn_implementation("express" if kind == "express" else o.attention)
    options = {} if o.threads is None else {"threads": o.threads}
    cache = ExpressCache(config=model.config, budget=o.budget, **options) if kind == "express" else DynamicCache(config=model.config)
    generator = torch.Generator().manual_seed(context)
    ids = torch.randint(1, o.vocabulary, (o.batch, context), generator=generator).to(o.device)
    clock = Clock(o.device)
    clock.now()
    chunks = {"prefill_chunk_size": o.prefill_chunk} if o.prefill_chunk else {}
    model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                   stopping_criteria=[clock], **chunks)
    steps = [b - a for a, b in zip(clock.times, clock.times[1:])]
    peak = torch.cuda.max_memory_allocated() + (cache.nbytes if kind == "express" else 0) if cuda else None
    return {"prefill_s": steps[0], "step_s": steps[1:], "kv_bytes": kv_bytes(cache), "peak_bytes": peak,
            "stored": cache.get_stored_length() if kind == "express" else context + new - 1}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON file")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU, in place of the defaults")
    parser.add_argument("--contexts", default="32768,131072")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--new", type=int, default=128, help="tokens to generate")
    parser.add_argument("--budget", type=int, default=1024, help="entries per KV head")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--query-heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--attention", default="sdpa", help="of the exact cache")
    parser.add_argument("--caches", default="dynamic,express")
    parser.add_argument("--prefill-chunk", type=int, default=0, help="0: the prompt whole")
    parser.add_argument("--threads", type=int, help="of Express, on a CPU")
    parser.add_argument("--repeat", type=int, default=3)
    if parser.parse_known_args()[0].tiny:
        parser.set_defaults(**TINY)
    o = parser.parse_args()
    model = build(o)
    kinds, contexts = o.caches.split(","), [int(n) for n in o.contexts.split(",")]
    device = torch.cuda.get_device_name() if o.device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    print(f"{device}; {o.layers} layers, {o.query_heads}/{o.kv_heads} heads of {o.dim}, {o.dtype}, batch {o.batch}, {o.new} new tokens\n")
    print(f"{'context':>8} {'cache':>8} {'prefill s':>10} {'decode tok/s':>13} {'KV MB':>9} {'peak GB':>8} {'entries':>8}")
    rows = []
    for kind in kinds:
        once(o, model, kind, min(contexts[0], 2048), 4)  # loads kernels
    for context in contexts:
        for kind in kinds:
            runs = [once(o, model, kind, context, o.new) for _ in range(o.repeat)]
            prefill = statistics.median(run["prefill_s"] for run in runs)
            rate = statistics.median(o.batch * len(run["step_s"]) / sum(run["step_s"]) for run in runs)
            peak = max(run["peak_bytes"] or 0 for run in runs)
            rows.append({"context": context, "cache": kind, "prefill_s": prefill, "decode_tokens_per_s": rate, "runs": runs})
            print(f"{context:8d} {kind:>8} {prefill:10.3f} {rate:13.1f} {runs[0]['kv_bytes'] / 1e6:9.1f} "
                  f"{format(peak / 1e9, '8.2f') if peak else '       -'} {runs[0]['stored']:8d}", flush=True)
    if o.out:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "express-kv")}
        with open(o.out, "w") as file:
            json.dump({"date": datetime.date.today().isoformat(), "device": device, "versions": versions, "options": vars(o), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
