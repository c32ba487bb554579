"""COCO JSON files: people with any joint set, or none; captions.

Legend: N people · K joints. Frame: pixel centres at whole numbers; boxes are x, y, w, h in px.
"""

import json
import os
from array import array
from itertools import groupby
from pathlib import Path

import numpy as np

from formats.joints import COCO_CATEGORY, flip_ids, joint_name
from formats.joints import other_joints as other_joints  # readers of COCO files take it from here
from formats.people import MIN_SCORE as MIN_SCORE  # readers of COCO files take it from here
from formats.people import Limits, People, folder_beside, leave_out, read_folder
from plumbing.errors import UserError, and_more, reading
from plumbing.files import read_json, regular, write_atomic
from plumbing.pictures import find_bad_pictures, picture_fault


def check_sources(cfg):
    """UserError where annotations=, images=, max_bad=, height=, width= do not fit together."""
    if not cfg.annotations:
        raise UserError("annotations= names no file; give COCO JSON files, e.g. of generate.py")
    if cfg.images and len(cfg.images) != len(cfg.annotations):
        files = f"{len(cfg.annotations)} annotation files"
        raise UserError(f"images= has {len(cfg.images)} folders for {files}")
    for folder in map(Path, cfg.annotations):
        if folder.is_dir() and Path(cfg.out).resolve().is_relative_to(folder.resolve()):
            raise UserError(f"out={cfg.out} lies in {folder}, whose pictures are read")
    if cfg.max_bad and not cfg.check_pictures:
        raise UserError("max_bad= leaves out what check_pictures=false does not see; give one")
    if cfg.height % cfg.patch or cfg.width % cfg.patch:
        sides = f"height={cfg.height} and width={cfg.width}"
        raise UserError(f"{sides} must be multiples of patch={cfg.patch}")


def read_people(annotations, folder=None, limits=Limits()):  # noqa: B008  a tuple
    """Read a COCO JSON of people, or take every picture of a plain folder as one person.

    `folder` holds the pictures; default: `images` beside the JSON, or else its own folder.
    Rows of the first category with keypoints count, or of the first category where none has any.
    Names of joints are respelt as COCO's (joints.joint_name); scores in place of visibilities
    become such (see `visibility`). Crowds and people with few joints are left out; where joints
    are asked for, so is a person whose `num_keypoints` is 0 (CrowdPose does not count head and
    neck).
    Pictures that are missing, empty, truncated or of another size than the file says are an error
    that names the first. Pictures listed with width and height swapped, as in CrowdPose's old
    files, keep their own size.
    → (People, {"bad": [names left out], "bad_boxes": people left out, "turned": pictures listed
    with sides swapped, "clipped": boxes cut by more than a px, "crowds": such rows left out,
    "scores": it holds scores}).
    Raises UserError: not such a file, ids that do not match or stand twice, a wrong keypoint count,
    a number that is not finite, a visibility that is none, nobody left.
    """
    path = Path(annotations)
    if os.path.isdir(path):
        return read_folder(path, limits)
    with reading(path, "COCO people") as place:
        people, rows, scores = parse(path, limits, place)
    people = people._replace(folder=str(folder or folder_beside(path)))
    joints = (people.keypoints[:, :, 2] > 0).sum(1) * (rows["num_keypoints"] != 0)
    keep = (rows["iscrowd"] == 0) & (joints >= limits.min_joints)
    people = people if keep.all() else people.take(keep)
    bad, turned = [], 0
    if limits.check_pictures:
        people, turned, bad = check_pictures(people, path)
    people = leave_out(people, bad, path, limits)
    people, clipped, bad_boxes = clip_boxes(people, path, limits)
    crowds = int((rows["iscrowd"] != 0).sum())
    if not len(people.files):
        why = f"crowds, people with fewer than {limits.min_joints} joint(s) or without a picture"
        raise UserError(f"{path}: all of its {len(keep)} annotations are {why}; look at the file")
    notes = {"bad": [name for name, _ in bad], "bad_boxes": bad_boxes, "turned": turned}
    notes["crowds"] = crowds
    return people, notes | {"clipped": clipped, "scores": scores}


# --------------------------------------------------------------------------------- a file's content


