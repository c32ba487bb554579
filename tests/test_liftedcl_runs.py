"""LiftedCL from its command line: what it writes, ranks, kill and resume, bad input."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from coco_sets import write_set
from conftest import kill_after, run_script
from test_liftedcl import SCRIPT, arguments, small_model

import common
from baselines import liftedcl
from plumbing.errors import UserError


def rows(out):
    lines = (out / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(r).items() if k != "pictures_per_s"} for r in lines]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set"), n_poses=8)


@pytest.fixture(scope="module")
def plain(pictures, tmp_path_factory):
    """An uninterrupted run of 6 steps in one process."""
    out = tmp_path_factory.mktemp("plain") / "run"
    done = run_script(SCRIPT, *arguments(pictures, out, "epochs=2", "save_every=2"))
    assert done.returncode == 0, done.stderr
    assert "lifter" in done.stdout and "mean skeleton" in done.stdout
    return out


def test_run_folder_and_log(plain):
    for name in "config.yaml last.pt encoder.safetensors liftedcl.png curves.png done".split():
        assert (plain / name).exists(), name
    log = rows(plain)
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6, 6]
    for row in log[:-1]:
        parts = 0.5 * row["inv"] + 0.5 * row["var"] + 0.5 * row["adv"]
        assert row["loss"] == pytest.approx(parts, rel=1e-4)
    told = "mpjpe mpjpe_dealt mpjpe_any mpjpe_mean bones bones_any final"
    assert set(told.split()) <= set(log[-1])


def test_queues_and_teacher_move(plain):
    """48 keys have gone through each queue of 20; the teacher lags behind by its momentum."""
    state = common.load_checkpoint(plain / "last.pt")["model"]
    assert state["queue_inv.place"] == state["queue_var.place"] == 48 % 20
    for name in ("queue_inv.keys", "queue_var.keys"):
        assert torch.allclose(state[name].norm(dim=1), torch.ones(20), atol=1e-5)
    own, lag = state["student.head_inv.0.weight"], state["teacher.head_inv.0.weight"]
    start = small_model(common.WEIGHTS)["student"].state_dict()["head_inv.0.weight"]
    assert 0 < (lag - start).norm() < 0.01 * (own - start).norm()


def test_two_ranks_are_one_process(pictures, plain, tmp_path):
    out = tmp_path / "two"
    done = run_script(SCRIPT, *arguments(pictures, out, "epochs=2", "save_every=2"), ranks=2)
    assert done.returncode == 0, done.stderr
    for one, two in zip(rows(plain), rows(out), strict=True):
        for name in one:
            assert two[name] == pytest.approx(one[name], rel=2e-3, abs=1e-4), (name, one["step"])
    one, two = (common.load_checkpoint(run / "last.pt")["model"] for run in (plain, out))
    for name in one:  # SGD: a wrong scale of a gradient would show
        assert torch.allclose(one[name].float(), two[name].float(), atol=2e-4), name


def test_kill_and_resume_is_bitwise(pictures, plain, tmp_path):
    out = tmp_path / "run"
    command = arguments(pictures, out, "epochs=2", "save_every=2", "workers=1")
    assert kill_after(SCRIPT, *command, lines=3, log=out / "log.jsonl")
    assert not (out / "done").exists()
    done = run_script(SCRIPT, *command)
    assert done.returncode == 0, done.stderr
    for name in ("last.pt", "encoder.safetensors", "liftedcl.png"):
        assert (out / name).read_bytes() == (plain / name).read_bytes(), name
    assert rows(out) == rows(plain)


def test_the_checkpoint_holds_all_that_a_step_reads(plain):
    state = common.load_checkpoint(plain / "last.pt")
    assert {"model", "optimizer", "optimizer_d", "step"} == set(state)
    begins = {name.split(".")[0] for name in state["model"]}
    assert begins == {"student", "teacher", "discriminator", "queue_inv", "queue_var"}
    rates = [state[name]["param_groups"][0]["lr"] for name in ("optimizer", "optimizer_d")]
    # Both fall alike, from .12 · 8 / 256 and from .03.
    assert 8 * rates[0] == pytest.approx(rates[1]) and rates[1] < 0.03
    assert all(
        one["momentum_buffer"].abs().sum() > 0 for one in state["optimizer_d"]["state"].values()
    )


def test_the_encoder_trains_on_in_the_pose_stage(plain, pictures, tmp_path):
    keys = f"encoder={plain}/encoder.safetensors out={tmp_path}/pose height=64 width=32 epochs=1"
    keys += f" train_annotations={pictures} val_annotations={pictures} limit=8 batch=8 workers=0"
    done = run_script("finetune_pose.py", *keys.split(), "device=cpu")
    assert done.returncode == 0, done.stderr
    assert "encoder.safetensors" in done.stdout + done.stderr
    assert len(rows(tmp_path / "pose")) >= 1


def test_it_overfits_a_few_pictures(tmp_path, monkeypatch):
    """Eight pictures again and again, whose last keys fill the queue: chance is ln 9 for both."""
    few = write_set(tmp_path, n_poses=8, per_pose=1)
    more = "epochs=110 warmup_epochs=10 optimizer=adamw blr=0.016 lr_d=0.003 ema=0.9 queue=8"
    more += " crop_min=0.8 save_every=1000"
    monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments(few, tmp_path / "run", *more.split())])
    liftedcl.main()
    log = rows(tmp_path / "run")
    last = {name: np.mean([row[name] for row in log[-21:-1]]) for name in ("inv", "var")}
    assert last["inv"] < 0.8 * math.log(9) and last["var"] < 0.6 * math.log(9)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["bacth=12"], "nearest valid key: batch"),
        (["queue=4"], "queue=4 cannot hold the 8 keys of a batch"),
        (["batch=1200", "queue=2000"], "larger than the 24 training samples"),
        (["patch=7"], "multiples of patch"),
        (["annotations="], "names no file"),
        (["annotations=nowhere.json"], "nowhere.json"),
        (["images=a,b"], "images= has 2 folders"),
        (["check_pictures=false", "max_bad=2"], "does not see"),
        (["pooled=max"], "one of cls, mean"),
        (["init=nowhere.pt"], "no checkpoint at nowhere.pt"),
        (["people=2"], "key people"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(pictures, tmp_path, monkeypatch, more, words):
    monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments(pictures, tmp_path / "run"), *more])
    with pytest.raises(UserError) as error:
        liftedcl.main()
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_another_config_is_refused(pictures, plain, monkeypatch):
    command = arguments(pictures, plain, "epochs=2", "save_every=2", "tau=0.3")
    monkeypatch.setattr(sys, "argv", [SCRIPT, *command])
    with pytest.raises(UserError, match=r"tau 0.2 -> 0.3"):
        liftedcl.main()
