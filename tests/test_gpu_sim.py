"""The script's CUDA paths on a simulated GPU: devices, waits, collectives, kernels' conventions."""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt
from tests.conftest import TRACK, MakeRun, environment, random_model, tiny_config
from tests.flash_stubs import flash_module
from train_gpt import GPT, AttentionBackend, Run, softcapped_cross_entropy

ROOT = Path(train_gpt.__file__).parent
slow = pytest.mark.slow
RECIPES = ["default", *sorted(path.parent.name for path in TRACK.glob("*/run.env"))]
TINY = ("NUM_LAYERS=2", "XSA_LAST_N=1", "LOOP_START=0", "LOOP_END=1", "PARALLEL_START_LAYER=1")


def simulate(*arguments: str) -> list[dict[str, Any]]:
    """What `python -m tests.gpu_sim` says of each part of a run; no part may fail."""
    if not shutil.which("g++"):
        pytest.skip("the simulation compiles its guard with g++")
    # A deprecated collective is an error.
    warnings = ["-W", "error::FutureWarning"]
    process = subprocess.run(
        [sys.executable, *warnings, "-m", "tests.gpu_sim", *arguments],
        cwd=ROOT, capture_output=True, text=True,
        env={**environment(tiny_config()), "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    results = [json.loads(line) for line in process.stdout.splitlines()]
    assert [r["error"] for r in results] == [""] * len(results)
    return results


def test_a_training_step_waits_once_and_ranks_agree_on_collectives():
    results = simulate("default", *TINY, "--parts", "build,step", "--ranks", "0,7")
    steps = [r for r in results if r["name"] == "step"]
    assert [list(step["waits"].values()) for step in steps] == [[1], [1]]
    assert all("item" in wait for step in steps for wait in step["waits"])  # the loss
    first, last = (step["collectives"] for step in steps)
    assert first == last
    kinds = {line.split()[0] for line in first}
    assert kinds == {"_reduce_scatter_base_", "allreduce_", "_allgather_base_"}


def test_a_small_recipe_trains_writes_text_and_adapts_on_the_gpu():
    parts = "build,step,generate,adapt"
    _, step, text, adapted = simulate("Frontier", *TINY, "--parts", parts)
    assert sum(step["waits"].values()) == 1
    # Of each token the host reads the logits and nothing else; the next one is copied back.
    waits = {wait.rpartition(":")[0]: number for wait, number in text["waits"].items()}
    assert waits.pop("copy to host sample_tokens") == 4 and not text["collectives"]
    assert {wait.split()[1] for wait in waits} == {"from"}
    # The adapters' documents are recorded chunk by chunk; then the weights learn from all ranks'.
    assert any(wait.startswith("copy to host record") for wait in adapted["waits"])
    assert len(adapted["collectives"]) == 3


def test_a_training_step_can_be_captured_as_a_cuda_graph():
    parts = "build,stages,graphs"
    _, direct, replayed = simulate("default", *TINY, "--parts", parts)
    assert [wait.split()[0] for wait in replayed["waits"]] == ["item"]  # the loss
    assert replayed["collectives"] == direct["collectives"]
    kernels = replayed["graph_kernels"]
    # What is left outside is the optimizers' part, and a few launches for each micro-batch.
    assert direct["launches"] - 1.2 * kernels < replayed["launches"] < direct["launches"] / 4


def test_the_gpu_is_idle_in_training_only_where_a_step_is_logged_or_saved():
    knobs = ["ITERATIONS=12", "TRAIN_LOG_EVERY=10", "MAX_WALLCLOCK_SECONDS=0"]
    *_, loop = simulate("default", *TINY, *knobs, "--parts", "build,loop")
    waits = collections.Counter[str]()
    for wait, number in loop["waits"].items():
        waits[wait.rsplit(" ", 1)[0]] += number
    # Steps 1 to 5, 10 and 12; the steps 6 to 9 and 11 are read while the next one is computed.
    assert waits.pop("event, idle") == 7 and waits.pop("event, busy") == 5
    assert waits.keys() == {"item"}  # whether weights are finite, before they are saved


def test_a_small_model_is_quantized_and_evaluated_on_the_gpu():
    parts = ["build", "calibrate", "quantize", "score"]
    results = simulate("default", *TINY, "MIXER=backoff", "--parts", ",".join(parts))
    by_name = {r["name"]: r for r in results}
    assert sorted(by_name) == sorted(parts)
    # Calibration takes twice as many pieces as a compiled pass over the same tokens.
    waits = by_name["calibrate"]["waits"]
    assert [n for wait, n in waits.items() if wait.startswith("bincount")] == [2]


@pytest.mark.slow
def test_a_small_model_adapts_on_the_gpu():
    *_, step = simulate("default", *TINY, "MIXER=backoff", "--parts", "build,adapt,adapter_step")
    # 4 layer calls
    assert 500 < step["launches"] <= 580 and not step["waits"]


@pytest.mark.slow
def test_a_column_of_a_small_model_takes_few_launches():
    assert len(simulate("default", *TINY, "--parts", "build,calibrate,columns")) == 3


@pytest.mark.slow
def test_an_adapter_step_of_the_default_model_takes_few_launches():
    *_, step = simulate("default", "--full", "--parts", "build,adapter_step")
    assert 2_100 < step["launches"] <= 2_400 and not step["waits"]


TRAFFIC = """
from tests import gpu_sim as g
import json
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
gpu = g.SimulatedGpu(by_line=True)
with FakeTensorMode(), gpu:
    x, y = torch.empty(2, 100, device=g.DEVICE)
    gpu.reset()
    x + y
    x.add_(y)
    x.copy_(y)
    x.zero_()
    torch.mul(x, y, out=x)
    torch._foreach_lerp_([x, y], [y, x], 0.5)
    x.new_empty(50)
print(json.dumps({name.split()[0]: number for name, number in gpu.traffic.items()}))
"""


def test_what_an_operation_changes_in_place_is_counted_as_read_and_written():
    found = subprocess.run(
        [sys.executable, "-c", TRAFFIC], cwd=ROOT, check=True, capture_output=True
    )
    assert json.loads(found.stdout) == {  # x and y have 400 bytes each
        "add": 1200, "add_": 1200, "copy_": 800, "zero_": 400, "mul": 1200, "_foreach_lerp_": 2400,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_path_of_a_recipe_runs_on_the_gpu(recipe: str):
    names = [r["name"] for r in simulate(recipe)]
    assert names[0] == "build" and names[-1] == "step_cost" and len(names) == 15


NAMED = """
from tests import gpu_sim as g
path = g.recipe_path("Frontier")
assert path.parent.name == "2026-05-01_Frontier" and g.recipe_path(str(path)) == path
for name in ("TTT", "Fronteer", "records/track_10min_16mb"):  # several, none, a folder
    try:
        g.recipe_path(name)
    except SystemExit as error:
        print(error)
"""


def test_a_recipe_is_named_by_its_file_or_by_a_part_of_one_name():
    found = subprocess.run(
        [sys.executable, "-c", NAMED], cwd=ROOT, check=True, capture_output=True, text=True
    )
    lines = found.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        "RECIPE=TTT", "RECIPE=Fronteer", "RECIPE=records/track_10min_16mb",
    ]  # fmt: skip
    assert all("must be a file, or a part of" in x and "NaiveBaseline" in x for x in lines)


@pytest.mark.parametrize("recipe", ["default", "Frontier"])
def test_all_ranks_run_the_same_collectives(recipe: str):
    # Ranks have different numbers of documents and windows, or none.
    names = "step,loop,stages,warm_up,checkpoint,score,calibrate,adapt,uneven,step_cost"
    by_part = collections.defaultdict[str, list[Any]](list)
    options = ["--ranks", "0,1,2,3,4,5,6,7", "--parts", f"build,{names}"]
    for result in simulate(recipe, *TINY, "MIXER=backoff", *options):
        by_part[result["name"]].append(result["collectives"])
    assert by_part.pop("build") == [[]] * 8 and [*by_part] == names.split(",")
    for name, (first, *others) in by_part.items():
        assert first and others == [first] * 7, name


@pytest.mark.slow
@pytest.mark.parametrize("flash", ["flash_attn", "none"])
def test_every_path_runs_with_other_kernels(flash: str):
    assert simulate("default", "--flash", flash)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains_at_full_shape_in_the_memory_of_its_gpu(recipe: str):
    knobs = ["GPTQ_CALIBRATION_BATCHES=1", "--full"]
    results = simulate(recipe, *knobs, "--parts", "build,step,calibrate,score")
    assert max(r["peak_mib"] for r in results) < 78 * 1024
    (step,) = [r for r in results if r["name"] == "step"]
    assert sum(step["waits"].values()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("warm_start", ["1", "0"])
def test_adapters_of_long_documents_fit_in_the_memory_of_a_gpu(warm_start: str):
    knobs = [f"TTT_WARM_START_A={warm_start}", "--full"]
    _, adapted = simulate("Frontier", *knobs, "--parts", "build,long_documents")
    print(f"TTT_WARM_START_A={warm_start}: {adapted['peak_mib'] / 1024:.1f} GiB")
    # All rows in one micro-batch would take 70 GiB; without the longest chunk it would be 18.
    assert 26 * 1024 < adapted["peak_mib"] < 60 * 1024


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
def test_the_report_of_a_small_step(tmp_path: Path):
    command = [sys.executable, "-m", "tests.gpu_report", "default", "--small", "--out"]
    subprocess.run([*command, str(tmp_path / "report.md")], cwd=ROOT, check=True)
    text = (tmp_path / "report.md").read_text()
    for kind in ("pointwise", "product", "flash forward", "flash backward", "optimizer"):
        assert f"\n| {kind} |" in text
    assert "computed" in text.lower() and (tmp_path / "report.png").stat().st_size > 1000


COLUMNS = """
from tests import gpu_report as r
import sympy
from torch._inductor.dependencies import MemoryDep
from torch.utils._sympy.functions import FloorDiv, Identity
t, h, e = sympy.symbols("t h e", integer=True)
def columns(index, size=(6, 4, 8)):
    found = sorted(r.columns_of(MemoryDep("x", index, (t, h, e), size), 64))
    return found == [*range(found[0], found[-1] + 1)] and (found[0], found[-1] + 1)
print([
    columns(64 * t + 8 * h + e + 16),
    columns(64 * t + 8 * FloorDiv(h, 2) + e + 16),
    columns(64 * t + 8 * h + Identity(e - 2) + 18),
    columns(64 * Identity(Identity(t)) + 8 * Identity(Identity(h)) + e + 16),
    columns(64 * t + e, (6, 1, 3)),
    columns(e, (6, 4, 8)),
])
"""


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
def test_only_the_columns_that_a_kernel_reads_are_counted():
    command = [sys.executable, "-c", COLUMNS]
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert found.strip() == "[(16, 48), (16, 32), (16, 48), (16, 48), (0, 3), (0, 8)]"


@pytest.mark.parametrize("fails", [False, True])
def test_quantization_runs_without_a_cuda_graph_where_it_cannot_be_captured(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *, fails: bool
):
    buffer: Any = types.SimpleNamespace(is_cuda=True)

    def make_graphed_callables(function: Any, buffers: Any) -> Any:
        assert buffers == (buffer,)
        if fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        return abs

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_graphed_callables)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    train_gpt.warn_once.cache_clear()
    made = [train_gpt.as_cuda_graph(max, buffer) for _ in range(2)]
    assert made == [max if fails else abs] * 2
    assert capfd.readouterr().err.count("no CUDA graphs") == fails
    assert train_gpt.as_cuda_graph(max, torch.zeros(1)) is max


@pytest.mark.slow
def test_the_memory_of_all_stages_of_a_small_run():
    command = [sys.executable, "-m", "tests.gpu_stages", "default", *TINY, "--small"]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for stage in ("training, not compiled", "calibration", "quantization, trellis", "adapters"):
        assert f"\n| {stage}" in output
    assert (
        "| 1 x 512 x 64 | 10 | 79 |" in output
        and "| GPU memory, GiB | 80 | 24 | 16 | 8 |" in output
    )


# --- FlashAttention's calling conventions --------------------------------------------------------


def stub_backend(module: str) -> AttentionBackend:
    attend = functools.partial(train_gpt.flash_attend, flash_module(module))
    return AttentionBackend("stub", train_gpt.flash_cu_seqlens, attend)


@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("module", ["flash_attn", "flash_attn_interface", "flash_attn.cute"])
def test_each_flash_attention_is_called_as_its_signature_says(
    module: str, *, isolate: bool, past: int
):
    backend, ids_BT = stub_backend(module), torch.full((2, 8), train_gpt.BOS_ID)
    q = torch.randn(2, 8, 4, 8, dtype=torch.bfloat16)
    k = torch.randn(2, 8 + past, 2, 8, dtype=torch.bfloat16)
    mask = backend.prepare(ids_BT, isolate, past)
    assert backend.attend(q, k, k.clone(), mask).shape == q.shape


FLASH_MODULES = ["flash_attn", "flash_attn_interface", "flash_attn.cute"]


@pytest.mark.parametrize("module", [*FLASH_MODULES, "flex", "sdpa"])
def test_every_block_is_one_graph(module: str):
    flash = module.startswith("flash")
    backend = stub_backend(module) if flash else train_gpt.ATTENTION_BACKENDS[module]()
    cfg = tiny_config(
        num_layers=2, isolate_documents=True, xsa_last_n=1, model_dim=64, attn_gate="head"
    )
    model = GPT(cfg, backend, torch.bfloat16 if flash else torch.float32)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.run_block = torch.compile(
        train_gpt.run_block, backend="eager", dynamic=False, fullgraph=True
    )
    ids_BT = torch.randint(cfg.vocab_size, (2, 16))
    with contextlib.nullcontext() if module != "flex" else torch.no_grad():
        loss = model.loss(ids_BT, ids_BT)
    if module != "flex":  # which has no gradients on a CPU
        loss.backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]


def compiles(_: Tensor) -> bool:
    return torch.compiler.is_compiling()


def test_the_graph_for_a_gpu_has_the_gradients_of_the_model(monkeypatch: pytest.MonkeyPatch):
    cfg = tiny_config(
        num_layers=4, xsa_last_n=2, attn_gate="sparse", ln_scale=True, num_loops=1, loop_start=1,
        loop_end=2, parallel_residual="lanes", parallel_start_layer=2, leaky_slope=0.5,
    )  # fmt: skip
    model, gradients = random_model(cfg), []
    torch._dynamo.reset()
    whole = torch.compile(GPT.forward, backend="aot_eager", dynamic=False, fullgraph=True)
    ids_BT = torch.randint(2, cfg.vocab_size, (2, 16))
    for forward in (None, functools.partial(whole, model)):
        model.zero_grad(set_to_none=True)
        model.loss(ids_BT, ids_BT.roll(-1, 1), forward=forward).backward()
        named = model.named_parameters()
        gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        monkeypatch.setattr(train_gpt, "is_compiled_for_gpu", compiles)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    # Block by block, as in evaluation: without gradients, and with those of some blocks.
    model.run_block = torch.compile(train_gpt.run_block, backend="aot_eager", fullgraph=True)
    model.blocks[:2].requires_grad_(False)
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        loss = model.loss(ids_BT, ids_BT.roll(-1, 1))
    again = model.loss(ids_BT, ids_BT.roll(-1, 1))
    again.backward()
    torch.testing.assert_close(again.detach(), loss, rtol=1e-6, atol=0)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert not any(name.startswith(("blocks.0.", "blocks.1.")) for name in found)
    expected = {name: gradients[0][name] for name in found}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "form",
    ["lanes", *(pytest.param(f, marks=slow) for f in ("none", "stream", "merge", "routed"))],
)
@pytest.mark.parametrize("for_gpu", [False, True])
def test_the_forward_pass_of_training_is_one_graph_for_all_numbers_of_documents(
    form: str, monkeypatch: pytest.MonkeyPatch, *, for_gpu: bool
):
    if for_gpu:
        monkeypatch.setattr(train_gpt, "is_compiled_for_gpu", compiles)
    cfg = tiny_config(
        num_layers=4, isolate_documents=True, xsa_last_n=1, model_dim=64, attn_gate="head",
        num_loops=1, loop_start=1, loop_end=2, parallel_residual=form, parallel_start_layer=2,
    )  # fmt: skip
    model = GPT(cfg, stub_backend("flash_attn_interface"), torch.bfloat16)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    whole = torch.compile(GPT.forward, backend="eager", dynamic=False, fullgraph=True)
    model.train_forward = functools.partial(whole, model)
    ids_BT = torch.randint(2, cfg.vocab_size, (2, 16))
    for length in (64, 128, 256):
        mask = torch.full((length,), 32, dtype=torch.int32)
        torch._dynamo.maybe_mark_dynamic(mask, 0)  # as Trainer.accumulate_gradients does
        model.loss(ids_BT, ids_BT, mask=mask, forward=model.train_forward).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_only_training_calls_the_forward_pass_that_is_compiled_as_a_whole(make_run: MakeRun):
    run, calls = make_run(num_layers=1, quantizer="gptq"), list[Any]()
    model = GPT(run.cfg, train_gpt.sdpa_backend(), torch.float32)

    def whole(ids_BT: Tensor, mask: Any) -> Tensor:
        calls.append(mask)
        return model(ids_BT, mask=mask)

    model.train_forward = whole
    window_BT = torch.randint(run.cfg.vocab_size, (2, 33))
    train_gpt.CalibrationStats(model).accumulate(window_BT)
    model.eval_nll(window_BT[:, :-1], window_BT[:, 1:])
    assert calls == []
    train_gpt.Trainer(run, model).accumulate_gradients(window_BT)
    assert calls == [None]


