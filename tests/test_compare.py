"""experiments/: intervals against published t values and loops, the parts of data sets, and a
comparison from its command line that is killed, goes on, and has a failing cell.
"""

import csv
import importlib
import json
import math
import re
import shlex
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from coco_sets import write_set
from conftest import ROOT, run_script
from PIL import Image
from safetensors.torch import save_file

from formats.coco import read_people
from formats.market import read_data
from plumbing.config import read_config
from plumbing.errors import UserError

sys.path.append(str(ROOT / "experiments"))
import compare  # noqa: E402
import tables  # noqa: E402

# Two-sided 95 % points of Student's t, from any printed table: degrees of freedom → t.
STUDENT = {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262}


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_the_interval_is_that_of_printed_tables(n):
    values = np.random.default_rng(n).normal(0.4, 0.05, n)
    mean, low, high = tables.interval(values)
    spread = math.sqrt(sum((v - sum(values) / n) ** 2 for v in values) / (n - 1))
    assert mean == pytest.approx(sum(values) / n)
    for end, sign in ((low, -1), (high, 1)):
        assert end == pytest.approx(mean + sign * STUDENT[n - 1] * spread / math.sqrt(n), abs=1e-4)


def test_one_seed_has_no_interval_and_equal_seeds_an_empty_one():
    assert tables.interval([0.3]) == (0.3, None, None)
    assert tables.interval([0.25, 0.25, 0.25]) == (0.25, 0.25, 0.25)


def test_differences_are_paired_over_the_seeds_that_both_have():
    values = {"A": {0: 0.5, 1: 0.7, 2: 0.9}, "B": {0: 0.4, 1: 0.61, 3: 0.1}, "C": {}}
    found = tables.summary(values, "A")
    assert set(found) == {"A", "B"} and "difference" not in found["A"]
    difference = found["B"]["difference"]
    assert difference["seeds"] == [0, 1] and difference["mean"] == pytest.approx(-0.095)
    assert difference["high"] - difference["mean"] == pytest.approx(12.706 * 0.005, rel=1e-3)
    assert tables.cell(difference, sign=True) == "-9.5 [-15.9, -3.1]"
    assert found["A"]["mean"] == pytest.approx(0.7)


def test_a_figure_of_fewer_seeds_says_so():
    values = {"A": {0: 0.5, 1: 0.7, 2: 0.9}, "B": {0: 0.4, 1: 0.6}, "C": {0: 0.2}}
    rows = tables.summary(values, "A")
    sums = tables.contrasts(values, {"gap": [(1, "A"), (-1, "B")]})
    column = dict(table="real", task="reid", metric="mAP", rows=rows, contrasts=sums)
    cost = dict.fromkeys(("pictures", "views", "parameters", "seconds", "cut", "rate"))
    result = dict(methods=dict.fromkeys("ABC", cost), reference="A", columns=[column])
    lines = tables.markdown(result | dict(seeds=[0, 1, 2], jobs=1, failed={})).splitlines()
    assert "Percent; mean of 3 of 3 seeds [95 % t-interval]." in lines
    marks = [(line[2], "(2 seeds)" in line, "(1 seed)" in line) for line in lines if "|" in line]
    assert marks.count(("A", False, False)) == 2  # its means and its costs
    assert marks.count(("B", True, False)) == marks.count(("C", False, True)) == 2
    assert marks.count(("g", True, False)) == 1


def test_sums_of_methods_are_taken_seed_by_seed():
    values = {"A": {0: 0.5, 1: 0.7, 2: 0.9}, "B": {0: 0.4, 1: 0.61, 3: 0.1}, "C": {0: 0.2, 1: 0.2}}
    sums = {"gap": [(1, "A"), (-1, "B"), (1, "C")], "none": [(1, "A"), (-1, "unknown")]}
    found = tables.contrasts(values, sums)
    assert set(found) == {"gap"} and set(found["gap"]["values"]) == {0, 1}
    assert found["gap"]["mean"] == pytest.approx(0.295)  # .5 − .4 + .2 = .3 and .7 − .61 + .2 = .29
    assert found["gap"]["high"] - 0.295 == pytest.approx(12.706 * 0.005, rel=1e-3)
    # A sum of one method and its negative is the paired difference of the other table.
    two = tables.contrasts(values, {"B - A": [(1, "B"), (-1, "A")]})["B - A"]
    difference = tables.summary(values, "A")["B"]["difference"]
    assert [two[k] for k in ("mean", "low", "high")] == [
        pytest.approx(difference[k]) for k in ("mean", "low", "high")
    ]


