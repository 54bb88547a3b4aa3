"""Development texts: plain excerpts and texts with planted facts, all of one length, as token rows."""
import json
import os
import random
import sys

import numpy as np
import torch


def encode(text):
    return [256] + [256 if b == 0 else b for b in text]


def plain(dev, length, count, seed=7):
    """count excerpts of `length` bytes, spread over the units."""
    units = open(dev, "rb").read().split(b"\0")
    rng = random.Random(seed)
    out = []
    for i in range(count):
        u = units[(i * 5 + 1) % len(units)]
        at = rng.randrange(len(u) - length)
        out.append(u[at:at + length])
    return out


def facts(dev, length, count, number, make_recall, first_seed=100):
    """count (text, [(offset, length)]) with `number` facts each, made by make_recall.py's own functions."""
    sys.path.insert(0, os.path.dirname(make_recall))
    import subprocess
    import tempfile
    out = []
    for i in range(count):
        base = os.path.join(tempfile.mkdtemp(), "case")
        subprocess.run([sys.executable, make_recall, dev, str(length), str(number), str(first_seed + i), base], check=True)
        text = open(base + ".txt", "rb").read()
        out.append((text, [(a["offset"], a["length"]) for a in json.load(open(base + ".json"))["answers"]]))
    return out


def read_case(path):
    text = open(path + ".txt", "rb").read()
    return text, [(a["offset"], a["length"]) for a in json.load(open(path + ".json"))["answers"]]


class Set:
    """ids (S, length + 1); plain[i] says which rows are plain; answers[i] lists (offset, length) in bytes."""

    def __init__(self, plain_texts, cases, length):
        rows, self.answers, self.plain = [], [], []
        for t in plain_texts:
            rows.append(encode(t[:length]))
            self.answers.append([])
            self.plain.append(True)
        for t, a in cases:
            rows.append(encode((t + b"\n" * length)[:length]))
            self.answers.append(a)
            self.plain.append(False)
        self.ids = torch.tensor(np.array(rows), dtype=torch.long)
        self.length = length

    def summarise(self, bits, first):
        """Per row: bits per byte of the second half, facts recalled, facts asked."""
        out = []
        for i in range(len(self.plain)):
            got = sum(bool(first[i, o:o + n].all()) for o, n in self.answers[i])
            out.append((float(bits[i, self.length // 2:].mean()), got, len(self.answers[i])))
        return out
