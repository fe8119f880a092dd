"""What README names exists."""

import importlib
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

import evaluate
import feedback
import losses
from harness import settings
import tasks
import vpd

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
(SUMS,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)  # the worked task
NO = """    if not found:
        return Outcome(0, "no number", "There is no number in the answer.")
"""


def test_every_test_that_the_readme_cites_exists():
    cited = set(re.findall(r"`(test_\w+)`", README))
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(cited) > 15
    assert {name for name in cited if f"def {name}(" not in tests} == set()


def test_the_functions_of_the_map_carry_the_equations_that_they_are_listed_under():
    """And every equation of the paper is in the map."""
    rows = re.findall(r"^\| ((?:Eq\.|[AB]\.\d|Alg).*?) \| .*? \| (.*?) \|", README, re.MULTILINE)
    named = [(tags, name) for tags, code in rows for name in re.findall(r"`losses\.(\w+)`", code)]
    assert len(named) >= 10
    for tags, name in named:
        assert any(tag in getattr(losses, name).__doc__ for tag in re.findall(r"Eq\. \d+|B\.\d+", tags)), (tags, name)
    covered = set()
    for tags in (tags for tags, _ in rows):
        covered |= {("Eq", int(n)) for n in re.findall(r"Eq\. (\d+)", tags)}
        for letter, first, last in re.findall(r"([AB])\.(\d+)(?: to [AB]\.(\d+))?", tags):
            covered |= {(letter, n) for n in range(int(first), int(last or first) + 1)}
    equations = {("Eq", n) for n in range(1, 11)} | {("A", n) for n in range(1, 23)} | {("B", n) for n in range(23, 29)}
    assert equations <= covered


def test_every_file_flag_word_and_setting_that_the_readme_names_exists():
    for name in set(re.findall(r"`((?:tests/|results/)?[\w-]+\.(?:py|png|json|txt|sh|md))`", README)):
        places = [ROOT / folder / name for folder in ("", "tests", "study", "study/results", "model", "harness", "tasks", "neighbours")]
        made = {
            "config.json",
            "base_failures.json",
            "evaluation.json",
            "sums.py",
            "generation_config.json",
        }  # by a run or a reader
        assert name in made or any(place.exists() for place in places), name
    flags = {name for f in fields(settings.Config) for name in (f.name, f"no_{f.name}")}
    for program in ("evaluate", "figures", "study", "toy", "bench"):
        flags |= set(re.findall(r"add_argument\(\s*\"--(\w+)\"", (ROOT / f"{program}.py").read_text()))
    theirs = {"nnodes", "nproc-per-node", "rdzv-backend", "rdzv-endpoint", "shutdown-timeout", "generation-config"}
    used = set(re.findall(r"(?<![\w-])--([a-zA-Z][\w-]*)", README))
    assert used - flags - theirs == {"help"}
    words = set(re.findall(r"bash run\.sh ([a-z][\w-]*)", README))
    assert words <= set(re.search(r"^  (toy\|.*?)\) ;;", (ROOT / "run.sh").read_text(), re.MULTILINE)[1].split("|"))
    assert set(re.findall(r"--method (\w+)", README)) - {"METHOD"} <= set(settings.METHODS)


def test_every_function_class_and_constant_that_the_readme_names_exists():
    """`module.name` and `Class.method` in backticks, and the files, words and commands of the test above."""
    ours = {path.stem: path for path in ROOT.glob("*.py")}
    classes = {name: thing for stem in ("policy", "rollout", "tasks", "sandbox", "reviews", "session")
               for name, thing in vars(importlib.import_module(stem)).items() if isinstance(thing, type)}  # fmt: skip
    named = re.findall(r"`(\w+)\.(\w+)(?:\(.*?\))?`", README)
    ending = {"py", "json", "jsonl", "png", "txt", "sh", "md", "model"}  # of files; `policy.model` is an attribute
    found = 0
    for owner, name in (pair for pair in named if pair[1] not in ending):
        assert owner in ours or owner in classes, f"{owner}.{name}"
        assert hasattr(importlib.import_module(owner) if owner in ours else classes[owner], name), f"{owner}.{name}"
        found += 1
    assert found > 20
    placed = re.findall(r"`(\w+)`(?: under banner \d of| in) `(\w+\.py)`", README)
    assert len(placed) > 3
    for name, file in placed:
        assert re.search(rf"\b{name}\b", (ROOT / file).read_text()), (name, file)


def test_the_table_of_settings_shows_the_presets():
    rows = re.findall(r"^\| `--(\w+)` \| (.*?) \| (.*?) \| (.*?) \| (.*?) \| .*? \|$", README, re.MULTILINE)
    assert len(rows) > 20
    presets = [settings.parse(["--task", task]) for task in ("lcb", "sciknoweval", "math", "toy")]
    for name, *shown in rows:
        for text, value in zip(shown, (getattr(cfg, name) for cfg in presets), strict=True):
            assert float(text) == value if isinstance(value, (int, float)) else value.endswith(text), (
                name,
                text,
                value,
            )


