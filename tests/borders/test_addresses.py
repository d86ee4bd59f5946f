"""No form of an address shows its secret, and what holds none is shown as it is."""

from __future__ import annotations

import base64
import html
import json
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roma_ray.borders.addresses import has_secret, hide, mask, mask_text
from roma_ray.config.loading import load_config
from roma_ray.errors import ConfigError

CANARY = "kanari3nvogel"
SECRET = [
    f"http://user:{CANARY}@host:5000/x",
    f"https://{CANARY}@host",
    f"http://user:{CANARY}/ss@host:5000",
    f"http://user:ss/{CANARY}@host",
    f"http://user:pa?{CANARY}@host",
    f"http://user:pa#{CANARY}@host",
    f"http://user:p@{CANARY}@host",
    f"http://user:p@ss/{CANARY}@host",
    f"http://u%3A{CANARY}@h",
    f"http://u%3A{CANARY}%40h",
    f"http://u%253A{CANARY}%2540h",
    f"http://u%3a{CANARY}",
    f"http://u:{CANARY}",
    f"http:/user:{CANARY}@host",
    f"user:{CANARY}@host:5000",
    f"http://host/?password={CANARY}",
    f"http://host/#access_token={CANARY}",
    f"postgresql://host/db?user=u&password={CANARY}",
    f"postgresql://host/db?user=u&pass%77ord={CANARY}",
    f"postgresql://host/db?password=a#{CANARY}&user=u",
    f"postgresql://host/db?password=a@{CANARY}",
    f"postgresql+psycopg2://u:{CANARY}@/db?host=/socket",
    f"mysql+pymysql://u:{quote('a ' + CANARY)}@h/d?charset=utf8",
    f"mssql+pyodbc:///?odbc_connect=DRIVER%3DX%3BUID%3Du%3BPWD%3D{CANARY}",
    f"mssql://host;user=u;password={CANARY}",
    f"sqlite+pysqlcipher://:{CANARY}@/file.db",
    f"sqlite:///file.db?key={CANARY}",
    f"https://host/api?api-key={CANARY}",
    f"https://host/api?sig={CANARY}&se=1",
    f"https://host/api?X-Amz-Signature={CANARY}",
]
PLAIN = [
    "http://host:5000",
    "https://[::1]:5000/x?experiment=a&keyboard=us",
    "sqlite:////home/me@work/mlflow.db",
    "sqlite:///runs.db?timeout=30",
    "postgresql://host/db?sslmode=require&user=me",
    "databricks",
    "databricks://profile",
    "x:",
]


@pytest.mark.parametrize("uri", SECRET)
def test_a_secret_is_seen_masked_and_refused_without_being_told(uri: str) -> None:
    assert has_secret(uri)
    assert CANARY not in mask(uri)
    assert CANARY not in mask_text(f"cannot reach {uri}, sorry") or "://" not in uri
    for override in (f"tracking.uri={uri}", f"tracking.uri='{uri}'", f"tracking='{uri}'", f"tracking={{uri: [{uri}]}}"):
        with pytest.raises(ConfigError) as refused:
            load_config(None, [override])
        assert CANARY not in str(refused.value), override
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI"):
        load_config(None, [f"tracking.uri={json.dumps(uri)}"])


@pytest.mark.parametrize("uri", PLAIN)
def test_what_holds_no_secret_is_shown_whole(uri: str) -> None:
    assert not has_secret(uri)
    assert mask(uri) == uri
    assert hide(f"cannot reach {uri}!", uri) == f"cannot reach {uri}!"


def test_where_a_secret_is_not_told_apart_the_rest_is_shown() -> None:
    assert mask("https://me:secret@host:5000/x") == "https://***@host:5000/x"
    assert mask("postgresql://me@host/db?password=p&a=b") == "postgresql://***@host/db?***"
    assert mask("http://me:se/cret@host") == "http://***"


@pytest.mark.parametrize("uri", SECRET)
def test_a_text_about_an_address_holds_its_secret_in_no_form(uri: str) -> None:
    basic = base64.b64encode(f"user:{CANARY}".encode()).decode()
    said = [uri, CANARY, CANARY.upper(), repr(uri), json.dumps(uri), html.escape(uri), quote(uri), f"of host {CANARY}"]
    hidden = hide(" | ".join(said), uri)
    assert CANARY not in hidden.lower(), hidden
    if f"//user:{CANARY}@" in uri:
        assert basic not in hide(f"Authorization: Basic {basic}", uri)


def test_what_mlflow_sends_is_hidden_in_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", CANARY)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t0ken")
    basic = base64.b64encode(f"me:{CANARY}".encode()).decode()
    assert hide(f"you sent {basic} or {CANARY} or t0ken", "http://host") == "you sent *** or *** or ***"


def test_a_short_password_does_not_eat_words() -> None:
    assert hide("a cat at http://u:a@h said: a", "http://u:a@h") == "*** cat at http://***@h said: ***"


odd = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=8)


@given(before=odd, after=odd, host=st.sampled_from(["host", "127.0.0.1:5000", "[::1]:80", ""]), scheme=odd)
def test_no_userinfo_gets_through(before: str, after: str, host: str, scheme: str) -> None:
    for uri in (f"http://u:{before}{CANARY}{after}@{host}/x", f"{scheme}://{before}{CANARY}{after}@{host}"):
        assert has_secret(uri)
        assert CANARY not in mask(uri)
        assert CANARY not in hide(f"at {uri}: {before}{CANARY}{after}", uri)
