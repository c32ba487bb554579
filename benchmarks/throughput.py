"""Speed and memory, measured side by side with what people would use instead. One table per command:

  python benchmarks/throughput.py step        the training step alone, the data pipeline alone, both together
  python benchmarks/throughput.py parts       where a step's time goes; under torchrun also communication
  python benchmarks/throughput.py versus      our MAE setting and transformers.ViTMAEForPreTraining; bf16 and float32
  python benchmarks/throughput.py data        our picture pipeline and torchvision's PIL one, one core
  python benchmarks/throughput.py masks       part-guided masks of 4,096 pictures and the same in a Python loop
  python benchmarks/throughput.py start       pretrain.py's start to its first step on 600 k annotations, and its memory
  python benchmarks/throughput.py generate    our diffusion setting and the plain diffusers call, random weights
  python benchmarks/throughput.py scaling     batch, pictures per pose, ranks, contrastive terms; 8 and 64 GPUs on paper
  python benchmarks/throughput.py memory      bytes by batch, with and without checkpoint_activations; the logits
  python benchmarks/throughput.py puppet      pictures/s of the offline generator

All keys of pretrain.py may follow (size=base batch=512 precision=bf16 device=cuda, --cfg configs/x.yaml), and those of
KEYS below; `--help` lists them. Prints a table for people and one JSON line per row for programs.
Candidates of one table take turns (A B A B); figures are medians, ratios are medians of the rounds' own ratios: what
else the machine does slows all of them alike. Nothing here is a test: no figure makes this script fail.
"""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import data  # noqa: E402
import generate  # noqa: E402
import model as ours  # noqa: E402
import pretrain  # noqa: E402
from common import Key, autocast, parameter_groups, read_config, run_stage, seed_all, start_ranks  # noqa: E402
from losses import alignment_loss, multi_positive_loss  # noqa: E402

KEYS = pretrain.KEYS | dict(
    size=Key("small", "encoder size", choices=tuple(ours.SIZES)),
    batch=Key(32, "pictures in a global batch", low=1),
    pictures_per_pose=Key(4, "P: pictures of one pose in a batch", low=1),
    rounds=Key(5, "turns of each candidate", low=1),
    seconds=Key(1.0, "a candidate's turn repeats its work for at least so long", low=0),
    clock=Key("wall", "cpu: this process's processor time, for a machine that others use", choices=("wall", "cpu")),
    threads=Key(0, "CPU threads; 0: torch's own choice", low=0),
    precisions=Key(["fp32", "bf16"], "versus: precisions to compare"),
    compiled=Key([], "versus: who is also tried compiled, of ours and theirs"),
    annotation_count=Key(600_000, "start: annotations", low=100),
    pictures=Key(512, "data, step: drawn pictures to read, where annotations= names none", low=8),
    ranks=Key([1, 2], "scaling: processes", of=int, low=1),
    batches=Key([8, 16, 32, 64], "scaling, memory, generate: batches", of=int, low=1),
    bandwidth=Key(50.0, "scaling on paper: GB/s each rank sends and receives (50: a 400 Gb/s card per GPU)", low=0.001),
)


# -------------------------------------------------------------------------------------------- clock, ceilings, output


def measure(cfg, candidates, device=torch.device("cpu")):
    """{name: function} → {name: [seconds per call, one per round]}; the candidates take turns."""
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
        repeats[name] = max(1, round(cfg.seconds / max(turn(function, 1), 1e-6)))
    seconds = {name: [] for name in candidates}
    for _ in range(cfg.rounds):
        for name, function in candidates.items():
            seconds[name].append(turn(function, repeats[name]))
    return seconds


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(a, b):
    """Median over the rounds of a / b."""
    return statistics.median(x / y for x, y in zip(a, b))


def ceiling(device, precision):
    """→ (a large matrix product to be timed, its FLOP): the most the machine's library reaches."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return lambda: a @ b, 2 * n**3


def flops(function):
    """FLOP of the matrix products of one call, attention included, as executed (a recomputation counts)."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def show(title, rows):
    """A table for people, then one JSON line per row for programs. Rows are dicts and may have different columns."""
    names = list(dict.fromkeys(name for row in rows for name in row))

    def cell(value):
        return f"{value:,.4g}" if isinstance(value, float) and value < 1000 else f"{value:,.0f}" if isinstance(
            value, (int, float)) and not isinstance(value, bool) else str(value)  # fmt: skip

    table = [names] + [[cell(row.get(name, "")) for name in names] for row in rows]
    widths = [max(len(line[c]) for line in table) for c in range(len(names))]
    print(f"\n{title}")
    for line in table:
        print("  ".join(text.ljust(w) if c == 0 else text.rjust(w) for c, (text, w) in enumerate(zip(line, widths))))
    for row in rows:
        print(json.dumps({"table": title.split(":")[0], **row}))


