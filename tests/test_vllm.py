"""VLLMSampler with the real engine, on tiny random models and vLLM's CPU kernels: `bash run.sh test-vllm`.

`test_two_processes` runs this file as a script, plainly and by torchrun: a training step between two pushes, and a push that one
process misses.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from urllib.request import urlopen

import numpy as np
import pytest
import torch

from conftest import log_of, tiny_network  # first: it puts the sources on the path, for the script too

# isort: split
import evaluate
import feedback
import rollout
import tasks
import vpd
from harness import command
from model.parallel import Shared, World
from model.policy import Policy
from neighbours import ovd, served
from rollout import HFSampler, StaleEngine, VLLMSampler
from tasks import tiny, toy
from test_rollout import nucleus, same

pytestmark = pytest.mark.vllm
torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]
JUDGE = ROOT / "tasks" / "toy_models" / "code-judge"
EOS, LIMIT = 2, 384
SIZES = dict(hidden_size=64, head_dim=32, max_position_embeddings=1024)
# A float64 trainer gets a float32 engine. vLLM runs OLMo3 through transformers' own classes, which it changes.
FAMILIES = {"qwen3-tied": torch.float32, "qwen3-untied": torch.float64, "olmo3": torch.float32}
# The engine on a CPU caches prefixes in blocks of 128 tokens, so the long prompt is cached and the short ones are not.
PROMPTS = [[3 + 7 * i % 300 for i in range(300)], [12, 3], [5, 5, 13, 4, 6]]
MIXED = dict(n=4, seed=3, max_tokens=24)


def make(family: str, folder: Path, world: World = World(), dtype: torch.dtype | None = None) -> Policy:
    """A policy with random weights. The folder gets a configuration, no weights, and generation settings that must be ignored."""
    window = {"sliding_window": 128} if family == "olmo3" else {}
    model = tiny_network(family, 320, torch.float32, **SIZES, **window).to(dtype or FAMILIES[family])
    model.config.architectures = [type(model).__name__]
    if world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        model.config.save_pretrained(folder)
        settings = dict(eos_token_id=[7, 8], repetition_penalty=1.7, top_k=1, temperature=0.1, max_new_tokens=2)
        (folder / "generation_config.json").write_text(json.dumps(settings))
    world.wait()
    return Policy(model, SimpleNamespace(eos_token_id=EOS, chat_template=None), world=world)


def engine_of(policy: Policy, folder: Path) -> VLLMSampler:
    return VLLMSampler(policy, str(folder), LIMIT, probes=[[4, 9, 20], [3, 8]])


def train(policy: Policy, rate: float = 0.3) -> None:
    """One large SGD step that makes fixed responses likelier."""
    responses = [[4 + (i * j) % 200 for j in range(20)] for i in range(1, 4)]
    lengths = [len(x) + len(y) for x, y in zip(PROMPTS, responses)]
    for batch in policy.micro_batches(range(3), lengths):
        view = policy.view([PROMPTS[i] for i in batch], [responses[i] for i in batch])
        policy.backward(view.loss(lambda t: -t.logp, view.mask / 60)[0])
    policy.step(torch.optim.SGD(policy.model.parameters()), rate, max_grad_norm=1e9)


def gap(policy, rollouts, prompts=PROMPTS, model=None):
    """The largest |log p of the rollouts - log p of the trainer|, and the mean. model: with other weights."""
    n = len(rollouts) // len(prompts)
    scored, _ = policy.score([prompts[row // n] for row in range(len(rollouts))], [r.tokens for r in rollouts], model=model)
    assert all(len(r.logp) == len(r.tokens) for r in rollouts)
    gaps = torch.cat([(s[: len(r.logp)].cpu() - torch.tensor(r.logp)).abs() for r, s in zip(rollouts, scored)])
    return gaps.max().item(), gaps.mean().item()


def view_logits(policy, prompt, response):
    """(T, V). The model itself is not called: vLLM has changed OLMo3's __call__."""
    view = policy.view([prompt], [response])
    return (view.hidden @ view.head.T)[0].detach()


def generators():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.fixture(scope="module", params=FAMILIES)
def engine(request, tmp_path_factory):
    policy = make(request.param, folder := tmp_path_factory.mktemp(request.param))
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    before = generators()
    sampler = engine_of(policy, folder)
    assert generators() == before and torch.initial_seed() == 5  # building an engine leaves them alone
    with pytest.raises(RuntimeError, match=r"no weights before the first sync\(policy\)"):
        sampler.sample(PROMPTS, **MIXED)
    yield SimpleNamespace(policy=policy, sampler=sampler, start=[p.detach().clone() for p in policy.model.parameters()])
    sampler.llm.llm_engine.engine_core.shutdown()  # its cache is a GiB


