"""Stage 3a of GenPoCCL: encoder → 2-D pose, top-down, one heat map per joint (ViTPose's recipe, as HAP evaluates).

Inputs   people with joints (COCO keypoint JSON of any joint set, or MPII's list) and an encoder: ours, MAE's, HAP's,
         timm's or torchvision's ViT, or none (from scratch).
Outputs  in `out`: model.safetensors (encoder + head), encoder.safetensors, metrics.json (OKS-AP/AR, PCK, PCKh),
         results.json (COCO keypoint results), overlays.png (truth beside prediction), pck.png, last.pt, log.jsonl.

  python finetune_pose.py --cfg configs/finetune_pose_demo.yaml encoder=runs/pretrain/encoder.safetensors   laptop
  torchrun --nproc_per_node=8 finetune_pose.py --cfg configs/finetune_pose_coco.yaml                        GPUs
  python finetune_pose.py eval_only=true weights=runs/pose/model.safetensors val_annotations=val.json out=runs/eval
  python finetune_pose.py predict=my_pictures weights=runs/pose/model.safetensors out=runs/mine

The last epoch is reported, never the best one on the test set.
Legend: B people on this rank · M all ranks · K joints · N patches · D width · S special tokens · H, W input · h, w map.
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import pictures
import pose
import pose_data
from common import (
    Key,
    Log,
    UserError,
    autocast,
    barrier,
    gather_rows,
    generator_of,
    learning_rate,
    load_checkpoint,
    load_weights,
    open_run,
    parameter_groups,
    rank_rows,
    read_config,
    run_stage,
    save_checkpoint,
    save_encoder,
    seed_all,
    set_learning_rate,
    start_ranks,
    write_atomic,
)
from data import PoseBatches, load_picture, normalize
from losses import gather_rows_of
from model import SIZES, ClassicHead, SimpleHead, encoder_meta, layer_of, load_encoder

KEYS = dict(
    out=Key("runs/pose", "run folder"),
    eval_only=Key(False, "only evaluate `weights` on val_annotations"),
    predict=Key(None, "folder of pictures: only predict with `weights`, at whole pictures or `boxes`"),
    weights=Key(None, "model.safetensors of a finished run, for eval_only and predict"),
    # data
    train_annotations=Key(None, "COCO keypoint JSON, or MPII's list"),
    train_images=Key(None, "its picture folder (default: `images` beside it, or its own folder)"),
    val_annotations=Key(None, "the same, to evaluate on"),
    val_images=Key(None, "its picture folder"),
    boxes=Key(None, "person boxes to evaluate or predict at (COCO detections JSON); default: ground truth"),
    mpii_mat=Key(None, "MPII's ground-truth .mat: official head sizes for PCKh"),
    limit=Key(0, "train on the first so many people only; 0 = all", low=0),
    max_bad=Key(0, "missing, empty or truncated pictures that may be left out, counted", low=0),
    height=Key(256, "input height", "[ViTPose]", low=16),
    width=Key(192, "input width", "[ViTPose]", low=16),
    padding=Key(1.25, "boxes grow by this after widening to the input's aspect", "[ViTPose]", low=1),
    flip=Key(0.5, "probability of a mirror image", "[ViTPose]", low=0, high=1),
    half_body=Key(0.3, "probability of an upper or lower half, with > 8 visible joints", "[ViTPose]", low=0, high=1),
    scale=Key(0.5, "σ of the random scale clip(N(1, σ), 1 − σ, 1 + σ)", "[ViTPose]", low=0, high=0.9),
    rotation=Key(40.0, "σ of the random rotation in degrees, clipped at 2σ", "[ViTPose]", low=0, high=180),
    rotation_p=Key(0.6, "probability of a rotation", "[ViTPose]", low=0, high=1),
    batch=Key(512, "people in a global batch", "[ViTPose]", low=1),
    # model
    encoder=Key(None, "encoder weights to start from; none = from scratch"),
    size=Key("base", "encoder size, where encoder= does not know it itself", "[HAP]", tuple(SIZES)),
    patch=Key(16, "patch side in pixels, where encoder= does not know it itself", "[MAE]", low=1),
    pose_token=Key(True, "[POSE], where encoder= does not know it itself", "[paper]"),
    tokens=Key("drop", "special tokens after the encoder: drop them, add [POSE] to every patch, add_cls_pose: both",
               "[silent]", ("drop", "add", "add_cls_pose")),
    head=Key("classic", "classic: two deconvolutions; simple: bilinear × 4", "[ViTPose]", ("classic", "simple")),
    sigma=Key(2.0, "σ of a joint's Gaussian in heat-map px", "[ViTPose]", low=0.5),
    drop_path=Key(0.3, "drop path rate of the last block", "[ViTPose]", low=0, high=0.9),
    # optimiser
    lr=Key(5.0e-4, "AdamW learning rate at `batch`", "[ViTPose]; HAP 2e-4", low=0),
    weight_decay=Key(0.1, "AdamW weight decay, not on 1-D parameters, tokens, positions", "[ViTPose]", low=0),
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
    precision=Key("fp32", "fp32, or bf16 autocast", choices=("fp32", "bf16")),
    compile=Key(False, "torch.compile the encoder"),
    checkpoint_activations=Key(False, "recompute activations: less memory, more time", free=True),
    device=Key("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"), free=True),
    workers=Key(2, "loader processes per rank", low=0, free=True),
    save_every=Key(500, "steps between checkpoints", low=1, free=True),
    log_every=Key(1, "steps between log lines", low=1, free=True),
)  # fmt: skip


def main():
    cfg = read_config(KEYS, __doc__)
    rank, world, device = start_ranks(cfg.device)
    check(cfg)
    meta = encoder_meta(cfg.weights)
    if cfg.weights:
        use_meta(cfg, meta)
    train_people = None
    if cfg.train_annotations and not cfg.eval_only and not cfg.predict:
        train_people, _, _ = pose_data.read_pose_file(cfg.train_annotations, cfg.train_images, cfg.max_bad)
        train_people = train_people.take(np.arange(len(train_people.files))[: cfg.limit or None])
    val = Pictures(cfg, meta) if cfg.predict else Validation(cfg)
    joints = json.loads(meta["joints"]) if cfg.weights else train_people.joints
    if joints != val.people.joints:
        raise UserError(
            f"joint sets differ: {cfg.weights or cfg.train_annotations} has {len(joints)} ({', '.join(joints[:3])} …), "
            f"{cfg.val_annotations} {len(val.people.joints)} ({', '.join(val.people.joints[:3])} …)"
        )
    seed_all(cfg.seed)  # initial weights
    model, meta, report = build_model(cfg, len(joints))
    model.to(device)
    if cfg.compile:
        model.encoder.compile()
    if train_people:
        dataset = pose_data.PosePictures(cfg, train_people, training=True)
        batches = PoseBatches(dataset, cfg.batch, 1, [], cfg.seed, rank, world)
    state = open_run(cfg, KEYS, rank)
    if state == "finished":
        print(f"{cfg.out} is finished already") if rank == 0 else None
        return

    if train_people:
        total = cfg.epochs * batches.steps_per_epoch
        optimizer = build_optimizer(cfg, model)
        step = resume(cfg, model, optimizer) if state == "resume" else 0
        log = Log(cfg.out, total, step, rank, "pose")
        log.say(f"{report}; {len(train_people.files)} people, {len(joints)} joints, {total} steps of {cfg.batch}")
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
    if cfg.eval_only and cfg.predict:
        raise UserError("eval_only and predict are two jobs; give one")
    if bool(cfg.eval_only or cfg.predict) != bool(cfg.weights):
        raise UserError(
            "weights= (a finished run's model.safetensors) and eval_only=true or predict=FOLDER need each other; "
            "to start a fine-tuning from weights use encoder="
        )
    needed = [] if cfg.predict else ["val_annotations"] if cfg.eval_only else ["train_annotations", "val_annotations"]
    for name in needed:
        if not getattr(cfg, name):
            raise UserError(f"{name}= names no file; give a COCO keypoint JSON")
    if cfg.predict and not Path(cfg.predict).is_dir():
        raise UserError(f"predict={cfg.predict} is no folder of pictures")


# ------------------------------------------------------------------------------------------------------------- model


class PoseModel(nn.Module):
    """ViT → patch tokens (with or without the special tokens' help) → head → heat maps."""

    def __init__(self, encoder, head, tokens):
        super().__init__()
        self.encoder, self.head, self.tokens = encoder, head, tokens
        if tokens != "drop" and encoder.n_special < 2:
            raise UserError(f"tokens={tokens} needs an encoder with [POSE]; this one has none: use tokens=drop")

    def forward(self, images, drop_noise=None):
        """images (B, 3, H, W) normalised, drop_noise (2·depth, B) or None → heat maps (B, K, h, w)."""
        x = self.encoder(images, drop_noise=drop_noise)  # (B, S + N, D)
        S = self.encoder.n_special
        special, patches = x[:, :S], x[:, S:]
        # paper silent: how [POSE] takes part downstream. HAP drops [CLS].
        if self.tokens == "add":
            patches = patches + special[:, 1:]
        elif self.tokens == "add_cls_pose":
            patches = patches + special.sum(1, keepdim=True)
        return self.head(patches, self.encoder.grid)


def use_meta(cfg, meta):
    """A fine-tuned model's file decides everything about the model."""
    if "joints" not in meta:
        raise UserError(f"{cfg.weights} is not a model.safetensors of finetune_pose.py (it names no joints)")
    cfg.height, cfg.width, cfg.patch = (int(meta[name]) for name in ("height", "width_px", "patch_size"))
    cfg.size, cfg.tokens, cfg.head = (meta[name] for name in ("size", "tokens", "head"))
    cfg.pose_token, cfg.padding = meta["pose_token"] == "True", float(meta["padding"])


def build_model(cfg, n_joints):
    """→ (PoseModel with the encoder's or the fine-tuned weights, what to write beside them, one sentence about it)."""
    encoder, size, sentence = load_encoder(
        cfg.encoder, (cfg.height, cfg.width), cfg.size, cfg.patch, cfg.pose_token, cfg.drop_path,
        checkpoint_activations=cfg.checkpoint_activations,
    )  # fmt: skip
    head = {"classic": ClassicHead, "simple": SimpleHead}[cfg.head](encoder.width, n_joints)
    model = PoseModel(encoder, head, cfg.tokens)
    if cfg.weights:
        load_weights(model, load_checkpoint(cfg.weights), cfg.weights)
    meta = {k: SIZES[size][k] for k in ("width", "depth", "heads")} | {"size": size, "patch_size": encoder.patch_size}
    meta |= {"height": cfg.height, "width_px": cfg.width, "pose_token": encoder.n_special == 2}
    return model, meta, sentence


def build_optimizer(cfg, model):
    depth = model.encoder.depth
    layers = partial(layer_of, depth=depth)
    groups = parameter_groups(model, cfg.weight_decay, cfg.layer_decay, layers, depth + 1)
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)  # β [ViTPose]