def finished(folder, **figures):
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(figures))
    (folder / "done").touch()


def test_the_rate_is_the_best_on_all_validation_tasks_together(tmp_path):
    rows = [compare.Row("", "one", "", ["mAP"]), compare.Row("", "two", "", ["mA"])]
    for lr, one, two in ((0.001, 0.9, 0.1), (0.002, 0.6, 0.6), (0.004, 0.0, 0.9)):
        finished(tmp_path / "select/one/M" / f"lr_{lr:g}", mAP=one)
        finished(tmp_path / "select/two/M" / f"lr_{lr:g}", mA=two)
    (tmp_path / "select/two/M/lr_0.004/done").unlink()  # failed: it cannot be chosen
    work = SimpleNamespace(out=tmp_path, failed={})
    found = compare.choose(work, compare.Method("M", "x {lr}"), [0.001, 0.002, 0.004], rows)
    assert found["rate"] == 0.002 and found["scores"] == {0.001: 0.5, 0.002: pytest.approx(0.6)}
    found = compare.choose(work, compare.Method("N", "x {lr}"), [0.001, 0.002], rows)
    assert found["rate"] is None and "methods/N" in work.failed


@pytest.mark.parametrize(
    "script, more, views",
    [
        ("pretrain", dict(views=1), 20),
        ("pretrain", dict(views=2), 40),
        ("baselines.gcl", {}, 20),
        ("baselines.vicreg", {}, 20),
        ("baselines.liftedcl", {}, 40),
        # Two whole crops and four quarters; one and two.
        ("baselines.solider", dict(local_crops=4, local_height=32, local_width=16), 60),
        ("baselines.synclr", dict(local_crops=2, local_height=32, local_width=16), 30),
    ],
)
def test_small_crops_count_by_their_area(script, more, views, tmp_path):
    keys = importlib.import_module(script).KEYS  # a run's config holds all of them
    config = {name: key.default for name, key in keys.items()}
    config |= dict(batch=10, height=64, width=32) | more
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, tmp_path / "encoder.safetensors")
    assert tables.cost_of(tmp_path) == dict(pictures=20, views=views, parameters=22)


@pytest.mark.parametrize("size", ["quick", "small", "gpu", "claims", "choices"])
def test_every_row_of_our_comparisons_has_keys_its_script_takes(size, monkeypatch):
    monkeypatch.chdir(ROOT)
    cfg = read_config(compare.KEYS, "", ["--cfg", f"configs/compare_{size}.yaml"])
    methods, select, tasks = compare.check(cfg)
    sets = [command for _, command in compare.rows_of(cfg.sets, 2)]
    for command in [*sets, *(row.command for row in (*methods, *select, *tasks))]:
        if command:
            filled = compare.filled(cfg, command, lr=1e-3, encoder="x", seed=0)
            script, *words = shlex.split(filled)
            stage = importlib.import_module(script.removesuffix(".py").replace("/", "."))
            keys = read_config(stage.KEYS, "", [*words, "out=x"])
            if script.startswith(("pretrain", "baselines")):
                stage.check(keys)


def test_seconds_of_a_cell_that_was_cut_off(tmp_path):
    lines = [{"folder": "a"}, {"folder": "a"}, {"folder": "a", "seconds": 5.0}]
    lines += [{"folder": "b"}, {"folder": "b", "seconds": 2.5}]
    text = "\n".join(map(json.dumps, lines)) + '\n{"folder": "b'  # the disk was full
    (tmp_path / "times.jsonl").write_text(text)
    found = tables.seconds_of(tmp_path / "times.jsonl")
    assert found == {"a": (5.0, True), "b": (2.5, False)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"methods": ["A | pretrain.py blr={lr}"]}, "rates= is empty"),
        ({"methods": ["A | pretrain.py x={what}"]}, "{what} in row"),
        ({"methods": ["A | no.py"]}, "no script no.py"),
        ({"methods": ["A", "A"]}, "once only"),
        ({"tasks": ["real | a | probe.py"]}, "needs 4 parts"),
        ({"reference": "B"}, "none of the methods A"),
        ({"methods": ["A | pretrain.py {lr}"], "rates": [1.0, 2.0]}, "need a select row"),
        ({"contrasts": ["gap | A - B"]}, "they are A"),
        ({"contrasts": ["gap | A A"]}, "no sum of methods"),
        ({"contrasts": ["gap | A -"]}, "no sum of methods"),
        (
            {"methods": ['A | pretrain.py "annotations=x']},
            "as a command line.*No closing quotation",
        ),
        ({"tasks": ["real | a | experiments/probe.py | "]}, "metrics, seeds= must name"),
    ],
)
def test_rows_that_cannot_be_run_are_refused(change, words):
    good = dict(sets=[], methods=["A"], select=[], rates=[], seeds=[0], reference="A", out="x")
    good |= dict(contrasts=["none | A - A"])
    good |= dict(lspet="l", market="m", coco="c", tasks=["real | a | experiments/probe.py | mAP"])
    compare.check(SimpleNamespace(**good))
    with pytest.raises(UserError, match=words):
        compare.check(SimpleNamespace(**(good | change)))


