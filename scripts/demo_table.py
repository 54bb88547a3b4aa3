#!/usr/bin/env python3
"""Scores examples/byte_lm under every KV-cache policy and budget, and prints one line of a table as each is done."""

import argparse
import json
import pathlib
import subprocess
import sys

COLUMNS = [  # (title, width)
    ("policy", 8),
    ("entries/head", 12),
    ("bits/byte", 9),
    ("2nd half", 8),
    ("KV MB", 7),
    ("smaller", 8),
    ("tokens/s", 8),
    ("recall", 7),
]


def print_row(cells):
    first = f"{cells[0]:<{COLUMNS[0][1]}}"
    rest = [f"{cell:>{width}}" for cell, (_, width) in zip(cells[1:], COLUMNS[1:])]
    print("  ".join([first] + rest), flush=True)


class Engine:
    def __init__(self, path, model):
        self.path = path
        self.model = model

    def run(self, command, policy, budget, arguments):
        """One call of the engine; its JSON result."""
        line = [str(self.path), command, "--model", str(self.model), "--policy", policy, "--json", *arguments]
        if policy != "exact":
            line += ["--budget", str(budget)]
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"demo_table: failed with {done.returncode}: {' '.join(line)}")
        return json.loads(done.stdout)


def recall_cases(model, longest):
    """The recall texts of at most `longest` bytes that are also longer than half of it."""
    cases = []
    for path in sorted((model / "recall").glob("*.json")):
        if longest / 2 < json.loads(path.read_text())["length"] <= longest:
            cases.append(path)
    return cases


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", type=pathlib.Path, required=True, help="the express-lm program")
    parser.add_argument("--model", type=pathlib.Path, required=True, help="directory of the model and its texts")
    parser.add_argument("--quick", action="store_true", help="a short text and one budget: shows that it runs")
    options = parser.parse_args()

    tokens = 4096 if options.quick else 16384
    budgets = [512] if options.quick else [2048, 1024, 512]
    engine = Engine(options.engine, options.model)
    cases = [] if options.quick else recall_cases(options.model, 16384)
    if not options.quick and not cases:
        sys.exit(f"demo_table: no recall texts of 16384 bytes in {options.model / 'recall'}")

    recall = f"; recall of facts planted in {len(cases)} other texts of 16384 bytes" if cases else ""
    print(f"{tokens} bytes of demo.txt{recall}; the model's own time is in tokens/s\n")
    print_row([title for title, _ in COLUMNS])
    print_row(["-" * width for _, width in COLUMNS])
    exact_bytes = None
    for policy, budget in [("exact", 0)] + [(p, b) for b in budgets for p in ("window", "uniform", "express")]:
        score = engine.run(
            "score", policy, budget, ["--text", str(options.model / "demo.txt"), "--tokens", str(tokens)]
        )
        results = [engine.run("recall", policy, budget, ["--case", str(case)]) for case in cases]
        if exact_bytes is None:
            exact_bytes = score["kv_bytes_peak"]
        seconds = score["prefill_seconds"] + score["decode_seconds"]
        recall = f"{sum(r['recalled'] for r in results)}/{sum(r['asked'] for r in results)}" if results else "-"
        print_row(
            [
                policy,
                "all" if policy == "exact" else str(budget),
                f"{score['bits_per_byte']:.3f}",
                f"{score['bits_per_byte_second_half']:.3f}",
                f"{score['kv_bytes_peak'] / 1e6:.2f}",
                f"{exact_bytes / score['kv_bytes_peak']:.1f} x",
                f"{score['tokens'] / seconds:.0f}",
                recall,
            ]
        )


if __name__ == "__main__":
    main()