# ---------------------------------------------------------------------------------------------------------- training


def train(cfg, model, meta, optimizer, dataset, batches, val, first, total, log, rank, world, device):
    """The loop. Nothing in a step waits for the device: its figures are read while the next step runs."""
    loader = DataLoader(
        dataset, batch_sampler=batches.run(first, total), num_workers=cfg.workers, pin_memory=device.type == "cuda"
    )
    runner = model
    if world > 1:
        ids = [device.index] if device.type == "cuda" else None
        runner = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    milestones = [m * batches.steps_per_epoch for m in cfg.milestones]
    map_size, figures = tuple(4 * n for n in model.encoder.grid), None
    model.train()
    for step, sample in enumerate(loader, first):
        lr = learning_rate(step, total, cfg.warmup_steps, cfg.lr, kind=cfg.schedule, milestones=milestones)
        set_learning_rate(optimizer, lr)
        images = normalize(sample["image"].to(device, non_blocking=True))
        keypoints = sample["keypoints"].to(device, non_blocking=True)
        # Drop path is drawn for the global batch, so that the number of ranks changes nothing.
        noise = torch.rand(cfg.batch, 2 * model.encoder.depth, generator=generator_of(cfg.seed, step))
        noise = rank_rows(noise, rank, world).T.to(device, non_blocking=True)
        with autocast(device, cfg.precision):
            heat = runner(images, noise)
        target, weight = pose.heat_maps(keypoints, dataset.size, map_size, cfg.sigma)
        loss = pose.heat_map_loss(heat, target, weight)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        settle(figures, dataset, cfg, log)  # the step before this one
        finite = heat.detach().float().sum((1, 2, 3)).isfinite()
        rate = log.rate(step + 1, cfg.batch) if step % cfg.log_every == 0 else 0.0
        figures = Figures(step, lr, rate, loss, norm, finite, sample["index"])
        if step + 1 == total or (step + 1) % cfg.save_every == 0:
            settle(figures, dataset, cfg, log)  # never save after a non-finite loss
            figures = None
            save(cfg, model, meta, optimizer, step + 1, rank)
        log.advance()
        epoch, rest = divmod(step + 1, batches.steps_per_epoch)
        if cfg.eval_every and rest == 0 and epoch % cfg.eval_every == 0 and step + 1 < total:
            found = predict(cfg, model, val, rank, world, device)
            if rank == 0:
                log.write(step=step + 1, epoch=epoch, **val.metrics(cfg, found)[0])
            barrier()
            model.train()


