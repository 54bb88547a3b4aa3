"""express_kv.transformers under generate: models of each family, against transformers' DynamicCache and against express_kv.Cache."""

import copy
import json
import math
import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LlamaForCausalLM, StaticCache

import express_kv
from express_kv.transformers import ExpressCache, decode_graph, express_attention, express_mask
from express_kv.transformers._rotary import rope_frequencies
from families import FAMILIES, SIZE, model_of, prompts

MODEL = pathlib.Path(__file__).parents[3] / "examples" / "byte_lm" / "model"
torch.set_num_threads(2)


def generate(model, inputs, cache, new=40, **more):
    options = {"max_new_tokens": new, "do_sample": False, "output_logits": True, "return_dict_in_generate": True, **more}
    return model.generate(**inputs, past_key_values=cache, **options)


def same(a, b):
    """Token for token, and logits up to rounding."""
    assert torch.equal(a.sequences, b.sequences)
    torch.testing.assert_close(torch.stack(a.logits), torch.stack(b.logits), atol=5e-4, rtol=5e-4)
    assert len(a.sequences[0].unique()) > 8  # not a model that repeats itself whatever it attends to


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def llama():
    return model_of(FAMILIES["llama"][0])


def cache_for(model, budget=256, **options):
    return ExpressCache(config=model.config, budget=budget, **{"threads": 2, **options})


# ---- a budget that holds everything ----


@pytest.mark.parametrize("batch", [1, 4])
def test_generation_equals_the_exact_cache(family, batch):
    config, full = family
    inputs, model = prompts(batch, 50), model_of(config)
    cache = cache_for(model)
    got = generate(model, inputs, cache)
    exact = model_of(config, "eager")
    same(got, generate(exact, inputs, DynamicCache(config=config)))
    assert cache.get_seq_length() == 89 and len(cache) == 3
    if full:
        assert len(cache.sequences) == batch and cache.get_stored_length(full[0]) == 89
        stored = [s.stats(0)["tokens"] for s in cache.sequences]
        assert stored == (inputs["attention_mask"].sum(1) + 39).tolist()  # padding is not among them
    else:
        assert cache.sequences == [] and cache.nbytes == 0


@pytest.mark.parametrize("more", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"prefill_chunk_size": 16}], ids=str)
def test_beams_and_chunks_equal_the_exact_cache(family, more):
    config, _ = family
    inputs, model = prompts(3, 40), model_of(config)
    got = generate(model, inputs, cache_for(model), **more)
    model.set_attn_implementation("eager")
    same(got, generate(model, inputs, DynamicCache(config=config), **more))


def test_sampling_equals_the_exact_cache(llama):
    inputs = prompts(2, 30)
    runs = []
    for cache in (cache_for(llama), DynamicCache(config=llama.config)):
        torch.manual_seed(9)
        runs.append(generate(llama, inputs, cache, do_sample=True, temperature=0.7, num_return_sequences=2))
    same(*runs)


