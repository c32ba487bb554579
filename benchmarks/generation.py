"""The table `generate`: our diffusion setting beside the plain diffusers call, random weights."""

import json
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import torch
from timing import measure, ratio

import common
from drawing.skeletons import draw_keypose
from plumbing.config import read_config

CONFIG = Path(__file__).resolve().parent.parent / "configs/generate_coco_t2i.yaml"


def networks(D=768, channels=(320, 640, 1280, 1280), vae=(128, 256, 512, 512)):
    """→ U-Net, autoencoder and T2I-Adapter with random weights, at the published sizes of SD 1.4
    and the adapter, most of which are diffusers' defaults."""
    import diffusers

    sizes = dict(block_out_channels=channels, cross_attention_dim=D, sample_size=64)
    unet = diffusers.UNet2DConditionModel(**sizes)
    autoencoder = diffusers.AutoencoderKL(
        block_out_channels=vae, layers_per_block=2,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    )  # fmt: skip
    return unet, autoencoder, diffusers.T2IAdapter(channels=list(channels))


def random_pipeline(folder, real):
    """Stable Diffusion and T2I-Adapter with random weights, in the folders that are returned.

    real: at the published sizes; otherwise small, which shows on a CPU that the table runs.
    """
    import diffusers
    import transformers

    words = [chr(c) + end for c in range(33, 127) for end in ("", "</w>")]
    words += ["<|startoftext|>", "<|endoftext|>"]
    files = [folder / "vocab.json", folder / "merges.txt"]
    files[0].write_text(json.dumps({word: i for i, word in enumerate(words)}))
    files[1].write_text("#version: 0.2\n")
    D, depth = (768, 12) if real else (64, 2)
    unet, vae, adapter = networks() if real else networks(D, (32, 64, 64, 64), (32, 32, 32, 32))
    layers = dict(num_hidden_layers=depth, num_attention_heads=D // 64)
    text = transformers.CLIPTextConfig(hidden_size=D, intermediate_size=4 * D, **layers)
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae, unet=unet, text_encoder=transformers.CLIPTextModel(text),
        tokenizer=transformers.CLIPTokenizer(*map(str, files), model_max_length=77),
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder / "sd")
    adapter.save_pretrained(folder / "t2i")
    return str(folder / "sd"), str(folder / "t2i")


def table_generate(cfg, ranks):
    """Goal: our default / the plain call (50 steps of DDIM, a condition at a time) ≥ 3 on a GPU."""
    import diffusers

    import generate
    from plumbing import diffusion

    device, real = ranks.device, ranks.device.type == "cuda"
    mine, side = read_config(generate.KEYS, __doc__, ["--cfg", str(CONFIG)]), 512 if real else 64
    common.seed_all(common.WEIGHTS, cfg.seed)
    with tempfile.TemporaryDirectory() as folder:
        mine.model, mine.adapter = random_pipeline(Path(folder), real)
        pipe = diffusion.load_painter(mine, device)
    plain = type(pipe)(**pipe.components, requires_safety_checker=False)
    plain.scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
    plain.set_progress_bar_config(disable=True)
    person = np.concatenate([np.random.rand(17, 2) * side, np.ones((17, 1))], 1)
    condition = draw_keypose([person], (side, side))

    def paint(batch):
        return generate.paint(pipe, mine, [condition] * batch, ["a person"] * batch, range(batch))

    def plain_call():  # the same precision and size; T2I-Adapter's authors' 50 steps
        size = dict(width=side, height=side)
        return plain(prompt="a person", image=condition, num_inference_steps=50, **size).images

    candidates, pictures = {"plain diffusers call": plain_call}, {"plain diffusers call": 1}
    for batch in [*cfg.batches, mine.batch]:
        candidates[f"ours, batch {batch}"] = lambda batch=batch: paint(batch)
        pictures[f"ours, batch {batch}"] = batch
    seconds, rows = measure(cfg, candidates, ranks), {}
    for name, function in candidates.items():
        each = [s / pictures[name] for s in seconds[name]]
        faster = ratio(seconds["plain diffusers call"], each)
        rows[name] = dict(pictures_per_s=1 / median(each), to_plain=faster)
        if real:
            torch.cuda.reset_peak_memory_stats(device)
            function()
            rows[name]["peak_GB"] = torch.cuda.max_memory_allocated(device) / 1e9
    size = "SD 1.4's sizes" if real else "small sizes, which say nothing of SD"
    return f"generate: {size}, {side}x{side}, {mine.scheduler} {mine.steps} steps, DDIM 50", rows
