"""People with joints to fine-tune on, to evaluate on and to predict: files, detections, pictures.

COCO keypoint JSON of any joint set (COCO, CrowdPose, AIC, OCHuman, …), MPII's own list, and person
boxes of a detector, as COCO publishes them. Legend: N people · K joints · xy and boxes in px.
"""

import json
from pathlib import Path

import numpy as np

from formats.coco import read_people
from formats.joints import flip_ids
from formats.mpii import read_mpii, read_mpii_heads
from formats.people import MIN_SCORE, Limits, leave_out, people_at, read_folder
from plumbing.errors import UserError, and_more, reading
from plumbing.files import read_json, regular
from plumbing.pictures import find_bad_pictures

CROWDPOSE_JOINTS = (
    "left_shoulder right_shoulder left_elbow right_elbow left_wrist right_wrist left_hip right_hip "
    "left_knee right_knee left_ankle right_ankle head neck"
).split()
AIC_JOINTS = (
    "right_shoulder right_elbow right_wrist left_shoulder left_elbow left_wrist right_hip "
    "right_knee right_ankle left_hip left_knee left_ankle head_top neck"
).split()
BOX_AREA = 0.53  # person area ÷ box area where an annotation has none [CrowdPose's evaluator]


def read_pose_file(path, folder=None, limits=Limits()):  # noqa: B008  a tuple
    """COCO keypoint JSON of any joint set, or MPII's own list → (People, notes).

    folder, limits, notes: as in formats.coco.read_people; MPII's notes also say "rows".
    COCO people without a joint are left out. MPII's stay, for its .mat counts them.
    """
    with reading(path, "a COCO keypoint file or MPII's list"):
        with open(regular(path), "rb") as file:
            is_mpii = file.read(64).strip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    if is_mpii:
        return read_mpii(path, folder, limits)
    return read_people(path, folder, limits._replace(min_joints=1))


def read_truth(path, folder=None, limits=Limits()):  # noqa: B008  a tuple
    """What poses are compared with: as read_pose_file → (People, notes, COCO document).

    The document is the file as pycocotools wants it; a person who is left out for his box does not
    count. Areas are the evaluator's: .53 × box where the file has none, and for CrowdPose and AIC
    always [CrowdPose's evaluator; mmpose: AIC].
    """
    people, notes = read_pose_file(path, folder, limits)
    if "rows" in notes:  # MPII
        people = people._replace(area=people.area * BOX_AREA)
        return people, notes, coco_document(people)
    document = read_json(path)
    with reading(path, "COCO people"):
        area = prepare(document, people, notes["scores"])
    area = [area[i] for i in people.annotation_id.tolist()]
    return people._replace(area=np.array(area, np.float32)), notes, document


def heads_of(path, people, notes):
    """mpii.read_mpii_heads of these people of MPII's list, some of whom may be left out."""
    heads = read_mpii_heads(path, notes.get("rows", len(people.files)))
    if "rows" not in notes:
        raise UserError(f"{path} is in the order of MPII's own list; evaluate on that list")
    return [column[people.annotation_id - 1] for column in heads]


def prepare(document, people, scores):
    """Make of a COCO file what pycocotools wants. → {annotation id: area}

    Rows of the person category alone, whole numbers as ids, the pictures' own sizes; area, iscrowd
    and num_keypoints where the file has none. scores: the file holds them in place of visibilities.
    """
    category, read = int(people.category["id"]), set(people.annotation_id.tolist())
    own_size = dict(zip(people.image_id.tolist(), people.size.tolist()))
    for image in document["images"]:
        image["id"] = int(image["id"])  # some files write ids as text
        if image["id"] in own_size:
            image["width"], image["height"] = own_size[image["id"]]
    rows = document["annotations"]
    rows = [a for a in rows if int(a.get("category_id", category)) == category]
    by_box = people.joints in (CROWDPOSE_JOINTS, AIC_JOINTS)
    for a in rows:
        a["id"], a["image_id"], a["category_id"] = int(a["id"]), int(a["image_id"]), category
        if by_box or "area" not in a:
            a["area"] = BOX_AREA * a["bbox"][2] * a["bbox"][3]
        a.setdefault("iscrowd", 0)
        if scores:  # visible or missing for pycocotools too
            a["keypoints"][2::3] = [2 if v >= MIN_SCORE else 0 for v in a["keypoints"][2::3]]
            a.pop("num_keypoints", None)
        a.setdefault("num_keypoints", sum(v > 0 for v in a["keypoints"][2::3]))
        if a["id"] not in read:
            a["num_keypoints"] = 0  # left out for its box, if it counted at all
    document["annotations"] = rows
    return {a["id"]: a["area"] for a in rows}


