"""What one rank of the tests in test_parallel.py does: python ranks.py JOB RANK WORLD FOLDER DEVICE. Gloo on the CPU, NCCL on GPUs, one per rank."""

import json
import os
import pathlib
import sys

import torch
import torch.distributed as dist


def tensor_parallel(rank, world, folder, device):
    """Generates with the model in FOLDER/model over `world` ranks; rank 0 writes tokens, what every KV head kept, and counts of collectives."""
    from transformers import AutoModelForCausalLM, DynamicCache

    from express_kv.transformers import ExpressCache
    from families import prompts

    more = {}
    if world > 1:
        from transformers.distributed import DistributedConfig

        more["distributed_config"] = DistributedConfig(tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="express", **more).eval()
    model = model.to(device) if world == 1 else model
    calls = {}
    for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast"):
        calls[name] = 0

        def counted(*args, _name=name, _call=getattr(dist, name), **kwargs):
            calls[_name] += 1
            return _call(*args, **kwargs)

        setattr(dist, name, counted)

    def run(cache):
        for name in calls:
            calls[name] = 0
        inputs = {name: x.to(device) for name, x in prompts(2, 150).items()}
        tokens = model.generate(**inputs, past_key_values=cache, max_new_tokens=40, do_sample=False)
        return tokens.tolist(), dict(calls)

    cache = ExpressCache(config=model.config, budget=48, seed=11, threads=1, head_settings=SETTINGS)
    tokens, count = run(cache)
    _, exact_count = run(DynamicCache(config=model.config))
    like = torch.empty(0, device=device)
    kept = [[[sorted(s.export(layer, head, like)[3].tolist()) for head in range(4 // world)] for layer in range(3)]
            for s in cache.sequences]
    everyone = [None] * world
    if world > 1:
        dist.all_gather_object(everyone, kept)
    else:
        everyone = [kept]
    kept = [[[heads for part in everyone for heads in part[i][layer]] for layer in range(3)] for i in range(2)]
    bytes_ = cache.nbytes
    if rank == 0:
        result = {"tokens": tokens, "kept": kept, "calls": count, "exact_calls": exact_count, "nbytes": bytes_}
        (folder / f"ranks{world}.json").write_text(json.dumps(result))


# (budget, sinks, window, protected entries) of every layer's four KV heads
SETTINGS = [(40 + 8 * head, 2, 12 + layer, 6) for layer in range(3) for head in range(4)]


def sequence_parallel(rank, world, folder, device):
    """Every rank attends over its part of one sequence; all merge to the same, which rank 0 writes."""
    import express_kv

    generator = torch.Generator().manual_seed(4)
    k, v, q = (torch.randn(n, heads, 64, generator=generator).to(device) for n, heads in ((400, 2), (400, 2), (5, 8)))
    result = {}
    for name, budget in (("exact", 512), ("small", 40)):
        cache = express_kv.Cache(query_heads=8, kv_heads=2, key_dim=64, budget=budget, weight_exponent=0.5, dtype="float32", threads=1, device=device)
        part = slice(400 * rank // world, 400 * (rank + 1) // world)
        cache.append(0, k[part], v[part])
        lse = torch.empty(5, 8, device=device)
        out = cache.attend(0, q, lse=lse)
        outs, lses = ([torch.empty_like(x) for _ in range(world)] for x in (out, lse))
        dist.all_gather(outs, out)
        dist.all_gather(lses, lse)
        merged = express_kv.merge(outs, lses)
        held = [None] * world
        dist.all_gather_object(held, [[x.tolist() for x in cache.export(0, head, q)[:3]] for head in range(2)])
        result[name] = {"out": merged[0].tolist(), "lse": merged[1].tolist(), "held": held}
    if rank == 0:
        (folder / f"parts{world}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    job, rank, world, folder, device = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), pathlib.Path(sys.argv[4]), sys.argv[5]
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    if device == "cuda":
        device = f"cuda:{rank}"
        torch.cuda.set_device(rank)
    if world > 1:
        dist.init_process_group("nccl" if "cuda" in device else "gloo", init_method=f"file://{folder}/meet-{job}-{world}", rank=rank,
                                world_size=world, **({"device_id": torch.device(device)} if "cuda" in device else {}))
    {"tensor_parallel": tensor_parallel, "sequence_parallel": sequence_parallel}[job](rank, world, folder, device)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
