"""Stage 3a of GenPoCCL: encoder → 2-D pose, top-down, one heat map per joint (ViTPose's recipe, as HAP evaluates).

Inputs   people with joints (COCO keypoint JSON of any joint set, or MPII's list) and an encoder: ours, MAE's, HAP's,
         timm's or torchvision's ViT, or none (from scratch).
Outputs  in `out`: model.safetensors (encoder + head), encoder.safetensors, metrics.json (OKS-AP/AR, PCK, PCKh),
         results.json (COCO keypoint results), overlays.png (truth beside prediction), pck.png, last.pt, log.jsonl.

  python finetune_pose.py --cfg configs/finetune_pose_demo.yaml encoder=runs/demo/pretrain/encoder.safetensors
  torchrun --nproc_per_node=8 finetune_pose.py --cfg configs/finetune_pose_coco.yaml encoder=ENCODER
  python finetune_pose.py weights=runs/demo/pose_pretrained/model.safetensors eval_only=true \\
         val_annotations=runs/demo/pose_val/annotations.json out=OUT
  python finetune_pose.py weights=runs/demo/pose_pretrained/model.safetensors predict=FOLDER out=OUT

The last epoch is reported, never the best one on the test set.
Legend: B people on this rank · M all ranks · K joints · N patches · D width · S special tokens · H, W input · h, w map.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pycocotools  # noqa: F401  known to be missing now, not after the training
import torch
from torch.utils.data import DataLoader

from common import (
    DROP_PATH,
    WEIGHTS,
    Figures,
    Log,
    autocast,
    barrier,
    distributed,
    gather_rows,
    learning_rate,
    load_checkpoint,
    load_weights,
    open_run,
    parameter_groups,
    rank_noise,
    rank_share,
    resume,
    save_checkpoint,
    save_encoder,
    seed_all,
    set_learning_rate,
    settle,
    start_ranks,
    write_json,
)
from data import load_picture, normalize
from drawing import sheets
from formats import poses
from formats.weights import load_encoder, meta_of, use_meta
from model import SIZES, layer_of
from plumbing.batches import EpochBatches, training_loader
from plumbing.config import Key, UserError, check_job, read_config, run_stage
from tasks import pose
from tasks.heads import POSE_TOKENS, ClassicHead, PoseModel, SimpleHead, reads_pose

KEYS = dict(
    out=Key("runs/pose", "run folder; for eval_only runs/pose_eval, for predict runs/pose_predict"),
    eval_only=Key(False, "only evaluate `weights` on val_annotations"),
    predict=Key(None, "folder of pictures, or one: only predict, at whole pictures or `boxes`"),
    weights=Key(None, "model.safetensors of a finished run, for eval_only and predict"),
    # data
    train_annotations=Key(None, "COCO keypoint JSON, or MPII's list"),
    train_images=Key(None, "its picture folder (default: `images` beside it, or its own folder)"),
    val_annotations=Key(None, "the same, to evaluate on"),
    val_images=Key(None, "its picture folder"),
    boxes=Key(None, "person boxes to evaluate or predict at (COCO detections JSON); default: ground truth"),
    mpii_mat=Key(None, "MPII's ground-truth .mat: official head sizes and joints for PCKh"),
    limit=Key(0, "train on the first so many people only; 0 = all", low=0),
    max_bad=Key(0, "missing, empty or truncated pictures that may be left out, counted", low=0),
    max_bad_boxes=Key(0, "boxes without area on the picture to leave out at most, counted", low=0),
    height=Key(256, "input height", "[ViTPose]", low=16),
    width=Key(192, "input width", "[ViTPose]", low=16),
    padding=Key(1.25, "boxes grow by this after widening to the input's aspect", "[ViTPose]", low=1),
    flip=Key(0.5, "probability of a mirror image", "[ViTPose]", low=0, high=1),
    half_body=Key(0.3, "probability of an upper or lower half, with > 8 visible joints", "[ViTPose]", low=0, high=1),
    scale=Key(0.5, "σ of the random scale clip(N(1, σ), 1 − σ, 1 + σ)", "[ViTPose]", low=0, high=0.9),
    rotation=Key(40.0, "σ of the random rotation in degrees, clipped at 2σ", "[ViTPose]", low=0, high=180),
    rotation_p=Key(0.6, "probability of a rotation", "[ViTPose]", low=0, high=1),
    shift=Key(0.3, "probability of a box moved by up to a fifth of its sides", "[ViTPose]",
              low=0, high=1),
    batch=Key(512, "people in a global batch", "[ViTPose]", low=1),
    # model
    encoder=Key(None, "encoder weights to start from; none = from scratch"),
    size=Key("base", "encoder size, where encoder= does not know it itself", "[HAP]", tuple(SIZES)),
    patch=Key(16, "patch side in pixels, where encoder= does not know it itself", "[MAE]", low=1),
    pose_token=Key(True, "[POSE] from scratch, and with others' weights if `tokens` reads it", "[paper]"),
    tokens=Key("drop", "special tokens: dropped; [POSE] or both added to patches", "[silent]", POSE_TOKENS),
    head=Key("classic", "classic: two deconvolutions; simple: bilinear × 4", "[ViTPose]", ("classic", "simple")),
    sigma=Key(2.0, "σ of a joint's Gaussian in heat-map px", "[ViTPose]", low=0.5),
    drop_path=Key(0.3, "drop path rate of the last block", "[ViTPose]; [HAP] .29 on COCO",
                  low=0, high=0.9),
    # optimiser
    lr=Key(5.0e-4, "AdamW learning rate at `batch`", "[ViTPose]; HAP 2e-4", low=0),
    weight_decay=Key(0.1, "AdamW weight decay, not on 1-D parameters, tokens, positions",
                     "[ViTPose], which has no tokens", low=0),
    beta2=Key(0.999, "AdamW β2 (β1 = .9)", "[ViTPose]", low=0, high=0.99999),
    layer_decay=Key(0.75, "learning rate factor per layer from the top", "[ViTPose]; HAP .8", low=0.01, high=1),
    clip_grad=Key(1.0, "largest gradient norm; 0 = no clipping", "[ViTPose]", low=0),
    schedule=Key("step", "step: × 0.1 at each milestone; or cosine", "[ViTPose]", ("step", "cosine")),
    milestones=Key([170, 200], "epochs of the step schedule", "[ViTPose]", of=int, low=0),
    epochs=Key(210, "passes over the training people", "[ViTPose]", low=1),
    warmup_steps=Key(500, "linear warm-up", "[ViTPose]", low=0),
    seed=Key(0, "seed of everything", low=0),
    # evaluation
    flip_test=Key(True, "average with the mirrored picture's heat maps", "[ViTPose]"),
    nms=Key(0.9, "OKS from which a pose of a picture is a duplicate; only with `boxes`", "[HRNet]", low=0, high=1),
    eval_every=Key(0, "epochs between evaluations on the way (logged only); 0 = only at the end", low=0, free=True),
    # machine
    precision=Key("auto", "fp32 (no TF32); bf16 autocast; auto: bf16 in hardware", choices=("auto", "fp32", "bf16")),
    compile=Key(False, "torch.compile the encoder"),
    checkpoint_activations=Key(False, "recompute activations: less memory, more time", free=True),
    device=Key("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"), free=True),
    workers=Key(2, "loader processes per rank", low=0, free=True),
    save_every=Key(500, "steps between checkpoints", low=1, free=True),
    log_every=Key(1, "steps between log lines", low=1, free=True),
)  # fmt: skip


def main():
    cfg = read_config(KEYS, __doc__)
    rank, world, device = start_ranks(cfg.device, cfg.precision)
    check(cfg)
    meta, weights = use_meta(cfg, "finetune_pose.py", "joints", "tokens", "head", "padding")
    train_people = None
    if not cfg.weights:
        train_people, notes, _ = poses.read_pose_file(
            cfg.train_annotations, cfg.train_images, cfg.max_bad, max_bad_boxes=cfg.max_bad_boxes
        )
        train_people = train_people.take(np.arange(len(train_people.files))[: cfg.limit or None])
    val = Pictures(cfg, meta) if cfg.predict else Validation(cfg)
    joints = json.loads(meta["joints"]) if cfg.weights else train_people.joints
    if joints != val.people.joints:
        raise UserError(
            f"joint sets differ: {cfg.weights or cfg.train_annotations} has {len(joints)} ({', '.join(joints[:3])} …), "
            f"{cfg.val_annotations} {len(val.people.joints)} ({', '.join(val.people.joints[:3])} …)"
        )
    seed_all(WEIGHTS, cfg.seed)  # initial weights
    model, meta, report = build_model(cfg, len(joints))
    model.to(device)
    if cfg.compile:
        model.encoder.compile()
    if train_people:
        dataset = poses.PosePictures(cfg, train_people, training=True)
        batches = EpochBatches(len(dataset), cfg.batch, cfg.seed, rank, world)
    if open_run(cfg, KEYS, rank) == "finished":
        return

    if cfg.weights and rank == 0:
        print(f"{weights}; {val.about}", file=sys.stderr)
    if train_people:
        total = cfg.epochs * batches.steps_per_epoch
        optimizer = build_optimizer(cfg, model)
        step = resume(Path(cfg.out) / "last.pt", model, optimizer)["step"]
        log = Log(cfg.out, total, step, rank, "pose")
        read = f"{len(train_people.files)} people{poses.said(notes)}, {len(joints)} joints"
        log.say(f"{report}; {read}, {total} steps of {cfg.batch}; {val.about}")
        train(cfg, model, meta, optimizer, dataset, batches, val, step, total, log, rank, world, device)
        log.close()
        if rank == 0:
            save_model(cfg, model, meta, train_people)

    found = predict(cfg, model, val, rank, world, device)
    if rank == 0:
        val.report(cfg, found)
        (Path(cfg.out) / "done").touch()
    barrier()


def check(cfg):
    """Settings that are valid one by one but not together."""
    check_job(cfg, KEYS)
    for name in () if cfg.predict else ("train_annotations", "val_annotations")[cfg.eval_only :]:
        if not getattr(cfg, name):
            raise UserError(f"{name}= names no file; give a COCO keypoint JSON")
    if cfg.predict and not Path(cfg.predict).exists():
        raise UserError(f"predict={cfg.predict} is no folder of pictures and no picture")


# ------------------------------------------------------------------------------------------------------------- model


def build_model(cfg, n_joints):
    """→ (PoseModel with the encoder's or the fine-tuned weights, what to write beside them, one sentence about it)."""
    start, more = None if cfg.weights else cfg.encoder, {"checkpoint_activations": cfg.checkpoint_activations}
    pose_token = cfg.pose_token and (start is None or reads_pose(cfg.tokens))
    encoder, size, sentence = load_encoder(
        start, (cfg.height, cfg.width), cfg.size, cfg.patch, pose_token, cfg.drop_path, **more
    )
    head = {"classic": ClassicHead, "simple": SimpleHead}[cfg.head](encoder.width, n_joints)
    model = PoseModel(encoder, head, cfg.tokens)
    if cfg.weights:
        load_weights(model, load_checkpoint(cfg.weights), cfg.weights)
    return model, meta_of(encoder, size), sentence


def build_optimizer(cfg, model):
    depth = model.encoder.depth
    groups = parameter_groups(model, cfg.weight_decay, cfg.layer_decay, lambda name: layer_of(name, depth), depth + 1)
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, cfg.beta2), fused=True)


