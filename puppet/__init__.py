"""The offline generator: a kinematic 3-D body, drawn in any clothes from any side, in place of a diffusion model.

Read in this order: figure.py (who is drawn, and the way of one picture), body.py (joints, limits,
sampled poses, camera), lift.py (real 2-D poses made drawable), canvas.py and person.py (shapes and
what they are made of), scene.py (places and cameras' faults), people_set.py (people seen by several
cameras, in the layout of the ReID, attribute and caption sets).
"""

from puppet.body import PARTS, J, Poses, project, sample_poses, take
from puppet.figure import Identities, attributes, render, sample_identities, sentence
from puppet.lift import LSP_JOINTS, lsp_to_coco, poses_from_keypoints
from puppet.scene import Scenes, sample_scenes

__all__ = ["PARTS", "J", "Poses", "take", "sample_poses", "project"]
__all__ += ["LSP_JOINTS", "lsp_to_coco", "poses_from_keypoints"]
__all__ += ["Identities", "sample_identities", "attributes", "sentence", "Scenes", "sample_scenes", "render"]
