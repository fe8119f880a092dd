"""Whether two answers have the same value. tasks/mathematics.py passes this file's source to the sandbox's workers.

math-verify's grammar reads the LaTeX, sympy evaluates it, and the comparison is exact. math-verify's own comparison is not
used: it rounds to six digits, and both everything below 1e-15 and `113 - Max(1, oo)` are zero to it."""

import random
import re

import sympy
from latex2sympy2_extended import NormalizationConfig, normalize_latex
from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
from math_verify.grader import should_treat_as_complex
from sympy import Eq, FiniteSet, Intersection, Interval, MatrixBase, Rational, Set, Symbol, Tuple, Union, oo
from sympy.core.evalf import PrecisionExhausted
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from sympy.logic.boolalg import And

FORM = NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True, boxed="none")
INEQUALITY = (sympy.Gt, sympy.Ge, sympy.Lt, sympy.Le)
INFINITE, UNDEFINED = (oo, -oo), (sympy.zoo, sympy.nan, sympy.AccumBounds)
AT = r"[-+\s]*\\infty\s*"
CLOSED = re.compile(rf"\[{AT}|{AT}\]|\\[lg]e\w*{AT}|{AT}\\[lg]e")  # sympy makes every interval open at an infinity
QUESTION = re.compile(  # still to be evaluated: an answer that contains one only repeats the problem
    r"\\(?:max|min|sum|prod|i*nt|lim|limsup|liminf|gcd|lcm|det|[bp]?mod|operatorname|frac\s*\{d\})(?![a-z])|vmatrix"
)
DIGITS = 2000  # constants that agree to so many digits are equal
POINTS = [  # (lowest, highest, denominator) of the numbers put in for variables
    *[(1, 99, 37)] * 4, *[(-99, 99, 37)] * 4, *[(1, 36, 37)] * 2, *[(-5, 9, 1)] * 4
]  # fmt: skip
TYPICAL = (
    r"[\frac{\pi^2}{8},\frac{5\pi}{4})\cup(2,\infty)", r"-2<x\le3\sqrt{2}", r"y=2x^{2}-\frac{1}{3}x+e^{2i}",
    r"\begin{pmatrix}-1/3&2\\x&5\end{pmatrix}", r"\{1\pm\sqrt5,-2.5\}", r"\log_2{8}+\sin 30^\circ+25\%",
    r"\sqrt[3]{n!}(a+5)|b|", "(1, 2, 1/2)",
)  # fmt: skip


def equal(gold: str, answer: str) -> bool:
    """Whether the answer has the gold answer's value. Raises some exception if one of them cannot be read."""
    if QUESTION.search(answer) and not QUESTION.search(gold) or bool(CLOSED.search(gold)) != bool(CLOSED.search(answer)):
        return False
    if r"\cup" not in gold and ({gold[0], answer[0]} == {"(", "["} or {gold[-1], answer[-1]} == {")", "]"}):
        return False
    left, right = read(gold), read(answer)
    point, names = shaped(left), named(left)
    if names or isinstance(point, Tuple) and not point.has(*INFINITE):  # 1,2 for (1,2), and y=2,x=1
        left = Tuple(*sorted(written(left), key=str)) if names else left
        if isinstance(right, FiniteSet) and not re.search(r"\\\{|\bor\b", answer):
            elements = written(right)
            if len({e.lhs for e in elements if isinstance(e, Eq)}) < sum(isinstance(e, Eq) for e in elements):  # x=1,x=2
                return False
            by_name = named(right) and (names or named(right) <= set("xyz"))
            right = Tuple(*sorted(elements, key=str) if by_name else elements)
    return same(left, right) and endless(left) == endless(right)


def named(value) -> set[str]:
    """The names in x=1,y=2; none for x=1,x=2 and anything else."""
    equations = written(value) if isinstance(value, FiniteSet) else []
    names = {str(e.lhs) for e in equations if isinstance(e, Eq) and isinstance(e.lhs, Symbol)}
    return names if len(names) == len(equations) > 1 else set()


