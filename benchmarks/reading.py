"""Loose pictures beside the same ones in tar files: the start of a run, and pictures in any order.

  python benchmarks/reading.py folder=/tmp/reading                 600,000 pictures, 5 GB, an hour
  python benchmarks/reading.py folder=/tmp/reading pictures=5000 read=1000      a minute

`folder` should be on the disk that is asked about. Two sets are made there once, and stay until you
delete them: the same small JPEGs as files, and in tars with a JSON beside each, as generate.py
shards=true writes them. Rounds take turns: loose, tars, loose, … Before each figure the caches are
emptied: the kernel's whole cache where the user may (root, Linux), else the pages of the files,
which leaves their names and places known and flatters the loose ones.

first start: read_people looks at every picture, and in tars finds where each lies.
next start: the same command again; what was found before is believed.
pictures: load_picture of `read` pictures in a random order, by one process.
"""

import json
import os
import sys
import tarfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image
from timing import show

from formats.coco import read_people, write_people
from plumbing import tars
from plumbing.chunks import add, encoded, person_row
from plumbing.config import Key, read_config
from plumbing.errors import UserError, run_stage
from plumbing.pictures import load_picture

KEYS = dict(
    folder=Key(None, "where the two sets are made"),
    pictures=Key(600_000, "pictures of a set", low=1),
    per_tar=Key(1500, "pictures of a tar", low=1),
    height=Key(64, "picture height", low=8),
    width=Key(32, "picture width", low=8),
    read=Key(20_000, "pictures read in a random order", low=1),
    rounds=Key(2, "turns of each set", low=1),
)


def main():
    cfg = read_config(KEYS, __doc__)
    if cfg.folder is None:
        raise UserError("folder= names nothing; give a folder on the disk that is asked about")
    folder = Path(cfg.folder) / f"{cfg.pictures}_{cfg.per_tar}_{cfg.height}x{cfg.width}"
    if not (folder / "made").exists():
        make_sets(cfg, folder)
    rows, how = {"loose": [], "tars": []}, ""
    for _ in range(cfg.rounds):
        for form in rows:
            how = empty_caches(folder / form)
            for hidden in [*(folder / form).glob(".*"), *(folder / form).glob("images/.*")]:
                hidden.unlink()  # what earlier rounds found
            first, people = timed(lambda form=form: start(folder / form))
            empty_caches(folder / form)
            second, people = timed(lambda form=form: start(folder / form))
            order = np.random.default_rng(0).permutation(cfg.pictures)[: cfg.read]
            empty_caches(folder / form)
            reading, _ = timed(lambda p=people, o=order: read_all(p, o))
            rows[form].append([*first, *second, *reading])
    names = "first_start_s first_start_cpu_s next_start_s next_start_cpu_s".split()
    table = []
    for form, rounds in rows.items():
        for i, figures in enumerate(rounds, 1):
            row = {"set": f"{form}, round {i}"} | dict(zip(names, figures[:4]))
            row["pictures_per_s"] = cfg.read / figures[4]
            row["cpu_ms_per_picture"] = 1e3 * figures[5] / cfg.read
            table.append(row)
    sizes = sum(m.names.nbytes + m.offsets.nbytes + m.sizes.nbytes for _, m in tars.known.values())
    table.append({"set": "index of the tars", "bytes_per_picture": sizes / cfg.pictures})
    show(f"reading: {cfg.pictures} pictures, {how}", table)


def start(folder):
    tars.known.clear()  # as in a new process
    return read_people(folder / "annotations.json")[0]


def read_all(people, order):
    for row in order:
        load_picture(people.folder, people.files[row], people.size[row])


def timed(function):
    """→ ((seconds, processor seconds), what it returns)"""
    wall, cpu = time.perf_counter(), time.process_time()
    found = function()
    return (time.perf_counter() - wall, time.process_time() - cpu), found


def empty_caches(folder):
    """→ how it was done."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return "the kernel's caches emptied"
    except OSError:
        for file in folder.rglob("*.*"):
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        return "the files' pages dropped (posix_fadvise)"


def make_sets(cfg, folder):
    """The same few hundred JPEGs again and again, each with a name of its own."""
    rng, size = np.random.default_rng(0), (cfg.width, cfg.height)
    looks = rng.integers(0, 256, (256, cfg.height // 8, cfg.width // 8, 3), dtype=np.uint8)
    looks = [encoded(Image.fromarray(look).resize(size), ".jpg", quality=95) for look in looks]
    about = person_row(np.zeros((17, 3)), [0, 0, *size], cfg.width * cfg.height)

    def rows(form):
        for i in range(cfg.pictures):
            name = f"{i // 5}_{i % 5}.jpg"
            name = name if form == "loose" else f"{i // cfg.per_tar:06d}.tar/{name}"
            yield about | dict(pose_id=i // 5, file_name=name, size=size)

    for form in ("loose", "tars"):
        images, tar = folder / form / "images", None
        images.mkdir(parents=True, exist_ok=True)
        for i, row in enumerate(rows(form)):
            if form == "loose":
                (images / row["file_name"]).write_bytes(looks[i % 256])
                continue
            shard, name = row["file_name"].split("/")
            if i % cfg.per_tar == 0:
                if tar:
                    tar.close()
                tar = tarfile.open(images / shard, "w", format=tarfile.USTAR_FORMAT)
            add(tar, name, looks[i % 256])
            add(tar, name.replace(".jpg", ".json"), json.dumps(row).encode())
        if tar:
            tar.close()
        info = f"benchmarks/reading.py, {form}"
        write_people(folder / form / "annotations.json", info, lambda form=form: rows(form))
    (folder / "made").touch()


if __name__ == "__main__":
    run_stage(main)
