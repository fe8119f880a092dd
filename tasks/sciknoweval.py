"""SciKnowEval L3, four domains: multiple choice, right or wrong and no text."""

from collections import Counter
from collections.abc import Iterable
from functools import partial
from itertools import product
from pathlib import Path

from tasks.base import NO_TEXTS, Outcome, Problem, Task, each, get, hub_rows, rows

DOMAINS = ("biology", "chemistry", "material", "physics")
CHOICE_TYPES = ("mcq-4-choices", "mcq-2-choices")
CHOICE_SYSTEM = (
    "You answer multiple-choice questions. Write in this form:\n<reasoning>\nyour reasoning\n</reasoning>\n<answer>\n"
    "the letter of the right option\n</answer>\n\nBetween the answer tags stands one letter and nothing else, never the "
    "text of the option."
)


def load(subset: str, data: str) -> Task:
    """Level L3, questions with 4 or 2 choices, split 90/10 with seed 42 as SDPO does: 450/50, 1890/210, 841/94, 720/80.
    data: a file in the hub's schema; or a folder of finished splits with columns idx, system, prompt, answer, named
    biology_train.jsonl or biology/train.json and so on."""
    domains, train, test = DOMAINS if subset == "all" else (subset,), [], []
    if data and Path(data).is_dir():
        for domain, (split, problems) in product(domains, (("train", train), ("test", test))):
            names = (f"{domain}{sep}{split}.{end}" for sep in "_/" for end in ("jsonl", "json"))
            files = [path for path in map(Path(data).joinpath, names) if path.is_file()]
            if not files:
                raise ValueError(f"{data} holds neither {domain}_{split}.jsonl nor {domain}/{split}.json")
            problems += each(rows(files[0]), str(files[0]), partial(split_row, domain=domain))
        return make_task(subset, train, test, [])
    found, notes = choices_of(rows(data) if data else hub_rows("hicai-zju/SciKnowEval", "test"), data or "SciKnowEval")
    import datasets

    for domain in domains:
        kept = [problem for problem in found if problem.part == domain]
        if len(kept) < 10:
            raise ValueError(f"{data or 'the hub'} holds {len(kept)} L3 choice questions of {domain}: too few to split")
        split = datasets.Dataset.from_dict({"i": range(len(kept))}).train_test_split(test_size=0.1, seed=42)
        train += [kept[i] for i in split["train"]["i"]]
        test += [kept[i] for i in split["test"]["i"]]
    return make_task(subset, train, test, notes)


def read(source: list[dict], path: str, note: str) -> Task:
    """The problems of one file, in the hub's schema or that of SDPO's finished splits, as test problems."""
    if source and "choices" not in source[0]:
        return make_task("file", [], each(source, path, split_row), [note])
    return make_task("file", [], *choices_of(source, path))


def choices_of(found: Iterable[dict], where: str) -> tuple[list[Problem], list[str]]:
    """The hub's rows that belong to the benchmark of the paper, numbered within their domain, and a note on the others."""
    counts: Counter[str] = Counter()

    def problem(row: dict, at: str) -> Problem | None:
        domain = get(row, at, "domain").lower()
        if get(get(row, at, "details"), at, "level") != "L3" or get(row, at, "type") not in CHOICE_TYPES:
            return None
        choices = get(row, at, "choices")
        options = "\n".join(f"{label}: {text}" for label, text in zip(choices["label"], choices["text"], strict=True))
        text = f"{get(row, at, 'question')}\n\n{options}\nPlease reason step by step."
        messages = [{"role": "system", "content": CHOICE_SYSTEM}, {"role": "user", "content": text}]
        name = f"{domain}-{counts[domain]}" if row.get("id") is None else str(row["id"])
        counts[domain] += 1
        return Problem(name, messages, get(row, at, "answerKey").strip(), part=domain)

    problems = list(filter(None, made := each(found, where, problem)))
    return problems, [f"sciknoweval: {len(problems)} of {len(made)} rows are L3 questions with 4 or 2 choices"]


def split_row(row: dict, where: str, domain: str = "") -> Problem:
    """A row of SDPO's finished splits, prompts as they stand there."""
    messages = [{"role": "user", "content": get(row, where, "prompt")}]
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": row["system"]})
    return Problem(str(get(row, where, "idx", "id")), messages, get(row, where, "answer").strip(), part=domain)


def make_task(subset: str, train: list[Problem], test: list[Problem], notes: list[str]) -> Task:
    shares = []
    for part in dict.fromkeys(problem.part for problem in test):
        letters = Counter(problem.reference for problem in test if problem.part == part)
        ((letter, count),) = letters.most_common(1)
        shares.append(f"{part or subset} {count / letters.total():.3f} ({letter})")
    notes = [*notes, f"a constant answer scores on the test problems: {', '.join(shares)}"]
    return Task(f"sciknoweval/{subset}", train, [], test, grade_choices, lacks=NO_TEXTS, notes=notes)


def grade_choices(problems: list[Problem], responses: list[str]) -> list[Outcome]:
    """Exact match of the letter in the last <answer> tag that closes; the verifier has no words on a failure."""
    outcomes = []
    for problem, response in zip(problems, responses, strict=True):
        opened = response.split("<answer>")[1:]
        answers = [text.partition("</answer>")[0].strip() for text in opened if "</answer>" in text]
        right = answers[-1:] == [problem.reference]
        outcomes.append(Outcome(int(right), "correct" if right else "wrong" if answers else "no answer"))
    return outcomes
