"""Pedestrian attributes, the numbers: readers, input pictures, the weighted loss, the five figures [Rethinking_of_PAR].

Files: PA-100K, PETA, RAP v1 and v2 as downloaded (.mat), and CSV. Each reader takes the config of finetune_par.py
(annotation, images, split, train, val, test) and returns the A names and {"train", "val", "test"} → Split. The
structures are described below as scipy reads them; where fields go by place, their names differ between copies.
Legend: B pictures on this rank · N pictures of a split · A attributes · H, W input picture.
"""

import csv
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.io import loadmat
from torch.utils.data import Dataset
from torchvision.transforms import v2

from common import SAMPLE, seed_all
from data import as_bytes, load_picture, refuse_bad_pictures
from plumbing.config import UserError

THRESHOLD = 0.5  # [Rethinking_of_PAR]

# ---------------------------------------------------------------------------------------------------------- readers


class Split(NamedTuple):
    files: list  # paths of N pictures
    labels: np.ndarray  # (N, A) int8: 1 yes, 0 no


def read_attributes(cfg):
    """→ (names of the A attributes, {"train", "val", "test"} → Split, a sentence about them).

    With eval_only there is "test" alone, and neither files nor pictures of the others are needed.
    A label of 2 ("uncertain", in RAP v2) becomes 0  [Rethinking_of_PAR].
    """
    reader = {"pa100k": read_pa100k, "peta": read_peta, "rap": read_rap, "csv": read_csvs}[cfg.dataset]
    try:
        names, splits = reader(cfg)
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:  # fields of other kinds
        file = cfg.annotation or cfg.train or cfg.test
        raise UserError(f"{file} is not laid out as {cfg.dataset} is: {error!r}; damaged or of another set?") from None
    if cfg.eval_only:
        splits = {"test": splits["test"]}
    elif cfg.select == "val" and not len(splits["val"].files):
        raise UserError("select=val but there are no validation pictures; give val= or use select=last")
    uncertain = 0
    for kind, split in splits.items():
        if split.labels.shape != (len(split.files), len(names)):
            raise UserError(
                f"{cfg.annotation or getattr(cfg, kind)}: labels of shape {split.labels.shape} for {len(split.files)} "
                f"{kind} pictures and {len(names)} attributes; the file is damaged or of another data set"
            )
        unknown = np.setdiff1d(split.labels, (0, 1, 2))
        if len(unknown):
            raise UserError(
                f"{cfg.annotation or getattr(cfg, kind)}: labels of value {unknown[0]} in {kind}; "
                "0, 1 and 2 (uncertain, taken as 0) are known"
            )
        uncertain += int((split.labels == 2).sum())
        splits[kind] = split._replace(labels=(split.labels == 1).astype(np.int8))
        missing = [file for file in split.files if not os.path.isfile(file)]
        if missing:
            raise UserError(f"{missing[0]} is missing (and {len(missing) - 1} more {kind} pictures); set images=")
        refuse_bad_pictures("", as_bytes("", split.files), cfg.annotation or getattr(cfg, kind))
    counts = {kind: len(split.files) for kind, split in splits.items()}
    if not all(counts.get(kind, 1) for kind in ("train", "test")):
        raise UserError(f"{cfg.annotation or cfg.train or cfg.test}: a split is empty, {counts}")
    report = f"{len(names)} attributes; pictures: " + ", ".join(f"{n} {kind}" for kind, n in counts.items())
    if cfg.trainval and not cfg.eval_only:
        files, labels = zip(splits["train"], splits["val"])
        splits["train"] = Split(files[0] + files[1], np.concatenate(labels))
    report += f"; {uncertain} uncertain labels taken as 0" if uncertain else ""
    for kind in ("train", "test")[cfg.eval_only :]:
        for value, word in ((1, "positive"), (0, "negative")):
            never = [n for n, any_ in zip(names, (splits[kind].labels == value).any(0)) if not any_]
            report += f"; never {word} in {kind}: {', '.join(never)}" if never else ""
    return names, splits, report


def read_mat(cfg, *fields):
    """The .mat file as plain dicts and arrays (MATLAB cells → arrays of text, structs → dicts)."""
    try:
        document = loadmat(cfg.annotation, simplify_cells=True)
    except Exception as error:  # scipy, zlib and struct each raise their own kinds
        raise UserError(f"cannot read {cfg.annotation} as a .mat file: {' '.join(str(error).split())}") from None
    for field in fields:
        if field not in document:
            raise UserError(f'{cfg.annotation} has no variable "{field}"; is it a {cfg.dataset} annotation?')
    return document


def texts(cells):
    return [str(cell) for cell in np.atleast_1d(cells)]


def below(cfg, default, names):
    folder = Path(cfg.images) if cfg.images else Path(cfg.annotation).parent / default
    return [str(folder / name) for name in names]


