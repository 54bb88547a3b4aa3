"""Express itself, through the Python package of the library (bindings/python)."""
import concurrent.futures
import os

import torch

import budgets as division
from policy import BLOCK, Policy
from rivals.prompt import Prompt

DEVICE = None  # of the caches, where it is not the model's: run.py --express-on
THREADS = os.cpu_count()


class Express(Policy):
    """One library cache per sequence, in blocks of BLOCK tokens (prefill_block); further options are fields of its config.

    What is kept is rounded to bfloat16 before it comes here; float16 (GPU) and float32 (CPU) hold that exactly. `bytes` are those of a cache of 16-bit entries,
    or of `slots`, the type that its entries are stored in then. `rotary`: the library is given the model's frequencies, and chooses protected entries by keys without
    their positions.
    """

    def __init__(self, spec, sequences, budget, seed=0, device="cpu", profile=False, power=2.0, pyramid=False, equal_bytes=False, slots=None, rotary=False,
                 **options):
        super().__init__(spec, sequences, budget, seed, device)
        import express_kv
        self.where = torch.device(DEVICE or device)
        fields = dict(layers=spec.layers, query_heads=spec.q_heads, kv_heads=spec.kv_heads, key_dim=spec.dim, scale=spec.scale, budget=budget,
                      prefill_block=BLOCK, device=str(self.where), **options)
        on_gpu = self.where.type == "cuda"
        if not on_gpu:  # sequences side by side, each on one core; a cache holds scratch for each of its threads
            fields["threads"] = 1
        if rotary:
            fields["rope_frequencies"] = [spec.rope_theta ** (-2 * i / spec.dim) for i in range(spec.dim // 2)]
        if profile:
            fields["head_share"] = [mass ** power for row in division.far_mass(spec) for mass in row]
        if pyramid:
            automatic = options.get("sinks", 4), -1, -1
            fields["head_settings"] = [(n, *automatic) for row in division.pyramid(spec, budget) for n in row]
        if equal_bytes:  # as many entries as the bytes of `budget` plain ones hold of all that the library allocates
            room, low, high = budget * spec.entry_bytes * spec.layers * spec.kv_heads, 16, 4 * budget
            while low < high:
                middle = (low + high + 1) // 2
                fits = express_kv.size(**{**fields, "budget": middle}, dtype=slots or "bfloat16")[0] <= room
                low, high = (middle, high) if fits else (low, middle - 1)
            fields["budget"] = low
        if options.get("head_budgets") == "observed":  # budgets are settled between chunks, and should be before an equal share is full
            self.chunk = max(BLOCK, fields["budget"] // BLOCK * BLOCK)
        # Since the library has it; without, all budgets are fixed.
        if fields.get("head_budgets") == "fixed" and "head_budgets" not in (express_kv.Cache.__doc__ or ""):
            del fields["head_budgets"]
        self.dtype = torch.float16 if on_gpu else torch.float32
        self.pool = concurrent.futures.ThreadPoolExecutor(1 if on_gpu else min(sequences, THREADS))
        self.caches = [express_kv.Cache(**fields, dtype=slots or str(self.dtype), seed=seed * 1000 + i) for i in range(sequences)]
        with express_kv.Cache(**fields, dtype=slots or "bfloat16") as cache:
            self.size = int(cache.nbytes)

    def extend(self, layer, q, k, v):
        q, k, v = (x.transpose(1, 2).to(self.where, self.dtype).contiguous() for x in (q, k, v))  # (S, n, heads, d)
        out = torch.empty_like(q)
        if self.where.type == "cuda":
            workspace = torch.empty(self.caches[0].workspace_size(q.shape[1]), dtype=torch.uint8, device=q.device)
            for i, cache in enumerate(self.caches):
                cache.prefill(layer, q[i], k[i], v[i], out[i], workspace=workspace)
        else:
            list(self.pool.map(lambda i: self.caches[i].prefill(layer, q[i], k[i], v[i], out[i]), range(self.sequences)))
        self.seen[layer] += q.shape[1]
        return out.transpose(1, 2).to(self.device, torch.float32)

    def bytes(self):
        return self.size

    def entries(self):
        return [[self.caches[0].entries(layer, head) for head in range(self.spec.kv_heads)] for layer in range(self.spec.layers)]


class ExpressPrompt(Prompt):
    """compress_kv: the prompt's keys and values, all layers alike."""

    def cut(self, layer, q, k, v):
        import express_kv
        dtype = torch.float16 if k.is_cuda else torch.float32
        parts = []
        for s in range(self.sequences):
            keys, values = (x[s].transpose(0, 1).to(dtype).contiguous() for x in (k, v))  # (prompt, H, d)
            parts.append([x.float() for x in express_kv.compress_kv(keys, values, budget=self.budget, scale=self.spec.scale, device=str(k.device),
                                                                    dtype=str(dtype), layers=1, first_layer=layer, weight_exponent=0.5)[:3]])
        keys, values, log_weight = (torch.stack(x) for x in zip(*parts))
        return keys, values, 0.5 * log_weight
