"""LiftedCL (ViT): two contrastive terms, and a skeleton in space that must look like a person's.

Paper: Chen, Li, Wang, Yang, Lifting Contrastive Learning for Human-Centric Perception, ICLR 2023,
openreview.net/forum?id=WHlt5tLz12T. Release: RichardChen20/LiftedCL, train_adv.py.

    L = ½ L_inv + ½ L_var + ½ L_adv                                                [LiftedCL]

Kept     two crops of a picture; the first is the query, the second goes through the momentum
         encoder. L_inv: InfoNCE on the pooled feature. L_var: InfoNCE at every cell of the two
         crops' overlap, crop and flip undone; negatives are pooled maps. A queue of keys for each.
         The lifter: pooled feature → 17 × 3 joints. A discriminator on joints and bones (KCS) with
         an optimiser of its own, LSGAN, one step each. L_adv trains the encoder: that is the
         method.
Deviates
- A ViT, by default from random weights, instead of ImageNet's ResNet-50. The pooled feature is
  [CLS] (pooled=mean: the mean of the patches, nearer to the release's mean over its map): the other
  methods here train [CLS], and ReID reads it.
- Crops of a person's box with w/h .375 to .667; the release's are square, .75 to 1.33.
- The 3-D bodies are drawn from the puppet's joint limits, random in yaw, with bone lengths that
  vary alike on both sides. The release's file comes from licensed motion capture.
- KCS over the 16 bones of the tree. The release's 15 join the left ankle to the belly and leave
  out belly-neck and nose-head.
- The overlap is sampled exactly with grid_sample; the release rounds it to whole cells. Pictures
  whose crops do not meet are left out; the release counts them with logits of zero.
- The lifted skeleton is centred and scaled as the real ones are (unit=false: free, as in the
  release, whose lines for it are commented out). Free, 3 of 7 trials on random features overflowed.
- The discriminator sees skeletons √17 as large: a coordinate of a unit one is near .1, the product
  of two bones near .01, and in a short run it said ½ to all. Its rate falls with the encoder's
  (constant_d=true: it stays, as in the release). r1= adds a penalty of its slope at real bodies
  (R1, arXiv 1801.04406; RepNet has one on its Wasserstein critic), for without it D wins. It and
  optimizer_d=adamw, with which skeletons begin to differ, are the demo's; not the default.
- No weight decay on 1-D parameters and tokens; the rate falls with every step, not every epoch.
- Queues: as Queue of parts.py. Nothing is shuffled between ranks: a ViT has no batch norm.

  python baselines/liftedcl.py --cfg configs/liftedcl_demo.yaml
  torchrun --nproc_per_node=8 baselines/liftedcl.py --cfg configs/liftedcl.yaml

Writes encoder.safetensors, last.pt, log.jsonl, curves.png, and liftedcl.png: people the training
has not seen, what the lifter makes of them from two sides, and the truth. Prints how far bones are
from a body's lengths, and the error on such people, turned and scaled onto the truth, beside three
that know nothing of the picture: the same skeletons dealt to other pictures, any body of the
sampler, the mean skeleton. No term ties a skeleton to its own picture (none reprojects it), neither
here nor in the release.

Legend: B pictures on this rank · C width of an embedding · h, w grid of patches.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# isort: split
import plumbing.quiet  # noqa: F401  first: Ctrl-C while the libraries load

# isort: split
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from baselines import bodies
from baselines.bodies import BONES, JOINTS
from baselines.parts import DATA, Crops, Queue, read_pictures, squared_slope, update_teacher
from common import UserError
from data import Augmentation
from drawing import training as sheets
from formats.weights import load_into, save
from losses import full_precision, gather_rows_of, no_autocast, sum_over_ranks, world_size
from model import SIZES, ViT, normalize
from plumbing.config import MACHINE, Key, read_config
from plumbing.seeds import CHOICE

KEYS = dict(out=Key("runs/liftedcl", "run folder")) | DATA | dict(
    box_padding=Key(1.25, "boxes grow by this before cropping, within the picture", low=1),
    crop_min=Key(0.2, "smallest share of the region in a random crop", "[LiftedCL]",
                 low=0.01, high=1),
    batch=Key(64, "pictures in a global batch", "[LiftedCL]", low=2),
    pooled=Key("cls", "the picture's feature: [CLS], or the mean of the patches",
               "ours; [LiftedCL] the mean", ("cls", "mean")),
    hidden=Key(2048, "hidden width of the two heads", "[LiftedCL]", low=1),
    dim=Key(128, "C: width of an embedding", "[LiftedCL]", low=1),
    tau=Key(0.2, "temperature of L_inv and L_var", "[LiftedCL]", low=1e-4),
    queue=Key(65536, "keys in each of the two queues", "[LiftedCL]", low=1),
    ema=Key(0.999, "momentum of the momentum encoder", "[LiftedCL]", low=0, high=1),
    weight_inv=Key(0.5, "weight of L_inv", "[LiftedCL]", low=0),
    weight_var=Key(0.5, "weight of L_var", "[LiftedCL]", low=0),
    weight_adv=Key(0.5, "weight of L_adv", "[LiftedCL]", low=0),
    unit=Key(True, "a lifted skeleton has its root at 0 and norm 1, as the real ones have",
             "ours; [LiftedCL] leaves it free"),
    bodies=Key(20000, "3-D bodies that the discriminator is shown", low=1),
    bone_spread=Key(0.05, "standard deviation of a bone's length, as a share of it", low=0),
    optimizer=Key("sgd", "of the encoder: sgd, or adamw, which small ViTs need",
                  "[LiftedCL] sgd", ("sgd", "adamw")),
    blr=Key(0.12, "base learning rate of encoder, heads and lifter; lr = blr · batch / 256",
            "[LiftedCL] lr .03 at batch 64", low=0),
    lr_d=Key(0.03, "learning rate of the discriminator", "[LiftedCL]", low=0),
    optimizer_d=Key("sgd", "of the discriminator", "[LiftedCL] sgd", ("sgd", "adamw")),
    r1=Key(0.0, "weight of D's squared slope at real bodies", "ours; [LiftedCL] none", low=0),
    constant_d=Key(False, "the discriminator's rate does not fall", "ours; [LiftedCL] true"),
    weight_decay=Key(1e-4, "weight decay, not on 1-D parameters and tokens", "[LiftedCL]", low=0),
    epochs=Key(200, "passes over the data", "[LiftedCL]", low=1),
    warmup_epochs=Key(0.0, "linear warm-up", "[LiftedCL] none", low=0),
    people=Key(512, "rendered people on whom the lifter is measured", low=8),
) | MACHINE  # fmt: skip

CELLS = 16  # [LiftedCL] the overlap is sampled on 16 × 16 cells


def main():
    cfg = read_config(KEYS, __doc__)
    ranks = common.start_ranks(cfg.device, cfg.precision)
    check(cfg)
    people, about = read_pictures(cfg)
    looks = Augmentation(cfg.box_padding, "grow", cfg.crop_min, strong=True)  # [MoCo v2]'s
    dataset = Crops(people, (cfg.height, cfg.width), cfg.seed, looks)
    batches = common.EpochBatches(len(dataset), cfg.batch, cfg.seed, ranks)
    with torch.device("meta"):  # counted before it is claimed
        student = build_model(cfg)["student"]
        common.check_memory(student, 2 * cfg.batch // ranks.world, ranks.device)
    common.seed_all(common.WEIGHTS, cfg.seed)
    model = build_model(cfg)
    student, teacher, judge = model["student"], model["teacher"], model["discriminator"]
    if cfg.init:
        about += f"; start from {cfg.init}: {load_into(student.encoder, cfg.init)}"
        teacher.load_state_dict(student.state_dict())
    if common.open_run(cfg, KEYS, ranks) == "finished":
        return
    model.to(ranks.device)
    real_bodies = bodies.draw_bodies(cfg.bodies, cfg.bone_spread, cfg.seed).to(ranks.device)
    peak = cfg.blr * cfg.batch / 256
    optimizer = make_optimizer(student, cfg.optimizer, peak, cfg.weight_decay)
    optimizer_d = make_optimizer(judge, cfg.optimizer_d, cfg.lr_d, cfg.weight_decay)
    state = common.resume(Path(cfg.out) / "last.pt", model, optimizer)
    if state["step"]:
        optimizer_d.load_state_dict(state["optimizer_d"])
    first, total = state["step"], cfg.epochs * batches.steps_per_epoch
    warmup = round(cfg.warmup_epochs * batches.steps_per_epoch)
    log = common.StepLog(cfg, ranks, dataset, batches, first, total)
    weights = sum(p.numel() for p in student.parameters())
    log.say(f"{about}, {total} steps of {cfg.batch}, {weights:,} parameters")
    loader = common.training_loader(dataset, batches.steps(first, total), cfg.workers, ranks.device)
    run_student = common.distributed(student, ranks.device)
    run_judge = common.distributed(judge, ranks.device)

    for step, sample in enumerate(loader, first):
        # A step is a function of (seed, step): a resumed run draws what the killed one would have.
        lr = common.learning_rate(step, total, warmup, peak=peak)
        common.set_learning_rate(optimizer, lr)
        falling = common.learning_rate(step, total, warmup, peak=cfg.lr_d)
        common.set_learning_rate(optimizer_d, cfg.lr_d if cfg.constant_d else falling)
        crops = sample["image"].to(ranks.device, non_blocking=True)  # (B, 2, 3, H, W)
        box = sample["box"].to(ranks.device, non_blocking=True)
        mirrored = sample["mirrored"].to(ranks.device, non_blocking=True)
        update_teacher(teacher, student, cfg.ema)
        with common.autocast(ranks.device, cfg.precision):
            q_inv, q_map, skeletons = run_student(normalize(crops[:, 0]))
            with torch.no_grad():
                k_inv, k_map, _ = teacher(normalize(crops[:, 1]))
        k_inv, k_map = full_precision(k_inv, k_map)

        # L_inv: the picture's other crop among pictures seen before.
        inv = info_nce(q_inv, k_inv, model["queue_inv"].keys, cfg.tau).mean()
        # L_var: the same place in the other crop among whole pictures seen before.
        places = overlap_grid(box, mirrored)
        var = place_loss(q_map, k_map, places, model["queue_var"].keys, cfg.tau)
        # L_adv: the discriminator takes the lifted skeleton for a body. Its gradient goes through
        # the lifter into the encoder; the discriminator itself stands still.
        judge.requires_grad_(False)
        adv = (judge(skeletons) - 1).square().mean()
        judge.requires_grad_(True)
        # L = ½ L_inv + ½ L_var + ½ L_adv
        loss = cfg.weight_inv * inv + cfg.weight_var * var + cfg.weight_adv * adv
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # L_D = mean (D(real) − 1)² + mean D(lifted)²: unpaired, any body will do.
        drawn = common.rank_noise((CHOICE, cfg.seed, step), cfg.batch, 1, ranks)[:, 0]
        real = real_bodies[(drawn * len(real_bodies)).long()].requires_grad_(cfg.r1 > 0)
        of_real, of_lifted = run_judge(torch.cat([real, skeletons.detach()])).chunk(2)
        loss_d = (of_real - 1).square().mean() + of_lifted.square().mean()
        if cfg.r1:  # + r1 · mean ‖∂D(real) / ∂real‖²
            loss_d = loss_d + cfg.r1 * squared_slope(of_real, real)
        loss_d.backward()
        optimizer_d.step()
        optimizer_d.zero_grad(set_to_none=True)

        # The keys of this step are negatives from the next one on [MoCo].
        model["queue_inv"].add(F.normalize(k_inv, dim=1))
        model["queue_var"].add(F.normalize(k_map.mean((2, 3)), dim=1))
        values = dict(loss=loss, inv=inv, var=var, adv=adv, grad_norm=norm, dis=loss_d)
        values |= dict(of_real=of_real.mean(), of_lifted=of_lifted.mean())
        spread = gather_rows_of(skeletons).std(0).mean()  # near 0: one skeleton for all pictures
        values |= dict(overlap=places[1].float().mean(), spread=spread)
        log.record(step, lr, values, sample["index"], ~skeletons.sum((1, 2)).isfinite())
        if log.saves(step):
            log.flush()  # never save a broken model
            if ranks.rank == 0:
                second = dict(optimizer_d=optimizer_d.state_dict())
                save(cfg.out, student.encoder, model, optimizer, step + 1, **second)
            log.stop_if_asked(step)

    log.close()
    if ranks.rank == 0:
        figures = evaluate(cfg, student, real_bodies, ranks.device)
        log.write(step=total, epoch=cfg.epochs, **figures, final=True)
        sheets.draw_curves([cfg.out], Path(cfg.out) / "curves.png")
        common.finish_run(cfg.out)
        print(f"error on {cfg.people} rendered people, turned and scaled onto the truth (PA-MPJPE)")
        print(bodies.TOLD.format(**figures))
        print(f"wrote {cfg.out}/encoder.safetensors, liftedcl.png, curves.png")
    common.barrier()


# ------------------------------------------------------------------------------------------- models


class Residual(nn.Module):
    """x + Linear(LeakyReLU(Linear(x))), LeakyReLU again [LiftedCL]: no batch norm."""

    def __init__(self, width):
        super().__init__()
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return F.leaky_relu(x + self.two(F.leaky_relu(self.one(x), 0.2)), 0.2)


def entry(inside, width):
    """The lifter's body and a branch of the discriminator."""
    return nn.Sequential(nn.Linear(inside, width), nn.LeakyReLU(0.2), Residual(width))


