"""Stage 3d: text-to-image person ReID. Find a person by a sentence.   [HAP's baseline, after LGUR]

    L = CE(picture) + CE(text) + L_rank

Inputs   CUHK-PEDES, ICFG-PEDES or RSTPReid JSON with pictures, as downloaded; an encoder of
         pretrain.py, published ViT weights, or none.
Outputs  in `out`: metrics.json (R@1, R@5, R@10, mAP, text → image and image → text), ranking.png
         (captions and their ten best pictures), model.safetensors, encoder.safetensors
         (fine-tuned), last.pt (everything to resume), log.jsonl, curves.png, config.yaml.

  python finetune_t2i.py --cfg configs/finetune_t2i_demo.yaml                        # laptop
  torchrun --nproc_per_node=1 finetune_t2i.py --cfg configs/finetune_t2i_cuhk.yaml \\
         encoder=ENCODER captions=CUHK-PEDES/reid_raw.json images=CUHK-PEDES/imgs    # GPUs
  python finetune_t2i.py weights=runs/demo/t2i_pretrained/model.safetensors \\
         predict=FOLDER sentence="a woman in a red coat" out=OUT

Picture: ViT patch tokens, maximum over the patches. Text: frozen BERT (or learned word vectors,
nothing to download) → BiLSTM, maximum over the words. Both share one projection and one identity
classifier. The last epoch is reported; HAP's code reports its best one on the test set. HAP's
scheduler steps before the first epoch, so its rates fall one epoch before the milestones; ours fall
at them. HAP ViT-B: CUHK-PEDES 68.05 R@1, ICFG-PEDES 61.80, RSTPReid 49.35.
Legend: B pairs on this rank · M pairs of all ranks · D width · T tokens · v, t (B, E) features of
picture and text.
"""

import common  # first: Ctrl-C while the libraries load

# isort: split
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset

from common import UserError
from drawing import results as sheets
from formats.captions import read_bert, read_captions
from formats.market import read_pictures
from formats.weights import ENCODER, build_encoder, meta_of, take_settings
from model import normalize
from plumbing.config import JOB, MACHINE, Key, check_job, read_config
from tasks.features import READ_POSE, TOKENS, ResizedPictures, feature_width, token_features
from tasks.text import Bert, Pairs, Words, not_learned, pad_tokens, ranking_loss, retrieval_metrics

KEYS = dict(
    out=Key("runs/t2i", "run folder; for eval_only runs/t2i_eval, for predict runs/t2i_predict"),
    # data
    captions=Key(None, "JSON of CUHK-PEDES, ICFG-PEDES or RSTPReid, as downloaded"),
    images=Key(None, "picture folder (default: imgs or images beside the JSON)"),
    evaluate_on=Key("test", "split that is evaluated, once, after the last epoch",
                    choices=("test", "val")),
    height=Key(384, "input height", "[HAP]", low=16),
    width=Key(128, "input width", "[HAP]", low=16),
    leave_out=Key([], "ids of people not to train on", "[HAP]: three of CUHK-PEDES", of=int),
    trainval=Key(False, "train on training + validation pictures", "[HAP] does on RSTPReid"),
    pad=Key(10, "black border in pixels before the random crop", "[HAP]", low=0),
    flip=Key(0.5, "probability of a mirrored training picture", "[HAP]", low=0, high=1),
    # model
    token=Key("patch_max", "what stands for a picture", "[HAP]", TOKENS),
    text=Key("words", "words: vocabulary of the training captions; bert: frozen BERT [HAP]",
             "ours", ("words", "bert")),
    bert=Key("google-bert/bert-base-uncased", "hub id, or a folder of save_pretrained", "[HAP]"),
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
    milestones=Key([20, 40, 50], "epochs after which the rates fall to a tenth", "[HAP]",
                   of=int, low=0),
    warmup_epochs=Key(0.0, "linear warm-up", "[HAP]: none", low=0),
    margin=Key(0.2, "of L_rank, in cosine", "[HAP]", low=0),
    clip_grad=Key(0.0, "largest gradient norm; 0 = no clipping", "[HAP]: none", low=0),
    # instead of training
    sentence=Key(None, "what to look for, with predict="),
) | JOB | ENCODER | MACHINE  # fmt: skip
WORD_WIDTH = 300  # ours, of text=words: the usual width of word vectors


