"""finetune_pose.py and what it uses of tasks/ and formats/: numerics, files, runs, ranks, resume.

Numerics are held against loops, hand-worked cases and official evaluators.
"""

import json
import math
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.ndimage
import torch
from conftest import ROOT, check_fields, kill_after, run_script
from PIL import Image, ImageDraw
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file

import finetune_pose
import model
from common import Ranks, layer_of, parameter_groups, save_weights
from formats import keypoints as readers
from formats import mpii
from formats.coco import Limits, read_people
from formats.joints import COCO_JOINTS
from formats.weights import meta_of
from plumbing.config import read_config
from plumbing.errors import UserError
from tasks import pose
from tasks import pose_metrics as metrics

DATA = os.environ.get("GENPOCCL_DATA")
needs_data = pytest.mark.skipif(
    not DATA, reason="GENPOCCL_DATA is not set: no real annotation files"
)
SMALL = {
    "width": 32,
    "depth": 2,
    "heads": 2,
    "decoder_width": 32,
    "decoder_depth": 1,
    "decoder_heads": 2,
}
MACHINE = ["precision=fp32", "workers=0", "device=cpu"]
QUICK = "size=tiny patch=8 height=64 width=48 head=simple batch=6 epochs=1 warmup_steps=1".split()
QUICK += MACHINE


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setitem(model.SIZES, "tiny", SMALL)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(*arguments):
    """The script's main in this process."""
    before, sys.argv = sys.argv, ["finetune_pose.py", *map(str, arguments)]
    try:
        finetune_pose.main()
    finally:
        sys.argv = before


def script(folder):
    """A file that runs the script with the small encoder, for processes of their own."""
    path = Path(folder) / "small.py"
    path.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        f"import model; model.SIZES['tiny'] = {SMALL!r}\n"
        "import common, finetune_pose\n"
        "if 'sgd' in sys.argv:\n"
        "    sys.argv.remove('sgd')\n"
        "    sys.path.insert(0, 'tests'); import test_finetune_pose\n"
        "    finetune_pose.build_optimizer = test_finetune_pose.sgd\n"
        "common.run_stage(finetune_pose.main)\n"
    )
    return path


def sgd(cfg, model):
    """SGD, because Adam would hide gradients of a wrong scale. The head starts 30 × larger: batch
    norm behind its usual N(0, .001) enlarges float32's rounding.
    """
    with torch.no_grad():
        for weight in model.head.parameters():
            weight.mul_(30 if weight.ndim > 1 else 1)
    return torch.optim.SGD(model.parameters(), lr=0.0)


def people_file(folder, n, seed=0, name="people.json", joints=COCO_JOINTS):
    """n pictures of dots, one COCO person each: every joint has a colour, so it can be learnt."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    palette = np.random.default_rng(5).integers(30, 255, (len(joints), 3))
    for i in range(1, n + 1):
        w, h = int(rng.integers(70, 100)), int(rng.integers(90, 130))
        picture = Image.fromarray(rng.integers(0, 60, (h, w, 3), np.uint8))
        xy = rng.uniform(10, [w - 10, h - 10], (len(joints), 2)).round(1)
        draw = ImageDraw.Draw(picture)
        for (x, y), colour in zip(xy, palette):
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], tuple(colour.tolist()))
        picture.save(folder / "images" / f"{seed}_{i}.png")
        images.append({"id": i, "file_name": f"{seed}_{i}.png", "width": w, "height": h})
        keypoints = np.concatenate([xy, np.full((len(joints), 1), 2.0)], 1)
        keypoints[rng.random(len(joints)) < 0.1] = 0
        annotations.append(
            {"id": i, "image_id": i, "category_id": 1, "bbox": [5, 5, w - 10, h - 10],
             "area": float(w * h) / 2, "iscrowd": 0, "keypoints": keypoints.flatten().tolist(),
             "num_keypoints": int((keypoints[:, 2] > 0).sum())}
        )  # fmt: skip
    category = {"id": 1, "name": "person", "keypoints": list(joints), "skeleton": [[1, 2], [2, 4]]}
    path = folder / name
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": [category]})
    )
    return path


def sets(train, val):
    return [f"train_annotations={train}", f"val_annotations={val}"]


@pytest.fixture(scope="module")
def dots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dots")
    return people_file(folder, 12, 0, "train.json"), people_file(folder, 7, 1, "val.json")


# ----------------------------------------------------------------------------------------- geometry


def test_affine_maps_the_regions_corners_and_middle():
    size, centre, extent = (64, 48), (50.0, 40.0), (30.0, 40.0)
    corners = np.array([[0, 0], [47, 0], [0, 63], [47, 63], [23.5, 31.5]], float)
    box = np.array([[35, 20], [65, 20], [35, 60], [65, 60], [50, 40]], float)
    assert np.allclose(pose.to_picture(pose.affine(centre, extent, size), corners), box)
    mirrored = pose.affine(centre, extent, size, mirror=True)
    assert np.allclose(pose.to_picture(mirrored, corners), box[[1, 0, 3, 2, 4]])
    # a quarter turn about the centre: offset (dx, dy) becomes (−dy, dx)
    turned = np.array([50, 40]) + np.stack([-(box - [50, 40])[:, 1], (box - [50, 40])[:, 0]], 1)
    assert np.allclose(pose.to_picture(pose.affine(centre, extent, size, 90), corners), turned)
    back = pose.to_input(mirrored, pose.to_picture(mirrored, corners))
    assert np.allclose(back, corners)


# 3.4: the picture is shrunk by a whole factor first
@pytest.mark.parametrize("scale", [0.7, 1.0, 3.4])
@pytest.mark.parametrize("degrees, mirror", [(0, False), (25, True)])
def test_warp_puts_pixels_where_the_matrix_says(scale, degrees, mirror):
    """A picture that is linear in x and y: each warped pixel must hold its source's value."""
    y, x = np.mgrid[0:300, 0:260]
    picture = Image.fromarray(
        np.stack([x / 260 * 250, y / 300 * 250, 0 * x], 2).round().astype(np.uint8)
    )
    matrix = pose.affine((130, 150), (48 * scale, 64 * scale), (64, 48), degrees, mirror)
    out = pose.warp(picture, matrix, (64, 48)).astype(float)
    v, u = np.mgrid[0:64, 0:48]
    source = pose.to_picture(matrix, np.stack([u, v], 2).astype(float))
    error = out[..., :2] + 0.5 - source / [260, 300] * 250  # Pillow rounds down
    assert np.abs(error).max() < 1.2
    assert np.abs(error.mean((0, 1))).max() < 0.2  # half a pixel's shift would be .3


