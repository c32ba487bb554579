"""COCO keypoint files of any joint set, read into flat arrays.

Legend: N annotated people · K joints. Frame: pixel centres at whole numbers; boxes are x, y, w, h in px.
"""

import json
import os
from array import array
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import find_bad_pictures, flip_ids, joint_name, picture_fault
from plumbing.config import UserError

MIN_SCORE = 0.2  # HRNet and ViTPose count a joint into a pose's score from here [HRNet] [ViTPose]


class People(NamedTuple):
    """N annotated people as flat arrays, so that 600 k of them cost little memory and forked workers share them."""

    folder: str  # picture folder
    files: np.ndarray  # (N,) bytes, path below `folder`
    size: np.ndarray  # (N, 2) int32, width and height of the picture
    boxes: np.ndarray  # (N, 4) float32, x y w h px, inside the picture
    keypoints: np.ndarray  # (N, K, 3) float32, x y px and 0 missing / 1 hidden / 2 visible
    pose_id: np.ndarray  # (N,) int64, pictures of one pose share it; -1 = no pose group
    annotation_id: np.ndarray  # (N,) int64
    image_id: np.ndarray  # (N,) int64
    area: np.ndarray  # (N,) float32 px²
    joints: list  # K joint names
    skeleton: list  # 0-based pairs of joints; pairs outside 0..K-1 (CrowdPose's file has some) are dropped
    flip: list  # K joint ids with left and right swapped
    category: dict  # the category as read

    def take(self, rows):
        """The same with only these rows (ids or bool mask)."""
        return self._replace(**{name: value[rows] for name, value in self._asdict().items() if _is_column(value)})


def _is_column(value):
    return isinstance(value, np.ndarray)


def read_people(
    annotations,
    folder=None,
    min_joints=0,
    max_bad=0,
    check_pictures=True,
    min_score=MIN_SCORE,
    max_bad_boxes=None,
):
    """Read a COCO keypoint JSON with any joint set. `folder` defaults to `images` beside it, or else its own folder.

    Rows of the first category with keypoints count. Names of joints are respelt as COCO's
    (data.joint_name); scores in place of visibilities become such (see `visibility`).
    Crowd annotations and people with fewer than `min_joints` joints are left out; a person whose
    `num_keypoints` is 0 has none, whatever is listed (CrowdPose does not count head and neck).
    Pictures that are missing, empty, truncated or of another size than the file says are an error
    that names the first; with `max_bad` > 0 up to that many are left out instead. So are up to
    `max_bad_boxes` people whose box is not finite, has no area or lies outside its picture.
    Pictures listed with width and height swapped, as in CrowdPose's old files, keep their own size.
    → (People, {"bad": [names left out], "bad_boxes": people left out, "turned": pictures listed
    with sides swapped, "clipped": boxes cut to their picture, "scores": it holds scores}).
    Raises UserError: not such a file, ids that do not match or stand twice, a wrong keypoint count,
    a number that is not finite, a visibility that is none, nobody left.
    """
    path = Path(annotations)
    images, rows, document = _parse_coco(path)
    category, joints, skeleton = _person_category(document, path)
    size, files = np.array(rows.pop("size"), np.int32).reshape(-1, 2), np.array(rows.pop("file"), dtype=np.bytes_)
    rows = _rows_of(rows, int(category["id"]), len(joints), path)
    seen = rows["keypoints"][:, :, 2]
    seen[:], scores = visibility(seen, min_score, rows["id"], path)
    ids = rows["image_id"].tolist()
    image = np.fromiter((images.get(i, -1) for i in ids), np.int64, len(ids))  # its row among the images
    if image.min() < 0:
        unknown = ids[image.argmin()]
        raise UserError(f"{path}: an annotation names image id {unknown}, which is not among the images")
    folder = Path(folder) if folder else path.parent / "images" if (path.parent / "images").is_dir() else path.parent
    people = People(
        folder=str(folder),
        files=files[image],
        size=size[image],
        boxes=rows["bbox"],
        keypoints=rows["keypoints"],
        pose_id=rows["pose_id"],
        annotation_id=rows["id"],
        image_id=rows["image_id"],
        area=rows["area"],
        joints=joints,
        skeleton=skeleton,
        flip=flip_ids(joints),
        category=category,
    )
    joints = (people.keypoints[:, :, 2] > 0).sum(1) * (rows["num_keypoints"] != 0)
    keep = (rows["iscrowd"] == 0) & (joints >= min_joints)
    people = people if keep.all() else people.take(keep)
    bad, turned = [], 0
    if check_pictures:
        people, turned, bad = _check_pictures(people, path)
    if len(bad) > max_bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        name, reason = bad[0]
        raise UserError(f"{folder}/{name} is {reason}{more} (of {path}); mend it or allow max_bad={len(bad)}")
    if bad:
        people = people.take(~np.isin(people.files, np.array([name.encode() for name, _ in bad])))
    people, clipped, bad_boxes = _clip_boxes(people, path, max_bad_boxes)
    if not len(people.files):
        why = f"crowds, people with fewer than {min_joints} joint(s) or without a whole picture"
        raise UserError(f"{path}: all of its {len(ids)} annotations are {why}; look at the file")
    notes = {"bad": [name for name, _ in bad], "bad_boxes": bad_boxes, "turned": turned}
    return people, notes | {"clipped": clipped, "scores": scores}


