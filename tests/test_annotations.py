"""The reader of COCO keypoint files: joints however they are spelt, scores, spoilt documents."""

import json
import math

import numpy as np
import pytest
from coco_sets import changed_set, write_set

import data
from data import PretrainPictures
from formats.coco import Limits, read_people
from formats.joints import COCO_JOINTS, flip_ids, joint_name, to_coco17
from plumbing.errors import UserError

# -------------------------------------------------------------------------------------------- files


def test_reader_gives_arrays_and_drops_links_outside_the_joints(tmp_path):
    people, notes = read_people(write_set(tmp_path))
    assert people.keypoints.shape == (12, 17, 3) and people.boxes.shape == (12, 4)
    assert people.pose_id.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert people.skeleton == [(0, 1)] and not any(notes.values())
    assert people.flip == [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]


def test_flip_of_other_joint_sets():
    joints = ["right_ankle", "left_ankle", "neck", "left_ear"]
    assert flip_ids(joints) == [1, 0, 2, 3]
    assert flip_ids(["l_eye", "nose", "r_eye", "lower_left", "lower_right"]) == [2, 1, 0, 4, 3]
    assert flip_ids(["rknee", "lknee", "hip_l", "hip_r", "r_ear"]) == [1, 0, 3, 2, 4]


SPELLINGS = {  # side and joint → name; the last one spells the two sides differently
    "Lshoulder": lambda side, joint: side[0].upper() + joint,
    "LShoulder": lambda side, joint: side[0].upper() + joint.capitalize(),
    "leftShoulder": lambda side, joint: side + joint.capitalize(),
    "LeftShoulder": lambda side, joint: side.capitalize() + joint.capitalize(),
    "Left Shoulder": lambda side, joint: f"{side} {joint}".title(),
    "LEFT-SHOULDER": lambda side, joint: f"{side}-{joint}".upper(),
    "l_shoulder": lambda side, joint: f"{side[0]}_{joint}",
    "R_knee": lambda side, joint: f"{side[0].upper()}_{joint}",
    "rknee": lambda side, joint: side[0] + joint,
    "shoulder_left": lambda side, joint: f"{joint}_{side}",
    "shoulder.R": lambda side, joint: f"{joint}.{side[0].upper()}",
    "mixed": lambda side, joint: f"{joint}_l" if side == "left" else f"Right{joint}",
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_joints_spelt_otherwise_are_the_same_joints(tmp_path, name):
    def change(document):
        sides = (joint.split("_") for joint in COCO_JOINTS[1:])
        names = ["Nose", *(SPELLINGS[name](*pair) for pair in sides)]
        document["categories"][0]["keypoints"] = names

    people, _ = read_people(changed_set(tmp_path, change))
    whole, _ = read_people(write_set(tmp_path / "whole"))
    assert people.joints == COCO_JOINTS and people.flip == whole.flip
    assert np.array_equal(to_coco17(people.keypoints, people.joints), whole.keypoints)


def test_names_that_are_not_of_a_limb_stay(tmp_path):
    names = "Head top,neck,pelvis,upper_neck,head_bottom,leftover,lateral_left_hip,L_heel,nez,左肩"
    expected = (
        "head_top,neck,pelvis,upper_neck,head_bottom,leftover,lateral_left_hip,l_heel,nez,左肩"
    )
    assert [joint_name(name) for name in names.split(",")] == expected.split(",")
    joints = ["left_" + joint for joint in "shoulder elbow wrist hip knee ankle".split()]
    joints += [joint.replace("left", "right") for joint in joints]
    assert data.recognised([*joints, "head_top", "neck"]) == (12, 5)  # AIC, CrowdPose, MPII, LSP
    assert data.recognised(COCO_JOINTS) == (17, 6)
    assert data.recognised(["nose", "lower_back", "right_hip"]) == (2, 0)

    def change(document):
        document["categories"][0]["keypoints"][1:3] = ["left_eye", "LEye"]

    with pytest.raises(UserError, match="names the joint left_eye twice"):
        read_people(changed_set(tmp_path, change))


def test_scores_become_visibilities_on_reading(tmp_path):
    scores = [0.93, 0.05, 1, 0, 0.2, 0.19, *np.linspace(0.01, 0.99, 11)]
    keypoints = np.stack([np.arange(17), np.arange(17), scores], 1)

    def change(document):
        for entry in document["annotations"]:
            entry["keypoints"] = keypoints.ravel().tolist()

    path = changed_set(tmp_path, change)
    for more, least in (({}, 0.2), ({"min_score": 0.6}, 0.6)):
        people, notes = read_people(path, limits=Limits(**more))
        seen = [2 if score >= least else 0 for score in scores]
        assert people.keypoints[3, :, 2].tolist() == seen and notes["scores"]
    assert np.array_equal(people.keypoints[0, :, :2], keypoints[:, :2])
    with pytest.raises(UserError, match="all of its 12 annotations"):
        read_people(path, limits=Limits(min_joints=13))  # of scores of at least .2 there are 12


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keypoints": [1, 2, 3] * 17}, "100 has v = 3 at joint 1; needed: 0, 1, 2, or scores"),
        ({"keypoints": [1, 2, 2] * 16 + [1, 2, -1]}, "annotation 100 has v = -1 at joint 17"),
        ({"keypoints": [1, 2, 0.5] * 17}, "101 has v = 2 at joint 1; .* 0 to 1, for the file"),
        ({"keypoints": [1, 2, 1.02] * 17}, "annotation 100 has v = 1.02 at joint 1"),
        ({"image_id": 77}, "image id 77"),
        ({"bbox": [400, 0, 10, 10]}, "outside"),
        ({"bbox": [-50, -50, 20, 20]}, "outside"),
        ({"bbox": [0, 0, 0, 5]}, "w, h > 0"),
        ({"bbox": [0, 0, 5]}, "x, y, w, h"),
        ({"bbox": "1155"}, "x, y, w, h"),
        ({"bbox": ["1", "1", "5", "5"]}, "as COCO people: TypeError .* in annotation 100$"),
        ({"bbox": {}}, "its box is {}, not x, y, w, h in annotation 100$"),
        ({"area": "much"}, "TypeError .* in annotation 100$"),
        ({"keypoints": [1, 2, 2] * 16}, "need 51"),
        ({"keypoints": ["a"] * 51}, "as COCO people: "),
        ({"id": "x"}, "as COCO people: "),
        ({"id": 2**70}, "as COCO people: "),
        ({"id": 101}, "101 stands twice"),
        ({"bbox": [400, 0, 10, 10]}, r"its \[32, 64\] picture"),
        ({"bbox": [math.nan, 0, 5, 5]}, "annotation 100 .* finite"),
        ({"bbox": [0, 0, 1e300, 5]}, "annotation 100 .* finite"),
        ({"bbox": [0, 0, 1e-50, 5]}, "w, h > 0"),
        ({"bbox": [20, 0, 1e-9, 5]}, "no width"),
        ({"area": math.nan}, "area nan"),
        ({"keypoints": [math.nan, 1, 2] * 17}, "annotation 100 has a keypoint"),
        ({"keypoints": [1, math.inf, 0] * 17}, "annotation 100 has a keypoint"),
    ],
)
def test_bad_annotations_get_one_clear_line(tmp_path, changes, words):
    path = write_set(tmp_path, **changes)
    with pytest.raises(UserError, match=words) as error:
        read_people(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


SPOILT = {
    "image id twice": (lambda d: d["images"][2].update(id=1), "ids must differ in image 1$"),
    "no image_id": (
        lambda d: d["annotations"][2].pop("image_id"),
        '"annotations" lacks "image_id"',
    ),
    "no file_name": (lambda d: d["images"][2].pop("file_name"), '"images" lacks "file_name"'),
    "entry is null": (lambda d: d["annotations"].append(None), '"annotations" lacks "image_id"'),
    "joint is no text": (
        lambda d: d["categories"][0].update(keypoints=[3] * 17),
        "as COCO people: ",
    ),
    "link of three": (
        lambda d: d["categories"][0].update(skeleton=[[1, 2, 3]]),
        "as COCO people: ",
    ),
    "category without id": (lambda d: d["categories"][0].pop("id"), "as COCO people: "),
    "all crowd": (
        lambda d: [a.update(iscrowd=1) for a in d["annotations"]],
        "all of its 12 annotations",
    ),
    "no joints": (
        lambda d: [a.update(keypoints=[0] * 51) for a in d["annotations"]],
        "all of its 12 annotations",
    ),
    "all of another category": (
        lambda d: [a.update(category_id=7) for a in d["annotations"]],
        "no person",
    ),
    "size": (
        lambda d: d["images"][2].update(width=33),
        r"002\.jpg is \(32, 64\) but .* \(33, 64\)",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_documents_get_one_clear_line(tmp_path, name):
    change, words = SPOILT[name]
    path = changed_set(tmp_path, change)
    with pytest.raises(UserError, match=words) as error:
        read_people(path, limits=Limits(min_joints=1))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_only_rows_of_the_category_with_joints_are_read_and_no_skeleton_is_none(tmp_path):
    def change(document):
        document["annotations"][1] |= {
            "category_id": 7,
            "keypoints": [1, 2, 2],
        }  # a dog, joints of its own
        del document["annotations"][2]["category_id"]
        document["categories"][0]["skeleton"] = None

    people, _ = read_people(changed_set(tmp_path, change))
    assert people.annotation_id.tolist() == [100, *range(102, 112)] and people.skeleton == []
    whole, _ = read_people(write_set(tmp_path / "whole"))
    assert np.array_equal(people.keypoints, np.delete(whole.keypoints, 1, 0))


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"images": [], "annotations": [], "categories": []}', "{", "\xff", "3"]
)
def test_files_that_are_no_keypoint_files(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError):
        read_people(path)
    with pytest.raises(UserError):
        read_people(tmp_path / "absent.json")


# -------------------------------------------------------------------------------------------- masks


def test_real_sets(data_root):
    lsp, _ = read_people(data_root / "lspet/train.json")
    market, _ = read_people(data_root / "market1501/person_keypoints_train.json")
    dataset = PretrainPictures([lsp, market], (256, 128), 0)
    assert len(dataset) == 3000 + 7010 and (dataset.pose_id == -1).all()
    sample = dataset[(0, 4000)]
    assert sample["image"].shape == (3, 256, 128) and (sample["keypoints"][:, 2] > 0).sum() > 5
    coco, _ = read_people(data_root / "coco/person_keypoints.json", limits=Limits(min_joints=1))
    assert 0 < len(coco.files) < 309


def test_other_fields_may_be_objects_and_crowds_are_counted(tmp_path):
    """An object within an annotation is none itself, whatever its fields are called."""
    path = write_set(tmp_path)
    whole, notes = read_people(path)
    assert notes["crowds"] == 0
    document = json.loads(path.read_text())
    document["info"] = dict(image_id=3, file_name="x")
    document["images"][1]["image_id"] = 7
    document["annotations"][2]["source"] = dict(file_name="y.jpg", image_id=9)
    document["annotations"][3]["iscrowd"] = 1
    path.write_text(json.dumps(document))
    people, notes = read_people(path)
    assert notes["crowds"] == 1 and len(people.files) == len(whole.files) - 1
