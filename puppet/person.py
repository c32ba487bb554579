"""One person in clothes: body parts as shapes, far ones first, each at its own joints.

Legend: c a Canvas · s px per metre, lengths in metres · o = 0 left, 1 right · left, down, back: px
per metre along the body's own axes.
"""

from typing import NamedTuple

import numpy as np

# Names a few to a line; isort would give each its own.
# isort: off
from puppet.body import CHEST, HIP_HALF, SHOULDER_HALF, THIGH, UPPER_ARM, WAIST
from puppet.body import HEAD, L_EAR, L_ELB, L_EYE, L_HAND, L_SHO, L_WRI, NECK, NOSE
from puppet.body import R_EAR, R_ELB, R_EYE, R_SHO, R_WRI
from puppet.body import L_ANK, L_HEEL, L_HIP, L_KNE, L_TOE, R_ANK, R_HIP, R_KNE

# isort: on
from puppet.canvas import body_shape, cloth, ellipsoid, limb, mixed

WHITE, DARK = np.array((0.93, 0.92, 0.90), np.float32), np.array((0.07, 0.06, 0.05), np.float32)
LIP = np.array((0.62, 0.20, 0.20), np.float32)


class Body(NamedTuple):
    """One drawn person: xy (J, 2) px, ppm (J,) px per metre, z (J,) m, axes as rows, person p."""

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
        origin = p["texture"][:2] if which == "upper" else p["texture"][1:]
        return *colours, p["period"], origin, p[which] in knit

    @property
    def hip(self):
        return (self.xy[L_HIP] + self.xy[R_HIP]) / 2


def draw_head(c, body):
    """Skull with face, then eyes and ears at their joints, then hair and hat around the skull."""
    xy, s, frame, p = body.xy, body.ppm[HEAD], body.head, body.p
    at = lambda up, front: xy[HEAD] - (up * frame[1, :2] + front * frame[2, :2]) * s  # noqa: E731
    wide = 0.073 if p["female"] else 0.077
    semi = (wide, 0.122, 0.097)
    rows, columns, d, left, up, front, light = ellipsoid(c, at(0.012, 0.008), frame, semi, s)
    if not d.size:  # the skull is outside, and all the rest with it
        return
    px = np.float32(0.09 * s)  # px per unit of the sphere, for soft edges
    # Darker under the chin.
    face = mixed(p["skin"], p["skin"] * np.float32(0.8), np.clip(-0.9 * up, 0, 1))
    if p["beard"]:
        beard = np.clip((-0.42 - up + 0.25 * np.abs(left)) * px + 0.5, 0, 1) * (front > 0)
        face = mixed(face, p["hair_rgb"], 0.75 * beard)
    lips = 0.5 + (1 - np.hypot(left / 0.3, (up + 0.55) / 0.085)) * 0.085 * px
    lips = np.clip(lips, 0, 1) * (front > 0.1)
    face = mixed(face, LIP, lips * (0.75 if p["female"] else 0.5))
    nose = np.clip(1 - np.hypot(left / 0.14, (up + 0.2) / 0.2), 0, 1) * (front > 0)
    c.paint(rows, columns, d, face * (light * (1 - 0.18 * nose)), 1)
    for side, eye, ear in ((1, L_EYE, L_EAR), (-1, R_EYE, R_EAR)):
        if side * frame[0, 2] < 0.35 and p["hair"] != "long":
            drop = frame[1, :2] * 0.014 * s
            skin = p["skin"] * np.float32(0.93)
            limb(c, (xy[ear] - drop, xy[ear] + drop, 0.018, 0.014), skin, 1, s)
        if 0.95 * frame[2, 2] - side * 0.3 * frame[0, 2] > 0.12:  # this eye looks at us
            draw_eye(c, xy[eye], (frame[0, :2] * s, -frame[1, :2] * s), side, p, s)
    if p["hair"] != "bald":
        semi = (wide + 0.012, 0.13, 0.108)
        rows, columns, d, left, up, front, light = ellipsoid(c, at(0.02, 0), frame, semi, s)
        nape = 1.2 * np.maximum(0, -0.15 - up)
        back = 0.28 - front if p["hair"] == "long" else -0.02 - nape - front
        hairy = np.maximum(up - 0.55 + 0.12 * np.abs(left), back)
        c.paint(rows, columns, np.maximum(d, -hairy * px), p["hair_rgb"][:, None, None] * light, 1)
    if p["hat"] != "none":
        semi = (wide + 0.02, 0.135, 0.115)
        rows, columns, d, _, up, _, light = ellipsoid(c, at(0.025, 0), frame, semi, s)
        band = 1 - 0.2 * np.clip((0.42 - up) * 9, 0, 1)
        hat = p["hat_rgb"][:, None, None] * (light * band)
        c.paint(rows, columns, np.maximum(d, (0.3 - up) * px), hat, 1)
    if p["hat"] in ("cap", "sun hat"):  # brim
        reach, semi = 0, (0.19, 0.016, 0.19)
        if p["hat"] == "cap":
            reach, semi = 0.125, (0.07, 0.012, 0.085)
        rows, columns, d, *_, light = ellipsoid(c, at(0.062, reach), frame, semi, s)
        c.paint(rows, columns, d, p["hat_rgb"][:, None, None] * (light * 0.85), 1)


