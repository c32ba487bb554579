"""Pose-conditioned diffusion for Stage 1: load the pipeline, paint whole pictures, crop their people, measure them.

Stable Diffusion with a T2I-Adapter [paper] or a ControlNet, by diffusers. generate.py hands over source pictures as
Scenes, a chunk at a time, and gets crops with their annotations back:

    pipe = load_painter(cfg, device)        auditor = Auditor(cfg, device)   or None
    scenes = [Scene(cfg, people, everybody, rows, prompt), …]
    rows, painted_again = paint_chunk(cfg, scenes, pipe, auditor)

`cfg` is generate.py's config. In reading order: painting, one source picture, the audit, a chunk.

Legend: K pictures per pose · n people of one source picture (joints are always COCO's 17). Sizes are (W, H), PIL's
order. Keypoints and boxes: px, pixel centres at whole numbers; third column of keypoints 0 = missing.
"""

import contextlib
import re
import warnings
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from drawing import pictures
from plumbing.chunks import person_row, picture_seed
from plumbing.config import UserError
from tasks.pose import COCO_SIGMAS
from tasks.pose import oks as pose_oks

MODELS = {"t2i_adapter": "CompVis/stable-diffusion-v1-4", "controlnet": "stable-diffusion-v1-5/stable-diffusion-v1-5"}

ADAPTERS = {
    ("t2i_adapter", "keypose"): "TencentARC/t2iadapter_keypose_sd14v1",
    ("t2i_adapter", "openpose"): "TencentARC/t2iadapter_openpose_sd14v1",
    ("controlnet", "openpose"): "lllyasviel/control_v11p_sd15_openpose",
}

SAMPLERS = {  # diffusers' class, and how it spreads the steps over time (its own default)
    "ddim": ("DDIMScheduler", "leading"),
    "dpm++": ("DPMSolverMultistepScheduler", "linspace"),
    "euler": ("EulerDiscreteScheduler", "linspace"),
    "pndm": ("PNDMScheduler", "leading"),
}

DRAW = {  # each as its network was trained
    ("t2i_adapter", "keypose"): pictures.draw_keypose,
    ("t2i_adapter", "openpose"): partial(pictures.draw_openpose, blend=True),
    ("controlnet", "openpose"): pictures.draw_openpose,
}

# ------------------------------------------------------------------------------------------------------------- painting


def from_folder_or_hub(name, key, load):
    """`load(name, …)` from a folder, the hub's cache or the hub. One clear line where it is not to be had."""
    import huggingface_hub

    warnings.simplefilter("ignore")  # of libraries about each other
    if Path(name).is_dir() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        try:
            return load(name, local_files_only=True)
        except Exception as error:  # diffusers, transformers and safetensors raise many kinds
            raise UserError(f"{key}={name}: cannot load this folder: {' '.join(str(error).split())[:200]}") from None
    with contextlib.suppress(OSError, ValueError):  # not in the cache, or only a part of it
        return load(name, local_files_only=True)
    get = f"download it once with `hf download {name}`, or give a local folder: {key}=FOLDER"
    try:
        huggingface_hub.HfApi().auth_check(name)  # quick and plain, where loading would try again for half a minute
        return load(name)
    except huggingface_hub.errors.GatedRepoError:
        raise UserError(f"{key}={name} is gated: accept its licence on its hub page, then {get}") from None
    except huggingface_hub.errors.RepositoryNotFoundError:
        raise UserError(f"{key}={name} is neither a folder nor a model on the hub (or it is private); {get}") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{key}={name} is not on this machine and the hub gave none ({reason}); {get}") from None


