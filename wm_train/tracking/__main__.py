"""Send a stage's record to MLflow again: `python -m wm_train.tracking replay <folder>`."""

import sys

from launch.screen import print_result
from wm_train.tracking.tracker import main

if __name__ == "__main__":
    sys.exit(print_result(main))
