"""LiftedCL: its pieces against brute force and other people's code, its script from the command
line."""

import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coco_sets import write_set
from conftest import kill_after, run_script
from PIL import Image
from scipy.linalg import orthogonal_procrustes
from scipy.spatial import procrustes
from scipy.spatial.transform import Rotation

import common
import puppet
from baselines import bodies, liftedcl
from plumbing.config import read_config
from plumbing.errors import UserError
from puppet import body

SCRIPT = "baselines/liftedcl.py"
SMALL = "size=tiny height=64 width=32 patch=16 batch=8 hidden=32 dim=16 queue=20 bodies=64"
SMALL = [*SMALL.split(), "people=8", "device=cpu", "precision=fp32", "workers=0"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set"), n_poses=8)


def arguments(pictures, out, *more):
    return [f"annotations={pictures}", f"out={out}", *SMALL, *more]


def rows(out):
    lines = (out / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(r).items() if k != "pictures_per_s"} for r in lines]


# ------------------------------------------------------------------------------------------- losses


def test_info_nce_is_the_plain_loop_in_value_and_gradient():
    torch.manual_seed(0)
    query = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    key = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    queue, tau = F.normalize(torch.randn(7, 4, dtype=torch.float64), dim=1), 0.2
    loss = liftedcl.info_nce(query, key, queue, tau)
    total = 0
    for i in range(3):
        for j in range(5):
            q, k = query[i, j] / query[i, j].norm(), key[i, j].detach() / key[i, j].norm().detach()
            positive = math.e ** (q @ k / tau)
            one = -torch.log(positive / (positive + sum(math.e ** (q @ n / tau) for n in queue)))
            assert torch.allclose(loss[i, j], one, rtol=1e-12)
            total = total + one * (i + 1)
    weights = torch.arange(1.0, 4.0)[:, None]
    mine = torch.autograd.grad((loss * weights).sum(), query, retain_graph=True)[0]
    assert torch.allclose(mine, torch.autograd.grad(total, query)[0], rtol=1e-10)
    # The momentum encoder learns nothing from the loss.
    assert torch.autograd.grad(loss.sum(), key, allow_unused=True)[0] is None


def test_info_nce_is_the_cross_entropy_of_moco():
    torch.manual_seed(1)
    query, key, queue = torch.randn(6, 8), torch.randn(6, 8), F.normalize(torch.randn(9, 8), dim=1)
    q, k = F.normalize(query, dim=1), F.normalize(key, dim=1)
    logits = torch.cat([torch.einsum("nc,nc->n", q, k)[:, None], q @ queue.T], 1) / 0.2
    expected = F.cross_entropy(logits, torch.zeros(6, dtype=torch.long))
    assert torch.allclose(liftedcl.info_nce(query, key, queue, 0.2).mean(), expected)


# -------------------------------------------------------------------------------- aligned sampling


def random_crops(rng, n, side=100):
    """Pairs of crops (n, 2, 4) px of a picture, and their flips."""
    low = rng.integers(0, side - 30, (n, 2, 2))
    size = rng.integers(12, 30, (n, 2, 2))
    box = torch.from_numpy(np.concatenate([low, size], 2)).float()
    return box, torch.from_numpy(rng.random((n, 2)) < 0.5)


def value_in_crop(maps, box, mirrored, place):
    """The value (C,) of a crop's map (C, h, w) at a place (x, y) px of the picture, pixel by pixel:
    bilinear between the centres of the cells, beyond the outermost ones their own value."""
    (_, h, w), (x, y, cw, ch) = maps.shape, box
    across, down = (place[0] - x) / cw * w - 0.5, (place[1] - y) / ch * h - 0.5
    if mirrored:
        across = w - 1 - across  # the map's own columns run the other way
    across, down = min(max(across, 0), w - 1), min(max(down, 0), h - 1)
    left, top = min(int(across), w - 2), min(int(down), h - 2)
    a, d = across - left, down - top
    one = maps[:, top, left] * (1 - a) + maps[:, top, left + 1] * a
    two = maps[:, top + 1, left] * (1 - a) + maps[:, top + 1, left + 1] * a
    return one * (1 - d) + two * d


