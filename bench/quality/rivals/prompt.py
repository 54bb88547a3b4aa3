"""Compression of a prompt: exact over the prompt, which is then cut to the budget once; all tokens that follow are kept."""
import torch

from policy import Policy, attention
from rivals.exact import Exact


class Prompt(Policy):
    """A subclass gives cut(). prompt: tokens, a multiple of the block."""

    def __init__(self, spec, sequences, budget, seed=0, device="cpu", prompt=0):
        super().__init__(spec, sequences, budget, seed, device)
        self.prompt, self.exact, self.peak = prompt, Exact(spec, sequences, 0, seed, device), 0
        self.after = [None] * spec.layers  # keys, values (S, H, n, d) and log weights (S, H, n)

    def cut(self, layer, q, k, v):
        """Keys, values and log weights (or None) that stay of the prompt's k, v (S, H, prompt, d). q: the queries of its last block."""
        raise NotImplementedError

    def extend_block(self, layer, q, k, v):
        if self.seen[layer] >= self.prompt:
            zeros = torch.zeros(k.shape[:3], device=k.device)
            self.after[layer] = tuple(torch.cat(x, 2) for x in zip(self.after[layer], (k, v, zeros)))
            keys, values, log_weight = self.after[layer]
            return attention(q, keys, values, self.spec.scale, log_weight, k.shape[2])[0]
        out = self.exact.extend(layer, q, k, v)
        if self.exact.seen[layer] == self.prompt:
            keys, values = (x[:, :, :self.prompt] for x in self.exact.held[layer])
            keys, values, log_weight = self.cut(layer, q, keys, values)
            self.after[layer] = keys, values, torch.zeros(keys.shape[:3], device=k.device) if log_weight is None else log_weight
            self.peak = max(self.peak, self.exact.bytes())
            self.exact.held[layer] = tuple(x[:, :, :0] for x in self.exact.held[layer])
        return out

    def bytes(self):
        """Before the cut everything is held."""
        return max(self.peak, self.spec.kv_heads * self.spec.entry_bytes * sum(row[0] for row in self.entries()))

    def entries(self):
        """After the cut."""
        return [[x[0].shape[2] if x else 0] * self.spec.kv_heads for x in self.after]
