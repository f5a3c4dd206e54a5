"""A sample of the fuzz of `make fuzz`: each mutant of a saved adapter raises a veneer error or loads bit-equal."""

from __future__ import annotations

import pytest

from . import fuzz


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(4))
def test_no_mutant_crashes_or_loads_quietly_wrong(seed: int):
    found = fuzz.fuzz(60, seed)
    assert not found.wrong and found.total == 60
    assert found.refused.total() > 30, "the mutations must be able to do harm"


def test_the_fuzz_sees_what_loads_wrong(tmp_path):
    """A specimen whose file was changed past veneer's notes loads wrong, and is told."""
    specimen = fuzz.Specimen(fuzz.FUZZED[0], tmp_path)
    tensors, _ = fuzz.tensors_of(tmp_path)
    key = sorted(tensors)[0]
    tensors[key] = tensors[key] + 1
    fuzz.keep(tmp_path, tensors, {"format": "pt"})
    assert specimen.try_mutant() == "loaded quietly wrong"
    specimen.restore()
    assert specimen.try_mutant() is None
