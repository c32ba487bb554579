"""Pose training: each setting reaches what it is for; laws of augmentation, areas and sigmas."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pose_runs import QUICK, SMALL, people_file, run, sets, sgd
from scipy import stats

import common
import finetune_pose
import model
from formats import keypoints as readers
from formats.weights import build_encoder
from plumbing.config import read_config
from tasks import pose
from tasks import pose_metrics as metrics

# ------------------------------------------------------------------------------------ pose training

TRAIN = "head=classic epochs=3 milestones=1,2 warmup_steps=2 layer_decay=0.5 weight_decay=0.3"
TRAIN = [*QUICK, *TRAIN.split()]  # 12 people in batches of 6: two steps an epoch


def watched(patch, *words):
    """A run in this process. → (its model, the weights before, each step's drop-path noise)"""
    started, noises, resume, forward = [], [], common.resume, model.ViT.forward

    def look(path, network, *more):
        started.extend([network, {k: v.clone() for k, v in network.state_dict().items()}])
        return resume(path, network, *more)

    def listen(vit, images, drop_noise=None, **more):
        if torch.is_grad_enabled():
            noises.append(drop_noise)
        return forward(vit, images, drop_noise=drop_noise, **more)

    with patch.context() as own:
        own.setitem(model.SIZES, "tiny", SMALL)
        own.setattr(common, "resume", look)
        own.setattr(model.ViT, "forward", listen)
        run(*words)
    return *started, noises


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(dots, tmp_path_factory):
    """The same six steps without and with an evaluation after each epoch."""
    folder = tmp_path_factory.mktemp("trained")
    plain, evaluated = folder / "plain", folder / "evaluated"
    network, before, noises = watched(
        pytest.MonkeyPatch, *sets(*dots), *TRAIN, "eval_every=0", f"out={plain}"
    )
    watched(pytest.MonkeyPatch, *sets(*dots), *TRAIN, "eval_every=1", f"out={evaluated}")
    return SimpleNamespace(
        plain=plain, evaluated=evaluated, model=network, before=before, noises=noises
    )


def test_the_rate_of_each_step_is_torchs_warm_up_and_milestones_in_epochs(trained):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=5e-4)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 2, total_iters=1)
    drops = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])
    expected = []
    for _ in range(6):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        warm_up.step()
        drops.step()
    assert [row["lr"] for row in log_of(trained.plain)] == pytest.approx(expected, rel=1e-5)


def test_the_optimizer_has_the_layer_decay_and_weight_decay_asked_for(trained):
    state = common.load_checkpoint(trained.plain / "last.pt")["optimizer"]
    groups = state["param_groups"]
    # Embeddings, two blocks, and the rest.
    assert {group["lr_scale"] for group in groups} == {0.125, 0.25, 0.5, 1.0}
    decays = {1: 0.0, 2: 0.3, 3: 0.0, 4: 0.3}  # vectors; matrices; tokens, positions; convolutions
    seen = set()
    for group in groups:
        assert group["lr"] == pytest.approx(group["lr_scale"] * 5e-6)  # of the last step
        for number in group["params"]:
            ndim = state["state"][number]["exp_avg"].ndim
            assert group["weight_decay"] == decays[ndim]
            seen.add(ndim)
    assert seen == set(decays)


def test_every_step_drops_paths_by_noise_of_its_own(trained):
    assert len(trained.noises) == 6
    assert all(noise.shape == (2 * SMALL["depth"], 6) for noise in trained.noises)
    for step, noise in enumerate(trained.noises):
        assert 0 <= noise.min() and noise.max() < 1 and len(noise.unique()) == noise.numel()
        assert not any(torch.equal(noise, other) for other in trained.noises[:step])


def test_positions_learn_in_fine_tuning(trained):
    vit, _ = build_encoder(read_config(finetune_pose.KEYS, "", QUICK), False)
    assert vit.pos_embed.requires_grad
    name = "encoder.pos_embed"
    moved = (trained.model.state_dict()[name] - trained.before[name]).abs()
    assert moved.mean() > 1e-5


def test_an_evaluation_on_the_way_changes_nothing_of_training(trained):
    """The head's batch norm would, if it stayed in evaluation mode."""
    assert [row["epoch"] for row in log_of(trained.evaluated) if "AP" in row] == [1, 2]
    for name in ("last.pt", "model.safetensors"):
        assert (trained.plain / name).read_bytes() == (trained.evaluated / name).read_bytes()


def test_clip_grad_bounds_what_a_step_changes(dots, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune_pose, "build_optimizer", sgd)
    words = [*sets(*dots), *QUICK, "limit=6", "clip_grad=0.001", "lr=100", f"out={tmp_path}/run"]
    network, before, _ = watched(monkeypatch, *words)
    (row,) = log_of(tmp_path / "run")
    change = [(p.detach() - before[name]).norm() for name, p in network.named_parameters()]
    assert row["grad_norm"] > 0.002
    assert torch.stack(change).norm().item() == pytest.approx(100 * 0.001, rel=1e-2)


