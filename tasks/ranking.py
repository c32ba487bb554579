"""Finding a person again: the triplet loss, the ranking metrics of Market-1501, re-ranking.

Legend: B pictures on this rank · M all ranks · D feature width · Q queries · G gallery pictures ·
N = Q + G. Ids of people as in Market-1501: 0 = distractor (in the gallery, nobody's match), -1 =
junk (as if it were not there).
"""

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F

from losses import full_precision, gather_rows_of, gather_with_gradient, no_autocast
from plumbing.errors import UserError

# --------------------------------------------------------------------------------------------- loss


def triplet_loss(x, label):
    """Soft-margin batch-hard triplet loss [Hermans 2017] over the pictures of all ranks.

    x (B, D) float, not normalised; label (B,) int64. → scalar, this rank's share: the mean over
    ranks is the loss of the global batch (see losses.py).
    Every label must occur at least twice in the global batch, and not alone: PersonBatches sees to
    both.
    """
    with no_autocast(x):
        (x,) = full_precision(x)
        # Own anchors meet the columns of all ranks; gradients return to the columns' ranks.
        columns, label_all = gather_with_gradient(x), gather_rows_of(label)
        # By differences, not by |a|² + |b|² − 2ab, whose rounding swamps small distances.
        d = torch.cdist(x, columns, compute_mode="donot_use_mm_for_euclid_dist")  # (B, M)
        same = label[:, None] == label_all
        # The anchor itself is at distance 0: it is never the farthest picture of its person,
        # unless all of them are the same picture.
        farthest = d.masked_fill(~same, -torch.inf).max(1).values
        nearest = d.masked_fill(same, torch.inf).min(1).values
        # L_tri = mean_i log(1 + exp(max_{same} d_ij − min_{other} d_ik))
        return F.softplus(farthest - nearest).mean()


# ----------------------------------------------------------------------------------------- protocol


def ranking_metrics(distance, query_ids, query_cams, gallery_ids, gallery_cams):
    """mAP and CMC by the official protocol of Market-1501.

    distance (Q, G) any float, smaller = more alike; ids and cameras (Q,) and (G,) whole numbers;
    arrays or tensors.
    Each query drops the gallery pictures of its person from its camera, and all of person -1
    (junk). Person 0 (distractors) stays, a wrong answer to every query: no query may be of person 0
    where 0 means distractors (finetune_reid.py sees to it). Of equal distances the earlier gallery
    picture comes first.
    AP is by rank, 1/m Σ_k k / rank_k, as in MALE, TransReID and torchreid. Market-1501's own MATLAB
    code takes the area under the precision-recall curve by trapezia, which is a little lower.
    A query without a match is left out of all means and counted.
    → dict: mAP (float in [0, 1]); cmc (G,) float64, cmc[k-1] = share of queries with a match among
    the first k; ap (Q,) per query, NaN without a match; unmatched (their number).
    Raises UserError for shapes that disagree, distances that are NaN, or if no query has a match.
    """
    chunks = [(0, as_array(distance))]
    return rank_chunks(chunks, query_ids, query_cams, gallery_ids, gallery_cams)


def as_array(values):
    """An array, or a tensor of any device and type, as a NumPy array."""
    if not isinstance(values, torch.Tensor):
        return np.asarray(values)
    if values.dtype == torch.bfloat16:  # NumPy has none
        values = values.float()
    return values.detach().cpu().numpy()


def rank_chunks(chunks, query_ids, query_cams, gallery_ids, gallery_cams):
    """ranking_metrics from (first row, distance rows) pieces, of which one need exist at a time."""
    query_ids, query_cams = as_array(query_ids), as_array(query_cams)
    gallery_ids, gallery_cams = as_array(gallery_ids), as_array(gallery_cams)
    same_length(query_ids, query_cams, "queries")
    same_length(gallery_ids, gallery_cams, "gallery pictures")
    Q, G, seen = len(query_ids), len(gallery_ids), 0
    kept = np.flatnonzero(gallery_ids != -1)
    gallery_ids, gallery_cams = gallery_ids[kept], gallery_cams[kept]
    members, nobody = rows_of_people(gallery_ids), kept[:0]
    ap, first_hits = np.full(Q, np.nan), []
    for first, distance in chunks:
        if distance.ndim != 2 or distance.shape[1] != G or first + len(distance) > Q:
            shape = f"distances of shape {distance.shape}"
            raise UserError(f"{shape} do not fit {Q} queries and {G} gallery pictures")
        seen = first + len(distance)
        for q, row in enumerate(distance, first):
            if np.isnan(row).any():
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
        wrong = "no query has a match by another camera in the gallery"
        raise UserError(f"{wrong}; check person ids and cameras")
    cmc = np.bincount(first_hits, minlength=G).cumsum() / len(first_hits)
    return {"mAP": float(np.nanmean(ap)), "cmc": cmc, "ap": ap, "unmatched": Q - len(first_hits)}


