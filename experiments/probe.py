"""What do frozen tokens know? No training but small linear models; minutes, little noise.

(a) pose retrieval: the nearest picture of another person, by each token; do both stand alike?
(b) person ReID without training   (c) attributes by logistic regression
(d) joints by ridge regression     (e) (a) for the picture in a mirror
(f) correspondence: the patch under a joint, its nearest patch in another person's picture

  python experiments/probe.py encoders=runs/demo/pretrain/encoder.safetensors,none \\
         poses=runs/demo/pose_val/annotations.json market=runs/demo/people

Inputs   encoder.safetensors of this project or published ViT weights; `none`: random ones. COCO
         keypoint JSON, Market folders, attribute CSVs: whatever is given is probed.
Outputs  in `out`: probe.json, probe.png, config.yaml; one table on the screen.

Poses are compared in their boxes' frame: xy from the box's centre over its longer side. OKS with
COCO's σ and .53 of the box's area; PCK within a tenth of the box's longer side. A joint that the
found person lacks is wrong. Beside (a), (d), (e), (f): chance, and the best possible.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import plumbing.quiet  # noqa: F401  first: Ctrl-C while the libraries load

# isort: split
from types import SimpleNamespace

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.utils.data import DataLoader

import common
from common import UserError
from drawing.curves import COLOURS
from formats.attributes import check as check_attributes
from formats.attributes import read_csv
from formats.market import read_data
from formats.weights import read_encoder
from model import SIZES
from plumbing.config import MACHINE, Key, read_config
from tasks import probe
from tasks.attributes import AttributePictures, attribute_metrics
from tasks.features import ResizedPictures
from tasks.pose_metrics import oks_sigmas
from tasks.ranking import evaluate_features

KEYS = dict(
    out=Key("runs/probe", "run folder"),
    encoders=Key([], "encoder files to compare, ours or published; none: random weights"),
    names=Key([], "a name for each (default: the file's folder)"),
    size=Key("base", "size of published and random encoders", choices=tuple(SIZES)),
    patch=Key(16, "patch side of published and random encoders", low=1),
    height=Key(256, "input height of published and random encoders", low=16),
    width=Key(128, "input width of published and random encoders", low=16),
    poses=Key([], "COCO JSON files of held-out people: (a), (d), (e), (f)"),
    people=Key(400, "people of each file at most, evenly spread, pose groups whole", low=20),
    pairs=Key(2000, "pairs of people for (f)", low=1),
    market=Key(None, "Market-1501's root or one like it, query and gallery: (b)"),
    attributes_train=Key(None, "CSV of attributes to fit on: (c)"),
    attributes_test=Key(None, "CSV of attributes to report on: (c)"),
) | {name: MACHINE[name] for name in ("seed", "device", "workers")}  # fmt: skip

# Measure → what stands above its column.
MEASURES = dict(
    oks="(a) OKS", pck="(a) PCK", same_pose="(a) same", mirror_oks="(e) OKS",
    unmirrored_oks="(e) as is", ridge_oks="(d) OKS", ridge_pck="(d) PCK", patch_pck="(f) PCK",
    mAP="(b) mAP", mA="(c) mA",
)  # fmt: skip
TOKENS = dict(
    cls="[CLS]", pose="[POSE]", both="both", patch_mean="patch mean", patches="patches",
    same_place="same place",
)  # fmt: skip


def main():
    cfg = read_config(KEYS, __doc__)
    ranks = common.start_ranks(cfg.device)
    check(cfg)
    names = cfg.names or [name_of(path) for path in cfg.encoders]
    sets = {Path(path).parent.name: path for path in cfg.poses}
    if len(set(names)) < len(names) or len(sets) < len(cfg.poses):
        raise UserError("two encoders or two sets have one name; give names=, or copy a folder")
    held = {name: probe.read_held(path, cfg.people) for name, path in sets.items()}
    for name, people in held.items():
        if people.joints and probe.groups_of(people).max() < 4:
            what = f"{sets[name]} has {probe.groups_of(people).max() + 1} pose groups"
            raise UserError(f"{what}; (d) predicts each fifth from the others and needs 5")
    market = read_data(cfg.market, train=None)[1:3] if cfg.market else None
    labels = read_labels(cfg)
    encoders = [load(cfg, path) for path in cfg.encoders]
    if common.open_run(cfg, KEYS, ranks) == "finished":
        return
    found = {}  # encoder, or "chance" and "best possible" → {(measure, token, set): fraction}
    own = set()  # bounds that depend on an encoder's patches
    for name, (encoder, about) in zip(names, encoders):
        print(f"{name}: {about}", file=sys.stderr)
        encoder, row = encoder.to(ranks.device).eval(), found.setdefault(name, {})
        for title, people in held.items():
            shown = probe_poses(cfg, encoder, people, ranks.device)
            for (level, measure, token), value in shown.items():
                key, figures = (measure, token, title), found.setdefault(level or name, {})
                if figures.setdefault(key, value) != value:
                    own.add((level, key))
        if market:
            row |= probe_reid(cfg, encoder, *market, ranks.device)
        if labels:
            row |= probe_attributes(cfg, encoder, *labels, ranks.device)
    for level, key in own:
        del found[level][key]
    if own:
        print("(f): these encoders' patches differ, and so its bounds; for them ask one at a time")
    levels = {name: found[name] for name in ("chance", "best possible") if name in found}
    found = levels | {name: found[name] for name in names}
    out = Path(cfg.out)
    print(table(found))
    draw(found, out / "probe.png")
    flat = {n: {"_".join(filter(None, key)): v for key, v in r.items()} for n, r in found.items()}
    common.write_json(out / "probe.json", flat)
    common.finish_run(out)
    print(f"wrote {out}/probe.json, probe.png")


def name_of(path):
    return path if path == "none" else Path(path).parent.name or Path(path).stem


def read_labels(cfg):
    """→ (training Split, test Split), or None."""
    if not cfg.attributes_train:
        return None
    splits, names = [], []
    for path in (cfg.attributes_train, cfg.attributes_test):
        own, split = read_csv(SimpleNamespace(images=None), path)
        if not len(split.files):
            raise UserError(f"{path} has no row with a picture")
        check_attributes(split, own, "CSV", path)
        splits.append(split)
        names.append(own)
    if names[0] != names[1]:
        raise UserError(f"{cfg.attributes_train} and {cfg.attributes_test} differ in attributes")
    return splits


def load(cfg, path):
    """A file, or none → (ViT, a sentence). A file of ours knows its size and input."""
    common.seed_all(common.WEIGHTS, cfg.seed)
    return read_encoder(cfg, None if path == "none" else path)


# ------------------------------------------------------------------------------------------- probes


def probe_poses(cfg, encoder, people, device):
    """(a), (d), (e), (f) → {(level, measure, token): fraction}; level None: of this encoder."""
    S, p = encoder.n_special, encoder.patch_size
    images, keypoints, scale = probe.pictures_of(people, encoder.image_size)
    tokens = probe.tokens_of(encoder, images, device)
    features = probe.features_of(tokens, S)
    allowed, groups = probe.strangers(people), probe.groups_of(people)
    out = {}

    def score(measure, values, queries=None):
        found = probe.retrieved(features, allowed, values, queries)
        out.update({(None, measure, token): value for token, value in found.items()})
        chance, best = probe.bounds(allowed, values)
        out["chance", measure, ""], out["best possible", measure, ""] = chance, best

    same = (groups[:, None] == groups) & allowed
    if same.any(1).all():
        score("same_pose", same.astype(float))
    if not people.joints:
        return out
    sigmas, poses, boxes = oks_sigmas(people.joints)[0], probe.box_poses(people), people.boxes
    oks, pck = probe.likeness(poses, poses, boxes, sigmas)  # (a)
    score("oks", oks)
    score("pck", pck)
    # (e) Looked for with the picture in a mirror. A token that does not know left from right finds
    # the unmirrored pose as well as the mirrored one.
    other = probe.mirrored(poses, people.flip)
    turned = probe.features_of(probe.tokens_of(encoder, images.flip(3), device), S)
    score("mirror_oks", probe.likeness(other, poses, boxes, sigmas)[0], turned)
    score("unmirrored_oks", oks, turned)
    for token, feature in features.items():  # (d)
        joints, middle = probe.ridge_joints(feature, poses, groups)
        for level, name, xy in ((None, token, joints), ("chance", "", middle)):
            one = probe.each_likeness(poses, xy, boxes, sigmas)
            out[level, "ridge_oks", name], out[level, "ridge_pck", name] = one
    out["best possible", "ridge_oks", ""] = out["best possible", "ridge_pck", ""] = 1.0
    patches = torch.nn.functional.normalize(tokens[:, S:], dim=2).numpy()  # (f)
    patches = patches.reshape(len(patches), *encoder.grid, -1)
    reach = probe.PCK_REACH * boxes[:, 2:].max(1, keepdims=True) * scale
    pairs = np.argwhere(allowed)
    rng = common.rng_of(common.PICTURE, cfg.seed)
    pairs = pairs[rng.permutation(len(pairs))[: cfg.pairs]]
    shares = probe.correspondence(patches, keypoints, pairs, reach, p)
    for name in ("patches", "same_place"):
        out[None, "patch_pck", name] = shares[name]
    out["chance", "patch_pck", ""] = shares["chance"]
    out["best possible", "patch_pck", ""] = shares["best"]
    return out


def embed(cfg, encoder, dataset, device):
    """Pictures → {token: (N, D) of length 1}."""
    parts = []
    for images in DataLoader(dataset, 128, num_workers=cfg.workers):
        images = images["image"] if isinstance(images, dict) else images
        tokens = probe.tokens_of(encoder, images, device)
        parts.append(probe.features_of(tokens, encoder.n_special))
    return {token: np.concatenate([part[token] for part in parts]) for token in parts[0]}


def probe_reid(cfg, encoder, query, gallery, device):
    """(b) → {("mAP", token, ""): fraction}."""
    sets = []
    for part in (query, gallery):
        rows = np.arange(len(part.files))
        pictures = ResizedPictures(part, encoder.image_size, rows)
        sets.append((part, embed(cfg, encoder, pictures, device)))
    (q, q_features), (g, g_features) = sets
    out = {}
    for token in q_features:
        known = q.ids, q.cameras, g_features[token], g.ids, g.cameras
        out["mAP", token, ""] = evaluate_features(q_features[token], *known)["mAP"]
    return out


def probe_attributes(cfg, encoder, train, test, device):
    """(c) → {("mA", token, ""): fraction}."""
    parts = [AttributePictures(split, encoder.image_size) for split in (train, test)]
    fitted, asked = (embed(cfg, encoder, part, device) for part in parts)
    out = {}
    for token in fitted:
        found = probe.logistic_attributes(fitted[token], train.labels, asked[token])
        out["mA", token, ""] = attribute_metrics(found, test.labels)["mA"]
    return out


# ----------------------------------------------------------------------------------- table, picture


def columns_of(found):
    """[(measure, set)] in the order of MEASURES, those that anybody has."""
    keys = {(measure, title) for row in found.values() for measure, _, title in row}
    order = list(MEASURES)
    return sorted(keys, key=lambda key: (key[1], order.index(key[0])))


def table(found):
    """Rows: chance, best possible, then every encoder's tokens. Columns: measures, set by set."""
    columns = columns_of(found)
    lines = [f"{'':34}" + "".join(f"{title[:9]:>10}" for _, title in columns)]
    lines += [f"{'':34}" + "".join(f"{MEASURES[measure]:>10}" for measure, _ in columns)]
    for name, row in found.items():
        for token in ["", *TOKENS]:
            cells = [row.get((measure, token, title)) for measure, title in columns]
            if any(cell is not None for cell in cells):
                texts = [f"{'–' if cell is None else f'{cell:.3f}':>10}" for cell in cells]
                label = f"{name[-22:]:23}{TOKENS.get(token, '')}"
                lines.append(f"{label:34}" + "".join(texts))
    return "\n".join(lines)


