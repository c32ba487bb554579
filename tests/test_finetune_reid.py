"""finetune_reid.py as a whole, and its triplet loss: one process, three ranks, kills, evaluation,
prediction, refusals.
"""

import json
import os
import shutil

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, kill_after, run_script
from PIL import Image
from reid_runs import ALONE, CPU, MACHINE, PLAIN, SMALL, paint, rows, stage

import common
import finetune_reid
import losses
from common import Ranks, UserError, layer_of, load_checkpoint, save_weights
from finetune_reid import triplet_loss
from formats.market import read_data
from formats.weights import encoder_meta
from tasks import ranking


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """An uninterrupted run in one process: 3 epochs of 2 steps."""
    out = tmp_path_factory.mktemp("plain") / "run"
    stage(f"data={data}", f"out={out}", *PLAIN)
    return out


# ------------------------------------------------------------------------------------------ triplet


LABELS = torch.tensor([0, 0, 1, 2, 2, 1, 3, 3, 1])  # person 1 is on all of 3 ranks


def batch():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(9, 5, generator=g, dtype=torch.float64)
    x[1] = x[0]  # the same picture twice: distance 0, no NaN in the gradient
    return x


def loop_triplet(x, label):
    total = 0.0
    for i in range(len(x)):
        d = [(x[i] - x[j]).square().sum().clamp(min=1e-24).sqrt() for j in range(len(x))]
        same = [d[j] for j in range(len(x)) if label[j] == label[i] and j != i]
        other = [d[j] for j in range(len(x)) if label[j] != label[i]]
        far, near = max(same, key=torch.Tensor.item), min(other, key=torch.Tensor.item)
        total = total + torch.log(1 + torch.exp(far - near))
    return total / len(x)


def gradient_of(loss, x, label):
    layer = torch.nn.Linear(5, 5, bias=False).double()
    torch.nn.init.eye_(layer.weight)
    value = loss(layer(x), label)
    value.backward()
    return value.detach(), layer.weight.grad


def test_triplet_against_a_loop():
    value, gradient = gradient_of(triplet_loss, batch(), LABELS)
    want_value, want_gradient = gradient_of(loop_triplet, batch(), LABELS)
    torch.testing.assert_close(value, want_value, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-10, atol=1e-12)
    half = triplet_loss(batch().bfloat16(), LABELS)
    assert half.dtype == torch.float32


def wrong_gather(x):
    return losses.gather_rows_of(x)


