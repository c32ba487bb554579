"""Stage 1 by the puppet: kills, power cuts, double starts and ranks change no byte of a set."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from generate_runs import finish, kill_after, read, run, same_set, start
from PIL import Image

import generate
import puppet
from drawing import skeletons
from plumbing import chunks
from plumbing.errors import UserError

# --------------------------------------------------------------------------------- puppet and kills


PUPPET = ["poses=60", "pictures_per_pose=3", "height=96", "width=48", "chunk=2", "seed=5"]


def group_is_gone(group, seconds=10):
    for _ in range(int(seconds * 20)):
        living = [pid for pid in os.listdir("/proc") if pid.isdigit() and lives_in(group, pid)]
        if not living:
            return True
        time.sleep(0.05)
    return False


def lives_in(group, pid):
    """Is it a process of this group, and no zombie that nobody has asked for yet?"""
    try:
        state, _, of = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return False
    return int(of) == group and state != "Z"


@pytest.fixture(scope="module")
def puppet_set(tmp_path_factory):
    out = tmp_path_factory.mktemp("puppet") / "reference"
    with pytest.MonkeyPatch.context() as patch:
        run(patch, [*PUPPET, f"out={out}"])
    return out


def test_puppet_kills_workers_and_ranks(puppet_set, tmp_path):
    """Killed with 2 workers, killed on 2 ranks, finished on 3: the bytes of one undisturbed
    process.
    """
    out, words = tmp_path / "run", [*PUPPET, f"out={tmp_path / 'run'}"]
    first = start([*words, "workers=2"])
    done = kill_after(2, first, out)
    assert group_is_gone(first[0].pid), "rendering workers outlive the killed run"
    assert done < kill_after(done + 3, start(words, ranks=2), out) < 30
    (out / "images" / ".7_0.jpg.1.part").write_bytes(b"half")  # what a kill inside a write leaves
    kept = {path.name: path.stat().st_mtime_ns for path in (out / ".parts").glob("[0-9]*.jsonl")}
    pose = json.loads((out / ".parts" / sorted(kept)[0]).read_text().splitlines()[1])
    before = (out / "images" / pose["file_name"]).stat().st_mtime_ns
    finish(start([*words, "workers=1"], ranks=3))
    # Nothing recorded is made twice.
    assert (out / "images" / pose["file_name"]).stat().st_mtime_ns == before
    assert same_set(out, puppet_set)


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_puppet_workers_that_are_not_forked(puppet_set, tmp_path, monkeypatch, method):
    """Workers with another parent, or that share nothing: gone with the run, and the same bytes."""
    out = tmp_path / "run"
    first = start([*PUPPET, f"out={out}", "workers=2"], method=method)
    kill_after(2, first, out)
    assert group_is_gone(first[0].pid), "rendering workers outlive the killed run"
    run(monkeypatch, [*PUPPET, f"out={out}"])
    assert same_set(out, puppet_set)


def test_a_stage_forks_its_loaders_unless_told_otherwise():
    """Under Python 3.14's default, set here by hand, each loader would hold all annotations."""
    ask = "import multiprocessing as m\nfrom plumbing import errors\n"
    ask += "m.context._default_context._default_context = m.get_context('forkserver')"
    default = "fork" if sys.platform == "linux" else "forkserver"
    for before, used in (("", default), ("m.set_start_method('spawn')", "spawn")):
        code = f"{ask}\n{before}\nerrors.run_stage(lambda: print(m.get_start_method()))"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.stdout == used + "\n", done.stderr


def fails(*arguments, **more):
    raise RuntimeError("killed")


def test_puppet_workers_and_merge_kill(puppet_set, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:  # dies after annotations.json, before the end
        patch.setattr(skeletons, "condition_sheet", fails)
        with pytest.raises(RuntimeError):
            run(patch, [*PUPPET, f"out={out}", "workers=2"])
    run(monkeypatch, [*PUPPET, f"out={out}"])
    assert same_set(out, puppet_set)
    stamp = (out / "annotations.json").stat().st_mtime_ns
    run(monkeypatch, [*PUPPET, f"out={out}"])  # finished: says so, changes nothing
    assert (out / "annotations.json").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="seed 5 -> 6"):
        run(monkeypatch, [*PUPPET, f"out={out}", "seed=6"])


