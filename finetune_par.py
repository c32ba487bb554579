"""Stage 3c: pedestrian attributes ("female", "backpack", …) from a pre-trained encoder  [Rethinking_of_PAR]

Inputs   PA-100K, PETA, RAP v1 or v2 as downloaded (.mat), or CSV files `image,attribute,…` of 0 and 1; an encoder.
Outputs  in `out`: metrics.json (mA, accuracy, precision, recall, F1), attributes.csv (one row per attribute),
         attributes.png (chart), examples.png, model.safetensors (EMA weights), encoder.safetensors, last.pt, log.jsonl.

  python finetune_par.py --cfg configs/finetune_par_demo.yaml
  torchrun --nproc_per_node=2 finetune_par.py --cfg configs/finetune_par_pa100k.yaml encoder=ENCODER \\
         annotation=PA-100K/annotation.mat images=PA-100K/data
  python finetune_par.py weights=runs/demo/par_pretrained/model.safetensors eval_only=true \\
         test=runs/demo/people/attributes_test.csv out=OUT
  python finetune_par.py weights=runs/demo/par_pretrained/model.safetensors predict=FOLDER out=OUT

Recipe: mean of the patch tokens → linear; weighted BCE; AdamW; EMA. The test set is looked at once, at the end: the
last epoch is reported, or the best one on validation (select=val). The reference code reports its best test epoch.
deviates from [HAP]: the rate warms up from 0, there from 1e-4, and moves every step, there every
epoch.
Legend: B pictures on this rank · A attributes · r positive ratio in training · H, W picture · p probability.
"""

import copy
import csv
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import DataLoader

from common import (
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
    rank_share,
    resume,
    save_checkpoint,
    save_encoder,
    seed_all,
    set_learning_rate,
    settle,
    start_ranks,
    write_atomic,
    write_json,
)
from data import as_bytes, load_picture, normalize, pictures_at, refuse_bad_pictures
from drawing import sheets
from formats.weights import load_encoder, meta_of, use_meta
from model import SIZES
from plumbing.batches import EpochBatches, training_loader
from plumbing.config import Key, UserError, check_job, read_config, run_stage
from tasks.attributes import THRESHOLD, AttributePictures, Split, attribute_metrics, read_attributes, weighted_bce
from tasks.heads import TOKENS, feature_width, reads_pose, token_features

KEYS = dict(
    out=Key("runs/par", "run folder; for eval_only runs/par_eval, for predict runs/par_predict"),
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
    warmup=Key(0.1, "share of the steps with linear warm-up", "[HAP], from 1e-4", low=0, high=1),
    weight_decay=Key(5.0e-4, "AdamW weight decay, on all parameters", "[HAP]", low=0),
    clip_grad=Key(10.0, "largest gradient norm; 0 = no clipping", "[Rethinking_of_PAR]", low=0),
    ema=Key(0.9998, "decay of the averaged weights, the ones evaluated; 0 = no average",
            "[HAP] PA-100K; 0 elsewhere", low=0, high=1),
    ema_warmup=Key(True, "decay of step t at most (1 + t) / (10 + t), so that a short run forgets its start"),
    seed=Key(0, "seed of everything", low=0),
    # what to do instead of training
    eval_only=Key(False, "only evaluate weights= on the test pictures"),
    predict=Key(None, "only predict: a folder of pictures, or one → predictions.csv"),
    # machine
    precision=Key("auto", "fp32 (no TF32); bf16 autocast; auto: bf16 in hardware", choices=("auto", "fp32", "bf16")),
    device=Key("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"), free=True),
    workers=Key(2, "loader processes per rank", low=0, free=True),
    save_every=Key(500, "steps between checkpoints", low=1, free=True),
    log_every=Key(10, "steps between log lines", low=1, free=True),
)  # fmt: skip
HEADLINE = ("mA", "accuracy", "precision", "recall", "f1")


