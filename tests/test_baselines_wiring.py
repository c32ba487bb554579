"""The neighbouring methods' loops: what goes into which network, queue and optimiser at each step.

Each script runs in this process, watched, and ends where its loop ends.
"""

import math
import sys
from types import SimpleNamespace

import pytest
import test_fork
import test_gcl
import test_liftedcl
import test_solider_runs
import test_synclr
import torch
import torch.nn.functional as F
from coco_sets import ALONE, write_set
from torch.optim.optimizer import register_optimizer_step_pre_hook

import common
import generate
from baselines import gcl, liftedcl, parts, solider, synclr, vicreg
from model import normalize
from plumbing.config import read_config


class LoopEnds(Exception):
    """Instead of the figures that a script makes after its last step."""


def watched(stage, words, modules):
    """Run a script. → samples: of its loader; calls: of each of these modules, (inputs, output);
    steps: an optimiser, its groups, the norms of its gradients; start: the first weights."""
    seen = SimpleNamespace(samples=[], calls={name: [] for name in modules}, steps=[])
    loader, resume, close = common.training_loader, common.resume, common.StepLog.close

    def noted_samples(*given):
        for sample in loader(*given):
            seen.samples.append(sample)
            yield sample

    def resume_and_watch(path, model, optimizer):
        for name, calls in seen.calls.items():
            module = model.get_submodule(name)
            module.register_forward_hook(lambda _, *call, calls=calls: calls.append(call))
        seen.model = model
        seen.start = {name: value.clone() for name, value in model.state_dict().items()}
        return resume(path, model, optimizer)

    def note_step(optimizer, *_):
        groups = [dict(group) for group in optimizer.param_groups]
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        norms = torch.stack([gradient.norm() for gradient in gradients])
        seen.steps.append(SimpleNamespace(optimizer=optimizer, groups=groups, norms=norms))

    def close_and_end(log):
        close(log)
        raise LoopEnds

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "training_loader", noted_samples)
        patch.setattr(common, "resume", resume_and_watch)
        patch.setattr(common.StepLog, "close", close_and_end)
        patch.setattr(sys, "argv", [stage.__name__, *words])
        with register_optimizer_step_pre_hook(note_step), pytest.raises(LoopEnds):
            stage.main()
    return seen


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """8 poses × 4 pictures."""
    return write_set(tmp_path_factory.mktemp("set"), n_poses=8, per_pose=4)


def half_cosine(start, end, steps):
    """From `start` towards `end`, a number a step."""
    return [start + (end - start) * (1 - math.cos(math.pi * i / steps)) / 2 for i in range(steps)]


# ----------------------------------------------------------------------------- the queue, LiftedCL


def test_new_keys_take_the_place_of_the_oldest():
    queue, keys = parts.Queue(5, 2), torch.arange(12.0).view(6, 2)
    start = queue.keys.clone()
    queue.add(keys[:3])
    assert torch.equal(queue.keys, torch.cat([keys[:3], start[3:]])) and queue.place == 3
    queue.add(keys[3:])
    assert torch.equal(queue.keys, keys[[5, 1, 2, 3, 4]]) and queue.place == 1


@pytest.fixture(scope="module")
def lifted(pictures, tmp_path_factory):
    """4 steps of LiftedCL; added: (queue, keys) of every call of Queue.add."""
    out, added, add = tmp_path_factory.mktemp("lifted") / "run", [], parts.Queue.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts.Queue, "add", lambda q, keys: added.append((q, keys)) or add(q, keys))
        words = test_liftedcl.arguments(pictures, out, "epochs=1")
        seen = watched(liftedcl, words, ["student", "teacher"])
    seen.added, seen.out = added, out
    return seen


def test_liftedcl_shows_each_network_its_own_crop(lifted):
    calls = lifted.calls["student"], lifted.calls["teacher"]
    for sample, (query, _), (key, _) in zip(lifted.samples, *calls, strict=True):
        assert not torch.equal(query[0], key[0])
        assert torch.equal(query[0], normalize(sample["image"][:, 0]))
        assert torch.equal(key[0], normalize(sample["image"][:, 1]))


def test_liftedcl_queues_the_teachers_features_and_its_pooled_maps(lifted):
    queues = [lifted.model[name] for name in ("queue_inv", "queue_var")]
    for step, (_, (feature, maps, _)) in enumerate(lifted.calls["teacher"]):
        expected = F.normalize(feature, dim=1), F.normalize(maps.mean((2, 3)), dim=1)
        for own, queue, (into, keys) in zip(expected, queues, lifted.added[2 * step :]):
            assert into is queue and torch.equal(keys, own)
    assert len(lifted.added) == 2 * len(lifted.samples)


# ------------------------------------------------------------------------------------------ SynCLR


