"""Pre-training data: augmented pictures of people, part-guided masks, who shares a batch.

Legend: B pictures on this rank · N patches · K pictures of a pose in a batch · S batches in an
epoch · H, W picture · h, w grid of patches.
Frame: keypoints in px with pixel centres at whole numbers (COCO's frame), third column 0 = missing;
boxes and regions are x, y, w, h in px. Masks are bool (B, N), True = masked.
A sample is a function of (seed, epoch, index) alone: worker count and world size change nothing.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from torchvision.transforms import v2

from formats.joints import COCO_JOINTS, flip_ids, to_coco17
from plumbing.errors import UserError
from plumbing.loading import StepSampler
from plumbing.pictures import load_picture
from plumbing.seeds import CROP, FLIP, ORDER, SAMPLE, rng_of, seed_all

# ----------------------------------------------------------------------------------------- pictures

# [StableRep]; the paper: stronger augmentation narrows the gap between real and generated.
JITTER = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
BLUR = v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], p=0.5)
STRONG = v2.Compose([JITTER, v2.RandomGrayscale(0.2), BLUR])


class Augmentation(NamedTuple):
    """What a loader does to a person's box. Defaults: [HAP], ours where nobody says."""

    box_padding: float = 1.25  # the box grows by this before it is cropped
    region: str = "grow"  # a region that no crop of the wanted ratio could hold grows; or "box"
    crop_min: float = 0.8  # [HAP] smallest share of the region's area in a crop
    strong: bool = False  # [StableRep]'s jitter, grey and blur on top
    # What all pictures of a pose draw together, anew in each epoch: the "flip", because a mirrored
    # pose is another pose; "crop": flip and crop; or "nothing".
    shared: str = "flip"


class PretrainPictures(Dataset):
    """Item (epoch, index) → image uint8 (3, H, W), keypoints (17, 3) px of it, pose_id, index.

    `people`: one People per annotation file; indices run through them in order; pose ids of
    different files differ. A person's region is the padded box, grown where no crop of the
    input's ratio could hold it. RandomResizedCrop [HAP]: shares crop_min to 1 of the region's area,
    ratio w/h 3/4 to 4/3 of the input's, bicubic; flip .5.
    """

    def __init__(self, people, size, seed, options=Augmentation()):  # noqa: B008  a tuple
        self.people, self.size, self.seed, self.options = people, size, seed, options
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
        region = padded_box(people.boxes[row], self.options.box_padding, people.size[row])
        shape = self.size[1] / self.size[0]
        if self.options.region == "grow":
            region = grown_region(region, shape, people.size[row])
        # What the pictures of a pose share comes from the pose's stream, the rest from their own.
        of_picture, shared = (1, index), self.options.shared
        of_pose = (0, pose_id) if pose_id >= 0 else of_picture  # 0 and 1 keep the kinds apart
        seed_all(FLIP, self.seed, epoch, *(of_picture if shared == "nothing" else of_pose))
        mirrored = torch.rand(()) < 0.5
        seed_all(CROP, self.seed, epoch, *(of_pose if shared == "crop" else of_picture))
        left, top, cw, ch = random_crop(*region[2:], self.options.crop_min, shape)
        crop = region[0] + left, region[1] + top, cw, ch
        seed_all(SAMPLE, self.seed, epoch, index)
        sample = self.augment(picture, crop, self.keypoints[f][row], mirrored)
        return sample | {"pose_id": pose_id, "index": index}

    def augment(self, picture, crop, keypoints, mirrored):
        (x, y, cw, ch), (H, W) = crop, self.size
        # Beyond the picture's edge a crop is black.
        pixels = torch.from_numpy(np.array(picture.crop((x, y, x + cw, y + ch)))).permute(2, 0, 1)
        # deviates from HAP, whose bicubic resize does not smooth what it shrinks. torch's uint8
        # resize equals Pillow's but for a grey level or two and takes a third of its time.
        pixels = F.interpolate(pixels[None], (H, W), mode="bicubic", antialias=True)[0]
        # Pixel centres are whole numbers, edges halves: (x + .5) scales, not x.
        xy = (keypoints[:, :2] + 0.5 - (x, y)) * (W / cw, H / ch) - 0.5
        inside = ((xy >= -0.5) & (xy < (W - 0.5, H - 0.5))).all(1)
        # A joint that the crop cut off is missing [HAP]: its part would lie where no limb is.
        keypoints = np.concatenate([xy, keypoints[:, 2:]], 1).astype(np.float32) * inside[:, None]
        if mirrored:  # HAP leaves left and right ids as they are; its six parts come to the same
            pixels = pixels.flip(2)
            keypoints = keypoints[self.mirror_ids]
            keypoints[:, 0] = np.where(keypoints[:, 2] > 0, W - 1 - keypoints[:, 0], 0)
        if self.options.strong:
            pixels = STRONG(pixels)
        return {"image": pixels.contiguous(), "keypoints": torch.from_numpy(keypoints)}


