"""People seen by several cameras: one set for ReID, attributes and text-to-image ReID.

`generate.py task=people` makes it where the official sets cannot be had; the readers of those sets
read it. A camera keeps its place, light and colour cast; every picture of a person has another
pose. Written below `out`:

  bounding_box_train/ query/ bounding_box_test/   Market-1501's: 0002_c1s1_000451_03.jpg
  attributes_train.csv _val.csv _test.csv         image,attribute,…: figure.attributes, 0 or 1
  data_captions.json                              RSTPReid's: two true sentences per picture

Nobody is both in training and test. As in Market-1501, the query is one picture of each test person
by each camera, and the gallery also holds a detector's bad boxes, one distractor (person 0) and one
junk picture (-1) for each query (there 0.8 and 1.1). The last `persons_val` people of the training
folder are the validation split of attributes and captions; ReID has none and trains on all.

Legend: C cameras (from 1) · K pictures by each camera · H, W picture.
"""

import json
import re
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from drawing.grids import sheet
from plumbing.config import Key
from plumbing.errors import UserError
from plumbing.files import write_atomic, write_csv
from plumbing.seeds import BAD_BOX, PICTURE, WORDING, rng_of, seed_of
from puppet.body import sample_poses
from puppet.figure import attributes, render, sample_identities, sentence
from puppet.scene import sample_scenes

KEYS = dict(
    persons_train=Key(751, "people: training people", "[Market-1501]", low=2),
    persons_val=Key(100, "people: of them attributes' and captions' validation split", low=0),
    persons_test=Key(750, "people: more of them, in query and gallery", "[Market-1501]", low=1),
    cameras=Key(6, "people: cameras; everyone is seen by all", "[Market-1501]", low=2),
    pictures_per_camera=Key(3, "people: pictures of a person by a camera",
                            "near [Market-1501]'s average", low=2),
)  # fmt: skip

FOLDERS = ("bounding_box_train", "query", "bounding_box_test")
SPLITS = ("train", "val", "test")
# IoU with the person's box: below 0.2 a detection is a distractor, up to 0.5 junk [Market-1501].
BAD_BOXES = {0: (0.0, 0.2), -1: (0.2, 0.5)}
SENTENCES = 2  # of each picture [RSTPReid]


def check(cfg):
    """What single keys cannot say."""
    if cfg.backend != "puppet":
        raise UserError("task people is drawn by the puppet: use backend=puppet")
    for name in ("annotations", "parts"):
        if getattr(cfg, name):
            raise UserError(f"task people samples its poses and draws no parts: leave {name} out")
    if cfg.shards:
        raise UserError("task people writes Market-1501's folders of loose pictures: no shards=")
    if cfg.width > 2 * cfg.height or cfg.height > 4 * cfg.width:
        sides = f"height={cfg.height} width={cfg.width}"
        raise UserError(f"{sides}: a person needs width <= 2 height and height <= 4 width")
    if cfg.persons_val >= cfg.persons_train:
        most = f"persons_train={cfg.persons_train} to train on"
        raise UserError(f"persons_val={cfg.persons_val} leaves nobody of {most}")


def plan(cfg):
    """→ (units, make(units) for plumbing.chunks). A unit is a person's number."""
    return range(1, cfg.persons_train + cfg.persons_test + 1), partial(draw_chunk, cfg)


def split_of(cfg, person):
    train = cfg.persons_train - cfg.persons_val
    return "train" if person <= train else "val" if person <= cfg.persons_train else "test"


def draw_chunk(cfg, persons):
    """→ ([({path: picture}, row)], 0): C × K of each person, then bad boxes of a test person."""
    rows = []
    for person in persons:
        rows += draw_person(cfg, person)
    return [({row["file_name"]: picture}, row) for picture, row in rows], 0


def draw_person(cfg, person):
    """→ [(picture, row)]"""
    C, K, split = cfg.cameras, cfg.pictures_per_camera, split_of(cfg, person)
    jobs = [(person, camera, k) for camera in range(1, C + 1) for k in range(K)]
    poses, people, scenes, seeds = sightings(cfg.seed, jobs)
    made, who = render(poses, people, scenes, (cfg.height, cfg.width)), people[0]
    rows = []
    for i, ((_, camera, k), seed) in enumerate(zip(jobs, seeds)):
        picture = Image.fromarray(made["image"][i])
        frame = (person - 1) * K + k + 1  # a camera's running number
        folder = "bounding_box_train"
        if split == "test":
            folder = "query" if k == 0 else "bounding_box_test"
        name = picture_name(cfg, folder, person, camera, frame)
        row = dict(file_name=name, person=person, camera=camera, split=split)
        row |= dict(attributes=attributes(who), captions=sentences(who, seed))
        rows.append((picture, row))
        if folder == "query":
            for number, (bad, (low, high)) in enumerate(BAD_BOXES.items(), 2):
                rng = rng_of(BAD_BOX, seed, number)
                crop = badly_boxed(picture, made["boxes"][i], low, high, rng)
                name = picture_name(cfg, "bounding_box_test", bad, camera, frame, number)
                rows.append((crop, dict(file_name=name, person=bad, camera=camera, split="test")))
    return rows


