"""Prototype cache policies as masks over all entries: a policy decides which entries live and with what weight.

Per layer, all sequences and KV heads side by side: keys (S, H, W, 72) hold the key and, in column 64, the logit bias of the entry
(alpha log w; -BIG if dropped); values (S, H, W, 72) hold the value and, from column 64 on, indicators of parts of the cache, so that
the mass of these parts comes out of the same product. Dropped entries are squeezed out when enough of them have piled up.
"""
import math

import torch

from proto_model import BLOCK, rotate

BIG = 1e4


def hadamard(n, device):
    h = torch.ones(1, 1, device=device)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h / math.sqrt(n)


def quantised(x, bits, group, turn):
    """x: (..., d) as it reads back from slots of `bits` bits with one scale for each `group` numbers; turn: a rotation applied before, undone after."""
    y = x @ turn if turn is not None else x
    y = y.unflatten(-1, (-1, group))
    low, high = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
    if bits >= 8:  # symmetric
        step = torch.maximum(-low, high).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
        y = (y / step).round() * step
    else:
        step = (high - low).clamp_min(1e-12) / (2 ** bits - 1)
        y = ((y - low) / step).round() * step + low
    y = y.flatten(-2)
    return y @ turn.T if turn is not None else y
WIDE = 72


class Layer:
    pass


