"""express_kv.transformers knows how models turn their keys: held to each model's own code."""

import importlib
import math

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("express_kv.transformers")

from express_kv.transformers import ExpressCache
from express_kv.transformers._rotary import MODEL_TYPES, rope_frequencies
from families import FAMILIES, SIZE, model_of, prompts

LLAMA3 = {"rope_type": "llama3", "rope_theta": 50000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 256}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def config_of(kind, **more):
    return transformers.AutoConfig.for_model(kind, **{**SIZE, **more})


def turned(config, keys):
    """keys (n, head_dim), one per position, as the model turns them."""
    module = importlib.import_module(f"transformers.models.{config.model_type}.modeling_{config.model_type}")
    rotary = next(getattr(module, name) for name in dir(module) if name.endswith("RotaryEmbedding"))(config=config)
    cos, sin = rotary(keys, torch.arange(keys.shape[0])[None])
    size = cos.shape[-1]
    part = keys[None, None, :, :size]
    return torch.cat((module.apply_rotary_pos_emb(part, part, cos, sin)[1][0, 0], keys[:, size:]), -1)


@pytest.mark.parametrize("kind,more", [(kind, {}) for kind in sorted(MODEL_TYPES)] +
                         [("llama", {"rope_parameters": LLAMA3}), ("qwen2", {"rope_parameters": LINEAR}), ("llama", {"head_dim": 24})])
def test_what_is_undone_is_what_the_model_did(kind, more):
    config = config_of(kind, **more)
    frequencies = torch.tensor(rope_frequencies(config), dtype=torch.float64)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = torch.randn(1, dim, generator=torch.Generator().manual_seed(2)).expand(40, -1)
    keys, n = turned(config, plain).double(), len(frequencies)
    assert n > 0 and not torch.allclose(keys, plain.double(), atol=0.1)
    angles = torch.arange(40)[:, None] * frequencies
    x, y = keys[:, :n].clone(), keys[:, n : 2 * n].clone()
    keys[:, :n], keys[:, n : 2 * n] = x * angles.cos() + y * angles.sin(), y * angles.cos() - x * angles.sin()
    assert torch.allclose(keys, plain.double(), atol=1e-4)


def test_what_is_not_known_is_not_guessed():
    assert rope_frequencies(config_of("llama", rope_parameters={**LINEAR, "rope_type": "dynamic"})) is None
    assert rope_frequencies(FAMILIES["gemma3"][0]) is None  # differs by kind of layer
    assert rope_frequencies(config_of("cohere")) is None  # interleaved
    assert rope_frequencies(transformers.GPT2Config()) is None


def test_caches_are_given_them():
    model, inputs = model_of(FAMILIES["llama"][0]), prompts(1, 200)

    def fields(**options):
        cache = ExpressCache(config=model.config, budget=64, **options)
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
        return cache.sequences[0]._options

    given = fields()["rope_frequencies"]
    assert len(given) == 8 and math.isclose(given[1], 10000.0 ** (-1 / 8))
    assert fields(protection_score="energy")["rope_frequencies"] == given
    assert fields(rope_frequencies=None)["rope_frequencies"] is None
    assert fields(rope_frequencies=[0.5])["rope_frequencies"] == [0.5]
