"""The teacher's context C: where it comes from, and how it looks in the teacher's prompt.

`contexts` is a pure function from one group of rollouts to one context (or None) for each, and `teacher_prompt` one from a problem
and a context to token ids. Section numbers are those of the paper, arXiv 2605.15113v1.

source    environment     the verifier's text about a failed rollout
          sibling         a successful rollout of the same group, never the row itself
          critique        a model's review of a failed rollout, written with the reference answer in view
          solution_first  a sibling if there is one, else the verifier's text; never both
          both            a sibling if there is one, and the verifier's text

A success needs a context as well, or the E-step has no positives. With sibling and solution_first it sees another success. With
environment and critique, where the paper is silent, it borrows the text of a random failure of its group: a text that only
successes see ("all tests passed") would tell the teacher the label and nothing else. With both it sees another success and, if
there is a failure, a borrowed text.

docs/tasks.md shows how to add a source; its flag, borrowing, its kind in the log and the checks of settings come with it.
"""

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from rollout import seed_for

TEXTS = ("environment", "critique")  # a text on each failure, which a success borrows
SOURCES = (*TEXTS, "sibling", "solution_first", "both")
SECTIONS = ("solution", "feedback", "critique")  # of the teacher's message, in this order


@dataclass(frozen=True)
class Templates:
    """The wording of the prompts, which flags replace. It is ours; the layout of the teacher's message is that of lasgroup/SDPO
    @0e6d510 (question, solution, feedback, closing line). Raises ValueError for a template without its placeholder."""

    solution: str = "\n\nHere is a correct solution from an earlier attempt:\n\n{solution}"
    feedback: str = "\n\nAn earlier attempt of yours failed. This is the feedback on it:\n\n{feedback}"
    critique: str = "\n\nAn earlier attempt of yours failed. A reviewer wrote about it:\n\n{critique}"
    closing: str = "\n\nNow answer the original question."
    request: str = (
        "{question}\n\nA student's attempt, which is wrong:\n\n{attempt}\n\nThe reference answer, for your eyes only:\n\n"
        "{reference}\n\nIn two or three sentences, say where the attempt went wrong and what to look at again. "
        "Do not reveal the reference answer."
    )

    def __post_init__(self):
        for section in SECTIONS:
            check_template(section, getattr(self, section), (section,))
        check_template("request", self.request, ("question", "attempt", "reference"))


def check_template(name: str, text: str, placeholders: Sequence[str]) -> None:
    """Raises ValueError unless the template has each placeholder exactly once."""
    for placeholder in placeholders:
        if text.count("{" + placeholder + "}") != 1:
            raise ValueError(f"the {name} template must contain {{{placeholder}}} exactly once")


@dataclass(frozen=True)
class Context:
    """What the teacher sees in addition to x. `kind` names the texts, so that the log can report P(success | kind); `rows` are the
    rows of the group that they come from (for a solution never the row itself)."""

    kind: str
    solution: str = ""
    feedback: str = ""
    critique: str = ""
    rows: tuple[int, ...] = ()


# ---- From a group to contexts ----------------------------------------------------------------------------


def contexts(
    source: str, rewards: Sequence[int], responses: Sequence[str], texts: Sequence[str], rng: random.Random, borrow: bool = True,
    passed: str = "",
) -> list[Context | None]:  # fmt: skip
    """One context, or None, for each rollout of one group.

    rewards: 0 or 1 for each row; responses: decoded; texts: the verifier's text about each failed row, or its critique if the
    source is "critique" ("": there is none). rng chooses among siblings, and among failures to borrow from. passed: a text that
    successes see instead of a borrowed one; it gives the label away, which is what an ablation wants to show.
    """
    if passed:
        texts = [passed if r else text for r, text in zip(rewards, texts)]
    solutions = [strip_thinking(text) for text in responses]
    success = [i for i, r in enumerate(rewards) if r == 1 and solutions[i]]  # a mere thought is no solution
    failure = [i for i, r in enumerate(rewards) if r == 0 and texts[i]]
    kind = source if source in TEXTS else "environment"  # what `texts` are
    section = "critique" if source == "critique" else "feedback"
    found: list[Context | None] = []
    for i, r in enumerate(rewards):
        shown, rows = {}, {}  # section of the prompt: the text in row i's context; kind of text: the row that it comes from
        others = [] if source in TEXTS else [j for j in success if j != i]  # App. D.2: never the row itself
        if others:
            rows["sibling"] = rng.choice(others)
            shown["solution"] = solutions[rows["sibling"]]
        # With both, a success sees both texts as failures do; the only success of a group sees nothing.
        with_text = source in TEXTS or {"sibling": False, "solution_first": r == 0 and not others, "both": r == 0 or others}[source]
        own = r == 0 or passed
        if with_text and (texts[i] if own else borrow and failure):
            rows[kind] = i if own else rng.choice(failure)
            shown[section] = texts[rows[kind]]
        found.append(Context("+".join(rows), **shown, rows=tuple(rows.values())) if rows else None)
    return found


