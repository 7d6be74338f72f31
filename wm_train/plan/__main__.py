"""Plan every selected stage: `python -m wm_train.plan`."""

import sys

from launch.screen import print_result
from wm_train.plan.report import main

if __name__ == "__main__":
    sys.exit(print_result(main))
