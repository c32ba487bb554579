"""Sets whose pictures share a prompt: Stable Diffusion from text alone, and the puppet's."""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, check_fields
from PIL import Image

import generate
from common import Ranks
from data import PoseBatches, PretrainPictures
from formats.coco import read_image_captions, read_people
from plumbing.config import read_config
from plumbing.diffusion import say_cut
from plumbing.errors import UserError
from puppet.figure import another_like, attributes, sample_identities, sentence

CONFIG = ROOT / "configs/generate_prompts_demo.yaml"


@pytest.fixture
def painter(tiny):
    """Stable Diffusion with random weights, in a folder as a user's would be."""
    return tiny / "sd"


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, words)])
    generate.main()


def document(out):
    return json.loads((Path(out) / "annotations.json").read_text())


def text_words(painter, **more):
    keys = dict(backend="text", model=painter, steps=2, resolution=64, batch=4, device="cpu")
    keys |= dict(pictures_per_pose=2, chunk=2, picture_format="png") | more
    return [f"{name}={value}" for name, value in keys.items()]


def test_another_list_of_prompts_is_refused(painter, tmp_path, monkeypatch):
    file = tmp_path / "prompts.txt"
    file.write_text("a man\na lady\na child\na group")
    words = text_words(painter, prompt_file=file, out=tmp_path / "a")
    with monkeypatch.context() as patch:  # stopped after its first record
        patch.setattr(generate.chunks.Progress, "add", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(patch, *words)
    file.write_text("a lady\na child\na group\na man")
    with pytest.raises(UserError, match=r"prompts\.txt is not what it was when this run began"):
        run(monkeypatch, *words)
    file.write_text("a man\na lady\na child\na group")
    run(monkeypatch, *words)
    assert len(document(tmp_path / "a")["annotations"]) == 8


def test_text_paints_k_pictures_of_each_line(painter, tmp_path, monkeypatch):
    lines = ["a man in red", "", "a {tall} lady", "a man in red", "two people"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    words = text_words(painter, prompt_file=tmp_path / "prompts.txt", out=tmp_path / "a")
    run(monkeypatch, *words)
    found, rows = document(tmp_path / "a"), document(tmp_path / "a")["annotations"]
    check_fields(tmp_path / "a/annotations.json")
    # A sentence said twice is painted once: its pictures would be their own negatives.
    told = [(row["pose_id"], row["k"], row["caption"]) for row in rows]
    kept = [(0, "a man in red"), (1, "a tall lady"), (3, "two people")]
    assert told == [(i, k, text) for i, text in kept for k in range(2)]
    assert "share their prompt" in found["info"]["description"]
    for row, image in zip(rows, found["images"]):
        assert row["num_keypoints"] == 0 and row["bbox"] == [0, 0, 64, 64]
        assert "source_image_id" not in row
        picture = Image.open(tmp_path / "a/images" / image["file_name"])
        assert picture.size == (64, 64) and np.ptp(np.asarray(picture)) > 30
    assert len({row["seed"] for row in rows}) == 6
    # As the pipeline itself paints that sentence with that noise.
    cfg = read_config(generate.KEYS, "", words)
    generate.check(cfg)
    pipe = generate.diffusion.load_painter(cfg, torch.device("cpu"))
    noise = torch.Generator().manual_seed(rows[3]["seed"])
    more = dict(num_inference_steps=2, guidance_scale=cfg.guidance, width=64, height=64)
    alone = pipe("a tall lady", negative_prompt="", generator=noise, **more).images[0]
    ours = np.asarray(Image.open(tmp_path / "a/images/1_1.png"), int)
    other = np.asarray(Image.open(tmp_path / "a/images/1_0.png"), int)
    alone = np.asarray(alone, int)
    assert abs(ours - alone).max() <= 2 < abs(other - alone).mean()

    # Stage 2 reads it: three groups of two, nobody with joints.
    people, _ = read_people(str(tmp_path / "a/annotations.json"))
    batches = PoseBatches(PretrainPictures([people], (64, 32), 0), 4, 2, [], 0, Ranks(0, 1, None))
    assert batches.posed and (people.keypoints[:, :, 2] == 0).all()


def test_text_from_captions_and_templates(tmp_path):
    captions = [dict(id=3 * i + j, image_id=i, caption=f"{j} of {i}") for i in (7, 5) for j in "012"
                for j in [int(j)]]  # fmt: skip
    (tmp_path / "captions.json").write_text(json.dumps(dict(annotations=captions)))

    def prompts_of(**more):
        words = text_words("sd", **more)
        cfg = read_config(generate.KEYS, "", words)
        generate.check(cfg)
        return cfg, *generate.people_of_prompts(cfg)

    cfg, people, prompts, _ = prompts_of(captions=tmp_path / "captions.json")
    assert people.pose_id.tolist() == [5, 7] and prompts == generate.read_prompts(cfg, [5, 7])
    assert all(text.endswith(f"of {i}") for i, text in prompts.items())
    _, people, prompts, _ = prompts_of(captions=tmp_path / "captions.json", first_pose=1)
    assert people.pose_id.tolist() == [7]
    _, people, prompts, about = prompts_of(prompt_template="a {red|blue} {cat|dog}", poses=40)
    told = {prompts[i] for i in people.pose_id.tolist()}
    assert len(people.files) == 4 and len(told) == 4 and about.startswith("4 prompts, 36 more")


@pytest.mark.parametrize(
    "words, told",
    [
        (["backend=text"], "needs prompts"),
        (["backend=text", "prompt_template=a man"], "poses="),
        (["backend=text", "prompt_template=a", "poses=2", "annotations=x.json"], "annotations="),
        (["backend=text", "prompt_template=a", "poses=2", "audit=vitpose"], "audit="),
        (["backend=text", "prompt_template=a", "poses=2", "adapter=x"], "adapter="),
        (["backend=text", "prompt_template=a", "poses=2", "positives=pose"], "positives="),
        (["backend=text", "prompt_template=a", "poses=2", "condition=keypose"], "condition=none"),
        (["backend=text", "prompt_template=a", "poses=2", "first_pose=9", "prompt_file={file}"],
         "leaves no prompt"),
        (["backend=controlnet", "annotations=x.json", "positives=prompt"], "positives="),
        (["positives=prompt", "poses=2", "annotations=x.json"], "annotations="),
        (["positives=prompt", "task=people"], "task=people"),
        (["positives=prompt"], "poses="),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_one_line(words, told, tmp_path, monkeypatch):
    (tmp_path / "lines.txt").write_text("a man\n")
    words = [word.format(file=tmp_path / "lines.txt") for word in words]
    with pytest.raises(UserError) as error:
        cfg = read_config(generate.KEYS, "", words)
        generate.check(cfg)
        generate.people_of_prompts(cfg)
    assert told in str(error.value) and "\n" not in str(error.value)


# --------------------------------------------------------------------------------------- the puppet


def test_the_puppets_prompts(tmp_path, monkeypatch):
    run(monkeypatch, "--cfg", CONFIG, "poses=6", "workers=0", f"out={tmp_path / 'a'}", "chunk=4")
    check_fields(tmp_path / "a/annotations.json")
    groups = {}
    for row in document(tmp_path / "a")["annotations"]:
        groups.setdefault(row["pose_id"], []).append(row)
    assert list(groups) == list(range(6)) and all(len(rows) == 5 for rows in groups.values())
    captions = set()
    for rows in groups.values():
        captions |= {row["caption"] for row in rows}
        for one, other in zip(rows, rows[1:]):
            assert one["caption"] == other["caption"] and one["attributes"] == other["attributes"]
            apart = np.subtract(one["joints3d"], other["joints3d"])  # metres
            assert abs(apart - apart.mean(0)).max() > 0.1  # another pose or view
    assert len(captions) == 6
    # task=people draws its people from bare numbers; nobody of them is in a set to pre-train on.
    downstream = [attributes(person) for person in sample_identities(0, range(7))]
    assert not [rows for rows in groups.values() if rows[0]["attributes"] in downstream]
    # A prompt's pictures depend on the seed and its number alone.
    words = ("poses=1", "first_pose=4", "workers=0", f"out={tmp_path / 'b'}")
    run(monkeypatch, "--cfg", CONFIG, *words)
    for k in range(5):
        name = f"images/4_{k}.jpg"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_another_like_him_fits_every_sentence():
    """What is told is the same, what is not told differs."""
    person = sample_identities(0, [3])[0]
    others = [another_like(person, np.random.default_rng(i)) for i in range(20)]
    for other in others:
        assert attributes(other) == attributes(person)
        for seed in range(8):
            told = [sentence(p, np.random.default_rng(seed)) for p in (person, other)]
            assert told[0] == told[1]
    skins = Counter(tuple(p["skin"].round(3)) for p in [person, *others])
    shades = Counter(tuple(p["upper_rgb"].round(3)) for p in [person, *others])
    assert len(skins) > 15 and len(shades) > 15
    hues = np.array([p["upper_rgb"] for p in others])
    near = np.linalg.norm(hues - hues.mean(0), axis=1)
    assert near.max() < 0.35  # still that colour


def test_empty_captions_do_not_count_and_others_are_texts(tmp_path):
    file = tmp_path / "captions.json"
    texts = enumerate(["a", " ", "", "b"])
    rows = [dict(id=n, image_id=n // 2, caption=text) for n, text in texts]
    file.write_text(json.dumps(dict(annotations=rows)))
    assert read_image_captions(file) == {0: ["a"], 1: ["b"]}
    for caption in (None, 5, ["a"]):
        file.write_text(json.dumps(dict(annotations=[dict(id=1, image_id=1, caption=caption)])))
        with pytest.raises(UserError, match="its caption is .*, not a text in annotation 1"):
            read_image_captions(file)


def test_prompts_longer_than_the_text_encoder_reads_are_counted(painter, capsys):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(painter / "tokenizer")
    letters = tokenizer("ab").input_ids
    assert len(letters) == 4  # a token per letter, a start and an end
    say_cut(tokenizer, {1: "a" * 75, 2: "b"})
    assert not capsys.readouterr().err
    say_cut(tokenizer, {1: "a" * 76, 2: "b"})
    assert "1 of 2 prompts are cut after 75 tokens, e.g. “aaaa" in capsys.readouterr().err
