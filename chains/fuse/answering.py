"""Foreign ONNX graphs that answer: in this process, or in one of their own that can be confined.   [no torch]

    python -m chains.fuse.answering GRAPH THREADS

The program reads the graph and its standard input, and writes to its standard output: a line of JSON that says what the
graph wants to see, then for every batch a line with the shapes of its answer, followed by the numbers as float32. What
comes out is somebody else's: whoever started it checks each line and its own clock.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Timer
from typing import IO, Annotated, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from chains.errors import WeightsRefused
from chains.importers.frozen import Floats, Pixels, Session, read_graph

HEADER = struct.Struct("<3q")  # of a batch: images, height, width
FLOAT_BYTES = 4
MAX_LINE_BYTES = 16 * 1024
MAX_REASON = 2000  # characters
MAX_ANSWER_BYTES = 2**31
PATIENCE_S = 600.0  # for a graph to be loaded, and for each answer

Answers = tuple[Floats, Floats | None]
"""embeddings (n, D), and maps (n, C, h, w) where there are any"""


@dataclass(frozen=True, eq=False)
class Answerer:
    """A graph, wherever it runs. height, width: `None` where it takes any size. pixels: where it states them. answer:
    of normalised images (n, 3, H, W); raises `WeightsRefused`."""

    height: int | None
    width: int | None
    pixels: Pixels | None
    answer: Callable[[Floats], Answers]


@dataclass(frozen=True)
class Confinement:
    """How a program is started that may do no harm: the words in front of its own, and all the environment it gets."""

    command: tuple[str, ...]
    environment: Mapping[str, str]


def here(path: Path, threads: int) -> Answerer:
    """The graph in `path`, run by this process. Raises `WeightsRefused`."""
    graph = read_graph(path)
    return Answerer(graph.height, graph.width, graph.pixels, Session(graph, threads, with_map=True))


@contextmanager
def confined(path: Path, threads: int, how: Confinement) -> Iterator[Answerer]:
    """The graph in `path`, run by a process of its own until the end of the block. Raises `WeightsRefused`, also for a
    process that ends, or that keeps its user waiting for `PATIENCE_S`."""
    words = [*how.command, sys.executable, "-m", "chains.fuse.answering", str(path), str(threads)]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, bufsize=0, stdin=pipe, stdout=pipe, env=how.environment) as process:  # noqa: S603
        try:
            program = _Program(process, _open(process.stdin), _open(process.stdout))
            wanted = program.begun()
            yield Answerer(wanted.height, wanted.width, wanted.pixels, program.answer)
        finally:
            process.kill()


class _Line(BaseModel):
    """refused: why nothing more will come."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    refused: str | None = None


class _Wanted(_Line):
    height: Annotated[int | None, Field(ge=16, le=1024)] = None
    width: Annotated[int | None, Field(ge=16, le=1024)] = None
    pixels: Pixels | None = None


Shape = Annotated[tuple[Annotated[int, Field(ge=0, le=2**31)], ...], Field(max_length=8)]


class _Shapes(_Line):
    embedding: Shape = ()
    map: Shape | None = None


Said = TypeVar("Said", bound=_Line)


class _Program:
    """The other side of `main`."""

    def __init__(self, process: subprocess.Popen[bytes], source: IO[bytes], sink: IO[bytes]) -> None:
        self._process, self._in, self._out = process, source, sink
        self._was_slow = False

    def begun(self) -> _Wanted:
        with self._patience():
            return self._heard(_Wanted)

    def answer(self, images: Floats) -> Answers:
        with self._patience():
            self._send(HEADER.pack(len(images), *images.shape[2:]))
            self._send(np.ascontiguousarray(images, np.float32).tobytes())
            shapes = self._heard(_Shapes)
            embedding = self._received(shapes.embedding)
            return embedding, None if shapes.map is None else self._received(shapes.map)

    @contextmanager
    def _patience(self) -> Iterator[None]:
        """Ends a process that takes too long, and so whatever waits for it."""
        timer = Timer(PATIENCE_S, self._lose)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _lose(self) -> None:
        self._was_slow = True
        self._process.kill()

    def _send(self, content: bytes) -> None:
        left = memoryview(content)
        try:
            while left:
                left = left[os.write(self._in.fileno(), left) :]
        except OSError as error:
            raise self._gone() from error

    def _heard(self, kind: type[Said]) -> Said:
        line = self._out.readline(MAX_LINE_BYTES)
        if not line:
            raise self._gone()
        try:
            said = kind.model_validate_json(line)
        except ValidationError as error:
            raise WeightsRefused("the program that runs the graph answered something that is no answer") from error
        if said.refused is not None:
            raise WeightsRefused(said.refused[:MAX_REASON])
        return said

    def _received(self, shape: tuple[int, ...]) -> Floats:
        size_bytes = FLOAT_BYTES * prod(shape)
        if size_bytes > MAX_ANSWER_BYTES:
            raise WeightsRefused(f"the graph answers shape {shape}; {MAX_ANSWER_BYTES:,} bytes an answer can be taken")
        content = bytearray(size_bytes)
        left = memoryview(content)
        while left:
            if not (count := os.readv(self._out.fileno(), [left])):
                raise self._gone()
            left = left[count:]
        return np.frombuffer(content, np.float32).reshape(shape)

    def _gone(self) -> WeightsRefused:
        if self._was_slow:
            return WeightsRefused(f"the graph took longer than {PATIENCE_S:g} s for one answer")
        status = self._process.wait()
        return WeightsRefused(
            f"the program that runs the graph ended with status {status}; the log has its last words, and without any "
            "it may have wanted more memory than it had"
        )


def _open(pipe: IO[bytes] | None) -> IO[bytes]:
    """The pipe that was asked for."""
    assert pipe is not None  # noqa: S101
    return pipe


def main(arguments: Sequence[str]) -> int:
    """Answers until its input ends. What libraries print goes where errors go, for it must not look like an answer."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        graph = here(Path(arguments[0]), int(arguments[1]))
        _tell(out, _Wanted(height=graph.height, width=graph.width, pixels=graph.pixels))
        while header := sys.stdin.buffer.read(HEADER.size):
            count, height, width = HEADER.unpack(header)
            content = sys.stdin.buffer.read(FLOAT_BYTES * count * 3 * height * width)
            images = np.frombuffer(content, np.float32).reshape(count, 3, height, width)
            embedding, found = graph.answer(images)
            _tell(out, _Shapes(embedding=embedding.shape, map=None if found is None else found.shape))
            for answer in (embedding, found):
                if answer is not None:
                    out.write(answer.tobytes())
            out.flush()
    except WeightsRefused as error:
        _tell(out, _Line(refused=str(error)[:MAX_REASON]))
    except MemoryError:
        _tell(out, _Line(refused="the graph takes more memory than the program that runs it may use"))
    return 0


def _tell(out: IO[bytes], line: _Line) -> None:
    out.write(line.model_dump_json(exclude_unset=True).encode() + b"\n")
    out.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
