"""baselines/gcl.py: its losses, memory and clusters by brute force; runs, kills, refusals."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import yaml
from conftest import kill_after, run_script
from safetensors.torch import load_file

from baselines import gcl
from common import Ranks, UserError, load_checkpoint, save_weights
from formats.market import read_data
from formats.weights import meta_of
from model import SIZES, ViT
from plumbing.seeds import WEIGHTS, seed_all
from tasks.ranking import jaccard_distances

SMALL = "height=64 width=32 g_width=2 d_width=2 mlp_width=8 embedding=16 k1=4 k2=2 rho=0.1 "
SMALL += "min_samples=2 epoch_steps=2 batch=4 workers=0 scored=2 device=cpu precision=fp32"


# ------------------------------------------------------------------------------------------- losses


def unit(*shape, generator):
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return F.normalize(x, dim=1)


@pytest.mark.parametrize("negatives", [3, 100])
def test_memory_loss_is_that_of_a_plain_loop(negatives):
    G = torch.Generator().manual_seed(0)
    N, B, E, tau = 12, 4, 5, 0.04
    memory, f, g = (unit(n, E, generator=G) for n in (N, B, B))
    labels = torch.tensor([0, 0, 0, 1, 1, 1, -1, 2, 2, 2, 2, -1])
    index, noise = torch.tensor([0, 3, 8, 10]), torch.rand(3, B, N, generator=G)
    f.requires_grad_(), g.requires_grad_()
    bank = memory, labels, index
    value = gcl.memory_loss(f, g, bank, noise, negatives, tau)
    slopes = torch.autograd.grad(value, (f, g))
    total = 0.0
    for b, i in enumerate(index.tolist()):
        members = [n for n in range(N) if labels[n] == labels[i]]
        others = [n for n in range(N) if labels[n] != labels[i]]  # outliers are negatives
        others = sorted(others, key=lambda n: -noise[2, b, n])[:negatives]
        j = max(members, key=lambda n: noise[0, b, n])
        j2 = max(members, key=lambda n: noise[1, b, n])
        away = sum(torch.exp(g[b] @ memory[n] / tau) for n in others)
        for positive in (g[b] @ memory[i], g[b] @ memory[j], f[b] @ memory[j2]):
            e = torch.exp(positive / tau)
            total = total - torch.log(e / (e + away)) / B
    assert torch.allclose(value, total, rtol=1e-10)
    for mine, theirs in zip(slopes, torch.autograd.grad(total, (f, g))):
        assert torch.allclose(mine, theirs, rtol=1e-8, atol=1e-12)


def test_every_member_of_a_cluster_is_drawn_as_a_positive():
    memory = torch.eye(4, dtype=torch.float64)
    labels, index = torch.tensor([0, 0, 0, 1]), torch.tensor([0])
    g, seen = torch.zeros(1, 4, dtype=torch.float64), set()
    for seed in range(40):
        noise = torch.rand(3, 1, 4, generator=torch.Generator().manual_seed(seed))
        f = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
        gcl.memory_loss(f, g, (memory, labels, index), noise, 9, 1.0).backward()
        seen |= set(f.grad[0].nonzero().flatten().tolist())
    assert seen == {0, 1, 2}


def test_memory_moves_by_hand():
    memory = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    f = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    gcl.update_memory(memory, f, torch.tensor([0, 2]), 0.2)
    # .2 (1, 0) + .8 (0, 1) = (.2, .8), of length √.68; .2 (.6, .8) + .8 (1, 0) = (.92, .16)
    expected = [[0.2425356, 0.9701425], [0.0, 1.0], [0.9852117, 0.1713412]]
    assert torch.allclose(memory, torch.tensor(expected), atol=1e-6)


class TwoScales(nn.Module):
    """A small smooth discriminator: its second derivatives are not 0."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 1, 3), nn.Conv2d(3, 1, 2, 2)

    def forward(self, x):
        return [torch.tanh(self.a(x)), torch.sigmoid(self.b(x))]