# ---------------------------------------------------------------------------------------------------------- training


def train(cfg, model, meta, optimizer, dataset, batches, val, first, total, log, rank, world, device):
    """The loop. Nothing in a step waits for the device: its figures are read while the next step runs."""
    loader = training_loader(dataset, batches.run(first, total), cfg.workers, device)
    runner = distributed(model.train(), device)
    milestones = [m * batches.steps_per_epoch for m in cfg.milestones]
    map_size, figures = tuple(4 * n for n in model.encoder.grid), None
    for step, sample in enumerate(loader, first):
        lr = learning_rate(step, total, cfg.warmup_steps, cfg.lr, kind=cfg.schedule, milestones=milestones)
        set_learning_rate(optimizer, lr)
        images = normalize(sample["image"].to(device, non_blocking=True))
        keypoints = sample["keypoints"].to(device, non_blocking=True)
        noise = rank_noise((DROP_PATH, cfg.seed, step), cfg.batch, 2 * model.encoder.depth, rank, world, device)
        with autocast(device, cfg.precision):
            heat = runner(images, noise.T)
        target, weight = pose.heat_maps(keypoints, dataset.size, map_size, cfg.sigma)
        loss = pose.heat_map_loss(heat, target, weight)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        settle(figures, log, dataset.name, cfg.batch, cfg.log_every, ("loss",))  # the step before this one
        bad = ~heat.detach().float().sum((1, 2, 3)).isfinite()
        figures = Figures(step, lr, {"loss": loss, "grad_norm": norm}, sample["index"], bad)
        (epoch, rest), last = divmod(step + 1, batches.steps_per_epoch), step + 1 == total
        evaluating = cfg.eval_every and rest == 0 and epoch % cfg.eval_every == 0 and not last
        saving = last or (step + 1) % cfg.save_every == 0
        if evaluating or saving:
            settle(figures, log, dataset.name, cfg.batch, cfg.log_every, ("loss",))  # never save a broken model
            figures = None
        if evaluating:
            found = predict(cfg, model, val, rank, world, device)
            if rank == 0:
                log.write(step=step + 1, epoch=epoch, **val.metrics(cfg, found)[0])
            model.train()
        if saving:
            save(cfg, model, meta, optimizer, step + 1, rank)
        log.advance()