class Student(nn.Module):
    """Encoder, the two heads and the lifter. The momentum encoder has the same shape."""

    def __init__(self, encoder, cfg):
        super().__init__()
        D, heads = encoder.width, (cfg.hidden, cfg.dim)
        self.encoder, self.pooled, self.unit = encoder, cfg.pooled, cfg.unit
        self.head_inv = nn.Sequential(nn.Linear(D, heads[0]), nn.ReLU(), nn.Linear(*heads))
        # The release's two 1 × 1 convolutions are linear layers at every patch.
        self.head_var = nn.Sequential(nn.Linear(D, heads[0]), nn.ReLU(), nn.Linear(*heads))
        self.lifter = nn.Sequential(entry(D, 512), nn.Linear(512, len(JOINTS) * 3))  # [LiftedCL]

    def forward(self, images):
        """images (B, 3, H, W) → embedding (B, C), map (B, C, h, w), skeletons (B, 17, 3)."""
        tokens = self.encoder(images)  # (B, 1 + h·w, D)
        patches = tokens[:, self.encoder.n_special :]
        pooled = tokens[:, 0] if self.pooled == "cls" else patches.mean(1)
        maps = self.head_var(patches).transpose(1, 2).unflatten(2, self.encoder.grid)
        with no_autocast(pooled):  # bf16 would round a joint to three digits
            skeletons = self.lifter(*full_precision(pooled)).unflatten(1, (len(JOINTS), 3))
            skeletons = bodies.unit(skeletons) if self.unit else skeletons
        return self.head_inv(pooled), maps, skeletons


