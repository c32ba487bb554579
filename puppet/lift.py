"""Real 2-D poses become drawable: missing joints are completed, depth is guessed, given joints stay
where they are.

Legend: B poses · J = 26 body points (17 COCO joints first) · s px per metre on the body. Frame:
body.py. In one pose p (J, 2) px and given (J,) bool are filled in place, joint by joint.
"""

import numpy as np

# Names a few to a line; isort would give each its own.
# isort: off
from puppet.body import BONES, FACE, J, LIMITS, Poses, chain, rotation, sample_poses
from puppet.body import CHEST, FOREARM, HAND, HEEL, HIP_HALF, SHANK, SHOULDER_HALF, SKULL, THIGH
from puppet.body import TOE, UPPER_ARM, WAIST
from puppet.body import HEAD, L_EAR, L_EYE, L_ELB, L_HAND, L_SHO, L_WRI, NECK, NOSE
from puppet.body import R_EAR, R_ELB, R_EYE, R_SHO, R_WRI
from puppet.body import L_ANK, L_HEEL, L_HIP, L_KNE, L_TOE, R_ANK, R_HIP, R_KNE

# isort: on
from formats.joints import COCO_JOINTS, LSP_JOINTS, to_coco17

# LSP_JOINTS without the last two, neck and head top.
LSP = [R_ANK, R_KNE, R_HIP, L_HIP, L_KNE, L_ANK, R_WRI, R_ELB, R_SHO, L_SHO, L_ELB, L_WRI]


def coco17(people):
    """formats.coco.People of any joint set → the same people with COCO's seventeen.

    By name: what the set lacks is missing. LSP's set, which names no joint of the face, also gives
    a face, see lsp_to_coco.
    """
    if set(LSP_JOINTS) <= set(people.joints) and not set(COCO_JOINTS[:5]) & set(people.joints):
        columns = [people.joints.index(name) for name in LSP_JOINTS]
        points = lsp_to_coco(people.keypoints[:, columns]).astype(np.float32)
    else:
        points = to_coco17(people.keypoints, people.joints)
    return people._replace(keypoints=points, joints=COCO_JOINTS)


def lsp_to_coco(keypoints14):
    """(B, 14, 3) of LSP → (B, 17, 3) of COCO: a face from neck and head top, as shoulders turn.

    Derived face joints have visibility 1. Where neck, head top or the shoulders are missing they
    stay missing (0).
    """
    source = np.asarray(keypoints14, float)
    out = np.zeros((len(source), 17, 3))
    out[:, LSP] = source[:, :12]
    out[out[..., 2] <= 0] = 0
    neck, top = source[:, 12, :2], source[:, 13, :2]
    have = (source[:, 12:, 2] > 0).all(1) & (out[:, [L_SHO, R_SHO], 2] > 0).all(1)
    up = top - neck
    # The person's left when he faces the camera, as long as neck to head top.
    left = np.stack([-up[:, 1], up[:, 0]], 1)
    across = ((out[:, L_SHO, :2] - out[:, R_SHO, :2]) * left).sum(1)
    across = across / np.maximum((left**2).sum(1), 1e-9)
    # Shoulders are about 1.1 × (neck to head top) apart, seen from the front.
    cos = np.clip(across / 1.1, -1, 1)
    sin = np.sqrt(1 - cos**2) * np.sign(side_of_front(out))
    for joint, (x, y, z) in FACE.items():
        if joint < 17:
            move = (cos * x - sin * z)[:, None] * left / 0.33 + (0.6 - y / 0.33) * up
            out[:, joint] = np.concatenate([neck + move, np.ones((len(out), 1))], 1) * have[:, None]
    return out


def side_of_front(k):
    """(B, 17, 3) px → (B,) +1 where an upright person, seen from the side, looks to the right.

    Knees bend forward and elbows bend backward, so both tell; 0 evidence gives +1.
    """
    up = k[:, [L_SHO, R_SHO], :2].mean(1) - k[:, [L_HIP, R_HIP], :2].mean(1)
    right = np.stack([-up[:, 1], up[:, 0]], 1)
    vote = np.zeros(len(k))
    for a, b, c, sign in ((L_HIP, L_KNE, L_ANK, 1), (L_SHO, L_ELB, L_WRI, -1)):
        for o in (0, 1):  # right joints follow their left twins
            out = k[:, b + o, :2] - (k[:, a + o, :2] + k[:, c + o, :2]) / 2
            vote += sign * (out * right).sum(1) * (k[:, [a + o, b + o, c + o], 2] > 0).all(1)
    return np.where(vote >= 0, 1.0, -1.0)