def test_aligned_sampling_is_a_loop_over_places():
    """Random crops and flips, maps that are not square, overlaps of all sizes and none."""
    rng, met = np.random.default_rng(0), 0
    torch.manual_seed(0)
    box, mirrored = random_crops(rng, 60)
    box[:40, 1, :2] = box[:40, 0, :2] + torch.from_numpy(rng.integers(-10, 10, (40, 2)))
    maps = torch.randn(60, 2, 3, 8, 4, dtype=torch.float64)
    grid, meets = liftedcl.overlap_grid(box.double(), mirrored, cells=5)
    found = [liftedcl.at_points(maps[:, view], grid[:, view]) for view in (0, 1)]
    for i in range(60):
        (x0, y0, w0, h0), (x1, y1, w1, h1) = box[i].tolist()
        left, right = max(x0, x1), min(x0 + w0, x1 + w1)
        top, bottom = max(y0, y1), min(y0 + h0, y1 + h1)
        assert bool(meets[i]) == (left < right and top < bottom)
        if not meets[i]:
            continue
        met += 1
        for row in range(5):
            for column in range(5):
                place = left + (column + 0.5) / 5 * (right - left), 0
                place = place[0], top + (row + 0.5) / 5 * (bottom - top)
                for view in (0, 1):
                    of = maps[i, view], box[i, view].tolist(), mirrored[i, view], place
                    expected = value_in_crop(*of)
                    assert torch.allclose(found[view][i, row * 5 + column], expected)
    assert 30 < met < 60


def test_the_loaders_crops_show_the_same_places(pictures, monkeypatch):
    """Crops of a picture whose colours are its coordinates agree where the grid says they meet."""
    cfg = read_config(liftedcl.KEYS, "", arguments(pictures, "unused"))
    people, _ = liftedcl.read_pictures(cfg)
    people[0].size[:], people[0].boxes[:] = (200, 240), (0, 0, 200, 240)
    x, y = np.meshgrid(np.arange(200), np.arange(240))
    picture = Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8))
    monkeypatch.setattr("baselines.parts.load_picture", lambda *_: picture)
    looks = liftedcl.Augmentation(1.0, "box", 0.2)
    crops, flips = liftedcl.Crops(people, (64, 32), 0, looks), set()
    for index in range(20):
        sample = crops[(0, index)]
        grid, meets = liftedcl.overlap_grid(sample["box"][None], sample["mirrored"][None])
        if meets:
            one, two = (
                liftedcl.at_points(sample["image"][None, view].float(), grid[:, view])
                for view in (0, 1)
            )
            # Half a pixel of a crop is up to 5 px of the picture where the border is repeated.
            assert (one - two).abs().median() < 1
            assert (one - two).abs().max() < 8
            flips.add(tuple(sample["mirrored"].tolist()))
    assert len(flips) == 4


# ------------------------------------------------------------------------------------------- bodies


