"""The last tokens, quantised: as many as fit into the bytes of the budget, or all of them at whatever size they have.

Z. Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", arXiv:2402.02750 (2024): keys per channel in groups of 32 tokens, values
per token in groups of 32 channels, each group from its minimum to its maximum, scale and minimum in float16; the last 128 tokens stay as they are.
Here also the 4 sinks. 8 or 4 bits a number.
"""
import torch

from policy import BLOCK, Policy, attention

GROUP, RESIDUAL, SINKS = 32, 128, 4


def quantise(x, bits, dim):
    """x after quantisation in groups of GROUP along `dim`, asymmetric, to nearest."""
    x = x.transpose(dim, -1)
    groups = x.reshape(*x.shape[:-1], -1, GROUP)
    low = groups.amin(-1, keepdim=True).half().float()
    step = ((groups.amax(-1, keepdim=True) - low) / (2 ** bits - 1)).half().float()
    code = ((groups - low) / step.clamp(min=1e-12)).round().clamp(0, 2 ** bits - 1)
    return (code * step + low).view(x.shape).transpose(dim, -1).contiguous()


class Quantised(Policy):
    """Sinks and the last RESIDUAL tokens exactly, before them a window of quantised ones (`whole`: all)."""

    def __init__(self, spec, sequences, budget, seed=0, device="cpu", bits=4, whole=False):
        super().__init__(spec, sequences, budget, seed, device)
        assert RESIDUAL % BLOCK == 0 and BLOCK % GROUP == 0 and spec.dim % GROUP == 0
        self.bits, self.whole = bits, whole
        # Codes; scales and minima of GROUP tokens' channels (keys) and of a token's GROUP channels (values).
        self.quantised_bytes = 2 * spec.dim * bits // 8 + 2 * spec.dim * 4 // GROUP
        exact = (SINKS + RESIDUAL) * spec.entry_bytes
        room = (budget * spec.entry_bytes - exact) // self.quantised_bytes
        if room < BLOCK and not whole:
            raise ValueError(f"budget: {budget} entries have no room for a quantised block")
        self.room = None if whole else room
        self.state = [None] * spec.layers

    def extend_block(self, layer, q, k, v):
        if self.state[layer] is None:
            none = k[:, :, :0]
            self.state[layer] = {"sinks": (k[:, :, :SINKS].clone(), v[:, :, :SINKS].clone()), "old": [none, none], "used": 0, "next": 0, "recent": []}
        state = self.state[layer]
        recent = state["recent"]
        first = self.seen[layer] // BLOCK == len(recent)  # the sinks are among the recent blocks
        parts = [[x[:, :, :state["used"]]] + [block[i] for block in recent] + [new] for i, (x, new) in enumerate(zip(state["old"], (k, v)))]
        if not first:
            for part, sinks in zip(parts, state["sinks"]):
                part.insert(0, sinks)
        out, _ = attention(q, *(torch.cat(part, 2) for part in parts), self.spec.scale, fresh=k.shape[2])
        recent.append((k.clone(), v.clone()))
        if len(recent) > RESIDUAL // BLOCK:
            self._store(state, *recent.pop(0), first)
        return out

    def _store(self, state, k, v, first):
        """A block leaves the exact tail: quantised, over the oldest one if the room is full."""
        k, v = quantise(k, self.bits, 2), quantise(v, self.bits, 3)
        if first:  # the sinks are kept elsewhere
            k, v = k[:, :, SINKS:], v[:, :, SINKS:]
        n, held = k.shape[2], state["old"][0].shape[2]
        if held < (state["used"] + n if self.whole else self.room):
            more = max(1024, held) if self.whole else self.room
            state["old"] = [torch.cat((x, x.new_empty(*x.shape[:2], more, x.shape[3])), 2) for x in state["old"]]
            held += more
        place = (state["next"] + torch.arange(n, device=k.device)) % held
        state["old"][0][:, :, place], state["old"][1][:, :, place] = k, v
        state["next"] = (state["next"] + n) % held
        state["used"] = min(state["used"] + n, held)

    def bytes(self):
        per_head = 0
        for state in self.state:
            if state:
                exact = sum(block[0].shape[2] for block in state["recent"]) + SINKS
                per_head += exact * self.spec.entry_bytes + state["used"] * self.quantised_bytes
        return per_head * self.spec.kv_heads

    def entries(self):
        return [[state["used"] + SINKS + sum(b[0].shape[2] for b in state["recent"]) if state else 0] * self.spec.kv_heads for state in self.state]
