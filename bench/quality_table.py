#!/usr/bin/env python3
"""Quality of the cache on the yardstick model: bits per byte and recall, policies x budgets x seeds, as a Markdown table.

usage: quality_table.py run    EXPRESS_LM TEXTS_DIR RESULTS.jsonl [--set dev|test|storage] [--jobs N] [--only REGEX]
       quality_table.py report RESULTS.jsonl [--set dev|test|storage]

TEXTS_DIR holds dev.txt, test.txt (NUL-separated units) and recall/{dev,test}-*.json with their .txt. `run` appends one line for each run to
RESULTS.jsonl and skips those that are there. Every cache compresses from the first token on, in blocks of 64 tokens; all policies have the
same mean number of entries per KV head. Recall: all cases of the set for the rows in FULL and the four of 16K for the others. Plain texts:
16384 bytes from the middle of three units (dev) or of all four (test).
Figures are means over cases (weighted by facts for recall) and seeds; +- is the standard error over seeds.
"""
import argparse
import collections
import concurrent.futures
import glob
import json
import math
import os
import re
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
MODEL = os.path.join(HERE, "..", "examples", "byte_lm", "model")
PROFILE = ["--profile", os.path.join(MODEL, "profile.json")]
BLOCK = 64
TEXT_BYTES = 16384


def express(budget, window, protected, alpha, *more):
    return ["--policy", "express", "--budget", str(budget), "--window", str(window), "--protected", str(protected),
            "--alpha", str(alpha)] + list(more)


# name, arguments, seeds
DEV = [
    ("exact", ["--policy", "exact"], 1),
    ("1024: sinks + window", ["--policy", "window", "--budget", "1024"], 1),
    ("1024: fair-coin coreset, window 512, alpha 1", ["--policy", "uniform", "--budget", "1024", "--window", "512", "--alpha", "1"], 3),
    ("1024: paper's kernel and threshold, window 512, alpha 1", express(1024, 512, 0, 1, "--gamma", "0", "--tau", "1"), 3),
    ("1024: centred, gamma 1, tau 0.1, window 800, alpha 1", express(1024, 800, 0, 1), 3),
    ("1024: centred, gamma 1, tau 0.1, window 800, alpha 0.5", express(1024, 800, 0, 0.5), 3),
    ("1024: + protected 15 %, window 800, alpha 0.5", express(1024, 800, 154, 0.5), 3),
    ("1024: + protected 35 %, window 512, alpha 1", express(1024, 512, 358, 1), 3),
    ("1024: + protected 35 %, window 512, alpha 0.5", express(1024, 512, 358, 0.5), 3),
    ("1024: + protected 35 %, window 512, alpha 0", express(1024, 512, 358, 0), 3),
    ("1024: + protected 50 %, window 256, alpha 0.5", express(1024, 256, 512, 0.5), 3),
    ("1024: + protected 65 %, window 256, alpha 0.5", express(1024, 256, 666, 0.5), 3),
    ("1024: default division, no profile", ["--policy", "express", "--budget", "1024", "--head-budgets", "fixed"], 3),
    ("4096: sinks + window", ["--policy", "window", "--budget", "4096"], 1),
    ("4096: + protected 35 %, window 1024, alpha 0.5", express(4096, 1024, 1434, 0.5), 3),
    ("16 x 1024 by far mass: window, p 1", ["--policy", "window", "--budget", "1024", "--power", "1"] + PROFILE, 1),
    ("16 x 1024 by far mass: window, p 2", ["--policy", "window", "--budget", "1024", "--power", "2"] + PROFILE, 1),
    ("16 x 1024 by far mass: 60/28/12, p 1", ["--policy", "express", "--budget", "1024", "--power", "1"] + PROFILE, 3),
    ("16 x 1024 by far mass: 60/28/12, p 2 (default)", ["--policy", "express", "--budget", "1024"] + PROFILE, 3),
    ("16 x 1024 by far mass: 60/28/12, p 2, coins", ["--policy", "express", "--halving", "coin", "--budget", "1024"] + PROFILE, 3),
    ("16 x 1024 by far mass: 60/28/12, p 2, alpha 1", ["--policy", "express", "--alpha", "1", "--budget", "1024"] + PROFILE, 3),
    ("16 x 1024 by far mass: 60/28/12, p 3", ["--policy", "express", "--budget", "1024", "--power", "3"] + PROFILE, 3),
    ("16 x 512 by far mass: 60/28/12, p 2", ["--policy", "express", "--budget", "512"] + PROFILE, 3),
    ("16 x 512: sinks + window", ["--policy", "window", "--budget", "512"], 1),
    ("16 x 256 by far mass: 60/28/12, p 2", ["--policy", "express", "--budget", "256"] + PROFILE, 3),
    ("16 x 256: sinks + window", ["--policy", "window", "--budget", "256"], 1),
    ("16 x 1024: observed budgets, no profile", ["--policy", "express", "--budget", "1024", "--head-budgets", "observed"], 3),
    ("16 x 512: observed budgets, no profile", ["--policy", "express", "--budget", "512", "--head-budgets", "observed"], 3),
    ("16 x 256: observed budgets, no profile", ["--policy", "express", "--budget", "256", "--head-budgets", "observed"], 3),
]
TEST = [row for row in DEV if row[0] in ("exact", "1024: sinks + window", "1024: default division, no profile",
                                         "16 x 1024 by far mass: window, p 2",
                                         "16 x 1024 by far mass: 60/28/12, p 2 (default)")
        or "observed" in row[0] or row[0].startswith("16 x 512") or row[0].startswith("16 x 256")]
