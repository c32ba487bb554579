"""Stage 3d: text-to-image person ReID: find a person by a sentence  [HAP's simple baseline, after LGUR]

Inputs   CUHK-PEDES, ICFG-PEDES or RSTPReid JSON with pictures, as downloaded; an encoder of pretrain.py.
Outputs  in `out`: metrics.json (R@1, R@5, R@10, mAP, text → image and image → text), ranking.png (captions and their
         ten best pictures), model.safetensors, encoder.safetensors, last.pt, log.jsonl.

  python finetune_t2i.py --cfg configs/finetune_t2i_demo.yaml
  torchrun --nproc_per_node=2 finetune_t2i.py --cfg configs/finetune_t2i_cuhk.yaml encoder=ENCODER
  python finetune_t2i.py --cfg configs/finetune_t2i_demo.yaml weights=runs/demo/t2i_run/model.safetensors \\
         predict=FOLDER sentence="a woman in a red coat" out=OUT

Picture: ViT patch tokens, max over patches. Text: frozen BERT (or learned word vectors, nothing to download) → BiLSTM,
max over words. One projection and one identity classifier for both:  L = CE(picture) + CE(text) + L_rank.
Legend: B pairs on this rank · M pairs of all ranks · D width · T tokens · v, t (B, E) features of picture and text.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

import pictures
from captions import Bert, Words, pad_tokens, read_captions
from common import (
    Key,
    Log,
    UserError,
    autocast,
    barrier,
    gather_rows,
    generator_of,
    learning_rate,
    load_checkpoint,
    load_weights,
    open_run,
    rank_rows,
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
from losses import full_precision, gather_rows_of, gather_with_gradient, no_autocast
from model import SIZES, TOKENS, encoder_meta, load_encoder, token_features
from reid import evaluate_features, picture_names

KEYS = dict(
    out=Key("runs/t2i", "run folder"),
    # data
    captions=Key(None, "reid_raw.json (CUHK-PEDES), ICFG-PEDES.json or data_captions.json (RSTPReid)"),
    images=Key(None, "picture folder (default: imgs or images beside the JSON)"),
    evaluate_on=Key("test", "split that is evaluated, once, after the last epoch", choices=("test", "val")),
    height=Key(384, "input height", "[HAP]", low=16),
    width=Key(128, "input width", "[HAP]", low=16),
    flip=Key(0.5, "probability of a mirrored training picture", "[silent]", low=0, high=1),
    # model
    encoder=Key(None, "encoder.safetensors of pretrain.py, or MAE, HAP, timm, torchvision weights; none = scratch"),
    weights=Key(None, "model.safetensors of a finished run, for eval_only and predict"),
    size=Key("base", "encoder size, where encoder= does not know it itself", "[HAP]", tuple(SIZES)),
    patch=Key(16, "patch side in pixels, where encoder= does not know it itself", "[MAE]", low=1),
    token=Key("patch_max", "what stands for a picture", "[HAP]", TOKENS),
    text=Key("words", "words: learned vocabulary of the training captions; bert: frozen BERT [HAP]", "ours",
             ("words", "bert")),
    bert=Key("google-bert/bert-base-uncased", "hub id, or a folder written by save_pretrained", "[HAP]"),
    min_count=Key(2, "text=words: a word must occur this often; rarer ones teach `unknown`", "[silent]", low=1),
    max_tokens=Key(100, "longer sentences are cut", "[HAP]", low=1),
    project=Key(384, "E, width of the shared space", "[HAP]", low=1),
    # optimiser
    epochs=Key(60, "passes over the training captions", "[HAP]", low=1),
    batch=Key(64, "caption and picture pairs in a global batch", "[HAP]", low=2),
    lr_encoder=Key(1.0e-4, "Adam, encoder", "[HAP]", low=0),
    lr=Key(1.0e-3, "Adam, everything else", "[HAP]", low=1e-9),
    milestones=Key([20, 40, 50], "epochs after which the rates fall to a tenth", "[HAP]", of=int, low=0),
    warmup_epochs=Key(0.0, "linear warm-up", "[silent]", low=0),
    margin=Key(0.2, "of L_rank, in cosine", "[HAP]", low=0),
    clip_grad=Key(0.0, "largest gradient norm; 0 = no clipping", "[silent]", low=0),
    seed=Key(0, "seed of everything", low=0),
    # what to do instead of training
    eval_only=Key(False, "only evaluate weights= on captions="),
    predict=Key(None, "only search: a folder of pictures, best first for sentence= → ranking.json, ranking.png"),
    sentence=Key(None, "what to look for, with predict="),
    # machine
    precision=Key("fp32", "fp32, or bf16 autocast (the text branch stays fp32)", choices=("fp32", "bf16")),
    checkpoint_activations=Key(False, "recompute activations: less memory, more time", free=True),
    device=Key("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"), free=True),
    workers=Key(2, "loader processes per rank", low=0, free=True),
    save_every=Key(500, "steps between checkpoints", low=1, free=True),
    log_every=Key(10, "steps between log lines", low=1, free=True),
)  # fmt: skip
WORD_WIDTH = 300  # paper silent (HAP uses BERT): usual width of word vectors


def main():
    cfg = read_config(KEYS, __doc__)
    rank, world, device = start_ranks(cfg.device)
    check(cfg, world)
    if cfg.predict:
        return predict(cfg, rank, world, device)
    splits = read_captions(cfg.captions, cfg.images)
    for name in {"train", cfg.evaluate_on} if not cfg.eval_only else {cfg.evaluate_on}:
        if splits[name] is None:
            raise UserError(f"{cfg.captions} has no {name} split")
    pairs = splits["train"] and len(splits["train"].texts)
    if not cfg.eval_only and pairs < cfg.batch:
        raise UserError(f"batch={cfg.batch} is larger than the {pairs} training captions; lower it")
    seed_all(cfg.seed)  # initial weights
    model, text, meta, sentence = build_model(cfg, splits["train"], device)
    state = open_run(cfg, KEYS, rank)
    if state == "finished":
        print(f"{cfg.out} is finished already: see {cfg.out}/metrics.json") if rank == 0 else None
        return
    model.to(device)
    total = 0 if cfg.eval_only else cfg.epochs * (pairs // cfg.batch)
    # lr_scale is relative to lr, so that one schedule moves both
    head = [p for name, p in model.named_parameters() if not name.startswith("encoder.")]
    encoder = {"params": model.encoder.parameters(), "lr_scale": cfg.lr_encoder / cfg.lr}
    optimizer = torch.optim.Adam([encoder, {"params": head}], lr=0.0)
    step = resume(cfg, model, optimizer) if total and state == "resume" else 0
    log = Log(cfg.out, total, step, rank, "text to image")
    counts = ", ".join(f"{len(s.texts)} captions of {len(s.files)} in {n}" for n, s in splits.items() if s)
    log.say(f"{counts}; {sentence}; {total} steps of {cfg.batch}")
    if total:
        train(cfg, model, text, optimizer, splits["train"], step, total, log, rank, world, device)
        if rank == 0:
            save_encoder(Path(cfg.out) / "model.safetensors", model, **meta)
            save_encoder(Path(cfg.out) / "encoder.safetensors", model.encoder, **meta)
    finish(cfg, model, text, splits[cfg.evaluate_on], log, total, rank, world, device)
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
    if bool(cfg.predict) != bool(cfg.sentence and cfg.sentence.strip()):
        raise UserError('predict=FOLDER and sentence="what to look for" need each other')
    if not cfg.predict and not cfg.captions:
        raise UserError("captions= names no file; give the JSON of CUHK-PEDES, ICFG-PEDES or RSTPReid")


# ------------------------------------------------------------------------------------------------------------ data


class Pairs(Dataset):
    """Item (epoch, caption index) → picture uint8 (3, H, W), token ids, person, index: f(seed, …)."""

    def __init__(self, split, text, cfg):
        self.split, self.tokens = split, [text.tokens(t, cfg.max_tokens) for t in split.texts]
        self.size, self.flip, self.seed = (cfg.height, cfg.width), cfg.flip, cfg.seed

    def __getitem__(self, item):
        epoch, index = item
        seed_all(self.seed, epoch, index)
        row = int(self.split.picture[index])
        picture = picture_of(self.split.files[row], self.size, torch.rand(()) < self.flip)
        return picture, self.tokens[index], int(self.split.ids[row]), index

    @staticmethod
    def collate(items):
        images, tokens, persons, index = zip(*items)
        return (torch.stack(images), *pad_tokens(tokens), torch.tensor(persons), list(index))


class Gallery(Dataset):
    """Item row → picture uint8 (3, H, W)."""

    def __init__(self, files, size):
        self.files, self.size = files, size

    def __len__(self):
        return len(self.files)

    def __getitem__(self, row):
        return picture_of(self.files[row], self.size)


def picture_of(file, size, mirror=False):
    picture = load_picture("", file).resize(size[::-1], Image.Resampling.BICUBIC)
    picture = ImageOps.mirror(picture) if mirror else picture
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


# ----------------------------------------------------------------------------------------------------------- model


class TextToImage(nn.Module):
    """Two branches that meet in one projection.

    words: size of the vocabulary, learned here, or None: the text arrives as vectors of frozen BERT, `width` wide.
    """

    def __init__(self, encoder, token, project, persons, words=None, width=WORD_WIDTH):
        super().__init__()
        self.encoder, self.token = encoder, token
        D = encoder.width * (2 if token == "both" else 1)
        self.embedding = nn.Embedding(words, width, padding_idx=0) if words else None
        self.lstm = nn.LSTM(width, D // 2, batch_first=True, bidirectional=True)  # two halves make D
        self.projection = nn.Linear(D, project)  # shared by both branches [HAP]
        self.classifier = nn.Linear(project, persons)  # shared by both branches [HAP]

    def image_features(self, images):
        """(B, 3, H, W) normalised → (B, E)."""
        return self.projection(token_features(self.encoder(images), self.encoder.n_special, self.token))

    def text_features(self, text, lengths):
        """Token ids (B, T), or BERT's states (B, T, U), and lengths (B,) on the CPU → (B, E), in float32."""
        with no_autocast(self.projection.weight):
            x = text if self.embedding is None else self.embedding(text)
            # Packed: the backward LSTM starts at a sentence's last word, and padding never wins the maximum.
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            states, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], True, padding_value=-torch.inf)
            return self.projection(states.amax(1))

    def forward(self, images, text, lengths):
        """→ v, t (B, E) and their identity logits (B, persons) each."""
        v, t = self.image_features(images), self.text_features(text, lengths)
        return v, t, self.classifier(v), self.classifier(t)