def test_kcs_bones_are_the_tree():
    """16 bones span the 17 joints; each is one of a body, and Ψ holds their inner products."""
    names = {(bodies.JOINTS[a], bodies.JOINTS[b]) for a, b in bodies.BONES}
    limbs = {("root", "belly"), ("belly", "neck"), ("neck", "nose"), ("nose", "head")}
    for side in ("left", "right"):
        chain = "hip knee ankle".split(), "shoulder elbow wrist".split()
        for start, (a, b, c) in zip(("root", "neck"), chain):
            limbs |= {(start, f"{side}_{a}"), (f"{side}_{a}", f"{side}_{b}")}
            limbs |= {(f"{side}_{b}", f"{side}_{c}")}
    assert names == limbs and len(bodies.BONES) == 16
    poses = puppet.sample_poses(0, range(50))
    skeletons = torch.from_numpy(bodies.skeletons_of(poses))
    psi, joints = liftedcl.kcs(skeletons), skeletons.unbind(1)
    for i, (a, b) in enumerate(bodies.BONES):
        for j, (c, d) in enumerate(bodies.BONES):
            product = (joints[b] - joints[a]) * (joints[d] - joints[c])
            assert torch.allclose(psi[:, i, j], product.sum(1))
    # A turn changes nothing; lengths are the puppet's, over the stature of each body.
    turn = torch.from_numpy(Rotation.random(rng=0).as_matrix())
    assert torch.allclose(liftedcl.kcs(skeletons @ turn.T + 3), psi)
    lengths = psi.diagonal(dim1=1, dim2=2).sqrt()
    stature = lengths[:, bodies.BONES.index((1, 2))] / body.THIGH
    assert 0.9 <= stature.min() and stature.max() <= 1.08
    plain = {(2, 3): body.SHANK, (0, 1): body.HIP_HALF, (0, 7): body.WAIST, (7, 8): body.CHEST}
    plain |= {(11, 12): body.UPPER_ARM, (15, 16): body.FOREARM}
    for bone, length in plain.items():
        assert torch.allclose(lengths[:, bodies.BONES.index(bone)], length * stature), bone


def test_real_samples_are_unit_and_alike_on_both_sides():
    real = bodies.draw_bodies(200, 0.1, 0)
    assert torch.equal(real, bodies.draw_bodies(200, 0.1, 0))
    assert not torch.equal(real, bodies.draw_bodies(200, 0.1, 1))
    assert real[:, 0].abs().max() == 0
    assert torch.allclose(real.norm(dim=(1, 2)), torch.ones(200), atol=1e-6)
    lengths = liftedcl.kcs(real).diagonal(dim1=1, dim2=2).sqrt()
    for (a, b), length in zip(bodies.BONES, lengths.T):
        other = [bodies.JOINTS.index(bodies.JOINTS[j].replace("right", "left")) for j in (a, b)]
        twin = bodies.BONES.index(tuple(other))
        # The puppet's shoulders lie 15 mm below its neck: alike but for rounding.
        assert torch.allclose(length, lengths[:, twin], atol=1e-5)
    shares = lengths[:, 1] / lengths[:, 2]  # thigh over shank varies by both
    assert 0.05 < shares.log().std() / math.sqrt(2) < 0.15
    # Any yaw: hips point everywhere.
    across = real[:, 4] - real[:, 1]
    assert len(torch.unique((torch.atan2(across[:, 2], across[:, 0]) / 0.8).floor())) >= 8


def test_alignment_is_scipys():
    """Against scipy's Procrustes where no mirror would help, against its Kabsch everywhere."""
    rng, mirrors = np.random.default_rng(0), 0
    truth = bodies.skeletons_of(puppet.sample_poses(1, range(40)))
    found = bodies.skeletons_of(puppet.sample_poses(2, range(40)))
    found = found * rng.uniform(0.2, 5, (40, 1, 1)) + rng.normal(0, 3, (40, 1, 3))
    found[20:, :, 0] *= -1  # half of them mirrored
    mine = bodies.aligned(torch.from_numpy(found), torch.from_numpy(truth)).numpy()
    errors = bodies.aligned_error(torch.from_numpy(found), torch.from_numpy(truth)).numpy()
    for i in range(40):
        a, b = found[i] - found[i].mean(0), truth[i] - truth[i].mean(0)
        turn = Rotation.align_vectors(b, a)[0].apply(a)
        scaled = turn * (turn * b).sum() / (a * a).sum() + truth[i].mean(0)
        np.testing.assert_allclose(mine[i], scaled, atol=1e-6)
        assert errors[i] == pytest.approx(np.linalg.norm(scaled - truth[i], axis=1).mean())
        if np.linalg.det(orthogonal_procrustes(a, b)[0]) > 0:
            standard, moved, _ = procrustes(truth[i], found[i])
            back = np.linalg.norm(b) * moved + truth[i].mean(0)
            np.testing.assert_allclose(mine[i], back, atol=1e-9)
        else:
            mirrors += 1
    assert 0 < mirrors < 40


