"""generate.py and experiments/probe.py: each setting and each file reaches what it is for."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from coco_sets import write_set
from generate_runs import arguments, config, pixels, read, run
from PIL import Image

import generate
from experiments import probe
from formats.coco import read_people
from plumbing import diffusion

CPU = torch.device("cpu")

# -------------------------------------------------------------------------------------- generate.py


@pytest.mark.parametrize("backend", ["t2i_adapter", "controlnet"])
def test_adapter_weight_is_how_much_the_condition_steers(tiny, backend):
    configs = [config(tiny, backend=backend, adapter_weight=w) for w in (0, 1)]
    pipe = diffusion.load_painter(configs[0], CPU)
    conditions = [Image.new("RGB", (64, 64), colour) for colour in ("black", "white")]
    apart = []
    for cfg in configs:
        straight, swapped = (
            np.stack([*map(pixels, generate.paint(pipe, cfg, c, ["a", "b"], [1, 2]))])
            for c in (conditions, conditions[::-1])
        )
        apart.append(abs(straight - swapped).max())
    assert apart[0] == 0 and apart[1] > 4


@pytest.fixture(scope="module")
def painted(tiny, tmp_path_factory):
    """Runs that differ in their seed alone, under one prompt. → [(folder, conditions shown)]"""
    folder, paint, runs = tmp_path_factory.mktemp("painted"), generate.paint, []
    for seed in (0, 1):
        shown, keys = [], dict(steps=1, pictures_per_pose=2, prompt_template="a person", seed=seed)

        def look(pipe, cfg, conditions, *more, shown=shown):
            shown.extend(conditions)
            return paint(pipe, cfg, conditions, *more)

        words = arguments(tiny, out=folder / str(seed), **keys)
        words = [word for word in words if not word.startswith("captions=")]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(generate, "paint", look)
            runs.append((Path(run(patch, words)), shown))
    return runs


def test_a_condition_shows_also_those_who_are_not_wanted(painted):
    """The picture of 400 × 210 px: a person on the right, and one of too few joints on the left."""
    out, shown = painted[0]
    assert {row["pose_id"] for row in read(out)["annotations"]} == {1, 2, 3, 4}
    wide = [np.asarray(condition) for condition in shown if condition.size == (192, 64)]
    assert len(wide) == 2  # K
    for condition in wide:
        assert condition[:, :60].any() and condition[:, 90:].any()


def test_another_seed_gives_other_pictures(painted):
    first, second = (read(out)["annotations"] for out, _ in painted)
    assert {row["caption"] for row in first + second} == {"a person"}
    assert not {row["seed"] for row in first} & {row["seed"] for row in second}
    names = [image["file_name"] for image in read(painted[0][0])["images"]]
    for name in names:
        a, b = (pixels(Image.open(out / "images" / name)) for out, _ in painted)
        assert abs(a - b).mean() > 5, name


# ---------------------------------------------------------------------------------------- the probe


class BrightestPixel:
    """An encoder whose tokens all are (x, y) of the brightest pixel from the picture's centre."""

    n_special, patch_size, image_size, grid = 1, 8, (64, 32), (8, 4)

    def __call__(self, images):
        place = images.sum(1).flatten(1).argmax(1)
        tokens = torch.stack([place % 32 - 15.5, place // 32 - 31.5], 1)
        return tokens[:, None].expand(-1, 1 + 32, -1)


@pytest.fixture(scope="module")
def circle(tmp_path_factory):
    """16 people, all joints in one bright dot on a circle; numbers 2i and 2i + 1 are mirror images.
    → COCO JSON
    """
    folder = tmp_path_factory.mktemp("circle")
    path = write_set(folder, n_poses=16, per_pose=1, pose_ids=False)
    document = json.loads(path.read_text())
    for i, (image, row) in enumerate(zip(document["images"], document["annotations"])):
        angle = np.radians(20 * (i // 2) - 70)
        x, y = np.round([15.5 + 13 * (-1) ** i * np.cos(angle), 31.5 + 13 * np.sin(angle)])
        picture = Image.new("RGB", (32, 64))
        picture.putpixel((int(x), int(y)), (255, 255, 255))
        image["file_name"] = f"{i}.png"
        picture.save(folder / "images" / image["file_name"])
        row["keypoints"] = [x, y, 2] * 17
    path.write_text(json.dumps(document))
    return path


def test_the_mirror_question_is_asked_with_the_picture_in_a_mirror(circle):
    cfg = SimpleNamespace(seed=0, pairs=10)
    found = probe.probe_poses(cfg, BrightestPixel(), read_people(circle)[0], CPU)
    mirrored, as_is = (found[None, name, "cls"] for name in ("mirror_oks", "unmirrored_oks"))
    assert mirrored == pytest.approx(found["best possible", "mirror_oks", ""])
    assert as_is < mirrored - 0.3


def test_attributes_are_fitted_on_the_training_file_alone(circle):
    """Who stands on the right; in the second training file everybody's answer is wrong."""
    folder, figures = circle.parent, []
    for name, inverted in (("test", 0), ("right", 0), ("wrong", 1)):
        rows = [f"images/{i}.png,{(i + 1 + inverted) % 2}" for i in range(16)]
        (folder / f"{name}.csv").write_text("\n".join(["image,right", *rows]) + "\n")
    for name in ("right", "wrong"):
        files = dict(attributes_train=folder / f"{name}.csv", attributes_test=folder / "test.csv")
        cfg = SimpleNamespace(workers=0, **files)
        splits = probe.read_labels(cfg)
        figures.append(probe.probe_attributes(cfg, BrightestPixel(), *splits, CPU)["mA", "cls", ""])
    assert figures[0] > 0.95 and figures[1] < 0.05
