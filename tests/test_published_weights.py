"""Published weights: MAE's, HAP's, timm's, DINOv2's and torchvision's layouts give the tokens that
their own models give; others are refused.
"""

import importlib
import json
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from small_models import GRID, SIDE, D, P, close, encoder, pictures
from transformers import Dinov2Config, Dinov2Model

from formats.weights import ENCODER, build_encoder, load_pretrained, meta_of, resized_positions
from model import SIZES, ViT
from plumbing.config import read_config
from plumbing.errors import UserError


def base(image_size, **options):
    size = SIZES["base"]
    return ViT(size["width"], size["depth"], size["heads"], image_size, 16, **options)


def mae_layout(n_positions):
    """Names and shapes of MAE's and HAP's published ViT-B encoder. Values: zeros but for tokens and
    positions.
    """
    shapes = {"cls_token": (1, 1, 768), "pos_embed": (1, n_positions, 768)}
    shapes |= {"patch_embed.proj.weight": (768, 3, 16, 16), "patch_embed.proj.bias": (768,)}
    for i in range(12):
        for name, (a, b) in {"attn.qkv": (2304, 768), "attn.proj": (768, 768)}.items():
            shapes |= {f"blocks.{i}.{name}.weight": (a, b), f"blocks.{i}.{name}.bias": (a,)}
        for name, (a, b) in {"mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072)}.items():
            shapes |= {f"blocks.{i}.{name}.weight": (a, b), f"blocks.{i}.{name}.bias": (a,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.weight": (768,), f"blocks.{i}.{name}.bias": (768,)}
    shapes |= {"norm.weight": (768,), "norm.bias": (768,)}
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for i, name in enumerate(("cls_token", "pos_embed", "norm.bias", "blocks.11.mlp.fc2.bias")):
        state[name] = torch.randn(shapes[name], generator=torch.Generator().manual_seed(i))
    return state


def test_mae_checkpoint():
    vit, state = base((256, 128)), mae_layout(197)
    used, unused, missing = load_pretrained(
        vit, {"model": {**state, "mask_token": torch.zeros(1, 1, 512)}}, "mae.pth"
    )
    assert set(used) == set(state) and unused == ["mask_token"] and missing == ["pose_token"]
    close(vit.cls_token, state["cls_token"] + state["pos_embed"][:, :1])
    close(vit.blocks[11].mlp.fc2.bias, state["blocks.11.mlp.fc2.bias"])
    square = state["pos_embed"][:, 1:].transpose(1, 2).reshape(1, 768, 14, 14)
    expected = F.interpolate(square, size=(16, 8), mode="bicubic", align_corners=False)
    close(vit.pos_embed, expected.flatten(2).transpose(1, 2))


def test_hap_checkpoint():
    """HAP: 256 × 128, grid 16 × 8; the same grid is copied bit for bit, 256 × 192 is resized along
    the row only.
    """
    state = mae_layout(129)
    vit = base((256, 128), pose_token=False)
    file = {"model": {**state, "decoder_embed.weight": torch.zeros(512, 768)}, "epoch": 399}
    used, unused, missing = load_pretrained(vit, file, "hap.pth")
    assert len(used) == len(state) and unused == ["decoder_embed.weight"] and missing == []
    assert torch.equal(vit.pos_embed, state["pos_embed"][:, 1:])
    wide = base((256, 192), trainable_positions=True)
    load_pretrained(wide, file, "hap.pth")
    picture = state["pos_embed"][:, 1:].transpose(1, 2).reshape(1, 768, 16, 8)
    expected = F.interpolate(picture, size=(16, 12), mode="bicubic", align_corners=False)
    close(wide.pos_embed, expected.flatten(2).transpose(1, 2))
    assert wide.pos_embed.requires_grad


def test_timm_layout():
    state = {
        **mae_layout(197),
        "head.weight": torch.zeros(1000, 768),
        "head.bias": torch.zeros(1000),
    }
    used, unused, missing = load_pretrained(base((256, 128)), state, "timm.safetensors")
    assert (
        unused == ["head.weight", "head.bias"]
        and missing == ["pose_token"]
        and len(used) == len(state) - 2
    )


@torch.no_grad()
def test_torchvision_vit_gives_the_same_tokens():
    """The strongest check of blocks and names: torchvision's own ViT-B/16 with our reading of its
    weights.
    """
    torch.manual_seed(0)
    theirs = torchvision.models.vit_b_16(weights=None).eval()
    for parameter in theirs.parameters():
        if parameter.ndim == 1:  # biases and norms start at 0 and 1, which would hide a swap
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    ours = base((224, 224), pose_token=False)
    state = theirs.state_dict()
    used, unused, missing = load_pretrained(ours, state, "vit_b_16.pth")
    assert (
        unused == ["heads.head.weight", "heads.head.bias"]
        and missing == []
        and len(used) == len(state) - 2
    )
    images = torch.randn(1, 3, 224, 224)
    x = torch.cat([theirs.class_token, theirs._process_input(images)], dim=1)
    close(ours(images), theirs.encoder(x), 1e-4)
    # the older torchvision names of the MLP
    older = {
        n.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): v
        for n, v in state.items()
    }
    assert len(load_pretrained(ours, older, "vit_b_16.pth")[0]) == len(used)


def dinov2_layout(theirs):
    """transformers' Dinov2Model, old and new → DINOv2's own names, which are timm's too."""
    parts = [(r"^embeddings\.(\w+_token)", r"\1"), ("^embeddings.position_.*", "pos_embed")]
    parts += [("^embeddings.patch_embeddings.projection", "patch_embed.proj")]
    parts += [("^layernorm", "norm"), ("^encoder.layer.", "blocks.")]
    parts += [("attention.(o_proj|output.dense)", "attn.proj")]
    parts += [(r"layer_scale(\d).lambda1", r"ls\1.gamma")]
    parts += [(r"attention.*\.(q)(uery|_proj)", r"\1"), (r"attention.*\.(k)(ey|_proj)", r"\1")]
    parts += [(r"attention.*\.(v)(alue|_proj)", r"\1")]
    state = dict(theirs.state_dict())
    for pattern, name in parts:
        state = {re.sub(pattern, name, old): value for old, value in state.items()}
    for i in range(len(theirs.encoder.layer)):
        for kind in ("weight", "bias"):
            qkv = [state.pop(f"blocks.{i}.{x}.{kind}") for x in "qkv"]
            state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(qkv)
    return state


@torch.no_grad()
def test_dinov2_gives_the_same_tokens_with_layer_scale_folded_in():
    """transformers' own Dinov2Model, random weights, against our reading of them."""
    shape = dict(hidden_size=D, num_hidden_layers=2, num_attention_heads=4)
    config = Dinov2Config(image_size=32, patch_size=P, **shape)
    torch.manual_seed(0)
    theirs = Dinov2Model(config).eval()
    for parameter in theirs.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.3)  # also layer scale, which starts at 1
    ours, state = ViT(D, 2, 4, (32, 32), P, pose_token=False), dinov2_layout(theirs)
    used, unused, missing = load_pretrained(ours, state, "dinov2.pth")
    assert unused == ["mask_token"] and missing == [] and "blocks.1.ls2.gamma" in used
    images = torch.randn(2, 3, 32, 32)
    close(ours(images), theirs(images).last_hidden_state, 1e-4)
    plain = {name: value for name, value in state.items() if "gamma" not in name}
    load_pretrained(ours, plain, "without.pth")
    assert (ours(images) - theirs(images).last_hidden_state).abs().max() > 0.1


def encoder_of(path, **changes):
    """What a fine-tuning stage makes of a file."""
    values = {name: key.default for name, key in ENCODER.items()}
    values |= {"weights": None, "size": "tiny", "encoder": str(path)} | changes
    return build_encoder(SimpleNamespace(**values), reads_pose=False)


@pytest.mark.parametrize("name", ["reg_token", "register_tokens"])
def test_a_register_comes_back_as_the_pose_token(name, tmp_path):
    s = SIZES["tiny"]
    vit = ViT(s["width"], s["depth"], s["heads"], (64, 32), 16)
    state = {n.replace("pose_token", name): v for n, v in vit.state_dict().items()}
    torch.save(state, tmp_path / "timm.pth")
    # whether the stage asks for [POSE] or not
    ours, said = encoder_of(tmp_path / "timm.pth", height=64, width=32, pose_token=False)
    assert ours.n_special == 2 and "[POSE]" in said and "not used: none" in said
    images = torch.randn(2, 3, 64, 32)
    assert torch.equal(ours(images), vit(images))
    square = ViT(s["width"], s["depth"], s["heads"], (64, 64), 16)  # positions of patches alone
    assert load_pretrained(square, square.state_dict() | {}, "square.pth")[2] == []
    small, _ = encoder_of(tmp_path / "timm.pth", height=32, width=32)
    assert small.pos_embed.shape == (1, 4, s["width"])


@torch.no_grad()
def test_timm_with_one_register_gives_the_same_tokens():
    timm = pytest.importorskip("timm", reason="timm is not installed; the test above stands for it")
    theirs = timm.models.VisionTransformer(
        img_size=SIDE, patch_size=P, embed_dim=D, depth=2, num_heads=4, reg_tokens=1,
        no_embed_class=True, init_values=0.3, num_classes=5,
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.1)
    ours = encoder()
    _, unused, missing = load_pretrained(ours, theirs.state_dict(), "timm.pth")
    assert unused == ["head.weight", "head.bias"] and missing == []
    close(ours(pictures()), theirs.forward_features(pictures()), 1e-4)


@pytest.mark.parametrize(
    "name",
    ["norm_pre.weight", "fc_norm.weight", "dist_token", "storage_tokens", "rope_embed.periods"]
    + ["blocks.0.attn.q_norm.weight", "blocks.1.gamma_1", "rel_pos_bias.table"]
    + ["patch_embed.norm.bias", "blocks.0.ls1.gamma", "blocks.1.attn.relative_position_bias_table"],
)
def test_weights_that_would_make_another_encoder_are_refused(name):
    """CLIP's norm before the blocks, BEiT's positions, others' tokens: one line with the name."""
    vit = encoder()
    before = {n: v.clone() for n, v in vit.state_dict().items()}
    with pytest.raises(UserError, match=rf"other.pth: this ViT has nothing for {name}, and"):
        load_pretrained(vit, encoder().state_dict() | {name: torch.zeros(1, 1, 3)}, "other.pth")
    assert all(torch.equal(v, before[n]) for n, v in vit.state_dict().items())


def test_more_registers_and_registers_without_a_place_are_refused():
    plain = encoder(pose_token=False)
    four, one = (plain.state_dict() | {"reg_token": torch.zeros(1, n, D)} for n in (4, 1))
    with pytest.raises(UserError, match=r"reg_token \(1, 4, 32\): one register has a place"):
        load_pretrained(encoder(), four, "x.pth")
    with pytest.raises(UserError, match=r"reg_token needs \[POSE\]'s place; set pose_token=true"):
        load_pretrained(plain, one, "x.pth")


def test_heads_decoders_and_mask_tokens_are_listed_as_unused():
    names = ["head.weight", "head_dist.bias", "decoder_blocks.0.norm1.weight", "mask_token"]
    names += ["decoder_pos_embed", "decoder_mask_token", "pre_logits.fc.weight", "projector.0.bias"]
    state = encoder().state_dict() | {name: torch.zeros(3) for name in names}
    assert load_pretrained(encoder(), state, "x.pth", GRID)[1] == names


def test_own_encoder_and_its_grid():
    vit = encoder()
    used, unused, missing = load_pretrained(
        encoder(depth=2), vit.state_dict(), "encoder.safetensors", grid=GRID
    )
    assert len(used) == len(vit.state_dict()) and unused == missing == []
    # 16 × 4 = 64 patches look like 8 × 8; the grid says what they are: a ramp along the row stays
    # one
    ramp = torch.arange(4.0).repeat(16)[None, :, None].expand(1, 64, D)
    _, resized = resized_positions(ramp, (16, 8), (16, 4), "x")
    image = resized[0, :, 0].view(16, 8)
    close(image, image[:1].expand(16, 8))
    assert (image[0].diff() > 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"patch_embed.proj.weight": torch.zeros(D, 3, 8, 8)}, "8 px patches.*4 px"),
        (lambda s: s | {"patch_embed.proj.weight": torch.zeros(64, 3, 4, 4)}, "64 wide.*32 wide"),
        (lambda s: {n: v for n, v in s.items() if "blocks.1." not in n}, "1 deep.*2 deep"),
        (
            lambda s: {n: v for n, v in s.items() if n != "blocks.1.mlp.fc1.bias"},
            "blocks.1.mlp.fc1.bias is missing",
        ),
        (lambda s: s | {"blocks.0.mlp.fc1.bias": torch.zeros(7)}, r"shape \(7,\)"),
        (lambda s: s | {"pos_embed": torch.zeros(1, 31, D)}, "31 positions"),
        (lambda s: {"state": 3, "weights": torch.zeros(3)}, "no ViT encoder"),
        (lambda s: [1, 2], "no ViT encoder"),
    ],
)
def test_weights_of_another_model_are_one_line_and_change_nothing(change, message):
    vit = encoder()
    before = {n: v.clone() for n, v in vit.state_dict().items()}
    with pytest.raises(UserError, match=message) as error:
        load_pretrained(vit, change(dict(encoder().state_dict())), "other.pth")
    assert "\n" not in str(error.value) and "other.pth" in str(error.value)
    assert all(torch.equal(v, before[n]) for n, v in vit.state_dict().items())


