"""What every stage repeats, once: ranks, schedule, run folder and checkpoint, log.

About in the order in which a stage script uses them, after it has read its config. Random numbers,
loaders and files of plumbing/ stand here too, by the same names. Nothing here knows the method.
"""

import plumbing.quiet  # noqa: F401  first: Ctrl-C while the libraries load

# isort: split
import atexit
import contextlib
import json
import math
import os
import re
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from plumbing import errors
from plumbing.errors import Stopped, UserError, and_more, run_stage
from plumbing.files import (
    is_part,
    load_checkpoint,
    load_weights,
    read_text,
    save_checkpoint,
    save_weights,
    write_atomic,
    write_csv,
    write_json,
    write_npz,
)
from plumbing.gradient_cache import backward_in_parts
from plumbing.loading import EpochBatches, training_loader
from plumbing.pictures import on_all_ranks as gather_objects
from plumbing.process import check_memory, check_restarts, end_with_parent, lock
from plumbing.runs import earlier_run, finish_run, look_into, record_end, record_start, same_data
from plumbing.seeds import (
    DROP_PATH,
    MASK,
    NEGATIVE,
    PICTURE,
    PROMPT,
    STEP,
    WEIGHTS,
    rank_noise,
    rng_of,
    seed_all,
    seed_of,
)

# -------------------------------------------------------------------------------- ranks and devices

# The longest that ranks wait for one another; NCCL's own limit is 10 minutes. Rank 0 alone ranks
# and re-ranks a large gallery, and the others wait. A rank that hangs is noticed this late.
RANKS_WAIT = timedelta(hours=1)


class Ranks(NamedTuple):
    """Which of how many processes this is, and where it computes."""

    rank: int
    world: int
    device: torch.device


def start_ranks(device="auto", precision="auto"):
    """Join torchrun's process group if there is one; NCCL on CUDA, gloo on the CPU. → Ranks

    On a GPU float32 is float32, in convolutions and LSTMs too: no TF32, which has 10 bits of
    mantissa and which torch allows in these two by default. For speed there is bf16 (see autocast).
    Raises UserError for a GPU that is not there, for precision=bf16 on a GPU without it, and for
    what torchrun may not set (RANK that is no number, --max-restarts).
    """
    with errors.reading("RANK and WORLD_SIZE", "what torchrun sets"):
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = start_gpu(int(os.environ.get("LOCAL_RANK", 0)), precision)
    device = torch.device(device)
    if world > 1 and not dist.is_initialized():
        check_restarts()
        # With its device given, NCCL connects the ranks now, not inside the first step.
        backend, own = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=RANKS_WAIT, device_id=own)
        # Whoever opens the group closes it, unless the caller of a stage's main has done so.
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
        end_with_parent()
    return Ranks(rank, world, device)


def start_gpu(local, precision):
    """This machine's GPU number `local`, float32 and precision= as start_ranks says."""
    if not torch.cuda.is_available():
        raise UserError("device=cuda but no CUDA device is visible; use device=cpu")
    n, device = torch.cuda.device_count(), torch.device("cuda", local)
    if local >= n:
        raise UserError(f"local rank {local} has no GPU: {n} visible; use --nproc_per_node={n}")
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    if precision == "bf16" and not has_bf16(device):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"precision=bf16, but {name} has no bf16 instructions; use fp32 or auto")
    return device


def has_bf16(device):
    """Does it multiply bf16 in hardware? NVIDIA: since Ampere (A100, RTX 30); not V100 and T4."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def autocast(device, precision):
    """fp32, bf16, or auto: bf16 where the device has it. No fp16: MAE's and BEiT's users met NaN.

    bf16 is autocast without a scaler: weights, losses and optimiser stay float32.
    """
    bf16 = precision == "bf16" or precision == "auto" and has_bf16(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def distributed(model, device):
    """`model`, or with several ranks a wrapper to call: gradients become the mean over ranks."""
    if not dist.is_initialized():
        return model
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def rank_share(n, ranks):
    """Which of n things this rank evaluates: consecutive ones, as gather_objects keeps order."""
    return np.array_split(np.arange(n), ranks.world)[ranks.rank]


# ----------------------------------------------------------------------------------------- schedule


def learning_rate(step, total, warmup, peak, floor=0.0):
    """Rate of `step` (0-based) of `total`: linear warm-up, never 0, then cosine to `floor`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return cosine_between(step - warmup, total - warmup, peak, floor)


