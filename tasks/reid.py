"""Person re-identification: the model, its pictures, and which of them share a batch.

Legend: B pictures on this rank · D feature width · C people in training · P people of a batch · K
pictures of each · S batches of an epoch · H, W picture.
"""

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import Dataset
from torchvision.transforms import RandomErasing

from losses import GlobalBatchNorm
from model import IMAGENET_MEAN, IMAGENET_STD
from plumbing.errors import UserError
from plumbing.loading import StepSampler
from plumbing.seeds import ORDER, SAMPLE, rng_of, seed_all
from tasks.features import feature_width, resized, token_features

# -------------------------------------------------------------------------------------------- model


class ReID(nn.Module):
    """Encoder, one feature, a linear classifier of the people in training.

    token: one of TOKENS. neck [BoT]: batch norm between the feature, which the triplet loss sees,
    and the classifier.
    """

    def __init__(self, encoder, token, people, neck):
        super().__init__()
        self.encoder, self.token = encoder, token
        width = feature_width(encoder, token)
        self.neck = GlobalBatchNorm(width) if neck else nn.Identity()
        if neck:
            self.neck.bias.requires_grad_(False)  # [BoT]
        self.classifier = nn.Linear(width, people, bias=not neck)  # [BoT] none behind the neck
        if neck:
            nn.init.normal_(self.classifier.weight, std=0.001)  # [BoT]
        else:
            nn.init.trunc_normal_(self.classifier.weight, std=0.02)  # [MALE] timm's
            nn.init.zeros_(self.classifier.bias)  # [MALE]

    def forward(self, images, drop_noise=None):
        """images (B, 3, H, W) normalised, drop_noise (2·depth, B) or None → feature (B, D) for the
        triplet loss, logits (B, C)."""
        tokens = self.encoder(images, drop_noise=drop_noise)
        feature = token_features(tokens, self.encoder.n_special, self.token)
        return feature, self.classifier(self.neck(feature))

    def embed(self, images):
        """What pictures are compared by: (B, D) float32, length 1; with a neck, behind it."""
        feature = token_features(self.encoder(images), self.encoder.n_special, self.token)
        return F.normalize(self.neck(feature).float(), dim=1)


# ----------------------------------------------------------------------------------------- pictures


class AugmentedPictures(Dataset):
    """For training. Item (epoch, index, copy) → picture uint8 (3, H, W), label 0 … C-1, index.

    [MALE]: bicubic resize, flip .5, a black border of `pad` px and a crop of the old size, with
    probability `erase` random erasing with pixel noise.
    """

    def __init__(self, people, size, pad, erase, seed):
        self.people, self.size, self.pad, self.erase, self.seed = people, size, pad, erase, seed
        self.labels = np.unique(people.ids, return_inverse=True)[1]

    def __len__(self):
        return len(self.people.files)

    def name(self, index):
        return self.people.path(index)

    def __getitem__(self, item):
        epoch, index, copy = item
        seed_all(SAMPLE, self.seed, epoch, index, copy)
        H, W = self.size
        pixels = resized(self.people.load(index), self.size)
        if np.random.random() < 0.5:
            pixels = pixels[:, ::-1]
        border = np.pad(pixels, ((self.pad, self.pad), (self.pad, self.pad), (0, 0)))
        top, left = np.random.randint(0, 2 * self.pad + 1, 2)
        pixels = border[top : top + H, left : left + W].transpose(2, 0, 1)
        pixels = torch.from_numpy(pixels.copy())
        if np.random.random() < self.erase:
            erase_pixels(pixels)
        return {"image": pixels, "label": int(self.labels[index]), "index": index}


def erase_pixels(pixels):
    """Random erasing, mode "pixel" [MALE]: a rectangle of 2 % to 1/3 of a picture becomes noise.

    In place. The noise is N(0, 1) in normalised colours.
    deviates from [MALE]: it is cut to what a byte holds, for pictures travel in bytes.
    """
    ratio = (0.3, 1 / 0.3)
    top, left, h, w, noise = RandomErasing.get_params(pixels, (0.02, 1 / 3), ratio, value=None)
    if noise is pixels:  # torchvision's answer after ten rectangles that did not fit
        return
    mean, std = torch.tensor(IMAGENET_MEAN) * 255, torch.tensor(IMAGENET_STD) * 255
    noise = noise * std[:, None, None] + mean[:, None, None]
    pixels[:, top : top + h, left : left + w] = noise.clamp(0, 255).to(torch.uint8)


# ------------------------------------------------------------------------------------------ batches


class PersonBatches(StepSampler):
    """Step → this rank's (epoch, index, copy) triples. A batch is P different people × K pictures.

    ids (N,) of the pictures. In an epoch a person with n ≥ K pictures gives n // K groups of K
    different ones. One with fewer gives one group in which pictures come again (copy 1, 2, … of a
    picture: another augmentation). An epoch is the largest number of batches that these groups
    fill; the few groups left over, random ones, wait for another epoch. The order is a function of
    (seed, epoch). Ranks take whole people.
    Raises UserError where ranks cannot share a batch evenly, and for fewer than P people.
    """

    def __init__(self, ids, people, pictures, seed, ranks):
        self.P, self.K, self.seed, self.ranks = people, pictures, seed, ranks
        self.size = people * pictures
        names, counts = np.unique(ids, return_counts=True)
        if people % ranks.world:
            wrong = f"people={people} does not split over {ranks.world} ranks"
            raise UserError(f"{wrong}; make it a multiple of {ranks.world}")
        if len(names) < people:
            wrong = f"a batch needs people={people} different people"
            raise UserError(f"{wrong}; the training set has {len(names)}")
        self.members = np.split(np.argsort(ids, kind="stable"), np.cumsum(counts)[:-1])
        self.groups = np.maximum(1, counts // pictures)
        # S batches of P different people can be filled exactly if Σ_i min(groups_i, S) ≥ S · P.
        S = int(self.groups.sum()) // people
        while np.minimum(self.groups, S).sum() < S * people:
            S -= 1
        self.steps_per_epoch = S
        self.short = int((counts < pictures).sum())  # people whose pictures come again

    def epoch_batches(self, epoch):
        """(S, P, K, 2): index and copy of each picture."""
        rng, S = rng_of(ORDER, self.seed, epoch), self.steps_per_epoch
        slots = np.empty((S * self.P, self.K, 2), np.int64)
        t = 0
        for person in rng.permutation(len(self.members)):
            order = rng.permutation(self.members[person])
            n = min(self.groups[person], S, len(slots) - t)
            place = np.arange(n * self.K)
            own = np.stack([order[place % len(order)], place // len(order)], 1)
            slots[t : t + n] = own.reshape(n, self.K, 2)
            t += n
        # Slot t goes to batch t mod S: a person's slots are at most S in a row, so they are all in
        # different batches.
        batches = slots.reshape(self.P, S, self.K, 2).transpose(1, 0, 2, 3)
        return batches[rng.permutation(S)]
