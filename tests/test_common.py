"""Random numbers: every purpose and every key has a stream of its own."""

import itertools
import random

import numpy as np
import torch

import common


def test_seeds_of_different_keys_differ():
    """Purposes never share numbers, zeros at the end count, and keys above 2³² are not cut."""
    purposes = (common.MASK, common.SAMPLE, common.DROP_PATH, common.NEGATIVE)
    keys = [(p, *key) for p in purposes for n in range(4) for key in itertools.product((0, 1, 2), repeat=n)]
    keys += [(common.PICTURE, 5 + (7 << 32)), (common.PICTURE, 5, 7), (common.PICTURE, 5)]
    assert len({common.seed_of(*key) for key in keys}) == len(keys)
    assert common.seed_of(common.MASK, 3, 1) == common.seed_of(common.MASK, np.int64(3), 1)


def test_seed_all_seeds_python_numpy_and_torch():
    def draw():
        return random.random(), np.random.random(), torch.rand(()).item()

    common.seed_all(common.SAMPLE, 0, 1)
    first, other = draw(), draw()
    common.seed_all(common.SAMPLE, 0, 1)
    assert draw() == first != other
