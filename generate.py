"""Stage 1 (paper, section "pose-consistent images", Fig. 1 and 3): one pose + one prompt → K pictures of it.

A pose's K pictures share skeleton and prompt; only the noise seed differs, and with it person, clothes and scene.
Backends: t2i_adapter (Stable Diffusion 1.4 + T2I-Adapter, the paper's), controlnet (SD 1.5 + openpose ControlNet),
puppet (puppet.py: drawn people, no weights, no network; here person and scene change with k, each with its caption).

In:   COCO keypoint JSON (the pictures themselves are not needed) + captions JSON, prompt template or prompt file;
      or, for the puppet alone, nothing: it samples poses.
Out:  images/POSE_K.jpg one person each; annotations.json (COCO-17 keypoints, pose_id, caption, seed, sources, oks);
      sheet.png (row = pose, its drawn condition first); summary.json. Fields: docs/annotations.md.
      task people (puppet): people by several cameras in the other stages' official layouts; see people_set.py.

    python generate.py --cfg configs/generate_demo.yaml                          # puppet, on a laptop
    torchrun --nproc_per_node 8 generate.py --cfg configs/generate_coco_t2i.yaml  # the paper's GenCOCO

Work is shared out in chunks (chunks.py): a killed run, started again with any number of ranks, does what is missing,
and the set comes out the same. Here: poses and prompts, the puppet's pictures, the set's own files.
diffusion.py holds the diffusion half, people_set.py the set for the other tasks.

Legend: K pictures per pose (joints are always COCO's 17) · H, W picture · unit: what shares one drawn condition,
a whole source picture for diffusion, one pose (task people: one person) for the puppet.
"""

import json
import re
import shutil
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

import puppet
from common import PROMPT, WORDING, Log, open_run, rng_of, start_ranks, write_atomic
from data import COCO_CATEGORY, COCO_JOINTS, recognised, to_coco17
from drawing import pictures
from formats.coco import MIN_SCORE, read_people
from plumbing.chunks import Chunks, encoded, person_row, picture_seed, put, read_records, record_path, recorded
from plumbing.config import Key, UserError, read_config, run_stage
from plumbing.diffusion import ADAPTERS, DRAW, MODELS, Auditor, Scene, load_painter, paint_chunk, painted_size
from puppet import people_set

