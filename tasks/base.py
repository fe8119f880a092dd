"""What a task is: problems with prompts, and a verifier that turns a response into an outcome. Also reads data files."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from traceback import TracebackException
from typing import Any
from unittest import mock

from harness import hub

NO_TEXTS = ("environment", "solution_first", "both")  # the feedback sources that need a verifier's text


@dataclass(frozen=True)
class Problem:
    """One prompt x. `messages`: chat messages ({"role", "content"}), the last one from the user; `reference`: shown to the critic,
    never to the student; `data`: whatever the verifier needs; `part`: a benchmark or domain that is reported separately."""

    id: str
    messages: list[dict[str, str]]
    reference: str = ""
    data: Any = None
    part: str = ""


@dataclass(frozen=True)
class Outcome:
    """The verifier's result for one response: reward r in {0, 1}, a short verdict for the log, and for a failure the
    environment's feedback, which says what was wrong. The verdict "internal" means that grading itself failed; training
    ignores such a row. `columns` are other 0-1 results that evaluation reports in addition to the reward."""

    reward: int
    verdict: str
    feedback: str = ""
    columns: dict[str, int] = field(default_factory=dict)


@dataclass
class Task:
    """Problems and verifier. `verify(problems, responses)` grades one response per problem, in order; `close` releases worker
    processes and the like. Without validation problems, training is watched on the test problems and keeps no best model.
    `lacks`: feedback sources that the task cannot provide; `notes`: lines printed when a run starts; `threads`: how many
    threads may each verify single rows while others are still sampled (0: verify all rows afterwards)."""

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
        return f"{self.name}: {len(self.train)} train, {len(self.validation)} validation, {len(self.test)} test problems"


class BadTask(ValueError):
    """A task file or its verifier is at fault."""


# ---- Reading sources -----------------------------------------------------------------------------------------

SUFFIXES = (".jsonl", ".parquet", ".arrow")  # of the files that are read from a folder


def rows(path: str | Path) -> Iterable[dict]:
    """The rows of a parquet, arrow or JSONL file (one object per line, any other suffix), or of a folder with such files or a
    data set saved by `datasets`. Raises ValueError with one line for what cannot be read."""
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
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are reported below, in one line
    by_suffix = {".parquet": datasets.Dataset.from_parquet, ".arrow": datasets.Dataset.from_file}
    try:
        return datasets.load_from_disk(str(path)) if is_saved else by_suffix[path.suffix](str(path))
    except Exception as error:  # the library's and pyarrow's errors share no base
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from None


def json_rows(path: Path) -> Iterator[dict]:
    """The rows of a JSONL file. Raises ValueError with the number of a line that is not a JSON object."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
                if not isinstance(row, dict):
                    raise ValueError(f"it is {line[:40]!r}")
                if b"\\ud" in line.lower():  # may be a lone surrogate, which no tokenizer accepts
                    row = json.loads(text_of(json.dumps(row, ensure_ascii=False)))
            except (ValueError, RecursionError) as error:
                why = getattr(error, "msg", None) or one_line(error)
                raise ValueError(f"{path}, line {number} is not a JSON object: {why}") from None
            yield row


def each(source: Iterable[dict], where: str, make: Callable[[dict], Any]) -> list:
    """make(row) for every row. Raises ValueError with one line, "FILE, row 3: ...", if make() fails or there is no row."""
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
    """The rows of a data set's split or file on the hub or in its cache. Raises ValueError if they cannot be fetched."""
    import datasets
    import huggingface_hub

    reason = hub.unreachable(repo, file or "README.md", "dataset")
    # Told that they are offline, the libraries read their cache or fail at once.
    offline = lambda place: mock.patch.object(place, "HF_HUB_OFFLINE", bool(reason))  # noqa: E731
    try:
        with offline(huggingface_hub.constants), offline(datasets.config):
            if file:
                return rows(huggingface_hub.hf_hub_download(repo, file, repo_type="dataset"))
            return datasets.load_dataset(repo, split=split)
    except Exception as error:  # network, hub, cache and parsing errors share no base
        raise ValueError(f"{repo} cannot be fetched ({reason or one_line(error)}): give a local copy with --data") from None


def text_of(text: str) -> str:
    """The text without lone surrogates, which a Python string can hold and a tokenizer cannot encode."""
    return text.encode("utf-8", "replace").decode()


def one_line(error: BaseException) -> str:
    """The error as one line of at most 200 characters, even if str(error) fails."""
    return " ".join(f"{type(error).__name__}: {TracebackException(type(error), error, None)}".split())[:200]


def get(row: dict, *names: str) -> Any:
    """The first of these columns that is not blank. Raises ValueError if there is none."""
    for name in names:
        if row.get(name) is not None and str(row[name]).strip():
            return row[name]
    raise ValueError(f"column {' or '.join(names)} is missing")
