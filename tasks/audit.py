"""Do generated people keep the pose they were asked for? Not in the paper.

A pose estimator looks for their joints, and OKS says how well the two poses agree.
"""

import numpy as np

from tasks.pose_metrics import COCO_SIGMAS, oks
from tasks.recognition import PoseEstimator


class Auditor:
    """ViTPose `name`, a hub id or a folder, on `device`. UserError where it does not load."""

    def __init__(self, name, device):
        self.estimator = PoseEstimator(name, "audit_model", device)

    def agreement(self, picture, boxes, keypoints, areas):
        """OKS (n,) of the poses found in `boxes` (n, 4) with keypoints (n, 17, 3) px; areas (n,).

        0 for a person without joints.
        """
        found = self.estimator.find([picture], [boxes])[0][:, :, :2]
        sigmas = np.array(list(COCO_SIGMAS.values()))
        return np.nan_to_num(oks(found, keypoints, np.maximum(areas, 1.0), sigmas))
