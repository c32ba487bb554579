"""The puppet's body: tree of joints, joint limits, sampled poses, camera.

Legend: B poses · J = 26 body points (17 COCO joints first) · A joint angles · H, W picture.
Frame: camera axes, x right, y down, z away from the camera, metres. The person's own axes at yaw 0
(facing the camera) coincide with them: x = the person's left, y = down, z = the person's back.
"""

from typing import NamedTuple

import numpy as np

from plumbing.seeds import POSE, rng_of

NOSE, L_EYE, R_EYE, L_EAR, R_EAR, L_SHO, R_SHO, L_ELB, R_ELB, L_WRI, R_WRI = range(11)
L_HIP, R_HIP, L_KNE, R_KNE, L_ANK, R_ANK, NECK, HEAD, TOP = range(11, 20)
L_HAND, R_HAND, L_TOE, R_TOE, L_HEEL, R_HEEL = range(20, 26)
J = 26
# What the values of a part map mean.
PARTS = ("background", "head", "torso", "left arm", "right arm", "left leg", "right leg")

# Lengths in metres of a 1.72 m person (adult means of anthropometric tables, rounded). NECK is the
# middle between the shoulders, HEAD the middle between the ears.
HIP_HALF, WAIST, CHEST, SHOULDER_HALF, SKULL = 0.10, 0.20, 0.30, 0.18, 0.20
UPPER_ARM, FOREARM, HAND, THIGH, SHANK, TOE, HEEL = 0.29, 0.25, 0.13, 0.43, 0.42, 0.16, 0.06
SOLE = 0.07
FACE = {NOSE: (0, 0.01, -0.112), L_EYE: (0.032, -0.025, -0.088), R_EYE: (-0.032, -0.025, -0.088)}
# Places in the head's frame.
FACE |= {L_EAR: (0.078, 0, 0.005), R_EAR: (-0.078, 0, 0.005), TOP: (0, -0.13, 0.01)}
BONES = [(L_SHO, L_ELB, UPPER_ARM), (L_ELB, L_WRI, FOREARM)]
BONES += [(R_SHO, R_ELB, UPPER_ARM), (R_ELB, R_WRI, FOREARM)]
BONES += [(L_HIP, L_KNE, THIGH), (L_KNE, L_ANK, SHANK)]
BONES += [(R_HIP, R_KNE, THIGH), (R_KNE, R_ANK, SHANK)]
BONES += [(L_HIP, R_HIP, 2 * HIP_HALF)]

# Joint limits in degrees. Flexion is forward for spine, head, hip, shoulder; elbow and knee are
# hinges (≥ 0).
TRUNK = dict(bend=(-15, 60), twist=(-35, 35), side=(-20, 20))
TRUNK |= dict(nod=(-30, 40), turn=(-60, 60), tilt=(-25, 25))
LIMBS = dict(sho=(-50, 175), abd=(-5, 150), axial=(-70, 80), elb=(0, 145))
LIMBS |= dict(hip=(-25, 115), open=(-10, 45), spin=(-25, 30), kne=(0, 140), foot=(-30, 20))
LIMITS = TRUNK | {f"{side}_{name}": limit for side in "lr" for name, limit in LIMBS.items()}


class Poses(NamedTuple):
    """B poses as seen by their cameras; index with `take(poses, rows)`.

    points (B, J, 3) float64: camera frame, metres; picture position = x/z, y/z.
    head (B, 3, 3): rows = the head's left, down, back axes; chest (B, 3, 3): the same of the chest.
    head_size (B,): times the standard skull (1 for sampled poses; real faces tell theirs).
    window (B, 4): centre x, y, width, height (in x/z, y/z) that must fit the picture; the picture's
    aspect pads it.
    given (B, 17) bool: joints that were given or sampled (False = completed by us).
    ok (B,) bool: drawable. angles (B, A): degrees in the order of LIMITS, NaN for real poses.
    down (B, 3): where the world's down points (real poses: that of an upright camera).
    """

    points: np.ndarray
    head: np.ndarray
    chest: np.ndarray
    head_size: np.ndarray
    window: np.ndarray
    given: np.ndarray
    ok: np.ndarray
    angles: np.ndarray
    down: np.ndarray


