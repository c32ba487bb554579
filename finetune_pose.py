"""Stage 3a of GenPoCCL: encoder → 2-D pose, top-down, one heat map per joint [ViTPose, HAP].

Inputs   people with joints (COCO keypoint JSON of any joint set, or MPII's list) and an encoder:
         ours, MAE's, HAP's or another published ViT, or none (from scratch).
Outputs  in `out`: model.safetensors (encoder + head), encoder.safetensors, metrics.json (OKS-AP/AR,
         PCK, PCKh), results.json (COCO's format), overlays.png (truth beside prediction), pck.png,
         curves.png, last.pt, log.jsonl, config.yaml; with predict=: predictions.json, overlays.png.

  python finetune_pose.py --cfg configs/finetune_pose_demo.yaml \\
         encoder=runs/demo/pretrain/encoder.safetensors        # laptop, minutes: AP .277, PCK .516
  torchrun --nproc_per_node=8 finetune_pose.py --cfg configs/finetune_pose_coco.yaml \\
         encoder=ENCODER          # 8 A100, a day [ViTPose]: HAP publishes AP .759; not run here
  python finetune_pose.py weights=runs/demo/pose_pretrained/model.safetensors eval_only=true \\
         val_annotations=runs/demo/pose_val/annotations.json out=OUT
  python finetune_pose.py weights=runs/demo/pose_pretrained/model.safetensors predict=FOLDER out=OUT

The last epoch is reported, never the best one on the test set.
Legend: B people on this rank · N people of a file · K joints · H, W input · h, w heat map.
"""

import common  # first: Ctrl-C while the libraries load

# isort: split
import json
import sys
from pathlib import Path

import numpy as np
import pycocotools  # noqa: F401  if it is missing: here, not after the training
import torch

from common import UserError
from drawing import results as sheets
from formats import keypoints as readers
from formats.weights import ENCODER, build_encoder, meta_of, save, take_settings
from model import normalize
from plumbing.config import JOB, MACHINE, Key, check_job, read_config
from tasks import pose
from tasks import pose_metrics as metrics

KEYS = dict(
    out=Key("runs/pose", "run folder; eval_only: runs/pose_eval, predict: runs/pose_predict"),
    # data
    train_annotations=Key(None, "COCO keypoint JSON, or MPII's list"),
    train_images=Key(None, "its pictures (default: `images` beside it, or its own folder)"),
    val_annotations=Key(None, "the same, to evaluate on"),
    val_images=Key(None, "its picture folder"),
    boxes=Key(None, "person boxes to evaluate or predict at (COCO detections JSON); default: the "
              "annotated ones, and whole pictures for predict"),
    mpii_mat=Key(None, "MPII's ground-truth .mat: official head sizes and joints for PCKh"),
    limit=Key(0, "train on the first so many people only; 0 = all", low=0),
    max_bad=Key(0, "missing, empty or truncated pictures left out at most, counted", low=0),
    max_bad_boxes=Key(0, "boxes without area on their picture left out at most, counted", low=0),
    height=Key(256, "input height", "[ViTPose]", low=16),
    width=Key(192, "input width", "[ViTPose]", low=16),
    padding=Key(1.25, "factor of boxes after taking the input's aspect", "[ViTPose]", low=1),
    flip=Key(0.5, "probability of a mirror image", "[ViTPose]", low=0, high=1),
    half_body=Key(0.3, "probability of an upper or lower half, with > 8 visible joints",
                  "[ViTPose]", low=0, high=1),
    scale=Key(0.5, "σ of the random scale clip(N(1, σ), 1 ± σ)", "[ViTPose]", low=0, high=0.9),
    rotation=Key(40.0, "σ of the random rotation in degrees, clipped at 2σ", "[ViTPose]",
                 low=0, high=180),
    rotation_p=Key(0.6, "probability of a rotation", "[ViTPose]", low=0, high=1),
    shift=Key(0.3, "probability of a box moved by up to a fifth of its sides", "[ViTPose]",
              low=0, high=1),
    batch=Key(512, "people in a global batch", "[ViTPose]", low=1),
    # model
    tokens=Key("drop", "special tokens: dropped behind the encoder; none enters it; [POSE] or "
               "both added to patches", "[silent]; none [ViTPose]", pose.POSE_TOKENS),
    head=Key("classic", "classic: two deconvolutions; simple: bilinear × 4", "[ViTPose]",
             ("classic", "simple")),
    sigma=Key(2.0, "σ of a joint's Gaussian in heat-map px", "[ViTPose]", low=0.5),
    drop_path=Key(0.3, "drop path rate of the last block", "[ViTPose]; [HAP] .29 on COCO",
                  low=0, high=0.9),
    compile=Key(False, "torch.compile the encoder"),
    # optimiser
    lr=Key(5.0e-4, "AdamW learning rate at `batch`", "[ViTPose]; HAP 2e-4", low=0),
    weight_decay=Key(0.1, "AdamW weight decay, not on 1-D parameters, tokens, positions",
                     "[ViTPose], which has no tokens", low=0),
    beta2=Key(0.999, "AdamW β2 (β1 = .9)", "[ViTPose]", low=0, high=0.99999),
    layer_decay=Key(0.75, "learning rate factor per layer from the top", "[ViTPose]; HAP .8",
                    low=0.01, high=1),
    clip_grad=Key(1.0, "largest gradient norm; 0 = no clipping", "[ViTPose]", low=0),
    schedule=Key("step", "step: × 0.1 at each milestone; or cosine", "[ViTPose]",
                 ("step", "cosine")),
    milestones=Key([170, 200], "epochs of the step schedule", "[ViTPose]", of=int, low=0),
    epochs=Key(210, "passes over the training people", "[ViTPose]", low=1),
    warmup_steps=Key(500, "linear warm-up", "[ViTPose]", low=0),
    # evaluation
    flip_test=Key(True, "average with the mirrored picture's heat maps", "[ViTPose]"),
    nms=Key(0.9, "OKS from which a pose of a picture is a duplicate of a better one", "[HRNet]",
            low=0, high=1),
    eval_every=Key(0, "epochs between evaluations on the way (logged only); 0 = only at the end",
                   low=0, may_change=True),
) | JOB | ENCODER | MACHINE  # fmt: skip


