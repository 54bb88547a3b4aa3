"""Many devices: KV heads split over ranks (tensor parallelism) and a sequence split over caches (merge of out and lse)."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

import express_kv
from express_kv.transformers import _parallel
from families import SIZE, model_of


def run(job, world, folder, device="cpu"):
    """`world` processes, on the CPU or on a GPU each; their output if one fails."""
    script = pathlib.Path(__file__).with_name("ranks.py")
    environment = os.environ if device == "cuda" else {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # or transformers would choose GPUs
    ranks = [subprocess.Popen([sys.executable, script, job, str(rank), str(world), str(folder), device], cwd=script.parent, env=environment,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in range(world)]
    try:
        said = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(text[-3000:] for text in said)


def needs_gpus(count):
    if torch.cuda.device_count() < count:
        pytest.skip(f"{torch.cuda.device_count()} GPUS: PARALLELISM OVER {count} OF THEM IS NOT TESTED")
    try:
        express_kv.Cache(key_dim=64, device=f"cuda:{count - 1}").close()
    except express_kv.Error as error:
        pytest.skip(str(error))


def on_one(folder, device="cpu", **more):
    from transformers import LlamaConfig

    config = LlamaConfig(**{**SIZE, "num_attention_heads": 8, "num_key_value_heads": 4, **more})
    model_of(config, "sdpa").save_pretrained(folder / "model")
    run("tensor_parallel", 1, folder, device)
    return json.loads((folder / "ranks1.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tp")
    return folder, on_one(folder)


@pytest.mark.parametrize("world", [2, 4])
def test_the_result_does_not_depend_on_the_number_of_ranks(alone, world):
    folder, one = alone
    run("tensor_parallel", world, folder)
    many = json.loads((folder / f"ranks{world}.json").read_text())
    assert many["tokens"] == one["tokens"]
    assert many["kept"] == one["kept"]  # positions, by sequence, layer and global KV head
    assert many["calls"] == many["exact_calls"] and sum(many["calls"].values()) > 0  # no communication added
    assert many["nbytes"] < one["nbytes"]


@pytest.mark.parametrize("world", [2, 4])
def test_the_result_does_not_depend_on_the_number_of_gpus(world, tmp_path):
    """As above, over NCCL. Sums are rounded in another order there: what is kept may differ in near ties."""
    needs_gpus(world)
    one = on_one(tmp_path, "cuda", head_dim=64, initializer_range=0.1)
    run("tensor_parallel", world, tmp_path, "cuda")
    many = json.loads((tmp_path / f"ranks{world}.json").read_text())
    assert many["tokens"] == one["tokens"]
    pairs = [(set(a), set(b)) for s, t in zip(many["kept"], one["kept"]) for x, y in zip(s, t) for a, b in zip(x, y)]
    assert len(pairs) == 24 and sum(len(a & b) for a, b in pairs) > 0.98 * sum(len(b) for _, b in pairs)
    assert many["calls"] == many["exact_calls"] and sum(many["calls"].values()) > 0
    assert many["nbytes"] < one["nbytes"]


def test_heads_differ_and_forget(alone):
    """Otherwise the test above could not fail."""
    _, one = alone
    heads = [tuple(head) for head in one["kept"][0][2]]
    assert len(set(heads)) == 4
    assert [len(head) <= 40 + 8 * i for i, head in enumerate(heads)] == [True] * 4 and len(heads[3]) > 40
    assert len({token for token in one["tokens"][0]}) > 8


def test_settings_of_a_rank():
    settings = [(layer, head, 0, 0) for layer in range(2) for head in range(4)]
    cut = _parallel.of_rank({"head_settings": settings, "budget": 3}, 2, 4, 2, 2)
    assert cut == {"head_settings": [(0, 2, 0, 0), (0, 3, 0, 0), (1, 2, 0, 0), (1, 3, 0, 0)], "budget": 3, "head_budgets": "fixed"}
    assert _parallel.of_rank({"head_settings": settings[:2]}, 2, 4, 2, 2)["head_settings"] == settings[:2]
    assert _parallel.of_rank({"head_share": [1, 2]}, 2, 4, 2, 2) == {"head_share": [1, 2], "head_budgets": "fixed"}
    with pytest.raises(NotImplementedError, match="head_settings"):
        _parallel.of_rank({"head_share": [1] * 8}, 2, 4, 2, 2)
    with pytest.raises(ValueError, match="first_kv_head"):
        _parallel.first_kv_head(torch.nn.Linear(2, 2), 2, 4)


@pytest.mark.parametrize("world, device", [(2, "cpu"), (4, "cpu"), (2, "cuda"), (4, "cuda")])
def test_parts_of_a_sequence_give_the_result_of_one(world, device, tmp_path):
    if device == "cuda":
        needs_gpus(world)
    near = {"atol": 2e-5, "rtol": 1e-4} if device == "cpu" else {"atol": 2e-3, "rtol": 2e-3}
    run("sequence_parallel", world, tmp_path, device)
    result = json.loads((tmp_path / f"parts{world}.json").read_text())
    generator = torch.Generator().manual_seed(4)
    k, v, q = (torch.randn(n, heads, 64, generator=generator) for n, heads in ((400, 2), (400, 2), (5, 8)))
    whole = express_kv.Cache(query_heads=8, kv_heads=2, key_dim=64, budget=512, dtype="float32", threads=1)
    whole.append(0, k, v)
    lse = torch.empty(5, 8)
    out = whole.attend(0, q, lse=lse)
    torch.testing.assert_close(torch.tensor(result["exact"]["out"]), out, **near)
    torch.testing.assert_close(torch.tensor(result["exact"]["lse"]), lse, **near)
    for h in range(8):  # a small budget: weighted attention over the entries of all parts together
        keys, values, log_weight = (torch.cat([torch.tensor(part[h // 4][i]) for part in result["small"]["held"]]) for i in range(3))
        assert len(keys) <= 40 * world < 400 and log_weight.exp().sum().round() == 400
        logits = q[:, h] @ keys.T / 8 + 0.5 * log_weight
        torch.testing.assert_close(torch.tensor(result["small"]["out"])[:, h], logits.softmax(-1) @ values, **near)
        torch.testing.assert_close(torch.tensor(result["small"]["lse"])[:, h], logits.logsumexp(-1), **near)
