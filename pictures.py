"""What a person looks at, and what a generator is conditioned on: drawn skeletons, overlays, sheets.

Legend: K joints · H, W picture (pixels) · xy in pixels, origin at the top left corner · a picture is a PIL RGB image.
Knows nothing of configs or stages. Everything is drawn with Pillow; text is set in the DejaVu that matplotlib brings.
"""

import math
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from common import write_atomic
from data import IMAGENET_MEAN, IMAGENET_STD
from losses import normalized_patches, patchify, unpatchify

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
    """Condition of the keypose T2I-Adapter: black canvas, links 2 px wide, joints of radius 2.

    people: sequence of (17, 3) arrays, COCO-17 order, x and y in pixels, score or visibility. size: (W, H).
    """
    canvas = Image.new("RGB", size)
    draw = ImageDraw.Draw(canvas)
    for person in people:
        xy, seen = _joints(person, 17)
        for j in np.flatnonzero(seen):
            _dot(draw, xy[j], 2, KEYPOSE_JOINTS[j])
        for a, b, colour in KEYPOSE_LINKS:
            if seen[a] and seen[b]:
                draw.line([tuple(xy[a].astype(int)), tuple(xy[b].astype(int))], colour, 2)
    return canvas


def draw_openpose(people, size):
    """Condition of the openpose T2I-Adapter and ControlNet: limbs are ellipses of half-width 4, colour × 0.6.

    people: sequence of (17, 3) arrays, COCO-17 order. The neck is the middle of the shoulders, only if both are seen.
    """
    canvas = Image.new("RGB", size)
    draw = ImageDraw.Draw(canvas)
    for person in people:
        xy17, seen17 = _joints(person, 17)
        xy = np.stack([xy17[[5, 6]].mean(0) if j is None else xy17[j] for j in OPENPOSE_FROM_COCO])
        seen = [seen17[5] and seen17[6] if j is None else seen17[j] for j in OPENPOSE_FROM_COCO]
        for (a, b), colour in zip(OPENPOSE_LINKS, OPENPOSE_COLOURS):
            if seen[a - 1] and seen[b - 1]:
                draw.polygon(_ellipse(xy[a - 1], xy[b - 1], 4), tuple(int(0.6 * c) for c in colour))
        for j in np.flatnonzero(seen):
            _dot(draw, xy[j], 4, OPENPOSE_COLOURS[j])
    return canvas


def _joints(person, count):
    person = np.asarray(person, dtype=np.float64)
    if person.shape != (count, 3):
        raise ValueError(f"a skeleton of shape {person.shape}, expected ({count}, 3)")
    return person[:, :2], (person[:, 2] >= SCORE_FLOOR) & np.isfinite(person).all(1)


def _dot(draw, xy, radius, colour):
    x, y = int(xy[0]), int(xy[1])
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], colour)


def _ellipse(a, b, half_width, corners=72):
    """Corners of the ellipse whose long axis runs from a to b."""
    turn = np.linspace(0, 2 * math.pi, corners, endpoint=False)
    along, across = (b - a) / 2, np.array([-(b - a)[1], (b - a)[0]]) / max(np.linalg.norm(b - a), 1e-6)
    points = (a + b) / 2 + np.cos(turn)[:, None] * along + np.sin(turn)[:, None] * across * half_width
    return [tuple(p) for p in points]


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


