"""Curves of training runs from their log.jsonl, of one run or of several laid over each other.

  python drawing/curves.py runs/a runs/b out=curves.png

A panel for each term of the loss, with what it is where the model knows nothing and its floor, if
these are known; then learning rate, gradient norm, cosines of L_mp, speed, evaluations on the way.
Faint: what was logged; full: its running mean. docs/metrics.md explains every key. n: logged steps.
"""

import contextlib
import json
import math
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from plumbing.config import read_yaml
from plumbing.errors import UserError, run_stage
from plumbing.files import regular, write_atomic

# Okabe and Ito's colours, which the colour-blind can tell apart: one for each run.
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()
COSINES = {"positive_cosine": "-", "negative_cosine": "--"}  # one panel, a line style for each
TOKENS = {"cls": "--", "pose": "-", "patch_mean": "-."}  # one panel for each score of pre-training
ABOUT = ("step", "epoch", "final")  # of a line that has no "lr": an evaluation
TITLES = dict(rec="L_rec", align="L_align", mp="L_mp", lr="learning rate")
TITLES |= dict(grad_norm="gradient norm", pictures_per_s="pictures per second")
TITLES |= dict(positive_cosine="cosines: one pose (—), different poses (- -)")
TITLES |= dict(oks_cls="OKS: [POSE] —, [CLS] - -, patches -·")
TITLES |= dict(same_pose_cls="same pose nearest: [POSE] —, [CLS] - -, patches -·")


def draw_curves(runs, path):
    """Curves of `runs` (run folders) as one PNG at `path`. No pyplot: it keeps figures open."""
    write_atomic(path, lambda part: curves_figure(runs).savefig(part, format="png", dpi=110))


def read_run(run):
    """Run folder → (logged lines, config or {}). A line that a kill has broken is left out."""
    rows, config = [], Path(run) / "config.yaml"
    for line in Path(regular(Path(run) / "log.jsonl")).read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows, read_yaml(config) if config.exists() else {}


def curve(rows, key):
    """→ steps (n,) and values (n,) of the lines that hold a finite number under this key."""
    found = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    steps, values = np.array(found, dtype=float).reshape(-1, 2).T
    return steps[np.isfinite(values)], values[np.isfinite(values)]


def panels(rows):
    """Which keys of a log have a panel, in order; the two cosines share one."""
    names = list(dict.fromkeys(key for row in rows if "lr" in row for key in row))
    # StepLog writes step, lr, the terms of the loss, grad_norm, and what else there is.
    terms = names[2 : names.index("grad_norm")] if "grad_norm" in names else []
    terms = [key for key in terms if curve(rows, key)[1].any()]  # always 0: its γ is 0
    others = ("lr", "grad_norm", "positive_cosine", "pictures_per_s")
    # Of evaluations on the way their first figure, by which runs are compared.
    figures = [key for row in rows if "lr" not in row for key in row if key not in ABOUT][:1]
    figures = [key for key in figures if len(curve(rows, key)[0]) > 1]
    return [*terms, *(key for key in others if key in names), *figures]


def marks(rows, config):
    """The terms of a pre-training that knows nothing, and the floor of L_mp, by docs/metrics.md.

    → {key: {label: value}}. Those of fine-tuning depend on data that its config does not tell.
    Its scores of held-out people are logged with theirs: chance, and the best possible.
    """
    if "out_dim" in config:  # SOLIDER
        K = config["out_dim"]
        return {"dino": {f"knows nothing: ln {K} = {math.log(K):.2f}": math.log(K)}}
    if "gamma_mp" not in config:
        return {}
    scores = {}
    for key in ("oks", "same_pose"):
        levels = {level: curve(rows, f"{key}_{level}")[1] for level in ("chance", "best")}
        levels = {f"{level}: {v[-1]:.2f}": v[-1] for level, v in levels.items() if len(v)}
        scores |= {f"{key}_cls": levels} if levels else {}
    B, P, start = config["batch"], config["pictures_per_pose"], "knows nothing: "
    v = config["views"] if config["views_are_positives"] else 1  # else each view is its own set
    without_pose = curve(rows, "without_pose")[1]
    columns = v * B - 1 - round(without_pose.mean()) if len(without_pose) else 0
    positives = v * P - 1 if P > 1 else 0  # else chance decides how many pictures of a pose meet
    mp = [(start, columns), ("floor: ", positives)]
    mp = {f"{word}ln {n} = {math.log(n):.2f}": math.log(n) for word, n in mp if n > 0}
    align = 4 * config["tau_align"] * math.log(B)
    align = {f"{start}4τ ln {B} = {align:.2f}": align}
    return {"rec": {start + "1": 1.0}, "align": align, "mp": mp} | scores