def padded_box(box, padding, size):
    """Box × `padding` around its centre, cut to the picture: whole px (x, y, w, h), ≥ 1 × 1."""
    x, y, w, h = (float(v) for v in box)
    x, y, w, h = x - w * (padding - 1) / 2, y - h * (padding - 1) / 2, w * padding, h * padding
    x0, y0 = min(max(0, round(x)), int(size[0]) - 1), min(max(0, round(y)), int(size[1]) - 1)
    x1, y1 = min(int(size[0]), round(x + w)), min(int(size[1]), round(y + h))
    return x0, y0, max(1, x1 - x0), max(1, y1 - y0)


def grown_region(region, shape, picture_size):
    """The smallest (x, y, w, h) whole px around `region` whose w/h is 3/4 to 4/3 of shape.

    random_crop can take it whole. Moved into the picture (w, h) where it fits, else it hangs over.
    """
    x, y, w, h = region
    grown = max(w, round(h * shape * 3 / 4)), max(h, round(w / (shape * 4 / 3)))
    corner = []
    for start, old, new, side in zip((x, y), (w, h), grown, picture_size):
        start -= (new - old) // 2
        corner.append(min(max(0, start), int(side) - new) if new <= side else start)
    return *corner, *grown


def random_crop(w, h, crop_min, shape, crop_max=1.0):
    """RandomResizedCrop's rectangle (x, y, w, h) in a region of w × h px; shape: w/h of the input.

    Share of the area uniform in [crop_min, crop_max], ratio log-uniform in [3/4, 4/3] · shape
    [HAP], place uniform; after 10 misses the largest central one that keeps the ratio.
    torchvision's get_params draws the same but takes 24 µs; this takes 5.
    """
    low, high = shape * 3 / 4, shape * 4 / 3
    for _ in range(10):
        area, ratio, across, down = torch.rand(4).tolist()
        area = w * h * (crop_min + area * (crop_max - crop_min))
        ratio = low * (high / low) ** ratio
        cw, ch = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < cw <= w and 0 < ch <= h:
            return int(across * (w - cw + 1)), int(down * (h - ch + 1)), cw, ch
    cw, ch = max(1, min(w, round(h * high))), max(1, min(h, round(w / low)))
    return (w - cw) // 2, (h - ch) // 2, cw, ch


# -------------------------------------------------------------------------------- part-guided masks

# Six body parts as COCO-17 links [HAP].
PARTS = (
    ((0, 1), (0, 2), (1, 2), (1, 3), (2, 4)),  # head
    ((5, 7), (7, 9)),  # left arm
    ((6, 8), (8, 10)),  # right arm
    ((11, 13), (13, 15)),  # left leg
    ((12, 14), (14, 16)),  # right leg
    ((6, 11), (5, 12)),  # torso
)
BLOCK_TRIES, BLOCK_PATCHES, BLOCK_ASPECT = 10, 12, 0.3  # [HAP]
# deviates from HAP: at most so many rectangles, to draw a batch at once. HAP stops only when the
# budget is met or a round fails: of 20,000 masks of 16 × 8 patches 3 took a 12th, none a 13th.
BLOCK_ROUNDS = 12


def noise_parts(grid):
    """Uniform numbers needed for blocks, order of the parts, k, amounts, inside them, the rest."""
    n = grid[0] * grid[1]
    return [BLOCK_ROUNDS * BLOCK_TRIES * 4, 6, 1, 6, 6 * n, n]


def noise_size(grid):
    """How many uniform numbers the mask of one picture needs."""
    return sum(noise_parts(grid))


