"""Pictures of people: joint names, picture files, crops and augmentation. coco.py reads who stands in them.

Legend: B pictures on this rank · N annotated people · K joints · H, W picture.
Frame: `*_px` coordinates count pixels with centres at whole numbers (COCO's frame); boxes are x, y, w, h in px.
A sample is a function of (seed, epoch, index) alone: worker count and world size change nothing.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import v2

from common import SAMPLE, seed_all
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


# ------------------------------------------------------------------------------------------------- joints and files


def flip_ids(joints):
    """Joint ids after a mirror: "left_x" ↔ "right_x" by name, else "l_x" ↔ "r_x" or "x_l" ↔ "x_r"; others stay."""
    swap, ids = {"left": "right", "right": "left", "l": "r", "r": "l"}, []
    for i, name in enumerate(joints):
        mirrored = (re.sub(side, lambda found: swap[found[0]], name) for side in ("left|right", "^[lr]", "[lr]$"))
        ids.append(next((joints.index(other) for other in mirrored if other != name and other in joints), i))
    return ids


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
JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers of the segment that holds a JPEG's size
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises for bad pictures


def picture_names(folder, below=False):
    """Sorted names of the picture files in a folder (below: and its folders); UserError where there are none."""
    if not Path(folder).is_dir():
        raise UserError(f"no folder {folder}; check the keys that name folders")
    paths = Path(folder).rglob("*") if below else Path(folder).iterdir()
    names = sorted(str(path.relative_to(folder)) for path in paths if path.suffix.lower() in PICTURES)
    if not names:
        raise UserError(f"{folder} holds no pictures ({', '.join(PICTURES)})")
    return names


def pictures_at(path):
    """A folder of pictures, or one picture → (folder, sorted names of the pictures below it)."""
    if Path(path).is_file() and Path(path).suffix.lower() in PICTURES:
        return str(Path(path).parent), [Path(path).name]
    return str(path), picture_names(path, below=True)


def read_json(path):
    """Any JSON file; one clear line where it is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read {path} as JSON: {error}") from None


def as_bytes(folder, names):
    """File names below `folder` → (N,) bytes; UserError for one that is no UTF-8: no list could hold it."""
    try:
        return np.array([name.encode() for name in names], dtype=np.bytes_)
    except UnicodeEncodeError as error:
        raise UserError(f"{os.path.join(folder, error.object)!r}: this name is not UTF-8; rename the file") from None


def refuse_bad_pictures(folder, files):
    """UserError names the first missing or damaged picture. files: (N,) bytes, paths below `folder`."""
    bad = find_bad_pictures(folder, files)
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(f"{os.path.join(folder, bad[0][0])} is {bad[0][1]}{more}; mend or remove it")


def find_bad_pictures(folder, files, sizes=None):
    """[(name, reason)] of missing, empty or truncated pictures; with sizes (N, 2) also of those of another w, h.

    files: (N,) bytes, paths below `folder`; each is looked at once.
    """
    bad, seen = [], set()
    for row, name in enumerate(files.tolist()):
        if name not in seen:
            seen.add(name)
            size = None if sizes is None else tuple(sizes[row].tolist())
            reason = picture_fault(os.path.join(folder, name.decode()), size)
            if reason:
                bad.append((name.decode(), reason))
    return bad


def picture_fault(path, size=None):
    """What is wrong with a picture file, or None. size: (w, h) it must have.

    Only the file's first and last bytes are looked at, which takes 6 µs; what they leave in doubt goes to Pillow.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            head = file.read(4096)
            if not head:
                return "empty"
            tail = head[-12:]
            if len(head) == 4096:
                file.seek(-12, 2)
                tail = file.read()
            whole = tail.endswith(b"\xff\xd9") or b"IEND" in tail  # the end of a JPEG or a PNG
            w, h = header_size(head)
            if whole and 0 < w * h <= Image.MAX_IMAGE_PIXELS and size in (None, (w, h)):
                return None
            file.seek(0)
            picture = Image.open(file)
            if not whole:
                picture.load()
            return None if size in (None, picture.size) else f"{picture.size} but its annotation says {size}"
    except FileNotFoundError:
        return "missing"
    except UNREADABLE as error:
        return f"damaged or truncated ({error})"


def header_size(head):
    """(w, h) px from the first bytes of a PNG or JPEG, else (0, 0): 1 µs, where Image.open takes 20."""
    if head.startswith(b"\x89PNG\r\n\x1a\n") and head[12:16] == b"IHDR":
        return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    at = 2 if head.startswith(b"\xff\xd8") else len(head)
    while at + 9 <= len(head) and head[at] == 0xFF:
        if head[at + 1] in JPEG_FRAMES:
            return head[at + 7] << 8 | head[at + 8], head[at + 5] << 8 | head[at + 6]
        at += 2 + (head[at + 2] << 8 | head[at + 3])
    return 0, 0


def load_picture(folder, name, size=None):
    """RGB PIL picture; UserError names a file that is missing, damaged or of another size than its annotation says."""
    path = os.path.join(folder, name.decode() if isinstance(name, bytes) else name)
    try:
        picture = Image.open(path)
        if picture.mode.startswith("I"):  # 16 bits of grey: Pillow's own conversion makes all of them white
            picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
        picture = picture if picture.mode == "RGB" else picture.convert("RGB")
        picture.load()
    except UNREADABLE as error:
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
        seed_all(SAMPLE, self.seed, epoch, index)
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
