"""Stage 2 of GenPoCCL: picture sets → an encoder with [CLS] and [POSE].  L = L_rec + γ1·L_align + γ2·L_mp  (Fig. 2)

Inputs   COCO keypoint JSON files with pictures: generated sets (annotations carry pose_id: pictures of one pose are
         positives) and real ones (no pose_id: they train L_rec and L_align and are left out of L_mp).
Outputs  in `out`: encoder.safetensors, last.pt (everything to resume), log.jsonl, config.yaml, and pictures:
         reconstructions.png, neighbours.png (nearest by [POSE]), attention.png ([CLS] and [POSE]).

  python pretrain.py --cfg configs/pretrain_demo.yaml                       # laptop
  torchrun --nproc_per_node=8 pretrain.py --cfg configs/pretrain_coco.yaml  # GPUs

MAE, HAP and StableRep are settings of this script: configs/pretrain_{mae,hap,stablerep}.yaml.
Legend: B pictures on this rank · M all ranks · N patches · D width · K joints · P pictures per pose · h, w grid.
"""

from pathlib import Path

import numpy as np
import torch

from common import (
    MASK,
    STEP,
    WEIGHTS,
    Figures,
    Log,
    autocast,
    barrier,
    distributed,
    learning_rate,
    open_run,
    parameter_groups,
    rank_noise,
    resume,
    save_checkpoint,
    save_encoder,
    seed_all,
    set_learning_rate,
    settle,
    start_ranks,
)
from data import PretrainPictures, normalize, recognised
from drawing import sheets
from formats.coco import MIN_SCORE, read_people
from formats.weights import load_file_into, meta_of
from losses import contrastive_health
from masks import noise_size, part_guided_mask, random_mask
from model import SIZES, Decoder, GenPoCCL, ViT
from plumbing.batches import PoseBatches, training_loader
from plumbing.config import Key, UserError, read_config, run_stage
from tasks.heads import Projector

