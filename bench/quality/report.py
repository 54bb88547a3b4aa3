#!/usr/bin/env python3
"""Figures and a Markdown report of what run.py measured.

    python3 bench/quality/report.py RESULTS.jsonl [MORE.jsonl ...] --out FOLDER [--policies 'window;h2o;...'] [--title TEXT]

Writes FOLDER/report.md and the figures it shows, each as PNG and SVG. Needs matplotlib; reads .jsonl and .jsonl.xz. Figures are means over texts and seeds; +- is the standard error
over texts of the means over seeds. Differences are paired by text.
"""
import argparse
import collections
import json
import lzma
import math
import os

import figures

BASE = "exact"
KEY = ("set", "case", "protocol", "policy", "budget", "seed", "errors")


def mean_error(values):
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def show(values, digits=4, scale=1):
    if not values:
        return "–"
    mean, error = mean_error([scale * v for v in values])
    return f"{mean:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def read(paths):
    return [json.loads(line) for path in paths for line in (lzma.open(path, "rt") if path.endswith(".xz") else open(path))]


class Results:
    """Rows by (protocol, length, kind, policy, budget)."""

    def __init__(self, paths, which=None, budgets=None, timed=()):
        """timed: files whose rows give the times, in place of those of `paths`: the same settings, run alone"""
        rows = read(paths)
        rows = [row for row in rows if which in (None, row["set"]) and (not budgets or row["budget"] in [0] + budgets)]
        self.rows = list({tuple(row[name] for name in KEY): row for row in reversed(rows)}.values())[::-1]  # the first of each: shards repeat exact
        self.index = collections.defaultdict(list)
        for row in self.rows:
            self.index[row["protocol"], row["length"], row["kind"], row["policy"], row["budget"]].append(row)
        self.timed = collections.defaultdict(set)  # texts side by side share a time
        for row in read(timed) if timed else self.rows:
            if "us_per_token" in row:
                self.timed[row["protocol"], row["length"], row["policy"], row["budget"]].add(row["us_per_token"])
        of = lambda name: list(dict.fromkeys(row[name] for row in self.rows))
        self.policies, self.lengths, self.kinds, self.protocols = of("policy"), sorted(of("length")), of("kind"), of("protocol")
        self.budgets = sorted(budget for budget in of("budget") if budget)

    def get(self, policy, budget, length, kind, protocol="stream"):
        return self.index.get((protocol, length, kind, policy, budget)) or []

    def budgets_of(self, policy):
        return sorted({row["budget"] for row in self.rows if row["policy"] == policy})

    def by_text(self, rows, field):
        """{text: mean over seeds}"""
        texts = collections.defaultdict(list)
        for row in rows:
            if row.get(field) is not None:
                texts[row["case"]].append(row[field])
        return {text: sum(values) / len(values) for text, values in texts.items()}

    def excess(self, policy, budget, length, kind, field="bits_second_half", protocol="stream", base=(BASE, 0)):
        """Of every text: how far the figure is above that of exact attention (or of another policy and budget)."""
        mine = self.by_text(self.get(policy, budget, length, kind, protocol), field)
        other = self.by_text(self.get(*base, length, kind, protocol), field)
        return [mine[text] - other[text] for text in mine if text in other]

    def times(self, policy, budget, length):
        """µs per token of every run; those of a policy without a budget stand beside all budgets."""
        return sorted(self.timed.get(("stream", length, policy, 0)) or self.timed.get(("stream", length, policy, budget)) or [])

    def answered(self, length, kind, protocol):
        """{text: for each question whether exact attention answers it}; only those count."""
        return {row["case"]: [ok for _, ok in row["answers"]] for row in self.get(BASE, 0, length, kind, protocol)}

    def recall(self, policy, budget, length, kind, protocol="stream", depth=None):
        """Of every row: the share of the questions that exact attention answers. depth: only of facts in this range of the text."""
        exact, shares = self.answered(length, kind, protocol), collections.defaultdict(list)
        for row in self.get(policy, budget, length, kind, protocol):
            asked = exact.get(row["case"], [1] * len(row["answers"]))
            oks = [ok for (where, ok), counts in zip(row["answers"], asked) if counts and (depth is None or depth[0] <= where < depth[1])]
            if oks:
                shares[row["case"]].append(sum(oks) / len(oks))
        return [sum(x) / len(x) for x in shares.values()]