def test_adapters_do_not_compile_flex_attention_for_each_length(make_run: MakeRun):
    run = make_run(ttt_method="lora", ttt_chunk_size=8, num_layers=1)
    flex = train_gpt.ATTENTION_BACKENDS["flex"]()
    model = GPT(run.cfg, flex, torch.float32)
    with train_gpt.restore_model_after(run.cfg, model):
        assert model.prepare_mask is train_gpt.sdpa_mask
    assert model.prepare_mask is train_gpt.flex_block_mask
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 9, 2, 8)
    for past, keys in ((6, k), (0, k[:, :3])):
        mask = train_gpt.sdpa_mask(torch.ones(2, 3), False, past)
        # Without its kernel: None would raise an error.
        found = train_gpt.flex_attend(None, q, keys, keys, mask)
        assert torch.equal(found, train_gpt.sdpa_attend(q, keys, keys, mask))


def test_calibration_does_not_compile_flex_attention_within_the_training_time(make_run: MakeRun):
    run = make_run(num_layers=1, quantizer="gptq", isolate_documents=True)
    window_BT, sums = torch.randint(run.cfg.vocab_size, (2, 33)), []
    for name in ("sdpa", "flex"):
        torch.manual_seed(0)
        model = GPT(run.cfg, train_gpt.ATTENTION_BACKENDS[name](), torch.float32)
        prepare, stats = model.prepare_mask, train_gpt.CalibrationStats(model)
        stats.accumulate(window_BT)  # flex attention has no gradients on a CPU
        assert model.prepare_mask is prepare
        sums.append(stats.sums)
    assert sums[0].keys() == sums[1].keys()
    assert all(torch.equal(sums[0][key], sums[1][key]) for key in sums[0])