def parse(path, limits, place):
    """A COCO file → (People of its person category, name → column of the rest, holds it scores?)"""
    images, rows, document = flat_columns(path, place)
    category, joints, skeleton = person_category(document)
    size = np.array(rows.pop("size"), np.int32).reshape(-1, 2)
    files = np.array(rows.pop("file"), dtype=np.bytes_)
    rows = rows_of_category(rows, int(category["id"]), len(joints))
    seen = rows["keypoints"][:, :, 2]
    seen[:], scores = visibility(seen, limits.min_score, rows["id"])
    ids = rows["image_id"].tolist()
    image = np.array([images.get(i, -1) for i in ids])  # its row among the images
    if image.min() < 0:
        names = f"an annotation names image id {ids[image.argmin()]}"
        raise UserError(f"{path}: {names}, which is not among the images")
    people = People(
        folder="", files=files[image], size=size[image], boxes=rows["bbox"],
        keypoints=rows["keypoints"], pose_id=rows["pose_id"], annotation_id=rows["id"],
        image_id=rows["image_id"], area=rows["area"], joints=joints, skeleton=skeleton,
        flip=flip_ids(joints), category=category,
    )  # fmt: skip
    return people, rows, scores


def flat_columns(path, place):
    """One pass over the JSON. → {image id: its row}, name → array over all annotations, the rest.

    Entries go into flat arrays as the parser meets them: 600,000 annotations take 0.5 GB at the
    peak; as Python objects they would take 1.4 GB. place.at: the entry that an error would be in.
    """
    names = "id image_id pose_id iscrowd category_id num_keypoints count".split()
    images, rows = {}, {name: array("q") for name in names}
    rows |= {name: array("f") for name in ("keypoints", "bbox", "area")}
    rows |= {"file": [], "size": array("q")}

    def take(entry):
        if "image_id" in entry and ("bbox" in entry or "category_id" in entry):
            place.at = f"annotation {entry.get('id')!r:.40}"
            rows["id"].append(whole(entry["id"]))
            box, points = entry["bbox"], entry.get("keypoints") or []
            if not isinstance(box, list) or len(box) != 4:
                raise ValueError(f"its box is {box!r:.80}, not x, y, w, h")
            rows["bbox"].extend(box)
            rows["keypoints"].extend(points)
            rows["count"].append(len(points))
            rows["area"].append(entry["area"] if "area" in entry else box[2] * box[3])
            rows["image_id"].append(whole(entry["image_id"]))
            rows["pose_id"].append(whole(entry.get("pose_id", -1)))
            rows["iscrowd"].append(whole(entry.get("iscrowd", 0)))
            rows["category_id"].append(whole(entry.get("category_id", -1)))
            rows["num_keypoints"].append(whole(entry.get("num_keypoints", -1)))
        elif "file_name" in entry and "width" in entry:
            place.at = f"image {entry.get('id')!r:.40}"
            number = whole(entry["id"])
            if number in images:
                raise ValueError("another image has this id; ids must differ")
            rows["size"].extend((whole(entry["width"]), whole(entry["height"])))
            images[number] = len(rows["file"])
            rows["file"].append(entry["file_name"].encode())
        else:
            return entry
        place.at = None

    with open(regular(path), encoding="utf-8-sig") as file:
        document = json.load(file, object_hook=take)
    if not isinstance(document, dict):
        raise ValueError("it holds no lists `images`, `annotations`, `categories`")
    for name, keys, count in (
        ("images", '"file_name" or "width"', len(rows["file"])),
        ("annotations", '"image_id" or "bbox"', len(rows["id"])),
    ):
        left = document[name]  # `take` leaves None of what it took
        if not isinstance(left, list) or len(left) != count or any(e is not None for e in left):
            odd = next((entry for entry in left if entry is not None), left)
            raise ValueError(f'an entry of "{name}" lacks {keys}: {odd!r:.80}')
    return images, rows, document


def whole(number):
    """JSON's 3, 3.0 and "3" → 3."""
    try:
        is_whole = int(number) == float(number)
    except (TypeError, ValueError, OverflowError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"{number!r:.40} is no whole number")
    return int(number)