def part_guided_mask(keypoints, grid, mask_ratio, patch_size, generator=None, noise=None):
    """Part-guided masks [HAP], for a whole batch at once.

    keypoints: (B, 17, 3) COCO-17 joints in input pixels, third column 0 = missing.
    grid: (h, w) patches.
    generator: where the randomness comes from, or noise: (B, noise_size(grid)) uniform numbers
    drawn by the caller for the global batch and cut to this rank's rows, which makes masks
    independent of the number of ranks.
    → bool (B, h·w), True = masked, exactly round(mask_ratio · h·w) per row.
    """
    B, N = len(keypoints), grid[0] * grid[1]
    if noise is None:
        device = keypoints.device if generator is None else generator.device
        noise = torch.rand(B, noise_size(grid), generator=generator, device=device)
    noise = noise.to(keypoints.device)
    n_masked = round(mask_ratio * N)
    block_u, order_u, k_u, amount_u, within_u, rest_u = noise.split(noise_parts(grid), 1)

    # Levels of the masking order: 0 … 5 parts in this picture's order, 6 the block, 7 the rest.
    level = torch.where(block_mask(block_u, grid, n_masked), 6, 7)
    part = part_patches(keypoints, grid, patch_size)  # (B, 6, N)
    size = part.sum(2)  # (B, 6) patches of each part
    # Shuffle the parts, unusable ones last. argsort of argsort: each part's turn in that order.
    turn = torch.where(size > 0, order_u, order_u + 1).argsort(1).argsort(1)
    # k ~ U{0..6}. deviates from HAP's release, which draws k wrongly (always 0 soon).
    first_k = turn < (k_u * 7).long()
    # floor(n · U(0, .3)) patches of each of the first k parts.
    chosen = (size * amount_u * 0.3).long() * (first_k & (size > 0))
    # A random `chosen` of the part's patches: those whose noise is below its chosen-th smallest.
    within = within_u.view(B, 6, N).masked_fill(~part, 2.0)
    bound = within.sort(2).values.gather(2, (chosen - 1).clamp(min=0).unsqueeze(2))
    front = (within <= bound) & (chosen > 0).unsqueeze(2)
    level = torch.where(front, turn.unsqueeze(2), 7).amin(1).minimum(level)
    # Mask the front of the order. Ties inside a level fall at random.
    # deviates from HAP's release, where the order of an unstable sort decides.
    return front_of_order(level + rest_u, n_masked)


def front_of_order(score, n_masked):
    """(B, N) scores → bool mask of the n_masked smallest of each row, exactly."""
    mask = torch.zeros_like(score, dtype=torch.bool)
    return mask.scatter_(1, score.argsort(1)[:, :n_masked], True)


def random_mask(noise, mask_ratio):
    """[MAE] noise (B, N) uniform → bool (B, N), exactly round(mask_ratio · N) True per row."""
    return front_of_order(noise, round(mask_ratio * noise.shape[1]))


def part_patches(keypoints, grid, patch_size):
    """(B, 17, 3) → bool (B, 6, N): a part's patches are the rectangles that its links span."""
    (h, w), (x, y, v) = grid, keypoints.unbind(2)
    column = (x / patch_size).floor().long().clamp(0, w - 1)  # (B, 17); no half pixel, as in HAP
    row = (y / patch_size).floor().long().clamp(0, h - 1)
    joints = torch.stack([column, row, (v > 0).long()], 2).unbind(1)  # 17 × (B, 3)
    # One by one: an index of joint ids would be copied to the GPU, and the host would wait.
    links = [link for part in PARTS for link in part]
    a = torch.stack([joints[i] for i, _ in links], 1)  # (B, L, 3), L links
    b = torch.stack([joints[j] for _, j in links], 1)
    low, high = a.minimum(b), a.maximum(b)
    valid = low[..., 2:] > 0  # both end points are there; else the link is skipped
    columns, rows = torch.arange(w, device=low.device), torch.arange(h, device=low.device)
    across = (columns >= low[..., :1]) & (columns <= high[..., :1])  # (B, L, w)
    down = (rows >= low[..., 1:2]) & (rows <= high[..., 1:2]) & valid  # (B, L, h)
    patches = down.unsqueeze(3) & across.unsqueeze(2)  # (B, L, h, w)
    parts = patches.split([len(part) for part in PARTS], 1)
    return torch.stack([p.any(1) for p in parts], 1).flatten(2)


