"""A trace as a file: which image is due when, and with which request headers.

CSV with a header line. ``at_s`` is the instant in seconds, ascending; ``image`` is an index into the images sorted
by name, as ``read_images_by_name`` counts them; every other column is a request header, whose cell is its value and
whose empty cell leaves it out. ``TRACE.csv.json`` beside it says how it was drawn; it is believed only as long as
it fits the CSV bytes, and nobody needs it to replay the trace.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import itertools
import math
import random
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import numpy as np
from pydantic import TypeAdapter, ValidationError

from loadtest.corpus import MEDIA_TYPES, EncodedImage
from loadtest.mix import Mix
from loadtest.traces import Arrivals

AT, IMAGE = "at_s", "image"
SENT_BY_THE_CLIENT = frozenset({"connection", "content-length", "content-type", "host", "transfer-encoding"})
"""Headers that the HTTP client sets by itself; a trace that set them would break the request."""
_ABSENT = "(absent)"
_DECIMAL = re.compile(r"[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?", re.ASCII)
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", re.ASCII)  # RFC 9110, field names
_VALUE = re.compile(r"(?:[!-~](?:[ -~]*[!-~])?)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Trace:
    """N requests in the order of their instants. Raises ValueError when a column breaks the rules of the file.

    at_s     instants in s, 0 or more, ascending.
    image    indices, 0 or more.
    headers  name -> N values; an empty one leaves the header out.
    """

    at_s: tuple[float, ...]
    image: tuple[int, ...]
    headers: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_names([AT, IMAGE, *self.headers])
        lengths = {len(self.at_s), len(self.image), *(len(values) for values in self.headers.values())}
        if len(lengths) > 1:
            raise ValueError(f"columns of {sorted(lengths)} requests; allowed: one length")
        before_s = 0.0
        for place, (at_s, image, *values) in enumerate(self._rows()):
            problem = _problem(at_s, before_s, image, values)
            if problem:
                raise ValueError(f"request {place}: {problem}")
            before_s = at_s

    def _rows(self) -> Iterator[tuple[float, int, *tuple[str, ...]]]:
        return zip(self.at_s, self.image, *self.headers.values(), strict=True)

    def __len__(self) -> int:
        return len(self.at_s)

    def headers_of(self, place: int) -> dict[str, str]:
        """The headers that the request at that place carries."""
        return {name: values[place] for name, values in self.headers.items() if values[place]}

    def csv(self) -> str:
        """The text of its file; every number with all its digits."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([AT, IMAGE, *self.headers])
        writer.writerows((repr(at_s + 0.0), image, *values) for at_s, image, *values in self._rows())
        return out.getvalue()


@dataclass(frozen=True, slots=True)
class Origin:
    """How a trace was drawn.

    parameters  of its kind, by the names of ``loadtest.traces``, in the units that the names end in.
    images      how many there are to pick from.
    mixes       header values and their shares.
    sha256      of the CSV file.
    """

    kind: str
    parameters: dict[str, float]
    duration_s: float
    seed: int
    images: int
    mixes: tuple[str, ...]
    sha256: str = ""


_ORIGIN = TypeAdapter(Origin)


def parse_mix(text: str) -> Mix:
    """As ``Mix.parse``, and a value may be empty: ``Latency-Budget=25ms:3,:1`` leaves the header out of each fourth."""
    mix = Mix.parse(re.sub(r"(?<=[=,])(?=:)", _ABSENT, text))
    return Mix(mix.header, tuple(("" if value == _ABSENT else value, share) for value, share in mix.shares))


def fill(arrivals: Arrivals, images: int, mixes: Sequence[Mix], seed: int) -> Trace:
    """A trace of these arrivals: images in shuffled cycles of all, headers by their shares, both from the seed."""
    if images < 1:
        raise ValueError(f"{images} images; allowed: 1 or more")
    names = [mix.header for mix in mixes]
    if len({name.lower() for name in names}) < len(names):
        raise ValueError(f"mixes of {', '.join(names)}; allowed: one of each header")
    count = len(arrivals)
    order = random.Random(seed)
    picked = itertools.islice(_cycles(images, random.Random(order.getrandbits(64))), count)
    headers = {mix.header: tuple(itertools.islice(mix.endless(order.getrandbits(64)), count)) for mix in mixes}
    return Trace(tuple(arrivals.tolist()), tuple(picked), headers)


def _cycles(images: int, order: random.Random) -> Iterator[int]:
    cycle = list(range(images))
    while True:
        order.shuffle(cycle)
        yield from cycle


def write_trace(trace: Trace, path: Path, origin: Origin | None = None) -> None:
    """Write the CSV and, with an origin, how it was drawn beside it."""
    data = trace.csv().encode()
    path.write_bytes(data)
    note = _note(path)
    note.unlink(missing_ok=True)
    if origin is not None:
        signed = dataclasses.replace(origin, sha256=hashlib.sha256(data).hexdigest())
        note.write_bytes(_ORIGIN.dump_json(signed, indent=1) + b"\n")


