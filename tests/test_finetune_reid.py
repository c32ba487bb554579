"""ReID: protocol and re-ranking against loops and by hand, triplet on ranks, batches, readers, and
the stage itself.
"""

import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, kill_after, run_script
from PIL import Image

import common
import finetune_reid
import losses
from common import Ranks, UserError, layer_of, load_checkpoint, save_weights
from finetune_reid import ranking_metrics, triplet_loss
from formats.market import NOBODY, read_data
from formats.weights import encoder_meta
from tasks import ranking, reid
from tasks.reid import PersonBatches

MACHINE = ["precision=fp32", "device=cpu", "workers=0"]
SMALL = "size=tiny height=32 width=16 patch=8 pad=2 people=6 pictures_per_person=2".split()
SMALL += ["warmup_epochs=0.5", "lr=1e-3", "layer_decay=0.9", *MACHINE]
PLAIN = [*SMALL, "epochs=3", "save_every=2", "eval_every=2"]  # as `plain` is run
CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


# ------------------------------------------------------------------------------- pictures of people


def paint(path, person, camera, rng):
    """A person is two colours, a camera is a ground and a light, and every picture has its own
    noise and size.
    """
    colours = np.random.default_rng([7, person]).integers(30, 226, (2, 3))
    pixels = np.full((48, 24, 3), 60 + 30 * camera)
    pixels[6:24, 5:19], pixels[24:46, 7:17] = colours
    pixels = pixels * (0.85 + 0.1 * camera) + rng.normal(0, 6, pixels.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    picture.resize((22 + 2 * camera, 50)).save(path, quality=95)


def market(root, train=9, test=5):
    """Market layout: `train` people × 2 cameras × 2 (person 1 has one picture only); 7 queries, 17
    gallery pictures.
    """
    rng = np.random.default_rng(0)

    def add(folder, person, camera, number):
        who = f"{person:04d}" if person >= 0 else "-1"
        name = f"{who}_c{camera}s1_{number:06d}_01.jpg"
        paint(root / folder / name, person % 1000, camera, rng)

    add("bounding_box_train", 1, 1, 0)
    for person in range(2, train + 1):
        for camera in (1, 2):
            add("bounding_box_train", person, camera, 0)
            add("bounding_box_train", person, camera, 1)
    for person in range(101, 101 + test):
        add("query", person, 1, 0)
        for camera, number in ((1, 1), (2, 2), (3, 3)):
            add("bounding_box_test", person, camera, number)
    add("query", 999, 1, 0)  # nobody else is like this one
    add("query", -1, 1, 0)  # junk as query: no match either, though the gallery has junk
    add("bounding_box_test", 0, 2, 0)
    add("bounding_box_test", -1, 2, 0)
    (root / "bounding_box_test" / "Thumbs.db").write_text("not a picture")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return market(tmp_path_factory.mktemp("market"))


def stage(*arguments):
    """The stage's main in this process."""
    sys.argv = ["finetune_reid.py", *map(str, arguments)]
    finetune_reid.main()


def rows(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "pictures_per_s"} for row in lines]


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """An uninterrupted run in one process: 3 epochs of 2 steps."""
    out = tmp_path_factory.mktemp("plain") / "run"
    stage(f"data={data}", f"out={out}", *PLAIN)
    return out


# ----------------------------------------------------------------------------------------- protocol


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


# ------------------------------------------------------------------------------------------ triplet

LABELS = torch.tensor([0, 0, 1, 2, 2, 1, 3, 3, 1])  # person 1 is on all of 3 ranks


def batch():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(9, 5, generator=g, dtype=torch.float64)
    x[1] = x[0]  # the same picture twice: distance 0, no NaN in the gradient
    return x


def loop_triplet(x, label):
    total = 0.0
    for i in range(len(x)):
        d = [(x[i] - x[j]).square().sum().clamp(min=1e-24).sqrt() for j in range(len(x))]
        same = [d[j] for j in range(len(x)) if label[j] == label[i] and j != i]
        other = [d[j] for j in range(len(x)) if label[j] != label[i]]
        far, near = max(same, key=torch.Tensor.item), min(other, key=torch.Tensor.item)
        total = total + torch.log(1 + torch.exp(far - near))
    return total / len(x)


