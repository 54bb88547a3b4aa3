"""BalanceKV: a coreset by the self-balancing walk.

I. Han, M. Kapralov, E. Kochetkova, K. Sheth, A. Zandieh, "BalanceKV: KV Cache Compression through Discrepancy Theory", arXiv:2502.07861 (2025).
SoftmaxBalance of a list of 2h entries, in order: the kernel is exp(<k_i, k_j> / sqrt(d)) <v_i, v_j> of keys less their mean; entry i gets the sign +1
with probability 1/2 - gamma (sum of signs of those before times kernel), else -1. h entries stay: all of the sign that is rarer when the other one
reaches h (weight 2), and those that follow (weight 1). Its settings: gamma 4, lists of 128, values times their weight in later walks.

The published decoding multiplies *values* by the weight and gives every entry of a part that was halved T times the weight 2^T in the
denominator (`weighted=False`), the later one weighs numerator and denominator alike (`weighted=True`).

For a fixed budget and any length: merge and reduce. Sinks and window are exact; tokens that leave the window fill level 0; while there is no room
for the next block, the lowest level that has a full list is halved into the next. What is halved depends on counts only.
"""
import math

import torch

from policy import BLOCK, Policy, attention

LIST, GAMMA = 128, 4.0


def walk(kernel, uniform, gamma=GAMMA):
    """Signs (..., m) of the self-balancing walk. kernel: (..., m, m)   uniform: (..., m) in [0, 1)."""
    m = kernel.shape[-1]
    bound = (0.5 - uniform) / gamma  # + where the running sum is less
    total, signs = torch.zeros_like(uniform), torch.ones_like(uniform)
    for i in range(m):
        if i > 0:
            signs[..., i] = (total[..., i] < bound[..., i]) * 2.0 - 1
        total.addcmul_(signs[..., i:i + 1], kernel[..., i])
    return signs


def chosen(signs):
    """Which half stays (places (..., m / 2), in order) and with which weight, 1 or 2."""
    m = signs.shape[-1]
    minus, plus = (signs < 0).cumsum(-1), (signs > 0).cumsum(-1)
    reached = (torch.maximum(minus, plus) < m // 2).sum(-1, keepdim=True)  # where one sign has m / 2
    at = torch.arange(m, device=signs.device)
    more = signs.gather(-1, reached)  # the sign that has
    weight = torch.where(at > reached, 1.0, torch.where(signs == more, 0.0, 2.0))
    places = (weight == 0).long().sort(dim=-1, stable=True).indices[..., :m // 2]
    return places, weight.gather(-1, places)


class BalanceKV(Policy):
    def __init__(self, spec, sequences, budget, seed=0, device="cpu", sinks=4, window_share=0.5, weighted=False, gamma=GAMMA):
        super().__init__(spec, sequences, budget, seed, device)
        self.sinks, self.weighted, self.gamma = sinks, weighted, gamma
        self.window = int(window_share * budget) // BLOCK * BLOCK
        self.room = budget - sinks - self.window
        if self.room < BLOCK + 32:  # a block, and one entry of every level
            raise ValueError(f"budget: {budget} entries leave {self.room} for the coreset, less than {BLOCK + 32}")
        self.sink = [None] * spec.layers
        self.recent = [[] for _ in range(spec.layers)]                 # blocks of the window: (k, v)
        self.levels = [[] for _ in range(spec.layers)]                 # of each halving: k, v (S, H, n, d), weight (S, H, n)
        self.walks = {}

    def extend_block(self, layer, q, k, v):
        recent, levels = self.recent[layer], self.levels[layer]
        parts = [(*x, None, 0) for x in ([self.sink[layer]] if self.sink[layer] else []) + recent] + [
            (*x, level) for level, x in enumerate(levels) if x[0].shape[2]]
        keys, values, logs = [], [], []
        for part_k, part_v, weight, level in parts:
            log = torch.zeros(part_k.shape[:3], device=k.device)
            if weight is not None and self.weighted:
                log = weight.log()
            elif weight is not None:
                log += level * math.log(2)
                part_v = part_v * (weight / 2 ** level)[..., None]
            keys.append(part_k), values.append(part_v), logs.append(log)
        logs.append(torch.zeros(k.shape[:3], device=k.device))
        out, _ = attention(q, torch.cat(keys + [k], 2), torch.cat(values + [v], 2), self.spec.scale, torch.cat(logs, 2), k.shape[2])
        if self.sink[layer] is None:
            self.sink[layer] = (k[:, :, :self.sinks].clone(), v[:, :, :self.sinks].clone())
            k, v = k[:, :, self.sinks:], v[:, :, self.sinks:]
        recent.append((k.clone(), v.clone()))
        if len(recent) > self.window // BLOCK:
            self._sample(levels, *recent.pop(0))
        return out

    def _sample(self, levels, k, v):
        """A block leaves the window."""
        def held(level):
            return levels[level][0].shape[2]

        while sum(map(held, range(len(levels)))) + k.shape[2] > self.room:
            full = [i for i in range(len(levels)) if held(i) >= LIST]
            level = full[0] if full else max(range(len(levels)), key=held)
            self._halve(levels, level, min(LIST, held(level) // 2 * 2))
        new = (k, v, torch.ones(k.shape[:3], device=k.device))
        self._append(levels, 0, new)

    def _append(self, levels, level, new):
        if level == len(levels):
            levels.append(new)
        else:
            levels[level] = tuple(torch.cat(x, 2) for x in zip(levels[level], new))

    def _halve(self, levels, level, count):
        """The oldest `count` entries of a level go halved into the next."""
        k, v, weight = (x[:, :, :count] for x in levels[level])
        levels[level] = tuple(x[:, :, count:] for x in levels[level])
        centred, scaled = k - k.mean(2, keepdim=True), v * weight[..., None]
        kernel = torch.exp(self.spec.scale * (centred @ centred.transpose(2, 3))) * (1e-8 + scaled @ scaled.transpose(2, 3))
        uniform = torch.rand(weight.shape, generator=self.random, device=self.device)
        places, factor = chosen(self._walk(kernel, uniform))
        deep = places[..., None].expand(-1, -1, -1, self.spec.dim)
        self._append(levels, level + 1, (k.gather(2, deep), v.gather(2, deep), weight.gather(2, places) * factor))

    def _walk(self, kernel, uniform):
        """On a GPU from a captured graph: the walk is a few hundred tiny launches."""
        if not kernel.is_cuda:
            return walk(kernel, uniform, self.gamma)
        if kernel.shape not in self.walks:
            inputs, graph = (kernel.clone(), uniform.clone()), torch.cuda.CUDAGraph()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                walk(*inputs, self.gamma)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                signs = walk(*inputs, self.gamma)
            self.walks[kernel.shape] = graph, inputs, signs
        graph, inputs, signs = self.walks[kernel.shape]
        inputs[0].copy_(kernel), inputs[1].copy_(uniform)
        graph.replay()
        return signs

    def bytes(self):
        """With a weight of 4 bytes for every entry of the coreset."""
        between = sum(x[2].shape[2] for levels in self.levels for x in levels)
        return self.spec.kv_heads * (sum(row[0] for row in self.entries()) * self.spec.entry_bytes + 4 * between)

    def entries(self):
        held = [sum(x[0].shape[2] for x in ([s] if s else []) + r + list(l)) for s, r, l in zip(self.sink, self.recent, self.levels)]
        return [[n] * self.spec.kv_heads for n in held]
