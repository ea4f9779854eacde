"""Training steps as CUDA graphs, recorded and replayed on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

import train_gpt
from tests.conftest import MakeRun
from tests.processes import metrics
from tests.recorded_graph import Capture, RecordedGraph
from train_gpt import Run, Trainer

# Two depths, two lengths of windows, and rounding of the weights at the end: several graphs.
STAGES: dict[str, Any] = {
    "num_layers": 4, "num_loops": 1, "loop_start": 1, "loop_end": 2, "enable_looping_at": "0.4",
    "train_seq_schedule": "16@0.6", "late_qat_threshold": 0.3, "iterations": 10,
}  # fmt: skip


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)


def new_trainer(run: Run, *, graphs: bool) -> Trainer:
    trainer = Trainer(run, train_gpt.build_model(run))
    if graphs:
        trainer.start_graphs()
    return trainer


def trained(trainer: Trainer, stop_graphs_at: int = -1) -> list[torch.Tensor]:
    """The losses and weights of a training on random tokens."""
    cfg, losses = trainer.run.cfg, []
    generator = torch.Generator().manual_seed(0)
    for step in range(cfg.iterations):
        if step == stop_graphs_at:
            trainer.graphs = None
        stage = trainer.next_stage()
        trainer.enter_stage(stage)
        shape = stage.batch_tokens // stage.seq_len, stage.seq_len + 1
        losses.append(trainer.step(torch.randint(cfg.vocab_size, shape, generator=generator)))
    return [*losses, *[param.detach().clone() for param in trainer.params]]


@pytest.mark.parametrize("knobs", [{}, {"isolate_documents": True, "deep_supervision": 0.3}])
def test_training_with_graphs_gives_the_same_bits(make_run: MakeRun, knobs: dict[str, Any]):
    run = make_run(**STAGES, **knobs, micro_batch_tokens=64)
    plain = trained(new_trainer(run, graphs=False))
    trainer = new_trainer(run, graphs=True)
    torch.testing.assert_close(trained(trainer), plain, rtol=0, atol=0)
    assert trainer.graphs is not None
    graphs = [graph for graph, _, _ in trainer.graphs.values()]
    passes = run.cfg.iterations * run.cfg.train_batch_tokens // run.cfg.micro_batch_tokens
    stages = {key[0] for key in trainer.graphs}
    assert len(graphs) == len(stages) >= 4
    assert sum(graph.replays for graph in graphs) == passes


def test_graphs_can_be_dropped_during_training(make_run: MakeRun):
    run = make_run(**STAGES)
    plain = trained(new_trainer(run, graphs=False))
    dropped = trained(new_trainer(run, graphs=True), stop_graphs_at=5)
    torch.testing.assert_close(dropped, plain, rtol=0, atol=0)


@pytest.mark.parametrize(("free_bytes", "are_kept"), [(2e9, False), (20e9, True)])
def test_graphs_make_room_for_a_validation(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, *, free_bytes, are_kept
):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free_bytes, 24e9))
    run = make_run(iterations=2)
    plain = trained(new_trainer(run, graphs=False))
    trainer = new_trainer(run, graphs=True)
    window_BT = trainer.random_windows(trainer.current_stage)
    trainer.accumulate_gradients(window_BT)
    with train_gpt.pass_between_steps(trainer):
        assert trainer.graphs is not None and bool(trainer.graphs) == are_kept
    torch.testing.assert_close(trained(trainer), plain, rtol=0, atol=0)
    assert trainer.graphs


def test_a_capture_that_fails_ends_the_use_of_graphs(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    run = make_run(iterations=3)
    plain = trained(new_trainer(run, graphs=False))
    loss = train_gpt.GPT.loss

    def waiting(*args: Any, **options: Any) -> torch.Tensor:
        value = loss(*args, **options)
        return value if value.item() else value  # not permitted in a capture

    monkeypatch.setattr(train_gpt.GPT, "loss", waiting)
    trainer = new_trainer(run, graphs=True)
    torch.testing.assert_close(trained(trainer), plain, rtol=0, atol=0)
    assert trainer.graphs is None
    (warning,) = metrics(run.directory, "warning")
    assert warning["text"].startswith("training uses no CUDA graphs: operation not permitted")


class EmptyGraph(RecordedGraph):
    def replay(self) -> None:
        """Leave the gradients at zero."""


def timed_by(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> None:
    """Let the measured times be these, one after the other."""
    measured, times = train_gpt.second_time, iter(seconds)

    def second_time(run: Run, function: Callable[[], Any]) -> tuple[Any, float]:
        return measured(run, function)[0], next(times)

    monkeypatch.setattr(train_gpt, "second_time", second_time)


@pytest.mark.parametrize(
    "graph, graph_s, is_used",
    [(RecordedGraph, 0.5, True), (RecordedGraph, 2, False), (EmptyGraph, 0.5, False)],
)
def test_graphs_are_used_where_they_are_right_and_faster(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, *, graph, graph_s, is_used
):
    run = make_run(micro_batch_tokens=64)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    timed_by(monkeypatch, 1, graph_s)
    trainer = new_trainer(run, graphs=False)
    trainer.try_graphs(trainer.random_windows(trainer.current_stage))
    assert (trainer.graphs is not None) == is_used == bool(trainer.graph_grads)
    (shown,) = metrics(run.directory, "kernels")
    assert (shown["form"], shown["ms"], shown["plain_ms"]) == ("graph", 1000 * graph_s, 1000)
    assert (shown["grad_error"] == 0) == (graph is RecordedGraph)
    assert all(param.grad is None for param in trainer.params)


@pytest.mark.parametrize("fails, other_fails", [(False, True), (True, False), (False, False)])
def test_ranks_agree_on_the_use_of_graphs(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, *, fails, other_fails
):
    said = []

    def max_over_ranks(_: Run, value: float) -> float:
        said.append(bool(value))
        return max(value, other_fails)

    monkeypatch.setattr(train_gpt, "max_over_ranks", max_over_ranks)
    if fails:
        monkeypatch.setattr(torch.cuda, "CUDAGraph", None)
    timed_by(monkeypatch, 1, 0.5)
    trainer = new_trainer(make_run(), graphs=False)
    trainer.try_graphs(trainer.random_windows(trainer.current_stage))
    assert said == [fails]
    assert (trainer.graphs is None) == (fails or other_fails)


def symmetric_product(A: Any, B: Any, C: Any = None, *, alpha: float = 1, beta: float = 1) -> Any:
    """What quack's gemm_symmetric computes, from half of the result."""
    result = train_gpt.dense_product(A, B, C, alpha=alpha, beta=beta)
    return result.tril() + result.tril(-1).mT


