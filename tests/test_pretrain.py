"""pretrain.py from its command line: ranks, kill and resume, full disks, overfitting."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from coco_sets import write_set
from conftest import ROOT, kill_after, run_script
from pretrain_runs import arguments, rows, without_speed
from safetensors.torch import load_file

from common import load_checkpoint, save_weights
from plumbing.errors import UserError


@pytest.fixture(scope="module")
def plain(sets, tmp_path_factory):
    """An uninterrupted run of 9 steps in one process."""
    out = tmp_path_factory.mktemp("plain") / "run"
    done = run_script("pretrain.py", *arguments(sets, out, "epochs=3", "save_every=2"))
    assert done.returncode == 0, done.stderr
    return out


def test_run_folder_log_and_pictures(plain):
    for name in (
        "config.yaml",
        "last.pt",
        "encoder.safetensors",
        "reconstructions.png",
        "neighbours.png",
        "curves.png",
    ):
        assert (plain / name).stat().st_size > 0, name
    log = rows(plain)
    assert [row["step"] for row in log] == list(range(1, 10))
    first = log[0]
    total = first["rec"] + 0.05 * first["align"] + 0.05 * first["mp"]
    assert abs(first["loss"] - total) < 1e-4
    assert 0 < first["lr"] < log[1]["lr"] and log[-1]["lr"] > 0  # never 0, not one step too many
    assert (
        sum(row["without_pose"] for row in log) == 12 * 2 * 3
    )  # 12 real pictures, two views, three epochs
    assert all(row["without_positive"] == 0 for row in log)
    assert (
        log[-1]["pictures_per_s"] < 20 * log[-2]["pictures_per_s"]
    )  # the step of a checkpoint is no faster
    weights = load_file(plain / "encoder.safetensors")
    assert {"cls_token", "pose_token", "pos_embed", "norm.weight"} <= set(weights)


@pytest.mark.parametrize(("ranks", "batch"), [(2, 12), (3, 18)])  # 12 does not split over 3 ranks
def test_ranks_change_nothing(sets, plain, tmp_path, ranks, batch):
    """The logged gradient norm is compared too: AdamW itself would hide a wrong scale."""
    keys, alone, together = (
        ["epochs=3", "save_every=2", f"batch={batch}"],
        plain,
        tmp_path / "together",
    )
    if batch != 12:
        alone = tmp_path / "alone"
        done = run_script("pretrain.py", *arguments(sets, alone, *keys))
        assert done.returncode == 0, done.stderr
    done = run_script("pretrain.py", *arguments(sets, together, *keys), ranks=ranks)
    assert done.returncode == 0, done.stderr
    for one, many in zip(rows(alone), rows(together), strict=True):
        for name in ("loss", "rec", "align", "mp", "grad_norm", "positive_cosine", "without_pose"):
            assert many[name] == pytest.approx(one[name], rel=2e-3, abs=1e-4), (name, one["step"])
    one, many = (load_checkpoint(out / "last.pt")["model"] for out in (alone, together))
    assert all(torch.allclose(one[name], many[name], atol=2e-3) for name in one)


@pytest.mark.parametrize(("lines", "workers"), [(1, 0), (3, 2)])
def test_kill_and_resume_is_bitwise(sets, plain, tmp_path, lines, workers):
    out = tmp_path / "run"
    command = arguments(sets, out, "epochs=3", "save_every=2", f"workers={workers}")
    assert kill_after("pretrain.py", *command, lines=lines, log=out / "log.jsonl")
    assert not (out / "done").exists()
    done = run_script("pretrain.py", *command)
    assert done.returncode == 0, done.stderr
    for name in (
        "last.pt",
        "encoder.safetensors",
        "reconstructions.png",
        "neighbours.png",
        "attention.png",
    ):
        assert (out / name).read_bytes() == (plain / name).read_bytes(), name
    assert without_speed(out) == without_speed(plain)


@pytest.mark.parametrize("write", ["save_weights", "save_checkpoint"])
def test_a_kill_at_the_last_save_leaves_no_stale_weights(sets, plain, tmp_path, write):
    """The fifth and last save dies before its encoder or its checkpoint: the next start must write
    both.
    """
    command = arguments(sets, tmp_path / "run", "epochs=3", "save_every=2")
    program = (
        "import os, sys, common, pretrain\n"
        f"inner, calls, sys.argv = common.{write}, [], ['pretrain.py', *sys.argv[1:]]\n"
        "def dies(*args, **more):\n"
        "    calls.append(0)\n"
        "    return os._exit(9) if len(calls) == 5 else inner(*args, **more)\n"
        f"common.{write} = dies\n"
        "common.run_stage(pretrain.main)\n"
    )
    died = subprocess.run(
        [sys.executable, "-c", program, *command], cwd=ROOT, capture_output=True, text=True
    )
    assert died.returncode == 9, died.stderr
    done = run_script("pretrain.py", *command)
    assert done.returncode == 0, done.stderr
    for name in ("last.pt", "encoder.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (plain / name).read_bytes(), name


def test_a_run_killed_before_its_config_was_written_starts_anew(sets, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.config.yaml.99.part").write_text("out: ru")
    done = run_script("pretrain.py", *arguments(sets, tmp_path / "run", "epochs=1"))
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "run").glob(".*"))


def test_finished_run_is_left_alone_and_another_config_refused(sets, plain):
    before = (plain / "last.pt").stat().st_mtime_ns
    done = run_script("pretrain.py", *arguments(sets, plain, "epochs=3", "save_every=2"))
    assert done.returncode == 0 and "finished already" in done.stdout
    other = run_script(
        "pretrain.py", *arguments(sets, plain, "epochs=3", "save_every=2", "tau_mp=0.2")
    )
    assert other.returncode == 2 and "tau_mp 0.1 -> 0.2" in other.stderr
    assert (plain / "last.pt").stat().st_mtime_ns == before


def test_damaged_or_foreign_checkpoints(sets, plain, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(plain, out)
    (out / "done").unlink()
    (out / "config.yaml").write_text(
        (out / "config.yaml").read_text().replace(str(plain), str(out))
    )
    whole = (out / "last.pt").read_bytes()
    (out / "last.pt").write_bytes(whole[: len(whole) // 2])
    command = arguments(sets, out, "epochs=3", "save_every=2")
    done = run_script("pretrain.py", *command)
    remedy = "last.pt as this run's checkpoint; delete it to begin the run anew: "
    assert done.returncode == 2 and remedy in done.stderr
    state = load_checkpoint(plain / "last.pt")
    state["model"]["encoder.cls_token"] = torch.zeros(1, 1, 7)
    torch.save(state, out / "last.pt")
    done = run_script("pretrain.py", *command)
    assert done.returncode == 2 and "encoder.cls_token is (1, 1, 7)" in done.stderr


def stop_between_writes(process, out):
    """Stop the run (SIGSTOP) at a moment when no file in `out` is half-written."""
    while True:
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)  # it has stopped
        if not list(out.glob(".*")):
            return
        process.send_signal(signal.SIGCONT)
        time.sleep(0.01)


def test_full_disk_keeps_the_last_checkpoint(sets, tmp_path):
    """A small disk of its own: it fills up between two checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=120m", "tmpfs", str(disk)], capture_output=True
    )
    if mount.returncode:
        pytest.skip("this user cannot mount a small disk")
    try:
        command = arguments(sets, disk / "run", "epochs=40", "save_every=2")
        process = run_script("pretrain.py", *command, start_only=True)
        while not (disk / "run/last.pt").exists() and process.poll() is None:
            time.sleep(0.05)
        stop_between_writes(process, disk / "run")
        (disk / "filler").write_bytes(
            bytes(shutil.disk_usage(disk).free - (20 << 20))
        )  # too little
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=120) == 2
        message = process.stderr.read().strip().splitlines()[-1]
        process.stderr.close()
        assert "disk full" in message, message
        assert load_checkpoint(disk / "run/last.pt")["step"] >= 2
        assert not list((disk / "run").glob(".*"))  # nothing half-written is left
    finally:
        process.kill()
        process.wait()
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_under_the_weights_leaves_nothing_half_written(tmp_path, monkeypatch):
    """safetensors' bytes are written by us: a write that stops half-way (/dev/full says ENOSPC) is
    one clear line.
    """

    def half(part, data):
        part.touch()
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(data)

    save_weights(tmp_path / "encoder.safetensors", torch.nn.Linear(2, 2), size="tiny")
    before = (tmp_path / "encoder.safetensors").read_bytes()
    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(UserError, match="disk full while writing .*encoder.safetensors"):
        save_weights(tmp_path / "encoder.safetensors", torch.nn.Linear(2, 2), size="tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.safetensors"]
    assert (tmp_path / "encoder.safetensors").read_bytes() == before


