"""generate.py with tiny real pipelines: poses, prompts, conditions, refusals, the audit."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, check_fields
from PIL import Image

import generate
from drawing import grids, skeletons
from formats.joints import COCO_CATEGORY
from plumbing import chunks, diffusion
from plumbing.config import read_config
from plumbing.errors import UserError

JOINTS = COCO_CATEGORY["keypoints"]
STANDING = np.array(  # a person in a 100 × 200 box, COCO-17
    "50 20 54 16 46 16 58 18 42 18 68 45 32 45 76 75 24 75 80 105 20 105 "
    "60 105 40 105 62 145 38 145 64 190 36 190".split(),
    float,
).reshape(17, 2)


def person(number, image, x, y, zoom=1.0, seen=17):
    keypoints = np.concatenate([STANDING * zoom + [x, y], np.full((17, 1), 2.0)], 1)
    keypoints[seen:] = 0
    box = [x, y, 100 * zoom, 200 * zoom]
    row = dict(id=number, image_id=image, category_id=1, iscrowd=0, num_keypoints=seen)
    row |= dict(keypoints=keypoints.ravel().tolist(), bbox=box)
    return row | dict(area=box[2] * box[3] * 0.6)


def write_poses(folder):
    """Three pictures of two shapes that do not exist: four people, and one of too few joints."""
    sizes = {7: (300, 280), 8: (300, 280), 9: (400, 210)}
    images = []
    for i, (w, h) in sizes.items():
        images.append(dict(id=i, file_name=f"{i}.jpg", width=w, height=h))
    people = [
        person(1, 7, 20, 40),
        person(2, 7, 150, 60),
        person(3, 8, 100, 30, 1.2),
        person(4, 9, 150, 5),
        person(5, 9, 20, 5, seen=4),
    ]
    document = dict(images=images, annotations=people, categories=[COCO_CATEGORY])
    captions = [
        dict(id=10 * i + j, image_id=i, caption=f"caption {j} of {i}")
        for i in (7, 8, 9)
        for j in range(3)
    ]
    (folder / "poses.json").write_text(json.dumps(document))
    (folder / "captions.json").write_text(json.dumps(dict(images=images, annotations=captions)))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Stable Diffusion, both adapters and ViTPose with random weights, saved as a user's folders
    would be.
    """
    import diffusers
    import transformers

    root = tmp_path_factory.mktemp("tiny")
    write_poses(root)
    torch.manual_seed(0)
    letters = [chr(c) for c in range(33, 127)]
    vocabulary = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (root / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (root / "merges.txt").write_text("#version: 0.2\n")
    last = len(vocabulary) - 1
    text = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=37, num_hidden_layers=2,
        num_attention_heads=4, bos_token_id=last - 1, eos_token_id=last, pad_token_id=last,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32, 32, 32), layers_per_block=1, sample_size=8, norm_num_groups=8,
        cross_attention_dim=32, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )  # fmt: skip
    tokenizer = transformers.CLIPTokenizer(
        str(root / "vocab.json"), str(root / "merges.txt"), model_max_length=77
    )
    scheduler = diffusers.PNDMScheduler(
        beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            block_out_channels=[16] * 4, norm_num_groups=8, latent_channels=4,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        ),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(root / "sd")
    diffusers.T2IAdapter(
        in_channels=3,
        channels=[16, 32, 32, 32],
        num_res_blocks=1,
        downscale_factor=8,
        adapter_type="full_adapter",
    ).save_pretrained(root / "t2i")
    control = diffusers.ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=(8, 8, 16, 16)
    )
    # Zero in a fresh ControlNet: it would not steer at all.
    for name, weight in control.named_parameters():
        if "cond_embedding" in name and weight.ndim == 4:
            torch.nn.init.normal_(weight, std=2 / weight[0].numel() ** 0.5)
        elif name.startswith(("controlnet_down", "controlnet_mid")) and weight.ndim == 4:
            torch.nn.init.normal_(weight, std=0.03)
    control.save_pretrained(root / "controlnet")

    vision = dict(hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4)
    clip = transformers.CLIPConfig(
        vision_config=dict(vision, image_size=32, patch_size=8), projection_dim=16
    )
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    checker = StableDiffusionSafetyChecker(clip)
    torch.nn.init.normal_(checker.concept_embeds)
    reader = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    pipe.register_modules(safety_checker=checker, feature_extractor=reader)
    pipe.save_pretrained(root / "sd_checked")

    backbone = transformers.VitPoseBackboneConfig(
        image_size=(64, 48),
        patch_size=(16, 16),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        out_indices=[2],
    )
    config = transformers.VitPoseConfig(backbone_config=backbone, num_labels=17)
    transformers.VitPoseForPoseEstimation(config).save_pretrained(root / "vitpose")
    transformers.VitPoseImageProcessor(size={"height": 64, "width": 48}).save_pretrained(
        root / "vitpose"
    )
    return root