# ---- tables ----


def table(head, rows):
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)] + ["| " + " | ".join(row) + " |" for row in rows] + [""]


def main_table(results, length, budget, protocol="stream"):
    """One budget: all policies."""
    kinds = [kind for kind in results.kinds if kind != "plain"]
    head = ["policy", "KV MB at peak", "excess bits/byte, plain", "excess, with facts", "KL, plain (nats)"] + [f"{kind}, %" for kind in kinds]
    rows = []
    for policy in results.policies:
        at = 0 if 0 in results.budgets_of(policy) else budget
        found = [row for kind in results.kinds for row in results.get(policy, at, length, kind, protocol)]
        if not found:
            continue
        kl = list(results.by_text(results.get(policy, at, length, "plain", protocol), "kl_second_half").values())
        rows.append([policy, f"{max(row['bytes_peak'] for row in found) / 1e6:.2f}", show(results.excess(policy, at, length, "plain", protocol=protocol)),
                     show(results.excess(policy, at, length, "recall", protocol=protocol)), show(kl)]
                    + [show(results.recall(policy, at, length, kind, protocol), 1, 100) for kind in kinds])
    return table(head, rows)


def paired_table(results, length, kind, base, budgets):
    """Excess of every policy over `base` at the same budget; beyond two standard errors in bold."""
    rows = []
    for policy in results.policies:
        if policy in (BASE, base) or 0 in results.budgets_of(policy):
            continue
        cells = []
        for budget in budgets:
            values = results.excess(policy, budget, length, kind, base=(base, budget))
            if values:
                mean, error = mean_error(values)
                text = f"{mean:+.4f}" + ("" if error is None else f" ± {error:.4f}")
                cells.append(f"**{text}**" if error is not None and abs(mean) > 2 * error else text)
            else:
                cells.append("–")
        if set(cells) != {"–"}:
            rows.append([policy] + cells)
    return table([f"policy less {base}"] + [f"{budget} entries" for budget in budgets], rows) if rows else []


def time_table(results, length):
    """All that was timed, at the budgets at which something was."""
    keys = [key[2:] for key in results.timed if key[:2] == ("stream", length)]
    budgets = sorted({budget for _, budget in keys if budget})
    rows = []
    for policy in dict.fromkeys(policy for policy, _ in keys):
        cells = [show(results.times(policy, budget, length), 1) for budget in budgets]
        if set(cells) - {"–"}:
            rows.append([policy] + cells)
    return table(["µs per token"] + [str(budget) for budget in budgets], rows) if rows else []


def bottleneck_table(results, length, budget, default, window="window"):
    """The four uses of the design's section 1, the default against the window and the best other policy."""
    rows = []
    for use, protocol, policies in (("long-context prefill: approximate prefill, exact decode", "prefill", None),
                                    ("KV-cache compression: exact prefill, one compression, then growing", "stream", "prompt"),
                                    ("memory-constrained decoding: all in the budget", "stream", None),
                                    ("compute-constrained decoding: the same at a quarter of the budget", "stream", None)):
        at = budget // 4 if use.startswith("compute") else budget
        own = [p for p in results.policies if (p.endswith(", prompt") if policies else not p.endswith(", prompt")) and 0 not in results.budgets_of(p)]
        mine = "express, prompt" if policies else default
        figure = lambda p: (results.excess(p, at, length, "recall", "bits_second_half", protocol), results.recall(p, at, length, "recall", protocol))
        others = [p for p in own if p != mine and not p.startswith("express") and figure(p)[0]]
        if not figure(mine)[0] or not others:
            continue
        best = min(others, key=lambda p: mean_error(figure(p)[0])[0])
        text = lambda p: "{} bits, {} %".format(*(show(x, d, s) for x, d, s in zip(figure(p), (4, 1), (1, 100)))) if figure(p)[0] else "–"
        rows.append([use, str(at), text(mine), text(window), f"{best}: {text(best)}"])
    return table(["use", "entries", default, window, "best other (bits)"], rows) if rows else []


