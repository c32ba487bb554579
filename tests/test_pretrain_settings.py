"""Other methods are settings of pretrain.py; pictures without joints; two forks a student would
make.
"""

import json
import re
import shutil
import subprocess
import sys

import pytest
from coco_sets import write_set
from conftest import ROOT, run_script
from pretrain_runs import SMALL, arguments, rows

import pretrain


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
    """README's second fork, its diff applied to a copy: the same loss on one rank and on two."""
    fork = tmp_path / "fork"
    shutil.copytree(ROOT, fork, ignore=shutil.ignore_patterns(".*", "runs", "tests"))
    readme = (ROOT / "README.md").read_text().partition("**Another loss on [POSE]**")[2]
    removed, *added = re.findall("^[-+](?![-+])(.*)$", readme.partition("```\n\n")[0], re.M)
    model = fork / "model.py"
    assert model.read_text().count(removed) == 1
    model.write_text(model.read_text().replace(removed, added[0]))
    with open(fork / "losses.py", "a") as file:
        file.write("\n".join(["", *added[1:], ""]))
    for ranks in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        words = arguments(sets, tmp_path / f"run_{ranks}", "epochs=1", "precision=fp32")
        command = [sys.executable, *launch, "pretrain.py", *words]
        done = subprocess.run(command, cwd=fork, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, two = rows(tmp_path / "run_1"), rows(tmp_path / "run_2")
    assert len(one) == len(two) > 1 and all(0 < row["mp"] <= 1.001 for row in one)
    for name in ("mp", "grad_norm"):
        values = [[row[name] for row in log] for log in (one, two)]
        assert values[0] == pytest.approx(values[1], rel=1e-4), name
