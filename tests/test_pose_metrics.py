"""Figures of poses: OKS AP, PCK and PCKh on hand-worked cases and against official evaluators."""

import math

import numpy as np
import pytest
from pose_runs import mpii_mat, person
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from formats import mpii
from formats.joints import COCO_JOINTS
from plumbing.errors import UserError
from tasks import pose_metrics as metrics

FLAT = np.full(17, 0.05)  # equal σ: with area 10,000 px² OKS = exp(−d² / 200)


def coco_case(truths, predictions, first=1):
    """truths: [(image, keypoints (17, 3))], predictions: [(image, xy (17, 2), score)]; ids from
    `first` on."""
    images = [{"id": i, "width": 500, "height": 500} for i in (1, 2)]
    annotations = [
        {"id": n, "image_id": image, "category_id": 1, "bbox": [0, 0, 100, 100], "area": 10000.0,
         "iscrowd": 0,
         "num_keypoints": int((k[:, 2] > 0).sum()), "keypoints": k.flatten().tolist()}
        for n, (image, k) in enumerate(truths, first)
    ]  # fmt: skip
    document = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "keypoints": COCO_JOINTS}],
    }
    results = [
        {
            "image_id": i,
            "category_id": 1,
            "score": s,
            "keypoints": np.c_[xy, np.ones(17)].flatten().tolist(),
        }
        for i, xy, s in predictions
    ]
    return metrics.coco_metrics(document, results, FLAT)


def test_oks_ap_on_hand_worked_cases():
    a, b, far = person(0), person(1), person(0)[:, :2] + 400
    xy_a, xy_b = a[:, :2], b[:, :2]
    perfect = coco_case([(1, a), (2, b)], [(1, xy_a, 0.9), (2, xy_b, 0.8)])
    assert np.allclose([perfect["AP"], perfect["AR"], perfect["AP75"]], 1)
    assert perfect["AP_medium"] is None  # area 10,000 is large
    # shifted by d with exp(−d²/200) = .72: right at the 5 thresholds .5 .. .7 of 10
    shift = np.array([math.sqrt(-200 * math.log(0.72)), 0])
    moved = coco_case([(1, a)], [(1, xy_a + shift, 0.9)])
    assert np.isclose(moved["AP"], 0.5) and np.isclose(moved["AP50"], 1) and moved["AP75"] == 0
    # a missing person: precision 1 up to recall .5, i.e. at 51 of the 101 recall points
    missing = coco_case([(1, a), (2, b)], [(1, xy_a, 0.9)])
    assert np.isclose(missing["AP"], 51 / 101) and missing["AR"] == 0.5
    # a false positive below the right pose costs nothing; above it, precision is 1/2 at every
    # recall
    assert coco_case([(1, a)], [(1, xy_a, 0.9), (1, far, 0.1)])["AP"] > 0.999
    assert np.isclose(coco_case([(1, a)], [(1, xy_a, 0.1), (1, far, 0.9)])["AP"], 0.5)
    # a person without joints is ignored, and so is a pose that lies on it
    nobody = np.zeros((17, 3))
    assert (
        coco_case([(1, a), (2, nobody)], [(1, xy_a, 0.5), (2, np.full((17, 2), 50.0), 0.9)])["AP"]
        > 0.999
    )
    assert coco_case([(1, a)], [])["AP"] == 0


def test_ids_may_begin_with_0():
    """pycocotools takes a match with annotation 0 for none, and the hit for a false alarm."""
    truths = [(1, person(0)), (2, person(1))]
    found = [(1, person(0)[:, :2], 0.9), (2, person(1)[:, :2], 0.8)]
    assert coco_case(truths, found, first=0) == coco_case(truths, found)
    assert coco_case(truths, found, first=0)["AP"] == pytest.approx(1)


def test_our_oks_is_pycocotools_oks():
    rng = np.random.default_rng(3)
    joints = COCO_JOINTS[:9]
    sigmas, _ = metrics.oks_sigmas(joints)
    truth = np.concatenate([rng.uniform(0, 80, (4, 9, 2)), rng.integers(0, 3, (4, 9, 1))], 2)
    found = truth[..., :2] + rng.normal(0, 4, (4, 9, 2))
    area = rng.uniform(500, 9000, 4)
    coco = COCO()
    box = {"bbox": [0, 0, 80, 80], "category_id": 1, "iscrowd": 0, "num_keypoints": 5}
    coco.dataset = {
        "images": [{"id": i} for i in range(4)], "categories": [{"id": 1}],
        "annotations": [box | {"id": i + 1, "image_id": i, "area": area[i],
                               "keypoints": truth[i].flatten().tolist()} for i in range(4)],
    }  # fmt: skip
    coco.createIndex()
    rows = [
        {
            "image_id": i,
            "category_id": 1,
            "score": 1.0,
            "keypoints": np.c_[found[i], np.ones(9)].flatten(),
        }
        for i in range(4)
    ]
    evaluation = COCOeval(coco, coco.loadRes(rows), "keypoints")
    evaluation.params.kpt_oks_sigmas = sigmas
    evaluation._prepare()
    expected = [evaluation.computeOks(i, 1)[0, 0] for i in range(4)]
    assert np.allclose(metrics.oks(found, truth, area, sigmas), expected, rtol=1e-12)