THOUGHT = r"\A(?:(?!<think>).)*?</think>|<think>.*?(?:</think>|\Z)"  # before the |: a thought that the prompt opened


def strip_thinking(text: str) -> str:
    """The text without <think>…</think>. A thought that never closes extends to the end of the text; one that the prompt opened
    begins with the text."""
    return re.sub(THOUGHT, "", text, flags=re.DOTALL).strip()


# ---- From messages to token ids --------------------------------------------------------------------------


def render(tokenizer, messages: list[dict[str, str]]) -> str:
    """The messages as the text that the model continues, with the generation header and with thinking mode off. Without a chat
    template (a base model) they are joined by blank lines."""
    if tokenizer.chat_template is None:
        return "\n\n".join(m["content"] for m in messages) + "\n\n"
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)


def begun(tokenizer, ids: list[int]) -> list[int]:
    """The ids after the BOS token, if the tokenizer puts one before a text (Llama's does; Qwen3's and OLMo3's do not)."""
    bos = [tokenizer.bos_token_id]
    adds = bos != [None] and tokenizer("a").input_ids[:1] == bos
    return bos + ids if adds and ids[:1] != bos else ids  # the template may have written it


def student_prompt(tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of x: the task's messages and the generation header."""
    return begun(tokenizer, tokenizer(render(tokenizer, messages), add_special_tokens=False).input_ids)


def encode(tokenizer, messages: list[dict[str, str]], parts: list[str], max_tokens: int) -> tuple[list[int], int]:
    """Token ids of `messages` with the last one's content replaced by the joined `parts`, and the number of tokens cut.

    parts: texts written by models and programs at odd places, the prompt's own words at even ones. A special token spelled inside a
    text must stay text, so each text is encoded by itself, without special tokens, and put between the pieces of the rendered
    prompt. To stay within max_tokens, texts are cut at their ends, the longest first, and nothing else is. Raises ValueError if
    the prompt is too long even without any text.
    """
    # While the chat template is rendered, a private-use character that occurs nowhere marks the places of the texts.
    everything = "".join([*parts, *(m["content"] for m in messages)])
    mark = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in everything)
    marked = "".join(f"{mark}{i}{mark}" if i % 2 else part for i, part in enumerate(parts))
    rendered = render(tokenizer, [*messages[:-1], {**messages[-1], "content": marked}])
    pieces = []
    for i, piece in enumerate(re.split(f"{mark}(\\d+){mark}", rendered)):
        text, plain = (parts[int(piece)], {"split_special_tokens": True}) if i % 2 else (piece, {})
        pieces.append(tokenizer(text, add_special_tokens=False, **plain).input_ids)
    pieces[0] = begun(tokenizer, pieces[0])
    excess = over = max(0, sum(map(len, pieces)) - max_tokens)
    for i in sorted(range(1, len(pieces), 2), key=lambda i: -len(pieces[i])):
        cut = min(over, len(pieces[i]))
        pieces[i], over = pieces[i][: len(pieces[i]) - cut], over - cut
    if over:
        raise ValueError(f"without its texts the prompt is still {over} tokens longer than --max_teacher_tokens {max_tokens}")
    return [token for piece in pieces for token in piece], excess


def teacher_prompt(
    tokenizer, messages: list[dict[str, str]], context: Context, templates: Templates, max_tokens: int
) -> tuple[list[int], int]:
    """Token ids of the teacher's prompt (x, C), and the number of tokens of C that were cut to stay within max_tokens.

    System messages stay as they are; one user message follows: question, solution section, feedback or critique section, closing
    line. The student's attempt is not quoted: it is the continuation that is scored.
    """
    parts = [messages[-1]["content"]]
    for section in SECTIONS:
        if text := getattr(context, section):
            before, after = getattr(templates, section).split("{" + section + "}")
            parts[-1] += before
            parts += [text, after]
    parts[-1] += templates.closing
    return encode(tokenizer, messages, parts, max_tokens)