def test_a_mask_token_stands_at_its_own_place():
    cfg = read_config(synclr.KEYS, "", [*test_synclr.SMALL.split(), "annotations=x.json"])
    torch.manual_seed(0)
    model, images, given = synclr.build_model(cfg), torch.randn(2, 3, 64, 32), []
    encoder = model.student.encoder
    encoder.blocks[0].register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
    hidden = torch.zeros(2, 8, dtype=torch.bool)
    hidden[0, 3] = hidden[0, 6] = True
    model.encode_masked(images, hidden)
    expected = encoder.embed(images)
    for place in (3, 6):  # [CLS] comes first
        expected[0, 1 + place] = model.mask_token[0, 0] + encoder.pos_embed[0, place]
    assert torch.allclose(given[0], expected)
    assert not torch.allclose(given[0][0, 4], given[0][0, 7])


def test_synclr_is_shown_its_sample_and_its_teacher_warms_up(pictures, tmp_path):
    """Two steps an epoch: from .04 to .07 in an epoch and a half, and there it stays."""
    more = "epochs=3", "tau_warmup_epochs=1.5"
    seen = watched(synclr, test_synclr.words(pictures, tmp_path / "run", *more), [""])
    for sample, (given, _) in zip(seen.samples, seen.calls[""], strict=True):
        assert torch.equal(given[0], normalize(sample["image"][:, 0]))
        assert torch.equal(given[1], normalize(torch.cat(sample["local"].unbind(1))))
        assert torch.equal(given[3], sample["pose_id"])
    temperatures = [given[4] for given, _ in seen.calls[""]]
    assert temperatures == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07, 0.07])


# --------------------------------------------------------------------------------------------- GCL


@pytest.fixture(scope="module")
def turned(lifted, tmp_path_factory):
    """An epoch of 1 step with E_id frozen, two of the joint stage; losses: pairs of F.l1_loss."""
    root = tmp_path_factory.mktemp("gcl")
    words = ["task=people", "backend=puppet", f"out={root / 'people'}", "height=64", "width=32"]
    words += ["persons_train=6", "persons_val=0", "persons_test=2", "cameras=2", "workers=0"]
    losses, l1_loss = [], F.l1_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["generate.py", *words, "pictures_per_camera=2"])
        generate.main()
        patch.setattr(F, "l1_loss", lambda x, y: losses.append((x, y)) or l1_loss(x, y))
        more = f"init={lifted.out}/encoder.safetensors", "epoch_steps=1", "lr_drop=1"
        seen = watched(gcl, test_gcl.arguments(root, root / "run", *more), ["e_str", "e_id", "g"])
    seen.losses, seen.out = losses, root / "run"
    return seen


def of_each_step(calls):
    """Of the 3."""
    n = len(calls) // 3
    return calls[:n], calls[n : 2 * n], calls[2 * n :]


def test_gcl_redraws_turns_and_turns_back(turned):
    """x_rec = G(s, a), x_nv = G(s', a), x_cyc = G(s, a_nv), and E_id sees all four pictures."""
    per_step = [of_each_step(turned.calls[name]) for name in ("e_str", "e_id", "g")]
    assert len(turned.samples) == 3
    for sample, bodies, seen, drawn in zip(turned.samples, *per_step, strict=True):
        for name, (given, _) in zip(("guide", "turned"), bodies):
            assert torch.equal(given[0], sample[name] / 127.5 - 1)
        assert not torch.equal(sample["guide"], sample["turned"])
        (_, s), (_, s_nv) = bodies
        shown, (a, _), (a_nv, _) = [x for (x,), _ in seen], seen[0][1], seen[2][1]
        assert torch.equal(shown[0], normalize(sample["image"]))
        pairs = (s, a), (s_nv, a), (s, a_nv)
        for (given, made), pair, picture in zip(drawn, pairs, shown[1:], strict=True):
            assert given[0] is pair[0] and given[1] is pair[1] and picture is made


def test_gcl_pulls_pictures_and_stripes_to_the_sources_which_stand_still(turned):
    per_step = of_each_step(turned.calls["e_id"]), of_each_step(turned.losses)
    for seen, losses in zip(*per_step, strict=True):
        (((x,), (a, _)), ((x_rec,), (a_rec, _)), _, ((x_cyc,), (a_cyc, _))) = seen
        for loss, made, target in zip(losses, (x_rec, x_cyc, a_rec, a_cyc), (x, x, a, a)):
            assert loss[0] is made and made.requires_grad
            assert torch.equal(loss[1], target) and not loss[1].requires_grad
    assert [seen[0][1][0].requires_grad for seen in per_step[0]] == [False, True, True]


