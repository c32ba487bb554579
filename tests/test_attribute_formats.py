"""Readers of PETA's, RAP's and PA-100K's official files."""

import os

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

import finetune_par
from common import UserError
from formats.attributes import read_attributes


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
