"""formats/export.py: what it writes is loaded by the libraries' own calls and computes the same;
what the libraries write is read; the model card's lines run, and its head is the hub's.
"""

import json
import re
import shlex
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from transformers import DeiTConfig, DeiTModel, ViTMAEConfig, ViTMAEForPreTraining

import pretrain
from formats import export
from formats.weights import load_pretrained, meta_of, read_encoder, training_of
from model import EPS, IMAGENET_MEAN, IMAGENET_STD, ViT, load_encoder
from plumbing.config import read_config
from plumbing.errors import UserError
from plumbing.files import load_checkpoint, save_weights

SIDES = 64, 32  # not square: 4 × 2 patches


def at_random(model):
    """Every weight: a norm of 1 or a position of 0 would hide a swap."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model.eval()


def saved(path, pose_token=True, **said):
    torch.manual_seed(0)
    vit = at_random(ViT(192, 6, 3, SIDES, 16, pose_token))
    save_weights(path, vit, **meta_of(vit), **said)
    return vit


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    export.main()


def picture(size):
    """A PIL picture without sharp edges, on which two ways to resize agree."""
    x, y = np.meshgrid(np.linspace(0, 3, size[0]), np.linspace(0, 5, size[1]))
    waves = [np.sin(x + y), np.cos(2 * x - y), np.sin(x * y)]
    return Image.fromarray((np.stack(waves, 2) * 100 + 128).astype(np.uint8))


@torch.no_grad()
def tokens_of(vit, image):
    """The expected: Pillow's bicubic, ImageNet's mean and deviation, our encoder."""
    small = np.array(image.resize((SIDES[1], SIDES[0]), Image.Resampling.BICUBIC)) / 255
    pixels = (small - IMAGENET_MEAN) / IMAGENET_STD
    return vit(torch.from_numpy(pixels).float().permute(2, 0, 1)[None])


@pytest.mark.parametrize("pose_token", [True, False])
@pytest.mark.parametrize("library", export.LIBRARIES)
def test_the_card_s_own_lines_load_it_and_give_our_tokens(
    library, pose_token, tmp_path, monkeypatch
):
    """Their call, their preparation of a picture, and the file in the folder read back by ours."""
    if library == "timm":
        pytest.importorskip("timm")
    vit, out = saved(tmp_path / "encoder.safetensors", pose_token), tmp_path / "folder"
    run(monkeypatch, f"weights={tmp_path}/encoder.safetensors", f"to={library}", f"out={out}")
    card = (out / "README.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(.*?)```", card, re.S)
    for size in ((SIDES[1], SIDES[0]), (90, 150)):
        place = {"picture": picture(size)}
        exec(lines.replace("FOLDER", str(out)), place)
        expected = tokens_of(vit, place["picture"])
        assert place["tokens"].shape == (1, 9 + pose_token, 192)
        # Only transformers has a bicubic of its own, a grey level away from Pillow's.
        bound = 2e-2 if library == "transformers" and size[0] == 90 else 1e-5
        assert (place["tokens"] - expected).abs().max() < bound
    # An eps of 1e-12, DeiT's own, would hardly show in tokens of this size.
    norms = [m for m in place["model"].modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 13 and all(norm.eps == EPS for norm in norms)
    name = "encoder.safetensors" if library == "ours" else "model.safetensors"
    cfg = read_config(export.KEYS, "", ["size=base", "height=256"])  # the file knows better
    back, about = read_encoder(cfg, out / name)
    assert "not used: none; not in the file: none" in about and back.image_size == SIDES
    for (name, value), (_, other) in zip(vit.state_dict().items(), back.state_dict().items()):
        assert torch.equal(value, other), name


def test_pose_stands_where_the_libraries_have_such_a_token(tmp_path, monkeypatch):
    weights = saved(tmp_path / "encoder.safetensors").state_dict()
    for library, name in (("timm", "reg_token"), ("transformers", "embeddings.distillation_token")):
        out = tmp_path / library
        run(monkeypatch, f"weights={tmp_path}/encoder.safetensors", f"to={library}", f"out={out}")
        assert torch.equal(load_checkpoint(out / "model.safetensors")[name], weights["pose_token"])


@torch.no_grad()
def test_what_transformers_wrote_is_read(tmp_path):
    """A DeiT of theirs: its special tokens have positions; queries, keys, values stand apart."""
    torch.manual_seed(0)
    shape = dict(hidden_size=192, num_hidden_layers=6, num_attention_heads=3)
    shape |= dict(intermediate_size=768, image_size=SIDES, patch_size=16, layer_norm_eps=1e-6)
    theirs = at_random(DeiTModel(DeiTConfig(**shape)))
    theirs.save_pretrained(tmp_path)
    arguments = ["size=tiny", f"height={SIDES[0]}", f"width={SIDES[1]}"]
    cfg = read_config(export.KEYS, "", arguments)
    ours, about = read_encoder(cfg, tmp_path / "model.safetensors")
    assert "not used: pooler.dense" in about and "[CLS] and [POSE]" in about
    images = torch.randn(2, 3, *SIDES)
    assert (ours(images) - theirs(images).last_hidden_state).abs().max() < 1e-5
    broken = load_checkpoint(tmp_path / "model.safetensors")
    del broken["encoder.layer.3.attention.attention.key.bias"]
    torch.save(broken, tmp_path / "broken.pth")
    with pytest.raises(
        UserError, match=r"cannot read .*broken.pth as ViT weights: .*key.bias.* is missing"
    ):
        read_encoder(cfg, tmp_path / "broken.pth")


@torch.no_grad()
def test_mae_as_transformers_has_it_is_read_without_its_decoder(tmp_path):
    torch.manual_seed(0)
    shape = dict(hidden_size=192, num_hidden_layers=2, num_attention_heads=3)
    shape |= dict(
        decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2
    )
    shape |= dict(decoder_intermediate_size=64, intermediate_size=768, layer_norm_eps=1e-6)
    config = ViTMAEConfig(**shape, image_size=32, patch_size=16, mask_ratio=0.0)
    theirs = at_random(ViTMAEForPreTraining(config))
    theirs.save_pretrained(tmp_path)
    ours = ViT(192, 2, 3, (32, 32), 16, pose_token=False).eval()
    state = load_checkpoint(tmp_path / "model.safetensors")
    _, unused, missing = load_pretrained(ours, state, "mae.safetensors")
    assert missing == [] and unused and all("decoder" in name for name in unused)
    images, order = torch.randn(2, 3, 32, 32), torch.arange(4.0).repeat(2, 1)  # nothing is moved
    assert (ours(images) - theirs.vit(images, noise=order).last_hidden_state).abs().max() < 1e-5


def test_the_card_says_what_the_weights_say_and_nothing_else(tmp_path, monkeypatch):
    lines = [
        "annotations=/elsewhere/people/set/annotations.json,crops",
        "init=/elsewhere/mae_b.pth",
    ]
    cfg = read_config(pretrain.KEYS, "", [*lines, "gamma_align=0", "views=1", "out=/elsewhere/run"])
    said = training_of(cfg, pretrain.KEYS, 7)
    assert "home" not in said and "workers" not in said and json.loads(said)["steps"] == 7
    saved(tmp_path / "encoder.safetensors", training=said)
    file = f"weights={tmp_path}/encoder.safetensors"
    run(monkeypatch, file, "to=transformers", f"out={tmp_path}/one")
    card = ModelCard.load(tmp_path / "one/README.md")  # the hub's own reader
    assert card.data.license == "other" and card.data.library_name == "transformers"
    assert "L_rec (masked patches) + 0.05 · L_mp ([POSE]" in card.text
    assert "L_align" not in card.text and "| `epochs` | 400 |" in card.text
    assert "`set/annotations.json`, `crops`, and `mae_b.pth`" in card.text
    # The next export still knows; a file that says nothing gets a card that says so.
    run(monkeypatch, f"weights={tmp_path}/one/model.safetensors", "to=ours", f"out={tmp_path}/two")
    with safe_open(tmp_path / "two/encoder.safetensors", "pt") as other:
        assert json.loads(other.metadata()["encoder"])["training"] == said
    saved(tmp_path / "plain.safetensors")
    run(monkeypatch, f"weights={tmp_path}/plain.safetensors", f"out={tmp_path}/three")
    text = ModelCard.load(tmp_path / "three/README.md").text
    assert "`plain.safetensors`, from which this was made, does not say" in text
    assert "L_mp" not in text and "annotations" not in text


def test_the_documents_lines_are_valid():
    text = (ROOT / "docs/recipes.md").read_text(encoding="utf-8") + export.__doc__
    lines = re.findall(r"^ *python formats/export.py (.*)$", text, re.M)
    chosen = {read_config(export.KEYS, "", shlex.split(line)).to for line in lines}
    assert chosen == set(export.LIBRARIES)


def test_refusals(tmp_path, monkeypatch):
    saved(tmp_path / "encoder.safetensors")
    weights = f"weights={tmp_path}/encoder.safetensors"
    with pytest.raises(UserError, match="weights= names no file"):
        run(monkeypatch, "to=timm")
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="mine exists; choose another out="):
        run(monkeypatch, weights, f"out={tmp_path}/mine")
    vit = ViT(192, 6, 3, (64, 32), 16, controller=True)
    vit.semantic_weight = 0.2
    save_weights(tmp_path / "solider.safetensors", vit, **meta_of(vit))
    solider = f"weights={tmp_path}/solider.safetensors"
    for to in ("timm", "transformers"):
        with pytest.raises(UserError, match=f"SOLIDER's controllers, which to={to} cannot hold"):
            run(monkeypatch, solider, f"to={to}", f"out={tmp_path}/new")
    run(monkeypatch, solider, "to=ours", f"out={tmp_path}/kept")
    again = load_encoder(tmp_path / "kept/encoder.safetensors")
    images = torch.randn(2, 3, 64, 32)
    assert again.semantic_weight == 0.2 and torch.equal(again(images), vit.eval()(images))
    state = {k: v for k, v in vit.state_dict().items() if ".controller." not in k}
    plain = ViT(192, 6, 3, (64, 32), 16)
    plain.load_state_dict(state)
    save_weights(tmp_path / "lost.safetensors", plain, **meta_of(vit))
    with pytest.raises(UserError, match="says that it has controllers, but holds none"):
        run(monkeypatch, f"weights={tmp_path}/lost.safetensors", "to=ours", f"out={tmp_path}/new")
    fork = ViT(192, 6, 3, (64, 32), 16)  # whose ViT has a third token
    fork.scene_token = torch.nn.Parameter(torch.zeros(1, 1, 192))
    monkeypatch.setattr(export, "read_encoder", lambda cfg, path: (fork, "a fork"))
    for to in ("timm", "transformers"):
        with pytest.raises(UserError, match=f"scene_token of .* no place in {to}'s model; take to"):
            run(monkeypatch, weights, f"to={to}", f"out={tmp_path}/new")
    run(monkeypatch, weights, "to=ours", f"out={tmp_path}/fork")
    monkeypatch.undo()
    with pytest.raises(UserError, match="key to .* one of timm, transformers, ours"):
        run(monkeypatch, weights, "to=onnx")
    torch.save({"model": {"w": torch.zeros(2)}}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"holds no ViT encoder .*\(first tensor: w\)"):
        run(monkeypatch, f"weights={tmp_path}/w.pth", f"out={tmp_path}/new")
    assert not (tmp_path / "new").exists() and list((tmp_path / "mine").iterdir()) == []
