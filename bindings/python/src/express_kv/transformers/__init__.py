"""Express under Hugging Face transformers: a cache for `generate`, and the attention that reads it.

    from express_kv.transformers import ExpressCache

    model.set_attn_implementation("express")
    model.generate(**inputs, past_key_values=ExpressCache(config=model.config, budget=1024))

Importing this module registers the attention function "express" and its mask with transformers. It needs PyTorch and
transformers 5.17 or later (pip install express-kv[transformers]).
"""

from __future__ import annotations

from transformers import AttentionInterface, AttentionMaskInterface

from ._attention import express_attention, express_mask
from ._cache import ExpressCache, ExpressLayer
from ._graph import decode_graph

NAME = "express"
AttentionInterface.register(NAME, express_attention)
AttentionMaskInterface.register(NAME, express_mask)

__all__ = ["NAME", "ExpressCache", "ExpressLayer", "decode_graph", "express_attention", "express_mask"]
