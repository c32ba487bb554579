"""README's own command lines: every one parses with its config; the laptop's ones are run, at a small size."""

import importlib
import os
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT, run_script

from plumbing.config import read_config


def commands_of(text):
    """Lines that begin with python or torchrun, behind spaces or a comment sign, with what follows a backslash."""
    text = re.sub(r"\\\n[# ]*", "", text)
    return re.findall(r"^[# ]*((?:python|torchrun) .*\.py .*)$", text, re.M)


STAGES = ["generate", "pretrain", "finetune_pose", "finetune_reid", "finetune_par", "finetune_t2i"]
BLOCKS = re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
COMMANDS = [command for block in BLOCKS for command in commands_of(block)]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
HEADS = [command for path in CONFIGS for command in commands_of(path.read_text(encoding="utf-8"))]
HEADS += [command for name in STAGES for command in commands_of(importlib.import_module(name).__doc__)]
# What makes a command small enough for a test; {tmp} is the test's folder. Keys later on the line win.
SMALL = {
    "configs/generate_demo.yaml": "out={tmp}/set poses=8 workers=0",
    "configs/generate_people_demo.yaml": "out={tmp}/people persons_train=8 persons_val=2 persons_test=4 workers=0",
    "configs/generate_lspet_puppet.yaml": "out={tmp}/lspet poses=4 workers=0",
    "configs/pretrain_demo.yaml": "out={tmp}/pretrain annotations={tmp}/set/annotations.json batch=16 epochs=1",
    "configs/finetune_pose_lspet.yaml": "out={tmp}/pose encoder={tmp}/pretrain/encoder.safetensors epochs=1 "
    "limit=16 batch=8",
    "configs/finetune_reid_demo.yaml": "out={tmp}/reid data={tmp}/people people=4 epochs=1",
    "configs/finetune_par_demo.yaml": "out={tmp}/par epochs=1 batch=16 train={tmp}/people/attributes_train.csv "
    "val={tmp}/people/attributes_val.csv test={tmp}/people/attributes_test.csv",
    "configs/finetune_t2i_demo.yaml": "out={tmp}/t2i epochs=1 batch=8 captions={tmp}/people/data_captions.json "
    "images={tmp}/people",
    "predict=my_pictures": "predict={tmp}/set/images weights={tmp}/pose/model.safetensors out={tmp}/mine",
}


def words_of(command):
    """→ (script, its arguments)."""
    words = shlex.split(os.path.expandvars(command), comments=True)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[script], words[script + 1 :]


def test_readme_has_commands_for_every_stage():
    scripts = {words_of(command)[0] for command in COMMANDS}
    stages = {path.name for path in ROOT.glob("finetune_*.py")} | {"generate.py", "pretrain.py"}
    assert stages <= scripts


@pytest.mark.parametrize("command", COMMANDS + HEADS)
def test_command_is_valid_with_its_config(command, monkeypatch):
    """README's, the configs' and the stages' own lines: keys, their combinations, batches that the ranks can share."""
    monkeypatch.chdir(ROOT)
    script, arguments = words_of(command)
    stage = importlib.import_module(Path(script).stem)
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
    named = set()
    for command in COMMANDS + HEADS:
        script, arguments = words_of(command)
        cfg = read_config(importlib.import_module(Path(script).stem).KEYS, "", arguments)
        values = {name: value for name, value in vars(cfg).items() if isinstance(value, str)}
        values.pop("out", None)
        named |= {"/".join(v.split("/")[:3]) for v in values.values() if v.startswith("runs/demo/")}
    assert named and named <= folders


def test_heads_are_read():
    assert len(HEADS) >= len(CONFIGS) + len(STAGES)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_is_valid(path):
    prefix = path.name.split("_")[0]
    stage = importlib.import_module(prefix if prefix != "finetune" else "_".join(path.stem.split("_")[:2]))
    read_config(stage.KEYS, stage.__doc__, ["--cfg", str(path)])


def test_laptop_commands_run(tmp_path):
    ran = 0
    for key, small in SMALL.items():  # in the order in which one needs what another wrote
        command = next(c for c in reversed(COMMANDS) if key in c and not c.startswith("torchrun"))
        if "$GENPOCCL_DATA" in command and not os.environ.get("GENPOCCL_DATA"):
            continue
        script, arguments = words_of(command)
        if "weights={tmp}/pose" in small and not (tmp_path / "pose").exists():
            continue  # its weights come from a command that needs real pictures
        done = run_script(script, *arguments, *small.format(tmp=tmp_path).split())
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
        ran += 1
    assert ran >= 6
    for name in (
        "set/sheet.png",
        "pretrain/encoder.safetensors",
        "people/query",
        "reid/metrics.json",
        "t2i/config.yaml",
    ):
        assert (tmp_path / name).exists(), name
