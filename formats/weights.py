"""Encoders from files: published ViT weights (MAE, HAP, timm, torchvision, DINOv2) and our own,
which know their shape.

Legend: D width · N patches · h, w patch grid · H, W picture.
"""

import json
import re

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from common import load_checkpoint
from model import SIZES, ViT
from plumbing.config import UserError

TORCHVISION = [  # torchvision's vit_* names → ours
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"^encoder\.ln\.", "norm."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
]


REGISTER = r"^(reg_token|register_tokens)$"  # timm's name, DINOv2's; it stands where [POSE] does
LAYER_SCALE = (("ls1.gamma", "attn.proj"), ("ls2.gamma", "mlp.fc2"))  # DINOv2 and timm
# Weights of other encoders that have a say in the tokens. Heads, decoders, mask tokens have none.
ALTERING = re.compile(
    r"^(blocks|patch_embed|norm_pre|fc_norm|rope\w*|rel_pos\w*)\b"  # in or around the blocks
    r"|^(?!mask|decoder)\w*_tokens?$"  # other special tokens
)


def our_name(name):
    name = name.removeprefix("module.")  # DistributedDataParallel
    for pattern, ours in [*TORCHVISION, (REGISTER, "pose_token")]:
        name = re.sub(pattern, ours, name)
    return name


def tensors_of(state):
    """{name in the file: tensor} of what a file held: MAE and HAP nest theirs under "model"."""
    for nest in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(nest), dict):
            state = state[nest]
    state = state if isinstance(state, dict) else {}
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def load_pretrained(vit, state, path, grid=None):
    """Copy published or own encoder weights into `vit`; positions are resized to its grid.

    state: what the file held (MAE and HAP {"model": …}, timm and torchvision flat, our encoder.safetensors); path: for
    messages. grid: (h, w) the weights were trained at, where known; otherwise the usual guess: square, else h = 2w.
    Layer scale is folded into the weights before it. A single register becomes [POSE].
    → (used, unused, missing): the file's names that were used and that were not, and our names the file had nothing
    for ([POSE] is missing in files without a register and keeps its start). Raises UserError where
    depth, width or patch size differ, and for unused weights without which the encoder would
    compute something else. Nothing is copied before all shapes are checked.
    """
    state, own = tensors_of(state), vit.state_dict()
    source = {our_name(name): (name, value) for name, value in state.items()}
    found = {name: value for name, (_, value) in source.items() if name in own}
    if "pos_embed" not in found or "cls_token" not in found or "patch_embed.proj.weight" not in found:
        raise UserError(f"{path} holds no ViT encoder in MAE, HAP, timm, torchvision or our layout; check the file")
    check_shape(vit, source, found, path)
    cls_position, found["pos_embed"] = resized_positions(found["pos_embed"], vit.grid, grid, path)
    found["cls_token"] = found["cls_token"] + cls_position  # our special tokens have no position; the sum is the same
    for name, value in found.items():
        if value.shape != own[name].shape:
            raise UserError(f"{path}: {name} has shape {tuple(value.shape)}, this model {tuple(own[name].shape)}")
    missing = [name for name in own if name not in found]
    lost = [name for name in missing if name.startswith("blocks.")]
    if lost:
        raise UserError(f"{path}: {lost[0]} is missing (and {len(lost) - 1} more); the file is not a whole encoder")
    scales = fold_layer_scale(found, source, vit.depth)
    vit.load_state_dict(found, strict=False)
    used = [source[name][0] for name in [*found, *scales]]
    return used, [name for name in state if name not in set(used)], missing


def layer_scales(depth):
    """{name of a block's layer scale: name of the linear layer before it}."""
    pairs = [(i, *pair) for i in range(depth) for pair in LAYER_SCALE]
    return {f"blocks.{i}.{scale}": f"blocks.{i}.{layer}" for i, scale, layer in pairs}


def fold_layer_scale(found, source, depth):
    """Layer scale belongs to the layer before it: x + γ ⊙ (W y + b) = x + (γ ⊙ W) y + γ ⊙ b.

    Changes W and b in `found`, by our names, where `source` has a γ. → the names of these.
    """
    scales = {name: layer for name, layer in layer_scales(depth).items() if name in source}
    for name, layer in scales.items():
        gamma = source[name][1]
        found[f"{layer}.weight"] = gamma[:, None] * found[f"{layer}.weight"]
        found[f"{layer}.bias"] = gamma * found[f"{layer}.bias"]
    return list(scales)


def check_shape(vit, source, found, path):
    """One clear line for another width, patch size or depth, and for another kind of encoder."""
    D, _, p, _ = found["patch_embed.proj.weight"].shape
    depth = len({name.split(".")[1] for name in source if re.match(r"blocks\.\d+\.", name)})
    if (D, p, depth) != (vit.width, vit.patch_size, vit.depth):
        raise UserError(
            f"{path} is a ViT {D} wide, {depth} deep, {p} px patches (patch_embed.proj.weight "
            f"{tuple(found['patch_embed.proj.weight'].shape)}); this model is {vit.width} wide, {vit.depth} deep, "
            f"{vit.patch_size} px; choose the matching size= and patch="
        )
    if "pose_token" in source and source["pose_token"][1].shape[1:] != (1, D):
        name, value = source["pose_token"]
        raise UserError(f"{path}: {name} {tuple(value.shape)}: one register has a place, as [POSE]")
    for name in [name for name in source if name not in found and ALTERING.search(name)]:
        theirs, value = source[name]
        if name == "pose_token":
            raise UserError(f"{path}: {theirs} needs [POSE]'s place; set pose_token=true")
        if name not in layer_scales(depth) or value.shape != (D,):
            raise UserError(
                f"{path}: this ViT has nothing for {theirs}, and without it would compute "
                "something else than the file's encoder; use other weights"
            )