def coco_document(people, found=None, score=None):
    """People → COCO keypoint JSON (its fields: docs/annotations.md).

    Of predictions also found (N, K, 3), px and the score of each joint, and score (N,). A joint
    below MIN_SCORE is missing: 0, 0, 0, as COCO writes it; else it is visible.
    """
    keypoints = people.keypoints
    if found is not None:
        seen = found[..., 2:] >= MIN_SCORE
        keypoints = np.where(seen, np.concatenate([found[..., :2], 2 * seen], 2), 0)
    images, annotations = {}, []
    for n, file in enumerate(people.files.tolist()):
        image, (w, h) = int(people.image_id[n]), people.size[n].tolist()
        images[image] = {"id": image, "file_name": file.decode(), "width": w, "height": h}
        row = {"id": int(people.annotation_id[n]), "image_id": image, "category_id": 1}
        row["bbox"] = [round(float(v), 2) for v in people.boxes[n]]
        row |= {"area": float(people.area[n]), "iscrowd": 0}
        row["num_keypoints"] = int((keypoints[n, :, 2] > 0).sum())
        row["keypoints"] = [round(float(v), 3) for v in keypoints[n].flatten()]
        if found is not None:
            row["score"] = float(score[n])
            row["keypoint_scores"] = [round(float(v), 4) for v in found[n, :, 2]]
        annotations.append(row)
    category = {"id": 1, "name": "person", "supercategory": "person", "keypoints": people.joints}
    category["skeleton"] = [[a + 1, b + 1] for a, b in people.skeleton]
    info = {"description": "people and their joints; fields: docs/annotations.md"}
    document = {"info": info, "images": list(images.values()), "annotations": annotations}
    return document | {"categories": [category]}


def coco_results(people, found, score, rows):
    """COCO keypoint results of these rows of poses (N, K, 3), px and joint score; score (N,)."""
    category, results = int(people.category["id"]), []
    for i in rows:
        row = {"image_id": int(people.image_id[i]), "category_id": category}
        row |= {"score": float(score[i])}
        results.append(row | {"keypoints": [round(float(v), 3) for v in found[i].flatten()]})
    return results


def said(notes):
    """What a reader left out or mended, as a clause in brackets; "" where there is nothing."""
    parts = [("unreadable pictures left out", len(notes["bad"]))]
    parts += [("people left out for their box", notes["bad_boxes"])]
    parts += [("pictures listed with width and height swapped", notes["turned"])]
    clause = ", ".join(f"{what}: {n}" for what, n in parts if n)
    return clause and f" ({clause})"


# -------------------------------------------------------------------------------- a user's pictures


def joint_set(meta, path):
    """A finished model's joint names and links, as text beside its weights → two lists."""
    with reading(path, "a model of finetune_pose.py"):
        return json.loads(meta["joints"]), [tuple(link) for link in json.loads(meta["skeleton"])]


def read_own(path, joints, skeleton, limits):
    """All pictures below a folder, or one picture: each as a person who fills it.

    → (People whose joints are not known yet, pictures as `pictures_of` gives them). A picture may
    also be named by the number that its file name consists of: COCO's are.
    """
    people, notes = read_folder(path, limits)
    unknown = np.zeros((len(people.files), len(joints), 3), np.float32)
    people = people._replace(keypoints=unknown, area=people.area * BOX_AREA)
    people = people._replace(joints=joints, skeleton=skeleton, flip=flip_ids(joints))
    named = dict.fromkeys(notes["bad"])
    for file, size, number in zip(people.files, people.size.tolist(), people.image_id):
        named[file.decode()] = (file.decode(), tuple(size), int(number))
    stems = {name: Path(name).stem for name in named}
    by_number = {}
    for name, entry in named.items():
        if stems[name].isdecimal():
            by_number.setdefault(int(stems[name]), []).append(entry)
    # A number that two pictures share names neither.
    numbers = {number: entries[0] for number, entries in by_number.items() if len(entries) == 1}
    return people, numbers | named


