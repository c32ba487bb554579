"""Batches that hold whole poses: slots, shares, ranks; loaders that give way to the step."""

import os

import numpy as np
import pytest
import torch
from coco_sets import ALONE, write_set

from common import Ranks
from data import PoseBatches, PretrainPictures
from formats.coco import read_people
from plumbing.errors import UserError
from plumbing.loading import training_loader


def two_sets(tmp_path):
    generated, _ = read_people(write_set(tmp_path / "a", n_poses=10, per_pose=4))
    real, _ = read_people(write_set(tmp_path / "b", n_poses=20, per_pose=1, pose_ids=False))
    return PretrainPictures([generated, real], (64, 32), 0)


def test_slots_hold_whole_poses_and_each_picture_once(tmp_path):
    dataset = two_sets(tmp_path)
    slots = PoseBatches(dataset, 8, 4, [], 0, ALONE).epoch_slots(0)
    assert slots.shape == (15, 4) and sorted(slots.ravel()) == list(range(60))
    ids = dataset.pose_id[slots]
    assert all(len(set(row)) == 1 for row in ids)
    assert not np.array_equal(slots, PoseBatches(dataset, 8, 4, [], 0, ALONE).epoch_slots(1))
    assert np.array_equal(slots, PoseBatches(dataset, 8, 4, [], 0, ALONE).epoch_slots(0))


def test_pictures_of_a_pose_are_sampled_without_replacement(tmp_path):
    dataset = two_sets(tmp_path)
    seen = set()
    for epoch in range(30):
        for row in PoseBatches(dataset, 4, 2, [], 0, ALONE).epoch_slots(epoch):
            if dataset.pose_id[row[0]] == 0:
                assert row[0] != row[1]
                seen |= set(row.tolist())
    assert seen == {0, 1, 2, 3}


def test_shares_are_kept_in_an_epoch_and_evenly_spread(tmp_path):
    dataset = two_sets(tmp_path)
    slots = PoseBatches(dataset, 4, 1, [1, 3], 0, ALONE).epoch_slots(
        0
    )  # P = 1: 60 slots, a quarter from the first file
    first = slots[:, 0] < 40
    assert first.sum() == 15 and 6 <= first[:30].sum() <= 9
    with pytest.raises(UserError, match="one number"):
        PoseBatches(dataset, 4, 1, [1], 0, ALONE)


def test_a_share_of_a_file_that_fills_no_slot_is_refused(tmp_path):
    generated, _ = read_people(write_set(tmp_path / "a", n_poses=4, per_pose=2))
    lonely, _ = read_people(write_set(tmp_path / "b", n_poses=1, per_pose=1, pose_ids=False))
    dataset = PretrainPictures([generated, lonely], (64, 32), 0)
    assert len(PoseBatches(dataset, 2, 2, [], 0, ALONE).epoch_slots(0)) == 4
    assert len(PoseBatches(dataset, 2, 2, [1, 0], 0, ALONE).epoch_slots(0)) == 4
    with pytest.raises(
        UserError, match=r"2 slots of an epoch from .*images, whose 1 pictures fill 0"
    ):
        PoseBatches(dataset, 2, 2, [1, 1], 0, ALONE)
    short, _ = read_people(write_set(tmp_path / "c", n_poses=3, per_pose=1))
    with pytest.raises(
        UserError, match="no pose in .* has pictures_per_pose=2 pictures, the most have 1"
    ):
        PoseBatches(PretrainPictures([generated, short], (64, 32), 0), 2, 2, [], 0, ALONE)


def test_large_groups_fill_several_slots_and_short_ones_are_left_out(tmp_path):
    people, _ = read_people(write_set(tmp_path, n_poses=1, per_pose=30))
    people = people._replace(pose_id=np.repeat([0, 1, 2, 3], [13, 9, 7, 1]))
    dataset = PretrainPictures([people], (64, 32), 0)
    batches = PoseBatches(dataset, 8, 4, [], 0, ALONE)
    seen = set()
    for epoch in range(20):
        slots = batches.epoch_slots(epoch)
        ids = dataset.pose_id[slots]
        assert (ids == ids[:, :1]).all() and len(np.unique(slots)) == slots.size
        assert np.array_equal(np.bincount(ids[:, 0]), [3, 2, 1])  # ⌊13/4⌋, ⌊9/4⌋, ⌊7/4⌋
        seen |= set(slots.ravel().tolist())
    assert seen == set(range(29)) and batches.short == 1


