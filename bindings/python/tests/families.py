"""Small randomly initialised models of the families that Express serves. Their weights are large, so that tokens depend on attention."""

import copy

import torch
import transformers
from transformers import (Gemma2Config, Gemma3TextConfig, GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config)

SIZE = dict(vocab_size=132, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, max_position_embeddings=2048, initializer_range=0.25, pad_token_id=0, bos_token_id=1, eos_token_id=None)
WINDOWED = ["sliding_attention", "full_attention", "sliding_attention"]

# name: (configuration, its full-attention layers)
FAMILIES = {
    "llama": (LlamaConfig(**SIZE), [0, 1, 2]),
    "llama-mha": (LlamaConfig(**{**SIZE, "num_key_value_heads": 4}), [0, 1, 2]),
    "qwen2": (Qwen2Config(**SIZE), [0, 1, 2]),
    "qwen2-sliding": (Qwen2Config(**SIZE, use_sliding_window=True, sliding_window=24, layer_types=WINDOWED), [1]),
    "qwen3": (Qwen3Config(**SIZE), [0, 1, 2]),
    "mistral": (MistralConfig(**SIZE, sliding_window=None), [0, 1, 2]),
    "mistral-sliding": (MistralConfig(**SIZE, sliding_window=24), []),
    "gemma": (GemmaConfig(**SIZE), [0, 1, 2]),
    "gemma2-uncapped": (Gemma2Config(**SIZE, attn_logit_softcapping=None, sliding_window=24, layer_types=WINDOWED), [1]),
    "gemma3": (Gemma3TextConfig(**SIZE, sliding_window=24, layer_types=WINDOWED, query_pre_attn_scalar=20), [1]),
}


def model_of(config, attention="express"):
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention)
    return model.eval()


def prompts(batch, n, seed=1):
    """Left-padded prompts: input_ids and attention_mask, (batch, n)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, SIZE["vocab_size"], (batch, n), generator=generator)
    mask = torch.ones_like(ids)
    for i in range(1, batch):
        mask[i, : n * i // (batch + 1)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}
