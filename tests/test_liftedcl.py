"""LiftedCL: its losses, its sampling and its bodies against brute force and other people's code."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coco_sets import write_set
from PIL import Image
from scipy.linalg import orthogonal_procrustes
from scipy.spatial import procrustes
from scipy.spatial.transform import Rotation

import common
import puppet
from baselines import bodies, liftedcl
from baselines.parts import squared_slope
from plumbing.config import read_config
from puppet import body

SCRIPT = "baselines/liftedcl.py"
SMALL = "size=tiny height=64 width=32 patch=16 batch=8 hidden=32 dim=16 queue=20 bodies=64"
SMALL = [*SMALL.split(), "people=8", "r1=0.01", "device=cpu", "precision=fp32", "workers=0"]


def arguments(pictures, out, *more):
    return [f"annotations={pictures}", f"out={out}", *SMALL, *more]


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


def test_l_var_is_a_loop_over_the_pictures_that_meet():
    rng, tau = np.random.default_rng(1), 0.2
    torch.manual_seed(0)
    box, mirrored = random_crops(rng, 12)
    box[:8, 1, :2] = box[:8, 0, :2] + 5
    box = box.double()
    grid, meets = liftedcl.overlap_grid(box, mirrored, cells=3)
    assert 0 < meets.sum() < 12
    maps = torch.randn(12, 2, 4, 8, 4, dtype=torch.float64, requires_grad=True)
    queue = F.normalize(torch.randn(6, 4, dtype=torch.float64), dim=1)
    loss = liftedcl.place_loss(maps[:, 0], maps[:, 1].detach(), (grid, meets), queue, tau)
    terms = []
    for i in meets.nonzero().flatten().tolist():
        low = torch.maximum(box[i, 0, :2], box[i, 1, :2])
        high = torch.minimum(*(box[i, view, :2] + box[i, view, 2:] for view in (0, 1)))
        for row in range(3):
            for column in range(3):
                share = torch.tensor([column + 0.5, row + 0.5]).double() / 3
                place = (low + share * (high - low)).tolist()
                q, k = (
                    value_in_crop(maps[i, view], box[i, view].tolist(), mirrored[i, view], place)
                    for view in (0, 1)
                )
                q, k = q / q.norm(), k.detach() / k.norm().detach()
                logits = torch.stack([q @ k, *(q @ n for n in queue)]) / tau
                terms.append(-logits.log_softmax(0)[0])
    expected = torch.stack(terms).mean()
    assert torch.allclose(loss, expected, rtol=1e-12)
    mine, theirs = (torch.autograd.grad(value, maps)[0] for value in (loss, expected))
    assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-15)
    assert mine[~meets].abs().max() == 0
    nobody = liftedcl.place_loss(maps[:, 0], maps[:, 1], (grid, meets & False), queue, tau)
    assert nobody == 0


def test_the_loaders_crops_show_the_same_places(tmp_path, monkeypatch):
    """Crops of a picture whose colours are its coordinates agree where the grid says they meet."""
    cfg = read_config(liftedcl.KEYS, "", arguments(write_set(tmp_path, n_poses=8), "unused"))
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


def test_the_slope_of_the_discriminator_is_that_of_small_steps():
    """R1 against differences of its own output in float64; and it can be trained on."""
    torch.manual_seed(0)
    judge, real = liftedcl.Discriminator(8).double(), bodies.draw_bodies(3, 0.05, 0).double()
    real.requires_grad_()
    mine, plain, step = squared_slope(judge(real), real), 0.0, 1e-6
    with torch.no_grad():
        for i in range(real.numel()):
            moved = [real.flatten().clone() for _ in range(2)]
            moved[0][i] += step
            moved[1][i] -= step
            up, down = (judge(m.view_as(real)).sum() for m in moved)
            plain += ((up - down) / (2 * step)) ** 2 / len(real)
    assert mine.item() == pytest.approx(plain.item(), rel=1e-5)
    mine.backward()
    assert judge.bones[0].weight.grad.abs().sum() > 0


def test_the_discriminator_tells_unit_bodies_from_a_stick_within_a_few_steps():
    """A stick with a body's stature: at the scale of its joints it is told at once."""
    torch.manual_seed(0)
    real = bodies.draw_bodies(64, 0.05, 0)
    stick = bodies.unit(real.mean(0, keepdim=True)).expand_as(real)
    judge = liftedcl.Discriminator()
    optimizer = liftedcl.make_optimizer(judge, "sgd", 0.01, 1e-4)
    for _ in range(60):
        of_real, of_stick = judge(torch.cat([real, stick])).chunk(2)
        loss = (of_real - 1).square().mean() + of_stick.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1  # at a norm of 1 it is .48, all but undecided


def test_bone_errors_and_figures_are_plain_loops():
    truth = torch.from_numpy(bodies.skeletons_of(puppet.sample_poses(3, range(20))))
    real, drawn = (bodies.draw_bodies(n, 0.05, n).double() for n in (40, 20))
    found = truth.flip(0) * 3 + 1
    figures, each = bodies.measure(found, truth, real, drawn)
    for name, one in (("bones", bodies.unit(found)), ("bones_any", drawn)):
        errors = []
        for body_ in one:
            for a, b in bodies.BONES:
                usual = np.mean([np.linalg.norm(r[a] - r[b]) for r in real.numpy()])
                errors.append(abs(np.linalg.norm(body_[a] - body_[b]) - usual) / usual)
        assert figures[name] == pytest.approx(np.mean(errors))
    assert torch.allclose(each, 1000 * bodies.aligned_error(found, truth))
    assert figures["mpjpe"] == pytest.approx(each.mean().item())
    assert figures["mpjpe_dealt"] != figures["mpjpe"] and figures["mpjpe_mean"] < figures["mpjpe"]
    assert bodies.bone_error(real[:1], real[:1]).item() == 0
