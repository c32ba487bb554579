"""People seen by several cameras, drawn by the puppet: one set for ReID, attributes and text-to-image ReID.

`generate.py task=people` makes it where the official sets cannot be had; the readers of those sets read it. A camera
keeps its place, light and colour cast; every picture of a person has another pose. Written below `out`:

    bounding_box_train/ query/ bounding_box_test/   Market-1501's folders; names like 0002_c1s1_000451_03.jpg
    attributes_train.csv _val.csv _test.csv         image,attribute,…   puppet.attributes of the person, 0 or 1
    data_captions.json                              RSTPReid's: id, img_path, captions (two true sentences), split

Nobody is both in training and test. As in Market-1501, the query is one picture of each test person by each camera,
and the gallery also holds a detector's bad boxes, one distractor (person 0) and one junk picture (-1) for each query
(there 0.8 and 1.1). The last `persons_val` people of the training folder are the validation split of attributes and
captions; ReID has none and trains on all.

Legend: C cameras (from 1) · K pictures by each camera · S people (from 1; training first) · H, W picture.
"""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

import puppet
from common import BAD_BOX, PICTURE, WORDING, rng_of, seed_of, write_atomic
from drawing import pictures
from plumbing.chunks import read_records
from plumbing.config import UserError

FOLDERS = ("bounding_box_train", "query", "bounding_box_test")
SPLITS = ("train", "val", "test")
# IoU with the person's box: [Market-1501] calls a detection below 0.2 a distractor, one from 0.2 to 0.5 junk.
BAD_BOXES = {0: (0.0, 0.2), -1: (0.2, 0.5)}
SENTENCES = 2  # of each picture [RSTPReid]


def check(cfg):
    """What single keys cannot say."""
    if cfg.backend != "puppet":
        raise UserError("task people is drawn by the puppet: use backend=puppet")
    for name in ("annotations", "parts"):
        if getattr(cfg, name):
            raise UserError(f"task people samples its poses and draws no parts: leave {name} out")
    if cfg.persons_val >= cfg.persons_train:
        raise UserError(f"persons_val={cfg.persons_val} leaves nobody of persons_train={cfg.persons_train} to train on")


def units(cfg):
    return range(1, cfg.persons_train + cfg.persons_test + 1)


def split_of(cfg, person):
    train = cfg.persons_train - cfg.persons_val
    return "train" if person <= train else "val" if person <= cfg.persons_train else "test"


def draw_chunk(cfg, persons):
    """→ ([(picture, row)], 0): C × K pictures of each person, then bad boxes if it is a test person."""
    rows = []
    for person in persons:
        rows += draw_person(cfg, person)
    return rows, 0


def draw_person(cfg, person):
    C, K, split = cfg.cameras, cfg.pictures_per_camera, split_of(cfg, person)
    who = puppet.sample_identities(cfg.seed, [person]).people[0]
    jobs = [(camera, k) for camera in range(1, C + 1) for k in range(K)]
    seeds = [seed_of(PICTURE, cfg.seed, person, camera, k) for camera, k in jobs]
    scenes = puppet.sample_scenes(cfg.seed, seeds, camera=[camera for camera, _ in jobs])
    poses, people = puppet.sample_poses(cfg.seed, seeds), puppet.Identities([who] * len(jobs))
    made = puppet.render(poses, people, scenes, (cfg.height, cfg.width))
    rows = []
    for i, ((camera, k), seed) in enumerate(zip(jobs, seeds)):
        picture, frame = Image.fromarray(made["image"][i]), (person - 1) * K + k + 1  # a camera's running number
        folder = "bounding_box_train" if split != "test" else "query" if k == 0 else "bounding_box_test"
        row = dict(file_name=picture_name(cfg, folder, person, camera, frame), person=person, camera=camera, k=k)
        row |= dict(split=split, seed=seed, attributes=puppet.attributes(who), captions=sentences(who, seed))
        rows.append((picture, row))
        if folder == "query":
            for number, (bad, (low, high)) in enumerate(BAD_BOXES.items(), 2):
                crop = badly_boxed(picture, made["boxes"][i], low, high, rng_of(BAD_BOX, seed, number))
                name = picture_name(cfg, "bounding_box_test", bad, camera, frame, number)
                rows.append((crop, dict(file_name=name, person=bad, camera=camera, split="test")))
    return rows


