"""Random numbers: every purpose and every key has a stream of its own."""

import itertools
import random

import numpy as np
import torch

from plumbing import seeds


def test_seeds_of_different_keys_differ():
    """Purposes never share numbers, zeros at the end count, and keys above 2³² are not cut."""
    purposes = (seeds.MASK, seeds.SAMPLE, seeds.DROP_PATH, seeds.NEGATIVE)
    keys = [
        (p, *key)
        for p in purposes
        for n in range(4)
        for key in itertools.product((0, 1, 2), repeat=n)
    ]
    keys += [(seeds.PICTURE, 5 + (7 << 32)), (seeds.PICTURE, 5, 7), (seeds.PICTURE, 5)]
    assert len({seeds.seed_of(*key) for key in keys}) == len(keys)
    assert seeds.seed_of(seeds.MASK, 3, 1) == seeds.seed_of(seeds.MASK, np.int64(3), 1)


def test_each_purpose_has_a_number_of_its_own():
    numbers = [value for name, value in vars(seeds).items() if name.isupper()]
    assert len(numbers) == len(set(numbers)) > 15


def test_seed_all_seeds_python_numpy_and_torch():
    def draw():
        return random.random(), np.random.random(), torch.rand(()).item()

    seeds.seed_all(seeds.SAMPLE, 0, 1)
    first, other = draw(), draw()
    seeds.seed_all(seeds.SAMPLE, 0, 1)
    assert draw() == first != other
