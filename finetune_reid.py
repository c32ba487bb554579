"""Stage 3b: person re-identification. Pictures of people seen by several cameras → a feature that finds them again.

Inputs   Market-1501 or MSMT17 V1 as downloaded, or folders in Market naming (0002_c1s1_000451_03.jpg: person 2,
         camera 1; person 0 = distractor, -1 = junk); an encoder of pretrain.py, published ViT weights, or none.
Outputs  in `out`: metrics.json (mAP, CMC), ranked_lists.png (best, median, worst queries), model.safetensors,
         encoder.safetensors (fine-tuned), last.pt (everything to resume), log.jsonl, config.yaml.

  python finetune_reid.py --cfg configs/finetune_reid_demo.yaml                                        laptop
  torchrun --nproc_per_node=2 finetune_reid.py --cfg configs/finetune_reid_market.yaml data=MARKET     GPUs
  python finetune_reid.py eval_only=true weights=runs/reid/model.safetensors data=MARKET out=runs/eval
  python finetune_reid.py predict=FOLDER weights=runs/reid/model.safetensors out=runs/mine

Recipe [MALE, used by HAP]: ½ cross-entropy + ½ soft-margin batch-hard triplet (reid.py holds the numbers).
The last epoch is reported, never the best one on the test set. HAP ViT-B: Market-1501 91.7 mAP, MSMT17 76.4.
Legend: B pictures on this rank · M all ranks · D feature width · Q queries · G gallery · C people in training.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import pictures
import reid
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
    parameter_groups,
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
from data import load_picture, normalize
from losses import gather_rows_of
from model import SIZES, TOKENS, GlobalBatchNorm, encoder_meta, layer_of, load_encoder, token_features
from reid import evaluate_features, ranking_metrics, triplet_loss

__all__ = ["ReID", "evaluate_features", "ranking_metrics", "triplet_loss"]

KEYS = dict(
    out=Key("runs/reid", "run folder"),
    # data
    data=Key(None, "root folder of the data set"),
    layout=Key("auto", "market: folders in Market naming; msmt17: list files; auto: msmt17 if list_train.txt is there",
               choices=("auto", "market", "msmt17")),
    train=Key("bounding_box_train", "market layout: folder of the training pictures"),
    query=Key("query", "market layout: folder of the queries"),
    gallery=Key("bounding_box_test", "market layout: folder of the gallery"),
    height=Key(256, "input height", "[MALE]; 384 in some papers", low=16),
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
    clip_grad=Key(0.0, "largest gradient norm; 0 = no clipping", "[silent]", low=0),
    seed=Key(0, "seed of everything", low=0),
    # evaluation
    rerank=Key(False, "k-reciprocal re-ranking (reported beside the plain figures)", "option, [Zhong 2017]"),
    eval_every=Key(0, "epochs between evaluations; 0 = after the last only, which alone is reported", low=0),
    eval_batch=Key(128, "pictures at a time on each rank in evaluation", low=1),
    # what to do instead of training
    eval_only=Key(False, "only evaluate weights= on the queries and gallery of data="),
    predict=Key(None, "only predict: a folder of pictures → embeddings.npz, nearest.png"),
    weights=Key(None, "model.safetensors of a finished run, for eval_only and predict"),
    # machine
    precision=Key("fp32", "fp32, or bf16 autocast", choices=("fp32", "bf16")),
    checkpoint_activations=Key(False, "recompute activations: less memory, more time", free=True),
    device=Key("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"), free=True),
    workers=Key(2, "loader processes per rank", low=0, free=True),
    save_every=Key(500, "steps between checkpoints", low=1, free=True),
    log_every=Key(10, "steps between log lines", low=1, free=True),
)  # fmt: skip


def main():
    cfg = read_config(KEYS, __doc__)
    rank, world, device = start_ranks(cfg.device)
    check(cfg)
    if cfg.predict:
        return predict(cfg, rank, world, device)
    folders = (None if cfg.eval_only else cfg.train, cfg.query, cfg.gallery)
    train_set, query, gallery, about = reid.read_data(cfg.data, cfg.layout, *folders)
    batches = total = step = 0
    if train_set:
        batches = reid.PersonBatches(train_set.ids, cfg.people, cfg.pictures_per_person, cfg.seed, rank, world)
        total = cfg.epochs * batches.steps_per_epoch
        about += f"; {batches.about}; {total} steps of {batches.size}"
    seed_all(cfg.seed)  # initial weights
    model, meta, sentence = build_model(cfg, train_set and len(batches.members))
    state = open_run(cfg, KEYS, rank)
    if state == "finished":
        print(f"{cfg.out} is finished already: see {cfg.out}/metrics.json") if rank == 0 else None
        return
    model.to(device)
    optimizer = build_optimizer(cfg, model)
    if train_set and state == "resume":
        step = resume(cfg, model, optimizer)
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


def check(cfg):
    """Settings that are valid one by one but not together."""
    if cfg.eval_only and cfg.predict:
        raise UserError("eval_only and predict are two jobs; give one")
    if bool(cfg.eval_only or cfg.predict) != bool(cfg.weights):
        raise UserError(
            "weights= (a finished run's model.safetensors) and eval_only=true or predict=FOLDER need each other; "
            "to start a fine-tuning from weights use encoder="
        )
    if not cfg.predict and not cfg.data:
        raise UserError("data= names no folder; give the root of Market-1501, MSMT17 or one of the same layout")


# ------------------------------------------------------------------------------------------------------------ model


class ReID(nn.Module):
    """Encoder, one feature, a linear identity classifier. With bnneck [BoT] the classifier sees the normalised feature.

    forward(images (B, 3, H, W) normalised, drop_noise) → feature (B, D) for the triplet loss, logits (B, C).
    """

    def __init__(self, encoder, token, people, bnneck):
        super().__init__()
        if token in ("pose", "both") and encoder.n_special < 2:
            raise UserError(f"token={token} needs an encoder with [POSE]; use token=cls or patch_mean")
        self.encoder, self.token = encoder, token
        width = encoder.width * (2 if token == "both" else 1)
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
    size, patch, path = cfg.size, cfg.patch, cfg.encoder
    # Others' weights have no [POSE]: one is added, untrained, only where it is asked for.
    pose_token = path is None or cfg.token in ("pose", "both")
    if cfg.weights:
        m, path = encoder_meta(cfg.weights), None
        if "people" not in m:
            raise UserError(f"{cfg.weights} is no model.safetensors of finetune_reid.py")
        cfg.height, cfg.width, cfg.token, cfg.bnneck = (
            int(m["height"]),
            int(m["width_px"]),
            m["token"],
            m["bnneck"] == "True",
        )
        size, patch, pose_token, people = m["size"], int(m["patch_size"]), m["pose_token"] == "True", int(m["people"])
    encoder, size, sentence = load_encoder(
        path, (cfg.height, cfg.width), size, patch, pose_token, cfg.drop_path,
        checkpoint_activations=cfg.checkpoint_activations,
    )  # fmt: skip
    model = ReID(encoder, cfg.token, people, cfg.bnneck)
    if cfg.weights:
        load_weights(model, load_checkpoint(cfg.weights), cfg.weights)
        sentence = f"model {cfg.weights}"
    meta = dict(
        size=size, width=encoder.width, depth=encoder.depth, heads=SIZES[size]["heads"], height=cfg.height,
        width_px=cfg.width, patch_size=encoder.patch_size, pose_token=encoder.n_special == 2, token=cfg.token,
        bnneck=cfg.bnneck, people=people,
    )  # fmt: skip
    return model, meta, sentence


def build_optimizer(cfg, model):
    depth = model.encoder.depth
    groups = parameter_groups(model, cfg.weight_decay, cfg.layer_decay, lambda name: layer_of(name, depth), depth + 1)
    return torch.optim.AdamW(groups, lr=0.0, fused=True)  # β (.9, .999): torch's, [silent]


# --------------------------------------------------------------------------------------------------------- training


def train(cfg, model, meta, optimizer, dataset, batches, test, first, total, log, rank, world, device):
    """The loop. Nothing in a step waits for the device: its figures are read while the next step runs."""
    loader = DataLoader(
        dataset, batch_sampler=batches.run(first, total), num_workers=cfg.workers, pin_memory=device.type == "cuda"
    )
    runner = model.train()
    if world > 1:
        ids = [device.index] if device.type == "cuda" else None
        runner = DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)
    warmup, figures = round(cfg.warmup_epochs * batches.steps_per_epoch), None
    for step, sample in enumerate(loader, first):
        lr = learning_rate(step, total, warmup, cfg.lr)
        set_learning_rate(optimizer, lr)
        images = normalize(sample["image"].to(device, non_blocking=True))
        label = sample["label"].to(device, non_blocking=True)
        # Drop path is drawn for the global batch, so that the number of ranks changes nothing.
        noise = torch.rand(batches.size, 2 * model.encoder.depth, generator=generator_of(cfg.seed, step))
        noise = rank_rows(noise, rank, world).T.to(device, non_blocking=True) if cfg.drop_path else None
        with autocast(device, cfg.precision):
            feature, logits = runner(images, noise)
        identity = F.cross_entropy(logits.float(), label)
        triplet = triplet_loss(feature, label)
        loss = 0.5 * identity + 0.5 * triplet  # L = ½ L_id + ½ L_tri  [MALE]
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        settle(figures, dataset, cfg, log, batches.size)  # the step before this one
        right = (logits.detach().argmax(1) == label).float().mean()
        figures = Figures(step, lr, (loss, identity, triplet, right, norm), logits, sample["index"])
        if step + 1 == total or (step + 1) % cfg.save_every == 0:
            settle(figures, dataset, cfg, log, batches.size)  # never save after a non-finite loss
            figures = None
            save(cfg, model, meta, optimizer, step + 1, rank)
        log.advance()
        epoch, rest = divmod(step + 1, batches.steps_per_epoch)
        if cfg.eval_every and rest == 0 and epoch % cfg.eval_every == 0 and step + 1 < total:
            result = evaluate(cfg, model, *test, rank, world, device)
            log.write(step=step + 1, epoch=epoch, **figures_of(result))
            model.train()


class Figures:
    """One step's figures of all ranks, on their way to the host while the device goes on."""

    NAMES = ("loss", "identity", "triplet", "accuracy", "grad_norm")

    def __init__(self, step, lr, values, logits, index):
        self.step, self.lr, self.index = step, lr, index
        own = torch.stack([value.detach().float() for value in values])
        self.ranks = gather_rows_of(own[None]).to("cpu", non_blocking=True)
        self.finite = logits.detach().float().sum(1).isfinite().to("cpu", non_blocking=True)
        self.copied = torch.cuda.Event() if own.is_cuda else None
        if self.copied:
            self.copied.record()


