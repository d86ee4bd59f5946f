"""Locks: one holder, or many that share; who holds it is known."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from roma_ray.store.locks import Held, locked


def test_one_holder_at_a_time_who_signs(tmp_path: Path) -> None:
    place = tmp_path / "folder" / ".lock"
    with locked(place, sign=True):
        with pytest.raises(Held, match=f"pid {os.getpid()}"), locked(place):
            raise AssertionError("two hold it")
    with locked(place):
        pass


def test_those_who_share_keep_others_out(tmp_path: Path) -> None:
    place = tmp_path / ".in-use"
    with locked(place, shared=True), locked(place, shared=True):
        with pytest.raises(Held), locked(place):
            raise AssertionError("two hold it")
