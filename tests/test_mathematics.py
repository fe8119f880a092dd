"""Mathematics: the grader (what is in the box, what is paid and what is not) and the data sets. If the folder VPD_SAMPLE_DATA
holds math/ (the evaluation sets), their answers must equal themselves."""

import functools
import os
import random
import re
import signal
import time
from pathlib import Path

import datasets
import pytest
from test_tasks import one_sandbox, refused, write

import tasks
from tasks import Outcome, Problem, algebra, mathematics
from tasks.answers import boxed, compare
from tasks.sandbox import Result, Sandbox

FIXTURES = Path(tasks.__file__).parent / "fixtures"
SAMPLES = Path(os.environ.get("VPD_SAMPLE_DATA") or "nowhere") / "math"


@pytest.fixture(scope="module")
def sandbox():
    with one_sandbox(mathematics) as noted:
        yield noted


@pytest.fixture(scope="module")
def task(sandbox):
    return tasks.read("math", str(FIXTURES / "math500.jsonl"))


def graded(task, *pairs: tuple[str, str]) -> list[str]:
    """Verdicts on boxed answers."""
    outcomes = task.verify([Problem("p", [], gold) for gold, _ in pairs], [f"So \\boxed{{{a}}}." for _, a in pairs])
    assert all(o.reward == (o.verdict == "correct") and o.feedback == "" for o in outcomes)
    return [o.verdict for o in outcomes]


