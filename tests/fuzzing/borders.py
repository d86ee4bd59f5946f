"""What strangers name and address: task and run names, URIs with secrets, YAML with aliases, the texts in an adapter's JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import strategies as st
from rich.console import Console

from roma_ray.assets import assets_path
from roma_ray.borders.addresses import has_secret, mask, mask_text
from roma_ray.borders.documents import MOST_CHARACTERS, load_yaml
from roma_ray.borders.text import clean, printable, reserved
from roma_ray.config.loading import load_config, parse_config
from roma_ray.config.schema import QuestionSource
from roma_ray.errors import ConfigError
from roma_ray.figures.escaping import csv_text, markdown
from roma_ray.moe.adapters import PEFT_CONFIG, RouterCheckpoint, write_adapter
from roma_ray.moe.folders import MANIFEST
from roma_ray.moe.inspection import describe
from roma_ray.questions.readers import read_questions
from roma_ray.terminal import LiveBoard
from tests.fuzzing.runner import Target
from tests.hostile import CLAIMS, FORMULAS, MARKDOWN, MARKUP, UNUSABLE, obeyed

Opened = tuple[st.SearchStrategy[Any], Callable[[Any], None]]

_PIECES = st.sampled_from([*MARKUP, *UNUSABLE, *CLAIMS, *MARKDOWN, *FORMULAS]) | st.text(max_size=6)
NAMES = st.lists(_PIECES, max_size=4).map("".join)
CANARY = "c4n4rypassw0rd"


def names(folder: Path) -> Opened:
    """Names of tasks and runs: refused, or shown as they are and obeyed by nothing."""
    path = folder / "q.jsonl"
    base = load_config().model_dump(mode="json")

    def read(name: str) -> None:
        row = {"question": "Why?", "choices": ["so", "not"], "answer": 1, "task": name}
        path.write_text(json.dumps(row) + "\n")
        stream = io.StringIO()
        with LiveBoard(Console(file=stream, width=4000)) as board:
            board.show(name, ("trial", "state", name), [(name, "running", name)])
        shown = [stream.getvalue(), clean(name), printable(name), markdown(name), csv_text([[name]])]
        assert not any(map(obeyed, shown)), "a terminal obeys it"
        if "\t" not in name:  # a table draws blanks for it
            assert clean(name).partition("\n")[0].rstrip() in stream.getvalue(), "a name was taken for markup"
        task = read_questions([QuestionSource(path=str(path))])[0][0].task
        assert parse_config({**base, "name": name}).name == name
        assert not obeyed(task)
        # An empty name is no name: the file's stands for it.
        assert task == (name.strip() or "q")
        assert not reserved(task)

    return NAMES, read


def addresses(folder: Path) -> Opened:
    """Addresses of servers with a secret in them: never accepted, and repeated nowhere."""
    base = load_config().model_dump(mode="json")
    part = st.sampled_from(["", "u", "a.b", "%3A", "%40", "/", "?", "#", ":", "@", "[::1]", "x%2Fy", "+"]) | st.text(
        "abz019.-_~", max_size=4
    )
    scheme = st.sampled_from(["http://", "https://", "postgresql://", "mysql+pymysql://", "mssql+pyodbc://", "HTTP://"])
    login = st.tuples(part, st.sampled_from([":", "%3A", ""]), part, st.sampled_from(["@", "%40"])).map(
        lambda p: f"{p[0]}{p[1]}{CANARY}{p[2]}{p[3]}"
    )
    secret = st.sampled_from(["password", "passwd", "token", "api_key", "sslpassword", "PWD", "secret"]).map(
        lambda name: f"?x=1&{name}={CANARY}"
    )
    host = st.sampled_from(["host", "host:5000", "h.example/db", "127.0.0.1:1/mlflow"])
    strategy = st.one_of(
        st.tuples(scheme, login, host, st.just("")),
        st.tuples(scheme, st.just(""), host, secret),
        st.tuples(scheme, st.just(""), host, st.sampled_from(["", "/x", "?y=2"])),
    ).map("".join)

    def read(uri: str) -> None:
        assert CANARY not in mask(uri), "the mask shows a secret"
        assert CANARY not in mask_text(f"cannot reach {uri} now"), "a text shows a secret"
        assert has_secret(uri) or CANARY not in uri
        try:
            parse_config({**base, "tracking": {"uri": uri}})
        except ConfigError as error:
            refusal = str(error)
            assert CANARY not in refusal, "the refusal repeats a secret"
            raise
        assert CANARY not in uri, "a secret was accepted"

    return strategy, read


def aliases(folder: Path) -> Opened:
    """YAML whose aliases unfold, loop, merge and repeat."""
    path = folder / "run.yaml"
    anchors = st.sampled_from("abcd")
    leaf = st.one_of(
        anchors.map("*{}".format),
        st.sampled_from(
            ["x", "1", "1:59:59", "null", "yes", "'y'", "0x1F", "1e999", "!!set {a}", "!!binary eA==", "2020-01-01"]
        ),
    )

    def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        lists = st.lists(inner, max_size=9).map(lambda parts: f"[{', '.join(parts)}]")
        maps = st.lists(st.tuples(st.sampled_from(["k", "l", "<<", "name", "1"]), inner), max_size=4).map(
            lambda pairs: "{" + ", ".join(f"{key}: {value}" for key, value in pairs) + "}"
        )
        return st.one_of(
            lists, maps, st.tuples(inner, st.integers(1, 9)).map(lambda p: f"[{', '.join([p[0]] * p[1])}]")
        )

    value = st.recursive(leaf, grown, max_leaves=8)
    lines = st.lists(st.tuples(anchors, value), max_size=6).map(
        lambda pairs: "".join(f"{name}{n}: &{name} {text}\n" for n, (name, text) in enumerate(pairs))
    )
    levels = st.tuples(st.integers(0, 40), st.integers(1, 12)).map(
        lambda size: (
            "z0: &z0 [x]\n"
            + "".join(f"z{n}: &z{n} [{', '.join([f'*z{n - 1}'] * size[1])}]\n" for n in range(1, size[0]))
        )
    )
    whole = assets_path() / "demo.yaml"
    good = whole.read_text(encoding="utf-8")

    def read(text: str) -> None:
        path.write_text(text, encoding="utf-8")
        try:
            load_config(path)
        except ConfigError as error:
            refusal = str(error)
            assert len(refusal) < 20_000, "the refusal repeats what it refuses"
        try:
            found = load_yaml(text)
        except (yaml.YAMLError, ValueError) as error:
            raise ConfigError(str(error)) from None
        assert len(repr(found)) < 16 * MOST_CHARACTERS, "aliases unfold without bound"

    tail = st.sampled_from(["", "name: n\n"])
    return st.one_of(
        st.tuples(lines, tail).map("".join), levels, st.tuples(st.just(good), tail, lines).map("".join)
    ), read


def adapter_texts(folder: Path) -> Opened:
    """Every text of an adapter's JSON files with commands to a terminal in it: what `inspect` prints holds none."""
    target = folder / "adapter"
    tensors = {"model.layers.11.mlp.gate.weight": torch.randn(4, 6)}
    write_adapter(target, RouterCheckpoint(tensors, {}, "base", None, "olmoe", (11,), 4, "float32", "f" * 16))
    files = {name: (target / name).read_bytes() for name in (MANIFEST, PEFT_CONFIG)}
    fields = [(name, key) for name, data in files.items() for key in json.loads(data)]

    def read(given: tuple[tuple[str, str], Any]) -> None:
        (name, key), value = given
        for file, data in files.items():
            (target / file).write_bytes(data)
        (target / name).write_text(json.dumps({**json.loads(files[name]), key: value}))
        assert not obeyed(describe(target)), "a terminal obeys it"

    values = st.one_of(
        NAMES, NAMES, st.lists(NAMES, max_size=2), st.dictionaries(NAMES, NAMES, max_size=2), st.integers()
    )
    return st.tuples(st.sampled_from(fields), values), read


BORDERS = (
    Target("names", names, 10),
    Target("addresses", addresses, 10),
    Target("YAML with aliases", aliases, 10),
    Target("texts of adapters", adapter_texts, 10),
)