def test_regions_have_the_inputs_aspect_and_padding():
    centre, extent = pose.regions([[10, 20, 30, 80], [0, 0, 90, 40]], 0.75, 1.25)
    assert np.allclose(centre, [[25, 60], [45, 20]])
    assert np.allclose(extent, [[75, 100], [112.5, 150]])


def test_half_body_takes_one_half_and_only_with_more_than_8_joints():
    rng = np.random.default_rng(0)
    keypoints = np.concatenate([rng.uniform(0, 100, (17, 2)), np.full((17, 1), 2)], 1)
    lower = pose.lower_body(COCO_JOINTS)
    assert lower.tolist() == [False] * 11 + [True] * 6
    seen = set()
    for seed in range(20):
        centre, extent = pose.half_body(keypoints, lower, 0.75, random.Random(seed))
        half = (
            keypoints[lower, :2]
            if np.allclose(centre, keypoints[lower, :2].mean(0))
            else keypoints[~lower, :2]
        )
        seen.add(len(half))
        assert np.allclose(centre, half.mean(0)) and np.isclose(extent[0] / extent[1], 0.75)
        w, h = np.ptp(half, axis=0)
        assert np.isclose(extent[0], 1.5 * max(w, 0.75 * h))
    assert seen == {6, 11}
    keypoints[:9, 2] = 0
    assert pose.half_body(keypoints, lower, 0.75, random.Random(0)) is None  # 8 joints left
    keypoints[:9, 2] = [0] * 8 + [2]
    assert pose.half_body(keypoints, lower, 0.75, random.Random(0)) is not None
    keypoints[:, 2] = 2
    keypoints[lower, 2] = [2, 2, 0, 0, 0, 0]  # two lower joints: always the upper half
    centres = [pose.half_body(keypoints, lower, 0.75, random.Random(s))[0] for s in range(8)]
    assert np.allclose(centres, keypoints[~lower, :2].mean(0))


def test_the_upper_half_comes_as_often_as_in_hrnet():
    """HRNet and ViTPose compare a normal number, not a uniform one, with .5."""
    lower, rng = pose.lower_body(COCO_JOINTS), np.random.default_rng(1)
    keypoints = person(0)
    upper = keypoints[~lower, :2].mean(0)
    ours = [np.allclose(pose.half_body(keypoints, lower, 0.75, rng)[0], upper) for _ in range(4000)]
    assert abs(np.mean(ours) - np.mean(rng.normal(size=100_000) < 0.5)) < 0.02


# ---------------------------------------------------------------------------------------- heat maps


@pytest.mark.parametrize(
    "size, grid", [((256, 192), (64, 48)), ((128, 96), (64, 48)), ((64, 48), (32, 24))]
)
@pytest.mark.parametrize("mirror, degrees", [(False, 0), (True, 0), (True, 33)])
def test_encode_decode_round_trip_under_a_tenth_of_a_pixel(size, grid, mirror, degrees):
    """Picture px → input px → heat map → (mirrored, mirrored back) → input px → picture px."""
    rng = np.random.default_rng(0)
    matrix = pose.affine((210, 170), (120, 160), size, degrees, mirror)
    # 5 heat-map px off the border: nearer, the blur of 11 px looks beyond it
    inner = rng.uniform(5, [grid[1] - 6, grid[0] - 6], (50, 17, 2))
    xy_input = inner * [(size[1] - 1) / (grid[1] - 1), (size[0] - 1) / (grid[0] - 1)]
    truth = pose.to_picture(matrix, xy_input)
    keypoints = np.concatenate([pose.to_input(matrix, truth), np.full((50, 17, 1), 2)], 2)
    heat, weight = pose.heat_maps(torch.from_numpy(keypoints).float(), size, grid)
    assert heat.shape == (50, 17, *grid) and weight.min() == 1
    # the flip test: the mirrored input's maps, mirrored back, are the same maps without any shift
    flipped = keypoints.copy()
    flipped[..., 0] = size[1] - 1 - flipped[..., 0]
    heat_flipped, _ = pose.heat_maps(torch.from_numpy(flipped).float(), size, grid)
    assert torch.allclose(heat_flipped.flip(3), heat, atol=1e-4)
    found = pose.decode((heat + heat_flipped.flip(3)) / 2, size).numpy()
    assert np.abs(pose.to_picture(matrix, found[..., :2].astype(float)) - truth).max() < 0.1
    assert found[..., 2].min() > 0.93