@pytest.mark.parametrize("name", diffusion.SAMPLERS)
def test_a_sampler_spreads_its_steps_the_same_whoever_saved_the_model(name, tmp_path):
    """A scheduler that was saved states its own spacing, and would hand it on to another one."""
    import diffusers

    fresh = diffusers.PNDMScheduler(
        beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    fresh.save_pretrained(tmp_path)
    saved = diffusers.PNDMScheduler.from_pretrained(tmp_path)
    steps = []
    for scheduler in (fresh, saved):
        scheduler = diffusion.sampler(name, scheduler.config)
        scheduler.set_timesteps(20)
        steps.append(scheduler.timesteps.tolist())
    assert steps[0] == steps[1] and len(steps[0]) >= 20
    assert (steps[0][0] == 999) == (name in ("dpm++", "euler"))  # these begin at the noisiest step


def arguments(tiny, backend="t2i_adapter", **more):
    adapter = tiny / ("t2i" if backend == "t2i_adapter" else "controlnet")
    keys = dict(
        backend=backend, annotations=tiny / "poses.json", captions=tiny / "captions.json",
        model=tiny / "sd", steps=2, adapter=adapter, resolution=128, min_joints=5, batch=4,
        pictures_per_pose=3, chunk=2, device="cpu",
    )  # fmt: skip
    return [f"{name}={value}" for name, value in (keys | more).items()]


def run(monkeypatch, words, module=generate):
    """generate.py, or a fork of it, in this process. → its run folder"""
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, words)])
    module.main()
    return [word.split("=")[1] for word in map(str, words) if word.startswith("out=")][0]


def read(out):
    return json.loads((Path(out) / "annotations.json").read_text())


def config(tiny, **more):
    cfg = read_config(generate.KEYS, "", arguments(tiny, **more))
    generate.check(cfg)
    return cfg


def sources_of(cfg):
    people, rows, *_ = generate.read_poses(cfg)
    wanted = generate.rows_by_picture(people, rows)
    prompts = generate.read_prompts(cfg, list(wanted))
    return [generate.Source(cfg, people, rows, rows, prompts[i]) for i, rows in wanted.items()]


def seed_of(row, attempt=0):
    """The noise seed that an annotation of seed=0 should hold."""
    cfg = SimpleNamespace(seed=0)
    return generate.picture_seed(cfg, row["source_image_id"], row["k"], attempt)


def same_set(a, b):
    """Byte-identical lists and pictures, nothing more and nothing less."""
    # These hold the folder's name and times.
    own = {"config.yaml", "log.jsonl", "summary.json", "run.json"}
    files = []
    for out in (Path(a), Path(b)):
        paths = [path for path in out.rglob("*") if path.is_file() and path.name not in own]
        paths = [path for path in paths if not path.name.endswith(".checked.json")]  # of readers
        files.append({str(path.relative_to(out)): path.read_bytes() for path in paths})
    assert len(files[0]) > 5
    return files[0] == files[1]


def pixels(picture):
    return np.asarray(picture, np.int16)


# ----------------------------------------------------------------------------------------- drawings


def test_keypose_drawing_pixels():
    keypoints = np.zeros((17, 3))
    keypoints[[5, 7]] = [[20, 30, 1], [40, 30, 2]]  # left shoulder, left elbow
    keypoints[[6, 8]] = [[60, 30, 0.05], [80, 30, 1]]  # right shoulder under the score floor
    canvas = np.asarray(skeletons.draw_keypose([keypoints], (100, 60)))
    assert canvas.shape == (60, 100, 3)
    # Left link and joint.
    assert tuple(canvas[30, 30]) == (0, 255, 0) and tuple(canvas[30, 20]) == (0, 255, 0)
    assert (
        tuple(canvas[30, 80]) == (0, 128, 255)
        and not canvas[30, 70].any()
        and not canvas[30, 60].any()
    )
    assert canvas[28, 80].any() and not canvas[27, 80].any()  # joint radius 2
    assert (canvas[:, 30].any(1)).sum() == 3  # link 3 px wide