# ----------------------------------------------------------------------------------------------------- training steps


class Step:
    """A training step as pretrain.py's loop makes it: normalise, mask, forward, backward, clip, AdamW, figures."""

    def __init__(self, cfg, device, rank=0, world=1):
        self.cfg, self.device, self.rank, self.world = cfg, device, rank, world
        seed_all(cfg.seed)
        self.model = pretrain.build_model(cfg).to(device)
        self.optimizer = adamw(self.model, cfg)
        if cfg.compile:
            self.model.compile()
        self.runner = DistributedDataParallel(self.model, gradient_as_bucket_view=True) if world > 1 else self.model
        B = cfg.batch // world
        keypoints = torch.rand(B, 17, 3) * torch.tensor([cfg.width, cfg.height, 3.0])
        keypoints[..., 2].floor_()  # 0 missing, 1 hidden, 2 visible
        pose_id = (torch.arange(B) + rank * B) // cfg.pictures_per_pose
        images = torch.randint(256, (B, 3, cfg.height, cfg.width), dtype=torch.uint8)
        self.sample = {"image": images, "keypoints": keypoints, "pose_id": pose_id}

    def inputs(self, sample=None):
        values = ((sample or self.sample)[name] for name in ("image", "keypoints", "pose_id"))
        images, keypoints, pose_id = (value.to(self.device, non_blocking=True) for value in values)
        masks = pretrain.draw_masks(self.cfg, keypoints, self.model.encoder.grid, 0, self.rank, self.world)
        return data.normalize(images), masks, pose_id

    def forward(self, sample=None):
        with autocast(self.device, self.cfg.precision):
            return self.runner(*self.inputs(sample))

    def __call__(self, sample=None):
        result = self.forward(sample)
        result["total"].backward()
        norm = update(self.model, self.optimizer)
        return pretrain.Figures(0, 0.0, result, norm, None)

    def forward_backward(self):
        self.forward()["total"].backward()


def adamw(model, cfg):
    groups = parameter_groups(model, cfg.weight_decay)
    return torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, cfg.beta2), fused=True)


def update(model, optimizer):
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def changed(cfg, **values):
    return SimpleNamespace(**(vars(cfg) | values))


def table_step(cfg, rank, world, device):
    """Goals: both together / slower of the two ≥ .95; ViT-S float32 on the CPU ≥ 80 % of the ceiling."""
    step = Step(cfg, device, rank, world)
    work = flops(step.forward_backward)
    product, product_work = ceiling(device, cfg.precision)
    plain, plain_work = ceiling(device, "fp32")
    candidates = {"step": step, "ceiling": product, "float32 ceiling": plain}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = measure(cfg, candidates, device)
    t, c = statistics.median(seconds["step"]), statistics.median(seconds["ceiling"])
    row = {"what": f"{cfg.size} {cfg.precision} batch {cfg.batch} {cfg.height}x{cfg.width}, step alone"}
    row |= {"pictures_per_s": cfg.batch / t, "ms": 1e3 * t, "GFLOP_per_picture": work * world / cfg.batch / 1e9}
    row |= {"GFLOP_per_s": work / t / 1e9, "ceiling_GFLOP_per_s": product_work / c / 1e9}
    row |= {"share_of_ceiling": work / product_work * ratio(seconds["ceiling"], seconds["step"])}
    if device.type == "cpu" and cfg.precision != "fp32":
        row |= {"share_of_float32_ceiling": work / plain_work * ratio(seconds["float32 ceiling"], seconds["step"])}
    row |= {"peak_memory_GB": peak_memory(step, device) / 1e9}
    rows = [row]
    if world == 1 and cfg.clock == "wall":
        rows += together(cfg, step, device)
    if rank == 0:
        show("step: training alone, data alone, both together", rows)


