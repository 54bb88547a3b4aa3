"""Keys that differ from the rest.

J. Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained Environments",
arXiv:2504.15364 (2025): the anchor is the mean of the normalised keys that are held; those of the largest cosine similarity with it go. Block by block, no
sinks, no window.
"""
import torch

from policy import SlabPolicy


class KeyDiff(SlabPolicy):
    def score(self, layer, heads, slab, end):
        unit = torch.nn.functional.normalize(slab.k, dim=-1)
        anchor = torch.nn.functional.normalize(unit.mean(2, keepdim=True), dim=-1)
        return self.keep(-(unit @ anchor.transpose(2, 3))[..., 0], slab, end)