def load_painter(cfg, device):
    """The diffusers pipeline with its adapter, as the config asks, on `device`."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    # Weights that come pickled, not as safetensors, are read with weights_only by diffusers and transformers.
    if cfg.backend == "t2i_adapter":
        extra = {"adapter": from_folder_or_hub(cfg.adapter, "adapter", diffusers.T2IAdapter.from_pretrained)}
        load = partial(diffusers.StableDiffusionAdapterPipeline.from_pretrained, **extra)
    else:
        extra = {"controlnet": from_folder_or_hub(cfg.adapter, "adapter", diffusers.ControlNetModel.from_pretrained)}
        load = partial(diffusers.StableDiffusionControlNetPipeline.from_pretrained, **extra)
    pipe = from_folder_or_hub(cfg.model, "model", load)
    pipe.scheduler = sampler(cfg.scheduler, pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    # Pictures are decoded one by one: at once, each further one of 512² takes .7 GB in float32.
    pipe.vae.enable_slicing()
    torch.backends.cudnn.deterministic = True
    return pipe.to(device, precision(cfg, device))


def precision(cfg, device):
    """The pipeline's dtype. auto: bf16 where a GPU multiplies it in hardware (from Ampere on), fp16
    on an older one (V100, T4), float32 on the CPU.

    fp16 overflows beyond 65,504: `paint` refuses what comes of it.
    """
    chosen = cfg.precision
    if chosen == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        chosen = "bf16" if native else "fp16" if device.type == "cuda" else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[chosen]


def sampler(name, config):
    """The sampler `name` for a model whose own scheduler has this config.

    The spacing is stated: a folder saved by a newer diffusers names the spacing of its own scheduler, and with DDIM's,
    20 steps of dpm++ end five times as far from the exact picture.
    """
    import diffusers

    kind, spacing = SAMPLERS[name]
    return getattr(diffusers, kind).from_config(config, timestep_spacing=spacing)


def paint(pipe, cfg, conditions, prompts, seeds, size):
    """Three lists with an entry per picture, all of one size (W, H) → whole pictures; None where one was refused."""
    strength = "adapter_conditioning_scale" if cfg.backend == "t2i_adapter" else "controlnet_conditioning_scale"
    # One entry per picture. With num_images_per_prompt > 1 diffusers repeats the prompts AABB but the adapter's
    # features ABAB, and poses get each other's prompts. CPU generators give the same noise on any device.
    result = pipe(
        prompt=prompts,
        image=conditions,
        negative_prompt=[cfg.negative_prompt] * len(prompts),
        num_images_per_prompt=1,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        width=size[0],
        height=size[1],
        num_inference_steps=cfg.steps,
        guidance_scale=cfg.guidance,
        output_type="np",  # (n, H, W, 3) in [0, 1]; in a PIL picture a NaN would be a black pixel
        **{strength: cfg.adapter_weight},
    )
    flagged = result.nsfw_content_detected or [False] * len(prompts)
    # Not finite: an overflow in fp16. Black: what the safety checker leaves behind.
    made = []
    for picture, bad in zip(result.images, flagged):
        good = not bad and np.isfinite(picture).all() and picture.max() > 0.5 / 255
        made.append(pipe.numpy_to_pil(picture)[0] if good else None)
    return made


# --------------------------------------------------------------------------------------------------- one source picture


def painted_size(size, resolution):
    """Source (N, 2) w, h → generated (N, 2): about resolution² px, shape kept, sides multiples of 64 [T2I-Adapter]."""
    size = np.asarray(size, np.float64)
    scale = resolution / np.sqrt(size.prod(-1, keepdims=True))
    return np.maximum(64, 64 * np.round(size * scale / 64)).astype(int)


class Scene:
    """One source picture at the size it is painted: its condition with all people, and the wanted people's boxes."""

    def __init__(self, cfg, people, everybody, rows, prompt):
        """everybody: rows of `people` in this picture, all drawn; rows: those to crop."""
        self.unit, self.prompt = int(people.image_id[rows[0]]), prompt
        self.pose_ids = people.annotation_id[rows].tolist()
        self.size = tuple(painted_size(people.size[rows[0]], cfg.resolution).tolist())
        self.scale = np.array(self.size) / people.size[rows[0]]
        draw = DRAW[cfg.backend, cfg.condition]
        self.condition = draw(self.moved(people.keypoints[everybody]), self.size)
        self.keypoints = self.moved(people.keypoints[rows])
        self.boxes = people.boxes[rows] * np.tile(self.scale, 2)
        self.areas = people.area[rows] * self.scale.prod()

    def moved(self, keypoints):
        """(n, 17, 3) px of the source picture → px of the painted one; pixel centres are at whole numbers."""
        xy = (keypoints[..., :2] + 0.5) * self.scale - 0.5
        return np.concatenate([xy, keypoints[..., 2:]], -1) * (keypoints[..., 2:] > 0)

    def crop(self, picture, n):
        """Person n cut out by his box [paper, Fig. 3], the joints following [inferred]. → (PIL picture, (17, 3))."""
        low = np.floor(self.boxes[n, :2]).astype(int)
        high = np.maximum(np.minimum(np.ceil(self.boxes[n, :2] + self.boxes[n, 2:]), self.size).astype(int), low + 1)
        keypoints = self.keypoints[n] - [*low, 0]
        inside = ((keypoints[:, :2] >= -0.5) & (keypoints[:, :2] < high - low - 0.5)).all(1)
        keypoints *= (inside & (keypoints[:, 2] > 0))[:, None]  # a joint that the box cuts off is missing in the crop
        return picture.crop((*low.tolist(), *high.tolist())), keypoints


