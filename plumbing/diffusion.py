"""Pretrained pipelines for Stage 1, by diffusers: where they come from, and how they run.

Stable Diffusion with a T2I-Adapter [paper], a ControlNet, or alone; samplers, number format, and
which of the painted pictures are refused. `cfg` is generate.py's config.
"""

import contextlib
import os
import re
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch

from plumbing.errors import UserError, and_more, in_a_line

# backend → its Stable Diffusion, and how its pipeline calls the strength of the condition.
MODELS = {
    "t2i_adapter": ("CompVis/stable-diffusion-v1-4", "adapter_conditioning_scale"),  # [paper]
    "controlnet": ("stable-diffusion-v1-5/stable-diffusion-v1-5", "controlnet_conditioning_scale"),
    "text": ("stable-diffusion-v1-5/stable-diffusion-v1-5", None),  # [StableRep]
}

SAMPLERS = {  # diffusers' class, and how it spreads the steps over time (its own default)
    "ddim": ("DDIMScheduler", "leading"),
    "dpm++": ("DPMSolverMultistepScheduler", "linspace"),
    "euler": ("EulerDiscreteScheduler", "linspace"),
    "pndm": ("PNDMScheduler", "leading"),
}


def load_painter(cfg, device):
    """The diffusers pipeline with its adapter, as the config asks, on `device`."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    # Weights that come pickled, not as safetensors, are read with weights_only by both libraries.
    adapter = None
    if cfg.backend == "t2i_adapter":
        adapter = whole_model(cfg.adapter, "adapter", diffusers.T2IAdapter)
        load = partial(diffusers.StableDiffusionAdapterPipeline.from_pretrained, adapter=adapter)
    elif cfg.backend == "text":
        load = diffusers.StableDiffusionPipeline.from_pretrained
    else:
        adapter = whole_model(cfg.adapter, "adapter", diffusers.ControlNetModel)
        kind = diffusers.StableDiffusionControlNetPipeline
        load = partial(kind.from_pretrained, controlnet=adapter)
    # Part by part: a pipeline does not say which tensors it lacked.
    kinds = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    kinds["text_encoder"] = transformers.CLIPTextModel
    parts = {p: whole_model(cfg.model, "model", kinds[p], subfolder=p) for p in kinds}
    check_family(cfg, parts["unet"], adapter)
    pipe = from_folder_or_hub(cfg.model, "model", partial(load, **parts))
    pipe.scheduler = sampler(cfg.scheduler, pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    # Pictures are decoded one by one: at once, each further one of 512² takes .7 GB in float32.
    pipe.vae.enable_slicing()
    torch.backends.cudnn.deterministic = True
    return pipe.to(device, precision(cfg, device))


def say_cut(tokenizer, prompts):
    """A line on stderr where prompts, {image id: text}, are longer than the text encoder reads."""
    longest, texts = tokenizer.model_max_length, list(prompts.values())
    ids = tokenizer(texts).input_ids
    long = [text for text, own in zip(texts, ids) if len(own) > longest]
    if long and os.environ.get("RANK", "0") == "0":
        what = f"{len(long)} of {len(texts)} prompts are cut after {longest - 2} tokens"
        print(f"{what}, e.g. “{long[0]:.60} …”", file=sys.stderr)


def check_family(cfg, unet, adapter):
    """UserError for SDXL's networks, and for a ControlNet of another Stable Diffusion than unet."""
    if unet.config.addition_embed_type:
        what = f"model={cfg.model} is SDXL, which is not supported"
        raise UserError(f"{what}; take Stable Diffusion 1")
    if adapter is None:
        return
    words = unet.config.cross_attention_dim
    fits = adapter.config.get("cross_attention_dim", words) == words  # a T2I-Adapter has none
    if not fits or adapter.config.get("adapter_type") == "full_adapter_xl":
        raise UserError(f"adapter={cfg.adapter} is of another Stable Diffusion than {cfg.model}")


