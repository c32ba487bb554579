"""Bodies in space for liftedcl.py: a tree of 17 joints, samples of it from the puppet, the error of
a skeleton after alignment, skeletons drawn from two sides.

Legend: B bodies · a skeleton is (17, 3): x right, y down, z away from the camera.
"""

import numpy as np
import torch
from PIL import Image

import puppet
from drawing.grids import PAPER, sheet
from drawing.skeletons import overlay
from drawing.training import two_a_row
from plumbing.seeds import PRIOR, rng_of, seed_of
from puppet import body

# Human3.6M's 17 joints in the order of LiftedCL's release, which the puppet's joints give.
JOINTS = (
    "root right_hip right_knee right_ankle left_hip left_knee left_ankle belly neck nose head "
    "left_shoulder left_elbow left_wrist right_shoulder right_elbow right_wrist"
).split()
LEGS = [body.R_HIP, body.R_KNE, body.R_ANK, body.L_HIP, body.L_KNE, body.L_ANK]
ABOVE = [body.NECK, body.NOSE, body.TOP, body.L_SHO, body.L_ELB, body.L_WRI]
ABOVE += [body.R_SHO, body.R_ELB, body.R_WRI]
# The 16 bones of the tree, (parent, child); parents come before their children.
BONES = [(0, 1), (1, 2), (2, 3), (0, 4), (4, 5), (5, 6), (0, 7), (7, 8), (8, 9), (9, 10)]
BONES += [(8, 11), (11, 12), (12, 13), (8, 14), (14, 15), (15, 16)]


# ------------------------------------------------------------------------------------------ samples


def skeletons_of(poses):
    """puppet.Poses, as sampled → (B, 17, 3) float64 in metres."""
    points = poses.points
    root = points[:, [body.L_HIP, body.R_HIP]].mean(1)
    # The spine bends at the belly, down the chest from the neck. The shoulders tell the stature.
    width = np.linalg.norm(points[:, body.L_SHO] - points[:, body.R_SHO], axis=1)
    chest = body.CHEST * width / (2 * body.SHOULDER_HALF)
    belly = points[:, body.NECK] + chest[:, None] * poses.chest[:, 1]
    parts = [root[:, None], points[:, LEGS], belly[:, None], points[:, ABOVE]]
    return np.concatenate(parts, 1)


def unit(skeletons):
    """(B, 17, 3) tensor → the same with its root at 0 and a Frobenius norm of 1 [LiftedCL]."""
    skeletons = skeletons - skeletons[:, :1]
    return skeletons / skeletons.norm(dim=(1, 2), keepdim=True)


def draw_bodies(number, spread, seed):
    """The discriminator's real samples: bodies of no picture, of any yaw. → (number, 17, 3) unit.

    spread: standard deviation of the logarithm of a bone's length, alike on both sides of a body.
    """
    plain = skeletons_of(puppet.sample_poses(seed_of(PRIOR, seed, 0), range(number)))
    names = [name.split("_")[-1] for name in JOINTS]  # left and right have the same
    kinds = list(dict.fromkeys(names))
    noise = rng_of(PRIOR, seed, 1).standard_normal((number, len(kinds), 1))
    factor, varied = np.exp(spread * noise), np.zeros_like(plain)
    for parent, child in BONES:
        bone = plain[:, child] - plain[:, parent]
        varied[:, child] = varied[:, parent] + bone * factor[:, kinds.index(names[child])]
    return unit(torch.from_numpy(varied)).float()


def render_people(number, size, seed):
    """People of no training set. → pictures uint8 (number, 3, H, W), true skeletons in metres."""
    keys = range(number)
    poses = puppet.sample_poses(seed_of(PRIOR, seed, 2), keys)
    persons = puppet.sample_identities(seed_of(PRIOR, seed, 3), keys)
    scenes = puppet.sample_scenes(seed_of(PRIOR, seed, 4), keys)
    pictures = torch.from_numpy(puppet.render(poses, persons, scenes, size)["image"])
    return pictures.permute(0, 3, 1, 2), torch.from_numpy(skeletons_of(poses))


# ---------------------------------------------------------------------------------------- alignment