@pytest.fixture
def pair(engine):
    """(policy, sampler) in step, with the weights and probes of the start; a test may change them."""
    with torch.no_grad():
        for p, start in zip(engine.policy.model.parameters(), engine.start):
            p.copy_(start)
    engine.policy.eos_ids, engine.sampler.probes = [EOS], [[4, 9, 20], [3, 8]]
    engine.sampler.sync(engine.policy)
    return engine.policy, engine.sampler


# ---- The distribution ------------------------------------------------------------------------------------------


def test_after_an_update_and_a_push_rollouts_come_from_the_new_weights(pair):
    policy, sampler = pair
    before = sampler.sample(PROMPTS, **MIXED)
    train(policy)
    assert gap(policy, before)[1] > 0.2  # what the old weights' rollouts look like to the new ones
    sampler.sleep()
    with pytest.raises(RuntimeError, match=r"nor between sleep\(\)"):
        sampler.sample(PROMPTS, **MIXED)
    sampler.sync(policy)
    after = sampler.sample(PROMPTS, **MIXED)  # the long prompt was cached under the old weights
    assert gap(policy, after)[0] < 1e-5 and sampler.gap < 1e-5
    assert [r.tokens for r in after] != [r.tokens for r in before]


def test_tokens_and_logp_are_of_the_distribution_after_temperature_and_top_p(pair):
    policy, sampler = pair
    for row, r in enumerate(sampler.sample(PROMPTS, **MIXED, temperature=0.7, top_p=0.9)):
        log_p = nucleus(view_logits(policy, PROMPTS[row // 4], r.tokens), 0.7, 0.9)
        expected = log_p[range(len(r.tokens)), r.tokens]
        assert r.logp == pytest.approx(expected.tolist(), abs=1e-5)  # -inf outside the nucleus would fail
    likeliest = sampler.sample(PROMPTS, **MIXED, temperature=0)
    for row, r in enumerate(likeliest):
        assert r.tokens == view_logits(policy, PROMPTS[row // 4], r.tokens).argmax(-1).tolist()
    assert gap(policy, likeliest)[0] < 1e-5


# ---- Rows and seeds --------------------------------------------------------------------------------------------


def test_a_second_network_of_the_class_is_made_and_pushed_beside_the_engine(pair):
    """The EMA teacher, and the second network of an evaluation."""
    policy, sampler = pair
    torch.manual_seed(9)
    model = type(policy.model)(policy.model.config).to(policy.dtype)
    other = Policy(model, SimpleNamespace(eos_token_id=EOS, chat_template=None))
    sampler.sleep()
    sampler.sync(other)
    assert gap(other, sampler.sample(PROMPTS, **MIXED))[0] < 1e-5
    twin = policy.frozen_copy()
    assert torch.equal(policy.score([[3]], [[4]], model=twin)[0], policy.score([[3]], [[4]])[0])


def test_a_row_depends_on_all_bits_of_its_seed_and_not_on_other_rows(pair, monkeypatch):
    _, sampler = pair
    first = sampler.sample(PROMPTS, **MIXED)
    assert same(sampler.sample(PROMPTS, **MIXED), first, tol=1e-5)
    other = sampler.sample(PROMPTS, **MIXED | {"seed": 4})
    assert all(r.tokens != s.tokens for r, s in zip(other, first))
    assert len({tuple(r.tokens) for r in first[:4]}) == 4  # the rows of one prompt are draws of their own
    assert same(sampler.sample(PROMPTS[:2], **MIXED), first[:8], tol=1e-5)
    assert same(sampler.sample([[9], PROMPTS[1], PROMPTS[2]], **MIXED)[4:], first[4:], tol=1e-5)
    assert sampler.sample([], **MIXED) == []
    drawn = []
    for seed in (2**63 - 1, 2**31 - 1, 2**63 - 2):  # alike in their last 31 bits, or in all but the last
        monkeypatch.setattr(rollout, "seed_for", lambda *_: seed)
        drawn.append(sampler.sample(PROMPTS[1:2], **MIXED)[0].tokens)
    assert drawn[0] != drawn[1] and drawn[0] != drawn[2]


def test_a_row_ends_with_an_eos_of_the_policy_or_is_cut_at_max_tokens(pair):
    policy, sampler = pair
    policy.eos_ids = list(range(30, 42))
    # The long prompts together are more than one pass of the engine takes.
    rollouts = sampler.sample(PROMPTS, n=150, seed=0, max_tokens=12, temperature=2.0)
    assert {r.tokens[-1] for r in rollouts if r.finish == "stop"} == set(policy.eos_ids)
    for r in rollouts:
        assert not set(r.tokens[:-1]) & set(policy.eos_ids) and len(r.logp) == len(r.tokens)
        assert r.finish == "stop" if r.tokens[-1] in policy.eos_ids else r.finish == "length" and len(r.tokens) == 12
    assert any(r.finish == "stop" and len(r.tokens) == 12 for r in rollouts)  # EOS at the last place is no cut
    for other in (EOS, 7, 8):  # the EOS ids of the folder's configuration and generation settings end nothing
        assert any(other in r.tokens[:-1] for r in rollouts)


def test_rows_are_handed_over_while_others_are_still_drawn(pair):
    policy, sampler = pair
    policy.eos_ids, seen, left = list(range(30, 60)), {}, []

    def finished(row, rollout):
        seen[row] = rollout
        left.append(sampler.llm.llm_engine.get_num_unfinished_requests())

    rollouts = sampler.sample(PROMPTS, **MIXED, finished=finished)
    assert rollouts == [seen[row] for row in range(12)] and same(sampler.sample(PROMPTS, **MIXED), rollouts, tol=1e-5)
    assert list(seen) != sorted(seen) and left[0] > 3 and left == sorted(left, reverse=True)


def test_a_prompt_without_room_is_one_line_and_the_engine_goes_on(pair):
    policy, sampler = pair
    with pytest.raises(ValueError, match=f"prompt of {LIMIT} tokens .* max_model_len {LIMIT}") as error:
        sampler.sample([[4], [4] * LIMIT], **MIXED)
    assert "\n" not in str(error.value)
    prompts = [[4] * (LIMIT - 1), [4] * (LIMIT - 3)]
    rollouts = sampler.sample(prompts, **MIXED)
    assert {len(r.tokens) for r in rollouts[:4]} == {1} and max(len(r.tokens) for r in rollouts[4:]) == 3
    assert gap(policy, rollouts, prompts)[0] < 1e-5
    sampler.sync(policy)  # these prompts are the probes now
    assert sampler.gap < 1e-5


# ---- The push --------------------------------------------------------------------------------------------------


def swallow(method, kwargs):
    """In place of collective_rpc: reads the weights and loads none."""
    assert method == "reload_weights" and len(list(kwargs["weights_iterator"])) > 20


@pytest.mark.parametrize("part, broken", [("collective_rpc", swallow), ("reset_prefix_cache", lambda: True)])
def test_a_push_that_does_not_arrive_or_leaves_keys_and_values_stops_the_run(pair, monkeypatch, part, broken):
    policy, sampler = pair
    sampler.sample(PROMPTS, **MIXED)
    assert sampler.probes == PROMPTS[:2]
    with monkeypatch.context() as patch:
        patch.setattr(sampler.llm, part, broken)
        sampler.sync(policy)  # the same weights: nothing is stale yet
        train(policy)
        with pytest.raises(StaleEngine, match=r"[\d.]+ nats .* 0.001 is the limit: .* stale") as error:
            sampler.sync(policy)
    assert "\n" not in str(error.value) and sampler.gap > 0.05
    sampler.sync(policy)
    assert sampler.gap < 1e-5
    monkeypatch.setattr(policy, "score", lambda x, y: (torch.full((len(y), 32), float("nan")), None))
    with pytest.raises(StaleEngine, match="nan nats"):
        sampler.sync(policy)


def test_an_engine_in_bfloat16_is_near_and_has_a_limit_of_its_own(tmp_path, monkeypatch):
    policy = make("qwen3-untied", tmp_path, dtype=torch.bfloat16)
    sampler = engine_of(policy, tmp_path)
    sampler.sync(policy)
    assert 0 < sampler.gap < 0.1 < sampler.gap_limit == 0.5
    train(policy)
    monkeypatch.setattr(sampler.llm, "collective_rpc", swallow)
    with pytest.raises(StaleEngine):
        sampler.sync(policy)


# ---- Whole runs ------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(out, *flags): batches of a random model on the toy task `choice`, with outcomes and feedback made up from the
    response's length, so that groups are mixed. Returns the log."""
    tokenizer, load = tiny.build_tokenizer(), tasks.load
    Policy(tiny_network("qwen3-tied", len(tokenizer), torch.float32, **SIZES), tokenizer).save(tmp_path / "model")

    def graded(*args, **kwargs):
        task = load(*args, **kwargs)
        outcome = lambda text: tasks.Outcome(len(text) % 2, "even", f"length {len(text) % 7}")  # noqa: E731
        task.verify, task.validation, task.test = lambda _, texts: [outcome(t) for t in texts], [], task.test[:6]
        return task

    monkeypatch.setattr(tasks, "load", graded)

    def train(out, *flags, program=vpd):
        e_step = ["--e_minibatch_prompts", "4", "--e_step_every", "2"] * (program is vpd)
        program.main([*(
            f"--subset choice --model {tmp_path}/model --out {out} --sampler vllm --prompts_per_batch 4 --minibatch_prompts 2 "
            "--group_size 4 --max_response_tokens 12 --steps 3 --eval_every 3 --eval_samples 1 --checkpoint_every 1 "
            "--feedback environment"
        ).split(), *e_step, *flags])  # fmt: skip
        assert [row["step"] for row in log_of(out)] == [0, 1, 2]
        return log_of(out)

    return train


def test_a_run_learns_from_the_engines_rollouts_and_is_evaluated_with_it(run, tmp_path, capsys):
    for row in run(tmp_path / "run"):
        assert row["sampler_gap"] < 1e-5 and row["mismatch_truncated"] == 0
        assert row["m_grad_norm"] > 0 and 0 < row["reward"] < 1
        assert (row["e_loss"] is not None) == (row["step"] % 2 == 0)
    evaluate.main(["--run", str(tmp_path / "run"), "--sampler", "vllm"])
    assert "before" in capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["before"]["rewards"] != found["after"]["rewards"]  # the engine was given the other weights


@pytest.mark.parametrize("teacher", ["live", "ema"])
def test_ovds_demonstrations_have_the_log_probs_that_the_teacher_drew_them_with(run, tmp_path, monkeypatch, teacher):
    seen, demonstrate = [], ovd.demonstrate

    def watched(cfg, run, teacher, batch, *rest):
        shown = demonstrate(cfg, run, teacher, batch, *rest)
        prompts, drawn = [batch.xC[i] for i in shown], [rollout for rollout, _ in shown.values()]
        # The gap to the weights that the engine should have, and to the student.
        seen.append([gap(run.policy, drawn, prompts, model)[0] for model in (teacher, None)])
        return shown

    monkeypatch.setattr(ovd, "demonstrate", watched)
    judge = ("--subset", "code-judge", "--model", str(JUDGE), "--max_response_tokens", "40", "--teacher", teacher)
    rows = run(tmp_path / "run", *judge, program=ovd)
    assert len(seen) == 3 and all(0 < row["demonstrations"] <= 1 and row["sampler_gap"] < 1e-5 for row in rows)
    assert max(reader for reader, _ in seen) < 1e-4
    assert all((student > 1e-3) == (teacher == "ema") for _, student in seen[1:])


# ---- A server --------------------------------------------------------------------------------------------------


@pytest.fixture
def url(tmp_path):
    """vLLM's own OpenAI-compatible server with the toy model that judges. Its generation settings would cut the distribution to
    the likeliest token, as those of real models cut it to a few."""
    model = shutil.copytree(JUDGE, tmp_path / "model")
    settings_there = json.loads((model / "generation_config.json").read_text()) | {"top_k": 1}
    (model / "generation_config.json").write_text(json.dumps(settings_there))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = ["--model", str(model), "--served-model-name", "judge", "--dtype", "float32",
            "--max-model-len", "512", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *argv]
    process = subprocess.Popen(command, env=env, start_new_session=True)
    try:
        for _ in range(600):
            assert process.poll() is None, "the server ended"
            with suppress(OSError):
                urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_served_judge_says_what_the_same_weights_say_here(url):
    policy, task = Policy.load(str(JUDGE), micro_batch_tokens=4096), toy.load("code-judge")
    problems = [problem for problem in task.train[:8] for _ in range(4)]
    x = [feedback.student_prompt(policy.tokenizer, problem.messages) for problem in problems]
    y = [rollout.tokens for rollout in HFSampler(policy).sample(x, 1, seed=1, max_tokens=40)]
    texts = [policy.decode(tokens) for tokens in y]

    ask = lambda **flags: ovd.Judge(ovd.Config(**ovd.PRESETS["toy"], task="toy", subset="code-judge", **flags), policy, task)  # noqa: E731
    here, judge = ask().scores(problems, texts, 0), ask(judge_url=url, judge_model="judge")
    assert judge.scores(problems, texts, 0) == pytest.approx(here, abs=1e-4) and max(here) - min(here) > 3
    assert not +judge.missing and judge.server.ways == served.WAYS["judge"]  # the server refuses nothing


# ---- Processes -------------------------------------------------------------------------------------------------


def script(out: Path) -> None:
    world = World.start()
    result, alive = {}, []
    for family in FAMILIES:
        policy = make(family, out / family, world, torch.float32)
        sampler = engine_of(policy, out / family)
        alive.append(sampler)  # an engine that is collected destroys vLLM's groups, the next one's too
        sampler.sync(policy)
        # Two rows of three begin to be graded in the process that drew them, every fourth row as what it is not in the end.
        grade = Shared(world, lambda rows, tokens: [(row, sum(y), len(rows)) for row, y in zip(rows, tokens)], threads=2)
        begin = lambda row, r: row % 3 and grade.begin(row, row, r.tokens if row % 4 else [])  # noqa: E731
        drawn = [sampler.sample(PROMPTS, **MIXED, finished=begin)]
        graded = [grade(list(range(12)), [r.tokens for r in drawn[0]]) for _ in range(2)]
        train(policy)
        sampler.sleep()
        sampler.sync(policy)
        drawn.append(sampler.sample(PROMPTS, **MIXED))
        gaps, raised = [sampler.gap, gap(policy, drawn[1])[0]], False
        train(policy)
        if world.rank == world.size - 1:
            sampler.llm.collective_rpc = swallow
        try:
            sampler.sync(policy)
        except StaleEngine:
            raised = True
        result[family] = dict(
            drawn=[[vars(r) for r in rs] for rs in drawn], gaps=gaps, raised=raised, empty=sampler.sample([], **MIXED),
            graded=graded,
        )  # fmt: skip
    (out / f"{world.rank}.json").write_text(json.dumps(result))


def fail_in_one(out: Path) -> None:
    """One process fails while the other waits for it in a push, with an engine whose end waits for all processes."""
    world = World.start()
    policy = make("qwen3-tied", out / "tied", world, torch.float32)
    sampler = engine_of(policy, out / "tied")
    sampler.sync(policy)
    if world.rank == 1:
        (out / "broken").touch()
        raise RuntimeError("broken here")
    sampler.sync(policy)


def processes(size: int, what: str, out: Path) -> subprocess.CompletedProcess:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"] if size > 1 else []
    return subprocess.run([sys.executable, *launch, __file__, what, out], capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def by_processes(tmp_path_factory):
    """{processes: [what each found]}."""
    found = {}
    for size in (1, 2):
        out = tmp_path_factory.mktemp(f"by{size}")
        run = processes(size, "script", out)
        assert run.returncode == 0, run.stderr[-3000:]  # the end of the process included
        found[size] = [json.loads((out / f"{rank}.json").read_text()) for rank in range(size)]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes(by_processes, family):
    """Over sharded weights, the rollouts are those of one process before and after an update, and both processes refuse a push
    that one of them missed."""
    one, *two = [found[family] for size in (1, 2) for found in by_processes[size]]
    for share, found in zip((6, 3, 3), (one, *two)):
        sums = [(row, sum(r["tokens"])) for row, r in enumerate(found["drawn"][0])]
        first = [[*of, 1 if of[0] % 3 and of[0] % 4 else share] for of in sums]
        assert found["graded"] == [first, [[*of, share * 2] for of in sums]]  # the second time nothing had begun
    for found in two:
        assert found["empty"] == [] and found["raised"] and one["raised"]
        assert max(found["gaps"]) < 1e-5
        for drawn, expected in zip(found["drawn"], one["drawn"], strict=True):
            drawn, expected = ([rollout.Rollout(**r) for r in rs] for rs in (drawn, expected))
            assert same(drawn, expected, tol=1e-5)
    assert one["drawn"][0] != one["drawn"][1]


def test_a_process_that_fails_ends_the_job_although_engines_are_alive(tmp_path):
    run = processes(2, "fail_in_one", tmp_path)
    assert run.returncode == 1 and "RuntimeError: broken here" in run.stderr
    assert time.time() - (tmp_path / "broken").stat().st_mtime < 60


if __name__ == "__main__":
    command.run(lambda: globals()[sys.argv[1]](Path(sys.argv[2])))
