"""Official downloads become what the stages read: small folders of the official layouts, and the
real part of them.
"""

import csv
import json
import re
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, check_fields, run_script
from PIL import Image
from scipy.io import savemat

from formats import lspet, market_attributes
from formats.attributes import read_attributes
from formats.keypoints import read_pose_file
from plumbing.errors import UserError

# What the authors' table gives for 1 and 2 (vana77/Market-1501_Attribute, attributes.py), as what
# our 1 means; a bag, a hat and each colour are "no" and "yes".
MEANING = dict(gender="female", hair="long", up="short", down="short", clothes="pants")
COLOURS = [f"up{c}" for c in "black white red purple yellow gray blue green".split()]
COLOURS += [f"down{c}" for c in "black white pink purple yellow gray blue green brown".split()]
FIELDS = [*MEANING, "hat", "backpack", "bag", "handbag", "age", *COLOURS]


def tree(folder):
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in paths}


def command(script):
    """docs/data.md's own line with this script → its arguments."""
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    (line,) = re.findall(rf"^python {script} (.*)$", text, re.M)
    return shlex.split(line)


def main_of(module, monkeypatch, words):
    monkeypatch.setattr("sys.argv", [module.__name__, *map(str, words)])
    module.main()


# ------------------------------------------------------------------------------------ LSP-Extended


@pytest.fixture(scope="module")
def lsp(tmp_path_factory):
    """lspet_dataset.zip, unpacked, of 12 people: one has no joint, one a single one."""
    folder = tmp_path_factory.mktemp("lsp") / "lspet_dataset"
    (folder / "images").mkdir(parents=True)
    rng, n = np.random.default_rng(0), 12
    joints = rng.uniform(5, 25, (14, 3, n))
    joints[:, 2] = rng.random((14, n)) < 0.8
    joints[:, 2, 7], joints[:, 2, 3] = 0, np.arange(14) == 5
    joints[0, :, 0] = -40, 400, 0  # a joint that is not visible may lie anywhere
    for i in range(n):
        Image.new("RGB", (40 + i, 30)).save(folder / f"images/im{i + 1:05d}.jpg")
    savemat(folder / "joints.mat", {"joints": joints})
    (folder / "README.txt").write_text("…")
    return folder, joints


def test_lsp_extended_by_the_documents_command(lsp, tmp_path):
    folder, joints = lsp
    before, words = tree(folder), command("formats/lspet.py")
    assert words == ["folder=lspet_dataset", "out=lspet"]
    words = [f"folder={folder}", f"out={tmp_path}/lspet", "val=4"]
    done = run_script("formats/lspet.py", *words)
    assert done.returncode == 0, done.stderr
    assert f"6 and 4 people in {tmp_path}/lspet/train.json" in done.stdout
    assert "2 left out" in done.stdout and tree(folder) == before
    kept, found = [i for i in range(12) if i not in (3, 7)], []
    for name, numbers in (("train", kept[:6]), ("val", kept[6:])):
        check_fields(tmp_path / f"lspet/{name}.json")
        people, notes = read_pose_file(tmp_path / f"lspet/{name}.json", folder / "images")
        assert [f.decode() for f in people.files] == [f"im{i + 1:05d}.jpg" for i in numbers]
        assert people.joints == lspet.JOINTS and len(people.skeleton) == 15
        for person, box, i in zip(people.keypoints, people.boxes, numbers):
            seen = joints[:, 2, i] > 0
            assert np.array_equal(person[:, 2], 2 * seen)
            assert np.allclose(person[seen, :2], joints[seen, :2, i], atol=1e-3)
            assert (person[seen, :2] >= box[:2]).all() and not person[~seen].any()
            assert (person[seen, :2] <= box[:2] + box[2:]).all()
            found.append(i)
    assert found == kept


def test_the_real_part_of_lsp_extended_comes_out_as_it_is_given(data_root, tmp_path, monkeypatch):
    """Its JSON was made by others: turned back into joints.mat, it comes out again."""
    given = json.loads((data_root / "lspet/train.json").read_text())
    n, folder = 60, tmp_path / "lspet_dataset"
    (folder / "images").mkdir(parents=True)
    joints = np.zeros((14, 3, n))
    for i, row in enumerate(given["annotations"][:n]):
        joints[:, :, i] = np.reshape(row["keypoints"], (14, 3))
        joints[:, 2, i] /= 2
        source = data_root / "lspet/images" / given["images"][i]["file_name"]
        (folder / f"images/im{i + 1:05d}.jpg").symlink_to(source)
    savemat(folder / "joints.mat", {"joints": joints})
    main_of(lspet, monkeypatch, [f"folder={folder}", f"out={tmp_path}/out", "val=1"])
    document = json.loads((tmp_path / "out/train.json").read_text())
    assert document["categories"][0]["keypoints"] == given["categories"][0]["keypoints"]
    for row, theirs in zip(document["annotations"], given["annotations"]):
        assert np.allclose(row["keypoints"], theirs["keypoints"], atol=2e-3)
        assert np.allclose(row["bbox"], theirs["bbox"], atol=0.02)


