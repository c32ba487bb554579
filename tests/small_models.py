"""A small encoder and pictures for it."""

import torch
import torch.nn as nn

from model import ViT

SIDE, P = (32, 16), 4  # a grid of 8 × 4
GRID, N, D = (8, 4), 32, 32


def encoder(depth=2, **options):
    torch.manual_seed(0)
    vit = ViT(D, depth, 4, SIDE, P, **options)
    for block in vit.blocks:  # away from the zero biases, which would hide mistakes
        nn.init.normal_(block.attn.qkv.bias, std=0.5)
    return vit


def pictures(B=6, seed=1):
    return torch.randn(B, 3, *SIDE, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
