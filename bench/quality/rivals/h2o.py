"""Heavy hitters: entries of the largest attention mass so far, and a window.

Z. Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", arXiv:2306.14048 (2023): the mass of an entry
is the sum of the probabilities that all queries since it came have given it; half of the budget is the last tokens, half the heavy hitters.
With grouped queries the mass is summed over the group. No sinks.
"""
from policy import SlabPolicy


class H2O(SlabPolicy):
    extras = ("mass",)
    extra_bytes = 4

    def __init__(self, *args, window_share=0.5, **options):
        super().__init__(*args, window_share=window_share, **options)

    def observe(self, layer, heads, slab, q, p, end):
        slab.mass.add_(p.sum((2, 3)))

    def score(self, layer, heads, slab, end):
        return self.keep(slab.mass, slab, end)