def test_seeds_of_two_machines_join_to_the_table_of_one(tmp_path, monkeypatch):
    """One runs seeds 0 and 1; another seed 0, and a third seed 1 with the table of that one."""
    ran = []

    def pretended(work, cell):
        seed, words = int(cell.command.rsplit("=", 1)[1]), cell.command.split()
        lr = float(words[1].split("=")[1]) if words[0] == "pretrain.py" else None
        ran.append((lr, seed))
        if lr:
            work.note(str(cell.folder.relative_to(work.out)), seconds=1.0)
            cell.folder.mkdir(parents=True)
            save_file({"w": torch.zeros(1)}, cell.folder / "encoder.safetensors")
            (cell.folder / "log.jsonl").write_text('{"step": 5}')
            (cell.folder / "config.yaml").write_text("batch: 4")
            (cell.folder / "done").touch()
            return
        lr = re.search(r"lr_([\d.]+)", cell.command)
        finished(cell.folder, mAP=float(lr[1] if lr else 0) * 10 + seed / 10)

    monkeypatch.setattr(compare.Work, "run_cell", pretended)
    rows = ["methods=scratch,A | pretrain.py blr={lr}", "reference=scratch", "rates=0.01,0.02"]
    rows += ["select=val | finetune_reid.py encoder={encoder} | mAP"]
    rows += ["tasks=real | reid | finetune_reid.py encoder={encoder} | mAP"]

    def table(name, *words):
        out = tmp_path / name
        monkeypatch.setattr(sys, "argv", ["compare.py", *rows, f"out={out}", *words])
        compare.main()
        return json.loads((out / "table.json").read_text())

    whole, first = table("both", "seeds=0,1"), table("one", "seeds=0")
    ran.clear()
    joined = table("two", "seeds=1", f"earlier={tmp_path}/one/table.json")
    assert {seed for _, seed in ran} == {1} and {lr for lr, _ in ran} == {None, 0.02}
    assert joined["columns"] == whole["columns"] != first["columns"]
    assert joined["seeds"] == [0, 1] and joined["methods"]["A"]["scores"] == {
        "0.01": 0.1,
        "0.02": 0.2,
    }
    assert joined["columns"][0]["rows"]["A"]["values"] == {"0": 0.2, "1": pytest.approx(0.3)}
    for words, why in (
        (["seeds=0"], "seed 0 of earlier"),
        (["seeds=1", "tasks=real | reid | finetune_reid.py epochs=2 | mAP"], "has other tasks"),
    ):
        with pytest.raises(UserError, match=why):
            table("three", *words, f"earlier={tmp_path}/one/table.json")
    first["methods"]["A"]["rate"] = 0.01
    (tmp_path / "other.json").write_text(json.dumps(first).replace('"0":', '"7":'))
    with pytest.raises(UserError, match=r"other\.json has other rates than"):
        table("three", "seeds=2", f"earlier={tmp_path}/one/table.json,{tmp_path}/other.json")
    assert not (tmp_path / "three").exists()


def test_folders_may_have_spaces_and_quotes():
    cfg = SimpleNamespace(out="/my runs/o'neil", lspet="l", market="m", coco="c")
    words = shlex.split(compare.filled(cfg, "pretrain.py annotations={out}/a.json,{out}/b.json"))
    assert words == ["pretrain.py", "annotations=/my runs/o'neil/a.json,/my runs/o'neil/b.json"]


