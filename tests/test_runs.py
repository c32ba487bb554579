"""Runs that people can live with: a finished run prolonged in a new folder, numbered encoders, and
run.json.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, kill_after

import common
import generate
import pretrain
from common import load_checkpoint
from plumbing import runs
from plumbing.errors import UserError

# Two epochs of 4 steps each. The warm-up is as long as the short run: its learning rates do not
# depend on where the schedule ends.
SMALL = "size=tiny height=64 width=32 patch=16 pictures_per_pose=2 batch=4 warmup_epochs=2"
SMALL = [*SMALL.split(), "device=cpu", "workers=0", "precision=fp32", "epochs=2"]


@pytest.fixture(scope="module")
def annotations(tmp_path_factory):
    """Eight poses of the puppet, two pictures of each."""
    out = tmp_path_factory.mktemp("set") / "a"
    words = "generate.py poses=8 pictures_per_pose=2 height=64 width=32 workers=0".split()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "argv", [*words, f"out={out}"])
        generate.main()
    return out / "annotations.json"


def pretrain_here(monkeypatch, annotations, out, *more):
    """pretrain.py in this process, as from the command line."""
    words = ["pretrain.py", f"annotations={annotations}", f"out={out}", *SMALL, *map(str, more)]
    monkeypatch.setattr(sys, "argv", words)
    pretrain.main()
    return out


@pytest.fixture(scope="module")
def short(annotations, tmp_path_factory):
    """A finished run of two epochs that kept its encoder after each."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        out = tmp_path_factory.mktemp("short") / "run"
        return pretrain_here(monkeypatch, annotations, out, "keep_every=1")


