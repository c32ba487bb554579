"""Names of joints: COCO's seventeen, other spellings of them, left and right."""

import re

import numpy as np

from plumbing.errors import and_more

COCO_JOINTS = (
    "nose left_eye right_eye left_ear right_ear left_shoulder right_shoulder left_elbow "
    "right_elbow left_wrist right_wrist left_hip right_hip left_knee right_knee left_ankle "
    "right_ankle"
).split()
COCO_LINKS = (  # 1-based, as in COCO's own files
    "16-14 14-12 17-15 15-13 12-13 6-12 7-13 6-7 6-8 7-9 8-10 9-11 2-3 1-2 1-3 2-4 3-5 4-6 5-7"
).split()
COCO_CATEGORY = dict(id=1, name="person", supercategory="person", keypoints=COCO_JOINTS)
COCO_CATEGORY["skeleton"] = [[int(joint) for joint in link.split("-")] for link in COCO_LINKS]

LSP_JOINTS = (
    "right_ankle right_knee right_hip left_hip left_knee left_ankle right_wrist right_elbow "
    "right_shoulder left_shoulder left_elbow left_wrist neck head_top"
).split()

SIDE, LIMB_JOINT = "(left|right|l|r)", "(eye|ear|shoulder|elbow|wrist|hip|knee|ankle)"


def joint_name(name):
    """A joint's name in COCO's spelling: "leftShoulder", "LShoulder", "Lshoulder", "l_shoulder",
    "Left Shoulder" and "shoulder_left" are "left_shoulder". Others: lower case, underscores."""
    name = re.sub("(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    name = re.sub(r"[\W_]+", "_", name.lower()).strip("_")
    found = re.fullmatch(f"{SIDE}_?{LIMB_JOINT}|{LIMB_JOINT}_?{SIDE}", name)
    if not found:
        return name
    side, joint = found[1] or found[4], found[2] or found[3]
    return {"l": "left", "r": "right"}[side[0]] + "_" + joint


def other_joints(joints):
    """For a message: " (not COCO's: neck, head_top)", or nothing where all names are COCO's."""
    others = [name for name in joints if name not in COCO_JOINTS]
    return f" (not COCO's: {', '.join(others[:3])}{and_more(others, 3)})" if others else ""


def flip_ids(joints):
    """Joint ids after a mirror: "left_x" ↔ "right_x", else "l_x" ↔ "r_x" or "x_l" ↔ "x_r"."""
    swap, ids = {"left": "right", "right": "left", "l": "r", "r": "l"}, []
    for i, name in enumerate(joints):
        other = i  # of a joint without a side
        for side in ("left|right", "^[lr]", "[lr]$"):
            mirrored = re.sub(side, lambda found: swap[found[0]], name)
            if mirrored != name and mirrored in joints:
                other = joints.index(mirrored)
                break
        ids.append(other)
    return ids


def to_coco17(keypoints, joints):
    """(N, K, 3) of any joint set → (N, 17, 3) by joint name; what it lacks is zero."""
    if list(joints) == COCO_JOINTS:
        return keypoints
    out = np.zeros((len(keypoints), 17, 3), np.float32)
    for j, name in enumerate(COCO_JOINTS):
        if name in joints:
            out[:, j] = keypoints[:, joints.index(name)]
    return out
