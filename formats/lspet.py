"""LSP-Extended as downloaded → COCO keypoint JSON, which every stage reads.

  python formats/lspet.py folder=lspet_dataset out=lspet

Inputs   folder: lspet_dataset.zip, unpacked: images/im00001.jpg … im10000.jpg and joints.mat, which
         holds x, y and "is visible" of 14 joints of each: `joints` (14, 3, N).
Outputs  in `out`: train.json and val.json. Their pictures stay where they are: give that folder as
         train_images= and val_images=, or images=.

A joint that is not visible is missing. A box is a tenth of its longer side larger than the joints,
on each side, and cut to the picture. Legend: N people · px, pixel centres at whole numbers.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import plumbing.quiet  # noqa: F401  first: Ctrl-C while the libraries load

# isort: split
import numpy as np

from formats.joints import LSP_JOINTS as JOINTS
from formats.keypoints import coco_document
from formats.people import Limits, measured, people_at
from plumbing.config import Key, read_config
from plumbing.errors import UserError, reading, run_stage
from plumbing.files import new_files, read_mat, write_json

LINKS = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (6, 7), (7, 8), (8, 9), (9, 10), (10, 11)]
LINKS += [(12, 13), (8, 12), (9, 12), (2, 8), (3, 9)]

KEYS = dict(
    folder=Key(None, "lspet_dataset.zip, unpacked: a folder with images and joints.mat"),
    out=Key("lspet", "folder to write train.json and val.json to"),
    val=Key(400, "people in val.json, the last ones: the authors publish no split", low=1),
)


def main():
    cfg = read_config(KEYS, __doc__)
    if not cfg.folder:
        raise UserError("folder= names no folder; give what lspet_dataset.zip unpacks to")
    files = new_files(cfg.out, ("train.json", "val.json"), cfg.folder)
    people, n = read_lspet(cfg.folder)
    kept = len(people.files)
    if cfg.val >= kept:
        raise UserError(f"val={cfg.val} leaves nobody to train on: {kept} people have joints")
    files[0].parent.mkdir(parents=True, exist_ok=True)
    for file, rows in zip(files, (np.arange(kept - cfg.val), np.arange(kept - cfg.val, kept))):
        write_json(file, coco_document(people.take(rows)), indent=None)
    where = f"{files[0]} and {files[1]}"
    print(f"{kept - cfg.val} and {cfg.val} people in {where}; {n - kept} left out")
    print(f"train_images= and val_images= of finetune_pose.py: {people.folder}")


def read_lspet(folder):
    """→ (People with at least two visible joints and a box on their picture, how many there are).

    Raises UserError for a file of another layout and for missing and damaged pictures.
    """
    path, images = Path(folder) / "joints.mat", Path(folder) / "images"
    with reading(path, "LSP-Extended's joints"):
        joints = np.asarray(read_mat(path)["joints"], float)
        joints = joints[..., None] if joints.ndim == 2 else joints  # the reader drops sides of 1
        if joints.shape[:2] != (14, 3):
            raise ValueError(f"joints are {joints.shape}, not (14, 3, people)")
        joints = joints.transpose(2, 0, 1)  # (N, 14, 3)
        seen = joints[:, :, 2] > 0
        if not np.isfinite(joints[seen]).all():
            raise ValueError("a visible joint has no place")
    n = len(joints)
    numbers = np.flatnonzero(seen.sum(1) >= 2) + 1  # as in the names of the pictures
    joints, seen = joints[numbers - 1], seen[numbers - 1][:, :, None]
    low = np.where(seen, joints[:, :, :2], np.inf).min(1)
    high = np.where(seen, joints[:, :, :2], -np.inf).max(1)
    edge = 0.1 * (high - low).max(1, keepdims=True)
    low, high = low - edge, high + edge

    names = [f"im{number:05d}.jpg" for number in numbers]
    people, _ = measured(people_at(images, names, low, JOINTS, LINKS), path, Limits())
    low, high = low.clip(0, people.size), high.clip(0, people.size)
    points = np.concatenate([joints[:, :, :2], np.full_like(joints[:, :, :1], 2)], 2)
    people = people._replace(
        boxes=np.concatenate([low, high - low], 1), keypoints=np.where(seen, points, 0),
        area=(high - low).prod(1), image_id=numbers, annotation_id=numbers,
    )  # fmt: skip
    return people.take((high > low).all(1)), n


if __name__ == "__main__":
    run_stage(main)