def read_pa100k(cfg):
    """annotation.mat: attributes (26 names), and for train, val, test: X_images_name (N names), X_label (N, 26)."""
    kinds = ("train", "val", "test")
    m = read_mat(cfg, "attributes", *(f"{k}_images_name" for k in kinds), *(f"{k}_label" for k in kinds))
    splits = {}
    for k in kinds:
        files = below(cfg, "data", texts(m[f"{k}_images_name"]))
        splits[k] = Split(files, np.atleast_2d(m[f"{k}_label"]).astype(float))
    return texts(m["attributes"]), splits


def read_peta(cfg):
    """PETA.mat: struct peta of 4 fields, by place: data (19000, 4 + 105), attribute names (105), selected, partition.

    The first 4 columns of data are ids; the first 35 attributes are the evaluated ones. partition: 5 structs of
    1-based train, val, test. Pictures are 00001.png … in the order of the rows.
    """
    data, names, _, partition = struct_fields(cfg, read_mat(cfg, "peta")["peta"], 4)[:4]
    labels, names = np.asarray(data)[:, 4:39].astype(float), texts(names)[:35]
    files = below(cfg, "images", [f"{i + 1:05d}.png" for i in range(len(labels))])
    rows = list(one_of(cfg, partition).values())
    return names, take_rows(cfg, files, labels, dict(zip(("train", "val", "test"), rows)))


def read_rap(cfg):
    """RAP_annotation.mat, struct RAP_annotation.

    v2, by name: name (N), data (N, 152), attribute (152 names), selected_attribute (54, 1-based), partition_attribute
    (5 structs train_index, val_index, test_index). v1, by place: 0 partition (5 structs of trainval, test), 1 label
    (N, 92), 3 English attribute names, 5 picture names; the first 51 attributes are the evaluated ones.
    """
    rap = read_mat(cfg, "RAP_annotation")["RAP_annotation"]
    if isinstance(rap, dict) and "partition_attribute" in rap:
        keep = np.asarray(rap["selected_attribute"], int).ravel() - 1
        labels, names = np.asarray(rap["data"])[:, keep], np.array(texts(rap["attribute"]))[keep].tolist()
        files, part = texts(rap["name"]), one_of(cfg, rap["partition_attribute"])
        rows = {kind: part[f"{kind}_index"] for kind in ("train", "val", "test")}
    else:
        partition, labels, _, names, _, files = struct_fields(cfg, rap, 6)[:6]
        labels, names, files = np.asarray(labels)[:, :51], texts(names)[:51], texts(files)
        rows = dict(zip(("train", "test"), one_of(cfg, partition).values())) | {"val": []}
    return names, take_rows(cfg, below(cfg, "RAP_dataset", files), labels.astype(float), rows)


def struct_fields(cfg, struct, count):
    if not isinstance(struct, dict) or len(struct) < count:
        raise UserError(f"{cfg.annotation} is not a {cfg.dataset} annotation: a struct of {count} fields is expected")
    return list(struct.values())


def one_of(cfg, partition):
    partition = [partition] if isinstance(partition, dict) else list(partition)
    if cfg.split >= len(partition):
        raise UserError(f"split={cfg.split} but {cfg.annotation} has splits 0 to {len(partition) - 1}")
    return partition[cfg.split]


def take_rows(cfg, files, labels, rows):
    """1-based picture numbers of each split → Splits."""
    if len(labels) != len(files):
        raise UserError(f"{cfg.annotation}: {len(labels)} rows of labels for {len(files)} pictures; file damaged?")
    splits = {}
    for kind in ("train", "val", "test"):
        index = np.asarray(rows[kind], int).ravel() - 1
        if len(index) and not 0 <= index.min() <= index.max() < len(files):
            raise UserError(f"{cfg.annotation}: split {cfg.split} names picture {index.max() + 1} of {len(files)}")
        splits[kind] = Split([files[i] for i in index], labels[index])
    return splits


def read_csvs(cfg):
    """train, val and test CSV: header `image,attribute,…`, one picture a line, 0 or 1; the same header in all."""
    names, splits = None, {}
    for kind in ("train", "val", "test") if not cfg.eval_only else ("test",):
        path = getattr(cfg, kind)
        if path is None:
            splits[kind] = Split([], np.empty((0, len(names)), np.int8))
            continue
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                header, *lines = [line for line in csv.reader(file) if line] or [[]]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"cannot read {path}: {error}") from None
        if header[:1] != ["image"] or len(header) < 2:
            raise UserError(f"{path} must start with the line `image,attribute,...`")
        names = names or header[1:]
        if header[1:] != names:
            raise UserError(f"{path} has other attributes than {cfg.train}; the headers must be the same")
        for number, line in enumerate(lines, 2):
            if len(line) != len(header) or not set(line[1:]) <= {"0", "1"}:
                raise UserError(f"{path} line {number}: {len(names)} values of 0 or 1 must follow the picture's name")
        folder = Path(cfg.images) if cfg.images else Path(path).parent
        labels = np.array([line[1:] for line in lines], np.int8).reshape(len(lines), len(names))
        splits[kind] = Split([str(folder / line[0]) for line in lines], labels)
    return names, splits


