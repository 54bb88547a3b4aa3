"""Sinks, window and a uniform sample of the tokens between, each with the weight of those it stands for: the rival to beat.

Every token gets a random number; the sample is those with the largest, which is a reservoir sample (J. S. Vitter, "Random sampling with a
reservoir", 1985) of equal inclusion probability. With M of N tokens in the sample each has weight N / M, to the power `alpha`.
"""
import math

import torch

from policy import SlabPolicy


class Coreset(SlabPolicy):
    extras = ("number", "log_weight")
    extra_bytes = 8

    def __init__(self, *args, sinks=4, window_share=0.5, alpha=1.0, **options):
        super().__init__(*args, sinks=sinks, window_share=window_share, **options)
        self.alpha = alpha

    def observe(self, layer, heads, slab, q, p, end):
        new = slab.number[:, :, slab.total - q.shape[2]:]
        new.copy_(torch.rand(new.shape, generator=self.random, device=self.device))

    def score(self, layer, heads, slab, end):
        return self.keep(slab.number, slab, end)

    def extend_slab(self, layer, heads, slab, q, k, v):
        out = super().extend_slab(layer, heads, slab, q, k, v)
        end, window = self.seen[layer] + q.shape[2], self.window_of(slab)
        if end > slab.capacity:
            between = end - self.sinks - window  # tokens that the sample stands for
            weight = self.alpha * math.log(between / (slab.capacity - self.sinks - window))
            exact = (slab.pos >= end - window) | (slab.pos < self.sinks)
            slab.log_weight.copy_(torch.where(exact, 0.0, weight))
        return out