def _check_pictures(people, path):
    """→ (people, how many pictures are listed with sides swapped, find_bad_pictures of the rest).

    The people get the swapped pictures' own sizes.
    """
    bad = find_bad_pictures(people.folder, people.files, people.size, path)
    other_size = [name.encode() for name, reason in bad if "its annotation says" in reason]
    size, turned = people.size.copy(), {}  # turned: name → whether its sides are swapped
    for row in np.flatnonzero(np.isin(people.files, np.array(other_size, dtype=np.bytes_))):
        name, own = people.files[row].decode(), people.size[row, ::-1]
        if name not in turned:
            turned[name] = not picture_fault(os.path.join(people.folder, name), tuple(own.tolist()))
        if turned[name]:
            size[row] = own
    bad = [(name, reason) for name, reason in bad if not turned.get(name)]
    return people._replace(size=size), sum(turned.values()), bad


def _parse_coco(path):
    """One pass over the JSON; annotations and images go straight into flat arrays as the parser meets them.

    → {image id: its row in rows["file"] and rows["size"]}, rows (name → array of all annotations), the rest.
    """
    names = "id image_id pose_id iscrowd category_id num_keypoints count".split()
    images, rows = {}, {name: array("q") for name in names}
    rows |= {name: array("f") for name in ("keypoints", "bbox", "area")} | {"file": [], "size": array("q")}
    defaults = (("id", None), ("image_id", None), ("pose_id", -1), ("iscrowd", 0), ("category_id", -1))
    defaults += (("num_keypoints", -1),)

    def take(entry):
        if "image_id" in entry:
            box, points = entry["bbox"], entry.get("keypoints", [])
            if len(box) != 4:
                raise UserError(f"{path}: annotation {entry['id']} has box {box}; x, y, w, h are needed")
            rows["bbox"].extend(box)
            rows["keypoints"].extend(points)
            rows["count"].append(len(points))
            rows["area"].append(entry["area"] if "area" in entry else box[2] * box[3])
            for name, default in defaults:
                rows[name].append(int(entry[name] if default is None else entry.get(name, default)))
        elif "file_name" in entry:
            number = int(entry["id"])
            if number in images:
                raise UserError(f"{path}: two images have the id {number}; ids must differ")
            rows["size"].extend((int(entry["width"]), int(entry["height"])))
            images[number] = len(rows["file"])
            rows["file"].append(entry["file_name"].encode())
        else:
            return entry

    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file, object_hook=take)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read {path} as JSON: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path} is not a COCO keypoint file: an entry lacks a field or has a wrong one ({error!r})"
        ) from None
    for name in ("images", "annotations", "categories"):
        if not isinstance(document, dict) or not isinstance(document.get(name), list):
            raise UserError(f'{path} is not a COCO keypoint file: it has no list "{name}"')
    for name, key, count in (("images", "file_name", len(rows["file"])), ("annotations", "image_id", len(rows["id"]))):
        if not document[name].count(None) == len(document[name]) == count:  # `take` leaves None of what it took
            odd = next((entry for entry in document[name] if entry is not None), None)
            raise UserError(f'{path} is not a COCO keypoint file: an entry of "{name}" lacks "{key}": {odd!r:.80}')
    return images, rows, document