# ------------------------------------------------------------------------------------------- input pictures and loss


class AttributePictures(Dataset):
    """Training item (epoch, index) → picture uint8 (3, H, W), label (A,) int8, index: f(seed, epoch, index).

    Training pictures are resized, padded, cropped and flipped; evaluation items (augment=False) are an index, resized.
    """

    def __init__(self, split, size, seed=0, pad=10, augment=False):
        self.split, self.size, self.seed = split, size, seed
        self.augment = v2.Compose([v2.RandomCrop(size, pad), v2.RandomHorizontalFlip()]) if augment else None

    def __len__(self):
        return len(self.split.files)

    def name(self, index):
        return self.split.files[index]

    def __getitem__(self, item):
        index = item[1] if self.augment else item
        picture = load_picture("", self.split.files[index]).resize(self.size[::-1], Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        if self.augment:
            seed_all(SAMPLE, self.seed, *item)
            pixels = self.augment(pixels)
        return {"image": pixels.contiguous(), "label": torch.from_numpy(self.split.labels[index]), "index": index}


def weighted_bce(logits, labels, ratio):
    """Weighted binary cross-entropy [Rethinking_of_PAR], float32: summed over attributes, mean over this rank's B.

    logits (B, A), labels (B, A) of 0 and 1, ratio (A,) r in [0, 1]. → scalar. All ranks have the
    same B, so the mean over ranks is the loss of the global batch. r = 0 or 1 (a class never seen)
    is no special case.
    """
    y = labels.float()
    # w = exp(y(1 − r) + (1 − y)r): the rarer class weighs up to e times more
    weight = torch.exp(y * (1 - ratio) + (1 - y) * ratio)
    # L = 1/B Σ_b Σ_a w_ba BCE(σ(logit_ba), y_ba)
    return F.binary_cross_entropy_with_logits(logits.float(), y, weight, reduction="none").sum(1).mean()


# ---------------------------------------------------------------------------------------------------------- metrics


def attribute_metrics(probabilities, labels):
    """The five figures of pedestrian attribute recognition [Rethinking_of_PAR], at threshold 0.5, as fractions.

    probabilities (N, A) in [0, 1]; labels (N, A) 0/1; NumPy arrays or tensors. → dict:
    mA = mean over attributes of (TPR + TNR)/2; accuracy, precision, recall = means over pictures of |yes ∩ right| over
    |yes ∪ right|, |yes|, |right|; f1 of the mean precision and recall. 0/0 counts 0, as in the reference code: an
    attribute without a positive (or negative) test picture has TPR (TNR) 0 and so mA at most .5. It stays in mA, to be
    comparable; `mA_both` leaves it out. Per attribute (A,): tpr, tnr, attribute_mA, positive_ratio, both (bool).
    """
    p, y = (np.asarray(x.detach().cpu().double() if torch.is_tensor(x) else x) for x in (probabilities, labels))
    if p.shape != y.shape or p.ndim != 2 or p.size == 0:
        raise UserError(f"probabilities {p.shape} and labels {y.shape} must be two equal tables (pictures, attributes)")
    if not np.isfinite(p).all():
        raise UserError("probabilities hold a value that is not a number")
    yes, positive, negative = p > THRESHOLD, y == 1, y == 0

    def share(part, whole):
        return part / np.maximum(whole, 1)  # part ≤ whole, so 0/0 → 0

    tpr = share((yes & positive).sum(0), positive.sum(0))
    tnr = share((~yes & negative).sum(0), negative.sum(0))
    both = positive.any(0) & negative.any(0)
    # mA = 1/A Σ_a (TPR_a + TNR_a) / 2
    per_attribute = (tpr + tnr) / 2
    hit = (yes & positive).sum(1)
    precision = share(hit, yes.sum(1)).mean()
    recall = share(hit, positive.sum(1)).mean()
    return {
        "mA": float(per_attribute.mean()),
        "accuracy": float(share(hit, (yes | positive).sum(1)).mean()),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(2 * precision * recall / max(precision + recall, 1e-20)),
        "mA_both": float(per_attribute[both].mean()) if both.any() else 0.0,
        "tpr": tpr,
        "tnr": tnr,
        "attribute_mA": per_attribute,
        "positive_ratio": positive.mean(0),
        "both": both,
    }
