"""The house: what imports what, how long files and signatures are, what can be taken home alone."""

import ast
import importlib
import inspect
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import losses
from formats.weights import meta_of
from model import SIZES, ViT
from plumbing.files import save_weights

FOLDERS = ("baselines", "benchmarks", "drawing", "experiments")
FOLDERS += ("formats", "plumbing", "puppet", "tasks")
# Lower may not import higher; within a level only downwards in the order of names given here.
FLOORS = [
    {"plumbing", "losses"},
    {"common", "model", "lesson"},
    {"drawing", "formats"},
    {"data", "tasks", "puppet"},
    {"annotate", "generate", "pretrain"}
    | {"finetune_pose", "finetune_reid", "finetune_par", "finetune_t2i"},
    {"baselines", "benchmarks", "experiments"},
]
STAGES = sorted(FLOORS[4])
FILES = sorted(
    path for path in [*ROOT.glob("*.py"), *(p for f in FOLDERS for p in (ROOT / f).glob("*.py"))]
)
ASIDE = sorted([*ROOT.glob("tests/*.py"), *ROOT.glob("docs/*.py")])  # import what they like


def room(path):
    """pretrain.py → pretrain; formats/coco.py → formats."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0]


def imports(path):
    """Modules of the project that a file imports, wherever in it."""
    own = {p.stem for p in ROOT.glob("*.py")} | set(FOLDERS)
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if (ROOT / node.module.replace(".", "/")).is_dir():
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
            else:
                names.add(node.module)
    return {name for name in names if name.split(".")[0] in own}


def test_no_room_imports_one_above_it():
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    for path in FILES:
        own = room(path)
        for name in imports(path):
            other = name.split(".")[0]
            allowed = floor[other] < floor[own] or other == own
            # On one floor some stand on others: the way is drawn here.
            allowed |= (own, other) in {("model", "losses"), ("formats", "drawing")}
            allowed |= (own, other) == (
                "tasks",
                "data",
            )  # probe.py: people as pre-training sees them
            assert allowed, f"{path.name} imports {name}"


def test_imports_make_no_circle():
    graph = {}
    for path in FILES:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = imports(path)
    done, way = set(), []

    def visit(name):
        assert name not in way, f"{' → '.join([*way, name])}"
        if name in done or name not in graph:
            return
        way.append(name)
        for other in graph[name]:
            visit(other)
            visit(".".join(other.split(".")[:2]))
        way.pop()
        done.add(name)

    for name in graph:
        visit(name)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_few_modules_and_no_other_stage(stage):
    names = imports(ROOT / f"{stage}.py")
    assert len(names) <= 9, sorted(names)
    assert not {name.split(".")[0] for name in names} & set(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_works_without_the_others(stage, tmp_path):
    """A student who deletes every other stage can still run this one."""
    for path in FILES:
        if path.stem not in STAGES or path.stem == stage:
            target = tmp_path / path.relative_to(ROOT)
            target.parent.mkdir(exist_ok=True)
            shutil.copy(path, target)
    command = [sys.executable, f"{stage}.py", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "  out: " in done.stdout, done.stderr


def test_the_root_is_small():
    assert len(list(ROOT.glob("*.py"))) <= 12


@pytest.mark.parametrize("path", [*FILES, *ASIDE], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_read_in_one_sitting(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 400, "a file of more than 400 lines is not read in one sitting"
    assert max(map(len, lines), default=0) <= 100, "more than 100 columns"


def test_signatures_are_short():
    """At most six parameters; losses, models and their parts may have more."""
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef):
                continue
            names = [
                a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            ]
            names = [name for name in names if name not in ("self", "cls", "ctx")]
            model = path.stem in ("model", "losses") or room(path) in ("puppet", "drawing")
            assert len(names) <= 6 or model, f"{path.name}: {node.name}({', '.join(names)})"


def test_an_encoder_is_taken_home_with_two_files(tmp_path):
    """model.py and losses.py in an empty folder, torch and safetensors alone."""
    s = SIZES["tiny"]
    torch.manual_seed(0)
    vit = ViT(s["width"], s["depth"], s["heads"], (64, 32), 16)
    save_weights(tmp_path / "encoder.safetensors", vit, **meta_of(vit))
    for name in ("model.py", "losses.py"):
        shutil.copy(ROOT / name, tmp_path)
    program = (
        "import sys\n"
        "class Nothing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('plumbing', 'numpy', 'torchvision', 'yaml', 'PIL'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Nothing())\n"
        "import torch\n"
        "from model import load_encoder, normalize\n"
        "pictures = torch.arange(2 * 3 * 64 * 32).remainder(256).to(torch.uint8)\n"
        "tokens = load_encoder('encoder.safetensors')(normalize(pictures.view(2, 3, 64, 32)))\n"
        "torch.save(tokens.detach(), 'tokens.pt')\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pictures = torch.arange(2 * 3 * 64 * 32).remainder(256).to(torch.uint8)
    from model import normalize

    expected = vit.eval()(normalize(pictures.view(2, 3, 64, 32)))
    assert torch.equal(torch.load(tmp_path / "tokens.pt"), expected)


PUBLIC = {
    ("losses", "reconstruction_loss"): ["pred", "images", "mask", "patch_size"],
    ("losses", "alignment_loss"): ["a", "b", "tau"],
    ("losses", "multi_positive_loss"): ["z", "pose_id", "tau"],
    ("data", "part_guided_mask"): ["keypoints", "grid", "mask_ratio", "patch_size", "generator"],
    ("finetune_reid", "ranking_metrics"): [
        *("distance", "query_ids", "query_cams", "gallery_ids", "gallery_cams")
    ],
    ("finetune_par", "attribute_metrics"): ["probabilities", "labels"],
}


@pytest.mark.parametrize("name", PUBLIC, ids=lambda name: ".".join(name))
def test_public_names_stay(name):
    function = getattr(importlib.import_module(name[0]), name[1])
    assert list(inspect.signature(function).parameters)[: len(PUBLIC[name])] == PUBLIC[name]


def test_losses_need_no_process_group():
    assert losses.world_size() == 1
