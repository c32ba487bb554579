"""What does a token know? Frozen features: pose retrieval, joints, attributes, patches.

Pre-training logs the first of these on held-out people (HeldOut); experiments/probe.py has all.

Legend: N people · K joints · D width · S special tokens · P patches · H, W input.
Frame: a pose is (N, K, 3), xy moved to its box's centre and divided by the box's longer side, so
that place and size in the picture do not count; third column 0 = missing.
"""

import numpy as np
import torch
import torch.nn.functional as F

import common
from data import Augmentation, PretrainPictures, grown_region, padded_box
from formats.coco import read_people
from formats.keypoints import BOX_AREA
from formats.market import MARKET_NAME
from model import normalize
from plumbing.errors import UserError
from plumbing.pictures import load_picture
from tasks.features import token_features
from tasks.pose_metrics import oks, oks_sigmas

PEOPLE = 400  # held-out people that are looked at: ours
MIN_JOINTS = 8  # ours: who shows fewer has no pose to compare
PCK_REACH = 0.1  # of the box's longer side, the usual bound for correspondences [SPair-71k]

# ---------------------------------------------------------------------------------- held-out people


def read_held(path, limit=PEOPLE, min_joints=MIN_JOINTS):
    """COCO JSON → People: about `limit` of them, evenly spread, pose groups whole.

    Raises UserError for a file with neither joints nor pose groups.
    """
    people, _ = read_people(path)
    if people.joints:
        people = people.take((people.keypoints[..., 2] > 0).sum(1) >= min_joints)
    elif (people.pose_id < 0).all():
        raise UserError(f"{path} has neither joints nor pose_id; nothing tells what is alike")
    groups = groups_of(people)
    G, n = groups.max(initial=-1) + 1, len(groups)
    if n < 10:
        raise UserError(f"{path} has {n} people with {min_joints} joints or more; 10 are needed")
    # At least five groups: ridge_joints has as many folds.
    chosen = np.linspace(0, G - 1, max(5, round(G * min(1, limit / n)))).round()
    return people.take(np.isin(groups, chosen))


def groups_of(people):
    """(N,) numbers from 0: people of one pose group share one, others have their own."""
    alone = people.pose_id.max(initial=0) + 1 + np.arange(len(people.files))
    return np.unique(np.where(people.pose_id >= 0, people.pose_id, alone), return_inverse=True)[1]


def strangers(people):
    """(N, N) bool: another person, in another picture. Market's file names say who is who."""
    names = [MARKET_NAME.match(name.decode().rsplit("/", 1)[-1]) for name in people.files]
    who = np.array([int(m[1]) if m else -2 - i for i, m in enumerate(names)])
    return (who[:, None] != who) & (people.image_id[:, None] != people.image_id)


def pictures_of(people, size):
    """Each person's region as in pre-training, whole and unmirrored, at the input's size (H, W).

    Black beyond the picture's edge would tell the box, so regions stay within it where they fit.
    → images (N, 3, H, W) uint8, keypoints (N, K, 3) input px, input px per picture px (N, 2).
    """
    data, options = PretrainPictures([people], size, seed=0), Augmentation()
    samples, scale = [], np.empty((len(people.files), 2))
    for i, name in enumerate(people.files):
        picture = load_picture(people.folder, name, people.size[i])
        region = padded_box(people.boxes[i], options.box_padding, people.size[i])
        region = grown_region(region, size[1] / size[0], people.size[i])
        samples.append(data.augment(picture, region, people.keypoints[i], mirrored=False))
        scale[i] = size[1] / region[2], size[0] / region[3]
    images, keypoints = (torch.stack([s[name] for s in samples]) for name in ("image", "keypoints"))
    return images, keypoints.numpy(), scale


@torch.no_grad()
def tokens_of(encoder, images, device, batch=64):
    """images (N, 3, H, W) uint8 → tokens (N, S + P, D) float32 on the CPU, without autocast."""
    parts = [encoder(normalize(part.to(device))).float().cpu() for part in images.split(batch)]
    return torch.cat(parts)


def features_of(tokens, n_special, choices=("cls", "pose", "both", "patch_mean")):
    """→ {choice: (N, D) of length 1}; without [POSE] those that need it are left out."""
    choices = [c for c in choices if n_special > 1 or c not in ("pose", "both")]
    every = {c: token_features(tokens, n_special, c) for c in choices}
    return {c: F.normalize(feature, dim=1).numpy() for c, feature in every.items()}