KEYS = {
    "out": Key("runs/generate", "run folder"),
    "task": Key("pretrain", "pretrain: pose-consistent pictures; people: a set for ReID, attributes, captions", "ours",
                ("pretrain", "people")),
    "backend": Key("puppet", "picture generator", "[paper] t2i_adapter", ("t2i_adapter", "controlnet", "puppet")),
    "annotations": Key(None, "COCO keypoint JSON with the poses; none: the puppet samples them", "[paper] COCO"),
    "captions": Key(
        None, "COCO captions JSON; one caption per picture is drawn by seed", "[paper]; which one [silent]"
    ),
    "prompt_template": Key(None, "prompt of pictures without caption; {a|b} draws one of a and b by seed"),
    "prompt_file": Key(None, "text file, a prompt per line, drawn by seed for pictures without caption"),
    "negative_prompt": Key("", "what the pictures should not show", "[silent]"),
    "pictures_per_pose": Key(5, "K, pictures of each pose", "[paper, inferred]", low=1),
    "poses": Key(0, "take the first so many poses; 0: all (the sampling puppet needs a number)", low=0),
    "first_pose": Key(0, "number of the first sampled pose; of given ones: how many to pass over", low=0),
    "min_score": Key(MIN_SCORE, "joints visible from this score on, where annotations hold scores",
                     "[HRNet] [ViTPose]", low=0.01, high=1),
    "min_joints": Key(1, "leave out people with fewer labelled joints", "[silent]", low=1, high=17),
    "min_side": Key(0, "leave out people whose crop would have a shorter side, px", "[silent]", low=0),
    "seed": Key(0, "seed of everything", low=0),
    "model": Key(None, "Stable Diffusion, hub id or folder; none: the backend's own", "[paper] SD 1.4"),
    "adapter": Key(None, "T2I-Adapter or ControlNet, hub id or folder; none: the condition's own", "[paper]"),
    "condition": Key("auto", "skeleton drawing; auto: keypose, controlnet openpose", "[silent]",
                     ("auto", "keypose", "openpose")),
    "resolution": Key(512, "pictures have about resolution² pixels, sides multiples of 64", "[T2I-Adapter]", low=64),
    "scheduler": Key("dpm++", "sampler", "[T2I-Adapter] ddim; paper silent", ("ddim", "dpm++", "euler", "pndm")),
    "steps": Key(20, "denoising steps", "[DPM-Solver++] 15 to 20; [T2I-Adapter] 50 of ddim", low=1),
    "guidance": Key(7.5, "classifier-free guidance", "[T2I-Adapter]", low=0.0),
    "adapter_weight": Key(1.0, "strength of the condition", "[T2I-Adapter]", low=0.0),
    "precision": Key("auto", "auto: bf16; fp16 on a GPU without it in hardware; fp32 on the CPU",
                     "ours", ("auto", "fp32", "bf16", "fp16")),
    "batch": Key(8, "whole pictures painted at once; another value changes the last bits", low=1),
    "retries": Key(3, "further seeds for a picture the safety checker or the audit refuses", low=0),
    "audit": Key("none", "measure each generated person's pose (not in the paper)", "ours", ("none", "vitpose")),
    "audit_model": Key("usyd-community/vitpose-base-simple", "pose estimator, hub id or folder"),
    "audit_threshold": Key(0.5, "pictures of smaller OKS with their condition are dropped", low=0.0, high=1.0),
    "height": Key(256, "puppet: picture height", "[HAP]", low=16),
    "width": Key(128, "puppet: picture width", "[HAP]", low=16),
    "parts": Key(False, "puppet: also write body-part maps, parts/*.png"),
    "persons_train": Key(751, "people: training people", "[Market-1501]", low=2),
    "persons_val": Key(100, "people: so many of them are attributes' and captions' validation split", low=0),
    "persons_test": Key(750, "people: further people, in query and gallery", "[Market-1501]", low=1),
    "cameras": Key(6, "people: cameras; everyone is seen by all", "[Market-1501]", low=2),
    "pictures_per_camera": Key(3, "people: pictures of a person by a camera", "[Market-1501] on average", low=2),
    "picture_format": Key("jpg", "jpg or png", "ours", ("jpg", "png")),
    "quality": Key(95, "JPEG quality", low=1, high=100),
    "chunk": Key(32, "units per record: what a kill can cost, and what ranks and workers take at a time", low=1),
    "sheet_rows": Key(10, "poses, or people, on the contact sheet", low=1),
    "workers": Key(0, "puppet: rendering processes; 0: this one", low=0, free=True),
    "device": Key("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"), free=True),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- poses and prompts


def check_config(cfg):
    """What single keys cannot say. Fills in the `auto` and `none` values that depend on the backend."""
    if cfg.backend == "puppet" and cfg.audit != "none":
        raise UserError("audit needs backend t2i_adapter or controlnet: the puppet is drawn at its joints")
    prompts = ("captions", "prompt_template", "prompt_file", "negative_prompt")
    for name in (*prompts, "model", "adapter", "condition"):
        if cfg.backend == "puppet" and getattr(cfg, name) != KEYS[name].default:
            raise UserError(f"the puppet takes no {name} and writes its own captions: leave it out")
    if cfg.task == "people":
        return people_set.check(cfg)
    if cfg.backend == "puppet":
        if cfg.annotations is None and cfg.poses == 0:
            raise UserError("the puppet samples poses where annotations is none: say how many with poses=")
        return
    if cfg.annotations is None:
        raise UserError(f"backend {cfg.backend} needs poses: annotations= (a COCO keypoint JSON)")
    if not (cfg.captions or cfg.prompt_template or cfg.prompt_file):
        raise UserError(f"backend {cfg.backend} needs prompts: captions=, prompt_template= or prompt_file=")
    if cfg.condition == "auto":
        cfg.condition = "keypose" if cfg.backend == "t2i_adapter" else "openpose"
    if (cfg.backend, cfg.condition) not in ADAPTERS:
        raise UserError("key condition: the pose ControlNet was trained on openpose drawings; use condition=openpose")
    cfg.model = cfg.model or MODELS[cfg.backend]
    cfg.adapter = cfg.adapter or ADAPTERS[cfg.backend, cfg.condition]


