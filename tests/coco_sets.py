"""Small COCO keypoint files with pictures."""

import json

import numpy as np
import torch
from PIL import Image

from common import Ranks
from formats.joints import COCO_JOINTS

ALONE = Ranks(0, 1, torch.device("cpu"))


def write_set(folder, n_poses=4, per_pose=3, size=(32, 64), pose_ids=True, seed=0, **changes):
    """A COCO keypoint file with pictures; `changes` replace fields of the first annotation."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for i in range(n_poses * per_pose):
        name, (w, h) = f"{i:03d}.jpg", size
        coarse = np.random.default_rng([seed, i // per_pose]).integers(
            0, 255, (4, 2, 3)
        )  # one look per pose
        noise = rng.integers(-40, 40, (h, w, 3))
        look = np.kron(coarse, np.ones((h // 4, w // 2, 1))) + noise
        Image.fromarray(look.clip(0, 255).astype(np.uint8)).save(folder / "images" / name)
        points = np.concatenate([rng.random((17, 2)) * size, np.full((17, 1), 2)], 1)
        images.append({"id": i, "file_name": name, "width": w, "height": h})
        annotations.append(
            {
                "id": 100 + i,
                "image_id": i,
                "category_id": 1,
                "bbox": [0, 0, w, h],
                "area": w * h,
                "iscrowd": 0,
            }
            | {"keypoints": points.ravel().tolist(), "num_keypoints": 17}
            | ({"pose_id": i // per_pose} if pose_ids else {})
        )
    annotations[0].update(changes)
    category = {"id": 1, "name": "person", "keypoints": COCO_JOINTS, "skeleton": [[1, 2], [16, 99]]}
    path = folder / "annotations.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": [category]})
    )
    return path


def changed_set(folder, change):
    path = write_set(folder)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return path
