"""Other projects' checkpoints and their answers, from public descriptions: what our importers are tested against.

Each module gives `checkpoint(...)`, tensors under the project's own names and shapes with random weights, and
`embed(state, images)`, its test-time embedding. They are slow and literal, and know nothing of `chains`: where the two
agree, it is not because they share a line. `state` makes weights, `layers` has the layers, `residual` the ResNets.
"""
