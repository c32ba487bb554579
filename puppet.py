"""The offline generator: a kinematic 3-D body, its COCO-17 joints, its picture in any clothes from any side.

It stands where a pose-conditioned diffusion model stands (Stage 1): one pose, many people, clothes and scenes.

    poses = sample_poses(seed, pose_ids)            or   poses_from_keypoints(keypoints, boxes, (H, W))
    people = sample_identities(seed, keys)          attributes(person)   sentence(person, rng)
    scenes = sample_scenes(seed, keys, camera=None)
    out = render(poses, people, scenes, (H, W))     image, keypoints, parts, joints3d, boxes

Read down: body tree → pose sampling → camera → real 2-D poses → identity → scene → drawing.
Legend: B pictures · J = 26 body points (17 COCO joints first) · H, W picture · h, w the patch a shape covers.
Frame: camera axes, x right, y down, z away from the camera, metres. The person's own axes at yaw 0 (facing the
camera) coincide with them: x = the person's left, y = down, z = the person's back.
Every picture is a function of its own pose, identity and scene only: pictures are drawn one by one (a 128 × 64 canvas
stays in the processor's cache, which a batch of them does not), each shape only inside its own bounding box.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

# -------------------------------------------------------------------------------------------------------- body tree

NOSE, L_EYE, R_EYE, L_EAR, R_EAR, L_SHO, R_SHO, L_ELB, R_ELB, L_WRI, R_WRI = range(11)
L_HIP, R_HIP, L_KNE, R_KNE, L_ANK, R_ANK, NECK, HEAD, TOP, L_HAND, R_HAND, L_TOE, R_TOE, L_HEEL, R_HEEL = range(11, 26)
J = 26
PARTS = ("background", "head", "torso", "left arm", "right arm", "left leg", "right leg")  # values of `parts`

# Lengths in metres of a 1.72 m person (adult means of anthropometric tables, rounded). NECK is the middle between the
# shoulders, HEAD the middle between the ears.
HIP_HALF, WAIST, CHEST, SHOULDER_HALF, SKULL = 0.10, 0.20, 0.30, 0.18, 0.20
UPPER_ARM, FOREARM, HAND, THIGH, SHANK, TOE, HEEL, SOLE = 0.29, 0.25, 0.13, 0.43, 0.42, 0.16, 0.06, 0.07
FACE = {NOSE: (0, 0.01, -0.112), L_EYE: (0.032, -0.025, -0.088), R_EYE: (-0.032, -0.025, -0.088)}
FACE |= {L_EAR: (0.078, 0, 0.005), R_EAR: (-0.078, 0, 0.005), TOP: (0, -0.13, 0.01)}  # in the head's frame
BONES = [(L_SHO, L_ELB, UPPER_ARM), (L_ELB, L_WRI, FOREARM), (R_SHO, R_ELB, UPPER_ARM), (R_ELB, R_WRI, FOREARM)]
BONES += [(L_HIP, L_KNE, THIGH), (L_KNE, L_ANK, SHANK), (R_HIP, R_KNE, THIGH), (R_KNE, R_ANK, SHANK)]
BONES += [(L_HIP, R_HIP, 2 * HIP_HALF)]

# Joint limits in degrees. Flexion is forward for spine, head, hip, shoulder; elbow and knee are hinges (≥ 0).
TRUNK = dict(bend=(-15, 60), twist=(-35, 35), side=(-20, 20), nod=(-30, 40), turn=(-60, 60), tilt=(-25, 25))
LIMBS = dict(sho=(-50, 175), abd=(-5, 150), axial=(-70, 80), elb=(0, 145))
LIMBS |= dict(hip=(-25, 115), open=(-10, 45), spin=(-25, 30), kne=(0, 140), foot=(-30, 20))
LIMITS = TRUNK | {f"{side}_{name}": limit for side in "lr" for name, limit in LIMBS.items()}


class Poses(NamedTuple):
    """B poses as seen by their cameras; index with `take(poses, rows)`.

    points (B, J, 3) float64: camera frame, metres; picture position = x/z, y/z.
    head (B, 3, 3): rows = the head's left, down, back axes; chest (B, 3, 3): the same of the chest.
    head_size (B,): times the standard skull (1 for sampled poses; real faces tell theirs).
    window (B, 4): centre x, y, width, height (in x/z, y/z) that must fit the picture; the picture's aspect pads it.
    given (B, 17) bool: joints that were given or sampled (False = completed by us).
    ok (B,) bool: drawable. angles (B, A): degrees in the order of LIMITS, NaN for real poses.
    """

    points: np.ndarray
    head: np.ndarray
    chest: np.ndarray
    head_size: np.ndarray
    window: np.ndarray
    given: np.ndarray
    ok: np.ndarray
    angles: np.ndarray

    @property
    def joints3d(self):
        return self.points[:, :17].astype(np.float32)


def take(poses, rows):
    """Poses of the given rows (indices or mask), e.g. each pose K times: take(poses, np.repeat(range(P), K))."""
    return Poses(*(field[rows] for field in poses))


def rotation(axis, degrees):
    """(…,) angles → (…, 3, 3) rotations about one axis of the frame (0 x, 1 y, 2 z)."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    i, j = [(1, 2), (2, 0), (0, 1)][axis]
    out = np.zeros((*np.shape(degrees), 3, 3))
    out[..., axis, axis] = 1
    out[..., i, i], out[..., j, j], out[..., i, j], out[..., j, i] = c, c, -s, s
    return out


def chain(*matrices):
    """Product of (B, 3, 3) rotations, elementwise: no BLAS, so a row never depends on the batch it is in."""
    out = matrices[0]
    for m in matrices[1:]:
        out = (out[..., :, :, None] * m[..., None, :, :]).sum(-2)
    return out


def turn(matrix, vector):
    """(B, 3, 3) rotations times one (3,) or (B, 3) vector."""
    return (matrix * np.asarray(vector, float)[..., None, :]).sum(-1)


def pose_body(angles, root, stature):
    """Forward kinematics. angles (B, A) in the order of LIMITS, root (B, 3, 3), stature (B,) in units of the table.

    Returns points (B, J, 3) with the middle of the hips at 0, head (B, 3, 3), chest (B, 3, 3).
    """
    a = dict(zip(LIMITS, angles.T, strict=True))
    points = np.zeros((len(angles), J, 3))
    chest = chain(root, rotation(2, a["side"]), rotation(1, a["twist"]), rotation(0, a["bend"]))
    head = chain(chest, rotation(1, a["turn"]), rotation(0, a["nod"]), rotation(2, a["tilt"]))
    points[:, NECK] = turn(root, (0, -WAIST, 0)) + turn(chest, (0, -CHEST, 0))
    points[:, HEAD] = points[:, NECK] + turn(head, (0, -SKULL, -0.03))
    for joint, offset in FACE.items():
        points[:, joint] = points[:, HEAD] + turn(head, offset)
    for o, s, sign in ((0, "l", 1), (1, "r", -1)):  # right joints follow their left twins
        x = {name: a[f"{s}_{name}"] for name in LIMBS}
        arm = chain(chest, rotation(2, -sign * x["abd"]), rotation(0, -x["sho"]), rotation(1, sign * x["axial"]))
        fore = chain(arm, rotation(0, -x["elb"]))
        points[:, L_SHO + o] = points[:, NECK] + turn(chest, (sign * SHOULDER_HALF, 0.015, 0))
        points[:, L_ELB + o] = points[:, L_SHO + o] + turn(arm, (0, UPPER_ARM, 0))
        points[:, L_WRI + o] = points[:, L_ELB + o] + turn(fore, (0, FOREARM, 0))
        points[:, L_HAND + o] = points[:, L_WRI + o] + turn(fore, (0, HAND, 0))
        leg = chain(root, rotation(2, -sign * x["open"]), rotation(0, -x["hip"]), rotation(1, -sign * x["spin"]))
        shank = chain(leg, rotation(0, x["kne"]))
        foot = chain(shank, rotation(0, -x["foot"]))
        points[:, L_HIP + o] = turn(root, (sign * HIP_HALF, 0, 0))
        points[:, L_KNE + o] = points[:, L_HIP + o] + turn(leg, (0, THIGH, 0))
        points[:, L_ANK + o] = points[:, L_KNE + o] + turn(shank, (0, SHANK, 0))
        points[:, L_TOE + o] = points[:, L_ANK + o] + turn(foot, (sign * 0.02, SOLE, -TOE))
        points[:, L_HEEL + o] = points[:, L_ANK + o] + turn(foot, (0, SOLE, HEEL))
    return points * stature[:, None, None], head.swapaxes(1, 2), chest.swapaxes(1, 2)  # axes as rows


# ---------------------------------------------------------------------------------------------------- pose sampling

# Degrees: (mean, spread, × sin of the gait's phase, × its upswing); a negative spread adds its absolute value only.
# Ours: street-like people and a share of anything, checked by eye on the contact sheet.
REST = dict(bend=(4, 4), twist=(0, 5), side=(0, 3), nod=(5, 8), turn=(0, 20), tilt=(0, 4), sho=(5, 8), abd=(9, -5))
REST |= dict(axial=(15, 12), elb=(15, -10), hip=(0, 4), open=(4, 3), spin=(6, 6), kne=(3, -4), foot=(0, 3))
RUN = dict(bend=(12, 4), hip=(15, 6, 42), kne=(22, 8, 0, 75), sho=(0, 8, -45), elb=(88, 12))
SIT = dict(bend=(8, 8), hip=(85, 7), kne=(85, 14), open=(8, 7), sho=(25, 12), elb=(60, 20))
FREE = dict(bend=(15, 18), twist=(0, 15), sho=(50, 55), abd=(35, 35), axial=(0, 35), elb=(55, 40), hip=(25, 35))
ACTIVITIES = dict(
    standing=(0.30, {}),
    walking=(0.28, dict(hip=(6, 4, 24), kne=(8, 4, 0, 48), sho=(0, 6, -20), elb=(24, 8, -8))),
    running=(0.12, RUN),
    sitting=(0.12, SIT),
    free=(0.18, FREE | dict(open=(12, 12), kne=(40, 40))),
)
# What arms do meanwhile (sho, abd, axial, elb): at the phone, in the pocket, waving, folded, pointing.
GESTURES = [(45, 5, 55, 125), (15, 22, 30, 60), (120, 50, 0, 70), (40, 5, 60, 85), (95, 10, 0, 8)]


def choose(rng, weights):
    """One key of {key: weight}."""
    edges = np.cumsum(list(weights.values()))
    return list(weights)[int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))]


