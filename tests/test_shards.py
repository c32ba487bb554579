"""Sets in tar files: what generate.py writes, and training on it. What is read: test_tars.py."""

import json
import sys
import tarfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import webdataset
from conftest import kill_after
from generate_runs import arguments, finish, read, run, same_set, start
from generate_runs import kill_after as kill_after_records
from pose_runs import QUICK
from pose_runs import run as finetune_pose
from pose_runs import script as pose_script
from pose_runs import sets as pose_sets
from pretrain_runs import SMALL, without_speed

import generate
import pretrain
import puppet
from plumbing.chunks import Chunks
from plumbing.errors import UserError

pytestmark = pytest.mark.usefixtures("small_pose")  # size=tiny is smaller still
PUPPET = "poses=24 pictures_per_pose=3 height=64 width=32 chunk=2 seed=5 sheet_rows=2".split()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same set as loose files and in tars, with maps of body parts. → their folders"""
    root = tmp_path_factory.mktemp("both")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("false", "true"):
            run(patch, [*PUPPET, "parts=true", f"shards={name}", f"out={root / name}"])
    return root / "false", root / "true"


def moved_into_tars(annotations, folder, per_tar=5):
    """A copy of a loose set in tars, so many pictures each. → its annotations"""
    (folder / "images").mkdir(parents=True)
    document = json.loads(Path(annotations).read_text())
    for i, image in enumerate(document["images"]):
        path, tar = Path(annotations).parent / "images" / image["file_name"], f"{i // per_tar}.tar"
        with tarfile.open(folder / "images" / tar, "a") as file:
            file.add(path, path.name)
        image["file_name"] = f"{tar}/{path.name}"
    (folder / "annotations.json").write_text(json.dumps(document))
    return folder / "annotations.json"


# -------------------------------------------------------------------------------------- the writer


def same_but_for_places(loose, sharded):
    """Equal annotations and pictures; file_name is TAR/NAME. → rows of the pictures' tars"""
    a, b = read(loose), read(sharded)
    places = [image.pop("file_name") for image in b["images"]]
    names = [image.pop("file_name") for image in a["images"]]
    assert a == b and [place.split("/")[1] for place in places] == names
    assert not list((sharded / "images").glob("*.[jp]*"))
    for name, place in zip(names, places, strict=True):
        tar, member = (sharded / "images" / place).parent, Path(place).name
        with tarfile.open(tar) as file:
            content = file.extractfile(member).read()
        assert content == (loose / "images" / name).read_bytes()
    return [place.split("/")[0] for place in places]


def test_a_set_in_tars_is_the_loose_set(both):
    loose, sharded = both
    shards = same_but_for_places(loose, sharded)
    assert Counter(shards) == {f"{i:06d}.tar": 6 for i in range(12)}  # two whole poses of three
    assert (loose / "sheet.png").read_bytes() == (sharded / "sheet.png").read_bytes()
    rows = iter(read(sharded)["annotations"])
    for i in range(12):
        with tarfile.open(sharded / f"images/{i:06d}.tar") as file:
            members = file.getmembers()
            assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
                (0, 0, 0, "", "", 0o644)
            }
            keys = [name.split(".", 1) for name in file.getnames()]
            assert [kind for _, kind in keys] == ["jpg", "parts.png", "json"] * 6
            for key in dict.fromkeys(key for key, _ in keys):
                part = file.extractfile(f"{key}.parts.png").read()
                assert part == (loose / f"parts/{key}.png").read_bytes()
                told, row = json.loads(file.extractfile(f"{key}.json").read()), next(rows)
                assert told.pop("file_name") == f"{i:06d}.tar/{key}.jpg"
                assert told.pop("size") == [32, 64] and told.items() <= row.items()
                assert len(told) == len(row) - 3  # but for its ids in annotations.json


@pytest.mark.parametrize("words", [["positives=prompt"], ["picture_format=png"]])
def test_what_else_the_puppet_draws_goes_into_tars(words, tmp_path, monkeypatch):
    for name in ("false", "true"):
        run(monkeypatch, [*PUPPET, "poses=4", *words, f"shards={name}", f"out={tmp_path / name}"])
    assert len(set(same_but_for_places(tmp_path / "false", tmp_path / "true"))) == 2


def test_what_diffusion_paints_goes_into_tars(tiny, tmp_path, monkeypatch):
    """Four people of three pictures; the last picture's is in a tar of its own."""
    for name in ("false", "true"):
        keys = dict(out=tmp_path / name, shards=name, steps=1, pictures_per_pose=2)
        run(monkeypatch, arguments(tiny, **keys))
    shards = same_but_for_places(tmp_path / "false", tmp_path / "true")
    assert shards == ["000000.tar"] * 6 + ["000001.tar"] * 2


def test_killed_and_on_other_ranks_the_tars_are_the_same(both, tmp_path):
    """Killed with two workers, finished by two ranks: the bytes of one undisturbed process."""
    out = tmp_path / "run"
    words = [*PUPPET, "parts=true", "shards=true", f"out={out}"]
    assert 1 <= kill_after_records(1, start([*words, "workers=2"]), out) < 12
    (out / "images/.000009.tar.1.part").write_bytes(b"half")  # what a kill inside a write leaves
    finish(start(words, ranks=2))
    assert same_set(out, both[1])


