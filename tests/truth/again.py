"""Run one case again, the one that a failure prints: python tests/truth/again.py "Case(kind='heads', variant='cosine')"."""

import sys

from adversary import Case
from all_kinds import KINDS

if __name__ == "__main__":
    case: Case = eval(sys.argv[1], {"Case": Case})
    print(next(kind for kind in KINDS if kind.name == case.kind).check(case))
