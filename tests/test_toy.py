"""The three toy tasks, their warm-up data, tokenizer and models. Graded answers and feedback texts are written out by hand;
random data are 2000 seeded examples, so a run never differs from the last one."""

import itertools
import json
import math
import random
import re
import zlib
from pathlib import Path

import pytest
import torch

import feedback
from model.policy import Policy
from neighbours import ovd
from rollout import HFSampler
from study import warm_start
from tasks import Outcome, Problem, tiny, toy
from tasks.sandbox import Sandbox
from test_study import assert_refused

MODELS = tiny.FIXTURES.parent / "toy_models"


@pytest.fixture(scope="module")
def loaded():
    makers = {subset: maker() for subset, maker in toy.SUBSETS.items()}
    makers["code"].sandbox = Sandbox(time_limit=60.0)  # a busy machine must not fail a correct program
    tasks = {subset: maker.load() for subset, maker in makers.items()}
    yield tasks
    for task in tasks.values():
        task.close()


@pytest.fixture(scope="module")
def warm_up():
    """2000 warm-up examples of each subset, half of them from the beginning of the training."""
    makers = {subset: (make(), random.Random(7)) for subset, make in toy.EVERY.items()}
    return {subset: [maker.example(rng, progress) for progress in (0.05, 1.0) for _ in range(1000)]
            for subset, (maker, rng) in makers.items()}  # fmt: skip


def problems(task):
    return task.train + task.validation + task.test


# ---- Problems --------------------------------------------------------------------------------------------


def respond(subset, problem, right: bool) -> str:
    """A response that earns 1, or one that is nearly right: another option, one element more, another last digit."""
    reference = problem.reference
    if subset == "choice":
        chosen = next(value for value in problem.data[1] if (str(value) == reference) == right)
        return toy.Choice().answer(problem, chosen)
    near = reference + "+[0]" if subset == "code" else reference[:-1] + str((int(reference[-1]) + 1) % 10)
    return reference if right else near


# Of each subset a checksum of its problems and one of its warm-up examples: others would be another task by the same name, and
# the models would have to be made again.
KNOWN = {
    "trace": (3135832785, 1236168392), "code": (3391565572, 2889345326), "choice": (1778744473, 1704280561),
    "trace-often": (3135832785, 233708804), "trace-dialect": (3926406966, 1236168392), "code-judge": (3391565572, 1120310418),
}  # fmt: skip
SIZES = {"trace": (720, 64, 64), "code": (219, 70, 70), "choice": (480, 64, 64)}


@pytest.mark.parametrize("subset", toy.EVERY)
def test_the_problems_and_the_warm_up_examples_are_those_of_the_study(loaded, warm_up, subset):
    task, texts = loaded.get(subset) or toy.load(subset), lambda C: [C.solution, C.feedback, C.critique]
    told = [(p.id, p.messages, p.reference, p.data) for p in problems(task)], warm_up[subset]
    assert tuple(zlib.crc32(json.dumps(of, default=texts).encode()) for of in told) == KNOWN[subset]
    sizes = SIZES[subset.split("-")[0]]
    assert task.splits() == "toy/{}: {} train, {} validation, {} test problems".format(subset, *sizes)
    assert len({p.messages[-1]["content"] for p in problems(task)}) == len({p.id for p in problems(task)}) == sum(sizes)


@pytest.mark.parametrize("subset", toy.SUBSETS)
def test_a_reference_solves_its_own_problem_and_a_near_miss_does_not(loaded, subset):
    task = loaded[subset]
    chosen = problems(task)[:: 12 if subset == "code" else 1]  # each code answer runs in up to six processes
    assert task.verify(chosen, [respond(subset, p, True) for p in chosen]) == [Outcome(1, "passed")] * len(chosen)
    outcomes = task.verify(chosen, [respond(subset, p, False) for p in chosen])
    assert all(outcome.reward == 0 and outcome.feedback for outcome in outcomes) and task.verify([], []) == []


# ---- Verifiers -------------------------------------------------------------------------------------------

TRACE = Problem("p", toy.user("start 4\n1 add 3\n2 zig\n3 sub 1"), "1 add 3 : 7\n2 zig : 2\n3 sub 1 : 1")
TRACE_FEEDBACK = {  # what is wrong with the answer -> feedback: the first wrong line, in the answer's own words
    "1 add 3 : 7\n2 zig : 9\n3 sub 1 : 8": "expected\n2 zig : 2\ngot 9",  # the first wrong line, not the last
    "1 add 3 : 8\n2 zig : 2\n3 sub 1 : 1": "expected\n1 add 3 : 7\ngot 8",  # even when all that follows is right
    **{f"1 add 3 : 7\n{line}\n3 sub 1 : 1": "expected\n2 zig : 2\ngot other" for line in ("2 zag : 2", "2 zig 2", "2 zig : x")},
    "1 add 3 : 7\n3 sub 1 : 6": "expected\n2 zig : 2\ngot other",
    "1 add 3 : 7\n2 zig : 2": "expected\n3 sub 1 : 1\ngot other",
    "": "expected\n1 add 3 : 7\ngot other",
    TRACE.reference + "\n4 add 1 : 2": "expected\nend\ngot other",
}
CHOICES = {  # response -> verdict: the last answer tag counts, and nothing but failure is told
    **dict.fromkeys(["zig 4 : 2\n<answer>2</answer>", "<answer>7</answer> no, <answer>2</answer>", "<answer> 2\n</answer>",
                     "<answer>7 or <answer>2</answer>", "<answer>2</answer>, in <answer> tags"], "passed"),
    **dict.fromkeys(["<answer>2</answer> <answer>7</answer>", "<answer>22</answer>", "<answer>two</answer>"], "wrong answer"),
    **dict.fromkeys(["zig 4 : 2", "<answer>2", ""], "no answer"),
}  # fmt: skip


