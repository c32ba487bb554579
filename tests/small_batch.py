"""A global batch in float64 and what compares values and gradients."""

import torch
import torch.nn as nn

M, D, P = 12, 6, 2  # rows of the global batch, width, patch side
GRID = (2, 3)
POSES = {
    # no pose keeps all its pictures on one rank of 2 or 3; 5 occurs once; −1 has no pose group
    "mixed": [0, 1, 2, 3, 0, 1, 2, 3, 0, 5, -1, 1],
    "none": list(range(M)),  # no positive pair anywhere
    "lone_rank": [7, 7] + [-1] * (M - 2),  # ranks after the first have no anchor at all
}


def batch():
    """The global batch in float64, the same in every process."""
    g = torch.Generator().manual_seed(0)
    N, C = GRID[0] * GRID[1], P * P * 3
    return {
        "x": torch.randn(M, D, generator=g, dtype=torch.float64),
        "x2": torch.randn(M, D, generator=g, dtype=torch.float64),
        "images": torch.randn(M, 3, GRID[0] * P, GRID[1] * P, generator=g, dtype=torch.float64),
        "patches": torch.randn(M, N, C, generator=g, dtype=torch.float64),
        "maps": torch.randn(M, D, 2, 3, generator=g, dtype=torch.float64) * 3 + 2,
        # ragged on purpose: the number of masked patches differs between ranks
        "mask": torch.rand(M, N, generator=g) < torch.linspace(0.1, 0.9, M)[:, None],
        **{name: torch.tensor(ids) for name, ids in POSES.items()},
    }


def linear(inputs, outputs):
    torch.manual_seed(1)
    return nn.Linear(inputs, outputs).double()


def value_and_gradient(loss, *inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    value = loss(*inputs)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


def assert_same(a, b, tolerance=1e-10):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
