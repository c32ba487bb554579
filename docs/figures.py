"""The two drawings that explain the method, of a real puppet person under real masks.

  python docs/figures.py            # both, into docs/
  python docs/figures.py FOLDER     # both, into FOLDER

architecture.png: pictures of a pose → ViT with [CLS] and [POSE] → decoder and the three losses.
mask_levels.png: the order of a part-guided mask. On white, for light and dark pages.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

import puppet
from data import PARTS, block_mask, noise_parts, noise_size, part_guided_mask, part_patches

SIZE, GRID, PATCH, RATIO = (256, 128), (16, 8), 16, 0.5
POSE, PEOPLE = 32, (6, 0, 1, 2)  # four people in one of the puppet's poses
SEEDS = (2721, 5)  # of the two masks; in the first no level is empty, which is rare
NOISE = [torch.rand(noise_size(GRID), generator=torch.Generator().manual_seed(s)) for s in SEEDS]
# Okabe and Ito's colours, which the colour-blind can tell apart.
PART_NAMES = ("head", "left arm", "right arm", "left leg", "right leg", "torso")
PART_COLOURS = ("#E69F00", "#56B4E9", "#D55E00", "#0072B2", "#CC79A7", "#009E73")
NOTHING = torch.zeros(GRID[0] * GRID[1], dtype=torch.bool)  # no patch
BLOCK, REST, INK = "#404040", "#999999", "#222222"
GREEN, RED, BLUE = "#009E73", "#D55E00", "#0072B2"  # L_rec, L_align, L_mp
# mask_levels.png in px: left edge of each panel, top edge, side of a patch.
LEFT, TOP, SIDE, CANVAS = (32, 348, 664, 980, 1296), 50, 34, (1600, 720)
plt.rcParams.update({"figure.dpi": 160, "font.size": 9.5, "text.color": INK})


def people():
    """→ pictures (4, H, W, 3) float 0 to 1 of four people in one pose, keypoints (1, 17, 3) px."""
    keys = [(POSE, k) for k in PEOPLE]
    poses = puppet.take(puppet.sample_poses(0, [POSE]), np.zeros(len(keys), int))
    who, where = puppet.sample_identities(0, keys), puppet.sample_scenes(0, keys)
    made = puppet.render(poses, who, where, SIZE)
    return made["image"] / 255, torch.from_numpy(made["keypoints"][:1])


def levels(keypoints, noise):
    """One mask, level by level. keypoints (1, 17, 3) px, noise (1, noise_size) →

    parts: [(number of the part, its patches that come first)] in their order; block: the whole
    block mask; mask: the part-guided mask. Patches are bool (N,).
    """
    block, order, k, amount, _, _ = noise.split(noise_parts(GRID), 1)
    wanted = (part_patches(keypoints, GRID, PATCH).sum(2) * amount * 0.3).long()[0]
    before, n, parts = NOTHING, 0, []
    for part in order[0].argsort()[: int(k * 7)].tolist():
        # The mask of a budget that ends with this part holds it and the parts before it alone.
        n += int(wanted[part])
        front = part_guided_mask(keypoints, GRID, n / len(NOTHING), PATCH, noise=noise)[0]
        parts, before = [*parts, (part, front & ~before)], front
    mask = part_guided_mask(keypoints, GRID, RATIO, PATCH, noise=noise)[0]
    return parts, block_mask(block, GRID, round(RATIO * len(NOTHING)))[0], mask


def save(figure, path):
    """PNG with a palette of 256 colours, a third of the bytes."""
    figure.savefig(path)
    palette = Image.open(path).convert("RGB").quantize(256, kmeans=1, dither=Image.Dither.NONE)
    palette.save(path, optimize=True)


def panel(figure, left, picture, title, note=""):
    """Axes in patches, upper left corner 0, over `picture`; the note stands below."""
    (h, w), (W, H) = GRID, CANVAS
    axes = figure.add_axes((left / W, 1 - (TOP + h * SIDE) / H, w * SIDE / W, h * SIDE / H))
    axes.imshow(picture, extent=(0, w, h, 0), interpolation="nearest")
    axes.set(autoscale_on=False)
    axes.axis("off")
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=7)
    axes.text(0, h + 0.4, note, va="top", linespacing=1.35)
    return axes


def fill(axes, patches, colour, alpha=1.0, stripe=(0, 1)):
    """Paint the patches of a bool (N,); stripe: from where to where across each."""
    for i in patches.nonzero().flatten().tolist():
        corner, width = (i % GRID[1] + stripe[0], i // GRID[1]), stripe[1] - stripe[0]
        axes.add_patch(Rectangle(corner, width, 1, facecolor=colour, lw=0, alpha=alpha))


def draw_parts(axes, own, keypoints):
    """own (6, N) bool: the patches of each part. A patch of several parts shows stripes."""
    for i, n in enumerate(own.sum(0).tolist()):
        one = torch.arange(own.shape[1]) == i
        for k, part in enumerate(own[:, i].nonzero().flatten().tolist()):
            fill(axes, one, PART_COLOURS[part], 0.75, (k / n, (k + 1) / n))
    x, y = (keypoints[0, :, :2] + 0.5).T / PATCH
    for a, b in [link for part in PARTS for link in part]:
        axes.plot(x[[a, b]], y[[a, b]], color=INK, lw=1.6, solid_capstyle="round")
    for part, name in enumerate(PART_NAMES):
        column, row = 4.4 * (part // 3), GRID[0] + 0.5 + 0.9 * (part % 3)
        axes.add_patch(Rectangle((column, row), 0.6, 0.6, color=PART_COLOURS[part], clip_on=False))
        axes.text(column + 0.85, row + 0.3, name, va="center")


def draw_levels(path):
    pictures, keypoints = people()
    parts, block, mask = levels(keypoints, NOISE[0][None])
    own = part_patches(keypoints, GRID, PATCH)[0]  # (6, N)
    pale = 0.45 * pictures[0] + 0.55
    rest = mask & ~block & ~torch.stack([front for _, front in parts]).any(0)
    figure = plt.figure(figsize=(CANVAS[0] / 160, CANVAS[1] / 160))
    draw_parts(panel(figure, LEFT[0], pale, "the six parts"), own, keypoints)
    lines = [f"{PART_NAMES[p]}: {f.sum()} of {own[p].sum()} patches" for p, f in parts]
    first = panel(figure, LEFT[1], pale, "1  parts first", "\n".join(lines))
    for part, _ in parts:
        fill(first, own[part], PART_COLOURS[part], alpha=0.3)
    text = f"random rectangles: {block.sum()}\nof at most {mask.sum()} patches"
    fill(panel(figure, LEFT[2], pale, "2  block mask", text), block, BLOCK)
    fill(panel(figure, LEFT[3], pale, "3  the rest", f"{rest.sum()} more, at random"), rest, REST)
    text = f"{mask.sum()} of {len(mask)} patches\nare hidden"
    whole = panel(figure, LEFT[4], pictures[0], "part_guided_mask", text)
    fill(whole, mask & block, BLOCK)
    fill(whole, rest, REST)
    for part, front in parts:
        fill(first, front, PART_COLOURS[part])
        fill(whole, front & mask, PART_COLOURS[part])
    save(figure, path)


def box(axes, place, text, colour=INK, **style):
    """place: x, y, width, height."""
    (x, y, width, height), shape = place, "round,pad=0,rounding_size=0.8"
    style = dict(facecolor="white", edgecolor=colour, lw=1.6, zorder=3, boxstyle=shape) | style
    axes.add_patch(FancyBboxPatch((x, y), width, height, **style))
    axes.text(x + width / 2, y + height / 2, text, color=colour, ha="center", va="center")


def arrow(axes, start, end, colour=INK, style="-|>"):
    look = dict(arrowstyle=style, color=colour, lw=1.5, shrinkA=0, shrinkB=0, mutation_scale=11)
    axes.annotate("", end, start, arrowprops=look, zorder=2)


def show(axes, picture, x, y, mask=NOTHING, grey=0.45):
    """A picture, its masked patches grey, from x on and around the height y."""
    hidden = np.kron(mask.view(GRID), np.ones((PATCH, PATCH)))[..., None]
    axes.imshow(np.where(hidden, grey, picture), extent=(x, x + 7, y - 7, y + 7), zorder=3)


def draw_architecture(path):
    pictures, keypoints = people()
    masks = [levels(keypoints, noise[None])[2] for noise in NOISE]
    axes = plt.figure(figsize=(10, 6)).add_axes((0, 0, 1, 1))
    one, two, three, middle = 50, 27, 8, 38.5
    show(axes, pictures[0], 1, middle)
    axes.text(1, middle + 7.6, "one picture,\ntwo masks")
    for name, y, mask in zip(("view 1", "view 2"), (one, two), masks):
        arrow(axes, (8.6, middle), (15.2, y))
        show(axes, pictures[0], 15.5, y, mask)
        axes.text(15.5, y + 7.6, name)
        show(axes, pictures[0], 89, y, ~mask, 0.93)
        arrow(axes, (72.6, y), (76, y))
    for x, picture in zip((0.9, 8.2, 15.5), pictures[1:]):
        show(axes, picture, x, three)
    axes.text(1, three + 7.6, "others of the pose,\nmasked too (not shown)")
    box(axes, (27, 2, 8, 56), "ViT\n\nencoder:\nvisible\npatches\nalone", facecolor="#F2F2F2")
    for y in (one, two, three):
        arrow(axes, (22.8, y), (26.6, y))
        arrow(axes, (35.3, y), (38.6, y))
        box(axes, (39, y - 4.5, 33.5, 9), "", "#888888", lw=1, facecolor="#FAFAFA", zorder=1)
        box(axes, (40.5, y - 3, 9, 6), "[CLS]", RED)
        box(axes, (54.5, y - 3, 9, 6), "[POSE]", BLUE)
        for i in range(6):
            corner = 65.2 + 2.3 * (i % 3), y + 0.3 - 2.4 * (i // 3)
            axes.add_patch(Rectangle(corner, 1.7, 1.9, facecolor="white", edgecolor=INK, zorder=3))
    axes.text(39, one + 5.2, "tokens: [CLS], [POSE], visible patches")
    box(axes, (76.3, 20, 7.5, 38), "Decoder\n\nmask\ntokens\nfill the\ngaps", facecolor="#F2F2F2")
    axes.text(92.5, 57.6, "target patches", ha="center")
    arrow(axes, (84, middle), (86.3, middle), GREEN)
    for y, side in ((one, -1), (two, 1)):
        arrow(axes, (92.5, y + side * 7), (92.5, middle - side * 3.1), GREEN)
        arrow(axes, (45, y + side * 3), (45, middle - side * 4.1), RED)
    arrow(axes, (59, one - 3), (59, two + 3), BLUE, "<|-|>")
    arrow(axes, (59, two - 3), (59, 21.9), BLUE)
    arrow(axes, (59, three + 3), (59, 13.1), BLUE)
    box(axes, (86.5, middle - 3, 12, 6), "L_rec\npatch_error", GREEN)
    box(axes, (38, middle - 4, 14, 8), "L_align\nalignment_loss\n2 views of a picture", RED)
    box(axes, (50, 13.5, 18, 8), "L_mp\nmulti_positive_loss\nall pictures of a pose", BLUE)
    axes.text(76, 4, "L = L_rec\n+ γ1·L_align + γ2·L_mp\nγ1 = γ2 = 0.05", fontsize=12)
    axes.set(xlim=(0, 100), ylim=(0, 60), aspect="equal")
    axes.axis("off")
    save(axes.figure, path)


if __name__ == "__main__":
    out = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
    out.mkdir(parents=True, exist_ok=True)
    draw_architecture(out / "architecture.png")
    draw_levels(out / "mask_levels.png")
