"""Express itself as a policy of the harness. Needs the Python package of the library."""
import pytest
import torch

import registry
from plain import Stream
from policy import ModelSpec
from protocols import PrefillThenExact
from rivals.exact import Exact
from rivals.express import Express, ExpressPrompt

pytest.importorskip("express_kv", reason="NO express_kv: EXPRESS IN THE HARNESS IS NOT TESTED")
SPEC = ModelSpec(layers=8, q_heads=6, kv_heads=2, dim=64, scale=0.125, rope_theta=5e5)
S, N = 2, 448


@pytest.fixture(scope="module")
def streams():
    random = torch.Generator().manual_seed(2)
    draw = lambda heads: torch.randn(S, heads, N, SPEC.dim, generator=random)
    return draw(6), draw(2).bfloat16().float(), draw(2).bfloat16().float()


def feed(policy, streams, layer=3, cut=256):
    return torch.cat([policy.extend(layer, *(x[:, :, a:b] for x in streams)) for a, b in ((0, cut), (cut, N))], 2)


def test_nothing_is_lost_while_the_budget_lasts(streams):
    assert torch.allclose(feed(Express(SPEC, S, 2 * N), streams), feed(Exact(SPEC, S, 0), streams), atol=1e-5)


def test_a_block_sees_the_weighted_cache_as_it_was_when_it_began(streams):
    policy = Express(SPEC, S, 128, seed=4)
    policy.extend(3, *(x[:, :, :320] for x in streams))
    like = torch.empty(0)
    keys, values, log_weight, position = policy.caches[1].export(3, 1, like)
    out = policy.extend(3, *(x[:, :, 320:384] for x in streams))
    i, q = 350, streams[0][1, 4, 350].double()
    own = slice(320, i + 1)
    k, v = (torch.cat((a, x[1, 1, own])).double() for a, x in zip((keys, values), streams[1:]))
    # alpha = 0.25 is the library's default with observed budgets below a mean of 1024 entries.
    logits = SPEC.scale * (k @ q) + torch.cat((0.25 * log_weight, torch.zeros(i + 1 - 320))).double()
    assert len(position) <= 128 and torch.isclose(log_weight.exp().sum(), torch.tensor(320.0), rtol=1e-4)
    assert torch.allclose(out[1, 4, i - 320].double(), torch.softmax(logits, 0) @ v, atol=1e-4)
    assert not torch.allclose(out[1, 4, i - 320].double(), Stream(streams[0][1, 3:], streams[1][1, 1], streams[2][1, 1]).attend(1, i, list(range(320))),
                              atol=1e-2)


@pytest.mark.parametrize("name", ["express, profile", "express, pyramid"])
def test_budgets_by_head(name):
    policy = registry.make(name, SPEC, 1, 128)
    random = torch.Generator().manual_seed(1)
    for layer in range(SPEC.layers):
        policy.extend(layer, *(torch.randn(1, heads, 1024, SPEC.dim, generator=random) for heads in (6, 2, 2)))
    entries = [n for row in policy.entries() for n in row]
    assert len(set(entries)) > 4 and 0.8 * 128 < sum(entries) / len(entries) <= 129


@pytest.mark.parametrize("name", ["express, profile, equal bytes", "express, observed, equal bytes", "express, observed, 8 bits, equal bytes",
                                  "express, observed, without positions, equal bytes", "express, observed, without positions, 8 bits, equal bytes"])
def test_equal_bytes_are_at_most_those_of_plain_entries(name):
    policy = registry.make(name, SPEC, 1, 512)
    room = 512 * SPEC.entry_bytes * 16
    assert 0.97 * room < policy.bytes() <= room < registry.make("express, profile", SPEC, 1, 512).bytes()
    assert (policy.caches[0].stats()["entries_budget"] > 512 * 16) == ("8 bits" in name)


def test_compression_of_a_prompt(streams):
    policy = ExpressPrompt(SPEC, S, 96, prompt=256)
    out = feed(policy, streams)
    exact = feed(Exact(SPEC, S, 0), streams)
    assert torch.allclose(out[:, :, :256], exact[:, :, :256], atol=1e-5) and policy.entries()[3] == [96 + N - 256] * 2
    keys, values, log_weight = policy.after[3]
    i, q = 300, streams[0][0, 0, 300].double()
    held = 96 + i + 1 - 256
    logits = SPEC.scale * (keys[0, 0, :held].double() @ q) + log_weight[0, 0, :held].double()
    assert torch.allclose(out[0, 0, i].double(), torch.softmax(logits, 0) @ values[0, 0, :held].double(), atol=1e-4)
    assert torch.isclose((2 * log_weight[0, 0, :96]).exp().sum(), torch.tensor(256.0), rtol=1e-4)


def test_prefill_then_exact(streams):
    prompt = 320  # inside of the second chunk
    policy = PrefillThenExact(Express(SPEC, S, 96), prompt)
    out, inner, exact = feed(policy, streams), feed(Express(SPEC, S, 96), streams), feed(Exact(SPEC, S, 0), streams)
    assert torch.allclose(out[:, :, :prompt], inner[:, :, :prompt], atol=1e-5) and torch.allclose(out[:, :, prompt:], exact[:, :, prompt:], atol=1e-5)
    assert not torch.allclose(out[:, :, 200:prompt], exact[:, :, 200:prompt], atol=1e-2)