def gradient_of(loss, x, label):
    layer = torch.nn.Linear(5, 5, bias=False).double()
    torch.nn.init.eye_(layer.weight)
    value = loss(layer(x), label)
    value.backward()
    return value.detach(), layer.weight.grad


def test_triplet_against_a_loop():
    value, gradient = gradient_of(triplet_loss, batch(), LABELS)
    want_value, want_gradient = gradient_of(loop_triplet, batch(), LABELS)
    torch.testing.assert_close(value, want_value, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-10, atol=1e-12)
    half = triplet_loss(batch().bfloat16(), LABELS)
    assert half.dtype == torch.float32


def wrong_gather(x):
    return losses.gather_rows_of(x)


def on_a_rank(rank, world, path):
    """Called in each process of RANKS: value and gradient as DistributedDataParallel would leave
    them.
    """
    own = slice(rank * 9 // world, (rank + 1) * 9 // world)
    found, right = {}, ranking.gather_with_gradient
    for gather in (losses.gather_with_gradient, wrong_gather):
        ranking.gather_with_gradient = gather
        found[gather.__name__] = gradient_of(triplet_loss, batch()[own], LABELS[own])
        for tensor in found[gather.__name__]:
            dist.all_reduce(tensor)
            tensor /= world
    ranking.gather_with_gradient = right
    if rank == 0:
        torch.save(found, path)


RANKS = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import finetune_reid, test_finetune_reid
from common import start_ranks

ranks = start_ranks("cpu")
test_finetune_reid.on_a_rank(ranks.rank, ranks.world, {found!r})
finetune_reid.main()
"""


@pytest.fixture(scope="module")
def three_ranks(data, tmp_path_factory):
    """One launch of three ranks: the triplet loss alone, then the run of `plain`. → its folder's
    parent.
    """
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "ranks.py").write_text(RANKS.format(root=str(ROOT), found=str(folder / "found.pt")))
    command = [f"data={data}", f"out={folder}/run", *PLAIN]
    done = run_script(folder / "ranks.py", *command, ranks=3)
    assert done.returncode == 0, done.stderr
    return folder


def test_triplet_on_three_ranks_is_that_of_one_process(three_ranks):
    found = torch.load(three_ranks / "found.pt")
    want_value, want_gradient = gradient_of(triplet_loss, batch(), LABELS)
    for name, (value, gradient) in found.items():
        torch.testing.assert_close(value, want_value)
        off = (gradient - want_gradient).abs().max() / want_gradient.abs().max()
        assert off < 1e-12 if name == "gather_with_gradient" else off > 0.01, name


# ----------------------------------------------------------------------------- batches and pictures


@pytest.mark.parametrize("seed", range(4))
def test_batches_hold_different_people_and_as_many_as_can_be(seed):
    rng = np.random.default_rng(seed)
    P, K = 4, 3
    counts = rng.integers(1, 25, 9)
    ids = rng.permutation(np.repeat(np.arange(9) * 10 + 5, counts))
    sampler = PersonBatches(ids, P, K, seed, ALONE)
    epochs = [sampler.epoch_batches(e) for e in (0, 1)]
    for batches in epochs:
        assert batches.shape == (sampler.steps_per_epoch, P, K, 2)
        people = ids[batches[..., 0]]
        assert (people == people[:, :, :1]).all()  # one person per group
        assert all(len(set(batch[:, 0])) == P for batch in people)  # P different people
        pairs = list(map(tuple, batches.reshape(-1, 2)))
        assert len(set(pairs)) == len(pairs)  # the same picture only as another copy
        again = {ids[index] for index, copy in pairs if copy}
        assert again <= {i for i in ids if (ids == i).sum() < K}  # people with fewer than K
    assert (epochs[0] != epochs[1]).any()
    assert (sampler.epoch_batches(0) == epochs[0]).all()
    # greedy, always the P people with the most groups left, is the best possible
    groups, steps = np.maximum(1, counts // K), 0
    while (groups > 0).sum() >= P:
        groups[np.argsort(-groups)[:P]] -= 1
        steps += 1
    assert steps == sampler.steps_per_epoch


def test_ranks_share_a_batch_and_a_resumed_run_goes_on():
    ids = np.repeat(np.arange(1, 8), 5)
    whole = list(PersonBatches(ids, 4, 2, 3, ALONE).steps(0, 9))
    two = [PersonBatches(ids, 4, 2, 3, Ranks(rank, 2, CPU)) for rank in range(2)]
    parts = [list(batches.steps(0, 9)) for batches in two]
    assert [a + b for a, b in zip(*parts)] == whole
    assert list(PersonBatches(ids, 4, 2, 3, ALONE).steps(5, 9)) == whole[5:]
    with pytest.raises(UserError, match="people=4 does not split over 3 ranks"):
        PersonBatches(ids, 4, 2, 0, Ranks(0, 3, CPU))
    with pytest.raises(UserError, match="the training set has 7"):
        PersonBatches(ids, 8, 2, 0, ALONE)


def test_training_pictures_are_a_function_of_seed_epoch_index_copy(data):
    train, _, _, _ = read_data(data)
    dataset = reid.AugmentedPictures(train, (32, 16), pad=2, erase=0.5, seed=0)
    items = [(epoch, index, copy) for epoch in (0, 1) for index in (0, 5) for copy in (0, 1)]
    images = [dataset[item]["image"] for item in items]
    assert all(image.shape == (3, 32, 16) and image.dtype == torch.uint8 for image in images)
    for item, image in zip(reversed(items), reversed(images)):
        assert (dataset[item]["image"] == image).all()
    assert len({image.numpy().tobytes() for image in images}) == len(items)
    still = reid.AugmentedPictures(train, (32, 16), pad=0, erase=0, seed=0)
    seen = {still[(epoch, 3, 0)]["image"].numpy().tobytes() for epoch in range(8)}
    assert len(seen) == 2  # straight and mirrored


def test_erasing_covers_a_rectangle_with_noise_of_the_pictures_spread():
    share, values = [], []
    for seed in range(200):
        torch.manual_seed(seed)
        reid.seed_all(seed)
        pixels = torch.zeros(3, 64, 32, dtype=torch.uint8)
        reid.erase_pixels(pixels)
        changed = (pixels > 0).any(0)
        ys, xs = changed.nonzero().T
        rectangle = changed[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
        assert rectangle.float().mean() > 0.97  # there is one
        share.append(changed.float().mean())
        values.append(pixels[:, changed].float().flatten())
    assert 0.015 < min(share) < 0.06 and 0.25 < max(share) < 0.35  # [2 %, 1/3]
    assert abs(torch.cat(values).mean() - 114.5) < 3  # 255 × ImageNet's mean


# ------------------------------------------------------------------------------------------ readers


def test_market_reader(data):
    train, query, gallery, about = read_data(data)
    assert (len(train.ids), len(query.ids), len(gallery.ids)) == (33, 7, 17)
    assert gallery.ids.min() == -1 and (gallery.ids == 0).sum() == 1
    assert query.ids.tolist() == [NOBODY, 101, 102, 103, 104, 105, 999]
    assert sorted(set(gallery.cameras.tolist())) == [1, 2, 3]
    assert "33 training pictures of 9 people" in about and "1 distractors, 1 junk" in about
    assert train.folder == str(data / "bounding_box_train")


def test_other_folders_in_market_naming(tmp_path):
    rng = np.random.default_rng(0)
    folders = {"a": ["0001_c2_f0046182.jpg", "7_c11.png", "0000_c1s1_1.jpg"], "q": ["1_c1.jpg"]}
    for folder, names in folders.items():
        for name in names:
            paint(tmp_path / folder / name, 1, 1, rng)
    train, query, gallery, about = read_data(tmp_path, "auto", "a", "q", "a")
    assert (train.ids.tolist(), train.cameras.tolist()) == ([1, 7], [2, 11])
    assert gallery.ids.tolist() == [0, 1, 7] and query.ids.tolist() == [1]
    assert "1 distractors and junk left out" in about
    assert read_data(tmp_path, "auto", None, "q", "a")[0] is None


def test_msmt17_in_market_naming_counts_people_from_0(tmp_path, data):
    """Its first test person is 0000. Market-1501's queries have no 0: a distractor."""
    rng = np.random.default_rng(0)
    names = {
        "bounding_box_train": ["0000_c1_0.jpg", "0000_c2_0.jpg", "0001_c1_0.jpg"],
        "query": ["0000_c1_0.jpg", "0001_c1_0.jpg", "-1_c1_0.jpg"],
        "bounding_box_test": ["0000_c2_0.jpg", "0001_c3_0.jpg", "-1_c2_0.jpg"],
    }
    for folder, files in names.items():
        for name in files:
            paint(tmp_path / folder / name, 1, 1, rng)
    train, query, gallery, about = read_data(tmp_path)
    assert train.ids.tolist() == [1, 1, 2] and gallery.ids.tolist() == [-1, 1, 2]
    assert query.ids.tolist() == [NOBODY, 1, 2]
    assert "0 distractors, 1 junk)" in about and "numbered from 0 in the files" in about
    assert "left out" not in about and "3 training pictures of 2 people" in about
    only_test = read_data(tmp_path, train=None)
    assert only_test[0] is None and only_test[2].ids.tolist() == [-1, 1, 2]
    same = np.zeros((3, 3)) + (query.ids[:, None] != gallery.ids)
    all_found = ranking_metrics(same, *query[2:], *gallery[2:])
    assert (all_found["mAP"], all_found["unmatched"]) == (1.0, 1)
    assert "numbered from 0" not in read_data(data)[3]


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


def test_msmt17_reader(tmp_path):
    rng = np.random.default_rng(0)
    first, second = (
        "0000/0000_000_01_0303morning_0015_0.jpg",
        "0001/0001_003_14_0303noon_0015_1.jpg",
    )
    lists = {
        "train": [f"{first} 0", "", f"{second} 1"],
        "val": ["0001/0001_004_02_0303morning_0015_0.jpg 1"],
        "query": ["0000/0000_000_05_0303morning_0015_0.jpg 0"],
        "gallery": [
            "0000/0000_001_06_0303morning_0015_0.jpg 0",
            "0002/0002_001_15_0303evening_0015_0.jpg 2",
        ],
    }
    for part, lines in lists.items():
        (tmp_path / f"list_{part}.txt").write_text("\n".join(lines) + "\n")
        folder = tmp_path / ("train" if part in ("train", "val") else "test")
        for line in filter(None, lines):
            paint(folder / line.split()[0], 1, 1, rng)
    train, query, gallery, _ = read_data(tmp_path)
    # numbered from 1: 0 is a distractor
    assert (train.ids.tolist(), train.cameras.tolist()) == ([1, 2, 2], [1, 14, 2])
    assert (query.ids.tolist(), query.cameras.tolist()) == ([1], [5])
    assert (gallery.ids.tolist(), gallery.cameras.tolist()) == ([1, 3], [6, 15])
    for line in ("0001/nonsense.jpg 1", f"{first} -1", f"{first} {'9' * 5000}", first):
        (tmp_path / "list_val.txt").write_text(f"\n{line}\n")
        with pytest.raises(UserError, match=r"list_val.txt line 2 .*must be like"):
            read_data(tmp_path)
    (tmp_path / "list_val.txt").write_text("0001/0001_009_02_0303morning_0015_0.jpg 1\n")
    with pytest.raises(UserError, match="0001_009_02_0303morning_0015_0.jpg is missing"):
        read_data(tmp_path)
    (tmp_path / "list_val.txt").write_text("\n")
    # also where nobody looks for person 0
    (tmp_path / "list_query.txt").write_text("0002/0002_000_05_0303morning_0015_0.jpg 2\n")
    paint(tmp_path / "test/0002/0002_000_05_0303morning_0015_0.jpg", 1, 1, rng)
    train, query, _, _ = read_data(tmp_path)
    assert (train.ids.tolist(), query.ids.tolist()) == ([1, 2], [3])
    (tmp_path / "list_query.txt").write_text("\n")
    with pytest.raises(UserError, match="list_query.txt lists no pictures"):
        read_data(tmp_path)


# -------------------------------------------------------------------------------------------- stage


def test_run_folder(plain, capsys):
    names = {"config.yaml", "last.pt", "encoder.safetensors", "model.safetensors"}
    names |= {"log.jsonl", "metrics.json", "ranked_lists.png", "curves.png", "run.json", "done"}
    assert {path.name for path in plain.iterdir()} == names
    log, metrics = rows(plain), json.loads((plain / "metrics.json").read_text())
    steps = [row for row in log if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1)) and len(steps) % 3 == 0
    assert abs(steps[0]["loss"] - (steps[0]["identity"] + steps[0]["triplet"]) / 2) < 1e-4
    # a fresh classifier knows nothing of 9 people
    assert abs(steps[0]["identity"] - np.log(9)) < 0.05
    assert [row["epoch"] for row in log if "mAP" in row] == [2, 3]
    # the last epoch is the one reported
    assert log[-1]["mAP"] == pytest.approx(metrics["mAP"], rel=1e-5)
    assert (metrics["queries"], metrics["queries_without_match"], metrics["gallery"]) == (7, 2, 17)


