"""Top-down 2-D pose, from a person's box to the joints: picture, network, heat maps, decoding.

Legend: B people on this rank · N people of a file · K joints · D width · S special tokens ·
H, W input · h, w heat map, 4 × the grid of patches · xy in px.
Frame: pixel centres at whole numbers (COCO's frame). UDP [UDP-Pose] measures in intervals between
centres: a region of w px lands on the W − 1 intervals of the input, and the input's W − 1 intervals
on the heat map's w − 1, so that a mirrored heat map fits the straight one without a shift.
"""

import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

from losses import GlobalBatchNorm
from plumbing.errors import UserError
from plumbing.pictures import load_picture
from plumbing.seeds import SAMPLE, rng_of

# -------------------------------------------------------------------------------- regions and warps


def regions(boxes, aspect, padding=1.25):
    """Boxes (N, 4) x y w h → centre (N, 2) and extent (N, 2): widened to w/h = aspect, × padding.

    [HRNet]
    """
    boxes = np.asarray(boxes, np.float64)
    centre, extent = boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]
    width = np.maximum(extent[:, 0], extent[:, 1] * aspect)
    return centre, np.stack([width, width / aspect], 1) * padding


def affine(centre, extent, size, degrees=0.0, mirror=False):
    """(2, 3) matrix: input px → picture px. The region, turned by `degrees`, fills the input.

    size: (H, W). mirror: left and right change places.
    """
    H, W = size
    sx, sy = extent[0] / (W - 1), extent[1] / (H - 1)  # UDP: intervals, not pixels
    sx = -sx if mirror else sx
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    linear = np.array([[c * sx, -s * sy], [s * sx, c * sy]])
    shift = np.asarray(centre) - linear @ [(W - 1) / 2, (H - 1) / 2]
    return np.concatenate([linear, shift[:, None]], 1)


def to_picture(matrix, xy):
    """Input px (..., 2) → picture px."""
    return xy @ matrix[:, :2].T + matrix[:, 2]


def to_input(matrix, xy):
    """Picture px (..., 2) → input px."""
    return (xy - matrix[:, 2]) @ np.linalg.inv(matrix[:, :2]).T


def warp(picture, matrix, size):
    """The input (H, W, 3) uint8 that `matrix` cuts from a PIL picture; bilinear, black outside.

    deviates from [HRNet]: a picture at least twice as large as needed is first shrunk by a whole
    factor, which avoids aliasing.
    """
    H, W = size
    linear, shift = matrix[:, :2], matrix[:, 2].copy()
    factor = int(np.linalg.norm(linear, axis=0).min())
    if factor >= 2:
        corners = to_picture(matrix, np.array([[0, 0], [W, 0], [0, H], [W, H]], float) - 0.5)
        low = np.clip(np.floor(corners.min(0)) - factor, 0, picture.size).astype(int)
        high = np.clip(np.ceil(corners.max(0)) + factor, 0, picture.size).astype(int)
        if (high - low >= factor).all():
            picture = picture.reduce(factor, box=(*low, *high))
            linear, shift = linear / factor, (shift - low - (factor - 1) / 2) / factor
    shift = shift + 0.5 - linear.sum(1) / 2  # Pillow counts from pixel edges
    data = (*linear[0], shift[0], *linear[1], shift[1])
    how = Image.Transform.AFFINE, data, Image.Resampling.BILINEAR
    return np.array(picture.transform((W, H), *how))


UPPER_HALF = 0.6915  # P(N(0, 1) < .5) [HRNet]
LOWER_BODY = ("hip", "knee", "ankle", "pelvis")  # ours: by name, for any joint set; COCO's as HRNet


def lower_body(joints):
    """K joint names → (K,) bool: does it belong to the lower half?"""
    return np.array([any(part in name for part in LOWER_BODY) for name in joints])


