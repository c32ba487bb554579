"""The puppet: a body that obeys its joints, pictures that obey their poses, identities that obey
their words.
"""

import numpy as np
import pytest

import puppet as pp
from puppet import body, figure, scene

SIZE = (128, 64)


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
    scenes = pp.sample_scenes(0, keys, camera=[0, 0, 0, 0, 1, 1, 1, 1])
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
        for p in pp.sample_identities(0, [(i,) for i in range(700)])
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
    for s in scenes:
        s.update(cast=np.ones(3, np.float32), noise=0.0, blur=0.0, occluder=None)
    out = pp.render(poses, people, scenes, SIZE)
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
    people = pp.sample_identities(1, [(p, 0) for p in range(600)])
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
    scene, person = pp.sample_scenes(0, [(0,)]), pp.sample_identities(0, [(0,)])[0]
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
    base = pp.render(pose, [person], scene, SIZE)
    for change in (
        dict(backpack=True),
        dict(upper_pattern="striped"),
        dict(bag="handbag"),
        dict(hat="cap"),
        dict(hair="long"),
        dict(sleeves="short"),
        dict(lower="skirt"),
    ):
        other = pp.render(pose, [person | change], scene, SIZE)
        changed = np.abs(other["image"].astype(int) - base["image"]).max(-1) > 12
        assert changed.sum() > 15, change
        assert np.array_equal(other["keypoints"][..., :2], base["keypoints"][..., :2])


def test_a_logo_shows_in_its_colour_from_the_front_only():
    sampled = pp.sample_poses(0, range(200))
    person, scene = pp.sample_identities(0, [(0,)])[0], pp.sample_scenes(0, [(0,)])
    scene[0].update(cast=np.ones(3, np.float32), noise=0.0, blur=0.0, occluder=None)
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
                    pp.render(pp.take(poses, [i]), [p], scene, SIZE) for p in (person, logo)
                )
                changed = np.abs(out["image"].astype(int) - plain["image"]).max(-1) > 25
                # The trunk, but for soft borders.
                assert (out["parts"][changed] == 2).sum() >= 0.8 * changed.sum()
                shows += changed.sum() > 8 and dominant_colour(out["image"][changed] / 255) == name
            # An arm may be in front of it.
            assert shows >= 8 if front else shows == 0, (front, name, shows)