def draw_eye(c, at, axes, side, p, s):
    """Eye, brow or glasses at one eye joint. axes: left, up, px per metre of the head."""
    left, up = axes
    if p["glasses"] == "none":
        brow = p["hair_rgb"] * np.float32(0.6)
        limb(c, (at - left * 0.010, at + left * 0.010, 0.009, 0.009), WHITE, 1, s)
        over = at + up * 0.022
        limb(c, (over - left * 0.016, over + left * 0.016, 0.006, 0.006), brow, 1, s)
    else:
        glass = DARK if p["glasses"] == "sunglasses" else DARK + p["skin"] * np.float32(0.55)
        limb(c, (at - left * 0.016, at + left * 0.016, 0.02, 0.02), glass, 1, s)
        limb(c, (at, at - left * side * 0.03, 0.006, 0.006), DARK, 1, s)  # bridge
    if p["glasses"] != "sunglasses":
        limb(c, (at, at, 0.0085, 0.0085), DARK, 1, s)


def torso_shapes(body, s):
    """Capsules (a, b px; ra, rb, bump m) whose smooth union is the clothed trunk."""
    xy, p, hip, neck = body.xy, body.p, body.hip, body.xy[NECK]
    f, stout, air = float(p["female"]), p["stout"], p["loose"] * 0.7
    mid = lambda a, b, t: a + (b - a) * t  # noqa: E731
    front, left = -body.chest[2, :2] * s, body.chest[0, :2] * s
    shoulders = [mid(neck, xy[i], 0.8) for i in (L_SHO, R_SHO)]
    hips = [mid(hip, xy[i], 0.72) for i in (L_HIP, R_HIP)]
    shapes = [(mid(neck, xy[HEAD], 0.3), x, 0.045, 0.055, 0) for x in shoulders]
    r_chest, r_hip = (0.072 - 0.006 * f) * stout + air, (0.078 + 0.006 * f) * stout + air
    waist = -0.004 - 0.012 * f
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
    rows, columns, x, y, d, light = body_shape(c, torso_shapes(body, s), s)
    axis = body.hip - neck
    length = max(np.hypot(*axis), 0.12 * s)
    ax, ay = axis / max(np.hypot(*axis), 1e-3)
    dx, dy, px = x - np.float32(neck[0]), y - np.float32(neck[1]), np.float32(s)
    along = (dx * np.float32(ax) + dy * np.float32(ay)) * np.float32((WAIST + CHEST) / length)
    # Positive: the person's left when he faces us.
    across = (dx * np.float32(ay) - dy * np.float32(ax)) / px
    # Where the middle of the chest is seen.
    off = np.float32(0.1 * (body.chest[2, 1] * ax - body.chest[2, 0] * ay))
    line = across - off
    rgb = cloth(along, across - 1.5 * off, body.garment("upper"), s)
    if facing > 0.15:
        if p["open_front"]:
            opening = np.clip(0.5 + (0.035 + 0.05 * along - np.abs(line)) * px, 0, 1)
            rgb = mixed(rgb, p["inner_rgb"], opening)
        elif p["upper"] in ("shirt", "jacket", "coat"):  # buttons, zip
            rgb = rgb * (1 - 0.3 * np.clip(0.5 + (0.006 - np.abs(line)) * px, 0, 1))
        if p["upper_pattern"] == "logo":
            logo = 0.5 + (1 - np.hypot(line / 0.075, (along - 0.17) / 0.06)) * 0.065 * px
            logo = np.clip(logo, 0, 1)
            rgb = mixed(rgb, p["upper_second_rgb"], logo * (0.6 + 0.4 * (np.sin(along * 150) > 0)))
        if p["upper"] not in ("hoodie", "coat"):  # neckline
            deep = 0.075 if p["female"] else 0.055
            bare = 0.5 + (1 - np.hypot(line / 0.06, (along + 0.01) / deep)) * 0.06 * px
            bare = np.clip(bare, 0, 1)
            rgb = mixed(rgb, p["skin"], bare)
    hem, soft = np.float32(0.42 if p["tucked"] else 0.53), np.float32(length / (WAIST + CHEST))
    below = np.clip(0.5 + (along - hem) * soft, 0, 1)
    belt = 0.5 + (0.018 - np.abs(along - hem - np.float32(0.015))) * soft
    belt = np.clip(belt, 0, 1) * p["tucked"]
    lower = cloth(along, across, body.garment("lower"), s) * (1 - 0.35 * belt)
    c.paint(rows, columns, d, mixed(rgb, lower, below) * light, 2)


