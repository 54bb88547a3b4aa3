"""The installed package against what the C ABI promises; NumPy, and PyTorch where it is."""

import gc
import pathlib
import pickle
import re
import subprocess
import sys
import threading

import numpy as np
import pytest

import express_kv
from express_kv import _core, _errors

try:
    import torch
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="PyTorch is not installed")
SHAPE = {"layers": 2, "query_heads": 6, "kv_heads": 2, "key_dim": 16, "value_dim": 8, "budget": 64, "seed": 3, "weight_exponent": 0.5}


def stream(n, seed=1, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = {"q": (n, 6, 16), "k": (n, 2, 16), "v": (n, 2, 8)}
    return {name: rng.standard_normal(shape, np.float32).astype(dtype) for name, shape in shapes.items()}


def cache_of(**more):
    return express_kv.Cache(**{**SHAPE, "dtype": "float32", "threads": 1, **more})


def filled(n=300, **more):
    cache, s = cache_of(**more), stream(n)
    for layer in range(2):
        cache.append(layer, s["k"], s["v"])
    return cache


def held(cache, layer=0, head=0):
    order = np.argsort((x := cache.export(layer, head, np.empty(0, np.float32)))[3])
    return [a[order].tolist() for a in x]


def softmax_attention(q, k, v, log_weight, alpha=0.5):
    logits = q @ k.T / 4 + alpha * log_weight
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p @ v / p.sum(-1, keepdims=True), logits.max(-1) + np.log(p.sum(-1))


def test_attention_is_softmax_over_what_is_exported():
    cache, q = filled(), stream(5, 9)["q"]
    lse = np.full((5, 6), np.nan, np.float32)
    out = cache.attend(1, q, lse=lse)
    assert out.shape == (5, 6, 8) and out.dtype == np.float32
    for h in range(6):
        k, v, log_weight, position = cache.export(1, h // 3, q)
        assert np.isclose(np.exp(log_weight).sum(), 300) and len(set(position)) == len(position) <= 64
        want, want_lse = softmax_attention(q[:, h], k, v, log_weight)
        np.testing.assert_allclose(out[:, h], want, atol=1e-5)
        np.testing.assert_allclose(lse[:, h], want_lse, atol=1e-5)


def test_budget_is_kept():
    bytes_, entries = express_kv.size(**SHAPE)
    cache = express_kv.Cache(**SHAPE)
    assert (cache.nbytes, entries) == (bytes_, 64)
    s = stream(5000)
    cache.append_all(np.stack([s["k"]] * 2), np.stack([s["v"]] * 2))
    assert cache.nbytes == bytes_ and cache.entries(0, 1) <= 64
    stats = cache.stats(1)
    assert stats["tokens"] == 5000 and stats["entries_budget"] == 128 and stats["halvings"] > 0
    double, more = express_kv.size(**{**SHAPE, "budget": 2 * bytes_, "budget_unit": "bytes"})
    assert bytes_ < double <= 2 * bytes_ and more > entries


def test_storage_in_eight_bits():
    cache, s = filled(dtype="int8"), stream(300)
    floating = filled(dtype="bfloat16")
    assert cache.nbytes < floating.nbytes
    for head in range(2):
        k, v, log_weight, position = cache.export(0, head, np.empty(0, np.float32))
        assert np.isclose(np.exp(log_weight).sum(), 300)
        for rows, stored in [(s["k"][position, head], k), (s["v"][position, head], v)]:
            step = np.abs(rows).max(-1, keepdims=True) / 127
            assert np.abs(stored - rows).max() > 0 and (np.abs(stored - rows) <= step / 2 * (1 + 2**-7)).all()
        out, q = cache.attend(0, s["q"][:4]), s["q"][:4]
        for h in range(3 * head, 3 * head + 3):
            np.testing.assert_allclose(out[:, h], softmax_attention(q[:, h], k, v, log_weight)[0], atol=1e-5)
    again = pickle.loads(pickle.dumps(cache))
    assert held(again) == held(cache) and again.save() == cache.save()
    with pytest.raises(express_kv.Error, match="k.dtype"):
        cache.append(0, s["k"].astype(np.int8), s["v"].astype(np.int8))


def test_prefill_is_the_same_whole_and_in_chunks():
    s = stream(200)
    whole, parts = cache_of(prefill_block=16), cache_of(prefill_block=16)
    assert whole.workspace_size(200) == 0
    a = whole.prefill(0, s["q"], s["k"], s["v"])
    b = np.concatenate([parts.prefill(0, *(s[x][i:i + 48] for x in "qkv")) for i in range(0, 200, 48)])
    np.testing.assert_array_equal(a, b)
    assert held(whole) == held(parts)


@pytest.mark.parametrize("block", [None, 64])
def test_progress(block):
    """Told as the work goes on, and it makes no difference, wherever the call begins."""
    more = {} if block is None else {"prefill_block": block}
    s, told = stream(9100), []
    caches = [cache_of(**more) for _ in range(2)]
    outs = []
    for cache, progress in zip(caches, (None, lambda done, total: told.append((done, total)))):
        cache.append(0, s["k"][:100], s["v"][:100], progress=progress)
        lse = np.empty((9000, 6), np.float32)
        outs.append((cache.prefill(0, *(s[x][100:] for x in "qkv"), lse=lse, progress=progress), lse))
        cache.append_all(np.stack([s["k"][:5000]] * 2), np.stack([s["v"][:5000]] * 2), progress=progress)
    pieces = [n - 100 % (block or 256) for n in (4096, 8192)]  # they end at multiples of the block
    assert told[:4] == [(100, 100), *((n, 9000) for n in pieces), (9000, 9000)]
    assert told[4:] == [(4096 - 9100 % (block or 256), 5000), (5000, 5000)]
    for a, b in zip(*outs):
        np.testing.assert_array_equal(a, b)
    assert held(caches[0]) == held(caches[1]) and held(caches[0], 1) == held(caches[1], 1)


def test_progress_may_end_a_call():
    cache, s = cache_of(), stream(9000)

    def enough(done, total):
        if done > 5000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.append(0, s["k"], s["v"], progress=enough)
    assert cache.stats(0)["tokens"] == 8192


def test_batches_are_single_calls():
    s = stream(4)
    single, batched = ([cache_of(budget=64 + 8 * i) for i in range(4)] for _ in range(2))
    for _ in range(100):
        for i, cache in enumerate(single):
            cache.append(1, s["k"][i:i + 1], s["v"][i:i + 1])
        express_kv.append_batch(batched, 1, s["k"], s["v"])
    want = np.concatenate([cache.attend(1, s["q"][i:i + 1]) for i, cache in enumerate(single)])
    np.testing.assert_array_equal(express_kv.attend_batch(batched, 1, s["q"]), want)
    with pytest.raises(express_kv.ArgumentError, match="caches"):
        express_kv.append_batch(batched[:1] * 4, 1, s["k"], s["v"])


def test_rollback_and_compress():
    cache, s = filled(rollback_reserve=4), stream(10, 2)
    before = held(cache)
    assert cache.rollback_available() >= 4
    cache.append_all(np.stack([s["k"][:3]] * 2), np.stack([s["v"][:3]] * 2))
    cache.rollback(3)
    assert cache.stats()["tokens"] == 300 and before != []
    with pytest.raises(express_kv.Error, match="tokens") as caught:
        cache.rollback(cache.rollback_available() + 1)
    assert caught.value.status == express_kv.Status.ROLLBACK_UNAVAILABLE
    assert cache.compress(2) >= 2 and cache.compress(1, layer=0) >= 1


def test_save_load_copy_pickle():
    cache, s = filled(), stream(50, 7)
    loaded, forked = cache_of(threads=2), cache_of()
    loaded.load(cache.save())
    forked.copy_from(cache)
    pickled = pickle.loads(pickle.dumps(cache))
    for other in (loaded, forked, pickled):
        assert held(other) == held(cache)
        other.append(0, s["k"], s["v"])
    cache.append(0, s["k"], s["v"])
    assert held(loaded) == held(forked) == held(pickled) == held(cache)
    data = bytearray(cache.save())
    data[-1] ^= 1
    with pytest.raises(express_kv.ArgumentError, match="checksum"):
        cache.load(bytes(data))
    with pytest.raises(express_kv.ArgumentError, match="another configuration"):
        cache_of(seed=4).load(cache.save())


def test_rotary_frequencies_change_what_is_kept():
    def kept(**more):
        return held(filled(**{"budget": 96, "head_budgets": "fixed", **more}))

    frequencies = np.float32(10000.0) ** (-np.arange(8, dtype=np.float32) / 8)
    plain, rotary = kept(), kept(rope_frequencies=frequencies)
    assert rotary != plain
    assert kept(rope_frequencies=frequencies.tolist(), protection_score="energy") == rotary
    assert kept(rope_frequencies=frequencies, protection_score="energy_value") != rotary
    assert kept(rope_frequencies=frequencies, rope_layout="interleaved") != rotary
    assert kept(rope_frequencies=None, protection_score="energy") == plain
    with pytest.raises(express_kv.ArgumentError, match="rope_frequency_count"):
        cache_of(rope_frequencies=np.ones(9, np.float32))
    with pytest.raises(ValueError, match="protection_score"):
        cache_of(protection_score="attention")
    pickled = pickle.loads(pickle.dumps(cache_of(rope_frequencies=frequencies)))
    with pytest.raises(express_kv.ArgumentError, match="rotary frequencies"):
        cache_of().load(pickled.save())


def test_compress_kv():
    s = stream(500)
    k, v, log_weight, position = express_kv.compress_kv(s["k"], s["v"], budget=64, dtype="float32")
    assert k.shape[0] == 2 and k.shape[1] <= 64 and k.shape[1:] == v.shape[1:2] + (16,)
    np.testing.assert_allclose(np.exp(log_weight).sum(1), 500, rtol=1e-5)
    for head in range(2):
        np.testing.assert_array_equal(k[head], s["k"][position[head], head])


@pytest.mark.parametrize("kind", ["numpy", pytest.param("torch", marks=needs_torch)])
def test_merge_is_attention_over_all_parts(kind):
    s, q = stream(300), stream(5, 9)["q"]
    cuts = [(0, 300), (0, 100), (100, 100), (100, 300)]  # the whole, and parts: one of them empty
    outs, lses = [], []
    for start, end in cuts:
        cache, lse = cache_of(budget=512), np.empty((5, 6), np.float32)
        cache.append(0, s["k"][start:end], s["v"][start:end])
        outs.append(cache.attend(0, q, lse=lse))
        lses.append(lse)
    if kind == "torch":
        outs, lses = ([torch.from_numpy(x) for x in xs] for xs in (outs, lses))
    out, lse = express_kv.merge(outs[1:], lses[1:])
    np.testing.assert_allclose(out, outs[0], atol=1e-6)
    np.testing.assert_allclose(lse, lses[0], atol=1e-6)
    out, lse = express_kv.merge(outs[2:3] * 2, lses[2:3] * 2)  # nothing at all
    assert not out.any() and np.isneginf(np.asarray(lse)).all()
    half = [x.astype(np.float16) if kind == "numpy" else x.half() for x in outs[1:]]
    assert express_kv.merge(half, lses[1:])[0].dtype == half[0].dtype
    for bad in ([[], []], [outs, lses[1:]], [outs[:2], [lses[0], lses[1][:2]]], [[outs[0], outs[1][:2]], lses[:2]]):
        with pytest.raises(ValueError, match="outs, lses"):
            express_kv.merge(*bad)


def test_errors_name_the_argument_and_change_nothing():
    cache, s = filled(), stream(3)
    before = held(cache)
    for call, match in [
        (lambda: cache.append(2, s["k"], s["v"]), "layer"),
        (lambda: cache.append(0, s["k"][:, :1], s["v"]), "k.shape"),
        (lambda: cache.append(0, s["k"], s["v"][:2]), "v.shape"),
        (lambda: cache.append(0, s["k"].astype(np.float64), s["v"]), "k.dtype"),
        (lambda: cache.attend(0, s["q"], np.empty((3, 6, 9), np.float32)), "out.shape"),
        (lambda: cache.entries(0, 5), "kv_head"),
        (lambda: express_kv.Cache(query_heads=3, kv_heads=2), "query_heads"),
        (lambda: express_kv.Cache(budget=3), "budget"),
    ]:
        with pytest.raises(express_kv.ArgumentError, match=match) as caught:
            call()
        assert isinstance(caught.value, ValueError) and caught.value.status != express_kv.Status.OK
    assert held(cache) == before
    with pytest.raises(TypeError, match="no field"):
        express_kv.Cache(budgets=3)
    with pytest.raises(ValueError, match="device"):
        express_kv.Cache(device="tpu")
    with pytest.raises(ValueError, match="dtype"):
        express_kv.Cache(dtype="float64")
    with pytest.raises(express_kv.OutOfMemoryError):
        express_kv.Cache(layers=64, kv_heads=64, query_heads=64, key_dim=1024, budget=1 << 27)


def test_statuses_are_those_of_the_library():
    for status in express_kv.Status:
        assert _core.status_name(status) == f"EXPRESS_STATUS_{status.name}"
    assert _core.status_name(len(express_kv.Status)) == "EXPRESS_STATUS_UNKNOWN"
    assert _errors.make_error(99, "x").status == 99


def test_a_closed_cache_refuses():
    with filled() as cache:
        pass
    assert cache.closed
    cache.close()
    with pytest.raises(express_kv.ArgumentError, match="cache"):
        cache.entries(0, 0)


def test_no_cuda_is_a_status():
    try:
        express_kv.Cache(**SHAPE, device="cuda")
    except express_kv.Error as error:
        assert error.status in (express_kv.Status.UNSUPPORTED, express_kv.Status.DEVICE_ERROR, express_kv.Status.DEVICE_MISMATCH)


def test_strided_and_readonly_arrays_are_taken_as_they_are():
    s = stream(40)
    k = np.repeat(s["k"], 2, axis=1)[:, ::2]
    k.flags.writeable = False
    a, b = cache_of(), cache_of()
    a.append(0, k, s["v"])
    b.append(0, s["k"], s["v"])
    assert held(a) == held(b)


def test_any_dlpack_producer():
    """Arrays of a library that only speaks DLPack, in and out, and where they are."""

    class Foreign:
        def __init__(self, x):
            self.x = x

        def __dlpack__(self, **more):
            return self.x.__dlpack__(**more)

        def __dlpack_device__(self):
            return self.x.__dlpack_device__()

    cache, same, s = cache_of(), cache_of(), stream(30)
    out = np.full((30, 6, 8), np.nan, np.float32)
    cache.append(0, Foreign(s["k"]), Foreign(s["v"]))
    same.append(0, s["k"], s["v"])
    given = Foreign(out)
    assert cache.attend(0, Foreign(s["q"]), given) is given
    np.testing.assert_array_equal(out, same.attend(0, s["q"]))
    with pytest.raises(TypeError, match="give one"):
        express_kv._arrays.empty(Foreign(out), (1,))


def test_outputs_are_written_in_place():
    cache, q = filled(), stream(2)["q"]
    big = np.full((2, 8, 8), 7, np.float32)
    out = big[:, 1:7]
    assert cache.attend(0, q, out) is out
    np.testing.assert_array_equal(out, cache.attend(0, q))
    assert (big[:, [0, 7]] == 7).all()


def test_threads_may_share_a_cache():
    cache, s = cache_of(threads=1), stream(4000)
    errors = []

    def work(seed):
        try:
            for i in range(seed, 400, 4):
                cache.append(0, s["k"][i:i + 1], s["v"][i:i + 1])
                assert np.isfinite(cache.attend(0, s["q"][i:i + 1])).all()
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and cache.stats(0)["tokens"] == 400


def test_the_gil_is_released():
    cache, s = cache_of(budget=512, threads=1), stream(60000)
    turns, done = 0, threading.Event()

    def work():
        cache.append(0, s["k"], s["v"])
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not done.is_set():
        turns += 1
    thread.join()
    assert turns > 100


def test_memory_is_freed():
    def resident():
        return int(open("/proc/self/statm").read().split()[1])

    def once():
        for _ in range(20):
            filled(10, budget=20000).close()
        gc.collect()

    once()
    before = resident()
    once()
    assert resident() - before < 4000


@needs_torch
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_torch_tensors(name):
    dtype = getattr(torch, name)
    s = {x: torch.from_numpy(y).to(dtype) for x, y in stream(200).items()}
    cache, plain = cache_of(dtype=dtype), cache_of(dtype=name)
    cache.append(0, s["k"], s["v"])
    plain.append(0, s["k"].float().numpy(), s["v"].float().numpy())
    assert held(cache) == held(plain)
    out = cache.attend(0, s["q"])
    assert out.dtype == dtype and out.shape == (200, 6, 8) and out.isfinite().all()
    assert cache.prefill(1, s["q"], s["k"], s["v"]).dtype == dtype
    with torch.no_grad():
        k = s["k"].clone()
    cache.append(1, k.requires_grad_(), s["v"])


@needs_torch
def test_torch_outputs_are_not_copies():
    cache, q = filled(), torch.from_numpy(stream(3)["q"])
    out = torch.full((3, 6, 8), float("nan"))
    address = out.data_ptr()
    assert cache.attend(0, q, out) is out and out.data_ptr() == address and out.isfinite().all()


def test_the_readme_runs():
    text = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S).group(1)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "2000 tokens" in run.stdout
