"""Pictures of people: COCO keypoint files, crops and augmentation. batches.py says which of them a step sees.

Legend: B pictures on this rank · N annotated people · K joints · H, W picture.
Frame: `*_px` coordinates count pixels with centres at whole numbers (COCO's frame); boxes are x, y, w, h in px.
A sample is a function of (seed, epoch, index) alone: worker count and world size change nothing.
"""

import json
import os
from array import array
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import v2

from common import seed_all
from config import UserError
from masks import part_guided_mask  # noqa: F401  data.part_guided_mask is its public name

COCO_JOINTS = (
    "nose left_eye right_eye left_ear right_ear left_shoulder right_shoulder left_elbow right_elbow left_wrist "
    "right_wrist left_hip right_hip left_knee right_knee left_ankle right_ankle"
).split()
COCO_LINKS = "16-14 14-12 17-15 15-13 12-13 6-12 7-13 6-7 6-8 7-9 8-10 9-11 2-3 1-2 1-3 2-4 3-5 4-6 5-7"  # 1-based
COCO_CATEGORY = dict(id=1, name="person", supercategory="person", keypoints=COCO_JOINTS)
COCO_CATEGORY["skeleton"] = [[int(joint) for joint in link.split("-")] for link in COCO_LINKS.split()]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # [MAE] [HAP]


def normalize(pictures):
    """uint8 (B, 3, H, W) → float32, ImageNet mean 0 and standard deviation 1. Runs on the pictures' device."""
    mean = torch.tensor(IMAGENET_MEAN, device=pictures.device).view(3, 1, 1) * 255
    std = torch.tensor(IMAGENET_STD, device=pictures.device).view(3, 1, 1) * 255
    # In place: fresh memory for each of the three results took 20 × as long on a CPU.
    return pictures.to(torch.float32, copy=True).sub_(mean).div_(std)


# ---------------------------------------------------------------------------------------------- COCO keypoint files


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


def flip_ids(joints):
    """Joint ids after a mirror: "left_x" ↔ "right_x" by name, others stay."""
    swap = {name: name.replace("left", "RIGHT").replace("right", "left").replace("RIGHT", "right") for name in joints}
    return [joints.index(swap[name]) if swap[name] in joints else i for i, name in enumerate(joints)]


def to_coco17(keypoints, joints):
    """(N, K, 3) of any joint set → (N, 17, 3) by joint name; joints the set lacks are missing (all zero)."""
    if list(joints) == COCO_JOINTS:
        return keypoints
    out = np.zeros((len(keypoints), 17, 3), np.float32)
    for j, name in enumerate(COCO_JOINTS):
        if name in joints:
            out[:, j] = keypoints[:, joints.index(name)]
    return out


PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def picture_names(folder, below=False):
    """Sorted names of the picture files in a folder (below: and its folders); UserError where there are none."""
    if not Path(folder).is_dir():
        raise UserError(f"no folder {folder}; check the keys that name folders")
    paths = Path(folder).rglob("*") if below else Path(folder).iterdir()
    names = sorted(str(path.relative_to(folder)) for path in paths if path.suffix.lower() in PICTURES)
    if not names:
        raise UserError(f"{folder} holds no pictures ({', '.join(PICTURES)})")
    return names


def read_json(path):
    """Any JSON file; one clear line where it is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read {path} as JSON: {error}") from None


def find_bad_pictures(people):
    """[(name, reason)] of missing, empty or truncated pictures: the file's end is looked at, doubtful ones decoded."""
    bad = []
    for name in dict.fromkeys(people.files.tolist()):
        try:
            with open(os.path.join(people.folder, name.decode()), "rb", buffering=0) as file:
                end = file.seek(0, 2)
                if end == 0:
                    bad.append((name.decode(), "empty"))
                    continue
                file.seek(max(0, end - 12))
                tail = file.read()
                if not tail.endswith(b"\xff\xd9") and b"IEND" not in tail:  # neither a JPEG's nor a PNG's end
                    file.seek(0)
                    Image.open(file).load()
        except FileNotFoundError:
            bad.append((name.decode(), "missing"))
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged pictures
            bad.append((name.decode(), f"damaged or truncated ({error})"))
    return bad


def load_picture(folder, name, size=None):
    """RGB PIL picture; UserError names a file that is missing, damaged or of another size than its annotation says."""
    path = os.path.join(folder, name.decode() if isinstance(name, bytes) else name)
    try:
        picture = Image.open(path)
        picture = picture if picture.mode == "RGB" else picture.convert("RGB")
        picture.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"cannot read picture {path}: {error}") from None
    if size is not None and picture.size != tuple(size):
        raise UserError(f"{path} is {picture.size} but its annotation says {tuple(int(s) for s in size)}")
    return picture


# ------------------------------------------------------------------------------------------- pre-training pictures

STRONG = v2.Compose(  # [StableRep]; the paper: stronger augmentation narrows the gap between real and generated
    [
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], p=0.5),
    ]
)


