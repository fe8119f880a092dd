"""What README names exists."""

import json
import re
from pathlib import Path

import pytest

import evaluate
import vpd

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_every_test_that_the_readme_cites_exists():
    cited = set(re.findall(r"`(test_\w+)`", README))
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(cited) > 15
    assert {name for name in cited if f"def {name}(" not in tests} == set()


def test_the_worked_task_is_at_most_40_lines_and_runs(tmp_path, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert code.count("\n") <= 40
    (tmp_path / "sums.py").write_text(code)
    small = ["--prompts_per_batch", "2", "--minibatch_prompts", "2", "--e_minibatch_prompts", "2", "--steps", "1",
             "--max_response_tokens", "8", "--eval_every", "0", "--lr", "1e-3", "--feedback", "environment"]  # fmt: skip
    own = ["--task", "own", "--data", str(tmp_path / "sums.py")]
    model = ["--model", str(ROOT / "toy_models" / "trace")]
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
        ("def load():\n    return 3", "must return a tasks.Task"),
        ("def load():\n    raise KeyError('answer')", "KeyError: 'answer'"),  # say a file with a missing column
        ("from tasks import Task\n\n\ndef load():\n    return Task('a', [], [], [], None)", "with training problems"),
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
                "toy_models/trace",
                "--out",
                str(tmp_path / "run"),
            ]
        )
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and words in error and not (tmp_path / "run").exists()