def test_killed_and_resumed_is_bitwise_the_same(plain, data, tmp_path):
    out = tmp_path / "run"
    command = [f"data={data}", f"out={out}", *PLAIN]
    assert kill_after("finetune_reid.py", *command, lines=3, log=out / "log.jsonl")
    stage(*command)
    ours, theirs = (load_checkpoint(folder / "last.pt") for folder in (out, plain))
    assert all(torch.equal(value, theirs["model"][name]) for name, value in ours["model"].items())
    assert rows(out) == rows(plain)


def test_a_kill_during_an_evaluation_loses_no_row(plain, data, tmp_path, monkeypatch):
    command = [f"data={data}", f"out={tmp_path / 'run'}", *PLAIN]

    def dies(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune_reid, "evaluate", dies)
        stage(*command)
    stage(*command)
    assert any("epoch" in row for row in rows(plain)) and rows(tmp_path / "run") == rows(plain)


def test_a_kill_before_the_end_doubles_no_row(plain, data, tmp_path):
    """Between the last line of the log and `done`."""
    shutil.copytree(plain, tmp_path / "run")
    (tmp_path / "run" / "done").unlink()
    (tmp_path / "run" / "config.yaml").write_text(
        (plain / "config.yaml").read_text().replace(str(plain), str(tmp_path / "run"))
    )
    stage(f"data={data}", f"out={tmp_path / 'run'}", *PLAIN)
    assert rows(tmp_path / "run") == rows(plain)


