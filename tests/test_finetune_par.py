"""Attributes: metrics against plain loops and scikit-learn, the loss against a loop, readers of the
official files, averaged weights, training that learns, ranks, resume after a kill, prediction, and
errors in one line.
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
from sklearn.metrics import balanced_accuracy_score, jaccard_score, precision_score, recall_score

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


def slow_metrics(p, y):
    """The reference definitions as loops in float64."""
    n, a = p.shape
    ma, acc, prec, rec = [], [], [], []
    for j in range(a):
        tp = sum(p[i, j] > 0.5 and y[i, j] == 1 for i in range(n))
        tn = sum(p[i, j] <= 0.5 and y[i, j] == 0 for i in range(n))
        pos, neg = sum(y[i, j] == 1 for i in range(n)), sum(y[i, j] == 0 for i in range(n))
        ma.append(((tp / pos if pos else 0) + (tn / neg if neg else 0)) / 2)
    for i in range(n):
        yes, true = {j for j in range(a) if p[i, j] > 0.5}, {j for j in range(a) if y[i, j] == 1}
        acc.append(len(yes & true) / len(yes | true) if yes | true else 0)
        prec.append(len(yes & true) / len(yes) if yes else 0)
        rec.append(len(yes & true) / len(true) if true else 0)
    P, R = np.mean(prec), np.mean(rec)
    f1 = 2 * P * R / (P + R) if P + R else 0
    return dict(mA=np.mean(ma), accuracy=np.mean(acc), precision=P, recall=R, f1=f1)


@pytest.mark.parametrize("seed", range(4))
def test_metrics_equal_loops_with_lonely_attributes_and_empty_pictures(seed):
    rng = np.random.default_rng(seed)
    p, y = rng.random((23, 6)), (rng.random((23, 6)) < 0.3).astype(int)
    y[:, 0], y[5], p[5], p[6, 2] = 0, 0, 0.1, 0.5
    y[:, 1] = 1
    y[5, 1] = 2  # unknown: picture 5 says nothing and nothing is true of it
    got = attribute_metrics(p, y)
    for name, value in slow_metrics(p, y).items():
        assert got[name] == pytest.approx(value, abs=1e-12), name
    assert not got["both"][:2].any()
    assert got["mA_both"] == pytest.approx(got["attribute_mA"][got["both"]].mean())
    assert all(np.isfinite(v).all() for v in got.values())
    as_tensors = attribute_metrics(torch.from_numpy(p), torch.from_numpy(y))
    assert as_tensors["mA"] == got["mA"] and as_tensors["f1"] == got["f1"]


def test_metrics_equal_scikit_learn():
    rng = np.random.default_rng(9)
    p, y = rng.random((60, 5)), (rng.random((60, 5)) < 0.5).astype(int)
    yes, got = (p > 0.5).astype(int), attribute_metrics(p, y)
    each = [balanced_accuracy_score(y[:, j], yes[:, j]) for j in range(5)]
    assert got["mA"] == pytest.approx(np.mean(each))
    scores = dict(accuracy=jaccard_score, precision=precision_score, recall=recall_score)
    for name, score in scores.items():
        assert got[name] == pytest.approx(score(y, yes, average="samples", zero_division=0)), name


def test_metrics_by_hand():
    p = np.array([[0.9, 0.2], [0.6, 0.7]])
    y = np.array([[1, 0], [0, 1]])
    # attribute 0: TPR 1, TNR 0; attribute 1: both 1. Pictures: {0} vs {0}; {0, 1} vs {1}.
    got = attribute_metrics(p, y)
    assert (got["mA"], got["accuracy"], got["precision"], got["recall"]) == (0.75, 0.75, 0.75, 1.0)
    assert got["f1"] == pytest.approx(6 / 7)
    with pytest.raises(UserError, match="two equal tables"):
        attribute_metrics(p, y[:1])
    with pytest.raises(UserError, match="not a number"):
        attribute_metrics(p * np.nan, y)
    p[0, 1] = 0.5 + 1e-12  # yes in float64, no in float32
    tensors = torch.from_numpy(p), torch.from_numpy(y)
    assert attribute_metrics(*tensors)["accuracy"] == attribute_metrics(p, y)["accuracy"]
    assert attribute_metrics(tensors[0].bfloat16(), tensors[1])["accuracy"] == 0.75


def test_loss_equals_a_loop_and_its_gradient():
    rng = np.random.default_rng(1)
    logits = torch.tensor(rng.normal(size=(5, 4)), dtype=torch.float32, requires_grad=True)
    labels, ratio = torch.tensor(rng.integers(0, 2, (5, 4))), torch.tensor([0.0, 1.0, 0.3, 0.8])
    total, slope = 0.0, np.zeros((5, 4))
    for i in range(5):
        for j in range(4):
            z, y, r = logits[i, j].item(), labels[i, j].item(), ratio[j].item()
            w, s = np.exp(y * (1 - r) + (1 - y) * r), 1 / (1 + np.exp(-z))
            total -= w * (np.log(s) if y else np.log(1 - s)) / 5
            slope[i, j] = w * (s - y) / 5
    loss = weighted_bce(logits, labels, ratio)
    loss.backward()
    assert loss.item() == pytest.approx(total, rel=1e-5)
    np.testing.assert_allclose(logits.grad.numpy(), slope, atol=1e-6)


def cell(items):
    out = np.empty((len(items), 1), object)
    out[:, 0] = items
    return out


def config(**more):
    defaults = {name: key.default for name, key in finetune_par.KEYS.items()}
    return type("Config", (), defaults | more)


def blank(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (4, 8)).save(folder / name)


def test_readers_of_official_files(tmp_path):
    rng = np.random.default_rng(0)

    # PA-100K
    data, names = {"attributes": cell(["Female", "Hat"])}, {}
    for kind, n in (("train", 3), ("val", 2), ("test", 2)):
        names[kind] = [f"{kind}{i}.jpg" for i in range(n)]
        data[f"{kind}_images_name"] = cell(names[kind])
        data[f"{kind}_label"] = rng.integers(0, 2, (n, 2)).astype(np.uint8)
        blank(tmp_path / "pa" / "data", names[kind])
    savemat(tmp_path / "pa" / "annotation.mat", data)
    cfg = config(dataset="pa100k", annotation=tmp_path / "pa" / "annotation.mat", trainval=True)
    found, splits, report = read_attributes(cfg)
    assert found == ["Female", "Hat"] and "3 train, 2 val, 2 test" in report
    assert len(splits["train"].files) == 5
    both = np.concatenate([data["train_label"], data["val_label"]])
    np.testing.assert_array_equal(splits["train"].labels, both)
    assert splits["test"].files[1].endswith("test1.jpg")

    # PETA: four id columns, 105 attributes of which 35 count, 1-based splits
    labels = rng.integers(0, 2, (6, 105))
    part = [{"train": [[1 + k], [2]], "val": [[3]], "test": [[4], [5], [6]]} for k in range(2)]
    peta = {
        "data": np.concatenate([np.arange(24).reshape(6, 4), labels], 1).astype(np.uint16),
        "attribute": cell([f"a{i}" for i in range(105)]),
        "selected_attribute": np.arange(1, 36)[None],
        "partion_attribute": cell(part),
    }
    blank(tmp_path / "peta" / "images", [f"{i:05d}.png" for i in range(1, 7)])
    savemat(tmp_path / "peta" / "PETA.mat", {"peta": peta})
    cfg = config(dataset="peta", annotation=tmp_path / "peta" / "PETA.mat", split=1)
    found, splits, _ = read_attributes(cfg)
    assert found == [f"a{i}" for i in range(35)]
    assert [os.path.basename(f) for f in splits["train"].files] == ["00002.png", "00002.png"]
    np.testing.assert_array_equal(splits["test"].labels, labels[3:, :35])

    # RAP v2: fields by name, selected attributes
    labels, files = rng.integers(0, 3, (5, 8)), [f"p{i}.png" for i in range(5)]
    part = [{"train_index": [[1, 2]], "val_index": [[3]], "test_index": [[4, 5]]}] * 5
    rap = {"name": cell(files), "data": labels, "attribute": cell([f"b{i}" for i in range(8)])}
    rap |= {"selected_attribute": np.array([[2, 4, 8]]), "partition_attribute": cell(part)}
    blank(tmp_path / "rap" / "RAP_dataset", files)
    path = tmp_path / "rap" / "RAP_annotation.mat"
    savemat(path, {"RAP_annotation": rap})
    rap_v2 = config(dataset="rap", annotation=path, split=4)
    found, splits, report = read_attributes(rap_v2)
    assert found == ["b1", "b3", "b7"]
    uncertain = int((labels[:, [1, 3, 7]] == 2).sum())
    assert uncertain and f"; {uncertain} uncertain labels taken as 0" in report
    for kind, rows in (("train", [0, 1]), ("test", [3, 4])):
        np.testing.assert_array_equal(splits[kind].labels, labels[rows][:, [1, 3, 7]] == 1)
    labels[4, 3] = 3
    savemat(path, {"RAP_annotation": rap})
    with pytest.raises(UserError, match="labels of value 3.0 in test; 0, 1 and 2"):
        read_attributes(rap_v2)
    for name in files[:3]:  # to evaluate, the test pictures are enough
        (tmp_path / "rap" / "RAP_dataset" / name).unlink()
    labels[4, 3] = 1
    savemat(path, {"RAP_annotation": rap})
    test_only = config(dataset="rap", annotation=path, eval_only=True, select="val", trainval=True)
    assert [*read_attributes(test_only)[1]] == ["test"]
    blank(tmp_path / "rap" / "RAP_dataset", files)

    # RAP v1: fields by place, train + test only, 92 attributes of which 51 count
    labels = rng.integers(0, 2, (5, 92))
    part = [{"trainval": [[1, 3]], "test": [[2, 4, 5]]}] * 5
    v1 = {"partion": cell(part), "label": labels, "attribute_chn": cell(["?"] * 92)}
    v1 |= {"attribute_eng": cell([f"c{i}" for i in range(92)]), "position": labels}
    v1 |= {"imagesname": cell(files)}
    savemat(path, {"RAP_annotation": v1})
    found, splits, _ = read_attributes(config(dataset="rap", annotation=path))
    assert len(found) == 51 and not splits["val"].files
    np.testing.assert_array_equal(splits["test"].labels, labels[[1, 3, 4], :51])


def test_bad_annotation_is_one_clear_line(tmp_path, people):
    data = {"attributes": cell(["a", "b"])}
    for kind in ("train", "val", "test"):
        data |= {f"{kind}_images_name": cell(["x.jpg", "y.jpg"]), f"{kind}_label": np.zeros((3, 2))}
    path = tmp_path / "annotation.mat"
    savemat(path, data)
    csvs = {"train": people["train"], "test": people["test"]}
    for more, message in (
        ({"dataset": "pa100k", "annotation": path}, r"labels of shape \(3, 2\) for 2 train pict"),
        ({"dataset": "peta", "annotation": path}, "as PETA's annotation: KeyError 'peta'"),
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
        ("", "must start with"),
        ("image,red\n", "a split is empty"),
    ):
        bad.write_text(text)
        with pytest.raises(UserError, match=message):
            read_attributes(config(train=str(bad), test=str(bad)))


def test_a_mat_of_another_layout_is_one_clear_line(tmp_path):
    path = tmp_path / "annotation.mat"
    part = cell([{"train": [[1]], "val": [[2]], "test": [[3]]}] * 2)
    rap = {"name": cell(["a", "b"]), "data": np.eye(2), "attribute": cell(["x", "y"])}
    rap |= {"selected_attribute": [[1, 2]]}
    zero = cell([{"train_index": [[0]], "val_index": [[1]], "test_index": [[2]]}] * 2)
    for dataset, document in (
        ("peta", {"peta": dict(data=np.arange(9), names=cell(["a"]), selected=1, partition=part)}),
        ("peta", {"peta": dict(data=np.eye(40), names=cell(["a"]), selected=1, partition=7)}),
        ("rap", {"RAP_annotation": {f"field{i}": i for i in range(6)}}),
        ("rap", {"RAP_annotation": rap | {"partition_attribute": [1, 2, 3]}}),
        ("rap", {"RAP_annotation": rap | {"selected_attribute": 9, "partition_attribute": part}}),
        ("rap", {"RAP_annotation": rap | {"selected_attribute": 0, "partition_attribute": part}}),
        ("rap", {"RAP_annotation": rap | {"partition_attribute": zero}}),  # numbers are from 1
    ):
        savemat(path, document)
        kind = f"{dataset.upper()}'s annotation"
        with pytest.raises(UserError, match=f"annotation.mat as {kind}: \\w+Error ") as caught:
            read_attributes(config(dataset=dataset, annotation=path))
        assert "\n" not in str(caught.value)
    whole = path.read_bytes()
    for size in (0, 60, 200, len(whole) - 9):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cannot read .* as a .mat file"):
            read_attributes(config(dataset="rap", annotation=path))


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
