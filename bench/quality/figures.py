"""The figures of report.py: each function draws, saves PNG and SVG, and gives the Markdown lines that show it (none if there is nothing to draw)."""
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

plt.rcParams.update({"font.size": 8, "axes.grid": True, "grid.alpha": 0.3, "svg.hashsalt": "express"})
DEPTHS = 8
FLOOR = 1e-4  # where figures on a logarithmic axis end
MARKS = "osv^D<>pPX*hd"


def style(policies, name):
    """The same colour and mark for a policy in all figures; Express stands out."""
    at = policies.index(name)
    express = name.startswith("express")
    return {"color": "black" if name == "express, profile" else plt.get_cmap("tab20")(at % 20), "marker": MARKS[at % len(MARKS)], "markersize": 3.5,
            "linewidth": 2 if express else 1, "linestyle": "-" if express else "--", "label": name}


def save(figure, folder, name, caption):
    for kind, options in (("png", {"dpi": 130}), ("svg", {"metadata": {"Date": None}})):
        figure.savefig(os.path.join(folder, f"{name}.{kind}"), bbox_inches="tight", **options)
    plt.close(figure)
    return [f"![{caption}]({name}.png)", "", f"*{caption}* ([SVG]({name}.svg))", ""]


def streaming(names):
    """Those that hold a budget throughout."""
    return [name for name in names if not name.endswith(", prompt")]


def mean(values):
    return sum(values) / len(values)


def curves(results, folder, length, kind, shown):
    """Excess bits and divergence over entries and over bytes, recall over bytes."""
    figure, axes = plt.subplots(1, 4 if kind != "plain" else 3, figsize=(17, 4.6), layout="constrained")
    drawn = False
    for name in streaming(shown):
        points = []
        for budget in results.budgets_of(name):
            rows, excess = results.get(name, budget, length, kind), results.excess(name, budget, length, kind)
            if name == "exact" or not excess:
                continue
            kl = list(results.by_text(rows, "kl_second_half").values())
            points.append((mean([row["entries_peak"] for row in rows]), max(row["bytes_peak"] for row in rows) / 1e6, mean(excess), mean(kl or [float("nan")]),
                           mean(results.recall(name, budget, length, kind) or [float("nan")])))
        if points:
            drawn = True
            entries, megabytes, excess, kl, recall = zip(*points)
            for axis, x, y in zip(axes, (entries, megabytes, megabytes, megabytes), (excess, excess, kl, recall)):
                axis.plot(x, y if axis is axes[-1] and kind != "plain" else [value if value != value else max(FLOOR, value) for value in y], **style(results.policies, name))
    for axis, x, y in zip(axes, ("entries per KV head at peak", "KV MB at peak", "KV MB at peak", "KV MB at peak"),
                          ("excess bits/byte, second half", "excess bits/byte, second half", "KL from exact (nats), second half", "recall")):
        axis.set_xscale("log", base=2)
        axis.set_xlabel(x), axis.set_ylabel(y)
        if y != "recall":
            axis.set_yscale("log")
    if not drawn:
        plt.close(figure)
        return []
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, ncol=8, loc="outside lower center")
    return save(figure, folder, f"bits-{kind}-{length}", f"{length} tokens, {kind} texts: against entries and against bytes held at peak")