def test_a_file_that_goes_round_again_never_puts_a_picture_twice_into_a_batch(tmp_path):
    """The second file has 12 slots and is asked for 80; a batch of 20 takes 10 or 11 of them."""
    generated, _ = read_people(write_set(tmp_path / "a", n_poses=74, per_pose=2))
    small, _ = read_people(write_set(tmp_path / "b", n_poses=12, per_pose=3))
    real, _ = read_people(write_set(tmp_path / "c", n_poses=74, per_pose=2, pose_ids=False))
    dataset = PretrainPictures([generated, small, real], (64, 32), 0)
    batches = PoseBatches(dataset, 40, 2, [1, 2, 1], 0, ALONE)
    assert batches.counts.tolist() == [40, 80, 40]
    for epoch in range(5):
        for batch in batches.epoch_batches(epoch):
            assert len(np.unique(batch)) == batch.size
    with pytest.raises(UserError, match="would stand twice in a batch"):
        PoseBatches(dataset, 40, 2, [1, 4, 1], 0, ALONE)


def test_a_small_file_between_large_ones_never_puts_a_picture_twice_into_a_batch(tmp_path):
    """Four files of uneven numbers can leave more room for one of them than a batch of its own."""
    people, _ = read_people(write_set(tmp_path, n_poses=8, per_pose=1, pose_ids=False))
    sizes = (8, 2000, 2000, 2000)
    files = [people.take(np.arange(size) % 8) for size in sizes]
    dataset = PretrainPictures(files, (64, 32), 0)
    with pytest.raises(UserError, match="asks for 4506 slots .* would stand twice in a batch"):
        PoseBatches(dataset, 9, 1, [9, 1, 1, 1], 0, ALONE)
    batches = PoseBatches(dataset, 8, 1, [9, 1, 1, 1], 0, ALONE)
    for epoch in range(30):
        for batch in batches.epoch_batches(epoch):
            assert len(np.unique(batch)) == batch.size


@pytest.mark.parametrize("per_slot", [1, 4])
def test_batches_know_whether_they_hold_poses(tmp_path, per_slot):
    dataset = two_sets(tmp_path)
    posed = [
        PoseBatches(dataset, 4, per_slot, shares, 0, ALONE).posed
        for shares in ([], [1, 1], [1, 0], [0, 1], [1, 10**6])
    ]
    assert posed == [True, True, True, False, False]


def test_ranks_share_out_each_batch(tmp_path):
    dataset = two_sets(tmp_path)
    whole = list(PoseBatches(dataset, 16, 4, [], 0, ALONE).steps(0, 7))
    parts = [
        list(PoseBatches(dataset, 16, 4, [], 0, Ranks(r, 2, None)).steps(0, 7)) for r in range(2)
    ]
    assert [a + b for a, b in zip(*parts)] == whole
    resumed = list(PoseBatches(dataset, 16, 4, [], 0, ALONE).steps(4, 7))
    assert resumed == whole[4:]
    with pytest.raises(UserError, match="multiples of 12"):
        PoseBatches(dataset, 16, 4, [], 0, Ranks(0, 3, None))
    with pytest.raises(UserError, match="larger than"):
        PoseBatches(dataset, 400, 4, [], 0, ALONE)


class Priority(torch.utils.data.Dataset):
    def __getitem__(self, _):
        return os.nice(0)


def test_loaders_give_way_to_a_step_on_the_cpu_only():
    own = os.nice(0)
    for device, nice in (("cpu", 19 if hasattr(os, "SCHED_BATCH") else own), ("cuda", own)):
        loader = training_loader(Priority(), [[0, 1]], 1, torch.device(device))
        loader.pin_memory = False  # no GPU is needed to ask
        assert [v.tolist() for v in loader] == [[nice] * 2]
    assert os.nice(0) == own
