"""Tables about what comes before the training step: pictures, masks, the start of a run, generation, the puppet."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from timing import ceiling, flops, measure, median, ratio, show

import data
import generate
import masks
from common import WEIGHTS, seed_all
from formats import coco
from plumbing import diffusion
from plumbing.config import read_config

ROOT = Path(__file__).resolve().parent.parent


def read_sets(cfg, folder):
    """annotations= as pretrain.py reads them, or else a set of cfg.pictures drawn ones of cfg.height × cfg.width."""
    if cfg.annotations:
        return [coco.read_people(path, *cfg.images[f : f + 1])[0] for f, path in enumerate(cfg.annotations)]
    keys = dict(out=f"{folder}/set", poses=cfg.pictures // cfg.pictures_per_pose, height=cfg.height, width=cfg.width)
    run_script("generate.py", keys | dict(pictures_per_pose=cfg.pictures_per_pose, sheet_rows=1))
    return [coco.read_people(f"{folder}/set/annotations.json")[0]]


def run_script(script, keys):
    command = [sys.executable, str(ROOT / script), *(f"{name}={value}" for name, value in keys.items())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script} ended with code {done.returncode}: {done.stderr[-500:]}")


def table_data(cfg, rank, world, device):
    """Goals, JPEG 256 × 128, one core: ≥ 400 pictures/s and ≥ 1.5 × torchvision's PIL pipeline."""
    from torchvision import transforms as T

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        people, size = read_sets(cfg, folder), (cfg.height, cfg.width)
        dataset = data.PretrainPictures(people, size, cfg.seed, cfg.box_padding)
        n = min(len(dataset), 256)
        paths = [dataset.name(i) for i in range(n)]
        crop = T.RandomResizedCrop(size, (0.8, 1), (0.375, 0.667), T.InterpolationMode.BICUBIC)
        normalize = T.Normalize(data.IMAGENET_MEAN, data.IMAGENET_STD)
        transform = T.Compose([crop, T.RandomHorizontalFlip(), T.ToTensor(), normalize])

        def their_pictures():
            for first in range(0, n, 32):
                torch.stack([transform(Image.open(path).convert("RGB")) for path in paths[first : first + 32]])

        def our_pictures(finish=lambda batch: batch):
            for first in range(0, n, 32):
                items = [dataset[(0, i)] for i in range(first, min(n, first + 32))]
                finish(torch.stack([item["image"] for item in items]))

        candidates = {"torchvision PIL": their_pictures, "ours, bytes as the step takes them": our_pictures}
        candidates["ours, normalised on this core too"] = lambda: our_pictures(data.normalize)
        seconds = measure(cfg, candidates, torch.device("cpu"))
    rows = []
    for name, s in seconds.items():
        row = {"what": name, "pictures_per_s": n / median(s)}
        rows.append(row | {"to_torchvision": ratio(seconds["torchvision PIL"], s)})
    show("data: read, crop, resize, flip, stack; one core", rows)


def table_masks(cfg, rank, world, device):
    """Goals: 4,096 part-guided masks in ≤ 200 ms on one CPU core, ≤ 5 ms on a GPU."""
    from test_data import loop_mask, random_people  # the tests' oracle: the same masks in plain Python

    torch.set_num_threads(1)
    n, few, grid = 4096, 64, (16, 8)
    keypoints, noise = random_people(n), torch.rand(n, masks.noise_size(grid))
    points, numbers = keypoints.to(device), noise.to(device)
    generator = torch.Generator(device).manual_seed(0)

    def ours():
        return masks.part_guided_mask(points, grid, 0.5, 16, noise=numbers)

    def ours_with_noise():
        return masks.part_guided_mask(points, grid, 0.5, 16, generator)

    def loop():
        return [loop_mask(p, u)[0] for p, u in zip(keypoints[:few].numpy(), noise[:few].numpy())]

    same = np.mean([(a == b).all() for a, b in zip(ours().cpu().numpy(), loop())])
    seconds = measure(cfg, {"ours": ours, "ours, noise drawn too": ours_with_noise, "Python loop": loop}, device)
    seconds["Python loop"] = [s * n / few for s in seconds["Python loop"]]
    rows = [{"what": name, "ms": 1e3 * median(s)} for name, s in seconds.items()]
    rows[0] |= {"times_faster": ratio(seconds["Python loop"], seconds["ours"]), "same_masks": float(same)}
    show(f"masks: {n} pictures, part-guided, 16x8 patches, {device}, one thread", rows)


