"""Speed and memory beside what people would use instead. One table per command:

  python benchmarks/throughput.py step      the training step beside the machine's matrix products
  python benchmarks/throughput.py parts     where its time goes; torchrun adds the ranks' exchange
  python benchmarks/throughput.py versus    our MAE setting and transformers.ViTMAEForPreTraining
  python benchmarks/throughput.py masks     4,096 part-guided masks, and a Python loop
  python benchmarks/throughput.py memory    bytes of a step, with and without recomputation
  python benchmarks/throughput.py accumulate  speed and bytes where a batch is taken in parts
  python benchmarks/throughput.py generate  our diffusion setting and the plain diffusers call

All keys of pretrain.py may follow (size=base batch=512 precision=bf16 device=cuda, --cfg
configs/x.yaml) and those of KEYS below; `step --help` lists them. Prints a table for people and one
JSON line per row for programs. Times are medians of turns A B A B, ratios are medians of the
rounds' own ratios. docs/speed.md: what was measured, and the tables that were asked once.

Here: the step that is measured, and all tables but `generate` (generation.py). timing.py: the clock
and the counters. Legend: B pictures on this rank · h, w grid of patches.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import plumbing.quiet  # noqa: F401  first: Ctrl-C while the libraries load

# isort: split
from statistics import median
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from generation import table_generate
from timing import PeakMemory, ceiling, flops, measure, ratio, show
from torch._subclasses.fake_tensor import FakeTensorMode

import common
import model as ours
import pretrain
from common import UserError
from data import noise_size, part_guided_mask
from plumbing.config import Key, read_config

KEYS = pretrain.KEYS | dict(
    size=Key("small", "encoder size", choices=tuple(ours.SIZES)),
    precision=Key("fp32", "as pretrain.py's", choices=("auto", "fp32", "bf16")),
    batch=Key(32, "pictures in a global batch", low=1),
    pictures_per_pose=Key(4, "K: pictures of one pose in a batch", low=1),
    rounds=Key(5, "turns of each candidate", low=1),
    seconds=Key(1.0, "a candidate's turn repeats its work for about so long", low=0),
    precisions=Key(["fp32", "bf16"], "versus: precisions to compare"),
    batches=Key([8, 16, 32], "memory, generate: batches", of=int, low=1),
    parts=Key([1, 2, 4, 8], "accumulate: numbers of parts", of=int, low=1),
)


def changed(cfg, **values):
    return SimpleNamespace(**(vars(cfg) | values))


class Step:
    """A training step as pretrain.py's loop makes it, on one batch of made-up pictures."""

    def __init__(self, cfg, ranks):
        self.cfg, self.ranks = cfg, ranks
        common.seed_all(common.WEIGHTS, cfg.seed)
        self.model = pretrain.build_model(cfg)
        if ranks.device.type != "cpu":  # tensors without content (counted_peak) cannot be moved
            self.model.to(ranks.device)
        self.optimizer = adamw(self.model, cfg)
        self.runner = common.distributed(self.model, ranks.device)
        B = cfg.batch // ranks.world
        keypoints = torch.rand(B, 17, 3) * torch.tensor([cfg.width, cfg.height, 3.0])
        keypoints[..., 2].floor_()  # 0 missing, 1 hidden, 2 visible
        images = torch.randint(256, (B, 3, cfg.height, cfg.width), dtype=torch.uint8)
        pose_id = (torch.arange(B) + ranks.rank * B) // cfg.pictures_per_pose
        self.sample = images, keypoints, pose_id
        if ranks.device.type == "cuda":  # as the loader does
            self.sample = [value.pin_memory() for value in self.sample]

    def masks(self, keypoints):
        return pretrain.draw_masks(self.cfg, keypoints, self.model.encoder.grid, 0, self.ranks)

    def inputs(self):
        device = self.ranks.device
        images, keypoints, pose_id = (v.to(device, non_blocking=True) for v in self.sample)
        return ours.normalize(images), self.masks(keypoints), pose_id

    def forward_backward(self):
        autocast = common.autocast(self.ranks.device, self.cfg.precision)
        if self.cfg.accumulate > 1:
            batch = self.inputs()
            return common.backward_in_parts(self.model, batch, self.cfg.accumulate, autocast)
        with autocast:
            result = self.runner(*self.inputs())
        result["total"].backward()
        return result

    def __call__(self):
        result = self.forward_backward()
        update(self.model, self.optimizer)
        pretrain.health(result)


