"""What the documents show must work: their examples, commands, tables and links against the code."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import roma_ray
from roma_ray.cli.commands import main
from roma_ray.config.loading import all_settings, load_config
from roma_ray.config.schema import QuestionSource
from roma_ray.questions.readers import read_questions

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "cluster/README.md", ROOT / "benchmarks/README.md"]
)
README = ROOT / "README.md"
TUTORIAL = ROOT / "docs" / "tutorial.md"
# Which command each job for `ray job submit` is.
JOBS = {"full_pipeline": "run", "tune": "tune"}

every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of a document that are marked as of this language, or as of none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)
    return [text for marked, text in found if marked == language]


def test_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 160


@pytest.mark.parametrize(
    ("path", "answers", "splits"), [(README, [0, 1], ["train", "test"]), (TUTORIAL, [0, 0, 0], None)]
)
def test_the_example_questions_are_read(
    path: Path, answers: list[int], splits: list[str] | None, tmp_path: Path
) -> None:
    (rows,) = blocks(path, "json")
    file = tmp_path / "my-questions.jsonl"
    file.write_text(rows)
    questions, rejected = read_questions([QuestionSource(path=str(file))])
    assert not rejected
    assert [question.answer for question in questions] == answers
    assert [question.split for question in questions] == (splits or ["train", "test", "train"])


def test_the_rows_without_choices_are_read_and_their_configurations_load(tmp_path: Path) -> None:
    path = ROOT / "docs" / "free_form.md"
    (rows,) = blocks(path, "json")
    (tmp_path / "rows.jsonl").write_text(rows)
    questions, rejected = read_questions([QuestionSource(path=str(tmp_path / "rows.jsonl"))], free=True)
    assert not rejected
    assert [question.form for question in questions] == ["question", "question", "prompt", "messages", "text"]
    for text in blocks(path, "yaml"):
        (tmp_path / "free.yaml").write_text(text)
        assert load_config(tmp_path / "free.yaml").questions.prompt.format == "free"


@pytest.mark.parametrize("path", [README, TUTORIAL])
def test_the_example_configurations_load(path: Path, tmp_path: Path) -> None:
    for n, text in enumerate(blocks(path, "yaml")):
        file = tmp_path / f"{n}.yaml"
        file.write_text(text)
        config = load_config(file)
    assert len(config.questions.sources) == 2


def test_the_recipe_of_ones_own_questions_works_first_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tutorial's file and command, on rows of the shape that stands beside it: far above chance. What it prints has
    README's lines."""
    recipe, _ = blocks(TUTORIAL, "yaml")
    (tmp_path / "mine.yaml").write_text(recipe)
    rows = [json.loads(line) for line in (ROOT / "roma_ray/assets/questions/train.jsonl").read_text().splitlines()]
    known = [row for row in rows if row["task"] in ("color", "food")][:150]
    with open(tmp_path / "my-rows.jsonl", "w") as stream:
        for row in known:
            options = [{"text": text, "key": str(n + 1)} for n, text in enumerate(row["choices"])]
            answer = row["answer"] if isinstance(row["answer"], int) else "ABCD".index(row["answer"])
            stream.write(json.dumps({"query": row["question"], "options": options, "right": str(answer + 1)}) + "\n")
    monkeypatch.chdir(tmp_path)
    (command,) = [line for block in blocks(TUTORIAL, "") for line in commands(block) if "mine.yaml" in line]
    done = CliRunner().invoke(main, [*command.split()[1:], "--summary", "summary.json"])
    assert done.exit_code == 0, done.output
    assert "chance" not in done.output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["rejected"] == 0
    assert summary["splits"]["test"]["all"]["base_accuracy"] > 0.5
    (terminal,) = blocks(README, "text")
    shown, printed = terminal.splitlines()[1:], [shape(line) for line in done.output.splitlines()]
    assert len(shown) in (13, 14, 15)
    for line in shown:
        assert any(other.startswith(shape(line.removesuffix("…").rstrip())) for other in printed), line


def shape(line: str) -> str:
    """A line that is printed, without what differs from run to run: figures, widths, names of files and tasks."""
    line = re.sub(r"^│ \w+ ", "│ task ", line)
    return re.sub(r" +", " ", re.sub(r"(< )?[-+]?\d[\d.,]*(e-\d+)?", "#", re.sub(r"[\w-]+\.jsonl", "FILE", line)))


def test_every_set_in_the_documents_is_a_setting() -> None:
    shown = [match for path in [*DOCUMENTS, *ROOT.glob("configs/*.yaml")] for match in _settings(path.read_text())]
    assert shown
    load_config(overrides=shown)


