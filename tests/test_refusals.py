"""One way to refuse: whatever a user's file holds, a reader ends with a result or with one line.

Hundreds of mutations of a good file for each reader, in this process: none may raise anything but
UserError, take ten seconds, or write a file.
"""

import json
import math
import random
import shutil

import numpy as np
import pytest
import torch
import yaml
from coco_sets import write_set
from mutations import TEXTS, in_ten_seconds, listing, mutated, spoilt_bytes, unusual_paths
from PIL import Image
from safetensors.torch import save_file

import finetune_par
import finetune_pose
import finetune_reid
import finetune_t2i
import generate
import pretrain
from experiments.tables import say_failed
from formats.attributes import read_attributes
from formats.captions import read_bert, read_captions
from formats.coco import Limits, read_people
from formats.keypoints import pictures_of, read_boxes, read_pose_file, read_truth
from formats.market import read_data
from formats.weights import encoder_meta, load_pretrained, meta_of
from model import SIZES, ViT
from plumbing import pictures
from plumbing.config import read_config, read_yaml
from plumbing.errors import UserError
from plumbing.files import load_checkpoint, load_weights, read_json, read_mat


@pytest.fixture
def attack(tmp_path):
    """attack(read, path, n): n mutations of the file at `path`, written over it. → refusals."""

    def run(read, path, n, document=None, dump=json.dumps):
        content, rng, refusals = path.read_bytes(), random.Random(0), 0
        before = listing(tmp_path)
        for i in range(n):
            spoilt = content
            if document is None or i % 5 == 0:
                spoilt = spoilt_bytes(content, rng)
            else:
                spoilt = dump(mutated(document, rng)).encode("utf-8", "surrogatepass")
            path.write_bytes(spoilt)
            refusals += in_ten_seconds(read, path) is not None
        for text in TEXTS:
            path.write_bytes(text)
            refusals += in_ten_seconds(read, path) is not None
        path.write_bytes(content)
        assert listing(tmp_path) == before
        return refusals

    return run


def read_all_people(path):
    people, _ = read_people(path, limits=Limits(check_pictures=False, max_bad_boxes=3))
    assert len(people.files) and np.isfinite(people.keypoints).all()
    assert (people.boxes[:, 2:] > 0).all()


def test_coco_files(tmp_path, attack):
    path = write_set(tmp_path, n_poses=2, per_pose=2)
    refused = attack(read_all_people, path, 400, json.loads(path.read_text()))
    assert refused > 100


def pictures_in(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 64), (90, 120, 200)).save(folder / name)


def test_detections(tmp_path, attack):
    truth = write_set(tmp_path / "set", n_poses=2, per_pose=2)
    people, notes, document = read_truth(truth)[:3]
    boxes = [
        {"image_id": i, "bbox": [1, 2, 20, 40], "score": 0.5, "category_id": 1} for i in (0, 3)
    ]
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(boxes))

    def read(path):
        found, score, _ = read_boxes(path, pictures_of(document, []), people, Limits())
        assert np.isfinite(score).all() and (found.boxes[:, 2:] > 0).all()

    assert in_ten_seconds(read, path) is None
    assert attack(read, path, 200, boxes) > 60


def test_lists_of_mpii(tmp_path, attack):
    pictures_in(tmp_path, ["images/a.jpg", "images/b.jpg"])
    joints = np.random.default_rng(0).integers(2, 30, (16, 2)).tolist()
    row = {"center": [16, 32], "scale": 0.3, "joints": joints, "joints_vis": [1] * 16}
    rows = [row | {"image": f"{name}.jpg"} for name in "ab"]
    path = tmp_path / "train.json"
    path.write_text(json.dumps(rows))

    def read(path):
        people = read_pose_file(path)[0]
        assert np.isfinite(people.keypoints).all() and np.isfinite(people.boxes).all()

    assert in_ten_seconds(read, path) is None
    assert attack(read, path, 200, rows) > 60


def test_captions(tmp_path, attack):
    pictures_in(tmp_path, ["imgs/a.jpg", "imgs/b.jpg"])
    rows = []
    for split in ("train", "val", "test"):
        for person, name in ((1, "a"), (2, "b")):
            texts = ["a person in red", "someone walks"]
            rows.append(
                {"split": split, "file_path": f"{name}.jpg", "captions": texts, "id": person}
            )
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(rows))
    assert in_ten_seconds(read_captions, path) is None
    assert attack(read_captions, path, 200, rows) > 60


def test_lists_of_msmt17(tmp_path, attack):
    names = ["0000/0000_000_01_0303morning_0015_0.jpg", "0001/0001_000_02_0303noon_0015_0.jpg"]
    names.append("0000/0000_001_03_0303noon_0015_0.jpg")
    for folder in ("train", "test"):
        pictures_in(tmp_path, [f"{folder}/{name}" for name in names])
    lines = "".join(f"{name} {name[3]}\n" for name in names)
    for name in ("train", "val", "query", "gallery"):
        (tmp_path / f"list_{name}.txt").write_text(lines)

    def read(path):
        read_data(tmp_path)

    assert in_ten_seconds(read, tmp_path) is None
    attack(read, tmp_path / "list_query.txt", 150)