def half_body(keypoints, lower, aspect, rng):
    """Region of the upper or the lower half [HRNet] → (centre, extent), or None.

    The extent of the half's joints × 1.5, widened to the aspect, around their mean. None with at
    most 8 visible joints, or where the half has no width or height. keypoints (K, 3) px; lower (K,)
    bool; rng has a random().
    The upper half comes with probability .69: HRNet and ViTPose ask if a normal number is below .5.
    """
    seen = keypoints[:, 2] > 0
    if seen.sum() <= 8:
        return None
    halves = [keypoints[seen & ~lower, :2], keypoints[seen & lower, :2]]
    first = 0 if rng.random() < UPPER_HALF else 1
    xy = halves[first] if len(halves[first]) > 2 else halves[1 - first]
    extent = np.ptp(xy, axis=0)
    if extent.min() <= 0:
        return None
    width = max(extent[0], extent[1] * aspect) * 1.5
    return xy.mean(0).astype(np.float64), np.array([width, width / aspect])


class PosePictures(Dataset):
    """Item (epoch, index) → a person's input, a function of (seed, epoch, index).

    Picture uint8 (3, H, W), keypoints (K, 3) input px, matrix (2, 3) of `affine`. Training adds a
    mirror, half bodies, scale, rotation and a shift of the box [ViTPose].
    """

    def __init__(self, cfg, people, training):
        self.people = people
        self.cfg, self.training, self.size = cfg, training, (cfg.height, cfg.width)
        self.aspect = cfg.width / cfg.height
        self.centre, self.extent = regions(people.boxes, self.aspect, cfg.padding)
        self.lower = lower_body(people.joints)

    def __len__(self):
        return len(self.people.files)

    def name(self, index):
        return f"{self.people.folder}/{self.people.files[index].decode()}"

    def picture(self, index):
        """The whole picture, RGB."""
        people = self.people
        return load_picture(people.folder, people.files[index], people.size[index])

    def __getitem__(self, item):
        epoch, index = item
        keypoints = self.people.keypoints[index].copy()
        centre, extent, degrees, mirror = self.centre[index], self.extent[index], 0.0, False
        if self.training:
            centre, extent, degrees, mirror = self.augment(epoch, index, keypoints)
        matrix = affine(centre, extent, self.size, degrees, mirror)
        keypoints[:, :2] = to_input(matrix, keypoints[:, :2])
        if mirror:
            keypoints = keypoints[self.people.flip]
        pixels = torch.from_numpy(warp(self.picture(index), matrix, self.size))
        sample = {"image": pixels.permute(2, 0, 1).contiguous(), "matrix": matrix, "index": index}
        return sample | {"keypoints": torch.from_numpy(keypoints)}

    def augment(self, epoch, index, keypoints):
        """→ (centre, extent, degrees, mirror) of the region to cut out."""
        cfg, rng = self.cfg, rng_of(SAMPLE, self.cfg.seed, epoch, index)
        centre, extent, degrees = self.centre[index], self.extent[index], 0.0
        mirror, half = rng.random() < cfg.flip, None
        if rng.random() < cfg.half_body:
            half = half_body(keypoints, self.lower, self.aspect, rng)
            centre, extent = half or (centre, extent)
        extent = extent * np.clip(rng.normal(1, cfg.scale), 1 - cfg.scale, 1 + cfg.scale)
        if rng.random() < cfg.rotation_p:
            most = 2 * cfg.rotation
            degrees = float(np.clip(rng.normal(0, cfg.rotation), -most, most))
        # deviates from [ViTPose]: drawn anew in each epoch. There a person keeps one shift.
        if rng.random() < cfg.shift and half is None:
            centre = centre + rng.uniform(-0.2, 0.2, 2) * self.people.boxes[index, 2:]
        return centre, extent, degrees, mirror


# ------------------------------------------------------------------------------------------ network

READ_POSE = ("add", "add_cls_pose")
POSE_TOKENS = ("drop", "none", *READ_POSE)


