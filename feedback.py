"""The teacher's context C: where it comes from, and how it stands in the teacher's prompt.

`contexts` is a pure function from one group of rollouts to one context (or none) per rollout; `teacher_prompt` is a pure
function from a problem and a context to token ids. Section numbers refer to the paper, arXiv 2605.15113v1. The other thing
that a model can say of a rollout is a judge's score, one digit (OVD, 2601.21968): its request and its reading stand last.

sources   environment     the verifier's text on a failed rollout
          sibling         another, successful rollout of the same group
          critique        the model's own review of a failed rollout, written with the reference answer in view
          solution_first  a sibling where there is one, else the environment's text; never both
          both            a sibling where there is one, and the environment's text

A success needs a context as well, or the E-step has no positives. With sibling and solution_first it is another success.
With environment and critique the paper is silent; here a success borrows the text of a random failure of its own group,
because any text that only successes see ("all tests passed") tells the teacher the label and nothing else.

A new source, say "hint", that has a text of its own on each failure: its name in TEXTS here, and the line that makes the texts
where `reviews.Reviews.contexts` has them made (it sees problems, responses and outcomes). The flag, borrowing, the kind in the log
and what cannot go together follow; a task that cannot have it says so in its `lacks`. One that combines what is there: its name
in SOURCES and its branch in `contexts`.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

TEXTS = ("environment", "critique")  # a text on each failure, which a success borrows
SOURCES = (*TEXTS, "sibling", "solution_first", "both")

# The layout of the teacher's user message follows lasgroup/SDPO @0e6d510 (question, solution, feedback, closing line);
# the words are ours. All of them can be replaced from the command line.
SOLUTION_TEMPLATE = "\n\nHere is a correct solution from an earlier attempt:\n\n{solution}"
FEEDBACK_TEMPLATE = "\n\nAn earlier attempt of yours failed. This is the feedback on it:\n\n{feedback}"
CRITIQUE_TEMPLATE = "\n\nAn earlier attempt of yours failed. A reviewer wrote about it:\n\n{critique}"
CLOSING = "\n\nNow answer the original question."
CRITIQUE_REQUEST = (
    "{question}\n\nA student's attempt, which is wrong:\n\n{attempt}\n\nThe reference answer, for your eyes only:\n\n"
    "{reference}\n\nIn two or three sentences, say where the attempt went wrong and what to look at again. "
    "Do not reveal the reference answer."
)
JUDGE_REQUEST = (
    "{question}\n\nA proposed answer:\n\n{attempt}\n\nHow good is this answer? Reply with a single digit and nothing else, "
    "from 0 (certainly wrong) to 9 (certainly right)."
)


@dataclass(frozen=True)
class Templates:
    solution: str = SOLUTION_TEMPLATE
    feedback: str = FEEDBACK_TEMPLATE
    critique: str = CRITIQUE_TEMPLATE
    closing: str = CLOSING
    request: str = CRITIQUE_REQUEST
    judge: str = JUDGE_REQUEST

    def __post_init__(self):
        holes = {"solution": ("solution",), "feedback": ("feedback",), "critique": ("critique",)}
        holes |= {"request": ("question", "attempt", "reference"), "judge": ("question", "attempt")}
        for name, hole in ((name, hole) for name in holes for hole in holes[name]):
            if getattr(self, name).count("{" + hole + "}") != 1:
                raise ValueError(f"the {name} template must contain {{{hole}}} exactly once")


@dataclass(frozen=True)
class Context:
    """What the teacher sees beside the prompt. `kind` names the sections present, so that the log can tell
    P(success | kind); `rows` are the group's rows the texts came from (never the row itself for a solution)."""

    kind: str
    solution: str = ""
    feedback: str = ""
    critique: str = ""
    rows: tuple[int, ...] = ()


# ---- From a group to contexts ----------------------------------------------------------------------------


