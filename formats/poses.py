"""People with joints for top-down pose: the official files, boxes, and the person cut out of the picture.

Legend: N people · K joints · H, W input picture · xy in px, pixel centres at whole numbers (COCO's frame).
"""

import math
import os
from pathlib import Path

import numpy as np
import scipy.io
import torch
from PIL import Image
from torch.utils.data import Dataset

from common import SAMPLE, rng_of
from data import (
    UNREADABLE,
    as_bytes,
    find_bad_pictures,
    flip_ids,
    load_picture,
    pictures_at,
    read_json,
)
from formats.coco import MIN_SCORE, People, read_people
from plumbing.config import UserError
from tasks import pose

# ---------------------------------------------------------------------------------------------------------- readers

MPII_JOINTS = (
    "right_ankle right_knee right_hip left_hip left_knee left_ankle pelvis thorax upper_neck head_top right_wrist "
    "right_elbow right_shoulder left_shoulder left_elbow left_wrist"
).split()
MPII_LINKS = [(0, 1), (1, 2), (2, 6), (6, 3), (3, 4), (4, 5), (6, 7), (7, 8), (8, 9), (10, 11), (11, 12), (12, 7)]
MPII_LINKS += [(7, 13), (13, 14), (14, 15)]


def read_pose_file(path, folder=None, max_bad=0, with_document=False, max_bad_boxes=0):
    """COCO keypoint JSON of any joint set, or MPII's own list → (People, notes, COCO document or None).

    COCO people without a joint are left out; MPII's stay, for the .mat counts them. The document is the file as
    pycocotools wants it: rows of the person category, whole numbers as ids; area (.53 × box),
    iscrowd and num_keypoints where the file has none. CrowdPose and AIC take .53 × box in any case.
    A person left out for the box does not count.
    """
    try:
        with open(path, encoding="utf-8") as file:
            is_mpii = file.read(64).lstrip().startswith("[")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if is_mpii:
        people, notes = read_mpii(path, folder, max_bad, max_bad_boxes)
        return people, notes, coco_document(people)
    limits = dict(min_joints=1, max_bad=max_bad, max_bad_boxes=max_bad_boxes)
    people, notes = read_people(path, folder, **limits)
    if not with_document:
        return people, notes, None
    document, category = read_json(path), people.category["id"]
    document["annotations"] = [
        a for a in document["annotations"] if int(a.get("category_id", category)) == int(category)
    ]
    own_size = dict(zip(people.image_id.tolist(), people.size.tolist()))
    for image in document["images"]:
        image["id"] = int(image["id"])  # some files write ids as text
        if image["id"] in own_size:
            image["width"], image["height"] = own_size[image["id"]]
    by_box, read = pose.area_from_box(people.joints), set(people.annotation_id.tolist())
    for a in document["annotations"]:
        a["id"], a["image_id"], a["category_id"] = int(a["id"]), int(a["image_id"]), category
        if by_box or "area" not in a:
            a["area"] = pose.BOX_AREA * a["bbox"][2] * a["bbox"][3]
        a.setdefault("iscrowd", 0)
        if notes["scores"]:  # visible or missing for pycocotools too
            a["keypoints"][2::3] = [2 if v >= MIN_SCORE else 0 for v in a["keypoints"][2::3]]
            a.pop("num_keypoints", None)
        a.setdefault("num_keypoints", sum(v > 0 for v in a["keypoints"][2::3]))
        if a["id"] not in read:
            a["num_keypoints"] = 0  # left out for its box, if it counted at all
    area = {a["id"]: a["area"] for a in document["annotations"]}
    people = people._replace(area=np.array([area[i] for i in people.annotation_id.tolist()], np.float32))
    return people, notes, document


def person_category(document):
    return next(c for c in document["categories"] if c.get("keypoints"))


