"""Stage 3c: pedestrian attributes ("female", "backpack", …) from a pre-trained encoder, by the
recipe of [Rethinking_of_PAR].

Inputs   PA-100K, PETA, RAP v1 or v2 as downloaded (.mat), or CSV files `image,attribute,…` of 0 and
         1; an encoder of pretrain.py, published ViT weights, or none.
Outputs  in `out`: metrics.json (mA, accuracy, precision, recall, F1), attributes.csv (one row per
         attribute), attributes.png (chart), examples.png, model.safetensors (averaged weights),
         encoder.safetensors, last.pt and best.pt (to resume), log.jsonl, curves.png, config.yaml.
         predict: predictions.csv (probability of each attribute), predictions.png.

  python finetune_par.py --cfg configs/finetune_par_demo.yaml                             # laptop
  torchrun --nproc_per_node=1 finetune_par.py --cfg configs/finetune_par_pa100k.yaml \\
         encoder=ENCODER annotation=PA-100K/annotation.mat images=PA-100K/data            # GPUs
  python finetune_par.py weights=runs/demo/par_pretrained/model.safetensors eval_only=true \\
         test=runs/demo/people/attributes_test.csv out=OUT
  python finetune_par.py weights=runs/demo/par_pretrained/model.safetensors predict=FOLDER out=OUT

Recipe: mean of the patch tokens → linear; weighted binary cross-entropy; AdamW; averaged weights.
The test set is looked at once, at the end: the last epoch is reported, or the best one on
validation (select=val). The reference code reports its best test epoch.
deviates from [HAP]: the rate warms up from 0 (there from 1e-4) and changes at every step (there at
every epoch); its cosine begins after the warm-up (there at epoch 0).
Legend: B pictures on this rank · N pictures of a split · A attributes · H, W input picture ·
p probability.
"""

import common  # first: Ctrl-C while the libraries load

# isort: split
import copy
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import DataLoader

from common import UserError
from drawing import results as sheets
from formats.attributes import read_attributes, read_pictures
from formats.weights import ENCODER, build_encoder, meta_of, take_settings
from model import normalize
from plumbing.config import JOB, MACHINE, Key, check_job, read_config
from tasks.attributes import THRESHOLD, AttributePictures, attribute_metrics, weighted_bce
from tasks.features import READ_POSE, TOKENS, feature_width, token_features

# Public names of this script; they are defined in tasks/.
__all__ = ["attribute_metrics", "weighted_bce"]

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
    trainval=Key(False, "train on training + validation pictures",
                 "[Rethinking_of_PAR] does; needs select=last"),
    select=Key("last", "reported epoch: last, or best mA on validation; never best on test",
               choices=("last", "val")),
    height=Key(256, "input height", "[Rethinking_of_PAR]", low=16),
    width=Key(192, "input width", "[Rethinking_of_PAR]", low=16),
    pad=Key(10, "black border in pixels before the random crop", "[Rethinking_of_PAR]", low=0),
    # model
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
    ema_warmup=Key(True, "decay of step t at most (1 + t) / (10 + t), so that a short run forgets "
                   "its start"),
) | ENCODER | JOB | MACHINE  # fmt: skip
HEADLINE = ("mA", "accuracy", "precision", "recall", "f1")