def build_model(cfg, train_split, device):
    """→ (model, text side, what the file says of it, a sentence). With weights=, all settings come from that file."""
    m = {}
    if cfg.weights:
        m = encoder_meta(cfg.weights)
        if "vocabulary" not in m:
            raise UserError(f"{cfg.weights} is no model.safetensors of finetune_t2i.py")
        cfg.height, cfg.width, cfg.project = int(m["height"]), int(m["width_px"]), int(m["project"])
        cfg.size, cfg.patch, cfg.token = m["size"], int(m["patch_size"]), m["token"]
        cfg.text, cfg.max_tokens = m["text"], int(m["max_tokens"])
    pose_token = m.get("pose_token", "True") == "True"
    encoder, size, sentence = load_encoder(
        None if m else cfg.encoder, (cfg.height, cfg.width), cfg.size, cfg.patch, pose_token,
        checkpoint_activations=cfg.checkpoint_activations,
    )  # fmt: skip
    if cfg.token in ("pose", "both") and encoder.n_special < 2:
        raise UserError(f"token={cfg.token} needs an encoder with [POSE]; use token=patch_max or cls")
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
    meta = dict(
        size=size, width=encoder.width, depth=encoder.depth, heads=SIZES[size]["heads"], height=cfg.height,
        width_px=cfg.width, patch_size=encoder.patch_size, pose_token=encoder.n_special == 2, token=cfg.token,
        project=cfg.project, persons=persons, text=cfg.text, max_tokens=cfg.max_tokens, bert_width=text.width or 0,
        vocabulary=json.dumps(text.words if words else []),
    )  # fmt: skip
    about = f"{words} words" if words else f"frozen {cfg.bert}"
    return model, text, meta, f"{f'model {cfg.weights}' if m else sentence}; text: {about}"