def test_openpose_drawing_pixels():
    keypoints = np.zeros((17, 3))
    keypoints[[5, 6]] = [[70, 40, 2], [30, 40, 2]]  # both shoulders: the neck lies between them
    canvas = np.asarray(skeletons.draw_openpose([keypoints], (100, 80)))
    assert tuple(canvas[40, 50]) == (255, 85, 0)  # neck, the second colour
    assert tuple(canvas[40, 30]) == (255, 170, 0) and tuple(canvas[40, 70]) == (85, 255, 0)
    # Limb neck - right shoulder: the first colour × 0.6.
    assert tuple(canvas[40, 40]) == (153, 0, 0)
    assert 7 <= canvas[:, 40].any(1).sum() <= 9  # half-width 4
    keypoints[5] = 0
    canvas = np.asarray(skeletons.draw_openpose([keypoints], (100, 80)))
    assert not canvas[40, 50].any() and canvas[40, 30].any()  # no neck without both shoulders


def compare(ours, theirs):
    """→ lit pixels in both ÷ in either; ours lit ÷ theirs; share of either's in the same colour."""
    ours = np.asarray(ours, int)
    either, same = ours.any(2) | theirs.any(2), abs(ours - theirs).max(2) <= 3
    both = ours.any(2) & theirs.any(2)
    return both.sum() / either.sum(), ours.any(2).sum() / theirs.any(2).sum(), same[either].mean()


def test_conditions_look_as_their_networks_were_trained():
    """conditions.png: these two people drawn with OpenCV by the annotators' rules.

    Left, T2I-Adapter's keypose: cv2.circle of radius 2, cv2.line of thickness 2. Middle, its
    openpose: circles of radius 4, then limbs (ellipse2Poly, fillConvexPoly), each blended by
    addWeighted(canvas, 0.4, limb, 0.6). Right, ControlNet 1.1's as controlnet_aux draws it: limbs,
    the canvas × 0.6, then circles.
    """
    c, s = np.cos(np.radians(20)), np.sin(np.radians(20))
    people = [STANDING + [10, 20], STANDING @ [[c, -s], [s, c]] * 1.1 + [25, 30]]
    people = [np.concatenate([xy, np.full((17, 1), 2.0)], 1) for xy in people]
    people[0][3] = people[1][9] = 0
    reference = np.split(np.asarray(Image.open(ROOT / "tests/conditions.png"), int), 3, 1)
    for (name, (draw, _)), theirs in zip(generate.CONDITIONS.items(), reference):
        shared, lit, same = compare(draw(people, (200, 280)), theirs)
        assert shared > 0.9 and 0.95 < lit < 1.05 and same > 0.9, (name, shared, lit, same)
    other = skeletons.draw_openpose(people, (200, 280))
    assert compare(other, reference[1])[2] < 0.88  # the two openposes differ


def test_overlay_and_sheet(tmp_path):
    keypoints = np.concatenate([STANDING, np.full((17, 1), 2.0)], 1)
    links = [(5, 7), (6, 8), (16, 99)]  # the last names no joint
    drawn = np.asarray(
        skeletons.overlay(np.full((3, 200, 100), 90, np.uint8), keypoints, links, JOINTS, scale=2)
    )
    assert drawn.shape == (400, 200, 3)
    assert (
        tuple(drawn[150, 152]) == skeletons.OVERLAY_LEFT
        and tuple(drawn[150, 48]) == skeletons.OVERLAY_RIGHT
    )
    grids.sheet(
        [[drawn, None], [drawn]],
        tmp_path / "s.png",
        ["a", "b " * 90],
        ["x", "y"],
        "title",
        (60, 120),
    )
    assert Image.open(tmp_path / "s.png").size[0] > 2 * 60 + 150


# ---------------------------------------------------------------------------------------- diffusion


@pytest.mark.parametrize("backend", ["t2i_adapter", "controlnet"])
def test_pose_and_prompt_stay_together(tiny, backend):
    """Picture k of a pose is the same alone and among others, and another prompt or condition gives
    another one.
    """
    cfg = config(tiny, backend=backend, batch=8)
    pipe = diffusion.load_painter(cfg, torch.device("cpu"))
    a, b = sources_of(cfg)[:2]
    assert a.size == b.size and a.prompt != b.prompt
    jobs = [(source, k) for source in (a, b) for k in range(2)]

    def paint(jobs, swap_prompt=False, swap_condition=False):
        other, conditions, prompts = {id(a): b, id(b): a}, [], []
        for source, _ in jobs:
            prompts.append((other[id(source)] if swap_prompt else source).prompt)
            conditions.append((other[id(source)] if swap_condition else source).condition)
        seeds = [generate.picture_seed(cfg, source.image_id, k) for source, k in jobs]
        return [pixels(p) for p in generate.paint(pipe, cfg, conditions, prompts, seeds)]

    together, alone = paint(jobs), [paint([job])[0] for job in jobs]
    for i, picture in enumerate(together):
        # Uint8 steps: only rounding may differ between batch sizes.
        assert abs(picture - alone[i]).max() <= 2
    for swapped in (paint(jobs, swap_prompt=True), paint(jobs, swap_condition=True)):
        assert all(abs(x - y).max() > 4 for x, y in zip(swapped, together))
    assert abs(together[0] - together[1]).mean() > 5  # the seed alone changes everything


