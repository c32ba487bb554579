"""Stage 0: photographs → poses and captions, in COCO JSON, for Stages 1 and 2.

The paper's second set, GenLUPerson, is made from pictures that come without either: their poses
are what generate.py draws anew, and HAP's masks need them on the real pictures too.

Inputs   a folder of pictures (all below it), or a text file with a path per line.
Outputs  in `out`: annotations.json (COCO-17: visibility from min_score on, and every score beside
         it in `keypoint_scores`; docs/annotations.md), captions.json (COCO captions), summary.json,
         sheet.png (some pictures with the poses found).

  python annotate.py --cfg configs/annotate_luperson.yaml pictures=luperson
  torchrun --nproc_per_node=8 annotate.py --cfg configs/annotate_luperson.yaml pictures=luperson
  python generate.py --cfg configs/generate_luperson_t2i.yaml    # then the paper's GenLUPerson

One person fills a picture, as in LUPerson and Market-1501, or detector= finds them. A killed run,
started again with any number of ranks, does what is missing; the files come out the same. A picture
that cannot be read is left out, counted and named.

Legend: n people of a picture · boxes x, y, w, h in px · joints are COCO's 17.
"""

import common  # first: Ctrl-C while the libraries load

# isort: split
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from common import UserError
from drawing.skeletons import people_sheet
from formats.coco import MIN_SCORE, write_image_captions, write_people
from formats.joints import COCO_CATEGORY, COCO_JOINTS
from formats.prompts import filled_in
from plumbing import chunks
from plumbing.config import MACHINE, Key, read_config
from plumbing.pictures import as_bytes, load_picture, pictures_at
from tasks.recognition import Captioner, Detector, PoseEstimator

KEYS = dict(
    out=Key("runs/annotate", "run folder"),
    pictures=Key(None, "folder of pictures, or a text file with a path per line, below its folder"),
    limit=Key(0, "take so many pictures, spread evenly over all; 0: all", low=0),
    detector=Key(None, "finds people, hub id or folder; none: each picture is one person"),
    detector_score=Key(0.5, "a box counts from this score on", low=0.0, high=1.0),
    min_side=Key(0, "leave out people whose box (or whole crop) has a shorter side, px", low=0),
    pose_model=Key("usyd-community/vitpose-base-simple", "ViTPose, hub id or folder", "[ViTPose]"),
    min_score=Key(MIN_SCORE, "a joint is visible from this score on", "[HRNet] [ViTPose]",
                  low=0.01, high=1),
    captions=Key("model", "model: caption_model; template: prompt_template; none: no captions.json",
                 choices=("model", "template", "none")),
    caption_model=Key("Salesforce/blip-image-captioning-base", "image-to-text, hub id or folder"),
    prompt_template=Key("a photo of a person", "every caption; {a|b} draws one by seed"),
    batch=Key(64, "pictures that go through a model at once; another value changes the last bits",
              low=1),
    chunk=Key(512, "pictures of a record; what a kill costs at most", low=1),
    sheet_pictures=Key(40, "pictures on the contact sheet", low=1),
    seed=MACHINE["seed"],
    precision=MACHINE["precision"],
    device=MACHINE["device"],
)  # fmt: skip


