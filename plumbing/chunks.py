"""How generate.py's work is shared out, and how it survives a kill.

The units of work (poses, source pictures, people) are made in chunks. A chunk counts once its record .parts/N.jsonl is
written, after its pictures: so a killed run, started again with any number of ranks and workers, does what is missing,
and the set comes out the same. Record: a line of the chunk's own counts, then a line per picture or skipped pose.

`cfg` is generate.py's config. A unit's pictures depend on (seed, unit) only.
"""

import contextlib
import errno
import io
import json
import multiprocessing
import os
import threading
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset

from common import PICTURE, seed_of
from plumbing.config import UserError


class Chunks(Dataset):
    """Chunk number → made, written and recorded → pictures written. In this process or in a DataLoader's workers.

    make(units of the chunk) → ([(PIL picture or None, row)], pictures painted again). folder: where, below cfg.out,
    the rows' file_name is.
    """

    def __init__(self, cfg, units, make, folder):
        self.cfg, self.units, self.make, self.folder = cfg, units, make, folder

    def __getitem__(self, number):
        units = self.units[number * self.cfg.chunk : (number + 1) * self.cfg.chunk]
        return write_chunk(self.cfg, number, *self.make(units), self.folder)

    def made(self, numbers, workers):
        """Iterate over the chunks of these numbers, made by so many processes (0: by this one)."""
        one = dict(batch_size=None, collate_fn=int)  # a chunk at a time
        start = dict(num_workers=workers, worker_init_fn=end_with_main)
        return DataLoader(self, sampler=numbers, **one, **start)


def end_with_main(worker):
    """worker_init_fn: a DataLoader's worker ends with its main process, even if that was killed.

    Whoever restarts it does the worker's chunk. Holds under fork, forkserver and spawn: the main
    process keeps the end of a pipe open. torch itself looks at the parent's id, which under
    forkserver is the fork server's, and would wait for ever.
    """
    main = multiprocessing.parent_process()
    threading.Thread(target=lambda: (main.join(), os._exit(1)), daemon=True).start()


def write_chunk(cfg, number, rows, retried, folder):
    """Pictures first, the record last: without its record a chunk was never made. → pictures written."""
    lines = [{"retried": retried}]
    for picture, row in rows:
        if picture is not None:
            row["size"] = picture.size
            put(Path(cfg.out) / folder / row["file_name"], encoded(picture, cfg.picture_format, cfg.quality))
        lines.append(row)
    put(record_path(cfg, number), "".join(json.dumps(line) + "\n" for line in lines).encode())
    return sum(picture is not None for picture, _ in rows)


def record_path(cfg, number):
    return Path(cfg.out) / ".parts" / f"{number:07d}.jsonl"


def recorded(cfg):
    """Chunks done so far by all ranks."""
    return sum(name.endswith(".jsonl") and name[0] != "." for name in os.listdir(Path(cfg.out) / ".parts"))


def read_records(cfg, count):
    """All lines of all chunks, in order."""
    for number in range(count):
        with open(record_path(cfg, number), encoding="utf-8") as file:
            yield from map(json.loads, file)


def picture_seed(seed, unit, k, attempt=0):
    """Noise seed of picture k of a unit: a function of (seed, unit, k); a refused picture moves on to the next."""
    return seed_of(PICTURE, seed, unit, k, attempt)


def person_row(cfg, pose, k, keypoints, box, area, caption, seed):
    """The annotation of one picture, all but its running numbers. keypoints (17, 3) and box (x y w h) in its pixels."""
    keypoints = np.asarray(keypoints, float).tolist()
    keypoints = [[round(x, 2), round(y, 2), int(v)] if v > 0 else [0, 0, 0] for x, y, v in keypoints]
    row = dict(keypoints=sum(keypoints, []), num_keypoints=sum(v > 0 for *_, v in keypoints), bbox=box)
    row |= dict(area=round(area, 2), iscrowd=0, pose_id=pose, k=k, caption=caption, seed=seed)
    return row | dict(file_name=f"{pose}_{k}.{cfg.picture_format}")


def encoded(picture, kind, quality=95):
    buffer = io.BytesIO()
    picture.save(buffer, format={"jpg": "JPEG", "png": "PNG"}[kind], quality=quality)  # PNG heeds no quality
    return buffer.getvalue()


def put(path, data):
    """Write a file in one step. The temporary name is this process's own: a worker of a killed run may still write."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        # A DataLoader's worker hands on an error's text, not its number.
        raise UserError(f"disk full while writing {path}: free space, then run the same command") from None
