"""Run one case again, the one that a failure prints: python tests/truth/again.py "Case(kind='heads', variant='cosine')"."""

import importlib
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from adversary import Case

if __name__ == "__main__":
    case: Case = eval(sys.argv[1], {"Case": Case})
    kind = importlib.import_module(f"kind_{case.kind}").KIND
    print(kind.check(case))
