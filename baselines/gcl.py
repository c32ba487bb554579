"""GCL with capsule guide: a generator turns people round, a contrast makes one of all their views.

Chen, Wang, Lagadec, Dantcheva, Bremond, CVPR 2021 (arXiv 2012.09071): person ReID without labels.

    a, f = E_id(x)   x_rec = G(s, a)   x_nv = G(s', a)   g = E_id(x_nv)   x_cyc = G(s, E_id(x_nv))
    L_G = adv(x_rec) + adv(x_nv) + adv(x_cyc) + 5·|x_rec − x| + 5·|x_cyc − x|
          + 5·|a_rec − a| + 5·|a_cyc − a| + L_mem
    L_mem = CE(g·M_i) + CE(g·M_j) + CE(f·M_j')      j, j': random members of i's cluster

s, s': the body as it stands and turned about the vertical by a multiple of 45°, through E_str.
Stages: (1) a pre-trained E_id, init=; (2) E_id frozen, no L_mem; (3) jointly, each epoch with new
pseudo-labels: DBSCAN on k-reciprocal distances of the memory M.

Kept: all terms, weights, networks, optimisers, memory and clustering. Deviations:
  E_id is this project's ViT in place of a ResNet-50 of JVTC: any encoder, of pretrain.py without a
    label, or fine-tuned on labelled other people (the paper's domain adaptation; so in the demo, on
    a generated set, because pretrain.py's tokens tell poses, not people). Stripes and embedding
    come from patch tokens. Its linear layer and batch norm begin random and with the statistics
    of the training set; JVTC's are trained.
  The guide is a body of capsules, not a mesh (which wants a body model under licence): from the
    known 3-D joints of the puppet's people, or lifted from 2-D joints, or your own renders.
  All seven turns are drawn; the release's range ends before 315°.
  Dilated convolutions replicate their border; the layer norm's scale starts at 1.
  The k-reciprocal distances are [Zhong 2017]'s own, scaled by the farthest picture; the release
    takes SpCL's, which leaves the scale out and counts the picture among its k1.
  An epoch of stage 3 is as long as one of stage 2: clustered pictures are shown again.
  The last epoch is reported; the release keeps the best one on the test set.
One process: the memory, its labels and the batch statistics of E_id belong to one. torchrun is
refused.

Inputs   a ReID set (Market-1501's or MSMT17's layout), of whose ids only figures are made; guides;
         an encoder.
Outputs  in `out`: metrics.json (ReID before and after the joint stage, clusters, novel views),
         gcl.png (source, guide, reconstruction, seven turned views), encoder.safetensors (E_id),
         last.pt (everything to resume), log.jsonl, curves.png.

  python baselines/gcl.py --cfg configs/gcl_demo.yaml            # two CPU cores, six minutes

Legend: B pictures of a batch · N of the training set · S steps of an epoch · E embedding's width.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import plumbing.quiet  # noqa: F401  first: Ctrl-C while the libraries load

# isort: split
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import DBSCAN
from sklearn.metrics import normalized_mutual_info_score
from torch.utils.data import DataLoader

import common
from baselines.gcl_parts import GCL, Views, draw_sheet, read_guides, view_scores
from baselines.parts import squared_slope
from common import UserError
from drawing.curves import draw_curves
from formats.market import read_data
from formats.weights import AS_IS, build_encoder, save
from model import SIZES, normalize
from plumbing.config import MACHINE, Key, read_config
from plumbing.seeds import CHOICE, ORDER
from tasks.features import ResizedPictures
from tasks.ranking import evaluate_features, jaccard_distances

KEYS = dict(
    out=Key("runs/gcl", "run folder"),
    # data
    data=Key(None, "root folder of the ReID set"),
    layout=Key("auto", "market, msmt17, or auto", choices=("auto", "market", "msmt17")),
    guides=Key("puppet", "bodies: puppet (data= is of generate.py task=people: its 3-D joints are "
               "known), a COCO JSON file of 2-D joints, or a folder of render/, render_45/, …"),
    height=Key(256, "picture height", "[GCL]", low=32),
    width=Key(128, "picture width", "[GCL]", low=32),
    # E_id and the networks
    init=Key(None, "E_id, stage 1: the encoder to start from"),
    size=Key("base", "its size, where init= does not say it", "[HAP]", tuple(SIZES)),
    patch=Key(16, "its patch side in px, where init= does not say it", "[MAE]", low=1),
    stripes=Key(4, "stripes of E_id, and residual blocks of G they drive", "[GCL]", low=1),
    embedding=Key(512, "E: width of f and of the memory", "[GCL]", low=2),
    g_width=Key(16, "channels of E_str's first layer; G begins with 8 times as many", "[GCL]",
                low=1),
    d_width=Key(32, "channels of D's first layer", "[GCL]", low=1),
    mlp_width=Key(512, "hidden width of the layers from stripes to AdaIN", "[GCL]", low=1),
    # losses
    w_image=Key(5.0, "weight of |x_rec − x| and of |x_cyc − x|", "[GCL]", low=0),
    w_feature=Key(5.0, "weight of |a_rec − a| and of |a_cyc − a|", "[GCL]", low=0),
    r1=Key(0.01, "weight of D's squared gradient at real pictures", "[GCL]", low=0),
    tau=Key(0.04, "temperature of L_mem", "[GCL]", low=1e-3),
    negatives=Key(8192, "most negatives of L_mem", "[GCL]", low=1),
    momentum=Key(0.2, "how much of the old memory stays", "[GCL]", low=0, high=0.999),
    # clusters
    k1=Key(30, "k-reciprocal neighbours", "[GCL]", low=1),
    k2=Key(6, "query expansion", "[GCL]", low=1),
    rho=Key(0.002, "eps = mean of this share of all distances, the lowest", "[GCL]", low=1e-9,
            high=1),
    min_samples=Key(4, "of DBSCAN", "[GCL]", low=1),
    # schedule
    frozen_epochs=Key(40, "stage 2: E_id frozen", "[GCL]", low=1),
    joint_epochs=Key(20, "stage 3", "[GCL]", low=1),
    epoch_steps=Key(0, "steps of an epoch; 0: as many as the training pictures fill", low=0),
    batch=Key(16, "pictures of a step", "[GCL]", low=2),
    lr=Key(1.0e-4, "of Adam(0, .999) for E_str, G and for D", "[GCL]", low=0),
    lr_id=Key(3.5e-4, "of SGD (Nesterov, .9) for E_id; a tenth from lr_drop on", "[GCL]", low=0),
    lr_drop=Key(10, "joint epoch", "[GCL]", low=1),
    weight_decay=Key(5.0e-4, "of all three optimisers", "[GCL]", low=0),
    eval_batch=Key(128, "pictures at a time in evaluation", low=1),
    scored=Key(64, "pictures of the query whose seven novel views are scored", low=1),
) | MACHINE  # fmt: skip


def main():
    cfg = read_config(KEYS, __doc__)
    ranks = common.start_ranks(cfg.device, cfg.precision)
    check(cfg)
    if ranks.world > 1:
        why = "its memory, labels and batch statistics belong to one"
        raise UserError(f"gcl.py runs in one process, for {why}; start it without torchrun")
    train, query, gallery, about = read_data(cfg.data, cfg.layout)
    size = cfg.height, cfg.width
    train, guides, left_out = read_guides(cfg.guides, cfg.data, train, size)
    dataset = Views(train, guides, size, cfg.seed)
    S = cfg.epoch_steps or len(dataset) // cfg.batch  # steps of an epoch
    if len(dataset) < cfg.batch:
        raise UserError(f"batch={cfg.batch} is larger than the {len(dataset)} training pictures")
    common.seed_all(common.WEIGHTS, cfg.seed)
    model, sentence = build_model(cfg, len(dataset))
    if common.open_run(cfg, KEYS, ranks) == "finished":
        return
    model.to(ranks.device)
    adam = dict(lr=cfg.lr, betas=(0.0, 0.999), weight_decay=cfg.weight_decay)
    for_g = torch.optim.Adam([*model.e_str.parameters(), *model.g.parameters()], **adam)
    for_d = torch.optim.Adam(model.d.parameters(), **adam)
    for_id = torch.optim.SGD(model.e_id.parameters(), lr=cfg.lr_id, momentum=0.9, nesterov=True,
                             weight_decay=cfg.weight_decay)  # fmt: skip
    state = common.resume(Path(cfg.out) / "last.pt", model, for_g)
    first, total = state["step"], (cfg.frozen_epochs + cfg.joint_epochs) * S
    report = state.get("report", {})  # figures on the way
    if first:
        for_d.load_state_dict(state["for_d"])
        for_id.load_state_dict(state["for_id"])
    else:
        fit_batch_norm(cfg, model.e_id, train, ranks.device)
    batches = SimpleNamespace(size=cfg.batch, steps_per_epoch=S)
    log = common.StepLog(cfg, ranks, dataset, batches, first, total)
    log.say(f"{about}; {left_out} training pictures without a guide left out; {sentence}; {S} "
            f"steps an epoch, E_id frozen for the first {cfg.frozen_epochs * S}")  # fmt: skip

    def prepare(step):
        """What an epoch of the joint stage begins with: a memory, and labels from it."""
        if step == cfg.frozen_epochs * S:
            model.memory.copy_(embed(cfg, model.e_id, train, ranks.device))
            report["before"] = evaluate(cfg, model, query, gallery, ranks.device)
            log.write(step=step, epoch=step // S, **report["before"])
        labels, figures = pseudo_labels(cfg, model.memory.cpu().numpy(), train.ids)
        model.labels.copy_(torch.from_numpy(labels))
        report.setdefault("clusters", []).append(figures)
        log.write(step=step, epoch=step // S, **figures)

    for epoch in range(first // S, total // S):
        joint = epoch >= cfg.frozen_epochs
        rows = np.flatnonzero(model.labels.cpu() >= 0) if joint else np.arange(len(dataset))
        begin = max(first, epoch * S)  # within an epoch after a kill
        todo = epoch_batches(cfg, rows, epoch, S)[begin - epoch * S :]
        todo = [[(epoch, int(row)) for row in batch] for batch in todo]
        loader = common.training_loader(dataset, todo, cfg.workers, ranks.device)
        model.e_id.train(joint).requires_grad_(joint)
        drops = joint and epoch - cfg.frozen_epochs >= cfg.lr_drop
        common.set_learning_rate(for_id, cfg.lr_id * (0.1 if drops else 1.0))
        for step, sample in enumerate(loader, begin):
            x = normalize(sample["image"].to(ranks.device, non_blocking=True))
            body = sample["guide"].to(ranks.device, non_blocking=True) / 127.5 - 1
            turned = sample["turned"].to(ranks.device, non_blocking=True) / 127.5 - 1
            index = sample["index"].to(ranks.device, non_blocking=True)

            # x → x' → x'': a person is redrawn, turned, and turned back.
            with common.autocast(ranks.device, cfg.precision):
                s, s_nv = model.e_str(body), model.e_str(turned)
                a, f = model.e_id(x)
                x_rec, x_nv = model.g(s, a).float(), model.g(s_nv, a).float()
                a_rec, _ = model.e_id(x_rec)
                a_nv, g = model.e_id(x_nv)
                x_cyc = model.g(s, a_nv).float()
                a_cyc, _ = model.e_id(x_cyc)

            loss_d = discriminator_loss(model.d, x, [x_rec, x_nv, x_cyc], cfg.r1)
            for_d.zero_grad(set_to_none=True)
            loss_d.backward()
            for_d.step()

            model.d.requires_grad_(False)
            adv = sum(adversarial_loss(model.d(fake)) for fake in (x_rec, x_nv, x_cyc))
            model.d.requires_grad_(True)
            rec, cyc = F.l1_loss(x_rec, x), F.l1_loss(x_cyc, x)
            feature = F.l1_loss(a_rec, a.detach()) + F.l1_loss(a_cyc, a.detach())
            memory = torch.zeros_like(adv)
            if joint:
                f, g = F.normalize(f.float()), F.normalize(g.float())
                key = CHOICE, cfg.seed, step
                noise = common.rank_noise(key, 3 * cfg.batch, len(dataset), ranks)
                noise = noise.unflatten(0, (3, -1))
                bank = model.memory.clone(), model.labels, index
                memory = memory_loss(f, g, bank, noise, cfg.negatives, cfg.tau)
                update_memory(model.memory, f.detach(), index, cfg.momentum)
            loss = adv + cfg.w_image * (rec + cyc) + cfg.w_feature * feature + memory
            for_g.zero_grad(set_to_none=True)
            for_id.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.get_total_norm(p.grad for p in model.g.parameters())
            for_g.step()
            if joint:
                for_id.step()

            values = dict(loss=loss, adv=adv, rec=rec, cyc=cyc, feature=feature, memory=memory)
            values |= dict(d=loss_d, grad_norm=norm)
            log.record(step, cfg.lr, values, sample["index"], ~x_cyc.sum((1, 2, 3)).isfinite())
            if (step + 1) % S == 0 and cfg.frozen_epochs * S <= step + 1 < total:
                log.flush()
                prepare(step + 1)
            if log.saves(step):
                log.flush()  # never save a broken model
                others = dict(for_d=for_d.state_dict(), for_id=for_id.state_dict())
                encoder = model.e_id.encoder
                save(cfg.out, encoder, model, for_g, step + 1, report=report, **others)
                log.stop_if_asked(step)

    log.close()
    finish(cfg, model, (dataset, query, gallery), report, ranks.device)
    log.say(f"wrote {cfg.out}/encoder.safetensors, metrics.json, gcl.png, curves.png")


# ------------------------------------------------------------------------------------------- losses


def adversarial_loss(outputs):
    """LSGAN for G: D's maps of fakes, one for each scale → scalar.  adv = Σ_scales 2·mean (D − 1)²

    The 2 is the release's.
    """
    return sum(2 * ((out - 1) ** 2).mean() for out in outputs)


def discriminator_loss(d, real, fakes, r1):
    """LSGAN for D with R1: real (B, 3, H, W) against each of several fakes of that shape → scalar.

    L_D = Σ_fakes Σ_scales [mean D(fake)² + mean (D(x) − 1)² + r1 · mean_b ‖∂ Σ D(x) / ∂x_b‖²]
    D has no batch statistics, so what it says of real pictures is computed once.
    """
    real = real.detach().requires_grad_()
    told, fooled = 0.0, 0.0
    for out in d(real):
        told = told + ((out - 1) ** 2).mean() + r1 * squared_slope(out, real)
    for fake in fakes:
        fooled = fooled + sum((out**2).mean() for out in d(fake.detach()))
    return len(fakes) * told + fooled


def memory_loss(f, g, bank, noise, negatives, tau):
    """L_mem = CE(g·M_i) + CE(g·M_j) + CE(f·M_j'), means over the batch.

    f, g (B, E) of length 1: embeddings of x and of x_nv. bank: memory M (N, E), cluster labels (N,)
    with -1 = none, index (B,) of the batch in it. noise (3, B, N) uniform: who is j, j', and which
    pictures of other clusters, or of none, are negatives, at most `negatives`. All three share the
    negatives of g [GCL].
    """
    memory, labels, index = bank
    same = labels[index][:, None] == labels  # (B, N)
    j, j2 = (noise[k].masked_fill(~same, -1).argmax(1) for k in (0, 1))
    n = min(negatives, noise.shape[2])
    chosen = noise[2].masked_fill(same, -1).topk(n).indices
    own = same.gather(1, chosen)  # where other clusters are fewer than that
    away = (g @ memory.T).gather(1, chosen).masked_fill(own, -torch.inf)
    loss = 0.0
    for z, member in ((g, index), (g, j), (f, j2)):
        logits = torch.cat([(z * memory[member]).sum(1, keepdim=True), away], dim=1) / tau
        loss = loss + (logits.logsumexp(1) - logits[:, 0]).mean()
    return loss


@torch.no_grad()
def update_memory(memory, f, index, momentum):
    """M_i ← norm(momentum · M_i + (1 − momentum) · f), in place. f (B, E) of length 1."""
    memory[index] = F.normalize(momentum * memory[index] + (1 - momentum) * f)


def pseudo_labels(cfg, memory, ids):
    """Memory (N, E) → cluster of each picture (N,), -1 = outlier; figures about them.

    ids (N,): the truth. It is used for the figure nmi alone (of the clustered pictures).
    """
    d = jaccard_distances(memory, cfg.k1, cfg.k2)
    # eps = mean of the lowest rho of all distances between different pictures that are not 0 [GCL]
    pairs = d[np.triu(d, 1) > 0]
    lowest = np.sort(pairs)[: max(1, round(cfg.rho * len(pairs)))]
    eps = float(lowest.mean()) if len(lowest) else 1e-6  # all pictures the same
    dbscan = DBSCAN(eps=eps, min_samples=cfg.min_samples, metric="precomputed")
    labels = dbscan.fit_predict(d)
    found = labels >= 0
    nmi = float(normalized_mutual_info_score(ids[found], labels[found])) if found.any() else 0.0
    figures = dict(clusters=int(labels.max() + 1), outliers=int((~found).sum()), nmi=nmi, eps=eps)
    if found.sum() < cfg.batch:
        raise UserError(
            f"{found.sum()} of {len(labels)} pictures are in a cluster, fewer than batch="
            f"{cfg.batch}; raise rho or lower min_samples"
        )
    return labels, figures


# ---------------------------------------------------------------------------------- data and model


def epoch_batches(cfg, rows, epoch, S):
    """S batches of `rows`: f(seed, epoch)."""
    rng, batches = common.rng_of(ORDER, cfg.seed, epoch), []
    while len(batches) < S:  # shown again until the epoch is full; no batch holds a picture twice
        order = rng.permutation(rows)[: len(rows) // cfg.batch * cfg.batch]
        batches += list(order.reshape(-1, cfg.batch))
    return batches[:S]


def build_model(cfg, N):
    settings = SimpleNamespace(**AS_IS | vars(cfg) | dict(encoder=cfg.init))
    encoder, sentence = build_encoder(settings, reads_pose=False)
    return GCL(cfg, encoder, N), sentence


@torch.no_grad()
def embed(cfg, e_id, people, device, normed=True):
    """Pictures → (N, E) float32: f of length 1; or, not normed, what goes into the batch norm."""
    e_id.eval()
    dataset = ResizedPictures(people, (cfg.height, cfg.width), np.arange(len(people.files)))
    parts = []
    for images in DataLoader(dataset, cfg.eval_batch, num_workers=cfg.workers):
        with common.autocast(device, cfg.precision):
            h = e_id.features(normalize(images.to(device)))[1].float()
        parts.append(F.normalize(e_id.bn(h)) if normed else h)
    return torch.cat(parts)


def fit_batch_norm(cfg, e_id, train, device):
    """E_id's batch norm begins with the statistics of the training set, for it is frozen first."""
    h = embed(cfg, e_id, train, device, normed=False)
    e_id.bn.running_mean.copy_(h.mean(0))
    e_id.bn.running_var.copy_(h.var(0))


# ------------------------------------------------------------------------------- figures and files


def evaluate(cfg, model, query, gallery, device):
    """→ {"mAP", "rank1"} of f, by Market-1501's protocol."""
    q, g = (embed(cfg, model.e_id, people, device) for people in (query, gallery))
    found = evaluate_features(q, query.ids, query.cameras, g, gallery.ids, gallery.cameras)
    return {"mAP": found["mAP"], "rank1": float(found["cmc"][0])}


def finish(cfg, model, data, report, device):
    """metrics.json, gcl.png, curves.png, and the lines people look at; the run is done."""
    shown, query, gallery = data
    out, figures = Path(cfg.out), report | {"after": evaluate(cfg, model, query, gallery, device)}
    model.eval()
    if cfg.guides == "puppet":  # of test people, whom no step has seen, the truth is known
        people, guides, _ = read_guides(cfg.guides, cfg.data, query, shown.size)
        shown = Views(people, guides, shown.size, cfg.seed)
        figures["views"] = view_scores(model, shown, cfg.scored, device)
    draw_sheet(model, shown, device, out / "gcl.png")
    common.write_json(out / "metrics.json", figures)
    draw_curves([out], out / "curves.png")
    common.finish_run(cfg.out)
    for name in ("before", "after"):
        values = "  ".join(f"{key} {value:.4f}" for key, value in figures[name].items())
        print(f"{out}: {name:6} the joint stage  {values}")
    last = figures["clusters"][-1]
    print(f"{out}: last labels  " + "  ".join(f"{k} {v:.4g}" for k, v in last.items()))
    for name, (psnr, ssim) in figures.get("views", {}).items():
        print(f"{out}: {name:14} PSNR {psnr:5.2f} dB  SSIM {ssim:.3f}")


def check(cfg):
    if not cfg.data:
        raise UserError("data= names no folder; give the root of a ReID set in Market's layout")
    if not cfg.init:
        raise UserError("init= names no encoder, GCL's stage 1; give one, e.g. of pretrain.py")
    if cfg.height % 4 or cfg.width % 4:
        sides = f"height={cfg.height} and width={cfg.width}"
        raise UserError(f"{sides} must be multiples of 4: G doubles its maps twice")


if __name__ == "__main__":
    common.run_stage(main)