def picture_name(cfg, folder, person, camera, frame, box=0):
    """Market-1501: person, camera and sequence, frame, box of that frame (00 is drawn by hand)."""
    person = "-1" if person == -1 else f"{person:04d}"
    return f"{folder}/{person}_c{camera}s1_{frame:06d}_{box:02d}.{cfg.picture_format}"


def sentences(who, seed):
    """Different true sentences about a person."""
    rng, texts = rng_of(WORDING, seed), []
    while len(texts) < SENTENCES:
        text = puppet.sentence(who, rng)
        texts += [text] if text not in texts else []
    return texts


def badly_boxed(picture, box, low, high, rng):
    """What a detector cuts out that misses the person: a random window of the picture's shape, at the picture's size.

    box (4,) x y w h px of the person. The window's IoU with it is at least `low`, and below `high`.
    """
    (W, H), (x, y, w, h) = picture.size, box
    while True:  # smaller and smaller windows have any IoU down to 0
        width, height = rng.uniform(0.25, 1) * np.array([W, H])
        left, top = rng.uniform(0, [W - width, H - height])
        across = min(left + width, x + w) - max(left, x)
        down = min(top + height, y + h) - max(top, y)
        shared = max(0.0, across) * max(0.0, down)
        if low <= shared / (width * height + w * h - shared) < high:
            region = (left, top, left + width, top + height)
            return picture.resize((W, H), Image.Resampling.BICUBIC, box=region)


# ----------------------------------------------------------------------------------------------- files about pictures


def write_lists(cfg, count):
    """Chunk records → the CSVs and the captions' JSON, streamed. → counts by folder and split."""
    out, counts = Path(cfg.out), Counter()
    names = list(puppet.attributes(puppet.sample_identities(0, [0]).people[0]))

    def of(*splits):
        return (row for row in read_records(cfg, count) if row.get("split") in splits and row["person"] > 0)

    for split in SPLITS:

        def write_csv(path, split=split):
            with open(path, "w", encoding="utf-8", newline="") as file:
                lines = csv.writer(file, lineterminator="\n")
                lines.writerow(["image", *names])
                lines.writerows([row["file_name"], *(row["attributes"][n] for n in names)] for row in of(split))

        if split != "val" or cfg.persons_val:
            write_atomic(out / f"attributes_{split}.csv", write_csv)

    def write_json(path):
        with open(path, "w", encoding="utf-8") as file:
            for i, row in enumerate(of(*SPLITS)):
                entry = dict(id=row["person"], img_path=row["file_name"], captions=row["captions"], split=row["split"])
                file.write((",\n" if i else "[\n") + json.dumps(entry))
            file.write("\n]\n")

    write_atomic(out / "data_captions.json", write_json)
    for row in read_records(cfg, count):
        if "file_name" in row:
            kind = {0: "distractors", -1: "junk"}.get(row["person"], row["file_name"].split("/")[0])
            counts.update(["pictures", kind])
    people = dict(people=len(units(cfg)), cameras=cfg.cameras)
    return people | {name: counts[name] for name in ("pictures", *FOLDERS, "distractors", "junk")}


def write_sheet(cfg, count):
    """sheet.png: every row one person (evenly out of the whole set), every column one camera; last the bad boxes."""
    persons = np.linspace(1, len(units(cfg)), min(cfg.sheet_rows, len(units(cfg)))).round().astype(int).tolist()
    rows, labels = {person: {} for person in (*persons, *BAD_BOXES)}, {0: "0000 distractors", -1: "-1 junk"}
    for row in read_records(cfg, count):
        if row.get("person") in rows and row["camera"] not in rows[row["person"]]:
            rows[row["person"]][row["camera"]] = Path(cfg.out) / row["file_name"]
            if row["person"] > 0 and row["camera"] == 1:
                labels[row["person"]] = f"{row['person']:04d} {row['split']}\n{row['captions'][0]}"
    grid = [[Image.open(rows[person][camera]) for camera in range(1, cfg.cameras + 1)] for person in rows]
    heads = [f"camera {camera}" for camera in range(1, cfg.cameras + 1)]
    cell = (96, round(96 * cfg.height / cfg.width))
    title = "every row one person, every column one camera"
    pictures.sheet(grid, Path(cfg.out) / "sheet.png", [labels[person] for person in rows], heads, title, cell, 230)
