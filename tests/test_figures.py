"""docs/figures.py: both drawings come out, and the mask that is shown is the one that data.py makes
of the same noise.
"""

import importlib.util

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from PIL import Image, ImageColor
from test_masks import loop_mask

from data import block_mask, noise_parts, part_guided_mask

NAMES = ["architecture.png", "mask_levels.png"]


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs/figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    out = tmp_path_factory.mktemp("figures") / "new"
    done = run_script("docs/figures.py", out)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return out


def filled(figures, path, panel):
    """bool (N,): which patches of a panel of mask_levels.png have one of the levels' colours."""
    colours = figures.BLOCK, figures.REST, *figures.PART_COLOURS
    colours = np.array([ImageColor.getrgb(colour) for colour in colours])
    pixels = np.array(Image.open(path).convert("RGB")).astype(int)
    (h, w), side = figures.GRID, figures.SIDE
    x = figures.LEFT[panel] + side // 2 + side * np.arange(w)
    y = figures.TOP + side // 2 + side * np.arange(h)
    # Five pixels across the middle of each patch: a picture is never as even. The palette may move
    # a colour by a grey level or two.
    near = pixels[y[:, None, None], x[None, :, None] + np.arange(-8, 9, 4)]  # (h, w, 5, 3)
    distance = np.abs(near[..., None, :] - colours).max(-1)  # (h, w, 5, colours)
    return (distance <= 4).all(2).any(2).ravel()


def test_both_drawings_come_out_and_are_those_of_the_documents(drawn):
    assert sorted(path.name for path in drawn.iterdir()) == NAMES
    for name in NAMES:
        kept = ROOT / "docs" / name
        assert kept.stat().st_size < 200_000
        with Image.open(drawn / name) as new, Image.open(kept) as old:
            assert new.size == old.size and new.getpixel((2, 2)) == old.getpixel((2, 2))
            difference = np.array(new.convert("RGB")).astype(int) - np.array(old.convert("RGB"))
        assert np.abs(difference).mean() < 3  # another Pillow may choose another palette


def test_the_mask_shown_is_the_real_one(figures, drawn):
    _, keypoints = figures.people()
    noise = figures.NOISE[0][None]
    mask = part_guided_mask(keypoints, (16, 8), 0.5, 16, noise=noise)[0].numpy()
    assert mask.sum() == 64
    assert np.array_equal(filled(figures, drawn / "mask_levels.png", 4), mask)
    assert np.array_equal(mask, loop_mask(keypoints[0].numpy(), noise[0].numpy())[0])
    block = block_mask(noise[:, : noise_parts((16, 8))[0]], (16, 8), 64)[0].numpy()
    assert np.array_equal(filled(figures, drawn / "mask_levels.png", 2), block)


@pytest.mark.parametrize("view", [0, 1])
def test_levels_are_those_of_a_plain_loop(figures, view):
    """Patches of the parts that come first: as many as the loop takes, each inside its part."""
    _, keypoints = figures.people()
    noise = figures.NOISE[view][None]
    parts, block, mask = figures.levels(keypoints, noise)
    expected, front = loop_mask(keypoints[0].numpy(), noise[0].numpy())
    assert np.array_equal(mask.numpy(), expected)
    masks = torch.stack([torch.zeros_like(mask), *(patches for _, patches in parts)])
    assert masks.sum() == masks.any(0).sum() == front
    own = figures.part_patches(keypoints, (16, 8), 16)[0]
    assert all((own[part] & patches == patches).all() for part, patches in parts)
    # Nothing of a lower level before a higher one is used up.
    assert (masks.any(0) <= mask).all()
    rest = mask & ~block & ~masks.any(0)
    assert not rest.any() or (block <= mask).all()


def test_no_level_of_the_drawing_is_empty(figures, drawn):
    _, keypoints = figures.people()
    parts, block, mask = figures.levels(keypoints, figures.NOISE[0][None])
    first = torch.stack([patches for _, patches in parts]).any(0)
    rest = mask & ~block & ~first
    assert len(parts) == 3 and all(patches.any() for _, patches in parts) and rest.any()
    for panel, patches in ((1, first), (3, rest)):
        shown = filled(figures, drawn / "mask_levels.png", panel)
        assert np.array_equal(shown, patches.numpy())
