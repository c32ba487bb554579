"""Pictures on disk and as training samples: damage, sizes, crops, flips, and what the pictures of a
pose share.
"""

import json
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from coco_sets import ALONE, write_set
from PIL import Image

import data
from data import Augmentation, PoseBatches, PretrainPictures
from formats.coco import Limits, read_people
from plumbing import pictures
from plumbing.errors import UserError
from plumbing.pictures import pictures_at

# -------------------------------------------------------------------------------------------- files


def test_bad_pictures_are_named_counted_and_left_out_up_to_max_bad(tmp_path):
    path = write_set(tmp_path)
    (tmp_path / "images/000.jpg").unlink()
    (tmp_path / "images/004.jpg").write_bytes(b"")
    whole = (tmp_path / "images/008.jpg").read_bytes()
    (tmp_path / "images/008.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"000\.jpg is missing \(and 2 more\), .*; mend it$"):
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


def test_linked_folders_are_entered_once(tmp_path):
    folder, elsewhere = tmp_path / "pictures/day_1", tmp_path / "elsewhere"
    folder.mkdir(parents=True), elsewhere.mkdir()
    for file in (folder / "a.png", elsewhere / "b.png"):
        Image.new("RGB", (8, 16)).save(file)
    (tmp_path / "pictures/day_2").symlink_to(elsewhere)
    (folder / "back").symlink_to(tmp_path / "pictures")
    assert pictures_at(tmp_path / "pictures")[1] == ["day_1/a.png", "day_2/b.png"]


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