@pytest.fixture(scope="module")
def straight(annotations, tmp_path_factory):
    """The same run with four epochs from its start."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        out = tmp_path_factory.mktemp("straight") / "run"
        return pretrain_here(monkeypatch, annotations, out, "epochs=4", "keep_every=1")


def log_of(out):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "pictures_per_s"} for row in rows]


def record(out):
    return json.loads((out / "run.json").read_text())


# ----------------------------------------------------------------------------------- a longer run


def test_a_prolonged_run_is_the_long_one_bit_for_bit(
    annotations, short, straight, tmp_path, monkeypatch, capfd
):
    """Weights, decoder, optimiser, samples, masks and pictures: all that the schedules share."""
    before = {path: path.read_bytes() for path in short.iterdir()}
    out = tmp_path / "long"
    more = "epochs=4", f"resume_from={short}", "keep_every=1"
    pretrain_here(monkeypatch, annotations, out, *more)
    assert same_weights(out / "encoder.safetensors", straight / "encoder.safetensors")
    for file in ("last.pt", "reconstructions.png", "neighbours.png"):
        assert (out / file).read_bytes() == (straight / file).read_bytes(), file
    assert log_of(out) == log_of(straight)[8:] and log_of(out)[0]["step"] == 9
    said = capfd.readouterr().err
    assert f"prolongs {short}/last.pt: the schedule of 4 epochs is entered at this step" in said
    assert "continues after step 8 of 16" in said
    assert {path: path.read_bytes() for path in short.iterdir()} == before
    pretrain_here(monkeypatch, annotations, out, *more)  # finished: nothing is done again
    assert len(record(out)) == 1


def test_a_warm_up_that_never_ends_is_said(annotations, tmp_path, monkeypatch, capfd):
    pretrain_here(monkeypatch, annotations, tmp_path / "a", "epochs=1", "warmup_epochs=5")
    assert "the rate only rises: warmup_epochs=5, epochs=1" in capfd.readouterr().err
    pretrain_here(monkeypatch, annotations, tmp_path / "b", "epochs=1", "warmup_epochs=0.5")
    assert "rises" not in capfd.readouterr().err


def test_the_new_schedule_is_entered_at_the_step_reached(annotations, short, tmp_path, monkeypatch):
    more = "epochs=3", "warmup_epochs=0.5", "blr=0.001", f"resume_from={short}/last.pt"
    out = pretrain_here(monkeypatch, annotations, tmp_path / "long", *more)
    rates = [row["lr"] for row in log_of(out)]
    peak = 0.001 * 4 / 256
    progress = (np.arange(8, 12) - 2) / 10  # 12 steps, 2 of them warm-up
    assert np.allclose(rates, peak * (1 + np.cos(np.pi * progress)) / 2, rtol=1e-5)


def test_a_killed_longer_run_goes_on_by_the_same_command(
    annotations, short, straight, tmp_path, monkeypatch
):
    """Also where the finished run is no longer there."""
    old, out = shutil.copytree(short, tmp_path / "old"), tmp_path / "long"
    more = "epochs=4", f"resume_from={old}", "save_every=2"
    words = [f"annotations={annotations}", f"out={out}", *SMALL, *more]
    assert kill_after("pretrain.py", *words, lines=4, log=out / "log.jsonl")
    shutil.rmtree(old)
    pretrain_here(monkeypatch, annotations, out, *more)
    assert (out / "last.pt").read_bytes() == (straight / "last.pt").read_bytes()
    assert log_of(out) == log_of(straight)[8:]
    assert ["ended" in entry for entry in record(out)] == [False, True]


BAD = {
    "no folder": (["epochs=4", "resume_from={tmp}/none"], "is no folder of a finished run"),
    "not finished": (["epochs=4", "resume_from={tmp}/begun"], "start an unfinished one again"),
    "batch": (["epochs=4", "batch=8"], r"\(batch 4 -> 8\): only epochs, warmup_epochs, blr may"),
    "model": (["epochs=4", "size=small"], r"another config \(size 'tiny' -> 'small'\)"),
    "data": (["epochs=4", "annotations={tmp}/b/annotations.json"], "annotations "),
    "seed": (["epochs=4", "seed=1"], r"\(seed 0 -> 1\)"),
    "as long": ([], "epochs=2 prolongs nothing: .* has 2 already"),
    "its own folder": (["epochs=4", "out={old}"], "another config .*choose another out="),
    "steps": (["epochs=4", "resume_from={tmp}/steps"], "8 steps in 1 epochs.* 4 steps an epoch"),
    "no checkpoint": (["epochs=4", "resume_from={tmp}/empty"], "no checkpoint at .*last.pt"),
    "damaged": (["epochs=4", "resume_from={tmp}/damaged"], "cannot read .*damaged/last.pt"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_agree_is_one_line_and_nothing_is_written(
    annotations, short, tmp_path, monkeypatch, name
):
    for copy in ("begun", "steps", "empty", "damaged"):
        shutil.copytree(short, tmp_path / copy, ignore=shutil.ignore_patterns("*.png"))
    (tmp_path / "begun/done").unlink()
    (tmp_path / "empty/last.pt").unlink()
    (tmp_path / "damaged/last.pt").write_bytes(b"PK")
    config = tmp_path / "steps/config.yaml"
    config.write_text(config.read_text().replace("epochs: 2\n", "epochs: 1\n"))
    shutil.copytree(annotations.parent, tmp_path / "b")
    before = sorted(map(str, tmp_path.rglob("*")))
    more, words = BAD[name]
    more = [word.format(tmp=tmp_path, old=short) for word in more]
    with pytest.raises(UserError, match=words) as error:
        out = tmp_path / "long"
        pretrain_here(monkeypatch, annotations, out, f"resume_from={short}", *more)
    assert "\n" not in str(error.value)
    assert sorted(map(str, tmp_path.rglob("*"))) == before


# ---------------------------------------------------------------------------------- numbered files


def same_weights(a, b):
    """The tensors, bit for bit: what the files say of their training differs."""
    a, b = load_checkpoint(a), load_checkpoint(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_numbered_encoders_are_those_of_their_epochs(short, straight):
    names = [f"encoder_{epoch:04}.safetensors" for epoch in (1, 2, 3, 4)]
    assert sorted(path.name for path in straight.glob("encoder_*")) == names
    contents = {(straight / name).read_bytes() for name in names}
    assert len(contents) == 4
    assert (straight / names[3]).read_bytes() == (straight / "encoder.safetensors").read_bytes()
    # The epochs of the warm-up are those of the short run, whose end is epoch 2.
    for name in names[:2]:
        assert same_weights(straight / name, short / name)
    assert same_weights(straight / names[1], short / "encoder.safetensors")


def test_copies_change_no_run_and_0_keeps_none(annotations, short, tmp_path, monkeypatch):
    out = pretrain_here(monkeypatch, annotations, tmp_path / "run")
    assert not list(out.glob("encoder_*"))
    assert (out / "last.pt").read_bytes() == (short / "last.pt").read_bytes()
    assert log_of(out) == log_of(short)


# -------------------------------------------------------------------------------------- run.json


def test_every_third_step_is_logged_and_the_last_one(annotations, short, tmp_path, monkeypatch):
    """With the figures of those steps, and the speed of the steps since the line before."""
    ticks = iter(np.arange(0, 1000, 0.5))
    monkeypatch.setattr(common.time, "perf_counter", lambda: float(next(ticks)))
    out = pretrain_here(monkeypatch, annotations, tmp_path / "run", "log_every=3")
    assert log_of(out) == [row for row in log_of(short) if row["step"] in (1, 4, 7, 8)]
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    speeds = [row["pictures_per_s"] for row in rows]
    assert speeds == [pytest.approx(speeds[1])] * 4


def test_a_dataset_whose_list_cannot_be_compared_is_refused(tmp_path):
    """A run could go on with other data unnoticed."""

    class Fork(list):
        split = {"names": "a b"}

    with pytest.raises(TypeError, match="people or split of a dataset"):
        runs.same_data(tmp_path, Fork(range(4)), 2, 0)
    assert not list(tmp_path.iterdir())


def test_run_json_says_what_ran_where_and_when(short):
    (entry,) = record(short)
    assert entry["command"].startswith("pretrain.py annotations=")
    assert entry["command"].endswith("epochs=2 keep_every=1")
    assert entry["torch"] == torch.__version__ and entry["numpy"] == np.__version__
    assert entry["python"] == ".".join(map(str, sys.version_info[:3]))
    assert entry["ranks"] == 1 and entry["threads"] == torch.get_num_threads()
    assert entry["device"] and entry["system"]
    assert entry["how"] == "finished" and entry["seconds"] > 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", entry["started"])
    assert entry["started"] <= entry["ended"]


def test_a_stopped_run_says_so_and_a_resumed_one_appends(annotations, tmp_path, monkeypatch):
    out = tmp_path / "run"
    words = [f"annotations={annotations}", f"out={out}", *SMALL]
    # Signalled after its third step, from within.
    program = (
        "import os, signal, sys, common, pretrain\n"
        "record = common.StepLog.record\n"
        "def third(self, step, *more):\n"
        "    if step == 2:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    record(self, step, *more)\n"
        "common.StepLog.record = third\n"
        "common.run_stage(pretrain.main)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    pretrain_here(monkeypatch, annotations, out)
    first, second = record(out)
    assert (first["how"], second["how"]) == ("stopped", "finished")
    assert first["command"].endswith(" ".join(words)) and first["ended"] <= second["started"]


STOPPED = """
import sys, common, pretrain
record = common.StepLog.record
def third(self, step, *more):
    record(self, step, *more)
    if step == 5:
        self.flush()
        sys.exit(7)
