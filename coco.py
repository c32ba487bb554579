"""COCO keypoint files of any joint set, read into flat arrays.

Legend: N annotated people · K joints. Frame: pixel centres at whole numbers; boxes are x, y, w, h in px.
"""

import json
from array import array
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import UserError
from data import find_bad_pictures, flip_ids


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


def read_people(annotations, folder=None, min_joints=0, max_bad=0, check_pictures=True):
    """Read a COCO keypoint JSON with any joint set. `folder` defaults to `images` beside it, or else its own folder.

    Crowd annotations and people with fewer than `min_joints` joints are left out. Missing, empty or truncated pictures
    are an error that names the first; with `max_bad` > 0 up to that many are left out instead.
    → (People, {"bad": [names left out], "clipped": boxes cut to their picture}).
    Raises UserError: not such a file, ids that do not match, a wrong keypoint count, a box outside its picture.
    """
    path = Path(annotations)
    images, rows, document = _parse_coco(path)
    category = _person_category(document, path)
    joints = [name.lower().replace(" ", "_") for name in category["keypoints"]]
    n, k = len(rows["id"]), len(joints)
    if n == 0:
        raise UserError(f"{path} holds no person annotations")
    for a, count in enumerate(rows["count"]):
        if count != 3 * k:
            raise UserError(
                f"{path}: annotation {rows['id'][a]} has {count} keypoint values; its {k} joints need {3 * k}"
            )
    keypoints = np.frombuffer(rows["keypoints"], np.float32).reshape(n, k, 3)
    boxes = np.frombuffer(rows["bbox"], np.float32).reshape(n, 4).copy()
    image_id = np.array(rows["image_id"], np.int64)
    image = np.fromiter((images.get(i, -1) for i in rows["image_id"]), np.int64, n)  # its row among the images
    if image.min() < 0:
        unknown = image_id[image.argmin()]
        raise UserError(f"{path}: an annotation names image id {unknown}, which is not among the images")
    size = np.array(rows["size"], np.int32).reshape(-1, 2)[image]
    boxes, clipped = _clip_boxes(boxes, size, rows["id"], path)
    folder = Path(folder) if folder else path.parent / "images" if (path.parent / "images").is_dir() else path.parent
    people = People(
        folder=str(folder),
        files=np.array(rows["file"], dtype=np.bytes_)[image],
        size=size,
        boxes=boxes,
        keypoints=keypoints,
        pose_id=np.array(rows["pose_id"], np.int64),
        annotation_id=np.array(rows["id"], np.int64),
        image_id=image_id,
        area=np.array(rows["area"], np.float32),
        joints=joints,
        skeleton=[(i - 1, j - 1) for i, j in category.get("skeleton", []) if 1 <= min(i, j) and max(i, j) <= k],
        flip=flip_ids(joints),
        category=category,
    )
    keep = ~np.array(rows["iscrowd"], bool) & ((keypoints[:, :, 2] > 0).sum(1) >= min_joints)
    people = people if keep.all() else people.take(keep)
    bad = find_bad_pictures(people) if check_pictures else []
    if len(bad) > max_bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        name, reason = bad[0]
        raise UserError(f"{folder}/{name} is {reason}{more} (of {path}); mend it or allow max_bad={len(bad)}")
    if bad:
        people = people.take(~np.isin(people.files, np.array([name.encode() for name, _ in bad])))
    return people, {"bad": [name for name, _ in bad], "clipped": clipped}


def _parse_coco(path):
    """One pass over the JSON; annotations and images go straight into flat arrays as the parser meets them.

    → {image id: its row in rows["file"] and rows["size"]}, rows (name → array of all annotations), the rest.
    """
    images, rows = {}, {name: array("q") for name in ("id", "image_id", "pose_id", "iscrowd", "count")}
    rows |= {name: array("f") for name in ("keypoints", "bbox", "area")} | {"file": [], "size": array("q")}

    def take(entry):
        if "image_id" in entry:
            box, points = entry["bbox"], entry.get("keypoints", [])
            if len(box) != 4 or not min(box[2:]) > 0:
                raise UserError(f"{path}: annotation {entry['id']} has box {box}; x, y, w, h with w, h > 0 are needed")
            rows["bbox"].extend(box)
            rows["keypoints"].extend(points)
            rows["count"].append(len(points))
            rows["area"].append(float(entry.get("area", box[2] * box[3])))
            for name, default in (("id", None), ("image_id", None), ("pose_id", -1), ("iscrowd", 0)):
                rows[name].append(int(entry[name] if default is None else entry.get(name, default)))
        elif "file_name" in entry:
            rows["size"].extend((int(entry["width"]), int(entry["height"])))
            images[int(entry["id"])] = len(rows["file"])
            rows["file"].append(entry["file_name"].encode())
        else:
            return entry

    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file, object_hook=take)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read {path} as JSON: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a COCO keypoint file: an entry lacks or mistypes {error}") from None
    for name in ("images", "annotations", "categories"):
        if not isinstance(document, dict) or not isinstance(document.get(name), list):
            raise UserError(f'{path} is not a COCO keypoint file: it has no list "{name}"')
    return images, rows, document


def _person_category(document, path):
    for category in document["categories"]:
        if isinstance(category, dict) and category.get("keypoints"):
            return category
    raise UserError(f'{path} is not a COCO keypoint file: no category lists its "keypoints"')


def _clip_boxes(boxes, size, ids, path):
    """Boxes cut to their pictures, and how many were cut by more than a pixel. A centre outside is an error."""
    centre = boxes[:, :2] + boxes[:, 2:] / 2
    outside = np.flatnonzero((centre < 0).any(1) | (centre > size).any(1))
    if len(outside):
        a = outside[0]
        raise UserError(f"{path}: annotation {ids[a]} has box {boxes[a].tolist()} outside its {tuple(size[a])} picture")
    low, high = np.maximum(boxes[:, :2], 0), np.minimum(boxes[:, :2] + boxes[:, 2:], size)
    cut = np.concatenate([low, high - low], 1).astype(np.float32)
    return cut, int((np.abs(cut - boxes) > 1).any(1).sum())
