"""Pages that are made of rows: times, and the four uses."""
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("matplotlib", reason="NO MATPLOTLIB: THE PAGES ARE NOT TESTED")
import report  # noqa: E402

BENCH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
RESULTS = os.path.join(BENCH, "results")


def row(policy, budget, case, seed=0, us=None, length=4096):
    more = {} if us is None else {"us_per_token": us}
    return {"set": "dev", "case": case, "protocol": "stream", "policy": policy, "budget": budget, "seed": seed, "errors": 0, "kind": "plain", "length": length,
            "bits_second_half": 1.0, "kl_second_half": 0.0, "bytes_peak": 1000, "entries_peak": budget, "answers": [], "bits_by_position": [1.0] * 16, **more}


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_times_are_of_the_run_alone(tmp_path):
    busy = write(tmp_path / "busy.jsonl", [row(p, b, c, us=99.0) for p, b in (("exact", 0), ("window", 256)) for c in "xy"])
    # Two texts side by side share a time; two seeds are two runs.
    alone = write(tmp_path / "alone.jsonl", [row("exact", 0, c, us=3.0) for c in "xy"] + [row("window", 256, c, us=5.0) for c in "xy"]
                  + [row("coreset", 256, c, seed, us=6.0 + 2 * seed) for seed in (0, 1) for c in "xy"])
    assert report.time_table(report.Results([busy]), 4096)[2:4] == ["| exact | 99.0 |", "| window | 99.0 |"]
    results = report.Results([busy], timed=[alone])
    assert results.policies == ["exact", "window"] and results.times("exact", 256, 4096) == [3.0] and results.times("window", 512, 4096) == []
    assert report.time_table(results, 4096)[2:5] == ["| exact | 3.0 |", "| window | 5.0 |", "| coreset | 7.0 ± 1.0 |"]
    assert report.time_table(results, 8192) == []
    subprocess.run([sys.executable, os.path.join(BENCH, "quality", "report.py"), busy, "--times", alone, "--time-note", "Some machine.", "--out", tmp_path / "report"], check=True)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "Some machine." in text and "| coreset | 7.0 ± 1.0 |" in text and "| window | 99.0 |" not in text
    assert all((tmp_path / "report" / f"times-4096.{kind}").stat().st_size > 1000 for kind in ("png", "svg")) and "times-4096.png" in text


def test_the_four_uses_are_what_the_results_say(tmp_path):
    page = tmp_path / "page.md"
    subprocess.run([sys.executable, os.path.join(BENCH, "bottlenecks.py"), "--out", page], check=True)
    lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in page.read_text().splitlines() if line.startswith("|")]
    with open(os.path.join(RESULTS, "h200_prefill.json")) as file:
        rows = [r for r in json.load(file)["rows"] if r["n"] == 131072]
    times = {method: min(r["ms"] for r in rows if r["method"] == method and r["budget"] in (None, 1024)) for method in ("flash", "cudnn", "express")}
    line = next(cells for cells in lines if cells[0] == "131072" and len(cells) == 6)
    assert line == ["131072", f"{times['flash']:.3f}", f"{times['cudnn']:.3f}", f"{times['express']:.3f}", f"{times['flash'] / times['express']:.2f}", f"{times['cudnn'] / times['express']:.2f}"]
    # Never above the bytes allowed.
    held = [cells for cells in lines if len(cells) == 10 and cells[0].isdigit()]
    assert [cells[0] for cells in held] == ["256", "512", "1024", "2048", "4096"] and all(float(cells[2]) <= float(cells[1]) for cells in held)
    results = report.Results([os.path.join(RESULTS, "quality", "dev_rows.jsonl.xz")], "dev")
    rows = results.get("express, observed, 8 bits, equal bytes", 1024, 16384, "plain")
    exact = {r["case"]: r["bits_second_half"] for r in results.get("exact", 0, 16384, "plain")}
    cases = sorted({r["case"] for r in rows})
    mean = lambda values: sum(values) / len(values)
    excess = mean([mean([r["bits_second_half"] for r in rows if r["case"] == case]) - exact[case] for case in cases])
    assert next(cells for cells in held if cells[0] == "1024")[3].startswith(f"{excess:.3f} ±")


def test_the_nearest_rival_is_found(tmp_path):
    import summary
    def rows(policy, bits):
        return [{**row(policy, 0 if policy == "exact" else 256, case, length=16384), "bits_second_half": x} for case, x in zip("abc", bits)]

    ours = summary.BYTES8
    found = rows("exact", (0.5, 0.6, 0.7)) + rows(ours, (1.0, 1.1, 1.2)) + rows("window", (1.3, 1.4, 1.6)) + rows("h2o", (0.9, 1.0, 1.1)) + rows("snapkv, prompt", (0.1, 0.1, 0.1))
    found += [{**r, "kind": "recall", "case": r["case"] + "!", "answers": [[0.1, 1], [0.2, int(r["policy"] != "window")]]} for r in found]
    results = report.Results([write(tmp_path / "rows.jsonl", found)])
    assert summary.rivals(results) == ["window", "h2o"]  # what keeps all, and what is cut once, are none
    mean, error = summary.difference(results, "window", ours, 256, "plain")
    assert abs(mean - 1 / 3) < 1e-9 and abs(error - 1 / 30) < 1e-9
    line = summary.nearest_table(results, report.Results([write(tmp_path / "none.jsonl", rows("exact", (1, 1, 1)))]))[2]
    assert line.startswith("| dev | 16384 | 8 bits in the same bytes | 256 | h2o -0.1000 ± 0.0000 **behind** | h2o -0.1000 ± 0.0000 **behind** | 100 / 100 | – |")
    assert summary.main_table(results, results)[3].startswith("|  | **express, observed, 8 bits in the same bytes** | 0.00 | 0.500 ± 0.000 | 0.500 ± 0.000 | 100 | – |")
