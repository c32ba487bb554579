"""What a person looks at after fine-tuning: poses, attributes, ranked lists, captions.

Legend: N people · P pictures · K joints · A attributes. A sheet or chart is one PNG at `path`.
Pictures are whatever as_picture takes.
"""

import math

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from drawing.curves import draw_curves  # noqa: F401  a stage finds it beside its other pictures
from drawing.grids import FAINT, INK, PAPER, as_picture, font, framed, sheet, wrapped
from drawing.skeletons import OVERLAY_LEFT, OVERLAY_RIGHT, SCORE_FLOOR, overlay, side_of
from plumbing.files import write_atomic

BLUE, ORANGE = (20, 90, 190), (200, 90, 0)  # of attributes: said rightly, said wrongly

# -------------------------------------------------------------------------------------------- poses


def pose_sheet(examples, skeleton, names, path):
    """People cut out with their poses: annotated beside predicted, or predicted alone.

    examples: (images, boxes, truth, found, labels), each with an entry per person: N whole
    pictures; boxes (N, 4) x y w h px; truth (N, K, 3) px + visibility, or None where nothing is
    annotated; found (N, K, 3) px + score, of which every joint is drawn; N texts, of which one line
    stands under each person. skeleton: pairs of joint ids; names: K joint names.
    """
    images, boxes, truth, found, labels = examples
    height, cells = 208, []
    for n, image in enumerate(images):
        image = as_picture(image)
        poses = [(found[n], -math.inf)]  # a pose, and the score from which its joints are drawn
        if truth is not None:
            poses.insert(0, (truth[n], SCORE_FLOOR))
        low, high = _surroundings(boxes[n], [pose for pose, _ in poses], image.size)
        crop, scale = image.crop((*low, *high)), height / (high[1] - low[1])
        panels = []
        for pose, floor in poses:
            moved = np.concatenate([pose[:, :2] - low, pose[:, 2:]], 1)
            panels.append(overlay(crop, moved, skeleton, names, scale, floor=floor))
        inner = len(panels) * (panels[0].width + 4) - 4
        cell = Image.new("RGB", (max(inner, 200), height + 20), PAPER)  # 200: room for the label
        for i, panel in enumerate(panels):
            cell.paste(panel, ((cell.width - inner) // 2 + i * (panel.width + 4), 0))
        line = wrapped(labels[n], font(12), cell.width, 1)
        middle = cell.width / 2, height + 18
        ImageDraw.Draw(cell).text(middle, "".join(line), INK, font(12), anchor="md")
        cells.append(cell)
    title, per_row = "Annotated (left), predicted (right); worst, then best OKS", 3
    if truth is None:
        title, per_row = "Predicted", 6
    width = min(max((cell.width for cell in cells), default=48), 420)
    rows = [cells[k : k + per_row] for k in range(0, len(cells), per_row)]
    sheet(rows, path, title=title, cell=(width, height + 20))


def _surroundings(box, poses, size):
    """→ corners (x0, y0), (x1, y1) in whole px: the box with its seen joints and a tenth around.

    They lie in the picture of `size` (w, h).
    """
    points = [np.array([[box[0], box[1]], [box[0] + box[2], box[1] + box[3]]])]
    points += [pose[pose[:, 2] > SCORE_FLOOR, :2] for pose in poses]
    points = np.concatenate(points)
    low, high = points.min(0), points.max(0)
    edge = 0.1 * (high - low).max() + 1
    low = np.clip(np.floor(low - edge), 0, np.array(size) - 2).astype(int)
    return low, np.maximum(np.clip(np.ceil(high + edge), 0, size).astype(int), low + 2)


def pck_chart(per_joint, path, title):
    """A bar per joint: the share of people whose joint was found.

    per_joint: joint name → fraction, or None where nobody's joint is labelled: it has no bar.
    """
    found = {name: value for name, value in per_joint.items() if value is not None}
    sides = {"left": OVERLAY_LEFT, "right": OVERLAY_RIGHT, "middle": FAINT}
    colours = np.reshape([sides[side_of(name)] for name in found], (-1, 3)) / 255
    figure = Figure((6, 0.8 + 0.22 * len(found)), layout="constrained")
    axis = figure.add_subplot(title=title, xlim=(0, 1.1))
    names = [name.replace("_", " ") for name in found]
    axis.bar_label(axis.barh(names, list(found.values()), color=colours), fmt="%.2f", padding=3)
    axis.invert_yaxis()
    write_atomic(path, lambda part: figure.savefig(part, format="png"))


# --------------------------------------------------------------------------------------- attributes


def attribute_chart(names, train_ratio, test_ratio, scores, path):
    """A row per attribute, best first: its mA, and how often it is true in train and in test.

    names: A texts; train_ratio, test_ratio, scores (A,) fractions. A bar begins at 50 %, which is
    chance, and goes to the left, in orange, where the score is below. An attribute that all test
    pictures have, or none, comes last, without a bar: its mA is half of one class's rate.
    """
    both = (np.asarray(test_ratio) > 0) & (np.asarray(test_ratio) < 1)
    order, rows = np.lexsort((-np.asarray(scores), ~both)), range(len(names))
    both, scores = both[order], 100 * np.where(both, scores, 0.5)[order]
    figure = Figure((7, 0.8 + 0.22 * len(rows)), layout="constrained")
    axis = figure.add_subplot(xlim=(-15, 115), ylim=(len(rows) - 0.4, -0.6))
    axis.set_title("mA of each attribute (%)", loc="left")
    axis.set_title("true in train, in test (%)", loc="right", fontsize="medium")
    colours = np.where(scores[:, None] < 50, OVERLAY_LEFT, OVERLAY_RIGHT) / 255
    bars = axis.barh(rows, scores - 50, left=50, color=colours)
    texts = [f"{s:.1f}" if own else "one class in test" for s, own in zip(scores, both)]
    axis.bar_label(bars, texts, padding=3)
    axis.axvline(50, color="black")
    names = [wrapped(names[a], font(12), 150, 1)[0] for a in order]
    axis.set_yticks(rows, names, parse_math=False)  # a name may hold two $
    ratios = [f"{100 * train_ratio[a]:5.1f} {100 * test_ratio[a]:5.1f}" for a in order]
    axis.secondary_yaxis("right").set_yticks(rows, ratios, family="monospace")
    write_atomic(path, lambda part: figure.savefig(part, format="png"))


def attribute_sheet(images, names, probabilities, labels, path):
    """A card per picture: its surest right and wrong attributes, or its surest guesses.

    images: P pictures; probabilities (P, A); labels (P, A) 0/1, or None where they are not known.
    The percentage is the confidence in what is said, not in the attribute: "no hat 98 %". Of the
    right ones those said to be there come first: a list of rare things that are rightly missing
    would say little.
    """
    cards = []
    for i, image in enumerate(images):
        p = np.asarray(probabilities[i], np.float64)
        sure = np.argsort(-np.abs(p - 0.5), kind="stable")
        if labels is None:
            parts = [("guessed", [a for a in sure if p[a] > 0.5], BLUE)]
            parts.append(("least sure", sure[::-1], ORANGE))
        else:
            right = [a for a in sure if (p[a] > 0.5) == (labels[i][a] == 1)]
            wrong = [a for a in sure if a not in right]
            right = [a for a in right if p[a] > 0.5] + [a for a in right if p[a] <= 0.5]
            parts = [(f"right ({len(right)})", right, BLUE)]
            parts.append((f"wrong ({len(wrong)})", wrong, ORANGE))
        cards.append(_card(as_picture(image), names, p, parts))
    rows = [cards[i : i + 4] for i in range(0, len(cards), 4)]
    title = "Right answers (positives first) and wrong ones, the surest first"
    if labels is None:
        title = "Guessed attributes: the surest and the least sure"
    sheet(rows, path, title=title)


def _card(image, names, p, parts):
    """One picture beside its lists. parts: (heading, attribute ids, colour); p (A,)."""
    card = Image.new("RGB", (100 + 180, 214), PAPER)
    draw = ImageDraw.Draw(card)
    zoom = min(96 / image.width, (card.height - 4) / image.height)
    image = image.resize((max(1, round(image.width * zoom)), max(1, round(image.height * zoom))))
    card.paste(image, (2, (card.height - image.height) // 2))
    y = 2
    for head, chosen, colour in parts:
        draw.text((106, y), head, FAINT, font(12, True))
        for a in chosen[:5]:
            y += 16
            said = wrapped(("" if p[a] > 0.5 else "no ") + names[a], font(12), 130, 1)[0]
            draw.text((106, y), said, colour, font(12))
            draw.text((276, y), f"{100 * max(p[a], 1 - p[a]):.0f} %", colour, font(12), anchor="ra")
        y += 24
    return card


# ------------------------------------------------------------------------------------- ranked lists

RIGHT_ANSWER, WRONG_ANSWER = (0, 145, 80), (215, 40, 40)


def ranked_lists(rows, path, labels, title, own=("query",), width=150):
    """Queries, or sentences, and what was found for each, best first.

    rows: list of (own picture, or None in all, [(picture, right)]); right: see `judged`. labels: a
    text for each, `width` px wide. own: what stands above the own picture and empty cells after it.
    """
    cell, drawn = (64, 128), []
    for query, answers in rows:
        drawn.append([] if query is None else [_fitted(query, cell), *[None] * (len(own) - 1)])
        drawn[-1] += [judged(_fitted(picture, cell), right) for picture, right in answers]
    heads = [str(i + 1) for i in range(max(len(answers) for _, answers in rows))]
    heads = heads if rows[0][0] is None else [*own, *heads]
    sheet(drawn, path, labels, heads, title, (*cell, width))


def _fitted(image, size):
    return as_picture(image).resize(size, Image.Resampling.BICUBIC)


def judged(image, right):
    """A picture with a frame: right True is green, False is red, None (not known) has no frame.

    Red has a cross in the corner, for people who see no difference between the two.
    """
    if right is None:
        return image
    image = framed(image, RIGHT_ANSWER if right else WRONG_ANSWER)
    if not right:
        draw, x, y = ImageDraw.Draw(image), image.width - 13, 4
        draw.rectangle([x, y, x + 9, y + 9], WRONG_ANSWER)
        draw.line([(x + 2, y + 2), (x + 7, y + 7)], (255, 255, 255), 2)
        draw.line([(x + 7, y + 2), (x + 2, y + 7)], (255, 255, 255), 2)
    return image