def block_mask(noise, grid, budget):
    """Block mask [HAP, after BEiT], noise (B, 480) → bool (B, N), at most `budget` True a row.

    A round draws up to 10 rectangles: area uniform between 12 patches and what is left of the
    budget (below 12 at the end), aspect log-uniform in [.3, 1/.3], place uniform. It keeps the
    first that is smaller than the grid in both sides and adds at least one new patch, at most what
    is left (deviates from HAP: an overlap counts once). A round that keeps none is the last.
    """
    (h, w), B = grid, len(noise)
    noise = noise.view(B, BLOCK_ROUNDS, 4, BLOCK_TRIES)
    mask = torch.zeros(B, h, w, dtype=torch.bool, device=noise.device)
    going_on = torch.ones(B, 1, dtype=torch.bool, device=noise.device)
    rows, columns = torch.arange(h, device=noise.device), torch.arange(w, device=noise.device)
    bound = -math.log(BLOCK_ASPECT)
    for r in range(BLOCK_ROUNDS):
        area_u, aspect_u, top_u, left_u = noise[:, r].unbind(1)  # (B, tries) each
        left_over = budget - mask.sum((1, 2)).unsqueeze(1)  # (B, 1)
        area = BLOCK_PATCHES + area_u * (left_over - BLOCK_PATCHES)
        aspect = torch.exp((2 * aspect_u - 1) * bound)
        tall, wide = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
        top = (top_u * (h - tall + 1).clamp(min=1)).long()
        left = (left_u * (w - wide + 1).clamp(min=1)).long()
        bottom, right = (top + tall).clamp(max=h), (left + wide).clamp(max=w)
        # Patches already masked inside each rectangle, by a summed-area table.
        sums = F.pad(mask.int().cumsum(1).cumsum(2), (1, 0, 1, 0)).flatten(1)

        def inside(y, x, sums=sums):
            return sums.gather(1, y * (w + 1) + x)

        old = inside(bottom, right) - inside(top, right) - inside(bottom, left) + inside(top, left)
        new = tall * wide - old
        fits = going_on & (tall < h) & (wide < w) & (new > 0) & (new <= left_over)
        going_on = fits.any(1, keepdim=True)
        pick = fits.int().argmax(1, keepdim=True)  # the first that fits
        top, bottom, left, right = (v.gather(1, pick) for v in (top, bottom, left, right))
        down = (rows >= top) & (rows < bottom) & going_on
        mask |= down.unsqueeze(2) & ((columns >= left) & (columns < right)).unsqueeze(1)
    return mask.flatten(1)


def recognised(joints):
    """Names of joints → how many are COCO's, how many of the six parts have a link of these."""
    ids = {j for j, name in enumerate(COCO_JOINTS) if name in joints}
    return len(ids), sum(any(ids.issuperset(link) for link in part) for part in PARTS)


# --------------------------------------------------------------------- which pictures share a batch


