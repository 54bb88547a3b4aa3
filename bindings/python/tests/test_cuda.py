"""Tensors of a GPU: the installed package beside its CPU backend, in streams, in graphs, and with other libraries' arrays."""

import os
import pathlib
import pickle

import pytest

torch = pytest.importorskip("torch")

import express_kv


def why_not():
    """Why nothing here can run, or None."""
    if not torch.cuda.is_available():
        return "NO GPU: CUDA TENSORS ARE NOT TESTED"
    try:
        express_kv.Cache(key_dim=64, device="cuda").close()
    except express_kv.Error as error:
        return f"THE LIBRARY CANNOT USE THE GPU: {error}"
    return None


reason = why_not()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))
HEADS, KV, DIM = 8, 2, 64
DTYPES = ["float32", "float16", "bfloat16"]
NEAR = {"float32": 2e-3, "float16": 5e-3, "bfloat16": 3e-2, "int8": 3e-2}


def cache_of(device="cuda", dtype="float32", **more):
    options = {"layers": 2, "query_heads": HEADS, "kv_heads": KV, "key_dim": DIM, "budget": 128, "prefill_block": 64, "seed": 3}
    return express_kv.Cache(**{**options, "device": device, "dtype": dtype, **more})


def stream(n, seed=1, dtype="float32", device="cuda"):
    """q (n, HEADS, DIM), k and v (n, KV, DIM)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, heads, DIM, generator=generator).to(device, getattr(torch, dtype)) for heads in (HEADS, KV, KV)]


def held(cache, layer=0, head=0):
    """Positions, keys, values and log weights, by position."""
    like = torch.empty(0, device="cuda" if cache._cuda else "cpu")
    k, v, log_weight, position = (x.cpu() for x in cache.export(layer, head, like))
    order = position.argsort()
    return [x[order].tolist() for x in (position, k, v, log_weight)]


def off(got, want):
    return ((got.double().cpu() - want.double().cpu()).norm() / want.double().norm().cpu()).item()


@pytest.mark.parametrize("dtype", [*DTYPES, "int8"])
def test_beside_the_cpu(dtype):
    """prefill, append, attend, batches: what is kept is what the CPU keeps but for near ties, and attention agrees."""
    there, here = cache_of(dtype=dtype, budget=512), cache_of("cpu", dtype, budget=512)
    q, k, v = stream(400, dtype="bfloat16" if dtype == "int8" else dtype)  # no tensor has 8 bits
    lse, lse_here = torch.empty(400, HEADS, device="cuda"), torch.empty(400, HEADS)
    out = there.prefill(0, q, k, v, lse=lse)
    want = here.prefill(0, q.cpu(), k.cpu(), v.cpu(), lse=lse_here)
    assert out.device == q.device and out.dtype == q.dtype and off(out, want) < NEAR[dtype] and off(lse, lse_here) < NEAR[dtype]
    there.append(1, k, v)
    here.append(1, k.cpu(), v.cpu())
    for layer in range(2):
        assert off(there.attend(layer, q), here.attend(layer, q.cpu())) < NEAR[dtype]
        assert held(there, layer) == held(here, layer)
    express_kv.append_batch([there], 0, k[:1], v[:1])
    express_kv.append_batch([here], 0, k[:1].cpu(), v[:1].cpu())
    assert off(express_kv.attend_batch([there], 0, q[:1]), express_kv.attend_batch([here], 0, q[:1].cpu())) < NEAR[dtype]
    assert there.stats(0)["tokens"] == 401 and there.stats(1)["tokens"] == 400


def test_small_budgets_and_all_layers():
    cache = cache_of(layers=2)
    _, k, v = stream(3000)
    cache.append_all(torch.stack([k, k]), torch.stack([v, v]))
    position, _, _, log_weight = held(cache, 1, 1)
    assert len(position) <= 128 and abs(sum(torch.tensor(log_weight).double().exp().tolist()) - 3000) < 0.5
    assert cache.nbytes == express_kv.size(layers=2, query_heads=HEADS, kv_heads=KV, key_dim=DIM, budget=128, prefill_block=64,
                                           dtype="float32", device="cuda")[0]
    with pytest.raises(express_kv.Error) as error:
        cache.rollback(1000)
    assert error.value.status == express_kv.Status.ROLLBACK_UNAVAILABLE


def test_nothing_is_copied():
    """PyTorch allocates nothing and starts no kernel of its own, whatever the strides; results land where they are wanted."""
    cache = cache_of(dtype="bfloat16")
    wide = torch.randn(KV + 1, 20, DIM, device="cuda", dtype=torch.bfloat16)
    k = v = wide[1:].transpose(0, 1)  # (20, KV, DIM), heads apart
    q = torch.randn(20, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    out, lse = torch.full((20, HEADS, DIM), float("nan"), device="cuda", dtype=torch.bfloat16), torch.empty(20, HEADS, device="cuda")
    workspace = torch.empty(cache.workspace_size(20), dtype=torch.uint8, device="cuda")
    addresses = [x.data_ptr() for x in (q, k, v, out, lse)]
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    cache.append(0, k, v)
    assert cache.attend(0, q, out, lse=lse) is out
    cache.prefill(1, q, k, v, out, workspace=workspace)
    express_kv.append_batch([cache], 0, k[:1], v[:1])
    assert express_kv.attend_batch([cache], 0, q[:1], out[:1]).data_ptr() == out.data_ptr()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert [x.data_ptr() for x in (q, k, v, out, lse)] == addresses and out.isfinite().all()


@pytest.mark.skipif("EXPRESS_POINTERS" not in os.environ, reason="run by test.sh, under the recorder of bindings/no_copy")
def test_the_pointers_are_the_tensors():
    record = pathlib.Path(os.environ["EXPRESS_POINTERS"])
    record.unlink(missing_ok=True)
    cache = cache_of()
    q, k, wide = torch.ones(2, HEADS, DIM, device="cuda"), torch.ones(2, KV, DIM, device="cuda"), torch.ones(2, KV + 1, DIM, device="cuda").half()
    out, lse = torch.empty_like(q), torch.empty(2, HEADS, device="cuda")
    cache.append(0, k, wide[:, 1:])
    cache.attend(0, q, out, lse=lse)
    cache.prefill(0, q, k, k, out)
    at = lambda x: f"{x.data_ptr():x}"  # noqa: E731
    assert record.read_text().splitlines() == [
        f"express_append {at(k)} {at(wide[:, 1:])}",
        f"express_attend {at(q)} {at(out)} {at(lse)}",
        f"express_prefill {at(q)} {at(k)} {at(k)} {at(out)} 0",
    ]


@pytest.mark.parametrize("others", [False, True], ids=["current stream", "stream by hand"])
def test_work_follows_the_stream(others):
    """Tensors are made late, in a stream that is held up: the calls do not wait for them, and read them when they are there."""
    q, k, v = stream(300)
    want_cache = cache_of()
    want_cache.append(0, k, v)
    want = want_cache.attend(0, q)
    torch.cuda.synchronize()
    cache, side = cache_of(), torch.cuda.Stream()
    late_q, late_k, late_v = (torch.zeros_like(x) for x in (q, k, v))
    out = torch.empty_like(q)
    torch.cuda.synchronize()
    if others:  # the stream given; arrays that are not PyTorch's, whose producer is asked to order its work before that stream
        cache.set_stream(side.cuda_stream)
    with torch.cuda.stream(side):
        torch.cuda._sleep(400_000_000)  # some 0.2 s
        for late, x in zip((late_q, late_k, late_v), (q, k, v)):
            late.copy_(x)
        if others:
            asked = []
            cache.append(0, Foreign(late_k, asked), Foreign(late_v, asked))
            cache.attend(0, Foreign(late_q, asked), Foreign(out, asked))
            assert asked == [side.cuda_stream] * 4
        else:
            cache.append(0, late_k, late_v)
            cache.attend(0, late_q, out)
        busy = not side.query()
    assert busy, "a call waited for the stream"
    side.synchronize()
    assert torch.equal(out, want)


class Foreign:
    """An array of another library: nothing but DLPack."""

    def __init__(self, x, asked):
        self.x, self.asked = x, asked

    def __dlpack__(self, *, stream=None, **more):
        self.asked.append(stream)
        return self.x.__dlpack__(stream=-1, **more)

    def __dlpack_device__(self):
        return self.x.__dlpack_device__()


def test_a_cache_changes_streams():
    """Each call in its own stream, ordered by events, as PyTorch's users do."""
    q, k, v = stream(200)
    cache, want = cache_of(), cache_of()
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    last = None
    for i in range(0, 200, 10):
        with torch.cuda.stream(streams[i % 3]):
            if last is not None:
                torch.cuda.current_stream().wait_stream(last)
            cache.append(0, k[i:i + 10], v[i:i + 10])
            last = torch.cuda.current_stream()
    torch.cuda.current_stream().wait_stream(last)
    for i in range(0, 200, 10):
        want.append(0, k[i:i + 10], v[i:i + 10])
    assert torch.equal(cache.attend(0, q), want.attend(0, q))


