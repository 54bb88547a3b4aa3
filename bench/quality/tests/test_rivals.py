"""Every rival against its formula, written with loops (plain.py), on small random streams: same outputs, same tokens held."""
import math

import pytest
import torch

import budgets
import registry
from plain import BLOCK, Stream, simulate, softmax
from policy import ModelSpec, SlabPolicy
from rivals.balance import BalanceKV, chosen, walk
from rivals.coreset import Coreset
from rivals.exact import Exact
from rivals.expected import ExpectedAttention
from rivals.h2o import H2O
from rivals.keydiff import KeyDiff
from rivals.knorm import Knorm
from rivals.quantised import Quantised, quantise
from rivals.snapkv import SnapKV, SnapKVPrompt
from rivals.tova import Tova
from rivals.window import Window

SPEC = ModelSpec(layers=2, q_heads=4, kv_heads=2, dim=32, scale=32 ** -0.5, rope_theta=1e4)
S, N, CAPACITY = 2, 330, 150


@pytest.fixture(scope="module")
def streams():
    random = torch.Generator().manual_seed(7)
    draw = lambda heads: torch.randn(S, heads, N, SPEC.dim, generator=random)
    q, k, v = 2 * draw(SPEC.q_heads), 1.5 * draw(SPEC.kv_heads) + 0.5, draw(SPEC.kv_heads)
    return q, k.bfloat16().float(), v.bfloat16().float()


def feed(policy, q, k, v, cut=192):
    """Outputs of layer 1, in two chunks."""
    return torch.cat([policy.extend(1, *(x[:, :, a:b] for x in (q, k, v))) for a, b in ((0, cut), (cut, N))], 2)


def stream(q, k, v, s, h):
    return Stream(q[s, h * SPEC.group:(h + 1) * SPEC.group], k[s, h], v[s, h])


def check(policy, streams, score, capacity=CAPACITY, **kept):
    """score(stream) makes the function that simulate() takes."""
    out = feed(policy, *streams)
    for s in range(S):
        for h in range(SPEC.kv_heads):
            one = stream(*streams, s, h)
            expected, held = simulate(one, capacity, score(one), **kept)
            assert torch.allclose(out[s, h * SPEC.group:(h + 1) * SPEC.group].double(), expected, atol=2e-5)
            for heads, slab in policy.slabs[1]:
                if h in heads:
                    assert sorted(slab.pos[s, heads.index(h)].tolist()) == held
    assert policy.entries()[1] == [capacity] * SPEC.kv_heads and policy.entries()[0] == [0] * SPEC.kv_heads


def test_exact(streams):
    q, k, v = streams
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SPEC.scale, enable_gqa=True)
    policy = Exact(SPEC, S, 0)
    assert torch.allclose(feed(policy, *streams), expected, atol=1e-5)
    assert policy.bytes() == N * SPEC.kv_heads * SPEC.dim * 2 * 2


def test_window(streams):
    check(Window(SPEC, S, CAPACITY), streams, lambda one: lambda held, block, end: {t: t for t in held + list(block)}, sinks=4)


def test_window_with_budgets_by_head(streams):
    policy = Window(SPEC, S, CAPACITY, budgets=[[140, 140], [100, 200]])
    out = feed(policy, *streams)
    for h, capacity in enumerate((100, 200)):
        expected, _ = simulate(stream(*streams, 1, h), capacity, lambda held, block, end: {t: t for t in held + list(block)}, sinks=4)
        assert torch.allclose(out[1, 2 * h:2 * h + 2].double(), expected, atol=2e-5)
    assert policy.entries() == [[0, 0], [100, 200]] and policy.bytes() == 300 * SPEC.entry_bytes