def test_a_conversation_goes_on_in_the_same_cache(llama):
    ours, exact = cache_for(llama), DynamicCache(config=llama.config)
    inputs = prompts(2, 30)
    for turn in range(3):
        a, b = (generate(llama, inputs, cache, new=15) for cache in (ours, exact))
        same(a, b)
        more = prompts(2, 12, seed=turn + 50)  # the second sequence's turn is shorter: padding in the middle
        inputs = {"input_ids": torch.cat([a.sequences, more["input_ids"]], 1),
                  "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(2, 15, dtype=torch.long), more["attention_mask"]], 1)}
    assert ours.get_seq_length() == exact.get_seq_length() == 98


def test_speculation_takes_tokens_back(llama):
    inputs = {"input_ids": torch.tensor([[7, 8, 9, 10, 11] * 8]), "attention_mask": torch.ones(1, 40, dtype=torch.long)}
    ours = cache_for(llama, rollback_reserve=8)
    a = generate(llama, inputs, ours, prompt_lookup_num_tokens=4)
    b = generate(llama, inputs, DynamicCache(config=llama.config))
    assert torch.equal(a.sequences, b.sequences)
    assert ours.get_seq_length() == 79


def test_a_prefix_is_forked(llama):
    prefix = cache_for(llama)
    inputs = prompts(1, 60)
    with torch.no_grad():
        llama(input_ids=inputs["input_ids"][:, :40], past_key_values=prefix)
    forks = [copy.deepcopy(prefix) for _ in range(2)]
    want = generate(llama, inputs, DynamicCache(config=llama.config))
    for fork in forks:
        same(generate(llama, inputs, fork), want)
    assert prefix.get_seq_length() == 40 and forks[0].get_seq_length() == 99


def test_without_an_express_cache_it_is_sdpa(llama):
    inputs = prompts(3, 30)
    exact = model_of(llama.config, "sdpa")
    with torch.no_grad():
        ours = llama(**inputs, use_cache=False).logits
        tokens = inputs["attention_mask"].bool()
        torch.testing.assert_close(ours[tokens], exact(**inputs, use_cache=False).logits[tokens])
    for make in (lambda: DynamicCache(config=llama.config), lambda: StaticCache(config=llama.config, max_cache_len=80), lambda: None):
        same(generate(llama, inputs, make(), num_beams=2), generate(exact, inputs, make(), num_beams=2))


# ---- a small budget ----


class Recorder:
    """The attention function "express", with what goes through it written down by layer."""

    def __init__(self):
        self.calls = []

    def __call__(self, module, query, key, value, mask, **kwargs):
        out = express_attention(module, query, key, value, mask, **kwargs)
        self.calls.append((module.layer_idx, query, key, value, mask, kwargs["scaling"], out[0]))
        return out


@pytest.fixture
def recorder():
    recorder = Recorder()
    AttentionInterface.register("recorded", recorder)
    AttentionMaskInterface.register("recorded", express_mask)
    yield recorder
    recorder.calls.clear()  # keys know their cache


@pytest.mark.parametrize("name", ["llama", "llama-mha", "qwen3", "mistral", "gemma", "gemma3"])
def test_a_small_budget_equals_direct_calls(name, recorder):
    config, full = FAMILIES[name]
    model, inputs = model_of(config, "recorded"), prompts(3, 200)
    cache = cache_for(model, 48, seed=3, prefill_block=32)
    generate(model, inputs, cache, new=60)

    kv_heads, dim = config.num_key_value_heads, config.head_dim
    scale = next(call[5] for call in recorder.calls if call[0] == full[0])
    lengths = inputs["attention_mask"].sum(1).tolist()
    for i, length in enumerate(lengths):
        direct = express_kv.Cache(layers=len(full), query_heads=4, kv_heads=kv_heads, key_dim=dim, budget=48, dtype="float32", seed=3,
                                  scale=scale, prefill_block=32, threads=1, rope_frequencies=rope_frequencies(config))
        for layer_idx, query, key, value, _, _, out in recorder.calls:
            if layer_idx not in full:
                continue
            q, k, v = (x[i].transpose(0, 1)[-length:] for x in (query, key, value))
            if q.shape[0] > 1:
                want = direct.prefill(full.index(layer_idx), q, k, v)
                assert not out[i, :-length].any()
            else:
                direct.append(full.index(layer_idx), k, v)
                want = direct.attend(full.index(layer_idx), q)
            assert torch.equal(out[i, -length:], want)
        assert direct.stats()["tokens"] == length + 59 and direct.stats()["halvings"] > 0
        assert direct.save() == cache.sequences[i].save()


def test_memory_is_bounded(llama):
    cache, lengths = cache_for(llama, 40), []
    inputs = prompts(2, 100)
    generate(llama, inputs, cache, new=1)
    size, told = cache.nbytes, express_kv.size(layers=3, query_heads=4, kv_heads=2, key_dim=16, budget=40, dtype="float32", threads=2,
                                                   rope_frequencies=rope_frequencies(llama.config))
    assert size == 2 * told[0]
    for _ in range(4):
        with torch.no_grad():
            llama(input_ids=prompts(2, 200)["input_ids"], past_key_values=cache)
        lengths.append((cache.get_seq_length(), cache.nbytes))
        assert 30 < cache.get_stored_length() <= 40
    assert lengths == [(300 + 200 * i, size) for i in range(4)]


def test_storage_in_eight_bits(llama):
    inputs = prompts(2, 60)
    caches = {dtype: cache_for(llama, dtype=dtype) for dtype in ("float32", "int8")}
    plain, eight = (generate(llama, inputs, cache, new=8) for cache in caches.values())
    assert caches["int8"].nbytes < 0.6 * caches["float32"].nbytes
    assert torch.equal(plain.logits[0], eight.logits[0])  # a prompt of one block sees itself as it came in
    assert 0 < (plain.logits[1] - eight.logits[1]).abs().max() < 0.1 * plain.logits[1].std()
    k = caches["int8"].sequences[0].export(0, 0, torch.empty(0))[0]
    codes = k / k.abs().amax(1, keepdim=True)  # steps of 1 / 126 or 1 / 127
    assert all(min((row * n - (row * n).round()).abs().max() for n in (126, 127)) < 1e-3 for row in codes)


def test_a_sequence_does_not_depend_on_its_batch(llama):
    inputs = prompts(3, 150)
    together = generate(llama, inputs, cache_for(llama, 40))
    for i, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        alone = generate(llama, {name: x[i:i + 1, -length:] for name, x in inputs.items()}, cache_for(llama, 40))
        assert torch.equal(alone.sequences[0], together.sequences[i, -alone.sequences.shape[1]:])


def test_a_small_budget_forgets(llama):
    inputs = prompts(1, 400)
    small, exact = (generate(llama, inputs, cache) for cache in (cache_for(llama, 16, sinks=1), DynamicCache(config=llama.config)))
    assert not torch.equal(small.sequences, exact.sequences)


def test_beams_are_reordered_within_a_small_budget(llama):
    """Beam search by hand: each beam's cache is what a cache of its own tokens holds."""
    # Without its position a key of the first layer is its token's alone: equal scores but for rounding, which a batch changes.
    options = dict(prefill_block=1, rope_frequencies=None)
    cache, generator = cache_for(llama, 40, **options), torch.Generator().manual_seed(2)
    tokens = torch.randint(2, 132, (4, 80), generator=generator)
    with torch.no_grad():
        for step in range(0, 80, 10):
            for t in range(step, step + 10):
                llama(input_ids=tokens[:, t:t + 1], past_key_values=cache)
            beams = torch.randint(0, 4, (4,), generator=generator)
            cache.reorder_cache(beams)
            tokens = torch.cat([tokens[beams, :step + 10], tokens[:, step + 10:]], 1)
        k0 = torch.empty(0)
        for i in range(4):
            alone = cache_for(llama, 40, **options)
            for t in range(80):
                llama(input_ids=tokens[i:i + 1, t:t + 1], past_key_values=alone)
            for layer in range(3):
                (k, *_, position), (want_k, *_, want) = (s.export(layer, 1, k0) for s in (cache.sequences[i], alone.sequences[0]))
                assert len(want) > 30 and torch.equal(position, want)
                torch.testing.assert_close(k, want_k, atol=1e-4, rtol=1e-4)  # matrix products round differently in a batch of four


# ---- the contract of cache layers, after transformers' tests of its caches ----


def stepped(model, n, cache=None, **options):
    cache = cache or cache_for(model, **options)
    with torch.no_grad():
        model(input_ids=prompts(2, n)["input_ids"], past_key_values=cache)
    return cache


def logits_after(model, cache, token=5):
    with torch.no_grad():
        return model(input_ids=torch.full((len(cache.sequences), 1), token), past_key_values=cache).logits[:, -1]


def test_lengths(llama):
    cache = cache_for(llama, 40)
    assert [cache.get_seq_length(), cache.get_stored_length(), cache.nbytes, len(cache)] == [0, 0, 0, 3]
    assert not cache.is_initialized and not cache.is_compileable and cache.is_sliding == [False] * 3
    stepped(llama, 100, cache)
    assert [cache.get_seq_length(i) for i in range(3)] == [100] * 3 and cache.get_stored_length(2) <= 40
    assert cache.get_mask_sizes(5, 0) == (5, 100) and cache.get_max_length() == -1 and cache.is_initialized


@pytest.mark.parametrize("new", [[[1], [0]], [[1, 1, 1], [0, 0, 0]], [[1, 0, 1], [0, 1, 0]]], ids=str)
def test_padding_is_not_appended(llama, new):
    cache, mask = stepped(llama, 30), torch.cat([torch.ones(2, 30, dtype=torch.long), torch.tensor(new)], 1)
    with torch.no_grad():
        llama(input_ids=torch.full((2, len(new[0])), 9), attention_mask=mask, past_key_values=cache)
    assert [s.stats()["tokens"] for s in cache.sequences] == [30 + sum(row) for row in new]
    assert cache.get_seq_length() == 30 + len(new[0])


def test_update_returns_the_new_keys_and_counts_them(llama):
    layer = cache_for(llama).layers[0]
    k, v = torch.randn(2, 2, 3, 16), torch.randn(2, 2, 3, 16)
    keys, values = layer.update(k, v)
    assert keys.data_ptr() == k.data_ptr() and torch.equal(keys, k) and values is v and layer.get_seq_length() == 3


def test_reset(llama):
    cache = stepped(llama, 50)
    first = logits_after(llama, cache)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.sequences == []
    assert torch.equal(first, logits_after(llama, stepped(llama, 50, cache)))


def test_crop_within_and_beyond_the_window(llama):
    inputs = prompts(2, 300)["input_ids"]
    cache = cache_for(llama, 64, rollback_reserve=6)
    with torch.no_grad():
        llama(input_ids=inputs[:, :299], past_key_values=cache)
        want = llama(input_ids=inputs[:, 299:], past_key_values=cache).logits
        cache.crop(-1)
        assert cache.get_seq_length() == 299
        assert torch.equal(llama(input_ids=inputs[:, 299:], past_key_values=cache).logits, want)
        available = cache.sequences[0].rollback_available()
        assert 6 <= available < 300
        before = [s.save() for s in cache.sequences]
        with pytest.raises(ValueError, match=f"only the last {available} .* rollback_reserve"):
            cache.crop(-available - 1)
        with pytest.raises(ValueError, match="minus the number"):
            cache.crop(10)
        assert [s.save() for s in cache.sequences] == before and cache.get_seq_length() == 300
        cache.crop(0)
        cache.crop(-available)
    assert cache.get_seq_length() == 300 - available == cache.sequences[1].stats()["tokens"]


def test_crop_does_not_reach_into_padding(llama):
    cache = cache_for(llama)
    with torch.no_grad():
        llama(**prompts(2, 9), past_key_values=cache)
    with pytest.raises(ValueError, match="padding"):
        cache.crop(-7)
    cache.crop(torch.tensor(-6))
    assert cache.get_seq_length() == 3 and [s.stats()["tokens"] for s in cache.sequences] == [3, 0]


def test_a_refused_crop_leaves_sliding_layers_alone():
    config, _ = FAMILIES["gemma3"]
    model = model_of(config)
    cache = stepped(model, 10, budget=256, window=2, rollback_reserve=2)
    with pytest.raises(ValueError, match="crop"):
        cache.crop(-10_000)
    assert [cache.get_seq_length(i) for i in range(3)] == [10] * 3
    cache.crop(-2)
    assert [cache.get_seq_length(i) for i in range(3)] == [8] * 3


def test_reorder_repeat_and_select(llama):
    cache = stepped(llama, 60, budget=40)
    a, b = (s.save() for s in cache.sequences)
    assert a != b

    def held():
        return ["ab"[[a, b].index(s.save())] for s in cache.sequences]

    cache.reorder_cache(torch.tensor([1, 0]))
    assert held() == ["b", "a"]
    cache.batch_repeat_interleave(3)
    assert held() == ["b", "b", "b", "a", "a", "a"]
    cache.batch_select_indices(torch.tensor([0, 4, 3]))
    assert held() == ["b", "a", "a"]
    cache.batch_select_indices(torch.tensor([True, False, True]))
    assert held() == ["b", "a"]
    cache.reorder_cache(torch.tensor([1, 1]))
    assert held() == ["a", "a"] and cache.get_seq_length() == 60
    with pytest.raises(IndexError, match="sequences"):
        cache.batch_select_indices(torch.tensor([2]))
    assert held() == ["a", "a"]


def test_layers_must_be_asked_together(llama):
    cache = stepped(llama, 20)
    cache.layers[0].crop(-1)
    with pytest.raises(RuntimeError, match="some layers only"):
        stepped(llama, 5, cache)
    with pytest.raises(RuntimeError, match="some layers only"):
        cache.layers[0].crop(-1)
    cache.reset()
    stepped(llama, 20, cache)
    for layer in cache.layers:
        layer.crop(-1)
    assert cache.get_seq_length() == 19 == stepped(llama, 1, cache).get_seq_length() - 1


# ---- refusals ----


def test_another_attention_implementation_is_refused(llama):
    model = model_of(llama.config, "sdpa")
    cache = cache_for(model)
    with pytest.raises(RuntimeError, match='set_attn_implementation."express"'):
        stepped(model, 10, cache)
    cache.reset()
    model.set_attn_implementation("express")
    assert stepped(model, 10, cache).get_seq_length() == 10


def test_what_express_cannot_do_is_refused(llama):
    ids = prompts(2, 10)["input_ids"]
    cache = cache_for(llama)

    def refused(match, model=llama, error=NotImplementedError, **more):
        with pytest.raises(error, match=match):
            model(**{"input_ids": ids, "past_key_values": cache, **more})
        assert cache.get_seq_length() == 0 and cache.sequences == []

    refused("no_grad")
    with torch.no_grad():
        refused("4|causal masks", attention_mask=torch.ones(2, 1, 10, 10, dtype=torch.bool))
        refused("output_attentions", output_attentions=True)
        refused("expected shape .batch, 10.", error=ValueError, attention_mask=torch.ones(2, 9))
        dropping = model_of(type(llama.config)(**SIZE, attention_dropout=0.5)).train()
        refused("dropout", dropping)
        gemma2 = FAMILIES["gemma2-uncapped"][0]
        capped = model_of(type(gemma2)(**SIZE, attn_logit_softcapping=50.0, layer_types=["full_attention"] * 3))
        cache = cache_for(capped)
        refused("soft-capped", capped)
    assert stepped(llama, 10).get_seq_length() == 10


def test_options_are_checked(llama):
    with pytest.raises(TypeError, match="key_dim: not an option"):
        cache_for(llama, key_dim=3)
    with pytest.raises(express_kv.ArgumentError, match="budget"):
        stepped(llama, 10, cache_for(llama, 3))
    with pytest.raises(TypeError, match="no field"):
        stepped(llama, 10, cache_for(llama, budgets=3))
    cache = stepped(llama, 10)
    with torch.no_grad(), pytest.raises(ValueError, match="2 sequences"):
        llama(input_ids=prompts(3, 4)["input_ids"], past_key_values=cache)
    with pytest.raises(NotImplementedError, match="offload"):
        cache.layers[0].offload()


def test_a_forward_pass_that_fails_must_be_reset(llama):
    cache = stepped(llama, 10)

    def fail(*_):
        raise InterruptedError("stopped")

    hook = llama.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(InterruptedError):
        stepped(llama, 3, cache)
    hook.remove()
    with pytest.raises(RuntimeError, match="did not finish.*reset"):
        stepped(llama, 3, cache)
    cache.reset()
    assert stepped(llama, 3, cache).get_seq_length() == 3


# ---- the repository's byte-level model ----


@pytest.fixture(scope="module")
def byte_lm():
    return LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="express").eval()


