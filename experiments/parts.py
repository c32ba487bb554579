"""The parts of data sets that compare.py needs besides the official ones.

Validation   a share of the training people or poses stands apart, so that rates are chosen on it
             and never on what is reported.
Prompts      the pictures of a puppet set once more, grouped by what a prompt would say (gender,
             colours of the clothes) and no longer by pose: StableRep's and SynCLR's positives.

  python experiments/parts.py market=data/market1501 poses=data/lspet/train.json out=runs/parts

Outputs  in `out`, for what is given: market/ (folders in Market naming, links to the pictures),
         attributes_train.csv, attributes_val.csv, people/train.json, poses/train.json and
         val.json, prompts/annotations.json. Pictures are linked to, never copied.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import csv
import json
import os

import numpy as np

import common
from common import UserError
from formats.market import read_market
from plumbing.config import MACHINE, Key, read_config
from plumbing.errors import reading
from plumbing.files import read_json, regular

KEYS = dict(
    out=Key("runs/parts", "folder of the parts"),
    market=Key(None, "a Market root, of which bounding_box_train is divided by people"),
    attributes=Key(None, "CSV of attributes of these pictures, divided by the same people"),
    people=Key(None, "COCO JSON of bounding_box_train; what is left without those people"),
    poses=Key(None, "COCO JSON, divided by pictures"),
    prompts=Key(None, "annotations.json of a puppet set, grouped anew"),
    share=Key(0.25, "share of people, or of pictures, for validation", low=0.01, high=0.9),
    group=Key(5, "pictures of a prompt", "[paper, inferred] of a pose", low=2),
    seed=MACHINE["seed"],
)
PROMPT_ATTRIBUTES = ("female", "up_", "down_", "skirt")  # what a short prompt says of a person


def main():
    cfg = read_config(KEYS, __doc__)
    ranks = common.start_ranks("cpu")
    given = [name for name in ("market", "poses", "prompts") if getattr(cfg, name)]
    if not given:
        raise UserError("nothing to divide; give market=, poses= or prompts=")
    if (cfg.attributes or cfg.people) and not cfg.market:
        raise UserError("attributes= and people= are divided by the people of market=; give it too")
    if common.open_run(cfg, KEYS, ranks) == "finished":
        return
    rng, out, said = common.rng_of(common.WEIGHTS, cfg.seed), Path(cfg.out), []
    if cfg.market:
        said.append(divide_market(cfg, out, rng))
    if cfg.poses:
        said.append(divide_poses(cfg, out, rng))
    if cfg.prompts:
        said.append(group_by_prompt(cfg, out, rng))
    common.finish_run(out)
    print(f"{cfg.out}: {'; '.join(said)}")


def link(source, target):
    """A link to `source` at `target`; one that a kill left behind stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.is_symlink():
        target.symlink_to(os.path.abspath(source))


def divide_market(cfg, out, rng):
    """People of bounding_box_train → training, and validation as queries and gallery.

    A query is the first picture of a person by each camera, for people whom two cameras saw.
    """
    people = read_market(Path(cfg.market) / "bounding_box_train")
    real = np.unique(people.ids[people.ids > 0])
    held = rng.permutation(real)[: max(2, round(len(real) * cfg.share))]
    seen = set()
    for row, (person, camera) in enumerate(zip(people.ids.tolist(), people.cameras.tolist())):
        folder = "bounding_box_train"
        if person in held:
            several = len(np.unique(people.cameras[people.ids == person])) > 1
            folder = "query" if several and (person, camera) not in seen else "bounding_box_test"
            seen.add((person, camera))
        link(people.path(row), out / "market" / folder / people.files[row].decode())
    names = {people.files[row].decode() for row in np.flatnonzero(np.isin(people.ids, held))}
    if cfg.attributes:
        divide_csv(cfg.attributes, out, names)
    if cfg.people:
        with reading(cfg.people, "COCO JSON"):
            document = read_json(cfg.people)
            rest = [i["id"] for i in document["images"] if Path(i["file_name"]).name not in names]
        if len(document["images"]) - len(rest) < len(names):
            raise UserError(f"people={cfg.people} lacks people of market={cfg.market}")
        link_pictures(cfg.people, out / "people")
        write_part(out / "people/train.json", document, set(rest))
    return f"{len(real) - len(held)} people to train on, {len(held)} to validate on"


def divide_csv(path, out, held):
    """Rows whose picture's name is in `held` → attributes_val.csv, others attributes_train.csv."""
    with reading(path, "CSV"), open(regular(path), newline="", encoding="utf-8-sig") as file:
        head, *rows = [row for row in csv.reader(file) if row]
    parts = {"train": [], "val": []}
    for name, *values in rows:
        absolute = str((Path(path).parent / name).resolve())
        parts["val" if Path(name).name in held else "train"].append([absolute, *values])
    for part, lines in parts.items():
        common.write_csv(out / f"attributes_{part}.csv", head, lines)


def divide_poses(cfg, out, rng):
    """A COCO file → poses/train.json and poses/val.json, by picture."""
    with reading(cfg.poses, "COCO JSON"):
        document = read_json(cfg.poses)
        images = [image["id"] for image in document["images"]]
    held = set(rng.permutation(images)[: max(1, round(len(images) * cfg.share))].tolist())
    link_pictures(cfg.poses, out / "poses")
    write_part(out / "poses/train.json", document, set(images) - held)
    write_part(out / "poses/val.json", document, held)
    return f"{len(images) - len(held)} pictures with poses to train on, {len(held)} to validate on"


def write_part(path, document, kept):
    """A COCO document with the pictures of these ids alone."""
    chosen = {"images": [row for row in document["images"] if row["id"] in kept]}
    chosen["annotations"] = [row for row in document["annotations"] if row["image_id"] in kept]
    common.write_json(path, document | chosen, indent=None)


def group_by_prompt(cfg, out, rng):
    """The set's annotations with pose_id numbering groups of one prompt; what is over has none."""
    document, groups, number = read_json(cfg.prompts), {}, 0
    rows = document["annotations"]
    for row in rows:
        if "attributes" not in row:
            raise UserError(f"{cfg.prompts}: its people have no attributes; give a puppet's set")
        said = {k: v for k, v in row["attributes"].items() if k.startswith(PROMPT_ATTRIBUTES)}
        groups.setdefault(json.dumps(said, sort_keys=True), []).append(row)
        row["pose_id"] = -1
    for members in groups.values():
        order, whole = rng.permutation(len(members)), len(members) // cfg.group * cfg.group
        for place, i in enumerate(order[:whole]):
            members[i]["pose_id"] = number + place // cfg.group
        number += whole // cfg.group
    if not number:
        raise UserError(f"{cfg.prompts}: no prompt has {cfg.group} pictures; lower group=")
    link_pictures(cfg.prompts, out / "prompts")
    common.write_json(out / "prompts/annotations.json", document, indent=None)
    left = sum(row["pose_id"] < 0 for row in rows)
    return f"{len(groups)} prompts, {number} groups of {cfg.group}, {left} pictures in none"


def link_pictures(annotations, folder):
    """`images` in a new folder, as a link to the pictures of a COCO file."""
    own = Path(annotations).parent
    link(own / "images" if (own / "images").is_dir() else own, folder / "images")


if __name__ == "__main__":
    common.run_stage(main)