# --- Memory, traffic, errors ---------------------------------------------------------------------


class WholeSums(TorchDispatchMode):
    """Counts sums of a tensor of at least `size` numbers over more than one dimension."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.found = size, 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket is torch.ops.aten.sum and args[0].numel() >= self.size:
            self.found += result.dim() < args[0].dim() - 1
        return result


def test_the_loss_sums_rows_of_logits_first():
    # A sum over both dimensions at once would write out a float32 tensor as large as the logits.
    z_NV, target_N = torch.randn(6, 50), torch.arange(6)
    with WholeSums(300) as mode:
        softcapped_cross_entropy(z_NV, target_N, torch.ones(6), torch.tensor([20.0, 30.0]))
    assert mode.found == 0
    with WholeSums(300) as mode:
        z_NV.sum()
    assert mode.found == 1


def test_reduced_gradients_are_aligned_and_the_scalar_comes_last(make_run: MakeRun):
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in [(4, 8), (8,), (3,)]]
    for param in params:
        param.grad = torch.randn_like(param)
    expected = [param.grad.clone() for param in params if param.grad is not None]
    flat = train_gpt.all_reduce_gradients(make_run(), torch.tensor(7.0), params)
    assert flat[-1] == 7 and len(flat) == 32 + 8 + 3 + 1
    for param, grad in zip(params, expected, strict=True):
        assert param.grad is not None and torch.equal(param.grad, grad)
        assert param.grad.data_ptr() % 16 == 0


def test_after_an_error_the_process_group_is_not_destroyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # destroy_process_group could wait for ranks that are in a collective.
    destroyed: list[int] = []
    monkeypatch.setattr(train_gpt, "join_process_group", lambda backend: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: destroyed.append(1))
    monkeypatch.setattr(Run, "broadcast_object", lambda self, value: value)
    monkeypatch.setattr(train_gpt, "check_same_on_ranks", lambda run, **_: None)
    cfg = tiny_config(run_dir=str(tmp_path / "run"))
    env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    with pytest.raises(torch.OutOfMemoryError), train_gpt.start_run(cfg, env):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert destroyed == []
    with train_gpt.start_run(cfg, env):
        pass
    assert destroyed == [1]


def test_lengths_counted_on_the_host_are_those_of_the_device(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    run, masks = make_run(isolate_documents=True, num_layers=1, model_dim=64), list[Tensor]()
    model = GPT(run.cfg, stub_backend("flash_attn"), torch.bfloat16)
    trainer = train_gpt.Trainer(run, model)
    block_inputs = GPT.block_inputs

    def noted(self: GPT, ids_BT: Tensor, *args: Any) -> Any:
        given = block_inputs(self, ids_BT, *args)
        masks.append(given.mask)
        assert torch.equal(given.mask, train_gpt.flash_cu_seqlens(ids_BT, True))
        return given

    monkeypatch.setattr(GPT, "block_inputs", noted)
    window_BT = torch.randint(run.cfg.vocab_size, (16, 33))
    window_BT[3, 7] = train_gpt.BOS_ID
    model.prepare_mask = None  # type: ignore[assignment]  # is not called
    trainer.accumulate_gradients(window_BT)
    assert len(masks) == 2  # micro-batches


# --- Adapter steps without compilation ----------------------------------------------------------


def gradients(function: Any, *inputs: Tensor) -> list[Tensor | None]:
    """The output of a function of tensors, and its gradients by those that have one."""
    inputs = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs)
    y, generator = function(*inputs), torch.Generator().manual_seed(1)
    y.backward(torch.randn(y.shape, generator=generator))
    return [y, *(x.grad for x in inputs)]


def test_rejection_has_the_gradients_of_its_formula():
    y, v = torch.randn(2, 3, 2, 4, 8), torch.randn(2, 3, 2, 1, 8)
    v[0, 0] = 0
    inputs = y.requires_grad_(), v.requires_grad_()
    found = gradients(train_gpt.Rejection.apply, *inputs)
    expected = gradients(lambda y, v: train_gpt.reject(y, v)[0], *inputs)
    assert len(found) == 3
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rows", [3, 2])
def test_the_adapted_product_is_that_of_the_layer_and_its_adapter(rows: int):
    adapter = train_gpt.BatchedLoRA(torch.randn(2, 6), 3, 5, alpha=3.0)
    torch.nn.init.normal_(adapter.up_BRO)
    adapter.first_row = 3 - rows
    x_BTI, weight_OI, outcomes = torch.randn(rows, 4, 6).requires_grad_(), torch.randn(5, 6), []
    for function in (
        lambda x: adapter(x, None, weight_OI),
        lambda x: adapter(x, torch.nn.functional.linear(x, weight_OI)),
    ):
        adapter.zero_grad()
        outcomes.append(gradients(function, x_BTI) + [p.grad for p in adapter.parameters()])
    torch.testing.assert_close(*outcomes)


def test_the_formulas_of_a_gpu_without_compilation_give_the_same_numbers(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    run, outcomes = make_run(ttt_method="lora", ttt_chunk_size=8, xsa_last_n=1, rope_dims=4), []
    ids_BT = torch.randint(run.cfg.vocab_size, (2, 12))
    batch = train_gpt.Batch(ids_BT, ids_BT, 0, None, torch.ones(2, 12))
    for on_gpu in (False, True):
        monkeypatch.setattr(train_gpt, "is_eager_on_gpu", lambda x, on_gpu=on_gpu: on_gpu)
        trainer = train_gpt.AdapterTrainer(run, random_model(run.cfg), 2)
        outcomes.append([trainer.step(batch, 2) for _ in range(3)])
    assert torch.equal(outcomes[0][0], outcomes[1][0])  # before any gradient
    torch.testing.assert_close(*outcomes, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(outcomes[0][0], outcomes[0][2], atol=0.1)


def test_adapter_steps_compile_no_graphs(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch):
    # Chunks have too many different numbers of keys.
    run = make_run(ttt_method="lora", ttt_context="incremental", ttt_chunk_size=8)
    model, graphs, num_keys = random_model(run.cfg), list[Any](), list[int]()

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    model.compile_()
    ids_BT = torch.randint(2, run.cfg.vocab_size, (2, 8))
    batch = train_gpt.Batch(ids_BT, ids_BT.roll(-1, 1), 0, None, torch.ones(2, 8))
    model.eval_nll(*batch[:2])
    compiled = len(graphs)
    assert compiled > 1  # of blocks, and of the loss
    with train_gpt.restore_model_after(run.cfg, model):
        trainer = train_gpt.AdapterTrainer(run, model, 2)
        assert trainer.past is not None
        for _ in range(3):
            trainer.step(batch, 2)
            num_keys.append(trainer.past.length)
    assert num_keys == [8, 16, 24] and len(graphs) == compiled
    model.eval_nll(ids_BT[:, :7], ids_BT[:, :7])
    assert len(graphs) > compiled  # the model is compiled still


@pytest.mark.parametrize("phases", ["", "1"])
def test_a_pass_with_adapters_casts_the_weights_once(make_run: MakeRun, phases: str):
    run = make_run(ttt_method="lora", ttt_chunk_size=8, ttt_phases=phases, asym_logit_rescale=True)
    model = random_model(run.cfg, torch.bfloat16)
    before = {name: x.clone() for name, x in model.named_parameters()}
    with train_gpt.restore_model_after(run.cfg, model):
        kept = {name for name, x in model.named_parameters() if x.dtype == torch.float32}
        assert kept == (before.keys() if phases else {"caps", "skip_gates"} & before.keys())
        trainer = train_gpt.AdapterTrainer(run, model, 2)
        ids_BT = torch.randint(run.cfg.vocab_size, (2, 12))
        trainer.step(train_gpt.Batch(ids_BT, ids_BT, 0, None, torch.ones(2, 12)), 2)
        for param, copy in zip(trainer.params, trainer.copies, strict=True):
            assert param.dtype == torch.float32 and torch.equal(copy, param.bfloat16())
        assert all(param.abs().sum() > 0 for param in trainer.params)
    after = dict(model.named_parameters())
    assert all(torch.equal(x, after[name]) for name, x in before.items())


@pytest.mark.parametrize("learns", [0, 2, 5])
def test_adapters_in_micro_batches_equal_those_in_one(make_run: MakeRun, learns: int):
    outcomes = []
    for micro_rows in (5, 2):
        run = make_run(
            num_layers=2, ttt_method="lora", ttt_chunk_size=8, ttt_lora_rank=2,
            ttt_lora_targets="q,mlp,head", ttt_grad_steps=2, micro_batch_tokens=12 * micro_rows,
        )  # fmt: skip
        model = random_model(run.cfg)
        trainer = train_gpt.AdapterTrainer(run, model, 5)
        generator, shapes = torch.Generator().manual_seed(1), []
        ids_BT = torch.randint(run.cfg.vocab_size, (5, 12), generator=generator)
        batch = train_gpt.Batch(ids_BT, ids_BT.roll(-1, 1), 3, None, torch.ones(5, 12))
        forward = model.token_nll

        def noted(ids_BT: Tensor, *args: Any, forward: Any = forward, **more: Any) -> Any:
            shapes.append(len(ids_BT))  # noqa: B023
            return forward(ids_BT, *args, **more)

        model.token_nll = noted  # type: ignore[method-assign]
        scores = [trainer.step(batch, learns) for _ in range(2)]
        outcomes.append([*scores, *[param.detach() for param in trainer.params]])
        assert max(shapes) == micro_rows
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