def on_a_rank(rank, world, path):
    """Called in each process of RANKS: value and gradient as DistributedDataParallel would leave
    them.
    """
    own = slice(rank * 9 // world, (rank + 1) * 9 // world)
    found, right = {}, ranking.gather_with_gradient
    for gather in (losses.gather_with_gradient, wrong_gather):
        ranking.gather_with_gradient = gather
        found[gather.__name__] = gradient_of(triplet_loss, batch()[own], LABELS[own])
        for tensor in found[gather.__name__]:
            dist.all_reduce(tensor)
            tensor /= world
    ranking.gather_with_gradient = right
    if rank == 0:
        torch.save(found, path)


RANKS = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import finetune_reid, test_finetune_reid
from common import start_ranks

ranks = start_ranks("cpu")
test_finetune_reid.on_a_rank(ranks.rank, ranks.world, {found!r})
finetune_reid.main()
"""


@pytest.fixture(scope="module")
def three_ranks(data, tmp_path_factory):
    """One launch of three ranks: the triplet loss alone, then the run of `plain`. → its folder's
    parent.
    """
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "ranks.py").write_text(RANKS.format(root=str(ROOT), found=str(folder / "found.pt")))
    command = [f"data={data}", f"out={folder}/run", *PLAIN]
    done = run_script(folder / "ranks.py", *command, ranks=3)
    assert done.returncode == 0, done.stderr
    return folder


def test_triplet_on_three_ranks_is_that_of_one_process(three_ranks):
    found = torch.load(three_ranks / "found.pt")
    want_value, want_gradient = gradient_of(triplet_loss, batch(), LABELS)
    for name, (value, gradient) in found.items():
        torch.testing.assert_close(value, want_value)
        off = (gradient - want_gradient).abs().max() / want_gradient.abs().max()
        assert off < 1e-12 if name == "gather_with_gradient" else off > 0.01, name


# -------------------------------------------------------------------------------------------- stage


def test_run_folder(plain, capsys):
    names = {"config.yaml", "last.pt", "encoder.safetensors", "model.safetensors"}
    names |= {"log.jsonl", "metrics.json", "ranked_lists.png", "curves.png", "data.json"}
    names |= {"run.json", "done"}
    assert {path.name for path in plain.iterdir()} == names
    log, metrics = rows(plain), json.loads((plain / "metrics.json").read_text())
    steps = [row for row in log if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1)) and len(steps) % 3 == 0
    assert abs(steps[0]["loss"] - (steps[0]["identity"] + steps[0]["triplet"]) / 2) < 1e-4
    assert [row["epoch"] for row in log if "mAP" in row] == [2, 3]
    # the last epoch is the one reported
    assert log[-1]["mAP"] == pytest.approx(metrics["mAP"], rel=1e-5)
    assert (metrics["queries"], metrics["queries_without_match"], metrics["gallery"]) == (7, 2, 17)


def test_killed_and_resumed_is_bitwise_the_same(plain, data, tmp_path):
    out = tmp_path / "run"
    command = [f"data={data}", f"out={out}", *PLAIN]
    assert kill_after("finetune_reid.py", *command, lines=3, log=out / "log.jsonl")
    stage(*command)
    ours, theirs = (load_checkpoint(folder / "last.pt") for folder in (out, plain))
    assert all(torch.equal(value, theirs["model"][name]) for name, value in ours["model"].items())
    assert rows(out) == rows(plain)


def test_a_kill_during_an_evaluation_loses_no_row(plain, data, tmp_path, monkeypatch):
    command = [f"data={data}", f"out={tmp_path / 'run'}", *PLAIN]

    def dies(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune_reid, "evaluate", dies)
        stage(*command)
    stage(*command)
    assert any("epoch" in row for row in rows(plain)) and rows(tmp_path / "run") == rows(plain)


def test_a_kill_before_the_end_doubles_no_row(plain, data, tmp_path):
    """Between the last line of the log and `done`."""
    shutil.copytree(plain, tmp_path / "run")
    (tmp_path / "run" / "done").unlink()
    (tmp_path / "run" / "config.yaml").write_text(
        (plain / "config.yaml").read_text().replace(str(plain), str(tmp_path / "run"))
    )
    stage(f"data={data}", f"out={tmp_path / 'run'}", *PLAIN)
    assert rows(tmp_path / "run") == rows(plain)


def test_three_ranks_train_the_same_and_count_each_picture_once(plain, three_ranks):
    out = three_ranks / "run"
    for ours, theirs in zip(rows(out), rows(plain), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-4)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics == pytest.approx(json.loads((plain / "metrics.json").read_text()))


def test_three_ranks_embed_each_picture_once(data, monkeypatch):
    """The three ranks' parts of an odd number of pictures, one after the other, are what one
    process makes.
    """
    words = [f"data={data}", *SMALL, "eval_batch=4"]
    cfg = finetune_reid.read_config(finetune_reid.KEYS, "", words)
    model, _ = finetune_reid.build_model(cfg, 9)
    _, query, gallery, _ = read_data(data)
    for part in (query, gallery):
        whole = finetune_reid.embed(cfg, model, part, ALONE)
        monkeypatch.setattr(common, "gather_objects", list)
        three = [Ranks(rank, 3, CPU) for rank in range(3)]
        shares = [finetune_reid.embed(cfg, model, part, ranks) for ranks in three]
        monkeypatch.undo()
        assert len({len(share) for share in shares}) == 2  # uneven
        np.testing.assert_allclose(np.concatenate(shares), whole, atol=1e-5)


def test_junk_takes_no_part_in_re_ranking(data, monkeypatch):
    _, query, gallery, _ = read_data(data)
    rng = np.random.default_rng(0)
    features = {id(query): rng.normal(size=(len(query.ids), 8)).astype(np.float32)}
    features[id(gallery)] = rng.normal(size=(len(gallery.ids), 8)).astype(np.float32)
    monkeypatch.setattr(finetune_reid, "embed", lambda c, m, split, r: features[id(split)])
    cfg = finetune_reid.read_config(finetune_reid.KEYS, "", ["rerank=true"])
    without = finetune_reid.evaluate(cfg, None, query, gallery, Ranks(0, 1, CPU))["reranked"]
    copies = np.repeat(features[id(query)], 3, 0)  # parts of the searched people
    n = len(copies)
    more = gallery._replace(
        ids=np.concatenate([gallery.ids, np.full(n, -1)]),
        cameras=np.concatenate([gallery.cameras, np.resize(gallery.cameras, n)]),
    )
    features[id(more)] = np.concatenate([features[id(gallery)], copies])
    result = finetune_reid.evaluate(cfg, None, query, more, Ranks(0, 1, CPU))
    assert result["reranked"]["mAP"] == without["mAP"]


def test_rank_0_ranks_with_the_threads_of_all(data, monkeypatch):
    """The other ranks wait; NCCL's would give up in the middle of a large gallery."""
    _, query, gallery, _ = read_data(data)
    used, before = [], torch.get_num_threads()

    def note(what):
        def ranked(*arguments):
            used.append((what, torch.get_num_threads()))
            return {}

        return ranked

    monkeypatch.setattr(finetune_reid, "embed", lambda c, m, split, r: split.ids)
    monkeypatch.setattr(finetune_reid.ranking, "evaluate_features", note("plain"))
    monkeypatch.setattr(finetune_reid.ranking, "rank_chunks", note("again"))
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    cfg = finetune_reid.read_config(finetune_reid.KEYS, "", ["rerank=true"])
    torch.set_num_threads(2)
    try:
        for world in (1, 2, 8):
            finetune_reid.evaluate(cfg, None, query, gallery, Ranks(0, world, CPU))
        finetune_reid.evaluate(cfg, None, query, gallery, Ranks(1, 8, CPU))
        assert used == [(what, n) for n in (2, 4, 6) for what in ("plain", "again")]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_finished_runs_are_left_alone(plain, data, capsys):
    before = (plain / "last.pt").stat().st_mtime_ns
    stage(f"data={data}", f"out={plain}", *PLAIN)
    assert "finished already" in capsys.readouterr().out
    assert (plain / "last.pt").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="another config .*epochs 3 -> 4"):
        stage(f"data={data}", f"out={plain}", *SMALL, "epochs=4", "save_every=2", "eval_every=2")


