"""From config to step: masks, model, pictures, rates, weight decay, first weights, more ranks."""

import shutil
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from coco_sets import ALONE
from conftest import run_script
from pretrain_runs import arguments, rows
from small_models import D, N, P, close, encoder, pictures
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, SequentialLR

import common
import losses
import pretrain
from data import Augmentation, PretrainPictures
from formats.coco import read_people
from model import Decoder, GenPoCCL
from plumbing.config import read_config


def config(*words):
    return read_config(pretrain.KEYS, "", list(words))


# -------------------------------------------------------------------------------------------- masks

GRID = (8, 4)  # of 64 × 32 px in patches of 8


@pytest.mark.parametrize("kind", ["part", "random"])
def test_masks_differ_by_view_step_and_seed_but_not_by_ranks(kind):
    joints = torch.rand(8, 17, 3, generator=torch.Generator().manual_seed(0)) * 31 + 1

    def drawn(step, *words, ranks=ALONE):
        cfg = config(f"mask={kind}", "mask_ratio=0.4", "patch=8", *words)
        return pretrain.draw_masks(cfg, joints.chunk(ranks.world)[ranks.rank], GRID, step, ranks)

    one, two = drawn(0)
    assert one.shape == two.shape == (8, 32) and one.dtype == torch.bool
    assert (torch.cat([one, two]).sum(1) == 13).all()  # .4 · 32 = 12.8
    for other in (two, drawn(1)[0], drawn(0, "seed=1")[0]):
        assert (one != other).any(1).all()  # every picture's
    halves = [drawn(0, ranks=common.Ranks(rank, 2, ALONE.device)) for rank in (0, 1)]
    for whole, again, *parts in zip((one, two), drawn(0), *halves, strict=True):
        assert torch.equal(whole, again) and torch.equal(whole, torch.cat(parts))
    assert drawn(0, "mask=none", "views=1") == [None]


def test_in_every_view_a_pictures_own_parts_are_masked_more_often_than_anothers():
    """All parts span the upper half of every second picture and the lower half of the rest."""
    joints = torch.tensor([31.0, 31, 2]).repeat(600, 17, 1)
    joints[:, [0, 5, 6, 13, 14]] = torch.tensor([1.0, 1, 2])
    joints[1::2, :, 1] += 32
    for mask in pretrain.draw_masks(config("patch=8"), joints, GRID, 0, ALONE):
        upper, lower = mask.float().view(300, 2, 2, 16).mean((0, 3)).T  # of the two kinds
        assert upper[0] - upper[1] > 0.1 and lower[1] - lower[0] > 0.1


# -------------------------------------------------------------------------------------------- model

# Every key differs from its default.
SHAPE = "size=tiny height=96 width=72 patch=12 mask_ratio=0.7 checkpoint_activations=true".split()
LOSSES = "gamma_align=0.3 gamma_mp=0.4 tau_align=0.25 tau_mp=0.15 mp_token=cls".split()
LOSSES += "views_are_positives=false gather_gradient=false pose_in_decoder=false".split()
LOSSES += "projector=mlp projector_width=24 projector_out=20".split()


def test_every_key_of_the_model_reaches_it():
    net = pretrain.build_model(config(*SHAPE, *LOSSES))
    vit, decoder = net.encoder, net.decoder
    assert (vit.width, vit.depth, vit.blocks[0].attn.heads) == (192, 6, 3)
    assert (vit.image_size, vit.patch_size, vit.n_special) == ((96, 72), 12, 2)
    assert vit.checkpoint_activations and decoder.checkpoint_activations
    assert not vit.pos_embed.requires_grad and not decoder.pos_embed.requires_grad
    assert (decoder.embed.out_features, len(decoder.blocks)) == (128, 2)
    assert decoder.blocks[0].attn.heads == 4 and decoder.drop_pose and decoder.n_special == 1
    assert net.n_visible == 48 - 34  # .7 · 48 = 33.6
    assert (net.gamma_align, net.gamma_mp, net.tau_align, net.tau_mp) == (0.3, 0.4, 0.25, 0.15)
    assert (net.token, net.views_are_positives, net.gather_gradient) == (0, False, False)
    sizes = [m.weight.shape for m in net.projector.layers if isinstance(m, nn.Linear)]
    assert sizes == [(24, 192), (24, 24), (20, 24)]
    bare = pretrain.build_model(config(*SHAPE, "decoder=false", "pose_token=false", "gamma_mp=0"))
    assert bare.decoder is bare.projector is bare.encoder.pose_token is None


