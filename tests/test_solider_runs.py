"""SOLIDER's controller and its λ in the stages, its claim, the runs of its script."""

import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from coco_sets import write_set
from conftest import kill_after, run_script
from reid_runs import PLAIN, market

import finetune_reid
from baselines import solider
from baselines.solider_parts import (
    distances,
    drawn_people,
    label_quality,
    part_distances,
    patch_parts,
)
from common import load_checkpoint
from formats.weights import AS_IS, build_encoder, load_into, meta_of
from model import SIZES, ViT, load_encoder
from plumbing.errors import UserError
from plumbing.files import save_weights

SMALL = "size=tiny height=64 width=32 patch=8 local_crops=2 local_height=32 local_width=16"
SMALL += " out_dim=24 head_hidden=16 batch=6 warmup_epochs=0.5 device=cpu workers=0 precision=fp32"
SMALL += " controller_lr=3"


# --------------------------------------------------------------------------------------- controller


def tiny_vit(controller, size=(32, 16), **more):
    s = SIZES["tiny"]
    torch.manual_seed(5)
    shape = s["width"], s["depth"], s["heads"], size, 8, False
    return ViT(*shape, controller=controller, **more)


@torch.no_grad()
def test_the_controller_stands_after_a_quarter_half_and_three_quarters():
    plain, vit, images = tiny_vit(False), tiny_vit(True), torch.randn(2, 3, 32, 16)
    own = {name: p for name, p in vit.state_dict().items() if ".controller." not in name}
    assert own.keys() == plain.state_dict().keys() and plain.semantic_weight is None
    vit.load_state_dict(plain.state_dict(), strict=False)
    x = plain.embed(images)
    for block in plain.blocks:
        x = block(x)
    assert torch.equal(plain(images), plain.norm(x))  # as before, bit for bit
    weight, x = torch.tensor([0.0, 0.3]), vit.embed(images)
    for i, block in enumerate(vit.blocks, 1):
        x = block(x)
        if i in (1, 3, 4):  # of 6: whole blocks
            c = block.controller
            assert 0.01 < c.scale.weight.std() < 0.03 and not c.scale.bias.any()
            for row, w in enumerate(weight):
                pair = torch.tensor([w, 1 - w])
                scale = torch.log1p(torch.exp(c.scale.weight @ pair + c.scale.bias))
                x[row] = x[row] * scale + c.shift.weight @ pair + c.shift.bias
    torch.testing.assert_close(vit(images, semantic_weight=weight), vit.norm(x))
    assert torch.equal(vit(images), vit(images, semantic_weight=torch.ones(2)))
    s = SIZES["base"]
    base = ViT(16, s["depth"], 2, (16, 16), 8, controller=True)
    assert [i for i, b in enumerate(base.blocks, 1) if b.controller is not None] == [3, 6, 9]


def stage_encoder(path, own=0.8, weights=None, **changes):
    keys = dict(size="tiny", patch=8, pose_token=True, height=32, width=16, semantic_weight=-1.0)
    keys |= dict(encoder=str(path) if path else None, weights=weights, checkpoint_activations=False)
    return build_encoder(SimpleNamespace(**AS_IS | keys | changes), False, semantic_weight=own)


def test_semantic_weight_of_a_stage(tmp_path):
    with_it, without = tmp_path / "with.safetensors", tmp_path / "without.safetensors"
    vit = tiny_vit(True)
    nn.init.normal_(vit.blocks[0].controller.shift.weight)
    save_weights(with_it, vit, **meta_of(vit))
    save_weights(without, tiny_vit(False), **meta_of(tiny_vit(False)))
    assert "semantic_weight" not in meta_of(tiny_vit(False))
    images, at = (
        torch.randn(2, 3, 32, 16),
        lambda w: vit(images, semantic_weight=torch.full((2,), w)),
    )
    for own in (0.2, 0.8):
        ours, said = stage_encoder(with_it, own)
        assert torch.equal(ours(images), at(own)) and f"λ = {own}" in said
    chosen, _ = stage_encoder(with_it, semantic_weight=0.0)
    assert torch.equal(chosen(images), at(0.0)) and not torch.equal(chosen(images), at(0.2))
    save_weights(
        tmp_path / "model.safetensors", chosen, **meta_of(chosen)
    )  # as a finished run does
    again, _ = stage_encoder(None, weights=str(tmp_path / "model.safetensors"))
    assert again.semantic_weight == 0.0
    home = load_encoder(tmp_path / "model.safetensors")
    assert torch.equal(home(images), at(0.0))
    assert stage_encoder(without)[0].semantic_weight is None
    for path in (without, None):
        with pytest.raises(UserError, match="semantic_weight=0.5: .* has no controller"):
            stage_encoder(path, semantic_weight=0.5)
    with pytest.raises(UserError, match="this ViT has nothing for blocks.0.controller"):
        load_into(tiny_vit(False), with_it)
    assert ".controller." in load_into(tiny_vit(True), without)  # they keep their start