def peak_memory(step, device):
    """CUDA: the allocator's peak so far. CPU: what tensors hold at most during a step, counted by the dispatcher."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with PeakMemory(*state_of(step.model, step.optimizer)) as memory:
        step()
    return memory.peak


def together(cfg, step, device, steps=8):
    """A fresh loader each time, its first batch untimed (it starts the workers)."""
    with tempfile.TemporaryDirectory() as folder:
        people = read_sets(cfg, folder)
        dataset = data.PretrainPictures(people, (cfg.height, cfg.width), cfg.seed, cfg.box_padding, cfg.augmentation)
        batches = data.PoseBatches(dataset, cfg.batch, cfg.pictures_per_pose, [], cfg.seed)

        def run(consume, source):
            source = iter(source)
            consume(next(source))
            wait(device)
            start = time.perf_counter()
            for _, sample in zip(range(steps), source):
                consume(sample)
            wait(device)
            return (time.perf_counter() - start) / steps

        def loader():
            pin = device.type == "cuda"
            return DataLoader(dataset, batch_sampler=batches.run(0, steps + 1), num_workers=cfg.workers, pin_memory=pin)

        seconds = {"step alone, beside the loader": [], "data alone": [], "both together": []}
        for _ in range(cfg.rounds):
            seconds["step alone, beside the loader"].append(run(step, [step.sample] * (steps + 1)))
            seconds["data alone"].append(run(lambda sample: None, loader()))
            seconds["both together"].append(run(step, loader()))
    slower = [max(a, b) for a, b in zip(seconds["step alone, beside the loader"], seconds["data alone"])]
    rows = [{"what": name, "pictures_per_s": cfg.batch / statistics.median(s)} for name, s in seconds.items()]
    rows[1]["what"] = f"data alone, {cfg.workers} workers"
    rows[2]["together_to_slower"] = ratio(slower, seconds["both together"])
    return rows


def table_parts(cfg, rank, world, device):
    """Each part forward and backward on its own. Goals: masks ≤ 1 %, losses ≤ 3 % of the step."""
    step = Step(cfg, device, rank, world)
    model, precision = step.model, cfg.precision
    images, masks, pose_id = step.inputs()
    keypoints = step.sample["keypoints"].to(device)
    with autocast(device, precision):
        order = torch.cat(masks).to(torch.uint8).argsort(dim=1, stable=True)
        visible, masked = order[:, : model.n_visible], order[:, model.n_visible :]
        tokens = model.encoder(images, visible).detach().requires_grad_()
        pred = model.decoder(tokens, visible, masked).detach().requires_grad_()

    def part(forward, *inputs):
        def run():
            with autocast(device, precision):
                out = forward(*inputs)
            out.backward(out.detach())
            step.optimizer.zero_grad(set_to_none=True)

        return run

    def losses():  # the method itself, with encoder and decoder replaced by what they gave
        encoder, decoder = model.encoder.forward, model.decoder.forward
        model.encoder.forward, model.decoder.forward = lambda *_: tokens, lambda *_: pred
        try:
            with autocast(device, precision):
                result = model(images, masks, pose_id)
            result["total"].backward()
            pretrain.Figures(0, 0.0, result, result["total"], None)
        finally:
            model.encoder.forward, model.decoder.forward = encoder, decoder

    step.forward_backward()
    gradients = [(p, p.grad) for p in model.parameters() if p.grad is not None]

    def optimiser():
        for parameter, gradient in gradients:
            parameter.grad = gradient
        update(model, step.optimizer)

    candidates = {
        "step": step,
        "normalise and mask": step.inputs,
        "masks alone": lambda: [pretrain.draw_masks(cfg, keypoints, model.encoder.grid, 0, rank, world)],
        "encoder": part(model.encoder, images, visible),
        "decoder": part(model.decoder, tokens, visible, masked),
        "losses": losses,
        "optimiser": optimiser,
    }
    if world > 1:

        def silent():
            with step.runner.no_sync():
                step()

        candidates["step without gradient exchange"] = silent
    seconds = measure(cfg, candidates, device)
    whole = seconds["step"]
    rows = [
        {"part": name, "ms": 1e3 * statistics.median(s), "share_of_step": ratio(s, whole)}
        for name, s in seconds.items()
    ]
    if world > 1:
        rows.append({"part": "gradient exchange not hidden", "share_of_step": 1 - rows[-1]["share_of_step"]})
    if rank == 0:
        show(f"parts: {cfg.size} {precision} batch {cfg.batch} on {world} rank(s), forward and backward", rows)


def vit_mae(cfg, device, precision, compiled):
    """transformers' MAE in the same sizes and its best setting (SDPA). → one training step as a function, its model."""
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
    runner = torch.compile(model) if compiled else model
    pictures = torch.randint(256, (cfg.batch, 3, cfg.height, cfg.width), dtype=torch.uint8)

    def forward_backward():
        with autocast(device, precision):
            loss = runner(data.normalize(pictures.to(device, non_blocking=True))).loss
        loss.backward()

    def step():
        forward_backward()
        update(model, optimizer)

    return step, flops(forward_backward)


