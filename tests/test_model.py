"""Encoder, decoder, heads and the reading of published weights: against plain versions of the same
sums, torchvision's own ViT-B, and the figures that a working model must reach."""

import importlib
import json
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model

import losses
import model
from drawing.training import attention_maps
from formats.weights import ENCODER, build_encoder, load_pretrained, meta_of, resized_positions
from model import SIZES, Decoder, GenPoCCL, Projector, ViT, sincos_positions
from plumbing.config import read_config
from plumbing.errors import UserError
from tasks.pose import ClassicHead, SimpleHead

SIDE, P = (32, 16), 4  # a grid of 8 × 4
GRID, N, D = (8, 4), 32, 32


def encoder(depth=2, **options):
    torch.manual_seed(0)
    vit = ViT(D, depth, 4, SIDE, P, **options)
    for block in vit.blocks:  # away from the zero biases, which would hide mistakes
        nn.init.normal_(block.attn.qkv.bias, std=0.5)
    return vit


def genpoccl(projector="none", pose_in_decoder=True, depth=2, **options):
    vit = encoder(depth)
    decoder = Decoder(vit, 16, 1, 2, pose_in_decoder)
    return GenPoCCL(vit, decoder, Projector(D, projector, 64, 16), **options)


def pictures(B=6, seed=1):
    return torch.randn(B, 3, *SIDE, generator=torch.Generator().manual_seed(seed))


def mask_of(B=6, seed=2):
    return torch.rand(B, N, generator=torch.Generator().manual_seed(seed)).argsort(1) < N // 2


def visible_of(mask):
    return torch.stack([torch.nonzero(~row).flatten() for row in mask])


def masked_of(mask):
    return visible_of(~mask)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------ encoder