# ---------------------------------------------------------------------------------------------------------- losses


def ranking_loss(v, t, person, noise, margin=0.2):
    """L_rank: each picture against one random semi-hard text, and each text against one random semi-hard picture [HAP].

    v, t (B, E) features (normalised here), row i of both one pair; person (B,) int64; noise (2, B, M) uniform numbers,
    this rank's rows of the draw for the global batch. Columns are the pairs of all ranks, with gradient.
    Semi-hard for anchor i: another person's j, less alike than the own partner, but within the margin:
    s_ii − margin < s_ij < s_ii. Anchors without one count 0.
    → (scalar: this rank's share of the mean over all anchors, share of anchors with a negative).
    """
    with no_autocast(v):
        v, t = (F.normalize(x, dim=1) for x in full_precision(v, t))
        other = person[:, None] != gather_rows_of(person)  # (B, M)
        own = (v * t).sum(1, keepdim=True)  # s_ii (B, 1)
        loss, found = 0.0, 0.0
        for similarity, u in ((v @ gather_with_gradient(t).T, noise[0]), (t @ gather_with_gradient(v).T, noise[1])):
            excess = similarity - own + margin  # (B, M)
            semi_hard = other & (excess > 0) & (similarity < own)
            pick = u.masked_fill(~semi_hard, -1.0).argmax(1, keepdim=True)  # one of them, each equally likely
            has = semi_hard.gather(1, pick)
            # L_rank = 1/M Σ_i [ [margin − s(v_i, t_i) + s(v_i, t_j)]_+ + [margin − s(t_i, v_i) + s(t_i, v_k)]_+ ]
            loss = loss + (excess.gather(1, pick) * has).mean()
            found = found + has.float().mean() / 2
        return loss, found


