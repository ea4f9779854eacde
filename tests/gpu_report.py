"""Kernels, bytes, FLOPs and milliseconds of a training step on an H100, computed without a GPU.

    python -m tests.gpu_report [RECIPE] [--out FILE.md] [KNOB=value ...]

Under the simulated GPU, torch.compile makes the Triton code for sm_90 and stops there. Bytes come
from Inductor's count for each kernel, FLOPs from the shapes of the products, and times from the
roofline with the constants below. Nothing is measured. Triton must be installed.
"""

from __future__ import annotations  # noqa: I001

import argparse
import collections
import dataclasses
import itertools
import math
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests import gpu_sim  # before torch, because of its guard

import sympy  # type: ignore[import-untyped]
import torch
from torch._inductor import ir
from torch._inductor.choices import InductorChoices
from torch._inductor.dependencies import MemoryDep
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import NopKernelSchedulerNode
from torch._inductor.select_algorithm import AlgorithmSelectorCache, TritonTemplateCaller
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._sympy.functions import Identity

import train_gpt as t

# Rates that kernels reach on an H100 SXM, and its peak in bf16.
MATMUL_FLOPS, PEAK_FLOPS = 650e12, 989e12  # per second
FLASH_FORWARD_FLOPS, FLASH_BACKWARD_FLOPS = 350e12, 280e12  # FlashAttention-3, heads of 64, causal
KERNEL_S = 1.5e-6  # start and end of a kernel
# Part of the causal attention of whole rows that is left inside of FineWeb's documents.
DOCUMENT_FRAC = 0.6

H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
    max_threads_per_block=1024, warp_size=32, total_memory=80 * 2**30,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472, L2_cache_size=50 * 2**20, gcnArchName="",
)  # fmt: skip


@dataclasses.dataclass
class Kernel:
    """One launch inside a compiled graph."""

    kind: str  # pointwise, product, product with epilogue, flash forward or flash backward
    name: str
    bytes: float
    flops: float

    @property
    def seconds(self) -> float:
        """Time by the roofline."""
        rates = {"flash forward": FLASH_FORWARD_FLOPS, "flash backward": FLASH_BACKWARD_FLOPS}
        rate = rates.get(self.kind, MATMUL_FLOPS)
        return max(self.flops / rate, self.bytes / gpu_sim.BYTES_PER_S) + KERNEL_S


@dataclasses.dataclass
class Graph:
    """A compiled graph: its kernels, and how often it was called."""

    name: str
    kernels: list[Kernel]
    calls: int = 0


graphs: list[Graph] = []


def simulate_triton() -> None:
    """Let Inductor believe that an H100 is there; for the rest of the process."""
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config
    import torch._inductor.fx_passes.joint_graph as joint_graph
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from triton.backends.compiler import GPUTarget

    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "set_device": None,
        "get_device_properties": H100, "get_device_capability": (9, 0),
        "get_device_name": H100.name, "is_bf16_supported": True, "synchronize": None,
        "_lazy_init": None, "init": None, "get_arch_list": ["sm_90"], "_exchange_device": 0,
        "_maybe_exchange_device": 0, "set_rng_state": None,
    }  # fmt: skip
    for name, value in answers.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    state = torch.zeros(16, dtype=torch.uint8)
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda *_: state
    torch.cuda.random.set_rng_state = lambda *_: None
    torch.version.cuda = "12.8"
    interface = {
        "get_compute_capability": 90, "is_available": True, "get_device_properties": H100,
        "current_device": 0, "is_triton_capable": True, "raise_if_triton_unavailable": None,
    }  # fmt: skip
    for name, value in interface.items():
        setattr(CudaInterface, name, staticmethod(lambda *_, value=value: value))
    for name in ("current_device", "get_device_properties"):
        function = staticmethod(lambda *_, value=interface[name]: value)
        setattr(CudaInterface.Worker, name, function)
    target = GPUTarget("cuda", 90, 32)
    driver = types.SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0,
        get_active_torch_device=lambda: gpu_sim.DEVICE, get_current_stream=lambda _=0: 0,
        get_device_capability=lambda _=0: (9, 0),
    )  # fmt: skip
    triton.runtime.driver.set_active(driver)
    setattr(FakeTensorMode, "avoid_device_init", property(lambda self: True))  # noqa: B010
    joint_graph.lazy_init = lambda *_, **__: None  # its patterns are traced on real tensors
    inductor_config.shape_padding = False
    inductor_config.joint_graph_constant_folding = False
    inductor_config.fx_graph_cache = False
    # Instead of measuring: every product is a template of Triton's, into which Inductor fuses what
    # follows it, but not what precedes it, which each of its blocks would compute again.
    inductor_config.benchmark_epilogue_fusion = inductor_config.prologue_fusion = False
    InductorChoices._finalize_template_configs = first_of_each  # type: ignore[method-assign, assignment]
    AlgorithmSelectorCache.__call__ = take_template  # type: ignore[method-assign, assignment]
    inductor_config.compile_threads = 1
    functorch_config.enable_autograd_cache = False
    GraphLowering.compile_to_module = compile_without_gpu  # type: ignore[method-assign, assignment]


