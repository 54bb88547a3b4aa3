"""The harness end to end, on a short text: the model, a small grid, taking up a run again, protocols, activations, the report."""
import json
import math
import os
import subprocess
import sys

import pytest
import torch

import cases
import measure
import registry
from model import MODEL, Model, encode

QUALITY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
LENGTH = 640


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder as --texts wants it, from the text that is in the repository."""
    folder = tmp_path_factory.mktemp("texts")
    with open(os.path.join(MODEL, "demo.txt"), "rb") as file:
        demo = file.read()
    (folder / "dev.txt").write_bytes(demo)
    subprocess.run([sys.executable, os.path.join(QUALITY, "cases.py"), folder, folder / "recall", "--set", "dev", "--only", "restated", "--length", "2560",
                    "--count", "1"], check=True)
    return folder


def run(*arguments):
    done = subprocess.run([sys.executable, os.path.join(QUALITY, "run.py"), *map(str, arguments), "--threads", "1", "--device", "cpu"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_the_model_is_the_reference_model():
    with open(os.path.join(MODEL, "reference.json")) as file:
        prompt = json.load(file)["prompts"][0]
    with open(os.path.join(MODEL, prompt["file"]), "rb") as file:
        text = file.read()[prompt["offset"]:prompt["offset"] + prompt["length"]]
    model, last = Model(), {}
    model.run(torch.tensor([encode(text)] * 2), registry.make("exact", model.spec, 2, 0), lambda begin, logits: last.update(logits=logits[1, -1]))
    # 0.05 as in ref_forward.py, which has no rounding of keys and values.
    assert (last["logits"][:256] - torch.tensor(prompt["logits_256"])).abs().max() < 0.05


def test_grid(texts, tmp_path):
    out, policies = tmp_path / "rows.jsonl", "exact;window;coreset;h2o;window, 4 bits"
    arguments = ["--texts", texts, "--lengths", LENGTH, "--plain", 2, "--budgets", "256,384", "--out", out, "--seeds", 2, "--policies", policies]
    run(*arguments, "--csv", tmp_path / "rows.csv")
    rows = [json.loads(line) for line in open(out)]
    assert len(rows) == 2 * (1 + 2 * (1 + 2 + 1 + 1)) and len(open(tmp_path / "rows.csv").readlines()) == 1 + len(rows)
    of = lambda **fields: [row for row in rows if all(row[name] == value for name, value in fields.items())]
    for text in {row["case"] for row in rows}:
        exact = of(case=text, policy="exact")[0]
        for budget in (256, 384):
            window, bits = of(case=text, policy="window", budget=budget)[0], of(case=text, policy="window, 4 bits", budget=budget)[0]
            assert window["kl"] > 0 and window["entries_peak"] == budget and window["bytes_peak"] == budget * 16 * 256 >= bits["bytes_peak"]
            # 4-bit codes hold most of so short a text in the same bytes.
            assert bits["entries_peak"] > 1.5 * budget and bits["kl"] < window["kl"]
        assert of(case=text, policy="window", budget=384)[0]["kl"] < of(case=text, policy="window", budget=256)[0]["kl"]
        assert of(case=text, policy="coreset", seed=0, budget=256)[0]["bits"] != of(case=text, policy="coreset", seed=1, budget=256)[0]["bits"]
        assert math.isclose(sum(exact["bits_by_position"]) / 16, exact["bits"], rel_tol=0.02)
    before = out.read_text()
    run(*arguments)
    assert out.read_text() == before  # nothing is run twice
    out.write_text("".join(line + "\n" for line in before.splitlines() if '"policy": "h2o"' not in line))
    run(*arguments)
    assert len(out.read_text().splitlines()) == len(rows)


def test_recall_and_prefill_protocol(texts, tmp_path):
    out = tmp_path / "rows.jsonl"
    for protocol in ("stream", "prefill"):
        run("--texts", texts, "--lengths", 2560, "--plain", 0, "--budgets", 512, "--out", out, "--policies", "window", "--protocol", protocol)
    rows = {(row["protocol"], row["policy"]): row for row in map(json.loads, open(out))}
    right = {key: [ok for _, ok in row["answers"]] for key, row in rows.items()}
    assert all(len(oks) == 16 for oks in right.values()) and sum(right["stream", "exact"]) >= 8
    assert sum(right["stream", "window"]) < sum(right["stream", "exact"])
    assert rows["stream", "window"]["kl"] > rows["prefill", "window"]["kl"] > 0  # the prefill protocol decodes exactly


@pytest.mark.parametrize("kind", ["many", "alike", "restated"])
def test_harder_cases(kind):
    with open(os.path.join(MODEL, "demo.txt"), "rb") as file:
        units = file.read().split(b"\0")
    text, answers = cases.make(kind, units, 16384, "dev 0")
    assert len(text) == 16383 and len(answers) == cases.KINDS[kind] and (text, answers) == cases.make(kind, units, 16384, "dev 0")
    said = [text.count(f" The access code of {a['name']} is ".encode()) for a in answers]
    assert sum(said) == len(said) + (8 if kind == "restated" else 0)
    for a in answers:
        assert text[a["offset"]:a["offset"] + 6] == a["answer"].encode()
        question = f"\nWhat is the access code of {a['name']}? ".encode()
        assert text[:a["offset"]].endswith(question) and text.count(question) == 1
        fact = f" The access code of {a['name']} is {a['answer']}. ".encode()
        assert text[a["fact_offset"]:].startswith(fact) and text.rfind(f" The access code of {a['name']} is ".encode()) == a["fact_offset"]
    if kind == "alike":
        names = [a["name"] for a in answers]
        near = lambda x, y: len(x) == len(y) and sum(p != q for p, q in zip(x, y)) == 1
        assert all(any(near(x, y) for y in names) for x in names)


def test_output_error_is_that_of_the_outputs():
    model = Model()
    error = measure.OutputError(model.spec, 1, "cpu")
    text = [cases.Case("x", "plain", b"The quick brown fox. " * 8, [])]
    rows, _ = measure.run(model, registry.make("exact", model.spec, 1, 0), text, "cpu", errors=True)
    assert max(map(max, rows[0]["output_error"])) < 1e-6
    q, k, v = (torch.randn(1, heads, 64, 64) for heads in (6, 2, 2))
    error(3, q, k, v, error.exact.extend(2, q, k, v) * 1.25)
    assert torch.allclose(error.relative()[0, 3], torch.full((6,), 0.25, dtype=torch.float64), atol=1e-6) and not error.relative()[0, 2].any()


def test_activations_of_any_shape(tmp_path):
    import numpy as np
    random = np.random.default_rng(0)
    layers = {f"{name}{i}": random.standard_normal((320, heads, 32)).astype(np.float16) for i in (1, 3) for name, heads in (("q", 4), ("k", 1), ("v", 1))}
    np.savez(tmp_path / "a.npz", layers=np.array([1, 3]), **layers)
    run("--activations", tmp_path / "a.npz", "--budgets", "128,256", "--policies", "window;expected", "--out", tmp_path / "rows.jsonl")
    rows = {(row["policy"], row["budget"], row["layer"]): row for row in map(json.loads, open(tmp_path / "rows.jsonl"))}
    assert len(rows) == 8 and len(rows["window", 128, 1]["output_error"]) == 4
    assert all(rows[p, 256, i]["output_error"][h] < rows[p, 128, i]["output_error"][h] for p in ("window", "expected") for i in (1, 3) for h in range(4))


def test_report(texts, tmp_path):
    pytest.importorskip("matplotlib", reason="NO MATPLOTLIB: THE REPORT IS NOT TESTED")
    out = tmp_path / "rows.jsonl"
    run("--texts", texts, "--lengths", LENGTH, "--plain", 2, "--budgets", "256", "--out", out, "--policies", "window;coreset", "--seeds", 2, "--errors")
    subprocess.run([sys.executable, os.path.join(QUALITY, "report.py"), out, "--out", tmp_path / "report", "--default", "coreset"], check=True)
    rows, report = [json.loads(line) for line in open(out)], (tmp_path / "report" / "report.md").read_text()
    mean = lambda policy: sum(row["bits_second_half"] for row in rows if row["policy"] == policy) / len([1 for row in rows if row["policy"] == policy])
    line = next(line for line in report.splitlines() if line.startswith("| window |"))
    assert line.split("|")[3].split("±")[0].strip() == f"{mean('window') - mean('exact'):.4f}"
    for name in ("bits-plain", "positions", "errors"):
        for kind in ("png", "svg"):
            assert (tmp_path / "report" / f"{name}-{LENGTH}.{kind}").stat().st_size > 1000 and f"{name}-{LENGTH}.{kind}" in report