def sample_angles(rng):
    """One pose's joint angles in degrees → (A,) in the order of LIMITS, and the whole body's pitch and roll."""
    activity = choose(rng, {name: weight for name, (weight, _) in ACTIVITIES.items()})
    prior, n, u = REST | ACTIVITIES[activity][1], rng.standard_normal(len(LIMITS)), rng.random(5)
    phase = 2 * np.pi * u[0]
    a = {}
    for name, x in zip(LIMITS, n):
        mean, spread, swing, lift = (*prior[name.split("_")[-1]], 0, 0)[:4]
        here = phase + np.pi * name.startswith("r_")  # legs half a step apart; each arm against its leg
        a[name] = mean + (spread * x if spread > 0 else abs(spread * x))
        a[name] += swing * np.sin(here) + lift * max(0.0, np.cos(here))
    pitch, roll = 0.0, 2 * n[5]
    if activity == "free":  # some lean, some lie or fall
        pitch = 12 * n[0] + (u[1] < 0.15) * 80 * (u[2] - 0.5)
        roll = 10 * n[2] + (u[3] < 0.2) * 150 * (u[4] - 0.5)
    elif u[1] < 0.45 and activity != "running":
        for side in ("l", "r", "lr")[int(u[3] * 3)]:
            for name, degrees in zip(("sho", "abd", "axial", "elb"), GESTURES[int(u[2] * 5)]):
                a[f"{side}_{name}"] = degrees + 6 * rng.standard_normal()
    return np.array([np.clip(a[name], *LIMITS[name]) for name in LIMITS]), pitch, roll


def sample_poses(seed, pose_ids):
    """Poses of the given ids; pose p depends on (seed, p) only. The camera (side, height, distance) belongs to it."""
    angles, roots, stature, place = [], [], [], []
    for p in pose_ids:
        rng = np.random.default_rng([seed, int(p), 1])
        one, pitch, roll = sample_angles(rng)
        angles.append(one)
        # Camera: any side; from eye level to a surveillance camera's height; 3 to 12 m away.
        yaw, elevation, distance = rng.uniform(-180, 180), rng.triangular(-6, 4, 28), rng.uniform(3, 12)
        roots.append((elevation, yaw, pitch, roll, rng.normal(0, 2)))
        stature.append(rng.uniform(0.9, 1.08))
        place.append((distance, *rng.uniform(-1, 1, 2), rng.uniform(1.0, 1.18)))
    elevation, yaw, pitch, roll, tilt = np.array(roots).T.reshape(5, -1)
    root = chain(rotation(2, tilt), rotation(0, elevation), rotation(1, yaw), rotation(0, pitch), rotation(2, roll))
    points, head, chest = pose_body(np.array(angles).reshape(-1, len(LIMITS)), root, np.array(stature))
    distance, dx, dy, fill = np.array(place).T.reshape(4, -1)
    points[:, :, 2] += distance[:, None]
    xy = points[..., :2] / points[..., 2:]
    low, high = xy.min(1) - 0.09 / distance[:, None], xy.max(1) + 0.07 / distance[:, None]
    size = (high - low) * fill[:, None]
    centre = (low + high) / 2 + np.stack([dx, dy], 1) * (size - (high - low)) / 2
    B = len(points)
    window = np.concatenate([centre, size], 1)
    angles = np.array(angles).reshape(B, len(LIMITS))
    return Poses(points, head, chest, np.ones(B), window, np.ones((B, 17), bool), np.ones(B, bool), angles)


def project(poses, size):
    """Poses, (H, W) → xy (B, J, 2) in pixels and px per metre (B, J) at each point, float64."""
    H, W = size
    scale = np.minimum(W / poses.window[:, 2], H / poses.window[:, 3])[:, None]  # aspect preserved: the window must fit
    z = poses.points[..., 2]
    xy = poses.points[..., :2] / z[..., None] - poses.window[:, None, :2]
    xy = xy * scale[..., None] + np.array([W / 2, H / 2])
    per_metre = scale / z
    per_metre[:, HEAD] *= poses.head_size
    return xy, per_metre


# --------------------------------------------------------------------------------------------------- real 2-D poses

LSP = [R_ANK, R_KNE, R_HIP, L_HIP, L_KNE, L_ANK, R_WRI, R_ELB, R_SHO, L_SHO, L_ELB, L_WRI]  # then neck, head top


def lsp_to_coco(keypoints14):
    """(B, 14, 3) in LSP order → (B, 17, 3) COCO-17. Face joints come from neck and head top, turned like the shoulders.

    Derived face joints have visibility 1. Where neck, head top or the shoulders are missing they stay missing (0).
    """
    source = np.asarray(keypoints14, float)
    out = np.zeros((len(source), 17, 3))
    out[:, LSP] = source[:, :12]
    out[out[..., 2] <= 0] = 0
    neck, top = source[:, 12, :2], source[:, 13, :2]
    have = (source[:, 12:, 2] > 0).all(1) & (out[:, [L_SHO, R_SHO], 2] > 0).all(1)
    up = top - neck
    left = np.stack([-up[:, 1], up[:, 0]], 1)  # the person's left when he faces the camera, as long as neck to head top
    across = ((out[:, L_SHO, :2] - out[:, R_SHO, :2]) * left).sum(1) / np.maximum((left**2).sum(1), 1e-9)
    cos = np.clip(across / 1.1, -1, 1)  # shoulders are about 1.1 × (neck to head top) apart, seen from the front
    sin = np.sqrt(1 - cos**2) * np.sign(side_of_front(out))
    for joint, (x, y, z) in FACE.items():
        if joint < 17:
            move = (cos * x - sin * z)[:, None] * left / 0.33 + (0.6 - y / 0.33) * up
            out[:, joint] = np.concatenate([neck + move, np.ones((len(out), 1))], 1) * have[:, None]
    return out


def side_of_front(k):
    """(B, 17, 3) pixels → (B,) +1 where a person seen from the side looks to the picture's right (if upright).

    Knees bend forward and elbows bend backward, so both tell; 0 evidence gives +1.
    """
    up = k[:, [L_SHO, R_SHO], :2].mean(1) - k[:, [L_HIP, R_HIP], :2].mean(1)
    right = np.stack([-up[:, 1], up[:, 0]], 1)
    vote = np.zeros(len(k))
    for a, b, c, sign in (
        (L_HIP, L_KNE, L_ANK, 1),
        (R_HIP, R_KNE, R_ANK, 1),
        (L_SHO, L_ELB, L_WRI, -1),
        (R_SHO, R_ELB, R_WRI, -1),
    ):
        out = k[:, b, :2] - (k[:, a, :2] + k[:, c, :2]) / 2
        vote += sign * (out * right).sum(1) * (k[:, [a, b, c], 2] > 0).all(1)
    return np.where(vote >= 0, 1.0, -1.0)


def poses_from_keypoints(keypoints, boxes, size=(128, 64), pad=1.15):
    """Real 2-D poses become drawable.

    keypoints (B, 17, 3) px, COCO order, visibility 0 = missing; boxes (B, 4) xywh px. The box, padded by `pad` and to
    the aspect of `size`, becomes the picture; given joints stay exactly where that map puts them. Missing joints are
    completed (from the other end of the bone, the parent's direction, the body axis) and depth is guessed from
    foreshortening. `ok` is False (the rest is then meaningless) with fewer than 2 of the 4 shoulders and hips, fewer
    than 4 joints, or a body or box of no size.
    """
    keypoints, boxes = np.asarray(keypoints, float), np.asarray(boxes, float)
    if not len(keypoints):
        return sample_poses(0, [])
    rows = [lift(k, box, pad) for k, box in zip(keypoints, boxes, strict=True)]
    points, head, chest, head_size, window, ok = (np.array(column) for column in zip(*rows, strict=True))
    angles = np.full((len(rows), len(LIMITS)), np.nan)
    return Poses(points, head, chest, head_size, window, keypoints[..., 2] > 0, ok, angles)


def lift(k, box, pad, distance=8.0):
    """One real pose (17, 3) → points (J, 3), head, chest (3, 3), head size, window (4,), ok.

    distance: the assumed camera's, in metres (weak perspective: bodies are small beside it).
    """
    given = np.zeros(J, bool)
    given[:17] = k[:, 2] > 0
    p = np.zeros((J, 2))
    p[:17] = k[:, :2]
    torso = [L_SHO, R_SHO, L_HIP, R_HIP]
    s = px_per_metre(p, given, box)
    if given[torso].sum() < 2 or given.sum() < 4 or not s > 0.5 or min(box[2:]) < 2:
        nothing = np.zeros((J, 3)) + (0, 0, distance)
        return nothing, np.eye(3), np.eye(3), 1.0, np.array([0, 0, 1.0, 1.0]), False
    up = complete_torso(p, given, s)
    complete_limbs(p, given, s, up)

    # The chest's frame: its left axis from the shoulders' foreshortening, forward from whoever tells where front is.
    across = np.array([-up[1], up[0]])
    cos = np.clip(((p[L_SHO] - p[R_SHO]) @ across) / (2 * SHOULDER_HALF * s), -1, 1)
    known = np.concatenate([p[:17], given[:17, None]], 1)[None]
    face = given[[NOSE, L_EYE, R_EYE]]
    look = (p[[NOSE, L_EYE, R_EYE]][face].mean(0) - p[[L_SHO, R_SHO]].mean(0)) @ across / s if face.any() else 0.0
    side = np.sign(look) if abs(look) > 0.06 else side_of_front(known)[0]
    sin = np.sqrt(1 - cos**2) * side  # forward = side in the picture plane, -cos towards the camera
    down3, left3 = np.array([-up[0], -up[1], 0]), np.array([*(cos * across), sin])
    back3 = np.array([*(-sin * across), cos])
    chest = np.stack([left3, down3, back3])
    z = np.zeros(J)
    for joint, half in ((L_SHO, SHOULDER_HALF), (R_SHO, -SHOULDER_HALF), (L_HIP, HIP_HALF), (R_HIP, -HIP_HALF)):
        z[joint] = half * sin
    # Limbs: what is missing of a bone's length in the picture is depth. Thighs, upper arms and forearms go to the
    # front of the body, shanks to its back; from the side, limbs lean to their own side.
    for a, b, length in BONES[:8]:
        depth = np.sqrt(max(0, length**2 - (np.linalg.norm(p[b] - p[a]) / s) ** 2)) * 0.85
        ahead = -np.sign(back3[2]) if abs(back3[2]) > 0.3 else np.sign(z[L_SHO if b % 2 else R_SHO])
        z[b] = z[a] + depth * ahead * (-1 if b in (L_ANK, R_ANK) else 1)
    head, head_size = fit_head(p, z, given, s, up, np.degrees(np.arctan2(sin, cos)))
    for o in (0, 1):
        fore, shank = p[L_WRI + o] - p[L_ELB + o], p[L_ANK + o] - p[L_KNE + o]
        p[L_HAND + o] = p[L_WRI + o] + fore / max(np.linalg.norm(fore), 0.5 * FOREARM * s) * HAND * s
        z[L_HAND + o] = z[L_WRI + o]
        down = shank / max(np.linalg.norm(shank), 0.3 * s)
        ahead = -back3[:2] - down * (-back3[:2] @ down)
        p[L_TOE + o] = p[L_ANK + o] + (down * 0.09 + ahead * TOE) * s
        p[L_HEEL + o] = p[L_ANK + o] + (down * 0.06 - ahead * HEEL) * s
        z[L_TOE + o], z[L_HEEL + o] = z[L_ANK + o] + 0.1 * -back3[2], z[L_ANK + o]
    centre = box[:2] + box[2:] / 2
    xy = (p - centre) / (s * distance)  # what the camera sees: x/z, y/z, with s px per metre at that distance
    depth = distance + np.clip(z, -1.5, 1.5)[:, None]
    window = np.array([0, 0, *(box[2:] * pad / (s * distance))])
    return np.concatenate([xy * depth, depth], 1), head, chest, head_size, window, True


