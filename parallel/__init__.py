"""Spread one clip and one model over ranks, without knowing objectives, data or device vendors.

`parallel/README.md` explains the whole package, the mathematics included. Read the code in this
order: `layout` (frames per rank, and which frame may see which), `sequence` (the five verbs that a
model calls), `comm` (how a verb runs on several ranks), then the verbs: `gdn_scan`, `halo`,
`attend` (`ulysses`, `ring`, `need`, `masks`), `clip_mean`, `gather`. `process_group` and `virtual`
execute collectives; `reference` and `local_attention` are the local computations; `mesh`,
`sharding`, `checkpointing` and `engines` connect it to a training run; `traffic` predicts the bytes
of every verb.
"""
