"""From run folders to tables: means with 95 % intervals over seeds, paired differences, costs.

Legend: a column is one metric of one task; values: {method: {seed: fraction}}.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from safetensors import safe_open
from scipy import stats

from drawing.curves import COLOURS, read_run
from plumbing.errors import UserError
from plumbing.files import read_json, regular, write_atomic

# ------------------------------------------------------------------------------ numbers of a column


def interval(values):
    """Numbers → (mean, low, high) of the 95 % t-interval of their mean; None, None below two."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()), None, None
    low = high = values.mean()
    if np.ptp(values) > 0:
        low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    return float(values.mean()), float(low), float(high)


def summary(values, reference):
    """A column's values → {method: mean, low, high, seeds, difference to the reference}.

    The difference is paired, over the seeds that both have.
    """
    out = {}
    for method, own in values.items():
        if not own:
            continue
        row = dict(zip(("mean", "low", "high"), interval(list(own.values()))), values=own)
        other = values.get(reference, {})
        both = sorted(set(own) & set(other))
        if method != reference and both:
            differences = [own[seed] - other[seed] for seed in both]
            pair = zip(("mean", "low", "high"), interval(differences))
            row["difference"] = dict(pair) | {"seeds": both}
        out[method] = row
    return out


def contrasts(values, sums):
    """A column's values, {name: [(1 or -1, method), …]} → {name: mean, low, high, values by seed}.

    Over the seeds that all of its methods have; a sum without any is left out.
    """
    out = {}
    for name, terms in sums.items():
        seeds = set.intersection(*(set(values.get(method, {})) for _, method in terms))
        own = {s: sum(sign * values[method][s] for sign, method in terms) for s in sorted(seeds)}
        if own:
            found = zip(("mean", "low", "high"), interval(list(own.values())))
            out[name] = dict(found) | {"values": own}
    return out


def figures_of(folder):
    """The numbers of a task's metrics.json, or of the one encoder in probe.json."""
    if (Path(folder) / "metrics.json").exists():
        found = read_json(Path(folder) / "metrics.json")
    else:
        rows = read_json(Path(folder) / "probe.json").items()
        found = next(row for name, row in rows if name not in ("chance", "best possible"))
    return {name: value for name, value in found.items() if isinstance(value, (int, float))}


def cost_of(folder):
    """A finished pre-training → pictures seen, views of them, parameters of its encoder.

    Views are maskings in pretrain.py and whole crops in the neighbouring methods, of which SOLIDER
    and LiftedCL take two; small crops count by their area.
    """
    rows, config = read_run(folder)
    pictures = rows[-1]["step"] * int(config["batch"])
    with safe_open(regular(Path(folder) / "encoder.safetensors"), "pt") as file:
        sizes = [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]
    two = {"out_dim", "weight_adv"} & set(config)  # SOLIDER's keys, LiftedCL's
    views = config.get("views", 2 if two else 1)
    if config.get("local_crops"):
        small = config["local_height"] * config["local_width"]
        views += config["local_crops"] * small / (config["height"] * config["width"])
    return dict(pictures=pictures, views=round(pictures * views), parameters=sum(sizes))


def seconds_of(path):
    """times.jsonl → {folder: (seconds, was it ever cut off?)}."""
    seconds, open_ = {}, {}
    for line in Path(path).read_text().splitlines() if Path(path).exists() else []:
        try:
            row = json.loads(line)
        except ValueError:  # cut off by a full disk or a power cut
            continue
        name = row["folder"]
        open_[name] = open_.get(name, 0) + (1 if "seconds" not in row else -1)
        seconds[name] = seconds.get(name, 0.0) + row.get("seconds", 0.0)
    return {name: (value, open_[name] > 0) for name, value in seconds.items()}


# ------------------------------------------------------------------------- tables of other machines


def read_earlier(paths, seeds, rows):
    """Files table.json → their contents; UserError where rows, rates or seeds do not fit together.

    seeds: those that this run makes; rows: {sets, methods, select, tasks} of its config.
    """
    found, taken = [], dict.fromkeys(seeds, "seeds=")
    for path in paths:
        table = read_json(path)
        if not isinstance(table, dict) or not {"config", "methods", "columns"} <= set(table):
            raise UserError(f"earlier={path} is no table.json of experiments/compare.py")
        for name, own in rows.items():
            if table["config"][name] != own:
                raise UserError(f"earlier={path} has other {name} than this config, so its seeds "
                                "cannot join the tables")  # fmt: skip
        for seed in seeds_in(table):
            if seed in taken:
                raise UserError(f"seed {seed} of earlier={path} is also in {taken[seed]}")
            taken[seed] = path
        if rates_of(table) != rates_of((found or [table])[0]):
            raise UserError(f"earlier={path} has other rates than {paths[0]}")
        found.append(table)
    return found


def seeds_in(table):
    """The seeds of a table.json that have figures."""
    rows = [row for column in table["columns"] for row in column["rows"].values()]
    return {int(seed) for row in rows for seed in row["values"]}


def rates_of(table):
    """{method: {"rate": what was chosen, "scores": {rate: validation score}}} of a table.json."""
    return {name: {k: row[k] for k in ("rate", "scores")} for name, row in table["methods"].items()}