KEYS = dict(
    out=Key("runs/pretrain", "run folder"),
    # data
    annotations=Key([], "COCO keypoint JSON files, generated and real ones together"),
    images=Key([], "picture folder of each file (default: `images` beside it, or its own folder)"),
    shares=Key([], "share of each file in an epoch (default: every picture once)", "[silent]", of=float, low=0),
    check_pictures=Key(True, "look at every picture at the first start", free=True),
    max_bad=Key(0, "missing, empty or truncated pictures that may be left out, counted", low=0),
    min_score=Key(MIN_SCORE, "joints visible from this score on, where annotations hold scores",
                  "[HRNet] [ViTPose]", low=0.01, high=1),
    height=Key(256, "input height", "[HAP]", low=16),
    width=Key(128, "input width", "[HAP]", low=16),
    box_padding=Key(1.25, "person boxes grow by this before cropping, within the picture", low=1),
    region=Key("grow", "grow: a box too wide or too tall for a crop grows, black beyond the picture; box: as it is, "
               "it loses its sides", "ours; [HAP] reads whole crops", ("grow", "box")),
    crop_min=Key(0.8, "smallest share of the region in a random crop", "[HAP]; .2 [MAE], .08 [StableRep]",
                 low=0.01, high=1),
    shared=Key("flip", "drawn once for all pictures of a pose in an epoch: nothing, the flip, or flip and crop",
               "[silent]", ("nothing", "flip", "crop")),
    augmentation=Key("hap", "hap: crop and flip; strong: + jitter, grey, blur [StableRep]", "[HAP]", ("hap", "strong")),
    pictures_per_pose=Key(5, "P: pictures of one pose in a batch, with gamma_mp; 1 = poses are not grouped",
                          "[silent]", low=1),
    batch=Key(4080, "pictures in a global batch", "[HAP] 4096; whole groups of 5 on 8 ranks", low=1),
    # model
    size=Key("base", "encoder size", "[HAP]", tuple(SIZES)),
    patch=Key(16, "patch side in pixels", "[MAE]", low=1),
    pose_token=Key(True, "a second token, [POSE]", "[paper]"),
    init=Key(None, "weights to start from: ours, MAE, HAP, timm or torchvision ViT", "[HAP] starts from MAE ViT-B"),
    views=Key(2, "independent maskings of each picture", "[HAP]", (1, 2)),
    mask=Key("part", "part: part-guided [HAP]; random [MAE]; none [StableRep]", "[HAP]", ("part", "random", "none")),
    mask_ratio=Key(0.5, "share of masked patches", "[HAP]", low=0, high=0.95),
    decoder=Key(True, "masked decoder and L_rec", "[HAP]"),
    pose_in_decoder=Key(True, "[POSE] is seen by the decoder", "[silent]"),
    # losses
    gamma_align=Key(0.05, "γ1, weight of L_align", "[paper]", low=0),
    gamma_mp=Key(0.05, "γ2, weight of L_mp", "[paper]", low=0),
    tau_align=Key(0.2, "temperature of L_align", "[HAP]", low=1e-4),
    tau_mp=Key(0.1, "temperature of L_mp", "[StableRep], paper silent", low=1e-4),
    mp_token=Key("pose", "token of L_mp", "[paper]; cls: [StableRep]", ("pose", "cls")),
    projector=Key("none", "before L_mp: none, or mlp (3 layers, batch norm)", "[silent]", ("none", "mlp")),
    projector_width=Key(4096, "hidden width of the mlp projector", "[StableRep]", low=1),
    projector_out=Key(256, "output width of the mlp projector", "[StableRep]", low=1),
    views_are_positives=Key(True, "two views of one picture are positives in L_mp", "[silent]"),
    gather_gradient=Key(True, "gradient through gathered keys of L_align (false: as HAP's release)"),
    # optimiser
    epochs=Key(400, "passes over the data", "[HAP]", low=1),
    warmup_epochs=Key(40.0, "linear warm-up", "[HAP]", low=0),
    blr=Key(1.5e-4, "base learning rate; lr = blr · batch / 256", "[HAP] [MAE]", low=0),
    weight_decay=Key(0.05, "AdamW weight decay, not on 1-D parameters [MAE], nor (ours) tokens", "[HAP] [MAE]", low=0),
    beta2=Key(0.95, "AdamW β2 (β1 = .9)", "[HAP] [MAE]", low=0, high=0.99999),
    clip_grad=Key(0.0, "largest gradient norm; 0 = no clipping", "[HAP] [MAE]", low=0),
    accumulate=Key(1, "gradient accumulation; only 1: smaller batches have fewer negatives", low=1),
    seed=Key(0, "seed of everything", low=0),
    # machine
    precision=Key("auto", "fp32 (no TF32); bf16 autocast; auto: bf16 in hardware", choices=("auto", "fp32", "bf16")),
    compile=Key(False, "torch.compile the model"),
    checkpoint_activations=Key(False, "recompute activations: less memory, more time", free=True),
    device=Key("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"), free=True),
    workers=Key(2, "loader processes per rank", low=0, free=True),
    save_every=Key(500, "steps between checkpoints", low=1, free=True),
    log_every=Key(1, "steps between log lines", low=1, free=True),
    picture_every=Key(0, "steps between pictures; 0 = only at the end", low=0, free=True),
)  # fmt: skip
SHOWN = ("loss", "rec", "align", "mp")  # beside the progress bar


