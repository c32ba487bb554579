"""What the puppet's sets hold: given poses, and people by several cameras whose words are true."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import check_fields
from generate_runs import JOINTS, finish, kill_after, read, run, same_set, start, write_poses
from PIL import Image

import puppet
from formats.attributes import read_attributes
from formats.captions import read_captions
from formats.market import read_data
from puppet import people_set
from tasks.ranking import ranking_metrics

# --------------------------------------------------------------------------------- what a set holds


def test_puppet_at_given_poses(tmp_path, monkeypatch):
    write_poses(tmp_path)
    words = [
        f"annotations={tmp_path / 'poses.json'}",
        "height=128",
        "width=64",
        "pictures_per_pose=2",
    ]
    out = run(monkeypatch, [*words, f"out={tmp_path / 'a'}"])
    document, summary = read(out), json.loads((tmp_path / "a/summary.json").read_text())
    assert {row["pose_id"] for row in document["annotations"]} == {1, 2, 3, 4}
    assert summary["left_out"] == {"with too few joints to draw a body": 1}
    check_fields(tmp_path / "a/annotations.json")
    row = document["annotations"][0]
    spread = np.ptp(np.reshape(row["keypoints"], (17, 3))[:, :2], 0)
    assert abs(spread[0] / spread[1] - 60 / 174) < 0.03  # the given pose, its shape kept


def test_real_poses(tmp_path, monkeypatch):
    data = os.environ.get("GENPOCCL_DATA")
    if not data:
        pytest.skip("GENPOCCL_DATA is not set: no real poses")
    for name, source in (("lsp", "lspet/val.json"), ("coco", "coco/person_keypoints.json")):
        words = [
            f"annotations={data}/{source}",
            "poses=20",
            "min_joints=10",
            "height=128",
            "width=64",
        ]
        document = read(run(monkeypatch, [*words, "pictures_per_pose=2", f"out={tmp_path / name}"]))
        assert (
            len(document["annotations"]) >= 34 and document["categories"][0]["keypoints"] == JOINTS
        )


# ---------------------------------------------------------------- puppet: people by several cameras


PEOPLE = [
    "task=people",
    "persons_train=14",
    "persons_val=4",
    "persons_test=10",
    "cameras=3",
    "pictures_per_camera=2",
]
PEOPLE += ["height=96", "width=48", "chunk=2", "seed=5"]


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    out = tmp_path_factory.mktemp("people") / "reference"
    with pytest.MonkeyPatch.context() as patch:
        run(patch, [*PEOPLE, f"out={out}"])
    return out


def test_people_reid_layout(people):
    train, query, gallery, about = read_data(people)
    assert set(train.ids) == set(range(1, 15)) and set(query.ids) == set(gallery.ids) - {
        0,
        -1,
    } == set(range(15, 25))
    assert sorted(zip(query.ids, query.cameras)) == [
        (person, camera) for person in range(15, 25) for camera in (1, 2, 3)
    ]
    assert len(train.ids) == 14 * 3 * 2 and "(30 distractors, 30 junk)" in about
    assert sorted(zip(train.ids, train.cameras)) == sorted(
        [(i, c) for i in range(1, 15) for c in (1, 2, 3)] * 2
    )
    # The other picture of each camera.
    assert (np.bincount(gallery.ids[gallery.ids > 0])[15:] == 3).all()
    result = ranking_metrics(
        query.ids[:, None] != gallery.ids, query.ids, query.cameras, gallery.ids, gallery.cameras
    )
    assert result["mAP"] == 1 and result["unmatched"] == 0
    files = [
        Path(part.folder) / name.decode() for part in (train, query, gallery) for name in part.files
    ]
    assert len({path.read_bytes() for path in files}) == len(files) == 84 + 30 + 90
    assert len({path.name for path in files}) == len(files)
    assert all(Image.open(path).size == (48, 96) for path in files)


def test_people_cameras_keep_their_place(people):
    """A test picture's margins look most like the median picture of its own camera's training
    pictures.
    """
    train, query, _, _ = read_data(people)

    def margins(part):
        all_ = [np.asarray(Image.open(Path(part.folder) / n.decode()), float) for n in part.files]
        return np.stack([np.concatenate([p[:30, :8], p[:30, -8:]]).ravel() for p in all_])

    a, b = margins(train), margins(query)
    centres = np.stack([np.median(a[train.cameras == camera], 0) for camera in (1, 2, 3)])
    found = 1 + abs(b[:, None] - centres).mean(-1).argmin(1)
    assert (found == query.cameras).mean() > 0.8


def test_people_attributes_and_captions_are_true(people):
    csvs = {kind: str(people / f"attributes_{kind}.csv") for kind in ("train", "val", "test")}
    more = dict(select="val", trainval=False, eval_only=False)
    cfg = SimpleNamespace(dataset="csv", annotation=None, images=None, **more, **csvs)
    names, splits, _ = read_attributes(cfg)
    told = read_captions(people / "data_captions.json", people)
    assert [len(splits[kind].files) for kind in splits] == [60, 24, 60]
    persons = {
        kind: {int(Path(file).name[:4]) for file in split.files} for kind, split in splits.items()
    }
    assert persons == dict(train=set(range(1, 11)), val=set(range(11, 15)), test=set(range(15, 25)))
    for kind, split in splits.items():
        assert told[kind].files == split.files and told[kind].persons == len(persons[kind])
        assert told[kind].picture.tolist() == np.repeat(range(len(split.files)), 2).tolist()
        for file, labels, *texts in zip(
            split.files, split.labels, told[kind].texts[::2], told[kind].texts[1::2]
        ):
            who = puppet.sample_identities(5, [int(Path(file).name[:4])])[0]
            assert dict(zip(names, labels.tolist())) == puppet.attributes(who)
            assert texts[0] != texts[1]
            true = {name for name, label in zip(names, labels) if label}
            for text in texts:
                assert all(
                    name.split("_")[1] in text for name in true if name.startswith(("up_", "down_"))
                )
                assert bool({"woman", "lady", "She"} & set(re.findall(r"\w+", text))) == (
                    "female" in true
                )
                assert ("skirt" in text) == ("skirt" in true) and (
                    "backpack" not in text or "backpack" in true
                )
    assert len(set(told["train"].texts)) > 60


def test_people_kill_and_ranks(people, tmp_path):
    out = tmp_path / "run"
    words = [*PEOPLE, f"out={out}"]
    assert kill_after(2, start([*words, "workers=1"]), out) < 12
    (out / "bounding_box_train" / ".x.jpg.1.part").write_bytes(b"half")
    finish(start(words, ranks=2))
    assert same_set(out, people)


def test_bad_boxes_overlap_as_told():
    """The window is read off a picture whose colours are its coordinates."""
    y, x = np.mgrid[:128, :64]
    picture = Image.fromarray(np.stack([x * 4, y * 2, 0 * x], -1).astype(np.uint8))
    for box in ([10, 4, 40, 120], [28, 10, 9, 110], [2, 60, 60, 30]):
        for n, (low, high) in enumerate(people_set.BAD_BOXES.values()):
            for seed in range(8):
                crop = people_set.badly_boxed(
                    picture, box, low, high, np.random.default_rng([seed, n])
                )
                pixels = np.asarray(crop, float)
                assert crop.size == (64, 128)
                left, right = pixels[64, [8, 55], 0] / 4  # away from the rim, where resizing clips
                top, bottom = pixels[[16, 111], 32, 1] / 2
                width, height = (right - left) * 64 / 47, (bottom - top) * 128 / 95
                left, top = left + 0.5 - width * 8.5 / 64, top + 0.5 - height * 16.5 / 128
                across = max(0, min(left + width, box[0] + box[2]) - max(left, box[0]))
                down = max(0, min(top + height, box[1] + box[3]) - max(top, box[1]))
                iou = across * down / (width * height + box[2] * box[3] - across * down)
                assert low - 0.03 <= iou < high + 0.03, (box, seed)