def person_category(document):
    """The first category with keypoints, else the first. → (it as read, names of its K joints,
    0-based links between them)."""
    categories = document["categories"]
    category = next((c for c in categories if c.get("keypoints")), categories[0])
    named = category.get("keypoints") or []
    joints = [joint_name(name) for name in named]
    links = [(int(i) - 1, int(j) - 1) for i, j in category.get("skeleton") or []]
    twice = sorted({name for name in joints if joints.count(name) > 1})
    if twice:
        raise ValueError(f"its category names the joint {twice[0]} twice: {named!r:.300}")
    links = [link for link in links if 0 <= min(link) and max(link) < len(joints)]
    return category, joints, links


def rows_of_category(rows, category_id, k):
    """name → NumPy column of the annotations of one category, checked.

    Annotations that name no category are taken as of this one. keypoints (n, k, 3), bbox (n, 4),
    float32.
    """
    own = np.isin(np.array(rows["category_id"]), (category_id, -1))
    if not own.any():
        raise ValueError("it holds no person annotations")
    points, n = np.frombuffer(rows["keypoints"], np.float32), int(own.sum())
    if not own.all():
        points = points[np.repeat(own, rows["count"])]
    boxes = np.array(rows["bbox"], np.float32).reshape(-1, 4)[own]
    flat = ("keypoints", "bbox")
    rows = {name: np.array(column)[own] for name, column in rows.items() if name not in flat}

    def refuse(wrong, problem):
        if wrong.any():
            a = wrong.argmax()
            raise ValueError(f"annotation {rows['id'][a]} {problem(a)}")

    count = rows["count"]
    if count.any() and not k:
        raise ValueError("its annotations have keypoints, but its category names none")
    if not count.any():  # boxes alone
        points = np.zeros(3 * k * len(count), np.float32)
        count = np.full(len(count), 3 * k)
    refuse(count != 3 * k, lambda a: f"has {count[a]} keypoint values; {k} joints need {3 * k}")
    rows |= {"keypoints": points.reshape(n, k, 3), "bbox": boxes}
    order = rows["id"].argsort(kind="stable")
    twice = np.zeros(len(order), bool)
    twice[order[1:]] = np.diff(rows["id"][order]) == 0
    refuse(twice, lambda a: "stands twice; ids must differ")
    odd = ~np.isfinite(rows["keypoints"]).all((1, 2))
    refuse(odd, lambda a: "has a keypoint that is not finite")
    odd = ~(rows["area"] >= 0) | np.isinf(rows["area"])
    refuse(odd, lambda a: f"has area {rows['area'][a]}, which is no finite number from 0 on")
    return rows


def visibility(values, min_score, ids):
    """Third column of keypoints (N, K) as read → (0 missing, 1 hidden, 2 visible; was it scores?).

    Where any value of a file is no whole number, they are scores of a pose estimator, all from
    0 to 1: a joint of `min_score` or more is visible, another one missing. Else they are 0, 1, 2.
    """
    scores = bool((values != np.rint(values)).any())
    wrong = (values < 0) | (values > (1 if scores else 2))
    if wrong.any():
        a, j = np.argwhere(wrong)[0]
        need = "0, 1, 2, or scores in all of the file"
        if scores:
            need = "0 to 1, for the file holds scores (some values are no whole numbers)"
        what = f"annotation {ids[a]} has v = {values[a, j]:g} at joint {j + 1}"
        raise ValueError(f"{what}; needed: {need}")
    return np.where(values >= min_score, 2, 0) if scores else values, scores


# ------------------------------------------------------------------------------- pictures and boxes


def check_pictures(people, path):
    """→ (people, how many pictures are listed with sides swapped, find_bad_pictures of the rest).

    The people get the swapped pictures' own sizes.
    """
    bad = find_bad_pictures(people.folder, people.files, people.size, path)
    other_size = [name.encode() for name, reason in bad if "its annotation says" in reason]
    size, turned = people.size.copy(), {}  # turned: name → whether its sides are swapped
    for row in np.flatnonzero(np.isin(people.files, np.array(other_size, dtype=np.bytes_))):
        name, own = people.files[row].decode(), people.size[row, ::-1]
        if name not in turned:
            path = os.path.join(people.folder, name)
            turned[name] = not picture_fault(path, tuple(own.tolist()))
        if turned[name]:
            size[row] = own
    bad = [(name, reason) for name, reason in bad if not turned.get(name)]
    return people._replace(size=size), sum(turned.values()), bad