# ------------------------------------------------------------------------------ how alike are poses


def box_poses(people):
    """→ (N, K, 3) in the frame above, float64."""
    centre = people.boxes[:, None, :2] + people.boxes[:, None, 2:] / 2
    xy = (people.keypoints[..., :2] - centre) / people.boxes[:, None, 2:].max(2, keepdims=True)
    return np.concatenate([xy, people.keypoints[..., 2:]], 2).astype(np.float64)


def mirrored(poses, flip):
    """The poses in a mirror, whose left joints are right ones. flip: K joint ids."""
    return poses[:, flip] * (-1, 1, 1)


def likeness(truth, found, boxes, sigmas):
    """How alike are poses `found` (G, K, 2 or 3) to each of truth (N, K, 3)? → OKS, PCK: (N, G).

    Area: .53 of the truth's box. A joint that only the other pose lacks is far away.
    PCK: share of the truth's joints within a tenth of the box's longer side.
    """
    far = found[..., :2].copy()
    if found.shape[-1] == 3:
        far[found[..., 2] == 0] = 1e6
    area = BOX_AREA * boxes[:, 2:].min(1) / boxes[:, 2:].max(1)  # w · h / max(w, h)²
    similar, right = (np.empty((len(truth), len(far))) for _ in range(2))
    for i, pose in enumerate(truth):
        similar[i] = oks(far, pose, area[i], sigmas)
        near = np.linalg.norm(far - pose[:, :2], axis=2) <= PCK_REACH
        right[i] = near[:, pose[:, 2] > 0].mean(1)
    return similar, right


def each_likeness(truth, found, boxes, sigmas):
    """likeness of each pose with its own (N, K, 2) alone → mean OKS, mean PCK."""
    pairs = [likeness(truth[[i]], found[[i]], boxes[[i]], sigmas) for i in range(len(truth))]
    return tuple(float(np.mean(values)) for values in zip(*pairs))


# ---------------------------------------------------------------------------------------- retrieval


def nearest(queries, others, allowed):
    """(N, D), (N, D) of length 1 → (N,): the allowed row of `others` with the largest cosine."""
    return np.where(allowed, queries @ others.T, -np.inf).argmax(1)


def retrieved(features, allowed, values, queries=None):
    """{token: mean of values (N, N) at each picture's nearest stranger}.

    queries: features of other pictures of the same people, to look for; default: these.
    """
    rows, queries = np.arange(len(values)), queries or features
    found = {c: nearest(queries[c], feature, allowed) for c, feature in features.items()}
    return {c: float(values[rows, near].mean()) for c, near in found.items()}


def bounds(allowed, values):
    """→ (chance: the mean over all strangers; best: the best stranger of each, mean)."""
    chance = np.where(allowed, values, 0).sum(1) / allowed.sum(1)
    return float(chance.mean()), float(np.where(allowed, values, -np.inf).max(1).mean())


class HeldOut:
    """Pre-training's own score: does the nearest picture show the same pose?

    cfg: score_annotations (None: no score at all), score_every, height, width.
    """

    def __init__(self, cfg):
        self.every, self.size, self.people = cfg.score_every, (cfg.height, cfg.width), None
        if cfg.score_annotations:
            self.people = read_held(cfg.score_annotations)
            self.allowed, self.measures = strangers(self.people), None

    def due(self, step, total):
        """After this step (from 1)? Every score_every, and at the end."""
        return bool(self.people) and (step == total or self.every > 0 and step % self.every == 0)

    def prepare(self):
        """The pictures and {name: (N, N) likeness}, once."""
        people, self.measures = self.people, {}
        self.images = pictures_of(people, self.size)[0]
        if people.joints:
            sigmas, poses = oks_sigmas(people.joints)[0], box_poses(people)
            self.measures["oks"] = likeness(poses, poses, people.boxes, sigmas)[0]
        groups = groups_of(people)
        same = (groups[:, None] == groups) & self.allowed
        if same.any(1).all():
            self.measures["same_pose"] = same.astype(float)

    def score(self, encoder, ranks):
        """→ {oks_cls, oks_pose, …}, computed by rank 0 while the others wait; {} on those.

        Draws no random number and changes nothing of the encoder.
        """
        row = {}
        if ranks.rank == 0:
            if self.measures is None:
                self.prepare()
            tokens = tokens_of(encoder, self.images, ranks.device)
            features = features_of(tokens, encoder.n_special, ("cls", "pose", "patch_mean"))
            for name, values in self.measures.items():
                found = retrieved(features, self.allowed, values)
                row |= {f"{name}_{token}": value for token, value in found.items()}
                row[f"{name}_chance"], row[f"{name}_best"] = bounds(self.allowed, values)
        common.barrier()
        return row


