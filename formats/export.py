"""An encoder for others: a folder that timm or transformers loads by its own call, or one of ours.

  python formats/export.py weights=runs/demo/pretrain/encoder.safetensors to=timm out=my_encoder

Written to `out`, a new folder: the weights, what the library must know about them, and a model card
(README.md) for the hub. All tokens stay: timm has [POSE] as its register token, transformers as
DeiTModel's distillation token. An encoder without [POSE] becomes a ViTModel. Back again: the
weights' file in such a folder is one for every init=, encoder= and weights= here.
"""

import json
import os
import shutil
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from safetensors.torch import save as to_safetensors

from formats.transformers_names import to_transformers
from formats.weights import ENCODER, encoder_meta, meta_of, read_encoder
from model import EPS, IMAGENET_MEAN, IMAGENET_STD
from plumbing.config import Key, read_config
from plumbing.errors import UserError, run_stage

LIBRARIES = ("timm", "transformers", "ours")
KEYS = dict(
    out=Key("exported", "the folder to write, a new one"),
    weights=Key(None, "encoder.safetensors of a run, or others' as for init of pre-training"),
    to=Key("timm", "the library that shall load it", choices=LIBRARIES),
    height=Key(256, "input height, where weights= does not say it", "[HAP]", low=16),
    width=Key(128, "input width, where weights= does not say it", "[HAP]", low=16),
) | {name: ENCODER[name] for name in ("size", "patch", "pose_token", "checkpoint_activations")}

# timm's and DeiT's names of our sizes; what differs stands in the config.
TIMM = {"tiny": "vit_tiny_patch16_224", "small": "vit_small_patch16_224"}
TIMM |= {"base": "vit_base_patch16_224", "large": "vit_large_patch16_224"}

# What both libraries have a place for; a fork's further tokens they would drop without a word.
PARTS = ("cls_token", "pose_token", "pos_embed", "patch_embed", "blocks", "norm")

LOAD = {
    "timm": """import timm, torch

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or "hf-hub:NAME/REPOSITORY"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.no_grad():
    tokens = model.forward_features(transform(picture)[None])  # picture: PIL, RGB
""",
    "transformers": """import torch
from transformers import AutoImageProcessor, MODEL

processor = AutoImageProcessor.from_pretrained("FOLDER")
model = MODEL.from_pretrained("FOLDER", add_pooling_layer=False).eval()
with torch.no_grad():
    tokens = model(**processor(picture, return_tensors="pt")).last_hidden_state  # picture: PIL, RGB
""",
    "ours": """import numpy as np, torch
from model import load_encoder, normalize  # model.py and losses.py of the implementation

model = load_encoder("FOLDER/encoder.safetensors")
pixels = torch.from_numpy(np.array(picture.resize(model.image_size[::-1])))  # picture: PIL, RGB
with torch.no_grad():
    tokens = model(normalize(pixels.permute(2, 0, 1)[None]))
""",
}


def main():
    cfg = read_config(KEYS, __doc__)
    if not cfg.weights:
        raise UserError("weights= names no file; give an encoder.safetensors, or others' weights")
    out = Path(cfg.out)
    if out.exists():
        raise UserError(f"{out} exists; choose another out=")
    vit, about = read_encoder(cfg, cfg.weights)
    if vit.semantic_weight is not None and cfg.to != "ours":
        what = f"{cfg.weights} has SOLIDER's controllers"
        raise UserError(f"{what}, which to={cfg.to} cannot hold; take to=ours")
    unknown = [name for name in vit.state_dict() if name.split(".")[0] not in PARTS]
    if unknown and cfg.to != "ours":
        what = f"{unknown[0]} of {cfg.weights} has no place in {cfg.to}'s model"
        raise UserError(f"{what}; take to=ours, and your model.py with it")
    meta = meta_of(vit) | {"training": encoder_meta(cfg.weights).get("training", "")}
    files = {"timm": timm_files, "transformers": transformers_files, "ours": our_files}[cfg.to](vit)
    # Two entries, in an order that changes from file to file; transformers asks for the first one.
    said = json.dumps({name: str(value) for name, value in meta.items()})
    tensors = files.pop("tensors")
    name = "encoder.safetensors" if cfg.to == "ours" else "model.safetensors"
    files[name] = to_safetensors(tensors, {"format": "pt", "encoder": said})
    files["README.md"] = model_card(vit, meta, Path(cfg.weights).name, cfg.to).encode()
    write_folder(out, files)
    print(f"wrote {out}: {', '.join(sorted(files))}; {about}")


def write_folder(out, files):
    """{name: bytes} → a new folder, whole or not at all."""
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        for name, content in files.items():
            (part / name).write_bytes(content)
        part.rename(out)
    except OSError:
        shutil.rmtree(part)
        raise


def as_json(value):
    return (json.dumps(value, indent=2) + "\n").encode()


# ------------------------------------------------------------------------------------- what is said


def our_files(vit):
    return {"tensors": {name: value.contiguous() for name, value in vit.state_dict().items()}}


