"""baselines/synclr.py: losses against loops, ranks, kill and resume, refusals, what it writes."""

import json
import math
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import ROOT, kill_after, run_script
from safetensors.torch import load_file

import generate
from baselines import parts, synclr, synclr_report
from common import Ranks, load_checkpoint
from losses import multi_positive_loss, pair_masks
from plumbing.config import read_config
from plumbing.errors import UserError

SMALL = "size=tiny height=64 width=32 local_height=32 local_width=16 batch=16 local_crops=2 "
SMALL += "projector_width=64 projector_out=32 head_width=64 prototypes=24 mask_ratio=0.5 "
SMALL += (
    "epochs=2 warmup_epochs=1 tau_warmup_epochs=1 blr=4.0e-3 device=cpu workers=0 precision=fp32"
)
CPU = torch.device("cpu")


def config(*more):
    return read_config(synclr.KEYS, "", [*SMALL.split(), "annotations=x.json", *more])


def double(cfg, seed=0):
    """The model in float64: a test's bounds then say what is equal."""
    torch.manual_seed(seed)
    return synclr.build_model(cfg).double()


def batch_of(cfg, M=8, seed=1):
    """M random pictures of M/4 captions, their local crops (M, l, …), masks for one process."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(M, 3, 64, 32, generator=g, dtype=torch.float64)
    local = torch.randn(M, 2, 3, 32, 16, generator=g, dtype=torch.float64)
    caption = torch.arange(M // 4).repeat_interleave(4)
    return images, local, caption


def flat(local):
    return local.transpose(0, 1).flatten(0, 1)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """8 sentences × 5 pictures."""
    out = tmp_path_factory.mktemp("prompts") / "set"
    words = [f"out={out}", "poses=8", "workers=0", "height=64", "width=32"]
    argv, sys.argv = sys.argv, ["generate.py", "positives=prompt", *words]
    generate.main()
    sys.argv = argv
    return out / "annotations.json"


# ------------------------------------------------------------------------------------------- losses


def sinkhorn_by_hand(logits, rounds=3):
    """The published arithmetic, a number at a time: matrix of sum 1, prototypes of sum 1/K, patches
    of sum 1/n, in turns."""
    n, K = len(logits), len(logits[0])
    q = [[math.exp(v) for v in row] for row in logits]
    total = sum(map(sum, q))
    q = [[v / total for v in row] for row in q]
    for _ in range(rounds):
        for k in range(K):
            whole = sum(q[i][k] for i in range(n))
            for i in range(n):
                q[i][k] = q[i][k] / whole / K
        for i in range(n):
            whole = sum(q[i])
            q[i] = [v / whole / n for v in q[i]]
    return torch.tensor([[v * n for v in row] for row in q])


def test_sinkhorn_is_that_of_a_loop():
    cosines = torch.rand(10, 6, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    targets = synclr.sinkhorn(cosines / 0.04)
    expected = sinkhorn_by_hand((cosines / 0.04).tolist()).double()
    assert torch.allclose(targets, expected, atol=1e-6)
    assert torch.allclose(targets.sum(1), torch.ones(10, dtype=torch.float64))
    # Everything near one prototype: without it one would take all.
    cosines[:, 0] += 2
    assert (cosines / 0.1).softmax(1).sum(0)[0] > 9 > 2 > synclr.sinkhorn(cosines / 0.1).sum(0)[0]
    extreme = torch.tensor([[1.0, -1.0], [1.0, -1.0]])  # the widest cosines, the lowest temperature
    assert synclr.sinkhorn(extreme / 0.03).isfinite().all()


def caption_loss_by_hand(anchors, candidates, caption, tau, own):
    """−mean over anchors of the mean over positives of log softmax, a pair at a time."""
    a, b = F.normalize(anchors, dim=1), F.normalize(candidates, dim=1)
    terms = []
    for i in range(len(a)):
        others = [j for j in range(len(b)) if caption[j] >= 0 and (own or j != i)]
        positives = [j for j in others if caption[j] == caption[i]]
        if caption[i] < 0 or not positives:
            continue
        whole = sum(torch.exp(a[i] @ b[k] / tau) for k in others)
        terms.append(-sum(torch.log(torch.exp(a[i] @ b[j] / tau) / whole) for j in positives))
        terms[-1] = terms[-1] / len(positives)
    return sum(terms) / len(terms)


@pytest.mark.parametrize("own", [False, True])
def test_caption_loss_is_that_of_a_loop(own):
    g = torch.Generator().manual_seed(0)
    anchors = torch.randn(9, 5, generator=g, dtype=torch.float64, requires_grad=True)
    candidates = torch.randn(9, 5, generator=g, dtype=torch.float64)
    caption = torch.tensor([0, 0, 0, 1, 1, 1, -1, 2, 0])
    positive, column = synclr.pairs_of(caption, own)
    loss = synclr.caption_loss(anchors, candidates, positive, column, 0.1)
    expected = caption_loss_by_hand(anchors, candidates, caption, 0.1, own)
    assert torch.allclose(loss, expected)
    ours, theirs = (torch.autograd.grad(x, anchors)[0] for x in (loss, expected))
    assert torch.allclose(ours, theirs) and theirs.abs().max() > 0.01


def test_anchors_as_candidates_give_l_mp():
    z = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    caption = torch.arange(2).repeat_interleave(4)
    loss = synclr.caption_loss(z, z, *pair_masks(caption), 0.1)
    assert torch.allclose(loss, multi_positive_loss(z, caption, 0.1))


def test_a_step_is_the_sum_of_its_terms_by_hand():
    """Every picture alone through the networks, every masked patch by itself."""
    cfg = config("gamma_ibot=0.7")
    model = double(cfg)
    model.teacher.load_state_dict(double(cfg, seed=5).student.state_dict())  # not yet an average
    images, local, caption = batch_of(cfg)
    rows, mask = synclr.draw_masks(cfg, (4, 2), 0, 8, Ranks(0, 1, CPU))
    result = model(images, flat(local), (rows, mask), caption, 0.05)

    hidden = torch.zeros(8, 8, dtype=torch.bool)
    hidden[rows] = mask
    student, teacher = model.student, model.teacher
    z, keys, logits, theirs = [], [], [], []
    for i in range(8):
        tokens = model.encode_masked(images[i : i + 1], hidden[i : i + 1])[0]
        whole = teacher.encoder(images[i : i + 1])[0]
        z.append(model.predictor(student.projector(tokens[:1]))[0])
        keys.append(teacher.projector(whole[:1])[0])
        logits += [student.head(tokens[1 + j]) for j in range(8) if hidden[i, j]]
        theirs += [teacher.head(whole[1 + j]) for j in range(8) if hidden[i, j]]
    z, keys = torch.stack(z), torch.stack(keys)
    mp_ = caption_loss_by_hand(z, keys, caption, 0.1, own=False)
    small = parts.at_size(student.encoder, (32, 16))
    local_terms = []
    for crop in range(2):
        crops = model.predictor(student.projector(small(local[:, crop])[:, 0]))
        local_terms.append(caption_loss_by_hand(crops, keys, caption, 0.1, own=True))
    targets = sinkhorn_by_hand((torch.stack(theirs) / 0.05).tolist()).double()
    ibot = 0
    for target, cosines in zip(targets, logits):
        whole = sum(torch.exp(c / 0.1) for c in cosines)
        terms = [t * torch.log(torch.exp(c / 0.1) / whole) for t, c in zip(target, cosines)]
        ibot = ibot - sum(terms) / len(targets)
    assert len(targets) == 4 * 4  # half of the pictures, half of their patches
    assert torch.allclose(result["mp"], mp_) and torch.allclose(result["ibot"], ibot, atol=1e-6)
    assert torch.allclose(result["mp_local"], sum(local_terms) / 2)
    total = mp_ + sum(local_terms) / 2 + 0.7 * ibot
    assert torch.allclose(result["total"], total, atol=1e-6)
    # The teacher learns by averaging alone; everything else learns.
    result["total"].backward()
    fixed = {name for name, p in model.named_parameters() if p.grad is None}
    assert all(name.startswith("teacher.") or "pos_embed" in name for name in fixed)
    assert len(fixed) == len(list(model.teacher.parameters())) + 1


def test_what_is_masked_is_not_seen():
    cfg = config()
    model = double(cfg)
    images = batch_of(cfg)[0]
    hidden = torch.zeros(8, 8, dtype=torch.bool)
    hidden[0, 3] = True  # row 1, column 1 of 4 × 2 patches of 16 px
    changed = images.clone()
    changed[0, :, 16:32, 16:32] += 3
    before, after = (model.encode_masked(x, hidden) for x in (images, changed))
    assert torch.equal(before, after)
    changed[0, :, 0, 0] += 3
    assert not torch.allclose(model.encode_masked(changed, hidden)[0], before[0])
    none = torch.zeros_like(hidden)  # without a mask it is the encoder
    assert torch.allclose(model.encode_masked(images, none), model.student.encoder(images))


@pytest.mark.parametrize("shape", ["block", "random"])
def test_masks_are_half_of_each_captions_pictures_on_any_ranks(shape):
    cfg = config(f"mask={shape}")
    rows, mask = synclr.draw_masks(cfg, (16, 8), 3, 32, Ranks(0, 1, CPU))
    assert (rows.view(8, 2).div(4, rounding_mode="floor") == torch.arange(8)[:, None]).all()
    assert len(set(rows.tolist())) == 16 and (mask.sum(1) == 64).all()
    halves = [synclr.draw_masks(cfg, (16, 8), 3, 16, Ranks(r, 2, CPU)) for r in range(2)]
    assert torch.equal(torch.cat([halves[0][0], halves[1][0] + 16]), rows)
    assert torch.equal(torch.cat([half[1] for half in halves]), mask)
    assert not torch.equal(synclr.draw_masks(cfg, (16, 8), 4, 32, Ranks(0, 1, CPU))[1], mask)
    grid = mask.view(-1, 16, 8)
    alike = (grid[:, 1:] == grid[:, :-1]).float().mean()  # of neighbours; 1/2 by chance
    assert alike > 0.75 if shape == "block" else 0.4 < alike < 0.6


# -------------------------------------------------------------------------------------------- ranks


def one_rank(rank, world, folder):
    """The gradient of this rank's half of the pictures, averaged over the ranks as DDP does."""
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    cfg = config()
    model = double(cfg)
    images, local, caption = (x.chunk(world)[rank] for x in batch_of(cfg))
    masks = synclr.draw_masks(cfg, (4, 2), 0, len(images), Ranks(rank, world, CPU))
    result = model(images, flat(local), masks, caption, 0.05)
    result["total"].backward()
    names = ("total", "mp", "mp_local", "ibot")
    shares = torch.stack([result[name].detach() for name in names])
    for x in [shares, *(p.grad for p in model.parameters() if p.grad is not None)]:
        dist.all_reduce(x)
        x /= world
    if rank == 0:
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        torch.save((shares, grads), f"{folder}/of_ranks.pt")
    dist.destroy_process_group()