def test_h2o(streams):
    def score(one):
        mass = {}

        def after_block(held, block, end):
            for g in range(SPEC.group):
                for i in block:
                    for t, p in one.probabilities(g, i, held).items():
                        mass[t] = mass.get(t, 0) + p
            return mass
        return after_block
    check(H2O(SPEC, S, CAPACITY), streams, score, window=CAPACITY // 2)


def test_snapkv(streams):
    def score(one):
        def after_block(held, block, end):
            tokens = held + list(block)
            if len(block) < BLOCK or len(tokens) <= CAPACITY:
                return dict.fromkeys(tokens, 0)
            before = [t for t in tokens if t < end - 32]
            total = dict.fromkeys(before, 0.0)
            for g in range(SPEC.group):
                rows = [one.probabilities(g, i, held) for i in range(end - 32, end)]
                mass = [sum(row.get(t, 0) for row in rows) for t in before]
                for j, t in enumerate(before):
                    total[t] += (max(mass[max(0, j - 3):j + 4]) + 1e-3 * mass[j]) / SPEC.group
            return {**{t: math.inf for t in tokens}, **total}
        return after_block
    q, k, v = (x[:, :, :320] for x in streams)
    policy = SnapKV(SPEC, S, CAPACITY)
    out = policy.extend(1, q, k, v)
    for h in range(SPEC.kv_heads):
        one = stream(q, k, v, 0, h)
        expected, held = simulate(one, CAPACITY, score(one), window=32)
        assert torch.allclose(out[0, 2 * h:2 * h + 2].double(), expected, atol=2e-5)
        assert policy.slabs[1][0][1].pos[0, h].tolist() == held


def test_snapkv_of_a_prompt(streams):
    prompt, budget = 256, 100
    policy = SnapKVPrompt(SPEC, S, budget, prompt=prompt)
    out = feed(policy, *streams)
    for h in range(SPEC.kv_heads):
        one = stream(*streams, 1, h)
        causal = lambda g, i: dict(enumerate(softmax(one.logits(one.q[g, i], list(range(i + 1))))))
        rows = [[causal(g, i) for i in range(prompt - 32, prompt)] for g in range(SPEC.group)]
        mass = [[sum(p[t] for p in rows[g]) for t in range(prompt - 32)] for g in range(SPEC.group)]
        votes = [sum(max(m[max(0, t - 3):t + 4]) + 1e-3 * m[t] for m in mass) for t in range(prompt - 32)]
        kept = sorted(sorted(range(prompt - 32), key=lambda t: votes[t], reverse=True)[:budget - 32]) + list(range(prompt - 32, prompt))
        for i in (prompt, N - 1):
            tokens = kept + list(range(prompt, i + 1))
            p = torch.tensor(softmax(one.logits(one.q[0, i], tokens)), dtype=torch.float64)
            assert torch.allclose(out[1, 2 * h, i].double(), p @ one.v[tokens], atol=2e-5)
    assert policy.entries()[1] == [budget + N - prompt] * 2


def test_tova(streams):
    q, k, v = streams
    policy = Tova(SPEC, S, CAPACITY)
    out = feed(policy, *streams)
    ones, held = [stream(q, k, v, 0, h) for h in range(SPEC.kv_heads)], []  # all heads hold the same
    for begin in range(0, N, BLOCK):
        end = min(N, begin + BLOCK)
        for h, one in enumerate(ones):
            for g in range(SPEC.group):
                assert torch.allclose(out[0, h * SPEC.group + g, end - 1].double(), one.attend(g, end - 1, held), atol=2e-5)
        total = dict.fromkeys(held + list(range(begin, end)), 0.0)
        for one in ones:
            for g in range(SPEC.group):
                for t, p in one.probabilities(g, end - 1, held).items():
                    total[t] += p
        total[end - 1] = math.inf
        held = sorted(sorted(total, key=total.get, reverse=True)[:CAPACITY])
    for h in range(SPEC.kv_heads):
        assert sorted(policy.slabs[1][0][1].pos[0, h].tolist()) == held


@pytest.mark.parametrize("options, kept", [({}, {}), ({"sinks": 4, "window_share": 0.5}, {"sinks": 4, "window": CAPACITY // 2})])
def test_keydiff(streams, options, kept):
    def score(one):
        def after_block(held, block, end):
            tokens = held + list(block)
            anchor = torch.zeros(SPEC.dim, dtype=torch.float64)
            for t in tokens:
                anchor += one.k[t] / one.k[t].norm() / len(tokens)
            return {t: -float(one.k[t] @ anchor / (one.k[t].norm() * anchor.norm())) for t in tokens}
        return after_block
    check(KeyDiff(SPEC, S, CAPACITY, **options), streams, score, **kept)


def test_knorm(streams):
    check(Knorm(SPEC, S, CAPACITY), streams,
          lambda one: lambda held, block, end: {t: -math.sqrt(sum(x * x for x in one.k[t].tolist())) for t in held + list(block)})


def turned(x, position):
    """A list under rotary positions, pair by pair; a negative position turns back."""
    y, half = list(x), SPEC.dim // 2
    for i in range(half):
        angle = position * SPEC.rope_theta ** (-2 * i / SPEC.dim)
        y[i], y[i + half] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle), x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return y


def test_expected_attention(streams):
    def score(one):
        def after_block(held, block, end):
            tokens = [t for t in held + list(block) if t >= 4]
            rows = [[sum(x) / 512 for x in zip(*(turned(unit, p) for p in range(end, end + 512)))] for unit in torch.eye(SPEC.dim).tolist()]
            R = torch.tensor(rows, dtype=torch.float64).T  # column i: unit vector i, turned by the mean of the next 512 rotations
            total = dict.fromkeys(tokens, 0.0)
            for g in range(SPEC.group):
                queries = torch.tensor([turned(one.q[g, i].tolist(), -i) for i in range(4, end)], dtype=torch.float64)
                mean = queries.mean(0)
                C = R @ ((queries - mean).T @ (queries - mean) / len(queries)) @ R.T
                p = softmax([float(one.k[t] @ (R @ mean) * one.scale + one.k[t] @ C @ one.k[t] * one.scale ** 2 / 2) for t in tokens])
                for t, x in zip(tokens, p):
                    total[t] += x / SPEC.group
            return {**dict.fromkeys(range(4), 0), **{t: total[t] * float(one.v[t].norm()) for t in tokens}}
        return after_block
    q, k, v = (x[:1, :, :256] for x in streams)
    policy = ExpectedAttention(SPEC, 1, CAPACITY)
    policy.extend(1, q, k, v)
    for h in range(SPEC.kv_heads):
        one = stream(q, k, v, 0, h)
        assert sorted(policy.slabs[1][0][1].pos[0, h].tolist()) == simulate(one, CAPACITY, score(one), sinks=4)[1]


def test_coreset_is_a_uniform_sample_whose_weights_sum_to_the_tokens(streams):
    runs, counts = 60, torch.zeros(N)
    q, k, v = streams
    for seed in range(runs):
        policy = Coreset(SPEC, S, CAPACITY, seed=seed)
        out = feed(policy, *streams)
        slab = policy.slabs[1][0][1]
        assert torch.allclose(slab.log_weight.exp().sum(2), torch.full((S, SPEC.kv_heads), float(N)), rtol=1e-5)
        for row in slab.pos.flatten(0, 1):
            counts[row.long()] += 1
    sample, between = CAPACITY - 4 - 75, N - 4 - 75
    assert (counts[:4] == runs * 4).all() and (counts[-75:] == runs * 4).all()
    # Of 240 draws each token is in with probability p: within 5 standard deviations. 251 tokens: false alarm 1.5e-4, and the seeds are fixed.
    p = sample / between
    assert (abs(counts[4:-75] / (runs * 4) - p) < 5 * math.sqrt(p * (1 - p) / (runs * 4))).all()
    # The last block's outputs are attention with those weights over what was held when it began.
    before = Coreset(SPEC, S, CAPACITY, seed=runs - 1)
    before.extend(1, *(x[:, :, :192] for x in streams))
    before.extend(1, *(x[:, :, 192:320] for x in streams))
    slab, one = before.slabs[1][0][1], stream(q, k, v, 0, 0)
    weight = dict(zip(slab.pos[0, 0].tolist(), slab.log_weight[0, 0].exp().tolist()))
    assert torch.allclose(out[0, 0, N - 1].double(), one.attend(0, N - 1, slab.pos[0, 0].tolist(), lambda t: weight.get(t, 1.0)), atol=2e-5)


def test_self_balancing_walk_and_its_half():
    random = torch.Generator().manual_seed(3)
    x = torch.randn(3, 16, 4, generator=random)
    kernel, uniform = (x @ x.transpose(1, 2) / 8).exp() * 0.05, torch.rand(3, 16, generator=random)
    signs = walk(kernel, uniform)
    places, weight = chosen(signs)
    for b in range(3):
        plain = [1]
        for i in range(1, 16):
            total = sum(plain[j] * float(kernel[b, i, j]) for j in range(i))
            plain.append(1 if float(uniform[b, i]) < 0.5 - 4.0 * total else -1)
        assert signs[b].tolist() == plain
        count, at = {1: 0, -1: 0}, 0
        while max(count.values()) < 8:
            count[plain[at]] += 1
            at += 1
        rare = 1 if count[1] < 8 else -1
        expected = [(i, 2) for i in range(at) if plain[i] == rare] + [(i, 1) for i in range(at, 16)]
        assert list(zip(places[b].tolist(), weight[b].tolist())) == expected
        assert len(expected) == 8


@pytest.mark.parametrize("weighted", [False, True])
def test_balancekv(streams, weighted):
    q, k, v = streams
    policy = BalanceKV(SPEC, S, 2 * 64 + 4 + 140, window_share=0.5, weighted=weighted, seed=5)
    policy.extend(1, *(x[:, :, :192] for x in streams))
    policy.extend(1, *(x[:, :, 192:320] for x in streams))
    policy_window = policy.window
    assert policy.entries()[1] == [min(320, 4 + policy_window + sum(x[0].shape[2] for x in policy.levels[1]))] * 2
    # 320 tokens: sinks 4, two blocks of window, 188 between, which a room of 140 does not hold: the first 124 were halved.
    assert [x[0].shape[2] for x in policy.levels[1]] == [64, 62]
    (k0, v0, w0), (k1, v1, w1) = policy.levels[1]
    out = policy.extend(1, *(x[:, :, 320:] for x in streams))
    i = 3
    keys = torch.cat((k[0, 0, :4], k[0, 0, 192:320], k0[0, 0], k1[0, 0], k[0, 0, 320:321 + i])).double()
    values = torch.cat((v[0, 0, :4], v[0, 0, 192:320], v0[0, 0], v1[0, 0], v[0, 0, 320:321 + i])).double()
    ones = torch.ones(132, dtype=torch.float64), torch.ones(i + 1, dtype=torch.float64)
    numerator = torch.cat((ones[0], w0[0, 0].double(), w1[0, 0].double(), ones[1]))
    denominator = numerator if weighted else torch.cat((ones[0], torch.ones(64).double(), torch.full((62,), 2.0).double(), ones[1]))
    e = (keys @ q[0, 0, 320 + i].double() * SPEC.scale).exp()
    assert torch.allclose(out[0, 0, i].double(), (e * numerator) @ values / (e * denominator).sum(), atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantise(bits):
    x = torch.randn(2, 3, 64, 32, generator=torch.Generator().manual_seed(1))
    for dim in (2, 3):
        y = quantise(x, bits, dim)
        part = (x[0, 1, 32:64, 5], y[0, 1, 32:64, 5]) if dim == 2 else (x[0, 1, 5], y[0, 1, 5])
        low = float(part[0].min().half())
        step = float(((part[0].max() - low) / (2 ** bits - 1)).half())
        for a, b in zip(*(x.tolist() for x in part)):
            assert abs(b - (low + step * round(min(max((a - low) / step, 0), 2 ** bits - 1)))) < 1e-5
        assert (x - y).abs().max() <= 0.52 * (x.amax() - x.amin()) / (2 ** bits - 1)


def test_quantised_window(streams):
    q, k, v = streams
    budget = 4 + 128 + 60
    policy = Quantised(SPEC, S, budget, bits=8)
    room = 60 * 128 // (64 + 8)
    out = feed(policy, *streams)
    kq, vq = k.clone(), v.clone()
    for begin in range(0, N, BLOCK):
        part = slice(begin, begin + BLOCK)
        if begin + BLOCK <= N:
            kq[:, :, part], vq[:, :, part] = quantise(k[:, :, part], 8, 2), quantise(v[:, :, part], 8, 3)
    i = 325
    old, recent = list(range(192 - room, 192)), list(range(192, i + 1))
    keys = torch.cat((k[1, 0, :4], kq[1, 0, old], k[1, 0, recent])).double()
    values = torch.cat((v[1, 0, :4], vq[1, 0, old], v[1, 0, recent])).double()
    p = torch.softmax(keys @ q[1, 1, i].double() * SPEC.scale, 0)
    assert torch.allclose(out[1, 1, i].double(), p @ values, atol=2e-5)
    assert policy.bytes() <= budget * SPEC.kv_heads * SPEC.entry_bytes
    whole = Quantised(SPEC, S, 0, bits=8, whole=True)
    expected = feed(Exact(SPEC, S, 0), *streams)
    assert 0 < (feed(whole, *streams) - expected).norm() / expected.norm() < 0.02
    assert whole.entries()[1] == [N] * 2 or sum(whole.entries()[1]) == 2 * (N + 4)


def test_pyramid():
    spec = ModelSpec(8, 6, 2, 64, 0.125, 5e5)
    rows = budgets.pyramid(spec, 1024)
    assert rows[0] == [round(32 + 2 * 992 - 992 / 20)] * 2 and rows[-1] == [round(32 + 992 / 20)] * 2
    steps = [a[0] - b[0] for a, b in zip(rows, rows[1:])]
    assert max(steps) - min(steps) <= 1 and abs(sum(map(sum, rows)) - 16 * 1024) <= 8


def test_far_mass_budgets():
    spec = ModelSpec(8, 6, 2, 64, 0.125, 5e5)
    rows, mass = budgets.by_far_mass(spec, 1024), budgets.far_mass(spec)
    assert 16 * 1023 < sum(map(sum, rows)) <= 16 * 1024 and min(map(min, rows)) >= 320
    a, b = mass[3][0], mass[3][1]
    assert math.isclose((rows[3][0] - 320) / max(1, rows[3][1] - 320), (a / b) ** 2, rel_tol=0.02)


def test_budgets_reach_the_rivals():
    for name in ("pyramidkv", "window, far mass"):
        policy = registry.make(name, ModelSpec(8, 6, 2, 64, 0.125, 5e5), 1, 512)
        assert isinstance(policy, SlabPolicy) and policy.budgets[0] != policy.budgets[-1]