def test_three_ranks_train_the_same_and_count_each_picture_once(plain, three_ranks):
    out = three_ranks / "run"
    for ours, theirs in zip(rows(out), rows(plain), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-4)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics == pytest.approx(json.loads((plain / "metrics.json").read_text()))


def test_three_ranks_embed_each_picture_once(data, monkeypatch):
    """The three ranks' parts of an odd number of pictures, one after the other, are what one
    process makes.
    """
    words = [f"data={data}", *SMALL, "eval_batch=4"]
    cfg = finetune_reid.read_config(finetune_reid.KEYS, "", words)
    model, _ = finetune_reid.build_model(cfg, 9)
    _, query, gallery, _ = read_data(data)
    for part in (query, gallery):
        whole = finetune_reid.embed(cfg, model, part, ALONE)
        monkeypatch.setattr(common, "gather_rows", lambda rows, ranks: rows)
        three = [Ranks(rank, 3, CPU) for rank in range(3)]
        shares = [finetune_reid.embed(cfg, model, part, ranks) for ranks in three]
        monkeypatch.undo()
        assert len({len(share) for share in shares}) == 2  # uneven
        np.testing.assert_allclose(np.concatenate(shares), whole, atol=1e-5)


def test_rank_0_ranks_with_the_threads_of_all(data, monkeypatch):
    """The other ranks wait; NCCL's would give up in the middle of a large gallery."""
    _, query, gallery, _ = read_data(data)
    used, before = [], torch.get_num_threads()

    def note(what):
        def ranked(*arguments):
            used.append((what, torch.get_num_threads()))
            return {}

        return ranked

    monkeypatch.setattr(finetune_reid, "embed", lambda *arguments: None)
    monkeypatch.setattr(finetune_reid, "evaluate_features", note("plain"))
    monkeypatch.setattr(finetune_reid, "rank_chunks", note("again"))
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    cfg = finetune_reid.read_config(finetune_reid.KEYS, "", ["rerank=true"])
    torch.set_num_threads(2)
    try:
        for world in (1, 2, 8):
            finetune_reid.evaluate(cfg, None, query, gallery, Ranks(0, world, CPU))
        finetune_reid.evaluate(cfg, None, query, gallery, Ranks(1, 8, CPU))
        assert used == [(what, n) for n in (2, 4, 6) for what in ("plain", "again")]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_finished_runs_are_left_alone(plain, data, capsys):
    before = (plain / "last.pt").stat().st_mtime_ns
    stage(f"data={data}", f"out={plain}", *PLAIN)
    assert "finished already" in capsys.readouterr().out
    assert (plain / "last.pt").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="another config .*epochs 3 -> 4"):
        stage(f"data={data}", f"out={plain}", *SMALL, "epochs=4", "save_every=2", "eval_every=2")