def first_of_each(
    _: Any, choices: dict[str, Iterator[Any]], *args: Any, **kwargs: Any
) -> list[Any]:
    """In place of InductorChoices._finalize_template_configs: one size of each template."""
    return [choice for sizes in choices.values() for choice in itertools.islice(sizes, 1)]


def take_template(
    _: Any, name: str, choices: list[Any], *args: Any, **kwargs: Any
) -> tuple[Any, Any]:
    """In place of AlgorithmSelectorCache.__call__: Triton's template, or else the library."""
    choice = next((x for x in choices if isinstance(x, TritonTemplateCaller)), choices[0])
    return choice.output_node(), choice


def compile_without_gpu(lowering: Any) -> Any:
    """In place of GraphLowering.compile_to_module: a module whose calls return empty tensors."""
    lowering.codegen()
    outputs = [
        None
        if isinstance(x, ir.NoneAsConstantBuffer)
        else ([*map(int, x.get_size())], [*map(int, x.get_stride())], x.get_dtype(), x.get_device())
        for x in lowering.graph_outputs
    ]
    suffix = "backward" if lowering.is_backward else "forward"
    _, nodes, _ = lowering.count_bytes()
    kernels = [kernel for node, words in nodes if (kernel := kernel_of(node, 4 * words))]
    graph = Graph(f"{len(graphs)} {suffix}", kernels)
    graphs.append(graph)
    print(f"graph {graph.name}: {len(kernels)} kernels", file=sys.stderr, flush=True)

    def call(args: list[Any]) -> tuple[Any, ...]:
        graph.calls += 1
        args.clear()
        return tuple(
            x and torch.empty_strided(x[0], x[1], dtype=x[2], device=x[3]) for x in outputs
        )

    return types.SimpleNamespace(__file__=f"{graph.name}.py", call=call)


def kernel_of(node: Any, num_bytes: float) -> Kernel | None:
    """The kernel of a scheduler node, or None if it launches none."""
    inner: Any = getattr(node, "node", None)
    name = str(getattr(inner, "python_kernel_name", None) or "")
    if isinstance(inner, ir.MultiOutput) or isinstance(node, NopKernelSchedulerNode):
        return None
    if "flash_stub" in name:
        q = inner.inputs[0 if "forward" in name else 1].get_size()
        *_, H, E = map(int, q)
        tokens = int(q[0]) if len(q) == 3 else int(q[0]) * int(q[1])
        pass_name = "forward" if "forward" in name else "backward"
        return Kernel(f"flash {pass_name}", name, num_bytes, flash_flops(tokens, H * E, pass_name))
    template = node.get_template_node()
    if template is not None or "extern_kernels" in name:
        a, b = ([*map(int, x.get_size())] for x in (template or inner).inputs[-2:])
        flops = 2.0 * a[-2] * a[-1] * b[-1] * (a[0] if len(a) == 3 else 1)
        # Inductor does not count the transposed inputs of templates.
        added = (template or inner).inputs[:-2]  # a product that is added to something
        words = math.prod(a) + math.prod(b) + math.prod([*a[:-1], b[-1]]) * (1 + len(added))
        num_bytes = max(num_bytes, 2 * words)
        fused = "" if len(node.get_nodes()) == 1 else " with " + origins(node)
        kind = "product with epilogue" if fused else "product"
        return Kernel(kind, f"{a} x {b}{fused}", num_bytes, flops)
    return Kernel("pointwise", origins(node), num_bytes - unread_bytes(node), 0.0)