class PretrainPictures(Dataset):
    """Item (epoch, index) → picture uint8 (3, H, W), keypoints (17, 3) px of that picture, pose_id, index.

    `people`: one People per annotation file; indices run through them in order; pose ids of different files differ.
    Augmentation [HAP]: RandomResizedCrop scale (.8, 1), ratio w/h (.375, .667), bicubic; flip .5 with left and right
    joints swapped. "strong" adds [StableRep]'s jitter, grey and blur.
    """

    def __init__(self, people, size, seed, box_padding=1.25, augmentation="hap"):
        self.people, self.size, self.seed = people, size, seed
        self.box_padding, self.strong = box_padding, augmentation == "strong"
        self.starts = np.cumsum([0] + [len(p.files) for p in people])
        self.keypoints = [to_coco17(p.keypoints, p.joints) for p in people]
        self.flip = flip_ids(COCO_JOINTS)
        self.pose_id, offset = [], 0
        for p in people:  # file f's pose ids move behind those of the files before it
            self.pose_id.append(np.where(p.pose_id >= 0, p.pose_id + offset, -1))
            offset = max(offset, int(self.pose_id[-1].max()) + 1)
        self.pose_id = np.concatenate(self.pose_id)

    def __len__(self):
        return int(self.starts[-1])

    def where(self, index):
        """index → (number of the file, row in its People)."""
        f = int(np.searchsorted(self.starts, index, side="right")) - 1
        return f, int(index - self.starts[f])

    def name(self, index):
        f, row = self.where(index)
        return f"{self.people[f].folder}/{self.people[f].files[row].decode()}"

    def __getitem__(self, item):
        epoch, index = item
        seed_all(self.seed, epoch, index)
        f, row = self.where(index)
        people = self.people[f]
        picture = load_picture(people.folder, people.files[row], people.size[row])
        region = padded_box(people.boxes[row], self.box_padding, people.size[row])
        return self.augment(picture, region, self.keypoints[f][row]) | {"pose_id": self.pose_id[index], "index": index}

    def augment(self, picture, region, keypoints):
        (x, y, w, h), (H, W) = region, self.size
        left, top, cw, ch = random_crop(w, h)
        x, y = x + left, y + top
        pixels = torch.from_numpy(np.array(picture.crop((x, y, x + cw, y + ch)))).permute(2, 0, 1)
        # torch's uint8 resize equals Pillow's up to rounding (a grey level or two) and takes a third of its time.
        pixels = torch.nn.functional.interpolate(pixels[None], (H, W), mode="bicubic", antialias=True)[0]
        # Pixel centres are whole numbers, edges halves: (x + .5) scales, not x.
        xy = (keypoints[:, :2] + 0.5 - (x, y)) * (W / cw, H / ch) - 0.5
        keypoints = np.concatenate([xy, keypoints[:, 2:]], 1).astype(np.float32)
        if torch.rand(()) < 0.5:
            pixels = pixels.flip(2)
            keypoints = keypoints[self.flip]
            keypoints[:, 0] = W - 1 - keypoints[:, 0]
        if self.strong:
            pixels = STRONG(pixels)
        return {"image": pixels.contiguous(), "keypoints": torch.from_numpy(keypoints)}


def random_crop(w, h, scale=(0.8, 1.0), ratio=(0.375, 0.667)):  # [HAP]
    """RandomResizedCrop's rectangle (x, y, width, height) in a region of w × h px: uniform share `scale` of the area,
    log-uniform `ratio` width/height, uniform place; after 10 misses the largest central one that keeps the ratio.
    torchvision's own get_params draws the same with some twenty tensor operations, which cost as much as the resize.
    """
    for _ in range(10):
        area, shape, across, down = torch.rand(4).tolist()
        area = w * h * (scale[0] + area * (scale[1] - scale[0]))
        shape = ratio[0] * (ratio[1] / ratio[0]) ** shape
        cw, ch = round((area * shape) ** 0.5), round((area / shape) ** 0.5)
        if 0 < cw <= w and 0 < ch <= h:
            return int(across * (w - cw + 1)), int(down * (h - ch + 1)), cw, ch
    cw, ch = max(1, min(w, round(h * ratio[1]))), max(1, min(h, round(w / ratio[0])))
    return (w - cw) // 2, (h - ch) // 2, cw, ch


def padded_box(box, padding, size):
    """Box grown by `padding` around its centre, cut to the picture, as whole px (x, y, w, h), at least 1 × 1."""
    x, y, w, h = (float(v) for v in box)
    x, y, w, h = x - w * (padding - 1) / 2, y - h * (padding - 1) / 2, w * padding, h * padding
    x0, y0 = min(max(0, round(x)), int(size[0]) - 1), min(max(0, round(y)), int(size[1]) - 1)
    return x0, y0, max(1, min(int(size[0]), round(x + w)) - x0), max(1, min(int(size[1]), round(y + h)) - y0)
