"""Independent reference implementations of the published systems, one page each.

Each module computes the logits of one system from its description, with layer numbers and
constants written out, in the dtype of the parameters. Nothing here imports the training script or
reads its configuration.
"""
