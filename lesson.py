"""Contrastive learning in a minute: seven small experiments with the losses of losses.py.

There are no pictures here and hardly a network: a few dozen embeddings lie on a circle and an
optimiser moves them, so that everything a loss does can be seen. Each section prints what it found
beside what to expect, and draws a picture. docs/lesson.md walks through them and has exercises.

  python lesson.py                           # all seven, 10 to 20 seconds on one CPU core
  python lesson.py temperature out=FOLDER    # one of them, its picture in FOLDER
Legend: M embeddings · D width · R ranks · z (M, D) embeddings · id (M,) the pose of each.
"""

import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import grad
from torch.optim import SGD, Adam

from losses import contrastive_health, multi_positive_loss, pair_masks

TAU = 0.1  # the temperature τ
POSES = torch.arange(8).repeat_interleave(4)  # 8 poses, 4 pictures of each: M = 32
# Okabe and Ito's colours, which the colour-blind can tell apart; pose −1 takes the last, white.
COLOURS = "#0072B2 #E69F00 #009E73 #CC79A7 #56B4E9 #D55E00 #F0E442 #555555".split() * 2 + ["white"]
BLUE, ORANGE, GREY = COLOURS[0], COLOURS[5], "0.5"


def alike(n, width=2):
    """(n, width), nearly in one direction: nothing is told apart yet."""
    noise = torch.randn(n, width, generator=torch.Generator().manual_seed(0))
    return F.normalize(1 + 0.2 * F.normalize(noise, dim=1), dim=1)


def learn(z, loss, steps=400, rate=0.02, optimizer=Adam, network=None):
    """Move the points z (M, D) downhill, or a network's weights. → points, loss at each step."""
    z = z.clone().requires_grad_()
    optimizer = optimizer(network.parameters() if network else [z], rate)
    path, history = [], []
    for _ in range(steps):
        points = F.normalize(network(z) if network else z, dim=1)  # onto the circle
        value = loss(points)
        path.append(points.detach())
        history.append(value.item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return torch.stack(path), history


def even_loss(poses, pictures, tau=TAU):
    """L_mp with the poses evenly around, each at one point: where learning should end."""
    cosine = np.cos(2 * math.pi / poses * np.arange(1, poses))  # to every other pose
    return math.log(pictures - 1 + pictures * np.exp((cosine - 1) / tau).sum())


def rows_loss(rows, keys, positive, column):
    """L_mp of some rows (B, D) against all keys (M, D), as one would first write it down."""
    cosine = F.normalize(rows, dim=1) @ F.normalize(keys, dim=1).T  # (B, M)
    log_q = (cosine / TAU).masked_fill(~column, -torch.inf).log_softmax(1)  # no column: q = 0
    return -(log_q.where(positive, 0).sum(1) / positive.sum(1)).mean()


def expect(name, found, expected):
    print(f"  {name:52}{float(found):8.3f}   expected {expected:7.3f}")


def draw_circle(axis, z, id, title):
    """Pictures of one pose are drawn one behind the other, outwards."""
    axis.add_patch(plt.Circle((0, 0), 1, fill=False, color="0.8"))
    for k, xy in enumerate(z):
        marker = "s" if id[k] < 0 or id[k] >= 8 else "o"
        style = dict(color=COLOURS[id[k]], marker=marker, edgecolor="black", zorder=2)
        behind = (id[:k] == id[k]).sum()  # earlier pictures of this pose
        x, y = xy * (1 + 0.11 * behind)
        axis.scatter(x, y, s=80, **style)
    axis.set(xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), aspect="equal", title=title)
    axis.axis("off")


def circle(axes):
    """InfoNCE is L_mp with two views of a picture: they attract, everything else spreads."""
    id = torch.arange(16).repeat(2)  # 16 pictures, two views of each
    path, loss = learn(alike(32), lambda z: multi_positive_loss(z, id, TAU))
    start, end = math.log(31), even_loss(16, 2)
    expect("loss at the start, all alike: ln 31", loss[0], start)
    expect("loss at the end, 16 pictures evenly around", loss[-1], end)
    expect("cosine of the two views", (path[-1, :16] * path[-1, 16:]).sum(1).mean(), 1)
    # Unwrapped, because 181° and −179° are one place.
    angle = np.degrees(np.unwrap(torch.atan2(path[..., 1], path[..., 0]).numpy(), axis=0))
    for k in range(32):
        axes[0].plot(angle[:200, k], color=COLOURS[id[k]], lw=2, ls="-" if k < 16 else ":")
    axes[0].set(xlabel="step", title="angle of each view, degrees")
    draw_circle(axes[1], path[-1], id, "the end: the views have met")
    axes[2].plot(loss[:200], color=BLUE, lw=3)
    axes[2].set(xlabel="step", title="loss", yticks=(end, start), yticklabels=("even", "ln 31"))


