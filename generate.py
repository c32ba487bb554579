"""Stage 1 of GenPoCCL: one pose + one prompt → K pictures of it (paper, Fig. 1 and 3).

A pose's K pictures share skeleton and prompt. Only the noise seed differs, and with it person,
clothes and place [paper].

Inputs   COCO keypoint JSON (the pictures themselves are not needed) and COCO captions JSON, or a
         prompt template, or a file of prompts. The puppet needs nothing: it can sample poses.
Outputs  in `out`: images/POSE_K.jpg, one person each (shards=true: in images/NUMBER.tar);
         annotations.json (COCO-17 keypoints, pose_id, caption, seed: docs/annotations.md);
         summary.json; sheet.png (a row is a pose, its first picture the drawn condition).

  python generate.py --cfg configs/generate_demo.yaml                           # puppet, laptop
  torchrun --nproc_per_node=8 generate.py --cfg configs/generate_coco_t2i.yaml  # paper's GenCOCO

Backends: t2i_adapter (Stable Diffusion 1.4 + T2I-Adapter, the paper's), controlnet (SD 1.5), text
(SD alone: K pictures of one prompt, in any pose, as StableRep and SynCLR train on), and puppet,
drawn people without weights or network (puppet/), who also make a set for the downstream tasks,
task=people. A killed run, started again with any number of ranks, makes what is missing.

Legend: K pictures of a pose · n people of one source picture (joints are always COCO's 17) · sizes
are (W, H), PIL's order · px, pixel centres at whole numbers; third column of keypoints 0 = missing.
"""

import common  # first: Ctrl-C while the libraries load

# isort: split
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

import puppet
from common import UserError
from drawing import skeletons
from formats.coco import MIN_SCORE, Limits, other_joints, read_people, write_people
from formats.prompts import check_prompts, people_of_prompts, read_prompts
from plumbing import chunks, diffusion
from plumbing.config import MACHINE, Key, read_config
from tasks.recognition import PoseEstimator

# Another condition is one more entry: (backend, its name) → (draw, its adapter on the hub or None).
# draw(people, size) gets the people of a picture, each (17, 3) px, and its size; it returns a PIL
# picture such as the adapter was trained on. A backend's first entry is its condition=auto.
blended = partial(skeletons.draw_openpose, blend=True)
CONDITIONS = {
    ("t2i_adapter", "keypose"): (skeletons.draw_keypose, "TencentARC/t2iadapter_keypose_sd14v1"),
    ("t2i_adapter", "openpose"): (blended, "TencentARC/t2iadapter_openpose_sd14v1"),
    ("controlnet", "openpose"): (skeletons.draw_openpose, "lllyasviel/control_v11p_sd15_openpose"),
    ("text", "none"): (lambda people, size: Image.new("RGB", size), None),  # no network is shown it
}

