"""Plan every selected stage: `python -m wm_train.plan`."""

import os
import sys
from functools import partial

from launch.screen import print_result
from wm_train.plan.report import main

MOST = 4  # processes that rehearse at once; each needs about 700 MB

if __name__ == "__main__":
    processes = min(MOST, len(os.sched_getaffinity(0)))
    sys.exit(print_result(partial(main, processes=processes)))