def read_mpii(path, folder, max_bad, max_bad_boxes=0):
    """MPII's train/valid lists as HRNet publishes them: image, centre, scale (÷ 200 px), joints counted from 1.

    Box: square of 200 · scale around the centre, which is moved down by 15 · scale [HRNet].
    Entries whose box lies beyond the picture or holds a NaN are left out, up to max_bad_boxes.
    """
    folder = Path(folder) if folder else Path(path).parent / "images"
    folder = folder if folder.is_dir() else Path(path).parent
    rows = read_json(path)
    try:
        files = [os.fspath(row["image"]) for row in rows]  # a TypeError where it is no text
        centre = np.array([row["center"] for row in rows], float).reshape(-1, 2)
        scale = np.array([row["scale"] for row in rows], float)
        xy = np.array([row["joints"] for row in rows], float).reshape(-1, 16, 2) - 1
        seen = np.array([row["joints_vis"] for row in rows], float).reshape(-1, 16, 1) * 2
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is neither a COCO keypoint file nor MPII's list: {error!r}") from None
    centre[:, 1] += 15 * scale
    centre, side = centre - 1, 200 * scale[:, None]
    boxes = np.concatenate([centre - side / 2, side, side], 1).astype(np.float32)
    keypoints = np.concatenate([np.where(seen > 0, xy, 0), seen], 2).astype(np.float32)
    if not (keypoints[:, :, 2] > 0).any():
        raise UserError(f"{path} lists no person with a visible joint")
    people = people_at(folder, files, boxes, MPII_JOINTS, MPII_LINKS, keypoints)
    people, notes = measured(people, path, max_bad)
    # A box may hang over the picture's edge, but not lie beyond it.
    low, high = np.maximum(people.boxes[:, :2], 0), np.minimum(people.boxes[:, :2] + people.boxes[:, 2:], people.size)
    wrong = ~((low < high).all(1) & np.isfinite(people.keypoints).all((1, 2)))  # also where a number is NaN
    if wrong.sum() > max_bad_boxes:
        a = wrong.argmax()
        raise UserError(
            f"{path}: entry {people.annotation_id[a]} ({people.files[a].decode()}) has box {people.boxes[a].tolist()} "
            f"in its {people.size[a].tolist()} picture; centre, scale > 0 and joints must be numbers and lie in it"
            f"; mend it or allow max_bad_boxes={wrong.sum()}"
        )
    return people.take(~wrong), notes | {"rows": len(rows), "bad_boxes": int(wrong.sum())}


def people_at(folder, files, boxes, joints, skeleton, keypoints=None, image_id=None, size=None):
    """People from arrays; without image ids each file name gets the next number from 1."""
    n = len(files)
    number = {name: i for i, name in enumerate(dict.fromkeys(files), 1)}
    image_id = [number[name] for name in files] if image_id is None else image_id
    return People(
        folder=str(folder), files=as_bytes(folder, files).reshape(n), boxes=np.asarray(boxes, np.float32),
        size=np.zeros((n, 2), np.int32) if size is None else np.asarray(size, np.int32),
        keypoints=np.zeros((n, len(joints), 3), np.float32) if keypoints is None else keypoints,
        pose_id=np.full(n, -1), annotation_id=np.arange(1, n + 1), image_id=np.array(image_id, np.int64),
        area=np.asarray(boxes)[:, 2:].prod(1).astype(np.float32) * pose.BOX_AREA, joints=list(joints),
        skeleton=[tuple(pair) for pair in skeleton], flip=flip_ids(list(joints)), category={"id": 1},
    )  # fmt: skip


def measured(people, path, max_bad):
    """Fill in the pictures' sizes from their headers; leave out up to `max_bad` unreadable ones."""
    sizes, bad = {}, {}
    for name in dict.fromkeys(people.files.tolist()):
        try:
            with Image.open(Path(people.folder) / name.decode()) as picture:
                sizes[name] = picture.size
        except UNREADABLE as error:
            bad[name.decode()] = str(error)
    if len(bad) > max_bad or not sizes:
        name, reason = next(iter(bad.items()))
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(f"cannot read picture {people.folder}/{name}{more} (of {path}): {reason}; max_bad allows some")
    people = people.take(np.array([name in sizes for name in people.files.tolist()], bool))
    size = np.array([sizes[name] for name in people.files.tolist()], np.int32).reshape(-1, 2)
    notes = {"bad": list(bad), "bad_boxes": 0, "turned": 0, "clipped": 0}
    return people._replace(size=size), notes


def coco_document(people, keypoints=None, joint_scores=None, score=None):
    """People → COCO keypoint JSON (its fields: docs/annotations.md).

    Optionally other keypoints (N, K, 3), joint scores (N, K) and scores (N,)."""
    keypoints = people.keypoints if keypoints is None else keypoints
    images, annotations = {}, []
    for n in range(len(people.files)):
        image, (w, h) = int(people.image_id[n]), people.size[n].tolist()
        images[image] = {"id": image, "file_name": people.files[n].decode(), "width": w, "height": h}
        row = {"id": int(people.annotation_id[n]), "image_id": image, "category_id": 1, "iscrowd": 0}
        row |= {"bbox": [round(float(v), 2) for v in people.boxes[n]], "area": float(people.area[n])}
        row["num_keypoints"] = int((keypoints[n, :, 2] > 0).sum())
        row["keypoints"] = [round(float(v), 3) for v in keypoints[n].flatten()]
        if score is not None:
            row |= {"score": float(score[n]), "keypoint_scores": [round(float(v), 4) for v in joint_scores[n]]}
        annotations.append(row)
    skeleton = [[a + 1, b + 1] for a, b in people.skeleton]
    category = {"id": 1, "name": "person", "supercategory": "person", "keypoints": people.joints, "skeleton": skeleton}
    info = {"description": "people and their joints; fields: docs/annotations.md"}
    document = {"info": info, "images": list(images.values()), "annotations": annotations}
    return document | {"categories": [category]}