def draw_skirt(c, body, garment, reach):
    """Skirt, or a coat's: hips to `reach` (1 = knee, 2 = ankle), filled between the legs."""
    xy, s, hip, loose = body.xy, body.ppm[L_HIP], body.hip, body.p["loose"]
    shapes, ends = [], []
    for o in (0, 1):
        a = hip + (xy[L_HIP + o] - hip) * 0.72
        b = xy[L_HIP + o] + (xy[L_KNE + o] - xy[L_HIP + o]) * min(reach, 1)
        shapes.append((a, b, 0.092 * body.p["stout"], 0.105 + loose, 0))
        ends.append(b + (xy[L_ANK + o] - b) * max(reach - 1, 0))
        shapes.append((b, ends[o], 0.105 + loose, 0.11 + loose, 0))
    left, right, middle = shapes[0][1], shapes[2][1], (ends[0] + ends[1]) / 2
    shapes += [(hip, middle, 0.095, 0.1, 0), (*ends, 0.09, 0.09, 0)]  # no gap between the legs
    shapes += [(left, right, 0.1, 0.1, 0), ((left + hip) / 2, (right + hip) / 2, 0.1, 0.1, 0)]
    rows, columns, x, y, d, light = body_shape(c, shapes, s)
    axis, px = middle - hip, np.float32(s)
    length = max(np.hypot(*axis), 1e-3)
    ax, ay = np.float32(axis / length)
    dx, dy = x - np.float32(hip[0]), y - np.float32(hip[1])
    along, across = (dx * ax + dy * ay) / px, (dx * ay - dy * ax) / px
    below_hem = (along - np.float32(length / s + 0.07)) * px  # cut straight
    pleats = 1 + 0.1 * np.sin(across * 75 / (1 + np.maximum(along, 0)))
    (mx, my), (wx, wy) = np.float32(axis / 2), np.float32(ends[0] - ends[1])
    part = np.where((dx - mx) * wx + (dy - my) * wy > 0, 5, 6).astype(np.uint8)  # each leg's half
    rgb = cloth(along, across, garment, s) * (light * pleats)
    c.paint(rows, columns, np.maximum(d, below_hem), rgb, part)


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
        limb(c, (heel + drop, toe + drop, 0.038, 0.032), sole, part, s)
        limb(c, (ankle, (heel + ankle) / 2, 0.036, 0.04), p["shoes_rgb"], part, s)
        limb(c, (heel, toe, 0.042, 0.031), p["shoes_rgb"], part, s)
        calf = 0.009 if air == 0 else 0.003
        ra, rb = 0.055 * stout + air, 0.034 + air * 1.2
        limb(c, (knee, ankle, ra, rb, calf), colour, part, s, (THIGH, 1.0))
        return
    top, s = hip + (body.hip - hip) * 0.12, (ppm[L_HIP + o] + ppm[L_KNE + o]) / 2
    limb(c, (top, knee, 0.088 * stout + air, 0.056 * stout + air), colour, part, s)
    if p["lower"] == "shorts":
        shorts = body.garment("lower")
        bone = (top, knee, 0.095 * stout + 0.01, 0.082 * stout + 0.012)
        limb(c, bone, shorts, part, s, (0.0, 0.62))


