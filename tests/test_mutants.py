"""The table of mistakes fits the code."""

from conftest import ROOT
from mutants import MUTANTS, TESTS, applied


def test_every_mistake_can_be_put_in_and_has_tests():
    for mutant in MUTANTS:
        assert applied(mutant) != (ROOT / mutant.file).read_text(), mutant
        assert all(
            (ROOT / f"tests/test_{name}.py").exists() for name in TESTS[mutant.file].split()
        ), mutant
