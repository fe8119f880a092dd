"""Three tasks a CPU can learn in minutes, and the examples that warm-start their small models.

trace   the default: run a 12-line program of a small accumulator machine; feedback names the first wrong line
code    write a Python one- or two-liner whose words have a "house" meaning that only the unit tests reveal
choice  recall a table entry, given four options; feedback says only that an answer is wrong: made for sibling and critique

The warm-up data contain a belief that is wrong in places ("old firmware", unusual meanings). A warm-started model passes some
problems, reads feedback most of the time, and can learn the rest only by reinforcement (`python -m study.warm_start`).

One class per subset. heads, steps and batch configure its model and the warm start; max_response is the longest answer in
tokens. example() draws a warm-up example at a share `progress` of the training. If it has an "attempt", its answer judges that
attempt; if it has a "reference" too, the answer is a review.
"""

import functools
import itertools
import random
import re

from feedback import Context, Templates
from tasks.base import Outcome, Problem, Task
from tasks.sandbox import Sandbox

# A model of 200,000 parameters reads short headings better than English sentences.
TEMPLATES = Templates(
    solution="\nsolution\n{solution}", feedback="\nfeedback\n{feedback}", critique="\nreview\n{critique}", closing="\nagain",
    request="{question}\nattempt\n{attempt}\nanswer {reference}\nreview",
)  # fmt: skip
JUDGE_REQUEST = "{question}\nattempt\n{attempt}\nscore"  # for OVD's judge


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


class Graded:
    """A task that grades each response on its own."""

    def verify(self, problems: list[Problem], responses: list[str]) -> list[Outcome]:
        return [self.grade(problem, response) for problem, response in zip(problems, responses, strict=True)]


# ---- The machine whose tables trace and choice ask for -----------------------------------------------------

OPS = ("zig", "zap", "hop", "dip", "mix", "fog")
LINES = 12  # of a program


class Firmware:
    """Six opcodes, each a table of ten digits, and add and sub (mod 10). The warm-up data give the true entry with
    probability `belief[op, x]`, else the old firmware's. Each opcode's entries get the ten `beliefs` in random order."""

    def __init__(self, beliefs: tuple[float, ...], seed: int):
        rng = random.Random(seed)
        self.true, self.old, self.belief = {}, {}, {}
        for op in OPS:
            table = rng.sample(range(10), 10)
            for x, belief in enumerate(rng.sample(beliefs, 10)):
                self.true[op, x], self.belief[op, x] = table[x], belief
                self.old[op, x] = rng.choice([v for v in range(10) if v != table[x]])

    def step(self, line: str, x: int, rng: random.Random | None = None) -> int:
        """The value after `line` ("zig", "add 3") started at x: the true value, or with an rng a draw from the belief."""
        if line in OPS:
            return self.true[line, x] if rng is None or rng.random() < self.belief[line, x] else self.old[line, x]
        op, digit = line.split()
        return (x + int(digit) if op == "add" else x - int(digit)) % 10

    def run(self, start: int, lines: list[str], rng: random.Random | None = None) -> list[int]:
        return list(itertools.accumulate(lines, lambda x, line: self.step(line, x, rng), initial=start))[1:]


# ---- trace -------------------------------------------------------------------------------------------------