# ------------------------------------------------------------------------------------- augmentation


def clipped_normal(values, mean, sigma, low, high):
    """Is it N(mean, sigma), of which the bounds hold what lies beyond them?"""
    assert low - 1e-9 <= values.min() and values.max() <= high + 1e-9
    at_low, at_high = np.isclose(values, low), np.isclose(values, high)
    for mass, bound in ((at_low, low), (at_high, high)):
        beyond = stats.norm.sf(abs(bound - mean) / sigma)
        assert stats.binomtest(int(mass.sum()), len(values), beyond).pvalue > 1e-3
    bounds = (low - mean) / sigma, (high - mean) / sigma
    inside = stats.truncnorm(*bounds, loc=mean, scale=sigma)
    assert stats.kstest(values[~at_low & ~at_high], inside.cdf).pvalue > 1e-3


def test_scale_and_rotation_are_drawn_as_vitpose_draws_them(dots):
    """mmpose's TopDownGetRandomScaleRotation(rot_factor=40, scale_factor=0.5, rot_prob=0.6)."""
    people, _ = readers.read_pose_file(dots[0])
    cfg = read_config(finetune_pose.KEYS, "", [*QUICK, "half_body=0"])
    dataset = pose.PosePictures(cfg, people, training=True)
    dataset.picture = lambda index: Image.new("RGB", (8, 8))
    linear = np.stack([dataset[epoch, 2]["matrix"][:, :2] for epoch in range(4000)])
    # The second column of an affine matrix is not mirrored: (−sin, cos) × px per input px.
    column = linear[:, :, 1]
    scale = np.linalg.norm(column, axis=1) * (cfg.height - 1) / dataset.extent[2, 1]
    degrees = np.degrees(np.arctan2(-column[:, 0], column[:, 1]))
    clipped_normal(scale, 1, 0.5, 0.5, 1.5)
    turned = degrees[np.abs(degrees) > 1e-9]
    assert stats.binomtest(len(turned), 4000, 0.6).pvalue > 1e-3
    clipped_normal(turned, 0, 40, -80, 80)


# ------------------------------------------------------------------------------------------ figures


@pytest.mark.parametrize("best", [5000, 20000])
@pytest.mark.parametrize("similar, kept", [(0.92, [0]), (0.88, [0, 1])])
def test_a_duplicates_area_is_the_mean_of_both(best, similar, kept):
    """5,000 and 20,000 px². By one of the areas alone each pair would be judged otherwise."""
    sigmas = np.full(17, 0.05)  # OKS = exp(−d² / (.02 · area))
    xy = np.random.default_rng(0).uniform(0, 100, (17, 2))
    away = np.sqrt(-0.02 * 12500 * np.log(similar))
    found = metrics.oks_nms(
        np.stack([xy, xy + [away, 0]]), [0.9, 0.8], np.array([best, 25000.0 - best]), sigmas
    )
    assert found == kept


def test_aics_sigmas_are_its_evaluators():
    """AI_Challenger_2017's keypoint_eval.py, half its δ; order of the joints: its annotations."""
    right = dict(shoulder=0.01388152, elbow=0.01515228, wrist=0.01057665)
    right |= dict(hip=0.03909642, knee=0.03686941, ankle=0.01981803)
    left = dict(shoulder=0.01417709, elbow=0.01497891, wrist=0.01402144)
    left |= dict(hip=0.03843971, knee=0.03412318, ankle=0.02415081)
    expected = {f"right_{joint}": sigma for joint, sigma in right.items()}
    expected |= {f"left_{joint}": sigma for joint, sigma in left.items()}
    expected |= dict(head_top=0.01291456, neck=0.01236173)
    sigmas, source = metrics.oks_sigmas(readers.AIC_JOINTS)
    assert dict(zip(readers.AIC_JOINTS, sigmas.tolist())) == expected and "AIC" in source


@pytest.mark.parametrize("joints, by_box", [(readers.AIC_JOINTS, True), (None, False)])
def test_aics_area_is_half_the_box_whatever_the_file_says(tmp_path, joints, by_box):
    """As CrowdPose's. A file of COCO's joints keeps its areas."""
    path = people_file(tmp_path, 4, 6, **({"joints": joints} if joints else {}))
    document = json.loads(path.read_text())
    for row in document["annotations"]:
        row["area"] = 1.0
    path.write_text(json.dumps(document))
    people, _, document = readers.read_truth(path)
    expected = 0.53 * people.boxes[:, 2:].prod(1) if by_box else np.ones(4)
    assert np.allclose(people.area, expected)
    assert np.allclose([row["area"] for row in document["annotations"]], expected)
