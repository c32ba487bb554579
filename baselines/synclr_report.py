"""What SynCLR's encoder has learned: which pictures are alike to [CLS], which patches to the head.

Legend: M pictures · N patches · K prototypes.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from baselines import parts
from data import Augmentation, PretrainPictures
from drawing.grids import as_picture, sheet
from drawing.training import neighbour_sheet, two_a_row
from model import normalize


@torch.no_grad()
def evaluate(cfg, network, people):
    """neighbours.png, prototypes.png of the first 512 pictures, uncropped. → likeness of [CLS]."""
    encoder, size = network.encoder.eval(), (cfg.height, cfg.width)
    plain = Augmentation(crop_min=1.0, shared="nothing")
    dataset = PretrainPictures(people, size, cfg.seed, plain)
    samples = [dataset[(0, row)] for row in range(min(512, len(dataset)))]
    images = torch.stack([sample["image"] for sample in samples])
    device = encoder.pos_embed.device
    cls = [encoder(normalize(part.to(device)))[:, 0].cpu() for part in images.split(64)]
    cls = F.normalize(torch.cat(cls).float(), dim=1)
    caption = torch.tensor([int(sample["pose_id"]) for sample in samples])
    neighbour_sheet(images, cls, caption.tolist(), f"{cfg.out}/neighbours.png", "[CLS]")
    draw_prototypes(network, images, f"{cfg.out}/prototypes.png")
    return likeness(cls, caption, torch.stack([sample["keypoints"] for sample in samples]))


def likeness(z, caption, keypoints):
    """What makes two pictures alike? z (M, D) of length 1, caption (M,), keypoints (M, 17, 3) px.

    → dict: same_caption, the share of pictures whose nearest other picture is of their caption,
    and what it is by chance; pose_distance, how far the joints of the nearest picture of *another*
    caption are, their middle aside, as a share of the mean distance: 1 = z knows no pose. That is
    left out where nobody has joints.
    """
    M, near = len(z), (z @ z.T).fill_diagonal_(-2)
    same = (caption[:, None] == caption) & (caption >= 0)
    found = same.gather(1, near.argmax(1)[:, None]).float().mean()
    same.fill_diagonal_(False)
    figures = dict(same_caption=found, same_caption_by_chance=same.float().sum() / (M * (M - 1)))
    seen = keypoints[:, :, 2] > 0
    if seen.any():
        xy = keypoints[:, :, :2] * seen[:, :, None]
        xy = xy - (xy.sum(1) / seen.sum(1, keepdim=True).clamp(min=1))[:, None]
        both = seen[:, None] & seen
        apart = (xy[:, None] - xy).norm(dim=3) * both  # (M, M, 17) px
        apart = apart.sum(2) / both.sum(2).clamp(min=1)
        other = ~same.fill_diagonal_(True)
        nearest = near.masked_fill(~other, -2).argmax(1)[:, None]
        figures["pose_distance"] = apart.gather(1, nearest).mean() / apart[other].mean()
    return {name: round(float(value), 4) for name, value in figures.items()}


def draw_prototypes(network, images, path):
    """Pictures, and over them the prototype of each patch: alike prototypes have alike colours, by
    their first three principal components. Seen at twice the size, which halves the patches."""
    few = np.linspace(0, len(images) - 1, min(16, len(images))).round().astype(int)
    size = [2 * side for side in images.shape[2:]]
    encoder = parts.at_size(network.encoder, size)
    large = F.interpolate(images[few].float(), size, mode="bicubic").clamp(0, 255).round()
    tokens = encoder(normalize(large.to(encoder.cls_token.device)))[:, encoder.n_special :]
    found, ids = network.head(tokens).argmax(2).cpu().unique(return_inverse=True)  # ids (16, 4N)
    vectors = F.normalize(network.head.last.weight.float().cpu(), dim=1)[found]
    axes = torch.linalg.svd(vectors - vectors.mean(0), full_matrices=False)[2][:3]
    place = F.pad((vectors @ axes.T).argsort(0).argsort(0), (0, 3 - len(axes)))  # ranks: all hues
    colours = (255 * place / max(1, len(found) - 1)).to(torch.uint8)  # (found, 3)
    rows = []
    for picture, patches in zip(large.to(torch.uint8), ids):
        picture = as_picture(picture)
        told = Image.fromarray(colours[patches].view(*encoder.grid, 3).numpy())
        told = told.resize(picture.size, Image.Resampling.NEAREST)
        rows.append([picture, Image.blend(picture.convert("L").convert("RGB"), told, 0.6)])
    title = f"Prototype of each patch; {len(found)} of {network.head.last.out_features} seen here"
    sheet(two_a_row(two_a_row(rows)), path, None, None, title, (96, 192))
