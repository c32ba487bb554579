"""Speed and memory, measured side by side with what people would use instead. One table per command:

  python benchmarks/throughput.py step        the training step alone, the data pipeline alone, both together
  python benchmarks/throughput.py parts       where a step's time goes; under torchrun also the gradients' exchange
  python benchmarks/throughput.py versus      our MAE setting and transformers.ViTMAEForPreTraining; bf16 and float32
  python benchmarks/throughput.py data        our picture pipeline and torchvision's PIL one, one core
  python benchmarks/throughput.py masks       4,096 part-guided masks, and a Python loop (needs tests/requirements.txt)
  python benchmarks/throughput.py start       pretrain.py's start to its first step on 600 k annotations, its memory
  python benchmarks/throughput.py generate    our diffusion setting and the plain diffusers call, random weights
  python benchmarks/throughput.py scaling     batch, pictures per pose, ranks, contrastive terms; 8, 64 GPUs on paper
  python benchmarks/throughput.py memory      bytes by batch, with and without checkpoint_activations; the logits
  python benchmarks/throughput.py puppet      pictures/s of the offline generator

All keys of pretrain.py may follow (size=base batch=512 precision=bf16 device=cuda, --cfg configs/x.yaml) and those of
KEYS below; `step --help` lists them. Prints a table for people and one JSON line per row for programs.
Candidates of one table take turns (A B A B); times are medians, ratios are medians of the rounds' own ratios.
Nothing here is a test: no figure makes this script fail.

Here: step, parts, versus. scaling.py: scaling, memory. inputs.py: the others. steps.py is the step that is measured,
timing.py the clock. Legend: P pictures per pose · GFLOP of matrix products only.
"""

import sys
from pathlib import Path

sys.path[1:1] = [str(Path(__file__).resolve().parent.parent / folder) for folder in ("", "tests")]

import tempfile  # noqa: E402
import time  # noqa: E402

import torch  # noqa: E402
from inputs import read_sets, table_data, table_generate, table_masks, table_puppet, table_start  # noqa: E402
from scaling import table_memory, table_scaling  # noqa: E402
from steps import Step, adamw, changed, peak_memory, replaced, update  # noqa: E402
from timing import Products, ceiling, flops, measure, median, ratio, show, wait  # noqa: E402

import data  # noqa: E402
import losses  # noqa: E402
import model as ours  # noqa: E402
import pretrain  # noqa: E402
from common import autocast, start_ranks  # noqa: E402
from plumbing.batches import PoseBatches, training_loader  # noqa: E402
from plumbing.config import Key, read_config, run_stage  # noqa: E402