def test_trace_names_the_first_wrong_line_and_choice_reads_the_last_answer_tag():
    outcomes = toy.Trace().verify([TRACE] * len(TRACE_FEEDBACK), list(TRACE_FEEDBACK))
    assert outcomes == [Outcome(0, "wrong line", text) for text in TRACE_FEEDBACK.values()]
    (outcome,) = toy.EVERY["trace-dialect"]().verify([TRACE], ["1 add 3 : 8"])
    assert outcome.feedback == "expected\n1 add 3 7\ngot 8"  # without the colon
    texts = {"passed": "", "wrong answer": "wrong answer", "no answer": "no answer given"}
    for response, outcome in zip(CHOICES, toy.Choice().verify([Problem("p", [], "2")] * len(CHOICES), list(CHOICES))):
        verdict = CHOICES[response]
        assert outcome == Outcome(int(verdict == "passed"), verdict, texts[verdict]), response


@pytest.fixture(scope="module")
def grade_code(loaded):
    return lambda response, tests: loaded["code"].verify([Problem("p", [], "", tests)], [response])[0]


FLIP = [([1, 2, 3], [3, 2, 1]), ([2, 1], [1, 2])]
CODE_FEEDBACK = {  # response -> verdict, and the feedback between "f([1,2,3]) " and ", expected [3,2,1]"
    "return xs": ("wrong answer", r"returned \[1,2,3\]"),
    "print(xs[::-1])": ("wrong answer", r"returned None"),
    "return 'no'": ("wrong answer", r"returned 'no'"),
    "return xs[9]": ("error", r"raised IndexError: list index out of range \(line 2\)"),
    "return (": ("error", r"raised SyntaxError: .*"),
    "": ("error", r"raised IndentationError: .*"),
    "raise SystemExit": ("error", r"raised SystemExit.*"),
    "raise ValueError('v' * 99)": ("error", r"raised ValueError: v{48}"),
    "import os\nos._exit(0)": ("error", r"raised exited without a result.*"),
}


def test_code_feedback_is_the_first_failing_test_as_it_failed(grade_code):
    for response, (verdict, text) in CODE_FEEDBACK.items():
        outcome = grade_code(response, FLIP)
        assert (outcome.reward, outcome.verdict) == (0, verdict), response
        assert re.fullmatch(rf"f\(\[1,2,3\]\) {text}, expected \[3,2,1\]", outcome.feedback)
    outcome = grade_code("return sorted(xs)[::-1]", FLIP)  # right on the first test, wrong on the second
    assert outcome == Outcome(0, "wrong answer", "f([2,1]) returned [2,1], expected [1,2]")
    assert grade_code("print(xs)\nreturn xs[::-1]", FLIP) == Outcome(1, "passed")
    assert grade_code("return [True]", [([0], [1])]).feedback == "f([0]) returned [True], expected [1]"
    assert grade_code("return [1]", [([0], [True])]).feedback == "f([0]) returned [1], expected [True]"
    assert grade_code("return [True]", [([0], [True])]).reward == 1


# ---- A judge -----------------------------------------------------------------------------------------------

CONFIG = ovd.Config(task="toy", subset="code-judge", judge_request=toy.JUDGE_REQUEST, max_teacher_tokens=512)


def test_the_shipped_judge_tells_its_right_rollouts_from_its_wrong_ones(loaded):
    """An AUC of 0.5 is a judge that cannot tell; it always names a digit."""
    policy, task = Policy.load(str(MODELS / "code-judge")), loaded["code"]
    rows = [p for p in task.validation for _ in range(2)]
    prompts = [feedback.student_prompt(policy.tokenizer, p.messages) for p in task.validation]
    texts = [policy.decode(roll.tokens) for roll in HFSampler(policy).sample(prompts, 2, seed=0, max_tokens=48)]
    outcomes, scores = task.verify(rows, texts), ovd.Judge(CONFIG, policy, task).scores(rows, texts, 0)
    assert 0.1 < sum(o.reward for o in outcomes) / len(rows) < 0.9 and None not in scores
    assert ovd.judge_figures(scores, outcomes, 5.0)["judge_auc"] > 0.85