def said(notes):
    """What a reader left out or mended, as a clause in brackets; "" where there is nothing."""
    parts = [("unreadable pictures left out", len(notes["bad"]))]
    parts += [("people left out for their box", notes["bad_boxes"])]
    parts += [("pictures listed with width and height swapped", notes["turned"])]
    said = ", ".join(f"{what}: {n}" for what, n in parts if n)
    return said and f" ({said})"


def read_folder(path, joints, skeleton, max_bad=0):
    """All pictures below a folder, or one picture, each as a person whose box is the whole picture.

    → (People, {file name, or number it consists of: (file name, (w, h), image id)} for
    `read_boxes`, None for a picture that is left out).
    """
    folder, files = pictures_at(path)
    people = people_at(folder, files, np.ones((len(files), 4)), joints, skeleton)
    people, notes = measured(people, folder, max_bad)
    damaged = find_bad_pictures(people.folder, people.files)
    if len(damaged) + len(notes["bad"]) > max_bad:
        raise UserError(f"{folder}/{damaged[0][0]} is {damaged[0][1]}; mend it or allow it by max_bad=")
    people = people.take(~np.isin(people.files, np.array([name.encode() for name, _ in damaged], dtype=np.bytes_)))
    boxes = np.concatenate([np.zeros_like(people.size), people.size], 1).astype(np.float32)
    people = people._replace(boxes=boxes, area=boxes[:, 2:].prod(1) * pose.BOX_AREA)
    entries = dict.fromkeys([*notes["bad"], *(name for name, _ in damaged)])
    for f, s, i in zip(people.files, people.size.tolist(), people.image_id):
        entries[f.decode()] = (f.decode(), tuple(s), int(i))
    stems = {name: Path(name).stem for name in entries}  # COCO's names are numbers
    numbers = {int(stems[name]): entry for name, entry in entries.items() if stems[name].isdigit()}
    return people, numbers | entries


def pictures_of(document, people, left_out):
    """{id, and file name: (file name, (w, h), id)} of a COCO document's pictures, for `read_boxes`.

    None for those in left_out (ids). Sizes that the document lacks come from its people.
    """
    size, images = dict(zip(people.image_id.tolist(), people.size.tolist())), {}
    for i in document["images"]:
        images[i["id"]] = images[i["file_name"]] = None
        if i["id"] not in left_out:
            wh = (int(i["width"]), int(i["height"])) if "width" in i else size[i["id"]]
            images[i["id"]] = images[i["file_name"]] = (i["file_name"], wh, i["id"])
    return images


def read_boxes(path, images, people, category_id=1, max_bad_boxes=0):
    """Person detections as COCO publishes them: [{image_id, bbox, score, category_id}].

    images: {image id or file name: (file name, (w, h), id), or None for a left-out picture};
    an entry may name its picture by `file_name` instead of id. people: of the same pictures, for
    joints and folder. Entries of other categories and of left-out pictures are left out; so are up
    to max_bad_boxes boxes of no area or outside their picture.
    → (People, score (N,), a sentence about them).
    """
    files, ids, sizes, boxes, scores = [], [], [], [], []
    on_bad, wrong = 0, []
    rows = read_json(path)
    try:
        for row in rows:
            if row.get("category_id", category_id) != category_id:
                continue
            key = row["file_name"] if "file_name" in row else row["image_id"]
            if key not in images:
                raise UserError(f"{path}: a box names picture {key!r}, which is not among the pictures")
            if images[key] is None:
                on_bad += 1
                continue
            (name, size, image_id), box = images[key], [float(v) for v in row["bbox"]]
            score = float(row.get("score", 1.0))
            if len(box) != 4 or not math.isfinite(score):
                what = f"box {box} of picture {key!r}, score {score}"
                raise UserError(f"{path}: {what}; x, y, w, h and a score are needed")
            x, y = box[0] + box[2] / 2, box[1] + box[3] / 2
            if not 1e-6 < min(box[2:]) <= max(box[2:]) < 1e6:
                wrong.append(f"box {box} of picture {key!r}: w, h > 0 are needed")
                continue
            if not (0 <= x <= size[0] and 0 <= y <= size[1]):
                wrong.append(f"box {box} lies outside its {tuple(size)} picture {key!r}")
                continue
            for column, value in zip((files, ids, sizes, boxes, scores), (name, image_id, size, box, score)):
                column.append(value)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no list of boxes (image_id or file_name, bbox, score): {error!r}") from None
    if len(wrong) > max_bad_boxes:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UserError(f"{path}: {wrong[0]}{more}; mend it or allow max_bad_boxes={len(wrong)}")
    if not files:
        raise UserError(f"{path} holds no person boxes")
    people = people_at(people.folder, files, boxes, people.joints, people.skeleton, image_id=ids, size=sizes)
    left_out = [f"on left-out pictures: {on_bad}"] * bool(on_bad)
    left_out += [f"left out as no box: {len(wrong)}"] * bool(wrong)
    about = f"{len(files)} boxes" + (f" ({', '.join(left_out)})" if left_out else "")
    return people, np.array(scores, np.float64), about


