"""What two or more neighbouring methods need: keys, several crops of a picture, a teacher that is
the moving average of its student, a queue of keys, an encoder for smaller pictures, DINO's head,
a discriminator's R1.

Legend: B pictures on this rank · M on all ranks · D width · g global, l local crops of a picture ·
H, W picture.
"""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import PretrainPictures, grown_region, padded_box, random_crop
from formats.coco import MIN_SCORE, Limits, check_sources, read_people
from formats.weights import resized_positions
from losses import full_precision, gather_rows_of, no_autocast
from model import SIZES
from plumbing.config import Key
from plumbing.errors import UserError
from plumbing.pictures import load_picture
from plumbing.seeds import VIEW, seed_all

DATA = dict(
    annotations=Key([], "COCO JSON files and plain folders of pictures"),
    images=Key([], "picture folder of each (default: `images` beside a file, or its own folder)"),
    check_pictures=Key(True, "look at every picture at the first start", may_change=True),
    max_bad=Key(0, "missing, empty or truncated pictures left out at most, counted", low=0),
    max_bad_boxes=Key(0, "boxes without area on their picture left out at most, counted", low=0),
    min_score=Key(MIN_SCORE, "joints visible from this score on, where annotations hold scores",
                  "[HRNet] [ViTPose]", low=0.01, high=1),
    height=Key(256, "input height", "[HAP]", low=16),
    width=Key(128, "input width", "[HAP]", low=16),
    size=Key("base", "encoder size", "[HAP]", tuple(SIZES)),
    patch=Key(16, "patch side in pixels", "[MAE]", low=1),
    init=Key(None, "encoder weights to start from: ours, MAE, HAP, timm, torchvision …"),
)  # fmt: skip


def read_pictures(cfg):
    """→ (a list of People, one for each file of annotations=, a sentence about them).

    Raises UserError as check_sources and read_people.
    """
    check_sources(cfg)
    people, left_out, bad_boxes = [], 0, 0
    for f, path in enumerate(cfg.annotations):
        limits = Limits(
            min_score=cfg.min_score, max_bad=cfg.max_bad - left_out,
            max_bad_boxes=cfg.max_bad_boxes - bad_boxes, check_pictures=cfg.check_pictures,
        )  # fmt: skip
        one, notes = read_people(path, cfg.images[f] if cfg.images else None, limits)
        people.append(one)
        left_out += len(notes["bad"])
        bad_boxes += notes["bad_boxes"]
    n = sum(len(one.files) for one in people)
    return people, f"{n} people, {left_out} bad pictures, {bad_boxes} bad boxes left out"


def check_local_crops(cfg):
    """UserError where keys of the small crops are valid one by one but not together."""
    if cfg.local_crops and (cfg.local_height % cfg.patch or cfg.local_width % cfg.patch):
        sides = f"local_height={cfg.local_height} and local_width={cfg.local_width}"
        raise UserError(f"{sides} must be multiples of patch={cfg.patch}")
    if cfg.local_min > cfg.local_max:
        raise UserError(f"local_min={cfg.local_min} is above local_max={cfg.local_max}")