def timm_files(vit):
    """timm.create_model: a VisionTransformer with class_token, reg_tokens=1 and no_embed_class."""
    register = int(vit.pose_token is not None)
    tensors = our_files(vit)["tensors"]
    if register:
        tensors["reg_token"] = tensors.pop("pose_token")
    (H, W), heads = vit.image_size, vit.blocks[0].attn.heads
    model = dict(img_size=[H, W], patch_size=vit.patch_size, embed_dim=vit.width, depth=vit.depth)
    model |= dict(num_heads=heads, class_token=True, reg_tokens=register, no_embed_class=True)
    pictures = dict(mean=IMAGENET_MEAN, std=IMAGENET_STD, interpolation="bicubic")
    # The whole picture, resized to these sides.
    pictures |= dict(input_size=[3, H, W], fixed_input_size=True, crop_pct=1.0, crop_mode="squash")
    names = dict(first_conv="patch_embed.proj", classifier="head", num_classes=0)
    config = dict(architecture=TIMM[meta_of(vit)["size"]], num_classes=0, global_pool="token")
    config |= dict(num_features=vit.width, pretrained_cfg=pictures | names, model_args=model)
    return {"tensors": tensors, "config.json": as_json(config)}


def transformers_files(vit):
    """DeiTModel.from_pretrained, or ViTModel.from_pretrained for an encoder without [POSE].

    Dinov2WithRegistersModel would hold both tokens too, but it lays positions out as a square, and
    our grid is none: its first call fails. ViTModel has no place for [POSE], to which all other
    tokens look: without it these change too.
    """
    H, W = vit.image_size
    model = "DeiTModel" if vit.pose_token is not None else "ViTModel"
    config = dict(architectures=[model], model_type=model.lower().removesuffix("model"))
    config |= dict(hidden_size=vit.width, num_hidden_layers=vit.depth)
    config |= dict(num_attention_heads=vit.blocks[0].attn.heads, intermediate_size=4 * vit.width)
    config |= dict(hidden_act="gelu", layer_norm_eps=EPS, qkv_bias=True, num_channels=3)
    config |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config |= dict(image_size=[H, W], patch_size=vit.patch_size)
    pictures = dict(image_processor_type="ViTImageProcessor", do_resize=True, resample=3)
    pictures |= dict(size=dict(height=H, width=W), do_rescale=True, rescale_factor=1 / 255)
    pictures |= dict(do_normalize=True, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)
    files = {"config.json": as_json(config), "preprocessor_config.json": as_json(pictures)}
    return files | {"tensors": to_transformers(vit)}


# -------------------------------------------------------------------------------------- model card


def model_card(vit, meta, source, library):
    """README.md for the hub, from what the weights' file says of itself and nothing else."""
    (H, W), p, pose = vit.image_size, vit.patch_size, vit.pose_token is not None
    training = json.loads(meta["training"] or "{}")
    head = ["---"] + ([] if library == "ours" else [f"library_name: {library}"])
    head += ["pipeline_tag: image-feature-extraction", "license: other"]
    head += ["license_name: see-the-section-licence", "---", ""]
    tokens = "[CLS] at `tokens[:, 0]`, " + ("[POSE] at `[:, 1]`, " if pose else "")
    first = 2 if pose else 1
    grid = f"{vit.grid[0]} × {vit.grid[1]}"
    text = [
        f"# ViT-{meta['size']}/{p} for pictures of people, {H} × {W} px",
        "",
        f"{vit.width} wide, {vit.depth} blocks, {meta['heads']} heads. A picture shows one person "
        f"and is resized to {H} × {W} px (height × width). Tokens after the final norm: {tokens}"
        f"then {grid} patches row by row from `[:, {first}]`.",
        "",
        "## Load",
        "",
        "```python",
        LOAD[library].replace("MODEL", "DeiTModel" if pose else "ViTModel").rstrip(),
        "```",
        "",
        "## Method and data",
        "",
        *method_lines(training, source),
        "",
        "## Licence",
        "",
        *licence_lines(training, source),
    ]
    return "\n".join(head + text) + "\n"


def method_lines(training, source):
    if not training:
        return [f"`{source}`, from which this was made, does not say how it was trained."]
    losses = ["L_rec (masked patches)"] if training["decoder"] else []
    if training["gamma_align"]:
        losses.append(f"{training['gamma_align']} · L_align ([CLS] of two maskings)")
    if training["gamma_mp"]:
        token = f"[{training['mp_token'].upper()}]"
        losses.append(f"{training['gamma_mp']} · L_mp ({token} of pictures that share a pose)")
    rows = [f"| `{key}` | {value} |" for key, value in training.items()]
    return [
        f"Pre-trained with L = {' + '.join(losses)}, by an implementation of *Multi Positive "
        "Contrastive Learning with Pose-Consistent Generated Images* (arXiv 2404.03256) that is "
        "not its authors'. All settings, as written into the weights' file:",
        "",
        "| Setting | Value |",
        "|---|---|",
        *rows,
    ]


def licence_lines(training, source):
    lines = ["The code that wrote this is Apache-2.0. The weights have the terms of what they are"]
    if not training:
        return [f"{lines[0]} made from: those of `{source}` and of its data."]
    start = f"`{training['init']}`" if training.get("init") else None
    lines[0] += f" made from: {', '.join(f'`{path}`' for path in training['annotations'])}"
    lines[0] += f", and {start}, from which they were started" if start else ""
    return [f"{lines[0]}. Look these up and name the licence above before you publish."]


if __name__ == "__main__":
    run_stage(main)