def settle(figures, dataset, cfg, log, batch):
    """Check a step's figures and log them. A non-finite loss stops all ranks; the last checkpoint stays."""
    if figures is None:
        return
    if figures.copied:
        figures.copied.synchronize()
    finite = figures.ranks.isfinite().all(1)
    if not finite.all():
        ranks = (~finite).nonzero().flatten().tolist()
        bad = (~figures.finite).nonzero().flatten().tolist() or range(len(figures.index))
        names = [dataset.name(int(figures.index[i])) for i in bad]
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise UserError(
            f"non-finite loss or gradient at step {figures.step} on rank(s) {ranks}; this rank's pictures: "
            f"{', '.join(names[:8])}{more}; the last checkpoint stays; lower lr or look at these pictures"
        )
    if figures.step % cfg.log_every == 0:
        row = dict(zip(Figures.NAMES, figures.ranks.mean(0).tolist()))
        row["pictures_per_s"] = log.rate(figures.step + 1, batch)
        shown = ("loss", "identity", "triplet", "accuracy", "pictures_per_s")
        log.write(step=figures.step + 1, lr=figures.lr, **row, shown=shown)


def save(cfg, model, meta, optimizer, step, rank):
    """last.pt to resume, and weights only: encoder.safetensors, and model.safetensors for eval_only and predict."""
    if rank == 0:
        out = Path(cfg.out)
        save_checkpoint(out / "last.pt", model=model.state_dict(), optimizer=optimizer.state_dict(), step=step)
        shape = {name: value for name, value in meta.items() if name not in ("token", "bnneck", "people")}
        save_encoder(out / "encoder.safetensors", model.encoder, **shape)
        save_encoder(out / "model.safetensors", model, **meta)


