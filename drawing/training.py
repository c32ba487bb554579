"""What a person looks at after pre-training: reconstructions, nearest pictures, attention, patch
correspondence.

Legend: B, M pictures · N patches · D width · S special tokens · J joints · H, W picture · h, w grid
· p patch side. A sheet is one PNG at `path`.
"""

from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from drawing.curves import draw_curves  # noqa: F401  a stage finds it beside its other pictures
from drawing.grids import INK, PAPER, as_picture, font, framed, sheet
from losses import normalized, patchify, unpatchify
from model import IMAGENET_MEAN, IMAGENET_STD, normalize, split_mask

GREEN = (40, 160, 60)


@torch.no_grad()
def draw_pretraining(model, samples, few, mask, out):
    """All sheets of a pre-training, in the folder `out`. → (names of what is drawn, what is not).

    model: GenPoCCL. samples: items of data.PretrainPictures; few: ids of those that are shown one
    by one, mask (few, N) theirs (with a decoder).
    """
    model.eval()
    out, encoder, S = Path(out), model.encoder, model.encoder.n_special
    images, keypoints = (torch.stack([s[key] for s in samples]) for key in ("image", "keypoints"))
    pose_id = [int(s["pose_id"]) for s in samples]
    inputs = normalize(images.to(encoder.cls_token.device))
    drawn = []
    if model.decoder is not None:
        visible, masked = split_mask(mask, model.n_visible)
        # Not model(): its losses ask all ranks.
        pred = model.decoder(encoder(inputs[few], visible), visible, masked)
        drawn.append("reconstructions.png")
        reconstruction_sheet(inputs[few], masked, pred, encoder.patch_size, out / drawn[-1])
    special = torch.cat([encoder(part)[:, :S] for part in inputs.split(64)]).cpu()
    token = model.token if model.gamma_mp else min(1, S - 1)  # that of L_mp, else [POSE]
    name = ("[CLS]", "[POSE]")[token]
    neighbour_sheet(images, special[:, token], pose_id, out / "neighbours.png", name)
    attention_sheet(images[few], attention_maps(encoder, inputs[few]).cpu(), out / "attention.png")
    drawn += ["neighbours.png", "attention.png"]
    joints, people = people_of_other_poses(keypoints.numpy(), pose_id)
    if people:
        patches = encoder(inputs[people])[:, S:].unflatten(1, encoder.grid).float().cpu()
        drawn.append("correspondence.png")
        correspondence_sheet(images[people], patches, keypoints[people], joints, out / drawn[-1])
    model.train()
    missing = "" if people else "no correspondence.png: no joint is visible on people of two poses"
    return drawn, missing


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


def nearest_sheets(images, files, features, out):
    """nearest_TOKEN.png in the folder `out`, for each token in features {name: (M, D) array}.

    → names of what is drawn. images: M, as for neighbour_sheet; files: their M names.
    """
    names, drawn = {"cls": "[CLS]", "pose": "[POSE]", "patch_mean": "the mean of the patches"}, []
    for token, values in features.items():
        drawn.append(f"nearest_{token}.png")
        path, values = Path(out) / drawn[-1], torch.from_numpy(values)
        neighbour_sheet(images, values, None, path, names[token], queries=12, labels=files)
    return drawn


def neighbour_sheet(images, features, pose_id, path, name, queries=6, labels=None):
    """Rows: a picture and its nearest others by cosine of `features`.

    A green frame marks the same pose group. images: M of (3, H, W) uint8, of which those shown are
    asked for; features (M, D); pose_id (M,), −1 = no pose group, or None where there are no groups;
    name: of the token, for the title. labels: M texts, those of the rows.
    """
    neighbours = 8
    z = F.normalize(features.float(), dim=1)
    chosen = torch.linspace(0, len(z) - 1, min(queries, len(z))).long().tolist()
    rows = []
    for q in chosen:
        similarity = z @ z[q]
        similarity[q] = -2
        near = similarity.topk(min(neighbours, len(z) - 1)).indices.tolist()
        row = [images[q]]
        for j in near:
            same = pose_id is not None and pose_id[q] >= 0 and pose_id[j] == pose_id[q]
            row.append(framed(images[j], GREEN) if same else images[j])
        rows.append(row)
    heads = ["query"] + [f"{i + 1}" for i in range(neighbours)]
    groups = "" if pose_id is None else "; green: same group"
    labels = labels and [labels[q] for q in chosen]
    sheet(rows, path, labels, heads, f"Nearest pictures by {name}{groups}", (80, 160))


