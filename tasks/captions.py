"""Sentences about people, the numbers: readers of CUHK-PEDES, ICFG-PEDES and RSTPReid, words or frozen BERT, pairs of
sentence and picture, the ranking loss, retrieval figures.

Legend: B pairs on this rank · M pairs of all ranks · N pictures · C captions · T tokens of a sentence, padding included
· U width of a word's vector · E width of the shared space · v, t features of picture and text.
"""

import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import v2

from common import SAMPLE, seed_all
from data import as_bytes, load_picture, read_json, refuse_bad_pictures
from losses import full_precision, gather_rows_of, gather_with_gradient, no_autocast, world_size
from plumbing.config import UserError
from tasks.reid import evaluate_features


class Captioned(NamedTuple):
    """One split: N pictures of people, C captions, each of one picture."""

    files: list  # N paths
    ids: np.ndarray  # (N,) int64 person, 0 … persons − 1 within the split
    texts: list  # C sentences
    picture: np.ndarray  # (C,) int64 row of the caption's picture

    @property
    def persons(self):
        return int(self.ids.max()) + 1


def read_captions(path, folder=None, leave_out=(), trainval=False):
    """→ {"train", "val", "test"} → Captioned, from the JSON files as downloaded.

    All three are a list of {"split": train | val | test, "captions": [text, …], "id": whole number, and the picture:
    "file_path" (CUHK-PEDES' reid_raw.json, ICFG-PEDES) or "img_path" (RSTPReid's data_captions.json)}. `folder`: where
    the pictures are, by default `imgs` or `images` beside the JSON. A split without entries is None.
    leave_out: ids of training people that are not wanted. trainval: val's entries join train's.
    Raises UserError: not such a file, an unknown split, an empty caption, missing or damaged
    pictures, nobody to train on who has an id of leave_out.
    """
    path = Path(path)
    entries = read_json(path)
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} must hold a list of {{split, captions, id, file_path or img_path}}")
    beside = path.parent / "images" if (path.parent / "images").is_dir() else path.parent / "imgs"
    folder = Path(folder) if folder else beside
    rows = {"train": [], "val": [], "test": []}
    for number, entry in enumerate(entries):
        where = f"{path} entry {number}"
        if not isinstance(entry, dict) or not {"split", "captions", "id"} <= set(entry):
            raise UserError(f"{where} lacks one of split, captions, id")
        name = entry.get("file_path", entry.get("img_path"))
        if not isinstance(name, str) or not isinstance(entry["id"], int) or not isinstance(entry["captions"], list):
            raise UserError(f"{where} needs a picture (file_path or img_path), a whole-number id, a list of captions")
        if entry["split"] not in rows:
            raise UserError(f'{where} ({name}) has the unknown split "{entry["split"]}"; train, val and test are known')
        if not entry["captions"] or not all(isinstance(t, str) and t.strip() for t in entry["captions"]):
            raise UserError(f"{where} ({name}) has an empty caption or none; remove the entry or write the caption")
        rows[entry["split"]].append((str(folder / name), entry["id"], entry["captions"]))
    rows["train"] += rows["val"] if trainval else []
    strangers = set(leave_out) - {person for _, person, _ in rows["train"]}
    if strangers:
        raise UserError(f"leave_out={min(strangers)}: {path} has no such person to train on")
    rows["train"] = [row for row in rows["train"] if row[1] not in leave_out]
    missing = [file for part in rows.values() for file, _, _ in part if not os.path.isfile(file)]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"{path} names the picture {missing[0]}, which is missing{more}; set images=")
    refuse_bad_pictures("", as_bytes("", [file for part in rows.values() for file, _, _ in part]))
    return {split: as_split(part) if part else None for split, part in rows.items()}


def as_split(part):
    files, ids, captions = zip(*part)
    ids = np.unique(ids, return_inverse=True)[1].reshape(-1).astype(np.int64)
    picture = np.repeat(np.arange(len(files)), [len(c) for c in captions])
    return Captioned(list(files), ids, [text for c in captions for text in c], picture)