def aligned(found, truth):
    """found (B, 17, 3) turned, scaled and moved, but not mirrored, onto truth: least squares, in
    closed form [Umeyama 1991]."""
    a, b = found - found.mean(1, keepdim=True), truth - truth.mean(1, keepdim=True)
    u, s, v = torch.linalg.svd(a.transpose(1, 2) @ b)
    sign = torch.ones_like(s)
    sign[:, 2] = torch.det(u @ v).sign()  # where a mirror image would fit better
    scale = (s * sign).sum(1) / a.square().sum((1, 2)).clamp(min=1e-12)
    return scale[:, None, None] * (a @ (u * sign[:, None]) @ v) + truth.mean(1, keepdim=True)


def aligned_error(found, truth):
    """PA-MPJPE: mean distance of the joints after alignment, in truth's unit. → (B,)"""
    return (aligned(found, truth) - truth).norm(dim=2).mean(1)


def mean_skeleton(skeletons, rounds=10):
    """(B, 17, 3) → (1, 17, 3) unit: all are turned onto the mean, whose mean is the next one.

    The plain mean over all yaws would be a stick.
    """
    mean = skeletons[:1]
    for _ in range(rounds):
        mean = unit(aligned(skeletons, mean.expand_as(skeletons)).mean(0, keepdim=True))
    return mean


def bone_error(found, real):
    """How far bones are from a body's: mean over the bones of |l − m| / m, l their lengths in found
    (B, 17, 3), m the mean lengths in real (n, 17, 3), both unit. → (B,)"""
    parent, child = torch.tensor(BONES).T
    length, usual = ((x[:, parent] - x[:, child]).norm(dim=2) for x in (found, real))
    usual = usual.mean(0)
    return ((length - usual).abs() / usual).mean(1)


def measure(found, truth, real, drawn):
    """Lifted skeletons (B, 17, 3) against the true ones, in metres, and three that know nothing of
    the picture; drawn (B, 17, 3): bodies of the sampler, which a lifter gives at best that fools
    the discriminator and does not look. → dict of means, mm and shares; errors (B,) in mm.
    """
    found, mean = unit(found), mean_skeleton(real).expand_as(truth)
    of = dict(mpjpe=found, mpjpe_dealt=found.roll(1, 0), mpjpe_any=drawn, mpjpe_mean=mean)
    figures = {name: 1000 * aligned_error(one, truth) for name, one in of.items()}
    each = figures["mpjpe"]
    figures |= dict(bones=bone_error(found, real), bones_any=bone_error(drawn, real))
    return {name: values.mean().item() for name, values in figures.items()}, each


TOLD = (
    "  lifter {mpjpe:.1f} mm; its skeletons dealt to other pictures {mpjpe_dealt:.1f} mm, any body "
    "{mpjpe_any:.1f} mm, mean skeleton {mpjpe_mean:.1f} mm\n"
    "a bone's length is off the mean body's by {bones:.1%}, any body's by {bones_any:.1%}"
)


# ------------------------------------------------------------------------------------------ drawing


def skeleton_sheet(pictures, found, truth, errors, path):
    """Two people a row: picture, lifted skeleton from two sides, true one from two sides.

    Both skeletons are shown as they are, not aligned. errors: of each person in mm.
    """
    cells = []
    for picture, *pair in zip(pictures, unit(found), unit(truth)):
        cells.append([picture] + [view for one in pair for view in two_sides(one)])
    heads = ["picture", "lifted, from the camera", "from its right", "true, from the camera"]
    heads = [*heads, "from its right"] * 2
    half = (len(errors) + 1) // 2
    texts = [f"{error:.0f} mm" for error in errors.tolist()]
    labels = ["\n".join(texts[i::half]) for i in range(half)]  # of the left, of the right person
    title = "Skeletons as they were lifted, before alignment; error after it"
    sheet(two_a_row(cells), path, labels, heads, title, (96, 192, 80))


def two_sides(skeleton, size=(192, 384)):
    """A unit skeleton (17, 3) → pictures of it from the camera and from the camera's right."""
    x, y, z = (skeleton.amax(0) - skeleton.amin(0)).tolist()
    scale = 0.9 * min(450, size[0] / max(x, z), size[1] / y)  # px; who stands is about .7 tall
    views = []
    for across in (0, 2):
        xy = skeleton[:, [across, 1]]
        middle = (xy.amin(0) + xy.amax(0)) / 2
        xy = (xy - middle) * scale + torch.tensor(size) / 2
        points = torch.cat([xy, torch.ones_like(xy[:, :1])], 1).numpy()
        views.append(overlay(Image.new("RGB", size, PAPER), points, BONES, JOINTS))
    return views
