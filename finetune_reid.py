"""Stage 3b: person re-identification. Pictures of people seen by several cameras → a feature that finds them again.

Inputs   Market-1501 or MSMT17 V1 as downloaded, or folders in Market naming (0002_c1s1_000451_03.jpg: person 2,
         camera 1; person 0 = distractor, -1 = junk); an encoder of pretrain.py, published ViT weights, or none.
Outputs  in `out`: metrics.json (mAP, CMC), ranked_lists.png (best, median, worst queries), model.safetensors,
         encoder.safetensors (fine-tuned), last.pt (everything to resume), log.jsonl, config.yaml.

  python finetune_reid.py --cfg configs/finetune_reid_demo.yaml                                     # laptop
  torchrun --nproc_per_node=2 finetune_reid.py --cfg configs/finetune_reid_market.yaml data=MARKET  # GPUs
  python finetune_reid.py weights=runs/demo/reid_pretrained/model.safetensors eval_only=true \\
         data=runs/demo/people out=OUT
  python finetune_reid.py weights=runs/demo/reid_pretrained/model.safetensors predict=FOLDER out=OUT

Recipe [MALE, used by HAP]: ½ cross-entropy + ½ soft-margin batch-hard triplet (reid.py holds the numbers).
The last epoch is reported, never the best one on the test set. HAP ViT-B: Market-1501 91.7 mAP, MSMT17 76.4.
Legend: B pictures on this rank · M all ranks · D feature width · Q queries · G gallery · C people in training.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader

from common import (
    DROP_PATH,
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
    parameter_groups,
    rank_noise,
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
from model import SIZES, layer_of
from plumbing.batches import PersonBatches, training_loader
from plumbing.config import Key, UserError, check_job, read_config, run_stage
from tasks import reid
from tasks.heads import TOKENS, GlobalBatchNorm, feature_width, reads_pose, token_features
from tasks.reid import evaluate_features, ranking_metrics, triplet_loss

__all__ = ["ReID", "evaluate_features", "ranking_metrics", "triplet_loss"]

KEYS = dict(
    out=Key("runs/reid", "run folder; for eval_only runs/reid_eval, for predict runs/reid_predict"),
    # data
    data=Key(None, "root folder of the data set"),
    layout=Key("auto", "market: folders in Market naming; msmt17: list files; auto: msmt17 if list_train.txt is there",
               choices=("auto", "market", "msmt17")),
    train=Key("bounding_box_train", "market layout: folder of the training pictures"),
    query=Key("query", "market layout: folder of the queries"),
    gallery=Key("bounding_box_test", "market layout: folder of the gallery"),
    height=Key(256, "input height", "[MALE]; [HAP] also 384", low=16),
    width=Key(128, "input width", "[MALE]", low=16),
    pad=Key(10, "border added before the random crop, px", "[MALE]", low=0),
    erase=Key(0.5, "probability of random erasing", "[MALE]", low=0, high=1),
    people=Key(8, "people in a global batch, all different", "[MALE]", low=2),
    pictures_per_person=Key(8, "K: pictures of each person; fewer are shown again, augmented anew", "[MALE]", low=2),
    # model
    encoder=Key(None, "encoder.safetensors of pretrain.py or published ViT weights; none: from scratch"),
    size=Key("base", "encoder size, where the weights do not say", "[HAP]", tuple(SIZES)),
    patch=Key(16, "patch side, where the weights do not say", "[HAP]", low=1),
    token=Key("cls", "the feature", "[HAP] cls; [POSE] is the paper's own question", TOKENS),
    bnneck=Key(False, "batch norm between triplet and identity loss; the test feature is behind it", "option, [BoT]"),
    drop_path=Key(0.1, "drop path of the last block, rising linearly", "[MALE]", low=0, high=0.9),
    # optimiser
    epochs=Key(100, "passes over the data", "[MALE]", low=1),
    warmup_epochs=Key(5.0, "linear warm-up", "[MALE]", low=0),
    lr=Key(8.0e-3, "learning rate of the head (encoder: times layer decay)", "[MALE]", low=0),
    weight_decay=Key(0.05, "AdamW weight decay, not on 1-D parameters, tokens, positions", "[MALE]", low=0),
    layer_decay=Key(0.4, "factor per layer from the head down", "[MALE]", low=1e-3, high=1),
    clip_grad=Key(0.0, "largest gradient norm; 0 = no clipping", "[MALE]: none", low=0),
    seed=Key(0, "seed of everything", low=0),
    # evaluation
    rerank=Key(False, "k-reciprocal re-ranking (reported beside the plain figures)", "option, [Zhong 2017]"),
    eval_every=Key(0, "epochs between evaluations; 0 = after the last only, which alone is reported", low=0, free=True),
    eval_batch=Key(128, "pictures at a time on each rank in evaluation", low=1),
    # what to do instead of training
    eval_only=Key(False, "only evaluate weights= on the queries and gallery of data="),
    predict=Key(None, "only predict: a folder of pictures, or one → embeddings.npz, nearest.png"),
    weights=Key(None, "model.safetensors of a finished run, for eval_only and predict"),
    # machine
    precision=Key("auto", "fp32 (no TF32); bf16 autocast; auto: bf16 in hardware", choices=("auto", "fp32", "bf16")),
    checkpoint_activations=Key(False, "recompute activations: less memory, more time", free=True),
    device=Key("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"), free=True),
    workers=Key(2, "loader processes per rank", low=0, free=True),
    save_every=Key(500, "steps between checkpoints", low=1, free=True),
    log_every=Key(10, "steps between log lines", low=1, free=True),
)  # fmt: skip
SHOWN = ("loss", "identity", "triplet", "accuracy")  # beside the progress bar


def main():
    cfg = read_config(KEYS, __doc__)
    rank, world, device = start_ranks(cfg.device, cfg.precision)
    check_job(cfg, KEYS)
    if not cfg.predict and not cfg.data:
        raise UserError("data= names no folder; give the root of Market-1501, MSMT17 or one of the same layout")
    if cfg.predict:
        return predict(cfg, rank, world, device)
    folders = (None if cfg.eval_only else cfg.train, cfg.query, cfg.gallery)
    train_set, query, gallery, about = reid.read_data(cfg.data, cfg.layout, *folders)
    batches = total = step = 0  # as eval_only leaves them
    if train_set:
        batches = PersonBatches(train_set.ids, cfg.people, cfg.pictures_per_person, cfg.seed, rank, world)
        total = cfg.epochs * batches.steps_per_epoch
        about += f"; {batches.about}; {total} steps of {batches.size}"
    seed_all(WEIGHTS, cfg.seed)  # initial weights
    model, meta, sentence = build_model(cfg, train_set and len(batches.members))
    if open_run(cfg, KEYS, rank) == "finished":
        return
    model.to(device)
    if train_set:
        optimizer = build_optimizer(cfg, model)
        step = resume(Path(cfg.out) / "last.pt", model, optimizer)["step"]
    log = Log(cfg.out, total, step, rank, "reid")
    log.say(f"{about}; {sentence}")
    if step < total:
        dataset = reid.TrainPictures(train_set, (cfg.height, cfg.width), cfg.pad, cfg.erase, cfg.seed)
        train(cfg, model, meta, optimizer, dataset, batches, (query, gallery), step, total, log, rank, world, device)
    result = evaluate(cfg, model, query, gallery, rank, world, device)
    if rank == 0:
        write_result(cfg, result, query, gallery, log, total)
        (Path(cfg.out) / "done").touch()
    log.close()
    barrier()


# ------------------------------------------------------------------------------------------------------------ model


class ReID(nn.Module):
    """Encoder, one feature, a linear identity classifier. With bnneck [BoT] the classifier sees the normalised feature.

    forward(images (B, 3, H, W) normalised, drop_noise) → feature (B, D) for the triplet loss, logits (B, C).
    """

    def __init__(self, encoder, token, people, bnneck):
        super().__init__()
        self.encoder, self.token, width = encoder, token, feature_width(encoder, token)
        self.neck = GlobalBatchNorm(width) if bnneck else nn.Identity()
        if bnneck:
            self.neck.bias.requires_grad_(False)  # [BoT]
        self.classifier = nn.Linear(width, people, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)  # [BoT]

    def forward(self, images, drop_noise=None):
        feature = token_features(self.encoder(images, drop_noise=drop_noise), self.encoder.n_special, self.token)
        return feature, self.classifier(self.neck(feature))

    def embed(self, images):
        """What pictures are compared by: (B, D) float32, length 1."""
        feature = token_features(self.encoder(images), self.encoder.n_special, self.token)
        return F.normalize(self.neck(feature).float(), dim=1)


def build_model(cfg, people=None):
    """→ (model, what its file says of it, a sentence). With weights=, model and input size come from that file."""
    m, loaded = use_meta(cfg, "finetune_reid.py", "people", "token", "bnneck")
    start, pose_token = (None, cfg.pose_token) if m else (cfg.encoder, cfg.encoder is None or reads_pose(cfg.token))
    encoder, size, sentence = load_encoder(
        start, (cfg.height, cfg.width), cfg.size, cfg.patch, pose_token, cfg.drop_path,
        checkpoint_activations=cfg.checkpoint_activations,
    )  # fmt: skip
    people = int(m["people"]) if m else people
    model = ReID(encoder, cfg.token, people, cfg.bnneck)
    if m:
        load_weights(model, load_checkpoint(cfg.weights), cfg.weights)
        sentence = loaded
    meta = meta_of(encoder, size) | dict(token=cfg.token, bnneck=cfg.bnneck, people=people)
    return model, meta, sentence


def build_optimizer(cfg, model):
    depth = model.encoder.depth
    groups = parameter_groups(model, cfg.weight_decay, cfg.layer_decay, lambda name: layer_of(name, depth), depth + 1)
    return torch.optim.AdamW(groups, lr=0.0, fused=True)  # β (.9, .999)  [MALE]


# --------------------------------------------------------------------------------------------------------- training


def train(cfg, model, meta, optimizer, dataset, batches, test, first, total, log, rank, world, device):
    """The loop. Nothing in a step waits for the device: its figures are read while the next step runs."""
    loader = training_loader(dataset, batches.run(first, total), cfg.workers, device)
    runner = distributed(model.train(), device)
    warmup, figures = round(cfg.warmup_epochs * batches.steps_per_epoch), None
    for step, sample in enumerate(loader, first):
        lr = learning_rate(step, total, warmup, cfg.lr)
        set_learning_rate(optimizer, lr)
        images = normalize(sample["image"].to(device, non_blocking=True))
        label = sample["label"].to(device, non_blocking=True)
        noise = rank_noise((DROP_PATH, cfg.seed, step), batches.size, 2 * model.encoder.depth, rank, world, device)
        with autocast(device, cfg.precision):
            feature, logits = runner(images, noise.T if cfg.drop_path else None)
        identity = F.cross_entropy(logits.float(), label)
        triplet = triplet_loss(feature, label)
        loss = 0.5 * identity + 0.5 * triplet  # L = ½ L_id + ½ L_tri  [MALE]
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        settle(figures, log, dataset.name, batches.size, cfg.log_every, SHOWN)  # the step before this one
        right = (logits.detach().argmax(1) == label).float().mean()
        values = dict(loss=loss, identity=identity, triplet=triplet, accuracy=right, grad_norm=norm)
        figures = Figures(step, lr, values, sample["index"], ~logits.detach().float().sum(1).isfinite())
        (epoch, rest), last = divmod(step + 1, batches.steps_per_epoch), step + 1 == total
        evaluating = cfg.eval_every and rest == 0 and epoch % cfg.eval_every == 0 and not last
        saving = last or (step + 1) % cfg.save_every == 0
        if evaluating or saving:
            settle(figures, log, dataset.name, batches.size, cfg.log_every, SHOWN)  # never save a broken model
            figures = None
        if evaluating:
            result = evaluate(cfg, model, *test, rank, world, device)
            log.write(step=step + 1, epoch=epoch, **figures_of(result))
            model.train()
        if saving:
            save(cfg, model, meta, optimizer, step + 1, rank)
        log.advance()


def save(cfg, model, meta, optimizer, step, rank):
    """Weights alone (the model's for eval_only and predict), then everything to resume: after a kill in between these
    steps are repeated, so the files always agree.
    """
    if rank == 0:
        out = Path(cfg.out)
        save_encoder(out / "encoder.safetensors", model.encoder, **meta_of(model.encoder, meta["size"]))
        save_encoder(out / "model.safetensors", model, **meta)
        save_checkpoint(out / "last.pt", model=model.state_dict(), optimizer=optimizer.state_dict(), step=step)


# ------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def embed(cfg, model, data, rank, world, device):
    """Pictures → (N, D) float32 of length 1, on every rank. Each rank takes its part; no picture is taken twice."""
    model.eval()
    dataset = reid.TestPictures(data, (cfg.height, cfg.width), rank_share(len(data.files), rank, world))
    parts = []
    for images in DataLoader(dataset, batch_size=cfg.eval_batch, num_workers=cfg.workers):
        with autocast(device, cfg.precision):
            parts.append(model.embed(normalize(images.to(device))).cpu().numpy())
    return np.concatenate(gather_rows(parts, world))


def evaluate(cfg, model, query, gallery, rank, world, device):
    """→ dict of ranking_metrics, "features" (of queries and of gallery), "reranked" (the metrics again, if asked).

    The features are made by all ranks; rank 0 ranks them (the other ranks get the features only),
    with the threads of all: torchrun gives a rank one.
    """
    features = [embed(cfg, model, part, rank, world, device) for part in (query, gallery)]
    result, threads = {"features": features}, torch.get_num_threads()
    if rank == 0:
        both = (features[0], query.ids, query.cameras, features[1], gallery.ids, gallery.cameras)
        torch.set_num_threads(max(threads, min(world * threads, os.cpu_count())))
        result |= evaluate_features(*both)
        if cfg.rerank:
            result["reranked"] = evaluate_features(*both, rerank=True)
        torch.set_num_threads(threads)
    barrier()
    return result


def figures_of(result):
    """mAP and CMC at 1, 5, 10 as fractions, and the re-ranked ones; {} on ranks that did not rank."""
    if "mAP" not in result:
        return {}
    cmc = result["cmc"]
    row = {"mAP": result["mAP"]} | {f"rank{k}": float(cmc[min(k, len(cmc)) - 1]) for k in (1, 5, 10)}
    return row | {f"reranked_{k}": v for k, v in figures_of(result.get("reranked", {})).items()}


def write_result(cfg, result, query, gallery, log, step):
    """metrics.json, a last line in log.jsonl, ranked_lists.png, and the line people look at."""
    flat, Q = figures_of(result), len(query.ids)
    full = {"queries": Q, "queries_without_match": result["unmatched"], "gallery": len(gallery.ids)} | flat
    write_json(Path(cfg.out) / "metrics.json", full)
    log.write(step=step, epoch=0 if cfg.eval_only else cfg.epochs, **flat)
    draw(cfg, result, query, gallery)
    left_out = f", {result['unmatched']} of {Q} queries without a match left out" if result["unmatched"] else ""
    print(f"{cfg.out}: " + "  ".join(f"{k} {v:.4f}" for k, v in flat.items()) + left_out)


def draw(cfg, result, query, gallery, each=3, columns=10):
    """ranked_lists.png: the queries of best, median and worst average precision and their ten nearest."""
    n = len(result["ap"]) - result["unmatched"]
    order = np.argsort(-result["ap"], kind="stable")[:n]  # queries without a match (NaN) come last
    middle = n // 2 - each // 2
    places = {*range(each), *range(middle, middle + each), *range(n - each, n)}
    rows, labels = [], []
    for place in sorted(p for p in places if 0 <= p < n):
        q = order[place]
        person, camera = query.ids[q], query.cameras[q]
        junk = (gallery.ids == -1) | ((gallery.ids == person) & (gallery.cameras == camera))
        distance = np.where(junk, np.inf, 1 - result["features"][1] @ result["features"][0][q])
        near = [j for j in np.argsort(distance, kind="stable")[:columns] if not junk[j]]
        answers = [(load_picture(gallery.folder, gallery.files[j]), gallery.ids[j] == person) for j in near]
        rows.append((load_picture(query.folder, query.files[q]), answers))
        labels.append(f"{place + 1} of {n}\nperson {person}\ncamera {camera}\nAP {result['ap'][q]:.3f}")
    title = f"Best, median and worst queries: mAP {result['mAP']:.3f}, rank-1 {result['cmc'][0]:.3f}"
    sheets.ranked_lists(rows, Path(cfg.out) / "ranked_lists.png", labels, title)


# ---------------------------------------------------------------------------------------------------------- predict


def predict(cfg, rank, world, device, rows=40, columns=10):
    """A folder of pictures → embeddings.npz and, for the first 40 pictures, nearest.png.

    embeddings.npz: files (N,) text, embeddings (N, D) float32 of length 1, nearest (N, 10) row numbers of the most
    alike others, similarity (N, 10) their cosines.
    """
    folder, names = pictures_at(cfg.predict)
    data = reid.Pictures(folder, as_bytes(folder, names), None, None)
    refuse_bad_pictures(data.folder, data.files)
    model, _, sentence = build_model(cfg)
    if open_run(cfg, KEYS, rank) == "finished":
        return
    if rank == 0:
        print(sentence, file=sys.stderr)
    z = embed(cfg, model.to(device), data, rank, world, device)
    if rank == 0:
        out, k = Path(cfg.out), min(columns, len(names) - 1)
        nearest, similarity = reid.nearest_others(z, k)
        arrays = dict(files=np.array(names), embeddings=z, nearest=nearest, similarity=similarity)
        write_atomic(out / "embeddings.npz", lambda part: write_npz(part, arrays))
        wrote = f"wrote {out}/embeddings.npz ({len(names)} pictures x {z.shape[1]})"
        shown, load = range(min(rows, len(names))), lambda i: load_picture(folder, names[i])
        lists = [(load(i), [(load(j), None) for j in nearest[i]]) for i in shown]
        title = f"The {k} most alike pictures" + (f" (first {rows} of {len(names)})" if len(names) > rows else "")
        if k:  # there are others
            sheets.ranked_lists(lists, out / "nearest.png", [names[i] for i in shown], title)
            wrote += ", nearest.png"
        (out / "done").touch()
        print(wrote)
    barrier()


def write_npz(path, arrays):
    with open(path, "wb") as file:  # given a name, NumPy would add .npz to it
        np.savez(file, **arrays)


if __name__ == "__main__":
    run_stage(main)