def test_positions_against_loops():
    """MAE's layout: sin then cos of the column, then sin then cos of the row."""
    table = sincos_positions(GRID, D)[0]
    for row in range(GRID[0]):
        for column in range(GRID[1]):
            for i in range(D // 4):
                omega = torch.tensor(10000.0 ** (-i / (D / 4)))
                expected = [f(v * omega) for v in (column, row) for f in (torch.sin, torch.cos)]
                got = table[row * GRID[1] + column][i :: D // 4]
                close(got, torch.stack(expected))


def test_embedding_is_the_convolution():
    vit = encoder()
    images = pictures()
    conv = (
        F.conv2d(images, vit.patch_embed.proj.weight, vit.patch_embed.proj.bias, stride=P)
        .flatten(2)
        .transpose(1, 2)
    )
    close(vit.embed(images)[:, 2:], conv + vit.pos_embed)


def test_visible_only_equals_full_encoding_that_cannot_look_at_masked_patches(monkeypatch):
    vit, images, mask = encoder(), pictures(), mask_of()
    visible = visible_of(mask)
    ours = vit(images, visible)
    seen = torch.cat([torch.ones(len(mask), 2, dtype=torch.bool), ~mask], dim=1)[:, None, None]
    monkeypatch.setattr(
        model, "attention", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    )
    full = vit(images)
    close(ours[:, :2], full[:, :2])
    close(ours[:, 2:], torch.stack([row[2:][ids] for row, ids in zip(full, visible)]))


def test_order_of_visible_patches_does_not_matter():
    vit, images, visible = encoder(), pictures(), visible_of(mask_of())
    order = torch.randperm(visible.shape[1], generator=torch.Generator().manual_seed(0))
    a, b = vit(images, visible), vit(images, visible[:, order])
    close(a[:, :2], b[:, :2])
    close(a[:, 2:][:, order], b[:, 2:])
    close(vit(images), vit(images, torch.arange(N).expand(len(images), N)))


def test_views_in_one_batch_equal_views_one_by_one():
    vit, images = encoder(), pictures()
    a, b = visible_of(mask_of(seed=2)), visible_of(mask_of(seed=3))
    close(vit(images, torch.cat([a, b])), torch.cat([vit(images, a), vit(images, b)]))


def test_drop_path_rates_and_expectation():
    vit, images = encoder(depth=3, drop_path=0.5), pictures(2)
    assert vit.drop_rates.flatten().tolist() == [0, 0, 0.25, 0.25, 0.5, 0.5]
    vit.norm = nn.Identity()
    # Noise 1 keeps every branch, noise 0 drops those with a rate above 0: only the first block is
    # left.
    x = vit.embed(images)
    close(vit(images, drop_noise=torch.zeros(6, 2)), vit.blocks[0](x))
    # One branch at a time is linear in its factor, so its mean over many draws is the undropped
    # branch.
    vit.drop_rates = torch.tensor([0.0, 0, 0, 0, 0, 0.5])[:, None]
    draws = torch.rand(6, 4000, generator=torch.Generator().manual_seed(0))
    mean = vit(images[:1].expand(4000, -1, -1, -1), drop_noise=draws).mean(0)
    close(mean, vit(images[:1])[0], 0.05)
    # Pictures are dropped one by one, not the batch.
    noise = torch.tensor([[0.9] * 5 + [0.9], [0.9] * 5 + [0.1]]).T
    x = vit(images[:1].expand(2, -1, -1, -1), drop_noise=noise)
    assert (x[0] - x[1]).abs().max() > 1e-3


def test_recomputed_activations_give_the_same_gradient():
    images, visible = pictures(), visible_of(mask_of())
    gradients = []
    for recompute in (False, True):
        vit = encoder(checkpoint_activations=recompute)
        decoder_seed = torch.manual_seed(5)
        decoder = Decoder(vit, 16, 1, 2)
        tokens = vit(images, visible, torch.rand(4, 6, generator=decoder_seed))
        decoder(tokens, visible, masked_of(mask_of())).square().mean().backward()
        gradients.append(
            [p.grad for m in (vit, decoder) for p in m.parameters() if p.requires_grad]
        )
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_attention_maps_against_loops():
    vit, images = encoder(), pictures(2)
    maps = attention_maps(vit, images)
    assert maps.shape == (2, 2, *GRID)
    x = vit.blocks[0](vit.embed(images))
    q, k, _ = vit.blocks[1].attn.qkv(vit.blocks[1].norm1(x)).chunk(3, dim=-1)
    head_maps = []
    for head in range(4):
        part = slice(head * D // 4, (head + 1) * D // 4)
        head_maps.append((q[1, 1, part] @ k[1, :, part].T / (D // 4) ** 0.5).softmax(0)[2:])
    close(maps[1, 1], torch.stack(head_maps).mean(0).view(GRID))  # picture 1, [POSE]


def test_bfloat16_attention_on_the_cpu_equals_the_fused_one():
    q, k, v = torch.randn(3, 2, 4, 20, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    close(
        model.attention(q, k, v).float(),
        F.scaled_dot_product_attention(q.float(), k.float(), v.float()),
        0.03,
    )


# ------------------------------------------------------------------------------------------ decoder


@pytest.mark.parametrize("pose_in_decoder", [True, False])
def test_decoder_puts_tokens_back_in_their_places(pose_in_decoder):
    vit = encoder()
    decoder = Decoder(vit, 16, 1, 2, pose_in_decoder)
    visible = visible_of(mask_of())[
        :, torch.randperm(N // 2, generator=torch.Generator().manual_seed(1))
    ]
    tokens = vit(pictures(), visible)
    special = decoder.embed(tokens[:, : 2 if pose_in_decoder else 1])
    rows = []
    for b in range(len(tokens)):
        places = [decoder.mask_token[0, 0]] * N
        for i, patch in enumerate(visible[b].tolist()):
            places[patch] = decoder.embed(tokens[b, 2 + i])
        rows.append(torch.cat([special[b], torch.stack(places) + sincos_positions(GRID, 16)[0]]))
    x = decoder.blocks[0](torch.stack(rows))
    everything = decoder.head(decoder.norm(x[:, special.shape[1] :]))
    masked = masked_of(mask_of())
    ours = decoder(tokens, visible, masked)
    close(ours, torch.stack([row[ids] for row, ids in zip(everything, masked)]))
    gradient = torch.autograd.grad(ours.sum(), tokens)[0]
    assert (gradient[:, 1] != 0).any() == pose_in_decoder


# ----------------------------------------------------------------------------------------- GenPoCCL


def test_forward_is_the_sum_of_its_terms():
    net, images, masks = genpoccl("mlp"), pictures(), [mask_of(seed=2), mask_of(seed=3)]
    pose_id = torch.tensor([0, 0, 1, 1, -1, 2])
    out = net(images, masks, pose_id)
    rec, cls, pose = [], [], []
    for mask in masks:
        visible = visible_of(mask)
        tokens = net.encoder(images, visible)
        cls, pose = [*cls, tokens[:, 0]], [*pose, tokens[:, 1]]
        masked = masked_of(mask)
        pred = torch.zeros(6, N, P * P * 3)
        ids = masked[:, :, None].expand(-1, -1, P * P * 3)
        pred = pred.scatter(1, ids, net.decoder(tokens, visible, masked))
        rec.append(losses.reconstruction_loss(pred, images, mask, P))
    align = losses.alignment_loss(*cls, 0.2)
    mp = losses.multi_positive_loss(net.projector(torch.cat(pose)), pose_id.repeat(2), 0.1)
    for name, value in zip(("rec", "align", "mp"), (sum(rec) / 2, align, mp)):
        close(out[name], value)
    close(out["total"], sum(rec) / 2 + 0.05 * align + 0.05 * mp)
    close(out["pose"], torch.stack(pose))
    assert out["pred"].shape == (2, 6, N // 2, P * P * 3) and not out["bad"].any()


def test_views_not_positives():
    net = genpoccl(views_are_positives=False)
    pose_id = torch.tensor([0, 0, 1, 1, 1, 2])
    out = net(pictures(), [mask_of(seed=2), mask_of(seed=3)], pose_id)
    close(out["mp"], sum(losses.multi_positive_loss(z, pose_id, 0.1) for z in out["pose"]) / 2)


def test_mae_hap_and_stablerep_are_settings():
    images, masks, pose_id = (
        pictures(),
        [mask_of(seed=2), mask_of(seed=3)],
        torch.tensor([0, 0, 1, 1, 2, 2]),
    )
    mae = genpoccl(gamma_align=0.0, gamma_mp=0.0)
    out = mae(images, masks[:1], pose_id)
    assert out["total"] == out["rec"] > 0 and out["align"] == out["mp"] == 0 and out["health"] == []
    out = genpoccl(gamma_mp=0.0)(images, masks, pose_id)
    assert out["mp"] == 0 and torch.equal(out["total"], out["rec"] + 0.05 * out["align"])
    stablerep = GenPoCCL(
        encoder(), None, Projector(D, "mlp", 64, 16), gamma_align=0.0, gamma_mp=1.0, mp_token="cls"
    )
    out = stablerep(images, [None], pose_id)
    assert torch.equal(out["total"], out["mp"]) and out["rec"] == 0 and out["pred"] is None
    close(out["cls"][0], stablerep.encoder(images)[:, 0])
    out["total"].backward()  # every parameter takes part, as DistributedDataParallel demands
    assert all(p.grad is not None for p in stablerep.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="mp_token"):
        GenPoCCL(encoder(pose_token=False), None)


def test_bad_pictures_are_named():
    images = pictures()
    images[3, 0, 5, 5] = float("nan")
    net = genpoccl(gamma_align=0.0, gamma_mp=0.0)
    assert net(images, [mask_of()], torch.arange(6))["bad"].nonzero().flatten().tolist() == [3]


def test_every_parameter_gets_a_gradient():
    net = genpoccl("mlp", pose_in_decoder=False)
    net(pictures(), [mask_of(seed=2), mask_of(seed=3)], torch.tensor([0, 0, 1, 1, 2, 2]))[
        "total"
    ].backward()
    assert [
        n
        for n, p in net.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.any())
    ] == []


def test_overfits_one_batch():
    """All three terms together: pixels of masked patches, [CLS] across views, [POSE] across
    pictures of a pose.
    """
    net = genpoccl("mlp", depth=3, gamma_align=0.05, gamma_mp=0.05)
    coarse = torch.randn(8, 3, 4, 2, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(coarse, size=SIDE, mode="bilinear")
    masks, pose_id = [mask_of(8, 2), mask_of(8, 3)], torch.arange(8) // 2
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(150):
        out = net(images, masks, pose_id)
        optimizer.zero_grad()
        out["total"].backward()
        optimizer.step()
    # L_mp cannot fall below log 3: each anchor has three equal positives
    assert out["rec"] < 0.3 and out["align"] < 0.3 and out["mp"] < 1.098 + 0.1


def test_bfloat16_close_to_float32():
    net, masks = genpoccl("mlp"), [mask_of(seed=2), mask_of(seed=3)]
    pose_id, terms = torch.tensor([0, 0, 1, 1, 2, 2]), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = net(pictures(), masks, pose_id)
        out["total"].backward()
        assert out["total"].dtype == torch.float32
        terms.append(torch.stack([out[k].detach() for k in ("rec", "align", "mp")]))
    assert not torch.equal(*terms)  # bf16 was really used
    torch.testing.assert_close(*terms, rtol=0.02, atol=0.02)


def test_compiled_equals_plain():
    """One graph per part, no break. The eager back end keeps the test free of a C++ compiler and
    short.
    """
    net, masks, pose_id = (
        genpoccl("mlp", depth=1),
        [mask_of(seed=2), mask_of(seed=3)],
        torch.arange(6) // 2,
    )
    results = []
    for compiled in (False, True):
        net.zero_grad()
        if compiled:
            net.compile(backend="aot_eager", fullgraph=True)
        out = net(pictures(), masks, pose_id)
        out["total"].backward()
        results.append(
            [out["total"].detach(), *(p.grad.clone() for p in net.parameters() if p.requires_grad)]
        )
    for a, b in zip(*results, strict=True):
        close(a, b)


def test_sizes_are_the_published_ones():
    """ViT-B/16 without head: 85,646,592 weights in blocks, norm and patch projection; ours adds
    [CLS] and [POSE].
    """
    with torch.device("meta"):
        size = SIZES["base"]
        vit = ViT(size["width"], size["depth"], size["heads"], (256, 128), 16)
    assert sum(p.numel() for p in vit.parameters() if p.requires_grad) == 85_646_592 + 768 + 768
    assert vit.grid == (16, 8)


# -------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("kind", [ClassicHead, SimpleHead])
def test_heads_keep_places(kind):
    """Patch (5, 1) reaches heat-map rows 4·5 − 3 … 4·5 + 6, likewise columns, of its own picture
    only.
    """
    torch.manual_seed(0)
    head = kind(D, 17).eval()
    tokens, changed = torch.zeros(2, N, D), torch.zeros(2, N, D)
    changed[0, 5 * GRID[1] + 1] = 100.0
    assert head(tokens, GRID).shape == (2, 17, 32, 16)
    change = (head(changed, GRID) - head(tokens, GRID)).abs().sum(1)
    near = change[0, 17:27, 1:11]
    assert near[3:7, 3:7].min() > 0
    change[0, 17:27, 1:11] = 0
    assert change.max() == 0


# -------------------------------------------------------------------------------- published weights


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
    assert meta["size"] == "tiny" and "tiny, 8 px" in encoder_of(path, height=32, width=16)[1]
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
