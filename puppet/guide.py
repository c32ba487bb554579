"""The bare body as a guide for a generator: capsules in one channel, nearer ones brighter.

  guides = draw_guides(turned(poses, 45), (H, W))

Stands where GCL renders a body mesh. Who is drawn, clothes and place leave no trace in it.
Legend: B pictures · s px per metre. Frame: body.py.
"""

import numpy as np

# Names a few to a line; isort would give each its own.
# isort: off
from puppet.body import HEAD, L_ANK, L_ELB, L_HAND, L_HEEL, L_HIP, L_KNE, L_SHO, L_TOE, L_WRI, NECK
from puppet.body import R_HIP, R_SHO, project

# isort: on
from puppet.canvas import Canvas, body_shape, ellipsoid, limb

# Left limbs (right ones follow): ends, radii in metres, and by how much one is drawn as if nearer,
# so that hands rest in front of what they touch. The radii are those of person.py's bare limbs.
LIMBS = [(L_SHO, L_ELB, 0.050, 0.037, 0.02), (L_ELB, L_WRI, 0.037, 0.026, 0.05)]
LIMBS += [(L_WRI, L_HAND, 0.026, 0.034, 0.05), (L_HIP, L_KNE, 0.088, 0.056, -0.03)]
LIMBS += [(L_KNE, L_ANK, 0.055, 0.036, -0.035), (L_HEEL, L_TOE, 0.042, 0.031, -0.03)]
SKULL = (0.075, 0.122, 0.097)  # half-axes: left, down, back
LIGHT = dict(light=np.array([-0.4, -0.5, -0.77], np.float32), ambient=0.45)


def draw_guides(poses, size):
    """Poses → uint8 (B, H, W): 0 where there is no body."""
    xy, ppm = project(poses, size)
    out = np.zeros((len(xy), *size), np.uint8)
    for i in range(len(xy)):
        c = Canvas(np.zeros((1, *size), np.float32), LIGHT)
        draw_body(c, xy[i], ppm[i], poses.points[i, :, 2], poses.head[i])
        out[i] = np.clip(c.image[0] * 255 + 0.5, 0, 255)
    return out


def draw_body(c, xy, ppm, z, head):
    """xy (J, 2) px, ppm (J,) px per metre, z (J,) metres, head (3, 3): far shapes first."""
    trunk = z[[L_SHO, R_SHO, L_HIP, R_HIP]].mean()

    # Nearer is brighter: left and right, before and behind can be told from one channel.
    def grey(depth):
        return np.full(1, np.clip(0.7 - 0.7 * (depth - trunk), 0.35, 1), np.float32)

    shapes = []
    for a, b, ra, rb, nearer in LIMBS:
        for o in (0, 1):  # right joints follow their left twins
            bone, depth = (xy[a + o], xy[b + o], ra, rb), (z[a + o] + z[b + o]) / 2
            shapes.append((depth - nearer, limb, (bone, grey(depth), None, ppm[a + o])))
    neck = (xy[NECK], xy[HEAD], 0.054, 0.05)
    shapes.append(((z[NECK] + z[HEAD]) / 2 - 0.06, limb, (neck, grey(z[NECK]), None, ppm[NECK])))
    shapes.append((trunk, draw_trunk, (xy, (ppm[NECK] + ppm[L_HIP]) / 2, grey(trunk))))
    shapes.append((z[HEAD] - 0.09, draw_skull, (xy[HEAD], head, ppm[HEAD], grey(z[HEAD]))))
    for _, draw, arguments in sorted(shapes, key=lambda shape: -shape[0]):
        draw(c, *arguments)


def draw_trunk(c, xy, s, grey):
    hip = (xy[L_HIP] + xy[R_HIP]) / 2
    capsules = [(xy[L_SHO], xy[R_SHO], 0.065, 0.065, 0), (xy[NECK], hip, 0.12, 0.115, 0)]
    capsules += [(xy[L_HIP], xy[R_HIP], 0.09, 0.09, 0)]
    rows, columns, _, _, d, light = body_shape(c, capsules, s, 0.02)
    c.paint(rows, columns, d, grey[:, None, None] * light, None)


def draw_skull(c, at, frame, s, grey):
    """The face is brighter than the back of the head: where somebody looks is in the guide."""
    rows, columns, d, _, _, front, light = ellipsoid(c, at, frame, SKULL, s)
    if d.size:  # else it is outside
        face = 0.6 + 0.4 * np.clip(4 * front, 0, 1)
        c.paint(rows, columns, d, grey[:, None, None] * light * face, None)
