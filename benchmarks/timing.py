"""What all tables need: candidates that take turns, ceilings, FLOP and bytes counted, rows printed."""

import json
import statistics
import time
import weakref

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


def measure(cfg, candidates, device):
    """{name: function} → {name: [seconds per call, one per round]}.

    The candidates take turns (A B A B …), so that whatever else the machine does slows all of them alike.
    cfg: rounds, seconds (a turn repeats its function for about so long), clock (wall, or cpu = this process's time).
    """
    clock = time.process_time if cfg.clock == "cpu" else time.perf_counter

    def turn(function, repeats):
        wait(device)
        start = clock()
        for _ in range(repeats):
            function()
        wait(device)
        return (clock() - start) / repeats

    repeats = {}
    for name, function in candidates.items():
        function()  # first calls allocate and compile
        repeats[name] = agreed(max(1, round(cfg.seconds / max(turn(function, 1), 1e-6))), device)
    seconds = {name: [] for name in candidates}
    for _ in range(cfg.rounds):
        for name, function in candidates.items():
            seconds[name].append(turn(function, repeats[name]))
    return seconds


def agreed(number, device):
    """The largest of all ranks' numbers: ranks that repeat a collective unequally often would wait for ever."""
    if not dist.is_initialized():
        return number
    number = torch.tensor(number, device=device)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median(seconds):
    return statistics.median(seconds)


def ratio(a, b):
    """Median over the rounds of a / b."""
    return statistics.median(x / y for x, y in zip(a, b))


def ceiling(device, precision):
    """→ (a large matrix product to be timed, its FLOP): the most that the machine's library reaches."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return lambda: a @ b, 2 * n**3


def flops(function):
    """FLOP of one call's matrix products, attention included, as executed (a recomputation counts)."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


class Products(TorchDispatchMode):
    """Keeps one call's matrix products with their operands; `again` computes them and nothing else."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in ("aten::mm", "aten::addmm", "aten::bmm"):
            # Views keep their layout: a transposed operand costs what it cost in the call.
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))

    @torch.no_grad()
    def again(self):
        for function, args, kwargs in self.calls:
            function(*args, **kwargs)


class PeakMemory(TorchDispatchMode):
    """Counts the bytes that tensors hold, and their peak, by watching every operation's output. Works on any device."""

    def __init__(self, *tensors):
        super().__init__()
        self.now = self.peak = 0
        self.alive = set()
        for tensor in tensors:
            self.take(tensor)

    def take(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.alive:
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
    """A table for people, then one JSON line per row for programs. Rows are dicts and may have different columns."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = [names] + [[cell(row.get(name, "")) for name in names] for row in rows]
    widths = [max(len(line[c]) for line in table) for c in range(len(names))]
    print(f"\n{title}")
    for line in table:
        print(line[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(line[1:], widths[1:])), sep="  ")
    for row in rows:
        print(json.dumps({"table": title.split(":")[0], **row}), flush=True)


def cell(value):
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
