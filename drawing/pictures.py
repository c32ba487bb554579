"""What every drawing needs: skeletons as a generator's condition, overlays, labelled grids of pictures.

Legend: K joints · H, W picture (pixels) · xy in pixels, origin at the top left corner · a picture is a PIL RGB image.
Knows nothing of configs or stages. Everything is drawn with Pillow; text is set in the DejaVu that matplotlib brings.
"""

import math
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from common import write_atomic
from data import IMAGENET_MEAN, IMAGENET_STD

# --------------------------------------------------------------------------------------- conditions for a generator

# A joint is drawn from this score on [T2I-Adapter]. COCO's visibility 0/1/2 works as a score: labelled (> 0) is drawn.
SCORE_FLOOR = 0.1

# Keypose drawing, RGB as the adapter must see it [T2I-Adapter]: the colours carry meaning for its weights.
MIDDLE, LEFT, RIGHT = (255, 153, 51), (0, 255, 0), (0, 128, 255)
KEYPOSE_JOINTS = [MIDDLE] * 5 + [LEFT, RIGHT] * 6  # COCO-17: five of the face, then left and right in turn
KEYPOSE_LINKS = [  # (joint, joint, colour), COCO ids, in the published order: a later link lies on top
    *((15, 13, LEFT), (13, 11, LEFT), (16, 14, RIGHT), (14, 12, RIGHT)),
    *((11, 12, MIDDLE), (5, 11, MIDDLE), (6, 12, MIDDLE), (5, 6, MIDDLE)),
    *((5, 7, LEFT), (6, 8, RIGHT), (7, 9, LEFT), (8, 10, RIGHT)),
    *((a, b, MIDDLE) for a, b in ((1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6))),
]

# OpenPose drawing [OpenPose, ControlNet]. 18 joints: nose, neck, right arm, left arm, right leg, left leg, eyes, ears.
OPENPOSE_FROM_COCO = [0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3]  # None: neck
OPENPOSE_LINKS = [  # 1-based, as published
    *((2, 3), (2, 6), (3, 4), (4, 5), (6, 7), (7, 8), (2, 9), (9, 10), (10, 11)),
    *((2, 12), (12, 13), (13, 14), (2, 1), (1, 15), (15, 17), (1, 16), (16, 18)),
]
OPENPOSE_COLOURS = [
    *((255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0)),
    *((0, 255, 0), (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255)),
    *((0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85)),
]


def draw_keypose(people, size):
    """Condition of the keypose T2I-Adapter: black canvas, joints of radius 2, links 3 px wide.

    [T2I-Adapter]; 3 px are what OpenCV covers for the thickness 2 of its annotator.
    people: sequence of (17, 3) arrays, COCO-17 order, x and y in pixels, score or visibility. size: (W, H).
    """
    # deviates from T2I-Adapter: its annotator draws the first two people, ours everyone.
    canvas = Image.new("RGB", size)
    draw = ImageDraw.Draw(canvas)
    for person in people:
        xy, seen = _joints(person, 17)
        for j in np.flatnonzero(seen):
            _dot(draw, xy[j], 2, KEYPOSE_JOINTS[j])
        for a, b, colour in KEYPOSE_LINKS:
            if seen[a] and seen[b]:
                draw.line([tuple(xy[a].astype(int)), tuple(xy[b].astype(int))], colour, 3)
    return canvas


def draw_openpose(people, size, blend=False):
    """Condition of ControlNet 1.1's openpose: limbs of colour × 0.6, joints of radius 4 over them.

    people: sequence of (17, 3) arrays, COCO-17 order. The neck is the middle of the shoulders, only if both are seen.
    blend: of the openpose T2I-Adapter: joints first, then each limb blended over what is there,
    0.6 of it to 0.4.
    """
    canvas, opacity = Image.new("RGB", size), round(0.6 * 255)
    draw = ImageDraw.Draw(canvas, "RGBA" if blend else "RGB")
    skeletons = []
    for person in people:
        xy, seen = _joints(person, 17)
        neck = xy[[5, 6]].mean(0), seen[5] and seen[6]
        skeletons.append([neck if j is None else (xy[j], seen[j]) for j in OPENPOSE_FROM_COCO])

    def draw_joints():
        for joints in skeletons:
            for (xy, seen), colour in zip(joints, OPENPOSE_COLOURS):
                if seen:
                    _dot(draw, xy, 4, colour)

    def draw_limbs():
        for (a, b), colour in zip(OPENPOSE_LINKS, OPENPOSE_COLOURS):
            fill = (*colour, opacity) if blend else tuple(int(0.6 * c) for c in colour)
            for joints in skeletons:
                (start, seen), (end, seen_too) = joints[a - 1], joints[b - 1]
                if seen and seen_too:
                    draw.polygon(_ellipse(start, end, 4), fill)

    for part in (draw_joints, draw_limbs) if blend else (draw_limbs, draw_joints):
        part()
    return canvas


