"""accumulate=N: the gradient of a batch taken in N parts is that of the whole batch.

In float64 for every parameter, on ranks, in bf16; its memory; pretrain.py's log, kills, refusals.
"""

import os
import shutil
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import kill_after
from pretrain_runs import arguments, rows, without_speed
from small_batch import assert_same
from small_models import D, N, encoder, pictures
from test_speed import PeakMemory

import common
import pretrain
from common import backward_in_parts
from losses import Projector
from model import Decoder, GenPoCCL
from plumbing.errors import UserError

B = 8
FIGURES = ("total", "rec", "align", "mp")
# Every pose group with two pictures or more lies in several parts of two and of four.
POSES = {
    "across parts": [0, 1, 2, 3, 0, 1, 2, 3],
    "some without pose": [0, -1, 1, 0, -1, 1, 4, 0],
    "no positive pair": [0, 1, 2, 3, 4, 5, 6, -1],
}
HAP = dict(gamma_mp=0.0, pose_token=False)
STABLEREP = dict(gamma_align=0.0, gamma_mp=1.0, mp_token="cls", pose_token=False, decoder=False)
MAE = dict(gamma_align=0.0, gamma_mp=0.0, pose_token=False)
SETTINGS = {
    "GenPoCCL": dict(),
    "mlp": dict(kind="mlp"),
    "cls": dict(mp_token="cls", kind="mlp"),
    "keys without gradient": dict(gather_gradient=False),
    "each view by itself": dict(views_are_positives=False, kind="mlp"),
    "pose not decoded": dict(pose_in_decoder=False),
    "one view": dict(views=1, gamma_align=0.0, kind="mlp"),
    "recomputed": dict(checkpoint_activations=True),
    "HAP": HAP,
    "MAE": MAE | dict(views=1),
    "StableRep": STABLEREP | dict(views=1, kind="mlp"),
}


def net_of(
    kind="none", pose_token=True, pose_in_decoder=True, decoder=True, checkpoint_activations=False,
    dtype=torch.float64, **options,
):  # fmt: skip
    vit = encoder(pose_token=pose_token, checkpoint_activations=checkpoint_activations)
    decoder = Decoder(vit, 16, 2, 4, pose_in_decoder) if decoder else None
    return GenPoCCL(vit, decoder, Projector(D, kind, 24, 12), **options).to(dtype)