def resume(cfg, model, optimizer):
    """Load last.pt into model and optimiser. → steps done (0 if the run was killed before its first checkpoint)."""
    path = Path(cfg.out) / "last.pt"
    if not path.exists():
        return 0
    state = load_checkpoint(path)
    if not {"model", "optimizer", "step"} <= set(state):
        raise UserError(f"{path} is not a checkpoint of finetune_reid.py; delete it to start this run anew")
    load_weights(model, state["model"], path)
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


# ------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def embed(cfg, model, data, rank, world, device):
    """Pictures → (N, D) float32 of length 1, on every rank. Each rank takes its part; no picture is taken twice."""
    model.eval()
    rows = np.array_split(np.arange(len(data.files)), world)[rank]
    dataset = reid.TestPictures(data, (cfg.height, cfg.width), rows)
    parts = [np.empty((0, model.classifier.in_features), np.float32)]
    for images in DataLoader(dataset, batch_size=cfg.eval_batch, num_workers=cfg.workers):
        with autocast(device, cfg.precision):
            parts.append(model.embed(normalize(images.to(device))).cpu().numpy())
    return np.concatenate(gather_rows([np.concatenate(parts)], world))


def evaluate(cfg, model, query, gallery, rank, world, device):
    """→ dict of ranking_metrics, "features" (of queries and of gallery), "reranked" (the metrics again, if asked).

    The features are made by all ranks; rank 0 ranks them (the other ranks get the features only).
    """
    features = [embed(cfg, model, part, rank, world, device) for part in (query, gallery)]
    result = {"features": features}
    if rank == 0:
        both = (features[0], query.ids, query.cameras, features[1], gallery.ids, gallery.cameras)
        result |= evaluate_features(*both)
        if cfg.rerank:
            result["reranked"] = evaluate_features(*both, rerank=True)
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
    text = json.dumps(full, indent=1) + "\n"
    write_atomic(Path(cfg.out) / "metrics.json", lambda part: part.write_text(text))
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
    pictures.ranked_lists(rows, Path(cfg.out) / "ranked_lists.png", labels, title)


