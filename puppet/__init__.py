"""The offline generator: a kinematic 3-D body, drawn in any clothes from any side.

It stands where a pose-conditioned diffusion model stands in Stage 1: one pose, many people, clothes
and places. Read in this order: pose_set.py (the pictures of a pose, as generate.py wants them),
figure.py (who is drawn, and the way of one picture), body.py (joints, limits, sampled poses,
camera), lift.py (real 2-D poses made drawable), canvas.py and person.py (shapes, and what they are
made of), scene.py (places, and a camera's faults), guide.py (the bare body), people_set.py (people
seen by several cameras, in the layout of the ReID, attribute and caption sets).
"""

from puppet import people_set, pose_set
from puppet.body import Poses, project, sample_poses, take
from puppet.figure import attributes, render, sample_identities, sentence
from puppet.lift import coco17, lsp_to_coco, poses_from_keypoints
from puppet.scene import sample_scenes

KEYS = pose_set.KEYS | people_set.KEYS  # of generate.py

__all__ = ["KEYS", "people_set", "pose_set", "Poses", "take", "sample_poses", "project", "coco17"]
__all__ += ["lsp_to_coco", "poses_from_keypoints", "sample_scenes", "sample_identities"]
__all__ += ["attributes", "sentence", "render"]