def test_adversarial_losses_are_those_of_plain_loops():
    torch.manual_seed(0)
    d = TwoScales().double()
    real, *fakes = torch.randn(4, 2, 3, 6, 4, dtype=torch.float64)
    value, total = gcl.discriminator_loss(d, real, fakes, 0.01), 0.0
    for fake in fakes:  # as the release: what D says of real pictures is asked once per fake
        x = real.clone().requires_grad_()
        for scale in (0, 1):
            told, fooled = d(x)[scale], d(fake)[scale]
            total = total + sum((v - 1) ** 2 for v in told.flatten()) / told.numel()
            total = total + sum(v**2 for v in fooled.flatten()) / fooled.numel()
            for b in range(2):
                slope = 0.0
                for v in told[b].flatten():
                    slope = slope + torch.autograd.grad(v, x, create_graph=True)[0][b]
                total = total + 0.01 * (slope**2).sum() / 2
    assert torch.allclose(value, total, rtol=1e-10)
    mine, theirs = (torch.autograd.grad(v, d.parameters()) for v in (value, total))
    assert all(torch.allclose(a, b, rtol=1e-8) for a, b in zip(mine, theirs))
    outputs = d(fakes[0])
    by_hand = sum(2 * sum((v - 1) ** 2 for v in out.flatten()) / out.numel() for out in outputs)
    assert torch.allclose(gcl.adversarial_loss(outputs), by_hand)


# ----------------------------------------------------------------------------------------- clusters


def direct_jaccard(z, k1, k2):
    """[Zhong 2017] with whole matrices and sets, as its paper says."""
    N, d = len(z), 2 - 2 * z @ z.T
    rank = np.argsort(d, axis=1, kind="stable")

    def reciprocal(i, k):
        return {j for j in rank[i, : k + 1] if i in rank[j, : k + 1]}

    V = np.zeros((N, N))
    for i in range(N):
        core = reciprocal(i, k1)
        wide = set(core)
        for c in core:
            half = reciprocal(c, round(k1 / 2))
            if len(half & core) > 2 / 3 * len(half):
                wide |= half
        for j in wide:
            V[i, j] = np.exp(-d[i, j] / d[i].max())
        V[i] /= V[i].sum()
    V = np.stack([V[rank[i, :k2]].mean(0) for i in range(N)])
    least = np.minimum(V[:, None], V[None]).sum(2)
    return 1 - least / np.maximum(V[:, None], V[None]).sum(2)


def blobs(people=4, each=6, spread=0.25):
    rng = np.random.default_rng(0)
    z = np.repeat(rng.standard_normal((people, 8)), each, 0)
    z = z + spread * rng.standard_normal(z.shape)
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32), each


def test_jaccard_distances_are_those_of_a_direct_implementation():
    for spread in (0.25, 1.0):
        z, _ = blobs(spread=spread)
        d = jaccard_distances(z, 7, 3)
        assert np.abs(d - direct_jaccard(z.astype(float), 7, 3)).max() < 1e-5
        assert np.abs(np.diag(d)).max() < 1e-6 and (d == 1).any()


def test_pseudo_labels_find_people_and_eps_follows_its_rule():
    z, each = blobs()
    z = np.concatenate([z, [[1, 0, 0, 0, 0, 0, 0, 0]]]).astype(np.float32)  # alone
    ids = np.append(np.repeat(range(4), each), 9)
    cfg = SimpleNamespace(k1=5, k2=2, rho=0.22, min_samples=4, batch=4)
    labels, figures = gcl.pseudo_labels(cfg, z, ids)
    assert figures["clusters"] == 4 and labels[-1] == -1 and figures["nmi"] > 0.999
    d = jaccard_distances(z, 5, 2)
    pairs = sorted(d[i, j] for i in range(25) for j in range(i + 1, 25) if d[i, j] > 0)
    n = round(0.22 * len(pairs))
    assert figures["eps"] == pytest.approx(sum(pairs[:n]) / n, rel=1e-5)
    cfg.batch = 30
    with pytest.raises(UserError, match="raise rho"):
        gcl.pseudo_labels(cfg, z, ids)