def main():
    cfg = read_config(KEYS, __doc__)
    ranks = common.start_ranks(cfg.device, cfg.precision)
    check(cfg)
    if cfg.predict:
        return predict(cfg, ranks)
    names, splits, about = read_attributes(cfg)
    if cfg.eval_only:
        return evaluate_only(cfg, names, splits["test"], about, ranks)
    train, val = splits["train"], splits["val"]
    batches = common.EpochBatches(len(train.files), cfg.batch, cfg.seed, ranks)
    dataset = AttributePictures(train, (cfg.height, cfg.width), cfg.seed, cfg.pad, augment=True)
    ratio = train.labels.mean(0)  # how often each attribute is true
    common.seed_all(common.WEIGHTS, cfg.seed)
    model, sentence = build_model(cfg, names, ratio)
    common.check_memory(model, cfg.batch // ranks.world, ranks.device)
    if common.open_run(cfg, KEYS, ranks) == "finished":
        return
    run = Run(model.to(ranks.device), cfg)
    first = run.resume(cfg)
    total = cfg.epochs * batches.steps_per_epoch
    log = common.StepLog(cfg, ranks, dataset, batches, first, total)
    log.say(f"{about}; {sentence}; {total} steps of {cfg.batch}")
    loader = common.training_loader(dataset, batches.steps(first, total), cfg.workers, ranks.device)
    runner = common.distributed(model, ranks.device)
    ratio = torch.from_numpy(ratio).float().to(ranks.device)

    # Nothing in a step waits for the device: its figures are read while the next step runs.
    for step, sample in enumerate(loader, first):
        lr = common.learning_rate(step, total, round(cfg.warmup * total), cfg.lr, cfg.min_lr)
        common.set_learning_rate(run.optimizer, lr)
        images = normalize(sample["image"].to(ranks.device, non_blocking=True))
        labels = sample["label"].to(ranks.device, non_blocking=True)
        with common.autocast(ranks.device, cfg.precision):
            logits = runner(images)  # (B, A)
        loss = weighted_bce(logits, labels, ratio)
        loss.backward()
        largest = cfg.clip_grad or float("inf")
        norm = nn.utils.clip_grad_norm_(model.parameters(), largest)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.average(cfg, step)  # the weights that are evaluated

        bad = ~logits.detach().float().sum(1).isfinite()
        log.record(step, lr, dict(loss=loss, grad_norm=norm), sample["index"], bad)
        epoch, rest = divmod(step + 1, batches.steps_per_epoch)
        if rest == 0 and val.files and not cfg.trainval:
            log.flush()
            scores = attribute_metrics(evaluate(cfg, run.ema, val, ranks), val.labels)
            log.write(step=step + 1, epoch=epoch, **{f"val_{k}": scores[k] for k in HEADLINE})
            log.say(f"epoch {epoch}: {shown(scores)} on validation")
            if cfg.select == "val" and scores["mA"] > run.best:
                run.best, run.best_epoch = scores["mA"], epoch
                run.save_best(cfg, ranks)
                run.save(cfg, step + 1, ranks)  # best.pt and last.pt tell of the same epoch
        if log.saves(step):
            log.flush()  # never save a broken model
            run.save(cfg, step + 1, ranks)
            log.stop_if_asked(step)

    log.close()
    model, epoch = run.reported(cfg)
    why = "best mA on validation" if cfg.select == "val" else "last"
    log.say(f"reported epoch: {epoch} of {cfg.epochs} ({why})")
    if ranks.rank == 0:
        save(cfg, model)
        sheets.draw_curves([cfg.out], Path(cfg.out) / "curves.png")
    report(cfg, model, splits["test"], ranks)


# --------------------------------------------------------------------- model and its training state


class AttributeModel(nn.Module):
    """Pictures (B, 3, H, W), normalised → logits (B, A): a linear layer on one vector of tokens.

    names: the A attributes; ratio: A numbers, how often each is true in training.
    """

    def __init__(self, encoder, token, names, ratio=()):
        super().__init__()
        self.encoder, self.token = encoder, token
        self.names, self.ratio = list(names), [float(r) for r in ratio]
        self.head = nn.Linear(feature_width(encoder, token), len(names))

    def forward(self, images):
        tokens = self.encoder(images)
        return self.head(token_features(tokens, self.encoder.n_special, self.token))


def build_model(cfg, names=None, ratio=()):
    """→ (model, a sentence). With weights=, that file says all, the attributes too.

    names: the A attributes of the data, None to take the file's; ratio (A,): how often each is true
    in training.
    """
    meta, sentence = take_settings(cfg, "finetune_par.py", "train_positive", "token")
    if meta:
        known, ratio = json.loads(meta["attributes"]), json.loads(meta["train_positive"])
        if names is not None and names != known:
            differs = f"{', '.join(known)}; the data has {', '.join(names)}"
            raise UserError(f"{cfg.weights} knows the attributes {differs}")
        names = known
    encoder, about = build_encoder(cfg, cfg.token in READ_POSE)
    model = AttributeModel(encoder, cfg.token, names, ratio)
    if meta:
        common.load_weights(model, common.load_checkpoint(cfg.weights), cfg.weights)
    return model, sentence or about


def save(cfg, model):
    """The weights that are reported, for eval_only and predict, and their encoder alone."""
    out, meta = Path(cfg.out), meta_of(model.encoder)
    common.save_weights(out / "encoder.safetensors", model.encoder, **meta)
    meta |= dict(token=cfg.token, attributes=json.dumps(model.names))
    meta |= dict(train_positive=json.dumps(model.ratio))
    common.save_weights(out / "model.safetensors", model, **meta)


class Run:
    """What training changes and last.pt keeps: weights, their average, optimiser, best epoch."""

    def __init__(self, model, cfg):
        self.model, self.best, self.best_epoch = model, -1.0, 0
        self.ema = copy.deepcopy(model).requires_grad_(False)
        trained = [p for p in model.parameters() if p.requires_grad]
        decay = cfg.weight_decay
        self.optimizer = torch.optim.AdamW(trained, 0.0, weight_decay=decay, fused=True)

    def average(self, cfg, step):
        """θ_ema ← d·θ_ema + (1 − d)·θ, after step `step` (0-based)."""
        decay = cfg.ema
        if cfg.ema_warmup:
            # deviates from [Rethinking_of_PAR]: the early average is short. Otherwise it would
            # remember its start for about 1/(1 − d) steps.
            decay = min(decay, (1 + step) / (10 + step))
        weights = [p.detach() for p in self.model.parameters()]
        torch._foreach_lerp_(list(self.ema.parameters()), weights, 1 - decay)

    def save(self, cfg, step, ranks):
        if ranks.rank == 0:
            common.save_checkpoint(
                Path(cfg.out) / "last.pt", model=self.model.state_dict(),
                ema=self.ema.state_dict(), optimizer=self.optimizer.state_dict(), step=step,
                best=self.best, best_epoch=self.best_epoch,
            )  # fmt: skip

    def save_best(self, cfg, ranks):
        if ranks.rank == 0:
            common.save_checkpoint(Path(cfg.out) / "best.pt", ema=self.ema.state_dict())

    def resume(self, cfg):
        """Load last.pt. → steps done (0 if the run has no checkpoint yet)."""
        path = Path(cfg.out) / "last.pt"
        state = common.resume(path, self.model, self.optimizer)
        if state["step"]:
            common.load_weights(self.ema, state["ema"], path)
            self.best, self.best_epoch = state["best"], state["best_epoch"]
        return state["step"]

    def reported(self, cfg):
        """→ (averaged model of the reported epoch, its number)."""
        if cfg.select == "last":
            return self.ema, cfg.epochs
        common.barrier()  # rank 0 may still write it
        path = Path(cfg.out) / "best.pt"
        common.load_weights(self.ema, common.load_checkpoint(path)["ema"], path)
        return self.ema, self.best_epoch


# --------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(cfg, model, split, ranks):
    """Probabilities (N, A) float32 on every rank, in the split's order; each rank does its part."""
    dataset = AttributePictures(split, model.encoder.image_size)
    own = common.rank_share(len(split.files), ranks)
    model.eval()
    parts = []
    for sample in DataLoader(dataset, cfg.batch, sampler=own, num_workers=cfg.workers):
        with common.autocast(ranks.device, cfg.precision):
            logits = model(normalize(sample["image"].to(ranks.device)))
        parts.append(logits.float().sigmoid().cpu().numpy())
    model.train()
    return np.concatenate(common.gather_objects(parts))


def evaluate_only(cfg, names, test, about, ranks):
    """The figures of a finished run's model; no training picture is needed."""
    model, sentence = build_model(cfg, names)
    if common.open_run(cfg, KEYS, ranks) == "finished":
        return
    if ranks.rank == 0:
        print(f"{about}; {sentence}", file=sys.stderr)
    report(cfg, model.to(ranks.device), test, ranks)


def report(cfg, model, test, ranks):
    """The figures on the test pictures: files, pictures, the lines people look at. Ends the run."""
    p = evaluate(cfg, model, test, ranks)
    scores, names, out = attribute_metrics(p, test.labels), model.names, Path(cfg.out)
    if ranks.rank == 0:
        lonely = [name for name, both in zip(names, scores["both"]) if not both]
        summary = {name: scores[name] for name in (*HEADLINE, "mA_both")}
        summary |= {"pictures": len(p), "one_class_only": lonely}
        common.write_json(out / "metrics.json", summary)
        rows = table(model, scores)
        header = ("attribute", "train_positive", "test_positive", "mA", "tpr", "tnr")
        common.write_csv(out / "attributes.csv", header, rows, end="\r\n")
        draw(model, test, p, scores, out)
        common.finish_run(out)
        lines = [f"{'attribute':24}  train +%   test +%        mA       TPR       TNR   (%)"]
        for name, *values in rows:
            lines.append(f"{name[:24]:24}" + "".join(f"{100 * value:10.2f}" for value in values))
        lines.append(f"wrote {out}/metrics.json, attributes.csv, attributes.png, examples.png")
        print("\n".join(lines), file=sys.stderr)
        line = f"{out}: {shown(scores)}"
        if lonely:
            line += f"; {', '.join(lonely)}: one class only in test, the missing one counts 0; "
            left = scores["mA_both"]
            line += "no attribute has both" if left is None else f"without these mA is {left:.4f}"
        print(line)
    common.barrier()


def table(model, scores):
    """One row per attribute: name, share that is true in training and in test, mA, TPR, TNR."""
    columns = (scores[name] for name in ("positive_ratio", "attribute_mA", "tpr", "tnr"))
    return list(zip(model.names, model.ratio, *(column.tolist() for column in columns)))


def shown(scores):
    return "  ".join(f"{name} {scores[name]:.4f}" for name in HEADLINE)


def draw(model, test, p, scores, out):
    """attributes.png, and examples.png: twelve pictures from the best to the worst predicted."""
    file = out / "attributes.png"
    mA, positive = scores["attribute_mA"], scores["positive_ratio"]
    sheets.attribute_chart(model.names, model.ratio, positive, mA, file)
    wrong = ((p > THRESHOLD) != (test.labels == 1)).sum(1)
    order = np.argsort(wrong, kind="stable")
    rows = order[np.linspace(0, len(order) - 1, min(12, len(order))).round().astype(int)]
    images, file = [test.load(i) for i in rows], out / "examples.png"
    sheets.attribute_sheet(images, model.names, p[rows], test.labels[rows], file)


# ------------------------------------------------------------------------------- predict and checks


def predict(cfg, ranks):
    """A folder of pictures, or one → predictions.csv (probabilities) and predictions.png."""
    files, split = read_pictures(cfg.predict)
    model, sentence = build_model(cfg)
    if common.open_run(cfg, KEYS, ranks) == "finished":
        return
    if ranks.rank == 0:
        print(sentence, file=sys.stderr)
    p = evaluate(cfg, model.to(ranks.device), split, ranks)
    if ranks.rank == 0:
        out = Path(cfg.out)
        rows = [(name, *(f"{v:.4f}" for v in row)) for name, row in zip(files, p)]
        header = ("image", *model.names)
        common.write_csv(out / "predictions.csv", header, rows, end="\r\n")
        images = [split.load(i) for i in range(min(12, len(files)))]
        sheets.attribute_sheet(images, model.names, p[:12], None, out / "predictions.png")
        common.finish_run(out)
        print(f"wrote {out}/predictions.csv ({len(files)} pictures), predictions.png")
    common.barrier()


def check(cfg):
    """Settings that are valid one by one but not together."""
    check_job(cfg, KEYS)
    if cfg.predict:
        return
    if cfg.dataset == "csv" and cfg.eval_only and not cfg.test:
        raise UserError("dataset=csv needs test=, a CSV file `image,attribute,...`")
    if cfg.dataset == "csv" and not cfg.eval_only and not (cfg.train and cfg.test):
        raise UserError("dataset=csv needs train= and test=, CSV files `image,attribute,...`")
    if cfg.dataset != "csv" and not cfg.annotation:
        raise UserError(f"dataset={cfg.dataset} needs annotation=, its .mat file")
    if cfg.trainval and cfg.select == "val" and not cfg.eval_only:
        unseen = "select=val needs validation pictures that are not trained on"
        raise UserError(f"{unseen}; set trainval=false")


if __name__ == "__main__":
    common.run_stage(main)
