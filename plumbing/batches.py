"""Which samples a step sees: batch samplers of pre-training (whole pose groups), plain fine-tuning and person ReID.

They are drawn from (seed, epoch) alone: a resumed run goes on with the same ones, and the ranks' shares together are
the batch of one process. And the loader that reads them for a step.

Legend: S batches in an epoch · P pictures of a pose (PoseBatches) · P people × K pictures of each (PersonBatches).
"""

import contextlib
import os

import numpy as np
from torch.utils.data import DataLoader, Sampler

from common import ORDER, rank_rows, rng_of
from plumbing.config import UserError


def training_loader(dataset, batches, workers, device, **more):
    """DataLoader over a WholeRun's batches; memory is pinned for CUDA.

    If the model trains on the CPU too, the loaders give way to the step on Linux: its threads wait for one another, so
    a loader that takes the place of one of them stops them all.
    """
    begin = give_way if device.type == "cpu" and hasattr(os, "SCHED_BATCH") else None
    pin = device.type == "cuda"
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, pin_memory=pin, worker_init_fn=begin, **more)


def give_way(worker):
    """The smallest share of a busy core, and never in the place of a thread that is running."""
    os.nice(19)
    with contextlib.suppress(OSError):  # refused in some sandboxes; only time is lost
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


class WholeRun(Sampler):
    """Batch sampler: step of the whole run → this rank's samples, each (epoch, index) and what else names it.

    A subclass sets steps_per_epoch, seed, rank and world and gives epoch_batches(epoch), a pure function of
    (seed, epoch): whole numbers (S, units, …, n), n of them for each sample. Ranks take whole units of a batch.
    """

    first, last = 0, None

    def run(self, first, last):
        """Iterate the steps first .. last-1 of the whole run."""
        self.first, self.last = first, last
        return self

    def __len__(self):
        return self.last - self.first

    def __iter__(self):
        cached, batches = None, None
        for step in range(self.first, self.last):
            epoch, place = divmod(step, self.steps_per_epoch)
            if epoch != cached:
                cached, batches = epoch, self.epoch_batches(epoch)
            own = rank_rows(batches[place], self.rank, self.world)
            yield [(epoch, *sample) for sample in own.reshape(-1, own.shape[-1]).tolist()]


# ----------------------------------------------------------------------------------------------------- pre-training


