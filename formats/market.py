"""Person re-identification: Market-1501 and MSMT17 V1 as downloaded, and folders in Market naming.

Ids of people as in Market-1501: 0 = distractor (in the gallery, nobody's match), -1 = junk (as if
it were not there). Nobody looks for a distractor: where queries hold a 0, it is a person (MSMT17
counts from 0), and all ids but -1 become one higher.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from plumbing.errors import UserError
from plumbing.files import read_text
from plumbing.pictures import (
    as_bytes,
    load_picture,
    picture_names,
    pictures_at,
    refuse_bad_pictures,
)

NOBODY = -2  # a query that is a distractor or junk: it has no match, whatever the gallery holds

# Also the names of DukeMTMC-reID: 0001_c2_f0046182.jpg
MARKET_NAME = re.compile(r"(-?\d{1,9})_c(\d{1,9})(?!\d)")
# 0000/0000_000_01_0303morning_0015_0.jpg 0: the third number of the name is the camera.
MSMT17_LINE = re.compile(r"((?:.*/)?\d+_\d+_(\d{1,9})_[^/]*) (\d{1,9})")


class Sightings(NamedTuple):
    """N pictures of people, each by one camera. ids and cameras: None where nobody knows them."""

    folder: str
    files: np.ndarray  # (N,) bytes, path below `folder`
    ids: np.ndarray  # (N,) int64: person, 0 distractor, -1 junk, NOBODY
    cameras: np.ndarray  # (N,) int64

    def path(self, row):
        return os.path.join(self.folder, self.files[row].decode())

    def load(self, row):
        """RGB PIL picture."""
        return load_picture(self.folder, self.files[row])

    def take(self, rows):
        """The same with only these rows (numbers or bool mask)."""
        return Sightings(self.folder, self.files[rows], self.ids[rows], self.cameras[rows])


def read_pictures(path):
    """A folder of pictures, or one picture → Sightings of unknown people."""
    folder, names = pictures_at(path)
    found = Sightings(folder, as_bytes(folder, names), None, None)
    refuse_bad_pictures(folder, found.files)
    return found


def read_data(
    root, layout="auto", train="bounding_box_train", query="query", gallery="bounding_box_test"
):
    """Market-1501 or MSMT17 V1 below `root`, or other folders in Market naming.

    layout: market, msmt17, or auto, which is msmt17 where list_train.txt is. The folders are those
    of the market layout. train None: no training pictures are wanted.
    → (training Sightings, of real people only, or None; queries; gallery; a sentence about them).
    Raises UserError: missing or empty folders and lists, names without person or camera, damaged
    pictures, no query with a match, a gallery of one person.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"no folder {root}; check data=")
    if layout == "auto":
        layout = "msmt17" if (root / "list_train.txt").exists() else "market"
    if layout == "msmt17":
        train, query, gallery = read_msmt17(root, train is not None)
    else:
        train = read_market(root / train) if train is not None else None
        query, gallery = read_market(root / query), read_market(root / gallery)
    from_zero = layout == "msmt17" or bool((query.ids == 0).any())
    if from_zero:
        train = one_higher(train) if train else None
        query, gallery = one_higher(query), one_higher(gallery)
    query = query._replace(ids=np.where(query.ids > 0, query.ids, NOBODY))
    for part in (train, query, gallery) if train else (query, gallery):
        refuse_bad_pictures(part.folder, part.files)
    check_matches(query, gallery)
    about = (
        f"{len(query.ids)} queries of {len(np.unique(query.ids))} people, "
        f"{len(gallery.ids)} gallery pictures ({(gallery.ids == 0).sum()} distractors, "
        f"{(gallery.ids == -1).sum()} junk)"
    )
    if from_zero:
        about += ", people numbered from 0 in the files and from 1 here"
    if train:
        real = train.ids > 0
        train = train.take(real)
        about += f", {len(train.ids)} training pictures of {len(np.unique(train.ids))} people"
        both = set(train.ids.tolist()) & set(query.ids[query.ids > 0].tolist())
        if both and not from_zero:  # MSMT17 numbers its two halves separately
            about += f", {len(both)} of them among the queries too"
        if not real.all():
            about += f" ({(~real).sum()} left out: person 0, a distractor, or -1, junk)"
    return train, query, gallery, about


def read_market(folder):
    """A folder in Market naming → Sightings. Person and camera come from the names."""
    names, ids, cameras = picture_names(folder), [], []
    for name in names:
        match = MARKET_NAME.match(name)
        if match is None:
            need = "it must be like 0002_c1s1_000451_03.jpg"
            raise UserError(f"{folder}/{name}: no person and camera in this name; {need}")
        ids.append(int(match[1]))
        cameras.append(int(match[2]))
    return Sightings(str(folder), as_bytes(folder, names), np.array(ids), np.array(cameras))


def read_msmt17(root, train_wanted):
    """MSMT17 V1 → (train or None, query, gallery). Its people are numbered from 0."""
    if not (root / "train").is_dir() and (root / "mask_train_v2").is_dir():
        use = "published figures use V1 (folders train and test)"
        raise UserError(f"{root} is MSMT17 V2 (masked faces); {use}")
    train = None
    if train_wanted:
        train = read_lists(root, "train", ["list_train.txt", "list_val.txt"])  # both [TransReID]
    query = read_lists(root, "test", ["list_query.txt"])
    return train, query, read_lists(root, "test", ["list_gallery.txt"])


def read_lists(root, folder, lists):
    """Lists of `path person` lines, paths below `folder` → Sightings."""
    names, ids, cameras = [], [], []
    for name in lists:
        for n, line in enumerate(read_text(root / name).splitlines(), 1):
            match = MSMT17_LINE.fullmatch(line.strip())
            if match:
                names.append(match[1])
                cameras.append(int(match[2]))
                ids.append(int(match[3]))
            elif line.strip():
                need = 'it must be like "0000/0000_000_01_0303morning_0015_0.jpg 0"'
                raise UserError(f'{root / name} line {n} "{line:.80}": {need}')
    if not names:
        raise UserError(f"{root / lists[0]} lists no pictures")
    folder = str(root / folder)
    return Sightings(folder, as_bytes(folder, names), np.array(ids), np.array(cameras))


def one_higher(part):
    """People numbered from 0 → from 1; junk stays -1."""
    return part._replace(ids=np.where(part.ids >= 0, part.ids + 1, part.ids))


def check_matches(query, gallery):
    """UserError where no query has a gallery picture of its person by another camera, or where the
    gallery shows nobody else."""
    seen_by = {}  # person of the gallery → the cameras
    for person, camera in zip(gallery.ids.tolist(), gallery.cameras.tolist()):
        seen_by.setdefault(person, set()).add(camera)
    if len(set(seen_by) - {-1}) == 1:
        one = f"{gallery.folder} shows one person"
        raise UserError(f"{one}: no query can find another one; two people are needed")
    for person, camera in zip(query.ids.tolist(), query.cameras.tolist()):
        if seen_by.get(person, set()) - {camera}:
            return
    wrong = f"no query of {query.folder} has a match by another camera in {gallery.folder}"
    raise UserError(f"{wrong}; check both")