def _wrapped(text, face, room, lines):
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
    heads = [_wrapped(label, small, cell[0], 2) for label in column_labels or []]
    title_rows = (
        _wrapped(title, font(16, True), left - margin + max(columns * (cell[0] + gap), 320), 2) if title else []
    )
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
            for i, line in enumerate(_wrapped(row_labels[r], small, label_width - 12, max(1, cell[1] // 16))):
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


# -------------------------------------------------------------------------------------------------- pre-training


def reconstruction_sheet(images, mask, pred, patch_size, path):
    """Columns: input, masked input, output (predicted patches in the holes of the input), prediction alone.

    images (B, 3, H, W) ImageNet-normalised; mask (B, N) bool, True = masked; pred (B, N, p·p·3) normalised pixels as
    L_rec compares them: each patch is put back with the true patch's mean and variance, as MAE's own pictures do.
    """
    _, mean, std = normalized_patches(images.float(), patch_size)
    grid = (images.shape[2] // patch_size, images.shape[3] // patch_size)
    truth = patchify(images.float(), patch_size)
    drawn = pred.float() * std + mean
    hidden = mask.unsqueeze(2).to(truth.device)
    views = [truth, truth.masked_fill(hidden, 0.0), drawn.where(hidden, truth), drawn]
    columns = [denormalize(unpatchify(view, grid, patch_size)) for view in views]
    labels = ["input", "masked", "output", "prediction alone"]
    sheet([[c[i] for c in columns] for i in range(len(images))], path, None, labels, "Masked reconstruction", (96, 192))


def neighbour_sheet(images, features, pose_id, path, name, queries=6, neighbours=8):
    """Rows: a picture and its nearest others by cosine of `features`; a green frame marks the same pose.

    images (M, 3, H, W) uint8; features (M, D); pose_id (M,), −1 = no pose group; name of the token, for the title.
    """
    z = F.normalize(features.float(), dim=1)
    similarity = (z @ z.T).fill_diagonal_(-2)
    chosen = torch.linspace(0, len(z) - 1, min(queries, len(z))).long().tolist()
    rows = []
    for q in chosen:
        near = similarity[q].topk(min(neighbours, len(z) - 1)).indices.tolist()
        same = [pose_id[q] >= 0 and pose_id[j] == pose_id[q] for j in near]
        rows.append([images[q]] + [framed(images[j], (40, 160, 60)) if s else images[j] for j, s in zip(near, same)])
    labels = ["query"] + [f"{i + 1}" for i in range(neighbours)]
    sheet(rows, path, None, labels, f"Nearest pictures by {name}; green: same pose", (80, 160))


def attention_sheet(images, maps, path):
    """Columns: picture, then the last block's attention of [CLS] (and [POSE]) laid over it.

    images (B, 3, H, W) uint8; maps (B, S, h, w): each map is scaled to its own largest value.
    """
    B, S = maps.shape[:2]
    glow = F.interpolate(maps.float(), size=images.shape[2:], mode="bicubic", align_corners=False).clamp(min=0)
    glow = (glow / glow.amax((2, 3), keepdim=True).clamp(min=1e-9)).numpy()
    rows = []
    for i in range(B):
        grey = np.asarray(as_picture(images[i]).convert("L").convert("RGB"), np.float32)
        heat = [matplotlib.colormaps["inferno"](glow[i, s])[..., :3] * 255 for s in range(S)]
        rows.append([images[i]] + [(0.45 * grey + 0.55 * h).astype(np.uint8) for h in heat])
    rows = [a + b for a, b in zip(rows[: (B + 1) // 2], rows[(B + 1) // 2 :] + [[]])]  # two pictures a row
    labels = ["picture", "[CLS]", "[POSE]"][: S + 1] * 2
    sheet(rows, path, None, labels, "Attention of the last block", (96, 192))


def denormalize(images):
    """(B, 3, H, W) ImageNet-normalised → uint8."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=images.device).view(3, 1, 1)
    return ((images * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def framed(image, colour, width=4):
    """A picture with a coloured frame inside its border."""
    image = as_picture(image).copy()
    ImageDraw.Draw(image).rectangle([0, 0, image.width - 1, image.height - 1], outline=colour, width=width)
    return image


# ------------------------------------------------------------------------------------------------------------- poses


def pose_sheet(images, boxes, truth, found, labels, skeleton, names, path, title=None, height=208):
    """People cut out with their poses: annotated beside predicted, or predicted alone where `truth` is None.

    images: N whole pictures; boxes (N, 4) x y w h px; truth (N, K, 3) px + visibility; found (N, K, 3) px + score, of
    which every joint is drawn; labels: N texts, one line under each person.
    """
    cells = []
    for n, image in enumerate(images):
        image = as_picture(image)
        poses = [found[n]] if truth is None else [truth[n], found[n]]
        low, high = _surroundings(boxes[n], poses, image.size)
        crop, scale = image.crop((*low, *high)), height / (high[1] - low[1])
        panels = []
        for pose, floor in zip(poses, [SCORE_FLOOR, -math.inf][-len(poses) :]):
            moved = np.concatenate([pose[:, :2] - low, pose[:, 2:]], 1)
            panels.append(overlay(crop, moved, skeleton, names, scale, floor=floor))
        inner = len(panels) * (panels[0].width + 4) - 4
        cell = Image.new("RGB", (max(inner, 200), height + 20), PAPER)  # 200: room for the label
        for i, panel in enumerate(panels):
            cell.paste(panel, ((cell.width - inner) // 2 + i * (panel.width + 4), 0))
        line = _wrapped(labels[n], font(12), cell.width, 1)
        ImageDraw.Draw(cell).text((cell.width / 2, height + 18), line[0] if line else "", INK, font(12), anchor="md")
        cells.append(cell)
    per_row = 6 if truth is None else 3
    width = min(max((cell.width for cell in cells), default=48), 420)
    title = title or ("Predicted" if truth is None else "Annotated (left), predicted (right); worst, then best OKS")
    rows = [cells[k : k + per_row] for k in range(0, len(cells), per_row)]
    sheet(rows, path, title=title, cell=(width, height + 20))


def _surroundings(box, poses, size):
    """Corners (x0, y0), (x1, y1) in whole px around a box with its seen joints, a tenth wider, inside the picture."""
    points = [np.array([[box[0], box[1]], [box[0] + box[2], box[1] + box[3]]])]
    points += [pose[pose[:, 2] > SCORE_FLOOR, :2] for pose in poses]
    points = np.concatenate(points)
    low, high = points.min(0), points.max(0)
    edge = 0.1 * (high - low).max() + 1
    low = np.clip(np.floor(low - edge), 0, np.array(size) - 2).astype(int)
    return low, np.maximum(np.clip(np.ceil(high + edge), 0, size).astype(int), low + 2)


def pck_chart(per_joint, path, title):
    """Bars of the share of right joints: {joint name: fraction, or None where no joint is labelled}."""
    rows = [(name, value) for name, value in per_joint.items() if value is not None]
    canvas = Image.new("RGB", (560, 64 + 22 * len(rows)), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((16, 16), title, INK, font(16, True))
    left, right = 150, 500
    colours = {"left": OVERLAY_LEFT, "right": OVERLAY_RIGHT, "middle": FAINT}
    for r, (name, value) in enumerate(rows):
        y = 50 + 22 * r
        draw.text((left - 8, y + 8), name.replace("_", " "), INK, font(12), anchor="rm")
        draw.rectangle([left, y, right, y + 16], GROUND)
        if value > 0:
            draw.rectangle([left, y, left + value * (right - left), y + 16], colours[side_of(name)])
        draw.text((right + 8, y + 8), f"{value:.2f}", INK, font(12), anchor="lm")
    save_png(canvas, path)


# -------------------------------------------------------------------------------------------------------- attributes


def attribute_chart(names, train_ratio, test_ratio, scores, path):
    """One row per attribute, best first: its mA as a bar from 50 % (chance), and how often it is true (train, test).

    names: A texts; train_ratio, test_ratio, scores (A,) fractions. A score below 50 % draws to the left, in orange.
    """
    text, left, bar, step = font(12), 170, 420, 20
    canvas = Image.new("RGB", (left + bar + 190, 64 + step * len(names)), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((16, 12), "mA of each attribute (%)", INK, font(16, True))
    draw.text((left + bar + 24, 40), "true in train   in test", FAINT, text)
    for tick in range(0, 101, 25):
        x = left + bar * tick / 100
        draw.text((x, 40), str(tick), FAINT, text, anchor="ma")
        draw.line([x, 58, x, canvas.height - 8], INK if tick == 50 else GROUND)
    for row, a in enumerate(np.argsort(-np.asarray(scores), kind="stable")):
        y, end = 62 + step * row, left + bar * float(scores[a])
        draw.text((left - 10, y), _wrapped(names[a], text, left - 26, 1)[0], INK, text, anchor="ra")
        colour = OVERLAY_RIGHT if scores[a] >= 0.5 else OVERLAY_LEFT
        draw.rectangle([min(end, left + bar / 2), y + 2, max(end, left + bar / 2), y + 13], colour)
        draw.text((end + 5 if scores[a] >= 0.5 else end - 5, y), f"{100 * scores[a]:.1f}", INK, text,
                  anchor="la" if scores[a] >= 0.5 else "ra")  # fmt: skip
        for ratio, x in ((train_ratio[a], 100), (test_ratio[a], 160)):
            draw.text((left + bar + x, y), f"{100 * ratio:.1f}", FAINT, text, anchor="ra")
    save_png(canvas, path)


def attribute_sheet(images, names, probabilities, labels, path, per_list=5):
    """Cards: a picture with its most confident right and wrong attributes; without labels its surest and doubtful ones.

    images: P pictures; probabilities (P, A); labels (P, A) 0/1 or None. The percentage is the confidence in what is
    said, not in the attribute: "no hat 98 %". Of the right ones those said to be there come first: a list of rare
    things that are rightly missing would say little.
    """
    cards = []
    for i, image in enumerate(images):
        p = np.asarray(probabilities[i], np.float64)
        sure = np.argsort(-np.abs(p - 0.5), kind="stable")
        if labels is None:
            yes = [a for a in sure if p[a] > 0.5]
            parts = [("true", yes[:per_list], (20, 90, 190)), ("least sure", sure[::-1][:per_list], (200, 90, 0))]
        else:
            right = sorted((a for a in sure if (p[a] > 0.5) == (labels[i][a] == 1)), key=lambda a: p[a] <= 0.5)
            wrong = [a for a in sure if a not in set(right)]
            parts = [
                (f"right ({len(right)})", right[:per_list], (20, 90, 190)),
                (f"wrong ({len(wrong)})", wrong[:per_list], (200, 90, 0)),
            ]
        cards.append(_card(as_picture(image), names, p, parts, per_list))
    rows = [cards[i : i + 4] for i in range(0, len(cards), 4)]
    title = "Most confident attributes" + (", right and wrong" if labels is not None else "")
    sheet(rows, path, None, None, title)


def _card(image, names, p, parts, per_list):
    card = Image.new("RGB", (100 + 180, 2 * (per_list + 1) * 16 + 22), PAPER)
    draw = ImageDraw.Draw(card)
    zoom = min(96 / image.width, (card.height - 4) / image.height)
    image = image.resize((max(1, round(image.width * zoom)), max(1, round(image.height * zoom))))
    card.paste(image, (2, (card.height - image.height) // 2))
    y = 2
    for head, chosen, colour in parts:
        draw.text((106, y), head, FAINT, font(12, True))
        for a in chosen:
            y += 16
            said = _wrapped(("" if p[a] > 0.5 else "no ") + names[a], font(12), 130, 1)[0]
            draw.text((106, y), said, colour, font(12))
            draw.text((276, y), f"{100 * max(p[a], 1 - p[a]):.0f} %", colour, font(12), anchor="ra")
        y += 24
    return card


# ---------------------------------------------------------------------------------------------------- ranked lists

RIGHT_ANSWER, WRONG_ANSWER = (0, 145, 80), (215, 40, 40)


def ranked_lists(rows, path, row_labels=None, title=None, cell=(64, 128)):
    """Write a sheet of queries and what was found for each, best first.

    rows: list of (query picture, [(picture, right)]); right True = green frame, False = red frame and a cross in the
    corner (for people who see no difference between the two), None = no frame, where the truth is not known.
    """
    drawn = []
    for query, answers in rows:
        fitted = [(as_picture(image).resize(cell, Image.Resampling.BICUBIC), right) for image, right in answers]
        drawn.append([as_picture(query).resize(cell, Image.Resampling.BICUBIC), *(judged(*a) for a in fitted)])
    columns = max((len(answers) for _, answers in rows), default=0)
    heads = ["query"] + [str(i + 1) for i in range(columns)]
    sheet(drawn, path, row_labels, heads, title, cell)


def judged(image, right):
    """A picture with a frame that says right (green), wrong (red, with a cross) or nothing (None)."""
    if right is None:
        return image
    image = framed(image, RIGHT_ANSWER if right else WRONG_ANSWER)
    if not right:
        draw, x, y = ImageDraw.Draw(image), image.width - 13, 4
        draw.rectangle([x, y, x + 9, y + 9], WRONG_ANSWER)
        draw.line([(x + 2, y + 2), (x + 7, y + 7)], (255, 255, 255), 2)
        draw.line([(x + 7, y + 2), (x + 2, y + 7)], (255, 255, 255), 2)
    return image


def caption_sheet(rows, captions, path, title=None, cell=(64, 128)):
    """Sentences and the pictures found for each, best first.

    rows: list of (the sentence's own picture or None, [(picture, right)]); right as for ranked_lists. captions: texts.
    """
    drawn = []
    for own, answers in rows:
        found = [judged(as_picture(p).resize(cell, Image.Resampling.BICUBIC), right) for p, right in answers]
        drawn.append(([] if own is None else [as_picture(own).resize(cell, Image.Resampling.BICUBIC), None]) + found)
    columns = max((len(answers) for _, answers in rows), default=0)
    heads = ([] if all(own is None for own, _ in rows) else ["its picture", ""]) + [str(i + 1) for i in range(columns)]
    sheet(drawn, path, captions, heads, title, cell, label_width=260)