def test_two_ranks_give_the_gradient_of_one(tmp_path):
    mp.spawn(one_rank, (2, str(tmp_path)), 2)
    shares, grads = torch.load(tmp_path / "of_ranks.pt")
    cfg = config()
    model = double(cfg)
    images, local, caption = batch_of(cfg)
    masks = synclr.draw_masks(cfg, (4, 2), 0, 8, Ranks(0, 1, CPU))
    result = model(images, flat(local), masks, caption, 0.05)
    result["total"].backward()
    single = [result[name].detach() for name in ("total", "mp", "mp_local", "ibot")]
    assert torch.allclose(shares, torch.stack(single))
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert torch.allclose(grads[name], p.grad, atol=1e-9), name


# ------------------------------------------------------------------------------------------- script


def rows_of(out):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "pictures_per_s"} for row in rows]


def words(prompts, out, *more):
    return [f"annotations={prompts}", f"out={out}", *SMALL.split(), *more]


@pytest.fixture(scope="module")
def finished(prompts, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    done = run_script("baselines/synclr.py", *words(prompts, out, "epochs=4", "save_every=2"))
    assert done.returncode == 0, done.stderr
    assert "same_caption" in done.stdout and "8 captions" in done.stderr
    return out


def test_run_folder(finished):
    names = "config.yaml last.pt encoder.safetensors neighbours.png prototypes.png curves.png"
    for name in [*names.split(), "metrics.json"]:
        assert (finished / name).stat().st_size > 0, name
    assert (finished / "done").exists()
    log = rows_of(finished)
    assert [row["step"] for row in log] == [*range(1, 9), 8] and log[-1]["final"]
    # An untrained network tells nothing apart: ln of the candidates, with the own one if local.
    assert abs(log[0]["mp"] - math.log(15)) < 0.4 and abs(log[0]["mp_local"] - math.log(16)) < 0.4
    assert abs(log[0]["ibot"] - math.log(24)) < 0.4


def test_killed_and_resumed_it_is_the_same_bit_for_bit(finished, prompts, tmp_path):
    out = tmp_path / "run"
    more = words(prompts, out, "epochs=4", "save_every=2")
    assert kill_after("baselines/synclr.py", *more, lines=4, log=out / "log.jsonl")
    done = run_script("baselines/synclr.py", *more)
    assert done.returncode == 0 and "continues after step" in done.stderr, done.stderr
    states = [load_checkpoint(folder / "last.pt") for folder in (out, finished)]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name
    assert rows_of(out) == rows_of(finished)
    weights = [load_file(folder / "encoder.safetensors") for folder in (out, finished)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_two_ranks_train_as_one_process(finished, prompts, tmp_path):
    more = words(prompts, tmp_path / "run", "epochs=4", "save_every=2")
    done = run_script("baselines/synclr.py", *more, ranks=2)
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(rows_of(tmp_path / "run")[:3], rows_of(finished)):
        for name in ("loss", "mp", "mp_local", "ibot", "grad_norm", "target_entropy"):
            assert math.isclose(ours[name], theirs[name], rel_tol=2e-3), (name, ours, theirs)


def test_a_stage_takes_the_encoder(finished, prompts, tmp_path):
    more = "epochs=1 limit=8 batch=8 height=64 width=32 device=cpu workers=0".split()
    more += [f"{split}_annotations={prompts}" for split in ("train", "val")]
    encoder = f"encoder={finished / 'encoder.safetensors'}"
    done = run_script("finetune_pose.py", encoder, f"out={tmp_path / 'pose'}", *more)
    assert done.returncode == 0, done.stderr


def test_it_learns_a_few_captions_by_heart():
    cfg = config("prototypes=16")
    torch.manual_seed(0)
    model = synclr.build_model(cfg)
    images, local, caption = batch_of(cfg, 16)
    images, local = images.float(), flat(local.float())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    results = []
    for _ in range(60):
        masks = synclr.draw_masks(cfg, (4, 2), 0, 16, Ranks(0, 1, CPU))
        result = model(images, local, masks, caption, 0.07)
        optimizer.zero_grad()
        result["total"].backward()
        optimizer.step()
        parts.update_teacher(model.teacher, model.student, 0.9)
        far = result["ibot"] - result["target_entropy"]  # KL of student from teacher
        results.append((float(result["mp"].detach()), float(far.detach())))
    # Floor of L_mp: the target over 3 positives is spread evenly, ln 3.
    assert results[0][0] > 2.4 and results[-1][0] < math.log(3) + 0.2
    assert 0 <= results[-1][1] < 0.5 * results[0][1], results


def test_the_report_tells_captions_from_poses():
    """Tokens that by construction know the caption alone, or the pose alone."""
    g = torch.Generator().manual_seed(0)
    caption = torch.arange(12).repeat_interleave(5)
    pose = torch.randint(0, 6, (60,), generator=g)
    keypoints = torch.rand(6, 17, 2, generator=g)[pose] * 100
    keypoints = torch.cat([keypoints, torch.ones(60, 17, 1)], 2)
    keypoints[:, :, :2] += 30 * torch.rand(60, 1, 2, generator=g)  # where they stand is no pose
    noise = 0.1 * torch.randn(60, 12, generator=g)
    told = synclr_report.likeness(F.normalize(F.one_hot(caption, 12) + noise), caption, keypoints)
    assert told["same_caption"] == 1 and 0.7 < told["pose_distance"] < 1.3
    assert told["same_caption_by_chance"] == pytest.approx(4 / 59, abs=1e-4)
    told = synclr_report.likeness(F.normalize(F.one_hot(pose, 12) + noise), caption, keypoints)
    assert told["same_caption"] < 0.4 and told["pose_distance"] < 0.01
    keypoints[:] = 0
    assert "pose_distance" not in synclr_report.likeness(noise, caption, keypoints)


@pytest.mark.parametrize(
    "more, told",
    [
        (["annotations="], "annotations="),
        (["images=a,b"], "images="),
        (["height=70"], "height=70"),
        (["local_width=20"], "local_width=20"),
        (["mask_share=0.1"], "mask_share"),
        (["mask_ratio=0.01"], "mask_ratio"),
        (["local_min=0.5"], "local_min"),
    ],
)
def test_what_does_not_go_together_is_one_line(more, told):
    cfg = config(*more)
    with pytest.raises(UserError) as error:
        synclr.check(cfg)
        parts.read_pictures(cfg)  # the keys all neighbours share
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_set_without_captions_is_refused(prompts, tmp_path):
    document = json.loads(prompts.read_text())
    for row in document["annotations"]:
        del row["pose_id"]
    (prompts.parent / "plain.json").write_text(json.dumps(document))
    more = words(prompts.parent / "plain.json", tmp_path / "run")
    done = run_script("baselines/synclr.py", *more)
    assert done.returncode == 2 and "no two pictures share a caption" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()


def test_configs_are_valid():
    for name in ("synclr", "synclr_demo"):
        more = ["--cfg", str(ROOT / f"configs/{name}.yaml"), "annotations=x.json"]
        cfg = read_config(synclr.KEYS, "", more)
        synclr.check(cfg)
        assert cfg.batch % (8 * cfg.pictures_per_caption) == 0
