"""The stages on CUDA. Most tests need no GPU: it is pretended (pretend_cuda.py).

Those that need one are skipped by name; benchmarks/on_gpu.sh runs them where there is one.
"""

import contextlib
import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, run_script
from pretend_cuda import DEVICE, EndOfSteps, MovesArguments, PretendCuda
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import DataLoader

import common
import data
import generate
import model
from formats import coco
from plumbing import seeds
from plumbing.errors import UserError
from plumbing.loading import StepSampler, training_loader

TINY = dict(width=32, depth=2, heads=2, decoder_width=32, decoder_depth=1, decoder_heads=2)
ALL = "size=tiny patch=16 height=64 width=32 workers=0 log_every=1 save_every=1000 epochs=1"
PAIRS = "captions={people}/data_captions.json images={people}"
STAGES = {
    "pretrain": "annotations={root}/set/annotations.json batch=8 pictures_per_pose=2",
    "finetune_pose": "train_annotations={root}/set/annotations.json batch=8 "
    "val_annotations={root}/set/annotations.json",
    "finetune_reid": "data={people} people=4 pictures_per_person=2",
    "finetune_par": "train={people}/attributes_train.csv val={people}/attributes_val.csv "
    "test={people}/attributes_test.csv batch=8",
    "finetune_t2i": f"{PAIRS} batch=8 project=16 max_tokens=6",
}
SET = "annotations={root}/set/annotations.json"
LOCAL = "local_crops=2 local_height=32 local_width=16"
NEIGHBOURS = {
    "baselines.solider": f"{SET} batch=6 {LOCAL} out_dim=24 head_hidden=16 drop_path=0.1",
    "baselines.liftedcl": f"{SET} batch=8 queue=20",
    "baselines.synclr": f"{SET} batch=8 pictures_per_caption=2 {LOCAL} projector_width=64 "
    "projector_out=32 head_width=64 prototypes=24",
    "baselines.vicreg": f"{SET} batch=8 expander=32",
}
pytestmark = [  # of a loader that cannot pin without a GPU; of a copy of a tensor without content
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
]
FLOAT32 = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
MLP = "projector=mlp projector_width=16 projector_out=8"
STABLEREP = "mask=none decoder=false views=1 gamma_align=0 mp_token=cls augmentation=strong"
SETTINGS = [
    ("pretrain", ""),
    ("pretrain", f"precision=fp32 {MLP} views_are_positives=false"),
    ("pretrain", "mask=random gather_gradient=false pose_in_decoder=false clip_grad=1"),
    ("pretrain", "mask=random views=1 gamma_align=0 gamma_mp=0 pose_token=false"),
    ("pretrain", STABLEREP),
    ("finetune_pose", "head=classic tokens=add_cls_pose"),
    ("finetune_pose", "head=simple drop_path=0 checkpoint_activations=true"),
    ("finetune_reid", ""),
    ("finetune_reid", "bnneck=true token=both precision=fp32"),
    ("finetune_par", ""),
    ("finetune_t2i", "text=words"),
    ("finetune_t2i", "text=bert bert={root}/bert"),
    ("pretrain", f"accumulate=2 {MLP}"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The puppet's pictures: a set with shared poses, people for the other tasks. A random BERT."""
    from transformers import BertConfig, BertModel, BertTokenizer

    root = tmp_path_factory.mktemp("data")
    a_set = f"out={root}/set poses=12 pictures_per_pose=2"
    people = f"--cfg {ROOT}/configs/generate_people_demo.yaml out={root}/people"
    people += " persons_train=6 persons_val=2 persons_test=2"
    with pytest.MonkeyPatch.context() as patch:
        for keys in (a_set, people):
            argv = ["generate.py", *keys.split(), "height=64", "width=32", "workers=0"]
            patch.setattr(sys, "argv", argv)
            generate.main()
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a person in with and".split()
    (root / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(root / "vocab.txt")).save_pretrained(root / "bert")
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    BertModel(BertConfig(vocab_size=len(words), **shape)).save_pretrained(root / "bert")
    return root


def module_of(stage):
    if stage == "finetune_pose":
        pytest.importorskip("pycocotools")
    return importlib.import_module(stage)


@pytest.fixture
def run(root, tmp_path, monkeypatch):
    """run(stage, more keys): the stage's main in this process, as a rank on the pretended GPU.

    With device= among the keys it starts its ranks itself. Files: tmp_path / out.
    """
    monkeypatch.setitem(model.SIZES, "tiny", TINY)

    def main(stage, more="", world=1, out="run"):
        module = module_of(stage)
        places = dict(root=root, people=root / "people")
        keys = f"{ALL} out={tmp_path}/{out} {(STAGES | NEIGHBOURS)[stage]} {more}".format(**places)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [f"{stage}.py", *keys.split()])
            if "device=" not in more:
                ranks = common.Ranks(0, world, DEVICE)
                patch.setattr(common, "start_ranks", lambda *_: ranks)
                # run.json tells the GPU's name.
                patch.setattr(torch.cuda, "get_device_name", lambda *_: "a pretended GPU")
            module.main()

    return main


def rows(out):
    """The lines of training steps."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "lr" in line]


@pytest.fixture
def two_ranks(monkeypatch):
    """A process group of two whose collectives do nothing; Python objects come back twice."""

    def gather(parts, own):
        parts[:] = [own, own]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda objects, source: None)
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


# ----------------------------------------------------------------------------------- pretended CUDA


@pytest.mark.parametrize(("stage", "more"), [*SETTINGS, *((name, "") for name in NEIGHBOURS)])
def test_no_step_waits_for_the_device(stage, more, run):
    with PretendCuda(steps=2) as cuda, pytest.raises(EndOfSteps):
        run(stage, more)
    assert not cuda.waits, "\n".join(dict.fromkeys(cuda.waits))


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        SETTINGS[0],
        SETTINGS[1],
        ("finetune_pose", "head=classic"),
        SETTINGS[8],
        ("finetune_par", ""),
        ("finetune_t2i", ""),
    ],
)
def test_no_step_of_two_ranks_waits(stage, more, run, monkeypatch, two_ranks):
    """With the arguments moved to the device as DistributedDataParallel does it."""
    monkeypatch.setattr(common, "distributed", MovesArguments)
    with PretendCuda(steps=2) as cuda, pytest.raises(EndOfSteps):
        run(stage, more, world=2)
    assert not cuda.waits, "\n".join(dict.fromkeys(cuda.waits))


@pytest.mark.parametrize("stage", STAGES)
def test_a_whole_run_on_the_device(stage, run, tmp_path):
    """Training, saving, resuming, evaluation and pictures: no tensor is on the wrong device."""
    with PretendCuda(steps=2), pytest.raises(EndOfSteps):
        run(stage, "save_every=1")
    with PretendCuda():
        run(stage, "save_every=1")
    steps = [row["step"] for row in rows(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 2
    assert (tmp_path / "run/done").exists()


# ------------------------------------------------------------------------------ ranks and precision


@pytest.fixture
def gpus(monkeypatch):
    """gpus(n, major): torch reports n GPUs of compute capability `major`. → what is asked of it."""
    calls, before = {}, [part.fp32_precision for part in FLOAT32]

    def start_group(*backend, **options):
        calls.update(options, backend=backend)

    def report(n, major):
        properties = SimpleNamespace(major=major)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)  # emulated
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
        monkeypatch.setattr(torch.cuda, "set_device", lambda own: calls.update(current=own))
        monkeypatch.setattr(dist, "init_process_group", start_group)
        return calls

    yield report
    for part, value in zip(FLOAT32, before):
        part.fp32_precision = value


def test_ranks_start_on_their_own_gpu_with_a_stated_limit(gpus, monkeypatch):
    calls = gpus(2, 8)
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    own = torch.device("cuda", 1)
    assert common.start_ranks("auto") == (3, 4, own)
    limit = common.RANKS_WAIT
    assert calls == {"backend": ("nccl",), "current": own, "device_id": own, "timeout": limit}
    assert limit.total_seconds() >= 3600
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="local rank 2 has no GPU: 2 visible; use --nproc_per_node"):
        common.start_ranks("cuda")


def test_float32_is_float32_on_a_gpu(gpus):
    gpus(1, 8)
    for part in FLOAT32:
        part.fp32_precision = "tf32"
    common.start_ranks("cuda")
    assert [part.fp32_precision for part in FLOAT32] == ["ieee"] * 3


# Compute capability 7: V100 and T4; 8: A100; 9: H100.
@pytest.mark.parametrize(("major", "native"), [(7, False), (8, True), (9, True)])
def test_bf16_where_the_gpu_has_it_in_hardware(gpus, major, native):
    gpus(1, major)
    assert common.autocast(DEVICE, "auto")._enabled == native
    assert not common.autocast(DEVICE, "fp32")._enabled
    if native:
        assert common.start_ranks("cuda", "bf16")[2] == DEVICE
    else:
        with pytest.raises(UserError, match="Tesla T4 has no bf16 instructions; use fp32 or auto"):
            common.start_ranks("cuda", "bf16")


@pytest.mark.parametrize("stage", STAGES)
def test_a_precision_that_is_refused_leaves_no_run_folder(stage, run, gpus, tmp_path):
    gpus(1, 7)
    with pytest.raises(UserError, match="no bf16 instructions"):
        run(stage, "device=cuda precision=bf16")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------- real CUDA


@needs_cuda
@pytest.mark.parametrize("stage", STAGES)
def test_cuda_follows_the_cpu(stage, run, tmp_path, monkeypatch):
    """Float32, the same random numbers: losses and gradient norms of an epoch's steps."""

    def on_cpu(key, batch, columns, ranks):
        host = ranks._replace(device=torch.device("cpu"))
        return seeds.rank_noise(key, batch, columns, host).to(ranks.device)

    monkeypatch.setattr(common, "rank_noise", on_cpu)
    for device in ("cpu", "cuda"):
        run(stage, f"precision=fp32 device={device}", out=device)
    for cpu, cuda in zip(rows(tmp_path / "cpu"), rows(tmp_path / "cuda"), strict=True):
        assert cuda["loss"] == pytest.approx(cpu["loss"], rel=2e-4, abs=1e-5), cpu["step"]
        assert cuda["grad_norm"] == pytest.approx(cpu["grad_norm"], rel=2e-3, abs=1e-5), cpu["step"]


@needs_cuda
@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_goes_on(stage, run, tmp_path, monkeypatch, record_property):
    """As near as sums without a fixed order allow. Whether bit for bit is recorded, not asked."""
    save, saved = common.save_checkpoint, []

    def killed(*args, **more):
        save(*args, **more)
        saved.append(args)
        if len(saved) == 2:
            raise EndOfSteps

    for out in ("plain", "killed"):
        with monkeypatch.context() as patch:
            patch.setattr(common, "save_checkpoint", killed if out == "killed" else save)
            with pytest.raises(EndOfSteps) if out == "killed" else contextlib.nullcontext():
                run(stage, "device=cuda save_every=1", out=out)
    run(stage, "device=cuda save_every=1", out="killed")
    plain, killed = (rows(tmp_path / out) for out in ("plain", "killed"))
    for one, other in zip(plain, killed, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-2, abs=1e-4), one["step"]
    states = [(tmp_path / out / "last.pt").read_bytes() for out in ("plain", "killed")]
    record_property("bitwise", states[0] == states[1])


@needs_cuda
@pytest.mark.parametrize(("stage", "more"), SETTINGS)
def test_torch_sees_no_step_wait(stage, more, run, monkeypatch):
    """As above, by torch's own watch. The first step may wait: it makes the optimiser's state."""
    iterate = DataLoader.__iter__

    def watched(loader):
        training = isinstance(loader.batch_sampler, StepSampler)
        for number, batch in enumerate(iterate(loader)):
            if training and number == 2:
                raise EndOfSteps
            torch.cuda.set_sync_debug_mode("error" if training and number else "default")
            yield batch
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(DataLoader, "__iter__", watched)
    try:
        with pytest.raises(EndOfSteps):
            run(stage, f"{more} device=cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_autocast_on_cuda():
    x = torch.ones(8, 8, device="cuda")
    native = torch.cuda.get_device_capability() >= (8, 0)
    for precision, bf16 in (("auto", native), ("bf16", True), ("fp32", False)):
        with common.autocast(x.device, precision):
            assert (x @ x).dtype == (torch.bfloat16 if bf16 else torch.float32)


@needs_cuda
def test_training_batches_are_pinned(root):
    people = coco.read_people(f"{root}/set/annotations.json")[0]
    dataset = data.PretrainPictures([people], (64, 32), 0)
    for workers in (0, 1):
        batches = data.PoseBatches(dataset, 8, 2, [], 0, common.Ranks(0, 1, DEVICE))
        sample = next(iter(training_loader(dataset, batches.steps(0, 2), workers, DEVICE)))
        assert sample["image"].is_pinned() and sample["keypoints"].is_pinned()


@needs_cuda
def test_nccl_in_a_world_of_one(tmp_path):
    """All that one GPU lets us try: NCCL starts, gathers, sums; a gradient is as without it."""
    torch.cuda.set_device(DEVICE)
    ranks = dict(init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    dist.init_process_group("nccl", device_id=DEVICE, **ranks)
    try:
        gradients = []
        for wrap in (lambda net: net, lambda net: common.distributed(net, DEVICE)):
            torch.manual_seed(0)
            net = torch.nn.Linear(6, 4).to(DEVICE)
            wrap(net)(torch.arange(12.0, device=DEVICE).view(2, 6)).square().sum().backward()
            gradients.append(net.weight.grad)
        assert torch.equal(*gradients)
        out = torch.empty(3, device=DEVICE)
        dist.all_gather_into_tensor(out, torch.arange(3.0, device=DEVICE))
        dist.all_reduce(out)
        common.barrier()
        assert out.tolist() == [0, 1, 2] and common.gather_objects(["a"]) == ["a"]
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_nccl_ranks_change_nothing(root, tmp_path):
    keys = f"{ALL} {STAGES['pretrain']} {STABLEREP} device=cuda precision=fp32".format(root=root)
    for n in (1, 2):
        done = run_script("pretrain.py", *keys.split(), f"out={tmp_path}/{n}", ranks=n)
        assert done.returncode == 0, done.stderr
    for one, two in zip(rows(tmp_path / "1"), rows(tmp_path / "2"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=2e-3)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)