def text(n, offset=0):
    return torch.tensor([[256, *(MODEL / "demo.txt").read_bytes()[offset:offset + n - 1]]])


def test_byte_lm_is_the_model(byte_lm):
    for prompt in json.loads((MODEL / "reference.json").read_text())["prompts"]:
        cache = cache_for(byte_lm, 4096)
        with torch.no_grad():
            logits = byte_lm(text(prompt["length"] + 1, prompt["offset"]), past_key_values=cache, logits_to_keep=1).logits[0, -1]
        top = logits.topk(5)
        assert top.indices.tolist() == prompt["top5_ids"]
        torch.testing.assert_close(top.values, torch.tensor(prompt["top5_logits"]), atol=2e-3, rtol=1e-3)


def test_byte_lm_generates_the_same_text(byte_lm):
    inputs = {"input_ids": text(700), "attention_mask": torch.ones(1, 700, dtype=torch.long)}
    ours, exact = (generate(byte_lm, inputs, c, new=120) for c in (cache_for(byte_lm, 1024), DynamicCache(config=byte_lm.config)))
    assert torch.equal(ours.sequences, exact.sequences)


def bits(model, ids, cache):
    with torch.no_grad():
        logits = model(ids, past_key_values=cache).logits
    return torch.nn.functional.cross_entropy(logits[0, 1000:-1], ids[0, 1001:]).item() / math.log(2)


