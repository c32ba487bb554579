"""Which sentence a picture is painted from: COCO captions, a template or a file of prompts.

`cfg` is generate.py's config. A prompt is a function of (seed, number of its picture or group).
"""

import re

import numpy as np

from formats.coco import People, read_image_captions
from formats.joints import COCO_CATEGORY
from plumbing.errors import UserError
from plumbing.files import read_text
from plumbing.seeds import PROMPT, rng_of


def check_prompts(cfg, keys):
    """What single keys cannot say about a generator of pictures from text. keys: generate.py's."""
    for name in ("height", "width", "parts"):
        if getattr(cfg, name) != keys[name].default:
            ours = "resolution= sets its sides, and it draws no parts"
            raise UserError(f"backend={cfg.backend} takes no {name}=: {ours}; leave it out")
    if cfg.backend == "text":
        for name in ("annotations", "adapter", "audit"):
            if getattr(cfg, name) != keys[name].default:
                raise UserError(f"backend=text paints no given pose: leave {name}= out")
    elif cfg.annotations is None:
        raise UserError(f"backend={cfg.backend} needs poses: annotations= (a COCO keypoint JSON)")
    share = "prompt" if cfg.backend == "text" else "pose"
    if cfg.positives != share:
        rule = f"pictures of a group share their {share} with backend={cfg.backend}"
        raise UserError(f"{rule}; leave positives= out")
    if not (cfg.captions or cfg.prompt_template or cfg.prompt_file):
        how = "captions=, prompt_template= or prompt_file="
        raise UserError(f"backend={cfg.backend} needs prompts: {how}")
    if share == "prompt" and not (cfg.captions or cfg.prompt_file or cfg.poses):
        raise UserError("backend=text: say with poses= how many prompts to draw of the template")


def read_prompts(cfg, image_ids):
    """One prompt per source picture, the same for its K pictures [paper]. → {image id: text}"""
    captions = read_image_captions(cfg.captions) if cfg.captions else {}
    lines = prompt_lines(cfg)
    prompts = {}
    for i in image_ids:
        rng = rng_of(PROMPT, cfg.seed, i)
        # paper silent: which of COCO's five captions. One at random, the same for all K pictures.
        texts = captions.get(i, lines)
        if not texts:
            n = sum(i not in captions for i in image_ids)
            what = f"no caption for image {i} ({n} of {len(image_ids)} lack one)"
            raise UserError(f"{cfg.captions}: {what}; give prompt_template= or prompt_file=")
        prompts[i] = texts[rng.integers(len(texts))]
        if i not in captions:
            prompts[i] = filled_in(prompts[i], rng)
    return prompts


def prompt_lines(cfg):
    """The template, or the lines of the file: what pictures without a caption are painted from."""
    if not cfg.prompt_file:
        return [cfg.prompt_template] if cfg.prompt_template else []
    lines = [line.strip() for line in read_text(cfg.prompt_file).splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(f"prompt_file {cfg.prompt_file} holds no prompt")
    return lines


def filled_in(text, rng):
    """Of each {a|b} of a prompt, one."""
    parts = re.split(r"\{([^{}]*)\}", text)  # every second part stood in braces
    parts[1::2] = [str(rng.choice(part.split("|"))) for part in parts[1::2]]
    return "".join(parts)


def people_of_prompts(cfg):
    """backend=text: → (People, {image id: prompt}, a sentence about them), a person per prompt.

    He has no joints, and his box is his whole picture: a square of cfg.resolution. Ids are those of
    the captioned pictures, else the numbers of the prompts from 0. A prompt that another picture
    has too is left out: its pictures would be negatives of their own kind.
    """
    if cfg.captions:
        ids = sorted(read_image_captions(cfg.captions))[cfg.first_pose :][: cfg.poses or None]
        prompts = read_prompts(cfg, ids)
    else:
        lines = prompt_lines(cfg)
        # A file says each of its prompts once, a template as many as are asked for.
        last = min(len(lines), cfg.first_pose + (cfg.poses or len(lines)))
        if not cfg.prompt_file:
            last = cfg.first_pose + cfg.poses
        prompts = {}
        for i in range(cfg.first_pose, last):
            prompts[i] = filled_in(lines[i % len(lines)], rng_of(PROMPT, cfg.seed, i))
    first = {text: i for i, text in reversed(prompts.items())}
    ids = np.array(sorted(first.values()), np.int64)
    if not len(ids):
        raise UserError(f"first_pose={cfg.first_pose} leaves no prompt; lower it")
    n, side = len(ids), cfg.resolution
    people = People(
        folder="", files=np.full(n, b""), size=np.full((n, 2), side, np.int32),
        boxes=np.tile(np.float32([0, 0, side, side]), (n, 1)),
        keypoints=np.zeros((n, 17, 3), np.float32), pose_id=ids, annotation_id=ids, image_id=ids,
        area=np.full(n, side * side, np.float32), joints=COCO_CATEGORY["keypoints"], skeleton=[],
        flip=[], category=COCO_CATEGORY,
    )  # fmt: skip
    return people, prompts, f"{n} prompts, {len(prompts) - n} more that say the same"
