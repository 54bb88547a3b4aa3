#!/usr/bin/env python3
"""Express on an NVIDIA GPU beside PyTorch's exact attention, all in one run, with the floors measured in it.

    python3 bench/cuda_table.py --library build/release/libexpress.so --out bench/results [--part prefill|decode|step|compress|all]

Prints a table and writes h200_prefill.json, h200_decode.json, h200_step.json and h200_compress.json (see bench/results/README.md). Needs PyTorch with
scaled_dot_product_attention's FlashAttention-2 and cuDNN backends, and Triton for the read bandwidth.
"""
import argparse
import ctypes as C
import datetime
import json
import statistics
import sys
import time as clock

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel

import express_abi
from express_abi import BF16, CUDA, I8, Workspace

FLASH, CUDNN = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION


class Express(express_abi.Express):
    def config(self, **fields):
        stream = torch.cuda.current_stream().cuda_stream
        return super().config(**{"device_type": CUDA, "dtype": BF16, "stream": stream, **fields})


@triton.jit
def read_kernel(x, out, n, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    start = tl.program_id(0).to(tl.int64) * BLOCK * STEPS
    for i in tl.static_range(STEPS):
        total += tl.load(x + start + i * BLOCK + tl.arange(0, BLOCK))
    tl.store(out + tl.program_id(0), tl.sum(total))


def seconds(run, repeats=5, warmup=2):
    """Median time of run() on the device."""
    times = []
    for i in range(warmup + repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        if i >= warmup:
            times.append(begin.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def both_seconds(run, repeats=5, warmup=2):
    """Median times of run() on the device and on the host."""
    device, host = [], []
    for i in range(warmup + repeats):
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        start = clock.perf_counter()
        run()
        taken = clock.perf_counter() - start
        end.record()
        end.synchronize()
        if i >= warmup:
            device.append(begin.elapsed_time(end) * 1e-3)
            host.append(taken)
    return statistics.median(device), statistics.median(host)


def graph_seconds(run, repeats=30):
    """Median time of one replay of run() captured in a graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
    torch.cuda.synchronize()
    return seconds(graph.replay, repeats, 5)


def floors():
    n = 1 << 30
    x, y = torch.randn(n, device="cuda"), torch.empty(n, device="cuda")
    copy = 8 * n / seconds(lambda: y.copy_(x))
    read = 0
    for block, steps, warps in ((1024, 8, 4), (2048, 8, 4), (2048, 16, 8), (4096, 4, 8)):
        out = torch.empty(n // (block * steps), device="cuda")
        grid = (n // (block * steps),)
        read = max(read, 4 * n / seconds(lambda: read_kernel[grid](x, out, n, BLOCK=block, STEPS=steps, num_warps=warps)))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matrix = 2 * 8192**3 / seconds(lambda: torch.mm(a, b), 10)
    return {"copy_gb_s": copy / 1e9, "read_gb_s": read / 1e9, "matrix_tflops": matrix / 1e12}


def rel_error(x, reference):
    return ((x.float() - reference.float()).norm() / reference.float().norm()).item()


def random_heads(n, heads, dim, seed):
    g = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(n, heads, dim, device="cuda", dtype=torch.bfloat16, generator=g)


def prefill_rows(express, quick):
    """A prompt through a few layers, one after the other as a model has them, per layer; `single_ms` is one layer of a new cache
    alone, after which the device has nothing to do: there the host's planning and launches show. `host_ms`: what a layer takes
    of the host, of the layers in a row."""
    heads, dim, rows = 32, 128, []
    print("\ncausal prefill, 1 x 32 heads, d 128, bf16\n      n  method               ms    single      host  TFLOP/s  rel. error"
          "  budget block  workspace MB")
    for n in (256, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 32768, 131072) + (() if quick else (524288,)):
        layers, repeats = (1, 3) if n > 200000 else (4, 5)
        q, k, v = (random_heads(n, heads, dim, seed) for seed in (1, 2, 3))
        nhd = [t.transpose(0, 1).unsqueeze(0) for t in (q, k, v)]
        exact = None

        def report(method, time, single, host, flops, out, budget=None, block=None, workspace=None):
            error = 0.0 if exact is None else rel_error(out, exact)
            rows.append({"n": n, "method": method, "ms": time * 1e3, "single_ms": single * 1e3, "host_ms": host * 1e3, "tflops": flops / time / 1e12,
                         "rel_error": error, "budget": budget, "block": block, "workspace_bytes": workspace})
            print(f"{n:7d}  {method:15s} {time * 1e3:9.3f} {single * 1e3:9.3f} {host * 1e3:9.3f} {flops / time / 1e12:8.1f}  {error:10.5f}"
                  + (f"  {budget:6d} {block:5d} {workspace / 1e6:8.1f}" if budget else ""))

        for name, backend in (("flash", FLASH), ("cudnn", CUDNN)):
            with sdpa_kernel(backend), torch.no_grad():
                run = lambda: F.scaled_dot_product_attention(*nhd, is_causal=True)
                out = run()[0].transpose(0, 1)
                time, host = both_seconds(lambda: [run() for _ in range(layers)], *((1, 0) if layers == 1 else (repeats, 1)))
                single = time if layers == 1 else seconds(run, repeats, 1)
            report(name, time / layers, single, host / layers, 2 * n * n * dim * heads, out)
            exact = out if exact is None else exact
        for method, dtype, budget, block in (*(("express", BF16, 1024, block) for block in (128, 256, 512, 1024)), ("express", BF16, 2048, 512),
                                             ("express", BF16, 4096, 512), ("express, 8 bits", I8, 1024, 256)):
            def create():
                return express.create(layers=layers, query_heads=heads, kv_heads=heads, key_dim=dim, value_dim=dim, budget=budget,
                                      dtype=dtype, prefill_block=block)

            cache = create()
            size = C.c_size_t()
            express.call("express_workspace_size", cache, C.c_int64(n), C.byref(size))
            scratch = torch.empty(size.value, dtype=torch.uint8, device="cuda")
            out = torch.full((n, heads, dim), float("nan"), device="cuda", dtype=torch.bfloat16)
            views = [C.byref(express.view(t)) for t in (q, k, v, out)]
            workspace = C.byref(Workspace(scratch.data_ptr(), size.value))

            def prefill(cache, layers):
                for layer in range(layers):
                    express.call("express_prefill", cache, C.c_int32(layer), *views, None, workspace)

            times = []
            for i in range(repeats + 1):  # nothing is known of the prompt
                first = create()
                times.append(both_seconds(lambda: prefill(first, 1), 1, 0)[0])
                express.call("express_destroy", C.byref(first))
            single = statistics.median(times[1:])
            times = []
            for i in range(repeats + 1):
                express.call("express_reset", cache)
                times.append(both_seconds(lambda: prefill(cache, layers), 1, 0))
            time, host = (statistics.median(t) / layers for t in zip(*times[1:]))
            # What the kernel computes: keys seen by each query, to within the block's triangle.
            seen = sum(min(b * block, budget) * min(block, n - b * block) + min(block, n - b * block) ** 2 / 2
                       for b in range((n + block - 1) // block))
            report(method, time, single, host, 4 * dim * heads * seen, out, budget, block, size.value)
            express.call("express_destroy", C.byref(cache))
            del scratch
        del q, k, v, nhd, exact, out
        torch.cuda.empty_cache()
    return rows


def fill(express, cache, layers, budget, q_heads, kv_heads, dim, tokens):
    size = C.c_size_t()
    express.call("express_workspace_size", cache, C.c_int64(tokens), C.byref(size))
    scratch = torch.empty(size.value, dtype=torch.uint8, device="cuda")
    workspace = Workspace(scratch.data_ptr(), size.value)
    q, k, v = random_heads(tokens, q_heads, dim, 1), random_heads(tokens, kv_heads, dim, 2), random_heads(tokens, kv_heads, dim, 3)
    views = [express.view(t) for t in (q, k, v, torch.empty_like(q))]
    for layer in range(layers):
        express.call("express_prefill", cache, C.c_int32(layer), *[C.byref(t) for t in views], None, C.byref(workspace))
    torch.cuda.synchronize()


def decode_rows(express, read, quick):
    q_heads, kv_heads, dim, rows = 32, 8, 128, []
    print("\ndecode attention, 32 query / 8 KV heads, d 128, bf16\nbatch  method        entries        us    GB/s  of read")

    def report(method, batch, budget, time, row_bytes=2 * 2 * dim):
        nbytes = batch * budget * kv_heads * row_bytes
        row = {"method": method, "batch": batch, "budget": budget, "us": time * 1e6, "slab_bytes": nbytes,
               "fraction_of_read_bandwidth": nbytes / time / 1e9 / read}
        rows.append(row)
        print(f"{batch:5d}  {method:14s} {budget:8d} {time * 1e6:9.1f} {nbytes / time / 1e9:7.0f}  {row['fraction_of_read_bandwidth']:6.3f}")

    def attend(method, dtype, row_bytes, batch, budget):
        nbytes = batch * budget * kv_heads * row_bytes
        layers = max(1, min(32, int(600e6 // nbytes)))  # rotate beyond the L2
        caches = (C.c_void_p * batch)()
        stream = torch.cuda.Stream()
        for i in range(batch):
            caches[i] = express.create(layers=layers, query_heads=q_heads, kv_heads=kv_heads, key_dim=dim, value_dim=dim,
                                       budget=budget, dtype=dtype, prefill_block=256, seed=i).value
            fill(express, C.c_void_p(caches[i]), layers, budget, q_heads, kv_heads, dim, budget + 300)
            express.call("express_set_stream", C.c_void_p(caches[i]), C.c_void_p(stream.cuda_stream))
        q = random_heads(batch, q_heads, dim, 5)
        views = [express.view(t) for t in (q, torch.empty_like(q))]

        def run():
            for layer in range(layers):
                express.call("express_attend_batch", caches, C.c_int64(batch), C.c_int32(layer), C.byref(views[0]),
                             C.byref(views[1]), None)

        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            run()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                run()
        torch.cuda.synchronize()
        report(method, batch, budget, seconds(graph.replay, 30, 5) / layers, row_bytes)
        for i in range(batch):
            express.call("express_destroy", C.byref(C.c_void_p(caches[i])))

    for method, dtype, row_bytes, budgets in (("express", BF16, 4 * dim, (512, 1024, 2048, 4096, 8192)),
                                              ("express, 8 bits", I8, 2 * dim + 4, (1024, 4096))):
        for batch in (1, 16, 64, 256):
            for budget in budgets:
                if batch * budget * kv_heads * row_bytes <= 20e9 and (not quick or budget in (1024, 4096)):
                    attend(method, dtype, row_bytes, batch, budget)
    for batch in (1, 16, 64, 256):
        for n in (1024, 4096, 32768, 131072):
            nbytes = batch * n * kv_heads * dim * 4
            if nbytes > 20e9:
                continue
            copies = max(1, min(32, int(600e6 // nbytes)))
            q = torch.randn(batch, q_heads, 1, dim, device="cuda", dtype=torch.bfloat16)
            kv = [[torch.randn(batch, kv_heads, n, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2)] for _ in range(copies)]
            for name, backend in (("cudnn", CUDNN), ("flash", FLASH)):
                with sdpa_kernel(backend), torch.no_grad():
                    time = graph_seconds(lambda: [F.scaled_dot_product_attention(q, k, v, enable_gqa=True) for k, v in kv])
                report(name, batch, n, time / copies)
            del kv
            torch.cuda.empty_cache()
    return rows


def step_rows(express, quick):
    """Append, due halvings and attend of all layers for one token, replayed from a graph."""
    layers, q_heads, kv_heads, dim, rows = 32, 32, 8, 128, []
    print("\nwhole decode step, 32 layers, graph replay\nbatch budget slots  tokens   p50 us   p99 us   max us  max/p50  halving share  MB")
    steps = ((1, 512, "bf16"), (1, 1024, "bf16"), (1, 1024, "i8"), (1, 4096, "bf16"), (16, 1024, "bf16"), (16, 1024, "i8"), (64, 1024, "bf16"),
             (256, 1024, "bf16"))
    for batch, budget, storage in steps[:1] if quick else steps:
        stream = torch.cuda.Stream()
        caches = (C.c_void_p * batch)()
        for i in range(batch):
            caches[i] = express.create(layers=layers, query_heads=q_heads, kv_heads=kv_heads, key_dim=dim, value_dim=dim,
                                       budget=budget, dtype={"bf16": BF16, "i8": I8}[storage], seed=i, stream=stream.cuda_stream).value
        size = C.c_int64()
        express.call("express_bytes", C.c_void_p(caches[0]), C.byref(size))
        pool = [random_heads(64 * batch, kv_heads, dim, s).view(64, batch, kv_heads, dim) for s in (1, 2)]
        k, v = pool[0][0].clone(), pool[1][0].clone()
        q = random_heads(batch, q_heads, dim, 3)
        views = [express.view(t) for t in (k, v, q, torch.empty_like(q))]

        def step():
            for layer in range(layers):
                express.call("express_append_batch", caches, C.c_int64(batch), C.c_int32(layer), C.byref(views[0]), C.byref(views[1]))
                express.call("express_attend_batch", caches, C.c_int64(batch), C.c_int32(layer), C.byref(views[2]), C.byref(views[3]), None)

        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            step()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                step()
            tokens, times = min(64 * budget, 24000 if batch == 1 else 8000 if batch == 16 else 2048), []
            prepare = 64
            for first in range(0, tokens, prepare):
                torch.cuda.synchronize()
                for i in range(batch):
                    express.call("express_step_prepare", C.c_void_p(caches[i]), C.c_int64(prepare))
                events = []
                for t in range(prepare):
                    k.copy_(pool[0][t])
                    v.copy_(pool[1][t])
                    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    begin.record()
                    graph.replay()
                    end.record()
                    events.append((begin, end))
                torch.cuda.synchronize()
                times += [a.elapsed_time(b) * 1e3 for a, b in events]
        full = sorted(times[budget:])  # once the budget is used
        p50 = full[len(full) // 2]
        row = {"batch": batch, "budget": budget, "storage": storage, "tokens": len(times), "p50_us": p50, "p99_us": full[int(len(full) * 0.99)],
               "max_us": full[-1], "halving_share": sum(max(0.0, t - p50) for t in full) / sum(full),
               "cache_bytes": size.value}
        rows.append(row)
        print(f"{batch:5d} {budget:6d} {storage:>5s} {len(times):7d} {p50:8.1f} {row['p99_us']:8.1f} {row['max_us']:8.1f} {row['max_us'] / p50:8.2f}"
              f" {row['halving_share']:14.4f} {size.value / 1e6:8.1f}")
        for i in range(batch):
            express.call("express_destroy", C.byref(C.c_void_p(caches[i])))
    return rows


def compress_rows(express, quick):
    """A cache of one layer compressed at once."""
    kv_heads, dim, budget, rows = 8, 128, 1024, []
    print("\ncompress_kv, 8 KV heads, d 128, bf16, 1024 entries\n      n       ms      host  GB/s of the cache")
    for n in (4096, 32768, 131072) + (() if quick else (524288,)):
        config = express.config(layers=1, query_heads=32, kv_heads=kv_heads, key_dim=dim, value_dim=dim, budget=budget)
        size, count = C.c_size_t(), C.c_int64()
        express.call("express_compress_kv_workspace", C.byref(config), C.byref(size))
        scratch = torch.empty(size.value, dtype=torch.uint8, device="cuda")
        out = [torch.empty(kv_heads, budget, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        tensors = [random_heads(n, kv_heads, dim, seed) for seed in (1, 2)] + out + [torch.empty(kv_heads, budget, device="cuda")]
        views = [C.byref(express.view(t)) for t in tensors]
        workspace = C.byref(Workspace(scratch.data_ptr(), size.value))
        device, host = both_seconds(lambda: express.call("express_compress_kv", C.byref(config), *views, None, C.byref(count), workspace))
        rows.append({"n": n, "ms": device * 1e3, "host_ms": host * 1e3, "entries": count.value, "workspace_bytes": size.value})
        print(f"{n:7d} {device * 1e3:8.3f} {host * 1e3:9.3f} {n * kv_heads * dim * 4 / device / 1e9:8.0f}")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True)
    parser.add_argument("--out", default="bench/results")
    parser.add_argument("--part", default="all", choices=("all", "prefill", "decode", "step", "compress"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    express = Express(options.library)
    floor = floors()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}: copy {floor['copy_gb_s']:.0f} GB/s, read"
          f" {floor['read_gb_s']:.0f} GB/s, bf16 matrix product {floor['matrix_tflops']:.0f} TFLOP/s")
    parts = {"prefill": lambda: prefill_rows(express, options.quick),
             "decode": lambda: decode_rows(express, floor["read_gb_s"], options.quick),
             "step": lambda: step_rows(express, options.quick),
             "compress": lambda: compress_rows(express, options.quick)}
    for name, rows in parts.items():
        if options.part not in ("all", name):
            continue
        result = {"machine": torch.cuda.get_device_name(), "date": datetime.date.today().isoformat(),
                  "command": "python3 " + " ".join(sys.argv), **floor, "rows": rows()}
        with open(f"{options.out}/h200_{name}.json", "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
