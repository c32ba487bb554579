"""Stage 2 of GenPoCCL: picture sets → an encoder with [CLS] and [POSE].

    L = L_rec + γ1·L_align + γ2·L_mp                                               [paper, Fig. 2]

Inputs   COCO keypoint JSON files with pictures, or plain folders: generated sets (annotations carry
         pose_id: pictures of one pose are positives) and real ones (no pose_id: they train L_rec
         and L_align and are left out of L_mp).
Outputs  in `out`: encoder.safetensors, last.pt (everything to resume), log.jsonl, config.yaml, and
         pictures: reconstructions.png, neighbours.png (nearest by L_mp's token), attention.png,
         correspondence.png (patches under joints), curves.png (of the log).

  python pretrain.py --cfg configs/pretrain_demo.yaml                       # laptop
  torchrun --nproc_per_node=8 pretrain.py --cfg configs/pretrain_coco.yaml  # GPUs
  python pretrain.py predict=my_pictures weights=encoder.safetensors        # features of a folder

MAE, HAP and StableRep are settings of this script: configs/pretrain_{mae,hap,stablerep}.yaml.
Legend: B pictures on this rank · N patches · K pictures of a pose in a batch · h, w grid.
"""

import common  # first: Ctrl-C while the libraries load

# isort: split
from pathlib import Path

import numpy as np
import torch

import data
from common import UserError
from drawing import training as sheets
from formats.coco import MIN_SCORE, Limits, check_sources, other_joints, read_people
from formats.weights import load_into, meta_of, training_of
from model import SIZES, Decoder, GenPoCCL, Projector, ViT, normalize
from plumbing.config import MACHINE, Key, read_config
from tasks.features import predict
from tasks.probe import HeldOut

