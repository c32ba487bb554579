"""Stage 3b: person re-identification. Pictures of people seen by several cameras → a feature that
finds them again.

Inputs   Market-1501 or MSMT17 V1 as downloaded, or folders in Market naming
         (0002_c1s1_000451_03.jpg: person 2, camera 1; person 0 = distractor, -1 = junk); an
         encoder of pretrain.py, published ViT weights, or none.
Outputs  in `out`: metrics.json (mAP, CMC), ranked_lists.png (best, median, worst queries),
         model.safetensors, encoder.safetensors (fine-tuned), last.pt (everything to resume),
         log.jsonl, curves.png, config.yaml. predict: embeddings.npz, nearest.png.

  python finetune_reid.py --cfg configs/finetune_reid_demo.yaml                           # laptop
  torchrun --nproc_per_node=1 finetune_reid.py --cfg configs/finetune_reid_market.yaml \\
         data=MARKET                                                                      # GPUs
  python finetune_reid.py weights=runs/demo/reid_pretrained/model.safetensors eval_only=true \\
         data=runs/demo/people out=OUT
  python finetune_reid.py weights=runs/demo/reid_pretrained/model.safetensors predict=FOLDER out=OUT

Recipe [MALE, used by HAP]: ½ cross-entropy + ½ soft-margin batch-hard triplet loss.
The last epoch is reported, never the best one on the test set. HAP with ViT-B: Market-1501 91.7
mAP, MSMT17 76.4.
Legend: B pictures on this rank · D feature width · Q queries · G gallery pictures · N pictures of a
set · C people in training.
"""

import common  # first: Ctrl-C while the libraries load

# isort: split
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from common import UserError
from drawing import results as sheets
from formats.market import read_data, read_pictures
from formats.weights import ENCODER, build_encoder, meta_of, take_settings
from model import normalize
from plumbing.config import JOB, MACHINE, Key, check_job, read_config
from tasks import ranking
from tasks.features import READ_POSE, TOKENS, ResizedPictures
from tasks.ranking import ranking_metrics, triplet_loss
from tasks.reid import AugmentedPictures, PersonBatches, ReID

# Public names of this script; they are defined in tasks/.
__all__ = ["ranking_metrics", "triplet_loss"]

KEYS = dict(
    out=Key("runs/reid", "run folder; for eval_only runs/reid_eval, for predict runs/reid_predict"),
    # data
    data=Key(None, "root folder of the data set"),
    layout=Key("auto", "market: folders in Market naming; msmt17: list files; auto: msmt17 if "
               "list_train.txt is there", choices=("auto", "market", "msmt17")),
    train=Key("bounding_box_train", "market layout: folder of the training pictures"),
    query=Key("query", "market layout: folder of the queries"),
    gallery=Key("bounding_box_test", "market layout: folder of the gallery"),
    height=Key(256, "input height", "[MALE]; [HAP] also 384", low=16),
    width=Key(128, "input width", "[MALE]", low=16),
    pad=Key(10, "border added before the random crop, px", "[MALE]", low=0),
    erase=Key(0.5, "probability of random erasing", "[MALE]", low=0, high=1),
    people=Key(8, "people in a global batch, all different", "[MALE]", low=2),
    pictures_per_person=Key(8, "K: pictures of each person; fewer are shown again, augmented anew",
                            "[MALE]", low=2),
    # model
    token=Key("cls", "the feature", "[HAP] cls; [POSE] [silent]", TOKENS),
    bnneck=Key(False, "batch norm between triplet and identity loss; the test feature is behind it",
               "option, [BoT]"),
    drop_path=Key(0.1, "drop path of the last block, rising linearly", "[MALE]", low=0, high=0.9),
    # optimiser
    epochs=Key(100, "passes over the data", "[MALE]", low=1),
    warmup_epochs=Key(5.0, "linear warm-up", "[MALE]", low=0),
    lr=Key(8.0e-3, "learning rate of the head (encoder: times layer decay)", "[MALE]", low=0),
    weight_decay=Key(0.05, "AdamW weight decay, not on 1-D parameters, tokens, positions",
                     "[MALE]", low=0),
    layer_decay=Key(0.4, "factor per layer from the head down", "[MALE]", low=1e-3, high=1),
    clip_grad=Key(0.0, "largest gradient norm; 0 = no clipping", "[MALE]: none", low=0),
    # evaluation
    rerank=Key(False, "k-reciprocal re-ranking (reported beside the plain figures)",
               "option, [Zhong 2017]"),
    eval_every=Key(0, "epochs between evaluations; 0 = after the last only, which alone is "
                   "reported", low=0, may_change=True),
    eval_batch=Key(128, "pictures at a time on each rank in evaluation", low=1),
) | ENCODER | JOB | MACHINE  # fmt: skip