def test_save_load_pickle_copy():
    fixed = {"head_budgets": "fixed"}  # what "auto" means depends on the device
    cache = cache_of(**fixed)
    q, k, v = stream(500)
    cache.append(0, k[:300], v[:300])
    data = cache.save()
    loaded, forked, here = cache_of(), cache_of(), cache_of("cpu", **fixed)
    loaded.load(data)
    here.load(data)  # saved on a GPU, loaded without one, and back
    again = cache_of()
    again.load(here.save())
    forked.copy_from(cache)
    pickled = pickle.loads(pickle.dumps(cache))
    assert held(here) == held(cache)
    for other in (loaded, forked, pickled, again, cache):
        other.append(0, k[300:], v[300:])
    for other in (loaded, forked, pickled, again):
        assert held(other) == held(cache) and torch.equal(other.attend(0, q), cache.attend(0, q))


def test_compress_kv_and_merge():
    q, k, v = stream(2000)
    out_k, out_v, log_weight, position = express_kv.compress_kv(k, v, budget=256, dtype="float32", device="cuda")
    assert out_k.is_cuda and torch.allclose(log_weight.exp().sum(1), torch.full((KV,), 2000.0, device="cuda"), rtol=1e-4)
    for head in range(KV):
        assert torch.equal(out_k[head], k[position[head], head]) and torch.equal(out_v[head], v[position[head], head])
    whole, parts = cache_of(budget=4096), [cache_of(budget=2048) for _ in range(2)]
    whole.append(0, k, v)
    outs, lses = [], []
    for part, cut in zip(parts, (slice(0, 700), slice(700, 2000))):
        part.append(0, k[cut], v[cut])
        lse = torch.empty(2000, HEADS, device="cuda")
        outs.append(part.attend(0, q, lse=lse))
        lses.append(lse)
    lse = torch.empty(2000, HEADS, device="cuda")
    want = whole.attend(0, q, lse=lse)
    got, got_lse = express_kv.merge(outs, lses)
    assert got.is_cuda and off(got, want) < 1e-3 and off(got_lse, lse) < 1e-4


