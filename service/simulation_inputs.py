"""What the offline twin reads: traces, an evaluation of every image, and what batches take on a machine.

Errors are SettingErrors of one line: the file, the line where there is one, what was given and what is allowed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from models.checkpoint import Manifest
from service.api.budget_headers import parse_budget
from service.engine.measure import Timing
from service.errors import BadRequestError, InfeasibleBudgetError
from service.hosting import slice_facts
from service.latency import LatencyTable
from service.profiling import Profile, ProfileKey
from service.request import Budget, SliceFacts, Window
from service.routing import window
from service.settings import SettingError
from service.simulate import Arrival
from service.simulation_figures import Known

AT, IMAGE = "at_s", "image"


@dataclass(frozen=True, slots=True)
class Trace:
    """Arrivals that some slice is allowed for, and how many others there were. sha256: of the file."""

    name: str
    arrivals: list[Arrival]
    infeasible: int
    sha256: str


def read_trace(path: Path, slices: Sequence[SliceFacts], images: int | None = None) -> Trace:
    """The trace as a model with these slices would meet it. images: how many there are to ask for, None: any.

    Raises SettingError, with file and line, for what breaks the format or what the service would answer with 400.
    """
    data = _bytes_of(path, "trace")
    try:
        text = data.decode("ascii")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SettingError(f"{path}:{line}: byte {data[error.start]:#04x}; allowed: ASCII") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        met = list(_arrivals(reader, slices, math.inf if images is None else images))
    except (ValueError, csv.Error, BadRequestError) as error:
        raise SettingError(f"{path}:{max(reader.line_num, 1)}: {error}") from error
    arrivals = [arrival for arrival in met if arrival is not None]
    if not arrivals:
        raise SettingError(f"{path}: {len(met)} images, none that a slice is allowed for; allowed: at least 1")
    return Trace(path.stem, arrivals, len(met) - len(arrivals), hashlib.sha256(data).hexdigest())


def _bytes_of(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingError(f"setting {setting}: {path} cannot be read: {error.strerror}") from error


def _arrivals(rows: Iterator[list[str]], slices: Sequence[SliceFacts], images: float) -> Iterator[Arrival | None]:
    """One per row, None where the budgets allow no slice; ValueError or BadRequestError for a row that is none."""
    columns = next(rows, [])
    headers = [name.lower().encode() for name in columns[2:]]
    if columns[:2] != [AT, IMAGE] or not all(headers) or len(set(headers)) < len(headers):
        raise ValueError(f"columns are {','.join(columns)!r:.200}; allowed: {AT},{IMAGE}, then headers, each once")

    @cache
    def granted(cells: tuple[str, ...]) -> tuple[Budget, Window] | None:
        budget = parse_budget([(name, cell.encode()) for name, cell in zip(headers, cells, strict=True) if cell])
        try:
            return budget, window(budget, slices)
        except InfeasibleBudgetError:
            return None

    before_s = 0.0
    for cells in rows:
        if len(cells) != len(columns):
            raise ValueError(f"{len(cells)} cells; allowed: {len(columns)}, as in the first line")
        before_s, image = _instant_s(cells[0], before_s), _index(cells[1], images)
        grant = granted(tuple(cells[2:]))
        if grant is None:
            yield None
        else:
            budget, allowed = grant
            latency_s = math.inf if budget.latency_s is None else budget.latency_s
            yield Arrival(before_s, image, allowed, latency_s, budget.urgency)


def _instant_s(text: str, before_s: float) -> float:
    try:
        at_s = math.nan if "_" in text else float(text)
    except ValueError:
        at_s = math.nan
    if not before_s <= at_s < math.inf:
        raise ValueError(f"{AT} is {text!r:.60}; allowed: seconds, ascending, here from {before_s:g}")
    return at_s


def _index(text: str, images: float) -> int:
    if not text.isdecimal() or len(text) > 12 or int(text) >= images:
        last = "" if images == math.inf else f" to {images - 1}, as many as were evaluated"
        raise ValueError(f"{IMAGE} is {text!r:.60}; allowed: whole numbers from 0{last}")
    return int(text)


@dataclass(frozen=True, slots=True)
class _Answers:
    """What an evaluation keeps of one image, in ladder order."""

    name: str
    correct: tuple[bool, ...]
    p_right: tuple[float, ...] | None


@dataclass(frozen=True, slots=True)
class _Evaluation:
    digest: str
    images: tuple[_Answers, ...]


_EVALUATION = TypeAdapter(_Evaluation)


def read_evaluation(path: Path, manifest: Manifest) -> Known:
    """Which slice is right on which image, images in the order of their names, as traces count them.

    Raises SettingError when it is not of this checkpoint, or not of all its slices.
    """
    try:
        found = _EVALUATION.validate_json(_bytes_of(path, "evaluation"))
    except ValidationError as error:
        raise SettingError(
            _not_json(path, error, "what slicewise-models evaluate --width all --json writes")
        ) from error
    if found.digest != manifest.digest:
        raise SettingError(
            f"{path} is of {found.digest:.80}; allowed: {manifest.digest}, which {manifest.name}/{manifest.version} is"
        )
    images = sorted(found.images, key=lambda image: image.name)
    rows = [row for image in images for row in (image.correct, image.p_right) if row is not None]
    widths = {len(row) for row in rows}
    if widths != {len(manifest.slices)}:
        raise SettingError(
            f"{path} holds {sorted(widths)} slices of its images; allowed: {len(manifest.slices)} of each"
        )
    p_right = [image.p_right for image in images if image.p_right is not None]
    return Known(
        slice_facts(manifest),
        np.array([image.correct for image in images]),
        np.array(p_right, np.float32) if len(p_right) == len(images) else None,
    )


def _not_json(path: Path, error: ValidationError, allowed: str) -> str:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    return f"{path}: {f'{where}: ' if where else ''}{first['msg']}; allowed: {allowed}"


_PROFILE, _TIMINGS = TypeAdapter(Profile), TypeAdapter(tuple[Timing, ...])


def read_profile(path: Path, manifest: Manifest) -> tuple[ProfileKey | None, LatencyTable]:
    """A kept profile, or the model's part of what ``slicewise profile --json-out`` wrote, which has no key.

    Raises SettingError when it is neither, or of another network.
    """
    data = _bytes_of(path, "profile")
    key: ProfileKey | None = None
    try:
        parsed = json.loads(data)
        if isinstance(parsed, list):
            own = [part for part in parsed if isinstance(part, dict) and part.get("model") == manifest.name]
            timings = _TIMINGS.validate_python([timing for part in own for timing in part.get("timings", ())])
        else:
            profile = _PROFILE.validate_json(data)
            key, timings = profile.key, profile.timings
        table = LatencyTable({(timing.width, timing.batch): timing.p50_s for timing in timings})
    except ValidationError as error:
        raise SettingError(_not_json(path, error, "a profile of slicewise profile")) from error
    except ValueError as error:
        raise SettingError(f"{path}: {error}; allowed: a profile of {manifest.name}") from error
    if table.widths != tuple(range(len(manifest.slices))) or (key and key.network != manifest.network_id):
        raise SettingError(
            f"{path} is of another network, of slices {', '.join(map(str, table.widths))}; "
            f"allowed: {manifest.name}/{manifest.version}, of slices 0..{len(manifest.slices) - 1}"
        )
    return key, table