@pytest.mark.parametrize(("token", "bnneck"), [("pose", "true"), ("both", "false")])
def test_overfits_and_finds_everybody(data, tmp_path, token, bnneck):
    """Queries and gallery are the training pictures: every person must be found again."""
    settings = [*SMALL, "query=bounding_box_train", "gallery=bounding_box_train", "erase=0"]
    settings += ["drop_path=0", "lr=2e-3", "epochs=20", f"token={token}", f"bnneck={bnneck}"]
    stage(f"data={data}", f"out={tmp_path}/run", *settings)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["mAP"] > 0.97
    assert metrics["queries_without_match"] == 1  # the person with one picture


def test_eval_only_and_predict(plain, data, tmp_path, capsys):
    weights = f"weights={plain}/model.safetensors"
    evaluated = ["eval_only=true", weights, f"data={data}", *MACHINE]
    stage(*evaluated, "train=nowhere", f"out={tmp_path}/eval")
    assert not (tmp_path / "eval" / "log.jsonl").exists()  # it has no steps
    want = json.loads((plain / "metrics.json").read_text())
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text()) == pytest.approx(want)
    stage(*evaluated, f"out={tmp_path}/again", "rerank=true")
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["mAP"] == pytest.approx(want["mAP"]) and 0 <= again["reranked_mAP"] <= 1

    stage(f"predict={data / 'query'}", weights, f"out={tmp_path}/mine", *MACHINE)
    assert "7 pictures x 192" in capsys.readouterr().out
    found = np.load(tmp_path / "mine" / "embeddings.npz")
    assert found["files"].tolist() == sorted(p.name for p in (data / "query").iterdir())
    np.testing.assert_allclose(np.linalg.norm(found["embeddings"], axis=1), 1, atol=1e-5)
    assert found["nearest"].shape == found["similarity"].shape == (7, 6)
    assert Image.open(tmp_path / "mine" / "nearest.png").width > 300

    one = sorted((data / "query").iterdir())[1]
    stage(f"predict={one}", weights, f"out={tmp_path}/one", *MACHINE, "size=small")
    said = capsys.readouterr()
    assert f"model {plain}/model.safetensors, which sets size=tiny (not small), " in said.err
    assert "(1 pictures x 192)" in said.out and "nearest.png" not in said.out
    alone = np.load(tmp_path / "one" / "embeddings.npz")
    np.testing.assert_allclose(alone["embeddings"], found["embeddings"][1:2], atol=1e-5)
    assert alone["files"].tolist() == [one.name] and alone["nearest"].shape == (1, 0)