def table_puppet(cfg, rank, world, device):
    """Goal: ≥ 300 pictures/s at 128 × 64 on 2 cores, files written."""
    with tempfile.TemporaryDirectory() as folder:
        rates, keys = [], dict(poses=400, pictures_per_pose=5, height=128, width=64, workers=2, chunk=8)
        for turn in range(cfg.rounds):
            run_script("generate.py", keys | {"out": f"{folder}/{turn}"})
            rates.append(json.loads(Path(folder, str(turn), "summary.json").read_text())["pictures_per_second"])
    show("puppet: generate.py, 128x64, 2 workers", [{"what": "puppet", "pictures_per_s": median(rates)}])


# -------------------------------------------------------------------------------------------------- start of a run


def table_start(cfg, rank, world, device):
    """Goals on 600 k annotations: first step within 20 s; ≤ 1 GB, shared by the workers and not copied into each."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for n in (1000, cfg.annotation_count):
            many_annotations(Path(folder, str(n)), n)
            keys = dict(
                annotations=f"{folder}/{n}/annotations.json", out=f"{folder}/{n}/run", size="tiny", device="cpu"
            )
            keys |= dict(height=64, width=32, batch=80, pictures_per_pose=5, workers=2)
            rows.append({"annotations": n, **first_step(keys)})
    for name in ("GB_peak_main", "GB_all_processes", "GB_own_of_a_worker"):
        rows.append({"annotations": f"more for {n:,}: {name}", name: rows[1][name] - rows[0][name]})
    show("start: pretrain.py to its first step, tiny model, 2 workers", rows)


def many_annotations(folder, n, pictures=64):
    """A set of n annotations, five per pose. Its n pictures are hard links to a few small files."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(pictures):
        Image.fromarray(rng.integers(0, 256, (64, 32, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
    for i in range(n):
        os.link(folder / f"{i % pictures}.jpg", folder / "images" / f"{i // 5}_{i % 5}.jpg")
    image = '{{"id": {0}, "file_name": "{1}_{2}.jpg", "width": 32, "height": 64}}'
    points = ", ".join(f"{x:.2f}, {y:.2f}, 2" for x, y in rng.uniform(0, 32, (17, 2)))
    person = (
        '{{"id": {0}, "image_id": {0}, "category_id": 1, "bbox": [0, 0, 32, 64], "pose_id": {1}, "k": {2}, '
        f'"iscrowd": 0, "area": 2048, "num_keypoints": 17, "keypoints": [{points}], '
        '"caption": "a person in a red coat walks along a wide street in the evening", "seed": {0}}}'
    )
    with open(folder / "annotations.json", "w", encoding="utf-8") as file:
        file.write(f'{{"categories": [{json.dumps(data.COCO_CATEGORY)}], "images": [')
        file.write(",\n".join(image.format(i, i // 5, i % 5) for i in range(n)) + '], "annotations": [')
        file.write(",\n".join(person.format(i, i // 5, i % 5) for i in range(n)) + "]}")


def first_step(keys):
    """Start pretrain.py, wait for its first log line, look at the memory of its processes, end it."""
    command = [sys.executable, str(ROOT / "pretrain.py"), *(f"{name}={value}" for name, value in keys.items())]
    log, start = Path(keys["out"], "log.jsonl"), time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.02)
    seconds, proc = time.perf_counter() - start, Path(f"/proc/{process.pid}")
    if process.poll() is not None:
        raise RuntimeError("pretrain.py ended before its first step: " + " ".join(command))
    children = (proc / f"task/{process.pid}/children").read_text().split()
    workers = [Path(f"/proc/{child}/smaps_rollup") for child in children]
    peak, ticks = gigabytes(proc / "status", "VmHWM"), (proc / "stat").read_text().rsplit(")", 1)[1].split()[11:13]
    together = sum(gigabytes(path, "Pss") for path in [proc / "smaps_rollup", *workers])  # shared pages count once
    own = max(gigabytes(path, "Private_Dirty") for path in workers)
    process.send_signal(signal.SIGINT)
    process.wait()
    row = {"seconds": seconds, "cpu_seconds": sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"), "GB_peak_main": peak}
    return row | {"GB_all_processes": together, "GB_own_of_a_worker": own}


def gigabytes(path, name):
    line = next(line for line in path.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024 / 1e9


# ------------------------------------------------------------------------------------------------------- generation


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
    seed_all(WEIGHTS, cfg.seed)
    with tempfile.TemporaryDirectory() as folder:
        random_pipeline(Path(folder), real)
        mine.model, mine.adapter = f"{folder}/sd", f"{folder}/t2i"
        pipe = diffusion.load_painter(mine, device)
    plain = type(pipe)(**pipe.components, requires_safety_checker=False)
    plain.scheduler = diffusers.DDIMScheduler.from_config(plain.scheduler.config)
    condition = diffusion.DRAW["t2i_adapter", "keypose"](
        [np.concatenate([np.random.rand(17, 2) * side, np.ones((17, 1))], 1)], (side,) * 2
    )

    def paint(batch, steps=mine.steps):
        these = SimpleNamespace(**(vars(mine) | {"steps": steps}))
        return diffusion.paint(pipe, these, [condition] * batch, ["a person"] * batch, range(batch), (side, side))

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
        row = {"what": name, "pictures_per_s": 1 / median(each)}
        row |= {"to_plain": ratio(seconds["plain diffusers call"], each)}
        if name.startswith("ours"):
            row |= {"share_of_ceiling": work / product_work * ratio(seconds["ceiling"], each)}
        rows.append(row | memory.get(name, {}))
    size = "SD 1.4's and the adapter's sizes" if real else "small sizes: shows that the harness runs, no figure for SD"
    show(f"generate: {size}, {side}x{side}, ours {mine.scheduler} {mine.steps} steps; plain DDIM 50 steps", rows)
    rows = [
        {"sampler": name, "steps": n, "distance_to_the_end": sampling_error(pipe.scheduler.config, name, n)}
        for name, n in (("ddim", 50), ("dpm++", 10), ("dpm++", 20), ("dpm++", 50))
    ]
    show("generate: what fewer steps cost where the exact noise prediction is known, guidance 7.5", rows)


@torch.no_grad()
def sampling_error(config, name, steps, guidance=7.5, samples=256, side=64):
    """Root mean square distance of a sampler's pictures to those of 999 DDIM steps from the same noise.

    The pictures' law is known: 256 points of `side` numbers (unit variance, amplitudes falling like a photograph's),
    each with normal noise of .1 around it. So the noise prediction has a closed form; the condition allows 16 of them.
    """
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(256, side, generator=generator, dtype=torch.float64) / torch.arange(1, side + 1)
    centres *= side**0.5 / centres.square().sum(1).mean().sqrt()
    noise = torch.randn(samples, side, generator=generator, dtype=torch.float64)

    def predicted(x, signal, rest, points):
        """E[noise | x] for x = signal · picture + rest · noise."""
        variance = (0.1 * signal) ** 2 + rest**2
        weight = (-torch.cdist(x, signal * points).square() / (2 * variance)).softmax(1)
        return rest * (x - signal * weight @ points) / variance

    def run(name, steps):
        scheduler = diffusion.sampler(name, {**config, "clip_sample": False})  # as the file of SD 1.4 says
        scheduler.set_timesteps(steps)
        x = noise
        for t in scheduler.timesteps:
            signal, rest = scheduler.alphas_cumprod[t].sqrt(), (1 - scheduler.alphas_cumprod[t]).sqrt()
            free, asked = (predicted(x, signal, rest, points) for points in (centres, centres[:16]))
            x = scheduler.step(free + guidance * (asked - free), t, x).prev_sample
        return x

    return (run(name, steps) - run("ddim", 999)).square().mean().sqrt().item()