def test_diffusion_set(tiny, tmp_path, monkeypatch):
    out = run(monkeypatch, arguments(tiny, out=tmp_path / "a", first_pose=0))
    document = read(out)
    rows, images = document["annotations"], {image["id"]: image for image in document["images"]}
    assert [row["pose_id"] for row in rows] == [p for p in (1, 2, 3, 4) for _ in range(3)]
    for row in rows:
        image = images[row["image_id"]]
        picture = Image.open(Path(out) / "images" / image["file_name"])
        assert picture.size == (image["width"], image["height"]) and row["num_keypoints"] == 17
        assert row["caption"].endswith(f"of {row['source_image_id']}")
        assert row["seed"] == seed_of(row)
        xy = np.reshape(row["keypoints"], (17, 3))[:, :2] / picture.size
        want = (STANDING + 0.5) / [100, 200]
        assert (
            abs(xy - want).max() < 0.06
        )  # joints follow the crop: half a pixel of cropping, at most a 64-px-high person
    by_pose = {p: {row["caption"] for row in rows if row["pose_id"] == p} for p in (1, 2, 3, 4)}
    assert all(len(captions) == 1 for captions in by_pose.values())  # one prompt for all K
    summary = json.loads((Path(out) / "summary.json").read_text())
    assert summary["left_out"] == {"with fewer than 5 joints": 1} and summary["pictures"] == 12
    assert not (Path(out) / ".parts").exists() and (Path(out) / "sheet.png").stat().st_size > 1000
    # the same again after a kill in the middle: chunk 1 is painted anew, chunk 0 is not
    shutil.copytree(out, tmp_path / "full")
    broken = tmp_path / "b"
    real = chunks.put

    def dies(path, content, durable=True):
        if path.name == "0000001.jsonl":
            raise RuntimeError("killed")
        real(path, content, durable)

    monkeypatch.setattr(chunks, "put", dies)
    with pytest.raises(RuntimeError, match="killed"):
        run(monkeypatch, arguments(tiny, out=broken, first_pose=0))
    assert not (broken / "annotations.json").exists()
    monkeypatch.setattr(chunks, "put", real)
    assert same_set(run(monkeypatch, arguments(tiny, out=broken, first_pose=0)), out)


