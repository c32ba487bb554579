"""Part-guided masks against a plain loop and the released generator's statistics."""

import math

import numpy as np
import torch

import data
from data import part_guided_mask, random_mask

GRID, PATCH = (16, 8), 16

# The six body parts of HAP (arXiv 2310.20695, its mask_strategy.py) as links of COCO's 17 joints.
HAPS_PARTS = (
    ((0, 1), (0, 2), (1, 2), (1, 3), (2, 4)),
    ((5, 7), (7, 9)),
    ((6, 8), (8, 10)),
    ((11, 13), (13, 15)),
    ((12, 14), (14, 16)),
    ((6, 11), (5, 12)),
)


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
    for links in HAPS_PARTS:
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