# ---------------------------------------------------------------------------------------------------- text → tokens


class Words:
    """A vocabulary from the training captions: lower-case words; id 0 pads, id 1 is any word that is not known."""

    width = None  # the vectors are learned by the model

    def __init__(self, words):
        self.words = list(words)
        self.ids = {word: i + 2 for i, word in enumerate(self.words)}

    @classmethod
    def of(cls, texts, min_count):
        """Words that occur at least min_count times, most frequent first (equal counts: alphabetical)."""
        counts = Counter(word for text in texts for word in split_words(text))
        kept = [word for word, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if n >= min_count]
        if not kept:
            raise UserError(f"no word occurs {min_count} times in the training captions; lower min_count")
        return cls(kept)

    def __len__(self):
        return len(self.words) + 2

    def tokens(self, text, longest):
        return [self.ids.get(word, 1) for word in split_words(text)[:longest]] or [1]

    def vectors(self, tokens, lengths):
        return tokens


def split_words(text):
    return re.findall(r"\w+(?:'\w+)?", text.lower())


class Bert:
    """Frozen BERT: token ids → last hidden states. It is no part of the model that is trained and saved.

    source: a hub id such as google-bert/bert-base-uncased, or a folder written by save_pretrained.
    deviates from HAP: it stays in evaluation mode. HAP's train() after the first test switches its
    dropout on.
    deviates from HAP: [CLS] and [SEP] stand around every sentence. HAP leaves them out of the
    training sentences of CUHK-PEDES alone; those of its test, of ICFG-PEDES and of LGUR have them.
    """

    def __init__(self, source, device="cpu"):
        from transformers import AutoModel, AutoTokenizer  # takes seconds, only wanted here

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(source)
            self.model = AutoModel.from_pretrained(source).float().to(device).eval()
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"cannot load bert={source} ({reason}); give a local folder, or text=words") from None
        self.model.requires_grad_(False)
        self.width = self.model.config.hidden_size
        self.longest = self.model.config.max_position_embeddings

    def tokens(self, text, longest):
        return self.tokenizer(text, truncation=True, max_length=min(longest, self.longest))["input_ids"]

    @torch.no_grad()
    def vectors(self, tokens, lengths):
        """(B, T) ids, (B,) lengths → (B, T, U) float32; what stands behind a sentence's end is masked."""
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        return self.model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state