def main():
    cfg = read_config(KEYS, __doc__)
    ranks = common.start_ranks(cfg.device, cfg.precision)
    check(cfg)
    own = "joints", "tokens", "head", "padding"
    meta, about_weights = take_settings(cfg, "finetune_pose.py", *own)
    if cfg.weights:
        joints, skeleton = readers.joint_set(meta, cfg.weights)
    else:
        dataset, batches, about = build_data(cfg, ranks)
        joints, skeleton = dataset.people.joints, dataset.people.skeleton
    val = OwnPictures(cfg, joints, skeleton) if cfg.predict else Validation(cfg)
    check_joints(cfg, joints, val.people.joints)
    common.seed_all(common.WEIGHTS, cfg.seed)
    model, about_encoder = build_model(cfg, len(joints))
    common.check_memory(model, cfg.batch // ranks.world, ranks.device)
    model.to(ranks.device)
    if cfg.compile:
        model.encoder.compile()
    if common.open_run(cfg, KEYS, ranks) == "finished":
        return
    if cfg.weights:
        if ranks.rank == 0:
            print(f"{about_weights}; {val.about}", file=sys.stderr)
        return report(cfg, model, val, ranks)

    optimizer = build_optimizer(cfg, model)
    first = common.resume(Path(cfg.out) / "last.pt", model, optimizer)["step"]
    total = cfg.epochs * batches.steps_per_epoch
    log = common.StepLog(cfg, ranks, dataset, batches, first, total)
    log.say(f"{about_encoder}; {about}, {total} steps of {cfg.batch}; {val.about}")
    loader = common.training_loader(dataset, batches.steps(first, total), cfg.workers, ranks.device)
    runner = common.distributed(model.train(), ranks.device)
    milestones = [epoch * batches.steps_per_epoch for epoch in cfg.milestones]
    map_size = tuple(4 * n for n in model.encoder.grid)  # both heads enlarge the grid fourfold

    # Nothing in a step waits for the device: its figures are read while the next step runs.
    for step, sample in enumerate(loader, first):
        if cfg.schedule == "step":
            lr = common.stepwise_rate(step, cfg.warmup_steps, cfg.lr, milestones)
        else:
            lr = common.learning_rate(step, total, cfg.warmup_steps, cfg.lr)
        common.set_learning_rate(optimizer, lr)
        images = normalize(sample["image"].to(ranks.device, non_blocking=True))
        keypoints = sample["keypoints"].to(ranks.device, non_blocking=True)
        # Drop path, for each picture by itself: every block has two branches to drop.
        key = common.DROP_PATH, cfg.seed, step
        noise = common.rank_noise(key, cfg.batch, 2 * model.encoder.depth, ranks)
        with common.autocast(ranks.device, cfg.precision):
            heat = runner(images, noise.T)  # (B, K, h, w)
        # A Gaussian at each annotated joint, and 0 as weight of a joint that is missing.
        target, weight = pose.heat_maps(keypoints, dataset.size, map_size, cfg.sigma)
        loss = pose.heat_map_loss(heat, target, weight)
        loss.backward()
        largest = cfg.clip_grad or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), largest)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        bad = ~heat.detach().float().sum((1, 2, 3)).isfinite()
        log.record(step, lr, {"loss": loss, "grad_norm": norm}, sample["index"], bad)
        # Before a save: a kill in between repeats the steps, and this line of the log with them.
        epoch, rest = divmod(step + 1, batches.steps_per_epoch)
        if cfg.eval_every and rest == 0 and epoch % cfg.eval_every == 0 and step + 1 < total:
            log.flush()
            found = find_poses(cfg, model, val.people, ranks)
            if ranks.rank == 0:
                log.write(step=step + 1, epoch=epoch, **val.figures(found)[0])
            model.train()
        if log.saves(step):
            log.flush()  # never save a broken model
            if ranks.rank == 0:
                save(cfg.out, model.encoder, model, optimizer, step + 1)
            log.stop_if_asked(step)

    log.close()
    if ranks.rank == 0:
        save_model(cfg, model, joints, skeleton)
        sheets.draw_curves([cfg.out], Path(cfg.out) / "curves.png")
    report(cfg, model, val, ranks)