def unread_bytes(node: Any) -> float:
    """Bytes of whole buffers that Inductor counts, though the kernel reads a slice of each row."""
    unread, deps = 0.0, node.read_writes.reads
    accesses = node.get_read_write_buffer_accesses(include_reads=True, include_writes=False)
    for name, counted in accesses.items():
        buffer = V.graph.try_get_buffer(name)
        if buffer is None or not isinstance(buffer.get_layout(), ir.FixedLayout):
            continue
        size = [1, *map(int, buffer.get_size())]
        width, whole = size[-1], math.prod(size)
        columns = [columns_of(dep, width) for dep in deps if dep.name == name]
        read = whole * buffer.get_dtype().itemsize * len(set().union(*columns)) / width
        unread += max(0.0, counted - read)
    return unread


# The functions of Inductor's index expressions.
INDEX_FUNCTIONS = {
    "FloorDiv": lambda x, divisor: x // divisor,
    "ModularIndexing": lambda x, divisor, modulus: x // divisor % modulus,
}
MAX_COLUMN_TERMS = 2**14


def columns_of(dep: Any, width: int) -> set[int]:
    """The columns of a row-major buffer with rows of this width that an access touches.

    All columns if that is hard to say. Positions that a mask leaves out count as touched.
    """
    everything = {*range(width)}
    if not isinstance(dep, MemoryDep):
        return everything
    index = dep.index
    while index.has(Identity):  # they can be nested
        index = index.replace(Identity, lambda x: x)
    steps = {x: index.coeff(x) for x in dep.ranges}
    rows = [x for x, step in steps.items() if step.is_Integer and step and step % width == 0]
    index = index.subs(dict.fromkeys(rows, 0))
    others = {x: int(dep.ranges[x]) for x in dep.ranges if x in index.free_symbols}
    is_known = index.free_symbols <= others.keys() and math.prod(others.values())
    if not is_known or is_known > MAX_COLUMN_TERMS:
        return everything
    column = sympy.lambdify([*others], index, modules=[INDEX_FUNCTIONS, "math"])
    places = itertools.product(*map(range, others.values()))
    return {column(*place) % width for place in places}


seq_len = 0  # of the stage that is traced


def flash_flops(tokens: int, width: int, pass_name: str) -> float:
    """Forward: two products of T x T / 2 for each row; backward: five."""
    forward = 4 * tokens * seq_len * width / 2 * DOCUMENT_FRAC
    return forward * (1 if pass_name == "forward" else 2.5)


def origins(node: Any) -> str:
    """The operations that were fused into a kernel."""
    names = collections.Counter(
        str(origin.target).replace("aten.", "").removesuffix(".default")
        for part in node.get_nodes()
        if part.node is not None and hasattr(part.node, "get_origins")
        for origin in part.node.get_origins()
    )
    return " ".join(sorted(names))


@dataclasses.dataclass
class StageReport:
    """One optimizer step in one training stage."""

    stage: t.TrainStage
    tokens: int  # of one rank
    model_flops: float
    rows: dict[str, list[float]]  # kind -> launches, FLOPs, bytes, seconds
    kernels: list[tuple[float, str]]  # seconds a step, description
    live_gb: float
    peak_gb: float
    outside: int  # launches outside of compiled graphs

    @property
    def seconds(self) -> float:
        return sum(row[3] for row in self.rows.values())


OPTIMIZER = (
    "orthogonalize", "dense_product", "start_reduce", "all_reduce_gradients", "clip_gradients",
    "update", "step", "gather", "reduced_gradients", "grad_or_zeros", "wait_for", "<genexpr>",
)  # fmt: skip