class Figures:
    """One step's figures of all ranks, on their way to the host while the device goes on."""

    def __init__(self, step, lr, rate, loss, norm, finite, index):
        self.step, self.lr, self.rate, self.index = step, lr, rate, index
        ranks = gather_rows_of(torch.stack([loss.detach(), norm.detach()])[None])  # (ranks, 2)
        self.ranks, self.finite = ranks.to("cpu", non_blocking=True), finite.to("cpu", non_blocking=True)
        self.copied = torch.cuda.Event() if ranks.is_cuda else None
        if self.copied:
            self.copied.record()


def settle(figures, dataset, cfg, log):
    """Check a step's figures and log them. A non-finite loss stops all ranks; the last checkpoint stays."""
    if figures is None:
        return
    if figures.copied:
        figures.copied.synchronize()
    finite = figures.ranks.isfinite().all(1)
    if not finite.all():
        ranks = (~finite).nonzero().flatten().tolist()
        bad = (~figures.finite).nonzero().flatten().tolist() or range(len(figures.index))
        names = [dataset.name(int(figures.index[i])) for i in bad]
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise UserError(
            f"non-finite loss or gradient at step {figures.step} on rank(s) {ranks}; this rank's pictures: "
            f"{', '.join(names[:8])}{more}; the last checkpoint stays; lower lr or look at these pictures"
        )
    if figures.step % cfg.log_every == 0:
        loss, norm = figures.ranks.mean(0).tolist()
        row = {"step": figures.step + 1, "loss": loss, "lr": figures.lr, "grad_norm": norm}
        log.write(**row, pictures_per_s=figures.rate, shown=("loss", "lr", "pictures_per_s"))