def same_length(ids, cameras, of):
    if ids.ndim != 1 or ids.shape != cameras.shape:
        lists = f"ids {ids.shape} and cameras {cameras.shape} of the {of}"
        raise UserError(f"{lists} must be two equally long lists")


def rows_of_people(ids):
    """ids (G,) → {person: its rows, in order}."""
    order = np.argsort(ids, kind="stable")
    people, starts = np.unique(ids[order], return_index=True)
    return dict(zip(people.tolist(), np.split(order, starts[1:])))


def match_ranks(row, match, dropped, few=64):
    """Sorted ranks (from 1) of the `match` columns of row (G,) without the `dropped` columns.

    With few matches the row is not sorted: to count what stands before each is several times
    faster.
    """
    if len(match) > few:
        place = np.empty(len(row), np.int64)
        place[np.argsort(row, kind="stable")] = np.arange(len(row))
        before = place[match]
    else:
        before = np.empty(len(match), np.int64)
        for i, j in enumerate(match):
            ahead = np.count_nonzero(row[:j] <= row[j])  # equal ones that are earlier come first
            before[i] = ahead + np.count_nonzero(row[j:] < row[j])
    d, e = row[match][:, None], row[dropped]
    dropped_before = (e < d) | ((e == d) & (dropped < match[:, None]))
    return np.sort(before - dropped_before.sum(1)) + 1


# ------------------------------------------------------------------------------------ from features

CHUNK_BYTES = 256 << 20  # largest piece of the distance matrix in memory: ours


def evaluate_features(query, query_ids, query_cams, gallery, gallery_ids, gallery_cams):
    """ranking_metrics from features (Q, D), (G, D) of length 1, without a whole distance matrix."""
    chunks = distance_chunks(query, gallery)
    return rank_chunks(chunks, query_ids, query_cams, gallery_ids, gallery_cams)


