"""Stage 3c: pedestrian attributes ("female", "backpack", "long sleeves", …) from a pre-trained encoder  [Rethinking_of_PAR]

Inputs   PA-100K, PETA, RAP v1 or v2 as downloaded (.mat), or CSV files `image,attribute,…` of 0 and 1; an encoder.
Outputs  in `out`: metrics.json (mA, accuracy, precision, recall, F1), attributes.csv (one row per attribute),
         attributes.png (chart), examples.png, model.safetensors (EMA weights), encoder.safetensors, last.pt, log.jsonl.

  python finetune_par.py --cfg configs/finetune_par_demo.yaml
  torchrun --nproc_per_node=2 finetune_par.py --cfg configs/finetune_par_pa100k.yaml encoder=runs/pretrain/encoder.safetensors
  python finetune_par.py --cfg configs/finetune_par_demo.yaml weights=runs/demo/par_run/model.safetensors predict=FOLDER out=OUT

Recipe: mean of the patch tokens → linear; weighted BCE; AdamW; EMA. The test set is looked at once, at the end: the
last epoch is reported, or the best one on validation (select=val). The reference code reports its best test epoch.
Legend: B pictures on this rank · A attributes · r positive ratio in training · H, W picture · p probability.
"""  # noqa: E501

import copy
import csv
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import pictures
from attributes import Split, read_attributes
from common import (
    Key,
    Log,
    UserError,
    autocast,
    barrier,
    gather_rows,
    learning_rate,
    load_checkpoint,
    load_weights,
    open_run,
    parameter_groups,
    read_config,
    run_stage,
    save_checkpoint,
    save_encoder,
    seed_all,
    set_learning_rate,
    start_ranks,
    write_atomic,
)
from data import EpochBatches, load_picture, normalize
from losses import gather_rows_of
from model import SIZES, TOKENS, encoder_meta, load_encoder, token_features
from reid import picture_names

KEYS = dict(
    out=Key("runs/par", "run folder"),
    # data
    dataset=Key("csv", "format of the annotation", choices=("pa100k", "peta", "rap", "csv")),
    annotation=Key(None, "annotation.mat (PA-100K), PETA.mat or RAP_annotation.mat (v1, v2)"),
    images=Key(None, "picture folder (default: beside the .mat or the CSV)"),
    split=Key(0, "which of the five random splits inside PETA.mat and RAP_annotation.mat", low=0),
    train=Key(None, "training CSV"),
    val=Key(None, "validation CSV, if any"),
    test=Key(None, "test CSV"),
    trainval=Key(False, "train on training + validation pictures", "[Rethinking_of_PAR] does; needs select=last"),
    select=Key("last", "reported epoch: last, or best mA on validation; never best on test", choices=("last", "val")),
    height=Key(256, "input height", "[Rethinking_of_PAR]", low=16),
    width=Key(192, "input width", "[Rethinking_of_PAR]", low=16),
    pad=Key(10, "black border in pixels before the random crop", "[Rethinking_of_PAR]", low=0),
    # model
    encoder=Key(None, "encoder.safetensors of pretrain.py, or MAE, HAP, timm, torchvision weights; none = scratch"),
    weights=Key(None, "model.safetensors of a finished run, for eval_only and predict"),
    size=Key("base", "encoder size, where encoder= does not know it itself", "[HAP]", tuple(SIZES)),
    patch=Key(16, "patch side in pixels, where encoder= does not know it itself", "[MAE]", low=1),
    token=Key("patch_mean", "what the linear layer reads", "[Rethinking_of_PAR], [HAP]", TOKENS),
    # optimiser
    epochs=Key(55, "passes over the training pictures", "[HAP] PA-100K", low=1),
    batch=Key(64, "pictures in a global batch", "[HAP]", low=1),
    lr=Key(1.7e-4, "peak learning rate", "[HAP] PA-100K", low=0),
    min_lr=Key(1.0e-5, "learning rate at the end of the cosine", "[HAP]", low=0),
    warmup=Key(0.1, "share of the steps with linear warm-up", "[HAP]", low=0, high=1),
    weight_decay=Key(5.0e-4, "AdamW weight decay, not on 1-D parameters and tokens", "[HAP]", low=0),
    clip_grad=Key(10.0, "largest gradient norm; 0 = no clipping", "[Rethinking_of_PAR]", low=0),
    ema=Key(0.9998, "decay of the averaged weights, the ones evaluated", "[Rethinking_of_PAR]", low=0, high=1),
    ema_warmup=Key(True, "decay of step t at most (1 + t) / (10 + t), so that a short run forgets its start"),
    seed=Key(0, "seed of everything", low=0),
    # what to do instead of training
    eval_only=Key(False, "only evaluate weights= on the test pictures"),
    predict=Key(None, "only predict: a folder of pictures → predictions.csv"),
    # machine
    precision=Key("fp32", "fp32, or bf16 autocast", choices=("fp32", "bf16")),
    device=Key("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"), free=True),
    workers=Key(2, "loader processes per rank", low=0, free=True),
    save_every=Key(500, "steps between checkpoints", low=1, free=True),
    log_every=Key(10, "steps between log lines", low=1, free=True),
)  # fmt: skip
THRESHOLD = 0.5  # [Rethinking_of_PAR]