# --------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A people set of 6 + 3, and an encoder."""
    root = tmp_path_factory.mktemp("gcl")
    done = run_script(
        "generate.py", "task=people", "backend=puppet", f"out={root / 'people'}", "height=64",
        "width=32", "persons_train=6", "persons_val=0", "persons_test=3", "cameras=2",
        "pictures_per_camera=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    s = SIZES["tiny"]
    vit = ViT(s["width"], s["depth"], s["heads"], (64, 32), 16)
    save_weights(root / "encoder.safetensors", vit, **meta_of(vit))
    return root


def arguments(given, out, *more):
    paths = f"data={given / 'people'}", f"init={given / 'encoder.safetensors'}", f"out={out}"
    return [*paths, *SMALL.split(), "frozen_epochs=1", "joint_epochs=2", "save_every=1", *more]


def log_of(out):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "pictures_per_s"} for row in rows]


@pytest.fixture(scope="module")
def plain(given):
    done = run_script("baselines/gcl.py", *arguments(given, given / "plain"))
    assert done.returncode == 0, done.stderr
    return given / "plain"


def test_a_run_reports_what_it_promises(plain):
    figures = json.loads((plain / "metrics.json").read_text())
    assert {"mAP", "rank1"} == set(figures["before"]) == set(figures["after"])
    assert len(figures["clusters"]) == 2
    assert {"clusters", "outliers", "nmi", "eps"} == set(figures["clusters"][0])
    assert {f"turned {45 * k}" for k in range(1, 8)} < set(figures["views"])
    assert all(5 < psnr < 60 and -1 <= ssim <= 1 for psnr, ssim in figures["views"].values())
    steps = [row for row in log_of(plain) if "lr" in row]
    assert [row["memory"] > 0 for row in steps] == [False, False, True, True, True, True]
    for row in steps:
        total = row["adv"] + 5 * (row["rec"] + row["cyc"]) + 5 * row["feature"] + row["memory"]
        assert row["loss"] == pytest.approx(total, rel=1e-4)
    assert (plain / "gcl.png").stat().st_size > 0 and (plain / "curves.png").exists()