def main():
    cfg = read_config(KEYS, __doc__)
    ranks = common.start_ranks(cfg.device, cfg.precision)
    check(cfg)
    if cfg.predict:
        return predict(cfg, ranks)
    if cfg.eval_only:
        return evaluate_only(cfg, ranks)
    folders = cfg.train, cfg.query, cfg.gallery
    people, query, gallery, about = read_data(cfg.data, cfg.layout, *folders)
    batches = PersonBatches(people.ids, cfg.people, cfg.pictures_per_person, cfg.seed, ranks)
    dataset = AugmentedPictures(people, (cfg.height, cfg.width), cfg.pad, cfg.erase, cfg.seed)
    common.seed_all(common.WEIGHTS, cfg.seed)
    model, sentence = build_model(cfg, len(batches.members))
    common.check_memory(model, batches.size // ranks.world, ranks.device)
    if common.open_run(cfg, KEYS, ranks) == "finished":
        return
    model.to(ranks.device)
    depth = model.encoder.depth
    groups = common.parameter_groups(model, cfg.weight_decay, cfg.layer_decay, depth)
    optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)  # β (.9, .999)  [MALE]
    first = common.resume(Path(cfg.out) / "last.pt", model, optimizer)["step"]
    total = cfg.epochs * batches.steps_per_epoch
    warmup = round(cfg.warmup_epochs * batches.steps_per_epoch)
    log = common.StepLog(cfg, ranks, dataset, batches, first, total)
    if batches.short:
        K = cfg.pictures_per_person
        about += f"; {batches.short} people have fewer than {K} pictures and show them again"
    log.say(f"{about}; {total} steps of {batches.size}; {sentence}")
    loader = common.training_loader(dataset, batches.steps(first, total), cfg.workers, ranks.device)
    runner = common.distributed(model.train(), ranks.device)

    # Nothing in a step waits for the device: its figures are read while the next step runs.
    for step, sample in enumerate(loader, first):
        lr = common.learning_rate(step, total, warmup, cfg.lr)
        common.set_learning_rate(optimizer, lr)  # times the layer decay of each group
        # P people × K pictures of each, all ranks together
        images = normalize(sample["image"].to(ranks.device, non_blocking=True))
        label = sample["label"].to(ranks.device, non_blocking=True)
        # Drawn for the global batch, so that any number of ranks drops the same branches.
        key = common.DROP_PATH, cfg.seed, step
        noise = common.rank_noise(key, batches.size, 2 * depth, ranks)
        with common.autocast(ranks.device, cfg.precision):
            feature, logits = runner(images, noise.T if cfg.drop_path else None)
        # Which of the C people is it? And is every picture nearer to its person than to others?
        identity = F.cross_entropy(logits.float(), label)
        triplet = triplet_loss(feature, label)
        loss = 0.5 * identity + 0.5 * triplet  # L = ½ L_id + ½ L_tri  [MALE]
        loss.backward()
        largest = cfg.clip_grad or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), largest)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        logits = logits.detach().float()
        right = (logits.argmax(1) == label).float().mean()
        values = dict(loss=loss, identity=identity, triplet=triplet, accuracy=right, grad_norm=norm)
        log.record(step, lr, values, sample["index"], ~logits.sum(1).isfinite())
        epoch, rest = divmod(step + 1, batches.steps_per_epoch)
        ends_epoch = rest == 0 and step + 1 < total
        if cfg.eval_every and ends_epoch and epoch % cfg.eval_every == 0:
            log.flush()
            result = evaluate(cfg, model, query, gallery, ranks)
            log.write(step=step + 1, epoch=epoch, **figures_of(result))
            model.train()
        if log.saves(step):
            log.flush()  # never save a broken model
            save(cfg, model, optimizer, step + 1, ranks)
            log.stop_if_asked(step)

    log.close()
    result = evaluate(cfg, model, query, gallery, ranks)
    log.write(step=total, epoch=cfg.epochs, **figures_of(result), final=True)
    if ranks.rank == 0:
        sheets.draw_curves([cfg.out], Path(cfg.out) / "curves.png")
    report(cfg, result, query, gallery, ranks)


