"""The rotary frequencies of a model, for scores of protection without positions."""

from __future__ import annotations

from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# Models whose layers all turn elements i and n + i of a key's first 2 n together, by token positions; the tests hold each to that.
MODEL_TYPES = frozenset({"gemma", "gemma2", "gpt_neox", "granite", "llama", "mistral", "mixtral", "olmo2", "phi", "phi3", "qwen2", "qwen2_moe",
                         "qwen3", "qwen3_moe", "starcoder2"})
FIXED = frozenset({"linear", "llama3"})  # kinds of scaling that do not change with the length


def rope_frequencies(config: Any) -> list[float] | None:
    """Radians per token of each pair, or None where they are not known or not the same all along."""
    text = config.get_text_config(decoder=True)
    parameters = getattr(text, "rope_parameters", None)
    if text.model_type not in MODEL_TYPES or not isinstance(parameters, dict) or any(isinstance(x, dict) for x in parameters.values()):
        return None
    kind = parameters.get("rope_type", "default")
    if kind in FIXED:
        return [float(x) for x in ROPE_INIT_FUNCTIONS[kind](text, None)[0]]
    if kind != "default":
        return None
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    turned = int(head_dim * (parameters.get("partial_rotary_factor") or 1.0)) // 2 * 2
    return [float(parameters["rope_theta"]) ** (-2 * i / turned) for i in range(turned // 2)]
