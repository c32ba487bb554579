"""What finetune_pose.py refuses in one line: annotations, boxes, pictures, keys and weights."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import run_script
from PIL import Image
from pose_runs import MACHINE, QUICK, SMALL, mpii_list, mpii_mat, people_file, run, sets

import finetune_pose
import model
from formats import keypoints as readers
from formats.coco import Limits
from formats.joints import COCO_JOINTS
from plumbing.config import read_config
from plumbing.errors import UserError
from tasks import pose_metrics as metrics

pytestmark = pytest.mark.usefixtures("small_pose")


def spoil(folder, change):
    path = people_file(folder, 3, 4, "bad.json")
    document = json.loads(path.read_text())
    change(document, folder)
    path.write_text(json.dumps(document))
    return path


BAD_FILES = {
    "not JSON": (lambda d, f: (f / "images/4_1.png").write_bytes(b""), "empty"),
    "truncated": (
        lambda d, f: (f / "images/4_2.png").write_bytes((f / "images/4_2.png").read_bytes()[:200]),
        "4_2.png",
    ),
    "missing": (lambda d, f: (f / "images/4_3.png").unlink(), "4_3.png is missing"),
    "no categories": (lambda d, f: d.pop("categories"), "'categories' is missing"),
    "unknown image": (lambda d, f: d["annotations"][0].update(image_id=99), "image id 99"),
    "joint count": (
        lambda d, f: d["annotations"][0].update(keypoints=[1, 2, 2]),
        "3 keypoint values",
    ),
    "no joints": (lambda d, f: d["categories"][0].pop("keypoints"), "its category names none"),
    "a name": (lambda d, f: d["annotations"][0].update(pose_id="p0"), "'p0' is no whole number in"),
    "no number": (lambda d, f: d["annotations"][0].update(image_id=None), "None is no whole"),
    "box outside": (lambda d, f: d["annotations"][0].update(bbox=[900, 900, 5, 5]), "outside"),
    "not finite": (lambda d, f: d["annotations"][0]["bbox"].__setitem__(0, float("nan")), "finite"),
    "negative area": (lambda d, f: d["annotations"][0].update(area=-1), "area -1"),
    "other joints": (
        lambda d, f: d["categories"][0]["keypoints"].reverse(),
        "joint sets differ: .* has 17 joints, number 1 .*_ankle, .* 17 joints, number 1 nose",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_annotation_files(name, dots, tmp_path):
    change, message = BAD_FILES[name]
    path = spoil(tmp_path, change)
    with pytest.raises(UserError, match=message):
        run(*sets(path, dots[1]), *QUICK, "batch=2", f"out={tmp_path}/run")
    assert not (tmp_path / "run").exists()


BAD_ROWS = {
    "scale 0": ({"scale": 0}, "entry 2"), "scale NaN": ({"scale": math.nan}, "entry 2"),
    "scale below 0": ({"scale": -1}, "entry 2"), "far away": ({"center": [9999, 9999]}, "entry 2"),
    "joint NaN": ({"joints": [[math.nan, 1]] * 16}, "entry 2"),
    "image 3": ({"image": 3}, "as MPII's list.* in entry 2"),
    "a centre of digits": ({"center": "46"}, "as MPII's list.* in entry 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_of_an_mpii_list(name, tmp_path):
    changes, message = BAD_ROWS[name]
    with pytest.raises(UserError, match=message):
        readers.read_pose_file(mpii_list(tmp_path, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"score": "a"},
        {"score": None},
        {"score": math.nan},
        {"bbox": [5, 5, 1e-200, 1e-200]},
        {"bbox": [0, 0, 5]},
    ]
    + [
        {"bbox": [-1e300, 0, 2e300, 5]},
        {"bbox": [math.nan, 0, 5, 5]},
        {"bbox": [5, 5, 5, math.nan]},
    ],
)
def test_bad_boxes(changes, dots, tmp_path):
    people, _ = readers.read_pose_file(dots[0])
    (tmp_path / "boxes.json").write_text(
        json.dumps([{"image_id": 1, "bbox": [5, 5, 9, 9]} | changes])
    )
    with pytest.raises(UserError, match=r"boxes\.json"):
        readers.read_boxes(tmp_path / "boxes.json", {1: ("0_1.png", (70, 90), 1)}, people, Limits())


def test_bad_pictures_may_be_left_out_and_are(dots, tmp_path):
    path = spoil(tmp_path, lambda d, f: (f / "images/4_3.png").unlink())
    run(*sets(dots[0], path), *QUICK, "max_bad=1", f"out={tmp_path}/run")
    assert json.loads((tmp_path / "run/metrics.json").read_text())["people"] == 2


def test_boxes_of_left_out_pictures_are_left_out_and_counted(dots, tmp_path, capfd):
    path = spoil(tmp_path, lambda d, f: (f / "images/4_3.png").unlink())
    box = {"bbox": [5, 5, 40, 60], "score": 0.9, "category_id": 1}
    (tmp_path / "boxes.json").write_text(json.dumps([box | {"image_id": i} for i in (1, 2, 3, 3)]))
    keys = [f"boxes={tmp_path}/boxes.json", "max_bad=1"]
    run(*sets(dots[0], path), *keys, *QUICK, f"out={tmp_path}/run")
    assert "2 boxes (on left-out pictures: 2)" in capfd.readouterr().err
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert [row["image_id"] for row in results] == [1, 2]
    # the same when predicting: 4_1.png and 4_2.png are there, a damaged one is left out
    (tmp_path / "images/4_9.png").write_bytes(b"\x89PNG")
    boxes = [box | {"file_name": f"4_{i}.png"} for i in (1, 9)]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    weights = f"weights={tmp_path}/run/model.safetensors"
    run(weights, *keys, f"predict={tmp_path}/images", *MACHINE, f"out={tmp_path}/mine")
    assert "1 boxes (on left-out pictures: 1)" in capfd.readouterr().err


def test_degenerate_boxes_are_counted_and_left_out_up_to_a_key(dots, tmp_path, capfd):
    """One such box does not refuse a file; crowds and people without joints never do."""

    def change(document, folder):
        a, b, c = document["annotations"]
        a["bbox"][3] = 0
        more = [dict(b, id=9, bbox=[1, 1, 0, 9], iscrowd=1), dict(b, id=10, bbox=[1, 1, 0, 9])]
        more[1]["keypoints"] = [0] * 51
        document["annotations"] += more

    path = spoil(tmp_path, change)
    keys = [*sets(dots[0], path), *QUICK]
    with pytest.raises(UserError, match=r"annotation 1 has box .*w, h > 0 .* max_bad_boxes=1"):
        run(*keys, f"out={tmp_path}/run")
    assert not (tmp_path / "run").exists()
    run(*keys, "max_bad_boxes=1", f"out={tmp_path}/run")
    assert "2 people to evaluate (people left out for their box: 1)" in capfd.readouterr().err
    assert json.loads((tmp_path / "run/metrics.json").read_text())["people"] == 2
    people, _, document = readers.read_truth(path, limits=Limits(max_bad_boxes=1))
    rows = zip(people.image_id.tolist(), people.keypoints.reshape(2, -1).tolist())
    found = [{"image_id": i, "category_id": 1, "keypoints": k, "score": 1.0} for i, k in rows]
    assert metrics.coco_metrics(document, found, metrics.oks_sigmas(people.joints)[0])["AR"] > 0.999

    (tmp_path / "mpii").mkdir()
    listed = mpii_list(tmp_path / "mpii", scale=0)
    for limits, advice in ((Limits(), ""), (Limits(max_bad_boxes=0), " or allow max_bad_boxes=1")):
        with pytest.raises(UserError, match=f"entry 2 .*; mend it{advice}$"):
            readers.read_pose_file(listed, limits=limits)
    people, notes = readers.read_pose_file(listed, limits=Limits(max_bad_boxes=1))
    assert len(people.files) == 1 and (notes["rows"], notes["bad_boxes"]) == (2, 1)

    boxes = [{"image_id": 1, "bbox": box} for box in ([5, 5, 9, 9], [5, 5, 0, 9], [500, 5, 9, 9])]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    people, _ = readers.read_pose_file(dots[0])
    arguments = tmp_path / "boxes.json", {1: ("0_1.png", (70, 90), 1)}, people
    with pytest.raises(UserError, match=r"boxes\.json: box .*and 1 more.*max_bad_boxes=2"):
        readers.read_boxes(*arguments, Limits(max_bad_boxes=1))
    people, _, about = readers.read_boxes(*arguments, Limits(max_bad_boxes=2))
    assert len(people.files) == 1 and about == "1 boxes (left out as no box: 2)"


BAD_KEYS = {
    "no annotations": ([], "train_annotations"),
    "unknown key": (["lerning_rate=1"], "nearest valid key"),
    "weights without job": (["weights=x.safetensors"], "eval_only"),
    "eval without weights": (["eval_only=true"], "weights"),
    "two jobs": (["eval_only=true", "predict=x"], "two jobs"),
    "no folder": (["predict=nowhere", "weights=x"], "no folder"),
    "writes where it reads": (["predict=FOLDER", "weights=x"], "lies in predict="),
    "not divisible": (["TRAIN", "height=60"], "multiples of the patch side"),
    "batch too large": (["TRAIN", "batch=13"], "batch=13"),
    "no such encoder": (["TRAIN", "encoder=nowhere.safetensors"], "nowhere.safetensors"),
    "encoder is a pickle": (["TRAIN", "encoder=PICKLE"], "plain tensors"),
    "encoder of other shape": (["TRAIN", "encoder=OTHER"], "16 wide"),
    "boxes are no list": (["TRAIN", "boxes=BOXES"], "as a list of boxes"),
    "mat is none": (["TRAIN", "mpii_mat=BOXES"], "boxes.json as a .mat file"),
    "mat of other people": (["TRAIN", "mpii_mat=MAT"], "order of MPII's own list"),
    "no POSE token": (["TRAIN", "pose_token=false", "tokens=add"], "POSE"),
}


@pytest.mark.parametrize("name", BAD_KEYS)
def test_bad_keys_and_weights(name, dots, tmp_path):
    keys, message = BAD_KEYS[name]
    torch.save(
        {"x": SMALL.get}, tmp_path / "pickle.pt"
    )  # a bound method: only an unpickler that runs code loads it
    torch.save(model.ViT(16, 2, 2, (64, 48), 8).state_dict(), tmp_path / "other.pt")
    (tmp_path / "boxes.json").write_text('{"a": 1}')
    mpii_mat(tmp_path / "seven.mat", 7)  # as many as dots[1] holds
    files = {"PICKLE": "pickle.pt", "OTHER": "other.pt", "BOXES": "boxes.json", "MAT": "seven.mat"}
    keys = [k.replace("FOLDER", str(tmp_path)) for k in keys]
    for word, name in files.items():
        keys = [k.replace(word, str(tmp_path / name)) for k in keys]
    if "TRAIN" in keys:
        keys = [*sets(*dots), *QUICK, *keys[1:]]
    with pytest.raises(UserError, match=message):
        run(*keys, f"out={tmp_path}/run")
    assert not (tmp_path / "run").exists()


def test_an_error_is_one_line_and_exit_code_2(tmp_path):
    done = run_script("finetune_pose.py", "epochs=0", f"out={tmp_path}/run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "epochs" in done.stderr
    assert not (tmp_path / "run").exists()


def test_pictures_that_boxes_alone_name_are_looked_at(dots, tmp_path):
    """COCO's detections also lie on pictures without annotated people."""
    people, _ = readers.read_pose_file(dots[0])
    own = people.files[0].decode()
    pictures = {name: (name, (70, 90), n) for n, name in enumerate((own, "gone.png"))}
    boxes = [{"file_name": name, "bbox": [5, 5, 9, 9]} for name in pictures]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    arguments = tmp_path / "boxes.json", pictures, people
    with pytest.raises(UserError, match=r"gone\.png is missing, named by .*boxes\.json"):
        readers.read_boxes(*arguments, Limits())
    found, score, about = readers.read_boxes(*arguments, Limits(max_bad=1))
    assert found.files.tolist() == [own.encode()] and len(score) == 1
    assert about == "1 boxes (on left-out pictures: 1)"
    pictures["bad.png"] = None  # the truth has used up what was allowed
    with pytest.raises(UserError, match=r"gone\.png"):
        readers.read_boxes(*arguments, Limits(max_bad=1))
    assert len(readers.read_boxes(*arguments, Limits(check_pictures=False))[1]) == 2


