"""How many examples a property is tried with: few, and on every machine the same, in `make test`, so that what a new one
finds does not fail another's change; many new ones in `make fuzz-parsers`."""

import os

from hypothesis import HealthCheck, settings

FACTOR = int(os.environ.get("SWITCHYARD_FUZZ_FACTOR", "1"))


def examples(number: int = 100) -> settings:
    """So many, times the factor that was asked for."""
    return settings(
        max_examples=number * FACTOR, deadline=None, derandomize=FACTOR == 1, suppress_health_check=list(HealthCheck)
    )
