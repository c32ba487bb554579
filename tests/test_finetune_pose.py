"""finetune_pose.py as a whole: samples, overfitting, ranks, resume, starts from other weights."""

import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, check_fields, kill_after, run_script
from PIL import Image
from pose_runs import MACHINE, QUICK, run, script, sets, sgd
from safetensors.torch import load_file

import finetune_pose
import model
from common import Ranks, layer_of, parameter_groups, save_weights
from formats import keypoints as readers
from formats.coco import read_people
from formats.joints import COCO_JOINTS
from formats.transformers_names import to_transformers
from formats.weights import meta_of
from plumbing.config import read_config
from plumbing.errors import UserError
from tasks import pose

pytestmark = pytest.mark.usefixtures("small_pose")


# ------------------------------------------------------------------------------------------ metrics


def test_layer_decay_ids_and_groups():
    net = pose.PoseModel(
        model.ViT(32, 2, 2, (64, 48), 8, trainable_positions=True), pose.SimpleHead(32, 3), "add"
    )
    ids = {name: layer_of(name, 2) for name, _ in net.named_parameters()}
    for name in ("patch_embed.proj.weight", "cls_token", "pose_token", "pos_embed"):
        assert ids[f"encoder.{name}"] == 0
    assert {ids[f"encoder.blocks.{i}.attn.qkv.weight"] for i in range(2)} == {1, 2}
    assert ids["encoder.norm.weight"] == ids["head.final_layer.weight"] == 3
    groups = parameter_groups(net, 0.1, 0.5, 2)
    of = {id(p): g for g in groups for p in g["params"]}
    named = dict(net.named_parameters())
    assert of[id(named["encoder.pos_embed"])] == of[id(named["encoder.cls_token"])]
    assert (
        of[id(named["encoder.pos_embed"])]["lr_scale"] == 0.125
        and of[id(named["encoder.pos_embed"])]["weight_decay"] == 0
    )
    assert of[id(named["encoder.blocks.1.mlp.fc1.weight"])]["lr_scale"] == 0.5
    assert of[id(named["head.final_layer.weight"])]["lr_scale"] == 1


@pytest.mark.parametrize("tokens", ["drop", "add", "add_cls_pose"])
def test_tokens_decide_what_the_head_sees(tokens):
    torch.manual_seed(0)
    net = pose.PoseModel(model.ViT(32, 2, 2, (64, 48), 8), pose.SimpleHead(32, 3), tokens)
    x = torch.randn(2, 50, 32)
    net.encoder.forward = lambda images, drop_noise=None: x
    seen = []
    net.head.forward = lambda patches, grid: seen.append(patches)
    net(None)
    extra = {"drop": 0, "add": x[:, 1:2], "add_cls_pose": x[:, :1] + x[:, 1:2]}[tokens]
    assert torch.allclose(seen[0], x[:, 2:] + extra)


@pytest.mark.parametrize("head", ["classic", "simple"])
def test_without_special_tokens_it_computes_what_transformers_vitpose_does(head):
    import transformers

    torch.manual_seed(0)
    vit = model.ViT(32, 2, 2, (64, 48), 16, trainable_positions=True)
    own = {"classic": pose.ClassicHead, "simple": pose.SimpleHead}[head](32, 17)
    net = pose.PoseModel(vit, own, "none").eval()
    for parameter in net.parameters():  # no norm or bias that a mistake would leave unseen
        torch.nn.init.normal_(parameter, std=0.2)
    backbone = transformers.VitPoseBackboneConfig(
        image_size=(64, 48), patch_size=(16, 16), hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, out_indices=[2], layer_norm_eps=1e-6,
    )  # fmt: skip
    simple = head == "simple"
    config = transformers.VitPoseConfig(
        backbone_config=backbone, num_labels=17, use_simple_decoder=simple
    )
    theirs = transformers.VitPoseForPoseEstimation(config).eval()
    theirs.backbone.embeddings.patch_embeddings.projection.padding = (0, 0)  # docs/choices.md
    state = {}
    for name, value in to_transformers(vit).items():  # their other ViTs have other names in an MLP
        name = name.replace("intermediate.dense", "mlp.fc1")
        name = re.sub(r"(layer\.\d+)\.output\.dense", r"\1.mlp.fc2", name)
        state[f"backbone.{name}"] = value
    positions = "backbone.embeddings.position_embeddings"
    state[positions] = torch.cat([torch.zeros(1, 1, 32), state[positions]], 1)  # of their [CLS]
    for name in ("cls_token", "distillation_token"):
        del state[f"backbone.embeddings.{name}"]
    layers = ["deconv1", "batchnorm1", "", "deconv2", "batchnorm2"]
    for name, value in own.state_dict().items():
        name = name.replace("final_layer", "conv")
        if name.startswith("deconv_layers"):
            _, i, kind = name.split(".")
            name = f"{layers[int(i)]}.{kind}"
        state[f"head.{name}"] = value
    missing, unknown = theirs.load_state_dict(state, strict=False)
    assert not unknown and all("num_batches_tracked" in name for name in missing)
    images = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        maps, expected = net(images), theirs(images).heatmaps
    assert maps.std() > 0.05 and torch.allclose(maps, expected, atol=1e-4 * maps.abs().max())