def draw_arm(c, body, o, lower_half):
    """Upper arm, or forearm and hand, of one arm; o = 0 left, 1 right. Radii in metres."""
    xy, ppm, p, part = body.xy, body.ppm, body.p, 3 + o
    shoulder, elbow, wrist, hand = (xy[i + o] for i in (L_SHO, L_ELB, L_WRI, L_HAND))
    stout, sleeve = p["stout"] * (0.92 if p["female"] else 1), body.garment("upper")
    long = p["sleeves"] == "long"
    air = 0.004 + p["loose"] * 0.6
    under, colour = air * long, sleeve if long else p["skin"]
    s = (ppm[L_ELB + o] + ppm[(L_WRI if lower_half else L_SHO) + o]) / 2
    if lower_half:
        limb(c, (wrist, wrist + (hand - wrist) * 0.85, 0.026, 0.034, 0.008), p["skin"], part, s)
        ra, rb = 0.037 * stout + under, 0.026 + under
        limb(c, (elbow, wrist, ra, rb, 0.004), colour, part, s, (UPPER_ARM, 1.0))
        return
    top = shoulder + (xy[NECK] - shoulder) * 0.06
    limb(c, (top, elbow, 0.05 * stout + under, 0.037 * stout + under), colour, part, s)
    if not long:
        bone = (top, elbow, 0.058 * stout + air, 0.05 * stout + air * 1.5)
        limb(c, bone, sleeve, part, s, (0.0, 0.5))


def draw_person(c, body):
    """All shapes of one person, far ones first: (depth in metres, function, arguments)."""
    xy, z, p, s = body.xy, body.z, body.p, body.ppm[NECK]
    trunk, neck = z[[L_SHO, R_SHO, L_HIP, R_HIP]].mean(), xy[NECK]
    left2, down2, back2 = body.chest[:, :2] * s  # px per metre along the chest's axes
    shapes = [(trunk, draw_torso, body), (z[HEAD] - 0.09, draw_head, body)]
    add = lambda *shape: shapes.append(shape)  # noqa: E731
    behind = 0.16 if body.chest[2, 2] < 0 else 0.0  # clothes reach higher at the back of the neck
    throat, up = neck + (xy[HEAD] - neck) * (0.2 + behind), (xy[HEAD] - neck) * 0.12
    zn = (z[NECK] + z[HEAD]) / 2 - 0.06
    skin, collar = p["skin"] * np.float32(0.86), p["upper_rgb"] * np.float32(0.8)
    add(zn, limb, (throat, xy[HEAD], 0.054 - 0.008 * p["female"], 0.05), skin, 1, s)
    if p["upper"] in ("shirt", "jacket", "coat", "hoodie"):
        add(zn - 0.001, limb, (throat, throat + up, 0.06, 0.062), collar, 2, s)
    # A shade behind the shirt that hangs over them.
    thighs = [(z[L_HIP + o] + z[L_KNE + o]) / 2 + 0.03 for o in (0, 1)]
    # Hands rest in front of what they touch.
    fores = [(z[L_ELB + o] + z[L_WRI + o]) / 2 - 0.05 for o in (0, 1)]
    for o in (0, 1):
        add(thighs[o], draw_leg, body, o, False)
        add((z[L_KNE + o] + z[L_ANK + o]) / 2 + 0.035, draw_leg, body, o, True)
        add((z[L_SHO + o] + z[L_ELB + o]) / 2 - 0.02, draw_arm, body, o, False)
        add(fores[o], draw_arm, body, o, True)
    if p["lower"] == "skirt":
        reach = 1.55 if p["lower_long"] else 0.8
        add(min(thighs) - 0.001, draw_skirt, body, body.garment("lower"), reach)
    if p["upper"] == "coat":
        add(min(*thighs, trunk) - 0.002, draw_skirt, body, body.garment("upper"), 0.75)
    # Hangs behind the head: hidden by the body from the front, over the back from behind.
    if p["hair"] == "long":
        nape = xy[HEAD] + (body.head[2, :2] * 0.035 - body.head[1, :2] * 0.03) * s
        tip = neck + back2 * 0.09 + down2 * (0.02 + 0.12 * p["mane"])
        depth, hair = z[HEAD] + 0.12 * body.head[2, 2], p["hair_rgb"] * np.float32(0.92)
        add(depth, limb, (nape, tip, 0.088, 0.075), hair, 1, s)
    draw_bags(add, body, trunk, fores, (left2, down2, back2))
    for _, shape, *arguments in sorted(shapes, key=lambda item: -item[0]):
        shape(c, *arguments)