class Policy:
    """Exact attention, and what all policies share. Subclasses define select(layer state)."""
    mass_decay = None  # a number: keep each entry's decayed attention mass
    bits = 0           # of a number in a slot; 0: as computed
    group = 64         # numbers that share a scale
    far_output = False # measure the part of the output that comes from marked entries
    turn = False       # rotate by a Hadamard matrix before rounding

    def __init__(self, model, S, length):
        self.m, self.S, self.H, self.G, self.d = model, S, model.kv_heads, model.q_heads // model.kv_heads, model.dim
        self.length, self.dev = length, model.device
        self.layers = [self.new_layer() for _ in range(model.layers)]
        for i, l in enumerate(self.layers):
            l.index = i
        self.hadamard = hadamard(self.d, self.dev)
        self.causal = torch.full((BLOCK, BLOCK), -BIG, device=self.dev).triu(1).repeat(self.G, 1)  # (G * BLOCK, BLOCK)

    def zeros(self, *shape, dtype=torch.float32):
        return torch.zeros(*shape, device=self.dev, dtype=dtype)

    def new_layer(self):
        l = Layer()
        l.len = l.n = 0
        l.limit, l.keep = 1024, 0
        l.K = l.V = None
        return l

    def arrays(self, l):
        return [name for name in ("K", "V", "pos", "alive", "score", "u", "mass") if getattr(l, name, None) is not None]

    def grow(self, l, width):
        S, H = self.S, self.H
        if l.K is None:
            l.K, l.V = self.zeros(S, H, width, WIDE), self.zeros(S, H, width, WIDE)
            l.pos, l.alive = self.zeros(S, H, width), self.zeros(S, H, width, dtype=torch.bool)
            l.score, l.u = self.zeros(S, H, width), self.zeros(S, H, width)
            l.mass = self.zeros(S, H, width) if self.mass_decay is not None else None
        elif width > l.K.shape[2]:
            for name in self.arrays(l):
                old = getattr(l, name)
                new = torch.zeros((S, H, width) + old.shape[3:], device=self.dev, dtype=old.dtype)
                new[:, :, :l.len] = old[:, :, :l.len]
                setattr(l, name, new)

    def squeeze(self, l):
        """Live entries to the front, in order."""
        live = int(l.alive[:, :, :l.len].sum(-1).max())
        if live < 0.8 * l.len:
            order = torch.sort((~l.alive[:, :, :l.len]).to(torch.uint8), dim=-1, stable=True)[1][:, :, :live]
            for name in self.arrays(l):
                a = getattr(l, name)
                index = order if a.dim() == 3 else order[..., None].expand(-1, -1, -1, a.shape[3])
                a[:, :, :live] = a[:, :, :l.len].gather(2, index)
            l.len, l.parts = live, None
        l.limit = l.len + max(512, l.len // 4)

    def append(self, l, k, v):
        b = k.shape[2]
        if l.len + b > l.limit or l.K is None:
            if l.K is not None:
                self.squeeze(l)
            self.grow(l, max(l.limit, l.len + b))
        s = slice(l.len, l.len + b)
        l.K[:, :, s, :self.d], l.V[:, :, s, :self.d] = k, v
        l.K[:, :, s, self.d:] = 0
        l.V[:, :, s, self.d:] = 0
        l.pos[:, :, s] = torch.arange(l.n, l.n + b, device=self.dev, dtype=torch.float32)
        l.alive[:, :, s] = True
        if l.mass is not None:
            l.mass[:, :, s] = 0
        l.len += b

    def extend(self, layer, q, k, v):
        l, S, H, G, d = self.layers[layer], self.S, self.H, self.G, self.d
        b = q.shape[2]
        self.append(l, k, v)
        self.mark(l)
        W = l.len
        q1 = torch.zeros(S * H, G * b, WIDE, device=self.dev)
        q1[..., :d] = q.reshape(S * H, G * b, d) * (1 / math.sqrt(d))
        q1[..., d] = 1
        K, V = l.K[:, :, :W].reshape(S * H, -1, WIDE) if l.K.shape[2] == W else l.K[:, :, :W].flatten(0, 1), None
        logits = torch.bmm(q1, K.transpose(1, 2))
        logits[:, :, W - b:] += self.causal if b == BLOCK else self.causal.view(G, BLOCK, BLOCK)[:, :b, :b].reshape(G * b, b)
        p = torch.softmax(logits, -1)
        out = torch.bmm(p, l.V[:, :, :W].flatten(0, 1)).view(S, H, G, b, WIDE)
        if self.far_output:
            far = torch.bmm(p, l.V[:, :, :W, :d].flatten(0, 1) * l.V[:, :, :W, d].flatten(0, 1)[..., None]).view(S, H, G, b, d)
            self.far_norms = far.square().sum(-1)[..., ::self.every].mean((2, 3)), out[..., :d].square().sum(-1)[..., ::self.every].mean((2, 3))
        if self.bits:
            for a in (l.K, l.V):
                a[:, :, W - b:W, :d] = quantised(a[:, :, W - b:W, :d], self.bits, self.group, self.hadamard if self.turn else None)
        l.n += b
        self.observe(layer, l, p, out[..., d:])
        self.select(layer, l)
        return out[..., :d].reshape(S, H * G, b, d)

    def mark(self, l):
        pass

    def observe(self, layer, l, p, parts):
        """p: (S * H, G * b, W), parts: (S, H, G, b, 8)."""

    def select(self, layer, l):
        pass

    def tick(self, n):
        """After n tokens, all layers done."""

    def entries(self):
        return sum(l.alive[:, :, :l.len].sum((1, 2)) for l in self.layers)  # (S)


def threshold(x, count, largest):
    """The count-th largest (smallest) of the last axis, with a count for each row; +-inf where count is 0."""
    y = torch.sort(x, dim=-1, descending=largest)[0]
    t = y.gather(-1, (count.clamp(1, x.shape[-1]) - 1)[..., None].long())[..., 0]
    return torch.where(count > 0, t, torch.full_like(t, math.inf if largest else -math.inf))


class Recorder(Policy):
    """Exact attention; records per block the mean over queries of the mass beyond each distance, and of its square."""

    def __init__(self, model, S, length, distances=(256, 1024, 4096)):
        super().__init__(model, S, length)
        self.distances, self.log = distances, []

    def new_layer(self):
        l = super().new_layer()
        l.limit = self.length + BLOCK
        return l

    def mark(self, l):
        for i, distance in enumerate(self.distances):
            l.V[:, :, :l.len, self.d + i] = (l.pos[:, :, :l.len] < l.n - distance).float()

    def observe(self, layer, l, p, parts):
        far = parts[..., :len(self.distances)]  # (S, H, G, b, distances)
        self.log.append(torch.stack([far.mean((2, 3)), far.square().mean((2, 3)), far.mean(3).amax(2)], -1).half().cpu())

    def result(self):
        """(blocks, layers, S, H, distances, 3) when chunks are one block; the caller reorders."""
        return torch.stack(self.log)


class Express(Policy):
    """Sinks, exact tail, protected entries by score, coreset by priority sampling; budgets per head, settled online if asked."""

    def __init__(self, model, S, length, budget, base=5 / 16, window=0.6, protect=0.28, alpha=0.5, seed=0, sinks=4,
                 budgets="equal", far=None, power=2.0, shrink=0.0, signal="mean", distance=1024, half_life=0, settle="double",
                 cap=0.0, score="energy", mass_share=0.0, mass_decay=None, mass_power=1.0, core_power=0.576, heads="mean", rescore=None,
                 marginal=0.0, window_range=(0.3, 0.9), smooth=0.0, coreset=True, sink_far=True, first=1.0, every=1, update="fresh", protect_top=False,
                 bits=0, group=64, turn=False):
        c = dict(locals())
        for name in ("self", "model", "S", "length", "__class__"):
            c.pop(name, None)
        self.__dict__.update(c)
        self.mass_decay = mass_decay
        super().__init__(model, S, length)
        self.generator = torch.Generator(device=self.dev).manual_seed(1000 + seed)
        L, H = model.layers, self.H
        self.window0 = window
        equal = self.zeros(L, S, H) + budget
        self.B = equal
        if budgets == "profile":
            self.B = self.shares(torch.as_tensor(far, device=self.dev).float().view(L, 1, H).expand(L, S, H), None)
        elif budgets == "given":  # far: (L, S, H)
            self.B = self.shares(far.to(self.dev), None)
        self.signal_sum, self.signal_weight = self.zeros(L, S, H), 0.0
        self.part_sum = self.zeros(L, S, H, 2)
        self.norm_sum = self.zeros(L, S, H)
        self.far_output = signal in ("out", "outabs") and budgets == "online"
        self.next_settle = int(first * budget) if budgets == "online" else 1 << 60
        self.history = []
        self.divide()

    # Budgets ---------------------------------------------------------------------------------------------------------
    def shares(self, signal, n):
        """signal (L, S, H) -> entries of each head, L * H * budget in all for each sequence."""
        L, S, H = signal.shape
        base = self.base * self.budget
        share = signal.clamp_min(1e-6) ** self.power
        if self.signal == "edge":  # signal: mass per entry at the old end of the tail
            ratio = (signal / signal.mean((0, 2), keepdim=True)).clamp(1 / 8, 8)
            share = (self.B - base).clamp_min(0.05 * self.budget) * ratio ** self.power
        share = share / share.sum((0, 2), keepdim=True)
        share = (1 - self.shrink) * share + self.shrink / (L * H)
        rest = L * H * (self.budget - base)
        B = base + rest * share
        if self.cap and n:  # no head can use more than cap * n entries before the next settling; the others take the excess
            top = self.cap * n
            for _ in range(4):
                over = (B - top).clamp_min(0).sum((0, 2), keepdim=True)
                B = B.clamp_max(top)
                room = torch.where(B < top, share, torch.zeros_like(share))
                B = B + over * room / room.sum((0, 2), keepdim=True).clamp_min(1e-9)
            B = B.clamp_max(top) if top * L * H >= L * H * self.budget else B
        return B.floor()

    def divide(self):
        """Budgets to window, protected and coreset of each head."""
        base = torch.minimum(self.B, torch.full_like(self.B, self.base * self.budget))
        base = torch.minimum(base, self.B - self.sinks)
        rest = self.B - base - self.sinks
        window = self.window * torch.ones_like(rest)
        self.w = (base + window * rest).floor().clamp_min(1)
        self.P = (self.protect / (1 - self.window0) * (1 - window) * rest).floor()
        if self.protect_top:  # only heads with more than the mean protect; the others have a longer tail
            small = self.B <= self.budget
            self.w = torch.where(small, self.B - self.sinks, self.w)
            self.P = torch.where(small, torch.zeros_like(self.P), self.P)
        core = self.B - self.sinks - self.w - self.P
        if not self.coreset:
            self.P, core = self.P + core, core * 0
        self.C = core

    def tick(self, n):
        if n < self.next_settle or self.budgets != "online":
            return
        signal = self.signal_sum / max(self.signal_weight, 1e-9)
        if self.signal == "rms":
            signal = signal.sqrt()
        elif self.signal == "out":  # share of the output that far entries bring: root mean square of the one over that of the other
            signal = (self.signal_sum / self.norm_sum.clamp_min(1e-12)).sqrt()
        elif self.signal == "outabs":
            signal = signal.sqrt()
        # fresh: what was seen since the last settling; frozen: what the first one saw; keep: a head whose tail was too short to see that far
        # does not fall; mean: geometric mean of before and now. (cumulative: sums are not reset)
        old = getattr(self, "last", None)
        if old is not None and self.update == "frozen":
            signal = old
        elif old is not None and self.update == "keep":
            far = self.distance * self.budget
            signal = torch.where(self.w < far, torch.maximum(signal, old), signal)
        elif old is not None and self.update == "mean":
            signal = (signal.clamp_min(1e-6) * old.clamp_min(1e-6)).sqrt()
        self.last = signal
        new = self.shares(signal, n)
        self.B = new if not self.smooth or not self.history else self.smooth * self.B + (1 - self.smooth) * new
        self.B = self.B.floor()
        self.history.append((n, self.B.mean(1).cpu()))
        if self.marginal and self.history[1:]:  # mass per entry: of protected ones against the oldest quarter of the window
            parts = self.part_sum / max(self.signal_weight, 1e-9)
            edge, protected = parts[..., 0] / (self.w / 4), parts[..., 1] / self.P.clamp_min(1)
            ratio = ((protected + 1e-9) / (edge + 1e-9)).clamp(0.1, 10) ** self.marginal
            odds = (1 - self.window) / self.window * ratio
            self.window = (1 / (1 + odds)).clamp(self.window_range[0], self.window_range[1])
            self.ratio = (edge.mean(1).cpu(), protected.mean(1).cpu(), self.window.mean(1).cpu())
        self.divide()
        self.part_sum.zero_()
        if self.settle == "once":
            self.next_settle = 1 << 60
        elif self.settle == "double":
            self.next_settle = 2 * n
        else:
            self.next_settle = n + int(self.settle)
        if not self.half_life and self.update != "cumulative":
            self.signal_sum.zero_()
            self.norm_sum.zero_()
            self.signal_weight = 0.0

    # Observation -----------------------------------------------------------------------------------------------------
    def mark(self, l):
        if self.budgets == "online":
            # distance: tokens if above 8, of the mean budget if positive, of the tokens so far if negative
            far = self.distance if self.distance > 8 else self.distance * self.budget if self.distance > 0 else -self.distance * l.n
            pos = l.pos[:, :, :l.len]
            if self.signal == "edge":
                tail = self.w[l.index].clamp_max(max(l.n, 1))[..., None]
                marked = (pos >= l.n - tail) & (pos < l.n - 0.75 * tail)
            else:
                marked = pos < l.n - far
            if self.sink_far == "only":
                marked = pos < self.sinks
            elif not self.sink_far:
                marked &= pos >= self.sinks
            l.V[:, :, :l.len, self.d] = marked.float()
            if self.marginal and getattr(l, "parts", None) is not None:
                l.V[:, :, :l.parts.shape[2], self.d + 1:self.d + 3] = l.parts

    def observe(self, layer, l, p, parts):
        if self.mass_decay is not None:
            l.mass[:, :, :l.len] *= self.mass_decay
            l.mass[:, :, :l.len] += p.sum(1).view(self.S, self.H, -1)
        if self.budgets == "online":
            if self.marginal and getattr(l, "parts", None) is not None:
                self.part_sum[layer] += parts[..., 1:3].mean((2, 3))
            far = parts[..., 0]  # (S, H, G, b)
            if self.signal == "rms":
                far = far.square()
            far = far[..., ::self.every].mean(3)
            if self.signal == "edge":
                far = far / self.w[layer].clamp_max(max(l.n, 1))[..., None] * 4000
            if self.far_output:
                self.signal_sum[layer] += self.far_norms[0]
                self.norm_sum[layer] += self.far_norms[1]
                self.signal_weight += layer == 0
                return
            keep = 0.5 ** (1 / self.half_life) if self.half_life else 1.0  # half-life in blocks
            self.signal_sum[layer] = self.signal_sum[layer] * keep + (far.amax(2) if self.heads == "max" else far.mean(2))
            if layer == 0:
                self.signal_weight = self.signal_weight * keep + 1

    # Selection -------------------------------------------------------------------------------------------------------
    def append(self, l, k, v):
        super().append(l, k, v)
        s = slice(l.len - k.shape[2], l.len)
        l.u[:, :, s] = torch.rand(k.shape[:3], generator=self.generator, device=self.dev)
        if "free" in self.score:  # keys before RoPE
            cos, sin = self.m.angles(l.n, l.n + k.shape[2])
            key = rotate(k, cos, -sin)
        else:
            key = k
        if not hasattr(l, "mean"):
            l.mean, l.recent = key.mean(2, keepdim=True), []
        # mu is the mean of the last run of 256 keys
        l.recent.append(key)
        if len(l.recent) == 4:
            l.mean, l.recent = torch.cat(l.recent, 2).mean(2, keepdim=True), []
        e = (key - l.mean).square().sum(-1)
        if "value" in self.score:
            e = e * v.square().sum(-1).sqrt()
        l.score[:, :, s] = e

    def rank_score(self, l, W):
        return l.score[:, :, :W] if not self.mass_share or self.mass_share < 1 else l.mass[:, :, :W]

    def select(self, layer, l):
        W, n = l.len, l.n
        B, w, P = self.B[layer], self.w[layer], self.P[layer]
        if n <= self.budget * self.base or bool(False):
            return
        pos, alive = l.pos[:, :, :W], l.alive[:, :, :W]
        window = alive & (pos >= n - w[..., None])
        sinks = pos < self.sinks
        old = alive & ~window & ~sinks
        score = l.score[:, :, :W]
        if "times_mass" in self.score:
            score = score.clamp_min(1e-9).log() + self.mass_power * (l.mass[:, :, :W] + 1e-3).log()
        gone = torch.full_like(score, -math.inf)
        P2 = (P * self.mass_share).floor()
        x = torch.where(old, score, gone)
        prot = x >= threshold(x, P - P2, True)[..., None]
        prot &= old
        if self.mass_share:
            x = torch.where(old & ~prot, l.mass[:, :, :W] + 1e-7 * pos, gone)
            prot |= (x >= threshold(x, P2, True)[..., None]) & old
        rest = old & ~prot
        C = (B - self.sinks - window.sum(-1) - prot.sum(-1)).clamp_min(0)
        age = n - pos
        x = torch.where(rest, age * l.u[:, :, :W] ** (1 / self.core_power), -gone)
        keep = rest & (x <= threshold(x, C, False)[..., None])
        raw = torch.where(keep, age ** self.core_power, torch.zeros_like(age))
        represented = (n - self.sinks - window.sum(-1) - prot.sum(-1)).float()
        weight = (raw * (represented / raw.sum(-1).clamp_min(1e-9))[..., None]).clamp_min(1)
        live = (sinks & alive) | window | prot | keep
        if self.marginal:
            l.parts = torch.stack([window & (pos < n - 0.75 * w[..., None]), prot], -1).float()
        l.alive[:, :, :W] = live
        l.K[:, :, :W, self.d] = torch.where(live, torch.where(keep, self.alpha * weight.log(), torch.zeros_like(weight)), torch.full_like(weight, -BIG))


class Window(Express):
    """Sinks and window, with any budgets."""

    def divide(self):
        self.w, self.P, self.C = self.B - self.sinks, self.B * 0, self.B * 0

    def shares(self, signal, n):
        return super().shares(signal, n)


class Scored(Policy):
    """Sinks, a window of half the budget, and the best of the rest by a score that is renewed at each block: the rivals."""

    def __init__(self, model, S, length, budget, kind, window=0.5, sinks=4):
        self.budget, self.kind, self.w, self.sinks = budget, kind, (window if window > 1 else int(window * budget)), sinks
        if kind == "h2o":
            self.mass_decay = 1.0
        elif kind in ("snapkv", "tova"):
            self.mass_decay = 0.0
        super().__init__(model, S, length)

    def observe(self, layer, l, p, parts):
        if self.kind == "h2o":
            l.mass[:, :, :l.len] += p.sum(1).view(self.S, self.H, -1)
        elif self.kind == "snapkv":  # the last 32 queries, pooled over 7 neighbours
            b = p.shape[1] // self.G
            x = p.view(self.S * self.H, self.G, b, -1)[:, :, -32:].mean(2)
            x = torch.nn.functional.avg_pool1d(x, 7, 1, 3).mean(1)
            l.mass[:, :, :l.len] = x.view(self.S, self.H, -1)
        elif self.kind == "tova":
            b = p.shape[1] // self.G
            l.mass[:, :, :l.len] = p.view(self.S, self.H, self.G, b, -1)[:, :, :, -1].mean(2)

    def select(self, layer, l):
        W, n = l.len, l.n
        if n <= self.budget:
            return
        pos, alive = l.pos[:, :, :W], l.alive[:, :, :W]
        window = alive & (pos >= n - self.w)
        fixed = window | (alive & (pos < self.sinks))
        old = alive & ~fixed
        if self.kind == "keydiff":
            unit = torch.nn.functional.normalize(l.K[:, :, :W, :self.d], dim=-1)
            mean = (unit * alive[..., None]).sum(2, keepdim=True)
            score = -(unit * torch.nn.functional.normalize(mean, dim=-1)).sum(-1)
        elif self.kind == "knorm":
            score = -l.K[:, :, :W, :self.d].square().sum(-1)
        else:
            score = l.mass[:, :, :W] + 1e-9 * pos
        x = torch.where(old, score, torch.full_like(score, -math.inf))
        count = torch.full(x.shape[:2], self.budget - self.w - self.sinks, device=self.dev)
        live = fixed | ((x >= threshold(x, count, True)[..., None]) & old)
        l.alive[:, :, :W] = live
        l.K[:, :, :W, self.d] = torch.where(live, torch.zeros_like(score), torch.full_like(score, -BIG))
