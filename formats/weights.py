"""Encoders from files: published ViT weights (MAE, HAP, timm, torchvision, DINOv2, transformers)
and our own, which know their shape.

Legend: D width · N patches · h, w patch grid · H, W picture.
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors import safe_open

from formats.transformers_names import from_transformers
from model import SIZES, ViT
from plumbing.config import Key
from plumbing.errors import UserError, and_more, reading
from plumbing.files import is_finite, load_checkpoint, regular, save_checkpoint, save_weights
from plumbing.process import check_memory

# The encoder of a fine-tuning stage: its keys.
ENCODER = dict(
    encoder=Key(None, "weights to start from: ours, MAE, HAP, timm, …; none: from scratch"),
    size=Key("base", "encoder size, where encoder= does not say it", "[HAP]", tuple(SIZES)),
    patch=Key(16, "patch side in px, where encoder= does not say it", "[MAE]", low=1),
    pose_token=Key(True, "[POSE] from scratch, and on others' weights if it is read", "[paper]"),
    freeze=Key(False, "the encoder stays as it is, without drop path; only the head learns"),
    checkpoint_activations=Key(False, "recompute activations: less memory", may_change=True),
    semantic_weight=Key(-1.0, "λ of SOLIDER's controller, 0 looks … 1 semantics; -1: as the task",
                        "[SOLIDER] .2 ReID, .8 attributes, pose; ours .2 text", low=-1, high=1),
)  # fmt: skip

# The same of a script that has not all these keys, and nothing to change about the encoder.
AS_IS = {name: key.default for name, key in ENCODER.items()} | dict(weights=None)

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
    """{name in the file: tensor} of what a file held: MAE and HAP nest theirs under "model".

    What transformers has written gets our names and shapes first.
    """
    for nest in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(nest), dict):
            state = state[nest]
    state = state if isinstance(state, dict) else {}
    state = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return from_transformers(state)


def load_pretrained(vit, state, path, grid=None):
    """Copy published or own encoder weights into `vit`; positions are resized to its grid.

    state: what the file held (MAE and HAP {"model": …}, timm and torchvision flat, our
    encoder.safetensors); path: for messages. grid: (h, w) the weights were trained at, where known;
    otherwise the usual guess: square, else h = 2w. Layer scale is folded into the weights before
    it. A single register becomes [POSE].
    → (used, unused, missing): the file's names (transformers': as converted to timm's) that were
    used and that were not, and our names the file had nothing for ([POSE] is missing in files
    without a register and keeps its start).
    Raises UserError where depth, width or patch size differ, and for unused weights without which
    the encoder would compute something else. Nothing is copied before all is checked.
    """
    with reading(path, "ViT weights"):
        state = tensors_of(state)
        found, source, missing = checked_weights(vit, state, path, grid)
        scales = fold_layer_scale(found, source, vit.depth)
        vit.load_state_dict(found, strict=False)
    used = [source[name][0] for name in [*found, *scales]]
    return used, [name for name in state if name not in set(used)], missing


def checked_weights(vit, state, path, grid):
    """→ (tensors by our names, positions resized; our name → (theirs, tensor) of all; missing)."""
    own = vit.state_dict()
    for name, value in state.items():
        if value.is_sparse or value.is_complex() or not is_finite(value):
            raise UserError(f"{path}: {name} holds values that are not finite real numbers")
    source = {our_name(name): (name, value) for name, value in state.items()}
    found = {name: value for name, (_, value) in source.items() if name in own}
    if not {"pos_embed", "cls_token", "patch_embed.proj.weight"} <= set(found):
        layouts = "MAE, HAP, timm, torchvision, DINOv2, transformers or our layout"
        first = next(iter(state), "none")
        raise UserError(f"{path} holds no ViT encoder in {layouts} (first tensor: {first})")
    check_shape(vit, source, found, path)
    cls_position, found["pos_embed"] = resized_positions(found["pos_embed"], vit.grid, grid, path)
    # Our special tokens have no position; the sum is the same.
    found["cls_token"] = found["cls_token"] + cls_position
    for name, value in found.items():
        if value.shape != own[name].shape:
            need = tuple(own[name].shape)
            raise UserError(f"{path}: {name} has shape {tuple(value.shape)}, this model {need}")
    missing = [name for name in own if name not in found]
    lost = [name for name in missing if not name.endswith("_token") and ".controller." not in name]
    if lost:
        what = f"{lost[0]} is missing{and_more(lost)}"
        raise UserError(f"{path}: {what}; the file is not a whole encoder")
    return found, source, missing


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
            f"{tuple(found['patch_embed.proj.weight'].shape)}); this model is {vit.width} wide, "
            f"{vit.depth} deep, {vit.patch_size} px; choose the matching size= and patch="
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
    """(1, N' or 1 + N', D) → ([CLS]'s position (1, 1, D) or 0, the patches' (1, h·w, D)) [MAE]."""
    n = positions.shape[1]
    side, half = round((n - 1) ** 0.5), round(((n - 1) / 2) ** 0.5)
    if source_grid is not None:
        guesses = [(tuple(source_grid), n - source_grid[0] * source_grid[1])]
    else:
        # Ours, unchanged; with a [CLS] position in front: square (most), this grid, h = 2w (HAP);
        # ours of h = 2w.
        guesses = [(grid, 0), ((side, side), 1), (grid, 1)]
        guesses += [((2 * half, half), 1), ((2 * half, half), 0)]
        guesses.append(((round(n**0.5), round(n**0.5)), 0))  # timm's no_embed_class
    fits = [(h, w, front) for (h, w), front in guesses if front in (0, 1) and h * w + front == n]
    if not fits:
        own = f"this model has {grid[0]} × {grid[1]}"
        raise UserError(f"{path}: {n} positions fit no known grid of patches; {own}")
    h, w, front = fits[0]
    cls_position = positions[:, :1] if front else 0.0
    patches = positions[:, front:]
    if (h, w) != tuple(grid):
        image = patches.transpose(1, 2).unflatten(2, (h, w)).float()
        image = F.interpolate(image, size=grid, mode="bicubic", align_corners=False)
        patches = image.flatten(2).transpose(1, 2)
    return cls_position, patches


# --------------------------------------------------------------------------- encoders of the stages


def build_encoder(cfg, reads_pose, drop_path=0.0, semantic_weight=0.8):
    """The encoder of a fine-tuning stage, as its keys say. → (ViT, one sentence about it)

    A file of ours knows its own size, patch and tokens; MAE, HAP, timm or torchvision weights are
    of cfg's size and patch; without a file the weights are random, from torch's own generator.
    Others' weights hold no [POSE]: one is added, untrained, if the stage `reads_pose`.
    An encoder of SOLIDER brings its controller; its λ is cfg's, else that of weights=, else the
    stage's own `semantic_weight`.
    With weights= the caller loads the fine-tuned ones (see take_settings). Positions are resized
    bicubically. With freeze no weight of it asks for a gradient, [POSE] and positions included: no
    graph is kept, and layer decay reaches the head alone. A ViT has no batch statistics, so without
    drop path it computes in training what it computes in evaluation.
    Raises UserError for a file that does not fit.
    """
    path = None if cfg.weights else cfg.encoder
    size, patch, meta = cfg.size, cfg.patch, encoder_meta(path)
    state = None if path is None else load_checkpoint(path)
    pose_token = cfg.pose_token and (path is None or reads_pose)
    with reading(path, "ViT weights"):
        names = list(tensors_of(state))
    if any(re.match(REGISTER, name) for name in names):
        pose_token = True
    if "semantic_weight" in meta and not any(".controller." in name for name in names):
        raise UserError(f"{path} says that it has controllers, but holds none of their weights")
    if meta:
        size, patch = meta["size"], int(meta["patch_size"])
        pose_token = meta["pose_token"] == "True"
    if cfg.height % patch or cfg.width % patch:
        sides = f"height={cfg.height} and width={cfg.width}"
        raise UserError(f"{sides} must be multiples of the patch side, {patch} px")
    s, sides = SIZES[size], (cfg.height, cfg.width)
    drop_path = 0.0 if cfg.freeze else drop_path
    shape = s["width"], s["depth"], s["heads"], sides, patch, pose_token, drop_path, True
    with torch.device("meta"):  # counted before it is claimed
        check_memory(ViT(*shape).requires_grad_(not cfg.freeze), 0, torch.device("cpu"))
    told = encoder_meta(cfg.weights or path)
    controller = "semantic_weight" in told
    vit = ViT(*shape, checkpoint_activations=cfg.checkpoint_activations, controller=controller)
    vit.requires_grad_(not cfg.freeze)
    about = f"{size} with {s['heads']} heads, {patch} px patches"
    about += ", [CLS] and [POSE]" if pose_token else ", [CLS]"
    about += ", frozen" if cfg.freeze else ""
    if cfg.semantic_weight >= 0 and not controller:
        what = f"semantic_weight={cfg.semantic_weight:g}: {cfg.weights or path or 'a new encoder'}"
        raise UserError(f"{what} has no controller (baselines/solider.py trains one); leave it out")
    if controller:
        own = float(told["semantic_weight"]) if cfg.weights else semantic_weight
        vit.semantic_weight = cfg.semantic_weight if cfg.semantic_weight >= 0 else own
        about += f", controller at λ = {vit.semantic_weight:g}"
    if path is None:
        return vit, f"encoder from scratch ({about})"
    return vit, f"encoder {path} ({about}): {load_into(vit, path, state)}"


def read_encoder(cfg, path):
    """The encoder that a file holds, for use as it is. → (ViT, one sentence about it)

    A file of ours decides about everything. Others' weights are of cfg's size and patch, are given
    cfg's input, and have [POSE] where they have a register.
    """
    settings = SimpleNamespace(**AS_IS | vars(cfg) | dict(encoder=path, weights=None))
    meta = encoder_meta(path)
    if meta:
        settings.height, settings.width = int(meta["height"]), int(meta["width_px"])
        settings.semantic_weight = float(meta.get("semantic_weight", -1))
    encoder, about = build_encoder(settings, reads_pose=False)
    return encoder.eval(), f"{about}; pictures of {settings.height} × {settings.width} px"


def load_into(vit, path, state=None):
    """load_pretrained from a file, or from the state it held.

    → a clause that says which weights were used, which not, which were missing.
    """
    meta, grid = encoder_meta(path), None
    if meta:
        grid = int(meta["height"]) // vit.patch_size, int(meta["width_px"]) // vit.patch_size
    used, unused, missing = load_pretrained(vit, state or load_checkpoint(path), path, grid)
    used = f"{len(used)} weights used; not used: {short_list(unused)}"
    return f"{used}; not in the file: {short_list(missing)}"


def encoder_meta(path):
    """What our encoder.safetensors says of itself, as text: size, height, …; of another file {}.

    Raises UserError for a file that cannot be read, or that says it otherwise than meta_of does.
    """
    if path is None or not str(path).endswith(".safetensors"):
        return {}
    with reading(path, "safetensors"):
        with safe_open(regular(path), "pt") as file:
            meta = json.loads((file.metadata() or {}).get("encoder", "{}"))
        if meta:
            numbers = [int(meta[name]) for name in ("height", "width_px", "patch_size")]
            known = meta["size"] in SIZES and meta["pose_token"] in ("True", "False")
            known = known and 0 <= float(meta.get("semantic_weight", 0)) <= 1
            if not known or min(numbers) < 1:
                raise ValueError("its size, tokens or sides are not as this project writes them")
    return meta


def meta_of(encoder):
    """What is written beside an encoder's weights: all that is needed to build it again."""
    shape = dict(width=encoder.width, depth=encoder.depth, heads=encoder.blocks[0].attn.heads)
    size = next(name for name, s in SIZES.items() if shape.items() <= s.items())
    (H, W), p = encoder.image_size, encoder.patch_size
    token = encoder.pose_token is not None
    meta = dict(size=size, **shape, height=H, width_px=W, patch_size=p, pose_token=token)
    if encoder.semantic_weight is not None:  # it has SOLIDER's controller
        meta["semantic_weight"] = encoder.semantic_weight
    return meta