class PoseBatches(WholeRun):
    """Batch sampler: step → this rank's (epoch, index) pairs; a global batch is `slots` slots of P pictures each.

    A slot holds P pictures of one pose, sampled without replacement, or P pictures without pose group. A
    pose with n pictures fills n // P slots of an epoch; poses with fewer than P are left out. With P = 1
    poses are not grouped: every picture is a slot. Ranks take whole slots.
    An epoch takes every slot once, or of each file its share: round(share · slots), spread evenly. A file
    with fewer slots than its share goes round again in the same order, so that no picture meets itself in
    a batch. The order is a function of (seed, epoch); the last incomplete batch of an epoch is dropped.

    short: pictures left out because their pose has fewer than P. posed: whether an epoch draws any picture
    with a pose group (with gamma_mp, it must).

    Raises UserError where no pose of a file has P pictures, for a share that fills no slot or would put a
    picture twice into a batch, and when an epoch holds no full batch.
    """

    def __init__(self, dataset, batch, pictures_per_pose, shares, seed, rank=0, world=1):
        self.seed, self.rank, self.world, self.P = seed, rank, world, pictures_per_pose
        self.slots = batch // pictures_per_pose
        if batch % (pictures_per_pose * world):
            raise UserError(
                f"batch={batch} does not split into poses of pictures_per_pose={pictures_per_pose} on {world} rank(s); "
                f"make it a multiple of {pictures_per_pose * world}"
            )
        self.groups, self.singles, self.short = [], [], 0
        for people, start in zip(dataset.people, dataset.starts):
            grouped = people.pose_id >= 0 if self.P > 1 else np.zeros(len(people.files), bool)
            self.groups.append(self._whole_groups(people, np.flatnonzero(grouped), start))
            self.singles.append(np.flatnonzero(~grouped) + start)
            self.short += int(grouped.sum()) - len(self.groups[-1][1])
        offered = np.array([len(self.file_slots(0, f)) for f in range(len(self.groups))])
        counts, total = offered, int(offered.sum())
        if shares:
            if len(shares) != len(counts) or min(shares) < 0 or sum(shares) <= 0:
                raise UserError(f"shares={shares} must be one number ≥ 0 per annotation file ({len(counts)})")
            ends = np.round(np.cumsum(shares) / np.sum(shares) * total).astype(int)
            counts = np.diff(ends, prepend=0)
        at_most = np.minimum(np.ceil(counts * self.slots / max(total, 1)) + 1, self.slots)  # in a batch
        for f in np.flatnonzero(np.minimum(counts, at_most) > offered):
            raise UserError(
                f"shares={shares} asks for {counts[f]} slots of an epoch from {dataset.people[f].folder}, whose "
                f"{len(dataset.people[f].files)} pictures fill {offered[f]} (pictures_per_pose={self.P}): a picture "
                "would stand twice in a batch; lower its share or the batch"
            )
        drawn = [np.append(g[1], s) for n, g, s in zip(counts, self.groups, self.singles) if n]
        self.posed = any((dataset.pose_id[indices] >= 0).any() for indices in drawn)
        self.counts, self.steps_per_epoch = counts, total // self.slots
        if self.steps_per_epoch == 0:
            raise UserError(f"batch={batch} is larger than the {total * self.P} pictures an epoch holds; lower it")

    def _whole_groups(self, people, rows, start):
        """(pose_id, index) arrays sorted by pose, only poses with ≥ P pictures."""
        rows = rows[np.argsort(people.pose_id[rows], kind="stable")]
        ids, counts = np.unique(people.pose_id[rows], return_counts=True)
        if len(ids) and counts.max() < self.P:
            raise UserError(
                f"no pose in {people.folder} has pictures_per_pose={self.P} pictures, the most have {counts.max()}; "
                "lower pictures_per_pose"
            )
        rows = rows[np.isin(people.pose_id[rows], ids[counts >= self.P])]
        return people.pose_id[rows], rows + start

    def file_slots(self, epoch, f):
        """All slots of a file in this epoch's order: (slots, P) picture indices."""
        rng, (pose, index), singles = rng_of(ORDER, self.seed, epoch, f), self.groups[f], self.singles[f]
        order = np.lexsort((rng.random(len(index)), pose))  # shuffled within each pose
        _, starts, counts = np.unique(pose, return_index=True, return_counts=True)
        place = np.arange(len(pose)) - np.repeat(starts, counts)  # of a picture in its pose
        whole = place < np.repeat(counts // self.P * self.P, counts)
        grouped = index[order][whole].reshape(-1, self.P)
        loose = rng.permutation(singles)[: len(singles) // self.P * self.P].reshape(-1, self.P)
        return rng.permutation(np.concatenate([grouped, loose]))

    def epoch_slots(self, epoch):
        """(slots, P) picture indices of one epoch: a pure function of (seed, epoch)."""
        parts, places = [], []
        for f, n in enumerate(self.counts.tolist()):
            slots = self.file_slots(epoch, f)
            parts.append(slots[np.arange(n) % max(1, len(slots))])
            places.append((np.arange(n) + rng_of(ORDER, self.seed, epoch, f, 1).random()) / max(1, n))
        return np.concatenate(parts)[np.argsort(np.concatenate(places), kind="stable")]

    def epoch_batches(self, epoch):
        S, used = self.steps_per_epoch, self.steps_per_epoch * self.slots
        return self.epoch_slots(epoch)[:used].reshape(S, self.slots, self.P, 1)


# ------------------------------------------------------------------------------------------------------ fine-tuning


class EpochBatches(WholeRun):
    """Batch sampler of plain fine-tuning: step → this rank's (epoch, index) pairs of `n` samples; `batch` is global.

    An epoch is a permutation, a function of (seed, epoch); its last incomplete batch is dropped.
    Raises UserError where ranks cannot share a batch evenly, and when an epoch holds no full batch.
    """

    def __init__(self, n, batch, seed, rank=0, world=1):
        if batch % world:
            raise UserError(f"batch={batch} does not split over {world} ranks; make it a multiple of {world}")
        if n < batch:
            raise UserError(f"batch={batch} is larger than the {n} training samples; lower it")
        self.n, self.batch, self.seed, self.rank, self.world = n, batch, seed, rank, world
        self.steps_per_epoch = n // batch

    def epoch_batches(self, epoch):
        order = rng_of(ORDER, self.seed, epoch).permutation(self.n)
        return order[: self.steps_per_epoch * self.batch].reshape(self.steps_per_epoch, self.batch, 1)


class PersonBatches(WholeRun):
    """Batch sampler: step → this rank's (epoch, index, copy) triples; a batch is P different people × K pictures.

    ids (N,) of the pictures. In an epoch a person with n ≥ K pictures gives n // K groups of K different ones; one with
    fewer gives one group in which pictures come again (copy 1, 2, … of a picture: another augmentation). An epoch is
    the largest number of batches these groups fill; the few groups left over, random ones, wait for another epoch.
    The order is a function of (seed, epoch). Ranks take whole people.
    """

    def __init__(self, ids, people, pictures, seed, rank=0, world=1):
        self.P, self.K, self.seed, self.rank, self.world = people, pictures, seed, rank, world
        self.size = people * pictures
        names, counts = np.unique(ids, return_counts=True)
        if people % world:
            raise UserError(f"people={people} does not split over {world} ranks; make it a multiple of {world}")
        if len(names) < people:
            raise UserError(f"a batch needs people={people} different people; the training set has {len(names)}")
        self.members = np.split(np.argsort(ids, kind="stable"), np.cumsum(counts)[:-1])
        self.groups = np.maximum(1, counts // pictures)
        # S batches of P different people can be filled exactly if Σ_i min(groups_i, S) ≥ S · P.
        S = int(self.groups.sum()) // people
        while np.minimum(self.groups, S).sum() < S * people:
            S -= 1
        self.steps_per_epoch = S
        short = int((counts < pictures).sum())
        self.about = f"{short} people have fewer than {pictures} pictures and show them again"

    def epoch_batches(self, epoch):
        """(S, P, K, 2): index and copy of each picture."""
        rng, S = rng_of(ORDER, self.seed, epoch), self.steps_per_epoch
        slots = np.empty((S * self.P, self.K, 2), np.int64)
        t = 0
        for person in rng.permutation(len(self.members)):
            order = rng.permutation(self.members[person])
            n = min(self.groups[person], S, S * self.P - t)
            place = np.arange(n * self.K)
            slots[t : t + n] = np.stack([order[place % len(order)], place // len(order)], 1).reshape(n, self.K, 2)
            t += n
        # Slot t goes to batch t mod S: a person's slots are at most S in a row, so all in different batches.
        return slots.reshape(self.P, S, self.K, 2).transpose(1, 0, 2, 3)[rng.permutation(S)]
