"""What GCL stands on, beside its algorithm in gcl.py: networks, body guides, views that are scored.

Layers, widths and starts of the networks are those of GCL's release (DG-Net's), where no line says
otherwise; E_id is this project's ViT in place of its ResNet-50.
Legend: B pictures · N of a set · S stripes · D width of the ViT · C channels of a map · E width of
an embedding · H, W picture.
"""

import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch.utils.data import Dataset
from torchvision.ops import MLP

from drawing.grids import sheet
from drawing.training import denormalize
from formats.coco import Limits, read_people
from model import normalize
from plumbing.config import read_yaml
from plumbing.errors import UserError
from plumbing.pictures import load_picture
from plumbing.seeds import VIEW, rng_of
from puppet import coco17, people_set, poses_from_keypoints, render, take
from puppet.body import turned
from puppet.guide import draw_guides
from tasks.features import resized

SLOPE = 0.2  # of every LeakyReLU [GCL]


# ----------------------------------------------------------------------------------------- networks


class GCL(nn.Module):
    """E_id, E_str, G, D; the memory (N, E) and its cluster labels (N,), -1 = in no cluster."""

    def __init__(self, cfg, encoder, N):
        super().__init__()
        self.e_id = Identity(encoder, cfg.stripes, cfg.embedding)
        self.e_str = Structure(cfg.g_width)
        self.g = Generator(encoder.width, cfg.stripes, cfg.g_width, cfg.mlp_width)
        self.d = Discriminator(cfg.d_width)
        self.register_buffer("memory", torch.zeros(N, cfg.embedding))
        self.register_buffer("labels", torch.full((N,), -1))


class Identity(nn.Module):
    """E_id: who it is. Pictures (B, 3, H, W) → stripes (B, S, D) for G, embedding f (B, E).

    [GCL] pools the last map of a ResNet-50 (2048 channels) to 4 stripes, and as a whole, then a
    linear layer to 512 and batch norm. Here the map is that of the patch tokens.
    """

    def __init__(self, encoder, stripes, width):
        super().__init__()
        self.encoder, self.stripes = encoder, stripes
        self.fc, self.bn = nn.Linear(encoder.width, width), nn.BatchNorm1d(width)

    def features(self, images):
        """→ stripes (B, S, D), what goes into the batch norm (B, E)."""
        tokens = self.encoder(images)[:, self.encoder.n_special :].float()
        rows = tokens.transpose(1, 2).unflatten(2, self.encoder.grid)  # (B, D, h, w)
        stripes = F.adaptive_avg_pool2d(rows, (self.stripes, 1))[..., 0].transpose(1, 2)
        return stripes, self.fc(tokens.mean(1))

    def forward(self, images):
        stripes, h = self.features(images)
        return stripes, self.bn(h)