def test_names_of_market(tmp_path):
    folders = ("bounding_box_train", "query", "bounding_box_test")
    for folder in folders:
        pictures_in(
            tmp_path / folder, [f"000{i}_c{c}s1_000451_03.jpg" for i in (1, 2) for c in "12"]
        )
    assert in_ten_seconds(read_data, tmp_path) is None
    odd = ["0001.jpg", "x.jpg", "9" * 40 + "_c1s1_1_1.jpg", "0001_c99999999999999s1_1_1.jpg"]
    odd += [
        "-1_c1s1_1_1.jpg",
        "0001_cxs1_1_1.jpg",
        "٣_c1s1_1_1.jpg",
        "0001_c1s1 1.jpg",
        "\ud800.jpg",
    ]
    odd += ["0001_c1s1_1_1.JPG", " 0001_c1s1_1_1.jpg", "0001_c0s0_0_0.jpg"]
    for name in odd:
        if name == "\ud800.jpg":
            name = b"\xff.jpg".decode("utf-8", "surrogateescape")
        (tmp_path / "query" / name).write_bytes(b"")
        assert in_ten_seconds(read_data, tmp_path), name
        (tmp_path / "query" / name).unlink()


def test_attributes_in_csv_files(tmp_path, attack):
    pictures_in(tmp_path, ["a.jpg", "b.jpg"])
    text = "image,hat,bag\na.jpg,0,1\nb.jpg,1,0\n"
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text(text)
    keys = [f"train={tmp_path}/train.csv", f"test={tmp_path}/test.csv"]
    cfg = read_config(finetune_par.KEYS, "", keys)

    def read(path):
        read_attributes(cfg)

    assert in_ten_seconds(read, tmp_path) is None
    assert attack(read, tmp_path / "train.csv", 200) > 60


def test_prompts_and_captions_of_pictures(tmp_path, attack):
    captions = {"annotations": [{"id": i, "image_id": i, "caption": "a man"} for i in range(3)]}
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(captions))
    cfg = read_config(generate.KEYS, "", [f"captions={path}", "prompt_template=a {big|small} dog"])

    def read(path):
        prompts = generate.read_prompts(cfg, [0, 1, 2])
        assert all(isinstance(text, str) for text in prompts.values())

    assert in_ten_seconds(read, path) is None
    assert attack(read, path, 150, captions) > 40


def test_folders_of_bert(tiny_bert, tmp_path, attack):
    shutil.copytree(tiny_bert, tmp_path / "bert")

    def read(path):
        read_bert(str(tmp_path / "bert"))

    assert in_ten_seconds(read, tmp_path) is None
    for name in ("config.json", "vocab.txt", "model.safetensors"):
        if (tmp_path / "bert" / name).exists():
            attack(read, tmp_path / "bert" / name, 8)


STAGES = [pretrain, generate, finetune_pose, finetune_reid, finetune_par, finetune_t2i]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
def test_configs(stage, tmp_path, attack):
    path = tmp_path / "x.yaml"
    values = {name: key.default for name, key in stage.KEYS.items()}
    path.write_text(yaml.safe_dump(values))

    def read(path):
        read_config(stage.KEYS, "", ["--cfg", str(path)])

    def dump(document):
        return json.dumps(document)  # YAML reads JSON

    assert attack(read, path, 150, values, dump) > 70
    assert attack(read_yaml, path, 20, values, dump) > 10


WORDS = ["=", "batch", "batch=", "=3", "batch=1e400", "batch=[1]", "out=\0", "shares=a,b", "--cfg"]
WORDS += ["annotations=[", "views=3", "blr=" + "9" * 5000, "seed=-1", "decoder=maybe", "--cfg=/"]
WORDS += ["shares=" + "[" * 5000, "seed=" + "[" * 5000, "batch={a: 1}", "views=2.5", "out=a=b"]


def test_command_lines():
    for word in WORDS:
        if word != "--cfg":  # argparse says that itself, and ends the process with 2
            said = in_ten_seconds(read_config, pretrain.KEYS, "", [word])
            assert (said is None) == (word in ("out=\0", "out=a=b", "annotations=[")), word


def test_whole_numbers_are_decimal():
    """YAML 1.1 reads 010 as 8 and 1:30 as 90: on the command line nobody means that."""
    given = ["seed=010", "batch=1e3", "views=+2", "shares=010,2", "workers=2.0"]
    cfg = read_config(pretrain.KEYS, "", given)
    assert (cfg.seed, cfg.batch, cfg.views, cfg.shares, cfg.workers) == (10, 1000, 2, [10, 2], 2)
    assert read_config(pretrain.KEYS, "", [f"seed={2**62 + 1}"]).seed == 2**62 + 1  # no float holds
    for word in ("seed=1:30", "seed=0x10", "seed=1.5", "seed=²", "seed=true"):
        with pytest.raises(UserError, match="key seed .* must be a whole number"):
            read_config(pretrain.KEYS, "", [word])


