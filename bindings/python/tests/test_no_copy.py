"""The pointers that the C ABI was given, as recorded by bindings/no_copy, are those of the arrays."""

import os
import pathlib

import numpy as np
import pytest

import express_kv


@pytest.mark.skipif("EXPRESS_POINTERS" not in os.environ, reason="run by test.sh, under the recorder of bindings/no_copy")
def test_nothing_is_copied():
    record = pathlib.Path(os.environ["EXPRESS_POINTERS"])
    record.unlink(missing_ok=True)
    cache = express_kv.Cache(query_heads=4, kv_heads=2, key_dim=16, budget=64)
    q, k, wide = np.ones((2, 4, 16), np.float32), np.ones((2, 2, 16), np.float32), np.ones((2, 3, 16), np.float16)
    out, lse = np.empty((2, 4, 16), np.float32), np.empty((2, 4), np.float32)
    cache.append(0, k, wide[:, 1:])  # neither contiguous nor of the cache's type
    cache.attend(0, q, out, lse=lse)
    cache.prefill(0, q, k, k, out)
    at = lambda x: f"{x.ctypes.data:x}"  # noqa: E731
    assert record.read_text().splitlines() == [
        f"express_append {at(k)} {at(wide[:, 1:])}",
        f"express_attend {at(q)} {at(out)} {at(lse)}",
        f"express_prefill {at(q)} {at(k)} {at(k)} {at(out)} 0",
    ]