def table_versus(cfg, rank, world, device):
    """Goals: CPU float32 ≥ 1.05, bf16 ≥ 1.2, GPU bf16 ≥ 1.5 × theirs; CPU bf16 / float32 ≥ 2."""
    mae = dict(height=192, width=192, views=1, mask="random", gamma_align=0.0, gamma_mp=0.0, pose_token=False)
    cfg = changed(cfg, **mae)  # theirs takes square pictures only
    candidates, work = {}, {}
    for precision in cfg.precisions:
        for compiled in (False, True):
            suffix = f" {precision}" + (" compiled" if compiled else "")
            if not compiled or "ours" in cfg.compiled:
                step = Step(changed(cfg, precision=precision, compile=compiled), device)
                candidates["ours" + suffix] = step
                work["ours" + suffix] = flops(Step(changed(cfg, precision=precision), device).forward_backward)
            if not compiled or "theirs" in cfg.compiled:
                candidates["ViTMAE" + suffix], plain = vit_mae(cfg, device, precision, compiled)
                work["ViTMAE" + suffix] = plain
        candidates[f"ceiling {precision}"], work[f"ceiling {precision}"] = ceiling(device, precision)
    losses = {p: Step(changed(cfg, precision=p), device).forward()["total"].item() for p in cfg.precisions}
    seconds = measure(cfg, candidates, device)
    rows = []
    for name, s in seconds.items():
        who, precision = name.split()[:2]
        row = {"what": name, "ms": 1e3 * statistics.median(s), "GFLOP_per_s": work[name] / statistics.median(s) / 1e9}
        if who != "ceiling":
            row |= {"pictures_per_s": cfg.batch / statistics.median(s)}
            row |= {
                "share_of_ceiling": work[name]
                / work[f"ceiling {precision}"]
                * ratio(seconds[f"ceiling {precision}"], s)
            }
        rows.append(row)
    best = {
        (who, p): min((s for n, s in seconds.items() if n.startswith(f"{who} {p}")), key=statistics.median)
        for who in ("ours", "ViTMAE") for p in cfg.precisions
    }  # fmt: skip
    rows += [{"what": f"ours / ViTMAE {p}, best of each", "ratio": ratio(best["ViTMAE", p], best["ours", p])}
             for p in cfg.precisions]  # fmt: skip
    if len(losses) == 2:
        gap = abs(losses["bf16"] - losses["fp32"]) / losses["fp32"]
        faster = ratio(best["ours", "fp32"], best["ours", "bf16"])
        rows.append({"what": "ours bf16 / fp32", "ratio": faster, "first_loss_differs_by": gap})
    show(f"versus: {cfg.size}, batch {cfg.batch}, 192x192, mask ratio {cfg.mask_ratio}, AdamW fused", rows)


# --------------------------------------------------------------------------------------------- pictures, masks, start


def read_sets(cfg, folder):
    """annotations= as pretrain.py reads them, or else a drawn set of cfg.pictures pictures of cfg.height × width."""
    if cfg.annotations:
        return [data.read_people(path, *cfg.images[f : f + 1])[0] for f, path in enumerate(cfg.annotations)]
    keys = dict(out=f"{folder}/set", poses=cfg.pictures // cfg.pictures_per_pose, height=cfg.height, width=cfg.width)
    keys |= dict(pictures_per_pose=cfg.pictures_per_pose, sheet_rows=1)
    run_script("generate.py", keys)
    return [data.read_people(f"{folder}/set/annotations.json")[0]]


def run_script(script, keys, **more):
    command = [sys.executable, str(ROOT / script), *(f"{name}={value}" for name, value in keys.items())]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, **more)


def table_data(cfg, rank, world, device):
    """Goals, JPEG 256 × 128, one core: ≥ 400 pictures/s and ≥ 1.5 × torchvision's PIL pipeline."""
    from PIL import Image
    from torchvision import transforms as T

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        people = read_sets(cfg, folder)
        dataset = data.PretrainPictures(people, (cfg.height, cfg.width), cfg.seed, cfg.box_padding, cfg.augmentation)
        n = min(len(dataset), 256)
        paths = [dataset.name(i) for i in range(n)]
        theirs = T.Compose(
            [
                T.RandomResizedCrop((cfg.height, cfg.width), (0.8, 1), (0.375, 0.667), T.InterpolationMode.BICUBIC),
                T.RandomHorizontalFlip(),
                T.ToTensor(),
                T.Normalize(data.IMAGENET_MEAN, data.IMAGENET_STD),
            ]
        )

        def our_batch():  # normalised as the step does it, so that both end with the same kind of batch
            items = [dataset[(0, i)] for i in range(n)]
            for part in (items[i : i + 32] for i in range(0, n, 32)):
                data.normalize(torch.stack([item["image"] for item in part]))

        def their_batch():
            pictures = (theirs(Image.open(path).convert("RGB")) for path in paths)
            for _ in range(0, n, 32):
                torch.stack([picture for _, picture in zip(range(32), pictures)])

        seconds = measure(cfg, {"ours": our_batch, "torchvision PIL": their_batch})
    rows = [{"what": name, "pictures_per_s": n / statistics.median(s)} for name, s in seconds.items()]
    rows[0]["ratio"] = ratio(seconds["torchvision PIL"], seconds["ours"])
    show("data: read, crop, resize, flip, normalise, stack; one core", rows)