# ---------------------------------------------------------------------------------------------------------------- audit


class Auditor:
    """A pose estimator (transformers' ViTPose) looks for the joints of generated people."""

    def __init__(self, cfg, device):
        import transformers

        name, self.device = cfg.audit_model, device
        model = from_folder_or_hub(name, "audit_model", transformers.VitPoseForPoseEstimation.from_pretrained)
        self.model = model.to(device).eval()
        self.processor = from_folder_or_hub(name, "audit_model", transformers.AutoImageProcessor.from_pretrained)
        if self.model.config.num_labels != 17:
            raise UserError(f"audit_model={name} has {self.model.config.num_labels} joints; COCO's 17 are needed")

    @torch.inference_mode()
    def measure(self, picture, boxes):
        """boxes (n, 4) x y w h px of `picture` → joints (n, 17, 2) px."""
        inputs = self.processor(picture, boxes=[boxes.tolist()], return_tensors="pt").to(self.device)
        if self.model.config.backbone_config.num_experts > 1:  # ViTPose++: expert 0 is COCO's
            inputs["dataset_index"] = torch.zeros(len(boxes), dtype=torch.long, device=self.device)
        found = self.processor.post_process_pose_estimation(self.model(**inputs), boxes=[boxes])[0]
        return np.stack([person["keypoints"].numpy() for person in found])


# -------------------------------------------------------------------------------------------------------------- a chunk


def paint_chunk(cfg, scenes, pipe, auditor):
    """K pictures of each scene, its people cropped. → ([(picture or None, row)], pictures painted again)."""
    filled, seen, retried = {}, set(), 0  # filled: (pose, k) → (picture, row)
    for attempt in range(cfg.retries + 1):
        todo = [
            (scene, k)
            for scene in scenes
            for k in range(cfg.pictures_per_pose)
            if any((pose, k) not in filled for pose in scene.pose_ids)
        ]
        retried += len(todo) if attempt else 0
        todo.sort(key=lambda job: job[0].size)  # stable: what shares a batch does not depend on ranks or kills
        for size, jobs in ((size, list(same)) for size, same in groupby(todo, key=lambda job: job[0].size)):
            for batch in (jobs[i : i + cfg.batch] for i in range(0, len(jobs), cfg.batch)):
                seeds = [picture_seed(cfg.seed, scene.unit, k, attempt) for scene, k in batch]
                conditions, prompts = [scene.condition for scene, _ in batch], [scene.prompt for scene, _ in batch]
                for (scene, k), seed, picture in zip(batch, seeds, paint(pipe, cfg, conditions, prompts, seeds, size)):
                    if picture is not None:
                        seen.update(scene.pose_ids)
                        take_people(cfg, scene, k, seed, picture, auditor, filled)
    rows = []
    for pose in (pose for scene in scenes for pose in scene.pose_ids):
        mine = [filled[pose, k] for k in range(cfg.pictures_per_pose) if (pose, k) in filled]
        reason = "not finite, black or refused by the safety checker"
        reason = "refused by the audit" if auditor and pose in seen else reason
        rows += mine if len(mine) == cfg.pictures_per_pose else [(None, {"pose_id": pose, "skipped": reason})]
    return rows, retried


def take_people(cfg, scene, k, seed, picture, auditor, filled):
    """Crop the people of one painted picture into filled[pose, k], where the audit (if any) agrees."""
    if auditor:
        measured, areas = auditor.measure(picture, scene.boxes), np.maximum(scene.areas, 1.0)
        agreement = np.nan_to_num(pose_oks(measured, scene.keypoints, areas, np.array(list(COCO_SIGMAS.values()))))
    for n, pose in enumerate(scene.pose_ids):
        if (pose, k) in filled or (auditor and agreement[n] < cfg.audit_threshold):
            continue
        crop, keypoints = scene.crop(picture, n)
        row = person_row(cfg, pose, k, keypoints, [0, 0, *crop.size], float(scene.areas[n]), scene.prompt, seed)
        row |= {"source_image_id": scene.unit, "source_annotation_id": pose}
        row |= {"oks": round(float(agreement[n]), 4)} if auditor else {}
        filled[pose, k] = crop, row
