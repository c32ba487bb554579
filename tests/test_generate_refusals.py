"""What generate.py refuses in one line, and models that are not there or run code."""

import json
import os
import shutil
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT
from generate_runs import arguments, run
from safetensors.torch import load_file, save_file

from plumbing.errors import UserError


def test_bad_input_is_one_line(tiny, tmp_path, monkeypatch):
    good = json.loads((tiny / "poses.json").read_text())
    text = tmp_path / "text.json"
    text.write_text("no json")
    few = tmp_path / "few.json"
    few.write_text(
        json.dumps({**good, "annotations": [{**good["annotations"][0], "keypoints": [1, 2, 2]}]})
    )
    orphan = tmp_path / "orphan.json"
    orphan.write_text(
        json.dumps({**good, "annotations": [{**good["annotations"][0], "image_id": 77}]})
    )
    twice = tmp_path / "twice.json"
    twice.write_text(json.dumps({**good, "annotations": good["annotations"][:1] * 2}))
    points = np.reshape(good["annotations"][0]["keypoints"], (17, 3))
    box = good["annotations"][0]["bbox"]
    undrawable = {
        "headonly": points * (np.arange(17) < 5)[:, None],
        "beside": points + [9000, 0, 0],
    }
    for name, keypoints in undrawable.items():
        row = {**good["annotations"][0], "keypoints": keypoints.ravel().tolist(), "bbox": box}
        (tmp_path / f"{name}.json").write_text(
            json.dumps({**good, "annotations": [row, {**row, "id": 2}]})
        )
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "thesis.txt").write_text("mine")
    below = tmp_path / "below.json"
    below.write_text(json.dumps({**good, "annotations": [{**good["annotations"][0], "id": -5}]}))
    cases = [
        ([f"annotations={below}"], "an annotation has an id below 0"),
        (["poses=2", "steps=9"], "takes no steps"),
        (["poses=2", "resolution=1024"], "takes no resolution"),
        (["poses=2", "audit_threshold=0.9"], "takes no audit_threshold"),
        (arguments(tiny, height=99), "backend=t2i_adapter takes no height="),
        (arguments(tiny, parts="true"), "backend=t2i_adapter takes no parts="),
        (["poses=0"], "poses="),
        (["poses=2", "pictures_per_pose=0"], "pictures_per_pose"),
        (["poses=2", "backend=midjourney"], "t2i_adapter"),
        (["poses=2", "pose=3"], "nearest valid key"),
        (["poses=2", "audit=vitpose"], "audit"),
        (["poses=2", f"captions={tiny / 'captions.json'}"], "takes no captions"),
        (["poses=2", "prompt_template=a man"], "takes no prompt_template"),
        (["poses=2", f"prompt_file={text}"], "takes no prompt_file"),
        (["poses=2", "condition=openpose"], "takes no condition"),
        (["task=people", "persons_train=9", "persons_val=9"], "persons_val=9"),
        (["task=people", "cameras=1"], "cameras"),
        (["task=people", "height=64", "width=192"], "needs width <= 2 height"),
        (["task=people", "model=sd"], "takes no model"),
        (["task=people", "backend=t2i_adapter"], "backend=puppet"),
        (["task=people", f"annotations={tiny / 'poses.json'}"], "annotations"),
        ([f"annotations={tmp_path / 'none.json'}"], "none.json"),
        ([f"annotations={text}"], "JSON"),
        ([f"annotations={few}"], "51"),
        ([f"annotations={orphan}"], "77"),
        ([f"annotations={twice}"], "stands twice"),
        (
            [f"annotations={tmp_path / 'headonly.json'}", "parts=true"],
            "nobody of 2 people can be drawn (too few joints",
        ),
        (
            [f"annotations={tmp_path / 'beside.json'}", "parts=true"],
            "nobody of 2 people can be drawn (too few joints",
        ),
        ([f"annotations={tiny / 'captions.json'}"], '"annotations" lacks "image_id" or "bbox"'),
        (
            [f"annotations={tiny / 'poses.json'}", "min_joints=17", "min_side=9999"],
            "no person is left",
        ),
        (["backend=t2i_adapter"], "annotations="),
        (["backend=t2i_adapter", f"annotations={tiny / 'poses.json'}"], "captions="),
        (arguments(tiny, backend="controlnet", condition="keypose"), "condition"),
        (arguments(tiny, captions=few), "as COCO captions: "),
        (arguments(tiny, model=tmp_path / "nowhere"), "model="),
        (arguments(tiny, adapter=tiny / "sd"), "adapter="),
        (arguments(tiny, audit="vitpose", audit_model=tiny / "sd"), "audit_model="),
    ]
    for words, told in cases:
        with pytest.raises(UserError) as error:
            run(monkeypatch, [*words, f"out={tmp_path / 'out'}"])
        assert told in str(error.value) and "\n" not in str(error.value), words
        assert not (tmp_path / "out").exists(), words
    with pytest.raises(UserError, match="not a run of this project"):
        run(monkeypatch, ["poses=2", f"out={plain}"])
    assert [path.name for path in plain.iterdir()] == ["thesis.txt"]