def clip_boxes(people, path, limits):
    """→ (people with boxes cut to their pictures, how many were cut, how many people left out)."""
    boxes, size = people.boxes, people.size
    with np.errstate(invalid="ignore"):  # NaN and infinite boxes
        low, high = np.maximum(boxes[:, :2], 0), np.minimum(boxes[:, :2] + boxes[:, 2:], size)
        cut = np.concatenate([low, high - low], 1).astype(np.float32)
        centre = boxes[:, :2] + boxes[:, 2:] / 2
        area = np.isfinite(boxes).all(1) & (boxes[:, 2:] > 0).all(1)
        inside = (centre >= 0).all(1) & (centre <= size).all(1)
        # A box such as 1e-9 px at x = 20, where float32 holds no such step, is empty once cut.
        good = area & inside & (cut[:, 2:] > 0).all(1)
    wrong = np.flatnonzero(~good)
    if advice := limits.exceeded("max_bad_boxes", len(wrong)):
        a = wrong[0]
        problem = "; finite x, y, w, h with w, h > 0 are needed"
        if area[a]:
            problem = ", of no width or height in float32"
        if area[a] and not inside[a]:
            problem = f" outside its {size[a].tolist()} picture"
        what = f"annotation {people.annotation_id[a]} has box {boxes[a].tolist()}{problem}"
        raise UserError(f"{path}: {what}{and_more(wrong)}; {advice}")
    people = people._replace(boxes=cut)
    clipped = int((np.abs(cut - boxes)[good] > 1).any(1).sum())
    return people.take(good) if len(wrong) else people, clipped, len(wrong)


# ---------------------------------------------------------------------- captions, and a set of ours


def read_image_captions(path):
    """COCO captions JSON → {image id: its captions, in order of their ids}. Empty ones do not
    count."""
    captions = {}
    with reading(path, "COCO captions") as place:
        for row in read_json(path)["annotations"]:
            place.at = f"annotation {row['id']!r:.40}"
            if not isinstance(row["caption"], str):
                raise ValueError(f"its caption is {row['caption']!r:.40}, not a text")
            if text := row["caption"].strip():
                captions.setdefault(whole(row["image_id"]), []).append((whole(row["id"]), text))
    return {image: [text for _, text in sorted(told)] for image, told in captions.items()}


def write_people(path, description, rows):
    """Write COCO keypoint JSON of COCO's 17 joints, an entry per line.

    rows() iterates, once for the pictures and once for the people, over dicts: `file_name`, `size`
    (w, h) and what the annotation holds beside its ids. People of one picture follow one another.
    Nothing is kept: 600,000 people take no memory.
    """

    def write(part):
        with open(part, "w", encoding="utf-8") as file:
            file.write(f'{{"info": {json.dumps({"description": description})},\n')
            file.write(f'"categories": {json.dumps([COCO_CATEGORY])},\n"images": [')
            for i, people in enumerate(by_picture(rows()), 1):
                image = dict(id=i, file_name=people[0]["file_name"])
                image |= dict(width=people[0]["size"][0], height=people[0]["size"][1])
                file.write((",\n" if i > 1 else "\n") + json.dumps(image))
            file.write('\n],\n"annotations": [')
            number = 0
            for i, people in enumerate(by_picture(rows()), 1):
                for row in people:
                    number += 1
                    entry = dict(id=number, image_id=i, category_id=COCO_CATEGORY["id"])
                    entry |= {k: v for k, v in row.items() if k not in ("file_name", "size")}
                    file.write((",\n" if number > 1 else "\n") + json.dumps(entry))
            file.write("\n]}\n")

    write_atomic(path, write)


def by_picture(rows):
    """Rows of people → lists of those who follow one another in a picture of the same name."""
    return (list(people) for _, people in groupby(rows, key=lambda row: row["file_name"]))


def write_image_captions(path, rows):
    """Write COCO captions JSON, a caption per picture, an entry per line.

    rows() iterates over the dicts that write_people takes, with `caption`: the ids of
    the pictures are the same as there.
    """

    def write(part):
        with open(part, "w", encoding="utf-8") as file:
            file.write('{"annotations": [')
            for i, people in enumerate(by_picture(rows()), 1):
                entry = dict(id=i, image_id=i, caption=people[0]["caption"])
                file.write((",\n" if i > 1 else "\n") + json.dumps(entry))
            file.write("\n]}\n")

    write_atomic(path, write)