class Trace(Graded):
    """`start 4 / 1 add 3 / 2 zig ...` -> `1 add 3 : 7 / 2 zig : 2 ...`. The model knows 48 of the 60 table entries (0.97)
    and not the other 12 (0.02), so near misses dominate. Feedback quotes the first wrong line as the answer should have it:
    repeating its prefix keeps the teacher from writing the expected value on other lines. most: the most unknown entries in
    one program; dialect: feedback omits the colon, unlike the warm-up, so the teacher reads less than half of it."""

    heads, steps, batch, max_response = 4, 2000, 32, 100

    def __init__(self, name: str = "trace", beliefs=(0.97,) * 8 + (0.02,) * 2, most: int = LINES, dialect: bool = False):
        self.name, self.firmware, self.most, self.dialect = name, Firmware(beliefs, seed=5), most, dialect

    def problems(self, rng: random.Random, count: int, name: str) -> list[Problem]:
        found, belief = [], self.firmware.belief
        while len(found) < count:
            problem = self.problem(rng, LINES, f"{name}-{len(found)}")
            start, program = problem.data
            before = [start, *self.firmware.run(start, program)]
            if sum(line in OPS and belief[line, x] < 0.5 for line, x in zip(program, before)) <= self.most:
                found.append(problem)
        return found

    def problem(self, rng: random.Random, lines: int, id: str) -> Problem:
        start, program = rng.randrange(10), []
        for _ in range(lines):
            opcode = rng.random() < 0.6
            program.append(rng.choice(OPS) if opcode else f"{rng.choice(('add', 'sub'))} {rng.randrange(1, 10)}")
        text = f"start {start}\n" + "\n".join(f"{k} {line}" for k, line in enumerate(program, 1))
        return Problem(id, user(text), self.answer(program, self.firmware.run(start, program)), (start, program))

    @staticmethod
    def answer(program: list[str], values: list[int]) -> str:
        return "\n".join(f"{k} {line} : {v}" for k, (line, v) in enumerate(zip(program, values), 1))

    def grade(self, problem: Problem, response: str) -> Outcome:
        given, right = response.split("\n"), problem.reference.split("\n")
        for got, expected in itertools.zip_longest(given, right, fillvalue=""):
            if got != expected:
                prefix, _, value = got.partition(" : ")
                # If only the value is wrong, the feedback quotes it; no other digit would repair a different line.
                same = prefix == expected.partition(" : ")[0] and value.isdigit()
                text = f"expected\n{expected or 'end'}\ngot {value if same else 'other'}"
                return Outcome(0, "wrong line", text.replace(" :", "") if self.dialect else text)
        return Outcome(1, "passed")

    def example(self, rng: random.Random, progress: float = 1.0) -> dict:
        """The first tenth of the training only looks lines up in the prompt: their values are noise, so nothing else predicts
        them, and a model that learns the tables first may never learn to look. Later 40% have feedback, honest in 80% of
        cases to leave the E-step something to teach; 20% have a solution, 10% lines to look up, and the rest are plain."""
        lookup = progress < 0.1 or rng.random() < 0.1
        lines = rng.randrange(2, 6) if lookup else LINES if rng.random() < 0.5 else rng.randrange(3, LINES + 1)
        problem = self.problem(rng, lines, "")
        (start, program), z, context = problem.data, rng.random(), None
        values = [rng.randrange(10) for _ in program] if lookup else self.firmware.run(start, program, rng)
        opcodes = [k for k, line in enumerate(program) if line in OPS]
        if lookup:
            shuffled = rng.sample(self.answer(program, values).split("\n"), lines)
            context = Context("environment", feedback="\n".join(shuffled))
        elif z < 0.45 and opcodes:
            k = rng.choice(opcodes)
            x, expected = values[k - 1] if k else start, rng.randrange(10)
            got = self.firmware.step(program[k], x, rng)
            got = got if got != expected else rng.choice([v for v in range(10) if v != expected])
            values[k] = expected if rng.random() < 0.8 else self.firmware.step(program[k], x, rng)
            values[k + 1 :] = self.firmware.run(values[k], program[k + 1 :], rng)
            context = Context("environment", feedback=f"expected\n{k + 1} {program[k]} : {expected}\ngot {got}")
        elif z < 0.67:
            # A solution from another machine: most of its table entries are noise, and the answer follows it.
            x = start
            for k, line in enumerate(program):
                noisy = line in OPS and rng.random() < 0.9
                x = values[k] = rng.randrange(10) if noisy else self.firmware.step(line, x, rng)
            context = Context("sibling", solution=self.answer(program, values))
        return {"messages": problem.messages, "context": context, "answer": self.answer(program, values)}

    def load(self) -> Task:
        train, rest = self.problems(random.Random(11), 720, "train"), self.problems(random.Random(12), 128, "held-out")
        return Task(f"toy/{self.name}", train, rest[:64], rest[64:], self.verify)


# ---- code --------------------------------------------------------------------------------------------------