def test_targets_are_gaussians_and_weights_follow_visibility():
    size, grid, sigma = (64, 48), (16, 12), 1.5
    keypoints = torch.tensor(
        [[[20.3, 33.7, 2], [4, 5, 0], [-40, 3, 2], [1e4, 3, 1], [-2, 3, 1]]], dtype=torch.float64
    )
    heat, weight = pose.heat_maps(keypoints, size, grid, sigma)
    assert weight.tolist() == [[1, 0, 0, 0, 1]]
    mx, my = 20.3 * 11 / 47, 33.7 * 15 / 63
    for y in range(16):
        for x in range(12):
            expected = math.exp(-((x - mx) ** 2 + (y - my) ** 2) / (2 * sigma**2))
            assert abs(heat[0, 0, y, x].item() - expected) < 1e-12


def test_dark_decoding_matches_a_plain_loop():
    """Noisy maps: blur by scipy, log, gradient and Hessian by differences, a map at a time."""
    rng = np.random.default_rng(1)
    keypoints = np.concatenate([rng.uniform(0, [47, 63], (6, 5, 2)), np.full((6, 5, 1), 2)], 2)
    heat = pose.heat_maps(torch.from_numpy(keypoints), (64, 48), (32, 24))[0].numpy()
    heat = heat * 0.8 + rng.normal(0, 0.02, heat.shape)
    found = pose.decode(torch.from_numpy(heat), (64, 48)).numpy()
    kernel = np.exp(-(np.arange(-5, 6) ** 2) / 8.0)
    kernel /= kernel.sum()
    for b in range(6):
        for k in range(5):
            m = heat[b, k]
            y, x = np.unravel_index(m.argmax(), m.shape)
            smooth = scipy.ndimage.correlate1d(m, kernel, 0, mode="constant")
            smooth = scipy.ndimage.correlate1d(smooth, kernel, 1, mode="constant")
            log = np.pad(np.log(np.clip(smooth, 1e-3, 50)), 1, mode="edge")
            p = log[y : y + 3, x : x + 3]  # the 3 × 3 around the peak
            gradient = np.array([p[1, 2] - p[1, 0], p[2, 1] - p[0, 1]]) / 2
            xy = (p[2, 2] - p[1, 2] - p[2, 1] + 2 * p[1, 1] - p[1, 0] - p[0, 1] + p[0, 0]) / 2
            hessian = np.array(
                [[p[1, 2] - 2 * p[1, 1] + p[1, 0], xy], [xy, p[2, 1] - 2 * p[1, 1] + p[0, 1]]]
            )
            good = np.linalg.det(hessian) > 1e-9 and hessian[0, 0] < 0
            step = np.clip(np.linalg.inv(hessian) @ gradient, -2, 2) if good else np.zeros(2)
            expected = (np.array([x, y]) - step) * [47 / 23, 63 / 31]
            assert np.allclose(found[b, k, :2], expected, atol=2e-3), (b, k)
            assert np.isclose(found[b, k, 2], m.max())


def test_decoding_a_flat_map_stays_on_a_pixel():
    found = pose.decode(torch.zeros(1, 2, 16, 12), (64, 48))
    assert found.isfinite().all() and found.abs().max() == 0


def test_loss_matches_a_loop():
    torch.manual_seed(0)
    pred = torch.randn(3, 4, 8, 6, dtype=torch.float64, requires_grad=True)
    target, weight = torch.rand(3, 4, 8, 6, dtype=torch.float64), (torch.rand(3, 4) > 0.4).double()
    loss = pose.heat_map_loss(pred, target, weight)
    expected = sum(
        weight[b, k] * (pred[b, k, y, x] - target[b, k, y, x]) ** 2
        for b in range(3) for k in range(4) for y in range(8) for x in range(6)
    ) / (3 * 4 * 8 * 6)  # fmt: skip
    assert torch.isclose(loss, expected, rtol=1e-12)
    (gradient,) = torch.autograd.grad(loss, pred)
    (wanted,) = torch.autograd.grad(expected, pred)
    assert torch.allclose(gradient, wanted, rtol=1e-10, atol=0)


# ------------------------------------------------------------------------------------------ metrics

FLAT = np.full(17, 0.05)  # equal σ: with area 10,000 px² OKS = exp(−d² / 200)


