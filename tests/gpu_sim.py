"""A simulated GPU: runs the script's CUDA paths with FakeTensors on cuda:0, without a GPU.

Shapes, dtypes and devices are those of a real run; numbers do not exist. An operation on tensors of
different devices raises an error, as on a GPU. Counted are kernel launches, device memory, and what
the host must wait for (`.item()`, nonzero, boolean masks, copies to the host), by line of the
script. Collectives go to PyTorch's fake process group of 8 ranks.

    python -m tests.gpu_sim [RECIPE] [--full] [--parts step,score] [--rank R] [KNOB=value ...]

It changes PyTorch as a whole, so that tests run it as a program.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import subprocess
import sys
import tempfile
import time
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "records/track_10min_16mb"


def load_cuda_guard() -> None:
    """Compile cuda_guard.cpp once per torch installation, and load it; before torch is imported."""
    source = Path(__file__).with_name("cuda_guard.cpp")
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None, "torch is not installed"
    root = Path(spec.origin).parent
    # The library holds the path of torch's own libraries.
    contents = source.read_bytes() + (root / "version.py").read_bytes() + bytes(root)
    key = hashlib.sha256(contents).hexdigest()
    library = Path(tempfile.gettempdir()) / f"cuda_guard_{key[:12]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / library.name
            command = ["g++", "-O0", "-shared", "-fPIC", "-std=c++20", f"-I{root}/include"]
            command += [str(source), "-o", str(built), f"-L{root}/lib", "-lc10", "-ltorch_cpu"]
            subprocess.run([*command, f"-Wl,-rpath,{root}/lib"], check=True)
            built.rename(library)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


load_cuda_guard()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed._tools.fake_collectives  # noqa: E402, F401
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_iter  # noqa: E402

import train_gpt as t  # noqa: E402
from tests.flash_stubs import flash_module  # noqa: E402

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)
WORLD_SIZE = 8
# An H100 and other cards, for what is computed from a simulation.
BYTES_PER_S = 2.8e12  # that kernels reach
CARDS_GIB = (80, 24, 16, 8)
RESERVED_GB = 2.0  # CUDA context, communication buffers, fragmentation
# Views launch no kernel; most of them are marked as such in the operators' schemas.
ALLOCATIONS = {
    aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default,
    aten.new_empty.default,
}  # fmt: skip
OVERWRITES = {aten.copy_, aten.zero_, aten.fill_}
PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm}
OTHER_VIEWS = {aten._unsafe_view.default, aten.detach.default, torch.ops.prim.device.default}


def script_line() -> str:
    """Line and function of the script that runs now."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == t.__file__:
            return f"{frame.f_code.co_name}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside"


def is_on_gpu(x: Any) -> bool:
    return isinstance(x, FakeTensor) and x.device.type == "cuda"


def tensors_of(values: Any) -> list[Tensor]:
    return [x for x in tree_iter(values) if isinstance(x, Tensor)]


def is_view(function: Any) -> bool:
    return bool(getattr(function, "is_view", False)) or function in OTHER_VIEWS


