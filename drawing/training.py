"""What a person looks at after pre-training: reconstructions, nearest pictures, attention.

Legend: B, M pictures · N patches · D width · S special tokens · H, W picture · h, w grid.
A sheet is one PNG at `path`.
"""

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F

from drawing.curves import draw_curves  # noqa: F401  a stage finds it beside its other pictures
from drawing.grids import as_picture, framed, sheet
from losses import normalized, patchify, unpatchify
from model import IMAGENET_MEAN, IMAGENET_STD

GREEN = (40, 160, 60)


def denormalize(images):
    """(B, 3, H, W) ImageNet-normalised → uint8, on the CPU."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=images.device).view(3, 1, 1)
    return ((images * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def reconstruction_sheet(images, masked, pred, patch_size, path):
    """Columns: input, what is left of it, two views of the prediction. Two pictures share a row.

    images (B, 3, H, W) ImageNet-normalised; masked (B, M) long patch ids; pred (B, M, p·p·3) their
    normalised pixels as L_rec compares them. The prediction knows no patch's mean and contrast.
    "predicted" shows it with one mean and contrast for the whole picture; "with true mean and
    contrast" gives each patch those of the true one, as MAE's own pictures do, which makes a model
    of few steps look good.
    """
    truth = patchify(images.float(), patch_size)  # (B, N, p·p·3)
    grid = [side // patch_size for side in images.shape[2:]]
    _, mean, std = normalized(truth)
    ids = masked[:, :, None].expand_as(pred)
    hidden = torch.zeros_like(truth, dtype=torch.bool).scatter(1, ids, True)
    pred = torch.zeros_like(truth).scatter(1, ids, pred.float())
    plain = pred * std.mean((1, 2), keepdim=True) + mean.mean((1, 2), keepdim=True)
    views = [truth, truth.masked_fill(hidden, 0.0), plain.masked_fill(~hidden, 0.0)]
    views.append((pred * std + mean).where(hidden, truth))
    columns = [denormalize(unpatchify(view, grid, patch_size)) for view in views]
    rows = two_a_row([[column[i] for column in columns] for i in range(len(images))])
    heads = ["input", "masked", "predicted", "with true mean and contrast"] * 2
    sheet(rows, path, None, heads, "Masked reconstruction", (96, 192))


def two_a_row(rows):
    """n rows → half as many: beside each row of the first half one of the second."""
    half = (len(rows) + 1) // 2
    return [a + b for a, b in zip(rows[:half], rows[half:] + [[]])]


def neighbour_sheet(images, features, pose_id, path, name):
    """Rows: a picture and its nearest others by cosine of `features`.

    A green frame marks the same pose group. images (M, 3, H, W) uint8; features (M, D); pose_id
    (M,), −1 = no pose group; name: of the token, for the title.
    """
    queries, neighbours = 6, 8
    z = F.normalize(features.float(), dim=1)
    similarity = (z @ z.T).fill_diagonal_(-2)
    chosen = torch.linspace(0, len(z) - 1, min(queries, len(z))).long().tolist()
    rows = []
    for q in chosen:
        near = similarity[q].topk(min(neighbours, len(z) - 1)).indices.tolist()
        row = [images[q]]
        for j in near:
            same = pose_id[q] >= 0 and pose_id[j] == pose_id[q]
            row.append(framed(images[j], GREEN) if same else images[j])
        rows.append(row)
    labels = ["query"] + [f"{i + 1}" for i in range(neighbours)]
    sheet(rows, path, None, labels, f"Nearest pictures by {name}; green: same group", (80, 160))


def attention_sheet(images, maps, path):
    """Columns: picture, then the last block's attention of [CLS] (and [POSE]) laid over it.

    images (B, 3, H, W) uint8; maps (B, S, h, w): each map is scaled to its own largest value.
    """
    B, S = maps.shape[:2]
    glow = F.interpolate(maps.float(), images.shape[2:], mode="bicubic", align_corners=False)
    glow = glow.clamp(min=0)
    glow = (glow / glow.amax((2, 3), keepdim=True).clamp(min=1e-9)).numpy()
    rows = []
    for i in range(B):
        grey = np.asarray(as_picture(images[i]).convert("L").convert("RGB"), np.float32)
        heat = [matplotlib.colormaps["inferno"](glow[i, s])[..., :3] * 255 for s in range(S)]
        rows.append([images[i]] + [(0.45 * grey + 0.55 * h).astype(np.uint8) for h in heat])
    labels = ["picture", "[CLS]", "[POSE]"][: S + 1] * 2
    sheet(two_a_row(rows), path, None, labels, "Attention of the last block", (96, 192))


@torch.no_grad()
def attention_maps(encoder, images):
    """Last block: attention of each special token to the patches, mean over heads → (B, S, h, w).

    Each map sums to 1 minus what the token gives to the special tokens.
    """
    x = encoder.embed(images)
    for block in encoder.blocks[:-1]:
        x = block(x)
    last, S = encoder.blocks[-1], encoder.n_special
    q, k, _ = last.attn.queries_keys_values(last.norm1(x))
    logits = q[:, :, :S] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, heads, S, T)
    attention = logits.softmax(-1)
    return attention[..., S:].mean(1).unflatten(-1, encoder.grid)
