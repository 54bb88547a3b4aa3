#!/usr/bin/env python3
"""usage: ablation_report.py OUT [REFERENCE]    Markdown: bits per byte of the second half on plain texts and on texts with facts, recall;
in parentheses the paired difference from the configuration REFERENCE at the same budget, with its standard error over texts."""
import glob
import json
import os
import sys


def mean_error(values):
    n, mean = len(values), sum(values) / max(1, len(values))
    return mean, (sum((v - mean) ** 2 for v in values) / max(1, n - 1) / max(1, n)) ** 0.5


def bits(line, plain):
    return [row[0] for row, p in zip(line["rows"], line["plain"]) if p == plain]


def main():
    lines = [json.loads(x) for path in sorted(glob.glob(os.path.join(sys.argv[1], "w*.jsonl"))) for x in open(path)]
    reference = sys.argv[2] if len(sys.argv) > 2 else ""
    groups = {}
    for line in lines:
        budget, name = line["name"].split(": ", 1)
        groups.setdefault((line["set"], int(budget)), {})[name] = line
    for (texts, budget), found in sorted(groups.items()):
        print("\n%s, mean budget %d\n\n| configuration | plain | facts | recall |\n|---|---|---|---|" % (texts, budget))
        for name, line in sorted(found.items(), key=lambda item: sum(bits(item[1], True))):
            cells = []
            for plain in (True, False):
                cell = "%.4f" % mean_error(bits(line, plain))[0]
                if reference in found and name != reference:
                    cell += " (%+.4f ± %.4f)" % mean_error([a - b for a, b in zip(bits(line, plain), bits(found[reference], plain))])
                cells.append(cell)
            print("| %s | %s | %s | %d of %d |" % (name, cells[0], cells[1], sum(r[1] for r in line["rows"]), sum(r[2] for r in line["rows"])))


if __name__ == "__main__":
    main()