def read_poses(cfg):
    """→ (People with COCO-17 joints, everybody; rows (n,) to make pictures of;
    Counter of people left out and why; a sentence about what was read)."""
    people, notes = read_people(cfg.annotations, check_pictures=False, min_score=cfg.min_score)
    known, _ = recognised(people.joints)
    about = f"{len(people.files)} people, {known} of COCO's 17 joints recognised"
    about += f", visible from a score of {cfg.min_score:g}" if notes["scores"] else ""
    if set(puppet.LSP_JOINTS) <= set(people.joints):
        joints = puppet.lsp_to_coco(people.keypoints[:, [people.joints.index(name) for name in puppet.LSP_JOINTS]])
    else:
        joints = to_coco17(people.keypoints, people.joints)
    people = people._replace(keypoints=np.asarray(joints, np.float32), joints=COCO_JOINTS)
    scale = 1 if cfg.backend == "puppet" else painted_size(people.size, cfg.resolution) / people.size
    few = (people.keypoints[:, :, 2] > 0).sum(1) < cfg.min_joints
    small = ~few & ((people.boxes[:, 2:] * scale).min(1) < cfg.min_side)
    skipped = Counter({f"with fewer than {cfg.min_joints} joints": int(few.sum())})
    skipped[f"smaller than {cfg.min_side} px"] = int(small.sum())
    rows = np.flatnonzero(~few & ~small)[cfg.first_pose :][: cfg.poses or None]
    if len(rows) == 0:
        why = f"min_joints={cfg.min_joints}, min_side={cfg.min_side}; {about}"
        raise UserError(f"{cfg.annotations}: no person is left ({why})")
    return people, rows, +skipped, about


