"""correspondence.png: whom it shows, what it marks; a pre-training draws it, or says why not."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import pretrain
from drawing import training
from formats.joints import COCO_JOINTS


def test_the_joints_asked_for_are_coco_s():
    assert {j: COCO_JOINTS[j].replace("_", " ") for j in training.ASKED} == training.ASKED


def people(n, seed=0):
    """n people with every joint visible, at random places of a picture of 64 × 128 px."""
    keypoints = np.random.default_rng(seed).uniform(0, 1, (n, 17, 3)) * [64, 128, 1]
    keypoints[:, :, 2] = 2
    return keypoints


def test_others_are_of_other_poses_and_show_the_joints():
    keypoints, pose_id = people(30), [i // 3 for i in range(27)] + [-1, -1, -1]
    joints, shown = training.people_of_other_poses(keypoints, pose_id)
    assert [training.ASKED[j] for j in joints] == "nose,left wrist,right knee,left ankle".split(",")
    assert len(shown) == 5 and shown[0] == 0
    groups = [pose_id[i] if pose_id[i] >= 0 else -i for i in shown]
    assert len(set(groups)) == 5
    # The farthest of all other poses comes last, and they come in order.
    single = [*range(3, 27, 3), 27, 28, 29]
    away = {
        i: np.linalg.norm(keypoints[i, :, :2] - keypoints[0, :, :2], axis=1).mean() for i in single
    }
    assert shown[-1] == max(away, key=away.get)
    assert [away[i] for i in shown[1:]] == sorted(away[i] for i in shown[1:])
    # A hidden joint is not asked for, nor one that only four poses show: others take their place.
    keypoints[:, 0, 2], keypoints[12:, 9, 2] = 1, 0
    joints, shown = training.people_of_other_poses(keypoints, pose_id)
    assert joints == [14, 15, 10, 13]
    # Where no five poses show a joint, two do.
    keypoints[:, :, 2] = 0
    keypoints[[4, 8], 16, 2] = 2
    keypoints[[3, 6], 16, 2] = 2  # the first of these poses
    assert training.people_of_other_poses(keypoints, pose_id) == ([16], [3, 6])


def test_no_joint_or_no_second_pose_is_no_sheet():
    assert training.people_of_other_poses(people(6), [3] * 6) == ([], [])
    without = people(6)
    without[:, :, 2] = 1
    assert training.people_of_other_poses(without, [-1] * 6) == ([], [])


def test_the_square_is_the_most_similar_patch_and_found_is_counted(tmp_path, monkeypatch):
    """Tokens that say what part of a body is there: person i's knee is in row i, but for one."""
    h, w, p = 8, 4, 16
    rng = np.random.default_rng(1)
    patches = torch.from_numpy(rng.normal(size=(5, h, w, 32))).float()
    keypoints = torch.zeros(5, 17, 3)
    knee, nose = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    for i in range(5):
        patches[i, i + 1, 2], keypoints[i, 14] = (
            3 * knee,
            torch.tensor([2 * p + 5, (i + 1) * p + 9, 2]),
        )
        patches[i, 0, i % 4], keypoints[i, 0] = 2 * nose, torch.tensor([(i % 4) * p, 0, 2])
    keypoints[4, 14, 1] = 7 * p + 15.4  # two patches below what looks like a knee
    sheets, cells = [], []
    monkeypatch.setattr(training, "sheet", lambda *a: sheets.append(a))
    monkeypatch.setattr(training, "marked", lambda *a: cells.append(a) or Image.new("RGB", (9, 9)))
    images = torch.zeros(5, 3, h * p, w * p, dtype=torch.uint8)
    training.correspondence_sheet(images, patches, keypoints, [0, 14], tmp_path / "x.png")
    rows, _, _, heads, _, size = sheets[0]
    # By chance: the patches from which a joint is one or none away, of 32, over the four others.
    nose = f"1 nose\n4 of 4, chance {(6 + 6 + 4 + 4) / 32:.1f}"
    right_knee = f"2 right knee\n3 of 4, chance {(9 + 9 + 9 + 6) / 32:.1f}"
    assert heads == ["picture", nose, right_knee]
    zoom = size[1] / (h * p)
    for i, (_, square, _, _) in enumerate(cells[5:]):  # the knees
        assert np.allclose(square, np.array([2, i + 1, 3, i + 2]) * p * zoom)
    assert [cell[3] for cell in cells[5:]] == ["", "1.00", "1.00", "1.00", "1.00"]
    for pixels, (x0, y0, x1, y1), _, _ in cells[5:]:  # it is brightest at the knee
        y, x = np.unravel_index(pixels.astype(int).sum(2).argmax(), pixels.shape[:2])
        assert x0 <= x < x1 and y0 <= y < y1
    assert len(rows) == 5 and all(len(row) == 3 for row in rows)


def write_set(folder, joints):
    """8 pictures of 4 poses; without `joints` none is visible."""
    (folder / "images").mkdir(parents=True)
    rng, images, annotations = np.random.default_rng(0), [], []
    for i in range(8):
        noise = rng.integers(0, 256, (64, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"images/{i}.png")
        images.append(dict(id=i, file_name=f"{i}.png", width=32, height=64))
        keypoints = rng.uniform(8, 24, (17, 3)).round(1)
        keypoints[:, 2] = 2 if joints else 1
        annotations.append(
            dict(id=i, image_id=i, category_id=1, bbox=[0, 0, 32, 64], area=2048, iscrowd=0)
            | dict(keypoints=keypoints.flatten().tolist(), num_keypoints=17, pose_id=i // 2)
        )
    category = dict(id=1, name="person", keypoints=COCO_JOINTS, skeleton=[])
    document = dict(images=images, annotations=annotations, categories=[category])
    (folder / "annotations.json").write_text(json.dumps(document))


@pytest.mark.parametrize("joints", [True, False])
def test_a_pre_training_draws_it_or_says_why_not(joints, tmp_path, monkeypatch, capsys):
    write_set(tmp_path / "set", joints)
    small = "size=tiny height=64 width=32 batch=4 epochs=1 pictures_per_pose=2 workers=0"
    keys = [*small.split(), f"annotations={tmp_path}/set/annotations.json", f"out={tmp_path}/run"]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *keys])
    pretrain.main()
    error = capsys.readouterr().err
    drawn = (tmp_path / "run/correspondence.png").exists()
    said = "no correspondence.png: no joint is visible on people of two poses" in error
    assert (drawn, said) == (joints, not joints)
    assert "neighbours.png, attention.png" in error