def main():
    cfg = read_config(KEYS, __doc__)
    rank, world, device = start_ranks(cfg.device, cfg.precision)
    check(cfg)

    dataset, batches, report = build_data(cfg, rank, world)
    seed_all(WEIGHTS, cfg.seed)  # initial weights
    model = build_model(cfg)
    total = cfg.epochs * batches.steps_per_epoch
    if open_run(cfg, KEYS, rank) == "finished":
        return
    model.to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, cfg.weight_decay), lr=0.0, betas=(0.9, cfg.beta2), fused=True)
    step = resume(Path(cfg.out) / "last.pt", model, optimizer)["step"]
    log = Log(cfg.out, total, step, rank, "pretrain")
    log.say(report + f", {total} steps of {cfg.batch}, {sum(p.numel() for p in model.parameters()):,} parameters")

    train(cfg, model, optimizer, dataset, batches, step, total, log, rank, world, device)

    draw(cfg, model, dataset, device, rank)
    if rank == 0:
        (Path(cfg.out) / "done").touch()
    log.close()
    sheets_drawn = ["reconstructions.png"] * cfg.decoder + ["neighbours.png", "attention.png"]
    log.say(f"wrote {cfg.out}/encoder.safetensors, {', '.join(sheets_drawn)}")
    barrier()