def layer_lines(results, length):
    lines = []
    for budget in results.budgets:
        rows = []
        for policy in results.policies:
            found = [row for kind in results.kinds for row in results.get(policy, budget, length, kind) if "output_error" in row]
            if found:
                layers = len(found[0]["output_error"])
                rows.append([policy] + [show([sum(row["output_error"][i]) / len(row["output_error"][i]) for row in found], 3) for i in range(layers)])
        if rows:
            lines += [f"{budget} entries:", ""] + table(["policy"] + [f"layer {i}" for i in range(len(rows[0]) - 1)], rows)
    return lines


def section(title, lines, note=None):
    """Nothing if there are no lines."""
    return [title, ""] + ([note, ""] if note else []) + lines if lines else []


def write_report(results, options):
    lines = [f"# {options.title}", ""]
    if options.note:
        lines += [options.note, ""]
    lines += ["Excess: above exact attention on the same text, bits per byte of its second half. Mean ± standard error over texts (of means over seeds). "
              "Recall: share of the questions that exact attention answers. KL: of the next byte's distributions, exact attention's first.", ""]
    for length in results.lengths:
        for protocol in results.protocols:
            name = {"stream": "every token under the budget", "prefill": "approximate prefill, exact decode"}[protocol]
            lines += [f"## {length} tokens, {name}", ""]
            if protocol == "stream":
                for kind in [kind for kind in ("plain", "recall") if kind in results.kinds]:
                    lines += figures.curves(results, options.out, length, kind, options.shown)
                lines += figures.positions(results, options.out, length, options.shown) + figures.recall_maps(results, options.out, length, options.shown)
                lines += figures.error_maps(results, options.out, length, options.shown)
            for budget in results.budgets:
                if any(row["budget"] == budget and row["protocol"] == protocol and row["length"] == length for row in results.rows):
                    lines += [f"### {budget} entries", ""] + main_table(results, length, budget, protocol)
        for kind in ("plain", "recall"):
            lines += section(f"### Paired by text with {options.default}, {length} tokens, {kind}", paired_table(
                results, length, kind, options.default, results.budgets))
        if options.default in results.policies and options.bottleneck in results.budgets:
            lines += section("### The four uses, texts with facts", bottleneck_table(results, length, options.bottleneck, options.default))
        lines += section("### Error of attention outputs by layer (mean over heads)", layer_lines(results, length))
        lines += section("### Time", figures.times(results, options.out, length) + time_table(results, length),
                         "Of this harness, all sequences side by side, the model's own work included; it compares policies written alike, not libraries. "
                         "Mean ± standard error over runs, where there are several." + (f" {options.time_note}" if options.time_note else ""))
    with open(os.path.join(options.out, "report.md"), "w") as file:
        file.write("\n".join(lines).rstrip() + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+")
    parser.add_argument("--out", required=True)
    parser.add_argument("--set", choices=["dev", "test"], help="only these rows")
    parser.add_argument("--budgets", type=lambda text: [int(x) for x in text.split(",")], help="only these")
    parser.add_argument("--title", default="Quality of cache policies")
    parser.add_argument("--note", help="machine, date, commit: goes below the title")
    parser.add_argument("--times", action="append", default=[], help="times from this file of rows, of a run with the machine to itself")
    parser.add_argument("--time-note", help="where times were taken: goes above their table")
    parser.add_argument("--default", default="express, profile", help="the policy that others are compared with")
    parser.add_argument("--bottleneck", type=int, default=1024, help="budget of the table of the four uses")
    parser.add_argument("--policies", help="only these in the figures, between semicolons")
    options = parser.parse_args()
    results = Results(options.results, options.set, options.budgets, options.times)
    names = [name.strip() for name in options.policies.split(";")] if options.policies else results.policies
    options.shown = [name for name in names if name in results.policies]
    os.makedirs(options.out, exist_ok=True)
    write_report(results, options)


if __name__ == "__main__":
    main()