@pytest.fixture(scope="module", autouse=True)
def read_once():
    """Reads each text once, because reading takes most of a comparison's time. here() uses SIGVTALRM as KeyboardInterrupt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(algebra, "read", functools.cache(algebra.read))
        before = signal.signal(signal.SIGVTALRM, signal.default_int_handler)
        yield
        signal.signal(signal.SIGVTALRM, before)


def here(gold: str, answer: str, seconds: float = 3.0) -> str:
    """The verdict without a sandbox; `seconds` limits the CPU time of each comparison."""

    def equal(left: str, right: str) -> str:
        try:
            try:
                signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
                return "correct" if algebra.equal(left, right) else "wrong"
            finally:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)  # the signal may still arrive here
        except KeyboardInterrupt:
            return "time-out"
        except Exception:
            return "unreadable"

    return compare(gold, answer, equal)


# ---- The box ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, found", [
    (r"so $\boxed{ 5 }$.", "5"), (r"\boxed {5}", "5"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{\boxed{5}}", "5"),
    (r"\boxed{1} then \boxed{2}", "2"), (r"\boxed{1} then \boxed{2", "1"), (r"\boxed{1} then \boxed{\boxed{2", "1"),
    (r"\boxed{1 then \boxed{2}", "2"), (r"\boxed{\{1, 2\}}", r"\{1, 2\}"), (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
    (r"\boxed{a\\{b}}", r"a\\{b}"),  # an escaped backslash, then a brace that counts
    (r"} \boxed{5} }", "5"), (r"{\boxed{5}", "5"), (r"\boxed{}", ""), ("\\boxed{1\n2}", "1\n2"), (r"\fbox{5}", "5"),
    (r"\boxed{4}, so \fbox{5}", "5"), (r"$\boxed 5$", "5"), (r"$\boxed5$", "5"), (r"$\boxed \frac{1}{2}$", r"\frac{1}{2}"),
    (r"\boxed{5}, by \boxed as asked", "5"),  # one with braces is meant
    (r"boxed{5}", None), (r"\boxedmath{5}", None), (r"\boxed{5", None), (r"\boxed{5\}", None), ("5", None), ("", None),
    # Hostile text, which takes one pass as well.
    (r"\boxed{" * 20_000, None), (r"\boxed{7}" + r"\boxed{" * 20_000, "7"), (r"\boxed{" * 20_000 + "7" + "}" * 20_000, "7"),
    (r"\boxed" + " " * 100_000, None), (r"\boxed" * 20_000, None), (r"\boxed " + "{" * 100_000, None), ("\\" * 100_001, None),
    ("{" * 100_000 + r"\boxed{7}" + "}" * 100_000, "7"),
])  # fmt: skip
def test_the_answer_is_in_the_last_box_that_closes_and_is_found_fast(text, found):
    start = time.process_time()
    assert boxed(text) == found
    assert time.process_time() - start < 2


# ---- What is paid -------------------------------------------------------------------------------------------------

# gold answer -> what is right for it, and what is not: one line for each kind that some grader has got wrong
PAID = {
    "5": r"5. | $5$ | {5} | \(5\) | 5.00 | 05 | (5) | x=5 | 5=x | m+n=2+3=5 | \approx 5 | x\approx5 | `5` | 5\; | 5\ "
    r" | \therefore 5 | Answer: 5 | \text{The answer is }$5$ | \text{Answer: }5 | \color{red}5 | \text{The answer is: 5}"
    r" | \text{about }5 | \Large 5 | __5__ | f(2)=5 | P(X=2)=5 | 5_{\text{ten}}",
    "17": r"\boldsymbol{17} | {\bf 17} | \mathbf{17} | \textbf{17} | \text{17} | \bf 17 | \textcolor{red}{17} | **17**",
    "27.0": r"27 | \textbf{(C)}\ 27 | (C) 27 | \text{(C) } 27 | \mathbf{(C)}~27 | \textbf{C}\ 27 | x=27",
    "58,500": r"58500 | x=58,500 | 58{,}500 | 58\,500 | 58,\!500 | \$58,500 | N = 58,500.00",
    "6": r"2(3) | (2)(3) | 1(2)(3) | 12(\frac12) | 12\left(\frac{1}{2}\right) | 12(1/2)",  # a product, not 2 + 3
    "1500000": r"1.5\text{ million} | 1.5\times10^6 | 1.5e6 | 1.5E+6 | 1,500,000 | \$1.5\text{ million}",
    "60": r"5\text{ dozen} | 5 dozen",
    r"\frac{13}{4}": r"3 1/4 | 3\frac14 | 3\ \tfrac{1}{4} | 3.25 | 13/4 | \mathbf{\dfrac{13}{4}} | 3+\frac14 | "
    r"3\text{ }\frac14 | 3 1/4\text{ hours} | 3¼ | 325\% | \frac {13} 4 | \nicefrac{13}{4}",
    r"-\frac{13}{4}": r"-3 1/4 | -3\frac{1}{4} | \frac{-13}{4} | \frac{13}{-4} | -3.25",
    r"(\frac{13}{4},2)": r"(3 1/4, 2) | \bigl(3\frac14,2\bigr) | \left(\frac{13}{4},2\right) | x=3.25,y=2 | "
    r"\langle 13/4,2\rangle",
    r"\frac{1}{6}": r"0.1\overline{6} | \frac{2}{12} | 1:6 | 6^{-1} | \frac16\approx0.167",
    "3": r"\log_2 8 | \log_28 | \ln e^3 | \sqrt[3]{27} | \lfloor\pi\rfloor | \binom31 | {3 \choose 1} | \lg 1000 | 3 cm | "
    r"3\text{ apples}",
    "2x": r"f'(x)=2x | 2\cdot x", r"\frac{1}{\sqrt{m}}": r"\sqrt{1/m} | \sqrt{\frac1m} | \frac{\sqrt m}{m} | m^{-1/2} | m^{-0.5}",
    "14 - i": r"14.0 + -1.0i | -i+14 | 14-\mathrm{i} | (4-i)+10", r"\ln 5": r"\log_e 5 | \log_{e}5 | -\ln\frac15",
    "2e": r"2\mathrm{e} | e+e | \mathrm{e}\cdot 2",
    r"\text{June 20}": r"June 20 | \textbf{June 20} | june 20 | \text{June 20.} | \mathrm{June\ 20}",
    r"\text{(C)}": r"C | c | (C) | \textbf{(C)} | \mathrm{C} | C. | (C) 27",
    r"35\text{ cm}": r"35 | 35cm | 35 cm | 35\,\mathrm{cm} | 35\text{ centimeters} | 35~\text{cm}",
    r"864 \mbox{ inches}^2": r"864 | 864\text{ in}^2 | 864\text{ square inches} | 864 square inches | "
    r"864\,\mathrm{in^2}",
    r"\$36": r"36 | \$36.00 | 36\text{ dollars} | $36 | 36 dollars | USD 36 | 36 USD",
    r"90^\circ": r"90 | 90° | 90\text{ degrees} | 90^{\circ} | 90\degree | \frac{\pi}{2} | \frac{\pi}{2}\text{ radians}",
    r"25\%": r"25 | 0.25 | \frac14 | 25\text{ percent} | 25%", "0.25": r"25\% | 1/4 | .25 | 2.5\cdot10^{-1}",
    r"\text{3 p.m.}": r"3 p.m. | 3\text{ PM} | 3 pm", "2:3": r"2/3 | 4:6 | 2{:}3 | 2\colon 3 | 2\text{ to }3 | 2 to 3 | 10:15",
    "10:30": r"10{:}30", r"\frac34\pi": r"3/4\pi | 3\pi/4", r"\frac{\sqrt3}{2}": r"1/2\sqrt3", r"\frac{\ln3}{2}": r"1/2\ln3",
    r"5\text{ ft }6\text{ in}": r"5 ft 6 in | \text{5 ft 6 in}",
    r"\frac{\pi}{4}": r"\operatorname{arctan}(1) | \tan^{-1}1 | \frac\pi4 | 45^\circ | pi/4",
    r"\frac13": r"0.\overline{3} | .\bar3 | 33\frac13\% | 0.\dot3",
    "4210_{5}": r"4210_5 | (4210)_5 | \mathbf{4210}_{5} | 4210 | 4210_{\text{five}}",
    r"\text{AB}_{16}": r"AB_{16} | (AB)_{16} | AB",
    r"(2,\infty)": r"(2,+\infty) | x>2 | 2<x | 2 < x < \infty | \{x\mid x>2\} | \bigl(2,\infty\bigr) | (2, infinity)",
    "(3,4]": r"3<x\le4 | 4\geq x>3 | \{x : 3<x\leq 4\} | x\in(3,4] | (3, 2^2] | ]3,4] | x\in]3,4]",
    "(3,4)": r"]3,4[ | x=3,y=4 | x=3\text{ and }y=4", r"[0,1+\sqrt2]\cup[3,4]": r"[3,4]\cup[0,\frac{1}{\sqrt2-1}]",
    r"[0,1+\sqrt2]": r"[0,\frac{1}{\sqrt2-1}]",
    r"(-\infty,2)\cup(3,\infty)": r"x<2\text{ or }x>3 | (3,\infty)\cup(-\infty,2) | x<2 or x>3 | ]-\infty,2[\cup]3,\infty[",
    r"(-\infty,2]\cup[3,\infty)": r"[3,\infty)\cup(-\infty,2] | (-\infty,2]\text{ or }[3,\infty)",
    r"(-\infty,0)\cup(0,\infty)": r"\mathbb{R}\setminus\{0\} | x\neq0 | \mathbb{R}-\{0\} | \{x\in\mathbb{R}\mid x\ne0\}",
    r"(-2,1)\cup(1,\infty)": r"x>-2, x\neq1 | x>-2\text{ and }x\ne1", r"(0,\infty)": r"\mathbb{R}^+ | \mathbb{R}_{>0}",
    r"x \in [-2,7]": r"[-2,7] | -2\le x\le7 | x\in[-2, 7]",
    "1,-2": r"-2, 1 | \{1,-2\} | \lbrace1,-2\rbrace | x=1\text{ or }x=-2 | 1 and -2 | x=1, x=-2",
    r"1\pm\sqrt{19}": r"1+\sqrt{19}, 1-\sqrt{19} | x=1\pm\sqrt{19} | \frac{2\pm2\sqrt{19}}{2}",
    "(1,-2)": r"1,-2 | (1, -2) | (x,y)=(1,-2) | x=1,y=-2 | y=-2, x=1 | （1，-2）", "x=5": r"5 | 5=x | 2x=10",
    "x=3, y=4": r"(3,4) | (x,y)=(3,4) | y=4,x=3 | 3,4", "(a,b)=(5,7)": r"(5,7) | a=5,b=7 | b=7,a=5",
    "y=2x+3": r"2x+3 | y-2x=3 | y = 3+2x | f(x)=2x+3", "x^2+y^2=4": r"2x^2+2y^2=8 | x^2=4-y^2",
    r"x+y\le4": r"2x+2y\le8 | 4\ge x+y | -x-y\ge-4", "(a+5)(b+2)": r"ab+2a+5b+10 | (b+2)(5+a)",
    "x^2-1": r"x²-1 | (x+1)(x-1) | x**2-1", r"\sqrt[3]{2}": r"\sqrt[3]2 | 2^{1/3}", r"2\sqrt{3}": r"2\sqrt(3) | 2*sqrt(3) | 2√3",
    r"12\text{ m/s}": r"12 | 12 m/s | 12\text{ meters per second} | 12\text{ m}/\text{s} | 12\frac{\text{m}}{\text{s}}",
    r"9.8\text{ m/s}^2": r"9.8\ \frac{\text{m}}{\text{s}^2}",
    **{rf"6\text{{ {unit}}}": " | ".join(rf"6\text{{ {word}}} | 6 {word}" for word in words.split()) for unit, words in (
        ("kg", "kilograms"), ("mL", "milliliters millilitres"), ("min", "minutes"), ("ft", "feet foot"), ("yd", "yards"),
    )},
    r"60\text{ mi/h}": r"60\text{ miles per hour} | 60 mph | 60\text{ mi/hr}", r"\frac12\%": r"0.5\% | 0.005 | \frac{1}{200}",
    r"\begin{pmatrix}-1/3\\2/3\end{pmatrix}": r"\begin{bmatrix}-\frac13\\\frac23\end{bmatrix} | "
    r"\frac13\begin{pmatrix}-1\\2\end{pmatrix}",
    r"\infty": r"+\infty | \text{infinity} | ∞ | 2\infty", r"-\infty": r"-\infty | -∞",
    r"\emptyset": r"\varnothing | \{\} | \{\ \}",
    r"\mathbb{R}": r"(-\infty,\infty) | x\in\mathbb{R} | \mathbb R | ℝ | \text{all real numbers}", r"\text{ellipse}": "an ellipse",
    r"\max(a,b)": r"\max(a,b)", "(-1)^n": r"\cos(n\pi) | (-1)^{n+2}", r"\cot x": r"\frac{\cos x}{\sin x} | \cot(x)",
}  # fmt: skip
REFUSED = {
    "5": r"5\text{ million} | 5\text{ or }6 | \text{at most }5 | 3=5 | 5>3 | \pm5 | \{3,5\} | 5x | x | "
    r"\text{five} | 5 hundred | 5,5 | 2x-y=5 | 2x=5 | 2(3) | 5:1:1 | 5' | 5\text{ dozen} | 5+0^0-1",
    "2": r"(1)(1) | 1(1)", "(1,2)": r"x=1,x=2 | y=1,y=2 | x>1 \text{ and } y<2 | (x,y)=(1,2,3) | 1 or 2",
    r"\frac73": r"2(1/3) | 2\left(\frac13\right) | (2)\frac13", "1:2:3": r"1:2:4 | \frac16 | 1:6",
    r"5\text{ ft }6\text{ in}": r"6\text{ ft }5\text{ in} | 5 ft 5 in | 30\text{ ft in} | 11\text{ in}", "10:05": r"2 | 4:02",
    "10:30": r"\frac13 | 1:3 | 20:60 | 1/3", "x=3, y=4": r"(4,3) | \{3,4\} | x=4,y=3 | x=3,z=4", "f(x)=2x+1": "x=2x+1",
    r"\frac{3}{4\pi}": r"3/4\pi", "1E4_{16}": "10000", r"\text{AB}_{16}": r"171 | AC_{16} | AB_{15}",
    r"(0,\infty)": r"(\frac{1}{\infty},\infty)", r"\frac10": r"\frac20 | \tan 90^\circ", "3:00": r"4:00 | \frac10 | 3",
    "0": r"10^{-20} | 1e-31 | \frac{1}{\infty} | e^{-\infty} | \log_0 5 | \frac{5}{\log 0} | \binom{0}{\infty} | "
    r"\emptyset",
    "1": r"3 1/4 | 5 1/2 | \infty^0 | \frac{\infty}{\infty} | \frac00 | 2/2\% | 1+10^{-50} | 0.9999999999 | \int_0^1 dx"
    r" | \sin\infty | 0^0 | (2-2)^{1-1}",
    "3": r"3 1/2 | \max(3,1) | \lim_{x\to3}x | \sum_{k=1}^2k | \log_2 9 | \approx3.0001 | x>3 | [3,\infty) | "
    r"3_{4} | 3_\pi",
    r"\frac13": r"10:30 | 0.3333333333333333 | \approx0.333 | \frac13\% | \frac13\text{ or }1",
    r"\sqrt{2}": r"1.414213562373095048801688724209698 | \sqrt{2+10^{-50}} | \approx 1.414 | \frac{99}{70}",
    r"\frac{1}{2^{61}}": r"\frac{1}{2^{60}} | 2^{-62} | 0", r"\frac{1}{1500!}": r"\frac{1}{1502!} | 0",
    r"\frac{2^{100}+1}{3\cdot 2^{101}}": r"\frac16 | \frac{1}{3\cdot 2^{101}}", "10^{100}": "10^{100}+1",
    "12": r"1 2 | 12_{3} | 12_3 | 1,2 | 12x", "58500": r"58, 500 | x=58,50 | 58.500",
    "52_8": r"52_9 | 53_8 | 42 | 52_{10} | 52_\pi",
    r"35\text{ cm}": r"35\text{ m} | 35 m | 35\text{ cm}^2 | 35\text{ inches} | 35^\circ | 35\% | \$35 | 36 cm",
    r"35\text{ m}": r"35\text{ miles} | 35\text{ min} | 35\text{ km}",
    r"15\mbox{ cm}^2": r"15\text{ cm} | 15\text{ cm}^3 | 15\text{ m}^2", r"5.4 \text{ cents}": r"\$5.4 | 5.4\text{ dollars} | €5.4",
    r"60\text{ km/h}": r"60\text{ mph} | 60\text{ km}", r"30^\circ\text{C}": r"30^\circ\text{F} | 31^\circ C",
    r"90^\circ": r"91^\circ | 90\% | 90\text{ radians} | 90\text{ cm}", r"\frac{\pi}{6}": r"\frac{\pi}{6}^\circ | 30",
    "0.25": r"25 | 0.25\%", r"\text{June 20}": r"June 21 | 20 | \text{June}",
    r"\text{east}": r"\text{west} | e a s t | e\cdot a\cdot s\cdot t", r"\text{(C)}": r"D | (D) 27 | A, C | 27",
    r"(2,\infty)": r"(2,\infty] | 2\text{ or }\infty | [2,\infty) | x\ge2 | 2<x\le\infty",
    r"(-\infty,4]": r"[-\infty,4] | (-\infty,4) | x<4", "(3,4]": r"(3,4) | 3<x<4 | [3,4] | 3,4 | 3\le x\le4 | 3\le x<4",
    "1,-2": r"(1,-2) | 1 | 1,2 | 1,-2,-2 | 1,-2,3", "(1,-2)": r"[1,-2] | y=1,x=-2 | (1,-2,3) | (-2,1) | \{1,-2\} | -2,1",
    "x>2": r"y>2 | x\ge2 | x<2 | 2", "x=5": r"y=5 | x=6 | x=x", r"\{2,4,6,\ldots\}": r"\{2,4,6\} | 2,4,6",
    r"12\text{ m/s}": r"12\text{ m} | 12 km/h | 12\text{ m/s}^2", "y=2x+3": r"y'=2x+3 | y=2x+4 | z=2x+3 | 0=0 | y=y",
    "x^2+y^2=4": r"x^2+y^2=5 | 4 | 0=0 | x^2+y^2\le4", r"x+y\le4": r"x+y\ge4 | x+y<4 | x+2y\le4 | x+y=4",
    "x": r"|x| | x(1+10^{-200}) | x+10^{-20} | \sqrt{x^2} | y", r"\frac{n(n+1)}{2}": r"\sum_{k=1}^nk | \frac{n(n-1)}{2}",
    r"\begin{pmatrix}1\\2\end{pmatrix}": r"\begin{pmatrix}1&2\end{pmatrix} | \begin{pmatrix}2\\1\end{pmatrix} | (1,2)",
    r"\infty": r"-\infty | 5 | \frac10 | \infty-\infty | \max(\infty,1) | (2,\infty)",
    r"\emptyset": r"0 | \{0\} | \{\emptyset\} | [\log(\infty),\infty] | (x,y)=5",
    r"\mathbb{R}": r"-\infty,\infty | [-\infty,\ln(\infty)] | x\ne\frac{\infty}{\infty} | x\ge0",
    r"-\frac{11}{4}": r"-3 1/4 | -3\frac14",
}  # fmt: skip


@pytest.mark.parametrize("gold", PAID)
def test_a_right_answer_is_paid_in_every_form(gold):
    assert [answer for answer in [gold, *PAID[gold].split(" | ")] if here(gold, answer) != "correct"] == []


@pytest.mark.parametrize("gold", REFUSED)
def test_a_wrong_answer_is_not_paid(gold):
    assert [answer for answer in REFUSED[gold].split(" | ") if here(gold, answer) == "correct"] == []


GOLDS = (  # no two of them have the same value
    r"113 735 -3 27.0 0 1 \frac{14}{3} 0.15 .0000672 \sqrt{51} 2\pi -\frac{\pi}{6} \frac{1}{1500!} 2^{100} e 3+5i "
    r"\infty -\infty x=5 y=2x+3 5x-7y=4 2k+2 \cot(x) (a+5)(b+2) 5r^5 1,-2 3,5,7 1\pm\sqrt{19} (6,31,-1) (-2,1) "
    r"(3,\frac{\pi}{2}) (2,\infty) (-\infty,4] [0,9)\cup(9,36] x\in[-2,7] \{4\} \emptyset \mathbb{R} x>12 "
    r"\begin{pmatrix}-7\\16\end{pmatrix} \text{east} 52_8 35\text{cm} \$36 90^\circ 12\% 1\frac{4}{5} 58,500"
).split()
ATOMS = [*"0 1 2 3 5 10 x i e k 0.5".split(), r"\pi", r"\infty", r"\infty", r"-\infty"]
FORMS = (  # A and B are expressions
    r"A+B A-B A\cdotB \frac{A}{B} {A}^{B} -A (A) \sqrt{A} |A| \lfloorA\rfloor \lceilA\rceil A! \log(A) \ln(A) "
    r"\tan(A) \sin(A) \arctan(A) \log_{A}(B) \binom{A}{B} \max(A,B) \min(A,B) \gcd(A,B) \sum_{k=A}^{B}k "
    r"\prod_{k=A}^{B}k \int_{A}^{B}xdx \lim_{x\toA}B \frac{d}{dx}A \Gamma(A) \begin{vmatrix}A&B\\B&A\end{vmatrix} "
    r"A\% A^\circ f(A) \sqrt[A]{B} \exp(A) A\bmodB"
).split()
WHOLES = (
    r"A A A x=A A=B A=A [A,B] (A,B) [A,B) (A,B] A,B \{A,B\} \{A\} A\text{cm} A\text{B} A_{B} A<x<B x\geA A>B x\neA "
    r"[A,B]\cup[B,A] \pmA A\pmB \begin{pmatrix}A\\B\end{pmatrix} \mathbb{R}\setminus\{A\} (A,B)\cap(B,A) x\in[A,B] "
    r"A\approxB \text{A}=B A:B f(x)=A x\toA A\subsetB \{A\}\subset\{A,B\} \{x\midx>A\} A\ B A/B \boxed{A} "
    r"\text{east}A (C)A A\text{or}B \$A"
).split()


def fill(rng: random.Random, forms: list[str], depth: int) -> str:
    """One of the forms with expressions for A and B, nested up to `depth`."""

    def part(_) -> str:
        return " " + (fill(rng, FORMS, depth - 1) if depth and rng.random() < 0.8 else rng.choice(ATOMS))

    return re.sub("[AB]", part, rng.choice(forms))


def spoil(rng: random.Random, text: str) -> str:
    """One step away: something put in, left out or exchanged."""
    at, new = rng.randrange(len(text) + 1), rng.choice([*ATOMS, *"()[]{},=<_^%$.+-|", r"\text{ m}", r"\pm", "}"])
    return text[:at] + rng.choice(["", new, new]) + text[at + rng.randint(0, 1) :]


WITHOUT_VALUE = r"\max(\infty,1) x=\max(\infty,1) [\log(\infty),\infty] \tan(\pi/2) \frac00 \frac10".split()


def test_every_gold_answer_equals_itself_and_nothing_else():
    assert [(g, a) for g in GOLDS for a in GOLDS + WITHOUT_VALUE if (here(g, a) == "correct") != (g == a)] == []


@pytest.mark.slow
def test_no_random_answer_is_paid_for_two_gold_answers():
    rng = random.Random(0)
    for _ in range(1500):
        answer = fill(rng, WHOLES, 2)[:200]
        answer = spoil(rng, answer) if rng.random() < 0.15 else answer
        paid = []
        for gold in GOLDS:
            verdict = here(gold, answer, 0.4)
            paid += [gold] if verdict == "correct" else []
            if verdict == "time-out":  # so it will be for the others
                break
        assert len(paid) < 2, (answer, paid)


def test_plain_answers_never_reach_the_sandbox(task, sandbox):
    sandbox.asked.clear()
    pairs = [("5", "5"), ("5", "6"), ("27.0", "27"), ("(0,2]", "(0, 2]"), ("5", "x" * 201), ("x" * 300, "x" * 300)]
    assert graded(task, *pairs) == ["correct", "wrong", "correct", "correct", "too long", "correct"]
    for response in ("five", "\\boxed{}", "\\boxed{ }"):
        assert task.verify([Problem("p", [], "5")], [response]) == [Outcome(0, "no answer")]
    assert sandbox.asked == []


@pytest.mark.parametrize("answer", ["10^{10^{10}}", "100000000!", "(" * 90 + "5" + ")" * 90])
def test_a_hostile_answer_costs_seconds_and_the_next_is_graded(answer, task):
    start = time.monotonic()
    assert graded(task, ("5", answer))[0] in ("time-out", "unreadable", "wrong")
    assert time.monotonic() - start < 20  # 2.5; on a busy machine a worker takes its time to start
    assert graded(task, *[(r"\frac{7}{2}", f"{7 * i}/{2 * i}") for i in range(1, 4)]) == ["correct"] * 3


LATE, FAILED = Result("timeout"), Result("internal", error="the worker died twice")


@pytest.mark.parametrize("results, verdicts", [  # of the sandbox, one a question; of an answer graded again and again
    ([LATE, LATE, Result("ok", value=True)], ["time-out"] * 2 + ["correct"] * 2),  # a busy machine must not settle an answer
    ([LATE] * 3, ["time-out"] * 5),  # nor a hostile answer cost seconds for ever
    ([FAILED] * 4 + [Result("ok", value=True)], ["internal"] * 4 + ["correct"] * 2),
    ([Result("error", error="ValueError: x")], ["unreadable"] * 2), ([Result("memory")], ["unreadable"] * 2),
    ([Result("ok", value="yes")], ["wrong"] * 2), ([Result("ok", value=1)], ["wrong"] * 2),
])  # fmt: skip
def test_verdicts_are_cached_except_internal_ones_and_two_time_outs(results, verdicts, task, monkeypatch):
    asked, pair = [], ("z", f"z+{time.monotonic_ns()}")  # a new one
    monkeypatch.setattr(Sandbox, "call", lambda *question: asked.append(question[3]) or results[len(asked) - 1])
    assert [verdict for _ in verdicts for verdict in graded(task, pair)] == verdicts
    assert asked == [[*pair]] * len(results)


# ---- The data sets ------------------------------------------------------------------------------------------------


def fixture_rows(name: str) -> list[dict]:
    return list(tasks.rows(FIXTURES / f"{name}.jsonl"))


DAPO_TRAIN = [  # of the fixture: two rows are doubles, one problem has two answers, one stands in MATH-500
    ("Solve $x + 3 = 10$ for $x$.", "7"), ("What is $2^5$?", "32"), (r"Remember: what is $6 \cdot 7$?", "42"),
    ("What is $9 - 12$?", "-3"), ("Compute $100 / 4$.", "25"),
]  # fmt: skip
TESTS = [
    ("math500", "test/algebra/fx1.json", "10"), ("math500", "test/prealgebra/fx2.json", r"\frac{1}{6}"),
    ("math500", "test/algebra/fx3.json", "(0,2]"), ("aime24", "60", "4"), ("aime24", "61", "125"), ("aime25", "0", "50"),
    ("amc23", "0", "27.0"), ("amc23", "1", "36.0"),
]  # fmt: skip


def test_dapo_drops_repeats_conflicts_evaluation_problems_and_its_instruction(sandbox):
    task = tasks.load("math", data=str(FIXTURES))
    assert [(p.data, p.reference) for p in task.train] == DAPO_TRAIN and len({p.id for p in task.train}) == 5
    content = "Solve $x + 3 = 10$ for $x$.\n\nReason step by step and put the final answer in \\boxed{}."
    assert task.train[0].messages == [{"role": "user", "content": content}]
    assert [(p.part, p.id, p.reference) for p in task.test] == TESTS
    assert task.test[6].messages[0]["content"].startswith("What is $3^3$?\n\nReason step by step")
    dropped = "dropped 1 with conflicting answers and 1 that are in an evaluation set; 5 left"
    assert task.notes[0] == f"dapo: 10 rows, 7 unique problems; {dropped}" and task.notes[1].startswith("sandbox: ")
    assert (task.lacks, task.name, task.validation) == (("environment", "solution_first", "both"), "math/dapo", [])
    rewards = [o.reward for o in task.verify(task.test[5:], ["\\boxed{50}", "\\boxed{27}", "\\boxed{27}"])]
    assert rewards == [1, 1, 0] and sandbox.closed == 0
    task.close()
    assert sandbox.closed == 1
    whole = tasks.read("math", str(FIXTURES / "dapo.jsonl")).test  # a file of DAPO's schema
    assert (whole[0].id, whole[0].data, whole[0].reference) == ("dapo-0", *DAPO_TRAIN[0]) and len(whole) == 10


def test_a_dapo_row_without_the_usual_instruction_is_used_and_counted(tmp_path, sandbox):
    rows = fixture_rows("dapo")
    whole = rows[0]["prompt"][0]["content"]
    for bare in ("  How many?\n", whole.split("\n\nRemember")[0], whole.split("problem.\n\n")[1]):
        rows.append({**rows[0], "prompt": [{"content": bare, "role": "user"}]})
    for word, refusal in (("math500.jsonl, aime24.jsonl, aime25.jsonl, amc23.jsonl", "amc23"), ("dapo*.jsonl", "dapo-math-17k")):
        with refused(word):
            tasks.load("math", data=str(tmp_path))
        write(tmp_path / f"{refusal}.jsonl", rows if refusal != "amc23" else fixture_rows("amc23"))
    task = tasks.load("math", data=str(tmp_path))
    assert {p.part for p in task.test} == {"amc23"}  # the other sets are optional
    assert task.train[-1].data == "How many?"
    assert sum(p.data == "Solve $x + 3 = 10$ for $x$." for p in task.train) == 1
    assert task.notes[1].startswith("dapo: 3 rows lack the source's usual instruction")
    assert task.notes[0].startswith("dapo: 13 rows, 8 unique problems; dropped 1 with conflicting answers and 0 that")


def test_the_problems_are_the_same_from_the_hub(sandbox, monkeypatch):
    expected = tasks.load("math", data=str(FIXTURES))
    names = {("BytedTsinghua-SIA/DAPO-Math-17k", "train"): "dapo", ("HuggingFaceH4/MATH-500", "test"): "math500"}
    names |= {(f"math-ai/{name}", "test"): name for name in ("aime24", "aime25", "amc23")}
    tables = {name: datasets.Dataset.from_list(fixture_rows(name)) for name in names.values()}
    monkeypatch.setattr(datasets, "load_dataset", lambda repo, split: tables[names[repo, split]])
    monkeypatch.setattr("harness.hub.unreachable", lambda *_: "")
    task = tasks.load("math")
    assert (task.train, task.test, task.notes) == (expected.train, expected.test, expected.notes)


NO_ANSWER = "the problem must be text and the answer text or a number"


@pytest.mark.parametrize("row, words", [
    ({"problem": "?", "answer": " "}, "column answer or solution is missing"), ({"problem": ["?"], "answer": "5"}, NO_ANSWER),
    *(({"problem": "?", "answer": answer}, NO_ANSWER) for answer in (["5"], {"value": "5"}, [], True, [["5"]])),
    ({"prompt": [{"content": "?"}], "reward_model": {"ground_truth": ["5"]}}, NO_ANSWER),
    ({"prompt": [{"content": "?"}]}, "column problem or question is missing"),
])  # fmt: skip
def test_a_row_without_a_problem_and_an_answer_is_refused(row, words, tmp_path):
    with refused(f"row 1: {words}"):
        tasks.read("math", write(tmp_path / "x.jsonl", [row]))
    if "prompt" in row:  # to train on
        datasets.Dataset.from_list([row]).to_parquet(str(tmp_path / "dapo.parquet"))
        write(tmp_path / "amc23.jsonl", fixture_rows("amc23"))
        with refused(f"row 1: {words}"):
            tasks.load("math", data=str(tmp_path))


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="VPD_SAMPLE_DATA names no folder with math/")
@pytest.mark.parametrize("name, count", [("math500", 500), ("aime24", 30), ("aime25", 30), ("amc23", 40)])
def test_published_answers_equal_themselves_as_text_and_by_algebra(name, count, sandbox):
    task = tasks.read("math", str(SAMPLES / f"{name}.jsonl"))
    sandbox.asked.clear()
    outcomes = task.verify(task.test, [f"First \\boxed{{0}}, so \\boxed{{{p.reference}}}." for p in task.test])
    assert [o.verdict for o in outcomes] == ["correct"] * count and sandbox.asked == []
    values = {p.reference for p in task.test if not re.search(r"\\(text|mbox|\$|!)", p.reference)}
    assert [gold for gold in values if not algebra.equal(gold, gold)] == []