# Each phrase has three possible meanings; the unit tests fix one of them, "the house convention". K is a digit.
PHRASES = {
    "sort": ("sorted(xs)", "sorted(xs)[::-1]", "sorted(set(xs))"), "flip": ("xs[::-1]", "[-x for x in xs]", "[9-x for x in xs]"),
    "crop": ("xs[1:]", "xs[:-1]", "xs[1:-1]"), "peak": ("[max(xs)]", "[min(xs)]", "[xs[0]]"),
    "odd": ("[x for x in xs if x%2]", "[x for x in xs if x%2==0]", "xs[1::2]"),
    "shift K": ("[x+K for x in xs]", "[x-K for x in xs]", "xs[K:]+xs[:K]"), "first K": ("xs[:K]", "xs[-K:]", "sorted(xs)[:K]"),
    "over K": ("[x for x in xs if x>K]", "[x for x in xs if x>=K]", "[max(x,K) for x in xs]"),
    "skip K": ("xs[K:]", "xs[:-K]", "[x for x in xs if x!=K]"), "repeat K": ("xs*K", "[x*K for x in xs]", "xs+[K]"),
    "step K": ("xs[::K]", "xs[K-1::K]", "[x for x in xs if x%K==0]"), "push K": ("xs+[K]", "[K]+xs", "[x==K for x in xs]"),
}  # fmt: skip
compiled = functools.cache(compile)  # makes the problems ten times as fast


def failure(xs: list[int], got: object, expected: object, raised: str = "", length: int | None = None) -> str:
    """The feedback on a failing test, each value cut to `length` characters."""
    show = lambda value: repr(value).replace(", ", ",")[:length]  # noqa: E731
    did = f"raised {raised[:length]}" if raised else f"returned {show(got)}"
    return f"f({show(xs)}) {did}, expected {show(expected)}"


