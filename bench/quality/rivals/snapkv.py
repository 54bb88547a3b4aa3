"""Entries that the last queries attend to, and their neighbours.

Y. Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv:2404.14469 (2024): the probabilities of the last 32 queries
(the observation window, which is kept), summed, under a maximum over 7 neighbouring entries; of grouped queries the mean. No sinks.

SnapKV   block-online: at the end of every block, on what is still held; the observation window is the block's last queries
SnapKVPrompt   as published: exact over a prompt, which is then cut to the budget once; the tokens that follow are all kept
"""
import torch

from policy import SlabPolicy, attention
from rivals.prompt import Prompt

OBSERVED, NEIGHBOURS = 32, 7
TIES = 1e-3  # neighbours under the same maximum are told apart by their own mass


def votes(p, observed=OBSERVED, neighbours=NEIGHBOURS):
    """p: (S, H, G, n, N), the last n of the N entries are the queries' own. Returns scores (S, H, N - observed) of all but the observation window."""
    S, H, G, n, N = p.shape
    observed = min(observed, n)
    mass = p[:, :, :, n - observed:, :N - observed].sum(3)  # (S, H, G, N - observed)
    pooled = torch.nn.functional.max_pool1d(mass.flatten(0, 1), neighbours, 1, neighbours // 2)
    return (pooled.view(S, H, G, -1) + TIES * mass).mean(2)


class SnapKV(SlabPolicy):
    ordered = True

    def observe(self, layer, heads, slab, q, p, end):
        if slab.total > slab.capacity:
            self.votes = votes(p)

    def score(self, layer, heads, slab, end):
        own = slab.total - self.votes.shape[2]
        return self.keep(torch.nn.functional.pad(self.votes, (0, own), value=torch.inf), slab, end)


class SnapKVPrompt(Prompt):
    def cut(self, layer, q, k, v):
        _, p = attention(q, k, v, self.spec.scale)
        chosen = votes(p).topk(self.budget - OBSERVED).indices.sort().values  # (S, H, budget - OBSERVED)
        own = torch.arange(self.prompt - OBSERVED, self.prompt, device=q.device).expand(*chosen.shape[:2], -1)
        places = torch.cat((chosen, own), 2)[..., None].expand(-1, -1, -1, self.spec.dim)
        return k.gather(2, places), v.gather(2, places), None