KEYS = dict(
    out=Key("runs/generate", "run folder"),
    task=Key("pretrain", "pretrain: pose-consistent pictures; people: for the downstream tasks",
             choices=("pretrain", "people")),
    backend=Key("puppet", "picture generator", "[paper] t2i_adapter; text: [StableRep] [SynCLR]",
                ("t2i_adapter", "controlnet", "text", "puppet")),
    positives=Key("auto", "what a group's pictures share; auto: prompt with text, else pose",
                  "[paper] pose; prompt: [StableRep] [SynCLR]", ("auto", "pose", "prompt")),
    seed=MACHINE["seed"],
    # poses and prompts
    annotations=Key(None, "COCO JSON of poses; none: the puppet samples them", "[paper] COCO"),
    captions=Key(None, "COCO captions JSON; one is drawn by seed", "[paper]; which [silent]"),
    prompt_template=Key(None, "prompt of pictures without caption; {a|b} draws one by seed"),
    prompt_file=Key(None, "text file, a prompt per line, one drawn by seed for such pictures"),
    negative_prompt=Key("", "what the pictures should not show",
                        "[silent]; [T2I-Adapter]'s script has a list of flaws"),
    pictures_per_pose=Key(5, "K, pictures of each pose", "[paper, inferred]", low=1),
    poses=Key(0, "take the first so many; 0: all (the sampling puppet needs a number)", low=0),
    first_pose=Key(0, "number of the first sampled pose; of given ones, how many to skip", low=0),
    min_score=Key(MIN_SCORE, "joints visible from this score on, where annotations hold "
                  "scores", "[HRNet] [ViTPose]", low=0.01, high=1),
    min_joints=Key(1, "leave out people with fewer joints", "[silent]", low=1, high=17),
    min_side=Key(0, "leave out people whose crop has a shorter side, px", "[silent]", low=0),
    max_bad_boxes=Key(0, "boxes without area on their picture left out at most, counted", low=0),
    # diffusion
    model=Key(None, "Stable Diffusion, hub id or folder; none: the backend's", "[paper] SD 1.4"),
    condition=Key("auto", "how skeletons are drawn; auto: the backend's first", "[silent]",
                  ("auto", *dict.fromkeys(condition for _, condition in CONDITIONS))),
    adapter=Key(None, "the condition's network, hub id or folder; none: its default", "[paper]"),
    adapter_weight=Key(1.0, "strength of the condition", "[T2I-Adapter]", low=0.0),
    resolution=Key(512, "about resolution² pixels, sides multiples of 64", "[T2I-Adapter]", low=64),
    scheduler=Key("dpm++", "sampler", "[silent]; ddim [T2I-Adapter]", tuple(diffusion.SAMPLERS)),
    steps=Key(20, "denoising steps", "[DPM-Solver++] 15 to 20; [T2I-Adapter] 50 of ddim", low=1),
    guidance=Key(7.5, "classifier-free guidance", "[T2I-Adapter]", low=0.0),
    batch=Key(8, "whole pictures painted at once; another value changes the last bits", low=1),
    retries=Key(3, "further seeds for a picture that the safety checker or audit refuses", low=0),
    precision=Key("auto", "auto: bf16; fp16 on a GPU without it in hardware; fp32 on the CPU",
                  choices=("auto", "fp32", "bf16", "fp16")),
    audit=Key("none", "check the pose of each person painted", choices=("none", "vitpose")),
    audit_model=Key("usyd-community/vitpose-base-simple", "pose estimator, hub id or folder"),
    audit_threshold=Key(0.5, "people of smaller OKS with their pose are refused", low=0, high=1),
    # files and work
    picture_format=Key("jpg", "jpg or png", choices=("jpg", "png")),
    quality=Key(95, "JPEG quality", low=1, high=100),
    shards=Key(False, "write a tar file per chunk in place of loose pictures (docs/data.md)"),
    chunk=Key(32, "units that ranks and workers take at a time: what a kill can cost", low=1),
    sheet_rows=Key(10, "poses, or people, on the contact sheet", low=1),
    device=MACHINE["device"],
) | puppet.KEYS  # fmt: skip


def main():
    cfg = read_config(KEYS, __doc__)
    asked = SimpleNamespace(**vars(cfg))  # for config.yaml, before `check` fills in defaults
    check(cfg)
    device = "cpu" if cfg.backend == "puppet" else cfg.device
    ranks = common.start_ranks(device, cfg.precision)
    out = Path(cfg.out)
    # A finished run ends here, before its inputs are read.
    if (out / "done").exists():
        if chunks.is_finished(common.open_run(asked, KEYS, ranks), out, ranks):
            return

    # Poses and prompts. What can be wrong with them is found before the run folder is made.
    people, rows, left_out, about = None, None, Counter(), "poses sampled by the puppet"
    prompts = None
    if cfg.annotations:
        people, rows, left_out, about = read_poses(cfg)
    elif cfg.backend == "text":
        people, prompts, about = people_of_prompts(cfg)
        rows = range(len(people.files))
    if cfg.task == "people":
        units, make = puppet.people_set.plan(cfg)
    elif cfg.backend == "puppet":
        units, make = puppet.pose_set.plan(cfg, people, rows)
    else:
        units, make = plan_painting(cfg, people, rows, prompts, ranks.device)
    if chunks.is_finished(common.open_run(asked, KEYS, ranks), out, ranks):
        return
    files = [file for file in (cfg.annotations, cfg.captions, cfg.prompt_file) if file]
    chunks.check_same_inputs(out, {file: Path(file).read_bytes() for file in files}, ranks)

    # Pictures, a chunk at a time, shared out to all ranks. What is there already stays.
    work = chunks.Chunks(cfg, units, make)
    mine = work.missing(ranks)
    common.barrier()
    log = common.open_log(out / "log.jsonl", work.recorded()) if ranks.rank == 0 else None
    progress = chunks.Progress(work, log, about)
    for pictures in work.made(mine, cfg.workers if cfg.backend == "puppet" else 0):
        progress.add(pictures)
    if ranks.rank > 0:  # rank 0 alone waits for all chunks and writes about them
        return
    progress.wait_for_ranks()

    # Records → annotations.json, sheet.png, summary.json.
    if cfg.task == "people":
        summary = puppet.people_set.write_lists(cfg, work)
    else:
        summary = write_lists(cfg, work, left_out)
    summary["pictures_per_second"] = progress.rate(summary["pictures"])
    common.write_json(out / "summary.json", summary)
    chunks.mark_done(out)
    chunks.report(out)