def test_a_tilde_is_the_home_folder_in_a_yaml_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.yaml").write_text("out: ~/run\nannotations: [~/a.json, b~/c.json]\n")
    cfg = read_config(pretrain.KEYS, "", ["--cfg", str(tmp_path / "x.yaml"), "resume_from=~/old"])
    assert (cfg.out, cfg.resume_from) == (f"{tmp_path}/run", f"{tmp_path}/old")
    assert cfg.annotations == [f"{tmp_path}/a.json", "b~/c.json"]


def test_pictures(tmp_path, attack):
    look = np.kron(np.random.default_rng(0).integers(0, 255, (4, 4, 3)), np.ones((8, 8, 1)))
    for name in ("a.jpg", "a.png", "a.webp", "a.bmp", "a.gif"):
        path = tmp_path / name
        Image.fromarray(look.astype(np.uint8)).save(path)

        def read(path):
            pictures.picture_fault(path)
            pictures.load_picture(path.parent, path.name)

        attack(read, path, 60)


def tiny():
    s = SIZES["tiny"]
    torch.manual_seed(0)
    return ViT(s["width"], 1, s["heads"], (32, 16), 16)


def test_weights(tmp_path, attack):
    vit = tiny()
    meta = {"encoder": json.dumps({"size": "tiny", "height": "32", "width_px": "16"})}
    save_file(vit.state_dict(), tmp_path / "a.safetensors", meta)
    torch.save({"model": vit.state_dict()}, tmp_path / "a.pth")

    def read(path):
        state = load_checkpoint(path)
        encoder_meta(path)
        load_pretrained(tiny(), state, path)
        load_weights(tiny(), state, path)

    for name in ("a.safetensors", "a.pth"):
        assert attack(read, tmp_path / name, 60) > 40


def sparse(x):
    return x.to_sparse()


def with_nan(x):
    return x.clone().index_fill_(0, torch.tensor([0]), math.nan)


ODD = {"sparse": sparse, "complex": lambda x: x.to(torch.complex64), "NaN": with_nan}
ODD |= {"text": lambda x: "x", "none": lambda x: None, "list": lambda x: x.tolist()}
ODD |= {"scalar": lambda x: torch.zeros(()), "empty": lambda x: x[:0], "bool": lambda x: x > 0}


@pytest.mark.parametrize("name", ODD)
def test_weights_that_are_no_finite_real_numbers(name, tmp_path):
    for place in ("norm.weight", "blocks.0.attn.qkv.weight", "cls_token", "pos_embed"):
        vit, path = tiny(), tmp_path / "x.pth"
        torch.save(vit.state_dict() | {place: ODD[name](vit.state_dict()[place])}, path)
        state = load_checkpoint(path)
        before = {n: v.clone() for n, v in vit.state_dict().items()}
        refused = in_ten_seconds(load_weights, vit, state, path)
        assert refused or name == "bool"
        assert in_ten_seconds(load_pretrained, vit, state, path) or name == "bool"
        if name != "bool":
            assert all(torch.equal(v, before[n]) for n, v in vit.state_dict().items())


def test_what_is_no_regular_file(tmp_path):
    def look(path):
        fault = pictures.picture_fault(path)
        assert fault
        pictures.load_picture(path.parent, path.name)

    vit = tiny()
    readers = [read_all_people, read_yaml, read_json, load_checkpoint, look]
    readers += [
        read_mat,
        encoder_meta,
        lambda path: load_pretrained(vit, load_checkpoint(path), path),
    ]
    for path in unusual_paths(tmp_path):
        for read in readers:
            said = in_ten_seconds(read, path)
            assert said or read in (encoder_meta,) or path.name == "empty", (path.name, read)


def test_mat_files_that_crash_their_reader(tmp_path):
    """Every read is a process of its own, so these are few."""
    import scipy.io

    path = tmp_path / "x.mat"
    scipy.io.savemat(path, {"a": {"b": np.arange(50.0)}, "c": np.array(["x", "yy"], object)})
    assert read_mat(path)["a"]["b"].tolist() == list(range(50))
    content, rng = path.read_bytes(), random.Random(0)
    for _ in range(8):
        path.write_bytes(spoilt_bytes(content, rng))
        in_ten_seconds(read_mat, path)


def test_saved_metadata_is_what_is_read(tmp_path):
    vit = tiny()
    assert {"size", "width", "depth", "heads"} <= set(meta_of(ViT(192, 6, 3, (32, 16), 16)))
    with pytest.raises(StopIteration):
        meta_of(vit)  # a depth that no size has is a defect of ours, not a user's


def test_a_comparison_without_any_figure_ends_with_an_error(capsys):
    """An exit code of 0 would tell a script that there is a table to read."""
    column = dict(rows={"HAP": dict(mean=0.5)})
    say_failed({}, [dict(rows={})])
    say_failed({"tasks/reid": "it ended with 2"}, [column, dict(rows={})])
    assert capsys.readouterr().err == "failed: tasks/reid: it ended with 2\n"
    with pytest.raises(UserError, match="no cell gave a figure: 1 failed"):
        say_failed({"tasks/reid": "it ended with 2"}, [dict(rows={})])