def read_prompts(cfg, image_ids):
    """One prompt per source picture, the same for its K pictures [paper]. → {image id: text}."""
    captions = {}
    if cfg.captions:
        try:
            for row in json.loads(Path(cfg.captions).read_text(encoding="utf-8"))["annotations"]:
                captions.setdefault(int(row["image_id"]), []).append((int(row["id"]), str(row["caption"]).strip()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{cfg.captions} is not a COCO captions file: {error!r}") from None
    lines = []
    if cfg.prompt_file:
        try:
            lines = Path(cfg.prompt_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read prompt_file {cfg.prompt_file}: {error}") from None
        lines = [line.strip() for line in lines if line.strip()]
        if not lines:
            raise UserError(f"prompt_file {cfg.prompt_file} holds no prompt")
    missing = [i for i in image_ids if i not in captions]
    if missing and not (lines or cfg.prompt_template):
        lack = f"{cfg.captions} has no caption for image {missing[0]} ({len(missing)} of {len(image_ids)} lack one)"
        raise UserError(f"{lack}; give prompt_template= or prompt_file= for them")
    prompts = {}
    for i in image_ids:
        rng = rng_of(PROMPT, cfg.seed, i)
        # paper silent on which of COCO's five captions: one at random, the same for all K pictures
        texts = [text for _, text in sorted(captions.get(i, []))] or lines or [cfg.prompt_template]
        text = texts[rng.integers(len(texts))]
        if i not in captions:
            parts = re.split(r"\{([^{}]*)\}", text)  # every second part stood in braces
            parts[1::2] = [str(rng.choice(part.split("|"))) for part in parts[1::2]]
            text = "".join(parts)
        prompts[i] = text
    return prompts


# ------------------------------------------------------------------------------------------------------------ puppet


def draw_chunk(cfg, people, units):
    """units: pose numbers, or rows of `people`. → ([(picture or None, row)], 0), K pictures per pose."""
    size, rows = (cfg.height, cfg.width), []
    if people is None:
        pose_ids, poses = list(units), puppet.sample_poses(cfg.seed, units)
    else:
        pose_ids = people.annotation_id[units].tolist()
        poses = puppet.poses_from_keypoints(people.keypoints[units], people.boxes[units])
    for p, pose in enumerate(pose_ids):
        if not poses.ok[p]:
            rows.append((None, {"pose_id": pose, "skipped": "with too few joints to draw a body"}))
            continue
        seeds = [picture_seed(cfg.seed, pose, k) for k in range(cfg.pictures_per_pose)]
        identities, scenes = puppet.sample_identities(cfg.seed, seeds), puppet.sample_scenes(cfg.seed, seeds)
        made = puppet.render(puppet.take(poses, np.full(len(seeds), p)), identities, scenes, size)
        if (made["boxes"][:, 2:] < 1).any():
            rows.append((None, {"pose_id": pose, "skipped": "outside the picture"}))
            continue
        for k, (person, seed) in enumerate(zip(identities.people, seeds)):
            caption, box = puppet.sentence(person, rng_of(WORDING, seed)), made["boxes"][k].tolist()
            row = person_row(cfg, pose, k, made["keypoints"][k], box, box[2] * box[3], caption, seed)
            row["attributes"] = puppet.attributes(person)
            row["joints3d"] = [[round(v, 4) for v in xyz] for xyz in made["joints3d"][k].tolist()]  # camera frame, m
            if people is not None:
                row |= {"source_image_id": int(people.image_id[units[p]]), "source_annotation_id": pose}
            rows.append((Image.fromarray(made["image"][k]), row))
            if cfg.parts:
                put(Path(cfg.out) / "parts" / f"{pose}_{k}.png", encoded(Image.fromarray(made["parts"][k]), "png"))
    return rows, 0


# -------------------------------------------------------------------------------------------------- the set's own files


def write_annotations(cfg, count):
    """Chunk records → annotations.json, a line per entry, streamed. → counts, poses skipped, rows for the sheet."""
    counts, skipped, oks = Counter(retried=0, pictures=0), [], []

    def rows():
        return enumerate((row for row in read_records(cfg, count) if "file_name" in row), 1)

    for row in read_records(cfg, count):
        counts["retried"] += row.get("retried", 0)
        counts["pictures"] += "file_name" in row
        skipped += [row] if "skipped" in row else []
        oks += [row["oks"]] if "oks" in row else []
    poses, K = counts["pictures"] // cfg.pictures_per_pose, cfg.pictures_per_pose
    if poses == 0:
        why = ", ".join(sorted({row["skipped"] for row in skipped}))
        raise UserError(f"no pose of {cfg.annotations} gave {K} pictures: {why}; nothing to write in {cfg.out}")
    shown = set(np.linspace(0, poses - 1, min(cfg.sheet_rows, poses)).round().astype(int).tolist())
    sheet = []

    def write(path):
        with open(path, "w", encoding="utf-8") as file:
            info = f"generate.py, {cfg.backend}, seed {cfg.seed}; fields: docs/annotations.md"
            file.write(f'{{"info": {json.dumps({"description": info})},\n')
            file.write(f'"categories": {json.dumps([COCO_CATEGORY])},\n"images": [')
            for i, row in rows():
                image = {"id": i, "file_name": row["file_name"], "width": row["size"][0], "height": row["size"][1]}
                file.write((",\n" if i > 1 else "\n") + json.dumps(image))
            file.write('\n],\n"annotations": [')
            for i, row in rows():
                sheet.extend([row] if (i - 1) // K in shown else [])
                entry = {name: value for name, value in row.items() if name not in ("file_name", "size")}
                entry = {"id": i, "image_id": i, "category_id": COCO_CATEGORY["id"], **entry}
                file.write((",\n" if i > 1 else "\n") + json.dumps(entry))
            file.write("\n]}\n")

    write_atomic(Path(cfg.out) / "annotations.json", write)
    counts = {"poses": poses, "pictures": counts["pictures"], "painted_again": counts["retried"]}
    if oks:
        low, middle, high = np.percentile(oks, [10, 50, 90]).round(4).tolist()
        counts["oks"] = {"mean": round(float(np.mean(oks)), 4), "p10": low, "median": middle, "p90": high}
    return counts, skipped, sheet


def write_sheet(cfg, rows):
    """rows: K per pose, poses evenly out of the whole set → sheet.png: drawn condition, then pictures 0 .. K-1."""
    K, grid, labels = cfg.pictures_per_pose, [], []
    draw = pictures.draw_keypose if cfg.backend == "puppet" else DRAW[cfg.backend, cfg.condition]
    shape = max(row["size"][1] / row["size"][0] for row in rows)
    cell = (144, round(144 * min(2.0, max(0.75, shape))))
    for mine in (rows[i : i + K] for i in range(0, len(rows), K)):
        size = np.array(mine[0]["size"])
        zoom = (cell / size).min()  # drawn at the size it is shown, with the line widths the generator saw
        skeleton = np.reshape(mine[0]["keypoints"], (17, 3)) * [zoom, zoom, 1]
        made = [Image.open(Path(cfg.out) / "images" / row["file_name"]) for row in mine]
        grid.append([draw([skeleton], tuple(np.ceil(size * zoom).astype(int).tolist())), *made])
        labels.append(f"pose {mine[0]['pose_id']}\n" + (mine[0]["caption"] if cfg.backend != "puppet" else ""))
    heads, width = ["condition", *(f"k = {k}" for k in range(K))], 100 if cfg.backend == "puppet" else 160
    title = f"{cfg.backend}: every row one pose, every column one seed"
    pictures.sheet(grid, Path(cfg.out) / "sheet.png", labels, heads, title, cell, width)


def main():
    cfg = read_config(KEYS, __doc__)
    asked = SimpleNamespace(**vars(cfg))  # config.yaml records what was asked for; check_config fills in the rest
    check_config(cfg)
    rank, world, device = start_ranks("cpu" if cfg.backend == "puppet" else cfg.device)
    out = Path(cfg.out)
    if (out / "done").exists() and open_run(asked, KEYS, rank) == "finished":
        if rank == 0:
            print((out / "summary.json").read_text())
        return

    # Everything that can be wrong with the input is found before the run folder is made.
    units, make, left_out, about = plan(cfg, device)
    open_run(asked, KEYS, rank)
    folders = people_set.FOLDERS if cfg.task == "people" else ("images", *(["parts"] if cfg.parts else []))
    for folder in (".parts", *folders):
        (out / folder).mkdir(exist_ok=True)

    count = -(-len(units) // cfg.chunk)
    mine = [number for number in range(rank, count, world) if not record_path(cfg, number).exists()]
    chunks = Chunks(cfg, units, make, "images" if cfg.task == "pretrain" else "")
    workers = cfg.workers if cfg.backend == "puppet" else 0
    start, before, pictures_made = time.perf_counter(), recorded(cfg), 0
    log = Log(out, count, before, rank, "generate")
    log.say(f"{about}; {before} of {count} chunks are there")
    for pictures_here in chunks.made(mine, workers):
        pictures_made += pictures_here
        if rank == 0:
            log.bar.update(recorded(cfg) - log.bar.n)
            rate = pictures_made / (time.perf_counter() - start)
            log.write(step=log.bar.n, pictures_of_rank_0=pictures_made, pictures_per_second_of_rank_0=rate)
    # Rank 0 waits for files, not at a barrier: a process group gives up before the slowest rank of a long job is done.
    while rank == 0 and recorded(cfg) < count:
        time.sleep(0.2)
        log.bar.update(recorded(cfg) - log.bar.n)
    log.close()
    if rank == 0:
        finish(cfg, count, left_out, (count - before) / count, time.perf_counter() - start)


def plan(cfg, device):
    """→ (units of work, make(units) → ([(picture or None, row)], pictures painted again),
    Counter of people left out, a sentence about what was read).

    A unit is a person, a pose number, a row of `people`, or a source picture's id.
    """
    if cfg.task == "people":
        return people_set.units(cfg), partial(people_set.draw_chunk, cfg), {}, "drawn people"
    people, units, left_out = None, range(cfg.first_pose, cfg.first_pose + cfg.poses), {}
    about = "sampled poses"
    if cfg.annotations is not None:
        people, units, left_out, about = read_poses(cfg)
    if cfg.backend == "puppet":
        trial = SimpleNamespace(**vars(cfg) | {"parts": False})  # writes nothing; most often the first person ends it
        if people is not None and all("skipped" in draw_chunk(trial, people, [row])[0][0][1] for row in units):
            why = "too few joints, or none of the body in the picture that the box gives"
            raise UserError(f"{cfg.annotations}: nobody of {len(units)} people can be drawn ({why})")
        return units, partial(draw_chunk, cfg, people), left_out, about
    wanted = group_rows(people.image_id, units)
    everybody = group_rows(people.image_id, range(len(people.image_id)))
    prompts = read_prompts(cfg, list(wanted))
    pipe, auditor = load_painter(cfg, device), Auditor(cfg, device) if cfg.audit == "vitpose" else None

    def make(image_ids):
        scenes = [Scene(cfg, people, everybody[i], wanted[i], prompts[i]) for i in image_ids]
        return paint_chunk(cfg, scenes, pipe, auditor)

    return list(wanted), make, left_out, about


def group_rows(image_ids, rows):
    """→ {image id: rows}, in order of first appearance."""
    groups = {}
    for row in rows:
        groups.setdefault(int(image_ids[row]), []).append(int(row))
    return groups


def finish(cfg, count, left_out, share, seconds):
    """All chunks are recorded: the set's own files, then `done`, then the records may go."""
    out = Path(cfg.out)
    if cfg.task == "people":
        counts = people_set.write_lists(cfg, count)
        people_set.write_sheet(cfg, count)
    else:
        counts, skipped, rows = write_annotations(cfg, count)
        why = Counter(row["skipped"] for row in skipped) + Counter(left_out)
        counts |= {"left_out": dict(why), "poses_skipped": skipped[:100]}
        write_sheet(cfg, rows)
    counts["pictures_per_second"] = round(share * counts["pictures"] / max(seconds, 1e-9), 2)
    write_atomic(out / "summary.json", lambda path: path.write_text(json.dumps(counts, indent=1) + "\n"))
    (out / "done").touch()
    shutil.rmtree(out / ".parts")
    for stray in out.glob("*/.*.part"):  # half-written by a killed run
        stray.unlink()
    if cfg.task == "people":
        print("{}: {pictures} pictures of {people} people, {pictures_per_second} pictures/s".format(out, **counts))
        print("; ".join(f"{name} {counts[name]}" for name in (*people_set.FOLDERS, "distractors", "junk")))
    else:
        print("{}: {pictures} pictures of {poses} poses, {pictures_per_second} pictures/s".format(out, **counts))
        print("left out: " + (", ".join(f"{n} {reason}" for reason, n in why.items()) or "nobody"))
    for name in ("painted_again", "oks"):
        if counts.get(name):
            print(f"{name.replace('_', ' ')}: {counts[name]}")
    print(f"look at {out / 'sheet.png'}")


if __name__ == "__main__":
    run_stage(main)