def test_a_graph_replays_steps():
    """Captured once, prepared ahead, replayed for every token: the bits of eager steps."""
    n = 300
    q, k, v = stream(n, 5)
    eager, caches = [cache_of() for _ in range(2)], [cache_of() for _ in range(2)]
    want = []
    for t in range(n):
        for layer in range(2):
            express_kv.append_batch(eager, layer, k[t].repeat(2, 1, 1), v[t].repeat(2, 1, 1))
            out = express_kv.attend_batch(eager, layer, q[t].repeat(2, 1, 1))
        want.append(out.clone())
    step_q, step_k, step_v = (torch.zeros(2, heads, DIM, device="cuda") for heads in (HEADS, KV, KV))
    out = torch.empty_like(step_q)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(2):
            express_kv.append_batch(caches, layer, step_k, step_v)
            express_kv.attend_batch(caches, layer, step_q, out)
    stream_ = torch.cuda.current_stream().cuda_stream
    for cache in caches:
        cache.set_stream(stream_)
    for t in range(n):
        if t % 50 == 0:
            torch.cuda.synchronize()
            for cache in caches:
                cache.step_prepare(60)  # ten too many
                if t:
                    assert cache.stats()["tokens"] == t
        for to, x in ((step_q, q), (step_k, k), (step_v, v)):
            to.copy_(x[t].expand_as(to))
        graph.replay()
        assert torch.equal(out, want[t]), t
        if t % 50 == 49:
            torch.cuda.synchronize()
            for cache in caches:
                cache.step_cancel()
    assert held(caches[1]) == held(eager[1])


def test_refusals():
    cache = cache_of()
    q, k, v = stream(3)
    for call, match in [
        (lambda: cache.append(0, k.cpu(), v.cpu()), "k"),
        (lambda: cache.attend(0, q, torch.empty(3, HEADS, DIM)), "out"),
        (lambda: cache.append(0, k.flatten()[1:1 + KV * DIM].view(1, KV, DIM), v[:1]), "k.data"),
        (lambda: cache_of("cpu").append(0, k, v), "k"),
    ]:
        with pytest.raises(express_kv.ArgumentError, match=match):
            call()
    with pytest.raises(express_kv.Error, match="prefill_block|key_dim"):
        cache_of(key_dim=48)
    assert cache.stats()["tokens"] == 0


def test_cupy_arrays():
    """CuPy's arrays, in CuPy's current stream."""
    cupy = pytest.importorskip("cupy")
    q, k, v = stream(300)
    want = cache_of()
    want.append(0, k, v)
    want_out = want.attend(0, q)
    torch.cuda.synchronize()
    cache = cache_of()
    with cupy.cuda.Stream(non_blocking=True) as side:
        cq, ck, cv = (cupy.asarray(x.cpu().numpy()) for x in (q, k, v))
        cache.append(0, ck, cv)
        out = cache.attend(0, cq)
        given = cupy.empty_like(out)
        assert cache.attend(0, cq, given) is given
        side.synchronize()
    assert isinstance(out, cupy.ndarray) and torch.equal(torch.from_numpy(cupy.asnumpy(out)).cuda(), want_out)
    assert (out == given).all()
