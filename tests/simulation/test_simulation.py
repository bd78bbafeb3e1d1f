"""Schedules of faults through the core: none breaks an invariant, and every mutant of the core is found out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.mutants import MUTANTS
from tests.simulation.runner import Tally, play, play_all, trace

ROOT = Path(__file__).parents[2]
NUM_SCHEDULES = 10_000
"""`make simulate` plays more."""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_schedule_breaks_an_invariant() -> None:
    total = Tally()
    for tally in play_all(0, NUM_SCHEDULES, 200, num_processes=2):
        total.add(tally)
        assert total.violation is None, f"see python -m tests.simulation --start {total.violation[0]} --seeds 1"
    assert total.num_seeds == NUM_SCHEDULES
    assert total.missing == [], "a fault that never came up was not tested"


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_of_the_core_is_found(name: str) -> None:
    assert play(0, 2_000, 200, name).violation is not None


def test_a_seed_is_a_schedule() -> None:
    seeds = range(5)
    assert [trace(seed, 200) for seed in seeds] == [trace(seed, 200) for seed in seeds]
    assert trace(0, 200) != trace(1, 200)


def test_a_seed_is_the_same_schedule_in_every_process() -> None:
    command = [sys.executable, "-m", "tests.simulation", "--trace", "--start", "195"]
    shown = [
        subprocess.run(
            command, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in "12"
    ]
    assert shown[0].splitlines() == shown[1].splitlines()


def test_the_command_shows_the_schedule_that_broke_an_invariant() -> None:
    arguments = ["--seeds", "50", "--processes", "1", "--mutant", "SecondCompletion"]
    command = [sys.executable, "-m", "tests.simulation", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last, *_, first = done.stdout.splitlines()[::-1]
    assert "finish" in done.stdout
    assert last.startswith("I2 does not hold in seed")
    assert float(first.split()[0]) < 1, "the trace starts at the beginning"


def test_the_command_refuses_a_run_that_met_too_little() -> None:
    command = [sys.executable, "-m", "tests.simulation", "--seeds", "1", "--processes", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "never came up: " in done.stdout
