"""Labelled grids of pictures, as one PNG. Text is set in the DejaVu that matplotlib brings."""

from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from plumbing.files import write_atomic

INK, FAINT, GROUND, PAPER = (32, 34, 38), (120, 124, 130), (240, 241, 243), (255, 255, 255)


def as_picture(image):
    """PIL image, (H, W, 3) uint8 array or (3, H, W) uint8 tensor/array → PIL RGB."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    image = np.asarray(image)
    if image.shape[0] == 3 and image.shape[-1] != 3:
        image = image.transpose(1, 2, 0)
    return Image.fromarray(image)


@lru_cache
def font(size, bold=False):
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf" / name), size)


def wrapped(text, face, room, lines):
    """`text` in at most `lines` lines of `room` pixels; what does not fit ends in an ellipsis."""
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


def sheet(rows, path, row_labels=None, column_labels=None, title=None, cell=None):
    """Write a labelled grid of pictures as PNG.

    rows: lists of pictures (see as_picture) or None for an empty cell; they may differ in length.
    cell: (w, h) px that each picture is fitted into, keeping its shape; default: the largest
    picture's size. A third number is the width of the row labels (150).
    row_labels, column_labels: texts at the left and on top; long ones are broken into lines. title:
    one line.
    """
    rows = [[None if image is None else as_picture(image) for image in row] for row in rows]
    pictures = [image for row in rows for image in row if image is not None]
    largest = max([48, *(p.width for p in pictures)]), max([48, *(p.height for p in pictures)])
    w, h, label_width = (*(cell or largest), 150)[:3]
    columns = max((len(row) for row in rows), default=0)
    gap, margin, small, large = 6, 16, font(12), font(16, True)
    left = margin + (label_width if row_labels else 0)
    heads = [wrapped(label, small, w, 2) for label in column_labels or []]
    across = columns * (w + gap)
    title_rows = wrapped(title, large, left - margin + max(across, 320), 2) if title else []
    top = margin + 24 * len(title_rows) + (6 if title else 0)
    top += 16 * max(map(len, heads), default=0) + 4
    width = left + max(across, 320 if title else 0) - gap + margin
    canvas = Image.new("RGB", (width, top + len(rows) * (h + gap) - gap + margin), PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, line in enumerate(title_rows):
        draw.text((margin, margin + 24 * i), line, INK, large)
    for c, lines in enumerate(heads):
        x = left + c * (w + gap) + w / 2
        for i, line in enumerate(lines):
            draw.text((x, top - 6 - 16 * (len(lines) - 1 - i)), line, FAINT, small, anchor="md")
    for r, row in enumerate(rows):
        y = top + r * (h + gap)
        label = row_labels[r] if row_labels and r < len(row_labels) else ""
        for i, line in enumerate(wrapped(label, small, label_width - 12, max(1, h // 16))):
            draw.text((margin, y + 2 + 16 * i), line, INK if i == 0 else FAINT, small)
        for c, image in enumerate(row):
            x = left + c * (w + gap)
            draw.rectangle([x, y, x + w - 1, y + h - 1], GROUND)
            if image is not None:
                zoom = min(w / image.width, h / image.height)
                size = (max(1, round(image.width * zoom)), max(1, round(image.height * zoom)))
                fitted = image.resize(size, Image.Resampling.LANCZOS)
                canvas.paste(fitted, (x + (w - size[0]) // 2, y + (h - size[1]) // 2))
    write_atomic(path, lambda part: canvas.save(part, format="PNG"))


def framed(image, colour, width=4):
    """A picture with a coloured frame inside its border."""
    image = as_picture(image).copy()
    edge = [0, 0, image.width - 1, image.height - 1]
    ImageDraw.Draw(image).rectangle(edge, outline=colour, width=width)
    return image