@pytest.mark.parametrize(
    "words",
    [
        ["tiny"],
        3,
        "tiny",
        {"patch_size": ...},
        {"size": "huge"},
        {"patch_size": "p"},
        {"height": "0"},
    ],
)
def test_an_encoder_that_says_of_itself_what_we_never_write(tmp_path, words):
    s, path = SIZES["tiny"], tmp_path / "encoder.safetensors"
    vit = ViT(s["width"], s["depth"], s["heads"], (32, 16), 8)
    meta = {name: str(value) for name, value in meta_of(vit).items()}
    save_file(vit.state_dict(), path, {"encoder": json.dumps(meta)})
    about = encoder_of(path, height=32, width=16)[1]
    assert meta["size"] == "tiny" and "tiny with 3 heads, 8 px" in about
    if isinstance(words, dict):
        words = {name: value for name, value in (meta | words).items() if value is not ...}
    save_file(vit.state_dict(), path, {"encoder": json.dumps(words)})
    with pytest.raises(UserError, match="cannot read .*encoder.safetensors as safetensors: "):
        encoder_of(path, height=32, width=16)


@pytest.mark.parametrize(
    ("stage", "choice", "more"),
    [
        ("finetune_pose", "tokens=add", (3,)),
        ("finetune_reid", "token=both", (5,)),
        ("finetune_par", "token=pose", (["hat", "skirt"],)),
        (
            "finetune_t2i",
            "token=pose",
            (SimpleNamespace(texts=["a red coat"], persons=4), torch.device("cpu")),
        ),
    ],
)
def test_others_weights_get_a_pose_token_only_where_it_is_read(tmp_path, stage, choice, more):
    stage = importlib.import_module(stage)
    s = SIZES["tiny"]
    vit = ViT(s["width"], s["depth"], s["heads"], (64, 32), 16, pose_token=False)
    torch.save({"model": vit.state_dict()}, tmp_path / "mae.pth")
    keys = ["size=tiny", "height=64", "width=32", "patch=16", f"encoder={tmp_path}/mae.pth"]
    keys += ["text=words", "min_count=1"] if "text" in stage.KEYS else []
    for extra, special in ((keys, 1), ([*keys, choice], 2)):
        built = stage.build_model(read_config(stage.KEYS, "", extra), *more)[0]
        assert built.encoder.n_special == special
        assert torch.equal(built.encoder.cls_token, vit.cls_token)