def resized_positions(positions, grid, source_grid, path):
    """(1, N' or 1 + N', D) → ([CLS] position (1, 1, D) or 0, patch positions (1, h·w, D)), bicubic [MAE]."""
    n = positions.shape[1]
    side, half = round((n - 1) ** 0.5), round(((n - 1) / 2) ** 0.5)
    if source_grid is not None:
        guesses = [(tuple(source_grid), n - source_grid[0] * source_grid[1])]
    else:  # ours unchanged; with a [CLS] position in front: square (most), this grid, h = 2w (HAP); ours of h = 2w
        guesses = [(grid, 0), ((side, side), 1), (grid, 1), ((2 * half, half), 1), ((2 * half, half), 0)]
        guesses.append(((round(n**0.5), round(n**0.5)), 0))  # timm's no_embed_class
    fits = [(h, w, front) for (h, w), front in guesses if front in (0, 1) and h * w + front == n]
    if not fits:
        raise UserError(f"{path}: {n} positions fit no known grid of patches; this model has {grid[0]} × {grid[1]}")
    h, w, front = fits[0]
    cls_position = positions[:, :1] if front else 0.0
    patches = positions[:, front:]
    if (h, w) != tuple(grid):
        image = patches.transpose(1, 2).unflatten(2, (h, w)).float()
        image = F.interpolate(image, size=grid, mode="bicubic", align_corners=False)
        patches = image.flatten(2).transpose(1, 2)
    return cls_position, patches


# ----------------------------------------------------------------------------------------- encoders for other stages


def load_encoder(
    path, image_size, size="base", patch_size=16, pose_token=True, drop_path=0.0, trainable_positions=True, **options
):
    """Encoder of a downstream stage, for pictures of image_size (H, W). → (ViT, size name, one sentence about it).

    path: our encoder.safetensors, which knows its own size, patch and tokens (size, patch_size and pose_token are then
    not asked); or MAE, HAP, timm or torchvision weights of the given size and patch; or None = random weights, drawn
    from torch's global generator. Positions are resized bicubically. Raises UserError for a file that does not fit.
    """
    meta = encoder_meta(path)
    if meta:
        size, patch_size, pose_token = meta["size"], int(meta["patch_size"]), meta["pose_token"] == "True"
    s = SIZES[size]
    state = None if path is None else load_checkpoint(path)
    if not meta and any(re.match(REGISTER, name) for name in tensors_of(state)):
        pose_token = True
    vit = ViT(
        s["width"], s["depth"], s["heads"], image_size, patch_size, pose_token, drop_path, trainable_positions,
        **options,
    )  # fmt: skip
    shape = f"{size}, {patch_size} px patches, [CLS]{' and [POSE]' if pose_token else ''}"
    if path is None:
        return vit, size, f"encoder from scratch ({shape})"
    return vit, size, f"encoder {path} ({shape}): {load_file_into(vit, path, state)}"


def load_file_into(vit, path, state=None):
    """load_pretrained from a file, or from the state it held.

    → a clause that says which weights were used, which not, which were missing.
    """
    meta = encoder_meta(path)
    grid = (int(meta["height"]) // vit.patch_size, int(meta["width_px"]) // vit.patch_size) if meta else None
    used, unused, missing = load_pretrained(vit, state or load_checkpoint(path), path, grid)
    return f"{len(used)} weights used; not used: {short_list(unused)}; not in the file: {short_list(missing)}"


def encoder_meta(path):
    """What our encoder.safetensors says of itself, as text: size, height, width_px, patch_size, …; else {}.

    Raises UserError for a file that cannot be read, or that says it otherwise than meta_of does.
    """
    if path is None or not str(path).endswith(".safetensors"):
        return {}
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {}).get("encoder", "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not meta:
        return {}
    try:
        known = meta["size"] in SIZES and meta["pose_token"] in ("True", "False")
        known = known and min(int(meta[name]) for name in ("height", "width_px", "patch_size")) > 0
    except (KeyError, TypeError, ValueError):
        known = False
    if not known:
        raise UserError(f'{path}: its metadata "encoder" is not what this project writes; check where the file is from')
    return meta


def meta_of(encoder, size):
    """What is written beside an encoder's weights: all that is needed to build it again."""
    H, W = encoder.image_size
    return dict(
        size=size, width=encoder.width, depth=encoder.depth, heads=SIZES[size]["heads"], height=H, width_px=W,
        patch_size=encoder.patch_size, pose_token=encoder.n_special == 2,
    )  # fmt: skip


def use_meta(cfg, stage, mark, *names):
    """With weights=, the file of a finished run of `stage` decides about the model: its settings replace cfg's.

    These are size, patch, pose_token, height, width and the stage's own `names`. mark: an entry only its files have.
    → (all that the file says, as text; {} without weights=; a sentence with the keys it changed).
    Raises UserError for any other file.
    """
    meta, written = encoder_meta(cfg.weights), {"patch": "patch_size", "width": "width_px"}
    if cfg.weights and mark not in meta:
        raise UserError(f"{cfg.weights} is no model.safetensors of {stage}")
    changed = []
    try:
        for name in ("size", "patch", "pose_token", "height", "width", *names) if cfg.weights else ():
            text, kind = meta[written.get(name, name)], type(getattr(cfg, name, True))
            value = text == "True" if kind is bool else kind(text)
            if hasattr(cfg, name) and getattr(cfg, name) != value:
                changed.append(f"{name}={value} (not {getattr(cfg, name)})")
            setattr(cfg, name, value)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{cfg.weights} does not say its {name} as {stage} writes it; check the file") from None
    return meta, f"model {cfg.weights}" + (f", which sets {', '.join(changed)}" if changed else "")


def short_list(names):
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "none"