def coco_case(truths, predictions):
    """truths: [(image, keypoints (17, 3))], predictions: [(image, xy (17, 2), score)]."""
    images = [{"id": i, "width": 500, "height": 500} for i in (1, 2)]
    annotations = [
        {"id": n, "image_id": image, "category_id": 1, "bbox": [0, 0, 100, 100], "area": 10000.0,
         "iscrowd": 0,
         "num_keypoints": int((k[:, 2] > 0).sum()), "keypoints": k.flatten().tolist()}
        for n, (image, k) in enumerate(truths, 1)
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


def person(seed):
    return np.c_[np.random.default_rng(seed).uniform(0, 100, (17, 2)), np.full(17, 2)]


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


def test_sigmas_are_published_ones_or_said_to_be_ours():
    sigmas, source = metrics.oks_sigmas(COCO_JOINTS)
    with_coco = COCOeval(iouType="keypoints").params.kpt_oks_sigmas
    assert np.allclose(sigmas, with_coco) and source.startswith("COCO")
    sigmas, source = metrics.oks_sigmas(mpii.MPII_JOINTS)
    assert source.startswith("our sigmas") and sigmas[[0, 6, 9, 10]].tolist() == [
        0.089,
        0.107,
        0.079,
        0.062,
    ]


def mpii_mat(path, n, seed=0):
    """An official ground-truth .mat of n people, as HRNet reads it; positions count from 1."""
    rng = np.random.default_rng(seed)
    missing = rng.random((16, n)) < 0.2
    positions = np.where(missing[:, None], np.nan, rng.uniform(1, 100, (16, 2, n)))
    mat = {"headboxes_src": rng.uniform(0, 60, (2, 2, n)), "jnt_missing": missing.astype(float)}
    scipy.io.savemat(path, mat | {"pos_gt_src": positions})
    return mat["headboxes_src"], missing, positions


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


def test_layer_decay_ids_and_groups():
    net = pose.PoseModel(
        model.ViT(32, 2, 2, (64, 48), 8, trainable_positions=True), pose.SimpleHead(32, 3), "add"
    )
    ids = {name: layer_of(name, 2) for name, _ in net.named_parameters()}
    for name in ("patch_embed.proj.weight", "cls_token", "pose_token", "pos_embed"):
        assert ids[f"encoder.{name}"] == 0
    assert {ids[f"encoder.blocks.{i}.attn.qkv.weight"] for i in range(2)} == {1, 2}
    assert ids["encoder.norm.weight"] == ids["head.final_layer.weight"] == 3
    groups = parameter_groups(net, 0.1, 0.5, 2)
    of = {id(p): g for g in groups for p in g["params"]}
    named = dict(net.named_parameters())
    assert of[id(named["encoder.pos_embed"])] == of[id(named["encoder.cls_token"])]
    assert (
        of[id(named["encoder.pos_embed"])]["lr_scale"] == 0.125
        and of[id(named["encoder.pos_embed"])]["weight_decay"] == 0
    )
    assert of[id(named["encoder.blocks.1.mlp.fc1.weight"])]["lr_scale"] == 0.5
    assert of[id(named["head.final_layer.weight"])]["lr_scale"] == 1


@pytest.mark.parametrize("tokens", ["drop", "add", "add_cls_pose"])
def test_tokens_decide_what_the_head_sees(tokens):
    torch.manual_seed(0)
    net = pose.PoseModel(model.ViT(32, 2, 2, (64, 48), 8), pose.SimpleHead(32, 3), tokens)
    x = torch.randn(2, 50, 32)
    net.encoder.forward = lambda images, drop_noise=None: x
    seen = []
    net.head.forward = lambda patches, grid: seen.append(patches)
    net(None)
    extra = {"drop": 0, "add": x[:, 1:2], "add_cls_pose": x[:, :1] + x[:, 1:2]}[tokens]
    assert torch.allclose(seen[0], x[:, 2:] + extra)


# ---------------------------------------------------------------------------------------- real runs


def test_a_sample_depends_on_seed_epoch_and_index_only(dots, tmp_path):
    people, _ = readers.read_pose_file(dots[0])
    cfg = read_config(finetune_pose.KEYS, "", [*QUICK, "seed=3"])
    dataset = pose.PosePictures(cfg, people, training=True)
    first = dataset[(1, 4)]
    dataset[(0, 2)]
    np.random.seed(1)
    assert torch.equal(dataset[(1, 4)]["image"], first["image"])
    assert not torch.equal(dataset[(2, 4)]["image"], first["image"])
    # joints stand on their dots after every augmentation, mirrored ones with left and right swapped
    palette, checked = np.random.default_rng(5).integers(30, 255, (17, 3)), 0
    cfg.half_body = 0
    for epoch in range(30):
        sample = dataset[(epoch, 0)]
        mirrored = np.linalg.det(sample["matrix"][:, :2]) < 0
        for j, (x, y, v) in enumerate(sample["keypoints"].tolist()):
            if v and 1 <= x < 46 and 1 <= y < 62:
                colour = sample["image"][:, round(y), round(x)].numpy().astype(float)
                mine = people.flip[j] if mirrored else j
                checked += np.abs(colour - palette[mine]).max() < 60
    assert checked > 150


def test_boxes_are_moved_in_training_as_mmposes_reader_does(dots):
    people, _ = readers.read_pose_file(dots[0])
    cfg = read_config(finetune_pose.KEYS, "", [*QUICK, "shift=1", "half_body=0"])
    still = read_config(finetune_pose.KEYS, "", [*QUICK, "shift=0", "half_body=0"])
    moved, plain = (pose.PosePictures(c, people, training=True) for c in (cfg, still))
    shifts = []
    for epoch in range(100):
        a, b = (d.augment(epoch, 3, people.keypoints[3].copy()) for d in (moved, plain))
        shifts.append((a[0] - b[0]) / people.boxes[3, 2:])
        assert np.array_equal(a[1], b[1]) and a[2:] == b[2:]  # the rest is as it was
    assert np.abs(shifts).max() <= 0.2 and np.abs(shifts).max(0).min() > 0.18
    assert np.abs(np.mean(shifts, 0)).max() < 0.03 and len(np.unique(shifts)) == 200
    # a half body has a centre of its own
    cfg.half_body = still.half_body = 1.0
    keypoints = people.keypoints[3].copy()
    keypoints[:, 2] = 2
    assert np.allclose(moved.augment(0, 3, keypoints)[0], plain.augment(0, 3, keypoints)[0])


def test_flip_test_mirrors_maps_and_swaps_sides(dots):
    """A perfect network, straight and mirrored: after averaging, peaks are high and in place."""
    people, _ = readers.read_pose_file(dots[1])
    cfg = read_config(finetune_pose.KEYS, "", [*QUICK, "batch=16", "padding=1.5"])
    dataset = pose.PosePictures(cfg, people, training=False)
    straight = torch.stack([dataset[(0, i)]["keypoints"] for i in range(len(dataset))])
    mirrored = straight[:, people.flip] * torch.tensor([-1.0, 1, 1]) + torch.tensor([47.0, 0, 0])
    mirrored[..., 2] = straight[..., 2] = 2
    answers = iter([pose.heat_maps(k, (64, 48), (32, 24))[0] for k in (straight, mirrored)])
    network = torch.nn.Module()
    network.forward = lambda images: next(answers)
    found = finetune_pose.find_poses(cfg, network, people, Ranks(0, 1, torch.device("cpu")))
    seen = people.keypoints[..., 2] > 0
    assert np.abs(found - people.keypoints)[seen][:, :2].max() < 0.1
    assert found[seen][:, 2].min() > 0.9


def test_overfits_one_batch_then_evaluates_and_predicts(dots, tmp_path):
    """Four people, no augmentation: joints are found again, also by the saved model."""
    document = json.loads(dots[0].read_text())
    document["annotations"] = document["annotations"][:4]
    path = tmp_path / "four.json"
    path.write_text(json.dumps(document))
    images = f"{dots[0].parent}/images"
    off = "flip=0 half_body=0 scale=0 rotation_p=0 drop_path=0 layer_decay=1 schedule=cosine"
    both = [*sets(path, path), f"train_images={images}", f"val_images={images}"]
    long = ["batch=4", "lr=5e-3", "epochs=300", "warmup_steps=20"]
    run(*both, *QUICK, *off.split(), *long, f"out={tmp_path}/run")
    out = tmp_path / "run"
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 300 and rows[-1]["loss"] < 0.2 * rows[0]["loss"]
    assert {"step", "loss", "lr", "grad_norm", "pictures_per_s"} <= set(rows[0]) and rows[0][
        "lr"
    ] > 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["AP"] > 0.6 and metrics["PCK@.2"] > 0.9 and metrics["people"] == 4
    files = "config.yaml curves.png done encoder.safetensors last.pt log.jsonl metrics.json "
    files += "model.safetensors overlays.png pck.png"
    assert sorted(f.name for f in out.iterdir()) == [*files.split(), "results.json", "run.json"]

    weights = f"weights={out}/model.safetensors"
    val = [f"val_annotations={path}", f"val_images={images}"]
    run("eval_only=true", weights, *val, *MACHINE, f"out={tmp_path}/again")
    assert (tmp_path / "again/results.json").read_bytes() == (out / "results.json").read_bytes()

    folder = tmp_path / "mine"
    folder.mkdir()
    for n, image in enumerate(document["images"][:3]):
        Image.open(f"{images}/{image['file_name']}").save(folder / f"{n}.png")
    run(f"predict={folder}", weights, *MACHINE, "padding=1", f"out={tmp_path}/whole")
    answer = tmp_path / "whole/predictions.json"
    check_fields(answer)
    people, _ = readers.read_pose_file(answer, folder)  # a valid COCO keypoint file
    assert (
        people.joints == COCO_JOINTS
        and len(people.files) == 3
        and (tmp_path / "whole/overlays.png").exists()
    )
    boxes = [{"file_name": "0.png", "bbox": document["annotations"][0]["bbox"], "score": 0.5}] * 2
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    run(
        f"predict={folder}",
        weights,
        *MACHINE,
        f"boxes={tmp_path}/boxes.json",
        f"out={tmp_path}/boxed",
    )
    (found,) = json.loads((tmp_path / "boxed/predictions.json").read_text())[
        "annotations"
    ]  # the copy is removed
    (wanted,) = [r for r in json.loads((out / "results.json").read_text()) if r["image_id"] == 1]
    joints, wanted_joints = (np.reshape(row["keypoints"], (17, 3)) for row in (found, wanted))
    sure = wanted_joints[:, 2:] >= 0.2
    assert 9 < sure.sum() and np.allclose(
        joints, np.where(sure, wanted_joints * [1, 1, 0] + [0, 0, 2], 0)
    )
    assert np.isclose(found["score"], 0.5 * wanted["score"])


def test_unsure_joints_of_predictions_are_missing(dots, tmp_path):
    """COCO: v = 0 and x = y = 0. So generate.py and pretrain.py neither draw nor mask them."""
    people, _ = readers.read_pose_file(dots[1])
    found = people.keypoints.copy()
    found[:, :, 2] = np.tile([0.19, 0.2, 0.9, -0.1], 5)[:17]
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps(readers.coco_document(people, found, np.ones(len(found)))))
    rows = json.loads(path.read_text())["annotations"]
    sure = np.tile([False, True, True, False], 5)[:17]
    for row, xy in zip(rows, found[:, :, :2]):
        joints = np.reshape(row["keypoints"], (17, 3))
        assert (
            not joints[~sure].any()
            and (joints[sure, 2] == 2).all()
            and row["num_keypoints"] == sure.sum()
        )
        assert (
            np.allclose(joints[sure, :2], xy[sure], atol=1e-3) and row["keypoint_scores"][0] == 0.19
        )
    again, _ = read_people(path, dots[1].parent / "images")
    assert ((again.keypoints[:, :, 2] > 0) == sure).all()


