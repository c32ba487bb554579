"""SynCLR (arXiv 2312.17742, CVPR 2024): pictures of one caption → an encoder.

    L = L_mp(global crop) + mean over local crops of L_mp + γ·L_iBOT

L_mp    the projected [CLS] of a crop finds, among the teacher's [CLS] of all ranks' pictures, the
        other pictures of its caption [StableRep]. The teacher is the student's moving average.
L_iBOT  of half of the pictures the student sees half of the patches; from them it tells which
        prototype the teacher, who sees all, gives to each masked patch [iBOT].

Inputs   pictures whose pose_id names their caption: generate.py with backend=text, or the puppet's
         with positives=prompt. With a set of poses it is SynCLR on GenPoCCL's positives.
Outputs  in `out`: encoder.safetensors (the student's), last.pt, log.jsonl, metrics.json,
         curves.png, neighbours.png (nearest pictures by [CLS]), prototypes.png (which prototype a
         patch is of).

  python baselines/synclr.py --cfg configs/synclr_demo.yaml                        # laptop
  torchrun --nproc_per_node=8 baselines/synclr.py --cfg configs/synclr.yaml        # GPUs

Kept: candidates from the teacher, the own picture left out but for local crops; a predictor on the
student alone; Sinkhorn-Knopp over all ranks; local crops join L_mp alone; masked pictures join it
too. Read beside google-research/syn-rep-learn, SynCLR/train_pytorch [SynCLR]: a reference by the
authors; the published weights were trained by other code of theirs.
Deviations:
  captions    a language model's there; here the set's own
  network     this project's ViT with fixed positions, on 256 × 128 crops of people's boxes
  prototypes  of length 1 [DINO]; the release learns their length. Logits are cosines, whose
              exp(cosine / .04) cannot overflow
  masks       in blocks [iBOT], filled at random to exactly the ratio, so that shapes stay the same;
              data.block_mask's smallest block is 12 patches. mask=random: the release's command
  which half  of every caption's pictures, drawn anew (2 of 5); the release's first half of a batch
              comes to the same share of each caption
  colours     StableRep's jitter, grey, blur; the release blurs always, or rarely and solarizes
  decay       none on tokens; there only 1-D parameters are spared
  export      the student; where SynCLR's weights come from, its release does not say

Legend: B pictures on this rank, M on all · P of a caption · l local crops · N patches, n of them
masked in each of m pictures · S special tokens · K prototypes · D width · d of the projection.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plumbing.quiet  # noqa: E402, F401  before the libraries: Ctrl-C while they load

# isort: split
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import data
import losses
from baselines import parts, synclr_report
from common import UserError
from data import Augmentation, PoseBatches
from drawing.curves import draw_curves
from formats.weights import load_into, save
from losses import full_precision, gather_rows_of, no_autocast, pair_masks
from model import SIZES, ViT, normalize, split_mask, take_patches
from plumbing.config import MACHINE, Key, read_config

KEYS = dict(out=Key("runs/synclr", "run folder")) | parts.DATA | dict(
    # crops
    pictures_per_caption=Key(4, "P: pictures of one caption in a batch", "[SynCLR]", low=2),
    batch=Key(8192, "pictures in a global batch", "[SynCLR] 2,048 captions × 4", low=2),
    crop_min=Key(0.32, "smallest share of the region in a global crop", "[SynCLR]",
                 low=0.01, high=1),
    local_crops=Key(4, "l: local crops of a picture; 0: none", "[SynCLR]", low=0),
    local_min=Key(0.08, "smallest share of the region in a local crop", "[SynCLR]",
                  low=0.01, high=1),
    local_max=Key(0.32, "largest one", "[SynCLR]", low=0.01, high=1),
    local_height=Key(96, "height of a local crop", "[SynCLR] 96 of 224; ours of 256", low=16),
    local_width=Key(48, "width of a local crop", "ours", low=16),
    augmentation=Key("strong", "strong: jitter, grey, blur; hap: crop and flip alone",
                     "[StableRep]", ("strong", "hap")),
    # losses
    tau_mp=Key(0.1, "temperature of L_mp", "[SynCLR]", low=1e-4),
    projector_width=Key(4096, "hidden width of projector and predictor", "[SynCLR]", low=1),
    projector_out=Key(256, "d: their output width", "[SynCLR]", low=1),
    gamma_ibot=Key(1.0, "γ, weight of L_iBOT", "[SynCLR]", low=0),
    prototypes=Key(8192, "K", "[SynCLR]", low=2),
    head_width=Key(2048, "hidden width of the head before the prototypes", "[SynCLR]", low=1),
    mask=Key("block", "shape of masks: block [iBOT]; random, as the release's command has it",
             "[iBOT]", ("block", "random")),
    mask_share=Key(0.5, "share of each caption's pictures that are masked", "[SynCLR]",
                   low=0.01, high=1),
    mask_ratio=Key(0.5, "share of masked patches of these", "[SynCLR]", low=0.01, high=0.95),
    tau_student=Key(0.1, "temperature of the student's prototypes", "[SynCLR]", low=1e-3),
    tau_teacher_start=Key(0.04, "the teacher's, at the start", "[SynCLR]", low=0.03),
    tau_teacher=Key(0.07, "the teacher's, after its warm-up", "[SynCLR]", low=0.03),
    tau_warmup_epochs=Key(1.0, "that warm-up, linear", "[SynCLR]", low=0),
    momentum=Key(0.994, "of the teacher, → 1 on half a cosine", "[SynCLR]", low=0, high=1),
    # optimiser
    epochs=Key(15, "passes over the data", "[SynCLR] on 150 M captions", low=1),
    warmup_epochs=Key(0.5, "linear warm-up", "[SynCLR]", low=0),
    blr=Key(7.5e-5, "base learning rate; lr = blr · batch / 256",
            "[SynCLR] 1.5e-4, which its formula halves", low=0),
    weight_decay=Key(0.1, "AdamW weight decay, none on 1-D parameters", "[SynCLR]", low=0),
    beta2=Key(0.98, "AdamW β2 (β1 = .9)", "[SynCLR]", low=0, high=0.99999),
    clip_grad=Key(0.0, "largest gradient norm; 0 = no clipping", "[SynCLR]", low=0),
) | MACHINE  # fmt: skip

ROUNDS = 3  # of Sinkhorn-Knopp [SynCLR]


def main():
    cfg = read_config(KEYS, __doc__)
    ranks = common.start_ranks(cfg.device, cfg.precision)
    check(cfg)
    people, about = parts.read_pictures(cfg)
    options = Augmentation(crop_min=cfg.crop_min, strong=cfg.augmentation == "strong")
    local = cfg.local_crops, (cfg.local_height, cfg.local_width), (cfg.local_min, cfg.local_max)
    local = local if cfg.local_crops else None
    dataset = parts.Crops(people, (cfg.height, cfg.width), cfg.seed, options, 1, local)
    P = cfg.pictures_per_caption
    batches = PoseBatches(dataset, cfg.batch, P, [], cfg.seed, ranks)
    if not batches.posed:
        files = ", ".join(cfg.annotations)
        raise UserError(f"no two pictures share a caption: {files} holds no pose_id; make a set "
                        "with generate.py positives=prompt or backend=text")  # fmt: skip
    with torch.device("meta"):
        common.check_memory(build_model(cfg).student, cfg.batch // ranks.world, ranks.device)
    common.seed_all(common.WEIGHTS, cfg.seed)
    model = build_model(cfg)
    if cfg.init:
        about += f"; start from {cfg.init}: {load_into(model.student.encoder, cfg.init)}"
        model.teacher.load_state_dict(model.student.state_dict())
    if common.open_run(cfg, KEYS, ranks) == "finished":
        return
    model.to(ranks.device)
    groups = common.parameter_groups(model, cfg.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, cfg.beta2), fused=True)
    first = common.resume(Path(cfg.out) / "last.pt", model, optimizer)["step"]
    total = cfg.epochs * batches.steps_per_epoch
    warmup = round(cfg.warmup_epochs * batches.steps_per_epoch)
    log = common.StepLog(cfg, ranks, dataset, batches, first, total)
    captions = len(set(dataset.pose_id.tolist()) - {-1})
    if batches.short:
        about += f", {batches.short} left out because their caption has fewer than {P} pictures"
    log.say(f"{about}, {captions} captions, {total} steps of {cfg.batch} pictures")
    loader = common.training_loader(dataset, batches.steps(first, total), cfg.workers, ranks.device)
    runner = common.distributed(model, ranks.device)

    for step, sample in enumerate(loader, first):
        common.seed_all(common.STEP, cfg.seed, step)
        lr = common.learning_rate(step, total, warmup, peak=cfg.blr * cfg.batch / 256)
        common.set_learning_rate(optimizer, lr)
        images = normalize(sample["image"].to(ranks.device, non_blocking=True)[:, 0])
        local = None
        if cfg.local_crops:  # (B, l, …) → l of (B, 3, h, w), one behind the other
            local = sample["local"].to(ranks.device, non_blocking=True)
            local = normalize(local.transpose(0, 1).flatten(0, 1))
        caption = sample["pose_id"].to(ranks.device, non_blocking=True)
        masks = draw_masks(cfg, model.student.encoder.grid, step, len(images), ranks)
        # [SynCLR] .04 → .07, linear over the warm-up.
        done = min(1.0, step / max(1, cfg.tau_warmup_epochs * batches.steps_per_epoch))
        tau_teacher = cfg.tau_teacher_start + done * (cfg.tau_teacher - cfg.tau_teacher_start)
        with common.autocast(ranks.device, cfg.precision):
            result = runner(images, local, masks, caption, tau_teacher)
        result["total"].backward()
        largest = cfg.clip_grad or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), largest)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # Before the next step: its targets come from this step's student too.
        momentum = common.cosine_between(step, total, cfg.momentum, 1.0)
        parts.update_teacher(model.teacher, model.student, momentum)

        values = {"loss": result["total"]}
        values |= {name: result[name] for name in ("mp", "mp_local", "ibot")}
        values |= {"grad_norm": norm, "target_entropy": result["target_entropy"]}
        values |= losses.contrastive_health(result["z"], caption)
        log.record(step, lr, values, sample["index"], result["bad"])
        if log.saves(step):
            log.flush()
            if ranks.rank == 0:
                save(cfg.out, model.student.encoder, model, optimizer, step + 1)
            log.stop_if_asked(step)

    log.close()
    if ranks.rank == 0:
        figures = synclr_report.evaluate(cfg, model.student, people)
        log.write(step=total, final=True, **figures)
        common.write_json(Path(cfg.out) / "metrics.json", figures)
        print("\n".join(f"{name}: {value}" for name, value in figures.items()))
        draw_curves([cfg.out], Path(cfg.out) / "curves.png")
        common.finish_run(cfg.out)
    log.say(f"wrote {cfg.out}/encoder.safetensors, neighbours.png, prototypes.png, curves.png")
    common.barrier()


# --------------------------------------------------------------------------------------- the method


class SynCLR(nn.Module):
    """Student, its moving average, and one step of the method."""

    def __init__(self, encoder, cfg):
        super().__init__()
        # Student and teacher: encoder, projector of [CLS], head of the patches.
        self.student = nn.ModuleDict(dict(encoder=encoder))
        self.student.projector = mlp(encoder.width, cfg.projector_width, cfg.projector_out, 3)
        self.student.head = parts.Head(encoder.width, cfg.head_width, cfg.prototypes)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.predictor = mlp(cfg.projector_out, cfg.projector_width, cfg.projector_out, 2)
        self.mask_token = nn.Parameter(torch.randn(1, 1, encoder.width) * 0.02)  # [iBOT]
        grid = encoder.grid
        self.n_masked = round(cfg.mask_ratio * grid[0] * grid[1])
        self.tau_mp, self.tau_student, self.gamma = cfg.tau_mp, cfg.tau_student, cfg.gamma_ibot

    def forward(self, images, local, masks, caption, tau_teacher):
        """images (B, 3, H, W) and local (l·B, 3, h, w) or None, normalised; masks of draw_masks;
        caption (B,) int64, −1 = none. → dict: total, mp, mp_local, ibot (this rank's shares),
        target_entropy; z (B, d); bad (B,) bool: pictures whose output is not finite."""
        (rows, mask), student, teacher = masks, self.student, self.teacher
        S = student.encoder.n_special
        masked = split_mask(mask, mask.shape[1] - self.n_masked)[1]  # (m, n) patch ids

        # The teacher sees whole pictures: candidates, and the prototypes of hidden patches.
        with torch.no_grad():
            tokens = teacher.encoder(images)
            candidates = teacher.projector(tokens[:, 0])
            cosines = teacher.head(take_patches(tokens[rows, S:], masked).flatten(0, 1))
            targets = sinkhorn(cosines / tau_teacher)

        # The student sees mask tokens in place of these patches [iBOT].
        hidden = torch.zeros(len(images), mask.shape[1], dtype=torch.bool, device=mask.device)
        hidden[rows] = mask
        tokens = self.encode_masked(images, hidden)
        z = self.predictor(student.projector(tokens[:, 0]))

        # Eq.  L_mp(a) = −Σ_j p_ij log q_ij,  q_ij = exp(a_i·b_j/τ) / Σ_k exp(a_i·b_k/τ):
        # a of the student, b of the teacher; p_ij alike for all pictures j of i's caption.
        mp = caption_loss(z, candidates, *pairs_of(caption), self.tau_mp)

        # A local crop also has its own picture's global crop for a positive.
        mp_local = torch.zeros_like(mp)
        if local is not None:
            small = parts.at_size(student.encoder, local.shape[-2:])
            z_local = self.predictor(student.projector(small(local)[:, 0])).split(len(images))
            pairs = pairs_of(caption, own=True)
            for crop in z_local:
                mp_local = mp_local + caption_loss(crop, candidates, *pairs, self.tau_mp)
            mp_local = mp_local / len(z_local)

        # L_iBOT = −1/(m·n) Σ over masked patches Σ_k target_k log softmax(cosine_k / τ)
        cosines = student.head(take_patches(tokens[rows, S:], masked).flatten(0, 1))
        ibot = -(targets * F.log_softmax(cosines / self.tau_student, 1)).sum(1).mean()

        out = dict(total=mp + mp_local + self.gamma * ibot, mp=mp, mp_local=mp_local, ibot=ibot)
        entropy = torch.special.entr(targets).sum(1).mean()  # −Σ_k p_k ln p_k
        finite = tokens.detach().float().sum((1, 2)).isfinite()
        return out | dict(target_entropy=entropy, z=z.detach(), bad=~finite)

    def encode_masked(self, images, hidden):
        """The student's tokens (B, S + N, D); hidden (B, N) bool: mask tokens, at their places."""
        encoder = self.student.encoder
        S = encoder.n_special
        x = encoder.embed(images)
        masked = self.mask_token + encoder.pos_embed
        patches = torch.where(hidden[:, :, None], masked.to(x.dtype), x[:, S:])
        x = torch.cat([x[:, :S], patches], dim=1)
        for block in encoder.blocks:
            x = block(x)
        return encoder.norm(x)


def mlp(width, hidden, out, layers):
    """[SynCLR] linear layers with LayerNorm and GELU; the last with a LayerNorm alone."""
    steps = []
    for i in range(layers - 1):
        steps += [nn.Linear(hidden if i else width, hidden), nn.LayerNorm(hidden), nn.GELU()]
        nn.init.zeros_(steps[-3].bias)
    steps += [nn.Linear(hidden, out, bias=False), nn.LayerNorm(out, elementwise_affine=False)]
    for layer in steps[::3]:
        nn.init.trunc_normal_(layer.weight, std=0.02)
    return nn.Sequential(*steps)


def pairs_of(caption, own=False):
    """caption (B,) → positive, column (B, M) bool: who is a positive of each anchor, and who is in
    its softmax. own: the anchor's own picture too, for crops that its candidate was not made of."""
    if not own:
        return pair_masks(caption)
    id_all = gather_rows_of(caption)
    column = (caption >= 0)[:, None] & (id_all >= 0)
    return column & (caption[:, None] == id_all), column


def caption_loss(anchors, candidates, positive, column, tau):
    """L_mp of anchors (B, d) against all ranks' candidates, of which these (B, d) are this rank's
    and get no gradient; positive, column (B, M) bool. → scalar, this rank's share."""
    with no_autocast(anchors):
        anchors, candidates = full_precision(anchors, candidates)
        anchors = F.normalize(anchors, dim=1)
        logits = anchors @ gather_rows_of(F.normalize(candidates, dim=1)).T / tau  # (B, M)
        return losses.multi_positive_entropy(logits, positive, column)


def sinkhorn(logits):
    """Sinkhorn-Knopp [SynCLR], SwAV's: (n, K) float32 → targets (n, K) ≥ 0, every row of sum 1.

    The logits' exponentials, scaled in turns until all prototypes get equal shares of the patches
    of all ranks, and every patch is shared out once. Without it one prototype could take all.
    """
    share = logits.exp()
    for _ in range(ROUNDS):
        share = share / losses.sum_over_ranks(share.sum(0))  # a column: one prototype
        share = share / share.sum(1, keepdim=True)  # a row: one patch
    return share


def draw_masks(cfg, grid, step, batch, ranks):
    """Of this rank's `batch` pictures → which are masked: rows (m,) int64; and of which patches:
    mask (m, N) bool, exactly round(mask_ratio·N) True. f(seed, step) of the global batch."""
    P, N = cfg.pictures_per_caption, grid[0] * grid[1]
    key, device = (common.MASK, cfg.seed, step), ranks.device
    noise = common.rank_noise((*key, 0), batch * ranks.world // P, P, ranks)  # a row: one caption
    few = noise.argsort(1)[:, : round(cfg.mask_share * P)]
    rows = (few + P * torch.arange(len(few), device=device)[:, None]).flatten()
    columns = data.noise_parts(grid)[0], N
    noise = common.rank_noise((*key, 1), len(rows) * ranks.world, sum(columns), ranks)
    block, rest = noise.split(columns, 1)
    n = round(cfg.mask_ratio * N)
    order = rest
    if cfg.mask == "block":  # patches of the blocks first, then any
        order = torch.where(data.block_mask(block, grid, n), 0, 1) + rest
    return rows, data.front_of_order(order, n)


# ----------------------------------------------------------------------------- model and files


def build_model(cfg):
    s = SIZES[cfg.size]
    size = cfg.height, cfg.width
    # [SynCLR] has [CLS] alone.
    encoder = ViT(s["width"], s["depth"], s["heads"], size, cfg.patch, pose_token=False)
    return SynCLR(encoder, cfg)


def check(cfg):
    """Settings that are valid one by one but not together."""
    parts.check_local_crops(cfg)
    if round(cfg.mask_share * cfg.pictures_per_caption) < 1:
        of = f"mask_share={cfg.mask_share} of pictures_per_caption={cfg.pictures_per_caption}"
        raise UserError(f"{of} masks no picture; raise it")
    N = cfg.height // cfg.patch * (cfg.width // cfg.patch)
    if round(cfg.mask_ratio * N) < 1:
        raise UserError(f"mask_ratio={cfg.mask_ratio} masks none of {N} patches; raise it")


if __name__ == "__main__":
    common.run_stage(main)
