"""Tables about size: the step by batch, pictures per pose and ranks; bytes of a step and of the contrastive terms.

Legend: P pictures per pose · R ranks · D width · N patches.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from steps import Step, changed, peak_memory, replaced, state_of
from timing import PeakMemory, measure, median, show
from torch._subclasses.fake_tensor import FakeTensorMode

import losses
import model as ours

SCRIPT = str(Path(__file__).with_name("throughput.py"))


def pretended_ranks(ranks):
    """The losses compute own rows × the columns of so many ranks without a process group: all ranks hold our rows."""

    def repeated(gather):
        return lambda x: gather(x).repeat(ranks, *[1] * (x.ndim - 1))

    names = ("gather_with_gradient", "gather_rows_of")
    return replaced(losses, **{name: repeated(getattr(losses, name)) for name in names})


def contrastive_terms(cfg, device, width):
    """Forward and backward of L_align and L_mp for this rank's cfg.batch pictures in two views."""
    a, b, z = (torch.randn(n, width, device=device, requires_grad=True) for n in (cfg.batch, cfg.batch, 2 * cfg.batch))
    pose_id = (torch.arange(cfg.batch, device=device) // cfg.pictures_per_pose).repeat(2)

    def run():
        (losses.alignment_loss(a, b) + losses.multi_positive_loss(z, pose_id)).backward()

    return run


def table_scaling(cfg, rank, world, device):
    """By batch, pictures per pose and ranks, measured; then 8 and 64 GPUs on paper, from what was measured."""
    steps = {f"batch {b}, P {cfg.pictures_per_pose}": Step(changed(cfg, batch=b), device) for b in cfg.batches}
    steps |= {f"batch {cfg.batch}, P {p}": Step(changed(cfg, pictures_per_pose=p), device) for p in (1, 2, 4)}
    seconds, rows = measure(cfg, steps, device), []
    for name, s in seconds.items():
        rows.append({"what": name, "ms": 1e3 * median(s), "pictures_per_s": steps[name].cfg.batch / median(s)})
    show(f"scaling: {cfg.size} {cfg.precision}, one process", rows)

    rows = []
    for n in cfg.ranks:  # the same batch on each rank, one thread each: ideal would be the same step time
        words = [
            f"{name}={getattr(cfg, name)}" for name in ("size", "precision", "height", "width", "rounds", "seconds")
        ]
        words += [f"batch={cfg.batch * n}", f"device={device.type}", "threads=1"]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
        done = subprocess.run([*launch, SCRIPT, "parts", *words], check=True, capture_output=True, text=True)
        found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        row = {"ranks": n, "batch": cfg.batch * n, "ms": found[0]["ms"]}
        row |= {"pictures_per_s": cfg.batch * n / found[0]["ms"] * 1e3}
        rows.append(row | {"exchange_not_hidden": found[-1]["share_of_step"] if n > 1 else 0.0})
    show(f"scaling: {cfg.size} {cfg.precision}, ranks on this machine, one thread each", rows)

    step, rows = Step(cfg, device), []
    D = step.model.encoder.width
    parameters = sum(p.numel() for p in step.model.parameters() if p.requires_grad)
    for n in (1, 8, 64):
        with pretended_ranks(n):
            s = measure(cfg, {"terms": contrastive_terms(cfg, device, D), "step": step}, device)
        ms = 1e3 * median(s["step"])
        row = {"GPUs": n, "global_batch": n * cfg.batch, "contrastive_ms": 1e3 * median(s["terms"]), "step_ms": ms}
        # Ring all-reduce of float32 gradients: each rank sends 2(R−1)/R of them. The backward pass (2/3) hides them.
        exchange = 2 * (n - 1) / n * 4 * parameters / cfg.bandwidth / 1e6
        # Per picture two [CLS] and two [POSE] are gathered; the gather's backward reduces all of them (2 ×). Waits.
        gather = 3 * (n - 1) * cfg.batch * 4 * D * 4 / cfg.bandwidth / 1e6
        row |= {"gradients_ms": exchange, "gather_ms": gather}
        rows.append(row | {"step_ms_on_paper": ms + gather + max(0.0, exchange - ms * 2 / 3)})
    show(f"scaling on paper: {cfg.batch} pictures per rank, {cfg.bandwidth} GB/s each way, {device}", rows)


def table_memory(cfg, rank, world, device):
    """Goal: ViT-B, batch 256 (two views), bf16, within 40 GB. Without a GPU counted, not measured."""
    rows = []
    for batch in cfg.batches:
        for recompute in (False, True):
            these = changed(cfg, batch=batch, checkpoint_activations=recompute)
            peak = peak_memory(Step(these, device)) if device.type == "cuda" else counted_peak(these)
            rows.append({"batch": batch, "checkpoint_activations": recompute, "peak_GB": peak / 1e9})
    how = "measured" if device.type == "cuda" else "counted, not measured: attention as a GPU's fused kernel keeps it"
    show(f"memory: {cfg.size} {cfg.precision}, {cfg.views} views, {cfg.height}x{cfg.width}, {how}", rows)

    rows = []
    for n in (1, 8):  # 4,096 embeddings: 2,048 pictures in two views, on one rank and on 8
        terms = contrastive_terms(changed(cfg, batch=2048 // n), torch.device("cpu"), 768)
        with pretended_ranks(n), PeakMemory() as memory:
            terms()
        row = {"ranks": n, "own_rows_x_columns": f"{4096 // n} x 4096", "peak_MB": memory.peak / 1e6}
        rows.append(row | {"one_float32_matrix_MB": 4096 // n * 4096 * 4 / 1e6})
    show("memory: L_align and L_mp of 4,096 embeddings, forward and backward", rows)


def counted_peak(cfg):
    """Peak bytes of the second training step with tensors that have no content: nothing is computed or allocated."""
    with replaced(ours, attention=F.scaled_dot_product_attention), FakeTensorMode():
        step = Step(cfg, torch.device("cpu"))
        N = step.model.encoder.grid[0] * step.model.encoder.grid[1]
        masks = [torch.empty(cfg.batch, N, dtype=torch.bool) for _ in range(cfg.views)]
        step.masks = lambda keypoints: masks
        step()
        with PeakMemory(*state_of(step), *masks) as memory:
            step()
    return memory.peak
