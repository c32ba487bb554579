"""README and docs: their command lines parse with their configs, and the laptop's are run, at a
small size; their Python runs; the files, names, links and lines of code they speak of are there.
"""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from PIL import Image

from formats.weights import meta_of
from model import IMAGENET_MEAN, IMAGENET_STD, ViT
from plumbing.config import read_config
from plumbing.files import save_weights

sys.path.append(str(ROOT / "baselines"))  # their scripts are imported by name, as the stages are


def commands_of(text):
    """Lines that begin with python or torchrun, behind spaces or a comment sign, with what follows
    a backslash.
    """
    text = re.sub(r"\\\n[# ]*", "", text)
    found = re.findall(r"^[# ]*((?:python|torchrun) .*\.py .*)$", text, re.M)
    # test_lesson.py, test_curves.py, test_export.py and test_downloads.py run these.
    return [line for line in found if not re.search("lesson.py|drawing/curves.py|formats/", line)]


STAGES = ["annotate", "generate", "pretrain"]
STAGES += ["finetune_pose", "finetune_reid", "finetune_par", "finetune_t2i"]
for name in ("experiments", "benchmarks"):  # whose commands are read as those of the stages
    sys.path.append(str(ROOT / name))
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
}
README = DOCUMENTS["README.md"]
# Fenced blocks: (document, language, text).
BLOCKS = [
    (name, *block)
    for name, text in DOCUMENTS.items()
    for block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)
]
COMMANDS = [
    command for _, language, block in BLOCKS if not language for command in commands_of(block)
]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
HEADS = [command for path in CONFIGS for command in commands_of(path.read_text(encoding="utf-8"))]
HEADS += [
    command for name in STAGES for command in commands_of(importlib.import_module(name).__doc__)
]
# What makes a command small enough for a test; {tmp} is the test's folder. Keys later on the line
# win.
SMALL = {
    "configs/generate_demo.yaml": "out={tmp}/set poses=8 workers=0",
    "configs/generate_people_demo.yaml": "out={tmp}/people persons_train=8 persons_val=2 "
    "persons_test=4 workers=0",
    "configs/generate_lspet_puppet.yaml": "out={tmp}/lspet poses=4 workers=0",
    "configs/pretrain_demo.yaml": "out={tmp}/pretrain annotations={tmp}/set/annotations.json "
    "batch=16 epochs=1",
    "annotations=my_people.json gamma_mp=0": "out={tmp}/my_people batch=16 epochs=1 "
    "annotations={tmp}/set/annotations.json",
    "annotations=my_pictures": "out={tmp}/my_pictures batch=16 epochs=1 "
    "annotations={tmp}/set/images",
    "configs/finetune_pose_demo.yaml": "out={tmp}/pose encoder={tmp}/pretrain/encoder.safetensors "
    "epochs=1 limit=16 batch=8 train_annotations={tmp}/set/annotations.json "
    "val_annotations={tmp}/set/annotations.json",
    "configs/finetune_pose_lspet.yaml": "out={tmp}/pose_lspet epochs=1 limit=16 batch=8 "
    "encoder={tmp}/pretrain/encoder.safetensors",
    "configs/finetune_reid_demo.yaml": "out={tmp}/reid data={tmp}/people people=4 epochs=1 "
    "encoder={tmp}/pretrain/encoder.safetensors",
    "configs/finetune_par_demo.yaml": "out={tmp}/par epochs=1 batch=16 "
    "encoder={tmp}/pretrain/encoder.safetensors train={tmp}/people/attributes_train.csv "
    "val={tmp}/people/attributes_val.csv test={tmp}/people/attributes_test.csv",
    "configs/finetune_t2i_demo.yaml": "out={tmp}/t2i epochs=1 batch=8 "
    "captions={tmp}/people/data_captions.json images={tmp}/people",
    "finetune_reid.py eval_only=true": "out={tmp}/reid_eval data={tmp}/people "
    "weights={tmp}/reid/model.safetensors",
    "finetune_par.py eval_only=true": "out={tmp}/par_eval test={tmp}/people/attributes_test.csv "
    "weights={tmp}/par/model.safetensors",
    "finetune_pose.py predict=my_pictures": "out={tmp}/pose_predict predict={tmp}/set/images "
    "weights={tmp}/pose/model.safetensors",
    "finetune_t2i.py predict=my_pictures": "out={tmp}/t2i_predict predict={tmp}/set/images "
    "weights={tmp}/t2i/model.safetensors",
}


