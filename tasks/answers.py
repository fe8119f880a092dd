"""Finds the boxed answer and compares it as text: fonts, units, bases, plain numbers. tasks/algebra.py compares values."""

import re
from collections.abc import Callable
from decimal import Decimal
from math import gcd

MAX_ANSWER_CHARS = 200
LETTERS = {"−": "-", "∞": r"\infty ", "π": r"\pi ", "×": r"\times ", "·": r"\cdot ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
           "∪": r"\cup ", "∅": r"\emptyset ", "°": r"^\circ ", "≈": r"\approx ", "√": r"\sqrt ", "¢": r"\text{ cents}", "²": "^2",
           "³": "^3", "ℝ": r"\mathbb{R}", "⁄": "/", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}"}  # fmt: skip
LETTERS |= {chr(0xFEE0 + code): chr(code) for code in range(33, 127)}  # full width
LETTER = "[mgshlLNJWVK]"  # a unit after a number and a blank, or in \text{}
SHORT = "[mckd]m|[mk]g|m[lL]|in|ft|yd|mi|min|lbs?|oz|hr|Hz|kW|mph|(?:k?m|ft|mi)/(?:s|h|hr)"  # a unit right after a number
FONTS = re.compile(r"\\(?:(?:text|math)(?:bf|it|rm|sf|tt|normal|up)?|boldsymbol|bm|emph|underline|[mhf]box|ensuremath)\s*\{")
MULTIPLES = dict(dozen="12", hundred="10^{2}", thousand="10^{3}", million="10^{6}", billion="10^{9}", trillion="10^{12}")
BASES = "two three four five six seven eight nine ten eleven twelve".split()
BRACKETS = {"lbrace": r"\{", "rbrace": r"\}", "langle": "(", "rangle": ")"}


def word(pattern: str) -> str:
    """Matches a word, also in \\text{}."""
    return rf"(?:\\text\{{\s*|\b)(?:{pattern})\b\s*\}}?"