def test_only_numbers_of_a_task_are_figures(tmp_path):
    finished(tmp_path / "task", mAP=0.5, read="all", per_joint={"nose": 1.0})
    assert tables.figures_of(tmp_path / "task") == {"mAP": 0.5}


# ------------------------------------------------------------------------------------------- parts


def test_parts_hold_other_people_and_prompts_the_same_words(tmp_path):
    root = tmp_path / "market"
    lines = ["image,hat"]
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        (root / folder).mkdir(parents=True)
    for person in range(1, 9):
        for camera in (1, 2):
            for n in range(2):
                name = f"{person:04d}_c{camera}s1_{n}.jpg"
                Image.new("RGB", (8, 16)).save(root / "bounding_box_train" / name)
                lines.append(f"market/bounding_box_train/{name},{person % 2}")
    (tmp_path / "attributes.csv").write_text("\n".join(lines) + "\n")
    people = write_set(tmp_path / "set", n_poses=8, per_pose=4)
    document = json.loads(people.read_text())
    for i, row in enumerate(document["annotations"]):
        row["attributes"] = {"female": i % 2, "up_red": int(i < 20), "hat": i % 3}
    people.write_text(json.dumps(document))
    words = [f"market={root}", f"attributes={tmp_path}/attributes.csv", f"poses={people}"]
    names = [line.split("/")[-1].split(",")[0] for line in lines[1:]]
    images = [dict(id=i, file_name=f"bounding_box_train/{name}") for i, name in enumerate(names)]
    document = dict(images=images, annotations=[dict(image_id=i) for i in range(len(names))])
    (root / "people.json").write_text(json.dumps(document))
    words += [f"prompts={people}", "group=3", f"people={root}/people.json", f"out={tmp_path}/parts"]
    done = run_script("experiments/parts.py", *words)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "parts"
    train, query, gallery, _ = read_data(out / "market")
    assert len(np.unique(train.ids)) == 6 and len(np.unique(query.ids)) == 2
    assert not set(train.ids) & set(query.ids) and set(query.ids) == set(gallery.ids)
    assert len(train.ids) == 24 and len(query.ids) == 4 and len(gallery.ids) == 4
    for part, ids in (("train", train.ids), ("val", query.ids)):
        with open(out / f"attributes_{part}.csv", newline="") as file:
            head, *rows = csv.reader(file)
        assert head == ["image", "hat"]
        assert {int(row[0].rsplit("/", 1)[1][:4]) for row in rows} == set(ids.tolist())
    left = json.loads((out / "people/train.json").read_text())
    assert len(left["images"]) == len(left["annotations"]) == 24
    for image in left["images"]:
        assert int(Path(image["file_name"]).name[:4]) in set(train.ids.tolist())
        assert (out / "people/images" / image["file_name"]).exists()
    both = [read_people(out / "poses" / f"{part}.json")[0] for part in ("train", "val")]
    assert [len(p.files) for p in both] == [24, 8]
    assert not set(both[0].files.tolist()) & set(both[1].files.tolist())
    grouped = json.loads((out / "prompts/annotations.json").read_text())["annotations"]
    members = {}
    for row in grouped:
        said = row["attributes"]["female"], row["attributes"]["up_red"]
        members.setdefault(row["pose_id"], []).append(said)
    assert len(members.pop(-1)) == 2  # 10 = 3·3 + 1 twice; 6 = 2·3 twice
    assert len(members) == 10 and all(len(m) == 3 and len(set(m)) == 1 for m in members.values())
    assert (
        len(read_people(out / "prompts/annotations.json")[0].files) == 32
    )  # its pictures are found


# -------------------------------------------------------------------------------- the whole command


def signalled(words, run, number):
    """compare.py, sent a signal once `run`, a cell of it, has a checkpoint. → its exit code"""
    process = run_script("experiments/compare.py", *words, start_only=True)
    end = time.time() + 200
    while not (run / "last.pt").exists() and time.time() < end and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    process.wait()
    process.stderr.close()
    return process.returncode


def test_a_comparison_that_is_asked_to_stop_stops_its_cells(tmp_path):
    train, out = write_set(tmp_path / "train", n_poses=8), tmp_path / "out"
    row = f"HAP | pretrain.py annotations={train} size=tiny height=64 width=32 patch=8 batch=12"
    row += " gamma_mp=0 epochs=500 warmup_epochs=1 workers=0 save_every=1 device=cpu"
    config = tmp_path / "compare.yaml"
    task = "real | probe | experiments/probe.py encoders={encoder} | oks_cls"
    config.write_text(f"methods:\n  - {row}\ntasks:\n  - {task}\nreference: HAP\n")
    words = ["--cfg", config, f"out={out}", "seeds=0", "jobs=2"]
    run = out / "methods/HAP/one_rate/seed_0"
    assert signalled(words, run, signal.SIGTERM) == 130
    assert "is saved; the same command goes on" in run.with_suffix(".log").read_text()
    assert "seconds" not in (out / "times.jsonl").read_text() and not (run / "done").exists()