# ---------------------------------------------------------------------------------- model and files


def build_model(cfg, people=None):
    """→ (model, a sentence). With weights=, model and input size come from that file."""
    meta, sentence = take_settings(cfg, "finetune_reid.py", "people", "token", "bnneck")
    encoder, about = build_encoder(cfg, cfg.token in READ_POSE, cfg.drop_path, 0.2)
    people = int(meta["people"]) if meta else people
    model = ReID(encoder, cfg.token, people, cfg.bnneck)
    if meta:
        common.load_weights(model, common.load_checkpoint(cfg.weights), cfg.weights)
    return model, sentence or about


def save(cfg, model, optimizer, step, ranks):
    """Weights alone (the model's for eval_only and predict), then everything to resume: after a
    kill in between these steps are repeated, so the files always agree."""
    if ranks.rank == 0:
        out, meta = Path(cfg.out), meta_of(model.encoder)
        common.save_weights(out / "encoder.safetensors", model.encoder, **meta)
        meta |= dict(token=cfg.token, bnneck=cfg.bnneck, people=model.classifier.out_features)
        common.save_weights(out / "model.safetensors", model, **meta)
        weights, state = model.state_dict(), optimizer.state_dict()
        common.save_checkpoint(out / "last.pt", model=weights, optimizer=state, step=step)


# --------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def embed(cfg, model, people, ranks):
    """Pictures → (N, D) float32 of length 1, on every rank; each rank computes its part."""
    model.eval()
    rows = common.rank_share(len(people.files), ranks)
    dataset = ResizedPictures(people, (cfg.height, cfg.width), rows)
    parts = []
    for images in DataLoader(dataset, cfg.eval_batch, num_workers=cfg.workers):
        with common.autocast(ranks.device, cfg.precision):
            features = model.embed(normalize(images.to(ranks.device)))
        parts.append(features.cpu().numpy())
    return np.concatenate(common.gather_objects(parts))


def evaluate(cfg, model, query, gallery, ranks):
    """→ ranking_metrics, "features" (of queries, of gallery) and, if asked, "reranked" (metrics).

    The features are made by all ranks. Rank 0 ranks them (the other ranks get the features only),
    with the threads of all ranks, because torchrun gives each rank only one.
    """
    q, g = embed(cfg, model, query, ranks), embed(cfg, model, gallery, ranks)
    result = {"features": (q, g)}
    if ranks.rank == 0:
        threads = torch.get_num_threads()
        torch.set_num_threads(max(threads, min(ranks.world * threads, os.cpu_count())))
        known = gallery.ids, gallery.cameras
        result |= ranking.evaluate_features(q, query.ids, query.cameras, g, *known)
        if cfg.rerank:
            real = gallery.ids != -1  # junk must not shape the neighbourhoods either
            known = query.ids, query.cameras, gallery.ids[real], gallery.cameras[real]
            result["reranked"] = ranking.rank_chunks(ranking.reranked_chunks(q, g[real]), *known)
        torch.set_num_threads(threads)
    common.barrier()
    return result


def figures_of(result):
    """mAP and CMC at 1, 5, 10 as fractions, and the re-ranked ones; {} where nothing was ranked."""
    figures = {}
    for name, metrics in (("", result), ("reranked_", result.get("reranked", {}))):
        if "mAP" in metrics:
            cmc = metrics["cmc"]
            figures[f"{name}mAP"] = metrics["mAP"]
            for k in (1, 5, 10):
                figures[f"{name}rank{k}"] = float(cmc[min(k, len(cmc)) - 1])
    return figures


def evaluate_only(cfg, ranks):
    """The figures of a finished run's model; no training picture is needed."""
    _, query, gallery, about = read_data(cfg.data, cfg.layout, None, cfg.query, cfg.gallery)
    model, sentence = build_model(cfg)
    if common.open_run(cfg, KEYS, ranks) == "finished":
        return
    if ranks.rank == 0:
        print(f"{about}; {sentence}", file=sys.stderr)
    result = evaluate(cfg, model.to(ranks.device), query, gallery, ranks)
    report(cfg, result, query, gallery, ranks)


