"""KV caches of transformers inside a fixed memory budget, with attention over what they keep.

    import numpy as np
    import express_kv

    cache = express_kv.Cache(query_heads=8, kv_heads=2, key_dim=64, budget=256, dtype="float32")
    k = v = np.zeros((1, 2, 64), np.float32)
    q = np.zeros((1, 8, 64), np.float32)
    cache.append(0, k, v)
    out = cache.attend(0, q)

Arrays are NumPy's, PyTorch's or any that speak DLPack; none is copied. float32, float16 and bfloat16 (PyTorch), on the CPU or, with a
library built for CUDA, on the device of the cache, in PyTorch's current stream. Calls run without the GIL.
"""

from __future__ import annotations

from ._cache import Cache, append_batch, attend_batch, compress_kv, size
from ._core import version
from ._errors import ArgumentError, Error, OutOfMemoryError, Status
from ._merge import merge

__all__ = [
    "ArgumentError",
    "Cache",
    "Error",
    "OutOfMemoryError",
    "Status",
    "append_batch",
    "attend_batch",
    "compress_kv",
    "merge",
    "size",
    "version",
]
__version__ = version()