@pytest.mark.parametrize("gather_gradient", [True, False])
def test_gather_gradient_decides_whether_keys_of_l_align_are_pulled(gather_gradient):
    options = dict(gamma_align=0.7, gamma_mp=0.0, tau_align=0.3)
    net = GenPoCCL(encoder(), None, gather_gradient=gather_gradient, **options)
    tokens = torch.randn(2, 6, 2, D, generator=torch.Generator().manual_seed(0)).requires_grad_()
    zero, own = torch.zeros(()), torch.arange(6)
    total = net.contrast(dict(special=tokens, rec=zero, mp=zero, health=[]), own)["total"]
    a, b = F.normalize(tokens[:, :, 0], dim=-1)
    keys_a, keys_b = (a, b) if gather_gradient else (a.detach(), b.detach())
    both = F.cross_entropy(a @ keys_b.T / 0.3, own) + F.cross_entropy(b @ keys_a.T / 0.3, own)
    expected = 0.7 * 2 * 0.3 * both
    close(total, expected)
    close(torch.autograd.grad(total, tokens), torch.autograd.grad(expected, tokens), 1e-6)


def test_l_rec_of_three_quarters_masked():
    vit = encoder()
    net = GenPoCCL(vit, Decoder(vit, 16, 1, 2), mask_ratio=0.75, gamma_align=0.0, gamma_mp=0.0)
    noise = torch.rand(2, 6, N, generator=torch.Generator().manual_seed(2))
    masks, images = (noise.argsort(2) < 24).unbind(), pictures()
    out, terms = net(images, masks, torch.arange(6)), []
    for mask, pred in zip(masks, out["pred"]):
        everywhere = torch.zeros(6, N, P * P * 3)
        everywhere[mask] = pred.flatten(0, 1)  # (6 · 24, p·p·3), in grid order
        terms.append(losses.reconstruction_loss(everywhere, images, mask, P))
    close(out["rec"], sum(terms) / 2)


def test_projector_is_three_layers_with_batch_norm_and_relu_after_two():
    torch.manual_seed(0)
    ours, one, two = losses.Projector(D, "mlp", 24, 20), nn.BatchNorm1d(24), nn.BatchNorm1d(24)
    for norm in (ours.layers[1], ours.layers[4]):
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    plain = [nn.Linear(D, 24, bias=False), one, nn.ReLU(), nn.Linear(24, 24, bias=False), two]
    plain = nn.Sequential(*plain, nn.ReLU(), nn.Linear(24, 20))
    plain.load_state_dict(ours.layers.state_dict())
    x = torch.randn(16, D)
    for training in (True, False):  # the second with the running statistics of the first
        close(ours.train(training)(x), plain.train(training)(x))


def test_first_weights_are_maes():
    torch.manual_seed(0)
    net = pretrain.build_model(config("size=tiny", "height=64", "width=32", "patch=8"))
    layers = [m for m in net.modules() if isinstance(m, nn.Linear)]
    assert len(layers) == 4 * (6 + 2) + 2  # qkv, proj, fc1, fc2 of each block; embed, head
    for layer in (*layers, net.encoder.patch_embed.proj):
        weight = layer.weight.detach().flatten(1)  # patches as by a linear layer
        bound = (6 / sum(weight.shape)) ** 0.5  # Xavier's, uniform
        assert 0.998 * bound < weight.abs().max() <= bound and not layer.bias.any()
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    for norm in (m for m in net.modules() if isinstance(m, nn.LayerNorm)):
        assert (norm.weight == 1).all() and not norm.bias.any() and norm.eps == 1e-6
    for token in (net.encoder.cls_token, net.encoder.pose_token, net.decoder.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.2)


# ----------------------------------------------------------------------------------------- pictures


def test_strong_augmentation_changes_as_many_pictures_as_stablereps(sets):
    """Grey: .2. Untouched: no jitter (.2), no grey (.8), no blur (.5) or one below .29 px (.05)."""
    read, epochs, grey, untouched = [read_people(sets[0])[0]], 600, 0, 0
    weak = PretrainPictures(read, (32, 16), 0, Augmentation(strong=False))
    strong = PretrainPictures(read, (32, 16), 0, Augmentation(strong=True))
    for epoch in range(epochs):
        a, b = weak[(epoch, 0)]["image"], strong[(epoch, 0)]["image"]
        assert not torch.equal(a[0], a[1])
        grey += torch.equal(b[0], b[1]) and torch.equal(b[1], b[2])
        untouched += torch.equal(a, b)
    for count, share in ((grey, 0.2), (untouched, 0.2 * 0.8 * 0.55)):
        assert abs(count / epochs - share) < 3 * (share * (1 - share) / epochs) ** 0.5


def test_every_key_of_the_pictures_reaches_them(sets):
    words = [f"annotations={sets[0]}", "pictures_per_pose=3", "batch=6", "height=64", "width=48"]
    keys = "box_padding=1.5 region=box crop_min=0.3 augmentation=strong shared=crop seed=4".split()
    dataset, batches, _ = pretrain.build_data(config(*words, *keys), ALONE)
    assert dataset.options == (1.5, "box", 0.3, True, "crop")
    assert (dataset.size, dataset.seed, batches.seed) == ((64, 48), 4, 4)
    assert (batches.size, batches.K) == (6, 3)


# ------------------------------------------------------------------------------ rates, weight decay