def positives(axes):
    """Several positives are a target p: the loss −Σ p log q never falls below −Σ p log p."""
    path, loss = learn(alike(32), lambda z: multi_positive_loss(z, POSES, TAU))
    positive, column = pair_masks(POSES)
    p = positive / positive.sum(1, keepdim=True)
    # The own column is no candidate: an embedding would find itself and learn nothing.
    q = (path[-1] @ path[-1].T / TAU).masked_fill(~column, -torch.inf).softmax(1)
    expect("loss at the end, 8 poses evenly around", loss[-1], even_loss(8, 4))
    expect("its floor, three positives: ln 3", -(p * p.log()).nansum(1).mean(), math.log(3))
    expect("probability of positives", (q * positive).sum(1).mean(), 3 / math.exp(even_loss(8, 4)))
    draw_circle(axes[0], path[-1], POSES, "the end: a colour is a pose")
    axes[1].imshow(q.numpy(), cmap="Blues", vmin=0, vmax=1 / 3)
    axes[1].set(xlabel="column j", ylabel="row i", title="softmax q, learned")
    axes[2].bar(range(32), q[5].numpy(), color=BLUE, label="q, learned")
    axes[2].stairs(p[5], np.arange(33) - 0.5, color="black", lw=2, label="p, its target")
    axes[2].axhline(1 / 31, color=ORANGE, ls="--", label="q at the start: 1/31")
    axes[2].set(xlabel="column j", ylim=(0, 0.4), title="row 5, a picture of pose 1")


def temperature(axes):
    """A small temperature hears the nearest negatives alone; a large one is sure of nothing."""
    angle = torch.linspace(0, 2 * math.pi, 513)[1:-1]  # 511 negatives, seen from angle 0
    for axis, tau in zip(axes, (0.02, 1)):
        share = (angle.cos() / tau).softmax(0)  # the weight of each in the gradient
        # 1 / Σ share² counts equal shares. Bessel's I0(1/τ) is the mean of exp(cos / τ) all around.
        felt, theory = 1 / share.square().sum() / 511, np.i0(1 / tau) ** 2 / np.i0(2 / tau)
        expect(f"part of the negatives that is felt, τ = {tau}", felt, theory)
        axis.scatter(angle.cos()[7::16], angle.sin()[7::16], 60000 * share[7::16], BLUE, alpha=0.5)
        draw_circle(axis, torch.tensor([[1.0, 0]]), POSES[4:], f"weights of negatives, τ = {tau}")
    taus = np.geomspace(0.02, 1, 9)
    ends = [learn(alike(32), lambda z, t=t: multi_positive_loss(z, POSES, t))[1][-1] for t in taus]
    even = [even_loss(8, 4, t) for t in taus]  # the loss is ln (3 / probability of positives)
    expect("probability of positives, τ = 1", 3 / math.exp(ends[-1]), 3 / math.exp(even[-1]))
    axes[2].semilogx(taus, 3 / np.exp(ends), "o", color=BLUE, label="found")
    axes[2].plot(taus, 3 / np.exp(even), color=GREY, label="theory")
    axes[2].set(xlabel="τ", title="probability of positives, learned")


def collapse(axes):
    """Without negatives one point for everything is a perfect answer, and a network finds it."""
    pull = (lambda z: 1 - (z @ z.T)[pair_masks(POSES)[0]].mean(), "pull alone", 1, ORANGE)
    both = (lambda z: multi_positive_loss(z, POSES, TAU), "pull and push", -1 / 7, BLUE)
    for axis, (loss, name, cosine, colour) in zip(axes, (pull, both)):
        torch.manual_seed(0)
        codes = torch.randn(8, 64)[POSES]  # one for each pose; dropout makes different pictures
        network = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
        path, _ = learn(codes, loss, rate=0.005, network=network)
        found = contrastive_health(path[-1], POSES)["negative_cosine"]
        expect(f"{name}: cosine of two poses", found, cosine)
        draw_circle(axis, path[-1], POSES, name)
        axes[2].plot(path.var(1, correction=0).sum(1).sqrt(), color=colour, lw=3, label=name)
    axes[2].set(xlabel="step", title="spread: 0 one point, 1 all around")


def matrix(axes):
    """Who is a positive, who only a negative (alone in its pose), who is left out (no pose)."""
    id = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 3, -1, -1])  # pose 3 is alone; −1: no pose
    positive, column = pair_masks(id)
    path, loss = learn(alike(12), lambda z: multi_positive_loss(z, id, TAU))
    expect("positives: 4·3 + 3·2 + 2·1", positive.sum(), 20)
    expect("negatives: 10·9 − 20", (column & ~positive).sum(), 70)
    expect("loss at the start, all alike: ln 9", loss[0], math.log(9))
    expect("how far the two without a pose moved", (path[-1] - path[0])[id < 0].norm(), 0)
    kind = column.int() + positive  # 0 left out, 1 negative, 2 positive
    axes[0].imshow(kind.numpy(), cmap="Blues", vmax=4)
    for i, j in np.ndindex(12, 12):
        axes[0].text(j, i, "·−+"[kind[i, j]], ha="center", va="center")
    axes[0].set(xticks=range(12), yticks=range(12), title="+ positive, − negative, · left out")
    axes[0].set(xticklabels=id.tolist(), yticklabels=id.tolist(), xlabel="pose", ylabel="pose")
    draw_circle(axes[1], path[0], id, "the start")
    draw_circle(axes[2], path[-1], id, "the end: white squares stay")