def poses_from_keypoints(keypoints, boxes, pad=1.15):
    """Real 2-D poses become drawable.

    keypoints (B, 17, 3) px, COCO order, visibility 0 = missing; boxes (B, 4) xywh px. The box,
    padded by `pad`, becomes the window, which `project` pads to the picture's aspect; given joints
    stay exactly where that map puts them. Missing joints are completed (from the other end of the
    bone, the parent's direction, the body axis) and depth is guessed from foreshortening. `ok` is
    False (the rest is then meaningless) with fewer than 2 of the 4 shoulders and hips, fewer than 4
    joints, or a body or box of no size.
    """
    keypoints, boxes = np.asarray(keypoints, float), np.asarray(boxes, float)
    if not len(keypoints):
        return sample_poses(0, [])
    rows = [lift(k, box, pad) for k, box in zip(keypoints, boxes, strict=True)]
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    points, head, chest, head_size, window, ok = columns
    angles = np.full((len(rows), len(LIMITS)), np.nan)
    given, down = keypoints[..., 2] > 0, np.tile((0.0, 1.0, 0.0), (len(rows), 1))
    return Poses(points, head, chest, head_size, window, given, ok, angles, down)


def lift(k, box, pad, distance=8.0):
    """One real pose (17, 3) → points (J, 3), head, chest (3, 3), head size, window (4,), ok.

    distance: the assumed camera's, in metres (weak perspective: bodies are small beside it).
    """
    given, p, z = np.zeros(J, bool), np.zeros((J, 2)), np.zeros(J)
    given[:17], p[:17] = k[:, 2] > 0, k[:, :2]
    s = px_per_metre(p, given)
    torso = given[[L_SHO, R_SHO, L_HIP, R_HIP]].sum()
    if torso < 2 or given.sum() < 4 or not s > 0.5 or min(box[2:]) < 2:
        nothing = np.zeros((J, 3)) + (0, 0, distance)
        return nothing, np.eye(3), np.eye(3), 1.0, np.array([0, 0, 1.0, 1.0]), False
    up = complete_torso(p, given, s)
    complete_limbs(p, given, s, up)

    # The chest's frame: its left axis from the shoulders' foreshortening, forward from whoever
    # tells where front is.
    across = np.array([-up[1], up[0]])
    cos = np.clip(((p[L_SHO] - p[R_SHO]) @ across) / (2 * SHOULDER_HALF * s), -1, 1)
    face, look = given[[NOSE, L_EYE, R_EYE]], 0.0
    if face.any():
        ahead = p[[NOSE, L_EYE, R_EYE]][face].mean(0) - p[[L_SHO, R_SHO]].mean(0)
        look = ahead @ across / s
    side = np.sign(look)
    if abs(look) <= 0.06:
        side = side_of_front(np.column_stack([p, given])[None])[0]
    sin = np.sqrt(1 - cos**2) * side  # forward = side in the picture plane, -cos towards the camera
    chest = np.array([(*(cos * across), sin), (*-up, 0), (*(-sin * across), cos)])
    back3 = chest[2]
    z[[L_SHO, R_SHO]] = SHOULDER_HALF * sin, -SHOULDER_HALF * sin
    z[[L_HIP, R_HIP]] = HIP_HALF * sin, -HIP_HALF * sin
    # Limbs: what is missing of a bone's length in the picture is depth. Thighs, upper arms and
    # forearms go to the front of the body, shanks to its back; from the side, limbs lean to their
    # own side.
    for a, b, length in BONES[:8]:
        depth = np.sqrt(max(0, length**2 - (np.linalg.norm(p[b] - p[a]) / s) ** 2)) * 0.85
        ahead = -np.sign(back3[2]) if abs(back3[2]) > 0.3 else np.sign(z[L_SHO if b % 2 else R_SHO])
        z[b] = z[a] + depth * ahead * (-1 if b in (L_ANK, R_ANK) else 1)
    head, head_size = fit_head(p, z, given, s, up, np.degrees(np.arctan2(sin, cos)))
    for o in (0, 1):
        fore, shank = p[L_WRI + o] - p[L_ELB + o], p[L_ANK + o] - p[L_KNE + o]
        length = max(np.linalg.norm(fore), 0.5 * FOREARM * s)
        p[L_HAND + o] = p[L_WRI + o] + fore / length * HAND * s
        z[L_HAND + o] = z[L_WRI + o]
        down = shank / max(np.linalg.norm(shank), 0.3 * s)
        ahead = -back3[:2] - down * (-back3[:2] @ down)
        p[L_TOE + o] = p[L_ANK + o] + (down * 0.09 + ahead * TOE) * s
        p[L_HEEL + o] = p[L_ANK + o] + (down * 0.06 - ahead * HEEL) * s
        z[L_TOE + o], z[L_HEEL + o] = z[L_ANK + o] + 0.1 * -back3[2], z[L_ANK + o]
    centre = box[:2] + box[2:] / 2
    # What the camera sees: x/z, y/z, with s px per metre at that distance.
    xy = (p - centre) / (s * distance)
    depth = distance + np.clip(z, -1.5, 1.5)[:, None]
    window = np.array([0, 0, *(box[2:] * pad / (s * distance))])
    return np.concatenate([xy * depth, depth], 1), head, chest, head_size, window, True