def test_a_comparison_is_killed_goes_on_and_names_what_failed(tmp_path, monkeypatch):
    train, held = write_set(tmp_path / "train", n_poses=8), write_set(tmp_path / "held", n_poses=5)
    small = f"annotations={train} size=tiny height=64 width=32 patch=8 pictures_per_pose=3 batch=12"
    small += " warmup_epochs=0.5 workers=0 save_every=1 device=cpu"
    probe = f"experiments/probe.py encoders={{encoder}} size=tiny height=64 width=32 poses={held}"
    lines = ["methods:", "  - scratch", f"  - GenPoCCL | pretrain.py {small} epochs=20"]
    lines += [f"  - broken | pretrain.py {small} epochs=1 annotations={tmp_path}/nothing.json"]
    metrics = "oks_cls_held oks_cls_hold"  # the second is a slip of the pen
    lines += ["tasks:", f"  - puppet | probe | {probe} workers=0 patch=8 | {metrics}"]
    config, out = tmp_path / "compare.yaml", tmp_path / "out"
    config.write_text("\n".join(lines) + "\n")
    words = ["--cfg", config, f"out={out}", "seeds=0", "jobs=2"]

    run = out / "methods/GenPoCCL/one_rate/seed_0"
    assert signalled(words, run, signal.SIGKILL) == -signal.SIGKILL
    log = (run / "log.jsonl").read_text()
    assert log and not (run / "done").exists() and not (out / "table.json").exists()

    done = run_script("experiments/compare.py", *words)
    assert done.returncode == 0, done.stderr
    assert "continues after step" in run.with_suffix(".log").read_text()  # of the script itself
    table = json.loads((out / "table.json").read_text())
    column, misnamed = table["columns"]
    assert not misnamed["rows"]
    assert "no cell has a figure oks_cls_hold; there are" in table["failed"]["tasks/probe"]
    assert set(column["rows"]) == {"scratch", "GenPoCCL"}
    assert "nothing.json" in table["failed"]["methods/broken/one_rate/seed_0"]
    assert "its encoder is missing" in table["failed"]["tasks/probe/broken/one_rate/seed_0"]
    assert "failed: methods/broken" in done.stderr
    cost = table["methods"]["GenPoCCL"]
    assert cost["pictures"] == 20 * 2 * 12 and cost["views"] == 2 * cost["pictures"] and cost["cut"]
    own = json.loads((out / "tasks/probe/GenPoCCL/one_rate/seed_0/probe.json").read_text())
    encoder = next(v for k, v in own.items() if k not in ("chance", "best possible"))
    assert column["rows"]["GenPoCCL"]["values"] == {"0": encoder["oks_cls_held"]}
    text = (out / "table.md").read_text()
    assert "| GenPoCCL | " in text and "Failed, not counted" in text and "or more" in text
    assert (out / "table.png").stat().st_size > 0

    # Nothing that is done runs again; a changed row does not keep old figures.
    before = (out / "times.jsonl").read_text()
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, words)])
    config.write_text("\n".join(line for line in lines if "broken" not in line) + "\n")
    compare.main()
    assert (out / "times.jsonl").read_text() == before

    # The tables are written after each seed.
    seen, report = [], compare.report
    words += ["seeds=0,1", "methods=scratch", "reference=scratch"]
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, words)])
    with monkeypatch.context() as patch:
        cell = out / "tasks/probe/scratch/one_rate/seed_1/done"
        patch.setattr(compare, "report", lambda *a: seen.append(cell.exists()) or report(*a))
        compare.main()
    assert seen == [False, True]
    assert list(json.loads((out / "table.json").read_text())["columns"][0]["rows"]) == ["scratch"]
    monkeypatch.setattr(sys, "argv", sys.argv[:-3])
    config.write_text(config.read_text().replace("epochs=20", "epochs=21"))
    with pytest.raises(UserError, match="was started by another command"):
        compare.main()