# -------------------------------------------------------------------------------- poses and prompts


def read_poses(cfg):
    """→ (People with COCO-17 joints, everybody; rows (n,) to make pictures of; Counter of people
    left out and why; a sentence about what was read)."""
    limits = Limits(min_score=cfg.min_score, max_bad_boxes=cfg.max_bad_boxes)
    limits = limits._replace(check_pictures=False)  # nothing is read but their poses
    given, notes = read_people(cfg.annotations, limits=limits)
    people = puppet.coco17(given)
    known = len(set(given.joints) & set(people.joints))
    about = f"{len(people.files)} people, {known} of COCO's 17 joints recognised"
    about += other_joints(given.joints)
    if notes["scores"]:
        about += f", visible from a score of {cfg.min_score:g}"
    scale = 1.0  # a crop has the sides of its box in the painted picture
    if cfg.backend != "puppet":
        scale = diffusion.painted_size(people.size, cfg.resolution) / people.size
    few = (people.keypoints[:, :, 2] > 0).sum(1) < cfg.min_joints
    small = ~few & ((people.boxes[:, 2:] * scale).min(1) < cfg.min_side)
    left_out = Counter({f"with fewer than {cfg.min_joints} joints": int(few.sum())})
    left_out[f"smaller than {cfg.min_side} px"] = int(small.sum())
    left_out |= {"with bad boxes": notes["bad_boxes"], "crowds": notes["crowds"]}
    if notes["clipped"]:
        about += f", {notes['clipped']} boxes cut to their picture"
    rows = np.flatnonzero(~few & ~small)[cfg.first_pose :][: cfg.poses or None]
    if len(rows) == 0:
        why = f"min_joints={cfg.min_joints}, min_side={cfg.min_side}; {about}"
        raise UserError(f"{cfg.annotations}: no person is left ({why})")
    if people.annotation_id[rows].min() < 0:
        why = "it would be a pose_id, and below 0 stands for no pose"
        raise UserError(f"{cfg.annotations}: an annotation has an id below 0: {why}")
    return people, rows, +left_out, about


# ------------------------------------------------------- diffusion: from a pose to K pictures of it


def plan_painting(cfg, people, rows, prompts, device):
    """→ (ids of the source pictures, make(ids) → ([(files, row)], pictures painted again)).

    prompts: {image id: text} of backend=text, else None.
    """
    # A whole picture is painted, with all its people; those wanted are cropped [paper, Fig. 3].
    wanted = rows_by_picture(people, rows)
    everybody = rows_by_picture(people, range(len(people.files)))
    prompts = prompts or read_prompts(cfg, list(wanted))
    pipe = diffusion.load_painter(cfg, device)
    diffusion.say_cut(pipe.tokenizer, prompts)
    auditor = None
    if cfg.audit == "vitpose":
        auditor = PoseEstimator(cfg.audit_model, "audit_model", device)

    def make(ids):
        sources = [Source(cfg, people, everybody[i], wanted[i], prompts[i]) for i in ids]
        return paint_chunk(cfg, sources, pipe, auditor)

    return list(wanted), make


def rows_by_picture(people, rows):
    """→ {image id: rows}, in order of first appearance."""
    groups = {}
    for row in rows:
        groups.setdefault(int(people.image_id[row]), []).append(int(row))
    return groups


