"""Sentences about people: readers of CUHK-PEDES, ICFG-PEDES and RSTPReid, a word vocabulary, and frozen BERT.

Legend: N pictures · C captions · T tokens of a sentence, padding included · U width of a word's vector.
"""

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import UserError


class Captioned(NamedTuple):
    """One split: N pictures of people, C captions, each of one picture."""

    files: list  # N paths
    ids: np.ndarray  # (N,) int64 person, 0 … persons − 1 within the split
    texts: list  # C sentences
    picture: np.ndarray  # (C,) int64 row of the caption's picture

    @property
    def persons(self):
        return int(self.ids.max()) + 1


def read_captions(path, folder=None):
    """→ {"train", "val", "test"} → Captioned, from the JSON files as downloaded.

    All three are a list of {"split": train | val | test, "captions": [text, …], "id": whole number, and the picture:
    "file_path" (CUHK-PEDES' reid_raw.json, ICFG-PEDES) or "img_path" (RSTPReid's data_captions.json)}. `folder`: where
    the pictures are, by default `imgs` or `images` beside the JSON. A split without entries is None.
    Raises UserError: not such a file, an unknown split, an empty caption, missing pictures.
    """
    path = Path(path)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read {path} as JSON: {error}") from None
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
    missing = [file for part in rows.values() for file, _, _ in part if not os.path.isfile(file)]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"{path} names the picture {missing[0]}, which is missing{more}; set images=")
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
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths.to(tokens.device)[:, None]
        return self.model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state


def pad_tokens(rows):
    """Lists of token ids → (B, T) int64 padded with 0, (B,) lengths on the CPU, where packing a sequence needs them."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    return tokens, lengths
