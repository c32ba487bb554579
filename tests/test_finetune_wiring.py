"""What ReID, attributes and text to image hand on: settings to the optimiser, features and noise to
the losses and the encoder, averaged weights to the files. Tiny runs, watched from inside.
"""

import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pose_runs import SMALL
from reid_runs import MACHINE, rows
from small_models import close, encoder, pictures
from test_finetune_par import write_people
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR
from torch.optim.optimizer import register_optimizer_step_pre_hook

import finetune_par
import finetune_reid
import finetune_t2i
import model
from common import load_checkpoint
from formats.attributes import Split
from formats.market import read_data
from tasks import reid
from tasks.attributes import AttributePictures

DEPTH, CLIP, T2I_PEOPLE, COLOURS = SMALL["depth"], 0.05, 6, ("red", "green", "blue", "white")
TINY = ["size=tiny", "patch=8", "height=32", "width=16", "pad=2", *MACHINE, f"clip_grad={CLIP}"]
REID = [*TINY, "epochs=2", "people=6", "pictures_per_person=2", "bnneck=true", "lr=1e-3"]
REID += ["weight_decay=0.3", "layer_decay=0.5"]
PAR = [*TINY, "batch=24", "lr=1e-2", "min_lr=2e-3", "warmup=0.25", "ema=0.9", "weight_decay=0.03"]
T2I = [*TINY, "epochs=3", "batch=4", "lr=2e-3", "lr_encoder=5e-4", "milestones=[1, 2]"]
T2I += ["warmup_epochs=0.7", "project=16", "margin=0.5"]


def noted(function, notes):
    """The function itself, but each call leaves (what it was given, by name, what it gave)."""

    def call(*given, **named):
        notes.append((given, named, function(*given, **named)))
        return notes[-1][2]

    return call


class Run:
    """A stage's main in this process with a smaller encoder, and of each step: the rates of the
    optimiser's groups, the norm of the gradient that it takes, the encoder's drop_noise; in ReID
    the [CLS] that is made and the feature that the triplet loss compares.
    """

    def __init__(self, stage, out, *words):
        self.out, self.rates, self.norms = out, [], []
        encoded, compared = [], []
        hook = register_optimizer_step_pre_hook(self.watch_step)
        with hook, pytest.MonkeyPatch.context() as patch:
            patch.setitem(model.SIZES, "tiny", SMALL)
            patch.setattr(model.ViT, "forward", noted(model.ViT.forward, encoded))
            compare = noted(finetune_reid.triplet_loss, compared)
            patch.setattr(finetune_reid, "triplet_loss", compare)
            patch.setattr(sys, "argv", [stage.__name__, f"out={out}", *words])
            stage.main()
        self.noises = [named.get("drop_noise") for _, named, _ in encoded]
        self.features = [(x[2][:, 0], y[0][0]) for x, y in zip(encoded, compared)]
        self.log = [row for row in rows(out) if "loss" in row]
        self.groups = self.saved("last.pt")["optimizer"]["param_groups"]

    def watch_step(self, optimizer, *_):
        groups = optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        self.rates.append([group["lr"] for group in groups])
        self.norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())

    def logged(self, name):
        return [row[name] for row in self.log]

    def saved(self, name):
        return load_checkpoint(self.out / name)


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def reid_run(data, tmp_path_factory):
    return Run(finetune_reid, tmp_path_factory.mktemp("reid") / "run", f"data={data}", *REID)


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    folder, counts = tmp_path_factory.mktemp("people"), {"train": 24, "val": 9, "test": 7}
    return {kind: write_people(folder, kind, n, n) for kind, n in counts.items()}


@pytest.fixture(scope="module")
def par_run(people, tmp_path_factory):
    """Eight epochs of 1 step, on all pictures, from a head of zeros: it says .5 of everything."""
    out, build = tmp_path_factory.mktemp("par") / "run", finetune_par.build_model

    def build_with_zeros(*inputs):
        built = build(*inputs)
        for weight in built[0].head.parameters():
            torch.nn.init.zeros_(weight)
        return built

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune_par, "build_model", build_with_zeros)
        files = [f"{kind}={people[kind]}" for kind in ("train", "test")]
        return Run(finetune_par, out, *files, *PAR, "epochs=8")


@pytest.fixture(scope="module")
def t2i_run(tmp_path_factory):
    """Three epochs of 3 steps, on 6 people with 2 pictures each, of one sentence each."""
    folder, rng, entries = tmp_path_factory.mktemp("t2i"), np.random.default_rng(0), []
    (folder / "imgs").mkdir()
    for person, k in np.ndindex(T2I_PEOPLE + 2, 2):
        name, split = f"{person}_{k}.png", "train" if person < T2I_PEOPLE else "test"
        Image.fromarray(rng.integers(0, 256, (32, 16, 3), np.uint8)).save(folder / "imgs" / name)
        texts = [f"{COLOURS[person % 4]} over {COLOURS[person // 4]}"]
        entries.append({"id": person, "img_path": name, "captions": texts, "split": split})
    (folder / "c.json").write_text(json.dumps(entries))
    return Run(finetune_t2i, folder / "run", f"captions={folder}/c.json", *T2I)