def test_the_rate_of_e_id_falls_to_a_tenth(turned):
    of_id = [step for step in turned.steps if isinstance(step.optimizer, torch.optim.SGD)]
    assert [step.groups[0]["lr"] for step in of_id] == pytest.approx([3.5e-4, 3.5e-5])
    saved = common.load_checkpoint(turned.out / "last.pt")["for_id"]["param_groups"]
    assert saved[0]["lr"] == pytest.approx(3.5e-5)


# ----------------------------------------------------------------------------------------- SOLIDER


@pytest.fixture(scope="module")
def parted(pictures, tmp_path_factory):
    """9 steps of SOLIDER, 3 an epoch; after: (momentum, prototypes) after each."""
    out, after = tmp_path_factory.mktemp("solider") / "run", []
    update = solider.parts.update_teacher

    def noted_update(teacher, student, momentum):
        after.append((momentum, student.head.last.weight.detach().clone()))
        update(teacher, student, momentum)

    more = "epochs=3 batch=10 blr=0.02 min_lr=1e-4 clip_grad=0.01 freeze_last_layer=1 patch=16"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solider.parts, "update_teacher", noted_update)
        seen = watched(solider, test_solider_runs.arguments(pictures, out, *more.split()), [])
    seen.after, seen.out = after, out
    return seen


def test_soliders_rate_falls_to_min_lr(parted):
    peak = 0.02 * 10 / 256
    expected = [peak / 2, peak, *half_cosine(peak, 1e-4, 7)]  # half an epoch: 2 steps
    logged = [row["lr"] for row in test_solider_runs.log_of(parted.out)]
    assert logged == pytest.approx(expected, rel=1e-5)  # six digits
    for step, lr in zip(parted.steps, expected, strict=True):
        for group in step.groups:
            assert group["lr"] == pytest.approx(lr * group["lr_scale"])


def test_soliders_weight_decay_and_momentum_are_cosines(parted):
    for step, decay in zip(parted.steps, half_cosine(0.04, 0.4, 9), strict=True):
        for group in step.groups:
            assert group["weight_decay"] == pytest.approx(decay * group["decays"])
    assert [momentum for momentum, _ in parted.after] == pytest.approx(half_cosine(0.996, 1, 9))


def test_prototypes_rest_for_an_epoch(parted):
    before = parted.start["student.head.last.weight"]
    for step, (_, prototypes) in enumerate(parted.after):
        assert torch.equal(before, prototypes) == (step < 3)
        before = prototypes


def test_each_gradient_is_clipped_by_itself(parted):
    for step in parted.steps:
        assert step.norms.max() < 0.01 * (1 + 1e-4)
        assert (step.norms > 0.01 * (1 - 1e-3)).sum() > 1  # of several at once


def test_every_part_is_hidden_and_half_of_the_pictures_are_semantic():
    cfg = SimpleNamespace(seed=0, batch=8)
    drawn = [solider.draw_choices(cfg, step, ALONE) for step in range(300)]
    hidden = [k for _, k in drawn]
    assert set(hidden) == {1, 2, 3} and all(75 < hidden.count(k) < 125 for k in (1, 2, 3))
    semantic = [weight for weights, _ in drawn for weight in weights]
    assert set(semantic) == {0, 1} and 0.45 < sum(semantic) / 2400 < 0.55


# ------------------------------------------------------------------------------------------ VICReg


@pytest.fixture(scope="module")
def paired(pictures, tmp_path_factory):
    """12 steps of VICReg, 2 an epoch."""
    out = tmp_path_factory.mktemp("vicreg") / "run"
    words = [f"annotations={pictures}", f"out={out}", *test_fork.SMALL.split()]
    return watched(vicreg, words, ["", "encoder", "expander"])


def test_vicreg_weighs_its_terms_on_pairs_of_pose_tokens(paired):
    calls = [paired.calls[name] for name in ("", "encoder", "expander")]
    for sample, whole, encoder, expander in zip(paired.samples, *calls, strict=True):
        assert torch.equal(whole[0][0], normalize(sample["image"]))
        assert torch.equal(sample["pose_id"][0::2], sample["pose_id"][1::2])
        assert torch.equal(expander[0][0], encoder[1][:, 1])  # [CLS], [POSE], patches
        z = expander[1].detach()
        terms = vicreg.vicreg_terms(z[0::2], z[1::2])
        total = 25 * terms["invariance"] + 25 * terms["variance"] + terms["covariance"]
        assert torch.allclose(whole[1]["total"], total)


def test_vicregs_rate_warms_up_and_falls(paired):
    peak = 4.0e-3 * 16 / 256
    expected = [peak, *half_cosine(peak, 0, 11)]  # a tenth of 12 steps: 1
    assert [step.groups[0]["lr"] for step in paired.steps] == pytest.approx(expected)
    decays = {group["weight_decay"] for step in paired.steps for group in step.groups}
    assert decays == {0.05, 0.0}