class Crops(PretrainPictures):
    """Item (epoch, index) → the crops of a picture, all drawn from (seed, epoch, index, crop).

    image uint8 (g, 3, H, W) and, with `local` crops, local (l, 3, h, w); keypoints (g, 17, 3) px
    of each global crop; box (g + l, 4) float: x, y, w, h of each crop in px of the picture, before
    the flip; mirrored (g + l) bool; pose_id, index. Regions, crops and flips as PretrainPictures',
    except that crops share nothing: each has its own flip.
    local: (number, (h, w), smallest and largest share of the region), or None.
    """

    def __init__(self, people, size, seed, options, globals_=2, local=None):
        super().__init__(people, size, seed, options)
        self.n_global, self.local, self.small = globals_, local, None
        if local:
            self.small = copy.copy(self)  # the same people in pictures of another size
            self.small.size = local[1]

    def __getitem__(self, item):
        epoch, index = item
        f, row = self.where(index)
        people = self.people[f]
        picture = load_picture(people.folder, people.files[row], people.size[row])
        region = padded_box(people.boxes[row], self.options.box_padding, people.size[row])
        if self.options.region == "grow":
            region = grown_region(region, self.size[1] / self.size[0], people.size[row])
        out = dict(image=[], keypoints=[], local=[], box=[], mirrored=[])
        for crop in range(self.n_global + (self.local[0] if self.local else 0)):
            seed_all(VIEW, self.seed, epoch, index, crop)
            mirrored = bool(torch.rand(()) < 0.5)
            small = crop >= self.n_global
            maker, low, high = self, self.options.crop_min, 1.0
            if small:
                maker, (low, high) = self.small, self.local[2]
            shape = maker.size[1] / maker.size[0]
            left, top, w, h = random_crop(*region[2:], low, shape, high)
            box = region[0] + left, region[1] + top, w, h
            sample = maker.augment(picture, box, self.keypoints[f][row], mirrored)
            out["local" if small else "image"].append(sample["image"])
            if not small:
                out["keypoints"].append(sample["keypoints"])
            out["box"].append(torch.tensor(box, dtype=torch.float32))
            out["mirrored"].append(torch.tensor(mirrored))
        out = {name: torch.stack(values) for name, values in out.items() if values}
        return out | {"pose_id": self.pose_id[index], "index": index}


def at_size(encoder, size):
    """The same encoder, weights shared, for pictures of another size (h, w) in px.

    Its positions are the encoder's, resized bicubically as DINO does for its local crops.
    """
    small = copy.copy(encoder)
    small.image_size = tuple(size)
    small.grid = size[0] // encoder.patch_size, size[1] // encoder.patch_size
    small._parameters = dict(encoder._parameters)  # the copy may hold positions of its own
    positions = resized_positions(encoder.pos_embed, small.grid, encoder.grid, "")[1]
    small._parameters["pos_embed"] = nn.Parameter(positions, requires_grad=False)
    return small


class Head(nn.Module):
    """[DINO] three layers → 256, of length 1 → (…, out) cosines with prototypes (weight norm 1)."""

    def __init__(self, width, hidden, out):
        super().__init__()
        self.mlp = nn.Sequential(
            *(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU()),
            nn.Linear(hidden, 256),
        )
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.last = nn.Linear(256, out, bias=False)

    def forward(self, x):
        x = self.mlp(x)
        with no_autocast(x):  # a cosine's third digit, divided by .04, would be lost in bf16
            x, prototypes = full_precision(x, self.last.weight)
            return F.linear(F.normalize(x, dim=-1), F.normalize(prototypes, dim=1))


@torch.no_grad()
def update_teacher(teacher, student, momentum):
    """teacher ← momentum · teacher + (1 − momentum) · student; buffers are copied."""
    own = list(teacher.parameters())
    torch._foreach_lerp_(own, [p.detach() for p in student.parameters()], 1 - momentum)
    for mine, theirs in zip(teacher.buffers(), student.buffers()):
        mine.copy_(theirs)


def squared_slope(output, x):
    """R1 [arXiv 1801.04406]: mean over b of ‖∂ Σ output / ∂x_b‖², x (B, …) a leaf that asks for its
    gradient; itself differentiable. → scalar"""
    (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    return slope.square().flatten(1).sum(1).mean()


class Queue(nn.Module):
    """The last `size` keys of all ranks, first in first out [MoCo]; part of the checkpoint.

    Starts with random directions drawn by the caller's seed, as MoCo's does.
    """

    def __init__(self, size, width):
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, width), dim=1))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def add(self, keys):
        """keys (B, D) of this rank: the (M, D) of all ranks take the place of the oldest."""
        keys = gather_rows_of(keys.to(self.keys.dtype))
        rows = (self.place + torch.arange(len(keys), device=keys.device)) % len(self.keys)
        self.keys[rows] = keys
        self.place.copy_((self.place + len(keys)) % len(self.keys))