# ---------------------------------------------------------------------------------------------------------- predict


def predict(cfg, rank, world, device, rows=40, columns=10):
    """A folder of pictures → embeddings.npz and, for the first 40 pictures, nearest.png.

    embeddings.npz: files (N,) text, embeddings (N, D) float32 of length 1, nearest (N, 10) row numbers of the most
    alike others, similarity (N, 10) their cosines.
    """
    names = reid.picture_names(cfg.predict, below=True)
    model, _, sentence = build_model(cfg)
    if open_run(cfg, KEYS, rank) == "finished":
        print(f"{cfg.out} is finished already: see {cfg.out}/embeddings.npz") if rank == 0 else None
        return
    data = reid.Pictures(cfg.predict, reid.encoded(names), None, None)
    z = embed(cfg, model.to(device), data, rank, world, device)
    if rank == 0:
        out, k = Path(cfg.out), min(columns, len(names) - 1)
        nearest, similarity = reid.nearest_others(z, k)
        arrays = dict(files=np.array(names), embeddings=z, nearest=nearest, similarity=similarity)
        write_atomic(out / "embeddings.npz", lambda part: write_npz(part, arrays))
        shown, load = range(min(rows, len(names))), lambda i: load_picture(cfg.predict, names[i])
        lists = [(load(i), [(load(j), None) for j in nearest[i]]) for i in shown]
        title = f"The {k} most alike pictures" + (f" (first {rows} of {len(names)})" if len(names) > rows else "")
        pictures.ranked_lists(lists, out / "nearest.png", [names[i] for i in shown], title)
        (out / "done").touch()
        print(f"{sentence}: wrote {out}/embeddings.npz ({len(names)} pictures x {z.shape[1]}), nearest.png")
    barrier()


def write_npz(path, arrays):
    with open(path, "wb") as file:  # given a name, NumPy would add .npz to it
        np.savez(file, **arrays)


if __name__ == "__main__":
    run_stage(main)
