"""Tensors of which each rank has a part, in files that any number of ranks open, whatever part each of them has.

A directory holds a file of safetensors for each rank that wrote. A tensor in it is a run of the values of a parameter.
Its name says what of that it is (the weight, a moment), where it starts in the flat parameter, and which parameter.
safetensors' own functions would copy all that lies on a GPU at once, and read through a map of the file, which counts
as memory; here values go from where they lie to the disk, and back.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
CHUNK = 2**22
"""Values of a tensor on a GPU that are copied at once."""


@dataclass(frozen=True)
class Fragment:
    """Says where a run of the values of one parameter lies in a rank's flat tensors."""

    name: str
    whole: int
    """Values of the whole parameter."""
    start: int
    """Offset of the run in the parameter."""
    count: int
    tensor: int
    """Index of the rank's tensor that has it."""
    offset: int
    """Offset of the run in that tensor."""

    def share(self, rank: int, size: int) -> "Fragment":
        """Return the part that one of `size` ranks writes which all have the fragment."""
        first, end = self.count * rank // size, self.count * (rank + 1) // size
        return Fragment(self.name, self.whole, self.start + first, end - first, self.tensor, self.offset + first)

    def of(self, tensors: Sequence[Tensor | None]) -> Tensor | None:
        tensor = tensors[self.tensor]
        return None if tensor is None else tensor.detach().view(-1)[self.offset : self.offset + self.count]


@dataclass(frozen=True)
class StoredRun:
    """Says where a run of the values of a parameter lies in a file."""

    start: int
    stop: int
    dtype: str
    file: Path
    position: int


def write_fragments(
    file: Path, fragments: Iterable[Fragment], tensors: Mapping[str, Sequence[Tensor | None]], notes: Mapping[str, Any]
) -> None:
    """Write the fragments of each kind of `tensors`; None among them are left out. `notes` is plain JSON."""
    header: dict[str, Any] = {"__metadata__": {"notes": json.dumps(notes)}}
    parts, end = [], 0
    for kind, of_kind in tensors.items():
        for fragment in fragments:
            part = fragment.of(of_kind)
            if part is None or not fragment.count:
                continue
            parts.append(part)
            begin, end = end, end + part.nbytes
            name = f"{kind}:{fragment.start}:{fragment.name}"
            header[name] = {"dtype": DTYPES[part.dtype], "shape": [fragment.count], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            for chunk in [part] if part.device.type == "cpu" else part.split(CHUNK):
                out.write(_bytes(chunk.cpu()))


class FragmentReader:
    """Reads the files of a directory; raises ValueError, KeyError or EOFError where they are damaged."""

    def __init__(self, directory: Path):
        self.runs: dict[tuple[str, str], list[StoredRun]] = {}
        """The runs that were written, by kind and parameter."""
        self.notes: list[dict[str, Any]] = []
        """The notes of the files."""
        for file in sorted(directory.glob("*.safetensors")):
            self._look(file)
        if not self.notes:
            raise FileNotFoundError(f"{directory} holds no *.safetensors")

    def _look(self, file: Path) -> None:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > file.stat().st_size:
                raise ValueError(f"{file.name} is cut")
            header = json.loads(opened.read(length))
        self.notes.append(json.loads(header.pop("__metadata__")["notes"]))
        for key, about in header.items():
            kind, start, name = key.split(":", 2)
            first, position = int(start), 8 + length + about["data_offsets"][0]
            run = StoredRun(first, first + about["shape"][0], about["dtype"], file, position)
            self.runs.setdefault((kind, name), []).append(run)

    def read(self, fragments: Iterable[Fragment], tensors: Mapping[str, Sequence[Tensor | None]]) -> None:
        """Fill the fragments of each kind of `tensors`, which are of the dtypes that were written; None are left out.

        Nothing else is read, and on a CPU nothing is held beside the tensors.
        """
        by_file: dict[Path, list[tuple[int, Tensor]]] = {}
        for kind, of_kind in tensors.items():
            for fragment in fragments:
                part = fragment.of(of_kind)
                if part is not None:
                    for run, position, values in self._sources(kind, fragment, part):
                        by_file.setdefault(run.file, []).append((position, values))
        for file, wanted in by_file.items():
            with file.open("rb") as opened:
                for position, values in sorted(wanted, key=lambda pair: pair[0]):
                    opened.seek(position)
                    _fill(opened, values)

    def whole(self, kind: str) -> dict[str, Tensor]:
        """Return all that was written of a kind, flat, by the names of the parameters."""
        runs = {name: runs for (of, name), runs in self.runs.items() if of == kind}
        sizes = {name: max(run.stop for run in of_name) for name, of_name in runs.items()}
        tensors = [torch.empty(size, dtype=TORCH_DTYPES[runs[name][0].dtype]) for name, size in sizes.items()]
        fragments = [Fragment(name, size, 0, size, index, 0) for index, (name, size) in enumerate(sizes.items())]
        self.read(fragments, {kind: tensors})
        return dict(zip(sizes, tensors, strict=True))

    def _sources(self, kind: str, fragment: Fragment, part: Tensor) -> Iterable[tuple[StoredRun, int, Tensor]]:
        """Yield runs, positions in their files, and the values to fill from there."""
        runs = sorted(self.runs.get((kind, fragment.name), ()), key=lambda run: run.start)
        stop = max((run.stop for run in runs), default=0)
        if stop != fragment.whole:
            raise ValueError(f"{kind} of {fragment.name} has {stop} values there and {fragment.whole} here")
        at, end = fragment.start, fragment.start + fragment.count
        for run in runs:
            until = min(run.stop, end)
            if run.start <= at < until:
                if run.dtype != DTYPES[part.dtype]:
                    raise ValueError(f"{kind} of {fragment.name} is {run.dtype} there and {DTYPES[part.dtype]} here")
                position = run.position + (at - run.start) * part.element_size()
                yield run, position, part[at - fragment.start : until - fragment.start]
                at = until
        if at < end:
            raise ValueError(f"{kind} of {fragment.name} is not whole")


def _fill(file: IO[bytes], values: Tensor) -> None:
    for chunk in [values] if values.device.type == "cpu" else values.split(CHUNK):
        read = torch.empty_like(chunk, device="cpu") if chunk is not values else chunk
        if file.readinto(_bytes(read)) < read.nbytes:  # type: ignore[attr-defined]
            raise EOFError(f"{file.name} is cut")
        if read is not chunk:
            chunk.copy_(read)


def _bytes(values: Tensor) -> memoryview:
    return memoryview(cast(Any, values.view(torch.uint8).numpy()))
