"""How one clip and one model are spread over processes. Knows nothing of objectives, data or device
vendors.

Read in this order: `layout` (who holds which frame, who may see whom), `sequence` (the four verbs a
model uses), `comm` (how a verb runs over members), then the verbs: `gdn_scan`, `halo`, `attend`
(`ulysses`, `ring`, `masks`), `clip_mean`. `process_group` and `virtual` carry collectives out;
`reference` and `local_attention` are the local computations; `mesh`, `sharding`, `checkpointing`
and `engines` fit it into a training run; `traffic` says what all of it should cost.
"""