def test_tokens_that_do_not_enter_learn_nothing_and_all_else_does():
    torch.manual_seed(0)
    net = pose.PoseModel(model.ViT(32, 2, 2, (64, 48), 8), pose.SimpleHead(32, 3), "none")
    net(torch.randn(2, 3, 64, 48)).square().mean().backward()
    for name, parameter in net.named_parameters():
        frozen = name.endswith(("cls_token", "pose_token", "pos_embed"))  # positions: as built here
        assert parameter.requires_grad != frozen, name
        assert frozen == (parameter.grad is None), name  # DDP waits for every gradient


# ---------------------------------------------------------------------------------------- real runs


def test_a_sample_depends_on_seed_epoch_and_index_only(dots, tmp_path):
    people, _ = readers.read_pose_file(dots[0])
    cfg = read_config(finetune_pose.KEYS, "", [*QUICK, "seed=3"])
    dataset = pose.PosePictures(cfg, people, training=True)
    first = dataset[(1, 4)]
    dataset[(0, 2)]
    np.random.seed(1)
    assert torch.equal(dataset[(1, 4)]["image"], first["image"])
    assert not torch.equal(dataset[(2, 4)]["image"], first["image"])
    # joints stand on their dots after every augmentation, mirrored ones with left and right swapped
    palette, checked = np.random.default_rng(5).integers(30, 255, (17, 3)), 0
    cfg.half_body = 0
    for epoch in range(30):
        sample = dataset[(epoch, 0)]
        mirrored = np.linalg.det(sample["matrix"][:, :2]) < 0
        for j, (x, y, v) in enumerate(sample["keypoints"].tolist()):
            if v and 1 <= x < 46 and 1 <= y < 62:
                colour = sample["image"][:, round(y), round(x)].numpy().astype(float)
                mine = people.flip[j] if mirrored else j
                checked += np.abs(colour - palette[mine]).max() < 60
    assert checked > 150


def test_boxes_are_moved_in_training_as_mmposes_reader_does(dots):
    people, _ = readers.read_pose_file(dots[0])
    cfg = read_config(finetune_pose.KEYS, "", [*QUICK, "shift=1", "half_body=0"])
    still = read_config(finetune_pose.KEYS, "", [*QUICK, "shift=0", "half_body=0"])
    moved, plain = (pose.PosePictures(c, people, training=True) for c in (cfg, still))
    shifts = []
    for epoch in range(100):
        a, b = (d.augment(epoch, 3, people.keypoints[3].copy()) for d in (moved, plain))
        shifts.append((a[0] - b[0]) / people.boxes[3, 2:])
        assert np.array_equal(a[1], b[1]) and a[2:] == b[2:]  # the rest is as it was
    assert np.abs(shifts).max() <= 0.2 and np.abs(shifts).max(0).min() > 0.18
    assert np.abs(np.mean(shifts, 0)).max() < 0.03 and len(np.unique(shifts)) == 200
    # a half body has a centre of its own
    cfg.half_body = still.half_body = 1.0
    keypoints = people.keypoints[3].copy()
    keypoints[:, 2] = 2
    assert np.allclose(moved.augment(0, 3, keypoints)[0], plain.augment(0, 3, keypoints)[0])


def test_flip_test_mirrors_maps_and_swaps_sides(dots):
    """A perfect network, straight and mirrored: after averaging, peaks are high and in place."""
    people, _ = readers.read_pose_file(dots[1])
    cfg = read_config(finetune_pose.KEYS, "", [*QUICK, "batch=16", "padding=1.5"])
    dataset = pose.PosePictures(cfg, people, training=False)
    straight = torch.stack([dataset[(0, i)]["keypoints"] for i in range(len(dataset))])
    mirrored = straight[:, people.flip] * torch.tensor([-1.0, 1, 1]) + torch.tensor([47.0, 0, 0])
    mirrored[..., 2] = straight[..., 2] = 2
    answers = iter([pose.heat_maps(k, (64, 48), (32, 24))[0] for k in (straight, mirrored)])
    network = torch.nn.Module()
    network.forward = lambda images: next(answers)
    found = finetune_pose.find_poses(cfg, network, people, Ranks(0, 1, torch.device("cpu")))
    seen = people.keypoints[..., 2] > 0
    assert np.abs(found - people.keypoints)[seen][:, :2].max() < 0.1
    assert found[seen][:, 2].min() > 0.9


