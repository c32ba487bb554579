"""SOLIDER (CVPR 2023, arXiv 2303.17602): DINO, body parts found by clustering, a controller of λ.

    L = L_DINO + L_sm
    L_DINO  a student predicts, from each crop, what its teacher says of another crop
    L_sm    mean over tokens of λ · CE(semantic head(token), part label), part k hidden or not

One step: the teacher's patch tokens at λ = 1 give each global crop its part labels; its [CLS] at
the picture's own λ, 0 or 1, gives DINO's targets; the student sees the crops, and the global ones
once more with one body part hidden. The controller in the encoder (model.py) makes λ a dial that
stays: 0 keeps looks (ReID .2), 1 keeps semantics (attributes, pose .8).

  python baselines/solider.py --cfg configs/solider_demo.yaml     # laptop, two minutes
  torchrun --nproc_per_node=8 baselines/solider.py --cfg configs/solider.yaml ...   # GPUs

Kept: DINO with centring and multi-crop; labels at λ = 1: foreground by token norm, three parts in
it, named from top to bottom, only where more than half is foreground; parts hidden; λ in the
backbone and as the weight of L_sm; the teacher is what is exported.
Deviations. From the paper: a ViT, whose [CLS] stands where Swin has its mean token (pooled=mean:
as there); controllers after ¼, ½, ¾ of the depth, where Swin has stages. From the release,
tinyvision/SOLIDER:
- the semantic head is trained; there no optimiser holds it (frozen_semantic_head=true: as there);
- labels come from tokens before the last norm: behind it all norms are nearly the same, and the
  foreground would be chance;
- 2-means of the norms is exact (sorted), 3-means starts from thirds of the foreground by height,
  all on the device; there scikit-learn clusters each picture on the CPU;
- controllers that init= does not hold begin as x → x; there, from scratch, by shrinking x to .69,
  and a DINO start has trained them at λ = 0; init= brings the encoder alone, there both heads too;
- a step without any foreground has no L_sm; there it ends with an error;
- part k is one for all ranks; L_sm is a mean over all ranks' tokens; the rate begins above 0;
- augmentation and crop shapes are those of all methods here: w/h .375 to .667, there .4 to .6;
  colour jitter as StableRep's, no solarisation; every crop is blurred with p .5, there 1, .1, .5;
- no weight decay on tokens either.
Only pictures at λ = 1 have a part hidden and are asked for labels: λ = 0 would weigh both with 0.
The teacher's two passes are one where λ = 1. Neither changes a number.

Prints, at the end: for λ = 0, .25, .5, .75, 1 how far apart parts of one person and same parts of
different people are (solider_parts.py). Writes encoder.safetensors, semantics.png, semantics.json,
labels.png, curves.png. Beside DINO's loss stands ln K, that of a student which knows nothing.

Legend: B pictures on this rank · g = 2 global, l local crops · N patches of a global crop · K
prototypes · D width · S special tokens · R global crops with λ = 1 · H, W picture · h, w grid.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import plumbing.quiet  # noqa: F401  first: Ctrl-C while the libraries load

# isort: split
import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from baselines import parts
from baselines.solider_parts import PARTS, part_labels, show_parts
from data import Augmentation, PoseBatches
from drawing.curves import draw_curves
from formats.weights import load_into, save
from losses import full_precision, no_autocast, sum_over_ranks, world_size
from model import SIZES, ViT, normalize
from plumbing.config import MACHINE, Key, read_config
from plumbing.seeds import CHOICE

KEYS = dict(
    out=Key("runs/solider", "run folder"),
) | parts.DATA | dict(
    box_padding=Key(1.0, "boxes grow by this before cropping; 1: tight, as LUPerson", low=1),
    region=Key("grow", "see pretrain.py", choices=("grow", "box")),
    augmentation=Key("strong", "hap: crop and flip; strong: + jitter, grey, blur [StableRep]",
                     "[DINO], but for details", ("hap", "strong")),
    crop_min=Key(0.8, "smallest share of the region in a global crop", "[SOLIDER]", low=0.01,
                 high=1),
    local_crops=Key(8, "l, small crops of each picture", "[DINO]", low=0),
    local_min=Key(0.05, "smallest share of the region in a local crop", "[SOLIDER]", low=0.01,
                  high=1),
    local_max=Key(0.8, "largest share of the region in a local crop", "[SOLIDER]", low=0.01,
                  high=1),
    local_height=Key(128, "height of a local crop", "[SOLIDER]", low=1),
    local_width=Key(64, "width of a local crop", "[SOLIDER]", low=1),
    batch=Key(384, "pictures in a global batch", "[SOLIDER] 48 on each of 8", low=1),
    # model
    pose_token=Key(False, "[POSE] beside [CLS], where init= has it; no loss reads it"),
    pooled=Key("cls", "what DINO reads: [CLS]; or the patches' mean, then no loss reads [CLS]",
               "ours; [SOLIDER] the mean", ("cls", "mean")),
    out_dim=Key(65536, "K, prototypes of DINO's head; fewer on small data", "[DINO]", low=2),
    head_hidden=Key(2048, "hidden width of both heads", "[DINO]", low=1),
    drop_path=Key(0.1, "drop path of the student's last block", "[DINO]", low=0, high=0.9),
    # losses
    tau_student=Key(0.1, "temperature of the student", "[DINO]", low=1e-4),
    tau_teacher=Key(0.04, "temperature of the teacher", "[DINO]", low=1e-4),
    centre_momentum=Key(0.9, "of the mean that is taken off the teacher's logits", "[DINO]", low=0,
                        high=1),
    teacher_momentum=Key(0.996, "at the start, 1 at the end, on a cosine", "[DINO]", low=0, high=1),
    semantic_loss=Key(1.0, "weight of L_sm", "[SOLIDER]", low=0),
    foreground=Key(0.5, "crops with a larger share of it have part labels", "[SOLIDER]", low=0,
                   high=1),
    frozen_semantic_head=Key(False, "leave the semantic head as it starts", "ours; [SOLIDER] true"),
    # optimiser
    epochs=Key(100, "passes over the data", "[SOLIDER]", low=1),
    warmup_epochs=Key(10.0, "linear warm-up", "[DINO]", low=0),
    freeze_last_layer=Key(1.0, "epochs in which the prototypes rest", "[DINO]", low=0),
    blr=Key(5e-4, "base learning rate; lr = blr · batch / 256", "[DINO]", low=0),
    controller_lr=Key(1.0, "the controllers' learning rate, as a multiple", "[SOLIDER] 1", low=0),
    min_lr=Key(1e-6, "learning rate at the end", "[DINO]", low=0),
    weight_decay=Key(0.04, "AdamW weight decay at first, none on 1-D parameters", "[DINO]", low=0),
    weight_decay_end=Key(0.4, "and at the end, on a cosine", "[DINO]", low=0),
    clip_grad=Key(3.0, "largest norm of each parameter's gradient; 0: no clip", "[DINO]", low=0),
) | MACHINE  # fmt: skip


def main():
    cfg = read_config(KEYS, __doc__)
    ranks = common.start_ranks(cfg.device, cfg.precision)
    check(cfg)
    people, about = parts.read_pictures(cfg)
    options = Augmentation(cfg.box_padding, cfg.region, cfg.crop_min, cfg.augmentation == "strong")
    small = (cfg.local_height, cfg.local_width), (cfg.local_min, cfg.local_max)
    local = (cfg.local_crops, *small) if cfg.local_crops else None
    dataset = parts.Crops(people, (cfg.height, cfg.width), cfg.seed, options, 2, local)
    batches = PoseBatches(dataset, cfg.batch, 1, [], cfg.seed, ranks)
    with torch.device("meta"):  # counted before it is claimed
        rows = cfg.batch // ranks.world * (4 + cfg.local_crops)
        common.check_memory(Solider(cfg).student, rows, ranks.device)
    common.seed_all(common.WEIGHTS, cfg.seed)
    model = Solider(cfg)
    if cfg.init:
        about += f"; start from {cfg.init}: {start_from(model.student.encoder, cfg.init)}"
        model.teacher.load_state_dict(model.student.state_dict())
    if common.open_run(cfg, KEYS, ranks) == "finished":
        return
    model.to(ranks.device)
    named = model.student.encoder.named_parameters()
    controllers = {id(p) for name, p in named if ".controller." in name}
    groups = []
    for group in common.parameter_groups(model, 1.0):  # 1 or 0: does it decay?
        group["decays"] = group["weight_decay"]
        for dial, scale in ((False, 1.0), (True, cfg.controller_lr)):
            own = [p for p in group["params"] if (id(p) in controllers) == dial]
            groups.append(group | dict(params=own, lr_scale=scale))
    optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
    first = common.resume(Path(cfg.out) / "last.pt", model, optimizer)["step"]
    epoch = batches.steps_per_epoch
    total, warmup = cfg.epochs * epoch, round(cfg.warmup_epochs * epoch)
    log = common.StepLog(cfg, ranks, dataset, batches, first, total)
    weights = sum(p.numel() for p in model.student.parameters())
    log.say(f"{about}, {total} steps of {cfg.batch}, {weights:,} parameters of the student")
    loader = common.training_loader(dataset, batches.steps(first, total), cfg.workers, ranks.device)
    runner = common.distributed(model, ranks.device)
    log_k = torch.tensor(math.log(cfg.out_dim), device=ranks.device)

    for step, sample in enumerate(loader, first):
        common.seed_all(common.STEP, cfg.seed, step)
        lr = common.learning_rate(step, total, warmup, cfg.blr * cfg.batch / 256, cfg.min_lr)
        common.set_learning_rate(optimizer, lr)
        for group in optimizer.param_groups:
            decay = common.cosine_between(step, total, cfg.weight_decay, cfg.weight_decay_end)
            group["weight_decay"] = decay * group["decays"]
        # Crop after crop: (g, B, 3, H, W) and (l, B, 3, local height, width).
        images = normalized_crops(sample["image"], ranks.device)
        small = normalized_crops(sample["local"], ranks.device) if cfg.local_crops else None
        semantic, k = draw_choices(cfg, step, ranks)
        noise = draw_noise(cfg, model, step, ranks)
        with common.autocast(ranks.device, cfg.precision):
            result = runner(images, small, semantic, k, noise)  # the method: Solider.forward
        result["total"].backward()
        norm = clip_each(model.parameters(), cfg.clip_grad)
        if step < cfg.freeze_last_layer * epoch:
            model.student.head.last.weight.grad = None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        momentum = common.cosine_between(step, total, cfg.teacher_momentum, 1.0)
        parts.update_teacher(model.teacher, model.student, momentum)

        values = {"loss": result["total"], "dino": result["dino"], "semantic": result["semantic"]}
        values |= {"grad_norm": norm, "ln_K": log_k} | result["health"]
        log.record(step, lr, values, sample["index"], result["bad"])
        if log.saves(step):
            log.flush()  # never save a broken model
            if ranks.rank == 0:
                save(cfg.out, model.teacher.encoder, model, optimizer, step + 1)
            log.stop_if_asked(step)

    log.close()
    if ranks.rank == 0:
        log.say(show_parts(model.teacher.encoder, dataset, cfg.seed, cfg.foreground, Path(cfg.out)))
        draw_curves([cfg.out], Path(cfg.out) / "curves.png")
        common.finish_run(cfg.out)
    log.say(f"wrote {cfg.out}/encoder.safetensors, semantics.png, labels.png, curves.png")
    common.barrier()


# ------------------------------------------------------------------------------------ model, losses


def start_from(encoder, path):
    """The weights at `path` into an encoder with controllers → a clause about them.

    Controllers that the file does not hold begin near x → x, softplus(b) = 1. At b = 0 each would
    shrink x to .69 of itself, and the tokens' norms would lose what they say of the person.
    """
    for block in encoder.blocks:
        if block.controller is not None:
            nn.init.constant_(block.controller.scale.bias, math.log(math.e - 1))
    return load_into(encoder, path)


class Solider(nn.Module):
    """Student, teacher, semantic head and centre; its forward is the method."""

    def __init__(self, cfg):
        super().__init__()
        s, sides = SIZES[cfg.size], (cfg.height, cfg.width)
        encoder = ViT(
            s["width"], s["depth"], s["heads"], sides, cfg.patch, cfg.pose_token, cfg.drop_path,
            controller=True,
        )  # fmt: skip
        # Student and teacher: an encoder and, on its [CLS], DINO's head.
        head = parts.Head(encoder.width, cfg.head_hidden, cfg.out_dim)
        self.student = nn.ModuleDict(dict(encoder=encoder, head=head))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.semantic_head = parts.Head(encoder.width, cfg.head_hidden, PARTS + 1)
        self.semantic_head.requires_grad_(not cfg.frozen_semantic_head)
        self.register_buffer("centre", torch.zeros(cfg.out_dim))
        self.cfg = cfg

    def forward(self, images, local, semantic, k, noise=None):
        """One step. images (2, B, 3, H, W), local (l, B, 3, …) or None, float, normalised;
        semantic: λ of each picture, B numbers 0 or 1, on the host; k: the part to hide, 1 … 3;
        noise (4 + l, 2·depth, B) for drop path: of global, hidden, local crops; None: off.
        → dict: total, dino, semantic (scalars, this rank's shares), health, bad (B,) bool.
        """
        cfg, student, teacher, B = self.cfg, self.student, self.teacher, images.shape[1]
        both, S = images.flatten(0, 1), student.encoder.n_special
        # λ of both crops (2B,), on the host: to ask which rows are 1 would wait for the device.
        weight = torch.tensor(semantic, dtype=images.dtype).repeat(2)
        choices = weight, *(w.nonzero()[:, 0] for w in (weight == 1, weight == 0))
        if both.is_cuda:
            choices = (choice.pin_memory() for choice in choices)
        weight, on, off = (choice.to(both.device, non_blocking=True) for choice in choices)
        with torch.no_grad():
            # 1. The teacher at λ = 1 → tokens before the last norm → part labels.
            tokens = teacher.encoder(
                both, final_norm=False, semantic_weight=torch.ones_like(weight)
            )
            labels, kept = part_labels(tokens[:, S:], teacher.encoder.grid, cfg.foreground)
            # 2. The teacher at the picture's own λ → DINO's targets.
            read = self.pool(teacher.encoder.norm(tokens))
            if len(off):
                again = teacher.encoder(both[off], semantic_weight=weight[off])
                read[off] = self.pool(again).to(read.dtype)
            target = teacher.head(read)
            # 3. Part k of a picture with λ = 1 becomes 0, the mean of all pixels.
            hole = (labels[on] == k).unflatten(1, teacher.encoder.grid).unsqueeze(1)
            hole = hole.repeat_interleave(cfg.patch, 2).repeat_interleave(cfg.patch, 3)
            hidden = both[on].masked_fill(hole, 0.0)  # (R, 3, H, W)

        # 4. The student on global, hidden and local crops.
        drop, drop_local = None, None
        if noise is not None:  # (crops, 2·depth, B) → (2·depth, crops · B)
            noise = noise.transpose(0, 1)
            of_hidden = noise[:, 2:4].flatten(1)[:, on]
            drop = torch.cat([noise[:, :2].flatten(1), of_hidden], 1)
            drop_local = noise[:, 4:].flatten(1)
        given, its_weight = torch.cat([both, hidden]), torch.cat([weight, weight[on]])
        tokens = student.encoder(given, drop_noise=drop, semantic_weight=its_weight)
        read, patches = self.pool(tokens[: 2 * B]), tokens[:, S:]
        if local is not None:
            small = parts.at_size(student.encoder, local.shape[-2:])
            repeated = weight[:B].repeat(len(local))
            found = small(local.flatten(0, 1), drop_noise=drop_local, semantic_weight=repeated)
            read = torch.cat([read, self.pool(found)])
        logits = student.head(read).unflatten(0, (-1, B))  # (g + l, B, K)
        # The tokens that L_sm asks: those of λ = 1, their crop whole and with a part hidden.
        asked = torch.cat([patches[on], patches[2 * B :]]).flatten(0, 1)
        answers = self.semantic_head(asked).unflatten(0, (2, *labels[on].shape))  # (2, R, N, 4)

        out = dict(bad=~tokens[: 2 * B].detach().float().sum((1, 2)).view(2, B).isfinite().all(0))
        with no_autocast(both):
            logits, target, answers = full_precision(logits, target, answers)
            q = ((target - self.centre) / cfg.tau_teacher).softmax(-1).unflatten(0, (2, B))
            out["dino"] = dino_loss(logits / cfg.tau_student, q)
            out["semantic"] = semantic_loss(answers, labels[on], kept[on], kept.sum())
            mean = sum_over_ranks(target.mean(0)) / world_size()
            self.centre.lerp_(mean.to(self.centre.dtype), 1 - cfg.centre_momentum)
            right = (answers.detach().argmax(-1) == labels[on]) & kept[on].unsqueeze(1)
            n_asked = (2 * kept[on].sum() * labels.shape[1]).clamp(min=1)
            entropy = torch.special.entr(q).sum(-1).mean()  # −Σ_k q_k ln q_k
            out["health"] = dict(
                teacher_entropy=entropy, kept=kept.float().mean(), right=right.sum() / n_asked
            )
        # Eq.  L = L_DINO + L_sm
        out["total"] = out["dino"] + cfg.semantic_loss * out["semantic"]
        return out

    def pool(self, tokens):
        """Tokens (…, T, D) after the last norm → what DINO's head reads, (…, D)."""
        if self.cfg.pooled == "cls":
            return tokens[..., 0, :]
        return tokens[..., self.student.encoder.n_special :, :].mean(-2)


def dino_loss(logits, q):
    """L_DINO [DINO]: logits / τ_s (g + l, B, K) of all crops, targets q (2, B, K) of the global
    ones → −Σ_k q log softmax, mean over pictures and all pairs of two different crops."""
    log_p, pairs = logits.log_softmax(-1), []
    for i, target in enumerate(q):
        for j, crop in enumerate(log_p):
            if i != j:  # a crop does not teach itself
                pairs.append(-(target * crop).sum(-1).mean())
    return sum(pairs) / len(pairs)


def semantic_loss(answers, labels, kept, count):
    """L_sm: answers (2, R, N, 4) of the crops with λ = 1, whole and hidden; labels (R, N) long;
    kept (R,) bool; count: kept crops on this rank, of any λ. → scalar, this rank's share.

    L_sm = 1 / (2 · count · N) Σ λ · CE(answer, label) over the kept crops: those with λ = 0 count
    below the line and add nothing above it.
    """
    N = labels.shape[1]
    error = F.cross_entropy(answers.flatten(0, 2), labels.repeat(2, 1).flatten(), reduction="none")
    error = error.view(2, -1, N) * kept.view(1, -1, 1)
    count = sum_over_ranks(count.to(error.dtype)).clamp(min=1)
    return world_size() * error.sum() / (2 * N * count)


# ---------------------------------------------------------------------------------- parts of a step


def normalized_crops(crops, device):
    """uint8 (B, crops, 3, H, W) → float, normalised, crop after crop: (crops, B, 3, H, W)."""
    crops = crops.to(device, non_blocking=True).transpose(0, 1)
    return normalize(crops.flatten(0, 1)).unflatten(0, crops.shape[:2])


def draw_choices(cfg, step, ranks):
    """λ of this rank's pictures, 0 or 1 with p ½, shared by all crops; the part to hide, 1 … 3."""
    host = ranks._replace(device=torch.device("cpu"))
    semantic = common.rank_noise((CHOICE, cfg.seed, step), cfg.batch, 1, host)[:, 0] < 0.5
    k = common.rng_of(CHOICE, cfg.seed, step, 1).integers(1, PARTS + 1)
    return semantic.float().tolist(), int(k)


def draw_noise(cfg, model, step, ranks):
    """For drop path: (4 + l, 2·depth, B) uniform numbers, this rank's of the global batch."""
    if not cfg.drop_path:
        return None
    crops, branches = 4 + cfg.local_crops, 2 * model.student.encoder.depth
    key = common.DROP_PATH, cfg.seed, step
    noise = common.rank_noise(key, cfg.batch, crops * branches, ranks)
    return noise.unflatten(1, (crops, branches)).permute(1, 2, 0)


def clip_each(parameters, largest):
    """[DINO] each parameter's gradient to a norm of at most `largest`. → norm of all before it."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch._foreach_norm(gradients)
    if largest:
        torch._foreach_mul_(gradients, [(largest / (n + 1e-6)).clamp(max=1) for n in norms])
    return torch.stack(norms).norm()


def check(cfg):
    """Settings that are valid one by one but not together."""
    parts.check_local_crops(cfg)


if __name__ == "__main__":
    common.run_stage(main)