# ---------------------------------------------------------------------------------- data and model


def build_data(cfg, ranks):
    """→ (training pictures, batch sampler, a clause about what was read)."""
    people, notes = readers.read_pose_file(cfg.train_annotations, cfg.train_images, limits_of(cfg))
    if cfg.limit:
        people = people.take(np.arange(min(cfg.limit, len(people.files))))
    dataset = pose.PosePictures(cfg, people, training=True)
    batches = common.EpochBatches(len(dataset), cfg.batch, cfg.seed, ranks)
    about = f"{len(dataset)} people{readers.said(notes)}, {len(people.joints)} joints"
    return dataset, batches, about


def limits_of(cfg):
    return readers.Limits(max_bad=cfg.max_bad, max_bad_boxes=cfg.max_bad_boxes)


def build_model(cfg, n_joints):
    """→ (PoseModel with the encoder's or a finished run's weights, a sentence about it)."""
    encoder, about = build_encoder(cfg, cfg.tokens in pose.READ_POSE, cfg.drop_path)
    head = {"classic": pose.ClassicHead, "simple": pose.SimpleHead}[cfg.head]
    model = pose.PoseModel(encoder, head(encoder.width, n_joints), cfg.tokens)
    if cfg.weights:
        common.load_weights(model, common.load_checkpoint(cfg.weights), cfg.weights)
    return model, about


def build_optimizer(cfg, model):
    depth = model.encoder.depth
    groups = common.parameter_groups(model, cfg.weight_decay, cfg.layer_decay, depth)
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, cfg.beta2), fused=True)


def save_model(cfg, model, joints, skeleton):
    """Encoder and head in one file that eval_only and predict can use without any config."""
    own = dict(joints=json.dumps(joints), skeleton=json.dumps(skeleton))
    own |= dict(tokens=cfg.tokens, head=cfg.head, padding=cfg.padding)
    common.save_weights(Path(cfg.out) / "model.safetensors", model, **meta_of(model.encoder), **own)


# --------------------------------------------------------------------------- evaluation and predict