TIDY = [(re.compile(pattern), new) for pattern, new in (  # one spelling for everything that has several
    (r"^(?:[\s*`]|__)+|(?:[\s*`]|__)+$|(?<!\\)\$|(?<!\\)\\[()\[\]]|\s*\\!\s*", ""),  # markdown, dollar signs and other delimiters
    (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![A-Za-z])", " "),
    (r"\\(?:left|right)(?![A-Za-z])\.?|\\(?:[bB]igg?[lrm]?|(?:display|text)style|bf|it|rm|sf|tt|[lL](?:arge|ARGE))(?![A-Za-z])"
     r"|\\(?:text)?color\s*\{\w+\}", ""),
    (r"\{([,.:])\}", r"\1"), (r"\\colon(?![a-z])", ":"),
    (r"\\(?:[dtc]|nice|s)(frac|binom)", r"\\\1"), (r"\\(frac|binom|bar|overline|dot(?!s))\s*(\w|\\pi)", r"\\\1{\2}"),
    (r"\\(frac|binom)(\{[^{}]*\})\s*(\w|\\pi)", r"\\\1\2{\3}"), (r"\{(\w+)\s*\\choose\s*(\w+)\}", r"\\binom{\1}{\2}"),
    (r"\\frac\{\\text\{\s*(\w+)\s*\}\}\{\\text\{\s*(\w+)\s*\}(\^\{?\d\}?)?\}", r"\\text{\1/\2}\3"),
    (rf"\\({'|'.join(BRACKETS)})(?![a-z])", lambda m: BRACKETS[m[1]]), (r"\\varnothing|\\\{\s*\\\}", r"\\emptyset"),
    (r"\\(?:mathbb|Bbb)\s*\{?\s*R\b\s*\}?", r"\\mathbb{R}"), (r"\\log_\{?e\}?(?![a-z])", r"\\ln"),
    (r"\\operatorname\s*\{((?:arc)?(?:sin|cos|tan|cot|sec|csc)|ln|log)\}", r"\\\1 "), (r"\\lg(?![a-z])", r"\\log_{10}"),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"), (r"\\sqrt\s*(\[\w+\])\s*(\w)", r"\\sqrt\1{\2}"), (r"(?<![\\A-Za-z])pi\b", r"\\pi "),
    ("(?i)" + word("infinity"), r"\\infty "), (rf"(?i)^{word('(?:all )?real numbers')}$", r"\\mathbb{R}"),
    (r"(?i)^(?:\\text\s*\{)?\s*(?:the )?(?:final )?answer(?: is:?|:|\s*=)\s*\}?([^{}]*\}$)?", lambda m: (m[1] or "").rstrip("}")),
    (rf"^(?:\\(?:approx|simeq|sim|therefore|Rightarrow|implies)(?![A-Za-z])|{word('about|approximately')}|=)\s*", ""),
    (r"\\mathbb\{R\}\s*(?:\^\{?\+\}?|_\{?(?:>\s*0|\+)\}?)", r"(0,\\infty)"),
    (r"\\backslash(?![a-z])|(?<=\\mathbb\{R\})\s*-\s*(?=\\\{)", r"\\setminus"),
    (r"(?:(?<=^)|(?<=cup)|(?<=in))\s*([\[\]])([^()\[\]]+,[^()\[\]]+)([\[\]])(?=$|\s*\\cup)",  # ]1,2[
     lambda m: "(["[m[1] == "["] + m[2] + ")]"[m[3] == "]"]),
    (rf"(\\pi.*?)\s*{word('rad|radians?')}$", r"\1"), (r"\bUSD\s*(?=\d)", r"\\$"),
    (rf"(?<=\d)\s*{word('to')}\s*(?=\d)", ":"), (r"(?<=[\w)])\*\*(\w+)", r"^{\1}"),
    (r",\s*(?=[a-z]\s*\\neq?(?![a-z]))", r"\\text{and}"), (r"\\text\{\s*([A-F\d]+)\s*\}(?=\s*_)", r"\1"),  # x>1,x\ne2; AB_{16}
    (rf"_\{{?\s*(?:\\text\{{)?\s*({'|'.join(BASES)})\b[\s}}]*", lambda m: f"_{BASES.index(m[1]) + 2}"),
    (r"\b(\d+(?:\.\d+)?)[eE]([+-]?\d+)\b(?!_)", r"\1\\cdot10^{\2}"),
    (r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{(\d+)\}", lambda m: _recurring(*m.groups())),
    (rf"\\?%|\s*{word('percent|pct')}", r"\\%"),
    (r"\s*(?:\\text\{\s*|\b)degrees?\b(?!\s*[A-Za-z])\s*\}?|\\degree(?![a-z])|\^\s*\{\s*\\circ\s*\}", r"^\\circ"),
    (rf"\s*(?:(\\text\{{)\s*|\b)({'|'.join(MULTIPLES)})\b", lambda m: rf"\cdot{MULTIPLES[m[2]]}{m[1] or ''}"),
    (r"^(?:[A-Za-z]'*\s*\(\w+\)|\\?Pr?\s*\([^()]*\))\s*=\s*", ""), (r"^\w\s*\\in\s*(?=\\mathbb)", ""), (r"^\((\w+)\)_", r"\1_"),
    (r"^\\\{\s*\w+\s*(?:\\in\s*\\mathbb\{R\}\s*)?(?:\\mid\b|[:|])(.*(?:[<>]|\\[lgn]e).*)\\\}$", r"\1"),  # {x | 2 < x}
    (r"(?<=\d) (?=\d{3}(?!\d|\s*/))", ""),  # a thin space in a number
    (r"(?<![\w.}/^])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),  # 3 1/4
    (r"(?<![\w.}/^)])(\d+)\s*/\s*(\d+)(?=\s*(?:[a-z(]\b|\\(?:pi|sqrt|l[no]g?)))", r"\\frac{\1}{\2}"),  # 3/4\pi
    (r"(?:\\+|[.,;:\s])+$", ""),
)]  # fmt: skip
NAMES = [(re.compile(rf"(?i){long}"), short) for long, short in (  # a unit's spellings
    (r"\\text|[\\{}.]", ""),
    (r"\bkilo", "k"), (r"\bcenti", "c"), (r"\bmilli", "m"), (r"met(?:er|re)s?\b", "m"), (r"grams?\b", "g"), (r"\bmph\b", "mi/h"),
    (r"lit(?:er|re)s?\b", "l"), (r"\bsec(?:ond)?s?\b", "s"), (r"\bmin(?:ute)?s?\b", "min"), (r"\bh(?:ou)?rs?\b", "h"),
    (r"\binch(?:es)?\b", "in"), (r"\bf(?:oo|ee)t\b", "ft"), (r"\byards?\b", "yd"), (r"\bmiles?\b", "mi"), ("L$", "l"),
    (r"\bpounds?\b|\blbs\b", "lb"), (r"\bdollars?\b|\busd\b", "$"), (r"\bcents?\b", "¢"), (r"\s*\bper\b\s*", "/"),
    (r"\bsq(?:uare)?\b\s*(.+)", r"\1^2"), (r"\bcu(?:bic)?\b\s*(.+)", r"\1^3"), (r"(?<=\w{2})s\b|\s", ""),
)]  # fmt: skip
UNIT = re.compile(  # before a value a currency, behind it a degree or percent sign, words in \text{} or bare ones
    r"(?:(?<![\w.}])(?:\\\$|[€£¥])(?=\s*[\d.\\])|(?:(?<=[\da-z})\]])(?:\\%|\^\\circ\s*(?:(?:\\text\{\s*)?[CF]\b\}?)?)"
    r"|(?:(?<=\S)\s*\\text\{\s*(?!or\b|and\b)[A-Za-z][^{}\d]*(?:\^\d)?\}"
    rf"|(?:(?<=[\d}})\]])|(?<=\\pi))\s*(?:(?:{SHORT})|(?<=\s)(?:{LETTER}|"
    r"(?!(?:or|and|pi|sqrt|sin|cos|tan|log|ln|exp|inf|frac)\b)[A-Za-z]{3,}(?:[ /]+[A-Za-z]+)*)))(?:\^\{?-?\d\}?)?)"
    r"(?=\s*(?:[,;)\]]|\\\}|$)))"
)
NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)", re.ASCII)
LITERAL = re.compile(r"(?<![\w^])\d+\s+\d|:[^:]*:|:0|\d\s*(?!or\b|and\b)[A-Za-z]{2,}\s+\d")  # 1 2, 1:2:3, 3:00, 5 ft 6 in
BASE = re.compile(r"(?<![\w\\])(?:\d[\dA-F]*|[A-F][\dA-F]+)_\{?(\w*)")
CHOICE = re.compile(r"(?:\(?([A-J])(?:[).:]{1,2}\s*(?=[\w\\$-]|$)|\s+(?=\d)|$))?(.*)", re.DOTALL)  # AMC's letter, the answer


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{} or \fbox{} with balanced braces, else what follows the last one without braces, or None."""
    opened, last, bare = [], None, None  # (where its content begins, whether it is a box)
    box = r"(\\(?:boxed|fbox)(?![A-Za-z])\s*)(?:\{|(?!\\(?:boxed|fbox))((?:\\[A-Za-z%$,]|\{[^{}]*\}|[^\s{}$\\])+))"
    for part in re.finditer(box + r"|\{|\\.|\}", text, re.DOTALL):
        if part[2]:
            bare = part.span(2)
        elif part[0].endswith("{") and part[0] != r"\{":
            opened.append((part.end(), part[1] is not None))
        elif part[0] == "}" and opened:
            start, is_box = opened.pop()
            if is_box and (last is None or start > last[0]):
                last = start, part.start()
    found = last or bare
    return found and text[slice(*found)].strip()


def compare(gold: str, answer: str, algebra: Callable[[str, str], str]) -> str:
    """The verdict by text, units and plain numbers if they decide, else algebra's."""
    if len(answer) > MAX_ANSWER_CHARS and gold != answer:
        return "too long"
    (letter, left), (others_letter, right) = (CHOICE.match(_tidy(text)).groups("") for text in (gold, answer))
    if letter and others_letter and not (left and right):
        return "correct" if letter == others_letter else "wrong"
    left, right = left or letter, right or others_letter
    if verdict := _by_text(left, right):
        return verdict
    bases = [BASE.findall(text) for text in (left, right)]
    left, right = [re.sub(r"(?<=[\dA-F])_\{?\w*\}?", "", text) if b else text for b, text in zip(bases, (left, right))]
    if bases[0] and not bases[1]:  # 4210 for 4210_5
        return _by_text(left, right) or "wrong"
    if re.fullmatch(r"\\text\{[^{}]*\}", left) or bases[1] and bases != [[], ["10"]]:
        return "wrong"  # words and numerals of a base are compared only as text
    (value, unit), (other, others_unit) = _split(left), _split(right)
    if unit and others_unit and unit != others_unit:
        return "wrong"
    verdict = _by_text(value, other) or algebra(value, other)
    # The answer may add a unit that the gold answer omits, but 1/2 is not 1/2 %, and pi/6 is not (pi/6) degrees.
    is_number = all(re.fullmatch(r"(?:.*=)?\s*-?[1-9][\d.]*\s*(?:\\frac.*)?", text) for text in (value, other))
    known = {"%": is_number, "^circ": r"\pi" not in value}
    if verdict == "correct" and (unit or known.get(others_unit, True)):
        return verdict
    return verdict if bool(unit) == bool(others_unit) else algebra(left, right)  # 25 % is 1/4; m may be a variable


def _by_text(gold: str, answer: str) -> str | None:
    """The verdict if the texts are the same or need no algebra to differ, else None."""
    texts = [re.sub(r"\\text\{\s*([^{}]*?)\s*\}", r" \1 ", re.sub(r"_\{(\w+)\}", r"_\1", text)) for text in (gold, answer)]
    gold, answer = [re.sub(r"(?<!\w)\s+|\s+(?!\w)|(?<=\d)\s+(?=[A-Za-z])", "", text) for text in texts]
    spoken = [re.sub(r"^(?:an?|the) (?=\w{3})|(?<=[a-z])\.|\.$", "", text.lower()) for text in (gold, answer)]  # P.M. is pm
    if gold == answer or "\\" not in gold and spoken[0] == spoken[1]:
        return "correct"
    if any(LITERAL.search(text) for text in (gold, answer)) or _is_time(gold) or _is_time(answer) and ":" not in gold:
        return "wrong"
    if NUMBER.fullmatch(gold) and NUMBER.fullmatch(answer):
        return "correct" if Decimal(gold) == Decimal(answer) else "wrong"
    return None


def _is_time(text: str) -> bool:
    """Whether it is a time such as 10:30. A ratio would be in its lowest terms."""
    return bool(re.fullmatch(r"\d?\d:[0-5]\d", text)) and gcd(*map(int, text.split(":"))) > 1


def _tidy(text: str) -> str:
    """The answer in one spelling, without fonts and other marks that have no meaning."""
    text = _without_fonts(text.translate(str.maketrans(LETTERS)))
    for pattern, new in TIDY:
        text = pattern.sub(new, text).strip()
    while text.startswith("{") and _closing(text, 1) == len(text) - 1:
        text = text[1:-1].strip()

    def joined(number: re.Match) -> str:
        """58,500 as 58500, but not in a list such as (1,200)."""
        before = text[: number.start()]
        in_list = len(re.findall(r"[(\[]|\\\{", before)) > len(re.findall(r"[)\]]|\\\}", before))
        return number[0] if in_list else number[0].replace(",", "")

    return re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", joined, text)


def _without_fonts(text: str) -> str:
    """The text without font commands; words and units go into \\text{}."""
    at = 0
    while (font := FONTS.search(text, at)) and (end := _closing(text, font.end())) is not None:
        before, inner = text[: font.start()], text[font.end() : end]
        is_unit = re.search("text|rm|box", font[0]) and before.strip() and re.fullmatch(rf"\s*{LETTER}\s*", inner)
        words = re.search("[A-Za-z]{2}", re.sub(r"\\[A-Za-z]+", "", inner)) and not re.match(r"\s*[-(\\\d$]", inner)
        new = rf"\text{{{inner}}}" if is_unit or words else inner
        text, at = before + new + text[end + 1 :], len(before) + (len(new) if is_unit or words else 0)
    return text


def _closing(text: str, at: int) -> int | None:
    """The position of the brace that closes the one open at `at`."""
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[at:]):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth:
            return at + brace.start()
    return None


def _recurring(whole: str, fixed: str, again: str) -> str:
    rest = int("0" + whole + fixed)
    return rf"\frac{{{int(str(rest) + again) - rest}}}{{{10 ** len(fixed) * (10 ** len(again) - 1)}}}"


def _split(text: str) -> tuple[str, str]:
    """(value, unit) of an answer in one unit, such as ("35", "cm"), else (text, "")."""
    units = set()

    def take(unit: re.Match) -> str:
        name = unit[0]
        for long, short in NAMES:
            name = long.sub(short, name)
        units.add(name)
        return " "

    value = UNIT.sub(take, text).strip()
    return (value, *units) if value and len(units) == 1 else (text, "")