def endless(value) -> tuple[bool, bool, bool]:
    """Whether the value or any part of it, as written or evaluated, contains an infinity; whether an undefined value; and whether
    an infinity vanishes, as in 1/oo. Only values that agree in all three can be equal."""
    raw = [part for part in sympy.preorder_traversal(value) if isinstance(part, sympy.Expr)]
    bases = [part.args[1] for part in raw if isinstance(part, sympy.log) and part.args[1:]]  # sympy's log(5, 0) is 0
    parts = [value, shaped(value), *raw, *map(clean, raw), *(clean(sympy.log(base, evaluate=False)) for base in bases)]
    parts += [sympy.nan for part in raw if part.is_Pow and clean(part.base) == clean(part.exp) == 0]  # sympy's 0^0 is 1
    vanishes = any(part.has(*INFINITE) and not clean(part).has(*INFINITE) for part in raw)
    return any(part.has(*INFINITE) for part in parts), any(part.has(*UNDEFINED) for part in parts), vanishes


class Reader(_Latex2Sympy):
    """The library's reader takes every integer before a positive number for a mixed number and adds the two; here 2(3) is 6."""

    def convert_postfix_list(self, factors, i=0):
        value = super().convert_postfix_list(factors, i)
        is_mixed = re.fullmatch(r"\d+\\frac\{\d+\}\{\d+\}", "".join(factor.getText() for factor in factors))
        return sympy.Mul(value, 1, evaluate=False) if i and not is_mixed and isinstance(value, Rational) else value


def read(text: str):
    if re.search(r"\\\$|'|dots|\.\.", text):  # the parser would ignore it
        raise ValueError(f"it contains a currency, a prime or dots: {text}")
    text = re.sub(r"(\d*\\frac\{\w+\}\{\w+\})\\%", r"\\frac{\1}{100}", text)
    for word, join in (("or", Union), ("and", Intersection)):  # join inequalities and intervals, else make a list
        parts = re.split(rf"\\text\s*{{\s*{word}\s*}}|\b{word}\b", text)
        if len(parts) > 1 and all(re.search(r"[<>\[\]]|\\infty|\\[lgn]e(?:q|qslant)?(?![a-z])", part) for part in parts):
            sets = [read(part) for part in parts]
            if len(set().union(*(part.free_symbols for part in sets))) > 1:
                raise ValueError(f"several unknowns: {text}")
            return join(*[part if isinstance(part, Set) else part.as_set() for part in sets])
    if r"\pm" in text and "," not in text:
        return FiniteSet(*[read(text.replace(r"\pm", sign)) for sign in "+-"])
    latex = normalize_latex(text, FORM)
    value = Reader(None, is_real=not should_treat_as_complex(latex), convert_degrees=True).parse(latex)
    if not isinstance(value, (sympy.Basic, MatrixBase)) or r"\infty" in latex and not value.has(*INFINITE):
        raise ValueError(f"no value: {text}")  # or an infinity vanished, as in binom(0, oo) = 0
    if isinstance(value, Eq) and isinstance(value.lhs, Tuple):  # (x,y)=(1,2) as x=1,y=2
        if not isinstance(point := shaped(value.rhs), Tuple):
            raise ValueError(f"no point: {text}")
        return FiniteSet(*(Eq(*pair) for pair in zip(value.lhs, point, strict=True)))
    return value


def clean(value):
    """The value evaluated, with exact decimals, letters without assumptions, the constants i and e, and f(x) as a name."""
    value = value.xreplace({number: Rational(str(number)) for number in value.atoms(sympy.Float)})
    value = value.xreplace({part: Symbol(str(part)) for part in value.atoms(AppliedUndef)})
    letters = {"i": sympy.I, "e": sympy.E}
    return value.xreplace({name: letters.get(name.name, Symbol(name.name)) for name in value.free_symbols}).doit()


def shaped(value):
    """The value evaluated: an inequality in one variable as its solution set, and (a, b), an interval or a point, as a pair.
    Containers keep their elements as they are."""
    if isinstance(value, (Relational, And)) and not sides(value):
        if len(value.free_symbols) != 1:
            return value
        real = {name: Symbol("x", real=True) for name in value.free_symbols}
        value = Intersection(*[relation.xreplace(real).as_set() for relation in value.atoms(Relational)])
    if isinstance(value, (FiniteSet, Tuple)):
        return shaped(value.args[0]) if len(written(value)) == 1 and not isinstance(value.args[0], Set) else value
    if isinstance(value, Set):
        value = clean(value.xreplace({sympy.S.Reals: Interval(-oo, oo)}))
        return Tuple(value.start, value.end) if isinstance(value, Interval) and value.is_open else value
    return clean(value) if isinstance(value, (sympy.Expr, MatrixBase, sympy.MatrixExpr)) else value


