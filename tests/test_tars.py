"""Pictures inside tar files, as every stage reads them: ours, a user's own, and broken ones."""

import io
import json
import multiprocessing
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import webdataset
from coco_sets import write_set
from conftest import ROOT, run_script
from PIL import Image
from pretrain_runs import SMALL

import annotate
from data import PretrainPictures
from formats import attributes
from formats.captions import read_captions
from formats.coco import Limits, read_people
from plumbing import pictures, tars
from plumbing.errors import UserError


@pytest.fixture
def own(tmp_path):
    """Twelve pictures in one tar, as `tar cf` writes it. → the annotation file"""
    path = write_set(tmp_path)
    document, images = json.loads(path.read_text()), tmp_path / "images"
    with tarfile.open(images / "a.tar", "w") as file:
        for image in document["images"]:
            file.add(images / image["file_name"], image["file_name"])
            (images / image["file_name"]).unlink()
            image["file_name"] = f"a.tar/{image['file_name']}"
    path.write_text(json.dumps(document))
    return path


# -------------------------------------------------------------------------------------- the reader


def samples_of(path, folder=None):
    people, notes = read_people(path, folder)
    dataset = PretrainPictures([people], (64, 32), seed=0)
    return torch.stack([dataset[(0, i)]["image"] for i in range(len(dataset))]), notes


@pytest.mark.parametrize("how", ["gnu", "pax", "dot", "webdataset", "deep", "links", "folder"])
def test_a_users_own_tars(tmp_path, how):
    """Written by tarfile and by webdataset, with folders and long names inside."""
    path = write_set(tmp_path)
    expected, _ = samples_of(path)
    document, images = json.loads(path.read_text()), tmp_path / "images"
    inside, beside = "d" * 90 + "/ü" * 30 + "/" if how == "deep" else "", "shards.tar"
    if how == "folder":  # a folder may be called so, and hold a tar
        (images / "x.tar").mkdir()
        beside = "x.tar/shards.tar"
    if how == "webdataset":
        with webdataset.TarWriter(str(images / beside)) as writer:
            for name in sorted(path.name for path in images.glob("*.jpg")):
                content = (images / name).read_bytes()
                writer.write({"__key__": name[:-4], "jpg": content, "txt": "a person"})
    else:
        form = tarfile.PAX_FORMAT if how == "pax" else tarfile.GNU_FORMAT
        with tarfile.open(images / beside, "w", format=form) as file:
            for i, name in enumerate(sorted(path.name for path in images.glob("*.jpg"))):
                if how == "gnu":  # tar's update: the last of equal names counts
                    file.addfile(tarfile.TarInfo(name))
                if how == "links" and i == 3:
                    same = tarfile.TarInfo("link.jpg")
                    same.type, same.linkname = tarfile.LNKTYPE, "000.jpg"
                    file.addfile(same)
                file.add(images / name, ("./" if how == "dot" else inside) + name)
    for image in document["images"]:
        (images / image["file_name"]).unlink()
        image["file_name"] = f"{beside}/{inside}{image['file_name']}"
    if how == "links":
        document["images"][0]["file_name"] = f"{beside}/link.jpg"
    path.write_text(json.dumps(document))
    assert torch.equal(samples_of(path)[0], expected)


def test_an_index_costs_little_and_is_made_once(own, monkeypatch):
    expected, _ = samples_of(own)
    tar = own.parent / "images/a.tar"
    found = tars.members(str(tar))
    assert sum(column.nbytes for column in found[:3]) == 12 * (16 + len("000.jpg"))
    tars.known.clear()  # as in another process
    with monkeypatch.context() as patch:
        patch.setattr(tars, "read_headers", None)
        assert torch.equal(samples_of(own)[0], expected)
    memory = Path(tars.memory_path(tar))
    for broken in (b"", b"no zip", memory.read_bytes()[:-30]):
        memory.write_bytes(broken)
        tars.known.clear()
        assert torch.equal(samples_of(own)[0], expected)
    # Another tar of that name, in the same process: never the old one's places.
    document = json.loads(own.read_text())
    Image.new("RGB", (32, 64), (250, 0, 0)).save(own.parent / "x.png")
    with tarfile.open(tar, "w") as file:
        for image in reversed(document["images"]):
            file.add(own.parent / "x.png", image["file_name"].split("/")[1])
    assert (samples_of(own)[0][:, 0] > 200).float().mean() > 0.5