def main():
    cfg = read_config(KEYS, __doc__)
    rank, world, device = start_ranks(cfg.device, cfg.precision)
    check(cfg)
    if cfg.predict:
        return predict(cfg, rank, world, device)
    names, splits, report = read_attributes(cfg)
    seed_all(WEIGHTS, cfg.seed)  # initial weights
    ratio = () if cfg.eval_only else (splits["train"].labels == 1).mean(0)
    model, meta, sentence = build_model(cfg, names, ratio)
    total, step = 0, 0
    if not cfg.eval_only:
        batches = EpochBatches(len(splits["train"].files), cfg.batch, cfg.seed, rank, world)
        total = cfg.epochs * batches.steps_per_epoch
    if open_run(cfg, KEYS, rank) == "finished":
        return
    model.to(device)
    if total:
        run = Run(model, cfg)
        step = run.resume(cfg)
    log = Log(cfg.out, total, step, rank, "attributes")
    log.say(f"{report}; {sentence}" + (f"; {total} steps of {cfg.batch}" if total else ""))
    if total:
        train(cfg, run, splits, batches, step, total, log, rank, world, device)
        model, epoch = chosen(cfg, run)
        why = "last" if cfg.select == "last" else "best mA on validation"
        log.say(f"reported epoch: {epoch} of {cfg.epochs} ({why})")
        if rank == 0:
            save_encoder(Path(cfg.out) / "model.safetensors", model, **meta)
            save_encoder(Path(cfg.out) / "encoder.safetensors", model.encoder, **meta_of(model.encoder, meta["size"]))
    finish(cfg, model, meta, splits["test"], log, rank, world, device)
    log.close()
    barrier()


def check(cfg):
    """Settings that are valid one by one but not together."""
    check_job(cfg, KEYS)
    if cfg.predict:
        return
    if cfg.dataset == "csv" and not (cfg.test and (cfg.train or cfg.eval_only)):
        needs = "test=, a CSV file" if cfg.eval_only else "train= and test=, CSV files"
        raise UserError(f"dataset=csv needs {needs} `image,attribute,...`")
    if cfg.dataset != "csv" and not cfg.annotation:
        raise UserError(f"dataset={cfg.dataset} needs annotation=, its .mat file")
    if cfg.trainval and cfg.select == "val" and not cfg.eval_only:
        raise UserError("select=val needs validation pictures that are not trained on; set trainval=false")


# ----------------------------------------------------------------------------------------------------------- model


class AttributeModel(nn.Module):
    """Pictures (B, 3, H, W), normalised → logits (B, A): a linear layer on one vector of the encoder's tokens."""

    def __init__(self, encoder, token, n_attributes):
        super().__init__()
        self.encoder, self.token = encoder, token
        self.head = nn.Linear(feature_width(encoder, token), n_attributes)

    def forward(self, images):
        return self.head(token_features(self.encoder(images), self.encoder.n_special, self.token))


def build_model(cfg, names, ratio=()):
    """→ (model, what its file says of it, a sentence). With weights=, that file says all.

    names: A attributes, None to take the file's; ratio (A,): how often each is true in training.
    """
    m, loaded = use_meta(cfg, "finetune_par.py", "train_positive", "token")
    if m:
        known = json.loads(m["attributes"])
        if names is not None and names != known:
            raise UserError(f"{cfg.weights} knows the attributes {', '.join(known)}; the data has {', '.join(names)}")
        names = known
    start, pose_token = (None, cfg.pose_token) if m else (cfg.encoder, cfg.encoder is None or reads_pose(cfg.token))
    encoder, size, sentence = load_encoder(start, (cfg.height, cfg.width), cfg.size, cfg.patch, pose_token)
    model = AttributeModel(encoder, cfg.token, len(names))
    if m:
        load_weights(model, load_checkpoint(cfg.weights), cfg.weights)
        sentence = loaded
    meta = meta_of(encoder, size) | dict(token=cfg.token, attributes=json.dumps(names))
    meta["train_positive"] = m["train_positive"] if m else json.dumps(list(map(float, ratio)))
    return model, meta, sentence


class Run:
    """What training changes and last.pt keeps: weights, their moving average, the optimiser, the best epoch so far."""

    def __init__(self, model, cfg):
        self.model, self.best, self.best_epoch = model, -1.0, 0
        self.ema = copy.deepcopy(model).requires_grad_(False)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, 0.0, weight_decay=cfg.weight_decay, fused=True)

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

    def resume(self, cfg):
        """Load last.pt. → steps done (0 if the run is new, or was killed before its first checkpoint)."""
        path = Path(cfg.out) / "last.pt"
        state = resume(path, self.model, self.optimizer)
        if state["step"]:
            load_weights(self.ema, state["ema"], path)
            self.best, self.best_epoch = state["best"], state["best_epoch"]
        return state["step"]


# -------------------------------------------------------------------------------------------------------- training