def read_mpii_heads(path, n):
    """MPII's official ground-truth .mat of n people.

    → (head size (n,) px = .6 × head box diagonal, labelled (n, 16) bool, joints (n, 16, 2) px).
    """
    try:
        mat = scipy.io.loadmat(path)
        boxes, missing = np.asarray(mat["headboxes_src"], float), np.asarray(mat["jnt_missing"])
        xy = np.asarray(mat["pos_gt_src"], float) - 1  # counted from 1
    except Exception as error:  # scipy raises many kinds for a file that is no .mat
        fields = "headboxes_src, jnt_missing, pos_gt_src"
        raise UserError(f"{path} is not MPII's ground-truth .mat ({fields}): {error}") from None
    if boxes.shape != (2, 2, n) or missing.shape != (16, n) or xy.shape != (16, 2, n):
        raise UserError(
            f"{path} describes {boxes.shape[-1]} people, the annotation file {n}; use the pair that belong together"
        )
    head = 0.6 * np.linalg.norm(boxes[1] - boxes[0], axis=0)
    return head, (missing == 0).T, xy.transpose(2, 0, 1)


# ----------------------------------------------------------------------------------------------------- input pictures


class PosePictures(Dataset):
    """Item (epoch, index) → the person's input: picture uint8 (3, H, W), keypoints (K, 3) input px, matrix (2, 3).

    Training adds mirror, half body, scale, rotation and a shift of the box [ViTPose], a function of
    (seed, epoch, index).
    """

    def __init__(self, cfg, people, training):
        self.people = people
        self.cfg, self.training, self.size = cfg, training, (cfg.height, cfg.width)
        self.aspect = cfg.width / cfg.height
        self.centre, self.extent = pose.regions(people.boxes, self.aspect, cfg.padding)
        self.lower = pose.lower_body(people.joints)

    def __len__(self):
        return len(self.people.files)

    def name(self, index):
        return f"{self.people.folder}/{self.people.files[index].decode()}"

    def __getitem__(self, item):
        epoch, index = item
        people, keypoints = self.people, self.people.keypoints[index].copy()
        centre, extent, degrees, mirror = self.centre[index], self.extent[index], 0.0, False
        if self.training:
            centre, extent, degrees, mirror = self.augment(seed_key=(epoch, index), keypoints=keypoints)
        matrix = pose.affine(centre, extent, self.size, degrees, mirror)
        keypoints[:, :2] = pose.to_input(matrix, keypoints[:, :2])
        if mirror:
            keypoints = keypoints[people.flip]
        picture = load_picture(people.folder, people.files[index], people.size[index])
        pixels = torch.from_numpy(pose.warp(picture, matrix, self.size)).permute(2, 0, 1).contiguous()
        return {"image": pixels, "keypoints": torch.from_numpy(keypoints), "matrix": matrix, "index": index}

    def augment(self, seed_key, keypoints):
        """→ (centre, extent, degrees, mirror) of the region to cut out."""
        cfg, index = self.cfg, seed_key[1]
        rng = rng_of(SAMPLE, cfg.seed, *seed_key)
        centre, extent, degrees = self.centre[index], self.extent[index], 0.0
        mirror, half = rng.random() < cfg.flip, None
        if rng.random() < cfg.half_body:
            half = pose.half_body(keypoints, self.lower, self.aspect, rng)
            centre, extent = half or (centre, extent)
        extent = extent * np.clip(rng.normal(1, cfg.scale), 1 - cfg.scale, 1 + cfg.scale)
        if rng.random() < cfg.rotation_p:
            degrees = float(np.clip(rng.normal(0, cfg.rotation), -2 * cfg.rotation, 2 * cfg.rotation))
        # deviates from [ViTPose]: drawn anew in each epoch. There a person keeps one shift.
        if rng.random() < cfg.shift and half is None:
            centre = centre + rng.uniform(-0.2, 0.2, 2) * self.people.boxes[index, 2:]
        return centre, extent, degrees, mirror