class Source:
    """One source picture at the size it is painted: its drawn condition, and whom to crop."""

    def __init__(self, cfg, people, everybody, rows, prompt):
        """everybody: rows of `people` in this picture, all drawn; rows: those to crop."""
        self.image_id, self.prompt = int(people.image_id[rows[0]]), prompt
        self.pose_ids = people.annotation_id[rows].tolist()
        self.size = tuple(diffusion.painted_size(people.size[rows[0]], cfg.resolution).tolist())
        self.scale = np.array(self.size) / people.size[rows[0]]
        # Everyone, because everyone may be cropped.
        draw, _ = CONDITIONS[cfg.backend, cfg.condition]
        self.condition = draw(self.moved(people.keypoints[everybody]), self.size)
        self.keypoints = self.moved(people.keypoints[rows])
        self.boxes = people.boxes[rows] * np.tile(self.scale, 2)
        self.areas = people.area[rows] * self.scale.prod()

    def moved(self, keypoints):
        """(n, 17, 3) px of the source picture → px of the painted one."""
        # A pixel's centre is a whole number, its corner half a pixel before it.
        xy = (keypoints[..., :2] + 0.5) * self.scale - 0.5
        return np.concatenate([xy, keypoints[..., 2:]], -1) * (keypoints[..., 2:] > 0)

    def crop(self, picture, n):
        """Person n cut out by the box [paper, Fig. 3]; the joints follow [inferred].

        → (PIL picture, (17, 3)). A joint that the box cuts off is missing in the crop.
        """
        # The whole pixels that the box touches, within the picture and at least one.
        x, y, w, h = self.boxes[n]
        low = np.floor([x, y]).astype(int)
        high = np.minimum(np.ceil([x + w, y + h]), self.size).astype(int)
        high = np.maximum(high, low + 1)
        keypoints = self.keypoints[n] - [*low, 0]
        xy, seen = keypoints[:, :2], keypoints[:, 2] > 0
        inside = ((xy >= -0.5) & (xy < high - low - 0.5)).all(1)
        return picture.crop((*low.tolist(), *high.tolist())), keypoints * (inside & seen)[:, None]


def picture_seed(cfg, image_id, k, attempt=0):
    """Noise seed of picture k of a source picture; a refused one is painted with the next."""
    return common.seed_of(common.PICTURE, cfg.seed, image_id, k, attempt)


def paint(pipe, cfg, conditions, prompts, seeds):
    """Whole pictures of the size of their conditions, which is one; None where one is refused."""
    # Drawn on the CPU, so that the noise is the same on any device.
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    width, height = conditions[0].size
    shown = {}  # backend=text shows no condition: only its size counts
    if cfg.backend != "text":
        shown = {"image": conditions, diffusion.MODELS[cfg.backend][1]: cfg.adapter_weight}
    # One entry per picture. With num_images_per_prompt > 1 diffusers repeats the prompts AABB but
    # the adapter's features ABAB, and poses get each other's prompts.
    result = pipe(
        prompt=prompts, generator=noise, width=width, height=height,
        negative_prompt=[cfg.negative_prompt] * len(prompts), num_images_per_prompt=1,
        num_inference_steps=cfg.steps, guidance_scale=cfg.guidance, output_type="np", **shown,
    )  # fmt: skip
    return diffusion.accepted(pipe, result)


def paint_chunk(cfg, sources, pipe, auditor):
    """K pictures of each source, its people cropped. → ([(files, row)], pictures painted again)."""
    kept, painted, again = {}, set(), 0  # kept: (pose, k) → (files, row)
    for attempt in range(cfg.retries + 1):
        todo = []  # a picture is painted again while one of its people is missing
        for source in sources:
            for k in range(cfg.pictures_per_pose):
                if any((pose, k) not in kept for pose in source.pose_ids):
                    todo.append((source, k))
        again += len(todo) if attempt else 0
        for batch in chunks.same_size(todo, cfg.batch):
            # The same skeleton and prompt for all K: only the seed differs [paper].
            conditions = [source.condition for source, _ in batch]
            prompts = [source.prompt for source, _ in batch]
            seeds = [picture_seed(cfg, source.image_id, k, attempt) for source, k in batch]
            pictures = paint(pipe, cfg, conditions, prompts, seeds)
            for (source, k), seed, picture in zip(batch, seeds, pictures):
                if picture is not None:
                    painted.update(source.pose_ids)
                    people = crop_people(cfg, source, k, seed, picture, auditor)
                    for key, person in people.items():
                        kept.setdefault(key, person)
    rows = []
    for pose in (pose for source in sources for pose in source.pose_ids):
        mine = [kept[pose, k] for k in range(cfg.pictures_per_pose) if (pose, k) in kept]
        # A pose without all its K pictures is left out: Stage 2 wants whole groups.
        if len(mine) < cfg.pictures_per_pose:
            reason = "not finite, black or refused by the safety checker"
            if auditor and pose in painted:
                reason = "refused by the audit"
            mine = [({}, dict(pose_id=pose, skipped=reason))]
        rows += mine
    return rows, again