# -------------------------------------------------------------------------------------------------------- training


def train(cfg, model, text, optimizer, split, first, total, log, rank, world, device):
    """The loop. A step's figures are read while the next step runs."""
    per_epoch, dataset = len(split.texts) // cfg.batch, Pairs(split, text, cfg)
    loader = DataLoader(
        dataset, batch_sampler=EpochBatches(len(split.texts), cfg.batch, cfg.seed, first, total, rank, world),
        num_workers=cfg.workers, pin_memory=device.type == "cuda", collate_fn=Pairs.collate,
    )  # fmt: skip
    runner, figures = model.train(), None
    if world > 1:
        ids = [device.index] if device.type == "cuda" else None
        runner = DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)
    milestones = [m * per_epoch for m in cfg.milestones]
    for step, (images, tokens, lengths, person, index) in enumerate(loader, first):
        lr = learning_rate(
            step, total, round(cfg.warmup_epochs * per_epoch), cfg.lr, kind="step", milestones=milestones
        )
        set_learning_rate(optimizer, lr)
        images = normalize(images.to(device, non_blocking=True))
        tokens, person = tokens.to(device, non_blocking=True), person.to(device, non_blocking=True)
        # Which negative is taken is drawn for the global batch, so that the number of ranks changes nothing.
        noise = torch.rand(cfg.batch, 2, cfg.batch, generator=generator_of(cfg.seed, step))
        noise = rank_rows(noise, rank, world).transpose(0, 1).to(device, non_blocking=True)
        vectors = text.vectors(tokens, lengths)
        with autocast(device, cfg.precision):
            v, t, v_logits, t_logits = runner(images, vectors, lengths)
        # L = CE(picture) + CE(text) + L_rank
        identity = F.cross_entropy(v_logits.float(), person) + F.cross_entropy(t_logits.float(), person)
        rank_loss, found = ranking_loss(v, t, person, noise, cfg.margin)
        loss = identity + rank_loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        settle(figures, dataset, cfg, log)  # the step before this one
        figures = Figures(step, lr, (loss, identity, rank_loss, found, norm), v + t, index)
        if step + 1 == total or (step + 1) % cfg.save_every == 0:
            settle(figures, dataset, cfg, log)  # never save after a non-finite loss
            figures = None
            if rank == 0:
                state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
                save_checkpoint(Path(cfg.out) / "last.pt", **state)
        log.advance()


