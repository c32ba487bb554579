"""The puppet: a body that obeys its joints, pictures that obey their poses, identities that obey
their words.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

import puppet as pp
from puppet import body, figure, scene

SIZE = (128, 64)
DATA = os.environ.get("GENPOCCL_DATA")
real = pytest.mark.skipif(not DATA, reason="GENPOCCL_DATA is not set: no real poses")
LEFT_RIGHT = ((5, 6), (7, 8), (9, 10), (11, 12), (13, 14), (15, 16))


def draw(poses, n, size=SIZE, seed=0, k=0, camera=None):
    keys = [(i, k) for i in range(n)]
    return pp.render(
        poses, pp.sample_identities(seed, keys), pp.sample_scenes(seed, keys, camera), size
    )


@pytest.fixture(scope="module")
def sampled():
    poses = pp.sample_poses(3, range(160))
    return poses, draw(poses, 160)


# -------------------------------------------------------------------------------------- determinism


def test_a_picture_depends_on_itself_only():
    """Byte for byte: alone, in a batch, in another order; and other seeds give other pictures."""
    keys = [(p, k) for p in (4, 9, 2) for k in (0, 1)]
    people, scenes = pp.sample_identities(5, keys), pp.sample_scenes(5, keys)
    poses = pp.take(pp.sample_poses(5, [4, 9, 2]), np.repeat(range(3), 2))
    batch = pp.render(poses, people, scenes, SIZE)
    for i in (5, 0, 3):
        alone = pp.render(
            pp.sample_poses(5, [keys[i][0]]),
            pp.sample_identities(5, [keys[i]]),
            pp.sample_scenes(5, [keys[i]]),
            SIZE,
        )
        for name, array in alone.items():
            assert array.tobytes() == batch[name][i : i + 1].tobytes(), name
    assert not np.array_equal(pp.sample_poses(6, [4]).points, poses.points[:1])
    for sample in (pp.sample_identities, pp.sample_scenes):
        assert repr(sample(5, keys[:1])) == repr(sample(5, keys[:1])) != repr(sample(6, keys[:1]))


def test_real_poses_do_not_depend_on_the_batch():
    poses = pp.sample_poses(1, range(6))
    out = draw(poses, 6)
    some = pp.poses_from_keypoints(out["keypoints"], out["boxes"])
    for i in (0, 5):
        one = pp.poses_from_keypoints(out["keypoints"][i : i + 1], out["boxes"][i : i + 1])
        for a, b in zip(one, some):
            assert a.tobytes() == b[i : i + 1].tobytes()


def test_same_pose_differs_in_everything_else():
    """Four pictures of each of 12 poses: same keypoints, other people, other places."""
    poses = pp.sample_poses(2, range(12))
    outs = [draw(poses, 12, k=k, seed=2) for k in range(4)]
    for a in range(4):
        for b in range(a):
            one, two = outs[a], outs[b]
            assert np.array_equal(
                one["keypoints"][..., :2][one["keypoints"][..., 2] > 0],
                two["keypoints"][..., :2][one["keypoints"][..., 2] > 0],
            )
            difference = np.abs(one["image"].astype(int) - two["image"]).mean(-1)
            person = (one["parts"] > 0) & (two["parts"] > 0)
            for i in range(12):
                assert difference[i][person[i]].mean() > 12, (a, b, i)
            assert np.mean([difference[i][person[i]].mean() for i in range(12)]) > 45
            assert difference[(one["parts"] == 0) & (two["parts"] == 0)].mean() > 30


def test_a_camera_keeps_its_background():
    keys = [(i,) for i in range(8)]
    scenes = pp.sample_scenes(0, keys, camera=[0, 0, 0, 0, 1, 1, 1, 1]).scenes
    assert len({s["family"] + str(s["wall"]) for s in scenes[:4]}) == 1
    assert len({str(s["wall"]) for s in scenes}) == 2
    places = [scene.draw_background(s, 64, 32) for s in scenes]
    near = np.abs(places[0] - places[1]).mean()
    assert 0 < near < np.abs(places[0] - places[4]).mean()


# --------------------------------------------------------------------------------------------- body


def test_bones_keep_their_length():
    points = pp.sample_poses(0, range(300)).points
    for a, b, metres in body.BONES:
        length = np.linalg.norm(points[:, a] - points[:, b], axis=1)
        stature = length / metres
        assert (stature > 0.89).all() and (stature < 1.09).all()
        # All bones of one person grow together.
        first = (
            np.linalg.norm(points[:, body.BONES[0][0]] - points[:, body.BONES[0][1]], axis=1)
            / body.BONES[0][2]
        )
        np.testing.assert_allclose(stature, first, rtol=1e-6)


def test_joint_limits_and_hinges():
    poses = pp.sample_poses(0, range(500))
    low, high = np.array(list(body.LIMITS.values())).T
    assert (poses.angles >= low).all() and (poses.angles <= high).all()
    at = lambda j: poses.points[:, j]  # noqa: E731
    for o in (0, 1):
        thigh = at(body.L_KNE + o) - at(body.L_HIP + o)
        shank = at(body.L_ANK + o) - at(body.L_KNE + o)
        # The shin bends towards the heel, never towards the toe.
        toe = at(body.L_TOE + o) - at(body.L_HEEL + o)
        front = toe - shank * (toe * shank).sum(1, keepdims=True) / (shank**2).sum(1, keepdims=True)
        bend = (
            (thigh * front).sum(1) / np.linalg.norm(thigh, axis=1) / np.linalg.norm(front, axis=1)
        )
        assert (bend > -0.06).all()  # the foot's own small turn is in `front`
        assert (bend > 0.5).mean() > 0.15  # and knees do bend
        upper = at(body.L_ELB + o) - at(body.L_SHO + o)
        fore = at(body.L_WRI + o) - at(body.L_ELB + o)
        cos = (upper * fore).sum(1) / np.linalg.norm(upper, axis=1) / np.linalg.norm(fore, axis=1)
        assert (np.degrees(np.arccos(np.clip(cos, -1, 1))) <= 145.01).all()


def test_left_is_left():
    """Whoever shows us the chest has the left shoulder, hip, ear at the picture's right; from
    behind at the left.
    """
    poses = pp.sample_poses(0, range(400))
    upright = np.array(poses.points[:, body.NECK, 1] < poses.points[:, body.L_HIP, 1] - 0.3)
    xy = pp.project(poses, SIZE)[0]
    for rows, sign in ((poses.chest[:, 2, 2] > 0.5, 1), (poses.chest[:, 2, 2] < -0.5, -1)):
        rows = rows & upright
        assert rows.sum() > 60
        assert (sign * (xy[rows, body.L_SHO, 0] - xy[rows, body.R_SHO, 0]) > 0).all()
    # The nose is in front of the ears, along the way the head looks.
    look = poses.points[:, body.NOSE] - poses.points[:, body.HEAD]
    assert ((look * -poses.head[:, 2]).sum(1) > 0.08).all()


# ----------------------------------------------------------------------------------------- pictures


def test_keypoints_are_the_projected_joints(sampled):
    poses, out = sampled
    k, (H, W) = out["keypoints"], SIZE
    scale = np.minimum(W / poses.window[:, 2], H / poses.window[:, 3])[:, None, None]
    xy = (
        out["joints3d"][..., :2] / out["joints3d"][..., 2:] - poses.window[:, None, :2]
    ) * scale + (W / 2, H / 2)
    inside = k[..., 2] > 0
    np.testing.assert_allclose(k[..., :2][inside], xy[inside], atol=2e-3)
    assert inside.mean() > 0.97
    assert (k[..., 0][inside] > -0.5).all() and (k[..., 1][inside] < H - 0.5).all()
    assert (k[~inside] == 0).all()


def test_visible_joints_lie_on_their_part_and_boxes_hold_the_person(sampled):
    _, out = sampled
    k, parts = out["keypoints"], out["parts"]
    x, y = (k[..., i].round().astype(int) for i in (0, 1))
    at = parts[np.arange(len(k))[:, None], y.clip(0, SIZE[0] - 1), x.clip(0, SIZE[1] - 1)]
    for joint, part in (
        (7, 3),
        (8, 4),
        (9, 3),
        (10, 4),
        (13, 5),
        (14, 6),
        (15, 5),
        (16, 6),
        (0, 1),
    ):
        seen = k[:, joint, 2] == 2
        assert seen.sum() > 30 and (at[seen, joint] == part).mean() > 0.95
    hidden = (k[..., 2] == 1).mean()
    assert 0.05 < hidden < 0.5  # turned faces, far arms, occluders
    for box, mask in zip(out["boxes"], parts):
        ys, xs = np.nonzero(mask)
        assert (
            xs.min() >= box[0]
            and xs.max() < box[0] + box[2]
            and ys.min() >= box[1]
            and ys.max() < box[1] + box[3]
        )
    assert 0.08 < (parts > 0).mean() < 0.5
    assert set(np.unique(parts)) == set(range(7))


def test_a_face_seen_from_behind_is_hidden(sampled):
    poses, out = sampled
    behind = poses.head[:, 2, 2] < -0.5
    assert behind.sum() > 20 and (out["keypoints"][behind, :3, 2] < 2).all()


def test_sizes_agree():
    """The same pictures twice as large: keypoints double, pictures look alike."""
    poses = pp.sample_poses(7, range(6))
    small, large = draw(poses, 6, (128, 64)), draw(poses, 6, (256, 128))
    both = (small["keypoints"][..., 2] > 0) & (large["keypoints"][..., 2] > 0)
    np.testing.assert_allclose(
        small["keypoints"][both][:, :2] * 2, large["keypoints"][both][:, :2], atol=1e-3
    )
    half = large["image"].reshape(6, 128, 2, 64, 2, 3).mean((2, 4))
    assert np.abs(half - small["image"]).mean() < 16
    wide = draw(poses, 6, (96, 80))  # another aspect: still everybody inside
    assert (wide["boxes"][:, 2] > 5).all() and (wide["keypoints"][..., 2] > 0).mean() > 0.95


# --------------------------------------------------------------------------------------- identities


def dominant_colour(pixels):
    """Nearest palette name of pixels (n, 3) in [0, 1] by hue if coloured, by lightness if not."""
    mean = np.median(pixels, 0)
    mean = mean / max(mean.max(), 1e-3)
    distance = {n: np.abs(np.array(c) / max(c) - mean).sum() for n, c in figure.COLOURS.items()}
    return min(distance, key=distance.get)


def test_clothes_have_the_colour_their_name_says():
    """Plain clothes in neutral light: the torso's pixels are nearest to the colour named (black,
    gray, white: grey).
    """
    people = [
        p
        for p in pp.sample_identities(0, [(i,) for i in range(700)]).people
        if p["upper_pattern"] == "plain"
    ]
    people = [
        p for p in people if p["upper"] in ("t-shirt", "sweater", "hoodie") and not p["backpack"]
    ][:60]
    # Backs.
    poses = pp.take(
        pp.sample_poses(0, range(400)), pp.sample_poses(0, range(400)).chest[:, 2, 2] < -0.7
    )
    poses = pp.take(poses, np.arange(60))
    for p in people:
        p["hair"], p["bag"] = "short", "none"
    scenes = pp.sample_scenes(0, [(i,) for i in range(60)])
    for s in scenes.scenes:
        s.update(cast=np.ones(3, np.float32), noise=0.0, blur=0.0, occluder=None)
    out = pp.render(poses, pp.Identities(people), scenes, SIZE)
    right = 0
    greys = {"black", "white", "gray"}
    for i, p in enumerate(people):
        rows = np.flatnonzero((out["parts"][i] == 2).any(1))
        torso = out["parts"][i] == 2
        torso[rows[0] + int(0.75 * len(rows)) :] = False  # above the trousers
        found = dominant_colour(out["image"][i][torso] / 255)
        near = {
            found,
            "yellow" if found == "orange" else found,
            "orange" if found == "brown" else found,
        }
        right += p["upper_colour"] in near or (p["upper_colour"] in greys and found in greys)
    assert right >= 55, right


def test_attributes_and_sentences_are_true():
    rng = np.random.default_rng(0)
    people = pp.sample_identities(1, [(p, 0) for p in range(600)]).people
    table = [pp.attributes(p) for p in people]
    names = list(table[0])
    rates = {n: np.mean([row[n] for row in table]) for n in names}
    assert all(0 < r < 1 for r in rates.values()), rates
    for row in table:
        assert (
            sum(row["up_" + c] for c in figure.UP_COLOURS)
            == 1
            == sum(row["down_" + c] for c in figure.DOWN_COLOURS)
        )
        assert not (row["backpack"] and row["bag"])
    said = set()
    for p, row in zip(people, table):
        text = pp.sentence(p, rng)
        words = text.lower().replace(",", " ").replace(".", " ").split()
        said.add(text)
        assert text[0].isupper() and text.endswith(".") and "  " not in text and "none" not in text
        assert (
            p["upper_colour"] in words
            and p["lower_colour"] in words
            and p["upper"] in text
            and p["lower"] in words
        )
        facts = dict(
            backpack=row["backpack"],
            handbag=row["handbag"],
            skirt=row["skirt"],
            cap=p["hat"] == "cap",
        )
        facts |= dict(
            bald=p["hair"] == "bald", sunglasses=p["glasses"] == "sunglasses", woman=row["female"]
        )
        facts |= {"short-sleeved": row["short_sleeves"], "man": not row["female"]}
        facts |= dict(striped="striped" in (p["upper_pattern"], p["lower_pattern"]))
        for word, true in facts.items():
            assert true or word not in words, (word, text)
    assert len(said) > 590
    assert len({pp.sentence(people[0], rng) for _ in range(40)}) > 8


def test_attributes_show_in_the_picture():
    """Changing one attribute changes pixels of the right part and nothing of the keypoints."""
    pose = pp.take(
        pp.sample_poses(0, range(400)), pp.sample_poses(0, range(400)).chest[:, 2, 2] < -0.8
    )
    pose = pp.take(pose, [3])
    scene, person = pp.sample_scenes(0, [(0,)]), pp.sample_identities(0, [(0,)]).people[0]
    person |= dict(
        backpack=False,
        bag="none",
        hat="none",
        hair="short",
        sleeves="long",
        lower="trousers",
        lower_long=True,
        upper="sweater",
        upper_pattern="plain",
    )
    base = pp.render(pose, pp.Identities([person]), scene, SIZE)
    for change in (
        dict(backpack=True),
        dict(upper_pattern="striped"),
        dict(bag="handbag"),
        dict(hat="cap"),
        dict(hair="long"),
        dict(sleeves="short"),
        dict(lower="skirt"),
    ):
        other = pp.render(pose, pp.Identities([person | change]), scene, SIZE)
        changed = np.abs(other["image"].astype(int) - base["image"]).max(-1) > 12
        assert changed.sum() > 15, change
        assert np.array_equal(other["keypoints"][..., :2], base["keypoints"][..., :2])


def test_a_logo_shows_in_its_colour_from_the_front_only():
    sampled = pp.sample_poses(0, range(200))
    person, scene = pp.sample_identities(0, [(0,)]).people[0], pp.sample_scenes(0, [(0,)])
    scene.scenes[0].update(cast=np.ones(3, np.float32), noise=0.0, blur=0.0, occluder=None)
    person |= dict(backpack=False, bag="none", hair="short", upper="sweater", sleeves="long")
    person |= dict(
        upper_pattern="plain",
        upper_colour="black",
        upper_rgb=np.array(figure.COLOURS["black"], np.float32),
    )
    for front in (True, False):
        poses = pp.take(
            sampled, np.flatnonzero((1 if front else -1) * sampled.chest[:, 2, 2] > 0.8)[:10]
        )
        for name in ("red", "blue"):
            logo = person | dict(
                upper_pattern="logo", upper_second_rgb=np.array(figure.COLOURS[name], np.float32)
            )
            shows = 0
            for i in range(10):
                plain, out = (
                    pp.render(pp.take(poses, [i]), pp.Identities([p]), scene, SIZE)
                    for p in (person, logo)
                )
                changed = np.abs(out["image"].astype(int) - plain["image"]).max(-1) > 25
                # The trunk, but for soft borders.
                assert (out["parts"][changed] == 2).sum() >= 0.8 * changed.sum()
                shows += changed.sum() > 8 and dominant_colour(out["image"][changed] / 255) == name
            # An arm may be in front of it.
            assert shows >= 8 if front else shows == 0, (front, name, shows)


# ----------------------------------------------------------------------------------- real 2-D poses


def expected_px(keypoints, boxes, size, pad=1.15):
    """The documented map, in plain loops: padded box, aspect preserved, centred."""
    out = np.zeros((len(boxes), 17, 2))
    for i, (x, y, w, h) in enumerate(boxes):
        scale = min(size[1] / (w * pad), size[0] / (h * pad))
        for j in range(17):
            out[i, j, 0] = (keypoints[i, j, 0] - (x + w / 2)) * scale + size[1] / 2
            out[i, j, 1] = (keypoints[i, j, 1] - (y + h / 2)) * scale + size[0] / 2
    return out


def check_exact(keypoints, boxes, size):
    poses = pp.poses_from_keypoints(keypoints, boxes)
    ok = poses.ok
    out = draw(pp.take(poses, ok), int(ok.sum()), size)
    wanted, given = expected_px(keypoints, boxes, size)[ok], (keypoints[..., 2] > 0)[ok]
    inside = out["keypoints"][..., 2] > 0
    assert np.abs(out["keypoints"][..., :2] - wanted)[given & inside].max() < 0.01
    edge = (wanted < -0.5).any(-1) | (wanted >= np.array(size[::-1]) - 0.5).any(-1)
    assert np.array_equal(inside[given], ~edge[given])
    # Completed joints never pass for given ones.
    assert (out["keypoints"][..., 2][~given] < 2).all()
    assert np.isfinite(poses.points).all() and (poses.points[..., 2] > 1).all()
    assert ((out["parts"] > 0).mean((1, 2)) > 0.02).mean() > 0.98
    return poses, out


def test_missing_joints_are_completed_and_hopeless_poses_refused():
    source = draw(pp.sample_poses(11, range(40)), 40)
    k, boxes = source["keypoints"].astype(float), source["boxes"].astype(float)
    k[..., 2] = np.where(k[..., 2] > 0, 2, 0)
    assert pp.poses_from_keypoints(k, boxes).ok.all()
    for drop in (
        [9, 10, 15, 16],
        [5, 11],
        [11, 12, 13, 14, 15, 16],
        [5, 6, 7, 8, 9, 10],
        [0, 1, 2, 3, 4],
        [7, 8, 13, 14],
        [6, 11],
    ):
        part = k.copy()
        part[:, drop] = 0
        poses, _ = check_exact(part, boxes, SIZE)
        assert poses.ok.mean() > 0.9, drop
    for drop in ([5, 6, 11, 12], [6, 11, 12], list(range(3, 17))):
        part = k.copy()
        part[:, drop] = 0
        assert not pp.poses_from_keypoints(part, boxes).ok.any()
    # All on one point.
    assert not pp.poses_from_keypoints(np.full((1, 17, 3), 5.0), [[0, 0, 9, 9]], SIZE).ok[0]
    assert not pp.poses_from_keypoints(k[:1], [[0, 0, 0, 0]]).ok[0]


def test_lifting_finds_the_way_a_person_faces():
    """From our own 2-D joints: front and back are told apart, and the lifted depth is better than
    flat.
    """
    truth = pp.sample_poses(12, range(200))
    out = draw(truth, 200)
    k = out["keypoints"].astype(float)
    poses = pp.poses_from_keypoints(k, out["boxes"])
    clear = np.abs(truth.chest[:, 2, 2]) > 0.6
    agree = np.sign(poses.chest[:, 2, 2]) == np.sign(truth.chest[:, 2, 2])
    assert agree[clear].mean() > 0.95
    # Where the face's joints are seen, the head turns the right way too.
    seen = (out["keypoints"][:, :5, 2] == 2).sum(1) >= 3
    assert (
        seen.sum() > 50 and ((poses.head[:, 2] * truth.head[:, 2]).sum(1)[seen] > 0.7).mean() > 0.85
    )
    z_true = truth.points[:, :17, 2] - truth.points[:, [11, 12], 2].mean(1, keepdims=True)
    z = poses.points[:, :17, 2] - poses.points[:, [11, 12], 2].mean(1, keepdims=True)
    assert np.corrcoef(z.ravel(), z_true.ravel())[0, 1] > 0.3


def test_completed_joints_are_where_they_belong():
    """One joint dropped at a time: seen from its left/right twin, the completed one is near the
    true one.
    """
    poses = pp.sample_poses(13, range(120))
    out = draw(poses, 120)
    # Seen from the front or the back, where a mirrored guess is far off.
    wide = np.abs(poses.chest[:, 2, 2]) > 0.7
    truth, boxes = out["keypoints"][wide], out["boxes"][wide]
    zoom = np.minimum(SIZE[1] / boxes[:, 2], SIZE[0] / boxes[:, 3])[:, None] / 1.15
    for joint, twin, limit in (
        (5, 6, 0.12),
        (11, 12, 0.12),
        (12, 11, 0.12),
        (13, 14, 0.3),
        (15, 16, 0.3),
    ):
        k = truth.astype(float)
        k[:, joint] = 0
        xy = pp.project(pp.poses_from_keypoints(k, boxes), SIZE)[0]
        wrong = np.linalg.norm(
            xy[:, joint] - xy[:, twin] - (truth[:, joint, :2] - truth[:, twin, :2]) * zoom, axis=1
        )
        torso = np.linalg.norm(xy[:, body.NECK] - (xy[:, 11] + xy[:, 12]) / 2, axis=1)
        assert np.median(wrong / torso) < limit, (joint, np.median(wrong / torso))
    k = truth.astype(float)
    k[:, :5] = 0  # without a face the head looks where the chest does
    made = pp.poses_from_keypoints(k, boxes)
    assert ((made.head[:, 2] * made.chest[:, 2]).sum(1) > 0.9).mean() > 0.95


def test_lsp_order():
    k = np.zeros((1, 14, 3))
    k[0, :, 2] = 1
    k[0, :, :2] = [
        (4, 90),
        (4, 70),
        (4, 50),
        (10, 50),
        (10, 70),
        (10, 90),
        (0, 50),
        (0, 35),
        (2, 20),
        (12, 20),
        (14, 35),
        (14, 50),
        (7, 18),
        (7, 4),
    ]
    out = pp.lsp_to_coco(k)[0]
    assert np.array_equal(
        out[5:, :2],
        np.array(
            [
                (12, 20),
                (2, 20),
                (14, 35),
                (0, 35),
                (14, 50),
                (0, 50),
                (10, 50),
                (4, 50),
                (10, 70),
                (4, 70),
                (10, 90),
                (4, 90),
            ]
        ),
    )
    assert (
        (out[:5, 1] < 18).all()
        and (out[:5, 1] > 4).all()
        and out[1, 0] > out[2, 0]
        and out[3, 0] > out[4, 0]
    )
    k[0, 13, 2] = 0
    assert (pp.lsp_to_coco(k)[0, :5] == 0).all()


@real
def test_lspet_poses():
    annotations = json.loads((Path(DATA) / "lspet/train.json").read_text())["annotations"][:240]
    keypoints = pp.lsp_to_coco(np.array([a["keypoints"] for a in annotations]).reshape(-1, 14, 3))
    poses, _ = check_exact(keypoints, np.array([a["bbox"] for a in annotations]), (128, 96))
    assert poses.ok.mean() > 0.97


@real
def test_coco_poses():
    annotations = json.loads((Path(DATA) / "coco/person_keypoints.json").read_text())["annotations"]
    annotations = [a for a in annotations if a["num_keypoints"] >= 5 and not a["iscrowd"]]
    keypoints = np.array([a["keypoints"] for a in annotations], float).reshape(-1, 17, 3)
    poses, _ = check_exact(keypoints, np.array([a["bbox"] for a in annotations]), SIZE)
    assert poses.ok.mean() > 0.8