def cosine_between(step, total, start, end):
    """From `start` at step 0 to `end` at step `total`, on half a cosine: rates, momenta, decay."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * (step / max(1, total))))


def stepwise_rate(step, warmup, peak, milestones):
    """The same warm-up, then a tenth at each milestone (step numbers)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.1 ** sum(step >= milestone for milestone in milestones)


def parameter_groups(model, weight_decay, layer_decay=1.0, depth=0):
    """AdamW groups: no weight decay on 1-D parameters, tokens and positions.

    lr_scale = layer_decay^(depth + 1 − layer); depth: of the encoder, where layer_decay is not 1.
    Frozen parameters are left out.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim <= 1 or name.rsplit(".", 1)[-1].endswith(("token", "pos_embed"))
        scale = layer_decay ** (depth + 1 - layer_of(name, depth)) if depth else 1.0
        group = groups.setdefault((plain, scale), {"params": [], "lr_scale": scale})
        group["weight_decay"] = 0.0 if plain else weight_decay
        group["params"].append(parameter)
    return list(groups.values())


def layer_of(name, depth):
    """Layer of a parameter [ViTPose, MAE]: embeddings 0, block i is i + 1, the rest depth + 1."""
    name = name.removeprefix("encoder.")  # blocks of a head or a decoder belong to the rest
    block = re.match(r"blocks\.(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    return 0 if re.match(r"(patch_embed|\w+_token|pos_embed)\b", name) else depth + 1


def set_learning_rate(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


# --------------------------------------------------------------------------------------- run folder


def open_run(cfg, keys, ranks):
    """Make or re-enter the run folder `cfg.out`, for this process alone.

    → "new", "resume" or "finished".
    Never overwrites: a folder with another config, with other things in it, or in use by another
    run is an error that says so. Only rank 0 writes; call it before anything else is written.
    """
    state = None
    if ranks.rank == 0:
        look_into(cfg, keys)  # before anything is made
        out = Path(cfg.out)
        out.mkdir(parents=True, exist_ok=True)
        lock(out)
        state = look_into(cfg, keys)  # another run may have been first
        for part in filter(is_part, out.iterdir()):  # what a kill left behind, see write_atomic
            part.unlink()
        if state == "new":
            values = {name: getattr(cfg, name) for name in keys}
            text = yaml.safe_dump(values, sort_keys=False)
            write_atomic(out / "config.yaml", lambda part: part.write_text(text))
        if state == "finished":
            print(f"{out} is finished already; another out= begins anew")
        else:
            record_start(out, ranks)
    if ranks.world > 1:
        states = [state]
        dist.broadcast_object_list(states, 0)
        state = states[0]
    errors.run_folder = cfg.out
    return state


def resume(path, model, optimizer, earlier=None):
    """Load last.pt, if there is one yet, into model and optimiser. → the rest of it, as `step`.

    earlier: of earlier_run, the checkpoint to go on with where there is no last.pt yet.
    """
    kind = "this run's checkpoint; delete it to begin the run anew"
    if earlier:
        path, kind = earlier, "a finished run's checkpoint"
    elif not Path(path).exists():
        return {"step": 0}
    with errors.reading(path, kind):
        state = load_checkpoint(path, kind)
        load_weights(model, state.pop("model"), path)
        optimizer.load_state_dict(state.pop("optimizer"))
        state["step"] = int(state["step"])
    return state


# ---------------------------------------------------------------------------------------------- log


class StepLog:
    """log.jsonl, a JSON line per logged step for programs, and a progress bar for people.

    record(…) takes a step's figures while they are still on the device and writes those of the step
    before, so that no step waits; flush() writes what is still on its way. Rank 0 writes, all ranks
    call. Ctrl-C and SIGTERM are noticed here: the ranks agree on the step after which they stop.
    """

    def __init__(self, cfg, ranks, dataset, batches, first, total):
        """dataset.name(index) names a sample; its people or split, tuples of arrays and lists, are
        what it was read from; batches.size: of all ranks; steps first … total−1."""
        self.ranks, self.dataset, self.batch, self.total = ranks, dataset, batches.size, total
        self.out = cfg.out
        self.every, self.save_every = cfg.log_every, cfg.save_every
        self.pending, self.file, self.bar = None, None, None
        self.stopping = False
        self.last = (time.perf_counter(), first)
        if ranks.rank == 0:
            self.file = open_log(Path(cfg.out) / "log.jsonl", first)
            about = dict(total=total, initial=first, desc=Path(sys.argv[0]).stem, unit="step")
            self.bar = tqdm(**about, dynamic_ncols=True, mininterval=1.0)
            same_data(cfg.out, dataset, batches.steps_per_epoch, first)
        if first:
            self.say(f"continues after step {first} of {total}")
        self.signals = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.signals[number] = signal.signal(number, self.ask)

    def ask(self, number, frame):
        """The first signal asks to save and stop within two steps; a second one stops at once."""
        if errors.asked:
            raise KeyboardInterrupt
        errors.asked = number

    def record(self, step, lr, values, index, bad):
        """The figures of step `step` (0-based). Writes those of the step before.

        values: name → 0-d tensor on the device; those before "grad_norm" also stand beside the bar.
        index: this rank's sample ids. bad (B,) bool tensor: samples whose output is not finite.
        """
        self.flush()
        own = [value.detach().float() for value in values.values()]
        # Last column: 1 to go on, 0 where a signal asked this rank to stop.
        own = torch.stack([*own, own[0].new_full((), 0.0 if errors.asked else 1.0)])[None]
        every = own
        if self.ranks.world > 1:
            every = own.new_empty(self.ranks.world, own.shape[1])
            dist.all_gather_into_tensor(every, own)
        copied = torch.cuda.Event() if own.is_cuda else None
        figures = every.to("cpu", non_blocking=True), bad.to("cpu", non_blocking=True)
        if copied:
            copied.record()
        self.pending = (step, lr, list(values), index, figures, copied, time.perf_counter())
        if self.bar is not None:
            self.bar.update(1)

    def flush(self):
        """Write the figures of the last recorded step, if that is not done yet.

        A figure that is not finite stops all ranks, with step, ranks and this rank's pictures; the
        last checkpoint stays. So call this before saving.
        """
        if self.pending is None:
            return
        (step, lr, names, index, (every, bad), copied, when), self.pending = self.pending, None
        if copied:
            copied.synchronize()
        finite = every.isfinite().all(1)
        if not finite.all():
            odd = (~finite).nonzero().flatten().tolist()
            rows = bad.nonzero().flatten().tolist() or range(len(index))
            pictures = [self.dataset.name(int(index[i])) for i in rows]
            raise UserError(
                f"non-finite loss or gradient at step {step + 1} on rank(s) {odd}; this rank's "
                f"pictures: {', '.join(pictures[:8])}{and_more(pictures, 8)}; the last "
                "checkpoint stays; lower the learning rate or look at them"
            )
        self.stopping = not every[:, -1].all()
        if step % self.every == 0 or step + 1 == self.total:
            row = dict(zip(names, every[:, :-1].mean(0).tolist()))
            (then, before), self.last = self.last, (when, step + 1)
            row["pictures_per_s"] = self.batch * (step + 1 - before) / max(when - then, 1e-9)
            shown = names[: names.index("grad_norm")] if "grad_norm" in names else names
            self.write(step=step + 1, lr=lr, **row, shown=(*shown, "pictures_per_s"))

    def saves(self, step):
        """Is a checkpoint due after this step? Every save_every, at the end, and before a stop."""
        return self.stopping or step + 1 == self.total or (step + 1) % self.save_every == 0

    def stop_if_asked(self, step):
        """After a checkpoint: leave, if a signal asked for it."""
        if self.stopping and step + 1 < self.total:
            self.close()
            record_end(self.out, "stopped")
            barrier()  # a rank that ends first may make torchrun end rank 0 while it saves
            done = f"stopped after step {step + 1} of {self.total}, which is saved"
            raise Stopped(errors.asked or signal.SIGTERM, f"{done}; the same command goes on")

    def write(self, shown=(), **row):
        """One line; the names in `shown` also stand beside the progress bar."""
        if self.file is None:
            return
        row = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        self.bar.set_postfix({name: f"{row[name]:.4g}" for name in shown}, refresh=False)

    def say(self, text):
        if self.ranks.rank == 0:
            with contextlib.suppress(BrokenPipeError):
                tqdm.write(text, file=sys.stderr)

    def close(self):
        """End of the loop: signals mean again what they meant before."""
        for number, handler in self.signals.items():
            signal.signal(number, handler)
        self.signals = {}
        if self.file is not None:
            self.bar.close()


def open_log(path, first):
    """The log, open to go on after step `first`. Later and broken lines are dropped."""
    kept = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                if row["step"] <= first and not row.get("final"):
                    kept.append(line + b"\n")
    write_atomic(path, lambda part: part.write_bytes(b"".join(kept)))
    return open(path, "a", encoding="utf-8")