def test_weights_can_be_read_by_whom_the_folder_lets(tmp_path):
    save_weights(tmp_path / "encoder.safetensors", torch.nn.Linear(2, 2), size="tiny")
    (tmp_path / "plain").touch()
    assert (tmp_path / "encoder.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_non_finite_loss_stops_and_keeps_the_last_checkpoint(sets, tmp_path):
    """A learning rate without bounds breaks the weights; the run names step, rank and pictures and
    stops.
    """
    out = tmp_path / "run"
    done = run_script(
        "pretrain.py", *arguments(sets, out, "epochs=20", "blr=1e20", "save_every=1"), ranks=2
    )
    assert done.returncode != 0 and "non-finite loss" in done.stderr
    line = next(row for row in done.stderr.splitlines() if "non-finite loss" in row)
    assert "step" in line and "rank" in line and ".jpg" in line
    kept = load_checkpoint(out / "last.pt")
    log = rows(out)
    assert kept["step"] == log[-1]["step"] and all(
        torch.isfinite(torch.tensor(row["loss"])) for row in log
    )


def test_overfits_one_batch(tmp_path):
    path = write_set(tmp_path / "set", n_poses=4)
    more = ["epochs=80", "blr=2e-2", "warmup_epochs=10", "gamma_mp=1", "save_every=100"]
    done = run_script("pretrain.py", *arguments([path], tmp_path / "run", *more))
    assert done.returncode == 0, done.stderr
    first, last = rows(tmp_path / "run")[0], rows(tmp_path / "run")[-1]
    assert (
        last["rec"] < 0.6 * first["rec"] and last["mp"] < math.log(5) + 0.05
    )  # 3 pictures × 2 views: 5 positives
    assert last["positive_cosine"] > last["negative_cosine"] + 0.3


def test_starts_from_its_own_encoder_and_says_which_keys(sets, plain, tmp_path):
    init = f"init={plain}/encoder.safetensors"
    done = run_script("pretrain.py", *arguments(sets, tmp_path / "run", "epochs=1", init))
    assert done.returncode == 0, done.stderr
    assert "weights used; not used: none; not in the file: none" in done.stderr