def whole_model(name, key, kind, **where):
    """A model of class `kind`; UserError where its file lacks tensors, which both libraries would
    fill at random. where: subfolder=, of a model in parts."""
    load = partial(kind.from_pretrained, output_loading_info=True, **where)
    model, found = from_folder_or_hub(name, key, load)
    missing = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
    if missing:
        what = f"lacks {missing[0]}{and_more(missing)} of a {kind.__name__}"
        raise UserError(f"{key}={name} {what}: a file of another kind, or cut off")
    return model


def from_folder_or_hub(name, key, load):
    """`load(name, …)` from a folder, the hub's cache or the hub; UserError says how to get it."""
    import huggingface_hub

    warnings.simplefilter("ignore")  # libraries about each other, also while they are used
    if Path(name).is_dir() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        try:
            return load(name, local_files_only=True)
        except Exception as error:  # diffusers, transformers and safetensors raise many kinds
            why = in_a_line(error)
            raise UserError(f"{key}={name}: cannot load this folder: {why}") from None
    with contextlib.suppress(OSError, ValueError):  # not in the cache, or only a part of it
        return load(name, local_files_only=True)
    get = f"download it once with `hf download {name}`, or give a local folder: {key}=FOLDER"
    try:
        # Quick and plain, where loading would try again for half a minute.
        huggingface_hub.HfApi().auth_check(name)
        return load(name)
    except huggingface_hub.errors.GatedRepoError:
        why = "is gated: accept its licence on its hub page, then"
    except huggingface_hub.errors.RepositoryNotFoundError:
        why = "is neither a folder nor a model on the hub (or it is private);"
    except Exception as error:
        why = f"is not on this machine and the hub gave none ({in_a_line(error, 120)});"
    raise UserError(f"{key}={name} {why} {get}")


def precision(cfg, device):
    """The pipeline's dtype. auto: bf16 where a GPU multiplies it in hardware (from Ampere on), fp16
    on an older one (V100, T4), float32 on the CPU.

    fp16 overflows beyond 65,504: `accepted` refuses what comes of it.
    """
    chosen = cfg.precision
    if chosen == "auto" and device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        chosen = "bf16" if native else "fp16"
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return kinds.get(chosen, torch.float32)


def sampler(name, config):
    """The sampler `name` for a model whose own scheduler has this config.

    The spacing is stated: a folder saved by a newer diffusers names the spacing of its own
    scheduler, and with DDIM's, 20 steps of dpm++ end five times as far from the exact picture. Also
    stated is what only Stable Diffusion's own folders say: latents are not clipped, and PNDM begins
    without Runge-Kutta steps.
    """
    import diffusers

    kind, spacing = SAMPLERS[name]
    stated = dict(timestep_spacing=spacing, clip_sample=False, skip_prk_steps=True)
    return getattr(diffusers, kind).from_config(config, **stated)


def painted_size(size, resolution):
    """(N, 2) w, h → painted: about resolution² px, shape kept, multiples of 64 [T2I-Adapter]."""
    size = np.asarray(size, np.float64)
    scale = resolution / np.sqrt(size.prod(-1, keepdims=True))
    return np.maximum(64, 64 * np.round(size * scale / 64)).astype(int)


def accepted(pipe, result):
    """What the pipeline painted → PIL pictures; None for one that must not be stored.

    result: as of output_type="np", (n, H, W, 3) in [0, 1]. Refused: what is not finite (an overflow
    in fp16; in a PIL picture a NaN would be a black pixel), and black ones, which is what the
    safety checker leaves behind.
    """
    flagged = result.nsfw_content_detected or [False] * len(result.images)
    pictures = []
    for picture, bad in zip(result.images, flagged):
        good = not bad and np.isfinite(picture).all() and picture.max() > 0.5 / 255
        pictures.append(pipe.numpy_to_pil(picture)[0] if good else None)
    return pictures
