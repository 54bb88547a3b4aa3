"""overhead.c in Python, with NumPy's arrays; overhead.py CALLS torch: with PyTorch's."""
import sys
from time import perf_counter_ns

import numpy as np

import express_kv

calls, dim = int(sys.argv[1]), 16
i = np.arange(dim)
q, k, v = (((i * a % b) / b).astype(np.float32).reshape(1, 1, dim) for a, b in ((5, 7), (3, 5), (7, 11)))
out = np.empty((1, 1, dim), np.float32)
if sys.argv[2:] == ["torch"]:
    import torch

    q, k, v, out = (torch.from_numpy(x) for x in (q, k, v, out))
cache = express_kv.Cache(key_dim=dim, budget=16, threads=1)
start = perf_counter_ns()
for _ in range(calls):
    cache.append(0, k, v)
    cache.attend(0, q, out)
step = perf_counter_ns() - start
start = perf_counter_ns()
for _ in range(calls):
    cache.nbytes
look = perf_counter_ns() - start
print(f"{step / calls:.1f} {look / calls:.1f} {np.asarray(out).astype(np.float64).sum():.4f} {cache.stats(0)['halvings']}")
