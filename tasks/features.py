"""One feature per picture, from the encoder's tokens; those of a whole folder.

Legend: B pictures on this rank · S special tokens ([CLS], [POSE]) · N patches · D width ·
H, W input.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import common
from drawing.training import nearest_sheets
from formats.people import Limits, read_folder
from formats.weights import read_encoder
from model import normalize
from plumbing.config import separate_out
from plumbing.errors import UserError
from plumbing.files import write_npz
from plumbing.pictures import load_picture

TOKENS = ("cls", "pose", "both", "patch_mean", "patch_max")
READ_POSE = ("pose", "both")  # for these alone others' weights are given a [POSE], untrained


def token_features(tokens, n_special, choice):
    """A picture's feature: tokens (B, S + N, D) of the encoder → (B, D), or (B, 2D) for "both".

    cls, pose: that token; both: the two side by side; patch_mean, patch_max: over the patches,
    without special tokens.
    """
    if choice == "both":
        return tokens[:, :2].flatten(1)
    if choice == "patch_mean":
        return tokens[:, n_special:].mean(1)
    if choice == "patch_max":
        return tokens[:, n_special:].amax(1)
    return tokens[:, ("cls", "pose").index(choice)]


def feature_width(encoder, choice):
    """Width of token_features. UserError for a choice that needs [POSE] where there is none."""
    if choice in READ_POSE and encoder.n_special < 2:
        raise UserError(f"token={choice} needs an encoder with [POSE]; use token=cls or patch_mean")
    return encoder.width * (2 if choice == "both" else 1)


# ------------------------------------------------------------------------------- pictures of a list


def resized(picture, size):
    """PIL → uint8 (H, W, 3), bicubic [MALE]."""
    H, W = size
    return np.asarray(picture.resize((W, H), Image.Resampling.BICUBIC))


class ResizedPictures(Dataset):
    """For evaluation. Item i → picture uint8 (3, H, W): row rows[i] of `people`.

    people: anything with a folder and files, as formats.coco.People and formats.market.Sightings.
    """

    def __init__(self, people, size, rows):
        self.people, self.size, self.rows = people, size, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        picture = load_picture(self.people.folder, self.people.files[self.rows[i]])
        return torch.from_numpy(resized(picture, self.size).copy()).permute(2, 0, 1)


@torch.no_grad()
def folder_features(cfg, encoder, people, ranks):
    """Final-norm tokens of whole pictures, on every rank; each rank encodes its part.

    → {"cls", "pose" (if the encoder has it), "patch_mean": (pictures, D) float32}, in the order of
    people.files.
    """
    rows = common.rank_share(len(people.files), ranks)
    dataset = ResizedPictures(people, encoder.image_size, rows)
    names, parts = ("cls", "pose")[: encoder.n_special] + ("patch_mean",), []
    for images in DataLoader(dataset, 64, num_workers=cfg.workers):
        with common.autocast(ranks.device, cfg.precision):
            tokens = encoder(normalize(images.to(ranks.device)))
        kinds = [token_features(tokens.float(), encoder.n_special, name) for name in names]
        parts.append(torch.stack(kinds).cpu().numpy())
    gathered = np.concatenate(common.gather_objects(parts), axis=1)
    return dict(zip(names, gathered))


def predict(cfg, keys, ranks):
    """pretrain.py's predict=: a folder of pictures, or one → features.npz and, of several, a sheet
    of the nearest ones for each token. keys: the stage's table.

    features.npz: files (N,) text; cls, pose (if the encoder has it), patch_mean (N, D) float32.
    """
    if not (cfg.predict and cfg.weights):
        need = "predict= (pictures) and weights= (an encoder: ours, MAE, …) need each other"
        raise UserError(f"{need}; to start a pre-training from weights use init=")
    separate_out(cfg, keys, "predict")
    people, _ = read_folder(cfg.predict, Limits())
    encoder, about = read_encoder(cfg, cfg.weights)
    if common.open_run(cfg, keys, ranks) == "finished":
        return
    features = folder_features(cfg, encoder.to(ranks.device), people, ranks)
    if ranks.rank == 0:
        print(about, file=sys.stderr)
        out, N = Path(cfg.out), len(people.files)
        files = [name.decode() for name in people.files]
        write_npz(out / "features.npz", {"files": np.array(files)} | features)
        drawn = []
        if N > 1:
            pictures = ResizedPictures(people, encoder.image_size, range(N))
            drawn = nearest_sheets(pictures, files, features, out)
        common.finish_run(cfg.out)
        shape = f"{N} pictures x {encoder.width}: {', '.join(features)}"
        print(f"wrote {', '.join([f'{out}/features.npz ({shape})', *drawn])}")
    common.barrier()
