"""pretrain.py from its command line: ranks, kill and resume, bad input, settings, overfitting."""

import json
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
from conftest import ROOT, kill_after, run_script
from safetensors.torch import load_file
from test_data import write_set

import pretrain
from common import load_checkpoint, save_weights
from plumbing import errors, process
from plumbing.errors import UserError

SMALL = "size=tiny height=64 width=32 patch=8 pictures_per_pose=3 batch=12 warmup_epochs=0.5"
SMALL = [*SMALL.split(), "device=cpu", "workers=0"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A generated set (8 poses × 3) and a real one (12 pictures without pose group)."""
    root = tmp_path_factory.mktemp("sets")
    return [
        write_set(root / "a", n_poses=8),
        write_set(root / "b", n_poses=12, per_pose=1, pose_ids=False, seed=1),
    ]


def arguments(sets, out, *more):
    return [f"annotations={','.join(map(str, sets))}", f"out={out}", *SMALL, *more]


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def without_speed(out):
    return [{k: v for k, v in row.items() if k != "pictures_per_s"} for row in rows(out)]


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


@pytest.mark.parametrize(
    ("ranks", "batch"), [(2, 12), (3, 18), (4, 12)]
)  # 12 does not split over 3 ranks
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


@pytest.mark.parametrize(("lines", "workers"), [(1, 0), (3, 2), (7, 0)])
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


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["bacth=12"], "nearest valid key: batch"),
        (["batch=twelve"], "key batch"),
        (["batch=13"], "multiples of 3"),
        (["batch=1200"], "larger than"),
        (["mask=blocks"], "one of part, random, none"),
        (["pictures_per_pose=4", "batch=8"], "the most have 3; lower pictures_per_pose"),
        (["pictures_per_pose=1", "views_are_positives=false"], "one positive pair"),
        (["gamma_align=0.1", "views=1"], "two views"),
        (["decoder=false"], "L_rec"),
        (["patch=7"], "multiples of patch"),
        (["check_pictures=false", "max_bad=2"], "does not see"),
        (["init=nowhere.pt"], "no checkpoint at nowhere.pt"),
        (["annotations=nowhere.json"], "nowhere.json"),
        (["annotations="], "names no file"),
        (["shares=1"], "one number"),
        (["shares=0,1"], "no batch can hold a positive pair"),
        (["nonsense"], "key=value"),
        (["batch=.inf"], "key batch"),
        (["blr=.nan"], "key blr"),
        (["box_padding=inf"], "key box_padding"),
        (["mask_ratio=0.01"], "masks none"),
        (["decoder=false", "mask=none", "views=1", "gamma_align=0", "gamma_mp=0"], "no loss"),
        (["out="], "out= is empty"),
        (["--cfg=nowhere.yaml"], "cannot read nowhere.yaml"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(sets, tmp_path, monkeypatch, more, words):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments(sets, tmp_path / "run"), *more])
    with pytest.raises(UserError) as error:
        pretrain.main()
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_what_cannot_fit_is_refused_before_training(sets, tmp_path, monkeypatch):
    """By what is counted before it is claimed, and where memory ends all the same."""
    monkeypatch.setattr(process, "memory_of", lambda device: 30e6)  # the model alone takes 50 MB
    argv = ["pretrain.py", *arguments(sets, tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(UserError, match=r"needs more than 0.1 GB, the cpu has 0.0 GB; lower"):
        pretrain.main()
    monkeypatch.undo()
    huge = ["projector=mlp", "projector_width=30000000"]
    monkeypatch.setattr(sys, "argv", [*argv, *huge])
    with pytest.raises(UserError, match=r"needs more than \d{6,}\.\d GB"):
        pretrain.main()
    assert not (tmp_path / "run").exists()
    out = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    for error in (MemoryError(), out, RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        code, line = errors.verdict(error)
        assert code == 2 and line.startswith("error: out of memory") and "lower the batch" in line


def test_an_error_is_one_line_with_exit_code_2(sets, tmp_path):
    done = run_script("pretrain.py", *arguments(sets, tmp_path / "run", "bacth=12"))
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr == 'error: unknown key "bacth" in the command line; nearest valid key: batch\n'
    )
    done = run_script("pretrain.py", "--help")
    assert done.returncode == 0 and all(f"  {name}: " in done.stdout for name in pretrain.KEYS)


def test_yaml_with_a_key_twice_or_without_value(sets, tmp_path):
    for text, words in (
        ("batch: 12\nbatch: 24\n", 'key "batch" twice'),
        ("out:\n", "key out"),
        ("out: !!set {a, b}\n", "key out in"),
        ("out: [a, b]\n", "key out in"),
    ):
        (tmp_path / "x.yaml").write_text(text)
        done = run_script(
            "pretrain.py", "epochs=1", "--cfg", tmp_path / "x.yaml", f"annotations={sets[0]}"
        )
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_run_folder_that_cannot_be_made(sets, tmp_path):
    (tmp_path / "file").write_text("mine")
    done = run_script("pretrain.py", *arguments(sets, tmp_path / "file/run"))
    assert done.returncode == 2 and "file" in done.stderr and len(done.stderr.splitlines()) == 1


def test_an_error_stands_on_a_line_of_its_own(sets, tmp_path):
    """Though the progress bar is there already."""
    done = run_script(
        "pretrain.py", *arguments(sets, tmp_path / "run", "epochs=20", "blr=1e20", "save_every=1")
    )
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(
        "error: non-finite loss"
    )


def test_only_real_pictures_cannot_feed_the_pose_loss(sets, tmp_path):
    done = run_script("pretrain.py", *arguments(sets[1:], tmp_path / "run"))
    assert done.returncode == 2 and "has a pose_id" in done.stderr


def test_a_folder_of_the_user_is_not_touched(sets, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    done = run_script("pretrain.py", *arguments(sets, tmp_path))
    assert done.returncode == 2 and "not a run" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_start_says_how_many_joints_are_known_and_part_masks_refuse_too_few(sets, tmp_path):
    document = json.loads(sets[0].read_text())
    document["categories"][0]["keypoints"] = [f"point_{j}" for j in range(17)]
    other = sets[0].with_name("other_names.json")
    other.write_text(json.dumps(document))
    done = run_script("pretrain.py", *arguments([other], tmp_path / "part"))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "part").exists()
    refused = "0 of COCO's 17 joints are recognised, which link 0 of 6 body parts; mask=part"
    assert refused in done.stderr
    keys = ["mask=random", "epochs=1"]
    done = run_script("pretrain.py", *arguments([sets[0], other], tmp_path / "random", *keys))
    assert done.returncode == 0
    assert "17 of 17 joints recognised, 0 of 17 joints recognised" in done.stderr


def test_truncated_picture_is_named_before_anything_is_written(tmp_path):
    path = write_set(tmp_path / "set")
    whole = (tmp_path / "set/images/003.jpg").read_bytes()
    (tmp_path / "set/images/003.jpg").write_bytes(whole[:300])
    done = run_script("pretrain.py", *arguments([path], tmp_path / "run"))
    assert (
        done.returncode == 2
        and "003.jpg" in done.stderr
        and len(done.stderr.strip().splitlines()) == 1
    )
    assert not (tmp_path / "run").exists()
    done = run_script("pretrain.py", *arguments([path], tmp_path / "run"), ranks=2)
    assert done.returncode and f"] error: {tmp_path}/set/images/003.jpg is damaged" in done.stderr
    done = run_script("pretrain.py", *arguments([path], tmp_path / "run", "check_pictures=false"))
    assert done.returncode == 2
    assert "003.jpg as a picture" in done.stderr.splitlines()[-1]  # as it is loaded


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
    assert done.returncode == 2 and "last.pt as a checkpoint" in done.stderr
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


def test_a_pickle_from_a_stranger_never_runs(sets, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    done = run_script(
        "pretrain.py", *arguments(sets, tmp_path / "run", f"init={tmp_path / 'evil.pth'}")
    )
    assert done.returncode == 2 and "evil.pth" in done.stderr
    assert not (tmp_path / "ran").exists() and not (tmp_path / "run").exists()


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


@pytest.mark.parametrize("name", ["mae", "hap", "stablerep"])
def test_comparison_methods_are_settings(sets, tmp_path, name):
    more = ["epochs=1", "warmup_epochs=0", "precision=fp32", *SMALL, f"out={tmp_path / name}"]
    done = run_script(
        "pretrain.py",
        "--cfg",
        ROOT / f"configs/pretrain_{name}.yaml",
        f"annotations={sets[0]}",
        *more,
    )
    assert done.returncode == 0, done.stderr
    last = rows(tmp_path / name)[-1]
    assert (last["rec"] > 0, last["align"] > 0, last["mp"] > 0) == {
        "mae": (True, False, False),
        "hap": (True, True, False),
        "stablerep": (False, False, True),
    }[name]


def test_health_speaks_of_the_pairs_that_the_loss_sees(sets, tmp_path):
    """Views that are no positives: a picture never meets its own other view, and counts are those
    of one view.
    """
    command = arguments(sets, tmp_path / "run", "epochs=1", "views_are_positives=false")
    done = run_script("pretrain.py", *command)
    assert done.returncode == 0, done.stderr
    log = rows(tmp_path / "run")
    assert sum(row["without_pose"] for row in log) == 12


def test_defaults_run_together_and_without_l_mp_poses_are_not_grouped(sets, tmp_path):
    batch, group = pretrain.KEYS["batch"].default, pretrain.KEYS["pictures_per_pose"].default
    assert all(batch % (group * ranks) == 0 for ranks in (1, 2, 4, 8))
    command = arguments(
        sets, tmp_path / "run", "epochs=1", "gamma_mp=0", "batch=8", "pictures_per_pose=5"
    )
    done = run_script(
        "pretrain.py", *command
    )  # 8 pictures do not split into groups of 5, and no pose has 5
    assert done.returncode == 0, done.stderr
    assert "an epoch shows 32 pictures" in done.stderr and len(rows(tmp_path / "run")) == 4


def test_the_sheet_of_neighbours_ranks_by_the_token_of_l_mp(sets, tmp_path, monkeypatch):
    named = []
    monkeypatch.setattr(
        pretrain.sheets, "neighbour_sheet", lambda *args: named.append((args[1].shape, args[4]))
    )
    for more in ([], ["mp_token=cls"], ["gamma_mp=0", "pose_token=false"]):
        out = tmp_path / str(len(named))
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments(sets, out, "epochs=1"), *more])
        pretrain.main()
    assert [name for _, name in named] == ["[POSE]", "[CLS]", "[CLS]"]
    assert all(shape == (36, 192) for shape, _ in named)  # pictures of both files


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
    assert "weights used; not used: none; not in the file: none" in done.stdout


# --------------------------------------------------------------- pictures without joints, two forks

MAE = ["mask=random", "gamma_align=0", "gamma_mp=0", "views=1", "epochs=1"]
STABLEREP = ["mask=none", "decoder=false", "views=1", "gamma_align=0", "mp_token=cls", "epochs=1"]


def test_pictures_without_joints_train_wherever_the_mask_needs_none(sets, tmp_path):
    """A plain folder, and boxes alone, whose annotations may carry pose ids."""
    boxes = write_set(tmp_path / "boxes", n_poses=8)
    document = json.loads(boxes.read_text())
    for entry in document["annotations"]:
        del entry["keypoints"], entry["num_keypoints"]
    document["categories"] = [{"id": 1, "name": "person"}]
    boxes.write_text(json.dumps(document))
    folder = sets[0].parent / "images"
    for name, files, keys in (
        ("mae", [folder], MAE),
        ("stablerep", [boxes], STABLEREP),
        ("both", [boxes, folder], MAE),
    ):
        done = run_script("pretrain.py", *arguments(files, tmp_path / name, *keys))
        assert done.returncode == 0, done.stderr
        assert (tmp_path / name / "neighbours.png").exists()
    for files in ([folder], [boxes]):
        done = run_script("pretrain.py", *arguments(files, tmp_path / "part", "gamma_mp=0"))
        assert done.returncode == 2 and "mask=part needs 3" in done.stderr
        assert not (tmp_path / "part").exists()
    (folder / "odd.png").write_bytes(b"no picture")
    done = run_script("pretrain.py", *arguments([folder], tmp_path / "odd", *MAE))
    (folder / "odd.png").unlink()
    assert done.returncode == 2 and "odd.png is damaged" in done.stderr


def test_fork_1_people_as_positives_of_the_class_token(tmp_path):
    """README's first fork: no line of code changes. Odd numbers of pictures are said, not fatal."""
    path = write_set(tmp_path / "set", n_poses=1, per_pose=16)
    document = json.loads(path.read_text())
    person = [0] * 7 + [1] * 4 + [2] * 3 + [3] + [4]
    for entry, number in zip(document["annotations"], person):
        entry["pose_id"] = number
    path.write_text(json.dumps(document))
    keys = ["mp_token=cls", "pictures_per_pose=2", "batch=4", "epochs=1"]
    done = run_script("pretrain.py", *arguments([path], tmp_path / "run", *keys))
    assert done.returncode == 0, done.stderr
    # 7, 4 and 3 pictures fill three, two and one pair; two people have one picture alone.
    assert "2 left out because their pose has fewer than 2 pictures" in done.stderr
    assert "an epoch shows 12 pictures" in done.stderr
    assert all(row["without_positive"] == 0 for row in rows(tmp_path / "run"))


def test_fork_2_another_loss_on_the_pose_token(sets, tmp_path):
    """README's second fork, done in a copy: one function more and one line of GenPoCCL.forward."""
    shutil.copytree(ROOT, tmp_path / "fork", ignore=shutil.ignore_patterns(".*", "runs", "tests"))
    losses, model = tmp_path / "fork/losses.py", tmp_path / "fork/model.py"
    line = "losses.multi_positive_loss(z, id, self.tau_mp)"
    assert model.read_text().count(line) == 1
    model.write_text(model.read_text().replace(line, "losses.spread(z)"))
    new = "\n\ndef spread(z):\n    return F.normalize(z.float(), dim=-1).mean(0).square().sum()\n"
    losses.write_text(losses.read_text() + new)
    command = [sys.executable, "pretrain.py", *arguments(sets, tmp_path / "run", "epochs=1")]
    done = subprocess.run(command, cwd=tmp_path / "fork", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(0 < row["mp"] <= 1.001 for row in rows(tmp_path / "run"))