def test_overfits_one_batch_then_evaluates_and_predicts(dots, tmp_path):
    """Four people, no augmentation: joints are found again, also by the saved model."""
    document = json.loads(dots[0].read_text())
    document["annotations"] = document["annotations"][:4]
    path = tmp_path / "four.json"
    path.write_text(json.dumps(document))
    images = f"{dots[0].parent}/images"
    off = "flip=0 half_body=0 scale=0 rotation_p=0 drop_path=0 layer_decay=1 schedule=cosine"
    both = [*sets(path, path), f"train_images={images}", f"val_images={images}"]
    long = ["batch=4", "lr=5e-3", "epochs=300", "warmup_steps=20"]
    run(*both, *QUICK, *off.split(), *long, f"out={tmp_path}/run")
    out = tmp_path / "run"
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 300 and rows[-1]["loss"] < 0.2 * rows[0]["loss"]
    assert {"step", "loss", "lr", "grad_norm", "pictures_per_s"} <= set(rows[0]) and rows[0][
        "lr"
    ] > 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["AP"] > 0.6 and metrics["PCK@.2"] > 0.9 and metrics["people"] == 4
    files = (
        "config.yaml curves.png data.json done encoder.safetensors last.pt log.jsonl metrics.json "
    )
    files += "model.safetensors overlays.png pck.png"
    assert sorted(f.name for f in out.iterdir()) == [*files.split(), "results.json", "run.json"]

    weights = f"weights={out}/model.safetensors"
    val = [f"val_annotations={path}", f"val_images={images}"]
    run("eval_only=true", weights, *val, *MACHINE, f"out={tmp_path}/again")
    assert (tmp_path / "again/results.json").read_bytes() == (out / "results.json").read_bytes()

    folder = tmp_path / "mine"
    folder.mkdir()
    for n, image in enumerate(document["images"][:3]):
        Image.open(f"{images}/{image['file_name']}").save(folder / f"{n}.png")
    run(f"predict={folder}", weights, *MACHINE, "padding=1", f"out={tmp_path}/whole")
    answer = tmp_path / "whole/predictions.json"
    check_fields(answer)
    people, _ = readers.read_pose_file(answer, folder)  # a valid COCO keypoint file
    assert (
        people.joints == COCO_JOINTS
        and len(people.files) == 3
        and (tmp_path / "whole/overlays.png").exists()
    )
    boxes = [{"file_name": "0.png", "bbox": document["annotations"][0]["bbox"], "score": 0.5}] * 2
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    run(
        f"predict={folder}",
        weights,
        *MACHINE,
        f"boxes={tmp_path}/boxes.json",
        f"out={tmp_path}/boxed",
    )
    (found,) = json.loads((tmp_path / "boxed/predictions.json").read_text())[
        "annotations"
    ]  # the copy is removed
    (wanted,) = [r for r in json.loads((out / "results.json").read_text()) if r["image_id"] == 1]
    joints, wanted_joints = (np.reshape(row["keypoints"], (17, 3)) for row in (found, wanted))
    sure = wanted_joints[:, 2:] >= 0.2
    assert 9 < sure.sum() and np.allclose(
        joints, np.where(sure, wanted_joints * [1, 1, 0] + [0, 0, 2], 0)
    )
    assert np.isclose(found["score"], 0.5 * wanted["score"])


def test_unsure_joints_of_predictions_are_missing(dots, tmp_path):
    """COCO: v = 0 and x = y = 0. So generate.py and pretrain.py neither draw nor mask them."""
    people, _ = readers.read_pose_file(dots[1])
    found = people.keypoints.copy()
    found[:, :, 2] = np.tile([0.19, 0.2, 0.9, -0.1], 5)[:17]
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps(readers.coco_document(people, found, np.ones(len(found)))))
    rows = json.loads(path.read_text())["annotations"]
    sure = np.tile([False, True, True, False], 5)[:17]
    for row, xy in zip(rows, found[:, :, :2]):
        joints = np.reshape(row["keypoints"], (17, 3))
        assert (
            not joints[~sure].any()
            and (joints[sure, 2] == 2).all()
            and row["num_keypoints"] == sure.sum()
        )
        assert (
            np.allclose(joints[sure, :2], xy[sure], atol=1e-3) and row["keypoint_scores"][0] == 0.19
        )
    again, _ = read_people(path, dots[1].parent / "images")
    assert ((again.keypoints[:, :, 2] > 0) == sure).all()