# -------------------------------------------------------------------------- optimisation and losses


def test_reid_decays_rates_by_layer_and_weights_but_for_vectors(reid_run):
    found = {(group["lr_scale"], group["weight_decay"]) for group in reid_run.groups}
    scales = [0.5**k for k in range(DEPTH + 2)]  # head, blocks, embeddings
    assert found == {(scale, decay) for scale in scales for decay in (0.0, 0.3)}


def test_par_decays_all_weights_alike_and_t2i_none(par_run, t2i_run):
    decays = [[group["weight_decay"] for group in run.groups] for run in (par_run, t2i_run)]
    assert decays == [[0.03], [0, 0]]


def test_t2i_moves_the_encoder_at_its_own_rate(t2i_run):
    assert t2i_run.rates[2] == pytest.approx([5e-4, 2e-3])  # behind the warm-up


@pytest.fixture(params=["reid_run", "par_run", "t2i_run"])
def run(request):
    return request.getfixturevalue(request.param)


def test_each_group_has_the_logged_rate_times_its_scale(run):
    scales = np.array([group.get("lr_scale", 1.0) for group in run.groups])
    np.testing.assert_allclose(run.rates, np.outer(run.logged("lr"), scales), rtol=1e-5)


def test_the_optimiser_takes_no_gradient_longer_than_clip_grad(run):
    assert min(run.logged("grad_norm")) > 1.05 * CLIP  # what is logged is its norm before
    assert run.norms == pytest.approx([CLIP] * len(run.log), rel=1e-3)