def adamw(model, cfg):
    groups = common.parameter_groups(model, cfg.weight_decay)
    return torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, cfg.beta2), fused=True)


def update(model, optimizer):
    torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# ------------------------------------------------------------------------------ the step, its parts


def table_step(cfg, ranks):
    """Goals: ViT-S float32 on a CPU ≥ 80 %, ViT-B bf16 on a GPU ≥ 45 % of the ceiling."""
    step = Step(cfg, ranks)
    work = flops(step.forward_backward)  # of this rank
    if cfg.compile:
        step.model.compile()
    product, product_work = ceiling(ranks.device, cfg.precision)
    seconds = measure(cfg, {"step": step, "ceiling": product}, ranks)
    t, top = median(seconds["step"]), median(seconds["ceiling"])
    share = work / product_work * ratio(seconds["ceiling"], seconds["step"])
    row = dict(ms=1e3 * t, pictures_per_s=cfg.batch / t)
    row |= dict(GFLOP_per_s=work / t / 1e9, share_of_ceiling=share)
    shape = f"batch {cfg.batch}, {cfg.views} view(s), {cfg.height}x{cfg.width}"
    rows = {"step": row, "ceiling": dict(GFLOP_per_s=product_work / top / 1e9)}
    return f"step: {cfg.size} {cfg.precision} {shape}", rows


def table_parts(cfg, ranks):
    """Each part forward and backward on its own. Goals: masks ≤ 1 %, losses ≤ 3 % of the step."""
    if not cfg.decoder:
        raise UserError("parts measures a model with a decoder; set decoder=true mask=part")
    step, other, device = Step(cfg, ranks), Step(cfg, ranks), ranks.device
    model, keypoints = step.model, step.sample[1].to(device)
    images, masks, pose_id = step.inputs()
    visible, masked = ours.split_mask(torch.cat(masks), model.n_visible)
    with common.autocast(device, cfg.precision):
        tokens = model.encoder(images, visible).detach().requires_grad_()
        pred = model.decoder(tokens, visible, masked).detach().requires_grad_()
    other.forward_backward()  # leaves gradients for an optimiser that takes them again and again

    def part(forward, *inputs):
        def run():
            with common.autocast(device, cfg.precision):
                out = forward(*inputs)
            out.backward(torch.ones_like(out))
            step.optimizer.zero_grad(set_to_none=True)

        return run

    def losses():  # the method itself; its encoder and decoder only hand out what they gave
        encoder = patch.object(model.encoder, "forward", lambda *_: tokens)
        decoder = patch.object(model.decoder, "forward", lambda *_: pred)
        with encoder, decoder, common.autocast(device, cfg.precision):
            result = model(images, masks, pose_id)
        result["total"].backward()
        pretrain.health(result)

    def optimiser():
        torch.nn.utils.clip_grad_norm_(other.model.parameters(), float("inf"))
        other.optimizer.step()

    def without_exchange():
        with step.runner.no_sync():
            step()

    candidates = {"step": step, "masking": lambda: step.masks(keypoints)}
    candidates["encoder"] = part(model.encoder, images, visible)
    candidates["decoder"] = part(model.decoder, tokens, visible, masked)
    candidates |= {"losses": losses, "optimiser": optimiser}
    if ranks.world > 1:
        candidates["step without gradient exchange"] = without_exchange
    seconds, rows = measure(cfg, candidates, ranks), {}
    for name, s in seconds.items():
        rows[name] = dict(ms=1e3 * median(s), share_of_step=ratio(s, seconds["step"]))
    if ranks.world > 1:
        waits = 1 - rows["step without gradient exchange"]["share_of_step"]
        rows["gradient exchange, not hidden"] = dict(share_of_step=waits)
    return f"parts: {cfg.size} {cfg.precision} batch {cfg.batch}, {ranks.world} rank(s)", rows