def check_prompts(tokenizer, problems: list, cfg) -> list[int]:
    """The length of each problem's student prompt, in tokens. Raises ValueError with one line if the chat template or the tokenizer
    cannot build the prompts, and if a teacher's or critic's prompt is too long even without its texts."""
    lengths, templates = [], cfg.templates()
    # In these groups every source gives a context of each of its kinds, here with texts of one letter.
    groups = ((1, 1, 0), (0,)) if cfg.reader() else ()
    shortest = [c for rewards in groups for c in contexts(cfg.feedback, rewards, "---", "---", random.Random(0)) if c]
    room = cfg.max_teacher_tokens - sum(len(words.encode()) for words in astuple(templates))  # a token is at least a byte
    for problem in problems:
        if problem.messages[-1]["role"] != "user":
            raise ValueError(f"problem {problem.id}: its last message is not the user's")
        try:
            lengths.append(len(student_prompt(tokenizer, problem.messages)))
        except Exception as error:  # whatever the template raises
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"the chat template of {cfg.model} cannot render problem {problem.id} ({why})") from None
        for context in shortest if room < lengths[-1] <= cfg.max_prompt_tokens else ():
            try:
                teacher_prompt(tokenizer, problem.messages, context, templates, cfg.max_teacher_tokens)
            except ValueError as error:
                raise ValueError(f"problem {problem.id}: {error}") from None
    if shortest and cfg.feedback == "critique" and not cfg.critic_url:
        check_request(tokenizer, "critique", templates.request, cfg.max_teacher_tokens)
    if shortest and problems:
        messages, texts = problems[0].messages, {"solution": "1 + 1", "feedback": "two", "critique": "2 is"}
        sections = [getattr(templates, section).replace("{" + section + "}", text) for section, text in texts.items()]
        whole = "".join([messages[-1]["content"], *sections, templates.closing])
        joined = student_prompt(tokenizer, [*messages[:-1], {**messages[-1], "content": whole}])
        ids, _ = teacher_prompt(tokenizer, messages, Context("", **texts), templates, 10**9)
        if tokenizer.decode(ids) != tokenizer.decode(joined):
            raise ValueError(f"the tokenizer of {cfg.model} adds blanks where the texts of a prompt are joined")
    return lengths


def check_request(tokenizer, name: str, request: str, max_tokens: int) -> None:
    """Raises ValueError for a critic's or judge's request that is too long even without its texts."""
    try:
        messages = [{"role": "user", "content": ""}]
        encode(tokenizer, messages, request_parts(request, messages, "", reference=""), max_tokens)
    except ValueError as error:
        raise ValueError(f"--{name}_request: {error}") from None


def request_parts(request: str, messages: list[dict[str, str]], attempt: str, **texts: str) -> list[str]:
    """The message to a critic (Sec. 4.1) or a judge, with texts at the odd places: {question}, {attempt} without its thoughts, and
    those of `texts`. Joined, it is the question to a served model."""
    texts |= {"question": messages[-1]["content"], "attempt": strip_thinking(attempt)}
    parts = re.split(r"\{(" + "|".join(texts) + r")\}", request)
    parts[1::2] = [texts[name] for name in parts[1::2]]
    return parts


# ---- A batch -----------------------------------------------------------------------------------------------------


class Critic:
    """Writes critiques (Sec. 4.1): the student through its sampler, or a model on a server. cfg: vpd.Config. `missing` counts
    questions that a server did not answer. All processes call `write`; one of them asks the server."""

    def __init__(self, cfg, policy, sampler=None):
        self.cfg, self.policy, self.sampler, self.server, self.missing = cfg, policy, sampler, None, Counter()
        if cfg.critic_url:
            from neighbours.served import Served  # it imports this file

            self.server = Served("critic", cfg.critic_url, cfg.critic_model, cfg.server_timeout, policy.world, self.missing)

    def write(self, problems: list, responses: list[str], outcomes: list, step: int) -> list[str]:
        """A review of each failure, written with the reference answer in view; "" for successes and missing answers."""
        cfg, request = self.cfg, self.cfg.templates().request
        failed = [i for i, o in enumerate(outcomes) if o.reward == 0 and o.verdict != "internal"]
        asked = [request_parts(request, problems[i].messages, responses[i], reference=problems[i].reference) for i in failed]
        settings = seed_for(cfg.seed, step, "critiques"), cfg.max_critique_tokens, cfg.temperature, cfg.top_p
        if self.server:
            replies = self.server.reply(["".join(parts) for parts in asked], *settings)
        else:
            tokenizer, limit = self.policy.tokenizer, cfg.max_teacher_tokens
            prompts = [encode(tokenizer, problems[i].messages[-1:], parts, limit)[0] for i, parts in zip(failed, asked)]
            replies = [self.policy.decode(rollout.tokens) for rollout in self.sampler.sample(prompts, 1, *settings)]
        texts = {i: strip_thinking(reply or "") for i, reply in zip(failed, replies)}
        return [texts.get(i, "") for i in range(len(outcomes))]


def batch_contexts(cfg, problems: list, responses: list[str], outcomes: list, step: int, critic: Critic) -> list[Context | None]:
    """The context of each rollout of a batch, or None. A row that the grader failed on has none."""
    C, texts = [], [o.feedback for o in outcomes]  # a text on each failure (TEXTS)
    if cfg.feedback == "critique":
        texts = critic.write(problems, responses, outcomes, step)
    # A row that the grader failed on is no failure: its text must not be lent to a success.
    texts = ["" if o.verdict == "internal" else text for o, text in zip(outcomes, texts)]
    for first in range(0, len(responses), cfg.group_size):
        group = slice(first, first + cfg.group_size)
        rng = random.Random(seed_for(cfg.seed, step, "contexts", first // cfg.group_size))
        rewards = [o.reward for o in outcomes[group]]
        C += contexts(cfg.feedback, rewards, responses[group], texts[group], rng, cfg.borrow, cfg.passed_text)
    return [c if o.verdict != "internal" else None for c, o in zip(C, outcomes)]
