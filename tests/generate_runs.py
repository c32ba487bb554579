"""generate.py in this process or in processes of their own, its poses, and tiny real pipelines."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from conftest import ROOT

import generate
from formats.joints import COCO_CATEGORY
from plumbing.config import read_config

JOINTS = COCO_CATEGORY["keypoints"]
STANDING = np.array(  # a person in a 100 × 200 box, COCO-17
    "50 20 54 16 46 16 58 18 42 18 68 45 32 45 76 75 24 75 80 105 20 105 "
    "60 105 40 105 62 145 38 145 64 190 36 190".split(),
    float,
).reshape(17, 2)


def person(number, image, x, y, zoom=1.0, seen=17):
    keypoints = np.concatenate([STANDING * zoom + [x, y], np.full((17, 1), 2.0)], 1)
    keypoints[seen:] = 0
    box = [x, y, 100 * zoom, 200 * zoom]
    row = dict(id=number, image_id=image, category_id=1, iscrowd=0, num_keypoints=seen)
    row |= dict(keypoints=keypoints.ravel().tolist(), bbox=box)
    return row | dict(area=box[2] * box[3] * 0.6)


def write_poses(folder):
    """Three pictures of two shapes that do not exist: four people, and one of too few joints."""
    sizes = {7: (300, 280), 8: (300, 280), 9: (400, 210)}
    images = []
    for i, (w, h) in sizes.items():
        images.append(dict(id=i, file_name=f"{i}.jpg", width=w, height=h))
    people = [
        person(1, 7, 20, 40),
        person(2, 7, 150, 60),
        person(3, 8, 100, 30, 1.2),
        person(4, 9, 150, 5),
        person(5, 9, 20, 5, seen=4),
    ]
    document = dict(images=images, annotations=people, categories=[COCO_CATEGORY])
    captions = [
        dict(id=10 * i + j, image_id=i, caption=f"caption {j} of {i}")
        for i in (7, 8, 9)
        for j in range(3)
    ]
    (folder / "poses.json").write_text(json.dumps(document))
    (folder / "captions.json").write_text(json.dumps(dict(images=images, annotations=captions)))


def write_models(root):
    """Stable Diffusion, both adapters and ViTPose with random weights, as a user's folders."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    letters = [chr(c) for c in range(33, 127)]
    vocabulary = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (root / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (root / "merges.txt").write_text("#version: 0.2\n")
    last = len(vocabulary) - 1
    text = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=37, num_hidden_layers=2,
        num_attention_heads=4, bos_token_id=last - 1, eos_token_id=last, pad_token_id=last,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32, 32, 32), layers_per_block=1, sample_size=8, norm_num_groups=8,
        cross_attention_dim=32, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )  # fmt: skip
    tokenizer = transformers.CLIPTokenizer(
        str(root / "vocab.json"), str(root / "merges.txt"), model_max_length=77
    )
    scheduler = diffusers.PNDMScheduler(
        beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            block_out_channels=[16] * 4, norm_num_groups=8, latent_channels=4,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        ),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(root / "sd")
    diffusers.T2IAdapter(
        in_channels=3,
        channels=[16, 32, 32, 32],
        num_res_blocks=1,
        downscale_factor=8,
        adapter_type="full_adapter",
    ).save_pretrained(root / "t2i")
    control = diffusers.ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=(8, 8, 16, 16)
    )
    # Zero in a fresh ControlNet: it would not steer at all.
    for name, weight in control.named_parameters():
        if "cond_embedding" in name and weight.ndim == 4:
            torch.nn.init.normal_(weight, std=2 / weight[0].numel() ** 0.5)
        elif name.startswith(("controlnet_down", "controlnet_mid")) and weight.ndim == 4:
            torch.nn.init.normal_(weight, std=0.03)
    control.save_pretrained(root / "controlnet")

    vision = dict(hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4)
    clip = transformers.CLIPConfig(
        vision_config=dict(vision, image_size=32, patch_size=8), projection_dim=16
    )
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    checker = StableDiffusionSafetyChecker(clip)
    torch.nn.init.normal_(checker.concept_embeds)
    reader = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    pipe.register_modules(safety_checker=checker, feature_extractor=reader)
    pipe.save_pretrained(root / "sd_checked")

    backbone = transformers.VitPoseBackboneConfig(
        image_size=(64, 48),
        patch_size=(16, 16),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        out_indices=[2],
    )
    config = transformers.VitPoseConfig(backbone_config=backbone, num_labels=17)
    transformers.VitPoseForPoseEstimation(config).save_pretrained(root / "vitpose")
    transformers.VitPoseImageProcessor(size={"height": 64, "width": 48}).save_pretrained(
        root / "vitpose"
    )


