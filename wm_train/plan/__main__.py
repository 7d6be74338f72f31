"""Plan every selected stage: `python -m wm_train.plan`."""

import sys

from wm_train.plan.report import main

if __name__ == "__main__":
    sys.exit(main())
