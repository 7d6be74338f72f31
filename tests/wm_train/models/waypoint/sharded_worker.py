"""One process of the sharding test: `sharded_worker.py <cp> <file>`; rank 0 saves loss, gradients
and the number of elements that all processes hold."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from parallel.degrees import MeshDegrees
from parallel.layout import ClipLayout
from parallel.mesh import build_mesh
from parallel.sequence import make_sequence
from parallel.sharding import shard_model
from wm_train.backends import get_backend
from wm_train.boxes import local_tensor, whole_tensor
from wm_train.models.examples import ExampleShape, example_conditions, example_latents
from wm_train.models.init import Rule, initialise_
from wm_train.models.waypoint.config import WaypointConfig
from wm_train.models.waypoint.model import Waypoint
from wm_train.noise import NoiseKey
from wm_train.objectives.clips import Clips
from wm_train.objectives.diffusion_forcing import diffusion_forcing
from wm_train.objectives.forcing_config import DiffusionForcingConfig
from wm_train.optim.adamw import optimizer_tensors
from wm_train.optim.config import NorMuonConfig
from wm_train.optim.normuon import build_normuon
from wm_train.worker import end_process
from wm_train.world import join_world

CONFIG = WaypointConfig(
    latent_channels=3,
    depth=4,
    width=64,
    noise_features=16,
    controls=7,
    window=2,
    dilation=2,
    reach=4,
    activation_checkpointing="block",
)
SHAPE = ExampleShape(batch=2, frames=5, height=4, width=6, temporal_stride=4)


class Awake(Waypoint):
    """Waypoint with small numbers where a new one has zeros."""

    def initial_rule(self, name, shape):
        rule = super().initial_rule(name, shape)
        zero = rule is not None and rule.scale == 0.0
        return Rule("normal", 0.1) if zero else rule


def unequal_after_a_step(model) -> list[str]:
    """Step the sharded model, each matrix by its owner, and a whole copy of it; return the names of
    weights and optimizer states that differ by a bit."""
    config = NorMuonConfig(normuon_scale="muon")
    whole = Awake(CONFIG)
    for (_, copy), (_, p) in zip(whole.named_parameters(), model.named_parameters(), strict=True):
        copy.data = whole_tensor(p.detach()).clone()
        copy.grad = None if p.grad is None else whole_tensor(p.grad).clone()
    found = []
    for one in (whole, model):
        optimizer = build_normuon(one, config)
        optimizer.step()
        weights = {name: p.detach() for name, p in one.named_parameters()}
        found.append(weights | optimizer_tensors(one, optimizer))
    return [
        name for name, x in found[0].items() if not torch.equal(x, whole_tensor(found[1][name]))
    ]


def main() -> None:
    cp, out = int(sys.argv[1]), Path(sys.argv[2])
    world = join_world(get_backend("cpu"), 60.0)
    degrees = MeshDegrees(dp_shard=world.size // cp, ulysses=cp)
    mesh = build_mesh(degrees, "cpu")
    with torch.device("meta"):
        model = Awake(CONFIG)
    shard_model(model, model.units(), mesh.fsdp)
    model.to_empty(device="cpu")
    initialise_(model, 0)

    sequence = make_sequence(ClipLayout(SHAPE.frames), mesh)
    clips = SHAPE.batch // mesh.data_size
    rows = slice(mesh.data_index * clips, (mesh.data_index + 1) * clips)
    local = slice(sequence.frames.start, sequence.frames.stop)
    conditions = example_conditions(CONFIG.needs(), SHAPE, 0)
    conditions = replace(
        conditions, fields={name: field[rows] for name, field in conditions.fields.items()}
    )
    latents = example_latents(CONFIG.needs(), SHAPE, 0)[rows, local]
    draws, key = torch.arange(SHAPE.batch)[rows], NoiseKey(0, "stage")
    # at this seed the first clip keeps its controls and the second does not
    config = DiffusionForcingConfig(controls_dropout=0.5)
    output = diffusion_forcing(model, Clips(latents, draws, conditions, sequence, key), config)
    (output.loss.sum() / SHAPE.batch).backward()

    loss = output.loss.detach().sum() / cp
    elements = torch.tensor(sum(local_tensor(p).numel() for p in model.parameters()))
    gradients = {n: whole_tensor(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    for total in (loss, elements):
        dist.all_reduce(total)
    unequal = unequal_after_a_step(model)
    if world.rank == 0:
        found = {"loss": loss, "elements": elements, "gradients": gradients}
        found["unequal"] = unequal
        torch.save(found, out)
    world.barrier()
    end_process(0)


if __name__ == "__main__":
    main()
