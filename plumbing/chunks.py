"""Work in chunks that survives a kill: the pictures of generate.py, the poses of annotate.py.

The units of work (poses, source pictures, people) are made in chunks. A chunk counts once its
record .parts/N.jsonl is written, after its pictures, which are files or a tar. So a killed run,
started again with any number of ranks and workers, makes what is missing, and the set comes out the
same. What a power cut broke is made again.

Record: a line about the chunk (its units and files, how many rows follow, pictures painted again),
then a row per picture or skipped pose. A unit's pictures depend on (seed, unit) only (painted ones,
in their last bits, also on what shares their batch). `cfg` is the stage's config.
"""

import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
import time
from itertools import groupby
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from plumbing.errors import UserError, reading
from plumbing.files import read_json, regular, write_atomic, write_json
from plumbing.pictures import picture_fault
from plumbing.process import end_with_main
from plumbing.runs import finish_run


class Chunks(Dataset):
    """Chunk number → made, written and recorded → rows not skipped. Here or in loaders.

    units: whole numbers. make(units of a chunk) → ([(files, row)], pictures painted again), where
    `files` are a row's pictures, {path below cfg.out: PIL picture}.
    """

    def __init__(self, cfg, units, make):
        self.cfg, self.units, self.make = cfg, units, make
        self.out, self.parts = Path(cfg.out), Path(cfg.out) / ".parts"
        self.count = -(-len(units) // cfg.chunk)  # rounded up
        self.names = {self.path(number).name for number in range(self.count)}

    def units_of(self, number):
        first = number * self.cfg.chunk
        return [int(unit) for unit in self.units[first : first + self.cfg.chunk]]

    def __getitem__(self, number):
        """Pictures first, the record last: without its record a chunk was never made."""
        units, names = self.units_of(number), []
        rows, again = self.make(units)
        if any(files for files, _ in rows):
            names = self.write_tar(number, rows) if self.cfg.shards else self.write_files(rows)
        about = dict(units=units, files=names, rows=len(rows), again=again)
        lines = [json.dumps(line) + "\n" for line in [about, *(row for _, row in rows)]]
        put(self.path(number), "".join(lines).encode())
        return sum("skipped" not in row for _, row in rows)

    def write_files(self, rows):
        """Each picture a file. → their paths below `out`."""
        names = [name for files, _ in rows for name in files]
        for folder in {Path(name).parent for name in names}:
            (self.out / folder).mkdir(exist_ok=True)
        for files, _ in rows:
            for name, picture in files.items():
                content = encoded(picture, Path(name).suffix, self.cfg.quality)
                # Flushing each to the disk would take longer than drawing it. After a power cut
                # `is_whole` looks at the pictures.
                put(self.out / name, content, durable=False)
        return names

    def write_tar(self, number, rows):
        """All pictures in one tar, as WebDataset has them: a picture, what belongs to it, and its
        row as JSON follow one another; their names are the same up to the first dot.
        → the pictures' paths below `out`. A row's file_name becomes TAR/NAME. Equal rows, equal
        bytes."""
        shard, names = f"images/{number:06d}.tar", []

        def write(part):
            with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
                for files, row in rows:
                    for path, picture in files.items():
                        name = Path(path).name  # parts/7_0.png is 7_0.parts.png here
                        if not path.startswith("images/"):
                            name = name.replace(".", f".{Path(path).parent}.")
                        add(tar, name, encoded(picture, Path(path).suffix, self.cfg.quality))
                        names.append(f"{shard}/{name}")
                    if files:
                        key = Path(row["file_name"]).stem
                        row["file_name"] = f"{Path(shard).name}/{row['file_name']}"
                        add(tar, f"{key}.json", json.dumps(row).encode())

        (self.out / "images").mkdir(exist_ok=True)
        write_atomic(self.out / shard, write)
        return names

    def made(self, numbers, workers):
        """Iterate over the chunks of these numbers, made by so many processes (0: by this one)."""
        one = dict(batch_size=None, collate_fn=int)  # a chunk at a time
        start = dict(num_workers=workers, worker_init_fn=end_with_main)
        return DataLoader(self, sampler=numbers, **one, **start)

    def path(self, number):
        return self.parts / f"{number:07d}.jsonl"

    def recorded(self):
        """How many chunks are recorded so far, by all ranks."""
        return len(self.names.intersection(os.listdir(self.parts)))

    def record(self, number):
        """→ (what the record says of its chunk, the rows); UserError where it is not whole."""
        path = self.path(number)
        with reading(path, "a record of this run; run the same command again"):
            lines = Path(regular(path)).read_bytes().splitlines()
            about, *rows = [json.loads(line) for line in lines]
            if about["units"] != self.units_of(number) or about["rows"] != len(rows):
                raise ValueError("it is cut short or of another run")
        return about, rows

    def rows(self):
        """All rows, in order; one record is held at a time."""
        for number in range(self.count):
            yield from self.record(number)[1]

    def pictures(self):
        """The rows of pictures."""
        return (row for row in self.rows() if "file_name" in row)

    def groups(self, n, K, most):
        """→ `most` of the n groups of K pictures, evenly out of them, as lists of K rows."""
        chosen = np.linspace(0, n - 1, min(most, n)).round().astype(int).tolist()
        groups = {group: [] for group in chosen}
        for i, row in enumerate(self.pictures()):
            if i // K in groups:
                groups[i // K].append(row)
        return list(groups.values())

    def summary(self, K):
        """→ (counts of a set with K pictures of each pose, rows of the poses that were skipped)."""
        pictures, again, skipped, oks = 0, 0, [], []
        for number in range(self.count):
            about, rows = self.record(number)
            again += about["again"]
            pictures += sum("file_name" in row for row in rows)
            skipped += [row for row in rows if "skipped" in row]
            oks += [row["oks"] for row in rows if "oks" in row]
        counts = dict(pictures=pictures, poses=pictures // K, painted_again=again)
        if oks:
            low, middle, high = np.percentile(oks, [10, 50, 90]).round(4).tolist()
            mean = round(float(np.mean(oks)), 4)
            counts["oks"] = dict(mean=mean, p10=low, median=middle, p90=high)
        return counts, skipped

    def is_whole(self, number):
        """Is the chunk recorded, and are the record and all its pictures as they were written?"""
        try:
            names = self.record(number)[0]["files"]
            return not any(picture_fault(self.out / name) for name in names)
        except UserError:
            return False

    def missing(self, ranks):
        """Numbers of this rank's chunks that are still to be made. A broken record is removed, so
        after a barrier `recorded` tells the truth."""
        self.parts.mkdir(exist_ok=True)
        own = range(ranks.rank, self.count, ranks.world)
        missing = [number for number in own if not self.is_whole(number)]
        for number in missing:
            self.path(number).unlink(missing_ok=True)
        return missing


def check_same_inputs(out, inputs, ranks):
    """UserError where an input is not that of the run's first start: records number its units, so
    that another list would mix them up. inputs: {its name: its content, bytes}."""
    file = out / ".parts/inputs.json"
    now = {str(name): hashlib.sha256(content).hexdigest() for name, content in inputs.items()}
    if file.exists():
        began = read_json(file)
        changed = [name for name in now if now[name] != began.get(name)]
        if changed:
            what = f"{changed[0]} is not what it was when this run began"
            raise UserError(f"{what}; restore it, or choose another out=")
    elif ranks.rank == 0:
        file.parent.mkdir(exist_ok=True)
        write_json(file, now)


class Progress:
    """A bar on stderr, for people; in `log`, an open file, a line per chunk of rank 0, for
    programs. log None: neither, for the other ranks."""

    def __init__(self, work, log, about):
        self.work, self.log, self.made = work, log, 0
        self.start, self.before = time.perf_counter(), work.recorded()
        if log is not None:
            print(f"{about}; {self.before} of {work.count} chunks are there", file=sys.stderr)
        of = dict(total=work.count, initial=self.before, desc=Path(sys.argv[0]).stem, unit="chunk")
        self.bar = tqdm(**of, disable=log is None, dynamic_ncols=True, mininterval=1.0)

    def add(self, pictures):
        """Another chunk of this rank is made, with so many pictures."""
        self.made += pictures
        if self.log is not None:
            self.bar.update(self.work.recorded() - self.bar.n)
            row = dict(step=self.bar.n, pictures_of_rank_0=self.made)
            rate = self.made / (time.perf_counter() - self.start)
            row["pictures_per_second_of_rank_0"] = float(f"{rate:.6g}")
            self.log.write(json.dumps(row) + "\n")
            self.log.flush()

    def wait_for_ranks(self):
        """Until all chunks are recorded. By files, not at a barrier: a process group gives up
        before the slowest rank of a long job is done."""
        while self.work.recorded() < self.work.count:
            time.sleep(0.2)
            self.bar.update(self.work.recorded() - self.bar.n)
        self.bar.close()

    def rate(self, pictures):
        """Pictures per second since the start; `pictures`: of the whole set."""
        share = 1 - self.before / self.work.count
        return round(share * pictures / max(time.perf_counter() - self.start, 1e-9), 2)


def same_size(jobs, batch):
    """Jobs (source, k) → batches of one size. The jobs alone decide what shares a batch."""
    jobs = sorted(jobs, key=lambda job: job[0].size)
    for _, same in groupby(jobs, key=lambda job: job[0].size):
        same = list(same)
        yield from (same[i : i + batch] for i in range(0, len(same), batch))


def mark_done(out):
    os.sync()  # the pictures reach the disk before the word that they are there
    finish_run(out)
    clean_up(out)


def clean_up(out):
    """Remove what a finished run needs no more, and what a killed one left half-written."""
    if (out / ".parts").exists():
        shutil.rmtree(out / ".parts")
    for stray in [*out.glob(".*.part"), *out.glob("*/.*.part")]:
        stray.unlink(missing_ok=True)


def is_finished(state, out, ranks):
    """Is there nothing to do? Then say so, and clean up. state: as common.open_run gives it."""
    if state == "finished" and ranks.rank == 0:
        clean_up(out)  # what a kill just after `done` left
        report(out)
    return state == "finished"


def report(out):
    """Print what a person wants to know of a finished run."""
    for name, value in read_json(out / "summary.json").items():
        if not isinstance(value, list):  # what was left out, one by one
            print(f"{name.replace('_', ' ')}: {value or 'none'}")
    print(f"look at {out / 'sheet.png'}")


def person_row(keypoints, box, area):
    """An annotation's fields about its person. keypoints (17, 3), box (x y w h): px."""
    points = []
    for x, y, v in np.asarray(keypoints, float).tolist():
        points += [round(x, 2), round(y, 2), int(v)] if v > 0 else [0, 0, 0]
    seen = sum(v > 0 for v in points[2::3])
    row = dict(keypoints=points, num_keypoints=seen, bbox=box)
    return row | dict(area=round(area, 2), iscrowd=0)


def encoded(picture, suffix, quality):
    buffer = io.BytesIO()
    kind = {".jpg": "JPEG", ".png": "PNG"}[suffix]
    picture.save(buffer, format=kind, quality=quality)  # PNG heeds no quality
    return buffer.getvalue()


def add(tar, name, content):
    about = tarfile.TarInfo(name)  # owner 0, time 0
    about.size = len(content)
    tar.addfile(about, io.BytesIO(content))


def put(path, content, durable=True):
    write_atomic(path, lambda part: part.write_bytes(content), durable)