def precision(axes):
    """In half precision the loss looks right while half of its gradient is noise."""
    id = torch.arange(32).repeat(4)  # M = 128, in 64 directions
    path, exact = learn(alike(128, 64), lambda z: multi_positive_loss(z, id, TAU), 101)
    cosine = torch.linspace(0.95, 1, 999)
    stairs = (cosine / TAU).bfloat16().float()  # 8 bits of mantissa: 1/16 apart from 8 to 16
    expect("logits from 9.5 to 10 that bfloat16 tells apart", len(stairs.unique()), 9)
    plain = (lambda z: rows_loss(z, z, *pair_masks(id)), "plain lines", 0.55, ORANGE)
    ours = (lambda z: multi_positive_loss(z, id, TAU), "losses.py", 0, BLUE)
    for loss, name, expected, colour in (plain, ours):
        errors = []
        for z in path[::5]:
            z.requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):  # forward alone, as autocast is meant
                value = loss(z)
            (found,), (true,) = grad(value, z), grad(multi_positive_loss(z.double(), id, TAU), z)
            errors.append((found - true).norm() / true.norm())
        expect(f"{name} in autocast: loss at the end", value.item(), exact[-1])
        expect(f"{name} in autocast: error of its gradient", errors[-1], expected)
        axes[1].plot(1e5 * true[:, :9], 1e5 * found[:, :9], ".", color=colour)
        axes[2].semilogy(range(0, 101, 5), errors, color=colour, lw=3, label=name)
    axes[0].plot(cosine, stairs, color=ORANGE, lw=3, label="bfloat16")
    axes[0].plot(cosine, cosine / TAU, color=BLUE, label="float32")
    axes[0].set(xlabel="cosine", title="logit: cosine / τ")
    axes[1].set(xlabel="true", ylabel="in autocast", title="gradient at step 100, × 10⁵")
    axes[2].set(xlabel="step", title="error of the gradient, relative")


def ranks(axes):
    """What a gather without gradient loses on R ranks, seen by slicing one batch."""
    positive, column = pair_masks(POSES)

    def mean_of_ranks(z, R, way):
        others = z if way == "with gradient" else z.detach()  # detached: nothing is sent back
        losses = []
        for own in torch.arange(32).chunk(R):
            if way == "own slice":  # each rank computes the whole loss, for its own rows alone
                losses.append(multi_positive_loss(others.index_copy(0, own, z[own]), POSES, TAU))
            else:
                losses.append(rows_loss(z[own], others, positive[own], column[own]))
        return torch.stack(losses).mean()

    z, counts = alike(32).requires_grad_(), (1, 2, 4, 8, 16)
    (true,) = grad(multi_positive_loss(z, POSES, TAU), z)
    ways = ("with gradient", "without gradient", "own slice")
    looks = ((BLUE, 7), (ORANGE, 4), (GREY, 2))  # where lines meet, all can be seen
    for way, expected, (colour, width) in zip(ways, (1, 1 / 2, 1 / 4), looks):
        found = [grad(mean_of_ranks(z, R, way), z)[0] for R in counts]
        left = [(g * true).sum() / true.square().sum() for g in found]  # along the true one
        expect(f"{way}, 4 ranks: part of the gradient", left[2], expected)
        axes[0].plot(counts, left, "o-", color=colour, lw=width)
        for axis, kind, rate in ((axes[1], SGD, 0.5), (axes[2], Adam, 0.02)):  # Adam hides scale
            _, loss = learn(z.detach(), lambda z, w=way: mean_of_ranks(z, 4, w), 150, rate, kind)
            axis.plot(loss, color=colour, lw=width, label=way)
            axis.set(xlabel="step", title=f"loss, 4 ranks, {kind.__name__}")
    axes[0].set(xlabel="ranks R", xticks=counts, title="part of the gradient that is left")


def main(words):
    out = Path("runs/lesson")
    if words and words[-1].startswith("out="):
        out = Path(words.pop().removeprefix("out="))
    sections = (circle, positives, temperature, collapse, matrix, precision, ranks)
    names = [section.__name__ for section in sections]
    if not set(words) <= set(names):
        print("lesson.py: it takes any of", *names, "and at the end out=FOLDER", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"font.size": 14, "axes.spines.top": False, "axes.spines.right": False})
    for number, section in enumerate(sections, 1):
        if section.__name__ in (words or names):
            print(f"\n{number}. {section.__doc__}")
            figure, axes = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
            section(axes)
            for axis in axes:
                axis.legend(*axis.get_legend_handles_labels(), frameon=False)
            figure.savefig(out / f"{number}_{section.__name__}.png", dpi=90)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except OSError as error:
        file = error.filename or "its output"
        sys.exit(f"lesson.py: cannot write {file}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit(130)
