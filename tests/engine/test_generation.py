"""Greedy decoding by slices against stock `generate`, token for token, and where an answer ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from roma_ray.assets import assets_path
from roma_ray.config.free_form import SuccessConfig
from roma_ray.engine.generation import Begun, Decoder, Rules, Written, begun_batches, rules_for
from roma_ray.engine.model_spec import ModelSpec
from roma_ray.engine.tokenizer import load_tokenizer
from roma_ray.errors import GuardError, ModelError
from roma_ray.moe.slices import Slice, load_slice
from roma_ray.questions.prompts import Prompt
from tests.tiny import save_tiny, tiny_moe

ENDS = frozenset((5, 6))
# Grouped routing, sinks and windows, recurrent layers: whatever makes a family's cache its own.
FAMILIES = ("olmoe", "qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next", "granitemoehybrid", "embedded")


class Numbers:
    """A tokenizer whose text is the tokens' numbers."""

    def decode(self, ids: list[int], **settings: Any) -> str:
        assert settings == {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return "".join(f"<{token}>" for token in ids)


def prompts_of(vocabulary: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randint(7, vocabulary, (n,), generator=generator).tolist()) for n in (7, 4, 11, 9, 1)]


def stock(model: Any, prompts: list[tuple[int, ...]], limit: int) -> list[tuple[int, ...]]:
    """What stock `generate` writes to each prompt alone."""
    found = []
    for ids in prompts:
        whole = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=limit,
            eos_token_id=sorted(ENDS),
            pad_token_id=0,
        )
        found.append(tuple(whole[0, len(ids) :].tolist()))
    return found


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tiny_moe("olmoe", seed=3), tmp_path_factory.mktemp("olmoe"))


def whole(path: str) -> Slice:
    return load_slice(path, dtype=torch.float32, with_lm_head=True)


def write(parts: list[Slice], prompts: list[tuple[int, ...]], rules: Rules) -> list[Written]:
    decoder = Decoder(parts, Numbers(), rules)
    return decoder.write(decoder.begin(prompts))


@pytest.mark.parametrize("family", FAMILIES)
def test_it_writes_what_stock_generate_writes(family: str, tmp_path: Path) -> None:
    """In one slice and in two, in a padded batch; and a second time from where the first began."""
    path = str(assets_path() / "model") if family == "embedded" else save_tiny(tiny_moe(family, seed=3), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation="eager").eval()
    prompts = prompts_of(model.config.vocab_size)
    expected = stock(model, prompts, 12)
    assert len(set(expected)) > 3, "answers that differ"
    layers = model.config.num_hidden_layers
    for parts in ([(0, None)], [(0, layers - 2), (layers - 2, None)]):
        slices = [
            load_slice(path, start=start, stop=stop, dtype=torch.float32, with_lm_head=stop is None)
            for start, stop in parts
        ]
        decoder = Decoder(slices, Numbers(), Rules(ENDS, (), 12))
        begun = decoder.begin(prompts)
        for _ in range(2):
            assert [answer.ids for answer in decoder.write(begun)] == expected


def test_an_answer_ends_at_an_end_a_stop_text_or_its_length(olmoe: str) -> None:
    model = whole(olmoe)
    prompts = prompts_of(64)[:3]
    free = write([model], prompts, Rules(frozenset(), (), 10))
    assert [(len(answer.ids), answer.ended) for answer in free] == [(10, "length")] * 3
    which, ids = max(enumerate(answer.ids for answer in free), key=lambda item: len(set(item[1])))
    token = list(dict.fromkeys(ids))[-1]
    place = ids.index(token)
    assert place > 0
    ended = write([model], prompts, Rules(frozenset([token]), (), 10))[which]
    assert (ended.ids, ended.ended, ended.text) == (ids[: place + 1], "end", "".join(f"<{t}>" for t in ids[:place]))
    # A text over the border of two tokens.
    stop = f"{ids[place - 1]}><{token}"
    stopped = write([model], prompts, Rules(frozenset(), ("no such", stop), 10))[which]
    assert (stopped.ids, stopped.ended) == (ids[: place + 1], "stop")
    assert stopped.text == "".join(f"<{t}>" for t in ids[: place - 1]) + "<"


def test_no_answer_goes_beyond_the_models_positions(olmoe: str) -> None:
    model = whole(olmoe)
    positions = model.model.config.max_position_embeddings
    generator = torch.Generator().manual_seed(0)
    long = [tuple(torch.randint(7, 64, (n,), generator=generator).tolist()) for n in (positions - 3, 5, positions)]
    found = write([model], long, Rules(frozenset(), (), 6))
    assert [(len(answer.ids), answer.ended) for answer in found] == [(3, "length"), (6, "length"), (0, "length")]
    assert write([model], long[1:2], Rules(frozenset(), (), 6))[0] == found[1]


def test_batches_go_by_length_and_hold_every_prompt_once(olmoe: str) -> None:
    decoder = Decoder([whole(olmoe)], Numbers(), Rules(ENDS, (), 4))
    asked = [Prompt(str(n), "t", "train", ids, ((5,),), (1,), 0, False) for n, ids in enumerate(prompts_of(64))]
    batches = list(begun_batches(decoder, asked, 2))
    assert [numbers for numbers, _ in batches] == [[2, 3], [0, 1], [4]]
    assert all(isinstance(begun, Begun) and len(begun.prompts) == len(numbers) for numbers, begun in batches)


def test_logits_that_are_not_finite_are_an_error(olmoe: str) -> None:
    model = whole(olmoe)
    with torch.no_grad():
        model.model.get_output_embeddings().weight[9] = float("nan")
    with pytest.raises(GuardError, match="not finite"):
        write([model], prompts_of(64), Rules(ENDS, (), 4))


def test_layers_that_cannot_be_cached_alone_are_refused(tmp_path: Path) -> None:
    """A Nemotron-H head without attention: transformers' cache does not know how long it is."""
    path = save_tiny(tiny_moe("nemotron_h", seed=3), tmp_path)
    layers = AutoModelForCausalLM.from_pretrained(path).config.num_hidden_layers
    cuts = [
        load_slice(path, stop=layers - 2, dtype=torch.float32, with_lm_head=False),
        load_slice(path, start=layers - 2, dtype=torch.float32, with_lm_head=True),
    ]
    with pytest.raises(ModelError, match=r"choose other routing\.layers"):
        write(cuts, prompts_of(64), Rules(ENDS, (), 4))
    assert len(write([whole(path)], prompts_of(64), Rules(ENDS, (), 4))) == 5


def test_the_ends_are_the_models_the_tokenizers_and_those_of_the_answers() -> None:
    path = str(assets_path() / "model")
    tokenizer = load_tokenizer(path, None)
    special = tokenizer.convert_tokens_to_ids(tokenizer.pad_token)
    model = ModelSpec(path, None, "float32", "eager", "sdpa", "cpu", 1)
    asked = [Prompt("q", "t", "train", (5,), ((40, last),), (1,), 0, False) for last in (special, 41)]
    rules = rules_for(model, tokenizer, asked, SuccessConfig(stop=("x",), max_new_tokens=7))
    assert rules == Rules(frozenset({0, tokenizer.eos_token_id, special}), ("x",), 7)
