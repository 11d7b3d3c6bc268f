"""Standard streams of any kind: what they cannot take ends no command, and no file gets what is printed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lrt_jax.setup.streams import Stream, StreamError

ROOT = Path(__file__).parents[1]
PREPARED = "import sys\nfrom lrt_jax.setup import streams\nstreams.prepare()\n"


def run(
    program: str, redirected: str = "", given: bytes = b"", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """Runs a program once its streams are prepared, in a shell that redirects them."""
    shell = ["sh", "-c", f'exec "$0" -c "$1" {redirected}', sys.executable, PREPARED + program]
    return subprocess.run(shell, cwd=ROOT, input=given, capture_output=True, env={**os.environ, **environment})


def a_pipe_without_a_reader() -> Stream:
    reader, writer = os.pipe()
    os.close(reader)
    return Stream(os.fdopen(writer, "w"), lasting=False)


def test_a_reader_that_is_gone_is_an_error_or_outlived():
    stream = a_pipe_without_a_reader()
    with pytest.raises(BrokenPipeError):
        print("x", file=stream, flush=True)
    stream.lasting = True
    for _ in range(3):
        print("x" * 100_000, file=stream, flush=True)
    stream.close()  # what was in its buffer went nowhere


def test_a_full_disk_is_told_in_one_sentence_or_outlived():
    stream = Stream(Path("/dev/full").open("w"), lasting=False)  # noqa: SIM115
    with pytest.raises(StreamError, match=r"^standard output cannot be written \(No space left on device\)$"):
        print("x", file=stream, flush=True)
    stream.lasting = True
    print("x", file=stream, flush=True)
    with pytest.raises(OSError, match="No space left"):  # it is kept, should there be room again
        stream.close()


def test_what_an_encoding_lacks_becomes_a_question_mark():
    done = run(r"print('a → b 😀 \udcff'); print('ü', file=sys.stderr)", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"a ? b ? ?\n", b"\\xfc\n")
    assert run(r"print('é → \udcff')", PYTHONIOENCODING="latin-1").stdout == b"\xe9 ? ?\n"
    assert run(r"print('→ \udcff')", PYTHONIOENCODING="utf-8").stdout == "→ ?\n".encode()


def test_input_is_read_whatever_its_bytes_are():
    for encoding, given, expected in (
        ("ascii", "ü".encode(), "ü"),
        ("utf-8", b"\xff", "\udcff"),
        ("latin-1", b"\xfc", "ü"),
    ):
        done = run("print(ascii(input()))", given=given, PYTHONIOENCODING=encoding)
        assert (done.stdout.decode().strip(), done.stderr) == (ascii(expected), b"")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_no_file_takes_the_place_of_a_stream_that_is_closed(closed, tmp_path):
    program = f"""
import os
file = open({str(tmp_path / "file")!r}, "w")
print("printed", flush=True)
print("told", file=sys.stderr, flush=True)
os.write(1, b"raw"), os.write(2, b"raw")
assert sys.stdin.read() == ""
file.close()
"""
    done = run(program, closed)
    assert done.returncode == 0 and (tmp_path / "file").read_text() == ""
    assert done.stdout == (b"" if ">&-" in closed.replace("2>&-", "") else b"printed\nraw")