@pytest.mark.parametrize("world", [3])  # 12 people to train on, 7 to evaluate: 3, 2, 2
def test_ranks_equal_one_process_and_see_each_person_once(dots, tmp_path, world, monkeypatch):
    """The same steps, and each person evaluated once."""
    monkeypatch.setattr(finetune_pose, "build_optimizer", sgd)
    keys = [*sets(*dots), *QUICK, "head=classic", "epochs=2", "lr=1"]
    run(*keys, f"out={tmp_path}/one")
    run(*keys, "lr=0", f"out={tmp_path}/start")
    start = load_file(tmp_path / "start/model.safetensors")
    done = run_script(script(tmp_path), "sgd", *keys, f"out={tmp_path}/ranks", ranks=world)
    assert done.returncode == 0, done.stderr
    one, ranks = (
        [json.loads(line) for line in (tmp_path / run_ / "log.jsonl").read_text().splitlines()]
        for run_ in ("one", "ranks")
    )
    assert len(one) == len(ranks) == 4
    for a, b in zip(one, ranks):
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-4)
        assert math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=1e-3)
    a, b = (load_file(tmp_path / run_ / "model.safetensors") for run_ in ("one", "ranks"))
    moved = {name: (a[name] - start[name]).abs().max() for name in a}
    assert moved["encoder.blocks.0.attn.qkv.weight"] > 1e-4
    for name in a:
        assert (a[name] - b[name]).abs().max() <= 0.02 * moved[name] + 1e-6, name
    one, ranks = (
        json.loads((tmp_path / run_ / "results.json").read_text()) for run_ in ("one", "ranks")
    )
    assert [r["image_id"] for r in ranks] == [r["image_id"] for r in one] == [1, 2, 3, 4, 5, 6, 7]
    assert np.allclose([r["score"] for r in one], [r["score"] for r in ranks], atol=1e-3)