def test_bad_input_is_one_line(data, tmp_path, plain):
    run = [*SMALL, f"out={tmp_path}/run"]
    (tmp_path / "empty").mkdir()
    paint(tmp_path / "names" / "my_friend.jpg", 1, 1, np.random.default_rng(0))
    bad_name = os.fsencode(tmp_path / "bytes" / "0001_c1s1_") + b"\xff.jpg"
    paint(tmp_path / "bytes" / "0001_c1s1_000001_00.jpg", 1, 1, np.random.default_rng(0))
    (tmp_path / "bytes" / "0001_c1s1_000001_00.jpg").rename(os.fsdecode(bad_name))
    model = f"weights={plain}/model.safetensors"
    broken = "0001_c1s1_000001_00.jpg is damaged or truncated"
    evaluated, less = [f"data={data}", "eval_only=true"], f"weights={tmp_path}/less.safetensors"
    matchless = "no query of .*query has a match by another camera in .*query"
    paint(tmp_path / "long" / f"{'9' * 20}_c1.jpg", 1, 1, np.random.default_rng(0))
    meta = encoder_meta(plain / "model.safetensors")
    del meta["token"]
    save_weights(tmp_path / "less.safetensors", torch.nn.Linear(1, 1), **meta)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "0001_c1s1_000001_00.jpg").write_bytes(b"\xff\xd8\xff")
    cases = [
        ([], "data= names no folder"),
        (["data=/nowhere"], "no folder /nowhere; check data="),
        ([f"data={tmp_path}"], "no folder .*bounding_box_train"),
        ([f"data={data}", f"query={tmp_path}/empty"], "empty holds no pictures"),
        ([f"data={data}", f"query={tmp_path}/names"], "my_friend.jpg: no person and camera in"),
        ([f"data={data}", f"query={tmp_path}/long"], "999_c1.jpg: no person and camera in"),
        ([f"data={data}", f"gallery={tmp_path}/broken"], broken),
        ([f"data={data}", f"query={tmp_path}/bytes"], "bytes/0001_c1s1_.*: this name is not UTF-8"),
        ([f"data={data}", f"gallery={data}/query"], matchless),
        ([*evaluated, less], "less.safetensors as a model of finetune_reid.py: .*in its token"),
        ([f"predict={tmp_path}/broken", model], broken),
        ([f"predict={tmp_path}/bytes", model], "bytes/0001_c1s1_.*: this name is not UTF-8"),
        ([f"data={data}", "people=10"], "people=10 different people; the training set has 9"),
        ([f"data={data}", "token=cls", "tokn=cls"], "nearest valid key: token"),
        (evaluated, "need each other"),
        ([*evaluated, f"weights={plain}/encoder.safetensors"], "no model.safetensors of finetune"),
        ([*evaluated, "weights=/nowhere.safetensors"], "nowhere.safetensors"),
        ([f"predict={tmp_path}/empty", model], "empty holds no pictures"),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            stage(*run, *arguments)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()  # nothing half-written
    done = run_script("finetune_reid.py", *run, f"data={data}", f"query={tmp_path}/names")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr


def test_a_loss_that_is_not_finite_stops_and_names_pictures(data, tmp_path):
    message = r"non-finite .* at step \d+ .*_c\ds1_.*lower the learning rate"
    with pytest.raises(UserError, match=message):
        stage(f"data={data}", f"out={tmp_path}/run", *SMALL, "lr=1e30", "epochs=9", "save_every=1")
    saved = load_checkpoint(tmp_path / "run" / "last.pt")
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_layers_for_layer_decay():
    names = {"encoder.pos_embed": 0, "encoder.cls_token": 0, "encoder.patch_embed.proj.bias": 0}
    names |= {"encoder.blocks.0.norm1.weight": 1, "encoder.blocks.11.mlp.fc1.bias": 12}
    names |= {"encoder.norm.bias": 13, "classifier.weight": 13}
    assert {name: layer_of(name, 12) for name in names} == names


@pytest.mark.parametrize("name", ["market", "msmt17", "market_small", "demo"])
def test_configs_are_read(name, monkeypatch):
    file = ROOT / f"configs/finetune_reid_{name}.yaml"
    cfg = finetune_reid.read_config(finetune_reid.KEYS, "", ["--cfg", str(file)])
    assert cfg.out.startswith("runs/")
    if name in ("market", "msmt17"):  # [MALE]
        assert (cfg.lr, cfg.layer_decay, cfg.epochs) == (8e-3, 0.4, 100)
        assert cfg.people * cfg.pictures_per_person == 64


def test_real_market_pictures(data_root, tmp_path):
    """One epoch of a very small encoder finds real people better than its untrained weights, whose
    mAP is .024.
    """
    settings = "size=tiny height=64 width=32 patch=16 people=12 pictures_per_person=4 epochs=1"
    settings += " warmup_epochs=0.2 lr=5e-4 layer_decay=0.75 clip_grad=1 bnneck=true pad=2"
    stage(f"data={data_root}/market1501", f"out={tmp_path}/run", *settings.split(), *MACHINE)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["queries"], metrics["gallery"]) == (660, 1942)
    assert metrics["mAP"] > 0.034
    steps = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert np.mean(steps[-3:]) < np.mean(steps[:3]) - 0.2
