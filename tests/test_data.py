"""Readers, pre-training pictures, pose batches and part-guided masks."""

import json
import math
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

import data
from common import Ranks
from data import Augmentation, PoseBatches, PretrainPictures, part_guided_mask, random_mask
from formats.coco import Limits, read_people
from formats.joints import COCO_JOINTS, flip_ids, joint_name, to_coco17
from plumbing import pictures
from plumbing.errors import UserError
from plumbing.loading import training_loader

ALONE = Ranks(0, 1, torch.device("cpu"))

# -------------------------------------------------------------------------------------------- files


def write_set(folder, n_poses=4, per_pose=3, size=(32, 64), pose_ids=True, seed=0, **changes):
    """A COCO keypoint file with pictures; `changes` replace fields of the first annotation."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for i in range(n_poses * per_pose):
        name, (w, h) = f"{i:03d}.jpg", size
        coarse = np.random.default_rng([seed, i // per_pose]).integers(
            0, 255, (4, 2, 3)
        )  # one look per pose
        noise = rng.integers(-40, 40, (h, w, 3))
        look = np.kron(coarse, np.ones((h // 4, w // 2, 1))) + noise
        Image.fromarray(look.clip(0, 255).astype(np.uint8)).save(folder / "images" / name)
        points = np.concatenate([rng.random((17, 2)) * size, np.full((17, 1), 2)], 1)
        images.append({"id": i, "file_name": name, "width": w, "height": h})
        annotations.append(
            {
                "id": 100 + i,
                "image_id": i,
                "category_id": 1,
                "bbox": [0, 0, w, h],
                "area": w * h,
                "iscrowd": 0,
            }
            | {"keypoints": points.ravel().tolist(), "num_keypoints": 17}
            | ({"pose_id": i // per_pose} if pose_ids else {})
        )
    annotations[0].update(changes)
    category = {"id": 1, "name": "person", "keypoints": COCO_JOINTS, "skeleton": [[1, 2], [16, 99]]}
    path = folder / "annotations.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": [category]})
    )
    return path


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
        ({"bbox": ["1", "1", "5", "5"]}, "as COCO people: "),
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
    "image id twice": (lambda d: d["images"][2].update(id=1), "two images have the id 1"),
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


def changed_set(folder, change):
    path = write_set(folder)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return path


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


def test_bad_pictures_are_named_counted_and_left_out_up_to_max_bad(tmp_path):
    path = write_set(tmp_path)
    (tmp_path / "images/000.jpg").unlink()
    (tmp_path / "images/004.jpg").write_bytes(b"")
    whole = (tmp_path / "images/008.jpg").read_bytes()
    (tmp_path / "images/008.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"000\.jpg is missing and 2 more"):
        read_people(path)
    with pytest.raises(UserError, match="max_bad=3"):
        read_people(path, limits=Limits(max_bad=2))
    people, notes = read_people(path, limits=Limits(max_bad=3))
    assert notes["bad"] == ["000.jpg", "004.jpg", "008.jpg"] and len(people.files) == 9
    # Poses made short by the skipped pictures are left out as whole groups, and counted.
    dataset = PretrainPictures([people], (64, 32), 0)
    batches = PoseBatches(dataset, 3, 3, [], 0, ALONE)
    assert set(dataset.pose_id[batches.epoch_slots(0)].ravel()) == {3} and batches.short == 6


@pytest.fixture
def looked_at(monkeypatch):
    """Names of the pictures that find_bad_pictures looks at, as they come."""
    names, fault = [], pictures.picture_fault

    def noted(path, size):
        names.append(path[-7:])
        return fault(path, size)

    monkeypatch.setattr(pictures, "picture_fault", noted)
    return names


def test_pictures_are_looked_at_again_only_when_their_file_changed(tmp_path, looked_at):
    path, memory = write_set(tmp_path), tmp_path / ".annotations.json.checked.json"

    def looked():
        looked_at.clear()
        people, notes = read_people(path, limits=Limits(max_bad=2))
        return sorted(looked_at), notes["bad"]

    names = [f"{i:03d}.jpg" for i in range(12)]
    whole = (tmp_path / "images/003.jpg").read_bytes()
    (tmp_path / "images/003.jpg").write_bytes(b"")
    assert looked() == (names, ["003.jpg"]) and memory.exists()
    assert looked() == (["003.jpg"], ["003.jpg"])  # bad ones every time: a mended one comes back
    (tmp_path / "images/003.jpg").write_bytes(whole)
    assert looked() == (["003.jpg"], [])
    assert read_people(path, limits=Limits(min_joints=17))[1]["bad"] == [] and looked() == (
        ["003.jpg"],
        [],
    )
    os.utime(path, ns=(1, 1))
    (tmp_path / "images/005.jpg").unlink()
    assert looked() == (names, ["005.jpg"])
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    looked_at.clear()
    _, notes = read_people(path, tmp_path / "elsewhere", limits=Limits(max_bad=1))
    assert notes["bad"] == ["005.jpg"] and len(looked_at) == 12
    (tmp_path / "elsewhere").rename(tmp_path / "images")
    for damaged in ("", "[]", '{"bytes": 1}'):
        memory.write_text(damaged)
        assert looked() == (names, ["005.jpg"]) and looked() == (["005.jpg"], ["005.jpg"])
    memory.unlink()
    memory.mkdir()  # it cannot be written: nothing is remembered
    assert looked() == looked() == (names, ["005.jpg"])


def check_on_a_rank(rank, world, folder):
    dist.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=world)
    seen, fault = [], pictures.picture_fault
    pictures.picture_fault = lambda path, size: (seen.append(path), fault(path, size))[1]
    _, notes = read_people(folder / "annotations.json", limits=Limits(max_bad=12))
    again = len(seen)
    read_people(folder / "annotations.json", limits=Limits(max_bad=12))
    found = [notes["bad"], sorted(seen[:again]), len(seen) - again]
    (folder / f"rank{rank}").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_ranks_share_the_look_at_the_pictures_and_agree(tmp_path):
    """11 pictures on 3 ranks: each is looked at once, and all know of all bad ones, in order."""
    write_set(tmp_path, n_poses=11, per_pose=1)
    for name in ("001.jpg", "006.jpg", "010.jpg"):
        (tmp_path / "images" / name).write_bytes(b"")
    mp.spawn(check_on_a_rank, (3, tmp_path), 3)
    ranks = [json.loads((tmp_path / f"rank{r}").read_text()) for r in range(3)]
    assert all(bad == ["001.jpg", "006.jpg", "010.jpg"] for bad, _, _ in ranks)
    assert [len(seen) for _, seen, _ in ranks] == [4, 4, 3]
    seen = sorted(sum((seen for _, seen, _ in ranks), []))
    assert seen == [f"{tmp_path}/images/{i:03d}.jpg" for i in range(11)]
    assert [again for _, _, again in ranks] == [1, 1, 1]


def test_pictures_by_relative_and_absolute_names(tmp_path, monkeypatch):
    write_set(tmp_path)
    monkeypatch.chdir(tmp_path)
    absolute = str(tmp_path / "images/000.jpg")
    for folder, name in (("images", "000.jpg"), ("", "images/000.jpg"), ("elsewhere", absolute)):
        assert pictures.load_picture(folder, name).size == (32, 64)


def test_picture_of_another_size_than_declared(tmp_path):
    people, _ = read_people(write_set(tmp_path))
    assert pictures.find_bad_pictures(people.folder, people.files, people.size) == []
    Image.new("RGB", (10, 10)).save(
        tmp_path / "images/000.jpg"
    )  # after the start, where the header was looked at
    with pytest.raises(UserError, match=r"000\.jpg is \(10, 10\)"):
        PretrainPictures([people], (64, 32), 0)[(0, 0)]


@pytest.mark.parametrize("form", ["png", "jpg", "progressive", "webp", "bmp"])
def test_sizes_are_compared(tmp_path, form):
    picture, path = (
        Image.effect_noise((37, 301), 60),
        tmp_path / f"x.{form.replace('progressive', 'jpg')}",
    )
    picture.convert("RGB").save(path, **({"progressive": True} if form == "progressive" else {}))
    assert pictures.picture_fault(path, (37, 301)) is None and pictures.picture_fault(path) is None
    assert pictures.picture_fault(path, (37, 300)) == "(37, 301) but its annotation says (37, 300)"


def test_files_that_are_no_pictures_or_far_too_large(tmp_path):
    people, _ = read_people(write_set(tmp_path))
    (tmp_path / "images/000.jpg").write_bytes(b"no picture" + b"\xff\xd9")  # ends as a JPEG does
    Image.new("1", (20000, 20000)).save(tmp_path / "images/004.jpg", "png")
    assert [name for name, _ in pictures.find_bad_pictures(people.folder, people.files)] == [
        "000.jpg",
        "004.jpg",
    ]
    for name in ("000.jpg", "004.jpg"):
        with pytest.raises(UserError, match=name):
            pictures.load_picture(people.folder, name)


def test_16_bit_grey_is_scaled_to_8(tmp_path):
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    Image.fromarray(grey).save(tmp_path / "x.png")
    assert np.array_equal(
        np.array(pictures.load_picture(tmp_path, "x.png")), (grey // 257)[..., None].repeat(3, 2)
    )


def test_picture_names_must_be_utf_8(tmp_path):
    write_set(tmp_path)
    (tmp_path / "images" / b"\xff.jpg".decode("utf-8", "surrogateescape")).touch()
    with pytest.raises(UserError, match="not UTF-8"):
        pictures.as_bytes(tmp_path / "images", pictures.picture_names(tmp_path / "images"))


# ----------------------------------------------------------------------------------------- pictures


def test_keypoints_follow_crop_flip_and_resize(tmp_path):
    """A bright dot is drawn at a joint: after augmentation the joint is still where the dot is."""
    path = write_set(tmp_path, n_poses=1, per_pose=1, size=(96, 160))
    people, _ = read_people(path)
    canvas = np.zeros((160, 96, 3), np.uint8)
    canvas[79:82, 39:42] = 255  # centre (40, 80)
    Image.fromarray(canvas).save(tmp_path / "images/000.jpg", quality=100)
    points = np.zeros((1, 17, 3), np.float32)
    points[0, 9] = (40, 80, 2)  # left wrist
    dataset = PretrainPictures([people._replace(keypoints=points)], (128, 64), seed=0)
    sides = set()
    for epoch in range(20):
        sample = dataset[(epoch, 0)]
        joint = int(sample["keypoints"][:, 2].argmax())
        sides.add(joint)
        light = sample["image"].float().sum(0).clamp(min=200) - 200
        rows, columns = torch.meshgrid(torch.arange(128.0), torch.arange(64.0), indexing="ij")
        centre = torch.stack([(light * columns).sum(), (light * rows).sum()]) / light.sum()
        assert (centre - sample["keypoints"][joint, :2]).abs().max() < 0.35
    assert sides == {9, 10}  # a mirrored left wrist is a right wrist


def test_sample_depends_on_seed_epoch_index_only(tmp_path):
    people, _ = read_people(write_set(tmp_path))
    one, two = (
        PretrainPictures([people], (64, 32), seed=3, options=Augmentation(strong=True))
        for _ in range(2)
    )
    for i in (5, 2):
        one[(0, i)]
    assert torch.equal(one[(1, 4)]["image"], two[(1, 4)]["image"])
    assert not torch.equal(one[(1, 4)]["image"], two[(2, 4)]["image"])


# ------------------------------------------------------------------------------------------ batches


def two_sets(tmp_path):
    generated, _ = read_people(write_set(tmp_path / "a", n_poses=10, per_pose=4))
    real, _ = read_people(write_set(tmp_path / "b", n_poses=20, per_pose=1, pose_ids=False))
    return PretrainPictures([generated, real], (64, 32), 0)


def test_slots_hold_whole_poses_and_each_picture_once(tmp_path):
    dataset = two_sets(tmp_path)
    slots = PoseBatches(dataset, 8, 4, [], 0, ALONE).epoch_slots(0)
    assert slots.shape == (15, 4) and sorted(slots.ravel()) == list(range(60))
    ids = dataset.pose_id[slots]
    assert all(len(set(row)) == 1 for row in ids)
    assert not np.array_equal(slots, PoseBatches(dataset, 8, 4, [], 0, ALONE).epoch_slots(1))
    assert np.array_equal(slots, PoseBatches(dataset, 8, 4, [], 0, ALONE).epoch_slots(0))


def test_pictures_of_a_pose_are_sampled_without_replacement(tmp_path):
    dataset = two_sets(tmp_path)
    seen = set()
    for epoch in range(30):
        for row in PoseBatches(dataset, 4, 2, [], 0, ALONE).epoch_slots(epoch):
            if dataset.pose_id[row[0]] == 0:
                assert row[0] != row[1]
                seen |= set(row.tolist())
    assert seen == {0, 1, 2, 3}


def test_shares_are_kept_in_an_epoch_and_evenly_spread(tmp_path):
    dataset = two_sets(tmp_path)
    slots = PoseBatches(dataset, 4, 1, [1, 3], 0, ALONE).epoch_slots(
        0
    )  # P = 1: 60 slots, a quarter from the first file
    first = slots[:, 0] < 40
    assert first.sum() == 15 and 6 <= first[:30].sum() <= 9
    with pytest.raises(UserError, match="one number"):
        PoseBatches(dataset, 4, 1, [1], 0, ALONE)


def test_a_share_of_a_file_that_fills_no_slot_is_refused(tmp_path):
    generated, _ = read_people(write_set(tmp_path / "a", n_poses=4, per_pose=2))
    lonely, _ = read_people(write_set(tmp_path / "b", n_poses=1, per_pose=1, pose_ids=False))
    dataset = PretrainPictures([generated, lonely], (64, 32), 0)
    assert len(PoseBatches(dataset, 2, 2, [], 0, ALONE).epoch_slots(0)) == 4
    assert len(PoseBatches(dataset, 2, 2, [1, 0], 0, ALONE).epoch_slots(0)) == 4
    with pytest.raises(
        UserError, match=r"2 slots of an epoch from .*images, whose 1 pictures fill 0"
    ):
        PoseBatches(dataset, 2, 2, [1, 1], 0, ALONE)
    short, _ = read_people(write_set(tmp_path / "c", n_poses=3, per_pose=1))
    with pytest.raises(
        UserError, match="no pose in .* has pictures_per_pose=2 pictures, the most have 1"
    ):
        PoseBatches(PretrainPictures([generated, short], (64, 32), 0), 2, 2, [], 0, ALONE)


def test_large_groups_fill_several_slots_and_short_ones_are_left_out(tmp_path):
    people, _ = read_people(write_set(tmp_path, n_poses=1, per_pose=30))
    people = people._replace(pose_id=np.repeat([0, 1, 2, 3], [13, 9, 7, 1]))
    dataset = PretrainPictures([people], (64, 32), 0)
    batches = PoseBatches(dataset, 8, 4, [], 0, ALONE)
    seen = set()
    for epoch in range(20):
        slots = batches.epoch_slots(epoch)
        ids = dataset.pose_id[slots]
        assert (ids == ids[:, :1]).all() and len(np.unique(slots)) == slots.size
        assert np.array_equal(np.bincount(ids[:, 0]), [3, 2, 1])  # ⌊13/4⌋, ⌊9/4⌋, ⌊7/4⌋
        seen |= set(slots.ravel().tolist())
    assert seen == set(range(29)) and batches.short == 1


def test_a_file_that_goes_round_again_never_puts_a_picture_twice_into_a_batch(tmp_path):
    """The second file has 12 slots and is asked for 80; a batch of 20 takes 10 or 11 of them."""
    generated, _ = read_people(write_set(tmp_path / "a", n_poses=74, per_pose=2))
    small, _ = read_people(write_set(tmp_path / "b", n_poses=12, per_pose=3))
    real, _ = read_people(write_set(tmp_path / "c", n_poses=74, per_pose=2, pose_ids=False))
    dataset = PretrainPictures([generated, small, real], (64, 32), 0)
    batches = PoseBatches(dataset, 40, 2, [1, 2, 1], 0, ALONE)
    assert batches.counts.tolist() == [40, 80, 40]
    for epoch in range(5):
        for batch in batches.epoch_batches(epoch):
            assert len(np.unique(batch)) == batch.size
    with pytest.raises(UserError, match="would stand twice in a batch"):
        PoseBatches(dataset, 40, 2, [1, 4, 1], 0, ALONE)


def test_what_the_pictures_of_a_pose_share(tmp_path):
    """Pictures are a ramp from left to right: its direction tells the flip, its first column the
    crop.
    """
    generated, _ = read_people(write_set(tmp_path / "a", n_poses=6, per_pose=4, size=(64, 128)))
    real, _ = read_people(
        write_set(tmp_path / "b", n_poses=24, per_pose=1, pose_ids=False, size=(64, 128))
    )
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 4, dtype=np.uint8), (128, 1)))
    for path in (*(tmp_path / "a/images").iterdir(), *(tmp_path / "b/images").iterdir()):
        ramp.convert("RGB").save(path, quality=100)

    def drawn(shared, epoch):
        """(mirrored, left edge) of the 24 pictures of poses and of the 24 others."""
        dataset = PretrainPictures([generated, real], (64, 32), 0, Augmentation(shared=shared))
        rows = torch.stack([dataset[(epoch, i)]["image"].float().mean((0, 1)) for i in range(48)])
        mirrored = rows[:, 0] > rows[:, -1]
        return mirrored, torch.where(mirrored, rows[:, -1], rows[:, 0]).round()

    def groups_agree(values):
        return bool((values[:24].view(6, 4) == values[:24].view(6, 4)[:, :1]).all())

    for shared, flips, crops in (
        ("nothing", False, False),
        ("flip", True, False),
        ("crop", True, True),
    ):
        epochs = [drawn(shared, epoch) for epoch in range(4)]
        for mirrored, left in epochs:
            assert (groups_agree(mirrored), groups_agree(left)) == (flips, crops)
            assert 0 < mirrored[24:].float().mean() < 1 and len(left[24:].unique()) > 4
        for values in zip(*epochs):  # every epoch draws anew
            assert not torch.equal(values[0][:24], values[1][:24])


def test_joints_that_the_crop_cut_off_are_missing(tmp_path):
    people, _ = read_people(write_set(tmp_path, n_poses=1, per_pose=1, size=(200, 200)))
    points = np.zeros((1, 17, 3), np.float32)
    points[0] = [(x, 100, 2) for x in np.linspace(2, 198, 17)]
    people = people._replace(keypoints=points, boxes=np.array([[80, 40, 40, 120]], np.float32))
    dataset = PretrainPictures([people], (128, 64), seed=0)
    for epoch in range(10):
        joints = dataset[(epoch, 0)]["keypoints"].numpy()
        seen = joints[:, 2] > 0
        assert 2 <= seen.sum() <= 8  # the region is 75 px of 200 wide
        assert (joints[seen, :2] > -0.5).all() and (joints[seen, :2] < (63.5, 127.5)).all()
        assert (joints[~seen] == 0).all()


def test_a_wide_box_keeps_its_person(tmp_path):
    """A person lying down, 160 × 40 px: all joints stay in most crops; without growing most of them
    are cut off.
    """
    people, _ = read_people(write_set(tmp_path, n_poses=1, per_pose=1, size=(240, 120)))
    points = np.zeros((1, 17, 3), np.float32)
    points[0] = [(x, 60, 2) for x in np.linspace(42, 198, 17)]
    people = people._replace(keypoints=points, boxes=np.array([[40, 40, 160, 40]], np.float32))

    def kept(region):
        dataset = PretrainPictures([people], (128, 64), seed=0, options=Augmentation(region=region))
        return np.mean(
            [(dataset[(epoch, 0)]["keypoints"][:, 2] > 0).numpy() for epoch in range(30)]
        )

    assert kept("grow") > 0.9 and kept("box") < 0.25
    # grown no further than needed, in the picture where it fits, around the box where it does not
    assert data.grown_region((20, 35, 200, 50), 0.5, (240, 120)) == (20, -90, 200, 300)
    assert data.grown_region((0, 10, 20, 80), 0.5, (240, 120)) == (0, 10, 30, 80)
    assert data.grown_region((100, 0, 50, 50), 0.5, (240, 120)) == (100, 0, 50, 75)
    assert data.grown_region((100, 0, 50, 90), 0.5, (240, 120)) == (100, 0, 50, 90)


@pytest.mark.parametrize("per_slot", [1, 4])
def test_batches_know_whether_they_hold_poses(tmp_path, per_slot):
    dataset = two_sets(tmp_path)
    posed = [
        PoseBatches(dataset, 4, per_slot, shares, 0, ALONE).posed
        for shares in ([], [1, 1], [1, 0], [0, 1], [1, 10**6])
    ]
    assert posed == [True, True, True, False, False]


def test_ranks_share_out_each_batch(tmp_path):
    dataset = two_sets(tmp_path)
    whole = list(PoseBatches(dataset, 16, 4, [], 0, ALONE).steps(0, 7))
    parts = [
        list(PoseBatches(dataset, 16, 4, [], 0, Ranks(r, 2, None)).steps(0, 7)) for r in range(2)
    ]
    assert [a + b for a, b in zip(*parts)] == whole
    resumed = list(PoseBatches(dataset, 16, 4, [], 0, ALONE).steps(4, 7))
    assert resumed == whole[4:]
    with pytest.raises(UserError, match="multiples of 12"):
        PoseBatches(dataset, 16, 4, [], 0, Ranks(0, 3, None))
    with pytest.raises(UserError, match="larger than"):
        PoseBatches(dataset, 400, 4, [], 0, ALONE)


class Priority(torch.utils.data.Dataset):
    def __getitem__(self, _):
        return os.nice(0)


def test_loaders_give_way_to_a_step_on_the_cpu_only():
    own = os.nice(0)
    for device, nice in (("cpu", 19 if hasattr(os, "SCHED_BATCH") else own), ("cuda", own)):
        loader = training_loader(Priority(), [[0, 1]], 1, torch.device(device))
        loader.pin_memory = False  # no GPU is needed to ask
        assert [v.tolist() for v in loader] == [[nice] * 2]
    assert os.nice(0) == own


# -------------------------------------------------------------------------------------------- masks

GRID, PATCH = (16, 8), 16


def random_people(n, missing=0.2, seed=0):
    g = torch.Generator().manual_seed(seed)
    points = torch.rand(n, 17, 3, generator=g)
    points[..., 0] = points[..., 0] * 160 - 16  # some outside the picture: clipped
    points[..., 1] = points[..., 1] * 288 - 16
    points[..., 2] = (points[..., 2] > missing).float() * 2
    return points


def loop_mask(points, noise):
    """The mask of one picture from its noise, in plain Python, as the method describes it."""
    h, w = GRID
    N, n_masked = h * w, h * w // 2
    rounds, tries = data.BLOCK_ROUNDS, data.BLOCK_TRIES
    block, order, k, amount, within, rest = np.split(
        noise, np.cumsum([rounds * tries * 4, 6, 1, 6, 6 * N])
    )
    blocked = np.zeros((h, w), bool)
    for r in range(rounds):
        budget, kept = n_masked - blocked.sum(), False
        for t in range(tries):
            area_u, aspect_u, top_u, left_u = block.reshape(rounds, 4, tries)[r, :, t]
            area = np.float32(12 + area_u * np.float32(budget - 12))
            aspect = np.float32(math.exp((2 * float(aspect_u) - 1) * -math.log(0.3)))
            tall, wide = round(float(np.sqrt(area * aspect))), round(float(np.sqrt(area / aspect)))
            if tall >= h or wide >= w:
                continue
            top, left = int(top_u * (h - tall + 1)), int(left_u * (w - wide + 1))
            new = (~blocked[top : top + tall, left : left + wide]).sum()
            if 0 < new <= budget:
                blocked[top : top + tall, left : left + wide], kept = True, True
                break
        if not kept:
            break
    parts = []
    for links in data.PARTS:
        patches = np.zeros((h, w), bool)
        for a, b in links:
            if points[a, 2] > 0 and points[b, 2] > 0:
                columns = [min(w - 1, max(0, math.floor(points[j, 0] / PATCH))) for j in (a, b)]
                rows = [min(h - 1, max(0, math.floor(points[j, 1] / PATCH))) for j in (a, b)]
                patches[min(rows) : max(rows) + 1, min(columns) : max(columns) + 1] = True
        parts.append(patches.ravel())
    front = []
    usable = [p for p in np.argsort(order) if parts[p].any()]
    for p in usable[: int(k[0] * 7)]:
        own = np.flatnonzero(parts[p])
        chosen = own[np.argsort(within.reshape(6, N)[p][own])][
            : int(np.float32(len(own)) * amount[p] * 0.3)
        ]
        front += [i for i in chosen[np.argsort(rest[chosen])] if i not in front]
    others = [i for i in np.argsort(rest) if i not in front]
    order = (
        front
        + [i for i in others if blocked.ravel()[i]]
        + [i for i in others if not blocked.ravel()[i]]
    )
    mask = np.zeros(N, bool)
    mask[order[:n_masked]] = True
    return mask, len(front)


def test_part_guided_mask_equals_the_loop():
    points = random_people(40)
    noise = torch.rand(40, data.noise_size(GRID), generator=torch.Generator().manual_seed(1))
    masks = part_guided_mask(points, GRID, 0.5, PATCH, noise=noise).numpy()
    fronts = []
    for i in range(40):
        expected, front = loop_mask(points[i].numpy(), noise[i].numpy())
        fronts.append(front)
        assert np.array_equal(masks[i], expected), i
    assert max(fronts) > 10  # parts really guide some of them


def test_mask_count_is_exact_and_rows_are_independent():
    points = random_people(512)
    for ratio in (0.5, 0.6, 0.75):
        masks = part_guided_mask(points, GRID, ratio, PATCH, torch.Generator().manual_seed(0))
        assert masks.dtype == torch.bool and masks.shape == (512, 128)
        assert (masks.sum(1) == round(ratio * 128)).all()
    noise = torch.rand(512, data.noise_size(GRID), generator=torch.Generator().manual_seed(0))
    whole = part_guided_mask(points, GRID, 0.5, PATCH, noise=noise)
    half = part_guided_mask(points[256:], GRID, 0.5, PATCH, noise=noise[256:])
    assert torch.equal(whole[256:], half)  # what a second rank computes


def test_number_of_parts_is_uniform_and_fraction_below_a_third():
    """One-patch picture parts far apart: the share of parts with masked front patches follows k ~
    U{0..6}, U(0, .3).
    """
    torch.manual_seed(0)
    points = random_people(1, missing=0.0).repeat(4000, 1, 1)
    size = data.part_patches(points[:1], GRID, PATCH).sum(2)[0]
    noise = torch.rand(4000, data.noise_size(GRID))
    first = data.noise_parts(GRID)[0]
    k = (noise[:, first + 6] * 7).long()
    counts = torch.bincount(k, minlength=7) / 4000
    assert (counts - 1 / 7).abs().max() < 0.02
    # Freeze the block mask and the rest: what differs from k = 0 is due to the parts alone.
    still = noise.clone()
    still[:, first + 6] = 0.0
    with_parts = part_guided_mask(points, GRID, 0.5, PATCH, noise=noise)
    without = part_guided_mask(points, GRID, 0.5, PATCH, noise=still)
    changed = (with_parts != without).any(1)
    assert not changed[k == 0].any() and changed[k == 6].float().mean() > 0.95
    moved = [(with_parts & ~without)[k == i].sum(1).float().mean().item() for i in range(7)]
    assert all(a < b for a, b in zip(moved, moved[1:]))  # more parts, more guided patches
    assert (with_parts & ~without).sum(1).max() <= 0.3 * size.sum()


def test_no_keypoints_gives_a_pure_block_mask():
    noise = torch.rand(300, data.noise_size(GRID), generator=torch.Generator().manual_seed(0))
    empty = torch.zeros(300, 17, 3)
    masks = part_guided_mask(empty, GRID, 0.5, PATCH, noise=noise)
    block = data.block_mask(noise[:, : data.noise_parts(GRID)[0]], GRID, 64)
    assert (masks | ~block).all()  # every block patch is masked
    assert (block.sum(1) <= 64).all() and block.sum(1).float().mean() > 60

    # Blocks are blocks: a masked patch has far more masked neighbours than under a random mask.
    def neighbours(m):
        m = m.view(-1, *GRID).float()
        return ((m[:, 1:] * m[:, :-1]).sum() / m[:, 1:].sum()).item()

    assert neighbours(masks) > neighbours(random_mask(torch.rand(300, 128), 0.5)) + 0.15


def test_block_mask_has_the_statistics_of_the_released_generator():
    """Figures of 20,000 masks by HAP's own rule (BEiT's generator: minimum 12, aspects from .3),
    drawn once beside it.

    16 × 8 patches, 64 wanted: 63.69 masked on average, 77.0 % of the masks whole; 8 × 4, 16 wanted:
    15.57, 71.4 %.
    """
    generator = torch.Generator().manual_seed(0)
    for grid, mean, whole in (((16, 8), 63.69, 0.770), ((8, 4), 15.57, 0.714)):
        budget = grid[0] * grid[1] // 2
        noise = torch.rand(20000, data.noise_parts(grid)[0], generator=generator)
        count = data.block_mask(noise, grid, budget).sum(1).float()
        assert (
            abs(count.mean() - mean) < 0.05
            and abs((count == budget).float().mean() - whole) < 0.012
        )


def test_masks_of_no_pictures():
    assert part_guided_mask(torch.zeros(0, 17, 3), GRID, 0.5, PATCH).shape == (0, 128)


def test_random_mask():
    masks = random_mask(torch.rand(2000, 128, generator=torch.Generator().manual_seed(0)), 0.75)
    assert (masks.sum(1) == 96).all() and (masks.float().mean(0) - 0.75).abs().max() < 0.05


def test_real_sets(data_root):
    lsp, _ = read_people(data_root / "lspet/train.json")
    market, _ = read_people(data_root / "market1501/person_keypoints_train.json")
    dataset = PretrainPictures([lsp, market], (256, 128), 0)
    assert len(dataset) == 3000 + 7010 and (dataset.pose_id == -1).all()
    sample = dataset[(0, 4000)]
    assert sample["image"].shape == (3, 256, 128) and (sample["keypoints"][:, 2] > 0).sum() > 5
    coco, _ = read_people(data_root / "coco/person_keypoints.json", limits=Limits(min_joints=1))
    assert 0 < len(coco.files) < 309
