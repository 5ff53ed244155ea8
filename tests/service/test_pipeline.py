import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from service.pipeline import SORTED_WHOLE, likeliest


@given(
    st.sampled_from([1, 10, SORTED_WHOLE, SORTED_WHOLE + 1, 1000]),
    st.integers(1, 4),
    st.floats(0, 1),
    st.integers(0, 2**32 - 1),
)
def test_the_likeliest_are_the_first_of_all_in_order_and_ties_go_to_the_lower_index(classes, values, share, seed):
    rng = np.random.default_rng(seed)
    top_k = 1 + int(share * (classes - 1))
    ties_K = rng.integers(0, values, classes) / values
    for probabilities_K in (ties_K, rng.random(classes)):
        in_order = sorted(range(classes), key=lambda k: (-probabilities_K[k], k))
        assert likeliest(probabilities_K, top_k).tolist() == in_order[:top_k]
