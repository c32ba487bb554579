"""What all tables need: candidates that take turns, FLOP and bytes counted, rows printed."""

import json
import time
import weakref
from statistics import median

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import common


def measure(cfg, candidates, ranks):
    """{name: function} → {name: [seconds per call, one per round]}.

    The candidates take turns (A B A B …), so that whatever else the machine does slows all of them
    alike. cfg.rounds: turns of each; cfg.seconds: a turn repeats its function for about so long.
    """
    cuda = ranks.device.type == "cuda"

    def turn(function, repeats):
        if cuda:
            torch.cuda.synchronize(ranks.device)
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        if cuda:
            torch.cuda.synchronize(ranks.device)
        return (time.perf_counter() - start) / repeats

    repeats = {}
    for name, function in candidates.items():
        function()  # the first call allocates and compiles
        number = max(1, round(cfg.seconds / max(turn(function, 1), 1e-6)))
        # Ranks that repeated a collective unequally often would wait for one another for ever.
        repeats[name] = max(common.gather_objects([number]))
    seconds = {name: [] for name in candidates}
    for _ in range(cfg.rounds):
        for name, function in candidates.items():
            seconds[name].append(turn(function, repeats[name]))
    return seconds


def ratio(a, b):
    """Median over the rounds of a / b."""
    return median(x / y for x, y in zip(a, b))


def ceiling(device, precision):
    """→ (a large matrix product to be timed, its FLOP): the most that this machine reaches."""
    n = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return lambda: a @ b, 2 * n**3


def flops(function):
    """FLOP of one call's matrix products, as executed: attention and recomputation count."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


class PeakMemory(TorchDispatchMode):
    """Counts the bytes that tensors hold, and their peak. Works on any device.

    It watches the output of every operation. `tensors` are those that exist already.
    """

    def __init__(self, *tensors):
        super().__init__()
        self.now, self.peak, self.alive = 0, 0, set()
        for tensor in tensors:
            self.take(tensor)

    def take(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.alive:  # several tensors may share one storage
            self.alive.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())

    def free(self, key, size):
        self.alive.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                self.take(value)
        return out


def show(title, rows):
    """rows: {what was measured: its figures}. A line for people each, then a JSON line each.

    The title's text before ":" names the table.
    """
    print(f"\n{title}")
    for what, figures in rows.items():
        print(f"    {what}:", ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    for what, figures in rows.items():
        print(json.dumps({"table": title.split(":")[0], "what": what, **figures}), flush=True)
