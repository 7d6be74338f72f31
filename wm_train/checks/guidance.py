"""Judge the conditions that samplers and teachers are guided by, against model and data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from data_shards.schema import DatasetInfo
from wm_train.config.curriculum import StagePlan
from wm_train.config.kinds import ModelConfig
from wm_train.config.problems import Problem
from wm_train.config.roles import TEACHER

# condition -> the field that a model must read for it
GUIDED = {"camera": "camera", "text": "text", "negative_text": "text", "controls": "controls"}
CONTEXT = "context"
TEXTS = {"text": "null_text", "negative_text": "negative_text"}  # condition -> embedding it needs


def guidance_problems(
    key: str, guidance: Mapping[str, float], model: ModelConfig, who: str
) -> Iterator[Problem]:
    """Yield weights of conditions that cannot be taken away from this model: of a teacher, which
    sees clips as wholes, also the other frames."""
    whole = (CONTEXT,) if who == TEACHER else ()
    for name in guidance:
        if name in whole:
            continue
        if name not in GUIDED:
            rule = f"one of {', '.join((*GUIDED, *whole))}, which can be taken away"
            yield Problem(f"{key}.{name}", "an unknown condition", rule, "leave it out")
        elif GUIDED[name] not in model.needs().fields:
            rule = f"a condition of the {who}, whose model reads no {GUIDED[name]}"
            yield Problem(f"{key}.{name}", name, rule, "leave it out")
    if set(TEXTS) <= set(guidance):
        rule = "text or negative_text, as both stand in the place of the text"
        yield Problem(key, " and ".join(TEXTS), rule, "leave one out")


def guidance_data_problems(plan: StagePlan, info: DatasetInfo) -> Iterator[Problem]:
    """Yield guidance by text where the data set does not say what stands in its place."""
    stage, teacher = plan.config, plan.config.roles.get(TEACHER)
    asked = [("sampler.guidance", stage.sampler.guidance, stage.model)]
    if stage.distill and teacher:
        asked.append(("distill.guidance", stage.distill.guidance, teacher.model))
    if job := stage.trajectories:
        asked.append(("trajectories.guidance", job.guidance, job.teacher.model))
    for key, guidance, model in asked:
        reads = "text" in model.needs().fields  # else reported as such
        for name in (n for n in guidance if reads and n in TEXTS):
            what = TEXTS[name]
            if getattr(info, what) is None:
                said = what.replace("_", " ")
                rule = f"a data set with a {said}, which is seen in the place of the text"
                fix = f"encode it with {what}=<npy>, or leave the weight out"
                yield Problem(f"{key}.{name}", f"no {said} in {info.source}", rule, fix)
