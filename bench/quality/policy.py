"""What a cache policy is: the interface of all rivals, and what most of them share.

A policy is told q, k and v of every layer, some tokens at a time, and gives the attention outputs. It decides what it keeps. The tokens come in
blocks of BLOCK: a token sees what the policy held when its block began, and the tokens of its block up to itself exactly. After the block's
outputs the policy ingests it. So all policies stream, and differ only in what they hold between blocks.

    class Mine(Policy):
        def extend(self, layer, q, k, v): ...
        def bytes(self): ...
        def entries(self): ...

or, one level up, SlabPolicy: entries of weight 1 in a slab, the lowest scores are dropped.

Shapes: S sequences (side by side, of equal length, independent of each other), Hq query heads, H KV heads, G = Hq / H of them to a group (query
heads hG .. hG + G - 1 share KV head h), d dimensions. float32 throughout; k and v arrive rounded to bfloat16, so an entry counts 2 bytes a number.
"""
import dataclasses

import torch

BLOCK = 64


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    layers: int
    q_heads: int
    kv_heads: int
    dim: int
    scale: float
    rope_theta: float  # half-split rotary positions, pairs are (i, i + d / 2)

    @property
    def group(self):
        return self.q_heads // self.kv_heads

    @property
    def entry_bytes(self):
        """A key and a value in bfloat16."""
        return 4 * self.dim


class Policy:
    """One instance is the caches of all layers of `sequences` sequences.

    budget: mean entries per KV head of a sequence, as if an entry were a bfloat16 key and value (a policy with smaller entries holds more)
    seed: of all random draws; sequences draw independently
    """

    chunk = None  # tokens that come at most at a time; the model's own number if there is none

    def __init__(self, spec, sequences, budget, seed=0, device="cpu"):
        self.spec, self.sequences, self.budget, self.device = spec, sequences, budget, torch.device(device)
        self.random = torch.Generator(self.device).manual_seed(seed)
        self.seen = [0] * spec.layers  # tokens that each layer has ingested

    def extend(self, layer, q, k, v):
        """Outputs (S, Hq, n, d) of the next n tokens of a layer, which are then ingested.

        q: (S, Hq, n, d)   k, v: (S, H, n, d), after RoPE. All layers get a chunk of tokens before any gets the next. n is a multiple of BLOCK
        but in the last call.
        """
        out = torch.empty_like(q)
        for begin in range(0, q.shape[2], BLOCK):
            part = slice(begin, begin + BLOCK)
            out[:, :, part] = self.extend_block(layer, q[:, :, part], k[:, :, part], v[:, :, part])
            self.seen[layer] += q[:, :, part].shape[2]
        return out

    def extend_block(self, layer, q, k, v):
        """The same for at most BLOCK tokens, the first of them at position self.seen[layer]."""
        raise NotImplementedError

    def bytes(self):
        """Most bytes held between blocks for one sequence, all layers, with all that the policy needs to go on: keys, values, weights, scores."""
        raise NotImplementedError

    def entries(self):
        """Most entries held between blocks: a list (layers) of lists (KV heads)."""
        raise NotImplementedError


_MASKS = {}


def causal_mask(n, device):
    """(n, n): -inf where a query (row) must not see a key (column)."""
    key = (n, str(device))
    if key not in _MASKS:
        _MASKS[key] = torch.full((n, n), -torch.inf, device=device).triu(1)
    return _MASKS[key]