class Figures:
    """One step's figures of all ranks, on their way to the host while the device goes on."""

    NAMES = ("loss", "identity", "rank_loss", "with_negative", "grad_norm")

    def __init__(self, step, lr, values, features, index):
        self.step, self.lr, self.index = step, lr, index
        own = torch.stack([value.detach().float() for value in values])
        self.ranks = gather_rows_of(own[None]).to("cpu", non_blocking=True)
        self.finite = features.detach().float().sum(1).isfinite().to("cpu", non_blocking=True)
        self.copied = torch.cuda.Event() if own.is_cuda else None
        if self.copied:
            self.copied.record()


def settle(figures, dataset, cfg, log):
    """Check a step's figures and log them. A non-finite loss stops all ranks; the last checkpoint stays."""
    if figures is None:
        return
    if figures.copied:
        figures.copied.synchronize()
    finite = figures.ranks.isfinite().all(1)
    if not finite.all():
        bad = (~figures.finite).nonzero().flatten().tolist() or range(len(figures.index))
        names = [dataset.split.files[dataset.split.picture[figures.index[i]]] for i in bad]
        raise UserError(
            f"non-finite loss or gradient at step {figures.step} on rank(s) {(~finite).nonzero().flatten().tolist()}; "
            f"this rank's pictures: {', '.join(names[:8])}; the last checkpoint stays; lower lr and lr_encoder"
        )
    if figures.step % cfg.log_every == 0:
        row = dict(zip(Figures.NAMES, figures.ranks.mean(0).tolist()))
        row["pairs_per_s"] = log.rate(figures.step + 1, cfg.batch)
        log.write(step=figures.step + 1, lr=figures.lr, **row, shown=("loss", "identity", "rank_loss", "pairs_per_s"))


def resume(cfg, model, optimizer):
    """Load last.pt. → steps done (0 if the run was killed before its first checkpoint)."""
    path = Path(cfg.out) / "last.pt"
    if not path.exists():
        return 0
    state = load_checkpoint(path)
    if not {"model", "optimizer", "step"} <= set(state):
        raise UserError(f"{path} is not a checkpoint of finetune_t2i.py; delete it to start this run anew")
    load_weights(model, state["model"], path)
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


# ------------------------------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def embed_pictures(cfg, model, files, rank, world, device):
    """(N, E) float32 of length 1 on every rank. Ranks take parts of the list; no picture is taken twice."""
    model.eval()
    own = np.array_split(np.arange(len(files)), world)[rank]
    parts = [np.empty((0, model.projection.out_features), np.float32)]
    gallery = Gallery([files[i] for i in own], (cfg.height, cfg.width))
    for images in DataLoader(gallery, cfg.batch, num_workers=cfg.workers):
        with autocast(device, cfg.precision):
            v = model.image_features(normalize(images.to(device)))
        parts.append(F.normalize(v.float(), dim=1).cpu().numpy())
    return np.concatenate(gather_rows([np.concatenate(parts)], world))


@torch.no_grad()
def embed_texts(cfg, model, text, sentences, rank, world, device):
    """(C, E) float32 of length 1 on every rank, shared like the pictures."""
    model.eval()
    own = np.array_split(np.arange(len(sentences)), world)[rank]
    parts = [np.empty((0, model.projection.out_features), np.float32)]
    for begin in range(0, len(own), cfg.batch):
        rows = [text.tokens(sentences[i], cfg.max_tokens) for i in own[begin : begin + cfg.batch]]
        tokens, lengths = pad_tokens(rows)
        t = model.text_features(text.vectors(tokens.to(device), lengths), lengths)
        parts.append(F.normalize(t, dim=1).cpu().numpy())
    return np.concatenate(gather_rows([np.concatenate(parts)], world))


