import json

import pytest
from golden import FILE, of_this_machine


def test_bits_are_those_of_the_golden_records():
    where, answers = of_this_machine()
    kept = json.loads(FILE.read_text())
    if where not in kept:
        pytest.skip(f"there are no golden records of {where}: python tests/golden.py --write")
    assert answers == kept[where]