def train(cfg, run, splits, batches, first, total, log, rank, world, device):
    """The loop. Nothing in a step waits for the device: its figures are read while the next step runs."""
    dataset = AttributePictures(splits["train"], (cfg.height, cfg.width), cfg.seed, cfg.pad, augment=True)
    loader = training_loader(dataset, batches.run(first, total), cfg.workers, device)
    ratio = torch.from_numpy((splits["train"].labels == 1).mean(0)).float().to(device)
    model, runner, figures = run.model, distributed(run.model, device), None
    for step, sample in enumerate(loader, first):
        lr = learning_rate(step, total, round(cfg.warmup * total), cfg.lr, cfg.min_lr)
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

        settle(figures, log, dataset.name, cfg.batch, cfg.log_every, ("loss",))  # the step before this one
        bad = ~logits.detach().float().sum(1).isfinite()
        figures = Figures(step, lr, dict(loss=loss, grad_norm=norm), sample["index"], bad)
        (epoch, rest), last = divmod(step + 1, batches.steps_per_epoch), step + 1 == total
        saving = last or (step + 1) % cfg.save_every == 0
        if saving or rest == 0:
            settle(figures, log, dataset.name, cfg.batch, cfg.log_every, ("loss",))  # never save a broken model
            figures = None
            if rest == 0 and len(splits["val"].files) and not cfg.trainval:
                validate(cfg, run, splits["val"], epoch, step + 1, log, rank, world, device)
            if saving:
                run.save(cfg, step + 1, rank)
        log.advance()


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


def chosen(cfg, run):
    """→ (averaged model of the reported epoch, its number)."""
    if cfg.select == "last":
        return run.ema, cfg.epochs
    barrier()  # rank 0 may still write it
    path = Path(cfg.out) / "best.pt"
    load_weights(run.ema, load_checkpoint(path)["ema"], path)
    return run.ema, run.best_epoch


# ------------------------------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def probabilities_of(cfg, model, split, rank, world, device):
    """(N, A) float32 on every rank, in the order of the split. Ranks share the pictures; each is seen once."""
    own = rank_share(len(split.files), rank, world)
    dataset = AttributePictures(split, model.encoder.image_size)
    model.eval()
    parts = []
    for sample in DataLoader(dataset, cfg.batch, sampler=own, num_workers=cfg.workers):
        with autocast(device, cfg.precision):
            logits = model(normalize(sample["image"].to(device)))
        parts.append(logits.float().sigmoid().cpu().numpy())
    model.train()
    return np.concatenate(gather_rows(parts, world))


def shown(scores):
    return ", ".join(f"{name} {100 * scores[name]:.2f}" for name in HEADLINE)


def finish(cfg, model, meta, test, log, rank, world, device):
    """Test figures, per-attribute table, pictures, and the mark that the run is done."""
    names, ratio = json.loads(meta["attributes"]), np.array(json.loads(meta["train_positive"]))
    p = probabilities_of(cfg, model, test, rank, world, device)
    scores = attribute_metrics(p, test.labels)
    if rank:
        return
    out = Path(cfg.out)
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
    write_json(out / "metrics.json", summary)
    sheets.attribute_chart(names, ratio, scores["positive_ratio"], scores["attribute_mA"], out / "attributes.png")
    # Examples from the best to the worst predicted picture, in even steps.
    order = np.argsort(((p > THRESHOLD) != (test.labels == 1)).sum(1), kind="stable")
    rows = order[np.linspace(0, len(order) - 1, min(12, len(order))).round().astype(int)]
    images = [load_picture("", test.files[i]) for i in rows]
    sheets.attribute_sheet(images, names, p[rows], test.labels[rows], out / "examples.png")
    (out / "done").touch()
    log.say(f"wrote {out}/metrics.json, attributes.csv, attributes.png, examples.png")


def predict(cfg, rank, world, device):
    """A folder of pictures → predictions.csv (probability of each attribute) and predictions.png."""
    folder, found = pictures_at(cfg.predict)
    refuse_bad_pictures(folder, as_bytes(folder, found))
    model, meta, sentence = build_model(cfg, None)
    if open_run(cfg, KEYS, rank) == "finished":
        return
    if rank == 0:
        print(sentence, file=sys.stderr)
    names, files = json.loads(meta["attributes"]), [str(Path(folder) / name) for name in found]
    split = Split(files, np.full((len(files), len(names)), -1, np.int8))
    p = probabilities_of(cfg, model.to(device), split, rank, world, device)
    if rank == 0:
        out = Path(cfg.out)
        rows = [(name, *(f"{v:.4f}" for v in row)) for name, row in zip(found, p)]
        write_csv(out / "predictions.csv", ("image", *names), rows)
        shown_rows = slice(0, 12)
        images = [load_picture("", f) for f in files[shown_rows]]
        sheets.attribute_sheet(images, names, p[shown_rows], None, out / "predictions.png")
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
