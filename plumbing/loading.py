"""How samples reach a step: which ones a step sees, and the loader that reads them.

They are drawn from (seed, epoch) alone: a resumed run goes on with the same ones, and the ranks'
shares together are the batch of one process. data.py and the ReID task have samplers of their own
kind.
"""

import contextlib
import os

from torch.utils.data import DataLoader, Sampler

from plumbing.errors import UserError
from plumbing.process import end_with_main
from plumbing.seeds import ORDER, rank_rows, rng_of


def training_loader(dataset, batches, workers, device, **more):
    """DataLoader over a StepSampler's batches; memory is pinned for CUDA.

    If the model trains on the CPU too, the loaders give way to the step on Linux: its threads wait
    for one another, so a loader that takes the place of one of them stops them all.
    """
    begin = give_way if device.type == "cpu" and hasattr(os, "SCHED_BATCH") else end_with_main
    pin = device.type == "cuda"
    more |= dict(num_workers=workers, pin_memory=pin, worker_init_fn=begin)
    return DataLoader(dataset, batch_sampler=batches, **more)


def give_way(worker):
    """The smallest share of a busy core, and never in the place of a thread that is running."""
    end_with_main(worker)
    os.nice(19)
    with contextlib.suppress(OSError):  # refused in some sandboxes; only time is lost
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


class StepSampler(Sampler):
    """Step of the whole run → this rank's samples, each (epoch, index) and what else names it.

    A subclass sets size (samples of all ranks in a step), steps_per_epoch, seed and ranks, and
    gives epoch_batches(epoch), a pure function of (seed, epoch): whole numbers (S, units, …, n), n
    of them for each sample. Ranks take whole units of a batch.
    """

    first, last = 0, None

    def steps(self, first, last):
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
            own = rank_rows(batches[place], self.ranks)
            yield [(epoch, *sample) for sample in own.reshape(-1, own.shape[-1]).tolist()]


class EpochBatches(StepSampler):
    """Batches of plain fine-tuning: `batch` of n samples, all ranks together.

    An epoch is a permutation, a function of (seed, epoch); its last incomplete batch is dropped.
    Raises UserError where ranks cannot share a batch evenly, and when an epoch holds no full batch.
    """

    def __init__(self, n, batch, seed, ranks):
        if batch % ranks.world:
            what = f"batch={batch} does not split over {ranks.world} ranks"
            raise UserError(f"{what}; make it a multiple of {ranks.world}")
        if n < batch:
            raise UserError(f"batch={batch} is larger than the {n} training samples; lower it")
        self.n, self.size, self.seed, self.ranks = n, batch, seed, ranks
        self.steps_per_epoch = n // batch

    def epoch_batches(self, epoch):
        order = rng_of(ORDER, self.seed, epoch).permutation(self.n)
        return order[: self.steps_per_epoch * self.size].reshape(self.steps_per_epoch, self.size, 1)