class PoseModel(nn.Module):
    """ViT → patch tokens → head → heat maps.

    Special tokens: none: the encoder sees patches alone [ViTPose, HAP]; drop: patches attend to
    them, the head does not see them; add [POSE] to every patch; add_cls_pose: add both.
    none takes them out of the given encoder; encoder.safetensors keeps them, untrained.
    UserError for [POSE] of an encoder without it.
    """

    def __init__(self, encoder, head, tokens):
        super().__init__()
        self.encoder, self.head, self.tokens = encoder, head, tokens
        if tokens in READ_POSE and encoder.n_special < 2:
            needs = f"tokens={tokens} needs an encoder with [POSE]"
            raise UserError(f"{needs}; this one has none: use tokens=drop")
        if tokens == "none":
            encoder.n_special = 0
            encoder.cls_token.requires_grad_(False)  # DDP would wait for its gradient
            if encoder.pose_token is not None:
                encoder.pose_token.requires_grad_(False)

    def forward(self, images, drop_noise=None):
        """images (B, 3, H, W) normalised, drop_noise (2·depth, B) → heat maps (B, K, h, w)."""
        x = self.encoder(images, drop_noise=drop_noise)  # (B, S + patches, D)
        special, patches = x.tensor_split([self.encoder.n_special], 1)
        # paper silent: how [POSE] takes part downstream. deviates from [ViTPose] and [HAP], unless
        # tokens=none: no special token enters their encoder; here patches attend to them.
        if self.tokens == "add":
            patches = patches + special[:, 1:]
        elif self.tokens == "add_cls_pose":
            patches = patches + special.sum(1, keepdim=True)
        return self.head(patches, self.encoder.grid)


class ClassicHead(nn.Module):
    """[ViTPose] classic: 2 × [deconvolution 4×4 stride 2, batch norm, ReLU], then 1×1."""

    def __init__(self, width, n_joints, channels=256):  # 256 [ViTPose]
        super().__init__()
        layers = []
        for a in (width, channels):
            layers.append(nn.ConvTranspose2d(a, channels, 4, 2, 1, bias=False))
            layers += [GlobalBatchNorm(channels), nn.ReLU(True)]
        self.deconv_layers = nn.Sequential(*layers)
        self.final_layer = nn.Conv2d(channels, n_joints, 1)
        for module in self.modules():  # N(0, .001) [ViTPose]
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(module.weight, std=0.001)
        nn.init.zeros_(self.final_layer.bias)

    def forward(self, tokens, grid):
        """Patch tokens (B, patches, D) and their grid → heat maps (B, K, h, w)."""
        return self.final_layer(self.deconv_layers(tokens.transpose(1, 2).unflatten(2, grid)))


class SimpleHead(nn.Module):
    """[ViTPose] simple: ReLU, bilinear × 4, one 3×3 convolution."""

    def __init__(self, width, n_joints):
        super().__init__()
        self.final_layer = nn.Conv2d(width, n_joints, 3, padding=1)
        nn.init.normal_(self.final_layer.weight, std=0.001)  # [ViTPose]
        nn.init.zeros_(self.final_layer.bias)

    def forward(self, tokens, grid):
        """Patch tokens (B, patches, D) and their grid → heat maps (B, K, h, w)."""
        x = tokens.transpose(1, 2).unflatten(2, grid).relu()
        x = F.interpolate(x, scale_factor=4, mode="bilinear", align_corners=False)
        return self.final_layer(x)


# --------------------------------------------------------------------------- heat maps and decoding