def _settings(text: str) -> list[str]:
    return re.findall(r"--set ([a-z_.]+=[^\s`.]+(?:\.\d+)?)", text.replace("section.key=value", ""))


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.stem != "CHANGELOG"], ids=lambda path: path.name)
def test_settings_within_sentences_exist(path: Path) -> None:
    settings = all_settings()
    sections = {name.rpartition(".")[0] for name in settings} - {""}
    spans = re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:=[^`]*)?`", path.read_text())
    named = [name for name in spans if name.partition(".")[0] in sections]
    assert not [name for name in named if name not in settings and name not in sections]


@every_document
def test_python_that_is_shown_names_what_there_is(path: Path) -> None:
    for block in blocks(path, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "roma_ray":
                assert node.attr in roma_ray.__all__


def commands(block: str) -> list[str]:
    """The command lines of a block, continued ones joined, comments left out."""
    return [line.strip() for line in re.sub(r"\s*\\\n\s*", " ", re.sub(r"(?m)(^|\s)#.*$", "", block)).splitlines()]


def shown_commands(path: Path) -> list[str]:
    """Every command line that a document shows, in blocks and within sentences."""
    text = path.read_text()
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    return [line for block in blocks(path, "") for line in commands(block)] + spans


@every_document
def test_commands_and_their_options_exist(path: Path) -> None:
    faults = []
    for line in shown_commands(path):
        found = re.search(r"(?:^|-- |\s)(?:roma-ray|python (?:/opt/roma-ray/)?jobs/(\w+)\.py)(?: |$)(.*)", line)
        if not found or (not found[1] and not re.match(r"(roma-ray|ray job submit) ", line)):
            continue
        if found[1] and found[1] not in JOBS:
            script = (ROOT / "jobs" / f"{found[1]}.py").read_text()
            faults += [line for word in shlex.split(found[2]) if word.startswith("--") and f'"{word}"' not in script]
            continue
        words = shlex.split(found[2]) if not found[1] else [JOBS[found[1]], *shlex.split(found[2])]
        if not words or words[0].startswith("-"):
            continue
        command = main.commands.get(words[0])
        options = {} if command is None else {name for option in command.params for name in option.opts}
        if command is None or any(word.startswith("--") and word not in options for word in words[1:]):
            faults.append(line)
    assert not faults


def test_every_command_is_described() -> None:
    table = (ROOT / "docs" / "commands.md").read_text().partition("## Commands")[2].partition("## ")[0]
    named = {
        name
        for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        for name in re.findall(r"`(?:roma-ray )?(\w+)`", row)
    }
    assert named == {name for name, command in main.commands.items() if isinstance(command, click.Command)}


def anchors(path: Path) -> set[str]:
    """The places in a Markdown file that links may name, as GitHub makes them of headings."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_document
def test_links_files_and_targets_exist(path: Path) -> None:
    text = path.read_text()
    for link, _, anchor in (match.partition("#") for match in re.findall(r"\]\(([^)\s]+)\)", text)):
        if "://" in link:
            continue
        target = path.parent / link if link else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), f"{link}#{anchor}"
    files = re.findall(r"`((?:roma_ray|configs|tests|docs|jobs|examples|cluster|\.ci)/[\w./-]+)`", text)
    files += re.findall(r"python ((?:jobs|benchmarks|examples|docs)/\w+\.py)", text)
    # `cluster/` is a folder of the repository and a room of the package.
    missing = [name for name in files if not any((place / name).exists() for place in (ROOT, ROOT / "roma_ray"))]
    assert not missing
    makefile = (ROOT / "Makefile").read_text()
    targets = set(
        re.findall(r"\bmake ([a-z]+)(?=[\s`])", re.sub(r"[^`]*?(```.*?```|`[^`]*`)", r"\1 ", text, flags=re.DOTALL))
    )
    assert targets <= set(re.findall(r"^(\w+):", makefile, re.MULTILINE)), targets


def test_the_map_of_the_house_names_files_that_are_there() -> None:
    table = (ROOT / "ARCHITECTURE.md").read_text().partition("## Where to look")[2].partition("## ")[0]
    named = re.findall(r"`([\w./]+\.py)`", table)
    assert len(named) > 50
    assert not [name for name in named if not any((place / name).is_file() for place in (ROOT / "roma_ray", ROOT))]


def test_the_map_of_the_documentation_names_every_page() -> None:
    text = (ROOT / "docs" / "README.md").read_text()
    assert not [
        page.name for page in ROOT.glob("docs/*.md") if page.name != "README.md" and f"]({page.name})" not in text
    ]


@pytest.mark.parametrize("path", [README, *sorted(ROOT.glob("docs/*.md"))], ids=lambda path: path.name)
def test_code_fits_the_page(path: Path) -> None:
    found = re.findall(r"^```\w*\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
    widest = max((len(line) for block in found for line in block.splitlines()), default=0)
    assert widest <= 100


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