BAD_LSP = {
    "no folder": ([], "folder= names no folder"),
    "a zip": (["folder={lsp}/README.txt"], "cannot read .*README.txt/joints.mat"),
    "lsp": (["folder={tmp}/lsp"], r"joints are \(3, 14, 20\), not \(14, 3, people\)"),
    "not a number": (["folder={tmp}/nan"], "a visible joint has no place"),
    "no pictures": (["folder={tmp}/bare"], "im00001.jpg"),
    "out in the download": (["folder={lsp}", "out={lsp}/json"], "lies in .* stays as it is"),
    "out is the download": (["folder={lsp}", "out={lsp}"], "choose another out="),
    "all to evaluate": (["folder={lsp}", "val=10"], "val=10 leaves nobody to train on: 10 people"),
    "written already": (["folder={lsp}", "out={tmp}/old"], "train.json is there already"),
}


@pytest.mark.parametrize("name", BAD_LSP)
def test_what_is_no_lsp_extended_is_one_line(lsp, tmp_path, monkeypatch, name):
    folder, joints = lsp
    for copy in ("lsp", "nan", "bare", "old"):
        (tmp_path / copy).mkdir()
    savemat(tmp_path / "lsp/joints.mat", {"joints": np.ones((3, 14, 20))})
    wrong = joints.copy()
    wrong[np.flatnonzero(wrong[:, 2, 1])[0], 0, 1] = np.nan
    savemat(tmp_path / "nan/joints.mat", {"joints": wrong})
    savemat(tmp_path / "bare/joints.mat", {"joints": joints})
    (tmp_path / "old/train.json").write_text("mine")
    before = tree(tmp_path) | tree(folder)
    more, words = BAD_LSP[name]
    more = [word.format(lsp=folder, tmp=tmp_path) for word in more]
    with pytest.raises(UserError, match=words) as error:
        main_of(lspet, monkeypatch, [f"out={tmp_path}/out", *more])
    assert "\n" not in str(error.value) and tree(tmp_path) | tree(folder) == before
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------- Market-1501's attributes


def market_mat(path, people, order=FIELDS):
    """market_attribute.mat of {part: {person: {field: 1 or 2, age: 1 to 4}}}."""
    struct = {}
    for part, table in people.items():
        fields = {name: [float(row[name]) for row in table.values()] for name in order}
        names = np.empty(len(table), object)
        names[:] = [f"{person:04d}" for person in table]
        struct[part] = fields | {"image_index": names}
        order = order[::-1]  # as in copies of the file whose test part has another order
    savemat(path, {"market_attribute": struct})


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    """Market-1501-v15.09.15 with 3 people to train and 2 to test, and its attributes."""
    root = tmp_path_factory.mktemp("market")
    folder, rng = root / "Market-1501-v15.09.15", np.random.default_rng(0)
    pictures = dict(
        bounding_box_train=["0002_c1s1_000451_03", "0002_c2s1_000301_01", "0007_c3s3_077419_03"],
        query=["0001_c1s1_001051_00"],
        bounding_box_test=[
            *("-1_c1s1_000401_03", "0000_c1s1_000151_01", "0001_c2s1_000301_00"),
            *("0003_c1s6_015971_02", "0003_c4s6_015641_04"),
        ],
    )
    for name, files in pictures.items():
        (folder / name).mkdir(parents=True)
        for file in files:
            Image.new("RGB", (64, 128)).save(folder / name / f"{file}.jpg")
        (folder / name / "Thumbs.db").write_bytes(b"as in the download")
    (folder / "readme.txt").write_text("…")
    people = {
        part: {
            person: {f: int(rng.integers(1, 5 if f == "age" else 3)) for f in FIELDS}
            for person in persons
        }
        for part, persons in (("train", [2, 7, 10]), ("test", [1, 3]))
    }
    market_mat(root / "market_attribute.mat", people)
    return root, folder, people


