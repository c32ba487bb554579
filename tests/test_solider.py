"""SOLIDER: labels by clustering against scikit-learn and the release's rule, the losses and the
whole step against plain loops in float64, two ranks. Its script: test_solider_runs.py."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
import torch.nn.functional as F
from pretend_cuda import PretendCuda
from sklearn.cluster import KMeans

from baselines import solider
from baselines.parts import at_size, update_teacher
from baselines.solider_parts import larger_of_two, part_labels, three_means


def config(**changes):
    values = {name: key.default for name, key in solider.KEYS.items()}
    small = dict(size="tiny", height=32, width=16, patch=8, out_dim=12, head_hidden=8)
    small |= dict(local_height=16, local_width=8, local_crops=2, drop_path=0.3)
    return SimpleNamespace(**values | small | changes)


def person(rows=12, columns=4, wide=3, seed=0, D=8):
    """Tokens (N, D) with a person of three parts in a weak background; → (tokens, true labels)."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.zeros(rows, columns, dtype=torch.long)
    for part in range(3):
        labels[part * rows // 3 : (part + 1) * rows // 3, :wide] = part + 1
    tokens = 0.3 * torch.randn(rows, columns, D, generator=g)
    tokens += 6 * torch.eye(D)[labels] * (labels > 0).unsqueeze(2)
    return tokens.view(-1, D), labels.flatten()


# ---------------------------------------------------------------------------------- k-means, labels


def test_larger_of_two_is_the_best_of_all_cuts_and_scikit_learns():
    values = torch.rand(40, 23, generator=torch.Generator().manual_seed(0)) ** 3
    values[0, :12] = values[0, 12]  # many equal ones
    for row, mine in zip(values.double(), larger_of_two(values)):
        costs = {}
        for cut in row.unique()[1:]:
            groups = row[row < cut], row[row >= cut]
            costs[float(cut)] = sum(float((x - x.mean()).square().sum()) for x in groups)
        assert torch.equal(mine, row >= min(costs, key=costs.get))
        theirs = KMeans(2, n_init=10, random_state=0).fit(row.view(-1, 1).numpy())
        best = float(sum((x - x.mean()).square().sum() for x in (row[mine], row[~mine])))
        assert best <= theirs.inertia_ * (1 + 1e-9)


def test_three_means_is_scikit_learns_from_the_same_start():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(6, 40, 5, generator=g, dtype=torch.float64) + 30  # far from 0
    x[:, ::3] += 1.5
    inside = torch.rand(6, 40, generator=g) < 0.7
    start = torch.randint(3, (6, 40), generator=g)
    for i, mine in enumerate(three_means(x, inside, start)):
        own, first = x[i, inside[i]].numpy(), start[i, inside[i]].numpy()
        centres = np.stack([own[first == k].mean(0) for k in range(3)])
        theirs = KMeans(3, init=centres, n_init=1, tol=0, algorithm="lloyd").fit(own)
        assert (mine[inside[i]].numpy() == theirs.labels_).all()


def released_labels(tokens, grid):
    """The release's rule, re-typed: scikit-learn, one picture after the other."""
    h, w = grid
    x = tokens.double().numpy()
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    two = KMeans(2, random_state=0, n_init=10).fit(norms)
    inside = two.labels_ == two.cluster_centers_[:, 0].argmax()
    if inside.sum() <= 0.5 * h * w:
        return None
    three = KMeans(3, random_state=0, n_init=10).fit(x[inside]).labels_
    labels = np.zeros(h * w, int)
    labels[inside] = three + 1
    rows = np.arange(h * w) // w
    order = np.argsort([rows[labels == k].mean() for k in (1, 2, 3)])
    named = np.zeros_like(labels)
    for name, k in enumerate(order, 1):
        named[labels == k + 1] = name
    return torch.from_numpy(named)


def test_labels_are_the_true_parts_and_the_releases():
    grid, given = (12, 4), [person(seed=i) for i in range(3)]
    given[1] = tuple(x.view(12, 4, -1).flip(0).reshape(48, -1) for x in given[1])  # upside down
    given.append(person(wide=2))  # exactly half is foreground: not more
    tokens = torch.stack([t for t, _ in given])
    labels, kept = part_labels(tokens, grid)
    assert kept.tolist() == [True, True, True, False] and not labels[3].any()
    assert torch.equal(labels[0], given[0][1]) and torch.equal(labels[2], given[2][1])
    upside_down = given[1][1].squeeze()
    assert torch.equal(labels[1], torch.where(upside_down > 0, 4 - upside_down, 0))
    for i in range(4):
        theirs = released_labels(tokens[i], grid)
        assert (theirs is None) == (not kept[i])
        assert theirs is None or torch.equal(labels[i], theirs)


def test_labels_on_a_device_wait_for_nothing_and_survive_odd_maps():
    same = torch.ones(1, 12, 4)  # all tokens alike
    one = torch.zeros(1, 12, 4) + torch.arange(12).view(1, 12, 1) // 11 * 9.0  # one large token
    for tokens in (same, one, torch.randn(1, 12, 4)):
        labels, kept = part_labels(tokens, (6, 2))
        assert ((labels >= 0) & (labels <= 3)).all() and (kept.any() or not labels.any())
    assert not part_labels(one, (6, 2))[1].any()
    part_labels(torch.full((1, 12, 4), torch.nan), (6, 2))  # the loss will say so
    with PretendCuda() as cuda:
        tokens = torch.randn(2, 12, 4).cuda()
        cuda.watching = True
        part_labels(tokens, (6, 2))
        assert not cuda.waits


# --------------------------------------------------------------------------------- losses, the step


def test_dino_loss_is_the_plain_loop():
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(4, 3, 5, generator=g, dtype=torch.float64, requires_grad=True)
    q = torch.randn(2, 3, 5, generator=g, dtype=torch.float64).softmax(-1)
    mine = solider.dino_loss(logits, q)
    total = 0
    for i in range(2):
        for j in range(4):
            for b in range(3):
                log_p = logits[j, b] - torch.log(sum(x.exp() for x in logits[j, b]))
                total = total - (i != j) * sum(q[i, b, k] * log_p[k] for k in range(5)) / 3 / 6
    gradients = [torch.autograd.grad(x, logits)[0] for x in (mine, total)]
    assert torch.allclose(mine, total) and torch.allclose(*gradients)


def test_the_head_is_dinos_with_weight_norm():
    head = solider.parts.Head(6, 8, 5).double()
    norm = nn.utils.parametrizations.weight_norm(nn.Linear(256, 5, bias=False)).double()
    norm.parametrizations.weight.original0.data.fill_(1)
    norm.parametrizations.weight.original1.data.copy_(head.last.weight.data)
    x = torch.randn(7, 6, dtype=torch.float64)
    first, _, second, _, third = head.mlp
    y = third(F.gelu(second(F.gelu(first(x)))))
    assert torch.allclose(head(x), norm(y / y.norm(dim=1, keepdim=True)))


def step_data(B=6, n_local=2):
    g = torch.Generator().manual_seed(3)
    images = torch.randn(2, B, 3, 32, 16, generator=g, dtype=torch.float64)
    local = torch.randn(n_local, B, 3, 16, 8, generator=g, dtype=torch.float64)
    noise = torch.rand(4 + n_local, 12, B, generator=g, dtype=torch.float64)
    return images, local, [1.0, 1.0, 0.0, 0.0, 1.0, 0.0], noise


def tiny_solider(**changes):
    torch.manual_seed(4)
    model = solider.Solider(config(**changes)).double()
    with torch.no_grad():  # away from where it starts: a student that differs, λ that matters
        for p in model.student.parameters():
            p += 0.05 * torch.randn(p.shape, dtype=p.dtype)
        for p in model.teacher.encoder.blocks.parameters():
            p += 0.1 * torch.randn(p.shape, dtype=p.dtype)
    model.centre.normal_()
    return model


@pytest.mark.parametrize(("pooled", "pose_token"), [("cls", False), ("mean", True)])
def test_the_step_is_the_paper_word_by_word(pooled, pose_token):
    """All crops masked, all tokens asked, λ as a weight, two teacher passes, drop path."""
    model = tiny_solider(pooled=pooled, pose_token=pose_token)
    (images, local, semantic, noise), k, S = step_data(), 2, 1 + pose_token

    def read(tokens):
        return tokens[:, 0] if pooled == "cls" else sum(tokens[:, i] for i in range(-n, 0)) / n

    n = 8  # patches of a global crop
    student, teacher, B = model.student, model.teacher, 6
    centre, weight = model.centre.clone(), torch.tensor(semantic, dtype=torch.float64)
    out = model(images, local, semantic, k, noise)

    targets, logits, errors, kept_all = [], [], [], []
    for crop in range(2):
        tokens = teacher.encoder(
            images[crop], final_norm=False, semantic_weight=torch.ones(B).double()
        )
        labels, kept = part_labels(tokens[:, S:], (4, 2))
        kept_all.append(kept)
        targets.append(teacher.head(read(teacher.encoder(images[crop], semantic_weight=weight))))
        whole = student.encoder(images[crop], drop_noise=noise[crop], semantic_weight=weight)
        logits.append(student.head(read(whole)))
        hidden = images[crop].clone()
        for b in range(B):
            for i in range(8):
                y, x = i // 2 * 8, i % 2 * 8
                hidden[b, :, y : y + 8, x : x + 8] *= float(labels[b, i] != k)
        hidden = student.encoder(hidden, drop_noise=noise[2 + crop], semantic_weight=weight)
        for tokens in (whole, hidden):
            answers = model.semantic_head(tokens[:, S:])
            for b in range(B):
                for i in range(8) if kept[b] else ():
                    errors.append(weight[b] * F.cross_entropy(answers[b, i], labels[b, i]))
    small, n = at_size(student.encoder, (16, 8)), 2
    for crop in range(2):
        found = small(local[crop], drop_noise=noise[4 + crop], semantic_weight=weight)
        logits.append(student.head(read(found)))
    q = ((torch.stack(targets) - centre) / 0.04).softmax(-1)
    dino = solider.dino_loss(torch.stack(logits) / 0.1, q)
    semantic_loss = sum(errors) / len(errors)
    assert 0 < int(sum(k.sum() for k in kept_all)) < 12  # the gate has something to do
    assert torch.allclose(out["dino"], dino) and torch.allclose(out["semantic"], semantic_loss)
    parameters = [p for p in model.parameters() if p.requires_grad]
    mine = torch.autograd.grad(out["total"], parameters)
    theirs = torch.autograd.grad(dino + semantic_loss, parameters)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(mine, theirs))
    expected = 0.9 * centre + 0.1 * torch.cat(targets).mean(0)
    assert torch.allclose(model.centre, expected)


