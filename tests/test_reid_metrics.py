"""ReID's protocol, re-ranking and classifier: loops, whole matrices, by hand, timm's head."""

import numpy as np
import pytest
import timm
import torch

from common import UserError
from finetune_reid import ranking_metrics
from model import ViT
from tasks import ranking
from tasks.reid import ReID


def loop_metrics(distance, query_ids, query_cams, gallery_ids, gallery_cams):
    """The protocol word by word: sort, drop, walk down the list."""
    G = len(gallery_ids)
    aps, hits = [], np.zeros(G)
    for q in range(len(query_ids)):
        found = seen = 0
        precisions = []
        for j in sorted(range(G), key=lambda j: (distance[q][j], j)):
            same_camera = gallery_cams[j] == query_cams[q]
            if gallery_ids[j] == -1 or gallery_ids[j] == query_ids[q] and same_camera:
                continue
            seen += 1
            if gallery_ids[j] == query_ids[q]:
                found += 1
                precisions.append(found / seen)
                if found == 1:
                    hits[seen - 1 :] += 1
        if precisions:
            aps.append(sum(precisions) / len(precisions))
    return sum(aps) / len(aps), hits / len(aps), len(query_ids) - len(aps)


@pytest.mark.parametrize("people", [2, 12])  # 2: a hundred matches of a query, 12: a few
@pytest.mark.parametrize("tied", [False, True])
def test_metrics_against_a_loop(people, tied):
    rng = np.random.default_rng(people)
    Q, G = 23, 301
    ids, cams = rng.integers(1, people + 1, Q), rng.integers(1, 4, Q)
    gallery_ids, gallery_cams = rng.integers(-1, people + 1, G), rng.integers(1, 4, G)
    ids[3] = 77  # without a match
    gallery_cams[gallery_ids == ids[0]] = cams[0] = 2  # only junk
    distance = rng.random((Q, G))
    distance = distance.round(1) if tied else distance
    want = loop_metrics(distance, ids, cams, gallery_ids, gallery_cams)
    arguments = (distance, ids, cams, gallery_ids, gallery_cams)
    for got in (ranking_metrics(*arguments), ranking_metrics(*map(torch.from_numpy, arguments))):
        assert got["mAP"] == pytest.approx(want[0], abs=1e-12)
        assert got["cmc"].shape == (G,)
        np.testing.assert_allclose(got["cmc"], want[1], atol=1e-12)
        assert got["unmatched"] == want[2] == np.isnan(got["ap"]).sum() >= 2
    chunks = [(0, distance[:10]), (10, distance[10:])]
    assert ranking.rank_chunks(chunks, *arguments[1:])["mAP"] == got["mAP"]


def test_metrics_by_hand():
    # order by distance: same camera (dropped), wrong, junk -1 (dropped), right, distractor 0, right
    ids, cams = [5, 8, -1, 5, 0, 5], [1, 2, 2, 2, 3, 3]
    got = ranking_metrics(np.array([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]]), [5], [1], ids, cams)
    assert got["mAP"] == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert got["cmc"].tolist() == [0, 1, 1, 1, 1, 1]
    # two queries: the second finds its only match at once, its own camera's pictures do not count
    distance = np.array([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.6, 0.1, 0.3, 0.2, 0.5, 0.4]])
    got = ranking_metrics(distance, [5, 8], [1, 1], ids, cams)
    assert got["ap"].tolist() == [0.5, 1.0]
    assert got["cmc"][:2].tolist() == [0.5, 1.0]


def test_metrics_refuse_what_has_no_answer():
    with pytest.raises(UserError, match="no query has a match"):
        ranking_metrics(np.zeros((1, 2)), [1], [1], [1, 2], [1, 1])
    with pytest.raises(UserError, match="do not fit"):
        ranking_metrics(np.zeros((2, 2)), [1], [1], [1, 2], [2, 1])
    with pytest.raises(UserError, match="query 0 are not numbers"):
        ranking_metrics(np.array([[0.0, np.nan]]), [1], [1], [1, 2], [2, 1])
    far = ranking_metrics(np.array([[np.inf, 0.1, -np.inf]]), [1], [1], [1, 2, 3], [2, 2, 2])
    assert far["mAP"] == pytest.approx(1 / 3)  # infinities are distances
    good = dict(distance=np.eye(3), query_ids=[1, 2, 3], query_cams=[1] * 3)
    good |= dict(gallery_ids=[1, 2, 3], gallery_cams=[2] * 3)
    assert ranking_metrics(**good)["unmatched"] == 0
    half = {"distance": torch.eye(3, dtype=torch.bfloat16)}
    assert ranking_metrics(**good | half)["ap"].tolist() == [1 / 3] * 3
    changes = [
        {"distance": np.eye(3)[:2]},
        {"distance": np.eye(3)[0]},
        {"query_ids": 1},
        {"query_ids": [[1], [2], [3]]},
    ]
    changes += [{name: [2] * n} for name in good if name.endswith("cams") for n in (2, 4)]
    for change in changes:
        with pytest.raises(UserError, match="do not fit|equally long"):
            ranking_metrics(**good | change)


