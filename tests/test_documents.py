"""What the documents show must work: their examples, tables and links against the code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from roma_ray.cli import main
from roma_ray.config import QuestionSource
from roma_ray.config_reading import load_config
from roma_ray.questions.readers import read_questions

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_example_questions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "my-questions.jsonl"
    path.write_text("\n".join(blocks("json")))
    questions, rejected = read_questions([QuestionSource(path=str(path))])
    assert not rejected
    assert [(q.id, q.answer, q.split) for q in questions] == [("tea-1", 0, "train"), ("tea-2", 1, "test")]


def test_the_example_configuration_loads(tmp_path: Path) -> None:
    recipe, example = blocks("yaml")
    path = tmp_path / "my.yaml"
    path.write_text(example)
    assert len(load_config(path).questions.sources) == 2
    path.write_text(recipe)
    assert load_config(path).questions.prompt.format == "cloze"


def test_the_recipe_of_ones_own_questions_works_first_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README's file and command, on rows of the shape that stands beside it: far above chance."""
    recipe, _ = blocks("yaml")
    (tmp_path / "mine.yaml").write_text(recipe)
    rows = [json.loads(line) for line in (ROOT / "roma_ray/assets/questions/train.jsonl").read_text().splitlines()]
    known = [row for row in rows if row["task"] in ("home", "job")][:150]
    with open(tmp_path / "my-rows.jsonl", "w") as stream:
        for row in known:
            options = [{"text": text, "key": str(n + 1)} for n, text in enumerate(row["choices"])]
            answer = row["answer"] if isinstance(row["answer"], int) else "ABCD".index(row["answer"])
            stream.write(json.dumps({"query": row["question"], "options": options, "right": str(answer + 1)}) + "\n")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["local", "--config", "mine.yaml", "--quiet", "--summary", "summary.json"])
    assert done.exit_code == 0, done.output
    assert "chance" not in done.output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["rejected"] == 0
    assert summary["splits"]["test"]["all"]["base_accuracy"] > 0.8


def test_every_set_in_the_documents_is_a_setting() -> None:
    shown = [match for path in [*DOCUMENTS, *ROOT.glob("configs/*.yaml")] for match in _settings(path.read_text())]
    assert shown
    load_config(overrides=shown)


def _settings(text: str) -> list[str]:
    return re.findall(r"--set ([a-z_.]+=[^\s`.]+(?:\.\d+)?)", text.replace("section.key=value", ""))


def test_every_command_in_the_readme_exists() -> None:
    commands = set(re.findall(r"(?:^|`)roma-ray (\w+)", README, re.MULTILINE))
    assert commands
    assert commands <= set(main.commands)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_targets_and_files_exist(path: Path) -> None:
    text = path.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    files = re.findall(r"`((?:roma_ray|configs|tests|\.ci)/[\w./]+)`", text)
    missing = [name for name in links if not (path.parent / name).exists()]
    missing += [name for name in files if not (ROOT / name).exists()]
    assert not missing
    makefile = (ROOT / "Makefile").read_text()
    targets = set(
        re.findall(r"\bmake ([a-z]+)(?=[\s`])", re.sub(r"[^`]*?(```.*?```|`[^`]*`)", r"\1 ", text, flags=re.DOTALL))
    )
    assert targets <= set(re.findall(r"^(\w+):", makefile, re.MULTILINE)), targets


def test_the_constraints_pin_every_dependency_but_torch() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *(each for name in ("minilm", "faiss", "hub", "search", "dev") for each in extras[name]),
    ]
    names = {re.split(r"[\[<>=!~; ]", each)[0].lower().replace("_", "-") for each in wanted}
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert names - {name.lower().replace("_", "-") for name in pinned} == {"torch"}


def test_the_license_is_the_standard_text() -> None:
    import hashlib

    # The text of https://www.apache.org/licenses/LICENSE-2.0.txt, without its leading empty line.
    digest = hashlib.sha256(b"\n" + (ROOT / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
