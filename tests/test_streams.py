"""What cannot be printed never fails the work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TALK = """
from sophon.streams import make_unfailing
import sys
make_unfailing()
for stream in (sys.stdout, sys.stderr):
    print("gr\\u00fc\\u00dfe \\udc80" * 20000, file=stream, flush=True)
sys.exit(7)
"""


ALTERNATE = """
from sophon.streams import make_unfailing
import sys
make_unfailing()
for number in range(3):
    print(number, "out")
    print(number, "err", file=sys.stderr)
"""


def test_one_log_has_both_in_order() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    log = subprocess.run(
        [sys.executable, "-c", ALTERNATE], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, check=True
    ).stdout
    assert log.decode().split() == ["0", "out", "0", "err", "1", "out", "1", "err", "2", "out", "2", "err"]


@pytest.mark.parametrize(
    ("to", "encoding"),
    [
        *(("read", each) for each in ("ascii", "latin-1:strict")),
        *((to, "ascii") for to in ("/dev/full", "broken pipe", "closed")),
    ],
)
def test_the_exit_code_is_that_of_the_work(tmp_path: Path, encoding: str, to: str) -> None:
    script = tmp_path / "talk.py"
    script.write_text(TALK)
    command, target = [sys.executable, str(script)], subprocess.PIPE
    if to == "closed":
        command = ["sh", "-c", 'exec "$0" "$1" >&- 2>&-', *command]
    elif to == "broken pipe":
        reading, target = os.pipe()
        os.close(reading)
    elif to != "read":
        target = os.open(to, os.O_WRONLY)
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(command, stdout=target, stderr=target, env=environment)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 7
    if to == "read":
        name = encoding.split(":")[0]
        text = ("grüße \udc80" * 20000 + "\n").encode(name, "backslashreplace")
        assert out == err == text
    elif target != subprocess.PIPE:
        os.close(target)