def features(rng, ids, width=8):
    centres = np.random.default_rng(1).normal(size=(100, width))
    z = centres[ids] + rng.normal(0, 1.2, (len(ids), width))
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)


def dense_reranking(query, gallery, k1, k2, weight):
    """Zhong et al. with whole matrices and plain loops, float64."""
    z = np.concatenate([query, gallery]).astype(np.float64)
    N, Q = len(z), len(query)
    d = np.maximum(2 - 2 * z @ z.T, 0)
    d = d / d.max(1, keepdims=True)
    order = np.argsort(d, axis=1, kind="stable")

    def mutual(i, k):
        return {j for j in order[i, : k + 1] if i in order[j, : k + 1]}

    V = np.zeros((N, N))
    for i in range(N):
        wide = mutual(i, k1)
        star = set(wide)
        for c in wide:
            narrow = mutual(c, k1 // 2)
            if len(narrow & wide) > 2 / 3 * len(narrow):
                star |= narrow
        for j in star:
            V[i, j] = np.exp(-d[i, j])
        V[i] /= V[i].sum()
    V = np.stack([V[order[i, :k2]].mean(0) for i in range(N)])
    final = np.zeros((Q, N - Q))
    for q in range(Q):
        for g in range(N - Q):
            a, b = V[q], V[Q + g]
            jaccard = 1 - np.minimum(a, b).sum() / np.maximum(a, b).sum()
            final[q, g] = (1 - weight) * jaccard + weight * d[q, Q + g]
    return final


def test_reranking_against_whole_matrices(monkeypatch):
    rng = np.random.default_rng(5)
    ids, gallery_ids = rng.integers(0, 6, 9), rng.integers(0, 6, 50)
    query, gallery = features(rng, ids), features(rng, gallery_ids)
    monkeypatch.setattr(ranking, "CHUNK_BYTES", 4 * 59 * 4)  # a few rows at a time
    for k1, k2 in ((20, 6), (6, 1)):
        chunks = list(ranking.reranked_chunks(query, gallery, k1, k2))
        assert len(chunks) > 1
        got = np.concatenate([d for _, d in chunks])
        np.testing.assert_allclose(got, dense_reranking(query, gallery, k1, k2, 0.3), atol=2e-5)


def test_reranking_helps_and_chunks_change_nothing(monkeypatch):
    rng = np.random.default_rng(2)
    ids, gallery_ids = rng.integers(1, 9, 40), rng.integers(1, 9, 160)
    query = features(rng, ids)
    gallery, known = features(rng, gallery_ids), (ids, np.zeros(40), gallery_ids, np.ones(160))
    arguments = (query, *known[:2], gallery, *known[2:])
    whole = ranking.evaluate_features(*arguments)
    again = ranking.rank_chunks(ranking.reranked_chunks(query, gallery), *known)
    assert again["mAP"] > whole["mAP"] + 0.02
    monkeypatch.setattr(ranking, "CHUNK_BYTES", 4 * 160 * 3)
    assert ranking.evaluate_features(*arguments)["mAP"] == pytest.approx(whole["mAP"], abs=1e-4)


def test_nearest_others_leaves_oneself_out(monkeypatch):
    z = features(np.random.default_rng(3), np.arange(7))
    monkeypatch.setattr(ranking, "CHUNK_BYTES", 4 * 7 * 2)
    nearest, similarity = ranking.nearest_others(z, 3)
    for i in range(7):
        others = sorted((j for j in range(7) if j != i), key=lambda j: -float(z[i] @ z[j]))
        assert nearest[i].tolist() == others[:3]
        np.testing.assert_allclose(similarity[i], z[others[:3]] @ z[i], atol=1e-6)


def test_ap_is_by_rank_and_not_below_the_trapezoidal_one():
    """Of these two definitions ours is the higher one; Market-1501's MATLAB code has the other."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        right = rng.random(30) < 0.2
        if not right.any():
            continue
        known = (*np.ones((2, 1)), right, np.full(30, 2))
        got = ranking_metrics(np.arange(30.0)[None], *known)
        precision, recall = right.cumsum() / np.arange(1, 31), right.cumsum() / right.sum()
        assert got["mAP"] == pytest.approx(precision[right].mean())
        before = np.concatenate([[1.0], precision[:-1]])
        steps = np.diff(recall, prepend=0)
        assert got["mAP"] >= (steps * (before + precision) / 2).sum() - 1e-12


def test_the_classifier_starts_as_in_its_recipe():
    """[BoT] behind the neck; without one a head as timm's ViT has it, which [MALE] uses."""
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=2000).head
    encoder = ViT(192, 1, 3, (32, 16), 8)
    behind, alone = (ReID(encoder, "cls", 2000, neck).classifier for neck in (True, False))
    assert behind.bias is None and behind.weight.std().item() == pytest.approx(0.001, rel=0.02)
    assert not alone.bias.any() and not theirs.bias.any()
    assert alone.weight.std().item() == pytest.approx(theirs.weight.std().item(), rel=0.02)
