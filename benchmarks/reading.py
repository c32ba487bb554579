"""Loose pictures beside the same ones in tar files: starting, reading in any order, copying.

  python benchmarks/reading.py                                 .8 GB, some minutes
  python benchmarks/reading.py pictures=600000 copy=false      5 GB, half an hour

Two sets are made in `folder`, by the writer of generate.py, and stay until you delete them. Loose
files and tars take turns. Before each figure the caches are emptied: the kernel's whole one where
the user may (root on Linux), else the pages of the files; their names and places then stay known,
which flatters loose files.

first start: read_people looks at every picture, and in tars finds where each lies.
next start: the same again; what was found before is believed.
reading: load_picture of `read` pictures in a random order, by one process.
copy, delete: the folder of the pictures.
"""

import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.append(str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image
from timing import show

from formats.coco import Limits, read_people, write_people
from plumbing import tars
from plumbing.chunks import Chunks, clean_up, person_row
from plumbing.config import Key, read_config
from plumbing.errors import run_stage
from plumbing.pictures import load_picture

SIZE, PER_TAR = (32, 64), 1500  # width and height of a picture, pictures of a tar
KEYS = dict(
    folder=Key("runs/reading", "where the two sets are made; on the disk that is asked about"),
    pictures=Key(60_000, "pictures of a set", low=1),
    read=Key(20_000, "pictures read in a random order", low=1),
    copy=Key(True, "also copy and delete the pictures"),
    rounds=Key(2, "turns of each set", low=1),
)


def main():
    cfg = read_config(KEYS, __doc__)
    sets = {name: Path(cfg.folder) / f"{cfg.pictures}_{name}" for name in ("loose", "tars")}
    for name, folder in sets.items():
        if not (folder / "annotations.json").exists():
            make_set(folder, cfg.pictures, shards=name == "tars")
    order = np.random.default_rng(0).permutation(cfg.pictures)[: cfg.read]
    table, how = {}, ""
    for turn in range(1, cfg.rounds + 1):
        for name, folder in sets.items():
            for hidden in [*folder.glob(".*.json"), *folder.glob("images/.*.npz")]:
                hidden.unlink()  # what earlier turns found
            people, copy = start(folder, check=False), folder / "copy"
            shutil.rmtree(copy, ignore_errors=True)  # of a run that was stopped
            jobs = [("first start", start, folder), ("next start", start, folder)]
            jobs.append(("reading", read_all, people, order))
            if cfg.copy:
                jobs += [("copy", shutil.copytree, folder / "images", copy)]
                jobs += [("delete", shutil.rmtree, copy)]
            row = table[f"{name}, turn {turn}"] = {}
            for what, job, *arguments in jobs:
                how = empty_caches(folder)
                wall, cpu = time.perf_counter(), time.process_time()
                job(*arguments)
                row[f"{what} s"] = time.perf_counter() - wall
                row[f"{what} cpu s"] = time.process_time() - cpu
    size = sum(m.names.nbytes + m.offsets.nbytes + m.sizes.nbytes for _, m in tars.known.values())
    table["index of the tars"] = {"bytes per picture": size / cfg.pictures}
    show(f"reading: {cfg.pictures} pictures, {len(order)} read, {how}", table)


def start(folder, check=True):
    tars.known.clear()  # as in a new process
    return read_people(folder / "annotations.json", limits=Limits(check_pictures=check))[0]


def read_all(people, order):
    for row in order:
        load_picture(people.folder, people.files[row], people.size[row])


def empty_caches(folder):
    """→ how it was done."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return "the kernel's caches emptied"
    except OSError:
        for file in folder.rglob("*.*"):
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return "the files' pages dropped (posix_fadvise)"


def make_set(folder, n, shards):
    """256 pictures again and again, each with a name of its own, five of a pose."""
    looks = np.random.default_rng(0).integers(0, 256, (256, 8, 4, 3), dtype=np.uint8)
    looks = [Image.fromarray(look).resize(SIZE) for look in looks]
    about = person_row(np.zeros((17, 3)), [0, 0, *SIZE], SIZE[0] * SIZE[1])

    def draw(numbers):
        rows = []
        for i in numbers:
            name = f"{i // 5}_{i % 5}.jpg"
            row = about | dict(file_name=name, size=SIZE, pose_id=i // 5)
            rows.append(({f"images/{name}": looks[i % 256]}, row))
        return rows, 0

    (folder / ".parts").mkdir(parents=True, exist_ok=True)
    write = SimpleNamespace(out=folder, chunk=PER_TAR, quality=95, shards=shards)
    work = Chunks(write, range(n), draw)
    for number in range(work.count):
        work[number]
    write_people(folder / "annotations.json", "benchmarks/reading.py", work.pictures)
    clean_up(folder)


if __name__ == "__main__":
    run_stage(main)