def test_refused_pictures_are_retried_and_never_stored(tiny, tmp_path, monkeypatch, capsys):
    """The real safety checker, set so that it refuses one of the nine first pictures."""
    from diffusers.pipelines.stable_diffusion.safety_checker import (
        StableDiffusionSafetyChecker,
        cosine_distance,
    )
    from transformers import CLIPImageProcessor

    cfg = config(tiny)
    pipe, folder = diffusion.load_painter(cfg, torch.device("cpu")), tmp_path / "sd"
    keys = [(source, k) for source in sources_of(cfg) for k in range(3)]
    painted = []
    for source, k in keys:
        seeds = [generate.picture_seed(cfg, source.image_id, k)]
        painted += generate.paint(pipe, cfg, [source.condition], [source.prompt], seeds)
    shutil.copytree(tiny / "sd_checked", folder)
    checker = StableDiffusionSafetyChecker.from_pretrained(folder / "safety_checker")
    reader = CLIPImageProcessor.from_pretrained(folder / "feature_extractor")
    with torch.no_grad():
        seen = checker.vision_model(reader(painted, return_tensors="pt").pixel_values)[1]
        embedded = checker.visual_projection(seen)
        apart = embedded - embedded.mean(0)
        # What tells one of the nine from the others.
        checker.concept_embeds[0] = apart[apart.norm(dim=1).argmax()]
        concept, order = cosine_distance(embedded, checker.concept_embeds)[:, 0].sort()
        refused = keys[order[-1]][0]
        checker.concept_embeds_weights.fill_(2.0)  # a cosine is never so large
        checker.special_care_embeds_weights.fill_(2.0)
        checker.concept_embeds_weights[0] = (concept[-1] + concept[-2]) / 2  # one of nine is nearer
        assert concept[-1] - concept[-2] > 0.004  # the checker rounds to 0.001
    checker.save_pretrained(folder / "safety_checker")

    out = run(monkeypatch, arguments(tiny, out=tmp_path / "a", model=folder, retries=30))
    rows, summary = read(out)["annotations"], json.loads((tmp_path / "a/summary.json").read_text())
    assert summary["painted_again"] > 0 and len(rows) == 12
    moved = [row for row in rows if row["seed"] != seed_of(row)]
    later = [[seed_of(row, attempt) for attempt in range(1, 31)] for row in moved]
    assert moved and all(row["seed"] in seeds for row, seeds in zip(moved, later))
    for image in read(out)["images"]:
        assert np.asarray(Image.open(tmp_path / "a/images" / image["file_name"])).max() > 30
    # No retries: a pose short of one picture is left out whole, and named.
    out = run(monkeypatch, arguments(tiny, out=tmp_path / "b", model=folder, retries=0))
    summary = json.loads((tmp_path / "b/summary.json").read_text())
    why = "not finite, black or refused by the safety checker"
    assert summary["poses_skipped"] == [
        {"pose_id": pose, "skipped": why} for pose in refused.pose_ids
    ]
    assert summary["poses"] == 4 - len(refused.pose_ids)
    assert len(list((tmp_path / "b/images").iterdir())) == 3 * summary["poses"]


def with_vae(tiny, folder, change):
    """→ a copy of the tiny model whose decoder is changed by change(decoder)."""
    import diffusers

    shutil.copytree(tiny / "sd", folder)
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    with torch.no_grad():
        change(vae.decoder)
    vae.save_pretrained(folder / "vae")
    return folder


@pytest.mark.parametrize("channels", [1, 3])  # with a NaN in one colour a picture is not black
def test_a_picture_that_is_not_finite_is_refused(tiny, tmp_path, monkeypatch, channels):
    def spoil(decoder):
        decoder.conv_out.bias[:channels] = float("nan")

    model = with_vae(tiny, tmp_path / "sd", spoil)
    with pytest.raises(UserError, match="black or refused"):
        run(monkeypatch, arguments(tiny, out=tmp_path / "a", model=model, retries=1, poses=1))
    assert not list((tmp_path / "a").glob("images/*"))


def test_an_overflow_in_fp16_is_refused(tiny, tmp_path, monkeypatch):
    def spoil(decoder):
        decoder.conv_in.bias += 1e5  # fp16 ends at 65,504

    model = with_vae(tiny, tmp_path / "sd", spoil)
    keys = dict(model=model, retries=0, poses=1, pictures_per_pose=1)
    out = run(monkeypatch, arguments(tiny, out=tmp_path / "a", precision="fp32", **keys))
    assert len(read(out)["images"]) == 1
    with pytest.raises(UserError, match="black or refused"):
        run(monkeypatch, arguments(tiny, out=tmp_path / "b", precision="fp16", **keys))


def test_precision_is_what_the_device_has_in_hardware(tiny, monkeypatch):
    cpu, cuda, auto = torch.device("cpu"), torch.device("cuda"), config(tiny)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)  # by emulation
    for major, dtype in ((7, torch.float16), (8, torch.bfloat16)):  # V100 and T4; A100
        about = SimpleNamespace(major=major)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, about=about: about)
        assert diffusion.precision(auto, cuda) == dtype
    assert diffusion.precision(auto, cpu) == torch.float32
    assert diffusion.precision(config(tiny, precision="fp16"), cpu) == torch.float16


def test_pictures_are_decoded_one_by_one(tiny):
    """The decoder's memory does not grow with the batch."""
    cfg = config(tiny)
    pipe, source, sizes = diffusion.load_painter(cfg, torch.device("cpu")), sources_of(cfg)[0], []
    pipe.vae.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    generate.paint(pipe, cfg, [source.condition] * 3, [source.prompt] * 3, [1, 2, 3])
    assert sizes == [1, 1, 1]


