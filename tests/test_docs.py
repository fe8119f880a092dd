"""What README.md and docs/ name exists, says what the code says, and runs."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate
import feedback
import losses
import vpd
from harness import presets
from harness.log import terminal_line
from harness.settings import flags
from neighbours import distil, ovd

ROOT = Path(__file__).parent.parent
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
README, PAPER, SETTINGS, LOG = (PAGES[ROOT / f"{name}.md"] for name in ("README", "docs/paper", "docs/settings", "docs/log"))
ALL = re.sub(r"<!--.*?-->", "", "\n".join(PAGES.values()))
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = FENCED.findall(ALL)  # language, text
QUOTED = {" ".join(text.split()) for text in re.findall(r"`([^`]+)`", FENCED.sub("", ALL))}
(SUMS,) = (text for language, text in BLOCKS if language == "python")  # the worked task
SOURCES = [path for room in (".", "model", "harness", "tasks", "neighbours", "study") for path in (ROOT / room).glob("*.py")]
CONFIGS = {"vpd.py": vpd.Config, "neighbours.distil": distil.Config, "neighbours.ovd": ovd.Config, "evaluate.py": evaluate.Config}
# What a run or the reader makes, and what belongs to other programs.
MADE = set("config.json log.jsonl samples.jsonl base_failures.json curves.png best/ checkpoints/ sums.py answers.jsonl "
           "grades.jsonl test6.jsonl".split())  # fmt: skip
THEIRS = set("nnodes nproc-per-node rdzv-backend rdzv-endpoint shutdown-timeout generation-config shm-size ipc help "
             "teacher_update_rate ema_update_rate".split())  # fmt: skip
ENDINGS = "py|png|json|jsonl|txt|sh|md"
TRACE = str(ROOT / "tasks" / "toy_models" / "trace")


def test_the_readme_is_short_and_says_first_what_is_not_verified_and_how_to_start():
    lines = README.splitlines()
    assert len(lines) <= 200 and SUMS.count("\n") <= 33 and "Not verified" in "\n".join(lines[:10])
    assert any(line.startswith("bash run.sh") for line in lines[:19])


def test_every_file_folder_and_link_exists():
    files = set(re.findall(r"(?<![\w/*.-])(?:\w+/)*[\w-]+\.(?:" + ENDINGS + r")\b", ALL))
    folders = {name for name in QUOTED if re.fullmatch(r"(\w+/)+", name)}
    linked = [(path.parent, link) for path, text in PAGES.items() for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    assert len(files) > 25 and len(folders) > 5 and len(linked) > 20
    near = {path.name for path in PAGES}  # pages name each other
    assert {name for name in files | folders if not (ROOT / name).exists()} <= MADE | near
    assert all((folder / link).exists() or link.startswith("https://") for folder, link in linked)


def test_every_function_class_and_setting_exists():
    names = [path.relative_to(ROOT).with_suffix("").parts for path in SOURCES]
    modules = {parts[-1]: ".".join(parts) for parts in names} | {"tasks": "tasks"}
    code, found = "\n".join(path.read_text() for path in (*SOURCES, ROOT / "run.sh")), 0
    for name in QUOTED - THEIRS:
        owner, dot, attribute = name.rpartition(".")
        if re.fullmatch(r"[a-zA-Z_]\w+", name):
            assert re.search(rf"\b{name}\b", code), name
        elif dot and re.fullmatch(r"[\w.]+", name) and attribute not in ENDINGS.split("|"):
            if (owner := owner.split(".")[-1]) in modules:
                assert hasattr(importlib.import_module(modules[owner]), attribute), name
            else:  # of a class; t is what is known of a token
                assert owner == "t" or re.search(rf"class {owner}\b(?:(?!\nclass )[^\0])*? {attribute}\b", code), name
            found += 1
    assert found > 20


def test_every_command_flag_and_value_exists():
    parsers = {program: flags(config, program, "", {}) for program, config in CONFIGS.items()}
    known = {flag: parser for parser in reversed(parsers.values()) for flag in parser._option_string_actions}
    words = re.search(r"^  (toy\|.*?)\) ;;", (ROOT / "run.sh").read_text(), re.MULTILINE)[1].split("|")
    blocks = "".join(text for language, text in BLOCKS if not language).replace("\\\n", " ").splitlines()
    values, tried = {"METHOD": "vpd", "N": "1", "TASK": "lcb"}, 0
    for line in (line for line in (*blocks, *QUOTED) if re.match(r"--\w|bash |python |NPROC", line)):
        command = re.match(r"(?:NPROC=\d )?(?:bash (run\.sh)|python (?:-m )?([\w.]+))(?= |$)", line)
        given = [values.get(word, word) for word in shlex.split(line[command.end() if command else 0 :], comments=True)]
        if command and (program := command[1] or command[2]) == "run.sh":
            assert not given or given[0].startswith("-") or given[0] in words, line
            program = "vpd.py" if {*given[:1]} & {*vpd.PRESETS, "check"} else "run"
            given = given[1 + (given[:1] == ["check"]) :]
        elif command:
            assert importlib.util.find_spec(program.removesuffix(".py")), line
        else:  # a flag with its value; methods have commands of their own
            program = known[given[0]].prog if len(given) > 1 and given[0] in known.keys() - {"--method"} else ""
        if program in parsers and "--help" not in given:
            parsers[program].parse_args(given)  # SystemExit for a flag or value that is none
            tried += 1
    assert tried > 35
    others = {flag for path in SOURCES for flag in re.findall(r"add_argument\(\s*\"--(\w+)\"", path.read_text())}
    named = set(re.findall(r"(?<![\w-])--([a-zA-Z][\w-]*)", ALL))
    assert {flag for flag in named if f"--{flag}" not in known} <= others | THEIRS


def test_the_equations_are_where_the_map_says_and_all_of_them_are_in_it():
    covered, named, code = set(), 0, (ROOT / "vpd.py").read_text()
    for tags, where in re.findall(r"^\| ((?:Eq\.|[AB]\.\d|Alg).*?) \| .*? \| (.*?) \|$", PAPER, re.MULTILINE):
        for module, name in re.findall(r"`(losses|vpd)\.(\w+)`", where):
            beside = re.search(rf"^def {name}\(.*", code, re.MULTILINE)  # of an objective
            said = getattr(losses, name).__doc__ if module == "losses" else beside[0]
            known = any(tag in said for tag in re.findall(r"Eq\. \d+|B\.\d+", tags))
            assert known or name in ("train", "moving_shift"), (tags, name)
            named += 1
        covered |= {("Eq", int(n)) for n in re.findall(r"Eq\. (\d+)", tags)}
        for letter, first, last in re.findall(r"([AB])\.(\d+)(?: to [AB]\.(\d+))?", tags):
            covered |= {(letter, n) for n in range(int(first), int(last or first) + 1)}
    every = {("Eq", n) for n in range(1, 11)} | {("A", n) for n in range(1, 23)} | {("B", n) for n in range(23, 29)}
    assert named > 12 and every <= covered
    lines = re.findall(r"^\| (?:Eq\.|B\.).*\| `(.*?)` \|$", README, re.MULTILINE)
    assert len(lines) == 6 and all(re.search(rf"^ +{re.escape(line)}(  #.*)?$", code, re.MULTILINE) for line in lines)


def test_tables_of_settings_methods_and_sources_are_the_codes():
    rows = re.findall(r"^\| `--(\w+)` \| (.*?) \| (.*?) \| (.*?) \| (.*?) \| .*? \|$", SETTINGS, re.MULTILINE)
    shown = [vpd.Config(**presets.of(vpd.PRESETS, {"task": task})) for task in ("lcb", "sciknoweval", "math", "toy")]
    for name, *cells in rows:
        for text, value in zip(cells, (getattr(cfg, name) for cfg in shown), strict=True):
            assert float(text) == value if isinstance(value, int | float) else value.endswith(text), (name, text, value)
    teachers = {"live": "live", "moving average": "ema", "none": ""}
    table = dict(re.findall(r"^\| `(\w+)` \| (live|moving average|none) \|", README, re.MULTILINE))
    assert {name: teachers[table[name]] for name in table} == {name: m.teacher for name, m in vpd.METHODS.items()}
    sources = re.findall(r"^\| `(\w+)` \| [^|]* \| [^|]* \|$", SETTINGS, re.MULTILINE)
    assert len(rows) > 40 and {*sources} == {*feedback.SOURCES} and all(f"`{source}`" in README for source in sources)


def test_the_teachers_prompts_are_those_that_the_code_renders(byte_tokenizer):
    (text,) = (text for language, text in BLOCKS if language == "text")
    shown = dict(re.findall(r"---- (\w+)\n(.*?)(?=\n---- |\n\Z)", text, re.DOTALL))
    question, first, second, closing = re.split(r"^(?=Here is|An earlier|Now answer)", shown["both"], flags=re.MULTILINE)
    shown |= {"sibling": question + first + closing, "environment": question + second + closing}  # as the text above them says
    solution, said = dict(solution="42"), dict(feedback="41 is too low.")
    contexts = {"sibling": solution, "environment": said, "both": solution | said,
                "critique": dict(critique="The units were added wrongly; look at 2 + 0 again.")}  # fmt: skip
    messages = [{"role": "user", "content": "What is 12 + 30? Reply with the number only."}]
    for source, texts in contexts.items():
        C, words = feedback.Context(source, **texts), feedback.Templates()
        ids, _ = feedback.teacher_prompt(byte_tokenizer, messages, C, words, 10**6)
        assert f"user\n{shown.pop(source)}<|im_end|>" in byte_tokenizer.decode(ids)
    assert not shown


def test_the_worked_task_method_source_and_divergence_run_and_the_log_is_explained(tmp_path, capsys):
    """The edits of the diff blocks are made in a copy, and one run uses all of them."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for folder in ("model", "harness", "tasks", "neighbours"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    edits = [text.removeprefix("--- ").split("\n", 1) for language, text in BLOCKS if language == "diff"]
    assert sorted(name for name, _ in edits) == ["feedback.py", "losses.py", "vpd.py"]
    for name, hunk in ((name, hunk) for name, text in edits for hunk in text.split("@@\n")):
        before, after = ("".join(f"{line[1:]}\n" for line in hunk.splitlines() if line[0] != sign) for sign in "+-")
        code = (tmp_path / name).read_text()
        assert code.count(before) == 1, before
        (tmp_path / name).write_text(code.replace(before, after))
    (tmp_path / "sums.py").write_text(SUMS)
    mine = "--task own --data sums.py --method surprise --feedback hint --divergence hellinger --out run"
    small = "--prompts_per_batch 2 --minibatch_prompts 2 --steps 1 --max_response_tokens 8 --max_prompt_tokens 300"
    small += " --max_teacher_tokens 400 --eval_every 0"  # little room, which is looked at before the run
    command = [sys.executable, "vpd.py", "--model", TRACE, *mine.split(), *small.split()]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
    (row,) = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    assert row["with_context"] == 1 and row["success_given_context"] == {"hint": 0} and row["m_grad_norm"] > 0
    line = terminal_line(dict.fromkeys(row, 1.0) | {"step": 0, "seconds": {"a": 1}})
    names = [*row, *re.findall(r" {2}([A-Za-z|][\w |-]*?) [-\d]", line)]
    assert len(names) > len(row) + 9 and {name for name in names if f"`{name}`".replace("|", r"\|") not in LOG} == set()
    evaluate.main(["--run", str(tmp_path / "run"), "--n", "1", "--max_tokens", "4"])
    told = capsys.readouterr().out
    assert "sums, 64 test problems" in told and f"{tmp_path}/run/evaluation.json: " in told


@pytest.mark.parametrize("old, new, words", [
    ('"validation": 64, "test": 64', '"validation": 0, "test": 0', "--eval_every 0"),
    ("if found[-1] == problem.", "if found[-1] == problem.no", "line 19: verify() raised AttributeError"),  # in the run
])  # fmt: skip
def test_a_fault_of_a_task_file_ends_the_command_with_one_line(old, new, words, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(SUMS.replace(old, new))
    mine = f"--task own --data {tmp_path}/mine.py --model {TRACE} --max_response_tokens 8 --out {tmp_path}/run"
    with pytest.raises(SystemExit) as stop:
        vpd.main(mine.split())
    said = [line for line in capsys.readouterr().err.splitlines() if "error" in line or "Traceback" in line]
    assert stop.value.code == 2 and len(said) == 1 and words in said[0]