def test_a_turned_body_has_no_error_and_the_mean_one_less_than_others():
    truth = torch.from_numpy(bodies.skeletons_of(puppet.sample_poses(3, range(60))))
    turn = torch.from_numpy(Rotation.random(60, rng=0).as_matrix())
    assert bodies.aligned_error(0.3 * truth @ turn + 1, truth).max() < 1e-9
    mean = bodies.mean_skeleton(truth).expand_as(truth)
    others = [bodies.aligned_error(truth[[i]].expand_as(truth), truth).mean() for i in range(60)]
    assert bodies.aligned_error(mean, truth).mean() < min(others)


# -------------------------------------------------------------------------------------- adversary


def small_model(*key):
    common.seed_all(*(key or [common.STEP]), 0)
    cfg = read_config(liftedcl.KEYS, "", SMALL)
    return liftedcl.build_model(cfg)


def test_the_adversarial_gradient_reaches_the_encoder_and_not_the_discriminator():
    model = small_model()
    student, judge = model["student"], model["discriminator"]
    judge.requires_grad_(False)
    skeletons = student(torch.randn(2, 3, 64, 32))[2]
    (judge(skeletons) - 1).square().mean().backward()
    assert student.encoder.patch_embed.proj.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in judge.parameters())
    assert all(p.grad is None for p in student.head_inv.parameters())


def test_the_discriminator_learns_what_a_body_is():
    """Bodies whose joints have each other's places are told from bodies."""
    torch.manual_seed(0)
    real = bodies.draw_bodies(64, 0.05, 0)
    odd = bodies.unit(real[:, torch.randperm(17)])
    judge = liftedcl.Discriminator()
    optimizer = liftedcl.make_optimizer(judge, "sgd", 0.03, 1e-4)
    for _ in range(60):
        of_real, of_odd = judge(torch.cat([real, odd])).chunk(2)
        loss = (of_real - 1).square().mean() + of_odd.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.3  # 0.5 where it knows nothing


# -------------------------------------------------------------------------------- the whole script


@pytest.fixture(scope="module")
def plain(pictures, tmp_path_factory):
    """An uninterrupted run of 6 steps in one process."""
    out = tmp_path_factory.mktemp("plain") / "run"
    done = run_script(SCRIPT, *arguments(pictures, out, "epochs=2", "save_every=2"))
    assert done.returncode == 0, done.stderr
    assert "lifter" in done.stdout and "mean skeleton" in done.stdout
    return out


def test_run_folder_and_log(plain):
    for name in "config.yaml last.pt encoder.safetensors liftedcl.png curves.png done".split():
        assert (plain / name).exists(), name
    log = rows(plain)
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6, 6]
    for row in log[:-1]:
        parts = 0.5 * row["inv"] + 0.5 * row["var"] + 0.5 * row["adv"]
        assert row["loss"] == pytest.approx(parts, rel=1e-4)
    assert {"mpjpe", "mpjpe_dealt", "mpjpe_mean"} <= set(log[-1]) and log[-1]["final"]


def test_queues_and_teacher_move(plain):
    """48 keys have gone through each queue of 20; the teacher lags behind by its momentum."""
    state = common.load_checkpoint(plain / "last.pt")["model"]
    assert state["queue_inv.place"] == state["queue_var.place"] == 48 % 20
    for name in ("queue_inv.keys", "queue_var.keys"):
        assert torch.allclose(state[name].norm(dim=1), torch.ones(20), atol=1e-5)
    own, lag = state["student.head_inv.0.weight"], state["teacher.head_inv.0.weight"]
    start = small_model(common.WEIGHTS)["student"].state_dict()["head_inv.0.weight"]
    assert 0 < (lag - start).norm() < 0.01 * (own - start).norm()