class SimulatedGpu(TorchDispatchMode):
    """Counts what happens on cuda:0, and answers what only data could say."""

    def __init__(self, by_line: bool = False) -> None:
        super().__init__()
        self.sizes: dict[int, tuple[Any, int]] = {}  # by id of a storage: weak reference, bytes
        self.live, self.by_line = 0, by_line
        self.capturing = False  # a CUDA graph
        self.reset()

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # otherwise Dynamo would compile nothing

    def reset(self) -> None:
        """Start to count again; tensors that exist stay in memory."""
        self.launches, self.peak = 0, self.live
        self.graph_kernels = 0  # of CUDA graphs, each of which is one launch
        self.waits: collections.Counter[str] = collections.Counter()
        # By operation and line of the script, if `by_line`: bytes, FLOPs of products, launches.
        self.traffic: collections.Counter[str] = collections.Counter()
        self.flops: collections.Counter[str] = collections.Counter()
        self.launches_of: collections.Counter[str] = collections.Counter()
        self.collectives: list[str] = []

    def wait(self, kind: str) -> None:
        if self.capturing:
            raise RuntimeError(f"operation not permitted when stream is capturing: {kind}")
        self.waits[f"{kind} {script_line()}"] += 1

    def release(self, key: int) -> None:
        self.live -= self.sizes.pop(key)[1]

    def track(self, result: Any) -> None:
        """Add the storages of new tensors to the memory in use."""
        for x in filter(is_on_gpu, tree_iter(result)):
            storage = x.untyped_storage()
            known = self.sizes.get(id(storage))
            if known is None or known[0]() is not storage:
                size = -(-storage.nbytes() // 512) * 512  # PyTorch's allocator rounds up
                self.sizes[id(storage)] = weakref.ref(storage), size
                weakref.finalize(storage, self.release, id(storage))
                self.live += size
                self.peak = max(self.peak, self.live)

    def make_graphed_callables(self, function: Any, buffers: tuple[Tensor, ...]) -> Any:
        """In place of PyTorch's: a call copies its arguments, and is one launch."""

        def replay(*args: Tensor) -> Any:
            for buffer, x in zip(buffers, args, strict=True):
                assert buffer.shape == x.shape and buffer.dtype == x.dtype
                buffer.copy_(x)
            before, self.capturing = self.launches, True
            try:
                return function(*buffers)
            finally:
                self.capturing = False
                self.graph_kernels += self.launches - before
                self.launches = before + 1

        function(*buffers)  # warm-up, which may fill caches
        return replay

    @contextlib.contextmanager
    def capture(self, graph: SimulatedGraph, *_: Any, **__: Any) -> Iterator[None]:
        """In place of torch.cuda.graph: the launches become those of the graph."""
        before, self.capturing = self.launches, True
        try:
            yield
        finally:
            self.capturing = False
            graph.kernels, self.launches = self.launches - before, before

    def data_dependent(self, function: Any, args: Any, kwargs: Any) -> Any:
        """A stand-in for the result of an operation whose result depends on data, or None."""
        x: Any = args[0] if args else None
        if function is aten._local_scalar_dense.default:
            if is_on_gpu(x):
                self.wait("item")
            return True if x.dtype == torch.bool else 1.0 if x.is_floating_point() else 1
        if function is aten.nonzero.default:
            if is_on_gpu(x):
                self.wait("nonzero")
            return x.new_empty(max(1, x.numel() // 700), x.dim(), dtype=torch.int64)
        if function is aten.index.Tensor and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        ):
            ((first, mask),) = [(n, i) for n, i in enumerate(args[1]) if i is not None]
            assert mask.device == x.device, f"mask on {mask.device}, tensor on {x.device}"
            if is_on_gpu(x):
                self.wait("boolean index")
            number = len(mask) // 2 if len(mask) > 64 else len(mask) // 8 if first else 0
            return x.new_empty(*x.shape[:first], number, *x.shape[first + mask.dim() :])
        if function is aten.bincount.default:
            if is_on_gpu(x):
                self.wait("bincount")
            length = kwargs.get("minlength", args[2] if len(args) > 2 else 0)
            return x.new_empty(length, dtype=torch.int64)
        return None

    def count(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Count an operation that involves the GPU."""
        is_read = function is aten._to_copy.default and is_on_gpu(args[0])
        if is_read and not is_on_gpu(result) and not kwargs.get("non_blocking"):
            self.wait("copy to host")
        if function is aten.copy_.default and is_on_gpu(args[1]) and not is_on_gpu(args[0]):
            self.wait("copy to host")
        is_copy = function in (aten._to_copy.default, aten.copy_.default)
        from_host = is_copy and any(x.device.type == "cpu" for x in tensors_of(args))
        is_queued = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        if from_host and is_on_gpu(result) and (self.capturing or not is_queued):
            self.wait("copy from host")
        if function.namespace == "c10d":
            tensors = tensors_of(args)
            shapes = [(*x.shape,) for x in tensors if x.dim() or len(tensors) == 1]
            dtype = str(tensors[0].dtype).removeprefix("torch.")
            self.collectives.append(f"{function.overloadpacket.__name__} {dtype} {shapes}")
        elif not is_view(function):
            if function not in ALLOCATIONS:
                self.launches += 1
                if self.by_line:
                    self.count_by_line(function, args, result)

    def count_by_line(self, function: Any, args: Any, result: Any) -> None:
        """Add the bytes and FLOPs of an operation to those of its line."""
        name = f"{function.overloadpacket.__name__} {script_line()}"
        written: Any = result
        if function._schema.is_mutable:  # changed in place, and read as well by most
            arguments = zip(function._schema.arguments, args, strict=False)
            written = [x for at, x in arguments if at.alias_info and at.alias_info.is_write]
            written = () if function.overloadpacket in OVERWRITES else written or result
        for x in filter(is_on_gpu, [*tree_iter(args), *tree_iter(written)]):
            self.traffic[name] += bytes_of(x)
        self.launches_of[name] += 1
        if function.overloadpacket in PRODUCTS:
            a, b = [x for x in args if isinstance(x, Tensor)][-2:]
            self.flops[name] += 2 * a.numel() * b.size(-1)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = self.data_dependent(function, args, kwargs or {})
        if result is None:
            result = function(*args, **(kwargs or {}))
        if any(map(is_on_gpu, tree_iter((args, kwargs, result)))):
            self.count(function, args, kwargs or {}, result)
            self.track(result)
        return result


class SimulatedGraph:
    """torch.cuda.CUDAGraph: a replay is one launch."""

    kernels = 0

    def pool(self) -> tuple[int, int]:
        return 0, 0

    def replay(self) -> None:
        active_gpus[-1].launches += 1
        active_gpus[-1].graph_kernels += self.kernels


class SimulatedEvent:
    """torch.cuda.Event: a wait for it leaves the GPU idle if nothing was queued since."""

    def record(self) -> None:
        self.launches = active_gpus[-1].launches

    def synchronize(self) -> None:
        gpu = active_gpus[-1]
        gpu.wait("event, idle" if gpu.launches == self.launches else "event, busy")


def bytes_of(x: Tensor) -> int:
    """Bytes of a tensor's distinct elements; expanded dimensions count once."""
    size = x.element_size()
    for length, stride in zip(x.shape, x.stride(), strict=True):
        size *= length if stride or not length else 1
    return size


# --- What FakeTensors lack -----------------------------------------------------------------------

real_numpy, real_tolist = torch.Tensor.numpy, torch.Tensor.tolist
NUMPY_DTYPES = {
    torch.float64: np.float64, torch.float32: np.float32, torch.float16: np.float16,
    torch.int64: np.int64, torch.int32: np.int32, torch.int16: np.int16, torch.int8: np.int8,
    torch.bool: np.bool_,
}  # fmt: skip


def fake_numpy(x: Tensor, **options: Any) -> np.ndarray:
    """Zeros; the same errors as a real tensor's `numpy`."""
    if not isinstance(x, FakeTensor):
        return real_numpy(x, **options)
    if x.device.type == "cuda":
        raise TypeError("can't convert cuda:0 device type tensor to numpy")
    if x.requires_grad:
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.")
    return np.zeros(tuple(x.shape), dtype=NUMPY_DTYPES[x.dtype])


def fake_tolist(x: Tensor) -> Any:
    """Zeros as nested lists; a wait if the tensor is on the GPU."""
    if not isinstance(x, FakeTensor):
        return real_tolist(x)
    gpu = next(m for m in reversed(active_gpus) if m)
    if x.device.type == "cuda":
        gpu.wait("tolist")
    return np.zeros(tuple(x.shape), dtype=float if x.is_floating_point() else int).tolist()


def replace_tensors(module: nn.Module, function: Callable[[Tensor], Tensor]) -> nn.Module:
    """nn.Module._apply that makes new parameters: those of FakeTensors cannot be swapped."""
    done: dict[Any, nn.Parameter] = {}
    for part in module.modules():
        params = {name: param for name, param in part._parameters.items() if param is not None}
        for name, param in params.items():
            if param not in done:
                done[param] = nn.Parameter(function(param.detach()), param.requires_grad)
            part._parameters[name] = done[param]
        buffers = {name: buffer for name, buffer in part._buffers.items() if buffer is not None}
        for name, buffer in buffers.items():
            persistent = name not in part._non_persistent_buffers_set
            part._buffers[name] = nn.Buffer(function(buffer), persistent=persistent)
    return module


real_rms_norm = nn.functional.rms_norm


class FusedRmsNorm(torch.autograd.Function):
    """RMSNorm in one kernel forward and one backward, as CUDA builds of PyTorch have it.

    FakeTensors would take the formula, which is many kernels.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y, rstd = rms_norm_forward(x)
        ctx.save_for_backward(x, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return rms_norm_backward(grad, *ctx.saved_tensors)


@torch.library.custom_op("gpu_sim::rms_norm_forward", mutates_args=())
def rms_norm_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


@torch.library.custom_op("gpu_sim::rms_norm_backward", mutates_args=())
def rms_norm_backward(grad: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    return torch.empty_like(x)


rms_norm_forward.register_fake(rms_norm_forward._init_fn)
rms_norm_backward.register_fake(rms_norm_backward._init_fn)


def fused_rms_norm(x: Tensor, shape: Any) -> Tensor:
    """F.rms_norm; compiled graphs have the formula, which Inductor fuses."""
    if torch.compiler.is_compiling() or not is_on_gpu(x):
        return real_rms_norm(x, shape)
    return FusedRmsNorm.apply(x)


active_gpus: list[SimulatedGpu] = []


@contextlib.contextmanager
def patched(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Context in which attributes of objects have other values: (object, name, value)."""
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in saved:
            setattr(owner, name, value)


@contextlib.contextmanager
def simulated_gpu(
    flash: str = "flash_attn_interface", by_line: bool = False
) -> Iterator[SimulatedGpu]:
    """Context with FakeTensors, one Hopper GPU, and the FlashAttention module `flash` or none."""
    mode, gpu = FakeTensorMode(allow_non_fake_inputs=True), SimulatedGpu(by_line)
    active_gpus.append(gpu)
    names = ["flash_attn", "flash_attn_interface", "kernels"]
    modules = {name: flash_module(name) if name == flash else None for name in names}
    changes = [
        (torch.Tensor, "numpy", fake_numpy),
        (torch.Tensor, "tolist", fake_tolist),
        (FakeTensor, "tolist", fake_tolist),
        (nn.Module, "_apply", replace_tensors),
        (nn.functional, "rms_norm", fused_rms_norm),
        (t, "attention_error", lambda *_: 0.0),  # the stand-ins have no numbers
        (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        (torch.cuda, "synchronize", lambda *_: None),
        (torch.cuda, "Event", SimulatedEvent),
        (torch.Tensor, "pin_memory", lambda x: x),
        (torch.cuda, "current_stream", lambda *_: None),
        (torch.cuda, "stream", contextlib.nullcontext),
        (torch.cuda, "make_graphed_callables", gpu.make_graphed_callables),
        (torch.cuda, "CUDAGraph", SimulatedGraph),
        (torch.cuda, "graph", gpu.capture),
        (torch.cuda, "max_memory_allocated", lambda *_: gpu.peak),
        (torch.cuda, "reset_peak_memory_stats", lambda *_: None),
    ]
    saved = {name: sys.modules.get(name) for name in names}
    sys.modules.update(modules)  # type: ignore[arg-type]
    try:
        with patched(*changes), mode, gpu:
            yield gpu
    finally:
        active_gpus.remove(gpu)
        for name, module in saved.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


# --- The paths of the script ---------------------------------------------------------------------

SMALL = {
    "NUM_LAYERS": "4", "MODEL_DIM": "64", "NUM_HEADS": "4", "NUM_KV_HEADS": "2",
    "VOCAB_SIZE": "512", "TRAIN_SEQ_LEN": "128", "TRAIN_BATCH_TOKENS": "2048",
    "MICRO_BATCH_TOKENS": "256", "VAL_BATCH_SIZE": "4096", "EVAL_SEQ_LEN": "160",
    "NGRAM_TABLE_BITS": "16", "TTT_BATCH_SIZE": "4", "TTT_LORA_RANK": "4",
    "TTT_CHUNK_TOKENS": "1280", "TTT_CHUNK_SIZE": "24", "HEDGE_MIN_TOKENS": "0",
    "GPTQ_CALIBRATION_BATCHES": "1",
}  # fmt: skip
# What the smaller depth needs where the knob is not 0.
SMALL_DEPTHS = {
    "loop_start": "1", "loop_end": "2", "num_loops": "1", "parallel_start_layer": "3",
    "xsa_last_n": "2", "ttt_freeze_blocks": "2", "ve_layers": "2,3", "bigram_vocab_size": "64",
    "trigram_vocab_size": "64", "rope_dims": "8", "eval_hash_rows": "64",
}  # fmt: skip


def recipe_path(name: str) -> Path:
    """The recipe file `name`, or that of the published system whose folder's name contains it."""
    if Path(name).is_file():
        return Path(name)
    paths = sorted(RECIPES.glob("*/run.env"))
    found = [path for path in paths if name in path.parent.name]
    if len(found) != 1:
        folders = ", ".join(path.parent.name for path in paths)
        sys.exit(f"RECIPE={name} must be a file, or a part of one of these names: {folders}")
    return found[0]


def simulated_config(recipe: str, small: bool, **knobs: str) -> t.Config:
    """The default configuration or a recipe, at full shape or small."""
    env = {"RECIPE": str(recipe_path(recipe))} if recipe != "default" else {}
    fixed = {"COMPILE": "0", "WARMUP_STEPS": "1", "ITERATIONS": "2", "MAX_WALLCLOCK_SECONDS": "0"}
    full = t.config_from_env({**env, "MODE": "describe"})
    if small:
        fixed |= SMALL
        used = {name: value for name, value in SMALL_DEPTHS.items() if getattr(full, name)}
        fixed |= {name.upper(): value for name, value in used.items()}
        fixed["ENABLE_LOOPING_AT"] = full.enable_looping_at.partition(",")[0]
        if full.ttt_phases:
            fixed["TTT_PHASES"] = "2"
    return t.config_from_env({**env, **fixed, **knobs})


@dataclasses.dataclass
class PartResult:
    """What one part of a run asked of the GPU."""

    name: str
    launches: int
    graph_kernels: int  # launched by CUDA graphs
    peak_mib: float
    waits: dict[str, int]
    collectives: list[str]
    error: str
    seconds: float


class SimulatedRun:
    """One rank's run, part by part; each part is a method whose name is in PARTS."""

    def __init__(self, cfg: t.Config, gpu: SimulatedGpu, directory: Path, rank: int = 0):
        self.gpu, self.cfg, self.results = gpu, cfg, list[PartResult]()
        self.run = t.Run(
            cfg=cfg, directory=directory, rank=rank, world_size=WORLD_SIZE, device=DEVICE,
            dtype=torch.bfloat16,
        )  # fmt: skip
        self.model: Any = None
        self.trainer: Any = None
        self.hessians: dict[str, t.KroneckerHessian] = {}

    def measure(self, name: str, part: Callable[[], Any]) -> None:
        """Run a part and note what it did, or how it failed."""
        self.gpu.reset()
        start_s, error = time.perf_counter(), ""
        try:
            part()
        except Exception as exception:
            error = f"{type(exception).__name__}: {exception} ({where_raised(exception)})"
        self.results.append(
            PartResult(
                name, self.gpu.launches, self.gpu.graph_kernels, self.gpu.peak / 2**20,
                dict(self.gpu.waits), list(self.gpu.collectives), error,
                round(time.perf_counter() - start_s, 1),
            )
        )  # fmt: skip

    def windows(self, stage: t.TrainStage) -> Tensor:
        """Random windows of this rank, on the host, as the loader gives them."""
        rows = stage.batch_tokens // stage.seq_len // WORLD_SIZE
        return torch.randint(self.cfg.vocab_size, (rows, stage.seq_len + 1))

    def read(self, position: int, seq_len: int, batch_tokens: int) -> Tensor:
        """In place of BatchLoader.read."""
        return self.windows(t.TrainStage(seq_len, batch_tokens, 0, False))

    def validation(self, num_targets: int, document_len: int) -> t.Validation:
        return self.documents(range(0, num_targets + 1, document_len), num_targets)

    def documents(self, starts: Iterable[int], num_targets: int) -> t.Validation:
        """A text whose documents begin at these positions."""
        ids = (2 + np.arange(num_targets + 1) % 200).astype(np.uint16)
        ids[[*starts]] = t.BOS_ID
        return t.Validation(ids, np.ones(num_targets, np.int64), False)

    def build(self) -> None:
        self.model = t.build_model(self.run)
        self.trainer = t.Trainer(self.run, self.model)

    def step(self) -> None:
        """The last stage's optimizer step, and the loss on the host as in train_loop."""
        stage = t.train_stages(self.cfg)[-1]
        self.trainer.enter_stage(stage)
        self.trainer.step(self.windows(stage)).item()

    def loop(self) -> None:
        """The script's training loop; without a checkpoint, as there are no numbers to save."""
        loader: Any = types.SimpleNamespace(batch=lambda _, stage: self.windows(stage))
        with patched((t, "save_checkpoint", lambda *_: None)):
            t.train_loop(self.trainer, loader, lambda: t.Score(1.0, 1, 1, False, 0.0))

    def stages(self) -> None:
        for stage in t.train_stages(self.cfg):
            self.trainer.enter_stage(stage)
            self.trainer.step(self.windows(stage)).item()

    def graphs(self) -> None:
        """The steps of all stages with their micro-batches as CUDA graphs, captured before."""
        self.trainer.start_graphs()
        self.stages()
        self.gpu.reset()
        self.stages()
        assert self.trainer.graphs, "a capture has failed"
        self.trainer.stop_graphs()

    def warm_up(self) -> None:
        self.trainer.warm_up()

    def checkpoint(self) -> None:
        self.trainer.muon.gather_buffers()
        saved = {name: x.cpu().clone() for name, x in self.trainer.tensors().items()}
        self.trainer.load(saved, t.Progress())

    def export(self) -> None:
        if self.cfg.averaging != "none":  # a simulated count is never 0
            self.trainer.averager.count += 1
            self.trainer.averager.export_()
        self.trainer.enter_stage(self.trainer.current_stage._replace(qat=False))

    def score(self) -> None:
        """Sliding windows over a short text."""
        length = 4 * self.cfg.score_seq_len * WORLD_SIZE
        stride = self.cfg.eval_stride or self.cfg.score_seq_len
        t.evaluate(self.run, self.model, self.validation(length, 100), stride)

    def calibrate(self) -> None:
        if self.cfg.quantizer == "gptq":
            loader: Any = self
            self.hessians = t.calibrate(self.run, self.model, loader, t.Progress())

    def quantize(self) -> None:
        """Quantization, with GPTQ on the first columns only; then reading back."""
        groups = t.group_matrices(self.cfg, self.model, self.hessians)
        with patched((t, "gptq", functools.partial(gptq_of_some_columns, t.gptq, 2))):
            tensors = t.quantize_model(self.cfg, self.model, groups)
        shapes = {name: x.shape for name, x in self.model.state_dict().items()}
        assert shapes.keys() == tensors.keys()
        weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
        self.model = t.build_model(self.run, weights)

    def columns(self) -> None:
        """A column of GPTQ, which must take few launches."""
        for cost in column_costs(self):
            assert cost.launches <= MAX_COLUMN_LAUNCHES, cost

    def adapt(self) -> None:
        """The adaptive pass: chunks with weights that train, or documents with adapters."""
        if not self.cfg.adapts:
            return
        length, document_len = 24 * WORLD_SIZE, 24
        if self.cfg.ttt_method != "lora":
            length, document_len = 4 * self.cfg.score_seq_len * WORLD_SIZE, 100
        text = self.validation(length, document_len)
        stride = self.cfg.eval_stride or self.cfg.score_seq_len
        t.evaluate(self.run, self.model, text, stride, adaptive=True)

    def uneven(self) -> None:
        """The adaptive pass within a time limit, of fewer documents than ranks, and of more.

        They have different lengths, and so ranks have different numbers of them, or none.
        """
        if not self.cfg.adapts:
            return
        for number in (3, 11 if self.cfg.ttt_method == "lora" else 27):
            ends = np.cumsum([20 + 16 * n % 64 for n in range(number)]).tolist()
            text, limit = self.documents([0, *ends], ends[-1]), t.TimeLimit(1e9)
            with patched((t, "PILOT_TARGETS", 300)):
                t.run_pass(self.run, self.model, text, "ttt", limit)

    def adapter_step(self) -> None:
        """The second chunk of all documents that are adapted side by side."""
        shape = self.cfg.ttt_batch_size, self.cfg.ttt_chunk_size
        ids_BT = torch.zeros(shape, dtype=torch.int64, device=DEVICE)
        batch = t.Batch(ids_BT, ids_BT, 0, None, torch.ones(shape, device=DEVICE))
        self.model.schedule = self.model.schedules[-1]
        with t.restore_model_after(self.cfg, self.model):
            trainer = t.AdapterTrainer(self.run, self.model, len(ids_BT))
            trainer.step(batch, len(ids_BT))
            self.gpu.reset()
            trainer.step(batch, len(ids_BT))

    def long_documents(self) -> None:
        """Two full batches of documents longer than the context: their first and last steps.

        After each of them the n-grams and the weights learn from 8 documents, if the recipe does
        so. Not for KV caches, which the steps between would fill: see gpu_stages.
        """
        cfg, planner, plan = self.cfg, t.EvalPlanner(self.cfg, 0, 1), list[t.EvalStep]()
        assert cfg.ttt_method == "lora" and cfg.ttt_context != "incremental"
        self.trainer, self.hessians = None, {}
        rows, document_len = cfg.ttt_batch_size, cfg.score_seq_len + cfg.ttt_chunk_size
        text = self.validation(2 * rows * document_len, document_len)
        documents = [*itertools.pairwise(t.document_bounds(text.ids))]
        for batch in (documents[:rows], documents[rows:]):
            steps, span = planner.plan_document_batch(batch), (batch[0][0], batch[:8][-1][1])
            assert [step.shape for step in steps[-2:-1]] == [(rows, cfg.score_seq_len)]
            plan += [steps[0], *steps[-2:]]
            if cfg.needs_mixer and not cfg.mixes_afterwards:
                plan.append(t.EvalStep("update_ngrams", text=span))
            if cfg.ttt_phases:
                plan += planner.plan_training(span, 0, 2, resets=True)[:2]
        self.model.use_final_schedule()
        with t.restore_model_after(cfg, self.model):
            t.EvalRunner(self.run, self.model, text, plan, adaptive=True).run_steps()

    def generate(self) -> None:
        """MODE=generate with a full context: the first forward pass reads it, the others a token.

        The artifact's model has this model's shape; the kernel is that of generation.
        """
        context, cache_lengths, shapes = self.cfg.score_seq_len, list[int](), list[Any]()
        forward = t.GPT.logits

        def noted(model: t.GPT, ids_BT: Tensor, past: t.KVCache) -> Tensor:
            logits = forward(model, ids_BT, past)
            shapes.append((*ids_BT.shape,))
            cache_lengths.extend({pair[0].size(1) for pair in pairs_of(past)})
            return logits

        def read_artifact(path: Path, run: t.Run, _: str) -> t.GPT:
            run.cfg = dataclasses.replace(run.cfg, **{k: getattr(cfg, k) for k in t.STORED_KNOBS})
            return t.build_model(run, weights)

        cfg = self.cfg
        weights = {name: torch.zeros(x.shape) for name, x in self.model.state_dict().items()}
        mode = dataclasses.replace(cfg, mode="generate", max_new_tokens=4)
        processor: Any = types.SimpleNamespace(
            encode=lambda text: [2] * (context - 2), decode=lambda ids: f"{len(ids)} tokens"
        )
        artifact, changes = (
            self.run.directory / "artifact",
            [
                (t.GPT, "logits", noted),
                (t, "read_artifact", read_artifact),
                (t, "decode_header", lambda payload: ({}, b"")),
                (t, "BOS_ID", 0),  # an item of a FakeTensor is 1, which would end the text
            ],
        )
        artifact.write_bytes(b"")
        with patched(*changes), contextlib.redirect_stdout(io.StringIO()) as shown:
            t.generate(dataclasses.replace(self.run, cfg=mode), artifact, processor, "")
        assert shapes == [(1, context - 1), (1, 1), (1, 1), (1, 1)], shapes
        assert cache_lengths == [context - 1, context, context, context], cache_lengths
        printed = f"{context - 1 + 4} tokens\n" if self.run.is_rank0 else ""
        assert shown.getvalue() == printed, shown.getvalue()

    def step_cost(self) -> None:
        """The measurement of a step's cost before the passes."""
        if not self.cfg.adapts:
            return
        text = self.validation(24 * WORLD_SIZE, 24)
        plan = t.plan_adaptive(t.EvalPlanner(self.cfg, self.run.rank, WORLD_SIZE), text.ids)
        with t.restore_model_after(self.cfg, self.model):
            t.measure_step_cost(self.run, self.model, plan, adaptive=True)


PARTS = (
    "build", "step", "stages", "graphs", "warm_up", "checkpoint", "export", "score", "calibrate",
    "quantize", "columns", "generate", "adapt", "uneven", "step_cost",
)  # fmt: skip


def where_raised(error: BaseException) -> str:
    """The script's line from which an error came."""
    place, trace = "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == t.__file__:
            place = f"{trace.tb_frame.f_code.co_name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def gptq_of_some_columns(
    gptq: Any, n: int, weight: Tensor, factor: Any, row: Tensor, column: Tensor, rounding: Any
) -> Tensor:
    """GPTQ on the first n columns: every operation, and few of the same columns."""
    L = len(weight)
    order_LI = torch.arange(n, device=weight.device).expand(L, n)
    some = t.HessianFactor(
        order_LI,
        factor.upper_LII[:, :n, :n],
        factor.alive_LI[:, :n],
        factor.upper_diagonal_LI[:, :n],
    )
    codes = gptq(weight[:, :, :n], some, row, column[:, :n], rounding)
    return nn.functional.pad(codes, (0, weight.size(2) - n))


MAX_COLUMN_LAUNCHES = 10


@dataclasses.dataclass
class ColumnCost:
    """What GPTQ does for one more column of a group of matrices."""

    shape: tuple[int, ...]  # L, O, I
    launches: float
    graph_kernels: float  # inside of the launches that are CUDA graphs
    num_bytes: float  # counted if the GPU counts by line


def column_costs(simulated: SimulatedRun) -> Iterator[ColumnCost]:
    """The difference between six columns and two, for each group of matrices."""
    gpu, cfg, (few, many) = simulated.gpu, simulated.cfg, (2, 6)
    hessians = {
        name: t.KroneckerHessian(weight.new_zeros(weight.size(1), weight.size(1)), weight[:, 0])
        for name, weight in simulated.model.named_parameters()
        if weight.dim() == 2
    }
    for group in t.group_matrices(cfg, simulated.model, hessians):
        counts = []
        for n in (few, few, many):  # the first time fills caches
            gpu.reset()
            some = functools.partial(gptq_of_some_columns, t.gptq, n)
            with patched((t, "gptq", some)):
                t.quantize_group(cfg, group, 1.0)
            counts.append((gpu.launches, gpu.graph_kernels, sum(gpu.traffic.values())))
        rise = [(b - a) / (many - few) for a, b in zip(*counts[1:], strict=True)]
        yield ColumnCost(tuple(group.weight_LOI.shape), *rise)


def pairs_of(past: t.KVCache) -> list[tuple[Tensor, Tensor]]:
    return [layer.pair for layer in past.layers if layer.pair is not None]


def max_of_one_rank(max_over_ranks: Any, run: t.Run, value: float) -> float:
    """max_over_ranks with its collective and transfer; the other ranks' values are no larger."""
    max_over_ranks(run, value)
    return float(value)


def finish_without_numbers(scorer: Any, eval_s: float) -> t.Score:
    """Scorer.finish with its transfers, but without sums, which FakeTensors do not have."""
    run, num_targets = scorer.run, scorer.validation.num_targets
    sums = torch.tensor([0.0, 0.0], dtype=torch.float64, device=run.device)
    run.all_reduce_sum(sums).tolist()
    both = torch.from_numpy(np.stack([scorer.scored_at, scorer.scored_at > 0])).to(run.device)
    run.all_reduce_sum(both).cpu().numpy()
    return t.Score(1.0, num_targets, 1, False, eval_s, (), scorer.nll_T)


@contextlib.contextmanager
def one_rank(flash: str = "flash_attn_interface", by_line: bool = False) -> Iterator[SimulatedGpu]:
    """Context with a simulated GPU and a process group of 8 ranks, of which only one exists."""
    if not dist.is_initialized():
        dist.init_process_group("fake", rank=0, world_size=WORLD_SIZE, store=FakeStore())
    changes = [
        (t.Run, "broadcast_object", lambda self, value: value),
        (t.Run, "log", lambda self, event, **values: None),
        (t.Scorer, "finish", finish_without_numbers),
        (t, "max_over_ranks", functools.partial(max_of_one_rank, t.max_over_ranks)),
    ]
    with patched(*changes), simulated_gpu(flash, by_line) as gpu:
        yield gpu


def simulate(
    cfg: t.Config,
    parts: tuple[str, ...] = PARTS,
    rank: int = 0,
    flash: str = "flash_attn_interface",
) -> list[PartResult]:
    """Run parts of the script for one rank of 8 and return what each of them did."""
    with tempfile.TemporaryDirectory() as folder, one_rank(flash) as gpu:
        simulated = SimulatedRun(cfg, gpu, Path(folder), rank)
        for name in parts:
            simulated.measure(name, getattr(simulated, name))
            if simulated.model is None:
                break
        return simulated.results


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the GPU paths of train_gpt.py without a GPU.")
    parser.add_argument("recipe", nargs="?", default="default", help="default, or part of a name")
    parser.add_argument("knobs", nargs="*", metavar="KNOB=value")
    parser.add_argument("--full", action="store_true", help="the full shape")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--ranks", default="0", help="ranks of 8, with commas")
    parser.add_argument("--flash", default="flash_attn_interface", help="its module, or none")
    args = parser.parse_args()
    knobs = dict(pair.split("=", 1) for pair in args.knobs)
    for recipe in args.recipe.split(","):
        cfg = simulated_config(recipe, not args.full, **knobs)
        for rank in map(int, args.ranks.split(",")):
            for result in simulate(cfg, tuple(args.parts.split(",")), rank, args.flash):
                line = {"recipe": recipe, "rank": rank, **dataclasses.asdict(result)}
                print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