def batch_of(net, views=2, poses="across parts"):
    g = torch.Generator().manual_seed(3)
    masks = [torch.rand(B, N, generator=g).argsort(1) < N // 2 for _ in range(views)]
    images = pictures(B).to(net.encoder.cls_token.dtype)
    return images, masks if net.decoder else [None], torch.tensor(POSES[poses])


def learned(net, batch, parts, bf16=False):
    """→ (figures, bad, gradients, running statistics) of a step; parts 0: forward and backward."""
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    if parts:
        out = backward_in_parts(net, batch, parts, autocast)
    else:
        with autocast:
            out = net(*batch)
        out["total"].backward()
    figures = [out[name].detach() for name in FIGURES]
    figures += [figure for one in out["health"] for figure in one.values()]
    gradients = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
    return figures, out["bad"], gradients, list(net.buffers())


def assert_same_step(found, expected):
    assert_same(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert found[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        assert gradient.abs().max() > 0, name
        assert_same([found[2][name]], [gradient])
    assert_same(found[3], expected[3])


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_gradient_is_the_whole_batchs(name, parts):
    options = dict(SETTINGS[name])
    views = options.pop("views", 2)
    whole, cut = net_of(**options), net_of(**options)
    expected = learned(whole, batch_of(whole, views), 0)
    assert_same_step(learned(cut, batch_of(cut, views), parts), expected)


@pytest.mark.parametrize("poses", list(POSES)[1:])
def test_whichever_poses_the_parts_hold(poses):
    whole, cut = (net_of("mlp", views_are_positives=False) for _ in range(2))
    expected = learned(whole, batch_of(whole, poses=poses), 0)
    found = learned(cut, batch_of(cut, poses=poses), B)  # a part for each picture
    assert (expected[0][3] == 0) == (poses == "no positive pair")
    assert_same(found[0], expected[0])
    for name, gradient in expected[2].items():
        assert_same([found[2][name]], [gradient])


def test_adding_up_the_losses_of_parts_is_something_else():
    """What HAP's engine_pretrain.py does for ACCUM_ITER: each part is compared with itself."""
    whole, cut = net_of(gamma_align=1.0, gamma_mp=0.0), net_of(gamma_align=1.0, gamma_mp=0.0)
    images, masks, pose_id = batch_of(cut)
    learned(whole, (images, masks, pose_id), 0)
    for part in torch.arange(B).chunk(4):
        (cut(images[part], [m[part] for m in masks], pose_id[part])["total"] / 4).backward()
    nets = [[p.grad for p in net.encoder.parameters() if p.requires_grad] for net in (whole, cut)]
    a, b = (torch.cat([gradient.flatten() for gradient in net]) for net in nets)
    assert torch.cosine_similarity(a, b, dim=0) < 0.95


def test_bad_pictures_are_named():
    net = net_of()
    images, masks, pose_id = batch_of(net)
    images[5, 0, 3, 3] = float("nan")
    figures, bad, _, _ = learned(net, (images, masks, pose_id), 4)
    assert bad.nonzero().flatten().tolist() == [5] and not figures[0].isfinite()


def test_bf16_is_that_of_the_whole_batch():
    """In bf16 a gradient is some way from the exact one: that of the parts is the whole batch's."""

    def gradient(parts, bf16):
        net = net_of("mlp", dtype=torch.float32 if bf16 else torch.float64)
        gradients = learned(net, batch_of(net), parts, bf16)[2].values()
        return torch.cat([gradient.double().flatten() for gradient in gradients])

    def gap(a, b):
        return (a - b).norm() / b.norm()

    exact, whole = gradient(0, False), gradient(0, True)
    for parts in (2, 4):
        cut = gradient(parts, True)
        assert gap(cut, whole) < 0.01 < gap(whole, exact)
        assert gap(cut, exact) < 1.01 * gap(whole, exact)


def test_memory_is_that_of_a_part():
    """Counted bytes: four parts hold little more than a batch of a quarter does."""

    def peak(times, parts):
        net = net_of(dtype=torch.float32)
        images, masks, pose_id = batch_of(net)
        images, masks = images.repeat(times, 1, 1, 1), [m.repeat(times, 1) for m in masks]
        with PeakMemory(*net.parameters(), images, *masks) as memory:
            learned(net, (images, masks, pose_id.repeat(times)), parts)
        return memory.peak

    whole, quarter, cut = peak(8, 0), peak(2, 0), peak(8, 4)
    assert cut < 1.15 * quarter < 0.4 * whole


# -------------------------------------------------------------------------------------------- ranks


ON_RANKS = ("mlp", "keys without gradient")


def one_rank(rank, world, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    found, own = {}, slice(rank * B // world, (rank + 1) * B // world)
    for name in ON_RANKS:
        net = net_of(**SETTINGS[name])
        common.distributed(net, torch.device("cpu"))  # as in pretrain.py, where nobody calls it
        images, masks, pose_id = batch_of(net, poses="some without pose")
        figures, bad, gradients, buffers = learned(
            net, (images[own], [m[own] for m in masks], pose_id[own]), 2
        )
        mean = torch.stack(figures[:4])
        dist.all_reduce(mean)
        found[name] = [mean / world, *gradients.values(), *buffers]
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_of_two_parts_are_one_process(tmp_path):
    mp.spawn(one_rank, (2, str(tmp_path)), 2)
    for name in ON_RANKS:
        net = net_of(**SETTINGS[name])
        figures, _, gradients, buffers = learned(net, batch_of(net, poses="some without pose"), 0)
        alone = [torch.stack(figures[:4]), *gradients.values(), *buffers]
        for rank in range(2):
            assert_same(torch.load(tmp_path / f"rank{rank}.pt")[name], alone)


# -------------------------------------------------------------------------------------- pretrain.py


KEYS = "epochs=2 save_every=2 precision=fp32 projector=mlp projector_width=32 projector_out=16"


def pretrain_here(sets, out, *more):
    """pretrain.py in this process, as from the command line: 6 steps of 12 pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pretrain.py", *arguments(sets, out, *KEYS.split(), *more)])
        pretrain.main()
    return out


@pytest.fixture(scope="module")
def cut(sets, tmp_path_factory):
    return pretrain_here(sets, tmp_path_factory.mktemp("cut") / "run", "accumulate=2")


def assert_same_logs(one, other):
    assert len(rows(one)) == len(rows(other)) == 6
    for a, b in zip(without_speed(one), without_speed(other)):
        assert a.keys() == b.keys()
        for name in a:  # AdamW makes rounding larger from step to step
            assert b[name] == pytest.approx(a[name], rel=2e-5 if a["step"] == 1 else 2e-3), name


def test_the_log_is_the_whole_batchs(sets, cut, tmp_path):
    assert_same_logs(pretrain_here(sets, tmp_path / "run"), cut)


def test_kill_and_resume_is_bitwise(sets, cut, tmp_path):
    """And a killed run may go on in other parts: more where memory was short."""
    out = tmp_path / "run"
    command = arguments(sets, out, *KEYS.split(), "accumulate=2")
    assert kill_after("pretrain.py", *command, lines=3, log=out / "log.jsonl")
    shutil.copytree(out, tmp_path / "copy")
    config = tmp_path / "copy/config.yaml"
    config.write_text(config.read_text().replace(str(out), str(tmp_path / "copy")))
    pretrain_here(sets, out, "accumulate=2")
    for name in ("last.pt", "encoder.safetensors"):
        assert (out / name).read_bytes() == (cut / name).read_bytes(), name
    assert without_speed(out) == without_speed(cut)
    assert_same_logs(pretrain_here(sets, tmp_path / "copy", "accumulate=6"), cut)


def test_parts_are_equal_or_refused(sets, tmp_path):
    with pytest.raises(UserError, match="accumulate=5 must divide the 12 pictures of a rank"):
        pretrain_here(sets, tmp_path / "run", "accumulate=5")
    assert not (tmp_path / "run").exists()