@pytest.mark.parametrize(("token", "bnneck"), [("pose", "true"), ("both", "false")])
def test_overfits_and_finds_everybody(data, tmp_path, token, bnneck):
    """Queries and gallery are the training pictures: every person must be found again."""
    settings = [*SMALL, "query=bounding_box_train", "gallery=bounding_box_train", "erase=0"]
    settings += ["drop_path=0", "lr=2e-3", "epochs=20", f"token={token}", f"bnneck={bnneck}"]
    stage(f"data={data}", f"out={tmp_path}/run", *settings)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["mAP"] > 0.97
    assert metrics["queries_without_match"] == 1  # the person with one picture
    if bnneck == "true":  # a fresh classifier behind the neck knows nothing of 9 people
        assert abs(rows(tmp_path / "run")[0]["identity"] - np.log(9)) < 0.05


def test_eval_only_and_predict(plain, data, tmp_path, capsys):
    weights = f"weights={plain}/model.safetensors"
    evaluated = ["eval_only=true", weights, f"data={data}", *MACHINE]
    stage(*evaluated, "train=nowhere", f"out={tmp_path}/eval")
    assert not (tmp_path / "eval" / "log.jsonl").exists()  # it has no steps
    want = json.loads((plain / "metrics.json").read_text())
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text()) == pytest.approx(want)
    stage(*evaluated, f"out={tmp_path}/again", "rerank=true")
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["mAP"] == pytest.approx(want["mAP"]) and 0 <= again["reranked_mAP"] <= 1

    stage(f"predict={data / 'query'}", weights, f"out={tmp_path}/mine", *MACHINE)
    assert "7 pictures x 192" in capsys.readouterr().out
    found = np.load(tmp_path / "mine" / "embeddings.npz")
    assert found["files"].tolist() == sorted(p.name for p in (data / "query").iterdir())
    np.testing.assert_allclose(np.linalg.norm(found["embeddings"], axis=1), 1, atol=1e-5)
    assert found["nearest"].shape == found["similarity"].shape == (7, 6)
    assert Image.open(tmp_path / "mine" / "nearest.png").width > 300

    one = sorted((data / "query").iterdir())[1]
    stage(f"predict={one}", weights, f"out={tmp_path}/one", *MACHINE, "size=small")
    said = capsys.readouterr()
    assert f"model {plain}/model.safetensors, which sets size=tiny (not small), " in said.err
    assert "(1 pictures x 192)" in said.out and "nearest.png" not in said.out
    alone = np.load(tmp_path / "one" / "embeddings.npz")
    np.testing.assert_allclose(alone["embeddings"], found["embeddings"][1:2], atol=1e-5)
    assert alone["files"].tolist() == [one.name] and alone["nearest"].shape == (1, 0)