def pictures_of(document, left_out):
    """A COCO document's pictures: {id, and file name: (file name, (w, h), id)}.

    None for those in left_out (ids).
    """
    pictures = {}
    for image in document["images"]:
        entry = (image["file_name"], (int(image["width"]), int(image["height"])), image["id"])
        entry = None if image["id"] in left_out else entry
        pictures[image["id"]] = pictures[image["file_name"]] = entry
    return pictures


def read_boxes(path, pictures, people, limits):
    """Person detections as COCO publishes them: rows of image_id, bbox, score, category_id.

    pictures: as `pictures_of` gives them; a row may name its picture by `file_name` instead of id.
    people: of the same pictures, for joints, category and folder. Rows of other categories and of
    left-out pictures are left out; so are up to limits.max_bad_boxes boxes of no area or outside
    their picture.
    → (People, score (N,), a sentence about them).
    """
    entries, boxes, scores, on_bad, wrong = [], [], [], 0, []
    category = int(people.category["id"])
    with reading(path, "a list of boxes (image_id or file_name, bbox, score)") as place:
        for n, row in enumerate(read_json(path), 1):
            place.at = f"entry {n}"
            if row.get("category_id", category) != category:
                continue
            key = row["file_name"] if "file_name" in row else row["image_id"]
            if key not in pictures:
                names = f"a box names picture {key!r}"
                raise UserError(f"{path}: {names}, which is not among the pictures")
            if pictures[key] is None:
                on_bad += 1
                continue
            x, y, w, h = np.array(row["bbox"], float).tolist()
            score = float(row.get("score", 1.0))
            if not np.isfinite(score):
                raise ValueError(f"its score is {score}")
            what, (width, height) = f"box {[x, y, w, h]} of picture {key!r}", pictures[key][1]
            if not (1e-6 < w < 1e6 and 1e-6 < h < 1e6):
                wrong.append(f"{what}: w, h > 0 are needed")
            elif not (0 <= x + w / 2 <= width and 0 <= y + h / 2 <= height):
                wrong.append(f"{what} lies outside its {width} × {height} px")
            else:
                entries.append(pictures[key])
                boxes.append((x, y, w, h))
                scores.append(score)
    if advice := limits.exceeded("max_bad_boxes", len(wrong)):
        raise UserError(f"{path}: {wrong[0]}{and_more(wrong)}; {advice}")
    if not boxes:
        raise UserError(f"{path} holds no person boxes")
    files, sizes, ids = zip(*entries)
    found = people_at(people.folder, files, boxes, people.joints, people.skeleton)
    sizes, ids = np.array(sizes, np.int32), np.array(ids, np.int64)
    found = found._replace(size=sizes, image_id=ids, area=found.area * BOX_AREA)
    found = found._replace(category=people.category)
    scores = np.array(scores, np.float64)
    # Pictures of people were looked at with these; detections lie on others too.
    others = np.unique(found.files[~np.isin(found.files, people.files)])
    if limits.check_pictures and len(others):
        bad = find_bad_pictures(found.folder, others)
        known_bad = sum(pictures[key] is None for key in pictures if isinstance(key, str))
        whole = ~np.isin(found.files, [name.encode() for name, _ in bad])
        rest = limits._replace(max_bad=(limits.max_bad or 0) - known_bad)
        found, scores = leave_out(found, bad, path, rest), scores[whole]
        on_bad += int((~whole).sum())
    left_out = [("on left-out pictures", on_bad), ("left out as no box", len(wrong))]
    clause = ", ".join(f"{what}: {n}" for what, n in left_out if n)
    about = f"{len(scores)} boxes" + (f" ({clause})" if clause else "")
    return found, scores, about
