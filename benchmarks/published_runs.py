"""Compare the plan with published runs, each with its error; misfits stay in the table.

    python benchmarks/published_runs.py

SANA-WM (Tab. 7): days of stages 3 and 4 on 64 H100. The factor of stage 3 over its plan predicts
stage 4. Stages 1 and 2 encode video beside training, so they are no anchor. Llama 3 405B: FLOP/s of
a device at 8,192 and at 16,384 devices; one efficiency from the first, and the bubble of its
pipeline, whose micro-batches halve as the batch stays, predict the second.
"""

from __future__ import annotations

import warnings

from wm_train.backends.hardware import hardware
from wm_train.config.compose import compose
from wm_train.config.curriculum import plan_stages
from wm_train.plan.device_memory import rehearsals_of
from wm_train.plan.latents import Frame
from wm_train.plan.speed.report import DAY_S, mean_seconds, times_of

SANA_DAYS = {"minute_camera": 8.0, "sft": 2.5}  # Tab. 7, "about"
FRAME = Frame(channels=128, height=22, width=40, temporal_stride=8)
# The Llama 3 herd of models, Tab. 4: 16 M tokens a batch, sequences of 8,192, tensor parallel 8,
# pipeline parallel 16
LLAMA_TFLOPS = {8_192: 430.0, 16_384: 400.0}
PIPELINE, TENSOR, SEQUENCES = 16, 8, 2048
LAYERS = 126  # dealt singly over the pipeline again and again: assumed, as the paper has it open


def sana() -> list[tuple[str, float, float]]:
    """Return (what, predicted, published) in seconds a step."""
    words = ["experiment=sana_wm", "stage=3-4", "data.path=elsewhere"]
    device, found, factor = hardware("h100"), [], 1.0
    for plan in plan_stages(compose(words)):
        times = times_of(plan, rehearsals_of(plan, FRAME, "cuda"), device)
        planned, published = mean_seconds(plan, times), SANA_DAYS[plan.stage] * DAY_S
        published /= plan.config.steps
        found.append((f"SANA-WM {plan.stage}, the plan alone", planned, published))
        if len(found) > 1:
            found.append((f"SANA-WM {plan.stage}, corrected", planned * factor, published))
        factor = published / planned
    return found


def llama() -> list[tuple[str, float, float]]:
    """Return (what, predicted, published) in TFLOP/s of a device."""

    def busy(devices: int) -> float:
        """Return the share of time in which a stage of the pipeline computes."""
        replicas = devices // (PIPELINE * TENSOR)
        turns = SEQUENCES // replicas * (LAYERS / PIPELINE)  # micro-batches times own layers
        return turns / (turns + PIPELINE - 1)

    (few, first), (many, second) = LLAMA_TFLOPS.items()
    return [("Llama 3 at 16,384 from 8,192", first * busy(many) / busy(few), second)]


def main() -> None:
    warnings.filterwarnings("ignore")
    print(f"{'':44}{'predicted':>10}{'published':>10}{'error':>8}")
    for what, predicted, published in [*llama(), *sana()]:
        print(f"{what:44}{predicted:10.4g}{published:10.4g}{predicted / published - 1:+8.1%}")


if __name__ == "__main__":
    main()
