#!/usr/bin/env python3
"""The tables of bench/results/quality/README.md, from the rows beside it.

    python3 bench/quality/summary.py bench/results/quality

Prints Markdown: excess and recall of development and test texts, differences paired by text, other lengths, and for every budget the rival that comes nearest to Express.
Needs matplotlib (of report.py).
"""
import os
import sys

import report

LENGTH = 16384
BYTES8, BYTES16, SAME = "express, observed, 8 bits, equal bytes", "express, observed, equal bytes", "express, observed"
ROTARY8 = "express, observed, without positions, 8 bits, equal bytes"
NAMES = {BYTES8: "**express, observed, 8 bits in the same bytes**", BYTES16: "express, observed, 16 bits in the same bytes", SAME: "express, observed, same entries",
         ROTARY8: "the same 8 bits, with the model's rotary frequencies"}
SHOWN = ("window", "window, far mass", "window, 8 bits", "window, 4 bits", "expected+window", "keydiff+window", BYTES16, BYTES8, ROTARY8, SAME)
BUDGETS = (256, 512, 1024, 2048, 4096)


def percent(values):
    return f"{100 * sum(values) / len(values):.0f}" if values else "–"


def main_table(dev, test):
    rows = []
    for budget in BUDGETS:
        for policy in SHOWN:
            found = [row for kind in dev.kinds for row in dev.get(policy, budget, LENGTH, kind)]
            if not found:
                continue
            cells = [f"{budget}" if policy == SHOWN[0] else "", NAMES.get(policy, policy), f"{max(row['bytes_peak'] for row in found) / 1e6:.2f}"]
            for results in (dev, test):
                cells += [report.show(results.excess(policy, budget, LENGTH, kind), 3) for kind in ("plain", "recall")]
                cells += [percent(results.recall(policy, budget, LENGTH, kind)) for kind in ("recall", "many")]
            rows.append(cells)
    return report.table(["entries of 16 bits", "policy", "KV MB", "plain", "with facts", "recall, %", "64 facts, %", "plain, test", "with facts, test", "recall, test, %", "64 facts, test, %"], rows)


def difference(results, rival, ours, budget, kind, length=LENGTH):
    values = results.excess(rival, budget, length, kind, base=(ours, budget))
    if len(values) < 2:
        return None
    return report.mean_error(values)


def signed(value):
    return "–" if value is None else f"{value[0]:+.4f} ± {value[1]:.4f}"


def paired_table(dev, test):
    rows = []
    for ours, name in ((SAME, "same entries, 16 bits"), (BYTES16, "same bytes, 16 bits"), (BYTES8, "same bytes, 8-bit slots")):
        for rival in ("window, far mass", "window, 4 bits", "window, 8 bits"):
            rows += [[f"{rival}; {name}; {which}"] + [signed(difference(results, rival, ours, budget, "plain")) for budget in BUDGETS] for which, results in (("dev", dev), ("test", test))]
    return report.table(["rival less Express, plain"] + [str(budget) for budget in BUDGETS], rows)


def rivals(results):
    return [name for name in results.policies if not name.startswith("express") and not name.endswith(", prompt") and 0 not in results.budgets_of(name)]


def nearest_table(dev, test):
    """Of all rivals that hold a budget: the one with the least excess over Express, and the one with the highest recall."""
    rows = []
    for which, results in (("dev", dev), ("test", test)):
        for length in results.lengths:
            for ours in (BYTES8, BYTES16, SAME):
                for budget in results.budgets:
                    cells = [which, str(length), NAMES[ours].strip("*").removeprefix("express, observed, "), str(budget)]
                    for kind in ("plain", "recall"):
                        found = {name: value for name in rivals(results) if (value := difference(results, name, ours, budget, kind, length))}
                        if found:
                            name = min(found, key=lambda name: found[name][0])
                            mean, error = found[name]
                            cells.append(f"{name} {signed(found[name])}" + (" **behind**" if mean < -2 * error else ""))
                    if len(cells) < 6:
                        continue
                    for kind in ("recall", "many", "alike", "restated"):
                        mine = results.recall(ours, budget, length, kind)
                        others = [x for name in rivals(results) if (x := results.recall(name, budget, length, kind))]
                        cells.append(f"{percent(mine)} / {max((percent(x) for x in others), key=int)}" if mine and others else "–")
                    rows.append(cells)
    return report.table(["texts", "tokens", "Express", "entries", "nearest rival less Express, plain", "with facts", "recall, %: Express / best rival", "64 facts", "alike", "restated"], rows)


def lengths_table(dev):
    rows = []
    for length in dev.lengths:
        if length == LENGTH:
            continue
        for budget in dev.budgets:
            for policy in ("window, far mass", "window, 4 bits", "keydiff+window", SAME, BYTES16, BYTES8):
                if dev.get(policy, budget, length, "plain") and dev.get(SAME, budget, length, "plain"):
                    rows.append([str(length), str(budget), policy] + [report.show(dev.excess(policy, budget, length, kind), 3) for kind in ("plain", "recall")] + [percent(dev.recall(policy, budget, length, "recall"))])
    return report.table(["tokens", "entries", "policy", "plain", "with facts", "recall, %"], rows)


def main():
    folder = sys.argv[1]
    dev, test = (report.Results([os.path.join(folder, f"{which}_rows.jsonl.xz")], which) for which in ("dev", "test"))
    for title, lines in (("Excess and recall", main_table(dev, test)), ("Paired by text", paired_table(dev, test)), ("Other lengths", lengths_table(dev)), ("Nearest rivals", nearest_table(dev, test))):
        print(f"### {title}\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
