"""finetune_par.py as a whole: averaged weights, training that learns, ranks, resume after a kill,
prediction, and errors in one line.
"""

import csv
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, kill_after, run_script
from PIL import Image, ImageDraw
from scipy.io import savemat
from test_attribute_formats import cell, config

import finetune_par
from common import EpochBatches, Ranks, UserError, load_checkpoint
from drawing import results as sheets
from finetune_par import attribute_metrics, weighted_bce
from formats.attributes import read_attributes

TINY = ["size=tiny", "patch=8", "height=32", "width=16", "pad=2", "log_every=1"]
MACHINE = ["precision=fp32", "workers=0", "device=cpu"]
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}


def write_people(folder, kind, n, seed=0):
    """n pictures of one colour with CSV of red, dark, always and never (there)."""
    rng = np.random.default_rng(seed)
    (folder / kind).mkdir(parents=True, exist_ok=True)
    rows = [["image", "red", "dark", "always", "never"]]
    for i in range(n):
        red, dark = int(rng.random() < 0.5), int(rng.random() < 0.4)
        pixels = rng.normal(COLOURS["red" if red else "blue"], 12, (32, 16, 3))
        pixels = pixels * (0.35 if dark else 1)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / kind / f"{i}.png")
        rows.append([f"{kind}/{i}.png", red, dark, 1, 0])
    with open(folder / f"{kind}.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(folder / f"{kind}.csv")


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    folder = tmp_path_factory.mktemp("people")
    counts = {"train": 24, "val": 9, "test": 7}
    return {kind: write_people(folder, kind, n, n) for kind, n in counts.items()}


def args(people, out, *more, kinds=("train", "test")):
    return [*(f"{k}={people[k]}" for k in kinds), f"out={out}", *TINY, *MACHINE, *more]


def run(monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["finetune_par.py", *map(str, arguments)])
    finetune_par.main()


def test_bad_annotation_is_one_clear_line(tmp_path, people):
    data = {"attributes": cell(["a", "b"])}
    for kind in ("train", "val", "test"):
        data |= {f"{kind}_images_name": cell(["x.jpg", "y.jpg"]), f"{kind}_label": np.zeros((3, 2))}
    path = tmp_path / "annotation.mat"
    savemat(path, data)
    csvs = {"train": people["train"], "test": people["test"]}
    for more, message in (
        ({"dataset": "pa100k", "annotation": path}, r"labels of shape \(3, 2\) for 2 train pict"),
        ({"dataset": "peta", "annotation": path}, "as PETA's annotation: 'peta' is missing"),
        ({"dataset": "pa100k", "annotation": tmp_path / "none.mat"}, "cannot read"),
        ({"dataset": "pa100k", "annotation": people["train"]}, "cannot read .* as a .mat file"),
        (csvs | {"images": str(tmp_path)}, "is missing .*set images="),
        (csvs | {"select": "val"}, "no validation pictures"),
    ):
        with pytest.raises(UserError, match=message):
            read_attributes(config(**more))
    bad = tmp_path / "bad.csv"
    for text, message in (
        ("image,red\na.png,2\n", "line 2"),
        ("image,red\na.png\n", "line 2"),
        ("image,red\n\na.png,1\na.png,²\n", "line 4"),
        ("red\n1\n", "must start with"),
        ("image,red,red\na.png,1,1\n", "names an attribute twice, or one not at all: red, red"),
        ("image,red,\na.png,1,1\n", "names an attribute twice, or one not at all"),
        ("", "must start with"),
        ("image,red\n", "a split is empty"),
    ):
        bad.write_text(text)
        with pytest.raises(UserError, match=message):
            read_attributes(config(train=str(bad), test=str(bad)))


@pytest.mark.parametrize("kind", ["train", "test"])
def test_a_damaged_picture_is_found_before_training(people, tmp_path, monkeypatch, kind):
    name = f"{kind}/3.png"
    shutil.copytree(os.path.dirname(people["train"]), tmp_path / "set")
    (tmp_path / "set" / name).write_bytes((tmp_path / "set" / name).read_bytes()[:200])
    copies = {kind: tmp_path / "set" / f"{kind}.csv" for kind in people}
    with pytest.raises(UserError, match=rf"{name} is damaged or truncated .*mend or remove it"):
        run(monkeypatch, args(copies, tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_average_is_the_stated_recursion():
    model = torch.nn.Linear(2, 1)
    run_ = finetune_par.Run(model, config())
    expected = model.weight.detach().double().clone()
    for step in range(30):
        with torch.no_grad():
            model.weight += 1.0
        run_.average(config(ema=0.7), step)
        d = min(0.7, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * model.weight.detach().double()
    torch.testing.assert_close(run_.ema.weight.double(), expected, rtol=1e-5, atol=1e-5)
    run_.average(config(ema=1.0, ema_warmup=False), 0)
    torch.testing.assert_close(run_.ema.weight.double(), expected, rtol=1e-5, atol=1e-5)


def test_weights_decay_everywhere_and_without_an_average_the_last_ones_count():
    """As HAP trains: BN_WD, so no parameter is spared; ema=0 on PETA and RAP."""
    cfg = config(size="tiny", patch=8, height=32, width=16, ema=0.0, weight_decay=0.5)
    model, _ = finetune_par.build_model(cfg, list("ab"))
    run_ = finetune_par.Run(model, cfg)
    for group in run_.optimizer.param_groups:
        group["lr"] = 0.1
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    run_.optimizer.step()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {"encoder.cls_token", "encoder.norm.weight", "head.bias"} <= set(trained)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if name in trained else 1))
    run_.average(cfg, 0)
    average = run_.ema.state_dict()
    assert all(torch.equal(average[name], value) for name, value in model.state_dict().items())


def test_epoch_batches_cover_an_epoch_and_ranks_share_them():
    alone, cpu = Ranks(0, 1, torch.device("cpu")), torch.device("cpu")
    steps = list(EpochBatches(11, 4, 3, alone).steps(0, 4))
    whole = [set(map(tuple, b)) for b in steps]
    two = [EpochBatches(11, 4, 3, Ranks(rank, 2, cpu)) for rank in range(2)]
    halves = [[set(map(tuple, b)) for b in batches.steps(0, 4)] for batches in two]
    assert [a | b for a, b in zip(*halves)] == whole and all(len(b) == 4 for b in whole)
    assert not whole[0] & whole[1]
    assert list(EpochBatches(11, 4, 3, alone).steps(3, 4)) == steps[3:]
    with pytest.raises(UserError, match="batch=4 does not split over 3 ranks"):
        EpochBatches(11, 4, 3, Ranks(0, 3, cpu))
    with pytest.raises(UserError, match="larger than the 11 training samples"):
        EpochBatches(11, 12, 3, alone)


def test_one_batch_is_overfitted():
    torch.manual_seed(0)
    cfg = config(size="tiny", patch=8, height=32, width=16)
    model, _ = finetune_par.build_model(cfg, list("abc"))
    images, labels = torch.randn(8, 3, 32, 16), torch.randint(0, 2, (8, 3))
    optimizer, ratio = torch.optim.AdamW(model.parameters(), 1e-3), (labels == 1).float().mean(0)
    for _ in range(30):
        optimizer.zero_grad()
        loss = weighted_bce(model(images), labels, ratio)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    assert attribute_metrics(model(images).sigmoid(), labels)["mA"] == 1.0


def test_training_learns_selects_on_validation_and_predicts(people, tmp_path, monkeypatch, capfd):
    more = ("select=val", "epochs=6", "batch=8", "lr=1.0e-3", "ema=0.5")
    run(monkeypatch, args(people, tmp_path / "a", *more, kinds=("train", "val", "test")))
    printed = capfd.readouterr()
    said = printed.err + printed.out
    assert "never positive in train: never" in said and "never negative in test: always" in said
    assert "one class only in test" in said and "reported epoch" in said
    got = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert got["pictures"] == 7 and got["mA_both"] > 0.9
    assert got["one_class_only"] == ["always", "never"]
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert len([line for line in lines if "val_mA" in line]) == 6
    best = max(line["val_mA"] for line in lines if "val_mA" in line)
    assert load_checkpoint(tmp_path / "a" / "last.pt")["best"] == pytest.approx(best, rel=1e-5)
    names = "attributes.csv attributes.png examples.png curves.png encoder.safetensors done"
    for name in names.split():
        assert (tmp_path / "a" / name).exists(), name

    # the written model gives the same figures again, and sentences for a folder
    weights = f"weights={tmp_path / 'a' / 'model.safetensors'}"
    capfd.readouterr()
    test = [f"test={people['test']}", "select=val", f"out={tmp_path / 'b'}", *MACHINE]
    run(monkeypatch, [weights, "eval_only=true", *test])  # no training file is needed
    for name in ("metrics.json", "attributes.csv"):
        assert (tmp_path / "b" / name).read_text() == (tmp_path / "a" / name).read_text(), name
    assert not (tmp_path / "b" / "log.jsonl").exists()  # it has no steps
    said = capfd.readouterr().err
    assert "model.safetensors, which sets size=tiny (not base), patch=8 (not 16)" in said
    folder = os.path.splitext(people["test"])[0]
    run(monkeypatch, [weights, f"predict={folder}", f"out={tmp_path / 'c'}", *MACHINE])
    rows = list(csv.DictReader(open(tmp_path / "c" / "predictions.csv")))
    truth = {row["image"].split("/")[1]: row for row in csv.DictReader(open(people["test"]))}
    assert len(rows) == 7 and list(rows[0]) == ["image", "red", "dark", "always", "never"]
    right = 0
    for row in rows:
        for a in ("red", "dark"):
            right += (float(row[a]) > 0.5) == (truth[row["image"]][a] == "1")
    assert right >= 13

    # a single picture; without out= nothing is put into the training's folder
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(f"out: {tmp_path / 'a'}\n")
    capfd.readouterr()
    picture = f"predict={folder}/{rows[2]['image']}"
    run(monkeypatch, ["--cfg", tmp_path / "mine.yaml", weights, picture, *MACHINE])
    assert list(csv.DictReader(open("runs/par_predict/predictions.csv"))) == rows[2:3]
    assert "which sets size=tiny (not base)" in capfd.readouterr().err

    mine = tmp_path / "mine"
    bad = {b"cut.png": "cut.png is damaged or truncated", b"\xff.png": "is not UTF-8; rename"}
    for name, message in bad.items():
        shutil.rmtree(mine, ignore_errors=True)
        mine.mkdir()
        with open(os.path.join(os.fsencode(mine), name), "wb") as file:
            file.write(b"\x89PNG")
        with pytest.raises(UserError, match=message):
            run(monkeypatch, [weights, f"predict={mine}", f"out={tmp_path / 'x'}", *MACHINE])
        assert not (tmp_path / "x").exists()

    # the fine-tuned encoder starts another run, with another token, size and grid
    encoder = f"encoder={tmp_path / 'a' / 'encoder.safetensors'}"
    more = (encoder, "token=both", "epochs=1", "batch=8", "height=48", "size=base")
    run(monkeypatch, args(people, tmp_path / "d", *more))
    assert load_checkpoint(tmp_path / "d" / "model.safetensors")["head.weight"].shape == (4, 384)


def test_a_sheet_without_truth_calls_guesses_guesses(tmp_path, monkeypatch):
    drawn, text = [], ImageDraw.ImageDraw.text

    def spy(draw, xy, words, *rest, **more):
        drawn.append(words)
        text(draw, xy, words, *rest, **more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", spy)
    picture, p = Image.new("RGB", (16, 32)), np.array([[0.9, 0.4]])
    sheets.attribute_sheet([picture], ["hat", "bag"], p, None, tmp_path / "a.png")
    assert "guessed" in drawn and any(t.startswith("Guessed attributes") for t in drawn)
    assert not {"true", "right", "wrong"} & set(" ".join(drawn).split())
    drawn.clear()
    sheets.attribute_sheet([picture], ["hat", "bag"], p, np.array([[1, 1]]), tmp_path / "b.png")
    assert {"right (1)", "wrong (1)"} <= set(drawn) and not any("uess" in t for t in drawn)


def test_an_attribute_of_one_class_has_no_bar_and_comes_last(tmp_path, monkeypatch):
    drawn = []

    class Kept(sheets.Figure):
        def __init__(self, *size, **style):
            super().__init__(*size, **style)
            drawn.append(self)

    monkeypatch.setattr(sheets, "Figure", Kept)
    names, test = ["always", "hat", "bag"], [1.0, 0.5, 0.25]
    sheets.attribute_chart(names, [0.5] * 3, test, [0.5, 0.4, 0.9], tmp_path / "a.png")
    (axis, *_) = drawn[0].axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["bag", "hat", "always"]
    labels = [text.get_text() for text in axis.texts]
    assert labels == ["90.0", "40.0", "one class in test"]
    assert [round(bar.get_width(), 6) for bar in axis.patches] == [40, -10, 0]


def test_settings_that_do_not_fit_are_refused(people, tmp_path, monkeypatch):
    for more, message in (
        (["batch=99"], "larger than the 24 training samples"),
        (["trainval=true", "select=val"], "not trained on"),
        (["eval_only=true"], "need each other"),
        (["weights=x.safetensors"], "encoder="),
        (["eval_only=true", f"weights={people['train']}"], "no model.safetensors"),
        (["dataset=peta"], "needs annotation="),
        ([f"predict={tmp_path}/absent", "weights=x"], "no folder|holds no pictures"),
    ):
        with pytest.raises(UserError, match=message):
            run(monkeypatch, args(people, tmp_path / "x", *more))
    assert not (tmp_path / "x").exists()
    result = run_script("finetune_par.py", *args(people, tmp_path / "x"), "eopchs=3")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "epochs" in result.stderr


def test_resume_after_a_kill_is_bitwise(people, tmp_path, monkeypatch):
    more = ("epochs=4", "batch=4", "save_every=1")
    run(monkeypatch, args(people, tmp_path / "whole", *more))
    command = args(people, tmp_path / "cut", *more)
    assert kill_after("finetune_par.py", *command, lines=4, log=tmp_path / "cut" / "log.jsonl")
    assert not (tmp_path / "cut" / "done").exists()
    assert load_checkpoint(tmp_path / "cut" / "last.pt")["step"] < 24
    run(monkeypatch, command)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for name in ("attributes.csv", "metrics.json", "model.safetensors"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name
    lines = (cut / "log.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == list(range(1, 25))


RANKS = """
import sys, torch
sys.path.insert(0, {root!r})
import finetune_par
from common import start_ranks
from plumbing.seeds import rank_rows
from torch.nn.parallel import DistributedDataParallel

ranks = start_ranks("cpu")
model, images, labels, ratio = torch.load({start!r}, weights_only=False)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
runner = DistributedDataParallel(model)
images, labels = rank_rows(images, ranks), rank_rows(labels, ranks)
finetune_par.weighted_bce(runner(images), labels, ratio).backward()
optimizer.step()
if ranks.rank == 0:
    torch.save(model.state_dict(), {end!r})
finetune_par.main()
"""


def test_two_ranks_equal_one_process_and_count_each_picture_once(people, tmp_path, monkeypatch):
    torch.manual_seed(3)
    cfg = config(size="tiny", patch=8, height=32, width=16)
    model, _ = finetune_par.build_model(cfg, list("abcd"))
    images, labels = torch.randn(6, 3, 32, 16), torch.randint(0, 2, (6, 4))
    ratio = (labels == 1).float().mean(0)
    torch.save((model, images, labels, ratio), tmp_path / "start.pt")
    script, files = tmp_path / "ranks.py", dict(start=str(tmp_path / "start.pt"))
    files |= dict(end=str(tmp_path / "end.pt"))
    script.write_text(RANKS.format(root=str(ROOT), **files))
    more = ("epochs=1", "batch=6", "lr=1.0e-4")
    result = run_script(script, *args(people, tmp_path / "two", *more), ranks=2)
    assert result.returncode == 0, result.stderr

    before = {name: value.clone() for name, value in model.state_dict().items()}
    weighted_bce(model(images), labels, ratio).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    moved = torch.load(tmp_path / "end.pt")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(moved[name], value, rtol=1e-4, atol=1e-6)
    assert any((value - before[name]).abs().max() > 1e-3 for name, value in moved.items())

    run(monkeypatch, args(people, tmp_path / "one", *more))
    found = [json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("one", "two")]
    one, two = found
    assert one["pictures"] == two["pictures"] == 7 and one["mA"] == pytest.approx(two["mA"])
    a, b = (load_checkpoint(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all((a[name] - b[name]).abs().max() < 2e-5 for name in a)
