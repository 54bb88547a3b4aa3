"""Everything, exactly."""
import torch

from policy import Policy, attention


class Exact(Policy):
    """tokens: room to begin with; it grows beyond."""

    def __init__(self, spec, sequences, budget, seed=0, device="cpu", tokens=0):
        super().__init__(spec, sequences, budget, seed, device)
        room = lambda: torch.empty(sequences, spec.kv_heads, tokens, spec.dim, device=device)
        self.held = [(room(), room()) for _ in range(spec.layers)]  # keys and values, of which the first `seen` are in use

    def extend_block(self, layer, q, k, v):
        begin, end = self.seen[layer], self.seen[layer] + k.shape[2]
        if end > self.held[layer][0].shape[2]:
            self.held[layer] = tuple(torch.cat((x, x.new_empty(*x.shape[:2], max(2048, x.shape[2]), x.shape[3])), 2) for x in self.held[layer])
        keys, values = self.held[layer]
        keys[:, :, begin:end], values[:, :, begin:end] = k, v
        if q is not None:
            return attention(q, keys[:, :, :end], values[:, :, :end], self.spec.scale)[0]

    def ingest(self, layer, k, v):
        """Holds further tokens without attention; not more than what is held, or 2048."""
        self.extend_block(layer, None, k, v)
        self.seen[layer] += k.shape[2]

    def bytes(self):
        return self.spec.kv_heads * self.spec.entry_bytes * sum(self.seen)

    def entries(self):
        return [[n] * self.spec.kv_heads for n in self.seen]