def rates_of_torch(peak, steps, schedule):
    """The rate of each step; schedule: optimiser → scheduler."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    scheduler, rates = schedule(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_par_warms_up_and_falls_to_min_lr_on_torchs_cosine(par_run):
    cosine = rates_of_torch(1e-2, 6, lambda optimizer: CosineAnnealingLR(optimizer, 6, 2e-3))
    assert par_run.logged("lr") == pytest.approx([0.5e-2, 1e-2, *cosine], rel=1e-5)


def test_t2i_rates_fall_at_the_milestones_of_torch_counted_in_epochs(t2i_run):
    falls = rates_of_torch(2e-3, 9, lambda optimizer: MultiStepLR(optimizer, [1 * 3, 2 * 3]))
    # two steps of warm-up, .7 epochs
    assert t2i_run.logged("lr") == pytest.approx([1e-3, *falls[1:]], rel=1e-5)


def test_t2i_begins_at_chance_for_picture_and_text_and_adds_the_ranking_loss(t2i_run):
    assert t2i_run.log[0]["identity"] == pytest.approx(2 * math.log(T2I_PEOPLE), abs=0.05)
    for row in t2i_run.log:
        assert row["loss"] == pytest.approx(row["identity"] + row["rank_loss"], rel=3e-5)
    assert max(t2i_run.logged("rank_loss")) > 0.1


def test_par_weighs_by_the_training_set(par_run, people):
    ratio = np.loadtxt(people["train"], delimiter=",", skiprows=1, usecols=(1, 2, 3, 4)).mean(0)
    # at logits of 0 each cross-entropy is ln 2; a share r weighs e^(1 − r), the others e^r
    weight = ratio * np.exp(1 - ratio) + (1 - ratio) * np.exp(ratio)
    assert par_run.log[0]["loss"] == pytest.approx(weight.sum() * math.log(2), rel=1e-5)


def test_reids_triplet_loss_takes_the_feature_as_it_is(reid_run):
    assert len(reid_run.features) == len(reid_run.log) == 4
    for made, compared in reid_run.features:
        assert torch.equal(made, compared) and made.norm(dim=1).min() > 1.5  # not of length 1


@pytest.mark.parametrize(("name", "batch"), [("reid_run", 12), ("t2i_run", 4)])
def test_drop_path_gets_new_noise_in_each_step(name, batch, request):
    run = request.getfixturevalue(name)
    noises = run.noises[: len(run.log)]  # behind them is the evaluation
    assert [noise.shape for noise in noises] == [(2 * DEPTH, batch)] * len(run.log)
    numbers = torch.stack(noises).flatten().tolist()
    assert len(set(numbers)) > 0.99 * len(numbers) and 0 <= min(numbers) < max(numbers) < 1


# -------------------------------------------------------------------- figures, weights and pictures


def test_reid_figures_are_the_cmc_at_1_5_and_10_or_at_its_end():
    long, short = np.arange(1, 13) / 100, np.arange(1, 5) / 100
    result = {"mAP": 0.3, "cmc": long, "reranked": {"mAP": 0.2, "cmc": short}}
    want = {"mAP": 0.3, "rank1": 0.01, "rank5": 0.05, "rank10": 0.1, "reranked_mAP": 0.2}
    want |= {"reranked_rank1": 0.01, "reranked_rank5": 0.04, "reranked_rank10": 0.04}
    assert finetune_reid.figures_of(result) == want


def test_reid_trains_on_after_an_evaluation_as_if_there_were_none(reid_run, data, tmp_path):
    run = Run(finetune_reid, tmp_path / "run", f"data={data}", *REID, "eval_every=1")
    assert [row["step"] for row in rows(run.out) if "mAP" in row] == [2, 4]
    assert same_weights(run.saved("last.pt")["model"], reid_run.saved("last.pt")["model"])
    assert run.log == reid_run.log


def test_reid_compares_pictures_behind_the_neck():
    net, images = reid.ReID(encoder(), "cls", 4, neck=True).eval(), pictures()
    mean, variance, scale = net.neck.running_mean, net.neck.running_var, net.neck.weight.detach()
    for values in (mean, variance, scale):
        values.copy_(torch.rand(32) + 0.5)
    want = (net.encoder(images)[:, 0] - mean) / (variance + 1e-5).sqrt() * scale
    close(net.embed(images), want / want.norm(dim=1, keepdim=True))


def test_par_reports_the_average_of_the_weights(par_run):
    written = par_run.saved("model.safetensors")
    assert same_weights(written, par_run.saved("last.pt")["ema"])
    assert not same_weights(written, par_run.saved("last.pt")["model"])  # those of the last step
    assert written["head.weight"].any()  # nor those of the first, zeros


def test_par_remembers_its_best_epoch_over_a_kill(people, tmp_path, monkeypatch):
    """The mA of each epoch on validation, and the last one on test, are told here."""
    measure, told = finetune_par.attribute_metrics, []

    def tell(p, labels):
        if not told:
            raise KeyboardInterrupt
        return measure(p, labels) | {"mA": told.pop(0)}

    monkeypatch.setattr(finetune_par, "attribute_metrics", tell)
    words = [*(f"{kind}={file}" for kind, file in people.items()), *PAR, "epochs=4", "select=val"]
    told += [0.6, 0.9, 0.5, 0.7, 1.0]
    whole = Run(finetune_par, tmp_path / "whole", *words)
    told += [0.6, 0.9]
    with pytest.raises(KeyboardInterrupt):  # while epoch 3 is evaluated
        Run(finetune_par, tmp_path / "cut", *words)
    told += [0.5, 0.7, 1.0]
    cut = Run(finetune_par, tmp_path / "cut", *words)
    for run in (whole, cut):
        assert [run.saved("last.pt")[name] for name in ("best", "best_epoch")] == [0.9, 2]
        assert same_weights(run.saved("model.safetensors"), run.saved("best.pt")["ema"])
    files = [run.out / "model.safetensors" for run in (whole, cut)]
    assert files[0].read_bytes() == files[1].read_bytes() and rows(whole.out) == rows(cut.out)


def test_attribute_pictures_are_shifted_by_the_border_and_mirrored(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 16, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    split = Split([str(tmp_path / "x.png")], np.zeros((1, 2), np.int8))
    plain = AttributePictures(split, (32, 16))[0]["image"]
    assert np.array_equal(plain, pixels.transpose(2, 0, 1))
    bordered = F.pad(plain, (2, 2, 2, 2))
    shifts = [bordered[:, y : y + 32, x : x + 16] for y in range(5) for x in range(5)]
    known = {x.numpy().tobytes(): n for n, x in enumerate(shifts + [x.flip(2) for x in shifts])}
    dataset = AttributePictures(split, (32, 16), seed=0, pad=2, augment=True)
    seen = {known[dataset[(epoch, 0)]["image"].numpy().tobytes()] for epoch in range(60)}
    assert len(seen) > 20 and min(seen) < 25 <= max(seen)


def test_reid_pictures_are_erased_as_often_as_asked(data):
    people = read_data(data)[0]
    items = [(epoch, index, 0) for epoch in range(4) for index in range(len(people.files))]

    def taken(erase):
        dataset = reid.AugmentedPictures(people, (32, 16), 0, erase, seed=0)
        return torch.stack([dataset[item]["image"] for item in items])

    whole = taken(0)
    for erase, low, high in ((0, 0, 0), (0.5, 0.4, 0.6), (1, 1, 1)):
        changed = (taken(erase) != whole).any(1).flatten(1).float().mean(1)  # share of each picture
        assert low <= (changed > 0).float().mean() <= high
        assert changed.max() < 0.36  # the rest is as it was