def test_the_teachers_prompts_are_those_that_the_code_renders(byte_tokenizer):
    (text,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    shown = dict(re.findall(r"---- (\w+)\n(.*?)(?=\n---- |\n\Z)", text, re.DOTALL))
    solution, said, review = "42", "41 is too low.", "The units were added wrongly; look at 2 + 0 again."
    contexts = {
        "sibling": feedback.Context("sibling", solution=solution),
        "environment": feedback.Context("environment", feedback=said),
        "critique": feedback.Context("critique", critique=review),
        "both": feedback.Context("sibling+environment", solution=solution, feedback=said),
    }
    assert shown.keys() == contexts.keys()
    messages = [{"role": "user", "content": "What is 12 + 30? Reply with the number alone."}]
    for source, context in contexts.items():
        ids, _ = feedback.teacher_prompt(byte_tokenizer, messages, context, feedback.Templates(), 10**6)
        assert shown[source] in byte_tokenizer.decode(ids) and shown[source].startswith(messages[0]["content"])
        assert shown[source].endswith(feedback.CLOSING.strip())


def test_the_worked_task_is_at_most_40_lines_and_runs(tmp_path, capsys):
    assert SUMS.count("\n") <= 40 and NO in SUMS
    (tmp_path / "sums.py").write_text(SUMS)
    small = ["--prompts_per_batch", "2", "--minibatch_prompts", "2", "--e_minibatch_prompts", "2", "--steps", "1",
             "--max_response_tokens", "8", "--eval_every", "0", "--lr", "1e-3", "--feedback", "environment"]  # fmt: skip
    own = ["--task", "own", "--data", str(tmp_path / "sums.py")]
    model = ["--model", str(ROOT / "tasks" / "toy_models" / "trace")]
    vpd.main([*own, *model, *small, "--out", str(tmp_path / "run")])
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert row["with_context"] > 0 and row["m_grad_norm"] > 0
    evaluate.main([*own, *model, "--n", "1", "--max_tokens", "4", "--split", "validation"])
    evaluate.main(["--run", str(tmp_path / "run"), "--n", "1", "--max_tokens", "4"])
    assert "own/sums" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, words",
    [
        ("import nowhere", "nowhere"),
        ("x = 1", "load"),
        ("import sys\n\nsys.exit(0)", "SystemExit: 0"),
        (SUMS.replace('f"{split}-{i}"', "split"), "problem 'train' is there twice"),
        ("def load():\n    return 3", "must return a tasks.Task"),
        ("def load():\n    raise KeyError('answer')", "KeyError: 'answer'"),  # say a file with a missing column
        ("from tasks import Task\n\n\ndef load():\n    return Task('a', [], [], [], None)", "with training problems"),
        (SUMS.replace('[{"role": "user", "content": question}]', "question"), "messages must be a list"),
        (SUMS.replace("strict=True)]", "strict=True)][1:]"), "an Outcome for each of 2 responses, not 1 outcomes"),
        (
            SUMS.replace('Outcome(0, "no number"', 'Outcome(0.5, "no number"'),
            "a reward of 0 or 1, not Outcome(reward=0.5",
        ),
        (SUMS.replace("problem.reference:", "problem.answer:").replace(NO, ""), "verify() raised IndexError"),
        (SUMS.replace('"validation": 64, "test": 64', '"validation": 0, "test": 0'), "--eval_every 0"),
    ],
)
def test_a_task_file_that_is_none_is_one_line(text, words, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(SystemExit) as stop:
        vpd.main(
            [
                "--task",
                "own",
                "--data",
                str(tmp_path / "mine.py"),
                "--model",
                "tasks/toy_models/trace",
                "--out",
                str(tmp_path / "run"),
            ]
        )
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and words in error and not (tmp_path / "run").exists()


def test_a_verifier_that_fails_later_ends_the_run_in_one_line_that_names_its_own(tmp_path, capsys):
    broken = SUMS.replace("if found[-1] == problem.reference:", "if found[-1] == problem.answer:")
    (tmp_path / "sums.py").write_text(broken)  # an empty answer, which is what it is tried with, has no number
    at = broken[: broken.index("problem.answer")].count("\n") + 1
    own = ["--task", "own", "--data", str(tmp_path / "sums.py"), "--model", str(ROOT / "tasks" / "toy_models" / "trace")]
    with pytest.raises(SystemExit) as stop:
        vpd.main([*own, "--max_response_tokens", "8", "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    said = f"sums.py, line {at}: verify() raised AttributeError: 'Problem' object has no attribute 'answer'"
    assert stop.value.code == 2 and said in error and "Traceback" not in error
    with pytest.raises(tasks.BadTask, match="AttributeError"):
        evaluate.main([*own, "--n", "1", "--max_tokens", "8"])