def test_two_ranks_are_one_process(pictures, plain, tmp_path):
    out = tmp_path / "two"
    done = run_script(SCRIPT, *arguments(pictures, out, "epochs=2", "save_every=2"), ranks=2)
    assert done.returncode == 0, done.stderr
    for one, two in zip(rows(plain), rows(out), strict=True):
        for name in one:
            assert two[name] == pytest.approx(one[name], rel=2e-3, abs=1e-4), (name, one["step"])
    one, two = (common.load_checkpoint(run / "last.pt")["model"] for run in (plain, out))
    for name in one:  # SGD: a wrong scale of a gradient would show
        assert torch.allclose(one[name].float(), two[name].float(), atol=2e-4), name


def test_kill_and_resume_is_bitwise(pictures, plain, tmp_path):
    out = tmp_path / "run"
    command = arguments(pictures, out, "epochs=2", "save_every=2", "workers=1")
    assert kill_after(SCRIPT, *command, lines=3, log=out / "log.jsonl")
    assert not (out / "done").exists()
    done = run_script(SCRIPT, *command)
    assert done.returncode == 0, done.stderr
    for name in ("last.pt", "encoder.safetensors", "liftedcl.png"):
        assert (out / name).read_bytes() == (plain / name).read_bytes(), name
    assert rows(out) == rows(plain)


def test_the_checkpoint_holds_all_that_a_step_reads(plain):
    state = common.load_checkpoint(plain / "last.pt")
    assert {"model", "optimizer", "optimizer_d", "step"} == set(state)
    begins = {name.split(".")[0] for name in state["model"]}
    assert begins == {"student", "teacher", "discriminator", "queue_inv", "queue_var"}
    assert all(
        one["momentum_buffer"].abs().sum() > 0 for one in state["optimizer_d"]["state"].values()
    )


def test_the_encoder_trains_on_in_the_pose_stage(plain, pictures, tmp_path):
    keys = f"encoder={plain}/encoder.safetensors out={tmp_path}/pose height=64 width=32 epochs=1"
    keys += f" train_annotations={pictures} val_annotations={pictures} limit=8 batch=8 workers=0"
    done = run_script("finetune_pose.py", *keys.split(), "device=cpu")
    assert done.returncode == 0, done.stderr
    assert "encoder.safetensors" in done.stdout + done.stderr
    assert len(rows(tmp_path / "pose")) >= 1


def test_it_overfits_a_few_pictures(tmp_path, monkeypatch):
    """Eight pictures again and again, whose last keys fill the queue: chance is ln 9 for both."""
    few = write_set(tmp_path, n_poses=8, per_pose=1)
    more = "epochs=110 warmup_epochs=10 optimizer=adamw lr=5.0e-4 lr_d=0.003 ema=0.9 queue=8"
    more += " crop_min=0.8 save_every=1000"
    monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments(few, tmp_path / "run", *more.split())])
    liftedcl.main()
    log = rows(tmp_path / "run")
    last = {name: np.mean([row[name] for row in log[-21:-1]]) for name in ("inv", "var")}
    assert last["inv"] < 0.8 * math.log(9) and last["var"] < 0.6 * math.log(9)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["bacth=12"], "nearest valid key: batch"),
        (["queue=4"], "queue=4 cannot hold the 8 keys of a batch"),
        (["batch=1200", "queue=2000"], "larger than the 24 training samples"),
        (["patch=7"], "multiples of patch"),
        (["annotations="], "names no file"),
        (["annotations=nowhere.json"], "nowhere.json"),
        (["images=a,b"], "images= has 2 folders"),
        (["check_pictures=false", "max_bad=2"], "does not see"),
        (["pooled=max"], "one of cls, mean"),
        (["init=nowhere.pt"], "no checkpoint at nowhere.pt"),
        (["people=2"], "key people"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(pictures, tmp_path, monkeypatch, more, words):
    monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments(pictures, tmp_path / "run"), *more])
    with pytest.raises(UserError) as error:
        liftedcl.main()
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_another_config_is_refused(pictures, plain, monkeypatch):
    command = arguments(pictures, plain, "epochs=2", "save_every=2", "tau=0.3")
    monkeypatch.setattr(sys, "argv", [SCRIPT, *command])
    with pytest.raises(UserError, match=r"tau 0.2 -> 0.3"):
        liftedcl.main()
