"""Encoder, decoder, heads and the whole model: against plain versions of the same sums, and the
figures that a working model must reach.
"""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from small_models import GRID, SIDE, D, N, P, close, encoder, pictures

import losses
import model
from drawing.training import attention_maps
from model import SIZES, Decoder, GenPoCCL, Projector, ViT, sincos_positions
from tasks.pose import ClassicHead, SimpleHead


def genpoccl(projector="none", pose_in_decoder=True, depth=2, **options):
    vit = encoder(depth)
    decoder = Decoder(vit, 16, 1, 2, pose_in_decoder)
    return GenPoCCL(vit, decoder, Projector(D, projector, 64, 16), **options)


def mask_of(B=6, seed=2):
    return torch.rand(B, N, generator=torch.Generator().manual_seed(seed)).argsort(1) < N // 2


def visible_of(mask):
    return torch.stack([torch.nonzero(~row).flatten() for row in mask])


def masked_of(mask):
    return visible_of(~mask)


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


def test_a_file_that_is_no_encoder_of_ours_is_named(tmp_path):
    save_file({"w": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors is no encoder.safetensors of this"):
        model.load_encoder(tmp_path / "other.safetensors")


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