def retrieval_metrics(v, t, image_ids, text_ids):
    """R@1, R@5, R@10 and mAP both ways; an answer is right if it is of the same person.

    v (N, E), t (C, E) float32 of length 1; ids (N,), (C,) whole numbers. → dict of fractions `t2i_R1` … `i2t_mAP`, and
    "ap" (C,), the average precision of each caption. ReID's ranking does the counting; there are no cameras here.
    """
    both = np.concatenate([image_ids, text_ids])
    dense = np.unique(both, return_inverse=True)[1].reshape(-1) + 1  # ReID gives 0 and −1 a meaning of their own
    image_ids, text_ids = dense[: len(image_ids)], dense[len(image_ids) :]
    sides = {"t2i": (t, text_ids, v, image_ids), "i2t": (v, image_ids, t, text_ids)}
    out = {}
    for name, (query, query_ids, found, found_ids) in sides.items():
        cameras = np.zeros(len(query_ids), int), np.ones(len(found_ids), int)
        result = evaluate_features(query, query_ids, cameras[0], found, found_ids, cameras[1])
        out |= {f"{name}_R{k}": float(result["cmc"][min(k, len(found)) - 1]) for k in (1, 5, 10)}
        out[f"{name}_mAP"] = result["mAP"]
        out.setdefault("ap", result["ap"])
    return out


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
    write_atomic(out / "metrics.json", lambda part: part.write_text(json.dumps(summary, indent=1) + "\n"))
    log.write(step=step, epoch=cfg.epochs if step else 0, **result)
    # the captions of best, median and worst average precision, two each
    order, rows, labels = np.argsort(-ap, kind="stable"), [], []
    for place in sorted({p for p in (0, 1, len(ap) // 2 - 1, len(ap) // 2, len(ap) - 2, len(ap) - 1) if p >= 0}):
        c = order[place]
        near = np.argsort(-(v @ t[c]), kind="stable")[:10]
        answers = [(load_picture("", split.files[i]), split.ids[i] == text_ids[c]) for i in near]
        rows.append((load_picture("", split.files[split.picture[c]]), answers))
        labels.append(f"{split.texts[c]}\n(AP {ap[c]:.2f}, {place + 1} of {len(ap)})")
    title = f"Best, median and worst captions: R@1 {result['t2i_R1']:.3f}, mAP {result['t2i_mAP']:.3f}"
    pictures.caption_sheet(rows, labels, out / "ranking.png", title)
    (out / "done").touch()
    print(f"{cfg.out}: " + "  ".join(f"{name} {value:.4f}" for name, value in result.items()))


def predict(cfg, rank, world, device):
    """The pictures of a folder, best first for a sentence → ranking.json and ranking.png (the ten best)."""
    names = picture_names(cfg.predict, below=True)
    model, text, _, _ = build_model(cfg, None, device)
    if open_run(cfg, KEYS, rank) == "finished":
        print(f"{cfg.out} is finished already: see {cfg.out}/ranking.json") if rank == 0 else None
        return
    files, model = [str(Path(cfg.predict) / name) for name in names], model.to(device)
    v = embed_pictures(cfg, model, files, rank, world, device)
    t = embed_texts(cfg, model, text, [cfg.sentence], 0, 1, device)
    if rank == 0:
        out, score = Path(cfg.out), v @ t[0]
        order = np.argsort(-score, kind="stable")
        rows = [{"image": str(names[i]), "cosine": round(float(score[i]), 5)} for i in order]
        document = {"sentence": cfg.sentence, "ranking": rows}
        write_atomic(out / "ranking.json", lambda part: part.write_text(json.dumps(document, indent=1) + "\n"))
        answers = [(load_picture("", files[i]), None) for i in order[:10]]
        pictures.caption_sheet([(None, answers)], [cfg.sentence], out / "ranking.png", "Best pictures for a sentence")
        (out / "done").touch()
        print(f"wrote {out}/ranking.json ({len(rows)} pictures, best {rows[0]['image']}), ranking.png")
    barrier()


if __name__ == "__main__":
    run_stage(main)
