"""What every stage repeats, once: process group, seeds, schedule, run folder and checkpoint, log.

A stage script uses these in the order they stand here, after it has read its config (config.py). Nothing in this file
knows the method.
"""

import argparse
import json
import math
import os
import random
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from plumbing.config import DISK_FULL, UserError, read_yaml

# --------------------------------------------------------------------------------------- process group and devices


# The longest that ranks wait for one another. While rank 0 alone re-ranks a large gallery
# (MSMT17: a quarter of an hour), the others wait for it; NCCL's own limit is 10 minutes.
# The price: a rank that hangs is noticed this late.
RANKS_WAIT = timedelta(hours=1)


def start_ranks(device="auto", precision="auto"):
    """Join torchrun's process group if any; NCCL on CUDA, gloo else. → (rank, world, device)

    On a GPU float32 is float32, in convolutions and LSTMs too: no TF32, which has 10 bits of
    mantissa and which torch allows in these two by default. For speed there is bf16 (see autocast).
    Raises UserError for a device or a precision that this machine does not have.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = start_gpu(int(os.environ.get("LOCAL_RANK", 0)), precision)
    device = torch.device(device)
    if world > 1 and not dist.is_initialized():
        # With its device given, NCCL connects the ranks now, not inside the first step.
        backend, own = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=RANKS_WAIT, device_id=own)
    return rank, world, device


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
    """`model`, or with several ranks a wrapper to call in its place: gradients become the mean over ranks."""
    if not dist.is_initialized():
        return model
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def rank_share(n, rank, world):
    """Which of n things this rank evaluates: consecutive ones, so that gather_rows gives them back in order."""
    return np.array_split(np.arange(n), world)[rank]


def gather_rows(rows, world):
    """Python objects of all ranks, as one flat list on every rank, in rank order. For evaluation, not for gradients."""
    if world == 1:
        return list(rows)
    parts = [None] * world
    dist.all_gather_object(parts, list(rows))
    return [row for part in parts for row in part]


# ------------------------------------------------------------------------------------------------ seeds and schedule


# What random numbers are for. Every key begins with one of these, so that no two purposes share their numbers.
WEIGHTS, ORDER, SAMPLE, FLIP, CROP, STEP, MASK, DROP_PATH, NEGATIVE = range(1, 10)
PROMPT, PICTURE, WORDING, BAD_BOX, POSE, PERSON, SCENE, CAMERA = range(11, 19)  # generate.py


def seed_of(purpose, *key):
    """A 63-bit seed from a purpose and whole numbers below 2⁶⁴, e.g. (SAMPLE, seed, epoch, index).

    Equal keys, equal seeds; different keys give unrelated seeds.
    """
    words = [word for k in (purpose, *map(int, key)) for word in (k & 0xFFFFFFFF, k >> 32 & 0xFFFFFFFF)]
    # SeedSequence takes [a] and [a, 0] for the same: the 1 at the end keeps them apart.
    return int(np.random.SeedSequence([*words, 1]).generate_state(1, np.uint64)[0] >> 1)


def rng_of(*key):
    """NumPy's generator for a key of seed_of."""
    return np.random.default_rng(seed_of(*key))


def seed_all(*key):
    """Seed Python's `random`, NumPy and torch (on the CPU) from a key of seed_of.

    What is random on a GPU takes a generator of its own. torch.manual_seed would also prepare seeds for every kind of
    device, which in a loader's worker took as long as decoding a picture.
    """
    seed = seed_of(*key)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


def generator_of(*key, device="cpu"):
    return torch.Generator(device=device).manual_seed(seed_of(*key))


def rank_rows(world_rows, rank, world):
    """This rank's slice of something made for the whole global batch: first dimension ÷ world, in rank order."""
    n = len(world_rows) // world
    return world_rows[rank * n : (rank + 1) * n]


def rank_noise(key, batch, columns, rank, world, device):
    """This rank's rows of (batch, columns) uniform numbers drawn for the global batch: f(key), for any world size.

    Drawn on the device, so that none waits for them: another kind of GPU draws other numbers.
    """
    noise = torch.rand(batch, columns, generator=generator_of(*key, device=device), device=device)
    return rank_rows(noise, rank, world)