def check(cfg):
    """Settings that are valid one by one but not together."""
    if not cfg.annotations:
        raise UserError("annotations= names no file; give COCO keypoint JSON files, e.g. of generate.py")
    if cfg.images and len(cfg.images) != len(cfg.annotations):
        raise UserError(f"images= has {len(cfg.images)} folders for {len(cfg.annotations)} annotation files")
    if cfg.max_bad and not cfg.check_pictures:
        raise UserError("max_bad= leaves out what check_pictures=false does not look for; give one")
    if cfg.height % cfg.patch or cfg.width % cfg.patch:
        raise UserError(f"height={cfg.height} and width={cfg.width} must be multiples of patch={cfg.patch}")
    if cfg.accumulate > 1:
        raise UserError(
            "accumulate>1 is refused: accumulated gradients do not enlarge a contrastive batch (each part sees only "
            "its own negatives); use more ranks, checkpoint_activations=true or precision=bf16"
        )
    if cfg.decoder == (cfg.mask == "none"):
        raise UserError(f"decoder={cfg.decoder} with mask={cfg.mask}: L_rec needs masked patches")
    if cfg.decoder and round(cfg.mask_ratio * (cfg.height // cfg.patch) * (cfg.width // cfg.patch)) == 0:
        raise UserError(f"mask_ratio={cfg.mask_ratio} masks none of the patches; L_rec needs at least one")
    if not (cfg.decoder or cfg.gamma_align or cfg.gamma_mp):
        raise UserError("decoder=false and gamma_align=gamma_mp=0 leave no loss; set one of them")
    if cfg.mask == "none" and cfg.views > 1:
        raise UserError("mask=none with views=2: two unmasked views are the same; set views=1")
    if cfg.gamma_align and cfg.views < 2:
        raise UserError("gamma_align > 0 needs views=2: L_align compares two views of a picture")
    if cfg.mp_token == "pose" and not cfg.pose_token and cfg.gamma_mp:
        raise UserError("mp_token=pose needs pose_token=true")
    if cfg.gamma_mp and cfg.pictures_per_pose * (cfg.views if cfg.views_are_positives else 1) < 2:
        raise UserError(
            "a batch cannot hold one positive pair: pictures_per_pose=1 and the views are no positives; "
            "raise pictures_per_pose or set gamma_mp=0"
        )


def build_data(cfg, rank, world):
    """→ (dataset, batch sampler, a sentence about what was read)."""
    people, bad, clipped, named = [], 0, 0, []
    for f, path in enumerate(cfg.annotations):
        folder = cfg.images[f] if cfg.images else None
        read = dict(check_pictures=cfg.check_pictures, min_score=cfg.min_score)
        file_people, notes = read_people(path, folder, max_bad=cfg.max_bad - bad, **read)
        joints, parts = recognised(file_people.joints)
        if cfg.mask == "part" and parts < 3:
            raise UserError(
                f"{path}: {joints} of COCO's 17 joints are recognised, which link {parts} of 6 "
                "body parts; mask=part needs 3: name its joints as COCO does (left_shoulder, …), "
                "or set mask=random"
            )
        named.append(f"{joints} of 17 joints recognised" + ", given as scores" * notes["scores"])
        people.append(file_people)
        bad, clipped = bad + len(notes["bad"]), clipped + notes["clipped"]
    dataset = PretrainPictures(
        people,
        (cfg.height, cfg.width),
        cfg.seed,
        cfg.box_padding,
        cfg.region,
        cfg.crop_min,
        cfg.augmentation,
        cfg.shared,
    )
    grouped = int((dataset.pose_id >= 0).sum())
    if cfg.gamma_mp and not grouped:
        raise UserError(
            f"a batch cannot hold one positive pair: no annotation of {', '.join(cfg.annotations)} has a pose_id; "
            "add a generated set or set gamma_mp=0"
        )
    P = cfg.pictures_per_pose if cfg.gamma_mp else 1  # without L_mp nothing asks for whole poses
    batches = PoseBatches(dataset, cfg.batch, P, cfg.shares, cfg.seed, rank, world)
    if cfg.gamma_mp and not batches.posed:
        raise UserError("no batch can hold a positive pair: shares= or max_bad= leave no pose group; set gamma_mp=0")
    report = f"{len(dataset)} people, {grouped} with a pose group, {bad} bad pictures left out, {clipped} boxes clipped"
    report += f"; {', '.join(named)}"
    report += f", {batches.short} left out because their pose has fewer than {P} pictures" if batches.short else ""
    report += f"; an epoch shows {batches.steps_per_epoch * cfg.batch} pictures"
    return dataset, batches, report


def build_model(cfg):
    """The encoder (from `init` if given), decoder and projector of cfg, as one module whose forward is the method."""
    s = SIZES[cfg.size]
    encoder = ViT(
        s["width"], s["depth"], s["heads"], (cfg.height, cfg.width), cfg.patch, pose_token=cfg.pose_token,
        checkpoint_activations=cfg.checkpoint_activations,
    )  # fmt: skip
    if cfg.init:
        print(f"start from {cfg.init}: {load_file_into(encoder, cfg.init)}")
    decoder = Decoder(
        encoder, s["decoder_width"], s["decoder_depth"], s["decoder_heads"], cfg.pose_in_decoder
    ) if cfg.decoder else None  # fmt: skip
    return GenPoCCL(
        encoder, decoder, Projector(s["width"], cfg.projector, cfg.projector_width, cfg.projector_out),
        mask_ratio=cfg.mask_ratio, gamma_align=cfg.gamma_align, gamma_mp=cfg.gamma_mp, tau_align=cfg.tau_align,
        tau_mp=cfg.tau_mp, mp_token=cfg.mp_token, views_are_positives=cfg.views_are_positives,
        gather_gradient=cfg.gather_gradient,
    )  # fmt: skip


def draw_masks(cfg, keypoints, grid, step, rank, world):
    """One mask (B, N) per view, from numbers drawn for the global batch: f(seed, step) and this rank's rows of it."""
    if cfg.mask == "none":
        return [None] * cfg.views
    n = noise_size(grid) if cfg.mask == "part" else grid[0] * grid[1]
    views, batch, device = range(cfg.views), len(keypoints) * world, keypoints.device
    noise = torch.cat([rank_noise((MASK, cfg.seed, step, view), batch, n, rank, world, device) for view in views])
    if cfg.mask == "part":  # all views in one call: for small batches the calls cost more than the work
        keypoints = keypoints.repeat(cfg.views, 1, 1)
        masks = part_guided_mask(keypoints, grid, cfg.mask_ratio, cfg.patch, noise=noise)
    else:
        masks = random_mask(noise, cfg.mask_ratio)
    return list(masks.chunk(cfg.views))


def train(cfg, model, optimizer, dataset, batches, first, total, log, rank, world, device):
    """The loop. Nothing in a step waits for the device: its figures are read while the next step runs."""
    loader = training_loader(dataset, batches.run(first, total), cfg.workers, device)
    if cfg.compile:
        model.compile()
    runner = distributed(model, device)
    grid, peak, figures = model.encoder.grid, cfg.blr * cfg.batch / 256, None
    warmup = round(cfg.warmup_epochs * batches.steps_per_epoch)
    for step, sample in enumerate(loader, first):
        seed_all(STEP, cfg.seed, step)
        lr = learning_rate(step, total, warmup, peak)
        set_learning_rate(optimizer, lr)
        images = normalize(sample["image"].to(device, non_blocking=True))
        keypoints = sample["keypoints"].to(device, non_blocking=True)
        pose_id = sample["pose_id"].to(device, non_blocking=True)
        masks = draw_masks(cfg, keypoints, grid, step, rank, world)
        with autocast(device, cfg.precision):
            result = runner(images, masks, pose_id)
        result["total"].backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        settle(figures, log, dataset.name, cfg.batch, cfg.log_every, SHOWN)  # the step before this one
        values = {"loss": result["total"], **{k: result[k] for k in ("rec", "align", "mp")}, "grad_norm": norm}
        if result["z"] is not None:  # health of L_mp; also counts anchors without positives and pictures without pose
            health = [contrastive_health(z, ids) for z, ids in zip(result["z"], result["z_pose_id"])]
            values |= {name: sum(h[name] for h in health) / len(health) for name in health[0]}
        figures = Figures(step, lr, values, sample["index"], result["bad"])
        last = step + 1 == total
        if last or (step + 1) % cfg.save_every == 0:
            settle(figures, log, dataset.name, cfg.batch, cfg.log_every, SHOWN)  # never save a broken model
            figures = None
            save(cfg, model, optimizer, step + 1, rank)
        if cfg.picture_every and (step + 1) % cfg.picture_every == 0 and not last:
            draw(cfg, model, dataset, device, rank)
        log.advance()


def save(cfg, model, optimizer, step, rank):
    """Weights alone, then everything to resume: a kill in between repeats these steps, so the two always agree."""
    if rank == 0:
        out = Path(cfg.out)
        save_encoder(out / "encoder.safetensors", model.encoder, **meta_of(model.encoder, cfg.size))
        save_checkpoint(out / "last.pt", model=model.state_dict(), optimizer=optimizer.state_dict(), step=step)


@torch.no_grad()
def draw(cfg, model, dataset, device, rank):
    """Pictures of the same people at every call: reconstructions, nearest by the token of L_mp, attention. Rank 0."""
    if rank == 0:
        model.eval()
        out, share = Path(cfg.out), 256 // len(dataset.people)  # the first people of every file
        rows = [row for f in range(len(dataset.people)) for row in range(*dataset.starts[f : f + 2])[:share]]
        samples = [dataset[(0, row)] for row in rows]
        images = torch.stack([s["image"] for s in samples])
        keypoints = torch.stack([s["keypoints"] for s in samples])
        inputs = normalize(images.to(device))
        few = np.linspace(0, len(rows) - 1, min(8, len(rows))).round().astype(int)
        if cfg.decoder:
            mask = draw_masks(cfg, keypoints[few].to(device), model.encoder.grid, 0, 0, 1)[0]
            visible = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, : model.n_visible]
            pred = model.decoder(model.encoder(inputs[few], visible), visible)  # not model(): its losses ask all ranks
            sheets.reconstruction_sheet(inputs[few], mask, pred, cfg.patch, out / "reconstructions.png")
        special = torch.cat([model.encoder(part)[:, : model.encoder.n_special] for part in inputs.split(64)]).cpu()
        token = model.token if cfg.gamma_mp else model.encoder.n_special - 1  # that of L_mp, else the last
        name, pose_id = ("[CLS]", "[POSE]")[token], dataset.pose_id[rows].tolist()
        sheets.neighbour_sheet(images, special[:, token], pose_id, out / "neighbours.png", name)
        maps = model.encoder.attention_maps(inputs[few]).cpu()
        sheets.attention_sheet(images[few], maps, out / "attention.png")
        model.train()
    barrier()


if __name__ == "__main__":
    run_stage(main)