def px_per_metre(p, given, box):
    """Scale of the body: bones look shorter, never longer, so the upper ones of all given bones' ratios tell."""
    ratios = [np.linalg.norm(p[b] - p[a]) / length for a, b, length in BONES[:8] if given[a] and given[b]]
    for a, b in ((L_SHO, L_HIP), (R_SHO, R_HIP)):
        if given[a] and given[b]:
            ratios.append(np.linalg.norm(p[b] - p[a]) / (WAIST + CHEST))
    if given[L_SHO] and given[R_SHO]:
        ratios.append(np.linalg.norm(p[L_SHO] - p[R_SHO]) / (2 * SHOULDER_HALF))
    ratios = sorted(r for r in ratios if r > 0)[::-1]
    return float(np.mean(ratios[:3])) if ratios else 0.0


def complete_torso(p, given, s):
    """Fill missing shoulders and hips of p (J, 2) in place; returns the torso's unit up vector in the picture."""
    shoulders, hips, legs, faces = (
        [i for i in ids if given[i]]
        for ids in ((L_SHO, R_SHO), (L_HIP, R_HIP), (L_KNE, R_KNE, L_ANK, R_ANK), (NOSE, L_EYE, R_EYE, L_EAR, R_EAR))
    )
    up = np.array([0, -1.0])
    if shoulders and hips:
        pairs = [(a, b) for a, b in ((L_SHO, L_HIP), (R_SHO, R_HIP)) if given[a] and given[b]]
        up = np.mean([p[a] - p[b] for a, b in pairs or [(shoulders[0], hips[0])]], 0)
    elif shoulders and faces:
        up = p[faces].mean(0) - p[shoulders].mean(0)
    elif hips and legs:
        up = p[hips].mean(0) - p[legs].mean(0)
    up = up / np.linalg.norm(up) if np.linalg.norm(up) > 0.05 * s else np.array([0, -1.0])
    across = np.array([-up[1], up[0]])  # to the person's left if he faces us
    width = 1.0  # of the torso in the picture: 1 faces us, 0 from the side, -1 from behind
    for a, b, full in ((L_SHO, R_SHO, SHOULDER_HALF), (L_HIP, R_HIP, HIP_HALF), (L_EYE, R_EYE, 0), (L_EAR, R_EAR, 0)):
        if given[a] and given[b]:
            seen = (p[a] - p[b]) @ across
            width = float(np.clip(seen / (2 * full * s), -1, 1)) if full else float(np.sign(seen))
            break
    for pair, others, half, rise in (
        ((L_SHO, R_SHO), (L_HIP, R_HIP), SHOULDER_HALF, 1),
        ((L_HIP, R_HIP), (L_SHO, R_SHO), HIP_HALF, -1),
    ):
        middle = np.mean([p[i] for i in others if given[i]] or [p[pair[0]]], 0) + rise * (WAIST + CHEST) * s * up
        for i, twin, sign in ((*pair, 1), (*pair[::-1], -1)):
            if not given[i]:
                shift = sign * half * width * s * across
                p[i] = p[twin] + 2 * shift if given[twin] else middle + shift
    return up


def complete_limbs(p, given, s, up):
    """Fill missing elbows, wrists, knees and ankles of p (J, 2) in place."""
    for a, b, c, one, two in ((L_SHO, L_ELB, L_WRI, UPPER_ARM, FOREARM), (L_HIP, L_KNE, L_ANK, THIGH, SHANK)):
        for o in (0, 1):
            root, mid, end, twin_root, twin_mid = a + o, b + o, c + o, a + 1 - o, b + 1 - o
            if not given[mid] and given[end]:
                p[mid] = (p[root] + p[end]) / 2
            elif not given[mid]:
                like_twin = a == L_HIP and given[twin_root] and given[twin_mid]
                p[mid] = p[root] + (p[twin_mid] - p[twin_root] if like_twin else -up * one * s)
            if not given[end]:
                bone = p[mid] - p[root]
                p[end] = p[mid] + bone / max(np.linalg.norm(bone), 0.5 * one * s) * two * s


def fit_head(p, z, given, s, up, chest_yaw):
    """Turn a standard head so that it fits the given face joints; fills face, HEAD, TOP, NECK of p, z in place.

    Grid search over yaw × roll × pitch, shift and size in closed form; without face joints the head follows the chest.
    Returns the head's axes (3, 3) as in `Poses.head` and its size.
    """
    neck = p[[L_SHO, R_SHO]].mean(0)
    p[NECK], z[NECK] = neck, 0.0
    ids = [i for i in (NOSE, L_EYE, R_EYE, L_EAR, R_EAR) if given[i]]
    upright = np.degrees(np.arctan2(up[0], -up[1]))
    yaw, roll, pitch = (g.ravel() for g in np.meshgrid(np.arange(-180, 180, 15), np.arange(-60, 61, 15), (-25, 0, 25)))
    frames = chain(rotation(2, upright + roll), rotation(1, -yaw), rotation(0, pitch))  # (G, 3, 3)
    cost = 0.004 * (1 - np.cos(np.radians(yaw - chest_yaw))) + 1e-6 * roll**2 + 1e-6 * pitch**2
    joints = np.array([FACE[i] for i in ids]).reshape(-1, 3)
    flat = (frames[:, None, :2, :] * joints[None, :, None, :]).sum(-1)  # (G, n, 2) metres
    expected = neck / s + (frames[:, :2, 1] * -SKULL)  # where the neck alone would put the head's middle
    if ids:
        seen = p[ids] / s
        a, b = flat - flat.mean(1, keepdims=True), seen - seen.mean(0)
        size = np.clip(((a * b).sum((1, 2)) + 0.002) / ((a * a).sum((1, 2)) + 0.002), 0.7, 1.8)  # drawn towards 1
        flat = flat * size[:, None, None]
        # The shift is the mean over the face joints and, more weakly, the neck.
        shift = ((seen - flat).sum(1) + 0.3 * expected) / (len(ids) + 0.3)
        cost = cost + ((seen - flat - shift[:, None]) ** 2).sum((1, 2)) + 0.15 * ((shift - expected) ** 2).sum(1)
    else:
        shift, size = expected, np.ones(len(frames))
    best = int(cost.argmin())
    frame, size = frames[best], float(size[best])
    p[HEAD], z[HEAD] = shift[best] * s, 0.0
    for i, offset in FACE.items():
        where = frame @ np.array(offset) * size
        z[i] = where[2]
        if not given[i]:
            p[i] = p[HEAD] + where[:2] * s
    return frame.T.copy(), size


# --------------------------------------------------------------------------------------------------------- identity

# fmt: off
COLOURS = dict(
    black=(0.09, 0.09, 0.10), white=(0.94, 0.94, 0.93), gray=(0.52, 0.53, 0.54), red=(0.76, 0.10, 0.12),
    blue=(0.12, 0.27, 0.66), green=(0.15, 0.48, 0.22), yellow=(0.93, 0.79, 0.16), brown=(0.41, 0.26, 0.15),
    purple=(0.43, 0.18, 0.56), pink=(0.94, 0.55, 0.69), orange=(0.93, 0.46, 0.10), denim=(0.19, 0.30, 0.50),
)
HAIRS = dict(
    black=(0.07, 0.06, 0.06), brown=(0.28, 0.17, 0.10), blonde=(0.78, 0.62, 0.34), gray=(0.60, 0.60, 0.60),
    red=(0.52, 0.22, 0.09),
)
SKINS = {
    (0.96, 0.80, 0.69): 24, (0.90, 0.71, 0.57): 28, (0.80, 0.59, 0.44): 20, (0.62, 0.42, 0.29): 12,
    (0.46, 0.30, 0.21): 8, (0.36, 0.24, 0.18): 8,
}
# Frequencies are ours: every attribute common enough to be learned, clothes that go together.
UPPERS = {"t-shirt": 36, "shirt": 15, "sweater": 14, "jacket": 15, "coat": 5, "hoodie": 11, "blouse": 0}
LOWERS = dict(trousers=38, jeans=36, shorts=26), dict(trousers=20, jeans=26, leggings=16, shorts=14, skirt=24)
UP_COLOURS = dict(black=15, white=15, gray=10, red=11, blue=11, green=8, yellow=7, brown=6, purple=5, pink=6, orange=6)
DOWN_COLOURS = dict(black=24, white=12, gray=15, blue=12, green=8, brown=10, red=7, pink=5, yellow=3, purple=4)
PATTERNS = dict(plain=48, striped=16, checked=11, dotted=7, logo=12, pinstriped=6)
# fmt: on


class Identities(NamedTuple):
    """B people as plain dicts of named attributes (see `sample_identities`); colours are names plus jittered RGB."""

    people: list

    def __len__(self):  # people, not fields
        return len(self.people)


def colour_of(rng, name, table=COLOURS):
    """Jittered float32 (3,) RGB in [0, 1] of a palette name: lightness varies, colours fade a little, hue stays."""
    rgb = np.array(table[name])
    rgb = rgb + rng.uniform(0, 0.22) * (rgb.mean() - rgb) if np.ptp(rgb) > 0.1 else rgb
    return np.clip(rgb * rng.uniform(0.82, 1.08) + rng.normal(0, 0.01, 3), 0.03, 0.97).astype(np.float32)


def sample_identities(seed, keys):
    """keys (B, …) whole numbers, e.g. (p, k) → Identities; person i depends on (seed, keys[i]) only."""
    return Identities([sample_person(np.random.default_rng([seed, *map(int, np.atleast_1d(key)), 2])) for key in keys])


