"""Skeletons: as the condition that a generator sees, and laid over a picture for people.

Legend: K joints · xy in pixels, origin at the top left corner · a picture is a PIL RGB image.
"""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from drawing.grids import as_picture, sheet
from plumbing.pictures import load_picture

# ----------------------------------------------------------------------- conditions for a generator

# A joint is drawn from this score on [T2I-Adapter]: of COCO's visibilities 0/1/2 from 1 on.
SCORE_FLOOR = 0.1

# Keypose drawing, RGB [T2I-Adapter]: the colours carry meaning for the adapter's weights.
MIDDLE, LEFT, RIGHT = (255, 153, 51), (0, 255, 0), (0, 128, 255)
# COCO-17: five joints of the face, then left and right in turn.
KEYPOSE_JOINTS = [MIDDLE] * 5 + [LEFT, RIGHT] * 6
# (joint, joint, colour), COCO ids, in the published order: a later link lies on top.
KEYPOSE_LINKS = [
    *((15, 13, LEFT), (13, 11, LEFT), (16, 14, RIGHT), (14, 12, RIGHT)),
    *((11, 12, MIDDLE), (5, 11, MIDDLE), (6, 12, MIDDLE), (5, 6, MIDDLE)),
    *((5, 7, LEFT), (6, 8, RIGHT), (7, 9, LEFT), (8, 10, RIGHT)),
    *((a, b, MIDDLE) for a, b in ((1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6))),
]

# OpenPose drawing [OpenPose, ControlNet]. 18 joints: nose, neck, right arm, left arm, right leg,
# left leg, eyes, ears.
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
    people: (17, 3) arrays of COCO-17, x and y in pixels, score or visibility. size: (W, H).
    """
    # deviates from T2I-Adapter: its annotator draws the first two people, ours everyone.
    canvas = Image.new("RGB", size)
    draw = ImageDraw.Draw(canvas)
    for person in people:
        xy, seen = _joints(person)
        for j in np.flatnonzero(seen):
            _dot(draw, xy[j], 2, KEYPOSE_JOINTS[j])
        inside = seen & ((xy >= 1) & (xy < size)).all(1)
        for a, b, colour in KEYPOSE_LINKS:
            if inside[a] and inside[b]:
                draw.line([tuple(xy[a].astype(int)), tuple(xy[b].astype(int))], colour, 3)
    return canvas


def draw_openpose(people, size, blend=False):
    """Condition of ControlNet 1.1's openpose: limbs of colour × 0.6, joints of radius 4 over them.

    people, size: see draw_keypose. The neck is the middle of the shoulders, if both are seen.
    blend: of the openpose T2I-Adapter: joints first, then each limb blended over what is there,
    0.6 of it to 0.4.
    """
    canvas, opacity = Image.new("RGB", size), round(0.6 * 255)
    draw = ImageDraw.Draw(canvas, "RGBA" if blend else "RGB")
    skeletons = []
    for person in people:
        xy, seen = _joints(person)
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


def _joints(person):
    person = np.asarray(person, dtype=np.float64)
    if person.shape != (17, 3):
        raise ValueError(f"a skeleton of shape {person.shape}, expected (17, 3)")
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


def condition_sheet(poses, draw, out, title, captions):
    """out/sheet.png: a row per pose, its condition drawn as `draw` does, then its K pictures.

    poses: for each the K annotations of generate.py, with file_name and size (w, h) of the picture.
    draw: None where the pictures of a row share a prompt and no condition.
    captions: whether the label of a row says its caption.
    """
    grid, labels = [], []
    shape = max(row["size"][1] / row["size"][0] for rows in poses for row in rows)
    cell = (144, round(144 * min(2.0, max(0.75, shape))))
    for rows in poses:
        size = np.array(rows[0]["size"])
        grid.append([])
        if draw:
            # Drawn at the size it is shown, with the line widths that the generator saw.
            zoom = (cell / size).min()
            skeleton = np.reshape(rows[0]["keypoints"], (17, 3)) * [zoom, zoom, 1]
            grid[-1].append(draw([skeleton], tuple(np.ceil(size * zoom).astype(int).tolist())))
        grid[-1] += [load_picture(Path(out) / "images", row["file_name"]) for row in rows]
        told = rows[0]["caption"] if captions else ""
        labels.append(f"{'pose' if draw else 'prompt'} {rows[0]['pose_id']}\n{told}")
    heads = ["condition"] * bool(draw) + [f"k = {k}" for k in range(len(poses[0]))]
    width = 160 if captions else 100
    sheet(grid, Path(out) / "sheet.png", labels, heads, title, (*cell, width))


# ----------------------------------------------------------------------------------------- overlays

# Colours that people with red-green blindness can tell apart.
OVERLAY_LEFT, OVERLAY_RIGHT, OVERLAY_MIDDLE = (255, 128, 14), (30, 136, 255), (250, 230, 90)
DARK_EDGE, LINK_WIDTH = (20, 20, 20, 170), 2.0  # px of the result


def side_of(name):
    """Joint name → "left", "right" or "middle" (as "left_knee" and "l_knee" say it)."""
    name = name.lower()
    for side in ("left", "right"):
        if side in name or name.startswith((side[0] + "_", side[0] + " ", side[0] + "-")):
            return side
    return "middle"


def overlay(image, keypoints, skeleton, names=(), scale=1, floor=SCORE_FLOOR):
    """A pose of any joint set drawn over its picture, left orange, right blue, the middle yellow.

    image: see as_picture. keypoints: (K, 3) pixels of `image` + score or visibility. skeleton:
    0-based joint pairs; pairs that name no joint of the set are left out (CrowdPose's own file has
    such). names: K joint names, for sides. scale: the picture is enlarged this many times first.
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
    pairs = [(a, b) for a, b in skeleton if 0 <= min(a, b) and max(a, b) < len(xy)]
    pairs = [(a, b) for a, b in pairs if seen[a] and seen[b]]
    for casing in (True, False):  # a dark edge first, so that the lines stand out from any ground
        extra = 1.2 * smooth if casing else 0.0
        for a, b in pairs:
            colour = colours[sides[a] if sides[a] == sides[b] else "middle"]
            fill = DARK_EDGE if casing else (*colour, 255)
            thick = round(LINK_WIDTH * smooth + 2 * extra)
            draw.line([tuple(xy[a]), tuple(xy[b])], fill, thick)
        for j in np.flatnonzero(seen):
            r = 1.1 * LINK_WIDTH * smooth + extra
            box = [xy[j][0] - r, xy[j][1] - r, xy[j][0] + r, xy[j][1] + r]
            draw.ellipse(box, DARK_EDGE if casing else (*colours[sides[j]], 255))
    layer = layer.resize(size, Image.Resampling.BOX)
    image.paste(layer, (0, 0), layer)
    return image


def people_sheet(pictures, skeleton, names, path, title):
    """Pictures, eight in a row, with everybody's pose drawn over them.

    pictures: (PIL picture, list of (K, 3) poses in its px) each; skeleton, names: see overlay.
    """
    cells = []
    for image, poses in pictures:
        zoom = max(1.0, 256 / max(image.size))  # small crops are enlarged: thin lines
        image = image.resize([max(1, round(side * zoom)) for side in image.size])
        for pose in poses:
            image = overlay(image, np.asarray(pose) * [zoom, zoom, 1], skeleton, names)
        cells.append(image)
    sheet([cells[i : i + 8] for i in range(0, len(cells), 8)], path, title=title, cell=(150, 200))