@pytest.mark.parametrize("spoil", ["cut", "gone", "zeros"])
def test_a_broken_tar_alone_is_made_again(both, tmp_path, monkeypatch, spoil):
    out, words = tmp_path / "run", [*PUPPET, "parts=true", "shards=true"]
    with monkeypatch.context() as patch:
        patch.setattr(generate, "write_lists", None)  # dies when all chunks are recorded
        with pytest.raises(TypeError):
            run(patch, [*words, f"out={out}"])
    tar = out / "images/000003.tar"
    content = tar.read_bytes()
    tar.write_bytes(content[: len(content) // 2] if spoil == "cut" else bytes(len(content)))
    if spoil == "gone":
        tar.unlink()
    drawn, draw = [], puppet.pose_set.draw_chunk
    monkeypatch.setattr(puppet.pose_set, "draw_chunk", lambda *a: drawn.append(a[2]) or draw(*a))
    run(monkeypatch, [*words, f"out={out}"])
    assert drawn == [[6, 7]] and same_set(out, both[1])


def test_a_chunk_without_pictures_leaves_no_tar(tmp_path):
    cfg = SimpleNamespace(out=tmp_path, chunk=1, shards=True, quality=95)
    (tmp_path / ".parts").mkdir()
    rows = [({}, dict(pose_id=4, skipped="x"))]
    assert Chunks(cfg, [4], lambda units: (rows, 0))[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == [".parts"]


def test_people_for_the_tasks_are_not_sharded(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no shards="):
        run(
            monkeypatch,
            [
                "task=people",
                "shards=true",
                *"persons_train=2 persons_val=0 persons_test=1".split(),
                f"out={tmp_path}",
            ],
        )


def test_webdataset_reads_our_tars(both):
    """The library itself: whole samples, in order, with the pictures' bytes."""
    loose, sharded = both
    shards = [str(path) for path in sorted((sharded / "images").glob("0*.tar"))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    names = [image["file_name"] for image in read(loose)["images"]]
    assert [f"{sample['__key__']}.jpg" for sample in samples] == names
    for sample, row in zip(samples, read(loose)["annotations"], strict=True):
        assert sample["jpg"] == (loose / f"images/{sample['__key__']}.jpg").read_bytes()
        assert json.loads(sample["json"])["keypoints"] == row["keypoints"]
        assert {"jpg", "json", "parts.png"} == {key for key in sample if not key.startswith("__")}


# -------------------------------------------------------------------------------------- the stages


def words_of(folder, which, out):
    """pretrain.py's words; the set has the same path whichever it is, for weights tell it."""
    (folder / "set").unlink(missing_ok=True)
    (folder / "set").symlink_to(which)
    return [f"annotations={folder}/set/annotations.json", f"out={out}", *SMALL, "epochs=2"]


def pretrained(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *map(str, words)])
    pretrain.main()


def test_pretraining_on_tars_is_pretraining_on_files(both, tmp_path, monkeypatch):
    """The same bytes from loose files, from tars, and from tars by two loaders after a kill."""
    loose, sharded, killed = (tmp_path / name for name in ("loose", "sharded", "killed"))
    pretrained(monkeypatch, words_of(tmp_path, both[0], loose))
    words = [*words_of(tmp_path, both[1], killed), "save_every=2", "workers=2"]
    small = Path(pose_script(tmp_path))
    small.write_text(small.read_text().replace("finetune_pose", "pretrain"))
    assert kill_after(small, *words, lines=3, log=killed / "log.jsonl")
    assert not (killed / "done").exists()
    pretrained(monkeypatch, words)
    pretrained(monkeypatch, words_of(tmp_path, both[1], sharded))
    for out in (sharded, killed):
        for name in ("encoder.safetensors", "neighbours.png", "reconstructions.png"):
            assert (out / name).read_bytes() == (loose / name).read_bytes(), (out, name)
        assert without_speed(out) == without_speed(loose)


def test_finetuning_pose_on_tars_is_finetuning_on_files(dots, tmp_path):
    sharded = [moved_into_tars(path, tmp_path / path.stem) for path in dots]
    for name, files in (("loose", dots), ("sharded", sharded)):
        finetune_pose(*pose_sets(*files), *QUICK, f"out={tmp_path / name}")
    for name in ("model.safetensors", "metrics.json"):
        files = [(tmp_path / form / name).read_bytes() for form in ("loose", "sharded")]
        assert files[0] == files[1], name
    finetune_pose(
        f"predict={tmp_path / 'train/images'}", f"weights={tmp_path}/sharded/model.safetensors",
        f"out={tmp_path / 'predicted'}", "device=cpu",
    )  # fmt: skip
    found = json.loads((tmp_path / "predicted/predictions.json").read_text())
    assert len(found["images"]) == 12 and found["images"][0]["file_name"].startswith("0.tar/")
