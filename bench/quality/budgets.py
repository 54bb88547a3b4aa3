"""How a mean budget is divided over layers and KV heads: lists (layers) of lists (KV heads) of entries."""
import json
import os

PROFILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "examples", "byte_lm", "model", "profile.json")


def far_mass(spec, path=None):
    """(layers, KV heads): the attention probability on tokens far back, as `express-lm profile` measures it; default: of the example's model."""
    with open(path or PROFILE) as file:
        rows = json.load(file)["far_mass"]
    if len(rows) != spec.layers or any(len(row) != spec.kv_heads for row in rows):
        raise ValueError(f"the profile is of {len(rows)} layers of {len(rows[0])} KV heads, the model has {spec.layers} of {spec.kv_heads}")
    return rows


def by_far_mass(spec, budget, power=2.0, base=5 / 16, path=None):
    """base * budget for every head, the rest in proportion to (far mass)^power: what Express does with a profile."""
    share = [[mass ** power for mass in row] for row in far_mass(spec, path)]
    least, total = int(budget * base), sum(map(sum, share))
    rest = (budget - least) * spec.layers * spec.kv_heads
    return [[least + int(rest * x / total) for x in row] for row in share]


def pyramid(spec, budget, beta=20, window=32):
    """Z. Cai et al., "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling", arXiv:2406.02069 (2024): beyond the
    observation window the last layer has 1 / beta of the mean, the first one as much more than the mean, those between on a line."""
    least = (budget - window) / beta
    most = 2 * (budget - window) - least
    step = (most - least) / max(1, spec.layers - 1)
    return [[window + round(most - layer * step)] * spec.kv_heads for layer in range(spec.layers)]