def kcs(skeletons):
    """Kinematic chain space [RepNet]: (B, 17, 3) → (B, 16, 16), the bones' lengths and angles.

    It does not change when the body turns.
    """
    # Eq.  B = C·J, Ψ = B·Bᵀ: C has a row for each bone, +1 at its parent, −1 at its child.
    joints = skeletons.unbind(1)
    bones = torch.stack([joints[parent] - joints[child] for parent, child in BONES], 1)
    return bones @ bones.transpose(1, 2)


class Discriminator(nn.Module):
    """Is it a body? (B, 17, 3) → (B, 1), 1 for real ones: joints beside their bones [LiftedCL]."""

    def __init__(self, width=256):
        super().__init__()
        self.joints, self.bones = entry(len(JOINTS) * 3, width), entry(len(BONES) ** 2, width)
        self.final = nn.Sequential(
            nn.Linear(2 * width, width // 2), nn.LeakyReLU(0.2), nn.Linear(width // 2, 1)
        )

    def forward(self, skeletons):
        skeletons = skeletons * len(JOINTS) ** 0.5  # of a unit one: a joint is 1 from its root
        both = self.joints(skeletons.flatten(1)), self.bones(kcs(skeletons).flatten(1))
        return self.final(torch.cat(both, 1))


def build_model(cfg):
    """Everything that a checkpoint holds, with random weights."""
    s = SIZES[cfg.size]
    size = cfg.height, cfg.width
    encoder = ViT(s["width"], s["depth"], s["heads"], size, cfg.patch, pose_token=False)
    student = Student(encoder, cfg)
    parts = dict(student=student, teacher=copy.deepcopy(student).requires_grad_(False))
    parts |= dict(queue_inv=Queue(cfg.queue, cfg.dim), queue_var=Queue(cfg.queue, cfg.dim))
    return nn.ModuleDict(parts | dict(discriminator=Discriminator()))


def make_optimizer(model, kind, lr, weight_decay):
    groups = common.parameter_groups(model, weight_decay)
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    return torch.optim.SGD(groups, lr=lr, momentum=0.9)  # [LiftedCL]


# ------------------------------------------------------------------------------------ L_inv, L_var


def info_nce(query, key, queue, tau):
    """Eq.  −log [ exp(q·k/τ) / (exp(q·k/τ) + Σ_n exp(q·n/τ)) ]: query finds its key among n.

    query, key (B, …, C) float, L2-normalised here; queue (K, C) of unit length. → (B, …)
    """
    with no_autocast(query):
        query, key = (F.normalize(x, dim=-1) for x in full_precision(query, key))
        query = query / tau
        positive = (query * key.detach()).sum(-1)
        negative = (query @ queue.to(query.dtype).T).logsumexp(-1)
        return F.softplus(negative - positive)  # log(e^p + Σ e^n) − p without an array of both


def overlap_grid(box, mirrored, cells=CELLS):
    """Where two crops of a picture show the same places.

    box (B, 2, 4): x, y, w, h of each crop in px of the picture; mirrored (B, 2) bool.
    → points (B, 2, cells, cells, 2) for at_points: the centres of the cells of the overlap, in the
      picture's order, as each crop sees them, x and y from −1 to 1 between its edges; and
      (B,) bool: do the crops meet? Elsewhere the points mean nothing.
    """
    low = box[..., :2].amax(1)  # (B, 2) upper left corner of the overlap
    high = (box[..., :2] + box[..., 2:]).amin(1)
    step = (torch.arange(cells, device=box.device, dtype=box.dtype) + 0.5) / cells
    place = low[:, None] + step[:, None] * (high - low)[:, None]  # (B, cells, 2) px
    # As shares of each crop's sides: crop by crop, (B, 2, cells, 2).
    share = (place[:, None] - box[:, :, None, :2]) / box[:, :, None, 2:]
    x, y = share.unbind(-1)  # (B, 2, cells): columns, rows
    x = torch.where(mirrored[..., None], 1 - x, x)
    x = x[:, :, None, :].expand(-1, -1, cells, -1)
    y = y[:, :, :, None].expand(-1, -1, -1, cells)
    return 2 * torch.stack([x, y], -1) - 1, (high > low).all(1)


def at_points(maps, grid):
    """maps (B, C, h, w), grid (B, n, n, 2) → (B, n·n, C): bilinear between the patches' centres,
    beyond the outermost centres their value."""
    sampled = F.grid_sample(maps, grid, padding_mode="border", align_corners=False)
    return sampled.flatten(2).transpose(1, 2)


def place_loss(q_maps, k_maps, places, queue, tau):
    """L_var: mean of InfoNCE over the cells of the pictures whose crops meet, on all ranks.

    maps (B, C, h, w) of both crops; places: what overlap_grid returns; queue (K, C) of pooled maps.
    → scalar, this rank's share (see losses.py); 0 where no picture's crops meet.
    """
    grid, meets = places
    with no_autocast(q_maps):
        q_maps, k_maps = full_precision(q_maps, k_maps)
        query, key = at_points(q_maps, grid[:, 0]), at_points(k_maps, grid[:, 1])
        each = info_nce(query, key, queue, tau).mean(1)  # (B,)
        count = sum_over_ranks(meets.sum().to(each.dtype)).clamp(min=1)
        return world_size() * torch.where(meets, each, 0.0).sum() / count


# ----------------------------------------------------------------------------- figures and pictures


@torch.no_grad()
def evaluate(cfg, student, real_bodies, device):
    """The lifter on people whom the training has not seen; liftedcl.png. → errors in mm."""
    student.eval()
    pictures, truth = bodies.render_people(cfg.people, (cfg.height, cfg.width), cfg.seed)
    found = [student(normalize(part.to(device)))[2] for part in pictures.split(64)]
    found = torch.cat(found).double().cpu()
    drawn = bodies.draw_bodies(cfg.people, cfg.bone_spread, cfg.seed + 1).double()
    figures, errors = bodies.measure(found, truth, real_bodies.double().cpu(), drawn)
    few = slice(0, 10)
    sheet = pictures[few], found[few], truth[few], errors[few]
    bodies.skeleton_sheet(*sheet, Path(cfg.out) / "liftedcl.png")
    return figures


# --------------------------------------------------------------------------------- files and checks


def check(cfg):
    """Settings that are valid one by one but not together."""
    if cfg.queue < cfg.batch:
        raise UserError(f"queue={cfg.queue} cannot hold the {cfg.batch} keys of a batch; raise it")


if __name__ == "__main__":
    common.run_stage(main)
