"""Pictures of people: joint names, picture files, crops and augmentation. coco.py reads who stands in them.

Legend: B pictures on this rank · N annotated people · K joints · H, W picture.
Frame: `*_px` coordinates count pixels with centres at whole numbers (COCO's frame); boxes are x, y, w, h in px.
A sample is a function of (seed, epoch, index) alone: worker count and world size change nothing.
"""

import contextlib
import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import v2

from common import CROP, FLIP, SAMPLE, gather_rows, rank_share, seed_all, write_json
from masks import PARTS, part_guided_mask  # noqa: F401  data.part_guided_mask is its public name
from plumbing.config import UserError

COCO_JOINTS = (
    "nose left_eye right_eye left_ear right_ear left_shoulder right_shoulder left_elbow right_elbow left_wrist "
    "right_wrist left_hip right_hip left_knee right_knee left_ankle right_ankle"
).split()
COCO_LINKS = "16-14 14-12 17-15 15-13 12-13 6-12 7-13 6-7 6-8 7-9 8-10 9-11 2-3 1-2 1-3 2-4 3-5 4-6 5-7"  # 1-based
COCO_CATEGORY = dict(id=1, name="person", supercategory="person", keypoints=COCO_JOINTS)
COCO_CATEGORY["skeleton"] = [[int(joint) for joint in link.split("-")] for link in COCO_LINKS.split()]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # [MAE] [HAP]
BYTE_MEAN, BYTE_STD = ((torch.tensor(v) * 255).tolist() for v in (IMAGENET_MEAN, IMAGENET_STD))


def normalize(pictures):
    """uint8 (B, 3, H, W) → float32, ImageNet mean 0 and standard deviation 1. Runs on the pictures' device."""
    # In place: fresh memory for each of the three results took 20 × as long on a CPU.
    pixels = pictures.to(torch.float32, copy=True)
    # Numbers, not a tensor of three, which would be copied to the GPU, and the host would wait.
    for channel, mean, std in zip(pixels.unbind(1), BYTE_MEAN, BYTE_STD):
        channel.sub_(mean).div_(std)
    return pixels


# ------------------------------------------------------------------------------------------------- joints and files


SIDE, LIMB_JOINT = "(left|right|l|r)", "(eye|ear|shoulder|elbow|wrist|hip|knee|ankle)"