def learning_rate(step, total, warmup, peak, floor=0.0, kind="cosine", milestones=()):
    """Learning rate of `step` (0-based) of `total`: linear warm-up that is never 0, then cosine or step decay.

    kind "cosine": from `peak` towards `floor` after the last step. kind "step": × 0.1 at each milestone (step number).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if kind == "step":
        return peak * 0.1 ** sum(step >= m for m in milestones)
    progress = (step - warmup) / max(1, total - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(model, weight_decay, layer_decay=1.0, layer_of=None, n_layers=0):
    """AdamW groups: no decay on 1-D parameters, tokens and positions; lr_scale = layer_decay^(n_layers − layer).

    layer_of(name) → 0 (embeddings) .. n_layers (the rest). Frozen parameters are left out.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim <= 1 or name.rsplit(".", 1)[-1].endswith(("token", "pos_embed"))
        scale = layer_decay ** (n_layers - layer_of(name)) if layer_of else 1.0
        group = groups.setdefault((plain, scale), {"params": [], "lr_scale": scale})
        group["weight_decay"] = 0.0 if plain else weight_decay
        group["params"].append(parameter)
    return list(groups.values())


def set_learning_rate(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


# ------------------------------------------------------------------------------------------- run folder, checkpoints


def open_run(cfg, keys, rank=0):
    """Make or re-enter the run folder `cfg.out`. → "new", "resume" or "finished".

    Never overwrites: a folder with another config, or with other things in it, is an error that says what differs.
    Only rank 0 writes; call it before anything else is written.
    """
    if not cfg.out:
        raise UserError("out= is empty; name a run folder")
    out = Path(cfg.out)
    values = {name: getattr(cfg, name) for name in keys}
    if (out / "config.yaml").exists():
        old = read_yaml(out / "config.yaml")
        names = [n for n in values if n not in keys or not keys[n].free]
        differs = [f"{n} {old.get(n)!r} -> {values[n]!r}" for n in names if old.get(n) != values[n]]
        if differs:
            raise UserError(f"{out} holds a run with another config ({'; '.join(differs)}); choose another out=")
        state = "finished" if (out / "done").exists() else "resume"
    elif out.exists() and (not out.is_dir() or any(path.suffix != ".part" for path in out.iterdir())):
        raise UserError(f"{out} exists and is not a run of this project; choose another out=")
    else:
        state = "new"
    barrier()  # every rank has looked before rank 0 writes
    if state == "new" and rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "config.yaml", lambda path: path.write_text(yaml.safe_dump(values, sort_keys=False)))
    if state == "finished" and rank == 0:
        print(f"{out} is finished already")
    barrier()
    return state


def write_atomic(path, write):
    """`write(temporary path)`, flush to disk, rename to `path`: after a kill or a full disk the old file is whole."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch wraps a failed write in an error of its own: then the disk is asked, while the part still fills it.
        full = getattr(error, "errno", None) in DISK_FULL
        full = full or not isinstance(error, OSError) and shutil.disk_usage(path.parent).free < 1 << 20
        temporary.unlink(missing_ok=True)
        if full:
            raise UserError(f"disk full while writing {path}; the previous one is untouched; free space") from None
        raise


def save_checkpoint(path, **state):
    """Tensors and plain Python values only, so that it loads with weights_only=True. Equal states, equal bytes."""
    write_atomic(path, lambda part: torch.save(canonical(state), part))


def write_json(path, value, indent=1):
    write_atomic(path, lambda part: part.write_text(json.dumps(value, indent=indent) + "\n"))


def canonical(value):
    """The same value in new containers with interned text: pickle writes shared objects differently from equal ones."""
    if isinstance(value, dict):
        return {canonical(k): canonical(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(canonical(v) for v in value)
    return sys.intern(value) if isinstance(value, str) else value


def load_checkpoint(path):
    """Read a .pt/.pth (weights_only: a stranger's pickle never runs code) or .safetensors file onto the CPU."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # MAE and HAP store their arguments beside
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile, pickle and safetensors each raise their own kinds
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path} is cut short, damaged or holds more than tensors: {reason}") from None


def resume(path, model, optimizer):
    """Load last.pt, if the run has one yet, into model and optimiser. → what else it holds, at least `step`."""
    if not Path(path).exists():
        return {"step": 0}
    state = load_checkpoint(path)
    if not {"model", "optimizer", "step"} <= set(state):
        raise UserError(f"{path} is not a checkpoint of this stage; delete it to start the run anew")
    load_weights(model, state.pop("model"), path)
    optimizer.load_state_dict(state.pop("optimizer"))
    return state


