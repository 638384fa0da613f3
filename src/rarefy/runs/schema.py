"""The content of the JSON files of runs and sweeps; a file with another content is refused in one sentence.

Only what is read again is named here. A file may say more, and it may say less where it has a default.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from rarefy.errors import InputError
from rarefy.pruning.records import LayerRecord

Count = Annotated[int, Field(ge=0, lt=2**63)]
#: A measurement; None where it was not finite.
Value = float | None

_T = TypeVar("_T")


class _Content(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Text(_Content):
    prompt: str
    text: str


class _Measurement(_Content):
    text: str
    label: str = ""
    length: Count
    windows: Count


class _Perplexity(_Measurement):
    value: Value


class _Divergence(_Measurement):
    label: str
    kl: Value
    agreement: Value


class _Score(_Content):
    value: Value
    stderr: Value


class _Task(_Content):
    metrics: dict[str, _Score]
    samples: Count = 0


class _Step(_Content):
    step: float
    kl: float


class _Held(_Content):
    step: Count
    kl: float
    text_loss: float


class _Tuning(_Content):
    parametrisation: str
    against: str
    trained: Count
    steps: Count
    curve: list[_Step]
    measurements: list[_Held]
    best_step: Count | None
    written: _Held | None


class _Size(_Content):
    blocks: Count
    parameters: Count
    bytes: Count
    multiplications: Count


class _Blocks(_Content):
    by: str
    copies: bool = False
    number: Count
    removed: list[Count]
    kl: float
    loss: float
    scores: dict[Annotated[str, Field(pattern="^[0-9]{1,6}$")], float]


class _Exit(_Content):
    name: str
    block: Count
    kind: str
    number: Count
    kept: Count
    masked_error: float
    error: float
    drift: float | None = None
    drift_left: float | None = None
    damping: float | None = None
    path_damping: float | None = None


class _Candidate(_Content):
    blocks: Count
    heads: Count
    neurons: Count
    round: Count
    remove: list[Count]
    kl: float | None


class _Search(_Content):
    size: float
    best: _Candidate
    candidates: list[_Candidate]


class _Shrink(_Content):
    before: _Size
    after: _Size
    repair: bool
    search: _Search | None = None
    blocks: _Blocks | None
    parts: list[_Exit]
    dense_path: list[_Exit] = []
    no_dense_path: str = ""


class RunFacts(_Content):
    """``run.json``, as far as the report reads it."""

    method: str
    pattern: str
    command: str = ""
    versions: dict[str, str] = {}
    seconds: dict[str, float] = {}
    peak_bytes: Count = 0
    relative_error: Value = None
    pattern_spec: dict[str, Any] = {}
    perplexity: list[_Perplexity] = []
    divergence: list[_Divergence] = []
    tasks: dict[str, _Task] = {}
    tuning: _Tuning | None = None
    shrink: _Shrink | None = None
    dense_texts: list[_Text] = []
    texts: list[_Text] = []


class _Labelled(_Perplexity):
    label: str


class CellFacts(RunFacts):
    """``run.json`` of a cell of a sweep, or of the dense model beside them, which has no seed."""

    status: Literal["done", "failed"]
    asked_sparsity: float
    seed: Count = 0
    sparsity: float = 0.0
    reason: str = ""
    perplexity: list[_Labelled] = []  # type: ignore[assignment]


class _SweepSettings(_Content):
    model: str
    calibration: str
    num_samples: Count
    sequence_length: Count
    eval_length: Count
    max_windows: Count | None = None
    limit: Count | float | None = None


class _LeftOut(_Content):
    name: str
    asked: str
    reason: str
    system: dict[str, Any] | None = None


class SweepFacts(_Content):
    """``compare.json``."""

    settings: _SweepSettings
    commands: list[str] = []
    versions: dict[str, str] = {}
    rows: dict[str, dict[str, Any] | None] = {}
    left_out: list[_LeftOut] = []


_RECORD = TypeAdapter(LayerRecord)
#: More inputs or outputs than any layer has, and more blocks than any model.
_LONGEST, _MOST_BLOCKS = 2**31, 10**6


def read_facts(path: Path, kind: type[_Content]) -> dict[str, Any]:
    """The object in the JSON file ``path``. Raises InputError where it cannot be read or is not of ``kind``."""
    try:
        text = path.read_bytes().decode()
        kind.model_validate_json(text)
        facts: dict[str, Any] = json.loads(text)
    except OSError as error:
        raise InputError.sentence(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValidationError as error:
        raise InputError.sentence(_damage(path, error)) from None
    except (ValueError, RecursionError):  # bytes that are no text, numbers of thousands of digits
        raise InputError.sentence(f"{path} cannot be read as JSON.") from None
    return facts


def read_records(path: Path) -> list[LayerRecord]:
    """The records in a ``layers.jsonl``. Raises InputError where it cannot be read, or a line is no record."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError.sentence(f"{path} cannot be read: {error.strerror or error}.") from error
    return parse_records(content, path)


def parse_records(content: bytes, path: Path) -> list[LayerRecord]:
    """The records in ``content``, one a line. Raises InputError, which names ``path`` and the line."""
    records = []
    # Lines end at newlines alone, not at the other separators that JSON allows in strings.
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n") if content else [], start=1):
        try:
            record = _RECORD.validate_json(line)
        except ValidationError as error:
            raise InputError.sentence(_damage(path, error, number)) from None
        if wrong := _contradiction(record):
            raise InputError.sentence(f"Line {number} of {path} is damaged: {wrong}.")
        records.append(record)
    return records


def validated(kind: type[_T], values: object) -> _T:
    """``values`` as instances of ``kind``. Raises ValueError where they are none."""
    return TypeAdapter(kind).validate_python(values)


def _contradiction(record: LayerRecord) -> str | None:
    """The first thing in a record that cannot be true of a layer, though every value is of its type; else None."""
    if not record.name or not (record.name + record.pattern + record.status).isprintable():
        return "name, pattern or status cannot be printed"
    if len(record.shape) != 2 or not all(1 <= length <= _LONGEST for length in record.shape):
        return f"shape is {record.shape}, but must be [out, in]"
    if not 0 <= record.kept <= record.size:
        return f"kept is {record.kept}, but the layer has {record.size} weights"
    if not 0 <= record.block < _MOST_BLOCKS:
        return f"block is {record.block}"
    return None


def _damage(path: Path, error: ValidationError, line: int | None = None) -> str:
    """One sentence on the first thing that is wrong."""
    first = error.errors(include_url=False, include_input=False)[0]
    message = first["msg"]
    where = f"Line {line} of {path}" if line else str(path)
    if first["type"] == "json_invalid":
        verb = "is damaged" if line else "cannot be read"
        return f"{where} {verb}: it is no JSON ({message.removeprefix('Invalid JSON: ')})."
    key = ".".join(map(str, first["loc"]))
    return f"{where} is damaged: {f'{key}: ' if key else ''}{message[:1].lower()}{message[1:]}."