# 16-bit and 8-bit storage, with the same entries and in the same bytes: those that the cache of 16 bits takes.
STORAGE = []
for entries, same_bytes in ((1024, 4804288), (512, 2506944)):
    common = ["--policy", "express", "--head-budgets", "observed", "--threads", "1"]
    STORAGE += [
        ("16 x %d, observed: bf16" % entries, common + ["--budget", str(entries), "--dtype", "bf16"], 1),
        ("16 x %d, observed: i8" % entries, common + ["--budget", str(entries), "--dtype", "i8"], 1),
        ("the bytes of 16 x %d in bf16, observed: i8" % entries,
         common + ["--budget", str(same_bytes), "--budget-unit", "bytes", "--dtype", "i8"], 1)]
ROWS = {"dev": DEV, "test": TEST, "storage": STORAGE}
TEXTS = {"dev": "dev", "test": "test", "storage": "dev"}
FULL = {row[0] for row in TEST if "16 x 512" not in row[0] and "16 x 256" not in row[0]} | {"16 x 512 by far mass: 60/28/12, p 2", "4096: + protected 35 %, window 1024, alpha 0.5"}
UNITS = {"dev": (1, 5, 9), "test": (0, 1, 2, 3), "storage": (1, 5, 9)}


def tasks(which, texts):
    """(key, arguments) of every run; recall cases of 8K, 16K and 32K one by one."""
    cases = sorted(glob.glob(os.path.join(texts, "recall", TEXTS[which] + "-*.json")))
    for name, args, seeds in ROWS[which]:
        for seed in range(seeds):
            more = ["--model", MODEL, "--block", str(BLOCK), "--seed", str(seed), "--json"]
            for case in cases:
                if name not in FULL and "-16k-" not in case:
                    continue
                yield (name, seed, os.path.basename(case)), ["recall", "--case", case] + args + more
            for unit in UNITS[which]:
                yield (name, seed, "text-%d" % unit), ["score", "--text", os.path.join(texts, TEXTS[which] + ".txt"), "--unit", str(unit),
                                                       "--offset", "60000", "--tokens", str(TEXT_BYTES)] + args + more


def read(path):
    done = {}
    if os.path.exists(path):
        for line in open(path):
            r = json.loads(line)
            done[(r["name"], r["seed"], r["input"])] = r
    return done