def wrong_product(A: Any, B: Any, C: Any = None, **_: float) -> Any:
    return symmetric_product(A, B, C)  # without the factors


def failing_product(*_: Any, **__: Any) -> Any:
    raise ValueError("no such kernel")


@pytest.mark.parametrize(
    "product, seconds, is_used",
    [
        (symmetric_product, 0.5, True),
        (symmetric_product, 2, False),
        (wrong_product, 0.5, False),
        (failing_product, 0.5, False),
        (None, 0.5, False),
    ],
)
def test_symmetric_products_are_used_where_they_are_right_and_faster(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, *, product, seconds, is_used
):
    module: Any = ModuleType("quack.gemm_interface")
    module.gemm_symmetric = product
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", module if product else None)
    timed_by(monkeypatch, 1, seconds)
    run = make_run(iterations=2)
    trainer = new_trainer(run, graphs=False)
    trainer.muon.try_symmetric_products()
    assert (trainer.muon.product is product) == is_used
    (shown,) = metrics(run.directory, "kernels")
    assert shown["form"] == "symmetric" and ("reason" in shown) == (
        product in (failing_product, None)
    )
    found = trained(trainer)
    torch.testing.assert_close(found, trained(new_trainer(run, graphs=False)), rtol=1e-3, atol=1e-4)


def test_all_graphs_are_captured_before_the_clock_starts(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Run, "is_asynchronous", True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    timed_by(monkeypatch, *[1, 0.5] * 20)  # every other form is faster than the plain one
    run = make_run(**STAGES, compile=True, warmup_steps=1, micro_batch_tokens=64)
    trainer = new_trainer(run, graphs=False)
    before = [param.detach().clone() for param in trainer.params]
    with torch.compiler.set_stance("force_eager"):
        trainer.warm_up()
        assert trainer.graphs is not None
        captured = {key[0] for key in trainer.graphs}
        assert captured == set(train_gpt.train_stages(run.cfg)) and len(captured) >= 4
        torch.testing.assert_close(before, list(trainer.params), rtol=0, atol=0)
        trained(trainer)
    assert len(trainer.graphs) == len(captured)