KEYS = dict(
    out=Key("runs/pretrain", "run folder"),
    # data
    annotations=Key([], "COCO JSON files and plain folders of pictures, generated and real ones"),
    images=Key([], "picture folder of each (default: `images` beside a file, or its own folder)"),
    shares=Key([], "share of each in an epoch (default: every picture once)", "[silent]",
               of=float, low=0),
    check_pictures=Key(True, "look at every picture at the first start", may_change=True),
    max_bad=Key(0, "missing, empty or truncated pictures left out at most, counted", low=0),
    max_bad_boxes=Key(0, "boxes without area on their picture left out at most, counted", low=0),
    min_score=Key(MIN_SCORE, "joints visible from this score on, where annotations hold scores",
                  "[HRNet] [ViTPose]", low=0.01, high=1),
    height=Key(256, "input height", "[HAP]", low=16),
    width=Key(128, "input width", "[HAP]", low=16),
    box_padding=Key(1.25, "boxes grow by this factor before cropping, within the picture", low=1),
    region=Key("grow", "a box too wide or too tall for a crop: grow, black beyond the picture; "
               "or box: it loses its sides", "ours; [HAP] reads whole crops", ("grow", "box")),
    crop_min=Key(0.8, "smallest share of the region in a random crop",
                 "[HAP]; .2 [MAE], .08 [StableRep]", low=0.01, high=1),
    shared=Key("flip", "drawn once for all pictures of a pose in an epoch: nothing, flip, or "
               "crop: both flip and crop", "[silent]", ("nothing", "flip", "crop")),
    augmentation=Key("hap", "hap: crop and flip; strong: + jitter, grey, blur [StableRep]",
                     "[HAP]", ("hap", "strong")),
    pictures_per_pose=Key(5, "K: pictures of one pose in a batch, with gamma_mp; 1: not grouped",
                          "[silent]", low=1),
    batch=Key(4080, "pictures in a global batch", "[HAP] 4096; groups of 5 on 8 ranks", low=1),
    # model
    size=Key("base", "encoder size", "[HAP]", tuple(SIZES)),
    patch=Key(16, "patch side in pixels", "[MAE]", low=1),
    pose_token=Key(True, "a second token, [POSE]", "[paper]"),
    init=Key(None, "weights to start from: ours, MAE, HAP, timm, torchvision, DINOv2 …",
             "[HAP] starts from MAE ViT-B"),
    views=Key(2, "independent maskings of each picture", "[HAP]", (1, 2)),
    mask=Key("part", "part: part-guided [HAP]; random [MAE]; none [StableRep]", "[HAP]",
             ("part", "random", "none")),
    mask_ratio=Key(0.5, "share of masked patches", "[HAP]", low=0, high=0.95),
    decoder=Key(True, "masked decoder and L_rec", "[HAP]"),
    pose_in_decoder=Key(True, "[POSE] is seen by the decoder", "[silent]"),
    compile=Key(False, "torch.compile the model"),
    checkpoint_activations=Key(False, "recompute activations: less memory", may_change=True),
    accumulate=Key(1, "split a rank's batch into so many parts: less memory, the same gradient",
                   "[GradCache]", low=1, may_change=True),
    # losses
    gamma_align=Key(0.05, "γ1, weight of L_align", "[paper]", low=0),
    gamma_mp=Key(0.05, "γ2, weight of L_mp", "[paper]", low=0),
    tau_align=Key(0.2, "temperature of L_align", "[HAP]", low=1e-4),
    tau_mp=Key(0.1, "temperature of L_mp", "[StableRep], paper silent", low=1e-4),
    mp_token=Key("pose", "token of L_mp", "[paper]; cls: [StableRep]", ("pose", "cls")),
    projector=Key("none", "before L_mp: none, or mlp (3 layers, batch norm)", "[silent]",
                  ("none", "mlp")),
    projector_width=Key(4096, "hidden width of the mlp projector", "[StableRep]", low=1),
    projector_out=Key(256, "output width of the mlp projector", "[StableRep]", low=1),
    views_are_positives=Key(True, "views of one picture are positives in L_mp", "[silent]"),
    gather_gradient=Key(True, "gradient through L_align's gathered keys (false: HAP's release)"),
    # optimiser
    epochs=Key(400, "passes over the data", "[HAP]", low=1),
    resume_from=Key(None, "a finished run's folder or last.pt, to go on with by larger epochs= in "
                    "a new out=; the new schedule is entered at the step reached"),
    warmup_epochs=Key(40.0, "linear warm-up", "[HAP]", low=0),
    blr=Key(1.5e-4, "base learning rate; lr = blr · batch / 256", "[HAP] [MAE]", low=0),
    weight_decay=Key(0.05, "AdamW weight decay, not on 1-D parameters [MAE], nor (ours) tokens",
                     "[HAP] [MAE]", low=0),
    beta2=Key(0.95, "AdamW β2 (β1 = .9)", "[HAP] [MAE]", low=0, high=0.99999),
    clip_grad=Key(0.0, "largest gradient norm; 0 = no clipping", "[HAP] [MAE]", low=0),
    keep_every=Key(0, "epochs between copies of the encoder, encoder_0010.safetensors; 0 = none",
                   low=0, may_change=True),
    score_annotations=Key(None, "COCO JSON of held-out people: do nearest pictures share a pose?",
                          may_change=True),
    score_every=Key(0, "steps between such scores; 0 = only at the end", low=0, may_change=True),
    picture_every=Key(0, "steps between pictures; 0 = only at the end", low=0, may_change=True),
    # features instead of a training
    predict=Key(None, "no training: features of a folder of pictures, or of one, by weights="),
    weights=Key(None, "an encoder for predict: encoder.safetensors, or others' as for init"),
) | MACHINE  # fmt: skip