def test_byte_lm_reads_on_within_a_budget(byte_lm):
    ids = text(4000)
    exact = bits(byte_lm, ids, DynamicCache(config=byte_lm.config))
    cache = cache_for(byte_lm, 512, prefill_block=64)
    ours = bits(byte_lm, ids, cache)
    assert cache.get_seq_length() == 4000 and 400 < cache.get_stored_length() <= 512
    assert abs(ours - exact) < 0.15 and exact < 1.6, (ours, exact)


def test_decode_graph_changes_nothing_without_a_gpu(llama):
    inputs, forward = prompts(2, 30), llama.forward
    want = generate(llama, inputs, cache_for(llama))
    with decode_graph(llama):
        assert "forward" in vars(llama)
        same(generate(llama, inputs, cache_for(llama)), want)
        same(generate(llama, inputs, DynamicCache(config=llama.config)), want)
    assert "forward" not in vars(llama) and llama.forward == forward


# ---- a GPU ----


def on_gpu(dtype):
    """A model there, of dims that the CUDA backend has, and its inputs."""
    if not torch.cuda.is_available():
        pytest.skip("NO GPU: express_kv.transformers IS NOT TESTED ON ONE")
    try:
        express_kv.Cache(key_dim=64, device="cuda").close()
    except express_kv.Error as error:
        pytest.skip(str(error))
    model = model_of(type(FAMILIES["llama"][0])(**{**SIZE, "head_dim": 64, "initializer_range": 0.1})).to("cuda", dtype)
    return model, {name: x.cuda() for name, x in prompts(3, 200).items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_on_a_gpu(dtype):
    """Beside the exact cache, in a stream of its own."""
    model, inputs = on_gpu(dtype)
    follow = torch.randint(2, 132, (20, 3, 1), generator=torch.Generator().manual_seed(0)).cuda()

    def logits(cache):
        with torch.no_grad():
            mask, got = inputs["attention_mask"], [model(**inputs, past_key_values=cache).logits[:, -1:]]
            for token in follow:
                mask = torch.cat([mask, torch.ones_like(token)], 1)
                got.append(model(input_ids=token, attention_mask=mask, past_key_values=cache).logits)
        return torch.cat(got, 1).double()

    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        ours, exact = logits(cache_for(model, 512)), logits(DynamicCache(config=model.config))
        small = cache_for(model, 64)
        logits(small)
        error = ((ours - exact).norm() / exact.norm()).item()
        beams = generate(model, inputs, cache_for(model, 64), num_beams=3)
    torch.cuda.synchronize()
    assert error < (0.03 if dtype == torch.bfloat16 else 0.005)
    assert small.get_seq_length() == 220 and 40 < small.get_stored_length() <= 64 and beams.sequences.shape == (3, 240)


@pytest.mark.parametrize("budget", [64, 512])
def test_decode_graph_on_a_gpu(budget, monkeypatch):
    """What it gives is what forward passes give, also where they take turns; and it is a graph that does."""
    model, inputs = on_gpu(torch.float32)
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(1) or replay(graph))
    plain, graphed = cache_for(model, budget, rollback_reserve=4), cache_for(model, budget, rollback_reserve=4)
    want = generate(model, inputs, plain, new=60)
    assert not replays
    with decode_graph(model):
        got = generate(model, inputs, graphed, new=60)
        assert len(replays) == 58  # all but the prompt and the step after it
        assert torch.equal(got.sequences, want.sequences)
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=2e-4, rtol=2e-4)
        assert graphed.get_seq_length() == plain.get_seq_length() == 259
        for a, b in zip(graphed.sequences, plain.sequences):  # the plans that were made ahead are taken back
            assert a.stats()["tokens"] == b.stats()["tokens"] and a.entries(1, 0) == b.entries(1, 0)
        logits = []
        for cache in (graphed, plain):  # on by hand: tokens taken back, several at once, sequences that change places, a copy
            mask = torch.cat([inputs["attention_mask"], torch.ones(3, 59, device="cuda", dtype=torch.long)], 1)
            cache.crop(-2)
            with torch.no_grad():
                model(torch.full((3, 5), 7, device="cuda"), attention_mask=torch.cat([mask[:, :-2], mask[:, -5:]], 1), past_key_values=cache)
                cache.reorder_cache(torch.tensor([2, 0, 1]))
                fork = copy.deepcopy(cache)
                for turn in (cache, fork, cache):
                    for t in range(4):
                        n = turn.get_seq_length()
                        position = torch.full((3, 1), n, device="cuda")
                        logits.append(model(torch.full((3, 1), 9 + t, device="cuda"), position_ids=position, past_key_values=turn).logits)
        assert len(replays) == 58 + 2 * 3 * 3  # each of the turns begins with a forward pass
        half = len(logits) // 2
        torch.testing.assert_close(torch.stack(logits[:half]), torch.stack(logits[half:]), atol=2e-4, rtol=2e-4)
        beams = [generate(model, inputs, cache_for(model, budget), num_beams=3).sequences]
    beams.append(generate(model, inputs, cache_for(model, budget), num_beams=3).sequences)
    assert torch.equal(*beams)


