"""The way of a person into the pose network and back: regions, warps, half bodies, heat maps and
their decoding, against loops and hand-worked cases.
"""

import math
import random

import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image
from pose_runs import person

from formats.joints import COCO_JOINTS
from tasks import pose

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


def test_a_missing_joint_may_be_anything():
    keypoints = torch.tensor([[[math.nan, 3.0, 0.0], [20.0, 30.0, 2.0]]])
    maps, weight = pose.heat_maps(keypoints, (64, 48), (16, 12))
    pred = torch.rand(1, 2, 16, 12, requires_grad=True)
    pose.heat_map_loss(pred, maps, weight).backward()
    assert weight.tolist() == [[0, 1]]
    assert (pred.grad[:, 0] == 0).all() and (pred.grad[:, 1] != 0).all()