def table_masks(cfg, rank, world, device):
    """Goals: 4,096 part-guided masks in ≤ 200 ms on one CPU core, ≤ 5 ms on a GPU."""
    from test_data import loop_mask, random_people  # the tests' oracle: the same masks, in plain Python

    torch.set_num_threads(1)
    n, grid, few = 4096, (16, 8), 64
    keypoints, noise = random_people(n), torch.rand(n, data.noise_size(grid))
    on_device = keypoints.to(device), noise.to(device)
    rows_np = keypoints.numpy(), noise.numpy()
    generator = torch.Generator(device).manual_seed(0)

    def vectorised():
        return data.part_guided_mask(on_device[0], grid, 0.5, 16, noise=on_device[1])

    def loop():
        return [loop_mask(rows_np[0][i], rows_np[1][i])[0] for i in range(few)]

    same = np.mean([(a == b).all() for a, b in zip(vectorised()[:few].cpu().numpy(), loop())])
    drawn = lambda: data.part_guided_mask(on_device[0], grid, 0.5, 16, generator)  # noqa: E731
    seconds = measure(cfg, {"ours": vectorised, "ours, noise drawn too": drawn, "Python loop": loop}, device)
    seconds["Python loop"] = [s * n / few for s in seconds["Python loop"]]
    rows = [{"what": name, "ms": 1e3 * statistics.median(s)} for name, s in seconds.items()]
    rows[0] |= {"times_faster": ratio(seconds["Python loop"], seconds["ours"]), "same_masks": float(same)}
    show(f"masks: {n} pictures, part-guided, 16x8 patches, {device}, one thread", rows)


def table_start(cfg, rank, world, device):
    """Goals on 600 k annotations: first step within 20 s; ≤ 1 GB, shared by the workers."""
    rows = []
    with tempfile.TemporaryDirectory(dir=cfg.out if Path(cfg.out).is_dir() else None) as folder:
        for n in (1000, cfg.annotation_count):
            big = Path(folder) / str(n)
            many_annotations(big, n)
            keys = dict(
                annotations=big / "annotations.json", out=big / "run", size="tiny", height=64, width=32, batch=80
            )
            keys |= dict(pictures_per_pose=5, workers=2)
            rows.append({"annotations": n, **first_step(keys, big / "run" / "log.jsonl")})
    rows[1]["GB_more_than_small"] = rows[1]["GB_all_processes"] - rows[0]["GB_all_processes"]
    show("start: pretrain.py to its first step, tiny model, 2 workers", rows)