def save(cfg, model, meta, optimizer, step, rank):
    """Weights alone, then everything to resume: a kill in between repeats these steps, so the two always agree."""
    if rank == 0:
        out = Path(cfg.out)
        save_encoder(out / "encoder.safetensors", model.encoder, **meta)
        save_checkpoint(out / "last.pt", model=model.state_dict(), optimizer=optimizer.state_dict(), step=step)


def save_model(cfg, model, meta, people):
    """Encoder and head in one file that eval_only and predict can use without any config."""
    more = dict(joints=json.dumps(people.joints), skeleton=json.dumps(people.skeleton))
    more |= dict(tokens=cfg.tokens, head=cfg.head, padding=cfg.padding)
    save_encoder(Path(cfg.out) / "model.safetensors", model, **meta, **more)


# --------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def predict(cfg, model, val, rank, world, device):
    """Poses of all of val's boxes, each exactly once whatever the number of ranks.

    → (N, K, 3) float32 x, y in picture px and score, on every rank. Flip test: the mirrored picture's heat maps are
    mirrored back and averaged; UDP's grid is its own mirror image, so nothing is shifted.
    """
    dataset = poses.PosePictures(cfg, val.people, training=False)
    own, batch = rank_share(len(dataset), rank, world), max(1, min(cfg.batch // world, 256))
    batches = [[(0, i) for i in own[k : k + batch]] for k in range(0, len(own), batch)]
    model.eval()
    parts = []
    for sample in DataLoader(dataset, batch_sampler=batches, num_workers=cfg.workers):
        images = normalize(sample["image"].to(device, non_blocking=True))
        with autocast(device, cfg.precision):
            heat = model(images).float()
            if cfg.flip_test:
                heat = (heat + model(images.flip(3)).float().flip(3)[:, val.people.flip]) / 2
        found = pose.decode(heat, dataset.size).cpu().numpy()
        for matrix, keypoints in zip(sample["matrix"].numpy(), found):
            keypoints[:, :2] = pose.to_picture(matrix, keypoints[:, :2])
        parts.append(found)
    return np.concatenate(gather_rows(parts, world))


class Validation:
    """What is evaluated on: `people` are the boxes (ground truth, or from a file), `truth` the annotated people."""

    def __init__(self, cfg):
        self.truth, notes, self.document = poses.read_pose_file(
            cfg.val_annotations, cfg.val_images, cfg.max_bad, True, cfg.max_bad_boxes
        )
        self.about = f"{len(self.truth.files)} people to evaluate{poses.said(notes)}"
        self.people, self.box_score = self.truth, np.ones(len(self.truth.files))
        self.bad_images = {i["id"] for i in self.document["images"] if i["file_name"] in set(notes["bad"])}
        self.sigmas, self.sigma_source = pose.oks_sigmas(self.truth.joints)
        self.category = poses.person_category(self.document)["id"]
        rows = notes.get("rows", len(self.truth.files))  # in the file, also those that are left out
        self.heads = poses.read_mpii_heads(cfg.mpii_mat, rows) if cfg.mpii_mat else None
        if cfg.boxes:
            images = poses.pictures_of(self.document, self.truth, self.bad_images)
            self.people, self.box_score, about = poses.read_boxes(
                cfg.boxes, images, self.truth, self.category, cfg.max_bad_boxes
            )
            self.about += f", {about}"

    def results(self, cfg, found):
        """COCO keypoint results: score = box × mean joint score; with boxes from a file, duplicates removed."""
        score = pose.pose_score(self.box_score, found[..., 2])
        keep = range(len(found))
        if cfg.boxes:
            keep = pose.without_duplicates(self.people, found, score, cfg.width / cfg.height, cfg.padding, cfg.nms)
        return [
            {
                "image_id": int(self.people.image_id[i]), "category_id": self.category, "score": float(score[i]),
                "keypoints": [round(float(v), 3) for v in found[i].flatten()],
            }
            for i in keep
        ]  # fmt: skip

    def metrics(self, cfg, found):
        """→ (flat metrics, everything for metrics.json, per-person OKS (N,), COCO results)."""
        results, truth = self.results(cfg, found), self.truth
        flat = pose.coco_metrics(self.document, results, self.sigmas, self.bad_images)
        full = dict(people=len(truth.files), read=self.about, boxes=cfg.boxes or "ground truth")
        full |= dict(oks_sigmas=self.sigma_source) | flat
        if cfg.boxes:  # PCK compares person with person: it needs the ground truth's boxes
            return flat, full, None, results
        heads = [column[truth.annotation_id - 1] for column in self.heads] if self.heads else None
        share, more = pose.pck_metrics(found[..., :2], truth.keypoints, truth.joints, heads)
        oks = pose.oks(found[..., :2].astype(np.float64), truth.keypoints.astype(np.float64), truth.area, self.sigmas)
        return flat | share, full | more, oks, results

    def report(self, cfg, found):
        """Write metrics.json, results.json, overlays.png and pck.png; print the figures."""
        flat, full, oks, results = self.metrics(cfg, found)
        out = Path(cfg.out)
        write_json(out / "results.json", results, indent=None)
        write_json(out / "metrics.json", full)
        if "PCK@.2_per_joint" in full:
            title = f"PCK@.2 of torso, {full['PCK@.2']:.3f} overall"
            sheets.pck_chart(full["PCK@.2_per_joint"], out / "pck.png", title)
        sheets.pose_sheet(*self.examples(found, oks), self.truth.skeleton, self.truth.joints, out / "overlays.png")
        if "published" not in self.sigma_source:
            print(f"OKS uses {self.sigma_source}")
        print(f"{cfg.out}: " + "  ".join(f"{k} {v:.4f}" for k, v in flat.items() if v is not None))

    def examples(self, found, oks):
        """Worst and best by OKS, with picture, truth and prediction. With boxes from a file: the best pose of each."""
        truth = self.truth
        if oks is None:
            found, oks = pose.nearest_poses(truth, self.people.image_id, found, self.sigmas)
        order = np.argsort(oks, kind="stable")
        order = order[np.isfinite(oks[order])]  # MPII lists people without a joint
        chosen = list(dict.fromkeys([*order[:6], *order[::-1][:6]]))
        load = [load_picture(truth.folder, truth.files[i]) for i in chosen]
        labels = [f"OKS {oks[i]:.2f} · {truth.files[i].decode()}" for i in chosen]
        return load, truth.boxes[chosen], truth.keypoints[chosen], found[chosen], labels


class Pictures:
    """A user's own pictures: whole pictures as boxes, or boxes from a file."""

    def __init__(self, cfg, meta):
        joints, skeleton = json.loads(meta["joints"]), json.loads(meta["skeleton"])
        self.people, images = poses.read_folder(cfg.predict, joints, skeleton, cfg.max_bad)
        self.box_score = np.ones(len(self.people.files))
        self.about = f"{len(self.people.files)} pictures"
        if cfg.boxes:
            self.people, self.box_score, about = poses.read_boxes(
                cfg.boxes, images, self.people, max_bad_boxes=cfg.max_bad_boxes
            )
            self.about += f", {about}"

    def report(self, cfg, found):
        """predictions.json, a COCO keypoint file (joints above .2 visible), and overlays.png of the surest."""
        people, out, score = self.people, Path(cfg.out), pose.pose_score(self.box_score, found[..., 2])
        if cfg.boxes:
            keep = pose.without_duplicates(people, found, score, cfg.width / cfg.height, cfg.padding, cfg.nms)
            people, found, score = people.take(keep), found[keep], score[keep]
        seen = np.concatenate([found[..., :2], np.where(found[..., 2:] > 0.2, 2, 1)], 2)
        write_json(out / "predictions.json", poses.coco_document(people, seen, found[..., 2], score), indent=None)
        chosen = np.argsort(-score, kind="stable")[:24]
        load = [load_picture(people.folder, people.files[i]) for i in chosen]
        labels = [f"score {score[i]:.2f} · {people.files[i].decode()}" for i in chosen]
        drawn = (load, people.boxes[chosen], None, found[chosen], labels, people.skeleton, people.joints)
        sheets.pose_sheet(*drawn, out / "overlays.png")
        print(
            f"{len(found)} people in {len(set(people.files.tolist()))} pictures: {out}/predictions.json, overlays.png"
        )


if __name__ == "__main__":
    run_stage(main)