# ------------------------------------------------------------------------ linear probes, by sklearn


def ridge_joints(feature, poses, groups, folds=5):
    """Joints by ridge regression from a feature, of people whose group is in no training fold.

    feature (N, D), poses (N, K, 3), groups (N,). A joint that a person of the training folds lacks
    stands at its mean; the penalty is chosen within them. → (found, their mean pose): (N, K, 2).
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # In float32 the small penalties would leave a matrix that cannot be solved.
    feature, (N, K, _) = np.asarray(feature, np.float64), poses.shape
    found, middle = np.empty((2, N, K, 2))
    for train, test in GroupKFold(folds).split(feature, groups=groups):
        seen, xy = poses[train, :, 2:] > 0, poses[train, :, :2]
        middle[test] = (xy * seen).sum(0) / np.maximum(1, seen.sum(0))
        target = np.where(seen, xy, middle[test[0]]).reshape(len(train), -1)
        inner = list(GroupKFold(3).split(train, groups=groups[train]))
        model = make_pipeline(StandardScaler(), RidgeCV((0.01, 1, 1e2, 1e4, 1e6), cv=inner))
        found[test] = model.fit(feature[train], target).predict(feature[test]).reshape(-1, K, 2)
    return found, middle


def logistic_attributes(train, labels, test):
    """(N, D), (N, A) 0/1, (M, D) → (M, A) probabilities: a logistic regression per attribute.

    Both classes weigh the same, as mA counts them. An attribute with one class in training gets it.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train)
    train, test = scaler.transform(train), scaler.transform(test)
    found = np.empty((len(test), labels.shape[1]))
    for a, y in enumerate(labels.T):
        found[:, a] = y[0]
        if (y != y[0]).any():
            # C = .01 is ours: pictures of a person share labels, so the sample is small.
            model = LogisticRegression(C=0.01, class_weight="balanced", solver="newton-cholesky")
            found[:, a] = model.fit(train, y).predict_proba(test)[:, 1]
    return found


# ------------------------------------------------------------------------------------------ patches


def correspondence(patches, keypoints, pairs, reach, patch):
    """The patch under a joint of one person → its nearest patch in another's picture.

    patches (N, h, w, D) of length 1; keypoints (N, K, 3) input px; pairs (M, 2) rows; reach (N, 2)
    input px, across and down; patch: its side in px. A joint counts that both inputs show.
    → {patches: share of joints whose found patch's centre is within reach of the same joint;
    same_place: the patch at the same place in the other picture; chance: any patch; best: the patch
    under the joint itself}.
    """
    N, h, w, D = patches.shape
    centres = (np.stack(np.meshgrid(np.arange(w), np.arange(h)), -1).reshape(-1, 2) + 0.5) * patch
    centres = centres - 0.5  # pixel centres are whole numbers
    xy = keypoints[..., :2]
    edge = w * patch - 0.5, h * patch - 0.5
    inside = (keypoints[..., 2] > 0) & ((xy >= -0.5) & (xy < edge)).all(2)
    column, row = (np.clip((xy + 0.5) // patch, 0, (w - 1, h - 1)).astype(int)).transpose(2, 0, 1)
    under, flat = row * w + column, patches.reshape(N, h * w, D)  # (N, K) patch ids
    counts = dict(patches=0, same_place=0, chance=0.0, best=0)
    joints = 0
    for a, b in pairs:
        both = np.flatnonzero(inside[a] & inside[b])
        away = (centres[:, None] - xy[b, both]) / reach[b]
        near = np.linalg.norm(away, axis=2) <= 1  # (h·w, joints)
        ids, j = under[a, both], np.arange(len(both))
        answer = (flat[a, ids] @ flat[b].T).argmax(1)
        counts["patches"] += near[answer, j].sum()
        counts["same_place"] += near[ids, j].sum()
        counts["chance"] += near.mean(0).sum()
        counts["best"] += near.any(0).sum()
        joints += len(both)
    return {name: float(count / max(1, joints)) for name, count in counts.items()}
