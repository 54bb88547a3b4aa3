"""Entries that queries to come are expected to attend to.

A. Devoto, M. Jeblick, S. Jegou, "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
arXiv:2510.00636 (2025), with the settings of NVIDIA's kvpress: queries before their rotation are taken for normal with the mean mu and the covariance C of those
seen (but the sinks'); R is the mean rotation of the next 512 positions; an entry's score is the softmax over entries of

    <R mu, k> / sqrt(d) + k' R C R' k / (2 d),      averaged over the group, times |v|.      4 sinks.
"""
import torch

from policy import SlabPolicy

FUTURE = 512


def rotation(cos, sin):
    """(d, d): the matrix that turns pairs (i, i + d / 2) by angles of cosine and sine (d / 2)."""
    return torch.cat((torch.cat((cos.diag(), -sin.diag()), 1), torch.cat((sin.diag(), cos.diag()), 1)))


class ExpectedAttention(SlabPolicy):
    def __init__(self, spec, sequences, *args, sinks=4, **options):
        super().__init__(spec, sequences, *args, sinks=sinks, **options)
        d = spec.dim
        self.frequency = spec.rope_theta ** (-torch.arange(0, d, 2, dtype=torch.float64, device=self.device) / d)
        shape = (spec.layers, sequences, spec.q_heads, d)
        self.sum, self.square = torch.zeros(shape, device=self.device), torch.zeros(*shape, d, device=self.device)  # of queries before rotation
        self.head_bytes = 4 * spec.group * (d + d * d)

    def observe(self, layer, heads, slab, q, p, end):
        """q: (S, H G, n, d)"""
        begin = end - q.shape[2]
        angle = torch.outer(torch.arange(begin, end, dtype=torch.float64, device=q.device), self.frequency)
        cos, sin = angle.cos().float(), angle.sin().float()
        a, b = q.chunk(2, -1)
        plain = torch.cat((a * cos + b * sin, b * cos - a * sin), -1)[:, :, max(0, self.sinks - begin):]
        self.sum[layer].index_add_(1, slab.q_index, plain.sum(2))
        self.square[layer].index_add_(1, slab.q_index, plain.transpose(2, 3) @ plain)

    def score(self, layer, heads, slab, end):
        (S, H, N, d), G, scale = slab.k.shape, self.spec.group, self.spec.scale
        count = end - self.sinks
        mean = self.sum[layer][:, slab.q_index] / count
        covariance = self.square[layer][:, slab.q_index] / count - mean[..., :, None] * mean[..., None, :]
        angle = torch.outer(torch.arange(end, end + FUTURE, dtype=torch.float64, device=slab.k.device), self.frequency)
        R = rotation(angle.cos().mean(0).float(), angle.sin().mean(0).float())
        mean, covariance = (mean @ R.T).view(S, H, G, d), (R @ covariance @ R.T).view(S, H, G, d, d)
        k = slab.k
        logits = scale * (mean @ k.transpose(2, 3))  # (S, H, G, N)
        for i in range(G):
            logits[:, :, i] += scale ** 2 / 2 * ((k @ covariance[:, :, i]) * k).sum(-1)
        held = slab.pos >= self.sinks
        p = torch.softmax(logits.masked_fill(~held[:, :, None], -torch.inf), -1).mean(2)
        return self.keep(p * slab.v.norm(dim=-1), slab, end)
