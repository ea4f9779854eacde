"""Independent reference implementations of the published systems, one page each.

Each module computes the logits of one system in float32 from its description, with layer numbers
and constants written out. Nothing here imports the training script or reads its configuration.
"""
