"""What a diffusion model is shown: the drawings of poses, pixel by pixel, and a condition of one's
own.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from generate_runs import JOINTS, STANDING, arguments, pixels, read, run
from PIL import Image

import generate
from drawing import grids, skeletons
from formats.joints import COCO_JOINTS
from plumbing.errors import UserError

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


# As published: T2I-Adapter's ldm/modules/structure_condition/utils.py, whose colours are BGR, and
# openpose/util.py of T2I-Adapter and of ControlNet, whose limbs count from 1.
LINKS = "15-13 13-11 16-14 14-12 11-12 5-11 6-12 5-6 5-7 6-8 7-9 8-10 1-2 0-1 0-2 1-3 2-4 3-5 4-6"
B, L, R = (51, 153, 255), (0, 255, 0), (255, 128, 0)
LINK_COLOURS = [L, L, R, R, B, B, B, B, L, R, L, R, B, B, B, B, B, B, B]
LIMBS = "2-3 2-6 3-4 4-5 6-7 7-8 2-9 9-10 10-11 2-12 12-13 13-14 2-1 1-15 15-17 1-16 16-18"
ORDER = "nose neck right_shoulder right_elbow right_wrist left_shoulder left_elbow left_wrist "
ORDER += "right_hip right_knee right_ankle left_hip left_knee left_ankle right_eye left_eye "
ORDER += "right_ear left_ear"
RAINBOW = [(255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0)]
RAINBOW += [(0, 255, 0), (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255)]
RAINBOW += [(0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85)]


def test_joints_limbs_and_colours_are_the_published_ones():
    assert [colour[::-1] for colour in skeletons.KEYPOSE_JOINTS] == [B] * 5 + [L, R] * 6
    links = [([a, b], colour[::-1]) for a, b, colour in skeletons.KEYPOSE_LINKS]
    published, limbs = ([[int(j) for j in link.split("-")] for link in text.split()]
                        for text in (LINKS, LIMBS))  # fmt: skip
    assert links == list(zip(published, LINK_COLOURS))
    assert [list(link) for link in skeletons.OPENPOSE_LINKS] == limbs
    assert skeletons.OPENPOSE_COLOURS == RAINBOW
    names = [None if name == "neck" else COCO_JOINTS.index(name) for name in ORDER.split()]
    assert skeletons.OPENPOSE_FROM_COCO == names


def test_a_link_that_leaves_the_picture_is_not_drawn():
    """As T2I-Adapter's annotator; the joint that is inside is."""
    keypoints = np.zeros((17, 3))
    keypoints[[5, 7]] = [[30, 30, 2], [-20, 30, 2]]
    assert np.asarray(skeletons.draw_keypose([keypoints], (64, 64))).any(2).sum() == 13


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


# ------------------------------------------------------------------------- a condition of one's own


def fork(folder, entry):
    """generate.py as someone forks it: one entry more in CONDITIONS. → the module"""
    text = (ROOT / "generate.py").read_text(encoding="utf-8")
    head, found, rest = text.partition("CONDITIONS = {\n")
    own, _, rest = rest.partition("}\n")
    (folder / "fork.py").write_text(f"{head}{found}{own}{entry}}}\n{rest}")
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