def test_switches_of_the_step():
    images, local, semantic, noise = step_data()
    frozen = tiny_solider(frozen_semantic_head=True)
    out = frozen(images, None, semantic, 1)
    out["total"].backward()
    assert all(p.grad is None for p in frozen.semantic_head.parameters())
    assert out["semantic"] > 0 and frozen.student.encoder.blocks[0].attn.qkv.weight.grad.any()
    none = tiny_solider()(images, local, [0.0] * 6, 1, noise)  # nobody has λ = 1
    assert none["semantic"] == 0 and none["total"].isfinite()
    none["total"].backward()
    gradients = [torch.tensor([3.0, 4.0]), torch.tensor([0.3])]
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for p, g in zip(parameters, gradients):
        p.grad = g.clone()
    norm = solider.clip_each(parameters, 1.0)  # each by itself, not all together
    assert torch.allclose(parameters[0].grad, torch.tensor([0.6, 0.8]), atol=1e-5)
    assert torch.equal(parameters[1].grad, gradients[1]) and torch.allclose(
        norm**2, torch.tensor(25.09)
    )


def test_a_tiny_set_is_learned():
    """Both losses fall far towards what they can be: the targets' entropy, and nothing missed."""
    torch.manual_seed(4)
    fixed = dict(drop_path=0.0, centre_momentum=1.0)  # neither teacher nor centre moves
    model = solider.Solider(config(**fixed, tau_teacher=0.02, head_hidden=64))
    images, local, semantic, _ = [x.float() if torch.is_tensor(x) else x for x in step_data()]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
    history = []
    for step in range(43):
        out = model(images, local, semantic, 1 + step % 3)
        optimizer.zero_grad()
        out["total"].backward()
        optimizer.step()
        missing = out["dino"] - out["health"]["teacher_entropy"]
        history.append((float(missing.detach()), float(out["semantic"].detach())))
    assert history[-1][0] < 0.4 * history[0][0] and history[-1][1] < 0.6 * history[0][1]
    assert out["health"]["right"] > 0.9


# -------------------------------------------------------------------------------------------- ranks


def two_steps(model, own, wrap=lambda model: model):
    """Two steps of SGD and of the teacher; → state and the second step's losses."""
    images, local, semantic, noise = step_data()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    runner = wrap(model)
    for k in (1, 3):
        out = runner(images[:, own], local[:, own], semantic[own], k, noise[..., own])
        optimizer.zero_grad()
        out["total"].backward()
        optimizer.step()
        update_teacher(model.teacher, model.student, 0.9)
    return model.state_dict(), torch.stack([out["dino"].detach(), out["semantic"].detach()])


def one_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    own = slice(3 * rank, 3 * rank + 3)
    state, terms = two_steps(tiny_solider(), own, nn.parallel.DistributedDataParallel)
    dist.all_reduce(terms)
    torch.save((state, terms / 2), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_are_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    mp.spawn(one_rank, (str(tmp_path),), 2)
    state, terms = two_steps(tiny_solider(), slice(None))
    for rank in (0, 1):
        theirs, their_terms = torch.load(tmp_path / f"{rank}.pt")
        assert torch.allclose(terms, their_terms, atol=1e-10)
        assert all(torch.allclose(state[name], theirs[name], atol=1e-9) for name in state)