class PoseBatches(StepSampler):
    """Which pictures share a batch: `slots` slots of K pictures each, over all ranks.

    A slot holds K pictures of one pose, sampled without replacement, or K pictures without pose
    group. A pose with n pictures fills n // K slots of an epoch; poses with fewer than K are left
    out. With K = 1 poses are not grouped: every picture is a slot. Ranks take whole slots.
    An epoch takes every slot once, or of each file its share of the slots, spread evenly.
    A file with fewer slots than its share goes round again in the same order, so that no picture
    meets itself in a batch. The order is a function of (seed, epoch); the last incomplete batch of
    an epoch is dropped.

    short: pictures left out because their pose has fewer than K. posed: whether an epoch draws any
    picture with a pose group (with gamma_mp, it must).

    Raises UserError where no pose of a file has K pictures, for a batch of no whole poses on a rank
    or larger than an epoch, and for shares= that fit no files or put a picture twice into a batch.
    """

    def __init__(self, dataset, batch, pictures_per_pose, shares, seed, ranks):
        self.seed, self.ranks, self.K = seed, ranks, pictures_per_pose
        self.size, self.slots = batch, batch // pictures_per_pose
        if batch % (pictures_per_pose * ranks.world):
            unit = pictures_per_pose * ranks.world
            poses = f"poses of pictures_per_pose={self.K} on {ranks.world} rank(s)"
            raise UserError(f"batch={batch} does not split into {poses}; take multiples of {unit}")
        self.groups, self.singles, self.short = [], [], 0
        for people, start in zip(dataset.people, dataset.starts):
            grouped = people.pose_id >= 0 if self.K > 1 else np.zeros(len(people.files), bool)
            self.groups.append(self._whole_groups(people, np.flatnonzero(grouped), start))
            self.singles.append(np.flatnonzero(~grouped) + start)
            self.short += int(grouped.sum()) - len(self.groups[-1][1])
        offered = np.array([len(self.file_slots(0, f)) for f in range(len(self.groups))])
        counts, total = offered, int(offered.sum())
        if shares:
            if len(shares) != len(counts) or min(shares) < 0 or sum(shares) <= 0:
                files = f"annotation file ({len(counts)})"
                raise UserError(f"shares={shares} must be one number ≥ 0 per {files}")
            ends = np.round(np.cumsum(shares) / np.sum(shares) * total).astype(int)
            counts = np.diff(ends, prepend=0)
        # c of a file's n slots span (c − 1)/n of an epoch. There any other file, of m slots, has
        # more than m (c − 1)/n − 1. All must fit into one batch, which bounds c.
        in_a_batch = np.floor(counts * (self.slots + len(counts) - 2) / max(total, 1)) + 1
        at_most = np.minimum(in_a_batch, self.slots)
        for f in np.flatnonzero(np.minimum(counts, at_most) > offered):
            folder, n = dataset.people[f].folder, len(dataset.people[f].files)
            raise UserError(
                f"shares={shares} asks for {counts[f]} slots of an epoch from {folder}, whose {n} "
                f"pictures fill {offered[f]} (pictures_per_pose={self.K}): a picture would stand "
                "twice in a batch; lower its share or the batch"
            )
        drawn = [np.append(g[1], s) for n, g, s in zip(counts, self.groups, self.singles) if n]
        self.posed = any((dataset.pose_id[indices] >= 0).any() for indices in drawn)
        self.counts, self.steps_per_epoch = counts, total // self.slots
        if self.steps_per_epoch == 0:
            holds = f"the {total * self.K} pictures an epoch holds"
            raise UserError(f"batch={batch} is larger than {holds}; lower it")

    def _whole_groups(self, people, rows, start):
        """(pose_id, index) arrays sorted by pose, only poses with ≥ K pictures."""
        rows = rows[np.argsort(people.pose_id[rows], kind="stable")]
        ids, counts = np.unique(people.pose_id[rows], return_counts=True)
        if len(ids) and counts.max() < self.K:
            raise UserError(
                f"no pose in {people.folder} has pictures_per_pose={self.K} pictures, the most "
                f"have {counts.max()}; lower pictures_per_pose"
            )
        rows = rows[np.isin(people.pose_id[rows], ids[counts >= self.K])]
        return people.pose_id[rows], rows + start

    def file_slots(self, epoch, f):
        """All slots of a file in this epoch's order: (slots, K) picture indices."""
        rng, singles = rng_of(ORDER, self.seed, epoch, f), self.singles[f]
        pose, index = self.groups[f]
        order = np.lexsort((rng.random(len(index)), pose))  # shuffled within each pose
        _, starts, counts = np.unique(pose, return_index=True, return_counts=True)
        place = np.arange(len(pose)) - np.repeat(starts, counts)  # of a picture in its pose
        whole = place < np.repeat(counts // self.K * self.K, counts)
        grouped = index[order][whole].reshape(-1, self.K)
        loose = rng.permutation(singles)[: len(singles) // self.K * self.K].reshape(-1, self.K)
        return rng.permutation(np.concatenate([grouped, loose]))

    def epoch_slots(self, epoch):
        """(slots, K) indices, f(seed, epoch). Slot i of a file's n is at (i + offset) / n."""
        parts, places = [], []
        for f, n in enumerate(self.counts.tolist()):
            slots = self.file_slots(epoch, f)
            parts.append(slots[np.arange(n) % max(1, len(slots))])
            first = rng_of(ORDER, self.seed, epoch, f, 1).random()
            places.append((np.arange(n) + first) / max(1, n))
        return np.concatenate(parts)[np.argsort(np.concatenate(places), kind="stable")]

    def epoch_batches(self, epoch):
        S, used = self.steps_per_epoch, self.steps_per_epoch * self.slots
        return self.epoch_slots(epoch)[:used].reshape(S, self.slots, self.K, 1)