def cost_before(earlier, method):
    """What the earlier tables say of a method's pre-training, in the keys of `cost_of` and more."""
    if earlier:
        return dict(earlier[-1]["methods"][method])
    return dict(pictures=None, views=None, parameters=None, seconds=None, cut=False)


def earlier_values(earlier, task, metric, method):
    """{seed: figure} of a method in the column of a task's metric."""
    columns = [column for table in earlier for column in table["columns"]]
    columns = [column for column in columns if (column["task"], column["metric"]) == (task, metric)]
    rows = [column["rows"].get(method, {"values": {}}) for column in columns]
    return {int(seed): value for row in rows for seed, value in row["values"].items()}


# --------------------------------------------------------------------------------- text and picture


def percent(value, sign=False):
    """.4321 → 43.2"""
    return f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}"


def cell(row, sign=False, seeds=0):
    """seeds: what the table's heading says; a figure that rests on fewer says so."""
    if row is None:
        return "–"
    text = percent(row["mean"], sign)
    if row["low"] is not None:
        text += f" [{percent(row['low'], sign)}, {percent(row['high'], sign)}]"
    own = len(row.get("values") or row["seeds"])
    return f"{text} ({own} seed{'s' * (own > 1)})" if own < seeds else text


def markdown(result):
    """The whole of table.json as text: per table the means, then the differences; costs, rates."""
    methods, reference, lines = result["methods"], result["reference"], []
    for table in dict.fromkeys(column["table"] for column in result["columns"]):
        columns = [column for column in result["columns"] if column["table"] == table]
        heads = [f"{column['task']} {column['metric']}" for column in columns]
        done = [len(row["values"]) for column in columns for row in column["rows"].values()]
        most = max(done, default=0)
        seeds = f"{most} of {len(result['seeds'])} seeds"
        lines += [f"## {table}", "", f"Percent; mean of {seeds} [95 % t-interval].", ""]
        lines += head(["method", *heads])
        for method in methods:
            cells = [cell(column["rows"].get(method), seeds=most) for column in columns]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        lines += ["", f"Minus {reference}, paired by seed:", "", *head(["method", *heads])]
        for method in [method for method in methods if method != reference]:
            rows = [column["rows"].get(method, {}).get("difference") for column in columns]
            cells = [cell(row, sign=True, seeds=most) for row in rows]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        lines.append("")
        names = dict.fromkeys(name for column in columns for name in column["contrasts"])
        if names:
            lines += ["Sums of methods, by seed:", "", *head(["", *heads])]
        for name in names:
            rows = [column["contrasts"].get(name) for column in columns]
            cells = [cell(row, sign=True, seeds=most) for row in rows]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    names = ["method", "pictures seen", "views", "encoder parameters", "pre-training, s", "rate"]
    lines += ["## Costs", "", *head(names)]
    for method, row in methods.items():
        seconds = "–" if row["seconds"] is None else f"{row['seconds']:.0f}"
        seconds += " or more" if row["cut"] else ""
        counts = [f"{row[n]:,}" if row[n] else "–" for n in ("pictures", "views", "parameters")]
        rate = "–" if row["rate"] is None else f"{row['rate']:g}"
        lines.append(f"| {method} | " + " | ".join([*counts, seconds, rate]) + " |")
    lines += ["", f"Seconds: mean of the last run's seeds, {result['jobs']} cells at a time.", ""]
    if result["failed"]:
        lines += ["## Failed, not counted", ""]
        lines += [f"- {name}: {why}" for name, why in result["failed"].items()] + [""]
    return "\n".join(lines)


def say_failed(failed, columns):
    """failed: {cell: why}. UserError where it leaves no figure in any column."""
    for name, why in failed.items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    if failed and not any(column["rows"] for column in columns):
        raise UserError(f"no cell gave a figure: {len(failed)} failed, as said above")


def head(names):
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]


def draw(result, path):
    """A panel per column: every method's mean with its interval, and its seeds as faint points."""
    columns, methods = result["columns"], list(result["methods"])
    across = min(4, len(columns))
    down = -(-len(columns) // across)
    size = 3.2 * across + 0.6, (0.9 + 0.26 * len(methods)) * down
    figure = Figure(size, layout="constrained")
    for number, column in enumerate(columns, 1):
        axis = figure.add_subplot(down, across, number)
        axis.set_title(f"{column['table']}: {column['task']}\n{column['metric']}, %", fontsize=9)
        for y, method in enumerate(methods):
            row = column["rows"].get(method)
            if row is None:
                continue
            colour = COLOURS[1] if method == result["reference"] else COLOURS[0]
            seeds = [100 * value for value in row["values"].values()]
            axis.plot(seeds, [y] * len(seeds), "|", color=colour, alpha=0.4, markersize=9)
            axis.plot([100 * row["mean"]], [y], "o", color=colour, markersize=5)
            if row["low"] is not None:
                axis.plot([100 * row["low"], 100 * row["high"]], [y, y], color=colour)
        if not column["rows"]:
            axis.text(0.5, 0.5, "no figure", transform=axis.transAxes, ha="center", va="center")
        axis.set_yticks(range(len(methods)), methods if (number - 1) % across == 0 else [])
        axis.set_ylim(len(methods) - 0.5, -0.5)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", color="0.92")
    write_atomic(path, lambda part: figure.savefig(part, format="png", dpi=110))
