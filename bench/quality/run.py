#!/usr/bin/env python3
"""Quality of cache policies on the yardstick model: policies x budgets x seeds x texts.

    python3 bench/quality/run.py --texts ../shared/lm --set dev --out build/quality/dev.jsonl
    python3 bench/quality/run.py --activations build/activations.npz --out build/quality/outputs.jsonl
    python3 bench/quality/report.py build/quality/dev.jsonl --out build/quality/report

One line of JSON is appended to --out for every text under every setting; what is there already is not run again, so a run can be broken off and taken up.
--csv also writes all rows as a table. Needs PyTorch, and for Express itself the Python package of the library. README.md tells the rest.
"""
import argparse
import collections
import csv
import json
import os
import sys
import time

import torch

import budgets
import cases as texts
import measure
import protocols
import registry
import rivals.express
from model import MODEL, Model

KEY = ("set", "case", "protocol", "policy", "budget", "seed", "errors")


def key(row):
    return tuple(row[name] for name in KEY)


def read(path):
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [json.loads(line) for line in file]


def write_csv(path, rows):
    """Numbers only: lists are in the JSON."""
    names = list(dict.fromkeys(name for row in rows for name, value in row.items() if not isinstance(value, list)))
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, names + ["recalled", "asked"], extrasaction="ignore")
        table.writeheader()
        for row in rows:
            answers = row.get("answers", [])
            table.writerow({**row, "recalled": sum(ok for _, ok in answers), "asked": len(answers)})


