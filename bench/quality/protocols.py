"""When a policy is at work.

stream    from the first token to the last: decoding under a hard budget
prefill   on all but the last quarter; that quarter is decoded exactly, over the keys and values of all tokens (which the approximate prefill has made)
"""
import torch

from policy import BLOCK, Policy
from rivals.exact import Exact


def prompt_length(n):
    return n * 3 // 4 // BLOCK * BLOCK


class PrefillThenExact(Policy):
    def __init__(self, inner, prompt):
        super().__init__(inner.spec, inner.sequences, inner.budget, 0, inner.device)
        self.chunk = inner.chunk
        self.inner, self.prompt, self.exact = inner, prompt, Exact(inner.spec, inner.sequences, 0, 0, inner.device)

    def extend(self, layer, q, k, v):
        left = self.prompt - self.seen[layer]
        if 0 < left < q.shape[2]:  # both in this chunk
            return torch.cat([self.extend(layer, *(x[:, :, part] for x in (q, k, v))) for part in (slice(left), slice(left, None))], 2)
        if left > 0:
            out = self.inner.extend(layer, q, k, v)
            self.exact.ingest(layer, k, v)
        else:
            out = self.exact.extend(layer, q, k, v)
        self.seen[layer] += q.shape[2]
        return out

    def bytes(self):
        return self.inner.bytes()  # of the approximate part: what a query reads during the prefill

    def entries(self):
        return self.inner.entries()
