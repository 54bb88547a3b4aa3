"""Runs named configurations of the prototype policies over one set of texts; one JSON line for each."""
import json
import sys
import time

import torch

import proto_policies as policies
from proto_model import Model, score


def sync(device):
    if device != "cpu":
        torch.cuda.synchronize()


class Bench:
    def __init__(self, model, texts, out, prefix, deadline=None):
        self.model, self.texts, self.out, self.prefix, self.deadline = model, texts, out, prefix, deadline
        self.ids = texts.ids.to(model.device)
        self.start = time.time()

    def run(self, name, make, chunk=None, quiet=False):
        """make(model, S, length) -> policy. Returns the policy and rows of (bits per byte 2nd half, got, asked)."""
        if self.deadline and time.time() > self.deadline:
            return None, None
        begin = time.time()
        policy = make(self.model, len(self.ids), self.texts.length)
        budget = getattr(policy, "budget", 512)
        bits, first = score(self.model, self.ids, policy, chunk or (512 if budget % 512 == 0 else 256))
        sync(self.model.device)
        rows = self.texts.summarise(bits, first)
        seconds = time.time() - begin
        held = int(policy.entries().max()) if hasattr(policy, "entries") else 0
        line = {"set": self.prefix, "name": name, "rows": [[round(r[0], 5), r[1], r[2]] for r in rows], "plain": self.texts.plain, "s": round(seconds, 2), "held": held}
        self.out.write(json.dumps(line) + "\n")
        self.out.flush()
        if not quiet:
            print(describe(line), flush=True)
        return policy, rows


def describe(line):
    plain = [r[0] for r, p in zip(line["rows"], line["plain"]) if p]
    facts = [r[0] for r, p in zip(line["rows"], line["plain"]) if not p]
    mean = lambda x: sum(x) / max(1, len(x))
    return "%-4s %-38s pl %.4f fa %.4f rec %d/%d held %d %.1fs" % (
        line["set"], line["name"], mean(plain), mean(facts), sum(r[1] for r in line["rows"]), sum(r[2] for r in line["rows"]), line["held"], line["s"])