def sample_person(rng):
    """One appearance: names for the words, `*_rgb` float32 (3,) for the picture, shape in metres or factors."""
    p = dict(female=bool(rng.random() < 0.5))
    women = p["female"]
    p["stout"] = float(np.clip(rng.normal(0.94 if women else 1.0, 0.1), 0.78, 1.3))
    p["skin"] = np.clip(np.array(choose(rng, SKINS)) + rng.normal(0, 0.02, 3), 0, 1).astype(np.float32)
    p["hair"] = choose(rng, dict(long=72, short=28) if women else dict(long=8, short=80, bald=12))
    p["hair_colour"] = choose(rng, dict(black=40, brown=30, blonde=14, gray=10, red=6))
    p["beard"] = bool(not women and rng.random() < 0.25)
    p["glasses"] = choose(rng, dict(none=76, glasses=16, sunglasses=8))
    p["hat"], p["hat_colour"] = choose(rng, {"none": 76, "cap": 12, "beanie": 7, "sun hat": 5}), choose(rng, UP_COLOURS)
    p["upper"] = choose(rng, UPPERS | dict(blouse=8 * women))
    p["sleeves"] = "short" if p["upper"] == "t-shirt" else "long"
    if p["upper"] in ("shirt", "blouse") and rng.random() < 0.5:
        p["sleeves"] = "short"
    p["upper_colour"] = choose(rng, UP_COLOURS)
    p["upper_pattern"] = "plain" if p["upper"] == "coat" else choose(rng, PATTERNS)
    second = dict(white=3, black=2, gray=1, blue=2, red=2)
    p["upper_second"] = choose(rng, second | {p["upper_colour"]: 0})
    p["open_front"] = bool(p["upper"] in ("jacket", "coat") and rng.random() < 0.5)
    p["inner"] = choose(rng, dict(white=1, gray=1, black=1))
    p["lower"] = choose(rng, LOWERS[women])
    p["lower_colour"] = choose(rng, dict(blue=70, black=20, gray=10) if p["lower"] == "jeans" else DOWN_COLOURS)
    skirt = p["lower"] == "skirt"
    p["lower_pattern"] = choose(rng, dict(plain=55, checked=20, striped=15, dotted=10)) if skirt else "plain"
    p["lower_second"] = "black" if p["lower_colour"] == "white" else "white"
    p["lower_long"] = bool(rng.random() < 0.35) if skirt else p["lower"] != "shorts"
    p["shoes"] = choose(rng, dict(black=34, white=28, brown=14, gray=10, red=7, blue=7))
    p["backpack"] = bool(rng.random() < 0.22)
    p["bag"] = "none" if p["backpack"] else choose(rng, {"none": 66, "shoulder bag": 20, "handbag": 14})
    p["bag_colour"], p["bag_left"] = choose(rng, UP_COLOURS), bool(rng.random() < 0.5)
    for key in (
        "hat_colour",
        "upper_colour",
        "upper_second",
        "inner",
        "lower_colour",
        "lower_second",
        "shoes",
        "bag_colour",
    ):
        denim = key == "lower_colour" and p["lower"] == "jeans" and p[key] == "blue"
        p[key.removesuffix("_colour") + "_rgb"] = colour_of(rng, "denim" if denim else p[key])
    p["hair_rgb"] = colour_of(rng, p["hair_colour"], HAIRS)
    p["period"], p["texture"] = float(rng.uniform(0.07, 0.13)), rng.integers(0, 4096, 3)  # metres; origin of the folds
    p["tucked"] = bool(skirt or (p["upper"] in ("shirt", "t-shirt", "blouse") and rng.random() < 0.35))
    p["loose"], p["mane"] = float(rng.uniform(0, 0.022)), float(rng.random())  # air under the clothes, m; hair's length
    return p


def attributes(person):
    """Binary attributes of one person, Market-1501 style names → dict[str, int]."""
    p = person
    out = dict(female=p["female"], hat=p["hat"] != "none", glasses=p["glasses"] != "none", backpack=p["backpack"])
    out |= dict(bag=p["bag"] == "shoulder bag", handbag=p["bag"] == "handbag", long_hair=p["hair"] == "long")
    out |= dict(short_sleeves=p["sleeves"] == "short", short_lower=not p["lower_long"], skirt=p["lower"] == "skirt")
    out |= dict(pattern=p["upper_pattern"] != "plain")
    out |= {f"up_{c}": person["upper_colour"] == c for c in UP_COLOURS}
    out |= {f"down_{c}": person["lower_colour"] == c for c in DOWN_COLOURS}
    return {name: int(value) for name, value in out.items()}


def sentence(person, rng):
    """A true English sentence about one person; wording and what is mentioned vary with `rng`."""
    p = person
    pick = lambda *options: options[int(rng.integers(len(options)))]  # noqa: E731
    who = pick("woman", "lady", "young woman") if p["female"] else pick("man", "guy", "young man")
    he, his = ("She", "Her") if p["female"] else ("He", "His")
    sleeves = pick("", p["sleeves"] + "-sleeved ") if p["upper"] in ("t-shirt", "shirt", "blouse") else ""
    pattern = "" if p["upper_pattern"] in ("plain", "logo") else p["upper_pattern"] + " "
    upper = article(f"{sleeves}{pattern}{p['upper_colour']} {p['upper']}")
    upper += " with a logo on the chest" if p["upper_pattern"] == "logo" else ""
    pattern = "" if p["lower_pattern"] == "plain" else p["lower_pattern"] + " "
    lower = f"{pattern}{p['lower_colour']} {p['lower']}"
    if p["lower"] == "skirt":
        lower = article(("long " if p["lower_long"] else "short ") + lower)
    shoes = f"{p['shoes']} {pick('shoes', 'sneakers')}"
    extras = []
    if p["hat"] != "none":
        extras.append(f"wears {article(p['hat_colour'] + ' ' + p['hat'])}")
    if p["backpack"] or p["bag"] != "none":
        bag = "backpack" if p["backpack"] else p["bag"]
        extras.append(f"{pick('carries', 'has')} {article(p['bag_colour'] + ' ' + bag)}")
    if p["glasses"] != "none" and rng.random() < 0.7:
        extras.append(f"wears {p['glasses']}")
    if rng.random() < 0.6 or not extras:
        extras.append("is bald" if p["hair"] == "bald" else f"has {p['hair']} {p['hair_colour']} hair")
    extra = " and ".join(extras[i] for i in rng.permutation(len(extras)))
    return pick(
        f"A {who} wears {upper}, {lower} and {shoes}. {he} {extra}.",
        f"This {who} is dressed in {upper} and {lower}, and {extra}.",
        f"{he} {extra}. {his} clothes are {upper}, {lower} and {shoes}.",
        f"The {who} in {upper} with {lower} {extra}.",
        f"A {who} who {extra}, in {upper} and {lower}.",
    )