def _joints(person, count):
    person = np.asarray(person, dtype=np.float64)
    if person.shape != (count, 3):
        raise ValueError(f"a skeleton of shape {person.shape}, expected ({count}, 3)")
    return person[:, :2], (person[:, 2] >= SCORE_FLOOR) & np.isfinite(person).all(1)


def _dot(draw, xy, radius, colour):
    """OpenCV's disc: all pixels within `radius`, 13 for 2. Pillow's own ellipse would cover 21."""
    x, y = int(xy[0]), int(xy[1])
    for row in range(-radius, radius + 1):
        half = math.isqrt(radius**2 - row**2)
        draw.line([x - half, y + row, x + half, y + row], colour)


def _ellipse(a, b, half_width, corners=72):
    """Corners of an ellipse, its long axis from a to b; whole pixels and degrees [OpenPose]."""
    middle, length = np.trunc((a + b) / 2), int(np.linalg.norm(b - a) / 2)
    angle = math.radians(int(math.degrees(math.atan2(*(a - b)[::-1]))))
    along = np.array([math.cos(angle), math.sin(angle)])
    across = np.array([-along[1], along[0]])
    turn = np.linspace(0, 2 * math.pi, corners, endpoint=False)[:, None]
    points = middle + np.cos(turn) * along * length + np.sin(turn) * across * half_width
    return [tuple(p) for p in points.round()]


# ---------------------------------------------------------------------------------------------------------- overlays

# Colours that people with red-green blindness can tell apart.
OVERLAY_LEFT, OVERLAY_RIGHT, OVERLAY_MIDDLE = (255, 128, 14), (30, 136, 255), (250, 230, 90)


