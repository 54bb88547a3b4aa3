"""The policies by name, with their published settings. What has no window of its own also comes as `...+window`, with sinks and half of the budget as
the window: no paper's setting, but the stronger rival in streaming.
"""
import importlib

import budgets as division
from rivals.balance import BalanceKV
from rivals.coreset import Coreset
from rivals.exact import Exact
from rivals.expected import ExpectedAttention
from rivals.express import Express, ExpressPrompt
from rivals.h2o import H2O
from rivals.keydiff import KeyDiff
from rivals.knorm import Knorm
from rivals.quantised import Quantised
from rivals.snapkv import SnapKV, SnapKVPrompt
from rivals.tova import Tova
from rivals.window import Window

HALF = {"sinks": 4, "window_share": 0.5}
# name -> (class, options, is random)
POLICIES = {
    "exact": (Exact, {}, False),
    "window": (Window, {}, False),
    "window, far mass": (Window, {"budgets": division.by_far_mass}, False),
    "coreset": (Coreset, {}, True),
    "coreset, alpha 0.5": (Coreset, {"alpha": 0.5}, True),
    "h2o": (H2O, {}, False),
    "snapkv": (SnapKV, {}, False),
    "snapkv+window": (SnapKV, HALF, False),
    "pyramidkv": (SnapKV, {"budgets": division.pyramid}, False),
    "keydiff": (KeyDiff, {}, False),
    "keydiff+window": (KeyDiff, HALF, False),
    "knorm": (Knorm, {}, False),
    "knorm+window": (Knorm, HALF, False),
    "expected": (ExpectedAttention, {}, False),
    "expected+window": (ExpectedAttention, HALF, False),
    "tova": (Tova, {}, False),
    "tova+window": (Tova, HALF, False),
    "balancekv": (BalanceKV, {}, True),
    "balancekv, weighted": (BalanceKV, {"weighted": True}, True),
    "window, 8 bits": (Quantised, {"bits": 8}, False),
    "window, 4 bits": (Quantised, {"bits": 4}, False),
    "exact, 8 bits": (Quantised, {"bits": 8, "whole": True}, False),
    "exact, 4 bits": (Quantised, {"bits": 4, "whole": True}, False),
    "snapkv, prompt": (SnapKVPrompt, {}, False),
    "express": (Express, {"head_budgets": "fixed"}, True),
    "express, observed": (Express, {"head_budgets": "observed"}, True),
    "express, observed, equal bytes": (Express, {"head_budgets": "observed", "equal_bytes": True}, True),
    "express, observed, 8 bits, equal bytes": (Express, {"head_budgets": "observed", "equal_bytes": True, "slots": "int8"}, True),
    "express, observed, without positions": (Express, {"head_budgets": "observed", "rotary": True}, True),
    "express, observed, without positions, equal bytes": (Express, {"head_budgets": "observed", "rotary": True, "equal_bytes": True}, True),
    "express, observed, without positions, 8 bits, equal bytes":
        (Express, {"head_budgets": "observed", "rotary": True, "equal_bytes": True, "slots": "int8"}, True),
    "express, profile": (Express, {"profile": True}, True),
    "express, profile, equal bytes": (Express, {"profile": True, "equal_bytes": True}, True),
    "express, prompt": (ExpressPrompt, {}, False),
    "express, pyramid": (Express, {"pyramid": True}, True),
}
UNBOUNDED = {"exact", "exact, 8 bits", "exact, 4 bits"}  # the budget means nothing


def load(plugins):
    """Adds the POLICIES of further modules (names, on the module path) to the registry."""
    for name in plugins:
        POLICIES.update(importlib.import_module(name).POLICIES)


def make(name, spec, sequences, budget, seed=0, device="cpu", **more):
    kind, options, _ = POLICIES[name]
    options = {key: value(spec, budget) if callable(value) else value for key, value in options.items()}
    return kind(spec, sequences, budget, seed, device, **{**options, **more})