# ------------------------------------------------------------------ beside transformers' MAE; masks


def vit_mae(cfg, ranks):
    """transformers' MAE of the same sizes, in its best setting (SDPA)."""
    import transformers

    s = ours.SIZES[cfg.size]
    config = transformers.ViTMAEConfig(
        hidden_size=s["width"], num_hidden_layers=s["depth"], num_attention_heads=s["heads"],
        intermediate_size=4 * s["width"], decoder_hidden_size=s["decoder_width"],
        decoder_num_hidden_layers=s["decoder_depth"], image_size=cfg.height,
        decoder_num_attention_heads=s["decoder_heads"], patch_size=cfg.patch, norm_pix_loss=True,
        decoder_intermediate_size=4 * s["decoder_width"], mask_ratio=cfg.mask_ratio,
    )  # fmt: skip
    make = transformers.ViTMAEForPreTraining._from_config
    model = make(config, attn_implementation="sdpa").to(ranks.device).train()
    pixels = torch.randint(256, (cfg.batch, 3, cfg.height, cfg.width), dtype=torch.uint8)
    pixels = pixels.pin_memory() if ranks.device.type == "cuda" else pixels

    def forward_backward():
        images = ours.normalize(pixels.to(ranks.device, non_blocking=True))
        with common.autocast(ranks.device, cfg.precision):
            loss = model(images).loss
        loss.backward()

    optimizer = adamw(model, cfg)
    return SimpleNamespace(model=model, optimizer=optimizer, forward_backward=forward_backward)


def table_versus(cfg, ranks):
    """Goals: float32 on a CPU ≥ 1.05, bf16 ≥ 1.2, bf16 on a GPU ≥ 1.5 × theirs. compile=: both."""
    # Theirs takes square pictures only.
    mae = dict(height=192, width=192, views=1, mask="random", gamma_align=0.0, gamma_mp=0.0)
    mae |= dict(pose_token=False, decoder=True)
    candidates, work = {}, {}
    for p in cfg.precisions:
        for who, make in (("ours", Step), ("ViTMAE", vit_mae)):
            step = make(changed(cfg, **mae, precision=p), ranks)
            work[who, p] = flops(step.forward_backward)
            if cfg.compile:
                step.model.compile()

            def run(step=step):
                step.forward_backward()
                update(step.model, step.optimizer)

            candidates[who, p] = run
    seconds, rows = measure(cfg, candidates, ranks), {}
    for (who, p), s in seconds.items():
        rows[f"{who}, {p}"] = dict(ms=1e3 * median(s), GFLOP=work[who, p] / 1e9)
    for p in cfg.precisions:
        faster = ratio(seconds["ViTMAE", p], seconds["ours", p])
        rows[f"ours / ViTMAE, {p}"] = dict(ratio=faster)
    if {"fp32", "bf16"} <= set(cfg.precisions):
        faster = ratio(seconds["ours", "fp32"], seconds["ours", "bf16"])
        rows["ours, bf16 / fp32"] = dict(ratio=faster)
    compiled = ", both compiled" if cfg.compile else ""
    return f"versus: {cfg.size}, batch {cfg.batch}, 192x192{compiled}", rows


def table_masks(cfg, ranks):
    """Goals: 4,096 part-guided masks in ≤ 200 ms on one CPU core, in ≤ 5 ms on a GPU."""
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
    from test_masks import loop_mask, random_people  # the same masks in plain Python

    torch.set_num_threads(1)
    n, few, grid = 4096, 64, (16, 8)
    people, noise = random_people(n), torch.rand(n, noise_size(grid))
    points, numbers = people.to(ranks.device), noise.to(ranks.device)
    pairs = list(zip(people[:few].numpy(), noise[:few].numpy()))

    def batched():
        return part_guided_mask(points, grid, 0.5, 16, noise=numbers)

    def loop():
        return [loop_mask(person, numbers)[0] for person, numbers in pairs]

    same = (batched()[:few].cpu().numpy() == np.array(loop())).all(1)
    seconds = measure(cfg, {"batched": batched, "loop": loop}, ranks)
    faster = n / few * ratio(seconds["loop"], seconds["batched"])
    row = dict(ms=1e3 * median(seconds["batched"]), times_faster=faster, same_masks=np.mean(same))
    rows = {"ours": row, "Python loop": dict(ms=1e3 * n / few * median(seconds["loop"]))}
    return f"masks: {n} pictures, part-guided, 16x8 patches, {ranks.device}, one thread", rows


