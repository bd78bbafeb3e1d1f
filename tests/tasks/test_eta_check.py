"""What became of expected times is counted."""

import uuid

import pytest
from prometheus_client import REGISTRY

from db.jobs import Claimed
from tasks import inference


def claimed(backend: str, p50: float | None, p90: float | None) -> Claimed:
    return Claimed(uuid.uuid4(), 1, b"", False, backend, "generate", 0, 1000.0, 0, uuid.uuid4(), 1, p50, p90)


@pytest.mark.parametrize(
    ("p50", "p90", "within", "error_s"), [(2000.0, 3000.0, "p50", 0.5), (1400.0, 1600.0, "p90", 0.1), (1000.0, 1400.0, "late", 0.5)]
)  # fmt: skip
def test_an_answer_is_compared_with_what_was_expected(p50: float, p90: float, within: str, error_s: float) -> None:
    backend = f"of-{within}"
    inference._check_eta(claimed(backend, p50, p90), stored_s=0.5)
    assert REGISTRY.get_sample_value("switchyard_eta_jobs_total", {"backend": backend, "within": within}) == 1
    assert REGISTRY.get_sample_value("switchyard_eta_error_seconds_sum", {"backend": backend}) == pytest.approx(error_s)


def test_where_nothing_was_expected_nothing_is_counted() -> None:
    inference._check_eta(claimed("of-none", None, None), stored_s=0.5)
    assert REGISTRY.get_sample_value("switchyard_eta_error_seconds_sum", {"backend": "of-none"}) is None
