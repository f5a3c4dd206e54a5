"""How much of what PEFT's own tests expect holds under the name peft.

    python -m tests.reference                          # a part of them, on PEFT and on veneer
    python -m tests.reference --part 1 test_mixed      # all of one file
    python -m tests.reference --show test_mixed        # and what fails

The tests come with PEFT's source distribution, which is fetched once from the package index. They look for small models
on the hub; `stand_ins` builds some of the same kinds in a cache beside them. A test counts where PEFT itself passes it
here: the others want a network, a GPU, or weights that were trained. A file that does not import on veneer fails whole.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

from veneer.dropin.tables.methods import VERSION

from .. import room

ROOT = Path(__file__).parent.parent.parent
HOME = ROOT / "build" / "reference"
LEFT_OUT = ("gpu", "gptqmodel", "megatron", "hub", "torch_compile", "quantization", "stablediffusion", "vision")
"""Parts of the names of files that want a GPU, a network or other libraries."""


def prepare() -> list[Path]:
    """Fetch and unpack the tests, and build the models; the files there are."""
    folder = HOME / "peft_tests"
    if not folder.is_dir():
        HOME.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
        subprocess.run([*pip, "--no-binary", "peft", f"peft=={VERSION}", "--dest", str(HOME)], check=True)
        with tarfile.open(HOME / f"peft-{VERSION}.tar.gz") as archive:
            archive.extractall(HOME, filter="data")
        (HOME / f"peft-{VERSION}" / "tests").rename(folder)
        (folder / "__init__.py").touch()
        build = [sys.executable, "-m", "tests.reference.stand_ins"]
        subprocess.run(build, check=True, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
    return sorted(p for p in folder.glob("test_*.py") if not any(word in p.name for word in LEFT_OUT))


def environment(**more: str) -> dict[str, str]:
    own = {"HF_HOME": str(HOME / "cache"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | own | {"OMP_NUM_THREADS": "1", "PYTHONPATH": room.PYTHONPATH} | more


def expected(files: list[Path], part: int, few: int) -> dict[str, dict[str, str]]:
    """What comes of each chosen test on PEFT itself, by file; kept for later runs."""
    places = {file.stem: HOME / f"peft-{part}-{few}-{file.stem}.json" for file in files}
    unknown = [file for file in files if not places[file.stem].is_file()]
    if unknown:
        outcomes = run("peft", unknown, REFERENCE_PART=str(part), REFERENCE_FEW=str(few))
        for file in unknown:
            places[file.stem].write_text(json.dumps(of_file(file, outcomes)))
    return {file.stem: json.loads(places[file.stem].read_text()) for file in files}


def on_veneer(files: list[Path], tests: list[str]) -> dict[str, str]:
    """What comes of these tests on veneer."""
    listed = HOME / "tests.json"
    listed.write_text(json.dumps(tests))
    return run("veneer", files, REFERENCE_TESTS=str(listed))


def of_file(file: Path, outcomes: dict[str, str]) -> dict[str, str]:
    return {name: outcome for name, outcome in outcomes.items() if name.split("::")[0].endswith("/" + file.name)}


def run(library: str, files: list[Path], **choice: str) -> dict[str, str]:
    """Run files of tests; what came of each test.

    Raises:
        RuntimeError: pytest itself failed.
    """
    outcomes = HOME / f"{library}.json"
    outcomes.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-p", "tests.reference.plugin", "-p", "no:cacheprovider", "-q"]
    command += ["-n", "2", "--tb=short", "--continue-on-collection-errors", "--rootdir", str(HOME), "-c", os.devnull]
    how = environment(REFERENCE_LIBRARY=library, REFERENCE_OUTCOMES=str(outcomes), **choice)
    done = subprocess.run([*command, *map(str, files)], cwd=HOME, env=how, capture_output=True, text=True, check=False)
    if not outcomes.is_file():
        raise RuntimeError(f"pytest failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return json.loads(outcomes.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="names of files, without .py; none: all")
    parser.add_argument("--part", type=int, default=12, help="run one in so many tests of longer files")
    parser.add_argument("--few", type=int, default=1000, help="files with at most so many tests are run whole")
    parser.add_argument("--show", action="store_true", help="what fails, the commonest first")
    given = parser.parse_args()
    files = [file for file in prepare() if not given.files or file.stem in given.files]
    on_peft = expected(files, given.part, given.few)
    passing = {}
    for file in files:
        passing[file.stem] = [name for name, outcome in on_peft[file.stem].items() if outcome == "passed"]
    outcomes = on_veneer(files, sum(passing.values(), []))
    total: Counter[str] = Counter()
    for file in files:
        expected_here = passing[file.stem]
        failing = [name for name in expected_here if outcomes.get(name) != "passed"]
        passed = len(expected_here) - len(failing)
        total.update(passed=passed, of=len(expected_here))
        print(f"{file.stem:40s} {passed:5d} of {len(expected_here):5d}")
        if given.show:
            show(failing, of_file(file, outcomes))
    print(f"{'all':40s} {total['passed']:5d} of {total['of']:5d}")


def show(failing: list[str], outcomes: dict[str, str]) -> None:
    """Print what fails and why, the commonest first."""
    instead = next((outcome for outcome in outcomes.values() if outcome.startswith("does not import")), "not run")
    reasons = Counter((name.split("[")[0].rpartition("::")[2], outcomes.get(name, instead)) for name in failing)
    for (test, reason), count in reasons.most_common():
        print(f"    {count:4d} {test}: {reason}")


if __name__ == "__main__":
    main()