def test_bad_input_is_one_line(data, tmp_path, plain):
    run = [*SMALL, f"out={tmp_path}/run"]
    (tmp_path / "empty").mkdir()
    paint(tmp_path / "names" / "my_friend.jpg", 1, 1, np.random.default_rng(0))
    bad_name = os.fsencode(tmp_path / "bytes" / "0001_c1s1_") + b"\xff.jpg"
    paint(tmp_path / "bytes" / "0001_c1s1_000001_00.jpg", 1, 1, np.random.default_rng(0))
    (tmp_path / "bytes" / "0001_c1s1_000001_00.jpg").rename(os.fsdecode(bad_name))
    model = f"weights={plain}/model.safetensors"
    broken = "0001_c1s1_000001_00.jpg is damaged or truncated"
    evaluated, less = [f"data={data}", "eval_only=true"], f"weights={tmp_path}/less.safetensors"
    matchless = "no query of .*query has a match by another camera in .*query"
    paint(tmp_path / "long" / f"{'9' * 20}_c1.jpg", 1, 1, np.random.default_rng(0))
    meta = encoder_meta(plain / "model.safetensors")
    del meta["token"]
    save_weights(tmp_path / "less.safetensors", torch.nn.Linear(1, 1), **meta)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "0001_c1s1_000001_00.jpg").write_bytes(b"\xff\xd8\xff")
    cases = [
        ([], "data= names no folder"),
        (["data=/nowhere"], "no folder /nowhere; check data="),
        ([f"data={tmp_path}"], "no folder .*bounding_box_train"),
        ([f"data={data}", f"query={tmp_path}/empty"], "empty holds no pictures"),
        ([f"data={data}", f"query={tmp_path}/names"], "my_friend.jpg: no person and camera in"),
        ([f"data={data}", f"query={tmp_path}/long"], "999_c1.jpg: no person and camera in"),
        ([f"data={data}", f"gallery={tmp_path}/broken"], broken),
        ([f"data={data}", f"query={tmp_path}/bytes"], "bytes/0001_c1s1_.*: this name is not UTF-8"),
        ([f"data={data}", f"gallery={data}/query"], matchless),
        ([*evaluated, less], "less.safetensors as a model of finetune_reid.py: .*in its token"),
        ([f"predict={tmp_path}/broken", model], broken),
        ([f"predict={tmp_path}/bytes", model], "bytes/0001_c1s1_.*: this name is not UTF-8"),
        ([f"data={data}", "people=10"], "people=10 different people; the training set has 9"),
        ([f"data={data}", "token=cls", "tokn=cls"], "nearest valid key: token"),
        (evaluated, "need each other"),
        ([*evaluated, f"weights={plain}/encoder.safetensors"], "no model.safetensors of finetune"),
        ([*evaluated, "weights=/nowhere.safetensors"], "nowhere.safetensors"),
        ([f"predict={tmp_path}/empty", model], "empty holds no pictures"),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            stage(*run, *arguments)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()  # nothing half-written
    done = run_script("finetune_reid.py", *run, f"data={data}", f"query={tmp_path}/names")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr


def test_a_loss_that_is_not_finite_stops_and_names_pictures(data, tmp_path):
    message = r"non-finite .* at step \d+ .*_c\ds1_.*lower the learning rate"
    with pytest.raises(UserError, match=message):
        stage(f"data={data}", f"out={tmp_path}/run", *SMALL, "lr=1e30", "epochs=9", "save_every=1")
    saved = load_checkpoint(tmp_path / "run" / "last.pt")
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_layers_for_layer_decay():
    names = {"encoder.pos_embed": 0, "encoder.cls_token": 0, "encoder.patch_embed.proj.bias": 0}
    names |= {"encoder.blocks.0.norm1.weight": 1, "encoder.blocks.11.mlp.fc1.bias": 12}
    names |= {"encoder.norm.bias": 13, "classifier.weight": 13, "blocks.2.norm1.weight": 3}
    names |= {"encoder.shape_token": 0, "decoder.blocks.0.norm1.weight": 13, "head.token": 13}
    assert {name: layer_of(name, 12) for name in names} == names


@pytest.mark.parametrize("name", ["market", "msmt17", "market_small", "demo"])
def test_configs_are_read(name, monkeypatch):
    file = ROOT / f"configs/finetune_reid_{name}.yaml"
    cfg = finetune_reid.read_config(finetune_reid.KEYS, "", ["--cfg", str(file)])
    assert cfg.out.startswith("runs/")
    if name in ("market", "msmt17"):  # [MALE]
        assert (cfg.lr, cfg.layer_decay, cfg.epochs) == (8e-3, 0.4, 100)
        assert cfg.people * cfg.pictures_per_person == 64


def test_real_market_pictures(data_root, tmp_path):
    """One epoch of a very small encoder finds real people better than its untrained weights, whose
    mAP is .024.
    """
    settings = "size=tiny height=64 width=32 patch=16 people=12 pictures_per_person=4 epochs=1"
    settings += " warmup_epochs=0.2 lr=5e-4 layer_decay=0.75 clip_grad=1 bnneck=true pad=2"
    stage(f"data={data_root}/market1501", f"out={tmp_path}/run", *settings.split(), *MACHINE)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["queries"], metrics["gallery"]) == (660, 1942)
    assert metrics["mAP"] > 0.034
    steps = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert np.mean(steps[-3:]) < np.mean(steps[:3]) - 0.2
