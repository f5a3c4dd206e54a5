"""How much of what PEFT's own tests expect holds under the name peft.

    python -m tests.reference                          # a part of them, on PEFT and on veneer
    python -m tests.reference --part 1 test_mixed      # all of one file
    python -m tests.reference --show test_mixed        # and what fails

The tests come with PEFT's source distribution, which is fetched once from the package index. They look for small models
on the hub; `stand_ins` builds some of the same kinds in a cache beside them. A test counts where PEFT itself passes it
here: the others want a network, a GPU, or weights that were trained.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
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


def run(library: str, file: Path, part: int) -> dict[str, str]:
    """What came of each test of a file: "passed", "skipped", or the first line of what went wrong."""
    report = HOME / f"{library}-{file.stem}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-p", "tests.reference.plugin", "-p", "no:cacheprovider", "-q"]
    command += ["-n", "2", "--tb=line", "--rootdir", str(HOME), "-c", os.devnull, "--junitxml", str(report), str(file)]
    how = environment(REFERENCE_LIBRARY=library, REFERENCE_PART=str(part))
    subprocess.run(command, cwd=HOME, env=how, capture_output=True, check=False)
    if not report.is_file():
        return {}
    return {f"{c.get('classname')}::{c.get('name')}": _outcome(c) for c in ElementTree.parse(report).iter("testcase")}


def _outcome(case: ElementTree.Element) -> str:
    wrong = next((found for kind in ("failure", "error") if (found := case.find(kind)) is not None), None)
    if wrong is not None:
        return re.sub(r"0x[0-9a-f]+", "0x", (wrong.get("message") or "failed").strip().split("\n")[0])[:200]
    return "skipped" if case.find("skipped") is not None else "passed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="names of files, without .py; none: all")
    parser.add_argument("--part", type=int, default=12, help="run one in so many tests of files with over a thousand")
    parser.add_argument("--show", action="store_true", help="what fails, the commonest first")
    given = parser.parse_args()
    total: Counter[str] = Counter()
    for file in prepare():
        if given.files and file.stem not in given.files:
            continue
        expected, found = (run(library, file, given.part) for library in ("peft", "veneer"))
        passing = [name for name, outcome in expected.items() if outcome == "passed"]
        failing = [name for name in passing if found.get(name) != "passed"]
        total.update(passed=len(passing) - len(failing), of=len(passing))
        print(f"{file.stem:40s} {len(passing) - len(failing):5d} of {len(passing):5d}", flush=True)
        if given.show:
            reasons = Counter((name.split("[")[0].rpartition("::")[2], found.get(name, "not run")) for name in failing)
            for (test, reason), count in reasons.most_common():
                print(f"    {count:4d} {test}: {reason}")
    print(f"{'all':40s} {total['passed']:5d} of {total['of']:5d}")


if __name__ == "__main__":
    main()