def article(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


# ------------------------------------------------------------------------------------------------------------ scene

FAMILIES = ["street", "wall", "grass", "indoor", "plaza", "plain"]


class Scenes(NamedTuple):
    """B scenes as plain dicts (see `sample_scenes`)."""

    scenes: list

    def __len__(self):
        return len(self.scenes)


def sample_scenes(seed, keys, camera=None):
    """keys (B, …) whole numbers → Scenes: background, light, occluder, blur, noise; scene i depends on (seed, keys[i]).

    camera (B,) whole numbers: pictures of one camera share background, light and colour cast (they vary a little).
    """
    out = []
    for i, key in enumerate(keys):
        rng = np.random.default_rng([seed, *map(int, np.atleast_1d(key)), 3])
        fixed = rng if camera is None else np.random.default_rng([seed, int(camera[i]), 4])
        out.append(sample_scene(rng, fixed))
    return Scenes(out)


def sample_scene(rng, fixed):
    """One scene. `fixed` draws what belongs to the place, `rng` what belongs to the moment."""
    s = dict(family=FAMILIES[fixed.integers(len(FAMILIES))], horizon=float(fixed.uniform(0.3, 0.75)))
    for name, low, high in (("wall", 0.3, 0.9), ("ground", 0.3, 0.72), ("far", 0.2, 0.8)):  # most places are greyish
        s[name] = (0.13 * fixed.uniform(0, 1, 3) + 0.87 * fixed.uniform(low, high)).astype(np.float32)
    n, m = int(fixed.integers(2, 7)), int(fixed.integers(0, 5))
    rects = fixed.uniform(size=(n, 8)) * (1.3, 1.2, 0.5, 0.5, 1, 1, 1, 1) + (-0.2, -0.2, 0.1, 0.1, 0, 0, 0, 0)
    rects[:, 4:7] = 0.35 * rects[:, 4:7] + 0.65 * rects[:, 7:]  # x, y, width, height, colour, lightness
    blobs = fixed.uniform(size=(m, 8)) * (1, 1, 0.2, 0.2, 1, 1, 1, 1) + (0, 0, 0.06, 0.06, 0, 0, 0, 0)
    blobs[:, 4:7] = 0.3 * blobs[:, 4:7] + 0.6 * blobs[:, 7:]
    s["rects"], s["blobs"], s["panes"] = rects, blobs, fixed.uniform(0.6, 1.6, 2)
    s["grain"] = float(fixed.uniform(0.05, 0.35))
    s["cast"] = np.clip(fixed.normal(1, 0.05, 3), 0.86, 1.14).astype(np.float32)
    s["gain"] = float(np.clip(fixed.normal(1.0, 0.12) * rng.normal(1, 0.05), 0.65, 1.3))
    angle, height = fixed.uniform(-np.pi, 0), fixed.uniform(0.4, 0.9)  # light from above, any side, and from our side
    light = np.array([np.cos(angle) * 0.8, np.sin(angle) * 0.6 - 0.2, -height])
    s["light"], s["ambient"] = (light / np.sqrt((light**2).sum())).astype(np.float32), float(fixed.uniform(0.5, 0.8))
    s["shift"] = rng.integers(0, 4096, 4)  # origin of the textures and of the noise
    s["move"] = rng.normal(0, 0.04 if fixed is not rng else 0.0, 2)
    s["blur"] = float(max(0, rng.normal(0.3, 0.35)))  # px at a height of 128
    s["noise"] = float(abs(rng.normal(0, 0.018)))
    s["occluder"] = None
    if rng.random() < 0.18:
        kind, where = ("pole", "low", "bush", "side")[rng.integers(4)], float(rng.uniform(0.15, 0.85))
        colour = (0.25 * rng.random(3) + 0.6 * rng.random()).astype(np.float32)
        s["occluder"] = kind, where, float(rng.uniform(0.06, 0.2)), colour
    return s


@lru_cache
def texture_bank():
    """Tiling noise, fixed for ever: fractal (512, 512) float32 about 0 ± 1, fine (512, 512), white (3, 512, 512)."""
    rng = np.random.default_rng(2404)
    f = np.hypot(np.fft.fftfreq(512)[:, None], np.fft.fftfreq(512)[None]) * 512
    spectrum = np.fft.fft2(rng.standard_normal((512, 512)))
    banks = []
    for power, low in ((1.5, 4), (0.9, 20)):
        field = np.fft.ifft2(spectrum * np.where(f < low, 0, np.maximum(f, 1) ** -power)).real
        banks.append((field / field.std()).astype(np.float32))
    return banks[0], banks[1], rng.standard_normal((3, 512, 512)).astype(np.float32)


def patch(field, y, x, h, w, zoom):
    """An (h, w) window of a tiling field, `zoom` field pixels per picture pixel."""
    rows, columns = (np.arange(h) * zoom + y).astype(int) & 511, (np.arange(w) * zoom + x).astype(int) & 511
    return field[..., rows[:, None], columns]


# ---------------------------------------------------------------------------------------------------------- drawing


class Canvas:
    """One picture in the making: image (3, H, W) float32 in [0, 1], parts (H, W) uint8, light."""

    def __init__(self, image, scene):
        self.image, self.parts = image, np.zeros(image.shape[1:], np.uint8)
        self.H, self.W = image.shape[1:]
        self.light, self.ambient = scene["light"], scene["ambient"]

    def window(self, low, high):
        """Bounding box in px → (rows, columns, x (1, w), y (h, 1)) or None when outside."""
        x0, y0 = max(0, int(low[0] - 1.5)), max(0, int(low[1] - 1.5))
        x1, y1 = min(self.W, int(high[0] + 2.5)), min(self.H, int(high[1] + 2.5))
        if x0 >= x1 or y0 >= y1:
            return None
        x, y = np.arange(x0, x1, dtype=np.float32)[None], np.arange(y0, y1, dtype=np.float32)[:, None]
        return slice(y0, y1), slice(x0, x1), x, y

    def shade(self, nx, ny):
        """Cylindrical shading: (h, w) brightness of a surface with this normal (x, y; z looks at us)."""
        nz = np.sqrt(np.maximum(0, 1 - nx * nx - ny * ny))
        lit = (
            nx * self.light[0] + ny * self.light[1] - nz * self.light[2]
        )  # the surface looks at us: normal (nx, ny, -nz)
        return (self.ambient + (1.12 - self.ambient) * np.maximum(lit, 0)) * (0.76 + 0.24 * nz)

    def paint(self, rows, columns, distance, colour, part, opacity=1.0):
        """Blend colour (3, 1 or h, 1 or w) where the signed distance (h, w), px, is negative; half a pixel soft."""
        alpha = np.clip(0.5 - distance, 0, 1)
        where = self.image[:, rows, columns]
        where += (alpha * opacity) * (colour - where)
        if part is not None:
            np.copyto(self.parts[rows, columns], part, where=alpha > 0.5)


def segment(x, y, a, b, ra, rb, bump=0.0):
    """Tapered capsule from a (radius ra) to b (rb), `bump` px thicker in the middle.

    → distance (h, w) px, u (h, w) 0..1 along, (qx, qy) offset from the axis, radius.
    """
    bx, by = float(b[0] - a[0]), float(b[1] - a[1])
    length2 = max(bx * bx + by * by, 1e-6)
    dx, dy = x - np.float32(a[0]), y - np.float32(a[1])
    u = np.clip(dx * np.float32(bx / length2) + dy * np.float32(by / length2), 0, 1)
    qx, qy = dx - u * np.float32(bx), dy - u * np.float32(by)
    far = np.sqrt(qx * qx + qy * qy + np.float32(1e-6))
    r = np.float32(ra) + u * np.float32(rb - ra)
    if bump:
        r = r + np.float32(4 * bump) * u * (1 - u)
    return far - r, u, qx, qy, r


def cloth(along, across, garment, per_metre):
    """Colour (3, h, w) of a garment at texture coordinates in metres; stripes finer than a pixel fade."""
    rgb, second, pattern, period, origin, denim = garment
    sharp = np.float32(min(3.0, 0.45 * period * per_metre))
    k = np.float32(2 * np.pi / period)
    mix = None
    if pattern == "striped":
        mix = np.clip(0.5 + (np.sin(along * k) - 0.35) * sharp, 0, 1)
    elif pattern == "pinstriped":
        mix = np.clip(0.5 + (np.sin(across * (1.6 * k)) - 0.6) * sharp, 0, 1)
    elif pattern == "checked":
        mix = 0.45 * (
            np.clip(0.5 + (np.sin(along * k) - 0.2) * sharp, 0, 1)
            + np.clip(0.5 + (np.sin(across * k) - 0.2) * sharp, 0, 1)
        )
    elif pattern == "dotted":
        mix = np.clip(0.5 + (np.sin(along * k) * np.sin(across * k) - 0.5) * (2 * sharp), 0, 1)
    fractal, fine, _ = texture_bank()
    i = (along * 260 + (origin[0] + 4096)).astype(np.int32) & 511
    j = (across * 420 + (origin[1] + 4096)).astype(np.int32) & 511
    folds = 1 + 0.06 * fractal[i, j]
    if denim:
        folds = folds + 0.05 * fine[j, i]
    out = rgb[:, None, None] * folds
    if mix is not None:
        out = out + (mix * folds) * (second - rgb)[:, None, None]
    return out


def limb(c, a, b, ra, rb, colour, part, s, bump=0.0, end=1.0, along0=0.0):
    """Draw one limb segment from a to b (px), radii and bump in metres, s px per metre.

    colour: an RGB (3,), or a garment tuple for `cloth`, whose texture starts `along0` metres down. end: the covered
    share of the way (a sleeve).
    """
    ra, rb, bump = ra * s, rb * s, bump * s
    if end < 1:
        b, rb = a + (b - a) * end, ra + (rb - ra) * end
    r = max(ra, rb) + bump
    box = c.window(np.minimum(a, b) - r, np.maximum(a, b) + r)
    if box is None:
        return
    rows, columns, x, y = box
    d, u, qx, qy, r = segment(x, y, a, b, ra, rb, bump)
    bx, by = b - a
    length = max(np.hypot(bx, by), 1e-3)
    side = np.float32(by / length), np.float32(-bx / length)  # unit vector across the limb
    across = qx * side[0] + qy * side[1]
    # Shaded across the limb only: round ends would cut elbows and knees into sausages.
    roll = np.clip(across / r, -1, 1)
    light = c.shade(roll * side[0], roll * side[1])
    if isinstance(colour, tuple):
        along = u * np.float32(length / s) + np.float32(along0)
        rgb = cloth(along, across / np.float32(s), colour, s) * light
    else:
        rgb = colour[:, None, None] * light
    c.paint(rows, columns, d, rgb, part)


def body_shape(c, segments, per_metre, blend=0.012):
    """Smooth union of capsules (a, b px; ra, rb, bump m) → rows, columns, x, y, distance, shade; None if outside."""
    points = np.array([p for s in segments for p in s[:2]])
    r = max(max(s[2], s[3]) for s in segments) * per_metre + 1
    box = c.window(points.min(0) - r, points.max(0) + r)
    if box is None:
        return None
    rows, columns, x, y = box
    k = np.float32(blend * per_metre)
    total = 0.0
    for a, b, ra, rb, bump in segments:
        d = segment(x, y, a, b, ra * per_metre, rb * per_metre, bump * per_metre)[0]
        total = total + np.exp(np.clip(d * (-1 / k), -60, 60))
    d = -k * np.log(total)
    nx, ny = np.zeros_like(d), np.zeros_like(d)
    nx[:, 1:-1], ny[1:-1] = (d[:, 2:] - d[:, :-2]) / 2, (d[2:] - d[:-2]) / 2
    swell = np.clip(1 + d / np.float32(0.11 * per_metre), 0, 1)  # 0 in the flat middle, 1 at the border
    return rows, columns, x, y, d, c.shade(nx * swell, ny * swell)


def ellipsoid(c, centre, frame, semi, per_metre):
    """Ellipsoid with half-axes `semi` (m) along frame's rows (left, down, back) → box, distance, point on the unit
    sphere (left, up, front; each (h, w)), shade; None if outside. The same face is seen from any side this way."""
    r = max(semi) * per_metre
    box = c.window(centre - r, centre + r)
    if box is None:
        return None
    rows, columns, x, y = box
    qx, qy = (x - np.float32(centre[0])) / np.float32(per_metre), (y - np.float32(centre[1])) / np.float32(per_metre)
    m = (frame / np.array(semi)[:, None]).astype(np.float32)
    q = [m[i, 0] * qx + m[i, 1] * qy for i in range(3)]
    a = (m[:, 2] ** 2).sum()
    b = q[0] * m[0, 2] + q[1] * m[1, 2] + q[2] * m[2, 2]
    outline = q[0] * q[0] + q[1] * q[1] + q[2] * q[2] - b * b / a  # 1 on the silhouette
    z = (-b - np.sqrt(np.maximum(0, a * (1 - outline)))) / a
    n = [q[i] + z * m[i, 2] for i in range(3)]
    f = frame.astype(np.float32)
    nx, ny = n[0] * f[0, 0] + n[1] * f[1, 0] + n[2] * f[2, 0], n[0] * f[0, 1] + n[1] * f[1, 1] + n[2] * f[2, 1]
    # px from the silhouette: value over gradient
    grad = [sum((q[i] - b / a * m[i, 2]) * m[i, axis] for i in range(3)) for axis in (0, 1)]
    root = np.sqrt(outline + 1e-6)
    d = (root - 1) * root / (np.sqrt(grad[0] ** 2 + grad[1] ** 2) + 1e-6) * np.float32(per_metre)
    return rows, columns, d, n[0], -n[1], -n[2], c.shade(np.clip(nx, -1, 1), np.clip(ny, -1, 1))


def mixed(a, b, weight):
    """(3,) or (3, h, w) colours blended by an (h, w) weight."""
    a = a[:, None, None] if a.ndim == 1 else a
    return a + weight * ((b[:, None, None] if b.ndim == 1 else b) - a)


WHITE, DARK, LIP = (np.array(rgb, np.float32) for rgb in ((0.93, 0.92, 0.90), (0.07, 0.06, 0.05), (0.62, 0.20, 0.20)))


class Body(NamedTuple):
    """One drawn person: xy (J, 2) px, ppm (J,) px per metre, z (J,) m, axes as rows (left, down, back), person p."""

    xy: np.ndarray
    ppm: np.ndarray
    z: np.ndarray
    head: np.ndarray
    chest: np.ndarray
    p: dict

    def garment(self, which):
        """What `cloth` needs of the "upper" or "lower" garment."""
        p, knit = self.p, ("sweater", "jeans")
        colours = p[which + "_rgb"], p[which + "_second_rgb"], p[which + "_pattern"]
        return *colours, p["period"], p["texture"][:2] if which == "upper" else p["texture"][1:], p[which] in knit

    @property
    def hip(self):
        return (self.xy[L_HIP] + self.xy[R_HIP]) / 2


def draw_head(c, body):
    """Skull with face, then eyes and ears at their joints, then hair and hat as larger shells around the skull."""
    xy, s, frame, p = body.xy, body.ppm[HEAD], body.head, body.p
    at = lambda up, front: xy[HEAD] - (up * frame[1, :2] + front * frame[2, :2]) * s  # noqa: E731
    wide = 0.073 if p["female"] else 0.077
    skull = ellipsoid(c, at(0.012, 0.008), frame, (wide, 0.122, 0.097), s)
    if skull is None:
        return
    rows, columns, d, left, up, front, light = skull
    px = np.float32(0.09 * s)  # px per unit of the sphere, for soft edges
    face = mixed(p["skin"], p["skin"] * np.float32(0.8), np.clip(-0.9 * up, 0, 1))  # darker under the chin
    if p["beard"]:
        beard = np.clip((-0.42 - up + 0.25 * np.abs(left)) * px + 0.5, 0, 1) * (front > 0)
        face = mixed(face, p["hair_rgb"], 0.75 * beard)
    lips = np.clip(0.5 + (1 - np.hypot(left / 0.3, (up + 0.55) / 0.085)) * 0.085 * px, 0, 1) * (front > 0.1)
    face = mixed(face, LIP, lips * (0.75 if p["female"] else 0.5))
    nose = np.clip(1 - np.hypot(left / 0.14, (up + 0.2) / 0.2), 0, 1) * (front > 0)
    c.paint(rows, columns, d, face * (light * (1 - 0.18 * nose)), 1)
    for side, eye, ear in ((1, L_EYE, L_EAR), (-1, R_EYE, R_EAR)):
        if side * frame[0, 2] < 0.35 and p["hair"] != "long":
            drop = frame[1, :2] * 0.014 * s
            limb(c, xy[ear] - drop, xy[ear] + drop, 0.018, 0.014, p["skin"] * np.float32(0.93), 1, s)
        if 0.95 * frame[2, 2] - side * 0.3 * frame[0, 2] > 0.12:  # this eye looks at us
            draw_eye(c, xy[eye], frame[0, :2] * s, -frame[1, :2] * s, side, p, s)
    hair = p["hair"] != "bald" and ellipsoid(c, at(0.02, 0), frame, (wide + 0.012, 0.13, 0.108), s)
    if hair:
        rows, columns, d, left, up, front, light = hair
        nape = 1.2 * np.maximum(0, -0.15 - up)
        back = 0.28 - front if p["hair"] == "long" else -0.02 - nape - front
        hairy = np.maximum(up - 0.55 + 0.12 * np.abs(left), back)
        c.paint(rows, columns, np.maximum(d, -hairy * px), p["hair_rgb"][:, None, None] * light, 1)
    hat = p["hat"] != "none" and ellipsoid(c, at(0.025, 0), frame, (wide + 0.02, 0.135, 0.115), s)
    if hat:
        rows, columns, d, left, up, front, light = hat
        band = 1 - 0.2 * np.clip((0.42 - up) * 9, 0, 1)
        c.paint(rows, columns, np.maximum(d, (0.3 - up) * px), p["hat_rgb"][:, None, None] * (light * band), 1)
        brims = {"cap": (0.125, (0.07, 0.012, 0.085)), "sun hat": (0, (0.19, 0.016, 0.19))}
        reach, semi = brims.get(p["hat"], (0, None))
        brim = semi and ellipsoid(c, at(0.062, reach), frame, semi, s)
        if brim:
            c.paint(*brim[:3], p["hat_rgb"][:, None, None] * (brim[-1] * 0.85), 1)


def draw_eye(c, at, left, up, side, p, s):
    """Eye, brow or glasses at one eye joint. left, up: px per metre along the head's axes."""
    if p["glasses"] == "none":
        brow = p["hair_rgb"] * np.float32(0.6)
        limb(c, at - left * 0.010, at + left * 0.010, 0.009, 0.009, WHITE, 1, s)
        limb(c, at + up * 0.022 - left * 0.016, at + up * 0.022 + left * 0.016, 0.006, 0.006, brow, 1, s)
    else:
        glass = DARK if p["glasses"] == "sunglasses" else DARK + p["skin"] * np.float32(0.55)
        limb(c, at - left * 0.016, at + left * 0.016, 0.02, 0.02, glass, 1, s)
        limb(c, at, at - left * side * 0.03, 0.006, 0.006, DARK, 1, s)  # bridge
    if p["glasses"] != "sunglasses":
        limb(c, at, at, 0.0085, 0.0085, DARK, 1, s)


def torso_shapes(body, s):
    """Capsules (a, b px; ra, rb, bump m) whose smooth union is the clothed trunk."""
    xy, p, hip, neck = body.xy, body.p, body.hip, body.xy[NECK]
    f, stout, air = float(p["female"]), p["stout"], p["loose"] * 0.7
    mid = lambda a, b, t: a + (b - a) * t  # noqa: E731
    front, left = -body.chest[2, :2] * s, body.chest[0, :2] * s
    shoulders, hips = [mid(neck, xy[i], 0.8) for i in (L_SHO, R_SHO)], [mid(hip, xy[i], 0.72) for i in (L_HIP, R_HIP)]
    shapes = [(mid(neck, xy[HEAD], 0.3), x, 0.045, 0.055, 0) for x in shoulders]
    r_chest, r_hip, waist = (0.072 - 0.006 * f) * stout + air, (0.078 + 0.006 * f) * stout + air, -0.004 - 0.012 * f
    shapes += [(a, b, r_chest, r_hip, waist / stout) for a, b in zip(shoulders, hips)]
    shapes += [(mid(neck, hip, 0.15), hip, 0.085 * stout + air, 0.095 * stout + air, 0)]
    shapes += [(*hips, 0.09 * stout, 0.09 * stout, 0)]
    belly = mid(neck, hip, 0.75) + front * 0.02
    shapes += [(belly, belly, 0.1 * stout**1.5, 0.1 * stout**1.5, 0)]
    if f:
        bust = mid(neck, hip, 0.36) + front * 0.055
        shapes += [(bust - left * 0.07, bust + left * 0.07, 0.068 + air, 0.068 + air, 0)]
    return shapes


def draw_torso(c, body):
    """Trunk in its clothes: coloured along (neck to hips) and across, in metres on the body."""
    p, neck, facing = body.p, body.xy[NECK], body.chest[2, 2]
    s = (body.ppm[NECK] + body.ppm[L_HIP]) / 2
    found = body_shape(c, torso_shapes(body, s), s)
    if found is None:
        return
    rows, columns, x, y, d, light = found
    axis = body.hip - neck
    length = max(np.hypot(*axis), 0.12 * s)
    ax, ay = axis / max(np.hypot(*axis), 1e-3)
    dx, dy, px = x - np.float32(neck[0]), y - np.float32(neck[1]), np.float32(s)
    along = (dx * np.float32(ax) + dy * np.float32(ay)) * np.float32((WAIST + CHEST) / length)
    across = (dx * np.float32(ay) - dy * np.float32(ax)) / px  # + = the person's left when he faces us
    off = np.float32(0.1 * (body.chest[2, 1] * ax - body.chest[2, 0] * ay))  # where the middle of the chest is seen
    line = across - off
    rgb = cloth(along, across - 1.5 * off, body.garment("upper"), s)
    if facing > 0.15:
        if p["open_front"]:
            rgb = mixed(rgb, p["inner_rgb"], np.clip(0.5 + (0.035 + 0.05 * along - np.abs(line)) * px, 0, 1))
        elif p["upper"] in ("shirt", "jacket", "coat"):  # buttons, zip
            rgb = rgb * (1 - 0.3 * np.clip(0.5 + (0.006 - np.abs(line)) * px, 0, 1))
        if p["upper_pattern"] == "logo":
            logo = np.clip(0.5 + (1 - np.hypot(line / 0.075, (along - 0.17) / 0.06)) * 0.065 * px, 0, 1)
            rgb = mixed(rgb, p["upper_second_rgb"], logo * (0.6 + 0.4 * (np.sin(along * 150) > 0)))
        if p["upper"] not in ("hoodie", "coat"):  # neckline
            deep = 0.075 if p["female"] else 0.055
            bare = np.clip(0.5 + (1 - np.hypot(line / 0.06, (along + 0.01) / deep)) * 0.06 * px, 0, 1)
            rgb = mixed(rgb, p["skin"], bare)
    hem, soft = np.float32(0.42 if p["tucked"] else 0.53), np.float32(length / (WAIST + CHEST))
    below = np.clip(0.5 + (along - hem) * soft, 0, 1)
    belt = np.clip(0.5 + (0.018 - np.abs(along - hem - np.float32(0.015))) * soft, 0, 1) * p["tucked"]
    c.paint(
        rows,
        columns,
        d,
        mixed(rgb, cloth(along, across, body.garment("lower"), s) * (1 - 0.35 * belt), below) * light,
        2,
    )


def draw_skirt(c, body, garment, reach):
    """Skirt, or the skirts of a coat: hips to `reach` (1 = knee, 2 = ankle), filled between the legs."""
    xy, s, hip, loose = body.xy, body.ppm[L_HIP], body.hip, body.p["loose"]
    shapes, ends = [], []
    for o in (0, 1):
        a, b = hip + (xy[L_HIP + o] - hip) * 0.72, xy[L_HIP + o] + (xy[L_KNE + o] - xy[L_HIP + o]) * min(reach, 1)
        shapes.append((a, b, 0.092 * body.p["stout"], 0.105 + loose, 0))
        ends.append(b + (xy[L_ANK + o] - b) * max(reach - 1, 0))
        shapes.append((b, ends[o], 0.105 + loose, 0.11 + loose, 0))
    shapes += [(hip, (ends[0] + ends[1]) / 2, 0.095, 0.1, 0), (*ends, 0.09, 0.09, 0)]  # no gap between the legs
    shapes += [
        (shapes[0][1], shapes[2][1], 0.1, 0.1, 0),
        ((shapes[0][1] + hip) / 2, (shapes[2][1] + hip) / 2, 0.1, 0.1, 0),
    ]
    found = body_shape(c, shapes, s)
    if found is None:
        return
    rows, columns, x, y, d, light = found
    axis, wide, px = (ends[0] + ends[1]) / 2 - hip, ends[0] - ends[1], np.float32(s)
    length = max(np.hypot(*axis), 1e-3)
    ax, ay = np.float32(axis / length)
    dx, dy = x - np.float32(hip[0]), y - np.float32(hip[1])
    along, across = (dx * ax + dy * ay) / px, (dx * ay - dy * ax) / px
    below_hem = (along - np.float32(length / s + 0.07)) * px  # cut straight
    pleats = 1 + 0.1 * np.sin(across * 75 / (1 + np.maximum(along, 0)))
    left = (dx - np.float32(axis[0] / 2)) * np.float32(wide[0]) + (dy - np.float32(axis[1] / 2)) * np.float32(
        wide[1]
    ) > 0
    part = np.where(left, 5, 6).astype(np.uint8)
    c.paint(rows, columns, np.maximum(d, below_hem), cloth(along, across, garment, s) * (light * pleats), part)


def draw_leg(c, body, o, lower_half):
    """Thigh, or shank and shoe, of one leg; o = 0 left, 1 right. Radii in metres."""
    xy, ppm, p, part = body.xy, body.ppm, body.p, 5 + o
    hip, knee, ankle, toe, heel = (xy[i + o] for i in (L_HIP, L_KNE, L_ANK, L_TOE, L_HEEL))
    stout, bare = p["stout"], p["lower"] in ("shorts", "skirt")
    air = 0.0 if p["lower"] == "leggings" or bare else 0.004 + p["loose"] * 0.7
    colour = p["skin"] if bare else body.garment("lower")
    if lower_half:
        s = ppm[L_ANK + o]
        sole = np.full(3, 0.25 if p["shoes"] == "white" else 0.9, np.float32)
        drop = (ankle - knee) / max(np.hypot(*(ankle - knee)), 1e-3) * 0.012 * s
        limb(c, heel + drop, toe + drop, 0.038, 0.032, sole, part, s)
        limb(c, ankle, (heel + ankle) / 2, 0.036, 0.04, p["shoes_rgb"], part, s)
        limb(c, heel, toe, 0.042, 0.031, p["shoes_rgb"], part, s)
        calf = 0.009 if air == 0 else 0.003
        limb(c, knee, ankle, 0.055 * stout + air, 0.034 + air * 1.2, colour, part, s, bump=calf, along0=THIGH)
        return
    top, s = hip + (body.hip - hip) * 0.12, (ppm[L_HIP + o] + ppm[L_KNE + o]) / 2
    limb(c, top, knee, 0.088 * stout + air, 0.056 * stout + air, colour, part, s)
    if p["lower"] == "shorts":
        shorts = body.garment("lower")
        limb(c, top, knee, 0.095 * stout + 0.01, 0.082 * stout + 0.012, shorts, part, s, end=0.62)


def draw_arm(c, body, o, lower_half):
    """Upper arm, or forearm and hand, of one arm; o = 0 left, 1 right. Radii in metres."""
    xy, ppm, p, part = body.xy, body.ppm, body.p, 3 + o
    shoulder, elbow, wrist, hand = (xy[i + o] for i in (L_SHO, L_ELB, L_WRI, L_HAND))
    stout, sleeve, long = p["stout"] * (0.92 if p["female"] else 1), body.garment("upper"), p["sleeves"] == "long"
    air = 0.004 + p["loose"] * 0.6
    under, colour = air * long, sleeve if long else p["skin"]
    s = (ppm[L_ELB + o] + ppm[(L_WRI if lower_half else L_SHO) + o]) / 2
    if lower_half:
        limb(c, wrist, wrist + (hand - wrist) * 0.85, 0.026, 0.034, p["skin"], part, s, bump=0.008)
        limb(c, elbow, wrist, 0.037 * stout + under, 0.026 + under, colour, part, s, bump=0.004, along0=UPPER_ARM)
        return
    top = shoulder + (xy[NECK] - shoulder) * 0.06
    limb(c, top, elbow, 0.05 * stout + under, 0.037 * stout + under, colour, part, s)
    if not long:
        limb(c, top, elbow, 0.058 * stout + air, 0.05 * stout + air * 1.5, sleeve, part, s, end=0.5)


def draw_person(c, body):
    """All shapes of one person, far ones first: (depth in metres, function, arguments)."""
    xy, z, p, s = body.xy, body.z, body.p, body.ppm[NECK]
    trunk, neck = z[[L_SHO, R_SHO, L_HIP, R_HIP]].mean(), xy[NECK]
    left2, down2, back2 = body.chest[:, :2] * s  # px per metre along the chest's axes
    shapes = [(trunk, draw_torso, body), (z[HEAD] - 0.09, draw_head, body)]
    add = lambda *shape: shapes.append(shape)  # noqa: E731
    behind = 0.16 if body.chest[2, 2] < 0 else 0.0  # clothes reach higher at the back of the neck
    throat, up, zn = neck + (xy[HEAD] - neck) * (0.2 + behind), (xy[HEAD] - neck) * 0.12, (z[NECK] + z[HEAD]) / 2 - 0.06
    add(zn, limb, throat, xy[HEAD], 0.054 - 0.008 * p["female"], 0.05, p["skin"] * np.float32(0.86), 1, s)
    if p["upper"] in ("shirt", "jacket", "coat", "hoodie"):  # collar
        add(zn - 0.001, limb, throat, throat + up, 0.06, 0.062, p["upper_rgb"] * np.float32(0.8), 2, s)
    thighs = [(z[L_HIP + o] + z[L_KNE + o]) / 2 + 0.03 for o in (0, 1)]  # a shade behind the shirt that hangs over them
    fores = [(z[L_ELB + o] + z[L_WRI + o]) / 2 - 0.05 for o in (0, 1)]  # hands rest in front of what they touch
    for o in (0, 1):
        add(thighs[o], draw_leg, body, o, False)
        add((z[L_KNE + o] + z[L_ANK + o]) / 2 + 0.035, draw_leg, body, o, True)
        add((z[L_SHO + o] + z[L_ELB + o]) / 2 - 0.02, draw_arm, body, o, False)
        add(fores[o], draw_arm, body, o, True)
    if p["lower"] == "skirt":
        add(min(thighs) - 0.001, draw_skirt, body, body.garment("lower"), 1.55 if p["lower_long"] else 0.8)
    if p["upper"] == "coat":
        add(min(*thighs, trunk) - 0.002, draw_skirt, body, body.garment("upper"), 0.75)
    if p["hair"] == "long":  # hangs behind the head: hidden by the body from the front, over the back from behind
        nape = xy[HEAD] + (body.head[2, :2] * 0.035 - body.head[1, :2] * 0.03) * s
        tip = neck + back2 * 0.09 + down2 * (0.02 + 0.12 * p["mane"])
        add(z[HEAD] + 0.12 * body.head[2, 2], limb, nape, tip, 0.088, 0.075, p["hair_rgb"] * np.float32(0.92), 1, s)
    draw_bags(add, body, trunk, fores, left2, down2, back2)
    for _, shape, *arguments in sorted(shapes, key=lambda item: -item[0]):
        shape(c, *arguments)


def draw_bags(add, body, trunk, fores, left2, down2, back2):
    """Backpack, shoulder bag or handbag: add their shapes. left2, down2, back2: px per metre."""
    xy, z, p, s, neck, hip = body.xy, body.z, body.p, body.ppm[NECK], body.xy[NECK], body.hip
    rgb, away = p["bag_rgb"], body.chest[2, 2]  # away > 0: the back is on the far side
    strap, pocket = rgb * np.float32(0.7), rgb * np.float32(0.78)
    if p["backpack"]:
        a, b = neck + (hip - neck) * 0.2 + back2 * 0.15, neck + (hip - neck) * 0.8 + back2 * 0.16
        r = 0.085 + 0.06 * abs(away)  # broad from behind, flat from the side
        add(trunk + 0.2 * away - 0.03, limb, a, b, r * 0.85, r, rgb, 2, s)
        low = a + (b - a) * 0.6 + back2 * 0.05, b + back2 * 0.05
        add(trunk + 0.21 * away - 0.031, limb, *low, r * 0.5, r * 0.6, pocket, 2, s)
        for i, j in ((L_SHO, L_HIP), (R_SHO, R_HIP)) if away > 0 else ():
            top = neck + (xy[i] - neck) * 0.6
            add(trunk - 0.01, limb, top - down2 * 0.05, top + (xy[j] - top) * 0.5, 0.018, 0.016, pocket, 2, s)
    o, side = (0, 1) if p["bag_left"] else (1, -1)
    if p["bag"] == "shoulder bag":
        at, top = xy[L_HIP + o] + side * left2 * 0.09, neck + (xy[R_SHO - o] - neck) * 0.5 - down2 * 0.04
        add(trunk - 0.01, limb, top, at, 0.014, 0.012, strap, 2, s)
        depth = z[L_HIP + o] + 0.1 * side * body.chest[0, 2] - 0.045
        add(depth, limb, at - back2 * 0.06, at + back2 * 0.06 + down2 * 0.1, 0.075, 0.085, rgb, 2, s)
    if p["bag"] == "handbag":  # hangs straight down
        at = xy[L_HAND + o]
        x, y = np.array([0.06, 0.0]) * s, np.array([0.0, 0.2]) * s
        add(fores[o] + 0.001, limb, at, at + 0.6 * y, 0.012, 0.03, strap, 2, s)
        add(fores[o] + 0.0009, limb, at + y - x, at + y + x, 0.085, 0.085, rgb, 2, s)


def draw_background(scene, H, W):
    """The place without people → (3, H, W) float32. Lengths are fractions of H, so any size shows the same place."""
    fractal, fine, _ = texture_bank()
    zoom, (sy, sx, *_), (my, mx) = 256 / H, scene["shift"], scene["move"]
    y = (np.arange(H, dtype=np.float32)[:, None] + 0.5) / H + np.float32(my)
    x = (np.arange(W, dtype=np.float32)[None] + 0.5) / H + np.float32(mx)
    family, horizon, grain = scene["family"], np.float32(scene["horizon"]), np.float32(scene["grain"])
    wall, ground, far = (scene[name][:, None, None] for name in ("wall", "ground", "far"))
    soft, hard = patch(fractal, sy, sx, H, W, zoom), patch(fine, sx, sy, H, W, zoom)
    upper = wall * (1.1 - 0.25 * y + 0.12 * grain * soft + 0.06 * grain * hard)
    if family == "wall":  # bricks or tiles
        rows = y * np.float32(20 * scene["panes"][0])
        stones = x * np.float32(9 * scene["panes"][0]) + 0.5 * (np.floor(rows) % 2)
        tone = np.sin(np.floor(rows) * 12.9 + np.floor(stones) * 78.2) * 0.06  # no two bricks alike
        joint = (np.abs(rows % 1 - 0.5) > 0.42) | (np.abs(stones % 1 - 0.5) > 0.45)
        upper = upper * (1 + tone - (0.1 + 0.6 * grain) * joint)
    elif family == "street":  # a house front with windows
        u, v = (x * np.float32(6 * scene["panes"][0])) % 1, (y * np.float32(5 * scene["panes"][1])) % 1
        window = (np.abs(u - 0.5) < 0.24) & (np.abs(v - 0.5) < 0.32)
        upper = upper + window * (far * (0.6 + 0.3 * v) - upper) * np.float32(0.85)
    elif family == "grass":
        upper = np.array([0.60, 0.68, 0.74], np.float32)[:, None, None] * (1.15 - 0.2 * y) * (1 + 0.06 * soft)
    if family in ("street", "plaza", "indoor"):
        for rx, ry, rw, rh, *tint, bright in scene["rects"]:  # doors, pictures, cars, furniture
            r0, r1 = (int(np.clip((v * horizon - my) * H, 0, H)) for v in (ry, ry + rh + 0.15))
            c0, c1 = (int(np.clip((v - mx) * H, 0, W)) for v in (rx * W / H, rx * W / H + rw * 0.7))
            tint = np.array(tint, np.float32)[:, None, None]
            upper[:, r0:r1, c0:c1] = tint * (1 + 0.08 * soft[r0:r1, c0:c1])
            if bright > 0.5:  # a pane inside
                a, b = (r1 - r0) // 6, (c1 - c0) // 6
                upper[:, r0 + a : r1 - a, c0 + b : c1 - b] = tint * 0.55 + 0.35 * (1 - y[r0 + a : r1 - a])
    lower = ground * (1.05 - 0.3 * (1 - y) + (0.02 + 0.12 * grain) * hard + 0.03 * soft)
    if family == "grass":
        green = np.array([0.26, 0.38, 0.14], np.float32)[:, None, None]
        lower = (0.35 * ground + green) * (0.85 + 0.09 * hard + 0.07 * soft)
    if family in ("plaza", "indoor"):  # slabs in perspective
        depth = 0.25 / np.maximum(y - horizon + 0.06, 0.03)
        joint = (np.abs((depth * 4) % 1 - 0.5) > 0.44) | (np.abs(((x - 0.25) * depth * 5) % 1 - 0.5) > 0.45)
        lower = lower * (1 - 0.2 * joint)
    edge = (
        np.clip((y - horizon) * np.float32(H) + 0.5, 0, 1)
        if family != "plain"
        else np.clip((y - horizon) * 3 + 0.5, 0, 1)
    )
    image = upper + edge * (lower - upper)
    if family == "indoor":  # skirting board
        image = image * (1 - 0.35 * (np.abs(y - horizon) < 0.012))
    leaf = np.array([0.75, 1.05, 0.55] if family != "plaza" else [1, 1, 1], np.float32)
    for bx, by, rx, ry, *colour, _ in scene["blobs"] if family in ("grass", "street", "plaza") else ():  # trees, bushes
        ex, top = (x - np.float32(bx * W / H)), np.float32(horizon * (0.25 + 0.7 * by))
        tint = (np.array(colour, np.float32) * leaf)[:, None, None]
        if family == "grass":
            trunk = (np.abs(ex) < 0.015) & (y > top) & (y < horizon + 0.03)
            image = image + trunk * (np.array([0.25, 0.18, 0.12], np.float32)[:, None, None] - image)
        d = (ex / np.float32(rx)) ** 2 + ((y - top) / np.float32(ry)) ** 2 + 0.3 * soft
        image = image + np.clip((1 - d) * 3, 0, 1) * (tint * (0.75 + 0.10 * hard - (y - top)) - image)
    return image.astype(np.float32)


def draw_occluder(c, scene):
    """Something nearer than the person; what it covers is background in the part map."""
    kind, where, width, colour = scene["occluder"]
    fractal, fine, _ = texture_bank()
    y, x = (np.arange(c.H, dtype=np.float32)[:, None] + 0.5) / c.H, (np.arange(c.W, dtype=np.float32)[None] + 0.5) / c.W
    soft = patch(fractal, scene["shift"][2], scene["shift"][3], c.H, c.W, 256 / c.H)
    if kind == "pole":
        d = (np.abs(x - where) - width * 0.5) + 0 * y
    elif kind == "low":  # a car, a table, a wall in front
        d = (1 - width * 1.4) - y + 0.0 * x
    elif kind == "side":
        d = (x - width) if where < 0.5 else (1 - width) - x
        d = d + 0 * y
    else:
        d = np.hypot(x - where, (y - 1.05) * 1.6) - width * 2.2 + 0.04 * soft
    light = 0.9 + 0.05 * patch(fine, 7, 11, c.H, c.W, 256 / c.H) - (0.5 * np.abs(x - where) if kind == "pole" else 0.0)
    c.paint(
        slice(None),
        slice(None),
        d * np.float32(c.W if kind in ("pole", "side") else c.H),
        colour[:, None, None] * light,
        0,
    )


def draw_ground(c, scene, xy, ppm, seat):
    """Contact shadow under the lowest points and, for a sitting body, something to sit on."""
    y, x = np.arange(c.H, dtype=np.float32)[:, None], np.arange(c.W, dtype=np.float32)[None]
    floor, s = xy[:, 1].max() + 0.02 * ppm[L_ANK], ppm[L_ANK]
    if seat:
        hip = (xy[L_HIP] + xy[R_HIP]) / 2
        box = c.window((hip[0] - 0.26 * s, hip[1] + 0.05 * s), (hip[0] + 0.26 * s, floor - 0.02 * s))
        if box:
            rows, columns, bx, by = box
            tint = scene["wall"][::-1].astype(np.float32)[:, None, None] * np.float32(0.62)
            side = 1 - 0.35 * np.abs(bx - hip[0]) / np.float32(0.26 * s) - 0.25 * (by > hip[1] + 0.12 * s)
            c.paint(rows, columns, -np.ones_like(bx * by), tint * side, None)
    if floor > c.H * 1.2:
        return
    for toe, heel in ((L_TOE, L_HEEL), (R_TOE, R_HEEL)):
        mx, my = (xy[toe] + xy[heel]) / 2
        fade = float(np.exp(-(((floor - my) / (0.2 * s)) ** 2)))
        dark = (
            0.5
            * fade
            * np.exp(-(((x - np.float32(mx + 0.08 * s)) / np.float32(0.24 * s)) ** 2))
            * np.exp(-(((y - np.float32(floor - 0.02 * s)) / np.float32(0.055 * s)) ** 2))
        )
        c.image *= 1 - dark


def finish(c, scene):
    """Light, colour cast, blur, noise → uint8 (H, W, 3)."""
    image = c.image * (scene["cast"] * np.float32(scene["gain"]))[:, None, None]
    sigma = scene["blur"] * c.H / 128
    for _ in range(int(np.ceil(sigma**2 / 0.5))):  # [w, 1 - 2w, w] twice over; the variances 2w add up to sigma²
        w = np.float32(sigma**2 / np.ceil(sigma**2 / 0.5) / 2)
        for axis in (1, 2):
            padded = np.concatenate([image.take([0], axis), image, image.take([-1], axis)], axis)
            n = image.shape[axis]
            ahead, behind = (padded[:, 2:], padded[:, :n]) if axis == 1 else (padded[:, :, 2:], padded[:, :, :n])
            image = image + w * (ahead + behind - 2 * image)
    noise = patch(texture_bank()[2], scene["shift"][0], scene["shift"][1], c.H, c.W, 1)
    image = image + np.float32(scene["noise"]) * noise
    return (np.clip(image, 0, 1) * np.float32(255) + np.float32(0.5)).astype(np.uint8).transpose(1, 2, 0)


# Which parts may be on top of a joint that is visible: its own and the ones it joins.
OWN = {**dict.fromkeys(range(5), (1,)), **dict.fromkeys((L_SHO,), (2, 3)), R_SHO: (2, 4), L_HIP: (2, 5), R_HIP: (2, 6)}
OWN |= {L_ELB: (3,), L_WRI: (3,), R_ELB: (4,), R_WRI: (4,), L_KNE: (5,), L_ANK: (5,), R_KNE: (6,), R_ANK: (6,)}
LOOKS = {NOSE: (0, 1), L_EYE: (0.45, 0.9), R_EYE: (-0.45, 0.9), L_EAR: (1, 0.1), R_EAR: (-1, 0.1)}  # left, front


def visibility(c, xy, z, head, chest, given):
    """(17,) 2 visible, 1 hidden behind the own body or an occluder, or completed by us; 0 outside the picture."""
    v = np.zeros(17, np.float32)
    for j in range(17):
        x, y = xy[j]
        if not (-0.5 <= x < c.W - 0.5 and -0.5 <= y < c.H - 0.5):
            continue
        seen = c.parts[int(y + 0.5), int(x + 0.5)] in OWN[j]
        if j in LOOKS:
            left, front = LOOKS[j]
            seen &= -(left * head[0, 2] - front * head[2, 2]) > -0.05
        elif j in (L_SHO, R_SHO, L_HIP, R_HIP):  # the far side of a body seen from the side is behind it
            seen &= z[j] - z[[L_SHO, R_SHO] if j < L_HIP else [L_HIP, R_HIP]].mean() < 0.75 * (
                SHOULDER_HALF if j < L_HIP else HIP_HALF
            )
        v[j] = 2 if seen and given[j] else 1
    return v


def render(poses, identities, scenes, size=(128, 64)):
    """Draw B pictures. → dict of

    image uint8 (B, H, W, 3); keypoints float32 (B, 17, 3): px (pixel centres are whole numbers), visibility 2 visible,
    1 hidden (behind the own body or an occluder) or completed by `poses_from_keypoints`, 0 outside (x = y = 0);
    parts uint8 (B, H, W): index in PARTS, hair, hat and neck are head, bags torso, an occluder is background;
    joints3d float32 (B, 17, 3): camera frame, metres; boxes float32 (B, 4): xywh of the person in the picture, before
    occlusion (zeros if the person is outside).
    """
    H, W = size
    B = len(poses.points)
    xy, ppm = project(poses, size)
    out = dict(
        image=np.zeros((B, H, W, 3), np.uint8),
        keypoints=np.zeros((B, 17, 3), np.float32),
        parts=np.zeros((B, H, W), np.uint8),
    )
    out |= dict(joints3d=poses.joints3d, boxes=np.zeros((B, 4), np.float32))
    hips = [list(LIMITS).index(name) for name in ("l_hip", "r_hip")]
    for i in range(B):
        scene, z = scenes.scenes[i], poses.points[i, :, 2]
        c = Canvas(draw_background(scene, H, W), scene)
        draw_ground(c, scene, xy[i], ppm[i], bool((poses.angles[i, hips] > 60).all()))
        draw_person(c, Body(xy[i], ppm[i], z, poses.head[i], poses.chest[i], identities.people[i]))
        rows, columns = np.flatnonzero(c.parts.any(1)), np.flatnonzero(c.parts.any(0))
        if len(rows):
            out["boxes"][i] = columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]
        if scene["occluder"]:
            draw_occluder(c, scene)
        out["image"][i], out["parts"][i] = finish(c, scene), c.parts
        v = visibility(c, xy[i], z, poses.head[i], poses.chest[i], poses.given[i])
        out["keypoints"][i] = np.concatenate([xy[i, :17] * (v > 0)[:, None], v[:, None]], 1)
    return out