def test_threads_and_loaders_of_any_kind_read_the_same(own):
    """Sixteen threads that meet a new tar together; loaders that are spawned share nothing."""
    expected, _ = samples_of(own)
    people, _ = read_people(own)
    Path(tars.memory_path(own.parent / "images/a.tar")).unlink()
    tars.known.clear()
    dataset, seen = PretrainPictures([people], (64, 32), seed=0), {}

    def look(i):
        seen[i] = pictures.load_picture(people.folder, people.files[i % 12])

    threads = [threading.Thread(target=look, args=(i,)) for i in range(48)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = [pictures.load_picture(people.folder, name) for name in people.files]
    assert all(np.array_equal(seen[i], alone[i % 12]) for i in range(48))
    items = [[(0, i)] for i in range(12)]
    context = multiprocessing.get_context("spawn")
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=items, num_workers=1, multiprocessing_context=context
    )
    assert torch.equal(torch.cat([sample["image"] for sample in loader]), expected)


def test_a_folder_of_tars_is_read_and_a_download_beside_its_pictures_is_not(own, capsys):
    images = own.parent / "images"
    (images / "b.tar").mkdir()
    people, _ = read_people(images)
    assert people.files.tolist() == [f"a.tar/{i:03d}.jpg".encode() for i in range(12)]
    folder, names = annotate.listed_pictures(str(images))
    assert annotate.read_picture(folder, names[3]).size == (32, 64)
    (own.parent / "list.txt").write_text("images/a.tar/003.jpg\n")
    folder, names = annotate.listed_pictures(own.parent / "list.txt")
    assert annotate.read_picture(folder, names[0]).size == (32, 64)
    Image.new("RGB", (8, 8)).save(own.parent / "sheet.png")  # of a run folder: as with loose files
    assert pictures.pictures_at(own.parent)[1][-1] == "sheet.png"
    assert len(pictures.pictures_at(own.parent)[1]) == 13
    (images / "a.tar").rename(images / "C.TAR")
    people = read_people(images)[0]
    assert people.files.tolist() == [f"C.TAR/{i:03d}.jpg".encode() for i in range(12)]
    assert pictures.load_picture(images, "C.TAR/003.jpg").size == (32, 64)
    assert not capsys.readouterr().err
    Image.new("RGB", (8, 8)).save(images / "loose.png")
    assert read_people(images)[0].files.tolist() == [b"loose.png"]
    assert f"{images}/C.TAR is not read" in capsys.readouterr().err
    (images / "loose.png").rename(images / "loose.txt")
    (images / "away.tar").symlink_to(images / "nowhere.tar")
    with pytest.raises(UserError, match="away.tar"):
        read_people(images)


def test_maps_of_parts_in_a_tar_are_no_pictures(own):
    with tarfile.open(own.parent / "images/a.tar", "a") as tar:
        tar.add(own, "000.parts.png")
    people, _ = read_people(own.parent / "images")
    assert people.files.tolist() == [f"a.tar/{i:03d}.jpg".encode() for i in range(12)]


def test_a_folder_with_a_cut_tar_is_refused(own):
    cut(own.parent / "images/a.tar")
    with pytest.raises(UserError, match=r"a\.tar is cut off or damaged at byte"):
        pictures.pictures_at(own.parent / "images")


def test_lists_of_attributes_and_captions_name_pictures_in_tars(own):
    picture = pictures.load_picture(own.parent, "images/a.tar/003.jpg")
    table = own.parent / "people.csv"
    table.write_text("image,hat\nimages/a.tar/003.jpg,1\n")
    names, split = attributes.read_csv(SimpleNamespace(images=None), table)
    attributes.check(split, names, "test", table)
    assert np.array_equal(split.load(0), picture)
    told = dict(id=1, img_path="images/a.tar/003.jpg", captions=["a person"], split="train")
    (own.parent / "captions.json").write_text(json.dumps([told]))
    splits = read_captions(own.parent / "captions.json", own.parent)
    (file,) = splits["train"].files
    assert np.array_equal(pictures.load_picture("", file), picture)


