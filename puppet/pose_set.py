"""The puppet's sets of K pictures that are positives of each other, a chunk at a time.

positives=pose: a pose, sampled or given, K times. What noise does in a diffusion model is done by
hand here: person and place change with k. So every picture has a caption of its own.
positives=prompt: a sentence K times, as text-to-image alone would paint it [StableRep, SynCLR]:
whoever fits it, in another pose, view and place each time.
"""

from functools import partial

import numpy as np
from PIL import Image

from plumbing.chunks import person_row
from plumbing.config import Key
from plumbing.errors import UserError
from plumbing.seeds import PERSON, PICTURE, PROMPT, WORDING, rng_of, seed_of
from puppet.body import sample_poses, take
from puppet.figure import another_like, attributes, render, sample_identities, sentence
from puppet.lift import poses_from_keypoints
from puppet.scene import sample_scenes

KEYS = dict(
    height=Key(256, "puppet: picture height", "[HAP]", low=16),
    width=Key(128, "puppet: picture width", "[HAP]", low=16),
    parts=Key(False, "puppet: also write body-part maps, parts/*.png"),
    workers=Key(0, "puppet: drawing processes; 0: this one", low=0, may_change=True),
)

NOT_OURS = "captions prompt_template prompt_file negative_prompt model adapter condition audit "
NOT_OURS += "adapter_weight resolution scheduler steps guidance retries audit_model audit_threshold"


def check(cfg, keys):
    """What single keys cannot say. keys: generate.py's."""
    for name in NOT_OURS.split():
        if getattr(cfg, name) != keys[name].default:
            why = "it draws people at their joints and tells what it drew"
            raise UserError(f"the puppet takes no {name}: {why}; leave {name}= out")
    if cfg.positives == "prompt" and (cfg.task == "people" or cfg.annotations):
        given = "task=people" if cfg.task == "people" else "annotations="
        raise UserError(f"positives=prompt samples a pose for every picture: leave {given} out")
    if cfg.task == "pretrain" and cfg.annotations is None and cfg.poses == 0:
        raise UserError("without annotations= the puppet samples poses; say how many with poses=")


def plan(cfg, people, rows):
    """→ (units, make(units) for plumbing.chunks). A unit is a sampled pose's number or a row.

    people: COCO-17, or None to sample poses; rows (n,): those to draw. UserError if nobody of them
    can be drawn.
    """
    make = partial(draw_chunk, cfg, people)
    if cfg.positives == "prompt":
        make = partial(draw_prompts, cfg)
    if people is None:
        return range(cfg.first_pose, cfg.first_pose + cfg.poses), make
    # Most often the first person can be drawn, and the search ends there.
    if all("skipped" in make([row])[0][0][1] for row in rows):
        why = "too few joints, or none of the body in the picture that the box gives"
        whose = f"{cfg.annotations}: nobody of {len(rows)} people"
        raise UserError(f"{whose} can be drawn ({why})")
    return rows, make


def draw_chunk(cfg, people, units):
    """→ ([({path: picture}, row)], 0), K of each pose; a pose that cannot be drawn is one row."""
    if people is None:
        ids, poses = list(units), sample_poses(cfg.seed, units)
    else:
        ids = people.annotation_id[units].tolist()
        poses = poses_from_keypoints(people.keypoints[units], people.boxes[units])
    rows = []
    for p, pose in enumerate(ids):
        if not poses.ok[p]:
            rows.append(({}, dict(pose_id=pose, skipped="with too few joints to draw a body")))
            continue
        seeds = [seed_of(PICTURE, cfg.seed, pose, k, 0) for k in range(cfg.pictures_per_pose)]
        persons, scenes = sample_identities(cfg.seed, seeds), sample_scenes(cfg.seed, seeds)
        same = take(poses, np.full(len(seeds), p))
        made = render(same, persons, scenes, (cfg.height, cfg.width))
        if (made["boxes"][:, 2:] < 1).any():
            rows.append(({}, dict(pose_id=pose, skipped="outside the picture")))
            continue
        for k, (person, seed) in enumerate(zip(persons, seeds)):
            about = dict(pose_id=pose, k=k, seed=seed)
            about["caption"] = sentence(person, rng_of(WORDING, seed))
            about["attributes"] = attributes(person)
            if people is not None:
                about["source_image_id"] = int(people.image_id[units[p]])
                about["source_annotation_id"] = pose
            rows.append(picture_of(cfg, made, k, about))
    return rows, 0


def draw_prompts(cfg, units):
    """→ ([({path: picture}, row)], 0), K pictures of each prompt's number: one sentence, K poses
    and views, K people of whom it is true, K places."""
    rows = []
    for prompt in units:
        # A seed of its own, not the bare number: task=people draws its people from theirs, and
        # nobody of them may be in a set to pre-train on.
        words = seed_of(PROMPT, cfg.seed, prompt)
        described = sample_identities(cfg.seed, [words])[0]
        caption = sentence(described, rng_of(WORDING, words))
        seeds = [seed_of(PICTURE, cfg.seed, prompt, k, 0) for k in range(cfg.pictures_per_pose)]
        people = [another_like(described, rng_of(PERSON, cfg.seed, seed)) for seed in seeds]
        scenes, size = sample_scenes(cfg.seed, seeds), (cfg.height, cfg.width)
        made = render(sample_poses(cfg.seed, seeds), people, scenes, size)
        for k, seed in enumerate(seeds):
            about = dict(pose_id=prompt, k=k, seed=seed, caption=caption)
            about["attributes"] = attributes(described)
            rows.append(picture_of(cfg, made, k, about))
    return rows, 0


def picture_of(cfg, made, k, about):
    """Picture k of what `render` made, as ({path: picture}, row); about: fields of the row."""
    box, name = made["boxes"][k].tolist(), f"{about['pose_id']}_{k}"
    row = person_row(made["keypoints"][k], box, box[2] * box[3]) | about
    row["file_name"] = f"{name}.{cfg.picture_format}"
    metres = made["joints3d"][k].tolist()  # in the camera's frame
    row["joints3d"] = [[round(v, 4) for v in xyz] for xyz in metres]
    row["size"] = (cfg.width, cfg.height)
    files = {f"images/{row['file_name']}": Image.fromarray(made["image"][k])}
    if cfg.parts:
        files[f"parts/{name}.png"] = Image.fromarray(made["parts"][k])
    return files, row