class Bar:
    """How far, and about how long still; on a terminal it stays on one line."""

    def __init__(self, total):
        self.total, self.done, self.start = total, 0, time.monotonic()

    def step(self, text):
        self.done += 1
        elapsed = time.monotonic() - self.start
        left = elapsed / self.done * (self.total - self.done)
        bar = "#" * (20 * self.done // max(1, self.total))
        end, start = ("", "\r\033[K") if sys.stderr.isatty() else ("\n", "")
        print(f"{start}[{bar:20}] {self.done}/{self.total}, {elapsed:.0f} s, {left:.0f} s to go: {text}", end=end, file=sys.stderr, flush=True)


def choose_cases(options):
    """By length: the cases to run side by side."""
    groups = collections.OrderedDict()
    for length in options.lengths:
        found = texts.plain(options.texts, options.set, length, options.plain)
        for folder in [os.path.join(options.texts, "recall")] + options.recall:
            found += texts.recall(folder, options.set + "-*", length)
        if options.kinds:
            found = [case for case in found if case.kind in options.kinds]
        if found:
            groups[length] = found
    return groups


def choose_settings(options):
    """(policy, budget, seed), cheap ones first, so that a run that is broken off has something of everything."""
    for budget in options.budgets:
        for seed in range(options.seeds):
            for name in options.policies:
                if seed and not registry.POLICIES[name][2]:
                    continue
                if name in registry.UNBOUNDED and budget != options.budgets[0]:
                    continue
                yield name, 0 if name in registry.UNBOUNDED else budget, seed


def in_shard(setting, part, parts):
    """Whether a setting is this process's: the same in every run, whatever else is run."""
    name, budget, seed = setting
    return (list(registry.POLICIES).index(name) + 3 * budget.bit_length() + 11 * seed) % parts == part


def batches(cases, side_by_side):
    return [cases[i:i + side_by_side] for i in range(0, len(cases), side_by_side)]


class Runner:
    def __init__(self, options):
        self.options, self.device = options, options.device
        self.model = Model(options.model, options.device)
        self.rows = [row for path in options.have + [options.out] for row in read(path)]
        self.done = {key(row) for row in self.rows}
        self.file = open(options.out, "a")
        self.out_of_time, self.failures = False, []

    def label(self, case, name, budget, seed):
        return {"set": self.options.set, "case": case.name, "protocol": self.options.protocol, "policy": name, "budget": budget, "seed": seed,
                "errors": int(self.options.errors)}

    def write(self, labels, rows, cases):
        for label, row, case in zip(labels, rows, cases):
            row = {**label, "kind": case.kind, "length": len(case.text) + 1, **row}
            if self.options.no_time:
                row.pop("us_per_token", None)
            self.rows.append(row)
            self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def free(self):
        """Gives GPU memory back that other processes may want."""
        if torch.device(self.device).type == "cuda":
            torch.cuda.empty_cache()

    def policy(self, name, count, budget, seed, length):
        more = {"prompt": protocols.prompt_length(length)} if name.endswith(", prompt") else {}
        policy = registry.make(name, self.model.spec, count, budget, seed, self.device, **more)
        if self.options.protocol == "prefill":
            policy = protocols.PrefillThenExact(policy, protocols.prompt_length(length))
        return policy

    def run_batch(self, cases, length, settings, bar):
        """All settings on texts side by side, after exact attention, which the others are compared with."""
        reference = None
        begin = protocols.prompt_length(length) if self.options.protocol == "prefill" else 0
        for name, budget, seed in settings:
            labels = [self.label(case, name, budget, seed) for case in cases]
            started = time.monotonic()
            note = "was there"
            if not all(key(label) in self.done for label in labels):
                if time.monotonic() > self.options.deadline:
                    self.out_of_time = True
                    return
                if reference is None and (name == "exact" or not self.options.no_kl):
                    exact = registry.make("exact", self.model.spec, len(cases), 0, 0, self.device, tokens=length)
                    rows, reference = measure.run(self.model, exact, cases, self.device, keep=True, begin=begin)
                    del exact
                    self.free()
                    if not all(key({**label, "policy": "exact", "budget": 0, "seed": 0}) in self.done for label in labels):
                        exact_labels = [self.label(case, "exact", 0, 0) for case in cases]
                        self.write(exact_labels, rows, cases)
                        self.done.update(map(key, exact_labels))
                if name != "exact":
                    note = self.run_setting(cases, length, (name, budget, seed), labels, reference, begin)
            bar.step(f"{name}, {budget} entries, seed {seed}, {length} tokens: {note} ({time.monotonic() - started:.1f} s)")

    def run_setting(self, cases, length, setting, labels, reference, begin):
        name, budget, seed = setting
        try:
            policy = self.policy(name, len(cases), budget, seed, length)
            rows, _ = measure.run(self.model, policy, cases, self.device, reference, errors=self.options.errors, begin=begin)
        except Exception as error:  # a budget too small for the policy, no library: the other settings still run
            self.failures.append(f"{name}, {budget} entries: {type(error).__name__}: {error}")
            return f"failed: {error}"
        del policy
        self.free()
        self.write(labels, rows, cases)
        self.done.update(map(key, labels))
        plain = [row["bits_second_half"] for row, case in zip(rows, cases) if case.kind == "plain"]
        answers = [ok for row in rows for _, ok in row["answers"]]
        return (f"{sum(plain) / len(plain):.4f} bits " if plain else "") + (f"{sum(answers)}/{len(answers)} recalled" if answers else "")

    def run(self):
        settings = [setting for setting in choose_settings(self.options) if in_shard(setting, *self.options.shard)]
        work = [(batch, length) for length, cases in choose_cases(self.options).items() for batch in batches(cases, self.options.side_by_side)]
        if not work:
            raise SystemExit(f"run.py: no texts of {self.options.lengths} tokens in {self.options.texts}")
        bar = Bar(len(work) * len(settings))
        for batch, length in work:
            self.run_batch(batch, length, settings, bar)
        return self.rows


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(x) for x in text.split(",")]
    names = lambda text: [x.strip() for x in text.split(";") if x.strip()]
    parser.add_argument("--out", required=True, help="rows, appended")
    parser.add_argument("--csv", help="all rows as a table")
    parser.add_argument("--texts", help="folder with dev.txt, test.txt and recall/")
    parser.add_argument("--recall", action="append", default=[], help="further folders of recall cases")
    parser.add_argument("--set", choices=["dev", "test"], default="dev")
    parser.add_argument("--plain", type=int, default=8, help="plain texts of each length")
    parser.add_argument("--kinds", type=names, default=[], help="only these kinds of cases: plain;recall;many;alike;restated")
    parser.add_argument("--lengths", type=numbers, default=[16384])
    parser.add_argument("--policies", type=names, default=[], help="names from registry.py, between semicolons; default: all")
    parser.add_argument("--plugins", type=names, default=[], help="modules with POLICIES of their own, for the registry")
    parser.add_argument("--budgets", type=numbers, default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--seeds", type=int, default=3, help="of what is random")
    parser.add_argument("--protocol", choices=["stream", "prefill"], default="stream")
    parser.add_argument("--no-kl", action="store_true", help="without exact attention, unless it is among the policies: no KL divergence")
    parser.add_argument("--errors", action="store_true", help="also the error of outputs per layer and head (slow: exact attention beside every policy)")
    parser.add_argument("--profile", help="far masses of the model, as `express-lm profile` writes them; default: the example model's")
    parser.add_argument("--have", action="append", default=[], help="further files of rows that need not be run again")
    parser.add_argument("--shard", type=lambda text: [int(x) for x in text.split("/")], default=[0, 1], metavar="I/N",
                        help="only the Ith part of the settings: N processes share a GPU, which one alone leaves idle half of the time")
    parser.add_argument("--no-time", action="store_true", help="leave out times: other processes run beside this one")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU; 1 is best on a busy machine")
    parser.add_argument("--activations", help="measure outputs on this recording instead of the model")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--express-on", metavar="DEVICE", help="where Express's caches are, if not on the model's device")
    parser.add_argument("--side-by-side", type=int, default=32, help="sequences at a time")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing new after so many")
    options = parser.parse_args()
    sys.path.insert(0, os.getcwd())
    registry.load(options.plugins)
    rivals.express.DEVICE = options.express_on
    budgets.PROFILE = options.profile or budgets.PROFILE
    if options.threads:
        torch.set_num_threads(options.threads)
    options.policies = options.policies or list(registry.POLICIES)
    unknown = [name for name in options.policies if name not in registry.POLICIES]
    if unknown:
        parser.error(f"unknown policies {unknown}; there are {list(registry.POLICIES)}")
    if not options.texts and not options.activations:
        parser.error("--texts or --activations is needed")
    options.deadline = time.monotonic() + options.seconds
    return options


def main():
    options = arguments()
    torch.backends.cuda.matmul.allow_tf32 = True
    os.makedirs(os.path.dirname(os.path.abspath(options.out)), exist_ok=True)
    if options.activations:
        import recorded
        rows, failures = recorded.run(options)
    else:
        runner = Runner(options)
        rows = runner.run()
        if runner.out_of_time:
            print("run.py: out of time; run it again to go on", file=sys.stderr)
        failures = runner.failures
    for failure in failures:
        print("run.py: failed: " + failure, file=sys.stderr)
    if options.csv:
        write_csv(options.csv, rows)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