@torch.no_grad()
def find_poses(cfg, model, people, ranks):
    """The pose in each box, once whatever the number of ranks.

    → (N, K, 3) float32 x, y in picture px and score, on every rank. Flip test: the mirrored
    picture's heat maps are mirrored back and averaged; UDP's grid is its own mirror image, so
    nothing is shifted.
    """
    dataset = pose.PosePictures(cfg, people, training=False)
    own, batch = common.rank_share(len(dataset), ranks), max(1, min(cfg.batch // ranks.world, 256))
    batches = [[(0, i) for i in own[k : k + batch]] for k in range(0, len(own), batch)]
    model.eval()
    parts = []
    for sample in common.training_loader(dataset, batches, cfg.workers, ranks.device):
        images = normalize(sample["image"].to(ranks.device, non_blocking=True))
        with common.autocast(ranks.device, cfg.precision):
            heat = model(images).float()
            if cfg.flip_test:
                heat = (heat + model(images.flip(3)).float().flip(3)[:, people.flip]) / 2
        found = pose.decode(heat, dataset.size).cpu().numpy()
        for matrix, joints in zip(sample["matrix"].numpy(), found):
            joints[:, :2] = pose.to_picture(matrix, joints[:, :2])
        parts.append(found)
    return np.concatenate(common.gather_objects(parts))


def report(cfg, model, val, ranks):
    """The end of every job: poses are found by all ranks, written and drawn by rank 0."""
    found = find_poses(cfg, model, val.people, ranks)
    if ranks.rank == 0:
        val.report(found)
        common.finish_run(cfg.out)
    common.barrier()


class Validation:
    """What is evaluated on: `people` are the boxes, `truth` the annotated people.

    They are the same people, unless boxes= names a detector's.
    """

    def __init__(self, cfg):
        self.cfg = cfg
        source, limits = (cfg.val_annotations, cfg.val_images), limits_of(cfg)
        self.truth, notes, self.document = readers.read_truth(*source, limits)
        self.heads = readers.heads_of(cfg.mpii_mat, self.truth, notes) if cfg.mpii_mat else None
        self.about = f"{len(self.truth.files)} people to evaluate{readers.said(notes)}"
        images, bad = self.document["images"], set(notes["bad"])
        self.bad_images = {image["id"] for image in images if image["file_name"] in bad}
        self.sigmas, self.sigma_source = metrics.oks_sigmas(self.truth.joints)
        self.people, self.box_score = self.truth, np.ones(len(self.truth.files))
        if cfg.boxes:
            pictures = readers.pictures_of(self.document, self.bad_images)
            read = readers.read_boxes(cfg.boxes, pictures, self.truth, limits)
            self.people, self.box_score, about = read
            self.about += f", {about}"

    def results(self, found):
        """COCO keypoint results of poses (N, K, 3): score = box score × mean joint score.

        Duplicates are removed, among poses in annotated boxes too [HRNet].
        """
        score = metrics.pose_score(self.box_score, found[..., 2])
        keep = metrics.without_duplicates(self.people, found, score, self.cfg)
        return readers.coco_results(self.people, found, score, keep)

    def figures(self, found):
        """→ (name → fraction, everything for metrics.json, OKS (N,) or None, COCO results)."""
        results, truth = self.results(found), self.truth
        flat = metrics.coco_metrics(self.document, results, self.sigmas, self.bad_images)
        full = dict(people=len(truth.files), read=self.about)
        full |= dict(boxes=self.cfg.boxes or "ground truth", oks_sigmas=self.sigma_source) | flat
        if self.cfg.boxes:  # PCK compares person with person: it needs the annotated boxes
            return flat, full, None, results
        xy, annotated = found[..., :2].astype(np.float64), truth.keypoints.astype(np.float64)
        share, more = metrics.pck_metrics(xy, annotated, truth.joints, self.heads)
        oks = metrics.oks(xy, annotated, truth.area, self.sigmas)
        return flat | share, full | more, oks, results

    def report(self, found):
        """Write metrics.json, results.json, overlays.png and pck.png; print the figures."""
        flat, full, oks, results = self.figures(found)
        out, truth = Path(self.cfg.out), self.truth
        common.write_json(out / "results.json", results, indent=None)
        common.write_json(out / "metrics.json", full)
        if "PCK@.2_per_joint" in full:
            title = f"PCK@.2 of torso, {full['PCK@.2']:.3f} overall"
            sheets.pck_chart(full["PCK@.2_per_joint"], out / "pck.png", title)
        examples = self.examples(found, oks)
        sheets.pose_sheet(examples, truth.skeleton, truth.joints, out / "overlays.png")
        if "published" not in self.sigma_source:
            print(f"OKS uses {self.sigma_source}")
        line = "  ".join(f"{name} {v:.4f}" for name, v in flat.items() if v is not None)
        print(f"{self.cfg.out}: {line}")

    def examples(self, found, oks):
        """The six worst and the six best people by OKS; with boxes= by the best pose of each.

        → (pictures, boxes, truth, predictions, labels)
        """
        truth = self.truth
        if oks is None:
            found, oks = metrics.nearest_poses(truth, self.people.image_id, found, self.sigmas)
        order = np.argsort(oks, kind="stable")
        order = order[np.isfinite(oks[order])]  # MPII lists people without a joint
        rows = list(dict.fromkeys([*order[:6], *order[::-1][:6]]))
        dataset = pose.PosePictures(self.cfg, truth, training=False)
        labels = [f"OKS {oks[i]:.2f} · {truth.files[i].decode()}" for i in rows]
        pictures = [dataset.picture(i) for i in rows]
        return pictures, truth.boxes[rows], truth.keypoints[rows], found[rows], labels


class OwnPictures:
    """A user's own pictures: `people` are whole pictures, or the boxes of boxes=."""

    def __init__(self, cfg, joints, skeleton):
        self.cfg = cfg
        self.people, pictures = readers.read_own(cfg.predict, joints, skeleton, limits_of(cfg))
        self.box_score = np.ones(len(self.people.files))
        self.about = f"{len(self.people.files)} pictures"
        if cfg.boxes:
            read = readers.read_boxes(cfg.boxes, pictures, self.people, limits_of(cfg))
            self.people, self.box_score, about = read
            self.about += f", {about}"

    def report(self, found):
        """predictions.json, a COCO keypoint file, and overlays.png of the surest 24 people."""
        people, score = self.people, metrics.pose_score(self.box_score, found[..., 2])
        if self.cfg.boxes:
            keep = metrics.without_duplicates(people, found, score, self.cfg)
            people, found, score = people.take(keep), found[keep], score[keep]
        out, document = Path(self.cfg.out), readers.coco_document(people, found, score)
        common.write_json(out / "predictions.json", document, indent=None)
        rows = np.argsort(-score, kind="stable")[:24]
        dataset = pose.PosePictures(self.cfg, people, training=False)
        labels = [f"score {score[i]:.2f} · {people.files[i].decode()}" for i in rows]
        drawn = [dataset.picture(i) for i in rows], people.boxes[rows], None, found[rows], labels
        sheets.pose_sheet(drawn, people.skeleton, people.joints, out / "overlays.png")
        n = len(set(people.files.tolist()))
        print(f"{len(found)} people in {n} pictures: {out}/predictions.json, overlays.png")


# ------------------------------------------------------------------------------------------- checks


def check(cfg):
    """Settings that are valid one by one but not together."""
    check_job(cfg, KEYS)
    if not cfg.weights and not cfg.train_annotations:
        raise UserError("train_annotations= names no file; give a COCO keypoint JSON")
    if not cfg.predict and not cfg.val_annotations:
        raise UserError("val_annotations= names no file; give a COCO keypoint JSON")
    if cfg.predict and not Path(cfg.predict).exists():
        raise UserError(f"predict={cfg.predict} is no folder of pictures and no picture")


def check_joints(cfg, joints, others):
    """Trained and evaluated joints must be the same, in the same order."""
    if joints != others:
        same = [a == b for a, b in zip(joints, others)]
        j = [*same, False].index(False)  # the first that differs
        a, b = (f"{len(n)} joints, number {j + 1} {(*n, 'none')[j]}" for n in (joints, others))
        source = cfg.weights or cfg.train_annotations
        raise UserError(f"joint sets differ: {source} has {a}, {cfg.val_annotations} {b}")


if __name__ == "__main__":
    common.run_stage(main)
