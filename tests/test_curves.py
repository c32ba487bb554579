"""drawing/curves.py: the lines, levels and words that are handed to matplotlib, for logs of every
kind, and the command. The levels are held against the losses themselves.
"""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from PIL import Image

from drawing.curves import curves_figure, draw_curves, marks, running_mean
from losses import alignment_loss, multi_positive_loss, reconstruction_loss

CONFIG = "batch: 64\nviews: 2\npictures_per_pose: 4\nviews_are_positives: true\n"
CONFIG += "gamma_mp: 0.05\ntau_align: 0.2\n"
DEMO = dict(batch=64, views=2, pictures_per_pose=4, views_are_positives=True)
DEMO |= dict(gamma_mp=0.05, tau_align=0.2)


def line(step, speed=400.0, **changes):
    """A line of pre-training's log."""
    row = dict(step=step, lr=1e-4 * step, loss=2 / step, rec=1 / step, align=3 / step, mp=5 / step)
    row |= dict(grad_norm=0.5, positive_cosine=0.8, negative_cosine=0.7, without_positive=0.0)
    return json.dumps(row | dict(without_pose=0.0, pictures_per_s=speed) | changes)


def write(folder, lines, config=CONFIG):
    folder.mkdir()
    (folder / "log.jsonl").write_bytes(b"\n".join(x.encode() for x in lines) + b"\n")
    if config:
        (folder / "config.yaml").write_text(config)
    return folder


def drawn(figure):
    """Panel title → {key: (steps, values)} of the lines of the log, one list entry per run."""
    found = {}
    for axis in figure.axes:
        lines = [x for x in axis.lines if not x.get_label().startswith("_")]
        found[axis.get_title()] = [(x.get_label(), *map(list, x.get_data())) for x in lines]
    return found


def test_a_panel_for_every_term_with_its_levels(tmp_path):
    run = write(tmp_path / "run", [line(step) for step in (1, 2, 3)])
    figure = curves_figure([run])
    panels = drawn(figure)
    titles = ["loss", "L_rec", "L_align", "L_mp", "learning rate", "gradient norm"]
    assert list(panels)[:6] == titles and list(panels)[7:] == ["pictures per second"]
    assert panels["L_mp"] == [("mp", [1, 2, 3], [5, 2.5, 5 / 3])]
    assert panels["learning rate"][0][2] == pytest.approx([1e-4, 2e-4, 3e-4])
    cosines = panels["cosines: one pose (—), different poses (- -)"]
    assert [(key, values) for key, _, values in cosines] == [
        ("positive_cosine", [0.8] * 3),
        ("negative_cosine", [0.7] * 3),
    ]
    by_title = {axis.get_title(): axis for axis in figure.axes}
    words = [text.get_text() for text in by_title["L_mp"].texts]
    assert words == ["knows nothing: ln 127 = 4.84", "floor: ln 7 = 1.95"]
    levels = [x.get_ydata()[0] for x in by_title["L_mp"].lines if x.get_linestyle() == ":"]
    assert levels == [math.log(127), math.log(7)]
    assert [x.get_text() for x in by_title["L_align"].texts] == ["knows nothing: 4τ ln 64 = 3.33"]
    assert not by_title["loss"].texts and not by_title["gradient norm"].texts
    assert all(axis.get_xlabel() == "step" for axis in figure.axes)
    assert by_title["pictures per second"].get_ylim()[0] == 0
    assert [x.get_text() for x in figure.legends[0].get_texts()] == [str(run)]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("without_pose", [0, 16])
def test_levels_are_what_the_losses_give(together, without_pose):
    """Embeddings that are all alike, then those that are alike in a pose and opposite elsewhere."""
    pose_id = torch.arange(16).repeat_interleave(4)
    pose_id[64 - without_pose :] = -1
    pose_id = pose_id.repeat(2) if together else pose_id  # else each view is a set of its own
    alike = torch.ones(len(pose_id), 32, dtype=torch.float64)
    apart = torch.nn.functional.one_hot(pose_id.clamp(min=0), 32).double()
    logged = [dict(step=1, without_pose=float((pose_id < 0).sum()))]
    levels = marks(logged, DEMO | dict(views_are_positives=together))
    nothing, floor = levels["mp"].values()
    assert multi_positive_loss(alike, pose_id).item() == pytest.approx(nothing, abs=1e-6)
    assert multi_positive_loss(apart, pose_id, 0.01).item() == pytest.approx(floor, abs=1e-6)
    a = torch.ones(64, 8, dtype=torch.float64)
    expected = alignment_loss(a, a, 0.2).item()
    assert list(levels["align"].values()) == pytest.approx([expected], abs=1e-6)