# ---------------------------------------------------------------------------------------- refusals


def cut(tar):
    with tarfile.open(tar) as file:
        at = file.getmember("007.jpg").offset_data
    tar.write_bytes(tar.read_bytes()[: at + 100])


def cut_in_a_header(tar):
    with tarfile.open(tar) as file:
        at = file.getmember("007.jpg").offset
    tar.write_bytes(tar.read_bytes()[: at + 100])


def damaged_header(tar):
    with tarfile.open(tar) as file:
        at = file.getmember("007.jpg").offset
    content = bytearray(tar.read_bytes())
    content[at : at + 200] = b"\x55" * 200
    tar.write_bytes(content)


def without_a_member(tar):
    with tarfile.open(tar) as file:
        kept = [(m, file.extractfile(m).read()) for m in file if m.name != "007.jpg"]
    with tarfile.open(tar, "w") as file:
        for member, content in kept:
            file.addfile(member, io.BytesIO(content))


def broken_picture(tar):
    with tarfile.open(tar) as file:
        member = file.getmember("007.jpg")
    content = bytearray(tar.read_bytes())
    content[member.offset_data : member.offset_data + member.size] = b"x" * member.size
    tar.write_bytes(content)


def no_tar(tar):
    tar.write_bytes(b"no tar file" * 1000)


BROKEN = {
    Path.unlink: (12, "a.tar: No such file or directory"),
    cut: (5, "which is cut off or damaged at byte "),
    cut_in_a_header: (5, "which is cut off or damaged at byte "),
    damaged_header: (5, "which is cut off or damaged at byte "),
    without_a_member: (1, "007.jpg is missing (no 007.jpg in "),
    broken_picture: (1, "007.jpg is damaged or truncated (UnidentifiedImageError"),
    no_tar: (12, "a.tar as a tar file: ReadError"),
}


@pytest.mark.parametrize("spoil", BROKEN, ids=lambda spoil: spoil.__name__)
def test_broken_tars_are_one_line_and_count_as_bad_pictures(own, spoil):
    count, said = BROKEN[spoil]
    spoil(own.parent / "images/a.tar")
    with pytest.raises(UserError) as error:
        read_people(own, limits=Limits(max_bad=0))
    line = str(error.value)
    assert said in line and "\n" not in line and "images/a.tar/0" in line, line
    assert line.endswith(f"max_bad={count}")
    if count < 12:
        people, notes = read_people(own, limits=Limits(max_bad=count))
        left_out = {name.encode() for name in notes["bad"]}
        assert len(people.files) == 12 - count and len(left_out - set(people.files)) == count
        with pytest.raises(UserError):
            read_people(own, limits=Limits(max_bad=count - 1))
    people, _ = read_people(own, limits=Limits(check_pictures=False))
    with pytest.raises(UserError) as error:  # what goes bad later is named when it is loaded
        pictures.load_picture(people.folder, people.files[7])
    assert "a.tar" in str(error.value) and "\n" not in str(error.value)


def test_a_stage_refuses_a_broken_tar(own):
    cut(own.parent / "images/a.tar")
    out = own.parent / "run"
    done = run_script("pretrain.py", f"annotations={own}", f"out={out}", *SMALL)
    assert done.returncode == 2 and not out.exists()
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


def test_what_the_first_start_found_is_remembered(own, monkeypatch):
    broken_picture(own.parent / "images/a.tar")
    first = read_people(own, limits=Limits(max_bad=1))[1]
    looked, fault = [], pictures.picture_fault
    monkeypatch.setattr(
        pictures, "picture_fault", lambda path, size=None: looked.append(path) or fault(path, size)
    )
    assert read_people(own, limits=Limits(max_bad=1))[1] == first
    assert looked == [f"{own.parent}/images/a.tar/007.jpg"]


def test_the_documents_lines_make_tars_of_a_loose_set(tmp_path):
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    (block,) = [part for part in text.split("```python\n") if "tar.add" in part]
    path = write_set(tmp_path)
    shutil.copy(path, tmp_path / "my_people.json")
    expected, _ = samples_of(path)
    command = [sys.executable, "-c", block.split("```")[0]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "images")
    assert torch.equal(samples_of(tmp_path / "my_shards/annotations.json")[0], expected)