def heat_maps(keypoints, size, map_size, sigma=2.0):
    """UDP targets: keypoints (B, K, 3) input px and visibility → maps (B, K, h, w), weight (B, K).

    Maps have peak 1; a Gaussian's centre is not rounded. Weights are 0 or 1: a joint does not
    count if it is missing or if its 3σ square misses the map [HRNet, whose
    rounding is 1 to 3 px laxer].
    deviates from [HRNet]: Gaussians are not cut off at 3σ (there they are 0.011).
    """
    (H, W), (h, w) = size, map_size
    xy = torch.where(keypoints[..., 2:] > 0, keypoints[..., :2], 0.0)  # a missing one may be NaN
    mu_x, mu_y = xy[..., 0] * ((w - 1) / (W - 1)), xy[..., 1] * ((h - 1) / (H - 1))  # heat-map px
    inside = (mu_x > -3 * sigma) & (mu_x < w - 1 + 3 * sigma)
    inside &= (mu_y > -3 * sigma) & (mu_y < h - 1 + 3 * sigma)
    x, y = (torch.arange(n, device=mu_x.device, dtype=mu_x.dtype) for n in (w, h))
    # g(x, y) = exp(−((x − μx)² + (y − μy)²) / 2σ²), the product of a row and a column
    gx = torch.exp(-((x - mu_x.unsqueeze(2)) ** 2) / (2 * sigma**2))
    gy = torch.exp(-((y - mu_y.unsqueeze(2)) ** 2) / (2 * sigma**2))
    return gy.unsqueeze(3) * gx.unsqueeze(2), ((keypoints[..., 2] > 0) & inside).to(mu_x.dtype)


def heat_map_loss(pred, target, weight):
    """L = 1/(B·K·h·w) Σ (v_k (pred − target))²: missing joints count as zero error [ViTPose].

    pred, target (B, K, h, w), weight (B, K). float32 or wider inside.
    """
    pred = pred.float() if pred.dtype != torch.float64 else pred
    return ((pred - target).square().mean((2, 3)) * weight.square()).mean()


def decode(heat, size, blur=11):
    """UDP-DARK: heat maps (B, K, h, w) → (B, K, 3) float32 x, y in input px and the peak's height.

    A Newton step on the blurred map's logarithm from its highest pixel: μ = m − H⁻¹ ∇ [DARK];
    blur 11 px, σ 2 [ViTPose].
    deviates from [ViTPose]: zeros beyond the border, not a mirror image, which pulls joints near
    it by up to 1.4 heat-map px along an axis, where zeros do by up to .8. blur is odd.
    """
    heat = heat.float()
    (B, K, h, w), (H, W) = heat.shape, size
    score, place = heat.flatten(2).max(2)
    x, y = place % w, place // w
    offsets = torch.arange(blur, device=heat.device) - blur // 2
    sigma = 0.3 * ((blur - 1) * 0.5 - 1) + 0.8  # as OpenCV derives it
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, blur)
    smooth = F.conv2d(heat.reshape(B * K, 1, h, w), kernel, padding=(0, blur // 2))
    smooth = F.conv2d(smooth, kernel.transpose(2, 3), padding=(blur // 2, 0))
    # 1e-3 and 50 [DARK]; the border is repeated once for the derivatives there
    log = F.pad(smooth.clamp(1e-3, 50).log(), [1] * 4, mode="replicate").view(B, K, -1)

    def at(dx, dy):
        """The map (B, K) dx, dy px from each peak."""
        return log.gather(2, ((y + 1 + dy) * (w + 2) + x + 1 + dx).unsqueeze(2)).squeeze(2)

    m = at(0, 0)
    gx, gy = (at(1, 0) - at(-1, 0)) / 2, (at(0, 1) - at(0, -1)) / 2
    gxx, gyy = at(1, 0) - 2 * m + at(-1, 0), at(0, 1) - 2 * m + at(0, -1)
    gxy = (at(1, 1) - at(1, 0) - at(0, 1) + 2 * m - at(-1, 0) - at(0, -1) + at(-1, -1)) / 2
    det = gxx * gyy - gxy * gxy
    # A flat or saddle-shaped map has no peak to step to: stay on the pixel.
    peak = (det > 1e-9) & (gxx < 0)
    det = torch.where(peak, det, 1.0)
    # Ours: never step further than 2 px.
    step_x = torch.where(peak, (gyy * gx - gxy * gy) / det, 0.0).clamp(-2, 2)
    step_y = torch.where(peak, (gxx * gy - gxy * gx) / det, 0.0).clamp(-2, 2)
    x, y = (x - step_x) * (W - 1) / (w - 1), (y - step_y) * (H - 1) / (h - 1)  # input px
    return torch.stack([x, y, score], 2)
