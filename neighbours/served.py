"""Models behind a server that speaks OpenAI's protocol: a critic (feedback.py), a judge (ovd.py).

A missing answer is counted, never invented; if a server answers nothing for SILENT batches in a row, the run ends.
"""

import math
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from urllib.parse import urlsplit

from feedback import THOUGHT
from harness.command import Stopped
from rollout import seed_for

SILENT = 3  # batches in a row without a single answer
AT_ONCE = 16  # questions; where none of the first so many has an answer the others are not asked
# Beyond OpenAI's protocol, for servers that know it: no thought before an answer.
THINKING_OFF = {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}
LOGPROBS = {"logprobs": True, "top_logprobs": 20}
# How to ask: what is left out, since a server may refuse it, and the settings that remain.
WAYS = {
    "critic": [("nothing", THINKING_OFF), ("thinking_off", {})],
    "judge": [("nothing", THINKING_OFF | LOGPROBS), ("thinking_off", LOGPROBS), ("logprobs", THINKING_OFF),
              ("logprobs, thinking_off", {})],
}  # fmt: skip


def check(who: str, url: str, model: str) -> None:
    """Raises ValueError with one line for a server's address that cannot be one, or holds a secret."""
    if bool(url) != bool(model):
        raise ValueError(f"--{who}_url and --{who}_model go together: the server's base URL and the model it serves")
    parts = urlsplit(url)
    if url and parts.scheme not in ("http", "https"):
        raise ValueError(f"--{who}_url must begin with http:// or https://, not {url!r}")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(f"--{who}_url holds a secret, which would be saved with the run: put the key into OPENAI_API_KEY")


class Served:
    """A model behind any OpenAI-compatible server, as a run of several processes asks it. who: critic or judge.

    `reply` and `score` ask one thing of many. One process asks; all get the answers in order, None where three attempts failed,
    which is counted in `missing` and told on standard error. What the server refuses to be asked is left out. The key comes from
    the environment variable OPENAI_API_KEY only. Raises ValueError at once if the server does not answer a first question,
    Stopped in every process when it has not answered for SILENT batches."""

    def __init__(self, who: str, url: str, model: str, timeout: float, world, missing: Counter):
        try:
            import openai  # half a second and a package that only its users need
        except ImportError:
            raise ValueError("a served model needs the package openai: pip install openai==3.52.0") from None

        key = os.environ.get("OPENAI_API_KEY") or "none"  # local servers want none
        self.client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=2)
        self.refusals = openai.BadRequestError, openai.UnprocessableEntityError, openai.PermissionDeniedError
        self.who, self.url, self.model, self.world, self.missing = who, url, model, world, missing
        self.ways, self.silent, self.lock = WAYS[who], 0, threading.Lock()
        ask, question = partial(self._chat, max_tokens=8), "1 +"
        ((_, why),) = world.first(lambda: self._at_once(ask, [question], 0))
        if why and not why.startswith("ValueError"):  # an empty reply is an answer
            raise ValueError(f"--{who}_url {url} with --{who}_model {model} does not answer: {why}")

    def reply(self, questions: list[str], seed: int, max_tokens: int, temperature: float, top_p: float) -> list[str | None]:
        """One reply to each question."""
        how = dict(max_tokens=max_tokens, temperature=temperature, top_p=top_p)
        return self._each(lambda *asked: self._chat(*asked, **how).message.content, questions, seed)

    def score(self, questions: list[str], seed: int, max_tokens: int) -> list[float | None]:
        """The score in each reply, 0 to 9: the expected digit where the server tells the probabilities at the reply's digit, else
        the digit; None for a reply without one as well, which is counted. Greedy."""
        how = dict(max_tokens=max_tokens, temperature=0.0)
        scores = self._each(lambda *asked: (read_score(self._chat(*asked, **how)),), questions, seed)
        self.missing["judge: no digit, kept"] += scores.count((None,))
        return [score and score[0] for score in scores]

    def _chat(self, question: str, seed: int, **how):
        """A reply, asked for in the first of the ways that the server takes; from then on the ways before it are not tried."""
        ways, messages = self.ways, [{"role": "user", "content": question}]
        for k, (left_out, settings) in enumerate(ways):
            try:
                answer = self.client.chat.completions.create(model=self.model, messages=messages, seed=seed, **how, **settings)
                break
            except self.refusals as error:
                refusal = error
        else:
            raise refusal
        with self.lock:
            if k and self.ways is ways:  # no other question has found out
                self.ways = ways[k:]
                print(f"{self.url} does without {left_out}: {refusal}", file=sys.stderr)
        if not answer.choices[0].message.content:
            raise ValueError("an empty reply")
        return answer.choices[0]

    def _each(self, ask: Callable, questions: list, seed: int) -> list:
        """ask(question, seed of its own) of each, by one process; the answers in all of them."""
        found = self.world.first(lambda: self._at_once(ask, questions, seed))
        failures = Counter(why for _, why in found if why)
        if failures:
            self.missing[f"{self.who}: the server failed"] += failures.total()
            for why, count in failures.items() if self.world.rank == 0 else ():
                print(f"{self.who}: {why} ({count} times)", file=sys.stderr)
        self.silent = self.silent + 1 if 0 < failures.total() == len(found) else 0
        if self.silent == SILENT:
            raise Stopped(f"the {self.who} at {self.url} has not answered for {SILENT} batches: {next(iter(failures))}")
        return [answer for answer, _ in found]

    def _at_once(self, ask: Callable, questions: list, seed: int) -> list[tuple]:
        """(answer, "") of each, or (None, why it has none)."""

        def attempt(i: int):
            try:
                return ask(questions[i], seed_for(seed, i) % 2**31), ""  # servers take no more
            except Exception as error:  # the library's errors, and answers that are not of the protocol
                return None, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"

        pool, rest = ThreadPoolExecutor(AT_ONCE), range(len(questions))[AT_ONCE:]
        try:
            found = list(pool.map(attempt, range(len(questions))[:AT_ONCE]))
            if all(why for _, why in found):
                return found + [(None, "not asked: none of those before had an answer")] * len(rest)
            return found + list(pool.map(attempt, rest))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


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
