"""pretrain.py predict=: tokens of a folder of pictures, by our encoders and by published ones."""

import sys

import numpy as np
import pytest
import torch
from conftest import run_script
from PIL import Image

import pretrain
from formats.weights import meta_of
from model import IMAGENET_MEAN, IMAGENET_STD, ViT
from plumbing.errors import UserError
from plumbing.files import save_weights

MACHINE = ["workers=0", "device=cpu", "precision=fp32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five pictures of several sizes, one of them below; the last two are nearly the same."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "below").mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a.jpg", (40, 90)), ("b.png", (70, 70)), ("below/c.png", (32, 64))):
        noise = rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)
    same = rng.integers(0, 250, (64, 32, 3), dtype=np.uint8)
    Image.fromarray(same).save(folder / "y.png")
    Image.fromarray(same + 3).save(folder / "z.png")
    return folder


def encoder(path, pose_token=True, sides=(64, 32)):
    torch.manual_seed(0)
    vit = ViT(192, 6, 3, sides, 16, pose_token).eval()
    save_weights(path, vit, **meta_of(vit))
    return vit


def predict(*arguments):
    sys.argv = ["pretrain.py", *map(str, arguments), *MACHINE]
    pretrain.main()


@torch.no_grad()
def expected(vit, path):
    W, H = vit.image_size[::-1]
    small = Image.open(path).convert("RGB").resize((W, H), Image.Resampling.BICUBIC)
    pixels = (np.array(small) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    return vit(torch.from_numpy(pixels).float().permute(2, 0, 1)[None])[0].numpy()


def test_every_token_of_every_picture(folder, tmp_path, capsys):
    vit, weights = encoder(tmp_path / "e.safetensors"), f"weights={tmp_path}/e.safetensors"
    # The file decides about the model and the size of the pictures.
    predict(f"predict={folder}", weights, f"out={tmp_path}/run", "size=base", "height=256")
    said = capsys.readouterr()
    assert "5 pictures x 192: cls, pose, patch_mean" in said.out and "nearest_pose.png" in said.out
    assert (
        "tiny with 3 heads, 16 px patches, [CLS] and [POSE]" in said.err
        and "64 × 32 px" in said.err
    )
    found = np.load(tmp_path / "run/features.npz")
    names = ["a.jpg", "b.png", "below/c.png", "y.png", "z.png"]
    assert found["files"].tolist() == names and len(found.files) == 4
    for i, name in enumerate(names):
        tokens = expected(vit, folder / name)
        for token, value in (("cls", tokens[0]), ("pose", tokens[1])):
            np.testing.assert_allclose(found[token][i], value, atol=1e-4)
        np.testing.assert_allclose(found["patch_mean"][i], tokens[2:].mean(0), atol=1e-4)
    for token in ("cls", "pose", "patch_mean"):
        assert Image.open(tmp_path / f"run/nearest_{token}.png").height > 5 * 160
    predict(f"predict={folder}", weights, f"out={tmp_path}/run", "size=base", "height=256")
    assert "is finished already" in capsys.readouterr().out

    predict(f"predict={folder}/y.png", weights, f"out={tmp_path}/one")  # one picture
    alone = np.load(tmp_path / "one/features.npz")
    np.testing.assert_allclose(alone["cls"], found["cls"][3:4], atol=1e-5)
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == [
        *("config.yaml", "done", "features.npz", "run.json")
    ]


def test_published_weights_have_no_pose_and_take_the_size_asked_for(folder, tmp_path, capsys):
    """In MAE's layout, [CLS] with a position; the positions are resized."""
    vit = encoder(tmp_path / "e.safetensors", pose_token=False, sides=(64, 64))
    state = vit.state_dict()
    state["pos_embed"] = torch.cat([torch.zeros(1, 1, 192), state["pos_embed"]], 1)
    torch.save({"model": state}, tmp_path / "mae.pth")
    keys = ["size=tiny", f"weights={tmp_path}/mae.pth", f"out={tmp_path}/run"]
    predict(f"predict={folder}", *keys, "height=64", "width=64")
    assert "5 pictures x 192: cls, patch_mean" in capsys.readouterr().out
    found = np.load(tmp_path / "run/features.npz")
    assert sorted(found.files) == ["cls", "files", "patch_mean"]
    np.testing.assert_allclose(found["cls"][0], expected(vit, folder / "a.jpg")[0], atol=1e-4)
    predict(f"predict={folder}", *keys[:2], "height=64", "width=32", f"out={tmp_path}/small")
    assert np.load(tmp_path / "small/features.npz")["cls"].shape == (5, 192)


def test_several_ranks_count_every_picture_once(folder, tmp_path):
    """5 pictures on 3 ranks."""
    encoder(tmp_path / "e.safetensors")
    keys = [f"predict={folder}", f"weights={tmp_path}/e.safetensors"]
    done = run_script("pretrain.py", *keys, f"out={tmp_path}/three", *MACHINE, ranks=3)
    assert done.returncode == 0, done.stderr
    predict(*keys, f"out={tmp_path}/one")
    one, three = (np.load(tmp_path / f"{n}/features.npz") for n in ("one", "three"))
    for name in one.files:
        if name == "files":
            assert one[name].tolist() == three[name].tolist()
        else:
            np.testing.assert_allclose(one[name], three[name], atol=1e-5)


def test_refusals_leave_nothing(folder, tmp_path):
    encoder(tmp_path / "e.safetensors")
    weights, out = f"weights={tmp_path}/e.safetensors", f"out={tmp_path}/run"
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/x.jpg").write_bytes(b"no picture")
    for arguments, message in (
        ([f"predict={folder}", out], "need each other; to start a pre-training"),
        ([weights, out], "need each other"),
        ([f"predict={tmp_path}/nowhere", weights, out], "no folder .*nowhere"),
        ([f"predict={tmp_path}/broken", weights, out], "broken"),
        ([f"predict={folder}", weights, f"out={folder}/run"], "lies in predict="),
        ([f"predict={folder}", f"weights={folder}/a.jpg", out], "cannot read .*a.jpg"),
    ):
        with pytest.raises(UserError, match=message):
            predict(*arguments)
    assert not (tmp_path / "run").exists() and not (folder / "run").exists()