KEYS = pretrain.KEYS | dict(
    size=Key("small", "encoder size", choices=tuple(ours.SIZES)),
    precision=Key("fp32", "as pretrain.py's", choices=("auto", "fp32", "bf16")),
    batch=Key(32, "pictures in a global batch", low=1),
    pictures_per_pose=Key(4, "P: pictures of one pose in a batch", low=1),
    rounds=Key(5, "turns of each candidate", low=1),
    seconds=Key(1.0, "a candidate's turn repeats its work for about so long", low=0),
    clock=Key("wall", "cpu: this process's processor time, for a machine that others use", choices=("wall", "cpu")),
    threads=Key(0, "CPU threads; 0: torch's own choice", low=0),
    precisions=Key(["fp32", "bf16"], "versus: precisions to compare"),
    compiled=Key([], "versus: who is also tried compiled, of ours and ViTMAE"),
    annotation_count=Key(600_000, "start: annotations", low=1000),
    pictures=Key(512, "data, step: drawn pictures to read where annotations= names none", low=8),
    ranks=Key([1, 2], "scaling: processes", of=int, low=1),
    batches=Key([8, 16, 32], "scaling, memory, generate: batches", of=int, low=1),
    bandwidth=Key(50.0, "scaling on paper: GB/s a rank sends and receives (50: a 400 Gb/s card per GPU)", low=0.001),
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------- training steps


def table_step(cfg, rank, world, device):
    """Goals: ViT-S float32 on the CPU ≥ 80 %, ViT-B bf16 on a GPU ≥ 45 % of the ceiling; together / slower ≥ .95."""
    step = Step(cfg, device, rank, world)
    memory = peak_memory(step)  # first: what is measured below keeps tensors of its own
    work = flops(step.forward_backward)  # of this rank
    with Products() as products:
        step.forward_backward()
    step.optimizer.zero_grad(set_to_none=True)
    own, own_work = ceiling(device, cfg.precision)
    float32, _ = ceiling(device, "fp32")
    floor = "its matrix products alone"  # without those inside the fused attention
    candidates = {"step": step, "ceiling": own, "float32 ceiling": float32, floor: products.again}
    seconds = measure(cfg, candidates, device)
    t = median(seconds["step"])
    row = {"what": "step alone", "pictures_per_s": cfg.batch / t, "ms": 1e3 * t}
    row |= {"GFLOP_per_picture": work * world / cfg.batch / 1e9, "GFLOP_per_s": work / t / 1e9}
    row |= {"share_of_ceiling": work / own_work * ratio(seconds["ceiling"], seconds["step"])}
    if device.type == "cpu" and cfg.precision != "fp32":
        row["share_of_float32_ceiling"] = work / own_work * ratio(seconds["float32 ceiling"], seconds["step"])
    rows = [row | {"peak_GB": memory / 1e9}]
    for name in (floor, "ceiling", "float32 ceiling"):  # the floor of this step, and the two ceilings
        t, done = median(seconds[name]), flops(products.again) if name == floor else own_work
        row = {"what": name, "ms": 1e3 * t, "GFLOP_per_s": done / t / 1e9}
        rows.append(row | {"share_of_ceiling": done / own_work * ratio(seconds["ceiling"], seconds[name])})
    if world == 1 and cfg.clock == "wall":
        rows += together(cfg, step)
    if rank == 0:
        show(f"step: {cfg.size} {cfg.precision} batch {cfg.batch}, {cfg.views} views, {cfg.height}x{cfg.width}", rows)


def together(cfg, step, steps=8):
    """A fresh loader at each turn; its first batch is not timed, for it starts the workers."""
    with tempfile.TemporaryDirectory() as folder:
        people, size = read_sets(cfg, folder), (cfg.height, cfg.width)
        dataset = data.PretrainPictures(people, size, cfg.seed, cfg.box_padding)
        batches = PoseBatches(dataset, cfg.batch, cfg.pictures_per_pose, [], cfg.seed)

        def loader():
            return training_loader(dataset, batches.run(0, steps + 1), cfg.workers, step.device)

        def run(consume, source):
            source = iter(source)
            consume(next(source))
            wait(step.device)
            start = time.perf_counter()
            for sample in source:
                consume(sample)
            wait(step.device)
            return (time.perf_counter() - start) / steps

        seconds = {"step again": [], f"data alone, {cfg.workers} workers": [], "both together": []}
        for _ in range(cfg.rounds):
            turns = (step, [step.sample] * (steps + 1)), (lambda sample: None, loader()), (step, loader())
            for name, turn in zip(seconds, turns):
                seconds[name].append(run(*turn))
    alone, data_alone, both = seconds.values()
    rows = [
        {"what": name, "pictures_per_s": cfg.batch / median(s), "ms": 1e3 * median(s)} for name, s in seconds.items()
    ]
    rows[2]["together_to_slower"] = ratio([max(a, b) for a, b in zip(alone, data_alone)], both)
    return rows


def table_parts(cfg, rank, world, device):
    """Each part forward and backward on its own. Goals: masks ≤ 1 %, losses ≤ 3 % of the step."""
    step = Step(cfg, device, rank, world)
    model, keypoints = step.model, step.sample["keypoints"].to(device)
    images, masks, pose_id = step.inputs()
    with autocast(device, cfg.precision):
        order = torch.cat(masks).to(torch.uint8).argsort(dim=1, stable=True)
        visible, masked = order[:, : model.n_visible], order[:, model.n_visible :]
        tokens = model.encoder(images, visible).detach().requires_grad_()
        pred = model.decoder(tokens, visible, masked).detach().requires_grad_()

    def part(forward, *inputs):
        def run():
            with autocast(device, cfg.precision):
                out = forward(*inputs)
            out.backward(torch.ones_like(out))
            step.optimizer.zero_grad(set_to_none=True)

        return run

    def loss_terms():  # the method itself, its encoder and decoder replaced by what they gave
        with replaced(model.encoder, forward=lambda *_: tokens), replaced(model.decoder, forward=lambda *_: pred):
            with autocast(device, cfg.precision):
                result = model(images, masks, pose_id)
            result["total"].backward()
        for z, ids in zip(result["z"], result["z_pose_id"]) if cfg.gamma_mp else ():
            losses.contrastive_health(z, ids)

    step.forward_backward()
    gradients = [(parameter, parameter.grad) for parameter in model.parameters() if parameter.grad is not None]

    def optimiser():
        for parameter, gradient in gradients:
            parameter.grad = gradient
        update(model, step.optimizer)

    candidates = {"step": step, "masking": lambda: step.masks(keypoints)}
    candidates |= {"encoder": part(model.encoder, images, visible)}
    candidates |= {"decoder": part(model.decoder, tokens, visible, masked)}
    candidates |= {"losses": loss_terms, "optimiser": optimiser}
    pixels = step.sample["image"].to(device)
    candidates |= {"normalising pixels": lambda: data.normalize(pixels)}

    def silent():
        with step.runner.no_sync():
            step()

    if world > 1:
        candidates["step without gradient exchange"] = silent
    seconds = measure(cfg, candidates, device)
    rows = [{"part": n, "ms": 1e3 * median(s), "share_of_step": ratio(s, seconds["step"])} for n, s in seconds.items()]
    if world > 1:
        rows.append({"part": "gradient exchange, not hidden", "share_of_step": 1 - rows[-1]["share_of_step"]})
    if rank == 0:
        show(f"parts: {cfg.size} {cfg.precision} batch {cfg.batch}, {world} rank(s), forward and backward", rows)


# ------------------------------------------------------------------------------------------------ side by side: MAE


def vit_mae(cfg, device, compiled):
    """transformers' MAE in the same sizes and its best setting (SDPA). → (training step, its FLOP)."""
    import transformers

    s = ours.SIZES[cfg.size]
    config = transformers.ViTMAEConfig(
        hidden_size=s["width"], num_hidden_layers=s["depth"], num_attention_heads=s["heads"], image_size=cfg.height,
        intermediate_size=4 * s["width"], decoder_hidden_size=s["decoder_width"], patch_size=cfg.patch,
        decoder_num_hidden_layers=s["decoder_depth"], decoder_num_attention_heads=s["decoder_heads"],
        decoder_intermediate_size=4 * s["decoder_width"], mask_ratio=cfg.mask_ratio, norm_pix_loss=True,
    )  # fmt: skip
    model = transformers.ViTMAEForPreTraining._from_config(config, attn_implementation="sdpa").to(device).train()
    optimizer = adamw(model, cfg)
    pixels = torch.randint(256, (cfg.batch, 3, cfg.height, cfg.width), dtype=torch.uint8)

    def forward_backward(runner):
        with autocast(device, cfg.precision):
            loss = runner(data.normalize(pixels.to(device, non_blocking=True))).loss
        loss.backward()

    work = flops(lambda: forward_backward(model))
    runner = torch.compile(model) if compiled else model

    def step():
        forward_backward(runner)
        update(model, optimizer)

    return step, work


def our_mae(cfg, device, compiled):
    step = Step(changed(cfg, compile=False), device)
    work = flops(step.forward_backward)
    return Step(changed(cfg, compile=compiled), device), work


def table_versus(cfg, rank, world, device):
    """Goals: CPU float32 ≥ 1.05, bf16 ≥ 1.2, GPU bf16 ≥ 1.5 × theirs; CPU bf16 / float32 ≥ 2."""
    mae = dict(height=192, width=192, views=1, mask="random", gamma_align=0.0, gamma_mp=0.0, pose_token=False)
    cfg = changed(cfg, **mae)  # theirs takes square pictures only
    makers, candidates, work = {"ours": our_mae, "ViTMAE": vit_mae}, {}, {}
    for precision in cfg.precisions:
        for who, make in makers.items():
            for suffix in ("", " compiled") if who in cfg.compiled else ("",):
                name = f"{who} {precision}{suffix}"
                candidates[name], work[name] = make(changed(cfg, precision=precision), device, bool(suffix))
        name = f"ceiling {precision}"
        candidates[name], work[name] = ceiling(device, precision)
    seconds, rows, best = measure(cfg, candidates, device), [], {}
    for name, s in seconds.items():
        who, precision = name.split()[:2]
        row = {"what": name, "ms": 1e3 * median(s), "GFLOP_per_s": work[name] / median(s) / 1e9}
        if who in makers:
            best[who, precision] = min(best.get((who, precision), s), s, key=median)
            top = f"ceiling {precision}"
            row |= {"pictures_per_s": cfg.batch / median(s), "GFLOP_per_picture": work[name] / cfg.batch / 1e9}
            row |= {"share_of_ceiling": work[name] / work[top] * ratio(seconds[top], s)}
        rows.append(row)
    for p in cfg.precisions:
        rows.append({"what": f"ours / ViTMAE, {p}, best of each", "ratio": ratio(best["ViTMAE", p], best["ours", p])})
    if {"fp32", "bf16"} <= set(cfg.precisions):
        first = [Step(changed(cfg, precision=p), device).forward_backward()["total"].item() for p in ("fp32", "bf16")]
        row = {"what": "ours, bf16 / fp32", "ratio": ratio(best["ours", "fp32"], best["ours", "bf16"])}
        rows.append(row | {"losses_differ_by": abs(first[1] / first[0] - 1)})
    show(f"versus: {cfg.size}, batch {cfg.batch}, 192x192, mask ratio {cfg.mask_ratio}, fused AdamW", rows)


TABLES = {
    "step": table_step, "parts": table_parts, "versus": table_versus, "data": table_data, "masks": table_masks,
    "start": table_start, "generate": table_generate, "scaling": table_scaling, "memory": table_memory,
    "puppet": table_puppet,
}  # fmt: skip


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in TABLES:
        print(f"{__doc__}\nfirst word: one of {', '.join(TABLES)}", file=sys.stderr)
        sys.exit(2)
    cfg = read_config(KEYS, __doc__, sys.argv[2:])
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    rank, world, device = start_ranks(cfg.device, cfg.precision)
    if cfg.precision == "auto":
        with autocast(device, "auto"):
            cfg.precision = "bf16" if torch.is_autocast_enabled(device.type) else "fp32"
    if rank == 0:
        print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {device}, clock {cfg.clock}")
    TABLES[sys.argv[1]](cfg, rank, world, device)


if __name__ == "__main__":
    run_stage(main)