def crop_people(cfg, source, k, seed, picture, auditor):
    """→ {(pose, k): (files, row)} of the people in one painted picture that pass the audit."""
    if auditor:
        oks = auditor.agreement(picture, source.boxes, source.keypoints, source.areas)
    people = {}
    for n, pose in enumerate(source.pose_ids):
        if auditor and oks[n] < cfg.audit_threshold:
            continue
        crop, keypoints = source.crop(picture, n)
        row = chunks.person_row(keypoints, [0, 0, *crop.size], float(source.areas[n]))
        row |= dict(pose_id=pose, k=k, caption=source.prompt, seed=seed)
        if cfg.annotations:
            row |= dict(source_image_id=source.image_id, source_annotation_id=pose)
        if auditor:
            row["oks"] = round(float(oks[n]), 4)
        row |= dict(file_name=f"{pose}_{k}.{cfg.picture_format}", size=crop.size)
        people[pose, k] = {f"images/{row['file_name']}": crop}, row
    return people


def write_lists(cfg, work, left_out):
    """Records → annotations.json and sheet.png. → what summary.json says."""
    summary, skipped = work.summary(cfg.pictures_per_pose)
    left_out = Counter(row["skipped"] for row in skipped) + left_out
    if not summary["poses"]:
        source = cfg.annotations or cfg.captions or "prompts"
        none = f"no {cfg.positives} of {source} gave {cfg.pictures_per_pose} pictures"
        raise UserError(f"{none}: {', '.join(left_out)}; nothing to write in {cfg.out}")
    info = f"generate.py, {cfg.backend}, seed {cfg.seed}; pictures of one pose_id share their "
    info += f"{cfg.positives}; fields: docs/annotations.md"
    write_people(Path(cfg.out) / "annotations.json", info, work.pictures)
    puppets, prompts = cfg.backend == "puppet", cfg.positives == "prompt"
    draw = skeletons.draw_keypose if puppets else CONDITIONS[cfg.backend, cfg.condition][0]
    draw = None if prompts else draw  # pictures of a prompt share no pose to draw
    title = f"{cfg.backend}: every row one {cfg.positives}, every column one seed"
    shown = work.groups(summary["poses"], cfg.pictures_per_pose, cfg.sheet_rows)
    # Pictures of a group share their prompt, but for the puppet's of one pose.
    skeletons.condition_sheet(shown, draw, cfg.out, title, captions=prompts or not puppets)
    return summary | dict(left_out=dict(left_out), poses_skipped=skipped[:100])


# ------------------------------------------------------------------------------------------- checks


def check(cfg):
    """What single keys cannot say. Fills in the defaults that depend on the backend."""
    if cfg.task == "people":
        puppet.people_set.check(cfg)
    if cfg.positives == "auto":
        cfg.positives = "prompt" if cfg.backend == "text" else "pose"
    if cfg.backend == "puppet":
        puppet.pose_set.check(cfg, KEYS)
        return
    check_prompts(cfg, KEYS)
    own = [condition for backend, condition in CONDITIONS if backend == cfg.backend]
    if cfg.condition == "auto":
        cfg.condition = own[0]
    if cfg.condition not in own:
        raise UserError(f"backend={cfg.backend} takes condition={' or '.join(own)}")
    cfg.model = cfg.model or diffusion.MODELS[cfg.backend][0]
    if cfg.backend == "text":
        return
    cfg.adapter = cfg.adapter or CONDITIONS[cfg.backend, cfg.condition][1]
    if cfg.adapter is None:
        raise UserError(f"condition={cfg.condition} has no adapter by default; give adapter=")


if __name__ == "__main__":
    common.run_stage(main)