def read_origin(path: Path) -> Origin | None:
    """How the trace was drawn; None when nothing says so, or the file was changed since. ValueError for a bad note."""
    note = _note(path)
    if not note.exists():
        return None
    try:
        origin = _ORIGIN.validate_json(note.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{note}: not what slicewise-load trace wrote: {error}") from error
    return origin if origin.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() else None


def _note(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def read_trace(path: Path) -> Trace:
    """Read a trace. Raises ValueError that begins with file:line and says what is allowed there."""
    try:
        text = path.read_bytes().decode("ascii")
    except UnicodeDecodeError as error:
        line = path.read_bytes().count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: a byte beyond ASCII; allowed: ASCII") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        names = next(reader, [])
        _check_names(names)
        rows = list(_parsed(reader, len(names)))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}:{max(reader.line_num, 1)}: {error}") from error
    columns = list(zip(*rows, strict=True)) or [()] * len(names)
    return Trace(tuple(columns[0]), tuple(columns[1]), dict(zip(names[2:], columns[2:], strict=True)))


def _parsed(reader: Iterable[list[str]], width: int) -> Iterator[list[object]]:
    before_s = 0.0
    for cells in reader:
        if len(cells) != width:
            raise ValueError(f"{len(cells)} cells; allowed: {width}, as the header line has")
        at_text, image_text, *values = cells
        if not _DECIMAL.fullmatch(at_text):
            raise ValueError(f"{AT} is {at_text!r}; allowed: a decimal number of seconds")
        if not (image_text.isascii() and image_text.isdigit()):
            raise ValueError(f"{IMAGE} is {image_text!r}; allowed: a whole number from 0")
        at_s, image = float(at_text), int(image_text)
        problem = _problem(at_s, before_s, image, values)
        if problem:
            raise ValueError(problem)
        yield [at_s, image, *values]
        before_s = at_s


def _check_names(names: Sequence[str]) -> None:
    if list(names[:2]) != [AT, IMAGE]:
        raise ValueError(f"columns are {','.join(names)}; allowed: {AT},{IMAGE}, then one for each header")
    seen: set[str] = set()
    for name in names[2:]:
        lower = name.lower()
        if not _TOKEN.fullmatch(name) or lower in SENT_BY_THE_CLIENT | {AT, IMAGE} | seen:
            taken = ", ".join(sorted(SENT_BY_THE_CLIENT))
            raise ValueError(f"column {name!r}; allowed: names of headers, each once, none of {taken}")
        seen.add(lower)


def _problem(at_s: float, before_s: float, image: int, values: Sequence[str]) -> str:
    """What is wrong with a request that follows one due at ``before_s``; empty when nothing is."""
    if not before_s <= at_s < math.inf:
        return f"{AT} is {at_s:g} s after {before_s:g} s; allowed: 0 s or more, ascending"
    if image < 0:
        return f"{IMAGE} is {image}; allowed: a whole number from 0"
    for value in values:
        if not _VALUE.fullmatch(value):
            return f"a header has the value {value!r}; allowed: printable ASCII without spaces around it"
    return ""


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """An image file and the name of the folder that it lies in, which is its true class; empty without a folder."""

    label: str
    image: EncodedImage


def read_images_by_name(path: Path, places: Iterable[int]) -> dict[int, LabelledImage]:
    """The images at these places of all JPEG, PNG and WebP files of a folder or a zip file, sorted by name.

    Names are those below ``path``, with ``/`` between folders, compared by code points. Raises ValueError when
    there is none, or when a place is beyond the last.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such folder or zip file")
    wanted = sorted(set(places))
    if path.is_dir():
        names = _sorted_images(path, (f.relative_to(path).as_posix() for f in path.rglob("*")), wanted)
        return {place: _labelled(names[place], (path / names[place]).read_bytes()) for place in wanted}
    with zipfile.ZipFile(path) as archive:
        names = _sorted_images(path, archive.namelist(), wanted)
        return {place: _labelled(names[place], archive.read(names[place])) for place in wanted}


def _sorted_images(path: Path, names: Iterable[str], wanted: Sequence[int]) -> list[str]:
    images = sorted(name for name in names if PurePath(name).suffix.lower() in MEDIA_TYPES)
    if not images:
        raise ValueError(f"{path}: no image; expected files named {', '.join(MEDIA_TYPES)}")
    if wanted and wanted[-1] >= len(images):
        raise ValueError(f"{path}: the trace asks for image {wanted[-1]}; allowed: 0 .. {len(images) - 1}")
    return images


def _labelled(name: str, data: bytes) -> LabelledImage:
    file = PurePath(name)
    return LabelledImage(file.parent.name, EncodedImage(MEDIA_TYPES[file.suffix.lower()], data))


def as_arrivals(trace: Trace) -> Arrivals:
    """Its instants as an array [N], s."""
    return np.asarray(trace.at_s, np.float64)
