"""Real 2-D poses drawn by the puppet: depth that is found, joints that are completed."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_puppet import SIZE, draw

import puppet as pp
from formats.joints import COCO_JOINTS
from puppet import body

DATA = os.environ.get("GENPOCCL_DATA")
real = pytest.mark.skipif(not DATA, reason="GENPOCCL_DATA is not set: no real poses")


def expected_px(keypoints, boxes, size, pad=1.15):
    """The documented map, in plain loops: padded box, aspect preserved, centred."""
    out = np.zeros((len(boxes), 17, 2))
    for i, (x, y, w, h) in enumerate(boxes):
        scale = min(size[1] / (w * pad), size[0] / (h * pad))
        for j in range(17):
            out[i, j, 0] = (keypoints[i, j, 0] - (x + w / 2)) * scale + size[1] / 2
            out[i, j, 1] = (keypoints[i, j, 1] - (y + h / 2)) * scale + size[0] / 2
    return out


def check_exact(keypoints, boxes, size):
    poses = pp.poses_from_keypoints(keypoints, boxes)
    ok = poses.ok
    out = draw(pp.take(poses, ok), int(ok.sum()), size)
    wanted, given = expected_px(keypoints, boxes, size)[ok], (keypoints[..., 2] > 0)[ok]
    inside = out["keypoints"][..., 2] > 0
    assert np.abs(out["keypoints"][..., :2] - wanted)[given & inside].max() < 0.01
    edge = (wanted < -0.5).any(-1) | (wanted >= np.array(size[::-1]) - 0.5).any(-1)
    assert np.array_equal(inside[given], ~edge[given])
    # Completed joints never pass for given ones.
    assert (out["keypoints"][..., 2][~given] < 2).all()
    assert np.isfinite(poses.points).all() and (poses.points[..., 2] > 1).all()
    assert ((out["parts"] > 0).mean((1, 2)) > 0.02).mean() > 0.98
    return poses, out


def test_missing_joints_are_completed_and_hopeless_poses_refused():
    source = draw(pp.sample_poses(11, range(40)), 40)
    k, boxes = source["keypoints"].astype(float), source["boxes"].astype(float)
    k[..., 2] = np.where(k[..., 2] > 0, 2, 0)
    assert pp.poses_from_keypoints(k, boxes).ok.all()
    for drop in (
        [9, 10, 15, 16],
        [5, 11],
        [11, 12, 13, 14, 15, 16],
        [5, 6, 7, 8, 9, 10],
        [0, 1, 2, 3, 4],
        [7, 8, 13, 14],
        [6, 11],
    ):
        part = k.copy()
        part[:, drop] = 0
        poses, _ = check_exact(part, boxes, SIZE)
        assert poses.ok.mean() > 0.9, drop
    for drop in ([5, 6, 11, 12], [6, 11, 12], list(range(3, 17))):
        part = k.copy()
        part[:, drop] = 0
        assert not pp.poses_from_keypoints(part, boxes).ok.any()
    # All on one point.
    assert not pp.poses_from_keypoints(np.full((1, 17, 3), 5.0), [[0, 0, 9, 9]], SIZE).ok[0]
    assert not pp.poses_from_keypoints(k[:1], [[0, 0, 0, 0]]).ok[0]


def test_lifting_finds_the_way_a_person_faces():
    """From our own 2-D joints: front and back are told apart, and the lifted depth is better than
    flat.
    """
    truth = pp.sample_poses(12, range(200))
    out = draw(truth, 200)
    k = out["keypoints"].astype(float)
    poses = pp.poses_from_keypoints(k, out["boxes"])
    clear = np.abs(truth.chest[:, 2, 2]) > 0.6
    agree = np.sign(poses.chest[:, 2, 2]) == np.sign(truth.chest[:, 2, 2])
    assert agree[clear].mean() > 0.95
    # Where the face's joints are seen, the head turns the right way too.
    seen = (out["keypoints"][:, :5, 2] == 2).sum(1) >= 3
    assert (
        seen.sum() > 50 and ((poses.head[:, 2] * truth.head[:, 2]).sum(1)[seen] > 0.7).mean() > 0.85
    )
    z_true = truth.points[:, :17, 2] - truth.points[:, [11, 12], 2].mean(1, keepdims=True)
    z = poses.points[:, :17, 2] - poses.points[:, [11, 12], 2].mean(1, keepdims=True)
    assert np.corrcoef(z.ravel(), z_true.ravel())[0, 1] > 0.3


def test_completed_joints_are_where_they_belong():
    """One joint dropped at a time: seen from its left/right twin, the completed one is near the
    true one.
    """
    poses = pp.sample_poses(13, range(120))
    out = draw(poses, 120)
    # Seen from the front or the back, where a mirrored guess is far off.
    wide = np.abs(poses.chest[:, 2, 2]) > 0.7
    truth, boxes = out["keypoints"][wide], out["boxes"][wide]
    zoom = np.minimum(SIZE[1] / boxes[:, 2], SIZE[0] / boxes[:, 3])[:, None] / 1.15
    for joint, twin, limit in (
        (5, 6, 0.12),
        (11, 12, 0.12),
        (12, 11, 0.12),
        (13, 14, 0.3),
        (15, 16, 0.3),
    ):
        k = truth.astype(float)
        k[:, joint] = 0
        xy = pp.project(pp.poses_from_keypoints(k, boxes), SIZE)[0]
        wrong = np.linalg.norm(
            xy[:, joint] - xy[:, twin] - (truth[:, joint, :2] - truth[:, twin, :2]) * zoom, axis=1
        )
        torso = np.linalg.norm(xy[:, body.NECK] - (xy[:, 11] + xy[:, 12]) / 2, axis=1)
        assert np.median(wrong / torso) < limit, (joint, np.median(wrong / torso))
    k = truth.astype(float)
    k[:, :5] = 0  # without a face the head looks where the chest does
    made = pp.poses_from_keypoints(k, boxes)
    assert ((made.head[:, 2] * made.chest[:, 2]).sum(1) > 0.9).mean() > 0.95


def test_a_face_that_a_set_names_is_kept():
    """LSP's neck and head top beside COCO's seventeen make no face anew."""
    names = [*COCO_JOINTS, "neck", "head_top"]
    keypoints = np.random.default_rng(0).uniform(1, 50, (2, 19, 3)).astype(np.float32)
    people = SimpleNamespace(joints=names, keypoints=keypoints)
    people._replace = lambda **columns: SimpleNamespace(**columns)
    assert np.array_equal(pp.coco17(people).keypoints, keypoints[:, :17])
    people.joints = [f"x{name}" if name in COCO_JOINTS[:5] else name for name in names]
    faces = pp.coco17(people).keypoints[:, :5]
    assert (faces[:, :, 2] == 1).all() and not np.array_equal(faces, keypoints[:, :5])


def test_lsp_order():
    k = np.zeros((1, 14, 3))
    k[0, :, 2] = 1
    k[0, :, :2] = [
        (4, 90),
        (4, 70),
        (4, 50),
        (10, 50),
        (10, 70),
        (10, 90),
        (0, 50),
        (0, 35),
        (2, 20),
        (12, 20),
        (14, 35),
        (14, 50),
        (7, 18),
        (7, 4),
    ]
    out = pp.lsp_to_coco(k)[0]
    assert np.array_equal(
        out[5:, :2],
        np.array(
            [
                (12, 20),
                (2, 20),
                (14, 35),
                (0, 35),
                (14, 50),
                (0, 50),
                (10, 50),
                (4, 50),
                (10, 70),
                (4, 70),
                (10, 90),
                (4, 90),
            ]
        ),
    )
    assert (
        (out[:5, 1] < 18).all()
        and (out[:5, 1] > 4).all()
        and out[1, 0] > out[2, 0]
        and out[3, 0] > out[4, 0]
    )
    k[0, 13, 2] = 0
    assert (pp.lsp_to_coco(k)[0, :5] == 0).all()


@real
def test_lspet_poses():
    annotations = json.loads((Path(DATA) / "lspet/train.json").read_text())["annotations"][:240]
    keypoints = pp.lsp_to_coco(np.array([a["keypoints"] for a in annotations]).reshape(-1, 14, 3))
    poses, _ = check_exact(keypoints, np.array([a["bbox"] for a in annotations]), (128, 96))
    assert poses.ok.mean() > 0.97


@real
def test_coco_poses():
    annotations = json.loads((Path(DATA) / "coco/person_keypoints.json").read_text())["annotations"]
    annotations = [a for a in annotations if a["num_keypoints"] >= 5 and not a["iscrowd"]]
    keypoints = np.array([a["keypoints"] for a in annotations], float).reshape(-1, 17, 3)
    poses, _ = check_exact(keypoints, np.array([a["bbox"] for a in annotations]), SIZE)
    assert poses.ok.mean() > 0.8
