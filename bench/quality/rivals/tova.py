"""Entries that the last query attends to.

M. Oren, M. Hassid, N. Yarden, Y. Adi, R. Schwartz, "Transformers are Multi-State RNNs", arXiv:2401.06104 (2024): the entry of the lowest
probability under the newest query, averaged over the heads of the layer, goes; all heads of a layer keep the same tokens. No sinks, no window but
the newest token (which in the paper competes too, and in practice stays). The query is the last of the block.
"""
from policy import SlabPolicy


class Tova(SlabPolicy):
    def __init__(self, *args, window=1, **options):
        super().__init__(*args, window=window, **options)

    def observe(self, layer, heads, slab, q, p, end):
        self.last = p[:, :, :, -1].mean((1, 2))  # (S, total)

    def score(self, layer, heads, slab, end):
        return self.keep(self.last[:, None].expand(-1, len(heads), -1), slab, end)