def run(options):
    done = read(options.results)
    todo = [(key, args) for key, args in tasks(options.set, options.texts)
            if key not in done and re.search(options.only, key[0])]
    # All first seeds first, and 16K first: an interrupted run still has every row.
    todo.sort(key=lambda task: (task[0][1], not ("-16k-" in task[0][2] or "text" in task[0][2])))
    out = open(options.results, "a")

    def one(index, key, args):
        core = [] if options.jobs == 1 else ["taskset", "-c", str(index % options.jobs)]
        text = subprocess.run(core + [options.express_lm] + args, check=True, stdout=subprocess.PIPE).stdout
        r = json.loads(text)
        keep = ("bits_per_byte", "bits_per_byte_second_half", "kv_bytes_peak", "entries_peak", "recalled", "asked")
        r = dict({"name": key[0], "seed": key[1], "input": key[2]}, **{k: r[k] for k in keep if k in r})
        out.write(json.dumps(r) + "\n")
        out.flush()

    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        futures = []
        slots = list(range(options.jobs))

        def worker(slot):
            while todo:
                try:
                    key, args = todo.pop(0)
                except IndexError:
                    return
                one(slot, key, args)
                print("\r%d to go  " % len(todo), end="", file=sys.stderr, flush=True)

        for slot in slots:
            futures.append(pool.submit(worker, slot))
        for future in futures:
            future.result()


def mean_error(values):
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def show(values, digits):
    if not values:
        return "-"
    mean, error = mean_error(values)
    text = "%.*f" % (digits, mean)
    return text if error is None else text + " ± %.*f" % (digits, error)


def report(options):
    done = read(options.results)
    sizes = ["8k", "16k", "32k"]
    print("| cache | entries at peak | KV MB at peak (16K) | " + " | ".join("recall %s" % s.upper() for s in sizes)
          + " | bits/byte, 16K with facts, second half | bits/byte, plain texts, second half |")
    print("|---|---|---|---|---|---|---|---|")
    for name, _, _ in ROWS[options.set]:
        rows = [r for r in done.values() if r["name"] == name]
        by_seed = collections.defaultdict(list)
        for r in rows:
            by_seed[r["seed"]].append(r)
        if not rows:
            continue
        recall = {s: [] for s in sizes}
        asked = {}
        facts, plain = [], []
        for seed, runs in sorted(by_seed.items()):
            for s in sizes:
                cases = [r for r in runs if ("-%s-" % s) in r["input"]]
                if cases:
                    recall[s].append(sum(r["recalled"] for r in cases))
                    asked[s] = sum(r["asked"] for r in cases)
            half = [r["bits_per_byte_second_half"] for r in runs if "-16k-" in r["input"]]
            if half:
                facts.append(sum(half) / len(half))
            half = [r["bits_per_byte_second_half"] for r in runs if r["input"].startswith("text")]
            if half:
                plain.append(sum(half) / len(half))
        at16 = [r for r in rows if "-16k-" in r["input"] or r["input"].startswith("text")] or rows
        print("| %s | %d | %.2f | %s | %s | %s |" % (
            name, max(r["entries_peak"] for r in at16), max(r["kv_bytes_peak"] for r in at16) / 1e6,
            " | ".join("%s of %d" % (show(recall[s], 1), asked[s]) if recall[s] else "-" for s in sizes), show(facts, 4), show(plain, 4)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("run")
    p.add_argument("express_lm")
    p.add_argument("texts")
    p.add_argument("results")
    p.add_argument("--set", choices=list(ROWS), default="dev")
    p.add_argument("--jobs", type=int, default=2)
    p.add_argument("--only", default="")
    p = commands.add_parser("report")
    p.add_argument("results")
    p.add_argument("--set", choices=list(ROWS), default="dev")
    options = parser.parse_args()
    (run if options.command == "run" else report)(options)


if __name__ == "__main__":
    main()
