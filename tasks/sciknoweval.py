"""SciKnowEval L3, four domains: multiple choice, without feedback text."""

from collections import Counter
from collections.abc import Iterable
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
    """Level L3 questions with 4 or 2 choices, split 90/10 with seed 42 like SDPO's: 450/50, 1890/210, 841/94, 720/80. data: a
    file in the hub's schema, or a folder of SDPO's finished splits (columns idx, system, prompt, answer) with names such as
    biology_train.jsonl or biology/train.json."""
    domains, train, test = DOMAINS if subset == "all" else (subset,), [], []
    if data and Path(data).is_dir():
        for domain, (split, problems) in product(domains, (("train", train), ("test", test))):
            names = (f"{domain}{sep}{split}.{end}" for sep in "_/" for end in ("jsonl", "json"))
            files = [path for path in map(Path(data).joinpath, names) if path.is_file()]
            if not files:
                raise ValueError(f"{data} holds neither {domain}_{split}.jsonl nor {domain}/{split}.json")
            problems += questions(rows(files[0]), str(files[0]), domain)[0]
        return make_task(subset, train, test, [])
    found, note = questions(rows(data) if data else hub_rows("hicai-zju/SciKnowEval", "test"), data or "SciKnowEval")
    import datasets

    for domain in domains:
        kept = [problem for problem in found if problem.part == domain]
        if len(kept) < 10:
            raise ValueError(f"{data or 'the hub'} holds {len(kept)} L3 choice questions of {domain}: too few to split")
        split = datasets.Dataset.from_dict({"i": range(len(kept))}).train_test_split(test_size=0.1, seed=42)
        train += [kept[i] for i in split["train"]["i"]]
        test += [kept[i] for i in split["test"]["i"]]
    return make_task(subset, train, test, [note])


def read(path: str) -> Task:
    """The problems of one file, in the hub's schema or that of SDPO's finished splits, as test problems."""
    found, note = questions(rows(path), path)
    return make_task("file", [], found, [note])


def questions(source: Iterable[dict], where: str, domain: str = "") -> tuple[list[Problem], str]:
    """The problems among the hub's rows, numbered within their domain, or among the rows of one of SDPO's finished splits of this
    domain, with its prompts; and a note on how many rows were used."""
    counts: Counter[str] = Counter()

    def problem(row: dict) -> Problem | None:
        if "choices" not in row:  # a finished split
            texts = {"system": row.get("system"), "user": get(row, "prompt")}
            messages = [{"role": role, "content": text} for role, text in texts.items() if text]
            return Problem(str(get(row, "idx", "id")), messages, get(row, "answer").strip(), part=domain)
        if get(get(row, "details"), "level") != "L3" or get(row, "type") not in CHOICE_TYPES:
            return None
        part, choices = get(row, "domain").lower(), get(row, "choices")
        options = "\n".join(f"{label}: {text}" for label, text in zip(choices["label"], choices["text"], strict=True))
        text = f"{get(row, 'question')}\n\n{options}\nPlease reason step by step."
        messages = [{"role": "system", "content": CHOICE_SYSTEM}, {"role": "user", "content": text}]
        name = f"{part}-{counts[part]}" if row.get("id") is None else str(row["id"])
        counts[part] += 1
        return Problem(name, messages, get(row, "answerKey").strip(), part=part)

    problems = list(filter(None, made := each(source, where, problem)))
    if len(problems) == len(made) and not counts:
        return problems, f"sciknoweval: all {len(made)} rows of {where}"
    return problems, f"sciknoweval: {len(problems)} of {len(made)} rows are L3 questions with 4 or 2 choices"


def make_task(subset: str, train: list[Problem], test: list[Problem], notes: list[str]) -> Task:
    shares = []
    for part in dict.fromkeys(problem.part for problem in test):
        letters = Counter(problem.reference for problem in test if problem.part == part)
        ((letter, count),) = letters.most_common(1)
        shares.append(f"{part or subset} {count / letters.total():.3f} ({letter})")
    notes = [*notes, f"a constant answer scores on the test problems: {', '.join(shares)}"]
    return Task(f"sciknoweval/{subset}", train, [], test, grade_choices, lacks=NO_TEXTS, notes=notes)


def grade_choices(problems: list[Problem], responses: list[str]) -> list[Outcome]:
    """r = 1 if the text of the last closed <answer> tag is exactly the right letter. There is no feedback."""
    outcomes = []
    for problem, response in zip(problems, responses, strict=True):
        opened = response.split("<answer>")[1:]
        answers = [text.partition("</answer>")[0].strip() for text in opened if "</answer>" in text]
        right = answers[-1:] == [problem.reference]
        outcomes.append(Outcome(int(right), "correct" if right else "wrong" if answers else "no answer"))
    return outcomes
