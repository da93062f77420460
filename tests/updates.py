"""Updates that property tests draw."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

UPDATES = st.dictionaries(
    st.sampled_from(["a", "b", "c"]),
    arrays(
        np.float32,
        array_shapes(max_dims=2, max_side=4),
        elements=st.floats(-1e6, 1e6, width=32),
    ),
    min_size=1,
)
