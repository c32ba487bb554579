"""What pretrain.py refuses in one line before it writes anything."""

import json
import sys

import pytest
import torch
from coco_sets import write_set
from conftest import run_script
from PIL import Image
from pretrain_runs import arguments

import pretrain
from plumbing import errors, process
from plumbing.errors import UserError


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
        (["batch=3"], "holds one pose of pictures_per_pose=3: L_mp has no negatives"),
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
        (["mask_ratio=0.95", "patch=16"], "masks all 8 patches; lower it"),
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
    (tmp_path / "thesis.txt").rename(tmp_path / ".thesis.part")  # as other programs name theirs
    done = run_script("pretrain.py", *arguments(sets, tmp_path))
    assert done.returncode == 2 and (tmp_path / ".thesis.part").read_text() == "mine"


def test_a_run_folder_inside_the_pictures_is_refused(tmp_path):
    Image.new("RGB", (32, 64)).save(tmp_path / "a.png")
    words = arguments([tmp_path], tmp_path / "run", "mask=random", "gamma_mp=0")
    done = run_script("pretrain.py", *words)
    assert done.returncode == 2 and "whose pictures are read" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


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
    unknown = "(not COCO's: point_0, point_1, point_2 (and 14 more))"
    known = f"17 of 17 joints recognised, 0 of 17 joints recognised {unknown}"
    assert known in done.stderr


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
