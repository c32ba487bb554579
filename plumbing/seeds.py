"""Where every random number comes from: a key of whole numbers, the same on any number of ranks and
after any kill.

A sample is f(seed, epoch, index), a step f(seed, step).
"""

import random

import numpy as np
import torch

# What random numbers are for. A key begins with one of these: no two purposes share numbers.
WEIGHTS, ORDER, SAMPLE, FLIP, CROP, STEP, MASK, DROP_PATH, NEGATIVE = range(1, 10)
PROMPT, PICTURE, WORDING, BAD_BOX, POSE, PERSON, SCENE, CAMERA = range(11, 19)  # generate.py
VIEW, CHOICE, PRIOR = range(19, 22)  # baselines: crops, what a step draws, 3-D bodies


def seed_of(purpose, *key):
    """A 63-bit seed from a purpose and whole numbers below 2⁶⁴, e.g. (SAMPLE, seed, epoch, index).

    Equal keys, equal seeds; different keys give unrelated seeds.
    """
    words = []
    for k in (purpose, *map(int, key)):
        words += [k & 0xFFFFFFFF, k >> 32 & 0xFFFFFFFF]
    # SeedSequence takes [a] and [a, 0] for the same: the 1 at the end keeps them apart.
    return int(np.random.SeedSequence([*words, 1]).generate_state(1, np.uint64)[0] >> 1)


def rng_of(*key):
    """NumPy's generator for a key of seed_of."""
    return np.random.default_rng(seed_of(*key))


def seed_all(*key):
    """Seed Python's `random`, NumPy and torch (on the CPU) from a key of seed_of.

    What is random on a GPU takes a generator of its own. torch.manual_seed would also prepare seeds
    for every kind of device, which in a loader's worker took as long as decoding a picture.
    """
    seed = seed_of(*key)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


def rank_rows(world_rows, ranks):
    """This rank's rows of something made for the global batch, in rank order."""
    n = len(world_rows) // ranks.world
    return world_rows[ranks.rank * n : (ranks.rank + 1) * n]


def rank_noise(key, batch, columns, ranks):
    """This rank's rows of the global batch's (batch, columns) uniform numbers, f(key) alone.

    Drawn on the device, so that none waits for them: another kind of GPU draws other numbers.
    """
    generator = generator_of(key, ranks.device)
    return rank_rows(torch.rand(batch, columns, generator=generator, device=ranks.device), ranks)


def generator_of(key, device):
    return torch.Generator(device).manual_seed(seed_of(*key))