def attention(q, k, v, scale, log_weight=None, fresh=None):
    """Weighted softmax attention; the last `fresh` keys are the queries' own tokens (default: as many as queries), under the causal mask.

    q: (S, Hq, n, d)   k, v: (S, H, N, d)   log_weight: None or (S, H, N), -inf where there is no entry
    returns out (S, Hq, n, d) and the probabilities (S, H, G, n, N)
    """
    (S, Hq, n, d), (H, N) = q.shape, k.shape[1:3]
    fresh = n if fresh is None else fresh
    logits = (q.reshape(S, H, Hq // H * n, d) * scale) @ k.transpose(2, 3)
    if log_weight is not None:
        logits += log_weight[:, :, None]
    logits = logits.view(S, H, Hq // H, n, N)
    if fresh:
        logits[..., N - fresh:] += causal_mask(n, q.device)
    p = torch.softmax(logits, -1)
    out = p.view(S, H, Hq // H * n, N) @ v
    return out.view(S, Hq, n, -1), p


class Slab:
    """Entries of some KV heads of one layer, up to `capacity` each between blocks; a block of new tokens is put behind them.

    keys, values: (S, H, capacity + BLOCK, d), of which the first `total` are in use
    extras: further numbers that travel with an entry, name -> (S, H, capacity + BLOCK)
    """

    def __init__(self, sequences, kv_heads, capacity, dim, device, extras=()):
        shape = (sequences, kv_heads, capacity + BLOCK)
        self.capacity, self.total = capacity, 0
        self.keys = torch.zeros(*shape, dim, device=device)
        self.values = torch.zeros(*shape, dim, device=device)
        self.position = torch.zeros(shape, dtype=torch.int32, device=device)
        self.extras = {name: torch.zeros(shape, device=device) for name in extras}

    def __getattr__(self, name):
        """slab.k, slab.v, slab.pos and slab.<extra>: views of what is in use, (S, H, total[, d])."""
        if name in ("k", "v", "pos"):
            return {"k": self.keys, "v": self.values, "pos": self.position}[name][:, :, :self.total]
        if name in self.__dict__.get("extras", ()):
            return self.extras[name][:, :, :self.total]
        raise AttributeError(name)

    def put(self, k, v, position):
        """Appends new tokens, the first at `position`; at most BLOCK beyond the capacity."""
        n = k.shape[2]
        place = slice(self.total, self.total + n)
        self.keys[:, :, place], self.values[:, :, place] = k, v
        self.position[:, :, place] = torch.arange(position, position + n, dtype=torch.int32, device=k.device)
        for extra in self.extras.values():
            extra[:, :, place] = 0
        self.total += n

    def drop_lowest(self, score, ordered=False):
        """Drops as many entries as are beyond the capacity, those of lowest score (S, H, total). Moves the last ones to where entries went, or,
        `ordered`, all of them, so that they stay in order."""
        drop = self.total - self.capacity
        if drop <= 0:
            return
        if ordered:
            return self._close_ranks(score, drop)
        gone = score.topk(drop, largest=False, sorted=False).indices.sort().values  # (S, H, drop)
        # Of the last `drop` places those that stay, then those that go. The gone places below the capacity are as many as those that stay, and
        # come first in `gone`.
        goes = torch.zeros(*gone.shape[:2], drop + 1, device=gone.device)
        goes.scatter_(2, (gone - self.capacity + 1).clamp(min=0), 1)
        order = goes[:, :, 1:].sort(stable=True).indices + self.capacity
        for x in (self.position, *self.extras.values()):
            x.scatter_(2, gone, x.gather(2, order))
        deep_gone, deep_order = (i[..., None].expand(-1, -1, -1, self.keys.shape[3]) for i in (gone, order))
        for x in (self.keys, self.values):
            x.scatter_(2, deep_gone, x.gather(2, deep_order))
        self.total = self.capacity

    def _close_ranks(self, score, drop):
        stays = torch.ones_like(score, dtype=torch.bool).scatter_(2, score.topk(drop, largest=False, sorted=False).indices, False)
        place = torch.where(stays, stays.cumsum(2) - 1, self.capacity)  # where each goes; those that go all go to one place beyond
        source = torch.arange(self.total, device=score.device).expand_as(place)
        order = torch.empty(*place.shape[:2], self.capacity + 1, dtype=torch.long, device=place.device).scatter_(2, place, source)[:, :, :-1]
        for x in (self.position, *self.extras.values()):
            x[:, :, :self.capacity] = x.gather(2, order)
        order = order[..., None].expand(-1, -1, -1, self.keys.shape[3])
        for x in (self.keys, self.values):
            x[:, :, :self.capacity] = x.gather(2, order)
        self.total = self.capacity


class SlabPolicy(Policy):
    """Keeps entries of weight 1 (or of slab.log_weight, if that is an extra) and drops those of lowest score once a head's budget is full.

    A subclass gives score(); observe() sees the probabilities of a block before anything is dropped.
    budgets: entries per (layer, KV head) as a list of lists; default: the same for all
    sinks, window: the first tokens and the last ones, which keep() keeps; window_share: the window as a share of a head's budget
    """

    extras = ()        # names of numbers that travel with an entry
    extra_bytes = 0    # bytes that the policy keeps per entry beside key and value
    head_bytes = 0     # and per KV head
    ordered = False    # whether entries stay in the order of their tokens (dearer)

    def __init__(self, spec, sequences, budget, seed=0, device="cpu", budgets=None, sinks=0, window=0, window_share=0.0):
        super().__init__(spec, sequences, budget, seed, device)
        self.budgets = budgets or [[budget] * spec.kv_heads for _ in range(spec.layers)]
        self.sinks, self.window, self.window_share = sinks, window, window_share
        # Of each layer: list of (KV heads, slab): heads of equal budget share a slab. slab.index, slab.q_index: its KV heads and query heads.
        self.slabs = []
        for row in self.budgets:
            groups = [[h for h in range(spec.kv_heads) if row[h] == size] for size in sorted(set(row))]
            self.slabs.append([(heads, Slab(sequences, len(heads), row[heads[0]], spec.dim, device, self.extras)) for heads in groups])
            for heads, slab in self.slabs[-1]:
                slab.index = torch.tensor(heads, device=device)
                slab.q_index = torch.tensor([h * spec.group + i for h in heads for i in range(spec.group)], device=device)

    def extend_block(self, layer, q, k, v):
        slabs = self.slabs[layer]
        if len(slabs) == 1:
            return self.extend_slab(layer, *slabs[0], q, k, v)
        out = torch.empty_like(q)
        for heads, slab in slabs:
            out[:, slab.q_index] = self.extend_slab(layer, heads, slab, q[:, slab.q_index], k[:, slab.index], v[:, slab.index])
        return out

    def extend_slab(self, layer, heads, slab, q, k, v):
        slab.put(k, v, self.seen[layer])
        out, p = attention(q, slab.k, slab.v, self.spec.scale, getattr(slab, "log_weight", None), q.shape[2])
        end = self.seen[layer] + q.shape[2]
        self.observe(layer, heads, slab, q, p, end)
        if slab.total > slab.capacity:
            slab.drop_lowest(self.score(layer, heads, slab, end), self.ordered)
        return out

    def observe(self, layer, heads, slab, q, p, end):
        """p: (S, H, G, n, total), probabilities of the block's queries q over the slab, the block's tokens last."""

    def score(self, layer, heads, slab, end):
        """(S, H, total): entries with the lowest are dropped. `end`: tokens seen, with this block."""
        raise NotImplementedError

    def window_of(self, slab):
        return max(self.window, int(self.window_share * slab.capacity))

    def keep(self, score, slab, end):
        """The score, with sinks and window above all others."""
        kept = slab.pos >= end - self.window_of(slab)
        if self.sinks:
            kept |= slab.pos < self.sinks
        return score.masked_fill(kept, torch.inf)

    def bytes(self):
        entry = self.spec.entry_bytes + self.extra_bytes
        return sum(n * entry for row in self.entries() for n in row) + self.spec.layers * self.spec.kv_heads * self.head_bytes

    def entries(self):
        result = [[0] * self.spec.kv_heads for _ in range(self.spec.layers)]
        for layer, slabs in enumerate(self.slabs):
            for heads, slab in slabs:
                for h in heads:
                    result[layer][h] = slab.total
        return result
