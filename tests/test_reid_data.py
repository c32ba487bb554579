"""Batches of people, training pictures, and the readers of Market-1501 and MSMT17."""

import numpy as np
import pytest
import torch
from reid_runs import ALONE, CPU, paint

from common import Ranks, UserError
from finetune_reid import ranking_metrics
from formats.market import NOBODY, read_data
from tasks import reid
from tasks.reid import PersonBatches

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
    assert train.folder == str(data / "bounding_box_train") and "among the queries" not in about


def test_other_folders_in_market_naming(tmp_path):
    rng = np.random.default_rng(0)
    folders = {"a": ["0001_c2_f0046182.jpg", "7_c11.png", "0000_c1s1_1.jpg"], "q": ["1_c1.jpg"]}
    for folder, names in folders.items():
        for name in names:
            paint(tmp_path / folder / name, 1, 1, rng)
    train, query, gallery, about = read_data(tmp_path, "auto", "a", "q", "a")
    assert (train.ids.tolist(), train.cameras.tolist()) == ([1, 7], [2, 11])
    assert gallery.ids.tolist() == [0, 1, 7] and query.ids.tolist() == [1]
    assert "(1 left out: person 0, a distractor, or -1, junk)" in about
    assert "2 people, 1 of them among the queries too" in about
    assert read_data(tmp_path, "auto", None, "q", "a")[0] is None
    for name in ("1_c1.jpg", "1_c2.jpg", "-1_c1s1_1.jpg"):
        paint(tmp_path / "one" / name, 1, 1, rng)
    with pytest.raises(UserError, match="one shows one person: no query can find another one"):
        read_data(tmp_path, "auto", None, "q", "one")


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
    assert "among the queries" not in about
    assert "left out" not in about and "3 training pictures of 2 people" in about
    only_test = read_data(tmp_path, train=None)
    assert only_test[0] is None and only_test[2].ids.tolist() == [-1, 1, 2]
    same = np.zeros((3, 3)) + (query.ids[:, None] != gallery.ids)
    all_found = ranking_metrics(same, *query[2:], *gallery[2:])
    assert (all_found["mAP"], all_found["unmatched"]) == (1.0, 1)
    assert "numbered from 0" not in read_data(data)[3]


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