def test_missing_model_and_exit_code(tiny, tmp_path):
    words = arguments(tiny, out=tmp_path / "a", adapter="someone/not-downloaded")
    environment = dict(os.environ, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "cache"))
    done = subprocess.run(
        [sys.executable, ROOT / "generate.py", *words],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("error: adapter=someone/not-downloaded")
        and done.stderr.count("\n") == 1
    )
    assert "hf download someone/not-downloaded" in done.stderr and not (tmp_path / "a").exists()


def test_pickled_weights_run_no_code(tiny, tmp_path, monkeypatch):
    """An adapter that comes as a pickle with code in it is refused, and the code does not run."""

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = tmp_path / "t2i"
    folder.mkdir()
    shutil.copy(tiny / "t2i/config.json", folder)
    torch.save({"conv": Bomb()}, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="adapter="):
        run(monkeypatch, arguments(tiny, out=tmp_path / "a", adapter=folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", ["cut off", "of another kind"])
def test_an_adapter_that_lacks_tensors_is_refused(tiny, tmp_path, monkeypatch, damage):
    """Both libraries would fill them at random, and say nothing."""
    folder = shutil.copytree(tiny / "t2i", tmp_path / "t2i")
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    if damage == "cut off":
        del weights[sorted(weights)[0]]
    else:
        weights = load_file(tiny / "controlnet/diffusion_pytorch_model.safetensors")
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="adapter=.* lacks .* of a T2IAdapter"):
        run(monkeypatch, arguments(tiny, out=tmp_path / "a", adapter=folder))
    assert not (tmp_path / "a").exists()


def test_sdxl_and_networks_of_another_stable_diffusion_are_refused(tiny, tmp_path, monkeypatch):
    sd, t2i, net = shutil.copytree(tiny / "sd", tmp_path / "sd"), tmp_path / "t2i", tmp_path / "net"
    diffusers.T2IAdapter(
        channels=[16, 32, 32, 32], num_res_blocks=1, adapter_type="full_adapter_xl"
    ).save_pretrained(t2i)
    unet = diffusers.UNet2DConditionModel.from_pretrained(sd / "unet")
    big = type(unet).from_config(unet.config, cross_attention_dim=64)
    diffusers.ControlNetModel.from_unet(
        big, conditioning_embedding_out_channels=(8, 8, 16, 16)
    ).save_pretrained(net)
    more = dict(addition_embed_type="text_time", addition_time_embed_dim=8)
    more |= dict(projection_class_embeddings_input_dim=80)
    type(unet).from_config(unet.config, **more).save_pretrained(sd / "unet")
    other = "is of another Stable Diffusion than"
    for backend, words, why in (
        ("t2i_adapter", dict(model=sd), "model=.*sd is SDXL, which is not supported"),
        ("controlnet", dict(adapter=net), f"adapter=.*net {other}"),
        ("t2i_adapter", dict(adapter=t2i), f"adapter=.*t2i {other}"),
    ):
        with pytest.raises(UserError, match=why):
            run(monkeypatch, arguments(tiny, backend, out=tmp_path / "a", **words))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_part_of_stable_diffusion_that_lacks_tensors_is_refused(
    tiny, tmp_path, monkeypatch, part
):
    folder = shutil.copytree(tiny / "sd", tmp_path / "sd")
    file = next((folder / part).glob("*.safetensors"))
    weights = load_file(file)
    del weights[sorted(weights)[-1]]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="model=.*sd lacks .*: a file of another kind, or cut off"):
        run(monkeypatch, arguments(tiny, out=tmp_path / "a", model=folder))
    assert not (tmp_path / "a").exists()