def report_stage(simulated: gpu_sim.SimulatedRun, stage: t.TrainStage) -> StageReport:
    """Compile a step of a stage, then count what a second one does."""
    global seq_len
    seq_len, gpu, cfg = stage.seq_len, simulated.gpu, simulated.cfg
    simulated.trainer.enter_stage(stage)
    simulated.trainer.step(simulated.windows(stage))
    for graph in graphs:
        graph.calls = 0
    gpu.reset()
    live = gpu.live
    simulated.trainer.step(simulated.windows(stage))
    rows: dict[str, list[float]] = {}

    def add(kind: str, launches: float, flops: float, num_bytes: float, seconds: float) -> None:
        row = rows.setdefault(kind, [0.0] * 4)
        for i, value in enumerate((launches, flops, num_bytes, seconds)):
            row[i] += value

    kernels: collections.Counter[str] = collections.Counter()
    for graph in graphs:
        for kernel in graph.kernels:
            n = graph.calls
            add(kernel.kind, n, n * kernel.flops, n * kernel.bytes, n * kernel.seconds)
            text = f"{n} x {kernel.kind}, {kernel.bytes / 1e6:.0f} MB: {kernel.name}"
            kernels[f"graph {graph.name}, {text}"] += n * kernel.seconds  # type: ignore[assignment]
    for name, num_bytes in gpu.traffic.items():
        flops = float(gpu.flops[name])
        is_optimizer = name.split(" ")[1].split(":")[0] in OPTIMIZER
        kind = "optimizer" if is_optimizer else "eager product" if flops else "eager"
        if name.endswith(" outside"):  # autograd's thread has no line of the script
            kind = "eager backward"
        seconds = max(flops / MATMUL_FLOPS, num_bytes / gpu_sim.BYTES_PER_S)
        seconds += gpu.launches_of[name] * KERNEL_S
        add(kind, gpu.launches_of[name], flops, num_bytes, seconds)
        text = f"{gpu.launches_of[name]} x {name}, {num_bytes / 1e6:.0f} MB in all"
        kernels[f"{kind}: {text}"] += seconds  # type: ignore[assignment]
    tokens = stage.batch_tokens // gpu_sim.WORLD_SIZE
    return StageReport(
        stage, tokens, model_flops(cfg, stage) * tokens, rows,
        sorted(((s, name) for name, s in kernels.items() if s), reverse=True),
        live / 1e9, gpu.peak / 1e9, gpu.launches,
    )  # fmt: skip


def model_flops(cfg: t.Config, stage: t.TrainStage) -> float:
    """FLOPs of a token, forward and backward: products, and causal attention inside documents."""
    D, num_calls = cfg.model_dim, len(t.layer_schedules(cfg)[stage.loops])
    kv_dim = cfg.num_kv_heads * cfg.head_dim
    weights = num_calls * 2 * D * (D + kv_dim + cfg.mlp_dim) + cfg.vocab_size * D
    return 6 * weights + 6 * num_calls * D * stage.seq_len * DOCUMENT_FRAC


def micro_batches(report: StageReport, cfg: t.Config) -> dict[int, int]:
    """The largest MICRO_BATCH_TOKENS by card; activations grow with the tokens."""
    micro = min(report.tokens, cfg.micro_batch_tokens)
    per_token = (report.peak_gb - report.live_gb) / micro
    return {
        card: int((card * 2**30 / 1e9 - gpu_sim.RESERVED_GB - report.live_gb) / per_token)
        // report.stage.seq_len
        * report.stage.seq_len
        for card in gpu_sim.CARDS_GIB
    }


def stage_name(stage: t.TrainStage) -> str:
    late = ", late QAT" if stage.qat else ""
    return f"loops {stage.loops}, {stage.seq_len} tokens a row{late}"