# ------------------------------------------------------ power cuts, double starts, what a kill left


def empty(path):
    path.write_bytes(b"")


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def cut_at_a_line(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def nested(path):
    path.write_text("[" * 100_000)


def other_chunk(path):
    shutil.copy(path.with_name("0000002.jsonl"), path)


def other_kind(path):
    path.write_text('["a", "list"]\n3\n')


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def no_picture(path):
    (path.parent.parent / "images/6_1.jpg").unlink()


def empty_picture(path):
    (path.parent.parent / "images/7_2.jpg").write_bytes(b"")


def zero_picture(path):
    zeros(path.parent.parent / "images/7_0.jpg")


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """A run whose chunks are all recorded, and which then died. → (its folder, a copy of it)"""
    out, copy = tmp_path_factory.mktemp("unfinished") / "run", tmp_path_factory.mktemp("copy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "write_people", fails)
        with pytest.raises(RuntimeError, match="killed"):
            run(patch, [*PUPPET, f"out={out}"])
    shutil.copytree(out, copy / "run")
    return out, copy / "run"


SPOILERS = [empty, cut, cut_at_a_line, zeros, nested, other_chunk, other_kind, pipe]
SPOILERS += [no_picture, empty_picture, zero_picture]


@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda spoil: spoil.__name__)
def test_what_a_power_cut_broke_is_made_again(puppet_set, unfinished, monkeypatch, spoil):
    """Record 3 tells of poses 6 and 7. Nothing else is made again, and the set is as it should."""
    out, copy = unfinished
    shutil.rmtree(out)
    shutil.copytree(copy, out)
    spoil(out / ".parts/0000003.jsonl")
    times = {path.name: path.stat().st_mtime_ns for path in (copy / "images").iterdir()}
    drawn = []
    draw = puppet.pose_set.draw_chunk
    monkeypatch.setattr(puppet.pose_set, "draw_chunk", lambda *a: drawn.append(a[2]) or draw(*a))
    run(monkeypatch, [*PUPPET, f"out={out}"])
    assert drawn == [[6, 7]] and len(times) == 180
    assert same_set(out, puppet_set)


def test_no_rank_takes_another_ranks_broken_record_for_done(puppet_set, unfinished):
    """Rank 0 has nothing to do, and waits for what rank 1 makes again."""
    out, copy = unfinished
    shutil.rmtree(out)
    shutil.copytree(copy, out)
    zeros(out / ".parts/0000003.jsonl")
    (out / ".parts/0000099.jsonl").write_text("{}\n")  # no chunk of this run
    finish(start([*PUPPET, f"out={out}"], ranks=2))
    assert same_set(out, puppet_set)


def test_a_record_that_breaks_while_the_run_goes_on_is_one_line(unfinished, tmp_path):
    shutil.copytree(unfinished[1], tmp_path / "run")
    work = chunks.Chunks(SimpleNamespace(out=tmp_path / "run", chunk=2), range(60), None)
    assert len(list(work.pictures())) == 180
    zeros(work.path(5))
    with pytest.raises(UserError, match="0000005.jsonl as a record of this run") as error:
        list(work.pictures())
    assert "\n" not in str(error.value)


def test_a_kill_between_done_and_the_end_leaves_nothing_for_ever(
    puppet_set, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(chunks, "clean_up", fails)
        with pytest.raises(RuntimeError, match="killed"):
            run(patch, [*PUPPET, f"out={out}"])
    assert (out / "done").exists() and (out / ".parts").exists()
    (out / ".annotations.json.123.part").write_text("half")
    (out / "images/.7_0.jpg.123.part").write_text("half")
    run(monkeypatch, [*PUPPET, f"out={out}"])
    assert same_set(out, puppet_set)
    said = capsys.readouterr().out
    assert "finished already; another out= begins anew\n" in said and "pictures: 180\n" in said


# Between its look into the run folder and what it does then, a process sleeps: two that start
# together both find the folder new.
SLOW = """
import time, common
look = common.look_into
def look_slowly(*arguments):
    state = look(*arguments)
    time.sleep(1.5)
    return state
common.look_into = look_slowly
"""


def test_two_starts_with_different_seeds_make_one_set(tmp_path, monkeypatch):
    """Never the config of one and the pictures of the other; the second gets one line."""
    out, words = tmp_path / "run", ["poses=6", "pictures_per_pose=2", "height=64", "width=32"]
    pair = [start([*words, f"seed={seed}", f"out={out}"], before=SLOW)[0] for seed in (1, 2)]
    said = [process.communicate(timeout=120)[1] for process in pair]
    assert sorted(process.returncode for process in pair) == [0, 2], said
    winner = [process.returncode for process in pair].index(0)
    line = said[1 - winner].strip()
    assert "\n" not in line and line.startswith("error: ") and str(out) in line
    assert "in use by another run" in line or f"seed {1 + winner} -> {2 - winner}" in line
    assert f"seed: {1 + winner}\n" in (out / "config.yaml").read_text()
    alone = run(monkeypatch, [*words, f"seed={1 + winner}", f"out={tmp_path / 'alone'}"])
    assert same_set(out, alone)


# --------------------------------------------------------------------------------- what a set holds


def test_puppet_set_is_what_it_says(puppet_set, tmp_path, monkeypatch):
    document = read(puppet_set)
    rows = document["annotations"]
    assert [row["pose_id"] for row in rows] == [p for p in range(60) for _ in range(3)]
    assert len({row["seed"] for row in rows}) == 180 and len({row["caption"] for row in rows}) > 150
    xy = np.array([row["keypoints"] for row in rows]).reshape(60, 3, 17, 3)
    both = (xy[:, :1, :, 2] > 0) & (xy[:, 1:, :, 2] > 0)
    # The pose is the same in all K.
    assert (abs(xy[:, :1, :, :2] - xy[:, 1:, :, :2]).max(-1) * both).max() == 0
    assert {image["file_name"] for image in document["images"]} == {
        p.name for p in (puppet_set / "images").iterdir()
    }
    # pose p, picture k depend on (seed, p, k) only: another part of the same sampled poses, other
    # K, other chunks
    part = [
        "poses=3",
        "first_pose=20",
        "pictures_per_pose=2",
        "height=96",
        "width=48",
        "seed=5",
        "parts=true",
    ]
    out = run(monkeypatch, [*part, f"out={tmp_path / 'part'}"])
    for name in ("20_0.jpg", "22_1.jpg"):
        assert (Path(out) / "images" / name).read_bytes() == (
            puppet_set / "images" / name
        ).read_bytes()
    assert np.asarray(Image.open(Path(out) / "parts/20_0.png")).max() in range(1, 7)


# ---------------------------------------------------------------- puppet: people by several cameras


def test_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="disk full"):
        chunks.put(tmp_path / "x.jpg", b"1")
    assert not list(tmp_path.iterdir())


def test_record_before_pictures_cannot_be(tmp_path, monkeypatch):
    """The record is the last file of a chunk, so that a recorded chunk has all its pictures."""
    cfg, order = SimpleNamespace(out=tmp_path, chunk=2, quality=95, shards=False), []
    monkeypatch.setattr(chunks, "put", lambda path, *_, **__: order.append(path.name))
    picture = Image.new("RGB", (2, 2))
    rows = [({"images/3_0.png": picture}, dict(pose_id=3)), ({}, dict(pose_id=4, skipped="x"))]
    assert chunks.Chunks(cfg, [3, 4], lambda units: (rows, 0))[0] == 1
    assert order == ["3_0.png", "0000000.jsonl"]