@torch.no_grad()
def test_what_was_learnt_without_controllers_is_there_when_they_begin(tmp_path):
    plain, images = tiny_vit(False), torch.randn(4, 3, 32, 16)
    save_weights(tmp_path / "plain.safetensors", plain, **meta_of(plain))
    vit, shrinking = tiny_vit(True), tiny_vit(True)
    assert ".controller." in solider.start_from(vit, tmp_path / "plain.safetensors")
    load_into(shrinking, tmp_path / "plain.safetensors")
    norms = [x(images, final_norm=False).norm(dim=2) for x in (plain, vit, shrinking)]
    assert ((norms[1] - norms[0]).abs() < 0.05 * norms[0]).all()
    assert ((norms[2] - norms[0]).abs() > 0.1 * norms[0]).all()
    nn.init.normal_(vit.blocks[0].controller.scale.bias)  # what the file holds stands
    save_weights(tmp_path / "own.safetensors", vit, **meta_of(vit))
    solider.start_from(shrinking, tmp_path / "own.safetensors")
    assert torch.equal(shrinking(images), vit(images))


# ---------------------------------------------------------------------------------------- the claim


def test_part_distances_are_the_plain_loops():
    g = torch.Generator().manual_seed(6)
    part = torch.randn(5, 4, 3, generator=g, dtype=torch.float64)
    seen = torch.rand(5, 4, generator=g) < 0.7
    z = F.normalize(part, dim=2)
    one = [
        1 - z[i, p] @ z[i, q]
        for i in range(5) for p in range(4) for q in range(4)
        if p != q and seen[i, p] and seen[i, q]
    ]  # fmt: skip
    mine, other = part_distances(part, seen)
    assert torch.allclose(mine, torch.stack(one).mean())
    for p in range(4):
        pairs = [
            1 - z[i, p] @ z[j, p]
            for i in range(5) for j in range(5) if i != j and seen[i, p] and seen[j, p]
        ]  # fmt: skip
        assert torch.allclose(other[p], torch.stack(pairs).mean())


def test_true_parts_of_drawn_people_and_the_table():
    images, truth = drawn_people(6, (64, 32), 0)
    assert images.shape == (6, 3, 64, 32) and truth.unique().tolist() == [0, 1, 2, 3, 4]
    own = patch_parts(truth, 8)
    for i in range(6):
        patches = truth[i].view(8, 8, 4, 8).transpose(1, 2).reshape(32, 64)
        for n, patch in enumerate(patches):
            count = [int((patch == part).sum()) for part in (1, 2, 3, 4)]
            most = [c == max(count) and c >= 16 for c in count]  # a quarter of 64
            assert own[i, :, n].tolist() == most
    rows = torch.arange(32) // 4
    mean_row = [(own[:, p] * rows).sum() / own[:, p].sum() for p in (0, 1, 3)]
    assert mean_row == sorted(mean_row)  # head above trunk above legs
    table = distances(tiny_vit(True, (64, 32)), images, truth)
    assert [row["lambda"] for row in table] == [0, 0.25, 0.5, 0.75, 1]
    assert len({row["parts_of_one_person"] for row in table}) == 5  # λ reaches the features


def test_label_quality_of_labels_whose_figures_are_known():
    """Two people of 4 patches: one labelled by its parts, one everywhere; a third is left out."""
    truth = torch.zeros(3, 16, 16, dtype=torch.uint8)
    truth[:, :8, :8], truth[:, 8:, :8] = 1, 4  # head and legs on the left
    labels = torch.tensor([[1, 0, 3, 0], [1, 1, 3, 3], [3, 3, 1, 0]])
    told = label_quality(labels, torch.tensor([True, True, False]), truth, 8)
    assert told["kept"] == pytest.approx(2 / 3) and told["nmi"] == pytest.approx(1)
    assert told["iou"] == pytest.approx(4 / 6)
    assert told["iou_chance"] == pytest.approx(0.75 * 0.5 / (0.75 + 0.5 - 0.75 * 0.5))
    one = label_quality(labels.clamp(max=1), torch.ones(3) > 0, truth, 8)
    assert one["nmi"] == pytest.approx(0, abs=1e-6)  # one label for all parts says nothing
    none = label_quality(labels * 0, torch.zeros(3) > 0, truth, 8)
    assert none == dict(kept=0, iou=0, iou_chance=0, nmi=0)  # no NaN, which JSON has not


