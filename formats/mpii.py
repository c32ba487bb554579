"""MPII Human Pose as HRNet publishes it: lists of people, and the ground-truth .mat of PCKh.

Legend: N people. Frame: px, pixel centres at whole numbers; MPII's own files count from 1.
"""

import os

import numpy as np

from formats.people import folder_beside, measured, people_at
from plumbing.errors import UserError, reading
from plumbing.files import read_json, read_mat

MPII_JOINTS = (
    "right_ankle right_knee right_hip left_hip left_knee left_ankle pelvis thorax upper_neck "
    "head_top right_wrist right_elbow right_shoulder left_shoulder left_elbow left_wrist"
).split()
MPII_LINKS = [(0, 1), (1, 2), (2, 6), (6, 3), (3, 4), (4, 5), (6, 7), (7, 8), (8, 9), (10, 11)]
MPII_LINKS += [(11, 12), (12, 7), (7, 13), (13, 14), (14, 15)]


def read_mpii(path, folder, limits):
    """A train or valid list: rows of image, center, scale (÷ 200 px), joints, joints_vis.

    The box is a square of 200 · scale around the centre, which is moved down by 15 · scale [HRNet].
    A person without a joint stays, for the .mat counts him. Up to limits.max_bad_boxes rows whose
    box lies beyond the picture, or which hold a NaN, are left out.
    → (People, notes of formats.coco.read_people and "rows": how many rows the list has).
    """
    folder = folder or folder_beside(path)
    files, boxes, keypoints = [], [], []
    with reading(path, "MPII's list") as place:
        for n, row in enumerate(read_json(path), 1):
            place.at = f"entry {n}"
            files.append(os.fspath(row["image"]))  # a TypeError where it is no text
            (x, y), scale = np.array(row["center"], float).tolist(), float(row["scale"])
            y, side = y + 15 * scale, 200 * scale
            boxes.append((x - 1 - side / 2, y - 1 - side / 2, side, side))
            xy = np.array(row["joints"], float).reshape(16, 2) - 1
            seen = np.array(row["joints_vis"], float).reshape(16, 1) > 0
            keypoints.append(np.concatenate([np.where(seen, xy, 0), seen * 2], 1))
    with np.errstate(over="ignore"):  # beyond float32: a bad row
        keypoints = np.array(keypoints, np.float32).reshape(-1, 16, 3)
        boxes = np.array(boxes, np.float32).reshape(-1, 4)
    if not (keypoints[:, :, 2] > 0).any():
        raise UserError(f"{path} lists no person with a visible joint")
    people = people_at(folder, files, boxes, MPII_JOINTS, MPII_LINKS)
    people, notes = measured(people._replace(keypoints=keypoints), path, limits)
    people, wrong = without_bad_rows(people, path, limits)
    return people, notes | {"rows": len(files), "bad_boxes": wrong}


def without_bad_rows(people, path, limits):
    """→ (people whose numbers are finite and whose box meets the picture, how many are left out).

    A box may hang over the picture's edge.
    """
    low = np.maximum(people.boxes[:, :2], 0)
    high = np.minimum(people.boxes[:, :2] + people.boxes[:, 2:], people.size)
    good = (low < high).all(1)  # False also where a number is NaN
    good &= np.isfinite(people.keypoints).all((1, 2))
    n = int((~good).sum())
    if advice := limits.exceeded("max_bad_boxes", n):
        a = good.argmin()
        what = f"entry {people.annotation_id[a]} ({people.files[a].decode()})"
        where = f"box {people.boxes[a].tolist()} in its {people.size[a].tolist()} picture"
        raise UserError(
            f"{path}: {what} has {where}; centre, scale > 0 and joints must be numbers and lie in "
            f"it; {advice}"
        )
    return people.take(good), n


def read_mpii_heads(path, n):
    """MPII's official ground-truth .mat of the n people of a list, in its order.

    → (head size (n,) px = .6 × head box diagonal, labelled (n, 16) bool, joints (n, 16, 2) px).
    """
    with reading(path, "MPII's ground-truth .mat"):
        mat = read_mat(path)
        boxes, missing = np.asarray(mat["headboxes_src"], float), np.asarray(mat["jnt_missing"])
        xy = np.asarray(mat["pos_gt_src"], float) - 1
    if n == 1:  # the reader drops sides of length 1
        boxes, missing, xy = boxes[..., None], missing[..., None], xy[..., None]
    if boxes.shape != (2, 2, n) or missing.shape != (16, n) or xy.shape != (16, 2, n):
        found = f"{path} describes {boxes.shape[-1]} people, the annotation file {n}"
        raise UserError(f"{found}; use the pair that belong together")
    head = 0.6 * np.linalg.norm(boxes[1] - boxes[0], axis=0)
    return head, (missing == 0).T, xy.transpose(2, 0, 1)
