"""What models say of rollouts: a critic's review, a judge's score, an expert's tokens.

Each is asked of the network itself, by way of its sampler, or of a model behind an OpenAI-compatible server. What cannot
be had is missing, never invented: a rollout without a review has no context, one without a score is kept, a place without
an expert's token has no loss. All of them are counted, and a server that says nothing for SILENT batches ends the run.
"""

import itertools
import math
import os
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable

import torch

import feedback
from model.policy import Ids, Policy
from rollout import seed_for


SILENT = 3  # batches in a row without a single answer
FIRST = 16  # questions, after which the others are not asked where none had an answer
# Beyond OpenAI's protocol, for servers that know them: no thought before an answer, and no truncation of the distribution,
# which some take from the model's own generation settings.
THINKING_OFF = {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}
PLAIN = {"extra_body": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "add_special_tokens": False}}
LOGPROBS = {"logprobs": True, "top_logprobs": 20}


class ServerSilent(RuntimeError):
    """A server does not answer any more."""


class ServedModel:
    """A model behind any OpenAI-compatible server. The key comes from the environment variable OPENAI_API_KEY alone. Every
    method asks one thing of many and answers in order, None where three attempts failed; `failures` then says why. Where
    the first questions have all failed the others are not asked. What a server refuses to be asked is left out."""

    def __init__(self, url: str, model: str, timeout: float = 60.0, at_once: int = 16):
        import openai  # half a second that only its users pay

        key = os.environ.get("OPENAI_API_KEY") or "none"  # local servers want none
        self.client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=2)
        self.refusals = openai.BadRequestError, openai.UnprocessableEntityError, openai.PermissionDeniedError
        self.url, self.model, self.at_once = url, model, at_once
        self.without: set[str] = set()  # settings that the server refuses
        self.lock = threading.Lock()
        self.failures: Counter[str] = Counter()  # of the last call: what went wrong, how often

    def _each(self, ask: Callable, questions: list) -> list:
        self.failures.clear()
        answered = threading.Event()

        def guarded(i: int):
            if not answered.is_set() and self.failures.total() >= FIRST:
                with self.lock:
                    self.failures["not asked: none of those before had an answer"] += 1
                return None
            try:
                answer = ask(i, questions[i])
                answered.set()
                return answer
            except Exception as error:  # the library's errors, and answers that are not of the protocol
                with self.lock:
                    self.failures[f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"] += 1

        answers, waiting = [None] * len(questions), iter(range(len(questions)))

        def work():
            while True:
                with self.lock:
                    i = next(waiting, None)
                if i is None:
                    return
                answers[i] = guarded(i)

        # Daemons and no pool, whose threads an exit after Ctrl-C would wait for until the last timeout.
        workers = [threading.Thread(target=work, daemon=True) for _ in range(min(self.at_once, len(questions)))]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        finally:
            waiting = iter(())
        return answers

    def _insisting(self, ask: Callable, **wanted: dict):
        """ask(settings) with all of the wanted settings, or with as many as the server takes, which is told once."""
        names, refusal = [name for name in wanted if name not in self.without], None
        for count in range(len(names) + 1):
            for left_out in itertools.combinations(names, count):
                try:
                    kept = [wanted[name] for name in names if name not in left_out]
                    answer = ask({key: value for settings in kept for key, value in settings.items()})
                except self.refusals as error:
                    refusal = refusal or error
                    continue
                with self.lock:
                    if new := set(left_out) - self.without:
                        self.without |= new
                        print(f"{self.url} does without {', '.join(sorted(new))}: {refusal}", file=sys.stderr)
                return answer
        raise refusal

    def _chat(self, messages: list[dict[str, str]], seed: int, settings: dict, **wanted: dict):
        def ask(more: dict):
            answer = self.client.chat.completions.create(
                model=self.model, messages=messages, seed=seed % 2**31, **settings, **more
            )
            if not answer.choices[0].message.content:
                raise ValueError("an empty reply")
            return answer.choices[0]

        return self._insisting(ask, thinking_off=THINKING_OFF, **wanted)

    def reply(
        self,
        messages: list[list[dict[str, str]]],
        seed: int,
        max_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> list[str | None]:
        """One reply to each conversation."""
        settings = dict(max_tokens=max_tokens, temperature=temperature, top_p=top_p)
        return self._each(lambda i, m: self._chat(m, seed_for(seed, i), settings).message.content, messages)

    def score(
        self, messages: list[list[dict[str, str]]], seed: int, max_tokens: int
    ) -> list[tuple[float | None] | None]:
        """(score,) of each reply, 0 to 9: the expected digit where the server tells the probabilities at the reply's digit,
        else the digit; (None,) for a reply without one. Greedy."""
        settings = dict(max_tokens=max_tokens, temperature=0.0)
        return self._each(
            lambda i, m: (read_score(self._chat(m, seed_for(seed, i), settings, logprobs=LOGPROBS)),), messages
        )

    def next_piece(self, prompts: list[str], seed: int) -> list[str | None]:
        """A draw of the token after each text, as text at temperature 1; "" where the model ends there."""

        def ask(i: int, prompt: str) -> str:
            settings = dict(max_tokens=1, temperature=1.0, top_p=1.0, seed=seed_for(seed, i) % 2**31)
            complete = lambda more: self.client.completions.create(model=self.model, prompt=prompt, **settings, **more)  # noqa: E731
            answer = self._insisting(complete, plain=PLAIN).choices[0]
            if not answer.text and answer.finish_reason != "stop":
                raise ValueError("a token without a text")
            return answer.text or ""

        return self._each(ask, prompts)

    def reach(self, completes: bool) -> str:
        """Nothing if it answers a question, of the kind of `next_piece` or of `reply`, else why not."""
        self.next_piece(["1 +"], 0) if completes else self.reply([_message(["1 +"])], 0, 8)
        why = next(iter(self.failures), "")
        return "" if why.startswith("ValueError") else why  # an empty reply is one


def read_score(choice) -> float | None:
    """The score in a reply: the expected digit at its first lone digit where the probabilities there are told. A reply that
    was cut may be an unfinished thought, and has none unless it is a digit alone."""
    text, end = choice.message.content, 0
    place = feedback.find_digit(text)
    if place is None or choice.finish_reason == "length" and len(text.strip()) > 1:
        return None
    for token in (choice.logprobs and choice.logprobs.content) or ():
        end += len(token.token)
        if end > place:
            if token.token.strip() != text[place]:
                break  # a token of several characters, or the tokens of another text
            # Several tokens may spell a digit, with and without a space: their probabilities add up.
            p = [0.0] * 10
            for other in {t.token: t for t in (*token.top_logprobs, token)}.values():
                if other.token.strip() in set("0123456789"):
                    p[int(other.token)] += math.exp(other.logprob)
            return feedback.expected_digit(p)
    return float(text[place])


def _message(parts: list[str]) -> list[dict[str, str]]:
    """A conversation of one message."""
    return [{"role": "user", "content": "".join(parts)}]


def reach(cfg) -> str:
    """Why a server that the settings name does not answer, in a line, or ""."""
    for who, completes in (("critic", False), ("judge", False), ("expert", True)):
        url, model = getattr(cfg, f"{who}_url"), getattr(cfg, f"{who}_model")
        if url and (why := ServedModel(url, model, cfg.server_timeout).reach(completes)):
            return f"--{who}_url {url} with --{who}_model {model} does not answer: {why}"
    return ""


class Reviews:
    """The critic, the judge and the expert of a run. cfg: settings.Config. Every process of a group calls each method; a server
    is asked by one."""

    def __init__(self, cfg, policy: Policy, sampler):
        self.cfg, self.policy, self.sampler, self.templates = cfg, policy, sampler, cfg.templates()
        served = lambda url, model: ServedModel(url, model, cfg.server_timeout) if url else None  # noqa: E731
        self.critic, self.judge = served(cfg.critic_url, cfg.critic_model), served(cfg.judge_url, cfg.judge_model)
        self.expert = served(cfg.expert_url, cfg.expert_model)
        self.digits = feedback.digit_tokens(policy.tokenizer) if cfg.method == "ovd" and not self.judge else []
        self.missing: Counter[str] = Counter()
        self.silent: Counter[str] = Counter()  # batches in a row without an answer, by who was asked

    def not_had(self) -> Counter[str]:
        """What could not be had since the last call, counted."""
        missing, self.missing = self.missing, Counter()
        return missing

    def _ask(self, server: ServedModel, who: str, question: Callable) -> list:
        """What one process learns from the server, in all of them; why it failed goes to standard error. Raises
        ServerSilent in all of them."""
        answers, failures = self.policy.world.first(lambda: (question(), dict(server.failures)))
        if failures:
            self.missing[f"{who}: the server failed"] += sum(failures.values())
            for why, count in failures.items() if self.policy.world.rank == 0 else ():
                print(f"{who}: {why} ({count} times)", file=sys.stderr)
        self.silent[who] = self.silent[who] + 1 if failures and all(answer is None for answer in answers) else 0
        if self.silent[who] == SILENT:
            raise ServerSilent(
                f"the {who} at {server.url} has not answered for {SILENT} batches: {next(iter(failures))}"
            )
        return answers

    def contexts(self, problems: list, texts: list[str], outcomes: list, step: int) -> list[feedback.Context | None]:
        """The context of each rollout, None for those without one; a row that the grader failed on has none."""
        cfg, C = self.cfg, []
        said = [o.feedback for o in outcomes]  # a text on each failure, feedback.TEXTS
        if cfg.feedback == "critique":
            said = self.critiques(problems, texts, outcomes, step)
        # Where the grader failed there is no failure to speak of, nor to lend to a success.
        said = ["" if o.verdict == "internal" else text for o, text in zip(outcomes, said)]
        for first in range(0, len(texts), cfg.group_size):
            group = slice(first, first + cfg.group_size)
            rng = random.Random(seed_for(cfg.seed, step, "contexts", first // cfg.group_size))
            rewards = [o.reward for o in outcomes[group]]
            C += feedback.contexts(cfg.feedback, rewards, texts[group], said[group], rng, cfg.borrow, cfg.passed_text)
        return [c if o.verdict != "internal" else None for c, o in zip(C, outcomes)]

    def critiques(self, problems: list, texts: list[str], outcomes: list, step: int) -> list[str]:
        """A review of each failure, with the reference answer in view (Sec. 4.2); "" on successes and where none came."""
        cfg, seed = self.cfg, seed_for(self.cfg.seed, step, "critiques")
        failed = [i for i, o in enumerate(outcomes) if o.reward == 0 and o.verdict != "internal"]
        attempts = [(problems[i].messages, texts[i], problems[i].reference, self.templates) for i in failed]
        if self.critic:
            asked = [_message(feedback.critique_parts(*attempt)) for attempt in attempts]
            ask = lambda: self.critic.reply(asked, seed, cfg.max_critique_tokens, cfg.temperature, cfg.top_p)  # noqa: E731
            replies = self._ask(self.critic, "critic", ask)
        else:
            prompts = [
                feedback.critique_prompt(self.policy.tokenizer, *attempt, cfg.max_teacher_tokens)[0]
                for attempt in attempts
            ]
            drawn = self.sampler.sample(prompts, 1, seed, cfg.max_critique_tokens, cfg.temperature, cfg.top_p)
            replies = [self.policy.decode(rollout.tokens) for rollout in drawn]
        said = {i: feedback.strip_thinking(reply or "") for i, reply in zip(failed, replies)}
        return [said.get(i, "") for i in range(len(outcomes))]

    def scores(self, problems: list, texts: list[str], step: int) -> list[float | None]:
        """The judge's S of each rollout, 0 to 9, which has not seen its outcome; None where it named no digit. OVD."""
        cfg = self.cfg
        attempts = [(problem.messages, text, self.templates) for problem, text in zip(problems, texts)]
        if self.judge:
            asked = [_message(feedback.judge_parts(*attempt)) for attempt in attempts]
            seed = seed_for(cfg.seed, step, "scores")
            ask = lambda: self.judge.score(asked, seed, cfg.max_judge_tokens)  # noqa: E731
            replies = self._ask(self.judge, "judge", ask)
            self.missing["judge: no digit, kept"] += replies.count((None,))
            return [reply and reply[0] for reply in replies]
        tokenizer, limit = self.policy.tokenizer, cfg.max_teacher_tokens
        prompts = [feedback.judge_prompt(tokenizer, *attempt, limit)[0] for attempt in attempts]
        # A judge that has something else to say than a digit, more likely than not, has named none.
        p = self.sampler.choose(prompts, self.digits).exp().tolist()
        scores = [feedback.expected_digit(row, least=0.5) for row in p]
        self.missing["judge: no digit, kept"] += scores.count(None)
        return scores

    def expert_tokens(
        self, prompts: list[Ids], responses: list[Ids], rows: list[int], step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One token that the served expert takes after (x, C, y_<t), at `expert_places` random places of each of `rows`.

        Returns ids (N, T), and weights (N, T): |y| / places answered at those, 0 elsewhere: a weighted sum over them expects
        the sum over all places, as long as no place fails. The expert reads text, in which special tokens that a context
        spells are special; it answers with one token of its own, of which ours is the first that spells its text: the same
        one if the two share a tokenizer. DistIL's black box (2606.05152).
        """
        cfg, tokenizer = self.cfg, self.policy.tokenizer
        asked, texts = [], []
        for i in rows:
            rng = random.Random(seed_for(cfg.seed, step, "places", i))
            for t in rng.sample(range(len(responses[i])), min(cfg.expert_places, len(responses[i]))):
                text = tokenizer.decode(prompts[i] + responses[i][:t])
                if text.endswith("\ufffd"):  # inside a character
                    self.missing["expert: no token"] += 1
                    continue
                asked.append((i, t))
                texts.append(text)
        seed = seed_for(cfg.seed, step, "expert")
        pieces = self._ask(self.expert, "expert", lambda: self.expert.next_piece(texts, seed))
        T, end = max(map(len, responses)), tokenizer.eos_token_id
        end = self.policy.eos_ids[0] if end is None else end
        taken, weight = torch.zeros(len(responses), T, dtype=torch.long), torch.zeros(len(responses), T)
        for (i, t), piece in zip(asked, pieces):
            if piece is None:
                continue
            ids = [end]
            if piece:
                ids = tokenizer(piece, add_special_tokens=False, split_special_tokens=True).input_ids
            if "\ufffd" in piece or not ids:  # a part of a character
                self.missing["expert: no token"] += 1
                continue
            taken[i, t], weight[i, t] = ids[0], 1.0
        lengths = torch.tensor([len(response) for response in responses])
        weight = weight * (lengths / weight.sum(1).clamp(min=1)).unsqueeze(1)
        return taken.to(self.policy.device), weight.to(self.policy.device)
