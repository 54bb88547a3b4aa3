"""Policies written plainly: one sequence, one KV head at a time, lists of tokens, loops. What the rivals are tested against."""
import math

import torch

BLOCK = 64


def softmax(logits):
    top = max(logits)
    e = [math.exp(x - top) for x in logits]
    return [x / sum(e) for x in e]


class Stream:
    """q: (G, n, d)   k, v: (n, d)"""

    def __init__(self, q, k, v):
        self.q, self.k, self.v, self.n, self.scale = q.double(), k.double(), v.double(), k.shape[0], q.shape[2] ** -0.5

    def logits(self, query, tokens):
        return (self.k[tokens] @ query * self.scale).tolist()

    def probabilities(self, g, i, held):
        """{token: probability} of query i of the group's head g, which sees `held` and the tokens of its block up to itself."""
        tokens = held + list(range(i // BLOCK * BLOCK, i + 1))
        return dict(zip(tokens, softmax(self.logits(self.q[g, i], tokens))))

    def attend(self, g, i, held, weight=lambda token: 1.0):
        tokens = held + list(range(i // BLOCK * BLOCK, i + 1))
        p = softmax([x + math.log(weight(token)) for x, token in zip(self.logits(self.q[g, i], tokens), tokens)])
        return torch.tensor(p, dtype=torch.float64) @ self.v[tokens]


def simulate(stream, capacity, score, sinks=0, window=0, heads=None):
    """Outputs (G, n, d) and what is held in the end, of a policy that drops the tokens of the lowest score.

    score(held, block, end) -> {token: score} of all tokens of `held` (in order) and of the block (a range)
    """
    held, out = [], torch.zeros(stream.q.shape, dtype=torch.float64)
    for begin in range(0, stream.n, BLOCK):
        end = min(stream.n, begin + BLOCK)
        for g in range(stream.q.shape[0]):
            for i in range(begin, end):
                out[g, i] = stream.attend(g, i, held)
        block = range(begin, end)
        scores = score(held, block, end)
        tokens = held + list(block)
        kept = {t for t in tokens if t < sinks or t >= end - window}
        others = sorted((t for t in tokens if t not in kept), key=lambda t: scores[t], reverse=True)
        held = sorted(list(kept) + others[:max(0, capacity - len(kept))]) if len(tokens) > capacity else tokens
    return out, held