def many_annotations(folder, n, pictures=64):
    """A set of n annotations, five per pose. Its n pictures are hard links to a few small files."""
    from PIL import Image

    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(pictures):
        Image.fromarray(rng.integers(0, 256, (64, 32, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
    for i in range(n):
        os.link(folder / f"{i % pictures}.jpg", folder / "images" / f"{i // 5}_{i % 5}.jpg")
    with open(folder / "annotations.json", "w") as file:
        file.write(f'{{"categories": {json.dumps([generate.CATEGORY])}, "images": [')
        row = '{{"id": {0}, "file_name": "{1}_{2}.jpg", "width": 32, "height": 64}}'
        file.write(",\n".join(row.format(i, i // 5, i % 5) for i in range(n)) + '], "annotations": [')
        points = ", ".join(f"{x:.2f}, {y:.2f}, 2" for x, y in rng.uniform(0, 32, (17, 2)))
        row = '{{"id": {0}, "image_id": {0}, "category_id": 1, "bbox": [0, 0, 32, 64], "pose_id": {1}, "k": {2}, '
        row += '"iscrowd": 0, "area": 2048, "num_keypoints": 17, "keypoints": [' + points + "], "
        row += '"caption": "a person in a red coat walks along a wide street in the evening", "seed": {0}}}'
        file.write(",\n".join(row.format(i, i // 5, i % 5) for i in range(n)) + "]}")


def first_step(keys, log):
    """Start pretrain.py, wait for its first log line, look at its processes' memory, end it."""
    command = [sys.executable, str(ROOT / "pretrain.py"), *(f"{name}={value}" for name, value in keys.items())]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.05)
    seconds = time.perf_counter() - start
    if process.poll() is not None:
        raise RuntimeError("pretrain.py ended before its first step: " + " ".join(command))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    own = kilobytes(f"/proc/{process.pid}/smaps_rollup", "Pss")
    workers = [kilobytes(f"/proc/{child}/smaps_rollup", "Private_Dirty") for child in children]
    shared = sum(kilobytes(f"/proc/{child}/smaps_rollup", "Pss") for child in children)
    peak = kilobytes(f"/proc/{process.pid}/status", "VmHWM")
    ticks = sum(map(int, Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]))
    process.send_signal(signal.SIGINT)
    process.wait()
    cpu = ticks / os.sysconf("SC_CLK_TCK")
    return {"seconds": seconds, "cpu_seconds": cpu, "GB_peak_main": peak / 1e6,
            "GB_all_processes": (own + shared) / 1e6, "GB_private_per_worker": max(workers, default=0) / 1e6}  # fmt: skip


def kilobytes(path, name):
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1.024


# --------------------------------------------------------------------------------------------------------- generation


def random_pipeline(folder, real):
    """Stable Diffusion and T2I-Adapter with random weights, saved as load_painter reads them.

    real: SD 1.4's and the adapter's published sizes; otherwise a small one, to see on a CPU that the harness runs.
    """
    import diffusers
    import transformers

    letters = [chr(c) for c in range(33, 127)]
    vocabulary = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    ids = dict(bos_token_id=len(vocabulary) - 2, eos_token_id=len(vocabulary) - 1, pad_token_id=len(vocabulary) - 1)
    if real:
        text = dict(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12)
        channels, vae_channels, heads, layers, blocks = (320, 640, 1280, 1280), (128, 256, 512, 512), 12, 2, 2
    else:
        text = dict(vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2)
        channels, vae_channels, heads, layers, blocks = (32, 64, 64, 64), (32,) * 4, 4, 1, 1
    pipe = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            block_out_channels=vae_channels, layers_per_block=layers, latent_channels=4, sample_size=512,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        ),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**text, num_attention_heads=heads, **ids)),
        tokenizer=transformers.CLIPTokenizer(
            str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77
        ),
        unet=diffusers.UNet2DConditionModel(
            block_out_channels=channels, layers_per_block=layers, sample_size=64, attention_head_dim=8,
            cross_attention_dim=text["hidden_size"], norm_num_groups=32,
        ),
        scheduler=diffusers.PNDMScheduler(  # as SD 1.4 ships it
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    adapter = diffusers.T2IAdapter(
        in_channels=3, channels=list(channels), num_res_blocks=blocks, downscale_factor=8, adapter_type="full_adapter"
    )
    pipe.save_pretrained(folder / "sd")
    adapter.save_pretrained(folder / "t2i")


def table_generate(cfg, rank, world, device):
    """Goal: our default setting / the plain diffusers call (50 DDIM steps, a condition at a time) ≥ 3 on a GPU."""
    import diffusers

    real = device.type == "cuda"
    argv = ["--cfg", str(ROOT / "configs/generate_coco_t2i.yaml")]
    mine = read_config(generate.KEYS, __doc__, argv)
    side = 512 if real else 64
    seed_all(cfg.seed)
    with tempfile.TemporaryDirectory() as folder:
        random_pipeline(Path(folder), real)
        mine.model, mine.adapter = f"{folder}/sd", f"{folder}/t2i"
        pipe, plain = (generate.load_painter(mine, device) for _ in range(2))
    plain.scheduler = diffusers.DDIMScheduler.from_config(plain.scheduler.config)
    condition = generate.DRAW["keypose"](
        [np.concatenate([np.random.rand(17, 2) * side, np.ones((17, 1))], 1)], (side,) * 2
    )

    def paint(batch, steps=mine.steps):
        these = changed(mine, steps=steps)
        return generate.paint(pipe, these, [condition] * batch, ["a person"] * batch, range(batch), (side, side))

    def plain_call():  # the same precision and size; T2I-Adapter's authors' 50 steps
        return plain(prompt="a person", image=condition, num_inference_steps=50, width=side, height=side).images

    first, second = flops(lambda: paint(1, 1)), flops(lambda: paint(1, 2))
    work = first + (mine.steps - 1) * (second - first)  # a step's work is always the same
    precision = "bf16" if real and mine.precision in ("auto", "bf16") else "fp32"
    product, product_work = ceiling(device, precision)
    candidates = {"plain diffusers call": (plain_call, 1)}
    candidates |= {f"ours, batch {b}": (lambda b=b: paint(b), b) for b in dict.fromkeys([*cfg.batches, mine.batch])}
    memory = {}
    for name, (function, _) in candidates.items():
        if real:
            torch.cuda.reset_peak_memory_stats(device)
            function()
            memory[name] = {"peak_memory_GB": torch.cuda.max_memory_allocated(device) / 1e9}
    seconds = measure(
        cfg, {name: function for name, (function, _) in candidates.items()} | {"ceiling": product}, device
    )
    rows = []
    for name, (_, pictures) in candidates.items():
        each = [s / pictures for s in seconds[name]]
        row = {"what": name, "pictures_per_s": 1 / statistics.median(each)}
        row |= {"to_plain": ratio(seconds["plain diffusers call"], each)}
        if name.startswith("ours"):
            row |= {"share_of_ceiling": work / product_work * ratio(seconds["ceiling"], each)}
        rows.append(row | memory.get(name, {}))
    size = "SD 1.4's and the adapter's sizes" if real else "small sizes: shows that the harness runs, no figure for SD"
    show(f"generate: {size}, {side}x{side}, ours {mine.scheduler} {mine.steps} steps; plain DDIM 50 steps", rows)


def table_puppet(cfg, rank, world, device):
    """Goal: ≥ 300 pictures/s at 128 × 64 on 2 cores, files written."""
    with tempfile.TemporaryDirectory() as folder:
        keys = dict(poses=400, pictures_per_pose=5, height=128, width=64, workers=2, chunk=8)
        rates = []
        for turn in range(cfg.rounds):
            run_script("generate.py", keys | {"out": f"{folder}/{turn}"})
            rates.append(json.loads(Path(folder, str(turn), "summary.json").read_text())["pictures_per_second"])
    show("puppet: generate.py, 128x64, 2 workers", [{"what": "puppet", "pictures_per_s": statistics.median(rates)}])


# --------------------------------------------------------------------------------------------------- scaling, memory


@contextlib.contextmanager
def pretended_ranks(ranks):
    """The losses compute own rows × the columns of so many ranks, without a process group: all ranks hold our rows."""
    import losses

    names = ("gather_with_gradient", "gather_rows_of")
    kept = {name: getattr(losses, name) for name in names}
    try:
        for name in names:
            setattr(losses, name, lambda x, own=kept[name]: own(x).repeat(ranks, *[1] * (x.ndim - 1)))
        yield
    finally:
        for name in names:
            setattr(losses, name, kept[name])


def contrastive_terms(cfg, device, width):
    """Forward and backward of L_align and L_mp for this rank's cfg.batch pictures in two views."""
    a, b, z = (torch.randn(n, width, device=device, requires_grad=True) for n in (cfg.batch, cfg.batch, 2 * cfg.batch))
    pose_id = (torch.arange(cfg.batch, device=device) // cfg.pictures_per_pose).repeat(2)

    def run():
        (alignment_loss(a, b) + multi_positive_loss(z, pose_id)).backward()

    return run


def table_scaling(cfg, rank, world, device):
    """Measured by batch, pictures per pose and ranks; then 8 and 64 GPUs on paper from what was measured."""
    steps = {f"batch {b}": Step(changed(cfg, batch=b), device) for b in cfg.batches}
    steps |= {f"batch {cfg.batch}, P {p}": Step(changed(cfg, pictures_per_pose=p), device) for p in (1, 2, 4)}
    seconds = measure(cfg, steps, device)
    rows = []
    for name, s in seconds.items():
        t, batch = statistics.median(s), steps[name].cfg.batch
        rows.append({"what": name, "ms": 1e3 * t, "pictures_per_s": batch / t})
    show(f"scaling: {cfg.size} {cfg.precision}, one process", rows)

    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    rows = []
    for n in cfg.ranks:  # the same batch on each rank, one thread each: ideal would be the same step time
        keys = {"size": cfg.size, "precision": cfg.precision, "batch": cfg.batch * n, "device": device.type}
        words = [f"{name}={value}" for name, value in keys.items()] + ["threads=1", f"rounds={cfg.rounds}"]
        command = [*launch, f"--nproc_per_node={n}", __file__, "parts", *words]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
        row = {
            "ranks": n,
            "batch": cfg.batch * n,
            "ms": found[0]["ms"],
            "pictures_per_s": cfg.batch * n / found[0]["ms"] * 1e3,
        }
        rows.append(row | {"exchange_not_hidden": found[-1]["share_of_step"] if n > 1 else 0.0})
    show(f"scaling: {cfg.size} {cfg.precision}, ranks on this machine, one thread each", rows)

    own = Step(cfg, device)
    width = own.model.encoder.width
    parameters = sum(p.numel() for p in own.model.parameters() if p.requires_grad)
    terms = contrastive_terms(cfg, device, width)
    rows = []
    for n in (1, 8, 64):
        with pretended_ranks(n):
            s = measure(cfg, {"terms": terms, "step": own}, device)
        exchange = 2 * (n - 1) / n * 4 * parameters / cfg.bandwidth / 1e6  # ring all-reduce of float32 gradients, ms
        # 4 rows of D per picture are gathered (two [CLS], two [POSE]); the gather's backward reduces all of them
        gather = 3 * (n - 1) / n * n * cfg.batch * 4 * width * 4 / cfg.bandwidth / 1e6
        ms = 1e3 * statistics.median(s["step"])
        row = {"GPUs": n, "global_batch": n * cfg.batch, "contrastive_ms": 1e3 * statistics.median(s["terms"])}
        row |= {"step_ms_computing": ms, "gather_ms": gather, "gradient_exchange_ms": exchange}
        # backward (2/3 of the step) hides the gradients' way; the gather waits
        rows.append(row | {"step_ms_on_paper": ms + gather + max(0.0, exchange - ms * 2 / 3)})
    show(f"scaling on paper: {cfg.batch} pictures per rank, {cfg.bandwidth} GB/s each way, {device}", rows)


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


def state_of(model, optimizer):
    moments = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return [*model.parameters(), *model.buffers(), *moments]


def table_memory(cfg, rank, world, device):
    """Goal: ViT-B, batch 256 (two views) in bf16 within 40 GB. Without a GPU counted, not measured."""
    rows = []
    for batch in cfg.batches:
        for recompute in (False, True):
            these = changed(cfg, batch=batch, checkpoint_activations=recompute)
            if device.type == "cuda":
                step = Step(these, device)
                step()
                torch.cuda.reset_peak_memory_stats(device)
                step()
                found = torch.cuda.max_memory_allocated(device)
                del step
            else:
                found = counted_peak(these)
            rows.append({"batch": batch, "checkpoint_activations": recompute, "peak_GB": found / 1e9})
    how = "measured" if device.type == "cuda" else "counted without computing, attention as the fused kernel keeps it"
    show(f"memory: {cfg.size} {cfg.precision}, {cfg.views} views, {cfg.height}x{cfg.width}, {how}", rows)

    rows = []
    for n in (1, 8):  # 4,096 embeddings (2,048 pictures in two views), on one rank and on 8
        terms = contrastive_terms(changed(cfg, batch=2048 // n), torch.device("cpu"), 768)
        with pretended_ranks(n), PeakMemory() as memory:
            terms()
        rows.append({"ranks": n, "own_rows_x_columns": f"{4096 // n} x 4096", "peak_MB": memory.peak / 1e6,
                     "one_float32_matrix_MB": 4096 // n * 4096 * 4 / 1e6})  # fmt: skip
    show("memory: L_align and L_mp of 4,096 embeddings, forward and backward", rows)


def counted_peak(cfg):
    """Peak bytes of the second training step, from tensors without content: no memory, no computing, no device."""
    plain, ours.attention = ours.attention, F.scaled_dot_product_attention
    try:
        with FakeTensorMode():
            step = Step(cfg, torch.device("cpu"))
            N = step.model.encoder.grid[0] * step.model.encoder.grid[1]
            masks = [torch.empty(cfg.batch, N, dtype=torch.bool) for _ in range(cfg.views)]
            images, pose_id = torch.empty(cfg.batch, 3, cfg.height, cfg.width), torch.arange(cfg.batch)

            def once():
                with autocast(step.device, cfg.precision):
                    result = step.model(images, masks, pose_id)
                result["total"].backward()
                update(step.model, step.optimizer)

            once()
            with PeakMemory(*state_of(step.model, step.optimizer), images, *masks) as memory:
                once()
    finally:
        ours.attention = plain
    return memory.peak


TABLES = {name.removeprefix("table_"): f for name, f in list(globals().items()) if name.startswith("table_")}


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in TABLES:
        print(__doc__ + "\nfirst word: one of " + ", ".join(TABLES), file=sys.stderr)
        sys.exit(2)
    cfg = read_config(KEYS, __doc__, sys.argv[2:])
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    rank, world, device = start_ranks(cfg.device)
    if rank == 0:
        print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {device}, clock {cfg.clock}")
    TABLES[sys.argv[1]](cfg, rank, world, device)


if __name__ == "__main__":
    run_stage(main)