def as_picture(image):
    """PIL image, (H, W, 3) uint8 array or (3, H, W) uint8 tensor/array → PIL RGB."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    image = np.asarray(image)
    return Image.fromarray(image.transpose(1, 2, 0) if image.shape[0] == 3 and image.shape[-1] != 3 else image)


def side_of(name):
    """Joint name → "left", "right" or "middle" ("left_knee", "l_knee" and "lknee" style names)."""
    name = name.lower()
    for side in ("left", "right"):
        if side in name or name.startswith((side[0] + "_", side[0] + " ", side[0] + "-")):
            return side
    return "middle"


def overlay(image, keypoints, skeleton, names=(), scale=1, width=2.0, floor=SCORE_FLOOR):
    """A pose of any joint set drawn over its picture, left orange, right blue, the middle yellow.

    image: see as_picture. keypoints: (K, 3) pixels of `image` + score or visibility. skeleton: 0-based joint pairs;
    pairs that name no joint of the set are left out (CrowdPose's own file has such). names: K joint names, for sides.
    scale: the picture is enlarged this many times first; width: of the links in pixels of the result.
    """
    image = as_picture(image)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.BICUBIC)
    smooth = 3  # drawn 3 times as large and shrunk: smooth edges
    keypoints = np.asarray(keypoints, dtype=np.float64)
    xy, seen = keypoints[:, :2] * scale * smooth, keypoints[:, 2] >= floor
    sides = [side_of(names[j]) if j < len(names) else "middle" for j in range(len(xy))]
    colours = {"left": OVERLAY_LEFT, "right": OVERLAY_RIGHT, "middle": OVERLAY_MIDDLE}
    layer = Image.new("RGBA", (size[0] * smooth, size[1] * smooth))
    draw = ImageDraw.Draw(layer)
    pairs = [(a, b) for a, b in skeleton if 0 <= min(a, b) and max(a, b) < len(xy) and seen[a] and seen[b]]
    for casing in (True, False):  # a dark edge first, so that the lines stand out from any ground
        extra = 1.2 * smooth if casing else 0.0
        for a, b in pairs:
            colour = colours[sides[a] if sides[a] == sides[b] else "middle"]
            line = [tuple(xy[a]), tuple(xy[b])]
            draw.line(line, (20, 20, 20, 170) if casing else (*colour, 255), round(width * smooth + 2 * extra))
        for j in np.flatnonzero(seen):
            r = 1.1 * width * smooth + extra
            box = [xy[j][0] - r, xy[j][1] - r, xy[j][0] + r, xy[j][1] + r]
            draw.ellipse(box, (20, 20, 20, 170) if casing else (*colours[sides[j]], 255))
    image.paste(layer.resize(size, Image.Resampling.BOX), (0, 0), layer.resize(size, Image.Resampling.BOX))
    return image


# ------------------------------------------------------------------------------------------------------------ sheets

INK, FAINT, GROUND, PAPER = (32, 34, 38), (120, 124, 130), (240, 241, 243), (255, 255, 255)


@lru_cache
def font(size, bold=False):
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf" / name), size)


def wrapped(text, face, room, lines):
    """Break `text` into at most `lines` lines of `room` pixels; what does not fit ends in an ellipsis."""
    rows = []
    for word in (word for part in str(text).split("\n") for word in [*part.split(), "\n"]):
        if word == "\n":
            rows.append("")
        elif rows and rows[-1] and face.getlength(f"{rows[-1]} {word}") <= room:
            rows[-1] += f" {word}"
        elif rows and not rows[-1]:
            rows[-1] = word
        else:
            rows.append(word)
    rows = [row for row in rows if row]
    cut, rows = len(rows) > lines, rows[:lines]
    for i, row in enumerate(rows):
        if face.getlength(row) > room or (cut and i == lines - 1):
            while row and face.getlength(row + "…") > room:
                row = row[:-1]
            rows[i] = row.rstrip() + "…"
    return rows


def sheet(rows, path, row_labels=None, column_labels=None, title=None, cell=None, label_width=150):
    """Write a labelled grid of pictures as PNG.

    rows: list of lists of pictures (see as_picture) or None for an empty cell; rows may differ in length.
    cell: (w, h) pixels each picture is fitted into, keeping its shape; default: the largest picture's size.
    row_labels, column_labels: texts at the left and on top; long ones are broken into lines. title: one line.
    """
    rows = [[None if image is None else as_picture(image) for image in row] for row in rows]
    pictures = [image for row in rows for image in row if image is not None]
    cell = cell or (max([48] + [p.width for p in pictures]), max([48] + [p.height for p in pictures]))
    columns = max((len(row) for row in rows), default=0)
    gap, margin, small = 6, 16, font(12)
    left = margin + (label_width if row_labels else 0)
    heads = [wrapped(label, small, cell[0], 2) for label in column_labels or []]
    title_rows = wrapped(title, font(16, True), left - margin + max(columns * (cell[0] + gap), 320), 2) if title else []
    top = margin + 24 * len(title_rows) + (6 if title else 0) + 16 * max(map(len, heads), default=0) + 4
    width = left + max(columns * (cell[0] + gap), 320 if title else 0) - gap + margin
    canvas = Image.new("RGB", (width, top + len(rows) * (cell[1] + gap) - gap + margin), PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, line in enumerate(title_rows):
        draw.text((margin, margin + 24 * i), line, INK, font(16, True))
    for c, lines in enumerate(heads):
        x = left + c * (cell[0] + gap) + cell[0] / 2
        for i, line in enumerate(lines):
            draw.text((x, top - 6 - 16 * (len(lines) - 1 - i)), line, FAINT, small, anchor="md")
    for r, row in enumerate(rows):
        y = top + r * (cell[1] + gap)
        if row_labels and r < len(row_labels):
            for i, line in enumerate(wrapped(row_labels[r], small, label_width - 12, max(1, cell[1] // 16))):
                draw.text((margin, y + 2 + 16 * i), line, INK if i == 0 else FAINT, small)
        for c, image in enumerate(row):
            x = left + c * (cell[0] + gap)
            draw.rectangle([x, y, x + cell[0] - 1, y + cell[1] - 1], GROUND)
            if image is not None:
                zoom = min(cell[0] / image.width, cell[1] / image.height)
                size = (max(1, round(image.width * zoom)), max(1, round(image.height * zoom)))
                fitted = image.resize(size, Image.Resampling.LANCZOS)
                canvas.paste(fitted, (x + (cell[0] - size[0]) // 2, y + (cell[1] - size[1]) // 2))
    save_png(canvas, path)


def save_png(image, path):
    """Write a picture as PNG; after a kill or a full disk an older file of that name is whole."""
    write_atomic(path, lambda part: as_picture(image).save(part, format="PNG"))


def framed(image, colour, width=4):
    """A picture with a coloured frame inside its border."""
    image = as_picture(image).copy()
    ImageDraw.Draw(image).rectangle([0, 0, image.width - 1, image.height - 1], outline=colour, width=width)
    return image


def denormalize(images):
    """(B, 3, H, W) ImageNet-normalised → uint8."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=images.device).view(3, 1, 1)
    return ((images * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
