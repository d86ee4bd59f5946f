"""Switch-style, nested (group-limited) and dense models from one configuration, run end to end into one table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from roma_ray.benchmarks.judge import Wanted, judge
from roma_ray.benchmarks.judged_model import resolve_subject
from roma_ray.config.loading import load_config
from roma_ray.config.schema import Config
from roma_ray.engine.progress import Silence
from roma_ray.engine.setup import resolve
from roma_ray.engine.work import serial
from roma_ray.evaluation.run_comparison import compare_columns, open_columns
from roma_ray.moe.reach import UNREACHED
from roma_ray.moe.slices import load_slice
from roma_ray.runs.pipeline import Run, run
from roma_ray.stages.finetuning import ADAPTER
from roma_ray.store.artifacts import Store
from tests.tiny import save_tiny, tiny_moe
from tests.world import make_world

CONFIG = Path(__file__).parents[2] / "configs" / "switch_style.yaml"


def train_a_little(model: PreTrainedModel, folder: Path, questions: Path, steps: int = 60) -> tuple[float, float]:
    """All weights, on the questions' texts with their answers; returns the loss before and after."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    texts = [f"{row['question']} Answer: {row['choices']['ABCD'.index(row['answer'])]}" for row in rows]
    batch = tokenizer(texts[:24], return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for _ in range(steps):
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[0], losses[-1]


def configured(world: Config, folder: Path) -> Config:
    """The published configuration, on a tiny world's model and questions."""
    source = world.questions.sources[0]
    return load_config(
        CONFIG,
        [
            *(f"storage={world.storage}", "device=cpu", f"model.path={folder}", "model.dtype=float32"),
            f'questions.sources=[{{"path": "{source.path}"}}]',
            *(f"embedding.model={world.embedding.model}", "routing.layers=L2", "extraction.batch_tokens=512"),
            *("finetune.epochs=1", "finetune.batch_size=8", "finetune.learning_rate=0.01"),
        ],
    )


def finished(config: Config) -> Run:
    return run(resolve(config), Silence(), until="evaluate")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return make_world(tmp_path_factory.mktemp("kinds"), count=24)


def test_switch_nested_and_dense_stand_in_one_table(world: Config, tmp_path: Path) -> None:
    tokenizer = Path(world.model.path)
    vocabulary = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    questions = Path(str(world.questions.sources[0].path))
    folders = {name: tmp_path / name for name in ("switch", "nested", "dense")}
    for folder in folders.values():
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    switch = tiny_moe(
        "olmoe", seed=5, vocab_size=vocabulary, num_experts=16, num_experts_per_tok=1, norm_topk_prob=False
    )
    before, after = train_a_little(switch, folders["switch"], questions)
    assert after < before / 2, "its routing is still random"
    save_tiny(switch, folders["switch"])
    save_tiny(tiny_moe("glm4_moe", seed=5, vocab_size=vocabulary), folders["nested"])
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(5)
    LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes)).save_pretrained(folders["dense"])

    evaluations = []
    for name, folder in folders.items():
        config = configured(world, folder)
        adapter = None
        if name != "dense":
            done = finished(config)
            adapter = str(done.stages["finetune"].path / ADAPTER)
            check = done.stages["extract"].manifest()["facts"]["self_check"]
            assert check["packed"] < 1e-4
            assert check["reach"] > UNREACHED
        subject = resolve_subject(config, adapter=adapter)
        assert subject.sliced is (name != "dense")
        store = Store(config.storage)
        evaluations.append(judge(config, subject, Wanted((str(questions),)), store, serial, Silence()))
    table = compare_columns(open_columns([str(stage.path) for stage in evaluations], store, lambda name: None))
    rows = {row.task: row for row in table.rows if row.metric == "acc"}
    for task in ("copy", "pick"):
        assert len(rows[task].cells) == 3
        assert all(cell is not None and 0 <= cell.score <= 1 and not cell.other_pin for cell in rows[task].cells)


def test_the_switch_form_is_p_times_the_expert_and_the_nested_r_is_before_groups(tmp_path: Path) -> None:
    """The layer's output against a loop over tokens; and experts outside the chosen groups have a part in r."""
    model = tiny_moe("olmoe", num_experts=16, num_experts_per_tok=1, norm_topk_prob=False)
    block = model.model.layers[2].mlp
    states = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = block(states)[0] if isinstance(block(states), tuple) else block(states)
        for token in range(5):
            x = states[0, token]
            p = (block.gate.weight @ x).softmax(-1)
            best = int(p.argmax())
            gate, up = (block.experts.gate_up_proj[best] @ x).chunk(2)
            want = p[best] * (block.experts.down_proj[best] @ (torch.nn.functional.silu(gate) * up))
            torch.testing.assert_close(got.reshape(5, 32)[token], want, rtol=1e-4, atol=1e-6)

    from roma_ray.moe.reading import read_routing

    part = load_slice(save_tiny(tiny_moe("glm4_moe"), tmp_path), dtype=torch.float32, with_lm_head=True)
    chosen: list[torch.Tensor] = []
    handle = part.routers[0].module.register_forward_hook(lambda m, i, o: chosen.append(o[2]))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), read_routing(part.model, part.routers, torch.tensor([[3]])) as tape:
        part.model(input_ids=ids, use_cache=False)
    handle.remove()
    row = tape.routing_BPLE[0, 0, 0]
    # Two groups of four experts, of which one is chosen.
    assert len({int(expert) // 4 for expert in chosen[0][3]}) == 1
    assert float(row.sum()) == pytest.approx(1.0)
    assert float(row.reshape(2, 4).sum(1).min()) > 0.05
