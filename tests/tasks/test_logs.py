"""A log that nobody reads makes nobody wait."""

import os
from pathlib import Path

from tasks import metrics
from tasks.logs import Output


def _dropped() -> float:
    return float(metrics.DROPPED_LOG_LINES._value.get())


def test_a_full_pipe_drops_lines_and_goes_on_when_it_is_read() -> None:
    reader, writer = os.pipe()
    output, before = Output(writer), _dropped()
    for _ in range(100):
        output.write(b"x" * 9_999 + b"\n")
    assert _dropped() > before
    os.read(reader, 1 << 20)
    output.write("next\n")
    last = os.read(reader, 1 << 20)
    # What was cut off in the middle does not run into the next line.
    assert last in (b"next\n", b"\nnext\n")
    os.close(reader)
    output.write("to nobody\n")
    os.close(writer)


def test_a_file_gets_every_line_whole(tmp_path: Path) -> None:
    with (tmp_path / "log").open("ab") as file:
        output = Output(file.fileno())
        output.write("a" * 100_000 + "\n")
        output.write(b"b\n")
    assert (tmp_path / "log").read_bytes() == b"a" * 100_000 + b"\nb\n"
