"""python3 -m pytest bench/quality/ablation"""
import os
import sys

import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import proto_policies as policies  # noqa: E402
from proto_model import BLOCK  # noqa: E402


class Spec:
    layers, q_heads, kv_heads, dim, device = 2, 4, 2, 64, "cpu"

    @staticmethod
    def angles(begin, end):
        angle = torch.outer(torch.arange(begin, end).float(), 0.9 ** torch.arange(32).float())
        return angle.cos(), angle.sin()


def stream(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [[torch.randn(3, h, n, 64, generator=g) for h in (4, 2, 2)] for _ in range(Spec.layers)]


def feed(policy, qkv, n, settle=256):
    out = []
    for at in range(0, n, BLOCK):
        out.append(torch.stack([policy.extend(i, *(x[:, :, at:at + BLOCK] for x in qkv[i])) for i in range(Spec.layers)]))
        if (at + BLOCK) % settle == 0:
            policy.tick(at + BLOCK)
    return torch.cat(out, 3)  # (layers, S, Hq, n, d)


def dense(q, k, v, live=None):
    n = q.shape[2]
    mask = torch.ones(n, n, dtype=torch.bool).tril() if live is None else live
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    return torch.softmax((q @ k.transpose(2, 3) / 8).masked_fill(~mask, -torch.inf), -1) @ v


def test_exact_is_dense_attention():
    qkv = stream(512)
    out = feed(policies.Policy(Spec, 3, 512), qkv, 512)
    for i in range(Spec.layers):
        torch.testing.assert_close(out[i], dense(*qkv[i]), atol=1e-4, rtol=1e-4)


def test_window_is_dense_attention_under_a_mask():
    n, budget = 1024, 256
    qkv = stream(n)
    out = feed(policies.Window(Spec, 3, n, budget), qkv, n)
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    start = i // BLOCK * BLOCK
    live = (j <= i) & ((j >= start - (budget - 4)) | (j < 4))
    for layer in range(Spec.layers):
        torch.testing.assert_close(out[layer], dense(*qkv[layer], live), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [
    {}, dict(budgets="online", distance=0.5), dict(budgets="online", distance=0.5, update="frozen", cap=2.0, heads="max", coreset=False),
    dict(budgets="online", distance=0.5, signal="outabs", update="frozen", cap=2.0), dict(mass_share=0.5, mass_decay=0.9)])
def test_never_more_entries_than_the_budget(options):
    n, budget = 2048, 256
    policy = policies.Express(Spec, 3, n, budget, **options)
    qkv = stream(n)
    for at in range(0, n, BLOCK):
        feed_at = [[x[:, :, at:at + BLOCK] for x in qkv[i]] for i in range(Spec.layers)]
        for i in range(Spec.layers):
            policy.extend(i, *feed_at[i])
        total = policy.entries()
        assert (total <= Spec.layers * Spec.kv_heads * budget).all()
        if (at + BLOCK) % 256 == 0:
            policy.tick(at + BLOCK)
            assert (policy.B.sum((0, 2)) <= Spec.layers * Spec.kv_heads * budget).all()


def test_settling_gives_more_to_the_head_that_looks_far():
    n, budget = 512, 256
    qkv = stream(n)
    for i in range(Spec.layers):
        qkv[i][0][:, :, :, :], qkv[i][1][:, :, :, :] = 0.01 * qkv[i][0], qkv[i][1]
        age = torch.arange(n).float()
        qkv[i][0][..., 0], qkv[i][1][..., 0] = 1, 0.02 * age  # near keys win
    qkv[1][1][:, 1, :, 0] = -0.02 * age                       # but for one head, where old keys do
    policy = policies.Express(Spec, 3, n, budget, budgets="online", distance=0.5, power=3.0)
    feed(policy, qkv, n)
    assert (policy.B[1, :, 1] > 2 * policy.B.sum((0, 2)) / 4 * 0.99).all()


def test_eight_bits_are_close_and_four_farther():
    x = torch.randn(10, 64)
    error = [((policies.quantised(x, b, 32, policies.hadamard(64, "cpu")) - x).norm() / x.norm()).item() for b in (8, 4)]
    assert error[0] < 0.01 < error[1] < 0.12