def pad_tokens(rows):
    """Lists of token ids → (B, T) int64 padded with 0, (B,) lengths."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    return tokens, lengths


# ---------------------------------------------------------------------------------------------------------- pictures


class Pairs(Dataset):
    """Item (epoch, caption index) → picture uint8 (3, H, W), token ids, person, index: f(seed, …).

    Pictures [HAP]: bicubic resize, a black border and a crop of the old size, flip .5.
    """

    def __init__(self, split, text, cfg):
        self.split, self.tokens = split, [text.tokens(t, cfg.max_tokens) for t in split.texts]
        self.size, self.seed = (cfg.height, cfg.width), cfg.seed
        crop = v2.RandomCrop(self.size, cfg.pad)
        self.augment = v2.Compose([crop, v2.RandomHorizontalFlip(cfg.flip)])

    def __getitem__(self, item):
        epoch, index = item
        seed_all(SAMPLE, self.seed, epoch, index)
        row = int(self.split.picture[index])
        picture = self.augment(picture_of(self.split.files[row], self.size)).contiguous()
        return picture, self.tokens[index], int(self.split.ids[row]), index

    def name(self, index):
        return self.split.files[self.split.picture[index]]

    @staticmethod
    def collate(items):
        images, tokens, persons, index = zip(*items)
        return (torch.stack(images), *pad_tokens(tokens), torch.tensor(persons), list(index))


class Gallery(Dataset):
    """Item row → picture uint8 (3, H, W)."""

    def __init__(self, files, size):
        self.files, self.size = files, size

    def __len__(self):
        return len(self.files)

    def __getitem__(self, row):
        return picture_of(self.files[row], self.size)


def picture_of(file, size):
    picture = load_picture("", file).resize(size[::-1], Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


# -------------------------------------------------------------------------------------------------- loss and figures


def ranking_loss(v, t, person, noise, margin=0.2):
    """L_rank: each picture against one random semi-hard text, and each text against one random semi-hard picture [HAP].

    v, t (B, E) features (normalised here), row i of both one pair; person (B,) int64; noise (2, B, M) uniform numbers,
    this rank's rows of the draw for the global batch. Columns are the pairs of all ranks, with gradient.
    Semi-hard for anchor i: another person's j, less alike than the own partner, but within the margin:
    s_ii − margin < s_ij < s_ii. Anchors without one count 0.
    deviates from HAP: where no anchor of the batch has one, HAP takes the last anchor's first other
    person.
    → (scalar: this rank's share of the sum over all anchors, share of anchors with a negative).
    The sum [HAP], not the mean: beside the cross-entropies the term grows with the batch. The mean
    of the shares over the ranks is the sum of the global batch: hence a rank's sum × their number.
    """
    with no_autocast(v):
        v, t = (F.normalize(x, dim=1) for x in full_precision(v, t))
        other = person[:, None] != gather_rows_of(person)  # (B, M)
        own = (v * t).sum(1, keepdim=True)  # s_ii (B, 1)
        loss, found = 0.0, 0.0
        for similarity, u in ((v @ gather_with_gradient(t).T, noise[0]), (t @ gather_with_gradient(v).T, noise[1])):
            excess = similarity - own + margin  # (B, M)
            semi_hard = other & (excess > 0) & (similarity < own)
            pick = u.masked_fill(~semi_hard, -1.0).argmax(1, keepdim=True)  # one of them, each equally likely
            has = semi_hard.gather(1, pick)
            # L_rank = Σ_i [m − s(v_i, t_i) + s(v_i, t_j)]_+ + [m − s(t_i, v_i) + s(t_i, v_k)]_+
            loss = loss + (excess.gather(1, pick) * has).sum() * world_size()
            found = found + has.float().mean() / 2
        return loss, found


def retrieval_metrics(v, t, image_ids, text_ids):
    """R@1, R@5, R@10 and mAP both ways; an answer is right if it is of the same person.

    AP by rank, as in ReID (see reid.ranking_metrics). HAP's and LGUR's code takes the area under
    the precision-recall curve by trapezia, which is never larger: compare R@k with theirs, not mAP.

    v (N, E), t (C, E) float32 of length 1; ids (N,), (C,) whole numbers. → dict of fractions `t2i_R1` … `i2t_mAP`, and
    "ap" (C,), the average precision of each caption. ReID's ranking does the counting; there are no cameras here.
    """
    both = np.concatenate([image_ids, text_ids])
    dense = np.unique(both, return_inverse=True)[1].reshape(-1) + 1  # ReID gives 0 and −1 a meaning of their own
    image_ids, text_ids = dense[: len(image_ids)], dense[len(image_ids) :]
    sides = {"t2i": (t, text_ids, v, image_ids), "i2t": (v, image_ids, t, text_ids)}
    out = {}
    for name, (query, query_ids, found, found_ids) in sides.items():
        cameras = np.zeros(len(query_ids), int), np.ones(len(found_ids), int)
        result = evaluate_features(query, query_ids, cameras[0], found, found_ids, cameras[1])
        out |= {f"{name}_R{k}": float(result["cmc"][min(k, len(found)) - 1]) for k in (1, 5, 10)}
        out[f"{name}_mAP"] = result["mAP"]
        out.setdefault("ap", result["ap"])
    return out