def test_oks_nms_keeps_the_best_of_near_duplicates():
    a, b = person(0)[:, :2], person(1)[:, :2]
    d = math.sqrt(-200 * math.log(0.95))  # OKS .95 with area 10,000
    poses, areas = np.stack([a, b, a + [d, 0], a + [2 * d, 0]]), np.full(4, 10000.0)
    # .95 from the best goes; at twice the distance .95⁴ = .81 stays although it is near the
    # suppressed one
    assert metrics.oks_nms(poses, [0.8, 0.5, 0.7, 0.6], areas, FLAT) == [0, 3, 1]
    assert metrics.oks_nms(poses, [0.7, 0.5, 0.8, 0.6], areas, FLAT) == [2, 1]
    assert metrics.oks_nms(poses, [0.7, 0.5, 0.8, 0.6], areas, FLAT, 0.96) == [2, 0, 3, 1]


def test_pose_score_is_box_times_mean_of_sure_joints():
    joint = np.array([[0.9, 0.5, 0.1], [0.2, 0.1, 0.0]])
    assert np.allclose(metrics.pose_score([0.5, 1.0], joint), [0.35, 0])


def test_pck_on_a_hand_worked_case():
    joints = ["left_shoulder", "right_shoulder", "left_hip", "right_hip", "head"]
    truth = np.zeros((3, 5, 3))
    truth[0] = [[0, 0, 2], [50, 0, 2], [0, 90, 2], [30, 40, 1], [9, 9, 0]]  # torso 50
    truth[1] = [[0, 0, 0], [30, 0, 2], [0, 40, 2], [30, 40, 1], [9, 9, 2]]  # the other diagonal: 50
    truth[2] = [[0, 0, 2], [0, 0, 0], [5, 5, 2], [0, 0, 0], [9, 9, 2]]  # neither diagonal: left out
    torso = metrics.torso_size(truth, joints)
    assert torso[:2].tolist() == [50, 50] and np.isnan(torso[2])
    found = truth[..., :2].copy()
    found[0, 0] += [10, 0]  # exactly .2 of torso: counts
    found[0, 1] += [0, 10.1]  # just too far
    found[0, 4] += 99  # not labelled: not counted
    found[1, 4] += 99
    value, each, left_out = metrics.pck(found, truth, torso, 0.2)
    assert (value, left_out) == (6 / 8, 1)
    assert each.tolist() == [1, 0.5, 1, 1, 0]
    assert np.isnan(metrics.pck(found, truth * [1, 1, 0], torso, 0.2)[1]).all()


def test_figures_without_a_usable_reference_are_left_out():
    """A torso of no length, heads of NaN: no bare NaN for metrics.json, which would not be JSON."""
    truth = np.full((2, 16, 3), 5.0)
    truth[:, 9, 2] = 0  # head_top
    assert metrics.pck_metrics(truth[..., :2], truth, mpii.MPII_JOINTS) == ({}, {})
    truth[0, 12:14, 0] = 25, 45  # the shoulders
    flat, full = metrics.pck_metrics(truth[..., :2], truth, mpii.MPII_JOINTS)
    assert flat == {"PCK@.2": 1.0} and full["people_without_torso"] == 1


def test_sigmas_are_published_ones_or_said_to_be_ours(monkeypatch):
    sigmas, source = metrics.oks_sigmas(COCO_JOINTS)
    with_coco = COCOeval(iouType="keypoints").params.kpt_oks_sigmas
    assert np.allclose(sigmas, with_coco) and source.startswith("COCO")
    monkeypatch.setattr(metrics, "PUBLISHED_SIGMAS", (("Ours", ["LKnee", "TOE 1"], [0.1, 0.2]),))
    sigmas, source = metrics.oks_sigmas(["left_knee", "toe_1"])  # as read_people respells a file's
    assert sigmas.tolist() == [0.1, 0.2] and source == "Ours published sigmas"
    monkeypatch.undo()
    sigmas, source = metrics.oks_sigmas(mpii.MPII_JOINTS)
    assert source.startswith("our sigmas") and sigmas[[0, 6, 9, 10]].tolist() == [
        0.089,
        0.107,
        0.079,
        0.062,
    ]


def test_pckh_is_that_of_the_official_mat_alone(tmp_path):
    """HRNet's evaluate() (lib/dataset/mpii.py) joint by joint; the list's joints are elsewhere."""
    boxes, missing, positions = mpii_mat(tmp_path / "gt.mat", 4)
    heads, rng = mpii.read_mpii_heads(tmp_path / "gt.mat", 4), np.random.default_rng(1)
    found = np.nan_to_num(positions, nan=50).transpose(2, 0, 1) - 1 + rng.normal(0, 9, (4, 16, 2))
    hit = total = 0
    for n in range(4):
        reference = 0.6 * math.dist(boxes[1, :, n], boxes[0, :, n])
        for j in [*range(6), *range(8, 16)]:
            if not missing[j, n]:
                total += 1
                hit += math.dist(found[n, j] + 1, positions[j, :, n]) / reference <= 0.5
    listed = np.concatenate([rng.uniform(0, 100, (4, 16, 2)), np.full((4, 16, 1), 2)], 2)
    flat, _ = metrics.pck_metrics(found, listed, mpii.MPII_JOINTS, heads)
    assert flat["PCKh@.5"] == hit / total and 0.1 < hit / total < 0.9
    with pytest.raises(UserError, match="4 people"):
        mpii.read_mpii_heads(tmp_path / "gt.mat", 5)
