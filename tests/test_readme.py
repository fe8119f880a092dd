"""What README names exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_test_that_the_readme_cites_exists():
    cited = set(re.findall(r"`(test_\w+)`", (ROOT / "README.md").read_text()))
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(cited) > 15
    assert {name for name in cited if f"def {name}(" not in tests} == set()