def test_killed_and_resumed_is_bitwise_the_same(dots, tmp_path):
    keys = [*sets(*dots), *QUICK, "epochs=15", "save_every=4"]
    run(*keys, f"out={tmp_path}/whole")
    for workers in (0, 2):
        out = tmp_path / f"killed{workers}"
        command = [*keys, f"workers={workers}", f"out={out}"]
        assert kill_after(script(tmp_path), *command, lines=6, log=out / "log.jsonl")
        assert (out / "last.pt").exists() and not (out / "done").exists()
        run(*keys, f"workers={workers}", f"out={out}")
        for name in (
            "model.safetensors",
            "encoder.safetensors",
            "results.json",
            "metrics.json",
            "overlays.png",
        ):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
        lines = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
        assert lines == list(range(1, 31))


def test_a_run_folder_is_never_overwritten(dots, tmp_path, capsys):
    keys = [*sets(*dots), *QUICK, f"out={tmp_path}/run"]
    run(*keys)
    before = {f: f.read_bytes() for f in (tmp_path / "run").iterdir()}
    run(*keys)
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(UserError, match="another config.*lr"):
        run(*keys, "lr=0.1")
    assert {f: f.read_bytes() for f in (tmp_path / "run").iterdir()} == before


def test_starts_from_a_pretrained_encoder_with_another_input_size(dots, tmp_path, capsys):
    torch.manual_seed(0)
    vit = model.ViT(32, 2, 2, (64, 32), 8)
    save_weights(tmp_path / "encoder.safetensors", vit, **meta_of(vit))
    keys = [k for k in QUICK if not k.startswith(("size", "patch"))]
    keys += [f"encoder={tmp_path}/encoder.safetensors", "tokens=add", "lr=0"]
    run(*sets(*dots), *keys, f"out={tmp_path}/run")
    assert "not in the file: none" in capsys.readouterr().err
    tuned = load_file(tmp_path / "run/encoder.safetensors")
    assert torch.equal(
        tuned["blocks.1.mlp.fc1.weight"], vit.state_dict()["blocks.1.mlp.fc1.weight"]
    )
    image = vit.pos_embed.transpose(1, 2).unflatten(2, (8, 4))
    resized = torch.nn.functional.interpolate(
        image, size=(8, 6), mode="bicubic", align_corners=False
    )
    assert torch.allclose(tuned["pos_embed"], resized.flatten(2).transpose(1, 2), atol=1e-6)


def test_non_finite_loss_names_step_rank_and_pictures(dots, tmp_path):
    with pytest.raises(UserError, match=r"non-finite .* step [12] on rank\(s\) \[0\].*0_\d+\.png"):
        run(*sets(*dots), *QUICK, "epochs=9", "lr=1e30", "clip_grad=0", f"out={tmp_path}/run")
    assert not (tmp_path / "run/last.pt").exists()


# ----------------------------------------------------------------------------------- official files

FORMATS = {
    "coco": ("coco/test_coco.json", 17, None),
    "coco_boxes": ("coco/test_coco.json", 17, "coco/test_coco_det_AP_H_56.json"),
    "mpii": ("mpii/test_mpii.json", 16, None),
    "aic": ("aic/test_aic.json", 14, None),
    "crowdpose": ("crowdpose/test_crowdpose.json", 14, None),
    "crowdpose_boxes": (
        "crowdpose/test_crowdpose.json",
        14,
        "crowdpose/test_crowdpose_det_AP_40.json",
    ),
    "ochuman": ("ochuman/test_ochuman.json", 17, None),
}


@needs_data
@pytest.mark.parametrize("name", FORMATS)
def test_official_formats_are_read_tuned_on_and_evaluated(name, tmp_path, monkeypatch):
    path, n_joints, boxes = FORMATS[name]
    path = f"{DATA}/formats/{path}"
    extra = [f"boxes={DATA}/formats/{boxes}"] if boxes else []
    if name == "mpii":
        mpii_mat(tmp_path / "gt.mat", 5)
        extra = [f"mpii_mat={tmp_path}/gt.mat"]
    run(*sets(path, path), *QUICK, "batch=2", "limit=4", *extra, f"out={tmp_path}/run")
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert 0 <= metrics["AP"] <= 1 and len(results[0]["keypoints"]) == 3 * n_joints
    assert ("our sigmas" in metrics["oks_sigmas"]) == (name == "mpii")
    assert ("PCK@.2" in metrics) == (boxes is None) and ("PCKh@.5" in metrics) == (name == "mpii")


