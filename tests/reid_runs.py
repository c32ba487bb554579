"""Pictures of people in Market's layout, and the ReID stage in this process."""

import json
import sys

import numpy as np
import torch
from PIL import Image

import finetune_reid
from common import Ranks

MACHINE = ["precision=fp32", "device=cpu", "workers=0"]
SMALL = "size=tiny height=32 width=16 patch=8 pad=2 people=6 pictures_per_person=2".split()
SMALL += ["warmup_epochs=0.5", "lr=1e-3", "layer_decay=0.9", *MACHINE]
PLAIN = [*SMALL, "epochs=3", "save_every=2", "eval_every=2"]  # as `plain` is run
CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


def paint(path, person, camera, rng):
    """A person is two colours, a camera is a ground and a light, and every picture has its own
    noise and size.
    """
    colours = np.random.default_rng([7, person]).integers(30, 226, (2, 3))
    pixels = np.full((48, 24, 3), 60 + 30 * camera)
    pixels[6:24, 5:19], pixels[24:46, 7:17] = colours
    pixels = pixels * (0.85 + 0.1 * camera) + rng.normal(0, 6, pixels.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    picture.resize((22 + 2 * camera, 50)).save(path, quality=95)


def market(root, train=9, test=5):
    """Market layout: `train` people × 2 cameras × 2 (person 1 has one picture only); 7 queries, 17
    gallery pictures.
    """
    rng = np.random.default_rng(0)

    def add(folder, person, camera, number):
        who = f"{person:04d}" if person >= 0 else "-1"
        name = f"{who}_c{camera}s1_{number:06d}_01.jpg"
        paint(root / folder / name, person % 1000, camera, rng)

    add("bounding_box_train", 1, 1, 0)
    for person in range(2, train + 1):
        for camera in (1, 2):
            add("bounding_box_train", person, camera, 0)
            add("bounding_box_train", person, camera, 1)
    for person in range(101, 101 + test):
        add("query", person, 1, 0)
        for camera, number in ((1, 1), (2, 2), (3, 3)):
            add("bounding_box_test", person, camera, number)
    add("query", 999, 1, 0)  # nobody else is like this one
    add("query", -1, 1, 0)  # junk as query: no match either, though the gallery has junk
    add("bounding_box_test", 0, 2, 0)
    add("bounding_box_test", -1, 2, 0)
    (root / "bounding_box_test" / "Thumbs.db").write_text("not a picture")
    return root


def stage(*arguments):
    """The stage's main in this process."""
    sys.argv = ["finetune_reid.py", *map(str, arguments)]
    finetune_reid.main()


def rows(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "pictures_per_s"} for row in lines]