def save(cfg, model, meta, optimizer, step, rank):
    if rank == 0:
        out = Path(cfg.out)
        save_checkpoint(out / "last.pt", model=model.state_dict(), optimizer=optimizer.state_dict(), step=step)
        save_encoder(out / "encoder.safetensors", model.encoder, **meta)


def save_model(cfg, model, meta, people):
    """Encoder and head in one file that eval_only and predict can use without any config."""
    more = {"joints": json.dumps(people.joints), "skeleton": json.dumps(people.skeleton)}
    more |= {"tokens": cfg.tokens, "head": cfg.head, "padding": cfg.padding}
    save_encoder(Path(cfg.out) / "model.safetensors", model, **meta, **more)


def resume(cfg, model, optimizer):
    """Load last.pt into model and optimiser. → steps done (0 if the run was killed before its first checkpoint)."""
    path = Path(cfg.out) / "last.pt"
    if not path.exists():
        return 0
    state = load_checkpoint(path)
    if not {"model", "optimizer", "step"} <= set(state):
        raise UserError(f"{path} is not a checkpoint of finetune_pose.py; delete it to start this run anew")
    load_weights(model, state["model"], path)
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


# --------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def predict(cfg, model, val, rank, world, device):
    """Poses of all of val's boxes, each exactly once whatever the number of ranks.

    → (N, K, 3) float32 x, y in picture px and score, on every rank. Flip test: the mirrored picture's heat maps are
    mirrored back and averaged; UDP's grid is its own mirror image, so nothing is shifted.
    """
    dataset = pose_data.PosePictures(cfg, val.people, training=False)
    own = list(range(rank, len(dataset), world))
    batch = max(1, min(cfg.batch // world, 256))
    batches = [[(0, i) for i in own[k : k + batch]] for k in range(0, len(own), batch)]
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=cfg.workers)
    model.eval()
    rows = []
    for sample in loader:
        images = normalize(sample["image"].to(device, non_blocking=True))
        with autocast(device, cfg.precision):
            heat = model(images).float()
            if cfg.flip_test:
                heat = (heat + model(images.flip(3)).float().flip(3)[:, val.people.flip]) / 2
        found = pose.decode(heat, dataset.size).cpu().numpy()
        for index, matrix, keypoints in zip(sample["index"].tolist(), sample["matrix"].numpy(), found):
            keypoints[:, :2] = pose.to_picture(matrix, keypoints[:, :2])
            rows.append((index, keypoints))
    rows = dict(gather_rows(rows, world))
    return np.stack([rows[i] for i in range(len(dataset))])


class Validation:
    """What is evaluated on: `people` are the boxes (ground truth, or from a file), `truth` the annotated people."""

    def __init__(self, cfg):
        path = cfg.val_annotations
        self.truth, notes, self.document = pose_data.read_pose_file(path, cfg.val_images, cfg.max_bad, True)
        self.people, self.box_score = self.truth, np.ones(len(self.truth.files))
        self.bad_images = {i["id"] for i in self.document["images"] if i["file_name"] in set(notes["bad"])}
        self.sigmas, self.sigma_source = pose.oks_sigmas(self.truth.joints)
        self.category = pose_data.person_category(self.document)["id"]
        rows = notes.get("rows", len(self.truth.files))
        self.heads = pose_data.read_mpii_heads(cfg.mpii_mat, rows) if cfg.mpii_mat else None
        if cfg.boxes:
            size = dict(zip(self.truth.image_id.tolist(), self.truth.size.tolist()))
            images = {}
            for i in self.document["images"]:
                if i["id"] not in self.bad_images:
                    wh = (int(i["width"]), int(i["height"])) if "width" in i else size[i["id"]]
                    images[i["id"]] = images[i["file_name"]] = (i["file_name"], wh, i["id"])
            self.people, self.box_score = pose_data.read_boxes(cfg.boxes, images, self.truth, self.category)

    def results(self, cfg, found):
        """COCO keypoint results: score = box × mean joint score; with boxes from a file, duplicates removed."""
        score = pose.pose_score(self.box_score, found[..., 2])
        keep = without_duplicates(cfg, self.people, found, score) if cfg.boxes else range(len(found))
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
        full = {"people": len(truth.files), "boxes": cfg.boxes or "ground truth"}
        full |= {"oks_sigmas": self.sigma_source} | flat
        if cfg.boxes:  # PCK compares person with person: it needs the ground truth's boxes
            return flat, full, None, results
        xy, target = found[..., :2].astype(np.float64), truth.keypoints.astype(np.float64)
        torso = pose.torso_size(target, truth.joints)
        if np.isfinite(torso).any():
            flat["PCK@.2"], each, left_out = pose.pck(xy, target, torso, 0.2)
            full |= {"PCK@.2": flat["PCK@.2"], "torso": "left shoulder to right hip, else the other diagonal"}
            full |= {"people_without_torso": left_out, "PCK@.2_per_joint": per_joint(truth.joints, each)}
        if {"head_top", "upper_neck"} <= set(truth.joints):
            head, source = pose.head_size(target, truth.joints), "head_top to upper_neck (ours: no official .mat given)"
            if self.heads:
                head, labelled = (column[truth.annotation_id - 1] for column in self.heads)
                target[..., 2], source = labelled * 2, "0.6 × diagonal of the official head box"
            counted = [j for j in range(len(truth.joints)) if truth.joints[j] not in ("pelvis", "thorax")]  # [MPII]
            flat["PCKh@.5"], _, left_out = pose.pck(xy[:, counted], target[:, counted], head, 0.5)
            full |= {"PCKh@.5": flat["PCKh@.5"], "head_size": source, "people_without_head": left_out}
            full["PCKh@.5_per_joint"] = per_joint(truth.joints, pose.pck(xy, target, head, 0.5)[1])
        return flat, full, pose.oks(xy, target, truth.area, self.sigmas), results

    def report(self, cfg, found):
        """Write metrics.json, results.json, overlays.png and pck.png; print the figures."""
        flat, full, oks, results = self.metrics(cfg, found)
        out = Path(cfg.out)
        write_json(out / "results.json", results)
        write_json(out / "metrics.json", full)
        if "PCK@.2_per_joint" in full:
            pictures.pck_chart(
                full["PCK@.2_per_joint"], out / "pck.png", f"PCK@.2 of torso, {full['PCK@.2']:.3f} overall"
            )
        pictures.pose_sheet(*self.examples(found, oks), self.truth.skeleton, self.truth.joints, out / "overlays.png")
        if "published" not in self.sigma_source:
            print(f"OKS uses {self.sigma_source}")
        print(f"{cfg.out}: " + "  ".join(f"{k} {v:.4f}" for k, v in flat.items() if v is not None))

    def examples(self, found, oks):
        """Worst and best by OKS, with picture, truth and prediction. With boxes from a file: the best pose of each."""
        truth = self.truth
        if oks is None:
            found, oks = self.nearest(found)
        order = np.argsort(oks, kind="stable")
        order = order[np.isfinite(oks[order])]  # MPII lists people without a joint
        chosen = list(dict.fromkeys([*order[:6], *order[::-1][:6]]))
        load = [load_picture(truth.folder, truth.files[i]) for i in chosen]
        labels = [f"OKS {oks[i]:.2f} · {truth.files[i].decode()}" for i in chosen]
        return load, truth.boxes[chosen], truth.keypoints[chosen], found[chosen], labels

    def nearest(self, found):
        """Of each annotated person the most similar pose of its picture, and its OKS (0 where there is none)."""
        best, oks = np.zeros_like(self.truth.keypoints), np.zeros(len(self.truth.files))
        for i, image in enumerate(self.truth.image_id):
            rows = np.flatnonzero(self.people.image_id == image)
            if len(rows):
                goal = np.broadcast_to(self.truth.keypoints[i], (len(rows), *self.truth.keypoints[i].shape))
                near = pose.oks(found[rows][..., :2], goal, np.full(len(rows), self.truth.area[i]), self.sigmas)
                best[i], oks[i] = found[rows[near.argmax()]], near.max()
        return best, oks


def without_duplicates(cfg, people, found, score):
    """Ids that OKS-NMS keeps, picture by picture. The area of a pose is that of its padded region [HRNet]."""
    area = pose.regions(people.boxes, cfg.width / cfg.height, cfg.padding)[1].prod(1)
    sigmas, keep = pose.oks_sigmas(people.joints)[0], []
    for image in np.unique(people.image_id):
        rows = np.flatnonzero(people.image_id == image)
        xy = found[rows, :, :2].astype(np.float64)
        keep.append(rows[pose.oks_nms(xy, score[rows], area[rows], sigmas, cfg.nms)])
    return np.concatenate(keep)


class Pictures:
    """A user's own pictures: whole pictures as boxes, or boxes from a file."""

    def __init__(self, cfg, meta):
        joints, skeleton = json.loads(meta["joints"]), json.loads(meta["skeleton"])
        self.people, images = pose_data.read_folder(cfg.predict, joints, skeleton, cfg.max_bad)
        self.box_score = np.ones(len(self.people.files))
        if cfg.boxes:
            self.people, self.box_score = pose_data.read_boxes(cfg.boxes, images, self.people)

    def report(self, cfg, found):
        """predictions.json, a COCO keypoint file (joints above .2 visible), and overlays.png of the surest."""
        people, out, score = self.people, Path(cfg.out), pose.pose_score(self.box_score, found[..., 2])
        if cfg.boxes:
            keep = without_duplicates(cfg, people, found, score)
            people, found, score = people.take(keep), found[keep], score[keep]
        seen = np.concatenate([found[..., :2], np.where(found[..., 2:] > 0.2, 2, 1)], 2)
        write_json(out / "predictions.json", pose_data.coco_document(people, seen, found[..., 2], score))
        chosen = np.argsort(-score, kind="stable")[:24]
        load = [load_picture(people.folder, people.files[i]) for i in chosen]
        labels = [f"score {score[i]:.2f} · {people.files[i].decode()}" for i in chosen]
        drawn = (load, people.boxes[chosen], None, found[chosen], labels, people.skeleton, people.joints)
        pictures.pose_sheet(*drawn, out / "overlays.png")
        n = len(set(people.files.tolist()))
        print(f"{len(found)} people in {n} pictures: {out}/predictions.json, {out}/overlays.png")


def per_joint(joints, values):
    return {name: None if np.isnan(v) else float(v) for name, v in zip(joints, values)}


def write_json(path, value):
    write_atomic(
        path, lambda part: part.write_text(json.dumps(value, indent=1 if path.name == "metrics.json" else None))
    )


if __name__ == "__main__":
    run_stage(main)