def main():
    cfg = read_config(KEYS, __doc__)
    ranks = common.start_ranks(cfg.device, cfg.precision)
    check(cfg)
    if cfg.predict:
        return predict(cfg, ranks)
    if cfg.eval_only:
        return evaluate_only(cfg, ranks)
    splits = read_splits(cfg, "train", cfg.evaluate_on)
    split, test = splits["train"], splits[cfg.evaluate_on]
    batches = common.EpochBatches(len(split.texts), cfg.batch, cfg.seed, ranks)
    common.seed_all(common.WEIGHTS, cfg.seed)
    model, text, meta, about = build_model(cfg, split, ranks.device)
    common.check_memory(model, cfg.batch // ranks.world, ranks.device)
    tokens = [text.tokens(sentence, cfg.max_tokens) for sentence in split.texts]
    size = cfg.height, cfg.width
    dataset = Pairs(split, tokens, size, cfg.pad, cfg.flip, cfg.seed)
    if common.open_run(cfg, KEYS, ranks) == "finished":
        return
    model.to(ranks.device)
    # lr_scale is relative to lr, so that one schedule moves both.
    head = [p for name, p in model.named_parameters() if not name.startswith("encoder.")]
    encoder = {"params": model.encoder.parameters(), "lr_scale": cfg.lr_encoder / cfg.lr}
    optimizer = torch.optim.Adam([encoder, {"params": head}], lr=0.0, fused=True)
    out, epoch = Path(cfg.out), batches.steps_per_epoch
    first = common.resume(out / "last.pt", model, optimizer)["step"]
    total, warmup = cfg.epochs * epoch, round(cfg.warmup_epochs * epoch)
    milestones = [m * epoch for m in cfg.milestones]
    log = common.StepLog(cfg, ranks, dataset, batches, first, total)
    known = [(n, len(s.texts), len(s.files)) for n, s in splits.items() if s]
    counts = [f"{n}: {texts} captions, {files} pictures" for n, texts, files in known]
    log.say(f"{', '.join(counts)}; {about}; {total} steps of {cfg.batch}")
    steps = batches.steps(first, total)
    loader = common.training_loader(
        dataset, steps, cfg.workers, ranks.device, collate_fn=Pairs.collate
    )
    runner = common.distributed(model.train(), ranks.device)

    # Nothing in a step waits for the device: its figures are read while the next step runs.
    for step, (images, tokens, lengths, person, index) in enumerate(loader, first):
        lr = common.stepwise_rate(step, warmup, cfg.lr, milestones)
        common.set_learning_rate(optimizer, lr)
        images = normalize(images.to(ranks.device, non_blocking=True))
        tokens = tokens.to(ranks.device, non_blocking=True)
        lengths = lengths.to(ranks.device, non_blocking=True)
        person = person.to(ranks.device, non_blocking=True)
        drop, noise = draw_noise(cfg, model.encoder.depth, step, ranks)
        vectors = text.vectors(tokens, lengths)  # BERT's, without gradient; words stay ids
        with common.autocast(ranks.device, cfg.precision):
            v, t, v_logits, t_logits = runner(images, vectors, lengths, drop)
        # L = CE(picture) + CE(text) + L_rank, in float32
        identity = F.cross_entropy(v_logits.float(), person)
        identity = identity + F.cross_entropy(t_logits.float(), person)
        rank_loss, found = ranking_loss(v, t, person, noise, cfg.margin)
        loss = identity + rank_loss
        loss.backward()
        largest = cfg.clip_grad or float("inf")
        norm = nn.utils.clip_grad_norm_(model.parameters(), largest)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        values = dict(loss=loss, identity=identity, rank_loss=rank_loss)
        values |= dict(grad_norm=norm, with_negative=found)
        bad = ~(v + t).detach().float().sum(1).isfinite()
        log.record(step, lr, values, index, bad)
        if log.saves(step):
            log.flush()  # never save a broken model
            if ranks.rank == 0:
                state = dict(model=model.state_dict(), optimizer=optimizer.state_dict())
                common.save_checkpoint(out / "last.pt", **state, step=step + 1)
            log.stop_if_asked(step)

    log.close()
    if ranks.rank == 0:
        common.save_weights(out / "model.safetensors", model, **meta)
        common.save_weights(out / "encoder.safetensors", model.encoder, **meta_of(model.encoder))
    figures = evaluate(cfg, model, text, test, ranks)
    log.write(step=total, final=True, **figures)
    if ranks.rank == 0:
        sheets.draw_curves([out], out / "curves.png")
        report(out, figures)
    common.barrier()


def draw_noise(cfg, depth, step, ranks):
    """This rank's uniform numbers of a step: drop path (2·depth, B) or None; negatives (2, B, M)"""
    drop = common.rank_noise((common.DROP_PATH, cfg.seed, step), cfg.batch, 2 * depth, ranks)
    noise = common.rank_noise((common.NEGATIVE, cfg.seed, step), cfg.batch, 2 * cfg.batch, ranks)
    noise = noise.unflatten(1, (2, cfg.batch)).transpose(0, 1)
    return drop.T if cfg.drop_path else None, noise


# -------------------------------------------------------------------------------------------- model


class TextToImage(nn.Module):
    """Two branches that meet in one projection [HAP].

    words: size of the vocabulary, learned here, or None: the text arrives as vectors of frozen
    BERT, `width` wide. The picture is read before the encoder's final norm, which stays as it was.
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
        with torch.autocast(text.device.type, enabled=False):
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
            best = states.masked_fill(~inside.unsqueeze(2), -torch.inf).amax(1)
            return self.projection(best)

    def forward(self, images, text, lengths, drop_noise=None):
        """→ v, t (B, E) and their identity logits (B, persons) each."""
        v, t = self.image_features(images, drop_noise), self.text_features(text, lengths)
        return v, t, self.classifier(v), self.classifier(t)


def build_model(cfg, split, device):
    """→ (model, text side, what its file will say of it, a sentence about it).

    split: to train on. With weights= all settings come from that file, and it may be None.
    """
    own = ("token", "project", "text", "max_tokens")
    m, about = take_settings(cfg, "finetune_t2i.py", "vocabulary", *own)
    encoder, sentence = build_encoder(cfg, cfg.token in READ_POSE, cfg.drop_path, 0.2)
    if cfg.text == "bert":
        if m and cfg.bert == KEYS["bert"].default:  # bert= wins: the folder may have moved
            cfg.bert = m.get("bert", cfg.bert)
        text, kind = Bert(*read_bert(cfg.bert), device), f"frozen {cfg.bert}"
        if m and text.width != int(m["bert_width"]):
            wide = f"a BERT {m['bert_width']} wide; bert={cfg.bert} is {text.width}"
            raise UserError(f"{cfg.weights} was trained with {wide}")
        words, width, vocabulary = None, text.width, []
    else:
        text = Words(json.loads(m["vocabulary"])) if m else Words.of(split.texts, cfg.min_count)
        words, width, vocabulary = len(text), WORD_WIDTH, text.words
        kind = f"{words} words"
    persons = int(m["persons"]) if m else split.persons
    model = TextToImage(encoder, cfg.token, cfg.project, persons, words, width)
    if m:
        common.load_weights(model, common.load_checkpoint(cfg.weights), cfg.weights)
    meta = {name: getattr(cfg, name) for name in own} | dict(persons=persons)
    meta |= dict(bert=cfg.bert, bert_width=text.width or 0, vocabulary=json.dumps(vocabulary))
    return model, text, meta_of(encoder) | meta, f"{about or sentence}; text: {kind}"


# --------------------------------------------------------------------------------------- evaluation


def evaluate_only(cfg, ranks):
    """The figures of a finished run's model."""
    split = read_splits(cfg, cfg.evaluate_on)[cfg.evaluate_on]
    model, text, _, about = build_model(cfg, None, ranks.device)
    if common.open_run(cfg, KEYS, ranks) == "finished":
        return
    if ranks.rank == 0:
        print(f"{len(split.texts)} captions, {len(split.files)} pictures; {about}", file=sys.stderr)
    figures = evaluate(cfg, model.to(ranks.device), text, split, ranks)
    if ranks.rank == 0:
        report(Path(cfg.out), figures)
    common.barrier()


def evaluate(cfg, model, text, split, ranks):
    """metrics.json, ranking.png. All ranks make features, rank 0 ranks them. → figures, or {}."""
    gallery = ResizedPictures(split, (cfg.height, cfg.width), range(len(split.files)))
    v = embed_pictures(cfg, model, gallery, ranks)
    t = embed_texts(cfg, model, text, split.texts, ranks)
    if ranks.rank:
        return {}
    out, text_ids = Path(cfg.out), split.ids[split.picture]
    result = retrieval_metrics(v, t, split.ids, text_ids)
    ap = result.pop("ap")
    about = dict(split=cfg.evaluate_on, pictures=len(v), captions=len(t), persons=split.persons)
    common.write_json(out / "metrics.json", about | result)
    # The captions of best, median and worst average precision, two each; each sentence once.
    order = np.argsort(-ap, kind="stable")
    best = {split.texts[c]: c for c in order[::-1]}  # of equal sentences the first place stays
    order = [c for c in order if best[split.texts[c]] == c]
    n, rows, labels = len(order), [], []
    for place in sorted({0, 1, n // 2 - 1, n // 2, n - 2, n - 1} & set(range(n))):
        c = order[place]
        near = np.argsort(-(v @ t[c]), kind="stable")[:10]
        answers = [(gallery[i], split.ids[i] == text_ids[c]) for i in near]
        rows.append((gallery[split.picture[c]], answers))
        labels.append(f"{split.texts[c]}\n(AP {ap[c]:.2f}, {place + 1} of {n})")
    figures = f"R@1 {result['t2i_R1']:.3f}, mAP {result['t2i_mAP']:.3f}"
    title = f"Best, median and worst captions: {figures}"
    sheets.ranked_lists(rows, out / "ranking.png", labels, title, ("its picture", ""), 260)
    return result


def report(out, figures):
    """The mark that the run is finished, then its figures on stdout."""
    common.finish_run(out)
    print(f"{out}: " + "  ".join(f"{name} {value:.4f}" for name, value in figures.items()))


@torch.no_grad()
def embed_pictures(cfg, model, gallery, ranks):
    """(N, E) float32 of length 1 on every rank. Ranks share the list; no picture is taken twice."""
    model.eval()
    own, parts = Subset(gallery, common.rank_share(len(gallery), ranks)), []
    for images in DataLoader(own, cfg.batch, num_workers=cfg.workers):
        with common.autocast(ranks.device, cfg.precision):
            v = model.image_features(normalize(images.to(ranks.device)))
        parts.append(F.normalize(v.float(), dim=1).cpu().numpy())
    return np.concatenate(common.gather_objects(parts))


@torch.no_grad()
def embed_texts(cfg, model, text, sentences, ranks):
    """(C, E) float32 of length 1 on every rank, shared like the pictures."""
    model.eval()
    own, parts = common.rank_share(len(sentences), ranks), []
    for begin in range(0, len(own), cfg.batch):
        rows = [text.tokens(sentences[i], cfg.max_tokens) for i in own[begin : begin + cfg.batch]]
        tokens, lengths = (x.to(ranks.device) for x in pad_tokens(rows))
        t = model.text_features(text.vectors(tokens, lengths), lengths)
        parts.append(F.normalize(t, dim=1).cpu().numpy())
    return np.concatenate(common.gather_objects(parts))


def predict(cfg, ranks):
    """The pictures of a folder, best first for a sentence → ranking.json, ranking.png."""
    pictures = read_pictures(cfg.predict)
    model, text, _, about = build_model(cfg, None, ranks.device)
    if unread := ", ".join(not_learned(text, cfg.sentence)):
        unread = f"; not in the training captions, so not read: {unread}"
    if common.open_run(cfg, KEYS, ranks) == "finished":
        return
    if ranks.rank == 0:
        print(about + unread, file=sys.stderr)
    gallery = ResizedPictures(pictures, (cfg.height, cfg.width), range(len(pictures.files)))
    v = embed_pictures(cfg, model.to(ranks.device), gallery, ranks)
    t = embed_texts(cfg, model, text, [cfg.sentence], ranks)
    if ranks.rank == 0:
        out, score = Path(cfg.out), v @ t[0]
        order = np.argsort(-score, kind="stable")
        names = [name.decode() for name in pictures.files]
        rows = [{"image": names[i], "cosine": round(float(score[i]), 5)} for i in order]
        common.write_json(out / "ranking.json", {"sentence": cfg.sentence, "ranking": rows})
        found = [(None, [(gallery[i], None) for i in order[:10]])]
        title = "Best guesses for a sentence" + unread
        sheets.ranked_lists(found, out / "ranking.png", [cfg.sentence], title, width=260)
        common.finish_run(out)
        print(f"wrote {out}/ranking.json, ranking.png; best of {len(rows)}: {names[order[0]]}")
    common.barrier()


# ------------------------------------------------------------------------------------------- checks


def check(cfg):
    """Settings that are valid one by one but not together."""
    check_job(cfg, KEYS)
    if bool(cfg.predict) != bool(cfg.sentence and cfg.sentence.strip()):
        raise UserError('predict=FOLDER and sentence="what to look for" need each other')
    if not cfg.predict and not cfg.captions:
        files = "the JSON of CUHK-PEDES, ICFG-PEDES or RSTPReid"
        raise UserError(f"captions= names no file; give {files}")
    if cfg.trainval and cfg.evaluate_on == "val":
        raise UserError("evaluate_on=val needs pictures not trained on; set trainval=false")
    if cfg.text == "bert" and cfg.max_tokens < 3:
        raise UserError("max_tokens= must be 3 or more with text=bert: [CLS], a word, [SEP]")


def read_splits(cfg, *needed):
    """read_captions; the needed splits are there, and each shows two people or more."""
    training = {} if cfg.eval_only else dict(leave_out=cfg.leave_out, trainval=cfg.trainval)
    splits = read_captions(cfg.captions, cfg.images, **training)
    for name in needed:
        if splits[name] is None:
            raise UserError(f"{cfg.captions} has no {name} split")
        if splits[name].persons < 2:
            one = f"the {name} split of {cfg.captions} shows one person"
            raise UserError(f"{one}: no sentence can find another one; two people are needed")
    return splits


if __name__ == "__main__":
    common.run_stage(main)
