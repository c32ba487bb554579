"""Pedestrian attributes: PA-100K, PETA, RAP v1 and v2 as downloaded (.mat), and CSV files.

A reader takes the config of finetune_par.py (annotation, images, split, train, val, test) and gives
the names of the A attributes and its splits as they are. read_attributes checks what they gave. The
structs are described as scipy reads them; where fields go by place, their names differ between
copies of the file.
"""

import csv
import io
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from plumbing.errors import UserError, reading
from plumbing.files import read_mat, read_text
from plumbing.pictures import as_bytes, load_picture, pictures_at, refuse_bad_pictures

PARTS = ("train", "val", "test")


class Split(NamedTuple):
    """N pictures and their labels."""

    files: list  # N paths
    labels: np.ndarray  # (N, A) int8: 1 yes, 0 no; A = 0 where nothing is known

    def load(self, row):
        """RGB PIL picture."""
        return load_picture("", self.files[row])


def read_pictures(path):
    """A folder of pictures, or one picture → (their names below it, Split without attributes)."""
    folder, names = pictures_at(path)
    refuse_bad_pictures(folder, as_bytes(folder, names))
    files = [os.path.join(folder, name) for name in names]
    return names, Split(files, np.empty((len(files), 0), np.int8))


def read_attributes(cfg):
    """→ (names of the A attributes, {"train", "val", "test": Split}, a sentence about them).

    val is empty where the data has none. With eval_only there is "test" alone, and neither files
    nor pictures of the others are needed. With trainval "train" also holds the pictures of "val".
    A label of 2 ("uncertain", in RAP v2) becomes 0  [Rethinking_of_PAR].
    Raises UserError for a file of another layout, labels that do not fit pictures or attributes or
    are not 0, 1, 2, missing and damaged pictures, an empty split.
    """
    reader, kind = READERS[cfg.dataset]
    if cfg.dataset == "csv":
        names, splits = reader(cfg)
    else:
        with reading(cfg.annotation, kind):
            names, splits = reader(cfg, read_mat(cfg.annotation))
    if cfg.eval_only:
        splits = {"test": splits["test"]}
    elif cfg.select == "val" and not splits["val"].files:
        raise UserError("select=val, but no validation pictures: give val= or use select=last")
    uncertain = 0
    for part, split in splits.items():
        source = cfg.annotation or getattr(cfg, part)
        if part != "val" and not split.files:
            raise UserError(f"{source}: a split is empty, there are no {part} pictures")
        check(split, names, part, source)
        uncertain += int((split.labels == 2).sum())
        splits[part] = split._replace(labels=(split.labels == 1).astype(np.int8))
    counts = ", ".join(f"{len(split.files)} {part}" for part, split in splits.items())
    about = f"{len(names)} attributes; pictures: {counts}"
    if uncertain:
        about += f"; {uncertain} uncertain labels taken as 0"
    if cfg.trainval and not cfg.eval_only:
        files = splits["train"].files + splits["val"].files
        labels = np.concatenate([splits["train"].labels, splits["val"].labels])
        splits["train"] = Split(files, labels)
    for part in [part for part in ("train", "test") if part in splits]:
        for value, word in ((1, "positive"), (0, "negative")):
            ever = (splits[part].labels == value).any(0)
            never = [name for name, found in zip(names, ever) if not found]
            about += f"; never {word} in {part}: {', '.join(never)}" if never else ""
    return names, splits, about


def check(split, names, part, source):
    """UserError for labels that do not fit, and for pictures that are missing or damaged."""
    N, A = len(split.files), len(names)
    if split.labels.shape != (N, A):
        found = f"labels of shape {split.labels.shape} for {N} {part} pictures and {A} attributes"
        raise UserError(f"{source}: {found}; the file is damaged or of another data set")
    unknown = np.setdiff1d(split.labels, (0, 1, 2))
    if len(unknown):
        found = f"labels of value {unknown[0]} in {part}"
        raise UserError(f"{source}: {found}; 0, 1 and 2 (uncertain, taken as 0) are known")
    files, todo = as_bytes("", split.files), "mend or remove it, or set images="
    refuse_bad_pictures("", files, source, todo)


# ----------------------------------------------------------------------------------- official files


def read_pa100k(cfg, document):
    """annotation.mat: attributes (26); for train, val, test X_images_name (N), X_label (N, 26)."""
    splits = {}
    for part in PARTS:
        files = below(cfg, "data", texts(document[f"{part}_images_name"]))
        labels = np.atleast_2d(document[f"{part}_label"]).astype(float)
        splits[part] = Split(files, labels)
    return texts(document["attributes"]), splits


def read_peta(cfg, document):
    """PETA.mat: struct peta, by place: data (19000, 4 + 105), names (105), selected, partition.

    The first 4 columns of data are ids; the first 35 attributes are the evaluated ones. partition:
    5 structs of 1-based train, val, test. Pictures are 00001.png … in the order of the rows.
    """
    data, names, _, partition = fields(document["peta"], 4)
    labels, names = np.asarray(data)[:, 4:39].astype(float), texts(names)[:35]
    files = below(cfg, "images", [f"{i + 1:05d}.png" for i in range(len(labels))])
    train, val, test = fields(chosen(cfg, partition), 3)
    return names, take_rows(files, labels, dict(train=train, val=val, test=test))