def _person_category(document, path):
    """The first category with keypoints → (it as read, names of its K joints, 0-based links between them)."""
    try:
        category = next((c for c in document["categories"] if c.get("keypoints")), None)
        if category is None:
            raise UserError(f'{path} is not a COCO keypoint file: no category lists its "keypoints"')
        joints = [joint_name(name) for name in category["keypoints"]]
        links = [(int(i) - 1, int(j) - 1) for i, j in category.get("skeleton") or []]
        int(category["id"])
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path} is not a COCO keypoint file: a category lacks a field or has a wrong one ({error!r})"
        ) from None
    twice = sorted({name for name in joints if joints.count(name) > 1})
    if twice:
        names = f"{category['keypoints']!r:.300}"
        raise UserError(f"{path}: its category names the joint {twice[0]} twice: {names}")
    return category, joints, [link for link in links if 0 <= min(link) and max(link) < len(joints)]


def _rows_of(rows, category_id, k, path):
    """What _parse_coco made of the annotations → name → NumPy column of those of one category, checked.

    Annotations that name no category are taken as of this one. keypoints (n, k, 3), bbox (n, 4), float32.
    """
    own = np.isin(np.array(rows["category_id"]), (category_id, -1))
    if not own.any():
        raise UserError(f"{path} holds no person annotations")
    flat = {"keypoints": np.frombuffer(rows["keypoints"], np.float32), "bbox": np.array(rows["bbox"], np.float32)}
    if not own.all():
        flat["keypoints"] = flat["keypoints"][np.repeat(own, rows["count"])]
    flat["bbox"] = flat["bbox"].reshape(-1, 4)[own]
    rows = {name: np.array(column)[own] for name, column in rows.items() if name not in flat} | flat

    def refuse(wrong, problem):
        if wrong.any():
            a = wrong.argmax()
            raise UserError(f"{path}: annotation {rows['id'][a]} {problem(a)}")

    refuse(rows["count"] != 3 * k, lambda a: f"has {rows['count'][a]} keypoint values; its {k} joints need {3 * k}")
    rows["keypoints"] = rows["keypoints"].reshape(-1, k, 3)
    order = rows["id"].argsort(kind="stable")
    twice = np.zeros(len(order), bool)
    twice[order[1:]] = np.diff(rows["id"][order]) == 0
    refuse(twice, lambda a: "stands twice; ids must differ")
    refuse(~np.isfinite(rows["keypoints"]).all((1, 2)), lambda a: "has a keypoint that is not finite")
    refuse(~np.isfinite(rows["area"]), lambda a: f"has area {rows['area'][a]}, which is not finite")
    return rows


def visibility(values, min_score, ids, path):
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
        v = f"{values[a, j]:g}"
        raise UserError(f"{path}: annotation {ids[a]} has v = {v} at joint {j + 1}; needed: {need}")
    return np.where(values >= min_score, 2, 0) if scores else values, scores


def _clip_boxes(people, path, max_bad_boxes):
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
    if len(wrong) > (max_bad_boxes or 0):
        a = wrong[0]
        problem = "; finite x, y, w, h with w, h > 0 are needed"
        if area[a]:
            problem = ", of no width or height in float32"
        if area[a] and not inside[a]:
            problem = f" outside its {size[a].tolist()} picture"
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        hint = "" if max_bad_boxes is None else f"; mend it or allow max_bad_boxes={len(wrong)}"
        what = f"annotation {people.annotation_id[a]} has box {boxes[a].tolist()}{problem}"
        raise UserError(f"{path}: {what}{more}{hint}")
    people = people._replace(boxes=cut)
    clipped = int((np.abs(cut - boxes)[good] > 1).any(1).sum())
    return people.take(good) if len(wrong) else people, clipped, len(wrong)
