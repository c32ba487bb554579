"""Pedestrian attributes: input pictures, the weighted loss, the five figures [Rethinking_of_PAR].

Legend: B pictures on this rank · N pictures of a split · A attributes · H, W input picture.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import v2

from plumbing.errors import UserError
from plumbing.seeds import SAMPLE, seed_all
from tasks.ranking import as_array

THRESHOLD = 0.5  # above it the answer is yes [Rethinking_of_PAR]


class AttributePictures(Dataset):
    """Item → picture uint8 (3, H, W), label (A,) int8, index.

    For training (augment) an item is (epoch, index): the picture is resized, padded with black,
    cropped and flipped, as a function of (seed, epoch, index). For evaluation it is an index, and
    the picture is resized.
    """

    def __init__(self, split, size, seed=0, pad=10, augment=False):
        self.split, self.size, self.seed, self.augment = split, size, seed, None
        if augment:
            self.augment = v2.Compose([v2.RandomCrop(size, pad), v2.RandomHorizontalFlip()])

    def __len__(self):
        return len(self.split.files)

    def name(self, index):
        return self.split.files[index]

    def __getitem__(self, item):
        index = item[1] if self.augment else item
        H, W = self.size
        picture = self.split.load(index).resize((W, H), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        if self.augment:
            seed_all(SAMPLE, self.seed, *item)
            pixels = self.augment(pixels)
        label = torch.from_numpy(self.split.labels[index])
        return {"image": pixels.contiguous(), "label": label, "index": index}


def weighted_bce(logits, labels, ratio):
    """Weighted binary cross-entropy [Rethinking_of_PAR], float32: sum over attributes, mean over B.

    logits (B, A), labels (B, A) of 0 and 1, ratio (A,) r in [0, 1]: how often each attribute is
    true. → scalar. All ranks have the same B, so the mean over ranks is the loss of the global
    batch. r = 0 or 1 (a class never seen) is no special case.
    """
    y = labels.float()
    # w = exp(y(1 − r) + (1 − y)r): the rarer class weighs up to e times more
    weight = torch.exp(y * (1 - ratio) + (1 - y) * ratio)
    # L = 1/B Σ_b Σ_a w_ba BCE(σ(logit_ba), y_ba)
    each = F.binary_cross_entropy_with_logits(logits.float(), y, weight, reduction="none")
    return each.sum(1).mean()


def attribute_metrics(probabilities, labels):
    """The five figures of pedestrian attribute recognition [Rethinking_of_PAR], as fractions.

    probabilities (N, A) in [0, 1], yes above 0.5; labels (N, A) 0/1; NumPy arrays or tensors.
    → dict: mA = mean over attributes of (TPR + TNR)/2; accuracy, precision, recall = means over
    pictures of |yes ∩ right| over |yes ∪ right|, |yes|, |right|; f1 of the mean precision and
    recall. 0/0 counts 0, as in the reference code: an attribute without a positive (or negative)
    test picture has TPR (TNR) 0 and so mA at most .5. It stays in mA, to be comparable; `mA_both`
    leaves it out (None where nothing is left). Per attribute (A,): tpr, tnr, attribute_mA,
    positive_ratio, both (bool).
    Raises UserError for tables of other shapes, and for probabilities that are not finite.
    """
    p, y = as_array(probabilities), as_array(labels)
    if p.shape != y.shape or p.ndim != 2 or p.size == 0:
        found = f"probabilities {p.shape} and labels {y.shape}"
        raise UserError(f"{found} must be two equal tables (pictures, attributes)")
    if not np.isfinite(p).all():
        raise UserError("probabilities hold a value that is not a number")
    yes, positive, negative = p > THRESHOLD, y == 1, y == 0
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
        "mA_both": float(per_attribute[both].mean()) if both.any() else None,
        "tpr": tpr,
        "tnr": tnr,
        "attribute_mA": per_attribute,
        "positive_ratio": positive.mean(0),
        "both": both,
    }


def share(part, whole):
    """part / whole, counts with part ≤ whole; 0/0 → 0."""
    return part / np.maximum(whole, 1)