def save(out, encoder, model, optimizer, step, **more):
    """Weights alone, then everything to resume: after a kill between them steps are repeated."""
    out, state = Path(out), dict(model=model.state_dict(), optimizer=optimizer.state_dict())
    save_weights(out / "encoder.safetensors", encoder, **meta_of(encoder))
    save_checkpoint(out / "last.pt", **state, step=step, **more)


def training_of(cfg, keys, steps):
    """What is written beside pre-trained weights about how they came about, as text: every setting
    that has a say in them. Of paths only the last one or two names: others will read it."""
    said = {"steps": steps}
    for name, key in keys.items():
        value = getattr(cfg, name)
        if not key.may_change and name not in ("out", "images", "predict", "weights"):
            if name == "annotations":
                value = ["/".join(Path(path).parts[-2:]) for path in value]
            if name == "init" and value:
                value = Path(value).name
            if name == "resume_from" and value:
                value = "/".join(Path(value).parts[-2:])
            said[name] = value
    return json.dumps(said)


def take_settings(cfg, stage, mark, *names):
    """Settings of the model in weights=, of a finished run of `stage`, replace cfg's.

    These are size, patch, pose_token, height, width and the stage's own `names`. mark: an entry
    that only its files have.
    → (all that the file says, as text; {} without weights=; a sentence with the keys it changed).
    Raises UserError for any other file.
    """
    if not cfg.weights:
        return {}, ""
    meta, written = encoder_meta(cfg.weights), {"patch": "patch_size", "width": "width_px"}
    if mark not in meta:
        raise UserError(f"{cfg.weights} is no model.safetensors of {stage}")
    changed = []
    with reading(cfg.weights, f"a model of {stage}") as place:
        for name in ("size", "patch", "pose_token", "height", "width", *names):
            place.at = f"its {name}"
            text, old = meta[written.get(name, name)], getattr(cfg, name)
            value = text == "True" if isinstance(old, bool) else type(old)(text)
            if value != old:
                changed.append(f"{name}={value} (not {old})")
            setattr(cfg, name, value)
    sets = f", which sets {', '.join(changed)}" if changed else ""
    return meta, f"model {cfg.weights}{sets}"


def short_list(names):
    return (", ".join(names[:4]) or "none") + and_more(names, 4)