def main():
    cfg = read_config(KEYS, __doc__)
    if cfg.pictures is None:
        raise UserError("pictures= names nothing; give a folder of pictures, or a list of them")
    ranks = common.start_ranks(cfg.device, cfg.precision)
    out = Path(cfg.out)
    if (out / "done").exists():
        if chunks.is_finished(common.open_run(cfg, KEYS, ranks), out, ranks):
            return

    # Pictures and models: what can be wrong with them is found before the run folder is made.
    folder, names = listed_pictures(cfg.pictures)
    if os.path.isdir(cfg.pictures) and out.resolve().is_relative_to(Path(folder).resolve()):
        raise UserError(f"out={out} lies in pictures={folder}; its own would be taken for more")
    as_bytes(folder, names)
    if cfg.limit:
        names = [names[i] for i in np.linspace(0, len(names) - 1, cfg.limit).round().astype(int)]
        names = list(dict.fromkeys(names))
    models = Models(cfg, ranks.device)
    if chunks.is_finished(common.open_run(cfg, KEYS, ranks), out, ranks):
        return
    listed = "\n".join(names).encode()
    chunks.check_same_inputs(out, {f"the list of {cfg.pictures}": listed}, ranks)

    def annotate(numbers):
        rows, n = [], cfg.batch
        parts = [numbers[k : k + n] for k in range(0, len(numbers), n)]
        with ThreadPoolExecutor(8) as pool:

            def load(part):
                return pool.map(lambda number: read_picture(folder, names[number]), part)

            # The next batch loads while the models work on this one; no more is in memory.
            loading = load(parts[0])
            for part, following in zip(parts, [*parts[1:], []]):
                pictures, loading = list(loading), load(following)
                rows += annotate_batch(cfg, models, names, list(zip(part, pictures)))
        return [({}, row) for row in rows], 0

    # A chunk at a time, shared out to all ranks. What is there already stays.
    work = chunks.Chunks(cfg, range(len(names)), annotate)
    mine = work.missing(ranks)
    common.barrier()
    log = common.open_log(out / "log.jsonl", work.recorded()) if ranks.rank == 0 else None
    progress = chunks.Progress(work, log, f"{len(names)} pictures of {folder}")
    for people in work.made(mine, workers=0):
        progress.add(people)
    if ranks.rank > 0:  # rank 0 alone waits for all chunks and writes about them
        return
    progress.wait_for_ranks()
    write_lists(cfg, work, folder, len(names))
    chunks.mark_done(out)
    chunks.report(out)


# ----------------------------------------------------------------------- from a picture to its rows


class Models:
    """What looks at the pictures, loaded once."""

    def __init__(self, cfg, device):
        self.cfg, self.device = cfg, device
        self.detector = self.captioner = None
        if cfg.detector:
            self.detector = Detector(cfg.detector, "detector", device, cfg.detector_score)
        self.estimator = PoseEstimator(cfg.pose_model, "pose_model", device)
        if cfg.captions == "model":
            self.captioner = Captioner(cfg.caption_model, "caption_model", device)

    def boxes(self, pictures):
        """→ for each picture (n, 5): boxes and their scores; without a detector all of it, 1."""
        found = [np.array([[0, 0, *picture.size, 1.0]]) for picture in pictures]
        if self.detector:
            found = self.detector.find(pictures)
        return [boxes[boxes[:, 2:4].min(1) >= self.cfg.min_side] for boxes in found]

    def captions(self, numbers, pictures):
        """→ a sentence for each picture, or none."""
        if self.captioner:
            return self.captioner.find(pictures)
        if self.cfg.captions == "template":
            seeds = [(common.PROMPT, self.cfg.seed, number) for number in numbers]
            return [filled_in(self.cfg.prompt_template, common.rng_of(*seed)) for seed in seeds]
        return [None] * len(pictures)


def annotate_batch(cfg, models, names, batch):
    """batch: (number, picture or the reason why there is none) → rows, in the order of the batch.

    A row is a person, or says why a picture gives none. What shares a batch depends on the list of
    pictures alone, never on ranks or on a kill.
    """
    rows = {number: [] for number, _ in batch}
    seen = []
    for number, picture in batch:
        if isinstance(picture, str):
            rows[number] = [dict(picture=names[number], skipped="unreadable", why=picture)]
        else:
            seen.append((number, picture))
    if not seen:
        return [row for one in rows.values() for row in one]
    numbers, pictures = zip(*seen)
    with common.autocast(models.device, cfg.precision):
        boxes = models.boxes(pictures)
        captions = models.captions(numbers, pictures)
        people = [i for i, one in enumerate(boxes) if len(one)]
        joints = {}
        if people:
            shown = [pictures[i] for i in people]
            found = models.estimator.find(shown, [boxes[i][:, :4] for i in people])
            joints = dict(zip(people, found))
    for i, number in enumerate(numbers):
        about = dict(file_name=names[number], size=pictures[i].size)
        for box, one in zip(boxes[i], joints.get(i, [])):
            rows[number].append(about | annotation(cfg, box, one, captions[i], about["size"]))
        if not len(boxes[i]):
            rows[number] = [dict(picture=names[number], skipped="nobody, or too small")]
    return [row for one in rows.values() for row in one]


