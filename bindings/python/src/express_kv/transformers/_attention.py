"""The attention function "express" and its mask."""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ._cache import MARK, ExpressLayer


def express_mask(batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: int = 0,
                 mask_function: Any = causal_mask_function, attention_mask: Any = None, **kwargs: Any) -> Any:
    """The mask of layers that Express attends to: None without padding among the new tokens, else (batch, q_length) of bool.

    Everything else (sliding windows, other patterns than causal, the keys of other caches) gets the mask of "sdpa".
    With an attention_mask it is read once per forward pass, as "sdpa" does.
    """
    only_new = kv_length == q_length and "local_size" not in kwargs and kv_offset == q_offset
    if not only_new or mask_function is not causal_mask_function:
        return sdpa_mask(batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
                         mask_function=mask_function, attention_mask=attention_mask, **kwargs)
    if attention_mask is None:
        return None
    if attention_mask.shape[1] < kv_offset + kv_length:
        raise ValueError(f"attention_mask: expected shape (batch, {kv_offset + kv_length}), positions seen and new ones, "
                         f"got {tuple(attention_mask.shape)}")
    new = attention_mask[:, kv_offset:kv_offset + kv_length]
    return None if bool(new.all()) else new


def express_attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, dropout: float = 0.0,
                      scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any) -> tuple[Any, None]:
    """Attention of the new tokens over their ExpressCache, and their append to it; "sdpa" for all other keys.

    query: (batch, query_heads, n, key_dim)   key: (batch, kv_heads, n, key_dim)   value: (batch, kv_heads, n, value_dim)
    attention_mask: what express_mask made
    returns (batch, n, query_heads, value_dim) and no attention probabilities
    """
    layer: ExpressLayer | None = getattr(key, MARK, None)
    if layer is None:
        if attention_mask is not None and attention_mask.ndim == 2:
            n = int(query.shape[2])
            attention_mask = sdpa_mask(query.shape[0], n, n, attention_mask=attention_mask, device=query.device)
        out: Any = sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                                          is_causal=is_causal, **kwargs)
        return out[0], None
    sequences = layer.sequences
    if sequences.pending != (layer.index, key.shape[2]):
        raise NotImplementedError("express: these keys have been attended to already; layers that share keys and values are not supported")
    sequences.pending = None
    if layer.index == 0 and getattr(getattr(module, "config", None), "output_attentions", False):  # slow to look up, the same in all layers
        kwargs["output_attentions"] = True
    _refuse(module, query, attention_mask, dropout, is_causal, kwargs)
    scale = float(scaling) if scaling is not None else float(query.shape[3]) ** -0.5
    return sequences.attend(layer.index, module, query, key, value, attention_mask, scale), None


def _refuse(module: Any, query: Any, mask: Any, dropout: float, is_causal: bool | None, kwargs: dict[str, Any]) -> None:
    """Raises for what Express cannot do; nothing has been appended to this layer yet."""
    if torch.is_grad_enabled() and query.requires_grad:
        raise NotImplementedError("express: no gradients; run under torch.no_grad() or torch.inference_mode()")
    if dropout:
        raise NotImplementedError("express: no attention dropout; call model.eval()")
    if kwargs.get("output_attentions"):
        raise NotImplementedError("express: output_attentions is not supported, there are no attention probabilities of single tokens")
    if kwargs.get("softcap") is not None:
        raise NotImplementedError("express: attention logits cannot be soft-capped (attn_logit_softcapping of Gemma 2)")
    for name in ("position_bias", "s_aux", "sliding_window", "cache"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"express: {name} is not supported in a full-attention layer")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise NotImplementedError("express: only causal attention")
    if mask is not None and mask.ndim != 2:
        raise NotImplementedError("express: only causal masks with padding, as attention_mask of shape (batch, positions)")