def test_the_encoder_stands_still_then_learns(given, plain):
    """The joint stage begins with what E_id as given makes of the pictures, to its batch norm."""
    cfg = SimpleNamespace(**yaml.safe_load((plain / "config.yaml").read_text()))
    train, *_ = read_data(cfg.data)
    seed_all(WEIGHTS, cfg.seed)
    model, _ = gcl.build_model(cfg, len(train.files))
    gcl.fit_batch_norm(cfg, model.e_id, train, torch.device("cpu"))
    memory = gcl.embed(cfg, model.e_id, train, torch.device("cpu")).numpy()
    _, figures = gcl.pseudo_labels(cfg, memory, train.ids)
    first = json.loads((plain / "metrics.json").read_text())["clusters"][0]
    assert first == pytest.approx(figures, rel=1e-6)
    start, end = (load_file(path / "encoder.safetensors") for path in (given, plain))
    assert not torch.equal(start["blocks.0.attn.qkv.weight"], end["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize("lines", [1, 5])
def test_kill_and_resume_is_bitwise_across_the_stages(given, plain, tmp_path, lines):
    """Five lines: two steps, figures before the joint stage, its labels, and its first step."""
    out = tmp_path / "run"
    command = arguments(given, out)
    log = out / "log.jsonl"
    assert kill_after("baselines/gcl.py", *command, lines=lines, log=log, timeout=400)
    assert not (out / "done").exists()
    done = run_script("baselines/gcl.py", *command)
    assert done.returncode == 0, done.stderr
    for name in ("last.pt", "encoder.safetensors", "metrics.json", "gcl.png"):
        assert (out / name).read_bytes() == (plain / name).read_bytes(), name
    assert log_of(out) == log_of(plain)


def test_it_overfits_and_its_encoder_is_fine_tuned(given, tmp_path):
    more = "g_width=4 mlp_width=32 frozen_epochs=18 joint_epochs=1 lr=2e-3 workers=0"
    out = tmp_path / "run"
    done = run_script("baselines/gcl.py", *arguments(given, out, *more.split(), "save_every=99"))
    assert done.returncode == 0, done.stderr
    steps = [row for row in log_of(out) if "lr" in row]
    first, last = (np.mean([row["rec"] + row["cyc"] for row in part]) for part in
                   (steps[:3], steps[-8:-2]))  # fmt: skip
    assert last < 0.6 * first, (first, last)
    done = run_script(
        "finetune_reid.py", f"data={given / 'people'}", f"encoder={out / 'encoder.safetensors'}",
        "height=64", "width=32", "people=4", "pictures_per_person=2", "epochs=1", "workers=0",
        "device=cpu", f"out={tmp_path / 'reid'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_memory_loss_reaches_all_networks_and_trains_g():
    torch.manual_seed(0)
    cfg = SimpleNamespace(stripes=4, embedding=16, g_width=2, d_width=2, mlp_width=8)
    s = SIZES["tiny"]
    model = gcl.GCL(cfg, ViT(s["width"], 1, s["heads"], (64, 32), 16), 6).eval()
    model.memory.copy_(F.normalize(torch.randn(6, 16)))
    model.labels.copy_(torch.tensor([0, 0, 1, 1, 2, 2]))
    x, guide, index = torch.randn(3, 3, 64, 32), torch.rand(3, 1, 64, 32), torch.tensor([0, 2, 4])
    noise, values = torch.rand(3, 3, 6), []
    for_g = torch.optim.Adam(model.g.parameters(), lr=0.01)
    for step in range(20):  # G alone moves
        a, f = model.e_id(x)
        _, g = model.e_id(model.g(model.e_str(guide), a))
        bank = model.memory, model.labels, index
        loss = gcl.memory_loss(F.normalize(f), F.normalize(g), bank, noise, 9, 0.04)
        model.zero_grad()
        loss.backward()
        if step == 0:
            for part in (model.g, model.e_str, model.e_id):
                assert any(p.grad.abs().max() > 0 for p in part.parameters() if p.requires_grad)
        for_g.step()
        values.append(loss.item())
    assert values[-1] < 0.8 * values[0], values


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["init="], "init= names no encoder"),
        (["data="], "data= names no folder"),
        (["height=66"], "multiples of"),
        (["batch=400"], "larger than the 24"),
        (["guides=nowhere.json"], "nowhere.json"),
        (["frozen_epochs=0"], "key frozen_epochs"),
        (["stripe=4"], "nearest valid key: stripes"),
    ],
)
def test_refusals_are_one_line(given, tmp_path, more, words, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gcl.py", *arguments(given, tmp_path / "run", *more)])
    with pytest.raises(UserError, match=words):
        gcl.main()
    assert not (tmp_path / "run").exists()


def test_several_ranks_are_refused(given, tmp_path, monkeypatch):
    two = Ranks(0, 2, torch.device("cpu"))
    monkeypatch.setattr("common.start_ranks", lambda *_: two)
    monkeypatch.setattr("sys.argv", ["gcl.py", *arguments(given, tmp_path / "run")])
    with pytest.raises(UserError, match="without torchrun"):
        gcl.main()
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_holds_memory_labels_and_three_optimisers(plain):
    state = load_checkpoint(plain / "last.pt")
    assert {"model", "optimizer", "for_d", "for_id", "step", "report"} == set(state)
    assert (state["model"]["labels"] >= 0).any() and state["step"] == 6
    norms = state["model"]["memory"].norm(dim=1)
    assert torch.allclose(norms, torch.ones_like(norms), atol=1e-5)