def arguments(tiny, backend="t2i_adapter", **more):
    adapter = tiny / ("t2i" if backend == "t2i_adapter" else "controlnet")
    keys = dict(
        backend=backend, annotations=tiny / "poses.json", captions=tiny / "captions.json",
        model=tiny / "sd", steps=2, adapter=adapter, resolution=128, min_joints=5, batch=4,
        pictures_per_pose=3, chunk=2, device="cpu",
    )  # fmt: skip
    return [f"{name}={value}" for name, value in (keys | more).items()]


def run(monkeypatch, words, module=generate):
    """generate.py, or a fork of it, in this process. → its run folder"""
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, words)])
    module.main()
    return [word.split("=")[1] for word in map(str, words) if word.startswith("out=")][0]


def read(out):
    return json.loads((Path(out) / "annotations.json").read_text())


def config(tiny, **more):
    cfg = read_config(generate.KEYS, "", arguments(tiny, **more))
    generate.check(cfg)
    return cfg


def same_set(a, b):
    """Byte-identical lists and pictures, nothing more and nothing less."""
    own = {
        "config.yaml",
        "log.jsonl",
        "summary.json",
        "run.json",
    }  # hold the folder's name and times
    files = []
    for out in (Path(a), Path(b)):
        paths = [path for path in out.rglob("*") if path.is_file() and path.name not in own]
        of_readers = (".checked.json", ".members.npz")
        paths = [path for path in paths if not path.name.endswith(of_readers)]
        files.append({str(path.relative_to(out)): path.read_bytes() for path in paths})
    assert len(files[0]) > 5
    return files[0] == files[1]


def pixels(picture):
    return np.asarray(picture, np.int16)


# A stage whose loaders start in another way than by default, e.g. by Python 3.14's forkserver.
START_AS = "import multiprocessing, runpy, sys; multiprocessing.set_start_method(sys.argv[1]); "
START_AS += "sys.argv[:2] = []; runpy.run_path(sys.argv[0], run_name='__main__')"
AS_GENERATE = "\nimport runpy; runpy.run_module('generate', run_name='__main__', alter_sys=True)"


def start(words, ranks=1, method=None, before=None):
    """generate.py as its own processes, in groups of their own. before: code that runs first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    environment |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    command = [sys.executable, ROOT / "generate.py", *words]
    if method:
        command[1:1] = ["-c", START_AS, method]
    if before:
        command[1:2] = ["-c", before + AS_GENERATE]
    processes = []
    for rank in range(ranks):
        own = dict(RANK=str(rank), WORLD_SIZE=str(ranks)) if ranks > 1 else {}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process = subprocess.Popen(command, env=environment | own, start_new_session=True, **pipes)
        processes.append(process)
    return processes


def finish(processes):
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


def kill_after(records, processes, out):
    """SIGKILL to the main processes once so many chunks are recorded; → records written by then."""
    parts = out / ".parts"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(list(parts.glob("[0-9]*.jsonl"))) < records:
        time.sleep(0.005)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)  # its workers hold its pipes
    assert not (out / "done").exists(), "finished before the kill; make the set larger"
    return len(list(parts.glob("[0-9]*.jsonl")))
