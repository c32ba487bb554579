"""Stage 3d: text-to-image person ReID: find a person by a sentence  [HAP's simple baseline, after LGUR]

Inputs   CUHK-PEDES, ICFG-PEDES or RSTPReid JSON with pictures, as downloaded; an encoder of pretrain.py.
Outputs  in `out`: metrics.json (R@1, R@5, R@10, mAP, text → image and image → text), ranking.png (captions and their
         ten best pictures), model.safetensors, encoder.safetensors, last.pt, log.jsonl.

  python finetune_t2i.py --cfg configs/finetune_t2i_demo.yaml
  torchrun --nproc_per_node=2 finetune_t2i.py --cfg configs/finetune_t2i_cuhk.yaml encoder=ENCODER \\
         captions=CUHK-PEDES/reid_raw.json images=CUHK-PEDES/imgs
  python finetune_t2i.py weights=runs/demo/t2i_pretrained/model.safetensors predict=FOLDER \\
         sentence="a woman in a red coat" out=OUT

Picture: ViT patch tokens, max over patches. Text: frozen BERT (or learned word vectors, nothing to download) → BiLSTM,
max over words. One projection and one identity classifier for both:  L = CE(picture) + CE(text) + L_rank.
The last epoch is reported; HAP's code reports its best one on the test set. Its learning rates fall
one epoch before its milestones (its scheduler steps before the first epoch), ours after them.
Legend: B pairs on this rank · M pairs of all ranks · D width · T tokens · v, t (B, E) features of picture and text.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader

from common import (
    DROP_PATH,
    NEGATIVE,
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
    rank_noise,
    rank_share,
    resume,
    save_checkpoint,
    save_encoder,
    seed_all,
    set_learning_rate,
    settle,
    start_ranks,
    write_json,
)
from data import as_bytes, load_picture, normalize, pictures_at, refuse_bad_pictures
from drawing import sheets
from formats.weights import load_encoder, meta_of, use_meta
from losses import no_autocast
from model import SIZES
from plumbing.batches import EpochBatches, training_loader
from plumbing.config import Key, UserError, check_job, read_config, run_stage
from tasks.captions import (
    Bert,
    Gallery,
    Pairs,
    Words,
    pad_tokens,
    ranking_loss,
    read_captions,
    retrieval_metrics,
)
from tasks.heads import TOKENS, feature_width, reads_pose, token_features

KEYS = dict(
    out=Key("runs/t2i", "run folder; for eval_only runs/t2i_eval, for predict runs/t2i_predict"),
    # data
    captions=Key(None, "reid_raw.json (CUHK-PEDES), ICFG-PEDES.json or data_captions.json (RSTPReid)"),
    images=Key(None, "picture folder (default: imgs or images beside the JSON)"),
    evaluate_on=Key("test", "split that is evaluated, once, after the last epoch", choices=("test", "val")),
    height=Key(384, "input height", "[HAP]", low=16),
    width=Key(128, "input width", "[HAP]", low=16),
    leave_out=Key([], "ids of people not to train on", "[HAP]: three of CUHK-PEDES", of=int),
    trainval=Key(False, "train on training + validation pictures", "[HAP] does on RSTPReid"),
    pad=Key(10, "black border in pixels before the random crop", "[HAP]", low=0),
    flip=Key(0.5, "probability of a mirrored training picture", "[HAP]", low=0, high=1),
    # model
    encoder=Key(None, "encoder.safetensors of pretrain.py, or MAE, HAP, timm, torchvision weights; none = scratch"),
    weights=Key(None, "model.safetensors of a finished run, for eval_only and predict"),
    size=Key("base", "encoder size, where encoder= does not know it itself", "[HAP]", tuple(SIZES)),
    patch=Key(16, "patch side in pixels, where encoder= does not know it itself", "[MAE]", low=1),
    token=Key("patch_max", "what stands for a picture", "[HAP]", TOKENS),
    text=Key("words", "words: learned vocabulary of the training captions; bert: frozen BERT [HAP]", "ours",
             ("words", "bert")),
    bert=Key("google-bert/bert-base-uncased", "hub id, or a folder written by save_pretrained", "[HAP]"),
    min_count=Key(2, "text=words: a word must occur this often; rarer ones teach `unknown`",
                  "[HAP], which drops the rarer ones", low=1),
    max_tokens=Key(100, "longer sentences are cut", "[HAP]", low=1),
    project=Key(384, "E, width of the shared space", "[HAP]", low=1),
    drop_path=Key(0.1, "drop path of the last block, rising linearly", "[HAP]", low=0, high=0.9),
    # optimiser
    epochs=Key(60, "passes over the training captions", "[HAP]", low=1),
    batch=Key(64, "caption and picture pairs in a global batch", "[HAP]", low=2),
    lr_encoder=Key(1.0e-4, "Adam, encoder", "[HAP]", low=0),
    lr=Key(1.0e-3, "Adam, everything else", "[HAP]", low=1e-9),
    milestones=Key([20, 40, 50], "epochs after which the rates fall to a tenth", "[HAP]", of=int, low=0),
    warmup_epochs=Key(0.0, "linear warm-up", "[HAP]: none", low=0),
    margin=Key(0.2, "of L_rank, in cosine", "[HAP]", low=0),
    clip_grad=Key(0.0, "largest gradient norm; 0 = no clipping", "[HAP]: none", low=0),
    seed=Key(0, "seed of everything", low=0),
    # what to do instead of training
    eval_only=Key(False, "only evaluate weights= on captions="),
    predict=Key(None, "only search: a folder of pictures, or one → ranking.json, ranking.png"),
    sentence=Key(None, "what to look for, with predict="),
    # machine
    precision=Key("auto", "fp32; bf16 autocast; auto: bf16 where hardware has it", choices=("auto", "fp32", "bf16")),
    checkpoint_activations=Key(False, "recompute activations: less memory, more time", free=True),
    device=Key("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"), free=True),
    workers=Key(2, "loader processes per rank", low=0, free=True),
    save_every=Key(500, "steps between checkpoints", low=1, free=True),
    log_every=Key(10, "steps between log lines", low=1, free=True),
)  # fmt: skip
SHOWN = ("loss", "identity", "rank_loss")  # beside the progress bar
WORD_WIDTH = 300  # ours, of text=words: the usual width of word vectors


def main():
    cfg = read_config(KEYS, __doc__)
    rank, world, device = start_ranks(cfg.device, cfg.precision)
    check(cfg)
    if cfg.predict:
        return predict(cfg, rank, world, device)
    training = {} if cfg.eval_only else dict(leave_out=cfg.leave_out, trainval=cfg.trainval)
    splits = read_captions(cfg.captions, cfg.images, **training)
    for name in {"train", cfg.evaluate_on} if not cfg.eval_only else {cfg.evaluate_on}:
        if splits[name] is None:
            raise UserError(f"{cfg.captions} has no {name} split")
    total, step = 0, 0
    if not cfg.eval_only:
        batches = EpochBatches(len(splits["train"].texts), cfg.batch, cfg.seed, rank, world)
        total = cfg.epochs * batches.steps_per_epoch
    seed_all(WEIGHTS, cfg.seed)  # initial weights
    model, text, meta, sentence = build_model(cfg, splits["train"], device)
    if open_run(cfg, KEYS, rank) == "finished":
        return
    model.to(device)
    if total:
        # lr_scale is relative to lr, so that one schedule moves both
        head = [p for name, p in model.named_parameters() if not name.startswith("encoder.")]
        encoder = {"params": model.encoder.parameters(), "lr_scale": cfg.lr_encoder / cfg.lr}
        optimizer = torch.optim.Adam([encoder, {"params": head}], lr=0.0, fused=True)
        step = resume(Path(cfg.out) / "last.pt", model, optimizer)["step"]
    log = Log(cfg.out, total, step, rank, "text to image")
    counts = ", ".join(f"{len(s.texts)} captions of {len(s.files)} in {n}" for n, s in splits.items() if s)
    log.say(f"{counts}; {sentence}" + (f"; {total} steps of {cfg.batch}" if total else ""))
    if total:
        train(cfg, model, text, optimizer, splits["train"], batches, step, total, log, rank, world, device)
        if rank == 0:
            save_encoder(Path(cfg.out) / "model.safetensors", model, **meta)
            save_encoder(Path(cfg.out) / "encoder.safetensors", model.encoder, **meta_of(model.encoder, meta["size"]))
    finish(cfg, model, text, splits[cfg.evaluate_on], log, total, rank, world, device)
    log.close()
    barrier()


def check(cfg):
    """Settings that are valid one by one but not together."""
    check_job(cfg, KEYS)
    if bool(cfg.predict) != bool(cfg.sentence and cfg.sentence.strip()):
        raise UserError('predict=FOLDER and sentence="what to look for" need each other')
    if not cfg.predict and not cfg.captions:
        raise UserError("captions= names no file; give the JSON of CUHK-PEDES, ICFG-PEDES or RSTPReid")
    if cfg.trainval and cfg.evaluate_on == "val":
        raise UserError("evaluate_on=val needs pictures not trained on; set trainval=false")


# ----------------------------------------------------------------------------------------------------------- model


class TextToImage(nn.Module):
    """Two branches that meet in one projection [HAP].

    words: size of the vocabulary, learned here, or None: the text arrives as vectors of frozen BERT, `width` wide.
    The picture is read before the encoder's final norm, which stays as it was.
    """

    def __init__(self, encoder, token, project, persons, words=None, width=WORD_WIDTH):
        super().__init__()
        self.encoder, self.token = encoder, token
        self.encoder.norm.requires_grad_(False)  # DistributedDataParallel refuses idle weights
        D = feature_width(encoder, token)
        self.embedding = nn.Embedding(words, width, padding_idx=0) if words else None
        # The two directions of one bidirectional LSTM, apart: see text_features.
        self.lstm_ahead = nn.LSTM(width, D, batch_first=True, bias=False)
        self.lstm_back = nn.LSTM(width, D, batch_first=True, bias=False)
        self.projection = nn.Linear(D, project, bias=False)  # shared by both branches
        nn.init.kaiming_normal_(self.projection.weight, mode="fan_out")
        self.classifier = nn.Linear(project, persons)  # shared by both branches
        nn.init.normal_(self.classifier.weight, std=0.001)
        nn.init.zeros_(self.classifier.bias)

    def image_features(self, images, drop_noise=None):
        """(B, 3, H, W) normalised, drop_noise (2·depth, B) or None → (B, E)."""
        tokens = self.encoder(images, drop_noise=drop_noise, final_norm=False)
        return self.projection(token_features(tokens, self.encoder.n_special, self.token))

    def text_features(self, text, lengths):
        """Token ids (B, T), or BERT's states (B, T, U), and lengths (B,) → (B, E), in float32.

        Packing the sequences would need their lengths on the CPU: DistributedDataParallel moves
        them to the GPU, and fetching them would wait for it.
        """
        with no_autocast(self.projection.weight):
            x = text if self.embedding is None else self.embedding(text)
            place, lengths = torch.arange(x.shape[1], device=x.device), lengths[:, None]
            inside = place < lengths  # (B, T)
            # Each sentence turned round, so that the second LSTM starts at its last word.
            last_first = torch.where(inside, lengths - 1 - place, place).unsqueeze(2)
            ahead = self.lstm_ahead(x)[0]
            back = self.lstm_back(x.take_along_dim(last_first, 1))[0].take_along_dim(last_first, 1)
            states = (ahead + back) / 2
            # deviates from HAP: padding never wins the maximum. There it counts as 0, so that a
            # sentence's feature depends on the longest one of its batch.
            return self.projection(states.masked_fill(~inside.unsqueeze(2), -torch.inf).amax(1))

    def forward(self, images, text, lengths, drop_noise=None):
        """→ v, t (B, E) and their identity logits (B, persons) each."""
        v, t = self.image_features(images, drop_noise), self.text_features(text, lengths)
        return v, t, self.classifier(v), self.classifier(t)


def build_model(cfg, train_split, device):
    """→ (model, text side, what the file says of it, a sentence). With weights=, all settings come from that file."""
    own = ("token", "project", "text", "max_tokens")
    m, loaded = use_meta(cfg, "finetune_t2i.py", "vocabulary", *own)
    start, pose_token = (None, cfg.pose_token) if m else (cfg.encoder, cfg.encoder is None or reads_pose(cfg.token))
    encoder, size, sentence = load_encoder(
        start, (cfg.height, cfg.width), cfg.size, cfg.patch, pose_token, cfg.drop_path,
        checkpoint_activations=cfg.checkpoint_activations,
    )  # fmt: skip
    if cfg.text == "bert":
        text = Bert(cfg.bert, device)
        if m and text.width != int(m["bert_width"]):
            raise UserError(
                f"{cfg.weights} was trained with a BERT {m['bert_width']} wide; bert={cfg.bert} is {text.width}"
            )
    else:
        text = Words(json.loads(m["vocabulary"])) if m else Words.of(train_split.texts, cfg.min_count)
    words = len(text) if cfg.text == "words" else None
    persons = int(m["persons"]) if m else train_split.persons
    model = TextToImage(encoder, cfg.token, cfg.project, persons, words, text.width or WORD_WIDTH)
    if m:
        load_weights(model, load_checkpoint(cfg.weights), cfg.weights)
    meta = meta_of(encoder, size) | dict(
        token=cfg.token, project=cfg.project, persons=persons, text=cfg.text, max_tokens=cfg.max_tokens,
        bert_width=text.width or 0, vocabulary=json.dumps(text.words if words else []),
    )  # fmt: skip
    about = f"{words} words" if words else f"frozen {cfg.bert}"
    return model, text, meta, f"{loaded if m else sentence}; text: {about}"


# -------------------------------------------------------------------------------------------------------- training


def train(cfg, model, text, optimizer, split, batches, first, total, log, rank, world, device):
    """The loop. Nothing in a step waits for the device: its figures are read while the next step runs."""
    dataset = Pairs(split, text, cfg)
    loader = training_loader(dataset, batches.run(first, total), cfg.workers, device, collate_fn=Pairs.collate)
    runner, figures = distributed(model.train(), device), None
    warmup = round(cfg.warmup_epochs * batches.steps_per_epoch)
    milestones = [m * batches.steps_per_epoch for m in cfg.milestones]
    for step, (images, tokens, lengths, person, index) in enumerate(loader, first):
        lr = learning_rate(step, total, warmup, cfg.lr, kind="step", milestones=milestones)
        set_learning_rate(optimizer, lr)
        images = normalize(images.to(device, non_blocking=True))
        tokens, person = tokens.to(device, non_blocking=True), person.to(device, non_blocking=True)
        lengths = lengths.to(device, non_blocking=True)
        # which negative is taken: (2, B, M)
        noise = rank_noise((NEGATIVE, cfg.seed, step), cfg.batch, 2 * cfg.batch, rank, world, device)
        noise = noise.unflatten(1, (2, cfg.batch)).transpose(0, 1)
        branches = 2 * model.encoder.depth
        drop = rank_noise((DROP_PATH, cfg.seed, step), cfg.batch, branches, rank, world, device)
        drop = drop.T if cfg.drop_path else None
        vectors = text.vectors(tokens, lengths)
        with autocast(device, cfg.precision):
            v, t, v_logits, t_logits = runner(images, vectors, lengths, drop)
        # L = CE(picture) + CE(text) + L_rank
        identity = F.cross_entropy(v_logits.float(), person) + F.cross_entropy(t_logits.float(), person)
        rank_loss, found = ranking_loss(v, t, person, noise, cfg.margin)
        loss = identity + rank_loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        settle(figures, log, dataset.name, cfg.batch, cfg.log_every, SHOWN)  # the step before this one
        values = dict(loss=loss, identity=identity, rank_loss=rank_loss, with_negative=found, grad_norm=norm)
        figures = Figures(step, lr, values, index, ~(v + t).detach().float().sum(1).isfinite())
        if step + 1 == total or (step + 1) % cfg.save_every == 0:
            settle(figures, log, dataset.name, cfg.batch, cfg.log_every, SHOWN)  # never save a broken model
            figures = None
            if rank == 0:
                state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
                save_checkpoint(Path(cfg.out) / "last.pt", **state)
        log.advance()


# ------------------------------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def embed_pictures(cfg, model, files, rank, world, device):
    """(N, E) float32 of length 1 on every rank. Ranks take parts of the list; no picture is taken twice."""
    model.eval()
    own, parts = rank_share(len(files), rank, world), []
    gallery = Gallery([files[i] for i in own], (cfg.height, cfg.width))
    for images in DataLoader(gallery, cfg.batch, num_workers=cfg.workers):
        with autocast(device, cfg.precision):
            v = model.image_features(normalize(images.to(device)))
        parts.append(F.normalize(v.float(), dim=1).cpu().numpy())
    return np.concatenate(gather_rows(parts, world))


@torch.no_grad()
def embed_texts(cfg, model, text, sentences, rank, world, device):
    """(C, E) float32 of length 1 on every rank, shared like the pictures."""
    model.eval()
    own, parts = rank_share(len(sentences), rank, world), []
    for begin in range(0, len(own), cfg.batch):
        rows = [text.tokens(sentences[i], cfg.max_tokens) for i in own[begin : begin + cfg.batch]]
        tokens, lengths = (x.to(device) for x in pad_tokens(rows))
        t = model.text_features(text.vectors(tokens, lengths), lengths)
        parts.append(F.normalize(t, dim=1).cpu().numpy())
    return np.concatenate(gather_rows(parts, world))


def finish(cfg, model, text, split, log, step, rank, world, device):
    """Figures, pictures, and the mark that the run is done. Rank 0 ranks; all ranks make the features."""
    v = embed_pictures(cfg, model, split.files, rank, world, device)
    t = embed_texts(cfg, model, text, split.texts, rank, world, device)
    if rank:
        return
    out, text_ids = Path(cfg.out), split.ids[split.picture]
    result = retrieval_metrics(v, t, split.ids, text_ids)
    ap = result.pop("ap")
    summary = {"split": cfg.evaluate_on, "pictures": len(v), "captions": len(t), "persons": split.persons} | result
    write_json(out / "metrics.json", summary)
    log.write(step=step, epoch=cfg.epochs if step else 0, **result)
    # the captions of best, median and worst average precision, two each
    order, rows, labels = np.argsort(-ap, kind="stable"), [], []
    order = order[np.sort(np.unique(np.array(split.texts)[order], return_index=True)[1])]  # each sentence once
    n = len(order)
    for place in sorted({p for p in (0, 1, n // 2 - 1, n // 2, n - 2, n - 1) if p >= 0}):
        c = order[place]
        near = np.argsort(-(v @ t[c]), kind="stable")[:10]
        answers = [(load_picture("", split.files[i]), split.ids[i] == text_ids[c]) for i in near]
        rows.append((load_picture("", split.files[split.picture[c]]), answers))
        labels.append(f"{split.texts[c]}\n(AP {ap[c]:.2f}, {place + 1} of {n})")
    title = f"Best, median and worst captions: R@1 {result['t2i_R1']:.3f}, mAP {result['t2i_mAP']:.3f}"
    sheets.caption_sheet(rows, labels, out / "ranking.png", title)
    (out / "done").touch()
    print(f"{cfg.out}: " + "  ".join(f"{name} {value:.4f}" for name, value in result.items()))


def predict(cfg, rank, world, device):
    """The pictures of a folder, best first for a sentence → ranking.json and ranking.png (the ten best)."""
    folder, names = pictures_at(cfg.predict)
    refuse_bad_pictures(folder, as_bytes(folder, names))
    model, text, _, sentence = build_model(cfg, None, device)
    if open_run(cfg, KEYS, rank) == "finished":
        return
    if rank == 0:
        print(sentence, file=sys.stderr)
    files, model = [str(Path(folder) / name) for name in names], model.to(device)
    v = embed_pictures(cfg, model, files, rank, world, device)
    t = embed_texts(cfg, model, text, [cfg.sentence], 0, 1, device)
    if rank == 0:
        out, score = Path(cfg.out), v @ t[0]
        order = np.argsort(-score, kind="stable")
        rows = [{"image": str(names[i]), "cosine": round(float(score[i]), 5)} for i in order]
        write_json(out / "ranking.json", {"sentence": cfg.sentence, "ranking": rows})
        answers = [(load_picture("", files[i]), None) for i in order[:10]]
        title = "Best guesses for a sentence"
        sheets.caption_sheet([(None, answers)], [cfg.sentence], out / "ranking.png", title)
        (out / "done").touch()
        print(f"wrote {out}/ranking.json ({len(rows)} pictures, best {rows[0]['image']}), ranking.png")
    barrier()


if __name__ == "__main__":
    run_stage(main)