# 12 people to train on, 7 to evaluate: 3, 2, 2
@pytest.mark.parametrize("world, tokens", [(3, "drop"), (2, "none")])
def test_ranks_equal_one_process(dots, tmp_path, world, tokens, monkeypatch):
    """The same steps, and each person evaluated once."""
    monkeypatch.setattr(finetune_pose, "build_optimizer", sgd)
    keys = [*sets(*dots), *QUICK, "head=classic", "epochs=2", "lr=1", f"tokens={tokens}"]
    run(*keys, f"out={tmp_path}/one")
    run(*keys, "lr=0", f"out={tmp_path}/start")
    start = load_file(tmp_path / "start/model.safetensors")
    done = run_script(script(tmp_path), "sgd", *keys, f"out={tmp_path}/ranks", ranks=world)
    assert done.returncode == 0, done.stderr
    one, ranks = (
        [json.loads(line) for line in (tmp_path / run_ / "log.jsonl").read_text().splitlines()]
        for run_ in ("one", "ranks")
    )
    assert len(one) == len(ranks) == 4
    for a, b in zip(one, ranks):
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-4)
        assert math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=1e-3)
    a, b = (load_file(tmp_path / run_ / "model.safetensors") for run_ in ("one", "ranks"))
    moved = {name: (a[name] - start[name]).abs().max() for name in a}
    assert moved["encoder.blocks.0.attn.qkv.weight"] > 1e-4
    for name in a:
        assert (a[name] - b[name]).abs().max() <= 0.02 * moved[name] + 1e-6, name
    one, ranks = (
        json.loads((tmp_path / run_ / "results.json").read_text()) for run_ in ("one", "ranks")
    )
    assert [r["image_id"] for r in ranks] == [r["image_id"] for r in one] == [1, 2, 3, 4, 5, 6, 7]
    assert np.allclose([r["score"] for r in one], [r["score"] for r in ranks], atol=1e-3)


def test_killed_and_resumed_is_bitwise_the_same(dots, tmp_path):
    keys = [*sets(*dots), *QUICK, "epochs=15", "save_every=4"]
    run(*keys, f"out={tmp_path}/whole")
    for workers in (0, 2):
        out = tmp_path / f"killed{workers}"
        command = [*keys, f"workers={workers}", f"out={out}"]
        assert kill_after(script(tmp_path), *command, lines=6, log=out / "log.jsonl")
        assert (out / "last.pt").exists() and not (out / "done").exists()
        run(*keys, f"workers={workers}", f"out={out}")
        for name in (
            "model.safetensors",
            "encoder.safetensors",
            "results.json",
            "metrics.json",
            "overlays.png",
        ):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
        lines = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
        assert lines == list(range(1, 31))


def test_a_run_folder_is_never_overwritten(dots, tmp_path, capsys):
    keys = [*sets(*dots), *QUICK, f"out={tmp_path}/run"]
    run(*keys)
    before = {f: f.read_bytes() for f in (tmp_path / "run").iterdir()}
    run(*keys)
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(UserError, match="another config.*lr"):
        run(*keys, "lr=0.1")
    assert {f: f.read_bytes() for f in (tmp_path / "run").iterdir()} == before


def test_starts_from_a_pretrained_encoder_with_another_input_size(dots, tmp_path, capsys):
    torch.manual_seed(0)
    vit = model.ViT(32, 2, 2, (64, 32), 8)
    save_weights(tmp_path / "encoder.safetensors", vit, **meta_of(vit))
    keys = [k for k in QUICK if not k.startswith(("size", "patch"))]
    keys += [f"encoder={tmp_path}/encoder.safetensors", "tokens=add", "lr=0"]
    run(*sets(*dots), *keys, f"out={tmp_path}/run")
    assert "not in the file: none" in capsys.readouterr().err
    tuned = load_file(tmp_path / "run/encoder.safetensors")
    assert torch.equal(
        tuned["blocks.1.mlp.fc1.weight"], vit.state_dict()["blocks.1.mlp.fc1.weight"]
    )
    image = vit.pos_embed.transpose(1, 2).unflatten(2, (8, 4))
    resized = torch.nn.functional.interpolate(
        image, size=(8, 6), mode="bicubic", align_corners=False
    )
    assert torch.allclose(tuned["pos_embed"], resized.flatten(2).transpose(1, 2), atol=1e-6)


def test_non_finite_loss_names_step_rank_and_pictures(dots, tmp_path):
    with pytest.raises(UserError, match=r"non-finite .* step [12] on rank\(s\) \[0\].*0_\d+\.png"):
        run(*sets(*dots), *QUICK, "epochs=9", "lr=1e30", "clip_grad=0", f"out={tmp_path}/run")
    assert not (tmp_path / "run/last.pt").exists()


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("finetune_pose_*.yaml")), ids=lambda path: path.stem
)
def test_configs_are_read(path):
    cfg = read_config(finetune_pose.KEYS, "", ["--cfg", str(path)])
    assert cfg.height / cfg.width == 4 / 3 and cfg.tokens == "drop"
