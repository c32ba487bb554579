"""Person re-identification, the numbers: readers, pictures, triplet loss, the Market-1501 protocol, re-ranking.

Legend: B pictures on this rank · M all ranks · D feature width · Q queries · G gallery · N pictures of a set ·
H, W picture.
Person ids as in Market-1501: 0 = distractor (in the gallery, nobody's match), -1 = junk (as if it were not there).
Nobody looks for a distractor: where queries hold a 0, it is a person (MSMT17 counts from 0), and
all ids but -1 become one higher.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import RandomErasing

from common import SAMPLE, seed_all
from data import IMAGENET_MEAN, IMAGENET_STD, as_bytes, load_picture, picture_names, refuse_bad_pictures
from losses import full_precision, gather_rows_of, gather_with_gradient, no_autocast
from plumbing.config import UserError

# ---------------------------------------------------------------------------------------------------------- readers


class Pictures(NamedTuple):
    """N pictures below one folder. ids: person (0 distractor, -1 junk, NOBODY = can match no one); cameras: numbers."""

    folder: str
    files: np.ndarray  # (N,) bytes
    ids: np.ndarray  # (N,) int64
    cameras: np.ndarray  # (N,) int64


NOBODY = -2  # a query that is a distractor or junk: it has no match, whatever the gallery holds
MARKET_NAME = re.compile(r"(-?\d+)_c(\d+)(?!\d)")  # also DukeMTMC-reID's 0001_c2_f0046182.jpg
MSMT_NAME = re.compile(r"\d+_\d+_(\d+)_")  # 0000_000_01_0303morning_0015_0.jpg: camera is the third field


def read_market(folder):
    """A folder in Market naming → Pictures. Person and camera come from the names."""
    names = picture_names(folder)
    found = [MARKET_NAME.match(name) for name in names]
    for name, match in zip(names, found):
        if match is None:
            raise UserError(
                f"{folder}/{name}: no person and camera in this name; it must be like 0002_c1s1_000451_03.jpg"
            )
    ids, cameras = (np.array([int(match[i]) for match in found], np.int64) for i in (1, 2))
    return Pictures(str(folder), as_bytes(folder, names), ids, cameras)


def read_msmt17(root, folder, *lists):
    """MSMT17 V1: list files of `path person` lines, paths below `folder` → Pictures.

    Its people are numbered from 0, which is the distractors' number in Market naming: ours are one higher.
    """
    names, ids, cameras = [], [], []
    for path in [Path(root) / name for name in lists]:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {path}: {error}") from None
        for n, line in enumerate(lines, 1):
            if not line.strip():
                continue
            name, _, person = line.strip().rpartition(" ")
            camera = MSMT_NAME.match(name.rsplit("/", 1)[-1])
            if not person.isdigit() or camera is None:
                raise UserError(f'{path} line {n} "{line}": must be like "0000/0000_000_01_0303morning_0015_0.jpg 0"')
            names.append(name)
            ids.append(int(person) + 1)
            cameras.append(int(camera[1]))
    if not names:
        raise UserError(f"{Path(root) / lists[0]} lists no pictures")
    folder = str(Path(root) / folder)
    return Pictures(folder, as_bytes(folder, names), np.array(ids, np.int64), np.array(cameras, np.int64))


def one_higher(data):
    return data._replace(ids=np.where(data.ids >= 0, data.ids + 1, data.ids))


def read_data(root, layout="auto", train="bounding_box_train", query="query", gallery="bounding_box_test"):
    """Market-1501 or MSMT17 V1 below `root`, or other folders in Market naming, such as MSMT17's.

    train None: no training pictures are wanted. → (training Pictures, of real people only, or None; queries; gallery;
    one sentence about them).
    Raises UserError: missing or empty folders and lists, names without person or camera, damaged pictures,
    no query with a match.
    """
    root, from_zero = Path(root), False
    if not root.is_dir():
        raise UserError(f"no folder {root}; check data=")
    if layout == "msmt17" or (layout == "auto" and (root / "list_train.txt").exists()):
        if not (root / "train").is_dir() and (root / "mask_train_v2").is_dir():
            raise UserError(f"{root} is MSMT17 V2 (masked faces); published figures use V1 (folders train and test)")
        lists = ("list_train.txt", "list_val.txt")  # both [TransReID]
        train = train and read_msmt17(root, "train", *lists)
        query, gallery = (read_msmt17(root, "test", f"list_{part}.txt") for part in ("query", "gallery"))
    else:
        train, query, gallery = (folder and read_market(root / folder) for folder in (train, query, gallery))
        from_zero = bool((query.ids == 0).any())
        if from_zero:
            train, query, gallery = (part and one_higher(part) for part in (train, query, gallery))
    for part in (train, query, gallery) if train else (query, gallery):
        refuse_bad_pictures(part.folder, part.files)
    query = query._replace(ids=np.where(query.ids > 0, query.ids, NOBODY))
    cameras = {}  # by which each person of the gallery is seen
    for person, camera in zip(gallery.ids.tolist(), gallery.cameras.tolist()):
        cameras.setdefault(person, set()).add(camera)
    if not any(cameras.get(i, set()) - {c} for i, c in zip(query.ids.tolist(), query.cameras.tolist())):
        raise UserError(f"no query of {query.folder} has a match by another camera in {gallery.folder}; check both")
    about = (
        f"{len(query.ids)} queries of {len(np.unique(query.ids))} people, {len(gallery.ids)} gallery pictures "
        f"({(gallery.ids == 0).sum()} distractors, {(gallery.ids == -1).sum()} junk)"
    )
    if from_zero:
        about += ", people numbered from 0 in the names and from 1 here"
    if train:
        real = train.ids > 0
        train = Pictures(train.folder, *(column[real] for column in train[1:]))
        left_out = "" if real.all() else f" ({(~real).sum()} distractors and junk left out)"
        about += f", {len(train.ids)} training pictures of {len(np.unique(train.ids))} people{left_out}"
    return train, query, gallery, about


# --------------------------------------------------------------------------------------------------------- pictures


def resized(picture, size):
    """PIL → uint8 (H, W, 3), bicubic [MALE]."""
    H, W = size
    return np.asarray(picture.resize((W, H), Image.Resampling.BICUBIC))


class TrainPictures(Dataset):
    """Item (epoch, index, copy) → picture uint8 (3, H, W), label 0..C-1, index.

    [MALE]: bicubic resize, flip .5, a black border and a crop of the old size, random erasing with pixel noise.
    """

    def __init__(self, data, size, pad, erase, seed):
        self.data, self.size, self.pad, self.erase, self.seed = data, size, pad, erase, seed
        self.labels = np.unique(data.ids, return_inverse=True)[1]

    def name(self, index):
        return f"{self.data.folder}/{self.data.files[index].decode()}"

    def __getitem__(self, item):
        epoch, index, copy = item
        seed_all(SAMPLE, self.seed, epoch, index, copy)
        H, W = self.size
        pixels = resized(load_picture(self.data.folder, self.data.files[index]), self.size)
        if np.random.random() < 0.5:
            pixels = pixels[:, ::-1]
        border = np.zeros((H + 2 * self.pad, W + 2 * self.pad, 3), np.uint8)
        border[self.pad : self.pad + H, self.pad : self.pad + W] = pixels
        top, left = np.random.randint(0, 2 * self.pad + 1, 2)
        pixels = torch.from_numpy(border[top : top + H, left : left + W].transpose(2, 0, 1).copy())
        if np.random.random() < self.erase:
            erase_pixels(pixels)
        return {"image": pixels, "label": int(self.labels[index]), "index": index}


def erase_pixels(pixels):
    """Random erasing, mode "pixel" [MALE]: a rectangle of 2 % to 1/3 of the picture becomes noise. In place.

    Noise is N(0, 1) in normalised colours. deviates from [MALE]: cut to what a byte holds, as pictures travel in bytes.
    """
    top, left, h, w, noise = RandomErasing.get_params(pixels, (0.02, 1 / 3), (0.3, 1 / 0.3), value=None)
    if noise is not pixels:  # ten tries found no rectangle that fits: torchvision hands back the picture
        mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (IMAGENET_MEAN, IMAGENET_STD))
        pixels[:, top : top + h, left : left + w] = (noise * std + mean).clamp(0, 255).to(torch.uint8)


class TestPictures(Dataset):
    def __init__(self, data, size, rows):
        self.data, self.size, self.rows = data, size, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        picture = load_picture(self.data.folder, self.data.files[self.rows[i]])
        return torch.from_numpy(resized(picture, self.size).copy()).permute(2, 0, 1)


# --------------------------------------------------------------------------------------------------------------- loss


def triplet_loss(x, label):
    """Soft-margin batch-hard triplet loss [Hermans 2017] over the pictures of all ranks.

    x (B, D) float, not normalised; label (B,) int64. → scalar, this rank's share: the mean over ranks is the loss of
    the global batch (own anchors × gathered columns, gradients return to the columns' ranks; see losses.py).
    Every label must occur at least twice and not alone in the global batch, which batches.PersonBatches sees to.
    """
    with no_autocast(x):
        (x,) = full_precision(x)
        columns, label_all = gather_with_gradient(x), gather_rows_of(label)
        # by differences, not by |a|² + |b|² − 2ab, whose rounding swamps small distances (more so in TF32)
        d = torch.cdist(x, columns, compute_mode="donot_use_mm_for_euclid_dist")  # (B, M)
        same = label[:, None] == label_all
        # The anchor itself, at distance 0, is never the farthest of its person unless all are the same picture.
        farthest = d.masked_fill(~same, -torch.inf).max(1).values
        nearest = d.masked_fill(same, torch.inf).min(1).values
        # L_tri = mean_i log(1 + exp(max_{same} d_ij − min_{other} d_ik))
        return F.softplus(farthest - nearest).mean()


# ----------------------------------------------------------------------------------------------------------- protocol


def ranking_metrics(distance, query_ids, query_cams, gallery_ids, gallery_cams):
    """mAP and CMC by the official Market-1501 protocol.

    distance (Q, G) any float, smaller = more alike; ids and cameras (Q,) and (G,) whole numbers; arrays or tensors.
    For each query, gallery pictures of the same person by the same camera are dropped, and all of person -1 (junk).
    Person 0 (distractors) stays: a wrong answer to every query. Equal distances: the earlier gallery picture first.
    AP is by rank, 1/m Σ_k k / rank_k, as in MALE, TransReID and torchreid; Market-1501's own MATLAB
    code takes the area under the precision-recall curve by trapezia, which is a little lower.
    A query without any match is left out of all means and counted.
    → dict: mAP (float in [0, 1]); cmc (G,) float64, cmc[k-1] = share of queries with a match among
    the first k; ap (Q,) per query, NaN without a match; unmatched (their number).
    Raises UserError for shapes that disagree, distances that are NaN, or if no query has a match.
    """
    chunks = [(0, as_array(distance))]
    return rank_chunks(chunks, *map(as_array, (query_ids, query_cams, gallery_ids, gallery_cams)))


def as_array(values):
    if not isinstance(values, torch.Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()  # NumPy has no bfloat16


def rank_chunks(chunks, query_ids, query_cams, gallery_ids, gallery_cams):
    """ranking_metrics from an iterable of (first row, distance rows): only one chunk need exist at a time."""
    for ids, cams, of in ((query_ids, query_cams, "queries"), (gallery_ids, gallery_cams, "gallery pictures")):
        if ids.ndim != 1 or ids.shape != cams.shape:
            raise UserError(f"ids {ids.shape} and cameras {cams.shape} of the {of} must be two equally long lists")
    Q, G, seen = len(query_ids), len(gallery_ids), 0
    kept = np.flatnonzero(gallery_ids != -1)
    gallery_ids, gallery_cams = gallery_ids[kept], gallery_cams[kept]
    order = np.argsort(gallery_ids, kind="stable")  # pictures of one person together, in gallery order
    people, starts = np.unique(gallery_ids[order], return_index=True)
    members, nobody = dict(zip(people.tolist(), np.split(order, starts[1:]))), order[:0]
    ap, first_hits = np.full(Q, np.nan), []
    for first, distance in chunks:
        if distance.ndim != 2 or distance.shape[1] != G or first + len(distance) > Q:
            raise UserError(f"distances of shape {distance.shape} do not fit {Q} queries and {G} gallery pictures")
        seen = first + len(distance)
        for q, row in enumerate(distance, first):
            if np.isnan(row.sum()):
                raise UserError(f"distances of query {q} are not numbers")
            row = row[kept] if len(kept) < G else row
            same = members.get(int(query_ids[q]), nobody)
            own_camera = gallery_cams[same] == query_cams[q]
            if own_camera.all():  # also where there is no picture at all
                continue
            ranks = match_ranks(row, same[~own_camera], same[own_camera])
            # AP = 1/m Σ_k k / rank_k  over the m matches
            ap[q] = np.mean(np.arange(1, len(ranks) + 1) / ranks)
            first_hits.append(ranks[0] - 1)
    if seen != Q:
        raise UserError(f"distances of {seen} queries do not fit {Q} queries")
    if not first_hits:
        raise UserError("no query has a match by another camera in the gallery; check person ids and cameras")
    cmc = np.bincount(first_hits, minlength=G).cumsum() / len(first_hits)
    return {"mAP": float(np.nanmean(ap)), "cmc": cmc, "ap": ap, "unmatched": Q - len(first_hits)}


def match_ranks(row, match, dropped, few=64):
    """Sorted ranks (from 1) of the `match` columns of row (G,) after the `dropped` columns are taken out.

    A sort of the whole row is not needed: counting what stands before each of a few matches is several times faster.
    """
    if len(match) > few:
        place = np.empty(len(row), np.int64)
        place[np.argsort(row, kind="stable")] = np.arange(len(row))
        before = place[match]
    else:
        counts = [np.count_nonzero(row[:j] <= row[j]) + np.count_nonzero(row[j:] < row[j]) for j in match]
        before = np.array(counts)
    d, e = row[match][:, None], row[dropped]
    before = before - ((e < d) | ((e == d) & (dropped < match[:, None]))).sum(1)
    return np.sort(before) + 1


CHUNK_BYTES = 256 << 20  # largest piece of the distance matrix in memory: ours


def distance_chunks(query, gallery):
    """(Q, D) and (G, D) float32 arrays of length-1 rows → (first row, 1 − cosine (rows, G)), piece by piece."""
    rows = max(1, CHUNK_BYTES // (4 * len(gallery)))
    gallery = torch.from_numpy(gallery).T
    for first in range(0, len(query), rows):
        # |a − b|² = 2 (1 − a·b): the Euclidean order of the protocol
        yield first, (1 - torch.from_numpy(query[first : first + rows]) @ gallery).numpy()


def nearest_others(z, k):
    """z (N, D) of length 1 → (N, k) rows of the most alike others, most alike first, and (N, k) their cosines."""
    nearest, similarity = np.empty((len(z), k), np.int64), np.empty((len(z), k), np.float32)
    for first, distance in distance_chunks(z, z):
        rows = np.arange(len(distance))
        distance[rows, first + rows] = np.inf
        part = slice(first, first + len(rows))
        nearest[part] = np.argsort(distance, axis=1, kind="stable")[:, :k]
        similarity[part] = 1 - np.take_along_axis(distance, nearest[part], 1)
    return nearest, similarity


def evaluate_features(query, query_ids, query_cams, gallery, gallery_ids, gallery_cams, rerank=False):
    """ranking_metrics from features (Q, D), (G, D), chunk by chunk: the distance matrix never exists as a whole."""
    query, gallery = (np.ascontiguousarray(as_array(x), np.float32) for x in (query, gallery))
    chunks = reranked_chunks(query, gallery) if rerank else distance_chunks(query, gallery)
    return rank_chunks(chunks, *map(as_array, (query_ids, query_cams, gallery_ids, gallery_cams)))


def reranked_chunks(query, gallery, k1=20, k2=6, weight=0.3):
    """k-reciprocal re-ranking [Zhong 2017], k1 20, k2 6, λ .3: → (first row, distance (rows, G)), piece by piece.

    The published code holds several (Q + G)² matrices (Market-1501: 2 GB each). Here neighbours are found by chunks and
    the k-reciprocal vectors are sparse, so memory grows with Q + G (768 wide, the whole process's
    peak: Market-1501's size 1.9 GB, MSMT17's 2.5 GB and 222 s of one core).
    """
    z = np.concatenate([query, gallery])
    N, Q = len(z), len(query)
    k1, k2 = min(k1, N - 1), min(k2, N)
    near, farthest = np.empty((N, k1 + 1), np.int64), np.empty(N, np.float32)
    for first, d in distance_chunks(z, z):
        near[first : first + len(d)] = torch.from_numpy(d).topk(k1 + 1, dim=1, largest=False).indices.numpy()
        farthest[first : first + len(d)] = d.max(1).clip(1e-12)  # all pictures the same: no division by 0
    half = round(k1 / 2) + 1
    # R(i, k): the k nearest of i that have i among their own k nearest
    wide, narrow = ([row[m] for row, m in zip(near, reciprocal(near, k))] for k in (k1 + 1, half))
    narrow = [set(row.tolist()) for row in narrow]
    indices, values, starts = [], [], [0]
    for i in range(N):
        core = set(wide[i].tolist())
        # R*(i): R(i, k1) and, of each c in it, R(c, k1/2) where more than 2/3 of that lies in R(i, k1)
        extra = [narrow[c] for c in core if len(narrow[c] & core) > 2 / 3 * len(narrow[c])]
        mine = np.array(sorted(core.union(*extra)))
        # V_ij = exp(−d_ij) for j in R*(i), else 0;  d scaled by its largest of row i, rows sum to 1 (published code)
        v = np.exp(-(1 - z[mine] @ z[i]) / farthest[i])
        indices.append(mine)
        values.append(v / v.sum())
        starts.append(starts[-1] + len(mine))
    V = scipy.sparse.csr_matrix((np.concatenate(values), np.concatenate(indices), starts), (N, N))
    # query expansion: V_i becomes the mean of V over the k2 nearest of i
    mean = scipy.sparse.csr_matrix((np.full(N * k2, 1 / k2), near[:, :k2].ravel(), np.arange(N + 1) * k2), (N, N))
    V = (mean @ V).tocsr()
    columns = V[Q:].tocsc()
    for first, d in distance_chunks(query, gallery):
        for row, q in zip(d, range(first, first + len(d))):
            # Jaccard distance = 1 − Σ min(V_q, V_g) / Σ max(V_q, V_g) = 1 − t / (2 − t)
            span = slice(V.indptr[q], V.indptr[q + 1])
            own = [slice(*columns.indptr[c : c + 2]) for c in V.indices[span]]
            shared = np.concatenate([np.minimum(columns.data[s], v) for s, v in zip(own, V.data[span])])
            g = np.concatenate([columns.indices[s] for s in own])
            t = np.bincount(g, shared, minlength=len(gallery))
            row[:] = (1 - weight) * (1 - t / (2 - t)) + weight * row / farthest[q]
        yield first, d


def reciprocal(near, k):
    """near (N, ≥ k) neighbour ids → rows of bool (≥ k,): True where i is also among the first k of its neighbour."""
    for i, row in enumerate(near):
        yield np.append((near[row[:k], :k] == i).any(1), np.zeros(near.shape[1] - k, bool))
