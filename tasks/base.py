"""What a task is: problems with prompts, and a verifier that turns a response into an outcome with a text. Also reads the
rows of data sources."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from traceback import TracebackException
from typing import Any
from unittest import mock

from harness import hub

NO_TEXTS = ("environment", "solution_first", "both")  # the feedback sources that want a verifier's text on a failure


@dataclass(frozen=True)
class Problem:
    """One prompt x. `messages`: chat messages ({"role", "content"}), the last one from the user; `reference`: what a critique
    may see, never the student; `data`: whatever the verifier needs; `part`: a benchmark or domain with results of its own."""

    id: str
    messages: list[dict[str, str]]
    reference: str = ""
    data: Any = None
    part: str = ""


@dataclass(frozen=True)
class Outcome:
    """The verifier's answer on one response: reward r in {0, 1}, a short verdict for the log, and on a failure the
    environment's text (what was wrong, in words the model can use). The verdict "internal" says that grading itself failed:
    such a row takes no part in training. `columns` are further 0-1 results that evaluation reports beside the reward."""

    reward: int
    verdict: str
    feedback: str = ""
    columns: dict[str, int] = field(default_factory=dict)


@dataclass
class Task:
    """Problems and verifier. `verify(problems, responses)` grades one response per problem, in order; `close` releases what
    it holds (worker processes). Without validation problems a run is watched on the test problems and chooses nothing by
    them. `lacks`: the feedback sources that the task has not; `notes`: lines for the start of a run; `threads`: on how many
    threads verify may grade rows, one at a time, while others are still sampled (0: only all of them afterwards)."""

    name: str
    train: list[Problem]
    validation: list[Problem]
    test: list[Problem]
    verify: Callable[[list[Problem], list[str]], list[Outcome]]
    close: Callable[[], None] = lambda: None
    lacks: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    threads: int = 0

    def splits(self) -> str:
        """How many problems each split has, in one line."""
        train, validation, test = map(len, (self.train, self.validation, self.test))
        return f"{self.name}: {train} train, {validation} validation, {test} test problems"


class BadTask(ValueError):
    """A task file's verifier does not do what a verifier does."""


# ---- Reading sources -----------------------------------------------------------------------------------------

SUFFIXES = (".jsonl", ".parquet", ".arrow")  # of a file that may lie in a folder given as --data


def rows(path: str | Path) -> Iterable[dict]:
    """The rows of a JSONL (one object per line, whatever its ending), parquet or arrow file, or of a folder: a data set
    saved or cached by `datasets`, or files of those kinds. Raises ValueError with one line for what cannot be read."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    is_saved = (path / "state.json").exists()
    if path.is_dir() and not is_saved:
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not files:
            raise ValueError(f"{path} holds no .jsonl, .parquet or .arrow file")
        return chain.from_iterable(map(rows, files))
    if not is_saved and path.suffix not in (".parquet", ".arrow"):
        return json_rows(path)
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is said here, in one line
    by_suffix = {".parquet": datasets.Dataset.from_parquet, ".arrow": datasets.Dataset.from_file}
    try:
        return datasets.load_from_disk(str(path)) if is_saved else by_suffix[path.suffix](str(path))
    except Exception as error:  # the library's and pyarrow's errors share no base
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from None


def json_rows(path: Path) -> Iterator[dict]:
    """The rows of a JSONL file. Raises ValueError with the number of a line that is no JSON object."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
                if not isinstance(row, dict):
                    raise ValueError(f"it is {line[:40]!r}")
                if b"\\ud" in line.lower():  # perhaps half of a surrogate pair, which no tokenizer takes
                    row = json.loads(text_of(json.dumps(row, ensure_ascii=False)))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number} is no JSON object: {one_line(error)}") from None
            yield row


def each(source: Iterable[dict], where: str, make: Callable[[dict], Any]) -> list:
    """make(row) for every row. Raises ValueError with one line, "FILE, row 3: ...", for a row of another schema, whatever make()
    raises on it, and where there is none."""
    made = []
    for number, row in enumerate(source, 1):
        try:
            made.append(make(row))
        except ValueError as error:
            raise ValueError(f"{where}, row {number}: {error}") from error
        except (TypeError, AttributeError, LookupError, RecursionError) as error:
            raise ValueError(f"{where}, row {number} is not in the schema of the source ({one_line(error)})") from error
    if not made:
        raise ValueError(f"{where} holds no row")
    return made


def hub_rows(repo: str, split: str = "", file: str = "") -> Iterable[dict]:
    """The rows of a data set's split on the hub, or of one of its files; from the cache where the hub cannot be reached.
    Raises ValueError with one line that says why they cannot be fetched."""
    import datasets
    import huggingface_hub

    reason = hub.unreachable(repo, file or "README.md", "dataset")
    # A library that knows that it is offline reads what is in its cache, or says at once that it is not there.
    offline = lambda place: mock.patch.object(place, "HF_HUB_OFFLINE", bool(reason))  # noqa: E731
    try:
        with offline(huggingface_hub.constants), offline(datasets.config):
            if file:
                return rows(huggingface_hub.hf_hub_download(repo, file, repo_type="dataset"))
            return datasets.load_dataset(repo, split=split)
    except Exception as error:  # network, hub, cache and parsing errors share no base
        raise ValueError(f"{repo} cannot be fetched ({reason or one_line(error)}): give a local copy with --data") from None


def text_of(text: str) -> str:
    """The text without lone surrogates, which a Python string can hold and a tokenizer cannot read."""
    return text.encode("utf-8", "replace").decode()


def one_line(error: BaseException) -> str:
    """What was wrong, in one line of at most 200 characters, even where str(error) fails."""
    return " ".join(f"{type(error).__name__}: {TracebackException(type(error), error, None)}".split())[:200]


def get(row: dict, *names: str) -> Any:
    """The first of the columns that is there and not blank. Raises ValueError when none is."""
    for name in names:
        if row.get(name) is not None and str(row[name]).strip():
            return row[name]
    raise ValueError(f"column {' or '.join(names)} is missing")