def test_market_attributes_by_the_documents_command(market, tmp_path):
    root, folder, people = market
    before, words = tree(root), command("formats/market_attributes.py")
    words = [word.partition("=")[0] for word in words]
    values = [root / "market_attribute.mat", folder, tmp_path / "out"]
    arguments = [f"{name}={value}" for name, value in zip(words, values, strict=True)]
    done = run_script("formats/market_attributes.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert "30 attributes of 3 and 4 pictures" not in done.stdout  # query and distractors are out
    assert "30 attributes of 3 and 3 pictures" in done.stdout and tree(root) == before

    out = tmp_path / "out"
    keys = dict(train=out / "attributes_train.csv", test=out / "attributes_test.csv", val=None)
    keys |= dict(images=folder, annotation=None, dataset="csv", eval_only=False, select="last")
    names, splits, _ = read_attributes(SimpleNamespace(**keys, trainval=False))
    assert len(names) == 30 and names[-4:] == list(market_attributes.AGES)
    seen = 0
    for part in ("train", "test"):
        for file, row in zip(splits[part].files, splits[part].labels.tolist()):
            found, person = dict(zip(names, row)), int(file.split("/")[-1][:4])
            given = people[part][person]
            for name in FIELDS:
                if name == "age":
                    years = [found[age] for age in market_attributes.AGES]
                    assert years == [given["age"] == k for k in (1, 2, 3, 4)]
                else:
                    assert found[name] == (given[name] == 2), name
            seen += 1
    assert seen == 6


def test_the_real_part_of_market_comes_out_as_it_is_given(data_root, tmp_path, monkeypatch):
    """Its CSV files were made by others of the official file: names, order, values, pictures."""
    folder, people = data_root / "market1501", {}
    given = {}
    for part in ("train", "test"):
        with open(folder / f"attributes_{part}.csv", newline="") as file:
            given[part] = list(csv.DictReader(file))
        people[part] = {}
        for row in given[part]:
            values = {name: int(value) + 1 for name, value in row.items() if name != "image"}
            values["age"] = 1 + [values.pop(age) for age in market_attributes.AGES].index(2)
            people[part][int(row["image"].split("/")[1][:4])] = values
    order = ["age", *(name for name in given["train"][0] if not re.match("image|age", name))]
    market_mat(tmp_path / "m.mat", people, order)
    words = [f"mat={tmp_path}/m.mat", f"data={folder}", f"out={tmp_path}/out"]
    main_of(market_attributes, monkeypatch, words)
    for part in ("train", "test"):
        with open(tmp_path / f"out/attributes_{part}.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        # Theirs has the queries among the test pictures.
        theirs = [row for row in given[part] if not row["image"].startswith("query/")]
        assert sorted(rows, key=lambda row: row["image"]) == sorted(
            theirs, key=lambda row: row["image"]
        )
        assert list(rows[0]) == list(theirs[0]) and len(rows) > 1900


BAD_MARKET = {
    "nothing": (["mat="], "mat= and data= are both needed"),
    "another file": (["mat={tmp}/other.mat"], "'market_attribute' is missing"),
    "text": (["mat={root}/Market-1501-v15.09.15/readme.txt"], "as a .mat file"),
    "a person is missing": (["mat={tmp}/short.mat"], "has no person 7 in train, as in .*/0007_c3"),
    "values": (["mat={tmp}/values.mat"], "values are 1 or 2, of age 1 to 4.* in test"),
    "no Market": (["data={tmp}/old"], "no folder .*bounding_box_train"),
    "out in the download": (["out={root}/Market-1501-v15.09.15/a"], "lies in .* stays as it is"),
    "written already": (["out={tmp}/old"], "attributes_test.csv is there already"),
}


@pytest.mark.parametrize("name", BAD_MARKET)
def test_what_are_no_market_attributes_is_one_line(market, tmp_path, monkeypatch, name):
    root, folder, people = market
    savemat(tmp_path / "other.mat", {"joints": [1, 2]})
    short = people | {"train": {k: v for k, v in people["train"].items() if k != 7}}
    market_mat(tmp_path / "short.mat", short)
    wrong = people | {"test": {k: row | {"hat": 3} for k, row in people["test"].items()}}
    market_mat(tmp_path / "values.mat", wrong)
    (tmp_path / "old").mkdir()
    (tmp_path / "old/attributes_test.csv").write_text("mine")
    before = tree(tmp_path) | tree(root)
    more, words = BAD_MARKET[name]
    more = [word.format(root=root, tmp=tmp_path) for word in more]
    given = [f"mat={root}/market_attribute.mat", f"data={folder}", f"out={tmp_path}/out"]
    with pytest.raises(UserError, match=words) as error:
        main_of(market_attributes, monkeypatch, [*given, *more])
    assert "\n" not in str(error.value) and tree(tmp_path) | tree(root) == before
    assert not (tmp_path / "out").exists()