# ------------------------------------------------------------------------------------------- memory


def table_memory(cfg, ranks):
    """Goal: ViT-B, batch 256 in two views, bf16, within 40 GB. Without a GPU counted."""
    cuda, rows = ranks.device.type == "cuda", {}
    peak_of = measured_peak if cuda else counted_peak
    for batch in cfg.batches:
        for recompute in (False, True):
            peak = peak_of(changed(cfg, batch=batch, checkpoint_activations=recompute), ranks)
            what = f"batch {batch}{', checkpoint_activations' if recompute else ''}"
            rows[what] = dict(peak_GB=peak / 1e9)
    how = "measured" if cuda else "counted: attention as a GPU's fused kernel keeps it"
    shape = f"{cfg.views} view(s), {cfg.height}x{cfg.width}"
    return f"memory: {cfg.size} {cfg.precision}, {shape}, {how}", rows


def table_accumulate(cfg, ranks):
    """Speed and memory of a step whose batch is taken in parts, with and without recomputation."""
    peak_of, ways, rows = measured_peak if ranks.device.type == "cuda" else counted_peak, {}, {}
    for parts in cfg.parts:
        for recompute in (False, True):
            what = f"accumulate {parts}{', checkpoint_activations' if recompute else ''}"
            ways[what] = changed(cfg, accumulate=parts, checkpoint_activations=recompute)
            rows[what] = {"peak_GB": peak_of(ways[what], ranks) / 1e9}
    seconds = measure(cfg, {what: Step(these, ranks) for what, these in ways.items()}, ranks)
    first = seconds[next(iter(rows))]
    for what, row in rows.items():
        s = seconds[what]
        row |= {"pictures_per_s": cfg.batch / median(s), "speed_of_first": ratio(first, s)}
    return f"accumulate: {cfg.size} {cfg.precision} batch {cfg.batch}, {ranks.device}", rows


def measured_peak(cfg, ranks):
    """The allocator's peak in the second training step."""
    step = Step(cfg, ranks)
    step()
    torch.cuda.reset_peak_memory_stats(ranks.device)
    step()
    return torch.cuda.max_memory_allocated(ranks.device)


def counted_peak(cfg, ranks):
    """The same of tensors without content: nothing is computed or allocated.

    Part-guided masks would need content; random ones are as large.
    """
    cfg = changed(cfg, mask=cfg.mask.replace("part", "random"))
    fused = patch.object(ours, "attention", F.scaled_dot_product_attention)
    with fused, FakeTensorMode(), PeakMemory() as memory:
        step = Step(cfg, ranks)
        step()
        memory.peak = memory.now
        step()
    return memory.peak


TABLES = dict(step=table_step, parts=table_parts, versus=table_versus)
TABLES |= dict(masks=table_masks, memory=table_memory, accumulate=table_accumulate)
TABLES |= dict(generate=table_generate)


def main():
    table = sys.argv[1] if len(sys.argv) > 1 else ""
    if table not in TABLES:
        raise UserError(f'no table "{table}"; the first word is one of {", ".join(TABLES)}')
    cfg = read_config(KEYS, __doc__, sys.argv[2:])
    ranks = common.start_ranks(cfg.device, cfg.precision)
    if cfg.precision == "auto":
        cfg.precision = "bf16" if common.has_bf16(ranks.device) else "fp32"
    if ranks.rank == 0:
        threads = torch.get_num_threads()
        print(f"{threads} thread(s), torch {torch.__version__}, {ranks.device}")
    title, rows = TABLES[table](cfg, ranks)
    if ranks.rank == 0:
        show(title, rows)


if __name__ == "__main__":
    common.run_stage(main)