def report(cfg, result, query, gallery, ranks):
    """metrics.json, ranked_lists.png, and the line people look at; the run is done."""
    if ranks.rank == 0:
        figures, Q = figures_of(result), len(query.ids)
        counts = {"queries": Q, "queries_without_match": result["unmatched"]}
        counts["gallery"] = len(gallery.ids)
        common.write_json(Path(cfg.out) / "metrics.json", counts | figures)
        draw(cfg, result, query, gallery)
        common.finish_run(cfg.out)
        line = f"{cfg.out}: " + "  ".join(f"{name} {v:.4f}" for name, v in figures.items())
        if result["unmatched"]:
            line += f", {result['unmatched']} of {Q} queries without a match left out"
        print(line)
    common.barrier()


def draw(cfg, result, query, gallery):
    """ranked_lists.png: what was found for queries of best, median and worst average precision."""
    each, columns = 3, 10
    n = len(result["ap"]) - result["unmatched"]
    order = np.argsort(-result["ap"], kind="stable")[:n]  # queries without a match (NaN) come last
    middle = n // 2 - each // 2
    places = {*range(each), *range(middle, middle + each), *range(n - each, n)}
    q, g = result["features"]
    rows, labels = [], []
    for place in sorted(places & set(range(n))):
        i = order[place]
        person, camera = query.ids[i], query.cameras[i]
        dropped = (gallery.ids == person) & (gallery.cameras == camera) | (gallery.ids == -1)
        distance = np.where(dropped, np.inf, 1 - g @ q[i])
        nearest = np.argsort(distance, kind="stable")[: min(columns, (~dropped).sum())]
        answers = [(gallery.load(j), gallery.ids[j] == person) for j in nearest]
        rows.append((query.load(i), answers))
        ap = result["ap"][i]
        labels.append(f"{place + 1} of {n}\nperson {person}\ncamera {camera}\nAP {ap:.3f}")
    figures = f"mAP {result['mAP']:.3f}, rank-1 {result['cmc'][0]:.3f}"
    title = f"Best, median and worst queries: {figures}"
    sheets.ranked_lists(rows, Path(cfg.out) / "ranked_lists.png", labels, title)


# ------------------------------------------------------------------------------- predict and checks


def predict(cfg, ranks):
    """A folder of pictures, or one → embeddings.npz and, for the first 40 pictures, nearest.png.

    embeddings.npz: files (N,) text, embeddings (N, D) float32 of length 1, nearest (N, k) row
    numbers of the k = min(10, N − 1) most alike others, similarity (N, k) their cosines.
    """
    shown, columns = 40, 10
    people = read_pictures(cfg.predict)
    model, sentence = build_model(cfg)
    if common.open_run(cfg, KEYS, ranks) == "finished":
        return
    if ranks.rank == 0:
        print(sentence, file=sys.stderr)
    z = embed(cfg, model.to(ranks.device), people, ranks)
    if ranks.rank == 0:
        out, N = Path(cfg.out), len(z)
        k = min(columns, N - 1)
        nearest, similarity = ranking.nearest_others(z, k)
        files = np.array([name.decode() for name in people.files])
        arrays = dict(files=files, embeddings=z, nearest=nearest, similarity=similarity)
        common.write_npz(out / "embeddings.npz", arrays)
        wrote = f"wrote {out}/embeddings.npz ({N} pictures x {z.shape[1]})"
        if k:  # there are others
            title = f"The {k} most alike pictures"
            title += f" (first {shown} of {N})" if N > shown else ""
            lists = []
            for i in range(min(shown, N)):
                lists.append((people.load(i), [(people.load(j), None) for j in nearest[i]]))
            sheets.ranked_lists(lists, out / "nearest.png", files[:shown].tolist(), title)
            wrote += ", nearest.png"
        common.finish_run(out)
        print(wrote)
    common.barrier()


def check(cfg):
    check_job(cfg, KEYS)
    if not cfg.predict and not cfg.data:
        need = "give the root of Market-1501, MSMT17 or one of the same layout"
        raise UserError(f"data= names no folder; {need}")


if __name__ == "__main__":
    common.run_stage(main)