def stage_of(script):
    """ "baselines/synclr.py" → its module."""
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


def words_of(command):
    """→ (script, its arguments)."""
    words = shlex.split(os.path.expandvars(command), comments=True)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[script], words[script + 1 :]


def test_the_documents_have_commands_for_every_stage():
    scripts = {words_of(command)[0] for command in COMMANDS}
    stages = {path.name for path in ROOT.glob("finetune_*.py")} | {"generate.py", "pretrain.py"}
    assert stages <= scripts


@pytest.mark.parametrize("command", COMMANDS + HEADS)
def test_command_is_valid_with_its_config(command, monkeypatch):
    """The documents', the configs' and the stages' own lines: keys, their combinations, batches
    that the ranks can share.
    """
    monkeypatch.chdir(ROOT)
    script, arguments = words_of(command)
    stage = stage_of(script)
    cfg = read_config(stage.KEYS, stage.__doc__, arguments)
    check = getattr(stage, "check", None) or getattr(stage, "check_config", None)
    if check and not getattr(cfg, "predict", None):  # predict looks for its folder
        check(cfg)
    ranks = re.search(r"--nproc_per_node[ =](\d+)", command)
    if ranks and script != "generate.py":
        shared = cfg.people if script == "finetune_reid.py" else cfg.batch
        groups = cfg.pictures_per_pose if script == "pretrain.py" and cfg.gamma_mp else 1
        assert shared % (int(ranks[1]) * groups) == 0


def demo_folders():
    """The run folders below runs/demo that demo.sh writes, its loop over tasks unrolled."""
    folders = set()
    for line in re.findall(r"\brun (\S+\.py.*|\"finetune_.*)", (ROOT / "demo.sh").read_text()):
        for task in ("pose", "reid", "par", "t2i"):
            words = shlex.split(re.sub(r"\$\{?task\}?", task, line.split(";")[0]))
            script, arguments = words[0], [w for w in words[1:] if "$" not in w]
            keys = importlib.import_module(Path(script).stem).KEYS
            folders.add(read_config(keys, "", arguments).out)
    return folders


def test_example_lines_name_what_the_demo_writes(monkeypatch):
    monkeypatch.chdir(ROOT)
    folders = demo_folders()
    assert {"runs/demo/people", "runs/demo/pretrain", "runs/demo/t2i_pretrained"} <= folders
    # What a neighbouring method needs beside that, its config's head makes.
    folders |= {
        read_config(stage_of("generate.py").KEYS, "", ["--cfg", str(path)]).out
        for path in CONFIGS
        if path.name.startswith("generate_")
    }
    named = set()
    for command in COMMANDS + HEADS:
        script, arguments = words_of(command)
        cfg = read_config(stage_of(script).KEYS, "", arguments)
        values = {name: value for name, value in vars(cfg).items() if isinstance(value, str)}
        values.pop("out", None)
        named |= {"/".join(v.split("/")[:3]) for v in values.values() if v.startswith("runs/demo/")}
    assert named and named <= folders


def test_heads_are_read():
    assert len(HEADS) >= len(CONFIGS) + len(STAGES)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_is_valid(path):
    prefix = path.stem.split("_")[0]
    if (ROOT / f"baselines/{prefix}.py").exists():
        prefix = f"baselines.{prefix}"
    stage = importlib.import_module(
        prefix if prefix != "finetune" else "_".join(path.stem.split("_")[:2])
    )
    read_config(stage.KEYS, stage.__doc__, ["--cfg", str(path)])


def test_laptop_commands_run(tmp_path):
    ran = 0
    for key, small in SMALL.items():  # in the order in which one needs what another wrote
        command = next(c for c in reversed(COMMANDS) if key in c and not c.startswith("torchrun"))
        if "$GENPOCCL_DATA" in command and not os.environ.get("GENPOCCL_DATA"):
            continue
        script, arguments = words_of(command)
        done = run_script(script, *arguments, *small.format(tmp=tmp_path).split())
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
        ran += 1
    assert ran >= len(SMALL) - 2
    for name in (
        "set/sheet.png",
        "pretrain/encoder.safetensors",
        "people/query",
        "my_pictures/encoder.safetensors",
        "reid_eval/metrics.json",
        "pose_predict/predictions.json",
        "t2i_predict/ranking.json",
    ):
        assert (tmp_path / name).exists(), name
    check_keys(tmp_path)