@needs_data
def test_true_poses_score_one_on_official_files():
    """Annotated joints handed in as results: AP 1, crowds and people without joints included."""
    for path in (
        "formats/coco/test_coco.json",
        "formats/crowdpose/test_crowdpose.json",
        "lspet/val.json",
    ):
        people, _, document = readers.read_truth(f"{DATA}/{path}")
        rows = [
            {"image_id": int(i), "category_id": 1, "score": 0.9, "keypoints": k.flatten().tolist()}
            for i, k in zip(people.image_id, people.keypoints)
        ]
        figures = metrics.coco_metrics(document, rows, metrics.oks_sigmas(people.joints)[0])
        assert np.isclose(figures["AP"], 1) and np.isclose(figures["AR"], 1), path


@needs_data
def test_mpii_boxes_and_joints_follow_the_published_rule():
    people, _, document = readers.read_truth(f"{DATA}/formats/mpii/test_mpii.json")
    row = json.loads(Path(f"{DATA}/formats/mpii/test_mpii.json").read_text())[0]
    side, (x, y) = 200 * row["scale"], row["center"]
    expected = [x - 1 - side / 2, y + 15 * row["scale"] - 1 - side / 2, side, side]
    assert np.allclose(people.boxes[0], expected, rtol=1e-5)
    assert people.keypoints[0, 0].tolist() == [803, 710, 2]
    assert people.size[0].tolist() == list(Image.open(f"{DATA}/formats/mpii/{row['image']}").size)
    assert len(document["images"]) == len({r.decode() for r in people.files})


def mpii_list(folder, name="Zoë.png", **changes):
    Image.new("RGB", (80, 120)).save(folder / name)
    row = {
        "image": name,
        "center": [40, 60],
        "scale": 0.4,
        "joints": [[9, 9]] * 16,
        "joints_vis": [1] * 16,
    }
    (folder / "list.json").write_text(json.dumps([row, row | changes]))
    return folder / "list.json"


def test_picture_names_of_any_language(tmp_path):
    people, _, document = readers.read_truth(mpii_list(tmp_path))
    assert document["images"][0]["file_name"] == "Zoë.png" and people.files[0].decode() == "Zoë.png"
    people, images = readers.read_own(tmp_path, COCO_JOINTS, [], Limits())
    (tmp_path / "boxes.json").write_text(
        json.dumps([{"file_name": "Zoë.png", "bbox": [1, 2, 30, 40]}])
    )
    people, _, _ = readers.read_boxes(tmp_path / "boxes.json", images, people, Limits())
    assert people.files[0].decode() == "Zoë.png" and people.size.tolist() == [[80, 120]]


def test_ids_as_text_and_rows_of_other_categories_change_no_figure(dots, tmp_path):
    def figures(path):
        people, _, document = readers.read_truth(path, f"{dots[0].parent}/images")
        found = people.keypoints + np.array([3, 0, 0], np.float32)
        rows = zip(people.image_id.tolist(), found.reshape(len(found), -1).tolist())
        results = [{"image_id": i, "category_id": 1, "keypoints": k, "score": 1.0} for i, k in rows]
        return metrics.coco_metrics(document, results, metrics.oks_sigmas(people.joints)[0])

    document = json.loads(dots[1].read_text())
    for entry in document["images"] + document["annotations"]:
        entry.update({key: str(entry[key]) for key in ("id", "image_id") if key in entry})
    document["annotations"].append(
        {"id": 99, "image_id": 1, "category_id": 2, "bbox": [0, 0, 9, 9]}
    )
    document["annotations"][0].pop("category_id")
    (tmp_path / "text.json").write_text(json.dumps(document))
    assert 0 < figures(dots[1])["AP"] < 1 and figures(tmp_path / "text.json") == figures(dots[1])


def test_truth_given_as_scores_counts_the_same_joints_everywhere(tmp_path):
    path = people_file(tmp_path, 3)
    document = json.loads(path.read_text())
    for row in document["annotations"]:
        row["keypoints"][2::3] = [0.05, 0.9] * 8 + [0.2]
    path.write_text(json.dumps(document))
    people, _, document = readers.read_truth(path)
    assert people.keypoints[:, :, 2].tolist() == [[0, 2] * 8 + [2]] * 3
    for row in document["annotations"]:
        assert row["keypoints"][2::3] == [0, 2] * 8 + [2] and row["num_keypoints"] == 9


# ---------------------------------------------------------------------------------------- CrowdPose


def crowd_file(folder, levels=(0.1, 0.15, 0.2, 0.79, 0.8, 1.0), change=None):
    """One person a picture. Areas are nonsense, which CrowdPose's evaluator never reads."""
    path = people_file(folder, len(levels), 6, "crowd.json", readers.CROWDPOSE_JOINTS)
    document = json.loads(path.read_text())
    for image, level in zip(document["images"], levels):
        image["crowdIndex"] = level
    for a in document["annotations"]:
        a["area"] = 1.0
    if change:
        change(document)
    path.write_text(json.dumps(document))
    return path


def crowd_figures(path, move=0.0):
    """Metrics of the annotated joints moved by `move` · √(.53 · box area)."""
    people, notes, document = readers.read_truth(path)
    results = []
    for i, box, keypoints in zip(people.image_id.tolist(), people.boxes, people.keypoints):
        shift = move * math.sqrt(0.53 * box[2] * box[3])
        rows = (keypoints + [shift, 0, 0]).flatten().tolist()
        results.append({"image_id": i, "category_id": 1, "keypoints": rows, "score": 0.5})
    return (
        metrics.coco_metrics(document, results, metrics.oks_sigmas(people.joints)[0]),
        people,
        notes,
    )