def conv(width, out, side, stride=1, dilation=1):
    """Convolution that keeps the sides, or halves them, with a mirrored border."""
    border = dilation * (side // 2)
    # deviates from [GCL]: replicated where dilated, for a mirror fails on maps of up to 9 places
    mode = "replicate" if dilation > 1 else "reflect"
    return nn.Conv2d(width, out, side, stride, border, dilation, padding_mode=mode)


def layer(width, out, side, stride=1, norm=None, dilation=1):
    """Convolution and norm (a class, or None)."""
    layers = [conv(width, out, side, stride, dilation)]
    return nn.Sequential(*layers, *([norm(out)] if norm else []))


def block(*shape, **options):
    """The same and LeakyReLU."""
    return nn.Sequential(layer(*shape, **options), nn.LeakyReLU(SLOPE))


class Residual(nn.Module):
    def __init__(self, width, norm=None):
        super().__init__()
        self.layers = nn.Sequential(
            block(width, width, 3, norm=norm), layer(width, width, 3, norm=norm)
        )

    def forward(self, x):
        return x + self.layers(x)


class Structure(nn.Module):
    """E_str: which pose, from where. Guides (B, 1, H, W) in [-1, 1] → map (B, 8c, H/4, W/4)."""

    def __init__(self, c=16, blocks=4):
        super().__init__()
        norm = nn.InstanceNorm2d
        self.layers = nn.Sequential(
            block(1, c, 3, 2, norm), block(c, 2 * c, 3, 1, norm),
            block(2 * c, 2 * c, 3, 1, norm), block(2 * c, 4 * c, 3, 2, norm),
            *(Residual(4 * c, norm) for _ in range(blocks)),
        )  # fmt: skip
        # What is wider than one place: dilated convolutions side by side (ASPP).
        self.near = layer(4 * c, 2 * c, 1, norm=norm)
        self.wide = nn.ModuleList(
            nn.Sequential(
                block(4 * c, 2 * c, 1, norm=norm),
                layer(2 * c, 2 * c, 3, norm=norm, dilation=dilation),
            )
            for dilation in (3, 6, 9)
        )
        self.fuse = layer(8 * c, 8 * c, 1, norm=norm)
        self.apply(kaiming)

    def forward(self, guides):
        x = self.layers(guides)
        return self.fuse(torch.cat([self.near(x), *(wide(x) for wide in self.wide)], dim=1))


class AdaptiveResidual(nn.Module):
    """A residual block whose two norms are told by one stripe: AdaIN(x) = w · norm(x) + b."""

    def __init__(self, width, identity, hidden):
        super().__init__()
        self.convs = nn.ModuleList(conv(width, width, 3) for _ in range(2))
        layers, slope = [hidden, hidden, 2 * width], partial(nn.LeakyReLU, SLOPE)
        self.weight = MLP(identity, layers, activation_layer=slope)
        self.bias = MLP(identity, layers, activation_layer=slope)

    def forward(self, x, stripe):
        """x (B, C, h, w), stripe (B, D) → (B, C, h, w)"""
        w, b = (mlp(stripe)[..., None, None].chunk(2, 1) for mlp in (self.weight, self.bias))
        y = w[0] * F.instance_norm(self.convs[0](x)) + b[0]
        y = F.leaky_relu(y, SLOPE)
        return x + w[1] * F.instance_norm(self.convs[1](y)) + b[1]


class Generator(nn.Module):
    """G: structure (B, 8c, H/4, W/4), stripes (B, S, D) → pictures (B, 3, H, W), normalised as
    ImageNet's. Stripe k drives residual block k."""

    def __init__(self, identity, stripes, c=16, hidden=512):
        super().__init__()
        width = 8 * c
        self.blocks = nn.ModuleList(
            AdaptiveResidual(width, identity, hidden) for _ in range(stripes)
        )
        layers = []
        for _ in range(2):
            layers.append(nn.Upsample(scale_factor=2))
            # [MUNIT]'s layer norm: over channels and places of a picture. Its scale starts at 1,
            # there uniformly in 0 to 1.
            layers.append(block(width, width // 2, 5, norm=lambda n: nn.GroupNorm(1, n)))
            width //= 2
        layers += [block(width, width, 3), block(width, width, 3), nn.Conv2d(width, 3, 1)]
        self.layers = nn.Sequential(*layers)
        self.apply(kaiming)

    def forward(self, structure, stripes):
        x = structure
        for k, adaptive in enumerate(self.blocks):
            x = adaptive(x, stripes[:, k])
        return self.layers(x)


class Discriminator(nn.Module):
    """D: pictures (B, 3, H, W) → maps (B, 1, h, w) of three scales: is this place of a real one?"""

    def __init__(self, c=32, blocks=4, scales=3):
        super().__init__()
        self.scales = nn.ModuleList()
        for _ in range(scales):
            layers = [block(3, c, 1), block(c, c, 3), block(c, c, 3, 2)]
            layers += [block(c, c, 3), block(c, 2 * c, 3, 2)]
            layers += [Residual(2 * c) for _ in range(blocks)]
            self.scales.append(nn.Sequential(*layers, nn.Conv2d(2 * c, 1, 1)))
        self.apply(gaussian)

    def forward(self, images):
        out = []
        for layers in self.scales:
            out.append(layers(images))
            images = F.avg_pool2d(images, 3, 2, 1, count_include_pad=False)
        return out


def kaiming(module):
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(module.bias)


def gaussian(module):
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------------ pictures and guides

TURNS = tuple(range(0, 360, 45))  # degrees about the vertical


class Views(Dataset):
    """Item (epoch, index) → image uint8 (3, H, W); guide and turned uint8 (1, H, W), the second by
    one of the seven TURNS but 0, drawn from (seed, epoch, index). No augmentation [GCL]."""

    def __init__(self, people, guides, size, seed):
        self.people, self.guides, self.size, self.seed = people, guides, size, seed

    def __len__(self):
        return len(self.people.files)

    def name(self, index):
        return self.people.path(index)

    def image(self, index):
        pixels = resized(self.people.load(index), self.size)
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)

    def __getitem__(self, item):
        epoch, index = item
        turn = TURNS[rng_of(VIEW, self.seed, epoch, index).integers(1, len(TURNS))]
        guide, turned = (torch.from_numpy(self.guides.draw(index, t))[None] for t in (0, turn))
        return dict(image=self.image(index), guide=guide, turned=turned, index=index)


class Guides:
    """Bodies of N pictures, as they stand or turned: from 3-D poses, or files of a folder.

    poses: of the pictures, in whose window they are whole; or None and folder, files (N,) bytes.
    looks: of rendered people (they, their scenes, (H, W) they were rendered at), or None.
    """

    def __init__(self, size, poses=None, looks=None, folder=None, files=None):
        self.size, self.poses, self.looks = size, poses, looks
        self.folder, self.files = folder, files

    def draw(self, row, degrees):
        """→ uint8 (H, W)"""
        if self.poses is not None:
            return draw_guides(turned(take(self.poses, [row]), degrees), self.size)[0]
        folder = Path(self.folder) / (f"render_{degrees}" if degrees else "render")
        picture = load_picture(str(folder), self.files[row]).convert("L")
        return np.array(picture.resize(self.size[::-1], Image.Resampling.BICUBIC))

    def truth(self, row, degrees):
        """What a rendered person really looks like when turned → uint8 (3, H, W)."""
        people, scenes, size = self.looks
        one = [people[row]], [scenes[row]]
        image = render(turned(take(self.poses, [row]), degrees), *one, size)["image"][0]
        return resized(Image.fromarray(image), self.size).transpose(2, 0, 1)


def read_guides(source, data, people, size):
    """Guides for the pictures of `people` (Sightings), as the key guides= says.

    → (people, Guides for them, how many were left out because no body can be drawn for them).
    """
    if source == "puppet":
        return people, puppet_guides(Path(data), people, size), 0
    if not Path(source).is_dir():
        return lifted_guides(source, people, size)
    for degrees in TURNS:
        folder = Path(source) / (f"render_{degrees}" if degrees else "render")
        for name in people.files:
            if not (folder / name.decode()).is_file():
                need = "each of eight folders needs every training picture's render, by its name"
                raise UserError(f"no file {folder / name.decode()}: {need}")
    return people, Guides(size, folder=source, files=people.files), 0


def puppet_guides(data, people, size):
    """Of a set of generate.py task=people: its pictures are functions of seed and name."""
    made = read_yaml(data / "config.yaml") if (data / "config.yaml").exists() else {}
    if (made.get("task"), made.get("backend")) != ("people", "puppet"):
        other = "guides= a COCO JSON file of joints or a folder of renders"
        raise UserError(f"{data} is no set of generate.py task=people: guides=puppet; use {other}")
    names, K = [name.decode() for name in people.files], made["pictures_per_camera"]
    jobs = [people_set.job_of(name, K) for name in names]
    poses, persons, scenes, _ = people_set.sightings(made["seed"], jobs)
    guides = Guides(size, poses, (persons, scenes, (made["height"], made["width"])))
    # JPEG changes a picture by 2 to 6 of 255; another person by tens.
    told, seen = guides.truth(0, 0).astype(float), resized(people.load(0), size)
    if np.abs(told - seen.transpose(2, 0, 1)).mean() > 12:
        raise UserError(f"{people.path(0)} is not what its set's config draws; make the set anew")
    return guides


def lifted_guides(source, people, size):
    """Of real pictures: 2-D joints in a COCO JSON file, lifted. Depth and turns are approximate."""
    found = coco17(read_people(source, people.folder, Limits(check_pictures=False))[0])
    row_of, area = {}, {}
    # Names without folders: a file of joints may count them from the root of the set.
    for row, name in enumerate(map(os.path.basename, found.files.tolist())):
        if found.area[row] > area.get(name, -1):  # of several people in a picture the largest
            row_of[name], area[name] = row, found.area[row]
    names = [os.path.basename(name) for name in people.files.tolist()]
    kept = np.array([name in row_of for name in names], bool)
    rows = [row_of[name] for name in names if name in row_of]
    H, W = size  # the window is the whole picture, at the size it is resized to
    points = found.keypoints[rows].astype(float)
    points[..., :2] *= (np.array([W, H]) / found.size[rows].reshape(-1, 2))[:, None]
    poses = poses_from_keypoints(points, np.tile((0, 0, W, H), (len(rows), 1)), pad=1.0)
    kept[kept] = poses.ok
    if not kept.any():
        wrong = "has no body that can be drawn for any training picture"
        raise UserError(f"{source} {wrong}; its file names must be those of the pictures")
    return people.take(kept), Guides(size, take(poses, poses.ok)), int((~kept).sum())


# ---------------------------------------------------------------------------- what comes out of it


@torch.no_grad()
def generate(model, views, row, degrees, device):
    """G's pictures of a person turned by each of `degrees` → uint8 (n, 3, H, W), on the CPU."""
    x = normalize(views.image(row)[None].to(device))
    guides = np.stack([views.guides.draw(row, turn) for turn in degrees])
    s = model.e_str(torch.from_numpy(guides)[:, None].to(device) / 127.5 - 1)
    stripes, _ = model.e_id(x)
    return denormalize(model.g(s, stripes.expand(len(s), -1, -1)))


def view_scores(model, views, number, device):
    """Of rendered people: {what: (PSNR in dB, SSIM)}, means over `number` pictures of the set.

    "reconstruction" against the picture; "turned 45" … against the true view; "all turned", and
    beside it "source instead": the untouched picture in place of every turned one.
    """
    scores = {}
    rows = np.linspace(0, len(views) - 1, min(number, len(views))).round().astype(int)
    for row in rows:
        made, source = generate(model, views, row, TURNS, device).numpy(), views.image(row).numpy()
        for turn, image in zip(TURNS, made):
            true = views.guides.truth(row, turn) if turn else source
            name, score = f"turned {turn}", (psnr(image, true), ssim(image, true))
            scores.setdefault(name if turn else "reconstruction", []).append(score)
            if turn:
                scores.setdefault("all turned", []).append(score)
                same = psnr(source, true), ssim(source, true)
                scores.setdefault("source instead", []).append(same)
    return {name: np.mean(values, axis=0).tolist() for name, values in scores.items()}


def psnr(a, b):
    """Peak signal-to-noise ratio of uint8 pictures (3, H, W), in dB; 100 for equal ones."""
    error = np.mean((a.astype(float) - b) ** 2)
    return float(10 * np.log10(255**2 / error)) if error > 0 else 100.0


def ssim(a, b):
    """Structural similarity [Wang 2004] of uint8 pictures (3, H, W), -1 … 1: Gaussian window of
    11 px, σ 1.5; mean over places and colours."""

    def blur(x):
        return gaussian_filter(x, (0, 1.5, 1.5), truncate=3.5)

    a, b = a.astype(float), b.astype(float)
    ma, mb, c1, c2 = blur(a), blur(b), (0.01 * 255) ** 2, (0.03 * 255) ** 2
    va, vb, both = blur(a * a) - ma * ma, blur(b * b) - mb * mb, blur(a * b) - ma * mb
    alike = (2 * ma * mb + c1) * (2 * both + c2)
    alike = alike / ((ma * ma + mb * mb + c1) * (va + vb + c2))
    return float(alike[:, 5:-5, 5:-5].mean())  # where the window lies within the picture


def draw_sheet(model, views, device, path, number=4):
    """gcl.png: source, reconstruction, seven turned views; below each its guide and, of rendered
    people, the truth."""
    rows, labels = [], []
    for row in np.linspace(0, len(views) - 1, min(number, len(views))).round().astype(int):
        source, made = views.image(row), generate(model, views, row, TURNS, device)
        guides = [Image.fromarray(views.guides.draw(row, turn)) for turn in TURNS]
        rows += [[source, *made], [None, *guides]]
        labels += [Path(views.name(row)).stem.split("_0")[0], "guide"]
        if views.guides.looks:
            rows.append([None, source, *(views.guides.truth(row, turn) for turn in TURNS[1:])])
            labels.append("truth")
    heads = ["source", "reconstruction", *(f"turned {turn}°" for turn in TURNS[1:])]
    sheet(rows, path, labels, heads, "GCL with capsule guide", (96, 192, 90))