def positions(results, folder, length, shown):
    """Excess bits by position, a panel for each of up to three budgets."""
    budgets = [budget for budget in results.budgets if len([name for name in shown if results.get(name, budget, length, "plain")]) > 1]
    budgets = budgets[:1] + budgets[len(budgets) // 2:len(budgets) // 2 + 1] + budgets[-1:] if len(budgets) > 3 else budgets
    if not budgets or not results.get("exact", 0, length, "plain"):
        return []
    figure, axes = plt.subplots(1, len(budgets), figsize=(max(8, 5.5 * len(budgets)), 4.4), squeeze=False, layout="constrained")
    average = lambda rows: [mean(x) for x in zip(*(row["bits_by_position"] for row in rows))]
    exact = average(results.get("exact", 0, length, "plain"))
    for axis, budget in zip(axes[0], budgets):
        for name in streaming(shown):
            rows = results.get(name, budget, length, "plain")
            if rows and name != "exact":
                parts = len(rows[0]["bits_by_position"])
                axis.plot([length * (i + 0.5) / parts for i in range(parts)], [max(FLOOR, a - b) for a, b in zip(average(rows), exact)],
                          **style(results.policies, name))
        axis.set_title(f"{budget} entries"), axis.set_xlabel("position"), axis.set_ylabel("excess bits/byte"), axis.set_yscale("log")
        axis.set_ylim(bottom=1e-3)
    labels = {label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(labels.values(), labels.keys(), fontsize=7, ncol=8, loc="outside lower center")
    return save(figure, folder, f"positions-{length}", f"{length} tokens, plain texts: excess bits per byte by position")


def recall_maps(results, folder, length, shown):
    """Per policy a map: depth of the fact across, budget down."""
    names = [name for name in shown if any(results.get(name, budget, length, "recall") for budget in results.budgets)]
    if not names:
        return []
    columns = 6
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.6 * columns, 1.7 * rows + 0.4), squeeze=False, layout="constrained")
    for axis in axes.flat[len(names):]:
        axis.remove()
    for axis, name in zip(axes.flat, names):
        cells = [[mean(results.recall(name, budget, length, "recall", depth=(i / DEPTHS, (i + 1) / DEPTHS)) or [float("nan")]) for i in range(DEPTHS)]
                 for budget in results.budgets]
        image = axis.imshow(cells, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_title(name, fontsize=7), axis.grid(False)
        axis.set_yticks(range(len(results.budgets)), results.budgets, fontsize=6)
        axis.set_xticks([-0.5, DEPTHS / 2 - 0.5, DEPTHS - 0.5], ["0", "½", "1"], fontsize=6)
    figure.colorbar(image, ax=axes.ravel().tolist()[:len(names)], shrink=0.6)
    return save(figure, folder, f"recall-{length}", f"{length} tokens: recall by depth of the fact (across) and entries (down)")


def error_maps(results, folder, length, shown):
    """Error of outputs: layers down, query heads across, at the smallest budget that has it."""
    for budget in results.budgets:
        names = [name for name in shown if any("output_error" in row for row in results.get(name, budget, length, "plain"))]
        if names:
            break
    else:
        return []
    figure, axes = plt.subplots(1, len(names), figsize=(1.6 * len(names) + 1, 2.6), squeeze=False)
    for axis, name in zip(axes[0], names):
        rows = [row["output_error"] for row in results.get(name, budget, length, "plain") if "output_error" in row]
        cells = [[mean([row[i][j] for row in rows]) for j in range(len(rows[0][0]))] for i in range(len(rows[0]))]
        image = axis.imshow(cells, vmin=0, vmax=1, cmap="magma", aspect="auto")
        axis.set_title(name, fontsize=6), axis.grid(False)
        axis.set_xlabel("query head", fontsize=6)
    axes[0][0].set_ylabel("layer")
    figure.colorbar(image, ax=axes.ravel().tolist(), shrink=0.8)
    return save(figure, folder, f"errors-{length}", f"{length} tokens, {budget} entries: relative error of attention outputs by layer and query head")


def times(results, folder, length):
    """Time per token of every policy, slowest below, at the budget at which most have one."""
    policies = list(dict.fromkeys(key[2] for key in results.timed if key[:2] == ("stream", length)))
    named = lambda budget: {name: mean(found) for name in policies if (found := results.times(name, budget, length))}
    budget = max((key[3] for key in results.timed if key[:2] == ("stream", length)), key=lambda budget: len(named(budget)), default=0)
    seconds = named(budget)
    if len(seconds) < 2:
        return []
    names = sorted(seconds, key=seconds.get, reverse=True)
    figure, axis = plt.subplots(figsize=(7, 0.6 + 0.19 * len(names)), layout="constrained")
    axis.barh(names, [seconds[name] for name in names], color=["black" if name.startswith("express") else "tab:blue" for name in names])
    axis.set_xlabel("µs per token"), axis.grid(False, axis="y"), axis.tick_params(axis="y", labelsize=7)
    return save(figure, folder, f"times-{length}", f"{length} tokens, {budget} entries: time per token")
