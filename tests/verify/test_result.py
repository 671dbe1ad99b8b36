"""What was found is written for people: thousands apart, as everywhere."""

from hf_gradacc.verify.preflight import Preflight
from hf_gradacc.verify.result import ParityReport


def test_counts_have_their_thousands_apart():
    preflight = Preflight(2_048, 9_000, 4_096, 1.0, 2**30, None, "cpu")
    report = ParityReport(
        (), num_sequences=1_024, num_targets=2_383, num_micro_batches=1_000, preflight=preflight
    )
    lines = str(report).splitlines()
    assert lines[1].split() == ["rows", "1,024,", "2,383", "targets", "(),", "loss", "nan"]
    assert "1,000 micro-batches" in lines[3]
    assert "2,048 x 4,096 tokens on cpu" in lines[-1]