def test_crowdpose_counts_whom_the_file_counts(tmp_path):
    """Head and neck are not counted in num_keypoints: who has no other joint is not looked for."""

    def change(document):
        for a in document["annotations"][:2]:
            visible = np.reshape(a["keypoints"], (14, 3))
            visible[:12] = 0
            visible[12:, 2] = 2
            a.update(keypoints=visible.flatten().tolist(), num_keypoints=0)

    figures, people, _ = crowd_figures(crowd_file(tmp_path, change=change))
    assert len(people.files) == 4 and figures["AP"] > 0.999 and figures["AR"] > 0.999


def test_crowdposes_area_is_half_the_box_whatever_the_file_says(tmp_path):
    """OKS of a shift by m·√area: the mean over joints of exp(−m² / 2(2σ)²)."""
    figures, people, _ = crowd_figures(crowd_file(tmp_path), move=0.06)
    sigmas, _ = metrics.oks_sigmas(people.joints)
    each = np.exp(-(0.06**2) / (2 * (2 * sigmas) ** 2))
    oks = [each[k[:, 2] > 0].mean() for k in people.keypoints]
    right = (np.array(oks)[:, None] >= np.arange(0.5, 1, 0.05)).mean(0)
    assert figures["AR"] == pytest.approx(right.mean(), abs=1e-6) and 0.5 < figures["AR"] < 1
    assert figures["AP_medium"] is not None  # 1 px² would be too small for it


def test_ap_of_easy_medium_and_hard_pictures(tmp_path):
    """The bounds .2 and .8 of CrowdPose's evaluator; each level has two pictures here."""
    path = crowd_file(tmp_path)
    people, _, document = readers.read_truth(path)
    far = {3: 0.0, 5: 900.0, 6: 900.0}  # medium: one of two is found; hard: none is
    results = [{"image_id": i, "category_id": 1, "score": 0.5} for i in people.image_id.tolist()]
    for row, keypoints in zip(results, people.keypoints):
        row["keypoints"] = (keypoints + [far.get(row["image_id"], 0), 0, 0]).flatten().tolist()
    results = [row for row in results if row["image_id"] != 4]
    figures = metrics.coco_metrics(document, results, metrics.oks_sigmas(people.joints)[0])
    assert figures["AP_crowd_easy"] > 0.999 and figures["AP_crowd_hard"] == 0
    assert figures["AP_crowd_medium"] == pytest.approx(51 / 101)  # precision 1 up to recall .5
    easy = metrics.coco_metrics(
        document, results, metrics.oks_sigmas(people.joints)[0], {3, 4, 5, 6}
    )
    assert easy["AP_crowd_hard"] is None and easy["AP"] > 0.999


def test_crowd_figures_equal_xtcocotools(tmp_path):
    """These nine figures are what xtcocotools 1.14.3 (keypoints_crowd) says of this same file."""
    rng = np.random.default_rng(0)
    path = crowd_file(tmp_path, np.linspace(0, 1, 24).round(3).tolist())
    people, _, document = readers.read_truth(path)
    noise = rng.normal(0, 6, (24, 14, 3)) * [1, 1, 0]
    rows = (people.keypoints + noise).reshape(24, -1).tolist()
    results = [
        {"image_id": int(i), "category_id": 1, "keypoints": row, "score": float(rng.random())}
        for i, row in zip(people.image_id, rows)
    ]
    ours = metrics.coco_metrics(document, results, metrics.oks_sigmas(people.joints)[0])
    names = "AP AP50 AP75 AR AR50 AR75 AP_crowd_easy AP_crowd_medium AP_crowd_hard".split()
    theirs = [0.434689, 1, 0.25165, 0.5125, 1, 0.416667, 0.4486, 0.4392, 0.527]
    assert [ours[name] for name in names] == pytest.approx(theirs, abs=1e-4)


def test_pictures_listed_with_their_sides_swapped_keep_their_own(tmp_path):
    """As in CrowdPose's old lists of train and test. A picture of another size stays an error."""

    def swap(document):
        for image in document["images"]:
            image["width"], image["height"] = image["height"], image["width"]

    figures, people, notes = crowd_figures(crowd_file(tmp_path, change=swap))
    plain = readers.read_pose_file(crowd_file(tmp_path / "plain"))[0]
    assert np.array_equal(people.size, plain.size) and np.array_equal(people.boxes, plain.boxes)
    assert notes["turned"] == 6 and "swapped: 6" in readers.said(notes) and figures["AP"] > 0.999
    path = crowd_file(tmp_path, change=lambda d: d["images"][2].update(width=999))
    with pytest.raises(UserError, match=r"6_3.png is .* but its annotation says"):
        readers.read_pose_file(path)


# ---------------------------------------------------------------------------------------- bad input


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
    "no categories": (lambda d, f: d.pop("categories"), "categories"),
    "unknown image": (lambda d, f: d["annotations"][0].update(image_id=99), "image id 99"),
    "joint count": (
        lambda d, f: d["annotations"][0].update(keypoints=[1, 2, 2]),
        "3 keypoint values",
    ),
    "box outside": (lambda d, f: d["annotations"][0].update(bbox=[900, 900, 5, 5]), "outside"),
    "not finite": (lambda d, f: d["annotations"][0]["bbox"].__setitem__(0, float("nan")), "finite"),
    "other joints": (lambda d, f: d["categories"][0]["keypoints"].reverse(), "joint sets differ"),
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
    with pytest.raises(UserError, match="entry 2 .*max_bad_boxes=1"):
        readers.read_pose_file(listed)
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


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("finetune_pose_*.yaml")), ids=lambda path: path.stem
)
def test_configs_are_read(path):
    cfg = read_config(finetune_pose.KEYS, "", ["--cfg", str(path)])
    assert cfg.height / cfg.width == 4 / 3 and cfg.tokens == "drop"