# ---- Tokenizer and models --------------------------------------------------------------------------------


def test_text_survives_the_tokenizer_and_a_digit_or_an_operation_is_one_token(warm_up, tokenizer):
    texts = ["".join(map(chr, range(32, 127))) + "\n"]  # printable ASCII, and what the examples say
    for example in itertools.chain(*(warm_up[subset][::4] for subset in toy.SUBSETS)):
        said = example.get("context") or feedback.Context("")
        texts += [example["messages"][0]["content"], said.solution, said.feedback, said.critique, example["answer"]]
    assert tokenizer.batch_decode(tokenizer(texts).input_ids) == texts
    tokens = [tokenizer.decode(i) for i in range(len(tokenizer))]
    assert {token.strip() for token in tokens if re.search(r"\d", token)} == set("0123456789")
    assert all(len(tokenizer(f"1 {op}").input_ids) == 2 for op in toy.OPS)


@pytest.fixture
def quick(monkeypatch, tokenizer):
    monkeypatch.setattr(warm_start, "build_tokenizer", lambda: tokenizer)
    monkeypatch.setattr(toy.Choice, "batch", 8)


@pytest.mark.parametrize("subset", [*toy.SUBSETS, "code-judge"])
def test_examples_fit_the_model_and_answers_fit_the_response_limit(loaded, warm_up, tokenizer, quick, subset):
    judges, most_of_answer, digits = subset == "code-judge", toy.EVERY[subset]().max_response, ovd.digit_tokens(tokenizer)
    most = 512 if judges else warm_start.build_policy(subset).model.config.max_position_embeddings
    answered = [] if judges else [{"messages": p.messages, "answer": respond(subset, p, True)} for p in problems(loaded[subset])]
    for example in warm_up[subset][::2] + answered:
        prompt, answer = warm_start.encode(tokenizer, example)
        assert len(prompt) + most_of_answer <= most and len(answer) <= most_of_answer and answer[-1] == tokenizer.eos_token_id
        if judges and "attempt" in example:  # a score is the one token that a judge is asked for
            assert answer[:-1] == [digits[int(example["answer"])]] and tokenizer.decode(prompt) == (
                f"<|im_start|>user\n{example['messages'][0]['content']}\nattempt\n{example['attempt']}\nscore<|im_end|>\n"
                "<|im_start|>assistant\n"
            )


def test_warm_start_moves_every_weight_stays_finite_and_repeats_with_its_seed(quick, capsys):
    first, again = (warm_start.warm_start("choice", 3, seed=4) for _ in range(2))
    weights = (policy.model.parameters() for policy in (first, again, warm_start.build_policy("choice", 4)))
    for a, b, start in zip(*weights, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, start) and a.isfinite().all()
    losses = [float(loss) for loss in re.findall(r"step 3/3  loss (\S+)", capsys.readouterr().out)]
    assert losses[0] == losses[1] == pytest.approx(math.log(len(first.tokenizer)), abs=1)  # of an untrained model: ln V


@pytest.mark.parametrize("subset", sorted(path.name for path in MODELS.iterdir()))
def test_a_shipped_model_loads_and_is_small(tokenizer, subset):
    folder = MODELS / subset
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 4_000_000
    policy, messages = Policy.load(str(folder)), toy.user("start 4\n1 add 3")
    prompts = [feedback.student_prompt(t, messages) for t in (policy.tokenizer, tokenizer)]
    assert policy.tokenizer.decode(prompts[0]) == tokenizer.decode(prompts[1]) and max(prompts[0]) < policy.vocabulary


# ---- The command -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv, words", [
    *[(["--out", out], "the model's folder") for out in (__file__, f"{__file__}/x/y", "/proc/x")],
    (["--out", "x", "--steps", "-1"], "--steps"), (["--out", str(Path(__file__).parent)], "holds more than a model"),
])  # fmt: skip
def test_a_bad_output_folder_is_refused_before_training(argv, words, capsys, monkeypatch):
    monkeypatch.setattr(warm_start, "warm_start", lambda *_: pytest.fail("training began"))
    assert_refused(warm_start, argv, words, capsys)


def test_a_model_replaces_only_an_older_one_and_a_failed_try_leaves_nothing(tmp_path, monkeypatch, quick):
    (tmp_path / "old").mkdir(), (tmp_path / "empty").mkdir()
    (tmp_path / "old" / "config.json").write_text("{\"model_type\": \"qwen3\"}")

    def train(*_):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "old"]
        raise KeyboardInterrupt

    monkeypatch.setattr(warm_start, "warm_start", train)
    for name in ("old", "empty", "new"):
        with pytest.raises(KeyboardInterrupt):  # training began
            warm_start.main(["--out", str(tmp_path / name)])
    monkeypatch.setattr(warm_start, "warm_start", lambda *_: warm_start.build_policy("choice"))
    monkeypatch.chdir(tmp_path / "empty")
    warm_start.main(["--out", "."])  # the folder is replaced by one of its name, which `.` has not
    assert (tmp_path / "empty" / "config.json").exists()