def torch_rates(steps, warmup, peak, after):
    """torch's rate of every step: linear from peak / warmup, then after(optimizer)."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    schedule, rates = after(optimizer), []
    if warmup:
        linear = LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1)
        schedule = SequentialLR(optimizer, [linear, schedule], [warmup])
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(("warmup", "floor"), [(0, 0.0), (1, 0.1), (7, 0.0), (7, 0.1)])
def test_rates_are_those_of_torchs_schedules(warmup, floor):
    ours = [common.learning_rate(step, 40, warmup, 0.5, floor) for step in range(40)]
    torchs = torch_rates(40, warmup, 0.5, lambda o: CosineAnnealingLR(o, 40 - warmup, floor))
    assert ours == pytest.approx(torchs, rel=1e-9)
    ours = [common.stepwise_rate(step, warmup, 0.5, [15, 30]) for step in range(40)]
    torchs = torch_rates(40, warmup, 0.5, lambda o: MultiStepLR(o, [15 - warmup, 30 - warmup]))
    assert ours == pytest.approx(torchs, rel=1e-9)


def by_name(model, groups, key):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group[key] for group in groups for p in group["params"]}


def test_weight_decay_is_for_matrices_alone():
    net = pretrain.build_model(config("size=tiny", "projector=mlp", "projector_width=24"))
    net.encoder.pos_embed.requires_grad = True  # as downstream
    decay = by_name(net, common.parameter_groups(net, 0.05), "weight_decay")
    linear = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    matrices = {f"encoder.blocks.{i}.{name}.weight" for i in range(6) for name in linear}
    matrices |= {f"decoder.blocks.{i}.{name}.weight" for i in range(2) for name in linear}
    matrices |= {f"projector.layers.{i}.weight" for i in (0, 3, 6)}
    matrices |= {"encoder.patch_embed.proj.weight", "decoder.embed.weight", "decoder.head.weight"}
    learned = {name for name, p in net.named_parameters() if p.requires_grad}
    assert decay == {name: 0.05 if name in matrices else 0.0 for name in learned}


def test_layers_near_the_pixels_learn_slower():
    """MAE's fine-tuning: embeddings are layer 0, block i is i + 1, what follows is full speed."""
    vit = encoder(depth=3, trainable_positions=True)
    model = nn.ModuleDict(dict(encoder=vit, head=nn.Linear(D, 5)))
    optimizer = torch.optim.AdamW(common.parameter_groups(model, 0.05, 0.75, depth=3))
    common.set_learning_rate(optimizer, 0.01)
    layers = {f"encoder.blocks.{i}.": i + 1 for i in range(3)} | {"encoder.norm.": 4, "head.": 4}
    rates = by_name(model, optimizer.param_groups, "lr")
    assert set(rates) == set(dict(model.named_parameters()))
    for name, rate in rates.items():
        layer = sum(number for start, number in layers.items() if name.startswith(start))
        assert rate == pytest.approx(0.01 * 0.75 ** (4 - layer)), name


# --------------------------------------------------------------------------------------- more ranks


def test_a_run_goes_on_with_more_ranks(sets, tmp_path, monkeypatch):
    """The folder as a kill after the save of step 4 leaves it: one rank before, two after."""
    whole, broken, save = tmp_path / "whole", tmp_path / "broken", pretrain.save
    keys = "epochs=3 save_every=2 precision=fp32 blr=5e-3 weight_decay=0.07 beta2=0.93".split()

    def save_and_copy(cfg, model, optimizer, step, *more):
        save(cfg, model, optimizer, step, *more)
        if step == 4:
            shutil.copytree(cfg.out, broken)

    monkeypatch.setattr(pretrain, "save", save_and_copy)
    monkeypatch.setattr(pretrain, "draw", lambda *_: "no pictures")
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments(sets, whole, *keys)])
    pretrain.main()
    done = run_script("pretrain.py", *arguments(sets, broken, *keys), ranks=2)
    assert done.returncode == 0 and "continues after step 4 of 9" in done.stderr, done.stderr
    for one, two in zip(rows(whole), rows(broken), strict=True):
        for name in ("loss", "rec", "align", "mp", "grad_norm", "positive_cosine", "without_pose"):
            assert two[name] == pytest.approx(one[name], rel=2e-3, abs=1e-4), (name, one["step"])
    one, two = (common.load_checkpoint(out / "last.pt") for out in (whole, broken))
    assert all(torch.allclose(p, two["model"][name], atol=2e-3) for name, p in one["model"].items())
    # blr · batch / 256; half an epoch of 3 steps of warm-up
    rates = torch_rates(9, 2, 5e-3 * 12 / 256, lambda o: CosineAnnealingLR(o, 9 - 2))
    assert [row["lr"] for row in rows(broken)] == pytest.approx(rates, rel=1e-5)
    for group in two["optimizer"]["param_groups"]:
        assert tuple(group["betas"]) == (0.9, 0.93) and group["weight_decay"] in (0.0, 0.07)