def written(value) -> list:
    """The parts of a value in the order in which they were written."""
    return list(getattr(value, "_unsorted_args", value.args))


def sides(value) -> list | None:
    """[a, b, c] for a = b = c; None if the value is not an equation."""
    chain = written(value) if isinstance(value, And) else [value]
    return [chain[0].lhs, *(e.rhs for e in chain)] if all(isinstance(e, Eq) for e in chain) else None


def is_name(side) -> bool:
    """Whether the side may name what was asked for, such as m + n, P(A) or x^2; 2x is part of an equation to solve."""
    terms = [term for part in sympy.preorder_traversal(side) if part.is_Add or part.is_Mul for term in part.args]
    return bool(side.free_symbols or side.atoms(AppliedUndef)) and not any(t.is_Number and abs(t) != 1 for t in terms)


def same(gold, answer) -> bool:
    left, right = sides(gold), sides(answer)
    if left and right:
        if not all(isinstance(side, sympy.Expr) for side in left + right):
            return len(left) == len(right) and all(map(same, left, right))
        return all(same(right[-1], side) for side in right[1:-1]) and multiple(left[0] - left[-1], right[0] - right[-1])
    if right:  # m + n = 2 + 3 = 5 for 5
        *others, value = right[::-1] if isinstance(right[-1], Symbol) else right
        return same(gold, value) and all(
            is_name(side) and side not in value.free_symbols or same(value, side) for side in others
        )
    if left and isinstance(left[0], (Symbol, AppliedUndef, Tuple)):  # 5 for x = 5
        return same(left[-1], answer)
    if all(isinstance(e, INEQUALITY) and len(e.free_symbols) > 1 for e in (gold, answer)):
        strict = ["=" not in e.rel_op for e in (gold, answer)]
        return strict[0] == strict[1] and multiple(gold.gts - gold.lts, answer.gts - answer.lts, positive=True)
    if gold.free_symbols != answer.free_symbols and all(isinstance(e, (Relational, And)) for e in (gold, answer)):
        return False  # x > 2 is not y > 2
    gold, answer = shaped(gold), shaped(answer)
    both = lambda kind: isinstance(gold, kind) and isinstance(answer, kind)  # noqa: E731
    if both(FiniteSet) or both(Union):  # in any order
        rest = written(answer)
        for part in written(gold):
            match = next((other for other in rest if same(part, other)), None)
            if match is None:
                return False
            rest.remove(match)
        return not rest
    if both(Tuple) or both(Interval):
        return len(gold.args) == len(answer.args) and all(map(same, gold.args, answer.args))
    if both(MatrixBase):
        return gold.shape == answer.shape and all(map(same, gold.flat(), answer.flat()))
    if gold == answer:
        return not gold.has(*UNDEFINED)
    return both(sympy.Expr) and always_zero(gold, answer)


def multiple(gold, answer, positive: bool = False) -> bool:
    """Whether gold = 0 and answer = 0 are the same equation, one side being a multiple of the other."""
    gold, answer = clean(gold), clean(answer)
    ratio = sympy.nan if answer == 0 else sympy.simplify(gold / answer)
    return bool(ratio.is_number and ratio.is_finite and ratio != 0 and (ratio > 0 if positive else True))


def always_zero(gold, answer) -> bool:
    """Whether gold - answer is 0 where both are defined, at random points; at real values unless one of them contains i."""
    difference, rng, equal_at = gold - answer, random.Random(0), 0
    if difference.has(*INFINITE, *UNDEFINED):
        return False
    if not difference.free_symbols:
        return zero(difference, {}, DIGITS)
    for low, high, denominator in POINTS:
        names = sorted(difference.free_symbols, key=str)
        point = {name: Rational(rng.randint(low, high), denominator) for name in names}
        values = [side.evalf(15, subs=point) for side in (gold, answer)]
        complex_ = difference.has(sympy.I)
        if all(value.is_number and value.is_finite and (complex_ or value.is_real) for value in values):
            if not zero(difference, point, DIGITS // 8):
                return False
            equal_at += 1
    return equal_at > 2 or sympy.simplify(difference) == 0


def zero(value, point: dict, digits: int) -> bool:
    try:
        return value.evalf(2, subs=point, maxn=digits, strict=True) == 0
    except PrecisionExhausted:  # it or a part of it is 0 to all these digits
        return bool(abs(value.evalf(15, subs=point, maxn=digits)) < Rational(1, 10 ** (digits // 2)))