def read_rap(cfg, document):
    """RAP_annotation.mat, struct RAP_annotation.

    v2, by name: name (N), data (N, 152), attribute (152 names), selected_attribute (54, 1-based),
    partition_attribute (5 structs train_index, val_index, test_index). v1, by place: 0 partition (5
    structs of trainval, test), 1 label (N, 92), 3 English attribute names, 5 picture names; the
    first 51 attributes are the evaluated ones.
    """
    rap = document["RAP_annotation"]
    if "partition_attribute" in rap:
        names = texts(rap["attribute"])
        keep = from_one(rap["selected_attribute"], len(names))
        labels, names = np.asarray(rap["data"])[:, keep], [names[a] for a in keep]
        files, part = texts(rap["name"]), chosen(cfg, rap["partition_attribute"])
        rows = {name: part[f"{name}_index"] for name in PARTS}
    else:
        partition, labels, _, names, _, files = fields(rap, 6)
        labels, names, files = np.asarray(labels)[:, :51], texts(names)[:51], texts(files)
        train, test = fields(chosen(cfg, partition), 2)
        rows = dict(train=train, val=[], test=test)
    return names, take_rows(below(cfg, "RAP_dataset", files), labels.astype(float), rows)


def fields(struct, count):
    """The first fields of a struct, by place."""
    values = list(struct.values())
    if len(values) < count:
        raise ValueError(f"a struct has {len(values)} fields, not {count}")
    return values[:count]


def texts(cells):
    return [str(cell) for cell in np.atleast_1d(cells)]


def below(cfg, default, names):
    """Paths of the pictures: in images=, or in the default folder beside the annotation."""
    folder = Path(cfg.images) if cfg.images else Path(cfg.annotation).parent / default
    return [str(folder / name) for name in names]


def chosen(cfg, partition):
    """Split number split= of a file's random splits."""
    partition = [partition] if isinstance(partition, dict) else list(partition)
    if cfg.split >= len(partition):
        has = f"{cfg.annotation} has splits 0 to {len(partition) - 1}"
        raise UserError(f"split={cfg.split} but {has}")
    return partition[cfg.split]


def from_one(numbers, n):
    """Numbers of n things that count from 1 → from 0."""
    rows = np.asarray(numbers, int).ravel() - 1
    if len(rows) and not (rows.min() >= 0 and rows.max() < n):
        found = f"it names numbers {rows.min() + 1} to {rows.max() + 1}"
        raise ValueError(f"{found}, but 1 to {n} are there")
    return rows


def take_rows(files, labels, rows):
    """Picture numbers of each split, from 1 → Splits."""
    if len(labels) != len(files):
        raise ValueError(f"{len(labels)} rows of labels for {len(files)} pictures")
    splits = {}
    for part in PARTS:
        index = from_one(rows[part], len(files))
        splits[part] = Split([files[i] for i in index], labels[index])
    return splits


# ---------------------------------------------------------------------------------------- CSV files


def read_csvs(cfg):
    """train=, val= and test=; val= may be missing, with eval_only train= and val= are not read."""
    if cfg.eval_only:
        names, test = read_csv(cfg, cfg.test)
        return names, {"test": test}
    names, train = read_csv(cfg, cfg.train)
    splits = {"train": train, "val": Split([], np.empty((0, len(names)), np.int8))}
    for part in ("val", "test"):
        path = getattr(cfg, part)
        if path:
            others, splits[part] = read_csv(cfg, path)
            if others != names:
                has = f"{path} has other attributes than {cfg.train}"
                raise UserError(f"{has}; the headers must be the same")
    return names, splits


def read_csv(cfg, path):
    """Header `image,attribute,…`, one picture a line, 0 or 1 → (names, Split)."""
    with reading(path, "a CSV file of attributes"):
        table = csv.reader(io.StringIO(read_text(path), newline=""))
        lines = [(table.line_num, line) for line in table if line]
    first, *names = lines[0][1] if lines else [None]
    if first != "image" or not names:
        raise UserError(f"{path} must start with the line `image,attribute,...`")
    if "" in names or len(set(names)) < len(names):
        raise UserError(f"{path} names an attribute twice, or one not at all: {', '.join(names)}")
    folder = Path(cfg.images) if cfg.images else Path(path).parent
    files, labels = [], []
    for number, line in lines[1:]:
        if len(line) != len(names) + 1 or not set(line[1:]) <= {"0", "1"}:
            need = f"{len(names)} values of 0 or 1 must follow the picture's name"
            raise UserError(f"{path} line {number}: {need}")
        files.append(str(folder / line[0]))
        labels.append([int(value) for value in line[1:]])
    return names, Split(files, np.array(labels, np.int8).reshape(len(files), len(names)))


READERS = dict(
    pa100k=(read_pa100k, "PA-100K's annotation"),
    peta=(read_peta, "PETA's annotation"),
    rap=(read_rap, "RAP's annotation"),
    csv=(read_csvs, "CSV files"),
)