def test_the_level_of_l_rec_is_what_the_mean_of_a_patch_costs():
    images = torch.randn(2, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    masked = torch.ones(2, 8, dtype=torch.bool)
    loss = reconstruction_loss(torch.zeros(2, 8, 768), images, masked, 16)
    assert list(marks([], DEMO)["rec"].values()) == pytest.approx([loss.item()], rel=0.01)


def test_levels_are_not_drawn_where_they_are_not_known():
    logged = [dict(step=1, without_pose=0.0)]
    assert marks(logged, {"lr": 1e-3}) == marks(logged, {}) == {}  # fine-tuning; no config
    ungrouped = marks(logged, DEMO | dict(pictures_per_pose=1))["mp"]
    assert list(ungrouped) == ["knows nothing: ln 127 = 4.84"]
    assert list(marks([], DEMO)["mp"]) == ["floor: ln 7 = 1.95"]  # without L_mp's health


def test_several_runs_lie_over_each_other(tmp_path):
    """Of different stages too: a panel holds the runs that have its key."""
    first = write(tmp_path / "a", [line(1), line(2)])
    row = dict(lr=0.1, loss=3.0, grad_norm=2.0, pictures_per_s=5.0)
    second = write(tmp_path / "b $x_$", [json.dumps(dict(step=n, **row)) for n in (1, 2)], None)
    figure = curves_figure([first, second])
    panels = drawn(figure)
    assert [values for _, _, values in panels["loss"]] == [[2, 1], [3, 3]]
    assert [x for x in panels["L_mp"] if x[1]] == [("mp", [1, 2], [5, 2.5])]
    colours = [x.get_color() for x in figure.legends[0].get_lines()]
    assert [x.get_color() for x in figure.axes[0].lines] == colours and len(set(colours)) == 2
    assert len(figure.axes[3].texts) == 2  # the levels of one run
    draw_curves([first, second], tmp_path / "curves.png")  # $x_$ is no formula
    assert Image.open(tmp_path / "curves.png").width > 1000


@pytest.mark.parametrize(
    ("lines", "values"),
    [
        (["", '{"step": 1, "lo', "[" * 100000, "\0\0", "7", line(1), line(2)[:40]], [2]),
        ([line(1)], [2]),
        ([line(1), line(2, loss=math.nan), line(4, loss=None)], [2]),
        ([line(1), line(2), '{"step": 2, "epoch": 1, "mAP": 0.5, "final": true}'], [2, 1]),
        ([], []),
    ],
)
def test_odd_logs_draw_too(tmp_path, lines, values):
    run = write(tmp_path / "run", lines)
    panels = drawn(curves_figure([run]))
    assert panels["loss"][0][2] == values and "mAP" not in panels
    draw_curves([run], run / "curves.png")
    assert Image.open(run / "curves.png").width > 300


def test_a_term_that_is_always_zero_has_no_panel(tmp_path):
    panels = drawn(curves_figure([write(tmp_path / "run", [line(n, align=0.0) for n in (1, 2)])]))
    assert "L_align" not in panels and "L_mp" in panels


def test_evaluations_on_the_way(tmp_path):
    rows = [line(1), '{"step": 1, "epoch": 1, "val_mA": 0.5, "val_f1": 0.1}', line(2)]
    rows += ['{"step": 2, "epoch": 2, "val_mA": 0.6, "val_f1": 0.2}']
    panels = drawn(curves_figure([write(tmp_path / "run", rows)]))
    assert panels["val_mA"] == [("val_mA", [1, 2], [0.5, 0.6])] and "val_f1" not in panels


def test_a_long_log_is_drawn_faint_with_its_running_mean(tmp_path):
    values = np.random.default_rng(0).normal(5, 1, 200).tolist()
    rows = [line(n, loss=value) for n, value in enumerate(values, 1)]
    figure = curves_figure([write(tmp_path / "run", rows)])
    faint, full = figure.axes[0].lines
    assert list(faint.get_ydata()) == values and faint.get_alpha() < 0.5
    expected = [np.mean(values[max(0, i - 2) : i + 3]) for i in range(200)]
    assert full.get_ydata() == pytest.approx(expected) == running_mean(np.array(values))
    rate = drawn(figure)["learning rate"][0][2]
    assert rate == pytest.approx([1e-4 * n for n in range(1, 201)])  # a schedule is not averaged


def test_only_the_speed_of_a_resumed_run_differs(tmp_path):
    plain = write(tmp_path / "plain", [line(n) for n in range(1, 101)])
    resumed = write(tmp_path / "resumed", [line(n, speed=300.0 + n) for n in range(1, 101)])
    one, other = drawn(curves_figure([plain])), drawn(curves_figure([resumed]))
    assert [title for title in one if one[title] != other[title]] == ["pictures per second"]
    for name in ("1.png", "2.png"):
        draw_curves([plain], tmp_path / name)
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()


def test_the_command_of_the_documents(tmp_path):
    """It finds the project from any folder, and leaves no state of pyplot."""
    text = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^python (drawing/curves.py .*)$", text, re.M)
    for name in ("runs/demo/pose_pretrained", "runs/demo/pose_scratch"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, [line(1), line(2)])
    script, *words = command.split()
    done = subprocess.run(
        [sys.executable, ROOT / script, *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout == "wrote curves.png\n"
    assert Image.open(tmp_path / "curves.png").width > 1000
    program = "import sys, drawing.curves as c; c.draw_curves(sys.argv[1:], sys.argv[1] + '/x.png')"
    program += "; assert 'matplotlib.pyplot' not in sys.modules"
    command = [sys.executable, "-c", program, tmp_path / words[0]]
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    assert (tmp_path / words[0] / "x.png").exists()


def test_the_command_refuses_in_a_line(tmp_path):
    made = write(tmp_path / "set", ['{"step": 1, "pictures_of_rank_0": 32}'], None)
    for words, said in (
        ([], "name run folders"),
        ([tmp_path], "log.jsonl"),
        ([made], "no step of a training"),
    ):
        done = run_script("drawing/curves.py", *words, f"out={tmp_path}/x.png")
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "x.png").exists()
