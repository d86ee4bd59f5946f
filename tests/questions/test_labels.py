"""Texts as numbers: which of them some questions have."""

from __future__ import annotations

import numpy as np

from roma_ray.questions.labels import Labels


def test_the_texts_of_some_questions() -> None:
    labels = Labels()
    labels.add(["b", "a", "b", "c"])
    assert labels.present(np.array([True, False, True, False])) == {"b"}
    assert labels.present(np.array([False, True, False, True])) == {"a", "c"}
    assert labels.present(np.zeros(4, dtype=bool)) == set()
    labels.put(np.array([True, False, True, False]), "d")
    assert labels.present(np.ones(4, dtype=bool)) == {"a", "c", "d"}