def attention_sheet(images, maps, path):
    """Columns: picture, then the last block's attention of [CLS] (and [POSE]) laid over it.

    images (B, 3, H, W) uint8; maps (B, S, h, w): each map is scaled to its own largest value.
    """
    B, S = maps.shape[:2]
    glow = F.interpolate(maps.float(), images.shape[2:], mode="bicubic", align_corners=False)
    glow = glow.clamp(min=0)
    glow = (glow / glow.amax((2, 3), keepdim=True).clamp(min=1e-9)).numpy()
    rows = [[images[i]] + [heated(images[i], glow[i, s]) for s in range(S)] for i in range(B)]
    more = [f"token {s}" for s in range(2, S)]
    labels = ["picture", *["[CLS]", "[POSE]"][:S], *more] * 2
    sheet(two_a_row(rows), path, None, labels, "Attention of the last block", (96, 192))


def heated(image, glow):
    """A grey picture under a heat map: glow (H, W) in [0, 1] → uint8 (H, W, 3)."""
    grey = np.asarray(as_picture(image).convert("L").convert("RGB"), np.float32)
    heat = matplotlib.colormaps["inferno"](glow)[..., :3] * 255
    return (0.45 * grey + 0.55 * heat).astype(np.uint8)


@torch.no_grad()
def attention_maps(encoder, images):
    """Last block: attention of each special token to the patches, mean over heads → (B, S, h, w).

    Each map sums to 1 minus what the token gives to the special tokens. SOLIDER's controllers
    are left out.
    """
    x = encoder.embed(images)
    for block in encoder.blocks[:-1]:
        x = block(x)
    last, S = encoder.blocks[-1], encoder.n_special
    q, k, _ = last.attn.queries_keys_values(last.norm1(x))
    logits = q[:, :, :S] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, heads, S, T)
    attention = logits.softmax(-1)
    return attention[..., S:].mean(1).unflatten(-1, encoder.grid)


# ----------------------------------------------------------------------------- patch correspondence

# COCO's joints that are asked for, in this order: face, hand, knee and foot, not all on one side.
ASKED = {0: "nose", 9: "left wrist", 14: "right knee", 15: "left ankle", 10: "right wrist"}
ASKED |= {13: "left knee", 16: "right ankle", 8: "right elbow", 5: "left shoulder", 12: "right hip"}
ASKED |= {7: "left elbow", 6: "right shoulder", 11: "left hip", 1: "left eye", 2: "right eye"}
RING = (0, 220, 255)  # a colour that the heat map does not have