# ----------------------------------------------------------------------------------------- its runs


def arguments(path, out, *more):
    return [f"annotations={path}", f"out={out}", *SMALL.split(), "epochs=2", "save_every=2", *more]


def log_of(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "pictures_per_s"} for line in lines]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """→ (annotations, run folder) of 6 steps in one process."""
    root = tmp_path_factory.mktemp("solider")
    path = write_set(root / "set", n_poses=6)
    done = run_script("baselines/solider.py", *arguments(path, root / "run"))
    assert done.returncode == 0, done.stderr
    assert "same part, other people" in done.stderr
    return path, root / "run"


def test_a_run_writes_what_it_says(run):
    _, out = run
    for name in ("curves.png", "labels.png", "semantics.png", "last.pt", "config.yaml", "done"):
        assert (out / name).exists()
    first = log_of(out)[0]
    assert first["ln_K"] == pytest.approx(np.log(24), rel=1e-4)
    assert first["loss"] == pytest.approx(first["dino"] + first["semantic"], rel=1e-4)
    told = json.loads((out / "semantics.json").read_text())
    assert len(told["claim"]) == 5 and 0 <= told["labels"]["nmi"] <= 1
    state = load_checkpoint(out / "last.pt")["model"]
    groups = load_checkpoint(out / "last.pt")["optimizer"]["param_groups"]
    fast = [group for group in groups if group["lr"] == pytest.approx(3 * groups[0]["lr"])]
    assert sum(len(group["params"]) for group in fast) == 3 * 4  # W, b, V, d of three controllers
    encoder = load_encoder(out / "encoder.safetensors")
    name = "blocks.0.controller.shift.weight"
    assert torch.equal(encoder.state_dict()[name], state[f"teacher.encoder.{name}"])
    assert not torch.equal(encoder.state_dict()[name], state[f"student.encoder.{name}"])


def test_kill_and_resume_is_bitwise(run, tmp_path):
    path, plain = run
    command = arguments(path, tmp_path / "run")
    log = tmp_path / "run/log.jsonl"
    assert kill_after("baselines/solider.py", *command, lines=3, log=log, timeout=300)
    assert not (tmp_path / "run/done").exists()
    done = run_script("baselines/solider.py", *command)
    assert done.returncode == 0, done.stderr
    for name in ("last.pt", "encoder.safetensors", "semantics.json", "labels.png"):
        assert (tmp_path / "run" / name).read_bytes() == (plain / name).read_bytes(), name
    assert log_of(tmp_path / "run") == log_of(plain)


def test_two_ranks_log_the_same(run, tmp_path):
    path, plain = run
    out = tmp_path / "run"
    done = run_script("baselines/solider.py", *arguments(path, out), ranks=2)
    assert done.returncode == 0, done.stderr
    for one, many in zip(log_of(plain), log_of(out), strict=True):
        for name in ("loss", "dino", "semantic", "grad_norm", "kept", "teacher_entropy"):
            assert many[name] == pytest.approx(one[name], rel=2e-3, abs=1e-4), (name, one["step"])


def test_a_stage_takes_the_encoder_and_its_weight(run, tmp_path):
    encoder, data = run[1] / "encoder.safetensors", market(tmp_path / "market")
    keys = [f"data={data}", *PLAIN, f"encoder={encoder}", f"out={tmp_path}/run"]
    sys.argv = ["finetune_reid.py", *map(str, keys)]
    finetune_reid.main()
    model = tmp_path / "run/model.safetensors"
    assert load_encoder(tmp_path / "run/encoder.safetensors").semantic_weight == 0.2
    before = json.loads((tmp_path / "run/metrics.json").read_text())
    keys = [f"data={data}", *PLAIN, f"weights={model}", "eval_only=true", f"out={tmp_path}/eval"]
    sys.argv = ["finetune_reid.py", *map(str, keys)]
    finetune_reid.main()
    assert json.loads((tmp_path / "eval/metrics.json").read_text())["mAP"] == before["mAP"]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["annotations="], "annotations= names no file"),
        (["height=60"], "height=60 and width=32 must be multiples of patch=8"),
        (["local_width=12"], "local_height=32 and local_width=12 must be multiples of patch=8"),
        (["local_min=0.9"], "local_min=0.9 is above local_max=0.8"),
        (["images=a,b"], "images= has 2 folders for 1 annotation files"),
    ],
)
def test_refusals(run, tmp_path, monkeypatch, keys, words):
    monkeypatch.setattr(sys, "argv", ["solider.py", *arguments(run[0], tmp_path / "no", *keys)])
    with pytest.raises(UserError, match=words):
        solider.main()
    assert not os.path.exists(tmp_path / "no")