def main():
    cfg = read_config(KEYS, __doc__)
    ranks = common.start_ranks(cfg.device, cfg.precision)
    if cfg.predict or cfg.weights:
        return predict(cfg, KEYS, ranks)
    check(cfg)
    # Everything that can be wrong with the input is found before the run folder is made.
    dataset, batches, about = build_data(cfg, ranks)
    held = HeldOut(cfg)
    earlier = common.earlier_run(cfg, KEYS, batches.steps_per_epoch)
    with torch.device("meta"):  # counted before it is claimed
        common.check_memory(build_model(cfg), cfg.batch // ranks.world, ranks.device)
    common.seed_all(common.WEIGHTS, cfg.seed)
    model = build_model(cfg)
    if cfg.init and not cfg.resume_from:
        about += f"; start from {cfg.init}: {load_into(model.encoder, cfg.init)}"
    if common.open_run(cfg, KEYS, ranks) == "finished":
        return
    model.to(ranks.device)
    groups = common.parameter_groups(model, cfg.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, cfg.beta2), fused=True)
    first = common.resume(Path(cfg.out) / "last.pt", model, optimizer, earlier)["step"]
    total = cfg.epochs * batches.steps_per_epoch
    warmup = round(cfg.warmup_epochs * batches.steps_per_epoch)
    log = common.StepLog(cfg, ranks, dataset, batches, first, total)
    n_parameters = sum(p.numel() for p in model.parameters())
    log.say(f"{about}, {total} steps of {cfg.batch}, {n_parameters:,} parameters")
    if warmup >= total:
        log.say(f"the rate only rises: warmup_epochs={cfg.warmup_epochs:g}, epochs={cfg.epochs}")
    if earlier:
        log.say(f"prolongs {earlier}: the schedule of {cfg.epochs} epochs is entered at this step")
    loader = common.training_loader(dataset, batches.steps(first, total), cfg.workers, ranks.device)
    if cfg.compile:
        model.compile()
    # In parts the ranks' gradients are added up by hand: a wrapper would hold a copy of them.
    runner = model if cfg.accumulate > 1 else common.distributed(model, ranks.device)

    # Nothing in a step waits for the device: its figures are read while the next step runs.
    for step, sample in enumerate(loader, first):
        # For a loss of your own that draws random numbers; nothing below does.
        common.seed_all(common.STEP, cfg.seed, step)
        lr = common.learning_rate(step, total, warmup, peak=cfg.blr * cfg.batch / 256)
        common.set_learning_rate(optimizer, lr)
        images = normalize(sample["image"].to(ranks.device, non_blocking=True))
        keypoints = sample["keypoints"].to(ranks.device, non_blocking=True)
        pose_id = sample["pose_id"].to(ranks.device, non_blocking=True)
        # Masks are drawn here, not in the loader: they are those of the whole global batch.
        masks = draw_masks(cfg, keypoints, model.encoder.grid, step, ranks)
        autocast = common.autocast(ranks.device, cfg.precision)
        if cfg.accumulate == 1:
            with autocast:
                result = runner(images, masks, pose_id)  # the method: GenPoCCL.forward
            # Outside autocast. This rank's share of the loss: DDP's mean of the gradients over the
            # ranks is the gradient of the global batch (losses.py).
            result["total"].backward()
        else:  # the same gradient in less memory
            batch = images, masks, pose_id
            result = common.backward_in_parts(model, batch, cfg.accumulate, autocast)
        largest = cfg.clip_grad or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), largest)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        values = {"loss": result["total"]}
        values |= {name: result[name] for name in ("rec", "align", "mp")} | {"grad_norm": norm}
        log.record(step, lr, values | health(result), sample["index"], result["bad"])
        if held.due(step + 1, total):
            log.flush()  # the step's own line comes first
            log.write(step=step + 1, **held.score(model.encoder, ranks))
        epoch, rest = divmod(step + 1, batches.steps_per_epoch)
        keep = epoch if cfg.keep_every and rest == 0 and epoch % cfg.keep_every == 0 else None
        if log.saves(step) or keep:
            log.flush()  # never save a broken model
            save(cfg, model, optimizer, step + 1, ranks, keep)
            log.stop_if_asked(step)
        if cfg.picture_every and (step + 1) % cfg.picture_every == 0 and step + 1 < total:
            draw(cfg, model, dataset, ranks)

    log.close()
    drawn = draw(cfg, model, dataset, ranks)
    if ranks.rank == 0:
        sheets.draw_curves([cfg.out], Path(cfg.out) / "curves.png")
        common.finish_run(cfg.out)
    log.say(f"wrote {cfg.out}/encoder.safetensors, curves.png, {drawn}")
    common.barrier()


# ------------------------------------------------------------------------------- data, model, masks