def check_keys(folder):
    """Every key that these runs wrote is explained in docs/metrics.md."""
    explained = set(re.findall(r"`([^`\n]+)`", DOCUMENTS["docs/metrics.md"]))
    logs = list(folder.glob("*/log.jsonl"))
    rows = [json.loads(line) for path in logs for line in path.read_text().splitlines()]
    rows += [json.loads(path.read_text()) for path in folder.glob("*/metrics.json")]
    keys = {key for row in rows for key in row}
    assert len(keys) > 50 and keys <= explained, keys - explained


# ----------------------------------------------------------------------------- Python, names, links


def python_block(document, words):
    """The one Python block of a document that holds these words."""
    found = [text for name, language, text in BLOCKS if (name, language) == (document, "python")]
    (block,) = [text for text in found if words in text]
    return block


def run_python(program, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_readmes_lines_give_cls_and_pose_of_a_picture(tmp_path):
    torch.manual_seed(0)
    vit = ViT(192, 6, 3, (128, 64), 16).eval()
    (tmp_path / "runs/demo/pretrain").mkdir(parents=True)
    save_weights(tmp_path / "runs/demo/pretrain/encoder.safetensors", vit, **meta_of(vit))
    noise = np.random.default_rng(0).integers(0, 256, (150, 70, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "person.jpg")
    block = python_block("README.md", "load_encoder")
    run_python(block + '\ntorch.save([cls, pose], "out.pt")\n', tmp_path)
    cls, pose = torch.load(tmp_path / "out.pt")
    small = Image.open(tmp_path / "person.jpg").resize((64, 128), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.moveaxis(np.array(small), 2, 0).copy())[None]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        tokens = vit((pixels / 255 - mean) / std)
    assert cls.shape == pose.shape == (1, 192) and not cls.requires_grad
    assert torch.allclose(cls, tokens[:, 0], atol=1e-4)
    assert torch.allclose(pose, tokens[:, 1], atol=1e-4)
    assert not torch.allclose(cls, pose, atol=0.1)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_compiles_and_links_lead_somewhere(document):
    for name, language, text in BLOCKS:
        if (name, language) == (document, "python"):
            compile(text, document, "exec")
    folder = (ROOT / document).parent
    for target in re.findall(r"\]\(([^)#:]+)[^)]*\)", DOCUMENTS[document]):
        if not target.startswith("http"):
            assert (folder / target).exists(), f"{document} links to {target}"


def test_names_that_the_tables_give_are_in_their_files():
    """A cell such as "`losses.py`, `pair_masks` and `patchify`": a file and what stands in it."""
    cells = [cell for text in DOCUMENTS.values() for cell in re.findall(r"\|([^|\n]*)", text)]
    places = [found for cell in cells for found in re.findall(r"`([\w/]+\.py)`, ([^;]*)", cell)]
    checked = 0
    for file, names in places:
        text = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"`([\w.]+)`", names):
            if name.endswith(".py"):
                continue
            for part in name.split("."):
                assert re.search(rf"\b(def|class) {part}\b", text), f"{file} has no {name}"
            checked += 1
    assert checked >= 20


def test_readmes_forks_change_lines_that_are_there():
    """The lines that a diff keeps or takes away stand once in the file it names."""
    changed = 0
    for _, language, block in BLOCKS:
        if language != "diff":
            continue
        for part in re.split(r"^--- ", block, flags=re.M)[1:]:
            file, *lines = part.splitlines()
            text = (ROOT / file).read_text(encoding="utf-8").splitlines()
            for line in lines:
                if line[0] in " -":
                    assert text.count(line[1:]) == 1, f"{file}: {line}"
                    changed += 1
    assert changed >= 2


def test_the_file_tree_names_what_is_there():
    tree = next(text for _, _, text in BLOCKS if text.startswith("annotate.py  "))
    named = {line.split()[0].strip("/") for line in tree.splitlines()}
    scripts = {re.sub("^finetune_.*", "finetune_*.py", path.name) for path in ROOT.glob("*.py")}
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and any(p.glob("*.py"))}
    assert named == scripts | folders | {"configs", "docs"}


def test_readme_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 200
