from loadtest.server_state import Metrics

TEXT = """# HELP a_total something
# TYPE a_total counter
a_total{model="m",width="0"} 3.0
a_total{model="m",width="1"} 4.5
a_total{model="n",width="1"} 1e+02
a_created{model="m"} 1.7e+09
b 2.0
h_bucket{le="+Inf"} 9.0
"""


def test_series_are_summed_over_labels_that_are_not_given():
    metrics = Metrics.parse(TEXT)
    assert metrics.total("a_total") == 107.5
    assert metrics.total("a_total", model="m") == 7.5
    assert metrics.total("a_total", model="m", width="1") == 4.5
    assert metrics.total("b") == 2.0
    assert metrics.total("h_bucket") == 9.0
    assert metrics.total("absent") == metrics.total("a_total", model="x") == 0.0