def running_mean(values):
    """(n,) → (n,): mean over n/40 values around each, fewer at the ends."""
    n, half, place = len(values), len(values) // 80, np.arange(len(values))
    low, high = np.maximum(place - half, 0), np.minimum(place + half + 1, n)
    total = np.append(0, np.cumsum(values))
    return (total[high] - total[low]) / (high - low)


def curves_figure(runs):
    """→ the matplotlib Figure that draw_curves writes."""
    read = [read_run(run) for run in runs]
    keys = list(dict.fromkeys(key for rows, _ in read for key in panels(rows))) or ["loss"]
    down = math.ceil(len(keys) / (4 if len(keys) > 4 else 2))
    across = math.ceil(len(keys) / down)
    figure = Figure((3.6 * across, 2.5 * down + 0.25 * len(runs)), layout="constrained")
    for number, key in enumerate(keys, 1):
        axis = figure.add_subplot(down, across, number)
        axis.set_title(TITLES.get(key, key), fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(which="both", labelsize=8)
        axis.margins(y=0.1)  # room for the words above a level
        axis.grid(color="0.92")
        levels = {}
        for r, (rows, config) in enumerate(read):
            for name, style in styles(key).items():
                draw_line(axis, *curve(rows, name), (name, style), COLOURS[r % len(COLOURS)])
            levels |= marks(rows, config).get(key, {})
        for label, level in levels.items():
            axis.axhline(level, color="0.4", linestyle=":", linewidth=1.2)
            place = axis.get_yaxis_transform()  # x from 0 to 1 over the panel, y in data
            axis.text(0.99, level, label, transform=place, fontsize=8, ha="right", va="bottom")
        axis.set_yscale("log" if key == "grad_norm" else "linear")
        axis.set_ylim(bottom=0 if key == "pictures_per_s" else None)
    names = [str(run).replace("$", r"\$") for run in runs]  # between two $ stands mathematics
    lines = [Line2D([], [], color=COLOURS[r % len(COLOURS)]) for r in range(len(runs))]
    figure.legend(lines, names, loc="outside upper left", frameon=False, fontsize=9)
    return figure


def styles(key):
    """The lines of a panel: {key of the log: line style}."""
    if key in ("oks_cls", "same_pose_cls"):
        return {key.removesuffix("cls") + token: style for token, style in TOKENS.items()}
    return COSINES if key in COSINES else {key: "-"}


def draw_line(axis, steps, values, name, colour):
    key, style = name
    if key != "lr" and len(values) >= 80:  # fewer are not averaged
        axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.6)
        values = running_mean(values)
    style = dict(color=colour, linestyle=style, linewidth=1.4, label=key)
    axis.plot(steps, values, **style, marker="." if len(values) < 40 else "")


def main():
    runs = [word for word in sys.argv[1:] if not word.startswith("out=")]
    out = [word[4:] for word in sys.argv[1:] if word.startswith("out=")] or ["curves.png"]
    if not runs or not out[-1]:
        raise UserError("name run folders: python drawing/curves.py runs/a runs/b out=curves.png")
    if Path(out[-1]).exists() and Path(out[-1]).suffix != ".png":
        raise UserError(f"out={out[-1]} exists and is no .png; choose another name")
    for run in runs:
        if not any("lr" in row for row in read_run(run)[0]):
            raise UserError(f"{run}/log.jsonl holds no step of a training; name another folder")
    draw_curves(runs, out[-1])
    print(f"wrote {out[-1]}")


if __name__ == "__main__":
    run_stage(main)
