"""VICReg (arXiv 2105.04906) on [POSE]: a method of one's own in one file, as an example to copy.

    L = 25 · invariance + 25 · variance + 1 · covariance                                  [VICReg]

Kept: terms, weights, expander, statistics of the global batch. Different: the two views are two
pictures of one pose, the token is [POSE]; AdamW, not LARS, and a tenth of warm-up.

  python baselines/vicreg.py --cfg configs/vicreg_demo.yaml       # laptop, after generate_demo.yaml

Legend: B pictures on this rank · x, y (n, D): the first and the second picture of each of n poses.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plumbing.quiet  # noqa: E402, F401  before the libraries: Ctrl-C while they load

# isort: split
import torch
import torch.nn.functional as F

import common
from baselines import parts
from common import UserError
from data import PoseBatches, PretrainPictures
from drawing.training import draw_curves, neighbour_sheet
from formats.weights import load_into, save
from losses import full_precision, gather_with_gradient, no_autocast
from model import SIZES, Projector, ViT, normalize
from plumbing.config import MACHINE, Key, read_config

# 1. Keys: what stands here can be set, is checked, and is written to config.yaml.
KEYS = dict(out=Key("runs/vicreg", "run folder")) | parts.DATA | dict(
    batch=Key(4096, "pictures in a global batch: two of each pose", "[VICReg] 2,048 pairs", low=4),
    expander=Key(8192, "width of the expander", "[VICReg]", low=1),
    epochs=Key(100, "passes over the data", "[VICReg]", low=1),
    blr=Key(1.5e-4, "base learning rate; lr = blr · batch / 256", "ours: AdamW's", low=0),
    weight_decay=Key(0.05, "AdamW weight decay", "ours", low=0),
) | MACHINE  # fmt: skip
WEIGHTS = dict(invariance=25.0, variance=25.0, covariance=1.0)  # [VICReg]


# 2. The method: a module whose forward gives this rank's loss.
class VICReg(torch.nn.Module):
    def __init__(self, encoder, cfg):
        super().__init__()
        self.encoder = encoder
        self.expander = Projector(encoder.width, "mlp", cfg.expander, cfg.expander)

    def forward(self, images):
        """images (B, 3, H, W), two of each pose side by side → dict of scalars, bad (B,) bool."""
        tokens = self.encoder(images)
        z = self.expander(tokens[:, 1])  # [POSE]
        with no_autocast(z):
            # All ranks' rows, with gradient: each rank has the loss of the whole batch (losses.py).
            z = gather_with_gradient(full_precision(z)[0])
            out = vicreg_terms(z[0::2], z[1::2])
        out["total"] = sum(weight * out[name] for name, weight in WEIGHTS.items())
        return out | dict(bad=~tokens.detach().float().sum((1, 2)).isfinite())


def vicreg_terms(x, y):
    """Eq. (1) to (5) of VICReg for x, y (n, D), as in its release: both pictures' covariances are
    added, their variances averaged. → dict of scalars."""
    out = dict(invariance=F.mse_loss(x, y), variance=0.0, covariance=0.0)
    for z in (x, y):
        out["variance"] += F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() / 2  # hinge at 1
        z = z - z.mean(0)
        off = ~torch.eye(z.shape[1], dtype=torch.bool, device=z.device) * (z.T @ z / (len(z) - 1))
        out["covariance"] += off.square().sum() / z.shape[1]
    return out


# 3. The script: pretrain.py's order, with what differs.
def main():
    cfg = read_config(KEYS, __doc__)
    ranks = common.start_ranks(cfg.device, cfg.precision)
    people, about = parts.read_pictures(cfg)
    dataset = PretrainPictures(people, (cfg.height, cfg.width), cfg.seed)
    batches = PoseBatches(dataset, cfg.batch, 2, [], cfg.seed, ranks)
    if not batches.posed or (dataset.pose_id < 0).any():
        raise UserError("pictures without a pose group: annotations= needs a generated set alone")
    common.seed_all(common.WEIGHTS, cfg.seed)
    s, size = SIZES[cfg.size], (cfg.height, cfg.width)
    model = VICReg(ViT(s["width"], s["depth"], s["heads"], size, cfg.patch), cfg)
    if cfg.init:
        about += f"; start from {cfg.init}: {load_into(model.encoder, cfg.init)}"
    if common.open_run(cfg, KEYS, ranks) == "finished":
        return
    out, model = Path(cfg.out), model.to(ranks.device)
    optimizer = torch.optim.AdamW(common.parameter_groups(model, cfg.weight_decay), lr=0.0)
    first = common.resume(out / "last.pt", model, optimizer)["step"]
    total = cfg.epochs * batches.steps_per_epoch
    log = common.StepLog(cfg, ranks, dataset, batches, first, total)
    if batches.short:
        about += f", {batches.short} left out because their pose has fewer than 2 pictures"
    log.say(f"{about}, {total} steps of {cfg.batch} pictures")
    loader = common.training_loader(dataset, batches.steps(first, total), cfg.workers, ranks.device)
    runner = common.distributed(model, ranks.device)
    for step, sample in enumerate(loader, first):
        common.seed_all(common.STEP, cfg.seed, step)
        lr = common.learning_rate(step, total, total // 10, peak=cfg.blr * cfg.batch / 256)
        common.set_learning_rate(optimizer, lr)
        with common.autocast(ranks.device, cfg.precision):
            result = runner(normalize(sample["image"].to(ranks.device, non_blocking=True)))
        result["total"].backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        values = {"loss": result["total"]} | {term: result[term] for term in WEIGHTS}
        log.record(step, lr, values | {"grad_norm": norm}, sample["index"], result["bad"])
        if log.saves(step):
            log.flush()
            if ranks.rank == 0:
                save(out, model.encoder, model, optimizer, step + 1)
            log.stop_if_asked(step)
    log.close()
    if ranks.rank == 0:
        images = torch.stack([dataset[(0, i)]["image"] for i in range(min(256, len(dataset)))])
        with torch.no_grad():
            z = model.encoder(normalize(images.to(ranks.device)))[:, 1].cpu()
        neighbour_sheet(images, z, dataset.pose_id[:256].tolist(), out / "neighbours.png", "[POSE]")
        draw_curves([cfg.out], out / "curves.png")
        common.finish_run(cfg.out)
    common.barrier()


if __name__ == "__main__":
    common.run_stage(main)