def test_audit(tiny, tmp_path, monkeypatch):
    audit = dict(audit="vitpose", audit_model=tiny / "vitpose", audit_threshold=0)
    rows = read(run(monkeypatch, arguments(tiny, out=tmp_path / "a", **audit)))["annotations"]
    check_fields(tmp_path / "a/annotations.json")
    measured = np.array([row["oks"] for row in rows])
    assert (
        len(rows) == 12
        and (0 <= measured).all()
        and (measured < 1).all()
        and len(set(measured)) > 3
    )
    middle = float(np.sort(measured)[4])
    out = run(
        monkeypatch,
        arguments(tiny, out=tmp_path / "b", retries=12, **{**audit, "audit_threshold": middle}),
    )
    rows, summary = read(out)["annotations"], json.loads((tmp_path / "b/summary.json").read_text())
    assert (
        rows
        and min(row["oks"] for row in rows) >= round(middle, 4)
        and summary["painted_again"] > 0
    )
    assert len(rows) == 3 * summary["poses"] and summary["oks"]["p10"] >= round(middle, 4)
    assert all(row["skipped"] == "refused by the audit" for row in summary["poses_skipped"])
    with pytest.raises(UserError, match="refused by the audit"):
        run(
            monkeypatch,
            arguments(
                tiny, out=tmp_path / "c", retries=0, poses=2, **{**audit, "audit_threshold": 1}
            ),
        )


def test_prompts(tiny, tmp_path):
    cfg = config(tiny, seed=3)
    first = generate.read_prompts(cfg, [7, 8, 9])
    assert first == generate.read_prompts(cfg, [9, 8, 7])  # of the picture and the seed alone
    drawn = {generate.read_prompts(config(tiny, seed=s), [7])[7] for s in range(20)}
    assert drawn == {f"caption {j} of 7" for j in range(3)}
    with pytest.raises(UserError, match="no caption for image 11 "):
        generate.read_prompts(cfg, [7, 11])
    cfg = config(tiny, prompt_template="a {red|blue} person in {a park|a hall}")
    both = generate.read_prompts(cfg, list(range(7, 60)))
    assert both[7].startswith("caption") and len({both[i] for i in range(10, 60)}) == 4
    assert "a red person in a hall" in both.values()


def test_real_coco_captions(tiny, tmp_path, monkeypatch):
    data = os.environ.get("GENPOCCL_DATA")
    if not data:
        pytest.skip("GENPOCCL_DATA is not set: no COCO poses and captions")
    coco = dict(
        annotations=f"{data}/coco/person_keypoints.json", captions=f"{data}/coco/captions.json"
    )
    document = read(
        run(
            monkeypatch,
            arguments(tiny, out=tmp_path / "a", poses=5, min_joints=8, pictures_per_pose=2, **coco),
        )
    )
    captions = {}
    for row in json.loads(Path(coco["captions"]).read_text())["annotations"]:
        captions.setdefault(row["image_id"], []).append(row["caption"].strip())
    assert len(document["annotations"]) == 10
    assert all(
        row["caption"] in captions[row["source_image_id"]] for row in document["annotations"]
    )


def test_poses_given_as_scores(tmp_path, monkeypatch, capsys):
    """A pose estimator's file: joints above the threshold count, and are visible in the set."""
    write_poses(tmp_path)
    document = json.loads((tmp_path / "poses.json").read_text())
    for row in document["annotations"]:
        row["keypoints"][2::3] = [0.93, 0.3] * 8 + [0.1] if row["id"] < 4 else [0.04] * 17
    (tmp_path / "poses.json").write_text(json.dumps(document))
    words = [f"annotations={tmp_path / 'poses.json'}", "height=128", "width=64"]
    for score, seen in ((0.2, 16), (0.5, 8)):
        cfg = read_config(generate.KEYS, "", [*words, f"min_score={score}"])
        people, rows, left_out, about = generate.read_poses(cfg)
        visible = (people.keypoints[:, :, 2] == 2).sum(1)
        assert rows.tolist() == [0, 1, 2] and visible.tolist() == [seen] * 3 + [0] * 2
        assert left_out == {"with fewer than 1 joints": 2}
        assert about.startswith("5 people, 17 of COCO's 17 joints recognised")
        assert about.endswith(f", visible from a score of {score}")
    out = run(monkeypatch, [*words, "min_joints=16", f"out={tmp_path / 'a'}"])
    assert {row["pose_id"] for row in read(out)["annotations"]} == {1, 2, 3}
    assert "5 people, 17 of COCO's 17 joints recognised" in capsys.readouterr().err


