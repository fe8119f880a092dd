"""Models on a server that speaks OpenAI's protocol: a critic (feedback.py) or a judge (ovd.py).

A missing answer is counted, never invented. If a server answers nothing for SILENT batches in a row, the run ends.
"""

import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from urllib.parse import urlsplit

from feedback import THOUGHT
from harness.command import Stopped
from rollout import seed_for

SILENT = 3  # batches in a row without a single answer
AT_ONCE = 16  # questions; if none of the first so many has an answer, the others are not asked
# Settings beyond OpenAI's protocol, for servers that know them: no thought before an answer.
THINKING_OFF = {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}
LOGPROBS = {"logprobs": True, "top_logprobs": 20}
# What a server may refuse is left out, as little of it as possible: (what is left out, the settings that remain).
WAYS = {
    "critic": [("nothing", THINKING_OFF), ("thinking_off", {})],
    "judge": [("nothing", THINKING_OFF | LOGPROBS), ("thinking_off", LOGPROBS), ("logprobs", THINKING_OFF),
              ("logprobs, thinking_off", {})],
}  # fmt: skip
REFUSALS = ("BadRequestError", "UnprocessableEntityError", "PermissionDeniedError")  # of the package openai


def check(who: str, url: str, model: str) -> None:
    """Raises ValueError with one line if the URL is not a server's address, or holds a secret."""
    if bool(url) != bool(model):
        raise ValueError(f"--{who}_url and --{who}_model go together: the server's base URL and the model it serves")
    parts = urlsplit(url)
    if url and parts.scheme not in ("http", "https"):
        raise ValueError(f"--{who}_url must begin with http:// or https://, not {url!r}")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(f"--{who}_url holds a secret, which would be saved with the run: put the key into OPENAI_API_KEY")


class Served:
    """A model on any OpenAI-compatible server. who: critic or judge.

    One process asks, and all processes get the answers in the order of the questions. An answer that three attempts do not bring
    is None, counted in `missing` and reported on standard error. The key comes from the environment variable OPENAI_API_KEY only.
    Raises ValueError if the server does not answer a first question, which also finds out what it refuses, and Stopped, in every
    process, when it has not answered for SILENT batches."""

    def __init__(self, who: str, url: str, model: str, timeout: float, world, missing: Counter):
        try:
            import openai  # half a second and a package that only its users need
        except ImportError:
            raise ValueError("a served model needs the package openai: pip install openai==3.52.0") from None

        key = os.environ.get("OPENAI_API_KEY") or "none"  # local servers want none
        self.client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=2)
        self.who, self.url, self.model, self.world, self.missing, self.silent = who, url, model, world, missing, 0
        ask, refusal, self.ways = partial(self._chat, max_tokens=8), "", WAYS[who]
        while (why := world.first(lambda: self._at_once(ask, ["1 +"], 0))[0][1]).startswith(REFUSALS) and self.ways[1:]:
            refusal, self.ways = why, self.ways[1:]
        if why and not why.startswith("ValueError"):  # an empty reply is an answer
            raise ValueError(f"--{who}_url {url} with --{who}_model {model} does not answer: {why}")
        if refusal and world.rank == 0:
            print(f"{url} refuses {self.ways[0][0]}, which is left out: {refusal}", file=sys.stderr)

    def reply(self, questions: list[str], seed: int, max_tokens: int, temperature: float, top_p: float) -> list[str | None]:
        """One reply to each question."""
        how = dict(max_tokens=max_tokens, temperature=temperature, top_p=top_p)
        return self._each(lambda *asked: self._chat(*asked, **how).message.content, questions, seed)

    def score(self, questions: list[str], seed: int, max_tokens: int) -> list[float | None]:
        """The score in each reply (`read_score`). None also for a reply without a score, which is counted. Greedy."""
        how = dict(max_tokens=max_tokens, temperature=0.0)
        scores = self._each(lambda *asked: (read_score(self._chat(*asked, **how)),), questions, seed)
        self.missing["judge: no digit, kept"] += scores.count((None,))
        return [score and score[0] for score in scores]

    def _chat(self, question: str, seed: int, **how):
        how |= {"model": self.model, "messages": [{"role": "user", "content": question}], "seed": seed} | self.ways[0][1]
        answer = self.client.chat.completions.create(**how)
        if not answer.choices[0].message.content:
            raise ValueError("an empty reply")
        return answer.choices[0]

    def _each(self, ask: Callable, questions: list, seed: int) -> list:
        """ask(question, its own seed) for each question, asked by one process; the answers, in all of them."""
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
        """(answer, "") for each question, or (None, the reason why there is none)."""

        def attempt(i: int):
            try:
                return ask(questions[i], seed_for(seed, i) % 2**31), ""  # servers take 31 bits
            except Exception as error:  # the library's errors, and answers that break the protocol
                return None, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"

        pool, rest = ThreadPoolExecutor(AT_ONCE), range(len(questions))[AT_ONCE:]
        try:
            found = list(pool.map(attempt, range(len(questions))[:AT_ONCE]))
            if all(why for _, why in found):
                return found + [(None, "not asked, since no earlier question had an answer")] * len(rest)
            return found + list(pool.map(attempt, rest))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def read_score(choice) -> float | None:
    """The score in a reply, 0 to 9: its first digit that stands alone, or the expected digit at that place if the server gives the
    probabilities. A reply that was cut may be an unfinished thought, so it has a score only if it is nothing but a digit."""
    text, end = choice.message.content, 0
    place = find_digit(text)
    if place is None or choice.finish_reason == "length" and len(text.strip()) > 1:
        return None
    for token in (choice.logprobs and choice.logprobs.content) or ():
        end += len(token.token)
        if end > place:
            if token.token.strip() != text[place]:
                break  # a token of several characters, or the tokens belong to another text
            # A digit may be several tokens, with and without a space: their probabilities add up.
            p = [0.0] * 10
            for other in {t.token: t for t in (*token.top_logprobs, token)}.values():
                if other.token.strip() in set("0123456789"):
                    p[int(other.token)] += math.exp(other.logprob)
            return expected_digit(p)
    return float(text[place])


# ---- A judge's digit -------------------------------------------------------------------------------------------


def expected_digit(p: Sequence[float], least: float = 0.0) -> float | None:
    """S = E[digit] from the probabilities of 0 to 9, rescaled to sum to 1. None if they sum to `least` or less: this judge would
    rather say something else."""
    return sum(digit * share for digit, share in enumerate(p)) / sum(p) if sum(p) > least else None


def find_digit(reply: str) -> int | None:
    """The place of the first digit that stands alone, or None: not in <think>…</think>, not part of 10 or 7.5 (but it may be of
    7.0), nor of "0-9" or "0 (wrong) to 9 (right)", which repeat the scale."""
    scale = r"\b0\s*(?:\([^)]*\))?\s*(?:-|–|to)\s*9\b(?:\s*\([^)]*\))?"
    rest = re.sub(f"{THOUGHT}|{scale}", lambda found: " " * len(found[0]), reply, flags=re.DOTALL)
    found = re.search(r"(?<![0-9.])[0-9](?:\.0+)?(?!\.?[0-9])", rest)
    return found.start() if found else None