def build_data(cfg, ranks):
    """→ (dataset, batch sampler, a sentence about what was read)."""
    people, named, counted = [], [], {"bad pictures left out": 0, "boxes clipped": 0}
    counted["people with bad boxes left out"] = 0
    for f, path in enumerate(cfg.annotations):
        limits = Limits(
            min_score=cfg.min_score,
            max_bad=cfg.max_bad - counted["bad pictures left out"],
            max_bad_boxes=cfg.max_bad_boxes - counted["people with bad boxes left out"],
            check_pictures=cfg.check_pictures,
        )
        folder = cfg.images[f] if cfg.images else None
        file_people, notes = read_people(path, folder, limits)
        check_joints(cfg, path, file_people)
        people.append(file_people)
        named.append(f"{data.recognised(file_people.joints)[0]} of 17 joints recognised")
        named[-1] += other_joints(file_people.joints)
        if notes["scores"]:
            named[-1] += ", given as scores"
        counted["bad pictures left out"] += len(notes["bad"])
        counted["boxes clipped"] += notes["clipped"]
        counted["people with bad boxes left out"] += notes["bad_boxes"]
    options = data.Augmentation(
        cfg.box_padding, cfg.region, cfg.crop_min, cfg.augmentation == "strong", cfg.shared
    )
    dataset = data.PretrainPictures(people, (cfg.height, cfg.width), cfg.seed, options)
    grouped = int((dataset.pose_id >= 0).sum())
    if cfg.gamma_mp and not grouped:
        raise UserError(
            "a batch cannot hold one positive pair: no annotation of "
            f"{', '.join(cfg.annotations)} has a pose_id; add a generated set or set gamma_mp=0"
        )
    # L_mp needs several pictures of a pose in a batch; without it nothing asks for whole poses.
    K = cfg.pictures_per_pose if cfg.gamma_mp else 1
    batches = data.PoseBatches(dataset, cfg.batch, K, cfg.shares, cfg.seed, ranks)
    own = cfg.batch // ranks.world
    if own % cfg.accumulate:
        raise UserError(f"accumulate={cfg.accumulate} must divide the {own} pictures of a rank")
    if cfg.gamma_mp and not batches.posed:
        raise UserError(
            "no batch can hold a positive pair: shares= or max_bad= leave no pose group; "
            "set gamma_mp=0"
        )
    about = f"{len(dataset)} people, {grouped} with a pose group"
    about += "".join(f", {n} {what}" for what, n in counted.items()) + f"; {', '.join(named)}"
    if batches.short:
        about += f", {batches.short} left out because their pose has fewer than {K} pictures"
    about += f"; an epoch shows {batches.steps_per_epoch * cfg.batch} pictures"
    return dataset, batches, about


def build_model(cfg):
    """Encoder, decoder and projector with random weights, as one module: the method."""
    s = SIZES[cfg.size]
    encoder = ViT(
        s["width"], s["depth"], s["heads"], (cfg.height, cfg.width), cfg.patch, cfg.pose_token,
        checkpoint_activations=cfg.checkpoint_activations,
    )  # fmt: skip
    decoder = None
    if cfg.decoder:
        shape = s["decoder_width"], s["decoder_depth"], s["decoder_heads"]
        decoder = Decoder(encoder, *shape, cfg.pose_in_decoder)
    projector = Projector(s["width"], cfg.projector, cfg.projector_width, cfg.projector_out)
    return GenPoCCL(
        encoder, decoder, projector, cfg.mask_ratio, cfg.gamma_align, cfg.gamma_mp,
        cfg.tau_align, cfg.tau_mp, cfg.mp_token, cfg.views_are_positives, cfg.gather_gradient,
    )  # fmt: skip


def draw_masks(cfg, keypoints, grid, step, ranks):
    """One mask (B, N) per view, f(seed, step): this rank's rows of those of the global batch."""
    if cfg.mask == "none":
        return [None] * cfg.views
    n = data.noise_size(grid) if cfg.mask == "part" else grid[0] * grid[1]
    # Drawn for the global batch, then cut to this rank's rows: ranks change no mask.
    batch, noise = len(keypoints) * ranks.world, []
    for view in range(cfg.views):
        key = common.MASK, cfg.seed, step, view
        noise.append(common.rank_noise(key, batch, n, ranks))
    noise = torch.cat(noise)  # all views in one call: in small batches calls cost more than work
    if cfg.mask == "part":
        # Each view has its own noise: two different holes in the same picture.
        keypoints = keypoints.repeat(cfg.views, 1, 1)
        masks = data.part_guided_mask(keypoints, grid, cfg.mask_ratio, cfg.patch, noise=noise)
    else:
        masks = data.random_mask(noise, cfg.mask_ratio)
    return list(masks.chunk(cfg.views))


def health(result):
    """Is L_mp learning poses or collapsing? losses.contrastive_health, mean over its sets."""
    sets = result["health"]
    names = sets[0] if sets else []
    return {name: sum(figures[name] for figures in sets) / len(sets) for name in names}


