"""Ids that were used are known as a dictionary knows them, whether they are recent or sorted in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roma_ray.questions import seen_ids
from roma_ray.questions.seen_ids import SeenIds


@given(st.lists(st.tuples(st.text(max_size=2), st.sampled_from(["a", "b"])), max_size=60), st.integers(1, 20))
def test_ids_are_known_with_the_place_of_their_first_use(uses: list[tuple[str, str]], recent: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(seen_ids, "_RECENT", recent)
        seen = SeenIds()
        literal: dict[str, tuple[str, int]] = {}
        for line, (id, file) in enumerate(uses):
            first = seen.first_use(id)
            assert first == literal.get(id)
            if first is None:
                seen.add(id, file, line)
                literal[id] = (file, line)
        assert all(seen.first_use(id) == place for id, place in literal.items())
        assert seen.first_use("longer than any of them") is None


def test_ids_whose_digests_begin_alike_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen_ids, "_RECENT", 1)
    monkeypatch.setattr(seen_ids, "_digest", lambda id: b"the same" + id.encode().rjust(8))
    seen = SeenIds()
    for line, id in enumerate("abc"):
        assert seen.first_use(id) is None
        seen.add(id, "file", line)
    assert [seen.first_use(id) for id in "abcd"] == [("file", 0), ("file", 1), ("file", 2), None]
