"""Do generated people keep the pose they were asked for? Not in the paper.

A pose estimator (ViTPose, by transformers) looks for their joints, and OKS says how well the two
poses agree. Legend: n people of one picture (joints are always COCO's 17); px throughout.
"""

import numpy as np
import torch

from plumbing.diffusion import from_folder_or_hub
from plumbing.errors import UserError
from tasks.pose_metrics import COCO_SIGMAS, oks


class Auditor:
    """ViTPose `name`, a hub id or a folder, on `device`. UserError where it does not load."""

    def __init__(self, name, device):
        import transformers

        self.device = device
        load = transformers.VitPoseForPoseEstimation.from_pretrained
        self.model = from_folder_or_hub(name, "audit_model", load).to(device).eval()
        load = transformers.AutoImageProcessor.from_pretrained
        self.processor = from_folder_or_hub(name, "audit_model", load)
        joints = self.model.config.num_labels
        if joints != 17:
            raise UserError(f"audit_model={name} has {joints} joints; COCO's 17 are needed")

    @torch.inference_mode()
    def measure(self, picture, boxes):
        """boxes (n, 4) x y w h of `picture` → joints (n, 17, 2)."""
        inputs = self.processor(picture, boxes=[boxes.tolist()], return_tensors="pt")
        inputs = inputs.to(self.device)
        if self.model.config.backbone_config.num_experts > 1:  # ViTPose++: expert 0 is COCO's
            inputs["dataset_index"] = torch.zeros(len(boxes), dtype=torch.long, device=self.device)
        found = self.processor.post_process_pose_estimation(self.model(**inputs), boxes=[boxes])
        return np.stack([person["keypoints"].numpy() for person in found[0]])

    def agreement(self, picture, boxes, keypoints, areas):
        """OKS (n,) of the found poses with keypoints (n, 17, 3); 0 for a person without joints."""
        found, sigmas = self.measure(picture, boxes), np.array(list(COCO_SIGMAS.values()))
        return np.nan_to_num(oks(found, keypoints, np.maximum(areas, 1.0), sigmas))