def take(poses, rows):
    """Poses of these rows (ids or mask), e.g. each K times: take(poses, np.repeat(range(P), K))."""
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
    """Product of (B, 3, 3) rotations, without BLAS: a row never depends on the batch it is in."""
    out = matrices[0]
    for m in matrices[1:]:
        out = (out[..., :, :, None] * m[..., None, :, :]).sum(-2)
    return out


def turn(matrix, vector):
    """(B, 3, 3) rotations times one (3,) or (B, 3) vector."""
    return (matrix * np.asarray(vector, float)[..., None, :]).sum(-1)


def pose_body(angles, root, stature):
    """Forward kinematics. angles (B, A) in the order of LIMITS, root (B, 3, 3), stature (B,) in
    units of the table.

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
        raised = chain(chest, rotation(2, -sign * x["abd"]), rotation(0, -x["sho"]))
        arm = chain(raised, rotation(1, sign * x["axial"]))
        fore = chain(arm, rotation(0, -x["elb"]))
        points[:, L_SHO + o] = points[:, NECK] + turn(chest, (sign * SHOULDER_HALF, 0.015, 0))
        points[:, L_ELB + o] = points[:, L_SHO + o] + turn(arm, (0, UPPER_ARM, 0))
        points[:, L_WRI + o] = points[:, L_ELB + o] + turn(fore, (0, FOREARM, 0))
        points[:, L_HAND + o] = points[:, L_WRI + o] + turn(fore, (0, HAND, 0))
        raised = chain(root, rotation(2, -sign * x["open"]), rotation(0, -x["hip"]))
        leg = chain(raised, rotation(1, -sign * x["spin"]))
        shank = chain(leg, rotation(0, x["kne"]))
        foot = chain(shank, rotation(0, -x["foot"]))
        points[:, L_HIP + o] = turn(root, (sign * HIP_HALF, 0, 0))
        points[:, L_KNE + o] = points[:, L_HIP + o] + turn(leg, (0, THIGH, 0))
        points[:, L_ANK + o] = points[:, L_KNE + o] + turn(shank, (0, SHANK, 0))
        points[:, L_TOE + o] = points[:, L_ANK + o] + turn(foot, (sign * 0.02, SOLE, -TOE))
        points[:, L_HEEL + o] = points[:, L_ANK + o] + turn(foot, (0, SOLE, HEEL))
    # Axes become rows.
    return points * stature[:, None, None], head.swapaxes(1, 2), chest.swapaxes(1, 2)


# ------------------------------------------------------------------------------------ pose sampling

# Degrees: (mean, spread, × sin of the gait's phase, × its upswing); a negative spread adds its
# absolute value only. Ours: street-like people and a share of anything, checked by eye on the
# contact sheet.
REST = dict(bend=(4, 4), twist=(0, 5), side=(0, 3), nod=(5, 8), turn=(0, 20), tilt=(0, 4))
REST |= dict(sho=(5, 8), abd=(9, -5), axial=(15, 12), elb=(15, -10), hip=(0, 4), open=(4, 3))
REST |= dict(spin=(6, 6), kne=(3, -4), foot=(0, 3))
RUN = dict(bend=(12, 4), hip=(15, 6, 42), kne=(22, 8, 0, 75), sho=(0, 8, -45), elb=(88, 12))
SIT = dict(bend=(8, 8), hip=(85, 7), kne=(85, 14), open=(8, 7), sho=(25, 12), elb=(60, 20))
FREE = dict(bend=(15, 18), twist=(0, 15), sho=(50, 55), abd=(35, 35), axial=(0, 35), elb=(55, 40))
ACTIVITIES = dict(
    standing=(0.30, {}),
    walking=(0.28, dict(hip=(6, 4, 24), kne=(8, 4, 0, 48), sho=(0, 6, -20), elb=(24, 8, -8))),
    running=(0.12, RUN),
    sitting=(0.12, SIT),
    free=(0.18, FREE | dict(hip=(25, 35), open=(12, 12), kne=(40, 40))),
)
# What arms do meanwhile (sho, abd, axial, elb): at the phone, in the pocket, waving, folded,
# pointing.
GESTURES = [(45, 5, 55, 125), (15, 22, 30, 60), (120, 50, 0, 70), (40, 5, 60, 85), (95, 10, 0, 8)]


def choose(rng, weights):
    """One key of {key: weight}."""
    edges = np.cumsum(list(weights.values()))
    return list(weights)[int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))]


def sample_angles(rng):
    """→ one pose's angles (A,) in degrees, in LIMITS' order; pitch and roll of the whole body."""
    activity = choose(rng, {name: weight for name, (weight, _) in ACTIVITIES.items()})
    prior, n, u = REST | ACTIVITIES[activity][1], rng.standard_normal(len(LIMITS)), rng.random(5)
    phase = 2 * np.pi * u[0]
    a = {}
    for name, x in zip(LIMITS, n):
        mean, spread, swing, lift = (*prior[name.split("_")[-1]], 0, 0)[:4]
        # Legs are half a step apart, each arm goes against its leg.
        here = phase + np.pi * name.startswith("r_")
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
    """Poses of the given ids. Pose p and its camera depend on (seed, p) only."""
    B, rows = len(pose_ids), []
    for p in pose_ids:
        rng = rng_of(POSE, seed, p)
        angles, pitch, roll = sample_angles(rng)
        # Camera: any side; from eye level to a surveillance camera's height; 3 to 12 m away;
        # slightly askew.
        camera = [rng.uniform(-180, 180), rng.triangular(-6, 4, 28)]
        camera += [rng.uniform(3, 12), rng.normal(0, 2)]
        stature, shift, fill = rng.uniform(0.9, 1.08), rng.uniform(-1, 1, 2), rng.uniform(1.0, 1.18)
        rows.append((*angles, pitch, roll, *camera, stature, *shift, fill))
    table = np.array(rows).reshape(B, len(LIMITS) + 10)
    angles, shift = table[:, :-10], table[:, -3:-1]
    pitch, roll, yaw, elevation, distance, tilt, stature, _, _, fill = table[:, -10:].T
    view = chain(rotation(2, tilt), rotation(0, elevation), rotation(1, yaw))
    root = chain(view, rotation(0, pitch), rotation(2, roll))
    points, head, chest = pose_body(angles, root, stature)
    points[:, :, 2] += distance[:, None]
    xy = points[..., :2] / points[..., 2:]
    # Room for skull and feet.
    low, high = xy.min(1) - 0.09 / distance[:, None], xy.max(1) + 0.07 / distance[:, None]
    size = (high - low) * fill[:, None]
    window = np.concatenate([(low + high) / 2 + shift * (size - (high - low)) / 2, size], 1)
    given, ok = np.ones((B, 17), bool), np.ones(B, bool)
    down = view[:, :, 1]  # yaw turns about it, and leaves it where it is
    return Poses(points, head, chest, np.ones(B), window, given, ok, angles, down)


def turned(poses, degrees):
    """The same poses, turned in place about the vertical through the middle of the hips.

    degrees: a number or (B,); added to a sampled pose's yaw. The window stays: the same picture by
    a camera that has walked around the person.
    """
    # Rodrigues: R = cos·1 + sin·[u]× + (1 − cos)·u uᵀ
    u, angle = poses.down, np.radians(np.broadcast_to(degrees, len(poses.points)))
    c, s = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    cross = np.zeros((len(u), 3, 3))
    cross[:, 0, 1], cross[:, 0, 2], cross[:, 1, 2] = -u[:, 2], u[:, 1], -u[:, 0]
    cross = cross - cross.swapaxes(1, 2)
    R = c * np.eye(3) + s * cross + (1 - c) * u[:, :, None] * u[:, None, :]
    middle = poses.points[:, [L_HIP, R_HIP]].mean(1, keepdims=True)
    points = middle + turn(R[:, None], poses.points - middle)
    head, chest = (turn(R[:, None], axes) for axes in (poses.head, poses.chest))
    return poses._replace(points=points, head=head, chest=chest)


def project(poses, size):
    """Poses, (H, W) → xy (B, J, 2) in pixels and px per metre (B, J) at each point, float64."""
    H, W = size
    # The aspect is kept, and the window must fit.
    scale = np.minimum(W / poses.window[:, 2], H / poses.window[:, 3])[:, None]
    z = poses.points[..., 2:]
    xy = (poses.points[..., :2] / z - poses.window[:, None, :2]) * scale[..., None]
    xy = xy + np.array([W / 2, H / 2])
    per_metre = scale / z[..., 0]
    per_metre[:, HEAD] *= poses.head_size
    return xy, per_metre
