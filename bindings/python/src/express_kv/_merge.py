"""Attention over parts of a sequence, put together."""

from __future__ import annotations

from typing import Any, Sequence

from ._arrays import library


def merge(outs: Sequence[Any], lses: Sequence[Any]) -> tuple[Any, Any]:
    """Attention over the union of disjoint sets of tokens, from attention over each of them.

    outs: arrays of one shape (..., value_dim), what `attend` or `prefill` returned for the same queries, over the tokens of one part each
    lses: arrays (...) of float32, the log-sum-exps of the same calls

    Returns out (..., value_dim) of the type of outs[0], and lse (...) of float32: sum_i exp(lse_i - lse) out_i with lse = log sum_i exp(lse_i).
    A part without tokens (lse = -inf) counts for nothing; without any, out = 0 and lse = -inf. NumPy's arrays or PyTorch's tensors.
    """
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(f"outs, lses: expected as many of one as of the other, at least one, got {len(outs)} and {len(lses)}")
    for out, lse in zip(outs, lses):
        if tuple(out.shape) != tuple(outs[0].shape) or tuple(lse.shape) != tuple(outs[0].shape)[:-1]:
            raise ValueError(f"outs, lses: expected shapes {tuple(outs[0].shape)} and {tuple(outs[0].shape)[:-1]}, "
                             f"got {tuple(out.shape)} and {tuple(lse.shape)}")
    if library(outs[0]) == "torch":
        return _merge_torch(outs, lses)
    import numpy

    part = numpy.stack([numpy.asarray(lse, numpy.float32) for lse in lses])  # (parts, ...)
    lse = numpy.logaddexp.reduce(part)
    weight = numpy.exp(part - numpy.where(numpy.isneginf(lse), numpy.float32(0), lse))
    out = (weight[..., None] * numpy.stack([numpy.asarray(out, numpy.float32) for out in outs])).sum(0)
    return out.astype(outs[0].dtype), lse


def _merge_torch(outs: Sequence[Any], lses: Sequence[Any]) -> tuple[Any, Any]:
    import torch

    part = torch.stack(tuple(lses)).float()  # (parts, ...)
    lse = torch.logsumexp(part, 0)
    weight = torch.exp(part - lse.masked_fill(lse.isneginf(), 0))
    out = (weight[..., None] * torch.stack(tuple(outs)).float()).sum(0)
    return out.to(outs[0].dtype), lse