def main():
    cfg = read_config(KEYS, __doc__)
    rank, world, device = start_ranks(cfg.device)
    check(cfg, world)
    if cfg.predict:
        return predict(cfg, rank, world, device)
    names, splits, report = read_attributes(cfg)
    seed_all(cfg.seed)  # initial weights
    model, meta, sentence = build_model(cfg, names)
    steps_per_epoch = len(splits["train"].files) // cfg.batch
    if steps_per_epoch == 0 and not cfg.eval_only:
        raise UserError(f"batch={cfg.batch} is larger than the {len(splits['train'].files)} pictures; lower it")
    state = open_run(cfg, KEYS, rank)
    if state == "finished":
        print(f"{cfg.out} is finished already: see {cfg.out}/metrics.json") if rank == 0 else None
        return
    model.to(device)
    total = 0 if cfg.eval_only else cfg.epochs * steps_per_epoch
    run = Run(model, cfg, total) if total else None
    step = resume(cfg, run) if total and state == "resume" else 0
    log = Log(cfg.out, total, step, rank, "attributes")
    log.say(f"{report}; {sentence}; {total} steps of {cfg.batch}")
    if total:
        train(cfg, run, splits, step, steps_per_epoch, log, rank, world, device)
        model, epoch = chosen(cfg, run, steps_per_epoch)
        why = "last" if cfg.select == "last" else "best mA on validation"
        log.say(f"reported epoch: {epoch} of {cfg.epochs} ({why})")
        if rank == 0:
            save_encoder(Path(cfg.out) / "model.safetensors", model, **meta)
            save_encoder(Path(cfg.out) / "encoder.safetensors", model.encoder, **meta)
    finish(cfg, model, names, splits, log, rank, world, device)
    log.close()
    barrier()


def check(cfg, world):
    """Settings that are valid one by one but not together."""
    if cfg.batch % world:
        raise UserError(f"batch={cfg.batch} does not split over {world} ranks; make it a multiple of {world}")
    if cfg.eval_only and cfg.predict:
        raise UserError("eval_only and predict are two jobs; give one")
    if bool(cfg.eval_only or cfg.predict) != bool(cfg.weights):
        raise UserError(
            "weights= (a finished run's model.safetensors) and eval_only=true or predict=FOLDER need each other; "
            "to start a fine-tuning from an encoder use encoder="
        )
    if cfg.predict:
        return
    if cfg.dataset == "csv" and not (cfg.train and cfg.test):
        raise UserError("dataset=csv needs train= and test=, CSV files `image,attribute,...`")
    if cfg.dataset != "csv" and not cfg.annotation:
        raise UserError(f"dataset={cfg.dataset} needs annotation=, its .mat file")
    if cfg.trainval and cfg.select == "val":
        raise UserError("select=val needs validation pictures that are not trained on; set trainval=false")


# -------------------------------------------------------------------------------------------------------- pictures


