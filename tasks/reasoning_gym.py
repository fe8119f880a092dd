"""reasoning-gym (PyPI, Apache-2.0): a hundred problem generators, each with its own scorer."""

import difflib
import json
import os
import subprocess
import sys
from pathlib import Path

from tasks.base import Outcome, Problem, Task, one_line
from tasks.sandbox import Sandbox

INSTALL = "pip install reasoning-gym==0.1.25 (its pycosat needs a C compiler and Python's headers)"
# Each split's first seed, added to --data's (problem i adds i), and its largest number of problems.
SPLITS = {"test": (2_000_000, 100), "validation": (1_000_000, 100), "train": (0, 10**9)}
SCORE_SECONDS = 6.0  # for one answer, including its process
# Some generators depend on the order of a set of strings, so problems are made in a process with a fixed hash seed.
MAKE = """
import base64, json, pickle, sys, reasoning_gym
out, sys.stdout = sys.stdout, sys.stderr  # some generators print
text = lambda entry: base64.b64encode(pickle.dumps(entry)).decode()
name, splits = json.loads(sys.argv[1])
made = [reasoning_gym.create_dataset(name, **settings) for settings in splits]
json.dump([[(e["question"], e["answer"], text(e)) for e in map(d.__getitem__, range(len(d)))] for d in made], out)
"""
SCORE = """
import base64, pickle, sys, reasoning_gym
made, gym = reasoning_gym.create_dataset({}, **{}), type(sys)("gym")
gym.score = lambda entry, answer: float(made.score_answer(answer, pickle.loads(base64.b64decode(entry))))
sys.modules["gym"] = gym
"""


def load(subset: str, data: str) -> Task:
    """Problems of the generator `subset`, without repeated questions. data: a JSON file of its settings; size limits each split."""
    try:
        from reasoning_gym.factory import DATASETS
        from reasoning_gym.utils import SYSTEM_PROMPTS
    except ImportError as error:
        raise ValueError(f"--task reasoning_gym needs a library ({error}): {INSTALL}") from None
    if subset not in DATASETS:
        near = difflib.get_close_matches(subset, DATASETS, 5, 0.4) or sorted(DATASETS)[:5]
        raise ValueError(f"reasoning-gym has no generator {subset!r}; similar ones of its {len(DATASETS)}: {', '.join(near)}")
    try:
        settings = {"seed": 0, "size": 2000, **(json.loads(Path(data).read_text()) if data else {})}
        seed, size = int(settings["seed"]), int(settings["size"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"--data {data} is not a JSON object of generator settings ({one_line(error)})") from None
    made = make(subset, [settings | {"seed": seed + start, "size": min(size, most)} for start, most in SPLITS.values()])
    splits, seen, repeated, system = {}, set(), 0, {"role": "system", "content": SYSTEM_PROMPTS["default"]}
    for split, rows in zip(SPLITS, made):
        new = {question: (answer, entry) for question, answer, entry in rows if question not in seen}
        repeated += len(rows) - len(new)
        seen |= new.keys()
        splits[split] = [
            Problem(f"{split}-{i}", [system, {"role": "user", "content": text}], answer if isinstance(answer, str) else "", entry)
            for i, (text, (answer, entry)) in enumerate(new.items())
        ]  # fmt: skip
    sandbox = Sandbox(time_limit=SCORE_SECONDS, memory_mb=4096, packages=True, warm=SCORE.format(repr(subset), repr(settings)))
    notes = [f"dropped {repeated} problems that repeat another one", f"sandbox: {sandbox.layers}"][not repeated :]
    verify = lambda *given: grade(sandbox, *given)  # noqa: E731
    return Task(f"reasoning_gym/{subset}", **splits, verify=verify, close=sandbox.close, notes=notes)


def make(name: str, splits: list[dict]) -> list[list[tuple[str, str | None, str]]]:
    """(question, answer, the library's whole entry) of each problem. splits: the settings of each split."""
    command = [sys.executable, "-P", "-c", MAKE, json.dumps([name, splits])]
    done = subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": "0"}, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ValueError(f"reasoning-gym's {name} refuses these settings ({why}): {splits[-1]}")
    return json.loads(done.stdout)


def grade(sandbox: Sandbox, problems: list[Problem], responses: list[str]) -> list[Outcome]:
    """r = 1 if the library scores the last <answer> tag 1. Some scorers evaluate answers as Python, hence the sandbox. The
    feedback gives the answer and its score, never the right answer."""
    from reasoning_gym.utils import extract_answer

    def score(pair: tuple[str, str]) -> Outcome:
        if "__" in pair[1]:  # four scorers evaluate answers in the process that reports the score
            return Outcome(0, "unreadable", "The checker could not read it.")
        said, result = f"Your answer was: {pair[1]}\n", sandbox.call("from gym import score", "score", list(pair))
        if result.status == "ok":
            right = result.value > 1 - 1e-6  # some scores are sums of shares
            told = f"{said}Its score is {min(result.value, 0.99):.2f}, where 1 is right."
            return Outcome(1, "correct") if right else Outcome(0, "wrong", told)
        verdict = {"internal": "internal", "timeout": "time-out"}.get(result.status, "unreadable")
        return Outcome(0, verdict, "" if verdict == "internal" else f"{said}The checker could not read it.")

    given = [(problem.data, extract_answer(response)) for problem, response in zip(problems, responses, strict=True)]
    scored = list({pair: None for pair in given if pair[1]})  # rollouts may give the same answer
    outcomes = dict(zip(scored, sandbox.run_many(score, scored)))
    none = Outcome(0, "no answer", "There is no answer between <answer> and </answer>.")
    return [outcomes.get(pair, none) for pair in given]
