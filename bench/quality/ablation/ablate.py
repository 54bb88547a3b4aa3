#!/usr/bin/env python3
"""Runs a grid of prototype configurations; several workers share one device (the work is bound by the host).

    python3 make_texts.py ../shared/lm 16384 texts/16k.pt        # once for each length
    for i in 0 1 2 3 4; do python3 ablate.py frozen texts OUT --worker $i & done; wait
    python3 ablation_report.py OUT

A worker takes the next configuration that no other has taken (a file in OUT/taken) and appends one line for it to OUT/w<worker>.jsonl.
"""
import argparse
import importlib
import json
import os
import time

import torch

import proto_texts as texts
from proto_compare import Bench
from proto_model import Model

MODEL = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "..", "examples", "byte_lm", "model")


def load_set(folder, name, size):
    """size: (length, plain texts, texts with facts)"""
    data = torch.load(os.path.join(folder, name + ".pt"))
    length, plain, facts = size
    return texts.Set([bytes(x) for x in data["plain"]][:plain], [(bytes(t), a) for t, a in data["facts"]][:facts], length)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", help="settling or frozen")
    parser.add_argument("texts")
    parser.add_argument("out")
    parser.add_argument("--worker", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1e9, help="take no new configuration after this time")
    parser.add_argument("--only", default="", help="names that begin so")
    o = parser.parse_args()
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = True
    start = time.time()
    model, sets = Model(MODEL, o.device), {}
    grid = importlib.import_module(o.grid)
    os.makedirs(os.path.join(o.out, "taken"), exist_ok=True)
    for name, label, make in grid.RUNS:
        if not label.startswith(o.only):
            continue
        try:
            os.close(os.open(os.path.join(o.out, "taken", "%s %s" % (name, label.replace("/", "_"))), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        if time.time() - start > o.seconds:
            break
        if name not in sets:
            out = open(os.path.join(o.out, "w%d.jsonl" % o.worker), "a")
            sets[name] = Bench(model, load_set(o.texts, name, grid.SETS[name]), out, name)
        policy, _ = sets[name].run(label, make)
        if getattr(policy, "history", None):  # the budgets of the last settling, mean over sequences
            with open(os.path.join(o.out, "h%d.jsonl" % o.worker), "a") as file:
                n, budgets = policy.history[-1]
                file.write(json.dumps([name, label, n, budgets.int().tolist()]) + "\n")
        del policy
        if o.device != "cpu":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