def distance_chunks(query, gallery):
    """(Q, D), (G, D), rows of length 1 → (first row, 1 − cosine (rows, G) float32), in pieces."""
    query, gallery = torch.from_numpy(as_float32(query)), torch.from_numpy(as_float32(gallery))
    rows = max(1, CHUNK_BYTES // (4 * len(gallery)))
    for first in range(0, len(query), rows):
        # |a − b|² = 2 (1 − a·b): the Euclidean order of the protocol
        yield first, (1 - query[first : first + rows] @ gallery.T).numpy()


def as_float32(features):
    return np.ascontiguousarray(as_array(features), np.float32)


def nearest_others(z, k):
    """z (N, D) of length 1, k < N → (N, k) rows of the nearest others, nearest first; cosines."""
    nearest, similarity = np.empty((len(z), k), np.int64), np.empty((len(z), k), np.float32)
    for first, distance in distance_chunks(z, z):
        rows = np.arange(len(distance))
        distance[rows, first + rows] = np.inf
        part = slice(first, first + len(rows))
        nearest[part] = np.argsort(distance, axis=1, kind="stable")[:, :k]
        similarity[part] = 1 - np.take_along_axis(distance, nearest[part], 1)
    return nearest, similarity


# --------------------------------------------------------------------------------------- re-ranking


def reranked_chunks(query, gallery, k1=20, k2=6, weight=0.3):
    """k-reciprocal re-ranking [Zhong 2017], k1 20, k2 6, λ .3 → distances for rank_chunks.

    The published code holds several (Q + G)² matrices (Market-1501: 2 GB each). Here neighbours are
    found in pieces and the k-reciprocal vectors are sparse, so memory grows with Q + G (768 wide,
    the whole process's peak: Market-1501's size 1.9 GB, MSMT17's 2.5 GB and 222 s of one core).
    """
    query, gallery = as_float32(query), as_float32(gallery)
    z, Q = np.concatenate([query, gallery]), len(query)
    k1, k2 = min(k1, len(z) - 1), min(k2, len(z))
    near, farthest = neighbours(z, k1 + 1)
    V = expanded(reciprocal_vectors(z, near, farthest, k1), near[:, :k2])
    columns = V[Q:].tocsc()
    for first, d in distance_chunks(query, gallery):
        for row, q in zip(d, range(first, first + len(d))):
            row[:] = (1 - weight) * jaccard_row(V, columns, q) + weight * row / farthest[q]
        yield first, d


def jaccard_distances(z, k1, k2):
    """k-reciprocal Jaccard distances [Zhong 2017] among (N, D) of length 1 → (N, N) float32, 0 … 1.

    Those of re-ranking at λ = 0, of every picture to every other, for clustering.
    """
    z = as_float32(z)
    k1, k2 = min(k1, len(z) - 1), min(k2, len(z))
    near, farthest = neighbours(z, k1 + 1)
    V = expanded(reciprocal_vectors(z, near, farthest, k1), near[:, :k2])
    columns, d = V.tocsc(), np.empty((len(z), len(z)), np.float32)
    for q in range(len(z)):
        d[q] = jaccard_row(V, columns, q)
    return d.clip(0, 1)  # rounding


def jaccard_row(V, columns, q):
    """Jaccard distances (G,) of row q of V (N, N) to the G rows of V that `columns` (CSC) holds.

    1 − Σ min(V_q, V_g) / Σ max(V_q, V_g) = 1 − t / (2 − t), for rows sum to 1
    """
    span = slice(V.indptr[q], V.indptr[q + 1])
    own = [slice(*columns.indptr[c : c + 2]) for c in V.indices[span]]
    pairs = zip(own, V.data[span])
    shared = np.concatenate([np.minimum(columns.data[s], v) for s, v in pairs])
    g = np.concatenate([columns.indices[s] for s in own])
    t = np.bincount(g, shared, minlength=columns.shape[0])
    return 1 - t / (2 - t)


def neighbours(z, k):
    """(N, D) → the k nearest of each row, itself among them (N, k); its largest distance (N,)."""
    near, farthest = np.empty((len(z), k), np.int64), np.empty(len(z), np.float32)
    for first, d in distance_chunks(z, z):
        part = slice(first, first + len(d))
        near[part] = torch.from_numpy(d).topk(k, dim=1, largest=False).indices.numpy()
        farthest[part] = d.max(1).clip(1e-12)  # all pictures the same: no division by 0
    return near, farthest


def reciprocal_vectors(z, near, farthest, k1):
    """Sparse V (N, N): how much each picture is among the k-reciprocal neighbours of each other."""
    narrow = list(reciprocal(near, round(k1 / 2) + 1))
    indices, values, starts = [], [], [0]
    for i, core in enumerate(reciprocal(near, k1 + 1)):
        # R*(i): R(i, k1) and, of each c in it, R(c, k1/2) where more than 2/3 of it is in R(i, k1)
        extra = [narrow[c] for c in core if len(narrow[c] & core) > 2 / 3 * len(narrow[c])]
        mine = np.array(sorted(core.union(*extra)))
        # V_ij = exp(−d_ij) for j in R*(i), else 0. The published code scales d by the largest of
        # row i and makes rows sum to 1.
        v = np.exp(-(1 - z[mine] @ z[i]) / farthest[i])
        indices.append(mine)
        values.append(v / v.sum())
        starts.append(starts[-1] + len(mine))
    parts = np.concatenate(values), np.concatenate(indices), starts
    return scipy.sparse.csr_matrix(parts, (len(z), len(z)))


def reciprocal(near, k):
    """R(i, k) for every i: those of the k nearest of i that have i among their own k nearest."""
    near = near[:, :k]
    for i, row in enumerate(near):
        yield set(row[(near[row] == i).any(1)].tolist())


def expanded(V, near):
    """Query expansion: V_i becomes the mean of V over the k2 nearest of i, near (N, k2)."""
    N, k2 = near.shape
    parts = np.full(N * k2, 1 / k2), near.ravel(), np.arange(N + 1) * k2
    return (scipy.sparse.csr_matrix(parts, (N, N)) @ V).tocsr()