def test_a_number_that_two_pictures_share_names_neither(tmp_path):
    for name in ("cam1/000001.png", "cam2/1.png", "cam2/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 60)).save(tmp_path / name)
    people, pictures = readers.read_own(tmp_path, COCO_JOINTS, [], Limits())
    for number, said in ((1, "names picture 1, which is not among the pictures"), (2, None)):
        rows = [{"image_id": number, "bbox": [5, 5, 9, 9]}]
        (tmp_path / "boxes.json").write_text(json.dumps(rows))
        arguments = tmp_path / "boxes.json", pictures, people, Limits()
        if said:
            with pytest.raises(UserError, match=said):
                readers.read_boxes(*arguments)
        else:
            assert readers.read_boxes(*arguments)[0].files.tolist() == [b"cam2/2.png"]


def test_duplicates_are_removed_from_annotated_boxes_too(dots, tmp_path):
    """[HRNet]'s evaluation: OKS-NMS whatever the boxes are."""
    document = json.loads(dots[0].read_text())
    first = document["annotations"][0]
    document["annotations"].append(first | {"id": 10**6})
    path = dots[0].parent / "twice.json"
    path.write_text(json.dumps(document))
    words = [f"train_annotations={path}", f"val_annotations={path}", *QUICK, f"out={tmp_path}/x"]
    val = finetune_pose.Validation(read_config(finetune_pose.KEYS, "", words))
    found = np.concatenate(
        [val.truth.keypoints[..., :2], np.ones((len(val.truth.files), 17, 1))], 2
    )
    assert len(val.results(found)) == len(val.truth.files) - 1
    found[-1, :, :2] += 1000  # another person
    assert len(val.results(found)) == len(val.truth.files)