def load_weights(module, state, path):
    """Strict load_state_dict with one clear line instead of torch's page."""
    own = module.state_dict()
    for name in sorted(set(own) | set(state)):
        if name not in state or name not in own:
            raise UserError(f"{path}: weight {name} is {'missing' if name not in state else 'not of this model'}")
        if own[name].shape != state[name].shape:
            raise UserError(f"{path}: {name} has shape {tuple(state[name].shape)}, model {tuple(own[name].shape)}")
    module.load_state_dict(state)


def save_encoder(path, module, **meta):
    """Weights only, plain names; `meta` tells a fork the size and input of the encoder.

    The metadata is one JSON text: safetensors writes several entries in an order of its own, never the same bytes.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    text = json.dumps({name: str(value) for name, value in meta.items()})
    # Written by us, not by save_file: its files are for their owner alone.
    write_atomic(path, lambda part: part.write_bytes(to_safetensors(tensors, metadata={"encoder": text})))


# --------------------------------------------------------------------------------------------------------------- log


class Log:
    """log.jsonl (one JSON line per logged step, for programs) and a progress bar on stderr (for people), rank 0 only.

    On resume, lines after `step` (written after the last checkpoint, before the kill) are dropped.
    """

    def __init__(self, out, total, step, rank, title):
        self.file, self.bar, self.rank = None, None, rank
        self.last = (time.perf_counter(), step)
        if rank:
            return
        path = Path(out) / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line).get("step", 0) <= step]
        write_atomic(path, lambda part: part.write_text("".join(line + "\n" for line in kept)))
        self.file = open(path, "a", encoding="utf-8")
        self.bar = tqdm(total=total, initial=step, desc=title, unit="step", dynamic_ncols=True, mininterval=1.0)

    def advance(self):
        if self.bar is not None:
            self.bar.update(1)

    def rate(self, now, step, batch):
        """Pictures per second since the last call; `now`: when `step` ended, seconds of perf_counter."""
        (then, before), self.last = self.last, (now, step)
        return batch * (step - before) / max(now - then, 1e-9)

    def write(self, shown=(), **row):
        """One line; the names in `shown` also stand beside the progress bar."""
        if self.file is None:
            return
        self.file.write(
            json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}) + "\n"
        )
        self.file.flush()
        self.bar.set_postfix({name: f"{row[name]:.4g}" for name in shown}, refresh=False)

    def say(self, text):
        if self.rank == 0:
            tqdm.write(text, file=sys.stderr)

    def close(self):
        if self.file is not None:
            self.file.close()
            self.bar.close()


class Figures:
    """One step's figures of all ranks, on their way to the host while the device goes on with the next step.

    values: name → 0-d tensor on the device. index: sample ids of this rank. bad (B,) bool tensor: samples whose output
    is not finite. Made right after the step; `settle` reads it one step later, so that no step waits for the device.
    """

    def __init__(self, step, lr, values, index, bad):
        self.step, self.lr, self.names, self.index = step, lr, list(values), index
        self.time = time.perf_counter()
        own = torch.stack([value.detach().float() for value in values.values()])[None]
        ranks = own
        if dist.is_initialized():
            ranks = own.new_empty(dist.get_world_size(), own.shape[1])
            dist.all_gather_into_tensor(ranks, own)
        self.ranks, self.bad = ranks.to("cpu", non_blocking=True), bad.to("cpu", non_blocking=True)
        self.copied = torch.cuda.Event() if own.is_cuda else None
        if self.copied:
            self.copied.record()


def settle(figures, log, name_of, batch, every, shown):
    """Check and log the figures of an earlier step (None: nothing to do).

    A non-finite figure stops all ranks, with step, ranks and this rank's pictures; the last checkpoint stays.
    name_of(index) names a sample; batch: global batch, for the speed; every: steps between log lines.
    """
    if figures is None:
        return
    if figures.copied:
        figures.copied.synchronize()
    finite = figures.ranks.isfinite().all(1)
    if not finite.all():
        ranks = (~finite).nonzero().flatten().tolist()
        bad = figures.bad.nonzero().flatten().tolist() or range(len(figures.index))
        names = [name_of(int(figures.index[i])) for i in bad]
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise UserError(
            f"non-finite loss or gradient at step {figures.step} on rank(s) {ranks}; this rank's pictures: "
            f"{', '.join(names[:8])}{more}; the last checkpoint stays; lower the learning rate or look at them"
        )
    if figures.step % every == 0:
        row = dict(zip(figures.names, figures.ranks.mean(0).tolist()))
        row["pictures_per_s"] = log.rate(figures.time, figures.step + 1, batch)
        log.write(step=figures.step + 1, lr=figures.lr, **row, shown=(*shown, "pictures_per_s"))
