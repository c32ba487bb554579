"""The pose stage in this process or a file of its own, and small sets for it: people of dots,
MPII's list and its .mat.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from conftest import ROOT
from PIL import Image, ImageDraw

import finetune_pose
from formats.joints import COCO_JOINTS

DATA = os.environ.get("GENPOCCL_DATA")
needs_data = pytest.mark.skipif(
    not DATA, reason="GENPOCCL_DATA is not set: no real annotation files"
)
SMALL = {
    "width": 32,
    "depth": 2,
    "heads": 2,
    "decoder_width": 32,
    "decoder_depth": 1,
    "decoder_heads": 2,
}
MACHINE = ["precision=fp32", "workers=0", "device=cpu"]
QUICK = "size=tiny patch=8 height=64 width=48 head=simple batch=6 epochs=1 warmup_steps=1".split()
QUICK += MACHINE


def run(*arguments):
    """The script's main in this process."""
    before, sys.argv = sys.argv, ["finetune_pose.py", *map(str, arguments)]
    try:
        finetune_pose.main()
    finally:
        sys.argv = before


def script(folder):
    """A file that runs the script with the small encoder, for processes of their own."""
    path = Path(folder) / "small.py"
    path.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        f"import model; model.SIZES['tiny'] = {SMALL!r}\n"
        "import common, finetune_pose\n"
        "if 'sgd' in sys.argv:\n"
        "    sys.argv.remove('sgd')\n"
        "    sys.path.insert(0, 'tests'); import pose_runs\n"
        "    finetune_pose.build_optimizer = pose_runs.sgd\n"
        "common.run_stage(finetune_pose.main)\n"
    )
    return path


def sgd(cfg, model):
    """SGD, because Adam would hide gradients of a wrong scale. The head starts 30 × larger: batch
    norm behind its usual N(0, .001) enlarges float32's rounding.
    """
    with torch.no_grad():
        for weight in model.head.parameters():
            weight.mul_(30 if weight.ndim > 1 else 1)
    return torch.optim.SGD(model.parameters(), lr=0.0)


def people_file(folder, n, seed=0, name="people.json", joints=COCO_JOINTS):
    """n pictures of dots, one COCO person each: every joint has a colour, so it can be learnt."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    palette = np.random.default_rng(5).integers(30, 255, (len(joints), 3))
    for i in range(1, n + 1):
        w, h = int(rng.integers(70, 100)), int(rng.integers(90, 130))
        picture = Image.fromarray(rng.integers(0, 60, (h, w, 3), np.uint8))
        xy = rng.uniform(10, [w - 10, h - 10], (len(joints), 2)).round(1)
        draw = ImageDraw.Draw(picture)
        for (x, y), colour in zip(xy, palette):
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], tuple(colour.tolist()))
        picture.save(folder / "images" / f"{seed}_{i}.png")
        images.append({"id": i, "file_name": f"{seed}_{i}.png", "width": w, "height": h})
        keypoints = np.concatenate([xy, np.full((len(joints), 1), 2.0)], 1)
        keypoints[rng.random(len(joints)) < 0.1] = 0
        annotations.append(
            {"id": i, "image_id": i, "category_id": 1, "bbox": [5, 5, w - 10, h - 10],
             "area": float(w * h) / 2, "iscrowd": 0, "keypoints": keypoints.flatten().tolist(),
             "num_keypoints": int((keypoints[:, 2] > 0).sum())}
        )  # fmt: skip
    category = {"id": 1, "name": "person", "keypoints": list(joints), "skeleton": [[1, 2], [2, 4]]}
    path = folder / name
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": [category]})
    )
    return path


def sets(train, val):
    return [f"train_annotations={train}", f"val_annotations={val}"]


def person(seed):
    return np.c_[np.random.default_rng(seed).uniform(0, 100, (17, 2)), np.full(17, 2)]


def mpii_mat(path, n, seed=0):
    """An official ground-truth .mat of n people, as HRNet reads it; positions count from 1."""
    rng = np.random.default_rng(seed)
    missing = rng.random((16, n)) < 0.2
    positions = np.where(missing[:, None], np.nan, rng.uniform(1, 100, (16, 2, n)))
    mat = {"headboxes_src": rng.uniform(0, 60, (2, 2, n)), "jnt_missing": missing.astype(float)}
    scipy.io.savemat(path, mat | {"pos_gt_src": positions})
    return mat["headboxes_src"], missing, positions


def mpii_list(folder, name="Zoë.png", **changes):
    Image.new("RGB", (80, 120)).save(folder / name)
    row = {
        "image": name,
        "center": [40, 60],
        "scale": 0.4,
        "joints": [[9, 9]] * 16,
        "joints_vis": [1] * 16,
    }
    (folder / "list.json").write_text(json.dumps([row, row | changes]))
    return folder / "list.json"
