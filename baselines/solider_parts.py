"""SOLIDER's body parts: labels by clustering, and what it claims of λ, measured and drawn.

The claim: the larger λ, the further apart parts of one person, and the closer the same parts of
different people. It is measured on people drawn for it by the puppet, whose true part of every
pixel is known; none of them was trained on. A patch belongs to the part that covers most of it, if
that is a quarter at least; left and right limbs are one part. A part's feature is the mean of its
patch tokens after the last norm, less the mean token of all people at that λ; a distance is
1 − cosine. So neither a scale nor a shift that all tokens share, which the controller could give
without telling parts, changes it (as_is: of the features with that mean). Ours; the paper measures
clusters of real people. Whether the clusters that L_sm teaches are parts at all
is measured on the same people: without that, no λ can keep the claim.

Legend: n people or crops · N patches · P = 4 true parts · D width · H, W picture · h, w grid.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.metrics import normalized_mutual_info_score

import puppet
from drawing.grids import sheet
from drawing.training import two_a_row
from losses import full_precision, no_autocast
from model import normalize
from plumbing.files import write_atomic, write_json
from plumbing.seeds import PICTURE, seed_of

PARTS, ROUNDS = 3, 20  # [SOLIDER] clusters of the foreground; ours: rounds of 3-means
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # λ
PEOPLE, FIRST_POSE = 256, 700_000  # poses that no set of ours holds
NAMES = ("head", "torso", "arms", "legs")
PART_OF = (0, 1, 2, 3, 3, 4, 4)  # value of a part map → 0 background, 1 … 4 in NAMES
COLOURS = ((230, 159, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167))  # Okabe and Ito


# ---------------------------------------------------------------------------- labels by clustering


@torch.no_grad()
def part_labels(tokens, grid, least=0.5):
    """Patch tokens (n, N, D) before the last norm → labels (n, N) long, kept (n,) bool.

    0 background, 1 … 3 parts from top to bottom; kept: a larger share than `least` is foreground
    [SOLIDER] .5. Labels of pictures that are not kept are 0.
    """
    with no_autocast(tokens):
        tokens = full_precision(tokens)[0]
        inside = larger_of_two(tokens.norm(dim=2))
        count = inside.sum(1, keepdim=True).clamp(min=1)  # 0 of NaN, which the loss will report
        # Thirds of the foreground from top to bottom: patches are counted row by row.
        thirds = (inside.cumsum(1) - 1) * PARTS // count
        labels = three_means(tokens, inside, thirds.clamp(0, PARTS - 1))
        # A cluster's name is its place among the clusters' mean rows; an empty one comes last.
        member = F.one_hot(labels, PARTS) * inside.unsqueeze(2)  # (n, N, 3)
        row = torch.arange(grid[0], device=tokens.device).repeat_interleave(grid[1])
        height = (member * row.view(1, -1, 1)).sum(1) / member.sum(1)  # (n, 3)
        height = height.nan_to_num(nan=math.inf)
        name = height.argsort(dim=1, stable=True).argsort(1) + 1
        kept = count[:, 0] > least * tokens.shape[1]
        return name.gather(1, labels) * inside * kept.unsqueeze(1), kept


def larger_of_two(values):
    """Exact 2-means of numbers (n, N) → bool (n, N), True in the cluster with the larger centre.

    Sorted, the clusters are a head and a tail: the best cut is the one with the largest sum of
    squares between them, n₁ n₂ / N · (mean₁ − mean₂)².
    """
    values = values.double()
    ordered, N = values.sort(1).values, values.shape[1]
    n = torch.arange(1, N, device=values.device)
    head, all_of_it = ordered.cumsum(1)[:, :-1], ordered.sum(1, keepdim=True)
    between = n * (N - n) * (head / n - (all_of_it - head) / (N - n)).square()
    return values >= ordered.gather(1, between.argmax(1, keepdim=True) + 1)


def three_means(x, inside, labels):
    """Lloyd's k-means of the rows of x (n, N, D) with inside (n, N), from labels (n, N) in 0 … 2.

    All pictures at once, a fixed number of rounds: nothing waits for the device. → labels (n, N).
    """
    x = x - x.mean(1, keepdim=True)  # the same clusters; squares lose fewer digits
    for _ in range(ROUNDS):
        member = F.one_hot(labels, PARTS).to(x.dtype) * inside.unsqueeze(2)  # (n, N, 3)
        count = member.sum(1)
        centre = member.transpose(1, 2) @ x / count.clamp(min=1).unsqueeze(2)  # (n, 3, D)
        # ‖x − c‖² but for ‖x‖²; a cluster that is empty stays empty
        distance = centre.square().sum(2).unsqueeze(1) - 2 * x @ centre.transpose(1, 2)
        labels = distance.masked_fill((count == 0).unsqueeze(1), math.inf).argmin(2)
    return labels


# --------------------------------------------------------------------------------------- the claim


def show_parts(encoder, dataset, seed, least, out):
    """Measure and draw: semantics.json, semantics.png, labels.png in `out`. → the table as text.

    encoder: with controller; dataset: Crops, of which some pictures are shown;
    least: of part_labels.
    """
    images, truth = drawn_people(PEOPLE, encoder.image_size, seed)
    table = distances(encoder, images, truth)
    quality = label_quality(*clusters(encoder, images, least), truth, encoder.patch_size)
    write_json(out / "semantics.json", {"claim": table, "labels": quality})
    draw_table(table, out / "semantics.png")
    label_sheet(encoder, dataset, (images, truth, least), out / "labels.png")
    lines = [f"{'λ':>5}{'parts of one person':>22}{'same part, other people':>26}{'ratio':>8}"]
    for row in table:
        own, other = row["parts_of_one_person"], row["same_part_of_others"]
        lines.append(f"{row['lambda']:5.2f}{own:22.4f}{other:26.4f}{own / other:8.3f}")
    told = "clusters: {kept:.0%} of people have labels; their foreground meets the person with IoU "
    told += "{iou:.2f} (chance {iou_chance:.2f}); in it, NMI of clusters and parts {nmi:.2f}"
    return "\n".join([*lines, told.format(**quality)])


def drawn_people(n, size, seed):
    """→ pictures uint8 (n, 3, H, W) and their true part maps uint8 (n, H, W), 0 … 4 as PART_OF."""
    ids = range(FIRST_POSE, FIRST_POSE + n)
    keys = [seed_of(PICTURE, seed, pose, 0, 0) for pose in ids]
    people, scenes = puppet.sample_identities(seed, keys), puppet.sample_scenes(seed, keys)
    made = puppet.render(puppet.sample_poses(seed, ids), people, scenes, size)
    images = torch.from_numpy(made["image"]).permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(np.array(PART_OF, np.uint8)[made["parts"]])


def patch_parts(truth, patch):
    """Part maps (n, H, W) → bool (n, P, N): which patches are a part's."""
    shares = F.avg_pool2d(
        F.one_hot(truth.long(), len(NAMES) + 1).permute(0, 3, 1, 2).float(), patch
    )
    shares = shares[:, 1:].flatten(2)
    return (shares >= 0.25) & (shares == shares.amax(1, keepdim=True))