def render(recipe: str, cfg: t.Config, reports: list[StageReport], picture: str) -> str:
    """The report as Markdown."""
    lines = [
        f"# A training step on an H100, computed: {recipe}", "",
        "Computed by `make gpu-report`, not measured: FakeTensors, the Triton code that Inductor "
        "generates for sm_90, and a roofline. One rank of 8, "
        f"{reports[0].tokens:,} tokens. Rates: products {MATMUL_FLOPS / 1e12:.0f} TFLOP/s, "
        f"memory {gpu_sim.BYTES_PER_S / 1e12:.1f} TB/s, "
        f"FlashAttention-3 {FLASH_FORWARD_FLOPS / 1e12:.0f} "
        f"and {FLASH_BACKWARD_FLOPS / 1e12:.0f} TFLOP/s (forward, backward), {KERNEL_S * 1e6:.1f} "
        f"us a launch; {DOCUMENT_FRAC:.0%} of the attention lies inside documents. Products with "
        "an epilogue are Inductor's templates (`KERNELS=auto`) and have the same rate; on a GPU "
        "Inductor measures them and takes the library's where that is faster. Communication "
        "and idle time are not included; MFU is against "
        f"{PEAK_FLOPS / 1e12:.0f} TFLOP/s.", "", f"![milliseconds by kind]({picture})", "",
    ]  # fmt: skip
    for report in reports:
        mfu = report.model_flops / report.seconds / PEAK_FLOPS
        lines += [
            f"## {stage_name(report.stage)}: {1e3 * report.seconds:.1f} ms, MFU {mfu:.1%}", "",
            f"Launches outside of compiled graphs: {report.outside:,}. Memory: "
            f"{report.live_gb:.1f} GB between steps, {report.peak_gb:.1f} GB at the peak (without "
            "temporary buffers inside of graphs).", "",
            "| kind | launches | TFLOP | GB | ms |", "| --- | ---: | ---: | ---: | ---: |",
        ]  # fmt: skip
        for kind, row in sorted(report.rows.items(), key=lambda item: -item[1][3]):
            launches, flops, num_bytes, seconds = row
            lines.append(
                f"| {kind} | {launches:,.0f} | {flops / 1e12:.2f} | {num_bytes / 1e9:.1f} | "
                f"{1e3 * seconds:.2f} |"
            )
        lines += ["", "The kernels that take longest:", "", "| ms | kernel |", "| ---: | --- |"]
        lines += [f"| {1e3 * s:.2f} | {name[:150]} |" for s, name in report.kernels[:16]]
        lines.append("")
    fits = micro_batches(max(reports, key=lambda report: report.peak_gb), cfg)
    lines += [
        "## Micro-batches by card", "",
        f"The largest MICRO_BATCH_TOKENS for training, with {gpu_sim.RESERVED_GB:.0f} GB kept "
        "free, from the peak of the largest stage:", "",
        "| GPU memory, GiB | MICRO_BATCH_TOKENS |", "| ---: | ---: |",
        *[f"| {card} | {tokens:,} |" for card, tokens in fits.items()], "",
    ]  # fmt: skip
    return "\n".join(lines)


def draw(reports: list[StageReport], path: Path) -> None:
    """Milliseconds by kind, a bar for each stage."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.7 * len(reports)), layout="constrained")
    kinds = sorted({kind for report in reports for kind in report.rows})
    left = [0.0] * len(reports)
    names = [stage_name(report.stage) for report in reports]
    for kind in kinds:
        widths = [1e3 * report.rows.get(kind, [0.0] * 4)[3] for report in reports]
        axes.barh(names, widths, left=left, label=kind)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_xlabel("ms a step on an H100 (computed, not measured)")
    axes.legend(fontsize="small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.35))
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def write(out: Path, recipe: str, cfg: t.Config, reports: list[StageReport]) -> None:
    """Write the table and the picture beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    picture = out.with_suffix(".png")
    draw(reports, picture)
    out.write_text(render(recipe, cfg, reports, picture.name))


def main() -> int:
    parser = argparse.ArgumentParser(description="Compute a training step on an H100.")
    parser.add_argument("recipe", nargs="?", default="default", help="file, or part of a name")
    parser.add_argument("knobs", nargs="*", metavar="KNOB=value")
    parser.add_argument("--out", type=Path, default=Path("logs/gpu_report.md"))
    parser.add_argument("--small", action="store_true", help="a small shape, to try the tool")
    args = parser.parse_args()
    knobs = dict(pair.split("=", 1) for pair in args.knobs)
    simulate_triton()
    cfg = gpu_sim.simulated_config(args.recipe, args.small, COMPILE="1", **knobs)
    # Stages differ in cost by their loops and lengths; late QAT is left out.
    stages = [stage for stage in t.train_stages(cfg) if not stage.qat]
    reports, started_s = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, gpu_sim.one_rank(by_line=True) as gpu:
        simulated = gpu_sim.SimulatedRun(cfg, gpu, Path(folder))
        simulated.build()
        for stage in dict.fromkeys([stages[-1], stages[0]]):
            reports.append(report_stage(simulated, stage))
            seconds = time.perf_counter() - started_s
            print(f"{stage_name(stage)}: {len(graphs)} graphs, {seconds:.0f} s", flush=True)
            write(args.out, args.recipe, cfg, reports)
    print(args.out.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
