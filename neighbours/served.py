"""Models behind a server that speaks OpenAI's protocol: a critic (feedback.py), a judge (ovd.py), an expert (distil.py).

What cannot be had is missing, never invented, and counted; a server that says nothing for SILENT batches ends the run.
"""

import itertools
import math
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from feedback import THOUGHT
from harness.command import Stopped
from rollout import seed_for

SILENT = 3  # batches in a row without a single answer
FIRST = 16  # questions, after which the others are not asked where none had an answer
# Beyond OpenAI's protocol, for servers that know them: no thought before an answer, and no truncation of the distribution,
# which some take from the model's own generation settings.
THINKING_OFF = {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}
PLAIN = {"extra_body": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "add_special_tokens": False}}
LOGPROBS = {"logprobs": True, "top_logprobs": 20}


class ServerSilent(Stopped):
    """A server does not answer any more."""


class ServedModel:
    """A model behind any OpenAI-compatible server. The key comes from the environment variable OPENAI_API_KEY only. Every
    method asks one thing of many and answers in order, None where three attempts failed; `failures` then says why. Where
    the first questions have all failed the others are not asked. What a server refuses to be asked is left out."""

    def __init__(self, url: str, model: str, timeout: float = 60.0, at_once: int = 16):
        try:
            import openai  # half a second and a package that only its users need
        except ImportError:
            raise ValueError("a served model needs the package openai: pip install openai==3.52.0") from None

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

        pool = ThreadPoolExecutor(self.at_once)
        try:
            return list(pool.map(guarded, range(len(questions))))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

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
        self.next_piece(["1 +"], 0) if completes else self.reply([[{"role": "user", "content": "1 +"}]], 0, 8)
        why = next(iter(self.failures), "")
        return "" if why.startswith("ValueError") else why  # an empty reply is one


def read_score(choice) -> float | None:
    """The score in a reply: the expected digit at its first lone digit where the probabilities there are told. A reply that
    was cut may be an unfinished thought, and has none unless it is a digit alone."""
    text, end = choice.message.content, 0
    place = find_digit(text)
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
            return expected_digit(p)
    return float(text[place])


# ---- A judge's digit -------------------------------------------------------------------------------------------


def expected_digit(p: Sequence[float], least: float = 0.0) -> float | None:
    """S = E[digit], from the probabilities of 0 to 9 as the reply's digit, rescaled to sum to 1; None where they sum to
    `least` or less: this judge would rather have said something else."""
    return sum(digit * share for digit, share in enumerate(p)) / sum(p) if sum(p) > least else None


def find_digit(reply: str) -> int | None:
    """The place of the first digit that stands alone, outside of <think>…</think>: not in 10, in 7.5 (but in 7.0), nor in
    0-9 or 0 (wrong) to 9 (right), which repeat the scale. None where there is none."""
    scale = r"\b0\s*(?:\([^)]*\))?\s*(?:-|–|to)\s*9\b(?:\s*\([^)]*\))?"
    rest = re.sub(f"{THOUGHT}|{scale}", lambda found: " " * len(found[0]), reply, flags=re.DOTALL)
    found = re.search(r"(?<![0-9.])[0-9](?:\.0+)?(?!\.?[0-9])", rest)
    return found.start() if found else None


# ---- Asked by a run --------------------------------------------------------------------------------------------


class Asked:
    """A server as a run of several processes asks it: one process does, all get the answers, failures are counted in `missing` and
    told on standard error. who: critic, judge or expert. Raises ValueError at once if it does not answer a first question."""

    def __init__(self, who: str, url: str, model: str, timeout: float, world, missing: Counter):
        self.who, self.world, self.missing, self.silent = who, world, missing, 0
        self.server = ServedModel(url, model, timeout)
        if why := world.first(lambda: self.server.reach(completes=who == "expert")):
            raise ValueError(f"--{who}_url {url} with --{who}_model {model} does not answer: {why}")

    def ask(self, question: Callable[[ServedModel], list]) -> list:
        """question(server) in one process; its answers in all of them. Raises ServerSilent in all of them."""
        answers, failures = self.world.first(lambda: (question(self.server), dict(self.server.failures)))
        if failures:
            self.missing[f"{self.who}: the server failed"] += sum(failures.values())
            for why, count in failures.items() if self.world.rank == 0 else ():
                print(f"{self.who}: {why} ({count} times)", file=sys.stderr)
        self.silent = self.silent + 1 if failures and all(answer is None for answer in answers) else 0
        if self.silent == SILENT:
            raise ServerSilent(
                f"the {self.who} at {self.server.url} has not answered for {SILENT} batches: {next(iter(failures))}"
            )
        return answers