def px_per_metre(p, given):
    """Scale of the body: bones look shorter, never longer, so the three largest ratios tell."""
    bones = BONES[:8] + [(L_SHO, L_HIP, WAIST + CHEST), (R_SHO, R_HIP, WAIST + CHEST)]
    bones += [(L_SHO, R_SHO, 2 * SHOULDER_HALF)]
    bones = [(a, b, length) for a, b, length in bones if given[a] and given[b]]
    ratios = [np.linalg.norm(p[b] - p[a]) / length for a, b, length in bones]
    ratios = sorted((r for r in ratios if r > 0), reverse=True)
    return float(np.mean(ratios[:3])) if ratios else 0.0


def complete_torso(p, given, s):
    """Fill missing shoulders and hips of p (J, 2) in place. → the torso's unit up vector, px."""
    groups = (L_SHO, R_SHO), (L_HIP, R_HIP), (L_KNE, R_KNE, L_ANK, R_ANK), range(5)
    shoulders, hips, legs, faces = ([i for i in ids if given[i]] for ids in groups)
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
    pairs = [(L_SHO, R_SHO, SHOULDER_HALF), (L_HIP, R_HIP, HIP_HALF)]
    for a, b, full in (*pairs, (L_EYE, R_EYE, 0), (L_EAR, R_EAR, 0)):
        if given[a] and given[b]:
            seen = (p[a] - p[b]) @ across
            width = float(np.clip(seen / (2 * full * s), -1, 1)) if full else float(np.sign(seen))
            break
    ends = (L_SHO, hips, SHOULDER_HALF, 1), (L_HIP, shoulders, HIP_HALF, -1)
    for left, others, half, rise in ends:
        middle = np.mean(p[others or [left]], 0) + rise * (WAIST + CHEST) * s * up
        for i, twin, sign in ((left, left + 1, 1), (left + 1, left, -1)):
            if not given[i]:
                shift = sign * half * width * s * across
                p[i] = p[twin] + 2 * shift if given[twin] else middle + shift
    return up


def complete_limbs(p, given, s, up):
    """Fill missing elbows, wrists, knees and ankles of p (J, 2) in place."""
    arm, leg = (L_SHO, L_ELB, L_WRI, UPPER_ARM, FOREARM), (L_HIP, L_KNE, L_ANK, THIGH, SHANK)
    for a, b, c, one, two in (arm, leg):
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
    """Turn a standard head to fit the given face joints; fills face, HEAD, TOP, NECK of p and z.

    Grid search over yaw × roll × pitch, shift and size in closed form; without face joints the head
    follows the chest. Returns the head's axes (3, 3) as in `Poses.head` and its size.
    """
    neck = p[[L_SHO, R_SHO]].mean(0)
    p[NECK], z[NECK] = neck, 0.0
    ids = np.flatnonzero(given[:5])  # nose, eyes, ears
    upright = np.degrees(np.arctan2(up[0], -up[1]))
    grid = np.meshgrid(np.arange(-180, 180, 15), np.arange(-60, 61, 15), (-25, 0, 25))
    yaw, roll, pitch = (g.ravel() for g in grid)
    frames = chain(rotation(2, upright + roll), rotation(1, -yaw), rotation(0, pitch))  # (G, 3, 3)
    cost = 0.004 * (1 - np.cos(np.radians(yaw - chest_yaw))) + 1e-6 * roll**2 + 1e-6 * pitch**2
    joints = np.array([FACE[i] for i in ids]).reshape(-1, 3)
    flat = (frames[:, None, :2, :] * joints[None, :, None, :]).sum(-1)  # (G, n, 2) metres
    # Where the neck alone would put the head's middle.
    expected = neck / s + (frames[:, :2, 1] * -SKULL)
    if len(ids):
        seen = p[ids] / s
        a, b = flat - flat.mean(1, keepdims=True), seen - seen.mean(0)
        # The size is drawn towards 1.
        size = np.clip(((a * b).sum((1, 2)) + 0.002) / ((a * a).sum((1, 2)) + 0.002), 0.7, 1.8)
        flat = flat * size[:, None, None]
        # The shift is the mean over the face joints and, more weakly, the neck.
        shift = ((seen - flat).sum(1) + 0.3 * expected) / (len(ids) + 0.3)
        cost = cost + ((seen - flat - shift[:, None]) ** 2).sum((1, 2))
        cost = cost + 0.15 * ((shift - expected) ** 2).sum(1)
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