def people_of_other_poses(keypoints, pose_id, J=4, others=4):
    """Whom the correspondence sheet shows. → (J joint ids, [query, four others]); ([], []) if no
    joint is seen on people of two poses.

    keypoints (M, 17, 3) px; pose_id (M,), −1 = a pose of its own. The joints are visible, not
    hidden, on all of them. The others: one per pose, from rather like the query's to the farthest.
    """
    single = [i for i, pose in enumerate(pose_id) if pose < 0 or pose not in pose_id[:i]]
    keypoints = keypoints[single]  # one person per pose
    seen = keypoints[:, :, 2] == 2
    joints, together = [], np.ones(len(single), bool)
    for least in (others + 1, 2):  # fewer people where too few show a joint
        for j in ASKED if not joints else ():
            if len(joints) < J and (together & seen[:, j]).sum() >= least:
                joints.append(j)
                together = together & seen[:, j]
    if not joints:
        return [], []
    query, *rest = np.flatnonzero(together)
    both = seen[rest] & seen[query]
    away = np.linalg.norm(keypoints[rest, :, :2] - keypoints[query, :, :2], axis=2)
    order = np.argsort((away * both).sum(1) / both.sum(1), kind="stable")
    n = len(rest)
    first = max(0, min(n // 4, n - others))
    places = np.unique(np.linspace(first, n - 1, others).round().astype(int))
    return joints, [single[query], *(single[rest[order[place]]] for place in places)]


def correspondence_sheet(images, patches, keypoints, joints, path):
    """Rows: a query and other people; columns: how like a patch is to that under a query's joint.

    images (M, 3, H, W) uint8; patches (M, h, w, D) their tokens; keypoints (M, 17, 3) px; joints: J
    ids, seen on all. A map goes from its least similar patch, dark, to its most similar one, in the
    square, whose cosine stands in the corner. Ring: the joint as annotated.
    """
    M, (H, W) = len(images), images.shape[2:]
    z = F.normalize(patches, dim=-1)
    h, w = z.shape[1:3]
    height, patch = 224, H // h
    size, zoom = (round(height * W / H), height), height / H
    shown = [as_picture(image).resize(size, Image.Resampling.BICUBIC) for image in images]
    spots = keypoints[:, joints, :2].numpy() + 0.5  # px from the corner; pixel centres are whole
    rows, heads = [[picture] for picture in shown], ["picture"]
    rows[0] = [numbered(shown[0], spots[0] * zoom)]
    for c, joint in enumerate(joints):
        cells = (spots[:, c] / patch).astype(int).clip(0, (w - 1, h - 1))  # column, row
        cosine = z @ z[0, cells[0, 1], cells[0, 0]]  # (M, h, w)
        glow = F.interpolate(cosine[:, None], size[::-1], mode="bicubic", align_corners=False)[:, 0]
        low, high = cosine.amin((1, 2), keepdim=True), cosine.amax((1, 2), keepdim=True)
        glow = ((glow - low) / (high - low).clamp(min=1e-6)).clamp(0, 1).numpy()
        hits, chance = 0, 0.0
        for i in range(M):
            row, column = divmod(int(cosine[i].argmax()), w)
            if i > 0:
                hits += abs(cells[i] - (column, row)).max() <= 1
                near = np.minimum(cells[i] + 1, (w - 1, h - 1)) - np.maximum(cells[i] - 1, 0) + 1
                chance += near.prod() / (w * h)
            square = np.array([column, row, column + 1, row + 1]) * patch * zoom
            text = f"{cosine[i].max():.2f}" if i else ""
            cell = marked(heated(shown[i], glow[i]), square, spots[i, c] * zoom, text)
            rows[i].append(cell)
        heads.append(f"{c + 1} {ASKED[joint]}\n{hits} of {M - 1}, chance {chance:.1f}")
    title = "Which patch is most like the one under a joint of the query? "
    title += "Square: that patch; ring: the joint itself. Counted: on its patch or beside it"
    labels = ["query"] + [f"other {i}" for i in range(1, M)]
    sheet(rows, path, labels, heads, title, (*size, 70))


def numbered(picture, spots):
    """A picture with a numbered disc at each of spots (J, 2)."""
    picture = picture.copy()
    draw = ImageDraw.Draw(picture)
    for number, (x, y) in enumerate(spots, 1):
        draw.ellipse([x - 9, y - 9, x + 9, y + 9], PAPER, INK, 2)
        draw.text((x, y), str(number), INK, font(12, True), anchor="mm")
    return picture


def marked(pixels, square, spot, text):
    """Pixels with a white square (x0, y0, x1, y1), a ring around a spot, a text in the corner."""
    picture = as_picture(pixels)
    draw = ImageDraw.Draw(picture)
    x0, y0, x1, y1 = square.round()
    x, y = spot
    for colours, edge in (((INK, INK), 4), ((PAPER, RING), 2)):  # on any ground
        more = edge // 2 - 1
        draw.rectangle([x0 - more, y0 - more, x1 - 1 + more, y1 - 1 + more], None, colours[0], edge)
        r = 6 + more
        draw.ellipse([x - r, y - r, x + r, y + r], None, colours[1], edge)
    place = 4, picture.height - 5
    draw.text(place, text, PAPER, font(12, True), anchor="ls", stroke_width=2, stroke_fill=INK)
    return picture