def draw(found, path):
    """A panel for each column of the table: encoders from left to right, a colour per token."""
    columns, names = columns_of(found), [n for n in found if n not in ("chance", "best possible")]
    across = min(4, len(columns))
    down = -(-len(columns) // across)
    figure = Figure((3.4 * across, 2.6 * down + 0.6), layout="constrained")
    seen = {}
    for number, (measure, title) in enumerate(columns, 1):
        axis = figure.add_subplot(down, across, number)
        axis.set_title(f"{MEASURES[measure]} {title}", fontsize=10)
        for level, style in (("chance", ":"), ("best possible", "--")):
            value = found.get(level, {}).get((measure, "", title))
            if value is not None:
                axis.axhline(value, color="0.4", linestyle=style, linewidth=1.2)
        for t, (token, label) in enumerate(TOKENS.items()):
            values = [found[name].get((measure, token, title), np.nan) for name in names]
            if not np.isnan(values).all():
                place = np.arange(len(names)) + (t - 2.5) * 0.1
                seen[label] = axis.plot(place, values, "o", color=COLOURS[t], markersize=5)[0]
        axis.set_xticks(range(len(names)), [name[-14:] for name in names], fontsize=8, rotation=20)
        axis.set_xlim(-0.6, len(names) - 0.4)
        axis.tick_params(labelsize=8)
        axis.grid(axis="y", color="0.92")
    where = dict(loc="outside upper left", ncols=6, frameon=False, fontsize=9)
    title = "dotted: chance, dashed: best possible"
    figure.legend(seen.values(), seen.keys(), title=title, **where)
    common.write_atomic(path, lambda part: figure.savefig(part, format="png", dpi=110))


def check(cfg):
    """Settings that are valid one by one but not together."""
    if not cfg.encoders:
        raise UserError("encoders= names no file; give encoder.safetensors, or none")
    if not (cfg.poses or cfg.market or cfg.attributes_train):
        raise UserError("nothing to probe on; give poses=, market= or attributes_train=")
    if bool(cfg.attributes_train) != bool(cfg.attributes_test):
        raise UserError("attributes_train= and attributes_test= need each other")
    if cfg.names and len(cfg.names) != len(cfg.encoders):
        raise UserError(f"names= has {len(cfg.names)} names for {len(cfg.encoders)} encoders")


if __name__ == "__main__":
    common.run_stage(main)
