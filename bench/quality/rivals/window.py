"""The first tokens and the last ones.

G. Xiao, Y. Tian, B. Chen, S. Han, M. Lewis, "Efficient Streaming Language Models with Attention Sinks", arXiv:2309.17453 (2023): 4 sinks, and
the rest of the budget is the window. Here keys keep the positions of their tokens, which all lie within the context of the model.
"""
from policy import SlabPolicy


class Window(SlabPolicy):
    def __init__(self, *args, sinks=4, **options):
        super().__init__(*args, sinks=sinks, **options)

    def score(self, layer, heads, slab, end):
        return self.keep(slab.pos.float(), slab, end)