def test_people_with_bad_boxes_are_left_out_up_to_a_key(tmp_path, monkeypatch):
    write_poses(tmp_path)
    document = json.loads((tmp_path / "poses.json").read_text())
    document["annotations"][1]["bbox"] = [900, 900, 20, 40]  # beside its picture
    document["annotations"][2]["bbox"] = [20, 20, 0, 40]
    (tmp_path / "poses.json").write_text(json.dumps(document))
    words = [f"annotations={tmp_path / 'poses.json'}", "height=128", "width=64", "min_joints=5"]
    for allowed in (0, 1):
        with pytest.raises(UserError, match="annotation 2 .*mend it or allow max_bad_boxes=2"):
            run(monkeypatch, [*words, f"max_bad_boxes={allowed}", f"out={tmp_path / 'a'}"])
        assert not (tmp_path / "a").exists()
    out = run(monkeypatch, [*words, "max_bad_boxes=2", f"out={tmp_path / 'a'}"])
    assert {row["pose_id"] for row in read(out)["annotations"]} == {1, 4}
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    assert summary["left_out"] == {"with fewer than 5 joints": 1, "with bad boxes": 2}


# ------------------------------------------------------------------------- a condition of one's own


def fork(folder, entry):
    """generate.py as someone forks it: one entry more in CONDITIONS. → the module"""
    text = (ROOT / "generate.py").read_text(encoding="utf-8")
    assert text.count("CONDITIONS = {\n") == 1
    (folder / "fork.py").write_text(text.replace("CONDITIONS = {\n", "CONDITIONS = {\n" + entry))
    spec = importlib.util.spec_from_file_location("fork", folder / "fork.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BONES = '    ("{}", "bones"): (lambda people, size: skeletons.overlay('
BONES += "np.zeros((*size[::-1], 3), np.uint8), people[0], [(5, 6), (11, 12)]), None),\n"


@pytest.mark.parametrize("backend", ["t2i_adapter", "controlnet"])
def test_another_condition_is_one_entry(tiny, tmp_path, monkeypatch, backend):
    module = fork(tmp_path, BONES.format(backend))
    words = arguments(tiny, backend, condition="bones", out=tmp_path / "bones")
    out = run(monkeypatch, words, module)
    plain = run(monkeypatch, arguments(tiny, backend, out=tmp_path / "plain"))
    ours, theirs = read(out), read(plain)
    assert ours["annotations"] == theirs["annotations"] and len(ours["annotations"]) == 12
    for image in ours["images"]:  # another condition: other pictures of the same people
        a, b = (Image.open(Path(o) / "images" / image["file_name"]) for o in (out, plain))
        assert a.size == b.size and abs(pixels(a) - pixels(b)).max() > 4
    cell = slice(60, 200), slice(130, 250)  # of the sheet: the first pose's condition
    sheets = [np.asarray(Image.open(Path(o) / "sheet.png"))[cell] for o in (out, plain)]
    assert (sheets[0] != sheets[1]).any()
    assert "condition: bones\n" in (Path(out) / "config.yaml").read_text()


def test_a_condition_without_adapter_asks_for_one(tiny, tmp_path, monkeypatch):
    module = fork(tmp_path, BONES.format("t2i_adapter"))
    words = [word for word in arguments(tiny, condition="bones") if "adapter=" not in word]
    with pytest.raises(UserError, match="condition=bones has no adapter by default; give adapter="):
        run(monkeypatch, [*words, "backend=t2i_adapter", f"out={tmp_path / 'a'}"], module)
    words = arguments(tiny, "controlnet", condition="bones", out=tmp_path / "a")
    with pytest.raises(UserError, match="^backend=controlnet takes condition=openpose$"):
        run(monkeypatch, words, module)
    # Whatever adapter= names, no message takes it for one of ours.
    words = arguments(tiny, condition="bones", adapter=tiny / "sd", out=tmp_path / "a")
    with pytest.raises(UserError) as error:
        run(monkeypatch, words, module)
    assert "adapter=" in str(error.value) and "ControlNet" not in str(error.value)
    assert not (tmp_path / "a").exists()


# ---------------------------------------------------------------------------------------- bad input


def test_bad_input_is_one_line(tiny, tmp_path, monkeypatch):
    good = json.loads((tiny / "poses.json").read_text())
    text = tmp_path / "text.json"
    text.write_text("no json")
    few = tmp_path / "few.json"
    few.write_text(
        json.dumps({**good, "annotations": [{**good["annotations"][0], "keypoints": [1, 2, 2]}]})
    )
    orphan = tmp_path / "orphan.json"
    orphan.write_text(
        json.dumps({**good, "annotations": [{**good["annotations"][0], "image_id": 77}]})
    )
    twice = tmp_path / "twice.json"
    twice.write_text(json.dumps({**good, "annotations": good["annotations"][:1] * 2}))
    points = np.reshape(good["annotations"][0]["keypoints"], (17, 3))
    box = good["annotations"][0]["bbox"]
    undrawable = {
        "headonly": points * (np.arange(17) < 5)[:, None],
        "beside": points + [9000, 0, 0],
    }
    for name, keypoints in undrawable.items():
        row = {**good["annotations"][0], "keypoints": keypoints.ravel().tolist(), "bbox": box}
        (tmp_path / f"{name}.json").write_text(
            json.dumps({**good, "annotations": [row, {**row, "id": 2}]})
        )
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "thesis.txt").write_text("mine")
    cases = [
        (["poses=0"], "poses="),
        (["poses=2", "pictures_per_pose=0"], "pictures_per_pose"),
        (["poses=2", "backend=midjourney"], "t2i_adapter"),
        (["poses=2", "pose=3"], "nearest valid key"),
        (["poses=2", "audit=vitpose"], "audit"),
        (["poses=2", f"captions={tiny / 'captions.json'}"], "takes no captions"),
        (["poses=2", "prompt_template=a man"], "takes no prompt_template"),
        (["poses=2", f"prompt_file={text}"], "takes no prompt_file"),
        (["poses=2", "condition=openpose"], "takes no condition"),
        (["task=people", "persons_train=9", "persons_val=9"], "persons_val=9"),
        (["task=people", "cameras=1"], "cameras"),
        (["task=people", "model=sd"], "takes no model"),
        (["task=people", "backend=t2i_adapter"], "backend=puppet"),
        (["task=people", f"annotations={tiny / 'poses.json'}"], "annotations"),
        ([f"annotations={tmp_path / 'none.json'}"], "none.json"),
        ([f"annotations={text}"], "JSON"),
        ([f"annotations={few}"], "51"),
        ([f"annotations={orphan}"], "77"),
        ([f"annotations={twice}"], "stands twice"),
        (
            [f"annotations={tmp_path / 'headonly.json'}", "parts=true"],
            "nobody of 2 people can be drawn (too few joints",
        ),
        (
            [f"annotations={tmp_path / 'beside.json'}", "parts=true"],
            "nobody of 2 people can be drawn (too few joints",
        ),
        ([f"annotations={tiny / 'captions.json'}"], "as COCO people: KeyError 'bbox'"),
        (
            [f"annotations={tiny / 'poses.json'}", "min_joints=17", "min_side=9999"],
            "no person is left",
        ),
        (["backend=t2i_adapter"], "annotations="),
        (["backend=t2i_adapter", f"annotations={tiny / 'poses.json'}"], "captions="),
        (arguments(tiny, backend="controlnet", condition="keypose"), "condition"),
        (arguments(tiny, captions=few), "as COCO captions: "),
        (arguments(tiny, model=tmp_path / "nowhere"), "model="),
        (arguments(tiny, adapter=tiny / "sd"), "adapter="),
        (arguments(tiny, audit="vitpose", audit_model=tiny / "sd"), "audit_model="),
    ]
    for words, told in cases:
        with pytest.raises(UserError) as error:
            run(monkeypatch, [*words, f"out={tmp_path / 'out'}"])
        assert told in str(error.value) and "\n" not in str(error.value), words
        assert not (tmp_path / "out").exists(), words
    with pytest.raises(UserError, match="not a run of this project"):
        run(monkeypatch, ["poses=2", f"out={plain}"])
    assert [path.name for path in plain.iterdir()] == ["thesis.txt"]


def test_missing_model_and_exit_code(tiny, tmp_path):
    words = arguments(tiny, out=tmp_path / "a", adapter="someone/not-downloaded")
    environment = dict(os.environ, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "cache"))
    done = subprocess.run(
        [sys.executable, ROOT / "generate.py", *words],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("error: adapter=someone/not-downloaded")
        and done.stderr.count("\n") == 1
    )
    assert "hf download someone/not-downloaded" in done.stderr and not (tmp_path / "a").exists()


def test_pickled_weights_run_no_code(tiny, tmp_path, monkeypatch):
    """An adapter that comes as a pickle with code in it is refused, and the code does not run."""

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = tmp_path / "t2i"
    folder.mkdir()
    shutil.copy(tiny / "t2i/config.json", folder)
    torch.save({"conv": Bomb()}, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="adapter="):
        run(monkeypatch, arguments(tiny, out=tmp_path / "a", adapter=folder))
    assert not (tmp_path / "ran").exists()
