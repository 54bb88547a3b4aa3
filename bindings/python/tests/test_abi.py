"""The numbers of the package, and of the benchmarks' ctypes, are those of the C ABI: capi/abi.txt."""

import ctypes
import importlib.util
import pathlib
import re

import numpy as np
import pytest

import express_kv
from express_kv import _cache, _core

ROOT = pathlib.Path(__file__).parents[3]
NUMBERS = {name: int(number) for name, number in re.findall(r"(.+) = (-?\d+)", (ROOT / "capi" / "abi.txt").read_text())}


def enumerators(prefix):
    return {name.removeprefix(prefix): number for name, number in NUMBERS.items() if name.startswith(prefix)}


def test_enumerators():
    assert {status.name: status.value for status in express_kv.Status} == enumerators("EXPRESS_STATUS_")
    choices = {name: {key.upper(): number for key, number in choice.items()} for name, choice in _cache._CHOICES.items()}
    short = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}
    dtypes = {short[name]: number for name, number in _cache._DTYPES.items()} | {"I64": 16}  # positions: NumPy's int64
    assert dtypes == enumerators("EXPRESS_DTYPE_")
    assert choices["schedule"] == enumerators("EXPRESS_SCHEDULE_")
    assert choices["halving"] == enumerators("EXPRESS_HALVING_")
    assert choices["head_budgets"] == enumerators("EXPRESS_HEAD_BUDGETS_")
    assert choices["protection_score"] == enumerators("EXPRESS_PROTECTION_SCORE_")
    assert choices["rope_layout"] == enumerators("EXPRESS_ROPE_LAYOUT_")
    assert choices["budget_unit"] == enumerators("EXPRESS_BUDGET_")
    assert _cache.AUTO == _cache.ALL_LAYERS == NUMBERS["EXPRESS_AUTO"]
    devices = {device.upper(): _cache._fields({"device": device})["device_type"] for device in ("cpu", "cuda")}
    assert devices == enumerators("EXPRESS_DEVICE_")


def test_every_field_of_the_config_is_known():
    fields = {name for name in re.findall(r"offsetof\(express_config, (\w+)\)", "\n".join(NUMBERS))}
    own = {"struct_size", "head_share_count", "head_settings_count", "rope_frequency_count", "parallel_for", "parallel_for_context", "reserved"}
    assert own < fields
    given = {"head_share": [1.0], "rope_frequencies": [1.0], "head_settings": [(64, 4, -1, -1)], "stream": 0}
    for name in fields - own:
        try:
            _core.size({name: given.get(name, 1)})
        except express_kv.Error:
            pass  # not a cache that can be, but a field
    with pytest.raises(TypeError, match="no field"):
        _core.size({"struct_size": 1})


def test_stats_have_every_field():
    fields = set(re.findall(r"offsetof\(express_stats, (\w+)\)", "\n".join(NUMBERS)))
    cache = express_kv.Cache(query_heads=2, kv_heads=2, key_dim=16, budget=64)
    cache.append(0, *np.zeros((2, 1, 2, 16), np.float32))
    assert set(cache.stats()) == fields - {"struct_size"}


def test_structs_of_the_benchmarks():
    spec = importlib.util.spec_from_file_location("express_abi", ROOT / "bench" / "express_abi.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, struct in [("express_config", module.Config), ("express_tensor", module.Tensor), ("express_workspace", module.Workspace)]:
        ours = {f"sizeof({name})": ctypes.sizeof(struct)}
        ours.update({f"offsetof({name}, {field})": getattr(struct, field).offset for field, *_ in struct._fields_})
        assert ours == {key: number for key, number in NUMBERS.items() if re.search(rf"\({name}\b", key)}
