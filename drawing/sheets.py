"""What a person looks at after training: reconstructions, attention, poses, attributes, ranked lists.

Legend: B, M, P pictures · N patches, in pose_sheet people · D width · S special tokens · K joints · A attributes ·
H, W picture · h, w grid. A sheet or chart is one PNG at `path`; pictures.py draws what they have in common.
"""

import math

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from drawing.pictures import (
    FAINT,
    GROUND,
    INK,
    OVERLAY_LEFT,
    OVERLAY_RIGHT,
    PAPER,
    SCORE_FLOOR,
    as_picture,
    denormalize,
    font,
    framed,
    overlay,
    save_png,
    sheet,
    side_of,
    wrapped,
)
from losses import normalized, patchify, unpatchify

# ----------------------------------------------------------------------------------------------------- pre-training


def reconstruction_sheet(images, mask, pred, patch_size, path):
    """Input, masked input, prediction, output (predicted patches in the holes of the input); two pictures a row.

    images (B, 3, H, W) ImageNet-normalised; mask (B, N) bool, True = masked; pred (B, N, p·p·3) normalised pixels as
    L_rec compares them. The prediction knows no patch's mean and contrast. "predicted" shows it with one mean and
    contrast for the whole picture; "output" gives each patch those of the true one, as MAE's own pictures do, which
    makes a model of few steps look good.
    """
    truth, grid = patchify(images.float(), patch_size), [side // patch_size for side in images.shape[2:]]
    _, mean, std = normalized(truth)
    hidden, pred = mask.unsqueeze(2).to(truth.device), pred.float()
    plain = pred * std.mean((1, 2), keepdim=True) + mean.mean((1, 2), keepdim=True)
    views = [truth, truth.masked_fill(hidden, 0.0), plain.masked_fill(~hidden, 0.0)]
    views.append((pred * std + mean).where(hidden, truth))
    columns = [denormalize(unpatchify(view, grid, patch_size)) for view in views]
    rows = two_a_row([[column[i] for column in columns] for i in range(len(images))])
    heads = ["input", "masked", "predicted", "with true mean and contrast"] * 2
    sheet(rows, path, None, heads, "Masked reconstruction", (96, 192))


def two_a_row(rows):
    """n rows → half as many: the first half, and beside it the second."""
    half = (len(rows) + 1) // 2
    return [a + b for a, b in zip(rows[:half], rows[half:] + [[]])]


def neighbour_sheet(images, features, pose_id, path, name, queries=6, neighbours=8):
    """Rows: a picture and its nearest others by cosine of `features`; a green frame marks the same pose group.

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
    sheet(rows, path, None, labels, f"Nearest pictures by {name}; green: same group", (80, 160))


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
    labels = ["picture", "[CLS]", "[POSE]"][: S + 1] * 2
    sheet(two_a_row(rows), path, None, labels, "Attention of the last block", (96, 192))


# ------------------------------------------------------------------------------------------------------------ poses


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
        line = wrapped(labels[n], font(12), cell.width, 1)
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


# ------------------------------------------------------------------------------------------------------- attributes


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
        draw.text((left - 10, y), wrapped(names[a], text, left - 26, 1)[0], INK, text, anchor="ra")
        colour = OVERLAY_RIGHT if scores[a] >= 0.5 else OVERLAY_LEFT
        draw.rectangle([min(end, left + bar / 2), y + 2, max(end, left + bar / 2), y + 13], colour)
        draw.text((end + 5 if scores[a] >= 0.5 else end - 5, y), f"{100 * scores[a]:.1f}", INK, text,
                  anchor="la" if scores[a] >= 0.5 else "ra")  # fmt: skip
        for ratio, x in ((train_ratio[a], 100), (test_ratio[a], 160)):
            draw.text((left + bar + x, y), f"{100 * ratio:.1f}", FAINT, text, anchor="ra")
    save_png(canvas, path)


def attribute_sheet(images, names, probabilities, labels, path, per_list=5):
    """Cards: a picture with its most confident right and wrong attributes, or guesses.

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
            doubtful = sure[::-1][:per_list]
            parts = [("guessed", yes[:per_list], (20, 90, 190))]
            parts += [("least sure", doubtful, (200, 90, 0))]
        else:
            right = sorted((a for a in sure if (p[a] > 0.5) == (labels[i][a] == 1)), key=lambda a: p[a] <= 0.5)
            wrong = [a for a in sure if a not in set(right)]
            parts = [
                (f"right ({len(right)})", right[:per_list], (20, 90, 190)),
                (f"wrong ({len(wrong)})", wrong[:per_list], (200, 90, 0)),
            ]
        cards.append(_card(as_picture(image), names, p, parts, per_list))
    rows = [cards[i : i + 4] for i in range(0, len(cards), 4)]
    title = "Guessed attributes: the surest and the least sure"
    if labels is not None:
        title = "Most confident attributes, right and wrong"
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
            said = wrapped(("" if p[a] > 0.5 else "no ") + names[a], font(12), 130, 1)[0]
            draw.text((106, y), said, colour, font(12))
            draw.text((276, y), f"{100 * max(p[a], 1 - p[a]):.0f} %", colour, font(12), anchor="ra")
        y += 24
    return card


# ----------------------------------------------------------------------------------------------------- ranked lists

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
