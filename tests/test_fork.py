"""baselines/README.md's fork guide: its example against loops, on ranks, and run; its commands."""

import importlib
import json
import math
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, kill_after, run_script

import generate
from baselines import parts, vicreg
from common import load_checkpoint
from model import load_encoder
from plumbing.config import read_config
from plumbing.errors import UserError

README = (ROOT / "baselines/README.md").read_text(encoding="utf-8")
SMALL = "size=tiny height=64 width=32 batch=16 expander=32 epochs=6 device=cpu workers=0 "
SMALL += "save_every=2 precision=fp32 blr=4.0e-3"


@pytest.fixture(scope="module")
def poses(tmp_path_factory):
    """8 poses × 4 pictures: 2 steps of 16 an epoch."""
    out = tmp_path_factory.mktemp("poses") / "set"
    words = [f"out={out}", "poses=8", "pictures_per_pose=4", "workers=0", "height=64", "width=32"]
    argv, sys.argv = sys.argv, ["generate.py", *words]
    generate.main()
    sys.argv = argv
    return out / "annotations.json"


def test_terms_are_those_of_a_loop():
    g = torch.Generator().manual_seed(0)
    x, y = (0.8 * torch.randn(7, 3, generator=g, dtype=torch.float64) for _ in range(2))
    y[:, 1] = y[:, 0]  # a dimension that repeats another
    told = vicreg.vicreg_terms(x, y)
    n, D = x.shape
    apart = sum((x[i, d] - y[i, d]) ** 2 for i in range(n) for d in range(D)) / (n * D)
    variance, covariance = 0, 0
    for z in (x, y):
        mean = [sum(z[i, d] for i in range(n)) / n for d in range(D)]
        for d in range(D):
            for e in range(D):
                c = sum((z[i, d] - mean[d]) * (z[i, e] - mean[e]) for i in range(n)) / (n - 1)
                if d == e:
                    variance += max(0, 1 - math.sqrt(c + 1e-4)) / D / 2
                else:
                    covariance += c**2 / D
    expected = dict(invariance=apart, variance=variance, covariance=covariance)
    assert variance > 0.01 and covariance > 0.1
    for name, value in expected.items():
        assert math.isclose(told[name], value, rel_tol=1e-9), name


def rows_of(out):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "pictures_per_s"} for row in rows]


def test_the_example_runs_resumes_and_is_the_same_on_two_ranks(poses, tmp_path):
    words = [f"annotations={poses}", *SMALL.split()]
    folders = {name: tmp_path / name for name in ("whole", "killed", "ranks")}
    done = run_script("baselines/vicreg.py", *words, f"out={folders['whole']}")
    assert done.returncode == 0, done.stderr
    log = rows_of(folders["whole"])
    assert len(log) == 12 and log[-1]["loss"] < log[0]["loss"]
    for name in ("neighbours.png", "curves.png", "config.yaml", "done"):
        assert (folders["whole"] / name).exists()
    assert load_encoder(folders["whole"] / "encoder.safetensors").n_special == 2

    more = [*words, f"out={folders['killed']}"]
    assert kill_after("baselines/vicreg.py", *more, lines=5, log=folders["killed"] / "log.jsonl")
    assert run_script("baselines/vicreg.py", *more).returncode == 0
    assert rows_of(folders["killed"]) == log
    states = [load_checkpoint(folders[name] / "last.pt")["model"] for name in ("whole", "killed")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

    done = run_script("baselines/vicreg.py", *words, f"out={folders['ranks']}", ranks=2)
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(rows_of(folders["ranks"])[:3], log):
        for name in ("loss", "invariance", "variance", "covariance", "grad_norm"):
            assert math.isclose(ours[name], theirs[name], rel_tol=2e-3), (name, ours, theirs)


def test_it_starts_from_an_encoder(poses, tmp_path, monkeypatch):
    words = [f"annotations={poses}", *SMALL.split()]
    run_script("baselines/vicreg.py", *words, "epochs=1", f"out={tmp_path}/first")
    encoder = tmp_path / "first/encoder.safetensors"
    more = [*words, "epochs=1", "blr=0", f"init={encoder}", f"out={tmp_path}/second"]
    done = run_script("baselines/vicreg.py", *more)
    assert "start from" in done.stderr
    ours, theirs = (load_encoder(tmp_path / name / encoder.name) for name in ("first", "second"))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))


def test_pictures_without_a_pose_are_refused(poses, tmp_path, monkeypatch):
    document = json.loads(Path(poses).read_text())
    for row in document["annotations"][:3]:
        row["pose_id"] = -1
    mixed = Path(poses).parent / "mixed.json"
    mixed.write_text(json.dumps(document))
    given = [f"annotations={mixed}", *SMALL.split(), f"out={tmp_path}/no"]
    monkeypatch.setattr(sys, "argv", ["vicreg.py", *given])
    with pytest.raises(UserError, match="pictures without a pose group"):
        vicreg.main()


def test_bad_boxes_are_left_out_as_the_refusal_advises(poses):
    document = json.loads(Path(poses).read_text())
    for row in document["annotations"][:2]:
        row["bbox"][2] = 0
    bad = Path(poses).parent / "boxes.json"
    bad.write_text(json.dumps(document))
    words = [f"annotations={bad}", *SMALL.split()]
    with pytest.raises(UserError, match="mend it or allow max_bad_boxes=2"):
        parts.read_pictures(read_config(vicreg.KEYS, "", words))
    words.append("max_bad_boxes=2")
    (people,), about = parts.read_pictures(read_config(vicreg.KEYS, "", words))
    assert len(people.files) == 30 and "2 bad boxes" in about


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("annotations=", "annotations= names no file"),
        ("images=a,b", "images= has 2 folders for 1 annotation files"),
        ("max_bad=1 check_pictures=false", "max_bad= leaves out what check_pictures=false"),
        ("patch=7", "must be multiples of patch=7"),
    ],
)
def test_the_example_refuses_in_one_line(poses, tmp_path, monkeypatch, keys, words):
    given = [f"annotations={poses}", *SMALL.split(), f"out={tmp_path}/no", *keys.split()]
    monkeypatch.setattr(sys, "argv", ["vicreg.py", *given])
    with pytest.raises(UserError, match=words):
        vicreg.main()
    assert not (tmp_path / "no").exists()


def test_commands_of_the_readme_are_valid(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = re.findall(r"^[# ]*python (\S+\.py) (.*)$", README, re.M)
    assert {"baselines/synclr.py", "baselines/vicreg.py"} <= {script for script, _ in found}
    for script, words in found:
        if (ROOT / script).exists():
            stage = importlib.import_module(script.removesuffix(".py").replace("/", "."))
            read_config(stage.KEYS, stage.__doc__, shlex.split(words, comments=True))


def test_the_guide_is_true():
    """The names it points to are there, the example is short, and the page is one page."""
    for file, name in re.findall(r"`(?:\w+/)*(\w+\.py)`, `(\w+)`", README):
        (path,) = [p for p in (ROOT / file, ROOT / "baselines" / file) if p.exists()]
        assert re.search(rf"^(def|class) {name}\b", path.read_text(), re.M), f"{file}: {name}"
    assert len((ROOT / "baselines/vicreg.py").read_text().splitlines()) <= 130
    assert len(README.splitlines()) <= 110
    linked = re.findall(r"\]\(([^)#:]+)\)", README)
    assert {"parts.py", "synclr.py", "vicreg.py"} <= set(linked)