@torch.no_grad()
def clusters(encoder, images, least):
    """Pictures uint8 (n, 3, H, W) → part_labels of them on the CPU, from tokens at λ = 1."""
    device, found = next(encoder.parameters()).device, []
    for some in images.split(64):
        whole = torch.ones(len(some), device=device)
        tokens = encoder(normalize(some.to(device)), final_norm=False, semantic_weight=whole)
        found.append(part_labels(tokens[:, encoder.n_special :], encoder.grid, least))
    return [torch.cat(values).cpu() for values in zip(*found)]


def label_quality(labels, kept, truth, patch):
    """Labels (n, N), which pictures have them (n,), part maps (n, H, W) → dict: share that is kept;
    of these, intersection over union of labelled and true patches, and what it would be were labels
    dealt at random; normalised mutual information of label and part in the intersection."""
    if not kept.any():
        return dict(kept=0.0, iou=0.0, iou_chance=0.0, nmi=0.0)
    own = patch_parts(truth, patch)[kept]  # (n, P, N)
    labels, person, part = labels[kept], own.any(1), own.float().argmax(1)
    labelled = labels > 0
    both = labelled & person
    found, true = labelled.float().mean().item(), person.float().mean().item()
    either = (labelled | person).sum().clamp(min=1)
    nmi = normalized_mutual_info_score(part[both], labels[both]) if both.any() else 0.0
    chance = found * true / max(found + true - found * true, 1e-9)
    iou = (both.sum() / either).item()
    return dict(kept=kept.float().mean().item(), iou=iou, iou_chance=chance, nmi=float(nmi))