def annotation(cfg, box, joints, caption, size):
    """The fields of a person: box (5,) with its score, joints (17, 3) x, y px and score; size
    (w, h) of the picture."""
    # A joint below min_score is missing: its place is a guess. Its score stays, so that a reader
    # may ask for more certainty later, not for less. One beyond the picture is missing too [HAP].
    inside = ((joints[:, :2] >= -0.5) & (joints[:, :2] < np.array(size) - 0.5)).all(1)
    seen = (joints[:, 2] >= cfg.min_score) & inside
    points = np.concatenate([joints[:, :2], 2.0 * seen[:, None]], 1)
    x, y, w, h = (round(float(v), 2) for v in box[:4])
    row = chunks.person_row(points, [x, y, w, h], w * h)
    row |= dict(keypoint_scores=[round(float(score), 4) for score in joints[:, 2]])
    # The box's score times the joints' mean; deviates from [HRNet], which means those above .2.
    row["score"] = round(float(box[4] * joints[:, 2].mean()), 4)
    return row if caption is None else row | dict(caption=caption)


# ---------------------------------------------------------------------------------- files, pictures


def listed_pictures(path):
    """A folder, a picture, or a .txt list → (folder, names below it, each once)."""
    if Path(path).suffix.lower() != ".txt":
        return pictures_at(path)
    names = [line.strip() for line in common.read_text(path).splitlines()]
    names = list(dict.fromkeys(os.path.normpath(name) for name in names if name))
    if not names:
        raise UserError(f"pictures={path} lists no picture; write a path per line")
    outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        below = f"a path below {Path(path).parent}"
        raise UserError(f"pictures={path} lists {outside[0]}; each line must be {below}")
    return str(Path(path).parent), names


def read_picture(folder, name):
    """The picture, or one line that says why it cannot be read."""
    try:
        return load_picture(folder, name)
    except UserError as error:
        return str(error)


def write_lists(cfg, work, folder, n):
    """Records → annotations.json, captions.json, sheet.png, summary.json."""
    out = Path(cfg.out)
    skipped, joints, pictures = [], [], set()
    for row in work.rows():
        if "skipped" in row:
            skipped.append(row)
        else:
            joints.append(row["num_keypoints"])
            pictures.add(row["file_name"])
    left_out = Counter(row["skipped"] for row in skipped)
    if not joints:
        raise UserError(f"{cfg.pictures}: none of {n} pictures gave a person ({dict(left_out)})")
    info = f"annotate.py, {cfg.pose_model}, min_score {cfg.min_score:g}; pictures of {folder}"
    write_people(out / "annotations.json", f"{info}; fields: docs/annotations.md", work.pictures)
    if cfg.captions != "none":
        write_image_captions(out / "captions.json", work.pictures)
    draw_sheet(cfg, work, folder, pictures)
    summary = dict(pictures=n, with_people=len(pictures), people=len(joints))
    summary["joints_seen_on_average"] = round(float(np.mean(joints)), 2)
    summary |= dict(left_out=dict(left_out), named=skipped[:100])
    summary["read_with"] = f"annotations={out / 'annotations.json'} images={folder}"
    common.write_json(out / "summary.json", summary)


def draw_sheet(cfg, work, folder, pictures):
    """sheet.png: some pictures, evenly out of all, with everybody found on them."""
    pictures = sorted(pictures)
    few = np.linspace(0, len(pictures) - 1, min(cfg.sheet_pictures, len(pictures)))
    chosen = {pictures[i]: [] for i in few.round().astype(int)}
    for row in work.pictures():
        if row["file_name"] in chosen:
            chosen[row["file_name"]].append(np.reshape(row["keypoints"], (17, 3)))
    shown = [(load_picture(folder, name), poses) for name, poses in chosen.items()]
    links = [(a - 1, b - 1) for a, b in COCO_CATEGORY["skeleton"]]
    title = f"Poses found by {Path(cfg.pose_model).name}: left orange, right blue"
    people_sheet(shown, links, COCO_JOINTS, Path(cfg.out) / "sheet.png", title)


if __name__ == "__main__":
    common.run_stage(main)