def joint_name(name):
    """A joint's name in COCO's spelling: "leftShoulder", "LShoulder", "Lshoulder", "l_shoulder",
    "Left Shoulder" and "shoulder_left" are "left_shoulder". Others: lower case, underscores."""
    name = re.sub("(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    name = re.sub(r"[\W_]+", "_", name.lower()).strip("_")
    found = re.fullmatch(f"{SIDE}_?{LIMB_JOINT}|{LIMB_JOINT}_?{SIDE}", name)
    if not found:
        return name
    side, joint = found[1] or found[4], found[2] or found[3]
    return {"l": "left", "r": "right"}[side[0]] + "_" + joint


def recognised(joints):
    """→ how many of COCO's 17 joints a joint set names, and how many of the six body parts that
    guide masks have a link between two of them."""
    ids = {j for j, name in enumerate(COCO_JOINTS) if name in joints}
    return len(ids), sum(any(ids.issuperset(link) for link in part) for part in PARTS)


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


def refuse_bad_pictures(folder, files, source=None):
    """UserError names the first missing or damaged picture. See find_bad_pictures."""
    bad = find_bad_pictures(folder, files, source=source)
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UserError(f"{os.path.join(folder, bad[0][0])} is {bad[0][1]}{more}; mend or remove it")


def find_bad_pictures(folder, files, sizes=None, source=None):
    """[(name, reason)] of missing, empty or truncated pictures; with sizes (N, 2) also of those of another w, h.

    files: (N,) bytes, paths below `folder`; each is looked at once. All ranks call this: they share
    the work (machines hold the same pictures), and each gets the whole list.
    source: the file that names the pictures. Where its folder can be written, `.NAME.checked.json`
    there keeps what was found: until `source` has another size or time, a start looks again only at
    pictures that were bad. One that goes bad later is named when it is loaded.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rows = {}  # name → its first row
    for row, name in enumerate(files.tolist()):
        rows.setdefault(name, row)
    memory = read_memory(source) if source else {"checked": {}}
    about = os.path.realpath(folder).encode() + files.tobytes()
    about += b"" if sizes is None else sizes.tobytes()
    key = hashlib.sha256(about).hexdigest()
    # Rank 0's memory counts, so that all share out the same pictures.
    known = gather_rows([memory["checked"].get(key)], world)[0]
    names = [name for name in rows if known is None or name.decode() in known]

    def look(names):
        faults = []
        for name in names:
            size = None if sizes is None else tuple(sizes[rows[name]].tolist())
            faults.append((name.decode(), picture_fault(os.path.join(folder, name.decode()), size)))
        return [(name, reason) for name, reason in faults if reason]

    own = [names[i] for i in rank_share(len(names), rank, world)]
    with ThreadPoolExecutor(16) as pool:  # pictures not in the cache wait for the disk together
        parts = list(pool.map(look, (own[i : i + 256] for i in range(0, len(own), 256))))
    bad = gather_rows([fault for part in parts for fault in part], world)
    if source and rank == 0 and known is None:
        memory["checked"][key] = [name for name, _ in bad]
        # Where it cannot be written, the next start looks at all of them again.
        with contextlib.suppress(OSError, UserError):
            write_json(memory_path(source), memory)
    return bad


def memory_path(source):
    return Path(source).with_name(f".{Path(source).name}.checked.json")


def read_memory(source):
    """What earlier starts found in the pictures of `source`; nothing if the file has changed.

    → {"bytes", "time_ns": of source, "checked": {key of pictures and folder: names of bad ones}}.
    """
    about = os.stat(source)
    fresh = {"bytes": about.st_size, "time_ns": about.st_mtime_ns, "checked": {}}
    try:
        old = json.loads(memory_path(source).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return fresh
    return old if isinstance(old, dict) and fresh == old | {"checked": {}} else fresh


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

    `people`: one People per annotation file; indices run through them in order; pose ids of different
    files differ. A person's region is the box × box_padding; region="grow" widens or heightens it where
    no crop of the wanted ratio could hold it.
    Augmentation [HAP]: RandomResizedCrop with shares crop_min to 1 of the region's area, ratio w/h 3/4 to
    4/3 of the input's, bicubic; flip .5. "strong" adds [StableRep]'s jitter, grey and blur.
    shared: what is drawn once for all pictures of a pose, anew in each epoch: "flip", because a mirrored
    pose is another pose; "crop": flip and crop; or "nothing", as for pictures without a pose group.
    """

    def __init__(
        self, people, size, seed, box_padding=1.25, region="grow", crop_min=0.8, augmentation="hap", shared="flip"
    ):  # fmt: skip
        self.people, self.size, self.seed = people, size, seed
        self.box_padding, self.region, self.crop_min = box_padding, region, crop_min
        self.strong, self.shared = augmentation == "strong", shared
        self.starts = np.cumsum([0] + [len(p.files) for p in people])
        self.keypoints = [to_coco17(p.keypoints, p.joints) for p in people]
        self.mirror_ids = flip_ids(COCO_JOINTS)
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
        f, row = self.where(index)
        people, pose_id = self.people[f], self.pose_id[index]
        picture = load_picture(people.folder, people.files[row], people.size[row])
        region = padded_box(people.boxes[row], self.box_padding, people.size[row])
        if self.region == "grow":
            region = grown_region(region, self.size[1] / self.size[0], people.size[row])
        # The pictures of a pose draw what they share from one stream, the rest from streams of their own.
        whole, single = (0, pose_id), (1, index)
        shared = self.shared if pose_id >= 0 else "nothing"
        seed_all(FLIP, self.seed, epoch, *(single if shared == "nothing" else whole))
        mirrored = torch.rand(()) < 0.5
        seed_all(CROP, self.seed, epoch, *(whole if shared == "crop" else single))
        left, top, cw, ch = random_crop(*region[2:], self.crop_min, self.size[1] / self.size[0])
        crop = region[0] + left, region[1] + top, cw, ch
        seed_all(SAMPLE, self.seed, epoch, index)
        sample = self.augment(picture, crop, self.keypoints[f][row], mirrored)
        return sample | {"pose_id": pose_id, "index": index}

    def augment(self, picture, crop, keypoints, mirrored):
        (x, y, cw, ch), (H, W) = crop, self.size
        # Beyond the picture's edge a crop is black.
        pixels = torch.from_numpy(np.array(picture.crop((x, y, x + cw, y + ch)))).permute(2, 0, 1)
        # deviates from HAP, whose bicubic resize does not smooth what it shrinks.
        # torch's uint8 resize equals Pillow's up to rounding (a grey level or two) and takes a third of its time.
        pixels = torch.nn.functional.interpolate(pixels[None], (H, W), mode="bicubic", antialias=True)[0]
        # Pixel centres are whole numbers, edges halves: (x + .5) scales, not x.
        xy = (keypoints[:, :2] + 0.5 - (x, y)) * (W / cw, H / ch) - 0.5
        inside = ((xy >= -0.5) & (xy < (W - 0.5, H - 0.5))).all(1)
        # A joint that the crop cut off is missing, as in HAP: its part's patches would lie where no limb is.
        keypoints = np.concatenate([xy, keypoints[:, 2:]], 1).astype(np.float32) * inside[:, None]
        if mirrored:  # HAP leaves left and right ids as they are; its six parts come to the same
            pixels = pixels.flip(2)
            keypoints = keypoints[self.mirror_ids]
            keypoints[:, 0] = np.where(keypoints[:, 2] > 0, W - 1 - keypoints[:, 0], 0)
        if self.strong:
            pixels = STRONG(pixels)
        return {"image": pixels.contiguous(), "keypoints": torch.from_numpy(keypoints)}


def padded_box(box, padding, size):
    """Box grown by `padding` around its centre, cut to the picture, as whole px (x, y, w, h), at least 1 × 1."""
    x, y, w, h = (float(v) for v in box)
    x, y, w, h = x - w * (padding - 1) / 2, y - h * (padding - 1) / 2, w * padding, h * padding
    x0, y0 = min(max(0, round(x)), int(size[0]) - 1), min(max(0, round(y)), int(size[1]) - 1)
    return x0, y0, max(1, min(int(size[0]), round(x + w)) - x0), max(1, min(int(size[1]), round(y + h)) - y0)


def grown_region(region, shape, picture_size):
    """The smallest region (x, y, w, h) px around `region` whose w/h random_crop can take whole: 3/4 to 4/3 of shape.

    Moved into the picture (w, h) where it fits; it hangs over the edge where the picture is too small.
    """
    x, y, w, h = region
    grown = max(w, round(h * shape * 3 / 4)), max(h, round(w / (shape * 4 / 3)))
    corner = []
    for start, old, new, side in zip((x, y), (w, h), grown, picture_size):
        start -= (new - old) // 2
        corner.append(min(max(0, start), int(side) - new) if new <= side else start)
    return *corner, *grown


def random_crop(w, h, crop_min, shape):
    """RandomResizedCrop's rectangle (x, y, width, height) in a region of w × h px, for an input of w/h = shape.

    Share of the area uniform in [crop_min, 1], ratio log-uniform in [3/4, 4/3] · shape [HAP], place uniform; after 10
    misses the largest central one that keeps the ratio. torchvision's own get_params draws the same with some twenty
    tensor operations, which cost as much as the resize.
    """
    low, high = shape * 3 / 4, shape * 4 / 3
    for _ in range(10):
        area, ratio, across, down = torch.rand(4).tolist()
        area = w * h * (crop_min + area * (1 - crop_min))
        ratio = low * (high / low) ** ratio
        cw, ch = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < cw <= w and 0 < ch <= h:
            return int(across * (w - cw + 1)), int(down * (h - ch + 1)), cw, ch
    cw, ch = max(1, min(w, round(h * high))), max(1, min(h, round(w / low)))
    return (w - cw) // 2, (h - ch) // 2, cw, ch
