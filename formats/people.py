"""People as flat arrays, what is accepted of a file, and plain folders without a COCO file.

Legend: N people · K joints. Frame: pixel centres at whole numbers; boxes are x, y, w, h in px.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from formats.joints import flip_ids
from plumbing.errors import UserError, and_more
from plumbing.pictures import as_bytes, find_bad_pictures, opened, pictures_at

MIN_SCORE = 0.2  # HRNet and ViTPose count a joint into a pose's score from here [HRNet] [ViTPose]


class People(NamedTuple):
    """N people as flat arrays: 600,000 cost little memory, and forked workers share them."""

    folder: str  # picture folder
    files: np.ndarray  # (N,) bytes, path below `folder`
    size: np.ndarray  # (N, 2) int32, width and height of the picture
    boxes: np.ndarray  # (N, 4) float32, x y w h px; MPII's and detectors' may hang over the picture
    keypoints: np.ndarray  # (N, K, 3) float32, x y px and 0 missing / 1 hidden / 2 visible
    pose_id: np.ndarray  # (N,) int64, pictures of one pose share it; below 0 = no pose group
    annotation_id: np.ndarray  # (N,) int64
    image_id: np.ndarray  # (N,) int64
    area: np.ndarray  # (N,) float32 px²
    joints: list  # K joint names
    skeleton: list  # 0-based pairs of joints; others (CrowdPose has some) are dropped
    flip: list  # K joint ids with left and right swapped
    category: dict  # the category as read

    def take(self, rows):
        """The same with only these rows (ids or bool mask)."""
        columns = {k: v[rows] for k, v in self._asdict().items() if isinstance(v, np.ndarray)}
        return self._replace(**columns)


class Limits(NamedTuple):
    """What is accepted of a file, beyond what is always refused."""

    min_joints: int = 0  # people with fewer visible joints are left out
    min_score: float = MIN_SCORE  # scores in place of visibilities: a joint is visible from here on
    # None: 0, in a stage that has no such key.
    max_bad: int | None = None  # so many missing or damaged pictures are left out at most
    max_bad_boxes: int | None = None  # so many people, for a box without area on their picture
    check_pictures: bool = True

    def exceeded(self, key, n):
        """Are n more than the key allows? → "", or what the error says to do."""
        allowed = getattr(self, key)
        if n <= (allowed or 0):
            return ""
        return "mend it" if allowed is None else f"mend it or allow {key}={n}"


def folder_beside(path):
    """Where a list's pictures are when no key says: `images` beside it, or its own folder."""
    images = Path(path).parent / "images"
    return images if images.is_dir() else images.parent


def read_folder(path, limits):
    """Every picture below a folder, or one picture: each as a person without joints who fills it.

    → as read_people.
    """
    folder, names = pictures_at(path)
    people = people_at(folder, names, np.zeros((len(names), 4)), [], [])
    people, notes = measured(people, path, limits)
    boxes = np.concatenate([np.zeros_like(people.size), people.size], 1).astype(np.float32)
    return people._replace(boxes=boxes, area=boxes[:, 2] * boxes[:, 3]), notes


def people_at(folder, files, boxes, joints, skeleton):
    """People at boxes (N, 4) px that no COCO file lists: no joint is known, nor a picture's size.

    files: N names below `folder`. Pictures have ids from 1, in the order of their names here.
    """
    n, number = len(files), {}
    for name in files:
        number.setdefault(name, len(number) + 1)
    boxes = np.asarray(boxes)
    return People(
        folder=str(folder), files=as_bytes(folder, files), size=np.zeros((n, 2), np.int32),
        boxes=boxes.astype(np.float32), keypoints=np.zeros((n, len(joints), 3), np.float32),
        pose_id=np.full(n, -1), annotation_id=np.arange(1, n + 1),
        image_id=np.array([number[name] for name in files], np.int64),
        area=boxes[:, 2:].prod(1).astype(np.float32), joints=list(joints),
        skeleton=list(skeleton), flip=flip_ids(joints), category={"id": 1},
    )  # fmt: skip


def measured(people, path, limits):
    """For a list at `path` without sizes: → (people with those of their pictures, notes).

    Bad pictures are left out. The notes are those of read_people.
    """
    bad = find_bad_pictures(people.folder, people.files)
    people, sizes = leave_out(people, bad, path, limits), {}
    for name in people.files.tolist():
        if name not in sizes:  # only its header is read
            with opened(os.path.join(people.folder, name.decode())) as file:
                sizes[name] = Image.open(file).size
    if not sizes:
        raise UserError(f"{path}: none of its pictures can be read; look at the files")
    size = np.array([sizes[name] for name in people.files.tolist()], np.int32)
    notes = {"bad": [name for name, _ in bad], "bad_boxes": 0, "turned": 0, "clipped": 0}
    return people._replace(size=size), notes | {"crowds": 0, "scores": False}


def leave_out(people, bad, path, limits):
    """People without those on bad pictures; UserError where these are more than allowed."""
    if advice := limits.exceeded("max_bad", len(bad)):
        name, reason = bad[0]
        what = f"{people.folder}/{name} is {reason}{and_more(bad)}, named by {path}"
        raise UserError(f"{what}; {advice}")
    if not bad:
        return people
    return people.take(~np.isin(people.files, np.array([name.encode() for name, _ in bad])))