@torch.no_grad()
def distances(encoder, images, truth):
    """→ a row for each λ: the two mean distances, and the second for each part."""
    device, rows = next(encoder.parameters()).device, []
    own = patch_parts(truth, encoder.patch_size).float()  # (n, P, N)
    for weight in WEIGHTS:
        features = []
        for some in images.split(64):
            semantic = torch.full((len(some),), weight, device=device)
            tokens = encoder(normalize(some.to(device)), semantic_weight=semantic)
            features.append(tokens[:, encoder.n_special :].float().cpu())
        features = torch.cat(features)
        part = own @ features / own.sum(2, keepdim=True).clamp(min=1)  # (n, P, D)
        as_is = part_distances(part, own.sum(2) > 0)
        one, other = part_distances(part - features.mean((0, 1)), own.sum(2) > 0)
        row = {"lambda": weight, "parts_of_one_person": one, "same_part_of_others": other.mean()}
        row |= {"parts_of_one_person_as_is": as_is[0], "same_part_of_others_as_is": as_is[1].mean()}
        row = {name: float(value) for name, value in row.items()}
        rows.append(row | {f"same_{name}": float(d) for name, d in zip(NAMES, other)})
    return rows


def part_distances(part, seen):
    """Features (n, P, D) and which are there, bool (n, P) → mean 1 − cosine of pairs: of two parts
    of one person, a scalar over all such pairs; of the same part of two people, (P,)."""
    z, seen = F.normalize(part, dim=2) * seen.unsqueeze(2), seen.to(part.dtype)
    pair = seen.unsqueeze(2) * seen.unsqueeze(1) * (1 - torch.eye(part.shape[1], dtype=z.dtype))
    one = 1 - (z @ z.transpose(1, 2) * pair).sum() / pair.sum().clamp(min=1)
    # Σ over pairs i ≠ j of z_i · z_j = ‖Σ z‖² − Σ ‖z_i‖²
    count = seen.sum(0)
    total = z.sum(0).square().sum(1) - z.square().sum((0, 2))
    return one, 1 - total / (count * (count - 1)).clamp(min=1)


def draw_table(table, path):
    """Both distances over λ and how much they change, as one PNG."""
    figure = Figure((8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = [row["lambda"] for row in table]
    one = np.array([row["parts_of_one_person"] for row in table])
    other = np.array([row["same_part_of_others"] for row in table])
    left.plot(x, one, "o-", color="#0072B2", label="different parts of one person")
    left.plot(x, other, "s-", color="#D55E00", label="same part of different people")
    left.set(ylabel="mean distance, 1 − cosine", ylim=(0, 1.15 * max(one.max(), other.max())))
    left.legend(frameon=False, fontsize=9)
    right.plot(x, one - one[0], "o-", color="#0072B2")
    right.plot(x, other - other[0], "s-", color="#D55E00")
    right.axhline(0, color="0.5", lw=0.8)
    right.set(ylabel="change since λ = 0")
    for axis in (left, right):
        axis.set(xlabel="λ: 0 looks … 1 semantics", xticks=x)
        axis.grid(color="0.92")
    figure.suptitle(f"Parts of {PEOPLE} drawn people at five λ", fontsize=11)
    write_atomic(path, lambda part: figure.savefig(part, format="png", dpi=110))


def label_sheet(encoder, dataset, drawn, path, n=8):
    """Rows: a drawn person, the true parts, the clusters; a training picture, its clusters."""
    chosen = np.linspace(0, len(dataset) - 1, n).round().astype(int)
    own = torch.stack([dataset[0, int(row)]["image"][0] for row in chosen])
    images = torch.cat([drawn[0][:n], own])
    labels, kept = clusters(encoder, images, drawn[2])
    labels = labels.unflatten(1, encoder.grid)
    for side in (1, 2):
        labels = labels.repeat_interleave(encoder.patch_size, side)
    people, grouped = [], []
    for i in range(n):
        people.append([images[i], painted(images[i], drawn[1][i]), painted(images[i], labels[i])])
        grouped.append([images[n + i], painted(images[n + i], labels[n + i])])
    rows = two_a_row([a + b for a, b in zip(people, grouped)])
    heads = ["drawn person", "true parts", "clusters", "training picture", "clusters"] * 2
    share = f"{int(kept.sum())} of {2 * n} have labels"
    sheet(rows, path, None, heads, f"Clusters of the teacher's tokens at λ = 1; {share}", (96, 192))


def painted(image, parts):
    """Picture uint8 (3, H, W) with its parts (H, W), 0 none, in colour → uint8 (H, W, 3)."""
    picture = image.permute(1, 2, 0).numpy().astype(np.float32)
    table = np.array([(0, 0, 0), *COLOURS], np.float32)
    colour, where = table[parts.numpy()], (parts.numpy() > 0)[..., None]
    return np.where(where, 0.4 * picture + 0.6 * colour, 0.5 * picture + 110).astype(np.uint8)
