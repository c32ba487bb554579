"""annotate.py with tiny real models of transformers: poses, boxes, captions, kills, ranks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file

import annotate
import plumbing.chunks
from formats.coco import read_image_captions, read_people
from formats.people import Limits
from plumbing.errors import UserError
from plumbing.files import read_json

SIZES = [(40, 90), (64, 48), (33, 71), (50, 50), (30, 64), (48, 96), (41, 77)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of save_pretrained: ViTPose, RT-DETR and BLIP with random weights."""
    import transformers

    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    shape = dict(image_size=(64, 48), patch_size=(16, 16), hidden_size=32, num_hidden_layers=2)
    backbone = transformers.VitPoseBackboneConfig(**shape, num_attention_heads=2, out_indices=[2])
    config = transformers.VitPoseConfig(backbone_config=backbone, num_labels=17)
    pose = transformers.VitPoseForPoseEstimation(config)
    torch.nn.init.normal_(pose.head.conv.weight, std=0.05)  # scores on both sides of a threshold
    pose.save_pretrained(root / "vitpose")
    size = {"height": 64, "width": 48}
    transformers.VitPoseImageProcessor(size=size).save_pretrained(root / "vitpose")

    layers = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.RTDetrConfig(
        backbone_config=layers, encoder_hidden_dim=16, encoder_in_channels=[16, 16, 16],
        encoder_ffn_dim=16, encoder_attention_heads=2, d_model=16, decoder_in_channels=[16] * 3,
        decoder_ffn_dim=16, decoder_layers=1, decoder_attention_heads=2, num_queries=6,
        num_denoising=0, id2label={0: "dog", 1: "Person"}, label2id={"dog": 0, "Person": 1},
    )  # fmt: skip
    detector = transformers.RTDetrForObjectDetection(config)
    detector.save_pretrained(root / "detector")
    size = {"height": 64, "width": 64}
    transformers.RTDetrImageProcessor(size=size).save_pretrained(root / "detector")

    words = "[PAD] [UNK] [CLS] [SEP] [MASK] [DEC] [ENC] a man woman walking coat".split()
    (root / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer(str(root / "vocab.txt"))
    text = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ids = dict(bos_token_id=5, eos_token_id=3, pad_token_id=0, sep_token_id=3)
    config = transformers.BlipConfig(
        text_config=dict(text, vocab_size=len(words), encoder_hidden_size=16, **ids),
        vision_config=dict(text, image_size=32, patch_size=16),
    )
    transformers.BlipForConditionalGeneration(config).save_pretrained(root / "blip")
    reader = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    transformers.BlipProcessor(reader, tokenizer).save_pretrained(root / "blip")
    return root


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    (folder / "b").mkdir()
    for i, (w, h) in enumerate(SIZES):
        name = f"b/{i}.png" if i % 2 else f"{i}.jpg"
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(folder / name)
    return folder


def arguments(models, photographs, out, **more):
    keys = dict(pictures=photographs, out=out, pose_model=models / "vitpose", device="cpu")
    keys |= dict(captions="template", precision="fp32", batch=2, chunk=2) | more
    return [f"{key}={value}" for key, value in keys.items()]


def run(monkeypatch, argv):
    import annotate

    monkeypatch.setattr(sys, "argv", ["annotate.py", *argv])
    annotate.main()


def test_whole_pictures(models, photographs, tmp_path, monkeypatch):
    """Boxes are the pictures; joints and scores are those of transformers' own post-processing."""
    import transformers

    out = tmp_path / "a"
    run(monkeypatch, arguments(models, photographs, tmp_path / "first"))
    first = read_json(tmp_path / "first/annotations.json")["annotations"]
    scores = [row["keypoint_scores"] for row in first]
    middle = round(float(np.median(scores)), 3)
    run(monkeypatch, arguments(models, photographs, out, min_score=middle))
    written = read_json(out / "annotations.json")
    assert len(written["annotations"]) == len(SIZES) == read_json(out / "summary.json")["people"]
    model = transformers.VitPoseForPoseEstimation.from_pretrained(models / "vitpose").eval()
    processor = transformers.AutoImageProcessor.from_pretrained(models / "vitpose")
    names = {image["id"]: image["file_name"] for image in written["images"]}
    seen, hidden, beyond = 0, 0, 0
    for row in written["annotations"]:
        picture = Image.open(photographs / names[row["image_id"]]).convert("RGB")
        assert row["bbox"] == [0, 0, *picture.size]
        boxes = [[row["bbox"]]]
        with torch.inference_mode():
            output = model(**processor([picture], boxes=boxes, return_tensors="pt"))
        found = processor.post_process_pose_estimation(output, boxes=boxes)[0][0]
        np.testing.assert_allclose(row["keypoint_scores"], found["scores"], atol=2e-4)
        points = np.reshape(row["keypoints"], (17, 3))
        xy = found["keypoints"].numpy()
        inside = ((xy >= -0.5) & (xy < np.array(picture.size) - 0.5)).all(1)
        beyond += (~inside).sum()
        sure = (found["scores"].numpy() >= middle) & inside
        np.testing.assert_array_equal(points[:, 2], 2 * sure)
        np.testing.assert_allclose(points[sure, :2], xy[sure], atol=0.02)
        assert not points[~sure].any()  # COCO: a missing joint is 0, 0, 0
        seen, hidden = seen + sure.sum(), hidden + (~sure).sum()
    assert seen > 10 and hidden > 10 and beyond > 10
    # What the other stages read.
    people, notes = read_people(out / "annotations.json", photographs, Limits())
    assert len(people.files) == len(SIZES) and not notes["scores"] and not notes["bad"]
    captions = read_image_captions(out / "captions.json")
    assert [captions[i] for i in people.image_id.tolist()] == [["a photo of a person"]] * len(SIZES)
    assert Image.open(out / "sheet.png").width > 800
    assert not (out / ".parts").exists()


def test_detected_people_and_captions(models, photographs, tmp_path, monkeypatch):
    """Several people of a picture, or none; captions of the model; nobody is invented."""
    from tasks.recognition import Detector

    out = tmp_path / "a"
    more = dict(detector=models / "detector", captions="model", caption_model=models / "blip")
    threshold = 0.30
    run(monkeypatch, arguments(models, photographs, out, detector_score=threshold, **more))
    written = read_json(out / "annotations.json")
    found = Detector(str(models / "detector"), "detector", torch.device("cpu"), threshold)
    names = sorted(str(p.relative_to(photographs)) for p in photographs.rglob("*.*"))
    expected = {}
    for i in range(0, len(names), 2):
        pair = [Image.open(photographs / name).convert("RGB") for name in names[i : i + 2]]
        for name, boxes in zip(names[i : i + 2], found.find(pair)):
            expected[name] = boxes
    images = {image["id"]: image["file_name"] for image in written["images"]}
    got = {}
    for row in written["annotations"]:
        got.setdefault(images[row["image_id"]], []).append(row["bbox"])
        assert row["caption"] == " ".join(row["caption"].split())
    assert len(images) == len(set(images.values())) == sum(len(b) > 0 for b in expected.values())
    for name, boxes in expected.items():
        np.testing.assert_allclose(got.get(name, np.zeros((0, 4))), boxes[:, :4], atol=0.01)
    several = sum(len(boxes) > 1 for boxes in expected.values())
    assert several, "the fixture finds several people on some pictures"
    captions = read_image_captions(out / "captions.json")
    assert set(captions) == set(images)


def test_unreadable_pictures_are_counted_and_named(models, photographs, tmp_path, monkeypatch):
    folder = tmp_path / "pictures"
    (folder / "b").mkdir(parents=True)
    for name in ("0.jpg", "b/1.png"):
        (folder / name).write_bytes((photographs / name).read_bytes())
    (folder / "cut.jpg").write_bytes((photographs / "0.jpg").read_bytes()[:300])
    (folder / "empty.png").touch()
    run(monkeypatch, arguments(models, folder, tmp_path / "a"))
    summary = read_json(tmp_path / "a/summary.json")
    assert summary["left_out"] == {"unreadable": 2} and summary["people"] == 2
    assert [row["picture"] for row in summary["named"]] == ["cut.jpg", "empty.png"]
    for name in ("0.jpg", "b/1.png"):
        (folder / name).unlink()
    with pytest.raises(UserError, match="none of 2 pictures gave a person"):
        run(monkeypatch, arguments(models, folder, tmp_path / "b"))


def test_a_list_and_a_limit(models, photographs, tmp_path, monkeypatch):
    (photographs / "some.txt").write_text("b/3.png\n\n0.jpg\nb/3.png\n")
    run(monkeypatch, arguments(models, photographs / "some.txt", tmp_path / "a"))
    written = read_json(tmp_path / "a/annotations.json")
    assert [image["file_name"] for image in written["images"]] == ["b/3.png", "0.jpg"]
    (photographs / "some.txt").write_text("../0.jpg\n")
    with pytest.raises(UserError, match="path below"):
        run(monkeypatch, arguments(models, photographs / "some.txt", tmp_path / "b"))
    (photographs / "some.txt").unlink()
    run(monkeypatch, arguments(models, photographs, tmp_path / "c", limit=3))
    assert len(read_json(tmp_path / "c/annotations.json")["images"]) == 3
    assert not (tmp_path / "b").exists()


def test_a_list_that_changed_is_refused_and_small_crops_are_left_out(
    models, photographs, tmp_path, monkeypatch
):
    folder = shutil.copytree(photographs, tmp_path / "pictures")
    argv = arguments(models, folder, tmp_path / "a")
    with monkeypatch.context() as patch:  # stopped after its first record
        patch.setattr(plumbing.chunks.Progress, "add", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(patch, argv)
    Image.new("RGB", (40, 80)).save(folder / "0_new.jpg")
    with pytest.raises(
        UserError, match="the list of .*pictures is not what it was when this run began"
    ):
        run(monkeypatch, argv)
    (folder / "0_new.jpg").unlink()
    run(monkeypatch, argv)
    assert len(read_json(tmp_path / "a/annotations.json")["images"]) == len(SIZES)

    sides = sorted(min(size) for size in SIZES)
    run(monkeypatch, arguments(models, folder, tmp_path / "b", min_side=sides[-1]))
    kept = read_json(tmp_path / "b/annotations.json")["images"]
    assert len(kept) == sides.count(sides[-1]) < len(SIZES)


def test_no_more_than_two_batches_are_loaded(models, photographs, tmp_path, monkeypatch):
    loaded, seen = [], []
    one, many = annotate.read_picture, annotate.annotate_batch
    monkeypatch.setattr(annotate, "read_picture", lambda *a: loaded.append(a) or one(*a))

    def slow(*args):
        time.sleep(0.1)  # time for loaders that would not wait
        seen.append(len(loaded))
        return many(*args)

    monkeypatch.setattr(annotate, "annotate_batch", slow)
    run(monkeypatch, arguments(models, photographs, tmp_path / "a", batch=1, chunk=len(SIZES)))
    assert len(seen) == len(SIZES) and all(n <= i + 2 for i, n in enumerate(seen))


FILES = ("annotations.json", "captions.json", "sheet.png")


def test_ranks_and_a_kill_change_nothing(models, photographs, tmp_path, monkeypatch):
    """Two ranks, and a run killed after its first record, write the bytes of an undisturbed one."""
    run(monkeypatch, arguments(models, photographs, tmp_path / "whole"))
    env = dict(os.environ, OMP_NUM_THREADS="1")
    script = [sys.executable, str(ROOT / "annotate.py")]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", script[1]]
    argv = arguments(models, photographs, tmp_path / "two")
    subprocess.run([*command, *argv], check=True, env=env, capture_output=True)

    argv = arguments(models, photographs, tmp_path / "killed")
    killed = subprocess.Popen([*script, *argv], env=env, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob(".parts/*.jsonl")):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    subprocess.run([*script, *argv], check=True, env=env, capture_output=True)
    for name in FILES:
        whole = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "two" / name).read_bytes() == whole, name
        assert (tmp_path / "killed" / name).read_bytes() == whole, name


@pytest.mark.parametrize(
    "more, message",
    [
        (dict(pictures="nowhere"), "no folder nowhere"),
        (dict(pose_model="nowhere/x y"), "pose_model="),
        (dict(detector="VITPOSE"), "detector="),
        (dict(captions="model", caption_model="VITPOSE"), "caption_model="),
        (dict(out="PHOTOGRAPHS/a"), "out=.* lies in pictures="),
        (dict(pictures=__file__), "is no folder, and no picture"),
    ],
)
def test_refusals(models, photographs, tmp_path, monkeypatch, more, message):
    more = {k: models / "vitpose" if v == "VITPOSE" else v for k, v in more.items()}
    more = {k: str(v).replace("PHOTOGRAPHS", str(photographs)) for k, v in more.items()}
    more = dict(out=tmp_path / "a") | more
    with pytest.raises(UserError, match=message):
        run(monkeypatch, arguments(models, photographs, **more))
    assert not os.path.exists(more["out"])


def test_a_name_that_is_no_utf_8_is_refused_at_the_start(models, tmp_path, monkeypatch):
    """No list could hold it, and millions of pictures would be looked at before that shows."""
    (tmp_path / "p").mkdir()
    for name in (b"a.png", b"caf\xe9.png"):
        Image.new("RGB", (20, 40)).save(open(os.path.join(os.fsencode(tmp_path / "p"), name), "wb"))
    with pytest.raises(UserError, match="this name is not UTF-8"):
        run(monkeypatch, arguments(models, tmp_path / "p", tmp_path / "a"))
    assert not (tmp_path / "a").exists()


def test_a_model_that_lacks_tensors_is_refused(models, tmp_path):
    """transformers fills them at random, and says so only to those who ask."""
    from tasks.recognition import loaded

    folder = shutil.copytree(models / "vitpose", tmp_path / "cut")
    kind = "VitPoseForPoseEstimation"
    loaded(kind, str(folder), "pose_model")
    weights = load_file(folder / "model.safetensors")
    del weights["head.conv.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"pose_model=.*cut lacks head.conv.weight of a {kind}"):
        loaded(kind, str(folder), "pose_model")


def test_a_finished_run_is_left_alone(models, photographs, tmp_path, monkeypatch, capsys):
    run(monkeypatch, arguments(models, photographs, tmp_path / "a"))
    before = (tmp_path / "a/annotations.json").stat().st_mtime_ns
    run(monkeypatch, arguments(models, photographs, tmp_path / "a"))
    assert "finished already" in capsys.readouterr().out
    assert (tmp_path / "a/annotations.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="min_score"):
        run(monkeypatch, arguments(models, photographs, tmp_path / "a", min_score=0.9))


def test_generate_takes_what_annotate_writes(models, photographs, tmp_path, monkeypatch):
    """Its poses, with the puppet in place of a diffusion model."""
    run(monkeypatch, arguments(models, photographs, tmp_path / "a", min_score=0.05))
    import generate

    argv = [f"annotations={tmp_path / 'a/annotations.json'}", "pictures_per_pose=2", "workers=0"]
    argv += ["height=64", "width=48", f"out={tmp_path / 'set'}", "min_joints=6"]
    monkeypatch.setattr(sys, "argv", ["generate.py", *argv])
    generate.main()
    made = json.loads((tmp_path / "set/summary.json").read_text())
    assert made["poses"] > 0