# ------------------------------------------------------------------------------- files and pictures


def save(cfg, model, optimizer, step, ranks, keep):
    """Weights alone, also under the number of an epoch to `keep`, then everything to resume. This
    comes last: after a kill in between the steps are repeated, so the files agree again."""
    if ranks.rank == 0:
        out, weights = Path(cfg.out), model.state_dict()
        meta = meta_of(model.encoder) | dict(training=training_of(cfg, KEYS, step))
        for name in ["encoder", *([f"encoder_{keep:04}"] if keep else [])]:
            common.save_weights(out / f"{name}.safetensors", model.encoder, **meta)
        state = optimizer.state_dict()
        common.save_checkpoint(out / "last.pt", model=weights, optimizer=state, step=step)


def draw(cfg, model, dataset, ranks):
    """Pictures of the same people at every call, by rank 0. → what is drawn, what is not."""
    text = ""
    if ranks.rank == 0:
        # The first people of every file.
        rows, share = [], max(1, 256 // len(dataset.people))
        for start, end in zip(dataset.starts, dataset.starts[1:]):
            rows += range(start, min(end, start + share))
        samples, mask = [dataset[(0, row)] for row in rows], None
        few = np.linspace(0, len(rows) - 1, min(8, len(rows))).round().astype(int)
        if cfg.decoder:
            keypoints = torch.stack([samples[i]["keypoints"] for i in few]).to(ranks.device)
            alone = common.Ranks(0, 1, ranks.device)
            mask = draw_masks(cfg, keypoints, model.encoder.grid, 0, alone)[0]
        drawn, missing = sheets.draw_pretraining(model, samples, few, mask, cfg.out)
        text = ", ".join(drawn) + (f" ({missing})" if missing else "")
    common.barrier()
    return text


# ------------------------------------------------------------------------------------------- checks


def check(cfg):
    """Settings that are valid one by one but not together."""
    check_sources(cfg)
    masked = cfg.mask != "none"
    if cfg.decoder != masked:
        both = f"decoder={cfg.decoder} with mask={cfg.mask}"
        raise UserError(f"{both}: L_rec needs masked patches, and masks need L_rec")
    patches = (cfg.height // cfg.patch) * (cfg.width // cfg.patch)
    masks = round(cfg.mask_ratio * patches)
    if cfg.decoder and masks in (0, patches):
        what = "none of {} patches; raise it" if masks == 0 else "all {} patches; lower it"
        raise UserError(f"mask_ratio={cfg.mask_ratio} masks {what.format(patches)}")
    if not (cfg.decoder or cfg.gamma_align or cfg.gamma_mp):
        raise UserError("decoder=false and gamma_align=gamma_mp=0 leave no loss; set gamma_mp")
    if cfg.mask == "none" and cfg.views > 1:
        raise UserError("mask=none with views=2: two unmasked views are the same; set views=1")
    if cfg.gamma_align and cfg.views < 2:
        raise UserError("gamma_align > 0 needs views=2: L_align compares two views of a picture")
    if cfg.mp_token == "pose" and not cfg.pose_token and cfg.gamma_mp:
        raise UserError("mp_token=pose needs pose_token=true")
    if cfg.gamma_mp and cfg.batch <= cfg.pictures_per_pose:
        one = f"batch={cfg.batch} holds one pose of pictures_per_pose={cfg.pictures_per_pose}"
        raise UserError(f"{one}: L_mp has no negatives; raise batch= or set gamma_mp=0")
    positives = cfg.pictures_per_pose * (cfg.views if cfg.views_are_positives else 1)
    if cfg.gamma_mp and positives < 2:
        raise UserError(
            "a batch cannot hold one positive pair: pictures_per_pose=1 and the views are no "
            "positives; raise pictures_per_pose or set gamma_mp=0"
        )


def check_joints(cfg, path, people):
    """Part-guided masks need links of at least half of the six body parts."""
    joints, parts = data.recognised(people.joints)
    if cfg.mask == "part" and parts < 3:
        raise UserError(
            f"{path}: {joints} of COCO's 17 joints are recognised, which link {parts} of 6 body "
            "parts; mask=part needs 3: name its joints as COCO does (left_shoulder, …), or set "
            "mask=random"
        )


if __name__ == "__main__":
    common.run_stage(main)