def contexts(
    source: str,
    rewards: Sequence[int],
    responses: Sequence[str],
    texts: Sequence[str],
    rng: random.Random,
    borrow: bool = True,
    passed: str = "",
) -> list[Context | None]:
    """One context, or None, for each rollout of one group.

    rewards: r of each row, 0 or 1; responses: decoded responses; texts: for a failed row the verifier's text, or its
    critique when source is "critique" ("" where there is none). rng decides between siblings and between failures to
    borrow from. passed: what a success sees instead of a borrowed text; it gives the label away, which is what an ablation
    wants to show. Raises ValueError for an unknown source.
    """
    if source not in SOURCES:
        raise ValueError(f"unknown feedback source {source!r}: choose one of {', '.join(SOURCES)}")
    if passed:
        texts = [passed if r else text for r, text in zip(rewards, texts)]
    solutions = [strip_thinking(text) for text in responses]
    success = [i for i, r in enumerate(rewards) if r == 1 and solutions[i]]  # nothing but a thought is no solution
    failure = [i for i, r in enumerate(rewards) if r == 0 and texts[i]]

    def sibling(i: int) -> int | None:
        others = [j for j in success if j != i]  # "a successful trajectory ... excluding itself"
        return rng.choice(others) if others else None

    def text(i: int) -> int | None:
        """The row whose text row i sees: its own after a failure, a random failure's for a success that borrows."""
        if rewards[i] == 0 or passed:
            return i if texts[i] else None
        return rng.choice(failure) if borrow and failure else None

    out: list[Context | None] = []
    for i in range(len(rewards)):
        failed, solution, row = rewards[i] == 0, None, None  # the rows that the context's solution and text are of
        if source in TEXTS:
            row = text(i)
        elif source == "sibling":
            solution = sibling(i)
        elif source == "solution_first":
            solution = sibling(i)
            row = text(i) if solution is None and failed else None
        elif source == "both":
            # A success sees the same kind of context as its failing siblings, so a lone one sees nothing.
            solution = sibling(i)
            row = text(i) if solution is not None or failed else None
        if solution is None and row is None:
            out.append(None)
            continue
        said = "" if row is None else texts[row]
        kinds = ("sibling", solution), (source if source in TEXTS else "environment", row)
        out.append(
            Context(
                kind="+".join(name for name, j in kinds if j is not None),
                solution="" if solution is None else solutions[solution],
                feedback="" if source == "critique" else said,
                critique=said if source == "critique" else "",
                rows=tuple(j for j in (solution, row) if j is not None),
            )
        )
    return out


THOUGHT = r"\A(?:(?!<think>).)*?</think>|<think>.*?(?:</think>|\Z)"  # the first: opened by the prompt


def strip_thinking(text: str) -> str:
    """The text without <think>…</think>. A block that never closes is dropped to its end, and one that the prompt
    opened from the text's beginning."""
    return re.sub(THOUGHT, "", text, flags=re.DOTALL).strip()


# ---- From messages to token ids --------------------------------------------------------------------------


def render(tokenizer, messages: list[dict[str, str]]) -> str:
    """Messages as the text that the model continues, with the generation header. Thinking mode is off everywhere. A
    tokenizer without a chat template (a base model) gets system and user text joined by blank lines."""
    if tokenizer.chat_template is None:
        return "\n\n".join(m["content"] for m in messages) + "\n\n"
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)


