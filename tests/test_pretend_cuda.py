"""The pretended CUDA device itself: it sees every kind of wait, and only waits."""

import pytest
import torch
from pretend_cuda import PretendCuda

import common

HOST = torch.ones(3)
WAITS = {
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool(x.isfinite().all()),
    "if": lambda x: 1 if x[0] else 0,
    "int": lambda x: range(x[0].long()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "assignment by mask": lambda x: x.__setitem__(x > 0, x[:2]),
    "list": lambda x: x[[0, 1]],
    "index on the CPU": lambda x: x[torch.tensor([0, 1])],
    "index of one element": lambda x: x[torch.zeros((), dtype=torch.long, device="cuda")],
    "equal": lambda x: torch.equal(x, x),
    "new_tensor": lambda x: x.new_tensor([1.0, 2.0]),
    "tensor": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "copy_": lambda x: x.copy_(HOST),
    "blocking": lambda x: HOST.to(x.device),
    "not pinned": lambda x: HOST.to(x.device, non_blocking=True),
    "unique": lambda x: x.unique(),
    "synchronize": lambda x: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("name", WAITS)
def test_every_kind_of_wait_is_seen(name):
    with PretendCuda() as cuda:
        x = torch.zeros(3, device="cuda")
        cuda.watching = True
        try:
            WAITS[name](x)
        except RuntimeError:  # no value, so no shape that depends on values
            assert name in ("nonzero", "mask", "unique", "assignment by mask", "equal")
    assert len(cuda.waits) >= 1


def test_what_does_not_wait_is_not_counted():
    with PretendCuda() as cuda:
        x = torch.zeros(3, device="cuda")
        cuda.watching = True
        x.masked_fill_(x > 0, 1.0)[torch.arange(2, device="cuda")].to("cpu", non_blocking=True)
        HOST.pin_memory().to(x.device, non_blocking=True)
        x.clamp(0, float(HOST[0]))
    assert not cuda.waits


def test_autocast_computes_in_bf16():
    with PretendCuda():
        x = torch.zeros(8, 8, device="cuda")
        for precision, dtype in (("auto", torch.bfloat16), ("fp32", torch.float32)):
            with common.autocast(x.device, precision):
                assert (x @ x).dtype == dtype