def draw_bags(add, body, trunk, fores, axes):
    """Backpack, shoulder bag or handbag: add their shapes. axes: px per metre."""
    left2, down2, back2 = axes
    xy, z, p, s, neck, hip = body.xy, body.z, body.p, body.ppm[NECK], body.xy[NECK], body.hip
    rgb, away = p["bag_rgb"], body.chest[2, 2]  # away > 0: the back is on the far side
    strap, pocket = rgb * np.float32(0.7), rgb * np.float32(0.78)
    if p["backpack"]:
        a, b = neck + (hip - neck) * 0.2 + back2 * 0.15, neck + (hip - neck) * 0.8 + back2 * 0.16
        r = 0.085 + 0.06 * abs(away)  # broad from behind, flat from the side
        add(trunk + 0.2 * away - 0.03, limb, (a, b, r * 0.85, r), rgb, 2, s)
        low = a + (b - a) * 0.6 + back2 * 0.05, b + back2 * 0.05
        add(trunk + 0.21 * away - 0.031, limb, (*low, r * 0.5, r * 0.6), pocket, 2, s)
        for i, j in ((L_SHO, L_HIP), (R_SHO, R_HIP)) if away > 0 else ():
            top = neck + (xy[i] - neck) * 0.6
            ends = top - down2 * 0.05, top + (xy[j] - top) * 0.5
            add(trunk - 0.01, limb, (*ends, 0.018, 0.016), pocket, 2, s)
    o, side = (0, 1) if p["bag_left"] else (1, -1)
    if p["bag"] == "shoulder bag":
        at = xy[L_HIP + o] + side * left2 * 0.09
        top = neck + (xy[R_SHO - o] - neck) * 0.5 - down2 * 0.04
        add(trunk - 0.01, limb, (top, at, 0.014, 0.012), strap, 2, s)
        depth = z[L_HIP + o] + 0.1 * side * body.chest[0, 2] - 0.045
        ends = at - back2 * 0.06, at + back2 * 0.06 + down2 * 0.1
        add(depth, limb, (*ends, 0.075, 0.085), rgb, 2, s)
    if p["bag"] == "handbag":  # hangs straight down
        at = xy[L_HAND + o]
        x, y = np.array([0.06, 0.0]) * s, np.array([0.0, 0.2]) * s
        add(fores[o] + 0.001, limb, (at, at + 0.6 * y, 0.012, 0.03), strap, 2, s)
        add(fores[o] + 0.0009, limb, (at + y - x, at + y + x, 0.085, 0.085), rgb, 2, s)


# Which parts may be on top of a joint that is visible: its own and the ones it joins.
OWN = dict.fromkeys(range(5), (1,)) | {L_SHO: (2, 3), R_SHO: (2, 4), L_HIP: (2, 5), R_HIP: (2, 6)}
OWN |= {L_ELB: (3,), L_WRI: (3,), R_ELB: (4,), R_WRI: (4,)}
OWN |= {L_KNE: (5,), L_ANK: (5,), R_KNE: (6,), R_ANK: (6,)}
# Where a face's joint looks: left, front.
LOOKS = {NOSE: (0, 1), L_EYE: (0.45, 0.9), R_EYE: (-0.45, 0.9), L_EAR: (1, 0.1), R_EAR: (-1, 0.1)}


def visibility(c, xy, z, head, given):
    """(17,) 2 visible; 1 behind the own body or an occluder, or completed by us; 0 outside."""
    v = np.zeros(17, np.float32)
    for j in range(17):
        x, y = xy[j]
        if not (-0.5 <= x < c.W - 0.5 and -0.5 <= y < c.H - 0.5):
            continue
        seen = c.parts[int(y + 0.5), int(x + 0.5)] in OWN[j]
        if j in LOOKS:
            left, front = LOOKS[j]
            seen &= -(left * head[0, 2] - front * head[2, 2]) > -0.05
        elif j in (L_SHO, R_SHO):  # the far side of a body seen from the side is behind it
            seen &= z[j] - z[[L_SHO, R_SHO]].mean() < 0.75 * SHOULDER_HALF
        elif j in (L_HIP, R_HIP):
            seen &= z[j] - z[[L_HIP, R_HIP]].mean() < 0.75 * HIP_HALF
        v[j] = 2 if seen and given[j] else 1
    return v