common.StepLog.record = third
pretrain.main()
"""


def test_a_run_goes_on_from_a_moved_folder_and_not_on_other_data(
    annotations, tmp_path, monkeypatch
):
    whole = pretrain_here(monkeypatch, annotations, tmp_path / "whole", "save_every=2")
    words = [f"annotations={annotations}", "out=first", *SMALL, "save_every=2"]
    command = [sys.executable, "-c", STOPPED, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    (tmp_path / "first").rename(tmp_path / "moved")

    fewer = json.loads(annotations.read_text())
    fewer["annotations"] = [row for row in fewer["annotations"] if row["pose_id"]]
    text = annotations.read_text()
    annotations.write_text(json.dumps(fewer))
    with pytest.raises(
        UserError, match="began on other data .16 samples, 4 steps an epoch; now 14 and 3"
    ):
        pretrain_here(monkeypatch, annotations, tmp_path / "moved", "save_every=2")
    annotations.write_text(text)

    monkeypatch.chdir(tmp_path)
    pretrain_here(monkeypatch, annotations, "./moved/", "save_every=2")
    name = "encoder.safetensors"
    assert (tmp_path / "moved" / name).read_bytes() == (whole / name).read_bytes()
    assert record(tmp_path / "moved")[-1]["how"] == "finished"


def git(folder, *words):
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *who, *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_commit_is_named_and_marked_where_files_differ(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    code = tmp_path / "code"
    (code / "plumbing").mkdir(parents=True)
    monkeypatch.setattr(runs, "__file__", str(code / "plumbing/runs.py"))
    (code / "plumbing/runs.py").write_text("1\n")
    assert runs.commit() is None  # no repository
    git(code, "init", "--quiet")
    git(code, "add", ".")
    git(code, "commit", "--quiet", "--message=first")
    git(code, "tag", "v1")
    head = git(code, "rev-parse", "HEAD")
    assert runs.commit() == head
    (code / "runs.txt").write_text("a run of the user\n")  # untracked: no change of the code
    assert runs.commit() == head
    (code / "plumbing/runs.py").write_text("2\n")
    assert runs.commit() == f"{head}-dirty"
    first = runs.code()["changes"]
    assert runs.code()["changes"] == first
    (code / "plumbing/runs.py").write_text("3\n")
    assert runs.code()["changes"] != first
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runs.commit() is None  # no git


@pytest.mark.parametrize("kind", ["not a list", "no starts", "not JSON", "a folder"])
def test_a_record_that_cannot_be_kept_costs_a_line(tmp_path, capfd, kind):
    file = tmp_path / "run.json"
    if kind == "a folder":
        (file / "inside").mkdir(parents=True)
    else:
        text = {"not a list": "{}", "no starts": "[1]", "not JSON": "["}[kind]
        file.write_text(text)
    runs.record_start(tmp_path, common.Ranks(0, 1, torch.device("cpu")))
    runs.finish_run(tmp_path)
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith(f"{file} stays as it is: ")
    assert (tmp_path / "done").exists() and (kind == "a folder" or file.read_text() == text)


def test_a_run_that_goes_on_with_other_code_says_so(tmp_path, monkeypatch, capfd):
    """Another script, another commit, or other changes of tracked files."""
    alone, line = common.Ranks(0, 1, torch.device("cpu")), "goes on with other code than at its"
    starts = (("pretrain.py", "a", ""), ("pretrain.py", "a", ""), ("fork.py", "a", ""))
    starts += (("fork.py", "b-dirty", "one"), ("fork.py", "b-dirty", "one"))
    starts += (("fork.py", "b-dirty", "two"),)
    said = []
    for script, commit, change in starts:
        monkeypatch.setattr(sys, "argv", [f"/somewhere/{script}"])
        monkeypatch.setattr(runs, "commit", lambda commit=commit: commit)
        monkeypatch.setattr(runs, "git", lambda *words, change=change: change)
        runs.record_start(tmp_path, alone)
        said.append(f"{tmp_path} {line} last start\n" == capfd.readouterr().err)
    assert said == [False, False, True, True, False, True]


def test_every_stage_closes_its_record():
    """No stage leaves its mark by another way."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py")]:
        text = path.read_text(encoding="utf-8")
        assert ('"done").touch()' in text) == (path == ROOT / "plumbing/runs.py"), path


def test_prolonging_keeps_the_optimisers_moments(annotations, short, tmp_path, monkeypatch):
    """At a learning rate of zero the weights stay, and the moments go on from the old ones."""
    more = "epochs=3", "blr=0", f"resume_from={short}"
    out = pretrain_here(monkeypatch, annotations, Path(tmp_path / "long"), *more)
    old, new = (load_checkpoint(path / "last.pt") for path in (short, out))
    assert all(torch.equal(old["model"][name], new["model"][name]) for name in old["model"])
    steps = {int(state["step"]) for state in new["optimizer"]["state"].values()}
    assert steps == {12}
