"""Sentences about people: CUHK-PEDES, ICFG-PEDES, RSTPReid as downloaded; BERT, which reads them.

Legend: N pictures · C captions.
"""

import contextlib
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from plumbing.errors import UserError, reading
from plumbing.files import load_checkpoint, load_weights, read_json, regular
from plumbing.pictures import as_bytes, refuse_bad_pictures


class Captioned(NamedTuple):
    """One split: N pictures of people, C captions, each of one picture."""

    files: list  # N paths
    ids: np.ndarray  # (N,) int64 person, 0 … persons − 1 within the split
    texts: list  # C sentences
    picture: np.ndarray  # (C,) int64 row of the caption's picture
    folder = ""  # what the paths begin at

    @property
    def persons(self):
        return int(self.ids.max()) + 1


def read_captions(path, folder=None, leave_out=(), trainval=False):
    """The JSON files as downloaded → {"train", "val", "test"} → Captioned, or None without entries.

    All three are a list of {"split": train | val | test, "captions": [text, …], "id": whole number,
    and the picture: "file_path" (CUHK-PEDES' reid_raw.json, ICFG-PEDES) or "img_path" (RSTPReid's
    data_captions.json)}. `folder` holds the pictures; default: `images` or `imgs` beside the JSON.
    leave_out: ids of training people that are not wanted. trainval: val's entries join train's.
    Raises UserError: not such a file, an unknown split, an empty caption, missing or damaged
    pictures, nobody to train on who has an id of leave_out.
    """
    path, entries = Path(path), read_json(path)
    if folder is None:
        beside = path.parent / "images"
        folder = beside if beside.is_dir() else path.parent / "imgs"
    rows = {"train": [], "val": [], "test": []}
    with reading(path, "captions of CUHK-PEDES, ICFG-PEDES or RSTPReid") as place:
        for number, entry in enumerate(entries):
            place.at = f"entry {number}"
            name = entry["file_path"] if "file_path" in entry else entry["img_path"]
            # A text would be taken for a list of letters, "1" and 1 for two people.
            if not isinstance(entry["captions"], list) or type(entry["id"]) is not int:
                raise ValueError("captions must be a list of texts, id a whole number")
            if entry["split"] not in rows:
                raise ValueError(f"its split is {entry['split']!r:.40}, not train, val or test")
            if not all(isinstance(text, str) for text in entry["captions"]):
                raise ValueError("captions must be a list of texts")
            if not entry["captions"] or not all(text.strip() for text in entry["captions"]):
                raise ValueError(f"{name} has an empty caption or none; remove it or write one")
            rows[entry["split"]].append((str(Path(folder) / name), entry["id"], entry["captions"]))
    rows["train"] += rows["val"] if trainval else []
    strangers = set(leave_out) - {person for _, person, _ in rows["train"]}
    if strangers:
        raise UserError(f"leave_out={min(strangers)}: {path} has no such person to train on")
    rows["train"] = [row for row in rows["train"] if row[1] not in leave_out]
    files = [file for part in rows.values() for file, _, _ in part]
    refuse_bad_pictures("", as_bytes("", files), todo="mend or remove it, or set images=")
    return {split: as_split(part) if part else None for split, part in rows.items()}


def as_split(rows):
    """[(file, person, captions)] → Captioned."""
    files, ids, captions = zip(*rows)
    ids = np.unique(ids, return_inverse=True)[1].reshape(-1).astype(np.int64)
    picture = np.repeat(np.arange(len(files)), [len(texts) for texts in captions])
    return Captioned(list(files), ids, [text for texts in captions for text in texts], picture)


# --------------------------------------------------------------------------------------------- BERT


def read_bert(source):
    """A hub id such as google-bert/bert-base-uncased, or a folder of save_pretrained → (tokenizer,
    BertModel without its pooler, float32, in evaluation mode, on the CPU).

    transformers' own loader begins anew, at random, what a file lacks, and takes the real part of
    complex numbers. So the weights are read as those of every other file: all that the model needs
    must be there, as finite real numbers. Raises UserError.
    """
    from transformers import AutoTokenizer, BertConfig, BertModel  # takes seconds, only wanted here

    with reading(source, "BERT (a hub id or a folder of save_pretrained; text=words needs none)"):
        for file in Path(source).glob("*.*"):
            if not file.is_dir():
                regular(file)
        tokenizer = AutoTokenizer.from_pretrained(source)
        config = BertConfig.from_pretrained(source)
        words = len(tokenizer) - len(tokenizer.all_special_tokens)
        if words < 1 or len(tokenizer) > config.vocab_size:
            what = f"{words} words for a BERT of {config.vocab_size}"
            raise UserError(f"{source}: its tokenizer has {what}; add the vocab.txt of this BERT")
        path = bert_file(source)
        with torch.random.fork_rng(devices=[]):  # its random start takes no numbers from the run's
            model = BertModel(config, add_pooling_layer=False)
        needed, state = model.state_dict(), {}
        for name, value in load_checkpoint(path).items():
            # Google's BERT: "bert.encoder.layer.0.output.LayerNorm.gamma", and a head "cls.…".
            name = re.sub(r"\bgamma$", "weight", re.sub(r"\bbeta$", "bias", name))
            name = name.removeprefix("bert.")
            if name in needed or name.startswith("encoder."):  # a deeper BERT is another one
                state[name] = value
        load_weights(model, state, path)
    return tokenizer, model.eval()


def bert_file(source):
    """The path of its weights: in the folder, or in the hub's cache."""
    from transformers.utils import cached_file

    for name in ("model.safetensors", "pytorch_model.bin"):
        with contextlib.suppress(OSError):
            return cached_file(source, name)
    raise UserError(f"{source} holds no weights, neither model.safetensors nor pytorch_model.bin")
