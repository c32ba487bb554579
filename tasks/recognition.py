"""Others' models that say what a picture shows, by transformers: where people are, their joints,
and a sentence.

Each takes a hub id or a folder; UserError where it does not load. Legend: n people of a picture ·
boxes are x, y, w, h px of their picture.
"""

import numpy as np
import torch

from plumbing.diffusion import from_folder_or_hub, whole_model
from plumbing.errors import UserError
from tasks.pose_metrics import COCO_SIGMAS, oks


def loaded(kind, name, key):
    """transformers.kind of `name`; `key` is the config key that gave the name."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if kind.endswith("Processor"):  # holds no tensors
        return from_folder_or_hub(name, key, getattr(transformers, kind).from_pretrained)
    return whole_model(name, key, getattr(transformers, kind))


class PoseEstimator:
    """ViTPose of COCO's 17 joints: top-down, a crop per person."""

    def __init__(self, name, key, device):
        self.device = device
        self.model = loaded("VitPoseForPoseEstimation", name, key).to(device).eval()
        self.processor = loaded("AutoImageProcessor", name, key)
        joints = self.model.config.num_labels
        if joints != 17:
            raise UserError(f"{key}={name} has {joints} joints; COCO's 17 are needed")

    @torch.inference_mode()
    def find(self, pictures, boxes):
        """PIL pictures, boxes (n, 4) of each → their joints, (n, 17, 3) each: x, y px and a score.

        All people go through the network as one batch.
        """
        lists = [np.asarray(one, np.float64).reshape(-1, 4).tolist() for one in boxes]
        inputs = self.processor(pictures, boxes=lists, return_tensors="pt").to(self.device)
        if self.model.config.backbone_config.num_experts > 1:  # ViTPose++: expert 0 is COCO's
            people = len(inputs["pixel_values"])
            inputs["dataset_index"] = torch.zeros(people, dtype=torch.long, device=self.device)
        output = self.model(**inputs)
        output.heatmaps = output.heatmaps.float()
        found = self.processor.post_process_pose_estimation(output, boxes=lists)
        return [np.stack([joints_of(person) for person in people]) for people in found]

    def agreement(self, picture, boxes, keypoints, areas):
        """Do generated people keep the pose they were asked for? Not in the paper.

        → OKS (n,) of the poses found in `boxes` (n, 4) with keypoints (n, 17, 3) px; areas (n,).
        0 for a person without joints.
        """
        found = self.find([picture], [boxes])[0][:, :, :2]
        sigmas = np.array(list(COCO_SIGMAS.values()))
        return np.nan_to_num(oks(found, keypoints, np.maximum(areas, 1.0), sigmas))


def joints_of(person):
    return np.concatenate([person["keypoints"].numpy(), person["scores"].numpy()[:, None]], 1)


class Detector:
    """Boxes of people by an object detector that knows a class `person`, e.g. RT-DETR."""

    def __init__(self, name, key, device, threshold):
        self.device, self.threshold = device, threshold
        self.model = loaded("AutoModelForObjectDetection", name, key).to(device).eval()
        self.processor = loaded("AutoImageProcessor", name, key)
        classes = self.model.config.id2label
        self.person = [i for i, label in classes.items() if label.lower() == "person"]
        if not self.person:
            raise UserError(f"{key}={name} knows no class `person` among its {len(classes)}")

    @torch.inference_mode()
    def find(self, pictures):
        """PIL pictures → boxes of each, (n, 5): x, y, w, h within the picture, score; best first.

        n may be 0.
        """
        inputs = self.processor(images=pictures, return_tensors="pt").to(self.device)
        output = self.model(**inputs)
        output.logits, output.pred_boxes = output.logits.float(), output.pred_boxes.float()
        sizes = [picture.size[::-1] for picture in pictures]  # (height, width)
        wanted = dict(threshold=self.threshold, target_sizes=sizes)
        found = self.processor.post_process_object_detection(output, **wanted)
        boxes = []
        for picture, one in zip(pictures, found):
            people = torch.isin(one["labels"].cpu(), torch.tensor(self.person))
            corners, score = one["boxes"].cpu()[people].numpy(), one["scores"].cpu()[people].numpy()
            low = np.clip(corners[:, :2], 0, picture.size)
            size = np.clip(corners[:, 2:], 0, picture.size) - low
            rows = np.concatenate([low, size, score[:, None]], 1)[(size >= 1).all(1)]
            boxes.append(rows[np.argsort(-rows[:, 4], kind="stable")])
        return boxes


class Captioner:
    """A sentence for each picture by an image-to-text model, e.g. BLIP; greedy, so repeatable."""

    def __init__(self, name, key, device):
        self.device = device
        self.model = loaded("AutoModelForImageTextToText", name, key).to(device).eval()
        self.processor = loaded("AutoProcessor", name, key)

    @torch.inference_mode()
    def find(self, pictures):
        inputs = self.processor(images=pictures, return_tensors="pt").to(self.device)
        words = self.model.generate(**inputs, max_new_tokens=30, do_sample=False, num_beams=1)
        texts = self.processor.batch_decode(words, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]
