"""Anything in place of anything within a JSON value, for tests that no description crashes a reader."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**19) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


def changed(told: Any, data: st.DataObject) -> Any:
    """A copy of `told` with one node, drawn anywhere in the tree, replaced or dropped."""
    told = copy.deepcopy(told)
    node = told
    while True:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else list(range(len(node)))))
        if isinstance(node[key], dict | list) and node[key] and data.draw(st.booleans()):
            node = node[key]
        else:
            break
    if data.draw(st.integers(0, 3)):
        node[key] = data.draw(ANY)
    else:
        del node[key]
    return told