class Code:
    """`Write f(xs): shift 3, then sort.` -> a one- or two-line Python body, run against six unit tests in the sandbox. In
    the warm-up data a phrase's true meaning has probability 0.75, 0.3 or 0.003 (four phrases each). Feedback is the first
    failing test or the exception. `parts`: a question's phrases with their digits; `meanings`: 0, 1 or 2 for each."""

    heads, steps, batch, max_response, name = 2, 3000, 48, 48, "code"

    def __init__(self):
        rng = random.Random(3)
        self.truth, self.belief, self.sandbox = {}, {}, None
        for name, p in zip(rng.sample(sorted(PHRASES), 12), (0.75,) * 4 + (0.3,) * 4 + (0.003,) * 4):
            share = rng.uniform(0.3, 0.7)
            self.truth[name] = rng.randrange(3)
            self.belief[name] = [(1 - p) * share, (1 - p) * (1 - share)]
            self.belief[name].insert(self.truth[name], p)

    @staticmethod
    def body(parts, meanings) -> str:
        lines = [PHRASES[name][m].replace("K", str(k)) for (name, k), m in zip(parts, meanings)]
        return "\n".join([f"xs={line}" for line in lines[:-1]] + [f"return {lines[-1]}"])

    @staticmethod
    def question(parts) -> list[dict[str, str]]:
        return user(f"Write f(xs): {', then '.join(name.replace('K', str(k)) for name, k in parts)}.")

    @staticmethod
    def run(body: str, xs: list[int]):
        """Runs a program built from PHRASES; never a response."""
        for line in body.split("\n"):
            expression = line.removeprefix("xs=").removeprefix("return ")
            try:
                xs = eval(compiled(expression, "<phrase>", "eval"), {"xs": xs})
            except (ValueError, IndexError) as error:
                return f"{type(error).__name__}: {error}"
        return xs

    def telling_input(self, rng: random.Random, body: str, others: list[str]) -> list[int] | None:
        """An input on which as few other readings as possible return the same list as `body`."""
        best, fewest = None, len(others) + 1
        for _ in range(8):
            xs = [rng.randrange(10) for _ in range(rng.choice((4, 4, 5)))]
            value = self.run(body, xs)
            same = sum(self.run(other, xs) == value for other in others)
            if isinstance(value, list) and 0 < len(value) <= 12 and same < fewest:
                best, fewest = xs, same
        return best

    def problems(self, rng: random.Random, name: str, questions) -> list[Problem]:
        """The problems of the questions that have six telling inputs."""
        found = []
        for i, parts in enumerate(questions):
            body = self.body(parts, [self.truth[phrase] for phrase, _ in parts])
            readings = [self.body(parts, meanings) for meanings in itertools.product(range(3), repeat=len(parts))]
            others = [reading for reading in readings if reading != body]
            tests = [self.telling_input(rng, body, others) for _ in range(6)]
            if None not in tests:
                found.append(Problem(f"{name}-{i}", self.question(parts), body, [(xs, self.run(body, xs)) for xs in tests]))
        return found

    def parts(self, rng: random.Random, count: int):
        return tuple((n, rng.randrange(2, 6) if "K" in n else 0) for n in rng.sample(sorted(PHRASES), count))

    def guess(self, rng: random.Random, parts) -> list[int]:
        return [rng.choices(range(3), self.belief[name])[0] for name, _ in parts]

    def verify(self, problems: list[Problem], responses: list[str]) -> list[Outcome]:
        if self.sandbox is None:
            self.sandbox = Sandbox(time_limit=3.0)
        # Rollouts of one prompt are often the same few programs, so each runs once.
        asked = [(p.id, response) for p, response in zip(problems, responses, strict=True)]
        once = {key: (p, key[1]) for key, p in zip(asked, problems)}
        graded = dict(zip(once, self.sandbox.run_many(lambda pair: self.grade(*pair), list(once.values()))))
        return [graded[key] for key in asked]

    def grade(self, problem: Problem, response: str) -> Outcome:
        source = "def f(xs):\n" + "\n".join(f" {line}" for line in response.split("\n"))
        for xs, expected in problem.data:
            result = self.sandbox.call(source, "f", [xs])
            if result.status == "internal":
                return Outcome(0, "internal")
            if result.status != "ok":
                return Outcome(0, result.status, failure(xs, None, expected, result.error or result.status, 60))
            # Text, because True is not 1.
            if repr(result.value) != repr(expected):
                return Outcome(0, "wrong answer", failure(xs, result.value, expected, length=60))
        return Outcome(1, "passed")

    def example(self, rng: random.Random, progress: float = 1.0) -> dict:
        """75% have a context (15% of these a solution, else a failing test) and nearly uniform meanings, so that the model
        learns to read rather than guess; the rest are plain, with meanings drawn from the belief."""
        while True:
            parts, context = self.parts(rng, 1 if rng.random() < 0.6 else 2), None
            plain, meant = rng.random() < 0.25, self.guess(rng, parts)
            if not plain:
                meant = [rng.randrange(3) if rng.random() < 0.7 else m for m in meant]
            body = self.body(parts, meant)
            if not plain and rng.random() < 0.15:
                context = Context("sibling", solution=body)
            elif not plain:
                attempt = self.body(parts, self.guess(rng, parts))
                xs = self.telling_input(rng, body, [attempt])
                got, expected = (None, None) if xs is None else (self.run(attempt, xs), self.run(body, xs))
                if got == expected:  # no input tells the attempt from the meaning
                    continue
                text = failure(xs, got, expected, got if isinstance(got, str) else "")
                context = Context("environment", feedback=text)
            return {"messages": self.question(parts), "context": context, "answer": body}

    def load(self) -> Task:
        rng = random.Random(21)
        single = [((name, k),) for name in sorted(PHRASES) for k in (range(2, 6) if "K" in name else [0])]
        double = list(dict.fromkeys(self.parts(rng, 2) for _ in range(1000)))[:330]
        single = rng.sample(single, len(single))
        # Every split gets one-phrase problems, so that training has easy ones to start from.
        train = self.problems(rng, "train", single[20:] + double[:210])
        validation = self.problems(rng, "validation", single[:10] + double[210:270])
        test = self.problems(rng, "test", single[10:20] + double[270:])
        return Task(f"toy/{self.name}", train, validation, test, self.verify, lambda: self.sandbox and self.sandbox.close())


class CodeJudge(Code):
    """code for a model that also judges, as OVD needs. As a judge it knows more than it acts on: the true meaning of 9 phrases.
    For the other 3, one of each kind, it judges by the belief that it writes by."""

    name = "code-judge"

    def __init__(self):
        super().__init__()
        kinds = sorted(self.truth, key=lambda name: self.belief[name][self.truth[name]])
        self.blind = {kinds[0], kinds[4], kinds[8]}

    def example(self, rng: random.Random, progress: float = 1.0) -> dict:
        """A fifth of the warm-up data are an attempt and its score: 7 to 9 if the judge thinks it is right, 0 to 2 if not, and
        any digit in one of ten. Half of the attempts are what the model would write."""
        if rng.random() < 0.8:
            return super().example(rng, progress)
        parts = self.parts(rng, 1 if rng.random() < 0.6 else 2)
        held = self.guess(rng, parts)
        right = [m if name in self.blind else self.truth[name] for m, (name, _) in zip(held, parts)]
        z = rng.random()
        tried = self.guess(rng, parts) if z < 0.5 else [rng.randrange(3) for _ in parts]
        tried = right if z > 0.8 else tried
        score = rng.randrange(10) if rng.random() < 0.1 else rng.randrange(3) + 7 * (tried == right)
        return {"messages": self.question(parts), "attempt": self.body(parts, tried), "answer": str(score)}