def sightings(seed, jobs):
    """Pictures (person, camera, k) → what they are drawn from: Poses, people, scenes, seeds."""
    seeds = [seed_of(PICTURE, seed, *job) for job in jobs]
    persons = sorted({person for person, _, _ in jobs})
    looks = dict(zip(persons, sample_identities(seed, persons)))
    scenes = sample_scenes(seed, seeds, camera=[camera for _, camera, _ in jobs])
    people = [looks[person] for person, _, _ in jobs]
    return sample_poses(seed, seeds), people, scenes, seeds


def job_of(name, pictures_per_camera):
    """A person's picture, by its name → (person, camera, k) of `sightings`: picture_name undone."""
    person, camera, frame = map(int, re.match(r"(\d+)_c(\d+)s1_(\d+)_00\.", name).groups())
    return person, camera, frame - 1 - (person - 1) * pictures_per_camera


def picture_name(cfg, folder, person, camera, frame, box=0):
    """Market-1501: person, camera and sequence, frame, box of that frame (00 is drawn by hand)."""
    person = "-1" if person == -1 else f"{person:04d}"
    return f"{folder}/{person}_c{camera}s1_{frame:06d}_{box:02d}.{cfg.picture_format}"


def sentences(who, seed):
    """Different true sentences about a person."""
    rng, texts = rng_of(WORDING, seed), []
    while len(texts) < SENTENCES:
        text = sentence(who, rng)
        texts += [text] if text not in texts else []
    return texts


def badly_boxed(picture, box, low, high, rng):
    """What a detector that misses the person cuts out: a random window, at the picture's size.

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


# ----------------------------------------------------------------------------- files about pictures


def write_lists(cfg, work):
    """Records (a plumbing.chunks.Chunks) → CSVs and captions, streamed; the contact sheet.

    → counts by folder and split.
    """
    out, counts = Path(cfg.out), Counter()
    names = list(attributes(sample_identities(0, [0])[0]))

    def of(*splits):
        return (row for row in work.rows() if row["split"] in splits and row["person"] > 0)

    def write_captions(path):
        with open(path, "w", encoding="utf-8") as file:
            for i, row in enumerate(of(*SPLITS)):
                entry = dict(id=row["person"], img_path=row["file_name"])
                entry |= dict(captions=row["captions"], split=row["split"])
                file.write((",\n" if i else "[\n") + json.dumps(entry))
            file.write("\n]\n")

    for split in SPLITS:
        if split != "val" or cfg.persons_val:
            rows = ([row["file_name"], *(row["attributes"][n] for n in names)] for row in of(split))
            write_csv(out / f"attributes_{split}.csv", ["image", *names], rows)
    write_atomic(out / "data_captions.json", write_captions)
    for row in work.rows():
        folder = row["file_name"].split("/")[0]
        counts.update(["pictures", {0: "distractors", -1: "junk"}.get(row["person"], folder)])
    write_sheet(cfg, work)
    people = dict(people=len(work.units), cameras=cfg.cameras)
    return people | {name: counts[name] for name in ("pictures", *FOLDERS, "distractors", "junk")}


def write_sheet(cfg, work):
    """sheet.png: a row per person, evenly out of the set, a column per camera; bad boxes last."""
    number = len(work.units)
    persons = np.linspace(1, number, min(cfg.sheet_rows, number)).round().astype(int).tolist()
    rows = {person: {} for person in (*persons, *BAD_BOXES)}
    labels = {0: "0000 distractors", -1: "-1 junk"}
    for row in work.rows():
        person, camera = row["person"], row["camera"]
        if person in rows and camera not in rows[person]:
            rows[person][camera] = Path(cfg.out) / row["file_name"]
            if person > 0 and camera == 1:
                labels[person] = f"{person:04d} {row['split']}\n{row['captions'][0]}"
    cameras = range(1, cfg.cameras + 1)
    grid = [[Image.open(rows[person][camera]) for camera in cameras] for person in rows]
    labels, heads = [labels[person] for person in rows], [f"camera {c}" for c in cameras]
    cell = (96, round(96 * cfg.height / cfg.width), 230)
    title = "every row one person, every column one camera"
    sheet(grid, Path(cfg.out) / "sheet.png", labels, heads, title, cell)
