"""generate.py with tiny real pipelines: poses, prompts, retries, precision, the audit."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import check_fields
from generate_runs import STANDING, arguments, config, pixels, read, run, same_set, write_poses
from PIL import Image

import generate
from plumbing import chunks, diffusion
from plumbing.config import read_config
from plumbing.errors import UserError


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


@pytest.mark.parametrize("name", diffusion.SAMPLERS)
@pytest.mark.parametrize("saved_by", ["DEISMultistepScheduler", "EulerDiscreteScheduler"])
def test_latents_are_not_clipped_whoever_saved_the_model(name, saved_by, capfd):
    """A perfect noise prediction leads back to latents beyond ±1, as Stable Diffusion's are."""
    import diffusers

    config = getattr(diffusers, saved_by)(beta_schedule="scaled_linear").config
    scheduler = diffusion.sampler(name, config)
    scheduler.set_timesteps(20)
    assert len(scheduler.timesteps) <= 21  # PNDM's first steps would be 29 evaluations
    goal, noise = torch.tensor([3.0, -2.0, 0.5]), torch.tensor([0.3, 0.1, -1.2])
    if name == "euler":  # its latents are x₀ + σ · noise
        x = goal + scheduler.sigmas[0] * noise
        for t, sigma in zip(scheduler.timesteps, scheduler.sigmas):
            scheduler.scale_model_input(x, t)
            x = scheduler.step((x - goal) / sigma, t, x).prev_sample
    else:
        a = scheduler.alphas_cumprod[scheduler.timesteps[0]]
        x = a.sqrt() * goal + (1 - a).sqrt() * noise
        for t in scheduler.timesteps:
            a = scheduler.alphas_cumprod[t]
            x = scheduler.step((x - a.sqrt() * goal) / (1 - a).sqrt(), t, x).prev_sample
    assert (x - goal).abs().max() < 0.2, x
    assert "not expected" not in capfd.readouterr().err


def sources_of(cfg):
    people, rows, *_ = generate.read_poses(cfg)
    wanted = generate.rows_by_picture(people, rows)
    prompts = generate.read_prompts(cfg, list(wanted))
    return [generate.Source(cfg, people, rows, rows, prompts[i]) for i, rows in wanted.items()]


def seed_of(row, attempt=0):
    """The noise seed that an annotation of seed=0 should hold."""
    cfg = SimpleNamespace(seed=0)
    return generate.picture_seed(cfg, row["source_image_id"], row["k"], attempt)


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
