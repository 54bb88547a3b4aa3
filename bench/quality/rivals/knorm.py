"""Short keys.

A. Devoto, Y. Zhao, S. Scardapane, P. Minervini, "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv:2406.11430 (2024):
entries of the smallest key norm stay, which in many models are those that get the most attention. No sinks, no window. (The paper leaves the first two
layers whole; at an equal budget for all layers that is no option.)
"""
from policy import SlabPolicy


class Knorm(SlabPolicy):
    def score(self, layer, heads, slab, end):
        return self.keep(-slab.k.norm(dim=-1), slab, end)