def student_prompt(tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of x: the task's messages and the generation header."""
    return tokenizer(render(tokenizer, messages), add_special_tokens=False).input_ids


def encode(tokenizer, messages: list[dict[str, str]], parts: list[str], max_tokens: int) -> tuple[list[int], int]:
    """Token ids of `messages` with the last one's content replaced by the joined `parts`, and the number of tokens cut.

    parts: odd places hold texts written by models and programs, even places the prompt's own words. A special token
    spelled inside a text must stay text, so each is encoded by itself without special tokens and set between the pieces
    of the rendered prompt. Only texts are ever cut to stay within max_tokens, the longest first, at their ends. Raises
    ValueError if the prompt is too long even without any text.
    """
    # A private-use character that occurs nowhere marks where the texts go while the chat template is rendered.
    said = "".join([*parts, *(m["content"] for m in messages)])
    mark = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in said)
    marked = "".join(f"{mark}{i}{mark}" if i % 2 else part for i, part in enumerate(parts))
    rendered = render(tokenizer, [*messages[:-1], {**messages[-1], "content": marked}])
    pieces = [
        tokenizer(parts[int(piece)], add_special_tokens=False, split_special_tokens=True).input_ids
        if i % 2
        else tokenizer(piece, add_special_tokens=False).input_ids
        for i, piece in enumerate(re.split(f"{mark}(\\d+){mark}", rendered))
    ]
    excess = over = max(0, sum(map(len, pieces)) - max_tokens)
    for i in sorted(range(1, len(pieces), 2), key=lambda i: -len(pieces[i])):
        cut = min(over, len(pieces[i]))
        pieces[i], over = pieces[i][: len(pieces[i]) - cut], over - cut
    if over:
        raise ValueError(f"a prompt is {over} tokens longer than the limit of {max_tokens} even without its context")
    return [token for piece in pieces for token in piece], excess


def teacher_prompt(
    tokenizer, messages: list[dict[str, str]], context: Context, templates: Templates, max_tokens: int
) -> tuple[list[int], int]:
    """Token ids of the teacher's prompt (x, C), and how many tokens of C were cut to stay within max_tokens.

    System messages unchanged, then one user message: question, solution section, feedback or critique section, closing
    line. The student's attempt is not quoted: it is the continuation that is scored.
    """
    parts = [messages[-1]["content"]]
    for section in ("solution", "feedback", "critique"):
        if text := getattr(context, section):
            before, after = getattr(templates, section).split("{" + section + "}")
            parts[-1] += before
            parts += [text, after]
    parts[-1] += templates.closing
    return encode(tokenizer, messages, parts, max_tokens)


def critique_parts(messages: list[dict[str, str]], attempt: str, reference: str, templates: Templates) -> list[str]:
    """The request for a critique, problem, attempt and reference answer at the odd places (Sec. 4.2); joined, it is the
    message for a served model."""
    texts = {"question": messages[-1]["content"], "attempt": strip_thinking(attempt), "reference": reference}
    return _filled(templates.request, texts)


def _filled(request: str, texts: dict[str, str]) -> list[str]:
    parts = re.split(r"\{(" + "|".join(texts) + r")\}", request)
    parts[1::2] = [texts[hole] for hole in parts[1::2]]
    return parts


def critique_prompt(
    tokenizer, messages: list[dict[str, str]], attempt: str, reference: str, templates: Templates, max_tokens: int
) -> tuple[list[int], int]:
    """Token ids of the request as one user message, and how many tokens of its texts were cut."""
    return encode(tokenizer, messages[-1:], critique_parts(messages, attempt, reference, templates), max_tokens)


# ---- A judge's score -------------------------------------------------------------------------------------


def judge_parts(messages: list[dict[str, str]], attempt: str, templates: Templates) -> list[str]:
    """The request for a score, problem and attempt at the odd places; joined, it is the message for a served model."""
    return _filled(templates.judge, {"question": messages[-1]["content"], "attempt": strip_thinking(attempt)})


def judge_prompt(
    tokenizer, messages: list[dict[str, str]], attempt: str, templates: Templates, max_tokens: int
) -> tuple[list[int], int]:
    """Token ids of the request as one user message, and how many tokens of its texts were cut."""
    return encode(tokenizer, messages[-1:], judge_parts(messages, attempt, templates), max_tokens)


def digit_tokens(tokenizer) -> list[int]:
    """The ids of 0 to 9. Raises ValueError for a tokenizer that has no token of its own for each."""
    ids = [tokenizer(str(digit), add_special_tokens=False).input_ids for digit in range(10)]
    if any(len(found) != 1 for found in ids) or len({found[0] for found in ids}) < 10:
        raise ValueError(
            "the tokenizer has no token of its own for each digit, so this network cannot judge: --judge_url"
        )
    return [found[0] for found in ids]


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