class AttributePictures(Dataset):
    """Training item (epoch, index) → picture uint8 (3, H, W), label (A,) int8, index: f(seed, epoch, index).

    Training pictures are resized, padded, cropped and flipped; evaluation items (augment=False) are an index, resized.
    """

    def __init__(self, split, size, seed=0, pad=10, augment=False):
        self.split, self.size, self.seed = split, size, seed
        self.augment = v2.Compose([v2.RandomCrop(size, pad), v2.RandomHorizontalFlip()]) if augment else None

    def __len__(self):
        return len(self.split.files)

    def __getitem__(self, item):
        index = item[1] if self.augment else item
        picture = load_picture("", self.split.files[index]).resize(self.size[::-1], Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        if self.augment:
            seed_all(self.seed, *item)
            pixels = self.augment(pixels)
        return {"image": pixels.contiguous(), "label": torch.from_numpy(self.split.labels[index]), "index": index}


# ----------------------------------------------------------------------------------------------------------- model


class AttributeModel(nn.Module):
    """Pictures (B, 3, H, W), normalised → logits (B, A): a linear layer on one vector of the encoder's tokens."""

    def __init__(self, encoder, token, n_attributes):
        super().__init__()
        self.encoder, self.token = encoder, token
        self.head = nn.Linear(encoder.width * (2 if token == "both" else 1), n_attributes)

    def forward(self, images):
        return self.head(token_features(self.encoder(images), self.encoder.n_special, self.token))


def build_model(cfg, names):
    """→ (model, what its file says of it, a sentence). With weights=, model and settings come from that file."""
    size, patch, pose_token, token, sides = cfg.size, cfg.patch, True, cfg.token, (cfg.height, cfg.width)
    if cfg.weights:
        m = encoder_meta(cfg.weights)
        if "attributes" not in m:
            raise UserError(f"{cfg.weights} is no model.safetensors of finetune_par.py")
        known = json.loads(m["attributes"])
        if names is not None and names != known:
            raise UserError(f"{cfg.weights} knows the attributes {', '.join(known)}; the data has {', '.join(names)}")
        names, size, patch, pose_token = known, m["size"], int(m["patch_size"]), m["pose_token"] == "True"
        token, sides = m["token"], (int(m["height"]), int(m["width_px"]))
    encoder, size, sentence = load_encoder(None if cfg.weights else cfg.encoder, sides, size, patch, pose_token)
    if token in ("pose", "both") and encoder.n_special < 2:
        raise UserError(f"token={token} but {cfg.encoder} has no [POSE]; use token=cls or patch_mean")
    model = AttributeModel(encoder, token, len(names))
    if cfg.weights:
        load_weights(model, load_checkpoint(cfg.weights), cfg.weights)
        sentence = f"model {cfg.weights}"
    meta = dict(
        size=size, width=encoder.width, depth=encoder.depth, heads=SIZES[size]["heads"], height=sides[0],
        width_px=sides[1], patch_size=encoder.patch_size, pose_token=encoder.n_special == 2, token=token,
        attributes=json.dumps(names),
    )  # fmt: skip
    return model, meta, sentence


def weighted_bce(logits, labels, ratio):
    """Weighted binary cross-entropy [Rethinking_of_PAR], float32: summed over attributes, mean over this rank's B.

    logits (B, A), labels (B, A) of 0 and 1 (others count nothing), ratio (A,) r in [0, 1]. → scalar. All ranks have the
    same B, so the mean over ranks is the loss of the global batch. r = 0 or 1 (a class never seen) is no special case.
    """
    y = (labels == 1).float()
    # w = exp(y(1 − r) + (1 − y)r): the rarer class weighs up to e times more
    weight = torch.exp(y * (1 - ratio) + (1 - y) * ratio) * ((labels == 0) | (labels == 1))
    # L = 1/B Σ_b Σ_a w_ba BCE(σ(logit_ba), y_ba)
    return F.binary_cross_entropy_with_logits(logits.float(), y, weight, reduction="none").sum(1).mean()


class Run:
    """What training changes and last.pt keeps: weights, their moving average, the optimiser, the best epoch so far."""

    def __init__(self, model, cfg, total):
        self.model, self.total, self.best, self.best_epoch = model, total, -1.0, 0
        self.ema = copy.deepcopy(model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(parameter_groups(model, cfg.weight_decay), lr=0.0)

    def average(self, cfg, step):
        """θ_ema ← d·θ_ema + (1 − d)·θ, after step `step` (0-based)."""
        # deviates from [Rethinking_of_PAR]: the early average is short, else it holds the start for 1/(1 − d) steps
        decay = min(cfg.ema, (1 + step) / (10 + step)) if cfg.ema_warmup else cfg.ema
        torch._foreach_lerp_(list(self.ema.parameters()), [p.detach() for p in self.model.parameters()], 1 - decay)

    def save(self, cfg, step, rank):
        if rank == 0:
            save_checkpoint(
                Path(cfg.out) / "last.pt", model=self.model.state_dict(), ema=self.ema.state_dict(), step=step,
                optimizer=self.optimizer.state_dict(), best=self.best, best_epoch=self.best_epoch,
            )  # fmt: skip


def resume(cfg, run):
    """Load last.pt. → steps done (0 if the run was killed before its first checkpoint)."""
    path = Path(cfg.out) / "last.pt"
    if not path.exists():
        return 0
    state = load_checkpoint(path)
    if not {"model", "ema", "optimizer", "step", "best", "best_epoch"} <= set(state):
        raise UserError(f"{path} is not a checkpoint of finetune_par.py; delete it to start this run anew")
    load_weights(run.model, state["model"], path)
    load_weights(run.ema, state["ema"], path)
    run.optimizer.load_state_dict(state["optimizer"])
    run.best, run.best_epoch = state["best"], state["best_epoch"]
    return state["step"]


# -------------------------------------------------------------------------------------------------------- training


def train(cfg, run, splits, first, steps_per_epoch, log, rank, world, device):
    """The loop. A step's figures are read while the next step runs."""
    dataset = AttributePictures(splits["train"], (cfg.height, cfg.width), cfg.seed, cfg.pad, augment=True)
    batches = EpochBatches(len(dataset), cfg.batch, cfg.seed, first, run.total, rank, world)
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=cfg.workers, pin_memory=device.type == "cuda")
    ratio = torch.from_numpy((splits["train"].labels == 1).mean(0)).float().to(device)
    model, runner, figures = run.model, run.model, None
    if world > 1:
        ids = [device.index] if device.type == "cuda" else None
        runner = DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)
    for step, sample in enumerate(loader, first):
        lr = learning_rate(step, run.total, round(cfg.warmup * run.total), cfg.lr, cfg.min_lr)
        set_learning_rate(run.optimizer, lr)
        images = normalize(sample["image"].to(device, non_blocking=True))
        labels = sample["label"].to(device, non_blocking=True)
        with autocast(device, cfg.precision):
            logits = runner(images)
        loss = weighted_bce(logits, labels, ratio)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad or float("inf"))
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.average(cfg, step)

        settle(figures, dataset, cfg, log)  # the step before this one
        figures = Figures(step, lr, (loss, norm), logits, sample["index"])
        epoch_done, last = (step + 1) % steps_per_epoch == 0, step + 1 == run.total
        if epoch_done or last or (step + 1) % cfg.save_every == 0:
            settle(figures, dataset, cfg, log)  # never save after a non-finite loss
            figures = None
            if epoch_done and len(splits["val"].files) and not cfg.trainval:
                validate(cfg, run, splits["val"], (step + 1) // steps_per_epoch, step + 1, log, rank, world, device)
            if last or (step + 1) % cfg.save_every == 0:
                run.save(cfg, step + 1, rank)
        log.advance()


class Figures:
    """One step's figures of all ranks, on their way to the host while the device goes on."""

    def __init__(self, step, lr, values, logits, index):
        self.step, self.lr, self.index = step, lr, index
        own = torch.stack([value.detach().float() for value in values])
        self.ranks = gather_rows_of(own[None]).to("cpu", non_blocking=True)
        self.finite = logits.detach().float().sum(1).isfinite().to("cpu", non_blocking=True)
        self.copied = torch.cuda.Event() if own.is_cuda else None
        if self.copied:
            self.copied.record()


def settle(figures, dataset, cfg, log):
    """Check and log a step's figures. A non-finite loss stops all ranks; the last checkpoint stays."""
    if figures is None:
        return
    if figures.copied:
        figures.copied.synchronize()
    finite = figures.ranks.isfinite().all(1)
    if not finite.all():
        bad = (~figures.finite).nonzero().flatten().tolist() or range(len(figures.index))
        names = [dataset.split.files[int(figures.index[i])] for i in bad]
        raise UserError(
            f"non-finite loss or gradient at step {figures.step} on rank(s) {(~finite).nonzero().flatten().tolist()}; "
            f"this rank's pictures: {', '.join(names[:8])}; the last checkpoint stays; lower lr"
        )
    if figures.step % cfg.log_every == 0:
        loss, norm = figures.ranks.mean(0).tolist()
        row = dict(loss=loss, grad_norm=norm, pictures_per_s=log.rate(figures.step + 1, cfg.batch))
        log.write(step=figures.step + 1, lr=figures.lr, **row, shown=("loss", "pictures_per_s"))


def validate(cfg, run, split, epoch, step, log, rank, world, device):
    """Figures of the averaged weights on validation; with select=val the best epoch's weights go to best.pt."""
    scores = attribute_metrics(probabilities_of(cfg, run.ema, split, rank, world, device), split.labels)
    log.write(step=step, epoch=epoch, **{f"val_{name}": scores[name] for name in HEADLINE})
    log.say(f"epoch {epoch}: " + shown(scores) + " on validation")
    if cfg.select == "val" and scores["mA"] > run.best:
        run.best, run.best_epoch = scores["mA"], epoch
        if rank == 0:
            save_checkpoint(Path(cfg.out) / "best.pt", ema=run.ema.state_dict())
        run.save(cfg, step, rank)  # best.pt and last.pt must speak of the same epoch


def chosen(cfg, run, steps_per_epoch):
    """→ (averaged model of the reported epoch, its number)."""
    if cfg.select == "val":
        barrier()
        path = Path(cfg.out) / "best.pt"
        load_weights(run.ema, load_checkpoint(path)["ema"], path)
        return run.ema, run.best_epoch
    return run.ema, run.total // steps_per_epoch


# ------------------------------------------------------------------------------------------------------ evaluation

HEADLINE = ("mA", "accuracy", "precision", "recall", "f1")


@torch.no_grad()
def probabilities_of(cfg, model, split, rank, world, device):
    """(N, A) float32 on every rank, in the order of the split. Ranks share the pictures; each is seen once."""
    sides = model.encoder.image_size
    own = range(rank, len(split.files), world)
    loader = DataLoader(AttributePictures(split, sides), cfg.batch, sampler=own, num_workers=cfg.workers)
    model.eval()
    rows = []
    for sample in loader:
        with autocast(device, cfg.precision):
            logits = model(normalize(sample["image"].to(device)))
        rows.append((sample["index"].numpy(), logits.float().sigmoid().cpu().numpy()))
    model.train()
    index, values = zip(*gather_rows(rows, world))
    out = np.full((len(split.files), values[0].shape[1]), np.nan, np.float32)
    out[np.concatenate(index)] = np.concatenate(values)
    return out


def attribute_metrics(probabilities, labels):
    """The five figures of pedestrian attribute recognition [Rethinking_of_PAR], at threshold 0.5, as fractions.

    probabilities (N, A) in [0, 1]; labels (N, A) 0/1; NumPy arrays or tensors. → dict:
    mA = mean over attributes of (TPR + TNR)/2; accuracy, precision, recall = means over pictures of |yes ∩ right| over
    |yes ∪ right|, |yes|, |right|; f1 of the mean precision and recall. 0/0 counts 0, as in the reference code: an
    attribute without a positive (or negative) test picture has TPR (TNR) 0 and so mA at most .5. It stays in mA, to be
    comparable; `mA_both` leaves it out. Per attribute (A,): tpr, tnr, attribute_mA, positive_ratio, both (bool).
    """
    p, y = (np.asarray(x.detach().cpu().float() if torch.is_tensor(x) else x) for x in (probabilities, labels))
    if p.shape != y.shape or p.ndim != 2 or p.size == 0:
        raise UserError(f"probabilities {p.shape} and labels {y.shape} must be two equal tables (pictures, attributes)")
    if not np.isfinite(p).all():
        raise UserError("probabilities hold a value that is not a number")
    yes, positive, negative = p > THRESHOLD, y == 1, y == 0

    def share(part, whole):
        return part / np.maximum(whole, 1)  # part ≤ whole, so 0/0 → 0

    tpr = share((yes & positive).sum(0), positive.sum(0))
    tnr = share((~yes & negative).sum(0), negative.sum(0))
    both = positive.any(0) & negative.any(0)
    # mA = 1/A Σ_a (TPR_a + TNR_a) / 2
    per_attribute = (tpr + tnr) / 2
    hit = (yes & positive).sum(1)
    precision = share(hit, yes.sum(1)).mean()
    recall = share(hit, positive.sum(1)).mean()
    return {
        "mA": float(per_attribute.mean()),
        "accuracy": float(share(hit, (yes | positive).sum(1)).mean()),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(2 * precision * recall / max(precision + recall, 1e-20)),
        "mA_both": float(per_attribute[both].mean()) if both.any() else 0.0,
        "tpr": tpr,
        "tnr": tnr,
        "attribute_mA": per_attribute,
        "positive_ratio": positive.mean(0),
        "both": both,
    }


def shown(scores):
    return ", ".join(f"{name} {100 * scores[name]:.2f}" for name in HEADLINE)


def finish(cfg, model, names, splits, log, rank, world, device):
    """Test figures, per-attribute table, pictures, and the mark that the run is done."""
    test = splits["test"]
    p = probabilities_of(cfg, model, test, rank, world, device)
    scores = attribute_metrics(p, test.labels)
    if rank:
        return
    out, ratio = Path(cfg.out), (splits["train"].labels == 1).mean(0)
    lonely = [n for n, both in zip(names, scores["both"]) if not both]
    note = "" if not lonely else (
        f"; {', '.join(lonely)}: one class only in test, its missing class counts 0; without "
        f"{'it' if len(lonely) == 1 else 'them'} mA is {100 * scores['mA_both']:.2f}"
    )  # fmt: skip
    columns = ("attribute_mA", "tpr", "tnr")
    table = [
        (n, float(ratio[a]), float(scores["positive_ratio"][a]), *(float(scores[c][a]) for c in columns))
        for a, n in enumerate(names)
    ]
    lines = [f"{'attribute':24}  train +%  test +%      mA     TPR     TNR   (%)"]
    for name, *values in table:
        lines.append(f"{name[:24]:24}" + "".join(f"{100 * v:{w}.2f}" for v, w in zip(values, (10, 9, 8, 8, 8))))
    log.say("\n".join(lines))
    print(f"{cfg.out}: " + "  ".join(f"{name} {scores[name]:.4f}" for name in HEADLINE) + note)
    write_csv(out / "attributes.csv", ("attribute", "train_positive", "test_positive", "mA", "tpr", "tnr"), table)
    summary = {name: scores[name] for name in (*HEADLINE, "mA_both")} | {"pictures": len(p), "one_class_only": lonely}
    write_atomic(out / "metrics.json", lambda part: part.write_text(json.dumps(summary, indent=1)))
    pictures.attribute_chart(names, ratio, scores["positive_ratio"], scores["attribute_mA"], out / "attributes.png")
    # Examples from the best to the worst predicted picture, in even steps.
    order = np.argsort(((p > THRESHOLD) != (test.labels == 1)).sum(1), kind="stable")
    rows = order[np.linspace(0, len(order) - 1, min(12, len(order))).round().astype(int)]
    images = [load_picture("", test.files[i]) for i in rows]
    pictures.attribute_sheet(images, names, p[rows], test.labels[rows], out / "examples.png")
    (out / "done").touch()
    log.say(f"wrote {out}/metrics.json, attributes.csv, attributes.png, examples.png")


def predict(cfg, rank, world, device):
    """A folder of pictures → predictions.csv (probability of each attribute) and predictions.png."""
    found = picture_names(cfg.predict, below=True)
    model, meta, _ = build_model(cfg, None)
    if open_run(cfg, KEYS, rank) == "finished":
        print(f"{cfg.out} is finished already: see {cfg.out}/predictions.csv") if rank == 0 else None
        return
    names, files = json.loads(meta["attributes"]), [str(Path(cfg.predict) / name) for name in found]
    split = Split(files, np.full((len(files), len(names)), -1, np.int8))
    p = probabilities_of(cfg, model.to(device), split, rank, world, device)
    if rank == 0:
        out = Path(cfg.out)
        rows = [(name, *(f"{v:.4f}" for v in row)) for name, row in zip(found, p)]
        write_csv(out / "predictions.csv", ("image", *names), rows)
        shown_rows = slice(0, 12)
        images = [load_picture("", f) for f in files[shown_rows]]
        pictures.attribute_sheet(images, names, p[shown_rows], None, out / "predictions.png")
        (out / "done").touch()
        print(f"wrote {out}/predictions.csv ({len(files)} pictures), predictions.png")
    barrier()


def write_csv(path, header, rows):
    def write(part):
        with open(part, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([header, *rows])

    write_atomic(path, write)


if __name__ == "__main__":
    run_stage(main)