def test_decode_graph_of_a_model_that_cannot_be_captured():
    model, inputs = on_gpu(torch.float32)
    want = generate(model, inputs, cache_for(model, 64))
    hook = model.model.layers[1].register_forward_hook(lambda module, args, out: out if out[0].sum().item() is None else None)
    with decode_graph(model), pytest.warns(UserWarning, match="cannot be captured"):
        got = generate(model, inputs, cache_for(model, 64))
    hook.remove()
    assert torch.equal(got.sequences, want.sequences)


# ---- the documentation and the benchmark ----


def test_the_page_runs():
    page = (pathlib.Path(__file__).parents[3] / "docs" / "transformers.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) >= 2
    space = {}
    for block in blocks:
        exec(compile(block, "docs/transformers.md", "exec"), space)
    assert space["text"].shape[0] == 2 and space["cache"].get_stored_length() <= 128


def test_the_benchmark_runs(tmp_path):
    script = pathlib.Path(__file__).parents[3] / "bench" / "transformers_generate.py"
    subprocess.run([sys.executable, script, "--tiny", "--contexts", "300", "--budget", "64", "--new", "5", "--repeat", "1", "--out", tmp_path / "x.json"],
                   check=True, capture_output=True)
    exact, express, graph = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert (exact["cache"], express["cache"], graph["cache"]) == ("dynamic", "express", "graph") and len(express["runs"][0]["step_s"]) == 4
    assert express["runs"][0]["stored"] <= 64 and exact["runs"][0]["stored"] == 304
    assert exact["runs"][0]["kv_bytes"] == 304 * 2 * 2 * 2 * 32 * 4 > express["runs"][0]["kv_bytes"]