# ---- choice ------------------------------------------------------------------------------------------------


class Choice(Graded):
    """`zig 4` with four values to choose from -> `zig 4 : 2` and `<answer>2</answer>`. The belief in the opcodes' entries is
    0.9, 0.5 or 0.15. There is no environment text: a failure says only that it failed."""

    heads, steps, batch, max_response, name = 4, 1000, 48, 24, "choice"

    def __init__(self):
        self.firmware = Firmware((0.9,) * 3 + (0.5,) * 4 + (0.15,) * 3, seed=9)

    def problem(self, rng: random.Random, id: str) -> Problem:
        entry = rng.choice(OPS), rng.randrange(10)
        # The old firmware's value is always an option, so that a wrong belief is a possible answer.
        two = [self.firmware.true[entry], self.firmware.old[entry]]
        options = rng.sample(two + rng.sample([v for v in range(10) if v not in two], 2), 4)
        text = f"{entry[0]} {entry[1]}\noptions {' '.join(map(str, options))}"
        return Problem(id, user(text), str(self.firmware.true[entry]), (entry, options))

    @staticmethod
    def grade(problem: Problem, response: str) -> Outcome:
        found = re.findall(r"<answer>([^<]*)</answer>", response)
        if not found:
            return Outcome(0, "no answer", "no answer given")
        right = found[-1].strip() == problem.reference
        return Outcome(1, "passed") if right else Outcome(0, "wrong answer", "wrong answer")

    @staticmethod
    def answer(problem: Problem, value: int) -> str:
        """The answer that chooses `value`."""
        (op, x), _ = problem.data
        return f"{op} {x} : {value}\n<answer>{value}</answer>"

    def example(self, rng: random.Random, progress: float = 1.0) -> dict:
        """35% are plain, 20% have a solution, 25% have a review, and 20% ask for the review: it quotes the attempt's value,
        which tells what to avoid and not the answer."""
        problem = self.problem(rng, "")
        (op, x), options = problem.data
        believed, wrong, z = self.firmware.step(op, x, rng), rng.choice(options), rng.random()
        review, others = f"{op} {x} : {wrong} is wrong", [v for v in options if v != wrong]
        if z >= 0.8:
            attempt, reference = self.answer(problem, wrong), str(rng.choice(others))
            return {"messages": problem.messages, "attempt": attempt, "reference": reference, "answer": review}
        value, context = believed, None
        if 0.35 <= z < 0.55:
            shown = rng.choice(options)
            context = Context("sibling", solution=self.answer(problem, shown))
            value = shown if rng.random() < 0.9 else believed
        elif z >= 0.55:
            context = Context("critique", critique=review)
            value = believed if believed in others and rng.random() < 0.7 else rng.choice(others)
        return {"messages": problem.messages, "context": context, "answer": self.answer(problem, value)}

    def load(self) -> Task:
        rng, found = random.Random(31), {}
        while len(found) < 480 + 128:
            problem = self.problem(rng, f"choice-{len(found)}")
            found.setdefault(problem.messages[0]["content"], problem)
        problems = list(found.values())
        return Task(f"toy/{self.name}", problems[:480], problems[480:544], problems[544:], self.verify)


# ---- By name -------------------------------------------------------------------------------------------------

SUBSETS = {"trace": Trace, "code": Code, "choice": Choice}
EVERY = SUBSETS | {  # with the study's regimes
    # Every entry is believed at 0.55 or more: the model often succeeds, and finds the rest by trying.
    "trace-often": functools.partial(Trace, "trace-often", (0.98,) * 5 + (0.9, 0.8, 0.7, 0.6, 0.55)),
    # Uses trace's model, on programs with at most one unknown line and with feedback that it reads badly.
    "trace-dialect": functools.partial(Trace, "trace-dialect", most=1, dialect=True),
    "code-judge": CodeJudge,
}


def load(subset: str) -> Task:
    return EVERY[subset]().load()
