"""Details in which public descriptions differ from what the published systems compute.

The expected numbers come from the systems' own logs or are added up here from their descriptions.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import train_gpt
from tests.conftest import MakeRun, random_model, tiny_config
from tests.test_recipes import FRONTIER, GATED, TRIGRAM, recipe
from train_gpt import GPT


def meta_model(name: str) -> GPT:
    """The model of a recipe, without memory for its weights."""
    with torch.device("meta"):
        return GPT(recipe(name), train_gpt.ATTENTION_BACKENDS["sdpa"](), torch.float32)


def test_pr_430_trains_5_780_518_numbers_at_test_time() -> None:
    cfg, model = recipe(GATED), meta_model(GATED)
    params = train_gpt.ttt_parameters(cfg, model)
    frozen_rows = sum(
        param[: cfg.ttt_freeze_blocks].numel()
        for name, param in params.items()
        if name in train_gpt.ROW_PER_BLOCK
    )
    assert sum(param.numel() for param in params.values()) - frozen_rows == 5_780_518


@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_values_of_frozen_blocks_do_not_change(make_run: MakeRun, frozen: int) -> None:
    run = make_run(
        num_layers=4, num_loops=0, value_residual="x0", parallel_residual="none",
        ttt_method="chunk", ttt_train="blocks", ttt_freeze_blocks=frozen, ttt_lr=0.1,
        ttt_optimizer="adamw", eval_stride=8,
    )  # fmt: skip
    model = random_model(run.cfg)
    before = model.block_scalars["x0"].detach().clone()
    trainer = train_gpt.WeightTrainer(run, model)
    ids = torch.randint(2, run.cfg.vocab_size, (2, 17))
    batch = train_gpt.Batch(ids[:, :-1], ids[:, 1:], 0, None, torch.ones(2, 16))
    trainer.step(batch, 0.0, 0.0)
    changed = (model.block_scalars["x0"] != before).tolist()
    assert changed == [False] * frozen + [True] * (4 - frozen)


@pytest.mark.parametrize(("num_chunks", "chunk"), [(10, 0), (10, 2), (10, 5), (7, 3)])
def test_the_ramp_covers_the_first_30_percent_of_the_chunks(
    make_run: MakeRun, num_chunks: int, chunk: int
) -> None:
    K, T = 32, 16
    run = make_run(
        ttt_method="chunk", ttt_ramp=3.0, ttt_lr=0.5, ttt_epochs=1, ttt_chunk_tokens=K,
        train_seq_len=T, eval_stride=8, train_batch_tokens=64,
    )  # fmt: skip
    planner = train_gpt.EvalPlanner(run.cfg, 0, 1)
    steps = [s for s in planner.plan_chunks(num_chunks * K) if s.action == "train"]
    step = next(s for s in steps if s.text == (chunk * K, (chunk + 1) * K))
    trainer = train_gpt.WeightTrainer(run, random_model(run.cfg))
    trainer.step(None, step.progress, step.chunk_frac)
    cosine = 0.5 * (1 + math.cos(math.pi * chunk / (num_chunks - 1)))
    ramp = 1 + 2 * min(1.0, chunk / (0.3 * num_chunks))
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * cosine * ramp)


def test_pr_2135_adapts_5_9_million_numbers_per_document() -> None:
    model, R = meta_model(FRONTIER), 80
    counted = sum(
        R * sum(train_gpt.lora_sizes(module))
        for index in range(len(model.schedule))
        for module in train_gpt.lora_modules(model, index)
    )
    # q 512 -> 512, v 512 -> 256, attention and MLP 512 -> 512 in 17 layer calls; the head.
    assert counted == 17 * R * (1024 + 768 + 1024 + 1024) + R * (512 + 8192) == 5_918_720


@pytest.mark.parametrize("target", ["attn", "mlp_block"])
def test_a_parallel_adapter_adds_its_product_to_the_whole_module(
    make_run: MakeRun, target: str
) -> None:
    run = make_run(ttt_lora_targets=target, ttt_lora_rank=2, ttt_lora_alpha=3.0)
    model = random_model(run.cfg)
    ids = torch.randint(2, run.cfg.vocab_size, (1, 12))
    base = model(ids)
    trainer = train_gpt.AdapterTrainer(run, model, 1)
    assert torch.equal(model(ids), base)  # B starts at zero
    with torch.no_grad():
        for adapter in trainer.adapters:
            adapter.up_BRO.normal_()
    block: Any = model.blocks[0]
    inputs = model.block_inputs(ids, model.embed(ids))
    n = block.norm(model.embed(ids))

    def output() -> torch.Tensor:
        if target == "mlp_block":
            return block.mlp(n)
        return block.attn(n, inputs, model.block_scalars_of(0))

    model.attach_adapters(0)
    adapted = output()
    model.set_adapters([])
    lora = trainer.adapters[0]
    product = n @ lora.down_BIR[0] @ lora.up_BRO[0] * 3.0 / 2
    torch.testing.assert_close(adapted, output() + product)


@pytest.mark.parametrize("num_dead", [1, 4, 40])
def test_dead_inputs_do_not_change_the_damping_of_others(num_dead: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = 1e-2 * torch.randn(512, 64, generator=generator)  # a diagonal of about 1e-4
    hessian = x.T @ x / len(x)
    padded = torch.zeros(1, 64 + num_dead, 64 + num_dead)
    padded[0, :64, :64] = hessian
    alone, together = (train_gpt.factor_hessians(h) for h in (hessian[None], padded))
    assert together.alive_LI[0].tolist() == [True] * 64 + [False] * num_dead
    torch.testing.assert_close(
        together.upper_diagonal_LI[0, :64], alone.upper_diagonal_LI[0], rtol=1e-3, atol=0
    )


def test_pruning_reaches_matrices_that_stay_in_fp16() -> None:
    cfg = tiny_config(
        vocab_size=8192, model_dim=16, num_heads=2, num_kv_heads=1, rope_dims=2, embed_bits=16,
        prune_frac=0.03, quantizer="rtn", quant_grid="uniform", row_steps="max",
    )  # fmt: skip
    embedding = train_gpt.quantize_model(cfg, random_model(cfg))["tok_emb.weight"].values
    assert embedding.dtype == np.float16
    assert (embedding == 0).mean() == pytest.approx(0.03, abs=2e-3)


@pytest.mark.parametrize(("name", "layers"), [(GATED, 11), (TRIGRAM, 10)])
def test_projections_start_smaller_by_the_root_of_twice_the_depth(name: str, layers: int) -> None:
    assert recipe(name).init == "orthogonal_scaled" and recipe(name).num_layers == layers
    cfg = tiny_config(
        num_layers=3, num_loops=0, parallel_residual="none", xsa_last_n=0, init="orthogonal_scaled",
        model_dim=64, num_heads=2, num_kv_heads=1, bigram_vocab_size=64, bigram_dim=64,
        ve_layers="1", ve_dim=64, rope_dims=8,
    )  # fmt: skip
    attention = train_gpt.ATTENTION_BACKENDS["sdpa"]()
    model = GPT(cfg, attention, torch.float32)
    bigram: Any = model.hashes[0]
    ve_proj: Any = model.ve_proj
    for projection in (bigram.proj, ve_proj):
        singular = torch.linalg.svdvals(projection.weight.detach())
        torch.testing.assert_close(singular, torch.full_like(singular, 6**-0.5))


def test_rotary_bases_of_the_recipes() -> None:
    gated, frontier = recipe(GATED), recipe(FRONTIER)
    # The source builds its table for 1,024 positions and trains at 2,048, NTK-scaled.
    assert gated.rope_base == pytest.approx(10_000 * 2 ** (16 / 14), rel=1e-9)
    long = train_gpt.rotary_table(frontier, frontier.eval_seq_len)
    short = train_gpt.rotary_table(frontier, frontier.train_seq_len)
    assert torch.equal(long[:, :2048], short)  # the source does not rescale for 2,560
